"""`scoredraw audit watermark` as a person runs it, on texts of a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.contract

pytest.importorskip("transformers", reason="the extra language is not installed")

KEY = ["--scheme", "kgw", "--key", 42]


@pytest.fixture(scope="module")
def texts(tiny_model, tmp_path_factory) -> Path:
    """Five watermarked texts, with their ids."""
    from scoredraw.language.text_methods import MethodModel
    from scoredraw.open_models import open_model

    sampler = MethodModel(open_model(tiny_model), "watermarked", scheme="kgw", key=42, delta=6.0)
    made = sampler.sample("one", 5, max_tokens=150, temperature=4.0, seed=0)
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [{"text": one.text, "ids": list(one.tokens)} for one in made]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_texts_with_the_key_are_found_and_others_are_not(scoredraw, texts, tmp_path) -> None:
    page = tmp_path / "page.html"
    asked = ("audit", "watermark", texts, "--vocab-size", 258)
    done = scoredraw(*asked, *KEY, "--report", page)
    assert done.code == 0, done.err
    assert "5 of 5 texts bear the watermark (kgw" in done.out
    assert "pile up on the left" in page.read_text()
    other = json.loads(scoredraw(*asked, "--scheme", "kgw", "--key", 43, "--json").out)
    assert other["detected"]["holm"] == 0
    assert "watermarked" not in {text["verdict"] for text in other["texts"]}


def test_a_model_says_the_width_and_reads_texts(scoredraw, texts, tiny_model) -> None:
    asked = ("audit", "watermark", texts, *KEY, "--json", "--model", tiny_model)
    assert json.loads(scoredraw(*asked).out)["detected"]["holm"] == 5
    read = json.loads(scoredraw(*asked, "--column", "text").out)
    assert len(read["texts"]) == 5  # random bytes come back as other tokens


def test_short_texts_are_said_to_be_short(scoredraw, tmp_path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text('{"ids": [1, 2, 3]}\n{"ids": []}\n{"ids": [5]}\n')
    done = scoredraw("audit", "watermark", path, *KEY, "--vocab-size", 258)
    assert done.code == 0, done.err
    assert "0 of 3 texts" in done.out
    assert "3 have fewer than the" in done.out


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ([], "vocab_size: got None, want the width of the model's logits"),
        (["--column", "text"], "model: got none, want --model, whose tokenizer reads them"),
        (["--column", "none"], "column: got 'none', want one of the columns text, ids"),
        (["--vocab-size", 258, "--alpha", 1], "alpha: got 1.0, want a level between 0 and 1"),
        (["--vocab-size", 258, "--scheme", "x"], "scheme: got 'x', want one of kgw, gumbel"),
        (["--vocab-size", 4], "ids"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(scoredraw, texts, options, wrong) -> None:
    done = scoredraw("audit", "watermark", texts, *options)
    assert done.code == 2
    assert wrong in done.err
    assert done.err.count("\n") == 1
