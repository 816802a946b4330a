"""Floating-point operations, counted analytically: one multiply-add is two.

Elementwise work (norms, activations, softmax) is left out, as torch's FlopCounterMode does.
"""

from __future__ import annotations

from lgm_scale.families.elit.network import ELIT, SiT
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.tokenizer.network import TOKENIZER_SIZES, Tokenizer
from lgm_scale.layers import swiglu_hidden
from lgm_scale.sampling.config import SamplerConfig

__all__ = [
    "decoder_flops",
    "dit_flops",
    "encoder_flops",
    "network_flops",
    "rows_flops",
    "sampling_flops",
    "sit_flops",
    "tokenizer_flops",
]


def network_flops(net: MergeDiT | SiT, num_tokens: int) -> int:
    """One forward pass of one sample of whichever generator at K tokens."""
    if isinstance(net, SiT):
        return sit_flops(net, num_tokens)
    return dit_flops(net, num_tokens)


def _block_flops(tokens: int, width: int, mlp: int) -> int:
    """One adaLN block, one sample; `mlp` is its multiply-adds per token."""
    return (
        2 * width * 6 * width  # modulation, once per sample
        + tokens * 2 * width * (3 * width + width)  # qkv and output projection
        + 4 * tokens**2 * width  # logits and weighted values
        + tokens * 2 * mlp
    )


def _ends_flops(tokens: int, width: int, features: int, state_dim: int) -> int:
    """Embeddings of t and of the state, modulated output; one sample."""
    embeddings = 2 * features * width + 2 * width * width
    return embeddings + tokens * 2 * 2 * state_dim * width + 2 * width * 2 * width


def dit_flops(net: MergeDiT, num_tokens: int) -> int:
    """One forward pass of one sample at K tokens.

    Merging the position table (2 N K C, once per batch) is left out.
    """
    width = net.pos_embed.shape[-1]
    blocks = len(net.blocks) * _block_flops(num_tokens, width, 3 * width * swiglu_hidden(width))
    return blocks + _ends_flops(num_tokens, width, net.t_embed.num_features, net.latent_dim)


def sit_flops(net: SiT, num_tokens: int) -> int:
    """One forward pass of one sample of a SiT, or of an ELIT with K latents in its core."""
    net.check_length(num_tokens)
    width, tokens = net.pos_embed.shape[-1], net.num_base_tokens
    patch = net.patch_size**2 * net.channels
    total = _ends_flops(tokens, width, net.t_embed.num_features, patch)
    outer, core = len(net.blocks), 0
    if isinstance(net, ELIT):
        outer = net.head_blocks + net.tail_blocks
        core = len(net.blocks) - outer
        total += _interface_flops(net, width, num_tokens)
    mlp = 8 * width * width
    return (
        total
        + outer * _block_flops(tokens, width, mlp)
        + core * _block_flops(num_tokens, width, mlp)
    )


def _interface_flops(net: ELIT, width: int, num_tokens: int) -> int:
    """Read and Write: attention inside windows, an MLP as wide as the network."""
    tokens, window = net.num_base_tokens, net.max_budget
    written = tokens if net.drop_mode == "skip_core" else num_tokens
    read = (
        2 * width * 7 * width  # modulation, of which a seventh is not used
        + tokens * 2 * width * (width + 2 * width + width)
        + 4 * tokens * window * width
    )
    write = (
        tokens * 2 * width * (width + width)
        + written * 2 * width * 2 * width
        + 4 * tokens * (written // net.num_windows) * width
    )
    return read + write + 2 * tokens * 2 * 2 * width * width  # and both MLPs


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


def rows_flops(net: MergeDiT | SiT, num_tokens: int, config: SamplerConfig) -> int:
    """All network rows of one image of K tokens, each at its own length."""
    rows = config.rows(num_tokens)
    return sum(count * network_flops(net, length) for length, count in rows.items())


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
    return rows_flops(net, num_tokens, config) + decoder_flops(tokenizer, size)
