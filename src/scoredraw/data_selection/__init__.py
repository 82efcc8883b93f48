"""Which examples to train on, which to collect, and how sources should be mixed."""

from scoredraw.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "influence": "variance_of_gradients GradientSpread el2n prediction_errors forgetting pvi "
        "label_log_probabilities normalize_scores",
        "tracin": "grand tracin_self tracin_pairwise last_layer_gradient_norms last_layer_tracin",
        "selection": "prune draw_probabilities stratified similarity_index relative_efficiency "
        "trail_entropy entropy_average",
        "gradients": "input_gradients checkpoint_variance load_states per_sample_gradients "
        "squared_gradient_norms gradient_dots squared_linear_norms",
        "recorder": "TrainingDynamicsRecorder",
        "repeated_sampling": "RepeatedSampling rs2_schedule expected_coverage",
        "rounds": "ResampledSubset BernoulliRounds compressed_schedule subset_size",
        "example_selector": "ExampleSelector",
        "torch_sampler": "DrawSampler RepeatedRandomSampler RoundSampler BernoulliSubset "
        "epoch_callback install",
        "probe": "score_all",
        "representatives": "k_center facility_location herding k_means_centers uncertainty",
        "add_one_in": "add_one_in_examples LLMChooser LogprobChooser QualityDiversity "
        "label_quality letter_bias",
        "text_growth": "add_one_in_texts",
        "inverse_hessian": "inverse_hvp inverse_hessian_product",
        "influence_on_risk": "influence_on_risk effort_scores mean_gradient_ratio",
        "coverage_selection": "coverage_select combined_score cluster_select DEALRecSelector",
        "orthogonal_scores": "ODiSSelector",
        "principal_scores": "principal_scores PrincipalScores",
        "text_metrics": "text_metrics",
        "learning_curves": "fit_learning_curve LearningCurve",
        "collection_budget": "allocate Allocation",
        "fixed_allocations": "equal_allocation proportional_allocation uncertainty_allocation",
        "group_utilities": "group_utility",
        "adaptive_collection": "AdaptiveSampler",
        "budget_plan": "plan_budget",
        "likelihood_displacement": "ches_score predicting_mask last_hidden_similarity "
        "edit_distance_score likelihood_derivative filter_by_score",
        "preference_pairs": "score_preference_dataset ches_of_batch DisplacementTracker",
        "kronecker": "KFACFactors LayerFactors",
        "gradient_influence": "linear_influence linear_gradient_dots rademacher_projection",
        "cluster_bandit": "quad_select",
        "source_transport": "otdd_cost ot_with_source_gradient",
        "mixture_performance": "MixturePerformanceModel",
        "size_projection": "project_size",
        "projektor": "Projektor",
        "mixture_plan": "plan_mixture",
    },
)
