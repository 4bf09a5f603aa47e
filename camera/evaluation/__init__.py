"""What a model is measured by: perplexity, zero-shot tasks, speed."""
