"""Plots of saved results."""
