"""Teleportation in diffusers: around its schedulers, in its pipelines, saved and loaded."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from scoredraw.diffusion.gaussian_score import GaussianScore
from scoredraw.errors import InputError

diffusers = pytest.importorskip("diffusers")

from scoredraw.diffusion.deis_scheduler import DEISScheduler  # noqa: E402
from scoredraw.diffusion.teleport_scheduler import TeleportScheduler  # noqa: E402

pytestmark = [
    pytest.mark.contract,
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers, of its NumPy calls
    pytest.mark.filterwarnings("ignore:.*much of what is skipped counts.*"),
]

D = 6
SPREAD = np.array([1.5, 0.6, 0.2, 0.05])
AXES = np.linalg.qr(np.random.default_rng(3).standard_normal((D, D)))[0][:, :4]
DATA = GaussianScore(np.linspace(-0.5, 0.5, D), SPREAD, AXES, residual=0.01)
VP = ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISScheduler")
VE = ("EulerDiscreteScheduler", "HeunDiscreteScheduler")
CONFIG = {"DDIMScheduler": {"clip_sample": False, "timestep_spacing": "trailing"}}


def made(name: str, **config: Any) -> Any:
    kind = DEISScheduler if name == "DEISScheduler" else getattr(diffusers, name)
    return kind(**CONFIG.get(name, {}), **config)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(base: Any) -> torch.Tensor:
    """sigma/alpha at base's timesteps, from its public tables."""
    if hasattr(base, "sigmas"):
        return base.sigmas[: len(base.timesteps)].double()
    abar = base.alphas_cumprod[base.timesteps].double()
    return ((1 - abar) / abar).sqrt()


def answer(base: Any, scaled: torch.Tensor, index: int) -> torch.Tensor:
    """What a perfect network says about a VP state, at base's level of that number."""
    rho = float(levels(base)[index])
    length = math.hypot(1, rho)
    x = scaled * length
    eps, x0 = DATA.eps(x, rho), DATA.denoise(x, rho)
    kind = base.config.prediction_type
    v = (eps - rho * x0) / length
    return {"epsilon": eps, "sample": x0, "v_prediction": v}[kind]


def run(scheduler: Any, count: int, x: torch.Tensor, first: int | None = None) -> torch.Tensor:
    """A pipeline's loop; with first, a plain scheduler begun there by hand."""
    base = scheduler if first is not None else scheduler._base
    if first is None:
        scheduler.set_timesteps(count)
        times = scheduler.timesteps
        first = len(base.timesteps) - len(times)
    else:
        times = scheduler.timesteps[first:]
    for i, t in enumerate(times):
        out = answer(base, scheduler.scale_model_input(x, t), first + i)
        x = scheduler.step(out, t, x).prev_sample
    return x


def start(base: Any, count: int) -> torch.Tensor:
    base.set_timesteps(count)
    return noise(5, D) * float(base.init_noise_sigma)


def state(rho: float, kind: str) -> tuple[float, float]:
    length = math.hypot(1, rho) if kind == "vp" else 1.0
    return 1 / length, rho / length


CASES = [(name, kind) for name in VP for kind in ("epsilon", "sample", "v_prediction")]
CASES += [(name, kind) for name in VE for kind in ("epsilon", "v_prediction")]


