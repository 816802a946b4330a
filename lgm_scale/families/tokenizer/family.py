"""The tokenizer's family: how it is configured, trained and kept."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from lgm_scale.config.schema import ReconstructionsConfig
from lgm_scale.families.base import Companions, Family, Tool
from lgm_scale.families.tokenizer.config import (
    FROM_HUB,
    RECONSTRUCTION_FILES,
    TokenizerRun,
    missing,
    needed_assets,
    tokenizer_rules,
)
from lgm_scale.published import Asset

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lgm_scale.data.epochs import StreamOptions
    from lgm_scale.data.images import ImageDataset
    from lgm_scale.families.tokenizer.critic import CriticHeads
    from lgm_scale.families.tokenizer.network import Decoder, Tokenizer
    from lgm_scale.families.tokenizer.training import TokenizerTrainingModel
    from lgm_scale.training.model import Rehearsal

log = logging.getLogger("lgm_scale")


class TokenizerFamily(Family):
    """LGM's tokenizer: images to latents, and back from any K of them."""

    task: ClassVar[str] = "tokenizer"
    title: ClassVar[str] = "LGM's tokenizer"
    schema = TokenizerRun
    initial_weights: ClassVar[str] = (
        "lgm_scale.families.tokenizer.initial_weights:TokenizerInitialWeights"
    )
    reconstruction_files: ClassVar[tuple[str, ...]] = RECONSTRUCTION_FILES
    importers: ClassVar[dict[str, Tool]] = {
        "tokenizer": Tool(
            "lgm_scale.families.tokenizer.release:run_import", "a checkpoint {model, ema, args}"
        )
    }

    @override
    def rules(self, run: TokenizerRun) -> Iterator[str]:
        yield from tokenizer_rules(run)

    @override
    def reconstructions(self, run: TokenizerRun) -> ReconstructionsConfig | None:
        return run.evaluation

    @override
    def data_kind(self, run: TokenizerRun) -> str:
        return "images"

    @override
    def assets(self, run: TokenizerRun) -> list[Asset]:
        return needed_assets(run)

    @override
    def missing_files(self, run: TokenizerRun) -> Iterator[str]:
        absent = [asset for asset in needed_assets(run) if not asset.present]
        if absent and not run.assets.allow_random_assets:
            yield from missing(absent)

    @override
    def mixes_lengths(self, run: TokenizerRun) -> bool:
        return run.model.length_control == "truncate"

    @override
    def dataset(self, run: TokenizerRun, batch_size: int, options: StreamOptions) -> ImageDataset:
        from lgm_scale.data.images import ImageDataset

        return ImageDataset(
            run.data.sources,
            image_size=run.model.image_size,
            train=True,
            seed=run.seed,
            batch_size=batch_size,
            augment=run.augment,
            crop_on=run.crop_on,
            options=options,
        )

    @override
    def libraries(self, run: TokenizerRun) -> tuple[str, ...]:
        return ("timm",)

    @override
    def network(self, run: TokenizerRun) -> Tokenizer:
        from lgm_scale.families.tokenizer.network import build_tokenizer

        return build_tokenizer(run.model)

    @override
    def companions(self, run: TokenizerRun) -> Companions:
        from lgm_scale.families.tokenizer.assets import build_frozen

        nets = build_frozen(run, read=False)
        trained = {"auxiliary decoder": _auxiliary(run), "critic's heads": _critic(run)}
        return Companions(
            {name: net for name, net in trained.items() if net is not None},
            [net.module for net in nets.all()],
        )

    @override
    def rehearsal(self, run: TokenizerRun, num_samples: int, num_tokens: int) -> Rehearsal:
        import torch

        from lgm_scale.families.tokenizer.assets import build_frozen
        from lgm_scale.families.tokenizer.training import TokenizerTrainingModel
        from lgm_scale.merging.tree import MergeTree
        from lgm_scale.parallel.collectives import mean_over_ranks
        from lgm_scale.training.model import Rehearsal

        net, frozen = self.network(run), build_frozen(run, read=False)
        model = TokenizerTrainingModel(
            *(net, run.objective, run.seed, frozen),
            *(_auxiliary(run), _critic(run), mean_over_ranks),
        )
        if net.merging.has_tree:  # of weights, which are not there: any tree will do
            with torch.device("cpu"):
                embeddings = torch.randn(net.num_base_tokens, 8)
                tree = MergeTree.from_embeddings(embeddings, net.merging.num_blocks)
                tree.assignment(num_tokens)  # kept
            net.merging.start_tree = lambda exploration=None: lambda: tree
        size = run.model.image_size
        images = torch.empty(num_samples, 3, size, size, dtype=torch.uint8)
        return Rehearsal(model, {"images": images}, [net.module for net in frozen.all()])

    @override
    def training_model(self, run: TokenizerRun, dataset: Any) -> TokenizerTrainingModel:
        from lgm_scale.families.tokenizer.assets import build_frozen, load_from_hub
        from lgm_scale.families.tokenizer.training import TokenizerTrainingModel
        from lgm_scale.frozen import load_pretrained
        from lgm_scale.parallel.collectives import mean_over_ranks

        frozen = build_frozen(run)
        if frozen.random_assets:
            log.warning(
                "RANDOM WEIGHTS stand in for %s: a trial, its losses and its result mean nothing",
                ", ".join(frozen.random_assets),
            )
        net = self.network(run)
        pretrained = run.model.pretrained_encoder
        if pretrained == FROM_HUB:
            load_from_hub(net.encoder.vit, run.model.size)
        elif pretrained is not None and "model.pretrained_encoder" not in frozen.random_assets:
            load_pretrained(net.encoder.vit, pretrained)
        return TokenizerTrainingModel(
            net, run.objective, run.seed, frozen, _auxiliary(run), _critic(run), mean_over_ranks
        )

    @override
    def export(
        self,
        run: TokenizerRun,
        folder: Path,
        model: TokenizerTrainingModel,
        dataset: Any,
        average: dict[str, Tensor],
        training: dict[str, Any],
    ) -> None:
        from lgm_scale.families.tokenizer.bundle import save_tokenizer_bundle

        net = self.network(run)  # a plain one: the trained one may be sharded
        weights = net.state_dict() | average
        net.load_state_dict(weights)
        tree = net.merge_tree() if net.merging.has_tree else None
        config = dataclasses.replace(run.model, pretrained_encoder=None)
        training = training | {"random_assets": list(model.frozen.random_assets)}
        save_tokenizer_bundle(folder, config, weights, tree, training)

    @override
    def reconstructor(self, folder: str | Path, device: torch.device | str) -> Tokenizer:
        from lgm_scale.families.tokenizer.bundle import load_tokenizer

        return load_tokenizer(folder, device)


def _auxiliary(run: TokenizerRun) -> Decoder | None:
    """The decoder that predicts the teacher's features; None without that loss."""
    if run.objective.representation <= 0:
        return None
    from lgm_scale.families.tokenizer.assets import TEACHER_WIDTHS
    from lgm_scale.families.tokenizer.config import AUXILIARY_SIZE
    from lgm_scale.families.tokenizer.network import Decoder

    model = run.model
    return Decoder(
        AUXILIARY_SIZE,
        model.image_size,
        model.patch_size,
        model.num_base_tokens,
        model.latent_dim,
        TEACHER_WIDTHS[run.assets.dinov2_size],
    )


def _critic(run: TokenizerRun) -> CriticHeads | None:
    """The trained heads of the critic; None without an adversarial loss."""
    if run.objective.adversarial <= 0:
        return None
    from lgm_scale.families.tokenizer.critic import CriticHeads
    from lgm_scale.parallel.collectives import mean_over_ranks

    return CriticHeads(reduce_mean=mean_over_ranks)
