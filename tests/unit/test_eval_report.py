"""Tables, comparison and page of a finished sweep; and the page in a real browser."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from small_sweep import results_of, sweep_config

from lgm_scale.errors import ConfigError, DataError
from lgm_scale.evaluation.commands import report
from lgm_scale.evaluation.report.curves import tradeoff_figure
from lgm_scale.evaluation.report.drawing import LIGHT, NamedPoint, name_points
from lgm_scale.evaluation.report.writing import write_comparison, write_report
from lgm_scale.evaluation.sweep.measure import measure
from lgm_scale.evaluation.sweep.results import comparable, differences

CELLS = [{"num_tokens": [4, 9, 16]}, {"num_tokens": 9, "cfg_scale": 3.0}]


@pytest.fixture(scope="module")
def swept(made, tmp_path_factory) -> Path:
    """The `out` folder of a finished sweep with its report, not to be changed."""
    out = tmp_path_factory.mktemp("swept") / "report"
    measure(sweep_config(made, out, cells=CELLS))
    write_report(out)
    return out


@pytest.fixture
def copied(swept, tmp_path) -> Path:
    return Path(shutil.copytree(swept, tmp_path / "report"))


def test_the_report_is_complete_and_loads_nothing(swept):
    names = ["samples", "reconstructions", "merge_tree", "tradeoff", "samples_k0004"]
    for name in names:
        with Image.open(swept / f"{name}.png") as image:
            assert min(image.size) > 120
    page = (swept / "index.html").read_text()
    assert "http" not in page
    assert not re.search(r'(src|href|srcset)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 8 + 2 + 3  # for light and dark, and sheets
    assert "prefers-color-scheme: dark" in page
    assert "make the &lt;images&gt;" in page
    assert "not trained" in page


def test_pictures_say_what_is_seen_and_what_is_wide_scrolls(swept):
    page = re.sub(
        r"data:image/png;base64,[A-Za-z0-9+/=]+", "PNG", (swept / "index.html").read_text()
    )
    tradeoff, samples, *sheets, reconstructions, tree, zoomed = re.findall(
        r'alt="(.*?)"', page, re.S
    )
    for row in results_of(swept)["rows"]:
        assert f"{row['label']}: {row['metrics']['pixel_frechet']:.4g}" in tradeoff
    assert "a row for each K = 4, 9, 16" in samples
    assert "cat one, dog, eel" in samples
    assert [re.search(r"K = (\d+)", text)[1] for text in sheets] == ["4", "9", "16"]  # type: ignore[index]
    for row in results_of(swept)["reconstructions"]:
        assert f"K = {row['num_tokens']} ({row['metrics']['psnr_db']:.1f} dB)" in reconstructions
    assert "dendrogram of 16 tokens" in tree
    assert zoomed == ""  # what it shows has its text when it is shown
    scrolling = re.findall(
        r'<(?:div|pre) class="scroll[^>]*>(.*?)</(?:div|pre)>\s*<p class="hint"', page, re.S
    )
    assert (
        sum("<table" in each for each in scrolling) == page.count('<table class="sortable">') == 2
    )
    assert sum("<img" in each for each in scrolling) == 3
    assert page.count('class="scroll') == page.count('class="hint" hidden') == len(scrolling)
    assert page.count('media="(max-width: 640px)') == 2


def test_the_distance_is_never_given_a_name_it_has_not(swept):
    text = (swept / "index.html").read_text() + (swept / "results.md").read_text()
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    text += (swept / "results.json").read_text() + (swept / "results.csv").read_text()
    assert "not FID" in text
    assert "fid" not in re.sub("not FID", "", text).lower()


def test_the_tables_hold_every_row_and_number(swept):
    results = results_of(swept)
    lines = list(csv.DictReader(io.StringIO((swept / "results.csv").read_text())))
    assert len(lines) == len(results["rows"]) == 4
    for line, row in zip(lines, results["rows"], strict=True):
        assert float(line["pixel_frechet"]) == row["metrics"]["pixel_frechet"]
        assert float(line["cfg_scale"]) == row["cell"]["cfg_scale"]
        assert row["key"].endswith(line["protocol"])
    text = (swept / "results.md").read_text()
    assert "## Samples, 11 images" in text
    assert "## Reconstructions, 15 images" in text
    for row in results["rows"]:
        assert row["label"] in text
        assert f"{row['metrics']['pixel_frechet']:.4g}" in text
    assert "LPIPS is off" in text


@pytest.mark.slow
def test_the_report_is_drawn_again_from_what_is_stored(swept, copied):
    for path in (*copied.glob("*.png"), copied / "index.html"):
        path.unlink()
    assert write_report(copied) == copied / "index.html"
    assert (copied / "index.html").read_bytes() == (swept / "index.html").read_bytes()
    (lost,) = (copied / "rows").glob("samples-k0016*.safetensors")
    lost.unlink()
    with pytest.raises(DataError, match=lost.name):
        write_report(copied)


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"results\.json is missing"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"format": "other"}')
    with pytest.raises(DataError, match="damaged"):
        write_report(tmp_path)


# --- comparison -------------------------------------------------------------------------------


@pytest.mark.slow
def test_sweeps_that_were_measured_alike_share_a_table(made, swept, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    measure(sweep_config(made, other, cells=[{"num_tokens": [4, 9], "num_steps": 6}]))
    monkeypatch.setattr(
        "sys.argv", ["report", str(swept), str(other), "--to", str(tmp_path / "both")]
    )
    assert report.main() == 0
    page = (tmp_path / "both" / "index.html").read_text()
    assert page.count('<table class="sortable">') == 1
    lines = list(csv.DictReader((tmp_path / "both" / "results.csv").open()))
    assert len(lines) == 4 + 2
    assert "other: K = 4, w = 1.5, 6 points" in (tmp_path / "both" / "results.md").read_text()
    assert "comparison:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "named"),
    [({"num_images": 12}, "num_images: 11 against 12"), ({"seed": 3}, "seed: 0 against 3"),
     ({"num_components": 3}, "features"), ({"quantise": "truncate"}, "pixels")],
)  # fmt: skip
def test_sweeps_that_were_measured_otherwise_are_refused(made, swept, tmp_path, change, named):
    other = tmp_path / "other"
    measure(sweep_config(made, other, cells=[{"num_tokens": 4}], **change))
    with pytest.raises(ConfigError, match="was not measured like") as caught:
        write_comparison([swept, other], tmp_path / "both")
    assert named in str(caught.value)
    assert not (tmp_path / "both").exists()


def test_what_is_measured_may_differ_but_not_how():
    row = {"protocol": {"cell": {"num_tokens": 4}, "weights": "a", "seed": 0, "num_images": 9}}
    assert comparable(row) == {"seed": 0, "num_images": 9}
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}) == ["a.b: 1 against 3"]


# --- names of points --------------------------------------------------------------------------


def test_names_of_close_points_do_not_cover_each_other():
    figure = Figure(figsize=(6, 4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.1, 0.85, 0.85))
    across = [1.0, 1.1, 1.2, 1.21, 2.0, 2.05]
    axes.plot(across, [5.0] * 6)
    axes.set(xscale="log", ylim=(0, 10))
    name_points(axes, [NamedPoint(x, 5.0, f"K = {i * 100}") for i, x in enumerate(across)], LIGHT)
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [f"K = {i * 100}" for i in range(6)]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert axes.bbox.y0 < box.y0
        assert abs(box.y0 - axes.transData.transform((1.0, 5.0))[1]) < 100


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_names_stand_on_no_line_and_inside_the_picture(swept, narrow):
    rows = json.loads(json.dumps(results_of(swept)["rows"]))
    for i, row in enumerate(rows):  # a curve that rises steeply to the right, through all names
        row["metrics"]["pixel_frechet"] = 10.0 + 40 * i
        row["run"]["images_per_second"] = 10.0 + 4 * i
        row["work"]["tflops_per_image"] = 1.0 + 0.2 * i
    figure = tradeoff_figure(rows, [], LIGHT, narrow)
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        lines = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
        assert len(axes.texts) == len(rows)
        for text in axes.texts:
            box = Text.get_window_extent(text)
            assert not any(line.intersects_bbox(box, filled=False) for line in lines), text
            assert figure.bbox.x0 <= box.x0
            assert box.x1 <= figure.bbox.x1


def test_what_lines_differ_in_names_them(swept):
    (row, *_) = results_of(swept)["rows"]
    cells: list[dict] = [
        {"solver": "heun", "uncond_num_tokens": 4, "guidance": "autoguidance"},
        {"uncond_num_tokens": 4, "length_schedule": [[0, 4]]},
    ]
    rows = [row | {"cell": row["cell"] | cell} for cell in cells] + [row | {"run_name": "mine"}]
    legend = tradeoff_figure(rows, [], LIGHT).axes[0].get_legend()
    assert legend is not None
    points = f"{row['cell']['num_steps']} points"
    assert [text.get_text() for text in legend.get_texts()] == [
        f"{points}, heun, autoguidance at 4", f"{points}, uncond at 4, growing", f"mine, {points}",
    ]  # fmt: skip
    figure = tradeoff_figure([row | {"metrics": {}}], [], LIGHT)
    assert [text.get_text() for text in figure.texts] == ["no distance was measured"]


# --- published points -------------------------------------------------------------------------


def test_published_points_stand_beside_published_metrics_alone(swept):
    results = results_of(swept)
    rows = results["rows"]

    def texts(rows) -> list[str]:
        figure = tradeoff_figure(rows, [], LIGHT)
        legend = figure.axes[0].get_legend()
        assert legend is not None
        found = [text for axes in figure.axes for text in axes.texts] + legend.get_texts()
        return [text.get_text() for text in found]

    assert not any("LGM-XL" in text for text in texts(rows))
    renamed = json.loads(json.dumps(rows))
    for row in renamed:
        row["metrics"] = {"fid": row["metrics"]["pixel_frechet"]}
        row["names"] = {"fid": "gFID-50K"}
    found = texts(renamed)
    assert sum("LGM-XL, K = 32, 25 steps" in text for text in found) == 2
    assert any("RTX 3090" in text for text in found)
    for row in renamed:
        row["names"] = {"fid": "gFID-10K"}
    assert not any("LGM-XL" in text for text in texts(renamed))


# --- in a browser -----------------------------------------------------------------------------


def in_browser(
    browser: str, page: Path, script: str, dark: bool, folder: Path, width: int = 1200
) -> dict:
    """Run a script in the page, in a real browser; what it leaves in `window.seen`."""
    copy = folder / f"page-{'dark' if dark else 'light'}.html"
    ending = (
        "<script>addEventListener('load', async () => { const seen = {};"
        "addEventListener('error', event => seen.error = String(event.message));"
        f"try {{ {script} }} catch (error) {{ seen.error = String(error); }}"
        "document.title = 'seen:' + JSON.stringify(seen); });</script>"
    )
    copy.write_text(page.read_text().replace("</body>", ending + "</body>"))
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom",
         copy.as_uri()],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    title = re.search(r"<title>seen:(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stdout[:500] + done.stderr[-2000:]
    import html

    return json.loads(html.unescape(title[1]))


LOOK = """
const table = document.querySelector("table.sortable");
const column = name => [...table.tHead.rows[0].cells].findIndex(c => c.textContent.includes(name));
const values = name => [...table.tBodies[0].rows].map(r => r.cells[column(name)].textContent);
const click = name => table.tHead.rows[0].cells[column(name)].querySelector("button").click();
seen.before = values("K");
click("K"); seen.up = values("K");
click("K"); seen.down = values("K");
seen.mark = table.tHead.rows[0].cells[column("K")].getAttribute("aria-sort");
click("Pixel distance"); seen.distances = values("Pixel distance");
click("training loss"); seen.losses = values("training loss");
const images = [...document.querySelectorAll("figure img")];
document.querySelectorAll("details").forEach(each => each.open = true);
const pause = () => new Promise(resolve => setTimeout(resolve, 500));
await pause();
seen.broken = images.filter(image => image.naturalWidth < 50).length;
seen.images = images.length;
const dialog = document.querySelector("dialog");
seen.closed = dialog.open;
images[0].click();
await pause();
seen.opened = dialog.open;
seen.same = dialog.querySelector("img").src === images[0].currentSrc;
seen.larger = dialog.querySelector("img").getBoundingClientRect().width >
  images[0].getBoundingClientRect().width;
