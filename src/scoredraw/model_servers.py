"""Models behind an OpenAI-compatible server: OpenAI, vLLM, llama.cpp, `transformers serve`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scoredraw.errors import InputError, StoppedError, import_extra, require
from scoredraw.models import Message


class ModelError(StoppedError):
    """A model's server gave no reply, however often it was asked; the message says what it said."""


@dataclass
class Usage:
    """What a server was asked for: `requests` includes the `retries`; tokens as it counts them."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ServerModel:
    r"""A model behind an OpenAI-compatible server (OpenAI, vLLM, llama.cpp, transformers serve).

    A request that meets a broken or closed connection, no answer within `timeout`, a status 408,
    409, 429 or 5xx, or half an answer is made again, at most `max_retries` times, after

        wait_i = max(backoff 2^i, what the server's Retry-After asks for), at most `longest_wait`

    seconds; then, and at once for any other refusal, `ModelError` says what the last answer was.
    Decoding is greedy by default. `ask` may be called from several threads.

    name: the model's, as the server knows it. base_url, api_key: for `openai.OpenAI`, which
    otherwise reads OPENAI_BASE_URL and OPENAI_API_KEY; with a base_url the key may be missing.
    client: such a client, instead. request: further arguments of a completion, as the API names
    them. sleep: what waits (seconds). Raises `MissingExtraError` without the package openai.

    >>> model = ServerModel("smollm2", base_url="http://localhost:8000/v1")  # doctest: +SKIP
    >>> model.ask([{"role": "user", "content": "Say hello."}])  # doctest: +SKIP
    'Hello!'
    """

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
        sleep: Callable[[float], Any] = time.sleep,
    ) -> None:
        openai = import_extra("openai", "language")
        require(timeout > 0, "timeout", timeout, "a positive number of seconds")
        require(max_retries >= 0, "max_retries", max_retries, "a count")
        require(backoff >= 0, "backoff", backoff, "a number of seconds")
        if client is None:
            key = api_key if api_key is not None or base_url is None else "none"
            try:
                client = openai.OpenAI(base_url=base_url, api_key=key)
            except openai.OpenAIError as error:
                raise InputError(f"api_key: {_one_line(error)}") from None
        # the retries are ours: bounded, counted, and waited for by a function that tests can give
        self.client = client.with_options(max_retries=0, timeout=timeout)
        self.name, self.max_retries = name, max_retries
        self.backoff, self.longest_wait, self.sleep = backoff, longest_wait, sleep
        self.request = {
            "temperature": temperature, "top_p": 1.0, "max_tokens": max_tokens, **(request or {})
        }  # fmt: skip
        self.usage = Usage()
        self._lock = threading.Lock()

    def ask(self, messages: Sequence[Message]) -> str:
        """The reply's text, "" for an empty one. Raises `ModelError` when there is none to get."""
        import openai

        for attempt in range(self.max_retries + 1):
            self._count(requests=1, retries=int(attempt > 0))
            try:
                return self._reply(messages)
            except (openai.APIError, ValueError) as error:  # ValueError: what came is not JSON
                if not _may_pass(error):
                    raise ModelError(f"{self.name}: {_one_line(error)}") from error
                last = error
            if attempt < self.max_retries:
                wait = max(self.backoff * 2**attempt, _retry_after(last))
                self.sleep(min(wait, self.longest_wait))
        asked = f"asked {self.max_retries + 1} times"
        raise ModelError(f"{self.name}: {asked}, last: {_one_line(last)}") from last

    def _reply(self, messages: Sequence[Message]) -> str:
        answer = self.client.chat.completions.create(
            model=self.name, messages=[dict(m) for m in messages], **self.request
        )
        choices = getattr(answer, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            raise ValueError("an answer without a message in it")
        used = getattr(answer, "usage", None)
        if used is not None:
            self._count(
                prompt_tokens=used.prompt_tokens or 0,
                completion_tokens=used.completion_tokens or 0,
            )
        return choices[0].message.content or ""

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, value in more.items():
                setattr(self.usage, name, getattr(self.usage, name) + value)


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    status = getattr(error, "status_code", None)
    return status is None or status in (200, 408, 409, 429) or status >= 500


def _retry_after(error: Exception) -> float:
    """The seconds that a refusal asks to wait, 0 where it does not say (or gives a date)."""
    response = getattr(error, "response", None)
    try:
        return max(0.0, float(response.headers.get("retry-after", 0.0)))  # type: ignore[union-attr]
    except (AttributeError, ValueError):
        return 0.0


def _one_line(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:200]}"
