"""`lragent world`: writes a multi-hop data set."""

import argparse
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the `world` command."""
    parser = subparsers.add_parser(
        "world",
        help="write training trajectories and a test world of multi-hop questions",
        description="Writes train.jsonl, eval.jsonl (gold trajectories of plan, action and reflect) and "
        "test_world.json (pages and questions), from three fictional worlds that share no entity.",
    )
    parser.add_argument("--level", default="demo", help="demo, easy, medium, hard or long (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same files (default: 0)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the new folder to write")
    parser.add_argument("--train", type=int, metavar="N", help="number of training trajectories")
    parser.add_argument("--eval", type=int, metavar="N", help="number of evaluation trajectories")
    parser.add_argument("--test", type=int, metavar="N", help="number of test questions")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the folder and prints what is in it. Raises `UserError` on bad input."""
    from lragent.eval.world.generate import EVAL_FILE, TEST_FILE, TRAIN_FILE, with_counts, write_data_set
    from lragent.eval.world.levels import level_named
    from lragent.eval.world.score import never_search

    level = with_counts(level_named(args.level), args.train, args.eval, args.test)
    data = write_data_set(level, args.seed, args.output)
    guess = never_search(data.test.questions).overall
    print(f"{args.output / TRAIN_FILE}: {len(data.train)} trajectories")
    print(f"{args.output / EVAL_FILE}: {len(data.evaluation)} trajectories")
    print(f"{args.output / TEST_FILE}: {len(data.test.world.pages)} pages, {guess.total} questions")
    print(f"A policy that never searches answers at most {guess.correct} of the {guess.total} questions.")
    return 0
