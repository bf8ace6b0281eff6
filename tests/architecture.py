"""The house as its imports have it: floors, rooms, arrows, and the drawing in the docs.

python -m tests.architecture        draws docs/_static/architecture.svg anew
"""

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "numpyro_ebipla"
DRAWING = ROOT / "docs" / "_static" / "architecture.svg"

#: From the ground up. What is on one floor, a folder or a file, imports from the floors below it alone.
FLOORS = [
    ["_core"],
    ["kernels", "checkpoint"],
    ["smc", "optim"],
    ["walkers", "particles", "model"],
    ["likelihood"],
    ["training"],
    ["diagnostics", "system"],
    ["results", "image_plots"],
    ["newdata", "history_plots"],
    ["ebipla", "plots"],
    ["recipes"],
    ["__init__"],
]
#: What must know NumPyro; what stands below it is a library for plain JAX.
KNOW_NUMPYRO = {
    *("model", "likelihood/bidirectional", "optim/choose", "diagnostics/run"),
    *("results/at_draws", "results/visiting", "results/summary"),
}
#: A few words on each room.
SAID = {
    "_core": "errors, the state, trees, checks of arguments",
    "kernels": "Langevin moves of many chains",
    "checkpoint": "files, and which to resume",
    "smc": "annealing, weights, log Z",
    "optim": "the move of the parameters",
    "walkers": "prior walkers",
    "particles": "posterior particles",
    "model": "a NumPyro model as functions",
    "likelihood": "log p(y), populations at posteriors",
    "training": "the step, its safeguards, the loop, the draws, the record of a run",
    "diagnostics": "is a fit to be trusted?",
    "system": "a model, compiled",
    "results": "the fit: ArviZ, summary",
    "newdata": "infer, log_likelihood, …",
    "image_plots": "grids of images",
    "history_plots": "what a run went through",
    "plots": "pictures",
    "ebipla": "EBIPLA: init, update, run",
    "recipes": "the systems of the papers",
    "__init__": "the public names",
}


def files() -> dict[str, Path]:
    """Return ``{"folder/file": path}`` of the package."""
    return {str(path.relative_to(PACKAGE).with_suffix("")): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(name: str) -> str:
    """Return the folder of a file, or the file itself at the top."""
    return name.partition("/")[0]


def floor(name: str) -> int:
    """Return the floor of a file, from zero."""
    return next(i for i, rooms in enumerate(FLOORS) if room(name) in rooms)


def imports(path: Path) -> set[str]:
    """Return full names of all that a file imports, inside functions too; not what only type checkers see."""
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
    """Return the files of this package among what a file imports."""
    own, found = set(files()), set()
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == PACKAGE.name:
            inside = rest.replace(".", "/")
            found |= {inside, f"{inside}/__init__"} & own
    return found


def arrows() -> Iterator[tuple[str, str]]:
    """Yield ``(file, imported file)``, without the index of a folder that only leads to another file."""
    for name, path in files().items():
        found = inner(path)
        for other in found:
            leads_on = other.endswith("/__init__") and any(room(x) == room(other) and x != other for x in found)
            if not leads_on:
                yield name, other


def uses() -> dict[str, list[str]]:
    """Return the rooms that each room imports from, from the ground up."""
    order = [name for rooms in FLOORS for name in rooms]
    found: dict[str, set[str]] = {name: set() for name in order}
    for name, imported in arrows():
        if room(imported) != room(name):
            found[room(name)].add(room(imported))
    return {name: [other for other in order if other in found[name]] for name in order}


def drawing() -> str:
    """Return the house as SVG: a floor a row, the roof on top, and under each room the rooms that it uses."""
    width, height, gap, margin = 960, 58, 8, 12
    total = len(FLOORS) * (height + gap) + 2 * margin
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" role="img" font-family="sans-serif">',
        "<title>The folders of numpyro_ebipla, floor by floor</title>",
        f'<rect width="{width}" height="{total}" fill="#ffffff"/>',
    ]
    used = uses()
    for i, rooms in enumerate(FLOORS):
        y = total - margin - (i + 1) * (height + gap) + gap
        parts.append(f'<text x="{margin}" y="{y + 34}" font-size="15" fill="#777777">{i + 1}</text>')
        size = (width - 50 - gap * len(rooms)) / len(rooms)
        for j, name in enumerate(rooms):
            x = 40 + j * (size + gap)
            numpyro = any(room(known) == name for known in KNOW_NUMPYRO)
            colour = "#e3edf7" if numpyro else "#f2f2ec"
            lines = [(16, 14, "#1f3b57", "bold", name), (33, 12, "#333333", "normal", SAID[name])]
            lines.append((49, 10, "#777777", "normal", "uses " + " ".join(used[name]) if used[name] else ""))
            parts.append(
                f'<rect x="{x:.0f}" y="{y}" width="{size:.0f}" height="{height}" rx="5" fill="{colour}" '
                'stroke="#9fb3c8"/>'
            )
            for down, points, fill, weight, text in lines:
                parts.append(
                    f'<text x="{x + 9:.0f}" y="{y + down}" font-size="{points}" fill="{fill}" '
                    f'font-weight="{weight}">{escape(text)}</text>'
                )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    DRAWING.write_text(drawing())
