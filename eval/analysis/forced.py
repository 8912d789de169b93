"""Teacher-forced passes over trajectories in every sharing mode, all tokens at once.

The engine writes and reads caches token by token; here the same numbers come from whole sequences without a cache, so
that thousands of positions are compared in seconds. What a cache would hold is what attention reads: in `base_shared`
a role's sequence reads the base keys and values of the sequence of whoever wrote the position, and its own LR.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lragent.adapter_set import AdapterSet
from lragent.attention import ATTENTION, LayerStates, PackedPass, register_attention, split_projection
from lragent.errors import UserError
from lragent.eval.analysis.streams import Streams, packed, target_positions
from lragent.key_norm import unsupported_key_norm
from lragent.models import check_fits
from lragent.modes import SharingMode
from lragent.role_linear import install_roles
from lragent.rope import rope_at
from lragent.routing import Route, Router
from lragent.train.data import Example

TOKENS_PER_PASS = 4_096
"""Places of a pass. With a third of them predicting, over 49k tokens, its log-probabilities take 270 MB in float32."""

SHARED = "shared"
"""The name, among those of the roles, of the one pass whose tokens all roles wrote by turns (`base_lr_shared`)."""


@dataclass(frozen=True)
class LayerCaches:
    """What S passes over the same L positions leave at one layer. Whole tokens: all KV heads side by side."""

    key: Tensor
    """[S, L, Hkv * D]: base keys, rotated; raw where the model normalises them and `k_proj` is adapted."""
    value: Tensor
    """[S, L, Hkv * D]: `V_base`."""
    low_k: Tensor | None
    """[S, L, r]: the LR cache of keys; None where the layer's `k_proj` is not adapted."""
    low_v: Tensor | None
    """[S, L, r]: that of values, likewise."""
    up_k: Tensor | None
    """[n_roles, r, Hkv * D]: every role's `B`, transposed and scaled."""
    up_v: Tensor | None


class Forced:
    """A base model with roles, run over given trajectories. Takes the model over: its projections are replaced."""

    def __init__(self, model: Any, adapters: AdapterSet, *, tokens_per_pass: int = TOKENS_PER_PASS) -> None:
        """model: transformers' own, without adapters, on any device. Raises UserError where the adapters do not fit."""
        check_fits(model, adapters)
        self._unsupported = unsupported_key_norm(model) if "k_proj" in adapters.targets else None
        register_attention()
        model.set_attn_implementation(ATTENTION)
        self._model, self._router = model.eval(), Router()
        install_roles(model, adapters, self._router)
        self._split = frozenset({"k_proj", "v_proj"} & set(adapters.targets))
        self._tokens = tokens_per_pass
        self.names = ("base", *adapters.role_names)
        """Of the roles, by their numbers in an `Example`."""

    def logprobs(self, examples: Iterable[Example], mode: SharingMode | str) -> Iterator[Tensor]:
        """For each trajectory, in order: log-probabilities [n, vocabulary] of its n targets, float32, on the device.

        Every target is predicted by the role of the position before it, from a context that the sharing mode says, as
        the engine would. The engine knows `prefix_writer: base` in the modes with one writer per token only: for
        `base_shared` give examples rendered with `first`. Raises UserError where the model's keys are normalised in a
        way that a decomposed cache of keys does not know.
        """
        mode = SharingMode(mode)
        for together in packed(examples, mode, self._tokens):
            logits = self._logits(Streams.joined(together), self._decomposed() if mode.decomposed else frozenset())
            yield from logits.split([len(streams.kept) for streams in together])

    def caches(self, example: Example, see: Callable[[int, LayerCaches], None]) -> None:
        """Call `see` with each layer's number and caches: of base and every role, each alone over the whole trajectory
        up to its last target, in the order of `names`; and last of the pass that all roles share (`SHARED`).

        Raises UserError as `logprobs` does.
        """
        roles = example.roles[: int(target_positions(example)[-1]) + 1]
        rows = [torch.full_like(roles, role) for role in range(len(self.names))]
        streams = Streams.of_rows(example, [*rows, roles], torch.zeros(0, dtype=torch.long))
        self._run(streams, self._decomposed(), see)

    def _decomposed(self) -> frozenset[str]:
        """The projections whose low-rank part is cached apart."""
        if self._unsupported is not None:
            raise UserError(
                f"k_proj is adapted, and {self._unsupported} is no norm of keys that can be applied for each reader; "
                "compare non_shared and full_shared only, or adapters without k_proj."
            )
        return self._split

    def _logits(self, streams: Streams, split: frozenset[str]) -> Tensor:
        return torch.log_softmax(self._run(streams, split, None).float(), dim=-1)

    @torch.no_grad()
    def _run(self, streams: Streams, split: frozenset[str], see: Callable[[int, LayerCaches], None] | None) -> Tensor:
        """Logits [n, vocabulary] of the places to be kept."""
        model = self._model
        device = model.device
        position_ids = streams.position_ids.to(device)
        route = Route(streams.roles.to(device), None, split)
        attention_pass = _StreamsPass(
            streams.spans,
            route,
            rope_at(model, position_ids, model.dtype) if "k_proj" in split else None,
            written=None if streams.written is None else streams.written.to(device),
            see=see,
        )
        with self._router.use(route):
            logits: Tensor = model(
                input_ids=streams.token_ids.to(device).unsqueeze(0),
                position_ids=position_ids.unsqueeze(0),
                attention_pass=attention_pass,
                use_cache=False,
                logits_to_keep=streams.kept.to(device),
            ).logits[0]
        return logits


