"""The report: what it says, that no data becomes markup, and how it works in a browser."""

import base64
import io
import json
import re
import time
from html.parser import HTMLParser
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from matplotlib import colormaps, image

from experiments.config.schema import CONF
from experiments.config.settings import Settings
from experiments.figures.run import draw_run
from experiments.records.files import OutputFolder
from experiments.report.__main__ import main
from experiments.report.defaults import differences
from experiments.report.facts import commands
from experiments.report.runs import embedded, read_run
from experiments.tables.rows import read_runs
from tests.helpers.runs import browser
from tests.helpers.runs.run_folders import add

pytestmark = pytest.mark.drawn

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
    add(output, "stopped", "camera_p", 0.8, error="KeyboardInterrupt")
    image.imsave(output / "runs" / "n0.2" / "widths.png", np.zeros((4, 6, 3)))
    versions = {"camera-moe": "0.9", "torch": "9.8.7"}
    environment = {"cpus": 2, "accelerator": "a card", "commit": "abc1234"}
    environment |= {"finished": "2030-01-02T03:04:05+0000", "overrides": ["method=naee", "a=b c"]}
    change(output / "runs" / "n0.2", versions=versions, environment=environment)
    widths = {"model.layers.0.mlp.experts": [3, 1]}
    report = {"widths": widths, "full_widths": {"model.layers.0.mlp.experts": 4}, "layers": {}}
    (output / "runs" / "p0.21" / "compress.json").write_text(json.dumps(report))
    draw_run(output / "runs" / "p0.21")


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
    assert figures and len(images) == len(figures) + 3 + 1  # of runs, and the empty enlarged one
    text = re.sub(r"\s+", " ", page.text)
    assert "7 of 10 runs done, 1 failed, 2 not finished" in text
    assert "minutes of compression" in text


def test_what_is_best_is_named_with_its_error_what_ties_and_what_the_dense_model_has(page):
    text = re.sub(r"\s+", " ", page.text)
    best = r"20% Camera-P 57.5 ± [\d.]+ \(75 % of the bytes\) average, dense 60.0"
    assert re.search(best, text)
    assert "40% Camera-P 55.5" in text


def test_its_first_lines_are_date_command_code_data_and_hardware(page):
    head = re.sub(r"\s+", " ", page.text).partition("Best at each ratio")[0]
    for words in (
        f"Made {time.strftime('%Y-%m-%d')}",
        "Runs finished 2030-01-02 03:04",
        "Command python main.py method=naee 'a=b c'",
        "Code camera-moe 0.9, commit abc1234",
        "Model tiny_moe, 2.0 MB",
        "Hardware a card, 2 CPUs",
    ):
        assert words in head


def test_the_commands_of_sweeps_are_said_once_for_all_their_runs(tmp_path):
    run = add(tmp_path, "a", "naee", 0.2)
    change(run, environment={"overrides": ["method=naee", "sparsity=0.2"]})
    sweep = tmp_path / "sweeps" / "1"
    sweep.mkdir(parents=True)
    (sweep / "plan.json").write_text(json.dumps({"output": "../..", "jobs": [{"run": "a"}]}))
    typed = {"task": ["sparsity=0.2,0.4", "output=x"], "hydra": ["hydra.mode=MULTIRUN"]}
    (sweep / "multirun.yaml").write_text(json.dumps({"hydra": {"overrides": typed}}))
    rows = read_runs(OutputFolder(tmp_path).runs()).to_dict("records")
    told = [read_run(row, tmp_path / "report.html") for row in rows]
    assert commands(told, tmp_path) == ["python main.py -m sparsity=0.2,0.4"]


