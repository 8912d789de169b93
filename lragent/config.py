"""YAML files and `key=value` words into frozen dataclasses, and back.

A config class is a frozen dataclass with annotated fields; nothing else describes it. Its `__post_init__` may check
what types cannot say and raise `ValueError` or `UserError`; the dotted key is put before the message. Unknown keys are
errors, so that a misspelt option never trains or serves with a default behind the user's back.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, Union

import yaml

from lragent.errors import UserError


class DataclassInstance(Protocol):
    """Anything made by `@dataclass`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=DataclassInstance)

_FLOAT_TEXT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Build `cls` from a YAML file, or from its defaults, with `a.b=value` overrides on top.

    The value of an override is read as YAML, except where the field is a string: there it is taken as it stands.
    Raises `UserError` for an unreadable or broken file (naming file and line), an unknown key (naming the nearest valid
    one), a missing one, and a value of the wrong type (naming key, value and what was expected).
    """
    tree = {} if path is None else _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(cls, tree, source="options" if path is None else str(path))


def parse_config(cls: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """Build `cls` from a mapping such as `dump_config` gives; `source` begins every error."""
    return _Builder(source).dataclass(cls, values, key="", default=None)


def dump_config(config: DataclassInstance) -> dict[str, Any]:
    """Return `config` as plain dicts, lists, strings and numbers: for logs, and to be read by `parse_config` again."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dump_config(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key that stands twice in one mapping is an error, not the last one's win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; give the path of a YAML file.") from error
    try:
        tree = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: is not valid YAML: {getattr(error, 'problem', None) or error}.") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected `key: value` lines, found a {type(tree).__name__}.")
    return tree


@dataclasses.dataclass(frozen=True)
class _Override:
    """A value from the command line: its text, for strings, and what YAML makes of it, for the rest."""

    word: str
    text: str
    value: Any


def _apply_override(tree: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"override {word!r}: write it as key=value or part.key=value.")
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError:
        value = text
    for depth, part in enumerate(parts[:-1], start=1):
        child = tree.get(part)
        if isinstance(child, _Override):
            child = child.value
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise UserError(f"override {word!r}: `{'.'.join(parts[:depth])}` is {child!r} and has no keys of its own.")
        tree[part] = dict(child)
        tree = tree[part]
    tree[parts[-1]] = _Override(word, text, value)


class _MismatchError(Exception):
    """A value that its type does not take; carries what was expected in words."""


