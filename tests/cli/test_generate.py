"""`scoredraw generate text` as a person runs it, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scoredraw.endpoint_runs import run
from scoredraw.errors import InputError
from scoredraw.language.text_methods import MethodModel
from scoredraw.models import Completion, TransformersModel
from scoredraw.table_output import provenance

pytestmark = pytest.mark.contract

pytest.importorskip("transformers", reason="the extra language is not installed")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "one", "n": 1}, {"prompt": "two words", "n": 2}, {"prompt": "é", "n": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "n", "more"),
    [
        ("sample", 3, ["--temperature", 0.7, "--top-p", 0.9]),
        ("greedy", 1, []),
        ("hedged", 3, ["--temperature", 0.7]),
        ("cautious", 2, ["--set", "n_max=3"]),
        ("deepening", 2, ["--set", "first_budget=4", "--set", "trigger=wait"]),
        ("watermarked", 2, ["--key", 7, "--set", "scheme=kgw"]),
    ],
)
def test_every_method_writes_samples_that_can_be_chosen_from(
    scoredraw, tiny_model, prompts, tmp_path, method, n, more
) -> None:
    out = tmp_path / "out.jsonl"
    asked = ("generate", "text", prompts, "--model", tiny_model, "-m", method, "-n", n, *more)
    done = scoredraw(*asked, "--max-tokens", 12, "-o", out)
    assert done.code == 0, done.err
    rows = read(out)
    assert [row["problem"] for row in rows] == [p for p in ("one", "two words", "é")
                                               for _ in range(n)]  # fmt: skip
    assert all(row["logprob"] <= 0 and 1 <= row["tokens"] <= 12 for row in rows)
    assert all(len(row["ids"]) == row["tokens"] for row in rows)
    again = tmp_path / "again.jsonl"
    scoredraw(*asked, "--max-tokens", 12, "-o", again)
    assert again.read_bytes() == out.read_bytes()
    chosen = scoredraw("draw", "answers", out, "-m", "sum-logprob")
    assert chosen.code == 0
    if n > 1 and method != "watermarked":
        other = tmp_path / "other.jsonl"
        scoredraw(*asked, "--max-tokens", 12, "--seed", 1, "-o", other)
        assert other.read_bytes() != out.read_bytes()


def test_the_log_goes_on_and_pays_for_nothing_twice(
    scoredraw, tiny_model, prompts, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "out.jsonl"
    asked = ("generate", "text", prompts, "--model", tiny_model, "--max-tokens", 5, "-o", out)
    assert scoredraw(*asked, "-n", 2).code == 0
    first = read(out)
    log = tmp_path / "out.jsonl.log.jsonl"
    assert len(read(log)) == 1 + 6
    assert scoredraw(*asked, "-n", 3).code == 0
    more = read(out)
    assert [row for row in more if row["sample"] < 2] == first
    assert len(read(log)) == 1 + 9

    def fails(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr("scoredraw.models.TransformersModel.sample_all", fails)
    assert scoredraw(*asked, "-n", 3).code == 0
    done = scoredraw(*asked, "-n", 3, "--temperature", 0.5)
    assert done.code == 2
    assert "want temperature 0.5, or another file" in done.err


def test_an_interrupt_says_where_the_samples_are(
    scoredraw, tiny_model, prompts, tmp_path, monkeypatch
) -> None:
    calls: list[int] = []
    whole = TransformersModel.sample_all

    def interrupted(self: Any, *given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(self, *given, **more)

    monkeypatch.setattr(TransformersModel, "sample_all", interrupted)
    out = tmp_path / "out.jsonl"
    asked = ("generate", "text", prompts, "--model", tiny_model, "-n", 32, "--max-tokens", 3)
    done = scoredraw(*asked, "-o", out)
    assert done.code == 130
    assert f"interrupted; what was sampled is in {out}.log.jsonl" in done.err
    assert not out.exists()
    assert len(read(tmp_path / "out.jsonl.log.jsonl")) == 1 + 32
    assert scoredraw(*asked, "-o", out).code == 0
    assert len(read(out)) == 96


def test_a_watermarks_key_stays_out_of_the_files(scoredraw, tiny_model, prompts, tmp_path) -> None:
    out, page = tmp_path / "out.parquet", tmp_path / "page.html"
    asked = ("generate", "text", prompts, "--model", tiny_model, "-m", "watermarked")
    done = scoredraw(*asked, "--key", 987654321, "--max-tokens", 5, "-o", out)
    assert done.code == 0
    log = tmp_path / "out.parquet.log.jsonl"
    assert provenance(out)["command"][8] == "***"
    scoredraw("audit", "watermark", out, "--key=987654321", "--vocab-size", 258, "--report", page)
    for file in (out, log, page):
        assert b"987654321" not in file.read_bytes()
    done = scoredraw(*asked, "--key", 987654322, "--max-tokens", 5, "-o", out)
    assert done.code == 2
    assert "made with key" in done.err


def test_answers_are_read_and_graded(scoredraw, tiny_model, prompts, tmp_path) -> None:
    out = tmp_path / "out.parquet"
    asked = ("generate", "text", prompts, "--model", tiny_model, "-n", 4, "--max-tokens", 30)
    done = scoredraw(*asked, "--answer", "([a-z])", "--truth", "n", "-o", out, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert (facts["samples"], facts["prompts"], facts["correct"]) == (12, 3, 0)
    assert 0 < facts["answered"] <= 12
    assert scoredraw("compare", "answers", out, "--ks", "2,4", "--methods", "majority").code == 0


def test_a_template_makes_prompts_of_columns(scoredraw, tiny_model, prompts, tmp_path) -> None:
    done = scoredraw("generate", "text", prompts, "--model", tiny_model, "--max-tokens", 2,
                     "--template", "{n}: {prompt}")  # fmt: skip
    assert done.code == 0
    assert "── '2: two words', sample 0" in done.out
    assert "sample: 3 samples of 3 prompts" in done.out


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (["--column", "nothing"], "column: got 'nothing', want one of the columns prompt, n"),
        (["--template", "{nothing}"], "template: KeyError('nothing'), want columns in {}"),
        (["--answer", "("], "answer: got '(': missing )"),
        (["--truth", "n"], "truth: got one without --answer, want both"),
        (["--prices", "1"], "prices: got '1', want two numbers"),
        (["-m", "sample", "--set", "h_min=1"], "h_min: got an option that sample does not have"),
        (["-m", "greedy", "-n", 2], "n: got 2, want 1 with greedy"),
        (["--top-p", 2], "top_p: got 2.0, want a share in (0, 1]"),
        (["--model", "http://localhost:1/v1"], "model: got 'http://localhost:1/v1', want URL#NAME"),
        (["--model", "none/such"], "model: cannot load 'none/such'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    scoredraw, tiny_model, prompts, tmp_path, options, wrong
) -> None:
    given = options if "--model" in options else ["--model", tiny_model, *options]
    out = tmp_path / "out.jsonl"
    done = scoredraw("generate", "text", prompts, *given, "--max-tokens", 3, "-o", out)
    assert done.code == 2
    assert wrong in done.err
    assert not out.exists()


class Server:
    """Tells what it was asked for; has no min_p."""

    name, thread_safe = "server", True

    def __init__(self) -> None:
        self.asked: list[tuple[int, float]] = []

    def sample(
        self, prompt: Any, n: int = 1, *, temperature: float = 1.0, seed: int | None = None,
        max_tokens: int | None = None,
    ) -> list[Completion]:  # fmt: skip
        self.asked.append((n, temperature))
        return [Completion(f"{prompt} {temperature} {seed} {j}") for j in range(n)]


def test_a_hedged_pool_is_asked_for_as_a_whole(tmp_path: Path) -> None:
    """One greedy text, and it comes first, also where a pool was cut off or is made larger."""
    server, path = Server(), tmp_path / "log.jsonl"
    sampler = MethodModel(server, "hedged", temperature=0.5)
    made = run(sampler, ["a", "b"], path, n=3, seed=0)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))  # the last pool has its first text only
    again = run(sampler, ["a", "b"], path, n=3, seed=0)
    assert [[c.text for c in pool] for pool in again] == [[c.text for c in pool] for pool in made]
    larger = run(sampler, ["a", "b"], path, n=5, seed=0)
    assert [c.text.split()[1] for c in larger[0]] == ["0.0", "0.5", "0.5", "0.5", "0.5"]
    assert sum(n for n, _ in server.asked) == 6 + 3 + 10


def test_models_with_sample_alone_get_a_seed_for_each_prompt(tmp_path: Path) -> None:
    class Local(Server):
        thread_safe = False

    made = run(MethodModel(Local(), "sample"), ["a", "a"], tmp_path / "log", n=2, seed=0)
    assert made[0][0].text != made[1][0].text


def test_what_a_server_does_not_take_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="min_p: got an option that sample does not have"):
        run(MethodModel(Server(), "sample"), ["a"], tmp_path / "log", min_p=0.1)


def test_methods_that_look_at_tokens_want_a_model_here() -> None:
    with pytest.raises(InputError, match="model: got Server, want a model in this process"):
        MethodModel(Server(), "cautious")
    sampler = MethodModel(Server(), "sample")
    assert sampler.thread_safe
    assert not hasattr(sampler, "sample_all")
    assert len(sampler.sample("p", 2)) == 2
