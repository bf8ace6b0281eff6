"""What a run returns: the fit, its groups for ArviZ, its summary."""
