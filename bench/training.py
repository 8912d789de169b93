"""`python -m lragent.bench training`: steps of learning on trajectories of 17 turns over three roles.

Random weights of a known shape, tied adapters of rank 8 on q and v, AdamW, clipping: what `train_roles.py` does in a
step, without reading data. An epoch over the same trajectories is timed in three ways: `shared` (one pass for all
roles), `per_role` (each role alone over the whole context), and `per_step` (every turn a sample of its own with its
whole context, as LoRA roles are usually trained; arXiv 2602.01053). MFU counts 4 FLOPs for a parameter and token, and
attention, against the GPU's dense bfloat16 peak; what is computed twice counts once.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lragent.attention import ATTENTION, register_attention
from lragent.bench import machine
from lragent.bench.shapes import SHAPES, random_model, shape_named
from lragent.bench.traces import ROLES, sized_trace
from lragent.errors import UserError
from lragent.tied_lora import RoleModel, build_role_model
from lragent.train.batches import PackedBatch, pack
from lragent.train.compiling import compile_elementwise
from lragent.train.data import Example, RoleViews
from lragent.train.flops import ModelFlops, peak_flops
from lragent.train.role_loss import RoleLoss, loss_inputs

WAYS = ("shared", "per_role", "per_step")


def trajectory(tokens: int, vocabulary: int, seed: int) -> Example:
    """The paper's 17 steps, cut so that they take about `tokens` tokens (at least 916); random ids."""
    trace = sized_trace(tokens)
    authors: list[int] = []
    for step in trace:
        authors += [0] * step.new + [ROLES.index(step.role) + 1] * step.answer
    roles, speaker = [0] * len(authors), authors[-1]
    for at in range(len(authors) - 1, -1, -1):  # a position belongs to the author of the next authored token
        roles[at] = speaker
        speaker = authors[at] or speaker
    roles[: trace[0].new - 4] = [0] * (trace[0].new - 4)  # but what comes before the first turn to the base
    ids = torch.randint(vocabulary, (len(authors),), generator=torch.Generator().manual_seed(seed))
    return Example(f"trajectory {seed}", ids, torch.tensor(authors), torch.tensor(roles))


def step_views(example: Example) -> list[Example]:
    """One example per turn: the whole context, of which that turn is learnt."""
    authors = example.authors.tolist()
    views, at = [], 0
    while at < len(authors):
        end = at
        while end < len(authors) and authors[end] == authors[at]:
            end += 1
        if authors[at]:
            own = torch.zeros(end, dtype=torch.long)
            own[at:end] = authors[at]
            views.append(Example(example.source, example.token_ids[:end], own, torch.full((end,), authors[at])))
        at = end
    return views


def batches(examples: Sequence[Example], way: str, tokens: int) -> list[PackedBatch]:
    """An epoch in batches of at most `tokens` tokens."""
    views = {"shared": lambda e: [e], "per_role": lambda e: list(RoleViews([e])), "per_step": step_views}[way]
    filled: list[list[Example]] = []
    for view in (view for example in examples for view in views(example)):
        if not filled or sum(map(len, filled[-1])) + len(view) > tokens:
            filled.append([])
        filled[-1].append(view)
    return [pack(some) for some in filled]


@dataclass
class Trainee:
    """A model with fresh roles, and its optimizer."""

    built: RoleModel
    loss: RoleLoss
    optimizer: torch.optim.Optimizer
    flops: ModelFlops
    device: torch.device

    @classmethod
    def of(cls, shape: str, device: torch.device, dtype: torch.dtype, *, compiled: bool, recompute: bool) -> Trainee:
        """Made on the device, with B small and not zero, so that everything learns from the first step."""
        register_attention()
        torch.manual_seed(0)
        model = random_model(shape_named(shape), device, dtype, attn_implementation=ATTENTION)
        flops = ModelFlops(model)
        built = build_role_model(model, ROLES, rank=8, alpha=16)
        for module in built.modules.values():
            for b in module.role_b:
                torch.nn.init.normal_(b, std=0.01)
        loss = RoleLoss(built, recompute=recompute).train()
        if compiled:
            compile_elementwise(built)
        return cls(built, loss, torch.optim.AdamW(built.adapter_parameters(), lr=1e-4), flops, device)

    def step(self, batch: PackedBatch, one_pass: bool) -> tuple[float, float]:
        """One optimizer step on one batch; returns the mean loss and the gradient's norm."""
        batch = batch.to(self.device)
        targets = int((batch.loss_roles > 0).sum())
        sums = self.loss(**loss_inputs(batch, one_pass))
        (sums.sum() / targets).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.built.adapter_parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(sums.detach().sum()) / targets, float(norm)


