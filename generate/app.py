"""The web application of the server: routes, access and limits. generate/serve.py starts it."""

import asyncio
import itertools
import json
import random
import re
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from generate import openai_format as openai
from generate.engine import FIRST_TOKEN_BOUNDS, Engine
from generate.guard import Guard, Refusal, explain, refusal_of
from generate.interactive import style_name
from generate.jobs import Event, Job
from lit_llama.bank import BASE
from lit_llama.checkpoint import AdapterFile, read_adapter
from lit_llama.compose import Sum
from lit_llama.prompts import PromptStyle, get_prompt_style, is_chat
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, check_text

if TYPE_CHECKING:
    from generate.serve import Settings

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # of an adapter that is added while the server runs
LISTED = 1000  # adapters that GET /v1/models lists, out of up to a million
FINISH_SECONDS = 5  # for running answers to end, after Ctrl-C or SIGTERM
CLOSE_SECONDS = 3  # then, for clients to receive the error that ends unfinished answers
PAGE = Path(__file__).parent / "playground.html"
PAGE_POLICY = (  # what the page may do: its own script and requests to this server, nothing else
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class HTTPServer(uvicorn.Server):
    """A uvicorn server that ends unfinished answers with an error at shutdown; uvicorn alone cancels their tasks."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        config.timeout_graceful_shutdown = FINISH_SECONDS + CLOSE_SECONDS
        super().__init__(config)
        self.engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = asyncio.ensure_future(self.stop_engine())
        await super().shutdown(sockets)
        stopping.cancel()

    async def stop_engine(self) -> None:
        await asyncio.sleep(FINISH_SECONDS)
        await asyncio.to_thread(self.engine.stop)


class Stream(StreamingResponse):
    """Server-sent events; `on_end` is called however the response ends."""

    def __init__(self, parts: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        super().__init__(parts, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.on_end = on_end

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self.on_end()


class Server:
    """The handlers of the routes."""

    def __init__(self, engine: Engine, settings: "Settings") -> None:
        self.engine, self.settings, self.started = engine, settings, int(time.time())
        self.folder = engine.tokenizer.path.parent
        self.random = random.SystemRandom()

    # == answers ==

    async def complete(self, body: openai.CompletionRequest, request: Request) -> Response:
        adapters = self.parse(body.model)
        return await self.answer(body, request, openai.CompletionFormat, adapters, body.prompt)

    async def chat(self, body: openai.ChatRequest, request: Request) -> Response:
        adapters = self.parse(body.model)
        style = self.style_of(adapters)
        prompts = [openai.render_messages(body.messages, style)]
        options = {"stop": style.stop, "strip": True, "style": None if self.settings.prompt_style else style.name}
        return await self.answer(body, request, openai.ChatFormat, adapters, prompts, **options)

    async def answer(
        self,
        body: openai.CompletionRequest | openai.ChatRequest,
        request: Request,
        format: openai.Format,
        adapters: Sum,
        prompts: list[str],
        stop: tuple[str, ...] = (),
        strip: bool = False,
        style: str | None = None,
    ) -> Response:
        """Answer prompts with a sum of adapters, as a stream or at once. For the options, see `Job`."""
        sampling = body.sampling(self.settings.max_new_tokens, seed=self.random.randrange(2**31))
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop, jobs = asyncio.get_running_loop(), []

        def receiver(index: int) -> Callable[[Event], None]:
            def receive(event: Event) -> None:
                with suppress(RuntimeError):  # the event loop is closed while the server shuts down
                    loop.call_soon_threadsafe(queue.put_nowait, (index, event))

            return receive

        for i, prompt in enumerate(prompts):
            ids = self.engine.tokenizer.encode(check_text(prompt, "The prompt"), bos=True)
            options = {"stop": (*stop, *body.stop_texts), "strip": strip, "n_top": body.n_top, "streams": body.stream}
            options |= {"style": style, "seconds": self.settings.seconds}
            jobs.append(Job(ids, receiver(i), adapters, sampling, row=i, **options))

        def cancel() -> None:
            for job in jobs:
                job.cancelled = True

        self.engine.submit(jobs)
        if body.stream:
            return Stream(self.stream(body, format, jobs, queue), cancel)
        try:
            return await self.collect(body, request, format, jobs, queue)
        finally:
            cancel()

    async def collect(
        self, body: Any, request: Request, format: openai.Format, jobs: list[Job], queue: asyncio.Queue
    ) -> Response:
        """Return the complete answers, unless the client disconnects."""

        async def gather() -> Response:
            choices: dict[int, dict[str, Any]] = {}
            async for index, event in events_of(queue, len(jobs)):
                if event.error:
                    raise event.error
                tokens = event.tokens if body.n_top is not None else None
                choices[index] = format.choice(index, event.text, tokens, event.finish)
            ordered = [choices[i] for i in range(len(jobs))]
            head = openai.head(format, body.model, False)
            return JSONResponse({**head, "choices": ordered, "usage": openai.usage(jobs)})

        answer, gone = asyncio.ensure_future(gather()), asyncio.ensure_future(disconnected(request))
        try:
            await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
            return await answer if answer.done() else Response(status_code=499)
        finally:
            answer.cancel()
            gone.cancel()

    async def stream(
        self, body: Any, format: openai.Format, jobs: list[Job], queue: asyncio.Queue
    ) -> AsyncIterator[str]:
        """Yield the answers as server-sent events."""
        head, new = openai.head(format, body.model, True), set(range(len(jobs)))  # choices without a part so far
        async for index, event in events_of(queue, len(jobs)):
            if event.error:
                yield sse(refusal_of(event.error, self.folder).body)
                return
            tokens = event.tokens if body.n_top is not None else None
            if event.text:
                yield sse({**head, "choices": [format.part(index, event.text, tokens, None, index in new)]})
                new.discard(index)
            if event.finish:
                yield sse({**head, "choices": [format.part(index, "", None, event.finish, index in new)]})
        if body.wants_usage:
            yield sse({**head, "choices": [], "usage": openai.usage(jobs)})
        yield "data: [DONE]\n\n"

    def parse(self, model: str) -> Sum:
        with not_found():
            return self.engine.parse(model)

    def style_of(self, adapters: Sum) -> PromptStyle:
        """Return the prompt style of a sum; see `style_name`."""
        tokenizer, style = self.engine.tokenizer, self.settings.prompt_style
        if style is None:
            with not_found(), self.engine.changed:
                style = style_name(adapters, self.engine.bank, tokenizer)
        return get_prompt_style(style, tokenizer)

    # == adapters ==

    def model_card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.started, "owned_by": "local"}

    async def models(self) -> dict[str, Any]:
        with self.engine.changed:
            names = [BASE, *itertools.islice(self.engine.bank, LISTED)]
        return {"object": "list", "data": [self.model_card(name) for name in names]}

    async def model(self, name: str) -> dict[str, Any]:
        self.parse(name)
        return self.model_card(name)

    async def describe(self, name: str) -> dict[str, Any]:
        """Return the data of the playground's plot of an adapter: its gates by layer and head."""
        with not_found(), self.engine.changed:
            adapter = self.engine.bank.adapter(name)
        start, config = adapter.config["adapter_start_layer"], self.engine.model.config
        gates = [
            adapter.state[f"transformer.h.{i}.attn.gating_factor"].flatten().tolist()
            for i in range(start, config.n_layer)
        ]
        length, style = adapter.config["adapter_prompt_length"], adapter.meta["prompt_style"]
        return {"name": name, "prompt_style": style, "tokens": length, "start_layer": start, "gates": gates}

    async def put(self, name: str, request: Request, replace: bool = False) -> JSONResponse:
        """Add the adapter in the body of the request, a safetensors file."""
        if not NAME.fullmatch(name) or name == BASE:
            raise Refusal(400, "The name must be letters, digits, '.', '_' and '-', and not 'base'.", param="name")
        adapter = await asyncio.to_thread(open_upload, name, await request.body(), self.engine.tokenizer)
        bank = self.engine.bank
        with self.engine.changed:
            limit = self.settings.max_adapters
            if len(bank) >= limit and name not in bank:
                raise Refusal(409, f"The bank has {len(bank)} adapters, and --max_adapters is {limit}; remove some.")
            if name in bank and not replace:
                raise Refusal(409, f"There is an adapter {name!r}; replace it with replace=true.")
            (bank.swap if name in bank else bank.add)(name, adapter)
        return JSONResponse(self.model_card(name), 201)

    async def remove(self, name: str) -> dict[str, Any]:
        with not_found(), self.engine.changed:
            self.engine.bank.remove(name)
        return {"id": name, "object": "model", "deleted": True}

    # == the server itself ==

    async def health(self) -> JSONResponse:
        alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def metrics(self) -> PlainTextResponse:
        return PlainTextResponse(metrics_text(self.engine), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self) -> HTMLResponse:
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)


