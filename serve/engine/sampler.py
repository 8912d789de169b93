"""How the next tokens of a whole batch are chosen, on the device of their logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lragent.serve.engine.choose import Wish, choose
from lragent.serve.engine.constraint import Allowed
from lragent.serve.engine.penalties import Penalties
from lragent.serve.engine.types import SamplingParams, TokenLogprob
from lragent.serve.engine.uniform import stream_of, uniform
from lragent.serve.engine.upload import on_device, rows_at


@dataclass(frozen=True)
class Drawn:
    """One token for each row of logits, on their device; nobody has waited for it yet.

    tokens: [n] int64. logprobs: [n] float32, the token's own; None where none of the batch asks. top_ids, top_logprobs:
    [n, k], the likeliest first, k the most that one of the batch asks for; None where k is 0. Rows that do not ask hold
    NaN and ids that mean nothing. All are log-softmax of the raw logits, before penalties, temperature and filters, as
    OpenAI and vLLM report them.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None

    def to_host(self) -> Drawn:
        """A copy in pinned memory that is complete once the stream has come this far; on a CPU, itself."""
        if not self.tokens.is_cuda:
            return self
        parts = (self.tokens, self.logprobs, self.top_ids, self.top_logprobs)
        return Drawn(*(None if part is None else _pinned(part) for part in parts))  # type: ignore[arg-type] # tokens are

    def read(self, alternatives: Sequence[int | None]) -> list[tuple[int, TokenLogprob | None]]:
        """Each row's token and, where it asks for `alternatives` (`SamplingParams.logprobs`), its log-probabilities.

        Waits for the device unless `self` is a complete copy on the host.
        """
        tokens = self.tokens.tolist()
        if self.logprobs is None:
            return [(token, None) for token in tokens]
        own = self.logprobs.tolist()
        none: list[list[float]] = [[]] * len(tokens)
        ids = none if self.top_ids is None else self.top_ids.tolist()
        values = none if self.top_logprobs is None else self.top_logprobs.tolist()
        read: list[tuple[int, TokenLogprob | None]] = []
        for at, (token, count) in enumerate(zip(tokens, alternatives, strict=True)):
            if count is None:
                read.append((token, None))
            else:
                top = tuple(zip(ids[at][:count], values[at][:count], strict=True))
                read.append((token, TokenLogprob(token, own[at], top)))
        return read


def _pinned(part: torch.Tensor) -> torch.Tensor:
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)


@dataclass(frozen=True)
class _Row:
    params: SamplingParams
    stream: int

    @property
    def special(self) -> bool:
        """Whether it takes more than an argmax."""
        params = self.params
        return params.temperature > 0.0 or params.penalised or bool(params.logit_bias) or params.logprobs is not None


class BatchSampler:
    """Draws one token for each of the sequences that run, without waiting for the device.

    Every running sequence has a row, 0 … rows - 1, until it ends or is preempted. vocab_size: the width of the logits.
    A token depends on its own logits, parameters, seed, index and what its sequence said, never on the rest of the
    batch.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self._rows: list[_Row | None] = [None] * rows
        self._special: set[int] = set()
        self._penalties = Penalties(vocab_size, device)

    def begin(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        prompt_ids: Sequence[int],
        generated_ids: Sequence[int],
    ) -> None:
        """A sequence starts in `row`, or resumes there after preemption, whatever the row held before.

        seed: 64 bits; `params.seed`, or what was drawn for it once and for all. prompt_ids, generated_ids: all tokens
        that the sequence has, used for penalties only. Ids are below vocab_size.
        """
        begun = _Row(params, stream_of(seed))
        self._rows[row] = begun
        (self._special.add if begun.special else self._special.discard)(row)
        with torch.inference_mode():
            self._penalties.begin(row, params, prompt_ids, generated_ids)

    def draw(self, logits: torch.Tensor, rows: list[int], indices: list[int], allowed: Allowed | None = None) -> Drawn:
        """One token for each row of `logits`, [n, vocab], which are left as they are.

        rows: the row of each one's sequence, all different. indices: how many tokens its answer has, those included
        that the host does not know yet. allowed: what the tokens of some rows may be.

        Greedy tokens are the argmax, where the first of equals wins and NaN counts as the highest; so an id is valid
        whatever the logits hold. Random ones are `choose`'s.
        """
        if allowed is None and self._special.isdisjoint(rows):
            return Drawn(logits.argmax(-1))
        return self._draw(logits, rows, indices, allowed)

    @torch.inference_mode()
    def _draw(self, logits: torch.Tensor, rows: list[int], indices: list[int], allowed: Allowed | None) -> Drawn:
        begun = [self._begun(row) for row in rows]
        adjusted = self._penalties.apply(logits, rows)
        if allowed is not None:
            adjusted = allowed.apply(adjusted)
        tokens = adjusted.argmax(-1)
        wishes = {
            at: Wish(each.params, uniform(each.stream, index))
            for at, (each, index) in enumerate(zip(begun, indices, strict=True))
            if each.params.temperature > 0.0
        }
        for is_sorted in (False, True):
            group = [at for at, wish in wishes.items() if wish.sorted is is_sorted]
            if group:
                chosen = choose(rows_at(adjusted, group), [wishes[at] for at in group])
                tokens = _with_rows(tokens, group, chosen)
        self._penalties.record(rows, tokens)
        return _with_logprobs(tokens, logits, [each.params.logprobs for each in begun])

    def _begun(self, row: int) -> _Row:
        begun = self._rows[row]
        assert begun is not None, f"no sequence has begun in row {row}"
        return begun


def _with_rows(tensor: torch.Tensor, at: list[int], rows: torch.Tensor) -> torch.Tensor:
    """`tensor` [n, …] with `rows` at the ascending `at`."""
    if len(at) == tensor.shape[0]:
        return rows
    return tensor.index_copy_(0, on_device(at, tensor.device, torch.long), rows)


def _with_logprobs(tokens: torch.Tensor, logits: torch.Tensor, alternatives: list[int | None]) -> Drawn:
    asking = {at: count for at, count in enumerate(alternatives) if count is not None}
    if not asking:
        return Drawn(tokens)
    at = list(asking)
    log = rows_at(logits, at).float().log_softmax(-1)
    own = log.gather(1, rows_at(tokens, at).unsqueeze(1)).squeeze(1)
    count = len(tokens)
    own = _with_rows(own.new_full((count,), float("nan")), at, own)
    most = min(max(asking.values()), logits.shape[1])
    if most == 0:
        return Drawn(tokens, own)
    values, ids = log.topk(most)
    return Drawn(
        tokens,
        own,
        _with_rows(ids.new_zeros(count, most), at, ids),
        _with_rows(values.new_full((count, most), float("nan")), at, values),
    )
