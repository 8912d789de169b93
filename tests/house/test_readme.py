"""The README's list of files is true and whole, and its make targets and commands exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("lragent", "kernels", "train", "serve", "eval", "bench")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def listed() -> list[str]:
    """The paths of the tree under "What is where", put together from their indentation."""
    block = README.split("## What is where")[1].split("```")[1]
    paths: list[str] = []
    folders: list[str] = []
    for line in block.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        path = "".join([*folders[:depth], name])
        folders[depth:] = [name] if name.endswith("/") else []
        paths.append(path)
    return paths


@pytest.mark.parametrize("path", listed())
def test_what_the_readme_names_is_there(path: str) -> None:
    found = ROOT / path
    assert found.is_dir() if path.endswith("/") else found.is_file()


def test_no_module_is_left_out() -> None:
    modules = {str(p.relative_to(ROOT)) for room in ROOMS for p in (ROOT / room).rglob("*.py")}
    left_out = sorted(module for module in modules - set(listed()) if not module.endswith("/__init__.py"))
    assert not left_out, "give these a line in the README's list"


def test_no_path_is_named_twice() -> None:
    assert len(listed()) == len(set(listed())) > 50


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"demo", "test", "check"} <= named <= targets


def test_commands_exist() -> None:
    from lragent.cli.main import COMMANDS

    named = set(re.findall(r"^lragent ([a-z]+)", README, re.MULTILINE))
    assert {"serve", "pack", "inspect"} <= named <= set(COMMANDS)
