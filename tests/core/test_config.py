"""Configs: what a file and the command line may say, and what the user reads when they say it wrongly."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lragent.config import dump_config, load_config, parse_config
from lragent.errors import UserError


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Optimiser:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError("lr must be above 0")


@dataclass(frozen=True)
class Config:
    model: str | None = None
    steps: int = 10
    verbose: bool = False
    colour: Colour = Colour.RED
    precision: Literal["bf16", "float32"] = "float32"
    tracking: Literal["off", "wandb"] = "off"
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    out: Path = Path("runs")
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=3e-4))
    per_role: dict[str, Optimiser] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    max_steps: int | float | None = None
    extra: Any = None
    warm: Optimiser | None = None


@dataclass(frozen=True)
class Needs:
    data: Path


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_defaults_without_a_file() -> None:
    assert load_config(Config) == Config()


def test_every_type_from_a_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
model: abc
steps: 3
verbose: yes
colour: blue
precision: bf16
targets: [q_proj, k_proj]
out: somewhere/else
optimiser: {lr: 5e-5, betas: [0.5, 1], clip: null}
per_role:
  plan: {lr: 6e-5}
scales: {plan: 2}
max_steps: 1.5
extra: [1, {a: b}]
""",
    )
    assert load_config(Config, path) == Config(
        model="abc",
        steps=3,
        verbose=True,
        colour=Colour.BLUE,
        precision="bf16",
        targets=("q_proj", "k_proj"),
        out=Path("somewhere/else"),
        optimiser=Optimiser(lr=5e-5, betas=(0.5, 1.0), clip=None),
        per_role={"plan": Optimiser(lr=6e-5)},
        scales={"plan": 2.0},
        max_steps=1.5,
        extra=[1, {"a": "b"}],
    )


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(Config, write(tmp_path, "# nothing\n")) == Config()


def test_a_nested_default_keeps_its_other_fields() -> None:
    """The class of `optimiser` has lr 1e-4, its default instance here 3e-4."""
    assert load_config(Config, None, ["optimiser.clip=2"]).optimiser == Optimiser(lr=3e-4, clip=2.0)
    assert load_config(Config, None, ["warm.clip=2"]).warm == Optimiser(clip=2.0)


