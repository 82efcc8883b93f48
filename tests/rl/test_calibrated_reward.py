"""Being right and knowing it: the theorem and where it ends, the reward as TRL calls it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.stats import entropy

from scoredraw.calibration import logarithmic_score, quadratic_score, spherical_score
from scoredraw.errors import InputError
from scoredraw.rl.calibrated_reward import (
    GRID,
    LOGGER_WEIGHT,
    RLCRReward,
    calibrated_reward,
    calibration_report,
    expected_reward,
    extreme_confidence,
    find_score,
    largest_lam,
    mean_confidence,
    wrong_on_purpose,
)

pytestmark = pytest.mark.oracle

SAID = "so </think> <answer>{}</answer> <analysis>a</analysis> <confidence>{}</confidence>"
# p + log-likelihood = what q = 0 gives a wrong answer, clipped at a thousandth
OWN_ENTROPY = brentq(lambda p: p - entropy([p, 1 - p]) - math.log(0.999), 0.3, 0.99, xtol=1e-13)
BOUNDED = {"brier": quadratic_score, "spherical": spherical_score, "log": logarithmic_score}


def best_values(score: Any, lam: float) -> np.ndarray[Any, Any]:
    """V on a grid, by trying every q instead of trusting q = p."""
    return expected_reward(GRID[:, None], GRID, score, lam).max(axis=1)


# ── the theorem ─────────────────────────────────────────────────────────────────────────────────


def test_the_true_probability_pays_the_most() -> None:
    p = np.linspace(0, 1, 2001)
    expected = expected_reward(p[:, None], GRID)
    assert np.abs(GRID[expected.argmax(axis=1)] - p).max() <= 0.005 + 1e-12
    assert expected_reward(p, p) == pytest.approx(p**2, abs=1e-15)
    assert (np.diff(expected_reward(p, p)) > 0).all()


@given(st.integers(0, 1), st.floats(0, 1), st.sampled_from(["brier", "spherical"]))
def test_the_reward_is_bounded(c: int, q: float, score: str) -> None:
    assert -1 - 1e-12 <= calibrated_reward(c, q, score) <= 1
    if score == "brier":
        assert calibrated_reward(c, q) == c - (c - q) ** 2


@pytest.mark.parametrize("score", ["brier", "spherical"])
def test_value_rises_up_to_the_largest_weight(score: str) -> None:
    assert largest_lam(score) == 1
    assert (np.diff(best_values(score, 1.0)) >= 0).all()
    assert np.diff(best_values(score, 1.1))[0] < 0
    assert wrong_on_purpose(score, 1.0) == (0, 0)
    assert wrong_on_purpose(score, 1.1).falls_below > 0


@pytest.mark.parametrize(
    ("score", "lam", "falls", "pays"),
    [("brier", 2.0, 0.25, 0.5), ("brier", 4.0, 0.375, 0.75),
     ("log", 1.0, 1 / (1 + math.e), OWN_ENTROPY)],
)  # fmt: skip
def test_where_value_falls(score: str, lam: float, falls: float, pays: float) -> None:
    """Brier: (1 - 1/λ)/2 and 1 - 1/λ; log: 1/(1 + e), and the p that is its own entropy."""
    found = wrong_on_purpose(score, lam)
    assert found == pytest.approx((falls, pays), abs=1e-9)
    value = best_values(score, lam)
    assert GRID[value.argmin()] == pytest.approx(falls, abs=0.01)
    below = value < value[0] - 1e-9
    assert GRID[below].max() == pytest.approx(pays, abs=0.011)


@pytest.mark.parametrize("clip", [1e-1, 1e-2, 1e-3, 1e-6])
def test_clipping_does_not_save_the_logarithm(clip: float) -> None:
    def score(q: ArrayLike, correct: ArrayLike) -> Any:
        return logarithmic_score(q, correct, clip)

    assert largest_lam(score) == pytest.approx(1 / math.log((1 - clip) / clip))
    assert wrong_on_purpose(score).falls_below == pytest.approx(1 / (1 + math.e), abs=1e-9)
    assert wrong_on_purpose(score, largest_lam(score)) == (0, 0)


def test_the_score_alone_pays_for_being_surely_wrong() -> None:
    for score in BOUNDED:
        found = wrong_on_purpose(score, 1.0, accuracy=0.0)
        assert found == pytest.approx((0.5, 1.0), abs=1e-9)


def test_scores_are_checked() -> None:
    for score in BOUNDED.values():
        assert find_score(score) is score
    assert largest_lam(lambda q, c: np.zeros(np.shape(q))) == math.inf
    bad: dict[str, Any] = {
        "proper": lambda q, c: -np.abs(q - c),
        "bounded": lambda q, c: np.log(np.where(c == 1, q, 1 - q)),
        "each": lambda q, c: 0.0,
        "spherical": "hinge",
    }
    for named, score in bad.items():
        with pytest.raises(InputError, match=named), np.errstate(divide="ignore"):
            find_score(score)


@pytest.mark.parametrize(
    ("correct", "confidence", "options", "named"),
    [([2], [0.5], {}, "correct"), ([1], [1.2], {}, "confidence"), ([1], [0.5], {"lam": -1}, "lam"),
     ([1], [0.5], {"lam": math.nan}, "lam"), ([1], [0.5], {"score": "x"}, "score")],
)  # fmt: skip
def test_rewards_refuse(correct: Any, confidence: Any, options: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        calibrated_reward(correct, confidence, **options)
    with pytest.raises(InputError, match="p: got"):
        expected_reward(1.5, 0.5)


# ── as TRL calls it ─────────────────────────────────────────────────────────────────────────────


def call(reward: Any, texts: list[Any], golds: list[Any], **columns: Any) -> list[float | None]:
    found: list[float | None] = reward(["?"] * len(texts), texts, answer=golds, **columns)
    return found


@given(st.booleans(), st.integers(0, 10))
def test_affine_in_the_reward_of_the_paper(right: bool, tenths: int) -> None:
    total = call(RLCRReward(), [SAID.format("Rome", tenths / 10)], ["rome" if right else "Oslo"])
    paper = calibrated_reward(float(right), tenths / 10)
    assert total == pytest.approx([0.5 * (2 + float(paper))])


def test_no_text_raises() -> None:
    odd = [
        "",
        "<answer>",
        SAID.format("", ""),
        SAID.format("Rome", "nan"),
        "\x00",
        "</think>" * 999,
    ]
    assert call(RLCRReward(), odd, ["Rome"] * len(odd)) == [0.0] * len(odd)
    assert call(RLCRReward(), [], []) == []
    no_texts = [None, 3, [{"role": "assistant", "content": None}]]
    assert call(RLCRReward(), no_texts, ["Rome"] * 3) == [None] * 3
    assert mean_confidence(["?"] * 3, no_texts) == [None] * 3
    assert extreme_confidence(["?"] * 3, no_texts) == [None] * 3


def test_messages_are_texts() -> None:
    text = SAID.format("Rome", 0.8)
    message = [{"role": "assistant", "content": text}]
    assert call(RLCRReward(), [message, text], ["Rome"] * 2) == pytest.approx([1.48] * 2)


def test_what_cannot_be_scored_is_none_in_every_part() -> None:
    """Else the row's format alone would be its reward, and it would be trained on."""
    texts = [SAID.format("Rome", 0.8)] * 2
    reward = RLCRReward()
    for each in (reward, *reward.parts()):
        found = call(each, texts, [None, "Rome"])
        assert found[0] is None
        assert found[1] is not None


