"""Stable Diffusion under a prompt is what its pipeline does, and a model for every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from typer.testing import CliRunner  # noqa: E402

from scoredraw.cli import app  # noqa: E402
from scoredraw.diffusion import image_methods  # noqa: E402
from scoredraw.diffusion.image_models import EMBEDDED, open_image_model  # noqa: E402
from scoredraw.diffusion.prompted_network import TOGETHER  # noqa: E402
from scoredraw.errors import InputError  # noqa: E402

pytestmark = [pytest.mark.contract, pytest.mark.filterwarnings("ignore::FutureWarning")]

LETTERS = [chr(i) for i in range(97, 123)]
WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
PROMPT, NEGATIVE = "a bird", "rain"
GPU = torch.cuda.is_available()  # where convolutions multiply in TF32, and pipelines stay away


def encoder(kind: Any) -> Any:
    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=12, projection_dim=8, bos_token_id=52,
        eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return kind(config).eval()


def network(**more: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **more,
    ).eval()  # fmt: skip


def make(name: str) -> Any:
    """Stable Diffusion of 8 x 8 latents and letters, of random weights."""
    words = transformers.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(WORDS)}, merges=[], model_max_length=12
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    text = encoder(transformers.CLIPTextModel)
    if name == "XL":
        second = encoder(transformers.CLIPTextModelWithProjection)
        net = network(
            cross_attention_dim=16, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=8 + 6 * 4,
        )  # fmt: skip
        return diffusers.StableDiffusionXLPipeline(vae, text, second, words, words, net, scheduler)
    net = network(cross_attention_dim=8)
    return diffusers.StableDiffusionPipeline(
        vae, text, words, net, scheduler, None, None, requires_safety_checker=False
    )


@pytest.fixture(scope="module", params=["1", "XL"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline and the folder that it lies in.

    Loaded, and not to be trained, as our model of it is: some processors' convolutions round by
    where weights lie in memory, and by whether they could have gradients.
    """
    torch.manual_seed(2)
    diffusers.logging.set_verbosity_error()
    folder = tmp_path_factory.mktemp("stable")
    make(request.param).save_pretrained(folder)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    for part in (pipe.unet, pipe.vae):
        part.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, folder


@pytest.mark.parametrize(("guidance", "negative"), [(7.5, None), (3.0, NEGATIVE), (1.0, None)])
def test_a_prompted_network_does_what_its_pipeline_does(
    saved: Any, guidance: float, negative: str | None
) -> None:
    """The pipeline's own scheduler, asking our network, ends at the pipeline's latents, bit by bit;
    they are decoded to its images."""
    pipe, folder = saved
    model = open_image_model(folder, PROMPT, negative=negative, guidance=guidance)
    x = noise = model.noise(3)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model.eps(x, float(t)), t, x).prev_sample
        shown = (model.images(x).clamp(-1, 1) + 1) / 2
    asked = {
        "latents": noise, "num_images_per_prompt": 3, "num_inference_steps": 4,
        "guidance_scale": guidance, "negative_prompt": negative,
    }  # fmt: skip
    for found, kind in ((x, "latent"), (shown, "pt")):
        want = pipe(PROMPT, output_type=kind, **asked).images
        assert torch.allclose(found, want, atol=1e-2) if GPU else torch.equal(found, want)
    assert shown.shape == (3, 3, 16, 16)
    other = open_image_model(folder, "a car", negative=negative, guidance=guidance)
    with torch.no_grad():
        assert not torch.equal(other.eps(noise, 500.0), model.eps(noise, 500.0))


def test_few_latents_go_together(saved: Any) -> None:
    """Sixty-four at once would not fit; of one after the other the same comes."""
    model = open_image_model(saved[1], PROMPT)
    sizes: list[int] = []
    hook = model.unet.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    x = model.noise(2 * TOGETHER + 1)
    with hook, torch.no_grad():
        eps, shown = model.eps(x, 400.0), model.images(x)
        assert sizes == [TOGETHER, TOGETHER, 1]
        for i, one in enumerate(x.split(1)):
            for found, want in ((model.eps(one, 400.0), eps[i]), (model.images(one), shown[i])):
                assert torch.allclose(found[0], want, atol=1e-3 if GPU else 1e-5)


