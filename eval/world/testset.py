"""The test world as a file: its pages, its questions and the form of its trajectories."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from lragent.errors import UserError
from lragent.eval.world.form import Form
from lragent.eval.world.pages import Fact, Page, World
from lragent.eval.world.questions import Path, Question
from lragent.eval.world.tools import Desk, Library

FORMAT, VERSION = "lragent-test-world", 1


@dataclass(frozen=True)
class TestSet:
    """What it takes to examine an agent: everything but the agent."""

    __test__ = False  # Not a test class, whatever pytest makes of the name.

    level: str
    seed: int
    form: Form
    excerpt: int
    world: World
    questions: tuple[Question, ...]

    def library(self) -> Library:
        """The world's pages behind the tools."""
        return Library(self.world, self.excerpt)

    def desks(self) -> Callable[[], Desk]:
        """What makes a desk for each trajectory, all over one library."""
        return functools.partial(Desk, self.library())


def dump_test_set(test_set: TestSet) -> str:
    """The file's text: one JSON object."""
    pages = [dataclasses.asdict(page) for page in test_set.world.pages.values()]
    body = {
        "format": FORMAT,
        "version": VERSION,
        "level": test_set.level,
        "seed": test_set.seed,
        "form": dataclasses.asdict(test_set.form),
        "excerpt": test_set.excerpt,
        "pages": pages,
        "questions": [dataclasses.asdict(question) for question in test_set.questions],
    }
    return json.dumps(body, ensure_ascii=False) + "\n"


def load_test_set(path: FilePath | str) -> TestSet:
    """Reads what `dump_test_set` wrote. Raises `UserError` naming the file when it is anything else."""
    path = FilePath(path)
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); write one with `lragent world`.") from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}); write it anew with `lragent world`.") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise UserError(f"{path}: is no test world; write one with `lragent world`.")
    if body.get("version") != VERSION:
        raise UserError(f"{path}: has version {body.get('version')}, this program reads {VERSION}; write it anew.")
    try:
        return _read(body)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: a field is missing or not of its kind ({error}); write it anew.") from error


def _read(body: Mapping[str, Any]) -> TestSet:
    pages = (
        Page(
            page["title"],
            page["kind"],
            tuple(page["sentences"]),
            {noun: Fact(**fact) for noun, fact in page["facts"].items()},
        )
        for page in body["pages"]
    )
    questions = (
        Question(
            item["id"],
            item["kind"],
            item["text"],
            item["answer"],
            tuple(Path(path["start"], tuple(path["nouns"])) for path in item["paths"]),
        )
        for item in body["questions"]
    )
    return TestSet(
        level=body["level"],
        seed=body["seed"],
        form=Form(**body["form"]),
        excerpt=body["excerpt"],
        world=World({page.title: page for page in pages}),
        questions=tuple(questions),
    )
