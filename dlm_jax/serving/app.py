# SPDX-License-Identifier: Apache-2.0
"""The routes: the page, and the JSON API under /v1, with the names of Python's."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dlm_jax.errors import UserError
from dlm_jax.inference import mbr, streaming
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.inference.streaming import Asked
from dlm_jax.runtime import backend
from dlm_jax.serving import schema
from dlm_jax.serving.present import Presenter
from dlm_jax.serving.worker import BusyError, Job, Worker, reason

MAX_BYTES = 2**16  # of a request
READ_SECONDS, ANSWER_SECONDS = 10, 300
PAGES = {
    "/": ("page.html", "text/html"),
    "/docs": ("docs.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/docs.js": ("docs.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def make_app(
    lm: DiffusionLM, name: str, *, hosts: list[str] | None = None
) -> Starlette:
    """Returns the ASGI application of a model. hosts: names it answers to; None: any."""
    api = Api(lm, name)
    routes = [Route(path, _page(*page)) for path, page in PAGES.items()]
    routes += [
        Route("/v1/model", api.model),
        Route("/v1/openapi.json", lambda request: JSONResponse(schema.openapi())),
        Route("/v1/sample", api.sample, methods=["POST"]),
        Route("/v1/translate", api.translate, methods=["POST"]),
        Route("/v1/stream", api.stream, methods=["POST"]),
        Route("/v1/nll", api.nll, methods=["POST"]),
    ]
    handlers: Any = {
        HTTPException: lambda request, error: _fault(error.status_code, error.detail),
        UserError: lambda request, error: _fault(400, str(error)),
        BusyError: lambda request, error: _fault(
            503, "too many requests wait; try again"
        ),
        ClientDisconnect: lambda request, error: Response(status_code=400),
    }
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)] if hosts else []
    return Starlette(routes=routes, exception_handlers=handlers, middleware=guards)


def _page(file: str, kind: str) -> Callable:
    text = resources.files("dlm_jax.serving").joinpath("page", file).read_text("utf-8")
    return lambda request: Response(text, media_type=kind, headers=HEADERS)


def _fault(status: int, line: str) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"error": line}, status, headers=headers)


async def read(request: Request, name: str) -> dict:
    """Returns a request's JSON, checked. Raises UserError or HTTPException."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/json":  # a page of another origin cannot send it unasked
        raise HTTPException(415, "send application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise HTTPException(413, f"a request has at most {MAX_BYTES} bytes")
    except TimeoutError as error:
        raise HTTPException(408, "the request did not arrive") from error
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from error
    return schema.check(name, value)


class LimitedStream(StreamingResponse):
    """A stream that ends after ANSWER_SECONDS, whatever its reader does."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends the response."""
        with anyio.move_on_after(ANSWER_SECONDS):
            await super().__call__(scope, receive, send)


class Api:
    """The handlers of a model's routes."""

    def __init__(self, lm: DiffusionLM, name: str):
        self.lm, self.name, self.worker = lm, name, Worker(lm)
        self.show = Presenter(lm)

    async def model(self, request: Request) -> Response:
        """Describes the model: its name, size, settings and what it can be asked for."""
        return JSONResponse(self.show.model(self.name))

    async def sample(self, request: Request) -> Response:
        """Generates texts."""
        asked = await self._ask(await read(request, "sample"))
        return JSONResponse({"texts": await self._texts(request, asked)})

    async def translate(self, request: Request) -> Response:
        """Generates the target of each source: a list of texts for each."""
        body = await read(request, "translate")
        n, candidates = body.pop("n", 1), body.pop("mbr", 1)
        asked = await self._ask(body | {"n": n * candidates})
        texts = await self._texts(request, asked)
        if candidates > 1:
            texts = list(map(mbr.select, _groups(texts, candidates)))
        return JSONResponse({"texts": _groups(texts, n)})

    async def stream(self, request: Request) -> Response:
        """Generates texts; sends the tokens and their confidence after each step."""
        asked = await self._ask(await read(request, "stream"))
        job, queue = self._submit(asked)

        async def events() -> AsyncIterator[str]:
            ids: Any = None
            try:
                while (item := await queue.get()) is not None:
                    if isinstance(item, Exception):
                        yield _event("error", {"error": reason(item)})
                        return
                    ids = item.ids
                    yield _event("frame", self.show.frame(item, asked.hidden))
                texts = streaming.texts(self.lm, ids, asked.hidden)
                yield _event("done", {"texts": texts})
            finally:
                job.cancelled = True

        return LimitedStream(events(), media_type="text/event-stream", headers=HEADERS)

    async def nll(self, request: Request) -> Response:
        """Estimates the bound on -log p of texts, with the share of each token."""
        body = await read(request, "nll")
        texts, sources = body["texts"], body.get("sources")
        ids = await _in_thread(lambda: self.lm.encode(texts, sources))
        scores = (await self._results(request, ids))[-1]
        return JSONResponse({"texts": self.show.scores(ids, scores, sources)})

    async def _ask(self, body: dict) -> Asked:
        n = body.pop("n", 1)
        if n * len(body.get("sources", "1")) > schema.MAX_TEXTS:
            raise UserError(f"n: at most {schema.MAX_TEXTS} texts in one request")
        asked = await _in_thread(lambda: streaming.ask(self.lm, n, **body))
        if asked.request.sampling.num_steps > schema.MAX_STEPS:
            raise UserError(f"num_steps: at most {schema.MAX_STEPS}")
        return asked

    def _submit(self, work: Asked | np.ndarray) -> tuple[Job, asyncio.Queue]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def put(item: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(queue.put_nowait, item)

        job = Job(work, put)
        self.worker.submit(job)
        return job, queue

    async def _results(self, request: Request, work: Asked | np.ndarray) -> list:
        """Waits for what a job gives, as long as its client does."""
        job, queue = self._submit(work)
        items = []
        try:
            while True:
                try:
                    item = await asyncio.wait_for(queue.get(), 1.0)
                except TimeoutError:
                    if await request.is_disconnected():
                        raise ClientDisconnect from None
                    continue
                if isinstance(item, UserError):
                    raise item
                if isinstance(item, Exception):
                    raise HTTPException(500, reason(item))
                if item is None:
                    return items
                items = [item]
        finally:
            job.cancelled = True

    async def _texts(self, request: Request, asked: Asked) -> list[str]:
        frame = (await self._results(request, asked))[-1]
        return streaming.texts(self.lm, frame.ids, asked.hidden)


async def _in_thread(make: Callable[[], Any]) -> Any:
    return await anyio.to_thread.run_sync(backend.prepared(make))


def _groups(texts: list[str], size: int) -> list[list[str]]:
    return [texts[i : i + size] for i in range(0, len(texts), size)]


def _event(name: str, data: dict) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