def test_noise_is_carried_once_unless_it_changes_in_between(monkeypatch) -> None:
    carried = []
    monkeypatch.setattr(
        GaussianScore, "between", lambda _, x, *levels: carried.append(x.clone()) or x + 1
    )
    scheduler = TeleportScheduler(made("DPMSolverMultistepScheduler"), DATA, skip_steps=4)

    def first_step(change: float, network: float = 0) -> None:
        carried.clear()
        scheduler.set_timesteps(12)
        x, t = torch.zeros(2, D), scheduler.timesteps[0]
        shown = scheduler.scale_model_input(x, t)
        if network:
            shown += network
        if change:
            x += change
        scheduler.step(torch.zeros(2, D), t, x)

    first_step(0)
    assert len(carried) == 1
    first_step(0, network=3)
    assert [float(x.mean()) for x in carried] == [0, 0]
    first_step(2)
    assert [float(x.mean()) for x in carried] == [0, 2]
    with torch.inference_mode():
        first_step(2)
    assert [float(x.mean()) for x in carried] == [0, 2]
    carried.clear()
    run(scheduler, 12, torch.zeros(2, D))
    assert len(carried) == 1


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_it_is_the_closed_form_and_then_base_without_a_history(name, prediction) -> None:
    base = made(name, prediction_type=prediction)
    x = start(base, 12)
    wrapped = TeleportScheduler(made(name, prediction_type=prediction), DATA, skip_steps=4)
    ours = run(wrapped, 12, x)
    first = 4 * base.order
    rho, kind = levels(base), "vp" if name in VP else "ve"
    moved = DATA.between(x, state(float(rho[0]), kind), state(float(rho[first]), kind))
    if hasattr(base, "set_begin_index"):
        base.set_begin_index(first)
    torch.testing.assert_close(ours, run(base, 12, moved, first), rtol=1e-6, atol=1e-6)
    assert len(wrapped.timesteps) == len(base.timesteps) - first
    assert wrapped.num_inference_steps == 8


@pytest.mark.parametrize("name", [*VP, *VE])
def test_fewer_calls_are_as_good_and_as_many_are_better(name) -> None:
    base = made(name)
    x = start(base, 12)
    alone = run(base, 12, x, first=0)
    kind = "vp" if name in VP else "ve"
    exact = DATA.between(x, state(float(levels(base)[0]), kind), (1.0, 0.0))

    def error(end: torch.Tensor) -> float:
        return float((end - exact).square().mean().sqrt())

    def teleported(grid: str) -> float:
        return error(run(TeleportScheduler(made(name), DATA, sigma_skip=4.0, grid=grid), 12, x))

    assert teleported("tail") < 1.02 * error(alone)
    assert teleported("respace") < 0.75 * error(alone)


def test_edm_schedulers_start_at_the_carried_state() -> None:
    for name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        base = getattr(diffusers, name)()
        wrapped = TeleportScheduler(base, DATA, sigma_skip=5.0)
        wrapped.set_timesteps(60)
        sigma = levels(base)[len(base.timesteps) - len(wrapped.timesteps) :]
        assert 5.0 <= sigma[0] < 10.0
        x = noise(4, D) * wrapped.init_noise_sigma
        exact = DATA.teleport(x, 80.0, 0.0)
        for s, t in zip(sigma, wrapped.timesteps, strict=True):
            scaled = wrapped.scale_model_input(x, t)
            share = 0.25 / (s**2 + 0.25)
            state = scaled * (s**2 + 0.25).sqrt()
            network = (DATA.denoise(state, s) - share * state) / (s * 0.5 / (s**2 + 0.25).sqrt())
            x = wrapped.step(network, t, x).prev_sample
        assert (x - exact).square().mean().sqrt() < 0.04 * exact.std()


def test_a_flow_is_carried_in_its_own_states() -> None:
    base = diffusers.FlowMatchEulerDiscreteScheduler()
    wrapped = TeleportScheduler(base, DATA, sigma_skip=3.0, launch="step")
    wrapped.set_timesteps(10)
    x, y = noise(4, D), noise(4, D)
    s = levels(base)
    assert torch.equal(wrapped.timesteps[:1], base.timesteps[:1])
    x = wrapped.step(torch.full_like(x, torch.nan), wrapped.timesteps[0], x).prev_sample
    begun = 1 + len(base.timesteps) - len(wrapped.timesteps)
    first = float(s[begun])
    assert first / (1 - first) >= 3.0 > float(s[begun + 1] / (1 - s[begun + 1]))
    moved = DATA.between(y, (1 - float(s[0]), float(s[0])), (1 - first, first))
    torch.testing.assert_close(x, moved)
    v = noise(4, D, seed=2)
    stepped = wrapped.step(v, wrapped.timesteps[1], x).prev_sample
    torch.testing.assert_close(stepped, x + (float(s[begun + 1]) - first) * v)


