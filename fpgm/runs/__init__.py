"""Run directories: files that are whole or not there, checkpoints, grids."""
