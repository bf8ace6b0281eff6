"""Sequential Monte Carlo from a base density to a tilted one, in plain JAX."""
