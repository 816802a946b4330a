"""Files of others: what is known of them, the command that gets them, downloads that break."""

from __future__ import annotations

import argparse
import fcntl
import importlib
import io
import json
import re
from pathlib import Path

import pytest
from file_server import FileServer, served_files, serving, use_served_files
from small_pipeline import ROOT
from typed_commands import refusal, typed

from lgm_scale import assets
from lgm_scale.config.loading import RECIPES, read_yaml
from lgm_scale.families.base import families
from lgm_scale.published import COMMAND, PUBLISHED, Asset, names_at, size_text
from lgm_scale.storage.files import file_hash
from lgm_scale.storage.transfer import StorageError
from lgm_scale.storage.web import fetch

BODY = bytes(range(256)) * 500


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.bin").write_bytes(BODY)
    with serving(tmp_path / "served") as server:
        yield server


@pytest.fixture
def served(server: FileServer, monkeypatch, tmp_path):
    """Every published file, of a few bytes, from the server; and an empty folder to be in."""
    sums: dict[str, str | None] = {}
    for name, file in PUBLISHED.items():
        path = server.folder / file.name
        path.write_text(f"content of {name}")
        sums[name] = file_hash(path)
    sums |= {"inception": (sums["inception"] or "")[:8], "dino_critic": None}
    for name, value in served_files(server, sums).items():
        monkeypatch.setenv(name, value)
    for name, file in list(PUBLISHED.items()):
        monkeypatch.setitem(PUBLISHED, name, file)  # put back in the end
    use_served_files()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return server


# --- what is known --------------------------------------------------------------------------------


def test_addresses_are_those_of_the_packages_that_read_the_files():
    timm = importlib.import_module("timm.models.vision_transformer").default_cfgs
    vgg = importlib.import_module("torchvision.models").VGG16_Weights.IMAGENET1K_V1
    inception = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    assert PUBLISHED["vgg16"].url == vgg.url
    assert PUBLISHED["inception"].url == inception.URL_INCEPTION_V3
    names = {"dino_critic": "small_patch16_224", "dinov2_s": "small_patch14_dinov2"}
    names |= {"dinov2_b": "base_patch14_dinov2", "dinov2_l": "large_patch14_dinov2"}
    for name, model in names.items():
        tag = "dino" if name == "dino_critic" else "lvd142m"
        assert PUBLISHED[name].url == timm[f"vit_{model}"].cfgs[tag].url
        if name != "dino_critic":
            assert timm[f"vit_{model}"].cfgs[tag].license == "apache-2.0"
    assert "Apache-2.0" in PUBLISHED["dinov2_b"].licence


def test_sums_in_names_of_files_are_those_in_the_list():
    for name in ("vgg16", "inception"):
        assert re.search(rf"-{PUBLISHED[name].sha256}\.pth$", PUBLISHED[name].name)
    for file in PUBLISHED.values():
        assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{8}|[0-9a-f]{64}", file.sha256)
        assert (file.sha256 is None) == (file.sum_from == "")


def test_what_recipes_and_pages_name_in_assets_is_published():
    known = {file.path for file in PUBLISHED.values()}
    known |= {str(Path(path).parent) for path in known} | {"assets/sd-vae-ft-ema"}
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *RECIPES.rglob("*.yaml")]
    named = {
        name
        for page in pages
        for name in re.findall(r"(?<![\w/.-])assets/[\w./-]*\w", page.read_text())
    }
    assert len(named) > 5
    assert named <= known


def test_a_family_says_what_a_run_reads_and_the_default_says_what_is_missing(tmp_path):
    family = families()["generator"]
    missing = Asset("model.encoder", str(tmp_path / "x.pth"), "dinov2_b", "a start")
    there = Asset("model.other", __file__, "vgg16", "nothing")

    class Reader(type(family)):
        def assets(self, run):
            return [missing, there]

    assert list(family.missing_files(None)) == []
    (line,) = Reader().missing_files(None)
    assert line.startswith(f"model.encoder: {missing.path} is not a file; needed for a start; ")
    assert f"`{COMMAND} --fetch dinov2_b` gets it" in line
    assert "as assets/dinov2_vitb14_pretrain.pth; then set model.encoder to that" in line


def test_sizes_and_places():
    assert [size_text(n) for n in (0.001, 87, 1218)] == ["1 kB", "87 MB", "1.2 GB"]
    assert names_at("assets/sd-vae-ft-mse") == ["sd_vae_config", "sd_vae_weights"]
    assert names_at("assets/vgg16-397923af.pth") == ["vgg16"]
    assert names_at("assets") == names_at("elsewhere") == []


# --- one download ---------------------------------------------------------------------------------


