"""Confidence intervals of shares."""

from __future__ import annotations


def wilson(right: float, total: float, z: float = 1.96) -> tuple[float, float]:
    """The Wilson interval of a share, 95% by default: sound where the share is near 0 or 1. Raises ValueError.

    right, total: of a mean of several shares, those of one sample that would tell as much.
    """
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"{right} of {total} is no share.")
    share, square = right / total, z * z
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = z / (1 + square / total) * (share * (1 - share) / total + square / (4 * total * total)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)
