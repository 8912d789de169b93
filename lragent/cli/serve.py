"""`lragent serve`: the OpenAI-style endpoint over one model and its roles."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from lragent.modes import PrefixWriter, SharingMode

if TYPE_CHECKING:
    from lragent.serve.api.settings import ServeSettings


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the `serve` command. A flag that is not given leaves what the config says, or the default."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model and its roles over OpenAI's API",
        description="Serves one model and the roles of one pack. Prints `lragent: serving on URL` once it answers; "
        "SIGTERM and SIGINT let open requests end first.",
    )
    flag = parser.add_argument
    flag("--config", type=Path, metavar="FILE", help="YAML file with any of these settings")
    flag("--model", metavar="SPEC", help="hub id, folder or GGUF file (default: the embedded model)")
    flag("--roles", metavar="PACK", help="pack of the roles (default: the base model alone)")
    flag(
        "--sharing",
        type=_member(SharingMode),
        metavar="MODE",
        help=f"{', '.join(SharingMode)} (default: base_lr_shared)",
    )
    flag(
        "--prefix-writer",
        type=_member(PrefixWriter),
        metavar="WHO",
        help="base or first: who writes what comes before the first turn (default: as the pack was trained)",
    )
    flag("--dtype", help="of weights and cache: auto, float32, bfloat16 or float16 (default: auto)")
    flag("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    flag("--max-model-len", type=int, metavar="N", help="tokens of prompt and answer together")
    flag("--max-tokens-in-cache", type=int, metavar="N", help="size of the KV cache in tokens")
    flag("--gpu-memory-utilization", type=float, metavar="SHARE", help="of a GPU's memory, in all (default: 0.9)")
    flag("--max-num-seqs", type=int, metavar="N", help="requests that run at once (default: 64 on a GPU, 16 on a CPU)")
    flag(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help="tokens of one step; longer prompts are cut (default: 8192 on a GPU, 512 on a CPU)",
    )
    flag(
        "--enforce-eager",
        action="store_true",
        default=None,
        help="capture no CUDA graphs: starts faster, runs slower; for debugging",
    )
    flag("--seed", type=int, help="for requests without a seed of their own (default: 0)")
    flag("--host", help="address to listen on (default: 127.0.0.1, this machine only)")
    flag("--port", type=int, help="port to listen on; 0 picks a free one (default: 8000)")
    flag("--log-level", help="critical, error, warning, info or debug (default: warning)")
    flag(
        "--check-integrity",
        action="store_true",
        default=None,
        help="check the cache before every step and stop at a fault; slow, for debugging",
    )
    flag("overrides", nargs="*", metavar="key=value", help="settings over those of the file, such as drain_s=10")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until a signal. Raises `UserError` for what cannot be read, loaded or listened on."""
    from lragent.serve.api.app import create_app
    from lragent.serve.api.server import bind, serve

    settings = settings_from(args)
    with bind(settings.host, settings.port) as sock:  # before torch is imported: a taken port is said at once
        from lragent.serve.engine.build import build_service

        service = build_service(
            model=settings.model,
            roles=settings.roles,
            sharing=settings.sharing,
            prefix_writer=settings.prefix_writer,
            dtype=settings.dtype,
            device=settings.device,
            max_model_len=settings.max_model_len,
            max_tokens_in_cache=settings.max_tokens_in_cache,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            seed=settings.seed,
            enforce_eager=settings.enforce_eager,
            check_integrity=settings.check_integrity,
        )
        gc.collect()
        gc.freeze()  # what is in memory now stays, and a pass over all of it would hold the engine up
        service.start()
        try:
            serve(create_app(service, settings), service, settings, sock, _announce)
        finally:
            service.stop(drain=False, timeout_s=float(settings.drain_s))
    return 0


def settings_from(args: argparse.Namespace) -> ServeSettings:
    """The config file, `key=value` words over it, flags over both. Raises `UserError`."""
    from lragent.config import load_config
    from lragent.serve.api.settings import ServeSettings

    settings = load_config(ServeSettings, args.config, args.overrides)
    names = ServeSettings.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    return replace(settings, **given)


def _member(kind: type[StrEnum]) -> Callable[[str], StrEnum]:
    """Reads a flag's value as a member of `kind`."""

    def read(text: str) -> StrEnum:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(kind)}, not {text!r}") from None

    return read


def _announce(url: str) -> None:
    print(f"lragent: serving on {url}", flush=True)
