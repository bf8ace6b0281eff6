"""Ways to keep posterior particles."""
