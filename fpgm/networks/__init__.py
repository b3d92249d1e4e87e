"""A network: models by name, the layers that only a compact one has, the modes it is run in."""
