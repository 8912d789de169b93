"""How throughput grows with the number of replicas, and what a killed one costs.

    python -m lragent.bench replicas --shape llama-3.1-8b --concurrent 32,64 --kill

Many trajectories of three roles (see `trace`) are played over HTTP to `lragent serve`'s own server, by processes of
their own. Each number of replicas gets a server of its own, and rounds of them take turns. With --kill, one replica of
the largest server is killed by SIGKILL in the middle of a round in which every other request is not streamed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from rich.console import Console
from rich.table import Table

from lragent.bench import machine
from lragent.bench.replica_clients import Clients, Part, client, split, summed
from lragent.bench.replica_server import Served, replica_processes, run, started
from lragent.bench.shapes import SHAPES, shape_named
from lragent.bench.traces import trace_tokens
from lragent.errors import UserError

RECOVERY_S = 300.0
"""After which a replica that has not come back is given up."""
KILLED_AFTER = 0.3
"""The share of answers that have come when a replica is killed."""


def main(argv: Sequence[str]) -> int:
    """Prints a table and, last, the figures as JSON. Returns 1 where a request failed that should not have."""
    args = parse(argv)
    if args.client:
        asyncio.run(client(args.client))
        return 0
    if args.serve:
        run(Served(**json.loads(args.serve)), args.replicas[0])
        return 0
    console = Console(stderr=True, width=None if Console(stderr=True).is_terminal else 140)
    device = torch.device("cuda" if args.device == "cuda" else "cpu")
    served = served_of(args)
    numbers: dict[str, Any] = {
        "benchmark": "replicas",
        **machine.facts(device),
        "ray": version("ray"),
        "gpus": torch.cuda.device_count() if args.device == "cuda" else 0,
        "shape": args.shape,
        "trajectory_tokens": trace_tokens(part_of(args, 1).trace()),
        "served": vars(served),
        "clients": args.clients,
        "rounds": [],
        "kill": None,
    }
    for number in range(args.repeats):
        for replicas in args.replicas[:: -1 if number % 2 else 1]:
            with (
                started(server_words(served, replicas)) as (url, server),
                Clients(url, args.clients) as clients,
            ):
                numbers["rounds"] += measured(args, clients, replicas, number, console)
                if args.kill and number == args.repeats - 1 and replicas == max(args.replicas):
                    numbers["kill"] = killed(args, clients, url, server, console)
            numbers["rows"] = rows(numbers["rounds"])
            if not args.no_save:  # after each server: the next may not come up
                machine.save("replicas", numbers, args.output)
    console.print(table(numbers["rows"]))
    if not args.no_save:
        console.print(f"saved in {args.output}", highlight=False)
    print(json.dumps(numbers))
    failures = [failure for each in numbers["rounds"] for failure in each["failures"]]
    failures += numbers["kill"]["failures"] if numbers["kill"] else []
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def measured(
    args: argparse.Namespace, clients: Clients, replicas: int, number: int, console: Console
) -> list[dict[str, Any]]:
    """A round of every load on one server: figures of each."""
    found = []
    play(clients, part_of(args, max(args.concurrent) // 4 or 1, seed=99, steps=3))  # buffers, plans, connections
    for at, concurrent in enumerate(args.concurrent):
        figures = play(clients, part_of(args, concurrent, seed=1 + at + 10 * number))
        found.append({"replicas": replicas, "concurrent": concurrent} | figures)
        console.print(f"{label(found[-1])}, {concurrent} at once: {figures['tokens_s']} tokens/s", highlight=False)
    return found


def play(clients: Clients, whole: Part) -> dict[str, Any]:
    """`whole`, by all processes: figures."""
    clients.begin(split(whole, clients.count))
    return summed(clients.ended())


def killed(
    args: argparse.Namespace, clients: Clients, url: str, server: psutil.Process, console: Console
) -> dict[str, Any]:
    """One round in which a replica is killed: what became of the requests, and how long it was gone."""
    replicas, concurrent = max(args.replicas), max(args.concurrent)
    whole = part_of(args, concurrent, seed=77, persistent=True)
    expected = whole.trajectories * len(whole.trace())
    with httpx.Client(base_url=url, timeout=30.0, trust_env=False) as http:
        began, before = time.time(), metric(http, "requests_total")
        clients.begin(split(whole, clients.count))
        while metric(http, "requests_total") - before < KILLED_AFTER * expected:
            time.sleep(0.02)
        victim, at = replica_processes(server)[0], time.time()
        victim.kill()
        back = recovery_s(http, at)
        outcomes = clients.ended()
        left = metric(http, "replica_requests_left")
    ends = sorted(end for each in outcomes for end in each.ends)
    failures = [failure for each in outcomes for failure in each.failures]
    again = sum(each.sent_again for each in outcomes)
    result = {
        "replicas": replicas,
        "concurrent": concurrent,
        "requests": expected,
        "answered": len(ends),
        "open_on_the_killed": int(left),
        "streams_sent_again_by_the_client": again,
        "run_again_by_the_server": None if failures else int(left) - again,
        "failures": failures,
        "recovery_s": back,
        "longest_silence_s": round(max(one - other for other, one in itertools.pairwise([began, *ends])), 3),
        "answers_s_before": rate(ends, ends[0] if ends else began, at),
        "answers_s_while_gone": None if back is None or not ends else rate(ends, at, min(at + back, ends[-1])),
    }
    console.print(f"killed one of {replicas}: {result}", highlight=False)
    return result


def rate(ends: Sequence[float], begin: float, end: float) -> float:
    """Answers a second between two moments."""
    return round(sum(1 for each in ends if begin <= each < end) / max(end - begin, 1e-9), 2)


def recovery_s(http: httpx.Client, since: float) -> float | None:
    """Seconds from `since` until all replicas serve again; None where they do not."""
    while time.time() - since < RECOVERY_S:
        health = http.get("/health").json().get("replicas", {})
        if time.time() - since > 0.5 and health and health["alive"] == health["of"]:
            return round(time.time() - since, 2)
        time.sleep(0.05)
    return None


def metric(http: httpx.Client, name: str) -> float:
    """The sum of one of the server's own metrics."""
    found = re.findall(rf"^lragent:{name}{{\S* (\S+)$", http.get("/metrics").text, re.MULTILINE)
    return sum(map(float, found))


