"""The HTTP application of `gptfast serve`: completions and chats, GET and HEAD of /v1/models and /health, and the tokenizer."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response

from gptfast.generation import LanguageModel, Scheduler
from gptfast.serving.chat import Chat
from gptfast.serving.completions import Completions
from gptfast.serving.cors import allow_origins
from gptfast.serving.errors import BodyLimit, add_error_handlers
from gptfast.serving.explore import Explore
from gptfast.serving.guard import Guard
from gptfast.serving.hosts import ANY
from gptfast.serving.limits import Limits
from gptfast.serving.pages import add_page
from gptfast.serving.protocol import ApiError
from gptfast.serving.service import Service
from gptfast.serving.tokens import Tokens
from gptfast.serving.worker import Worker
from gptfast.tokenizer import Tokenizer, lenient


def create_app(
    model: LanguageModel,
    tokenizer: Tokenizer,
    name: str,
    limits: Limits | None = None,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    hosts: Sequence[str] = (ANY,),
) -> FastAPI:
    """The application, whose worker runs during its lifespan.

    Args:
        model, tokenizer: used to generate, with the weights that the model has now. A new app is needed after a change.
        name: the model's name in the protocol: that of the model without adapters; "name:adapter" is the model with one.
        limits: None: the defaults of `Limits`.
        api_key: the bearer token that /v1 requires; None disables authentication.
        cors_origins: see `gptfast.serving.cors.allow_origins`.
        hosts: names that it answers to, see `gptfast.serving.hosts.hosts_of`; the default is every name.
    """
    limits, tokenizer = limits or Limits(), lenient(tokenizer)
    runner = model.runner(1, 1)  # all runners of this app are made from it, and so have the same weights

    def make_scheduler() -> Scheduler:
        return Scheduler(
            runner,
            max_rows=limits.max_rows,
            max_positions=limits.max_positions,
            max_prompt_tokens=limits.max_prompt_tokens,
        )

    worker = Worker(make_scheduler, limits.max_queue, limits.max_events)
    service = Service(model, runner, tokenizer, name, limits, worker)
    server, chat = Completions(service), Chat(service)
    explore = Explore(service, chat)
    tokens = Tokens(tokenizer, service.names, model.config.block_size, limits.special_tokens, chat.template)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        chat.announce()
        yield
        worker.close()

    app = FastAPI(title="gptfast", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.worker, app.state.limits = worker, limits
    app.add_middleware(BodyLimit, most=limits.max_body)
    allow_origins(app, cors_origins)
    app.add_middleware(Guard, hosts=hosts, origins=cors_origins)
    add_error_handlers(app)

    async def check_key(request: HTTPRequest) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8"), (api_key or "").encode("utf-8"))
        if api_key is not None and not (same and scheme.lower() == "bearer"):
            raise ApiError(401, "wrong or missing API key; send Authorization: Bearer KEY", code="invalid_api_key")

    guarded, read = [Depends(check_key)], ["GET", "HEAD"]

    @app.api_route("/health", methods=read)
    async def health() -> JSONResponse:
        state = {"status": "ok" if worker.alive else "the worker has ended", "sequences": worker.open_sequences}
        return JSONResponse(state, 200 if worker.alive else 503)

    @app.api_route("/v1/models", methods=read, dependencies=guarded)
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": service.names.cards})

    @app.api_route("/v1/models/{model:path}", methods=read, dependencies=guarded)
    async def one_model(model: str) -> JSONResponse:
        return JSONResponse(service.names.card(model))

    @app.post("/v1/completions", dependencies=guarded)
    async def completions(request: HTTPRequest) -> Response:
        return await server.complete(request)

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def chat_completions(request: HTTPRequest) -> Response:
        return await chat.complete(request)

    @app.post("/next_tokens", dependencies=guarded)
    async def next_tokens(request: HTTPRequest) -> Response:
        return await explore.next_tokens(request)

    @app.post("/beam_tree", dependencies=guarded)
    async def beam_tree(request: HTTPRequest) -> Response:
        return await explore.beam_tree(request)

    add_page(app, read)

    @app.api_route("/tokenizer_info", methods=read, dependencies=guarded)
    async def tokenizer_info() -> JSONResponse:
        return JSONResponse(tokens.info())

    @app.post("/tokenize", dependencies=guarded)
    async def tokenize(request: HTTPRequest) -> JSONResponse:
        return JSONResponse(await asyncio.to_thread(tokens.tokenize, await service.read(request)))

    @app.post("/detokenize", dependencies=guarded)
    async def detokenize(request: HTTPRequest) -> JSONResponse:
        return JSONResponse(await asyncio.to_thread(tokens.detokenize, await service.read(request)))

    return app
