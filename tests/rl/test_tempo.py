"""TEMPO: its identities, its gradient, the shapes of bad input, and a real TRL run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scoredraw.errors import InputError
from scoredraw.papers.math_groups import math_groups
from scoredraw.rl.prefix_tree import prefix_tree
from scoredraw.rl.reward_groups import centre, chain, group_rewards, scale
from scoredraw.rl.tempo import (
    VARIANTS,
    TempoAdvantage,
    group_standing,
    tempo_advantages,
    token_changes,
)

pytestmark = pytest.mark.oracle

EOS = 9


@st.composite
def group(draw: st.DrawFn) -> tuple[list[list[int]], list[float]]:
    """Answers of two kinds of token that end with EOS, so many begin alike; rewards."""
    tokens = st.lists(st.integers(0, 1), max_size=6)
    rows = draw(st.lists(tokens, min_size=2, max_size=8))
    rewards = st.lists(st.integers(0, 3).map(float), min_size=len(rows), max_size=len(rows))
    return [[*row, EOS] for row in rows], draw(rewards)


def credit(rows: list[list[int]], rewards: Any, **how: Any) -> Tensor:
    """In float64 for one group."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    return tempo_advantages(rows, None, rewards, num_generations=len(rows), **how)


# ── identities ──────────────────────────────────────────────────────────────────────────────────


@given(group())
def test_the_identities(batch: tuple[list[list[int]], list[float]]) -> None:
    rows, rewards = batch
    G = len(rows)
    r = torch.tensor(rewards, dtype=torch.float64)
    tree = prefix_tree(rows, num_generations=G)
    standing = group_standing(r, num_generations=G)
    advantages, td = credit(rows, rewards), token_changes(tree, standing)
    values, kept = tree.means(standing), tree.counts()[:, 1:] > 0
    branch = tree.is_branch()
    leaf = torch.stack([values[i, len(row)] for i, row in enumerate(rows)])
    assert torch.allclose(values[:, 0], torch.zeros(G, dtype=r.dtype), atol=1e-12)
    assert torch.allclose(td.sum(dim=1), leaf, atol=1e-12)
    for i, row in enumerate(rows):
        if rows.count(row) == 1:
            assert leaf[i] == standing[i]
        twin = rows.index(row)
        assert torch.equal(advantages[i], advantages[twin]) or rewards[i] != rewards[twin]
        assert torch.allclose(td[i], td[twin], atol=1e-12)
    assert not td[~branch].any()  # exactly GRPO where nothing branches
    assert torch.equal(credit(rows, rewards, variant="grpo")[~branch], advantages[~branch])
    raw = tree.means(r)  # the second form of the equation
    second = r[:, None] - r.mean() + raw[:, 1:] - raw[:, :-1]
    want = torch.where(kept, second / (r.std() + 1e-8), 0.0)
    assert torch.allclose(advantages, want, atol=1e-12)


@given(group(), st.floats(-2, 2), st.sampled_from([0.0, 0.5, 1.0]))
def test_the_variants(batch: tuple[list[list[int]], list[float]], coef: float, lam: float) -> None:
    rows, rewards = batch
    tree = prefix_tree(rows, num_generations=len(rows))
    r = torch.tensor(rewards, dtype=torch.float64)
    standing = group_standing(r, num_generations=len(rows))
    kept, td = tree.counts()[:, 1:] > 0, token_changes(tree, standing)
    own = standing[:, None] * kept
    T = td.shape[1]
    gap = torch.arange(T) - torch.arange(T)[:, None]
    weights = torch.where(gap >= 0, lam ** gap.clamp(min=0).double(), 0.0)
    summed = td @ weights.T * kept  # Σ_l lam^l δ_{t+l}
    how = {"td_coef": coef, "lam": lam}
    for variant, want in (("tempo", own + coef * summed), ("td_only", coef * summed)):
        assert torch.allclose(credit(rows, rewards, variant=variant, **how), want, atol=1e-9)
    assert torch.allclose(credit(rows, rewards, variant="grpo"), own, atol=1e-12)
    baseline = own - coef * tree.means(standing)[:, :-1] * kept
    found = credit(rows, rewards, variant="mc_baseline", td_coef=coef)
    assert torch.allclose(found, baseline, atol=1e-12)
    if len({*map(tuple, rows)}) == len(rows):  # lam = 1 telescopes to the leaf, which is r' here
        last = credit(rows, rewards, variant="td_only", lam=1.0)
        assert torch.allclose(last, credit(rows, rewards, variant="mc_baseline"), atol=1e-9)


