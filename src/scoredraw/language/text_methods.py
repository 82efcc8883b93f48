"""Sampling text by a method of the catalogue, from any model: what `generate text` runs.

    sample        n independent samples at a temperature
    greedy        the likeliest token every time
    hedged        one greedy sample and n - 1 at a temperature           (paper 43)
    cautious      several short trials where the model is unsure         (paper 36)
    deepening     interrupted to think again, at growing budgets         (paper 33)
    watermarked   tokens drawn by a key                                  (paper 13)

The first three take any model; the others look at every token, so they want a model of transformers
in this process.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from scoredraw import registry
from scoredraw.errors import require
from scoredraw.model_servers import derived_seed
from scoredraw.models import Completion, Prompt, TransformersModel

OWN = ("model", "tokenizer", "prompts", "n", "progress", "first", "trace")  # no options
WHOLE = ("hedged",)  # whose samples of a prompt are not alike
# what methods take by way of keyword arguments
PLANNED = {
    "cautious_texts": (
        *("measure", "h_min", "h_max", "n_max", "n_min", "rule", "trials", "fixed", "score"),
        "max_trial_tokens",
    ),
    "deepening_texts": ("on_finish", "max_reflections", "boundary", "pick"),
}


def greedy_texts(
    model: Any, prompts: Sequence[Prompt], n: int = 1, *, first: int = 0, **request: Any
) -> list[list[Completion]]:
    """The greedy text after each prompt; n > 1 is an InputError, as all would be the same.

    model: with `sample_all` or `sample`; request: their arguments, but for the temperature.
    """
    require(n == 1, "n", n, "1 with greedy: all samples would be the same")
    return sampled_texts(model, prompts, 1, temperature=0.0, first=first, **request)


def sampled_texts(
    model: Any, prompts: Sequence[Prompt], n: int = 1, *, first: int = 0, **request: Any
) -> list[list[Completion]]:
    """n samples after each prompt, by the model's own `sample_all` or `sample`.

    first: the number of the first prompt; with `sample` each has a seed of its own.
    """
    if hasattr(model, "sample_all"):
        made: list[list[Completion]] = model.sample_all(prompts, n, first=first, **request)
        return made
    seed = request.pop("seed", None)
    seeds = [None if seed is None else derived_seed(seed, first + i) for i in range(len(prompts))]
    return [
        model.sample(prompt, n, seed=own, **request)
        for prompt, own in zip(prompts, seeds, strict=True)
    ]


class MethodModel:
    """A model that samples by a method: for `endpoint_runs.run`, which asks it as any other.

    model: a `TransformersModel`, or for sample, greedy and hedged whatever has `sample`. method: a
    name of `registry.methods("texts")`; options: its own. Raises `InputError` for another model,
    and for options that the method does not have.
    """

    def __init__(self, model: Any, method: str, **options: Any) -> None:
        entry = registry.method("texts", method)
        self.function: Callable[..., list[list[Completion]]] = registry.resolve(
            entry.function, entry.extra
        )
        here = entry.takes != "tokens" or isinstance(model, TransformersModel)
        wanted = f"a model in this process (a folder, small, stories), for {method}"
        require(here, "model", type(model).__name__, wanted)
        self.can, self.method = options_of(self.function, model), method
        self.whole_pools = method in WHOLE
        self._check(options)
        self.model, self.options = model, options
        # those that look at tokens take a model and its tokenizer
        looks = entry.takes == "tokens"
        self.subject = (model.model, model.tokenizer) if looks else (model,)
        self.name = f"{model.name} by {method}"
        self.thread_safe = bool(getattr(model, "thread_safe", False))
        if not self.thread_safe:
            self.sample_all = self._sample_all

    @property
    def request(self) -> dict[str, Any]:
        """What the samples depend on beside the call: for the file that holds them.

        Of a watermark's key a hash, since the file may be passed on with the texts.
        """
        longest = getattr(self.model, "max_new_tokens", None)
        own = getattr(self.model, "request", None) or ({"max_tokens": longest} if longest else {})
        kept = dict(self.options)
        if "key" in kept:
            kept["key"] = hashlib.sha256(str(kept["key"]).encode()).hexdigest()[:16]
        return {**own, **kept}

    @property
    def usage(self) -> Any:
        """The model's, where it counts."""
        return getattr(self.model, "usage", None)

    @property
    def cost(self) -> float | None:
        """The model's, where it has prices."""
        return getattr(self.model, "cost", None)

    def sample(
        self, prompt: Prompt, n: int = 1, *, seed: int | None = None, **request: Any
    ) -> list[Completion]:
        """n samples by the method."""
        return self._sample_all([prompt], n, seed=seed, **request)[0]

    def _sample_all(
        self, prompts: Sequence[Prompt], n: int = 1, *, first: int = 0, **request: Any
    ) -> list[list[Completion]]:
        self._check(request)
        return self.function(*self.subject, prompts, n, first=first, **self.options, **request)

    def _check(self, options: dict[str, Any]) -> None:
        for name in options:
            fits = f"one of {', '.join(self.can)}"
            require(name in self.can, name, f"an option that {self.method} does not have", fits)


def options_of(function: Callable[..., Any], model: Any) -> list[str]:
    """The names of a method's own options: of its arguments, and of what it fills in with others.

    These are the fields of its plan, or for the methods of this file what the model's `sample`
    takes.
    """
    found = _names(function)
    if function in (greedy_texts, sampled_texts):
        fixed = ("prompt", "temperature") if function is greedy_texts else ("prompt",)
        return [*found, *(name for name in _names(model.sample) if name not in fixed)]
    return [*found, *PLANNED.get(function.__name__, ())]


def _names(function: Callable[..., Any]) -> list[str]:
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.kind != p.VAR_KEYWORD and p.name not in OWN]
