"""ELIT and SiT as a family: how they are configured, trained, kept and evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from lgm_scale.bundle import model_config
from lgm_scale.config.loading import to_dict
from lgm_scale.errors import CheckpointError
from lgm_scale.families.base import Tool
from lgm_scale.families.elit.config import (
    CONFIG_NAME,
    ENCODED_SIZE,
    WEIGHTS_NAME,
    ELITModelConfig,
    ELITRun,
    SpaceConfig,
    check_grids,
    elit_rules,
    length_rules,
    token_lengths,
    vae_file,
)
from lgm_scale.families.generator import Evaluated, GeneratorFacts, GeneratorFamily
from lgm_scale.published import PUBLISHED, Asset
from lgm_scale.release_import import CLASSES_HELP

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lgm_scale.data.epochs import EpochDataset, StreamOptions
    from lgm_scale.data.manifest import Manifest
    from lgm_scale.families.elit.network import SiT
    from lgm_scale.families.elit.training import ELITTrainingModel
    from lgm_scale.sampling.config import SamplerConfig
    from lgm_scale.training.model import Rehearsal


class ELITFamily(GeneratorFamily):
    """ELIT and its host SiT: the state is a grid at every K, the core of the network shrinks."""

    task: ClassVar[str] = "spatial_generator"
    title: ClassVar[str] = "ELIT or SiT, on a grid"
    schema = ELITRun
    takes_mean_flow: ClassVar[bool] = True
    takes_contrast: ClassVar[bool] = True
    encoders: ClassVar[dict[str, Tool]] = {
        "sd-vae": Tool(
            "lgm_scale.families.elit.encoder:AutoencoderEncoder",
            options={
                "--vae": {
                    "metavar": "FOLDER",
                    "help": "autoencoder in the layout of diffusers: a local copy of "
                    "stabilityai/sd-vae-ft-mse or -ema",
                },
                "--image-size": {
                    "type": int,
                    "metavar": "PIXELS",
                    "help": f"side of the centre crop (default: {ENCODED_SIZE})",
                },
            },
            needed={"--vae": "the folder of its autoencoder"},
        )
    }
    importers: ClassVar[dict[str, Tool]] = {
        "elit": Tool(
            "lgm_scale.families.elit.release:run_import",
            "a checkpoint {model, ema} of an ELIT, or of its SiT",
            options={
                "--classes": {"metavar": "FILE", "help": CLASSES_HELP},
                "--vae": {
                    "required": True,
                    "metavar": "FOLDER",
                    "help": "autoencoder that decodes",
                },
                "--split": {
                    "choices": ["released", "declared", "paper"],
                    "default": "released",
                    "help": "blocks before Read and after Write; the checkpoint does not say",
                },
            },
        )
    }
    initial_weights: ClassVar[str] = "lgm_scale.families.elit.initial_weights:ELITInitialWeights"
    pipeline_class: ClassVar[str] = "lgm_scale.families.elit.pipeline:ELITPipeline"
    about_tokens: ClassVar[str] = (
        "An image is a grid of {size} tokens, and K says how many of them the core of one "
        "diffusion transformer works on; its first and last blocks see them all. Here K = "
        "{lengths}, with the same weights."
    )
    about_noise: ClassVar[str] = (
        "A column starts from one noise, the same at every K: its images are attempts at one "
        "picture with less or more work."
    )
    # Published: 50 Euler steps on an even grid, without guidance.
    sampler_defaults: ClassVar[dict[str, Any]] = {
        "cfg_interval": [0.0, 1.0],
        "cfg_rescale": "none",
        "num_steps": 51,
        "timestep_shift": 1.0,
    }

    @override
    def rules(self, run: ELITRun) -> Iterator[str]:
        yield from elit_rules(run)
        yield from super().rules(run)

    @override
    def data_kind(self, run: ELITRun) -> str:
        return "images" if run.space.kind == "pixels" else "spatial_latents"

    @override
    def check_data(self, run: ELITRun, where: str, manifest: Manifest) -> None:
        if run.space.kind == "sd_vae":  # which encoder it was, the data set itself finds out
            check_grids(where, manifest, run.space.channels, run.space.side, None)

    @override
    def assets(self, run: ELITRun) -> list[Asset]:
        names = ("sd_vae_config", "sd_vae_weights") if run.space.vae is not None else ()
        return [
            Asset("space.vae", f"{run.space.vae}/{PUBLISHED[name].name}", name,
                  "images from latents, and latents from images (the autoencoder)")
            for name in names
        ]  # fmt: skip

    @override
    def missing_files(self, run: ELITRun) -> Iterator[str]:
        try:
            for name in (CONFIG_NAME, WEIGHTS_NAME) if run.space.vae is not None else ():
                vae_file(run.space.vae or "", name)
        except CheckpointError as error:
            yield f"space.vae: {error}"

    @override
    def dataset(self, run: ELITRun, batch_size: int, options: StreamOptions) -> EpochDataset:
        from lgm_scale.families.elit.data import training_set

        return training_set(run, batch_size, options)

    @override
    def network(self, run: ELITRun) -> SiT:
        from lgm_scale.families.elit.network import build_elit

        return build_elit(run.model, run.space)

    @override
    def rehearsal(self, run: ELITRun, num_samples: int, num_tokens: int) -> Rehearsal:
        import torch

        from lgm_scale.families.elit.training import ELITTrainingModel
        from lgm_scale.training.model import Rehearsal

        space, labels = run.space, torch.empty(num_samples, dtype=torch.int64)
        shape, pixels = (num_samples, space.channels, space.side, space.side), torch.uint8
        model = ELITTrainingModel(
            self.network(run), None if space.kind == "pixels" else 1.0, run.objective, run.seed
        )
        if space.kind == "pixels":
            return Rehearsal(model, {"images": torch.empty(shape, dtype=pixels), "labels": labels})
        moments = {name: torch.empty(shape, dtype=torch.float16) for name in ("mean", "std")}
        return Rehearsal(model, moments | {"labels": labels})

    @override
    def sample_bytes(self, run: ELITRun) -> int | None:
        space = run.space
        if space.kind == "pixels":
            return None  # compressed
        return 2 * 2 * 2 * space.channels * space.side**2  # two flips, two moments, float16

    @override
    def training_model(self, run: ELITRun, dataset: Any) -> ELITTrainingModel:
        from lgm_scale.families.elit.training import ELITTrainingModel

        scale = dataset.scale if run.space.kind == "sd_vae" else None
        return ELITTrainingModel(self.network(run), scale, run.objective, run.seed)

    @override
    def export(
        self,
        run: ELITRun,
        folder: Path,
        model: Any,
        dataset: EpochDataset,
        average: dict[str, Tensor],
        training: dict[str, Any],
    ) -> None:
        from lgm_scale.families.elit.bundle import save_elit_bundle

        classes, vae = dataset.manifest.classes, run.space.vae
        save_elit_bundle(folder, run.model, run.space, average, classes, training, vae)

    @override
    def facts(self, info: dict[str, Any], folder: str) -> GeneratorFacts:
        model, space = _described(info, folder)
        return GeneratorFacts(space.image_size, model.num_classes)

    @override
    def length_problems(
        self, info: dict[str, Any], folder: str, cells: Iterable[tuple[int, SamplerConfig]]
    ) -> Iterator[str]:
        wanted = {length for num_tokens, config in cells for length in config.lengths(num_tokens)}
        yield from length_rules(wanted, token_lengths(*_described(info, folder)), "cells")

    @override
    def described_models(self, run: ELITRun) -> dict[str, Any]:
        return {"generator": to_dict(run.model), "space": to_dict(run.space)}

    @override
    def evaluated(
        self, run: ELITRun, dataset: EpochDataset, info: dict[str, Any], device: torch.device
    ) -> Evaluated:
        from lgm_scale.families.elit.bundle import ELITBundle
        from lgm_scale.families.elit.sd_vae import load_sd_vae

        vae = None if run.space.vae is None else load_sd_vae(run.space.vae, device)
        net = self.network(run).eval().requires_grad_(False)
        bundle = ELITBundle(net, vae, run.model, run.space, dataset.manifest.classes, info)
        frozen = {} if vae is None else {"vae_sha256": vae.state_dict()}
        return Evaluated(bundle, frozen)


def _described(info: dict[str, Any], folder: str) -> tuple[ELITModelConfig, SpaceConfig]:
    model: ELITModelConfig = model_config(info, "generator", ELITModelConfig, folder)
    space: SpaceConfig = model_config(info, "space", SpaceConfig, folder)
    return model, space
