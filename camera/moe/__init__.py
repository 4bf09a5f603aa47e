"""What an MoE layer is: families, router, experts, pool, budget; one pass through it."""