def test_no_two_share_a_first_token() -> None:
    """Twice GRPO's credit for the first token, then GRPO: by hand for rewards 1, 0, 0."""
    found = credit([[1, 5, EOS], [2, 5], [3]], [1.0, 0.0, 0.0])
    good, bad = 2 / 3**0.5, -1 / 3**0.5
    want = [[2 * good, good, good], [2 * bad, bad, 0.0], [2 * bad, 0.0, 0.0]]
    assert torch.allclose(found, torch.tensor(want, dtype=torch.float64), atol=1e-7)


def test_the_decision_to_stop_has_credit_with_its_token_only() -> None:
    """One stops where the other goes on; without EOS the stop earns nothing."""
    found = credit([[1, EOS], [1, 2, EOS]], [1.0, 0.0])
    r = 1 / 2**0.5
    want = torch.tensor([[r, 2 * r, 0.0], [-r, -2 * r, -r]], dtype=torch.float64)
    assert torch.allclose(found, want, atol=1e-7)
    without = credit([[1], [1, 2]], [1.0, 0.0])
    assert torch.allclose(without, torch.tensor([[r, 0.0], [-r, -2 * r]]).double(), atol=1e-7)


def test_grpo_is_the_chain_of_the_room() -> None:
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(0))
    want = chain(centre(), scale(eps=1e-8))(group_rewards(rewards, num_generations=8))
    ids = torch.arange(24)[:, None]
    found = tempo_advantages(ids, torch.ones_like(ids), rewards, variant="grpo")
    assert torch.allclose(found[:, 0], want, atol=1e-6)
    assert found.dtype == torch.float32


