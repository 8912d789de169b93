"""Replicas started, watched and restarted by Ray Serve, and ended with the process that asked for them.

Ray Serve gives each replica its GPU, asks it for its health every second, and begins it anew where it has died. No
request goes through Ray, whose calls take milliseconds: replicas connect to this process (see `wire`), which sees
at once when one goes. Ray's dashboard and HTTP proxy are off, its usage statistics too; its ports are on loopback and
ask for a token that is made here, its files are in a temporary folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from importlib.util import find_spec
from multiprocessing import AuthenticationError
from multiprocessing.connection import Listener
from pathlib import Path

import torch

from lragent.errors import LRAgentError, UserError
from lragent.serve.engine.service import EngineService
from lragent.serve.replicas.engine_end import EngineEnd, WireHandler
from lragent.serve.replicas.service import ReplicatedService
from lragent.serve.replicas.wire import Facts, Refused, Wire, connect

logger = logging.getLogger(__name__)

APPLICATION = "lragent"
_STOP_S = 5.0
_AGAIN_S = 0.5
"""Until replicas are let in again after a fault."""
_HEALTH_S = 1.0
_LOOK_S = 2.0
_SOCKET_PATH = 107
"""Bytes that the path of a Unix socket may have."""
_RAY_BYTES = 80 * 1024 * 1024
"""Of Ray's object store, which is not used: the least that it allows."""


@contextmanager
def running_fleet(
    build: Callable[[], EngineService], count: int, *, on_gpu: bool, max_waiting: int, seed: int, log_level: str
) -> Iterator[ReplicatedService]:
    """`count` replicas of what `build` makes, as one service; it yields when all of them serve.

    build: can be pickled, by the name of its function; it runs in each replica's process and raises UserError for what
    the user can mend. on_gpu: each has a GPU of its own. max_waiting: open requests, beyond which more are refused.
    seed: for the draws of requests that give none. Raises UserError where Ray is not installed or there are too few
    GPUs, and what `build` raises.
    """
    if find_spec("ray") is None:
        raise UserError("replicas: need Ray; pip install 'lragent[replicas]', or leave --replicas out.")
    if on_gpu and torch.cuda.device_count() < count:
        raise UserError(
            f"replicas: each takes a GPU, and there are {torch.cuda.device_count()}, not {count}; ask for fewer, or "
            "leave --replicas out."
        )
    make = partial(ReplicatedService, places=count, max_waiting=max_waiting, seed=seed)
    with (
        _own_folder() as folder,
        closing(_Door(str(folder / "front"), make)) as door,
        _ray_serve(folder, count if on_gpu else 0),
    ):
        _deploy(build, count, door, on_gpu, log_level)
        service = door.wait_for_all(_deploy_failure)
        try:
            yield service
        finally:
            door.close()
            service.stop(drain=False, timeout_s=_STOP_S)


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A new temporary folder that only this user can enter, until the end. Raises UserError where the paths of sockets
    in it would be too long."""
    parent = tempfile.gettempdir()
    longest = f"/lragent-12345678/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    most = _SOCKET_PATH - len(longest)
    if len(os.fsencode(parent)) > most:
        raise UserError(
            f"TMPDIR: {parent} is too long for the sockets that replicas need in it; set it to a folder with a path of "
            f"at most {most} characters, such as /tmp."
        )
    folder = Path(tempfile.mkdtemp(prefix="lragent-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Door:
    """Where replicas come in."""

    def __init__(self, address: str, make: Callable[[Facts], ReplicatedService]) -> None:
        """make: the service, once the first has come in and told what it is."""
        self.address, self.key = address, secrets.token_bytes(32)
        self._make = make
        self._listener = Listener(address, "AF_UNIX", authkey=self.key)
        self._service: ReplicatedService | None = None
        self._begun: queue.SimpleQueue[Refused | None] = queue.SimpleQueue()
        """One for each replica that has come in."""
        self._making = threading.Lock()
        self._closing = threading.Event()
        self._accepting = threading.Thread(target=self._accept, name="lragent-door", daemon=True)
        self._accepting.start()

    def wait_for_all(self, failure: Callable[[], str | None]) -> ReplicatedService:
        """`failure` is asked now and then why none will come. Raises UserError or LRAgentError where one cannot."""
        while self._service is None or not all(each.alive for each in self._service.replicas):
            try:
                refused = self._begun.get(timeout=_LOOK_S)
            except queue.Empty:
                reason = failure()
                refused = None if reason is None else Refused(reason, mendable=False)
            if refused is not None:
                raise (UserError if refused.mendable else LRAgentError)(refused.message)
        return self._service

    def close(self) -> None:
        """Let nobody in any more. May be called twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        # Closing alone would leave the accepting thread asleep. It is knocked only: it may be waiting for one that
        # has come in and says nothing, and would not answer.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as knocking:
            knocking.settimeout(_STOP_S)
            knocking.connect(self.address)
        self._accepting.join(_STOP_S)

    def _accept(self) -> None:
        failing = False
        with self._listener:
            while not self._closing.is_set():
                try:
                    wire = Wire(self._listener.accept())
                except (AuthenticationError, ConnectionError, EOFError):
                    continue  # whoever came in has no key, or has gone
                except OSError as fault:
                    if not failing:
                        logger.error("no replica can come in: %s; this is tried again and again", fault)
                    failing = True
                    self._closing.wait(_AGAIN_S)
                    continue
                failing = False
                if self._closing.is_set():
                    wire.hang_up()
                else:
                    threading.Thread(target=self._welcome, args=(wire,), daemon=True).start()

    def _welcome(self, wire: Wire) -> None:
        try:
            self._come_in(wire)
        except Exception as fault:
            logger.exception("a replica cannot be used")
            wire.hang_up()
            self._begun.put(Refused(f"A replica cannot be used: {type(fault).__name__}: {fault}", mendable=False))

    def _come_in(self, wire: Wire) -> None:
        for first in wire.messages():
            if isinstance(first, Facts):
                with self._making:
                    if self._service is None:
                        self._service = self._make(first)
                self._service.run(wire, first, lambda: self._begun.put(None))
            elif isinstance(first, Refused):
                logger.error("a replica cannot begin: %s", first.message)
                self._begun.put(first)
            else:
                first.write("a new replica")
                continue
            return
        self._begun.put(Refused("A replica's process has ended while it was built; is there too little memory?", False))


