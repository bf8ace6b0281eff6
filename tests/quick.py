"""XLA's options for programs that are compiled once and run for seconds."""

from importlib.metadata import version

#: Without the new emitters of fused operations compilation takes half the time. An option that a release does not know
#: ends the process, and releases from 0.11 on have no other emitters.
_EMITTERS = ["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []
FLAGS = " ".join(["--xla_backend_optimization_level=1", "--xla_llvm_disable_expensive_passes=true", *_EMITTERS])
