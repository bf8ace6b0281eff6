"""What every experiment returns, and how it is printed and kept."""

import json
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results"


class Report(NamedTuple):
    """The outcome of an experiment.

    Attributes:
        title: what was run, with its paper.
        rows: cells under ``header``; numbers are formatted, text is kept.
        data: anything JSON can hold, for the record: curves, settings, seconds.
        figure: a Matplotlib figure, or None.
        notes: what the reader must know to read the table.
        header: of the columns.
    """

    title: str
    rows: list[tuple]
    data: dict[str, Any]
    figure: Any = None
    notes: tuple[str, ...] = ()
    header: tuple[str, ...] = ("", "ours", "published / closed form", "settings")


def table(report: Report) -> str:
    """The rows in Markdown."""
    rows = [report.header, ("---",) * len(report.header), *report.rows]
    return "\n".join("| " + " | ".join(_text(cell) for cell in row) + " |" for row in rows)


def keep(report: Report, stem: Path, mode: str, seconds: float) -> None:
    """Print the report and write ``STEM.json``, ``.md`` and ``.png``; ``mode`` says at what size it ran."""
    text = f"## {report.title}\n\n{table(report)}\n\n" + "".join(f"- {note}\n" for note in report.notes)
    text += f"\nSettings: {mode}; {seconds:.0f} s.\n"
    print(text)
    stem.parent.mkdir(parents=True, exist_ok=True)
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
