"""The reward, its parts and its ablations against the released code, with relevances given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scoredraw.rl.relevance_reward import (
    ABLATIONS,
    ROLES,
    STOP,
    R3Reward,
    length_incentive,
    prepared_response,
    trigram_ratio,
)

pytestmark = pytest.mark.golden

FILE = "14-r3-reward.json"
ARMS = {"LI": "LI", "LI_RP": "LI_RP", "rel": "relevance", "rel_LI_RP": "R_OE", "R3": "R3"}


def retriever(given: dict[str, Any], responses: list[str]) -> Callable[[list[str]], Any]:
    """Row i has an axis of its own, on which its texts have the products that are given."""
    n = len(responses)
    axes = np.eye(n)
    vectors = {response: axes[i] for i, response in enumerate(responses)}
    for texts, products in (("prompts", "relevance_to_prompt"),
                            ("references", "relevance_to_reference")):  # fmt: skip
        rows = zip(given[texts], given[products], axes, strict=True)
        vectors |= {text: product * axis for text, product, axis in rows}

    def embed(texts: list[str]) -> Any:
        return np.array([vectors[text] for text in texts])

    return embed


def test_every_output_of_the_file(golden: Callable[[str], dict[str, Any]]) -> None:
    data = golden(FILE)
    given = data["inputs"]
    assert set(given["stop_strings"]) == {*ROLES, *STOP}
    responses = [prepared_response(text, given["stop_strings"]) for text in given["responses"]]
    assert len({*responses, *given["prompts"], *given["references"]}) == 3 * len(responses)
    embed = retriever(given, responses)
    low, high = given["interp"]["input"]
    ours: dict[str, Any] = {
        "LI_and_RP_parts": [[length_incentive(r), trigram_ratio(r)] for r in responses]
    }
    for name, arm in ARMS.items():
        reward = R3Reward(embed, given["max_new_tokens"], (low, high), ABLATIONS[arm])
        ours[name] = reward(
            given["prompts"], given["responses"],
            qtype=given["qtypes"], reference=given["references"],
        )  # fmt: skip
    assert given["interp"]["output"] == [0, reward.most]
    assert data["outputs"], "a golden file without outputs"
    assert set(data["outputs"]) == set(ours)
    for name, want in data["outputs"].items():
        np.testing.assert_allclose(
            np.array(ours[name]), want, rtol=0, atol=data["tolerance"]["atol"], err_msg=name
        )
