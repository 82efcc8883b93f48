"""One TarFlow block against the authors' own program, run in float64: both ways, all iterates."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from scoredraw.diffusion.flow_inversion import (  # noqa: E402
    InvertResult,
    SegmentPlan,
    invert_autoregressive,
)
from scoredraw.diffusion.tarflow import TarFlowBlock  # noqa: E402

pytestmark = pytest.mark.golden

NAME = "45-gs-jacobi.json"


@pytest.fixture(scope="module")
def case(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden(NAME)


@pytest.fixture(scope="module")
def block(case: dict[str, Any]) -> TarFlowBlock:
    given = case["inputs"]
    block = TarFlowBlock(
        given["C"], given["channels"], given["T"], layers=given["layers"],
        head_dim=given["head_dim"], expansion=given["mlp_expansion"],
        backwards=given["permutation"] == "flip",
    ).double()  # fmt: skip
    weights = {name: torch.tensor(w, dtype=torch.float64) for name, w in given["weights"].items()}
    block.load_state_dict(weights)
    return block.requires_grad_(False)


def close(got: Any, want: Any, case: dict[str, Any], name: str = "", kind: str = "abs") -> None:
    got = got.numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
    assert got.shape == np.shape(want), name
    np.testing.assert_allclose(got, want, rtol=0, atol=case["tolerance"][kind], err_msg=name)


def both_ways(block: TarFlowBlock, z: Any, plan: SegmentPlan) -> list[InvertResult]:
    """With the cache of keys and values, and by full passes that are shown what it would hold."""
    full = invert_autoregressive(
        block.parameters_at, block.ordered(z), "gs-jacobi", plan.segments, plan.max_iter, plan.tol,
        plan.init,
    )  # fmt: skip
    return [block.inverse(z, plan), InvertResult(block.ordered(full.x), passes=full.passes)]


def test_every_output_is_looked_at(case: dict[str, Any]) -> None:
    known = {"z", "logdet", "x_sequential", "jacobi", "gs_jacobi"}
    metrics = {"igm", "crm", "igm_exact", "crm_exact"}
    assert set(case["outputs"]) == known | metrics
    assert set(case["outputs"]["jacobi"]) == {"init_z", "init_zero"}
    assert case["outputs"]["gs_jacobi"]


def test_forward(case: dict[str, Any], block: TarFlowBlock) -> None:
    x = torch.tensor(case["inputs"]["x"], dtype=torch.float64)
    z, logdet = block(x)
    close(z, case["outputs"]["z"], case)
    close(logdet / x[0].numel(), case["outputs"]["logdet"], case)  # theirs is a mean


def test_sequential_inverse(case: dict[str, Any], block: TarFlowBlock) -> None:
    z = torch.tensor(case["outputs"]["z"], dtype=torch.float64)
    for found in both_ways(block, z, SegmentPlan(0)):
        close(found.x, case["outputs"]["x_sequential"], case)
        assert found.passes == case["inputs"]["T"] - 1


def test_jacobi_iterates(case: dict[str, Any], block: TarFlowBlock) -> None:
    z = torch.tensor(case["outputs"]["z"], dtype=torch.float64)
    for name, iterates in case["outputs"]["jacobi"].items():
        assert len(iterates) == case["inputs"]["T"]
        for k, want in enumerate(iterates, start=1):
            plan = SegmentPlan(1, k, 0.0, name.removeprefix("init_"))
            for found in both_ways(block, z, plan):
                close(found.x, want, case, f"{name}, sweep {k}")


def test_segments(case: dict[str, Any], block: TarFlowBlock) -> None:
    z = torch.tensor(case["outputs"]["z"], dtype=torch.float64)
    for name, want in case["outputs"]["gs_jacobi"].items():
        match = re.fullmatch(r"GS(\d+)_J(\d+)", name)
        assert match is not None
        plan = SegmentPlan(int(match[1]), int(match[2]), 0.0)
        for found in both_ways(block, z, plan):
            close(found.x, want, case, name)


def test_metrics(case: dict[str, Any], block: TarFlowBlock) -> None:
    x = torch.tensor(case["inputs"]["x"], dtype=torch.float64)
    found = block.metrics(x)
    guesses = [found["igm_z"], found["igm_zero"]]
    s, _ = block.parameters_at(block.ordered(x))
    W_s, W_u = block.proj_out.weight.chunk(2)
    ranking = [float(torch.linalg.matrix_norm((torch.exp(-s) * block.ordered(x)).mean(0), ord=2))]
    ranking += [float(torch.linalg.matrix_norm(W, ord=2)) for W in (W_s, W_u)]
    ranking.append(found["crm"])
    for name, got in (("igm", guesses), ("crm", ranking)):
        close(got, case["outputs"][f"{name}_exact"], case)
        close(got, case["outputs"][name], case, kind="igm_crm_abs")
