"""What HTTP costs: the same engine asked in its own process, and over loopback by a client in another.

    python -m lragent.bench overhead --save

Both ways take turns, so that a busy machine disturbs them alike. A prompt is used once: nothing of it is cached.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lragent.bench.machine import facts, save
from lragent.serve.api.app import create_app
from lragent.serve.api.server import Server, address_of, bind
from lragent.serve.api.settings import ServeSettings
from lragent.serve.engine.build import build_service
from lragent.serve.engine.service import EngineService
from lragent.serve.engine.types import GenerationRequest, Prompt, SamplingParams

PROMPT, VOCABULARY = 48, 40_000
"""Tokens of a prompt, and ids that they are drawn from."""


@dataclass(frozen=True)
class Part:
    """So many requests at once for so many tokens each; `seed` makes the prompts."""

    seed: int
    at_once: int
    tokens: int

    def prompts(self) -> list[list[int]]:
        """One for each request."""
        source = random.Random(self.seed)
        return [[source.randrange(100, VOCABULARY) for _ in range(PROMPT)] for _ in range(self.at_once)]


Ask = Callable[[list[int], int], AsyncIterator[int]]
"""A prompt and how many tokens are wanted; yields how many have come, piece by piece."""


async def played(part: Part, ask: Ask) -> dict[str, float]:
    """All requests of `part` side by side: seconds in all, tokens, and the median time to a first token."""
    began = time.perf_counter()

    async def one(prompt: list[int]) -> tuple[float, int]:
        first, count = 0.0, 0
        sent = time.perf_counter()
        async for more in ask(prompt, part.tokens):
            first = first or time.perf_counter() - sent
            count += more
        return first, count

    done = await asyncio.gather(*(one(prompt) for prompt in part.prompts()))
    return {
        "seconds": time.perf_counter() - began,
        "tokens": sum(count for _, count in done),
        "ttft": statistics.median(first for first, _ in done),
    }


def in_process(service: EngineService) -> Ask:
    """Ask the engine's service directly."""
    count = 0

    async def ask(prompt: list[int], tokens: int) -> AsyncIterator[int]:
        nonlocal count
        count += 1
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        async for chunk in service.stream(GenerationRequest(f"local-{count}", "base", Prompt(prompt), params)):
            yield len(chunk.token_ids)

    return ask


def over_http(url: str) -> Ask:
    """Ask a server by a client that costs next to nothing: it looks for the first and the last event alone. One that
    reads every event in Python takes more time than the server."""
    host, port = url.removeprefix("http://").split(":")

    async def ask(prompt: list[int], tokens: int) -> AsyncIterator[int]:
        # With ids every token is told, also one whose text is but a part of a character.
        asked = {
            "model": "base", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }  # fmt: skip
        body = json.dumps(asked).encode()
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
                b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            read = b""
            while b"data: {" not in read:
                read += await _more(reader)
            yield 1
            while b"data: [DONE]" not in read:
                read = read[-16:] + await _more(reader)
            yield tokens - 1
        finally:
            writer.close()

    return ask


async def _more(reader: asyncio.StreamReader) -> bytes:
    data = await reader.read(1 << 16)
    if not data:
        raise ConnectionError("the server has broken off its answer")
    return data


@contextmanager
def serving(service: EngineService) -> Iterator[str]:
    """The server around `service`, in a thread; gives its URL."""
    settings = ServeSettings(port=0, log_level="warning")
    sock = bind("127.0.0.1", 0)
    sock.listen()
    ready = threading.Event()
    server = Server(create_app(service, settings), service, settings, lambda _url: ready.set())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    ready.wait()
    try:
        yield address_of(sock)
    finally:
        server.should_exit = True
        thread.join()


class Client:
    """The other process: plays parts over HTTP."""

    def __init__(self, url: str) -> None:
        words = [sys.executable, "-m", "lragent.bench", "overhead", "--client", url]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def play(self, part: Part) -> dict[str, float]:
        """As `played`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([part.seed, part.at_once, part.tokens]), file=self._process.stdin, flush=True)
        numbers: dict[str, float] = json.loads(self._process.stdout.readline())
        return numbers

    def close(self) -> None:
        """End it."""
        self._process.communicate("", timeout=10)


async def client(url: str) -> None:
    """Plays each part that is read from stdin."""
    loop, ask = asyncio.get_running_loop(), over_http(url)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await played(Part(*json.loads(line)), ask)), flush=True)


def measure(service: EngineService, rounds: int, singles: int, at_once: int, tokens: int) -> dict[str, Any]:
    """All figures."""
    ask = in_process(service)
    ttft: dict[str, list[float]] = {"in process": [], "http": []}
    speed: dict[str, list[float]] = {"in process": [], "http": []}
    with serving(service) as url:
        other = Client(url)
        ways: dict[str, Callable[[Part], dict[str, float]]] = {
            "in process": lambda part: asyncio.run(played(part, ask)),
            "http": other.play,
        }
        for way, play in ways.items():
            play(Part(hash(way) % 1000, at_once, 4))
        seed = 10_000
        for at in range(singles):
            for way in sorted(ways, reverse=bool(at % 2)):
                seed += 1
                ttft[way].append(ways[way](Part(seed, 1, 2))["ttft"])
        for at in range(rounds):
            for way in sorted(ways, reverse=bool(at % 2)):
                seed += 1
                numbers = ways[way](Part(seed, at_once, tokens))
                speed[way].append(numbers["tokens"] / numbers["seconds"])
        other.close()
    medians = {way: statistics.median(values) for way, values in speed.items()}
    first = {way: 1e3 * statistics.median(values) for way, values in ttft.items()}
    pairs = [1e3 * (http - local) for http, local in zip(ttft["http"], ttft["in process"], strict=True)]
    return {
        "tokens_per_s": medians,
        "throughput_lost": 1.0 - medians["http"] / medians["in process"],
        "throughput_lost_by_pair": sorted(
            1.0 - http / local for http, local in zip(speed["http"], speed["in process"], strict=True)
        ),
        "ttft_ms": first,
        "ttft_added_ms": statistics.median(pairs),
        "ttft_added_ms_p90": sorted(pairs)[int(0.9 * len(pairs))],
        "rounds": rounds,
        "singles": singles,
        "at_once": at_once,
        "tokens": tokens,
        "prompt": PROMPT,
    }


def main(argv: Sequence[str]) -> int:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m lragent.bench overhead", description=__doc__)
    parser.add_argument("--model", help="hub id, folder or GGUF file (default: the embedded model)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=10, help="of many requests at once, each way")
    parser.add_argument("--singles", type=int, default=60, help="requests by themselves, each way")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--save", action="store_true", help="keep the numbers in bench/results")
    parser.add_argument("--client", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.client:
        asyncio.run(client(args.client))
        return 0
    service = build_service(model=args.model, device=args.device, max_tokens_in_cache=16_384, max_model_len=2048)
    service.start()
    try:
        numbers = measure(service, args.rounds, args.singles, args.at_once, args.tokens)
    finally:
        service.stop(drain=False)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    numbers = {**facts(device), **numbers}
    print(json.dumps(numbers, indent=1))
    if args.save:
        print(f"saved as {save('overhead', numbers)}")
    return 0
