"""The samplers inside real torch data loaders and a real transformers Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from torch.utils.data import (  # noqa: E402
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    get_worker_info,
)

from scoredraw.data_selection.repeated_sampling import (  # noqa: E402
    RepeatedSampling,
    ResampledSubset,
    expected_coverage,
)
from scoredraw.data_selection.torch_sampler import (  # noqa: E402
    BernoulliSubset,
    DrawSampler,
    RepeatedRandomSampler,
    RoundSampler,
    epoch_callback,
    install,
)
from scoredraw.errors import InputError  # noqa: E402
from scoredraw.sampling import threshold, uniform  # noqa: E402

pytestmark = pytest.mark.contract


def test_a_data_loader_sees_a_draw_in_a_new_order_every_epoch() -> None:
    draw = uniform(100, 30, rng=0)
    loader = DataLoader(TensorDataset(torch.arange(100)), batch_size=8, sampler=DrawSampler(draw))
    first, second = (torch.cat([rows for (rows,) in loader]).tolist() for _ in range(2))
    assert first != second
    assert sorted(first) == sorted(second) == sorted(draw.indices)
    resumed = DrawSampler(draw)
    resumed.set_epoch(1)
    assert list(resumed) == second
    assert list(DrawSampler(draw, shuffle=False)) == draw.indices.tolist()
    with pytest.raises(InputError, match=r"^draw: got an empty draw"):
        DrawSampler(threshold([1.0, 2.0], 3.0))


def test_a_data_loader_sees_the_rounds_in_order() -> None:
    n, batch = 100, 8
    sampler = RepeatedRandomSampler(n, 0.3, seed=5)
    loader = DataLoader(TensorDataset(torch.arange(n)), batch_size=batch, sampler=sampler)
    rounds = RepeatedSampling(n, 0.3, seed=5)
    for t in range(7):  # without set_epoch: the sampler moves on by itself
        assert len(loader) == math.ceil(30 / batch)
        got = torch.cat([rows for (rows,) in loader]).tolist()
        assert got == rounds.subset(t).tolist()
    sampler.set_epoch(2)
    assert torch.cat([rows for (rows,) in loader]).tolist() == rounds.subset(2).tolist()


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_set_epoch_and_total_steps_with_workers(drop_last: bool, workers: int) -> None:
    n, batch, epochs = 50, 4, 3
    sampler = RepeatedRandomSampler(n, 0.26, seed=1, replacement=True)
    loader = DataLoader(
        TensorDataset(torch.arange(n)), batch_size=batch, sampler=sampler,
        drop_last=drop_last, num_workers=workers,
    )  # fmt: skip
    steps = 0
    for t in (4, 0, 9)[:epochs]:
        sampler.set_epoch(t)
        batches = [rows.tolist() for (rows,) in loader]
        want = sampler.indices(t).tolist()
        assert list(chain.from_iterable(batches)) == (
            want[: len(want) // batch * batch] if drop_last else want
        )
        steps += len(batches)
    assert steps == sampler.total_steps(epochs, batch, drop_last=drop_last)


def test_an_epoch_left_early_is_begun_again() -> None:
    sampler = RepeatedRandomSampler(20, 0.5)
    first = next(iter(sampler))
    assert next(iter(sampler)) == first
    list(sampler)
    assert sampler.epoch == 1


def test_with_replacement_is_torch_random_sampler_in_law() -> None:
    """Sizes, marginals, coverage against torch's own sampler over 3000 epochs.

    Each of 40 marginal frequencies within 5 standard errors (2e-5 for each sampler), the mean
    coverage after 5 epochs within 5 standard errors of the law (6e-7 for each).
    """
    n, m, epochs, block = 40, 10, 3000, 5
    ours = RepeatedRandomSampler(n, num_samples=m, replacement=True, seed=3)
    peer = RandomSampler(
        range(n), replacement=False, num_samples=m, generator=torch.Generator().manual_seed(3)
    )
    assert len(ours) == len(peer) == m
    law = expected_coverage(m / n, block, replacement=True)[-1]
    for sampler in (ours, peer):
        table = np.array([list(sampler) for _ in range(epochs)])
        assert table.shape == (epochs, m)
        assert (np.diff(np.sort(table, axis=1), axis=1) > 0).all()
        share = np.bincount(table.ravel(), minlength=n) / epochs
        assert np.abs(share - m / n).max() < 5 * math.sqrt(m / n * (1 - m / n) / epochs)
        seen = np.array([len(set(b.ravel().tolist())) / n for b in table.reshape(-1, block, m)])
        assert abs(seen.mean() - law) < 5 * seen.std(ddof=1) / math.sqrt(len(seen))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("m", "world"), [(12, 4), (13, 4), (3, 3), (7, 2)])
def test_ranks_get_what_distributed_sampler_would_give_them(
    m: int, world: int, drop_last: bool
) -> None:
    whole = RepeatedRandomSampler(30, num_samples=m, seed=2)
    for t in range(4):
        subset = whole.indices(t)
        for rank in range(world):
            ours = RepeatedRandomSampler(
                30, num_samples=m, seed=2, rank=rank, world_size=world, drop_last=drop_last
            )
            ours.set_epoch(t)
            peer = DistributedSampler(range(m), world, rank, shuffle=False, drop_last=drop_last)  # type: ignore[arg-type, var-annotated]
            assert list(ours) == subset[list(peer)].tolist()
            assert len(ours) == len(peer)


def test_even_shares_are_disjoint() -> None:
    ranks = [RepeatedRandomSampler(40, 0.5, seed=9, rank=r, world_size=4) for r in range(4)]
    for t in range(5):
        shares = [set(rank.indices(t).tolist()) for rank in ranks]
        assert sum(map(len, shares)) == len(set().union(*shares)) == 20


def test_scored_rounds_sample_too() -> None:
    rounds = ResampledSubset(np.arange(10.0), num_samples=3, mode="rc")
    assert sorted(RoundSampler(rounds)) == [7, 8, 9]


class Stream(IterableDataset):  # type: ignore[type-arg]
    """0 .. n - 1, dealt to the workers in turn."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        return iter(range(worker.id, self.n, worker.num_workers) if worker else range(self.n))


