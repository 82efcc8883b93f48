"""The small policy that ships: its problems, its tokenizer, what it answers, and who judges it."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from scoredraw.metrics import proportion_interval  # noqa: E402
from scoredraw.papers import small_policy as sp  # noqa: E402
from scoredraw.rl.policy_training import open_policy  # noqa: E402

pytestmark = pytest.mark.contract

ANY = "".join(map(chr, range(32, 127))) + "\n"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """As a stranger loads it: by transformers, from the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(sp.FOLDER)
    return model, AutoTokenizer.from_pretrained(sp.FOLDER)


# ── problems ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("part", "each"), [("train", 200), ("test", 100)])
def test_problems_come_in_order_and_in_equal_parts(part: str, each: int) -> None:
    rows = sp.shipped_problems(part)
    families = [row["family"] for row in rows]
    assert families == [family for family in sp.FAMILIES for _ in range(each)]
    for row in rows:
        assert set(row) == {"prompt", "answer", "family", "target"}
        assert row["prompt"].endswith("\n")
        assert len(row["prompt"]) <= sp.LONGEST_PROMPT
        assert set(row["prompt"] + row["target"]) <= set(ANY)
        assert len(row["target"]) < sp.LONGEST_ANSWER
        assert sp.said(row["target"]) == row["answer"]
    assert sp.shipped_problems(part, ["gcd", "chain_sum"]) == [
        row for row in rows if row["family"] in {"gcd", "chain_sum"}
    ]


def test_no_problem_is_there_twice() -> None:
    prompts = [row["prompt"] for part in ("train", "test") for row in sp.shipped_problems(part)]
    assert Counter(prompts).most_common(1)[0][1] == 1


def test_worked_targets_are_right() -> None:
    """All families are judged right by the reward, and each line of a sum by the line scorer."""
    rows = sp.shipped_problems("train") + sp.shipped_problems("test")
    assert all(sp.right_answer([r["target"] for r in rows], [r["answer"] for r in rows]))
    sums = [r for r in rows if r["family"] in {"chain_sum", "basic_arithmetic"}]
    steps = [r["target"].split("\n") for r in sums]
    scores = sp.score_lines([r["prompt"] for r in sums], steps)
    assert all(score == 1 for line in scores for score in line)
    others = [r["target"] for r in rows if r not in sums]
    assert all("\n" not in text and text.startswith("#") for text in others)


def test_problems_are_saved_as_the_same_bytes(tmp_path: Path) -> None:
    parts = {part: sp.shipped_problems(part) for part in ("train", "test")}
    sp.save_problems(tmp_path, parts)
    for part in parts:
        name = f"{part}.jsonl.gz"
        saved, shipped = (folder / name for folder in (tmp_path, sp.FOLDER))
        assert saved.read_bytes()[4:8] == bytes(4)  # no clock
        assert gzip.decompress(saved.read_bytes()) == gzip.decompress(shipped.read_bytes())


def test_problems_that_are_made_anew() -> None:
    pytest.importorskip("reasoning_gym", reason="of the extra `gym`")
    made = sp.split_problems(size=400)
    sizes = {part: Counter(row["family"] for row in rows) for part, rows in made.items()}
    for family in sp.FAMILIES:
        assert sizes["train"][family] <= sp.TRAIN
        assert sizes["test"][family] <= sp.TEST
    prompts = [row["prompt"] for rows in made.values() for row in rows]
    assert len(set(prompts)) == len(prompts)


# ── tokenizer and policy ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("which", ["new", "shipped"])
def test_the_tokenizer_keeps_every_character(which: str, loaded: tuple[Any, Any]) -> None:
    tokenizer = sp.new_tokenizer() if which == "new" else loaded[1]
    ids = tokenizer(ANY)["input_ids"]
    assert ids == list(range(3, 3 + len(ANY)))
    assert tokenizer.decode(ids) == ANY
    for text in ("a , b .\n\n  c 's", " \n", "<pad", "it 's ?"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("é\t")["input_ids"] == [tokenizer.unk_token_id] * 2
    both = tokenizer(["1", "12+"], padding=True)["input_ids"]
    assert both[0][:2] == [tokenizer.pad_token_id] * 2
    assert tokenizer.decode(both[0], skip_special_tokens=True) == "1"


def test_a_tokenizer_of_other_letters() -> None:
    tokenizer = sp.new_tokenizer("ab")
    assert len(tokenizer) == 5
    assert tokenizer("bac")["input_ids"] == [4, 3, tokenizer.unk_token_id]


def test_the_shipped_policy_is_what_is_said(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    assert type(model) is type(sp.new_policy(tokenizer))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.9e6, rel=0.02)
    assert model.config.vocab_size == len(tokenizer) == 99
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ours, _ = sp.small_policy()
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    for name, value in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value.float())


