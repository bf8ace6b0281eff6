"""Each module imports only what stands above it here, and only a few of them know NumPyro."""

import ast
from pathlib import Path

import numpyro_ebipla

PACKAGE = Path(numpyro_ebipla.__file__).parent

#: From the bottom of the package up: a module may import those before it, never itself or those after it.
ORDER = [
    "_errors",
    "_options",
    "_types",
    "_tree",
    "_static",
    "proposals",
    "kernels",
    "weights",
    "anneal",
    "walkers",
    "tempering",
    "restarted",
    "minibatch",
    "optim",
    "particles",
    "outliers",
    "weighted",
    "energy",
    "_tracing",
    "missing",
    "model",
    "layout",
    "inspection",
    "marginal",
    "likelihood",
    "bounds",
    "reconstruction",
    "contrast",
    "step",
    "start",
    "checks",
    "checkpoint",
    "store",
    "settled",
    "loop",
    "collect",
    "verdicts",
    "fresh",
    "optimality",
    "diagnostics",
    "_sites",
    "_arviz",
    "summary",
    "result",
    "newdata",
    "ebipla",
    "recipes",
    "plots",
    "__init__",
]

#: Modules that must know NumPyro; the others are a library for plain JAX.
KNOW_NUMPYRO = {
    *("optim", "energy", "_tracing", "missing", "model", "layout", "inspection"),
    *("fresh", "diagnostics", "_sites", "_arviz", "summary"),
}


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> dict[str, set[str]]:
    return {path.stem: imports(path) for path in PACKAGE.glob("*.py")}


def inner(names: set[str]) -> set[str]:
    """Modules of this package among imported names."""
    parts = [name.split(".") for name in names]
    return {p[1] for p in parts if p[0] == "numpyro_ebipla" and len(p) > 1 and p[1] in ORDER}


def test_every_module_has_its_place():
    assert set(modules()) == set(ORDER)


def test_imports_go_downward_only():
    for name, names in modules().items():
        for imported in inner(names):
            assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"


def test_nothing_imports_the_package_itself():
    for name, names in modules().items():
        bare = [n for n in names if n == "numpyro_ebipla"]
        allowed = all(
            f"numpyro_ebipla.{m}" in names for m in inner(names)
        )  # `from numpyro_ebipla import collect` names a module
        assert not bare or (inner(names) and allowed), f"{name} imports the whole package"


def test_few_modules_know_numpyro():
    knowing = {n for n, names in modules().items() if any(i.split(".")[0] == "numpyro" for i in names)}
    assert knowing <= KNOW_NUMPYRO, f"{knowing - KNOW_NUMPYRO} should not import NumPyro"


def test_optional_libraries_are_not_imported_at_the_top():
    optional = {"flax", "equinox", "arviz", "arviz_base", "xarray", "matplotlib", "sklearn"}
    for path in PACKAGE.glob("*.py"):
        top = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                top |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                top.add(node.module.split(".")[0])
        assert not top & optional, f"{path.name} imports {top & optional}"
