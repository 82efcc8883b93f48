"""Sampling a language model, and choosing among its answers."""

from typing import Any

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
        "submission": "submit_answers draw_softly TopK",
        "draw_answers": "draw_answers ChosenAnswers",
        "best_of_majority": "best_of_majority bom_threshold majority_of_the_bests soft_best_of_n",
        "passk_regret": "passk_regret regret_bounds coverage_coefficient",
        "minimum_bayes_risk": "minimum_bayes_risk expected_utility mbr_choice",
        "text_utilities": "chrf_matrix chrf embedding_cosine pairwise TextUtility",
        "hedged_sampling": "hedged_pool hedged_texts sample_pool hope_and_risk "
        "cross_language_evidence",
        "checklist_selection": "checklist_select",
        "iterative_deepening": "deepening_schedule trigger_count token_account DeepeningPlan "
        "SelfCorrection select_trace",
        "deepening_generation": "deepening_sample deepening_tokens deepening_texts",
        "cautious_decoding": "trial_counts cautious_decode CautiousPlan",
        "cautious_generation": "cautious_generate cautious_tokens cautious_texts",
        "punctuation": "punctuation_ids",
        "watermarks": "Watermark GreenListProcessor KeyedDrawProcessor token_law draw_tokens "
        "randomised_gumbel_marginal expected_gumbel_score",
        "watermark_detection": "detect detect_texts audit_watermark WatermarkAudit",
        "alignment_resampling": "watermarked_texts alignment_resample expected_gain ar_required_n",
        "text_methods": "MethodModel",
        "perplexity_consistency": "rpc_confidence answer_confidence AnswerConfidence "
        "prune_reasoning perplexity_consistency pruned_consistency",
        "weibull_mixture": "fit_weibull_mixture fit_weibull_mixtures WeibullMixture",
        "answer_calibration": "calibration_at_k CalibrationCurve",
        "estimation_error": "vote_error path_error consistency_error model_error",
    },
)


def small_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct as (model, tokenizer): `small_models.small_model`."""
    from scoredraw.small_models import small_model

    return small_model()
