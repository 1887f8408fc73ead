"""``lightning-igpt demo``: a page on this machine that completes pictures and shows what surprises the network.

The server keeps nothing, and one thread computes. Pages of other sites cannot use it: requests under a foreign host
name (DNS rebinding) and posts from another origin are refused.
"""

# No "from __future__ import annotations": FastAPI reads the types of functions that are defined inside a function.
import asyncio
import contextlib
import importlib
import json
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from lightning_igpt.commands.complete import DEFAULT, pick_device
from lightning_igpt.commands.demo_studio import Ask, Studio
from lightning_igpt.config import EMBEDDED
from lightning_igpt.files import shown
from lightning_igpt.weights import ASSETS, load_pretrained

PAGE = ASSETS / "demo.html"
MAX_BYTES = 32 * 2**20  # of an upload; phones write photos of 3 to 12 MiB
PATIENCE = 30  # seconds in which a request has to arrive, and at most as many again
POLICY = (  # the page is one static file and fetches nothing elsewhere
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def demo(
    pretrained: str | None = None, host: str = "127.0.0.1", port: int = 8000, open: bool = False, device: str = "auto"
) -> None:
    """Serve a page on which a network redraws the hidden part of a picture row by row.

    Args:
        pretrained: A network: a .ckpt file or run folder, a Hugging Face folder or hub id, or an OpenAI checkpoint. The
            page always offers the embedded networks (photos, emoji, emoji_bert).
        host: Address to listen on. The default admits this machine only, others everyone who can reach them, without a
            password.
        port: Port to listen on; 0 picks a free one.
        open: Open the page in a browser.
    """
    try:
        importlib.import_module("fastapi"), importlib.import_module("uvicorn")
    except ModuleNotFoundError as error:
        cure = 'pip install ".[demo]"'
        raise ModuleNotFoundError(f"the demo needs FastAPI and uvicorn, and {error.name} is missing: {cure}") from error
    with listening(host, port) as listener:
        place = pick_device(device)
        studios = [Studio(load_pretrained(name), place) for name in dict.fromkeys([pretrained or DEFAULT, *EMBEDDED])]
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        print(shown(f"{', '.join(studio.loaded.origin for studio in studios)}, on {place}"))
        if host not in ("127.0.0.1", "::1", "localhost"):
            print(f"warning: everyone who can reach {host} can use the page; it asks for no password")
        print(f"open {address} (Ctrl-C stops it)", flush=True)
        if open:  # in a thread, since a browser in the terminal would not return
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):
            make_server(make_app(studios, host)).run(sockets=[listener])


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; OSError where the port is used or not allowed, or the host has no such address."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error}; choose another --port or --host") from error


def make_app(studios: Sequence[Studio], host: str) -> Any:
    """The ASGI application, answering to ``host`` and addresses; requests number the networks as ``studios`` does."""
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    worker, text = ThreadPoolExecutor(1, thread_name_prefix="demo"), PAGE.read_text(encoding="utf-8")
    app.state.ends = set()

    async def work(function: Callable[[Any], Any], given: Any) -> JSONResponse:
        return JSONResponse(await asyncio.get_running_loop().run_in_executor(worker, function, given))

    def room(network: int) -> Studio:
        if not 0 <= network < len(studios):
            raise ValueError(f"there is no network {network} of {len(studios)}; load the page again")
        return studios[network]

    headers = {"content-security-policy": POLICY, "cross-origin-resource-policy": "same-origin"}
    headers |= {"referrer-policy": "no-referrer", "x-content-type-options": "nosniff", "cache-control": "no-store"}

    @app.middleware("http")
    async def guard(request: Request, answer: Any) -> Any:
        status, reason = refusal(request.method, dict(request.headers), host)
        response = JSONResponse({"error": reason}, status) if reason else await answer(request)
        response.headers.update(headers)
        return response

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(text)

    @app.get("/start")
    async def start() -> JSONResponse:
        return JSONResponse({"networks": [studio.start() for studio in studios], "max_bytes": MAX_BYTES})

    @app.post("/{network}/image")
    async def image(network: int, request: Request) -> JSONResponse:
        return await work(room(network).read, await request.body())

    @app.post("/{network}/score")
    async def score(network: int, ask: Ask) -> JSONResponse:
        return await work(room(network).score, ask.tokens)

    @app.post("/{network}/draw")
    async def draw(network: int, ask: Ask) -> StreamingResponse:
        lines = drawn_lines(room(network), worker, ask, app.state.ends)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    @app.exception_handler(ValueError)
    async def wrong(request: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 400)

    return app


async def drawn_lines(studio: Studio, worker: ThreadPoolExecutor, ask: Ask, ends: set[Any]) -> AsyncIterator[str]:
    """Lines of JSON as ``Studio.draw`` emits them, until the reader is gone or what it adds to ``ends`` is called."""
    loop, gone = asyncio.get_running_loop(), threading.Event()
    queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    def emit(line: dict[str, Any] | None) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, line)

    def work() -> None:
        try:
            studio.draw(ask, emit, gone)
        finally:
            emit(None)

    ends.add(end := partial(emit, None))
    job = worker.submit(work)
    try:
        while (line := await queue.get()) is not None:
            yield json.dumps(line) + "\n"
    finally:
        ends.discard(end)
        gone.set()
        job.cancel()  # if it has not begun


def refusal(method: str, headers: dict[str, str], host: str) -> tuple[int, str]:
    """Status and reason why a request is not answered, by its headers (lower-case names); the reason may be empty."""
    named, origin, length = headers.get("host", ""), headers.get("origin"), int(headers.get("content-length", 0))
    try:
        name = urlsplit(f"//{named}").hostname or ""
        if name not in ("localhost", host.lower()):
            ip_address(name)  # safe, since rebinding DNS takes a host name
    except ValueError:
        return 403, f"this server does not answer to the name {named!r}; open the address that it printed"
    if method != "GET" and origin is not None and urlsplit(origin).netloc != named:
        return 403, f"a page of {origin} may not use this server"
    if "transfer-encoding" in headers:  # of any length, whatever a Content-Length says
        return 411, "this server takes requests of a known length only; send Content-Length alone"
    if length > MAX_BYTES:
        return 413, f"the file has {length:,} bytes, more than the limit of {MAX_BYTES:,}; shrink it first"
    return 200, ""


def make_server(app: Any) -> Any:
    """A uvicorn.Server that logs warnings only, and closes connections whose request does not become complete."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(PATIENCE, self.look, None)

        def look(self, earlier: Any) -> None:
            answering = self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete
            if self.cycle is earlier and not answering:
                self.transport.close()
            elif not self.transport.is_closing():
                self.loop.call_later(PATIENCE, self.look, self.cycle)

    class Server(uvicorn.Server):
        def handle_exit(self, *signal: Any) -> None:
            for end in tuple(app.state.ends):  # a drawing may take longer than the shutdown waits
                end()
            super().handle_exit(*signal)

    options: dict[str, Any] = {"http": Impatient, "ws": "none", "log_level": "warning", "timeout_graceful_shutdown": 2}
    return Server(uvicorn.Config(app, **options))
