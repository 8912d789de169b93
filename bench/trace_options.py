"""The command line of `python -m lragent.bench trace`, as a plan and what it is measured on."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lragent.bench.endpoint import EndpointSystem
from lragent.bench.engines import Base
from lragent.bench.matrix import Limits
from lragent.bench.shapes import SHAPES, shape_config, shape_named
from lragent.bench.trace_plan import MicroPlan, Plan, RunPlan
from lragent.bench.traces import team
from lragent.config import load_config
from lragent.errors import UserError
from lragent.models import load_tokenizer, resolve_model
from lragent.modes import SharingMode

EXAMPLES = """
examples:
  the paper's shortest trace in all modes, on this machine's CPU, in seconds (or minutes: --shape smollm2-135m)
    python -m lragent.bench trace --shape tiny
  several contexts, sixteen trajectories at once
    python -m lragent.bench trace --shape llama-3.2-1b --context 256,1024 --concurrent 16
  trajectories arriving at random, two a second, forty in all
    python -m lragent.bench trace --shape llama-3.1-8b --modes base_lr_shared --rate 2 --trajectories 40
  everything, on one GPU, with the model loaded once for many measurements
    python -m lragent.bench trace --shape llama-3.1-8b --plan configs/bench/matrix.yaml --time-limit 1500
  vLLM with three adapters (each round sends tokens that it has not seen; --device measures the GPU for the floors)
    vllm serve … --enable-lora --lora-modules plan=… action=… reflect=…
    python -m lragent.bench trace --base-url http://127.0.0.1:8000/v1 --model-names plan,action,reflect \\
        --modes non_shared --shape llama-3.1-8b --label "vLLM, three adapters"
