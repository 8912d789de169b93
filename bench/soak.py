"""A server under load for a long time: does anything leak, hang or go unanswered?

    python -m lragent.bench soak --minutes 30

Starts `lragent serve` on loopback over a small model with random weights, a ledger and reloadable roles, lets Locust's
users of `bench/load.py` at it, and watches the server's memory, files, threads and slots meanwhile. At the end, when
all is quiet, nothing may be held, and the ledger must agree with the engine's counters to the token.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from lragent.bench.machine import facts, save
from lragent.bench.shapes import Shape, random_model
from lragent.bench.traces import random_roles
from lragent.errors import UserError
from lragent.models import fingerprint, load_tokenizer, resolve_model
from lragent.pack import write_pack

SHAPE = Shape("llama", 2, 64, 96, 4, 2, 16, 49_152, tied=True)
"""Small, so that many requests go through in the time; the vocabulary is the embedded tokenizer's."""
ROLES = ("plan", "action", "reflect", "extra")
SERVED = ("plan", "action", "reflect")
LOOKS_S = 5.0
PREFIX = "lragent: serving on "
QUIET_S = 30.0
"""So long the server may take to let go of what the load has left."""
MEMORY_GROWTH = 0.10
"""Of the memory held after a fifth of the time: how much more it may be at the end."""


WARM_MIN = 5.0
"""Minutes below which memory may still grow because all is new."""


def prepare(folder: Path) -> Path:
    """A model with the embedded tokenizer, and packs of its roles in a folder of roles. Gives that folder."""
    model = random_model(SHAPE, torch.device("cpu"), torch.float32, positions=2048)
    model.save_pretrained(folder / "model")
    load_tokenizer(resolve_model(None)).save_pretrained(folder / "model")
    roles = folder / "roles"
    roles.mkdir()
    first = dataclasses.replace(random_roles(model, ROLES), base_fingerprint=fingerprint(folder / "model"))
    # The same A, so that they may take each other's places, and other B's.
    other = {path: b.roll(1, dims=0) * 1.5 for path, b in first.role_b.items()}
    write_pack(roles / "first.safetensors", first)
    write_pack(roles / "second.safetensors", dataclasses.replace(first, role_b=other))
    at = [first.role_index(name) for name in SERVED]
    served = dataclasses.replace(
        first,
        roles=tuple(first.roles[i] for i in at),
        role_b={path: b[at] for path, b in first.role_b.items()},
    )
    write_pack(roles / "team.safetensors", served)
    return roles


def start(folder: Path, roles: Path, port: int = 0) -> tuple[subprocess.Popen[str], str]:
    """The server's process and its URL."""
    words = [
        sys.executable, "-m", "lragent.cli.main", "serve", "--model", str(folder / "model"),
        "--roles", str(roles / "team.safetensors"), "--roles-folder", str(roles), "--max-roles", "6",
        "--ledger", str(folder / "ledger.sqlite"), "--port", str(port), "--device", "cpu", "--log-level", "warning",
        "--max-model-len", "2048", "--max-tokens-in-cache", "16384",
    ]  # fmt: skip
    log = (folder / "server.log").open("w")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith(PREFIX):
        process.kill()
        raise UserError(f"the server did not start: {(folder / 'server.log').read_text()[-500:]}")
    return process, line.removeprefix(PREFIX).strip()


