"""The methods of `train policy`: what each makes, that TRL takes it, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from scoredraw import registry
from scoredraw.errors import InputError
from scoredraw.papers.small_policy import new_tokenizer
from scoredraw.rl.group_advantages import GROUP_METHODS
from scoredraw.rl.policy_training import PolicyMethod
from scoredraw.rl.reward_functions import load_reward
from scoredraw.rl.trainer import AdvantageGRPOTrainer, Rollouts

pytestmark = pytest.mark.contract

NAMES = [method.name for method in registry.methods("policies")]
TWICE = {"ngrpo", "dapo"}  # a clip of their own
TEXTS = ["2+2=4\n4-1=3\n#3", "2+2=5\n5-1=4\n#4", "2+2=4\n4-1=5\n#5", "2+2=4\n4-1=2\n#2",
         "#7", "#1", "#2", "#7"]  # fmt: skip
SOLVED = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return new_tokenizer()


def made(name: str, **options: Any) -> PolicyMethod:
    method: PolicyMethod = registry.resolve(registry.method("policies", name).function)(**options)
    return method


def rollouts(tokenizer: Any, rewards: list[float], **columns: list[Any]) -> Rollouts:
    """Two groups of four answers, the second all wrong unless the rewards say else."""
    batch = tokenizer(TEXTS, padding=True, padding_side="right", return_tensors="pt")
    reward = torch.tensor(rewards)
    return Rollouts(
        reward=reward, rewards=reward[:, None], group_ids=torch.arange(8) // 4,
        completion_ids=batch["input_ids"], mask=batch["attention_mask"].bool(),
        prompts=["2+2-1="] * 8, completions=TEXTS, columns=columns, step=0, num_generations=4,
    )  # fmt: skip


def credit(
    method: PolicyMethod, tokenizer: Any, rewards: list[float] = SOLVED, **columns: Any
) -> Any:
    assert method.advantage is not None
    return method.advantage(tokenizer)(rollouts(tokenizer, rewards, **columns))


def test_all_are_in_the_catalogue() -> None:
    assert len(NAMES) == len(set(NAMES)) == 17
    functions = {registry.method("policies", name).function for name in NAMES}
    assert functions == {f"scoredraw.rl.policy_methods:{name.replace('-', '_')}" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_trl_takes_the_options(name: str, grpo_config: Callable[..., Any]) -> None:
    method = made(name)
    config = grpo_config(**method.options)
    for option, value in method.options.items():
        assert getattr(config, option) == value
    assert config.num_iterations == (2 if name in TWICE else 1)
    trainer: Any = load_reward(method.trainer)
    assert issubclass(trainer, AdvantageGRPOTrainer)
    if method.trainer_options is not None:
        known = {"stage_steps", "rollout_func", "max_batches"}
        assert set(method.trainer_options(10)) <= known


GROUPS = [n for n in NAMES if n.replace("-", "_") in GROUP_METHODS and n != "grpo"] + ["win-rate"]


@pytest.mark.parametrize("name", [*GROUPS, "tempo", "pure"])
def test_advantages_of_a_small_batch(name: str, tokenizer: Any) -> None:
    found = credit(made(name), tokenizer)
    found, kept = found if isinstance(found, tuple) else (found, torch.ones(8, dtype=torch.bool))
    mask = rollouts(tokenizer, SOLVED).mask
    assert found.shape == (mask.shape if name in {"tempo", "pure"} else (8,))
    assert kept.shape == (8,)
    assert found.isfinite().all()
    one = found if found.ndim == 1 else (found * mask).sum(dim=1)
    assert one[0] > one[1:4].max()  # the right answer over the wrong ones, or theirs are 0
    if name in {"ngrpo", "nsr", "w-reinforce", "reinforce-pp"}:  # all wrong, and yet something
        assert (one[4:] < 0).all()
    elif name != "pure":  # which looks at lines
        assert (one[4:] == 0).all()
    if name in {"dapo", "psr", "nsr"}:
        want = {"dapo": [1, 1, 1, 1, 0, 0, 0, 0], "psr": [1] + [0] * 7, "nsr": [0] + [1] * 7}
        assert kept.int().tolist() == want[name]


def test_who_samples_again() -> None:
    def batches(method: PolicyMethod) -> Any:
        assert method.trainer_options is not None
        return method.trainer_options(10).get("max_batches", 1)

    found = {name: batches(made(name)) for name in GROUPS if name != "win-rate"}
    assert found == dict.fromkeys(found, 1) | {"dapo": 10}
    assert batches(made("dapo", max_batches=1)) == 1
    assert batches(made("ngrpo", max_batches=4)) == 4


def test_tempo_credits_where_answers_part(tokenizer: Any) -> None:
    found: Tensor = credit(made("tempo"), tokenizer)
    line = TEXTS[0].index("4")  # where the second answer goes on with a 5
    assert found[0, line] > found[0, line - 1]
    assert found[1, line] < found[1, line - 1]
    off: Tensor = credit(made("tempo", variant="grpo"), tokenizer)
    assert off[0, line] == off[0, line - 1] == found[0, line - 1]


def test_pure_reads_lines(tokenizer: Any) -> None:
    """In the first group only the first answer has no wrong line; outcomes come beside that."""
    alone: Tensor = credit(made("pure", outcome=False, whitened=False), tokenizer)
    both: Tensor = credit(made("pure", whitened=False), tokenizer)
    assert alone[0, 0] > 0 > alone[1, 0]
    assert (both - alone)[0, 0] == pytest.approx(1.0)  # 1 less the others' mean of 0
    assert (both - alone)[1, 0] == pytest.approx(-1 / 3)
    assert (both - alone)[4:].abs().max() == 0
    summed: Tensor = credit(made("pure", outcome=False, credit="sum", whitened=False), tokenizer)
    end = len(TEXTS[1]) - 1  # of a line that is true, after one that is not
    assert summed[1, end] > 0.5 > 0.1 > alone[1, end]
    own = made("pure", scorer=lambda prompts, steps, **_: [[0.0] * len(s) for s in steps])
    assert credit(own, tokenizer, [0.0] * 8).abs().max() == 0


def test_portool_credits_steps(tokenizer: Any) -> None:
    """Two answers to a question that part at the second step; each step ends at a newline."""
    ends = [[5, 11], [5, 11], [5, 11], [5, 11], [0], [0], [0], [0]]
    paths = [[0, 1], [0, 2], [0, 3], [0, 4], [0], [1], [2], [3]]
    forms = [[0.0] * len(path) for path in paths]
    found: Tensor = credit(
        made("portool"), tokenizer, step_path=paths, step_ends=ends, step_formats=forms
    )
    assert found.shape == rollouts(tokenizer, SOLVED).mask.shape
    assert found[0, 11] > found[0, 5] > found[1, 5] > found[1, 11]
    assert (found[4:] == 0).all()


def test_grpo_in_passes() -> None:
    assert made("grpo") == PolicyMethod()
    assert made("grpo", passes=2) == PolicyMethod(options={"num_iterations": 2})


def test_rlcr_rewards() -> None:
    method = made("rlcr", format="ta", weights=(0.5, 0.5, 0.0))
    assert method.advantage is None
    assert method.rewards is not None
    (reward,) = method.rewards(lambda **_: [None])
    text = "<think>2+2</think><answer>4</answer>"
    assert reward(prompts=["?"], completions=[text], answer=["4"])[0] is not None


def test_stages_of_score() -> None:
    method = made("score", first=0.25, alpha=5.0, correction_prompt="Again:")
    assert method.trainer_options is not None
    want = {"stage_steps": (2, 6), "alpha": 5.0, "correction_prompt": "Again:"}
    assert dict(method.trainer_options(8)) == want


def test_winning_by_a_margin(tokenizer: Any) -> None:
    close = [0.0, 0.1, 0.2, 0.3] * 2
    assert (credit(made("win-rate", margin=0.5), tokenizer, close) == 0).all()
    won = credit(made("win-rate", clamp=0.5), tokenizer, close)
    assert won.abs().max() == 0.5


def test_relevance_from_an_encoder(tiny_model: str) -> None:
    method = made("r3", encoder=tiny_model, max_new_tokens=100)
    assert method.rewards is not None
    (reward,) = method.rewards(lambda **_: [None])
    asked = {"prompts": ["a b?"] * 2, "completions": ["a b", ""], "qtype": ["OPENENDED"] * 2}
    found = reward(**asked, reference=[None, None])
    assert found[0] is not None
    assert found[1] == 0.0
    nowhere = made("r3", encoder="no/where").rewards
    assert nowhere is not None
    with pytest.raises(InputError, match="encoder: cannot load 'no/where': "):
        nowhere(lambda **_: [None])


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"^options: got nope, want some of [^\n]+$"):
        made(name, nope=1)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("grpo", {"passes": 0}, "passes: got 0, want 1 or more"),
        ("grpo", {"passes": "two"}, "passes: got 'two', want such as 1"),
        ("ngrpo", {"num_virtual": "two"}, "num_virtual: got 'two', want such as 1"),
        ("ngrpo", {"num_virtual": None}, "num_virtual: got None, want such as 1"),
        ("ngrpo", {"num_virtual": 1.5}, "num_virtual: got 1.5, want such as 1"),
        ("ngrpo", {"num_virtual": -1}, "num_virtual: got -1, want 0 or more"),
        ("ngrpo", {"max_reward": True}, "max_reward: got True, want such as 1.0"),
        ("rloo", {"estimator": "grpo"}, "options: got estimator, want some of"),
        ("dapo", {"filter": "odd"}, "filter: got 'odd', want none, all_correct"),
        ("dapo", {"max_batches": 0}, "max_batches: got 0, want 1 or more"),
        ("ngrpo", {"max_batches": "many"}, "max_batches: got 'many', want such as 1"),
        ("w-reinforce", {"positive_weight": -1}, "positive_weight: got -1"),
        ("tempo", {"lam": "1"}, "lam: got '1', want such as 0.0"),
        ("tempo", {"variant": "odd"}, "variant: got 'odd'"),
        ("pure", {"outcome": 0}, "outcome: got 0, want such as True"),
        ("pure", {"temperature": "cold"}, "temperature: got 'cold', want such as 0.1"),
        ("pure", {"kl_coef": 0.1}, "options: got kl_coef, want some of"),
        ("pure", {"scorer": "nowhere:score"}, "reward: got 'nowhere:score', want"),
        ("rlcr", {"format": "odd"}, "format: got 'odd'"),
        ("rlcr", {"percent": "yes"}, "percent: got 'yes', want such as False"),
        ("score", {"first": 1.5}, "first: got 1.5, want a share of the steps"),
        ("score", {"stage_steps": (1, 1)}, "options: got stage_steps, want some of"),
        ("score", {"attempts": "2"}, "attempts: got '2', want such as 2"),
        ("win-rate", {"margin": -1}, "margin: got -1, want 0 or more"),
        ("win-rate", {"clamp": "5"}, "clamp: got '5', want such as 5.0"),
        ("r3", {"off": "nothing"}, "off: got nothing, want some of"),
        ("chi2-penalty", {"kind": "odd"}, "kind: got 'odd'"),
        ("chi2-penalty", {"coef": "1"}, "coef: got '1', want such as 0.05"),
        ("portool", {"gamma": "1"}, "gamma: got '1', want such as 0.95"),
    ],
)
def test_bad_options_are_one_line(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        made(name, **options)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"credit": "odd"}, {"baseline": "odd"}, {"temperature": 0}])
def test_what_pure_refuses_once_there_is_a_tokenizer(
    tokenizer: Any, options: dict[str, Any]
) -> None:
    method = made("pure", **options)
    assert method.advantage is not None
    with pytest.raises(InputError, match=f"^{next(iter(options))}: got"):
        method.advantage(tokenizer)
