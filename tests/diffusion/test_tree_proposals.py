"""Chains that trees grow along: their steps against what they should be, and real networks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from scoredraw.diffusion.schedules import DiscreteAlphas, LinearBeta, VarianceExploding
from scoredraw.diffusion.time_grids import time_grid
from scoredraw.diffusion.tree_proposals import (
    MarkovChain,
    diffusion_chain,
    exact_values,
    finite_chain,
    masked_chain,
    paper_branches,
    token_chain,
)
from scoredraw.diffusion.tree_sampling import DiffusionTree
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle


class Fixed(np.random.Generator):
    """The same noise every time."""

    def __init__(self, value: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.value = value

    def standard_normal(self, size: Any = None, *_: Any, **__: Any) -> Any:
        return np.full(size, self.value)


# ── continuous ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_step_keeps_the_marginals(schedule, eta: float) -> None:
    """For one data point c: x_t = alpha c + sigma z becomes N(alpha_s c, sigma_s²), any η."""
    c = 1.7
    eps = lambda x, t: (x - float(schedule.alpha(t)) * c) / float(schedule.sigma(t))  # noqa: E731
    ends = schedule.with_ends(prior="noise", last="stop").ends
    times = [0.6 * ends.t_start + 0.4 * ends.t_end, 0.5 * ends.t_start + 0.5 * ends.t_end]
    chain = diffusion_chain(schedule, eps, (1,), times=times, eta=eta)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    x = alpha[0] * c + sigma[0] * np.array([[0.0], [1.0]])
    still, noisy = chain.step(x, 0, Fixed(0.0)), chain.step(x, 0, Fixed(1.0))
    assert still[0, 0] == pytest.approx(alpha[1] * c, rel=1e-6)
    spread = (still[1, 0] - still[0, 0]) ** 2 + (noisy[0, 0] - still[0, 0]) ** 2
    assert spread == pytest.approx(sigma[1] ** 2, rel=1e-6)
    assert noisy[0, 0] > still[0, 0]


def test_with_full_noise_it_is_the_ancestral_step_of_ddpm() -> None:
    """Mean and variance of q(x_s | x_t, x_0) by Bayes' rule."""
    schedule = LinearBeta()
    t, s, c = 0.5, 0.4, -0.8
    eps = lambda x, t: (x - float(schedule.alpha(t)) * c) / float(schedule.sigma(t))  # noqa: E731
    chain = diffusion_chain(schedule, eps, (1,), times=[t, s])
    x = np.array([[0.3]])
    still, noisy = chain.step(x, 0, Fixed(0.0))[0, 0], chain.step(x, 0, Fixed(1.0))[0, 0]
    ratio = float(schedule.alpha(t) / schedule.alpha(s))
    forward, own = 1 - ratio**2, float(schedule.sigma(s)) ** 2  # of x_t | x_s and of x_s | x_0
    precision = ratio**2 / forward + 1 / own
    mean = (ratio * 0.3 / forward + float(schedule.alpha(s)) * c / own) / precision
    assert still == pytest.approx(mean, rel=1e-9)
    assert (noisy - still) ** 2 == pytest.approx(1 / precision, rel=1e-9)


def test_without_noise_it_is_the_schedules_own_ddim() -> None:
    from scoredraw.diffusion.deis import DEISSolver

    schedule = LinearBeta()
    eps = lambda x, t: 0.3 * x + 0.1 * np.cos(x)  # noqa: E731
    chain = diffusion_chain(schedule, eps, (3,), 8)
    assert chain.finish is not None
    x = np.random.default_rng(0).normal(size=(4, 3))
    solver = DEISSolver(schedule, times=time_grid(schedule, 8, "t", 1.0), variant="ei_eps")
    np.testing.assert_allclose(chain.finish(x, 0), solver.sample(eps, x), rtol=1e-9)


