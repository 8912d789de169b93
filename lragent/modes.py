"""The four ways in which roles may share a KV cache (sharing modes), and who writes the common prefix."""

from enum import StrEnum


class SharingMode(StrEnum):
    """What is cached per token, and under which namespaces it is found again.

    Fixed for one engine at its start.
    """

    NON_SHARED = "non_shared"
    """Full values, one cache per role: exact, and every role computes the trajectory again."""
    FULL_SHARED = "full_shared"
    """Full values of whoever wrote the token, read by all: the fastest there can be, and the least faithful."""
    BASE_SHARED = "base_shared"
    """Base cache common, LR cache per role: a role new to a context runs over it once, writing its LR only."""
    BASE_LR_SHARED = "base_lr_shared"
    """Base cache and LR cache common: a role switch costs only the new tokens. Needs a shared A."""

    @property
    def decomposed(self) -> bool:
        """Whether values are cached as `V_base` and LR, so that the reader's `B` is applied."""
        return self in (SharingMode.BASE_SHARED, SharingMode.BASE_LR_SHARED)

    @property
    def one_writer_per_token(self) -> bool:
        """Whether a token is processed once, by one role, and read by all: only then may roles differ by position."""
        return self in (SharingMode.FULL_SHARED, SharingMode.BASE_LR_SHARED)


class PrefixWriter(StrEnum):
    """Who processes the positions before the first authored token of a trajectory, in the modes with one writer."""

    BASE = "base"
    """The base model: the prefix does not depend on which role came first."""
    FIRST = "first"
    """The role that speaks first."""
