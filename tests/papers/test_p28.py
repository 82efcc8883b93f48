"""First-hitting sampling on a text model: its parts, its claims, and every part of the full run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="the language extra is not installed")

from scoredraw.papers import masked_text_model as text  # noqa: E402
from scoredraw.papers import p28_fhs  # noqa: E402
from scoredraw.papers.p28_fhs import PLANS, ancestral_name, grouped_name  # noqa: E402
from scoredraw.reports import Report, run_paper  # noqa: E402

RNG = np.random.default_rng(28)


# ── the model and its judge ─────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_letters_there_and_back() -> None:
    assert text.decoded(text.encoded("A  masked\n\t text é.")) == "A masked⏎text .⏎"
    assert text.decoded([text.MASK]) == "·"
    assert text.encoded("\n ~").tolist() == [0, text.V - 1, 0]  # lines have no margins


@pytest.mark.oracle
def test_the_corpus_keeps_its_held_out_texts_apart() -> None:
    found = text.corpus(4)
    assert found.held_out.shape[1] == text.LENGTH
    assert min(found.train.min(), found.held_out.min()) >= 0
    assert max(found.train.max(), found.held_out.max()) < text.V
    assert len(found.train) > 4 * found.held_out.size


@pytest.mark.oracle
def test_shares_and_trigrams_by_hand() -> None:
    rows = np.array([[0, 1, 0, 1], [1, 1, 1, 1]])
    pairs = text.share(rows, 2).reshape(text.V, text.V)
    assert pairs[0, 1] == pytest.approx(2 / 6)
    assert pairs[1, 1] == pytest.approx(3 / 6)
    judge = text.Trigrams(np.array([0, 1, 2] * 50))
    assert judge.p.sum(axis=-1).max() == pytest.approx(1)
    one = np.bincount([0, 1, 2] * 50)[2] / 150
    assert judge.p[0, 1, 2] == pytest.approx(0.7 + 0.2 + 0.09 * one + 0.01 / text.V)
    assert judge.surprise(np.array([[0, 1, 2, 0]])) < 0.2 < judge.surprise(rows)


@pytest.mark.oracle
def test_training_is_by_seed_and_finds_the_letters() -> None:
    line = text.corpus(4).train
    one, again, other = (text.masked_text_model(line, 3, seed) for seed in (0, 0, 1))
    assert not one.training
    for a, b in zip(one.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


# ── the claim-makers ────────────────────────────────────────────────────────────────────────────


class Invented:
    """Numbers in place of texts: what methods cost, and how they would come out."""

    def __init__(self, plan: p28_fhs.Plan, right: bool) -> None:
        self.plan, self.right = plan, right
        cheap = np.array([32.0, 64 * 32.0, 1.0]) + RNG.random((plan.blocks, 3)) / 100
        factor = 20.0 if right else 0.5
        self.cost = {p28_fhs.FIRST: cheap}
        for name in (p28_fhs.ANCESTRAL, p28_fhs.RACE):
            self.cost[name] = factor * cheap

    def noise(self) -> Any:
        return RNG.normal(size=self.plan.blocks) / 1000

    def distance(self, a: str, b: str, size: int) -> Any:
        base = 0.1 + self.noise()
        return base if self.right or a == p28_fhs.AGAIN else 3 * base

    def entropy(self, name: str) -> Any:
        sign = 1 if self.right else -1
        lost = 0.0
        for bits in self.plan.bits:
            for steps, size in ((self.plan.few_steps, 1.0), (self.plan.steps, 2.0)):
                if name == ancestral_name(bits, steps):
                    lost = size
            if name == f"{p28_fhs.FIRST}, {bits} bits" and not self.right:
                lost = 1.0
        if name == p28_fhs.MASKGIT:
            lost = 1.0
        return 3.0 - sign * lost + self.noise()

    def surprise(self, name: str) -> Any:
        value = 3.0
        if name == ancestral_name(16, self.plan.steps):
            value = 2.0 if self.right else 4.0
        if not self.right and name in (p28_fhs.FIRST, ancestral_name(53, self.plan.steps)):
            value = 2.0
        if "order 2" in name:
            value = 2.5 if self.right else 3.5
        return value + self.noise()


@pytest.mark.oracle
def test_every_claim_holds_where_the_paper_is_right_and_fails_where_it_is_not() -> None:
    plan = replace(PLANS["full"], blocks=6)
    for right, verdict in ((True, "holds"), (False, "fails")):
        found: Any = Invented(plan, right)
        singles = {name: cost[:4] for name, cost in found.cost.items()}
        rows = 3 + RNG.normal(size=(200, 8)) / 100
        off = 0.0 if right else 1.0
        likelihood = {
            (name, spread): rows + off * (name != "without time") + RNG.normal(size=rows.shape)
            * (0.1 if (name != "without time") == right else 0.001)
            for name in p28_fhs.CLOCKS for spread in ("independent", "stratified")
        }  # fmt: skip
        claims = [
            *p28_fhs.sameness(plan, found), *p28_fhs.costs(plan, found, singles),
            *p28_fhs.precision(plan, found), *p28_fhs.fewer_calls(plan, found),
            *p28_fhs.time_claims(likelihood),
        ]  # fmt: skip
        assert {c.name: c.verdict for c in claims} == {c.name: verdict for c in claims}
        assert len(claims) == 6 + 5 + 10 + 9 + 3


@pytest.mark.oracle
def test_the_laws_of_a_large_vocabulary_hold() -> None:
    assert [claim.verdict for claim in p28_fhs.zipf_claims()] == ["holds"] * 4
    table = p28_fhs.zipf_table()
    for column in range(1, 6):
        values = [row[column] for row in table.rows]
        assert values == sorted(values, reverse=True)  # the more steps, the more is lost


@pytest.mark.oracle
def test_raced_first_hitting_draws_the_law_of_its_bits() -> None:
    """20,000 draws from one law with 4 bits, within 4.5 standard errors of the grid's law."""
    from scoredraw.diffusion.low_precision import grid_categorical_probs

    p = np.array([0.6, 0.3, 0.1])
    logits = torch.from_numpy(np.append(np.log(p), 0.0))
    made = p28_fhs.RacedFirstHitting(4).sample(
        lambda x: logits.expand(*x.shape, 4), torch.full((2000, 10), 3), 3, rng=0
    )
    want = grid_categorical_probs(np.append(p, 0.0), 4)[:3]
    found = np.bincount(made.tokens.ravel(), minlength=3)[:3] / 20_000
    assert (abs(found - want) < 4.5 * np.sqrt(want * (1 - want) / 20_000)).all()
    assert abs(found - p).max() > 0.01


# ── the experiment ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
def test_smoke_runs_to_its_end_without_verdicts() -> None:
    report = run_paper(28, "smoke", 0)
    assert report.claims
    assert all(claim.verdict is None for claim in report.claims)
    assert len(report.tables) == 5
    assert [figure.kind for figure in report.figures] == ["line", "line"]
    methods = [row[0] for row in report.tables[0].rows]
    assert methods[:2] == [p28_fhs.HELD_OUT, p28_fhs.UNIFORM]
    assert grouped_name(4, 2, "count") in methods
    draws = {row[0]: row[2].value for row in report.tables[1].rows}
    batch = PLANS["smoke"].batch
    assert draws[p28_fhs.FIRST] == draws[p28_fhs.ANCESTRAL] == batch * text.LENGTH
    assert Report.from_json(report.to_json()).notes == report.notes
