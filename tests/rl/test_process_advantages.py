"""Advantages of steps: plain loops beside them, laws of the baselines, a TRL run, bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from scoredraw.errors import InputError
from scoredraw.rl.process_advantages import (
    ProcessAdvantage,
    TokenClassifierScorer,
    baselined_rewards,
    process_advantages,
)
from scoredraw.rl.process_credit import CREDITS, find_steps, min_form_rewards, process_rewards
from scoredraw.rl.token_credit import returns_to_go, whiten

pytestmark = pytest.mark.oracle


def example(N: int = 12, T: int = 17, S: int = 5, seed: int = 0, holes: bool = False) -> Any:
    """Random answers in float64: steps that end anywhere, short responses, rows without a step."""
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(S + 1, T + 1, (N,), generator=g)
    mask = torch.arange(T) < length[:, None]
    end = torch.stack([torch.randperm(int(n), generator=g)[:S].sort().values for n in length])
    real = torch.rand(N, S, generator=g) < 0.8
    real[1] = False
    if holes:
        at_end = torch.zeros_like(mask).scatter(1, end, real)
        mask = mask & (at_end | (torch.rand(N, T, generator=g) < 0.7))
    return {
        "step_rewards": torch.rand(N, S, generator=g, dtype=torch.float64) * 2 - 1,
        "step_mask": real, "step_end": end, "response_mask": mask, "num_generations": 4,
    }  # fmt: skip


OUTCOMES = [1.0, 0.0, None, 1.0, None, None, 0.0, None, 1.0, 1.0, 0.0, 0.0]


def plain(batch: dict[str, Any], baseline: str, outcome: Any, kl: Tensor) -> list[list[float]]:
    """The same, a token at a time: rewards to tokens, baselines, sums from behind."""
    x = min_form_rewards(batch["step_rewards"], batch["step_mask"]).tolist()
    real, end, mask = (batch[k].tolist() for k in ("step_mask", "step_end", "response_mask"))
    N, T = batch["response_mask"].shape
    G, found = batch["num_generations"], []

    def rewards(i: int) -> list[float]:
        found = [0.0] * T
        for value, at, there in zip(x[i], end[i], real[i], strict=True):
            found[at] += value * there
        return found

    def sums(values: list[float], i: int) -> list[float]:
        return [sum(values[t:]) * mask[i][t] for t in range(T)]

    for i in range(N):
        rivals = [k for k in range(i - i % G, i - i % G + G) if k != i]
        scored = [k for k in rivals if any(real[k])]
        known = [k for k in rivals if outcome[k] is not None]
        last = max(t for t in range(T) if mask[i][t])
        reward, v = rewards(i), outcome[i]
        if baseline == "verl":
            A = [0.0] * T
            costs = {k: [-0.01 * float(c) for c in kl[k]] for k in [i, *rivals]}
            per = 1 / T
            if any(real[i]):
                b = sum(sum(sums(rewards(k), k)) for k in scored) * per / len(scored)
                A = [a + r - b for a, r in zip(A, sums(reward, i), strict=True)]
            if v is not None and known:
                b = sum(outcome[k] * sum(mask[k]) for k in known) * per / len(known)
                A = [a + v - b for a in A]
            b = sum(sum(sums(_masked(costs[k], mask[k]), k)) for k in rivals) * per / len(rivals)
            cost = sums(_masked(costs[i], mask[i]), i)
            found.append([(a + c - b) * m for a, c, m in zip(A, cost, mask[i], strict=True)])
            continue
        start = 0
        for at, there in zip(end[i], real[i], strict=True):
            if not there:
                continue
            tokens, start = sum(mask[i][start : at + 1]), at + 1
            if baseline == "token":
                total = sum(sum(rewards(k)) for k in scored)
                reward[at] -= total / sum(sum(mask[k]) for k in scored) * tokens
            else:
                each = [sum(rewards(k)) / sum(real[k]) for k in scored]
                reward[at] -= sum(each) / len(each)
        if v is not None and known:
            reward[last] += v - sum(outcome[k] for k in known) / len(known)
        net = [r - 0.01 * float(c) * m for r, c, m in zip(reward, kl[i], mask[i], strict=True)]
        found.append(sums(net, i))
    return found


def _masked(values: list[float], mask: list[bool]) -> list[float]:
    return [value * real for value, real in zip(values, mask, strict=True)]


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("baseline", ["token", "step", "verl"])
def test_against_plain_loops(baseline: str, holes: bool) -> None:
    batch = example(holes=holes)
    kl = torch.rand(12, 17, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = process_advantages(**batch, baseline=baseline, outcome=OUTCOMES, kl=kl, kl_coef=0.01)
    want = torch.tensor(plain(batch, baseline, OUTCOMES, kl), dtype=torch.float64)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("baseline", ["token", "step"])
def test_sums_of_the_rewards(baseline: str, credit: str) -> None:
    """What is spread over tokens step by step is the running sum of the rewards on tokens."""
    batch = example(seed=2)
    how = {"baseline": baseline, "credit": credit, "outcome": OUTCOMES, "outcome_coef": 0.3}
    rewards = baselined_rewards(**batch, **how)
    want = returns_to_go(rewards, batch["response_mask"])
    torch.testing.assert_close(process_advantages(**batch, **how), want)


# ── laws ────────────────────────────────────────────────────────────────────────────────────────


def test_step_baselines_cancel_in_a_group() -> None:
    batch = example(N=400, seed=3)
    batch["step_mask"][1] = True
    n = batch["step_mask"].sum(dim=1)
    kept = n.reshape(-1, 4).min(dim=1).values > 0
    total = baselined_rewards(**batch, baseline="step").sum(dim=1) / n
    assert kept.sum() > 50
    assert total.reshape(-1, 4).sum(dim=1)[kept].abs().max() < 1e-12


def test_without_steps_only_outcomes_count() -> None:
    """PURE-VR: the outcome less the others' mean, at every token; nothing without one."""
    batch = example()
    batch["step_mask"] = torch.zeros_like(batch["step_mask"])
    for baseline in ("token", "step", "verl"):
        assert (process_advantages(**batch, baseline=baseline) == 0).all()
    v = torch.tensor([0.0 if x is None else x for x in OUTCOMES], dtype=torch.float64)
    known = torch.tensor([x is not None for x in OUTCOMES])
    others = [[k for k in range(i - i % 4, i - i % 4 + 4) if k != i and known[k]]
              for i in range(12)]  # fmt: skip
    above = [float(v[i] - v[ks].mean()) if known[i] and ks else 0.0 for i, ks in enumerate(others)]
    want = torch.tensor(above, dtype=torch.float64)[:, None] * batch["response_mask"]
    torch.testing.assert_close(process_advantages(**batch, outcome=OUTCOMES), want)
    assert above[4:8] == [0.0] * 4  # one known answer has nobody to be compared with


