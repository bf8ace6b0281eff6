"""The papers' experiments: ``python -m benchmarks.papers NAME [--full]``."""
