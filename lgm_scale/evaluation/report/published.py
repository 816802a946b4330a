"""Published results, for markers beside our own. None of these numbers is ours.

Source: LGM (Lee and Hong 2026, arXiv 2606.20076), its tables of ImageNet 256x256, 50 000 samples,
ADM's reference; the other methods' numbers are those their own authors give.

ELIT's are left out: those of its release are without guidance and by an evaluator of its own, and
would be misread beside guided ones by ADM's.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["POINTS", "PublishedPoint"]


@dataclass(frozen=True)
class PublishedPoint:
    """One published generator: gFID-50K, work per image with decoder, speed if it was given."""

    label: str
    fid: float
    tflops: float
    images_per_second: float | None = None
    """On one RTX 3090 in float32."""
    above: bool = False
    left: bool = False
    """Where its name stands beside the marker of its operations, so that names do not overlap."""


POINTS = (
    PublishedPoint("LGM-XL, K = 32, 25 steps", 2.89, 1.08, 6.12),
    PublishedPoint("LGM-XL, K = 128, 25 steps", 2.03, 2.88, 1.95),
    PublishedPoint("LGM-XL, K = 32, 100 steps", 2.54, 4.33, 2.04),
    PublishedPoint("LGM-XL, K = 128, 100 steps", 1.86, 11.51, 0.36, left=True),
    PublishedPoint("SoftVQ-B-32", 2.51, 10.8),
    PublishedPoint("Semanticist-L-32", 2.57, 11.2, above=True),
    PublishedPoint("FlexTok d18-d18", 2.02, 7.45, above=True),
)
