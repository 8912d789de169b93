"""`lragent eval text`: what sharing does on real text, AutoAct's HotpotQA trajectories."""

from __future__ import annotations

import argparse
from pathlib import Path

from lragent.errors import UserError
from lragent.modes import SharingMode


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `text`, with `split` and `run`."""
    parser = subparsers.add_parser(
        "text",
        help="loss, next steps and answers on real text (HotpotQA trajectories of AutoAct)",
        description="Does sharing keep the answers on real text? `split` divides AutoAct's rows by question; train "
        "roles on its train.jsonl with train/train_roles.py, in whatever ways are to be compared; then `run` measures "
        "each pack on the held-out part.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_split(commands)
    _add_run(commands)


def _add_split(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "split",
        help="divide AutoAct's rows by question into a part to learn from and a held-out part",
        description="Writes train.jsonl and held_out.jsonl (trajectories of plan, action and reflect; every fifth "
        "question is held out), questions.jsonl (the held-out questions with their answers) and passages.jsonl (what "
        "the tools once found, for all questions). Then train: accelerate launch train/train_roles.py "
        "data=FOLDER/train.jsonl eval_data=FOLDER/held_out.jsonl out=… objective=….",
    )
    flag = parser.add_argument
    flag("files", nargs="+", type=Path, metavar="FILE", help="AutoAct's rows: a JSON list, or JSONL")
    flag("-o", "--output", type=Path, required=True, metavar="FOLDER", help="the new folder to write")
    flag("--seed", type=int, default=0, help="which questions are held out (default: 0)")
    parser.set_defaults(run=run_split)


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "run",
        help="measure a pack on the held-out part, in every sharing mode",
        description="For each sharing mode: loss per role on held-out trajectories, the turns of these that the engine "
        "generates exactly, and the answers that the team finds to held-out questions with a search over what the "
        "tools once found. Finished modes of a label and seed are not run again.",
    )
    flag = parser.add_argument
    flag("--data", type=Path, required=True, metavar="FOLDER", help="made by `lragent eval text split`")
    flag("--roles", type=Path, required=True, metavar="PACK", help="trained on its train.jsonl")
    flag("--label", required=True, metavar="NAME", help="how the roles were trained, for example mixed")
    flag("-o", "--output", type=Path, required=True, metavar="FILE", help="JSONL of records, made or added to")
    flag("--model", metavar="SPEC", help="hub id, folder or GGUF file (default: the embedded model)")
    flag("--modes", default=",".join(SharingMode), metavar="NAMES", help="of sharing (default: all four)")
    flag("--questions", type=int, metavar="N", help="held-out questions that are asked (default: all)")
    flag("--max-tokens-in-cache", type=int, metavar="N", help="of the engine (default: what fits)")
    flag("--seed", type=int, default=0, help="of the split and the training, which the records name (default: 0)")
    parser.set_defaults(run=run_run)


def run_split(args: argparse.Namespace) -> int:
    """Writes the folder and says what is in it."""
    from lragent.eval.hotpot.split import HELD_OUT, PASSAGES, QUESTIONS, TRAIN, write_split

    made = write_split(args.files, args.seed, args.output)
    print(f"{args.output / TRAIN}: {len(made.train)} trajectories to learn from")
    print(f"{args.output / HELD_OUT}: {len(made.held_out.trajectories)} held-out trajectories")
    print(f"{args.output / QUESTIONS}: {len(made.held_out.questions)} held-out questions")
    print(f"{args.output / PASSAGES}: {len(made.held_out.passages)} passages")
    for reason, count in made.counts.dropped.most_common():
        print(f"  {count} of {made.counts.rows} rows dropped: {reason}")
    return 0


def run_run(args: argparse.Namespace) -> int:
    """Measures what is left to be measured."""
    from lragent.eval.hotpot.measure import TextSettings, measure

    measure(
        TextSettings(
            data=args.data,
            roles=args.roles,
            label=args.label,
            out=args.output,
            seed=args.seed,
            model=args.model,
            modes=_modes(args.modes),
            questions=args.questions,
            max_tokens_in_cache=args.max_tokens_in_cache,
        ),
        print,
    )
    return 0


def _modes(text: str) -> tuple[SharingMode, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in set(SharingMode)]:
        raise UserError(f"--modes: {unknown[0]!r} is none of {', '.join(SharingMode)}.")
    return tuple(dict.fromkeys(map(SharingMode, names)))
