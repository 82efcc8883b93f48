"""Runs that resume: nothing is asked for twice, whatever ended the run before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.endpoint_runs import Progress, read, run
from scoredraw.errors import InputError, StoppedError
from scoredraw.model_servers import ModelError, ServerModel
from scoredraw.models import Completion

pytestmark = pytest.mark.contract

PROMPTS = [f"prompt {i}" for i in range(5)]
CHAT = [{"role": "user", "content": "hello"}]


class Local:
    """Samples that tell where they come from, and a record of what was asked."""

    thread_safe = False
    name = "local"

    def __init__(self, fails: Callable[[int], Exception | None] = lambda call: None) -> None:
        self.asked: list[tuple[Any, int, int | None]] = []
        self.fails = fails

    def sample(
        self,
        prompt: Any,
        n: int = 1,
        *,
        temperature: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[Completion]:
        self.asked.append((prompt, n, seed))
        error = self.fails(len(self.asked))
        if error is not None:
            raise error
        values = np.array([-0.1, -np.pi, -np.inf])
        return [
            Completion(f"{prompt}/{seed}/{j}é\u2028", values, (1, 2, 3), j > 0) for j in range(n)
        ]

    @property
    def samples_asked(self) -> int:
        return sum(n for _, n, _ in self.asked)


def texts(made: list[list[Completion]]) -> list[list[str]]:
    return [[c.text for c in some] for some in made]


def test_every_prompt_gets_its_samples_and_the_file_gives_them_back(tmp_path: Path) -> None:
    model, path = Local(), tmp_path / "new folder" / "out.jsonl"
    made = run(model, [*PROMPTS, CHAT], path, n=3, seed=1)
    assert [len(some) for some in made] == [3] * 6
    assert made[0][0].text.startswith("prompt 0/")
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert len(lines) == 1 + 18  # the settings, and a line a sample
    again = Local()
    back = run(again, [*PROMPTS, CHAT], path, n=3, seed=1)
    assert again.asked == []
    for one, other in zip(chain(*made), chain(*back), strict=True):
        assert (one.text, one.tokens, one.finished) == (other.text, other.tokens, other.finished)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
    assert texts(list(read(path).values())) == texts(made)


def test_every_request_has_its_own_seed(tmp_path: Path) -> None:
    model = Local()
    run(model, PROMPTS, tmp_path / "a", n=2, seed=0)
    seeds = [seed for _, _, seed in model.asked]
    assert len(set(seeds)) == len(PROMPTS)
    other = Local()
    run(other, PROMPTS, tmp_path / "b", n=2, seed=0)
    assert other.asked == model.asked
    free = Local()
    run(free, PROMPTS, tmp_path / "c")
    assert {seed for _, _, seed in free.asked} == {None}


def test_more_samples_and_more_prompts_go_on_in_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first = run(Local(), PROMPTS[:3], path, n=2, seed=1)
    model = Local()
    made = run(model, PROMPTS, path, n=3, seed=1)
    assert [(p, n) for p, n, _ in model.asked] == [
        ("prompt 0", 1), ("prompt 1", 1), ("prompt 2", 1), ("prompt 3", 3), ("prompt 4", 3),
    ]  # fmt: skip
    assert [some[:2] for some in texts(made[:3])] == texts(first)
    fewer = Local()
    assert texts(run(fewer, PROMPTS[:3], path, n=1, seed=1)) == [t[:1] for t in texts(first)]
    assert fewer.asked == []


@given(cut=st.integers(0, 4000))
@settings(max_examples=40)
def test_a_file_cut_off_anywhere_is_completed(tmp_path_factory: Any, cut: int) -> None:
    """Whatever a kill leaves of the file, every whole line of it is kept and the rest asked for."""
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"
    run(Local(), PROMPTS, path, n=2)
    whole = path.read_bytes()
    cut = min(cut, len(whole))
    path.write_bytes(whole[:cut])
    kept = max(0, sum(line == w for line, w in zip(
        whole[:cut].split(b"\n"), whole.split(b"\n")[:-1], strict=False)) - 1)  # fmt: skip
    model = Local()
    made = run(model, PROMPTS, path, n=2)
    assert model.samples_asked == 10 - kept
    assert [len(some) for some in made] == [2] * 5
    final = Local()
    run(final, PROMPTS, path, n=2)
    assert final.asked == []


def test_a_file_of_other_settings_or_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run(Local(), PROMPTS, path, temperature=0.7, stop=["\n"])
    before = path.read_bytes()
    model = Local()

    def refused(message: str, prompts: Any = PROMPTS, **request: Any) -> None:
        with pytest.raises(InputError, match=message) as error:
            run(model, prompts, path, **request)
        assert "\n" not in str(error.value)

    good: dict[str, Any] = {"temperature": 0.7, "stop": ["\n"]}
    refused(
        r"^path: got .*out.jsonl, made with temperature 0.7, want temperature 1.0,", stop=["\n"]
    )
    refused(r"^path: .* made with seed 'not given', want seed 3", **good, seed=3)
    refused("^path: got .* of another prompt 1, want", [PROMPTS[0], "x", *PROMPTS[2:]], **good)
    refused("^path: got .* of another prompt 0, want", PROMPTS[1:], **good)
    model.name = "other"
    refused(r"^path: .* made with model 'local', want model 'other'", **good)
    other = tmp_path / "notes.jsonl"
    other.write_text('{"note": 1}\n')
    with pytest.raises(InputError, match=r"^path: got .*which holds something else, want a new"):
        run(model, PROMPTS, other)
    with pytest.raises(InputError, match=r"^path: got .*which holds something else"):
        read(other)
    other.write_text("free text, no JSON\n")
    with pytest.raises(InputError, match=r"^path: got .*which holds something else"):
        run(model, PROMPTS, other)
    assert model.asked == []
    assert path.read_bytes() == before
    path.write_bytes(before + b'{"prompt": 0}\n')
    model.name = "local"
    refused("^path: got a line that is no sample", **good)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n": 0}, "n: got 0"), ({"concurrency": 0}, "concurrency: got 0"),
     ({"max_refused": -1}, "max_refused: got -1"), ({"colour": 1}, "request: .*colour"),
     ({"stop": object()}, "request: .*JSON")],
)  # fmt: skip
def test_bad_input_leaves_no_file(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        run(Local(), PROMPTS, tmp_path / "out.jsonl", **options)
    with pytest.raises(InputError, match=r"^prompts: got one text"):
        run(Local(), "a prompt", tmp_path / "out.jsonl")
    with pytest.raises(InputError, match=r"^model: got object, want one with `sample`"):
        run(object(), PROMPTS, tmp_path / "out.jsonl")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=r"^path: cannot write"):
        run(Local(), PROMPTS, tmp_path)
    assert run(Local(), [], tmp_path / "none.jsonl") == []


def test_a_model_in_this_process(tiny_model: str, tmp_path: Path) -> None:
    """Real samples, with log-probabilities that may be -inf, and a prompt beyond the window."""
    from scoredraw.models import TransformersModel
    from scoredraw.small_models import load_model

    model, path = TransformersModel(*load_model(tiny_model)), tmp_path / "out.jsonl"
    made = run(model, ["one", "two"], path, n=3, max_tokens=4, seed=0)
    assert len({c.tokens for some in made for c in some}) == 6
    with pytest.raises(StoppedError, match=r"^prompt 2: prompt: got 5004 tokens.*; 6 of 9 samples"):
        run(model, ["one", "two", "x" * 5000], path, n=3, max_tokens=4, seed=0)
    assert texts(list(read(path).values())) == texts(made)
    with pytest.raises(InputError, match=r"^path: .*made with max_tokens 4, want max_tokens 256"):
        run(model, ["one", "two"], path, n=3, seed=0)  # the model's own length


def test_a_batch_of_prompts_is_what_each_would_be_alone(tiny_model: str, tmp_path: Path) -> None:
    """Nor does it matter where the run was interrupted."""
    from scoredraw.models import TransformersModel
    from scoredraw.small_models import load_model

    model, path = TransformersModel(*load_model(tiny_model)), tmp_path / "out.jsonl"
    how: dict[str, Any] = {"n": 3, "max_tokens": 5, "seed": 1}
    whole = run(model, PROMPTS, path, **how)
    alone = [model.sample_all([p], 3, max_tokens=5, seed=1, first=i)[0]
             for i, p in enumerate(PROMPTS)]  # fmt: skip
    assert texts(whole) == texts(alone)
    lines = path.read_text().splitlines(keepends=True)
    for cut in (1, 3, 8):
        part = tmp_path / f"cut{cut}.jsonl"
        part.write_text("".join(lines[:cut]))
        asked: list[int] = []

        class Counted(TransformersModel):
            def sample_all(self, prompts: Any, n: int = 1, **more: Any) -> Any:
                asked.append(len(prompts))  # noqa: B023
                return super().sample_all(prompts, n, **more)

        counted = Counted(model.model, model.tokenizer, name=model.name)
        assert texts(run(counted, PROMPTS, part, **how)) == texts(whole)
        assert sum(asked) == len(PROMPTS) - (cut - 1) // 3


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="no file locks on this system")
    path = tmp_path / "out.jsonl"

    def second(call: int) -> None:
        with pytest.raises(InputError, match=r"^path: got .*in use, want one that no other"):
            run(Local(), PROMPTS, path)

    assert len(run(Local(second), PROMPTS[:1], path)[0]) == 1
    assert len(run(Local(), PROMPTS[:1], path)[0]) == 1  # let go at the end


def test_the_model_stops_and_what_came_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    gone = ModelError("tiny: asked 6 times, last: no answer")
    gone.made = (Completion("came before"),)
    model = Local(lambda call: gone if call >= 3 else None)
    message = r"^tiny: asked 6 times, last: no answer; 5 of 10 samples are in .*out.jsonl, the same"
    with pytest.raises(StoppedError, match=message) as error:
        run(model, PROMPTS, path, n=2)
    assert error.value.__cause__ is gone
    assert len(model.asked) == 3
    assert read(path)[2][0].text == "came before"
    after = Local()
    made = run(after, PROMPTS, path, n=2)
    assert after.samples_asked == 5
    assert made[2][0].text == "came before"


def test_a_prompt_that_is_refused_does_not_stop_the_others(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    too_long = ModelError("tiny: BadRequestError: 4097 tokens, at most 4096")
    too_long.status = 400
    short = InputError("prompt: got 70 tokens with the reply, want at most 64")
    faults = {2: too_long, 4: short}
    model = Local(faults.get)
    message = "^2 prompts were refused, the first: prompt 1: tiny: .*; 3 of 5 samples are in"
    with pytest.raises(StoppedError, match=message):
        run(model, PROMPTS, path)
    assert sorted(read(path)) == [0, 2, 4]
    refusing = Local(lambda call: short)
    with pytest.raises(StoppedError, match=r"^3 prompts were refused, .*: prompt 0: prompt: "):
        run(refusing, [f"x {i}" for i in range(9)], tmp_path / "many.jsonl", max_refused=2)
    assert len(refusing.asked) == 3
    wrong = Local(lambda call: InputError("temperature: got -1, want more"))
    with pytest.raises(InputError, match=r"^temperature: got"):  # every prompt's error: at once
        run(wrong, PROMPTS, tmp_path / "wrong.jsonl")
    assert len(wrong.asked) == 1


def test_an_unforeseen_error_comes_as_it_is(tmp_path: Path) -> None:
    model = Local(lambda call: ZeroDivisionError("of the model") if call == 3 else None)
    with pytest.raises(ZeroDivisionError, match="of the model") as error:
        run(model, PROMPTS, tmp_path / "out.jsonl")
    assert error.value.__notes__ == [f"2 of 5 samples are in {tmp_path / 'out.jsonl'}"]

    class Mute(Local):
        def sample(self, *args: Any, **more: Any) -> list[Completion]:
            return []

    with pytest.raises(InputError, match=r"^model: got no samples at all"):
        run(Mute(), PROMPTS, tmp_path / "mute.jsonl")


# ---- a server, and processes that are killed -----------------------------------------------------


class Server(ThreadingHTTPServer):
    """Answers text completions, one choice a request; `gate` may hold or refuse a request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.asked: list[tuple[str, int]] = []
        self.lock = threading.Lock()
        self.gate: Callable[[int], int] = lambda number: 200
        self.ends = threading.Event()

    def handle_error(self, *_: Any) -> None:
        """A client that has been killed is part of the test."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server: Server = self.server  # type: ignore[assignment]
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.asked.append((body["prompt"], body["seed"]))
            number = len(server.asked)
        status = server.gate(number)
        text = f"{body['prompt']}/{body['seed']}"
        answer = {
            "choices": [{"index": 0, "text": text, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 4},
        }
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("openai", reason="the extra language is not installed")
    running = Server()
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield running
    running.ends.set()
    running.shutdown()
    running.server_close()


def connect(server: Server, **options: Any) -> ServerModel:
    return ServerModel("tiny", server.url, sleep=lambda seconds: None, **options)


def test_progress_tells_samples_tokens_and_cost(server: Server, tmp_path: Path) -> None:
    path, seen = tmp_path / "out.jsonl", list[Progress]()
    run(connect(server), PROMPTS[:2], path, n=2, seed=0)
    model = connect(server, prices=(1.0, 5.0))
    run(model, PROMPTS, path, n=2, seed=0, progress=seen.append)
    assert [p.done for p in seen] == [5, 6, 7, 8, 9, 10]  # four are of the first call
    assert {p.total for p in seen} == {10}
    assert seen[-1].tokens == 6 * 4
    assert seen[-1].cost == pytest.approx(6 * (10 * 1.0 + 4 * 5.0) / 1e6)
    assert seen[-1].tokens_per_second == pytest.approx(24 / seen[-1].seconds)
    local = list[Progress]()
    run(Local(), PROMPTS, tmp_path / "local.jsonl", progress=local.append)
    assert (local[-1].tokens, local[-1].cost) == (15, None)


def test_so_many_requests_at_once_and_no_more(server: Server, tmp_path: Path) -> None:
    together, most, now = threading.Barrier(3), [0], [0]

    def gate(number: int) -> int:
        with server.lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.wait(60)  # comes through only if three are here at the same time
        with server.lock:
            now[0] -= 1
        return 200

    server.gate = gate
    run(connect(server), [*PROMPTS, "sixth"], tmp_path / "out.jsonl", concurrency=3, seed=0)
    assert most == [3]
    threads = set()
    local = Local(lambda call: threads.add(threading.current_thread()))  # type: ignore[func-returns-value]
    run(local, PROMPTS, tmp_path / "local.jsonl", concurrency=3)
    assert threads == {threading.current_thread()}


def test_a_server_that_ignores_n_is_asked_side_by_side(server: Server, tmp_path: Path) -> None:
    (made,) = run(connect(server), ["one"], tmp_path / "out.jsonl", n=5, seed=0)
    assert len(server.asked) == len({c.text for c in made}) == 5
    assert {f"{p}/{s}" for p, s in server.asked} == {c.text for c in made}


def test_a_server_that_goes_away_in_the_middle(server: Server, tmp_path: Path) -> None:
    server.gate = lambda number: 200 if number <= 4 else 503
    model, path = connect(server, max_retries=2), tmp_path / "out.jsonl"
    with pytest.raises(StoppedError, match=r"^tiny: asked 3 times.*; 4 of 10 samples are in"):
        run(model, PROMPTS, path, n=2, concurrency=2, seed=0)
    assert 4 + 3 <= len(server.asked) <= 4 + 2 * 3  # what was under way was tried as often
    before = Counter(server.asked[:4])
    server.gate, server.asked = (lambda number: 200), []
    run(model, PROMPTS, path, n=2, seed=0)
    assert len(server.asked) == 6
    assert not before & Counter(server.asked)


SCRIPT = """
import signal, sys
from scoredraw import endpoint_runs
from scoredraw.model_servers import ServerModel

