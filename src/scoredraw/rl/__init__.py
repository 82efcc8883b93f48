"""Post-training from rewards: advantages, credit for tokens, rewards that resist hacking."""

from scoredraw.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "reward_groups": "group_rewards virtual_sample centre scale chain to_tokens",
        "group_advantages": "group_advantages kept_answers overlong_penalty GroupAdvantage",
        "generalized_advantage": "generalized_advantage",
        "policy_loss": "clipped_policy_loss PolicyLoss",
        "token_credit": "at_step_ends over_steps returns_to_go whiten",
        "prefix_tree": "prefix_tree prefix_tree_values PrefixTree",
        "tempo": "tempo_advantages TempoAdvantage",
        "process_credit": "process_rewards min_form_rewards aggregate_steps split_steps",
        "process_advantages": "process_advantages ProcessAdvantage TokenClassifierScorer",
        "rollout_tree": "RolloutTree tree_rollout step_rewards portool_advantages",
        "tool_calls": "Tool ToolSandbox parse_step",
        "tool_policy": "ToolPolicy ToolTreeRollout PORToolAdvantage",
        "pairwise_rewards": "pairwise_win_rate score_win_rate bradley_terry combine_advantages "
        "CombinedAdvantage audit_score_gaps ScoreGapAudit",
        "pairwise_judge": "WinRateReward TextJudge",
        "flow_policy": "flow_sde_step flow_policy_loss",
        "prompt_tests": "prompt_test_scores",
        "relevance_reward": "R3Reward",
        "verbal_confidence": "read_stated confidence_vote confidence_ensemble",
        "calibrated_reward": "RLCRReward calibration_report wrong_on_purpose",
        "self_correction": "score_returns score_advantages self_correction_metrics",
        "self_correction_trainer": "SCoReTrainer",
        "divergences": "divergence chi2_divergence chi2_from_log_ratios kl_k1 kl_k3",
        "occupancy": "occupancy_penalty SequencePenaltyReward",
        "proxy_rewards": "proxy_correlation hacking_bound audit_proxy ProxyAudit",
        "tabular_control": "solve_regularized occupancy_measure",
        "tomato_world": "TomatoWorld",
        "rollout_groups": "RolloutGroup",
        "swarm_transports": "InMemory Directory Zenoh",
        "swarm_buffer": "SwarmBuffer",
        "swarm_training": "SAPORunner CausalPolicy",
        "swarm_node": "train_node",
        "reward_functions": "GuardedReward completion_text",
        "trainer": "AdvantageGRPOTrainer Rollouts",
        "policy_training": "train_policy PolicyMethod PolicyRun",
    },
)
