"""Puts an engine together from a model, a pack and a sharing mode."""

from __future__ import annotations

import hashlib
import logging

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
from lragent.serve.engine.engine import Engine, EngineLimits, end_tokens_of
from lragent.serve.engine.kernel_pass import KernelAttention
from lragent.serve.engine.memory import GPU_SHARE, cache_slots, default_token_budget
from lragent.serve.engine.runner import Runner
from lragent.serve.engine.scheduler import Scheduler
from lragent.serve.engine.sequence import EngineRole
from lragent.serve.engine.service import EngineService
from lragent.serve.engine.types import RoleCard

logger = logging.getLogger(__name__)

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""By name; "auto" is float32 on the CPU and bfloat16 elsewhere."""


def build_service(
    *,
    model: str | None,
    roles: str | None,
    sharing: SharingMode,
    prefix_writer: PrefixWriter | None,
    dtype: str,
    device: str,
    max_model_len: int | None,
    cache_tokens: int | None,
    max_num_seqs: int,
    seed: int,
    gpu_memory_utilization: float = GPU_SHARE,
    max_num_batched_tokens: int | None = None,
    check_integrity: bool = False,
) -> EngineService:
    """Load everything that `lragent serve` names. The service is not started yet.

    model: as `resolve_model` takes it. roles: path of a pack, or None to serve the base model alone. prefix_writer:
    None takes what the pack was trained for. dtype: a key of `DTYPES`. max_model_len, cache_tokens,
    max_num_batched_tokens: None derives them from the model, the free memory and the device. Raises UserError naming
    the option at fault.
    """
    source = resolve_model(model)
    print_of_base = fingerprint(source.path)
    adapters = read_pack(roles, expect_fingerprint=print_of_base) if roles is not None else None
    register_attention()
    loaded = load_model(source, DTYPES[dtype], device, attn_implementation=ATTENTION)
    engine = build_engine(
        loaded,
        load_tokenizer(source),
        adapters,
        sharing=sharing,
        prefix_writer=prefix_writer,
        max_model_len=max_model_len,
        cache_tokens=cache_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        max_num_seqs=max_num_seqs,
        token_budget=max_num_batched_tokens,
        seed=seed,
        check_integrity=check_integrity,
    )
    names = [] if adapters is None else list(adapters.role_names)
    cards = [RoleCard(source.name, None, str(source.path), None)]
    cards += [RoleCard(name, source.name, str(roles), engine.roles[name].reader.digest) for name in names]
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
    max_num_seqs: int = 16,
    token_budget: int | None = None,
    seed: int = 0,
    check_integrity: bool = False,
) -> Engine:
    """An engine over a loaded model (with `attn_implementation=ATTENTION`), whose projections are replaced in place.

    token_budget: tokens per step. check_integrity: check all that the scheduler keeps before each step (slow, for
    debugging).
    """
    router = Router()
    split: frozenset[str] = frozenset()
    if adapters is not None:
        check_fits(model, adapters)
        if sharing.decomposed:
            split = frozenset(adapters.targets) & {"k_proj", "v_proj"}
        unsupported = unsupported_key_norm(model) if "k_proj" in split else None
        if unsupported is not None:
            raise UserError(
                f"--sharing {sharing}: {unsupported} is no norm of keys that can be applied for each reader, so an "
                "adapter on k_proj cannot be cached apart; serve with --sharing non_shared or full_shared, or train "
                "without k_proj."
            )
        install_roles(model, adapters, router)
        _warn_of_other_use(adapters, sharing, prefix_writer)
    shape = _cache_shape(model, adapters, split)
    place = next(model.parameters())
    context = _max_context(model, max_model_len)
    slots = cache_slots(
        shape,
        place.dtype,
        place.device,
        sharing=sharing,
        context=context,
        asked=cache_tokens,
        utilization=gpu_memory_utilization,
    )
    budget = token_budget or default_token_budget(place.device, max_num_seqs)
    paged = sharing is SharingMode.BASE_SHARED
    per = shape.lr_per_slot if paged else 1
    cache = RoleCache(
        sharing,
        slots,
        lr_per_slot=per,
        a_digest=adapters.a_digest() if adapters else "",
        slot_bytes=shape.base_bytes(place.dtype),
        lr_slot_bytes=0 if paged else shape.lr_bytes(place.dtype),
    )
    context = min(context, cache.longest)
    roles = _engine_roles(adapters, resolve_prefix_writer(prefix_writer, adapters))
    pools = CachePools(shape, slots, place.dtype, place.device, paged=paged)
    attention = _attention(model, pools, context)
    writers = {role.reader.writer: role.index for role in roles.values()}
    return Engine(
        runner=Runner(model, router, attention, sharing, split, writers),
        scheduler=Scheduler(cache, max_num_seqs, budget, check=check_integrity),
        tokenizer=tokenizer,
        roles=roles,
        end_tokens=end_tokens_of(model, tokenizer),
        vocab_size=model.config.get_text_config().vocab_size,
        limits=EngineLimits(context),
        seed=seed,
    )


def _attention(model: PreTrainedModel, pools: CachePools, context: int) -> CachedAttention | KernelAttention:
    """Through the kernels on a GPU, else in plain torch. context: the most positions that a sequence has."""
    device = pools.key.device
    dtype = torch.float32 if device.type == "cuda" else pools.key.dtype
    rope = None
    if pools.low_k is not None:
        rope = rope_at(model, torch.arange(max(context, LEAST_ANGLES), device=device), dtype)
    return KernelAttention(pools, rope) if device.type == "cuda" else CachedAttention(pools, rope)


def resolve_prefix_writer(asked: PrefixWriter | None, adapters: AdapterSet | None) -> PrefixWriter:
    """Who writes the common prefix: as asked, else as the pack was trained, else the base model."""
    if asked is not None:
        return asked
    if adapters is not None and adapters.prefix_writer is not None:
        return PrefixWriter(adapters.prefix_writer)
    return PrefixWriter.BASE


def _engine_roles(adapters: AdapterSet | None, writer: PrefixWriter) -> dict[str, EngineRole]:
    """`base` first. Roles with equal weights share a writer: what one wrote is as good as the other's."""
    digests = {BASE: "base"}
    if adapters is not None:
        digests |= {name: adapters.role_digest(name) for name in adapters.role_names}
    roles = {}
    for index, (name, digest) in enumerate(digests.items()):
        identity = hashlib.sha256(f"{digest} {writer}".encode()).digest()
        roles[name] = EngineRole(name, index, Reader(digest, int.from_bytes(identity[:8], "big") >> 1))
    return roles


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


def _cache_shape(model: PreTrainedModel, adapters: AdapterSet | None, split: frozenset[str]) -> CacheShape:
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
