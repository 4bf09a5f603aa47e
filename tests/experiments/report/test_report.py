"""The report: what it says, that no data becomes markup, and how it works in a browser."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
from matplotlib import colormaps, image

from experiments.report.__main__ import main
from experiments.report.runs import embedded
from tests.helpers.runs import browser
from tests.helpers.runs.run_folders import add

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """All start tags with their attributes, and all text outside of scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self._within = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._within = tag

    def handle_endtag(self, tag):
        self._within = ""

    def handle_data(self, data):
        if self._within not in ("script", "style"):
            self.text += data


def fill(output):
    """Dense, two methods at two ratios, two seeds of one of them, a failure, one unfinished."""
    dense = add(output, "dense", "dense", tasks={"boolq": 60.0})
    change(dense, bytes={"dense": 2_000_000, "compressed": 2_000_000})
    for sparsity in (0.2, 0.4):
        for seed in (1, 2):
            scores = {"boolq": 58.0 - 10 * sparsity + seed}
            add(output, f"p{sparsity}{seed}", "camera_p", sparsity, seed=seed, tasks=scores)
        add(output, f"n{sparsity}", "naee", sparsity, tasks={"boolq": 9.5 + sparsity})
    add(output, "failed", "camera_p", 0.6, error=f"sparsity=0.6 {HOSTILE}")
    add(output, "left", "camera_p", 0.7, done=False)
    image.imsave(output / "runs" / "n0.2" / "widths.png", np.zeros((4, 6, 3)))
    told = {"versions": {"torch": "9.8.7"}, "environment": {"cpus": 2, "finished": "today"}}
    change(output / "runs" / "n0.2", **told)


def change(folder, **values):
    file = folder / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    output = tmp_path_factory.mktemp("all runs") / HOSTILE.replace("/", "")
    output.mkdir()
    fill(output)
    assert main([str(output)]) == 0
    return output / "report.html"


@pytest.fixture(scope="module")
def page(report):
    return Page(report.read_text())


def test_it_has_tables_figures_settings_failures_environment_and_cost(page, report):
    for part in (
        "naee",
        "sparsity=0.6",
        "unfinished",
        "torch",
        "9.8.7",
        "Peak GB",
        "method.sparsity",
    ):
        assert part in page.text
    images = [tag for tag in page.tags if tag[0] == "img"]
    figures = list((report.parent / "figures").glob("*.png"))
    assert figures and len(images) == len(figures) + 1
    assert "7 of 9 runs done" in re.sub(r"\s+", " ", page.text)
    assert "14.0 minutes" in re.sub(r"\s+", " ", page.text)


def test_the_best_of_each_ratio_is_named_with_what_the_dense_model_has(page):
    text = re.sub(r"\s+", " ", page.text)
    assert "20 % camera_p average 57.5, dense 60.0, 75 % of the bytes" in text
    assert "40 % camera_p average 55.5, dense 60.0, 75 % of the bytes" in text


def test_it_needs_nothing_but_itself_and_links_to_files_that_are_there(page, report):
    for tag, attributes in page.tags:
        assert not (tag == "link" and not attributes["href"].startswith("data:"))
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/png;base64,")
        if tag == "a" and not attributes["href"].startswith("#"):
            assert (report.parent / unquote(attributes["href"])).is_file()
            assert not urlparse(attributes["href"]).scheme
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert any(link.endswith("metrics.json") for link in links)
    assert {link[1:] for link in links if link[0] == "#"} <= {
        attributes.get("id") for _, attributes in page.tags
    }


def test_what_comes_from_files_is_text(page):
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert HOSTILE in page.text


def test_images_keep_their_colours(tmp_path):
    ramp = np.linspace(0, 1, 300)
    shown = colormaps["cividis"](np.tile(ramp, (40, 1)))
    image.imsave(tmp_path / "a.png", shown)
    packed = embedded(tmp_path / "a.png", tmp_path / "page.html").uri.partition(",")[2]
    found = image.imread(io.BytesIO(base64.b64decode(packed)), format="png")
    assert abs(found[..., :3] - shown[..., :3]).max() < 0.05


def test_links_lead_to_the_files_from_wherever_the_page_is(tmp_path):
    add(tmp_path / "output", "a b#c", "naee", 0.2)
    place = tmp_path / "elsewhere" / "page.html"
    assert main([str(tmp_path / "output"), "--out", str(place)]) == 0
    links = [a["href"] for tag, a in Page(place.read_text()).tags if tag == "a"]
    files = [link for link in links if not link.startswith("#")]
    assert files and all((place.parent / unquote(link)).is_file() for link in files)