def test_a_verifier_a_row() -> None:
    """The released code takes the first row's source for the whole batch."""
    pytest.importorskip("math_verify", reason="math-verify is an optional extra")
    reward = RLCRReward(verifier={"hotpot": "exact", "math": "math"})
    texts = [SAID.format("the Beatles", 1), SAID.format("0.5", 1), SAID.format("0.5", 1)]
    golds, sources = ["Beatles", "1/2", "1/2"], ["hotpot", "math", "hotpot"]
    accuracy = reward.parts()[1]
    assert call(accuracy, texts, golds, source=sources) == [1.0, 1.0, 0.0]
    assert call(accuracy, texts[::-1], golds[::-1], source=sources[::-1]) == [0.0, 1.0, 1.0]
    assert call(accuracy, texts, golds, source=["gpqa", "math", "hotpot"]) == [None, 1.0, 0.0]
    lists = [["hotpot"], "math", "hotpot"]  # no source that anybody has a verifier for
    assert call(accuracy, texts, golds, source=lists) == [None, 1.0, 0.0]
    with pytest.raises(InputError, match="source"):
        call(accuracy, texts, golds)


def test_verifiers_of_ones_own() -> None:
    def half(answer: str, gold: Any) -> float:
        if answer == "boom":
            raise RuntimeError("no")
        return 0.5 if answer == gold else 7.0

    texts = [SAID.format(answer, 0.5) for answer in ("Rome", "boom", "Oslo")]
    assert call(RLCRReward(verifier=half).parts()[1], texts, ["Rome"] * 3) == [0.5, None, None]
    assert call(RLCRReward(verifier=half), texts, ["Rome"] * 3) == [1.25, None, None]