@pytest.mark.parametrize("baseline", ["token", "step", "verl"])
def test_what_is_unknown_is_as_if_absent(baseline: str) -> None:
    """The others get what they would get in a group without the row that has no score."""
    batch = example(holes=True)
    rest = torch.arange(12) != 1
    part = {k: v[rest] for k, v in batch.items() if k != "num_generations"}
    ids = (torch.arange(12) // 4)[rest]
    whole = process_advantages(**batch, baseline=baseline)
    found = process_advantages(**part, group_ids=ids, baseline=baseline)
    torch.testing.assert_close(whole[rest], found)
    assert (whole[1] == 0).all()


@pytest.mark.parametrize("baseline", ["token", "step", "verl"])
def test_rows_may_come_in_any_order(baseline: str) -> None:
    batch = example(seed=5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(6))
    ids = torch.arange(12) // 4
    moved = {k: v[order] for k, v in batch.items() if k != "num_generations"}
    plain_order = process_advantages(**batch, baseline=baseline, outcome=OUTCOMES)
    known = [OUTCOMES[i] for i in order.tolist()]
    found = process_advantages(**moved, group_ids=ids[order], baseline=baseline, outcome=known)
    torch.testing.assert_close(found, plain_order[order])


def test_only_the_verl_baseline_depends_on_padding() -> None:
    batch = example()
    wide = {**batch, "response_mask": torch.nn.functional.pad(batch["response_mask"], (0, 20))}
    for baseline, same in (("token", True), ("step", True), ("verl", False)):
        narrow = process_advantages(**batch, baseline=baseline)
        padded = process_advantages(**wide, baseline=baseline)[:, :17]
        assert torch.allclose(narrow, padded) == same, baseline


def test_good_answers_are_told_apart() -> None:
    """All scores positive: a minimum over tokens, zeros included, sees no difference."""
    r = torch.tensor([[0.9, 0.8], [0.3, 0.8]])
    batch = (r, r > 0, torch.tensor([[1, 3]] * 2), torch.ones(2, 4), 2)
    A = process_advantages(*batch, credit="strict_min", baseline="verl")
    assert A[0, 0] > 0 > A[1, 0]


def test_separators_and_whitening() -> None:
    batch = example(seed=7)
    mask = batch["response_mask"]
    quiet = torch.zeros_like(mask).scatter(1, batch["step_end"], batch["step_mask"])
    bare = process_advantages(**batch)
    silent = process_advantages(**batch, separators=quiet)
    torch.testing.assert_close(silent, bare.masked_fill(quiet, 0.0))
    white = process_advantages(**batch, separators=quiet, whitened=True)
    counts = mask & ~quiet
    torch.testing.assert_close(white, whiten(bare, counts))
    assert (white[~counts] == 0).all()
    assert white[counts].mean().abs() < 1e-12
    assert float(white[counts].var()) == pytest.approx(1.0, rel=1e-6)


def test_long_responses_in_single_precision() -> None:
    """40,000 tokens, more than a 16-bit count holds, against double precision."""
    g = torch.Generator().manual_seed(0)
    T, S = 40_000, 300
    end = torch.stack([torch.randperm(T, generator=g)[:S].sort().values for _ in range(2)])
    r = torch.rand(2, S, generator=g) * 2 - 1
    given = (torch.ones(2, S, dtype=torch.bool), end, torch.ones(2, T), 2)
    for credit in ("softmin", "sum"):
        found = process_advantages(r, *given, credit=credit)
        exact = process_advantages(r.double(), *given, credit=credit)
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() < 2e-6 * exact.abs().max()
    one = ([[0.5], [0.1]], [[True]] * 2, [[T - 1]] * 2, torch.ones(2, T), 2)
    for baseline in ("token", "step", "verl"):  # of equal length: the others' reward
        A = process_advantages(*one, baseline=baseline)
        assert A[0, [0, T - 1]].tolist() == pytest.approx([0.4, 0.4], abs=1e-6)


def test_a_divergence_in_half_precision() -> None:
    """.001 times 1e-4 is below what float16 can tell apart."""
    kl = torch.full((2, 3), 1e-4, dtype=torch.float16)
    found, want = (process_advantages(**ONE, kl=x) for x in (kl, kl.double()))
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
    assert found[0, 0] == pytest.approx(-2e-7, rel=1e-3)


# ── in a trainer ────────────────────────────────────────────────────────────────────────────────


def vowels(prompts: Any, steps: list[list[str]], **_: Any) -> list[list[float | None]]:
    """The share of vowels in a step, in [-1, 1]; a step with an x has no score."""

    def score(text: str) -> float | None:  # fmt: skip
        share = sum(c in "aeiou" for c in text) / max(len(text), 1)
        return None if "x" in text else 2 * share - 1

    return [[score(text) for text in texts] for texts in steps]  # fmt: skip


def sometimes(completions: list[str], **_: Any) -> list[float | None]:
    return [None if "q" in c else float(len(c) % 2) for c in completions]


def nothing(completions: list[str], **_: Any) -> list[None]:
    return [None] * len(completions)


@pytest.mark.parametrize("outcome", [None, 0])
def test_a_real_run(
    letters: Any, new_policy: Callable[[], Any], grpo_config: Callable[..., Any],
    outcome: int | None,
) -> None:  # fmt: skip
    from datasets import Dataset

    from scoredraw.rl.trainer import AdvantageGRPOTrainer, Rollouts

    data = Dataset.from_list([{"prompt": f"{a}+{a}="} for a in range(8)])
    seen: list[tuple[Rollouts, Tensor]] = []
    trained: list[Tensor] = []

    class Watched(ProcessAdvantage):
        def __call__(self, rollouts: Rollouts) -> Tensor:
            seen.append((rollouts, super().__call__(rollouts)))
            return seen[-1][1]

    class Trainer(AdvantageGRPOTrainer):
        def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Any]:
            output = super()._generate_and_score_completions(inputs)
            trained.append(output["advantages"])
            return output

    policy = new_policy()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    trainer = Trainer(
        model=policy, reward_funcs=[sometimes, nothing], train_dataset=data,
        args=grpo_config(max_completion_length=24, reward_weights=[1.0, 0.0]),
        processing_class=letters,
        advantage_fn=Watched(vowels, letters, separator="e", outcome=outcome),
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 2
    assert any(not torch.equal(value, before[k]) for k, value in policy.state_dict().items())
    for (rollouts, A), used in zip(seen, trained, strict=True):
        torch.testing.assert_close(used, A, rtol=0, atol=0)
        unknown = rollouts.reward.isnan()
        assert (A[unknown] != 0).any()  # no reward at all: the steps count all the same
        steps = find_steps(
            rollouts.completion_ids, rollouts.mask, [letters.convert_tokens_to_ids("e")],
            letters.all_special_ids,
        )  # fmt: skip
        texts = [
            [letters.decode(part, skip_special_tokens=True) for part in _cut(row, ends)]
            for row, ends in zip(rollouts.completion_ids, _ends(steps), strict=True)
        ]
        scores = vowels(None, texts)
        S = steps.mask.shape[1]
        table = torch.tensor([[(x if x is not None else math.nan) for x in row]
                              + [math.nan] * (S - len(row)) for row in scores])  # fmt: skip
        want = process_advantages(
            table, ~table.isnan(), steps.end, rollouts.mask, 4, whitened=True,
            outcome=None if outcome is None else rollouts.rewards[:, 0],
            separators=steps.separators,
        )  # fmt: skip
        torch.testing.assert_close(A, want)
        assert (A[steps.separators] == 0).all()
        assert A.abs().max() > 0
        assert steps.mask.sum() > len(A)


def _ends(steps: Any) -> list[list[int]]:
    return [end[real].tolist() for end, real in zip(steps.end, steps.mask, strict=True)]


def _cut(row: Tensor, ends: list[int]) -> list[Tensor]:
    return [row[a + 1 : b + 1] for a, b in pairwise([-1, *ends])]


def test_a_token_classifier_scores_steps(letters: Any) -> None:
    """In batches with padding as one answer at a time, read at the separator after each step."""
    from transformers import Qwen2Config, Qwen2ForTokenClassification

    torch.manual_seed(0)
    model = Qwen2ForTokenClassification(
        Qwen2Config(
            vocab_size=len(letters), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, num_labels=2,
        )
    ).eval()  # fmt: skip
    prompts = ["1+1=", "20+30=", "5+5="]
    steps = [["one", "and one more", "2"], ["fifty"], ["", "ten"]]
    found = TokenClassifierScorer(model, letters, separator="/", batch_size=2)(prompts, steps)
    for prompt, texts, scores in zip(prompts, steps, found, strict=True):
        for s in range(len(texts)):
            text = prompt + "".join(f"{step}/" for step in texts[: s + 1])
            with torch.no_grad():
                logits = model(torch.tensor([letters.encode(text)])).logits
            assert scores[s] == pytest.approx(float(process_rewards(logits)[0, -1]), abs=1e-6)
    swapped = TokenClassifierScorer(model, letters, separator="/", good=0)(prompts, steps)
    assert swapped[0] == pytest.approx([-x for x in found[0]], abs=1e-6)
    chat = copy.deepcopy(letters)
    chat.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    said = TokenClassifierScorer(model, chat, separator="/")(messages, steps)
    assert said[2] == pytest.approx(found[2], abs=1e-6)


# ── refusals ────────────────────────────────────────────────────────────────────────────────────

ONE: dict[str, Any] = {
    "step_rewards": [[0.5]] * 2, "step_mask": [[True]] * 2, "step_end": [[1]] * 2,
    "response_mask": [[1, 1, 0]] * 2, "num_generations": 2,
}  # fmt: skip
BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_generations": 1}, "num_generations: got a group of one answer, want two or more"),
    ({"num_generations": 3}, "rewards: got 2 rows, want a multiple of num_generations = 3"),
    ({"group_ids": [0, 1]}, "group_ids: got a group of one answer"),
    ({"step_rewards": [[0.5], [math.nan]]}, "step_rewards: got nan in row 1, step 0"),
    ({"step_rewards": torch.zeros(2, 0)}, r"step_rewards: got shape \(2, 0\)"),
    ({"step_end": [[1], [2]]}, r"step_end: got a step beyond the response in row \[1\]"),
    ({"step_end": [[1], [3]]}, r"step_end: got \[3\], want tokens of the response, 0 to 2"),
    ({"step_end": [[1.0], [1.0]]}, "step_end: got torch.float32, want torch.int64"),
    ({"response_mask": [[1, 1, 0]]}, r"response_mask: got shape \(1, 3\), want \(2, T\)"),
    ({"response_mask": [[1, 1], [0, 0]], "step_mask": [[True], [False]]},
     r"response_mask: got no token in the others of the group of row \[0\]"),
    ({"temperature": 0.0}, "temperature: got 0.0"),
    ({"credit": "product"}, "credit: got 'product'"),
    ({"baseline": "batch"}, "baseline: got 'batch', want token, step, verl"),
    ({"outcome": [1.0]}, "outcome: got 1 values, want 2"),
    ({"outcome": [1.0, math.inf]}, "rewards: got an infinite one"),
    ({"outcome": [1.0, 0.0], "outcome_coef": math.nan}, "outcome_coef: got nan"),
    ({"kl": [[0.1, 0.1]] * 2}, r"kl: got shape \(2, 2\), want \(2, 3\)"),
    ({"kl": [[0.1, math.nan, 0.1]] * 2}, "kl: got NaN or infinity"),
    ({"kl": [[0.1] * 3] * 2, "kl_coef": math.inf}, "kl_coef: got inf, want a finite number"),
    ({"separators": [[0, 1, 0]] * 2}, r"separators: got torch.int64 \(2, 3\), want bool \(2, 3\)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        process_advantages(**{**ONE, **change})


def test_bad_adapters(letters: Any) -> None:
    for options, message in (
        ({"credits": "sum"}, "options: got credits, want some of baseline, credit"),
        ({"credit": "median"}, "credit: got 'median'"),
        ({"temperature": -1}, "temperature: got -1"),
        ({"baseline": "mean"}, "baseline: got 'mean'"),
        ({"separator": "no such"}, "separator: got 'no such'"),
    ):
        with pytest.raises(InputError, match=message):
            ProcessAdvantage(vowels, letters, **{"separator": "e", **options})
    with pytest.raises(InputError, match="baseline: got 'verl', want token or step"):
        baselined_rewards(**ONE, baseline="verl")
    with pytest.raises(InputError, match=r"separator: got '', want text with a token"):
        TokenClassifierScorer(None, letters, separator="")


def test_an_adapter_names_what_a_scorer_got_wrong(letters: Any) -> None:
    from scoredraw.rl.trainer import Rollouts

    ids = torch.tensor([letters.encode("ab ab ab "), letters.encode("b ab ab b")])
    rollouts = Rollouts(
        reward=torch.zeros(2), rewards=torch.zeros(2, 1), group_ids=torch.zeros(2).long(),
        completion_ids=ids, mask=torch.ones_like(ids).bool(), prompts=["", ""],
        completions=["", ""], columns={}, step=0, num_generations=2,
    )  # fmt: skip

    def advantage(scores: list[list[float | None]], **options: Any) -> Tensor:
        found = ProcessAdvantage(lambda prompts, steps: scores, letters, " ", **options)
        return found(rollouts)

    full: list[list[float | None]] = [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]]
    assert advantage(full).shape == (2, 9)
    with pytest.raises(InputError, match=r"score_steps: got \[2, 4\] scores, want \[3, 4\]"):
        advantage([[0.1, 0.2], full[1]])
    with pytest.raises(InputError, match="step_rewards: got nan in row 1, step 3"):
        advantage([full[0], [0.1, 0.2, 0.3, math.nan]])
    with pytest.raises(InputError, match="outcome: got 1, want the place of one of 1 reward"):
        advantage(full, outcome=1)
    silent = advantage([[None] * 3, [None] * 4], whitened=False)
    assert (silent == 0).all()


def test_empty_answers_do_not_stop_a_run(letters: Any) -> None:
    """A trainer that masks truncated answers may leave one of a group, or none of a batch."""
    from scoredraw.rl.trainer import Rollouts

    ids = torch.tensor([letters.encode("ab ab")] * 4)
    inner = ProcessAdvantage(lambda prompts, steps: [[0.5] * len(s) for s in steps], letters, " ")

    def advantage(mask: list[int]) -> Tensor:
        return inner(
            Rollouts(
                reward=torch.zeros(4), rewards=torch.zeros(4, 1),
                group_ids=torch.tensor([0, 0, 1, 1]), completion_ids=ids,
                mask=(torch.ones_like(ids) * torch.tensor(mask)[:, None]).bool(), prompts=[""] * 4,
                completions=[""] * 4, columns={}, step=0, num_generations=2,
            )
        )  # fmt: skip

    assert (advantage([0, 0, 0, 0]) == 0).all()
    assert not advantage([1, 0, 0, 1]).isnan().any()
    assert advantage([1, 1, 0, 1])[:2].abs().max() > 0
