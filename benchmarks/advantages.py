"""Advantages of groups and the clipped loss of their tokens, against TRL's arithmetic.

The peer is what `GRPOTrainer` of TRL 1.16 does in `_generate_and_score_completions` and
`_compute_loss` on one device, written again as tensor operations with TRL's own `nanstd`: rewards
less the group's mean over its deviation + 1e-4, the smaller of two products, the mean of the loss
type, backward to the log-probabilities, and the share of tokens outside the clip, which both sides
return. TRL's other metrics are left out. Both get the same log-probabilities, rewards and mask
(int64, as TRL's), so no (B, T, V) is among the inputs; the limits say that none is made: the most
bytes that are new at a time, of TRL's. Memory is counted by torch's profiler on the CPU, by its
allocator on a GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.contest import Contest, Limit
from scoredraw.rl.group_advantages import group_advantages
from scoredraw.rl.policy_loss import clipped_policy_loss

G, LOW, HIGH, EPS = 8, 0.2, 0.28, 1e-4
LOSSES = {"dapo": "dapo", "grpo": "seq_mean"}  # TRL's loss types, and what they are called here
WHERE = "cuda" if torch.cuda.is_available() else "cpu"
Loss = tuple[Tensor, Tensor]  # the loss, and the share of tokens that the clip made worse


class Batch(NamedTuple):
    """logp, with a gradient, and old_logp, mask: (B, T); rewards: (B,); tokens: of the mask."""

    logp: Tensor
    old_logp: Tensor
    mask: Tensor
    rewards: Tensor
    tokens: Tensor


class Step(NamedTuple):
    """loss, clipped: scalars; gradient: (B, T)."""

    loss: Tensor
    gradient: Tensor
    clipped: Tensor


def advantages(*, tiny: bool = False) -> Iterator[Contest | Limit]:
    """Time and memory of a whole step, forward and backward, for two losses."""
    B, T = (16, 32) if tiny else (1024, 4096)
    batch = sampled(B, T)
    for loss_type in LOSSES:
        sides = partial(step, ours, batch, loss_type), partial(step, theirs, batch, loss_type)
        what = f"{loss_type}: advantages and loss, B = {B:,}, T = {T:,}"
        yield Contest(f"{what}, forward and backward", "TRL's arithmetic", *sides, same, 1.0)
        yield Limit(f"{what}, new memory", "of TRL's", partial(share, *sides), 1.0)


def sampled(B: int, T: int) -> Batch:
    """Half to all of T tokens an answer, a fifth of groups with equal rewards, ratios around 1."""
    random = torch.Generator().manual_seed(0)
    old = -torch.empty(B, T).exponential_(generator=random)
    logp = old + 0.2 * torch.randn(B, T, generator=random)
    length = torch.randint(T // 2, T + 1, (B,), generator=random)
    mask = (torch.arange(T) < length[:, None]).long()
    rewards = torch.randint(0, 2, (B,), generator=random).float()
    rewards.view(-1, G)[::5] = 0.0
    logp, old, mask, rewards = (x.to(WHERE) for x in (logp, old, mask, rewards))
    return Batch(logp.requires_grad_(), old, mask, rewards, mask.sum())


def ours(batch: Batch, loss_type: str) -> Loss:
    A = group_advantages(batch.rewards, num_generations=G, estimator="grpo", eps=EPS)
    return clipped_policy_loss(
        batch.logp, batch.old_logp, A, batch.mask, LOW, HIGH,
        LOSSES[loss_type], batch.tokens if loss_type == "dapo" else None,
    )  # fmt: skip


def theirs(batch: Batch, loss_type: str) -> Loss:
    """As the trainer's two methods, for one process and without accumulation."""
    from trl.trainer.utils import nanstd

    r = batch.rewards
    mean = torch.nanmean(r.view(-1, G), dim=1).repeat_interleave(G, dim=0)
    spread = nanstd(r.view(-1, G), dim=1).repeat_interleave(G, dim=0)
    A = torch.nan_to_num((r - mean) / (spread + EPS), nan=0.0).unsqueeze(1)
    m = batch.mask
    ratio = torch.exp(batch.logp - batch.old_logp)
    bounded = torch.clamp(ratio, 1 - LOW, 1 + HIGH)
    one, other = ratio * A, bounded * A
    per_token = -torch.min(one, other)
    if loss_type == "dapo":
        loss = (per_token * m).sum() / batch.tokens.clamp(min=1.0)
    else:
        loss = ((per_token * m).sum(-1) / m.sum(-1).clamp(min=1.0)).mean()
    low, high = (ratio < 1 - LOW) & (A < 0), (ratio > 1 + HIGH) & (A > 0)
    clipped = ((low | high).float() * m).sum() / m.sum().float().clamp(min=1.0)
    return loss, clipped


def step(side: Callable[[Batch, str], Loss], batch: Batch, loss_type: str) -> Step:
    """Backward once the side has returned: what autograd does not keep is free by then."""
    loss, clipped = side(batch, loss_type)
    (gradient,) = torch.autograd.grad(loss, batch.logp)
    return Step(loss.detach(), gradient, clipped)


def same(one: Step, other: Step) -> None:
    """Rounding of sums of four million terms apart."""
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(one.gradient, other.gradient, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(one.clipped, other.clipped, rtol=1e-4, atol=1e-7)


def share(mine: Callable[[], Step], trls: Callable[[], Step]) -> float:
    return peak(mine) / peak(trls)


def peak(run: Callable[[], Step]) -> float:
    """The most bytes of new tensors that there are at a time."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts
    from torch.profiler import ProfilerActivity, profile

    run()  # imports
    if WHERE == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return float(torch.cuda.max_memory_allocated() - held)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        kept = run()
    del kept
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        measured.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    changes.sort(key=itemgetter("ts"))
    return float(max(accumulate(event["args"]["Bytes"] for event in changes)))
