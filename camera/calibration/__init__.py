"""Which text, which tokens, which statistics, which scores."""
