"""Models of llama.cpp in this process, from a GGUF file, through the package llama-cpp-python.

llama.cpp gives the logits; the tokens are drawn here, in float64 and from the same uniforms as
`TransformersModel` draws them, so that a seed means the same in both and nothing is cut off that
was not asked for. The prompt is read once, whatever the number of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scoredraw import categorical
from scoredraw.errors import InputError, MissingExtraError, require
from scoredraw.models import Completion, Float, LocalModel, Message, Prompt, until_stop
from scoredraw.uniforms import RowUniforms

LONGEST_PIECE = 512  # bytes of one token


class LlamaCppModel(LocalModel):
    """A language model of llama.cpp: samples, scores, the next token's distribution, replies.

    To be asked from one thread. Messages are put together by the file's chat template, or else as
    ``role: content``, a line each. Log-probabilities are the model's own (temperature 1, nothing
    cut off), from the logits of llama.cpp (float32; its weights and cache may be coarser).

    model: the path of a GGUF file, or a `llama_cpp.Llama`. max_new_tokens: of a reply. window:
    tokens the model sees at once, where a file is loaded; name: what files of its samples say they
    are by; options: of `llama_cpp.Llama`.
    Raises `MissingExtraError` without the package, `InputError` for a file that it cannot load and
    for a prompt without room in the window.

    >>> model = LlamaCppModel("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
    >>> model.sample("The capital of France is", max_tokens=1, temperature=0)[0].text
    ... # doctest: +SKIP
    ' Paris'
    """

    def __init__(
        self,
        model: Any,
        *,
        max_new_tokens: int = 256,
        window: int = 4096,
        name: str = "",
        **options: Any,
    ) -> None:
        require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "a positive count")
        require(window >= 1, "window", window, "a positive count")
        try:
            import llama_cpp
        except ImportError:
            hint = "pip install 'scoredraw[llama]'"
            raise MissingExtraError(f"llama_cpp is not installed: {hint}") from None
        self.api, self.max_new_tokens = llama_cpp, max_new_tokens
        self.name = name or (str(model) if isinstance(model, str | Path) else type(self).__name__)
        self.llama = model
        if isinstance(model, str | Path):
            require(Path(model).is_file(), "model", model, "a GGUF file")
            try:
                self.llama = llama_cpp.Llama(
                    str(model), n_ctx=window, **{"verbose": False, **options}
                )
            except (ValueError, RuntimeError) as error:
                raise InputError(f"model: llama.cpp cannot load {model}: {error}") from None
        self.vocab = llama_cpp.llama_model_get_vocab(self.llama.model)
        self._pieces: dict[int, bytes] = {}

    @property
    def window(self) -> int:
        """How many tokens the model can see at once."""
        trained = self.api.llama_model_n_ctx_train(self.llama.model)
        return int(min(self.llama.n_ctx(), trained))

    def prompt(self, messages: Sequence[Message], reply: str = "") -> str:
        """The text the model continues; `reply` is how its answer begins."""
        template = self.llama.metadata.get("tokenizer.chat_template")
        if not template:
            text = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: "
            return text + reply
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        begin, end = (
            self._piece(token, special=True).decode() if token >= 0 else ""
            for token in (self.llama.token_bos(), self.llama.token_eos())
        )
        formatter = Jinja2ChatFormatter(template, eos_token=end, bos_token=begin)
        return str(formatter(messages=[dict(m) for m in messages]).prompt) + reply

    def ask(self, messages: Sequence[Message]) -> str:
        """The greedy reply, without special tokens."""
        return self.sample(messages, temperature=0.0)[0].text

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
        """n samples of what comes after a prompt, one after the other; the prompt is read once.

        Arguments, draws and errors as of `TransformersModel.sample`.
        """
        require(n >= 1, "n", n, "at least one sample")
        room = self._room(max_tokens, stop)
        how: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
        }
        categorical.truncate(np.zeros(1), **how)  # what is wrong with them is said before any work
        ids = self.fitting_tokens(prompt, room)
        first = self._pass(ids, 0)[-1]
        uniforms = RowUniforms(seed)
        made = []
        for j in range(n):
            if j:
                self._rewind(ids)
            u = [uniforms.at([j], stream="tokens", round=t)[0] for t in range(room)]
            made.append(self._one(first, len(ids), u, how, stop))
        self.llama.reset()  # its own record of the cache no longer holds
        return made

    def _one(
        self, logits: Float, place: int, u: Sequence[float], how: Any, stop: Sequence[str]
    ) -> Completion:
        """One sample from the cache as it is: a token for each uniform, or fewer."""
        ends = [s.encode() for s in stop]
        longest = max(map(len, ends), default=0)
        tokens: list[int] = []
        logprobs, said, finished = [], b"", False
        for t in range(len(u)):
            if t:
                logits = self._pass(tokens[-1:], place + t - 1)[-1]
            own = categorical.normalize(logits)
            tokens.append(int(categorical.invert(categorical.truncate(logits, **how), u[t])))
            logprobs.append(own[tokens[-1]])
            piece = self._piece(tokens[-1])
            said += piece
            tail = said[-(longest + len(piece)) :]
            finished = self.api.llama_vocab_is_eog(self.vocab, tokens[-1])
            finished = bool(finished) or any(s in tail for s in ends)
            if finished:
                break
        whole = said.decode(errors="replace")
        text = until_stop(whole, stop)
        finished = finished or len(text) < len(whole)
        return Completion(text, np.array(logprobs), tuple(tokens), finished)

    def score(self, prompt: Prompt, completion: str, *, end: bool = False) -> Float:
        """log p of each token of a given completion after a prompt, float64 (T,), nats.

        end: also that of ending there. The completion's tokens are those that it adds to the
        prompt's, which stay as they are: as if the model had produced it. One pass.
        """
        own = self._continuation(self.text_of(prompt), completion)
        if end:
            token = self.llama.token_eos()
            require(token >= 0, "end", "a model without one", "an end-of-text token")
            own = [*own, token]
        ids = self.fitting_tokens(prompt, len(own))
        if not own:
            return np.zeros(0)
        logits = [self._pass(ids, 0)]
        if len(own) > 1:
            logits.append(self._pass(own[:-1], len(ids), every=True))
        self.llama.reset()
        logprobs: Float = categorical.normalize(np.concatenate(logits))
        return logprobs[np.arange(len(own)), own]

    def next_token_logprobs(self, prompt: Prompt, reply: str = "") -> Float:
        """log p(token | prompt, start of the reply) of every token, float64 (V,): one pass."""
        logits = self._pass(self.fitting_tokens(prompt, 1, reply), 0)[-1]
        self.llama.reset()
        logprobs: Float = categorical.normalize(logits)
        return logprobs

    def _pass(self, ids: Sequence[int], place: int, every: bool = False) -> Float:
        """The logits after the last token or after every one, float64 (1 or T, V).

        The tokens come to stand at `place`, after those in the cache before it; 0 clears it.
        """
        if place == 0:
            self.llama.reset()
            self.api.llama_memory_clear(self.api.llama_get_memory(self.llama.ctx), True)
        found = []
        width, size = self.llama.n_vocab(), self.llama.n_batch
        batch = self.api.llama_batch_init(size, 0, 1)
        try:
            for start in range(0, len(ids), size):
                part = ids[start : start + size]
                wanted = [every or start + i + 1 == len(ids) for i in range(len(part))]
                batch.n_tokens = len(part)
                for i, token in enumerate(part):
                    batch.token[i], batch.pos[i] = token, place + start + i
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                    batch.logits[i] = wanted[i]
                if self.api.llama_decode(self.llama.ctx, batch) != 0:
                    raise RuntimeError("llama.cpp could not decode a batch")
                for i in (i for i, one in enumerate(wanted) if one):
                    row = self.api.llama_get_logits_ith(self.llama.ctx, i)
                    found.append(np.ctypeslib.as_array(row, shape=(width,)).astype(np.float64))
        finally:
            self.api.llama_batch_free(batch)
        return np.array(found)

    def _rewind(self, ids: Sequence[int]) -> None:
        """Leave the prompt alone in the cache."""
        memory = self.api.llama_get_memory(self.llama.ctx)
        if not self.api.llama_memory_seq_rm(memory, 0, len(ids), -1):
            self._pass(ids, 0)  # a recurrent model's memory has no past to go back to

    def _piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token; of a special one, none unless asked for."""
        if special or token not in self._pieces:
            import ctypes

            buffer = ctypes.create_string_buffer(LONGEST_PIECE)
            size = self.api.llama_token_to_piece(
                self.vocab, token, buffer, LONGEST_PIECE, 0, special
            )
            if special:
                return buffer.raw[: max(size, 0)]
            self._pieces[token] = buffer.raw[: max(size, 0)]
        return self._pieces[token]

    def _ids(self, text: str, begin: bool = False) -> list[int]:
        return list(self.llama.tokenize(text.encode(), add_bos=begin, special=True))

    def prompt_tokens(self, prompt: Prompt, reply: str = "") -> list[int]:
        """The token ids of a prompt; a chat template writes the special ones itself."""
        text = self.text_of(prompt) + reply
        bos = self.llama.token_bos()
        begun = bos >= 0 and text.startswith(self._piece(bos, special=True).decode() or "\0")
        template = not isinstance(prompt, str) and "tokenizer.chat_template" in self.llama.metadata
        return self._ids(text, begin=not (begun or template))
