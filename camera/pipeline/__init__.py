"""The loop over passes: cache, resume, memory estimate, report, publishing."""
