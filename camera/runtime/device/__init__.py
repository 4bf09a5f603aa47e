"""The device of a run: what it can do, what was held on it."""