@pytest.mark.parametrize(
    ("preset", "differs"),
    [
        ("method=camera_p", {}),
        ("method=gptq", {}),
        ("method=camera_p sparsity=0.4 seed=3", {}),
        ("method=camera_p alpha=0.5 calibration.samples=8", {"alpha": "0.5", "samples": "8"}),
        ("method=camera_p evaluation=none", {"evaluation": "none"}),
        ("method=camera_p evaluation=speed sparsity=0.6", {"evaluation": "speed"}),
        ("method=heapr method.rank_scope=layer", {"rank_scope": "layer"}),
        (
            "method=camera_p propagate=dense evaluation.limit=5",
            {"propagate": "dense", "limit": "5"},
        ),
    ],
)
def test_only_what_is_not_the_default_is_told_of_a_run(preset, differs):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = Settings.of(compose("config", preset.split()))
    found = differences(settings.to_dict(), settings.method_name)
    assert {key.rpartition(".")[2]: value for key, value in found.items()} == differs


def test_what_is_not_finished_is_not_called_a_failure(page, report):
    text = re.sub(r"\s+", " ", page.text)
    failed, _, others = text.partition("Failed Camera-P, 60%")[2].partition("Not finished")
    assert "sparsity=0.6" in failed and "Camera-P, 70%" not in failed
    assert "unfinished" in others and "interrupted The same command goes on where it was." in others
    runs = {a["class"] for tag, a in page.tags if tag == "tr" and "class" in a}
    assert {"failed", "unfinished", "interrupted"} <= runs


def test_it_needs_nothing_but_itself_and_links_to_files_that_are_there(page, report):
    for tag, attributes in page.tags:
        assert not (tag == "link" and not attributes["href"].startswith("data:"))
        if "src" in attributes:
            assert re.match(r"data:image/(png|svg\+xml);base64,", attributes["src"])
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


def test_a_figure_is_a_drawing_that_follows_the_page_and_says_what_it_shows(page):
    images = [a for tag, a in page.tags if tag == "img" and "src" in a]
    drawings = [a for a in images if "svg" in a["src"]]
    assert len(drawings) > 3 and len(images) == len(drawings) + 1  # the one that has no SVG
    for drawing in drawings:
        content = base64.b64decode(drawing["src"].partition(",")[2]).decode()
        assert "prefers-color-scheme:dark" in content
        head, _, words = drawing["alt"].partition(": ")
        assert head and "tiny_moe" in words


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


@pytest.fixture(params=["light", "dark"])
def scheme(chromium, request):
    features = [{"name": "prefers-color-scheme", "value": request.param}]
    chromium.send("Emulation.setEmulatedMedia", features=features)
    yield request.param
    chromium.send("Emulation.setEmulatedMedia", features=[])


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
    buttons = f'[...{FIRST}.tHead.querySelectorAll("button")]'
    press(chromium, f'{buttons}.find((button) => button.textContent === "{header}")')


def press(chromium, element):
    """A click of the mouse in the middle of what this script finds."""
    place = chromium.run(
        f"""(() => {{
            const element = {element};
            element.scrollIntoView({{block: "center"}});
            const box = element.getBoundingClientRect();
            return {{x: box.x + box.width / 2, y: box.y + box.height / 2}};
        }})()"""
    )
    for kind in ("mousePressed", "mouseReleased"):
        chromium.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)


def test_the_browser_asks_for_nothing_and_has_nothing_to_complain(shown, report):
    assert shown.said == []
    assert {url for url in shown.asked if not url.startswith("data:")} == {report.as_uri()}
    images = "[...document.images].filter((image) => image.src)"
    loaded = f"{images}.every((image) => image.complete && image.naturalWidth > 0)"
    assert shown.run(f"document.images.length > 1 && {loaded}")


def test_a_click_on_a_header_sorts_by_number_and_the_third_puts_back(shown):
    before = column(shown, "BoolQ↑")
    numbers = sorted((float(cell.split()[0]) for cell in before), reverse=True)
    for order in (numbers, numbers[::-1]):
        click(shown, "BoolQ↑")
        assert [float(cell.split()[0]) for cell in column(shown, "BoolQ↑")] == order
    click(shown, "BoolQ↑")
    assert column(shown, "BoolQ↑") == before
    assert shown.said == []


def test_texts_sort_by_the_alphabet_and_absent_values_go_last(shown):
    click(shown, "Method")
    assert column(shown, "Method") == ["Camera-P", "Camera-P", "Dense", "NAEE", "NAEE"]
    click(shown, "Ratio")
    assert [cell[:2] for cell in column(shown, "Ratio")] == ["20", "20", "40", "40", "–"]
    click(shown, "Ratio")
    assert [cell[:2] for cell in column(shown, "Ratio")] == ["40", "40", "20", "20", "–"]


