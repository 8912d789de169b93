"""What an engine on a GPU does before its first request, so that no request waits for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from transformers import PreTrainedModel

from lragent.kernels.ops import plans_ahead
from lragent.serve.cache.pools import CacheShape
from lragent.serve.engine.fused_layer import FusedLayer
from lragent.serve.engine.graphs import StepGraphs, ladder
from lragent.serve.engine.runner import Runner
from lragent.serve.engine.step_tensors import StepTensors

logger = logging.getLogger(__name__)

GRAPH_BYTES = 1 << 30
"""About what all graphs hold beside the logits that they leave."""
BYTES_PER_LOGIT = 80
"""What random draws with a sort take at their peak, and penalties."""


@torch.inference_mode()
def step_bytes(runner: Runner, model: PreTrainedModel, shape: CacheShape, tokens: int, rows: int, context: int) -> int:
    """Bytes that steps take at their peak beside weights and cache; most of it is found by running one of `tokens`.

    The runner's attention must have pools, of any size: nothing is written. rows: the most sequences that run at once;
    context: the most positions of one.
    """
    weight = next(model.parameters())
    tensors = StepTensors.empty(tokens, rows, weight.device)
    tensors.query_start[1:] = tokens
    torch.cuda.synchronize(weight.device)
    before = torch.cuda.memory_allocated(weight.device)
    torch.cuda.reset_peak_memory_stats(weight.device)
    runner.forward_any(tensors, tokens)
    torch.cuda.synchronize(weight.device)
    found = torch.cuda.max_memory_allocated(weight.device) - before
    # A context of one layer is laid out for long chunks; the whole cache has no more tokens than fit into the memory.
    longest = min(context, torch.cuda.mem_get_info(weight.device)[1] // shape.base_bytes(weight.dtype))
    laid_out = shape.width * longest * weight.element_size()
    vocabulary = model.config.get_text_config().vocab_size
    captured = sum(bucket.sequences for bucket in ladder(rows)) * weight.element_size()
    torch.cuda.empty_cache()
    return found + laid_out + vocabulary * (rows * BYTES_PER_LOGIT + captured) + GRAPH_BYTES


def capture_graphs(runner: Runner, rows: int, device: torch.device) -> None:
    """Capture all steps that are worth it. rows: the most sequences that run at once.

    Where a model does something that no graph can hold, such as asking the device for a number, all steps stay eager.
    """
    graphs, buckets = StepGraphs(nobody=rows), ladder(rows)
    with _progress("CUDA graphs", len(buckets)) as (progress, task):
        try:
            graphs.capture(runner.forward_any, buckets, device, lambda _: progress.advance(task))
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            logger.warning("No CUDA graphs, so short steps are several times slower: %s", reason)
            return
    runner.graphs = graphs


@torch.inference_mode()
def plan_long_chunks(
    model: PreTrainedModel, shape: CacheShape, tokens: int, context: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Let cuDNN plan for prompts that are prefilled in chunks of `tokens`. context: the most positions of one.

    What cannot be planned now is planned when it is met. Layers with a window or a soft cap go another way.
    """
    facts = [layer.facts for layer in model.get_decoder().layers if isinstance(layer, FusedLayer)]
    if not any(each.window is None and each.softcap is None for each in facts):
        return
    heads = model.config.get_text_config().num_attention_heads
    plans = plans_ahead(heads, shape.kv_heads, shape.head_dim, dtype, device, tokens, context)
    with _progress("attention to long prompts", len(plans)) as (progress, task):
        for plan in plans:
            try:
                plan()
            except RuntimeError as error:
                logger.info("cuDNN does not plan ahead: %s", error)
                break
            progress.advance(task)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


@contextmanager
def _progress(what: str, total: int) -> Iterator[tuple[Progress, TaskID]]:
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True), transient=True) as progress:
        yield progress, progress.add_task(what, total=total)
