"""Turn a released checkpoint into a bundle.

    python -m lgm_scale.release_import tokenizer tokenizer.pt runs/release/tokenizer
    python -m lgm_scale.release_import generator xl.pth runs/release/dit_xl \
        --tokenizer runs/release/tokenizer --latent-stats latents_stats.pt --merge-tree merge.pt
    python -m lgm_scale.release_import lora lora_32.pth runs/release/dit_xl_legacy --num-tokens 32 \
        --tokenizer runs/release/tokenizer --latent-stats latents_stats.pt
    python -m lgm_scale.release_import elit 0400000.pt runs/release/elit_xl --vae sd-vae-ft-ema

Nothing in the files is executed. What does not fit entirely is refused.
"""

from __future__ import annotations

import argparse
import sys

from lgm_scale.errors import exit_on_user_error
from lgm_scale.families.base import imported, release_importers
from lgm_scale.release_import import ReleaseImporter


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; `importer` of the result is what reads this kind of checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m lgm_scale.release_import",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, target in release_importers().items():
        importer: type[ReleaseImporter] = imported(target)
        kind = kinds.add_parser(name, help=importer.help)
        kind.set_defaults(importer=importer)
        kind.add_argument("source", metavar="SRC", help="the checkpoint")
        kind.add_argument("folder", metavar="DST", help="bundle to write")
        kind.add_argument(
            "--weights", choices=["ema", "model"], help="default: the average, if the file has it"
        )
        importer.add_arguments(kind)
    return parser.parse_args(argv)


def main() -> int:
    """Import, then report every key."""
    args = parse_args(sys.argv[1:])
    report, remarks = args.importer.run(args)
    for line in (*report.lines(), *remarks):
        print(line)
    print(f"{args.folder}: {args.kind} bundle written")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
