"""A page about an output folder's runs: `python -m experiments.report DIR`."""

from experiments.report.writing import to_page, write_report

__all__ = ["to_page", "write_report"]
