"""The walls of the house: no private name crosses a module, only lora knows PEFT, and modules stay short."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 500  # lines of a module
EXTENSION = "_C"  # pkt._C, the compiled part, is a module, not a private name

Sources = Mapping[str, str]  # module, as it is imported -> its text


def sources() -> dict[str, str]:
    found = {}
    for root, package in ((ROOT, "pkt"), (ROOT / "kernels", "pkt_kernels")):
        for file in (root / package).rglob("*.py"):
            parts = file.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = file.read_text(encoding="utf-8")
    return found


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != EXTENSION


def defined(tree: ast.Module) -> set[str]:
    """Private names that a module gives to its functions, classes, constants and attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and on_itself(node):
            found.add(node.attr)
    return {name for name in found if private(name)}


def on_itself(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def crossings(given: Sources) -> Iterator[str]:
    """Each use of a name that is private to another module: imported, taken from the module, or from an object of its."""
    trees = {name: ast.parse(text) for name, text in given.items()}
    owners: dict[str, set[str]] = defaultdict(set)
    for module, tree in trees.items():
        for name in defined(tree):
            owners[name].add(module)
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("pkt", "pkt_kernels"):
                for alias in node.names:
                    if private(alias.name):
                        yield f"{module}:{node.lineno}: {alias.name} of {node.module}"
            # An object of torch's or PEFT's has privates too, but none that only our modules define.
            elif isinstance(node, ast.Attribute) and private(node.attr) and not on_itself(node):
                others = owners[node.attr] - {module}
                if others and module not in owners[node.attr]:
                    yield f"{module}:{node.lineno}: {ast.unparse(node)}, a name of {', '.join(sorted(others))}"


def test_no_private_name_crosses_a_module() -> None:
    assert list(crossings(sources())) == []


def test_a_crossing_is_found() -> None:
    home = "_TABLE = {}\ndef _f(): ...\nclass A:\n    def __init__(self): self._kept = 0\n    def _m(self): ..."
    for text, line in (
        ("from pkt.home import _f", "_f of pkt.home"),
        ("from pkt import home\nhome._f()", "home._f, a name of pkt.home"),
        ("import pkt.home\npkt.home._TABLE[0] = 1", "pkt.home._TABLE, a name of pkt.home"),
        ("def use(a): return a._kept", "a._kept, a name of pkt.home"),
        ("def use(a): a._kept = 1", "a._kept, a name of pkt.home"),
        ("def use(a): return a.b()._m()", "a.b()._m, a name of pkt.home"),
    ):
        (found,) = crossings({"pkt.home": home, "pkt.guest": text})
        assert found.endswith(line)
        assert found.startswith("pkt.guest:")
    for fine in (
        "from pkt.home import A\nclass B(A):\n    def _own(self): return self._kept",
        "from pkt import _C",
        "def use(module): return module._parameters",
        "class C:\n    def _m(self, other): return other._m(self)",
    ):
        assert list(crossings({"pkt.home": home, "pkt.guest": fine})) == []


def test_only_lora_imports_peft() -> None:
    found = {module for module, text in sources().items() if "peft" in imported(text)}
    assert found
    assert {module for module in found if not module.startswith("pkt.lora.")} == set()


def imported(text: str) -> set[str]:
    """The packages that a module's imports name, those inside functions too."""
    nodes = list(ast.walk(ast.parse(text)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    from_ = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in plain | from_}


def test_rows_are_added_in_one_order() -> None:
    """On a GPU `index_add_` adds by atomics, in another order every time; `ops.add_rows_` does not."""
    assert [m for m, text in sources().items() if ".index_add_(" in text and m != "pkt.ops.reference"] == []


def test_every_package_and_module_has_its_floor() -> None:
    tomllib = pytest.importorskip("tomllib")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    floors = {c["containers"][0]: c["layers"] for c in contracts if c["type"] == "layers"}
    children: dict[str, set[str]] = defaultdict(set)
    for module in sources():
        if module.startswith("pkt."):
            package, _, name = module.rpartition(".")
            children[package].add(name)
    assert len(floors["pkt"]) <= 13  # __main__ stands above the command line
    for package, names in children.items():
        if len(names) > 1:
            listed = {name.strip() for floor in floors[package] for name in floor.split("|")}
            assert listed == names, package


def test_modules_fit_in_mind() -> None:
    long = {name: text.count("\n") for name, text in sources().items() if text.count("\n") > LONGEST}
    assert long == {}


def test_files_of_tests_have_names_of_their_own() -> None:
    """Tests lie in folders without packages, so that one file's name would hide another's."""
    names = [file.name for file in (ROOT / "tests").rglob("*.py")]
    assert sorted(names) == sorted(set(names))
