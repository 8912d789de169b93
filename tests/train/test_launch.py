"""Every engine for real: two processes on a CPU by accelerate's launcher, from each config in configs/accelerate/.

The loss after every step, and the pack, must be those of one process; an interrupted run that goes on must give the
uninterrupted one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launched import COMPILED, FROZEN, SEQUENTIAL, SHORT, STEPS, settings
from test_loop import rows
from tiny import save_tiny
from tolerances import STEP_TOLERANCES

from lragent.pack import read_pack
from lragent.train.loop import train

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "accelerate"
ENGINES = {
    "gpu_2_ddp": "DDP",
    "gpu_2_fsdp2": "FSDP2",
    "gpu_2_zero2": "DeepSpeed ZeRO-2",
    "gpu_2_zero3": "DeepSpeed ZeRO-3",
}
MACHINE = {"seconds", "tokens_per_second", "memory_gib"}
"""What the machine decides."""


def engines() -> list[str]:
    """One config of each kind: those for other numbers of GPUs say the same otherwise."""
    found: dict[str, str] = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        config = yaml.safe_load(path.read_text())
        if config.pop("num_processes") > 1:
            found.setdefault(json.dumps(config, sort_keys=True), path.name)
    return sorted(found.values())


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("given")
    save_tiny(folder / "tiny")
    for name, count in (("train", 9), ("eval", 3)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    train(settings(folder, folder / "alone"))
    train(settings(folder, folder / "sequential", **SEQUENTIAL))
    train(settings(folder, folder / "frozen", **FROZEN))
    train(settings(folder, folder / "short", **SHORT))
    train(settings(folder, folder / "compiled", **COMPILED))
    return folder


def launch(config: str, given: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """As a user would, but on a CPU and with two processes."""
    changed = yaml.safe_load((CONFIGS / config).read_text()) | {"num_processes": 2, "use_cpu": True}
    mine = out / "accelerate.yaml"
    mine.write_text(yaml.safe_dump(changed))
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(mine)]
    command += ["--main_process_port", "0", str(ROOT / "tests" / "train" / "launched.py"), str(given), str(out)]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "LRAGENT_CACHE": str(out / "cache"),
    }
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)


def steps(out: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def evaluations(out: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "eval" in row]


@pytest.mark.slow
@pytest.mark.parametrize("config", engines())
def test_two_processes_learn_what_one_does_and_go_on_after_an_interruption(
    config: str, given: Path, tmp_path: Path
) -> None:
    done = launch(config, given, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == ENGINES[config.removesuffix("_offload.yaml").removesuffix(".yaml")]
    assert len(steps(given / "alone")) == STEPS
    train(settings(given, tmp_path / "left"), resume=True)  # what two processes left, by one
    runs = {
        "whole": "alone",
        "resumed": "alone",
        "left": "alone",
        "sequential": "sequential",
        "frozen": "frozen",
        "short": "short",
    }
    assert "dtypes: torch.bfloat16 torch.float32" in done.stdout, "a base in its own dtype, adapters in float32"
    if "zero3" in config:
        assert "`a_init: svd` does not go with ZeRO-3" in done.stdout
        del runs["frozen"]
    if "fsdp2" in config:
        runs["compiled"] = "compiled"
    for name, reference in runs.items():
        mine, alone = steps(tmp_path / name), steps(given / reference)
        assert [row["step"] for row in mine] == [row["step"] for row in alone]
        for one, other in zip(mine, alone, strict=True):
            assert (one["tokens"], one["targets"]) == (other["tokens"], other["targets"])
            assert one.keys() == other.keys()
            rounding = STEP_TOLERANCES[torch.bfloat16 if name == "short" else torch.float32]
            for part in one.keys() - MACHINE:
                assert one[part] == pytest.approx(other[part], rel=rounding), f"{name}, step {one['step']}, {part}"
        first, last = evaluations(tmp_path / name)
        for one, other in zip((first, last), evaluations(given / reference), strict=True):
            for kind, by_role in other["eval"].items():
                assert one["eval"][kind] == pytest.approx(by_role, rel=rounding)
            if name != "short":
                assert one["eval_accuracy"] == other["eval_accuracy"]
        got, want = read_pack(tmp_path / name / "pack.safetensors"), read_pack(given / reference / "pack.safetensors")
        for path in want.module_paths:
            if name != "short":  # where a gradient is near zero, AdamW's first steps go by its sign
                torch.testing.assert_close(got.shared_a[path], want.shared_a[path], atol=2e-4, rtol=2e-3)
                torch.testing.assert_close(got.role_b[path], want.role_b[path], atol=2e-4, rtol=2e-3)
        assert not (tmp_path / f"{name}.partial").exists()
