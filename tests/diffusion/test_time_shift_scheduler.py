"""Time shift in diffusers: against the sampler, and in pipelines, shared and per sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.parameterisations import per_sample, to_eps
from scoredraw.diffusion.schedules import DiscreteAlphas
from scoredraw.diffusion.time_shift import TimeShift, TimeShiftSampler, sample_variance
from scoredraw.errors import InputError

diffusers = pytest.importorskip("diffusers")

from scoredraw.diffusion.deis_scheduler import DEISScheduler  # noqa: E402
from scoredraw.diffusion.time_shift_scheduler import TimeShiftScheduler  # noqa: E402

pytestmark = [
    pytest.mark.contract,
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers, of its NumPy calls
]

TRAINED = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
DATA = GaussianMixtureScore(
    [0.4, 0.6], np.random.default_rng(0).normal(0, 0.4, (2, 64)), [np.eye(64) / 8] * 2, TRAINED
)
TRAILING: dict[str, Any] = {"timestep_spacing": "trailing", "clip_sample": False}
WIDE: dict[str, Any] = {"window": 60, "cutoff": 200}
BASES = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler",
)  # fmt: skip


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


X = noise(5, 1, 8, 8)


def biased(x: torch.Tensor, t: Any) -> torch.Tensor:
    times = torch.as_tensor(t).expand(len(x)) if torch.as_tensor(t).ndim == 0 else t
    return 1.03 * DATA.eps(x, times)


def run(scheduler: Any, count: int, x: torch.Tensor, network: Any = biased) -> torch.Tensor:
    """A pipeline's loop."""
    scheduler.set_timesteps(count)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


def by_sample(scheduler: Any, count: int, x: torch.Tensor, network: Any = biased) -> torch.Tensor:
    """A loop of one's own, with a time a sample."""
    scheduler.set_timesteps(count)
    for t in scheduler.timesteps:
        m = network(x, scheduler.model_timestep(x))
        x = scheduler.step(m, t, x).prev_sample
    return x


def as_output(kind: str) -> Any:
    """The same network, as one that predicts `kind`."""

    def network(x: torch.Tensor, t: Any) -> torch.Tensor:
        eps = biased(x, t)
        abar = torch.as_tensor(TRAINED.abar(np.asarray(t))).expand(len(x)).view(-1, 1, 1, 1)
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        x0 = (x - sigma * eps) / alpha
        return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[kind]

    return network


# ------------------------------------------------------------------ the method


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_around_ddim_it_is_the_sampler(kind) -> None:
    """float32 levels in diffusers: 1e-3 of a state that has been divided by alpha = 0.006."""
    base = diffusers.DDIMScheduler(prediction_type=kind, **TRAILING)
    scheduler = TimeShiftScheduler.around(base, per_sample=True, **WIDE)
    got = by_sample(scheduler, 20, X, as_output(kind))
    want, shifts = TimeShiftSampler(TRAINED, 20, **WIDE).sample(biased, X)
    assert len(np.unique(shifts - scheduler.timesteps.numpy()[1:].tolist()[0])) > 3
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_ddims_own_step_is_that_of_the_scheduler_inside(kind, single, clip) -> None:
    """The leap from t_s against DDIMScheduler, led there by the state at the nominal level."""
    how = {"prediction_type": kind, "clip_sample": clip, "clip_sample_range": 0.4}
    base = diffusers.DDIMScheduler(**TRAILING | how)
    ends = []
    for leaps in (True, False):
        scheduler = TimeShiftScheduler.around(base, per_sample=single, **WIDE)
        assert scheduler._leaps
        scheduler._leaps = leaps
        ends.append((by_sample if single else run)(scheduler, 20, X, as_output(kind)))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-3)  # its levels are float32
    assert bool(ends[0].abs().max() <= 0.4) == clip


