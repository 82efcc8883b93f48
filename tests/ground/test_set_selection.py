"""Growing a set one item at a time: its laws, its log, and choosers that fail."""

from __future__ import annotations

import json
import threading
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from scoredraw.draws import Draw
from scoredraw.errors import InputError
from scoredraw.set_selection import (
    Choice,
    SelectionError,
    UtilityChooser,
    Windows,
    add_one_in,
    init,
    step,
)

pytestmark = pytest.mark.oracle


def first(context, candidates):
    return 0


def largest(context, candidates):
    return int(np.argmax(candidates))


# ---- laws ----------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 60), data=st.data(), a=st.sampled_from([None, 0, 1, 4]),
    b=st.sampled_from([None, 1, 3, 50]), batch=st.integers(1, 4), rng=st.integers(0, 9),
)  # fmt: skip
def test_a_set_grows_by_one_item_a_choice(n, data, a, b, batch, rng) -> None:
    k = data.draw(st.integers(1, n))
    shards = data.draw(st.integers(1, min(k, 5)))
    seeds = data.draw(st.integers(0, k - 1))
    sizes: list[int] = []
    log = add_one_in(
        n, k, largest, context_window=a, candidate_window=b, batch=1 if b is None else batch,
        n_shards=shards, n_seed=seeds, rng=rng, progress=lambda done, k: sizes.append(done),
    )  # fmt: skip
    assert len(log.indices) == len(set(log.indices.tolist())) == k  # any k, whatever the shards
    assert log.n_seed == seeds
    assert log.calls == len(log.steps) == k - seeds
    assert (sizes[-1] if sizes else k) == k
    assert isinstance(log.draw, Draw)
    assert not log.draw.unbiased
    known = set(log.indices[:seeds].tolist())
    rounds: dict[int, list] = {}
    for one in log.steps:
        rounds.setdefault(one.round, []).append(one)
    for steps in rounds.values():
        offered = [item for one in steps for item in one.candidates]
        assert len(offered) == len(set(offered))  # no candidate twice in a batch
        assert not known & set(offered)  # S and R have nothing in common
        for one in steps:
            assert set(one.context) <= known
            assert len(one.context) <= (n if a is None else a)
            assert one.pick == one.candidates[one.place] == max(one.candidates)
        known |= {one.pick for one in steps}


def uniformity(chooser, *, runs: int = 600, n: int = 40, k: int = 8, **options) -> float:
    """p-value of equal inclusion: sum (c - rp)^2 / (r p (1 - p)) (n - 1)/n is nearly chi2_{n-1}."""
    counts = np.zeros(n)
    for rng in range(runs):
        counts[add_one_in(n, k, chooser, n_seed=1, rng=rng, **options).indices] += 1
    p = k / n
    statistic = ((counts - runs * p) ** 2).sum() / (runs * p * (1 - p)) * (n - 1) / n
    return float(chi2.sf(statistic, n - 1))


@pytest.mark.parametrize(
    ("chooser", "options"),
    [
        (largest, {"candidate_window": 1}),
        (first, {"candidate_window": 7}),
        (lambda context, candidates: len(candidates) - 1, {"n_shards": 3, "batch": 2}),
        (UtilityChooser(lambda context, candidates: np.ones(len(candidates))), {}),
        (lambda context, candidates: Choice(0, np.eye(len(candidates))[0]), {"n_orders": 2}),
    ],
    ids=["one candidate", "always A", "always the last", "constant utility", "A in two orders"],
)
def test_a_chooser_of_positions_is_a_uniform_draw(chooser, options) -> None:
    """Fixed seeds; each of the five fails by chance with probability 1e-3."""
    assert uniformity(chooser, **options) > 1e-3
    assert uniformity(largest, candidate_window=4) < 1e-6  # and the test can tell


@pytest.mark.parametrize("b", [1, 4, 10, 26])
def test_the_best_of_b_has_rank_quantile_b_over_b_plus_one(b) -> None:
    """The pool is hardly used up. Var(max of b uniforms) = b/((b+1)^2 (b+2)); 4 deviations."""
    n, k = 20_000, 401
    log = add_one_in(n, k, largest, candidate_window=b, n_seed=1, rng=3)
    quantiles = (log.indices[1:] + 0.5) / n
    deviation = np.sqrt(b / ((b + 1) ** 2 * (b + 2)) / (k - 1))
    assert abs(quantiles.mean() - b / (b + 1)) < 4 * deviation + 0.5 * k / n / (b + 1)


