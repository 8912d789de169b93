"""`lragent pack`, `unpack` and `inspect`, and how the command line reports errors."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_adapter_set, save_tiny, tiny_model

from lragent import __version__
from lragent.cli import main as cli
from lragent.models import fingerprint
from lragent.pack import read_pack, write_pack
from lragent.peft_io import write_peft_folders


@pytest.fixture
def folders(tmp_path) -> list[str]:
    """Arguments for the PEFT folders of a tied team."""
    written = write_peft_folders(make_adapter_set(tiny_model()), tmp_path / "peft")
    return [f"{folder.name}={folder}" for folder in written]


@pytest.fixture
def run(capsys):
    def run(*args: object) -> tuple[int, str, str]:
        status = cli.main([str(arg) for arg in args])
        return status, *capsys.readouterr()

    return run


def refused(outcome: tuple[int, str, str]) -> str:
    """The one sentence of a refusal."""
    status, out, err = outcome
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_pack_inspect_unpack(folders, tmp_path, run):
    pack = tmp_path / "team.pack"
    status, out, err = run("pack", *folders, "-o", pack)
    assert status == 0
    assert out.startswith(f"{pack}: 3 roles (plan, action, reflect), tied, 13,312 bytes")
    assert err.count("warning: ") == 3
    assert "on trust" in err
    assert len(err.splitlines()) == 3

    status, out, err = run("inspect", pack)
    assert (status, err) == (0, "")
    for words in ("plan", "action", "reflect", "q_proj, v_proj", "tied", "rank 4", "not recorded", "13,312", "21,504"):
        assert words in out

    status, out, err = run("unpack", pack, "-o", tmp_path / "out")
    assert (status, err) == (0, "")
    assert out.split() == [str(tmp_path / "out" / name) for name in ("plan", "action", "reflect")]
    for name in ("plan", "action", "reflect"):
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "out" / name / file).read_bytes() == (tmp_path / "peft" / name / file).read_bytes()


def test_inspect_as_json(tmp_path, run):
    adapters = dataclasses.replace(
        make_adapter_set(tiny_model(), ["plan", "action"], tied=False), objective="mixed", prefix_writer="base"
    )
    write_pack(tmp_path / "team.pack", adapters)
    status, out, _ = run("inspect", tmp_path / "team.pack", "--json")
    facts = json.loads(out)
    assert status == 0
    assert (facts["form"], facts["shared_rank"]) == ("stacked", [8])
    assert (facts["objective"], facts["prefix_writer"]) == ("mixed", "base")
    assert facts["a_digest"] == adapters.a_digest()
    assert facts["file_bytes"] == (tmp_path / "team.pack").stat().st_size
    assert facts["roles"][1] == {
        "name": "action",
        "alpha": [8.0],
        "rank": [4],
        "rslora": False,
        "scaling": [2.0],
        "targets": ["q_proj", "v_proj"],
        "modules": 4,
        "digest": adapters.role_digest("action"),
    }


def test_untied_adapters_are_stacked_when_asked(tmp_path, run):
    stacked = make_adapter_set(tiny_model(), ["plan", "action"], tied=False)
    folders = [f"{f.name}={f}" for f in write_peft_folders(stacked, tmp_path / "peft")]
    assert "--stack" in refused(run_quietly(run, "pack", *folders, "-o", tmp_path / "team.pack"))
    assert not (tmp_path / "team.pack").exists()
    assert run("pack", *folders, "-o", tmp_path / "team.pack", "--stack")[0] == 0
    assert read_pack(tmp_path / "team.pack").a_digest() == stacked.a_digest()


def test_the_model_is_recorded_and_checked(folders, tmp_path, run):
    model, other = save_tiny(tmp_path / "model"), save_tiny(tmp_path / "other", seed=1)
    pack = tmp_path / "team.pack"
    assert run("pack", *folders, "-o", pack, "--model", model)[0] == 0
    adapters = read_pack(pack, expect_fingerprint=fingerprint(model))
    assert (adapters.base_model, adapters.base_fingerprint) == ("model", fingerprint(model))
    assert run("unpack", pack, "-o", tmp_path / "out")[0] == 0
    status, _, err = run("pack", f"plan={tmp_path / 'out' / 'plan'}", "-o", pack)
    assert (status, err) == (0, "")
    assert "another base" in refused(run("pack", f"plan={tmp_path / 'out' / 'plan'}", "-o", pack, "--model", other))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pack", "plan", "-o", "x"], "'plan' is not NAME=FOLDER"),
        (["pack", "plan=", "-o", "x"], "is not NAME=FOLDER"),
        (["pack", "plan=a", "plan=b", "-o", "x"], "'plan' is used twice"),
        (["pack", "plan=absent", "-o", "x"], "absent"),
        (["pack", "plan=a", "-o", "x", "--model", "/absent"], "/absent"),
        (["unpack", "absent", "-o", "x"], "absent"),
        (["inspect", "absent"], "absent"),
        (["inspect", "."], "not a regular file"),
        (["inspect", "weights.pt"], "pickle"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, words, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    assert words in refused(run(*arguments))
    assert os.listdir(tmp_path) == []


def test_bad_output_is_refused(folders, tmp_path, run):
    assert "cannot write" in refused(run_quietly(run, "pack", *folders, "-o", tmp_path / "absent" / "team.pack"))
    assert run("pack", *folders, "-o", tmp_path / "team.pack")[0] == 0
    assert "there already" in refused(run("unpack", tmp_path / "team.pack", "-o", tmp_path / "peft"))
    spoilt = (tmp_path / "team.pack").read_bytes()[:-1]
    (tmp_path / "team.pack").write_bytes(spoilt)
    assert "cut short" in refused(run("unpack", tmp_path / "team.pack", "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def run_quietly(run, *args: object) -> tuple[int, str, str]:
    """The outcome without the lines of warnings."""
    status, out, err = run(*args)
    return status, out, "".join(line for line in err.splitlines(True) if not line.startswith("warning: "))


@pytest.mark.parametrize("arguments", [[], ["dance"], ["pack"], ["inspect"], ["unpack", "x"]])
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    error, mend = capsys.readouterr().err.splitlines()
    assert error.startswith("error: lragent")
    assert mend.startswith("lragent")


def test_ctrl_c_exits_with_130(monkeypatch):
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("lragent.cli.inspect.run", interrupted)
    assert cli.main(["inspect", "x"]) == 130


def test_every_command_file_is_listed():
    folder = Path(cli.__file__).parent
    files = {path.stem: path.read_text() for path in folder.glob("*.py")}
    files |= {path.parent.name: path.read_text() for path in folder.glob("*/__init__.py")}
    assert {name for name, text in files.items() if "\ndef add_parser(" in text} == set(cli.COMMANDS)


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys\nfrom lragent.cli.main import main\n"
        "try: main(['--version'])\nexcept SystemExit: pass\n"
        "sys.exit(' '.join({'torch', 'transformers', 'peft', 'fastapi'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"lragent {__version__}\n"
