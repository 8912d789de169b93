"""One line of the ledger: what one request to the engine cost, and whose it was."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Entry:
    """A request that has ended, however it did. Tokens are counted as in the engine's `Usage`."""

    run: str
    """The life of a server: counters of its engine are the sums of this run's entries."""
    ended_at: float
    """Unix time, seconds."""
    request_id: str
    endpoint: str
    key: str
    """Name of the API key; "" where there are none."""
    role: str
    trajectory: str
    """What the client calls the trajectory; "" where it does not say."""
    finish: str
    prompt_tokens: int
    tokens_computed: int
    base_reused: int
    lr_reused: int
    lr_prefilled: int
    generated: int
    tool_tokens: int
    """Of the computed ones, those of tools' output."""
    ttft_ms: float | None
    """From the request's arrival to its first token; None where it had none."""
    total_ms: float
    kv_byte_seconds: float
    cost: int
    """In trillionths of the price table's unit."""


COLUMNS = tuple(field.name for field in fields(Entry))
SUMS = (
    "prompt_tokens", "tokens_computed", "base_reused", "lr_reused", "lr_prefilled", "generated", "tool_tokens",
    "total_ms", "kv_byte_seconds", "cost",
)  # fmt: skip
"""What is added up in reports."""
GROUPS = ("role", "key", "trajectory")
