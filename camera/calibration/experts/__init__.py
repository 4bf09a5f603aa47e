"""What is noted of whole experts beside the statistics of a pass."""
