"""`python -m lragent.bench NAME …` runs one benchmark; without a name it lists them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from lragent.errors import UserError

BENCHMARKS = {
    "kernels": "the kernels of serving against what the GPU can do; needs a GPU",
    "training_attention": "attention with gradients over decomposed values, against torch's own; needs a GPU",
    "training": "steps of learning: MFU, memory, and an epoch shared, per role and per step",
    "scaling": "the same training on one GPU and on several: losses, tokens/s, memory, going on after an interruption",
    "learning": "roles trained in several ways, apart and healed too: next steps right in each sharing mode",
    "trace": "trajectories over roles in the sharing modes, one or many at once, against what the machine allows",
    "steps": "a 17-step trajectory over three roles: times to first token, and decoding, against transformers + PEFT",
    "soak": "a server under load for a long time: does anything leak, hang or go unanswered?",
    "replicas": "how throughput grows with replicas behind one address, and what a killed one costs",
    "overhead": "what HTTP costs over the same engine in process: throughput, time to the first token",
}
"""Name of the module to what it measures."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one sentence on what the user can mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: python -m lragent.bench NAME [options]\n")
        for name, measures in BENCHMARKS.items():
            print(f"  {name:18} {measures}")
        return 0
    name, *rest = words
    if name not in BENCHMARKS:
        print(f"error: there is no benchmark {name!r}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    try:
        status: int = importlib.import_module(f"lragent.bench.{name}").main(rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
