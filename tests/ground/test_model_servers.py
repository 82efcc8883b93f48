"""Models behind a server that speaks both APIs and misbehaves in every way."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from scoredraw.errors import InputError, StoppedError
from scoredraw.model_servers import ModelError, ServerModel, derived_seed
from scoredraw.models import SamplingModel, ScoringModel, TextModel

pytestmark = pytest.mark.contract

pytest.importorskip("openai", reason="the extra language is not installed")

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which one?"}]


# ---- a server on loopback ------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Speaks completions; `script` says what happens to each request, the last for ever."""

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
        elif what == "drip":
            self.reply(200, b"{", length=10_000)
            while not server.released.wait(0.02):
                self.wfile.write(b" ")
        elif isinstance(what, int):
            self.reply(what, json.dumps({"error": {"message": f"status {what}"}}).encode())
        elif isinstance(what, dict):
            self.reply(what.get("status", 200), json.dumps(what["json"]).encode(), what)
        elif callable(what):
            self.reply(200, json.dumps(what(server.bodies[-1])).encode())
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


def text_completion(*choices: dict[str, Any]) -> dict[str, Any]:
    listed = [{"index": i, "finish_reason": "stop", **c} for i, c in enumerate(choices)]
    return {
        "id": "1", "object": "text_completion", "created": 0, "model": "tiny", "choices": listed,
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }  # fmt: skip


@pytest.fixture
def server() -> Iterator[Server]:
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


def test_an_answer_that_drips_is_no_answer_in_time(server: Server) -> None:
    """Each byte comes in time, the whole does not: none of the client's reads times out."""
    server.script = ["drip", "ok"]
    model, waits = connect(server, timeout=0.3)
    start = time.monotonic()
    assert model.ask(ASK).startswith("[[B]]")
    assert time.monotonic() - start < 10
    assert waits == [1.0]


@pytest.mark.parametrize(
    "fault",
    [429, 500, "half", "close", {"json": {"choices": []}}, {"json": {"choices": [{"index": 0}]}},
     {"json": ["not an object"]}, {"json": {"error": {"message": "overloaded"}}}],
)  # fmt: skip
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


@pytest.mark.parametrize(
    ("body", "said"),
    [({"error": {"message": "no such model"}}, "404 - no such model"),
     ({"detail": "pinned to another"}, '404 - {"detail": "pinned to another"}'),
     ({"error": "Lemur\n  not found"}, "404 - .*Lemur"), ("Not here", "404 - Not here")],
)  # fmt: skip
def test_what_a_server_says_is_in_the_message(server: Server, body: Any, said: str) -> None:
    """openai's own message has the words of the first form alone."""
    server.script = [{"status": 404, "json": body}]
    with pytest.raises(ModelError, match=f"^tiny: NotFoundError: Error code: {said}") as error:
        connect(server)[0].ask(ASK)
    assert "\n" not in str(error.value)


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
    import openai

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


# ---- samples -------------------------------------------------------------------------------------


def test_samples_of_a_text_with_their_log_probabilities(server: Server) -> None:
    server.script = [
        {"json": text_completion(
            {"text": " one", "logprobs": {"token_logprobs": [-0.5, -1.25], "tokens": ["a", "b"]}},
            {"text": " tw", "finish_reason": "length", "logprobs": {"token_logprobs": [-3.0]}},
        )}
    ]  # fmt: skip
    model, _ = connect(server, request={"top_k": 0, "max_tokens": None})
    assert isinstance(model, SamplingModel)
    assert not isinstance(model, ScoringModel)
    one, two = model.sample("Count:", 2, temperature=0.7, top_p=0.9, stop=["\n"], seed=3)
    assert (one.text, one.finished, one.logprob, one.tokens) == (" one", True, -1.75, ())
    assert (two.text, two.finished) == (" tw", False)
    assert one.logprobs is not None
    assert one.logprobs.dtype == np.float64
    (body,) = server.bodies
    assert body == {
        "path": "/v1/completions", "model": "tiny", "prompt": "Count:", "n": 2, "temperature": 0.7,
        "top_p": 0.9, "stop": ["\n"], "seed": 3, "logprobs": 1, "top_k": 0,
    }  # fmt: skip  # top_k is no argument of the client's; what is None is not sent


@pytest.mark.parametrize("form", ["chat", "llama.cpp"])
def test_log_probabilities_in_the_form_of_the_chat_api(server: Server, form: str) -> None:
    said = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -9999.0}]}
    answer = completion("ab")
    if form == "llama.cpp":  # its server has this form in both
        answer = text_completion({"text": "ab"})
    answer["choices"][0]["logprobs"] = said
    server.script = [{"json": answer}]
    model, _ = connect(server)
    (made,) = model.sample(ASK if form == "chat" else "a")
    assert made.text == "ab"
    np.testing.assert_array_equal(made.logprobs, [-0.5, np.nan])  # -9999: the server keeps it back
    assert np.isnan(made.logprob)
    if form == "chat":
        (body,) = server.bodies
        assert (body["path"], body["messages"]) == ("/v1/chat/completions", ASK)
        assert (body["logprobs"], body["top_logprobs"]) == (True, 1)
        assert not {"n", "seed", "stop"} & body.keys()


def test_a_server_without_log_probabilities(server: Server) -> None:
    server.script = [{"json": text_completion({"text": "x", "logprobs": None})}]
    model, _ = connect(server, logprobs=False)
    (made,) = model.sample("a")
    assert made.logprobs is None
    assert np.isnan(made.logprob)
    assert "logprobs" not in server.bodies[0]


