"""What an ELIT or SiT takes from another one's bundle, also at another size of the grid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lgm_scale.bundle import model_config
from lgm_scale.families.elit.config import ELITModelConfig, ELITRun, SpaceConfig
from lgm_scale.initial_weights import GeneratorInitialWeights, resize_grid

if TYPE_CHECKING:
    from torch import Tensor

    from lgm_scale.data.epochs import EpochDataset

_PARTS = ("read.", "write.")
_POSITIONS = "read.positions"
_WINDOWS = ("read.queries", "read.offset", "write.offset")


class ELITInitialWeights(GeneratorInitialWeights):
    """Sizes of network, patches and kind of space must agree; image size and interface may differ.

    Positions of tokens are computed. Learned tables of the interface are interpolated (bicubic):
    the latents' positions over the grid, queries and offsets over a window (ours).
    """

    adapted = (*GeneratorInitialWeights.adapted, _POSITIONS, *_WINDOWS)

    def __init__(self, run: ELITRun, folder: str, info: dict[str, Any]) -> None:
        super().__init__(run, folder, info)
        self.here, self.space = run.model, run.space
        self.there: ELITModelConfig = model_config(info, "generator", ELITModelConfig, folder)
        self.old_space: SpaceConfig = model_config(info, "space", SpaceConfig, folder)
        self.new = self.new_end_time(self.here.end_time, self.there.end_time)
        self.new += _PARTS if self.there.interface is None else ()
        self.left = _PARTS if self.here.interface is None else ()

    @override
    def refused(self) -> Iterator[str]:
        here, there = self.here, self.there
        yield from self.another_size(here.size, there.size)
        if here.patch_size != there.patch_size:
            rule = "what a patch holds cannot be adapted; space.image_size may differ"
            yield self.refuse("model.patch_size", here.patch_size, there.patch_size, rule)
        if self.space.kind != self.old_space.kind:
            rule = "pixels and latents are different states"
            yield self.refuse("space.kind", self.space.kind, self.old_space.kind, rule)

    @override
    def stated(self, dataset: EpochDataset | None = None) -> Iterator[str]:
        yield from super().stated(dataset)
        sizes = self.space.image_size, self.old_space.image_size
        if sizes[0] != sizes[1]:
            yield (
                f"positions: images of {sizes[0]} pixels here, {sizes[1]} in the bundle; computed "
                "for the new grid, and the latents' learned ones interpolated"
            )
        if "positions.safetensors" in self.info["files"]:
            yield "positions: the computed ones, not those that its checkpoint's file had"
        yield from self._interface()
        if self.space.kind == "sd_vae" and dataset is not None:
            yield from self._autoencoder(dataset)

    def _interface(self) -> Iterator[str]:
        here, there = self.here.interface, self.there.interface
        if there is None and here is not None:
            yield (
                "interface: the bundle is a SiT; Read and Write start new, so the blocks between "
                "them have no effect at the first step"
            )
        elif here is None and there is not None:
            yield (
                "interface: the bundle is an ELIT; Read and Write are left out, and the blocks "
                "between them have only seen latents"
            )
        elif here is not None and there is not None:
            if here.group_size != there.group_size:
                yield (
                    f"windows: {here.group_size} tokens a side here, {there.group_size} in the "
                    "bundle; queries and offsets are interpolated (ours)"
                )
            for name in ("split", "drop_mode"):
                new, old = getattr(here, name), getattr(there, name)
                if new != old:
                    yield f"interface: {name} is {new} here and was {old} in the bundle"

    def _autoencoder(self, dataset: EpochDataset) -> Iterator[str]:
        from lgm_scale.families.elit.sd_vae import encoder_id, latent_scale

        folder, extra = Path(self.folder) / "vae", dataset.manifest.extra
        found = encoder_id(folder), latent_scale(folder)
        if found != (extra.get("encoder_id"), extra.get("scale")):
            yield (
                f"autoencoder: {self.space.vae} makes other latents than the bundle's; the weights "
                "do not know them"
            )

    @override
    def adapt(self, name: str, weight: Tensor, fresh: Tensor, dataset: Any) -> Tensor:
        if name == self.table:
            return super().adapt(name, weight, fresh, dataset)
        if name in _WINDOWS:
            return resize_grid(weight, round(len(fresh) ** 0.5))
        grid, old = (s.side // self.here.patch_size for s in (self.space, self.old_space))
        if grid == old and weight.shape == fresh.shape:
            return weight
        table = fresh.clone()  # rows beyond the grid are never read
        table[: grid**2] = resize_grid(weight[: old**2], grid)
        return table
