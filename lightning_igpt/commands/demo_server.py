"""The web side of ``lightning-igpt demo``: one page, four requests, and what is refused.

The page keeps its picture, the server nothing. One thread computes, one request after another.
A page of another site must not use this server: requests under a foreign name (DNS rebinding) and posts from another
origin are refused, and their content is thrown away unread.
"""

# No "from __future__ import annotations": FastAPI reads the types of functions that are defined inside one.
import asyncio
import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from lightning_igpt.commands.demo_studio import Ask, Studio

PAGE = Path(__file__).parents[1] / "assets" / "demo.html"
MAX_BYTES = 32 * 2**20  # of a request; phones write photos of 3 to 12 MiB
CONNECTIONS = 64  # at a time; a browser opens up to six
GRACE = 2  # seconds for open requests when the server is stopped, and for the rest of a refused one

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]


def make_app(studio: Studio, host: str) -> App:
    """The application.

    Args:
        studio: Does the work.
        host: What the server listens on, which decides the names it answers to.
    """
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
    from starlette.requests import ClientDisconnect

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    worker = ThreadPoolExecutor(1, thread_name_prefix="demo")
    text = PAGE.read_text(encoding="utf-8")

    async def computed(work: Callable[..., Any], *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(worker, work, *given)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(text)

    @app.get("/start")
    async def start() -> JSONResponse:
        return JSONResponse({**studio.start(), "max_bytes": MAX_BYTES})

    @app.post("/image")
    async def image(request: Request) -> JSONResponse:
        return JSONResponse({"tokens": await computed(studio.read, await request.body())})

    @app.post("/score")
    async def score(ask: Ask) -> JSONResponse:
        return JSONResponse(await computed(studio.score, ask.tokens))

    @app.post("/draw")
    async def draw(ask: Ask) -> StreamingResponse:
        return StreamingResponse(drawn_lines(studio, worker, ask), media_type="application/x-ndjson")

    @app.exception_handler(ValueError)
    async def wrong(request: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 400)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> JSONResponse:
        return JSONResponse({"error": "the upload was broken off"}, 400)  # read by nobody

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"error": f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"}, 400)

    return Guard(app, host, policy(text))


async def drawn_lines(studio: Studio, worker: ThreadPoolExecutor, ask: Ask) -> AsyncIterator[str]:
    """Lines of JSON as ``Studio.draw`` emits them. When nobody reads on, the drawing is told."""
    loop, gone = asyncio.get_running_loop(), threading.Event()
    queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    def emit(line: dict[str, Any] | None) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, line)

    def work() -> None:
        try:
            studio.draw(ask, emit, gone)
        finally:
            emit(None)

    job = worker.submit(work)
    try:
        while (line := await queue.get()) is not None:
            yield json.dumps(line) + "\n"
    finally:
        gone.set()
        job.cancel()  # if it has not begun


class Guard:
    """ASGI application that refuses what a page of another site may have sent, and adds headers of safety.

    Args:
        app: The application behind it.
        host: What the server listens on.
        content_security: Of the page.
    """

    def __init__(self, app: App, host: str, content_security: str) -> None:
        self.app, self.host = app, host
        headers = {
            "content-security-policy": content_security,
            "cross-origin-resource-policy": "same-origin",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "cache-control": "no-store",
        }
        self.headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self.headers]
            await send(message)

        found = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = refusal(scope["method"], found, self.host)
        if refused is None:
            await self.app(scope, receive, send_safely)
            return
        status, reason = refused
        if "expect" not in found:  # who waits for leave to send hears the refusal instead
            await discard(receive)
        kind = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send_safely({"type": "http.response.start", "status": status, "headers": kind})
        await send_safely({"type": "http.response.body", "body": json.dumps({"error": reason}).encode()})


async def discard(receive: Receive) -> None:
    """Take a refused request's content off the connection: closed over unread bytes, it takes the answer with it.

    Ends at four times what is allowed, or after ``GRACE`` seconds; who sends more sees the connection break.
    """

    async def rest() -> None:
        taken, more = 0, True
        while more and taken <= 4 * MAX_BYTES:
            message = await receive()
            taken, more = taken + len(message.get("body", b"")), message.get("more_body", False)

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(rest(), GRACE)


def refusal(method: str, headers: dict[str, str], host: str) -> tuple[int, str] | None:
    """Status and reason why a request is not answered, or None.

    Args:
        method: GET, POST and the like.
        headers: By lower-case name.
        host: What the server listens on.
    """
    named, origin, length = headers.get("host", ""), headers.get("origin"), headers.get("content-length", "")
    if not answers_to(named, host):
        return 403, f"this server does not answer to the name {named!r}; open the address that it printed"
    if method in ("GET", "HEAD"):
        return None
    if origin is not None and urlsplit(origin).netloc != named:
        return 403, f"a page of {origin} may not use this server"
    if not re.fullmatch(r"[0-9]{1,18}", length):
        return 411, "the request does not say how long it is"
    if int(length) > MAX_BYTES:
        return 413, f"the file has {int(length):,} bytes, more than the limit of {MAX_BYTES:,}; shrink it first"
    return None


def answers_to(named: str, host: str) -> bool:
    """Whether a Host header names this server, by address or by the name it was started with.

    Addresses are safe: to rebind DNS, an attacker needs a name of his own.
    """
    try:
        name = urlsplit(f"//{named}").hostname or ""
    except ValueError:
        return False
    if name in ("localhost", host.lower()):
        return True
    try:
        return ip_address(name).is_loopback or not is_loopback(host)
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def policy(page: str) -> str:
    """A content security policy under which this page's own script and style run, and nothing is fetched elsewhere."""
    hashes = {}
    for tag in ("script", "style"):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in content]
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def serve(app: App, listener: socket.socket) -> None:
    """Answer requests until a signal comes.

    Raises:
        KeyboardInterrupt: It was Ctrl-C.
    """
    make_server(app).run(sockets=[listener])


def make_server(app: App) -> Any:
    """A uvicorn.Server that logs warnings only."""
    import uvicorn

    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE,
    )
    return uvicorn.Server(config)