def test_typing_filters_the_rows_of_all_tables(shown):
    shown.run("document.getElementById('filter').focus()")
    shown.send("Input.insertText", text="NAEE 20")
    assert column(shown, "Method") == ["NAEE"]
    assert re.fullmatch(r"\d+ of \d+ rows", shown.run("document.getElementById('count').value"))
    shown.run("document.getElementById('filter').select()")
    shown.send("Input.insertText", text="none such")
    assert column(shown, "Method") == []


def test_a_row_leads_to_its_run_which_unfolds(shown):
    shown.run(f"{FIRST}.querySelector('tbody a[href]').click()")
    folder = shown.run("decodeURIComponent(location.hash)")
    opened = "[...document.querySelectorAll('details[open]')].map((run) => '#' + run.id)"
    assert shown.run(f"new Promise((r) => setTimeout(r, 50)).then(() => {opened})") == [folder]


@pytest.mark.parametrize("width", [420, 1400, 1920])
def test_nothing_is_cut_and_method_and_average_stay_in_sight(chromium, report, width, scheme):
    chromium.said.clear()
    chromium.asked.clear()
    chromium.open(report.as_uri(), width)
    chromium.run("for (const run of document.querySelectorAll('details')) run.open = true")
    assert chromium.run("document.documentElement.scrollWidth") <= width
    assert chromium.run("document.querySelector('main').clientWidth") >= width - 20
    scrolled = """(() => {
        const out = [];
        for (const box of document.querySelectorAll('.scroll')) {
            box.scrollLeft = 1e6;
            const {left, right} = box.getBoundingClientRect();
            for (const cell of box.querySelectorAll('tr:first-child .stick')) {
                const place = cell.getBoundingClientRect();
                if (place.left < left - 1 || place.right > right + 1) out.push(cell.textContent);
            }
        }
        return out;
    })()"""
    assert chromium.run(scrolled) == []
    assert chromium.run("document.querySelectorAll('th.stick').length") > 3
    assert chromium.said == []
    assert {url for url in chromium.asked if not url.startswith("data:")} == {report.as_uri()}


def test_text_and_figures_stand_out_from_the_page_in_both_schemes(shown, scheme, tmp_path):
    style = "getComputedStyle(document.body)"
    ink, paper = (luminance(shown.run(f"{style}.{name}")) for name in ("color", "backgroundColor"))
    assert (ink > paper) == (scheme == "dark")
    light, dark = max(ink, paper), min(ink, paper)
    assert (light + 0.05) / (dark + 0.05) > 7  # WCAG AAA
    shown.run("document.querySelector('#figures .drawing img').scrollIntoView()")
    place = shown.run(
        """(() => {
            const box = document.querySelector("#figures .drawing img").getBoundingClientRect();
            return [box.x, box.y, box.width, box.height].map(Math.round);
        })()"""
    )
    shown.screenshot(tmp_path / "window.png")
    x, y, width, height = place
    drawn = image.imread(tmp_path / "window.png")[y + 2 : y + height - 2, x + 2 : x + width - 2, :3]
    assert (np.median(drawn) < 0.5) == (scheme == "dark")
    assert drawn.max() - drawn.min() > 0.6


def test_a_click_enlarges_a_figure_and_escape_closes_it(shown):
    shown.run("document.querySelector('#figures img').scrollIntoView({block: 'center'})")
    size = "document.querySelector('{} img').getBoundingClientRect().width"
    small = shown.run(size.format("#figures"))
    press(shown, "document.querySelector('#figures img')")
    assert shown.run("document.getElementById('enlarged').open")
    assert shown.run(size.format("#enlarged")) > 1.5 * small
    for kind in ("keyDown", "keyUp"):
        shown.send("Input.dispatchKeyEvent", type=kind, key="Escape", windowsVirtualKeyCode=27)
    assert not shown.run("document.getElementById('enlarged').open")
    assert shown.said == []


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)", by WCAG."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))
