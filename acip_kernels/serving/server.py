"""An OpenAI-compatible server of one model: transformers' own (`transformers serve`), with the model loaded by us."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import socket
from collections.abc import Callable

from torch import nn

# Seconds that answers under way have left when the server is told to stop.
_GRACE = 5


def check_installed() -> None:
    """Raises `RuntimeError` where what transformers serves with is not installed."""
    try:
        from transformers.cli.serving import completion, model_manager  # noqa: F401
        from transformers.utils.import_utils import is_serve_available

        reason = None if is_serve_available() else "fastapi, uvicorn or openai is missing"
    except ImportError as error:
        reason = str(error)
    if reason is not None:
        raise RuntimeError(f"serving needs transformers' server: pip install 'acip-kernels[serve]' ({reason})")


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to `host` and `port` (0 for a free one): what is in use shows before a model is loaded.

    Raises `ValueError` naming both.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"port must be 0 (any that is free) to 65535, got {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}, take another --port or --host: {error}") from None


def serve(model: nn.Module, tokenizer, name: str, listener: socket.socket, *, log_level: str = "info") -> None:
    """Answer requests for `model`, under `name`, until SIGINT or SIGTERM.

    The routes are those of `transformers serve`: `/v1/chat/completions`, `/v1/completions`, `/v1/responses` (with
    `stream` or without), `/v1/models`, `/health`. Requests are answered one after the other, by `generate`.

    Args:
        model: a transformers causal language model in evaluation mode, on its device.
        tokenizer: its fast tokenizer; chat needs its chat template.
        listener: of `listen`; closed in the end.
        log_level: uvicorn's: "info" has a line for every request.

    Raises:
        RuntimeError: what is needed is not installed.
    """
    check_installed()
    import uvicorn

    app = application(lambda: (model, tokenizer), name)
    config = uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=_GRACE)
    # Of an answer that is cut off in the end one line tells, not where its task was.
    logging.getLogger("uvicorn.error").addFilter(
        lambda record: not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
    )
    # uvicorn raises the SIGINT that it stopped for once more.
    with contextlib.closing(listener), contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
    # An answer that was cut off ends with its next token; Python must not end in the middle of it.
    with contextlib.suppress(concurrent.futures.TimeoutError):
        app.state.generation.get_manager(name).submit(lambda: None).result(timeout=_GRACE)


def application(load: Callable[[], tuple], name: str):
    """transformers' FastAPI application for the one model that `load()` gives, with its tokenizer, under `name`."""
    from fastapi import HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    class OneModel(ModelManager):
        """What holds the models that are served: one, which comes from `load` and not by name from a hub."""

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        def load_model_and_processor(self, model_id_and_revision: str, *args, **options):
            if model_id_and_revision != name:
                raise ValueError(f"this server has the model {name!r} alone, not {model_id_and_revision!r}")
            return super().load_model_and_processor(model_id_and_revision, *args, **options)

        def _load_model(self, *args, **options):
            return load()[0]

        def _load_processor(self, *args, **options):
            return load()[1]

    manager, state = OneModel(force_model=name), GenerationState()
    app = build_server(
        manager,
        ChatCompletionHandler(manager, state),
        completion_handler=CompletionHandler(manager, state),
        response_handler=ResponseHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
    )
    app.state.generation = state
    app.add_exception_handler(HTTPException, _error)
    app.add_exception_handler(ValueError, _error)
    return app


def _error(request, error: Exception):
    """An error as OpenAI's clients read it, where transformers has FastAPI's form or a bare 500."""
    from fastapi.responses import JSONResponse

    status, message = getattr(error, "status_code", 400), str(getattr(error, "detail", error))
    body = {"message": message, "type": "invalid_request_error" if status < 500 else "server_error", "code": status}
    return JSONResponse({"error": body}, status_code=status)
