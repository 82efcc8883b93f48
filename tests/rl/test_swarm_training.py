"""Rounds in a swarm: laws of the update, the runner, language models, TRL."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from scoredraw.errors import InputError
from scoredraw.papers import p30_sapo
from scoredraw.rl.policy_loss import clipped_policy_loss
from scoredraw.rl.rollout_groups import RolloutGroup
from scoredraw.rl.swarm_buffer import GroupScores, SwarmBuffer, select_groups
from scoredraw.rl.swarm_training import (
    CausalPolicy,
    SAPORunner,
    SwarmBatch,
    swarm_grpo_trainer,
    swarm_policy_loss,
    truncated_importance_weights,
)
from scoredraw.rl.swarm_transports import InMemory, MemoryHub

pytestmark = pytest.mark.contract

MIXED = [1.0, 0.0, 0.0, 1.0]


def equal(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def group(name: str, rewards: list[float] = MIXED, **more: Any) -> RolloutGroup:
    return RolloutGroup(name, ["yes" if r else "no" for r in rewards], "yes", **more)


def tokens(B: int = 6, T: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    new, old = torch.randn(2, B, T, generator=g, dtype=torch.float64) / 2
    mask = torch.rand(B, T, generator=g) < 0.7
    mask[:, 0] = True
    A = torch.randn(B, generator=g, dtype=torch.float64)
    return {"logp": new, "old_logp": old, "advantages": A, "mask": mask}


# ── the update ──────────────────────────────────────────────────────────────────────────────────


def test_without_clamp_and_weights_it_is_the_clipped_loss() -> None:
    given = tokens()
    ours = swarm_policy_loss(**given, clamp=math.inf)
    theirs = clipped_policy_loss(**given, eps_low=0.2, eps_high=0.28)
    torch.testing.assert_close(ours, theirs)


def test_the_clamp_is_a_tokens_and_its_gradient_is_zero_beyond() -> None:
    logp = torch.tensor([[4.0, 0.1]], requires_grad=True)
    loss, _ = swarm_policy_loss(logp, torch.zeros(1, 2), -torch.ones(1), torch.ones(1, 2))
    loss.backward()
    assert loss.item() == pytest.approx((10 + math.exp(0.1)) / 2)
    assert logp.grad is not None
    assert logp.grad[0].tolist() == pytest.approx([0.0, math.exp(0.1) / 2])


def test_a_row_of_weight_zero_is_as_if_absent() -> None:
    given = tokens()
    weights = torch.tensor([1.0, 0, 1, 1, 0, 1])
    some = {name: value[weights > 0] for name, value in given.items()}
    torch.testing.assert_close(
        swarm_policy_loss(**given, weights=weights), swarm_policy_loss(**some)
    )
    assert swarm_policy_loss(**given, weights=0 * weights).loss == 0


def test_a_peer_that_echoes_leaves_the_gradient() -> None:
    """J = I groups that are one's own again: the token mean has every token twice."""
    given = tokens()
    grads = []
    for times in (1, 2):
        logp = given["logp"].clone().requires_grad_()
        rest = {k: torch.cat([v] * times) for k, v in given.items() if k != "logp"}
        swarm_policy_loss(torch.cat([logp] * times), **rest).loss.backward()
        grads.append(logp.grad)
    torch.testing.assert_close(*grads)


def test_the_divergence_is_added_and_is_zero_at_the_reference() -> None:
    given = tokens()
    plain = swarm_policy_loss(**given).loss
    same = swarm_policy_loss(**given, ref_logp=given["logp"], beta=0.3).loss
    assert torch.equal(plain, same)
    away = given["old_logp"] - given["logp"]
    m = given["mask"]
    k3 = ((away.exp() - away - 1) * m).sum() / m.sum()
    found = swarm_policy_loss(**given, ref_logp=given["old_logp"], beta=0.3).loss
    torch.testing.assert_close(found, plain + 0.3 * k3)


