"""Conditions side by side: quantized rivals of a compressed checkpoint."""
