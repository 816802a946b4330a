"""The image tokenizer: encoder, soft quantizer, merging, decoder.

    image -> N latent tokens -> quantized -> K merged, expanded to N again -> image

What the number of tokens changes is the third arrow alone: encoder and decoder see N at every K.

Source: LGM paper; the SoftVQ backbone on timm vision transformers. Images are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgm_scale.errors import ConfigError
from lgm_scale.families.tokenizer.adaptive_length import LengthChoice, choose_length
from lgm_scale.families.tokenizer.config import TOKENIZER_SIZES, TokenizerModelConfig, TokenizerSize
from lgm_scale.families.tokenizer.length_control import build_length_control
from lgm_scale.families.tokenizer.quantizer import SoftQuantizer
from lgm_scale.merging.tree import MergeTree


class TokenizerOutput(NamedTuple):
    """What the losses read.

    Shapes: reconstruction [B, 3, S, S]; z [B, N, D], quantized and not merged;
    code_logits [num_codebooks, M, codebook_size], None without a quantizer;
    similarity [N, N] of the merge embeddings, None where none are learned;
    decoded_latents [B, N, D], merged and expanded, what the decoder read;
    last_hidden [B, P, C], the input of the decoder's last layer.
    """

    reconstruction: Tensor
    z: Tensor
    code_logits: Tensor | None
    similarity: Tensor | None
    decoded_latents: Tensor
    last_hidden: Tensor


def lattice_positions(grid: int, width: int, extent: float) -> Tensor:
    """2-D sine-cosine table of a grid x grid lattice stretched over [0, extent): [grid^2, C].

    Frequencies fall geometrically from 3 to 0.1 radians per patch, so that neighbours differ.
    Lattices of different density over one extent agree in position.
    """
    count = width // 4
    # In units of image patches, whatever the lattice: half a cell in from its border.
    centres = (torch.arange(grid, dtype=torch.float64) + 0.5) * (extent / grid)
    frequencies = 3.0 * 30.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    angles = centres[:, None] * frequencies  # [grid, C/4]
    axis = torch.cat((angles.sin(), angles.cos()), dim=-1)  # [grid, C/2]
    rows = axis[:, None, :].expand(grid, grid, -1)
    columns = axis[None, :, :].expand(grid, grid, -1)
    return torch.cat((rows, columns), dim=-1).reshape(grid * grid, -1).float()


@torch.no_grad()
def start_aligned(vit: VisionTransformer) -> None:
    """Let attention start as a soft copy of what stands at the same position.

    Keys equal queries (times 2, so that the softmax is peaked where positions agree), and the
    output projection is twice the transpose of the value projection.
    Source: ours, after mimetic initialization (Trockman and Kolter, 2023).
    """
    # Wider than timm's std of .02, under which all tokens would attend evenly.
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
            nn.init.zeros_(module.bias)
    for block in vit.blocks:
        attention: Any = block.attn
        query, key, value = attention.qkv.weight.chunk(3)
        query *= 2.0
        key.copy_(query)  # a logit x W^T W y is largest for tokens alike, so for equal positions
        attention.proj.weight.copy_(2.0 * value.T)


def _vision_transformer(size: TokenizerSize, image_size: int, patch_size: int) -> VisionTransformer:
    """timm's, without a classifier: all tokens come out. Its names fit pretrained files."""
    return VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.num_heads,
        init_values=size.layer_scale,
        num_classes=0,
        global_pool="",
    )


def _with_positions(vit: VisionTransformer, x: Tensor) -> Tensor:
    """Class token in front, positions added. Shapes: [B, P, C] -> [B, 1 + P, C]."""
    cls_token, pos_embed = vit.cls_token, vit.pos_embed
    assert cls_token is not None  # timm's default
    assert pos_embed is not None
    return torch.cat((cls_token.expand(len(x), -1, -1), x), dim=1) + pos_embed


def _run_blocks(vit: VisionTransformer, x: Tensor) -> Tensor:
    """All blocks and the final norm. Shapes: [B, L, C] -> [B, L, C]."""
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)


