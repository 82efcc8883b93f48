"""The experiment of paper 13: it runs, its parts are what they say, its claims can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoredraw.errors import MissingExtraError
from scoredraw.metrics import bootstrap_interval
from scoredraw.papers import p13_alignment_resampling as p13
from scoredraw.papers.p13_alignment_resampling import (
    CHEER,
    GREEN,
    GUMBEL,
    PERMUTE,
    PLAIN,
    RANDOMISED,
    SYNTHID,
    VARIETY,
    Arm,
)
from scoredraw.reports import Report
from scoredraw.small_models import stories_model

pytest.importorskip("torch")
pytestmark = pytest.mark.contract

PLAN = p13.PLANS["smoke"]
QUICK = replace(p13.PLANS["quick"], resamples=200)


@pytest.fixture(scope="module")
def report() -> Report:
    try:
        stories_model()
    except MissingExtraError as missing:
        pytest.skip(str(missing))
    pytest.importorskip("vaderSentiment")
    return p13.run("smoke", 0)


def arm_of(rewards: np.ndarray, logprobs: Any = None, log10_p: Any = None) -> Arm:
    """An arm of given rewards (P, 1, m) by both names."""
    names = {CHEER: rewards, VARIETY: rewards}
    logprobs = -np.ones(rewards.shape) if logprobs is None else logprobs
    log10_p = -4 * np.ones(rewards.shape) if log10_p is None else log10_p
    return Arm(names, logprobs, log10_p, np.full((2, len(rewards), 2), -8.0))


class Made:
    """Stories that were never written."""

    def __init__(self, arms: dict[str, Arm]) -> None:
        self.arms = arms
        self.scores, self.expected = np.full(400, 1.5), np.full(400, 1.5)


def verdicts(report: Report, part: str) -> set[str | None]:
    found = {claim.verdict for claim in report.claims if part in claim.name}
    assert found, part
    return found


# ── the experiment ──────────────────────────────────────────────────────────────────────────────


def test_smoke_runs_end_to_end(report: Report) -> None:
    assert report.paper == 13
    assert len(report.claims) == 5 + 2 * (4 + 4 + 1) + 2 * 3 + 1
    assert [len(table.rows) for table in report.tables] == [6, 2, 6, 2, 5]
    arms = [row[0] for row in report.tables[0].rows]
    assert arms == [PLAIN, GREEN, RANDOMISED, GUMBEL, PERMUTE, SYNTHID]
    assert [len(figure.series) for figure in report.figures] == [4, 4, 4]
    assert Report.from_json(report.to_json()).to_json() == report.to_json()


def test_without_the_model_the_laws_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCOREDRAW_STORIES", str(tmp_path / "absent"))
    report = p13.run("smoke", 0)
    assert len(report.claims) == 5
    assert not report.tables
    assert "stories15M is not there" in report.notes[-1]


def test_without_vader_its_reward_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise MissingExtraError("vaderSentiment is not installed")

    monkeypatch.setattr(p13, "cheer", absent)
    monkeypatch.setattr(p13, "stories_model", Small)
    stories = p13.Stories(PLAN, 0)
    assert list(stories.arms[PLAIN].rewards) == [VARIETY]
    assert stories.notes == ["The reward VADER is left out: vaderSentiment is not installed."]


class Small:
    """A random model in the place of the stories', and a tokenizer that writes numbers."""

    def __new__(cls) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, initializer_range=0.3,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval(), Numbers()


class Numbers:
    def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


# ── its parts ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_variety_counts_repeated_trigrams() -> None:
    found = p13.variety(["a b c d", "a b c a b c", "A b c", "a b", "a a a a a"])
    assert found == pytest.approx([0, -1 / 4, 0, 0, -2 / 3])


@pytest.mark.oracle
def test_vader_is_vader() -> None:
    pytest.importorskip("vaderSentiment")
    found = p13.cheer()(["I love this wonderful day!", "It is a table.", "This is horrible."])
    assert found[0] > 0.5
    assert found[1] == 0
    assert found[2] < -0.3


@pytest.mark.oracle
def test_the_best_of_all_is_the_largest() -> None:
    rng = np.random.default_rng(0)
    rewards, logprobs = rng.standard_normal((2, 7, 3, 4))
    arm = Arm({CHEER: rewards}, logprobs)
    np.testing.assert_allclose(arm.best(CHEER, 1), rewards.mean(axis=(1, 2)))
    np.testing.assert_allclose(arm.best(CHEER, 4), rewards.max(axis=2).mean(axis=1))
    likeliest = np.take_along_axis(rewards, logprobs.argmax(2)[..., None], 2)[..., 0]
    np.testing.assert_allclose(arm.best("perplexity", 4, CHEER), likeliest.mean(axis=1))


@pytest.mark.oracle
def test_gaussian_rewards_meet_the_rules() -> None:
    """Laws of 1,000 prompts: σ e_n, √log n, and what a gap takes is what was put in."""
    rng = np.random.default_rng(1)
    rewards = rng.standard_normal((1000, 1, 8)) + rng.standard_normal((1000, 1, 1))
    arm = arm_of(rewards, rng.standard_normal(rewards.shape))
    plain = arm_of(rewards + 0.4)
    report = Report(13, "quick", 0)
    stories: Any = Made({PLAIN: plain, GREEN: arm, RANDOMISED: arm})
    p13.add_rewards(report, stories, QUICK)
    p13.add_detection(report, stories, QUICK)
    assert verdicts(report, "") == {"holds"}
    name, gap, sigma, needed, *_ = report.tables[1].rows[0]
    assert (name, needed) == (GREEN, 2)
    assert gap.value == pytest.approx(0.4)  # type: ignore[union-attr]
    assert sigma == pytest.approx(1, abs=0.05)


@pytest.mark.oracle
def test_claims_can_fail() -> None:
    """Two-valued rewards that the likeliest text has and that go with a weak mark."""
    rng = np.random.default_rng(1)
    rewards = (rng.random((400, 1, 8)) < 0.85).astype(np.float64)
    arm = arm_of(rewards, rewards - 2, np.where(rewards > 0, -1.0, -9.0))
    arm.long = np.full((2, 400, 2), -1.0)
    report = Report(13, "quick", 0)
    stories: Any = Made({PLAIN: arm_of(rewards - 0.2), GREEN: arm, RANDOMISED: arm})
    p13.add_rewards(report, stories, QUICK)
    p13.add_detection(report, stories, QUICK)
    for part in ("mean without", "multiple of σ", "√log n", "likeliest", "log10 p"):
        assert verdicts(report, part) == {"fails"}, part
    poor: Any = Made({PLAIN: arm_of(rewards + 5), GREEN: arm, RANDOMISED: arm})
    report = Report(13, "quick", 0)
    p13.add_rewards(report, poor, QUICK)
    assert verdicts(report, "best of 4 with a watermark") == {"fails"}
    far: Any = Made({})
    far.scores = far.scores + np.random.default_rng(0).standard_normal(400) + 1
    assert p13.gumbel_claim(far).verdict == "fails"


@pytest.mark.oracle
def test_rewards_that_never_vary_decide_nothing() -> None:
    over: Callable[..., Any] = bootstrap_interval
    arm = arm_of(np.zeros((5, 1, 8)))
    assert np.isnan(p13.gain_ratio(arm, VARIETY, 4, over).low)
    assert p13.root_log_claim("x", arm, VARIETY, over).verdict == "undecided"
