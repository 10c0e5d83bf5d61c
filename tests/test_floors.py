"""The direction of flow: a floor imports only from the floors below it."""

import ast
import importlib
import importlib.util
from pathlib import Path

import accord

ROOT = Path(accord.__file__).parent
# From the ground up. Modules of one tuple are one floor's folder or file; a later one may import earlier ones.
FLOORS = [
    "errors", "progress", "disk", "checkpoints", "nn", "optimizer", "service", "text", "data", "stories", "rollout", "supervised", "pretraining", "reward", "rl", "feedback", "evaluation", "inside",
    "runs", "config", "stages", "planning", "api", "tuning", "constitution", "beginning", "plan_recipe", "pipeline", "commands", "cli", "__main__",
]  # fmt: skip
ALLOWED_AT_ANY_FLOOR = {"accord"}  # the package itself, for its version


def floor_of(module: str) -> int:
    return FLOORS.index(module.split(".")[1])


def imports_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "accord":
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "accord")


def test_every_module_is_on_a_floor():
    found = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in ROOT.rglob("*.py")}
    assert found - {"__init__", "recipes"} == set(FLOORS)


def test_floors_import_only_downwards():
    wrong = []
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in ("__init__", "recipes"):
            continue
        for module in imports_of(path):
            if module not in ALLOWED_AT_ANY_FLOOR and floor_of(module) > FLOORS.index(parts[0]):
                wrong.append(f"{'/'.join(parts)} imports {module}")
    assert not wrong


def test_every_folder_says_what_lives_there():
    for folder in {p.parent for p in ROOT.rglob("*.py")} - {ROOT}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_what_benchmarks_take_from_accord_is_there():
    """They run seldom, so a name that has moved would be noticed late."""
    for path in (Path(__file__).parent.parent / "bench").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "accord":
                module = importlib.import_module(node.module)
                missing = [
                    a.name for a in node.names if not hasattr(module, a.name) and not importlib.util.find_spec(f"{node.module}.{a.name}")
                ]
                assert not missing, (path, missing)
