"""Base models: from a name, a folder or a file to safetensors weights, and what makes two of them the same."""

from lragent.models.fingerprint import fingerprint
from lragent.models.source import ModelSource, load_model, load_tokenizer, resolve_model
from lragent.models.targets import check_adaptable, check_fits, target_modules

__all__ = [
    "ModelSource",
    "check_adaptable",
    "check_fits",
    "fingerprint",
    "load_model",
    "load_tokenizer",
    "resolve_model",
    "target_modules",
]
