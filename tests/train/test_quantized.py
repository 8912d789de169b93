"""A base in 4 bits, by bitsandbytes, on a GPU."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from test_loop import metrics, rows, settings
from tiny import save_tiny

from lragent.errors import UserError
from lragent.models import load_model, resolve_model
from lragent.models import source as module
from lragent.pack import read_pack
from lragent.train.loop import train


def test_four_bits_without_a_gpu_or_the_library_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve_model(str(save_tiny(tmp_path / "tiny")))
    with pytest.raises(UserError, match="needs a CUDA GPU; this runs on cpu"):
        load_model(source, torch.bfloat16, "cpu", quantize="nf4")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load_model(source, torch.bfloat16, "cuda", quantize="nf4")


@pytest.mark.gpu
@pytest.mark.parametrize("a_init", ["random", "svd"])
def test_roles_learn_on_a_base_in_four_bits(a_init: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: it is no dependency")
    model = save_tiny(tmp_path / "tiny")
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    summary = train(settings(data, model, dtype="bf16", quantize="nf4", a_init=a_init, max_steps=8))
    assert summary is not None
    assert summary["train_loss_last"] < summary["train_loss_first"]
    assert all(math.isfinite(row["loss"]) for row in metrics(summary["out"]))
    pack = read_pack(summary["pack"], expect_fingerprint=resolve_model(str(model)).fingerprint())
    assert all(pack.role_b[path].any() for path in pack.module_paths)
    assert "4 bits" in Path(summary["out"], "README.md").read_text()
