"""The web page in a real browser: a moved slider and a pressed button make a picture."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rank_processes import start_calls, until, wait_for
from small_sweep import make_bundles

from lgm_scale import web
from lgm_scale.errors import exit_on_user_error
from lgm_scale.pipeline import load_pipeline

pytestmark = [pytest.mark.servers, pytest.mark.slow, pytest.mark.system]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    make_bundles(folder, {"config": {"objective": {"noise_scale": "corrected"}}})
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    picture.save(folder / "picture.png")
    return folder


def _serve(temporary: Path, *words: str) -> None:
    """Say whom it looks up, besides this machine."""
    real = socket.getaddrinfo

    def spy(host: Any, *rest: Any, **options: Any) -> Any:
        if host not in ("127.0.0.1", "localhost", None):
            print(f"ASKED {host}", flush=True)
        return real(host, *rest, **options)

    socket.getaddrinfo = spy
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
    sys.argv = ["web.py", *words]
    exit_on_user_error(web.main)


@contextmanager
def served(bundle: Path, log: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """The address of a bundle's page, and Ctrl-C, which closes it with status 0."""
    temporary = log.with_name("temporary")
    temporary.mkdir()
    (server,) = start_calls(1, _serve, temporary, str(bundle), "--port", "0", log=log)
    said, address = Path(f"{log}-0.txt"), re.compile(r"http://\S+(?=\s)")
    until(lambda: said.exists() and address.search(said.read_text()), [server], log)
    (found,) = address.findall(said.read_text())
    yield found, lambda: os.kill(server.pid or 0, signal.SIGINT)
    assert wait_for([server]) == [0], said.read_text()
    assert said.read_text().endswith("closed\n")
    assert "Traceback" not in said.read_text()
    assert "ASKED" not in said.read_text()
    assert not list(temporary.iterdir())  # neither pictures nor uploads are left


@contextmanager
def opened(browser: str, address: str) -> Iterator[Any]:
    """A page of the browser, which may ask the page's own server and nobody else."""
    from playwright.sync_api import sync_playwright

    asked: list[str] = []
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=list(FLAGS))
        page = chromium.new_page()
        page.set_default_timeout(400_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address, wait_until="networkidle")
        yield page
        chromium.close()
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def move(page: Any, label: str, to: int) -> None:
    """Drag a slider down by keys; those that come before the page is ready are lost on it."""
    slider = page.get_by_label(f"range slider for {label}").first
    while int(slider.input_value()) > to:
        slider.press("ArrowLeft")


def pictures(page: Any, count: int) -> list[np.ndarray]:
    """What the browser shows, pixel by pixel."""
    shown = page.locator("img:visible")
    shown.nth(count - 1).wait_for()
    sources = [image.get_attribute("src") for image in shown.all()]
    found = [page.request.get(source).body() for source in sources]
    return [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in found]


def test_a_generator_in_the_browser(made, browser, tmp_path):
    with (
        served(made / "dit", tmp_path / "log") as (address, close),
        opened(browser, address) as page,
    ):
        move(page, "K, number of tokens", 9)
        scale = page.get_by_label("number input for guidance").first
        page.wait_for_function("([e, v]) => e.value === v", arg=[scale.element_handle(), "1.89"])
        move(page, "points of the time grid", 5)
        page.get_by_role("button", name="Sample").click()
        page.get_by_text("GFLOPs per image at K = 9: ").wait_for()
        shown = pictures(page, 4)
        pipe = load_pipeline(made / "dit", "cpu")
        settings: dict[str, Any] = {"cfg_scale": 1.89, "num_steps": 5, "progress_bar": False}
        assert np.array_equal(np.stack(shown), pipe(["cat_one"] * 4, 9, **settings))
        page.get_by_role("tab", name="Reconstruct").click()
        page.get_by_role("button", name="Reconstruct").click()
        page.get_by_text("Choose a picture first.").wait_for()
        other = page.request.get(f"{address}/gradio_api/file={made / 'dit' / 'bundle.json'}")
        assert other.status == 403  # files of this machine are no business of the page
        close()  # while it is open


def test_a_tokenizer_in_the_browser(made, browser, tmp_path):
    with (
        served(made / "tokenizer", tmp_path / "log") as (address, close),
        opened(browser, address) as page,
    ):
        page.get_by_role("tab", name="Reconstruct").wait_for()
        assert page.get_by_role("tab").count() == 1
        page.set_input_files("input[type=file]", made / "picture.png")
        page.locator("img:visible").first.wait_for()
        move(page, "K, number of tokens", 13)
        page.get_by_role("button", name="Reconstruct").click()
        page.get_by_text("dB at K = 13").wait_for()
        uploaded, seen, result = pictures(page, 3)
        assert np.array_equal(uploaded, seen)
        assert seen.shape == result.shape
        assert not np.array_equal(seen, result)
        close()
