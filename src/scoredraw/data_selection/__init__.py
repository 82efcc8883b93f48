"""Which examples to train on: influence scores, their selection, and repeated random sampling."""

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
    },
)
