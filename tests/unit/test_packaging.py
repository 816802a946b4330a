"""The wheel: what is in it, and that it works where the repository is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from small_pipeline import ROOT

PACKAGE = ROOT / "lgm_scale"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what git holds, for a build leaves folders behind that the next one picks up."""
    copy = tmp_path_factory.mktemp("build") / "checkout"
    own = shutil.ignore_patterns(".*", "build", "runs", "shared", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=own)
    return copy


def build(function: str, checkout: Path, out: Path) -> Path:
    """Call a hook of setuptools' build backend, as pip does."""
    out.mkdir()
    program = f"from setuptools import build_meta; build_meta.{function}({str(out)!r})"
    subprocess.run(
        [sys.executable, "-c", program], cwd=checkout, check=True, stdout=subprocess.DEVNULL
    )
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def installed(checkout, tmp_path_factory) -> Path:
    """Folder with the contents of a wheel that was built from the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    sdist = build("build_sdist", checkout, folder / "sdist")
    shutil.unpack_archive(sdist, folder / "source")
    (source,) = (folder / "source").iterdir()
    with zipfile.ZipFile(build("build_wheel", source, folder / "wheel")) as wheel:
        wheel.extractall(folder / "installed")
    return folder / "installed"


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_recipes_and_nothing_beside(installed):
    names = {path.name for path in installed.iterdir()}
    assert {name.split("-")[0] for name in names} == {"lgm_scale"}
    assert len(names) == 2  # the package and its description
    expected = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    expected |= {
        "yamls" / path.relative_to(ROOT / "yamls") for path in ROOT.glob("yamls/**/*.yaml")
    }
    for folder in ("templates", "weights", "demo"):
        expected |= {path.relative_to(PACKAGE) for path in PACKAGE.glob(f"**/{folder}/*")}
    expected |= {Path("py.typed")}
    package = installed / "lgm_scale"
    found = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    assert found == expected
    assert not any(path.is_symlink() for path in package.rglob("*"))


def run_outside(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["yamls/dit_b.yaml", "dit_b.yaml"])
def test_a_recipe_of_the_wheel_is_planned_in_an_empty_folder(installed, tmp_path, recipe):
    result = run_outside(installed, tmp_path, "lgm_scale.train", recipe, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "dit_b" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_recipe_that_is_nowhere_is_named_with_a_similar_one(installed, tmp_path):
    result = run_outside(installed, tmp_path, "lgm_scale.train", "yamls/dit_bb.yaml", "--dry-run")
    assert result.returncode == 2
    assert f"{tmp_path}/yamls/dit_bb.yaml nor a recipe of {installed}/lgm_scale" in result.stderr
    assert "did you mean yamls/dit_b.yaml" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["convert", "encode", "verify"])
def test_data_sets_are_made_with_the_wheel_alone(installed, tmp_path, command):
    module = f"lgm_scale.data.preparation.{command}"
    result = run_outside(installed, tmp_path, module, "--help")
    assert result.returncode == 0, result.stderr
    assert module in result.stdout


@pytest.mark.slow
def test_an_editable_install_puts_the_repository_on_the_path(checkout, tmp_path):
    with zipfile.ZipFile(build("build_editable", checkout, tmp_path / "editable")) as wheel:
        (link,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        assert wheel.read(link).decode().strip() == str(checkout)
