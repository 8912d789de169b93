"""An engine service without a model, and a server on loopback around any service."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from tiny import tiny_tokenizer

from lragent.chat_tools import HermesForm, ToolForm
from lragent.errors import UserError
from lragent.modes import PrefixWriter, SharingMode
from lragent.serve.api.app import create_app
from lragent.serve.api.server import Server, address_of, bind
from lragent.serve.api.service import Service
from lragent.serve.api.settings import ServeSettings
from lragent.serve.engine.engine import EngineStats
from lragent.serve.engine.grammar import Grammars
from lragent.serve.engine.types import (
    Chunk,
    EngineDeadError,
    FinishReason,
    GenerationRequest,
    Prompt,
    QueueFullError,
    ReplicaState,
    RoleCard,
    TokenLogprob,
    UnknownRoleError,
    Usage,
)
from lragent.serve.ledger.ledger import Ledger

BOS = 1
FIRST_BYTE = 3


class FakeTokenizer:
    """A token per byte; special tokens are one BOS in front."""

    all_special_ids = (BOS,)

    def __len__(self) -> int:
        return FIRST_BYTE + 256

    added_tokens_decoder: ClassVar = {BOS: "<s>"}

    def get_vocab(self) -> dict[str, int]:
        """As vocabularies of characters spell single bytes."""
        return {"<s>": BOS} | {f"<0x{byte:02X}>": byte + FIRST_BYTE for byte in range(256)}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [BOS] * add_special_tokens + [byte + FIRST_BYTE for byte in text.encode("utf-8")]}

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(t - FIRST_BYTE for t in token_ids if t >= FIRST_BYTE).decode("utf-8", "replace")


class FakePrompts:
    """Renders a chat as `role(name)|content` turns, and checks as much as its tests need."""

    def tool_form(self) -> ToolForm:
        return HermesForm()

    def remember_as(self, prompt: Prompt, text: str, other: str) -> None:
        self.remembered = (text, other)

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], role: str, salt: str, tools: Sequence[Mapping[str, Any]] = ()
    ) -> Prompt:
        text = "".join(f"tool|{tool['function']['name']}\n" for tool in tools)
        for at, message in enumerate(messages):
            if message.get("role") not in ("system", "user", "assistant", "tool"):
                raise UserError(f"messages[{at}].role: is {message.get('role')!r}; use one of user, assistant.")
            content = message["content"]
            if isinstance(content, list):
                content = "".join(part["text"] for part in content)
            text += f"{message['role']}({message.get('name', '')})|{content}\n"
        return Prompt(tuple(FakeTokenizer()(text, False)["input_ids"]), opening=2)


class FakeService:
    """Answers with `<role>:<prompt>`, a character at a time, from a thread of its own.

    A prompt that holds QUEUE, DEAD or BUG raises before the first chunk; BREAK breaks off after three chunks, EXPLODE
    raises there; ENDLESS goes on until it is cancelled or the service is stopped.
    """

    model_name = "org/tiny"
    sharing = SharingMode.BASE_LR_SHARED
    prefix_writer = PrefixWriter.BASE
    device = "cpu"
    max_model_len = 4000

    def __init__(self) -> None:
        self.failure: str | None = None
        self.replicas: list[ReplicaState] = []
        self.roles = [RoleCard("base", None, "/models/tiny", None)] + [
            RoleCard(name, "org/tiny", f"/packs/team#{name}", f"digest-{name}") for name in ("plan", "action")
        ]
        self.tokenizer = FakeTokenizer()
        self.chat = FakePrompts()
        self.requests: list[GenerationRequest] = []
        self.running: set[str] = set()
        self.cancelled: set[str] = set()
        self.ended_early: set[str] = set()
        self.grammars = Grammars(tiny_tokenizer(), 300, frozenset({2}))
        self.stopped = threading.Event()

    @property
    def alive(self) -> bool:
        return self.failure is None and not self.stopped.is_set()

    def stop(self, drain: bool, timeout_s: float) -> None:
        self.stopped.set()

    def check(self, request: GenerationRequest) -> None:
        if request.params.grammar is not None:
            self.grammars.matcher(request.params.grammar)

    def cancel(self, request_id: str) -> None:
        self.ended_early.add(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.running), slots_total=100, slots_used=7)

    def stream(
        self, request: GenerationRequest, watch: Callable[[Chunk], None] | None = None
    ) -> AsyncGenerator[Chunk, None]:
        text = self.tokenizer.decode(request.prompt.ids.tolist())
        self._refuse(request, text)
        self.requests.append(request)
        self.running.add(request.request_id)
        return self._handed_over(request, text, watch)

    async def _handed_over(
        self, request: GenerationRequest, text: str, watch: Callable[[Chunk], None] | None
    ) -> AsyncGenerator[Chunk, None]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Chunk] = asyncio.Queue()
        gone = threading.Event()

        def generate() -> None:
            for chunk in self._chunks(request, text, gone):
                if watch is not None:
                    watch(chunk)
                loop.call_soon_threadsafe(queue.put_nowait, chunk)

        threading.Thread(target=generate, daemon=True).start()
        ended = False
        try:
            while not ended:
                chunk = await queue.get()
                ended = chunk.finish_reason is not None
                if "EXPLODE" in text and chunk.text == "n":
                    raise RuntimeError("a secret of the machine")
                yield chunk
        finally:
            gone.set()
            self.running.discard(request.request_id)
            if not ended:
                self.cancelled.add(request.request_id)

    def _refuse(self, request: GenerationRequest, text: str) -> None:
        if not self.alive or "DEAD" in text:
            raise EngineDeadError(f"The engine has stopped: {self.failure}.")
        if request.role not in [card.name for card in self.roles]:
            raise UnknownRoleError(f"role: {request.role!r} is not loaded.")
        if "QUEUE" in text:
            raise QueueFullError("9 requests wait already; try again in a moment.")
        if "BUG" in text:
            raise RuntimeError("a secret of the machine")
        if not len(request.prompt.ids):
            raise UserError("prompt: must hold at least one token.")

    def _chunks(self, request: GenerationRequest, text: str, gone: threading.Event) -> Iterator[Chunk]:
        limit = request.params.max_tokens
        generated = 0
        for letter in self._letters(request, text):
            if gone.is_set():
                return
            if generated == 3 and "BREAK" in text:
                yield Chunk(finish_reason=FinishReason.ERROR, error="The cache is out of slots.")
                return
            if self.stopped.is_set() or request.request_id in self.ended_early:
                yield Chunk(finish_reason=FinishReason.CANCELLED, error="The server is stopping.")
                return
            generated += 1
            ids = tuple(byte + FIRST_BYTE for byte in letter.encode())
            yield Chunk(letter, ids, self._logprobs(request, ids))
            if generated == limit:
                yield Chunk(finish_reason=FinishReason.LENGTH, usage=self._usage(request, generated))
                return
        yield Chunk(finish_reason=FinishReason.STOP, usage=self._usage(request, generated))

    def _logprobs(self, request: GenerationRequest, ids: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
        """-0.5 for each, then one less for each of the next bytes; the sixth is impossible."""
        count = request.params.logprobs
        if count is None:
            return ()
        least = [-0.5, -1.5, -2.5, -3.5, -4.5, float("-inf")]
        return tuple(
            TokenLogprob(token, -0.5, tuple((token + i, least[i]) for i in range(min(count, 6)))) for token in ids
        )

    def _letters(self, request: GenerationRequest, text: str) -> Iterator[str]:
        yield from f"{request.role}:{text}"
        while "ENDLESS" in text:
            time.sleep(0.01)
            yield "."

    def _usage(self, request: GenerationRequest, generated: int) -> Usage:
        prompt = len(request.prompt.ids.tolist())
        reused = min(prompt - 1, 5)
        return Usage(prompt, generated, prompt - reused + 2, reused, lr_reused=reused - 2, lr_prefilled=2)


@contextmanager
def live_server(service: Service, settings: ServeSettings | None = None, ledger: Ledger | None = None) -> Iterator[str]:
    """Serve `service` on a free loopback port, in a thread; gives the URL."""
    settings = settings or ServeSettings(port=0)
    sock = bind("127.0.0.1", 0)
    sock.listen()
    ready = threading.Event()
    server = Server(create_app(service, settings, ledger), service, settings, lambda _url: ready.set())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    url = address_of(sock)
    thread.start()
    try:
        assert ready.wait(10)
        yield url
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def wait_until(holds: Any, timeout_s: float = 5.0) -> None:
    """Wait for `holds()`, or fail."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it did not come to hold in time"
        time.sleep(0.01)
