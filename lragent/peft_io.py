"""PEFT LoRA folders in and out: what most users have, and what every other tool reads.

A folder is read straight from its two files, without a model: `adapter_config.json`, and `adapter_model.safetensors`
with keys `base_model.model.<module_path>.lora_A.weight` [r, d_in] and `….lora_B.weight` [d_out, r].

Which base an adapter was made for is kept beside them in `lragent.json` (`lragent_base_fingerprint`), not in PEFT's
config, so that plain PEFT loads the folder. A folder without it is taken with an `UnknownBaseWarning`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lragent.adapter_set import DTYPES, TARGETS, AdapterSet, RoleSpec, UnknownBaseWarning, natural_key
from lragent.atomic import new_folder
from lragent.errors import UserError
from lragent.stacking import stack as stack_roles
from lragent.stacking import unstack
from lragent.tensorfile import open_regular, read_header

CONFIG, WEIGHTS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "lragent.json"

_MAX_CONFIG_BYTES = 4 << 20
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<which>[AB])\.weight")

_REFUSED = {
    "use_dora": "DoRA (use_dora)",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable_token_indices",
    "layer_replication": "layer_replication",
    "fan_in_fan_out": "fan_in_fan_out",
    "lora_bias": "a bias on its B (lora_bias)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "target_parameters": "target_parameters",
}
"""What changes the computation beyond `B A`, by its name in PEFT's config."""

_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
"""Config entries that are read here, or do not change what a trained adapter computes. Any other that is set is
refused by name, so that no future variant of LoRA is ever taken for plain LoRA."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base weights: such an adapter is only right on that changed base."""


def read_peft_folder(folder: Path | str, name: str) -> AdapterSet:
    """One PEFT LoRA folder as a tied set of one role called `name`, weights bit for bit.

    Weights of several dtypes meet in the smallest that holds them all exactly. Raises `UserError` naming the folder and
    what in it is missing, damaged or not plain LoRA on the seven usual targets.
    """
    folder = Path(folder)
    try:
        config = _read_config(folder)
        return _role_set(folder, name, config)
    except UserError as error:
        message = str(error)
        raise UserError(message if str(folder) in message else f"adapter {folder}: {message}") from error


def adapter_set_from_peft(
    folders: Mapping[str, Path | str], *, stack: bool = False, base_fingerprint: str | None = None
) -> AdapterSet:
    """PEFT folders by role name as one set: tied where their A's agree bit for bit, else stacked if `stack` is set.

    `base_fingerprint` is that of the base they are for, where it is known: folders made for another base are refused,
    and the set records it. Folders that record no base are taken with an `UnknownBaseWarning`. Raises `UserError` as
    `read_peft_folder` does, and where A's differ without `stack`.
    """
    return one_set(
        {name: read_peft_folder(folder, name) for name, folder in folders.items()},
        stack=stack,
        base_fingerprint=base_fingerprint,
    )


def one_set(given: Mapping[str, AdapterSet], *, stack: bool = False, base_fingerprint: str | None = None) -> AdapterSet:
    """The same of sets of one role each, by that role's name."""
    if not given:
        raise UserError("give at least one adapter, as NAME=FOLDER")
    singles = []
    for name, single in given.items():
        if single.base_fingerprint is None and base_fingerprint is None:
            warnings.warn(
                f"the adapter {name} does not record the base that it was made for (it is called "
                f"{single.base_model!r}); it is used on trust",
                UnknownBaseWarning,
                stacklevel=2,
            )
        single.check_base(base_fingerprint)
        singles.append(single)
    if base_fingerprint is not None:
        singles = [dataclasses.replace(single, base_fingerprint=base_fingerprint) for single in singles]
    difference = _difference(singles)
    if difference is None:
        return _tie(singles)
    if not stack:
        raise UserError(f"the adapters do not share one A: {difference}; stack them instead (--stack)")
    return stack_roles(singles)


def write_peft_folders(adapters: AdapterSet, out_dir: Path | str) -> list[Path]:
    """Write one standard PEFT folder per role, `<out_dir>/<role>`; gives them in the order of the roles.

    Weights are bit-identical to those in the set, so tied roles have identical A's; a stacked set gives back the
    original adapters. `out_dir` must be new or empty, and appears whole or not at all; else `UserError`.
    """
    out_dir = Path(out_dir)
    adapters.check_finite()
    with new_folder(out_dir) as temporary:
        for single in unstack(adapters):
            folder = temporary / single.role_names[0]
            folder.mkdir()
            _write_folder(single, folder)
    return [out_dir / name for name in adapters.role_names]