def test_a_download_is_whole_and_leaves_nothing_beside_it(server, tmp_path):
    path = tmp_path / "deep" / "a.bin"
    found = fetch(f"{server.url}/a.bin", path, file_hash(server.folder / "a.bin"))
    assert path.read_bytes() == BODY
    assert found == file_hash(path)
    assert [child.name for child in path.parent.iterdir()] == ["a.bin"]


def test_an_interrupted_download_goes_on_where_it_was(server, tmp_path):
    path, url = tmp_path / "a.bin", f"{server.url}/a.bin"
    server.break_after = 70_000
    with pytest.raises(StorageError, match=r"ended after 70,000 of 128,000 .*again goes on"):
        fetch(url, path)
    assert not path.exists()
    server.break_after = None
    fetch(url, path)
    assert path.read_bytes() == BODY
    assert server.asked == [("/a.bin", None), ("/a.bin", "bytes=70000-")]


@pytest.mark.parametrize("change", ["another file", "no tag"])
def test_what_may_be_another_file_is_not_continued(server, tmp_path, change):
    path, url = tmp_path / "a.bin", f"{server.url}/a.bin"
    server.tagged, server.break_after = change != "no tag", 70_000
    with pytest.raises(StorageError):
        fetch(url, path)
    server.break_after = None
    other = BODY[::-1] if change == "another file" else BODY
    (server.folder / "a.bin").write_bytes(other)
    fetch(url, path)
    assert path.read_bytes() == other


def test_a_download_that_was_killed_at_its_end_is_taken_as_it_is(server, tmp_path):
    path, url = tmp_path / "a.bin", f"{server.url}/a.bin"
    (tmp_path / "a.bin.part").write_bytes(BODY)
    note = {"url": url, "num_bytes": len(BODY), "validator": '"x"'}
    (tmp_path / "a.bin.part.json").write_text(json.dumps(note))
    fetch(url, path)
    assert (path.read_bytes(), server.asked) == (BODY, [])


def test_a_file_with_another_sum_is_deleted(server, tmp_path):
    with pytest.raises(StorageError, match=r"sent a file whose sha256 is .*, and 00000000 is pub"):
        fetch(f"{server.url}/a.bin", tmp_path / "x" / "a.bin", "00000000")
    assert list((tmp_path / "x").iterdir()) == []


def test_what_the_server_refuses_and_one_that_is_not_there(server, tmp_path):
    path = tmp_path / "x" / "a.bin"
    with pytest.raises(StorageError, match=r"gone\.bin: 404 Not Found$"):
        fetch(f"{server.url}/gone.bin", path)
    server.close()
    with pytest.raises(StorageError, match=r"Connection refused$"):
        fetch(f"{server.url}/a.bin", path)
    assert list(path.parent.iterdir()) == []


def test_two_downloads_of_one_file_do_not_mix(server, tmp_path):
    with (tmp_path / "a.bin.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="another process downloads it"):
            fetch(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert server.asked == []


# --- the command ----------------------------------------------------------------------------------


def test_the_list_says_of_every_file_what_it_is_and_who_needs_it():
    said = typed(assets.main)
    assert said.status == 0
    blocks = re.split(r"\n(?=\w)", said.out)
    assert [block.split()[0] for block in blocks[:-1]] == list(PUBLISHED)
    inception = next(block for block in blocks if block.startswith("inception"))
    assert "unlocks   FID, sFID, IS" in inception
    assert "needed by yamls/eval_sweep.yaml (inception)" in inception
    assert "about 96 MB" in inception
    assert "Apache-2.0" in inception
    assert "sha256    begins with 6726825d (torch-fidelity, in its name)" in inception
    assert PUBLISHED["inception"].url in inception
    critic = next(block for block in blocks if block.startswith("dino_critic"))
    assert "sha256    not known: none is published" in critic
    vae = next(block for block in blocks if block.startswith("sd_vae_weights"))
    grids = [p for p in RECIPES.rglob("*.yaml") if (read_yaml(p).get("space") or {}).get("vae")]
    assert vae.count("(space.vae)") == len(grids) > 5


def own_config(path: Path, **keys: str) -> Path:
    """A tokenizer's configuration that needs VGG16 alone."""
    lines = "".join(f"{key}: {value}\n" for key, value in keys.items())
    path.write_text(
        "task: tokenizer\nrun_name: a\nout: b\nmodel: {size: b}\nobjective: {perceptual: 1.0}\n"
        "data: {path: c}\nlengths: {choices: [256]}\n"
        f"train: {{max_duration: 1ep, global_batch_size: 8}}\n{lines}"
    )
    return path


def test_the_list_of_one_configuration_is_what_it_needs(tmp_path):
    own = own_config(tmp_path / "mine.yaml")
    said = typed(assets.main, own).out
    assert re.findall(r"^(\w+) +(?:there|missing)", said, re.M) == ["vgg16"]
    assert f"needed by {own} (assets.vgg16)" in said


def test_a_file_at_another_place_is_not_fetched_and_one_that_is_not_there_is(served, tmp_path):
    there = own_config(tmp_path / "mine.yaml", assets=f"{{vgg16: {__file__}}}")
    assert f"(assets.vgg16: {__file__}, there)" in typed(assets.main, there).out
    assert typed(assets.main, "--fetch", there, "--yes") == (0, "", "")
    assert served.asked == []
    gone = own_config(tmp_path / "mine.yaml", assets="{vgg16: gone.pth}")
    said = typed(assets.main, "--fetch", gone, "--yes")
    path = PUBLISHED["vgg16"].path
    assert Path(path).is_file()
    assert f"assets.vgg16: gone.pth is not there; set it to {path}" in said.out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["vgg"], "vgg: no file of this name; files: vgg16, "),
        (["--fetch"], "--fetch: name files or configurations"),
        (["--yes"], "--yes: goes with --fetch"),
        (["--fetch", "nothing.yaml"], "nothing.yaml is not a file"),
        (["yamls/pipeline/imagenet256.yaml"], "neither a training (task: "),
        (["--fetch", "--check", "vgg16"], "not allowed with"),
    ],
)
def test_mistakes_are_told(words, text):
    assert text in refusal(assets.main, *words)


