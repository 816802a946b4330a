"""Choosing K per image, and what that saves."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from lgm_scale import pixels
from lgm_scale.errors import ConfigError
from lgm_scale.evaluation.commands import adaptive
from lgm_scale.evaluation.images import StoredImages
from lgm_scale.evaluation.reconstructions.adaptive import adaptive_saving, default_lengths
from lgm_scale.families.tokenizer.adaptive_length import choose_length
from lgm_scale.families.tokenizer.bundle import load_tokenizer
from lgm_scale.families.tokenizer.config import TokenizerModelConfig
from lgm_scale.families.tokenizer.network import Tokenizer

N = 16


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return pixels.psnr(pixels.to_uint8(images), pixels.to_uint8(others))


def tokenizer(length_control: str = "lgm") -> Tokenizer:
    torch.manual_seed(0)
    net = Tokenizer(
        TokenizerModelConfig(
            size="tiny",
            image_size=16,
            patch_size=4,
            num_base_tokens=N,
            latent_dim=6,
            codebook_size=8,
            length_control=length_control,
        )
    )
    with torch.no_grad():
        net.decoder.out.weight.mul_(30)  # so that images and lengths differ by more than rounding
    return net.eval()


def images(count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    contrast = torch.linspace(0.05, 1, count)[:, None, None, None]
    return (torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1) * contrast


def brute_force(net: Tokenizer, batch: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """PSNR of every image at every length, one image and one length at a time: [B, L]."""
    with torch.no_grad():
        rows = [
            [psnr(image[None], net.reconstruct(image[None], k))[0] for k in lengths]
            for image in batch
        ]
    return torch.tensor(rows, dtype=torch.float64)


def test_psnr_by_hand():
    black = torch.full((1, 3, 4, 4), -1.0)
    one_level = black + 2 / 255
    assert psnr(black, one_level).item() == pytest.approx(20 * math.log10(255))
    assert psnr(black, black + 0.9 / 255 / 2).item() == pytest.approx(
        10 * math.log10(255**2 * 48)
    ), "rounded away: counts as one value one level off"
    assert psnr(black, -black).item() == pytest.approx(0)
    assert psnr(black, -black * 7).item() == pytest.approx(0), "not clipped"
    both = psnr(torch.cat((black, black)), torch.cat((one_level, -black)))
    torch.testing.assert_close(both, torch.tensor([20 * math.log10(255), 0.0]).double())


@pytest.mark.parametrize("length_control", ["lgm", "tome", "truncate"])
@pytest.mark.parametrize("lengths", [None, [4, 9, 12, 16], [12, 5]])
def test_choice_equals_brute_force(length_control, lengths):
    net, batch = tokenizer(length_control), images()
    tried = sorted({*(lengths or range(net.merging.min_tokens, N + 1)), N})
    table = brute_force(net, batch, tried)
    targets = [*table.quantile(torch.tensor([0.3, 0.6, 0.9]).double()).tolist(), 200.0, -9.0]
    seen = set()
    for target in targets:
        choice = net.choose_length(batch, target, lengths)
        for image, row in enumerate(table):
            hits = [k for k, value in zip(tried, row.tolist(), strict=True) if value >= target]
            expected = hits[0] if hits else N
            seen.add(expected)
            assert choice.num_tokens[image] == expected
            assert choice.reached[image] == bool(hits)
            at = table[image, tried.index(expected)]
            torch.testing.assert_close(choice.psnr[image], at, atol=1e-3, rtol=0)
    assert len(seen) >= min(len(tried), 3) - 1, "the case does not tell lengths apart"


def test_images_are_encoded_once_and_decoded_while_open():
    net, batch = tokenizer(), images()
    encoded, decoded = [], []
    net.encoder.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    net.decoder.register_forward_hook(lambda _, args, __: decoded.append(len(args[0])))
    target = float(brute_force(net, batch, [4])[:, 0].median())
    encoded.clear(), decoded.clear()  # type: ignore[func-returns-value]
    choice = net.choose_length(batch, target, [4, 8])
    first = int((choice.num_tokens == 4).sum())
    assert encoded == [6]
    assert 0 < first < 6
    assert decoded[:2] == [6, 6 - first]


def test_the_first_hit_counts_where_psnr_falls_with_length():
    """A made-up decoder: at K = 2 the image itself, at all others black."""
    batch = torch.ones(2, 3, 4, 4)
    z = torch.zeros(2, 8, 1)
    choice = choose_length(
        batch, z, lambda part, k: torch.full((len(part), 3, 4, 4), 1.0 if k == 2 else -1.0),
        30.0, [1, 2, 4, 8],
    )  # fmt: skip
    assert choice.num_tokens.tolist() == [2, 2]
    assert choice.reached.all()


@pytest.mark.parametrize(
    ("lengths", "problem"),
    [([], "empty"), ([4, 17], "17 is above the 16"), ([3], r"3 is outside \[4, 16\]")],
)
def test_wrong_lengths_are_refused(lengths, problem):
    with pytest.raises(ConfigError, match=problem):
        tokenizer().choose_length(images(), 99.0, lengths)


def test_saving_by_hand():
    lengths = [4, 8, 16]
    table = np.array([[20.0, 22.0, 30.0], [10.0, 20.0, 26.0], [5.0, 6.0, 7.0]])
    saving = adaptive_saving(table, lengths, 20.0)
    assert saving.reached == pytest.approx(2 / 3)
    assert saving.mean_tokens == pytest.approx((4 + 8 + 16) / 3)
    assert saving.mean_psnr == pytest.approx((20 + 20 + 7) / 3)
    # Mean PSNR over K is 35/3, 16, 21: 47/3 lies at 12/13 of the way from 4 to 8.
    assert saving.fixed_tokens_equal_psnr == pytest.approx(4 + 4 * 12 / 13)
    assert saving.fixed_tokens_equal_share == pytest.approx(8)


def test_no_fixed_length_may_do_what_the_choice_does():
    saving = adaptive_saving(np.array([[30.0, 20.0], [10.0, 30.0]]), [4, 8], 30.0)
    assert saving.mean_tokens == 6
    assert saving.fixed_tokens_equal_psnr is None
    assert saving.fixed_tokens_equal_share is None


def test_the_command_agrees_with_the_tokenizer(small_pipeline, tmp_path, monkeypatch, capsys):
    out = tmp_path / "adaptive.json"
    options = ["--bundle", small_pipeline.tokenizer, "--images", small_pipeline.images]
    options += ["--lengths", 4, 8, "--target-psnr", 9.5, 99, "--out", out]
    monkeypatch.setattr("sys.argv", ["adaptive", *map(str, options)])
    assert adaptive.main() == 0
    result = json.loads(out.read_text())
    assert result["lengths"] == [4, 8, 16]
    some, none = result["targets"]

    net = load_tokenizer(small_pipeline.tokenizer)
    batch = torch.cat(list(StoredImages(small_pipeline.images, 32).batches()))
    choice = net.choose_length(batch.float() / 127.5 - 1, 9.5, [4, 8])
    assert 0 < some["reached"] < 1
    assert some["reached"] == pytest.approx(float(choice.reached.double().mean()))
    assert some["mean_tokens"] == pytest.approx(float(choice.num_tokens.double().mean()))
    assert some["mean_psnr"] == pytest.approx(float(choice.psnr.mean()), abs=1e-3)
    assert (none["reached"], none["mean_tokens"]) == (0, 16)
    assert "target 99.00 dB, reached by 0.0%: mean K 16.0" in capsys.readouterr().out


def test_default_lengths_end_at_n():
    assert default_lengths(tokenizer()) == [4, 8, 16]
    assert default_lengths(tokenizer("none")) == [16]
