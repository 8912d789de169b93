"""A study's parts made, by one process or by several side by side."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch
from tqdm import tqdm

from lragent.errors import LRAgentError, UserError
from lragent.eval.answers import read_answers
from lragent.eval.machines import note_machine
from lragent.eval.study.folder import StudyFolder
from lragent.eval.study.parts import Part, Shift, parts_of
from lragent.eval.study.plan import StudyPlan
from lragent.train.interrupt import InterruptedRun

GPU_SHARE = 0.96
"""Of the GPU's memory for what torch allocates in all processes together; the rest is for their contexts."""
WAIT_S = 0.5
"""Between two looks whether others have made what a part needs."""


def run_study(
    plan: StudyPlan, path: Path, *, processes: int, deadline: float, tell: Callable[[str], None], quiet: bool = False
) -> bool:
    """Make every part that `path` lacks, until `deadline` (of `time.monotonic`); returns whether all are there.

    Raises UserError where plan or folder cannot be used, and where a process has failed; what is made stays made.
    """
    folder = StudyFolder(path, plan)
    folder.begin()
    with tqdm(desc="answers", total=_wanted(plan), initial=_had(folder), unit="q", disable=quiet or None) as bar:
        if processes == 1:
            _work(folder, Shift(deadline, tell, bar.update))
        else:
            _side_by_side(folder, processes, deadline, tell, bar)
    return all(part.done() for part in parts_of(folder))


def _wanted(plan: StudyPlan) -> int:
    return len(plan.seeds) * sum(plan.asked(*cell) for cell in plan.cells())


def _had(folder: StudyFolder) -> int:
    plan = folder.plan
    paths = [folder.answers(seed, regime, mode) for seed in plan.seeds for regime, mode in plan.cells()]
    return sum(len(read_answers(path)) for path in paths if path.is_file())


def _work(folder: StudyFolder, shift: Shift) -> None:
    """Make one part after the other that no other process works on."""
    left = parts_of(folder)
    while (left := [part for part in left if not part.done()]) and time.monotonic() < shift.deadline:
        if not any(_made(part, folder, shift) for part in left if part.ready()):
            time.sleep(WAIT_S)  # what is left is others' work, or waits for it


def _made(part: Part, folder: StudyFolder, shift: Shift) -> bool:
    with folder.claim(part.name) as claimed:
        if not claimed or part.done():
            return False
        note_machine(folder.path)
        part.make(shift)
        return True


def _side_by_side(
    folder: StudyFolder, processes: int, deadline: float, tell: Callable[[str], None], bar: tqdm[None]
) -> None:
    """Each process has a pipe of its own to speak through: in one that they share, whoever is killed in the middle of a
    word would keep all others from speaking, and from ending."""
    context = multiprocessing.get_context("spawn")
    seconds = deadline - time.monotonic()
    workers: list[SpawnProcess] = []
    ears: list[Connection] = []
    try:
        for _ in range(processes):
            ear, mouth = context.Pipe(duplex=False)
            arguments = (folder.plan, folder.path, seconds, processes, mouth)
            workers.append(context.Process(target=_process, args=arguments))
            ears.append(ear)
            workers[-1].start()
            mouth.close()  # ours; with the worker's the pipe then ends
        _listen(ears, tell, bar)
        for worker in workers:
            worker.join()
    finally:
        begun = [worker for worker in workers if worker.pid is not None]
        for worker in begun:
            worker.terminate()
        for worker in begun:
            worker.join()
    if any(worker.exitcode for worker in workers):
        raise UserError("a process of the study has failed, as said above; the same command goes on with the rest.")


def _listen(ears: list[Connection], tell: Callable[[str], None], bar: tqdm[None]) -> None:
    """Until all have ended."""
    while ears:
        for ear in wait(ears):
            assert isinstance(ear, Connection)
            try:
                sentence = ear.recv()
            except (EOFError, OSError):  # it has ended, or was killed in the middle of a word
                ears.remove(ear)
                continue
            if sentence is None:
                bar.update()
            else:
                tell(sentence)


def _process(plan: StudyPlan, path: Path, seconds: float, processes: int, mouth: Connection) -> None:
    """One of several processes. Each ends when the one that started it does, and has its share of the cores and of the
    GPU's memory: torch gives back what it only keeps at hand before it asks for more."""
    os.setsid()  # a terminal's Ctrl-C is for the parent, which then ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(GPU_SHARE / processes)
    shift = Shift(time.monotonic() + seconds, mouth.send, lambda: mouth.send(None))
    try:
        _work(StudyFolder(path, plan), shift)
    except InterruptedRun as interrupted:
        raise SystemExit(128 + interrupted.number) from interrupted
    except LRAgentError as error:
        mouth.send(f"error: {error}")
        raise SystemExit(1) from error


def _end_with_parent() -> None:
    """Where the parent is killed nobody else would end us, and we would keep the GPU."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
