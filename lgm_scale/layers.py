"""Layers that the diffusion transformers share: attention, MLPs, blocks, embeddings of t and label.

`MergeDiT` (LGM) and `SiT` (host of ELIT) are made of one block: they choose its norm, its MLP and
whether queries and keys are normalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lgm_scale.packing import Packing

NORM_EPS = torch.finfo(torch.float32).eps
"""Epsilon of every RMSNorm, as in the release; torch's default would change with the dtype."""
EMBEDDING_STD = 0.02
"""Standard deviation with which tables, and the embeddings of t and label, start."""
NO_END_TIME = "end: a network of the velocity has no end time; leave it out, or build it with one"


Sizes = Tensor | Packing | None
"""Logarithms of cluster sizes [K]; None where all are 1; of a row of several K, its `Packing`."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor, sizes: Sizes = None) -> Tensor:
    """adaLN: x (1 + scale) + shift, no change at zero.

    Shapes: x [B, K, C], or [T, C] packed, shift and scale [B, C] -> as x.
    """
    if isinstance(sizes, Packing):
        own = sizes.groups(x), sizes.samples(shift), sizes.samples(scale)
        return sizes.join([modulate(*each) for each in zip(*own, strict=True)])
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def gated(x: Tensor, gate: Tensor, sizes: Sizes = None) -> Tensor:
    """Every token times its sample's gate. Shapes: x [B, K, C] or [T, C], gate [B, C] -> as x."""
    if isinstance(sizes, Packing):
        own = sizes.groups(x), sizes.samples(gate)
        return sizes.join([gated(*each) for each in zip(*own, strict=True)])
    return gate.unsqueeze(1) * x


def proportional_attention(
    q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor | None, form: str = "auto"
) -> Tensor:
    """Attention in which a key of a cluster of s tokens counts s times: log s on its logit.

    softmax(q k / sqrt(d) + log s) weighs a key by s exp(q k / sqrt(d)): equal to attention over the
    s duplicated tokens. On a GPU the bias rides in an extra channel (k holds log s, q the inverse
    softmax scale, v zero), because a float mask shuts out the flash kernels; on a CPU the mask is
    the cheaper form. `form` names another one of `ATTENTION_FORMS`.

    Shapes: q, k, v [B, H, K, C/H], log_sizes [K] or None for all sizes 1 -> [B, H, K, C/H].
    Source: LGM paper, proportional attention; the extra channel is ours.
    """
    if log_sizes is None:
        return F.scaled_dot_product_attention(q, k, v)
    if form == "auto":
        form = "mask" if q.device.type == "cpu" else "channel"
    return ATTENTION_FORMS[form](q, k, v, log_sizes)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor) -> Tensor:
    """Proportional attention by a mask: q, k, v and result [B, H, K, C/H], log_sizes [K]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=log_sizes.to(q.dtype)[None, :])


def extra_channel_attention(q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor) -> Tensor:
    """Proportional attention by a channel: q, k, v and result [B, H, K, C/H], log_sizes [K]."""
    head_dim = q.shape[-1]
    pad = 8 - head_dim % 8  # 1 to 8 channels: flash kernels ask for widths divisible by 8
    extra_q = q.new_zeros(pad)
    extra_q[0] = math.sqrt(head_dim)  # undone by the scale: sqrt(d) log s / sqrt(d) = log s
    extra_k = F.pad(log_sizes.to(k.dtype)[:, None], (0, pad - 1))  # [K, pad]
    q = torch.cat((q, extra_q.expand(*q.shape[:-1], pad)), dim=-1)
    k = torch.cat((k, extra_k.expand(*k.shape[:-1], pad)), dim=-1)
    # The scale of the true width: by default it would be that of the padded one.
    out = F.scaled_dot_product_attention(q, k, F.pad(v, (0, pad)), scale=head_dim**-0.5)
    return out[..., :head_dim]


def score_attention(q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor) -> Tensor:
    """Proportional attention by FlexAttention, which adds log s to a score inside its kernel.

    Nothing is padded or copied, but a kernel there is only where blocks are compiled, and it
    computes heads of 72 channels as if they had 128, the next power of two.

    Shapes: q, k, v and result [B, H, K, C/H], log_sizes [K].
    """
    from torch.nn.attention.flex_attention import flex_attention  # late: it imports sympy

    def with_size(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + log_sizes[key]

    return flex_attention(q, k, v, score_mod=with_size)  # type: ignore[return-value]


ATTENTION_FORMS = {
    "mask": masked_attention,
    "channel": extra_channel_attention,
    "flex": score_attention,
}
"""How log sizes can reach the logits; all give the same numbers, up to rounding."""


def choose_attention(net: nn.Module, form: str) -> None:
    """Let every attention of a network take one of `ATTENTION_FORMS`, or `auto`, the device's."""
    for module in net.modules():
        if isinstance(module, Attention):
            module.form = form


