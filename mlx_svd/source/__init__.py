"""A Hugging Face model, on the hub or in a folder, as lazy tensors under mlx-lm's names."""
