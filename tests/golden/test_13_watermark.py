"""Watermarks against a re-derivation of released code: seeds, streams, tokens, p-values, laws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scoredraw.language.alignment_resampling import expected_gain
from scoredraw.language.watermark_detection import (
    detect_texts,
    green_count_test,
    score_sum_test,
)
from scoredraw.language.watermarks import (
    Watermark,
    context_seeds,
    draw_tokens,
    expected_gumbel_score,
    expected_randomised_score,
    keyed_uniforms,
    randomised_gumbel_marginal,
    token_law,
)

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.golden

Golden = Callable[[str], dict[str, Any]]


@pytest.fixture
def data(golden: Golden) -> dict[str, Any]:
    return golden("13-watermark.json")


def mark_of(inputs: dict[str, Any], scheme: str) -> Watermark:
    return Watermark(
        inputs["V"], scheme, key=inputs["seed"], context=inputs["ngram"], gamma=inputs["gamma"],
        delta=inputs["delta"],
    )  # fmt: skip


def test_the_outputs_are_those_known_here(data: dict[str, Any]) -> None:
    assert set(data["outputs"]) == {"steps", "detect", "emax_normal", "dedup"}
    known = {"seed", "greenlist", "u", "gumbel_token", "nucleus_size", "randomised_probs"}
    assert all(set(step) == known for step in data["outputs"]["steps"])


def test_seeds_and_streams(data: dict[str, Any]) -> None:
    inputs, steps, within = data["inputs"], data["outputs"]["steps"], data["tolerance"]
    kgw, gumbel = mark_of(inputs, "kgw"), mark_of(inputs, "gumbel")
    seeds = context_seeds(inputs["context"], inputs["seed"]).tolist()
    assert [str(seed) for seed in seeds] == [str(step["seed"]) for step in steps]
    for seed, step in zip(seeds, steps, strict=True):
        assert sorted(kgw.green_tokens(seed).tolist()) == step["greenlist"]
    u = keyed_uniforms(inputs["context"], gumbel).numpy()
    np.testing.assert_allclose(u, [step["u"] for step in steps], rtol=0, atol=within["u"])


def test_tokens_and_laws(data: dict[str, Any]) -> None:
    inputs, steps, within = data["inputs"], data["outputs"]["steps"], data["tolerance"]
    logits = torch.tensor(inputs["logits"], dtype=torch.float64)
    how = {"temperature": inputs["temperature"], "top_p": inputs["top_p"]}
    gumbel = draw_tokens(logits, inputs["context"], mark_of(inputs, "gumbel"), **how)
    assert gumbel.tolist() == [step["gumbel_token"] for step in steps]
    law = token_law(logits, inputs["context"], mark_of(inputs, "randomised"), **how).exp().numpy()
    want = np.array([step["randomised_probs"] for step in steps])
    np.testing.assert_allclose(law, want, rtol=0, atol=within["randomised_probs"])
    plain = Watermark(inputs["V"], gamma=1.0)
    nucleus = token_law(logits, inputs["context"], plain, **how).isfinite().sum(dim=-1)
    assert nucleus.tolist() == [step["nucleus_size"] for step in steps]


def test_p_values(data: dict[str, Any]) -> None:
    inputs, want, within = data["inputs"], data["outputs"]["detect"], data["tolerance"]
    green = green_count_test(inputs["green_counts"], inputs["T"], inputs["gamma"])
    scores = score_sum_test(inputs["gumbel_scores"], inputs["T"])
    found = {
        "kgw_z": (green.z, within["z"]),
        "kgw_p_binom": (green.p_value, within["p"]),
        "kgw_p_normal": (green.p_normal, within["p"]),
        "gumbel_p_gamma": (scores.p_value, within["p"]),
    }
    assert set(found) == set(want)
    for name, (values, atol) in found.items():
        np.testing.assert_allclose(values, want[name], rtol=0, atol=atol, err_msg=name)


def test_counting_once(data: dict[str, Any]) -> None:
    inputs, within = data["inputs"], data["tolerance"]
    for dedup, want in data["outputs"]["dedup"].items():
        texts = [inputs["dedup"]["ids"]]
        green = detect_texts(texts, mark_of(inputs, "kgw"), dedup=dedup)[0]
        score = detect_texts(texts, mark_of(inputs, "gumbel"), dedup=dedup)[0]
        assert (green.n_scored, score.n_scored) == (want["T"], want["T"])
        assert green.statistic == want["S"]
        assert score.statistic == pytest.approx(want["gumbel_score"], abs=within["gumbel_score"])


def test_expected_maxima(data: dict[str, Any]) -> None:
    found = expected_gain(data["inputs"]["n"])
    np.testing.assert_allclose(
        found, data["outputs"]["emax_normal"], rtol=0, atol=data["tolerance"]["emax"]
    )


def test_the_marginal_law_of_the_randomised_gumbel(golden: Golden) -> None:
    data = golden("13-modified-gumbel-marginal.json")
    outputs, within = data["outputs"], data["tolerance"]
    known = {"marginal", "expected_score_plain", "expected_score_randomised"}
    assert set(outputs) == known
    for i, p in enumerate(data["inputs"]["p"]):
        np.testing.assert_allclose(
            randomised_gumbel_marginal(p), outputs["marginal"][i], rtol=0,
            atol=within["marginal_integral"],
        )  # fmt: skip
        for name, score in (
            ("expected_score_plain", expected_gumbel_score(p)),
            ("expected_score_randomised", expected_randomised_score(p)),
        ):
            assert score == pytest.approx(outputs[name][i], abs=within[name])


def test_simulated_keys_agree(golden: Golden) -> None:
    """200,000 keys of three tokens: within the file's tolerance, 3 standard errors of its own."""
    data = golden("13-modified-gumbel-marginal.json")
    p, outputs, within = data["inputs"]["p"][2], data["outputs"], data["tolerance"]
    rng = np.random.default_rng(0)
    u = rng.random((200_000, 3))
    weights = u ** (1 / np.array(p))
    law = weights / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        law.mean(axis=0), outputs["marginal"][2], rtol=0, atol=within["marginal_simulated"]
    )
    scores = -np.log1p(-u)
    best = scores[np.arange(len(u)), weights.argmax(axis=1)].mean()
    drawn = (law * scores).sum(axis=1).mean()
    atol = within["expected_score_simulated"]
    assert best == pytest.approx(outputs["expected_score_plain"][2], abs=atol)
    assert drawn == pytest.approx(outputs["expected_score_randomised"][2], abs=atol)
