"""Settings that must be in place before JAX starts, and memory given back between files."""

import gc
import os
import shutil
import tempfile

import pytest

# The tests compile many small programs and run each briefly: a quick compilation beats quick code.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("NPROC", "1")  # XLA's threads: the processes are parallel enough

# Many tests fit the same model: what one has compiled serves all, in other processes too (they inherit this).
_OWN_CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _OWN_CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="numpyro_ebipla-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


def pytest_sessionfinish():
    """Remove the programs where they were made."""
    if _OWN_CACHE is not None:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of one file are of no use to the next; kept in memory, they come to gigabytes."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
