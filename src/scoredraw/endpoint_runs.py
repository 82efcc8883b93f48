"""Long runs over many prompts that resume: what is in the output file is never asked for again.

Every finished sample becomes one JSON line of the file at once, so that an error, Ctrl-C or
kill -9 costs at most the requests that were under way. The same call goes on where the file ends:

    samples = endpoint_runs.run(model, prompts, "samples.jsonl", n=32, temperature=0.7)

The first line holds the settings, each further one a sample: its prompt's number and key (a hash
of the settings and the prompt), its own number, the text and, where they are known, tokens and
log-probabilities. Only the thread of the caller writes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scoredraw.errors import InputError, StoppedError, require
from scoredraw.journal import Journal
from scoredraw.model_servers import derived_seed
from scoredraw.models import Completion, Prompt, SamplingModel

REFUSED = (400, 413, 422)  # statuses about one request: another may pass
FORMAT = 1
ROWS = 32  # samples that go through a model of this process together


@dataclass(frozen=True)
class Progress:
    """Samples `done` of `total`, those of earlier calls included; the rest since this call began.

    tokens: of completions, as the server counts them or the samples' log-probabilities tell; 0
    where neither does. cost: in the unit of the model's prices, None without.
    """

    done: int
    total: int
    tokens: int
    seconds: float
    cost: float | None

    @property
    def tokens_per_second(self) -> float:
        """Over the whole call so far."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def run(
    model: SamplingModel,
    prompts: Sequence[Prompt],
    path: str | Path,
    *,
    n: int = 1,
    concurrency: int = 8,
    max_refused: int = 10,
    progress: Callable[[Progress], Any] | None = None,
    **request: Any,
) -> list[list[Completion]]:
    """n samples of every prompt, by way of a file that resumes -> a list of n a prompt.

    model: whatever has `sample`. One that says `thread_safe` (`ServerModel`) is asked for up to
    `concurrency` prompts at once; one with `sample_all` (`TransformersModel`) takes several as one
    batch, any other one at a time, both in this thread. path: of the output, JSON lines. progress:
    told after every answer. request: arguments of `model.sample` (max_tokens, temperature, top_p,
    stop, seed, ...); from a seed every request gets its own, a function of (seed, prompt's number,
    sample's number), but for `sample_all`, which sees to that itself. Of a model that says
    `whole_pools` (a hedged pool's samples are not alike) all n of a prompt are asked for again
    where some are missing. Prompts may be appended and n raised later: the same file goes on.

    A prompt that the model refuses (an `InputError` about it, or a status 400, 413, 422: too long,
    say) does not stop the others, unless more than max_refused are. Then, and when the model stops
    for good (`ModelError`), the answers under way are still taken in, and `StoppedError` says what
    happened and how much is in the file. Any other error is raised as it is, with that as a note.

    Raises `InputError` before any request for a file of other settings or other prompts, a file
    that another run is writing, or arguments that `sample` does not take. One fsync a sample;
    memory: all samples. At most `concurrency` answers that were paid for are lost by a kill.

    >>> import tempfile
    >>> class Echo:
    ...     def sample(self, prompt, n=1, *, temperature=1.0):
    ...         return [Completion(prompt.upper())] * n
    >>> path = Path(tempfile.mkdtemp()) / "samples.jsonl"
    >>> [[c.text for c in made] for made in run(Echo(), ["a", "b"], path, n=2)]
    [['A', 'A'], ['B', 'B']]
    """
    require(not isinstance(prompts, str), "prompts", "one text", "a list of prompts")
    require(n >= 1, "n", n, "at least one sample")
    require(concurrency >= 1, "concurrency", concurrency, "a positive count")
    require(max_refused >= 0, "max_refused", max_refused, "a count")
    settings = _settings(model, request)
    with _only_writer(Path(path)):
        log = _Log(Path(path), settings, prompts, n)
        tasks = [_Task(i, j) for i in range(len(prompts)) if (j := log.missing(i))]
        if tasks and hasattr(model, "sample_all"):
            _take_batches(model, prompts, request, tasks, log, n, max_refused, progress)
        elif tasks:
            threads = concurrency if getattr(model, "thread_safe", False) else 0
            desk = _Desk(model, prompts, request, n, threads)
            _take_in(desk, deque(tasks), log, max_refused, progress)
    return [[log.made[i][j] for j in range(n)] for i in range(len(prompts))]


