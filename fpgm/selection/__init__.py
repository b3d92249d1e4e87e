"""Scores to `keep`: rankings, budgets, rates, and the zeroing."""