# -- reading -------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        content = file.read(_MAX_CONFIG_BYTES + 1)
    if len(content) > _MAX_CONFIG_BYTES:
        raise UserError(f"{path} is too large to be a config")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    """PEFT's config, once nothing in it asks for more than plain LoRA."""
    if not folder.is_dir():
        raise UserError("there is no such folder; give the folder that PEFT's save_pretrained wrote")
    if not (folder / CONFIG).exists():
        raise UserError(f"it has no {CONFIG}; give the folder that PEFT's save_pretrained wrote")
    config = _read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"its peft_type is {config.get('peft_type')!r}; only LORA adapters can be roles")
    for key, words in _REFUSED.items():
        if config.get(key) not in (None, False, [], {}):
            raise UserError(f"it uses {words}, which cannot be shared; train it without")
    if config.get("bias", "none") != "none":
        raise UserError(
            f"it trains biases (bias={config['bias']!r}), which cannot be shared; train it with bias='none'"
        )
    if config.get("loftq_config") or str(config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        raise UserError(
            f"its init_lora_weights={config.get('init_lora_weights')!r} also changed the base model; "
            "convert it to plain LoRA first (path_initial_model_for_weight_conversion in PEFT's save_pretrained)"
        )
    for key, value in config.items():
        if (
            key not in _HARMLESS
            and value not in (None, False, [], {})
            and key not in ("loftq_config", "megatron_config")
        ):
            raise UserError(
                f"it sets {key}, which LRAgent does not know and so cannot promise to keep; train it without"
            )
    return config


def _role_set(folder: Path, name: str, config: dict[str, Any]) -> AdapterSet:
    a, b = _read_weights(folder)
    paths = sorted(a, key=natural_key)
    role = _role_spec(name, config, paths)
    for path in paths:
        if a[path].dim() != 2 or b[path].dim() != 2 or a[path].shape[0] != b[path].shape[1]:
            raise UserError(f"A {list(a[path].shape)} and B {list(b[path].shape)} at {path} do not fit together")
        if a[path].shape[0] != role.rank_of(path):
            raise UserError(f"A at {path} has rank {a[path].shape[0]}, its config says {role.rank_of(path)}")
    sidecar = _read_json(folder / SIDECAR) if (folder / SIDECAR).exists() else {}
    for key in ("lragent_base_fingerprint", "objective", "prefix_writer"):
        if not isinstance(sidecar.get(key), str | None):
            raise UserError(f"{key} in its {SIDECAR} is not text")
    base_model = config.get("base_model_name_or_path")
    found = {path.rpartition(".")[2] for path in paths}
    adapters = AdapterSet(
        base_model=base_model if isinstance(base_model, str) else "",
        base_fingerprint=sidecar.get("lragent_base_fingerprint"),
        form="tied",
        targets=tuple(target for target in TARGETS if target in found),
        roles=(role,),
        shared_a={path: a[path] for path in paths},
        role_b={path: b[path][None] for path in paths},
        objective=sidecar.get("objective"),
        prefix_writer=sidecar.get("prefix_writer"),
    )
    adapters.check_finite()
    return adapters


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A and B by module path, all of one dtype."""
    path = folder / WEIGHTS
    if not path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        raise UserError(
            "its weights are only a pickle (adapter_model.bin), which can run code when read; save it with "
            "safe_serialization=True"
            if pickled
            else f"it has no {WEIGHTS}"
        )
    with open_regular(path) as file:
        read_header(file, path)
        file.seek(0)
        try:
            tensors = safetensors.torch.load(file.read())
        except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    found: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    dtype = None
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match["path"].rpartition(".")[2] not in TARGETS:
            raise UserError(f"it holds {key!r}; only LoRA on {', '.join(TARGETS)} can be a role")
        if tensor.dtype not in DTYPES:
            raise UserError(f"{key!r} is {tensor.dtype}; float32, float16 or bfloat16 is expected")
        found[match["which"]][match["path"]] = tensor
        dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    if odd := sorted(set(found["A"]) ^ set(found["B"])):
        raise UserError(f"it has only one of A and B at {odd[0]}; save it again")
    if not found["A"]:
        raise UserError(f"its {WEIGHTS} is empty")
    return {p: t.to(dtype) for p, t in found["A"].items()}, {p: t.to(dtype) for p, t in found["B"].items()}


def _role_spec(name: str, config: dict[str, Any], paths: list[str]) -> RoleSpec:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or alpha is None or not _is_number(alpha):
        raise UserError("r or lora_alpha in its config is missing or no number")
    ranks = _resolve_pattern(config, "rank_pattern", paths)
    if not all(type(value) is int for value in ranks.values()):
        raise UserError("rank_pattern in its config holds something that is no whole number")
    alphas = _resolve_pattern(config, "alpha_pattern", paths)
    if not all(_is_number(value) for value in alphas.values()):
        raise UserError("alpha_pattern in its config holds something that is no number")
    return RoleSpec(
        name=name,
        alpha=float(alpha),
        rank=rank,
        rslora=config.get("use_rslora") is True,
        rank_pattern={path: value for path, value in ranks.items() if value != rank},
        alpha_pattern={path: float(value) for path, value in alphas.items() if value != alpha},
    )


def _resolve_pattern(config: dict[str, Any], field: str, paths: list[str]) -> dict[str, Any]:
    """What a pattern of PEFT's says for each module path that it matches.

    As in PEFT (`get_pattern_key`), a key is a regular expression that must match the path or a dotted end of it, and
    the first that does wins.
    """
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise UserError(f"{field} in its config is not an object")
    resolved = {}
    for path in paths:
        for key, value in pattern.items():
            try:
                matched = re.match(rf"(.*\.)?({key})$", path)
            except re.error as error:
                raise UserError(f"{field} in its config holds {key!r}, which is no regular expression") from error
            if matched:
                resolved[path] = value
                break
    return resolved


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**53)


# -- joining -------------------------------------------------------------------------------------------------------


def _difference(singles: list[AdapterSet]) -> str | None:
    """Where the A's of single-role sets first differ, in words; None where they agree bit for bit."""
    first = singles[0]
    for other in singles[1:]:
        pair = f"{first.role_names[0]!r} and {other.role_names[0]!r}"
        if odd := sorted(set(first.shared_a) ^ set(other.shared_a), key=natural_key):
            return f"only one of {pair} adapts {odd[0]}"
        for path, a in first.shared_a.items():
            b = other.shared_a[path]
            if a.shape != b.shape:
                return f"{pair} have ranks {a.shape[0]} and {b.shape[0]} at {path}"
            if a.dtype != b.dtype or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                return f"{pair} differ at {path}"
            if first.role_b[path].shape != other.role_b[path].shape:
                return f"{pair} have outputs of different sizes at {path}"
    return None


def _tie(singles: list[AdapterSet]) -> AdapterSet:
    first = singles[0]
    joined = stack_roles(singles)  # checks that the bases agree, and says what the roles have in common
    return dataclasses.replace(
        joined,
        form="tied",
        roles=tuple(single.roles[0] for single in singles),
        shared_a=first.shared_a,
        role_b={path: torch.cat([single.role_b[path] for single in singles]) for path in first.shared_a},
    )


# -- writing -------------------------------------------------------------------------------------------------------


def _write_folder(single: AdapterSet, folder: Path) -> None:
    weights = {}
    for path in single.module_paths:
        weights[f"base_model.model.{path}.lora_A.weight"] = single.shared_a[path].detach().cpu().contiguous()
        weights[f"base_model.model.{path}.lora_B.weight"] = single.role_b[path][0].detach().cpu().contiguous()
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(weights, metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(_peft_config(single), indent=2) + "\n")
    sidecar = {
        "lragent_base_fingerprint": single.base_fingerprint,
        "objective": single.objective,
        "prefix_writer": single.prefix_writer,
    }
    (folder / SIDECAR).write_text(json.dumps(sidecar, indent=2) + "\n")


def _peft_config(single: AdapterSet) -> dict[str, Any]:
    role = single.roles[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": single.base_model,
        "r": role.rank,
        "lora_alpha": _plain(role.alpha),
        "lora_dropout": 0.0,
        "use_rslora": role.rslora,
        # PEFT reads keys as regular expressions: a module path matches itself alone only when escaped.
        "rank_pattern": {re.escape(path): rank for path, rank in role.rank_pattern.items()},
        "alpha_pattern": {re.escape(path): _plain(alpha) for path, alpha in role.alpha_pattern.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
        "init_lora_weights": True,
        **_where(single),
    }


def _where(single: AdapterSet) -> dict[str, Any]:
    """Which modules PEFT is to adapt: short names and layer numbers where every layer is alike, else full paths."""
    numbered = [re.fullmatch(r"(.+\.layers)\.(\d+)\.(.+)", path) for path in single.module_paths]
    found = [match for match in numbered if match is not None]
    layers = sorted({int(match[2]) for match in found})
    rest = {match[3] for match in found}
    alike = len({match[1] for match in found}) == 1 and len({name.rpartition(".")[2] for name in rest}) == len(rest)
    if len(found) == len(numbered) == len(layers) * len(rest) and alike:
        return {"target_modules": list(single.targets), "layers_to_transform": layers, "layers_pattern": "layers"}
    return {"target_modules": list(single.module_paths), "layers_to_transform": None, "layers_pattern": None}


def _plain(number: float) -> float | int:
    """As PEFT writes it: 16 rather than 16.0."""
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
