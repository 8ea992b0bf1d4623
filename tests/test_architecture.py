"""The import graph of the three packages points one way, and nothing is long without a reason.

Every import counts: at the top of a module, inside a function, and under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE, ADAPTERS = "specrag", ("langchain_specrag", "llamaindex_specrag")

# From the bottom to the top. A part imports from itself and from the parts before its row, not from its neighbours in
# the row.
# "specrag" is the package's own __init__, which names what users import from `specrag` itself.
LAYERS = (
    ("errors",),
    ("_abandoned",),
    ("_blocking",),
    ("_encodings", "_extras", "_fields", "_files", "_foreign", "_stages", "_unicode"),
    ("_page",),
    ("schema",),
    ("text",),
    ("engine",),
    ("models",),
    ("retrieval",),
    ("speculative", "rapid"),
    ("baselines",),
    ("evaluation",),
    ("training",),
    ("specrag",),
    ("serving",),
    ("cli",),
)
# What each package must not import: the frameworks stay in their adapters.
FOREIGN = {
    "specrag": {"langchain", "langchain_core", "llama_index"},
    "langchain_specrag": {"llama_index"},
    "llamaindex_specrag": {"langchain", "langchain_core"},
}

# As a guide, no module, class or function has more lines than this. `LONGER` names what reads better whole, and why.
MAX_LINES = {"module": 400, "class": 200, "function": 60}
LONGER = {
    "specrag.cli.ask.ask": "half of it is the options of the command, one each line",
    "specrag.cli.batch.batch": "half of it is the options of the command, one each line",
    "specrag.cli.evaluate.evaluate": "half of it is the options of the command, one each line",
    "specrag.cli.serve.serve": "half of it is the options of the command, one each line",
    "specrag.cli.train.train": "half of it is the options of the command, one each line",
}


def parse(root: Path = ROOT) -> dict[str, ast.Module]:
    """Every module of the three packages by its dotted name."""
    found = {}
    for package in (root / "core" / CORE, *(root / name for name in ADAPTERS)):
        for file in package.rglob("*.py"):
            parts = file.relative_to(package.parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(file.read_text(encoding="utf-8"), str(file))
    return found


def imports(name: str, tree: ast.Module) -> Iterator[str]:
    """The dotted names that a module imports; of ``from a import b``, ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively in line {node.lineno}: name the package"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph(modules: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Which modules of the three packages each module imports."""
    edges: dict[str, set[str]] = {}
    for name, tree in modules.items():
        edges[name] = set()
        for imported in imports(name, tree):
            module = imported if imported in modules else imported.rpartition(".")[0]
            if module in modules:
                edges[name].add(module)
            else:
                assert imported.split(".")[0] not in (CORE, *ADAPTERS), f"{name} imports {imported}: there is no such"
    return edges


def upward(edges: Mapping[str, set[str]]) -> list[str]:
    """The arrows that break the order of the layers, as "importer -> imported"."""
    height = {part: row for row, parts in enumerate(LAYERS) for part in parts}
    broken = []
    for importer, imported in ((a, b) for a, found in edges.items() for b in found):
        package, other = importer.split(".")[0], imported.split(".")[0]
        if other != CORE or package != CORE:
            allowed = other in (package, CORE) if package in ADAPTERS else other == CORE
        else:
            mine, theirs = (name.split(".")[1] if "." in name else CORE for name in (importer, imported))
            allowed = mine == theirs or height[theirs] < height[mine]
        if not allowed:
            broken.append(f"{importer} -> {imported}")
    return sorted(broken)


