"""What is refused before anything begins, and that one engine knows nothing of Ray."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lragent.errors import UserError
from lragent.serve.api.settings import ServeSettings
from lragent.serve.engine.service import EngineService
from lragent.serve.replicas import fleet


def build() -> EngineService:
    raise AssertionError("nothing is to be built")


def begin(on_gpu: bool = False) -> None:
    with fleet.running_fleet(build, 2, on_gpu=on_gpu, max_waiting=9, seed=0, log_level="info"):
        pass


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^replicas: .*pip install 'lragent\[replicas\]'"):
        begin()


def test_too_few_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"^replicas: each takes a GPU, and there are 1, not 2"):
        begin(on_gpu=True)


def test_a_temporary_folder_with_too_long_a_path_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(UserError, match=r"^TMPDIR: .*longlong.* such as /tmp\.$"):
        begin()
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("given", "named"), [({"replicas": 0}, "replicas"), ({"replicas": 1, "device": "cuda:1"}, "device")]
)
def test_a_wrong_setting_is_named(given: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=f"^{named}: "):
        ServeSettings(**given)  # type: ignore[arg-type]


def test_one_gpu_by_number_is_right_for_one_engine() -> None:
    assert ServeSettings(device="cuda:1").replicas is None


def test_ray_is_not_imported_before_a_fleet_runs() -> None:
    said = "import sys, lragent.serve.replicas.fleet, lragent.cli.serve; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", said], check=False).returncode == 0