def test_all_of_a_network_moves(saved: Any) -> None:
    """To another dtype here, as it would to another device; the states need not."""
    model = open_image_model(saved[1], PROMPT)
    x = model.noise(2)
    with torch.no_grad():
        want = model.eps(x, 400.0)
        model.unet.double()
        found = model.eps(x.double(), 400.0)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_the_network_is_on_the_gpu_and_the_states_are_not(saved: Any) -> None:
    for source, prompt in ((EMBEDDED, None), (saved[1], PROMPT)):
        model = open_image_model(source, prompt)
        x = model.noise(2)
        with torch.no_grad():
            made = model.eps(x, 400.0), model.images(x)
            model.unet.cpu()
            same = model.eps(x, 400.0), model.images(x)
        for one, other in zip(made, same, strict=True):
            assert one.device.type == "cpu"
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def brightness(images: Any) -> Any:
    """A reward: how bright the middle is, of decoded images within [-1, 1]."""
    assert images.shape[1:] == (3, 16, 16)
    assert float(images.abs().max()) <= 1
    return images[..., 4:12, 4:12].mean(dim=(1, 2, 3))


@pytest.mark.parametrize("method", ["tree", "tree_search", "best_of_n", "tilted"])
def test_rewards_look_at_images(saved: Any, method: str) -> None:
    model = open_image_model(saved[1], PROMPT)
    with torch.no_grad():
        x = getattr(image_methods, method)(model, model.noise(2), 4, reward=brightness)
        assert x.shape == (2, 4, 8, 8)
        assert bool(model.images(x).isfinite().all())


def test_two_prompts_at_once(saved: Any) -> None:
    model = open_image_model(saved[1], PROMPT)
    with torch.no_grad():
        x, options = model.noise(2), {"other": str(saved[1]), "seed": 1}
        one, same, other = (
            image_methods.product(model, x, 4, prompt=prompt, **options)
            for prompt in ("a car", "a car", PROMPT)
        )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_command_line(saved: Any, tmp_path: Path) -> None:
    call, out = CliRunner().invoke, tmp_path / "birds.npz"
    model = ["--model", str(saved[1]), "--prompt", PROMPT]
    asked = ["--steps", "4", "-n", "2", "--json"]
    found = call(app, ["generate", "image", *model, "-m", "usf", "-o", str(out), *asked])
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert (facts["prompt"], facts["negative"], facts["guidance"]) == (PROMPT, None, 7.5)
    assert facts["calls_an_image"] == 4
    with np.load(out) as kept:
        assert kept["images"].shape == (2, 3, 16, 16)
        assert json.loads(str(kept["made_by"]))["guidance"] == 7.5
    page = tmp_path / "page.html"
    found = call(app, [
        "compare", "samplers", *model, "--guidance", "3", "--negative", NEGATIVE, "--methods",
        "deis", "--steps", "3", "-n", "8", "--noises", "8", "--reference", "4", "--report",
        str(page), "--json",
    ])  # fmt: skip
    assert found.exit_code == 0, found.output
    board = json.loads(found.stdout)
    kept = {name: board["protocol"][name] for name in ("prompt", "negative", "guidance")}
    assert kept == {"prompt": PROMPT, "negative": NEGATIVE, "guidance": 3.0}
    assert all(str(value) in page.read_text() for value in kept.values())
    assert {row["method"] for row in board["leaderboard"]} == {"ddim", "deis"}


def test_bad_input(saved: Any, tmp_path: Path) -> None:
    folder = saved[1]
    kind = type(saved[0]).__name__
    with pytest.raises(InputError, match=f"prompt: got none for a {kind}, want a text"):
        open_image_model(folder)
    with pytest.raises(InputError, match="guidance: got nan, want a finite number"):
        open_image_model(folder, PROMPT, guidance=float("nan"))
    for name, value in (("prompt", PROMPT), ("negative", NEGATIVE), ("guidance", 3.0)):
        with pytest.raises(InputError, match=f"{name}: got one for a DDPMPipeline, want none"):
            open_image_model(EMBEDDED, **{name: value})
    unknown = diffusers.StableDiffusionInpaintPipeline(
        saved[0].vae, encoder(transformers.CLIPTextModel), saved[0].tokenizer,
        network(cross_attention_dim=8), saved[0].scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    unknown.save_pretrained(tmp_path)
    wanted = "model: got a StableDiffusionInpaintPipeline, want a StableDiffusionPipeline or"
    with pytest.raises(InputError, match=wanted):
        open_image_model(tmp_path, PROMPT)
