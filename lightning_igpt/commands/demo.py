"""``lightning-igpt demo``: a page on this machine to complete pictures with, and to see what surprises the network.

The embedded network is the one that ``lightning-igpt quickstart --threads 1`` trains, in 16 bits. README.md beside its
weights, in ``assets/digits``, says how it was made.
"""

from __future__ import annotations

import contextlib
import importlib
import socket
import threading
import webbrowser
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

from lightning_igpt.commands.arguments import run_function
from lightning_igpt.commands.complete import pick_device
from lightning_igpt.commands.demo_server import is_loopback, make_app, serve
from lightning_igpt.commands.demo_studio import Studio
from lightning_igpt.weights import Pretrained, load_pretrained

EMBEDDED = Path(__file__).parents[1] / "assets" / "digits"


def demo(
    pretrained: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    open: bool = False,
    device: str = "auto",
) -> None:
    """Serve a page on which you choose a picture and what of it is hidden, and see it drawn anew row by row.

    Args:
        pretrained: The network: a .ckpt file or run folder, a Hugging Face folder or hub id, or an OpenAI checkpoint.
            Default: a small one of 8 x 8 digits that comes with the package.
        host: Address to listen on. By default nobody but this machine can reach it; any other is open to whoever can
            reach that address, without a password.
        port: Port to listen on; 0 takes a free one.
        open: Open the page in a browser.
        device: cpu, cuda, mps, or auto.
    """
    need_extra()
    with listening(host, port) as listener:
        studio = Studio(load_network(pretrained), pick_device(device))
        address = url(host, listener.getsockname()[1])
        print(f"{studio.loaded.origin}, on {studio.device}")
        if not is_loopback(host):
            print(f"warning: whoever can reach {host} can use the page; it asks for no password")
        print(f"open {address} (Ctrl-C stops it)", flush=True)
        if open:  # a browser in the terminal would not come back
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):
            serve(make_app(studio, host), listener)


def need_extra() -> None:
    """Raise where a library of the extra ``demo`` is not installed.

    Raises:
        ModuleNotFoundError: One is missing.
    """
    for name in ("fastapi", "uvicorn"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'the demo needs FastAPI and uvicorn, and {error.name} is missing: pip install "lightning-igpt[demo]"'
            ) from error


def load_network(pretrained: str | None) -> Pretrained:
    """The network named, or the embedded one."""
    if pretrained is not None:
        return load_pretrained(pretrained)
    return replace(load_pretrained(EMBEDDED), origin="embedded network of 8 x 8 digits")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; connections wait in it until the server takes them.

    Raises:
        OSError: The port is taken or not allowed, or the host has no such address.
        ValueError: The port is no port.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}; it must be from 1 to 65535, or 0 for a free one")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot listen on {host}, port {port}: {reason}; choose another --port or --host") from error


def url(host: str, port: int) -> str:
    """The address to open on this machine."""
    with contextlib.suppress(ValueError):
        address = ip_address(host)
        if address.is_unspecified:
            host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    return run_function(demo, words, "demo")
