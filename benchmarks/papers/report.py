"""What every experiment returns, and how it is printed and kept."""

import json
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent.parent / "results"


class Report(NamedTuple):
    """The outcome of an experiment.

    Attributes:
        title: what was run, with its paper.
        rows: ``[(what, ours, published or closed form, settings)]``; numbers are formatted, text is kept.
        data: anything JSON can hold, for the record: curves, settings, seconds.
        figure: a Matplotlib figure, or None.
        notes: what the reader must know to read the table.
    """

    title: str
    rows: list[tuple[str, Any, Any, str]]
    data: dict[str, Any]
    figure: Any = None
    notes: tuple[str, ...] = ()


def table(report: Report) -> str:
    """The rows in Markdown."""
    lines = ["| | ours | published / closed form | settings |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in report.rows]
    return "\n".join(lines)


def keep(report: Report, name: str, full: bool, seconds: float) -> None:
    """Print the report and write ``benchmarks/results/NAME[_full].json``, ``.md`` and ``.png``."""
    mode = "full" if full else "reduced"
    text = f"## {report.title}\n\n{table(report)}\n\n" + "".join(f"- {note}\n" for note in report.notes)
    text += f"\nSettings: {mode}; {seconds:.0f} s.\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / (f"{name}_full" if full else name)
    stem.with_suffix(".md").write_text(text)
    record = {"title": report.title, "mode": mode, "seconds": seconds, "rows": report.rows, **report.data}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1, default=_plain) + "\n")
    if report.figure is not None:
        report.figure.savefig(stem.with_suffix(".png"), dpi=100)
    print(f"kept: {stem}.*")


def _text(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
