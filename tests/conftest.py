"""Settings that must be in place before JAX starts, and memory given back between files."""

import gc
import os

import pytest

# The tests compile many small programs and run each briefly: a quick compilation beats quick code.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of one file are of no use to the next; kept, they come to gigabytes."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
