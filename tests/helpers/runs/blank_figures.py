"""Figures whose files are blank pages: drawing and writing them takes four fifths of a tiny run.

What is drawn, and of which numbers, stays as it is; `pytestmark = pytest.mark.drawn` has a module's
figures drawn for real, the fixture `drawn` a test's.
"""

import base64
from pathlib import Path

import pytest
from matplotlib.figure import Figure

REAL = {name: getattr(Figure, name) for name in ("savefig", "draw_without_rendering")}
BLANK = {
    "png": base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mP4DwABAQEAHLCMmQAAAABJRU5ErkJggg=="
    ),
    "pdf": b"%PDF-1.4\n%%EOF\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><style type="text/css"></style></svg>\n',
}


def save_blank(figure: Figure, target, *, format: str, metadata: dict) -> None:
    """What `Figure.savefig` is called with here: a file's path, or a stream for an SVG."""
    if isinstance(target, Path):
        target.write_bytes(BLANK[format])
    else:
        target.write(BLANK[format].decode())


@pytest.fixture(scope="module", autouse=True)
def blank_figures(request):
    """Figures of this module are blank, unless it is marked as `drawn`."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("drawn") is None:
            patch.setattr(Figure, "savefig", save_blank)
            patch.setattr(Figure, "draw_without_rendering", lambda _: None)
        yield


@pytest.fixture
def drawn(monkeypatch) -> None:
    """The figures of this test are drawn for real."""
    for name, real in REAL.items():
        monkeypatch.setattr(Figure, name, real)
