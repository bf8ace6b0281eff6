"""The folders show the architecture: each imports only from lower floors, and only a few files know NumPyro."""

import ast
from graphlib import TopologicalSorter
from statistics import median

import pytest

from tests.architecture import DRAWING, FLOORS, KNOW_NUMPYRO, PACKAGE, arrows, drawing, files, floor, imports, room

#: Lines of a file, at most, and of half of the files.
LONGEST, TYPICAL = 400, 200
#: What no docstring of a function begins with.
NOT_VERBS = {
    *("A", "An", "The", "What", "Which", "Where", "Whether", "How", "When", "Why", "Of", "As", "To", "For", "In", "By"),
    *("With", "Without", "Inside", "Up", "All", "Every", "Each", "This", "These", "It", "See", "Likewise", "Also"),
}

pytestmark = pytest.mark.unit


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
    assert median(number for name, number in lines.items() if not name.endswith("__init__")) < TYPICAL


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
        assert "numpyro_ebipla" not in imports(path), name


def test_few_files_know_numpyro():
    knowing = {name for name, path in files().items() if any(i.split(".")[0] == "numpyro" for i in imports(path))}
    others = {name for name in knowing if name not in KNOW_NUMPYRO and room(name) not in KNOW_NUMPYRO}
    assert not others, f"{others} should not import NumPyro"
    needless = {name for name in KNOW_NUMPYRO if not any(known == name or room(known) == name for known in knowing)}
    assert not needless, f"{needless} do not import NumPyro"


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


def test_the_drawing_is_of_this_house():
    """``python -m tests.architecture`` draws it anew."""
    assert DRAWING.read_text() == drawing()


def test_no_any_stands_for_a_class_of_our_own():
    """A fit is a Fitted, and a method's self its class: what ``Any`` hides, no drawing of the imports can show."""
    for name, path in files().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                    hidden = arg.arg in ("fit", "self", "model", "system") and arg.annotation is not None
                    assert not hidden or ast.unparse(arg.annotation) != "Any", f"{name}: {node.name}({arg.arg}: Any)"


def test_no_private_attribute_of_another_object():
    """Neither ``fit._batch`` nor the like: what others need is public."""
    for name, path in files().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value)
                theirs = owner in ("self", "cls", "super()", "dist", "sys") or node.attr in (
                    *("_replace", "_asdict", "_make", "_fields", "_mask"),  # of NamedTuples, and of NumPyro's masks
                )
                assert theirs, f"{name}: {owner}.{node.attr}"


def test_functions_begin_with_a_verb():
    for name, path in files().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or not (said := ast.get_docstring(node)):
                continue
            if any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            first = said.split()[0].rstrip(":,.")
            assert first not in NOT_VERBS and first[0].isupper(), f"{name}: {node.name}: {said.splitlines()[0]}"
