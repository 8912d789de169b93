"""The trace benchmark measures what was planned, keeps what it found, and says what failed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_adapter_set, save_tiny, tiny_model

from lragent.bench import matrix, peers
from lragent.bench.__main__ import main
from lragent.bench.clients import Cost
from lragent.bench.engines import Base, Counters, MeasuredEngine, Memory, NoRoomError
from lragent.bench.matrix import Limits, Matrix
from lragent.bench.playing import Load, Played, Record
from lragent.bench.roofline import Ceilings, Floor, ModelSize
from lragent.bench.shapes import SHAPES, shape_config
from lragent.bench.summary import Round, percentile, row, throughput, ttft_sum_s
from lragent.bench.trace_plan import Entry, MicroPlan, Plan, RunPlan
from lragent.errors import UserError
from lragent.models import fingerprint
from lragent.modes import SharingMode
from lragent.pack import write_pack

CPU = torch.device("cpu")
SHORT = ["--shape", "tiny", "--context", "8", "--steps", "3", "--repeats", "1", "--dtype", "float32"]
LR, NON = SharingMode.BASE_LR_SHARED, SharingMode.NON_SHARED


def run(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> dict[str, Any]:
    assert main(["trace", *words]) == status
    numbers: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return numbers


def record(trajectory: int, step: int, ttft: float, gaps: Sequence[float] = (), cost: Cost | None = None) -> Record:
    return Record(trajectory, step, "plan", 10, len(gaps) + 1, ttft, tuple(gaps), ttft + sum(gaps), cost or Cost())


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes seconds, and has a test of its own."""
    monkeypatch.setattr(Ceilings, "measure", lambda *_: peers.CEILINGS)


# -- what is measured ----------------------------------------------------------------------------------------------