def test_options_reach_the_gate() -> None:
    texts = [SAID.format("Rome", "90%"), "x" + SAID.format("Rome", 0.9) + "<answer>"]
    assert call(RLCRReward(), texts, ["Rome"] * 2) == [0, 0]
    assert call(RLCRReward(percent=True), texts, ["Rome"] * 2) == pytest.approx([1.495, 0])
    again = ["<think></think>" + SAID.format("Rome", 0.9)]
    assert call(RLCRReward(), again, ["Rome"]) == pytest.approx([1.495])
    assert call(RLCRReward(strict_tags=True), again, ["Rome"]) == [0]


def test_rlvr_is_the_reward_without_its_third_part() -> None:
    bare = ["so </think><answer>Rome</answer>"]
    assert call(RLCRReward("ta", weights=(0.5, 0.5, 0)), bare, ["Rome"]) == [1.0]
    said = [SAID.format("Rome", 0.1), SAID.format("Oslo", 0.1)]
    assert call(RLCRReward(weights=(0.5, 0.5, 0)), said, ["Rome"] * 2) == [1.0, 0.5]
    with pytest.raises(InputError, match="weights"):
        RLCRReward("ta")


@pytest.mark.parametrize(
    "options",
    [{"lam": 1.01}, {"score": "log"}, {"weights": (0.5, 0, 0.5)}, {"weights": (0.5, 0.4, 0.5)},
     {"score": "spherical", "lam": 2}],
)  # fmt: skip
def test_wrong_on_purpose_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="wrong answers on purpose pay"):
        RLCRReward(**options)
    with pytest.warns(RuntimeWarning, match="wrong answers on purpose pay"):
        RLCRReward(**options, when_wrong_pays="warn")


def test_small_weights_pass() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RLCRReward(lam=2.0, weights=(1, 1, 0.5))
        found = call(RLCRReward(score="log", lam=0.144), [SAID.format("Rome", 0.0)], ["Oslo"])
    assert found[0] == pytest.approx(0.5 * (2 + 0.144 * math.log(0.999)))


