"""Pure linear algebra: numpy in, numpy out. No model, no files, no MLX."""
