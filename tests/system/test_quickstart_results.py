"""What `make quickstart` must have learned. Reads its results.json; trains nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

REPORT = os.environ.get("LGM_QUICKSTART_REPORT")

pytestmark = pytest.mark.skipif(
    REPORT is None, reason="set LGM_QUICKSTART_REPORT=runs/quickstart/report after make quickstart"
)


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads((Path(str(REPORT)) / "results.json").read_text())


def test_reconstruction_gets_better_with_tokens(results):
    psnr = {row["num_tokens"]: row["metrics"]["psnr_db"] for row in results["reconstructions"]}
    assert sorted(psnr) == [8, 16, 32, 64]
    assert psnr[8] < psnr[16] < psnr[32]
    assert psnr[64] >= max(psnr.values()) - 0.2


@pytest.mark.parametrize("num_tokens", [8, 16, 32, 64])
def test_the_generator_learns_at_every_length(results, num_tokens):
    loss = results["training_loss"][str(num_tokens)]
    assert loss["steps"] >= 40
    assert loss["last20"] < 0.6 * loss["first20"]


def test_the_distance_never_goes_by_another_name(results):
    for row in results["rows"]:
        assert set(row["metrics"]) == {"pixel_frechet"}
        assert "not FID" in row["names"]["pixel_frechet"]


def test_the_report_is_complete(results):
    for name in ("reconstructions", "samples", "merge_tree", "tradeoff"):
        assert (Path(str(REPORT)) / f"{name}.png").stat().st_size > 10_000
    page = (Path(str(REPORT)) / "index.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "http://" not in page
    assert "https://" not in page
