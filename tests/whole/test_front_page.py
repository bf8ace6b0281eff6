"""The program of the front page and of the README runs as it is written, but for the number of steps."""

import os
import re
import subprocess
import sys
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


def shortened():
    code = program("README.md")
    short = code.replace("batch_size=500)", "batch_size=500, num_steps=3, num_samples=4, warmup=2, progress_bar=False)")
    assert short != code
    return short


def test_it_runs_when_pasted_with_the_wheel_alone(tmp_path):
    """A wheel is built, unpacked elsewhere, and found before the sources, of which nothing else is in reach."""
    run = lambda *args, **more: subprocess.run([sys.executable, *args], check=True, text=True, cwd=tmp_path, **more)
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", ROOT, "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    run(*pip, "install", wheel, "--no-deps", "--target", tmp_path / "site")
    (metadata,) = (tmp_path / "site").glob("*.dist-info/METADATA")
    needed = re.findall(r"^Requires-Dist: ([a-z]+)[^;\n]*$", metadata.read_text(), re.MULTILINE)
    assert sorted(needed) == ["jax", "numpy", "numpyro", "optax", "scipy", "tqdm"]
    where = "import numpyro_ebipla; print(numpyro_ebipla.__file__)\n"
    out = run("-c", where + shortened(), env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, capture_output=True)
    assert out.stdout.startswith(str(tmp_path / "site")) and "Fit(3 steps" in out.stdout