@contextmanager
def _ray_serve(folder: Path, gpus: int) -> Iterator[None]:
    """Ray Serve in processes of this one's own, with all that it writes in `folder`."""
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's way to say: on loopback only
        "RAY_worker_niceness": "0",  # else replicas would yield to whatever else runs
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    import ray
    from ray import serve

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    ray.init(
        address="local",  # whatever RAY_ADDRESS says
        include_dashboard=False,
        num_cpus=1,
        num_gpus=gpus,
        object_store_memory=_RAY_BYTES,
        configure_logging=False,
        log_to_driver=False,
        _temp_dir=str(folder / "ray"),
    )
    try:
        serve.start(http_options={"location": "NoServer"})
        yield
    finally:
        ray.shutdown()  # ends all its processes; Serve's own way would take its time over replicas that have ended


def _deploy(build: Callable[[], EngineService], count: int, door: _Door, on_gpu: bool, log_level: str) -> None:
    from ray import serve

    deployment = serve.deployment(
        name="engine",
        num_replicas=count,
        health_check_period_s=_HEALTH_S,
        graceful_shutdown_timeout_s=0.0,  # the front has drained
        ray_actor_options={"num_cpus": 0, "num_gpus": 1 if on_gpu else 0},
    )(EngineReplica)
    threads = max(1, torch.get_num_threads() // count)
    bound = deployment.bind(build, door.address, door.key, threads, log_level)
    target = serve.RunTarget(bound, name=APPLICATION, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)


def _deploy_failure() -> str | None:
    """Why Ray Serve has given up to start replicas; None as long as it has not."""
    from ray import serve

    application = serve.status().applications[APPLICATION]
    return f"Ray Serve cannot start the replicas: {application.message}" if "FAILED" in application.status else None


class EngineReplica:
    """One engine in a process of Ray Serve's. It lives as long as its engine and the front's process do."""

    def __init__(
        self, build: Callable[[], EngineService], address: str, key: bytes, threads: int, log_level: str
    ) -> None:
        """Builds the engine, which may take minutes, and then serves the front at `address`. threads: torch's."""
        torch.set_num_threads(threads)
        wire = connect(address, key)
        root = logging.getLogger()
        root.handlers[:] = [WireHandler(wire)]
        logging.getLogger("lragent").setLevel(log_level.upper())
        try:
            service = build()
        except Exception as error:
            mendable = isinstance(error, UserError)
            wire.send(Refused(str(error) if mendable else f"{type(error).__name__}: {error}", mendable))
            raise
        service.start(freeze=True)
        self._end = EngineEnd(service, wire)
        self._end.begin()

    def check_health(self) -> None:
        """Asked by Ray Serve, which begins the replica anew where this raises."""
        if not self._end.alive:
            raise RuntimeError("the engine has failed, or the front has gone")