def test_nothing_is_fetched_without_being_asked_for(served, monkeypatch):
    said = typed(assets.main, "--fetch", "vgg16", "dino_critic")  # stdin is no terminal here
    assert said.status == 2
    assert "add --yes to download these files" in said.err
    assert f"vgg16: 1 kB from {PUBLISHED['vgg16'].url}\n    licence: torchvision" in said.out
    for answer in ("n\n", "\n", ""):
        terminal = io.StringIO(answer)
        terminal.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr("sys.stdin", terminal)
        assert "nothing was downloaded" in refusal(assets.main, "--fetch", "vgg16")
    assert served.asked == []
    assert list(Path().iterdir()) == []
    terminal = io.StringIO("y\n")
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)
    said = typed(assets.main, "--fetch", "vgg16")
    assert "Download 1 kB into assets/, under these licences?" in said.out
    assert Path("assets/vgg16-397923af.pth").read_text() == "content of vgg16"


def test_what_a_recipe_needs_is_fetched_and_what_is_there_is_not(served):
    Path("assets").mkdir()
    Path("assets/vgg16-397923af.pth").write_text("content of vgg16")
    words = ("--fetch", "yamls/eval_sweep.yaml", "dino_critic", "--yes")
    said = typed(assets.main, *words)
    assert said.status == 0
    assert "vgg16: assets/vgg16-397923af.pth is there already" in said.out
    paths = [PUBLISHED[name].path for name in ("dino_critic", "inception", "adm_imagenet256")]
    assert sorted(path for path, _ in served.asked) == sorted(f"/{Path(p).name}" for p in paths)
    assert all(Path(path).is_file() for path in paths)
    assert f"sha256 {file_hash(paths[1])}, as published in its first 8 digits" in said.out
    assert f"sha256 {file_hash(paths[0])}, not compared: no sum is published" in said.out
    assert typed(assets.main, *words).out.count("is there already") == 4


def test_one_file_that_fails_keeps_no_other_from_coming(served):
    (served.folder / PUBLISHED["vgg16"].name).write_text("something else")
    said = refusal(assets.main, "--fetch", "vgg16", "dinov2_s", "--yes")
    assert "and " + (PUBLISHED["vgg16"].sha256 or "") + " is published" in said
    assert "or get it by other means, and put it at assets/vgg16-397923af.pth" in said
    assert not Path("assets/vgg16-397923af.pth").exists()
    assert Path("assets/dinov2_vits14_pretrain.pth").is_file()


def test_too_little_room_is_told_before_anything_is_asked_for(served, monkeypatch):
    usage = argparse.Namespace(free=10)
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda path: usage)
    assert "1 kB are needed and 0 kB free" in refusal(assets.main, "--fetch", "vgg16", "--yes")
    assert served.asked == []


def test_check_compares_what_lies_there(served):
    typed(assets.main, "--fetch", "inception", "dino_critic", "sd_vae_weights", "--yes")
    good = typed(assets.main, "--check")
    assert good.status == 0
    assert good.out.count("as published") == 2
    assert good.out.count("not compared") == 1
    assert good.out.count("not there") == len(PUBLISHED) - 3
    place = Path(PUBLISHED["sd_vae_weights"].path)
    assert place.parent.name == "sd-vae-ft-mse"
    place.write_text("damaged")
    bad = typed(assets.main, "--check")
    assert bad.status == 2
    assert f"{place}: which is NOT the published one" in bad.err
    assert f"delete it, and `{COMMAND} --fetch sd_vae_weights`" in bad.err
    assert typed(assets.main, "--check", "inception").status == 0
