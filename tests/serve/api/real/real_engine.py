"""A real engine over a tiny model, as `lragent serve` builds it."""

from __future__ import annotations

from pathlib import Path

from lragent.modes import SharingMode
from lragent.serve.engine.build import build_service
from lragent.serve.engine.service import EngineService

ROLES = ("plan", "action", "reflect")
QUESTION = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Where is the northern harbour?"}]


def build_tiny(files: tuple[Path, Path], max_model_len: int = 1024) -> EngineService:
    return build_service(
        model=str(files[0]),
        roles=str(files[1]),
        sharing=SharingMode.BASE_LR_SHARED,
        prefix_writer=None,
        dtype="float32",
        device="cpu",
        max_model_len=max_model_len,
        max_tokens_in_cache=8192,
        max_num_seqs=8,
        seed=0,
    )