def test_a_server_that_leaves_the_stop_string_in(server: Server) -> None:
    server.script = [{"json": text_completion({"text": "7.\n\nQ: é?", "finish_reason": "length"})}]
    model, _ = connect(server)
    (made,) = model.sample("a", stop=["é", "\n\nQ"])
    assert (made.text, made.finished) == ("7.", True)


def test_a_server_that_ignores_n_is_asked_for_the_rest_with_other_seeds(server: Server) -> None:
    server.script = [lambda body: text_completion({"text": str(body["seed"])})]
    model, waits = connect(server)
    made = [c.text for c in model.sample("a", 4, seed=5)]
    assert made == [str(s) for s in (5, derived_seed(5, 1), derived_seed(5, 2), derived_seed(5, 3))]
    assert len(set(made)) == 4
    assert [body.get("n") for body in server.bodies] == [4, 3, 2, None]
    assert waits == []
    assert model.usage.retries == 0
    fixed, _ = connect(server, request={"seed": 5})  # the same where the seed is the model's own
    assert [c.text for c in fixed.sample("a", 4)] == made


def test_a_server_that_gives_too_many_and_one_that_allows_few(server: Server) -> None:
    server.script = [text_completion_of(3)]
    model, _ = connect(server)
    assert len(model.sample("a", 2)) == 2
    server.bodies.clear()
    server.script = [lambda body: text_completion(*[{"text": "x"}] * body.get("n", 1))]
    model, _ = connect(server, most_choices=2)
    assert len(model.sample("a", 5)) == 5
    assert [body.get("n") for body in server.bodies] == [2, 2, None]


def text_completion_of(n: int) -> dict[str, Any]:
    return {"json": text_completion(*[{"text": "x"}] * n)}


def test_samples_that_came_before_the_server_went_are_kept(server: Server) -> None:
    server.script = [text_completion_of(1), text_completion_of(1), 503]
    model, waits = connect(server, max_retries=1)
    with pytest.raises(ModelError, match=r"^tiny: asked 2 times, last: .*503") as error:
        model.sample("a", 4)
    assert isinstance(error.value, StoppedError)
    assert error.value.status == 503
    assert [c.text for c in error.value.made] == ["x", "x"]
    assert waits == [1.0]


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_without_text_completions(server: Server, status: int) -> None:
    server.script = [status]
    model, waits = connect(server)
    wanted = rf"^tiny: /v1/completions: .*{status}.*; a server without /v1/completions takes mess"
    with pytest.raises(ModelError, match=wanted) as error:
        model.sample("a")
    assert "\n" not in str(error.value)
    assert (len(server.bodies), waits, error.value.status) == (1, [], status)
    with pytest.raises(ModelError) as error:  # of messages, this is no hint
        model.sample(ASK)
    assert "takes messages" not in str(error.value)


@pytest.mark.parametrize("fault", [429, 500, "half", "cut", "close", "drip"])
def test_samples_are_asked_for_again_as_replies_are(server: Server, fault: Any) -> None:
    server.script = [fault, text_completion_of(2)]
    model, waits = connect(server, timeout=0.3 if fault == "drip" else 60)
    assert len(model.sample("a", 2)) == 2
    assert waits == [1.0]
    assert (model.usage.requests, model.usage.retries) == (2, 1)


def test_usage_and_cost(server: Server) -> None:
    server.script = [500, text_completion_of(2), "ok"]
    model, _ = connect(server, prices=(0.5, 2.0))
    assert model.cost == 0
    model.sample("a", 2)
    model.ask(ASK)
    usage = model.usage
    assert (usage.requests, usage.prompt_tokens, usage.completion_tokens) == (3, 19, 8)
    assert model.cost == pytest.approx((19 * 0.5 + 8 * 2.0) / 1e6, rel=1e-12)
    assert connect(server)[0].cost is None
    server.script = [{"json": {**text_completion({"text": "x"}), "usage": None}}]
    model.sample("a")  # a server that counts nothing
    assert model.usage.prompt_tokens == 19


def test_many_threads_count_every_request(server: Server) -> None:
    server.script = [text_completion_of(1)]
    model, _ = connect(server)
    threads = [threading.Thread(target=model.sample, args=("a",)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.usage.requests == len(server.bodies) == 16
    assert model.usage.prompt_tokens == 16 * 7


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n": 0}, "n: got 0"), ({"max_tokens": 0}, "max_tokens: got 0"),
     ({"temperature": -1}, "temperature: got -1"), ({"temperature": np.nan}, "temperature: got"),
     ({"top_p": 0}, "top_p: got 0"), ({"top_p": 1.5}, "top_p: got 1.5"),
     ({"stop": [""]}, "stop: got an empty string"), ({"stop": "ab"}, "stop: got 'ab', want a list"),
     ({"seed": -1}, "seed: got -1")],
)  # fmt: skip
def test_bad_arguments_never_reach_the_server(server: Server, options: Any, message: str) -> None:
    model, _ = connect(server)
    with pytest.raises(InputError, match=f"^{message}"):
        model.sample("a", **options)
    assert server.bodies == []


@pytest.mark.parametrize("options", [{"most_choices": 0}, {"prices": (1.0,)}, {"prices": (-1, 0)}])
def test_bad_settings(options: Any) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(options))}: got"):
        ServerModel("tiny", "http://127.0.0.1:9/v1", **options)
