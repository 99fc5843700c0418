"""What a model does: text, perplexity, speed."""
