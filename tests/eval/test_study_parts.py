"""Who makes a study's parts, in which order and until when; and what a study's folder takes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_answers import answer

from lragent.config import load_config
from lragent.errors import UserError
from lragent.eval.answers import AnswerFile
from lragent.eval.study import work
from lragent.eval.study.folder import PLAN, StudyFolder
from lragent.eval.study.parts import AnswersPart, PackPart, Part, Shift, WorldPart, parts_of
from lragent.eval.study.plan import StudyPlan
from lragent.modes import SharingMode

SMALL = ("level=demo", "train=20", "test=4", "questions=2", "modes=[non_shared,base_lr_shared]")
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def planned(*words: str) -> StudyPlan:
    return load_config(StudyPlan, None, [*SMALL, *words])


def begun(path: Path, *words: str) -> StudyFolder:
    folder = StudyFolder(path, planned(*words))
    folder.begin()
    return folder


def shift(deadline: float = float("inf")) -> Shift:
    return Shift(deadline, lambda sentence: None, lambda: None)


@dataclass(frozen=True)
class Chore:
    """A part that takes a moment and writes down who made it."""

    folder: StudyFolder
    name: str
    needs: str = ""
    moment: float = 0.01
    deadly: bool = False

    def file(self, name: str) -> Path:
        return self.folder.path / f"{name}.made"

    def done(self) -> bool:
        return self.file(self.name).exists()

    def ready(self) -> bool:
        return not self.needs or self.file(self.needs).exists()

    def make(self, shift: Shift) -> None:
        assert self.ready()
        with (self.folder.path / "log").open("a") as log:
            log.write(f"{self.name} {os.getpid()}\n")
        if self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.moment)
        self.file(self.name).touch()


def log_of(folder: StudyFolder) -> list[list[str]]:
    return [line.split() for line in (folder.path / "log").read_text().splitlines()]


def put(monkeypatch: pytest.MonkeyPatch, chores: Sequence[Chore]) -> None:
    monkeypatch.setattr(work, "parts_of", lambda folder: list(chores))
    monkeypatch.setattr(work, "WAIT_S", 0.01)


def process_on(folder: StudyFolder) -> Any:
    worker = multiprocessing.get_context("fork").Process(target=work._work, args=(folder, shift()))
    worker.start()
    return worker


# -- who makes what ------------------------------------------------------------------------------------------------


@forks
@pytest.mark.timeout(60)
def test_several_processes_make_each_part_once_and_what_it_needs_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tmp_path / "s")
    firsts = [Chore(folder, f"first-{n}") for n in range(8)]
    put(monkeypatch, [Chore(folder, f"then-{n}", needs=f"first-{n}") for n in range(8)] + firsts)
    workers = [process_on(folder) for _ in range(4)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    names = [name for name, _ in log_of(folder)]
    assert sorted(names) == sorted(f"{kind}-{n}" for kind in ("first", "then") for n in range(8))
    assert len({pid for _, pid in log_of(folder)}) > 1, "they shared the work"


@forks
@pytest.mark.timeout(60)
def test_a_part_whose_maker_was_killed_is_made_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begun(tmp_path / "s")
    put(monkeypatch, [Chore(folder, "one", deadly=True)])
    killed = process_on(folder)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    put(monkeypatch, [Chore(folder, "one")])
    work._work(folder, shift())
    assert [(name, int(pid) == os.getpid()) for name, pid in log_of(folder)] == [("one", False), ("one", True)]


def test_a_claim_is_one_s_own_until_its_block_ends(tmp_path: Path) -> None:
    folder = begun(tmp_path / "s")
    with folder.claim("seed 0, world") as mine:
        assert mine
        with folder.claim("seed 0, world") as other, folder.claim("seed 1, world") as another:
            assert (other, another) == (False, True)
    with pytest.raises(ZeroDivisionError), folder.claim("seed 0, world"):
        _ = 1 / 0
    with folder.claim("seed 0, world") as again:
        assert again


def test_nothing_is_begun_after_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begun(tmp_path / "s")
    put(monkeypatch, [Chore(folder, "one", moment=0.2), Chore(folder, "two")])
    work._work(folder, shift(time.monotonic() - 1))
    assert not (folder.path / "log").exists()
    work._work(folder, shift(time.monotonic() + 0.1))
    assert [name for name, _ in log_of(folder)] == ["one"], "what was begun is ended"
    work._work(folder, shift())
    assert [name for name, _ in log_of(folder)] == ["one", "two"]


def test_who_waits_for_others_gives_up_at_the_end_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begun(tmp_path / "s")
    put(monkeypatch, [Chore(folder, "one"), Chore(folder, "two", needs="one")])
    with folder.claim("one") as mine:
        assert mine
        work._work(folder, shift(time.monotonic() + 0.1))
    assert not (folder.path / "log").exists()


# -- what needs what -----------------------------------------------------------------------------------------------


def touched(path: Path, content: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_parts_are_ready_once_what_they_need_is_there(tmp_path: Path) -> None:
    folder = begun(tmp_path / "s", "seeds=[3,4]", "regimes=[healed,shared]")
    parts = parts_of(folder)
    assert len(parts) == 2 * (1 + 3 + 2 * 2)
    for part in parts:  # in this order each is ready when its turn comes
        assert part.ready()
        assert not part.done()
        _made(part)
        assert part.done()


def _made(part: Part) -> None:
    if isinstance(part, WorldPart):
        part.folder.world(part.seed).mkdir(parents=True)
    elif isinstance(part, PackPart):
        touched(part.folder.facts(part.seed, part.regime))
    else:
        assert isinstance(part, AnswersPart)
        with AnswerFile(part.folder.answers(part.seed, part.regime, part.mode)) as file:
            for number in range(2):
                file.add(answer(number))


def test_a_pack_without_its_facts_is_not_trained_yet(tmp_path: Path) -> None:
    folder = begun(tmp_path / "s", "regimes=[healed]")
    world, apart, healed, *answers = parts_of(folder)
    assert [part.name for part in (world, apart, healed)] == [
        "seed 0, world", "seed 0, apart, training", "seed 0, healed, training",
    ]  # fmt: skip
    _made(world)
    touched(folder.pack(0, "apart"))
    assert (apart.done(), healed.ready()) == (False, False)
    _made(apart)
    assert healed.ready()
    touched(folder.answers(0, "healed", answers[0].mode), "{}\n{")  # type: ignore[attr-defined]
    assert not answers[0].done(), "half a line is no answer"


def test_another_training_does_not_go_on_with_answers(tmp_path: Path) -> None:
    """As where answers were saved from a machine that is gone, and the packs were not."""
    folder = begun(tmp_path / "s", "regimes=[shared]")
    path = folder.answers(0, "shared", SharingMode.BASE_LR_SHARED)
    touched(path)
    begun(tmp_path / "s", "regimes=[shared]")  # none is in it yet
    touched(path, "an answer\n")
    with pytest.raises(
        UserError, match=r"base_lr_shared\.jsonl: was answered by a pack that is not here; bring shared"
    ):
        begun(tmp_path / "s", "regimes=[shared]")
    begun(tmp_path / "s", "regimes=[mixed]")
    touched(folder.facts(0, "shared"))
    begun(tmp_path / "s", "regimes=[shared]")


def test_what_was_broken_off_is_not_done_however_much_there_is(tmp_path: Path) -> None:
    folder = begun(tmp_path / "s", "regimes=[shared]")
    part = AnswersPart(folder, 0, "shared", SharingMode.NON_SHARED)
    with AnswerFile(folder.answers(0, "shared", part.mode)) as file:
        for number in (0, 2, 3):
            file.add(answer(number))
        assert not part.done(), "two are asked, and the second is open"
        file.add(answer(1))
    assert part.done()


# -- the folder ----------------------------------------------------------------------------------------------------


def test_a_folder_names_all_that_was_begun_in_it(tmp_path: Path) -> None:
    begun(tmp_path / "s", "seeds=[0]", "regimes=[shared]", "asking.workers=3")
    begun(tmp_path / "s", "seeds=[1]", "regimes=[mixed,shared]", "modes=[full_shared]", "asking.workers=5")
    plan = load_config(StudyPlan, tmp_path / "s" / PLAN)
    assert (plan.seeds, plan.regimes) == ((0, 1), ("shared", "mixed"))
    assert plan.modes == ("non_shared", "base_lr_shared", "full_shared")
    assert plan.asking.workers == 5


@pytest.mark.timeout(60)
def test_many_that_begin_at_once_are_all_named(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=begun, args=(tmp_path / "s", f"seeds=[{n}]", "regimes=[shared]")) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(load_config(StudyPlan, tmp_path / "s" / PLAN).seeds) == list(range(8))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("level=easy", "level"), ("train=21", "train"), ("test=5", "test"), ("training.lr=1", "training"),
        ("asking.iterations=9", "asking.iterations"),
    ],
)  # fmt: skip
def test_what_answers_depend_on_may_not_change(change: str, name: str, tmp_path: Path) -> None:
    begun(tmp_path / "s")
    before = (tmp_path / "s" / PLAN).read_bytes()
    with pytest.raises(UserError, match=f"another `{name}`"):
        begun(tmp_path / "s", change)
    assert (tmp_path / "s" / PLAN).read_bytes() == before


def test_places_that_are_no_study_s_are_refused(tmp_path: Path) -> None:
    touched(tmp_path / "file")
    touched(tmp_path / "other" / "thesis.tex")
    with pytest.raises(UserError, match="file: is a file"):
        begun(tmp_path / "file")
    with pytest.raises(UserError, match="other: holds files that are no study's"):
        begun(tmp_path / "other")


def test_a_study_that_was_killed_while_it_began_can_be_begun(tmp_path: Path) -> None:
    touched(tmp_path / "s" / ".tmp-plan.yaml-x1")
    begun(tmp_path / "s")
    (tmp_path / "s" / PLAN).unlink()
    begun(tmp_path / "s")


# -- the plan ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("training.epochs=0", "training: epochs: must be at least 1, not 0"),
        ("training.lr=0", "training: lr: must be above 0"),
        ("asking.workers=5000", "asking: workers: must be at most 1024"),
        ("regimes=[none]", "regimes: there is no 'none'"),
        ("questions_of={none: 2}", "questions_of: there is no 'none'"),
        ("questions_of={mixed.none: 2}", r"questions_of\.mixed\.none: there is no mode 'none'"),
        (
            "questions_of={mixed.full_shared: 9}",
            r"questions_of\.mixed\.full_shared: must be from 1 to the test world's 4",
        ),
        ("questions=5", "questions: must be from 1 to the test world's 4"),
        ("seeds=[]", "seeds: must name at least one"),
        ("seeds=[1,1]", "seeds: must name at least one, and none twice"),
        ("level=none", "level: there is no level 'none'"),
    ],
)
def test_a_plan_that_could_not_be_made_is_refused_before_anything_is(word: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        planned(word)


def test_a_regime_in_one_mode_is_asked_what_is_said_of_it_most_closely() -> None:
    plan = planned("questions_of={mixed: 4, mixed.base_lr_shared: 1}")
    asked = {(regime, mode.value): plan.asked(regime, mode) for regime, mode in plan.cells()}
    assert asked["mixed", "non_shared"] == 4
    assert asked["mixed", "base_lr_shared"] == 1
    assert asked["shared", "non_shared"] == 2


@pytest.mark.parametrize("word", ["train=9", "training.heal_held_out=20"])
def test_healing_needs_trajectories_to_learn_from_and_to_measure_on(word: str) -> None:
    with pytest.raises(UserError, match=r"training\.heal_held_out"):
        planned(word)
    assert planned(word, "regimes=[shared]").regimes == ("shared",)
