r"""A reward that needs no preferences: relevant, long enough, and not said twice.

An unsupervised retriever M places texts in space, ⟨M(x), M(ŷ)⟩ being how relevant a response ŷ is
to a question x. Alone it is served best by copying the question, so length and repetition join in;
and a question with one exact answer is measured by its reference answer y, where length counts
nothing:

    R(x, y, ŷ) = ⟨M(x), M(ŷ)⟩ · LI(ŷ) · RP(ŷ)      where the question is open-ended
               = F(⟨M(y), M(ŷ)⟩) · RP(ŷ)           where it is constrained

    LI = words and runs of punctuation / 100       RP = different trigrams of these / trigrams
    F: the line from [0, 3.5] to [0, max_new_tokens / 100]

A text of n words said k times has RP = n / (k n - 2), so that LI · RP no longer grows with k.

Kim and Seo, "Rethinking the role of proxy rewards in language model alignment", 2024, arXiv
2402.03469 (R³). Where the released code gives a constrained question F for an empty response, an
empty response is worth nothing here; role names are taken literally, not as regular expressions.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse

from scoredraw.errors import InputError, require
from scoredraw.models import until_stop
from scoredraw.rl.reward_functions import completion_text

Float = NDArray[np.float64]
Tokenize = Callable[[str], Sequence[str]]

FACTORS = ("length", "repetition", "relevance", "branching")
ABLATIONS = {  # what each of the paper's arms leaves out
    "R3": (),
    "R_OE": ("branching",),
    "relevance": ("length", "repetition", "branching"),
    "LI": ("repetition", "relevance", "branching"),
    "LI_RP": ("relevance", "branching"),
}
OPEN, CONSTRAINED = "OPENENDED", "CONSTRAINED"
ROLES = ("### Instruction:", "### Response:")
STOP = ("\n\n\n\n", "\n\n--", "\n\n____")
_WORDS = re.compile(r"\w+|[^\w\s]+")

# ── of one text ─────────────────────────────────────────────────────────────────────────────────


def words(text: str) -> list[str]:
    """Words and runs of punctuation. A script without blanks is one word a run: pass `tokenize`.

    >>> words("Blue, of course!!")
    ['Blue', ',', 'of', 'course', '!!']
    """
    return _WORDS.findall(text)


def length_incentive(text: str, tokenize: Tokenize = words) -> float:
    """LI, tokens / 100.

    >>> length_incentive("Paris is the capital.")
    0.05
    """
    return len(tokenize(text)) / 100


def trigram_ratio(text: str, tokenize: Tokenize = words) -> float:
    """RP in (0, 1], different trigrams / trigrams; 1 below three tokens.

    >>> trigram_ratio("the cat sat the cat sat")
    0.75
    """
    tokens = tokenize(text)
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


def prepared_response(text: str, stop: Iterable[str] = (*ROLES, *STOP)) -> str:
    """Without blanks around it, up to the first of the stop strings, without blanks again.

    >>> prepared_response(" Blue. ### Response: Red.")
    'Blue.'
    """
    return until_stop(text.strip(), list(stop)).strip()


def prepared_query(prompt: Any, roles: Iterable[str] = ROLES) -> str:
    """A prompt without its role names, blanks squeezed; of messages the last that a user wrote.

    Raises InputError for what is neither text nor messages with one by a user.

    >>> prepared_query("[INST] Capital of  France?[/INST]", roles=("[INST]", "[/INST]"))
    'Capital of France?'
    """
    if not isinstance(prompt, str):
        messages = isinstance(prompt, Sequence) and all(isinstance(m, dict) for m in prompt)
        asked = [m.get("content") for m in prompt if m.get("role") == "user"] if messages else []
        said = bool(asked) and isinstance(asked[-1], str)
        require(said, "prompts", type(prompt).__name__, "texts, or messages with one by a user")
        prompt = asked[-1]
    for role in roles:
        prompt = prompt.replace(role, " ")
    return " ".join(prompt.split())


# ── the reward ──────────────────────────────────────────────────────────────────────────────────


class Factors(NamedTuple):
    """What a reward is made of, (B,) each.

    length, repetition: LI and RP; relevance: to the question, where constrained to the reference
    (before F), NaN where nothing was compared; constrained, empty: bool.
    """

    length: Float
    repetition: Float
    relevance: Float
    constrained: NDArray[np.bool_]
    empty: NDArray[np.bool_]


class R3Reward:
    """The reward at the head of this file, for completions as TRL hands them over.

    embed: n texts -> (n, d), an array, a tensor or a SciPy sparse matrix; relevance is the dot
    product of two of its rows, vectors being taken as they come. Called once a batch with the
    different texts. max_new_tokens: the length that F ends at. interp_in: the relevances that F
    maps to 0 and there; for unit vectors (0, 1). off: factors left out, of FACTORS, such as
    `ABLATIONS["R_OE"]`; a factor left out is 1, and without relevance or branching every question
    counts as open-ended. clip: keep F within its ends, where the line goes on otherwise.
    clamp_relevance: relevances below it are it; with None a negative relevance makes longer
    responses worse, and constrained ones negative. tokenize: what `words` does. stop, roles: as
    `prepared_response` and `prepared_query`.

    Call it with the data set's columns `qtype` ("OPENENDED" or "CONSTRAINED") and `reference`
    (text; None will do where open-ended); gives floats. An empty response is worth 0. Raises
    InputError for lengths, types, a constrained question without reference, completions that are no
    text, another number of rows from embed and a relevance that isn't finite. Row-local given
    embed. Memory O(texts · d).

    >>> def letters(texts):
    ...     return np.array([[text.lower().count(c) for c in "abcdefghij"] for text in texts])
    >>> reward = R3Reward(letters, max_new_tokens=350)
    >>> reward(["A cab?"] * 2, ["A cab, a cab.", "A cab"], qtype=["OPENENDED", "CONSTRAINED"],
    ...        reference=[None, "cab"])
    [0.72, 4.0]
    """

    def __init__(
        self,
        embed: Callable[[list[str]], Any],
        max_new_tokens: int = 512,
        interp_in: tuple[float, float] = (0.0, 3.5),
        off: Iterable[str] = (),
        *,
        clip: bool = False,
        clamp_relevance: float | None = None,
        tokenize: Tokenize = words,
        stop: Sequence[str] = STOP,
        roles: Sequence[str] = ROLES,
    ) -> None:
        require(callable(embed), "embed", type(embed).__name__, "a function of texts")
        require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "a positive count")
        low, high = interp_in
        require(bool(np.isfinite(high - low)) and high > low, "interp_in", interp_in, "low < high")
        bounded = clamp_relevance is None or bool(np.isfinite(clamp_relevance))
        require(bounded, "clamp_relevance", clamp_relevance, "a number, or None")
        self.off = frozenset([off] if isinstance(off, str) else off)
        unknown = sorted(self.off - set(FACTORS))
        require(not unknown, "off", ", ".join(unknown), f"some of {', '.join(FACTORS)}")
        for name, texts in (("stop", stop), ("roles", roles)):
            listed = not isinstance(texts, str) and all(texts)
            require(listed, name, repr(texts), "a list of strings that are not empty")
        self.embed, self.most, self.interp_in = embed, max_new_tokens / 100, (low, high)
        self.clip, self.clamp_relevance, self.tokenize = clip, clamp_relevance, tokenize
        self.stop, self.roles = (*roles, *stop), tuple(roles)
        self.__name__ = "r3_reward"

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        qtype: Sequence[str] | None = None,
        reference: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """A reward a row."""
        found = self.factors(prompts, completions, qtype, reference)
        if len(completions) and callable(columns.get("log_metric")):
            for name in ("length", "repetition", "relevance"):
                values = getattr(found, name)
                if np.isfinite(values).any():
                    columns["log_metric"](f"{self.__name__}/{name}", float(np.nanmean(values)))
        return [float(r) for r in self.combine(found)]

    def factors(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        qtype: Sequence[str] | None = None,
        reference: Sequence[str | None] | None = None,
    ) -> Factors:
        """The parts of a batch's rewards."""
        n = len(completions)
        require(len(prompts) == n, "prompts", f"{len(prompts)} rows", f"{n}, as completions")
        responses = [prepared_response(completion_text(c), self.stop) for c in completions]
        constrained = np.zeros(n, np.bool_)
        if not self.off & {"relevance", "branching"}:
            constrained = _constrained(qtype, reference, n)
        empty = np.array([not response for response in responses], np.bool_)
        relevance = np.full(n, np.nan)
        rows = np.flatnonzero(~empty).tolist()
        if "relevance" not in self.off and rows:
            queries = [
                prepared_query(str(reference[i]), ()) if constrained[i] and reference is not None
                else prepared_query(prompts[i], self.roles)
                for i in rows
            ]  # fmt: skip
            relevance[rows] = self._relevance(queries, [responses[i] for i in rows])
        return Factors(
            np.array([length_incentive(r, self.tokenize) for r in responses], np.float64),
            np.array([trigram_ratio(r, self.tokenize) for r in responses], np.float64),
            relevance, constrained, empty,
        )  # fmt: skip

    def combine(self, found: Factors) -> Float:
        """R (B,) of its factors."""
        r = found.relevance
        if self.clamp_relevance is not None:
            r = np.maximum(r, self.clamp_relevance)
        low, high = self.interp_in
        line = (r - low) / (high - low) * self.most
        line = np.clip(line, 0.0, self.most) if self.clip else line
        reward = (
            np.ones(len(r)) if "relevance" in self.off else np.where(found.constrained, line, r)
        )
        if "length" not in self.off:
            reward = reward * np.where(found.constrained, 1.0, found.length)
        if "repetition" not in self.off:
            reward = reward * found.repetition
        return np.where(found.empty, 0.0, reward)

    def _relevance(self, queries: Sequence[str], responses: Sequence[str]) -> Float:
        """The dot products of the rows of both, each text embedded once."""
        place = {text: i for i, text in enumerate(dict.fromkeys([*queries, *responses]))}
        vectors = self.embed(list(place))
        if hasattr(vectors, "detach"):
            vectors = vectors.detach().cpu().double()
        rows: Any = vectors.tocsr() if issparse(vectors) else np.asarray(vectors, np.float64)
        fits = rows.ndim == 2 and rows.shape[0] == len(place)
        require(fits, "embed", f"shape {rows.shape}", f"({len(place)}, d), a row a text")
        a, b = (rows[[place[text] for text in texts]] for texts in (queries, responses))
        products = a.multiply(b) if issparse(rows) else a * b
        found = np.asarray(products.sum(axis=1), np.float64).reshape(-1)
        odd = np.flatnonzero(~np.isfinite(found))
        first = f"a relevance of {found[odd[0]]} for {responses[odd[0]][:40]!r}" if len(odd) else ""
        require(not len(odd), "embed", first, "vectors with finite dot products")
        return found


