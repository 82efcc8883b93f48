"""The experiment of paper 47 and its digits half hidden: parts by hand, claims that can fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from scoredraw.calibration import auroc
from scoredraw.papers import p47_rlcr as p47
from scoredraw.papers.digit_confidence import (
    LEVELS,
    Half,
    Policies,
    Visits,
    fit_judge,
    halves,
    judged,
    over_answers,
    reinforce,
    sampled,
    say,
    teach,
)
from scoredraw.papers.p47_rlcr import ALONE, LOG, RLCR, RLVR
from scoredraw.reports import Report

pytestmark = pytest.mark.oracle

SEEDS = [3, 4]


@pytest.fixture(scope="module")
def parts() -> tuple[Half, Half]:
    return halves(SEEDS)


def seen_of(half: Half, count: int, seed: int = 0) -> Visits:
    rows = np.tile(np.arange(count), (len(half.x), 1))
    return half.visit(np.random.default_rng(seed), rows)


def taught(half: Half) -> Policies:
    policies = Policies.new(SEEDS)
    teach(policies, half, np.random.default_rng(0))
    return policies


# ── digits half hidden ──────────────────────────────────────────────────────────────────────────


def test_halves_share_no_digit_and_keep_the_classes(parts: tuple[Half, Half]) -> None:
    train, test = parts
    x, y = load_digits(return_X_y=True)
    for s in range(2):
        both = np.concatenate([train.x[s], test.x[s]])
        assert sorted(map(bytes, both)) == sorted(map(bytes, (x / 16).astype(np.float32)))
        for half in parts:
            assert (np.abs(np.bincount(half.y[s]) - np.bincount(y) / 2) <= 1).all()
    assert (train.y[0] != train.y[1]).any()


def test_a_band_of_rows_is_blank(parts: tuple[Half, Half]) -> None:
    """Heights 0 to 7 alike, 4,000 images: each within 4.5 errors of 500; 5 in 100,000, seed
    fixed."""
    ones = Half(np.ones((2, 10, 64), np.float32), np.tile(np.arange(10), (2, 1)))
    rows = np.random.default_rng(1).integers(0, 10, (2, 2000))
    seen = ones.visit(np.random.default_rng(0), rows)
    np.testing.assert_array_equal(seen.y, rows)
    lines = seen.x.reshape(-1, 8, 8)
    assert (lines == lines[..., :1]).all()
    blank = (lines[..., 0] == 0).int()
    height = blank.sum(dim=1)
    assert (blank.diff(dim=1).abs().sum(dim=1) <= 2).all()
    inside = (blank[:, 1:] > blank[:, :-1]).sum(dim=1) + blank[:, 0]
    assert (inside == (height > 0)).all()  # in one piece
    counts = height.bincount(minlength=9)
    assert counts[8] == 0
    assert (np.abs(counts[:8].numpy() - 500) < 4.5 * np.sqrt(4000 / 8 * 7 / 8)).all()
    kept = seen_of(parts[0], 5)
    there = kept.x != 0
    np.testing.assert_array_equal(kept.x[there], parts[0].x[:, :5][there.numpy()])


def test_draws_by_inversion() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()[:, None]
    u = np.array([[[0.1, 0.25, 0.69, 0.71, 0.99]]])
    assert sampled(logits, u).tolist() == [[[0, 1, 1, 2, 2]]]


def test_teaching_makes_it_better_and_too_sure(parts: tuple[Half, Half]) -> None:
    train, test = parts
    seen, u = seen_of(test, 800), np.random.default_rng(2).random((2, 2, 800, 1))
    said = say(taught(train), seen, u)
    assert said.right.mean() > 0.4
    assert (said.stated >= 0.6).mean() > 0.9
    assert say(Policies.new(SEEDS), seen, u).right.mean() < 0.2


def test_what_is_said_is_what_the_networks_say(
    parts: tuple[Half, Half], monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = taught(parts[0])
    seen, u = seen_of(parts[1], 300), np.random.default_rng(3).random((2, 2, 300, 4))
    said = say(policies, seen, u)
    p = policies.answer.layers(seen.x)[-1].softmax(dim=-1).detach().numpy()
    np.testing.assert_array_equal(said.answer, p.argmax(axis=2)[..., None].repeat(4, 2))
    np.testing.assert_allclose(said.chance[..., 0], p.max(axis=2), rtol=1e-5)
    np.testing.assert_array_equal(said.right, said.answer == seen.y.numpy()[..., None])
    q = over_answers(policies.head, seen.x).softmax(dim=-1).detach().double().numpy()
    law = np.take_along_axis(q, said.answer[..., :1, None], 2)[:, :, 0].cumsum(axis=2)
    level = (u[1][..., None] > law[:, :, None]).sum(axis=3)
    assert (said.stated == LEVELS[np.minimum(level, 10)]).mean() > 0.999  # float32 sums
    drawn = say(policies, seen, u, likeliest=False)
    spread = (u[0][..., None] > p.astype(np.float64).cumsum(axis=2)[:, :, None]).sum(axis=3)
    assert (drawn.answer == np.minimum(spread, 9)).mean() > 0.999
    monkeypatch.setattr("scoredraw.papers.digit_confidence.CHUNK", 77)
    for name, value in vars(say(policies, seen, u)).items():
        np.testing.assert_allclose(value, getattr(said, name), rtol=1e-5, err_msg=name)


def test_arms_and_seeds_train_as_if_alone(parts: tuple[Half, Half]) -> None:
    """The gradient of one policy doesn't touch another, and its size hangs on itself."""
    start, tables = taught(parts[0]), p47.reward_tables((RLVR, RLCR))
    both = start.copies(2)
    reinforce(both, parts[0], tables, 6, np.random.default_rng(5))
    for i in range(2):
        alone = start.copies(1)
        reinforce(alone, parts[0], tables[i : i + 1], 6, np.random.default_rng(5))
        together = both.part(2 * i, 2)
        for a, b in zip(alone.parameters, together.parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)
    first, second = both.part(0, 2), both.part(2, 2)
    moved = [(a - b).abs().max() for a, b in zip(first.parameters, second.parameters, strict=True)]
    assert max(moved) > 5e-3


