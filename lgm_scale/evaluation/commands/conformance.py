r"""Check this evaluator against published numbers: ADM's sample batch scored with ADM's reference.

    python -m lgm_scale.evaluation.commands.conformance
        --samples admnet_guided_upsampled_imagenet256.npz
        --reference VIRTUAL_imagenet256_labeled.npz --inception INCEPTION.pth

The three files are published, large, and never downloaded here. Prints measured and published
numbers side by side; exit status 1 if one is outside its tolerance, 2 if a file is missing. This
comparison has not been run by the project's authors, who had none of the files at hand.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lgm_scale.errors import MissingAssetError, exit_on_user_error
from lgm_scale.evaluation.commands.arguments import command_parser
from lgm_scale.published import PUBLISHED as FILES
from lgm_scale.start import heavy_imports
from lgm_scale.storage.files import file_hash

if TYPE_CHECKING:
    from lgm_scale.evaluation.references.files import Reference

PUBLISHED = {
    "is": (215.837, 0.3),
    "fid": (3.94256, 0.005),
    "sfid": (6.14043, 0.005),
    "precision": (0.8265, 0.005),
    "recall": (0.5309, 0.005),
}
"""What ADM's own evaluator gives for that batch, and how far a port may be from it; precision and
recall are computed there from distances in half precision."""


def score(samples: Path, reference: Reference, inception: str, work: Path) -> dict[str, float]:
    """Measure an npz of images against a reference; `work` is the folder of unfinished chunks."""
    # Late, as in `main`: what is wrong with a command line is told before.
    from lgm_scale.evaluation.engine.chunks import Job
    from lgm_scale.evaluation.engine.parts import Part, join_ranks
    from lgm_scale.evaluation.engine.stages import Engine
    from lgm_scale.evaluation.features.extraction import OriginalFeatures
    from lgm_scale.evaluation.features.spaces import Spaces
    from lgm_scale.evaluation.images import NpzImages
    from lgm_scale.evaluation.metrics.catalogue import compute, select

    device = join_ranks()
    source, spaces = NpzImages(samples), Spaces.load(device, inception=inception)
    protocol = {"sha256": file_hash(samples), "features": spaces.describe()}
    originals = OriginalFeatures(source, spaces.all, device, 50)
    job = Job("samples", protocol, len(source), 250, originals)
    engine = Engine(work, device)
    engine.make_chunks([job], Part(), "samples", may_compute=True)
    chosen = select(PUBLISHED, spaces.outputs, reference, len(source))
    engine.make_sums([(job, chosen.statistics_features)])
    statistics = engine.statistics(job, chosen.statistics_features)
    return compute(chosen, statistics, partial(engine.features, job), reference, device)


def main() -> int:
    """Command line."""
    parser = command_parser(
        "conformance", "Score ADM's published samples, and compare with ADM's published numbers."
    )
    parser.add_argument("--samples", required=True, metavar="NPZ")
    parser.add_argument(
        "--reference", required=True, metavar="NPZ", help=FILES["adm_imagenet256"].path
    )
    parser.add_argument("--inception", required=True, metavar="FILE", help=FILES["inception"].path)
    parser.add_argument("--work", help="folder to keep unfinished work in; default: none is kept")
    args = parser.parse_args(sys.argv[1:])
    missing = [
        f"--{key}: {getattr(args, key)} is not a file"
        for key in ("samples", "reference", "inception")
        if not Path(getattr(args, key)).is_file()
    ]
    if missing:
        raise MissingAssetError("\n".join(missing))
    published = FILES["inception"].sha256 or ""
    if not file_hash(args.inception).startswith(published):
        raise MissingAssetError(
            f"--inception: the hash of {args.inception} does not begin with {published}: "
            "these are not the published weights, of which alone published numbers speak"
        )
    with heavy_imports():
        from lgm_scale.evaluation.references.making import make_reference

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(args.work or scratch)
        reference = make_reference(
            Path(args.reference), work / "reference.work", inception=args.inception
        )
        numbers = score(Path(args.samples), reference, args.inception, work / "samples")
    status = 0
    print("metric      measured    published   tolerance")
    for key, (expected, tolerance) in PUBLISHED.items():
        found = numbers.get(key, float("nan"))
        good = abs(found - expected) <= tolerance
        status = status if good else 1
        print(
            f"{key:10s} {found:9.4f} {expected:12.4f} {tolerance:11.4f}   {'ok' if good else 'NO'}"
        )
    return status


if __name__ == "__main__":
    exit_on_user_error(main)
