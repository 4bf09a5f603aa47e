"""`python -m experiments.tables DIR`."""

import sys

from experiments.tables.writing import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
