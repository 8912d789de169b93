"""One page of everything that was recorded: does sharing keep the answers? The same records make the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lragent.atomic import write_file
from lragent.bench.machine import PACKAGES
from lragent.errors import UserError
from lragent.eval.analysis import section as analysis_section
from lragent.eval.hotpot import section as hotpot_section
from lragent.eval.machines import MACHINE
from lragent.eval.records import Record, read_records
from lragent.eval.report import times
from lragent.eval.report.markdown import table
from lragent.eval.study import section as study_section
from lragent.models.source import EMBEDDED_NAME

Section = Callable[[Sequence[Record], Path], str]

SECTIONS: tuple[tuple[str, Section], ...] = (
    ("Answers", study_section.section),
    ("Times", times.section),
    ("Why", analysis_section.section),
    ("Real text", hotpot_section.section),
)
"""Headings, and what writes what stands under them: Markdown, or "" where no record is of its kinds."""

MODES = (
    "A team of roles is served in four ways: `non_shared` keeps a cache for each role, and is exact; `full_shared` "
    "keeps one, as the role that wrote a token left it; `base_shared` keeps one of what the base model computes, and "
    "each role's own low-rank part; `base_lr_shared` keeps one of both."
)
EQUAL_TOKENS = (
    " All ways learnt from as many tokens, so `shared` and `mixed` met each conversation more often than `per_role`."
)


def write_report(files: Sequence[Path], page: Path) -> None:
    """Make `page` of the records in `files`; its pictures go to the folder beside it that is named like it.

    Raises UserError naming what cannot be read or written, or is no record.
    """
    if page.suffix != ".md":
        raise UserError(f"--output: {page} must end in .md; pictures go to a folder of that name without it.")
    records = read_records(files)
    pictures = page.with_suffix("")
    try:
        pictures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {pictures}: {error.strerror}") from error
    try:
        found = [(heading, _made(section, records, pictures)) for heading, section in SECTIONS]
    finally:
        if not any(pictures.iterdir()):
            pictures.rmdir()
    if not any(text for _, text in found):
        given = ", ".join(map(str, files))
        raise UserError(f"{given}: nothing to report; give files of `lragent eval merge`, `caches` or `text run`.")
    parts = ["# Does sharing keep the answers?", MODES, *_measured(records), *_again(files, page)]
    parts += [f"## {heading}\n\n{text.strip()}" for heading, text in found if text]
    write_file(page, ("\n\n".join(parts) + "\n").encode())


def _made(section: Section, records: Sequence[Record], pictures: Path) -> str:
    try:
        return section(records, pictures)
    except (KeyError, TypeError) as error:
        raise UserError(f"a record has not all that its kind must have ({error}); write its file anew.") from error


def _measured(records: Sequence[Record]) -> list[str]:
    """What was measured, and on what."""
    parts = ["## What was measured"]
    if lines := [*_studies(records), *_caches(records)]:
        parts.append("\n".join(lines))
    if rows := _machines(records):
        parts.append(table(["machine", "python", *PACKAGES, "commits"], rows))
    return parts if len(parts) > 1 else []


def _studies(records: Sequence[Record]) -> list[str]:
    lines = []
    for study in (record for record in records if record["kind"] == "study"):
        own = [record for record in records if record["kind"] == "answers" and record["level"] == study["level"]]
        training = study["training"]
        settings = ", ".join(
            f"{name} {value}" for name, value in training.items() if name != "model" and value is not None
        )
        lines.append(
            f"- Level `{study['level']}` of the multi-hop world, seeds {_list(r['seed'] for r in own)}, each with "
            f"a world and trainings of its own. {training['model'] or EMBEDDED_NAME} learns in "
            f"{len({r['regime'] for r in own})} ways and is served in {len({r['mode'] for r in own})} sharing modes; "
            f"{sum(r['asked'] for r in own):,} answers were generated, with tools, in at most "
            f"{study['iterations']} decisions of plan each. Training, the same in all ways: "
            f"{settings}.{EQUAL_TOKENS if training.get('equal_tokens') else ''} Another learning rate, model or length "
            "of context may lose more, or less."
        )
    return lines


def _caches(records: Sequence[Record]) -> list[str]:
    """A line for all teams that read the same."""
    alike: dict[str, list[str]] = {}
    for record in records:
        if record["kind"] == "caches":
            what = (
                f"({record['model']}, {record['dtype']}) along {record['trajectories']:,} trajectories of "
                f"{record['data']}, {record['tokens']:,} tokens, on {record['machine']}."
            )
            alike.setdefault(what, []).append(f"`{record['label']}`")
    return [f"- Caches of {', '.join(labels)} {what}" for what, labels in alike.items()]


def _machines(records: Sequence[Record]) -> list[list[str]]:
    """A row for each machine and its versions, with all commits that were measured there."""
    rows: dict[tuple[str, ...], set[str]] = {}
    for record in records:
        if record["kind"] in (MACHINE, "caches"):
            key = (record["machine"], record["python"], *(record[package] for package in PACKAGES))
            rows.setdefault(key, set()).add(record["commit"] or "-")
    return [[*key, ", ".join(sorted(rows[key]))] for key in sorted(rows)]


def _again(files: Sequence[Path], page: Path) -> list[str]:
    shown = [path.name if path.is_absolute() else path.as_posix() for path in (*files, page)]
    command = " ".join(["lragent eval report", *shown[:-1], "-o", shown[-1]])
    return [f"This page is made of recorded results by one command:\n\n```\n{command}\n```"]


def _list(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(values))))
