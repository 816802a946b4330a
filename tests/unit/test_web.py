"""What the web page does, without a browser: its numbers are the pipeline's, mistakes are told."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch
from PIL import Image
from small_elit import BUDGETS
from typed_commands import refusal

from lgm_scale import web
from lgm_scale.errors import ConfigError, DataError
from lgm_scale.pipeline import load_image_tokenizer, load_pipeline
from lgm_scale.pixels import to_uint8, to_unit_range


def test_the_slider_has_every_length_of_the_bundle(bundles):
    assert web.token_counts(load_pipeline(bundles / "dit", "cpu")) == list(range(4, 17))
    assert tuple(web.token_counts(load_pipeline(bundles / "elit", "cpu"))) == BUDGETS


@pytest.mark.parametrize("kind", ["dit", "elit"])
def test_pictures_and_work_are_those_of_the_pipeline(bundles, kind):
    pipe = load_pipeline(bundles / kind, "cpu")
    images, said = web.sample(pipe, 8, "eel", 3, 2, 1.5, 4)
    expected = pipe(["eel"] * 2, 8, 1.5, 3, num_steps=4, progress_bar=False)
    assert np.array_equal(images, np.asarray(expected))
    gflops = pipe.image_flops(pipe.config(8, 1.5, num_steps=4), 8) / 1e9
    assert said.startswith(f"**{gflops:.4g} GFLOPs per image** at K = 8: ")
    assert web.sample(pipe, 16, "eel", 3, 1, 1.5, 4)[1].endswith("100% of the operations at K = 16 "
                                                                 "with these settings")  # fmt: skip
    with pytest.raises(ConfigError):
        web.sample(pipe, 17, "eel", 3, 1, 1.5, 4)


def test_a_reconstruction_is_the_tokenizers(bundles, tmp_path):
    tokenizer, _ = load_image_tokenizer(bundles / "tokenizer")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    seen, result, said = web.reconstruct(tokenizer, str(tmp_path / "wide.png"), 5)
    assert np.array_equal(seen, pixels[:, 4:20])
    with torch.inference_mode():
        z = tokenizer.encode(to_unit_range(torch.from_numpy(seen).permute(2, 0, 1)[None]))
        decoded = to_uint8(tokenizer.decode(tokenizer.merging.full_length(z, 5)))[0]
    assert np.array_equal(result, decoded.permute(1, 2, 0).numpy())
    error = np.mean((seen.astype(float) - result) ** 2)
    assert said == f"**PSNR {10 * np.log10(255**2 / error):.2f} dB** at K = 5"
    (tmp_path / "no.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="the picture cannot be read as an image"):
        web.reconstruct(tokenizer, str(tmp_path / "no.png"), 5)


def test_mistakes_are_one_line(bundles, monkeypatch):
    assert "nowhere is no bundle" in refusal(web.main, "nowhere")
    assert "--port: 99999 must be from 0 to 65535" in refusal(web.main, "x", "--port", "99999")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = refusal(web.main, bundles / "dit", "--port", port)
        assert (
            f"--port: {port} of 127.0.0.1 cannot be had (Address already in use); --port 0" in said
        )
    said = refusal(web.main, bundles / "dit", "--host", "256.0.0.1", "--port", "0")
    assert "--port: 0 of 256.0.0.1 cannot be had (" in said
    monkeypatch.setattr(web, "find_spec", lambda name: None)
    said = refusal(web.main, bundles / "dit")
    assert "needs Gradio, which is not installed: pip install 'lgm-scale[web]'" in said