@pytest.mark.parametrize("tensors", [False, True])
def test_a_guide_moves_the_mean_and_says_by_how_much(tensors: bool) -> None:
    """E_q[p/q] = 1 and E_q[p/q · x'] = E_p[x'], within 5 standard errors of 40,000 draws."""
    schedule = VarianceExploding(0.1, 5.0, time="geometric")
    common: dict[str, Any] = {"times": [2.0, 1.0], "tensors": tensors}
    eps = lambda x, t: 0.2 * x  # noqa: E731
    if tensors:
        torch = pytest.importorskip("torch")
        x = torch.full((40_000, 2), 1.5, dtype=torch.float64)
    else:
        x = np.full((40_000, 2), 1.5)
    chain = diffusion_chain(schedule, eps, (2,), guide=lambda x, i: 0.4 + 0 * x, **common)
    plain = diffusion_chain(schedule, eps, (2,), **common)
    moved, ratio = (np.asarray(part) for part in chain.step(x, 0, chain.source(0)))
    own = np.asarray(plain.step(x, 0, plain.source(0)))
    w = np.exp(ratio)
    assert abs(w.mean() - 1) < 5 * w.std() / 200
    assert moved[:, 0].mean() - own[:, 0].mean() > 0.2
    weighted = w * moved[:, 0]
    assert abs(weighted.mean() - own[:, 0].mean()) < 5 * (weighted.std() + own.std()) / 200


def test_a_last_step_to_the_clean_sample() -> None:
    betas = np.linspace(1e-3, 0.07, 100)
    schedule = DiscreteAlphas.from_betas(betas).with_ends(last="denoise")
    chain = diffusion_chain(schedule, lambda x, t: 0 * x, (2,), 99, branch_at=(100, 80, 60, 40, 20))
    assert chain.steps == 100
    assert chain.calls == (0, 20, 20, 20, 20, 20)
    x = np.ones((1, 2))
    assert chain.step(x, 99, None)[0, 0] == pytest.approx(1 / float(schedule.alpha(0.0)))


