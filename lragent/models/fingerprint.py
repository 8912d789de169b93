"""What a base model is, as one hex SHA-256: adapters are only right on the base that they were made for.

Definition (version 1): SHA-256 of the canonical JSON of
- the version of this definition,
- the canonical config: those keys of `config.json` on which the computation depends (`_CONFIG_KEYS`), with the rope
  settings brought to one spelling, defaults that are derived filled in, and absent, null and false keys left out;
- the sorted list of all *stored* tensors: name, dtype, shape, SHA-256 of the bytes.

So what decides is the stored checkpoint, not how it is loaded:
- a base that is quantised or cast *at load time* has the print of its checkpoint;
- a checkpoint that is stored quantised has a print of its own, unlike that of the model it was made from;
- a GGUF is compared by its dequantised float32 tensors, that is by the safetensors folder it is converted to: the same
  GGUF always gives the same print, another quantisation of the same model another one;
- sharding, tokenizer and generation settings do not matter.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lragent.errors import UserError
from lragent.models.cache import remember
from lragent.tensorfile import Header, open_regular, read_header

_VERSION = 1

_CONFIG_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
)


def fingerprint(folder: Path | str) -> str:
    """The print of a model folder, 64 hex digits.

    Reads every tensor once; the digests of large files are remembered in the cache. Raises `UserError` where the folder
    has no config or no safetensors weights, or a weight file is damaged.
    """
    folder = Path(folder)
    tensors: dict[str, str] = {}
    for file in weight_files(folder):
        tensors |= remember("tensor digests 1", file, lambda file=file: _tensor_digests(file))  # type: ignore[misc]
    content = json.dumps([_VERSION, _canonical_config(read_config(folder)), sorted(tensors.items())], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`; raises `UserError` where it is missing or no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a model folder: it has no config.json; give the folder the model was saved to"
        )
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the folder's weights, as its index names them.

    Raises `UserError` where there are none, saying so where there are only pickles.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index} is damaged; download the model again") from error
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise UserError(f"{index} names the weight file {name!r}, which is not in the folder")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise UserError(
            f"{folder} has its weights only as pickles, which can run code when read; save the model as safetensors "
            "(`save_pretrained` does)"
        )
    raise UserError(f"{folder} has a config.json but no model.safetensors; give the folder the model was saved to")


def _canonical_config(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that the computation depends on, in one spelling for all versions of transformers."""
    facts = {key: config.get(key) for key in _CONFIG_KEYS}
    heads = facts["num_attention_heads"]
    if facts["num_key_value_heads"] is None:
        facts["num_key_value_heads"] = heads
    if facts["head_dim"] is None and heads and facts["hidden_size"]:
        facts["head_dim"] = facts["hidden_size"] // heads
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta"))
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    facts["rope"] = {key: value for key, value in rope.items() if value is not None}
    return {key: value for key, value in facts.items() if value is not None and value is not False}


def _tensor_digests(path: Path) -> dict[str, str]:
    """By tensor name: dtype, shape and the SHA-256 of its bytes, in one string."""
    with open_regular(path) as file:
        header: Header = read_header(file, path)
        digests = {}
        for name, entry in sorted(header.tensors.items(), key=lambda item: item[1].begin):
            digest, left = hashlib.sha256(), entry.end - entry.begin
            file.seek(entry.begin)
            while left:
                chunk = file.read(min(left, 1 << 22))
                if not chunk:
                    raise UserError(f"{path} became shorter while it was read")
                digest.update(chunk)
                left -= len(chunk)
            digests[name] = f"{entry.dtype} {list(entry.shape)} {digest.hexdigest()}"
    return digests
