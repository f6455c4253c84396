# SPDX-License-Identifier: Apache-2.0
"""Runs the application of a model on an address, until Ctrl-C."""

import socket

import uvicorn

from dlm_jax import console
from dlm_jax.errors import UserError
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.serving.app import make_app

LOCAL = ("127.0.0.1", "localhost", "::1")
MAX_CONNECTIONS = 256


def serve(lm: DiffusionLM, name: str, host: str, port: int) -> None:
    """Serves the model. host: an address of this machine. Raises UserError."""
    try:
        listener = socket.create_server((host, port), reuse_port=False)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host={host} --port={port}: {error}; give another"
        ) from error
    app = make_app(lm, name, hosts=list(LOCAL) if host in LOCAL else None)
    settings = uvicorn.Config(
        app,
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=3,
    )
    console.say(f"{name}: http://{host}:{listener.getsockname()[1]}  (Ctrl-C ends)")
    uvicorn.Server(settings).run(sockets=[listener])
