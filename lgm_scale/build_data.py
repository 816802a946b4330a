"""From a configuration to its training set and the loader of a rank."""

from __future__ import annotations

from functools import partial

import torch
from composer.core import DataSpec
from composer.utils import dist

from lgm_scale.config.schema import SpatialRun, TokenizerRun, TrainingRun
from lgm_scale.data.epochs import CheckedLoader, StreamOptions
from lgm_scale.data.images import ImageDataset
from lgm_scale.errors import DataError
from lgm_scale.families.elit.data import SpatialLatentDataset
from lgm_scale.families.elit.sd_vae import encoder_id, latent_scale
from lgm_scale.families.lgm.bundle import tokenizer_id
from lgm_scale.families.lgm.data import LatentDataset
from lgm_scale.training.batch_scaling import ScaledLoader, split_by_tokens
from lgm_scale.training.length_schedule import LengthSchedule
from lgm_scale.training.stopping import ignore_stop_signals

__all__ = ["TrainingDataset", "build_data", "build_dataset"]

TrainingDataset = ImageDataset | LatentDataset | SpatialLatentDataset


def build_dataset(config: TrainingRun) -> TrainingDataset:
    """The training set, checked against the model it is for. Raises: DataError."""
    batch_size = config.train.global_batch_size // dist.get_world_size()
    data = config.data
    options = StreamOptions(data.patience, data.predownload, data.cache_limit)
    if isinstance(config, TokenizerRun):
        dataset = ImageDataset(
            data.sources,
            image_size=config.model.image_size,
            train=True,
            seed=config.seed,
            batch_size=batch_size,
            options=options,
        )
    elif isinstance(config, SpatialRun):
        dataset = _spatial_dataset(config, batch_size, options)
    else:
        dataset = LatentDataset(
            data.sources,
            shuffle=True,
            seed=config.seed,
            batch_size=batch_size,
            num_base_tokens=config.model.num_base_tokens,
            latent_dim=config.model.latent_dim,
            tokenizer_id=tokenizer_id(config.tokenizer),
            options=options,
        )
    _check_counts(config, dataset)
    return dataset


def _spatial_dataset(
    config: SpatialRun, batch_size: int, options: StreamOptions
) -> SpatialLatentDataset | ImageDataset:
    space, data = config.space, config.data
    if space.kind == "pixels":
        return ImageDataset(
            data.sources,
            image_size=space.image_size,
            train=True,
            augment="flip" if space.flip else "none",
            seed=config.seed,
            batch_size=batch_size,
            options=options,
        )
    assert space.vae is not None  # a rule of the configuration
    dataset = SpatialLatentDataset(
        data.sources,
        shuffle=True,
        flip=space.flip,
        seed=config.seed,
        batch_size=batch_size,
        channels=space.channels,
        side=space.side,
        encoder_id=encoder_id(space.vae),
        options=options,
    )
    if dataset.scale != latent_scale(space.vae):
        raise DataError(
            f"{data.sources[0].path} is to be multiplied with {dataset.scale}, but the "
            f"autoencoder {space.vae} divides by {latent_scale(space.vae)}; set space.vae to the "
            "one that encoded"
        )
    return dataset


def _check_counts(config: TrainingRun, dataset: TrainingDataset) -> None:
    where = " + ".join(source.path for source in config.data.sources)
    found, wanted = dataset.epoch_samples, config.data.num_samples
    if wanted is not None and found != wanted:
        raise DataError(
            f"{where} holds {found:,} samples, data.num_samples says {wanted:,}: "
            "the copy is not complete, or the key is wrong"
        )
    if found < config.train.global_batch_size:
        raise DataError(
            f"{where} holds {found:,} samples, fewer than one batch of "
            f"{config.train.global_batch_size:,}: lower train.global_batch_size"
        )
    classes = dataset.manifest.num_classes
    if not isinstance(config, TokenizerRun) and classes != config.model.num_classes:
        raise DataError(
            f"{where} has {classes} classes, model.num_classes says "
            f"{config.model.num_classes}: make them equal"
        )


def build_data(config: TrainingRun, dataset: TrainingDataset, lengths: LengthSchedule) -> DataSpec:
    """The loader of this rank's batches, and how they are counted and split."""
    scaled = config.train.batch_scaling == "constant_tokens"
    loader_class = partial(ScaledLoader, schedule=lengths) if scaled else CheckedLoader
    loader = loader_class(
        dataset,
        batch_size=config.train.global_batch_size // dist.get_world_size(),
        num_workers=config.data.num_workers,
        persistent_workers=config.data.num_workers > 0,
        worker_init_fn=ignore_stop_signals,
        pin_memory=torch.cuda.is_available(),
    )
    return DataSpec(
        loader,
        get_num_samples_in_batch=lambda batch: len(batch["sample_ids"]),
        split_batch=split_by_tokens(lengths) if scaled else None,
    )
