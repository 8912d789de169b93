"""Roles that come and go while requests run."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from engines import WAYS, each_way, tiny_engine
from tiny import make_adapter_set, tiny_model

from lragent.adapter_set import AdapterSet
from lragent.errors import UserError
from lragent.peft_io import read_peft_folder, write_peft_folders
from lragent.serve.engine.engine import Engine
from lragent.serve.engine.roles import RoleRoomError
from lragent.serve.engine.types import Chunk, FinishReason, GenerationRequest, Prompt, SamplingParams, UnknownRoleError
from lragent.stacking import unstack

PROMPT = list(range(3, 60))


def other_b(adapters: AdapterSet, seed: int) -> AdapterSet:
    """The same A with other B's."""
    random = torch.Generator().manual_seed(seed)
    role_b = {path: torch.randn(b.shape, generator=random) / 8 for path, b in adapters.role_b.items()}
    return dataclasses.replace(adapters, role_b=role_b)


class Running:
    """Requests of one engine, stepped by hand."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.chunks = engine, {}
        self.count = 0

    def add(self, role: str, prompt: Any = PROMPT, tokens: int = 12, **more: Any) -> str:
        self.count += 1
        name = f"r{self.count}"
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        self.chunks[name] = []
        self.engine.add(GenerationRequest(name, role, Prompt(prompt, **more), params), self.chunks[name].append)
        return name

    def steps(self, count: int = 10_000) -> None:
        for _ in range(count):
            if not self.engine.busy:
                return
            self.engine.step()

    def ids(self, name: str) -> list[int]:
        return [token for chunk in self.chunks[name] for token in chunk.token_ids]

    def last(self, name: str) -> Chunk:
        return self.chunks[name][-1]

    def ask(self, role: str, prompt: Any = PROMPT, **more: Any) -> list[int]:
        name = self.add(role, prompt, **more)
        self.steps()
        return self.ids(name)


def load(engine: Engine, adapters: AdapterSet, role: str, name: str | None = None) -> None:
    assert engine.weights is not None
    engine.put_role(engine.weights.prepare(adapters, role, name=name or role, root="file"))


@pytest.fixture
def adapters() -> AdapterSet:
    return make_adapter_set(tiny_model(), ("plan", "action", "extra", "spare"))


def only(adapters: AdapterSet, *names: str) -> AdapterSet:
    at = [adapters.role_index(name) for name in names]
    role_b = {path: b[at] for path, b in adapters.role_b.items()}
    return dataclasses.replace(adapters, roles=tuple(adapters.roles[i] for i in at), role_b=role_b)


@pytest.mark.parametrize("sharing", ["base_lr_shared", "base_shared", "full_shared", "non_shared"])
@pytest.mark.parametrize("ahead", [False, True])
@each_way
def test_a_loaded_role_answers_as_one_that_was_there_from_the_start(
    adapters: AdapterSet, sharing: str, ahead: bool, way: str
) -> None:
    options = {"ahead": ahead, **WAYS[way]}
    whole = Running(tiny_engine(sharing, adapters, **options))
    later = Running(tiny_engine(sharing, only(adapters, "plan", "action"), max_roles=4, **options))
    for runs in (whole, later):
        runs.ask("plan")
    load(later.engine, adapters, "extra")
    assert later.ask("extra") == whole.ask("extra")
    assert later.ask("plan") == whole.ask("plan")


@each_way
def test_a_role_is_replaced_in_place_while_it_speaks(adapters: AdapterSet, way: str) -> None:
    """A running answer goes on with the weights it began with; the next one has the new ones, and hits nothing old."""
    two = only(adapters, "plan", "action")
    runs = Running(tiny_engine("base_lr_shared", two, max_roles=3, check_integrity=True, **WAYS[way]))
    before = runs.ask("plan", tokens=40)
    fresh = Running(tiny_engine("base_lr_shared", two, max_roles=3, **WAYS[way]))
    new = other_b(adapters, 9)
    name = fresh.add("plan", tokens=40)
    fresh.steps(6)
    load(fresh.engine, new, "plan")
    second = fresh.add("plan", tokens=40)
    fresh.steps()
    assert fresh.ids(name) == before
    alone = Running(tiny_engine("base_lr_shared", only(new, "plan", "action"), **WAYS[way]))
    assert fresh.ids(second) == alone.ask("plan", tokens=40)
    assert fresh.last(second).usage.base_reused == 0
    assert fresh.engine.roles.role_of.keys() == {role.reader.writer for role in fresh.engine.roles.named.values()}


def test_old_weights_that_come_back_find_their_cache(adapters: AdapterSet) -> None:
    runs = Running(tiny_engine("base_lr_shared", only(adapters, "plan", "action"), max_roles=3))
    runs.ask("plan")
    load(runs.engine, other_b(adapters, 9), "plan")
    name = runs.add("plan")
    runs.steps()
    assert runs.last(name).usage.base_reused == 0
    load(runs.engine, adapters, "plan")
    name = runs.add("plan")
    runs.steps()
    assert runs.last(name).usage.base_reused == len(PROMPT) - 1


@pytest.mark.parametrize("ahead", [False, True])
def test_unloading_lets_what_runs_end(adapters: AdapterSet, ahead: bool) -> None:
    runs = Running(tiny_engine("base_lr_shared", adapters, ahead=ahead, check_integrity=True))
    whole = Running(tiny_engine("base_lr_shared", adapters, ahead=ahead)).ask("extra", tokens=30)
    name = runs.add("extra", tokens=30)
    runs.steps(5)
    runs.engine.drop_role("extra")
    with pytest.raises(UnknownRoleError, match="'extra'"):
        runs.add("extra")
    runs.steps()
    assert runs.ids(name) == whole
    assert runs.last(name).finish_reason is FinishReason.LENGTH
    assert 3 not in runs.engine.roles.role_of.values()
    for module in runs.engine.weights._modules.values():
        assert not module.up[2].any()


def test_a_preempted_reader_outlives_the_writer_of_its_context(adapters: AdapterSet) -> None:
    """The writer is unloaded while others that read its words are preempted: they process these words themselves."""
    engine = tiny_engine("base_lr_shared", adapters, cache_tokens=128, max_model_len=128, check_integrity=True)
    runs = Running(engine)
    spoken = {"position_roles": ["extra"] * len(PROMPT)}
    names = [runs.add("plan", [at + 60, *PROMPT[1:]], tokens=50, **spoken) for at in range(3)]
    runs.steps(12)
    engine.drop_role("extra")
    runs.steps()
    assert engine.stats().preempted > 0
    assert all(runs.last(name).finish_reason is FinishReason.LENGTH for name in names)
    assert engine.cache.base_pool.used_count == engine.cache.base_tree.size


def test_places_are_bounded_and_come_back(adapters: AdapterSet) -> None:
    runs = Running(tiny_engine("base_lr_shared", only(adapters, "plan", "action"), max_roles=3))
    load(runs.engine, adapters, "extra")
    with pytest.raises(RoleRoomError, match="All 3 places"):
        load(runs.engine, adapters, "spare")
    name = runs.add("extra", tokens=8)
    runs.engine.drop_role("extra")
    with pytest.raises(RoleRoomError, match="1 by roles whose requests still run"):
        load(runs.engine, adapters, "spare")
    runs.steps()
    load(runs.engine, adapters, "spare")
    assert runs.last(name).finish_reason is FinishReason.LENGTH
    whole = Running(tiny_engine("base_lr_shared", adapters))
    assert runs.ask("spare", PROMPT[5:]) == whole.ask("spare", PROMPT[5:])


def test_a_stacked_server_takes_back_one_of_its_own(tmp_path: Any) -> None:
    stacked = make_adapter_set(tiny_model(), ("plan", "action"), tied=False)
    runs = Running(tiny_engine("base_lr_shared", stacked, max_roles=3))
    single = unstack(stacked)[1]
    write_peft_folders(single, tmp_path)
    load(runs.engine, read_peft_folder(tmp_path / "action", "again"), "again")
    assert runs.ask("again") == Running(tiny_engine("base_lr_shared", stacked)).ask("action")


def test_what_does_not_fit_is_refused_and_changes_nothing(adapters: AdapterSet) -> None:
    engine = tiny_engine("base_lr_shared", only(adapters, "plan", "action"), max_roles=4, fingerprint="this base")
    before = Running(engine).ask("plan")
    other_a = make_adapter_set(tiny_model(), ("extra",), seed=5)
    wide = make_adapter_set(tiny_model(), ("extra",), rank=8)
    more = make_adapter_set(tiny_model(), ("extra",), targets=("o_proj",))
    foreign = dataclasses.replace(adapters, base_fingerprint="another base")
    broken = dataclasses.replace(adapters, role_b={p: b * float("nan") for p, b in adapters.role_b.items()})
    for wrong, said in (
        (other_a, "its A is not the one"),
        (wide, "its rank is 8"),
        (more, "o_proj, which no role of this server does"),
        (foreign, "made for another base"),
        (broken, "NaN"),
    ):
        with pytest.raises(UserError, match=said):
            engine.weights.prepare(wrong, "extra", name="extra", root="file")
    with pytest.raises(UserError, match="no role 'nobody'"):
        engine.weights.prepare(adapters, "nobody", name="nobody", root="file")
    assert Running(engine).ask("plan") == before
    assert list(engine.roles.named) == ["base", "plan", "action"]


def test_preparing_in_a_thread_does_not_disturb_who_runs(adapters: AdapterSet) -> None:
    runs = Running(tiny_engine("base_lr_shared", only(adapters, "plan", "action"), max_roles=4))
    alone = runs.ask("plan", tokens=60)
    again = Running(tiny_engine("base_lr_shared", only(adapters, "plan", "action"), max_roles=4))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(again.engine.weights.prepare, adapters, "extra", name="extra", root="file")
        name = again.add("plan", tokens=60)
        again.steps(20)
        again.engine.put_role(waiting.result())
        again.steps()
    assert again.ids(name) == alone


def test_held_cache_is_measured(adapters: AdapterSet) -> None:
    runs = Running(tiny_engine("base_lr_shared", adapters))
    name = runs.add("plan", tokens=20)
    runs.steps()
    usage = runs.last(name).usage
    assert 0 < usage.kv_byte_seconds < 60 * runs.engine.cache.bytes_per_token * 100


def test_counters_by_role_add_up(adapters: AdapterSet) -> None:
    runs = Running(tiny_engine("base_lr_shared", adapters))
    for role in ("plan", "action", "base", "plan"):
        runs.ask(role)
    name = runs.add("extra", tokens=50)
    runs.steps(4)
    assert runs.engine.stats().running_roles == {"extra": 1}
    runs.engine.fail_all("a fault")
    stats = runs.engine.stats()
    assert runs.last(name).error == "a fault"
    for field in ("finished", "prompt_tokens", "tokens_computed", "base_reused", "lr_reused", "generated"):
        assert getattr(stats, field) == sum(getattr(sums, field) for sums in stats.roles.values())
    assert {name: sums.finished for name, sums in stats.roles.items()} == {
        "plan": 2,
        "action": 1,
        "base": 1,
        "extra": 1,
    }
