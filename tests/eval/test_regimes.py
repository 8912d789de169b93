"""With `equal_tokens`, every way of training learns from as many tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import save_tiny

from lragent.eval.study.regimes import REGIMES, Teacher, Training
from lragent.eval.world.generate import TRAIN_FILE, with_counts, write_data_set
from lragent.eval.world.levels import LEVELS
from lragent.pack import read_pack


@pytest.mark.slow
def test_all_regimes_learn_from_as_many_tokens_and_healing_from_few(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    write_data_set(with_counts(LEVELS["demo"], 60, 1, 1), 0, tmp_path / "world")
    training = Training(model=str(model), dtype="float32", epochs=1, equal_tokens=True, tokens_per_batch=2_000)
    teacher = Teacher(training, tmp_path / "world" / TRAIN_FILE, 0, tmp_path)
    facts = {regime: teacher.train(regime, tmp_path / f"{regime}.safetensors") for regime in REGIMES}
    wanted = facts["per_role"]["tokens"]
    alike = ("shared", "mixed", "sequential", "apart")
    assert {regime: facts[regime]["tokens"] for regime in alike} == pytest.approx(dict.fromkeys(alike, wanted), rel=0.1)
    assert facts["healed"]["tokens"] <= training.heal_share * wanted
    forms = {regime: read_pack(tmp_path / f"{regime}.safetensors").form for regime in REGIMES}
    assert forms == dict.fromkeys(REGIMES, "tied") | {"apart": "stacked"}
    assert not list(tmp_path.glob("run-*")), "runs are taken away"
