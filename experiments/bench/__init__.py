"""Benchmarks: one module each, with `arguments(parser)` and `run(args) -> dict`.

`python -m experiments.bench NAME` runs the module of that name and prints its measurements as one
line of JSON; `--help` lists the names.
"""