# ------------------------------------------------------------------ levels


def test_respace_leaves_as_many_steps_as_asked_for_below_the_skip() -> None:
    for name in (*VP, *VE):
        for count in (2, 5, 20):
            wrapped = TeleportScheduler(made(name), DATA, sigma_skip=4.0, grid="respace")
            wrapped.set_timesteps(count)
            assert wrapped.num_inference_steps - count in ((0,) if count > 2 else (0, 1)), name
            rho = levels(wrapped._base)[wrapped._first :]
            assert float(rho[0]) >= 4.0 * (1 - 1e-6)
    with pytest.raises(InputError, match="num_inference_steps: got 20 steps below sigma_skip"):
        TeleportScheduler(made(VP[1]), DATA, sigma_skip=1e-3, grid="respace").set_timesteps(20)
    by_steps = TeleportScheduler(made("DDIMScheduler"), DATA, skip_steps=3, grid="respace")
    by_steps.set_timesteps(7)
    assert (len(by_steps._base.timesteps), by_steps.num_inference_steps) == (10, 7)


def test_nothing_is_skipped_where_no_level_is_above() -> None:
    wide = GaussianScore(np.zeros(D), residual=1e8)
    wrapped, base = TeleportScheduler(made(VP[1]), wide), made(VP[1])
    x = start(base, 8)
    assert torch.equal(run(wrapped, 8, x), run(base, 8, x, first=0))
    default = TeleportScheduler(made(VP[0]), DATA)
    default.set_timesteps(50)
    first = levels(default._base)[default._first : default._first + 2]
    assert first[0] >= 2 * DATA.widest > first[1]


def test_what_cannot_be_skipped_is_an_error() -> None:
    base = made("DDIMScheduler")
    with pytest.raises(InputError, match="sigma_skip: got 1000, want a level in"):
        TeleportScheduler(base, DATA, sigma_skip=1000).set_timesteps(10)
    with pytest.raises(InputError, match="skip_steps: got 10, want fewer than the 10 steps"):
        TeleportScheduler(base, DATA, skip_steps=10).set_timesteps(10)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match=r"sigma_skip: got .*, want a positive noise level"):
            TeleportScheduler(base, DATA, sigma_skip=wrong)
    with pytest.raises(InputError, match="sigma_skip, skip_steps: got both"):
        TeleportScheduler(base, DATA, sigma_skip=1.0, skip_steps=1)
    with pytest.raises(InputError, match="base: got PNDM, want another scheduler"):
        TeleportScheduler(diffusers.PNDMScheduler(), DATA)
    with pytest.raises(InputError, match="base: got TeleportScheduler, want a scheduler"):
        TeleportScheduler(TeleportScheduler(base, DATA), DATA)
    with pytest.raises(InputError, match="gaussian: got int, want a GaussianScore"):
        TeleportScheduler(base, 3)
    with pytest.raises(InputError, match="step: got no levels, want set_timesteps before it"):
        TeleportScheduler(base, DATA).step(noise(1, D), 0, noise(1, D))
    wrapped = TeleportScheduler(base, DATA, sigma_skip=4.0)
    wrapped.set_timesteps(10)
    with pytest.raises(InputError, match=r"x: got \(2, 3\), want \(B, \*dims\) with 6 entries"):
        wrapped.scale_model_input(noise(2, 3), wrapped.timesteps[0])


