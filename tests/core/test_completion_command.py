"""`lragent completion`, and what the command line says of words that it does not know."""

import subprocess
from pathlib import Path

import pytest

from lragent.cli import main as cli


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


def completed(script: Path, folder: Path, *words: str) -> list[str]:
    """What bash offers for the last of `words`."""
    code = (
        'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_lragent; (( ${#COMPREPLY[@]} )) '
        '&& printf "%s\\n" "${COMPREPLY[@]}"; exit 0'
    )
    done = subprocess.run(
        ["bash", "-c", code, str(script), "lragent", *words], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_script_names_all_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    for command in cli.COMMANDS:
        assert command in text


def test_bash_completes_commands_options_choices_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lragent.bash"
    file.write_text(script("bash", capsys))
    subprocess.run(["bash", "-n", str(file)], check=True)
    (tmp_path / "team.safetensors").touch()
    (tmp_path / "terms").mkdir()

    assert completed(file, tmp_path, "se") == ["serve"]
    assert completed(file, tmp_path, "data", "") == ["check", "convert"]
    assert completed(file, tmp_path, "serve", "--max-num-s") == ["--max-num-seqs"]
    assert completed(file, tmp_path, "completion", "") == ["bash", "zsh", "tcsh"]
    assert "team.safetensors" in completed(file, tmp_path, "inspect", "te")
    assert "team.safetensors" in completed(file, tmp_path, "serve", "--roles", "te")
    assert completed(file, tmp_path, "unpack", "team.safetensors", "--output", "te") == ["terms"]


def test_help_tells_the_line_for_bashrc(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["completion", "--help"])
    assert '~/.bashrc  eval "$(lragent completion bash)"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve", "--max-num-seq", "3"], "lragent serve: unknown option --max-num-seq; did you mean --max-num-seqs?"),
        (["serve", "--max-num-seq=3"], "lragent serve: unknown option --max-num-seq; did you mean --max-num-seqs?"),
        (["serve", "--zzz"], "lragent serve: unknown option --zzz"),
        (["serve", "-x"], "lragent serve: unknown option -x"),
        (["serve", "--port", "x"], "lragent serve: argument --port: invalid int value: 'x'"),
        (["heal", "pack", "--dta", "x"], "lragent heal: unknown option --dta; did you mean --data?"),
        (["heal", "--dat", "x"], "lragent heal: unknown option --dat; did you mean --data?"),  # no abbreviations
        (["data", "check", "x", "--role", "a"], "lragent data check: unknown option --role; did you mean --roles?"),
        (["unpack", "a", "b", "-o", "c"], "lragent unpack: unexpected argument b"),
        (["inspect"], "lragent inspect: the following arguments are required: PACK"),
    ],
)
def test_what_is_not_understood_is_one_line_and_where_to_look(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {said}\n{said.split(':')[0]} --help lists the options.\n")


@pytest.mark.parametrize("words", [["--versio"], ["--versio", "serve", "--port", "0"]])
def test_an_option_before_the_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(words)
    said = "error: lragent: unknown option --versio; did you mean --version?\nlragent --help lists the commands.\n"
    assert capsys.readouterr().err == said


def test_what_follows_two_dashes_is_no_option() -> None:
    args = cli.build_parser().parse_args(["serve", "--port", "1", "--", "--max-num-seq"])
    assert (args.port, args.overrides) == (1, ["--max-num-seq"])