def test_overrides_win_over_the_file_and_later_over_earlier(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: 3\noptimiser: {lr: 1.0}\n")
    config = load_config(Config, path, ["steps=4", "steps=5", "optimiser.betas=[0.1, 0.2]", "per_role.act.lr=1e-3"])
    assert (config.steps, config.optimiser.lr, config.optimiser.betas) == (5, 1.0, (0.1, 0.2))
    assert config.per_role == {"act": Optimiser(lr=1e-3)}


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("model=123", "model", "123"),
        ("model=a=b", "model", "a=b"),
        ("model='7'", "model", "7"),
        ("model=null", "model", None),
        ("model=a: b: c", "model", "a: b: c"),
        ("tracking=off", "tracking", "off"),
        ("max_steps=7", "max_steps", 7),
        ("max_steps=7.0", "max_steps", 7.0),
        ("out=1", "out", Path("1")),
        ("targets=[v_proj]", "targets", ("v_proj",)),
        ("optimiser={lr: 2}", "optimiser", Optimiser(lr=2.0)),
        ("verbose=true", "verbose", True),
    ],
)
def test_override_values(override: str, name: str, value: object) -> None:
    got = getattr(load_config(Config, None, [override]), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "wants"),
    [
        ("stpes: 3", ["`stpes`", "`steps`"]),
        ("optimiser: {lrr: 3}", ["`optimiser.lrr`", "`optimiser.lr`"]),
        ("per_role: {plan: {zz: 3}}", ["`per_role.plan.zz`", "nearest valid one is `per_role.plan."]),
        ("steps: many", ["`steps`", "'many'", "whole number"]),
        ("steps: 1.5", ["`steps`", "1.5", "whole number"]),
        ("steps: true", ["`steps`", "True", "whole number"]),
        ("verbose: 1", ["`verbose`", "true or false"]),
        ("optimiser: {lr: fast}", ["`optimiser.lr`", "'fast'", "a number"]),
        ("optimiser: {lr: true}", ["`optimiser.lr`", "a number"]),
        ("optimiser: {betas: [1]}", ["`optimiser.betas`", "2 items"]),
        ("optimiser: {betas: [1, x]}", ["`optimiser.betas[1]`", "'x'"]),
        ("optimiser: {lr: -1}", ["optimiser: ", "above 0"]),
        ("optimiser: 3", ["`optimiser` is 3", "lr, betas, clip"]),
        ("colour: green", ["`colour`", "'green'", "red, blue"]),
        ("precision: fp8", ["`precision`", "'fp8'", "bf16, float32"]),
        ("tracking: off", ["`tracking`", "False", "off, wandb"]),
        ("targets: q_proj", ["`targets`", "'q_proj'", "a list"]),
        ("model: 3", ["`model`", "3", "quotes"]),
        ("scales: [1]", ["`scales`", "name: value"]),
        ("max_steps: x", ["`max_steps`", "whole number or a number"]),
        ("optimiser:", ["`optimiser` is empty"]),
        ("- a\n- b", ["key: value"]),
    ],
)
def test_a_wrong_file_is_one_sentence_with_file_key_and_mend(tmp_path: Path, text: str, wants: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(Config, path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for want in wants:
        assert want in message


@pytest.mark.parametrize(
    ("text", "line"),
    [("steps: 1\nout: [a\n", 3), ("steps: 1\n\tout: 2\n", 2), ("steps: 1\nout: a\nsteps: 2\n", 3), ("a: 'b\n", 2)],
    ids=["open-list", "tab", "twice", "open-quote"],
)
def test_broken_yaml_names_file_and_line(tmp_path: Path, text: str, line: int) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(Config, path)
    assert str(caught.value).startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(
    ("override", "wants"),
    [
        ("steps", ["key=value"]),
        ("=3", ["key=value"]),
        ("a..b=3", ["key=value"]),
        ("stpes=3", ["override 'stpes=3'", "`steps`"]),
        ("steps=x", ["override 'steps=x'", "`steps`", "whole number"]),
        ("targets.0=x", ["`targets`"]),
        ("steps.x=1", ["`steps`"]),
        ("targets=[a", ["`targets`", "a list"]),
    ],
)
def test_a_wrong_override_is_named(override: str, wants: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Config, None, [override])
    for want in wants:
        assert want in str(caught.value)


def test_override_below_a_plain_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`steps` is 3 and has no keys"):
        load_config(Config, write(tmp_path, "steps: 3"), ["steps.x=1"])


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_config(Config, tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(Config, tmp_path)
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_config(Config, binary)
    with pytest.raises(UserError, match="valid YAML"):
        load_config(Config, write(tmp_path, "a: \x00"))


def test_a_missing_required_key_is_named() -> None:
    with pytest.raises(UserError, match="`data` is missing"):
        load_config(Needs)
    assert load_config(Needs, None, ["data=x"]) == Needs(Path("x"))


finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8"), max_size=8)
optimisers = st.builds(
    Optimiser,
    lr=st.floats(min_value=1e-9, max_value=1e9),
    betas=st.tuples(finite, finite),
    clip=st.none() | finite,
)


@given(
    st.builds(
        Config,
        model=st.none() | texts,
        steps=st.integers(),
        verbose=st.booleans(),
        colour=st.sampled_from(Colour),
        precision=st.sampled_from(["bf16", "float32"]),
        targets=st.lists(texts, max_size=3).map(tuple),
        out=st.sampled_from([Path("a"), Path("b/c")]),
        optimiser=optimisers,
        per_role=st.dictionaries(texts, optimisers, max_size=2),
        scales=st.dictionaries(texts, finite, max_size=2),
        max_steps=st.none() | st.integers() | finite,
        warm=st.none() | optimisers,
    )
)
def test_what_is_dumped_reads_back_equal(config: Config) -> None:
    dumped = dump_config(config)
    assert set(dumped) == set(Config.__dataclass_fields__)
    assert type(dumped["colour"]) is str
    assert type(dumped["targets"]) is list
    assert parse_config(Config, dumped, source="test") == config
