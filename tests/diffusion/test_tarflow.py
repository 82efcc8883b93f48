"""TarFlow: densities and determinants, all ways back, guidance, files, training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from scoredraw.diffusion.flow_inversion import (  # noqa: E402
    SegmentPlan,
    check_causal,
    invert_autoregressive,
)
from scoredraw.diffusion.flow_training import train_tarflow  # noqa: E402
from scoredraw.diffusion.tarflow import (  # noqa: E402
    Guidance,
    TarFlow,
    TarFlowBlock,
    TarFlowShape,
    load_flow,
    save_flow,
)
from scoredraw.errors import InputError  # noqa: E402

pytestmark = pytest.mark.oracle

SHAPE = TarFlowShape(8, 2, channels=16, head_dim=8, layers=1, expansion=2)
T, C = 16, 4
EXACT = 1e-12


def randomised(module: Any, seed: int = 0, size: float = 0.25) -> Any:
    """In float64, with weights that do something: a new block is the identity."""
    source = torch.Generator().manual_seed(seed)
    module = module.double().requires_grad_(False)
    for name, weights in module.named_parameters():
        noise = torch.randn(weights.shape, generator=source, dtype=torch.float64)
        least = 0.2 if "proj_out" in name else 1.0  # so that random noise does not overflow
        weights.copy_(least * size * noise + name.endswith("norm.weight"))
    return module


def block_of(*, backwards: bool = False, classes: int = 0, layers: int = 2) -> TarFlowBlock:
    made = TarFlowBlock(
        C, 16, T, layers=layers, head_dim=8, expansion=2, classes=classes, backwards=backwards
    )
    return randomised(made, 1)


def normal(*shape: int, seed: int = 0) -> Any:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def error(got: Any, want: Any) -> float:
    return float((got - want).abs().max())


@pytest.fixture(scope="module")
def flow() -> TarFlow:
    return randomised(TarFlow(SHAPE), 2)


# ── forwards ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backwards", [False, True])
def test_the_log_determinant_is_that_of_the_jacobian(backwards: bool) -> None:
    block, x = block_of(backwards=backwards), normal(1, T, C)
    _, logdet = block(x)
    J = torch.autograd.functional.jacobian(lambda tokens: block(tokens)[0], x).reshape(T * C, T * C)
    assert float(logdet) == pytest.approx(float(torch.linalg.slogdet(J)[1]), rel=1e-10)
    order = J.reshape(T, C, T, C).abs().sum(dim=(1, 3))
    assert float((torch.tril(order, -1) if backwards else torch.triu(order, 1)).max()) == 0
    check_causal(block.parameters_at, x)


def test_the_density_is_that_of_the_change_of_variables(flow: TarFlow) -> None:
    images = normal(2, 1, 8, 8)
    J = torch.autograd.functional.jacobian(lambda one: flow(one)[0], images[:1]).reshape(64, 64)
    z, _ = flow(images)
    base = torch.distributions.Normal(0.0, 1.0).log_prob(z[0]).sum()
    want = float(base + torch.linalg.slogdet(J)[1])
    assert float(flow.log_prob(images)[0]) == pytest.approx(want, rel=1e-10)


def test_patches_tile_the_image(flow: TarFlow) -> None:
    images = torch.arange(64.0).reshape(1, 1, 8, 8)
    tokens = flow.patches(images)
    assert tokens[0, 0].tolist() == [0, 1, 8, 9]
    assert tokens[0, 5].tolist() == [18, 19, 26, 27]
    assert torch.equal(flow.images(tokens), images)


# ── backwards ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_cache_gives_what_full_passes_give(backwards: bool, layers: int) -> None:
    block, z = block_of(backwards=backwards, layers=layers), normal(3, T, C)
    for G, k, refresh in ((0, None, False), (1, 3, False), (4, 2, False), (4, 2, True), (5, 2, 0)):
        plan = SegmentPlan(G, k, 0.0, refresh=bool(refresh))
        full = invert_autoregressive(
            block.parameters_at, block.ordered(z), segments=G, max_iter=k, tol=0, refresh=refresh
        )
        cached = block.inverse(z, plan)
        assert error(cached.x, block.ordered(full.x)) < EXACT
        assert (cached.passes, cached.tokens) == (full.passes, full.tokens)


@pytest.mark.parametrize("backwards", [False, True])
def test_every_exact_plan_undoes_the_block(backwards: bool) -> None:
    block, x = block_of(backwards=backwards), normal(4, T, C)
    z, _ = block(x)
    for G in range(T + 1):
        found = block.inverse(z, SegmentPlan(G, tol=0))
        assert error(found.x, x) < EXACT
        assert found.converged
    start = SegmentPlan(1, tol=0, init=x)  # from the solution: one sweep says that it is one
    assert error(block.inverse(z, start).x, x) < EXACT
    assert block.inverse(z, SegmentPlan(1, tol=1e-9, init=x)).passes == 1


def test_a_whole_flow_and_more_than_eight_blocks() -> None:
    """The published sampler leaves the eighth block it inverts half undone when that is cut."""
    deep = randomised(TarFlow(TarFlowShape(4, 1, 1, 16, 9, 1, 8, 2)), 3, 0.15)
    images = normal(2, 1, 4, 4)
    z, _ = deep(images)
    for plan in (SegmentPlan(0), SegmentPlan(1, tol=0), SegmentPlan(4, tol=0)):
        found = deep.inverse(z, plan)
        assert error(found.images, images) < 1e-10
        assert len(found.blocks) == 9
        assert found.passes <= 9 * 15
    mixed = [SegmentPlan(8 if i in (0, 6) else 1, tol=0) for i in range(9)]
    assert error(deep.inverse(z, mixed).images, images) < 1e-10


def test_plans_stand_in_forward_order(flow: TarFlow) -> None:
    z, _ = flow(normal(2, 1, 8, 8))
    plans = [SegmentPlan(1, k, 0.0) for k in (1, 2, 3, 4)]
    assert [block.passes for block in flow.inverse(z, plans).blocks] == [1, 2, 3, 4]
    passed, _ = flow.trace(flow.inverse(z).images)
    assert error(flow.inverse(z).blocks[2].x, passed[2]) < 1e-10


def test_error_falls_with_sweeps_and_is_gone_at_the_last(flow: TarFlow) -> None:
    images = normal(16, 1, 8, 8)
    z, _ = flow(images)
    errors = [
        error(flow.inverse(z, SegmentPlan(1, k, 0.0)).images, images) for k in (1, 3, 6, 12, 15)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < EXACT


def test_an_image_in_which_the_flow_overflows_leaves_the_others_alone(flow: TarFlow) -> None:
    images = normal(6, 1, 8, 8)
    z, _ = flow(images)
    z[2:4] *= 1e5
    for plan in (SegmentPlan(0), SegmentPlan(1, tol=0), SegmentPlan(4, tol=0)):
        found = flow.inverse(z, plan).images
        assert found.isnan().flatten(1).all(dim=1).tolist() == [i in (2, 3) for i in range(6)]
        kept = [0, 1, 4, 5]
        assert error(found[kept], images[kept]) < EXACT


def test_rows_of_a_batch_are_independent_and_an_empty_one_is_empty(flow: TarFlow) -> None:
    z, _ = flow(normal(5, 1, 8, 8))
    for plan in (SegmentPlan(0), SegmentPlan(4, 2, 0.0)):
        whole = flow.inverse(z, plan).images
        assert error(flow.inverse(z[3:4], plan).images, whole[3:4]) < EXACT
        assert flow.inverse(z[:0], plan).images.shape == (0, 1, 8, 8)


def test_half_precision_stays_itself() -> None:
    block, x = block_of(), normal(4, T, C)
    z, _ = block(x)
    for dtype, close in ((torch.float16, 0.02), (torch.bfloat16, 0.2)):
        half = block_of().to(dtype)
        found = half.inverse(z.to(dtype), SegmentPlan(4, tol=0)).x
        assert found.dtype == half(x.to(dtype))[0].dtype == dtype
        assert error(found.double(), x) < close


# ── labels and guidance ─────────────────────────────────────────────────────────────────────────


def guided_by_hand(block: TarFlowBlock, z: Any, labels: Any, g: Guidance) -> Any:
    """Token by token through full passes; at temperature 1."""
    x = z.clone()
    for t in range(1, T):
        with_label, without = block.parameters_at(x, labels), block.parameters_at(x)
        scale = g.scale * (t / (T - 1) if g.annealed else 1)
        s, u = (
            a + scale * (a - b) if part in g.what else a
            for part, a, b in zip("ac", with_label, without, strict=True)
        )
        x[:, t] = torch.exp(s[:, t]) * z[:, t] + u[:, t]
    return x


@pytest.mark.parametrize("what", ["a", "c", "ac"])
@pytest.mark.parametrize("annealed", [False, True])
def test_guidance(what: str, annealed: bool) -> None:
    block, z = block_of(classes=3), normal(4, T, C)
    labels = torch.tensor([0, 2, 1, 0])
    guidance = Guidance(1.5, what, annealed)
    want = guided_by_hand(block, z, labels, guidance)
    for plan in (SegmentPlan(0), SegmentPlan(1, tol=0), SegmentPlan(4, tol=0)):
        assert error(block.inverse(z, plan, labels, guidance).x, want) < 1e-11
    assert error(block.inverse(z, labels=labels).x, want) > 1e-3


def test_a_temperature_guides_a_model_without_labels() -> None:
    block, z = block_of(), normal(2, T, C)
    plain = block.inverse(z).x
    assert error(block.inverse(z, guidance=Guidance(1.0)).x, plain) < EXACT
    warm = Guidance(1.0, temperature=0.5)
    assert error(block.inverse(z, guidance=warm).x, plain) > 1e-3
    sweeps = block.inverse(z, SegmentPlan(2, tol=0), guidance=warm).x
    assert error(sweeps, block.inverse(z, guidance=warm).x) < EXACT


def test_a_label_that_is_hidden_is_the_mean_label_both_ways() -> None:
    block, x = block_of(classes=3), normal(4, T, C)
    labels = torch.tensor([0, -1, 2, -1])
    z, _ = block(x, labels)
    none, _ = block(x)
    assert torch.equal(z[1], none[1])
    assert not torch.allclose(z[0], none[0])
    assert error(block.inverse(z, SegmentPlan(4, tol=0), labels).x, x) < EXACT


# ── sampling, denoising, files, training ────────────────────────────────────────────────────────


def test_noise_has_the_learned_moments_and_can_be_truncated() -> None:
    """4000 normal numbers a place: their second moments are off by 2 %, 9 % is four and more."""
    other = TarFlow(SHAPE)
    other.var.copy_(torch.linspace(0.5, 2, T * C).reshape(T, C))
    z = other.noise(4000, generator=torch.Generator().manual_seed(0))
    assert float((z.square().mean(0) / other.var - 1).abs().max()) < 0.09
    cut = other.noise(500, truncate=1.5, generator=torch.Generator().manual_seed(0))
    assert 1.45 < float((cut / other.var.sqrt()).abs().max()) <= 1.5
    source = [torch.Generator().manual_seed(4) for _ in range(2)]
    made = other.sample(3, truncate=2.0, generator=source[0])
    again = other.inverse(other.noise(3, truncate=2.0, generator=source[1])).images
    assert torch.equal(made.images, again)


def test_denoising_a_gaussian_is_its_posterior_mean() -> None:
    """A new flow has p(y) = N(0, I): the clean image is y - σ² y."""
    images = normal(3, 1, 8, 8).float()
    got = TarFlow(SHAPE).requires_grad_(False).denoise(images, 0.2)
    torch.testing.assert_close(got, images * (1 - 0.04))


def test_a_file_holds_the_flow(flow: TarFlow, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="the diffusion extra is not installed")
    path = tmp_path / "flow.safetensors"
    save_flow(flow, path)
    again = load_flow(path)
    images = normal(2, 1, 8, 8).float()
    got, want = (f.log_prob(images.double()) for f in (again.double(), flow))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)
    assert again.shape == SHAPE
    save_flow(flow, path, torch.float16)
    assert load_flow(path).var.dtype == torch.float32
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    with pytest.raises(InputError, match="path: got"):
        load_flow(path)


def test_a_published_checkpoint_has_these_names(flow: TarFlow) -> None:
    names = set(flow.state_dict())
    layer = "blocks.3.attn_blocks.0."
    for name in ("attention.norm", "attention.qkv", "attention.proj", "mlp.norm", "mlp.main.0"):
        assert {f"{layer}{name}.weight", f"{layer}{name}.bias"} <= names
    assert {
        "var",
        "blocks.0.pos_embed",
        "blocks.0.proj_in.weight",
        "blocks.0.proj_out.bias",
    } < names


def test_training_learns_and_is_deterministic() -> None:
    """Images of a Gaussian with correlation: the entropy is a bound, and it is approached."""
    mixing = torch.linalg.cholesky(0.9 * torch.ones(16, 16) + 0.1 * torch.eye(16))
    source = torch.Generator().manual_seed(0)
    images = (torch.randn(4000, 16, generator=source) @ mixing.T).reshape(-1, 1, 4, 4)
    shape = TarFlowShape(4, 2, channels=16, head_dim=8, layers=1, blocks=2)
    flow = train_tarflow(shape, images, 150, noise_std=0.0, batch=256, learning_rate=5e-3)
    best = torch.distributions.MultivariateNormal(torch.zeros(16), scale_tril=mixing)
    gap = float((best.log_prob(images.flatten(1)) - flow.log_prob(images)).mean())
    new = TarFlow(shape).requires_grad_(False)
    start = float((best.log_prob(images.flatten(1)) - new.log_prob(images)).mean())
    assert 0 < gap < start / 4
    a, b = (train_tarflow(shape, images, 2, seed=5) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ── bad input ───────────────────────────────────────────────────────────────────────────────────


def test_bad_input(flow: TarFlow) -> None:
    images = torch.zeros(4, 1, 8, 8)
    for call, message in (
        (lambda: flow(torch.zeros(2, 1, 8, 9)), "images: got"),
        (lambda: flow.inverse(torch.zeros(2, T, C + 1)), "z: got"),
        (lambda: flow.inverse(torch.zeros(2, C)), "z: got"),
        (lambda: flow.inverse(torch.full((2, T, C), math.nan)), "z: got NaN"),
        (lambda: flow.inverse(torch.zeros(2, T, C), [SegmentPlan()] * 3), "plans: got 3"),
        (lambda: flow.sample(-1), "n: got -1"),
        (lambda: flow.sample(1, truncate=0.0), "truncate: got"),
        (lambda: flow(images.double(), torch.zeros(4).long()), "labels: got labels, want none"),
        (lambda: block_of(classes=3)(normal(2, T, C), torch.tensor([0])), "labels: got .1,."),
        (lambda: block_of(classes=3)(normal(1, T, C), torch.tensor([0.0])), "torch.float32, want"),
        (lambda: block_of(classes=3)(normal(1, T, C), torch.tensor([3])), "got 3, want below 3"),
        (lambda: TarFlow(TarFlowShape(8, 3)), "patch_size: got 3"),
        (lambda: TarFlowBlock(4, 10, 5, head_dim=4), "channels: got 10"),
        (lambda: Guidance(-1.0), "scale: got"),
        (lambda: Guidance(1.0, "b"), "what: got"),
        (lambda: Guidance(1.0, temperature=0.0), "temperature: got"),
        (lambda: train_tarflow(SHAPE, images, 0), "steps: got 0"),
        (lambda: train_tarflow(SHAPE, images, 1, batch=0), "batch: got 0"),
        (lambda: train_tarflow(SHAPE, images, 1, noise_std=-1.0), "noise_std: got"),
        (lambda: train_tarflow(SHAPE, images, 1, labels=torch.zeros(4).long()), "labels: got"),
    ):
        with pytest.raises(InputError, match=message):
            call()
