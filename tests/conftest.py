"""Settings that must be in place before JAX starts, and memory given back between files."""

import gc
import os
from pathlib import Path

import pytest

from tests.quick import FLAGS

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

# SciPy's LAPACK, which JAX calls: its threads wait for each other, a hundred times as long as small matrices take.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("NPROC", "1")  # XLA's threads: the processes are parallel enough

# What one test has compiled serves all, in other processes (they inherit this) and in later runs too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".cache" / "jax")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

#: New objects between two collections of the youngest generation (Python's default is 700 to 2000). Tracing makes
#: many that live on, and to look through them again and again took a quarter of the time of warm tests.
_YOUNG = 50_000
gc.set_threshold(_YOUNG, 20, 50)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the cases of ``@pytest.mark.slow_but(…)`` as slow, but for those whose names contain one of the words."""
    for item in items:
        fast = item.get_closest_marker("slow_but")
        if fast and not any(word in item.callspec.id for word in fast.args):
            item.add_marker("slow")


def pytest_collection_finish():
    """Modules and tests stay to the end: no collection need look at them."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _one_level(request, monkeypatch_module):
    """Compile without optimisation what runs briefly; files with ``RUNS_LONG = True`` keep the code of tests/quick.py.

    That takes a quarter longer to compile, and half the time to run. Processes that a test starts inherit it: fits are
    equal bit for bit at one level only.
    """
    import jax

    briefly = not getattr(request.module, "RUNS_LONG", False)
    monkeypatch_module.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(briefly)))
    jax.config.update("jax_disable_most_optimizations", briefly)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def monkeypatch_module():
    """Undo changes at the end of the file."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of one file are of no use to the next; kept in memory, they come to gigabytes."""
    yield
    import jax

    from tests.models import fitter

    fitter.cache_clear()
    jax.clear_caches()
    gc.collect()
