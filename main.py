"""Compress a Mixture-of-Experts model, measure it, log it, put it in a table.

    python main.py method=camera_p sparsity=0.2            one run
    python main.py -m method=camera_p sparsity=0.2,0.4,0.6 a sweep, ending in a table
    python main.py experiment=main                         a preset
    python main.py --help                                  the groups and their choices

`conf/` is the table of contents. Everything is written below `output` (default: outputs).
"""

from experiments.__main__ import command

if __name__ == "__main__":
    command()
