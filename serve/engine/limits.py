"""Ranges of what an engine is asked for, checked before anything is loaded."""

from __future__ import annotations

from lragent.errors import UserError


def check_limits(
    *,
    max_model_len: int | None,
    max_tokens_in_cache: int | None,
    max_num_seqs: int | None,
    max_num_batched_tokens: int | None,
    gpu_memory_utilization: float,
) -> None:
    """Raises UserError naming the setting that is out of range. None leaves a choice to the engine."""
    at_least = (
        ("max_model_len", max_model_len, 2),
        ("max_tokens_in_cache", max_tokens_in_cache, 2),
        ("max_num_seqs", max_num_seqs, 1),
        ("max_num_batched_tokens", max_num_batched_tokens, 1),
    )
    for name, value, least in at_least:
        if value is not None and value < least:
            raise UserError(f"{name}: must be at least {least}, not {value}.")
    if max_num_seqs is not None and max_num_batched_tokens is not None and max_num_batched_tokens < max_num_seqs:
        raise UserError(
            f"max_num_batched_tokens: must be at least max_num_seqs, which is {max_num_seqs}, not "
            f"{max_num_batched_tokens}: each request that runs takes a token of every step."
        )
    if not 0 < gpu_memory_utilization <= 1:
        raise UserError(f"gpu_memory_utilization: must be above 0 and at most 1, not {gpu_memory_utilization}.")
