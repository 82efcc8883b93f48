"""Post-training from rewards: advantages, credit for tokens, rewards that resist hacking."""

from scoredraw.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "group_advantages": "group_advantages keep_groups overlong_penalty GroupAdvantage",
        "generalized_advantage": "generalized_advantages",
        "reward_groups": "group_rewards virtual_sample centre scale chain to_tokens",
        "policy_loss": "clipped_policy_loss PolicyLoss",
        "token_credit": "at_step_ends over_steps returns_to_go whiten",
        "reward_functions": "GuardedReward completion_text",
        "trainer": "AdvantageGRPOTrainer Rollouts",
        "policy_training": "train_policy PolicyMethod PolicyRun",
        "process_credit": "process_rewards min_form_rewards aggregate_steps split_steps",
        "process_advantages": "process_advantages ProcessAdvantage TokenClassifierScorer",
    },
)