def test_edges_and_what_makes_none() -> None:
    one = MarkovChain(lambda n, g: np.zeros(n), lambda x, i, g: (x + i, np.ones(n)), 6, (2, 4))
    n = 3
    assert one.edges == ((0, 2), (2, 4), (4, 6))
    x, ratio = one.run(None, 0, None, n=3)
    assert x.tolist() == [1.0] * 3
    assert ratio.tolist() == [2.0] * 3
    assert one.run(x, 2, None)[0].tolist() == [10.0] * 3
    assert MarkovChain(one.prior, one.step, 2).edges == ((0, 0), (0, 1), (1, 2))
    assert paper_branches(100) == (100, 80, 60, 40, 20)
    for wrong, said in (((7,), "branch_at: got 7, want at most the 6"), ((2, 2), "distinct"),
                        ((0,), "branch_at: got 0"), ((1.5,), "branch_at")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            MarkovChain(one.prior, one.step, 6, wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"eta: got 0\.0, want in"):
        diffusion_chain(LinearBeta(), lambda x, t: x, (1,), eta=0.0)
    bad = diffusion_chain(LinearBeta(), lambda x, t: x[:, :1], (2,), 3)
    with pytest.raises(InputError, match="eps_fn: got shape"):
        bad.run(np.zeros((2, 2)), 1, bad.source(0))


# ── finite ──────────────────────────────────────────────────────────────────────────────────────


def test_exact_values_by_counting_all_paths() -> None:
    rng = np.random.default_rng(3)
    prior, P, r = (
        rng.dirichlet([1, 1, 1]),
        rng.dirichlet([1, 1, 1], size=(2, 3)),
        rng.normal(size=3),
    )
    found = exact_values(prior, P, r, 2.0)
    total, law = 0.0, np.zeros(3)
    for a, b, c in itertools.product(range(3), repeat=3):
        p = prior[a] * P[1, a, b] * P[0, b, c]
        total += p * np.exp(2 * r[c])
        law[c] += p * np.exp(2 * r[c])
    assert found.root == pytest.approx(np.log(total) / 2, rel=1e-12)
    np.testing.assert_allclose(found.target, law / total, rtol=1e-12)
    chain = finite_chain(prior, P)
    x, source = None, chain.source(0)
    for edge in range(3):
        x = chain.run(x, edge, source, n=20_000)[0]
    share = np.bincount(x, minlength=3) / 20_000  # 5 standard errors
    assert (abs(share - found.base) < 5 * np.sqrt(found.base * (1 - found.base) / 20_000)).all()
    with pytest.raises(InputError, match="transitions: got a row that is no law"):
        finite_chain(prior, 2 * P)
    with pytest.raises(InputError, match="transitions: got"):
        finite_chain(prior, P[0])


# ── networks ────────────────────────────────────────────────────────────────────────────────────


def test_tokens_of_a_causal_model_have_its_law(tiny_model: str) -> None:
    """With and without the cache the same tokens; the first token's law within 5 errors."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    chain = token_chain(model, [5, 6, 7], 4, top_k=3)
    assert chain.edges[0] == (0, 1)
    cached = token_chain(model, [5, 6, 7], 4, top_k=3, branch_at=())
    x = cached.run(None, 0, cached.source(1), n=400)[0]
    assert x.shape == (400, 7)
    y, source = None, chain.source(1)
    for edge in range(len(chain.edges)):
        y = chain.run(y, edge, source, n=400)[0]
    assert torch.equal(x, y)
    stepped = chain.step(y[:, :].clone(), 3, chain.source(2))
    assert stepped.shape == (400, 7)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1].double()
    top = logits.topk(3)
    p = top.values.softmax(0)
    share = (x[:, 3, None] == top.indices).double().mean(0)
    assert float(share.sum()) == pytest.approx(1.0)
    assert bool(((share - p).abs() < 5 * (p * (1 - p) / 400).sqrt() + 1e-12).all())
    worth = lambda x: (x[:, -1] == x[:, -2]).double()  # noqa: E731
    tree = DiffusionTree(token_chain(model, [5], 3, top_k=2), worth, lam=np.inf, generator=0)
    assert tree.grow(30).best()[1] == tree.root_value


def test_after_the_end_all_tokens_are_the_end(tiny_model: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    free = token_chain(model, [5], 6, branch_at=())
    end = int(free.run(None, 0, free.source(0), n=1)[0][0, 2])
    chain = token_chain(model, [5], 6, branch_at=(), end=end)
    x = chain.run(None, 0, chain.source(0), n=1)[0]
    assert (x[0, 2:] == end).all()


def test_masked_tokens_are_shown_as_their_law_says() -> None:
    """Independent tokens: shares of 4000 x 4 draws within 5 standard errors, and no mask left."""
    torch = pytest.importorskip("torch")
    p = torch.tensor([0.6, 0.3, 0.1, 1.0])
    chain = masked_chain(lambda x: p.log().expand(*x.shape, 4), [3, 3, 2, 3, 3], 3, 8)
    x, source, left = None, chain.source(0), []
    for edge in range(len(chain.edges)):
        x = chain.run(x, edge, source, n=4000)[0]
        left.append(float((x == 3).double().mean() * 5 / 4))
    np.testing.assert_allclose(left, 1 - np.arange(1, 9) / 8, atol=0.02)
    assert (x[:, 2] == 2).all()
    share = np.bincount(x[:, [0, 1, 3, 4]].ravel(), minlength=3) / 16_000
    want = p[:3].numpy()
    assert (abs(share - want) < 5 * np.sqrt(want * (1 - want) / 16_000)).all()
    tree = DiffusionTree(chain, lambda x: (x == 1).sum(1).double(), lam=3.0, generator=0)
    made = tree.grow(60).sample(50)
    assert float((made == 1).double().mean()) > float((x == 1).double().mean())
