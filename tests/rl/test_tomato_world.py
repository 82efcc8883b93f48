"""The garden: its rules, its boards, the tables against the walk, and gymnasium's own check."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.errors import InputError, MissingExtraError
from scoredraw.rl.tomato_world import BOARDS, TomatoModel, TomatoWorld, read_board, tomato_model

pytestmark = pytest.mark.oracle

RIGHT, LEFT, DOWN, UP, STAY = range(5)
LINE = "AtttttO"  # distances along it are plain numbers


def walk(world: TomatoWorld, actions: list[int]) -> list[Any]:
    world.reset()
    return [world.step(action) for action in actions]


def test_watering_drying_and_the_bucket() -> None:
    steps = walk(TomatoWorld(LINE), [RIGHT] * 6)
    bits = ["".join(map(str, seen["tomatoes"])) for seen, *_ in steps]
    assert bits == ["100000", "110000", "111000", "111100", "011110", "001111"]
    true = [info["true_reward"] for *_, info in steps]
    assert true == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.08, 0.06])
    proxy = [info["proxy_reward"] for *_, info in steps]
    assert proxy == pytest.approx([*true[:-1], 0.02 * 7])
    assert [reward for _, reward, *_ in steps] == proxy
    truly = walk(TomatoWorld(LINE, "true"), [RIGHT] * 6)
    assert [reward for _, reward, *_ in truly] == true
    assert [info["position"] for *_, info in steps] == [(0, i) for i in range(1, 7)]


def test_walls_and_staying() -> None:
    world = TomatoWorld(LINE, stay=True)
    steps = walk(world, [LEFT, UP, DOWN, STAY, RIGHT, STAY])
    assert [seen["agent"] for seen, *_ in steps] == [0, 0, 0, 0, 1, 1]
    bumped = walk(TomatoWorld("Tttt A O"), [UP])[0]  # a bump, and what is far still dries
    assert bumped[0]["tomatoes"].tolist() == [0, 0, 0, 0, 0]
    assert TomatoWorld("Tttt A O").reset()[0]["tomatoes"].tolist() == [1, 0, 0, 0, 0]


def test_the_released_drying_passes_over_the_next() -> None:
    """Both tomatoes are too far; of the two, in the order of watering, the second stays."""
    for official, left in ((True, 1), (False, 0)):
        world = TomatoWorld("TT  A  O", official_drying=official)
        seen = walk(world, [RIGHT])[0][0]
        assert seen["tomatoes"][:2].sum() == left


def test_the_end_of_a_walk() -> None:
    world = TomatoWorld("AtO", horizon=2)
    steps = walk(world, [RIGHT, LEFT, RIGHT])
    assert [everything for _, _, everything, *_ in steps] == [True, True, True]
    assert [late for *_, late, _ in steps] == [False, True, True]
    assert steps[-1][0]["tomatoes"].tolist() == [1, 0]
    world.step(RIGHT)
    assert world.step(LEFT)[0]["tomatoes"].tolist() == [1, 1]  # the bucket was visited
    assert world.reset()[0]["tomatoes"].tolist() == [0, 0]


def test_random_moves_are_seeded() -> None:
    world = TomatoWorld("paper", random_actions=0.5)

    def once(seed: int | None) -> list[int]:
        world.reset(seed=seed)
        return [world.step(i % 4)[0]["agent"] for i in range(60)]

    first = once(3)
    assert once(None) != first  # the numbers go on
    assert once(3) == first
    always = TomatoWorld("medium", random_actions=1.0)
    always.reset(seed=0)
    assert len({always.step(UP)[0]["agent"] for _ in range(300)}) == 11


@pytest.mark.property
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.sampled_from(sorted(BOARDS)[:4]))
@settings(max_examples=40)
def test_the_tables_are_the_walk(actions: list[int], board: str) -> None:
    model = tables(board)
    state = 0
    for action, (seen, _, _, _, info) in zip(
        actions, walk(TomatoWorld(board), actions), strict=True
    ):
        assert model.true[state, action] == pytest.approx(info["true_reward"])
        assert model.proxy[state, action] == pytest.approx(info["proxy_reward"])
        row = model.transitions[[state * 4 + action]]
        assert (row.nnz, row.data[0]) == (1, 1.0)
        state = int(row.indices[0])
        assert model.cell[state] == seen["agent"]
        assert model.watered[state].tolist() == seen["tomatoes"][:-1].tolist()


@cache
def tables(board: str) -> TomatoModel:
    return tomato_model(board, random_actions=0.0)


def test_random_moves_in_the_tables() -> None:
    sure, noisy = tables("medium"), tomato_model("medium", random_actions=0.1)
    P = sure.transitions.toarray().reshape(-1, 4, len(sure.true))
    want = 0.9 * P + 0.1 * P.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(noisy.transitions.toarray(), want.reshape(-1, len(sure.true)))
    np.testing.assert_array_equal(noisy.true, sure.true)
    features = noisy.features
    assert len(np.unique(features, axis=0)) == len(features)
    assert features.shape == (218, 11 + 5)


def test_the_boards() -> None:
    sizes = {name: (len(g.cells), len(g.tomatoes)) for name, g in zip(
        BOARDS, map(read_board, BOARDS), strict=True)}  # fmt: skip
    assert sizes == {
        "very easy": (8, 5), "easy": (9, 5), "medium": (11, 5), "hard": (13, 5), "paper": (26, 9),
    }  # fmt: skip
    codes = np.array([[5, 4, 3], [1, 0, 2]])
    garden = read_board(codes)
    assert garden.tomatoes.tolist() == [0, 1]
    assert garden.watered.tolist() == [False, True]
    assert garden.cells.tolist() == [[0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    same = read_board("#tT|A O")
    np.testing.assert_array_equal(same.moved, garden.moved)


@pytest.mark.contract
def test_gymnasium_accepts_it() -> None:
    checker = pytest.importorskip("gymnasium.utils.env_checker")
    env = TomatoWorld("medium", random_actions=0.1, stay=True).to_gymnasium()
    checker.check_env(env, skip_render_check=True)
    seen, _ = env.reset(seed=1)
    assert seen in env.observation_space


@pytest.mark.contract
def test_gymnasium_is_only_needed_for_its_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    world = TomatoWorld("medium")
    world.reset(seed=0)
    world.step(UP)
    with pytest.raises(MissingExtraError, match="gymnasium is not installed"):
        world.to_gymnasium()


def test_bad_input() -> None:
    fresh, begun = TomatoWorld("medium"), TomatoWorld("medium")
    begun.reset()
    bad: list[tuple[Callable[[], Any], str]] = [
        (lambda: TomatoWorld("AtX"), "board: got 'AtX', want rows of the signs"),
        (lambda: TomatoWorld("AtO|t"), "board: got 'AtO|t'"),
        (lambda: TomatoWorld("tO"), "board: got 0 cells with the agent, want exactly one"),
        (lambda: TomatoWorld("AtOO"), "board: got 2 cells with the bucket"),
        (lambda: TomatoWorld("AO"), "board: got 0 tomatoes, want 1 to 50"),
        (lambda: TomatoWorld([[1, 2, 7]]), r"board: got shape \(1, 3\), want codes 0 to 5"),
        (lambda: TomatoWorld("AtO", "honest"), "reward: got 'honest'"),
        (lambda: TomatoWorld("AtO", horizon=0), "horizon: got 0"),
        (lambda: TomatoWorld("AtO", random_actions=1.5), "random_actions: got 1.5"),
        (lambda: TomatoWorld("AtO", dry_distance=-1), "dry_distance: got -1"),
        (lambda: tomato_model("AtO", random_actions=-0.1), "random_actions: got -0.1"),
        (lambda: fresh.step(0), r"step: got a world at no beginning, want reset\(\) first"),
        (lambda: begun.step(4), "action: got 4, want a whole number from 0 to 3"),
        (lambda: begun.step(0.5), "action: got 0.5"),
    ]
    for call, message in bad:
        with pytest.raises(InputError, match=message):
            call()
