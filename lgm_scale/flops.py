"""Floating-point operations, counted analytically: one multiply-add is two.

Elementwise work (norms, activations, softmax) is left out, as torch's FlopCounterMode does.
"""

from __future__ import annotations

from lgm_scale.models.dit import MergeDiT
from lgm_scale.models.layers import swiglu_hidden
from lgm_scale.models.tokenizer import TOKENIZER_SIZES, Tokenizer
from lgm_scale.sampling import SamplerConfig

__all__ = ["decoder_flops", "dit_flops", "encoder_flops", "sampling_flops", "tokenizer_flops"]


def dit_flops(net: MergeDiT, num_tokens: int) -> int:
    """One forward pass of one sample at K tokens.

    Merging the position table (2 N K C, once per batch) is left out.
    """
    width = net.pos_embed.shape[-1]
    per_block = (
        2 * width * 6 * width  # modulation, once per sample
        + num_tokens * 2 * width * (3 * width + width)  # qkv and output projection
        + 4 * num_tokens**2 * width  # logits and weighted values
        + num_tokens * 2 * 3 * width * swiglu_hidden(width)
    )
    embeddings = 2 * net.t_embed.num_features * width + 2 * width * width
    ends = num_tokens * 2 * 2 * net.latent_dim * width + 2 * width * 2 * width
    return len(net.blocks) * per_block + embeddings + ends


def _vit_flops(tokens: int, width: int, depth: int) -> int:
    """Blocks of a plain vision transformer with a 4 x width MLP, one sample."""
    return depth * (tokens * 2 * width * (4 * width + 8 * width) + 4 * tokens**2 * width)


def decoder_flops(tokenizer: Tokenizer, size: str) -> int:
    """Decoding one image: always N latents, whatever K was."""
    row = TOKENIZER_SIZES[size]
    patches, latents = tokenizer.decoder.num_patches, tokenizer.num_base_tokens
    projections = (
        2
        * row.width
        * (latents * tokenizer.latent_dim + patches * tokenizer.decoder.out.out_features)
    )
    return _vit_flops(1 + patches + latents, row.width, row.depth) + projections


def encoder_flops(tokenizer: Tokenizer, size: str) -> int:
    """Encoding and quantizing one image."""
    row = TOKENIZER_SIZES[size]
    patches, latents = tokenizer.decoder.num_patches, tokenizer.num_base_tokens
    embed = patches * 2 * 3 * tokenizer.patch_size**2 * row.width
    codes = tokenizer.quantizer.codes.shape[1]
    quantize = latents * 2 * tokenizer.latent_dim * (row.width + 2 * codes)
    return embed + _vit_flops(1 + patches + latents, row.width, row.depth) + quantize


def tokenizer_flops(tokenizer: Tokenizer, size: str) -> int:
    """Encoding, quantizing and decoding one image (merging is below a thousandth of it)."""
    return encoder_flops(tokenizer, size) + decoder_flops(tokenizer, size)


def sampling_flops(
    net: MergeDiT, tokenizer: Tokenizer, size: str, num_tokens: int, config: SamplerConfig
) -> int:
    """Making one image of K tokens: every network row at its own length, and the decoder.

    Args:
        net: The generator.
        tokenizer: Its decoder is counted once.
        size: Of the tokenizer.
        num_tokens: K.
        config: Solver, guidance and lengths.
    """
    rows = config.rows(num_tokens)
    network = sum(count * dit_flops(net, length) for length, count in rows.items())
    return network + decoder_flops(tokenizer, size)
