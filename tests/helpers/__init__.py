"""What tests share: tiny models, oracles, golden vectors; `runs` for those of experiments."""