def test_a_folder_where_nothing_is_done_yet_has_a_page(tmp_path):
    add(tmp_path, "a", "naee", 0.2, error="too little.")
    assert main([str(tmp_path)]) == 0
    assert "too little." in (tmp_path / "report.html").read_text()


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "has no runs" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.COMMAND is None:
        pytest.skip(f"no browser: install one of {', '.join(browser.NAMES)}")
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def shown(chromium, report):
    chromium.said.clear()
    chromium.asked.clear()
    chromium.open(report.as_uri())
    return chromium


FIRST = "document.querySelector('table.runs')"


def column(chromium, header):
    """The visible cells of a column of the first table."""
    return chromium.run(
        f"""(() => {{
            const heads = [...{FIRST}.tHead.rows[0].cells].map((cell) => cell.textContent);
            const rows = [...{FIRST}.querySelectorAll("tbody tr")].filter((row) => !row.hidden);
            return rows.map((row) => row.cells[heads.indexOf("{header}")].textContent.trim());
        }})()"""
    )


def click(chromium, header):
    """A click of the mouse in the middle of a header of the first table."""
    place = chromium.run(
        f"""(() => {{
            const buttons = [...{FIRST}.tHead.querySelectorAll("button")];
            const button = buttons.find((button) => button.textContent === "{header}");
            button.scrollIntoView({{block: "center"}});
            const box = button.getBoundingClientRect();
            return {{x: box.x + box.width / 2, y: box.y + box.height / 2}};
        }})()"""
    )
    for kind in ("mousePressed", "mouseReleased"):
        chromium.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)


def test_the_browser_asks_for_nothing_and_has_nothing_to_complain(shown, report):
    assert shown.said == []
    assert {url for url in shown.asked if not url.startswith("data:")} == {report.as_uri()}
    loaded = "[...document.images].every((image) => image.complete && image.naturalWidth > 0)"
    assert shown.run(f"document.images.length > 1 && {loaded}")


def test_a_click_on_a_header_sorts_by_number_and_the_third_puts_back(shown):
    before = column(shown, "Avg")
    numbers = sorted((float(cell.split()[0]) for cell in before), reverse=True)
    for order in (numbers, numbers[::-1]):
        click(shown, "Avg")
        assert [float(cell.split()[0]) for cell in column(shown, "Avg")] == order
    click(shown, "Avg")
    assert column(shown, "Avg") == before
    assert shown.said == []


def test_texts_sort_by_the_alphabet_and_absent_values_go_last(shown):
    click(shown, "Method")
    assert column(shown, "Method") == ["camera_p", "camera_p", "dense", "naee", "naee"]
    click(shown, "Ratio")
    assert [cell[:2] for cell in column(shown, "Ratio")] == ["20", "20", "40", "40", "–"]
    click(shown, "Ratio")
    assert [cell[:2] for cell in column(shown, "Ratio")] == ["40", "40", "20", "20", "–"]


def test_typing_filters_the_rows_of_all_tables(shown):
    shown.run("document.getElementById('filter').focus()")
    shown.send("Input.insertText", text="NAEE 20")
    assert column(shown, "Method") == ["naee"]
    assert re.fullmatch(r"\d+ of \d+ rows", shown.run("document.getElementById('count').value"))
    shown.run("document.getElementById('filter').select()")
    shown.send("Input.insertText", text="none such")
    assert column(shown, "Method") == []


def test_a_row_leads_to_its_run_which_unfolds(shown):
    shown.run(f"{FIRST}.querySelector('tbody a[href]').click()")
    folder = shown.run("decodeURIComponent(location.hash)")
    opened = "[...document.querySelectorAll('details[open]')].map((run) => '#' + run.id)"
    assert shown.run(f"new Promise((r) => setTimeout(r, 50)).then(() => {opened})") == [folder]


@pytest.mark.parametrize("width", [390, 1280])
def test_no_width_makes_the_page_scroll_sideways(chromium, report, width):
    chromium.open(report.as_uri(), width)
    chromium.run("for (const run of document.querySelectorAll('details')) run.open = true")
    assert chromium.run("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page_in_both_schemes(shown, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    shown.send("Emulation.setEmulatedMedia", features=features)
    style = "getComputedStyle(document.body)"
    ink, paper = (luminance(shown.run(f"{style}.{name}")) for name in ("color", "backgroundColor"))
    assert (ink > paper) == (scheme == "dark")
    light, dark = max(ink, paper), min(ink, paper)
    assert (light + 0.05) / (dark + 0.05) > 7  # WCAG AAA


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)", by WCAG."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))
