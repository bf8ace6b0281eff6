"""The numbers of short fits are those of the commit named in ``same_numbers_as.txt``, bit for bit.

That is the last commit which changed numbers on purpose: one that does so names itself there, in the commit after it.
"""

import subprocess
from pathlib import Path

import pytest

from tests.same_numbers import CASES, ROOT, differences, numbers, record, record_commit

REFERENCE = (Path(__file__).parent / "same_numbers_as.txt").read_text().strip()


def known(commit: str) -> bool:
    """Whether the commit can be had: an archive without history has none."""
    found = subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True)
    return found.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not known(REFERENCE), reason=f"commit {REFERENCE} is not in this clone, so it cannot be run")
def test_numbers_are_those_of_the_reference(tmp_path):
    here, there = tmp_path / "here.npz", tmp_path / "there.npz"
    record(here, list(CASES))
    record_commit(REFERENCE, there, list(CASES))
    assert differences(here, there) == []


def test_a_fit_is_a_function_of_its_key():
    """Twice the same, bit for bit, in one process and with other programs between."""
    first, second = numbers("recipes.pgd"), numbers("recipes.pgd")
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