def test_it_warns_of_a_skip_into_the_data_and_of_pixels_in_the_unit_range() -> None:
    wrapped = TeleportScheduler(made("DDIMScheduler"), DATA, sigma_skip=0.5)
    with pytest.warns(UserWarning, match=r"sqrt of the largest variance"):
        wrapped.set_timesteps(50)
    unit = GaussianScore(np.full(D, 0.5), residual=0.04)
    with pytest.warns(UserWarning, match=r"look like pixels in \[0, 1\]"):
        TeleportScheduler(made("DDIMScheduler"), unit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TeleportScheduler(made("DDIMScheduler"), unit.rescaled(2, -1))


# ------------------------------------------------------------------ its interface


def test_half_precision_and_an_empty_batch() -> None:
    wrapped = TeleportScheduler(made(VP[0]), DATA, sigma_skip=4.0)
    wrapped.set_timesteps(10)
    for x in (noise(3, D).half(), noise(0, D)):
        wrapped.set_timesteps(10)
        t = wrapped.timesteps[0]
        out = wrapped.step(torch.zeros_like(x), t, wrapped.scale_model_input(x, t) * 0 + x)
        assert out.prev_sample.dtype == x.dtype
        assert out.prev_sample.shape == x.shape


def test_signatures_configuration_and_copies_are_those_of_base() -> None:
    base = made("DPMSolverMultistepScheduler", beta_schedule="scaled_linear", solver_order=3)
    wrapped = TeleportScheduler(base, DATA, sigma_skip=4.0)
    assert inspect.signature(wrapped.step) == inspect.signature(base.step)
    assert inspect.signature(wrapped.set_timesteps) == inspect.signature(base.set_timesteps)
    assert (wrapped.order, wrapped.init_noise_sigma, len(wrapped)) == (1, 1.0, 1000)
    assert wrapped.config.solver_order == 3
    back = diffusers.UniPCMultistepScheduler.from_config(wrapped.config)
    assert back.config.beta_schedule == "scaled_linear"
    again = TeleportScheduler.from_config(wrapped.config, gaussian=DATA, solver_order=2)
    assert type(again._base) is type(base)
    assert (again.config.solver_order, again.config.sigma_skip) == (2, 4.0)
    named = {**made("DEISScheduler").config, "_class_name": "DEISScheduler"}
    new = TeleportScheduler.from_config(named, gaussian=DATA, skip_steps=2)
    assert type(new._base) is DEISScheduler
    with pytest.raises(InputError, match="gaussian: got None, want the GaussianScore"):
        TeleportScheduler.from_config(wrapped.config)
    other = copy.deepcopy(wrapped)
    wrapped.set_timesteps(20)
    other.set_timesteps(10)
    assert len(wrapped._base.timesteps) == 20
    with pytest.raises(AttributeError, match="no_such_thing"):
        wrapped.no_such_thing  # noqa: B018


@pytest.mark.parametrize("name", [*VP, *VE])
def test_it_is_saved_and_loaded_with_mean_and_eigenvectors(name, tmp_path) -> None:
    wrapped = TeleportScheduler(made(name), DATA, skip_steps=3, grid="respace", launch="input")
    wrapped.save_pretrained(tmp_path)
    again = TeleportScheduler.from_pretrained(tmp_path)
    assert type(again._base) is type(wrapped._base)
    np.testing.assert_array_equal(again.gaussian.vectors, DATA.vectors)
    assert again.gaussian.residual == DATA.residual
    x = start(made(name), 6)
    assert torch.equal(run(again, 6, x), run(wrapped, 6, x))
    (tmp_path / "gaussian.safetensors").unlink()
    with pytest.raises(InputError, match=r"without gaussian\.safetensors, want a saved scheduler"):
        TeleportScheduler.from_pretrained(tmp_path)


# ------------------------------------------------------------------ in pipelines

PIXELS = GaussianScore.fit(np.random.default_rng(5).normal(0, 0.5, (100, 1, 8, 8)), rank=20)


@pytest.mark.parametrize(
    ("pipeline", "name"),
    [("DDIMPipeline", "DDIMScheduler"), ("DDIMPipeline", "DEISScheduler"),
     ("DDPMPipeline", "DDIMScheduler"), ("DDPMPipeline", "DPMSolverMultistepScheduler")],
)  # fmt: skip
def test_a_pipeline_that_never_scales_its_input(pipeline, name, tmp_path, unet, generated) -> None:
    """One call on the noise, whose answer is not used, then base from the carried state."""
    pipe = getattr(diffusers, pipeline)(unet, diffusers.DDIMScheduler())
    base = made(name)
    pipe.scheduler = TeleportScheduler(base, PIXELS, sigma_skip=5.0, launch="step")
    calls = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    images = generated(pipe, 6, batch_size=2)
    plain = made(name)
    plain.set_timesteps(6)
    rho = levels(plain)
    first = len(plain.timesteps) - len(pipe.scheduler.timesteps) + 1
    assert first >= 2
    assert len(calls) == len(plain.timesteps) - first + 1
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    x = PIXELS.between(x, state(float(rho[0]), "vp"), state(float(rho[first]), "vp"))
    if hasattr(plain, "set_begin_index"):
        plain.set_begin_index(first)
    with torch.no_grad():
        for t in plain.timesteps[first:]:
            x = plain.step(unet(x, t).sample, t, x).prev_sample
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images, expected, atol=1e-5)
    if pipeline == "DDPMPipeline":
        pipe.save_pretrained(tmp_path)
        again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
        assert type(again.scheduler) is TeleportScheduler
        assert type(again.scheduler._base) is type(base)
        again.unet = unet  # what a network says depends on where its weights lie
        np.testing.assert_array_equal(generated(again, 6, batch_size=2), images)
    pipe.scheduler = TeleportScheduler(made(name), PIXELS, sigma_skip=5.0)
    with pytest.raises(InputError, match="launch: got 'input', and a step without it, want"):
        generated(pipe, 6, batch_size=2)


