"""Inverting TarFlows by parallel sweeps, against token by token with a cache of keys and values.

No package offers either: both sides are ours, and the sequential one is what TarFlow samples with.
The digits' flow that ships (16 patches, noise of two batch sizes) is inverted until the error is
below 1e-3, and a flow of 256 patches, whose weights are random and small, until nothing moves. A
limit says how many of the sequential passes that takes, as a share. On a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from benchmarks.contest import Contest, Limit
from scoredraw.diffusion.flow_inversion import SegmentPlan
from scoredraw.diffusion.tarflow import SEQUENTIAL, FlowInverse, TarFlow, TarFlowShape
from scoredraw.papers.small_flow import small_flow
from scoredraw.papers.training import one_thread

PEER = "token by token, cached"
WHERE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = 1e-3  # largest root mean square error
NEAR = SegmentPlan(1, tol=1e-4, per_sample=True)
STILL = SegmentPlan(1, tol=1e-6)


def flow_inversion(*, tiny: bool = False) -> Iterator[Contest | Limit]:
    """Time of the digits' flow and of a long one, and passes of both."""
    digits = small_flow()
    for n in (1, 4) if tiny else (1, 64, 1024) if WHERE == "cuda" else (1, 64):
        z = _noise(digits, n)
        yield _race(f"{n} digits of 16 patches, to an error of 1e-3", digits, z, NEAR)
    flow = _long(8 if tiny else 16)
    T, C = flow.var.shape
    for n in (1,) if tiny else (4, 64) if WHERE == "cuda" else (4,):
        z = _noise(flow, n)
        yield _race(f"{n} images of {T} patches of {C}, random weights", flow, z, STILL)
    z = _noise(digits, 64)
    yield Limit(
        "passes of 64 digits to an error of 1e-3, of the sequential ones", "share",
        lambda: _share(digits, z), 0.75,
    )  # fmt: skip


def _noise(flow: TarFlow, n: int) -> Any:
    """The noises of n images, where the flow is from here on."""
    z = flow.cpu().noise(n, truncate=2.0, generator=torch.Generator().manual_seed(n))
    flow.to(WHERE)
    return z.to(WHERE)


def _race(what: str, flow: TarFlow, z: Any, plan: SegmentPlan) -> Contest:
    return Contest(
        what, PEER, lambda: _inverse(flow, z, plan), lambda: _inverse(flow, z, SEQUENTIAL), _near
    )


def _inverse(flow: TarFlow, z: Any, plan: SegmentPlan) -> FlowInverse:
    with one_thread():  # the matrices are small
        return flow.inverse(z, plan)


def _share(flow: TarFlow, z: Any) -> float:
    found, exact = _inverse(flow, z, NEAR), _inverse(flow, z, SEQUENTIAL)
    _near(found, exact)
    return found.passes / exact.passes


def _near(ours: FlowInverse, exact: FlowInverse) -> None:
    assert float((ours.images - exact.images).square().mean().sqrt()) < CLOSE


@cache
def _long(side: int) -> TarFlow:
    """side² patches of one pixel, 4 blocks of 2 layers and 128 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = TarFlow(TarFlowShape(side, 1, channels=128, head_dim=64)).requires_grad_(False)
        for block in flow.blocks:
            torch.nn.init.normal_(block.proj_out.weight, std=0.02)
    return flow
