"""Rows of a matrix: leverage, Lewis weights, lp sensitivities, and samples that keep ‖Ax‖_p."""

from scoredraw.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "leverage": "leverage_scores ridge_leverage_scores whitening",
        "sketching": "approximate_lewis_weights countsketch gaussian_sketch osnap sketch_size "
        "sketched_leverage srht",
        "online": "OnlineSampler online_leverage",
        "lewis": "lewis_weights",
        "certified": "LewisCertificate convex_lewis_weights lewis_certificate",
        "sensitivities": "lp_sensitivities",
        "approximate": "approximate_sensitivities block_sensitivities total_sensitivity",
        "combined": "leverage_bounds lewis_bounds root_leverage root_leverage_scores sample_size "
        "sensitivity_lower_bounds sensitivity_plus_leverage sensitivity_upper_bounds "
        "split_copies split_rows split_scores total_bounds",
        "streaming": "ChunkBlocks MergeReduce score_stream",
        "distortion": "embedding_distortion embedding_distortions",
        "estimator": "LpRowSampler",
    },
)
