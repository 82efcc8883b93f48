"""DTS and DTS* on a finite chain with every random number given, and exact values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scoredraw.diffusion.tree_proposals import exact_values, finite_chain
from scoredraw.diffusion.tree_sampling import DiffusionTree

pytestmark = pytest.mark.golden


class Script(np.random.Generator):
    """Uniforms from a list, in order."""

    def __init__(self, values: list[float]) -> None:
        super().__init__(np.random.PCG64(0))
        self.values, self.place = np.array(values), 0

    def random(self, size: Any = None, *_: Any, **__: Any) -> Any:
        self.place += size
        assert self.place <= len(self.values)
        return self.values[self.place - size : self.place]


def paths(parent: np.ndarray) -> list[tuple[int, ...]]:
    """Child numbers from the root to every node."""
    found: list[tuple[int, ...]] = [()]
    seen = np.zeros(len(parent), int)
    for i in range(1, len(parent)):
        found.append((*found[parent[i]], int(seen[parent[i]])))
        seen[parent[i]] += 1
    return found


@pytest.mark.parametrize(("name", "search"), [("dts", False), ("dts_star", True)])
def test_the_whole_tree(golden, name: str, search: bool) -> None:
    file = golden("17-dts-scripted.json")
    given, want, close = file["inputs"], file["outputs"][name], file["tolerance"]
    reward = np.array(given["reward"])
    tree = DiffusionTree(
        finite_chain(given["prior"], given["P"]), lambda x: reward[x], lam=given["lambda"],
        C=given["C"], alpha=given["alpha"], c_uct=given["c_uct"], search=search,
        generator=Script(given["uniforms"]),
    )  # fmt: skip
    ended = [int(tree.grow(1).last_leaves[0]) for _ in range(given["M"])]
    found = tree.to_arrays()
    new = found["states"]
    assert new[np.array(ended) - 1].tolist() == want["terminal_states"]
    order = paths(found["parent"])
    at = {path: i for i, path in enumerate(order)}
    assert tree.nfe == want["nfe"]
    assert len(order) == len(want["nodes"])
    assert found["visits"][0] == want["root_N"]
    assert tree.root_value == pytest.approx(want["root_v"], rel=close["rtol"], abs=close["atol"])
    for node in want["nodes"]:
        i = at[tuple(node["path"])]
        assert (None if i == 0 else int(new[i - 1])) == node["x"]
        assert (given["T"] + 1 if i == 0 else found["steps_left"][i]) == node["t"]
        assert (found["visits"][i], found["kids"][i]) == (node["N"], node["n_children"])
        np.testing.assert_allclose(found["value"][i], node["v"], close["rtol"], close["atol"])


def test_exact_values(golden) -> None:
    file = golden("17-dts-scripted.json")
    given, want, close = file["inputs"], file["outputs"], file["tolerance"]
    found = exact_values(given["prior"], given["P"], given["reward"], given["lambda"])
    for ours, key in zip(found, ("exact_V", "exact_root", "base_terminal", "target_terminal"),
                         strict=True):  # fmt: skip
        np.testing.assert_allclose(ours, want[key], close["rtol"], close["atol"])