"""


def _list(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """A type for argparse: values with commas between them."""

    def parse(text: str) -> tuple[Any, ...]:
        return tuple(read(part.strip()) for part in text.split(","))

    parse.__name__ = "list"  # argparse says "invalid list value"
    return parse


def parser() -> argparse.ArgumentParser:
    """All options."""
    made = argparse.ArgumentParser(
        prog="python -m lragent.bench trace",
        description="Plays the paper's trajectory of 17 steps over several roles, in the sharing modes, one or many\n"
        "at once, and says how near each figure comes to what the machine allows.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole, names = _list(int), ", ".join(SharingMode)
    group = made.add_argument_group("what is served").add_argument
    group("--shape", metavar="NAME", help=f"random weights of a known shape: {', '.join(SHAPES)}")
    group("--model", metavar="SPEC", help="a model instead: hub id, folder or GGUF file")
    group("--pack", type=Path, metavar="FILE", help="roles for --model (default: random tied ones)")
    group("--rank", type=int, default=8, metavar="R", help="of random roles (8)")
    group("--device", help="cpu or cuda (default: cuda where there is one)")
    group(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 where the device computes in it"
    )
    group = made.add_argument_group("what is measured; lists are written with commas").add_argument
    group("--context", type=whole, default=(256,), metavar="N,…", help="tokens that each of four tool calls "
          "brings: 256, 1024, 4096, 16384 make 1.9k, 5.0k, 17.3k, 66.4k tokens in all (256)")  # fmt: skip
    group(
        "--roles", type=whole, default=(3,), metavar="N,…", help="3 play plan, action, reflect; others take turns (3)"
    )
    group("--modes", type=_list(SharingMode), default=tuple(SharingMode), metavar="MODE,…", help=f"of {names} (all)")
    group("--concurrent", type=whole, default=(1,), metavar="N,…", help="trajectories at once (1)")
    group("--rate", type=_list(float), default=(), metavar="R,…", help="trajectories a second, at random moments")
    group("--trajectories", type=int, metavar="M", help="how many in all (default: as many as are concurrent)")
    group("--repeats", type=int, default=3, metavar="N", help="counted rounds, after one to warm up (3)")
    group("--steps", type=int, metavar="N", help="only the first so many of the 17 steps")
    group("--micro", action="store_true", help="also single figures: decode, append, many sequences, long prefill")
    group("--micro-only", action="store_true", help="those alone")
    group("--micro-contexts", type=whole, metavar="N,…", help="where one sequence decodes (1024,8192,66000)")
    group("--micro-batch", type=whole, metavar="S,N", help="S sequences of N tokens decode at once (64,2048)")
    group("--micro-prompt", type=int, metavar="N", help="tokens of the long prefill (32768)")
    group("--plan", type=Path, metavar="FILE", help="YAML or JSON with `runs` (the options of this group, with lists) "
          "and `micro`, instead of the options of this group; see configs/bench/")  # fmt: skip
    group("--only", type=whole, metavar="N,…", help="of the file's runs only these, counted from 1; 0 is `micro`")
    group("--time-limit", type=float, metavar="S", help="begin nothing new after so many seconds")
    group("--seed", type=int, help="of tokens and arrivals (0; for an endpoint the time, since it keeps its cache)")
    group = made.add_argument_group("the engine").add_argument
    group("--token-budget", type=int, metavar="N", help="tokens a step (as lragent serve)")
    group("--max-num-seqs", type=int, metavar="N", help="sequences a step (default: as many as are concurrent)")
    group("--cache-tokens", type=int, metavar="N", help="slots (default: as many as hold all, if they fit)")
    group("--one-at-a-time", action="store_true", help="one mode after the other, though all might fit side by side")
    group = made.add_argument_group("an endpoint instead of the engine").add_argument
    group("--base-url", metavar="URL", help="ends in /v1; answers must carry token ids (vLLM's return_token_ids)")
    group("--model-names", type=_list(str), metavar="NAME,…", help="the server's name for each role")
    group("--label", default="endpoint", help="what its rows are called (endpoint); --modes names the one whose floor "
          "it is held against (non_shared)")  # fmt: skip
    group("--vocabulary", type=int, metavar="N", help="token ids below it are sent (default: the shape's, or 32000)")
    group("--tokenizer", metavar="SPEC", help="where answers carry only text: whose ids the context goes on with")
    group = made.add_argument_group("results").add_argument
    group("--output", type=Path, metavar="DIR", help="where trace-<machine>.json and .png go (bench/results)")
    group("--records", type=Path, metavar="FILE", help="every request as a line of JSON")
    group("--no-save", action="store_true", help="write no results; they are printed in any case")
    return made


def plan_of(args: argparse.Namespace) -> Plan:
    """What is measured. Raises UserError naming the option or key at fault."""
    if args.plan is not None:
        return _only(load_config(Plan, args.plan), args.only)
    if args.only is not None:
        raise UserError("--only: goes with --plan.")
    try:
        micro = None
        if args.micro or args.micro_only:
            given = {"contexts": args.micro_contexts, "prompt": args.micro_prompt}
            if args.micro_batch is not None:
                if len(args.micro_batch) != 2:
                    raise UserError("micro-batch: takes two numbers, sequences and tokens of each.")
                given |= {"sequences": args.micro_batch[0], "sequence_tokens": args.micro_batch[1]}
            micro = MicroPlan(repeats=args.repeats)
            micro = replace(micro, **{name: value for name, value in given.items() if value is not None})
        run = RunPlan(
            context=args.context,
            roles=args.roles,
            concurrent=args.concurrent,
            rate=args.rate,
            trajectories=args.trajectories,
            modes=args.modes,
            repeats=args.repeats,
            steps=args.steps,
        )
    except UserError as error:
        raise UserError(f"--{error}") from None
    return Plan((), micro) if args.micro_only else Plan((run,), micro)


def _only(plan: Plan, numbers: tuple[int, ...] | None) -> Plan:
    """The runs of `plan` that are named. Raises UserError where there are fewer."""
    if numbers is None:
        return plan
    if not set(numbers) <= set(range(len(plan.runs) + 1)):
        raise UserError(f"--only: the plan has runs 1 to {len(plan.runs)}; 0 is `micro`.")
    return Plan(tuple(plan.runs[number - 1] for number in numbers if number), plan.micro if 0 in numbers else None)


def device_of(args: argparse.Namespace) -> torch.device:
    """Where it runs. Raises UserError where there is no such device."""
    if args.device is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, number = args.device.partition(":")
    if kind == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", int(number or 0))
    if kind != "cpu":
        raise UserError(f"--device: {args.device} is not here; use cpu, or cuda on a machine that has it.")
    return torch.device("cpu")


def dtype_of(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """What is computed in."""
    from lragent.bench.baselines import fast_dtype  # imports peft, which takes its time

    return getattr(torch, args.dtype) if args.dtype else fast_dtype(device.type)


def base_of(args: argparse.Namespace, plan: Plan, device: torch.device, dtype: torch.dtype) -> Base:
    """What engines are built from. Raises UserError."""
    if (args.shape is None) == (args.model is None):
        raise UserError("--shape, --model: give one of the two, for example --shape tiny or --shape llama-3.1-8b.")
    if args.pack is not None and args.model is None:
        raise UserError("--pack: goes with --model; a shape has random roles.")
    positions = [entry.tokens + 1 for entry in plan.entries()] + ([plan.micro.positions] if plan.micro else [])
    shape = shape_named(args.shape) if args.shape is not None else None
    return Base(device, dtype, shape, args.model, args.pack, args.rank, max(positions, default=0))


def config_of(args: argparse.Namespace) -> Any:
    """The transformers config of what is served; None where an endpoint does not say."""
    if args.shape is not None:
        return shape_config(shape_named(args.shape))
    if args.model is None:
        return None
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(resolve_model(args.model).path, local_files_only=True)


def limits_of(args: argparse.Namespace) -> Limits:
    """How engines are made, and when to stop. Raises UserError."""
    for name in ("token_budget", "max_num_seqs", "cache_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, not {value}.")
    return Limits(
        slots=args.cache_tokens,
        sequences=args.max_num_seqs,
        token_budget=args.token_budget,
        one_at_a_time=args.one_at_a_time,
        deadline=None if args.time_limit is None else time.monotonic() + args.time_limit,
    )


def endpoint_of(args: argparse.Namespace, plan: Plan) -> EndpointSystem:
    """The endpoint to be measured. Raises UserError."""
    counts = {entry.roles for entry in plan.entries()}
    names = args.model_names
    if names is None or counts != {len(names)}:
        wanted = ", ".join(map(str, sorted(counts)))
        raise UserError(f"--model-names: give the server's model name for each role; {wanted} roles are to play.")
    if plan.micro is not None:
        raise UserError("--micro: is measured on an engine in this process, not through --base-url.")
    modes = {mode for entry in plan.entries() for mode in entry.modes}
    mode = next(iter(modes)) if len(modes) == 1 else SharingMode.NON_SHARED
    vocabulary = args.vocabulary or (shape_named(args.shape).vocabulary if args.shape else 32_000)
    tokenizer = load_tokenizer(resolve_model(args.tokenizer)) if args.tokenizer else None
    return EndpointSystem(args.label, args.base_url, mode, team(len(names)), tuple(names), vocabulary, tokenizer)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options given."""
    return parser().parse_args(argv)
