"""Returns and advantages of two attempts against an independent computation, both credits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from scoredraw.rl.self_correction import (
    score_advantages,
    score_returns,
    self_correction_metrics,
    turn_kl,
)

pytestmark = pytest.mark.golden

FILE = "61-score-rewards.json"


def outputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Each golden output's name and ours."""
    x = {k: torch.tensor(v, dtype=torch.float64) for k, v in inputs.items()}
    r = torch.stack([x["r1"], x["r2"]], dim=1)

    def kl(turn: int, estimator: str) -> torch.Tensor:
        parts = (x[f"logp{turn}"], x[f"ref_logp{turn}"], x[f"mask{turn}"])
        return turn_kl(*parts, estimator)

    penalty = torch.stack([kl(1, "k1"), kl(2, "k1")], dim=1)
    how = {key: inputs[key] for key in ("alpha", "beta1", "beta2")}
    both = {
        (stage, credit): (
            score_returns(r, penalty, stage, credit=credit, **how),
            score_advantages(r, penalty, stage, credit=credit, **how),
        )
        for stage in (1, 2)
        for credit in ("per_turn", "total")
    }

    def by_turn(what: int) -> dict[str, torch.Tensor]:
        turns = [(s, t) for s in (1, 2) for t in (1, 2)]
        return {f"stage{s}_turn{t}": both[s, "per_turn"][what][:, t - 1] for s, t in turns}

    bonus = score_returns(r, alpha=inputs["alpha"])[:, 1]
    return {
        "kl1_k1": kl(1, "k1"), "kl2_k1": kl(2, "k1"), "kl1_k3": kl(1, "k3"), "kl2_k3": kl(2, "k3"),
        "stage1_return": both[1, "total"][0][:, 0],
        "stage2_return_total": both[2, "total"][0][:, 0],
        "stage2_turn2_reward": bonus, "stage2_bonus": bonus - x["r2"],
        "stage1_loo_adv": both[1, "total"][1][:, 1], "stage2_loo_adv": both[2, "total"][1][:, 0],
        "per_turn_return": by_turn(0), "per_turn_loo_adv": by_turn(1),
        "metrics": self_correction_metrics(x["r1"], x["r2"])._asdict(),
    }  # fmt: skip


def test_every_output_of_the_file(golden: Callable[[str], dict[str, Any]]) -> None:
    data = golden(FILE)
    ours = outputs(data["inputs"])
    assert set(ours) == set(data["outputs"])
    atol = data["tolerance"]["atol"]
    for name, want in data["outputs"].items():
        parts = want if isinstance(want, dict) else {"": want}
        mine = ours[name] if isinstance(want, dict) else {"": ours[name]}
        for part, values in parts.items():
            close = np.testing.assert_allclose
            close(np.asarray(mine[part]), values, rtol=0, atol=atol, err_msg=f"{name} {part}")