def read(path: str | Path) -> dict[int, list[Completion]]:
    """The samples in a run's file, finished or not, by the number of their prompt.

    Raises `InputError` for a file that is none of a run.
    """
    records = Journal(path).records()
    _header(Path(path), records)
    found: dict[int, dict[int, Completion]] = {}
    for i, j, _, made in map(_parsed, records[1:]):
        found.setdefault(i, {})[j] = made
    return {i: [made[j] for j in sorted(made)] for i, made in sorted(found.items())}


@dataclass(frozen=True)
class _Task:
    """Samples that are missing of a prompt: their numbers."""

    prompt: int
    samples: tuple[int, ...]


class _Log:
    """The samples in the file, checked against what is asked for."""

    def __init__(
        self, path: Path, settings: dict[str, Any], prompts: Sequence[Prompt], n: int
    ) -> None:
        self.journal, self.path, self.n = Journal(path), path, n
        self.keys = [_key(settings, prompt) for prompt in prompts]
        self.made: list[dict[int, Completion]] = [{} for _ in prompts]
        records = self.journal.records()
        if not records and _holds_nothing(path):
            self.journal.append({"run": FORMAT, "settings": settings})
        else:
            _check_settings(path, _header(path, records), settings)
        for i, j, key, made in map(_parsed, records[1:]):
            if i < len(prompts):
                wanted = "the prompts it was made with, more at their end, or another file"
                require(key == self.keys[i], "path", f"{path} of another prompt {i}", wanted)
                self.made[i][j] = made
        self.done = sum(j < n for made in self.made for j in made)
        self.total = n * len(prompts)

    def missing(self, prompt: int) -> tuple[int, ...]:
        return tuple(j for j in range(self.n) if j not in self.made[prompt])

    def add(self, prompt: int, sample: int, made: Completion) -> None:
        record: dict[str, Any] = {
            "prompt": prompt, "sample": sample, "key": self.keys[prompt], "text": made.text,
            "finished": made.finished,
        }  # fmt: skip
        if made.tokens:
            record["tokens"] = list(made.tokens)
        if made.logprobs is not None:
            record["logprobs"] = made.logprobs.tolist()
        self.journal.append(record)
        self.made[prompt][sample] = made
        self.done += 1


class _Desk:
    """Takes tasks and hands back answers, from threads that may be left behind, or from here."""

    def __init__(
        self, model: Any, prompts: Sequence[Prompt], request: dict[str, Any], n: int, threads: int
    ) -> None:
        self.model, self.prompts, self.request, self.n = model, prompts, request, n
        self.whole = getattr(model, "whole_pools", False)
        self.seed = request.get("seed", _own_request(model).get("seed"))
        self.room, self.under_way = max(threads, 1), 0
        self.tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[tuple[_Task, Any]] = queue.SimpleQueue()
        self.threads = threads
        for _ in range(threads):  # daemons: Ctrl-C need not wait for a server
            threading.Thread(target=self._serve, daemon=True).start()

    def put(self, task: _Task) -> None:
        self.under_way += 1
        if self.threads:
            self.tasks.put(task)
        else:
            self.answers.put((task, self._ask(task)))

    def get(self, wait: bool = True) -> tuple[_Task, Any]:
        """An answer: completions, or the error that came in their place."""
        answer = self.answers.get(block=wait)
        self.under_way -= 1
        return answer

    def close(self) -> None:
        for _ in range(self.threads):
            self.tasks.put(None)

    def _serve(self) -> None:
        while (task := self.tasks.get()) is not None:
            self.answers.put((task, self._ask(task)))

    def _ask(self, task: _Task) -> Any:
        request = dict(self.request)
        begin, count = (0, self.n) if self.whole else (task.samples[0], len(task.samples))
        if self.seed is not None:
            request["seed"] = derived_seed(self.seed, task.prompt, begin)
        # one request at a time, where the model has that: what it brings is on the disk at once
        sample = getattr(self.model, "sample_some", self.model.sample)
        try:
            made = sample(self.prompts[task.prompt], count, **request)
            return [made[j] for j in task.samples] if self.whole else made
        except Exception as error:
            return error


