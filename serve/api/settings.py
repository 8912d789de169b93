"""What `lragent serve` can be told: by flags, or in a YAML file with `key=value` overrides."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lragent.errors import UserError
from lragent.modes import PrefixWriter, SharingMode
from lragent.serve.engine.limits import check_limits
from lragent.serve.ledger.budgets import Budget
from lragent.serve.ledger.prices import Prices


@dataclass(frozen=True)
class ServeSettings:
    """One server: what it serves, how much it holds, where it listens. Fixed for its life.

    Raises UserError naming a field that is out of range.
    """

    model: str | None = None
    """Hub id, folder or GGUF file; None is the embedded default."""
    roles: str | None = None
    """Path of the pack; None serves the base model alone."""
    sharing: SharingMode = SharingMode.BASE_LR_SHARED
    prefix_writer: PrefixWriter | None = None
    """None: as the pack was trained."""
    dtype: str = "auto"
    """Of weights and cache; auto is float32 on a CPU and bfloat16 on a GPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    max_model_len: int | None = None
    """Tokens of prompt and answer together; None: what the model allows. Never more than the cache holds."""
    max_tokens_in_cache: int | None = None
    """Slots of the KV cache, one token each; None: chosen by the engine."""
    gpu_memory_utilization: float = 0.9
    """On a GPU: the share of its memory that may be in use, weights and cache and all."""
    max_num_seqs: int | None = None
    """Requests that run at once; the rest wait. None: 64 on a GPU, 16 on a CPU."""
    max_num_batched_tokens: int | None = None
    """Tokens of one step; longer prompts are cut. None: 8192 on a GPU, 512 on a CPU."""
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 8000
    """0 picks a free one."""
    max_body_bytes: int = 8 * 1024 * 1024
    """A larger request body is refused while it is read."""
    drain_s: int = 5
    """Seconds that open requests may still run after SIGTERM or SIGINT."""
    log_level: str = "info"
    log_format: Literal["text", "json"] = "text"
    """Of what goes to stderr; json is one object a line."""
    api_key: tuple[str, ...] = ()
    """Secrets, or `name=secret`; everything but /health then asks for one. Better given by $LRAGENT_API_KEY, with
    commas between them: a command line can be read by others."""
    admin_key: str | None = None
    """Its holder alone may load roles, and see the metrics and everybody's usage; also $LRAGENT_ADMIN_KEY. None: every
    key's holder may."""
    tenants: Literal["key", "salt"] = "key"
    """Who shares a cache: requests with the same API key and `cache_salt`, or with the same `cache_salt` alone."""
    max_num_waiting: int = 1024
    """Open requests, beyond which more are told to come again (429)."""
    max_n: int = 16
    """Answers to one prompt in one request."""
    request_timeout_s: float | None = None
    """A request that takes longer is ended with an error; None: it may take as long as it takes."""
    lora_modules: tuple[str, ...] = ()
    """`name=path` of PEFT folders or packs with that role, in place of one pack in `roles`."""
    roles_folder: Path | None = None
    """Roles may be loaded and unloaded while the server runs, from this folder only; None: not at all."""
    max_roles: int | None = None
    """Places for roles; None: eight more than there are at the start where `roles_folder` is given, else none."""
    ledger: Path | None = None
    """SQLite file to which what every request cost is written."""
    prices: Prices = field(default_factory=Prices)
    budgets: tuple[Budget, ...] = ()
    """Limits on what keys, roles and trajectories may cost. They need a ledger."""
    replicas: int | None = None
    """Engines behind this address, each in a process and, where there are GPUs, on a GPU of its own. They need Ray
    (`pip install 'lragent[replicas]'`). None: one engine, in this process."""
    enforce_eager: bool = False
    """On a GPU: capture no CUDA graphs. Starts faster, runs slower: for debugging."""
    check_integrity: bool = False
    """Check the cache and the scheduler before every step, and stop at a fault. Slow: for debugging."""

    def __post_init__(self) -> None:
        check_limits(
            max_model_len=self.max_model_len,
            max_tokens_in_cache=self.max_tokens_in_cache,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            gpu_memory_utilization=self.gpu_memory_utilization,
        )
        if self.roles is not None and self.lora_modules:
            raise UserError("lora_modules: cannot be used together with roles; put all into one pack (`lragent pack`).")
        if self.budgets and self.ledger is None:
            raise UserError("budgets: need a ledger to be counted in; give one with --ledger.")
        if self.replicas is not None and self.device.startswith("cuda:"):
            raise UserError(
                f"device: {self.device} is one GPU, and replicas take all; say cuda, and which by CUDA_VISIBLE_DEVICES."
            )
        at_least = (("max_num_waiting", 1), ("max_n", 1), ("max_roles", 1), ("replicas", 1))
        for name, least in at_least:
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}: must be at least {least}, not {value}.")
        if self.request_timeout_s is not None and not self.request_timeout_s > 0:
            raise UserError(f"request_timeout_s: must be above 0, not {self.request_timeout_s}.")
        if self.max_body_bytes < 1:
            raise UserError(f"max_body_bytes: must be at least 1, not {self.max_body_bytes}.")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port: must be between 0 and 65535, not {self.port}.")
        if self.drain_s < 0:
            raise UserError(f"drain_s: must be 0 or more seconds, not {self.drain_s}.")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype: must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(f"device: must be auto, cpu, cuda or cuda:N, not {self.device!r}.")
        if self.log_level not in LOG_LEVELS:
            raise UserError(f"log_level: must be one of {', '.join(LOG_LEVELS)}, not {self.log_level!r}.")


DTYPES = ("auto", "float32", "bfloat16", "float16")
LOG_LEVELS = ("critical", "error", "warning", "info", "debug")
