"""An engine in this process, without HTTP: `Engine(model, roles=pack).generate(role, prompt)`."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from lragent.chat import BASE
from lragent.errors import UserError
from lragent.modes import PrefixWriter, SharingMode
from lragent.serve.engine.build import build_service
from lragent.serve.engine.engine import EngineStats
from lragent.serve.engine.memory import GPU_SHARE
from lragent.serve.engine.service import EngineService, joined
from lragent.serve.engine.types import Chunk, GenerationRequest, Prompt, SamplingParams

MOST_OPEN = 512
"""Requests of `generate_many` that are given to the engine at once; it refuses too many."""

Asked = str | Sequence[Mapping[str, Any]] | Sequence[int] | npt.NDArray[np.integer[Any]]
"""What a role is asked to continue: text, the messages of a chat (see the README), or token ids."""


class Engine:
    """One model and its roles, served to this process by a thread of its own.

    model: hub id, folder or GGUF file; None is the embedded model. roles: path of a pack; None serves the model alone.
    sharing, prefix_writer, max_model_len and the rest are what `lragent serve --help` says. All methods may be called
    from any thread. Raises UserError naming the option at fault.

        with Engine("meta-llama/Llama-3.1-8B-Instruct", roles="pack.safetensors") as engine:
            print(engine.generate("plan", "Where was the founder of Zenvor born?").text)
    """

    def __init__(
        self,
        model: str | None = None,
        roles: str | Path | None = None,
        *,
        sharing: SharingMode | str = SharingMode.BASE_LR_SHARED,
        prefix_writer: PrefixWriter | str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        max_tokens_in_cache: int | None = None,
        gpu_memory_utilization: float = GPU_SHARE,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        seed: int = 0,
        enforce_eager: bool = False,
    ) -> None:
        self._service: EngineService = build_service(
            model=model,
            roles=None if roles is None else str(roles),
            sharing=_member(SharingMode, "sharing", sharing),
            prefix_writer=None if prefix_writer is None else _member(PrefixWriter, "prefix_writer", prefix_writer),
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            max_tokens_in_cache=max_tokens_in_cache,
            gpu_memory_utilization=gpu_memory_utilization,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            seed=seed,
            enforce_eager=enforce_eager,
        )
        self._count = itertools.count(1)
        self._tokenizing = threading.Lock()
        self._service.start()
        # One that nobody holds any more ends its thread, and lets go of its memory.
        self._end = weakref.finalize(self, self._service.stop, drain=False)

    @property
    def roles(self) -> tuple[str, ...]:
        """What may be asked: `base`, and the roles."""
        return (BASE, *(card.name for card in self._service.roles[1:]))

    def generate(
        self,
        role: str,
        prompt: Asked,
        *,
        salt: str = "",
        watch: Callable[[Chunk], None] | None = None,
        **sampling: Any,
    ) -> Chunk:
        """The whole answer. sampling: fields of SamplingParams, such as `max_tokens=64, temperature=0.0`. watch: is
        told each piece, by the engine's thread, which it must not keep waiting.

        Raises UserError for what cannot be served, QueueFullError, EngineDeadError.
        """
        return self._service.generate(self._request(role, prompt, salt, sampling), watch)

    def generate_many(self, asked: Iterable[tuple[str, Asked]], *, salt: str = "", **sampling: Any) -> list[Chunk]:
        """The answers to many (role, prompt), in order, worked on side by side. Raises as `generate`.

        What cannot be served is refused before anything begins; leaving early cancels the rest.
        """
        requests = [self._request(role, prompt, salt, sampling) for role, prompt in asked]
        for request in requests:
            self._service.check(request)
        inbox: SimpleQueue[tuple[int, Chunk]] = SimpleQueue()
        parts: list[list[Chunk]] = [[] for _ in requests]
        begun = ended = 0
        try:
            while ended < len(requests):
                while begun < len(requests) and begun - ended < MOST_OPEN:
                    self._service.submit(requests[begun], partial(_put, inbox, begun))
                    begun += 1
                at, chunk = inbox.get()
                parts[at].append(chunk)
                ended += chunk.finish_reason is not None
        finally:
            for request in requests[:begun]:
                self._service.cancel(request.request_id)
        return [joined(chunks) for chunks in parts]

    def stream(self, role: str, prompt: Asked, *, salt: str = "", **sampling: Any) -> Stream:
        """The answer piece by piece; the last piece has `finish_reason` and `usage`.

        Raises as `generate`, before the first piece.
        """
        return Stream(self._service, self._request(role, prompt, salt, sampling))

    async def agenerate(self, role: str, prompt: Asked, *, salt: str = "", **sampling: Any) -> Chunk:
        """`generate` for an event loop. Cancelling the task cancels the request."""
        return joined([chunk async for chunk in self.astream(role, prompt, salt=salt, **sampling)])

    async def astream(
        self, role: str, prompt: Asked, *, salt: str = "", **sampling: Any
    ) -> AsyncGenerator[Chunk, None]:
        """`stream` for an event loop."""
        async for chunk in self._service.stream(self._request(role, prompt, salt, sampling)):
            yield chunk

    def stats(self) -> EngineStats:
        """Counters of requests, tokens and the cache."""
        return self._service.stats()

    def close(self) -> None:
        """Let open requests end, then stop. May be called again."""
        self._service.stop()
        self._end()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, role: str, prompt: Asked, salt: str, sampling: dict[str, Any]) -> GenerationRequest:
        unknown = sorted(set(sampling) - set(SamplingParams.__dataclass_fields__))
        if unknown:
            known = ", ".join(SamplingParams.__dataclass_fields__)
            raise UserError(f"{unknown[0]}: is no sampling parameter; there are {known}.")
        return GenerationRequest(
            f"local-{next(self._count)}", role, self._prompt(role, prompt, salt), SamplingParams(**sampling), salt
        )

    def _prompt(self, role: str, prompt: Asked, salt: str) -> Prompt:
        if isinstance(prompt, str):
            with self._tokenizing:
                return Prompt(self._service.tokenizer(prompt)["input_ids"])
        if isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping):
            with self._tokenizing:
                return self._service.chat.prepare(prompt, role, salt)  # type: ignore[arg-type]  # the first says what all are
        return Prompt(prompt)  # type: ignore[arg-type]  # as above


class Stream:
    """An answer that is on its way, piece by piece. Closing it, or dropping it, cancels what is left."""

    def __init__(self, service: EngineService, request: GenerationRequest) -> None:
        self._chunks: SimpleQueue[Chunk] = SimpleQueue()
        self._ended = False
        service.submit(request, self._chunks.put)
        self._cancel = weakref.finalize(self, service.cancel, request.request_id)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        """The next piece. Raises StopIteration after the last, and EngineDeadError."""
        if self._ended:
            raise StopIteration
        chunk = self._chunks.get()
        if chunk.finish_reason is not None:
            self._ended = True
            joined([chunk])  # raises where the engine has failed
        return chunk

    def close(self) -> None:
        """End the request, if it has not ended."""
        self._ended = True
        self._cancel()


def _put(inbox: SimpleQueue[tuple[int, Chunk]], at: int, chunk: Chunk) -> None:
    inbox.put((at, chunk))


def _member(kind: Any, name: str, value: Any) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{name}: must be one of {', '.join(kind)}, not {value!r}.") from None
