"""Rows and a model -> batches to run, and scores of their records."""
