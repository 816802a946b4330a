"""Turn a checkpoint of the authors of LGM or of ELIT into a bundle.

    python -m lgm_scale.release_import tokenizer tokenizer.pt runs/release/tokenizer
    python -m lgm_scale.release_import generator xl.pth runs/release/dit_xl \
        --tokenizer runs/release/tokenizer --latent-stats latents_stats.pt --merge-tree merge.pt
    python -m lgm_scale.release_import elit 0400000.pt runs/release/elit_xl --vae sd-vae-ft-ema

Nothing in the files is executed. What does not fit entirely is refused.
"""

from __future__ import annotations

import argparse
import sys

from lgm_scale.errors import ConfigError, exit_on_user_error


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lgm_scale.release_import",
        description="Turn a checkpoint of the authors of LGM or of ELIT into a bundle.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    tokenizer = kinds.add_parser("tokenizer", help="a checkpoint {model, ema, args}")
    generator = kinds.add_parser("generator", help="a checkpoint {model, model_ema}")
    elit = kinds.add_parser("elit", help="a checkpoint {model, ema} of an ELIT, or of its SiT")
    for kind in (tokenizer, generator, elit):
        kind.add_argument("source", metavar="SRC", help="the checkpoint")
        kind.add_argument("folder", metavar="DST", help="bundle to write")
        kind.add_argument("--weights", choices=["ema", "model"], default="ema")
    generator.add_argument(
        "--tokenizer",
        required=True,
        metavar="BUNDLE",
        help="of the tokenizer that made the latents",
    )
    generator.add_argument(
        "--latent-stats", metavar="FILE",
        help="mean and std of the latents it was trained on: the release's latents_stats.pt, or "
        "latent_stats.safetensors of a folder of latents encoded here",
    )  # fmt: skip
    generator.add_argument(
        "--merge-tree", metavar="FILE",
        help="the release's merge dictionary; default: the tokenizer's own tree",
    )  # fmt: skip
    for kind in (generator, elit):
        kind.add_argument(
            "--classes", metavar="FILE", help="names, one per line, or 'imagenet'; default: indices"
        )
    elit.add_argument("--vae", required=True, metavar="FOLDER", help="autoencoder that decodes")
    elit.add_argument(
        "--split", choices=["released", "declared", "paper"], default="released",
        help="blocks before Read and after Write; the checkpoint does not say",
    )  # fmt: skip
    generator.add_argument(
        "--noise-scale", choices=["corrected", "legacy"], default="corrected",
        help="how it was trained to see noise; the checkpoint does not say",
    )  # fmt: skip
    return parser.parse_args(argv)


def main() -> int:
    """Import, then report every key."""
    args = parse_args(sys.argv[1:])
    if args.kind == "tokenizer":
        from lgm_scale.families.tokenizer.release import import_tokenizer

        report, remarks = import_tokenizer(args.source, args.folder, args.weights)
    elif args.kind == "elit":
        from lgm_scale.families.elit.release import import_elit

        report, remarks = import_elit(
            args.source, args.folder, args.vae, args.split, args.classes, args.weights
        )
    else:
        if args.latent_stats is None:
            raise ConfigError(
                "--latent-stats: missing; images cannot be decoded without the mean and std that "
                "the generator's latents were standardised with. Give the release's "
                "latents_stats.pt, or encode images with this tokenizer (data_tools/"
                "encode_latents.py) and give latent_stats.safetensors of that folder"
            )
        from lgm_scale.families.lgm.release import import_generator

        report, remarks = import_generator(
            args.source, args.folder, args.tokenizer, args.latent_stats, args.merge_tree,
            args.classes, args.noise_scale, args.weights,
        )  # fmt: skip
    for line in (*report.lines(), *remarks):
        print(line)
    print(f"{args.folder}: {args.kind} bundle written")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
