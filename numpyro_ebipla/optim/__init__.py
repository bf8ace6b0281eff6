"""The move of the parameters: what optax lacks, and the default."""