def make_app(engine: Engine, settings: "Settings") -> FastAPI:
    """Return the application; it starts and stops the engine.

    Raises:
        UserError: The chat template, if requests may use it, fails.
    """
    server, template = Server(engine, settings), engine.tokenizer.template
    if template is not None and (settings.prompt_style is None or is_chat(settings.prompt_style)):
        template.allow_threads()  # the engine's thread allocates while requests are rendered

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="Aligner", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    routes = {
        ("POST", "/v1/completions"): server.complete,
        ("POST", "/v1/chat/completions"): server.chat,
        ("GET", "/v1/models"): server.models,
        ("GET", "/v1/models/{name:path}"): server.model,
        ("POST", "/adapters"): server.put,
        ("GET", "/adapters/{name:path}"): server.describe,
        ("DELETE", "/adapters/{name:path}"): server.remove,
        ("GET", "/health"): server.health,
        ("GET", "/metrics"): server.metrics,
        ("GET", "/"): server.page,
    }
    for (method, path), handler in routes.items():
        app.add_api_route(path, handler, methods=[method], response_model=None)

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            return explain(error).response()
        if isinstance(error, HTTPException):
            return Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}.").response()
        return (error if isinstance(error, Refusal) else refusal_of(error, server.folder)).response()

    for kind in (Refusal, UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)
    app.add_middleware(Guard, settings=settings)
    return app


