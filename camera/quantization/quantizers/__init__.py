"""How weights become codes: rounding grids and the quantisers that choose among their values."""
