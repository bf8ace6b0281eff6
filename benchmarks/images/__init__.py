"""The papers' image experiments: energy priors under convolutional generators, beside LEBM, a VAE and a plain prior."""
