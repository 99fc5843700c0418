"""Model definitions that travel with checkpoints: each file here is copied as it is."""