def circles(edges: Mapping[str, set[str]]) -> list[str]:
    """The first circle of imports, module by module; none when there is none."""
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def long_pieces(modules: Mapping[str, ast.Module]) -> set[str]:
    """The dotted names of modules, classes and functions with more lines than ``MAX_LINES``."""
    kinds = {ast.ClassDef: "class", ast.FunctionDef: "function", ast.AsyncFunctionDef: "function"}
    found = set()

    def walk(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            kind = kinds.get(type(child))
            if kind and child.end_lineno - child.lineno + 1 > MAX_LINES[kind]:
                found.add(f"{name}.{child.name}")
            walk(child, f"{name}.{child.name}" if kind else name)

    for name, tree in modules.items():
        if tree.body and tree.body[-1].end_lineno > MAX_LINES["module"]:
            found.add(name)
        walk(tree, name)
    return found


# --- the packages ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modules() -> dict[str, ast.Module]:
    return parse()


def test_imports_point_one_way(modules):
    assert len(modules) > 50
    assert upward(graph(modules)) == []


def test_no_module_imports_itself_through_others(modules):
    assert circles(graph(modules)) == []


def test_every_part_of_the_core_has_a_layer(modules):
    parts = {name.split(".")[1] for name in modules if name.startswith(f"{CORE}.")}
    assert parts <= {part for row in LAYERS for part in row}


def test_each_framework_stays_in_its_adapter(modules):
    for name, tree in modules.items():
        used = {imported.split(".")[0] for imported in imports(name, tree)}
        assert not used & FOREIGN[name.split(".")[0]], name


def test_the_server_needs_neither_evaluation_nor_training(modules):
    edges = graph(modules)
    imported = {other for name, others in edges.items() if name.startswith("specrag.serving") for other in others}
    assert imported and not {name for name in imported if name.startswith(("specrag.evaluation", "specrag.training"))}


def test_what_is_long_has_its_reason(modules):
    assert long_pieces(modules) == set(LONGER)


@pytest.mark.parametrize("module", ["specrag", "specrag.errors", "specrag.schema", "specrag.text", "specrag.cli"])
def test_importing_it_loads_no_heavy_library(module):
    assert loaded_with(module) & {"torch", "transformers", "faiss", "numpy"} <= (
        {"numpy"} if module in ("specrag.schema", "specrag.text") else set()
    )


@pytest.mark.parametrize("module", ["specrag.models", "specrag.models.openai", "specrag.speculative.pipeline"])
def test_a_client_of_a_server_loads_no_torch(module):
    assert not loaded_with(module) & {"torch", "transformers"}


def loaded_with(module: str) -> set[str]:
    code = f"import {module}, sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


# --- the checks themselves ------------------------------------------------------------------------------


def tree_with(folder: Path, files: Mapping[str, str]) -> dict[str, ast.Module]:
    for package in (f"core/{CORE}", *ADAPTERS):
        (folder / package).mkdir(parents=True, exist_ok=True)
        (folder / package / "__init__.py").touch()
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return parse(folder)


@pytest.mark.parametrize(
    ("importer", "text", "arrow"),
    [
        ("core/specrag/text.py", "from specrag.models import base", "specrag.text -> specrag.models.base"),
        ("core/specrag/text.py", "def f():\n    import specrag.cli", "specrag.text -> specrag.cli"),
        ("core/specrag/engine/a.py", "if TYPE_CHECKING:\n    import specrag.cli", "specrag.engine.a -> specrag.cli"),
        ("core/specrag/rapid/a.py", "import specrag.speculative", "specrag.rapid.a -> specrag.speculative"),
        ("core/specrag/speculative/__init__.py", "import specrag.rapid.a", "specrag.speculative -> specrag.rapid.a"),
        ("core/specrag/models/base.py", "from specrag import Passage", "specrag.models.base -> specrag"),
        ("core/specrag/cli.py", "import langchain_specrag", "specrag.cli -> langchain_specrag"),
        ("llamaindex_specrag/llm.py", "from langchain_specrag import x", "llamaindex_specrag.llm -> langchain_specrag"),
    ],
)
def test_an_arrow_that_breaks_the_order_is_found(tmp_path, importer, text, arrow):
    others = ("models/base.py", "speculative/__init__.py", "rapid/a.py", "cli.py")
    files = {f"core/specrag/{name}": "" for name in others} | {importer: text}
    assert upward(graph(tree_with(tmp_path, files))) == [arrow]


def test_a_circle_is_found_and_an_arrow_down_is_not(tmp_path):
    files = {
        "core/specrag/rapid/a.py": "from specrag.rapid.b import x\nfrom specrag.errors import y",
        "core/specrag/rapid/b.py": "",
        "core/specrag/errors.py": "",
        "langchain_specrag/chat.py": "from specrag.rapid import a",
    }
    edges = graph(tree_with(tmp_path, files))
    assert edges["langchain_specrag.chat"] == {"specrag.rapid.a"}
    assert upward(edges) == [] and circles(edges) == []
    edges = graph(tree_with(tmp_path, {"core/specrag/rapid/b.py": "def f():\n    from specrag.rapid.a import x"}))
    assert set(circles(edges)) == {"specrag.rapid.a", "specrag.rapid.b"}


def test_long_pieces_are_found(tmp_path):
    def lines(count: int, indent: str) -> str:
        return f"\n{indent}x = 1" * count

    long = f"def fits():{lines(59, '    ')}\ndef long():{lines(60, '    ')}\n"
    long += f"class Long:\n    def method(self):{lines(60, '        ')}{lines(200, '    ')}\n"
    found = long_pieces(tree_with(tmp_path, {"core/specrag/a.py": long, "core/specrag/b.py": lines(401, "")}))
    assert found == {"specrag.a.long", "specrag.a.Long", "specrag.a.Long.method", "specrag.b"}
