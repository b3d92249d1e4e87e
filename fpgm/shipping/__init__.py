"""To a runtime: folding, export, latency, tuning."""
