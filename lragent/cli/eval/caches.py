"""`lragent eval caches`: how alike the caches of roles are, and what sharing them does to the next token."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lragent.errors import UserError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the `caches` command."""
    parser = subparsers.add_parser(
        "caches",
        help="compare the caches of roles, and next tokens of each sharing mode with non_shared",
        description="Runs given trajectories through all roles, without generating. Writes, as records, "
        "the cosine similarity of the caches that different roles leave, layer by layer, and how far the distribution "
        "of the next token moves in each sharing mode (KL to non_shared, in nats), by step and by role.",
    )
    flag = parser.add_argument
    flag("--roles", type=Path, required=True, metavar="PACK", help="the roles to run")
    flag("--data", type=Path, required=True, metavar="FILE", help="whole trajectories (JSONL or Parquet)")
    flag("-o", "--output", type=Path, required=True, metavar="FILE", help="the JSONL file to write")
    flag("--model", metavar="SPEC", help="hub id, folder or GGUF file (default: the embedded model)")
    flag("--trajectories", type=int, default=100, metavar="N", help="the first N of the data (default: 100)")
    flag("--label", metavar="NAME", help="the records' name for this pack (default: what it was trained for)")
    flag("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures, writes the file and prints the mean KL of each mode."""
    import torch

    from lragent.eval.analysis.measure import measure
    from lragent.eval.records import write_records

    if args.trajectories < 1:
        raise UserError(f"--trajectories: must be at least 1, not {args.trajectories}.")
    device = torch.device(_device(args.device, torch.cuda.device_count()))
    records = measure(
        args.roles, args.data, model=args.model, trajectories=args.trajectories, label=args.label, device=device
    )
    write_records(args.output, records)
    about = records[0]
    print(f"{args.output}: {about['label']}, {about['trajectories']} trajectories of {about['tokens']:,} tokens")
    for record in records:
        if _is_whole(record):
            print(
                f"  {record['mode']}: KL {record['kl']:.3g} nats a token, {record['changed']:.2%} of the likeliest "
                "tokens changed"
            )
    return 0


def _is_whole(record: dict[str, Any]) -> bool:
    return record["kind"] == "divergence" and record["role"] == "all" and record["step"] is None


def _device(asked: str | None, gpus: int) -> str:
    """What --device means on a machine with so many GPUs."""
    here = ["cpu", *(["cuda", *(f"cuda:{number}" for number in range(gpus))] if gpus else [])]
    if asked is not None and asked not in here:
        raise UserError(f"--device: {asked} is not here; use {' or '.join(here)}.")
    return asked or ("cuda" if gpus else "cpu")
