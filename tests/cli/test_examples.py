"""`draw examples` and `score examples` of every kind of input, as a person runs them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from typer.testing import CliRunner

from scoredraw import registry
from scoredraw.cli import app
from scoredraw.errors import InputError, StoppedError

pytestmark = pytest.mark.contract

TEXTS = [f"example number {i} says {'so ' * (i % 5)}" for i in range(30)] + ["", "", "x" * 10_000]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Labelled examples, ratings with lengths, texts and preference pairs."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    labels = np.array(["no", "yes"])[(x[:, 0] > 0).astype(int)]
    columns = {name: x[:, i] for i, name in enumerate("abc")}
    pa.csv.write_csv(pa.table(columns | {"label": labels}), "labelled.csv")
    lengths = rng.integers(10, 100, 200)
    ratings = {f"rating{i}": x[:, i % 3] + rng.normal(size=200) for i in range(5)} | {
        "tokens": lengths
    }
    pa.csv.write_csv(pa.table(ratings), "ratings.csv")
    with Path("texts.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    with Path("pairs.jsonl").open("w") as file:
        for i in range(6):
            pair = {"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": " no" * (i + 1)}
            file.write(json.dumps(pair) + "\n")
    return tmp_path


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def drawn(*arguments: str) -> dict[str, list[Any]]:
    done = invoke("draw", "examples", *arguments, "-o", "kept.parquet")
    assert done.exit_code == 0, done.output
    import pyarrow.parquet as pq

    kept: dict[str, list[Any]] = pq.read_table("kept.parquet").to_pydict()
    del kept["_score"]  # NaN where a method has none
    return kept


METHODS = ["k-center", "facility-location", "herding", "uncertainty", "add-one-in", "dealrec",
           "ccs", "odis-probe", "quad"]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_labelled_examples(here: Path, method: str) -> None:
    kept = drawn("labelled.csv", "--target", "label", "--method", method, "--size", "10%")
    assert len(kept["_row"]) == len(set(kept["_row"])) == 20
    assert set(kept["_weight"]) == {1.0}
    again = drawn("labelled.csv", "--target", "label", "--method", method, "--size", "10%")
    assert again == kept


def test_help_names_every_method() -> None:
    shown = " ".join(invoke("draw", "examples", "-h").stdout.split())
    for method in registry.methods("examples"):
        assert f" {method.name}" in shown


def test_scores_of_methods_that_draw_themselves(here: Path) -> None:
    for method in ("dealrec", "add-one-in", "uncertainty"):
        done = invoke("score", "examples", "labelled.csv", "--target", "label", "--method", method,
                      "-o", "scores.csv")  # fmt: skip
        assert done.exit_code == 0, done.output
        assert len(pa.csv.read_csv("scores.csv")) == 200


def test_options_of_a_method(here: Path) -> None:
    base = ("labelled.csv", "--target", "label", "--method", "add-one-in", "--size", "20")
    assert drawn(*base) != drawn(*base, "--set", "balance=0.9", "--set", "candidate-window=20")


def test_ratings_and_a_budget_of_tokens(here: Path) -> None:
    columns = ("--columns", "rating0,rating1,rating2,rating3,rating4")
    kept = drawn("ratings.csv", "--method", "odis", *columns, "--size", "20")
    assert len(kept["_row"]) == 20
    spent = drawn("ratings.csv", "--method", "odis", *columns, "--cost", "tokens",
                  "--budget", "1000")["tokens"]  # fmt: skip
    assert 1000 <= sum(spent) < 1000 + 4 * 100  # each share overshoots by less than a document


def test_ratings_measured_on_texts(here: Path) -> None:
    assert (
        len(drawn("texts.jsonl", "--text", "text", "--method", "odis", "--size", "8")["text"]) == 8
    )


def test_a_language_model_grows_a_set_and_resumes(here: Path, tiny_model: str) -> None:
    asked = ("texts.jsonl", "--text", "text", "--method", "add-one-in-llm", "--model", tiny_model,
             "--size", "6", "--set", "max_chars=40", "--log", "log.jsonl")  # fmt: skip
    kept = drawn(*asked)
    assert len(kept["_row"]) == 6
    lines = Path("log.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 3  # a heading; three texts were drawn, three chosen
    Path("log.jsonl").write_text("\n".join(lines[:3]) + "\n")
    assert drawn(*asked) == kept
    assert Path("log.jsonl").read_text().splitlines() == lines


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A chat-completions server and what it says next: a reply, or a status."""
    says = ["[[A]]"]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            reply = says[0]
            message = {"role": "assistant", "content": reply}
            body = json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
            self.send_response(int(reply) if reply.isdecimal() else 200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1#tiny", says
        http.shutdown()


def test_a_server_chooses(here: Path, server: tuple[str, list[str]]) -> None:
    pytest.importorskip("openai")
    kept = drawn("texts.jsonl", "--text", "text", "--method", "add-one-in-llm",
                 "--model", server[0], "--size", "6")  # fmt: skip
    assert len(kept["_row"]) == 6


@pytest.mark.parametrize("says", ["none of them is good", "404"])
def test_a_server_of_no_use_stops_the_work_and_keeps_the_log(
    here: Path, server: tuple[str, list[str]], says: str
) -> None:
    pytest.importorskip("openai")
    url, script = server
    script[0] = says
    done = invoke("draw", "examples", "texts.jsonl", "--text", "text", "--size", "6",
                  "--model", url, "--method", "add-one-in-llm", "--log", "log.jsonl",
                  "-o", "kept.csv")  # fmt: skip
    assert isinstance(done.exception, StoppedError), done.output
    assert "\n" not in str(done.exception)
    assert Path("log.jsonl").exists()
    assert not Path("kept.csv").exists()


def test_preference_pairs(here: Path, tiny_model: str) -> None:
    done = invoke("score", "examples", "pairs.jsonl", "--method", "ches", "--model", tiny_model,
                  "-o", "scores.csv")  # fmt: skip
    assert done.exit_code == 0, done.output
    scores = np.array(pa.csv.read_csv("scores.csv")["_score"])
    kept = drawn("pairs.jsonl", "--method", "ches", "--model", tiny_model, "--size", "2")
    assert set(kept["_row"]) == set(np.argsort(scores)[:2])  # what displaces least is kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("labelled.csv", "--method", "quad"), "target: got none"),
        (("labelled.csv", "--method", "odis", "--target", "label"), "target: got 'label', want n"),
        (("labelled.csv", "--method", "odis", "--columns", "a"), "columns: got 1 numeric columns"),
        (("texts.jsonl", "--method", "add-one-in-llm"), "text: got none"),
        (("texts.jsonl", "--method", "add-one-in-llm", "--text", "no"), "text: got 'no'"),
        (("texts.jsonl", "--method", "add-one-in-llm", "--text", "text", "--model", "http://x"),
         "model: got 'http://x', want URL#NAME"),
        (("texts.jsonl", "--method", "add-one-in-llm", "--text", "text", "--model", "nowhere"),
         "model: cannot load 'nowhere'"),
        (("texts.jsonl", "--method", "ches"), "columns: got 'prompt'"),
        (("pairs.jsonl", "--method", "ches", "--columns", "prompt"), "columns: got 1 n"),
        (("labelled.csv", "--target", "label", "--method", "quad", "--scheme", "poisson"),
         "scheme: got one, want none: quad makes the whole draw itself"),
        (("labelled.csv", "--target", "label", "--method", "quad", "--by", "label"),
         "by: got one, want none"),
        (("labelled.csv", "--target", "label", "--method", "quad", "--set", "beta=1"),
         "beta: got an option that quad does not have, want clusters, alpha"),
        (("labelled.csv", "--target", "label", "--method", "quad", "--set", "alpha"),
         "set: got 'alpha', want NAME=VALUE"),
        (("labelled.csv", "--target", "label", "--method", "quad", "--set", "alpha=-1"),
         "alpha: got -1"),
        (("labelled.csv", "--target", "label", "--method", "dealrec", "--set", "hard_prune=1"),
         "hard_prune: got 1"),
    ],
)  # fmt: skip
def test_what_makes_no_sense(here: Path, arguments: tuple[str, ...], message: str) -> None:
    before = sorted(here.iterdir())
    done = invoke("draw", "examples", *arguments, "--size", "6", "-o", "kept.csv")
    assert isinstance(done.exception, InputError), (done.output, done.exception)
    assert str(done.exception).startswith(message)
    assert "\n" not in str(done.exception)
    assert sorted(here.iterdir()) == before
