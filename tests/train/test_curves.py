"""The picture of the losses."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lragent.train.curves import _smooth, draw


def test_a_picture_of_every_kind_of_row(tmp_path: Path) -> None:
    rows = [{"step": 0, "eval": {"shared": {"all": 3.0}, "per_role": {"all": 3.1}}}]
    rows += [
        {"step": s, "loss": 3.0 / s, "lr": 0.1, "loss_plan": 2.0 / s, "loss_action": 1.0 / s} for s in range(1, 60)
    ]
    rows += [{"step": 59, "eval": {"shared": {"all": 0.1}, "per_role": {"all": 0.2}}}]
    draw(rows, tmp_path / "losses.png")
    with Image.open(tmp_path / "losses.png") as picture:
        assert picture.size == (1200, 800)
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 20


def test_a_run_of_one_step_has_a_picture_too(tmp_path: Path) -> None:
    draw([{"step": 1, "loss": 1.0, "lr": 0.1}], tmp_path / "losses.png")
    assert (tmp_path / "losses.png").is_file()


def test_smoothing_is_a_mean_of_what_came_before() -> None:
    assert _smooth([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    values = [float(i) for i in range(50)]
    assert _smooth(values)[10] == 9.5
