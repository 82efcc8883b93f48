"""Watermark processors and the detector against those of transformers, a step of 64 rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.contest import Contest, Limit
from scoredraw.language.watermark_detection import Detections, detect_texts
from scoredraw.language.watermarks import GreenListProcessor, KeyedDrawProcessor, Watermark


def watermarks(*, tiny: bool = False) -> Iterator[Contest | Limit]:
    """Contexts of one token, new in every call, so that nobody's cache helps; then a text's."""
    import torch
    from transformers import WatermarkDetector, WatermarkingConfig, WatermarkLogitsProcessor
    from transformers.models.llama import LlamaConfig

    rows, v, length = (4, 500, 20) if tiny else (64, 50_000, 200)
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, v, generator=source)
    green = GreenListProcessor(Watermark(v, seeding="lefthash"))
    gumbel = KeyedDrawProcessor(Watermark(v, "gumbel"))
    theirs = WatermarkLogitsProcessor(v, "cpu")
    fixed = torch.randint(v, (rows, 1), generator=source)

    def new() -> Any:
        return torch.randint(v, (rows, 1), generator=source)

    def same_scores(ours: Any, peer: Any) -> None:
        assert (green(fixed, logits) == theirs(fixed, logits)).all()
        assert ours.shape == peer.shape

    def one_token(ours: Any, peer: Any) -> None:
        assert (ours.isfinite().sum(dim=-1) == 1).all()
        assert ours.shape == peer.shape

    size, peer = f"{rows} x {v:,}, new contexts", "transformers, green lists"
    yield Contest(
        f"a step with green lists, {size}", peer, lambda: green(new(), logits),
        lambda: theirs(new(), logits), same_scores, 1.0,
    )  # fmt: skip
    yield Contest(
        f"a step of the Gumbel watermark, {size}", peer, lambda: gumbel(new(), logits),
        lambda: theirs(new(), logits), one_token, 1.0,
    )  # fmt: skip
    config = LlamaConfig(vocab_size=v, bos_token_id=0)
    detector = WatermarkDetector(config, "cpu", WatermarkingConfig(), True)
    # a few hundred frequent tokens, as in a text: both remember green lists
    texts = (v ** np.random.default_rng(0).random((rows, length)) - 1).astype(np.int64)
    texts[:, 0] = 1  # a start token would not be scored there
    mark = Watermark(v, seeding="lefthash")

    def same_counts(ours: Detections, peer: Any) -> None:
        assert ours.statistic.tolist() == peer.num_green_tokens.tolist()
        np.testing.assert_allclose(ours.z, peer.z_score, rtol=1e-9)

    yield Contest(
        f"green tokens of {rows} texts of {length}", "transformers, WatermarkDetector",
        lambda: detect_texts(list(texts), mark),
        lambda: detector(torch.from_numpy(texts), return_dict=True), same_counts, 1.0, repeats=2,
    )  # fmt: skip
