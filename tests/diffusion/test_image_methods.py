"""Sampling image models: what they are opened from, and every method of the catalogue."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the diffusion extra is not installed")

from scoredraw import registry  # noqa: E402
from scoredraw.diffusion import image_methods  # noqa: E402
from scoredraw.diffusion.image_models import (  # noqa: E402
    ImageModel,
    fashion_features,
    open_image_model,
    pictures,
)
from scoredraw.errors import InputError  # noqa: E402

pytestmark = pytest.mark.contract
KINDS = ("epsilon", "v_prediction", "sample")
METHODS = {m.name: m for m in registry.methods("images")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of a tiny UNet, saved by diffusers."""
    path = tmp_path_factory.mktemp("pipeline")
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images for the methods that need the data's mean and covariance."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, images=np.random.default_rng(0).uniform(-1, 1, (40, 1, 28, 28)))
    return path


def unet(channels: int = 1):
    torch.manual_seed(0)
    blocks = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
    return diffusers.UNet2DModel(
        sample_size=28, in_channels=channels, out_channels=channels, block_out_channels=(8, 8),
        layers_per_block=1, down_block_types=blocks[0], up_block_types=blocks[1], norm_num_groups=4,
    )  # fmt: skip


def exact_model() -> ImageModel:
    """The eps of N(0, 1/4) pixels in place of a network: every solver must find the same images."""
    schedule = open_schedule()

    class Exact(torch.nn.Module):
        def forward(self, x, t):
            alpha, sigma = schedule.alpha(t[0].item()), schedule.sigma(t[0].item())
            out = x * float(sigma / (alpha**2 / 4 + sigma**2))
            return type("Output", (), {"sample": out})

    return ImageModel("exact", "", Exact(), schedule, "epsilon", (1, 28, 28))


def open_schedule():
    from scoredraw.diffusion.schedules import DiscreteAlphas

    return DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_pipeline_gives_its_eps(kind, tmp_path) -> None:
    network = unet()
    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(tmp_path)
    model = open_image_model(tmp_path)
    assert (model.kind, model.shape) == (kind, (1, 28, 28))
    x = model.noise(3, seed=5)
    with torch.no_grad():
        said = network(x, torch.tensor(500)).sample
        got = model.eps(x, 500.0)
    abar = scheduler.alphas_cumprod[500]
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    want = {
        "epsilon": said,
        "v_prediction": alpha * said + sigma * x,
        "sample": (x - alpha * said) / sigma,
    }[kind]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_noise_is_an_image_s_own() -> None:
    model = exact_model()
    assert torch.equal(model.noise(5, 1)[3:], model.noise(2, 1, first=3))
    assert not torch.equal(model.noise(2, 1), model.noise(2, 2))
    assert model.noise(0).shape == (0, 1, 28, 28)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.takes == "ode"])
def test_solvers_find_the_exact_images(name, data) -> None:
    """Within a quarter of the closed form with 24 calls, and much nearer with 48."""
    model = exact_model()
    x = model.noise(4)
    ends = model.schedule.alpha([999.0, 0.0]), model.schedule.sigma([999.0, 0.0])
    spread = np.sqrt(np.square(ends[0]) / 4 + np.square(ends[1]))
    want = x * float(spread[1] / spread[0])
    sample = registry.resolve(METHODS[name].function)
    options = {"data": str(data)} if name == "teleport" else {}
    options |= {"window": 0} if name == "time-shift" else {}
    # of other data: only that it solves the ODE from there on
    options |= {"sigma": float(model.schedule.rho(990.0))} if name == "teleport" else {}
    errors = [
        float((sample(model, x, calls, **options) - want).norm() / want.norm())
        for calls in (24, 48)
    ]
    assert errors[0] < 0.25
    assert name == "teleport" or errors[1] < max(0.7 * errors[0], 1e-3)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.takes != "ode"])
def test_other_laws_come_by_seed(name, folder) -> None:
    model = open_image_model(folder)
    sample = registry.resolve(METHODS[name].function)
    options = {"reward": bright} if METHODS[name].takes == "reward" else {}
    options |= {"other": str(folder)} if name == "product" else {}
    with torch.no_grad():
        runs = [sample(model, model.noise(3), 4, seed=s, **options) for s in (0, 0)]
    assert runs[0].shape == (3, 1, 28, 28)
    assert torch.equal(*runs)


def bright(images):
    """A reward: the mean of the pixels."""
    return images.flatten(1).mean(dim=1)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.takes == "reward"])
def test_rewards_raise_the_reward(name) -> None:
    """On Gaussian pixels, with a reward of 784 times the mean: by more than 4 standard errors."""
    model = exact_model()
    sample = registry.resolve(METHODS[name].function)
    x = model.noise(32)
    plain = bright(image_methods.deis(model, x, 12))
    got = bright(sample(model, x, 12, reward=lambda images: 200 * bright(images), seed=1))
    error = plain.std() * (2 / 32) ** 0.5
    assert got.mean() > plain.mean() + 2 * error


def test_features_and_pictures() -> None:
    images = torch.linspace(-2, 2, 784 * 2).reshape(2, 1, 28, 28)
    assert fashion_features(images).shape == (2, 64)
    bytes_ = pictures(images)
    assert (bytes_.shape, bytes_.min(), bytes_.max()) == ((2, 28, 28, 1), 0, 255)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: open_image_model("nowhere"), "model: got 'nowhere', want 'embedded'"),
        (lambda f: image_methods.heun(exact_model(), torch.zeros(1, 1, 28, 28), 1), "steps: got"),
        (lambda f: image_methods.data_of(exact_model(), None), "data: got none"),
        (lambda f: image_methods.reward_of("class:x", exact_model()), "reward: got 'class:x'"),
        (lambda f: image_methods.reward_of("nothing", exact_model()), "reward: got 'nothing'"),
        (
            lambda f: image_methods.usf(exact_model(), torch.zeros(1, 1, 28, 28), 5, schedule="x"),
            "name: got 'x'",
        ),
        (lambda f: registry.method("images", "dds"), "method: got 'dds' for images"),
    ],
)
def test_bad_input(call, message, folder) -> None:
    with pytest.raises(InputError, match=message):
        call(folder)


def test_other_pipelines_are_refused(tmp_path) -> None:
    blocks = ("DownBlock2D",), ("UpBlock2D",)
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        down_block_types=blocks[0], up_block_types=blocks[1], norm_num_groups=4,
        num_class_embeds=3,
    )  # fmt: skip
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="unconditional UNet2DModel"):
        open_image_model(tmp_path)
