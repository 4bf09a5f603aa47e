"""What tests of quantisation share: layers to quantise, checkpoints of other tools, comparisons."""
