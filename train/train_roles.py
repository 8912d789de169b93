"""Launch: `accelerate launch train/train_roles.py --config configs/roles/demo.yaml [key=value …]`.

The last line of standard output is the run's summary as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Returns 0, 2 after one sentence on what the user can mend, or 128 and the number of the signal that ended the run.
    """
    from lragent.config import load_config
    from lragent.errors import UserError

    parser = argparse.ArgumentParser(
        prog="train_roles", description="Trains LoRA roles with one tied A and packs them."
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; see configs/roles/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that go before the file's")
    parser.add_argument(
        "--resume",
        choices=["auto"],
        help="go on from the newest whole checkpoint of an interrupted run, if there is one",
    )
    args = parser.parse_args(argv)
    from lragent.train.interrupt import InterruptedRun

    try:
        from lragent.cli.main import show_warning
        from lragent.train.loop import train
        from lragent.train.settings import TrainSettings

        warnings.showwarning = show_warning  # type: ignore[assignment]  # takes them all, by position
        summary = train(load_config(TrainSettings, args.config, args.overrides), resume=args.resume == "auto")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except InterruptedRun as interrupted:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 128 + interrupted.number
    finally:
        _leave_processes()
    if summary is not None:
        print(json.dumps(summary), flush=True)
    return 0


def _leave_processes() -> None:
    """Say good-bye to the other processes of the run: some libraries abort a program that does not."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    # Before torch is loaded: by default its threads spin while they wait for one another, on the very cores that the
    # threads they wait for need when anything else runs. Seven times slower on two busy cores (dev/LOG.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
