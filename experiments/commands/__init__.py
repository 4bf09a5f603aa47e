"""The console script `camera` and its commands, one a file where no other room has it."""
