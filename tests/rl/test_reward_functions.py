"""Rewards that raise, lie about their length or return what is no number."""

from __future__ import annotations

from typing import Any

import pytest

from scoredraw.errors import InputError, StoppedError
from scoredraw.rl.reward_functions import GuardedReward, completion_text, load_reward

pytestmark = pytest.mark.contract


def call(reward: Any, completions: list[Any], **columns: Any) -> list[float | None]:
    return GuardedReward(reward)(
        prompts=["p"] * len(completions), completions=completions, **columns
    )


def test_columns_go_row_by_row_where_the_batch_fails() -> None:
    seen: list[Any] = []

    def reward(
        prompts: list[str], completions: list[str], gold: list[int], **rest: Any
    ) -> list[int]:
        seen.append((completions, gold, rest["shared"]))
        return [g + int(c) for c, g in zip(completions, gold, strict=True)]

    found = call(reward, ["1", "x", "3"], gold=[10, 20, 30], shared="all")
    assert found == [11.0, None, 33.0]
    assert seen[1:] == [(["1"], [10], "all"), (["x"], [20], "all"), (["3"], [30], "all")]


@pytest.mark.parametrize(
    "odd", [float("nan"), float("inf"), "1", None, object(), [1, 2], 10**400, b"1"]
)
def test_what_is_no_number_is_none(odd: Any) -> None:
    assert call(lambda completions, **_: [odd, 1], ["a", "b"]) == [None, 1.0]


def test_another_number_of_rewards() -> None:
    """One reward whatever the batch: right row by row."""
    assert call(lambda completions, **_: [len(completions[0])], ["a", "bb"]) == [1.0, 2.0]
    assert call(lambda completions, **_: [], ["a", "bb"]) == [None, None]


def test_the_log_counts_what_has_no_reward() -> None:
    logged: dict[str, float] = {}

    def broken(**_: Any) -> list[float]:
        raise RuntimeError("no")

    assert call(broken, ["a", "b"], log_metric=logged.__setitem__) == [None, None]
    assert logged == {"broken/unscored": 1.0}


@pytest.mark.parametrize("kind", [KeyboardInterrupt, StoppedError])
def test_what_is_to_stop_the_run_passes(kind: type[BaseException]) -> None:
    def stopped(**_: Any) -> list[float]:
        raise kind

    with pytest.raises(kind):
        call(stopped, ["a"])


def test_texts_and_messages() -> None:
    said = [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "no"}]
    assert completion_text([*said, {"role": "assistant", "content": "b"}]) == "ab"
    for odd in (3, [1], [{"role": "assistant", "content": 3}]):
        with pytest.raises(InputError, match="completion"):
            completion_text(odd)


@pytest.mark.parametrize("place", ["nothing", "os:nothing", "no_module_of_this_name:f", "os:name"])
def test_load_refuses(place: str) -> None:
    with pytest.raises(InputError, match="reward"):
        load_reward(place)


def test_load() -> None:
    assert load_reward("trl.rewards:accuracy_reward").__name__ == "accuracy_reward"
