"""Text backends: where sampled text, log-probabilities and hidden states come from.

A method asks for the smallest thing it needs, and whatever has that method will do:

    ask(messages) -> str                          a reply (`TextModel`)
    sample(prompt, n, ...) -> [Completion]        n samples with their log-probabilities
    score(prompt, completion) -> (T,)             the log-probabilities of a given text
    next_token_logprobs(prompt) -> (V,)           the next token's distribution

Here are models of transformers in this process; `llama_models` has those of llama.cpp, and
`model_servers` models behind a server. A prompt is a text to go on from, or messages, which the
model's chat template puts together.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from scoredraw.errors import require
from scoredraw.token_sampling import Choose, Ended, Tokens, sample_tokens, token_logprobs

Float = npt.NDArray[np.float64]
Message = Mapping[str, str]
Prompt = str | Sequence[Message]


@dataclass(frozen=True, eq=False)
class Completion:
    """One sampled text.

    logprobs: float64 (T,), of each token that was sampled, the one that ended it included: under
    the model as it is (temperature 1, nothing cut off), in nats; None where the backend does not
    say. tokens: their ids, () where the backend does not say. text: without special tokens, and
    without the stop string. finished: ended by itself, not by max_tokens.
    """

    text: str
    logprobs: Float | None = None
    tokens: tuple[int, ...] = ()
    finished: bool = True

    @property
    def logprob(self) -> float:
        """Of the whole completion; NaN where it is not known."""
        return float("nan") if self.logprobs is None else float(self.logprobs.sum())


@runtime_checkable
class TextModel(Protocol):
    """What a method needs of a language model: a conversation in, a reply out.

    A message is {"role": "system" | "user" | "assistant", "content": text}.
    """

    def ask(self, messages: Sequence[Message]) -> str: ...


@runtime_checkable
class SamplingModel(Protocol):
    """What a method needs to draw samples: n texts that may come after a prompt."""

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
    ) -> list[Completion]: ...


@runtime_checkable
class ScoringModel(Protocol):
    """What a method needs to weigh a text it was given: log p of its tokens, float64 (T,)."""

    def score(self, prompt: Prompt, completion: str, *, end: bool = False) -> Float: ...


def until_stop(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the stop strings in it.

    >>> until_stop("Yes.\\nNo.", ["No", "\\n"])
    'Yes.'
    """
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


class LocalModel(ABC):
    """What the models of this process share: prompts as token ids with room in the window."""

    max_new_tokens: int

    @property
    @abstractmethod
    def window(self) -> int:
        """How many tokens the model can see at once."""

    @abstractmethod
    def prompt(self, messages: Sequence[Message], reply: str = "") -> str:
        """The text the model continues; `reply` is how its answer begins."""

    @abstractmethod
    def prompt_tokens(self, prompt: Prompt, reply: str = "") -> list[int]:
        """The token ids of a prompt, with those that begin a text."""

    @abstractmethod
    def _ids(self, text: str) -> list[int]:
        """The token ids of a text on its own."""

    def text_of(self, prompt: Prompt) -> str:
        """A prompt as the text the model goes on from."""
        return prompt if isinstance(prompt, str) else self.prompt(prompt)

    def fitting_tokens(self, prompt: Prompt, room: int, reply: str = "") -> list[int]:
        """`prompt_tokens`, or an `InputError` where `room` more don't fit the window."""
        ids = self.prompt_tokens(prompt, reply)
        argument = "prompt" if isinstance(prompt, str) else "messages"
        require(bool(ids), argument, "no tokens", "at least one to go on from")
        wanted = f"at most {self.window}, which the model can see: shorten the texts"
        tokens = len(ids) + room
        require(tokens <= self.window, argument, f"{tokens} tokens with the reply", wanted)
        return ids

    def _room(self, max_tokens: int | None, stop: Sequence[str]) -> int:
        """How many tokens a sample may take, where what is asked for can be done."""
        room = self.max_new_tokens if max_tokens is None else max_tokens
        require(room >= 1, "max_tokens", room, "a positive count")
        require(not isinstance(stop, str), "stop", repr(stop), "a list of strings")
        require(all(stop), "stop", "an empty string", "strings to stop at")
        return room

    def _continuation(self, text: str, completion: str) -> list[int]:
        """The tokens that a completion adds to a text's, or, where it changes them, to a line's."""
        for before in (text, "\n"):
            start, whole = self._ids(before), self._ids(before + completion)
            if whole[: len(start)] == start:
                return whole[len(start) :]
        return self._ids(completion)