def _constrained(
    qtype: Sequence[str] | None, reference: Sequence[str | None] | None, n: int
) -> NDArray[np.bool_]:
    require(qtype is not None, "qtype", "no column", f"{OPEN} or {CONSTRAINED} for each row")
    assert qtype is not None
    require(len(qtype) == n, "qtype", f"{len(qtype)} rows", f"{n}, as completions")
    odd = next((kind for kind in qtype if kind not in (OPEN, CONSTRAINED)), None)
    require(odd is None, "qtype", repr(odd), f"{OPEN} or {CONSTRAINED}")
    found = np.array([kind == CONSTRAINED for kind in qtype], np.bool_)
    if reference is not None:
        require(len(reference) == n, "reference", f"{len(reference)} rows", f"{n}, as completions")
    for i in np.flatnonzero(found).tolist():
        text = None if reference is None else reference[i]
        known = isinstance(text, str) and bool(text.strip())
        require(
            known, "reference", f"{text!r} in row {i}", f"text, as the question is {CONSTRAINED}"
        )
    return found


# ── encoders ────────────────────────────────────────────────────────────────────────────────────


class MeanPooledEncoder:
    """A transformers encoder as `embed`: the mean of the last hidden states, not normalised.

    model, tokenizer: as transformers loads them, such as `from_pretrained("facebook/contriever")`,
    which the paper uses. max_length: in tokens; longer texts lose their beginning. Vectors are
    float32 (n, d). Raises InputError for a batch size below 1. One forward pass a text.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int = 64, max_length: int | None = None
    ) -> None:
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        self.model, self.tokenizer = model.eval(), copy.deepcopy(tokenizer)
        self.tokenizer.truncation_side = "left"
        window = int(getattr(model.config, "max_position_embeddings", 0) or 10**9)
        self.max_length = max_length or min(window, int(self.tokenizer.model_max_length))
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls, name: str = "facebook/contriever", **options: Any
    ) -> MeanPooledEncoder:
        """Load model and tokenizer by name or from a folder; InputError where they can't be."""
        from transformers import AutoModel, AutoTokenizer

        try:
            model, tokenizer = AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            why = (str(error).strip() or "no reason given").splitlines()[0]
            raise InputError(f"encoder: cannot load {name!r}: {why[:200]}") from None
        return cls(model, tokenizer, **options)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import torch

        order = np.argsort([len(text) for text in texts], kind="stable")  # so that padding is short
        found: list[NDArray[np.float32]] = []
        with torch.inference_mode():
            for start in range(0, len(texts), self.batch_size):
                batch = self.tokenizer(
                    [texts[i] for i in order[start : start + self.batch_size]],
                    padding=True, truncation=True, max_length=self.max_length, return_tensors="pt",
                ).to(self.model.device)  # fmt: skip
                states = self.model(**batch).last_hidden_state
                real = batch["attention_mask"][..., None].to(states.dtype)
                mean = (states * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
                found.append(mean.float().cpu().numpy())
        return np.concatenate(found)[np.argsort(order)]


def sentence_transformer_embed(model: Any, batch_size: int = 64) -> Callable[[list[str]], Any]:
    """A sentence-transformers model as `embed`, with what pooling and normalising it comes with.

    Most give unit vectors: relevance is then a cosine, and interp_in should be (0, 1).
    """

    def embed(texts: list[str]) -> Any:
        return model.encode(texts, batch_size=batch_size, show_progress_bar=False)

    return embed


# ── does the gold reward rise with the proxy? ───────────────────────────────────────────────────


class Monotonicity(NamedTuple):
    """Spearman's ρ over checkpoints, and its two-sided p."""

    rho: float
    p: float


def proxy_gold_monotonicity(proxy: ArrayLike, gold: ArrayLike) -> Monotonicity:
    """Whether training on a proxy raises what one wants: ρ of both over checkpoints.

    proxy, gold: (K,) mean rewards of K checkpoints on held-out prompts, K >= 3. p is that of a t
    distribution, which is rough below 10 checkpoints; NaN, as ρ, where one of both is constant.
    Raises InputError for lengths, fewer than 3 and what isn't finite. O(K log K).

    Kim and Seo 2024, arXiv 2402.03469 ("reverse reward engineering").

    >>> round(proxy_gold_monotonicity([1, 2, 3, 4], [0.1, 0.3, 0.2, 0.9]).rho, 6)
    0.8
    """
    from scipy.stats import spearmanr

    x, y = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    require(x.ndim == 1 and len(x) >= 3, "proxy", f"shape {x.shape}", "3 checkpoints or more")
    require(y.shape == x.shape, "gold", f"shape {y.shape}", f"{x.shape}, as proxy")
    for name, values in (("proxy", x), ("gold", y)):
        require(bool(np.isfinite(values).all()), name, "NaN or infinity", "finite numbers")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Monotonicity(float("nan"), float("nan"))
    rho, p = spearmanr(x, y)
    return Monotonicity(float(rho), float(p))
