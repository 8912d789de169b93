"""Stacked adapters in a smaller rank: the best there is, and exact where nothing need be lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_adapter_set, tiny_model

from lragent.adapter_set import AdapterSet
from lragent.cli.main import main
from lragent.compression import compress
from lragent.errors import UserError
from lragent.pack import read_pack
from lragent.peft_io import write_peft_folders
from lragent.stacking import stack

TARGETS = ("q_proj", "v_proj")


def stacked(seed: int = 0, ranks: tuple[int, int] = (2, 5)) -> AdapterSet:
    """Two roles of unequal rank and scaling; the second adapts one module only."""
    model = tiny_model()
    return stack(
        [
            make_adapter_set(model, ["plan"], ranks[0], TARGETS, seed),
            make_adapter_set(model, ["action"], ranks[1], ("v_proj",), seed + 1),
        ]
    )


def updates(adapters: AdapterSet, path: str) -> torch.Tensor:
    """[n_roles * d_out, d_in] in float64: all roles' updates, one under the other."""
    return (adapters.scaled_b(path).double() @ adapters.shared_a[path].double()).flatten(0, 1)


def test_enough_rank_loses_nothing() -> None:
    before = stacked()
    after = compress(before, 7)
    assert after.adapters.form == "tied"
    assert after.error < 1e-9
    for path in before.module_paths:
        assert after.adapters.rank(path) == before.rank(path)
        torch.testing.assert_close(updates(after.adapters, path), updates(before, path), atol=1e-6, rtol=1e-5)
        for old, new in zip(before.roles, after.adapters.roles, strict=True):
            if old.adapts(path):
                assert new.scaling(path) == pytest.approx(old.scaling(path))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 50), st.integers(1, 6))
def test_what_is_lost_is_the_least_that_can_be(seed: int, rank: int) -> None:
    """The tail of the singular values of the updates themselves, worked out the plain way."""
    before = stacked(seed)
    after = compress(before, rank)
    for path in before.module_paths:
        whole = updates(before, path)
        values = torch.linalg.svdvals(whole)
        least = float(values[rank:].square().sum().sqrt() / values.square().sum().sqrt())
        lost = float((updates(after.adapters, path) - whole).norm() / whole.norm())
        assert after.errors[path] == pytest.approx(least, abs=1e-7)
        assert lost == pytest.approx(least, abs=1e-5)


def test_the_command_says_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_peft_folders(stacked(), tmp_path / "peft")
    words = [f"{role}={tmp_path / 'peft' / role}" for role in ("plan", "action")]
    assert main(["pack", *words, "--stack", "--rank", "3", "-o", str(tmp_path / "small")]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.self_attn.v_proj: " in out
    assert "compressed to rank 3: at most" in out
    small = read_pack(tmp_path / "small")
    assert small.form == "tied"
    assert max(small.rank(path) for path in small.module_paths) == 3
    assert main(["pack", words[0], "--rank", "3", "-o", str(tmp_path / "no")]) == 2
    assert "--rank goes with --stack" in capsys.readouterr().err
    assert main(["pack", *words, "--stack", "--rank", "0", "-o", str(tmp_path / "no")]) == 2
    assert "must be at least 1, not 0" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        compress(stacked(), 0)
