"""PEFT folders in and out, against PEFT itself."""

import dataclasses
import json
import os
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from tiny import make_adapter_set, tiny_model
from torch import nn

from lragent.adapter_set import TARGETS, AdapterSet, UnknownBaseWarning, tensor_bytes
from lragent.errors import UserError
from lragent.pack import read_pack, write_pack
from lragent.peft_io import adapter_set_from_peft, read_peft_folder, write_peft_folders

IDS = torch.arange(3, 43)[None]
Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))

pytestmark = [
    pytest.mark.filterwarnings("ignore::lragent.adapter_set.UnknownBaseWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # of the unfit adapters that are made here on purpose
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
]


def save_adapter(folder: Path, seed: int = 0, a_seed: int | None = None, **config: object) -> Path:
    """An adapter made, filled at random and saved by PEFT; adapters of one `a_seed` have the same A."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(tiny_model(), LoraConfig(**settings))
    for which, s in (("lora_A", seed if a_seed is None else a_seed), ("lora_B", seed + 1000)):
        random = torch.Generator().manual_seed(s)
        for name, parameter in model.named_parameters():
            if which in name:
                parameter.data = torch.randn(parameter.shape, generator=random) * 0.2
    model.save_pretrained(folder)
    return folder


def by_hand(adapters: AdapterSet, name: str) -> torch.Tensor:
    """Logits of the tiny model with one role's `s B A` added to its weights."""
    model, index = tiny_model(), adapters.role_index(name)
    for path in adapters.module_paths:
        weight = model.get_submodule(path).weight
        weight.data += adapters.scaled_b(path)[index] @ adapters.shared_a[path].float()
    return model(IDS).logits.detach()


def by_peft(folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")
        return PeftModel.from_pretrained(tiny_model(), folder)(IDS).logits.detach()


def weights(folder: Path) -> dict[str, tuple[str, bytes]]:
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    return {key: (f"{t.dtype} {list(t.shape)}", bytes(tensor_bytes(t))) for key, t in tensors.items()}


CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "all-targets": {"target_modules": list(TARGETS)},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 5, r".*\.1\..*k_proj": 1.5},
    },
    "one-layer": {"layers_to_transform": [1]},
    "regex": {"target_modules": r".*0\.(self_attn\.q_proj|mlp\.up_proj)"},
    "fractional-alpha": {"lora_alpha": 0.3},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_adapter_of_peft_goes_through_the_pack_and_back(tmp_path, config):
    original = save_adapter(tmp_path / "original", **config)
    adapters = adapter_set_from_peft({"plan": original})
    assert adapters.form == "tied"
    write_pack(tmp_path / "team.pack", adapters)
    (written,) = write_peft_folders(read_pack(tmp_path / "team.pack"), tmp_path / "out")
    assert written == tmp_path / "out" / "plan"
    assert weights(written) == weights(original)
    assert torch.equal(by_peft(written), by_peft(original))
    assert not torch.allclose(by_peft(original), tiny_model()(IDS).logits, atol=1e-2)
    torch.testing.assert_close(by_hand(adapters, "plan"), by_peft(original), atol=1e-4, rtol=1e-4)
    again = adapter_set_from_peft({"plan": written})
    assert again.roles == adapters.roles
    assert again.role_digest("plan") == adapters.role_digest("plan")


def test_equal_a_ties(tmp_path):
    folders = {n: save_adapter(tmp_path / n, seed=i, a_seed=7, lora_alpha=4 * i + 4) for i, n in enumerate("xyz")}
    adapters = adapter_set_from_peft(folders)
    assert (adapters.form, adapters.rank(Q0), adapters.role_names) == ("tied", 4, ("x", "y", "z"))
    assert [role.alpha for role in adapters.roles] == [4.0, 8.0, 12.0]
    for name, folder in folders.items():
        torch.testing.assert_close(by_hand(adapters, name), by_peft(folder), atol=1e-4, rtol=1e-4)
    for name, folder in zip(folders, write_peft_folders(adapters, tmp_path / "out"), strict=True):
        assert weights(folder) == weights(folders[name])


def test_different_a_is_stacked_only_when_asked(tmp_path):
    folders = {
        "plan": save_adapter(tmp_path / "a", seed=1, **CONFIGS["patterns"]),
        "action": save_adapter(tmp_path / "b", seed=2, r=3, use_rslora=True),
        "reflect": save_adapter(tmp_path / "c", seed=3, target_modules=["v_proj", "down_proj"]),
    }
    with pytest.raises(UserError, match=r"do not share one A.*'plan' and 'action'.*--stack"):
        adapter_set_from_peft(folders)
    adapters = adapter_set_from_peft(folders, stack=True)
    assert adapters.form == "stacked"
    assert adapters.targets == ("q_proj", "k_proj", "v_proj", "down_proj")
    for name, folder in folders.items():
        torch.testing.assert_close(by_hand(adapters, name), by_peft(folder), atol=1e-4, rtol=1e-4)
    write_pack(tmp_path / "team.pack", adapters)
    written = write_peft_folders(read_pack(tmp_path / "team.pack"), tmp_path / "out")
    for folder, original in zip(written, folders.values(), strict=True):
        assert weights(folder) == weights(original)
        assert torch.equal(by_peft(folder), by_peft(original))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "differ at model.layers.0"),
        ({"seed": 1, "r": 3}, "ranks 4 and 3"),
        ({"seed": 1, "target_modules": ["q_proj"]}, "only one of"),
    ],
)
def test_the_first_difference_is_named(tmp_path, change, message):
    folders = {"x": save_adapter(tmp_path / "x", seed=1), "y": save_adapter(tmp_path / "y", **change)}
    with pytest.raises(UserError, match=message):
        adapter_set_from_peft(folders)


