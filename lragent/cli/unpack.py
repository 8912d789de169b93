"""`lragent unpack`: a pack to PEFT folders."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the `unpack` command."""
    parser = subparsers.add_parser(
        "unpack",
        help="write a pack's roles as PEFT LoRA folders",
        description="Write one standard PEFT LoRA folder per role; stacked packs give back the original adapters.",
    )
    parser.add_argument("pack", type=Path, metavar="PACK")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="a new or empty folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the folders and print their paths, one a line."""
    from lragent.pack import read_pack
    from lragent.peft_io import write_peft_folders

    for folder in write_peft_folders(read_pack(args.pack), args.output):
        print(folder)
    return 0
