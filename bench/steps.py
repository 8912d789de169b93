"""`python -m lragent.bench steps`: a trajectory of many short steps over three roles, step by step.

Our engine (in this process, without HTTP) in the sharing modes, and transformers + PEFT in its two ways, take turns in
one run, so that whatever else the machine does falls on all alike; medians over the repeats are reported. Every system
is given contexts that no cache has seen, of the same lengths. The engine generates each answer; the baselines replay
the engine's steps and generate one token each, since only their time to the first token is compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lragent.adapter_set import AdapterSet
from lragent.attention import ATTENTION, register_attention
from lragent.bench import machine
from lragent.bench.baselines import CachePerRole, PeftTeam, PrefillAnew, Turn, fast_dtype, replay
from lragent.bench.traces import Planned, paper_trace, random_roles, random_tokens, trace_tokens
from lragent.chat import BASE
from lragent.errors import LRAgentError, UserError
from lragent.models import ModelSource, fingerprint, load_model, load_tokenizer, resolve_model
from lragent.modes import SharingMode
from lragent.pack import read_pack
from lragent.peft_io import write_peft_folders
from lragent.serve.engine.build import build_engine
from lragent.serve.engine.engine import Engine
from lragent.serve.engine.types import Chunk, GenerationRequest, Prompt, SamplingParams

ANEW, PER_ROLE = "PEFT, prefilled anew", "PEFT, a cache per role"
AGREEMENT = {torch.float32: 1.0, torch.bfloat16: 0.7}
"""Share of first tokens that must be PEFT's own in `non_shared`. Random roles on random text leave many near ties,
which bfloat16 decides either way."""


@dataclass
class Played:
    """One trajectory as the engine played it."""

    turns: list[Turn] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    computed: int = 0


def ask(engine: Engine, role: str, context: Sequence[int], answer: int, salt: str) -> tuple[list[Chunk], list[float]]:
    """One request run to its end: its chunks, and seconds from its beginning to each."""
    chunks: list[Chunk] = []
    times: list[float] = []
    start = time.perf_counter()

    def take(chunk: Chunk) -> None:
        times.append(time.perf_counter() - start)
        chunks.append(chunk)

    params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
    engine.add(GenerationRequest("bench", role, Prompt(tuple(context)), params, salt), take)
    while engine.busy:
        engine.step()
    if chunks[-1].error is not None:
        raise LRAgentError(chunks[-1].error)
    return chunks, times


def play(engine: Engine, trace: Sequence[Planned], prompt_ids: Sequence[int], salt: str) -> Played:
    """Play `trace`; `prompt_ids` are consumed by its prompts one after another."""
    played = Played()
    context: list[int] = []
    fresh = iter(prompt_ids)
    for step in trace:
        context += [next(fresh) for _ in range(step.new)]
        chunks, times = ask(engine, step.role, context, step.answer, salt)
        answer = [token for chunk in chunks for token in chunk.token_ids]
        played.turns.append(Turn(step.role, tuple(context), tuple(answer)))
        played.ttft_s.append(times[0])
        usage = chunks[-1].usage
        assert usage is not None
        played.computed += usage.tokens_computed
        context += answer
    return played


class Bench:
    """All systems, loaded side by side: models of their own, so that none changes another's."""

    def __init__(
        self, source: ModelSource, pack: Path | None, modes: Sequence[SharingMode], dtype: torch.dtype, place: Path
    ) -> None:
        self.dtype = dtype
        self.source = source
        self.plain = PeftTeam(load_model(source, dtype), {})
        adapters = (
            read_pack(pack, expect_fingerprint=fingerprint(source.path)) if pack else random_roles(self.plain.model)
        )
        if len(adapters.roles) < 3:
            raise UserError(f"--roles: {pack} holds {len(adapters.roles)} roles; the trace needs three.")
        self.roles = adapters.role_names[:3]
        folders = write_peft_folders(adapters, place / "peft")
        self.peft = PeftTeam(load_model(source, dtype), dict(zip(adapters.role_names, folders, strict=True)))
        register_attention()
        self.engines = {mode: self._engine(adapters, mode) for mode in modes}
        self.base_engine = self._engine(None, SharingMode.NON_SHARED)
        self.vocabulary = int(self.plain.model.config.get_text_config().vocab_size)

    def _engine(self, adapters: AdapterSet | None, mode: SharingMode) -> Engine:
        model = load_model(self.source, self.dtype, attn_implementation=ATTENTION)
        return build_engine(model, load_tokenizer(self.source), adapters, sharing=mode, cache_tokens=32_768)

    def check(self, trace: Sequence[Planned]) -> float:
        """Share of first tokens in which `non_shared` and PEFT agree; raises `LRAgentError` where it is too small."""
        engine = self.engines[SharingMode.NON_SHARED]
        played = play(engine, trace, self._prompt(trace, seed=-1), "check")
        firsts = replay(PrefillAnew(self.peft), played.turns)
        same = [first.token == turn.answer_ids[0] for first, turn in zip(firsts, played.turns, strict=True)]
        agreement = sum(same) / len(same)
        if agreement < AGREEMENT[self.dtype]:
            raise LRAgentError(
                f"the engine and PEFT agree on {agreement:.0%} of the first tokens: no speeds are given."
            )
        return agreement

    def times_to_first_token(self, trace: Sequence[Planned], repeat: int) -> dict[str, tuple[float, int]]:
        """One round: summed seconds to first token, and prompt tokens computed, by system."""
        prompt = self._prompt(trace, repeat)
        played = {mode: play(engine, trace, prompt, f"repeat {repeat}") for mode, engine in self.engines.items()}
        sums = {str(mode): (sum(one.ttft_s), one.computed) for mode, one in played.items()}
        turns = played[SharingMode.BASE_LR_SHARED].turns
        for name, baseline in ((PER_ROLE, CachePerRole(self.peft)), (ANEW, PrefillAnew(self.peft))):
            firsts = replay(baseline, turns)
            sums[name] = (sum(first.seconds for first in firsts), sum(first.computed for first in firsts))
        return sums

    def decode_rates(self, prompt_tokens: int, answer: int, repeat: int) -> dict[str, float]:
        """One round: tokens per second after the first, by system."""
        prompt = random_tokens(prompt_tokens, self.vocabulary, seed=10_000 + repeat)
        role, salt = self.roles[0], f"decode {repeat}"
        shared = self.engines[SharingMode.BASE_LR_SHARED]
        return {
            "engine, base": _rate(self.base_engine, BASE, prompt, answer, salt),
            "transformers generate, base": self._generate_rate(self.plain, BASE, prompt, answer),
            "engine, a role": _rate(shared, role, prompt, answer, salt),
            "PEFT generate, a role": self._generate_rate(self.peft, role, prompt, answer),
        }

    def _prompt(self, trace: Sequence[Planned], seed: int) -> list[int]:
        return random_tokens(sum(step.new for step in trace), self.vocabulary, seed)

    @staticmethod
    def _generate_rate(team: PeftTeam, role: str, prompt: Sequence[int], answer: int) -> float:
        return team.generate(role, prompt, team.new_cache(), answer, []).decode_tokens_per_s


