"""What tests share: tiny models, oracles, golden vectors, run folders."""
