"""Bundles on the model hub, against a server of this machine that speaks its protocol."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml
from hub_server import READER, WRITER, HubServer, Repository
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from small_elit import make_elit_bundle
from small_pipeline import ROOT
from small_sweep import make_sweep_inputs, sweep_config
from typed_commands import Said, refusal, typed

from lgm_scale import publish, sample
from lgm_scale.bundle import local_bundle, push_to_hub, read_info
from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.evaluation.report.writing import write_report
from lgm_scale.evaluation.sweep.measure import measure
from lgm_scale.pipeline import load_image_tokenizer, load_pipeline

NAME = "some-one/small.dit"
WORDS = ("--license", "apache-2.0", "--data-license", "noise; no terms")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = make_sweep_inputs(tmp_path_factory.mktemp("made"))
    make_elit_bundle(folder / "elit")
    return folder


@pytest.fixture(scope="module")
def swept(made, tmp_path_factory) -> Path:
    """A finished sweep of the generator, with its report."""
    out = tmp_path_factory.mktemp("swept") / "report"
    measure(sweep_config(made, out))
    write_report(out)
    return out


def address(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    """What HF_ENDPOINT does where the library is not imported yet."""
    patch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[HubServer]:
    """A server, a token that may write, an empty cache, and no folder that a name could mean."""
    with HubServer() as server:
        address(monkeypatch, server.address)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(_http, "time", mock.Mock(sleep=lambda seconds: None))  # of retries
        monkeypatch.chdir(tmp_path)
        yield server


def published(bundle: Path, *words: str | Path, name: str = NAME) -> Said:
    said = typed(publish.main, bundle, name, *WORDS, *words)
    assert said.status == 0, said
    assert WRITER not in said.out + said.err
    return said


def fault(hub: HubServer, name: str = NAME, revision: str | None = None) -> str:
    """What is said instead of a pipeline: one line without the token."""
    with pytest.raises(CheckpointError) as error:
        load_pipeline(name, "cpu", revision=revision)
    assert "\n" not in str(error.value)
    assert WRITER not in str(error.value)
    return str(error.value)


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dit", "elit"])
def test_a_published_pipeline_makes_the_same_images(made, hub, kind, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # progress bars as on a terminal
    said = published(made / kind)
    assert said.out == f"{hub.address}/{NAME}\n"
    files = hub.repositories[NAME].files()
    info = read_info(made / kind)
    assert files.keys() == {"bundle.json", "README.md", *info["files"]}
    assert all(files[name] == (made / kind / name).read_bytes() for name in info["files"])
    pipe, local = load_pipeline(NAME, "cpu"), load_pipeline(made / kind, "cpu")
    images = [each([0, "eel"], 8, num_steps=3, progress_bar=False) for each in (pipe, local)]
    assert np.array_equal(*images)
    told = capsys.readouterr().err
    assert f"{NAME}: no folder here; bundle.json of {hub.address}/{NAME} at revision main" in told
    assert "generator.safetensors: 100%" in told  # a progress bar
    assert "README.md" not in hub.downloads()
    before = len(hub.downloads())
    load_pipeline(NAME, "cpu")
    assert len(hub.downloads()) == before  # from the cache


def test_a_command_of_its_own_takes_the_variables_of_the_library(made, hub):
    """Its first half is test_start's business: torch is not imported for it."""
    done = subprocess.run(
        [sys.executable, "-m", "lgm_scale.publish", made / "dit", NAME, *WORDS],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HF_TOKEN": WRITER}
        | {"HF_ENDPOINT": hub.address, "HF_HOME": "hf"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{hub.address}/{NAME}\n"), done.stderr
    assert load_pipeline(NAME, "cpu").kind == "generator"
    assert WRITER not in done.stderr


def test_a_tokenizer_and_the_sample_command(made, hub, tmp_path):
    published(made / "tokenizer", name="some-one/tokenizer")
    tokenizer, files = load_image_tokenizer("some-one/tokenizer")
    assert files == read_info(made / "tokenizer")["files"]
    assert tokenizer.num_base_tokens == 16
    published(made / "dit")
    words = ("--classes", "dog", "--num-steps", "3", "--device", "cpu", "--out", "grid.png")
    assert typed(sample.main, NAME, *words).status == 0
    assert (tmp_path / "grid.png").is_file()


def test_a_revision_is_a_branch_or_a_commit(made, hub):
    published(made / "elit")
    repository = hub.repositories[NAME]
    first = repository.branches["old"] = repository.branches["main"]
    published(made / "dit")
    assert load_pipeline(NAME, "cpu").kind == "generator"
    for revision in ("old", first):
        assert load_pipeline(NAME, "cpu", revision=revision).kind == "spatial_generator"
    assert local_bundle(NAME, first).name == first


def test_nothing_but_the_bundles_files_is_taken(made, hub):
    published(made / "dit")
    hub.repositories[NAME].commit({"pytorch_model.bin": b"a pickle", "code.py": b"print()"})
    folder = local_bundle(NAME)
    names = {path.name for path in folder.iterdir()}
    assert names == {"bundle.json", *read_info(made / "dit")["files"]}


def test_files_in_folders_keep_their_place(made, hub):
    files = {path.name: path.read_bytes() for path in (made / "elit").iterdir()}
    info = json.loads(files["bundle.json"])
    info["files"]["vae/config.json"] = "0" * 64
    repository = hub.repositories[NAME] = Repository()
    changed = {"bundle.json": json.dumps(info).encode(), "vae/config.json": b"{}"}
    repository.commit(files | changed)
    folder = local_bundle(NAME)
    assert (folder / "vae" / "config.json").read_bytes() == b"{}"
    assert folder.name == repository.branches["main"]


def test_what_was_downloaded_is_verified_as_a_local_bundle_is(made, hub):
    published(made / "dit")
    damaged = bytearray((made / "dit" / "generator.safetensors").read_bytes())
    damaged[-1] ^= 1
    hub.repositories[NAME].commit({"generator.safetensors": bytes(damaged)})
    assert "differs from its hash in bundle.json" in fault(hub)


@pytest.mark.parametrize(
    ("file", "text"), [("code.py", "only .safetensors and .json files"), ("../x.json", "damaged")]
)
def test_a_list_of_other_files_is_refused_before_any_is_taken(made, hub, file, text):
    info = read_info(made / "dit")
    info["files"][file] = "0" * 64
    repository = hub.repositories[NAME] = Repository()
    repository.commit({"bundle.json": json.dumps(info).encode(), "code.py": b"print()"})
    assert text in fault(hub)
    assert hub.downloads() == ["bundle.json"]


def test_publishing_again_makes_a_new_commit_of_what_changed(made, hub):
    published(made / "dit", "--private")
    assert hub.repositories[NAME].private
    uploads = len(hub.large)
    published(made / "dit", "--picture", _picture(made))
    assert len(hub.repositories[NAME].commits) == 2
    assert len(hub.large) == uploads + 1
    assert "pictures.png" in hub.repositories[NAME].files()


def _picture(made: Path) -> Path:
    return next((made / "photos").rglob("*.png"))


def test_a_damaged_bundle_is_not_published(made, hub, tmp_path):
    shutil.copytree(made / "elit", tmp_path / "elit")
    (tmp_path / "elit" / "generator.safetensors").write_bytes(b"")
    assert "differs from its hash" in refusal(publish.main, "elit", NAME, *WORDS)
    with pytest.raises(CheckpointError, match="differs from its hash"):
        push_to_hub(tmp_path / "elit", NAME, "---\nlicense: mit\n---\n")
    assert hub.requests == []


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_folder_is_a_folder(made, hub, tmp_path):
    (tmp_path / "some-one" / "small.dit").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"some-one/small\.dit is no bundle"):
        load_pipeline(NAME)
    with pytest.raises(CheckpointError, match="some-one/other is no bundle"):
        load_pipeline("some-one/other")  # a typing error in a path
    with pytest.raises(CheckpointError, match="revision: 'main' goes with a repository of the hub"):
        load_pipeline(made / "dit", revision="main")
    assert hub.requests == []


def test_faults_of_a_download(made, hub, monkeypatch):
    assert "neither a folder here, nor a repository of http" in fault(hub)
    published(made / "dit", "--private")
    assert "has no 'v2'; name a branch, a tag or a commit" in fault(hub, revision="v2")
    monkeypatch.setenv("HF_TOKEN", "hf_tokenOfNobody")
    assert "answered 401: the token is not valid; `hf auth login`" in fault(hub)
    monkeypatch.delenv("HF_TOKEN")
    assert "for a private one `hf auth login` or HF_TOKEN" in fault(hub)
    hub.repositories["some-one/else"] = Repository()
    hub.repositories["some-one/else"].commit({"config.json": b"{}"})
    assert "some-one/else is no bundle of this project" in fault(hub, "some-one/else")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address(monkeypatch, f"http://127.0.0.1:{port}")
    said = fault(hub)
    assert f"http://127.0.0.1:{port} cannot be reached (ConnectionError); check the network" in said


def test_a_cached_revision_needs_no_network(made, hub, monkeypatch):
    published(made / "dit")
    load_pipeline(NAME, "cpu")
    address(monkeypatch, "http://127.0.0.1:9")
    assert load_pipeline(NAME, "cpu").kind == "generator"


def test_faults_of_publishing(made, hub, monkeypatch):
    words = (made / "dit", NAME, *WORDS)
    monkeypatch.setenv("HF_TOKEN", READER)
    said = refusal(publish.main, *words)
    assert "answered 403: the token may not do this" in said
    assert READER not in said
    monkeypatch.setenv("HF_TOKEN", "hf_tokenOfNobody")
    assert "answered 401: the token is not valid" in refusal(publish.main, *words)
    monkeypatch.delenv("HF_TOKEN")
    asked = len(hub.requests)
    assert f"no token for {hub.address}: make one" in refusal(publish.main, *words)
    assert len(hub.requests) == asked
    monkeypatch.setenv("HF_TOKEN", WRITER)
    address(monkeypatch, "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached (ConnectionError)" in refusal(publish.main, *words)
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["no-slash", *WORDS], "name: 'no-slash' names no repository; write owner/name"),
        ([NAME, *WORDS[2:]], "the following arguments are required: --license"),
        ([NAME, *WORDS[:2]], "the following arguments are required: --data-license"),
        ([NAME, *WORDS, "--license", "My Own"], "--license: 'My Own' is no identifier of the hub"),
        ([NAME, *WORDS, "--data-license", " "], "--data-license: it is empty"),
        ([NAME, *WORDS, "--results", "nowhere"], "nowhere/results.json is missing"),
        (
            [NAME, *WORDS, "--picture", "a.png"],
            "--picture: a.png is no PNG file (FileNotFoundError)",
        ),
        (["-some/.one", *WORDS], "no name of a repository"),
    ],
)
def test_mistakes_are_told_before_the_hub_is_asked(made, hub, words, text):
    first = [made / "dit", "--", *words[:1]] if words[0].startswith("-") else [made / "dit"]
    rest = words if first == [made / "dit"] else []
    if rest == []:
        first = [*words[1:], "--", made / "dit", words[0]]
    assert text in refusal(publish.main, *first, *rest)
    assert hub.requests == []