def test_one_bit_unties(tmp_path):
    folders = {"x": save_adapter(tmp_path / "x", a_seed=7), "y": save_adapter(tmp_path / "y", seed=1, a_seed=7)}
    path = folders["y"] / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    a = tensors[f"base_model.model.{Q1}.lora_A.weight"]
    a[0, 0] = torch.nextafter(a[0, 0], torch.tensor(9.0))
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(UserError, match=r"differ at model\.layers\.1\.self_attn\.q_proj"):
        adapter_set_from_peft(folders)


def test_patterns_are_read_as_peft_reads_them(tmp_path):
    # PEFT saves its config with sorted keys: that order, not the one given, decides when it loads the adapter again.
    pattern = {"0.self_attn.q_proj": 1, r"layers\.1\..*k_proj": 5, "proj": 6, "q_proj": 2, "self_attn.v": 3}
    save_adapter(tmp_path / "x", target_modules=["q_proj", "k_proj", "v_proj"], rank_pattern=pattern)
    role = read_peft_folder(tmp_path / "x", "x").roles[0]
    for i in (0, 1):
        for target in ("q_proj", "k_proj", "v_proj"):
            path = f"model.layers.{i}.self_attn.{target}"
            assert role.rank_of(path) == pattern.get(get_pattern_key(pattern.keys(), path), 4)
    assert sorted(role.rank_pattern.values()) == [1, 2, 5]


def test_mixed_dtypes_meet_exactly(tmp_path):
    path = save_adapter(tmp_path / "x") / "adapter_model.safetensors"
    tensors = {k: t.bfloat16() if "lora_A" in k else t.half() for k, t in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path)
    adapters = read_peft_folder(tmp_path / "x", "x")
    assert adapters.dtype == torch.float32
    assert torch.equal(adapters.shared_a[Q0], tensors[f"base_model.model.{Q0}.lora_A.weight"].float())


# -- which base ----------------------------------------------------------------------------------------------------


