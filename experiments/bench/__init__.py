"""Benchmarks: one file each, with `arguments(parser)` and `run(args) -> dict`.

`python -m experiments.bench NAME` runs the file of that name and prints what it measured, as one
line of JSON; `--help` lists the names.
"""
