"""Zero-shot tasks by lm-eval."""
