"""What the model computes on real text: the statistics that a good compression is fitted to."""
