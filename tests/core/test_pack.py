"""The pack: bit-exact there and back, and nothing damaged or foreign is ever read."""

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import tempfile
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_adapter_set, tiny_model

from lragent.adapter_set import TARGETS, AdapterSet, RoleSpec, UnknownBaseWarning, natural_key, tensor_bytes
from lragent.errors import UserError
from lragent.pack import read_pack, write_pack
from lragent.peft_io import write_peft_folders

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapters() -> AdapterSet:
    return make_adapter_set(tiny_model())


@pytest.fixture
def pack(adapters, tmp_path) -> Path:
    write_pack(tmp_path / "team.pack", adapters)
    return tmp_path / "team.pack"


def assert_same(left: AdapterSet, right: AdapterSet) -> None:
    for field in dataclasses.fields(AdapterSet):
        if field.name not in ("shared_a", "role_b"):
            assert getattr(left, field.name) == getattr(right, field.name)
    for name in ("shared_a", "role_b"):
        a, b = getattr(left, name), getattr(right, name)
        assert set(a) == set(b)
        for path in a:
            assert (a[path].dtype, a[path].shape) == (b[path].dtype, b[path].shape)
            assert bytes(tensor_bytes(a[path])) == bytes(tensor_bytes(b[path]))


def rewrite(pack: Path, change, *, honest: bool = True) -> None:
    """Change a pack's header and tensors; `honest` gives it right checksums again, as a malicious writer would."""
    content = pack.read_bytes()
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    tensors = safetensors.torch.load(content)
    change(metadata, tensors)
    plain = safetensors.torch.save(tensors)
    begin = 8 + int.from_bytes(plain[:8], "little")
    header = json.loads(plain[8:begin]) | {"__metadata__": metadata}
    if honest:
        metadata["sha256"] = hashlib.sha256(plain[begin:]).hexdigest()
        metadata["header_sha256"] = ""
        metadata["header_sha256"] = hashlib.sha256(canonical(header)).hexdigest()
    raw = canonical(header)
    pack.write_bytes(len(raw).to_bytes(8, "little") + raw + plain[begin:])


def canonical(header: dict) -> bytes:
    raw = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)


def edit(field: str, change):
    """A change of one JSON field of the header."""

    def apply(metadata, tensors):
        metadata[field] = json.dumps(change(json.loads(metadata[field])), sort_keys=True)

    return apply


