"""The experiment of paper 07 runs end to end, and its parts do what their names say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoredraw.data_selection.add_one_in import letter_bias
from scoredraw.papers import letter_choices
from scoredraw.papers import p07_add_one_in as p07
from scoredraw.reports import Report
from scoredraw.set_selection import Choice

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def smoke() -> Report:
    return p07.run("smoke", 0)


def test_smoke_runs_end_to_end(smoke: Report) -> None:
    assert smoke.paper == 7
    assert len(smoke.claims) == 16
    assert len({claim.name for claim in smoke.claims}) == 16
    assert [len(table.rows) for table in smoke.tables] == [16, 6, 1, 4]
    assert Report.from_json(smoke.to_json()).to_json() == smoke.to_json()


def test_the_same_seed_gives_the_same_report(smoke: Report) -> None:
    assert p07.run("smoke", 0).to_json() == smoke.to_json()


@pytest.fixture(scope="module")
def world() -> Any:
    return p07.World.draw(3, 0)


def test_a_quarter_of_the_labels_is_drawn_anew(world: Any) -> None:
    """0.225 are wrong, as one in ten is drawn right; 1,200 labels have a deviation of .012."""
    assert len(world.given) == p07.POOL
    assert len(world.test_y) == 1797 - p07.POOL
    assert abs((world.given != world.true).mean() - 0.225) < 4 * 0.012
    assert world.clean_share(np.flatnonzero(world.given == world.true)) == 1


def test_quality_finds_the_wrong_labels_and_a_sharper_scorer_is_surer(world: Any) -> None:
    wrong = world.given != world.true
    sharper = world.sharper()
    for one in (world, sharper):
        assert np.median(one.quality[wrong]) < 0.1 < np.median(one.quality[~wrong])
    assert np.quantile(sharper.quality, 0.9) > np.quantile(world.quality, 0.9)


def test_every_arm_keeps_as_many_and_none_twice(world: Any) -> None:
    for size in (60, 840):  # more than half of the pool, too
        for name in (*p07.MAIN, p07.COVER, p07.BIASED):
            rows = p07.ARMS[name](world, size)
            assert len(rows) == len(np.unique(rows)) == size, name
    kept = p07.ARMS["top by quality"](world, 60)
    assert world.quality[kept].min() >= np.sort(world.quality)[-60]
    half = p07.ARMS[p07.HALF](world, 60)
    assert world.quality[half].min() >= np.median(world.quality)


def test_half_of_a_preference(world: Any) -> None:
    """400 answers, of which the first letter gets half: deviation .025."""
    chooser = p07.half_biased(lambda shown, offered: Choice(5), 0)  # type: ignore[arg-type]
    picks = [chooser(None, None).pick for _ in range(400)]  # type: ignore[union-attr]
    assert set(picks) == {0, 5}
    assert abs(np.mean(np.array(picks) == 0) - 0.5) < 4 * 0.025


# ---- letters -------------------------------------------------------------------------------------


def test_the_study_with_a_model_that_likes_a_letter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of the language model: a third of a letter's appeal, and the text's length."""
    monkeypatch.setenv("SCOREDRAW_CACHE", str(tmp_path))
    asked = []

    class Likes:
        def __init__(self, *_: Any) -> None:
            pass

        def __call__(self, context: Any, candidates: Any) -> Choice:
            asked.append(1)
            scores = np.array([len(text) / 40 for text in candidates])
            scores[: len(scores) // 3] += 1
            return Choice(int(scores.argmax()), scores)

    monkeypatch.setattr(letter_choices, "LogprobChooser", Likes)
    monkeypatch.setattr(letter_choices, "small_model", lambda: (None, None))
    monkeypatch.setattr(
        letter_choices,
        "encode",
        lambda texts: np.random.default_rng(0).normal(size=(len(texts), 4)),
    )
    runs = ((1, 2), (2, 1), (10, 1))
    scale = letter_choices.Scale(intents=3, kept=60, runs=runs, uniform_draws=5)
    reports = []
    for _ in range(2):
        report = Report(7, "study", 0)
        letter_choices.add_to(report, scale, 0)
        reports.append(report)
    assert len(asked) == (60 - 10) * (1 + 1 + 2 + 10)  # the second time all comes from the log
    assert reports[0].to_json() == reports[1].to_json()
    assert [claim.verdict for claim in reports[0].claims[:3]] == ["holds"] * 3
    one, two, every = (sum(series.y[:3]) for series in reports[0].figures[0].series)
    assert one > two > every


def test_distance_is_the_share_of_picks_that_would_have_to_move() -> None:
    assert letter_choices.distance(letter_bias(np.arange(100) % 10, 10)) == pytest.approx(0)
    assert letter_choices.distance(letter_bias(np.zeros(100, int), 10)) == pytest.approx(0.9)
