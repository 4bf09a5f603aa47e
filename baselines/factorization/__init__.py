"""A shared base and low-rank deltas."""