# ── the gradient ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def answers() -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """16 answers of a small recurrent policy, and their Σ_i Σ_t A_{i,t} ∇ log π."""
    torch.manual_seed(0)
    embed, cell = torch.nn.Embedding(4, 6), torch.nn.GRU(6, 8, batch_first=True)
    head = torch.nn.Linear(8, 3)
    net = torch.nn.ModuleList([embed, cell, head]).double()
    parameters = list(net.parameters())

    def logits(ids: Tensor) -> Tensor:
        begun = torch.nn.functional.pad(ids, (1, 0), value=3)[:, :-1]
        return head(cell(embed(begun))[0])

    ids = torch.zeros(16, 0, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(5):
            last = logits(torch.nn.functional.pad(ids, (0, 1)))[:, -1].softmax(dim=1)
            ids = torch.cat([ids, torch.multinomial(last, 1)], dim=1)

    def of(advantages: Tensor) -> Tensor:
        logp = logits(ids).log_softmax(dim=2).gather(2, ids[:, :, None])[:, :, 0]
        found = torch.autograd.grad((advantages * logp).sum(), parameters)
        return torch.cat([g.flatten() for g in found])

    return ids, of


def test_what_the_gradient_is(answers: tuple[Tensor, Callable[[Tensor], Tensor]]) -> None:
    """TEMPO's is that of 2 r' - V(s_t) at any lam, td_only's of r' - V(s_t); GRPO's is neither."""
    ids, gradients = answers
    mask = torch.ones_like(ids)
    rewards = (ids.sum(dim=1) % 3 == 0).double()
    assert 0 < rewards.sum() < 16
    of = {v: tempo_advantages(ids, mask, rewards, num_generations=16, variant=v) for v in VARIANTS}
    value = prefix_tree(ids, mask, num_generations=16).means(
        group_standing(rewards, num_generations=16)
    )
    tempo, grpo = gradients(of["tempo"]), gradients(of["grpo"])
    size = tempo.norm()
    assert (tempo - gradients(2 * of["grpo"] - value[:, :-1])).norm() < 1e-12 * size
    baselined = gradients(of["mc_baseline"])
    assert (gradients(of["td_only"]) - baselined).norm() < 1e-12 * size
    assert (tempo - grpo - baselined).norm() < 1e-12 * size
    for lam in (0.3, 1.0):  # changes to come sum to 0 over those who share the token
        summed = tempo_advantages(ids, mask, rewards, num_generations=16, lam=lam)
        assert not torch.allclose(summed, of["tempo"], atol=0.1)
        assert (tempo - gradients(summed)).norm() < 1e-12 * size
    assert (tempo - 2 * grpo).norm() > 0.1 * size


def test_a_mean_over_each_answer_breaks_the_law() -> None:
    """Tokens weighed by 1 / length: answers that share a prefix no longer weigh it alike."""
    rows, rewards = [[0, 0, 0, EOS], [0, EOS], [1, EOS]], [1.0, 0.0, 0.5]
    weights = torch.tensor([1 / len(row) for row in rows], dtype=torch.float64)[:, None]
    td, baselined = (credit(rows, rewards, variant=v) for v in ("td_only", "mc_baseline"))
    first = slice(0, 2), 0  # the token 0 at the root: both its answers have the same ∇ log π
    assert td[first].sum() == pytest.approx(baselined[first].sum())
    assert abs(float((weights * (td - baselined))[first].sum())) > 0.05


# ── what may not matter ─────────────────────────────────────────────────────────────────────────


@given(group(), group(), st.randoms(use_true_random=False), st.integers(0, 3))
def test_order_padding_and_other_groups(first: Any, second: Any, random: Any, wider: int) -> None:
    """Two groups, shuffled into one padded batch, get what each gets alone."""
    rows = [(0, *pair) for pair in zip(*first, strict=True)]
    rows += [(5, *pair) for pair in zip(*second, strict=True)]
    alone = [*credit(*first), *credit(*second)]
    order = random.sample(range(len(rows)), len(rows))
    T = max(len(row) for _, row, _ in rows) + wider
    ids = torch.tensor([[random.randint(0, 9) for _ in range(T)] for _ in rows])
    mask = torch.zeros(len(rows), T, dtype=torch.bool)
    for new, old in enumerate(order):
        n = len(rows[old][1])
        ids[new, :n], mask[new, :n] = torch.tensor(rows[old][1]), True
    rewards = torch.tensor([rows[old][2] for old in order], dtype=torch.float64)
    found = tempo_advantages(ids, mask, rewards, group_ids=[rows[old][0] for old in order])
    for new, old in enumerate(order):
        n = len(rows[old][1])
        assert torch.allclose(found[new, :n], alone[old][:n], atol=1e-9)
        assert not found[new, n:].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_signal_no_advantage(variant: str) -> None:
    """All rewards the same: exactly 0, also where their mean is rounded (0.1 three times)."""
    rows = [[1, 2], [1, 3], [4]]
    for rewards in ([0.1] * 3, [0.0] * 3, [0.1, math.nan, 0.1]):
        for eps in (1e-8, 0.0):
            assert not credit(rows, rewards, variant=variant, eps=eps).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_without_reward_are_not_there(variant: str) -> None:
    rows = [[1, 2, EOS], [1, 3, EOS], [1, 2, 2, EOS], [4, EOS]]
    for name in ("nan", "none"):
        missing: Any = math.nan if name == "nan" else None
        rewards = [1.0, 0.0, missing, 1.0]
        found = tempo_advantages(rows, None, rewards, num_generations=4, variant=variant)
        kept = [0, 1, 3]
        want = tempo_advantages(
            [rows[i] for i in kept], None, [1.0, 0.0, 1.0], num_generations=3, variant=variant
        )
        assert torch.allclose(found[kept][:, :3], want, atol=1e-6)
        assert not found[2].any()


def test_a_group_of_one() -> None:
    assert not credit([[1, 2]], [0.5]).any()
    assert torch.allclose(credit([[1, 2]], [0.5], single="raw"), torch.tensor(0.5).double())
    two = tempo_advantages(  # the other group is as it was
        [[1], [1, 2], [1, 3]], None, [0.5, 1.0, 0.0], group_ids=[1, 0, 0], single="raw"
    )
    assert two[0, 0] == 0.5
    assert torch.allclose(two[1:].double(), credit([[1, 2], [1, 3]], [1.0, 0.0]), atol=1e-6)


def test_empty_answers_end_at_the_root() -> None:
    found = credit([[], [1, 2]], [1.0, 0.0])
    r = 1 / 2**0.5
    assert torch.allclose(found, torch.tensor([[0.0, 0.0], [-2 * r, -r]]).double(), atol=1e-7)


def test_an_empty_batch_and_one_with_ids() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for variant in VARIANTS:
        assert tempo_advantages([], None, [], num_generations=2, variant=variant).shape == (0, 0)
        assert tempo_advantages([], None, [], none, variant=variant).shape == (0, 0)


def test_half_precision_and_population_deviation() -> None:
    rows = [[1], [2]]
    half = tempo_advantages(rows, None, torch.tensor([1.0, 0.0]).half(), num_generations=2)
    assert half.dtype == torch.float32
    assert torch.allclose(half, torch.tensor([[2**0.5], [-(2**0.5)]]))
    assert torch.allclose(credit(rows, [1.0, 0.0], ddof=0), 2 * torch.tensor([[1.0], [-1.0]]).double())  # fmt: skip # noqa: E501


BAD: list[tuple[dict[str, Any], str]] = [
    ({"variant": "ppo"}, "variant: got 'ppo', want tempo, grpo, td_only, mc_baseline"),
    ({"lam": 1.5}, "lam: got 1.5, want a number in [0, 1]"),
    ({"lam": 0.5, "variant": "grpo"}, "lam: got 0.5 for 'grpo', want 0: it sums no changes"),
    ({"td_coef": math.nan}, "td_coef: got nan, want a finite number"),
    ({"eps": -1.0}, "eps: got -1.0, want a number of at least 0"),
    ({"eps": math.inf}, "eps: got inf, want a number of at least 0"),
    ({"ddof": 2}, "ddof: got 2, want 0 or 1"),
    ({"single": "mean"}, "single: got 'mean', want 'zero' or 'raw'"),
    ({"rewards": [1.0, math.inf]}, "rewards: got an infinite one, want finite numbers or NaN"),
    ({"rewards": [1.0]}, "rewards: got 1 rows, want a multiple of num_generations = 2"),
    ({"rewards": [1.0] * 4}, "rewards: got 4 values, want 2, one an answer"),
    ({"num_generations": 3}, "rewards: got 2 rows, want a multiple of num_generations = 3"),
    ({"mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, "mask: got a hole in row 0"),
    ({"mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}, "mask: got row 0 padded on the left"),
    ({"mask": torch.ones(2, 2)}, "mask: got shape (2, 2), want (2, 3)"),
    ({"group_ids": [0, 0, 1]}, "group_ids: got shape (3,)"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    good = {
        "completion_ids": torch.tensor([[1, 2, 3], [1, 3, 3]]), "mask": torch.ones(2, 3),
        "rewards": [1.0, 0.0], "num_generations": 2,
    }  # fmt: skip
    with pytest.raises(InputError) as caught:
        tempo_advantages(**{**good, **change})
    assert str(caught.value).startswith(message)


@pytest.mark.contract
@pytest.mark.parametrize("option", [{"single": "mean"}, {"ddof": 2}, {"eps": -1.0}, {"lam": 2.0}])
def test_the_adapter_refuses_before_a_run(option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(option))}: got "):
        TempoAdvantage(**option)


# ── real answers, a real trainer ────────────────────────────────────────────────────────────────


def test_real_answers_are_trees() -> None:
    """100 MATH problems, 8 answers each, words for tokens."""
    groups = math_groups()
    words = {"": 0}
    rows = [[words.setdefault(w, len(words)) for w in a.split()] for g in groups for a in g["responses"]]  # fmt: skip # noqa: E501
    tree = prefix_tree(rows, num_generations=8)
    found = tree.statistics()
    assert round(found["shared_tokens"], 3) == 0.347
    assert round(found["branches"], 2) == 3.07
    each = tree.is_branch().sum(dim=1).reshape(100, 8).double().mean(dim=1)
    assert round(float(each.max()), 1) == 4.1


@pytest.mark.contract
def test_a_trl_run(letters: Any, new_policy: Any, grpo_config: Any) -> None:
    """Two steps with TEMPO move the weights elsewhere than GRPO, which is TRL's own."""
    from datasets import Dataset

    from scoredraw.rl.trainer import AdvantageGRPOTrainer, Rollouts

    prompts = Dataset.from_list([{"prompt": f"{a}+{a}="} for a in range(8)])
    seen: list[tuple[Tensor, Rollouts]] = []

    def vowels(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(c.count(v) for v in "aeiou0123")) for c in completions]

    def run(advantage: TempoAdvantage) -> dict[str, Tensor]:
        def look(rollouts: Rollouts) -> Tensor:
            seen.append((advantage(rollouts), rollouts))
            return seen[-1][0]

        trainer = AdvantageGRPOTrainer(
            model=new_policy(), reward_funcs=vowels, advantage_fn=look, train_dataset=prompts,
            args=grpo_config(learning_rate=1e-2), processing_class=letters,
        )  # fmt: skip
        trainer.train()
        return {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}

    credit_fn = TempoAdvantage()
    tempo = run(credit_fn)
    assert 0 < credit_fn.statistics["branch_tokens"] <= 1
    for found, r in seen:
        lengths = r.mask.sum(dim=1).tolist()
        rows = [ids[:n].tolist() for ids, n in zip(r.completion_ids, lengths, strict=True)]
        want = tempo_advantages(rows, None, r.reward, num_generations=4)
        assert torch.allclose(found[:, : want.shape[1]], want, atol=1e-6)
    assert any(found.any() for found, _ in seen)
    grpo = run(TempoAdvantage(variant="grpo"))
    assert any(not torch.equal(tempo[name], grpo[name]) for name in tempo)


@pytest.mark.contract
def test_what_a_tool_wrote_is_context() -> None:
    """Two answers call a tool alike and hear different things: they part there, without credit."""
    from types import SimpleNamespace

    ids = torch.tensor([[1, 7, 3, 0], [1, 8, 3, 4], [1, 8, 4, 0]])
    mask = torch.tensor([[1, 0, 1, 0], [1, 0, 1, 1], [1, 0, 1, 0]], dtype=torch.bool)
    batch: Any = SimpleNamespace(
        completion_ids=ids, mask=mask, reward=torch.tensor([1.0, 0.0, 1.0]),
        group_ids=torch.zeros(3, dtype=torch.int64),
    )  # fmt: skip
    found = TempoAdvantage()(batch)
    whole = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    want = tempo_advantages(ids, whole, batch.reward, num_generations=3)
    assert want[:, 1].any()
    assert torch.equal(found, want * mask)


@pytest.mark.contract
def test_an_answer_that_was_cut_off_and_hidden_is_still_there() -> None:
    """TRL masks it wholly: the others don't part from it where they all begin alike."""
    from types import SimpleNamespace

    ids = torch.tensor([[1, 2, 9, 0], [1, 3, 9, 0], [1, 2, 2, 2]])
    whole = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    batch: Any = SimpleNamespace(
        completion_ids=ids, mask=whole.bool() & torch.tensor([True, True, False])[:, None],
        reward=torch.tensor([1.0, 0.0, 0.0]), group_ids=torch.zeros(3, dtype=torch.int64),
    )  # fmt: skip
    found = TempoAdvantage()(batch)
    want = tempo_advantages(ids, whole, batch.reward, num_generations=3)
    assert torch.equal(found, want * batch.mask)
    assert torch.equal(found[:2, 0], group_standing(batch.reward, num_generations=3)[:2])