def _take_in(
    desk: _Desk,
    tasks: deque[_Task],
    log: _Log,
    max_refused: int,
    progress: Callable[[Progress], Any] | None,
) -> None:
    """Keep `room` tasks under way and write what comes, until all is there or cannot go on."""
    meter = _Meter(desk.model, log)
    refused: dict[int, Exception] = {}
    stopped: Exception | None = None
    try:
        while (tasks and stopped is None) or desk.under_way:
            while tasks and stopped is None and desk.under_way < desk.room:
                desk.put(tasks.popleft())
            task, answer = desk.get()
            rest = _write(log, task, answer, meter)
            if _is_refusal(answer):
                refused[task.prompt] = answer
                if len(refused) > max_refused:
                    stopped = stopped or answer
            elif isinstance(answer, Exception):
                stopped = stopped or answer
            else:
                # a server that gives one at a time is asked for the others side by side
                tasks.extendleft(_Task(task.prompt, (j,)) for j in reversed(rest))
            if progress is not None:
                progress(meter.read())
    finally:  # whatever ended it: what has come is kept
        desk.close()
        while not desk.answers.empty():
            _write(log, *desk.get(wait=False), meter)
    _raise_if_stopped(stopped, refused, meter.read(), log.path)


def _take_batches(
    model: Any,
    prompts: Sequence[Prompt],
    request: dict[str, Any],
    tasks: Sequence[_Task],
    log: _Log,
    n: int,
    max_refused: int,
    progress: Callable[[Progress], Any] | None,
) -> None:
    """Prompts that follow one another are sampled as one batch, n of each; missing ones are kept.

    So the samples are those of a run that was never interrupted.
    """
    meter = _Meter(model, log)
    refused: dict[int, Exception] = {}
    batches = deque(_batches(tasks, max(1, ROWS // n)))
    while batches and len(refused) <= max_refused:
        batch = batches.popleft()
        first = batch[0].prompt
        try:
            made = model.sample_all(prompts[first : first + len(batch)], n, first=first, **request)
        except InputError as error:
            if not _is_refusal(error):
                raise
            if len(batch) > 1:  # which one it is shows alone
                batches.extendleft([task] for task in reversed(batch))
            else:
                refused[first] = error
            continue
        for task, samples in zip(batch, made, strict=True):
            _write(log, task, [samples[j] for j in task.samples], meter)
        if progress is not None:
            progress(meter.read())
    _raise_if_stopped(None, refused, meter.read(), log.path)


def _batches(tasks: Sequence[_Task], most: int) -> Iterator[list[_Task]]:
    """At most so many tasks at a time, of prompts that follow one another."""
    batch: list[_Task] = []
    for task in tasks:
        if batch and (len(batch) == most or task.prompt != batch[-1].prompt + 1):
            yield batch
            batch = []
        batch.append(task)
    yield batch


def _write(log: _Log, task: _Task, answer: Any, meter: _Meter) -> tuple[int, ...]:
    """Write what an answer brings; the numbers of the samples that it does not."""
    made = getattr(answer, "made", ()) if isinstance(answer, Exception) else answer
    for j, completion in zip(task.samples, made, strict=False):
        log.add(task.prompt, j, completion)
        meter.count(completion)
    if not isinstance(answer, Exception):
        require(len(made) > 0, "model", "no samples at all", "at least one an answer")
    return task.samples[len(made) :]


class _Meter:
    """What this call has done so far."""

    def __init__(self, model: Any, log: _Log) -> None:
        self.model, self.log = model, log
        self.start, self.counted = time.monotonic(), 0
        self.before = self._used()

    def _used(self) -> tuple[int | None, float | None]:
        tokens = getattr(getattr(self.model, "usage", None), "completion_tokens", None)
        return tokens, getattr(self.model, "cost", None)

    def count(self, made: Completion) -> None:
        self.counted += len(made.tokens) if made.logprobs is None else len(made.logprobs)

    def read(self) -> Progress:
        tokens, cost = self._used()
        tokens = self.counted if tokens is None else tokens - (self.before[0] or 0)
        cost = None if cost is None else cost - (self.before[1] or 0.0)
        seconds = time.monotonic() - self.start
        return Progress(self.log.done, self.log.total, tokens, seconds, cost)


def _is_refusal(answer: Any) -> bool:
    if isinstance(answer, InputError):  # about the prompt, or about an argument of all
        return str(answer).startswith(("prompt:", "messages:"))
    return getattr(answer, "status", None) in REFUSED


def _raise_if_stopped(
    stopped: Exception | None, refused: dict[int, Exception], at: Progress, path: Path
) -> None:
    kept = f"{at.done} of {at.total} samples are in {path}"
    if refused:
        first = min(refused)
        several = f"{len(refused)} prompts were refused, the first: " if len(refused) > 1 else ""
        what = f"{several}prompt {first}: {refused[first]}"
        if stopped is None or stopped in refused.values():
            raise StoppedError(f"{what}; {kept}") from refused[first]
    if isinstance(stopped, StoppedError):
        raise StoppedError(f"{stopped}; {kept}, the same call goes on from there") from stopped
    if stopped is not None:
        stopped.add_note(kept)
        raise stopped


def _settings(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What the samples depend on beside the prompts, as JSON gives it back."""
    require(isinstance(model, SamplingModel), "model", type(model).__name__, "one with `sample`")
    signature = inspect.signature(model.sample)
    try:
        bound = signature.bind("", 1, **request)
    except TypeError as error:
        raise InputError(f"request: {error}; want arguments of the model's sample") from None
    bound.apply_defaults()
    others = list(signature.parameters.values())[2:]
    given = {p.name: bound.arguments[p.name] for p in others if p.kind != p.VAR_KEYWORD} | request
    name = getattr(model, "name", None)
    known = {
        "model": name if isinstance(name, str) else type(model).__name__,
        **_own_request(model),
        **{k: v for k, v in given.items() if v is not None},
    }
    try:
        return json.loads(json.dumps(known))
    except TypeError as error:
        raise InputError(f"request: {error}; want what JSON can hold") from None


def _own_request(model: Any) -> dict[str, Any]:
    """What the model itself adds to every request, but for headers, which may hold a key."""
    longest = getattr(model, "max_new_tokens", None)
    own = getattr(model, "request", None) or ({"max_tokens": longest} if longest else {})
    return {k: v for k, v in own.items() if v is not None and k != "extra_headers"}


def _key(settings: dict[str, Any], prompt: Prompt) -> str:
    what = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    text = json.dumps([settings, what], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _holds_nothing(path: Path) -> bool:
    """Whether a file is new, or a kill cut off its first line."""
    held = path.read_bytes().strip(b"\n") if path.exists() else b""
    start = b'{"run"'[: len(held)]
    return held.startswith(start) and b"\n" not in held


def _header(path: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    fine = bool(records) and records[0].get("run") == FORMAT
    require(fine, "path", f"{path}, which holds something else", "a new file, or one of a run")
    return records[0]["settings"]


def _check_settings(path: Path, had: dict[str, Any], want: dict[str, Any]) -> None:
    for name in sorted(had.keys() | want.keys()):
        was, now = (s.get(name, "not given") for s in (had, want))
        made = f"{path}, made with {name} {was!r}"
        require(was == now, "path", made, f"{name} {now!r}, or another file")


def _parsed(record: dict[str, Any]) -> tuple[int, int, str, Completion]:
    """A line's prompt, sample, key and completion."""
    try:
        logprobs = record.get("logprobs")
        values = None if logprobs is None else np.array(logprobs, np.float64)
        tokens = tuple(record.get("tokens", ()))
        made = Completion(record["text"], values, tokens, record["finished"])
        return int(record["prompt"]), int(record["sample"]), record["key"], made
    except (KeyError, TypeError, ValueError):
        line = json.dumps(record)[:80]
        raise InputError(f"path: got a line that is no sample: {line}, want a run's file") from None


@contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    """Hold the file against a second run; the system lets go of it when this process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = path.open("ab")
    except OSError as error:
        raise InputError(f"path: cannot write {path}: {error.strerror or error}") from None
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wanted = "one that no other run is writing"
            raise InputError(f"path: got {path}, in use, want {wanted}") from None
        yield