def test_a_run_is_every_combination() -> None:
    entries = RunPlan(context=(8, 16), roles=(3, 4), concurrent=(1, 2), modes=(LR,)).entries()
    assert [(e.context, e.roles, e.load.concurrent) for e in entries] == [
        (c, r, n) for c in (8, 16) for r in (3, 4) for n in (1, 2)
    ]
    assert RunPlan(concurrent=(2,), trajectories=6).entries()[0].load == Load(6, 2)
    assert RunPlan(rate=(2.0,), trajectories=6).entries()[0].load == Load(6, 6, 2.0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"context": (0,)}, "context"),
        ({"roles": ()}, "roles"),
        ({"modes": ()}, "modes"),
        ({"rate": (1.0,)}, "trajectories"),
        ({"rate": (-1.0,), "trajectories": 3}, "rate"),
        ({"repeats": 0}, "repeats"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        RunPlan(**options)


def test_entries_share_engines_unless_told_otherwise() -> None:
    runs = (
        RunPlan(context=(8,), modes=(LR,)),
        RunPlan(context=(16,), modes=(NON,), own_engines=True),
        RunPlan(context=(32,), modes=(NON,)),
        RunPlan(roles=(4,)),
    )
    groups = Plan(runs, MicroPlan(mode=NON)).groups()
    assert [[entry.context for entry in group.entries] for group in groups] == [[8, 32], [16], [256]]
    assert groups[0].modes == [NON, LR]
    assert groups[0].of(LR).micro is None
    assert groups[0].of(NON).micro is not None
    assert [group.micro is None for group in groups] == [False, True, True]
    assert Plan((), MicroPlan()).groups()[0].roles == 3


# -- figures -------------------------------------------------------------------------------------------------------


def test_figures() -> None:
    played = Played([record(0, 0, 1.0), record(0, 1, 2.0), record(1, 0, 4.0), record(1, 1, 5.0), record(2, 0, 9.0)])
    assert ttft_sum_s(played, 2) == 6.0  # of 3 and 9; the third never came to its end
    assert math.isnan(ttft_sum_s(Played(), 2))
    assert throughput(Played([record(0, 0, 1.0)], tokens=300, wall_s=2.0)) == 150
    assert math.isnan(throughput(Played(wall_s=2.0)))
    values = [float(n) for n in range(1, 201)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([7.0], 0.99)) == (100, 198, 7)


def test_a_row_is_the_median_of_its_rounds() -> None:
    entry = Entry(8, 3, Load(), (LR,), 3, steps=1)
    plays = [Played([record(0, 0, t, [t / 10])], [], wall_s=t, tokens=544) for t in (3.0, 1.0, 2.0)]
    rounds = [Round(p, Memory(5, 10 * i, 1, None, 9), Counters(1, 0, 2)) for i, p in enumerate(plays)]
    found = row("ours", "base_lr_shared", entry, rounds, Floor(1.0, 0.05, 0.5))
    assert (found["tokens_s"], found["ttft_sum_s"], found["gap_ms"], found["gap_p99_ms"]) == (272, 2.0, 200, 200)
    assert found["floor"] == {"tokens_s": 544 / 0.5, "ttft_sum_s": 1.0, "gap_ms": 50}
    assert found["share"] == {"tokens_s": 0.25, "ttft_sum_s": 0.5, "gap_ms": 0.25}
    assert found["memory"] == {"weights": 5, "base": 20, "lr": 1, "other": None, "reserved": 9}
    assert (found["preempted"], found["lr_evicted"], found["computed"]) == (3, 6, None)


def test_the_table_of_peers() -> None:
    size = ModelSize.of(shape_config(SHAPES[peers.SHAPE]), torch.bfloat16)
    ours = {"mode": "base_lr_shared", "rate": None, "context": 1024, "concurrent": 1, "trajectories": 1, "roles": 3,
            "tokens": 5008, "tokens_s": 2034 * 1.2, "ttft_sum_s": 0.3}  # fmt: skip
    three, one = peers.compare([ours], size, peers.CEILINGS)
    assert (three.adapters, three.wanted, three.reached, three.theirs) == (3, None, None, 1725)
    assert (one.factor, one.even_factor, one.wanted, one.reached) == (1.2, 1.2, 1.1, True)
    # On a machine of half the speed theirs would be half as fast.
    half = replace(peers.CEILINGS, copy=1.5e12, products=395e12)
    assert peers.compare([{**ours, "tokens_s": 1017}], size, half)[1].even_factor == 1.0
    assert peers.compare([{**ours, "tokens_s": 1017}], size, half)[1].reached is False
    for other in ({"mode": "non_shared"}, {"context": 300}, {"tokens": 900}, {"rate": 1.0}, {"trajectories": 2}):
        assert peers.compare([{**ours, **other}], size, half) == []
    eight = {**ours, "roles": 8, "context": 4096, "tokens": 17_296}
    assert [found.adapters for found in peers.compare([eight], size, half)] == [8]
    assert set(peers.WANTED) <= {(peer.context, peer.concurrent) for peer in peers.ROWS if peer.adapters == 1}


# -- the command ---------------------------------------------------------------------------------------------------


def test_all_modes_in_turns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = tmp_path / "records.jsonl"
    words = [*SHORT, "--context", "8,16", "--output", str(tmp_path / "out"), "--records", str(lines)]
    numbers = run(capsys, *words)
    rows = numbers["rows"]
    assert [(row["context"], row["mode"]) for row in rows] == [(c, str(m)) for c in (8, 16) for m in SharingMode]
    assert all(row["turns"] and row["tokens"] == 576 and row["tokens_s"] > 0 for row in rows)
    assert all(0 < row["share"][name] < 1 for row in rows for name in ("tokens_s", "ttft_sum_s", "gap_ms"))
    computed = {row["mode"]: row["computed"] for row in rows}
    assert computed["base_lr_shared"] == computed["full_shared"] == 512 + 9 + 9
    assert computed["non_shared"] == computed["base_shared"] == 512 + 9 + 568
    assert all(row["needed"] == row["computed"] for row in rows)
    (saved,) = (tmp_path / "out").glob("trace-*.json")
    assert json.loads(saved.read_text())["rows"] == rows
    assert saved.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(records) == 8 * 3
    assert {name: records[0][name] for name in ("system", "round", "step", "prompt", "generated")} == {
        "system": "non_shared", "round": 1, "step": 0, "prompt": 512, "generated": 32,
    }  # fmt: skip
    assert len(records[0]["gaps_s"]) == 31
    assert records[0]["cost"]["computed"] == 512


def test_more_roles_many_at_once_and_arrivals(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run(capsys, *SHORT, "--no-save", "--roles", "4", "--concurrent", "2", "--modes", "base_lr_shared")["rows"]
    assert (row["roles"], row["trajectories"], row["computed"]) == (4, 2, 2 * 530)
    words = ["--rate", "50", "--trajectories", "3", "--modes", "full_shared"]
    (row,) = run(capsys, *SHORT, "--no-save", *words)["rows"]
    assert (row["rate"], row["trajectories"], row["floor"]["tokens_s"]) == (50.0, 3, None)
    assert row["share"]["ttft_sum_s"] is not None


def test_one_mode_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(capsys, *SHORT, "--no-save", "--one-at-a-time", "--modes", "base_lr_shared,non_shared")["rows"]
    assert [(row["mode"], row["turns"]) for row in rows] == [("base_lr_shared", False), ("non_shared", False)]


def test_single_figures(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--micro-only", "--micro-contexts", "32,64", "--micro-batch", "3,40", "--micro-prompt", "96"]
    numbers = run(capsys, *SHORT, "--no-save", *words)
    assert numbers["rows"] == []
    figures = {figure["figure"]: figure for figure in numbers["micro"]}
    assert list(figures) == [
        "decode at 32", "first token after 8 new at 32", "decode at 64", "first token after 8 new at 64",
        "3 sequences at 40", "prefill of 96", "host's share of a step",
    ]  # fmt: skip
    for name, figure in figures.items():
        assert (figure["value"] is None) == (name == "host's share of a step")
    assert figures["prefill of 96"]["tflops"] > 0
    assert figures["first token after 8 new at 64"]["decode_steps"] > 0


def test_a_plan_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    runs = [{"context": [8], "steps": 2, "repeats": 1, "modes": [mode]} for mode in ("full_shared", "base_shared")]
    plan.write_text(json.dumps({"runs": [*runs, {**runs[0], "roles": [2], "concurrent": [2]}]}))
    rows = run(capsys, "--shape", "tiny", "--plan", str(plan), "--no-save")["rows"]
    assert [(row["mode"], row["roles"]) for row in rows] == [("full_shared", 3), ("base_shared", 3), ("full_shared", 2)]
    (row,) = run(capsys, "--shape", "tiny", "--plan", str(plan), "--no-save", "--only", "2")["rows"]
    assert row["mode"] == "base_shared"
    assert main(["trace", "--shape", "tiny", "--plan", str(plan), "--only", "4"]) == 2
    assert "--only" in capsys.readouterr().err
    plan.write_text("runs: [{contexts: [8]}]")
    assert main(["trace", "--shape", "tiny", "--plan", str(plan)]) == 2
    assert "contexts" in capsys.readouterr().err


def test_a_time_limit_leaves_out_what_comes_last(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = run(capsys, *SHORT, "--no-save", "--time-limit", "0", "--modes", "full_shared")
    assert numbers["rows"] == []
    assert numbers["skipped"] == ["full_shared, 576 tokens, 3 roles"]


def test_a_model_and_its_pack(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder, pack = save_tiny(tmp_path / "tiny"), tmp_path / "team.safetensors"
    write_pack(pack, replace(make_adapter_set(tiny_model()), base_fingerprint=fingerprint(folder)))
    words = ["--model", str(folder), "--pack", str(pack), *SHORT[2:], "--no-save", "--modes", "base_lr_shared"]
    assert run(capsys, *words)["rows"][0]["failures"] == []
    assert main(["trace", *words, "--roles", "5"]) == 2
    assert "--pack" in capsys.readouterr().err


def test_failures_are_named_and_change_the_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no power")

    made: list[MeasuredEngine] = []
    init = MeasuredEngine.__init__

    def spoilt(self: MeasuredEngine, *args: Any) -> None:
        init(self, *args)
        made.append(self)
        self._engine.step = broken  # type: ignore[method-assign]

    monkeypatch.setattr(MeasuredEngine, "__init__", spoilt)
    numbers = run(capsys, *SHORT, "--no-save", "--modes", "full_shared", status=1)
    warm_up, counted = numbers["failures"]
    assert "full_shared, 576 tokens" in warm_up
    assert "no power" in warm_up
    assert "no power" in counted
    assert numbers["rows"][0]["tokens_s"] is None


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def begins(self, *_: Any) -> None: ...
    def answered(self) -> None: ...
    def records(self, *_: Any) -> None: ...
    def keeps(self, *_: Any) -> None: ...
    def tells(self, sentence: str) -> None:
        self.said.append(sentence)


def test_modes_that_do_not_fit_side_by_side_come_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SharingMode] = []

    def engine(base: Base, model: Any, mode: SharingMode, roles: int, options: Any, strict: bool = False) -> Any:
        if strict and made:
            raise NoRoomError("full")
        made.append(mode)
        return MeasuredEngine(base, model, mode, roles, options, strict)

    monkeypatch.setattr(matrix, "MeasuredEngine", engine)
    listener = Listener()
    measured = Matrix(None, Limits(), listener, seed=0)
    plan = Plan((RunPlan(context=(8,), steps=1, repeats=1, modes=(LR, NON)),))
    measured.engines(Base(CPU, torch.float32, SHAPES["tiny"]), plan)
    assert made == [LR, LR, NON]
    assert [(row["mode"], row["turns"]) for row in measured.found.rows] == [(str(LR), False), (str(NON), False)]
    assert any("do not fit" in sentence for sentence in listener.said)


def test_caches_that_cannot_fit_together_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []

    def engine(base: Base, model: Any, mode: SharingMode, roles: int, options: Any, strict: bool = False) -> Any:
        made.append(strict)
        return MeasuredEngine(base, model, mode, roles, options, strict)

    monkeypatch.setattr(matrix, "MeasuredEngine", engine)
    monkeypatch.setattr(matrix, "cache_room", lambda _: 1000)
    measured = Matrix(None, Limits(), Listener(), seed=0)
    plan = Plan((RunPlan(context=(8,), steps=1, repeats=1, modes=(LR, NON)),))
    measured.engines(Base(CPU, torch.float32, SHAPES["tiny"]), plan)
    assert made == [False, False]


def test_caches_hold_what_their_mode_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    slots: dict[SharingMode, int] = {}

    def engine(base: Base, model: Any, mode: SharingMode, roles: int, options: Any, strict: bool = False) -> Any:
        slots[mode] = options.slots
        return MeasuredEngine(base, model, mode, roles, options, strict)

    monkeypatch.setattr(matrix, "MeasuredEngine", engine)
    measured = Matrix(None, Limits(), Listener(), seed=0)
    plan = Plan((RunPlan(context=(300,), concurrent=(3,), steps=7, repeats=1, modes=(LR, NON)),))
    measured.engines(Base(CPU, torch.float32, SHAPES["tiny"]), plan)
    (entry,) = plan.entries()
    assert slots == {mode: entry.slots(mode) for mode in (LR, NON)}
    assert all(row["base_evicted"] == 0 and row["needed"] == row["computed"] for row in measured.found.rows)


def test_every_round_of_every_entry_has_tokens_of_its_own() -> None:
    """An endpoint keeps its cache: the same tokens under another load would be found there."""

    class Endless:
        name, mode, role_names = "theirs", NON, ("plan", "action", "reflect")

        def __init__(self) -> None:
            self.seeds: list[int] = []

        def play(self, trace: Any, load: Load, *, seed: int, progress: Any) -> Played:
            self.seeds.append(seed)
            return Played([record(0, 0, 1.0)], wall_s=1.0)

        def begin(self) -> None: ...
        def memory(self) -> None: ...
        def counters(self) -> None: ...

    systems = [Endless(), Endless()]
    measured = Matrix(None, Limits(), Listener(), seed=0)
    for entry in RunPlan(context=(8, 16), concurrent=(1, 2), repeats=2).entries():
        measured.measure(systems, entry)
    assert systems[0].seeds == systems[1].seeds  # within a round all are given the same
    assert len(set(systems[0].seeds)) == 4 * 3


def test_an_engine_that_cannot_be_built_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(base: Base, model: Any, mode: SharingMode, *rest: Any) -> Any:
        if mode is LR:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return MeasuredEngine(base, model, mode, *rest)

    monkeypatch.setattr(matrix, "MeasuredEngine", engine)
    measured = Matrix(None, Limits(one_at_a_time=True), Listener(), seed=0)
    plan = Plan((RunPlan(context=(8,), steps=1, repeats=1, modes=(LR, NON)),))
    measured.engines(Base(CPU, torch.float32, SHAPES["tiny"]), plan)
    assert [row["mode"] for row in measured.found.rows] == [str(NON)]
    assert "too much" in measured.found.failures[0]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "--shape"),
        (["--shape", "gpt"], "llama-3.1-8b"),
        (["--shape", "tiny", "--model", "x"], "--model"),
        (["--shape", "tiny", "--pack", "x"], "--pack"),
        (["--shape", "tiny", "--context", "0"], "--context"),
        (["--shape", "tiny", "--device", "tpu"], "--device"),
        (["--shape", "tiny", "--token-budget", "0"], "--token-budget"),
        (["--base-url", "http://x/v1"], "--model-names"),
        (["--base-url", "http://x/v1", "--model-names", "a,b,c", "--micro"], "--micro"),
    ],
)
def test_what_cannot_be_measured_is_said(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", *words]) == 2
    assert named in capsys.readouterr().err


def test_an_endpoint_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--base-url", "http://127.0.0.1:9/v1", "--model-names", "a,b,c", "--steps", "2", "--repeats", "1"]
    numbers = run(capsys, *words, "--no-save", "--label", "theirs", status=1)
    assert numbers["roofline"] is None
    assert (numbers["rows"][0]["system"], numbers["rows"][0]["mode"]) == ("theirs", "non_shared")
    assert "127.0.0.1:9" in numbers["failures"][0]