class TransformersModel(LocalModel):
    r"""A causal language model of transformers in this process: greedy replies, log-probabilities.

    Deterministic: the same messages give the same reply. To be asked from one thread. Messages are
    put together by the tokenizer's chat template, or else as ``role: content``, a line each.

    model, tokenizer: as `transformers` loads them, on any device. max_new_tokens: of a reply. name:
    what files of its samples say they are by.
    Raises `InputError` for a prompt without room in the model's window of positions. A reply takes
    one forward pass of the prompt and one a token; `next_token_logprobs` one pass in all.

    >>> model = TransformersModel(*small_model(), max_new_tokens=8)  # doctest: +SKIP
    >>> model.ask([{"role": "user", "content": "Say hello."}])  # doctest: +SKIP
    'Hello! How can I help you'
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_new_tokens: int = 256, name: str = ""
    ) -> None:
        require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "a positive count")
        self.name = name or type(self).__name__
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
        return len(self.prompt_tokens(messages, reply))

    def ask(self, messages: Sequence[Message]) -> str:
        """The greedy reply, without special tokens."""
        import torch

        ids = self._encode(messages, self.max_new_tokens)
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

    def next_token_logprobs(self, prompt: Prompt, reply: str = "") -> Float:
        r"""log p(token | prompt, start of the reply) of every token, float64 (V,).

        One forward pass. The logarithms are normalised in float64: sum exp = 1.
        """
        import torch

        ids = self._encode(prompt, 1, reply)
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

    def sample(
        self,
        prompt: Prompt,
        n: int = 1,
        *,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[Completion]:
        """n samples of what comes after a prompt; see `sample_all`."""
        return self.sample_all(
            [prompt], n, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, stop=stop, seed=seed,
        )[0]  # fmt: skip

    def sample_all(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        *,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        first: int = 0,
        choose: Choose | None = None,
        progress: Callable[[int, int], Any] | None = None,
    ) -> list[list[Completion]]:
        """n samples of each prompt in one batch -> a list of n `Completion` a prompt.

        temperature 0 is greedy; top_k, top_p, min_p as `categorical.truncate`. A sample ends at the
        model's end of text, at a stop string, or after max_tokens (the model's max_new_tokens).
        The same seed gives the same samples, whatever the batch; `first` is the number of the first
        prompt where they come in portions. choose: as `sample_tokens`. Raises `InputError` for a
        prompt without room for max_tokens, and as `token_sampling.sample_tokens`, whose time and
        memory it takes.
        """
        room = self._room(max_tokens, stop)
        ids = [self.fitting_tokens(prompt, room) for prompt in prompts]
        made = sample_tokens(
            self.model, ids, n, max_tokens=room, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, end=self.end_tokens, ended=self.stop_watch(stop), rng=seed, first=first,
            choose=choose, progress=progress,
        )  # fmt: skip
        return [
            [self.completed(before, tokens, stop) for tokens in samples]
            for before, samples in zip(ids, made, strict=True)
        ]

    def score(self, prompt: Prompt, completion: str, *, end: bool = False) -> Float:
        """log p of each token of a given completion after a prompt, float64 (T,), nats.

        end: also that of ending there. The completion's tokens are those that it adds to the
        prompt's, which stay as they are: as if the model had produced it. One forward pass.
        """
        own = self._continuation(self.text_of(prompt), completion)
        if end:
            wanted = "an end-of-text token"
            require(bool(self.end_tokens), "end", "a model without one", wanted)
            own = [*own, self.end_tokens[0]]
        return token_logprobs(self.model, self.fitting_tokens(prompt, len(own)), own)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a text: the generation configuration's, and the tokenizer's."""
        said = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        known = [*(said if isinstance(said, list) else [said]), self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(int(token) for token in known if token is not None))

    def stop_watch(self, stop: Sequence[str]) -> Ended | None:
        """Told the tokens of rows, says which have come to a stop string; None without any."""
        if not stop:
            return None
        # a stop string that has just been completed lies within so many tokens of the end
        tail = max(len(s.encode()) for s in stop) + 1
        # something before them, so that no decoder takes their first blank for the text's
        start = self._ids("a")
        skip = len(self.tokenizer.decode(start))

        def ended(rows: Sequence[Sequence[int]]) -> list[bool]:
            # four beginnings, as one within a character of up to four bytes may spoil the rest
            cut = [[*start, *row[-tail - i :]] for row in rows for i in range(4)]
            texts = [text[skip:] for text in self.tokenizer.batch_decode(cut)]
            return [any(s in t for t in texts[i : i + 4] for s in stop)
                    for i in range(0, len(texts), 4)]  # fmt: skip

        return ended

    def completed(self, before: Sequence[int], made: Tokens, stop: Sequence[str]) -> Completion:
        """Sampled tokens after those before them as a `Completion`, up to a stop string."""
        ids = made.ids.tolist()
        whole = self.text_after(before, ids)
        text = until_stop(whole, stop)
        finished = made.finished or len(text) < len(whole)
        return Completion(text, made.logprobs, tuple(ids), finished)

    def text_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """What tokens add to the text before them: decoded on their own they may lose a blank."""
        start, whole, own = self.tokenizer.batch_decode(
            [list(before), [*before, *ids], list(ids)], skip_special_tokens=True
        )
        return str(whole[len(start) :] if whole.startswith(start) else own)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _spellings(self, label: str) -> list[int]:
        found = []
        for spelling in (label, f"Ġ{label}", f"▁{label}", f" {label}"):  # BPE's and others' blanks
            token = self.tokenizer.convert_tokens_to_ids(spelling)
            if token is not None and self.tokenizer.convert_ids_to_tokens(token) == spelling:
                found.append(token)
        wanted = "labels that are single tokens of this tokenizer"
        require(bool(found), "labels", f"{label!r}, which is several tokens", wanted)
        return found

    def prompt_tokens(self, prompt: Prompt, reply: str = "") -> list[int]:
        """The token ids of a prompt; a chat template writes the special ones itself."""
        text = self.text_of(prompt) + reply
        template = not isinstance(prompt, str) and getattr(self.tokenizer, "chat_template", None)
        begun = text.startswith(self.tokenizer.bos_token or "\0")
        special = not (template or begun)
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _encode(self, prompt: Prompt, room: int, reply: str = "") -> Any:
        import torch

        ids = self.fitting_tokens(prompt, room, reply)
        return torch.tensor([ids], device=next(self.model.parameters()).device)

    def _padding(self) -> int | None:
        own = self.tokenizer.pad_token_id
        return own if own is not None else self.tokenizer.eos_token_id
