"""Log likelihoods, and what else a population annealed to each posterior tells."""
