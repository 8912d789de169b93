"""What a forward pass over a trajectory must give, computed slowly from the definitions.

One token at a time, in float32, with a record of what was cached for every token at every layer. Nothing of `kernels/`,
PEFT or transformers' forward is used, so an error there cannot hide here. Models: Llama and its likes (Mistral, Qwen2,
Qwen3), with plain rotary embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lragent.adapter_set import AdapterSet

Mode = Literal["non_shared", "full_shared", "base_shared", "base_lr_shared"]


@dataclass
class Cached:
    """What one token left at one layer. Keys are kept as projected; the reader normalises and rotates them."""

    key: Tensor  # [Hkv * D]: K_base, or the writer's full K in the modes that share or keep full values
    value: Tensor  # [Hkv * D]
    low_k: Tensor | None  # [r]
    low_v: Tensor | None  # [r]


def reference_logits(
    model: nn.Module,
    adapters: AdapterSet,
    token_ids: Sequence[int],
    roles: Sequence[int],
    mode: Mode,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Logits [T, vocab] of one trajectory; those at position t are what role `roles[t]` predicts there.

    model: a transformers model without adapters. roles: who processes each position, 0 = base, i + 1 = role i.
    In `base_shared` that role writes the base entry of the position, and every role writes an LR entry of its own.
    """
    reference = _Reference(model, adapters, dtype)
    if mode == "non_shared":
        # Each role alone over the whole context.
        alone = {role: reference.run(token_ids, [role] * len(roles), "full_shared") for role in set(roles)}
        return torch.stack([alone[role][t] for t, role in enumerate(roles)])
    return reference.run(token_ids, roles, mode)


