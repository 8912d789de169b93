"""`python -m lragent.bench training_attention`: attention with gradients over `[V_base | LR]`, against torch's own.

Llama-3.1-8B's shapes in bfloat16. Torch's own attention runs on values widened by the LR columns, which is how one
trains through it, and on plain values, which shows what the LR part costs. For it trajectories of unequal length are
padded beforehand, which is not timed; widening is, as it happens at every layer. Contenders take turns; medians of CUDA
events are reported, and no speed for a result or gradient that float32 does not confirm.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from lragent.bench import machine
from lragent.bench.attention_problem import DIM, Exact, Problem, exact
from lragent.errors import LRAgentError, UserError
from lragent.kernels.varlen_layout import Blocks, Tile, VarlenLayout

LENGTHS = {
    "one of 4096": (4096,),
    "eight of about 2048": (2048, 1531, 2367, 1999, 2600, 1204, 2301, 2334),
    "one of 16384": (16384,),
}
ERROR_LIMIT = 0.015
"""Of a result or gradient, as a share of its norm. bfloat16 rounds by up to 0.004; what is wrong is off by far more."""


@dataclass
class Contender:
    """One way to attend. call gives its results, to be differentiated by `inputs`; flat brings results and gradients
    into the shapes of the problem's."""

    name: str
    inputs: list[torch.Tensor]
    grads: list[torch.Tensor]
    call: Callable[[], list[torch.Tensor]]
    flat: Callable[[list[torch.Tensor], list[torch.Tensor]], tuple[list[torch.Tensor], list[torch.Tensor]]]
    expects: Callable[[Problem, Exact], list[torch.Tensor]]
    backend: Callable[[], AbstractContextManager[Any]] = nullcontext
    times: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})

    def run(self, gradients: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Results, and gradients where wanted."""
        with self.backend():
            results = self.call()
            return results, list(torch.autograd.grad(results, self.inputs, self.grads)) if gradients else []

    def error(self, problem: Problem, known: Exact) -> float:
        """The largest of all errors."""
        results, gradients = self.flat(*self.run(True))
        right = known.with_low if len(gradients) == 4 else known.plain[:3]
        pairs = [*zip(results, self.expects(problem, known), strict=True), *zip(gradients, right, strict=True)]
        return max(float((mine.detach().float() - want).norm() / want.norm()) for mine, want in pairs)

    def time(self, gradients: bool, rounds: int) -> None:
        """Milliseconds on the device, `rounds` times."""
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
        for start, end in marks:
            start.record()
            self.run(gradients)
            end.record()
        torch.cuda.synchronize()
        self.times[gradients] += [start.elapsed_time(end) for start, end in marks]


def ours(problem: Problem, how: str, blocks: Blocks | None) -> Contender:
    """how: `plain`, `low` (both accumulators), or `readers` (with their `B` applied)."""
    from lragent.kernels.varlen import varlen_attention, varlen_lora_attention

    layout = VarlenLayout.of(problem.spans, problem.query.device)
    query, key, value, low = problem.inputs
    options: dict[str, Any] = {"scale": problem.scale, "blocks": blocks}

    def call() -> list[torch.Tensor]:
        if how == "readers":
            return [varlen_lora_attention(query, key, value, low, problem.up, problem.roles, layout, **options)]
        outs = varlen_attention(query, key, value, None if how == "plain" else low, layout, **options)
        return [out for out in outs if out is not None]

    expects: dict[str, Callable[[Problem, Exact], list[torch.Tensor]]] = {
        "plain": lambda _, known: [known.out],
        "low": lambda _, known: [known.out, known.low_out],
        "readers": lambda problem, known: [problem.add_up(known.out, known.low_out)],
    }
    return Contender(
        {"plain": "ours, no LR", "low": "ours", "readers": "ours, B applied"}[how],
        problem.inputs[:3] if how == "plain" else problem.inputs,
        [problem.grad, problem.low_grad] if how == "low" else [problem.grad],
        call,
        lambda results, gradients: (results, gradients),
        expects[how],
    )


def torchs(problem: Problem, kind: str, widened: bool) -> Contender:
    """kind: `cuDNN`, `flash` or `flex`; widened: LR columns beside the values, filled up to a multiple of 8."""
    packed = kind == "flex"  # flex attention masks across trajectories; the others are given a batch, padded
    lengths = [end - start for start, end in problem.spans]
    longest = max(lengths)

    def pad(states: torch.Tensor) -> torch.Tensor:  # [H, T, C] to [N, H, L, C]
        if packed:
            return states.detach().unsqueeze(0).contiguous()
        parts = [F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in states.detach().split(lengths, 1)]
        return torch.stack(parts)

    def unpad(states: torch.Tensor) -> torch.Tensor:  # and back
        if packed:
            return states[0]
        return torch.cat([part[:, :length] for part, length in zip(states, lengths, strict=True)], 1)

    query, key, value, low = problem.query, problem.key, problem.value, problem.low.unsqueeze(0)
    inputs = [pad(x).requires_grad_() for x in ((query, key, value, low) if widened else (query, key, value))]
    rank, dim, kv_heads, group = low.shape[-1], value.shape[2], key.shape[0], query.shape[0] // key.shape[0]
    attend = _flex(problem) if packed else functools.partial(F.scaled_dot_product_attention, is_causal=True)
    backend = nullcontext if packed else functools.partial(_only, kind)
    grouped = packed or _takes_groups(attend, backend, [x.detach() for x in inputs])

    def call() -> list[torch.Tensor]:
        keys, values = inputs[1:3]
        if widened:
            columns = F.pad(inputs[3], (0, -rank % 8)).expand(-1, kv_heads, -1, -1)
            values = torch.cat((values, columns), dim=-1)
        if not grouped:
            keys, values = (states.repeat_interleave(group, 1) for states in (keys, values))
        out = attend(inputs[0], keys, values, scale=problem.scale, enable_gqa=grouped)
        return [out[..., : dim + rank] if widened else out]

    def flat(
        results: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        parts = unpad(results[0]).transpose(0, 1).split((dim, rank) if widened else (dim,), dim=-1)
        found = [unpad(x) for x in gradients]
        return list(parts), [*found[:3], *(x[0] for x in found[3:])]

    grad = torch.cat((problem.grad, problem.low_grad), dim=-1) if widened else problem.grad
    return Contender(
        f"{kind}, {'widened' if widened else 'no LR'}{'' if grouped else ', keys repeated'}",
        inputs,
        [pad(grad.transpose(0, 1))],
        call,
        flat,
        lambda _, known: [known.out, known.low_out] if widened else [known.out],
        backend,
    )


def _takes_groups(
    attend: Callable[..., torch.Tensor], backend: Callable[[], AbstractContextManager[Any]], inputs: list[torch.Tensor]
) -> bool:
    """Whether a backend attends with fewer key heads than query heads."""
    try:
        with backend():
            attend(*inputs[:3], enable_gqa=True)
    except RuntimeError:
        return False
    return True


def _only(kind: str) -> AbstractContextManager[Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION if kind == "cuDNN" else SDPBackend.FLASH_ATTENTION)


def _flex(problem: Problem) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens, device = problem.roles.shape[0], problem.roles.device
    lengths = torch.tensor([end - start for start, end in problem.spans], device=device)
    trajectory = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (trajectory[query] == trajectory[key])

    mask = create_block_mask(sees, None, None, tokens, tokens, device=str(device))
    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, dynamic=False)
    return functools.partial(compiled, block_mask=mask)


Makers = list[tuple[str, Callable[[], Contender]]]


def contenders(problem: Problem, first: bool, flex: bool, blocks: Blocks | None) -> Makers:
    """By name, how each is made. first: of the ranks, so that what has no LR part is measured once."""
    kinds = [("cuDNN", False), ("flash", False)] if first else []
    kinds += [("cuDNN", True), *([("flex", True)] if flex else [])]
    makers: Makers = [
        (f"{kind}, widened: {wide}", functools.partial(torchs, problem, kind, wide)) for kind, wide in kinds
    ]
    mine = [*(["plain"] if first else []), "low", "readers"]
    return makers + [(f"ours, {how}", functools.partial(ours, problem, how, blocks)) for how in mine]


def attempt(row: dict[str, Any], what: Callable[[], None]) -> bool:
    """Whether `what` went well; else the row says why not. Whatever one contender's libraries raise, others go on."""
    try:
        what()
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "failed" not in row


def race(problem: Problem, makers: Makers, rounds: int) -> list[dict[str, Any]]:
    """Check every contender, then time those that are right, in turns."""
    known = exact(problem)
    rows: list[dict[str, Any]] = [{"contender": name} for name, _ in makers]
    ready: list[tuple[dict[str, Any], Contender]] = []

    def check(row: dict[str, Any], make: Callable[[], Contender]) -> None:
        contender = make()
        row["contender"], row["error"] = contender.name, round(contender.error(problem, known), 5)
        if not row["error"] <= ERROR_LIMIT:
            raise LRAgentError(f"off by {row['error']:.2%}, so no speed is given")
        ready.append((row, contender))

    def time(contender: Contender) -> None:
        for gradients in (False, True):
            contender.time(gradients, 3)

    for row, (_, make) in zip(rows, makers, strict=True):
        attempt(row, functools.partial(check, row, make))
    for turn in range(rounds + 1):
        for row, contender in ready:
            if "failed" not in row and attempt(row, functools.partial(time, contender)) and turn == 0:
                contender.times = {False: [], True: []}  # to warm up
    for row, contender in ready:
        for gradients, word in ((False, "forward"), (True, "both")):
            if "failed" not in row:
                milliseconds = statistics.median(contender.times[gradients])
                row[f"{word}_ms"] = round(milliseconds, 4)
                row[f"{word}_tflops"] = round(problem.operations(gradients) / milliseconds / 1e9, 1)
    return rows


def compare(
    device: torch.device,
    *,
    lengths: dict[str, tuple[int, ...]] = LENGTHS,
    ranks: Sequence[int] = (8, 16),
    rounds: int = 10,
    flex: bool = True,
    blocks: Blocks | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """A row for each case, rank and contender: milliseconds, TFLOP/s and error, or the reason why there are none."""
    rows: list[dict[str, Any]] = []
    for case, of in lengths.items():
        for rank in ranks:
            tell(f"{case}, rank {rank} …")
            facts: dict[str, Any] = {"case": case, "rank": rank}
            whole = {"contender": "all of them"}

            def run(of: Sequence[int] = of, rank: int = rank, facts: dict[str, Any] = facts) -> None:
                problem = Problem.of(of, rank, device)
                found = race(problem, contenders(problem, rank == ranks[0], flex, blocks), rounds)
                rows.extend({**facts, **row} for row in found)

            if not attempt(whole, run):
                rows.append({**facts, **whole})
    return rows


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The rows as a table."""
    table = Table(title="attention, bfloat16, 32/8 heads of 128; TFLOP/s count attention without LR")
    for name in ("case", "r", "contender", "forward ms", "TFLOP/s", "forward + backward ms", "TFLOP/s", "error"):
        table.add_column(name, justify="left" if name in ("case", "contender") else "right")
    for row in rows:
        head = (row["case"], str(row["rank"]), row["contender"])
        if "failed" in row:
            table.add_row(*head, "-", "-", row["failed"][:60], "-", f"{row.get('error', '-')}")
            continue
        numbers = (f"{row['forward_ms']:.3f}", f"{row['forward_tflops']:.0f}", f"{row['both_ms']:.3f}")
        table.add_row(*head, *numbers, f"{row['both_tflops']:.0f}", f"{row['error']:.4f}")
    console.print(table)


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the numbers, and print them as the last line."""
    parser = argparse.ArgumentParser(prog="python -m lragent.bench training_attention", description=__doc__)
    flag = parser.add_argument
    flag("--ranks", type=int, nargs="+", default=[8, 16], metavar="R", help="ranks of the LR cache (8 16)")
    flag("--rounds", type=int, default=10, metavar="N", help="turns of three runs each (10)")
    flag("--no-flex", action="store_true", help="leave out FlexAttention, which takes minutes to compile")
    for name in ("forward", "grad-keys", "grad-queries"):
        flag(f"--{name}", type=int, nargs=4, metavar=("QUERIES", "KEYS", "WARPS", "STAGES"), help="another tile")
    flag("--no-save", action="store_true", help="write nothing to bench/results/")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("training_attention: needs a CUDA device.")
    if args.rounds < 1 or min(args.ranks) < 1:
        raise UserError("--rounds, --ranks: must be at least 1.")
    device, console = torch.device("cuda", 0), Console(width=None if Console().is_terminal else 160)
    usual = Blocks.of(DIM, max(args.ranks), torch.bfloat16)
    chosen = {name: getattr(args, name) for name in ("forward", "grad_keys", "grad_queries")}
    blocks = Blocks(**{name: Tile(*tile) if tile else getattr(usual, name) for name, tile in chosen.items()})
    tell = functools.partial(console.print, highlight=False)
    rows = compare(
        device, ranks=args.ranks, rounds=args.rounds, flex=not args.no_flex,
        blocks=blocks if any(chosen.values()) else None, tell=tell,
    )  # fmt: skip
    numbers = {
        "benchmark": "training_attention",
        **machine.facts(device),
        "blocks": {name: tile for name, tile in chosen.items() if tile},
        "rows": rows,
    }
    show(rows, console)
    if not args.no_save:
        tell(f"saved to {machine.save('training_attention', numbers)}")
    print(json.dumps(numbers))
    return 0