def test_stochastic_greedy_keeps_its_guarantee() -> None:
    """b = ceil(n/K ln 1/eps), all of S shown: at least 1 - 1/e - eps of the optimum, on average."""
    n, k, eps = 16, 3, 0.1
    points = np.random.default_rng(0).normal(size=(n, 2))
    likeness = np.exp(-((points[:, None] - points) ** 2).sum(axis=-1))

    def gain(chosen, candidates):
        covered = likeness[:, chosen].max(axis=1, keepdims=True, initial=0)
        return (np.maximum(covered, likeness[:, candidates]) - covered).sum(axis=0)

    def value(items) -> float:
        return float(likeness[:, items].max(axis=1).sum())

    def mean(b: int) -> float:
        shown = {"context_window": None, "candidate_window": b, "n_seed": 0}
        runs = [add_one_in(n, k, UtilityChooser(gain), rng=rng, **shown) for rng in range(50)]
        return float(np.mean([value(run.indices) for run in runs]))

    best = max(value(list(items)) for items in combinations(range(n), k))
    b = int(np.ceil(n / k * np.log(1 / eps)))
    assert b < n
    assert best >= mean(b) >= (1 - 1 / np.e - eps) * best
    assert mean(b) > mean(1)


def test_init_and_step_are_what_add_one_in_runs() -> None:
    state = init(50, 9, Windows(4, 3), n_seed=2, rng=5)
    steps = []
    while not state.done:
        steps += step(state, largest)
    log = add_one_in(50, 9, largest, context_window=4, candidate_window=3, n_seed=2, rng=5)
    assert state.order == log.indices.tolist()
    assert tuple(steps) == log.steps


# ---- what is shown -------------------------------------------------------------------------------


def test_choosers_see_records_arrays_or_positions() -> None:
    seen: list = []

    def look(context, candidates):
        seen.append((context, candidates))
        return 0

    texts = [f"text {i}" for i in range(8)] + ["", ""]
    log = add_one_in(texts, 3, look, n_seed=2, rng=0)
    assert seen[-1] == ([texts[i] for i in log.steps[0].context],
                        [texts[i] for i in log.steps[0].candidates])  # fmt: skip
    rows = np.arange(20.0).reshape(10, 2)
    same = add_one_in(rows, 3, look, n_seed=2, rng=0)
    np.testing.assert_array_equal(seen[-1][1], rows[list(same.steps[0].candidates)])
    assert same.indices.tolist() == log.indices.tolist()


def test_recent_and_nearest_contexts() -> None:
    log = add_one_in(50, 12, first, context_window=3, n_seed=5, context="recent", rng=1)
    for at, one in enumerate(log.steps, 5):
        assert one.context == tuple(log.indices[at - 3 : at].tolist())
    vectors = np.random.default_rng(0).normal(size=(50, 4))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    log = add_one_in(
        50, 12, first, context_window=3, n_seed=5, context="nearest", vectors=vectors, rng=1
    )
    for at, one in enumerate(log.steps, 5):
        cosine = (unit[log.indices[:at]] @ unit[list(one.candidates)].T).max(axis=1)
        assert set(one.context) == set(log.indices[np.argsort(-cosine)[:3]].tolist())


def test_several_orders_cancel_what_a_letter_is_worth() -> None:
    """In all b orders each item stands in each place once: an additive appeal of places is gone."""
    appeal = np.array([5.0, 1.0, 0.0, 3.0])

    def biased(context, candidates):
        scores = candidates / 100 + appeal[: len(candidates)]
        return Choice(int(scores.argmax()), scores)

    one = add_one_in(40, 10, biased, candidate_window=4, n_seed=1, rng=0)
    every = add_one_in(40, 10, biased, candidate_window=4, n_seed=1, rng=0, n_orders=4)
    assert [s.pick for s in one.steps] == [s.candidates[0] for s in one.steps]
    assert [s.pick for s in every.steps] == [max(s.candidates) for s in every.steps]
    assert every.calls == 4 * one.calls == 36


def test_votes_need_a_majority() -> None:
    """Without scores two orders that disagree are no verdict; the window is shown anew."""
    for n_orders in (2, 3):
        log = add_one_in(40, 6, largest, candidate_window=5, n_seed=1, rng=0, n_orders=n_orders)
        assert log.calls == 5 * n_orders  # a chooser of items agrees with itself
        with pytest.raises(SelectionError, match=r"no majority$"):
            add_one_in(40, 6, first, candidate_window=5, n_seed=1, rng=0, n_orders=n_orders,
                       max_retries=1, max_consecutive_failures=2)  # fmt: skip


