"""What users are promised: PEFT's own answers in non_shared, training's own forward in base_lr_shared, no stale hit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ROLES, Recorder, tiny_engine
from peft import PeftModel
from tiny import make_adapter_set, tiny_model, tiny_tokenizer
from tolerances import MODEL_TOLERANCES

from lragent.adapter_set import AdapterSet
from lragent.attention import ATTENTION, PackedPass, register_attention
from lragent.chat import Renderer
from lragent.modes import PrefixWriter, SharingMode
from lragent.peft_io import write_peft_folders
from lragent.rope import rope_at
from lragent.routing import Route
from lragent.serve.engine.chat import ChatPrompts
from lragent.serve.engine.types import FinishReason
from lragent.tied_lora import build_role_model
from lragent.train.examples import load_examples

ALL = ("base", *ROLES)


class Peft:
    """What a user has today: transformers and PEFT, one adapter per role."""

    def __init__(self, adapters: AdapterSet, folder: Path) -> None:
        write_peft_folders(adapters, folder)
        self.model: Any = PeftModel.from_pretrained(tiny_model(), folder / ROLES[0], adapter_name=ROLES[0])
        for role in adapters.role_names[1:]:
            self.model.load_adapter(folder / role, adapter_name=role)
        self.model.eval()

    @torch.inference_mode()
    def generate(self, role: str, ids: list[int], count: int) -> list[int]:
        """`count` greedy tokens, the end of the turn ignored."""
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        if role == "base":
            with self.model.disable_adapter():
                return self.model.generate(**inputs, **options)[0, len(ids) :].tolist()
        self.model.set_adapter(role)
        return self.model.generate(**inputs, **options)[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def adapters() -> AdapterSet:
    return make_adapter_set(tiny_model(), ROLES, targets=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"))


@pytest.fixture(scope="module")
def peft(adapters: AdapterSet, tmp_path_factory: pytest.TempPathFactory) -> Peft:
    return Peft(adapters, tmp_path_factory.mktemp("peft"))


def submit_without_end(recorder: Recorder, role: str, ids: list[int], count: int) -> str:
    """`generate` with min_new_tokens never draws the end token, so the engine must not either."""
    return recorder.submit(role, ids, count, logit_bias=((2, -100.0),))


def context(length: int, seed: int) -> list[int]:
    return torch.randint(3, 280, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_non_shared_is_peft_token_for_token_cold_warm_and_evicted(adapters: AdapterSet, peft: Peft) -> None:
    recorder = Recorder(tiny_engine("non_shared", adapters, cache_tokens=160, max_model_len=128))
    shared = context(30, 1)
    evicted = 0
    for turn in range(12):  # warm prefixes, other roles between, and more contexts than the pool holds
        ids = shared[: 20 + turn % 3] + context(8 + turn, 100 + turn % 5)
        role = ALL[turn % 4]
        name = submit_without_end(recorder, role, ids, 12)
        recorder.finish()
        assert list(recorder.answer(name).token_ids) == peft.generate(role, ids, 12), (turn, role)
        evicted = recorder.engine.stats().base_evicted
    assert evicted > 0
    assert recorder.engine.stats().base_reused > 0


def test_non_shared_is_peft_token_for_token_side_by_side(adapters: AdapterSet, peft: Peft) -> None:
    """All roles at once, in one batch, with too few slots for all: some are preempted and resume."""
    recorder = Recorder(tiny_engine("non_shared", adapters, cache_tokens=150, max_model_len=128, token_budget=16))
    asked = {}
    for turn in range(8):
        role, ids = ALL[turn % 4], context(18, 7) + context(5 + turn, 50 + turn // 4)
        name = submit_without_end(recorder, role, ids, 20)
        asked[name] = (role, ids)
    recorder.finish()
    for name, (role, ids) in asked.items():
        assert list(recorder.answer(name).token_ids) == peft.generate(role, ids, 20), role
    assert recorder.engine.cache.base_pool.used_count == recorder.engine.cache.base_tree.size


MESSAGES = [
    {"role": "system", "content": "Tools: Search, Finish."},
    {"role": "user", "content": "Who is the author of the book?"},
    {"role": "assistant", "name": "plan", "content": "Need the author. Search"},
    {"role": "assistant", "name": "action", "content": "the book"},
    {"role": "tool", "content": "The book: the author is Renbras."},
    {"role": "assistant", "name": "plan", "content": "The author is Renbras. Finish"},
    {"role": "assistant", "name": "action", "content": "Renbras"},
    {"role": "assistant", "name": "reflect", "content": "right"},
]


@pytest.mark.parametrize("prefix_writer", list(PrefixWriter))
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "up_proj")], ids="-".join)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_training_saw_is_what_serving_gives(
    prefix_writer: PrefixWriter, targets: tuple[str, ...], family: str, tmp_path: Path
) -> None:
    """The one pass over a trajectory, as training runs it, against the engine replaying it turn by turn over chat."""
    adapters = make_adapter_set(tiny_model(family=family), ROLES, targets=targets)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    renderer = Renderer(tiny_tokenizer())
    (example,) = load_examples(data, renderer, ROLES, objective="shared", prefix_writer=prefix_writer)
    trained = _one_pass(tiny_model(family=family), adapters, example.token_ids, example.roles)

    options: dict[str, Any] = {"prefix_writer": prefix_writer, "model_options": {"family": family}}
    recorder = Recorder(tiny_engine("base_lr_shared", adapters, **options))
    prompts = ChatPrompts(renderer, recorder.engine.turns, recorder.engine.sharing, prefix_writer)
    compared = 0
    for at, message in enumerate(MESSAGES):
        if message["role"] != "assistant":
            continue
        prompt = prompts.prepare(MESSAGES[:at], message["name"], "")
        assert prompt.speakers is not None
        start = len(prompt.token_ids)
        end = start + len(tiny_tokenizer()(message["content"], add_special_tokens=False).input_ids) + 1
        said = example.token_ids[start:end].tolist()
        roles = [role for role, count in prompt.speakers for _ in range(count)]
        name = recorder.submit(
            message["name"], prompt.token_ids, len(said), position_roles=roles,
            opening=prompt.opening, ignore_eos=False,
        )  # fmt: skip
        recorder.forced[name] = iter(said)
        recorder.finish()
        assert recorder.answer(name).finish_reason is FinishReason.STOP
        assert recorder.answer(name).text == message["content"]
        got = torch.stack(recorder.logits[name])
        torch.testing.assert_close(got, trained[start - 1 : end - 1], **MODEL_TOLERANCES[torch.float32])
        compared += len(got)
    assert compared == int((example.loss_roles > 0).sum())
    reused = recorder.engine.stats()
    assert reused.tokens_computed < len(example.token_ids)  # nothing was computed twice


def _one_pass(model: Any, adapters: AdapterSet, ids: torch.Tensor, roles: torch.Tensor) -> torch.Tensor:
    register_attention()
    model.set_attn_implementation(ATTENTION)
    spec = adapters.roles[0]
    built = build_role_model(model, ROLES, rank=spec.rank, alpha=spec.alpha, targets=adapters.targets)
    with torch.no_grad():
        for path, module in built.modules.items():
            module.shared_a.copy_(adapters.shared_a[path])
            for weight, b in zip(module.role_b, adapters.role_b[path], strict=True):
                weight.copy_(b)
    positions = torch.arange(len(ids))
    route = Route(roles, None, built.split())
    rope = rope_at(built.model.get_base_model(), positions, torch.float32)
    with built.router.use(route), torch.no_grad():
        out = built.model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_pass=PackedPass(((0, len(ids)),), route, rope),
            use_cache=False,
        )
    return out.logits[0]


def _reloaded(adapters: AdapterSet, role: int) -> AdapterSet:
    """The same names, the same A; one role has other weights."""
    other = {path: b.clone() for path, b in adapters.role_b.items()}
    for b in other.values():
        b[role] += 0.1
    return dataclasses.replace(adapters, role_b=other)


@pytest.mark.parametrize("mode", list(SharingMode))
def test_other_weights_under_an_old_name_never_hit_old_entries(mode: SharingMode) -> None:
    old = make_adapter_set(tiny_model(), ROLES)
    before = Recorder(tiny_engine(mode, old))
    ids = context(40, 3)
    before.ask("plan", ids)
    again = before.ask("plan", ids).usage
    assert again is not None
    assert again.base_reused == 39

    after = Recorder(tiny_engine(mode, _reloaded(old, 0)))
    cache = before.engine.cache
    after.engine._scheduler.cache = cache
    after.engine._runner.attention = before.engine._runner.attention
    cache.set_live_writers([role.reader.writer for role in after.engine.roles.named.values()])
    usage = after.ask("plan", ids).usage
    assert usage is not None
    assert (usage.base_reused, usage.lr_reused) == (0, 0)
    fresh = Recorder(tiny_engine(mode, _reloaded(old, 0)))
    fresh.ask("plan", ids)
    torch.testing.assert_close(after.last_logits(), fresh.last_logits(), **MODEL_TOLERANCES[torch.float32])


@pytest.mark.parametrize("mode", list(SharingMode))
def test_tenants_share_nothing(mode: SharingMode) -> None:
    recorder = Recorder(tiny_engine(mode))
    ids = context(20, 4)
    recorder.ask("plan", ids, salt="one")
    other, same = recorder.ask("plan", ids, salt="two").usage, recorder.ask("plan", ids, salt="one").usage
    assert other is not None
    assert same is not None
    assert other.base_reused == 0
    assert same.base_reused == 19


@pytest.mark.parametrize("mode", ["full_shared", "base_lr_shared"])
def test_a_role_switch_costs_the_new_tokens_only_and_a_fork_no_slot_of_the_history(mode: str) -> None:
    recorder = Recorder(tiny_engine(mode))
    history = context(60, 5)
    recorder.ask("plan", history)
    before = recorder.engine.cache.base_tree.size
    for role in ROLES:
        usage = recorder.ask(role, [*history, 9, 9], 1).usage
        assert usage is not None
        assert usage.base_reused >= 60 - 1  # the opening token of plan's own turn is the only one not shared
        assert usage.tokens_computed <= 3
    assert recorder.engine.cache.base_tree.size - before <= 3 * 3


@pytest.mark.parametrize("mode", ["full_shared", "base_shared", "base_lr_shared"])
def test_a_fork_into_all_roles_at_once_takes_no_base_slot_for_the_history(mode: str) -> None:
    engine = (recorder := Recorder(tiny_engine(mode, check_integrity=True))).engine
    history = context(60, 6)
    recorder.ask("plan", history, 1)
    allocated = engine.cache.counters.base_allocated
    start = engine.stats()
    before = len(engine.cache.base_tree.all_slots())
    names = [recorder.submit(role, [*history, 9, 10 + at], 1) for at, role in enumerate(ROLES)]
    recorder.finish()
    for name in names:
        usage = recorder.answer(name).usage
        assert usage is not None
        assert usage.base_reused >= 59
    assert engine.cache.counters.base_allocated - allocated <= 3 * 4
    assert len(engine.cache.base_tree.all_slots()) - before <= 3 * 3
    stats = engine.stats()
    assert stats.base_bytes_used - start.base_bytes_used <= 9 * stats.base_bytes_total // stats.slots_total
    assert stats.lr_bytes_used > 0 if mode != "full_shared" else stats.lr_bytes_total == 0


@pytest.mark.parametrize("mode", list(SharingMode))
def test_cancelled_requests_leave_the_pool_at_baseline(mode: SharingMode) -> None:
    recorder = Recorder(tiny_engine(mode, token_budget=8))
    names = [recorder.submit(ALL[i % 4], context(30, i), 10) for i in range(6)]
    for step in range(6):
        recorder.engine.step()
        recorder.engine.cancel(names[step])
        recorder.engine.cache.check_integrity()
    recorder.engine.cancel("nobody")
    recorder.finish()
    for name in names:
        assert recorder.chunks[name][-1].finish_reason in (FinishReason.CANCELLED, FinishReason.LENGTH)
    recorder.engine.cache.clear()
    recorder.engine.cache.check_integrity()
    assert recorder.engine.cache.base_pool.used_count == recorder.engine.cache.lr_pool.used_count == 0
    assert not recorder.engine.busy
