"""A training loop of one's own: the methods of fpgm-train, called from outside."""