# ---- groups --------------------------------------------------------------------------------------


@given(data=st.data(), rng=st.integers(0, 9), b=st.sampled_from([None, 2, 9]))
def test_quotas_hold(data, rng, b) -> None:
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    by = np.random.default_rng(rng).permutation(np.repeat(np.arange(len(sizes)), sizes))
    low = [data.draw(st.integers(0, s)) for s in sizes]
    high = [data.draw(st.integers(lo, s)) for lo, s in zip(low, sizes, strict=True)]
    k = data.draw(st.integers(max(1, sum(low)), max(1, sum(high))))
    quotas = {g: (lo, hi) for g, (lo, hi) in enumerate(zip(low, high, strict=True))}
    if sum(high) < 1:
        with pytest.raises(InputError, match=r"^quotas: "):
            add_one_in(len(by), k, largest, by=by, quotas=quotas, n_seed=0)
        return
    log = add_one_in(
        len(by), k, largest, by=by, quotas=quotas, n_seed=data.draw(st.integers(0, k - 1)),
        candidate_window=b, rng=rng,
    )  # fmt: skip
    counts = np.bincount(by[log.indices], minlength=len(sizes))
    assert (np.array(low) <= counts).all()
    assert (counts <= np.array(high)).all()
    assert len(set(log.indices.tolist())) == k


def test_greedy_under_quotas_is_the_greedy_of_the_partition_matroid() -> None:
    """For a sum of worths that greedy is exact: the best of each group, then the best of all."""
    worth = np.random.default_rng(2).permutation(30)
    by = np.arange(30) % 3
    chooser = UtilityChooser(lambda context, candidates: worth[candidates])
    full = {"context_window": None, "candidate_window": None, "n_seed": 0}
    log = add_one_in(30, 9, chooser, by=by, quotas={0: 5, 1: (3, 9), 2: (0, 9)}, **full)
    best = [by_group[np.argsort(-worth[by_group])] for by_group in (by == 0, by == 1, by == 2)
            for by_group in [np.flatnonzero(by_group)]]  # fmt: skip
    want = [*best[0][:5], *best[1][:3]]
    want.append(max([best[1][3], best[2][0]], key=lambda i: worth[i]))
    assert set(log.indices.tolist()) == {int(i) for i in want}
    shares = add_one_in(30, 10, chooser, by=["x"] * 21 + ["y"] * 9, **full)
    assert (shares.indices < 21).sum() == 7  # in proportion where no quotas are given


# ---- failures ------------------------------------------------------------------------------------


def test_a_choice_beyond_the_window_is_no_verdict() -> None:
    """The authors' letters before "A" count from the end of the list; here nothing is picked."""
    answers = iter([10, -1, None, 3])
    log = add_one_in(99, 2, lambda context, candidates: next(answers), n_seed=1, rng=0)
    one = log.steps[0]
    assert (one.pick, one.place, one.calls, one.retries) == (log.indices[1], 3, 4, 3)
    assert one.failures == ("no verdict",) * 3


def test_a_retry_shows_the_same_candidates_in_another_order() -> None:
    shown = []

    def silent_twice(context, candidates):
        shown.append(candidates.tolist())
        return None if len(shown) < 3 else 0

    one = add_one_in(99, 2, silent_twice, n_seed=1, rng=0).steps[0]
    assert sorted(shown[0]) == sorted(shown[1]) == sorted(shown[2])
    assert shown[0] != shown[1] != shown[2]
    assert one.pick == shown[2][0]
    assert one.place == 0  # the letter that was named, not where it stood at first


def test_a_window_that_always_fails_is_skipped_and_another_drawn() -> None:
    calls: list[int] = []

    def flaky(context, candidates):
        calls.append(1)
        if len(calls) <= 3:
            raise TimeoutError("no answer in 60 s\nsecond line")
        return 0

    log = add_one_in(99, 3, flaky, n_seed=1, rng=0, max_retries=2)
    assert [one.pick is None for one in log.steps] == [True, False, False]
    assert log.steps[0].failures == ("TimeoutError: no answer in 60 s",) * 3
    assert log.steps[0].candidates != log.steps[1].candidates
    assert (log.skipped, log.retries, log.calls) == (1, 2, 5)
    assert log.calls <= (2 + log.skipped) * (1 + 2)