def rows(rounds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds of each server and load. efficiency: of the throughput of one replica with as many at
    once as each replica has here; `best_efficiency`: of the best throughput that one replica has under any load. An
    engine in the server's own process, 0 replicas, counts as one."""
    groups: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for each in rounds:
        if each["ttft_ms"] is not None:  # else nothing was answered, which its failures tell
            groups[each["replicas"], each["concurrent"]].append(each)
    made = []
    names = ("tokens_s", "requests_s", "generated_s", "ttft_ms", "ttft_p95_ms", "cached_share")
    for (replicas, concurrent), alike in groups.items():
        figures = {name: statistics.median(each[name] for each in alike) for name in names}
        made.append({"replicas": replicas, "concurrent": concurrent, "rounds": len(alike)} | figures)
    single = {row["concurrent"]: row["tokens_s"] for row in made if row["replicas"] == 1}
    for row in made:
        engines = max(1, row["replicas"])
        alike_load = single.get(row["concurrent"] // engines)
        share = row["tokens_s"] / engines
        row["efficiency"] = None if alike_load is None else round(share / alike_load, 3)
        row["best_efficiency"] = round(share / max(single.values()), 3) if single else None
    return made


def label(row: dict[str, Any]) -> str:
    """What a server is called."""
    if not row["replicas"]:
        return "engine in the server's process"
    return f"{row['replicas']} replica{'s' * (row['replicas'] > 1)}"


def table(made: Sequence[dict[str, Any]]) -> Table:
    """The rows for people."""
    shown = Table(
        "server", "at once", "tokens/s", "requests/s", "TTFT ms", "p95", "cached", "efficiency", "of the best"
    )
    for row in made:
        values = [row[name] for name in ("concurrent", "tokens_s", "requests_s", "ttft_ms", "ttft_p95_ms")]
        values += [f"{100 * row['cached_share']:.1f}%", row["efficiency"], row["best_efficiency"]]
        shown.add_row(label(row), *map(str, values))
    return shown


def part_of(
    args: argparse.Namespace, concurrent: int, seed: int = 1, steps: int | None = None, persistent: bool = False
) -> Part:
    """A load: `--waves` trajectories for each of the `concurrent`."""
    vocabulary = shape_named(args.shape).vocabulary
    count = concurrent if steps else concurrent * args.waves
    return Part(args.context, steps or args.steps, count, concurrent, vocabulary, seed, persistent)


def served_of(args: argparse.Namespace) -> Served:
    """What every server holds."""
    positions = trace_tokens(part_of(args, 1).trace()) + 1
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    return Served(args.shape, args.device, dtype, positions, args.seats, args.slots)


def server_words(served: Served, replicas: int) -> list[str]:
    """The command line of a server."""
    return ["--serve", json.dumps(vars(served)), "--replicas", str(replicas)]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises UserError naming an option that is out of range."""
    parser = argparse.ArgumentParser(
        prog="python -m lragent.bench replicas",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = parser.add_argument
    flag("--shape", default="tiny", help=f"of the model: {', '.join(SHAPES)} (default: tiny)")
    flag("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    flag(
        "--replicas", type=_numbers, default=(0, 1, 2), metavar="N,…", help="servers; 0: no --replicas (default: 0,1,2)"
    )
    flag("--concurrent", type=_numbers, default=(16, 32), metavar="N,…", help="trajectories at once (default: 16,32)")
    flag("--waves", type=int, default=2, help="trajectories for each of those at once (default: 2)")
    flag("--context", type=int, default=256, help="tokens of each tool call (default: 256)")
    flag("--steps", type=int, default=17, help="of a trajectory, at most 17 (default)")
    flag("--seats", type=int, default=64, help="requests that one engine runs at once (default: 64)")
    flag("--slots", type=int, help="tokens that one engine's cache holds (default: as many as fit)")
    flag("--clients", type=int, default=4, help="client processes (default: 4)")
    flag("--repeats", type=int, default=1, help="rounds (default: 1)")
    flag("--kill", action="store_true", help="also kill a replica of the largest server in the middle of a round")
    flag(
        "--output",
        type=Path,
        default=machine.RESULTS,
        metavar="DIR",
        help="where replicas-<machine>.json goes (bench/results)",
    )
    flag("--no-save", action="store_true", help="print the figures only")
    flag("--serve", help=argparse.SUPPRESS)
    flag("--client", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.concurrent) < 1:
        raise UserError(f"--concurrent: must be at least 1, not {min(args.concurrent)}.")
    for name in ("waves", "context", "steps", "seats", "clients", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: must be at least 1, not {getattr(args, name)}.")
    if args.kill and max(args.replicas) < 2:
        raise UserError("--kill: needs --replicas of 2 or more, so that one is left.")
    if args.device == "cuda" and max(args.replicas) > torch.cuda.device_count():
        raise UserError(f"--replicas: each takes a GPU, and there are {torch.cuda.device_count()}.")
    return args


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(word) for word in text.split(","))
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError("must be numbers from 0 on, with commas between them")
    return numbers
