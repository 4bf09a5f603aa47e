"""Many runs: grids, plans, jobs, their state."""