@st.composite
def adapter_sets(draw) -> AdapterSet:
    """Any valid tied set: odd sizes, all dtypes, any finite bits (negative zero and subnormals too)."""
    name = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,8}", fullmatch=True)
    names = draw(st.lists(name, min_size=1, max_size=4, unique=True))
    names = [n if n != "base" else "base_" for n in names]
    targets = draw(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=3, unique=True))
    layers = draw(st.sampled_from([1, 2, 12]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    rank, d_in, d_out = (draw(st.integers(1, 5)) for _ in range(3))
    odd_rank = draw(st.integers(1, 5))
    paths = [f"model.layers.{i}.self_attn.{t}" for i in range(layers) for t in targets]
    ranks = dict.fromkeys(paths, rank) | {paths[-1]: odd_rank}
    pattern = {p: r for p, r in ranks.items() if r != rank}
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def bits(*shape: int) -> torch.Tensor:
        tensor = torch.randint(-(2**15), 2**15, shape, generator=random, dtype=torch.int32).to(torch.int16)
        tensor = tensor.view(dtype) if dtype != torch.float32 else tensor.to(torch.int32).mul(77003).view(dtype)
        return torch.where(tensor.isfinite(), tensor, torch.zeros((), dtype=dtype))

    alphas = st.floats(allow_nan=False, allow_infinity=False)
    return AdapterSet(
        base_model=draw(st.text(max_size=20)),
        base_fingerprint=draw(st.sampled_from([None, "ab" * 32])),
        form="tied",
        targets=tuple(targets),
        roles=tuple(
            RoleSpec(
                name,
                alpha=draw(alphas),
                rank=rank,
                rslora=draw(st.booleans()),
                rank_pattern=pattern,
                alpha_pattern=draw(st.dictionaries(st.sampled_from(paths), alphas, max_size=2)),
            )
            for name in names
        ),
        shared_a={path: bits(ranks[path], d_in) for path in paths},
        role_b={path: bits(len(names), d_out, ranks[path]) for path in paths},
        objective=draw(st.sampled_from([None, "shared", "per_role", "mixed"])),
        prefix_writer=draw(st.sampled_from([None, "base", "first"])),
    )


@given(adapter_sets())
@settings(max_examples=40, deadline=None)
def test_round_trip_is_bit_exact(adapters):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "team.pack"
        write_pack(path, adapters)
        first = path.read_bytes()
        again = read_pack(path)
        assert_same(adapters, again)
        assert again.module_paths == tuple(sorted(adapters.module_paths, key=natural_key))
        write_pack(path, again)
        assert path.read_bytes() == first
        assert os.listdir(folder) == ["team.pack"]


def test_stacked_round_trip(tmp_path):
    adapters = make_adapter_set(tiny_model(), tied=False)
    write_pack(tmp_path / "p", adapters)
    assert_same(adapters, read_pack(tmp_path / "p"))


def test_any_safetensors_reader_sees_the_contract(pack, adapters):
    tensors = safetensors.torch.load_file(pack)
    assert set(tensors) == {p + s for p in adapters.module_paths for s in (".shared_A", ".role_B")}
    assert torch.equal(tensors[Q0 + ".role_B"], adapters.role_b[Q0])
    with safetensors.safe_open(pack, "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("lragent-pack", "1")
    role = json.loads(metadata["roles"])[0]
    assert (role["name"], role["digest"]) == ("plan", adapters.role_digest("plan"))


@pytest.fixture(scope="module")
def small_pack(tmp_path_factory) -> bytes:
    adapters = make_adapter_set(tiny_model(num_hidden_layers=1), ["plan"], rank=1, targets=("v_proj",))
    path = tmp_path_factory.mktemp("small") / "team.pack"
    write_pack(path, adapters)
    return path.read_bytes()


def test_no_byte_can_change_unnoticed(small_pack, tmp_path):
    path = tmp_path / "team.pack"
    for i in range(len(small_pack)):
        flip = 1 << (i % 8)
        path.write_bytes(small_pack[:i] + bytes([small_pack[i] ^ flip]) + small_pack[i + 1 :])
        with pytest.raises(UserError, match=r"team\.pack"):
            read_pack(path)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_is_read(small_pack, data):
    kind = data.draw(st.sampled_from(["replace", "cut", "append", "insert", "delete"]))
    at = data.draw(st.integers(0, len(small_pack) - 1))
    noise = data.draw(st.binary(min_size=1, max_size=9))
    head, tail = small_pack[:at], small_pack[at:]
    damaged = {
        "replace": head + noise + tail[len(noise) :],
        "cut": head,
        "append": small_pack + noise,
        "insert": head + noise + tail,
        "delete": head + tail[len(noise) :],
    }[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "team.pack"
        path.write_bytes(damaged)
        if damaged == small_pack:
            read_pack(path)
            return
        with pytest.raises(UserError, match=r"team\.pack"):
            read_pack(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"hello world, this is text", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        ((1 << 24).to_bytes(8, "little") + b"{}", "cut short or damaged"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((100000).to_bytes(8, "little") + b"[" * 100000, "its header is damaged"),
        (pickle.dumps({"a": 1}, protocol=4), "a pickle"),
    ],
    ids=["empty", "text", "noise", "long-header", "huge-header", "deep-json", "pickle"],
)
def test_foreign_files_are_refused(tmp_path, content, message):
    (tmp_path / "team.pack").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_pack(tmp_path / "team.pack")


def test_pickles_are_refused_unread(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "zip.pack")
    with pytest.raises(UserError, match="a pickle"):
        read_pack(tmp_path / "zip.pack")
    for name in ("team.bin", "team.pt"):
        with pytest.raises(UserError, match="can run code"):
            read_pack(tmp_path / name)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, message in [
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "absent", "No such file"),
        (tmp_path / "nul\0", "null"),
    ]:
        with pytest.raises(UserError, match=message):
            read_pack(path)


def test_a_plain_safetensors_file_is_no_pack(tmp_path):
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not a pack"):
        read_pack(tmp_path / "x.safetensors")


def poison(value: float):
    def change(metadata, tensors):
        tensors[Q0 + ".role_B"][1, 0, 0] = value

    return change


def first_role(**changes):
    return edit("roles", lambda roles: [{**roles[0], **changes}, *roles[1:]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: m.update(version="2"), "version is '2'"),
        (lambda m, t: m.update(format="other"), "not a pack"),
        (lambda m, t: m.update(more="1"), "'more' missing or in excess"),
        (lambda m, t: m.pop("objective"), "'objective' missing or in excess"),
        (lambda m, t: m.update(roles="[[[["), "not JSON"),
        (poison(float("nan")), "'action'.*NaN or Inf"),
        (poison(float("inf")), "'action'.*NaN or Inf"),
        (poison(123.0), "digest of role 'action' is wrong"),
        (lambda m, t: t.pop(Q0 + ".role_B"), r"lacks the tensor.*q_proj\.role_B"),
        (lambda m, t: t.pop(Q0 + ".shared_A"), "does not belong"),
        (lambda m, t: t.update(extra=torch.ones(2)), "does not belong there, 'extra'"),
        (lambda m, t: t.update({Q0 + ".shared_A": torch.ones(3, 64)}), "has shape"),
        (lambda m, t: t.update({Q0 + ".shared_A": torch.ones(4)}), "has a shared A of shape"),
        (first_role(name="base"), "model without an adapter"),
        (first_role(name="action"), "twice"),
        (first_role(name="../x"), "not allowed"),
        (first_role(name=7), "malformed"),
        (first_role(alpha="8"), "malformed"),
        (first_role(alpha=float("nan")), "not a finite number"),
        (first_role(alpha=1.5), "digest of role 'plan' is wrong"),
        (first_role(rank=10**30), "has rank 1"),
        (first_role(rank_pattern=[]), "malformed"),
        (first_role(rows={Q0: [0, 4]}), "only to those"),
        (first_role(digest=None), "malformed"),
        (edit("roles", lambda r: r[:2]), "2 roles"),
        (edit("roles", lambda r: {}), "malformed"),
        (edit("form", lambda f: "loose"), "tied or stacked"),
        (edit("form", lambda f: ["tied"]), "malformed"),
        (edit("targets", lambda t: ["q_proj"]), "do not agree"),
        (edit("targets", lambda t: [["q_proj"]]), "malformed"),
        (edit("dtype", lambda d: "float16"), "dtype"),
        (edit("base_fingerprint", lambda f: "x"), "digest of role"),
        (edit("base_model", lambda f: 5), "base_model is malformed"),
        (edit("objective", lambda o: "fun"), "objective"),
    ],
)
def test_a_wrong_pack_with_right_checksums_is_refused(pack, change, message):
    rewrite(pack, change)
    with pytest.raises(UserError, match=message) as caught:
        read_pack(pack)
    assert str(pack) in str(caught.value)


def test_rewriting_honestly_changes_nothing(pack):
    before = pack.read_bytes()
    rewrite(pack, lambda metadata, tensors: None)
    assert pack.read_bytes() == before


def test_wrong_tensor_digest(pack):
    rewrite(pack, poison(123.0), honest=False)
    with pytest.raises(UserError, match="tensors do not match their checksum"):
        read_pack(pack)


def test_wrong_base_is_refused(tmp_path, pack, adapters):
    with pytest.warns(UnknownBaseWarning):
        read_pack(pack, expect_fingerprint="ab" * 32)
    write_pack(pack, dataclasses.replace(adapters, base_fingerprint="cd" * 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_pack(pack, expect_fingerprint="cd" * 32)
        read_pack(pack)
    with pytest.raises(UserError, match=r"team\.pack.*another base"):
        read_pack(pack, expect_fingerprint="ab" * 32)


def test_nothing_unsound_or_half_is_written(pack, adapters, tmp_path):
    before = pack.read_bytes()
    b = adapters.role_b[Q0].clone()
    b[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        write_pack(pack, dataclasses.replace(adapters, role_b={**adapters.role_b, Q0: b}))
    assert pack.read_bytes() == before
    with pytest.raises(UserError, match="cannot write"):
        write_pack(tmp_path / "absent" / "team.pack", adapters)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_pack(tmp_path / "folder", adapters)
    assert sorted(os.listdir(tmp_path)) == ["folder", "team.pack"]


def test_a_full_disk_leaves_the_old_pack(pack, adapters, monkeypatch):
    before = pack.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_pack(pack, make_adapter_set(tiny_model(), seed=5))
    with pytest.raises(UserError, match="No space left"):
        write_peft_folders(adapters, pack.parent / "out")
    assert os.listdir(pack.parent) == ["team.pack"]
    assert pack.read_bytes() == before
