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
from collections.abc import Iterator

from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.families.base import Tool, imported, release_importers
from lgm_scale.release_import import Importer


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse the command line. Raises: ConfigError for an option that is needed and not there."""
    parser = argparse.ArgumentParser(
        prog="python -m lgm_scale.release_import",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    tools = release_importers()
    for name, tool in tools.items():
        kind = kinds.add_parser(name, help=tool.help)
        kind.add_argument("source", metavar="SRC", help="the checkpoint")
        kind.add_argument("folder", metavar="DST", help="bundle to write")
        kind.add_argument(
            "--weights", choices=["ema", "model"], help="default: the average, if the file has it"
        )
        for flag, settings in tool.options.items():
            kind.add_argument(flag, **settings)
    args = parser.parse_args(argv)
    if problems := list(_problems(tools[args.kind], args)):
        raise ConfigError(problems)
    return args


def _problems(tool: Tool, args: argparse.Namespace) -> Iterator[str]:
    """What is missing among the tool's options, or given beside one that stands for it."""
    given = {f"--{name.replace('_', '-')}" for name, value in vars(args).items() if value}
    replaced: set[str] = set()
    for flag, others in tool.instead.items():
        if flag in given:
            replaced.update(others)
            if not given.isdisjoint(others):
                yield f"{flag}: that bundle brings what {', '.join(others)} say; leave them away"
    for flag, why in tool.needed.items():
        if flag not in given | replaced:
            yield f"{flag}: missing; {why}"


def main() -> int:
    """Import, then report every key."""
    args = parse_args(sys.argv[1:])
    importer: Importer = imported(release_importers()[args.kind].target)
    report, remarks = importer(args)
    for line in (*report.lines(), *remarks):
        print(line)
    print(f"{args.folder}: {args.kind} bundle written")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
