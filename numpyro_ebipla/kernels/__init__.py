"""Langevin transition kernels over many independent chains, in plain JAX."""
