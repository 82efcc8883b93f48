"""The training-dynamics recorder, in a plain torch loop and in a real transformers Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scoredraw.data_selection import gradients, influence
from scoredraw.data_selection.evaluation import model_logits
from scoredraw.data_selection.recorder import TrainingDynamicsRecorder
from scoredraw.data_selection.selection import prune
from scoredraw.errors import InputError

pytestmark = pytest.mark.contract

N, CLASSES = 48, 3


def points() -> list[tuple[torch.Tensor, int]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, 4, generator=g)
    return [(row, int(row[:CLASSES].argmax())) for row in x]


def train(recorder: TrainingDynamicsRecorder | None, steps: int = 20) -> nn.Module:
    """A loop with dropout whose randomness the recorder must not disturb."""
    torch.manual_seed(1)
    data = points()
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    if recorder is not None:
        recorder.after_update(model, 0, learning_rate=0.3)
    for step in range(1, steps + 1):
        rows = torch.randint(N, (8,)).tolist()
        x, y = torch.stack([data[i][0] for i in rows]), torch.tensor([data[i][1] for i in rows])
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if recorder is not None:
            recorder.after_update(model, step, learning_rate=0.3 / step)
        assert model.training
    return model


def test_a_plain_loop_is_recorded_and_not_disturbed(tmp_path: Path) -> None:
    data = points()
    recorder = TrainingDynamicsRecorder(
        data, every={0, 4, 8, 12, 16, 20}, gradients_at="input", linear_layers=["0", "3"],
        gradient_every=10, batch_size=13,
    )  # fmt: skip
    watched, alone = train(recorder), train(None)
    for a, b in zip(watched.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert recorder.steps == [0, 4, 8, 12, 16, 20]
    assert recorder.gradient_steps == [10, 20]
    assert recorder.learning_rates == [0.03, 0.015]
    x, y = torch.stack([row for row, _ in data]), torch.tensor([label for _, label in data])
    np.testing.assert_array_equal(recorder.labels, y)
    last = model_logits(watched, x)
    np.testing.assert_allclose(recorder.logits[-1], last, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(recorder.correct[-1], last.argmax(-1) == y)
    np.testing.assert_allclose(recorder.el2n(8), influence.el2n(recorder.logits[2], y))
    np.testing.assert_allclose(recorder.el2n(), influence.el2n(recorder.logits[0], y))
    np.testing.assert_array_equal(
        recorder.forgetting()[0], influence.forgetting(recorder.correct)[0]
    )
    squares = gradients.squared_linear_norms(watched, x, y)
    np.testing.assert_allclose(recorder.squared_norms[1], squares, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(recorder.tracin(), [0.03, 0.015] @ recorder.squared_norms)
    halfway = train(None, steps=10)
    both = [gradients.input_gradients(m, x, y) for m in (halfway, watched)]
    np.testing.assert_allclose(
        recorder.variance_of_gradients(), influence.variance_of_gradients(both), atol=1e-7
    )
    prior = np.bincount(y) / N
    p = last.softmax(-1)[range(N), y].double().numpy()
    np.testing.assert_allclose(recorder.pvi(20), np.log2(p / prior[y]), rtol=1e-4, atol=1e-5)
    recorder.save(tmp_path / "run.npz")
    stored = np.load(tmp_path / "run.npz")
    np.testing.assert_array_equal(stored["logits"], recorder.logits)
    np.testing.assert_array_equal(stored["variance_of_gradients"], recorder.variance_of_gradients())
    assert [f.name for f in tmp_path.iterdir()] == ["run.npz"]


def test_scores_go_on_into_torch_and_datasets() -> None:
    data = points()
    recorder = TrainingDynamicsRecorder(data, every=5, keep_logits=False)
    train(recorder)
    counts = recorder.forgetting(never_learned="max")[0]
    with pytest.raises(InputError, match="logits: got none kept"):
        recorder.el2n()
    draw = prune(counts, 0.5, rng=0)
    subset = torch.utils.data.Subset(data, draw.indices)  # type: ignore[arg-type]
    assert len(subset) == N // 2
    assert torch.equal(subset[0][0], data[draw.indices[0]][0])
    sampler = torch.utils.data.WeightedRandomSampler(draw.sample_weight, 10)  # type: ignore[arg-type]
    loader = torch.utils.data.DataLoader(subset, sampler=sampler, batch_size=5)
    assert sum(len(y) for _, y in loader) == 10
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"row": list(range(N))})
    assert table.select(draw.indices)["row"][:] == draw.indices.tolist()
    assert draw.take(table)["row"][:] == draw.indices.tolist()


def test_until_and_refusals() -> None:
    recorder = TrainingDynamicsRecorder(points(), every=2, until=7)
    model = train(recorder)
    assert recorder.steps == [2, 4, 6]
    with pytest.raises(InputError, match="step: got 2 after 6"):
        recorder.after_update(model, 2)
    with pytest.raises(InputError, match=r"step: got 3, want one of \[2, 4, 6\]"):
        recorder.el2n(3)
    for call in (recorder.variance_of_gradients, recorder.tracin):
        with pytest.raises(InputError):
            call()
    with pytest.raises(InputError, match="dataset: got no example"):
        TrainingDynamicsRecorder([])
    with pytest.raises(InputError, match="every: got 0"):
        TrainingDynamicsRecorder(points(), every=0)

    class Moving:
        def __init__(self) -> None:
            self.turn = 0

        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            self.turn += 1
            return torch.zeros(4), (i + self.turn // 5) % 2

    recorder = TrainingDynamicsRecorder(Moving(), every=1)
    recorder.after_update(model, 1)
    with pytest.raises(InputError, match="labels that changed"):
        recorder.after_update(model, 2)


def trainer(folder: Path, recorder: Any, data: list[dict[str, Any]]) -> Any:
    """A small BERT on sequences of two lengths; the label is whether token 7 occurs."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=2, max_position_embeddings=16,
    )  # fmt: skip

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(item["input_ids"]) for item in items)
        ids = [item["input_ids"] + [0] * (width - len(item["input_ids"])) for item in items]
        mask = [[1] * len(i["input_ids"]) + [0] * (width - len(i["input_ids"])) for i in items]
        labels = [item["labels"] for item in items]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor(labels),
        }

    arguments = transformers.TrainingArguments(
        str(folder), max_steps=12, per_device_train_batch_size=8, learning_rate=5e-3, seed=3,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    made = transformers.Trainer(
        transformers.BertForSequenceClassification(config),
        arguments,
        data_collator=collate,
        train_dataset=data,
        callbacks=[recorder] if recorder else [],
    )
    made.train()
    return made


def test_the_transformers_trainer(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    ids = [g.integers(1, 20, size=g.choice([5, 9])).tolist() for _ in range(32)]
    data = [{"input_ids": row, "labels": int(7 in row)} for row in ids]
    recorder = TrainingDynamicsRecorder(
        data, every=2, gradients_at="bert.embeddings", linear_layers="classifier",
        gradient_every=4, batch_size=8,
    )  # fmt: skip
    watched = trainer(tmp_path, recorder, data)
    alone = trainer(tmp_path, None, data)
    for a, b in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert recorder.steps == [2, 4, 6, 8, 10, 12]
    assert recorder.gradient_steps == [4, 8, 12]
    assert recorder.logits.shape == (6, 32, 2)
    # the Trainer's linear decay from 5e-3 to 0 over 12 updates
    np.testing.assert_allclose(recorder.learning_rates, 5e-3 * (1 - np.array([4, 8, 12]) / 12))
    one = {"input_ids": torch.tensor([ids[3]]), "attention_mask": torch.ones(1, len(ids[3]))}
    want = model_logits(watched.model, one)[0]
    np.testing.assert_allclose(recorder.logits[-1, 3], want, rtol=1e-4, atol=1e-5)
    vog = recorder.variance_of_gradients()
    assert vog.shape == (32,)
    assert np.all(vog > 0)
    g = gradients.input_gradients(
        watched.model, one, torch.tensor([data[3]["labels"]]), layer="bert.embeddings"
    )
    assert g.shape == (1, len(ids[3]), 16)
    assert np.all(recorder.tracin() >= 0)
    assert recorder.el2n(4).shape == (32,)
