"""The tests of this folder ask a real engine over a tiny model, where those beside it ask a fake one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from api_fakes import live_server
from real_engine import ROLES, build_tiny
from tiny import make_adapter_set, save_tiny, tiny_model

from lragent.models import fingerprint
from lragent.pack import write_pack
from lragent.serve.api.settings import ServeSettings
from lragent.serve.engine.service import EngineService


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """A tiny model gains nothing from more threads, and loses much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and a pack of three roles."""
    place = tmp_path_factory.mktemp("served")
    folder, pack = save_tiny(place / "tiny"), place / "team.lrpack"
    adapters = make_adapter_set(tiny_model(), ROLES)
    write_pack(pack, replace(adapters, base_fingerprint=fingerprint(folder)))
    return folder, pack


@pytest.fixture(scope="module")
def service(files: tuple[Path, Path]) -> Iterator[EngineService]:
    built = build_tiny(files)
    built.start()
    yield built
    built.stop(drain=False)
    assert not built.alive


@pytest.fixture(scope="module")
def url(service: EngineService) -> Iterator[str]:
    with live_server(service, ServeSettings(port=0)) as address:
        yield address
