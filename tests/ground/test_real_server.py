"""A real server on loopback: `transformers serve` with a real small model, or else a random one.

Nothing here is scripted: the server is a process of its own, started by the test and ended by it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from scoredraw import endpoint_runs
from scoredraw.errors import MissingExtraError
from scoredraw.model_servers import ModelError, ServerModel
from scoredraw.models import TransformersModel
from scoredraw.small_models import stories_model

pytestmark = pytest.mark.contract

for needed in ("torch", "transformers", "openai", "fastapi", "uvicorn"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"
BEGINNING = "Once upon a time"
ASK = [{"role": "user", "content": BEGINNING}]
PATIENCE = 240.0  # seconds until the server must be ready


class Serving(NamedTuple):
    url: str
    name: str
    model: TransformersModel

    def connect(self, **options: Any) -> ServerModel:
        return ServerModel(self.name, self.url, **options)


def trained_here() -> tuple[Any, Any]:
    """A random Llama and a tokenizer trained on a few words: a server's model where no other is."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = ByteLevelBPETokenizer()
    text = f"{BEGINNING}, there was a little girl named Lily."
    core.train_from_iterator([text] * 4, vocab_size=300, special_tokens=["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core._tokenizer, bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    try:
        model, tokenizer = stories_model()
    except MissingExtraError:
        model, tokenizer = trained_here()
    tokenizer.chat_template = CHAT
    # without these the server is greedy at every temperature, or cuts off all but 50 tokens
    model.generation_config.do_sample, model.generation_config.top_k = True, 0
    folder = tmp_path_factory.mktemp("served") / "small"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (folder.parent / "log").open("wb")
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder.parent)}
    process = subprocess.Popen(
        command, stdout=log, stderr=log,
        env={**os.environ, **own}, start_new_session=True,
    )  # fmt: skip
    try:
        wait_until_ready(process, port, Path(log.name))
        yield Serving(
            f"http://127.0.0.1:{port}/v1", str(folder), TransformersModel(model, tokenizer)
        )
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
        log.close()


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until the server says it is well; fails with its log where it ends or takes too long."""
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)  # or until it ends
    pytest.fail(f"the server is not ready: {log.read_text(errors='replace')[-2000:]}")


def test_greedy_text_is_the_models_own(serving: Serving) -> None:
    """Through HTTP, chat template, server and back: what the model gives in this process."""
    server = serving.connect(max_tokens=12)
    want = serving.model.sample(BEGINNING, max_tokens=12, temperature=0)[0]
    (made,) = server.sample(BEGINNING, max_tokens=12, temperature=0)
    assert made.text.strip() == want.text.strip()
    assert made.finished == want.finished
    assert server.ask(ASK).strip() == want.text.strip()
    assert made.logprobs is None  # this server reports none
    words = len(serving.model.tokenizer(BEGINNING)["input_ids"])
    assert server.usage.prompt_tokens in (2 * words, 2 * words - 1)  # the template has no <s>
    assert server.usage.completion_tokens == 2 * len(want.tokens)
    assert (server.usage.requests, server.usage.retries) == (2, 0)


def test_samples_differ_and_seeds_repeat_them(serving: Serving) -> None:
    """This server ignores n, so that each sample is a request of its own."""
    server = serving.connect(prices=(1.0, 2.0))
    made = [c.text for c in server.sample(BEGINNING, 3, max_tokens=8, seed=1)]
    assert len(set(made)) == 3
    assert server.usage.requests == 3
    assert server.usage.completion_tokens <= 24
    spent = server.usage.prompt_tokens + 2 * server.usage.completion_tokens
    assert server.cost == pytest.approx(spent / 1e6)
    assert [c.text for c in server.sample(BEGINNING, 3, max_tokens=8, seed=1)] == made
    assert [c.text for c in server.sample(BEGINNING, 1, max_tokens=8, seed=2)] != made[:1]


def test_a_stop_string_ends_the_text(serving: Serving) -> None:
    server = serving.connect()
    (whole,) = server.sample(BEGINNING, max_tokens=12, temperature=0)
    stop = whole.text[4:6]
    (made,) = server.sample(BEGINNING, max_tokens=12, temperature=0, stop=[stop])
    assert made.text == whole.text[: whole.text.index(stop)]
    assert made.finished


def test_a_run_that_was_cut_off_goes_on(serving: Serving, tmp_path: Path) -> None:
    path, prompts = tmp_path / "out.jsonl", [BEGINNING, "Tom had a dog.", ASK]
    server = serving.connect()
    how: dict[str, Any] = {"max_tokens": 5, "temperature": 1.0, "concurrency": 2}
    first = endpoint_runs.run(server, prompts[:2], path, n=2, **how)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:3]) + b"\n" + lines[3][:20])  # two samples and a piece
    asked, seen = server.usage.requests, list[endpoint_runs.Progress]()
    made = endpoint_runs.run(server, prompts, path, n=2, progress=seen.append, **how)
    assert server.usage.requests == asked + 4
    assert [len(some) for some in made] == [2, 2, 2]
    texts = {c.text for some in first for c in some}
    assert len(texts & {c.text for some in made[:2] for c in some}) >= 2
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (3, 6, 6)
    assert seen[-1].tokens_per_second > 0


def test_what_the_server_refuses_is_one_line(serving: Serving) -> None:
    with pytest.raises(ModelError, match=r"^another: BadRequestError: .*pinned") as error:
        ServerModel("another", serving.url).ask(ASK)
    assert error.value.status == 400
    with pytest.raises(ModelError, match=r"Unexpected fields") as error:
        serving.connect(request={"colour": 1}).sample(BEGINNING)
    assert error.value.status == 422
    assert "\n" not in str(error.value)
