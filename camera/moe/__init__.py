"""MoE layers: families, router, experts, pool, budget; one pass through it."""
