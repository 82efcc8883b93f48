"""RLCR's gate, rewards, metrics and votes, and the table of its released evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scoredraw.calibration import expected_calibration_error
from scoredraw.papers.p47_rlcr import METRICS, PUBLISHED, evaluations, tolerance
from scoredraw.rl.calibrated_reward import (
    RLCRReward,
    calibrated_reward,
    calibration_report,
    mean_confidence,
)
from scoredraw.rl.verbal_confidence import confidence_vote, read_stated

pytestmark = pytest.mark.golden


def outputs(given: dict[str, Any]) -> dict[str, Any]:
    """Each golden output as it is computed here."""
    texts, golds = given["completions"], given["answers"]
    prompts = ["?"] * len(texts)
    reward = RLCRReward()
    parts = [part(prompts, texts, answer=golds) for part in reward.parts()]
    judged = reward.judge(texts, answer=golds)
    paper = calibrated_reward(judged.correct, judged.confidence)
    report = calibration_report(given["metric_correctness"], given["metric_confidence"])
    votes = {
        how: confidence_vote(given["vote_answers"], given["vote_confidences"], how)
        for how in ("max", "weighted", "majority")
    }
    weighted = dict(zip(votes["weighted"].answers, votes["weighted"].scores, strict=True))
    return {
        "format": parts[0],
        "accuracy_exact_match": parts[1],
        "brier_reward": parts[2],
        "mean_confidence": mean_confidence(prompts, texts),
        "total_0.5_each": reward(prompts, texts, answer=golds),
        "rlcr_paper": paper,
        "brier": report["brier"],
        "ece10": report["ece"],
        "auroc": report["auroc"],
        "gate_cases": [
            float(read_stated(case["completion"], case["format"]).well_formed)
            for case in given["gate_cases"]
        ],
        "vote": {**{how: vote.answer for how, vote in votes.items()}, "weighted_scores": weighted},
    }


def test_every_output_of_the_file(golden: Callable[[str], dict[str, Any]]) -> None:
    data = golden("47-rlcr-rewards.json")
    ours, atol = outputs(data["inputs"]), data["tolerance"]["atol"]
    assert set(ours) == set(data["outputs"])
    for name, want in data["outputs"].items():
        if name != "vote":  # what has no value is null in the file
            got, wanted = (np.array(x, np.float64) for x in (ours[name], want))
            np.testing.assert_allclose(got, wanted, rtol=0, atol=atol, err_msg=name)
    vote = data["outputs"]["vote"]
    assert set(ours["vote"]) == set(vote)
    assert ours["vote"]["weighted_scores"] == pytest.approx(vote["weighted_scores"], abs=atol)
    assert all(ours["vote"][how] == vote[how] for how in ("max", "weighted", "majority"))


def test_other_bins_move_the_ece(golden: Callable[[str], dict[str, Any]]) -> None:
    """The file's note: .3, .6 and .7 are in the bin below; bins closed on the right differ."""
    given = golden("47-rlcr-rewards.json")["inputs"]
    c, q = given["metric_correctness"], given["metric_confidence"]
    left = calibration_report(c, q)["ece"]
    assert abs(float(expected_calibration_error(q, c)) - left) > 5e-3


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_evaluations(name: str) -> None:
    """Accuracy, Brier, ECE and AUROC of five methods, to the decimals they are given with."""
    methods = evaluations(name)
    assert list(methods) == list(PUBLISHED[name])
    for method, want in PUBLISHED[name].items():
        found = calibration_report(*methods[method])
        for metric, value in zip(METRICS, want, strict=True):
            near = tolerance(name, method, metric)
            assert found[metric] == pytest.approx(value, rel=0, abs=near), (method, metric)


def test_the_evaluations_hold_every_question() -> None:
    """And on the easy set RLCR is under-confident: .913 are right, the mean confidence is .61."""
    for name, n in {"math-500": 500, "gpqa": 448, "commonsenseqa": 1221}.items():
        assert all(len(c) == len(q) == n for c, q in evaluations(name).values())
    _, q = evaluations("commonsenseqa")["RLCR"]
    assert q.mean() == pytest.approx(0.61, abs=5e-3)
