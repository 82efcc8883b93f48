"""`scoredraw train swarm` as a person runs it: refusals, real nodes, and runs that go on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from scoredraw.cli import train_swarm
from scoredraw.cli.live import live_table
from scoredraw.errors import InputError

pytestmark = pytest.mark.contract

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
pytest.importorskip("transformers", reason="the extra language is not installed")

from scoredraw.rl.policy_training import AnswerReward  # noqa: E402
from scoredraw.rl.reward_functions import GuardedReward  # noqa: E402
from scoredraw.rl.rollout_groups import RolloutGroup  # noqa: E402
from scoredraw.rl.swarm_buffer import score_groups  # noqa: E402
from scoredraw.rl.swarm_node import (  # noqa: E402
    NodeRun,
    PatientBuffer,
    Questions,
    SwarmColumns,
    last_checkpoint,
    node_options,
    question_groups,
    train_node,
)
from scoredraw.rl.swarm_transports import InMemory, MemoryHub  # noqa: E402

DEADLINE = 90
ROWS = [{"prompt": f"{a}+{a}=", "answer": str(2 * a), "level": a % 3} for a in range(8)]
REWARDS = """
import os

def letters(completions, level, **columns):
    held, when = (os.environ.get(name, "") for name in ("HELD", "WHEN"))
    if when and os.path.exists(when):
        open(held).close()  # a pipe that nobody writes to
    assert all(value in (0, 1, 2) for value in level)
    return [float(sum(map(ord, text))) for text in completions]

def none_of_bob(group):
    return group.peer != "bob"
