"""Reads the imports of the package: they point one way, and the exceptions are where they should be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "sparse_attn_jax"
ROOT = Path(__file__).absolute().parent.parent / PACKAGE

# A module may import its own layer and those above it in this list. A module that is not listed is a part of whoever
# imports it: what it imports counts as theirs.
LAYERS = (
    {"problem", "selection", "planning"},
    {"implementations.xla", "implementations.mosaic", "implementations.cuda"},
    {"dispatch"},
    {"attention", "scoring"},
    {"selectors"},
    {"api"},
    {"compat", "flax", "__init__"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def read_package() -> dict[str, str]:
    """Source of every module by dotted name without the package's; a folder is named `folder.__init__`."""
    modules = {}
    for path in sorted(ROOT.rglob("*.py")):
        modules[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path.read_text()
    return modules


def component(module: str) -> str:
    """The name that LAYERS uses: the first part, and for an implementation the first two."""
    parts = module.removesuffix(".__init__").split(".")
    return ".".join(parts[: 2 if parts[0] == "implementations" else 1])


def absolute_imports(module: str, source: str) -> Iterator[str]:
    """Every dotted name that the module imports, at its top or inside a function; `from a import b` gives a.b."""
    folder = f"{PACKAGE}.{module}".split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def resolve(name: str, modules: dict[str, str]) -> str | None:
    """The module of the package that a dotted name means, or None for a name from elsewhere."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    for end in range(len(parts), 1, -1):
        inner = ".".join(parts[1:end])
        if inner in modules:
            return inner
        if f"{inner}.__init__" in modules:
            return f"{inner}.__init__"
    return "__init__"


def import_graph(modules: dict[str, str]) -> dict[str, set[str]]:
    graph = {}
    for module, source in modules.items():
        found = {resolve(name, modules) for name in absolute_imports(module, source)}
        graph[module] = found - {None, module}
    return graph


def reached_parts(module: str, graph: dict[str, set[str]]) -> set[str]:
    """Listed components that a module imports, directly or through modules that are not listed."""
    reached, seen, waiting = set(), set(), [module]
    while waiting:
        for imported in graph[waiting.pop()] - seen:
            seen.add(imported)
            if component(imported) in RANK:
                reached.add(component(imported))
            else:
                waiting.append(imported)
    return reached - {component(module)}


def upward_arrows(modules: dict[str, str]) -> list[str]:
    graph = import_graph(modules)
    errors = []
    for module in modules:
        own = component(module)
        if own not in RANK:
            continue
        for other in sorted(reached_parts(module, graph)):
            siblings = own.startswith("implementations.") and other.startswith("implementations.")
            if RANK[other] > RANK[own] or siblings:
                errors.append(f"{module} imports {other}")
    return errors


def imports_of_testing(modules: dict[str, str]) -> list[str]:
    graph = import_graph(modules)
    return [
        f"{module} imports testing"
        for module in modules
        if component(module) != "testing" and any(component(imported) == "testing" for imported in graph[module])
    ]


def implementations_named(modules: dict[str, str]) -> list[str]:
    """Only dispatch knows which implementations there are."""
    graph = import_graph(modules)
    errors = []
    for module in modules:
        if component(module) in ("dispatch", "testing") or component(module).startswith("implementations."):
            continue
        named = {component(imported) for imported in graph[module]}
        errors += [f"{module} imports {name}" for name in sorted(named) if name.startswith("implementations.")]
    return errors


def private_jax(modules: dict[str, str]) -> list[str]:
    """Names of jax that start with an underscore, imported or reached by attribute; jax_compat and test support may."""
    errors = []
    for module, source in modules.items():
        if component(module) in ("jax_compat", "testing"):
            continue
        names = set(absolute_imports(module, source))
        names |= {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
        for name in sorted(names):
            first, *rest = name.split(".")
            private = any(part.startswith("_") and not part.startswith("__") for part in rest)
            if first in ("jax", "jaxlib") and private:
                errors.append(f"{module} uses {name}")
    return errors


CHECKS = (upward_arrows, imports_of_testing, implementations_named, private_jax)


@pytest.mark.parametrize("check", CHECKS)
def test_package_keeps_its_layers(check):
    modules = read_package()
    assert "problem" in modules
    assert check(modules) == []


# Each check has to fail on the smallest package that breaks its rule.
BROKEN = [
    (upward_arrows, {"problem": "import sparse_attn_jax.api", "api": ""}),
    (upward_arrows, {"planning": "from sparse_attn_jax import dispatch", "dispatch": ""}),
    (upward_arrows, {"selection": "from . import attention", "attention": ""}),
    (upward_arrows, {"dispatch": "def f():\n  from .scoring import x", "scoring": ""}),
    (upward_arrows, {"api": "import sparse_attn_jax", "__init__": ""}),
    (upward_arrows, {"problem": "from . import helper", "helper": "from . import api", "api": ""}),
    (
        upward_arrows,
        {"implementations.xla.a": "from ...implementations.cuda import b", "implementations.cuda.b": ""},
    ),
    (upward_arrows, {"implementations.xla.a": "from ... import dispatch", "dispatch": ""}),
    (imports_of_testing, {"api": "from .testing import oracle", "testing.oracle": "", "testing.__init__": ""}),
    (implementations_named, {"api": "from .implementations.xla import a", "implementations.xla.a": ""}),
    (private_jax, {"api": "from jax._src import core"}),
    (private_jax, {"api": "import jax\nx = jax._src.core"}),
]


@pytest.mark.parametrize(("check", "modules"), BROKEN)
def test_check_finds_what_it_looks_for(check, modules):
    assert check(modules)


def test_downward_arrows_are_allowed():
    modules = {
        "problem": "",
        "implementations.xla.a": "from ...problem import Problem",
        "dispatch": "from .implementations.xla import a",
        "api": "from . import dispatch, problem",
        "__init__": "from sparse_attn_jax.api import f",
        "flax.linen": "import sparse_attn_jax as sa",
        "testing.oracle": "from .. import api",
        "jax_compat": "from jax._src import core",
    }
    assert [check(modules) for check in CHECKS] == [[], [], [], []]
