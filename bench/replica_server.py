"""The server that `python -m lragent.bench replicas` measures: a process of its own, as users have it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import psutil
import torch

from lragent.bench.engines import Base
from lragent.bench.shapes import shape_named
from lragent.bench.traces import random_roles, team
from lragent.chat import Renderer
from lragent.errors import LRAgentError
from lragent.modes import PrefixWriter, SharingMode
from lragent.serve.api.app import create_app
from lragent.serve.api.server import bind, serve
from lragent.serve.api.service import Service
from lragent.serve.api.settings import ServeSettings
from lragent.serve.engine.build import build_engine
from lragent.serve.engine.chat import ChatPrompts
from lragent.serve.engine.service import EngineService
from lragent.serve.engine.types import RoleCard
from lragent.serve.replicas.fleet import running_fleet

DRAIN_S = 1


@dataclass(frozen=True)
class Served:
    """What a server holds. device: cpu or cuda. seats: requests that one engine runs at once. slots: tokens that one
    engine's cache holds; None: as many as fit."""

    shape: str
    device: str
    dtype: str
    positions: int
    seats: int
    slots: int | None
    roles: int = 3
    rank: int = 8


def build(served: Served) -> EngineService:
    """One engine over random weights, in `base_lr_shared`."""
    shape = shape_named(served.shape)
    device = torch.device(served.device)
    base = Base(device, getattr(torch, served.dtype), shape, rank=served.rank, positions=served.positions)
    tokenizer = base.tokenizer()
    tokenizer.unk_token = tokenizer.eos_token = "w0"  # without one, no form of a chat's turns is known
    model = base.load()
    adapters = random_roles(model, team(served.roles), served.rank)
    mode = SharingMode.BASE_LR_SHARED
    engine = build_engine(
        model,
        tokenizer,
        adapters,
        sharing=mode,
        max_model_len=served.positions,
        cache_tokens=served.slots,
        max_num_seqs=served.seats,
    )
    cards = [RoleCard("base", None, served.shape, None)]
    cards += [RoleCard(name, "base", served.shape, adapters.role_digest(name)) for name in adapters.role_names]
    chat = ChatPrompts(Renderer(tokenizer), engine.turns, mode, PrefixWriter.BASE)
    return EngineService(engine, chat, cards, served.shape)


def run(served: Served, replicas: int) -> None:
    """Serve until SIGTERM. replicas: 0 is an engine in this process."""
    settings = ServeSettings(port=0, drain_s=DRAIN_S, log_level="warning")
    with bind(settings.host, settings.port) as sock, _service(served, replicas) as service:
        app = create_app(service, settings)
        serve(app, service, settings, sock, lambda url: print(f"serving on {url}", flush=True))


@contextmanager
def _service(served: Served, replicas: int) -> Iterator[Service]:
    if replicas:
        make = partial(build, served)
        on_gpu = served.device == "cuda"
        with running_fleet(make, replicas, on_gpu=on_gpu, max_waiting=4096, seed=0, log_level="warning") as fleet:
            yield fleet
        return
    service = build(served)
    service.start(freeze=True)
    try:
        yield service
    finally:
        service.stop(drain=False)


@contextmanager
def started(words: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """`python -m lragent.bench replicas` with `words`, which make it a server: its URL and process. It is ended after.

    Raises LRAgentError where it ends before it serves.
    """
    command = [sys.executable, "-m", "lragent.bench", "replicas", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        found = None
        while found is None:
            line = process.stdout.readline()
            if not line:
                raise LRAgentError(f"the server ended with status {process.wait()} before it served")
            found = re.match(r"serving on (\S+)", line)
        yield found[1], psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def replica_processes(server: psutil.Process) -> list[psutil.Process]:
    """Those of Ray Serve that hold an engine."""
    return [each for each in server.children(recursive=True) if each.name().startswith("ray::ServeRepl")]
