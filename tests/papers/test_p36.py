"""The experiment of paper 36: it runs, its parts are what they say, its claims can fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scoredraw.language.cautious_decoding import CautiousTokens, Decision
from scoredraw.models import Completion
from scoredraw.papers import p36_cntp as p36
from scoredraw.papers.p36_cntp import BEST, CAUTIOUS, COOL, GREEDY, PLAIN, Way
from scoredraw.reports import Report, run_paper
from scoredraw.token_sampling import Tokens

pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def small() -> Report:
    return run_paper(36, "smoke", 0)


@pytest.mark.contract
def test_smoke_runs_without_verdicts(small: Report) -> None:
    assert all(claim.verdict is None for claim in small.claims)
    assert len(small.claims) == 6
    assert [len(table.rows) for table in small.tables] == [6, 7]
    assert [len(figure.series) for figure in small.figures] == [2, 4]
    assert Report.from_json(small.to_json()).claims == small.claims


def test_the_chain_has_all_its_segments() -> None:
    segments = p36.chain_segments()
    assert len(segments) == 1 + 2 + 4 + 8 * 3
    assert np.exp([logs.sum() for logs in segments.values()]).sum() == pytest.approx(1)


def test_the_law_is_told_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 runs against the law of one trial more: the χ² test sees it."""
    law = p36.segment_law
    verdicts = []
    for off in (0, 1):
        report = Report(paper=36, scale="quick", seed=0)
        with monkeypatch.context() as patch:
            patch.setattr(p36, "segment_law", lambda q, v, n, off=off: law(q, v, n + off))
            p36.add_law(report, 2000, 0)
        verdicts.append(report.claims[0].verdict)
    assert verdicts == ["holds", "fails"]


def test_distinct_phrases() -> None:
    one = Tokens(np.array([1, 2, 3, 4]), np.zeros(4), True)
    assert p36.distinct([one]) == 1
    assert p36.distinct([one, one]) == 0.5
    assert p36.distinct([Tokens(np.array([1]), np.zeros(1), True)]) == 0


def way(nll: float, variety: int, rows: int, trials: int = 1) -> Way:
    """16 texts of 10 tokens, of so many different ones, and about that NLL."""
    rng = np.random.default_rng(0)
    decisions = (Decision(0, 1.0, (10,) * trials, (1.0,) * trials, 0),)
    texts = [
        CautiousTokens(
            np.arange(10) + 10 * (i % variety), -nll + 0.01 * rng.normal(size=10), True, decisions,
            rows,
        )
        for i in range(16)
    ]  # fmt: skip
    return Way(list(texts), rows * 16)


def test_claims_of_texts_can_fail() -> None:
    def verdicts(**ways: Way) -> list[str | None]:
        found = {CAUTIOUS: way(0.4, 8, 40, 4), PLAIN: way(0.9, 8, 10), COOL: way(0.4, 4, 10),
                 BEST: way(0.6, 8, 50)}  # fmt: skip
        return [c.verdict for c in p36.text_claims("x", {**found, **ways}, True)]

    assert verdicts() == ["holds"] * 4
    assert verdicts(**{CAUTIOUS: way(0.8, 2, 110, 4)}) == ["fails"] * 4


def test_the_temperature_of_a_likelihood() -> None:
    class Line:
        def sample(self, n: int, rng: int, temperature: float) -> Way:
            return way(temperature, 8, 10)

    line: Any = Line()
    found, reached = p36.cooled(line, 0.4, 16, 0)
    assert reached
    assert found == pytest.approx(0.4, abs=0.02)
    assert p36.cooled(line, 0.01, 16, 0) == (p36.COLDEST, False)


def test_problems_and_their_answers() -> None:
    problems = p36.arithmetic(48)
    assert len(dict(problems)) == 48
    assert problems[0] == (
        "Max has 6 coins and buys 13 more. How many coins does Max have now?",
        19,
    )
    assert p36.arithmetic(2) == [problems[0], problems[24]]
    assert not set(dict(problems)) & {question for question, _, _ in p36.SHOTS}
    assert p36.few_shot("Why?").endswith("The answer is 7.\nQ: Why?\nA:")
    for question, working, answer in p36.SHOTS:
        assert working.endswith(f"= {answer}"), question


def said(*answers: int | None) -> list[Completion]:
    return [Completion("I am lost" if a is None else f"So the answer is {a}.") for a in answers]


def test_grades_and_votes() -> None:
    samples = [said(3, 3, 4), said(None, 5, 6), said(None, None, 1)]
    assert p36.graded(samples, [3, 6, 7]).tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert p36.voted(samples, [3, 6, 7]).tolist() == [1, 0.5, 0]
    assert p36.number_of(said(None)[0]) is None


def test_claims_of_answers_can_fail() -> None:
    rng = np.random.default_rng(0)

    def verdicts(cautious: float) -> list[str | None]:
        shares = {CAUTIOUS: cautious, PLAIN: 0.3, GREEDY: 0.3, f"vote, {PLAIN}": 0.3}
        right = {name: (rng.random(200) < share) * 1.0 for name, share in shares.items()}
        trace = [CautiousTokens(np.array([1]), np.array([-1.0]), True, (), 1)]
        report = Report(paper=36, scale="quick", seed=0)
        p36.answer_report(report, right, dict.fromkeys(right, 1.0), trace)
        return [claim.verdict for claim in report.claims]

    assert verdicts(0.7) == ["holds"] * 3
    assert verdicts(0.02) == ["fails"] * 3
    assert "undecided" in verdicts(0.3)