"""
SMALL = ("--generations", 4, "--max-tokens", 6, "--local", 2, "--external", 2, "--learning-rate",
         1e-2, "--reward", "swarm_rewards:letters")  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with problems, a module of rewards and a shared folder in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("swarm_rewards.py").write_text(REWARDS)
    for name in ("shared", "empty"):
        Path(name).mkdir()
    yield tmp_path
    sys.modules.pop("swarm_rewards", None)


@pytest.fixture
def start(here: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a node as a process of its own; those that are left at the end are killed."""
    begun: list[subprocess.Popen[str]] = []

    def run(*arguments: object, **more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "scoredraw", "train", "swarm", *map(str, arguments)]
        begun.append(
            subprocess.Popen(
                command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=here,
                env={**os.environ, "PYTHONPATH": str(here), **more},
            )
        )  # fmt: skip
        return begun[-1]

    yield run
    for process in begun:
        process.kill()
        process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def weights(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


# ── real nodes ──────────────────────────────────────────────────────────────────────────────────


def test_two_processes_learn_from_one_another_over_zenoh(
    start, scoredraw, tiny_model, here
) -> None:
    """The other process is this one."""
    pytest.importorskip("zenoh", reason="the swarm extra is not installed")
    place = f"tcp/127.0.0.1:{free_port()}"
    same = ("problems.jsonl", "--model", tiny_model, *SMALL, "--rounds", 3, "--wait", DEADLINE)
    ann = start(*same, "--node", "ann", "-o", "ann", "--listen", place, "--json", "--samples", 2)
    bob = scoredraw("train", "swarm", *same, "--node", "bob", "-o", "bob", "--connect", place)
    facts, lines = ann.communicate(timeout=DEADLINE)
    assert (ann.returncode, bob.code) == (0, 0), lines + bob.err
    assert facts.count("\n") == 1
    found = json.loads(facts)
    assert (found["node"], found["rounds"], found["published"]) == ("ann", 3, 6)
    assert found["taken_of"] == {"bob": found["taken"]}
    assert found["taken"] >= 2
    assert found["taken"] + found["missing"] == 6
    assert set(found["after"]) == {"1", "2"}
    assert "round 3 of 3: reward" in lines
    assert ", taken 2, missing 0, heard " in lines
    assert bob.out.startswith("bob: 3 rounds in ")
    assert " of ann), " in bob.out
    assert "held-out pass@1 " in bob.out
    assert bob.out.endswith(" -> bob/model\n")
    one, other = weights(here / "ann/model"), weights(here / "bob/model")
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_node_is_interrupted_and_goes_on_in_a_folder(start, scoredraw, tiny_model, here) -> None:
    """While ann is away bob waits for her, in his third round."""
    os.mkfifo("held")
    same = ("problems.jsonl", "--model", tiny_model, *SMALL, "--rounds", 4, "--folder", "shared",
            "--save-every", 1, "--held-out", 0, "--wait", DEADLINE)  # fmt: skip
    again = (*same, "--node", "ann", "-o", "ann")
    ann = start(*again, HELD="held", WHEN="ann/checkpoints/round-2.pt")
    bob = start(*same, "--node", "bob", "-o", "bob", "--json")
    assert ann.stderr is not None
    seen = next((line for line in ann.stderr if line.startswith("round 2 of 4")), None)
    assert seen is not None
    ann.send_signal(signal.SIGINT)
    told, errors = ann.communicate(timeout=DEADLINE)
    assert ann.returncode == 130
    assert told == ""
    assert errors.endswith(
        "scoredraw: interrupted; round 2 of 4 is kept in ann, the same command goes on\n"
    )
    kept = torch.load("ann/checkpoints/round-2.pt", weights_only=True)
    done = scoredraw("train", "swarm", *again)
    assert done.code == 0, done.err
    assert "round 3 of 4" in done.err
    assert "round 2 of 4" not in done.err
    facts, errors = bob.communicate(timeout=DEADLINE)
    assert bob.returncode == 0, errors
    assert json.loads(facts)["taken_of"]["ann"] >= 3
    run = json.loads(Path("ann/run.json").read_text())
    assert run["log"][:2] == kept["log"]
    assert len(run["log"]) == 4
    assert run["taken"]["bob"] > kept["taken"]["bob"] > 0
    assert "4 own" in done.out  # what she had sent in her first life
    assert sorted(os.listdir("ann")) == ["model", "run.json", "settings.json"]


# ── refusals ────────────────────────────────────────────────────────────────────────────────────

IN = ("--folder", "shared")
BAD: list[tuple[tuple[object, ...], str]] = [
    ((), "folder: got no --listen, --connect or --folder, want endpoints or a folder"),
    ((*IN, "--listen", "tcp/127.0.0.1:0", "--connect", "tcp/127.0.0.1:1"),
     "folder: got --folder beside --listen and --connect, want endpoints or a folder"),
    (("--listen", "nonsense"), "listen: got 'nonsense', want an endpoint such as tcp/127.0.0.1:7"),
    (("--listen", ""), "listen: got '', want an endpoint"),
    (("--connect", "tcp/127.0.0.1"), "connect: got 'tcp/127.0.0.1', want an endpoint"),
    (("--connect", "tcp/127.0.0.1:1,tcp/127.0.0.1:99999"), "connect: got 'tcp/127.0.0.1:99999', "),
    (("--connect", "pigeon/127.0.0.1:1"), "zenoh: Unicast not supported for pigeon protocol"),
    (("--listen", "tcp/127.0.0.1:0", "--set", "settings={'no/such': 1}"), "zenoh: "),
    (("--listen", "tcp/127.0.0.1:0", "--set", "settings=1"), "settings: got 1, want {"),
    (("--listen", "tcp/127.0.0.1:0", "--set", "block=1"), "block: got 1, want True or False"),
    (("--listen", "tcp/127.0.0.1:0", "--set", "swarm=a/b"), "swarm: got 'a/b', want a name"),
    ((*IN, "--set", "swarm=a"), "swarm: got an option of endpoints, want none beside --folder"),
    (("--folder", "no/such"), "folder: got no/such, want an existing folder that the nodes share"),
    ((*IN, "--node", "a b"), "node: got 'a b', want a name of letters, digits"),
    ((*IN, "--model", "none/such"), "model: got 'none/such', want embedded, or a folder of trans"),
    ((*IN, "--model", "empty"), "model: cannot load 'empty': "),
    ((*IN, "--selection", "best"), "selection: got 'best', want one of nonzero_uniform, uniform"),
    ((*IN, "--reward", "best"), "reward: got 'best', want exact, math or module:function"),
    ((*IN, "--reward", "swarm_rewards:no"), "reward: got 'swarm_rewards:no', want a name that swa"),
    ((*IN, "--verify", "nothing"), "verify: got 'nothing', want 'module:function'"),
    ((*IN, "--generations", 257), "generations: got 257, want 2 to 256 answers a problem"),
    ((*IN, "--learning-rate", 0), "learning_rate: got 0.0, want more than 0"),
    ((*IN, "--columns", "nothing"), "columns: got 'nothing', want one of the columns prompt, ans"),
    ((*IN, "--set", "colour=1"), "colour: got an option that a node does not have, want ttl, max"),
    ((*IN, "--set", "importance_cap=1"), "importance_cap: got an option that a node does not have"),
    ((*IN, "--set", "epochs=0"), "epochs: got 0, want at least 1"),
    ((*IN, "--set", "epochs=1.5"), "epochs: got 1.5, want a whole number"),
    ((*IN, "--set", "ttl=soon"), "ttl: got 'soon', want a number"),
    ((*IN, "--set", "ttl=0"), "ttl: got 0, want seconds, more than 0"),
    ((*IN, "--set", "reuse=1"), "reuse: got 1, want True or False"),
    ((*IN, "--set", "external_weight=-1"), "external_weight: got -1, want 0 or more"),
    ((*IN, "-o", "problems.jsonl"), "out: got problems.jsonl, which is a file, want a folder"),
    ((*IN, "-o", "shared"), "out: got shared, which holds something else, want a new folder"),
    ((*IN, "--rounds", 0), "Invalid value for '--rounds'"),
    ((*IN, "--wait", -1), "Invalid value for '--wait'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_what_is_wrong_is_said_in_a_line(scoredraw, here, tiny_model, arguments, says) -> None:
    if says.startswith("zenoh") or "swarm=a/b" in arguments:
        pytest.importorskip("zenoh", reason="the swarm extra is not installed")
    (here / "shared/other.txt").touch()
    before = sorted(here.rglob("*"))
    asked = ("problems.jsonl", "--node", "ann", "-o", "out", "--model", tiny_model, *arguments)
    done = scoredraw("train", "swarm", *asked)
    assert done.code == 2, done
    assert done.err.startswith(f"scoredraw: {says}"), done.err
    assert done.err.count("\n") == 1, done.err
    assert done.out == ""
    assert [path for path in sorted(here.rglob("*")) if "__pycache__" not in str(path)] == before


def test_a_port_that_is_taken(scoredraw, here, tiny_model) -> None:
    pytest.importorskip("zenoh", reason="the swarm extra is not installed")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place = f"tcp/127.0.0.1:{other.getsockname()[1]}"
        asked = ("problems.jsonl", "--node", "a", "-o", "out", "--model", tiny_model)
        done = scoredraw("train", "swarm", *asked, "--listen", place)
    assert done.code == 2
    assert place in done.err
    assert "in use" in done.err
    assert done.err.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["held_out", "samples", "seed"])
def test_counts_below_zero(node, name) -> None:
    with pytest.raises(InputError, match=f"{name}: got -1, want 0 or more"):
        node("out", **{name: -1})


TABLES: list[tuple[list[dict[str, Any]], str]] = [
    ([{"prompt": "x", "text": "y"}], "problems: got columns prompt, text, want answer, for the re"),
    ([{"prompt": [{"role": "user", "content": "x"}], "answer": "y"}],
     "problems, row 0: prompt: got list, want text"),
    ([{"prompt": "x", "answer": "y", "tests": "z"}, {"prompt": "x", "answer": "y", "tests": ["z"]}],
     "problems, row 1: meta: got other values, want texts, numbers"),
    ([{"prompt": "x", "answer": "y", "solution": "z" * 2000}], "problems, row 0: meta: got"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "says"), TABLES)
def test_problems_that_cannot_be_sent(here, rows, says) -> None:
    with InMemory(MemoryHub()) as alone, pytest.raises(InputError, match=says):
        train_node(rows, here / "out", alone, node="ann")
    assert not (here / "out").exists()


def test_a_swarm_named_by_a_number() -> None:
    pytest.importorskip("zenoh", reason="the swarm extra is not installed")
    ends = {"listen": ["tcp/127.0.0.1:0"], "connect": None}
    train_swarm.joined("ann", ends, None, 600.0, {"swarm": 7, "block": True}).close()


def test_columns_that_stay_at_home() -> None:
    rows = [{"question": "x", "answer": "y", "solution": "z" * 2000, "level": 1}]
    kept = train_swarm.kept_columns(rows, ["level"])
    assert kept == [{"question": "x", "answer": "y", "level": 1}]
    assert train_swarm.kept_columns(rows, None) is rows


# ── the node ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def node(here: Path, tiny_model: str) -> Callable[..., NodeRun]:
    """Runs a node in this process, alone unless it gets a hub."""

    def run(out: str, hub: MemoryHub | None = None, **options: Any) -> NodeRun:
        settings: dict[str, Any] = {
            "node": "ann", "model": tiny_model, "reward": "swarm_rewards:letters", "rounds": 4,
            "local": 3, "external": 2, "generations": 4, "max_tokens": 4, "learning_rate": 1e-2,
            "save_every": 2, "samples": 2,
        }  # fmt: skip
        with InMemory(hub or MemoryHub()) as transport:
            return train_node(ROWS, here / out, transport, **{**settings, **options})

    return run


def test_an_interrupted_node_ends_where_it_would_have(node, here) -> None:
    whole = node("whole")

    def stop(t: int, *_: Any) -> None:
        if t == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        node("cut", progress=stop)
    found = last_checkpoint(here / "cut")
    assert found is not None
    assert found[0] == 2
    seen: list[int] = []
    resumed = node("cut", progress=lambda t, *_: seen.append(t))
    assert seen == [3, 4]
    assert (resumed.log, resumed.before, resumed.after) == (whole.log, whole.before, whole.after)
    assert resumed.counts == whole.counts == {"published": 12}
    want = weights(here / "whole/model")
    for name, value in weights(here / "cut/model").items():
        assert torch.equal(value, want[name]), name
    with pytest.raises(InputError, match="a finished run"):
        node("cut")


def test_a_seed_is_a_nodes_own(node, here) -> None:
    """Two nodes of one seed that wrote the same answers would have nothing to tell each other."""
    node("ann", rounds=1)
    node("ann-again", rounds=1)
    node("bob", rounds=1, node="bob")
    ann, again, bob = (weights(here / name / "model") for name in ("ann", "ann-again", "bob"))
    assert all(torch.equal(ann[name], again[name]) for name in ann)
    assert any(not torch.equal(ann[name], bob[name]) for name in ann)


def test_what_others_say_is_taken_or_dropped_with_a_reason(node) -> None:
    hub = MemoryHub()
    peers = {name: PatientBuffer(InMemory(hub), name) for name in ("bob", "cid")}
    said: list[RolloutGroup] = []

    def chorus(t: int, *_: Any) -> None:
        for peer in peers.values():
            peer.publish([RolloutGroup(f"q{t}", ["a", "b"], "c", {"level": 1}),
                          RolloutGroup(f"odd{t}", ["a", "b"], "c", {"level": 9})])  # fmt: skip
        said.extend(peers["bob"].sample(3, "uniform", lambda completions, **_: [0.0] * len(
            completions)).groups)  # fmt: skip

    run = node("out", hub, progress=chorus, verify="swarm_rewards:none_of_bob", rounds=3)
    assert run.taken == {"cid": 2}
    assert run.counts["unverified"] == 4
    assert run.counts["unscored"] == 2  # the reward wants levels 0, 1 and 2
    assert [row["external"] for row in run.log] == [0, 1, 1]
    assert [row["dropped"] for row in run.log] == [0, 3, 3]
    own = [group for group in said if group.peer == "ann"]
    assert {group.meta["level"] for group in own} <= {0, 1, 2}
    assert {(group.prompt, group.answer) for group in own} <= {
        (row["prompt"], row["answer"]) for row in ROWS
    }


def test_a_groups_reward_reads_the_columns_by_name() -> None:
    exact = SwarmColumns(AnswerReward(), ["prompt", "answer"])
    groups = [RolloutGroup("q", ["", "#2"], ""), RolloutGroup("q", ["#2", "#3"], "2")]
    found = score_groups(groups, GuardedReward(exact))
    assert [r.tolist() for r in found[1:]] == [[1.0, 0.0]]
    assert all(value != value for value in found[0])  # an empty answer scores nothing


def test_every_question_is_asked_as_often() -> None:
    def echo(prompts: Sequence[str], k: int) -> list[list[str]]:
        return [[prompt] * k for prompt in prompts]

    groups = question_groups(ROWS, 2)
    asked = {}
    for words in ((0, 1), (0, 2)):
        questions = Questions(groups, echo, words)
        asked[words] = [group.prompt for _ in range(8) for group in questions(3)]
        for k in range(3):
            assert sorted(asked[words][8 * k : 8 * k + 8]) == sorted(r["prompt"] for r in ROWS)
        again = Questions(groups, echo, words)
        again.asked = 15
        assert [group.prompt for group in again(20)][:9] == asked[words][15:]
    assert asked[(0, 1)] != asked[(0, 2)]
    assert asked[(0, 1)][:8] != asked[(0, 1)][8:16]


def test_patience_ends_and_comes_back() -> None:
    """Each wait takes ten seconds here; in the second and the sixth somebody speaks."""
    hub = MemoryHub()
    bob = PatientBuffer(InMemory(hub), "bob")
    now, waits = [0.0], [0]

    class Slow(InMemory):
        def wait(self, timeout: float) -> bool:
            now[0] += 10.0
            waits[0] += 1
            if waits[0] in (2, 6):
                bob.publish([RolloutGroup(f"q{waits[0]}", ["a", "b"])])
            return True

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(text == "a") for text in completions]

    ann = PatientBuffer(Slow(hub), "ann", patience=30.0, clock=lambda: now[0])
    for wanted, missing, waited, why in (
        (1, 0, 2, "somebody spoke"), (1, 1, 5, "patience is over"), (1, 1, 5, "all have gone"),
    ):  # fmt: skip
        assert ann.sample(wanted, reward_fn=reward).missing == missing, why
        assert waits[0] == waited, why
    bob.publish([RolloutGroup("back", ["a", "b"])])
    assert ann.sample(2, reward_fn=reward).missing == 0
    assert waits[0] == 6
    assert ann.taken == {"bob": 3}


def test_options_go_where_they_belong() -> None:
    found = node_options({"ttl": 9, "reuse": True, "minibatch": None, "clamp": 5})
    assert found == {
        "buffer": {"ttl": 9}, "runner": {"reuse": True}, "policy": {"minibatch": None, "clamp": 5}
    }  # fmt: skip


def test_the_table_shows_rounds_and_reasons(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with live_table("round", train_swarm.COLUMNS) as show:
        for t in range(1, 15):
            counts = Counter(received=9, duplicate=2)
            row = {"reward": t / 8, "missing": 1.0, "heard": 4.0, "dropped": 2.0, "loss": 0.5}
            train_swarm.told(show)(t, 20, row, counts)
    shown = capsys.readouterr().err
    assert "of 20 rounds; dropped: 2 duplicate" in shown
    assert "1.75" in shown
    assert "missing" in shown
    assert "taken" not in shown  # in no round
