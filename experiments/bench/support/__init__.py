"""What benchmarks share: layers, architectures, costs, timing."""
