"""The process around the app: its socket, its signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Generator

import uvicorn
from fastapi import FastAPI

from lragent.errors import UserError
from lragent.serve.api.service import Service
from lragent.serve.api.settings import ServeSettings

_GRACE_S = 2
"""Seconds for open requests to say that they were ended, after the drain."""


def bind(host: str, port: int) -> socket.socket:
    """Take the address, before anything slow is loaded. Raises UserError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise _no_host(host, error) from None
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise _no_host(host, error) from None
        raise UserError(
            f"port: cannot listen on {host}:{port} ({error.strerror}); choose another with --port, or 0 for a free one."
        ) from None
    return sock


def _no_host(host: str, error: OSError) -> UserError:
    return UserError(f"host: {host!r} is not an address of this machine ({error.strerror or error}).")


def address_of(sock: socket.socket) -> str:
    """The URL under which the server at `sock` is reached."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    app: FastAPI, service: Service, settings: ServeSettings, sock: socket.socket, announce: Callable[[str], None]
) -> None:
    """Answer requests at `sock` until SIGTERM or SIGINT; then let open ones end, at most `drain_s` seconds.

    `service` is running; it is left to the caller to stop it in the end. `announce` is given the URL once the server
    answers there. Raises UserError where the port was taken meanwhile.
    """
    try:
        sock.listen(2048)
    except OSError as error:
        raise UserError(f"port: cannot listen on {address_of(sock)} ({error.strerror}).") from None
    Server(app, service, settings, announce).run(sockets=[sock])


class Server(uvicorn.Server):
    """uvicorn that returns after a signal, where its own raises the signal again, and that ends the engine's open
    requests when they outlast the drain."""

    def __init__(
        self, app: FastAPI, service: Service, settings: ServeSettings, announce: Callable[[str], None]
    ) -> None:
        config = uvicorn.Config(
            app,
            loop="asyncio",  # not uvloop, only because something else has brought it along
            http="h11",  # bounds the size of headers
            ws="none",
            lifespan="off",
            log_config=None,  # `logs.configure_logging` has seen to it
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=settings.drain_s + _GRACE_S,
        )
        super().__init__(config)
        self._service = service
        self._drain_s = settings.drain_s
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or []:
            self._announce(address_of(sock))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_requests())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_requests(self) -> None:
        await asyncio.sleep(self._drain_s)
        await asyncio.to_thread(self._service.stop, False, float(_GRACE_S))

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        taken = (signal.SIGINT, signal.SIGTERM)
        before = {each: signal.signal(each, self.handle_exit) for each in taken}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
