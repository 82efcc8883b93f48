"""The experiment of paper 25 runs end to end, and its parts do what their names say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from scoredraw.data_selection import preference_pairs as pp  # noqa: E402
from scoredraw.journal import Journal  # noqa: E402
from scoredraw.papers import p25_ches as p25  # noqa: E402
from scoredraw.papers import preference_study as study  # noqa: E402
from scoredraw.reports import Report  # noqa: E402

pytestmark = pytest.mark.contract


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCOREDRAW_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def text() -> tuple[Any, Any]:
    return p25.corpus()


def test_smoke_runs_end_to_end_and_the_seed_decides() -> None:
    report = p25.run("smoke", 0)
    assert report.paper == 25
    assert len(report.claims) == 15
    assert [len(table.rows) for table in report.tables] == [2, 5, 5, 4]
    assert Report.from_json(report.to_json()).to_json() == report.to_json()
    claims, again, other = (
        [claim.measured for claim in p25.run("smoke", seed).claims] for seed in (0, 0, 1)
    )
    assert claims == again == [claim.measured for claim in report.claims]  # cached weights or not
    assert claims != other


def test_free_features_give_the_known_correlations() -> None:
    """Means of ten runs of 300 pairs, with standard errors of .012, .018 and .016 (.009 last)."""
    for lasting, want in ((True, (0.65, 0.17, 0.48)), (False, (0.72, 0.36, 0.80))):
        found = [p25.toy_correlations(lasting, seed) for seed in range(10)]
        means = [np.mean([one[name] for one in found]) for name in (p25.CHES, p25.LAST, p25.EDIT)]
        np.testing.assert_allclose(means, want, atol=0.07)  # four of them: alarms below 1 in 10^3


def test_rank_correlation_is_spearmans_over_models_and_resamples() -> None:
    from scipy.stats import spearmanr

    rows = np.random.default_rng(0).integers(0, 5, (7, 20, 2, 3)).astype(float)  # with ties
    want = [
        np.mean([spearmanr(r[:, m, 0], r[:, m, 2])[0] - spearmanr(r[:, m, 1], r[:, m, 2])[0]
                 for m in range(2)])
        for r in rows
    ]  # fmt: skip
    np.testing.assert_allclose(p25.rank_correlation(rows, axis=1), want)
    assert p25.rank_correlation(rows[0]) == pytest.approx(want[0])
    assert p25.rank_correlation(np.ones((5, 1, 2))) == 0


def test_fifths() -> None:
    score = np.array([3.0, 1, 2, 5, 4, 10, 9, 8, 7, 6])
    assert p25.fifths(score, score) == [1.5, 3.5, 5.5, 7.5, 9.5]
    rows = np.stack([score, -score], 1)[:, None]
    assert p25.quintile_gap(rows) == pytest.approx(-8.0)


def test_pairs_are_of_three_kinds(text: tuple[Any, Any]) -> None:
    trained, held = text
    assert 0 <= held.min() <= held.max() < p25.LETTERS
    assert len(trained) > 5 * len(held) > 10_000
    for i, pair in enumerate(p25.letter_pairs(held, 30, 0)):
        chosen, rejected = np.array(pair["chosen_ids"]), np.array(pair["rejected_ids"])
        assert len(pair["prompt_ids"]) == p25.PROMPT
        assert chosen.shape == rejected.shape == (p25.ANSWER,)
        assert i % 3 or (chosen != rejected).sum() == 1


def test_a_step_moves_as_the_slope_says_and_leaves_the_model_alone(text: tuple[Any, Any]) -> None:
    """First order: a step of rate r moves ln π(chosen) by r m <grad chosen, grad margin>."""
    trained, held = text
    model = p25.letter_model(trained, 5, 0)
    before = [weight.detach().clone() for weight in model.parameters()]
    pairs = p25.letter_pairs(held, 9, 0)
    moves = p25.one_step_each(model, pairs)
    assert all(map(torch.equal, before, model.parameters()))
    assert np.median(moves.margin) == pytest.approx(p25.GAIN, rel=0.1)
    slopes = [study.slopes_of(model, pp.pair_batch([pair])) for pair in pairs]
    chosen, margin = (np.array([s[k] for s in slopes]) for k in ("chosen_slope", "margin_slope"))
    np.testing.assert_allclose(moves.chosen / moves.margin, chosen / margin, atol=0.05)


def test_a_window_of_one_pair_is_that_pairs_step(text: tuple[Any, Any]) -> None:
    model, pairs = p25.letter_model(text[0], 5, 0), p25.letter_pairs(text[1], 5, 0)
    moves = p25.one_step_each(model, pairs)
    for row in range(5):
        alone = p25.train_on_window(model, pairs, np.array([row]), moves.rate, 1)
        assert alone == pytest.approx(moves.chosen[row], rel=1e-3, abs=1e-4)
    more = p25.train_on_window(model, pairs, np.arange(5), moves.rate, 3)
    assert more.shape == (5,)


def test_weights_are_cached(text: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = p25.letter_model(text[0], 3, 0)
    monkeypatch.setattr(p25, "train", None)
    again = p25.letter_model(text[0], 3, 0)
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    with pytest.raises(TypeError):
        p25.letter_model(text[0], 3, 1)


# ── The study, on a tiny model ───────────────────────────────────────────────────────────────────


def tiny_model() -> tuple[Any, Any]:
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<e>", pad_token="<p>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<e>{% endfor %}"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), tokenizer


def test_the_embedded_pairs_are_answers_to_one_problem() -> None:
    pairs = study.conversations()
    assert len(pairs) == 246
    for pair in pairs:
        assert [pair[k][0]["role"] for k in pair] == ["user", "assistant", "assistant"]
        assert pair["chosen"] != pair["rejected"]
        assert all("The answer is" in pair[k][0]["content"] for k in ("chosen", "rejected"))


def test_the_study_judges_and_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("trl", "peft", "datasets"):
        pytest.importorskip(package)
    monkeypatch.setattr("scoredraw.small_models.small_model", tiny_model)
    short = [{k: [{**pair[k][0], "content": pair[k][0]["content"][-40:]}] for k in pair}
             for pair in study.conversations()[:12]]  # fmt: skip
    monkeypatch.setattr(study, "conversations", lambda: short)
    for name, value in {"SEEDS": 1, "POOL": 8, "HELD_OUT": 3}.items():
        monkeypatch.setattr(study, name, value)
    report = Report(paper=25, scale="study", seed=0)
    study.add_slopes(report, 0, 4)
    study.add_arms(report, 0)
    assert [len(table.rows) for table in report.tables] == [5, len(study.ARMS)]
    assert len(report.claims) == 9
    records = Journal(next(tmp_path.glob("ches-study-*.jsonl"))).records()
    assert len(records) == 4 + 1 + len(study.ARMS)
    arms = {(r["seed"], r["arm"]): r for r in records if "arm" in r}
    assert all(r["pairs"] == 4 and len(r["held out, chosen"]) == 3 for r in arms.values())
    monkeypatch.setattr("scoredraw.small_models.small_model", None)  # all is in the journal
    again = Report(paper=25, scale="study", seed=0)
    study.add_slopes(again, 0, 4)
    study.add_arms(again, 0)
    assert again.to_json() == report.to_json()


def test_arms_keep_half_by_their_rule() -> None:
    pool = list(range(8))
    scored = {"ln_ches": [7, 6, 5, 4, 3, 2, 1, 0], "edit": [0, 1, 2, 3, 4, 5, 6, 7]}
    assert study.keep("lowest ln-CHES", pool, scored, 0) == [4, 5, 6, 7]  # type: ignore[arg-type]
    assert study.keep("highest ln-CHES", pool, scored, 0) == [0, 1, 2, 3]  # type: ignore[arg-type]
    assert study.keep("lowest edit score", pool, scored, 0) == [0, 1, 2, 3]  # type: ignore[arg-type]
    random = [study.keep(arm, pool, scored, 0) for arm in study.ARMS if "random" in arm]  # type: ignore[arg-type]
    assert random[0] == random[1]
    assert len(random[0]) == 4
