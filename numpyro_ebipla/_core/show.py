"""Tables as notebooks show them."""

from collections.abc import Iterable, Sequence
from html import escape


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, the first column to the left and the others to the right.

    >>> html_table(["", "value"], [["a<b", "1"]]).count("<td"), "a&lt;b" in html_table(["", "value"], [["a<b", "1"]])
    (2, True)
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        sides = ["left"] + ["right"] * (len(cells) - 1)
        parts = (f'<{tag} style="text-align:{s}">{escape(c)}</{tag}>' for s, c in zip(sides, cells, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>"
