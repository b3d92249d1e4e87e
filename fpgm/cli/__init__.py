"""`fpgm-train`: the only place that knows Hydra and processes."""