def test_the_run_ends_where_the_chooser_never_answers() -> None:
    """The authors' loop would ask for ever."""
    answers = iter([0, 0])

    def dies(context, candidates):
        return next(answers)  # then StopIteration

    with pytest.raises(SelectionError, match=r"4 windows in a row .* 3 of 9 chosen") as error:
        add_one_in(99, 9, dies, n_seed=1, rng=0, max_retries=1, max_consecutive_failures=4)
    assert len(error.value.log.indices) == 3
    assert error.value.log.calls == 2 + 4 * 2
    assert isinstance(error.value.__cause__, StopIteration)


def test_bad_input_of_a_chooser_is_not_retried() -> None:
    for chooser, pattern in [
        (lambda context, candidates: 1.5, r"^chooser: got 1\.5, want a position"),
        (UtilityChooser(lambda context, candidates: [1.0]), r"^utility: got shape \(1,\)"),
        (UtilityChooser(lambda c, b: np.full(len(b), np.nan)), "^utility: got NaN"),
    ]:
        with pytest.raises(InputError, match=pattern):
            add_one_in(50, 5, chooser, n_seed=1)


# ---- the log -------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def judge(context, candidates):
    """An answer that depends on all that is shown, sometimes none."""
    total = int(np.sum(context) * 7 + np.sum(candidates * np.arange(len(candidates))))
    return None if total % 5 == 0 else Choice(total % len(candidates), reply=f"[[{total}]]")


@pytest.mark.parametrize("options", [{}, {"n_shards": 3, "batch": 2}, {"rng": None}])
@pytest.mark.parametrize("stop", [0, 1, 7, 24])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, options, stop) -> None:
    path = tmp_path / "run.jsonl"
    asked: list[int] = []

    def dies(context, candidates):
        if len(asked) == stop:
            raise Killed
        asked.append(1)
        return judge(context, candidates)

    arguments = {"n_seed": 4, "max_retries": 1, "log": path, "rng": 11, **options}
    with pytest.raises(Killed):
        add_one_in(200, 40, dies, **arguments)
    with path.open("a") as file:
        file.write('{"round": 3, "sha')  # a line cut off by the kill
    resumed = add_one_in(200, 40, judge, **arguments)
    whole = add_one_in(200, 40, judge, **{**arguments, "log": tmp_path / "whole.jsonl"})
    if options.get("rng", 0) is not None:
        assert resumed.indices.tolist() == whole.indices.tolist()
        assert resumed.steps == whole.steps
    again = add_one_in(200, 40, dies, **arguments)  # all is known: nobody is asked
    assert again.steps == resumed.steps
    assert again.indices.tolist() == resumed.indices.tolist()


