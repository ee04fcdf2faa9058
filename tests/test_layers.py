"""The shape of the package, read from its source: who may import whom, and what nobody writes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sensikernels"

# Imports point to a lower number, or stay inside one package.
LEVELS = {
    "_core": 0,
    **dict.fromkeys(["types", "layouts"], 1),
    "ops": 2,
    **dict.fromkeys(["masks", "optim"], 3),
    **dict.fromkeys(["nn", "world"], 4),
    "hf": 5,
    **dict.fromkeys(["methods", "data"], 6),
    "training": 7,
    "bench": 8,
    "compare": 9,
    "cli": 10,
}
# Where a heavy or optional library may be imported at all.
HOMES = {
    "transformers": ("hf/", "bench/"),
    "datasets": ("data/",),
    "sklearn": ("data/",),
    "scipy": ("data/",),
    "seqeval": ("data/",),
    "peft": ("hf/",),
    "torchmetrics": ("data/",),
    "matplotlib": ("bench/", "training/picture.py", "compare/picture.py"),
    "typer": ("cli/",),
    "rich": ("cli/", "_core/progress.py", "bench/"),
}


def sources() -> list[str]:
    """Every Python file of the package, relative to it."""
    return sorted(str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py"))


def parse(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text(), filename=name)


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """``(line, module)``; ``from a import b`` counts as ``a.b``, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def unit(name: str) -> str:
    """The level table's name of a file: its folder, or the module at the top."""
    first = Path(name).parts[0]
    return first.removesuffix(".py")


def test_the_scan_sees_the_package():
    names = sources()
    assert "_core/checks.py" in names
    assert "bench/timing.py" in names
    assert any(n.startswith("ops/") for n in names)


def test_every_unit_has_a_level():
    assert {unit(n) for n in sources()} - {"__init__"} <= set(LEVELS)


@pytest.mark.parametrize("name", [n for n in sources() if n != "__init__.py"])
def test_imports_point_downward(name: str):
    own = unit(name)
    for line, module in imports(parse(name)):
        if not module.startswith("sensikernels."):
            continue
        other = module.split(".")[1]
        if other == "__version__":
            continue
        where = f"{name}:{line} imports {module}"
        assert other in LEVELS, f"{where}: not from the top of the package"
        allowed = own == other or LEVELS[other] < LEVELS[own]
        assert allowed, f"{where}: level {LEVELS[own]} may not import level {LEVELS[other]}"


@pytest.mark.parametrize("name", [n for n in sources() if n.startswith("ops/")])
def test_ops_never_import_each_other(name: str):
    parts = Path(name).parts
    for line, module in imports(parse(name)):
        path = module.split(".")
        if path[:2] != ["sensikernels", "ops"]:
            continue
        assert path[2] in (parts[1], "common"), f"{name}:{line} imports {module}"


@pytest.mark.parametrize("name", sources())
def test_heavy_libraries_stay_at_home(name: str):
    for line, module in imports(parse(name)):
        top = module.split(".")[0]
        if top == "triton":
            at_home = Path(name).name.startswith("triton")
        elif top in HOMES:
            at_home = name.startswith(HOMES[top])
        else:
            continue
        assert at_home, f"{name}:{line} imports {module}"


def graph() -> dict[str, set[str]]:
    """The modules that each module imports, in functions and for type checkers too."""
    names = {
        ".".join(("sensikernels", *Path(n).with_suffix("").parts)).removesuffix(".__init__"): n
        for n in sources()
    }
    edges: dict[str, set[str]] = {}
    for module, name in names.items():
        found = {other for _, other in imports(parse(name))}
        # ``from a.b import c``: the module a.b.c if there is one, else a.b.
        edges[module] = {o if o in names else o.rpartition(".")[0] for o in found} & set(names)
    edges["sensikernels"] = set()  # its names are resolved on first use
    return {module: others - {module} for module, others in edges.items()}


def test_no_circle_of_imports():
    edges = graph()
    while leaves := [module for module, others in edges.items() if not others]:
        edges = {m: others - set(leaves) for m, others in edges.items() if m not in leaves}
    assert not edges, f"a circle among {sorted(edges)}"


def test_the_package_never_reaches_for_the_repository():
    for name in sources():
        for line, module in imports(parse(name)):
            assert module.split(".")[0] not in ("bench", "tests"), f"{name}:{line}"


OPS = sorted({p.parent.name for p in (PACKAGE / "ops").glob("*/__init__.py")} - {"common"})


@pytest.mark.parametrize("op", OPS)
def test_every_operator_has_its_tests_and_its_benchmark(op: str):
    assert list((ROOT / "tests" / "ops" / op).glob("test_*.py"))
    assert (ROOT / "bench" / f"test_{op}.py").is_file()


def called(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """``(line, name)`` of each call: ``print`` for a name, ``.cuda`` for a method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.lineno, node.func.id
            elif isinstance(node.func, ast.Attribute):
                yield node.lineno, f".{node.func.attr}"


@pytest.mark.parametrize("name", sources())
def test_what_nobody_writes(name: str):
    tree = parse(name)
    may_print = name.startswith(("cli/", "bench/"))
    for line, call in called(tree):
        assert call != ".cuda", f"{name}:{line} moves to a device of its own choice"
        assert call != "print" or may_print, f"{name}:{line} prints"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            at_home = name == "_core/environment.py" or name.startswith("bench/")
            assert at_home, f"{name}:{node.lineno} reads the environment"
        if isinstance(node, ast.Attribute) and node.attr == "make_block_ptr":
            pytest.fail(f"{name}:{node.lineno} uses a call that Triton 3.9 removed")
        if isinstance(node, ast.ExceptHandler):
            silent = all(isinstance(s, ast.Pass) for s in node.body)
            assert node.type is not None, f"{name}:{node.lineno} catches everything"
            assert not silent, f"{name}:{node.lineno} swallows an error"


def long_files() -> list[Path]:
    folders = ("sensikernels", "bench", "csrc", "tests")
    suffixes = {".py", ".cpp", ".cu", ".cuh", ".h"}
    return [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes]


@pytest.mark.parametrize("path", long_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_can_be_read_in_one_sitting(path: Path):
    assert len(path.read_text().splitlines()) <= 400


def functions() -> list[tuple[str, ast.FunctionDef]]:
    """Every function of the package and of ``bench`` with the file it is in."""
    files = [p for f in ("sensikernels", "bench") for p in sorted((ROOT / f).rglob("*.py"))]
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(one) for one in function.decorator_list)


def test_functions_fit_on_a_screen():
    for where, node in functions():
        lines = (node.end_lineno or 0) - node.lineno + 1
        assert lines <= (120 if is_kernel(node) else 60), f"{where}: {lines} lines"


# Public calls whose further arguments are keywords with defaults, as torch's own have them.
KEYWORDS = {
    "dropout_add_norm",
    "embed_norm",
    "group_reduce",
    "select_kept",
    "subset_adamw",
    "varlen_attention",
}


def test_signatures_can_be_remembered():
    for where, node in functions():
        path, _, name = where.partition(" ")
        if is_kernel(node) or "/triton" in path or path.startswith("sensikernels/cli/"):
            continue
        given = node.args
        public = name in KEYWORDS and "/api.py" in path or "optim/subset_adamw.py" in path
        required = [*given.posonlyargs, *given.args] if public else []
        counted = required or [*given.posonlyargs, *given.args, *given.kwonlyargs]
        assert len(counted) <= 8, f"{where}: {len(counted)} arguments"
