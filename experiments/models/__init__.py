"""Models made from others."""
