"""`python -m lragent.bench trace`: the paper's trajectory, in the sharing modes, one or many at once.

Every figure stands beside its floor. Rounds use tokens that no cache has seen, the first of them is not counted, and
the modes take turns within each where all fit into memory. What is found is saved after each entry, so that a process
that is ended loses only the one it is at. The exit status is 1 if any request failed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lragent.bench import machine, peers
from lragent.bench.matrix import Found, Matrix, label
from lragent.bench.playing import Record
from lragent.bench.plots import plot
from lragent.bench.roofline import Ceilings, ModelSize, Roofline
from lragent.bench.trace_options import (
    base_of,
    config_of,
    device_of,
    dtype_of,
    endpoint_of,
    limits_of,
    parse,
    plan_of,
)
from lragent.bench.trace_report import show_micro, show_peers, show_rows
from lragent.modes import SharingMode


class Journal:
    """Shows and keeps what is found, as it comes: a bar of requests on stderr, a line for each entry on stdout.

    head: the facts that go before all results. folder: where results go, None for nowhere. records: see --records.
    """

    def __init__(
        self,
        console: Console,
        head: dict[str, Any],
        folder: Path | None,
        records: TextIO | None,
        roofline: Roofline | None,
    ) -> None:
        self._console = console
        self._head = head
        self._folder = folder
        self._records = records
        self._roofline = roofline
        self._shown = 0
        self.path: Path | None = None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self.bar.add_task("", total=None)

    def begins(self, what: str, answers: int) -> None:
        """See lragent.bench.matrix.Watcher."""
        self.bar.reset(self._task, description=what, total=answers)

    def answered(self) -> None:
        """See Watcher."""
        self.bar.advance(self._task)

    def records(self, facts: dict[str, Any], records: Sequence[Record]) -> None:
        """See Watcher."""
        for record in records if self._records is not None else ():
            print(json.dumps({**facts, **asdict(record)}), file=self._records, flush=True)

    def keeps(self, found: Found) -> None:
        """See Watcher."""
        for row in found.rows[self._shown :]:
            speed, first = row["tokens_s"], row["ttft_sum_s"]
            self.tells(
                f"{label(row)}: {speed} tokens/s, ΣTTFT {first} s" + (" (with failures)" * bool(row["failures"]))
            )
        self._shown = len(found.rows)
        if self._folder is not None:
            self.path = machine.save("trace", self.numbers(found), self._folder)

    def tells(self, sentence: str) -> None:
        """See Watcher."""
        self._console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def numbers(self, found: Found) -> dict[str, Any]:
        """All results."""
        return {
            **self._head,
            "rows": found.rows,
            "micro": found.micro,
            "peers": peers.as_rows(self.comparisons(found)),
            "skipped": found.skipped,
            "failures": found.failures,
        }

    def comparisons(self, found: Found) -> list[peers.Comparison]:
        """With vLLM, where the shape and kind of device are those of its figures."""
        alike = self._head["shape"] == peers.SHAPE and self._head["device"] == "cuda"
        if not alike or self._roofline is None:
            return []
        ours = [row for row in found.rows if row["system"] == SharingMode.BASE_LR_SHARED]
        return peers.compare(ours, self._roofline.size, self._roofline.ceilings)


def main(argv: Sequence[str]) -> int:
    """Measure, print the tables, save the numbers and the plots, and print the numbers as the last line."""
    args = parse(argv)
    plan, limits = plan_of(args), limits_of(args)
    device, console = device_of(args), Console(width=None if Console().is_terminal else 170)
    dtype, config = dtype_of(args, device), config_of(args)
    endpoint = endpoint_of(args, plan) if args.base_url else None
    base = None if endpoint else base_of(args, plan, device, dtype)
    seed = args.seed if args.seed is not None else int(time.time()) if endpoint else 0
    roofline = None
    if config is not None and (endpoint is None or args.device is not None):
        roofline = Roofline(ModelSize.of(config, dtype), Ceilings.measure(device, dtype))
        console.print(_ceilings(roofline.ceilings), highlight=False)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    head = {
        "benchmark": "trace",
        **machine.facts(device),
        "device": device.type,
        "shape": args.shape,
        "model": args.model,
        "dtype": str(dtype).removeprefix("torch."),
        "rank": args.rank,
        "base_url": args.base_url,
        "seed": seed,
        "token_budget": args.token_budget,
        "roofline": roofline.facts() if roofline else None,
    }
    folder = None if args.no_save else args.output or machine.RESULTS
    records = args.records.open("w", encoding="utf-8") if args.records else None
    journal = Journal(console, head, folder, records, roofline)
    matrix = Matrix(roofline, limits, journal, seed)
    with journal.bar:
        if endpoint is not None:
            for entry in plan.entries():
                matrix.measure([endpoint], entry)
        elif base is not None:
            matrix.engines(base, plan)
    if records is not None:
        records.close()
    return _finish(matrix.found, journal, console)


def _finish(found: Found, journal: Journal, console: Console) -> int:
    journal.keeps(found)  # once more: what was left out at the end is part of it
    numbers = journal.numbers(found)
    if found.rows:
        show_rows(found.rows, console)
    if found.micro:
        show_micro(found.micro, console)
    comparisons = journal.comparisons(found)
    if comparisons:
        show_peers(comparisons, console)
    if journal.path is not None:
        picture = journal.path.with_suffix(".png")
        if found.rows:
            plot(
                found.rows,
                f"{numbers['shape'] or numbers['model'] or numbers['base_url']}, {numbers['machine']}",
                picture,
            )
        journal.tells(f"saved to {journal.path}" + (f" and {picture.name}" if found.rows else ""))
    for failure in found.failures:
        print(f"failed: {failure}", file=sys.stderr)
    print(json.dumps(numbers))
    return 1 if found.failures else 0


def _ceilings(ceilings: Ceilings) -> str:
    return f"measured: copy {ceilings.copy / 1e12:.3f} TB/s, products {ceilings.products / 1e12:.2f} TFLOP/s"
