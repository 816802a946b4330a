"""What a tokenizer takes from another one's bundle: all but what a new size of image asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lgm_scale.bundle import model_config
from lgm_scale.families.tokenizer.config import TokenizerModelConfig, TokenizerRun
from lgm_scale.initial_weights import InitialWeights, resize_grid, resize_rows

if TYPE_CHECKING:
    from torch import Tensor

_PATCHES = ("encoder.vit.pos_embed", "decoder.vit.pos_embed")
_TOKENS = ("encoder.latent_tokens", "encoder.latent_pos_embed", "decoder.latent_pos_embed")
_EMBEDDINGS = "merging.embeddings"
_TREE = {
    (True, True): "; its merge tree is taken",
    (True, False): "; the merge tree starts new",
    (False, True): "; its merge tree is left out",
    (False, False): "",
}
"""What becomes of the tree: by whether the tokenizer here, and that of the bundle, has one."""
_FIXED = {
    "size": "width, depth and heads cannot be adapted",
    "patch_size": "what a patch holds cannot be adapted; image_size may differ",
    "latent_dim": "channels cannot be adapted",
    "quantizer": "what the decoder reads cannot be adapted",
    "num_codebooks": "codebooks cannot be adapted",
    "codebook_size": "codebooks cannot be adapted",
}


class TokenizerInitialWeights(InitialWeights):
    """Sizes of network and codebooks must agree; image size, N and length control may differ.

    Positions of patches are interpolated (bicubic, as for pretrained vision transformers), rows of
    tokens resized within the codebooks' segments (ours).
    """

    adapted = (*_PATCHES, *_TOKENS, _EMBEDDINGS)
    new = ("merging.",)
    left = ("merging.",)

    def __init__(self, run: TokenizerRun, folder: str, info: dict[str, Any]) -> None:
        super().__init__(run, folder, info)
        self.here = run.model
        self.there: TokenizerModelConfig = model_config(
            info, "tokenizer", TokenizerModelConfig, folder
        )

    @override
    def refused(self) -> Iterator[str]:
        for name, rule in _FIXED.items():
            here, there = getattr(self.here, name), getattr(self.there, name)
            if here != there:
                yield self.refuse(f"model.{name}", here, there, rule)

    @override
    def stated(self, dataset: Any = None) -> Iterator[str]:
        yield from super().stated(dataset)
        here, there, objective = self.here, self.there, self.run.objective
        if here.image_size != there.image_size:
            yield (
                f"positions of patches: images of {here.image_size} pixels here, "
                f"{there.image_size} in the bundle; interpolated"
            )
        if here.num_base_tokens != there.num_base_tokens:
            how = "interpolated" if here.num_base_tokens > there.num_base_tokens else "a subset"
            fixed = "; the fixed tree starts new" if here.length_control == "fixed" else ""
            yield (
                f"tokens: {here.num_base_tokens} here, {there.num_base_tokens} in the bundle; "
                f"queries, positions and merge embeddings are {how} along the tokens of each "
                f"codebook (ours; tokens need no order){fixed}"
            )
        controls = here.length_control, there.length_control
        if controls[0] != controls[1]:
            trees = ("lgm", "fixed")
            about = _TREE[controls[0] in trees, controls[1] in trees]
            yield f"length control: {controls[0]} here, {controls[1]} in the bundle{about}"
        elif here.dropped_tokens != there.dropped_tokens:
            yield (
                f"dropped tokens: {here.dropped_tokens} here, {there.dropped_tokens} in the "
                "bundle; a learned one starts at zero"
            )
        if here.latent_init != there.latent_init:
            yield f"model.latent_init: {here.latent_init} has no effect on weights of a bundle"
        parts = {
            "critic's heads": objective.adversarial,
            "auxiliary decoder": objective.representation,
        }
        started = [name for name, weight in parts.items() if weight > 0]
        if started:
            yield f"for training only, so in no bundle, and new: {', '.join(started)}"

    @override
    def adapt(self, name: str, weight: Tensor, fresh: Tensor, dataset: Any) -> Tensor:
        if name in _PATCHES:
            grid = self.here.image_size // self.here.patch_size
            resized = fresh.clone()
            resized[0, :1], resized[0, 1:] = weight[0, :1], resize_grid(weight[0, 1:], grid)
            return resized
        segments, count = self.here.num_codebooks, self.here.num_base_tokens
        if name != _EMBEDDINGS:
            return resize_rows(weight[0], count, segments)[None]
        drawn = self.here.length_control == "fixed" and len(weight) != count
        return fresh if drawn else resize_rows(weight, count, segments)