class Watched:
    """The server's process, seen from outside."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self._process = psutil.Process(process.pid)
        self._http = httpx.Client(base_url=url, timeout=60.0, trust_env=False)
        self.looks: list[dict[str, float]] = []

    def look(self) -> dict[str, float]:
        """One look, which is kept."""
        state = self._http.get("/page/state.json").json()
        with self._process.oneshot():
            seen = {
                "at": time.monotonic(),
                "rss_mib": self._process.memory_info().rss / 2**20,
                "files": self._process.num_fds(),
                "threads": self._process.num_threads(),
            }
        cache, totals = state["cache"], state["totals"]
        seen |= {name: totals[name] for name in ("requests", "running", "waiting", "generated", "prompt_tokens")}
        seen |= {"slots_used": cache["slots_used"], "slots_cached": cache["slots_cached"]}
        self.looks.append(seen)
        return seen

    def quiet(self) -> dict[str, float]:
        """A look when nothing runs any more. Raises AssertionError where something still does."""
        end = time.monotonic() + QUIET_S
        while True:
            seen = self.look()
            if not seen["running"] and not seen["waiting"] and seen["slots_used"] == seen["slots_cached"]:
                return seen
            assert time.monotonic() < end, f"something is still held: {seen}"
            time.sleep(0.5)

    def agree(self) -> dict[str, Any]:
        """The ledger's sums, which must be the engine's counters."""
        usage = self._http.get("/v1/usage", params={"run": "current"}).json()["total"]
        totals = self._http.get("/page/state.json").json()["totals"]
        for ours, theirs in (
            ("requests", "requests"), ("prompt_tokens", "prompt_tokens"), ("tokens_computed", "tokens_computed"),
            ("base_reused", "base_reused"), ("lr_reused", "lr_reused"), ("generated", "generated"),
        ):  # fmt: skip
            assert usage[ours] == totals[theirs], f"{ours}: the ledger says {usage[ours]}, the engine {totals[theirs]}"
        return dict(usage)


def run(minutes: float, users: int, folder: Path) -> dict[str, Any]:
    """The soak; gives its numbers. Raises AssertionError naming what went wrong."""
    roles = prepare(folder)
    server, url = start(folder, roles)
    try:
        watched = Watched(server, url)
        before = watched.look()
        env = os.environ | {"LRAGENT_LOAD_PACKS": "first.safetensors,second.safetensors"}
        words = [
            sys.executable, "-m", "locust", "-f", str(Path(__file__).with_name("load.py")), "--headless", "--host", url,
            "--users", str(users), "--spawn-rate", "4", "--run-time", f"{round(60 * minutes)}s", "--stop-timeout", "60",
            "--csv", str(folder / "load"), "--only-summary",
        ]  # fmt: skip
        began = time.monotonic()
        with (folder / "load.log").open("w") as log:
            load = subprocess.Popen(words, stdout=log, stderr=log, env=env)
            try:
                while load.poll() is None:
                    time.sleep(LOOKS_S)
                    assert server.poll() is None, "the server has ended"
                    seen = watched.look()
                    _progress(time.monotonic() - began, 60 * minutes, seen)
            finally:
                load.kill()
        seconds = time.monotonic() - began
        after = watched.quiet()
        usage = watched.agree()
        rows = _rows(folder / "load_stats.csv")
        failures = _failures(folder / "load_failures.csv")
        server.terminate()
        status = server.wait(60)
    finally:
        server.kill()
    early = watched.looks[len(watched.looks) // 5]
    growth = after["rss_mib"] / early["rss_mib"] - 1.0
    said = (folder / "server.log").read_text()
    return {
        "minutes": seconds / 60,
        "users": users,
        "requests": sum(row["requests"] for row in rows if row["name"] != "Aggregated"),
        "requests_per_s": sum(row["requests"] for row in rows if row["name"] != "Aggregated") / seconds,
        "generated_per_s": after["generated"] / seconds,
        "prompt_tokens_per_s": after["prompt_tokens"] / seconds,
        "by_kind": rows,
        "failures": failures,
        "ledger": usage,
        "ended": endings(folder / "ledger.sqlite"),
        "memory": {"before": before["rss_mib"], "early": early["rss_mib"], "after": after["rss_mib"], "growth": growth},
        "files": {
            "before": before["files"],
            "most": max(look["files"] for look in watched.looks),
            "after": after["files"],
        },
        "threads": {"before": before["threads"], "after": after["threads"]},
        "slots_held_at_the_end": after["slots_used"] - after["slots_cached"],
        "exit_status": status,
        "server_log": said[-2000:],
        "looks": [{name: round(value, 1) for name, value in look.items()} for look in watched.looks[::12]],
    }


def endings(ledger: Path) -> dict[str, int]:
    """How requests ended, by the ledger."""
    with contextlib.closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as connection:
        return dict(connection.execute("SELECT finish, COUNT(*) FROM entries GROUP BY finish"))


def faults(numbers: dict[str, Any]) -> list[str]:
    """What must not have been."""
    found = [f"{each['name']}: {each['error']} ({each['times']} times)" for each in numbers["failures"]]
    if numbers["minutes"] >= WARM_MIN and numbers["memory"]["growth"] > MEMORY_GROWTH:
        found.append(f"memory grew by {numbers['memory']['growth']:.1%}")
    if numbers["files"]["after"] > numbers["files"]["before"] + 8:
        found.append(f"files are left open: {numbers['files']}")
    if numbers["slots_held_at_the_end"]:
        found.append(f"{numbers['slots_held_at_the_end']} slots are held")
    if numbers["exit_status"]:
        found.append(f"the server ended with {numbers['exit_status']}")
    if "Traceback" in numbers["server_log"]:
        found.append("the server's log has a traceback")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        return [
            {
                "name": row["Name"],
                "requests": int(row["Request Count"]),
                "failures": int(row["Failure Count"]),
                "median_ms": float(row["Median Response Time"] or 0),
                "p99_ms": float(row["99%"] if row["99%"] not in ("", "N/A") else 0),
                "longest_ms": float(row["Max Response Time"]),
            }
            for row in csv.DictReader(file)
        ]


def _failures(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        return [
            {"name": row["Name"], "error": row["Error"], "times": int(row["Occurrences"])}
            for row in csv.DictReader(file)
        ]


def _progress(seconds: float, whole: float, seen: dict[str, float]) -> None:
    print(
        f"\r{seconds / 60:5.1f} of {whole / 60:.0f} min: {seen['requests']:,.0f} requests, {seen['rss_mib']:,.0f} MiB, "
        f"{seen['files']:.0f} files, {seen['running']:.0f} run, {seen['waiting']:.0f} wait ",
        end="",
        file=sys.stderr,
        flush=True,
    )


def main(argv: Sequence[str]) -> int:
    """Returns 1 where something leaked, hung or went unanswered."""
    parser = argparse.ArgumentParser(prog="python -m lragent.bench soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--save", action="store_true", help="keep the numbers in bench/results")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        numbers = run(args.minutes, args.users, Path(place))
    print(file=sys.stderr)
    found = faults(numbers)
    numbers = {**facts(torch.device("cpu")), "faults": found, **numbers}
    print(json.dumps({name: value for name, value in numbers.items() if name != "looks"}, indent=1))
    if args.save:
        print(f"saved as {save('soak', numbers)}")
    for each in found:
        print(f"fault: {each}", file=sys.stderr)
    return 1 if found else 0
