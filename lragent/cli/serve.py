"""`lragent serve`: the OpenAI-style endpoint over one model and its roles."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lragent.modes import PrefixWriter, SharingMode

if TYPE_CHECKING:
    from lragent.serve.api.service import Service
    from lragent.serve.api.settings import ServeSettings


SPARE = 8
"""Places for roles that come later, where any may."""


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
        "--lora-modules",
        nargs="+",
        metavar="NAME=PATH",
        help="PEFT folders (or packs with that role) in place of one pack; stacked where they do not share one A. "
        "Words key=value go before this flag",
    )
    flag(
        "--roles-folder",
        type=Path,
        metavar="DIR",
        help="let roles be loaded and unloaded while the server runs, from this folder only (default: not at all)",
    )
    flag("--max-roles", type=int, metavar="N", help="places for roles (default: with --roles-folder, 8 spare ones)")
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
    flag(
        "--replicas",
        type=int,
        metavar="N",
        help="engines behind this address, in a process and on a GPU each; they need `pip install 'lragent[replicas]'` "
        "(default: one engine, in this process)",
    )
    flag("--seed", type=int, help="for requests without a seed of their own (default: 0)")
    flag("--host", help="address to listen on (default: 127.0.0.1, this machine only)")
    flag("--port", type=int, help="port to listen on; 0 picks a free one (default: 8000)")
    flag(
        "--api-key",
        action="append",
        metavar="KEY",
        help="ask for this key, SECRET or NAME=SECRET; may be given again (better: $LRAGENT_API_KEY, with commas)",
    )
    flag("--admin-key", metavar="KEY", help="who may load roles and see all figures (better: $LRAGENT_ADMIN_KEY)")
    flag("--ledger", type=Path, metavar="FILE", help="write down in this SQLite file what every request cost")
    flag("--request-timeout-s", type=float, metavar="S", help="end requests that take longer (default: no limit)")
    flag("--log-level", help="critical, error, warning, info or debug (default: info)")
    flag("--log-format", help="text or json, one object a line (default: text)")
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
    from lragent.serve.api.access import ApiKeys
    from lragent.serve.api.app import create_app
    from lragent.serve.api.logs import configure_logging
    from lragent.serve.api.server import bind, serve
    from lragent.serve.ledger.ledger import Ledger

    settings = settings_from(args)
    configure_logging(settings.log_level, settings.log_format)
    ApiKeys(settings.api_key, settings.admin_key)  # what is wrong with them is said before anything is loaded
    with bind(settings.host, settings.port) as sock:  # before torch is imported: a taken port is said at once
        ledger = None if settings.ledger is None else Ledger(settings.ledger, settings.prices, settings.budgets)
        try:
            with _running(settings) as service:
                serve(create_app(service, settings, ledger), service, settings, sock, _announce)
        finally:
            if ledger is not None:
                ledger.close()
    return 0


@contextmanager
def _running(settings: ServeSettings) -> Iterator[Service]:
    """What `settings` asks for, ready to serve: an engine in this process, or some in others."""
    from lragent.serve.engine.build import build_service

    build = partial(build_service, **_engine_options(settings))
    if settings.replicas is not None:
        import torch

        from lragent.serve.replicas.fleet import running_fleet

        on_gpu = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
        with running_fleet(
            build,
            settings.replicas,
            on_gpu=on_gpu,
            max_waiting=settings.max_num_waiting,
            seed=settings.seed,
            log_level=settings.log_level,
        ) as fleet:
            yield fleet
        return
    service = build()
    service.start(freeze=True)
    try:
        yield service
    finally:
        service.stop(drain=False, timeout_s=float(settings.drain_s))


def _engine_options(settings: ServeSettings) -> dict[str, Any]:
    """As `build_service` takes them."""
    return {
        "model": settings.model,
        "roles": settings.roles,
        "lora_modules": settings.lora_modules,
        "spare_roles": SPARE if settings.roles_folder is not None else 0,
        "max_roles": settings.max_roles,
        "max_waiting": settings.max_num_waiting,
        "sharing": settings.sharing,
        "prefix_writer": settings.prefix_writer,
        "dtype": settings.dtype,
        "device": settings.device,
        "max_model_len": settings.max_model_len,
        "max_tokens_in_cache": settings.max_tokens_in_cache,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "seed": settings.seed,
        "enforce_eager": settings.enforce_eager,
        "check_integrity": settings.check_integrity,
    }


def settings_from(args: argparse.Namespace) -> ServeSettings:
    """The config file, `key=value` words over it, flags over both. Raises `UserError`."""
    from lragent.config import load_config
    from lragent.serve.api.settings import ServeSettings

    settings = load_config(ServeSettings, args.config, args.overrides)
    names = ServeSettings.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    if not given.get("api_key") and not settings.api_key and os.environ.get("LRAGENT_API_KEY"):
        given["api_key"] = tuple(key for key in os.environ["LRAGENT_API_KEY"].split(",") if key)
    if not given.get("admin_key") and settings.admin_key is None and os.environ.get("LRAGENT_ADMIN_KEY"):
        given["admin_key"] = os.environ["LRAGENT_ADMIN_KEY"]
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