def test_a_keyed_stream_keeps_the_same_examples_with_any_workers() -> None:
    kept = []
    for workers in (0, 2):
        stream = BernoulliSubset(Stream(3000), 0.1, seed=6, key=int)
        stream.set_epoch(3)
        loader = DataLoader(stream, batch_size=16, num_workers=workers)
        kept.append(sorted(torch.cat(list(loader)).tolist()))
    assert kept[0] == kept[1]
    want = np.flatnonzero(BernoulliSubset(range(1), 0.1, seed=6).rounds.keep(np.arange(3000), 3))
    assert kept[0] == want.tolist()


def test_a_stream_by_position_differs_between_workers_and_epochs() -> None:
    """About r N are kept: within 6 standard deviations (2e-9), by 2 workers together."""
    n, r = 4000, 0.1
    stream = BernoulliSubset(Stream(n), r, seed=6)
    rounds = []
    for t in range(2):
        stream.set_epoch(t)
        loader = DataLoader(stream, batch_size=None, num_workers=2)
        rounds.append(sorted(int(i) for i in loader))
        assert abs(len(rounds[-1]) - r * n) < 6 * math.sqrt(n * r * (1 - r))
    assert rounds[0] != rounds[1]
    by_worker = [{i // 2 for i in rounds[0] if i % 2 == w} for w in (0, 1)]
    assert by_worker[0] != by_worker[1]


# ── transformers ────────────────────────────────────────────────────────────────────────────────


class Rows(Dataset):  # type: ignore[type-arg]
    """A tiny regression that remembers which rows were read."""

    def __init__(self, n: int) -> None:
        self.n, self.read = n, list[int]()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        self.read.append(i)
        return {"x": torch.tensor([float(i)]), "labels": torch.tensor([1.0])}


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x: Any, labels: Any) -> dict[str, Any]:
        logits = self.layer(x / 100)
        return {"loss": ((logits - labels) ** 2).mean(), "logits": logits}


def make_trainer(folder: Path, rows: Rows, **arguments: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    args = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=0.1,
        lr_scheduler_type="cosine", report_to=[], disable_tqdm=True, logging_strategy="no",
        use_cpu=True, seed=0, **arguments,
    )  # fmt: skip
    return transformers.Trainer(model=Linear(), args=args, train_dataset=rows)


def test_a_trainer_trains_on_the_rounds_under_the_compressed_schedule(tmp_path: Path) -> None:
    rows, rounds = Rows(30), 4
    trainer = make_trainer(tmp_path, rows, num_train_epochs=rounds, save_strategy="no")
    sampler = RepeatedRandomSampler(30, 0.3, seed=7)
    install(trainer, sampler)
    trainer.train()
    want = [sampler.indices(t).tolist() for t in range(rounds)]
    assert rows.read == list(chain.from_iterable(want))
    assert trainer.state.global_step == sampler.total_steps(rounds, 4) == 12
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


def test_a_resumed_trainer_goes_on_with_the_same_rounds(tmp_path: Path) -> None:
    kwargs = {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": 8}
    whole = Rows(30)
    trainer = make_trainer(tmp_path, whole, **kwargs)
    install(trainer, RepeatedRandomSampler(30, 0.3, seed=7))
    trainer.train()
    resumed = Rows(30)
    trainer = make_trainer(tmp_path, resumed, **kwargs)
    install(trainer, RepeatedRandomSampler(30, 0.3, seed=7))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    # 8 steps are two rounds of three batches and two batches of the third
    assert resumed.read[-10:] == whole.read[-10:]
    assert trainer.state.global_step == 12


def test_the_callback_alone_sets_the_epoch() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sampler = RepeatedRandomSampler(30, 0.3)
    callback = epoch_callback(sampler)
    for epoch, want in ((0.0, 0), (2.0, 2), (2.66, 2), (2.9999999, 3)):
        callback.on_epoch_begin(None, transformers.TrainerState(epoch=epoch), None)
        assert sampler.epoch == want


def test_install_refuses_a_sampler_that_does_not_fit(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Rows(30))
    with pytest.raises(InputError, match=r"^sampler: got n 20, want 30"):
        install(trainer, RepeatedRandomSampler(20, 0.5))
    with pytest.raises(InputError, match=r"^sampler: got world_size 2"):
        install(trainer, RepeatedRandomSampler(30, 0.5, world_size=2))


def test_bad_input_is_refused_by_name() -> None:
    sampler = RepeatedRandomSampler(20, 0.5)
    with pytest.raises(InputError, match=r"^t: got -1"):
        sampler.set_epoch(-1)
    with pytest.raises(InputError, match=r"^ratio: got 0"):
        RepeatedRandomSampler(20, 0)
    with pytest.raises(InputError, match=r"^batch_size: got 16.*drop_last leaves no batch"):
        sampler.total_steps(2, 16, drop_last=True)
    with pytest.raises(InputError, match=r"^world_size: got 11"):
        RepeatedRandomSampler(20, 0.5, world_size=11)