def test_one_image_gets_the_same_either_way() -> None:
    base = diffusers.DDIMScheduler(**TRAILING)
    shared = TimeShiftScheduler.around(base, **WIDE)
    x = run(shared, 20, X[:1])
    single = TimeShiftScheduler.around(base, per_sample=True, **WIDE)
    assert torch.equal(by_sample(single, 20, X[:1]), x)
    _, shifts = TimeShiftSampler(TRAINED, 20, **WIDE).sample(biased, X[:1])
    assert shared.timesteps.tolist()[1:] == shifts[:-1, 0].tolist()
    assert single.timesteps.tolist() == list(range(999, 0, -50))


def test_a_batch_shares_the_time_of_its_mean_variance() -> None:
    scheduler = TimeShiftScheduler.around(diffusers.DDIMScheduler(**TRAILING), **WIDE)
    scheduler.set_timesteps(10)
    rule, x = TimeShift(scheduler.alphas_cumprod.double(), 60, 200), X
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(biased(x, t), t, x).prev_sample
        if i < 9:
            want = rule.of_variance(sample_variance(x).mean()[None], 899 - 100 * i)
            assert scheduler.timesteps[i + 1] == want[0]


@pytest.mark.parametrize("name", [*BASES, "DEISScheduler"])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("off", [{"window": 0}, {"cutoff": 1000}])
def test_without_a_window_every_bit_is_the_bases(name, single, off) -> None:
    base = DEISScheduler() if name == "DEISScheduler" else getattr(diffusers, name)()
    scheduler = TimeShiftScheduler.around(base, per_sample=single, **{**WIDE, **off})
    torch.manual_seed(0)
    want = run(base, 12, X)
    torch.manual_seed(0)
    assert torch.equal((by_sample if single else run)(scheduler, 12, X), want)


@pytest.mark.parametrize("name", [*BASES, "DEISScheduler"])
def test_around_every_base_the_network_is_asked_at_shifted_times(name) -> None:
    base = DEISScheduler() if name == "DEISScheduler" else getattr(diffusers, name)()
    scheduler = TimeShiftScheduler.around(base, **WIDE)
    base.set_timesteps(12)
    asked: list[int] = []

    def network(x: torch.Tensor, t: Any) -> torch.Tensor:
        asked.append(int(t))
        return biased(x, t)

    x = run(scheduler, 12, X, network)
    away = np.array(asked) - base.timesteps.numpy()
    assert away[0] == 0
    assert np.abs(away).max() <= 30
    assert (away != 0).any()
    assert torch.isfinite(x).all()
    assert x.abs().max() < 4


def test_half_precision_and_learned_variances() -> None:
    base = diffusers.DDIMScheduler(**TRAILING)
    for dtype in (torch.float16, torch.bfloat16):
        x = by_sample(TimeShiftScheduler.around(base, per_sample=True, **WIDE), 10, X.to(dtype))
        assert x.dtype == dtype
        assert torch.isfinite(x).all()
    learned = diffusers.DDPMScheduler(variance_type="learned_range", **TRAILING)
    plain = TimeShiftScheduler.around(learned, **WIDE)
    x = run(plain, 10, X, lambda x, t: torch.cat([biased(x, t), x.clamp(-1, 1)], 1))
    assert x.shape == X.shape
    assert (plain.timesteps - torch.arange(999, 0, -100)).abs().max() > 0


def test_gradients_flow_and_nothing_given_is_changed() -> None:
    scheduler = TimeShiftScheduler.around(diffusers.DDIMScheduler(**TRAILING), **WIDE)
    start = X.clone().requires_grad_()
    run(scheduler, 5, start, lambda x, t: 0.3 * x).sum().backward()
    assert start.grad is not None
    assert (start.grad != 0).all()
    assert torch.equal(start.detach(), X)


# ------------------------------------------------------------------ pipelines


def watched(network: Any, seen: list[list[float]]) -> Any:
    """A hook that notes the times a network is really asked at."""

    def note(_: Any, args: Any, kwargs: Any) -> None:
        t = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        seen.append(torch.as_tensor(t).double().flatten().tolist())

    return network.register_forward_pre_hook(note, with_kwargs=True)


