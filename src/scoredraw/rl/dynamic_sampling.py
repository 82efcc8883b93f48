"""DAPO's dynamic sampling inside TRL: other prompts for groups that teach nothing.

    sample -> leave out groups without any advantage -> sample other prompts -> ... -> a full batch

`fill_batch` of `group_advantages` has the rule for a loop of your own; here are the pieces that
`AdvantageGRPOTrainer` joins TRL's batches with. Yu et al. 2025, arXiv 2503.14476.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from scoredraw.errors import require

# Tensors of TRL's batch: on which side they are padded, and with what (None: the padding token).
PADDED: dict[str, tuple[str, float | None]] = {
    "prompt_ids": ("left", None), "prompt_mask": ("left", 0),
    "completion_ids": ("right", None), "completion_mask": ("right", 0), "tool_mask": ("right", 1),
    "old_per_token_logps": ("right", 0), "ref_per_token_logps": ("right", 0),
    "sampling_per_token_logps": ("right", 0), "importance_sampling_ratio": ("right", 1),
}  # fmt: skip
PLAIN = {"advantages", "num_items_in_batch"}  # made anew for the full batch


@dataclass(frozen=True, eq=False)
class Answers:
    """Sampled answers: TRL's tensors, (B, ...) each, their rewards (B, F), and columns of B."""

    tensors: dict[str, Tensor]
    rewards: Tensor
    columns: dict[str, list[Any]]

    @classmethod
    def of_batch(
        cls, output: dict[str, Any], rewards: Tensor, columns: dict[str, list[Any]]
    ) -> Answers:
        """What TRL made of one batch; InputError for one with images."""
        odd = set(output) - set(PADDED) - PLAIN
        require(not odd, "max_batches", f"a batch with {', '.join(sorted(odd))}", "texts alone")
        return cls({name: output[name] for name in PADDED if name in output}, rewards, columns)

    def __len__(self) -> int:
        return len(self.rewards)

    def rows(self, chosen: Tensor) -> Answers:
        """The answers of these row numbers (N,)."""
        kept = chosen.tolist()
        return Answers(
            {name: values[chosen] for name, values in self.tensors.items()},
            self.rewards[chosen],
            {name: [values[i] for i in kept] for name, values in self.columns.items()},
        )


def joined(parts: Sequence[Answers], padding: int) -> Answers:
    """All answers of the parts after one another, padded to one width; padding: the token.

    A column that a part lacks is None there.
    """
    names = dict.fromkeys(name for part in parts for name in part.columns)

    def wide(name: str) -> Tensor:
        side, usual = PADDED[name]
        tensors = [part.tensors[name] for part in parts]
        width, fill = max(t.shape[1] for t in tensors), padding if usual is None else usual
        left = side == "left"
        return torch.cat([
            pad(t, (width - t.shape[1], 0) if left else (0, width - t.shape[1]), value=fill)
            for t in tensors
        ])  # fmt: skip

    return Answers(
        {name: wide(name) for name in parts[0].tensors},
        torch.cat([part.rewards for part in parts]),
        {
            name: [v for part in parts for v in part.columns.get(name, [None] * len(part))]
            for name in names
        },
    )