# --- the card -------------------------------------------------------------------------------------


def test_the_card_has_the_reports_numbers_under_the_reports_names(made, swept, hub):
    published(made / "dit", "--results", swept / "results.json")
    files = hub.repositories[NAME].files()
    card = files["README.md"].decode()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {
        "license": "apache-2.0",
        "library_name": "lgm-scale",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["lgm-scale", "generator", "image-generation", "variable-length"],
    }
    tables = [line for line in (swept / "results.md").read_text().splitlines() if line[:1] == "|"]
    assert len(tables) == 2 * (2 + 3)
    assert [line for line in card.splitlines() if line[:1] == "|"] == tables
    assert "(not FID), 11 images" in card
    assert "Reference: validation images." in card
    assert files["pictures.png"] == (swept / "samples.png").read_bytes()
    assert "](pictures.png)" in card
    assert "- Weights: apache-2.0\n- Training images: noise; no terms\n" in card
    assert 'pipe = load_pipeline("some-one/small.dit")' in card


def test_the_card_says_how_it_was_trained_and_what_is_not_stated(made):
    def lines(training: dict[str, Any]) -> list[str]:
        return list(publish._training(training))

    train = {"global_batch_size": 64}
    config = {"run_name": "r", "seed": 3, "train": train, "data": {"num_samples": 5000}}
    said = lines({"steps": 600, "weights": "ema", "config": config})
    assert said[0].startswith("Recipe: r (")
    assert said[1] == "Steps: 600, of 64 samples: 38,400 samples seen (computed)"
    assert said[2:5] == ["Samples in the training set: 5,000", "Seed: 3", "Kept weights: ema"]
    train["batch_scaling"] = "constant_tokens"
    assert lines({"steps": 600, "config": config})[1] == "Steps: 600"
    assert lines({})[1:4] == [
        "Steps: not stated", "Samples in the training set: not stated", "Seed: not stated",
    ]  # fmt: skip
    origin = {"imported": {"file": "xl.pth", "release": "LGM"}}
    assert "Imported from xl.pth of the LGM release" in lines(origin)
    card = publish.model_card(made / "dit", NAME, "mit", "not stated")
    assert "Nothing is stated: no results of a sweep were given." in card
    assert "- Steps: 60\n" in card


def test_results_of_other_weights_are_refused(made, swept, hub):
    results = json.loads((swept / "results.json").read_text())
    with pytest.raises(ConfigError, match=r"other weights: generator\.safetensors is not the one"):
        publish.model_card(made / "elit", NAME, "mit", "not stated", results)
    said = refusal(publish.main, made / "elit", NAME, *WORDS, "--results", swept)
    assert "give the sweep of this bundle, or leave --results out" in said
    assert hub.requests == []


def test_a_tokenizers_card_shows_its_reconstructions_alone(made, swept, hub):
    words = ("--results", swept, "--dry-run")
    said = published(made / "tokenizer", *words).out
    assert "pipeline_tag: image-to-image" in said
    assert "### Reconstructions, 15 images" in said
    assert "### Samples" not in said
    assert f"{NAME} would hold: bundle.json, " in said
    assert "pictures.png, README.md" in said
    assert hub.requests == []
