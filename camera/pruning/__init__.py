"""Which micro-experts or experts stay, and their removal."""