def open_upload(name: str, content: bytes, tokenizer: Tokenizer) -> AdapterFile:
    """Return the adapter in an uploaded file, which must be safetensors: a pickle is not even opened.

    Raises:
        UserError: It is not an adapter, or it cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.safetensors"
        path.write_bytes(content)
        try:
            adapter = read_adapter(path)
            get_prompt_style(adapter.meta.get("prompt_style") or "alpaca", tokenizer)
            state = {key: tensor.clone() for key, tensor in adapter.state.items()}  # the file is deleted
        except UserError as error:
            raise UserError(f"The adapter {name} cannot be used: {str(error).replace(str(path), 'the file')}") from None
    return AdapterFile(state, adapter.meta, Path(name))


@contextmanager
def not_found() -> Iterator[None]:
    """Answer a request with status 404 if a name is not in the bank."""
    try:
        yield
    except UserError as error:
        raise Refusal(404, str(error), "model_not_found", "model") from None


async def events_of(queue: asyncio.Queue, n_open: int) -> AsyncIterator[tuple[int, Event]]:
    """Yield the events of jobs, until all have ended."""
    while n_open:
        index, event = await queue.get()
        n_open -= bool(event.finish or event.error)
        yield index, event


async def disconnected(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def metrics_text(engine: Engine) -> str:
    """Return counts and states in Prometheus' text format."""
    counts = engine.counts
    lines: list[str] = []

    def add(name: str, kind: str, help: str, values: dict[str, float]) -> None:
        lines.extend([f"# HELP aligner_{name} {help}", f"# TYPE aligner_{name} {kind}"])
        lines.extend(f"aligner_{name}{suffix} {value}" for suffix, value in values.items())

    add("running", "gauge", "Requests in the batch.", {"": len(engine.rows)})
    add("waiting", "gauge", "Requests in the queue.", {"": len(engine.waiting)})
    add("adapters", "gauge", "Adapters in the bank.", {"": len(engine.bank)})
    add("requests_total", "counter", "Requests accepted.", {"": counts["requests"]})
    ends = ("stop", "length", "cancelled", "failed", "refused")
    ended = {f'{{end="{end}"}}': counts[end] for end in ends}
    add("ended_total", "counter", "Requests by outcome; they are refused if the queue is full.", ended)
    for name, what in (("prompt_tokens", "Tokens of prompts."), ("new_tokens", "Tokens generated.")):
        add(f"{name}_total", "counter", what, {"": counts[name]})
    add("steps_total", "counter", "Steps of the batch.", {"": counts["steps"]})
    add("rows_total", "counter", "Rows of the batch, summed over the steps.", {"": counts["rows"]})
    buckets = {f'_bucket{{le="{b:g}"}}': counts[f"first_tokens_within_{b:g}"] for b in FIRST_TOKEN_BOUNDS}
    n, total = counts["first_tokens"], counts["first_token_seconds"]
    times = {**buckets, '_bucket{le="+Inf"}': n, "_sum": total, "_count": n}
    add("first_token_seconds", "histogram", "Seconds until the first token, waiting included.", times)
    return "\n".join(lines) + "\n"
