"""ELIT from images to images: grids of latents, training, resume, bundle, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_pipeline import (
    SmallPipeline,
    Steps,
    assert_user_error,
    metrics,
    run_command,
    train_in_process,
)
from small_vae import save_small_vae

from lgm_scale.bundle import read_bundle
from lgm_scale.errors import DataError
from lgm_scale.pipeline import load_pipeline

MODEL = {
    "size": "tiny",
    "patch_size": 1,
    "num_classes": 17,
    "interface": {"split": "declared", "group_size": 2},
}


@pytest.fixture(scope="module")
def vae(small_pipeline) -> Path:
    return save_small_vae(small_pipeline.root / "vae")


@pytest.fixture(scope="module")
def grids(small_pipeline, vae) -> Path:
    """The small pipeline's images as 4 x 4 grids of 4 channels."""
    out = small_pipeline.root / "grids"
    result = run_command(
        "data_tools/encode_latents.py", "--encoder", "sd-vae", "--vae", vae,
        "--images", small_pipeline.images, "--image-size", "32", "--out", out,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return out


def config(pipeline: SmallPipeline, name: str, data: Path, vae: Path, **changes: object) -> Path:
    return pipeline.elit_config(
        pipeline.root / name,
        model=MODEL,
        space={"kind": "sd_vae", "image_size": 32, "vae": str(vae)},
        data={"path": str(data), "num_workers": 0},
        lengths={"choices": [16, 4, 12]},
        **changes,
    )


@pytest.fixture(scope="module")
def trained(small_pipeline, grids, vae) -> Path:
    return train_in_process(config(small_pipeline, "elit", grids, vae))


def test_a_run_records_its_budgets_and_leaves_all_that_makes_images(trained, vae):
    assert [row["num_tokens"] for row in metrics(trained)] == [16, 4, 12] * 3 + [16]
    info = read_bundle(trained / "bundle", "spatial_generator")
    assert info["training"]["steps"] == 10
    pipe = load_pipeline(trained / "bundle")
    images = pipe(["coffee", 3], num_tokens=4, num_steps=3, progress_bar=False)
    assert images.shape == (2, 32, 32, 3)
    weights = "diffusion_pytorch_model.safetensors"
    assert (trained / "bundle/vae" / weights).read_bytes() == (vae / weights).read_bytes()


def test_an_interrupted_run_goes_on_where_it_was(small_pipeline, grids, vae, trained):
    path = config(small_pipeline, "elit-again", grids, vae)
    first, second = Steps(stop=6), Steps()
    with pytest.raises(KeyboardInterrupt):
        train_in_process(path, on_step=first)
    out = train_in_process(path, on_step=second)
    assert sorted(second.seen) == list(range(4, 10))  # the last state is after four steps
    assert [row["loss"] for row in metrics(out)] == [row["loss"] for row in metrics(trained)]
    found, expected = (
        load_file(run / "bundle" / "generator.safetensors") for run in (out, trained)
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_latents_of_a_sequence_are_no_grid(small_pipeline, vae):
    path = config(small_pipeline, "sequence", small_pipeline.latents, vae)
    result = run_command("lgm_scale/train.py", path)
    assert_user_error(result, str(small_pipeline.latents), "a grid", "--encoder sd-vae")


def test_a_grid_is_no_sequence(small_pipeline, grids):
    path = small_pipeline.generator_config(
        small_pipeline.root / "grid-for-dit", data={"path": str(grids), "num_workers": 0}
    )
    with pytest.raises(DataError, match="spatial_latents"):
        train_in_process(path)


def test_latents_of_another_encoder_or_size(small_pipeline, grids, vae):
    other = save_small_vae(small_pipeline.root / "other-vae", seed=1)
    with pytest.raises(DataError, match="was encoded by encoder"):
        train_in_process(config(small_pipeline, "other-encoder", grids, other))
    path = config(small_pipeline, "other-size", grids, vae)
    with pytest.raises(DataError, match="the model wants 4 x 8 x 8"):
        train_in_process(path, "space.image_size=64", "lengths.choices=[64]")


def test_images_are_no_latents_and_other_classes_are_told(small_pipeline, vae):
    with pytest.raises(DataError, match="holds images"):
        train_in_process(config(small_pipeline, "images", small_pipeline.images, vae))
    path = small_pipeline.elit_config(small_pipeline.root / "classes")
    with pytest.raises(DataError, match=r"has 17 classes, model\.num_classes says 16"):
        train_in_process(path, "model.num_classes=16")
