"""What makes tokens less or more likely because of what was said, or because the request says so."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lragent.serve.engine.types import SamplingParams
from lragent.serve.engine.upload import on_device


class Penalties:
    """Penalties and biases of the sequences that ask for them.

    Which tokens a sequence has seen is kept on the device, five bytes per token of the vocabulary: a step may be
    launched before the host knows what the one before it drew. Memory is taken for as many sequences as ever asked for
    penalties at the same time.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        """[places, vocab]: whether the prompt has the token."""
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        """[places, vocab]: how often it was generated."""
        self._places: dict[int, tuple[int, SamplingParams]] = {}
        """By row: its place in the tables."""
        self._free: list[int] = []
        self._biases: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """By row: token ids and what is added to their logits."""

    def begin(self, row: int, params: SamplingParams, prompt_ids: Sequence[int], generated_ids: Sequence[int]) -> None:
        """A sequence starts in `row`, or resumes there with what it had generated; what was in the row is forgotten."""
        self._biases.pop(row, None)
        if row in self._places:
            self._free.append(self._places.pop(row)[0])
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            self._biases[row] = (
                on_device(ids, self._device, torch.long),
                on_device(values, self._device, torch.float32),
            )
        if params.penalised:
            place = self._free.pop() if self._free else self._grow()
            self._places[row] = (place, params)
            self._prompt[place].zero_().index_fill_(0, on_device(prompt_ids, self._device, torch.long), True)
            said = on_device(generated_ids, self._device, torch.long)
            self._counts[place].zero_().index_add_(0, said, torch.ones_like(said, dtype=torch.int32))

    def _grow(self) -> int:
        """Twice as many places; returns one of the new ones."""
        before = self._counts.shape[0]
        more = max(before, 1)
        self._prompt = torch.cat([self._prompt, self._prompt.new_zeros(more, self._prompt.shape[1])])
        self._counts = torch.cat([self._counts, self._counts.new_zeros(more, self._counts.shape[1])])
        self._free.extend(range(before + 1, before + more))
        return before

    def apply(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """The logits [n, vocab] of sequences in `rows` with their biases, then their penalties; float32.

        `logits` stay as they are, and are returned where nobody asks for anything. Repetition as in transformers (CTRL,
        Keskar et al. 2019) over prompt and answer, frequency and presence as OpenAI defines them over the answer.
        """
        biased = [(at, self._biases[row]) for at, row in enumerate(rows) if row in self._biases]
        penalised = self._penalised(rows)
        if not biased and not penalised:
            return logits
        logits = logits.to(torch.float32, copy=True)
        for at, (ids, values) in biased:
            logits[at].index_add_(0, ids, values)
        if penalised:
            columns: list[list[float]] = [
                [at for at, _, _ in penalised],
                [place for _, place, _ in penalised],
                [params.repetition_penalty for _, _, params in penalised],
                [params.frequency_penalty for _, _, params in penalised],
                [params.presence_penalty for _, _, params in penalised],
            ]
            numbers = on_device(columns, self._device)
            at, places = numbers[:2].long()
            repetition, frequency, presence = numbers[2:].float().unsqueeze(-1)
            counts = self._counts.index_select(0, places)
            said = counts > 0
            part = logits.index_select(0, at)
            repeated = torch.where(part > 0.0, part / repetition, part * repetition)
            part = torch.where(said | self._prompt.index_select(0, places), repeated, part)
            part = part - frequency * counts - presence * said
            logits.index_copy_(0, at, part)
        return logits

    def record(self, rows: Sequence[int], tokens: torch.Tensor) -> None:
        """The sequences in `rows` were given `tokens`, [n] int64 on the device."""
        penalised = self._penalised(rows)
        if penalised:
            numbers = [[at for at, _, _ in penalised], [place for _, place, _ in penalised]]
            at, places = on_device(numbers, self._device, torch.long)
            entries = places * self._counts.shape[1] + tokens.index_select(0, at)
            self._counts.view(-1).index_add_(0, entries, torch.ones_like(entries, dtype=torch.int32))

    def _penalised(self, rows: Sequence[int]) -> list[tuple[int, int, SamplingParams]]:
        """Of those of `rows` that ask for it: index in `rows`, place in the tables, parameters."""
        if not self._places:
            return []
        return [(at, *self._places[row]) for at, row in enumerate(rows) if row in self._places]
