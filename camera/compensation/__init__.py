"""Least-squares refit of output weights."""
