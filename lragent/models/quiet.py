"""Keeping libraries silent where our own output says what is going on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars of transformers, and no word of DeepSpeed about which accelerator it found.

    DeepSpeed, when installed, is imported by the way and logs to standard output, where `--json` output goes.
    """
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    deepspeed = logging.getLogger("DeepSpeed")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    deepspeed.addFilter(_not_about_the_accelerator)
    try:
        yield
    finally:
        deepspeed.removeFilter(_not_about_the_accelerator)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _not_about_the_accelerator(record: logging.LogRecord) -> bool:
    return record.module != "real_accelerator" or record.levelno >= logging.ERROR
