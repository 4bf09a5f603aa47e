"""All experts of a group at once, as an accelerator computes them: a launch costs what rows do."""
