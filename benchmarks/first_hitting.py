"""First-hitting sampling of masked tokens against ancestral sampling, with a vocabulary of 50,257.

The network is a law without context, for which a call costs nothing: what is measured is the
sampling. The textbook's loop, as the common programs have it, draws in each step from V + 1 classes
at every place, masked or not, and has their cache. It takes N L V draws of noise, a quarter of an
hour of a processor for 1,024 tokens in as many steps; so it is met at 128, where the ratio is
smaller, unless there is a GPU. All are exact (float64), and the check is that the token frequencies
agree. The calls of a real network come on top on both sides: for one text there are as many in ours
as in theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.contest import Contest
from scoredraw.diffusion.first_hitting import FirstHittingSampler
from scoredraw.diffusion.masked_diffusion import AncestralSampler, MaskedSampler

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
TEXTBOOK = "textbook ancestral loop, float64 Gumbel noise"


def first_hitting(*, tiny: bool = False) -> Iterator[Contest]:
    """Against the loop, and against our own ancestral sampling, which draws once a token."""
    V = 50 if tiny else 50_257
    short, long = (16, 64) if tiny else (128 if WHERE == "cpu" else 1024, 1024)
    law = zipf(V).to(WHERE)

    def network(x: Tensor) -> Tensor:
        return law.expand(*x.shape, V + 1)

    def run(sampler: MaskedSampler, length: int) -> Callable[[], Tensor]:
        x = torch.full((1, length), V, device=WHERE)
        return lambda: sampler.sample(network, x, V, rng=0).tokens

    what = f"first-hitting, {short:,} tokens of {V:,}, {short:,} steps"
    ours = run(FirstHittingSampler(), short)
    yield Contest(
        what, TEXTBOOK, ours, lambda: textbook(network, short, V, short), same, 1 / 20, repeats=1
    )
    yield Contest(
        f"first-hitting, {long:,} tokens of {V:,}, {long:,} steps",
        "our ancestral, one draw a token", run(FirstHittingSampler(), long),
        run(AncestralSampler(long), long), same, repeats=3,
    )  # fmt: skip


def zipf(V: int) -> Tensor:
    """log p of V tokens by Zipf's law, and of the mask, which must not be drawn."""
    tokens = -np.log(np.arange(1, V + 1) + 2.7)
    return torch.from_numpy(np.append(tokens, 0.0).astype(np.float32))


def textbook(network: Callable[[Tensor], Tensor], L: int, mask: int, steps: int) -> Tensor:
    """The ancestral loop over V + 1 classes, with its cache, as published programs have it."""
    source = torch.Generator(WHERE).manual_seed(0)
    x = torch.full((1, L), mask, device=WHERE)
    p: Tensor | None = None
    for k in range(steps):
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        if p is None:
            logits = network(x).double()
            logits[..., mask] = -torch.inf
            p = logits.softmax(-1)
        q = p * (t - s)
        q[..., mask] = s
        noise = torch.rand(q.shape, generator=source, dtype=torch.float64, device=WHERE)
        drawn = (q / -noise.clamp_min(1e-300).log()).argmax(dim=-1)
        after = torch.where(x == mask, drawn, x)
        if not torch.equal(after, x):
            p = None
        x = after
    return x


def same(ours: Tensor, theirs: Tensor) -> None:
    """The share of the first tokens, which hold about half, is alike: a false alarm in 10^5."""
    first = 10 if max(ours.max(), theirs.max()) < 50 else 200
    a, b = (float((x < first).double().mean()) for x in (ours, theirs))
    assert ours.shape == theirs.shape
    assert abs(a - b) < 4.5 * np.sqrt(0.5 / ours.numel())
