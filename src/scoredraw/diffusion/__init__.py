"""Diffusion: the score is the gradient of log p; schedules, samplers, steering, masks, graphs."""

from scoredraw.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "schedules": "NoiseSchedule VariancePreserving LinearBeta SubVariancePreserving Cosine "
        "OrnsteinUhlenbeck DiscreteAlphas VarianceExploding LinearFlow EndPoints",
        "time_grids": "time_grid checked_times",
        "parameterisations": "to_eps to_x0",
        "gaussian_mixtures": "GaussianMixtureScore",
        "integrator_coefficients": "deis_coefficients runge_kutta_coefficients Tableau TABLEAUX "
        "VARIANTS",
        "deis": "DEISSolver DEISState",
        "deis_scheduler": "DEISScheduler",
        "gaussian_score": "GaussianScore AnalyticScore edm_schedule",
        "score_models": "isotropic_score EmpiricalScore LowRankMixtureScore fit_mixture",
        "teleportation": "Teleport teleport_sample sampling_times teleport_by_class "
        "explained_variance score_explained_variance ExplainedVariance",
        "teleport_scheduler": "TeleportScheduler",
        "feynman_kac": "Target rates ramp autograd",
        "weighted_sampling": "WeightedSampler WeightedSample Particles descend",
        "guidance_bias": "gaussian_target normalisable variance_factor bias_table",
        "corrected_guidance": "GuidanceCorrector",
        "mask_schedules": "mask_schedule MaskSchedule LinearMasking CosineMasking "
        "PolynomialMasking GeometricMasking CustomMasking",
        "masked_diffusion": "AncestralSampler OrderedSampler ConfidenceSampler MaskedSample "
        "masked_language_model",
        "first_hitting": "FirstHittingSampler hitting_times first_hitting_law ancestral_law "
        "masked_sampler generate_tokens",
        "low_precision": "sample_categorical truncated_categorical_probs grid_categorical_probs "
        "effective_temperature",
        "masked_likelihood": "masked_nelbo exact_nelbo MaskedLikelihood",
        "kernel_regression": "ntk_relu SpectralRegression rwy_stopping_step discrepancy_step "
        "WideNetwork",
        "tree_sampling": "DiffusionTree tree_sample",
        "tree_proposals": "MarkovChain diffusion_chain token_chain masked_chain",
        "pipeline_chains": "pipeline_chain latent_chain latent_images",
        "steering_baselines": "weighted_rollouts particle_steering twisted_steering "
        "guided_rollouts",
        "states": "EpsFunction",
        "solver_schedules": "SolverSchedule StepDecision Taylor solver_preset step_times",
        "unified_solver": "UnifiedSolver UnifiedState SolutionError",
        "schedule_search": "search_schedule ScheduleSearch SearchSpace SearchResult",
        "unified_scheduler": "UnifiedScheduler",
        "time_shift": "time_shift TimeShift TimeShiftSampler search_shift",
        "pseudo_numerical": "PseudoNumericalSampler by_time",
        "exposure_bias": "epsilon_scaling variance_normalise variance_gap",
        "time_shift_scheduler": "TimeShiftScheduler",
        "flow_inversion": "invert_autoregressive Inversion SegmentPlan block_metrics "
        "plan_strategy plan_from_notation fixed_point_residual check_causal",
        "tarflow": "TarFlow TarFlowBlock TarFlowShape Guidance load_flow save_flow",
        "flow_training": "train_tarflow",
        "graph_system": "GraphSDESystem GraphMixtureScore score_matching_loss",
        "graph_sampling": "sample_graphs GraphSolver GraphSample",
        "graph_networks": "ScoreNetworkX ScoreNetworkA Training train_scores GraphScores "
        "load_graph_scores generate_graphs",
        "graph_metrics": "graph_mmd orbit_counts",
        "graph_arrays": "from_networkx to_networkx one_hot_degrees quantize_adjacency "
        "molecule_validity",
        "image_models": "ImageModel open_image_model fashion_classifier",
        "score_regression": "NTKScoreEstimator GaussianScoreEstimator MLPScoreEstimator",
    },
)
