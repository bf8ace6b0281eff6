"""Tables as terminals and notebooks show them."""

from collections.abc import Iterable, Sequence
from html import escape


def text_table(rows: Sequence[Sequence[str]], wide: int, notes: Iterable[str] = ()) -> str:
    """Return a table, the first column to the left and the others to the right, ``wide`` each, with notes below it.

    >>> print(text_table([["", "value"], ["a", "1"]], 7, ["a note"]))
       value
    a      1
    a note
    """
    first = max(len(name) for name, *_ in rows)
    return "\n".join([*(f"{name:{first}}" + "".join(f"{x:>{wide}}" for x in cells) for name, *cells in rows), *notes])


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """Return a table, the first column to the left and the others to the right, with notes below it.

    >>> html_table(["", "value"], [["a<b", "1"]]).count("<td"), "a&lt;b" in html_table(["", "value"], [["a<b", "1"]])
    (2, True)
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        sides = ["left"] + ["right"] * (len(cells) - 1)
        parts = (f'<{tag} style="text-align:{s}">{escape(c)}</{tag}>' for s, c in zip(sides, cells, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(line("td", row) for row in rows)
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>{below}"
