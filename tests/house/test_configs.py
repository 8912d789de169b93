"""Every YAML in configs/ loads into the class that it is for, and begins with the command that uses it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lragent.config import load_config

ROOT = Path(__file__).parents[2]


def train_settings(path: Path) -> Any:
    from lragent.train.settings import TrainSettings

    return load_config(TrainSettings, path)


def serve_settings(path: Path) -> Any:
    from lragent.serve.api.settings import ServeSettings

    return load_config(ServeSettings, path)


def accelerate_config(path: Path) -> Any:
    from accelerate.commands.config.config_args import load_config_from_file

    return load_config_from_file(str(path))


def deepspeed_config(path: Path) -> Any:
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(str(path))


def study_plan(path: Path) -> Any:
    from lragent.eval.study.plan import StudyPlan

    return load_config(StudyPlan, path)


def bench_plan(path: Path) -> Any:
    from lragent.bench.trace_plan import Plan

    return load_config(Plan, path)


READERS: dict[str, Callable[[Path], Any]] = {
    "roles": train_settings,
    "serve": serve_settings,
    "accelerate": accelerate_config,
    "deepspeed": deepspeed_config,
    "bench": bench_plan,
    "eval": study_plan,
}
"""Folder in configs/ to what reads its files."""


def configs() -> list[str]:
    found = [path for ending in ("yaml", "yml", "json") for path in (ROOT / "configs").rglob(f"*.{ending}")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


@pytest.mark.parametrize("path", configs())
def test_a_config_loads(path: str) -> None:
    folder = Path(path).parts[1]
    assert folder in READERS, f"{path}: no class is known for configs/{folder}"
    assert READERS[folder](ROOT / path) is not None


@pytest.mark.parametrize("path", [path for path in configs() if not path.endswith(".json")])
def test_a_config_begins_with_its_command(path: str) -> None:
    first = (ROOT / path).read_text().splitlines()[0]
    assert first.startswith("# ")
    assert path in first
