"""The program of the front page and of the README runs as it is written, but for the number of steps."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def program(page):
    return re.search(r"```python\n(import.*?)```", (ROOT / page).read_text(), re.DOTALL)[1]


@pytest.mark.unit
def test_both_pages_have_the_same_program():
    assert program("README.md") == program("docs/index.md")
    lines = [line for line in program("README.md").splitlines() if line.strip()]
    assert len(lines) <= 25 and max(map(len, lines)) <= 110


def test_it_runs_when_pasted(capsys):
    code = program("README.md")
    short = code.replace("batch_size=500)", "batch_size=500, num_steps=3, num_samples=4, warmup=2, progress_bar=False)")
    assert short != code
    exec(compile(short, "README.md", "exec"), {"__name__": "__main__"})
    assert "Fit(3 steps" in capsys.readouterr().out