class _Reference:
    def __init__(self, model: nn.Module, adapters: AdapterSet, dtype: torch.dtype) -> None:
        self.config = model.config
        self.weights = {name: weight.detach().to(dtype) for name, weight in model.state_dict().items()}
        self.down = {path: a.to(dtype) for path, a in adapters.shared_a.items()}
        self.up = {
            path: [role.scaling(path) * adapters.role_b[path][i].to(dtype) for i, role in enumerate(adapters.roles)]
            for path in adapters.shared_a
        }  # [d_out, r] per role
        self.roles = range(len(adapters.roles) + 1)
        self.head_dim = getattr(self.config, "head_dim", None) or (
            self.config.hidden_size // self.config.num_attention_heads
        )

    @torch.no_grad()
    def run(self, token_ids: Sequence[int], roles: Sequence[int], mode: Mode) -> Tensor:
        """All tokens in order; in `base_shared` every role passes over every token, the writer first."""
        layers = self.config.num_hidden_layers
        cache: list[list[Cached]] = [[] for _ in range(layers)]
        low_of: dict[int, list[list[Cached]]] = {role: [[] for _ in range(layers)] for role in self.roles}
        logits = []
        for token, role in zip(token_ids, roles, strict=True):
            if mode == "base_shared":
                logits.append(self._token(token, role, cache, low_of[role], mode, writes=True))
                for other in self.roles:
                    if other != role:
                        self._token(token, other, cache, low_of[other], mode, writes=False)  # LR prefill
            else:
                logits.append(self._token(token, role, cache, cache, mode, writes=True))
        return torch.stack(logits)

    def _token(
        self,
        token: int,
        role: int,
        base: list[list[Cached]],
        low: list[list[Cached]],
        mode: Mode,
        writes: bool,
    ) -> Tensor:
        """Role `role` processes one token; it adds to `base` if it `writes`, and always to `low`. Returns [vocab]."""
        hidden = self.weights["model.embed_tokens.weight"][token]
        for i in range(self.config.num_hidden_layers):
            path = f"model.layers.{i}"
            normed = self._norm(hidden, f"{path}.input_layernorm")
            attention = f"{path}.self_attn"
            entry = self._write(normed, attention, role, mode)
            if low[i] is not base[i]:
                low[i].append(entry)
            if writes:
                base[i].append(entry)
            query = self._linear(normed, f"{attention}.q_proj", role)
            attended = self._attend(query, attention, role, base[i], low[i], mode)
            hidden = hidden + self._linear(attended, f"{attention}.o_proj", role)
            normed = self._norm(hidden, f"{path}.post_attention_layernorm")
            gate = F.silu(self._linear(normed, f"{path}.mlp.gate_proj", role))
            up = self._linear(normed, f"{path}.mlp.up_proj", role)
            hidden = hidden + self._linear(gate * up, f"{path}.mlp.down_proj", role)
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return head @ self._norm(hidden, "model.norm")

    def _write(self, normed: Tensor, attention: str, role: int, mode: Mode) -> Cached:
        key_path, value_path = f"{attention}.k_proj", f"{attention}.v_proj"
        if mode == "full_shared":
            return Cached(self._linear(normed, key_path, role), self._linear(normed, value_path, role), None, None)
        return Cached(
            self._linear(normed, key_path, 0),
            self._linear(normed, value_path, 0),
            self.down[key_path] @ normed if key_path in self.down else None,
            self.down[value_path] @ normed if value_path in self.down else None,
        )

    def _attend(
        self, query: Tensor, attention: str, role: int, base: list[Cached], low: list[Cached], mode: Mode
    ) -> Tensor:
        """One query against all tokens so far, each read through this role's `B`. query: [Hq * D]; returns the same."""
        keys, values = [], []
        for position, (entry, own) in enumerate(zip(base, low, strict=True)):
            key, value = entry.key, entry.value
            if role > 0 and own.low_k is not None:
                key = key + self.up[f"{attention}.k_proj"][role - 1] @ own.low_k
            if role > 0 and own.low_v is not None:
                value = value + self.up[f"{attention}.v_proj"][role - 1] @ own.low_v
            keys.append(self._heads(key, f"{attention}.k_norm", position))
            values.append(value.view(-1, self.head_dim))
        all_keys, all_values = torch.stack(keys), torch.stack(values)  # [t + 1, Hkv, D]
        queries = self._heads(query, f"{attention}.q_norm", len(base) - 1)  # [Hq, D]
        group = queries.shape[0] // all_keys.shape[1]
        window = getattr(self.config, "sliding_window", None)
        start = max(0, len(base) - window) if window else 0
        heads = []
        for head, one in enumerate(queries):
            scores = all_keys[start:, head // group] @ one / self.head_dim**0.5
            heads.append(torch.softmax(scores, dim=0) @ all_values[start:, head // group])
        return torch.cat(heads)

    def _heads(self, flat: Tensor, norm: str, position: int) -> Tensor:
        """flat: [H * D]. Returns [H, D]: each head normalised, where the model has such a norm, and rotated."""
        heads = list(flat.view(-1, self.head_dim))
        if f"{norm}.weight" in self.weights:
            heads = [self._norm(head, norm) for head in heads]
        return self._rotate(torch.stack(heads), position)

    def _linear(self, hidden: Tensor, path: str, role: int) -> Tensor:
        out = self.weights[f"{path}.weight"] @ hidden
        if f"{path}.bias" in self.weights:
            out = out + self.weights[f"{path}.bias"]
        if role > 0 and path in self.down:
            out = out + self.up[path][role - 1] @ (self.down[path] @ hidden)
        return out

    def _norm(self, hidden: Tensor, path: str) -> Tensor:
        scale = torch.rsqrt(hidden.pow(2).mean() + self.config.rms_norm_eps)
        return self.weights[f"{path}.weight"] * (hidden * scale)

    def _rotate(self, heads: Tensor, position: int) -> Tensor:
        """heads: [H, D]. Pairs (d, d + D/2) turn by position * theta^(-2d/D)."""
        theta = self.config.rope_parameters["rope_theta"]
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        angles = (position * theta**-steps).to(heads.dtype)
        first, second = heads.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
