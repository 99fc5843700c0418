"""Texts that a model writes: one, or many with their quality."""