def test_importance_weights_correct_up_to_the_cap() -> None:
    """Σ q min(cap, p/q) f = Σ p f where nothing is cut; silent senders count one."""
    p, q = torch.tensor([0.2, 0.5, 0.3]).log(), torch.tensor([0.4, 0.3, 0.3]).log()
    w = truncated_importance_weights(p, q, cap=2.0)
    torch.testing.assert_close(q.exp() * w, p.exp())
    assert truncated_importance_weights(p, q, cap=1.2).max().item() == pytest.approx(1.2)
    silent = torch.tensor([math.nan, -1e300, -0.1]).to(q)
    assert truncated_importance_weights(p, silent, cap=3.0).tolist()[:2] == pytest.approx([1, 3])


BAD_LOSS: list[tuple[dict[str, Any], str]] = [
    ({"clamp": 0.0}, "clamp: got 0.0"),
    ({"mask": torch.ones(2, 2)}, "mask: got"),
    ({"beta": 0.1}, "beta: got 0.1"),
    ({"beta": -1.0, "ref_logp": torch.zeros(6, 5)}, "beta: got -1.0"),
    ({"weights": torch.ones(5)}, r"weights: got \(5,\)"),
    ({"weights": -torch.ones(6)}, "weights: got"),
    ({"eps_low": 1.5}, "eps_low, eps_high: got"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_LOSS)
def test_bad_losses(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        swarm_policy_loss(**{**tokens(), **bad})


def test_bad_importance_weights() -> None:
    with pytest.raises(InputError, match="cap: got 0"):
        truncated_importance_weights(torch.zeros(1), torch.zeros(1), cap=0)
    with pytest.raises(InputError, match="both \\(B,\\)"):
        truncated_importance_weights(torch.zeros(1), torch.zeros(2))


# ── the round ───────────────────────────────────────────────────────────────────────────────────


def test_others_never_enter_our_statistics() -> None:
    ours = [(group("q"), np.array(MIXED)), (group("r"), np.array([0.2, np.nan, 0.4, 0.9]))]
    theirs = [(group("s", logprobs=[-1.0] * 4), np.array([9.0, -9.0, 100.0, 0.0]))]
    alone, both = SwarmBatch.of(ours), SwarmBatch.of(ours, theirs, 0.5)
    assert torch.equal(alone.advantages, both.advantages[:8])
    assert torch.equal(SwarmBatch.of(theirs).advantages, both.advantages[8:])
    assert both.external.tolist() == [False] * 8 + [True] * 4
    assert both.weights.tolist() == [1.0] * 5 + [0.0] + [1.0] * 2 + [0.5] * 4
    assert both.sender_logp[:8].isnan().all()
    assert both.sender_logp[8:].tolist() == [-1.0] * 4


class Node:
    """A runner of tabular answers, with what its policy step was given."""

    def __init__(self, hub: MemoryHub | None, name: str, seed: int = 0, **options: Any) -> None:
        rng = np.random.default_rng(seed)
        self.table = p30_sapo.TabularNode(p30_sapo.knowledge([(0, 1, 2)])[0], rng)
        self.seen: list[SwarmBatch] = []
        self.buffer = None if hub is None else SwarmBuffer(InMemory(hub), name)
        self.runner = SAPORunner(
            self.step, self.table.generate, p30_sapo.exact_match, self.buffer, rng=seed, **options
        )

    def step(self, batch: SwarmBatch) -> dict[str, int]:
        self.seen.append(batch)
        self.table.step(batch)
        return {"B": len(batch.prompts)}


def test_without_others_it_is_the_silo_bit_for_bit() -> None:
    """Whether a swarm is there to publish to or not, and with weight 0 for what comes from it."""
    hub = MemoryHub()
    crowd = Node(hub, "crowd", seed=5, n_local=6)
    nodes = [Node(None, "silo", n_external=0), Node(hub, "deaf", n_external=0),
             Node(hub, "heedless", n_external=3, external_weight=0.0)]  # fmt: skip
    for _ in range(20):
        crowd.runner.round()
        for node in nodes:
            node.runner.round()
    assert nodes[2].seen[-1].external.any()
    for node in nodes[1:]:
        assert np.array_equal(node.table.logits, nodes[0].table.logits)
    assert not np.array_equal(nodes[0].table.logits, p30_sapo.knowledge([(0, 1, 2)])[0])


def test_a_round_reports_what_it_did() -> None:
    hub = MemoryHub()
    a, b = Node(hub, "a", n_external=5), Node(hub, "b", seed=1)
    b.runner.round()
    record = a.runner.round()
    live = record.eligible
    assert (record.local, record.external, record.missing) == (4, live, 5 - live)
    assert record.metrics == {"B": 8 * (4 + live)}
    own = a.seen[0].rewards[~a.seen[0].external]
    assert record.reward == pytest.approx(float(own.mean()))
    assert len(a.runner.run(2)) == 2
    assert a.runner.rounds == 3


def test_groups_are_drawn_once_unless_reused() -> None:
    for reuse, want in ((False, [2, 0]), (True, [2, 2])):
        hub = MemoryHub()
        node = Node(hub, "a", n_external=9, reuse=reuse)
        peer = SwarmBuffer(InMemory(hub), "b")
        right, wrong = "0", "1"
        peer.publish([RolloutGroup(f"skill {k}", [right, wrong], "0") for k in range(2)])
        assert [record.external for record in node.runner.run(2)] == want


def test_dead_groups_of_others_are_left_out_and_dead_rounds_make_no_step() -> None:
    hub = MemoryHub()
    peer = SwarmBuffer(InMemory(hub), "b")
    steps: list[SwarmBatch] = []
    own = [[group("q")], [group("q", [0.0] * 4)], [group("q", [1.0] * 4)]]
    runner = SAPORunner(
        lambda batch: steps.append(batch), lambda n: own[len(steps)], equal,
        SwarmBuffer(InMemory(hub), "a"), 1, 2, selection="uniform",
    )  # fmt: skip
    peer.publish([group("dead", [1.0] * 4), group("dead too", [0.0] * 4)])
    first, second = runner.run(2)
    assert (first.external, first.stepped) == (0, True)
    assert (second.external, second.stepped, second.missing) == (0, False, 2)
    assert len(steps) == 1


def test_only_chosen_groups_are_published() -> None:
    hub = MemoryHub()
    node = Node(hub, "a", n_external=0, choose=lambda groups: groups[:1])
    peer = SwarmBuffer(InMemory(hub), "b")
    node.runner.round()
    assert peer.collect() == 1


BAD_RUNNER: list[tuple[dict[str, Any], str]] = [
    ({"n_local": 0}, "n_local: got 0"),
    ({"n_external": -1}, "n: got -1"),
    ({"n_external": 1}, "buffer: got None"),
    ({"selection": "best"}, "selection: got 'best'"),
    ({"external_weight": -1.0}, "external_weight: got -1.0"),
    ({"external_weight": math.nan}, "external_weight: got nan"),
    ({"reward_fn": None}, "reward_fn: got NoneType"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_RUNNER)
def test_bad_runners(bad: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"policy_step": len, "generate": list, "reward_fn": equal}
    with pytest.raises(InputError, match=message):
        SAPORunner(**{**good, "n_external": 0, **bad})


@pytest.mark.parametrize("selection", ["top_reward", "nonzero_uniform", "uniform"])
def test_the_experiments_choice_is_the_librarys(selection: str) -> None:
    """For one node of four: the same groups where no lot decides, the same pool where one does."""
    rng = np.random.default_rng(0)
    local = 3
    for _ in range(30):
        r = (rng.random((1, 4, local, 8)) < rng.choice([0.0, 0.3, 1.0], (1, 4, local, 1))) * 1.0
        skill = rng.random((1, 4, 9)).argsort(axis=2)[..., :local]
        found, live = p30_sapo.choose(r, r, skill, 5, selection, rng)
        others = np.arange(local, 4 * local)  # all but the first node's
        scores = GroupScores.of(
            list(r.reshape(-1, 8)[others]), [str(k // local) for k in others],
            [str(s) for s in skill.reshape(-1)[others]],
        )  # fmt: skip
        want = others[select_groups(scores, 5, selection, rng)]
        got = found[0, 0][live[0, 0]]
        assert len(got) == len(want)
        assert got.min(initial=99) >= local
        if selection == "top_reward":
            assert set(got) == set(want)
        if selection == "nonzero_uniform":
            assert all(0 < r.reshape(-1, 8)[k].sum() < 8 for k in got)


# ── language models ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def policy(new_policy: Callable[[], Any], letters: Any) -> Callable[..., CausalPolicy]:
    def make(**options: Any) -> CausalPolicy:
        model = new_policy()
        adam = torch.optim.Adam(model.parameters(), lr=3e-3)
        return CausalPolicy(model, letters, adam, **{"max_new_tokens": 4, **options})

    return make


def vowels(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(c.count(v) for v in "aeiou")) for c in completions]


def test_a_language_model_learns_from_what_others_wrote(
    policy: Callable[..., CausalPolicy],
) -> None:
    """Foreign groups alone carry the signal; texts without tokens do no harm."""
    one = policy(epochs=2, minibatch=None)
    silent = (RolloutGroup("1+1=", ["b", "b"]), np.zeros(2))
    telling = (RolloutGroup("1+1=", ["aa", "", "bb"]), np.array([1.0, 0.0, 0.0]))

    def likes() -> float:
        batch = SwarmBatch.of([(RolloutGroup("1+1=", ["aa", "bb"]), np.zeros(2))])
        ids, attention, mask, _ = one._tokens(batch)
        with torch.no_grad():
            logp = (one._logp(ids, attention) * mask).sum(dim=1)
        return float(logp[0] - logp[1])

    before = likes()
    found = one(SwarmBatch.of([silent], [telling]))
    assert (found["answers"], found["no_tokens"]) == (4.0, 1.0)
    assert likes() > before
    assert one(SwarmBatch.of([(RolloutGroup("q", ["", ""]), np.array([0.0, 1.0]))])) == {
        "answers": 0.0, "no_tokens": 2.0,
    }  # fmt: skip


def test_old_log_probabilities_are_ones_own_so_that_the_first_step_is_not_clipped(
    policy: Callable[..., CausalPolicy],
) -> None:
    """ρ = 1: the loss is minus the mean advantage of the tokens, whoever wrote the answers."""
    one = policy(minibatch=None)
    groups = [(RolloutGroup("1+1=", ["ab", "c"]), np.array([1.0, 0.0]))]
    batch = SwarmBatch.of(groups, groups)
    found = one(batch)
    counts = torch.tensor([3.0, 2, 3, 2]).double()  # the letters and the end
    want = -(batch.advantages * counts).sum() / counts.sum()
    assert found["loss"] == pytest.approx(float(want), abs=1e-6)
    assert found["clip_fraction"] == 0


def test_importance_weights_reach_the_update(policy: Callable[..., CausalPolicy]) -> None:
    """A sender that claims to have been sure makes its answers count next to nothing."""
    ours = [(RolloutGroup("1+1=", ["ab", "c"]), np.array([1.0, 0.0]))]
    theirs = (RolloutGroup("1+1=", ["de", "f"], logprobs=[0.0, 0.0]), np.array([0.0, 1.0]))
    alone = policy(minibatch=None)(SwarmBatch.of(ours))["loss"]
    for cap, near in ((1.0, True), (None, False)):
        found = policy(minibatch=None, importance_cap=cap)(SwarmBatch.of(ours, [theirs]))
        assert (abs(found["loss"] - alone) < 1e-3) == near


def test_a_node_of_language_models(policy: Callable[..., CausalPolicy]) -> None:
    hub = MemoryHub()
    runners = []
    for name in "ab":
        one = policy(minibatch=4)

        def generate(n: int, one: CausalPolicy = one) -> list[RolloutGroup]:
            prompts = [f"{k}+{k}=" for k in range(n)]
            return [
                RolloutGroup(p, a) for p, a in zip(prompts, one.answers(prompts, 4), strict=True)
            ]

        buffer = SwarmBuffer(InMemory(hub), name)
        runners.append(SAPORunner(one, generate, vowels, buffer, 3, 2, rng=0))
    torch.manual_seed(0)
    records = [runner.round() for _ in range(3) for runner in runners]
    assert sum(record.external for record in records) > 0
    assert all(math.isfinite(r.metrics["loss"]) for r in records if r.stepped)


BAD_POLICY = [{"max_new_tokens": 0}, {"epochs": 0}, {"minibatch": 0}, {"temperature": 0.0},
              {"importance_cap": 0.0}]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_POLICY)
def test_bad_policies(policy: Callable[..., CausalPolicy], bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(bad))}: got"):
        policy(**bad)


# ── TRL ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def train(letters: Any, new_policy: Callable[[], Any], grpo_config: Callable[..., Any]) -> Any:
    from datasets import Dataset

    rows = [{"prompt": f"{a}+{a}=", "answer": str(2 * a)} for a in range(8)]

    def run(kind: Any, reward: Any = vowels, **options: Any) -> dict[str, torch.Tensor]:
        trainer = kind(
            model=new_policy(), reward_funcs=reward, args=grpo_config(num_iterations=2),
            train_dataset=Dataset.from_list(rows), processing_class=letters, **options,
        )  # fmt: skip
        trainer.train()
        return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}

    return run


def test_trl_trains_on_others_rows_and_publishes_its_own(train: Any) -> None:
    """Batches of 2 groups of 4: the last is a peer's, with its own prompt, answer and column."""
    hub = MemoryHub()
    peer, node = SwarmBuffer(InMemory(hub), "peer"), SwarmBuffer(InMemory(hub), "node")
    seen: list[tuple[list[str], list[str], list[str]]] = []

    def reward(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float]:
        seen.append((prompts, completions, answer))
        return vowels(completions)

    theirs = [RolloutGroup(f"q{k}", ["aa", "b", "a", "bb", "unused"], f"r{k}") for k in range(5)]
    peer.publish([*theirs, RolloutGroup("short", ["a", "b"]), RolloutGroup("empty", ["a", ""] * 2)])
    found = train(swarm_grpo_trainer, reward, buffer=node, reward_fn=vowels, n_external=9, rng=0)
    prompts, completions, answer = seen[0]
    assert len(prompts) == 8
    if prompts[-1].startswith("q"):
        assert completions[4:] == ["aa", "b", "a", "bb"]
        assert answer[4:] == [f"r{prompts[-1][1]}"] * 4
    assert any(p[-1].startswith("q") for p, _, _ in seen)
    assert len(set(prompts[:4])) == 1
    assert peer.collect() == node.counts["published"] >= 1
    alone = train(swarm_grpo_trainer, buffer=SwarmBuffer(InMemory(MemoryHub())), reward_fn=vowels)
    assert any(not torch.equal(found[name], alone[name]) for name in found)


def test_trl_without_a_swarm_is_trl_bit_for_bit(train: Any) -> None:
    from scoredraw.rl.swarm_buffer import swarm_advantages
    from scoredraw.rl.trainer import AdvantageGRPOTrainer

    empty = SwarmBuffer(InMemory(MemoryHub()))
    ours = train(swarm_grpo_trainer, buffer=empty, reward_fn=vowels)
    theirs = train(
        AdvantageGRPOTrainer, advantage_fn=lambda r: swarm_advantages(r.reward, r.group_ids)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
