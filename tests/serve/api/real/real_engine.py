"""A real engine over a tiny model, as `lragent serve` builds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lragent.serve.engine.build import build_service
from lragent.serve.engine.service import EngineService

ROLES = ("plan", "action", "reflect")
QUESTION = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Where is the northern harbour?"}]


def build_tiny(files: tuple[Path, Path], **options: Any) -> EngineService:
    """The tiny model with its pack; `options` are those of `build_service`."""
    given = {"dtype": "float32", "device": "cpu", "max_model_len": 1024, "max_tokens_in_cache": 8192, "max_num_seqs": 8}
    return build_service(model=str(files[0]), roles=str(files[1]), **(given | options))
