"""Figures of runs are blank here, but where they are what is tested."""

from tests.helpers.runs.blank_figures import blank_figures, drawn

__all__ = ["blank_figures", "drawn"]
