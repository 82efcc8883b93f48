"""The experiment of paper 10 runs end to end, and its parts do what their names say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from scoredraw.errors import InputError
from scoredraw.papers import p10_dealrec as p10
from scoredraw.papers import sequence_recommenders as recommenders
from scoredraw.reports import Report

pytestmark = pytest.mark.contract


def test_smoke_runs_end_to_end() -> None:
    report = p10.run("smoke", 0)
    assert report.paper == 10
    assert len(report.claims) == 10
    assert all(claim.verdict is not None for claim in report.claims)
    assert [len(table.rows) for table in report.tables] == [1 + len(p10.ARMS), 3, 3, 5]
    assert Report.from_json(report.to_json()).to_json() == report.to_json()
    assert report.to_json() == p10.run("smoke", 0).to_json()


def test_every_arm_chooses_as_many_as_it_should() -> None:
    data = p10.scored(p10.digits(1, 0), 0)
    for arm in (*p10.ARMS, "weight 0", "groups 10"):
        rows = p10.chosen(data, arm, 0, 65, 0)
        assert len(np.unique(rows)) == 65, arm
    greedy = p10.chosen(data, p10.GREEDY, 0, 65, 0)
    assert data.score(0)[greedy].min() >= np.sort(data.score(0))[-65]
    assert 1e-4 < data.ratio[0] < 1  # stopped early: the risk still has a gradient
    assert (p10.digits(1, 0).y != p10.digits(1, 1).y).any()


def test_leaving_one_out_is_what_retraining_alone_gives() -> None:
    from scipy.optimize import minimize

    random = np.random.default_rng(0)
    x, y = random.normal(size=(20, 2)), random.integers(2, size=20).astype(float)
    _, exact = p10.one_left_out(x, y, 0.1)

    def fit(rows: np.ndarray) -> np.ndarray:
        def objective(theta: np.ndarray) -> float:
            losses = np.logaddexp(0, (1 - 2 * y[rows]) * (x[rows] @ theta))
            return float(losses.sum() / 20 + 0.05 * theta @ theta)

        return np.asarray(minimize(objective, np.zeros(2), tol=1e-12).x)

    def risk(theta: np.ndarray) -> float:
        return float(np.logaddexp(0, (1 - 2 * y) * (x @ theta)).mean())

    everyone = np.arange(20)
    want = [risk(fit(everyone[everyone != i])) - risk(fit(everyone)) for i in range(20)]
    np.testing.assert_allclose(exact, want, atol=1e-6)


# ── Recommenders ─────────────────────────────────────────────────────────────────────────────────


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(["user\ttrain_items\tlater_items", *lines]) + "\n")
    return path


def made_up(path: Path, users: int = 40, items: int = 30) -> Path:
    """Each user walks around a ring of items; what comes later goes on from there."""
    lines = []
    for user in range(users):
        walk = [(user + step) % items + 1 for step in range(12)]
        later = " ".join(map(str, walk[8:10])) if user % 4 == 0 else ""
        lines.append(f"{user}\t{' '.join(map(str, walk[:8]))}\t{later}")
    return write(path, lines)


def test_sequences_are_read(tmp_path: Path) -> None:
    data = recommenders.load_sequences(made_up(tmp_path / "a.tsv"))
    assert (data.n_users, data.n_items) == (40, 30)
    assert data.items[0, -8:].tolist() == list(range(1, 9))
    assert (data.items[:, :-8] == 0).all()
    assert data.evaluated.tolist() == list(range(0, 40, 4))
    with pytest.raises(InputError, match="SCOREDRAW_SEQUENCES: got lines of other columns"):
        recommenders.load_sequences(write(tmp_path / "b.tsv", ["1\t2"]))
    with pytest.raises(InputError, match="SCOREDRAW_SEQUENCES: got user 7 with one item"):
        recommenders.load_sequences(write(tmp_path / "c.tsv", ["7\t2\t"]))
    (tmp_path / "d.tsv").write_text("something else\n")
    with pytest.raises(InputError, match=r"SCOREDRAW_SEQUENCES: got .*d.tsv beginning"):
        recommenders.load_sequences(tmp_path / "d.tsv")


def test_the_recommender_learns_and_looks_at_no_padding(tmp_path: Path) -> None:
    data = recommenders.load_sequences(made_up(tmp_path / "a.tsv"))
    torch.manual_seed(0)
    model = recommenders.Recommender(data.n_items, 16, 1)
    before = recommenders.ndcg(model.eval(), data, data.evaluated, 10)
    recommenders.train(model, data.items[:, -10:], 60, seed=0, rate=1e-2)
    after = recommenders.ndcg(model, data, data.evaluated, 10)
    assert after > 0.95  # the next two items of the ring come first of those not seen
    assert before < 0.6
    short, long = torch.tensor([[3, 4]]), torch.tensor([[0, 0, 0, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(model(short)[0, -1], model(long)[0, -1])
        changed = torch.tensor([[0, 0, 0, 3, 9]])
        torch.testing.assert_close(model(changed)[0, 3], model(long)[0, 3])  # causal


def test_without_a_file_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(paper=10, scale="study", seed=0)
    monkeypatch.delenv(recommenders.VARIABLE, raising=False)
    recommenders.add_to(report, recommenders.SMALL, 0)
    assert not report.claims
    assert "SCOREDRAW_SEQUENCES names no file" in report.notes[0]


def test_a_study_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCOREDRAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(recommenders.VARIABLE, str(made_up(tmp_path / "a.tsv")))
    size = recommenders.Size(2, length=10, budget=8, pretrain_epochs=1, surrogate_epochs=1,
                             tune_epochs=1)  # fmt: skip
    first = Report(paper=10, scale="study", seed=0)
    recommenders.add_to(first, size, 0)
    assert [len(table.rows) for table in first.tables] == [len(recommenders.ARMS)]
    assert len(first.claims) == 3
    monkeypatch.setattr(recommenders, "sequence_seed", None)  # a second time is from the log
    again = Report(paper=10, scale="study", seed=0)
    recommenders.add_to(again, size, 0)
    assert again.to_json() == first.to_json()
    assert Report.from_json(first.to_json()).to_json() == first.to_json()
