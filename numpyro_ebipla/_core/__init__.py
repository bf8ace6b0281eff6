"""What every part of the package builds on: errors, the state, trees of arrays, static values, checks of arguments."""
