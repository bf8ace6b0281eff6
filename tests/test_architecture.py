"""The folders show the architecture: each imports only from lower floors, and only a few files know NumPyro."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

import numpyro_ebipla

pytestmark = pytest.mark.unit

PACKAGE = Path(numpyro_ebipla.__file__).parent

#: From the ground up. What is on one floor, a folder or a file, imports from the floors below it alone.
FLOORS = [
    {"_core"},
    {"kernels", "checkpoint"},
    {"smc", "optim"},
    {"walkers", "particles", "model"},
    {"likelihood"},
    {"training"},
    {"diagnostics", "system"},
    {"results", "plots"},
    {"newdata"},
    {"ebipla"},
    {"recipes"},
    {"__init__"},
]
#: What must know NumPyro; the rest is a library for plain JAX.
KNOW_NUMPYRO = {
    *("model", "optim/choose", "diagnostics/run"),
    *("results/at_draws", "results/visiting", "results/summary"),
}
#: Lines of a file, at most, and of half of the files.
LONGEST, TYPICAL = 445, 215


def files() -> dict[str, Path]:
    """``{"folder/file": path}`` of the package."""
    return {str(path.relative_to(PACKAGE).with_suffix("")): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(name: str) -> str:
    """The folder of a file, or the file itself at the top."""
    return name.partition("/")[0]


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room(name) in rooms)


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, inside functions too; not what only type checkers see."""
    names = set()
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def inner(path: Path) -> set[str]:
    """The files of this package among what a file imports."""
    own = files()
    found = set()
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == PACKAGE.name:
            inside = rest.replace(".", "/")
            found |= {inside} & set(own)
            found |= {f"{inside}/__init__"} & set(own)
    return found


def arrows() -> Iterator[tuple[str, str]]:
    """``(file, imported file)``, without the index of a folder that only stands in the path of another file."""
    for name, path in files().items():
        found = inner(path)
        for other in found:
            index = other.endswith("/__init__")
            if index and any(room(x) == room(other) and x != other for x in found):
                continue
            yield name, other


def test_every_room_has_its_floor():
    rooms = [name for rooms in FLOORS for name in rooms]
    assert sorted({room(name) for name in files()}) == sorted(rooms)


def test_the_house_is_small():
    top = [path for path in PACKAGE.iterdir() if path.suffix == ".py" and path.stem != "__init__"]
    folders = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    assert len(top) <= 12 and len(folders) <= 12 and len(FLOORS) <= 12
    assert all(path.parent in (PACKAGE, *folders) for path in files().values())
    lines = {name: len(path.read_text().splitlines()) for name, path in files().items()}
    assert max(lines.values()) <= LONGEST, {name: number for name, number in lines.items() if number > LONGEST}
    assert median(number for name, number in lines.items() if not name.endswith("__init__")) <= TYPICAL


def test_imports_go_downward_only():
    for name, imported in arrows():
        if room(imported) != room(name):
            assert floor(imported) < floor(name), f"{name} imports {imported}"


def test_no_circle_inside_a_folder():
    graph: dict[str, set[str]] = {}
    for name, imported in arrows():
        if room(imported) == room(name):
            graph.setdefault(name, set()).add(imported)
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_nothing_imports_the_package_itself():
    for name, path in files().items():
        found = imports(path)
        bare = "numpyro_ebipla" in found
        assert not bare or any(n.startswith("numpyro_ebipla.") and inner(path) for n in found), name


def test_few_files_know_numpyro():
    knowing = {name for name, path in files().items() if any(i.split(".")[0] == "numpyro" for i in imports(path))}
    others = {name for name in knowing if name not in KNOW_NUMPYRO and room(name) not in KNOW_NUMPYRO}
    assert not others, f"{others} should not import NumPyro"


def test_optional_libraries_are_not_imported_at_the_top():
    optional = {"flax", "equinox", "arviz", "arviz_base", "xarray", "matplotlib", "sklearn"}
    for name, path in files().items():
        top = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                top |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                top.add(node.module.split(".")[0])
        assert not top & optional, f"{name} imports {top & optional}"