def cast_matrices(net: nn.Module, dtype: torch.dtype) -> None:
    """Keep linear layers in the dtype that autocast would cast them to at every call.

    For a network that is only sampled: the same bits, half the memory, and at small batches a
    fraction of the traffic. Norms, tables and positions stay as they are.
    """
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)


class Attention(nn.Module):
    """Multi-head self-attention with cluster sizes; `form` as in `proportional_attention`.

    Shapes: x [B, K, C] -> [B, K, C], or of a packed row [T, C] -> [T, C].

    Args:
        width: C.
        num_heads: H; C must be divisible by it.
        qk_norm: Normalise queries and keys per head, which bounds the logits in long runs.
    """

    def __init__(self, width: int, num_heads: int, qk_norm: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.form = "auto"
        self.qkv = nn.Linear(width, 3 * width)
        norm = nn.RMSNorm if qk_norm else nn.Identity
        self.q_norm = norm(width // num_heads, eps=NORM_EPS)
        self.k_norm = norm(width // num_heads, eps=NORM_EPS)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, sizes: Sizes = None) -> Tensor:
        """Attend, a key counting as often as its cluster has tokens."""
        qkv = self.qkv(x)
        if isinstance(sizes, Packing):
            groups = zip(sizes.groups(qkv), sizes.log_sizes, strict=True)
            return self.proj(sizes.join([self._attend(*group) for group in groups]))
        return self.proj(self._attend(qkv, sizes))

    def _attend(self, qkv: Tensor, log_sizes: Tensor | None) -> Tensor:
        """All heads. Shapes: qkv [B, K, 3 C], log_sizes [K] or None -> [B, K, C]."""
        batch, tokens, width = qkv.shape
        q, k, v = qkv.view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        # Under autocast a norm returns float32, for which there are no flash kernels.
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # [B, H, K, C/H]
        out = proportional_attention(q, k, v, log_sizes, self.form)
        return out.transpose(1, 2).reshape(batch, tokens, width // 3)


def swiglu_hidden(width: int) -> int:
    """Hidden width of the gated MLP: two thirds of 4 C, so its 3 matrices cost what 2 would."""
    return int(2 / 3 * 4 * width)


class SwiGLU(nn.Module):
    """Gated MLP: silu(a) * b with a, b from one projection. Shapes: [B, K, C] -> [B, K, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = swiglu_hidden(width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to x [B, K, C]."""
        gate, value = self.w12(x).chunk(2, dim=-1)  # [B, K, 2/3 4C] each
        return self.w3(F.silu(gate) * value)


class MLP(nn.Module):
    """Two layers with tanh-approximated GELU. Shapes: [..., C] -> [..., C]."""

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias)
        self.fc2 = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to x [..., C]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated by and gated with adaLN.

        x = x + gate_1 attn(norm(x) (1 + scale_1) + shift_1)
        x = x + gate_2 mlp(norm(x) (1 + scale_2) + shift_2)

    Shapes: x [B, K, C] or a packed row [T, C], condition [B, C] -> as x.

    Args:
        norm: Makes a norm of a width; the block has two.

    Source: DiT (Peebles and Xie 2023), adaLN-Zero.
    """

    def __init__(
        self, width: int, attn: Attention, mlp: nn.Module, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.norm1 = norm(width)
        self.attn = attn
        self.norm2 = norm(width)
        self.mlp = mlp
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, sizes: Sizes = None) -> Tensor:
        """Transform tokens x, of which some may stand for several, under condition [B, C]."""
        # t and label reach the block through these six vectors alone; the order is the release's.
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition).chunk(
            6, dim=-1
        )  # [B, C] each
        attended = self.attn(modulate(self.norm1(x), shift_1, scale_1, sizes), sizes)
        x = x + gated(attended, gate_1, sizes)
        mixed = self.mlp(modulate(self.norm2(x), shift_2, scale_2, sizes))
        return x + gated(mixed, gate_2, sizes)


class FinalLayer(nn.Module):
    """Modulated norm and projection to the output.

    Shapes: [B, K, C] -> [B, K, out_dim], or of a packed row [T, C] -> [T, out_dim].
    """

    def __init__(self, width: int, out_dim: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = norm(width)
        self.linear = nn.Linear(width, out_dim)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor, sizes: Sizes = None) -> Tensor:
        """Modulate the normed tokens by condition [B, C], and project them."""
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale, sizes))


class TimestepEmbedding(nn.Module):
    """Sinusoidal features of t itself (not of 1000 t), then an MLP.

    Shapes: t [B] in [0, 1] -> [B, C].
    """

    def __init__(self, width: int, num_features: int = 256) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed t [B]."""
        half = self.num_features // 2
        # float32 whatever the dtype of t: the fastest angle must tell neighbouring times apart.
        index = torch.arange(half, device=t.device, dtype=torch.float32)
        angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * index / half)
        features = torch.cat((torch.cos(angles), torch.sin(angles)), dim=-1)  # [B, 256]
        return self.mlp(features.to(next(self.parameters()).dtype))


class EndTimeEmbedding(TimestepEmbedding):
    """Embedding of the time from t to the end of a step, for networks of the average velocity.

    It adds nothing at first (`zero`): weights of a velocity give the same numbers with it.
    """

    @override
    def forward(self, t: Tensor, end: Tensor | None = None) -> Tensor:
        """Embed end - t, both [B]; without an end 0, where the average velocity is the velocity."""
        return super().forward(torch.zeros_like(t) if end is None else end - t)


class LabelEmbedding(nn.Module):
    """Class table; its last row is the null label of classifier-free guidance.

    Shapes: labels [B] int64 in [0, num_classes] -> [B, C].
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, width)

    @property
    def null_label(self) -> int:
        """The label that means 'no class'."""
        return self.num_classes

    def forward(self, labels: Tensor) -> Tensor:
        """Rows of the table: [B] int64 -> [B, C]."""
        return self.table(labels)


def initialize_transformer(net: nn.Module, *tables: Tensor) -> None:
    """Start as adaLN-Zero does: every block the identity at any depth, and an output of zero.

    Xavier for matrices, std .02 for `tables` and for the embeddings of t and label, zero for
    biases, for every modulation and for the output.
    """
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    for layer in linear:
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    # After the loop above, which has treated the embeddings' own linear layers like all others.
    embeddings = [m.table.weight for m in net.modules() if isinstance(m, LabelEmbedding)]
    for module in net.modules():
        if isinstance(module, TimestepEmbedding):
            embeddings += [layer.weight for layer in module.mlp if isinstance(layer, nn.Linear)]
    for table in (*tables, *embeddings):
        nn.init.normal_(table, std=EMBEDDING_STD)
    for module in net.modules():
        if isinstance(module, DiTBlock | FinalLayer):
            zero(module.modulation[-1])
        if isinstance(module, FinalLayer):
            zero(module.linear)
        if isinstance(module, EndTimeEmbedding):
            zero(module.mlp[-1])


def initial_deviations(net: nn.Module) -> dict[str, float]:
    """Standard deviations with which a transformer's linear layers start, by their names.

    Of those that `initialize_transformer` draws and of the layer that embeds the state, whether or
    not zeros replaced the numbers. Layers of other parts start as torch has it, at 1 / sqrt(3 fan).
    """
    layers = {n: m for n, m in net.named_children() if isinstance(m, nn.Linear | nn.Conv2d)}
    embedding = set()
    for name, part in net.named_modules():
        if isinstance(part, DiTBlock | FinalLayer | TimestepEmbedding):
            own = {f"{name}.{n}": m for n, m in part.named_modules() if isinstance(m, nn.Linear)}
            layers |= own
            embedding |= own.keys() if isinstance(part, TimestepEmbedding) else set()
    xavier = {
        name: (2 / sum(layer.weight.flatten(1).shape)) ** 0.5 for name, layer in layers.items()
    }
    return xavier | dict.fromkeys(embedding, EMBEDDING_STD)


def zero(layer: nn.Module) -> None:
    """Set weight and bias of a layer to zero: it adds nothing at first, and learns."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


# Operations are counted in closed form, one multiply-add being two; elementwise work (norms,
# activations, softmax) is left out, as torch's FlopCounterMode does. Tests compare the two.


def block_flops(tokens: int, width: int, mlp: int) -> int:
    """Operations of one adaLN block for one sample.

    `tokens` are those that the block sees, `mlp` the multiply-adds of its MLP per token.
    """
    return (
        2 * width * 6 * width  # modulation, once per sample
        + tokens * 2 * width * (3 * width + width)  # qkv and output projection
        + 4 * tokens**2 * width  # logits and weighted values
        + tokens * 2 * mlp
    )


def ends_flops(tokens: int, width: int, features: int, state_dim: int, num_times: int = 1) -> int:
    """Operations of what surrounds the blocks for one sample: embeddings and modulated output.

    `features` are the frequencies of the embedding of a time, `num_times` how many times are
    embedded, `state_dim` numbers per token of the state.
    """
    embeddings = num_times * (2 * features * width + 2 * width * width)
    return embeddings + tokens * 2 * 2 * state_dim * width + 2 * width * 2 * width