class Encoder(nn.Module):
    """Image to N latent tokens, which are learned queries that attend to the patches.

    They are no places of the image: each sees all patches and all latents, in every block.

    Shapes: images [B, 3, S, S] in [-1, 1] -> [B, N, C].
    Source: LGM paper, tokenizer; TiTok's latent tokens, as SoftVQ uses them.
    """

    def __init__(
        self, size: TokenizerSize, image_size: int, patch_size: int, num_base_tokens: int
    ) -> None:
        super().__init__()
        self.num_base_tokens = num_base_tokens
        self.vit = _vision_transformer(size, image_size, patch_size)
        self.latent_tokens = nn.Parameter(torch.empty(1, num_base_tokens, size.width))
        self.latent_pos_embed = nn.Parameter(torch.empty(1, num_base_tokens, size.width))
        nn.init.normal_(self.latent_tokens, std=0.02)
        nn.init.trunc_normal_(self.latent_pos_embed, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Run image and latent tokens jointly; keep the latents."""
        x = _with_positions(self.vit, self.vit.patch_embed(images))  # [B, 1 + P, C]
        latents = (self.latent_tokens + self.latent_pos_embed).expand(len(x), -1, -1)
        x = torch.cat((x, latents.to(x.dtype)), dim=1)  # [B, 1 + P + N, C]
        return _run_blocks(self.vit, x)[:, -self.num_base_tokens :]  # [B, N, C]


class Decoder(nn.Module):
    """N latent tokens to per-patch values: pixels, or a teacher's features.

    One mask token stands at every patch, told apart by its position, and gathers from the latents
    what belongs there. The latents' own positions tell apart those that merging has made equal.

    Shapes: [B, N, D] -> values [B, P, out_dim] and the last layer's input [B, P, C].
    Source: LGM paper, tokenizer.
    """

    def __init__(
        self,
        size: TokenizerSize,
        image_size: int,
        patch_size: int,
        num_base_tokens: int,
        latent_dim: int,
        out_dim: int,
    ) -> None:
        super().__init__()
        self.vit = _vision_transformer(size, image_size, patch_size)
        self.num_patches = self.vit.patch_embed.num_patches
        self.vit.patch_embed = nn.Identity()  # it reads no image: no idle weights
        self.latent_in = nn.Linear(latent_dim, size.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, size.width))
        self.latent_pos_embed = nn.Parameter(torch.empty(1, num_base_tokens, size.width))
        self.out = nn.Linear(size.width, out_dim)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.latent_pos_embed, std=0.02)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Run mask tokens and latents jointly; keep the image positions."""
        latents = self.latent_in(z) + self.latent_pos_embed.to(z.dtype)  # [B, N, C]
        masks = self.mask_token.expand(len(z), self.num_patches, -1)
        x = _with_positions(self.vit, masks)  # [B, 1 + P, C]
        x = torch.cat((x.to(latents.dtype), latents), dim=1)  # [B, 1 + P + N, C]
        hidden = _run_blocks(self.vit, x)[:, 1 : 1 + self.num_patches]  # [B, P, C]
        # The adaptive weight of the adversarial loss needs this input of the last layer.
        return self.out(hidden), hidden


class Tokenizer(nn.Module):
    """Images to N latents, and back from any K of them.

    Source: LGM paper, tokenizer and learnable global merging.
    """

    def __init__(self, config: TokenizerModelConfig) -> None:
        super().__init__()
        row, patch_size, size = TOKENIZER_SIZES[config.size], config.patch_size, config.image_size
        self.image_size = size
        self.patch_size = patch_size
        self.num_base_tokens = tokens = config.num_base_tokens
        self.latent_dim = dim = config.latent_dim
        self.encoder = Encoder(row, size, patch_size, tokens)
        self.to_latent = nn.Linear(row.width, dim)  # the bottleneck: C -> D
        self.quantizer = (
            SoftQuantizer(config.num_codebooks, config.codebook_size, dim)
            if config.quantizer == "soft"
            else None
        )
        self.merging = build_length_control(
            config.length_control, tokens, config.num_codebooks, dim, config.dropped_tokens
        )
        self.decoder = Decoder(row, size, patch_size, tokens, dim, 3 * patch_size**2)
        if config.latent_init == "aligned":
            self._start_aligned(row.width)

    def _start_aligned(self, width: int) -> None:
        """Positions of patches and latents from one lattice, attention along it."""
        patches = self.image_size // self.patch_size
        latents = round(self.num_base_tokens**0.5)
        with torch.no_grad():
            for part in (self.encoder, self.decoder):
                start_aligned(part.vit)
                assert part.vit.pos_embed is not None
                part.vit.pos_embed[0, 1:] = lattice_positions(patches, width, patches)  # 0: class
                places = lattice_positions(latents, width, patches)
                part.latent_pos_embed[0] = places[self.merging.lattice_order()]

    def encode(self, images: Tensor) -> Tensor:
        """Quantized latents at full length. Shapes: [B, 3, S, S] in [-1, 1] -> [B, N, D]."""
        return self._encode(images)[0]

    def encode_with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What `encode` gives, and what the encoder made it of, before the bottleneck.

        Shapes: [B, 3, S, S] in [-1, 1] -> [B, N, D], [B, N, C].
        """
        features = self._features(images)
        return self._narrowed(features)[0], features

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents [B, N, D], quantized if that is asked for, and the logits of their codes."""
        return self._narrowed(self._features(images))

    def _features(self, images: Tensor) -> Tensor:
        """What the encoder gives, [B, N, C]. Raises: ConfigError for images of another size."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            height, width = images.shape[-2:]
            raise ConfigError(
                f"images of {height}x{width} given to a tokenizer of {self.image_size} pixels"
            )
        return self.encoder(images)

    def _narrowed(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Through the bottleneck, and through the quantizer if there is one."""
        z = self.to_latent(features)
        return (z, None) if self.quantizer is None else self.quantizer(z)

    def decode(self, z: Tensor) -> Tensor:
        """Pixels from (unmerged) latents. Shapes: [B, N, D] -> [B, 3, S, S], about [-1, 1]."""
        return self.unpatchify(self.decoder(z)[0])

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Pixels from per-patch values. Shapes: [B, P, 3 p^2] -> [B, 3, S, S]."""
        grid = self.image_size // self.patch_size
        return rearrange(
            patches,
            "b (h w) (p q c) -> b c (h p) (w q)",
            h=grid, p=self.patch_size, q=self.patch_size,
        )  # fmt: skip

    def patchify(self, images: Tensor) -> Tensor:
        """Inverse of `unpatchify`. Shapes: [B, 3, S, S] -> [B, P, 3 p^2]."""
        return rearrange(
            images, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch_size, q=self.patch_size
        )

    def merge_tree(self) -> MergeTree:
        """The tree of all images, without exploration noise.

        Raises: ConfigError from a length control that has none.
        """
        return self.merging.tree()

    def reconstruct(self, images: Tensor, num_tokens: int) -> Tensor:
        """Encode, go to K tokens and back, decode. Shapes: [B, 3, S, S] -> [B, 3, S, S]."""
        return self.decode(self.merging.full_length(self.encode(images), num_tokens))

    @torch.no_grad()
    def choose_length(
        self, images: Tensor, target_psnr: float, lengths: Sequence[int] | None = None
    ) -> LengthChoice:
        """Per image, the smallest of the lengths (None: of all) that reaches a PSNR in dB.

        One encoder pass; then a batched decode per K, of the images not satisfied yet. Where no
        K reaches the target, the choice is N with `reached` False. Shapes: [B, 3, S, S].
        """
        if lengths is None:
            lengths = range(self.merging.min_tokens, self.num_base_tokens + 1)
        return choose_length(
            images,
            self.encode(images),
            lambda z, k: self.decode(self.merging.full_length(z, k)),
            target_psnr,
            lengths,
        )

    def forward(
        self,
        images: Tensor,
        num_tokens: int | Tensor,
        exploration: np.ndarray | None = None,
    ) -> TokenizerOutput:
        """One training pass at K tokens, or at one K per image: [B] int64.

        Shapes: images [B, 3, S, S] in [-1, 1].
        """
        tree = self.merging.start_tree(exploration)  # travels to the host while the GPU encodes
        z, code_logits = self._encode(images)
        merged = self.merging(z, num_tokens, tree)
        patches, hidden = self.decoder(merged)
        return TokenizerOutput(
            reconstruction=self.unpatchify(patches),
            z=z,
            code_logits=code_logits,
            similarity=self.merging.similarity(),
            decoded_latents=merged,
            last_hidden=hidden,
        )

    def flops(self, num_tokens: int) -> int:
        """Operations of encoding, quantizing and decoding one image, a multiply-add being two.

        They are the same at every K: merging is below a thousandth of them.
        """
        return self.encoder_flops() + self.decoder_flops()

    def encoder_flops(self) -> int:
        """Operations of encoding and quantizing one image."""
        vit, latents = self.encoder.vit, self.num_base_tokens
        embed = self.decoder.num_patches * 2 * 3 * self.patch_size**2 * vit.embed_dim
        codes = 0 if self.quantizer is None else self.quantizer.codes.shape[1]
        quantize = latents * 2 * self.latent_dim * (vit.embed_dim + 2 * codes)
        return embed + _vit_flops(vit, 1 + self.decoder.num_patches + latents) + quantize

    def decoder_flops(self) -> int:
        """Operations of decoding one image: always N latents, whatever K was."""
        vit, patches, latents = self.decoder.vit, self.decoder.num_patches, self.num_base_tokens
        ends = latents * self.latent_dim + patches * self.decoder.out.out_features
        return _vit_flops(vit, 1 + patches + latents) + 2 * vit.embed_dim * ends


def _vit_flops(vit: VisionTransformer, tokens: int) -> int:
    """Operations of the blocks, with MLPs four times as wide as the network, for one sample."""
    width = vit.embed_dim
    block = tokens * 2 * width * (4 * width + 8 * width) + 4 * tokens**2 * width
    return len(vit.blocks) * block


def build_tokenizer(config: TokenizerModelConfig) -> Tokenizer:
    """A tokenizer with fresh weights; a pretrained encoder is the training run's affair."""
    return Tokenizer(config)
