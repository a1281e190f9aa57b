"""Imports go one way: modules <- encoders, backbones <- lit; retrieval <- data; all <- cli."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "motionrag"

# Part of the package -> parts it may import, besides itself, errors and io.
MAY_IMPORT = {
    "errors": set(),
    "io": set(),
    "modules": set(),
    "metrics": set(),
    "encoders": {"modules"},
    "extractors": {"encoders", "metrics.optical_flow", "data.motionworld"},
    "backbones": {"modules", "encoders", "checkpoint"},
    "retrieval": {"encoders"},
    "data": {"retrieval", "encoders"},
    "checkpoint": {"modules"},
    "lit": {"modules", "encoders", "backbones", "checkpoint", "data.batch", "metrics", "search"},
    "release": {"modules", "backbones", "checkpoint"},
    "describe": {"modules", "encoders", "backbones", "release"},
    "provenance": set(),
    "page": set(),
    "comparison": {"page", "sweeps"},
    "report": {"page", "comparison"},
    "search": set(),
    "sweeps": set(),
    "generate": {"modules", "encoders", "backbones", "retrieval", "checkpoint", "data.video", "data.batch"},
    "evaluation": {"modules", "metrics", "report", "page", "backbones", "retrieval", "data", "generate"},
    "plugin": {"modules", "encoders", "backbones", "retrieval", "checkpoint", "data.video", "generate"},
}
FREE = {"cli", "bench"}  # they put everything together
THIRD_PARTY = {"modules": {"torch", "einops"}, "metrics": {"torch", "torchmetrics"}}


def imports(path: Path) -> set[str]:
    """Every module a file imports, at any depth, as absolute dotted names."""
    package = ["motionrag", *path.relative_to(PACKAGE).with_suffix("").parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from motionrag.data import batch` imports motionrag.data.batch; a class adds a harmless tail
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def part(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_all_parts_have_a_rule():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert parts - {"__init__"} <= MAY_IMPORT.keys() | FREE


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_go_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in FREE or own == "__init__":
        return
    allowed = MAY_IMPORT[own] | {own, "errors", "io", "__version__"}
    for name in imports(path):
        if name.split(".")[0] != "motionrag":
            continue
        within = name.removeprefix("motionrag.")
        assert any(within == rule or within.startswith(rule + ".") for rule in allowed), (
            f"{path} imports {name}"
        )


@pytest.mark.parametrize("own", sorted(THIRD_PARTY))
def test_pure_parts_use_few_libraries(own):
    for path in (PACKAGE / own).glob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        foreign = roots - sys.stdlib_module_names - THIRD_PARTY[own] - {"motionrag"}
        assert not foreign, f"{path} imports {foreign}"


def test_the_checker_sees_relative_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "modules").mkdir()
    file = tmp_path / "modules" / "x.py"
    file.write_text("from . import a\nfrom ..lit import b\nfrom .c import d\nimport torch.nn as nn\n")
    assert imports(file) == {
        "motionrag.modules.a",
        "motionrag.lit.b",
        "motionrag.modules.c.d",
        "torch.nn",
    }