@dataclass(frozen=True, kw_only=True)
class _StreamsPass(PackedPass):
    """A pass whose streams may read the base cache of one another, and whose caches may be looked at."""

    written: Tensor | None
    see: Callable[[int, LayerCaches], None] | None

    def read(self, layer: nn.Module, states: LayerStates) -> LayerStates:
        """Base keys and values from whoever wrote them, LR from the stream itself."""
        if self.see is not None:
            self.see(int(getattr(layer, "layer_idx")), self._caches(layer, states))  # noqa: B009  # nn.Module's are tensors
        if self.written is None:
            return states
        key, value = states.key[:, self.written], states.value[:, self.written]
        return LayerStates(key, value, states.low_k, states.low_v)

    def _caches(self, layer: nn.Module, states: LayerStates) -> LayerCaches:
        def apart(tokens: Tensor) -> Tensor:
            return tokens.view(len(self.spans), -1, tokens.shape[-1])

        def ups(kind: str) -> Tensor | None:
            projection = split_projection(layer, kind, self.route)
            return projection.reader_up() if projection else None

        return LayerCaches(
            key=apart(states.key.transpose(0, 1).flatten(1)),
            value=apart(states.value.transpose(0, 1).flatten(1)),
            low_k=None if states.low_k is None else apart(states.low_k),
            low_v=None if states.low_v is None else apart(states.low_v),
            up_k=ups("k_proj"),
            up_v=ups("v_proj"),
        )


def turns_of(example: Example) -> Tensor:
    """[n] long: in which learnt turn each target is, counted from 0."""
    authors = example.loss_roles
    begins = (authors > 0) & (authors != torch.cat([authors.new_zeros(1), authors[:-1]]))
    return begins.cumsum(0)[authors > 0] - 1


def score(forced: Forced, examples: Iterable[Example], mode: SharingMode | str) -> dict[str, dict[str, float]]:
    """How well the roles predict trajectories in a sharing mode: by role, and `all` together.

    loss: mean per authored token, in nats. tokens: how many. right: turns of which every token was the likeliest given
    those before it, which is what greedy decoding would say. turns: how many. Roles that author nothing are left out.
    """
    examples = list(examples)
    lost: defaultdict[str, float] = defaultdict(float)
    counts = {what: Counter[str]() for what in ("tokens", "right", "turns")}
    for example, logprobs in zip(examples, forced.logprobs(examples, mode), strict=True):
        at = target_positions(example)
        targets = example.targets[at].to(logprobs.device)
        losses = -logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        wrong = (logprobs.argmax(-1) != targets).cpu()
        authors, turns = example.loss_roles[at], turns_of(example)
        for role in authors.unique().tolist():
            own = authors == role
            of_role = {
                "tokens": int(own.sum()),
                "right": len(set(turns[own].tolist()) - set(turns[own & wrong].tolist())),
                "turns": len(turns[own].unique()),
            }
            for name in (forced.names[role], "all"):
                lost[name] += float(losses.cpu()[own].double().sum())
                for what, number in of_role.items():
                    counts[what][name] += number
    return {
        name: {"loss": lost[name] / tokens} | {what: counts[what][name] for what in counts}
        for name, tokens in counts["tokens"].items()
    }
