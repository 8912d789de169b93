"""What a run leaves behind, read back by others: plain PEFT, the pack reader, people."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import save_tiny, tiny_model, tiny_tokenizer
from torch import nn

from lragent.attention import ATTENTION, PackedPass, register_attention
from lragent.models import ModelSource
from lragent.pack import read_pack
from lragent.peft_io import adapter_set_from_peft
from lragent.routing import Route
from lragent.tied_lora import RoleModel, build_role_model
from lragent.train.distributed import named_adapters
from lragent.train.export import RunResult, adapter_set, export
from lragent.train.settings import TrainSettings

ROLES = ("plan", "action", "reflect")
RESULT = RunResult(
    steps=7, tokens=900, targets=300, seconds=2.5, train_loss_first=3.0, train_loss_last=1.0,
    eval_before={"shared": {"plan": 2.0, "all": 2.5}}, eval_after={"shared": {"plan": 1.5, "all": 1.25}},
)  # fmt: skip


@pytest.fixture
def built() -> RoleModel:
    register_attention()
    model = tiny_model()
    model.set_attn_implementation(ATTENTION)
    built = build_role_model(model, ROLES, rank=4, alpha=12, targets=("q_proj", "v_proj", "down_proj"), layers=[1])
    for parameter in built.adapter_parameters():
        nn.init.normal_(parameter, std=0.2)
    return built


def weights_of(built: RoleModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in named_adapters(built).items()}


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return ModelSource(save_tiny(tmp_path / "tiny"), "some/tiny")


@pytest.fixture
def exported(built: RoleModel, source: ModelSource, tmp_path: Path) -> Path:
    settings = TrainSettings(
        data=tmp_path / "secret-place" / "mine.jsonl", eval_data=tmp_path / "held.jsonl", out=tmp_path / "o",
        model=str(source.path), objective="shared", lr=3e-4,
    )  # fmt: skip
    folder = tmp_path / "exported"
    folder.mkdir()
    export(adapter_set(built, settings, source, weights_of(built)), settings, RESULT, folder)
    return folder


def test_pack_and_folders_are_the_trained_matrices_bit_for_bit(
    built: RoleModel, source: ModelSource, exported: Path
) -> None:
    pack = read_pack(exported / "pack.safetensors", expect_fingerprint=source.fingerprint())
    folders = adapter_set_from_peft({role: exported / "peft" / role for role in ROLES})
    for adapters in (pack, folders):
        assert adapters.form == "tied"
        assert adapters.role_names == ROLES
        assert set(adapters.module_paths) == set(built.modules)
        for path, module in built.modules.items():
            assert torch.equal(adapters.shared_a[path], module.shared_a)
            for i, b in enumerate(module.role_b):
                assert torch.equal(adapters.role_b[path][i], b)
    assert (pack.base_model, pack.objective, pack.prefix_writer) == ("some/tiny", "shared", "base")
    assert pack.scaled_b("model.layers.1.mlp.down_proj").equal(3.0 * pack.role_b["model.layers.1.mlp.down_proj"])


@pytest.mark.parametrize("role", [1, 3])
def test_plain_peft_loads_a_folder_and_gives_the_same_logits(built: RoleModel, exported: Path, role: int) -> None:
    ids: list[int] = tiny_tokenizer()("and then the search goes on").input_ids
    route = Route.of([role] * len(ids))
    with torch.no_grad(), built.router.use(route):
        want = built.model(
            input_ids=torch.tensor([ids]), position_ids=torch.arange(len(ids))[None],
            attention_pass=PackedPass(((0, len(ids)),), route), use_cache=False,
        ).logits  # fmt: skip
    plain = PeftModel.from_pretrained(tiny_model(), exported / "peft" / ROLES[role - 1])
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=torch.tensor([ids])).logits, want, atol=2e-5, rtol=1e-5)


def test_what_is_exported_no_longer_changes(built: RoleModel, source: ModelSource) -> None:
    settings = TrainSettings(data=Path("d"), out=Path("o"))
    adapters = adapter_set(built, settings, source, weights_of(built))
    module = next(iter(built.modules.values()))
    before = adapters.shared_a[next(iter(built.modules))].clone()
    with torch.no_grad():
        module.shared_a.add_(1)
    assert torch.equal(adapters.shared_a[next(iter(built.modules))], before)


def test_the_card_says_what_was_done_and_not_where(exported: Path, tmp_path: Path) -> None:
    card = (exported / "README.md").read_text()
    for part in (
        'base_model: "some/tiny"', "plan, action, reflect", "`mine.jsonl`", "| 3.0000 | 1.0000 |",
        "| held out, shared, plan | 2.0000 | 1.5000 |", "- lr: 0.0003", '- objective: "shared"', "- torch: ",
        "base_lr_shared", "- steps: 7",
    ):  # fmt: skip
        assert part in card
    assert "secret-place" not in card
    assert str(tmp_path) not in card
