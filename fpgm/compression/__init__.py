"""Fewer products and fewer bytes for the filters that are left."""
