"""The figures of one run, in its folder, from the files there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.figures.drawing import drawn
from experiments.figures.over_layers.energies import draw_energies, draw_energy_shares, size_of
from experiments.figures.over_layers.experts import draw_bits, draw_expert_energies, draw_widths
from experiments.figures.over_layers.kinds import draw_energy_of_kinds, draw_kept
from experiments.figures.words import run_words
from experiments.records.energy_summary import read_energies
from experiments.records.files import COMPRESSION, RunFiles, is_json, read_json


def draw_run(folder: Path) -> list[Path]:
    """Draw the widths, bits and energies that the run recorded; the PNGs, other kinds beside them.

    A figure that can't be drawn is logged, and the rest goes on.
    """
    files = RunFiles(folder)
    asked = read_json(files.settings) if is_json(files.settings) else None
    return [*_energies(files, asked), *_compressed(files, asked)]


def _energies(files: RunFiles, asked: dict[str, Any] | None) -> list[Path]:
    kept = read_energies(files.folder)
    if kept is None:
        return []
    words = run_words(asked, kept.alpha) if asked else ""
    sizes = {layer: size_of(histogram) for layer, histogram in kept.histograms.items()}
    return [
        *drawn(draw_energies, kept.histograms, words, file=files.figure("energies")),
        *drawn(
            draw_energy_shares,
            kept.percents,
            kept.top,
            sizes,
            words,
            file=files.figure("energy_shares"),
        ),
        *drawn(draw_expert_energies, kept.experts, words, file=files.figure("expert_energies")),
        *drawn(draw_energy_of_kinds, kept.experts, words, file=files.figure("layer_energies")),
    ]


def _compressed(files: RunFiles, asked: dict[str, Any] | None) -> list[Path]:
    compressed = files.read_part(COMPRESSION) or {}
    words = run_words(asked) if asked else ""
    widths, full = compressed.get("widths", {}), compressed.get("full_widths", {})
    found = []
    if any(width < full[path] for path, kept in widths.items() for width in kept):
        found += drawn(draw_widths, widths, full, words, file=files.figure("widths"))
        found += drawn(draw_kept, widths, full, words, file=files.figure("kept_widths"))
    layers = compressed.get("layers", {}).values()
    bits = {path: mean for layer in layers for path, mean in layer.get("mean_bits", {}).items()}
    if bits:
        found += drawn(draw_bits, bits, words, file=files.figure("bits"))
    return found
