"""Models whose best marginal likelihood is known, fitted with the defaults: ``python -m benchmarks.suite``."""