LATENT: dict[str, Any] = {"steps_offset": 1, "clip_sample": False}
LATENTS = GaussianScore.fit(np.random.default_rng(5).normal(0, 0.8, (50, 4, 8, 8)), rank=20)
WORDS = noise(1, 4, 8).float()


@pytest.mark.parametrize("name", ["DDIMScheduler", *VP[1:], "EulerDiscreteScheduler"])
def test_a_latent_pipeline_with_guidance_saves_its_calls(name, stable_diffusion, generated) -> None:
    pipe = stable_diffusion("StableDiffusionPipeline", diffusers.DDIMScheduler(**LATENT))
    pipe.scheduler = TeleportScheduler(made(name), LATENTS, sigma_skip=4.0)
    seen: list[torch.Tensor] = []
    pipe.unet.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    images = generated(
        pipe, 6, prompt_embeds=WORDS, negative_prompt_embeds=0 * WORDS, height=8, width=8,
        latents=x.clone(),
    )  # fmt: skip
    assert np.isfinite(images).all()
    assert len(seen) == len(pipe.scheduler.timesteps) < 6
    rho = levels(pipe.scheduler._base)
    start = float(rho[0]), float(rho[pipe.scheduler._first])
    vp = LATENTS.between(x, state(start[0], "vp"), state(start[1], "vp"))
    if name in VE:  # the pipeline scales the noise, the scheduler what the network sees
        x = x * float(pipe.scheduler.init_noise_sigma)
        vp = LATENTS.between(x, (1, start[0]), (1, start[1])) / math.hypot(1, start[1])
    torch.testing.assert_close(seen[0], torch.cat([vp, vp]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image_does_not_start_from_noise_and_is_not_carried(
    strength, stable_diffusion, generated
) -> None:
    pipe = stable_diffusion("StableDiffusionImg2ImgPipeline", diffusers.DDIMScheduler(**LATENT))
    pipe.scheduler = TeleportScheduler(made("DPMSolverMultistepScheduler"), LATENTS, sigma_skip=4.0)
    seen: list[torch.Tensor] = []
    pipe.unet.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    added: list[torch.Tensor] = []
    add = pipe.scheduler._base.add_noise
    pipe.scheduler._base.add_noise = lambda *given: added.append(add(*given)) or added[-1]
    images = generated(
        pipe, 6, image=torch.rand(1, 3, 8, 8), strength=strength, prompt_embeds=WORDS,
        negative_prompt_embeds=0 * WORDS,
    )  # fmt: skip
    assert np.isfinite(images).all()
    torch.testing.assert_close(seen[0][:1], added[0])
    begun = 3 if strength < 1 else 0
    assert pipe.scheduler.begin_index == pipe.scheduler._first + begun
