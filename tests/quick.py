"""XLA's options for programs that are compiled once and run for seconds."""

from importlib.metadata import version

#: Without the new emitters of fused operations compilation takes half the time, in one module a tenth less. An option
#: that a release does not know ends the process, and releases from 0.11 on have no other emitters.
_OF_0_10 = ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
_KNOWN = _OF_0_10 if version("jaxlib").startswith("0.10.") else []
FLAGS = " ".join(["--xla_backend_optimization_level=1", "--xla_llvm_disable_expensive_passes=true", *_KNOWN])
