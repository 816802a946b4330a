"""Train the Fashion-MNIST classifier that the evaluation ships.

    python -m experiments.fashion_classifier --out FILE.safetensors [--source DIR] [--epochs N]

The file's metadata has the command, the seed and the accuracy on the 10,000 validation images,
which are looked at once, after the last step: nothing is chosen by them. On one core.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from lgm_scale.data.fashion_mnist import DEBIAN_FOLDER, read_split
from lgm_scale.errors import exit_on_user_error
from lgm_scale.evaluation.features.fashion_mnist import FashionClassifier

BATCH, LARGEST_LR, SHIFT = 128, 4e-3, 1


def load(source: Path, split: str) -> tuple[Tensor, Tensor, str]:
    """Images uint8 [M, 1, 32, 32], labels [M], and the hash of the files."""
    found = read_split(source, split)
    return torch.from_numpy(found.images)[:, None], torch.from_numpy(found.labels), found.sha256


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images; move all of them by up to a pixel, into their black border."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    up, left = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
    return images.roll((up, left), (2, 3))


def train(images: Tensor, labels: Tensor, epochs: int, seed: int) -> FashionClassifier:
    """Train from scratch with AdamW, one cycle of the learning rate."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = FashionClassifier().train()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LARGEST_LR, epochs * steps)
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        order = torch.randperm(len(images), generator=generator)
        for indices in order[: steps * BATCH].split(BATCH):
            batch = augment(images[indices], generator).expand(-1, 3, -1, -1)
            loss = F.cross_entropy(net(batch)[1], labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: loss {total / steps:.4f}, {seconds:.0f} s", flush=True)
    return net.eval()


@torch.inference_mode()
def accuracy(net: FashionClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose class is recognised."""
    found = [net(batch.expand(-1, 3, -1, -1))[1].argmax(1) for batch in images.split(500)]
    return (torch.cat(found) == labels).double().mean().item()


def main(argv: list[str] | None = None) -> None:
    """Train, measure once, write."""
    parser = argparse.ArgumentParser(prog="python -m experiments.fashion_classifier")
    parser.add_argument("--out", type=Path, required=True, help="file of weights to write")
    parser.add_argument("--source", type=Path, default=DEBIAN_FOLDER, help="the four IDX files")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    images, labels, data = load(options.source, "train")
    val_images, val_labels, val_data = load(options.source, "val")
    net = train(images, labels, options.epochs, options.seed)
    found = accuracy(net, val_images, val_labels)
    command = f"python -m experiments.fashion_classifier --out {options.out.name}"
    metadata = {
        "command": f"{command} --epochs {options.epochs} --seed {options.seed}",
        "seed": str(options.seed),
        "accuracy": f"{found:.4f} on {len(val_labels)} validation images",
        "train_sha256": data,
        "val_sha256": val_data,
        "torch": torch.__version__,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), options.out, metadata)
    print(f"{options.out}: accuracy {metadata['accuracy']}")


if __name__ == "__main__":
    exit_on_user_error(main)
