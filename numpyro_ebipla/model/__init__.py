"""A NumPyro model as pure functions of parameters, latents and data."""
