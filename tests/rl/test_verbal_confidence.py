"""Reading answers with confidences: the gate against its regular expression, odd numbers, votes."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.answers import group_answers
from scoredraw.errors import InputError
from scoredraw.rl.verbal_confidence import (
    FORMATS,
    VOTES,
    answer_probability,
    confidence_ensemble,
    confidence_vote,
    exact_match,
    find_verifier,
    has_format,
    logged_confidence,
    math_match,
    normalize_answer,
    probability_or_none,
    read_stated,
    tagged,
    up_to_answer,
    verifiers_by_source,
    vote_in_rows,
)

pytestmark = pytest.mark.property

TAGS = ["think", "answer", "analysis", "confidence"]
PIECES = [f"{mark}{tag}>" for tag in TAGS for mark in ("<", "</")] + [" ", "\n", "x", "0.5"]
TABC = "so </think> <answer>{}</answer> <analysis>a</analysis> <confidence>{}</confidence>"


def by_expression(text: str, format: str) -> bool:
    """The gate as one expression with lazy groups, which can take very long."""
    blocks = "".join(rf"\s*<{tag}>.*?</{tag}>" for tag in FORMATS[format])
    return re.match(rf".*?</think>{blocks}\s*\Z", text, re.DOTALL) is not None


# ── the gate ────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.sampled_from(PIECES), max_size=14), st.sampled_from(list(FORMATS)))
@settings(max_examples=400)
def test_any_text_against_the_expression(pieces: list[str], format: str) -> None:
    text = "".join(pieces)
    assert has_format(text, format) == by_expression(text, format)


@given(st.data(), st.sampled_from(list(FORMATS)))
@settings(max_examples=400)
def test_nearly_right_texts_against_the_expression(data: st.DataObject, format: str) -> None:
    """A right text with up to two pieces put in or taken out, so that both outcomes are common."""
    pieces = ["x", "</think>"]
    for tag in FORMATS[format]:
        pieces += [" ", f"<{tag}>", "0.5", f"</{tag}>"]
    for _ in range(data.draw(st.integers(0, 2))):
        place = data.draw(st.integers(0, len(pieces)))
        new = data.draw(st.sampled_from([*PIECES, ""]))
        pieces[place : place + (new == "")] = [new] if new else []
    text = "".join(pieces)
    assert has_format(text, format) == by_expression(text, format)
    assert has_format(text, format, strict_tags=True) <= has_format(text, format)


@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_tags_as_the_lazy_expression_finds_them(pieces: list[str]) -> None:
    text = "".join(pieces)
    for tag in TAGS:
        assert tagged(text, tag) == re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)


def test_a_text_that_repeats_itself_takes_no_time() -> None:
    """With one expression this is a matter of hours: the lazy groups try all pairs of tags."""
    text = "</think><answer>x</answer><analysis>x</analysis><confidence>" * 2000
    start = time.process_time()
    assert not has_format(text, "tabc")
    assert has_format(text + "0.5</confidence>", "tabc")
    assert time.process_time() - start < 2


@pytest.mark.parametrize("tag", ["answer", "analysis", "confidence"])
def test_repeated_tags(tag: str) -> None:
    """The last one counts; where tags are strict, the gate is closed."""
    text = TABC.format("Rome", "0.5")
    again = text.replace(f"<{tag}>", f"<{tag}>0.1</{tag}><{tag}>")
    assert read_stated(again) == read_stated(text) == ("Rome", 0.5, True)
    assert not read_stated(again, strict_tags=True).well_formed
    assert read_stated("<think>" + text, strict_tags=True).well_formed
    assert not read_stated("<think></think>" + text, strict_tags=True).well_formed


@pytest.mark.parametrize("said", ["nan", "inf", "-inf", "-0.1", "1.0001", "90%", "", "high", "90"])
def test_no_confidence_no_gate(said: str) -> None:
    """As published, "nan" opens the gate and makes the reward NaN."""
    found = read_stated(TABC.format("Rome", said))
    assert found == ("Rome", None, False)


@pytest.mark.parametrize(("said", "value"), [("90%", 0.9), ("90", 0.9), (" 0.9 ", 0.9), ("1", 1.0)])
def test_per_cent(said: str, value: float) -> None:
    found = read_stated(TABC.format("Rome", said), percent=True)
    assert (found.answer, found.well_formed) == ("Rome", True)
    assert found.confidence == pytest.approx(value)
    for bad in ("nan%", "101", "-1%", "%"):
        assert probability_or_none(bad, percent=True) is None


def test_what_is_logged_whatever_the_gate_says() -> None:
    says = {"0.4": 0.4, "1.3": 1.0, "-2": 0.0, "inf": 1.0, "nan": 0.0, "high": 0.0}
    for said, value in says.items():
        assert logged_confidence(f"<confidence>{said}</confidence>") == value
    assert logged_confidence("no tags") == 0


def test_unknown_names() -> None:
    for call in (
        lambda: read_stated("x", "abc"), lambda: find_verifier("fuzzy"),
        lambda: verifiers_by_source({}),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"format|verifier"):
            call()


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


def test_the_words_of_an_answer() -> None:
    assert normalize_answer("An  apple, the\tbest-of a\nday") == "apple bestof day"
    assert exact_match("1,000", 1000)
    assert not exact_match("an Atheist", "a theist")
    assert exact_match("A", "a")
    assert not any(exact_match(said, "A") for said in ("", "the", ".", "B"))


def test_mathematics() -> None:
    pytest.importorskip("math_verify", reason="math-verify is an optional extra")
    assert math_match("0.5", r"\frac{1}{2}")
    assert not math_match("0.51", r"\frac{1}{2}")
    assert not math_match("", "7")


@given(
    st.text("<answer/> x", max_size=20), st.integers(1, 5), st.text("xy", min_size=1, max_size=9)
)
def test_probability_of_the_answer_however_it_is_cut(before: str, width: int, answer: str) -> None:
    """Each token that shares a character with the last answer counts."""
    text = f"{before}<answer>no</answer><answer>{answer}</answer>."
    tokens = [text[i : i + width] for i in range(0, len(text), width)]
    p = np.linspace(0.1, 0.9, len(tokens))
    of_character = np.arange(len(text)) // width
    start = len(text) - len("</answer>.") - len(answer)
    want = p[np.unique(of_character[start : start + len(answer)])].mean()
    assert answer_probability(tokens, np.log(p)) == pytest.approx(want)


def test_probability_of_no_answer() -> None:
    assert answer_probability(["no", " tags"], [-1.0, -1.0]) == 0.5
    assert answer_probability([], []) == 0.5
    for odd in ([0.1, -1.0], [math.nan, -1.0], [-1.0]):
        with pytest.raises(InputError, match="logprobs"):
            answer_probability(["a", "b"], odd)


# ── votes ───────────────────────────────────────────────────────────────────────────────────────


def by_hand(answers: list[Any], q: list[float], how: str) -> tuple[Any, int]:
    """The answer and its sample, in plain Python; sums in hundredths, so that ties are ties."""
    weights = [0 if math.isnan(x) else round(100 * x) for x in q]
    real = [i for i, answer in enumerate(answers) if answer is not None]
    if how == "max":
        stated = [i for i in real if not math.isnan(q[i])]
        best = max(stated, key=weights.__getitem__, default=-1)
    else:
        scores = dict.fromkeys((answers[i] for i in real), 0)
        for i in real:
            scores[answers[i]] += weights[i] if how == "weighted" else 1
        best = answers.index(max(scores, key=scores.__getitem__)) if scores else -1
    return (answers[best], best) if best >= 0 else (None, -1)


votes = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", None]), st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0, math.nan])
    ),
    min_size=1, max_size=8,
)  # fmt: skip


@given(votes, st.sampled_from(VOTES))
def test_votes_by_hand(samples: list[tuple[Any, float]], how: str) -> None:
    answers, q = ([each[side] for each in samples] for side in (0, 1))
    vote = confidence_vote(answers, q, how)
    assert vote[:2] == by_hand(answers, q, how)
    assert vote.answers == tuple(dict.fromkeys(a for a in answers if a is not None))
    assert len(vote.scores) == len(vote.answers)


def test_ties_go_to_the_first_seen() -> None:
    """0.1 + 0.2 is not 0.3 in floating point, but it is a tie."""
    assert confidence_vote(["a", "b", "b"], [0.3, 0.1, 0.2], "weighted").answer == "a"
    assert confidence_vote(["b", "a", "a", "b"], [1, 1, 1, 1], "majority").answer == "b"
    assert confidence_vote(["b", "a"], [0.7, 0.7]).answer == "b"
    assert confidence_vote([None, None], [0.7, 0.7])[:2] == (None, -1)
    assert confidence_vote(["b", "a"], [math.nan, math.nan])[:2] == (None, -1)
    assert confidence_vote(["b", "a"], [math.nan, math.nan], "weighted").answer == "b"


def test_rows_are_problems() -> None:
    rng = np.random.default_rng(5)
    answers, q = rng.integers(0, 3, (50, 7)), rng.random((50, 7)).round(1)
    codes = group_answers(answers)
    for how in VOTES:
        found = vote_in_rows(codes, q, how)
        each = [confidence_vote(a.tolist(), x, how).sample for a, x in zip(answers, q, strict=True)]
        assert found.tolist() == each


@pytest.mark.parametrize(
    ("answers", "q", "how", "named"),
    [([], [], "max", "answers"), (["a"], [0.5, 0.5], "max", "confidences"),
     (["a"], [1.5], "max", "confidences"), (["a"], [0.5], "median", "how")],
)  # fmt: skip
def test_votes_refuse(answers: list[str], q: list[float], how: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        confidence_vote(answers, q, how)


def test_fresh_analyses_of_the_same_answer() -> None:
    asked: list[str] = []

    def more(text: str, k: int) -> list[str]:
        asked.append(text)
        return [f" <confidence>{q}</confidence>" for q in ("0.2", "high", "0.6")][:k]

    texts = [TABC.format("Rome", "1"), "no tags", "</think><answer>x</answer>"]
    found = confidence_ensemble(["p1 ", "p2 ", "p3 "], texts, more, k=3)
    assert found == pytest.approx([0.4, math.nan, 0.4], nan_ok=True)
    assert asked == ["p1 so </think> <answer>Rome</answer>", "p3 </think><answer>x</answer>"]
    assert up_to_answer("no tags") is None
    nothing = confidence_ensemble(["p"], texts[:1], lambda text, k: ["?"] * k)
    assert np.isnan(nothing).all()
    right: dict[str, Any] = {"prompts": ["p"], "completions": texts[:1], "continue_text": more}
    wrong: list[dict[str, Any]] = [
        {"k": 0}, {"continue_text": lambda text, k: []}, {"prompts": ["p", "q"]}
    ]  # fmt: skip
    for option in wrong:
        with pytest.raises(InputError, match=next(iter(option))):
            confidence_ensemble(**{**right, "k": 2, **option})
