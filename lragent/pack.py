"""The pack: all roles of a team in one safetensors file, the only contract between training and serving.

Layout (version 1)
- tensors: per adapted module `<module_path>.shared_A` [r, d_in] once, and `<module_path>.role_B` [n_roles, d_out, r];
  all of one dtype, unscaled.
- header metadata: `format`, `version` and two checksums as plain text; the rest as JSON:
  `base_model`, `base_fingerprint`, `form`, `targets`, `roles`, `objective`, `prefix_writer`, `dtype`.
- `sha256`: of all bytes after the header. `header_sha256`: of the header written with this one value empty.
  The header is canonical JSON (sorted keys, no spaces, padded with spaces to a multiple of 8), so no byte of a pack can
  change unnoticed. The checksums find damage; they are no signature.

Any safetensors library reads a pack; only `write_pack` writes one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lragent.adapter_set import AdapterSet, RoleSpec, natural_key
from lragent.atomic import write_file
from lragent.errors import UserError
from lragent.tensorfile import Header, open_regular, read_header

FORMAT = "lragent-pack"
VERSION = "1"

_JSON_FIELDS = ("base_model", "base_fingerprint", "form", "targets", "roles", "objective", "prefix_writer", "dtype")
_A, _B = ".shared_A", ".role_B"


def write_pack(path: Path | str, adapters: AdapterSet) -> None:
    """Write `adapters` as the pack `path`, whole or not at all, replacing a file that is there.

    Raises `UserError` where a matrix holds NaN or Inf, or the file cannot be written.
    """
    adapters.check_finite()
    tensors = {p + _A: a.detach().cpu().contiguous() for p, a in adapters.shared_a.items()}
    tensors |= {p + _B: b.detach().cpu().contiguous() for p, b in adapters.role_b.items()}
    plain = safetensors.torch.save(tensors)
    data_begin = 8 + int.from_bytes(plain[:8], "little")
    data = memoryview(plain)[data_begin:]
    header: dict[str, Any] = json.loads(plain[8:data_begin])
    metadata = {name: json.dumps(value, sort_keys=True) for name, value in _to_fields(adapters).items()}
    header["__metadata__"] = metadata | {
        "format": FORMAT,
        "version": VERSION,
        "sha256": hashlib.sha256(data).hexdigest(),
        "header_sha256": "",
    }
    header["__metadata__"]["header_sha256"] = hashlib.sha256(_canonical(header)).hexdigest()
    raw = _canonical(header)
    write_file(path, len(raw).to_bytes(8, "little"), raw, data)


def read_pack(path: Path | str, *, expect_fingerprint: str | None = None) -> AdapterSet:
    """Read a pack and check all of it.

    `expect_fingerprint` is the fingerprint of the base it is to run on: a pack made for another base is refused, one
    that names no base is taken with an `UnknownBaseWarning`. Raises `UserError` naming the file and the fault.
    """
    with open_regular(path) as file:
        header = read_header(file, path)
        try:
            adapters = _parse(file, header)
            adapters.check_base(expect_fingerprint)
        except UserError as error:
            raise UserError(f"pack {path}: {error}") from error
    return adapters


def _parse(file: BufferedReader, header: Header) -> AdapterSet:
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise UserError("this is a safetensors file but not a pack; `lragent pack` makes one from PEFT folders")
    if metadata.get("version") != VERSION:
        raise UserError(
            f"its format version is {metadata.get('version')!r} and this LRAgent reads {VERSION!r}; "
            "use the version of LRAgent that wrote it, or write the pack anew"
        )
    file.seek(0)
    content = file.read()
    _check_digests(header, memoryview(content)[header.data_begin :])
    fields = _json_fields(metadata)
    shared_a, role_b = _split(_load(content))
    form, targets = fields["form"], fields["targets"]
    if not isinstance(form, str) or not _strings(targets):
        raise UserError("its form or targets are malformed; write the pack anew")
    adapters = AdapterSet(
        base_model=_text(fields, "base_model") or "",
        base_fingerprint=_text(fields, "base_fingerprint"),
        form=form,  # type: ignore[arg-type]  # validated by AdapterSet, as are the next two
        targets=tuple(targets),
        roles=_roles(fields["roles"]),
        shared_a=shared_a,
        role_b=role_b,
        objective=_text(fields, "objective"),  # type: ignore[arg-type]
        prefix_writer=_text(fields, "prefix_writer"),  # type: ignore[arg-type]
    )
    adapters.check_finite()
    if fields["dtype"] != _dtype_name(adapters.dtype):
        raise UserError(f"its dtype is given as {fields['dtype']!r}, its tensors are {_dtype_name(adapters.dtype)}")
    for name, entry in zip(adapters.role_names, fields["roles"], strict=True):
        if entry["digest"] != adapters.role_digest(name):
            raise UserError(f"the digest of role {name!r} is wrong; write the pack anew")
    return adapters


# -- checksums -----------------------------------------------------------------------------------------------------


def _canonical(header: Mapping[str, Any]) -> bytes:
    raw = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)


def _check_digests(header: Header, data: memoryview) -> None:
    parsed = json.loads(header.raw)
    canonical = _canonical(parsed) == header.raw
    claimed = parsed["__metadata__"].get("header_sha256")
    parsed["__metadata__"]["header_sha256"] = ""
    if not canonical or claimed != hashlib.sha256(_canonical(parsed)).hexdigest():
        raise UserError("its header does not match its checksum: it is damaged; copy it again")
    if header.metadata.get("sha256") != hashlib.sha256(data).hexdigest():
        raise UserError("its tensors do not match their checksum: it is damaged; copy it again")


# -- metadata ------------------------------------------------------------------------------------------------------


def _to_fields(adapters: AdapterSet) -> dict[str, Any]:
    return {
        "base_model": adapters.base_model,
        "base_fingerprint": adapters.base_fingerprint,
        "form": adapters.form,
        "targets": list(adapters.targets),
        "roles": [_role_to_json(role, adapters.role_digest(role.name)) for role in adapters.roles],
        "objective": adapters.objective,
        "prefix_writer": adapters.prefix_writer,
        "dtype": _dtype_name(adapters.dtype),
    }


def _role_to_json(role: RoleSpec, digest: str) -> dict[str, Any]:
    return {
        "name": role.name,
        "alpha": float(role.alpha),
        "rank": role.rank,
        "rslora": role.rslora,
        "digest": digest,
        "rank_pattern": dict(role.rank_pattern),
        "alpha_pattern": {path: float(alpha) for path, alpha in role.alpha_pattern.items()},
        "rows": None if role.rows is None else {path: list(rows) for path, rows in role.rows.items()},
    }


def _json_fields(metadata: Mapping[str, str]) -> dict[str, Any]:
    expected = {*_JSON_FIELDS, "format", "version", "sha256", "header_sha256"}
    if odd := sorted(expected ^ set(metadata)):
        raise UserError(f"its header has {odd[0]!r} missing or in excess; write the pack anew")
    try:
        return {name: json.loads(metadata[name]) for name in _JSON_FIELDS}
    except (ValueError, RecursionError) as error:
        raise UserError("its header holds a field that is not JSON; write the pack anew") from error


def _roles(entries: object) -> tuple[RoleSpec, ...]:
    if not isinstance(entries, list):
        raise UserError("its roles are malformed; write the pack anew")
    return tuple(_role(entry) for entry in entries)


def _role(entry: Any) -> RoleSpec:
    try:
        rows = entry["rows"]
        role = RoleSpec(
            name=_checked(entry["name"], str),
            alpha=_checked(entry["alpha"], float),
            rank=_checked(entry["rank"], int),
            rslora=_checked(entry["rslora"], bool),
            rank_pattern={path: _checked(rank, int) for path, rank in entry["rank_pattern"].items()},
            alpha_pattern={path: _checked(alpha, float) for path, alpha in entry["alpha_pattern"].items()},
            rows=None if rows is None else {p: (_checked(lo, int), _checked(hi, int)) for p, (lo, hi) in rows.items()},
        )
        _checked(entry["digest"], str)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError("one of its roles is malformed; write the pack anew") from error
    return role


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} expected")
    return value


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields[name]
    if value is not None and not isinstance(value, str):
        raise UserError(f"its {name} is malformed; write the pack anew")
    return value


def _strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


# -- tensors -------------------------------------------------------------------------------------------------------


def _load(content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise UserError("its tensors cannot be read; write the pack anew") from error


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Shared A and role B by module path, layers in numeric order."""
    paths = sorted({name.removesuffix(_A) for name in tensors if name.endswith(_A)}, key=natural_key)
    wanted = {path + suffix for path in paths for suffix in (_A, _B)}
    if odd := sorted(wanted ^ set(tensors)):
        word = "lacks the tensor" if odd[0] in wanted else "has a tensor that does not belong there,"
        raise UserError(f"it {word} {odd[0]!r}; write the pack anew")
    return {p: tensors[p + _A] for p in paths}, {p: tensors[p + _B] for p in paths}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
