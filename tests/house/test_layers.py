"""The shape of the house: who may import whom, found by reading every file, not by running it."""

import ast
import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("lragent", "kernels", "train", "serve", "eval", "bench")
"""Top-level folders; all but the first are installed as `lragent.<room>`."""

ARROWS = {
    "kernels": {"kernels"},
    "lragent": {"lragent", "kernels"},
    "train": {"train", "lragent"},
    "serve": {"serve", "lragent", "kernels"},
    "eval": set(ROOMS),
    "bench": set(ROOMS),
}
SERVE_ARROWS = {
    "cache": {"cache"},
    "engine": {"cache", "engine"},
    "ledger": {"engine", "ledger"},
    "api": {"cache", "engine", "ledger", "api"},
    "replicas": {"engine", "replicas"},
}
ONLY_IN = {
    "fastapi": "serve/api/",
    "uvicorn": "serve/api/",
    "starlette": "serve/api/",
    "wandb": "train/loop.py",
    "ray": "serve/replicas/fleet.py",
}
"""Library to the one place that may know it."""

KERNEL_LIBRARIES = {"torch", "triton"} | sys.stdlib_module_names
GRAPH_NAMES = {"torch.cuda.graph", "torch.cuda.graphs", "torch.cuda.CUDAGraph", "torch.cuda.make_graphed_callables"}


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    lazy: bool
    """Inside a function, or for type checkers only."""


def module_name(path: str) -> str:
    """The dotted name under which the file at `path`, relative to the root, is installed."""
    parts = Path(path).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts if parts[0] == "lragent" else ("lragent", *parts))


def room_of(module: str) -> str | None:
    """The room that `module` lives in; None for what is not of this house."""
    parts = module.split(".")
    if parts[0] != "lragent":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "lragent"