dialog.click();
seen.shut = dialog.open;
images[1].dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}));
seen.by_key = dialog.open;
seen.paper = getComputedStyle(document.body).backgroundColor;
seen.ink = getComputedStyle(document.body).color;
seen.source = images[0].currentSrc.slice(0, 10000).length + images[0].currentSrc.slice(-400);
seen.requests = performance.getEntriesByType("resource")
  .filter(entry => !entry.name.startsWith("data:")).length;
seen.wide = document.documentElement.scrollWidth <= innerWidth;
"""


NARROW = """
const pause = () => new Promise(resolve => setTimeout(resolve, 500));
await pause();
seen.wide = document.documentElement.scrollWidth <= innerWidth;
seen.boxes = [...document.querySelectorAll(".scroll")].map(box =>
  [box.scrollWidth > box.clientWidth + 1, !box.nextElementSibling.hidden]);
const images = [...document.querySelectorAll("figure img")].filter(image => image.offsetWidth);
seen.shapes = images.map(image => image.naturalHeight > image.naturalWidth);
"""


@pytest.mark.slow
@pytest.mark.system
def test_on_a_phone_wide_things_scroll_and_say_so(swept, browser, tmp_path):
    """At 500 pixels, the least width of a window without a screen."""
    seen = in_browser(browser, swept / "index.html", NARROW, False, tmp_path, width=500)
    assert "error" not in seen, seen
    assert seen["wide"], "the page itself must not scroll sideways"
    assert all(scrolls == hinted for scrolls, hinted in seen["boxes"])
    assert any(scrolls for scrolls, _ in seen["boxes"])
    assert seen["shapes"][0], "the plot is not the one for narrow screens"


@pytest.mark.slow
@pytest.mark.system
def test_the_page_sorts_zooms_and_changes_colour_in_a_browser(swept, browser, tmp_path):
    page = swept / "index.html"
    light, dark = (in_browser(browser, page, LOOK, d, tmp_path) for d in (False, True))
    for seen in (light, dark):
        assert "error" not in seen, seen
        assert seen["before"] == ["4", "9", "16", "9"]
        assert seen["up"] == ["4", "9", "9", "16"]
        assert seen["down"] == ["16", "9", "9", "4"]
        assert seen["mark"] == "descending"
        distances = [float(text) for text in seen["distances"]]
        assert distances == sorted(distances)
        assert seen["losses"][-2:] == ["not trained", "not trained"]
        assert (seen["broken"], seen["images"]) == (0, 4 + 3)
        assert (seen["closed"], seen["opened"], seen["shut"], seen["by_key"]) == (
            False, True, False, True,
        )  # fmt: skip
        assert seen["same"]
        assert seen["larger"]
        assert seen["requests"] == 0
        assert seen["wide"]

    def brightness(colour: str) -> float:
        return sum(map(float, re.findall(r"\d+", colour)[:3])) / 3

    assert brightness(light["paper"]) > 200 > 90 > brightness(light["ink"])
    assert brightness(dark["paper"]) < 60 < 180 < brightness(dark["ink"])
    assert light["source"] != dark["source"], "pictures of one theme in both"
