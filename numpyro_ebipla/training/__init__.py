"""One training step, the loop around it, and the draws that follow."""
