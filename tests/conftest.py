"""Settings that must be in place before JAX starts."""

import os

# The tests compile many small programs and run each briefly: a quick compilation beats quick code.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()
