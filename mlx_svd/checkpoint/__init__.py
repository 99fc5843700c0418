"""The checkpoint format: what tensors a plan stores, written atomically, loaded, described."""
