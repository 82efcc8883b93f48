"""Models behind an OpenAI-compatible server: OpenAI, vLLM, llama.cpp, `transformers serve`.

A request is made again, a bounded number of times, after what may pass: a broken connection, no
answer, half an answer, a busy or failing server. `ServerModel.ask` gives one reply, `sample` many.
`endpoint_runs` takes many prompts through it, side by side, into a file that resumes.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scoredraw.errors import InputError, StoppedError, import_extra, require
from scoredraw.models import Completion, Message, Prompt, until_stop

UNKNOWN = -9999.0  # what OpenAI's API says of a token outside those it keeps


class ModelError(StoppedError):
    """A model's server gave no answer, however often it was asked; the message says what it said.

    status: of its last answer, None where there was none. made: the samples that came before.
    """

    status: int | None = None
    made: tuple[Completion, ...] = ()


@dataclass
class Usage:
    """What a server was asked for: `requests` includes the `retries`; tokens as it counts them."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ServerModel:
    r"""A model behind an OpenAI-compatible server (OpenAI, vLLM, llama.cpp, transformers serve).

    A request that meets a broken or closed connection, no whole answer within `timeout` seconds, a
    status 408, 409, 429 or 5xx, or half an answer is made again, at most `max_retries` times, after

        wait_i = max(backoff 2^i, what the server's Retry-After asks for), at most `longest_wait`

    seconds; then, and at once for any other refusal, `ModelError` says what the last answer was.
    Replies are greedy by default. It may be asked from several threads.

    name: the model's, as the server knows it. base_url, api_key: for `openai.OpenAI`, which
    otherwise reads OPENAI_BASE_URL and OPENAI_API_KEY; with a base_url the key may be missing.
    client: such a client, instead. request: further arguments of a completion, as the API names
    them; one that is None is not sent. logprobs: whether samples ask for log-probabilities (some
    servers refuse). most_choices: the most samples that one request may ask for (1 where a server
    refuses more). prices: of a million prompt tokens and a million completion tokens, for `cost`.
    sleep: what waits (seconds). Raises `MissingExtraError` without the package openai.

    >>> model = ServerModel("smollm2", base_url="http://localhost:8000/v1")  # doctest: +SKIP
    >>> model.ask([{"role": "user", "content": "Say hello."}])  # doctest: +SKIP
    'Hello!'
    """

    thread_safe = True

    def __init__(
        self,
        name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        client: Any = None,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        timeout: float = 60.0,
        max_retries: int = 5,
        backoff: float = 1.0,
        longest_wait: float = 60.0,
        request: Mapping[str, Any] | None = None,
        logprobs: bool = True,
        most_choices: int = 128,
        prices: tuple[float, float] | None = None,
        sleep: Callable[[float], Any] = time.sleep,
    ) -> None:
        openai = import_extra("openai", "language")
        require(timeout > 0, "timeout", timeout, "a positive number of seconds")
        require(max_retries >= 0, "max_retries", max_retries, "a count")
        require(backoff >= 0, "backoff", backoff, "a number of seconds")
        require(most_choices >= 1, "most_choices", most_choices, "a positive count")
        fine = prices is None or (len(prices) == 2 and min(prices) >= 0)
        require(fine, "prices", prices, "two: of a million prompt and completion tokens")
        if client is None:
            key = api_key if api_key is not None or base_url is None else "none"
            try:
                client = openai.OpenAI(base_url=base_url, api_key=key)
            except openai.OpenAIError as error:
                raise InputError(f"api_key: {_one_line(error)}") from None
        # the retries are ours: bounded, counted, and waited for by a function that tests can give
        self.client = client.with_options(max_retries=0, timeout=timeout)
        self.name, self.timeout, self.max_retries = name, timeout, max_retries
        self.backoff, self.longest_wait, self.sleep = backoff, longest_wait, sleep
        self.request = {
            "temperature": temperature, "top_p": 1.0, "max_tokens": max_tokens, **(request or {})
        }  # fmt: skip
        self.logprobs, self.most_choices, self.prices = logprobs, most_choices, prices
        self.usage = Usage()
        self._lock = threading.Lock()

    @property
    def cost(self) -> float | None:
        """What the usage so far cost, in the unit of `prices`; None without prices.

        Tokens of answers that were broken off are charged by some servers, and counted by none.
        """
        if self.prices is None:
            return None
        spent = (self.usage.prompt_tokens, self.usage.completion_tokens)
        return sum(p * t for p, t in zip(self.prices, spent, strict=True)) / 1e6

    def ask(self, messages: Sequence[Message]) -> str:
        """The reply's text, "" for an empty one. Raises `ModelError` when there is none to get."""
        return self._choices(messages, dict(self.request))[0].text

    def sample(
        self,
        prompt: Prompt,
        n: int = 1,
        *,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[Completion]:
        """n samples of what comes after a text (/v1/completions) or messages (/v1/chat/...).

        A server that gives fewer than n is asked for the rest, with other seeds. max_tokens: the
        reply's by default. seed: sent as it is; what it is worth is the server's affair
        (`transformers serve` keeps one generator for all requests: seeds need one at a time).

        Log-probabilities are those the server reports, None where it reports none, and it chooses
        of which distribution: vLLM (since 0.10, by default) and llama.cpp of the model as it is, as
        `Completion` wants them, whatever the temperature; older vLLM after temperature and
        truncation; OpenAI does not say; `transformers serve` reports none, samples only where the
        model's own generation_config has do_sample, and cuts at its top_k (50 unless that says
        otherwise). A value the server withholds is NaN. Token ids are not known.

        Raises `ModelError`, whose `made` holds the samples that came before; `InputError` for n or
        max_tokens below 1, a negative temperature or seed, top_p outside (0, 1] or an empty stop.
        """
        require(n >= 1, "n", n, "at least one sample")
        seed = self.request.get("seed") if seed is None else seed
        made: list[Completion] = []
        while len(made) < n:
            own = seed if seed is None or not made else derived_seed(seed, len(made))
            try:
                made += self.sample_some(
                    prompt, n - len(made), max_tokens=max_tokens, temperature=temperature,
                    top_p=top_p, stop=stop, seed=own,
                )  # fmt: skip
            except ModelError as error:
                error.made = tuple(made)
                raise
        return made

    def sample_some(
        self,
        prompt: Prompt,
        n: int = 1,
        *,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[Completion]:
        """As many of n samples as one request gives, at least one: a step of `sample`."""
        require(n >= 1, "n", n, "at least one sample")
        require(max_tokens is None or max_tokens >= 1, "max_tokens", max_tokens, "a positive count")
        require(0 <= temperature < np.inf, "temperature", temperature, "a number of at least 0")
        require(0 < top_p <= 1, "top_p", top_p, "a share in (0, 1]")
        require(not isinstance(stop, str), "stop", repr(stop), "a list of strings")
        require(all(stop), "stop", "an empty string", "strings to stop at")
        require(seed is None or seed >= 0, "seed", seed, "a whole number of at least 0")
        n = min(n, self.most_choices)
        request = {**self.request, "temperature": temperature, "top_p": top_p}
        request |= {} if max_tokens is None else {"max_tokens": max_tokens}
        request |= {"n": n} if n > 1 else {}
        request |= {"stop": list(stop)} if stop else {}
        request |= {} if seed is None else {"seed": seed}
        if self.logprobs:
            text = isinstance(prompt, str)
            request |= {"logprobs": 1} if text else {"logprobs": True, "top_logprobs": 1}
        return self._choices(prompt, request, stop)[:n]

    def _choices(
        self, prompt: Prompt, request: dict[str, Any], stop: Sequence[str] = ()
    ) -> list[Completion]:
        """The choices of one answer, asked for until there is one."""
        import openai

        for attempt in range(self.max_retries + 1):
            self._count(requests=1, retries=int(attempt > 0))
            try:
                answer = self._answer(prompt, request)
                found = _completions(answer, stop)
                self._count_tokens(answer)
                return found
            except (openai.APIError, ConnectionError, ValueError) as error:
                if not _may_pass(error):
                    raise self._error(error, isinstance(prompt, str)) from error
                last = error
            if attempt < self.max_retries:
                wait = max(self.backoff * 2**attempt, _retry_after(last))
                self.sleep(min(wait, self.longest_wait))
        raise self._error(last, isinstance(prompt, str)) from last

    def _answer(self, prompt: Prompt, request: dict[str, Any]) -> Any:
        """One request's answer, as JSON."""
        sent = {name: value for name, value in request.items() if value is not None}
        options = {name: sent.pop(name) for name in list(sent) if name.startswith("extra_")}
        # as extra_body the client sends what it does not know too (vLLM's top_k)
        options["extra_body"] = sent | options.get("extra_body", {})
        what: dict[str, Any] = {"prompt": prompt}
        api = self.client.completions
        if not isinstance(prompt, str):
            what, api = {"messages": [dict(m) for m in prompt]}, self.client.chat.completions
        limit = time.monotonic() + self.timeout  # the client's own is of each read
        with api.with_streaming_response.create(model=self.name, **what, **options) as response:
            return json.loads(_within(limit, response))

    def _error(self, error: Exception, text: bool) -> ModelError:
        status = getattr(error, "status_code", None)
        if _may_pass(error):
            found = ModelError(
                f"{self.name}: asked {self.max_retries + 1} times, last: {_one_line(error)}"
            )
        elif text and status in (404, 405, 501):
            hint = "a server without /v1/completions takes messages, not a text"
            found = ModelError(f"{self.name}: /v1/completions: {_one_line(error)}; {hint}")
        else:
            found = ModelError(f"{self.name}: {_one_line(error)}")
        found.status = status
        return found

    def _count_tokens(self, answer: Any) -> None:
        used = answer.get("usage")
        if isinstance(used, dict):
            self._count(
                prompt_tokens=int(used.get("prompt_tokens") or 0),
                completion_tokens=int(used.get("completion_tokens") or 0),
            )

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, value in more.items():
                setattr(self.usage, name, getattr(self.usage, name) + value)


def derived_seed(seed: int, *place: int) -> int:
    """A seed of its own for each place, below 2^31 (which every server can read).

    >>> derived_seed(0, 1) == derived_seed(0, 1), derived_seed(0, 1) == derived_seed(0, 2)
    (True, False)
    """
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0] >> 1)