@pytest.mark.parametrize("name", ["DDPMPipeline", "DDIMPipeline"])
def test_it_drops_into_a_pipeline(name, unet, generated) -> None:
    pipe = getattr(diffusers, name)(unet, diffusers.DDIMScheduler(**TRAILING))
    pipe.scheduler = TimeShiftScheduler.around(pipe.scheduler, **WIDE)
    seen: list[list[float]] = []
    with watched(unet, seen):
        images = generated(pipe, 5, batch_size=2)
    asked = [one[0] for one in seen]
    assert asked == pipe.scheduler.timesteps.tolist()
    assert asked != [999, 799, 599, 399, 199]
    x = noise(2, 1, 8, 8, seed=7, dtype=torch.float32)
    with torch.no_grad():
        x = run(pipe.scheduler, 5, x, lambda x, t: unet(x, t).sample)
    want = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images, want, atol=1e-5)


def test_a_hook_gives_every_sample_its_own_time(unet, generated) -> None:
    """Against the sampler; a v-prediction, since an untrained eps would blow up."""
    unet = unet.double()
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    base = diffusers.DDIMScheduler(prediction_type="v_prediction", **TRAILING)
    levels = DiscreteAlphas(base.alphas_cumprod.double().numpy())  # float32 in diffusers
    pipe.scheduler = TimeShiftScheduler.around(base, per_sample=True, window=200, cutoff=100)
    seen: list[list[float]] = []
    with pipe.scheduler.attach(unet), watched(unet, seen):
        images = generated(pipe, 5, batch_size=3)
    assert any(len(set(times)) > 1 for times in seen)

    def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (per_sample(f(t.numpy()), x) for f in (levels.alpha, levels.sigma))
        return to_eps(unet(x, t).sample, x, alpha, sigma, "v_prediction")

    x = noise(3, 1, 8, 8, seed=7)
    with torch.no_grad():
        want, shifts = TimeShiftSampler(levels, 5, window=200, cutoff=100).sample(eps, x)
    assert np.array(seen[1:]).tolist() == shifts[:-1].tolist()
    want = (want / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images, want, atol=1e-4)
    with pytest.raises(InputError, match="step: got a network asked at nominal times, step 1"):
        generated(pipe, 5, batch_size=3)  # the hook is gone


