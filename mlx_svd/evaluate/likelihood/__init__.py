"""Log-likelihoods and greedy texts of a model, in batches that share what they can."""
