"""Puts an engine together from a model, a pack and a sharing mode."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lragent.adapter_set import AdapterSet
from lragent.attention import ATTENTION, register_attention
from lragent.chat import BASE, Renderer
from lragent.errors import UserError
from lragent.kernels.cached import LEAST_ANGLES
from lragent.key_norm import unsupported_key_norm
from lragent.models import check_fits, fingerprint, load_model, load_tokenizer, resolve_model
from lragent.modes import PrefixWriter, SharingMode
from lragent.pack import read_pack
from lragent.role_linear import install_roles
from lragent.rope import rope_at
from lragent.routing import Router
from lragent.serve.cache.pools import CachePools, CacheShape
from lragent.serve.cache.role_cache import Reader, RoleCache
from lragent.serve.engine.cached_pass import CachedAttention
from lragent.serve.engine.chat import ChatPrompts
from lragent.serve.engine.engine import MOST_WAITING, Engine, EngineLimits, end_tokens_of
from lragent.serve.engine.fusing import fuse_layers
from lragent.serve.engine.kernel_pass import KernelAttention
from lragent.serve.engine.limits import check_limits
from lragent.serve.engine.lora_modules import read_lora_modules
from lragent.serve.engine.memory import GPU_SHARE, cache_slots, step_limits
from lragent.serve.engine.role_weights import RoleWeights
from lragent.serve.engine.roles import EngineRole, RoleTable
from lragent.serve.engine.runner import Runner
from lragent.serve.engine.sampler import BatchSampler
from lragent.serve.engine.scheduler import Scheduler
from lragent.serve.engine.service import EngineService
from lragent.serve.engine.tables import SlotTables
from lragent.serve.engine.types import RoleCard
from lragent.serve.engine.warm_up import capture_graphs, plan_long_chunks, step_bytes

logger = logging.getLogger(__name__)

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""By name; "auto" is float32 on the CPU and bfloat16 elsewhere."""