def test_a_pipeline_is_saved_and_loaded_with_it(unet, generated, tmp_path) -> None:
    inside = DEISScheduler(solver_order=2)
    pipe = diffusers.DDPMPipeline(unet, TimeShiftScheduler.around(inside, **WIDE))
    pipe.save_pretrained(tmp_path)
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is TimeShiftScheduler
    assert type(again.scheduler.base) is DEISScheduler
    assert again.scheduler.config.window == 60
    assert again.scheduler.base.config.solver_order == 2
    again.unet = unet  # what a network says depends on where its weights lie
    np.testing.assert_array_equal(generated(again, 5), generated(pipe, 5))


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("to_image", [False, True])
@pytest.mark.parametrize("name", ["PNDMScheduler", "UniPCMultistepScheduler"])
def test_it_drops_into_stable_diffusion(
    single, to_image, name, stable_diffusion, generated
) -> None:
    """Guidance doubles the batch; image to image begins later, in a slice of the timesteps."""
    base = getattr(diffusers, name)(steps_offset=1, prediction_type="v_prediction")
    if name == "PNDMScheduler":
        base = type(base).from_config(base.config, skip_prk_steps=True)
    scheduler = TimeShiftScheduler.around(base, per_sample=single, window=200, cutoff=100)
    kind = "StableDiffusionImg2ImgPipeline" if to_image else "StableDiffusionPipeline"
    pipe = stable_diffusion(kind, base)
    pipe.scheduler = scheduler
    words = noise(2, 4, 8, dtype=torch.float32)
    extra: dict[str, Any] = {"height": 8, "width": 8}
    if to_image:
        extra = {"image": torch.rand(2, 3, 8, 8), "strength": 0.67}
    seen: list[list[float]] = []
    hook = scheduler.attach(pipe.unet) if single else watched(pipe.unet, [])
    with hook, watched(pipe.unet, seen):
        images = generated(pipe, 5, prompt_embeds=words, negative_prompt_embeds=0 * words, **extra)
    assert np.isfinite(images).all()
    base.set_timesteps(5)
    nominal = base.timesteps.tolist()[-len(seen) :]
    assert (len(seen) < len(base.timesteps)) == to_image
    away = [max(abs(t - n) for t in times) for times, n in zip(seen, nominal, strict=True)]
    assert away[0] == 0
    assert 0 < max(away) <= 100
    if single:
        assert all(times[:2] == times[2:] for times in seen[1:] if len(times) == 4)
        assert any(len(set(times)) == 2 for times in seen)


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("EulerDiscreteScheduler", {}, "base: got EulerDiscreteScheduler, noise"),
        ("FlowMatchEulerDiscreteScheduler", {}, "base: got FlowMatch"),
        ("EDMEulerScheduler", {}, "base: got EDMEuler"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "alphas_cumprod"),
    ],
)
def test_bases_it_cannot_shift_are_refused(name, config, message) -> None:
    with pytest.raises(InputError, match=message):
        TimeShiftScheduler.around(getattr(diffusers, name)(**config))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"base_class": "Nothing"}, "base_class: got 'Nothing', want a scheduler's name"),
        ({"base_class": "nowhere:X"}, "base_class: got 'nowhere:X', want a scheduler's name"),
        ({"base_class": "UNet2DModel"}, "base_class: got 'UNet2DModel', want a scheduler's name"),
        ({"window": -2}, "window: got -2"),
        ({"cutoff": 2000}, "cutoff: got 2000"),
        ({"target": "matched"}, "data_variance: got None"),
    ],
)
def test_mistakes_are_one_line(how, message) -> None:
    with pytest.raises(InputError, match=message) as error:
        TimeShiftScheduler(**how)
    assert "\n" not in str(error.value)


def test_steps_out_of_order_are_refused() -> None:
    scheduler = TimeShiftScheduler(base_config=TRAILING, window=60, cutoff=200)
    with pytest.raises(InputError, match="step: got no levels"):
        scheduler.step(X, 999, X)
    for arguments, message in (
        ({"num_inference_steps": 0}, "num_inference_steps: got 0"),
        ({"num_inference_steps": 5, "timesteps": [9, 3]}, "timesteps: got some for DDIMScheduler"),
    ):
        with pytest.raises(InputError, match=message):
            scheduler.set_timesteps(**arguments)
    scheduler.set_timesteps(5)
    kept = scheduler.timesteps.tolist()  # a pipeline that copies them
    with pytest.raises(InputError, match="timestep: got 5, want one of"):
        scheduler.step(X, 5, X)
    x = X
    for t in scheduler.timesteps:
        with pytest.raises(InputError, match="per_sample: got False, want True"):
            scheduler.model_timestep(x)
        x = scheduler.step(biased(x, t), t, x).prev_sample
    with pytest.raises(InputError, match="after the last step"):
        scheduler.step(x, t, x)
    scheduler.set_timesteps(5)
    x = scheduler.step(biased(X, 999), kept[0], X).prev_sample
    with pytest.raises(InputError, match=r"timestep: got 799 at step 1, want 769, the shifted"):
        scheduler.step(biased(x, kept[1]), kept[1], x)
    with pytest.raises(InputError, match="sample: got 2 at step 1, want the 5 before"):
        scheduler.step(x[:2], scheduler.timesteps[1], x[:2])
    with pytest.raises(InputError, match="per_sample: got False, want True, to attach"):
        scheduler.attach(torch.nn.Identity())


def test_states_with_nan_are_named_by_their_step() -> None:
    scheduler = TimeShiftScheduler(base_config=TRAILING)
    scheduler.set_timesteps(5)
    with pytest.raises(InputError, match="sample: got NaN or infinity before step 1"):
        scheduler.step(X * np.nan, 999, X)