def measure(trainee: Trainee, epoch: Sequence[PackedBatch], one_pass: bool, repeats: int) -> dict[str, Any]:
    """Time every step of `repeats` epochs, after one batch of warming up, and what is allocated at the peak."""
    trainee.step(epoch[0], one_pass)
    if trainee.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[list[float]] = []
    for _ in range(repeats):
        times.append([])
        for batch in epoch:
            _synchronize(trainee.device)
            began = time.perf_counter()
            loss, norm = trainee.step(batch, one_pass)
            _synchronize(trainee.device)
            times[-1].append(time.perf_counter() - began)
            if not (math.isfinite(loss) and math.isfinite(norm) and norm > 0):
                raise UserError(
                    f"training: a step gave the loss {loss} and a gradient of {norm}; no speed is reported."
                )
    seconds = statistics.median(map(sum, times))
    tokens = sum(batch.input_ids.numel() for batch in epoch)
    flops = sum(trainee.flops.of(batch.spans, int((batch.loss_roles > 0).sum())) for batch in epoch)
    peak = peak_flops(trainee.device)
    return {
        "batches": len(epoch),
        "tokens": tokens,
        "epoch_s": seconds,
        "step_ms": 1000 * statistics.median(step for run in times for step in run),
        "tokens_s": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": None if peak is None else flops / seconds / peak,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if trainee.device.type == "cuda" else None,
        "loss": loss,
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def profile(trainee: Trainee, batch: PackedBatch, one_pass: bool, top: int = 40) -> list[dict[str, Any]]:
    """Where the device's time goes in one step: the kernels that take most, in milliseconds."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        trainee.step(batch, one_pass)
        _synchronize(trainee.device)
    rows = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)[:top]
    return [
        {"kernel": event.key[:120], "ms": event.self_device_time_total / 1000, "count": event.count} for event in rows
    ]


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the numbers, and print them as the last line."""
    parser = argparse.ArgumentParser(
        prog="python -m lragent.bench training", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flag = parser.add_argument
    flag("--shape", default="llama-3.1-8b", choices=SHAPES, help="the model's shape (llama-3.1-8b)")
    flag("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="ways to learn an epoch (all)")
    flag("--tokens", type=int, default=4096, metavar="N", help="of a trajectory (4096)")
    flag("--trajectories", type=int, default=4, metavar="N", help="in an epoch (4)")
    flag("--tokens-per-batch", type=int, default=8192, metavar="N", help="at most (8192)")
    flag("--repeats", type=int, default=3, metavar="N", help="epochs that are timed (3)")
    flag("--no-compile", action="store_true", help="run the base's elementwise parts as they are")
    flag("--recompute", action="store_true", help="keep only what goes into each layer")
    flag("--profile", action="store_true", help="also the kernels that take most time in a step")
    flag("--name", default="training", help="of the file of results (training)")
    flag("--no-save", action="store_true", help="write nothing to bench/results/")
    args = parser.parse_args(argv)
    if min(args.tokens, args.trajectories, args.tokens_per_batch, args.repeats) < 1:
        raise UserError("--tokens, --trajectories, --tokens-per-batch, --repeats: must be at least 1.")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    console = Console(width=None if Console().is_terminal else 160)
    compiled = device.type == "cuda" and not args.no_compile
    trainee = Trainee.of(args.shape, device, dtype, compiled=compiled, recompute=args.recompute)
    vocabulary = SHAPES[args.shape].vocabulary
    examples = [trajectory(args.tokens, vocabulary, seed) for seed in range(args.trajectories)]
    numbers: dict[str, Any] = {
        "benchmark": "training", **machine.facts(device), "shape": args.shape, "trajectory": len(examples[0]),
        "trajectories": len(examples), "tokens_per_batch": args.tokens_per_batch, "compiled": compiled,
        "recompute": args.recompute, "rows": [],
    }  # fmt: skip
    for way in args.ways:
        epoch = batches(examples, way, args.tokens_per_batch)
        console.print(f"{way}: {len(epoch)} batches …", highlight=False)
        row = {"way": way, **measure(trainee, epoch, way == "shared", args.repeats)}
        if args.profile and device.type == "cuda":
            row["kernels"] = profile(trainee, epoch[0], way == "shared")
        numbers["rows"].append(row)
    show(numbers, console)
    if not args.no_save:
        console.print(f"saved to {machine.save(args.name, numbers)}", highlight=False)
    print(json.dumps(numbers))
    return 0


def show(numbers: dict[str, Any], console: Console) -> None:
    """The rows as a table."""
    table = Table(title=f"{numbers['shape']}, {numbers['trajectories']} trajectories of {numbers['trajectory']} tokens")
    for name in ("", "tokens an epoch", "s an epoch", "ms a step", "tokens/s", "TFLOP/s", "MFU", "peak GiB"):
        table.add_column(name, justify="right" if name else "left")
    for row in numbers["rows"]:
        table.add_row(
            row["way"], f"{row['tokens']:,}", f"{row['epoch_s']:.2f}", f"{row['step_ms']:.1f}",
            f"{row['tokens_s']:,.0f}", f"{row['tflops']:.0f}", "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
            "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
        )  # fmt: skip
    console.print(table)