def build_service(
    *,
    model: str | None = None,
    roles: str | None = None,
    sharing: SharingMode = SharingMode.BASE_LR_SHARED,
    prefix_writer: PrefixWriter | None = None,
    dtype: str = "auto",
    device: str = "auto",
    max_model_len: int | None = None,
    max_tokens_in_cache: int | None = None,
    gpu_memory_utilization: float = GPU_SHARE,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    seed: int = 0,
    enforce_eager: bool = False,
    check_integrity: bool = False,
    lora_modules: Sequence[str] = (),
    max_roles: int | None = None,
    spare_roles: int = 0,
    max_waiting: int = MOST_WAITING,
) -> EngineService:
    """Load everything that `lragent serve` names. The service is not started yet.

    model: as `resolve_model` takes it. roles: path of a pack, or None to serve the base model alone. prefix_writer:
    None takes what the pack was trained for. dtype: a key of `DTYPES`. device: "auto", or as torch names it.
    max_model_len, max_tokens_in_cache, max_num_seqs, max_num_batched_tokens: None derives them from the model, the
    free memory and the device. enforce_eager: capture no CUDA graphs. lora_modules: `name=path` of PEFT folders or
    packs in place of `roles`. max_roles: places for roles; None: `spare_roles` more than there are. max_waiting: open
    requests, beyond which more are refused. Raises UserError naming the option at fault.
    """
    check_limits(
        max_model_len=max_model_len,
        max_tokens_in_cache=max_tokens_in_cache,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    if dtype not in DTYPES:
        raise UserError(f"dtype: must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    source = resolve_model(model)
    print_of_base = fingerprint(source.path)
    adapters: AdapterSet | None
    if lora_modules:
        adapters, roots = read_lora_modules(lora_modules, print_of_base)
    else:
        adapters = read_pack(roles, expect_fingerprint=print_of_base) if roles is not None else None
        roots = {} if adapters is None else dict.fromkeys(adapters.role_names, str(roles))
    if adapters is not None and max_roles is None and spare_roles:
        max_roles = len(adapters.roles) + spare_roles
    register_attention()
    loaded = load_model(source, DTYPES[dtype], _device(device), attn_implementation=ATTENTION)
    engine = build_engine(
        loaded,
        load_tokenizer(source),
        adapters,
        sharing=sharing,
        prefix_writer=prefix_writer,
        max_model_len=max_model_len,
        cache_tokens=max_tokens_in_cache,
        gpu_memory_utilization=gpu_memory_utilization,
        max_num_seqs=max_num_seqs,
        token_budget=max_num_batched_tokens,
        seed=seed,
        graphs=not enforce_eager,
        check_integrity=check_integrity,
        max_roles=max_roles,
        fingerprint=print_of_base,
        max_waiting=max_waiting,
    )
    cards = [RoleCard(source.name, None, str(source.path), None)]
    cards += [RoleCard(name, source.name, root, engine.roles.named[name].reader.digest) for name, root in roots.items()]
    writer = resolve_prefix_writer(prefix_writer, adapters)
    chat = ChatPrompts(Renderer(engine.tokenizer), engine.turns, sharing, writer)
    return EngineService(engine, chat, cards, source.name)


def build_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapters: AdapterSet | None,
    *,
    sharing: SharingMode,
    prefix_writer: PrefixWriter | None = None,
    max_model_len: int | None = None,
    cache_tokens: int | None = None,
    gpu_memory_utilization: float = GPU_SHARE,
    max_num_seqs: int | None = None,
    token_budget: int | None = None,
    seed: int = 0,
    fused: bool = True,
    graphs: bool = True,
    ahead: bool | None = None,
    check_integrity: bool = False,
    max_roles: int | None = None,
    fingerprint: str | None = None,
    max_waiting: int = MOST_WAITING,
) -> Engine:
    """An engine over a loaded model (with `attn_implementation=ATTENTION`), whose projections are replaced in place.

    max_num_seqs: sequences that run at once. token_budget: tokens per step. fused: let fused layers stand in for the
    model's own where they can. graphs: capture steps as CUDA graphs. ahead: launch a step before the one before it is
    read; None does so on a GPU. check_integrity: check all that the scheduler keeps before each step (slow, for
    debugging). max_roles: places for roles beside the base, where more may be loaded later; never fewer than there
    are. fingerprint: of the base, by which roles that come later are judged.
    """
    router, room, weights = Router(), 0, None
    split = split_kinds(adapters, sharing)
    if adapters is not None:
        check_fits(model, adapters)
        unsupported = unsupported_key_norm(model) if "k_proj" in split else None
        if unsupported is not None:
            raise UserError(
                f"--sharing {sharing}: {unsupported} is no norm of keys that can be applied for each reader, so an "
                "adapter on k_proj cannot be cached apart; serve with --sharing non_shared or full_shared, or train "
                "without k_proj."
            )
        room = max(len(adapters.roles), max_roles or 0)
        weights = RoleWeights(install_roles(model, adapters, router, room), fingerprint)
        _warn_of_other_use(adapters, sharing, prefix_writer)
    if fused:
        fuse_layers(model, router, split)
    shape = cache_shape(model, adapters, split)
    place = next(model.parameters())
    device, dtype, on_gpu = place.device, place.dtype, place.device.type == "cuda"
    context = _max_context(model, max_model_len)
    sequences, budget = step_limits(device, max_num_seqs, token_budget)
    paged = sharing is SharingMode.BASE_SHARED
    writer_of = partial(_reader, resolve_prefix_writer(prefix_writer, adapters))
    roles = RoleTable(_engine_roles(adapters, writer_of), room)
    vocab_size = model.config.get_text_config().vocab_size

    def attention(slots: int) -> CachedAttention | KernelAttention:
        return _attention(model, CachePools(shape, slots, dtype, device, paged=paged), sequences, context, paged)

    runner = Runner(
        model,
        router,
        attention(1),
        sharing,
        split,
        roles.role_of,
        BatchSampler(sequences, vocab_size, device),
        sequences,
        ahead=on_gpu if ahead is None else ahead,
    )
    slots = cache_slots(
        shape,
        dtype,
        device,
        sharing=sharing,
        context=context,
        asked=cache_tokens,
        utilization=gpu_memory_utilization,
        activations=step_bytes(runner, model, shape, budget, sequences, context) if on_gpu else 0,
    )
    cache = RoleCache(
        sharing,
        slots,
        lr_per_slot=shape.lr_per_slot if paged else 1,
        a_digest=adapters.a_digest() if adapters else "",
        slot_bytes=shape.base_bytes(dtype),
        lr_slot_bytes=0 if paged else shape.lr_bytes(dtype),
    )
    if max_model_len is not None and cache.longest < max_model_len:
        logger.warning(
            "The cache holds %d tokens: --max-model-len %d is lowered to that.", cache.longest, max_model_len
        )
    context = min(context, cache.longest)
    runner.attention = attention(slots)
    if on_gpu and graphs:
        with torch.cuda.device(device):  # streams and graphs are of the current one where nobody says
            capture_graphs(runner, sequences, device)
            plan_long_chunks(model, shape, budget, context, dtype, device)
    return Engine(
        runner=runner,
        scheduler=Scheduler(cache, sequences, budget, check=check_integrity),
        tokenizer=tokenizer,
        roles=roles,
        weights=weights,
        writer_of=writer_of,
        end_tokens=end_tokens_of(model, tokenizer),
        vocab_size=vocab_size,
        limits=EngineLimits(context, max_waiting),
        seed=seed,
    )


def _device(asked: str) -> str:
    """What torch calls the device. Raises UserError where there is none."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device: {asked} is asked for, but torch finds no CUDA device; use --device cpu.")
    return asked


def _attention(
    model: PreTrainedModel, pools: CachePools, rows: int, context: int, low_apart: bool
) -> CachedAttention | KernelAttention:
    """Through the kernels on a GPU, else in plain torch. context: the most positions that a sequence has."""
    device = pools.key.device
    dtype = torch.float32 if device.type == "cuda" else pools.key.dtype
    rope = None
    if pools.low_k is not None:
        rope = rope_at(model, torch.arange(max(context, LEAST_ANGLES), device=device), dtype)
    if device.type != "cuda":
        return CachedAttention(pools, rope)
    return KernelAttention(pools, SlotTables(rows, context, low_apart, device), rope)


def resolve_prefix_writer(asked: PrefixWriter | None, adapters: AdapterSet | None) -> PrefixWriter:
    """Who writes the common prefix: as asked, else as the pack was trained, else the base model."""
    if asked is not None:
        return asked
    if adapters is not None and adapters.prefix_writer is not None:
        return PrefixWriter(adapters.prefix_writer)
    return PrefixWriter.BASE


def _reader(prefix_writer: PrefixWriter, digest: str) -> Reader:
    """A role in the cache. Roles with equal weights share a writer: what one wrote is as good as the other's."""
    identity = hashlib.sha256(f"{digest} {prefix_writer}".encode()).digest()
    return Reader(digest, int.from_bytes(identity[:8], "big") >> 1)


def _engine_roles(adapters: AdapterSet | None, reader: Callable[[str], Reader]) -> dict[str, EngineRole]:
    """`base` first."""
    digests = {BASE: "base"}
    if adapters is not None:
        digests |= {name: adapters.role_digest(name) for name in adapters.role_names}
    return {name: EngineRole(name, index, reader(digest)) for index, (name, digest) in enumerate(digests.items())}


def _warn_of_other_use(adapters: AdapterSet, sharing: SharingMode, prefix_writer: PrefixWriter | None) -> None:
    trained = adapters.objective
    if adapters.form == "stacked" and sharing is not SharingMode.NON_SHARED:
        logger.warning("These roles were trained apart and stacked: sharing a cache between them costs accuracy.")
    elif trained == "per_role" and sharing is not SharingMode.NON_SHARED:
        logger.warning("This pack was trained per_role: served as %s it loses accuracy; train it `mixed`.", sharing)
    elif trained == "shared" and sharing is not SharingMode.BASE_LR_SHARED:
        logger.warning("This pack was trained for base_lr_shared: served as %s it loses accuracy.", sharing)
    if prefix_writer is not None and adapters.prefix_writer not in (None, str(prefix_writer)):
        logger.warning("This pack was trained with prefix_writer %s.", adapters.prefix_writer)


def split_kinds(adapters: AdapterSet | None, sharing: SharingMode) -> frozenset[str]:
    """The projections whose low-rank part is cached apart and applied by the reader."""
    if adapters is None or not sharing.decomposed:
        return frozenset()
    return frozenset(adapters.targets) & {"k_proj", "v_proj"}


def cache_shape(model: PreTrainedModel, adapters: AdapterSet | None, split: frozenset[str]) -> CacheShape:
    """What one token's cache holds."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    ranks = dict.fromkeys(("v_proj", "k_proj"), 0)
    for path in adapters.module_paths if adapters is not None else ():
        kind = path.rpartition(".")[2]
        if adapters is not None and kind in split:
            ranks[kind] = max(ranks[kind], adapters.rank(path))
    return CacheShape(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        rank_v=ranks["v_proj"],
        rank_k=ranks["k_proj"],
    )


def _max_context(model: PreTrainedModel, asked: int | None) -> int:
    most = int(model.config.get_text_config().max_position_embeddings)
    if asked is None:
        return most
    if not 2 <= asked <= most:
        raise UserError(f"--max-model-len: must be between 2 and the model's {most}, not {asked}.")
    return asked
