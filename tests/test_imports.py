"""Imports point one way, so that every module can be the first that is imported."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mlx_svd

ROOT = Path(mlx_svd.__file__).parent


def modules(root: Path) -> dict[str, Path]:
    """Name -> file, packages under their own name."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.Module) -> set[str]:
    """What the module's own level imports; imports within functions run later."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def graph(root: Path) -> dict[str, set[str]]:
    """Module -> modules that run before it, packages above an imported module among them."""
    every = modules(root)
    found = {}
    for name, path in every.items():
        wanted = imported(ast.parse(path.read_text(encoding="utf-8")))
        parts = [n.split(".") for n in wanted if n in every]
        before = {".".join(p[:k]) for p in parts for k in range(1, len(p) + 1)}
        # Packages above a module have begun already, whatever they import later.
        found[name] = {n for n in before if not f"{name}.".startswith(f"{n}.")}
    return found


def test_no_module_needs_one_that_needs_it():
    try:
        order = list(TopologicalSorter(graph(ROOT)).static_order())
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None
    assert len(order) > 100


def test_a_folder_imports_only_folders_above_it_in_the_readme():
    readme = (ROOT.parent / "README.md").read_text(encoding="utf-8")
    order = re.findall(r"^\| `mlx_svd/(\w+)` \|", readme, flags=re.MULTILINE)
    assert set(order) == {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for name, path in modules(ROOT).items():
        folder = name.split(".")[1:2]
        if not folder or folder[0] not in order:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("mlx_svd."):
                other = node.module.split(".")[1]
                below = other in order and order.index(other) > order.index(folder[0])
                assert not below, f"{name} imports {node.module}"


def test_a_circle_through_a_package_is_found(tmp_path):
    package = tmp_path / "p"
    (package / "kinds").mkdir(parents=True)
    (package / "__init__.py").write_text("from p.kinds import first\n")
    (package / "kinds" / "__init__.py").write_text("from p.kinds.first import x\n")
    (package / "kinds" / "first.py").write_text("import p.training\nx = 1\n")
    (package / "kinds" / "base.py").write_text("y = 1\n")
    (package / "training.py").write_text("from p.kinds.base import y\n")
    with pytest.raises(CycleError) as found:
        TopologicalSorter(graph(package)).prepare()
    assert {"p.training", "p.kinds", "p.kinds.first"} <= set(found.value.args[1])
