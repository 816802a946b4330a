"""Random numbers that are a pure function of a key.

Every draw that a result depends on (noise, timesteps, label dropout, token lengths) is keyed on
(seed, step or image index, sample id, purpose). So results do not change with the number of
ranks, the micro-batch, a resume or whatever else drew a number before.

torch has no stateless generator, hence this one: SplitMix64 (Steele, Lea and Flood 2014), one
stream per sample, evaluated for all counters at once on whatever device the keys live on.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a stream is for. Two purposes never share numbers.

    A value enters every number of its streams: it is never changed, nor given again (6 was once).
    """

    NOISE = 1
    TIMESTEP = 2
    LABEL_DROPOUT = 3
    LENGTH = 4
    EXPLORATION = 5
    FLIP = 7
    SAMPLING_NOISE = 8
    LATENT_SAMPLE = 9
    END_TIME = 10
    CRITIC_VIEW = 16
    DIFF_AUGMENT = 17


def _signed(value: int) -> int:
    """The 64-bit pattern of an unsigned constant as the signed integer that torch stores."""
    return value - (1 << 64) if value >= 1 << 63 else value


# The constants of SplitMix64: 2^64 over the golden ratio, made odd, and two multipliers that mix.
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift zeros in from the left: torch's own shift of an int64 repeats the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 bit patterns, with wrap-around products."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def stream_keys(seed: int, purpose: Purpose, step: int, sample_ids: Tensor) -> Tensor:
    """One 64-bit stream key per sample.

    Shapes: sample_ids [B], any integer type -> [B] int64. A seed counts modulo 2^64.
    """
    sample_ids = sample_ids.long()
    # Mixed after every part: a plain sum would give (seed 1, step 2) and (seed 2, step 1) one key.
    key = torch.zeros_like(sample_ids)
    for part in (_signed(seed % (1 << 64)), int(purpose), step):
        key = _mix((key ^ part) + _GOLDEN)
    return _mix((key ^ sample_ids) + _GOLDEN)


def _bits(keys: Tensor, count: int) -> Tensor:
    """`count` 64-bit words of each stream: [B] -> [B, count]."""
    # SplitMix64 walks in equal steps and mixes where it stands: word i needs none before it.
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64)
    return _mix(keys[:, None] + counter * _GOLDEN)


def _unit_interval(bits32: Tensor) -> Tensor:
    """Map 32 random bits to the open interval (0, 1), float32."""
    # By way of float64, and kept off both ends: log(0) in Box-Muller would be infinite.
    return ((bits32.double() + 0.5) * 2.0**-32).float().clamp_(2.0**-33, 1 - 2.0**-24)


def keyed_uniform(keys: Tensor) -> Tensor:
    """One uniform number in (0, 1) per stream: keys [B] -> [B] float32."""
    return _unit_interval(_shift_right(_bits(keys, 1)[:, 0], 32))


def keyed_uniforms(keys: Tensor, count: int) -> Tensor:
    """`count` uniform numbers in (0, 1) per stream: keys [B] -> [B, count] float32."""
    return _unit_interval(_shift_right(_bits(keys, count), 32))


def keyed_normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, `shape` of them per stream (Box-Muller).

    Shapes: keys [B] int64 -> [B, *shape] float32. Equal keys give equal numbers on every
    machine of one kind; CPU and GPU differ in the last bits of log and cos.
    """
    count = math.prod(shape)
    bits = _bits(keys, (count + 1) // 2)  # one 64-bit word makes two normal numbers
    radius = torch.sqrt(-2.0 * torch.log(_unit_interval(_shift_right(bits, 32))))
    angle = (2.0 * math.pi) * _unit_interval(bits & 0xFFFFFFFF)
    # (radius, angle) of a point of the plane -> its two coordinates, independent normal numbers.
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1)[:, :count].reshape(-1, *shape)