class _Builder:
    """Walks a tree of plain values along the annotations of a dataclass."""

    def __init__(self, source: str) -> None:
        self.source = source

    def dataclass(self, cls: type[T], values: Any, *, key: str, default: Any) -> T:
        """Build `cls`; where `values` says nothing, the field of `default` (an instance or None) or of `cls` stands."""
        if isinstance(values, cls):
            return values
        if not isinstance(values, Mapping):
            raise _MismatchError(f"keys of its own ({', '.join(f.name for f in dataclasses.fields(cls))})")
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        for name in values:
            if name not in fields:
                self._unknown(key, str(name), list(fields), values[name])
        hints = typing.get_type_hints(cls)
        arguments = {}
        for name, field in fields.items():
            fallback = getattr(default, name) if default is not None else _default_of(field)
            if name in values:
                arguments[name] = self._field(hints[name], values[name], _join(key, name), fallback)
            elif fallback is dataclasses.MISSING:
                raise UserError(f"{self.source}: `{_join(key, name)}` is missing and has no default.")
            else:
                arguments[name] = fallback
        try:
            return cls(**arguments)
        except (ValueError, UserError) as error:
            raise UserError(f"{self.source}: {key + ': ' if key else ''}{error}") from error

    def _unknown(self, key: str, name: str, valid: list[str], value: Any) -> None:
        source = f"override {value.word!r}" if isinstance(value, _Override) else self.source
        nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
        mend = f"the nearest valid one is `{_join(key, nearest[0])}`" if nearest else "no keys are valid here"
        raise UserError(f"{source}: unknown key `{_join(key, name)}`; {mend}.")

    def _field(self, hint: Any, value: Any, key: str, default: Any = None) -> Any:
        try:
            return self._coerce(hint, value, key, default)
        except _MismatchError as mismatch:
            source, shown = self.source, value
            if isinstance(value, _Override):
                source, shown = f"override {value.word!r}", value.value
            raise UserError(f"{source}: `{key}` is {_shown(shown)}, expected {mismatch}.") from None

    def _coerce(self, hint: Any, value: Any, key: str, default: Any) -> Any:
        """Return `value` as the annotation `hint` wants it; `_MismatchError` if it cannot be."""
        origin = typing.get_origin(hint)
        if origin in (Union, types.UnionType):
            return self._union(hint, value, key, default)
        if origin is Literal:
            return _choice({choice: choice for choice in typing.get_args(hint)}, value)
        if isinstance(hint, type) and issubclass(hint, Enum):
            return value if isinstance(value, hint) else _choice({member.value: member for member in hint}, value)
        if hint is str:
            return _string(value)
        if hint is Path:
            return value if isinstance(value, Path) else Path(_string(value)).expanduser()
        if isinstance(value, _Override):
            value = value.value
        if dataclasses.is_dataclass(hint):
            usable = default if isinstance(default, typing.cast(type, hint)) else None
            return self.dataclass(typing.cast(type, hint), value, key=key, default=usable)
        if origin in (tuple, list, Sequence):
            return self._sequence(hint, value, key)
        if origin in (dict, Mapping):
            return self._mapping(hint, value, key)
        if hint is Any:
            return value
        if hint in (bool, int, float, type(None)):
            return _scalar(hint, value)
        raise TypeError(f"{key}: config fields cannot be of type {hint!r}")

    def _union(self, hint: Any, value: Any, key: str, default: Any) -> Any:
        members = list(typing.get_args(hint))
        bare = value.value if isinstance(value, _Override) else value
        if type(None) in members:
            if bare is None:
                return None
            members.remove(type(None))
        exact = [member for member in members if member is type(bare)]
        expected = []
        for member in exact + [member for member in members if member not in exact]:
            try:
                return self._coerce(member, value, key, default)
            except _MismatchError as mismatch:
                expected.append(str(mismatch))
        raise _MismatchError(" or ".join(expected))

    def _sequence(self, hint: Any, value: Any, key: str) -> Any:
        if not isinstance(value, list | tuple):
            raise _MismatchError("a list such as [a, b]")
        wanted = typing.get_args(hint)
        if typing.get_origin(hint) is tuple and wanted[-1:] != (...,):
            if len(value) != len(wanted):
                raise _MismatchError(f"a list of {len(wanted)} items")
        else:
            wanted = wanted[:1] * len(value)
        items = [
            self._field(want, item, f"{key}[{at}]") for at, (want, item) in enumerate(zip(wanted, value, strict=True))
        ]
        return items if typing.get_origin(hint) is list else tuple(items)

    def _mapping(self, hint: Any, value: Any, key: str) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise _MismatchError("keys with values (name: value)")
        key_hint, value_hint = typing.get_args(hint)
        return {
            self._field(key_hint, name, f"{key} (its key {name!r})"): self._field(value_hint, item, _join(key, name))
            for name, item in value.items()
        }


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _string(value: Any) -> str:
    if isinstance(value, _Override):
        return value.value if isinstance(value.value, str) else value.text
    if not isinstance(value, str):
        raise _MismatchError("a text (put it in quotes)")
    return value


def _choice(choices: dict[Any, Any], value: Any) -> Any:
    """Look `value` up among the values of a Literal or Enum; True is never taken for 1."""
    offered = (value.value, value.text) if isinstance(value, _Override) else (value,)
    for candidate in offered:
        for choice, result in choices.items():
            if type(candidate) is type(choice) and candidate == choice:
                return result
            if isinstance(candidate, str) and isinstance(choice, str) and candidate == choice:
                return result
    raise _MismatchError("one of " + ", ".join(map(str, choices)))


def _scalar(hint: Any, value: Any) -> Any:
    if hint is float and not isinstance(value, bool):
        # YAML 1.1 reads 5e-5, which has no point, as a text.
        if isinstance(value, int | float) or (isinstance(value, str) and _FLOAT_TEXT.fullmatch(value)):
            return float(value)
    elif type(value) is hint:
        return value
    raise _MismatchError({bool: "true or false", int: "a whole number", float: "a number"}.get(hint, "nothing"))
