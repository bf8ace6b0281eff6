"""Ways to keep prior walkers, which estimate the gradient of an energy prior's log normaliser."""
