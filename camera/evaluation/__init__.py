"""Measurements of a model: perplexity, zero-shot tasks, speed."""
