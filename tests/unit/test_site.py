"""The documentation site: it is built strictly, loads nothing from elsewhere, and has every key."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
from test_named_things import KEYS, ROOT, keys_of

from launchers.cluster import Cluster
from lgm_scale.evaluation.sweep.config import SweepConfig
from lgm_scale.families.base import families
from lgm_scale.sampling.config import SamplerConfig

LOADED = re.compile(r'<(?:script|img|source|iframe)[^>]* src(?:set)?="([^"]*)"|<link [^>]*>')


@pytest.fixture(scope="module")
def made_here() -> ModuleType:
    """docs/reference.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(made_here) -> str:
    return made_here.reference()


@pytest.fixture(scope="module")
def rows(text) -> dict[str, list[str]]:
    """Key -> cells of its row; of several families, those of the last."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(len(each) == 5 for each in cells)
    return {each[0].strip("`"): each for each in cells}


def test_every_key_of_every_file_has_its_row(rows):
    sections = {
        key for key in KEYS
        if any(other.startswith(f"{key}.") for other in KEYS) and key not in rows
    }  # fmt: skip
    mixture = {key.replace("data.mixture.", "data.mixture[].") for key in KEYS - sections}
    assert mixture <= rows.keys()
    assert {entry.name for entry in dataclasses.fields(SweepConfig)} <= rows.keys()
    assert {f"sampler.{entry.name}" for entry in dataclasses.fields(SamplerConfig)} <= rows.keys()
    assert set(keys_of(Cluster)) <= rows.keys()
    assert {"stages.NAME.job", "stages.NAME.array"} <= rows.keys()
    assert [key for key, row in rows.items() if not (row[1] and row[2] and row[3])] == [], (
        "no words"
    )


def test_types_defaults_words_and_rules_are_those_of_the_schema(rows):
    assert rows["optimizer.lr"][1:] == [
        "number", "`0.0002`", "Learning rate, after the warmup.", "must be above 0",
    ]  # fmt: skip
    assert rows["train.max_duration"][2] == 'needed, such as `"400ep"`'
    assert "write epochs as 400ep" in rows["train.max_duration"][4]
    assert rows["train.precision"][1] == "`fp32` or `amp_bf16`"
    assert rows["data.mixture"][1] == "list of keys below"
    assert rows["ema.decay"][4] == "must be in [0, 1)"
    assert rows["sampler.num_steps"][3].startswith("points of the time grid")
    assert "needs 2 or more" in rows["sampler.num_steps"][4]
    assert all(str(ROOT) not in cell for row in rows.values() for cell in row)


def test_every_family_has_a_part(text):
    for family in families().values():
        assert f"\n## `task: {family.task}`\n" in text


def test_links_that_leave_the_site_become_words(made_here):
    said = made_here.on_page_markdown("[a](../tests/b.py), [c](d.md), [e](../f.yaml)", page=None)
    assert said == "a, [c](d.md), e"


@pytest.mark.slow
def test_the_site_is_whole_and_loads_nothing_from_elsewhere(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    with mock.patch.dict(os.environ, {"NO_MKDOCS_2_WARNING": "1"}):
        build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in tmp_path.glob("*.html")}
    for path in tmp_path.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        for match in LOADED.finditer(text):
            assert "://" not in (match[1] or match[0]), (path.name, match[0])
        assert "mermaid" not in text  # the theme would load a library for it
        for image in re.findall(r"<img [^>]*>", text):
            assert len(re.findall(r'alt="([^"]*)"', image)[0]) > 20, (path.name, image)
    assert "optimizer.weight_decay" in (tmp_path / "configuration.html").read_text()
    assert "load_pipeline" in (tmp_path / "api.html").read_text()
    assert not list(Path(tmp_path).rglob("*.py"))
    styles = "".join(path.read_text() for path in tmp_path.rglob("*.css"))
    assert not re.search(r"url\(\s*['\"]?https?:", styles)
