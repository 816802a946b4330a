"""A family that the package does not know: pixels of a few colours, a network of two convolutions.

It is the example of docs/extending.md and the proof that a family needs no change to shared code:
`--import toy_family` registers it, and training, resuming, planning, sampling and sweeps work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lgm_scale.bundle import finish_bundle, read_bundle, start_bundle
from lgm_scale.config.loading import load_config
from lgm_scale.config.schema import STRICT, FlowObjectiveConfig, GeneratorRun
from lgm_scale.data.images import ImageDataset
from lgm_scale.families.base import register
from lgm_scale.families.generator import Evaluated, GeneratorFacts, GeneratorFamily
from lgm_scale.flow import interpolate, velocity_target
from lgm_scale.pipeline import Pipeline
from lgm_scale.pixels import to_unit_range
from lgm_scale.randomness import Purpose, keyed_normal, stream_keys
from lgm_scale.sampling.integration import integrate
from lgm_scale.training.flow_model import FlowModel
from lgm_scale.weights import load_weights, save_weights


@dataclass(frozen=True, kw_only=True)
class ToyModelConfig:
    __pydantic_config__ = STRICT
    image_size: int = 16
    width: int = 8
    num_classes: int = 3


@dataclass(frozen=True, kw_only=True)
class ToyRun(GeneratorRun):
    __pydantic_config__ = STRICT
    task: Literal["toy"]
    model: ToyModelConfig
    objective: FlowObjectiveConfig = field(default_factory=FlowObjectiveConfig)


class ToyNet(nn.Module):
    num_base_tokens = 4  # K says how many of its four blocks run

    def __init__(self, config: ToyModelConfig) -> None:
        super().__init__()
        self.num_classes = self.null_label = config.num_classes
        self.into = nn.Conv2d(3, config.width, 3, padding=1)
        self.label = nn.Embedding(config.num_classes + 1, config.width)
        self.blocks = nn.ModuleList(nn.Conv2d(config.width, config.width, 1) for _ in range(4))
        self.out = nn.Conv2d(config.width, 3, 1)
        self.work = config.image_size**2 * config.width

    def forward(self, z_t: Tensor, t: Tensor, labels: Tensor, num_tokens: int) -> Tensor:
        x = self.into(z_t) + (self.label(labels) * t[:, None])[:, :, None, None]
        for index, block in enumerate(self.blocks):
            x = x + (index < num_tokens) * torch.tanh(block(x))
        return self.out(x)

    def flops(self, num_tokens: int) -> int:
        return 2 * self.work * (27 + 3 + num_tokens * self.label.embedding_dim)

    def block_lengths(self, num_tokens: int) -> set[int]:
        return {num_tokens}


class ToyModel(FlowModel):
    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        keys, t, labels = self.draw(batch)
        z = to_unit_range(batch["images"])
        noise = keyed_normal(keys[Purpose.NOISE], tuple(z.shape[1:]))
        v = self.net(interpolate(z, noise, t), t, labels, batch["num_tokens"])
        return v, velocity_target(z, noise), t

    def loss(self, outputs: tuple[Tensor, Tensor, Tensor], batch: dict[str, Any]) -> Tensor:
        v, target, t = outputs
        return self.noted((v - target).square().flatten(1).mean(1), t)


@dataclass(frozen=True)
class ToyBundle:
    net: ToyNet
    classes: tuple[str, ...]
    info: dict[str, Any]


class ToyPipeline(Pipeline[ToyBundle]):
    kind: ClassVar[str] = "toy"

    @classmethod
    def load(cls, folder: str | Path, device: torch.device) -> ToyBundle:
        info = read_bundle(folder, "toy")
        net = ToyNet(load_config(info["models"]["generator"], ToyModelConfig))
        load_weights(net, Path(folder) / "toy.safetensors")
        return ToyBundle(net.to(device), tuple(info["classes"]), info)

    @property
    def image_size(self) -> int:
        return self.info["models"]["generator"]["image_size"]

    def latents(self, labels, indices, num_tokens, seed, config, on_step=None) -> Tensor:
        net, keys = self.bundle.net, stream_keys(seed, Purpose.SAMPLING_NOISE, 0, indices)
        noise = keyed_normal(keys, (3, self.image_size, self.image_size))
        velocity = lambda z, t, k: net(z, torch.full((len(z),), t), labels, k)  # noqa: E731
        return integrate(noise, velocity, config, num_tokens, on_step=on_step)

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class ToyFamily(GeneratorFamily):
    task, title, schema = "toy", "a toy", ToyRun
    pipeline_class = "toy_family:ToyPipeline"

    def dataset(self, run: ToyRun, batch_size: int, options: Any) -> ImageDataset:
        common = dict(train=True, seed=run.seed, batch_size=batch_size, options=options)
        return ImageDataset(run.data.sources, image_size=run.model.image_size, **common)

    def network(self, run: ToyRun) -> ToyNet:
        return ToyNet(run.model)

    def training_model(self, run: ToyRun, dataset: Any) -> ToyModel:
        return ToyModel(ToyNet(run.model), run.objective, run.seed)

    def export(self, run, folder, model, dataset, average, training) -> None:
        aside = start_bundle(folder)
        save_weights(average, aside / "toy.safetensors")
        models, classes = self.described_models(run), dataset.manifest.classes
        finish_bundle(aside, folder, "toy", models, classes, training)

    def facts(self, info: dict[str, Any], folder: str) -> GeneratorFacts:
        model = info["models"]["generator"]
        return GeneratorFacts(model["image_size"], model["num_classes"])

    def length_problems(self, info, folder, cells) -> Iterator[str]:
        yield from (f"cells: {k} is not 1 to 4" for k, _ in cells if not 1 <= k <= 4)

    def evaluated(self, run: ToyRun, dataset: Any, info: dict[str, Any], device: Any) -> Evaluated:
        net = ToyNet(run.model).eval().requires_grad_(False)
        return Evaluated(ToyBundle(net, dataset.manifest.classes, info))


register(ToyFamily())
