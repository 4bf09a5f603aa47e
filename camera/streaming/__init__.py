"""A model of which one layer is in memory: loading, batches, hidden states, logits."""
