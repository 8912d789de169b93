"""How alike the caches are that roles leave for the same tokens: cosines per layer, streamed over trajectories.

What is compared is one token's whole vector, all KV heads side by side, and the mean is over tokens. Keys are taken as
cached, after rotary embedding: at one position it turns both vectors by the same angles, so the cosine is that of the
keys before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lragent.eval.analysis.forced import SHARED, LayerCaches

KEY, V_BASE, FULL_V, ADAPTER, LR = "key", "V_base", "full V", "adapter output", "LR cache"
KEY_ADAPTER, KEY_LR = "key adapter output", "key LR cache"
"""What is compared; the last two where `k_proj` is adapted, and `key` is then the base key."""


class Similarity:
    """Running means for one pack; `add` is what `Forced.caches` calls."""

    def __init__(self, names: Sequence[str]) -> None:
        """names: of the roles, `base` first, as in `Forced.names`."""
        self._names = (*names, SHARED)
        self._sums: dict[tuple[int, str], Tensor] = {}
        self._tokens: dict[int, int] = {}

    def add(self, layer: int, caches: LayerCaches) -> None:
        """Take one trajectory's caches at one layer."""
        self._tokens[layer] = self._tokens.get(layer, 0) + caches.key.shape[1]
        for what, sums in _cosines(caches, len(self._names)):
            before = self._sums.get((layer, what))
            self._sums[layer, what] = sums if before is None else before + sums

    def records(self, label: str) -> list[dict[str, Any]]:
        """One record for each layer, pair and thing compared, ready for JSON.

        A pair is two roles (`base` among them), each alone over the whole context; or a role and `shared`: what it
        leaves alone, and what the one pass that all roles share holds for it to read (in `base_lr_shared`).
        """
        found = []
        for (layer, what), sums in sorted(self._sums.items()):
            for first, row in enumerate(sums.tolist()):
                for second in range(first + 1, len(row)):
                    if row[second] == row[second]:  # not NaN: this pair has such a thing
                        found.append(
                            {
                                "kind": "similarity",
                                "label": label,
                                "layer": layer,
                                "what": what,
                                "pair": [self._names[first], self._names[second]],
                                "cosine": row[second] / self._tokens[layer],
                                "tokens": self._tokens[layer],
                            }
                        )
        return found


def _cosines(caches: LayerCaches, streams: int) -> Iterator[tuple[str, Tensor]]:
    """Each thing compared, and the sums over tokens of its cosines between streams: [S, S] float64 on the CPU, NaN
    where a pair has no such thing."""
    yield KEY, _pairwise(caches.key)
    yield V_BASE, _pairwise(caches.value)
    if caches.low_k is not None and caches.up_k is not None:
        yield KEY_LR, _pairwise(caches.low_k)
        yield KEY_ADAPTER, _as_read(_adapter(caches.low_k, caches.up_k), caches.low_k[-1], caches.up_k)
    if caches.low_v is None or caches.up_v is None:
        yield FULL_V, _pairwise(caches.value)
        return
    yield LR, _pairwise(caches.low_v)
    outputs = _adapter(caches.low_v, caches.up_v)
    yield ADAPTER, _as_read(outputs, caches.low_v[-1], caches.up_v)
    full = caches.value[:-1] + torch.cat([torch.zeros_like(outputs[:1]), outputs])
    whole = torch.full((streams, streams), float("nan"), dtype=torch.float64)
    whole[:-1, :-1] = _pairwise(full)
    whole[1:-1, -1] = _paired(full[1:], caches.value[-1] + caches.low_v[-1] @ caches.up_v)
    yield FULL_V, whole


def _adapter(low: Tensor, up: Tensor) -> Tensor:
    """low: [S, L, r] of base, N roles and the shared pass; up: [N, r, d]. Returns [N, L, d]: each role's own output."""
    return low[1:-1] @ up


def _as_read(outputs: Tensor, shared_low: Tensor, up: Tensor) -> Tensor:
    """Cosines of roles' adapter outputs [N, L, d] among themselves, and with what each makes of the shared LR cache."""
    roles = len(outputs)
    whole = torch.full((roles + 2, roles + 2), float("nan"), dtype=torch.float64)
    whole[1:-1, 1:-1] = _pairwise(outputs)
    whole[1:-1, -1] = _paired(outputs, shared_low @ up)
    return whole


def _pairwise(states: Tensor) -> Tensor:
    """states: [S, L, d]. Returns [S, S]."""
    unit = F.normalize(states.float(), dim=-1).flatten(1)
    return (unit @ unit.T).double().cpu()


def _paired(first: Tensor, second: Tensor) -> Tensor:
    """Both [N, L, d]. Returns [N]."""
    return F.cosine_similarity(first.float(), second.float(), dim=-1).sum(-1).double().cpu()