@pytest.mark.parametrize(
    ("options", "named"),
    [({"format": "abc"}, "format"), ({"verifier": "x"}, "verifier"), ({"score": "x"}, "score"),
     ({"lam": -0.5}, "lam"), ({"lam": math.inf}, "lam"), ({"weights": (1, 1)}, "weights"),
     ({"weights": (0, 0, 0)}, "weights"), ({"weights": (1, -1, 1)}, "weights"),
     ({"when_wrong_pays": "never"}, "when_wrong_pays")],
)  # fmt: skip
def test_the_reward_refuses(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        RLCRReward(**options)


def test_columns_that_are_not_there() -> None:
    texts = [SAID.format("Rome", 0.5)] * 2
    for columns in ({}, {"answer": ["Rome"]}, {"answer": 3}, {"gold": ["Rome", "Rome"]}):
        with pytest.raises(InputError, match="answer"):
            RLCRReward()(["?"] * 2, texts, **columns)
    assert RLCRReward(gold="gold")(["?"] * 2, texts, gold=["Rome", "Oslo"]) == [1.375, 0.875]


def test_what_is_logged() -> None:
    logged: dict[str, float] = {}
    texts = [SAID.format("Rome", 0.5), SAID.format("Rome", 0.9), "no tags", "no gold"]
    call(RLCRReward(), texts, ["Rome", "Oslo", "Rome", None], log_metric=logged.__setitem__)
    want = {"unscored": 0.25, "format": 2 / 3, "accuracy": 1 / 3, "brier": 0.53, "confidence": 0.7}
    assert logged == pytest.approx({f"rlcr_reward/{name}": x for name, x in want.items()})
    q = ["0.995", "0.5", "0", "high", "7"]
    said = [f"<confidence>{x}</confidence>" for x in q] + ["nothing"]
    assert extreme_confidence(["?"] * 6, said) == [1, 0, 1, 1, 1, 1]


# ── metrics ─────────────────────────────────────────────────────────────────────────────────────


def test_the_report_does_not_see_the_order() -> None:
    rng = np.random.default_rng(0)
    c, q = (rng.random(300) < 0.6).astype(float), rng.random(300).round(2)
    order = rng.permutation(300)
    assert calibration_report(c[order], q[order]) == pytest.approx(calibration_report(c, q))


def test_one_bin_is_the_difference_of_the_means() -> None:
    rng = np.random.default_rng(1)
    c, q = (rng.random(80) < 0.6).astype(float), 0.41 + 0.08 * rng.random(80)
    report = calibration_report(c, q)
    assert report["ece"] == pytest.approx(abs(report["mean_conf"] - report["acc"]))


def test_one_class_has_no_auroc() -> None:
    with pytest.warns(RuntimeWarning, match="all are right"):
        assert math.isnan(calibration_report([1, 1], [0.2, 0.9])["auroc"])


@pytest.mark.parametrize(
    ("c", "q", "named"),
    [([], [], "confidence"), ([1], [1.1], "confidence"), ([1, 0], [0.5], "credit"),
     ([0.5, 1], [0.5, 0.5], "correct")],
)  # fmt: skip
def test_reports_refuse(c: Any, q: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        calibration_report(c, q)


# ── a run ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
def test_whole_and_in_parts_in_trl(
    letters: Any, new_policy: Callable[[], Any], grpo_config: Callable[..., Any]
) -> None:
    """Two real steps end at the same weights, whether TRL adds the parts up or we do."""
    import torch
    from datasets import Dataset
    from trl import GRPOTrainer

    data = Dataset.from_list([{"prompt": f"{a}+{a}=", "answer": str(2 * a)} for a in range(8)])

    def tagged(reward: Any) -> Any:
        """An untrained policy writes no tags: its completion as an answer, surer with variety."""

        def call(prompts: Any, completions: Any, **columns: Any) -> Any:
            texts = [SAID.format(c, min(len(set(c)), 10) / 10) for c in completions]
            return reward(prompts, texts, **columns)

        call.__name__ = reward.__name__
        return call

    def train(rewards: list[Any], weights: list[float]) -> Any:
        trainer = GRPOTrainer(
            model=new_policy(), reward_funcs=rewards, train_dataset=data, processing_class=letters,
            args=grpo_config(scale_rewards="none", beta=0.0, reward_weights=weights),
        )  # fmt: skip
        trainer.train()
        return trainer

    reward = RLCRReward()
    whole = train([tagged(reward)], [1.0])
    parts = [*reward.parts(), *reward.loggers()]
    apart = train([tagged(part) for part in parts], [*reward.weights, *[LOGGER_WEIGHT] * 2])
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, apart.model.state_dict()[name], atol=1e-5), name
    assert whole.state.log_history[0]["reward_std"] > 0
    assert {"rlcr_reward/accuracy", "rlcr_reward/brier"} <= set(whole.state.log_history[0])
    assert "rewards/calibration_reward/mean" in apart.state.log_history[0]
