"""Checkpoints of a run: the files, and which of them a run goes on from."""