def _rate(engine: Engine, role: str, prompt: Sequence[int], answer: int, salt: str) -> float:
    _, times = ask(engine, role, prompt, answer, salt)
    return (len(times) - 1) / (times[-1] - times[0])


def measure(bench: Bench, trace: Sequence[Planned], repeats: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """All numbers, after one round that nobody counts."""
    tell("checking the engine against PEFT …")
    agreement = bench.check(trace)
    rounds, decoding = [], []
    for repeat in range(repeats + 1):
        tell(f"round {repeat} of {repeats}{'' if repeat else ' (to warm up)'} …")
        sums = bench.times_to_first_token(trace, repeat)
        rates = bench.decode_rates(prompt_tokens=512, answer=64, repeat=repeat)
        if repeat:
            rounds.append(sums)
            decoding.append(rates)
    ttft = {name: statistics.median(sums[name][0] for sums in rounds) for name in rounds[0]}
    ours = ttft[SharingMode.BASE_LR_SHARED]
    return {
        "benchmark": "steps",
        **machine.facts(torch.device("cpu")),
        "model": bench.source.name,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "steps": len(trace),
        "tokens": trace_tokens(trace),
        "repeats": repeats,
        "first_tokens_as_peft": round(agreement, 3),
        "ttft_sum_s": {name: round(seconds, 4) for name, seconds in ttft.items()},
        "tokens_computed": {name: rounds[0][name][1] for name in rounds[0]},
        "speedup_over_prefill_anew": round(ttft[ANEW] / ours, 2),
        "speedup_over_cache_per_role": round(ttft[PER_ROLE] / ours, 2),
        "decode_tokens_per_s": {
            name: round(statistics.median(rates[name] for rates in decoding), 2) for name in decoding[0]
        },
    }


def show(numbers: dict[str, Any], console: Console) -> None:
    """The numbers as tables."""
    first = Table(title=f"{numbers['steps']} steps, {numbers['tokens']} tokens: to the first token, all steps together")
    for name in ("", "prompt tokens computed", "seconds", "times base_lr_shared"):
        first.add_column(name, justify="right" if name else "left")
    ours = numbers["ttft_sum_s"]["base_lr_shared"]
    for name, seconds in numbers["ttft_sum_s"].items():
        first.add_row(name, str(numbers["tokens_computed"][name]), f"{seconds:.3f}", f"{seconds / ours:.2f}")
    decode = Table(title="decoding after 512 tokens")
    decode.add_column("")
    decode.add_column("tokens per second", justify="right")
    for name, rate in numbers["decode_tokens_per_s"].items():
        decode.add_row(name, f"{rate:.1f}")
    console.print(first)
    console.print(decode)


def main(argv: Sequence[str]) -> int:
    """Measure, print the tables, save the numbers, and print them as the last line."""
    parser = argparse.ArgumentParser(prog="python -m lragent.bench steps", description=__doc__)
    flag = parser.add_argument
    flag("--model", metavar="SPEC", help="hub id, folder or GGUF file (default: the embedded model)")
    flag("--roles", type=Path, metavar="PACK", help="pack of three roles or more (default: random ones)")
    flag("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 where the CPU computes in it")
    flag("--context", type=int, default=256, metavar="N", help="tokens that each of four tool calls brings (256)")
    flag("--steps", type=int, metavar="N", help="only the first so many of the 17 steps")
    flag("--repeats", type=int, default=5, metavar="N", help="rounds whose median is taken (5)")
    flag("--no-save", action="store_true", help="write nothing to bench/results/")
    args = parser.parse_args(argv)
    for name, least in (("context", 1), ("steps", 1), ("repeats", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name}: must be at least {least}, not {value}.")
    dtype = getattr(torch, args.dtype) if args.dtype else fast_dtype()
    console = Console(width=None if Console().is_terminal else 120)
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(resolve_model(args.model), args.roles, list(SharingMode), dtype, Path(place))
        trace = paper_trace(args.context, bench.roles)[: args.steps]
        numbers = measure(bench, trace, args.repeats, console.print)
    show(numbers, console)
    if not args.no_save:
        console.print(f"saved to {machine.save('steps', numbers)}", highlight=False)
    print(json.dumps(numbers))
    return 0
