"""Validation images through the tokenizer at each K: PSNR, and the generator's floor.

    python -m eval.reconstruct --bundle BUNDLE --images MDS --out FILE.json [--lengths 8 16 ...]

No generator can be closer to the validation images than their own reconstructions at that K.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from composer.utils import dist, get_device

from eval.cells import write_json
from eval.chunks import over_chunks
from eval.generate import decode_to_uint8, refuse_broken
from lgm_scale.bundle import load_tokenizer, tokenizer_id
from lgm_scale.data.images import ImageDataset
from lgm_scale.data.latents import TREE_NAME
from lgm_scale.data.manifest import read_manifest
from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.merging import MergeTree
from lgm_scale.models.tokenizer import Tokenizer
from lgm_scale.training.tokenizer import to_unit_range

__all__ = ["Reconstructor", "ignore", "load_images", "psnr"]


def ignore(_: int) -> None:
    """Progress that nobody watches."""


def load_images(folder: str, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All images of an MDS folder, in order: uint8 [M, 3, S, S], labels int64 [M]."""
    count = read_manifest(folder, "images").num_samples
    dataset = ImageDataset(folder, image_size=image_size, train=False, seed=0, batch_size=1)
    items = [dataset[index] for index in range(count)]
    images = torch.stack([item["images"] for item in items]).numpy()
    return images, np.array([int(item["labels"]) for item in items])


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio per image, in dB, of rounded pixels and in float64.

    Two equal images have none; they count as if a single value were one level off.

    Shapes: uint8 [B, 3, S, S] x 2 -> float64 [B].
    """
    difference = a.astype(np.float64) - b.astype(np.float64)
    error = np.square(difference).reshape(len(a), -1).mean(axis=1)
    return 10 * np.log10(255.0**2 / error.clip(min=len(a) / max(1, a.size)))


class Reconstructor:
    """Encodes the images once, on first use, and decodes them at any K.

    Args:
        tokenizer: Frozen, in eval mode.
        tree: Its merge tree.
        images: uint8 [M, 3, S, S].
        batch_size: Images per chunk.
    """

    def __init__(
        self, tokenizer: Tokenizer, tree: MergeTree, images: np.ndarray, batch_size: int
    ) -> None:
        self.tokenizer, self.tree = tokenizer, tree
        self.images, self.batch_size = images, batch_size
        self.device = next(tokenizer.parameters()).device
        self._latents: dict[int, torch.Tensor] = {}  # of this rank's chunks, by first image

    @torch.inference_mode()
    def _encode(self, start: int, stop: int) -> torch.Tensor:
        if start not in self._latents:
            batch = torch.from_numpy(self.images[start:stop]).to(self.device)
            self._latents[start] = self.tokenizer.encode(to_unit_range(batch))
        return self._latents[start]

    @torch.inference_mode()
    def __call__(self, num_tokens: int, done=ignore) -> np.ndarray:
        """All images at K tokens: uint8 [M, 3, S, S], on every rank.

        Raises: DataError naming images that are not finite.
        """
        assignment = self.tree.assignment(num_tokens, self.device)

        def chunk(start: int, stop: int) -> dict[str, np.ndarray]:
            z = assignment.unmerge(assignment.merge(self._encode(start, stop)))
            images, finite = decode_to_uint8(self.tokenizer.decode(z))
            return {"images": images, "finite": finite}

        result = over_chunks(len(self.images), self.batch_size, chunk, done)
        refuse_broken(result["finite"], f"reconstructions at K = {num_tokens}")
        return result["images"]


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.reconstruct",
        description="PSNR of reconstructed images at each token count.",
    )
    parser.add_argument("--bundle", required=True, help="tokenizer or generator bundle")
    parser.add_argument("--images", required=True, metavar="MDS", help="from images_to_mds.py")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="K", help="default: N, N/2, ... to the least"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per step and rank")
    return parser.parse_args(argv)


def main() -> int:
    """Load, reconstruct at each K, write."""
    args = parse_args(sys.argv[1:])
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size: {args.batch_size} must be 1 or more")
    device = get_device(None)
    dist.initialize_dist(device)
    place = torch.device("cuda", dist.get_local_rank()) if device.name == "gpu" else "cpu"
    tokenizer = load_tokenizer(args.bundle, place)
    tree = MergeTree.load(Path(args.bundle) / TREE_NAME)
    lengths = args.lengths
    if lengths is None:
        lengths = [tree.num_base_tokens]
        while lengths[0] // 2 >= tree.num_blocks:
            lengths.insert(0, lengths[0] // 2)
    for k in lengths:
        tree.assignment(k)  # refuse a wrong K before the work
    images, _ = load_images(args.images, tokenizer.image_size)
    reconstruct = Reconstructor(tokenizer, tree, images, args.batch_size)
    means = {str(k): float(psnr(images, reconstruct(k)).mean()) for k in lengths}
    if dist.get_global_rank() == 0:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        result = {"tokenizer_id": tokenizer_id(args.bundle), "num_images": len(images)}
        write_json(Path(args.out), result | {"psnr_db": means})
        print("\n".join(f"K = {k:>4s}   {value:.2f} dB" for k, value in means.items()))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