def imports_of(path: str, tree: ast.AST) -> Iterator[Import]:
    """Every module that a file names in an import; `from a import b` counts as `a.b`."""
    package = module_name(path).split(".")
    if not path.endswith("__init__.py"):
        package = package[:-1]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{origin}.{alias.name}", node.lineno, lazy)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for name in node.args[:1]:
                yield Import(str(getattr(name, "value", "")), node.lineno, lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        inside = inside or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(tree, False)


def faults(path: str, text: str) -> list[str]:
    """What the file at `path`, relative to the root, does that the house does not allow."""
    tree = ast.parse(text)
    room = Path(path).parts[0]
    is_cli = path.startswith("lragent/cli/")
    found = []
    for known in imports_of(path, tree):
        where = f"{path}:{known.line}: {known.module}: "
        library = known.module.split(".")[0]
        target = room_of(known.module)
        if library in ROOMS and library != "lragent":
            found.append(f"{where}bare; it is installed as lragent.{library}")
        if target is not None and target not in ARROWS[room] and not (is_cli and known.lazy):
            found.append(f"{where}{room} may not know {target}{' outside functions' if is_cli else ''}")
        if target is None and room == "kernels" and library not in KERNEL_LIBRARIES:
            found.append(f"{where}kernels know torch and triton only")
        if not path.startswith(ONLY_IN.get(library, path)):
            found.append(f"{where}only {ONLY_IN[library]} may know {library}")
        if room == target == "serve":
            mine, theirs = (Path(path).parts[1], [*known.module.split("."), ""][2])
            if theirs in SERVE_ARROWS and theirs not in SERVE_ARROWS.get(mine, SERVE_ARROWS):
                found.append(f"{where}inside serve, {mine} may not know {theirs}")
        if known.module in GRAPH_NAMES and Path(path).stem != "graphs":
            found.append(f"{where}only a file called graphs may know CUDA graphs")
    if Path(path).stem != "graphs":
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in GRAPH_NAMES:
                found.append(f"{path}:{node.lineno}: only a file called graphs may know CUDA graphs")
    return found


def files() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", files())
def test_imports_point_down_only(path: str) -> None:
    assert faults(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kernels/a.py", "import lragent.modes"),
        ("kernels/a.py", "from lragent import errors"),
        ("kernels/a.py", "import numpy"),
        ("lragent/a.py", "from lragent.serve import engine"),
        ("lragent/a.py", "from lragent import train"),
        ("lragent/a.py", "def f():\n    import lragent.train.data"),
        ("lragent/a.py", "from .serve import engine"),
        ("lragent/models/a.py", "from ..serve.engine import x"),
        ("lragent/cli/a.py", "from lragent.serve.api import app"),
        ("lragent/cli/a.py", "import importlib\nimportlib.import_module('lragent.train.loop')"),
        ("train/a.py", "from lragent.serve.engine import x"),
        ("train/a.py", "from lragent.kernels import attention"),
        ("train/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lragent.serve"),
        ("train/a.py", "import wandb"),
        ("lragent/a.py", "def f():\n    import wandb"),
        ("serve/engine/a.py", "from lragent.train import data"),
        ("serve/engine/a.py", "from lragent.serve.api.app import x"),
        ("serve/engine/a.py", "from lragent.serve import api"),
        ("serve/engine/a.py", "from ..api import app"),
        ("serve/cache/a.py", "from lragent.serve.engine import x"),
        ("serve/cache/__init__.py", "from ..engine import x"),
        ("serve/engine/a.py", "import fastapi"),
        ("serve/replicas/a.py", "from lragent.serve.api.settings import x"),
        ("serve/api/a.py", "from lragent.serve.replicas.fleet import x"),
        ("serve/replicas/link.py", "import ray"),
        ("lragent/cli/a.py", "def f():\n    import uvicorn"),
        ("eval/a.py", "from starlette.requests import Request"),
        ("eval/a.py", "import serve.engine"),
        ("bench/a.py", "from kernels import attention"),
        ("serve/engine/a.py", "import torch\nwith torch.cuda.graph(g):\n    pass"),
        ("serve/engine/a.py", "from torch.cuda import CUDAGraph"),
    ],
)
def test_a_wrong_import_is_found(path: str, text: str) -> None:
    assert faults(path, text) != []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "kernels/a.py",
            "import math\nimport torch\nimport triton.language as tl\nfrom lragent.kernels import reference",
        ),
        ("lragent/a.py", "from lragent.kernels.attention import x\nfrom lragent.errors import UserError"),
        ("lragent/cli/a.py", "def run():\n    from lragent.train import loop\n    import lragent.serve.api.app"),
        ("train/a.py", "from lragent.chat import Renderer\nfrom lragent.train.data import Example"),
        ("train/loop.py", "def f():\n    import wandb"),
        ("serve/api/a.py", "import fastapi\nfrom lragent.serve.engine.types import x\nfrom lragent.kernels import y"),
        ("serve/engine/a.py", "from lragent.serve.cache import slots\nfrom . import types"),
        ("serve/engine/graphs.py", "import torch\ntorch.cuda.CUDAGraph()"),
        ("eval/a.py", "from lragent.serve.api import app\nfrom lragent.train import data"),
        ("bench/a.py", "from lragent.eval import world"),
        ("serve/engine/a.py", "import torch\ntorch.cuda.synchronize()"),
    ],
)
def test_a_right_import_passes(path: str, text: str) -> None:
    assert faults(path, text) == []


def test_no_file_in_train_is_named_like_a_library() -> None:
    """`accelerate launch train/train_roles.py` puts train/ first on the path, where such a file would be imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    libraries = {name.split(">")[0].split("[")[0].replace("-", "_") for name in wanted} | set(sys.stdlib_module_names)
    for path in (ROOT / "train").iterdir():
        if path.stem.startswith("__"):
            continue
        assert path.stem not in libraries, path
        spec = importlib.util.find_spec(path.stem)
        if spec is None:
            continue
        # A folder without an __init__, such as examples/, has places but no origin.
        places = [Path(place) for place in ([spec.origin] if spec.origin else spec.submodule_search_locations or [])]
        ours = places and all(ROOT in place.parents and "site-packages" not in place.parts for place in places)
        assert ours, f"{path} hides {', '.join(map(str, places)) or spec}"


def test_every_package_is_installed() -> None:
    """A folder that setuptools does not know works in a checkout and is missing from a wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {str(Path(path).parent / "__init__.py") for path in files()}
    assert {module_name(folder) for folder in folders} == set(listed)
    for folder in folders:
        assert (ROOT / folder).is_file(), folder
