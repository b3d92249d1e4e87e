"""Figures of scores and of weights, as arrays and as tidy rows; nothing here knows of networks."""
