"""Random numbers that depend on a request's seed and the position in its answer, and on nothing else.

So a seed gives the same answer in any batch, after a preemption, and however far the engine runs ahead: there is no
state to keep or to put back. The numbers are SplitMix64's (Steele, Lea, Flood 2014), whose n-th needs none before it.
"""

from __future__ import annotations

_MASK = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15


def stream_of(seed: int) -> int:
    """Where the numbers of `seed` (any 64 bits, signed or not) begin; mixed, so that near seeds lie far apart."""
    return _mixed((seed + _STEP) & _MASK)


def uniform(stream: int, index: int) -> float:
    """The number at `index` (0, 1, …) of a stream: a multiple of 2**-53 in [0, 1)."""
    return (_mixed((stream + (index + 1) * _STEP) & _MASK) >> 11) * 2.0**-53


def _mixed(bits: int) -> int:
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)
