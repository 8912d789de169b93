"""GGUF files as safetensors folders: converted once, then found by the file's content.

Loading a GGUF takes seconds and dequantises to float32; the folder loads in a fraction of a second, is memory-mapped,
and is what everything else (training, fingerprints, PEFT) works on. Float32 holds the dequantised values exactly.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from lragent.atomic import TEMPORARY_PREFIX, new_folder
from lragent.errors import UserError
from lragent.models.cache import cache_root, remember
from lragent.models.quiet import quiet_libraries
from lragent.tensorfile import open_regular

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONVERSION = 1
"""Part of the folder's name: raised whenever what a conversion writes changes."""


def converted_folder(gguf: Path) -> Path:
    """The safetensors folder of a GGUF file, converting it (some seconds, four bytes a weight) if need be.

    The folder appears whole or not at all, and processes that need the same one wait for each other. Raises
    `UserError` where the file is no GGUF, or transformers does not know its architecture.
    """
    with open_regular(gguf) as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{gguf} is not a GGUF file")
    digest = remember("sha256", gguf, lambda: {"sha256": _sha256(gguf)})["sha256"]
    folder = cache_root() / "gguf" / f"{digest[:32]}-{_CONVERSION}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"cannot write the model cache {folder.parent}: {error.strerror or error}; "
            "set LRAGENT_CACHE to a folder that can be written"
        ) from error
    try:
        if not folder.is_dir():
            for stale in folder.parent.glob(f"{TEMPORARY_PREFIX}{folder.name}-*"):
                shutil.rmtree(stale, ignore_errors=True)  # of a conversion that died: the lock is ours
            with new_folder(folder, keep_existing=True) as temporary:
                _convert(gguf, temporary)
    finally:
        lock.release()
    return folder


def _convert(gguf: Path, target: Path) -> None:
    import safetensors
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {gguf.name} to safetensors (once)…", file=sys.stderr, flush=True)
    try:
        with quiet_libraries():
            model = AutoModelForCausalLM.from_pretrained(
                str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False)
            _forget_gguf(model)
            _name_special_tokens(tokenizer, gguf)
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
    except safetensors.SafetensorError as error:  # so it calls a full disk, too
        raise UserError(f"cannot write the model cache {target.parent}: {error}") from error
    except (ValueError, KeyError, NotImplementedError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"transformers cannot convert {gguf}: {reason}") from error


def _name_special_tokens(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> None:
    """Set the special tokens by the ids that the file gives.

    Versions of transformers read them differently: some take the first token of a turn for its end.
    """
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(field.contents())))
    tokenizer.clean_up_tokenization_spaces = False  # it would make decoding lossy


def _forget_gguf(model: object) -> None:
    """Take off the marks by which newer transformers refuses to save a model that came from a GGUF.

    The weights are plain float32 by now; transformers before 5.2x sets no such marks.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None  # type: ignore[attr-defined]
    if getattr(model, "is_quantized", False):
        model.is_quantized = False  # type: ignore[attr-defined]
    config = model.config  # type: ignore[attr-defined]
    if getattr(config, "quantization_config", None) is not None:
        delattr(config, "quantization_config")


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
