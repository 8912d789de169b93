"""Roles that are given one by one at the start, as vLLM's users give theirs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tiny import make_adapter_set, save_tiny, tiny_model

from lragent.adapter_set import AdapterSet
from lragent.errors import UserError
from lragent.models import fingerprint
from lragent.pack import write_pack
from lragent.peft_io import write_peft_folders
from lragent.serve.engine.build import build_service
from lragent.serve.engine.lora_modules import read_lora_modules
from lragent.serve.engine.service import EngineService
from lragent.serve.engine.types import GenerationRequest, Prompt, SamplingParams
from lragent.stacking import unstack


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


def tied(model: Path, *roles: str, seed: int = 0) -> AdapterSet:
    made = make_adapter_set(tiny_model(), roles, seed=seed)
    return dataclasses.replace(made, base_fingerprint=fingerprint(model))


def served(model: Path, **options: Any) -> EngineService:
    return build_service(
        model=str(model), dtype="float32", device="cpu", max_model_len=256, max_tokens_in_cache=1024, **options
    )


def said(service: EngineService, role: str) -> tuple[int, ...]:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    return service.generate(GenerationRequest(f"r-{role}", role, Prompt(list(range(3, 40))), params)).token_ids


def test_folders_of_one_a_are_tied_and_answer_as_their_pack(model: Path, tmp_path: Path) -> None:
    adapters = tied(model, "plan", "action")
    write_pack(tmp_path / "team.safetensors", adapters)
    write_peft_folders(adapters, tmp_path / "peft")
    by_pack = served(model, roles=str(tmp_path / "team.safetensors"))
    given = (f"plan={tmp_path}/peft/plan", f"act={tmp_path}/team.safetensors", f"action={tmp_path}/peft/action")
    one_by_one = served(model, lora_modules=(given[0], given[2]))
    for service in (by_pack, one_by_one):
        service.start()
    try:
        assert [card.name for card in one_by_one.roles] == [one_by_one.model_name, "plan", "action"]
        assert one_by_one.roles[1].root == f"{tmp_path}/peft/plan"
        for role in ("plan", "action", "base"):
            assert said(one_by_one, role) == said(by_pack, role)
    finally:
        for service in (by_pack, one_by_one):
            service.stop(drain=False)
    with pytest.raises(UserError, match="no role 'act'"):
        read_lora_modules(given, fingerprint(model))


def test_adapters_of_other_as_are_stacked(model: Path, tmp_path: Path) -> None:
    for name, seed in (("plan", 1), ("action", 2)):
        write_peft_folders(tied(model, name, seed=seed), tmp_path / f"{seed}")
    paths = {"plan": f"{tmp_path}/1/plan", "action": f"{tmp_path}/2/action"}
    given = [f"{name}={path}" for name, path in paths.items()]
    adapters, roots = read_lora_modules(given, fingerprint(model))
    assert adapters.form == "stacked"
    assert roots == paths
    for single, name, seed in zip(unstack(adapters), ("plan", "action"), (1, 2), strict=True):
        assert single.role_digest(name) == tied(model, name, seed=seed).role_digest(name)


def test_the_only_role_of_a_pack_takes_the_name_given(model: Path, tmp_path: Path) -> None:
    write_pack(tmp_path / "one.safetensors", tied(model, "plan"))
    adapters, _ = read_lora_modules([f"thinker={tmp_path}/one.safetensors"], fingerprint(model))
    assert adapters.role_names == ("thinker",)


@pytest.mark.parametrize(("given", "message"), [(["plan"], "NAME=PATH"), (["=x"], "NAME=PATH"), (["a="], "NAME=PATH")])
def test_what_is_no_pair(given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_lora_modules(given, None)


def test_a_name_twice_another_base_and_a_missing_folder(model: Path, tmp_path: Path) -> None:
    write_pack(tmp_path / "one.safetensors", tied(model, "plan"))
    path = f"{tmp_path}/one.safetensors"
    with pytest.raises(UserError, match="used twice"):
        read_lora_modules([f"a={path}", f"a={path}"], None)
    with pytest.raises(UserError, match="another base"):
        read_lora_modules([f"a={path}"], "f" * 64)
    with pytest.raises(UserError, match=r"missing\.safetensors"):
        read_lora_modules([f"a={tmp_path}/missing.safetensors"], None)


def test_spare_places_for_roles_that_come_later(model: Path, tmp_path: Path) -> None:
    write_pack(tmp_path / "team.safetensors", tied(model, "plan", "action"))
    path = str(tmp_path / "team.safetensors")
    for options, places in (({}, 2), ({"spare_roles": 8}, 10), ({"spare_roles": 8, "max_roles": 3}, 3)):
        assert served(model, roles=path, **options).stats().role_places == places
