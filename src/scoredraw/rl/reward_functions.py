"""Rewards as TRL calls them, which never stop a run.

TRL calls `f(prompts, completions, completion_ids, **columns)` once a batch and wants a number or
None a row. A reward that raises would end hours of training for one odd answer; here its row is
None, which TRL leaves out of the group's statistics, and the log counts it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from scoredraw import registry
from scoredraw.errors import StoppedError, require

RewardFunction = Callable[..., list[float | None]]

log = logging.getLogger(__name__)


def completion_text(completion: Any) -> str:
    """The text of a completion: itself, or what the assistant says in a list of messages.

    >>> completion_text([{"role": "assistant", "content": "4"}]), completion_text("4")
    ('4', '4')
    """
    if isinstance(completion, str):
        return completion
    messages = isinstance(completion, Sequence) and all(isinstance(m, dict) for m in completion)
    require(messages, "completion", type(completion).__name__, "text, or a list of messages")
    said = [m.get("content") for m in completion if m.get("role", "assistant") == "assistant"]
    require(all(isinstance(s, str) for s in said), "completion", "content that is no text", "text")
    return "".join(said)


def number_or_none(reward: Any) -> float | None:
    """A finite float, else None: what a trainer can use of whatever a reward returned.

    >>> [number_or_none(r) for r in (True, "0.5", float("nan"), None, 2)]
    [1.0, None, None, None, 2.0]
    """
    if reward is None or isinstance(reward, (str, bytes)):
        return None
    try:
        value = float(reward)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


class GuardedReward:
    """A reward function that returns a finite number or None a row, whatever the inner one does.

    reward: called with the whole batch as TRL does. If it raises, or returns another number of
    rewards, it is called row by row, and the rows in which it raises again are None. An interrupt
    and a StoppedError pass. name: what the trainer logs it as. failures: rows that came to nothing.

    >>> def inverse(prompts, completions, **columns):
    ...     return [1 / float(text) for text in completions]
    >>> guarded = GuardedReward(inverse)
    >>> guarded(prompts=["x"] * 3, completions=["2", "0", "one"]), guarded.failures
    ([0.5, None, None], 2)
    """

    def __init__(self, reward: Callable[..., Any], name: str | None = None) -> None:
        require(callable(reward), "reward", type(reward).__name__, "a function")
        self.reward = reward
        self.__name__ = name or getattr(reward, "__name__", type(reward).__name__)
        self.failures = 0

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """A reward a row; columns as TRL passes them (lists have a value a row)."""
        n = len(completions)
        found = self._try(prompts, completions, columns)
        if found is None:
            found = []
            for i in range(n):
                row = {key: _row(value, i, n) for key, value in columns.items()}
                one = self._try(prompts[i : i + 1], completions[i : i + 1], row)
                found.append(None if one is None else one[0])
        numbers = [number_or_none(reward) for reward in found]
        missing = sum(r is None for r in numbers)
        self.failures += missing
        if missing and callable(columns.get("log_metric")):
            columns["log_metric"](f"{self.__name__}/unscored", missing / n)
        return numbers

    def _try(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]
    ) -> list[Any] | None:
        try:
            found = list(self.reward(prompts=prompts, completions=completions, **columns))
        except StoppedError:  # a judge that talks nonsense is no odd answer
            raise
        except Exception as problem:
            log.warning("reward %s: %s: %s", self.__name__, type(problem).__name__, problem)
            return None
        return found if len(found) == len(completions) else None


def _row(value: Any, i: int, n: int) -> Any:
    return value[i : i + 1] if isinstance(value, (list, tuple)) and len(value) == n else value


def load_reward(place: str) -> RewardFunction:
    """The function at "module:function"; InputError if there is none.

    >>> load_reward("scoredraw.rl.reward_functions:completion_text").__name__
    'completion_text'
    """
    found = registry.resolve(place, argument="reward")
    require(callable(found), "reward", repr(place), "a function")
    return cast(RewardFunction, found)