signal.signal(signal.SIGINT, signal.default_int_handler)
prompts = [f"prompt {i}" for i in range(20)]
model = ServerModel("tiny", sys.argv[1], timeout=240)
endpoint_runs.run(model, prompts, sys.argv[2], n=2, concurrency=4, seed=0)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_pays_for_nothing_twice(server: Server, tmp_path: Path, how: int) -> None:
    """The server answers 15 requests and holds the next four: then the process is killed.

    A request is only sent when the answers before it are on the disk, so the file has all 15.
    """
    held = threading.Semaphore(0)

    def gate(number: int) -> int:
        if number > 15:
            held.release()
            server.ends.wait(240)
        return 200

    server.gate, path = gate, tmp_path / "out.jsonl"
    command = [sys.executable, "-c", SCRIPT, server.url, str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ}) as process:
        assert all(held.acquire(timeout=120) for _ in range(4))
        process.send_signal(how)
        _, said = process.communicate(timeout=60)  # Ctrl-C does not wait for the server
    assert process.returncode != 0
    assert (b"KeyboardInterrupt" in said) == (how == signal.SIGINT)
    assert path.read_bytes().endswith(b"\n")
    kept = sum(map(len, read(path).values()))
    assert kept == 15
    assert len(server.asked) == 19
    answered = Counter(server.asked[:15])

    server.gate, server.asked = (lambda number: 200), []
    prompts = [f"prompt {i}" for i in range(20)]
    made = run(connect(server), prompts, path, n=2, concurrency=4, seed=0)
    assert len(server.asked) == 40 - kept
    assert not answered & Counter(server.asked)
    whole = run(connect(server), prompts, tmp_path / "whole.jsonl", n=2, concurrency=4, seed=0)
    assert texts(made) == texts(whole)  # as if nothing had happened
