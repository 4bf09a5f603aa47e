"""Studies: what a set of runs asks. A preset's grid is one, and so is a setting that was varied."""

from __future__ import annotations

PRUNING, QUANTISING = "main", "quantization"
# In the order of their tables.
TITLES = {
    PRUNING: "Pruning",
    QUANTISING: "Quantisation",
    "matching": "Ablation: matched bit widths",
    "alpha": "Ablation: α",
    "scope": "Ablation: scope of the ranking",
    "calibration_size": "Ablation: calibration size",
    "calibration_source": "Ablation: calibration text",
    "plus": "Ablation: parts of Camera-Plus",
    "serving": "Forms that engines read",
    "speed": "Speed",
    "energy": "Energies of micro-experts",
}
FORMS = {"serving", "speed"}  # what was pruned and what was quantised, in one table
GRIDS = {"pruning": PRUNING}  # a grid of the presets that is another one's study, only larger
VARIED = {  # the study that varies a setting
    "method.alpha": "alpha",
    "method.split": "matching",
    "method.rank_scope": "scope",
    "calibration.samples": "calibration_size",
    "calibration.length": "calibration_size",
    "calibration.source": "calibration_source",
}


def study_of_grid(grid: str) -> str:
    """The study that a grid of a preset, or a preset without grids, belongs to."""
    return GRIDS.get(grid, grid)


def study_of_settings(keys: set[str]) -> str:
    """The study of runs that differ from the usual in these settings, one or more."""
    return "+".join(sorted({VARIED.get(key, key.removeprefix("method.")) for key in keys}))


def study_title(study: str) -> str:
    """Its name above a table; of a user's own preset, or a setting without a study, its own."""
    if study in TITLES:
        return TITLES[study]
    parts = [TITLES.get(part, part).removeprefix("Ablation: ") for part in study.split("+")]
    return f"Ablation: {' and '.join(parts)}" if len(parts) > 1 else study


def study_order(study: str) -> tuple[int, str]:
    """A key that sorts studies as their tables stand on a page."""
    known = list(TITLES)
    return known.index(study) if study in known else len(known), study
