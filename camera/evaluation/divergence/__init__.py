"""A model compared with the dense one that it was made of."""
