"""Folders follow the data flow: a folder imports only folders above it."""

import ast
from pathlib import Path

import mlx_svd

ROOT = Path(mlx_svd.__file__).parent
ORDER = (
    "errors", "strict_json", "conditions", "parallel", "linalg", "x86", "models", "source",
    "checkpoint", "calibrate", "plan", "compress", "kv", "evaluate", "analyze", "finetune",
    "experiments", "report", "demo", "cli",
)  # fmt: skip


EVALUATE_ORDER = (
    "processes", "statistics", "likelihood", "settings", "perplexity", "divergence", "facts",
    "speed", "rows", "generation", "jobs", "retention", "tasks", "results", "prepare", "evaluate",
    "comparison",
)  # fmt: skip


def imported_folders(file: Path) -> set[str]:
    """First names below mlx_svd that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            parts = node.module.split(".")
            if parts == ["mlx_svd"]:
                found |= {alias.name for alias in node.names if alias.name in ORDER}
            elif parts[0] == "mlx_svd":
                found.add(parts[1])
    return found


def test_every_folder_and_file_has_its_place():
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").is_file()}
    files = {p.stem for p in ROOT.glob("*.py")} - {"__init__", "__main__"}
    assert folders | files == set(ORDER)


def test_imports_point_upwards_only():
    for file in ROOT.rglob("*.py"):
        folder = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if folder in ("__init__", "__main__"):
            continue
        allowed = set(ORDER[: ORDER.index(folder) + 1])
        assert imported_folders(file) <= allowed, file


def test_imports_within_evaluate_point_upwards_only():
    root = ROOT / "evaluate"
    for file in root.rglob("*.py"):
        part = file.relative_to(root).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        allowed = set(EVALUATE_ORDER[: EVALUATE_ORDER.index(part) + 1])
        nodes = ast.walk(ast.parse(file.read_text()))
        names = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        found = {n.split(".")[2] for n in names if n.startswith("mlx_svd.evaluate.")}
        assert found <= allowed, file


def test_model_files_that_are_shipped_import_only_mlx_and_mlx_lm():
    allowed = {
        "mlx",
        "mlx_lm",
        "importlib",
        "dataclasses",
        "typing",
        "pathlib",
        "math",
        "functools",
    }
    for file in (ROOT / "models").glob("modeling_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                assert node.module != "__future__", "postponed annotations do not work there"
                names = {node.module.split(".")[0]}
            else:
                continue
            assert names <= allowed, file
