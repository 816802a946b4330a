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
from small_sweep import make_sweep_inputs, results_of, sweep_config

from lgm_scale.errors import ConfigError, DataError
from lgm_scale.evaluation.commands import report
from lgm_scale.evaluation.report.curves import tradeoff_figure
from lgm_scale.evaluation.report.drawing import LIGHT, NamedPoint, name_points
from lgm_scale.evaluation.report.writing import write_comparison, write_report
from lgm_scale.evaluation.sweep.measure import measure
from lgm_scale.evaluation.sweep.results import comparable, differences

CELLS = [{"num_tokens": [4, 9, 16]}, {"num_tokens": 9, "cfg_scale": 3.0}]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_sweep_inputs(tmp_path_factory.mktemp("sweep"))


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
    assert page.count("data:image/png;base64,") == 8 + 3
    assert "prefers-color-scheme: dark" in page
    assert "make the &lt;images&gt;" in page
    assert "not trained" in page


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


def in_browser(browser: str, page: Path, script: str, dark: bool, folder: Path) -> dict:
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
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900",
         f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom",
         copy.as_uri()],
        capture_output=True, text=True, timeout=180, check=False,
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
