"""LGM's generator as a family: how it is configured, trained, kept and evaluated."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from lgm_scale.bundle import read_info
from lgm_scale.config.loading import to_dict
from lgm_scale.families.base import Companions, Tool
from lgm_scale.families.generator import Evaluated, GeneratorFacts, GeneratorFamily
from lgm_scale.families.lgm.config import (
    DIT_SIZES,
    LGMRun,
    check_features,
    check_latents,
    lgm_rules,
)
from lgm_scale.families.lgm.importers import IMPORTERS
from lgm_scale.families.tokenizer.config import RECONSTRUCTION_FILES
from lgm_scale.sampling.config import outside_lengths

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lgm_scale.data.epochs import StreamOptions
    from lgm_scale.data.manifest import Manifest
    from lgm_scale.families.lgm.data import LGMLatentDataset
    from lgm_scale.families.lgm.network import MergeDiT
    from lgm_scale.families.lgm.training import LGMTrainingModel
    from lgm_scale.families.tokenizer.network import Tokenizer
    from lgm_scale.sampling.config import SamplerConfig
    from lgm_scale.training.model import Rehearsal


class LGMFamily(GeneratorFamily):
    """MergeDiT: a diffusion transformer on the merged latents of a tokenizer, at every K."""

    task: ClassVar[str] = "generator"
    title: ClassVar[str] = "LGM, on merged tokens"
    schema = LGMRun
    takes_mean_flow: ClassVar[bool] = True
    takes_contrast: ClassVar[bool] = True
    fixed_keys: ClassVar[tuple[str, ...]] = (
        "objective.noise_scale",
        "objective.feature_alignment.block",
        "objective.feature_alignment.channels",
    )
    contains: ClassVar[tuple[str, ...]] = ("tokenizer",)
    encoders: ClassVar[dict[str, Tool]] = {
        "lgm": Tool(
            "lgm_scale.families.lgm.encoder:TokenizerEncoder",
            options={
                "--tokenizer": {"metavar": "BUNDLE", "help": "tokenizer bundle"},
                "--features": {
                    "metavar": "CHANNELS",
                    "nargs": "?",
                    "type": int,
                    "const": 0,
                    "help": "also store the features of the tokenizer's encoder, for "
                    "objective.feature_alignment: all channels (also: 0), or so many by a fixed "
                    "random projection; 4 x tokens x CHANNELS bytes an image",
                },
            },
            needed={"--tokenizer": "a tokenizer bundle"},
        )
    }
    reconstruction_files: ClassVar[tuple[str, ...]] = RECONSTRUCTION_FILES
    importers: ClassVar[dict[str, Tool]] = IMPORTERS
    initial_weights: ClassVar[str] = "lgm_scale.families.lgm.initial_weights:LGMInitialWeights"
    pipeline_class: ClassVar[str] = "lgm_scale.families.lgm.pipeline:LGMPipeline"
    about_tokens: ClassVar[str] = (
        "An image is {size} tokens, and a learned tree says which of them to merge. One "
        "diffusion transformer generates at every token count K; here at K = {lengths}, with the "
        "same weights."
    )
    about_noise: ClassVar[str] = (
        "A column starts from one noise, merged like the tokens: its images are attempts at one "
        "picture with fewer or more of them."
    )

    @override
    def rules(self, run: LGMRun) -> Iterator[str]:
        yield from lgm_rules(run)
        yield from super().rules(run)

    @override
    def data_kind(self, run: LGMRun) -> str:
        return "latents"

    @override
    def check_data(self, run: LGMRun, where: str, manifest: Manifest) -> None:
        made_by = read_info(run.tokenizer)["files"].get(RECONSTRUCTION_FILES[0])
        model = run.model
        check_latents(where, manifest, model.num_base_tokens, model.latent_dim, made_by)
        if run.objective.feature_alignment is not None:
            check_features(where, manifest, run.objective.feature_alignment.channels)

    @override
    def bundles(self, run: LGMRun) -> dict[str, tuple[str, str]]:
        base = {} if run.lora is None else {"lora.base": (run.lora.base, self.task)}
        return {"tokenizer": (run.tokenizer, "tokenizer")} | base

    @override
    def mixes_lengths(self, run: LGMRun) -> bool:
        return True

    @override
    def spreads_lengths(self, run: LGMRun) -> bool:
        return run.lengths.per_sample

    @override
    def least_batch(self, run: LGMRun) -> int:
        least, choices = super().least_batch(run), run.lengths.choices
        if not run.lengths.per_sample or least == 1:
            return least
        rarest = min(map(choices.count, choices), default=1)
        return -(-least * len(choices) // rarest)  # so many samples of every K

    @override
    def forward_passes(self, run: LGMRun) -> int:
        # A frozen network's weights need no gradient.
        return super().forward_passes(run) if run.lora is None else 2

    @override
    def dataset(self, run: LGMRun, batch_size: int, options: StreamOptions) -> LGMLatentDataset:
        from lgm_scale.families.lgm.data import LGMLatentDataset
        from lgm_scale.families.tokenizer.bundle import tokenizer_id

        aligned = run.objective.feature_alignment
        return LGMLatentDataset(
            run.data.sources,
            shuffle=True,
            seed=run.seed,
            batch_size=batch_size,
            num_base_tokens=run.model.num_base_tokens,
            latent_dim=run.model.latent_dim,
            tokenizer_id=tokenizer_id(run.tokenizer),
            options=options,
            feature_dim=None if aligned is None else aligned.channels,
        )

    @override
    def libraries(self, run: LGMRun) -> tuple[str, ...]:
        return () if run.lora is None else ("peft",)

    @override
    def network(self, run: LGMRun) -> MergeDiT:
        from lgm_scale.families.lgm.lora import add_adapter
        from lgm_scale.families.lgm.network import build_merge_dit

        net = build_merge_dit(run.model)
        if run.lora is not None:
            add_adapter(net, run.lora.rank, run.lora.alpha)
        return net

    @override
    def companions(self, run: LGMRun) -> Companions:
        from torch import nn

        aligned = run.objective.feature_alignment
        if aligned is None:
            return Companions()
        width = DIT_SIZES[run.model.size].width
        return Companions({"feature alignment": nn.Linear(width, aligned.channels)})

    @override
    def rehearsal(self, run: LGMRun, num_samples: int, num_tokens: int) -> Rehearsal:
        import torch

        from lgm_scale.families.lgm.latent_stats import LatentStats
        from lgm_scale.families.lgm.training import LGMTrainingModel
        from lgm_scale.merging.tree import MergeTree
        from lgm_scale.training.model import Rehearsal

        tokens, dim = run.model.num_base_tokens, run.model.latent_dim
        with torch.device("cpu"):  # any tree will do, but its cuts are numbers
            tree = MergeTree.from_embeddings(torch.randn(tokens, 8), run.model.num_blocks)
            for length in {num_tokens, *run.lengths.choices}:
                tree.assignment(length)  # kept
        stats = LatentStats(torch.empty(dim), torch.empty(dim))
        net, lengths = self.network(run), run.lengths.choices
        objective, aligned = run.objective, run.objective.feature_alignment
        batch = {
            "latents": torch.empty(num_samples, tokens, dim, dtype=torch.float16),
            "labels": torch.empty(num_samples, dtype=torch.int64),
        }
        means = None
        if aligned is not None:  # a step in which it is on
            objective = replace(objective, feature_alignment=replace(aligned, steps=sys.maxsize))
            means = torch.empty(tokens, aligned.channels)
            batch["features"] = torch.empty(num_samples, *means.shape, dtype=torch.float16)
        model = LGMTrainingModel(net, tree, stats, objective, run.seed, lengths, means)
        return Rehearsal(model, batch)

    @override
    def sample_bytes(self, run: LGMRun) -> int:
        aligned = run.objective.feature_alignment
        numbers = run.model.latent_dim + (0 if aligned is None else aligned.channels)
        return 2 * 2 * run.model.num_base_tokens * numbers  # two flips, float16

    @override
    def training_model(self, run: LGMRun, dataset: LGMLatentDataset) -> LGMTrainingModel:
        from lgm_scale.families.lgm.lora import add_adapter
        from lgm_scale.families.lgm.lora_run import load_base
        from lgm_scale.families.lgm.training import LGMTrainingModel

        if run.lora is None:
            net, stats = self.network(run), dataset.stats
        else:
            base = load_base(run, dataset.tree)
            net, stats = base.net, base.stats
            add_adapter(net, run.lora.rank, run.lora.alpha)
        tree, lengths, means = dataset.tree, run.lengths.choices, dataset.feature_means
        return LGMTrainingModel(net, tree, stats, run.objective, run.seed, lengths, means)

    @override
    def export(
        self,
        run: LGMRun,
        folder: Path,
        model: Any,
        dataset: LGMLatentDataset,
        average: dict[str, Tensor],
        training: dict[str, Any],
    ) -> None:
        from lgm_scale.families.lgm.bundle import save_lgm_bundle
        from lgm_scale.families.lgm.lora_run import export_adapter

        if run.lora is not None:
            export_adapter(folder, run, average, training)
            return
        classes = dataset.manifest.classes
        save_lgm_bundle(folder, run.model, average, dataset.stats, classes, run.tokenizer, training)

    @override
    def reconstructor(self, folder: str | Path, device: torch.device | str) -> Tokenizer:
        from lgm_scale.families.tokenizer.bundle import load_tokenizer

        return load_tokenizer(folder, device)

    @override
    def facts(self, info: dict[str, Any], folder: str) -> GeneratorFacts:
        tokenizer, generator = info["models"]["tokenizer"], info["models"]["generator"]
        pairs = {
            "latent_dim": "latent_dim",
            "num_base_tokens": "num_base_tokens",
            "num_codebooks": "num_blocks",
        }
        problems = [
            f"bundle: {folder} has a tokenizer with {ours} {tokenizer[ours]} and a generator with "
            f"{theirs} {generator[theirs]}: they do not belong together; export the bundle again"
            for ours, theirs in pairs.items()
            if tokenizer[ours] != generator[theirs]
        ]
        return GeneratorFacts(tokenizer["image_size"], generator["num_classes"], tuple(problems))

    @override
    def length_problems(
        self, info: dict[str, Any], folder: str, cells: Iterable[tuple[int, SamplerConfig]]
    ) -> Iterator[str]:
        tokenizer = info["models"]["tokenizer"]
        lengths = sorted({num_tokens for num_tokens, _ in cells})
        low, high = tokenizer["num_codebooks"], tokenizer["num_base_tokens"]
        yield from (f"cells: {text}" for text in outside_lengths(lengths, low, high))

    @override
    def described_models(self, run: LGMRun) -> dict[str, Any]:
        from lgm_scale.bundle import read_bundle

        tokenizer = read_bundle(run.tokenizer, "tokenizer")["models"]["tokenizer"]
        return {"tokenizer": tokenizer, "generator": to_dict(run.model)}

    @override
    def evaluated(
        self, run: LGMRun, dataset: LGMLatentDataset, info: dict[str, Any], device: torch.device
    ) -> Evaluated:
        from lgm_scale.bundle import read_bundle
        from lgm_scale.families.lgm.bundle import LGMBundle
        from lgm_scale.families.tokenizer.bundle import load_tokenizer

        files = read_bundle(run.tokenizer, "tokenizer")["files"]
        bundle = LGMBundle(
            net=self.network(run).eval().requires_grad_(False),
            tokenizer=load_tokenizer(run.tokenizer, device),
            tree=dataset.tree,
            stats=dataset.stats,
            classes=dataset.manifest.classes,
            info=info,
        )
        own = {name: files[name] for name in RECONSTRUCTION_FILES}
        return Evaluated(bundle, reconstruction=own)
