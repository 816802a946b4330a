"""Train a generator on a tokenizer's latents, merged or truncated, and judge its samples.

    python -m benchmarks.latent_generators TOKENIZER_BUNDLE --images MDS --reference FILE
        --out FILE.json [--steps N] [--lengths K ...] [--noise-scale legacy] [--adapter-steps N]

Truncated latents have no merge tree, and the trainer takes none without: a generator of them is
of no use beside one of merged latents, except in this comparison. So here is a loop of its own, in
which everything but the cut is the same for both: network, objective, draws, optimizer, sampler.
The recipe is that of yamls/demo/dit.yaml, with fewer steps. Guidance is about 2 in every token.
With --adapter-steps a LoRA of its own follows for each length, as in the paper's published numbers.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.evaluation.engine.statistics import statistics_of
from lgm_scale.evaluation.features.fashion_mnist import FashionFeatures
from lgm_scale.evaluation.images import StoredImages, spread
from lgm_scale.evaluation.metrics.scores import class_accuracy, frechet_distance
from lgm_scale.evaluation.references.files import load_reference
from lgm_scale.families.lgm.config import LGMObjectiveConfig
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.lora import add_adapter
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.lgm.sampling import initial_noise, sample
from lgm_scale.families.lgm.training import LGMTrainingModel
from lgm_scale.families.tokenizer.bundle import load_tokenizer
from lgm_scale.families.tokenizer.network import Tokenizer
from lgm_scale.flow import NoiseScale
from lgm_scale.merging.tree import MergeAssignment, MergeTree
from lgm_scale.pixels import to_uint8, to_unit_range
from lgm_scale.sampling.config import CFGRescale, SamplerConfig, outside_lengths
from lgm_scale.storage.files import write_json

SHARES = (1, 1, 2, 4, 8)
"""Unless told otherwise steps run at N over these, in turn, as in yamls/demo/dit.yaml."""
CLASSES, BATCH, CHUNK = 10, 64, 100
LARGEST_LR, LEAST_LR, WARMUP, DECAY, RANK = 2e-3, 1e-4, 50, 0.99, 32
SHORTEST = 24
"""Steps of a training, at least: of warm-up, cosine and average something must be left."""


class FirstTokens(MergeTree):
    """The first K of N tokens in place of K clusters: what truncation leaves.

    A kept token stands for itself: size 1, so that attention, noise and loss have no weights.
    """

    def __init__(self, size: int) -> None:
        chain = torch.arange(size - 1)  # never cut; a tree must be one
        merges = torch.stack((size - 2 - chain, (size - 1 + chain)), 1)
        super().__init__(merges, torch.zeros(size - 1), 1)

    @override
    def assignment(self, num_tokens: int, device: torch.device | str = "cpu") -> MergeAssignment:
        size = self.num_base_tokens
        labels = torch.arange(size).clamp_max(num_tokens - 1)  # dropped tokens are filled in later
        sizes = torch.ones(num_tokens, dtype=torch.int64)
        return MergeAssignment(labels, sizes, torch.eye(size, num_tokens)).to(device)


@torch.inference_mode()
def encode(tokenizer: Tokenizer, folder: str, count: int) -> tuple[Tensor, Tensor]:
    """Latents float32 [M, N, D] and labels [M] of `count` images, evenly spaced."""
    images = StoredImages(folder, tokenizer.image_size)
    chosen, parts, labels = spread(len(images), count), [], []
    for start in range(0, len(chosen), CHUNK):
        pixels, found = images.read(chosen[start : start + CHUNK])
        parts.append(tokenizer.encode(to_unit_range(pixels)))
        labels.append(torch.from_numpy(found))
    return torch.cat(parts), torch.cat(labels)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine."""
    warmup = min(WARMUP, steps // 4)
    if step < warmup:
        return LARGEST_LR * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return LEAST_LR + (LARGEST_LR - LEAST_LR) * (1 + math.cos(math.pi * done)) / 2


def train(
    model: LGMTrainingModel,
    latents: Tensor,
    labels: Tensor,
    cycle: Sequence[int],
    steps: int,
    seed: int,
    first_step: int = 0,
) -> None:
    """Train at the lengths of `cycle` in turn; the weights are their moving average at the end.

    Frozen weights stay. What a step draws depends on its number, counted from `first_step`.
    """
    weights = {name: w for name, w in model.net.named_parameters() if w.requires_grad}
    average = {name: value.detach().clone() for name, value in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    decay = min(DECAY, 1 - 6 / steps)  # a short run's average forgets its start, too
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(latents), generator=generator)
        ids, order = order[:BATCH], order[BATCH:]
        batch: dict[str, Any] = {
            "latents": latents[ids], "labels": labels[ids], "sample_ids": ids,
            "step": first_step + step, "num_tokens": cycle[step % len(cycle)],
        }  # fmt: skip
        loss = model.loss(model(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
        optimizer.step()
        for name, value in weights.items():
            average[name].lerp_(value.detach(), 1 - decay)
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}, K = {batch['num_tokens']}: loss {loss.item():.4f}", flush=True)
    model.net.load_state_dict(average, strict=False)  # frozen weights are not in it
    model.net.eval()


def sampler(size: int, num_tokens: int, merged: bool, scale: NoiseScale) -> SamplerConfig:
    """Guidance of about 2 in every token, however the noise is scaled."""
    per_position = merged and scale == NoiseScale.CORRECTED
    return SamplerConfig(
        num_steps=9,
        timestep_shift=0.5,
        cfg_interval=(0.0, 1.0),
        cfg_scale=1 + size / num_tokens if per_position else 2.0,
        cfg_rescale=CFGRescale.PER_POSITION if per_position else CFGRescale.NONE,
    )


@torch.inference_mode()
def generate(
    model: LGMTrainingModel, tokenizer: Tokenizer, num_tokens: int, indices: Tensor, seed: int
) -> Tensor:
    """Samples of classes in turn: uint8 [B, 3, S, S]."""
    cut, net = model.tree.assignment(num_tokens), model.net
    merged = not isinstance(model.tree, FirstTokens)
    noise = initial_noise(seed, indices, cut, net.latent_dim, model.noise_scale)
    config = sampler(net.num_base_tokens, num_tokens, merged, model.noise_scale)
    z = sample(net, noise, indices % CLASSES, net.null_label, cut, config)
    z = z * model.latent_std + model.latent_mean
    # Truncation puts its filler where tokens were dropped; cluster means stay what they are.
    return to_uint8(tokenizer.decode(tokenizer.merging.full_length(z, num_tokens)))


def measure(
    models: Mapping[int, LGMTrainingModel],
    tokenizer: Tokenizer,
    reference: str,
    count: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Classifier distance and class accuracy of `count` samples at each length, by its model."""
    judge, real = FashionFeatures(), load_reference(reference).statistics["fashion_pool"]
    rows = []
    for k, model in sorted(models.items()):
        images = [
            generate(model, tokenizer, k, ids, seed) for ids in torch.arange(count).split(CHUNK)
        ]
        found = judge(torch.cat(images))
        labels = (torch.arange(count) % CLASSES).numpy()
        rows.append({
            "num_tokens": k,
            "fashion_frechet": frechet_distance(statistics_of(found["fashion_pool"]), real),
            "fashion_accuracy": class_accuracy(found["fashion_logits"], labels),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Encode, train, sample, judge, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latent_generators")
    parser.add_argument("tokenizer", help="bundle; with length_control lgm, fixed or truncate")
    parser.add_argument("--images", required=True, metavar="MDS", help="to train on")
    parser.add_argument("--reference", required=True, help="from eval.reference --fashion-mnist")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")
    parser.add_argument("--num-images", type=int, default=10_000)
    parser.add_argument("--lengths", type=int, nargs="+", metavar="K", help="of the steps, in turn")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--noise-scale", default="corrected", choices=[n.value for n in NoiseScale])
    parser.add_argument("--adapter-steps", type=int, help="at each length, after that")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    short = [
        f"--{key}: {steps} must be {SHORTEST} or more"
        for key, steps in (("steps", options.steps), ("adapter-steps", options.adapter_steps))
        if steps is not None and steps < SHORTEST
    ]
    if short:
        raise ConfigError(short)
    tokenizer, start = load_tokenizer(options.tokenizer), time.perf_counter()
    merging = tokenizer.merging
    tree = tokenizer.merge_tree() if merging.has_tree else FirstTokens(tokenizer.num_base_tokens)
    outside = list(outside_lengths(options.lengths or (), tree.num_blocks, tree.num_base_tokens))
    if outside:
        raise ConfigError([f"--lengths: {text}" for text in outside])
    latents, labels = encode(tokenizer, options.images, options.num_images)
    std, mean = torch.std_mean(latents, (0, 1), correction=0)
    torch.manual_seed(options.seed)
    net = MergeDiT.from_size("tiny", tokenizer.latent_dim, tokenizer.num_base_tokens, CLASSES)
    objective = LGMObjectiveConfig(label_dropout=0.1, noise_scale=options.noise_scale)
    model = LGMTrainingModel(net, tree, LatentStats(mean, std), objective, options.seed)
    cycle = options.lengths or [net.num_base_tokens // share for share in SHARES]
    train(model, latents, labels, cycle, options.steps, options.seed)
    models = dict.fromkeys(cycle, model)
    for k in models if options.adapter_steps else ():
        models[k] = copy.deepcopy(model)
        add_adapter(models[k].net, RANK, RANK)
        train(models[k], latents, labels, [k], options.adapter_steps, options.seed, options.steps)
    rows = measure(models, tokenizer, options.reference, options.num_samples, options.seed)
    forward = options.steps * sum(map(net.flops, cycle)) / len(cycle)
    if options.adapter_steps:  # as if nothing were frozen
        forward += options.adapter_steps * sum(map(net.flops, models))
    work = 3 * BATCH * forward
    result = {
        "rows": rows,
        "training_tflops": work / 1e12,
        "run": {"seconds": time.perf_counter() - start},
    }
    write_json(options.out, result)


if __name__ == "__main__":
    exit_on_user_error(main)