def test_the_base_is_recorded_beside_pefts_config(tmp_path):
    adapters = dataclasses.replace(
        make_adapter_set(tiny_model()), base_fingerprint="ab" * 32, objective="mixed", prefix_writer="base"
    )
    folders = write_peft_folders(adapters, tmp_path / "out")
    assert "lragent" not in (folders[0] / "adapter_config.json").read_text()
    named = dict(zip(adapters.role_names, folders, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = adapter_set_from_peft(named, base_fingerprint="ab" * 32)
    assert again == dataclasses.replace(adapters, shared_a=again.shared_a, role_b=again.role_b)
    assert again.a_digest() == adapters.a_digest()
    with pytest.raises(UserError, match="another base"):
        adapter_set_from_peft(named, base_fingerprint="cd" * 32)
    (folders[1] / "lragent.json").write_text(json.dumps({"lragent_base_fingerprint": "cd" * 32}))
    with pytest.raises(UserError, match="different bases"):
        adapter_set_from_peft(named)
    (folders[1] / "lragent.json").write_text(json.dumps({"lragent_base_fingerprint": 3}))
    with pytest.raises(UserError, match=r"lragent_base_fingerprint.*not text"):
        adapter_set_from_peft(named)


def test_a_folder_without_a_base_is_taken_with_a_warning(tmp_path):
    save_adapter(tmp_path / "x")
    with pytest.warns(UnknownBaseWarning, match="on trust"):
        assert adapter_set_from_peft({"x": tmp_path / "x"}).base_fingerprint is None
    with pytest.warns(UnknownBaseWarning, match="on trust"):
        assert adapter_set_from_peft({"x": tmp_path / "x"}, base_fingerprint="ab" * 32).base_fingerprint == "ab" * 32


# -- what is refused -----------------------------------------------------------------------------------------------


def test_unfit_adapters_made_by_peft_are_refused(tmp_path):
    for name, config, message in [
        ("dora", {"use_dora": True}, r"DoRA \(use_dora\)"),
        ("bias", {"bias": "lora_only"}, "bias='lora_only'"),
        ("lora-bias", {"lora_bias": True}, "lora_bias"),
        ("saved", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("tokens", {"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ("embedding", {"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ("head", {"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ]:
        save_adapter(tmp_path / name, **config)
        with pytest.raises(UserError, match=rf"{name}: .*{message}"):
            read_peft_folder(tmp_path / name, "plan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base model"),
        ({"some_future_variant": 3}, "some_future_variant"),
        ({"r": "4"}, "r or lora_alpha"),
        ({"r": 5}, "has rank 4, its config says 5"),
        ({"lora_alpha": None}, "r or lora_alpha"),
        ({"lora_alpha": float("inf")}, "not a finite number"),
        ({"rank_pattern": {"q_proj": "2"}}, "no whole number"),
        ({"rank_pattern": {"(": 2}}, "no regular expression"),
        ({"alpha_pattern": ["q_proj"]}, "not an object"),
        ({"alpha_pattern": {"q_proj": None}}, "no number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unfit_configs_are_refused(tmp_path, change, message):
    folder = save_adapter(tmp_path / "plan")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message) as caught:
        read_peft_folder(folder, "plan")
    assert str(folder) in str(caught.value)


def tensors_of(folder: Path, change) -> None:
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    safetensors.torch.save_file(change(tensors), folder / "adapter_model.safetensors")


A0 = f"base_model.model.{Q0}.lora_A.weight"
B0 = f"base_model.model.{Q0}.lora_B.weight"


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), r"no adapter_config\.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "not a JSON object"),
        (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe{"), "not JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), "not JSON"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors"),
        (pickled, "only a pickle"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 100), "not a safetensors file"),
        (lambda f: os.truncate(f / "adapter_model.safetensors", 900), "cut short"),
        (lambda f: tensors_of(f, lambda t: {}), "is empty"),
        (lambda f: tensors_of(f, lambda t: {k: v for k, v in t.items() if k != B0}), "only one of A and B"),
        (lambda f: tensors_of(f, lambda t: t | {A0: torch.full_like(t[A0], float("nan"))}), "NaN or Inf"),
        (lambda f: tensors_of(f, lambda t: t | {A0: t[A0][:3].contiguous()}), "do not fit together"),
        (lambda f: tensors_of(f, lambda t: t | {A0: t[A0][0].contiguous()}), "do not fit together"),
        (lambda f: tensors_of(f, lambda t: t | {A0: t[A0].to(torch.int8)}), "int8"),
        (lambda f: tensors_of(f, lambda t: t | {"lora_A": torch.ones(1)}), "'lora_A'"),
        (lambda f: (f / "lragent.json").write_text("7"), "not a JSON object"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, spoil, message):
    folder = save_adapter(tmp_path / "plan")
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        read_peft_folder(folder, "plan")
    assert str(folder) in str(caught.value)


def test_missing_folders_fifos_and_bad_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_peft_folder(tmp_path / "absent", "plan")
    folder = save_adapter(tmp_path / "plan")
    for name in ("base", "a/b", ""):
        with pytest.raises(UserError, match="name"):
            read_peft_folder(folder, name)
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    with pytest.raises(UserError, match="not a regular file"):
        read_peft_folder(folder, "plan")
    with pytest.raises(UserError, match="at least one"):
        adapter_set_from_peft({})


# -- writing -------------------------------------------------------------------------------------------------------


def test_tied_folders_have_bit_identical_a_and_load_in_plain_peft(tmp_path):
    adapters = make_adapter_set(tiny_model(), targets=TARGETS)
    folders = write_peft_folders(adapters, tmp_path / "out")
    stored = [weights(folder) for folder in folders]
    for key in stored[0]:
        assert (len({content for _, content in (s[key] for s in stored)}) == 1) == ("lora_A" in key)
    model = PeftModel.from_pretrained(tiny_model(), folders[0], adapter_name="plan")
    for name, folder in zip(adapters.role_names[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    for name in adapters.role_names:
        model.set_adapter(name)
        torch.testing.assert_close(model(IDS).logits.detach(), by_hand(adapters, name), atol=1e-4, rtol=1e-4)


def test_peft_adapts_exactly_the_modules_of_the_role(tmp_path):
    """Also where layers are not alike, so that short names would say too much."""
    full = make_adapter_set(tiny_model(), ["plan"])
    paths = full.module_paths[:3]
    some = dataclasses.replace(
        full, shared_a={p: full.shared_a[p] for p in paths}, role_b={p: full.role_b[p] for p in paths}
    )
    for adapters, name in ((full, "full"), (some, "some")):
        (folder,) = write_peft_folders(adapters, tmp_path / name)
        model = PeftModel.from_pretrained(tiny_model(), folder)
        modules = model.base_model.model.named_modules()
        adapted = {path for path, module in modules if isinstance(getattr(module, "lora_A", None), nn.ModuleDict)}
        assert adapted == set(adapters.module_paths)


def test_nothing_is_overwritten_or_half_written(tmp_path):
    adapters = make_adapter_set(tiny_model())
    (tmp_path / "out").mkdir()
    write_peft_folders(adapters, tmp_path / "out")  # an empty folder may be filled
    with pytest.raises(UserError, match="there already"):
        write_peft_folders(adapters, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        write_peft_folders(adapters, tmp_path / "file" / "out")
    b = adapters.role_b[Q0].clone()
    b[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        write_peft_folders(dataclasses.replace(adapters, role_b={**adapters.role_b, Q0: b}), tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]
