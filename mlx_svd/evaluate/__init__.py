"""What a model does: likelihood, distance from the dense model, facts, text, speed."""
