"""What LGM's generator takes from another one's bundle: all but what its new tokenizer decides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lgm_scale.bundle import model_config, read_info
from lgm_scale.errors import LGMError
from lgm_scale.families.lgm.config import LGMModelConfig, LGMRun
from lgm_scale.families.tokenizer.config import RECONSTRUCTION_FILES
from lgm_scale.initial_weights import GeneratorInitialWeights, resize_rows

if TYPE_CHECKING:
    from torch import Tensor

    from lgm_scale.families.lgm.data import LGMLatentDataset


class LGMInitialWeights(GeneratorInitialWeights):
    """Width, depth and channels must agree. Tokenizer, merge tree and statistics are the run's own.

    Positions at another number of base tokens are resized within the blocks (ours).
    """

    adapted = (*GeneratorInitialWeights.adapted, "pos_embed")

    def __init__(self, run: LGMRun, folder: str, info: dict[str, Any]) -> None:
        super().__init__(run, folder, info)
        self.here = run.model
        self.there: LGMModelConfig = model_config(info, "generator", LGMModelConfig, folder)
        self.new = self.new_end_time(self.here.end_time, self.there.end_time)

    @override
    def refused(self) -> Iterator[str]:
        here, there = self.here, self.there
        yield from self.another_size(here.size, there.size)
        if here.latent_dim != there.latent_dim:
            rule = (
                "channels cannot be adapted; a tokenizer of as many is in the bundle itself "
                f"(tokenizer={self.folder})"
            )
            yield self.refuse("model.latent_dim", here.latent_dim, there.latent_dim, rule)

    @override
    def stated(self, dataset: LGMLatentDataset | None = None) -> Iterator[str]:
        yield from super().stated(dataset)
        here, there = self.here.num_base_tokens, self.there.num_base_tokens
        if here != there:
            how = "interpolated" if here > there else "a subset"
            yield (
                f"positions: {here} base tokens here, {there} in the bundle; the table is {how} "
                "along the tokens of each block (ours; a tokenizer's tokens need no order)"
            )
        objective = self.info["training"].get("config", {}).get("objective", {})
        noise, wanted = objective.get("noise_scale"), self.run.objective.noise_scale
        if noise not in (None, wanted):
            yield (
                f"noise: objective.noise_scale is {wanted} here and was {noise} in the bundle; "
                "what was learned at fewer than all tokens has to be learned anew"
            )
        if self.info.get("adapters"):
            lengths = ", ".join(self.info["adapters"])
            yield f"adapters: those of the bundle (K = {lengths}) are left out, its base is taken"
        yield from self._tokenizer(dataset)

    def _tokenizer(self, dataset: LGMLatentDataset | None) -> Iterator[str]:
        try:
            own = read_info(self.run.tokenizer)["files"].get(RECONSTRUCTION_FILES[0])
        except LGMError:  # told with the run's other inputs
            return
        if own != self.info["files"].get(RECONSTRUCTION_FILES[0]):
            yield (
                f"tokenizer: {self.run.tokenizer} is another than the bundle's; the weights do not "
                "know its latents, their statistics and its merge tree"
            )
        elif dataset is not None:
            yield from self._latents(dataset)

    def _latents(self, dataset: LGMLatentDataset) -> Iterator[str]:
        """Where statistics and tree of the same tokenizer's latents are others."""
        from lgm_scale.families.lgm.latent_stats import STATS_NAME, LatentStats
        from lgm_scale.merging.tree import TREE_NAME, MergeTree

        old, new = LatentStats.load(Path(self.folder) / STATS_NAME), dataset.stats
        shift = float(((new.mean - old.mean) / old.std).abs().max())
        ratio = new.std / old.std
        low, high = float(ratio.min()), float(ratio.max())
        if shift > 0 or low != 1 or high != 1:
            yield (
                f"latents: standardised by this data's own statistics, means up to {shift:.2g} "
                f"deviations from the bundle's, deviations {low:.3g} to {high:.3g} times its"
            )
        tree = MergeTree.load(Path(self.folder) / TREE_NAME)
        choices = sorted(set(self.run.lengths.choices))
        cuts = [(k, *(t.assignment(k).labels for t in (tree, dataset.tree))) for k in choices]
        other = [str(k) for k, there, here in cuts if not there.equal(here)]
        if other:
            yield f"merge tree: this data's own, which merges others at K = {', '.join(other)}"

    @override
    def adapt(self, name: str, weight: Tensor, fresh: Tensor, dataset: Any) -> Tensor:
        if name == self.table:
            return super().adapt(name, weight, fresh, dataset)
        blocks = self.here.num_blocks if self.here.num_blocks == self.there.num_blocks else 1
        return resize_rows(weight[0], self.here.num_base_tokens, blocks)[None]
