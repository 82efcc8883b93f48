"""Images, tokens, graphs, flows, samplers and schedules from the command line, as a person asks."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytestmark = pytest.mark.contract

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the diffusion extra is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of a tiny UNet of 8 x 8 images in two channels."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("pipeline")
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(path)
    return path


def test_a_grid_and_the_arrays(scoredraw, folder, tmp_path) -> None:
    grid, arrays = tmp_path / "grid.png", tmp_path / "arrays.npz"
    made = ("generate", "image", "--model", folder, "--method", "ddim", "--steps", 3, "-n", 5)
    first = scoredraw(*made, "-o", grid, "--json")
    assert first.code == 0, first.err
    facts = json.loads(first.out)
    assert (facts["images"], facts["calls_an_image"]) == (5, 3)
    from matplotlib.image import imread

    assert imread(grid).shape[:2] == (2 * 9, 3 * 9)
    assert scoredraw(*made, "-o", arrays).code == 0
    few = tmp_path / "few.npz"
    assert scoredraw(*made[:-1], 2, "-o", few).code == 0
    with np.load(arrays) as five, np.load(few) as two:
        assert five["images"].shape == (5, 3, 8, 8)
        np.testing.assert_allclose(five["images"][:2], two["images"], atol=1e-4)
        assert "ddim" in str(five["made_by"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "dds"), "method: got 'dds' for images"),
        (("--method", "tilted"), "reward: got none, want --reward for tilted"),
        (("--reward", "class:1"), "reward: got one for deis"),
        (("--set", "beta=2"), "an option that this method does not have: beta, want one of order"),
        (("-o", "grid.jpg"), "out: got grid.jpg, want a name that ends in .png or .npz"),
        (("--model", "nowhere"), "model: got 'nowhere'"),
        (("--method", "tilted", "--reward", "class:1"), "reward: got class:1 for images (3, 8, 8)"),
        (("--method", "annealed", "--set", "alpha=2"), "that this method does not have: alpha"),
        (("--method", "product"), "set: got no other, want --set other=VALUE"),
        (("--method", "teleport"), "data: got none, want --set data=FILE.npz"),
        (("--method", "teleport", "--set", f"data={__file__}"), "data: cannot read"),
        (("--method", "best-of-n", "--reward", f"{__name__}:nothing"), "reward: got nan at 0"),
        (("--method", "best-of-n", "--reward", f"{__name__}:same"), "reward: got shape (64, 3, 8,"),
    ],
)
def test_mistakes(scoredraw, folder, arguments, message) -> None:
    model = () if "--model" in arguments else ("--model", folder)
    found = scoredraw("generate", "image", *model, *arguments)
    assert found.code == 2
    assert message in found.err
    assert found.err.count("\n") == 1


def nothing(images):
    """A reward that is no number."""
    return images.flatten(1)[:, 0] * float("nan")


def same(images):
    """A reward of the wrong shape."""
    return images


def test_an_interrupt_is_said(scoredraw, folder, tmp_path, monkeypatch) -> None:
    from scoredraw.diffusion import image_methods, schedule_search

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_methods, "deis", stop)
    done = scoredraw("generate", "image", "--model", folder, "-o", tmp_path / "grid.png")
    assert (done.code, done.err) == (130, "scoredraw: interrupted\n")
    monkeypatch.setattr(schedule_search.ScheduleSearch, "step", stop)
    search = ("train", "schedule", "--model", folder, "--noises", 2, "--held-out", 2)
    done = scoredraw(*search, "--reference", 5, "-o", tmp_path / "s.json")
    assert done.code == 130
    assert "scoredraw: interrupted; trials are kept in" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["s.json.log.jsonl"]


def test_compare_samplers(scoredraw, folder, tmp_path) -> None:
    page = tmp_path / "page.html"
    found = scoredraw(
        "compare", "samplers", "--model", folder, "--methods", "deis,diffusers-unipc", "--steps",
        "4,8", "-n", 40, "--noises", 8, "--reference", 20, "--report", page, "--json",
    )  # fmt: skip
    assert found.code == 0, found.err
    said = json.loads(found.out)
    rows = {(row["method"], row["calls"]): row for row in said["leaderboard"]}
    assert set(rows) == {(m, n) for m in ("ddim", "deis", "diffusers-unipc") for n in (4, 8)}
    assert rows["deis", 8]["error"]["value"] < rows["deis", 4]["error"]["value"]
    assert rows["ddim", 8]["share"]["value"] == 1
    assert rows["deis", 8]["share"]["value"] < 1
    assert "data:image/png;base64," in page.read_text()
    bad = scoredraw("compare", "samplers", "--model", folder, "--methods", "annealed")
    assert (bad.code, "samples another law" in bad.err) == (2, True)
    bad = scoredraw("compare", "samplers", "--model", folder, "--methods", "teleport")
    assert (bad.code, "data: got none for teleport" in bad.err) == (2, True)


def test_moments_of_the_data_make_more_methods_run(scoredraw, folder, tmp_path) -> None:
    few = ("--steps", 4, "-n", 8, "--noises", 4, "--reference", 5, "--json")
    plain = scoredraw("compare", "samplers", "--model", folder, *few)
    assert plain.code == 0, plain.err
    images = tmp_path / "images.npz"
    np.savez(images, images=np.random.default_rng(0).normal(0, 0.3, (30, 3, 8, 8)))
    more = scoredraw("compare", "samplers", "--model", folder, *few, "--data", images)
    assert more.code == 0, more.err
    ran = [{r["method"] for r in json.loads(d.out)["leaderboard"]} for d in (plain, more)]
    assert ran[1] - ran[0] == {"teleport"}


def test_a_searched_schedule_is_used(scoredraw, folder, tmp_path) -> None:
    out = tmp_path / "three.json"
    search = (
        "train", "schedule", "--model", folder, "--steps", 3, "-o", out, "--evaluations", 6,
        "--noises", 4, "--held-out", 4, "--reference", 10, "--json",
    )  # fmt: skip
    first = scoredraw(*search)
    assert first.code == 0, first.err
    facts = json.loads(first.out)
    assert facts["error"] <= facts["best_preset_error"]
    again = json.loads(scoredraw(*search).out)  # from its journal
    assert (again["error"], again["trials"]) == (facts["error"], facts["trials"])
    other = scoredraw(*search[:3], "embedded", *search[4:])  # another model's trials
    assert other.code == 2
    assert "want one of this very search" in other.err
    made = ("generate", "image", "--model", folder, "--method", "usf", "-n", 2, "--json")
    used = scoredraw(*made, "--set", f"schedule={out}", "--steps", 3)
    assert used.code == 0, used.err
    assert json.loads(used.out)["calls_an_image"] == 3
    assert scoredraw(*made, "--set", f"schedule={out}", "--steps", 4).code == 2


def test_graphs_and_flows(scoredraw, tmp_path) -> None:
    graphs, digits = tmp_path / "graphs.jsonl", tmp_path / "digits.png"
    assert scoredraw("generate", "graph", "-n", 2, "--steps", 10, "-o", graphs).code == 0
    rows = [json.loads(line) for line in graphs.read_text().splitlines()]
    assert len(rows) == 2
    assert all(max((max(e) for e in row["edges"]), default=0) < row["n"] for row in rows)
    done = scoredraw("generate", "flow", "-n", 4, "-o", digits, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["passes"] < json.loads(done.out)["sequential_passes"]
    assert digits.is_file()
    assert scoredraw("generate", "graph", "-o", tmp_path / "graphs.txt").code == 2


def test_masks_are_filled_in(scoredraw, tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="the language extra is not installed")
    words = ["[PAD]", "[MASK]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    prompts, out = tmp_path / "texts.jsonl", tmp_path / "made.jsonl"
    prompts.write_text('{"text": "a [MASK] c"}\n{"text": "[MASK] [MASK]"}\n')
    done = scoredraw(
        "generate", "tokens", prompts, "--model", tmp_path / "bert", "-n", 2, "-o", out
    )
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 4
    assert all("[MASK]" not in row["text"] for row in rows)
    assert rows[0]["text"].split()[0] == "a"
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"text": "a b"}\n')
    bad = scoredraw("generate", "tokens", plain, "--model", tmp_path / "bert")
    assert (bad.code, "prompts: got one without a mask" in bad.err) == (2, True)
    assert scoredraw("generate", "tokens", plain, "--model", tmp_path / "nothing").code == 2
