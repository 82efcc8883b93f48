"""`train policy` and `audit proxy`: what they print, write, resume and refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.contract

Run = Callable[..., Any]

QUICK = [
    "--steps",
    "2",
    "--prompts",
    "2",
    "--generations",
    "4",
    "--held-out",
    "2",
    "--samples",
    "2",
]


def test_trains_the_embedded_policy(scoredraw: Run, tmp_path: Path) -> None:
    out, page = tmp_path / "run", tmp_path / "page.html"
    done = scoredraw(
        "train", "policy", "embedded:chain_sum", "--method", "ngrpo", "-o", str(out), *QUICK,
        "--report", str(page), "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["method"] == "ngrpo"
    assert facts["steps"] == 2
    assert set(facts["after"]) == {"1", "2"}
    assert (out / "model" / "model.safetensors").is_file()
    assert "dead groups" in page.read_text()
    assert "<dd>scoredraw train policy embedded:chain_sum --method ngrpo" in page.read_text()


@pytest.mark.parametrize("method", ["grpo", "tempo", "pure", "psr", "win-rate", "score", "dapo"])
def test_every_method_takes_a_step(scoredraw: Run, tmp_path: Path, method: str) -> None:
    done = scoredraw(
        "train", "policy", "embedded:chain_sum", "--method", method, "-o", str(tmp_path / "run"),
        *QUICK, "--held-out", "0",
    )  # fmt: skip
    assert f"{method}: 2 steps" in done.out
    assert "dead groups" in done.err
    assert ("batches sampled" in done.err) == (method == "dapo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embedded", "--method", "best"], "method: got 'best'"),
        (["embedded:sums"], "problems: got 'sums'"),
        (["embedded", "--reward", "best"], "reward: got 'best'"),
        (["embedded", "--model", "."], "model: cannot load '.'"),
        (["embedded", "--method", "tempo", "--set", "lam=2"], "lam: got 2"),
        (["missing.jsonl"], "missing.jsonl"),
        (["embedded", "--report", "nowhere/page.html"], "report: "),
    ],
)
def test_refusals(scoredraw: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    out = tmp_path / "run"
    done = scoredraw("train", "policy", *arguments, "-o", str(out), *QUICK)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not out.exists()


def test_a_reward_in_a_module_of_the_users(
    scoredraw: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found where the command is given; another option or other problems make another run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards_of_mine.py").write_text(
        "def brief(completions, **columns):\n    return [-float(len(c)) for c in completions]\n"
    )
    command = ["train", "policy", "embedded:gcd", "--reward", "rewards_of_mine:brief", "-o", "run"]
    done = scoredraw(*command, *QUICK, "--held-out", "0", "--method", "ngrpo", "--set",
                     "max_reward=9")  # fmt: skip
    assert done.code == 0, done.err
    (tmp_path / "run" / "run.json").unlink()
    again = scoredraw(*command, *QUICK, "--held-out", "0", "--method", "ngrpo", "--set",
                      "max_reward=8")  # fmt: skip
    assert "a run with other method, want another folder" in again.err
    moved = ["train", "policy", "embedded:lcm", *command[3:], *QUICK, "--held-out", "0"]
    assert "problems_crc32" in scoredraw(*moved, "--method", "ngrpo", "--set", "max_reward=9").err


def test_an_interrupt_is_said_and_resumed(tmp_path: Path) -> None:
    """Stopped at its first line of progress, the run goes on from its checkpoint."""
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "scoredraw", "train", "policy", "embedded:chain_sum", "-o", str(out),
        *QUICK, "--steps", "10", "--held-out", "0", "--save-every", "1",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith("step 3 of 10"):
                process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert "the same command goes on" in seen[-1]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "step 2 of 10" not in done.stderr
    assert "step 10 of 10" in done.stderr
    assert (out / "model").is_dir()


@pytest.fixture
def rollouts(tmp_path: Path) -> Path:
    """Forty problems of eight answers: a proxy, whether they are right, a stated confidence."""
    rng = np.random.default_rng(0)
    rows = []
    for problem in range(40):
        for _ in range(8):
            right = int(rng.random() < 0.5)
            proxy = right + rng.normal(0, 0.5)
            sure = float(np.clip(0.5 + 0.3 * (right - 0.5) + rng.normal(0, 0.1), 0, 1))
            rows.append(
                {"problem": f"p{problem}", "rm": proxy, "passed": right, "confidence": sure}
            )
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_audit_proxy(scoredraw: Run, rollouts: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    columns = ["--columns", "proxy=rm,true=passed", "--margin", "0.5"]
    said = scoredraw("audit", "proxy", str(rollouts), *columns, "--report", str(page)).out
    assert "correlates with the true reward" in said
    assert "Differences within a group" in said
    assert "Stated confidence" in said
    assert "Reliability" in page.read_text()
    facts = json.loads(scoredraw("audit", "proxy", str(rollouts), *columns, "--json").out)
    assert facts["proxy"]["correlated"] is True
    assert 0.6 < facts["proxy"]["r"]["value"] < 0.85
    assert facts["proxy"]["episodes"] == 40
    assert facts["calibration"]["auroc"] > 0.9
    assert facts["score_gaps"]["groups"] == 40


def test_audit_proxy_of_what_is_there(scoredraw: Run, rollouts: Path, tmp_path: Path) -> None:
    said = scoredraw("audit", "proxy", str(rollouts), "--columns", "true=passed").out
    assert said.startswith("Stated confidence averages")
    holes = tmp_path / "holes.jsonl"
    holes.write_text(
        '{"proxy": 1, "true": 1}\n{"proxy": null, "true": 0}\n{"proxy": 0, "true": 0}\n'
    )
    assert "1 rows without" in scoredraw("audit", "proxy", str(holes)).out


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ('{"text": "x"}\n', [], "input: got columns text"),
        ('{"proxy": 1, "true": 1}\n', ["--columns", "gold=true"], "columns: got gold"),
        ('{"proxy": 1, "true": 1}\n', ["--columns", "true=gold"], "columns: got 'gold'"),
        (
            '{"proxy": 1, "true": 1}\n{"proxy": 1, "true": 0}\n',
            [],
            "proxy: got one that is constant",
        ),
        ('{"proxy": null, "true": 1}\n', [], "input: got no row"),
        ('{"proxy": "a", "true": 1}\n', [], "columns: got 'a' in proxy"),
        ('{"confidence": 1.5, "true": 1}\n', [], "confidence: got 1.5"),
    ],
)
def test_audit_proxy_refuses(
    scoredraw: Run, tmp_path: Path, text: str, arguments: list[str], message: str
) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text(text)
    done = scoredraw("audit", "proxy", str(path), *arguments)
    assert done.code == 2
    assert message in done.err