def _within(limit: float, response: Any) -> bytes:
    """The body, if it is all there by then; `ConnectionError` if not."""
    parts = []
    try:
        for part in response.iter_bytes():
            parts.append(part)
            if time.monotonic() > limit:
                raise TimeoutError("the answer went on beyond the timeout")
    except Exception as error:  # of the transport, whose package is openai's affair
        raise ConnectionError(_one_line(error)) from error
    return b"".join(parts)


def _completions(answer: Any, stop: Sequence[str]) -> list[Completion]:
    """The choices of an answer in the form of either API; `ValueError` if it is not whole."""
    try:
        found = [_completion(choice, stop) for choice in answer["choices"]]
    except (AttributeError, IndexError, KeyError, TypeError):
        found = []
    if not found:
        raise ValueError(f"an answer without a completion: {json.dumps(answer)[:100]}")
    return found


def _completion(choice: Any, stop: Sequence[str]) -> Completion:
    whole = choice["message"].get("content") if "message" in choice else choice["text"]
    text = until_stop(whole or "", stop)  # `transformers serve` leaves the stop string in
    said = choice.get("logprobs") or {}
    # llama.cpp's server answers both in the form of the chat API
    listed = [entry["logprob"] for entry in said.get("content") or []]
    values = listed or said.get("token_logprobs") or []
    logprobs = np.array(values, np.float64) if values else None
    if logprobs is not None:
        logprobs[logprobs == UNKNOWN] = np.nan
    finished = choice.get("finish_reason") != "length" or len(text) < len(whole or "")
    return Completion(text, logprobs, (), finished)


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    status = getattr(error, "status_code", None)
    return status is None or status in (408, 409, 429) or (status >= 500 and status != 501)


def _retry_after(error: Exception) -> float:
    """The seconds that a refusal asks to wait, 0 where it does not say (or gives a date)."""
    response = getattr(error, "response", None)
    try:
        return max(0.0, float(response.headers.get("retry-after", 0.0)))  # type: ignore[union-attr]
    except (AttributeError, ValueError):
        return 0.0


def _one_line(error: Exception) -> str:
    text, body = str(error) or "no message", getattr(error, "body", None)
    if body and " - " not in text:  # not in OpenAI's form: {"detail": ...}, say, or a page
        text += f" - {body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)}"
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}"
