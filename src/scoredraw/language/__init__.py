"""Sampling a language model, and choosing among its answers."""

from scoredraw.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "coverage": "pass_at_k plug_in_coverage coverage_curve CoverageCurve fit_power_law "
        "fit_beta_binomial extrapolate_coverage ExtrapolatedCoverage curve_shift CurveShift",
        "coverage_models": "PowerLaw BetaBinomial",
        "inference_cost": "flops_per_token inference_flops api_price cost_to_reach ReachCost",
        "coverage_audit": "audit_coverage CoverageAudit Replay",
        "selection": "uniform uniform_answered majority_vote best_of_n weighted_vote likeliest "
        "likeliest_in_all probability_vote total_probability_vote standing",
        "selection_curves": "select_at_k accuracy_at_k SelectionCurve",
        "perplexity_consistency": "rpc_confidence answer_confidence AnswerConfidence "
        "prune_reasoning perplexity_consistency pruned_consistency",
        "weibull_mixture": "fit_weibull_mixture fit_weibull_mixtures WeibullMixture",
        "answer_calibration": "calibration_metrics calibration_at_k CalibrationCurve reliability",
        "estimation_error": "vote_error path_error consistency_error model_error",
    },
)