def test_the_same_for_all_teaches_nothing(parts: tuple[Half, Half]) -> None:
    start = taught(parts[0])
    trained = start.copies(1)
    reinforce(trained, parts[0], np.full((1, 2, 11), 0.7), 3, np.random.default_rng(0))
    for a, b in zip(start.parameters, trained.parameters, strict=True):
        torch.testing.assert_close(a, b)


def test_a_confidence_that_pays_is_stated(parts: tuple[Half, Half]) -> None:
    policies, table = taught(parts[0]), np.zeros((1, 2, 11))
    table[:, :, 7] = 1.0
    reinforce(policies, parts[0], table, 60, np.random.default_rng(0))
    said = say(policies, seen_of(parts[1], 200), np.random.default_rng(1).random((2, 2, 200, 1)))
    assert (said.stated == LEVELS[7]).mean() > 0.9


@pytest.mark.parametrize("probe", [False, True])
def test_a_judge_knows_more_than_nothing(parts: tuple[Half, Half], probe: bool) -> None:
    train, test = parts
    policies = taught(train)
    judge = fit_judge(policies, train, 120, np.random.default_rng(0), probe=probe)
    seen, u = seen_of(test, 800), np.random.default_rng(1).random((2, 2, 800, 4))
    said = say(policies, seen, u, likeliest=False)
    found = judged(judge, seen, said)
    assert found.shape == said.right.shape
    right = said.right.mean()
    assert ((found - said.right) ** 2).mean() < right * (1 - right)
    assert auroc(found.reshape(-1), said.right.reshape(-1)) > 0.65


# ── the report ──────────────────────────────────────────────────────────────────────────────────


def test_the_smallest_scale_says_everything() -> None:
    report = p47.run("smoke", 0)
    assert Report.from_json(report.to_json()) == report
    assert len(report.claims) == 31
    assert all(claim.verdict is not None for claim in report.claims)


def test_tables_of_rewards() -> None:
    rlvr, rlcr, alone, log = p47.reward_tables((RLVR, RLCR, ALONE, LOG))
    q = np.arange(11) / 10
    np.testing.assert_allclose(rlvr, [np.zeros(11), np.ones(11)])
    np.testing.assert_allclose(rlcr, [-(q**2), 1 - (1 - q) ** 2])
    np.testing.assert_allclose(alone, [-(q**2), -((1 - q) ** 2)], atol=1e-15)
    assert log[1, 0] == pytest.approx(1 + np.log(1e-3))


def outcome(acc: float, brier: float, ece: float, area: float) -> dict[str, Any]:
    noise = np.array([-1e-3, 0.0, 1e-3, 0.0])
    values = {"acc": acc, "brier": brier, "ece": ece, "auroc": area, "mean_conf": 0.5}
    return {name: value + noise * np.sign(value) for name, value in values.items()}


def test_claims_about_digits_can_fail() -> None:
    weak, strong = outcome(0.6, 0.4, 0.3, 0.5), outcome(0.6, 0.1, 0.1, 0.8)
    lost, off = outcome(0.02, 0.1, 0.1, 0.5), outcome(0.9, 0.4, 0.1, 0.5)
    others = (p47.HEAD, p47.CHANCE, p47.CONSTANT)
    cases = (
        ({RLCR: strong, RLVR: weak, p47.SPHERICAL: strong, LOG: strong, ALONE: lost}, weak, lost),
        ({RLCR: weak, RLVR: off, p47.SPHERICAL: strong, LOG: off, ALONE: weak}, strong, weak),
    )
    for (warm, rest, wrong), verdict in zip(cases, ("holds", "fails"), strict=True):
        warm = {**warm, **dict.fromkeys(others, rest)}
        cold = {RLCR: warm[RLCR], ALONE: wrong, LOG: wrong}
        found = p47.digit_claims(warm, cold, cold)
        odd = {claim.name: claim.verdict for claim in found if claim.verdict != verdict}
        assert not odd


def test_claims_about_the_released_evaluations_can_fail() -> None:
    rng = np.random.default_rng(0)
    c = (rng.random(400) < 0.5).astype(float)
    good, bad = np.clip(0.8 * c + 0.1, 0, 1), np.full(400, 0.95)
    for own, rest, verdict in ((good, bad, "holds"), (bad, good, "fails")):
        pairs = {m: (c, own if m == "RLCR" else rest) for m in p47.METHODS}
        if verdict == "fails":
            pairs["RLVR"] = (np.ones(400), rest)
        found = p47.released_claims("gpqa", pairs)
        assert [claim.verdict for claim in found] == [verdict] * 3
