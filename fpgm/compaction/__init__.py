"""A network and `keep` to a smaller network that computes the same function."""
