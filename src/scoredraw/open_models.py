"""A text model by its name, whatever it runs on: for the commands."""

from __future__ import annotations

from typing import Any

from scoredraw.errors import require


def open_model(name: str, *, max_new_tokens: int = 256, **server: Any) -> Any:
    """A model with `sample` and `ask`, by what it is called.

    name: "small" (SmolLM2-135M-Instruct), "stories" (stories15M), a folder or name that
    transformers can load: a `TransformersModel`; a file FILE.gguf: a `LlamaCppModel`; URL#NAME, the
    model of that name behind an OpenAI-compatible server: a `ServerModel`. max_new_tokens: of a
    reply. server: further arguments of `ServerModel`, for a server only.
    Raises `InputError` for what cannot be loaded, `MissingExtraError` for a missing package.

    >>> open_model("http://localhost:8000/v1#smollm2").name  # doctest: +SKIP
    'smollm2'
    """
    url, mark, served = name.partition("#")
    if url.startswith(("http://", "https://")):
        from scoredraw.model_servers import ServerModel

        require(bool(mark and served), "model", repr(name), "URL#NAME, the model the server has")
        return ServerModel(served, base_url=url, max_tokens=max_new_tokens, **server)
    extra = next((option for option, value in server.items() if value is not None), None)
    wanted = "none, with a model of this machine"
    require(extra is None, str(extra), "an option of a server", wanted)
    if name.endswith(".gguf"):
        from scoredraw.llama_models import LlamaCppModel

        return LlamaCppModel(name, max_new_tokens=max_new_tokens)
    from scoredraw.models import TransformersModel
    from scoredraw.small_models import load_model

    return TransformersModel(*load_model(name), max_new_tokens=max_new_tokens, name=name)
