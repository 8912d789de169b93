"""One step of the model over a flat batch of pieces, reading and writing the cache through slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from transformers import PreTrainedModel

from lragent.modes import SharingMode
from lragent.routing import Route, Router
from lragent.serve.engine.constraint import Allowed
from lragent.serve.engine.graphs import StepGraphs
from lragent.serve.engine.kernel_pass import KernelAttention
from lragent.serve.engine.launched import DeviceTimes, Launched
from lragent.serve.engine.new_states import CachePass
from lragent.serve.engine.sampler import BatchSampler
from lragent.serve.engine.sequence import Piece, Sequence
from lragent.serve.engine.step import Step
from lragent.serve.engine.step_tensors import StepTensors


class StepAttention(Protocol):
    """Makes the attention of one step: `CachedAttention` or `KernelAttention`."""

    def prepare(self, step: Step) -> None:
        """What must be done before `step` runs, in a graph or not."""
        ...

    def of_step(self, step: Step, tensors: StepTensors, route: Route) -> CachePass:
        """The pass of `step`, whose numbers are in `tensors` too."""
        ...


Constrain = Callable[[tuple[Sequence, ...]], Allowed | None]
"""What the next tokens of these sequences may be."""


class Runner:
    """Runs steps of one model in one sharing mode.

    attention: how a step reads and writes the cache. split: the projections whose low-rank part attention applies.
    role_of: role index by writer tag; the engine keeps it up to date. rows: the most sequences that run at once.
    ahead: whether a step is to be launched before the one before it has been read. graphs: steps captured beforehand.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        router: Router,
        attention: StepAttention,
        mode: SharingMode,
        split: frozenset[str],
        role_of: Mapping[int, int],
        sampler: BatchSampler,
        rows: int,
        ahead: bool,
    ) -> None:
        self.sampler = sampler
        self.ahead = ahead
        self.attention = attention
        self.graphs: StepGraphs | None = None
        self._model = model
        self._router = router
        self._mode = mode
        self._split = split
        self._role_of = role_of
        self.device = next(model.parameters()).device
        self._latest = torch.zeros(rows + 1, dtype=torch.long, device=self.device)
        """The token drawn last for each row; behind them, where nobody's is put."""

    def launch(
        self, pieces: list[Piece], before: Launched | None = None, constrain: Constrain | None = None
    ) -> Launched:
        """Give a step to the device, without waiting for it; on a CPU it is done when this returns.

        before: the step that the device still works on. constrain: asked once the device has all but the drawing of
        this step to do; sequences may end meanwhile, and are drawn for all the same.
        """
        if self.device.type != "cuda":
            return self._launch(pieces, constrain)
        with torch.cuda.device(self.device):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            launched = self._launch(pieces, constrain)
            ended.record()
        last = None if before is None or before.times is None else before.times.ended
        return replace(launched, times=DeviceTimes(began, ended, last))

    @torch.inference_mode()
    def _launch(self, pieces: list[Piece], constrain: Constrain | None) -> Launched:
        step = Step.of(pieces, self._mode, self._role_of)
        self.attention.prepare(step)
        logits, tensors = self.graphs.run(step) if self.graphs is not None else (None, None)
        if logits is None or tensors is None:
            tensors = StepTensors.empty(len(step.tokens), len(step.pieces), self.device)
            tensors.fill(step, nobody=len(self._latest) - 1)
            logits = self.forward(step, tensors)
        sequences = tuple(piece.sequence for piece in step.yielding)
        if not sequences:
            return Launched((), logits, None)
        indices = [len(sequence.generated) + sequence.in_flight for sequence in sequences]
        allowed = None if constrain is None else constrain(sequences)
        drawn = self.sampler.draw(logits, step.drawn_rows.tolist(), indices, allowed)
        self._latest.index_copy_(0, tensors.drawn_rows[: len(sequences)].long(), drawn.tokens)
        return Launched(sequences, logits, drawn.to_host())

    def forward(self, step: Step, tensors: StepTensors) -> torch.Tensor:
        """Logits [n, vocab] of one step."""
        first = int(step.roles[0])
        route = Route(tensors.roles, first if (step.roles == first).all() else None, self._split)
        return self._call(tensors, len(step.keep), route, self.attention.of_step(step, tensors, route))

    def forward_any(self, tensors: StepTensors, most_new: int) -> torch.Tensor:
        """Logits [S, vocab] of whatever step the tensors hold when this runs: what graphs capture."""
        assert isinstance(self.attention, KernelAttention), "only the kernels read what a graph is given later"
        route = Route(tensors.roles, None, self._split)
        return self._call(tensors, len(tensors.keep), route, self.attention.of_tensors(tensors, most_new, route))

    def _call(self, tensors: StepTensors, kept: int, route: Route, attention_pass: CachePass) -> torch.Tensor:
        tokens = tensors.tokens.long()
        tokens = torch.where(tokens < 0, self._latest[(-1 - tokens).clamp_min(0)], tokens)
        with self._router.use(route):
            out = self._model(
                input_ids=tokens.unsqueeze(0),
                position_ids=tensors.positions.long().unsqueeze(0),
                attention_pass=attention_pass,
                use_cache=False,
                logits_to_keep=tensors.keep[:kept].long(),
            )
        logits: torch.Tensor = out.logits[0]
        return logits
