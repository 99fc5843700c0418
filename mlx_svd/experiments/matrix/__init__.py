"""Experiments: a matrix of conditions x seeds, one record each, and a table with tests."""