def test_a_log_after_an_abort_is_taken_up_where_the_server_died(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"

    def down(context, candidates):
        raise ConnectionError("refused")

    for _ in range(2):
        with pytest.raises(SelectionError, match="3 windows in a row"):
            add_one_in(50, 8, down, n_seed=2, log=path, max_consecutive_failures=3, max_retries=0)
    log = add_one_in(50, 8, judge, n_seed=2, log=path, max_consecutive_failures=3, max_retries=0)
    assert len(log.indices) == 8
    assert log.skipped >= 6


def test_the_log_says_everything(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    log = add_one_in(50, 8, judge, n_seed=2, log=path, rng=1)
    heading, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert (heading["n"], heading["k"]) == (50, 8)
    assert [line["pick"] for line in lines] == [one.pick for one in log.steps]
    assert lines[0]["replies"][-1].startswith("[[")
    assert set(lines[0]) == {"round", "shard", "context", "candidates", "pick", "place", "value",
                             "calls", "retries", "failures", "replies", "cut"}  # fmt: skip


def test_another_runs_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    texts = [f"text {i}" for i in range(30)]
    add_one_in(texts, 5, first, n_seed=2, log=path, rng=1)
    for records, k, options in [
        (texts, 5, {"rng": 2}),
        (texts, 6, {"rng": 1}),
        (texts[::-1], 5, {"rng": 1}),
        (texts, 5, {"rng": 1, "context_window": 3}),
    ]:
        with pytest.raises(InputError, match=r"^log: got .*run.jsonl, the log of another run"):
            add_one_in(records, k, first, n_seed=2, log=path, **options)
    vectors = np.eye(30)
    add_one_in(30, 9, first, n_seed=4, log=tmp_path / "v", context="nearest", context_window=2,
               vectors=vectors)  # fmt: skip
    with pytest.raises(InputError, match=r"^log: got steps of another run"):
        add_one_in(30, 9, first, n_seed=4, log=tmp_path / "v", context="nearest",
                   context_window=2, vectors=-vectors[::-1] + 0.1)  # fmt: skip


def test_workers_ask_at_once_and_change_nothing() -> None:
    meeting = threading.Barrier(4, timeout=20)

    def together(context, candidates):
        meeting.wait()  # four are asked at a time, or this breaks
        return judge(context, candidates) or 0

    options = {"batch": 4, "n_seed": 4, "rng": 3, "context_window": 4, "candidate_window": 3}
    one = add_one_in(200, 40, lambda c, b: judge(c, b) or 0, **options)
    many = add_one_in(200, 40, together, workers=4, **options)
    assert many.steps == one.steps


def test_callback_and_seed_set() -> None:
    heard: list = []
    log = add_one_in(30, 7, first, seed_set=[4, 9], n_seed=3, rng=0, callback=heard.append)
    assert log.indices[:2].tolist() == [4, 9]
    assert (tuple(heard), log.n_seed) == (log.steps, 3)
    shards = add_one_in(30, 5, first, seed_set=[4, 9, 2, 7], n_shards=3, rng=0)
    assert shards.indices[:4].tolist() == [4, 9, 2, 7]


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 31}, "^k: got 31, want a count from 1 to the pool's 30$"),
        ({"k": 0}, "^k: got 0"),
        ({"k": 2.5}, r"^k: got 2\.5"),
        ({"candidate_window": 0}, "^candidate_window: got 0, want at least 1$"),
        ({"context_window": -1}, "^context_window: got -1"),
        ({"n_shards": 6}, "^n_shards: got 6, want from 1 to k, which is 5$"),
        ({"batch": 0}, "^batch: got 0"),
        ({"batch": 2, "candidate_window": None}, "^batch: got 2, want 1 where all"),
        ({"n_orders": 0}, "^n_orders: got 0"),
        ({"max_retries": -1}, "^max_retries: got -1"),
        ({"max_consecutive_failures": 0}, "^max_consecutive_failures: got 0"),
        ({"workers": 0}, "^workers: got 0"),
        ({"context": "latest"}, "^context: got 'latest', want one of uniform, recent, nearest$"),
        ({"context": "nearest"}, r"^vectors: got shape \(\), want \(30, d\)$"),
        ({"context": "nearest", "vectors": np.full((30, 2), np.nan)}, r"^vectors: got NaN"),
        ({"seed_set": [1, 1]}, r"^seed_set: got \[1, 1\], want distinct positions from 0 to 29$"),
        ({"seed_set": [30]}, "^seed_set: "),
        ({"seed_set": range(6)}, "^seed_set: got 6 items, want at most k, which is 5$"),
        ({"seed_set": [1, 2], "n_seed": 1}, "^n_seed: got 1, want at least the 2 of seed_set$"),
        ({"n_seed": -1}, "^n_seed: got -1"),
        ({"quotas": {0: 5}}, "^quotas: got quotas without groups"),
        ({"by": [0] * 29}, r"^by: got shape \(29,\), want \(30,\)"),
        ({"by": [0] * 30, "batch": 2}, "^by: got groups with shards or batches"),
        ({"by": [0, 1] * 15, "quotas": {2: 1}}, "^quotas: got 2, want labels that occur in by$"),
        ({"by": [0, 1] * 15, "quotas": {0: 16}}, "^quotas: got 16 of 0, want at most the 15"),
        ({"by": [0, 1] * 15, "quotas": {0: (3, 2)}}, "^quotas: got 3 to 2 of 0"),
        ({"by": [0, 1] * 15, "quotas": {0: 3, 1: 3}}, "^quotas: got 6 to 6 in all"),
        ({"by": [0, 1] * 15, "quotas": {0: 1, 1: 4}, "seed_set": [0, 2]}, "^seed_set: got item 2"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_any_work(arguments, message) -> None:
    def never(context, candidates):
        pytest.fail("the chooser was asked")

    seeds = {} if "seed_set" in arguments else {"n_seed": 2}
    with pytest.raises(InputError, match=message) as error:
        add_one_in(30, **{"k": 5, "chooser": never, **seeds, **arguments})
    assert "\n" not in str(error.value)


def test_seeds_that_fill_the_set_are_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"^n_seed: 10 of the 4 items are drawn at random"):
        log = add_one_in(30, 4, first)
    assert (len(log.indices), log.n_seed, log.calls) == (4, 4, 0)
