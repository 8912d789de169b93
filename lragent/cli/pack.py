"""`lragent pack`: PEFT folders to one pack."""

from __future__ import annotations

import argparse
from pathlib import Path

from lragent.errors import UserError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the `pack` command."""
    parser = subparsers.add_parser(
        "pack",
        help="pack PEFT LoRA folders into one file",
        description="Pack PEFT LoRA folders, one per role, into one file that `lragent serve --roles` takes.",
    )
    parser.add_argument("adapters", nargs="+", metavar="NAME=FOLDER", help="a role's name and its PEFT folder")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="the pack to write")
    parser.add_argument(
        "--stack",
        action="store_true",
        help="stack adapters that were trained with different A's (exact; their ranks add up)",
    )
    parser.add_argument(
        "--rank",
        type=int,
        metavar="K",
        help="with --stack: compress the stack to rank K by SVD, and say what that loses at each module",
    )
    parser.add_argument(
        "--model",
        metavar="SPEC",
        help="the base they were trained on (folder, GGUF file or hub id), to be checked and recorded",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the pack and say in one line what it holds."""
    folders = parse_adapters(args.adapters)

    import dataclasses

    from lragent.models import resolve_model
    from lragent.pack import write_pack
    from lragent.peft_io import adapter_set_from_peft

    source = resolve_model(args.model) if args.model is not None else None
    adapters = adapter_set_from_peft(
        folders, stack=args.stack, base_fingerprint=source.fingerprint() if source is not None else None
    )
    if source is not None:
        adapters = dataclasses.replace(adapters, base_model=source.name)
    errors: dict[str, float] = {}
    if args.rank is not None:
        if not args.stack:
            raise UserError("--rank goes with --stack: adapters of one A keep its rank.")
        from lragent.compression import compress

        compressed = compress(adapters, args.rank)
        adapters, errors = compressed.adapters, compressed.errors
    write_pack(args.output, adapters)
    for path, error in errors.items():
        print(f"{path}: {error:.3%} lost")
    if errors:
        worst = max(errors, key=errors.__getitem__)
        print(
            f"compressed to rank {args.rank}: at most {errors[worst]:.3%} lost (at {worst}), as a share of the norm of "
            "all roles' updates; `lragent heal` gives back what that costs"
        )
    print(
        f"{args.output}: {len(adapters.roles)} roles ({', '.join(adapters.role_names)}), {adapters.form}, "
        f"{adapters.nbytes():,} bytes of weights where separate adapters take {adapters.separate_nbytes():,}"
    )
    return 0


def parse_adapters(texts: list[str]) -> dict[str, Path]:
    """`["plan=runs/plan", …]` by role name; raises `UserError` for a bad pair or a name used twice."""
    folders: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UserError(f"{text!r} is not NAME=FOLDER, for example plan=adapters/plan")
        if name in folders:
            raise UserError(f"the role name {name!r} is used twice; every role needs a name of its own")
        folders[name] = Path(folder)
    return folders