def test_sampled_accuracy_is_what_the_read_me_says() -> None:
    """46 % of all 900; here of 100, every ninth: Wilson's 99.9 % interval, 16 points to each side.

    One choice of seed and problems in a thousand would fail if 0.46 were exact.
    """
    rows = sp.shipped_problems("test")[4::9]
    answers = [row["answer"] for row in rows]
    texts = sp.sample_answers(*sp.small_policy(), [row["prompt"] for row in rows], seed=0)
    right = sp.right_answer(texts, answers)
    assert len(right) == 100
    found = proportion_interval(int(sum(right)), 100, level=0.999)
    assert found.low <= 0.46 <= found.high
    again = sp.sample_answers(*sp.small_policy(), [row["prompt"] for row in rows[:5]], seed=0)
    assert again == sp.sample_answers(*sp.small_policy(), [r["prompt"] for r in rows[:5]], seed=0)


def test_padding_on_the_left_changes_no_prediction(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = sp.small_policy()
    prompts = [row["prompt"] for row in sp.shipped_problems("test", ["gcd"])[:4]]
    batch = sp.sample_answers(model, tokenizer, [*prompts, "x" * 100 + "\n"], do_sample=False)
    alone = [sp.sample_answers(model, tokenizer, [p], do_sample=False)[0] for p in prompts]
    assert batch[:4] == alone


def test_a_few_steps_of_sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `train` leaves is loaded as what ships; the loss falls."""
    monkeypatch.setattr(sp, "BATCH", 4)
    few = sp.shipped_problems("test")[::100]
    history = sp.train(tmp_path, few, few, steps=4, every=2, level=1.1)
    assert [row["step"] for row in history] == [2, 4]
    assert history[1]["loss"] < history[0]["loss"]
    assert {"all", "seconds", *sp.FAMILIES} <= set(history[0])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float16
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 99


# ── who judges ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("#3", 1.0),
        ("4-1=3\n#3", 1.0),
        ("#4#3", 1.0),
        ("# 3 ", 1.0),
        ("3", 0.0),  # no answer is given
        ("#", 0.0),
        ("#33", 0.0),
        ("#3#", 0.0),
        ("", 0.0),
    ],
)
def test_right_answer(text: str, right: float) -> None:
    assert sp.right_answer([text], ["3"]) == [right]
    said = [{"role": "user", "content": "#3"}, {"role": "assistant", "content": text}]
    assert sp.right_answer([said], ["3"], prompts=["?"], completion_ids=[[1]]) == [right]


def test_answers_and_completions_are_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        sp.right_answer(["#3"], ["3", "4"])


@pytest.mark.parametrize(
    ("steps", "scores"),
    [
        (["4-1=3", "3+2=6", "#6"], [1, -1, 1]),
        (["4-1=3", "3+2=5", "#6"], [1, 1, -1]),
        (["-4+1=-3", "-3-2=-5", "#-5"], [1, 1, 1]),
        ([" 4-1=3 "], [1]),
        (["#6"], [None]),
        (["4-1=3", "so what", "", "#3"], [1, None, None, 1]),
        (["4*2=8", "4--1=5", "4-1=", "4-1=3=3"], [None] * 4),
        ([], []),
    ],
)
def test_score_lines(steps: list[str], scores: list[float | None]) -> None:
    assert sp.score_lines(["?"], [steps]) == [scores]


def test_score_lines_of_a_batch() -> None:
    found = sp.score_lines(["?", "?"], [["1+1=2"], ["1+1=3", "#3"]], answer=["2", "2"])
    assert found == [[1.0], [-1.0, 1.0]]


def test_further_training_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCOREDRAW_CACHE", str(tmp_path))
    rows = [{"prompt": f"{i}?\n", "target": "#yes"} for i in range(8)]
    folder = sp.fine_tuned(rows, steps=12, batch=8, learning_rate=3e-3)
    assert list(tmp_path.iterdir()) == [folder]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert sp.fine_tuned(rows, steps=12, batch=8, learning_rate=3e-3) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    net, tokenizer = open_policy(str(folder))
    assert set(sp.sample_answers(net, tokenizer, ["3?\n", "5?\n"], do_sample=False)) == {"#yes"}
    assert tokenizer.padding_side == "left"
    other = sp.fine_tuned(rows, steps=1, batch=8)
    further = sp.fine_tuned(rows, source=str(folder), steps=1, batch=8)  # of what was made before
    assert len({folder, other, further}) == 3
    texts = sp.sample_answers(*open_policy(str(further)), ["3?\n"], do_sample=False)
    assert texts == ["#yes"]
