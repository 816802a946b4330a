"""Publish a bundle on the model hub, with a model card that says what is known, and no more.

    python -m lgm_scale.publish BUNDLE owner/name --license ID --data-license TEXT --results FILE

The card comes from bundle.json and from a sweep of this very bundle: numbers, their names and the
reference are those of the sweep's report. `load_pipeline("owner/name")` takes it from there.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lgm_scale import __version__
from lgm_scale.bundle import INFO_NAME, push_to_hub, read_bundle, read_info
from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.families.base import add_import_option, families
from lgm_scale.families.generator import generator_families
from lgm_scale.start import heavy_imports

NOT_STATED = "not stated"


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lgm_scale.publish",
        description="Upload a bundle to the model hub, with a model card made from it. The token "
        "is that of `hf auth login`, or HF_TOKEN.",
    )
    parser.add_argument("bundle", help="bundle of any family")
    parser.add_argument("name", help="owner/name of the repository; made if it is not there")
    parser.add_argument(
        "--license", required=True, metavar="ID",
        help="licence that you give the weights, by the hub's identifier: apache-2.0, mit, other",
    )  # fmt: skip
    parser.add_argument(
        "--data-license", required=True, metavar="TEXT",
        help=f"terms of the images that it was trained on, in your words, or {NOT_STATED!r}",
    )  # fmt: skip
    parser.add_argument("--results", metavar="FILE", help="results.json of a sweep of this bundle")
    parser.add_argument(
        "--picture", metavar="PNG",
        help="picture for the card; default: the report's, beside results.json",
    )  # fmt: skip
    parser.add_argument("--private", action="store_true", help="a new repository is for you alone")
    parser.add_argument("--dry-run", action="store_true", help="print the card, upload nothing")
    add_import_option(parser)
    return parser.parse_args(argv)


def model_card(
    folder: str | Path,
    name: str,
    license: str,
    data_license: str,
    results: dict[str, Any] | None = None,
    picture: str | None = None,
) -> str:
    """README.md of a repository that holds this bundle.

    Args:
        folder: The bundle.
        name: owner/name of the repository.
        license: The hub's identifier of the weights' licence.
        data_license: Terms of the training images, in words.
        results: Contents of results.json of a sweep of this bundle.
        picture: File name of a picture in the repository.

    Raises: CheckpointError; ConfigError if the results are of other weights.
    """
    info = read_info(folder)
    kind, family = info["kind"], families()[info["kind"]]
    samples = kind in generator_families()
    sections = [
        _front_matter(license, kind, samples),
        f"# {name.rpartition('/')[2]}",
        f"{family.title}: a bundle of the Python package lgm_scale. {_about(info, samples)}",
        "## Use",
        _usage(info, name, samples),
        "## Measured",
        _measured(info, results, samples),
        *([f"![Pictures made by this bundle]({picture})"] if picture else []),
        "## How it was trained",
        "\n".join(f"- {line}" for line in _training(info["training"])),
        "## Licences",
        f"- Weights: {license}\n- Training images: {data_license}",
        f"Written by lgm_scale {__version__} from {INFO_NAME}"
        f"{' and the results of a sweep' if results else ''}.",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(license: str, kind: str, samples: bool) -> str:
    """YAML that the hub reads. Raises: ConfigError."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ConfigError(
            f"--license: {license!r} is no identifier of the hub; write one such as apache-2.0, "
            "mit, cc-by-4.0, or other"
        )
    task = "unconditional-image-generation" if samples else "image-to-image"
    tags = ("lgm-scale", kind.replace("_", "-"), "image-generation", "variable-length")
    lines = [f"license: {license}", "library_name: lgm-scale", f"pipeline_tag: {task}", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])


def _about(info: dict[str, Any], samples: bool) -> str:
    if not samples:
        return "It turns images into any number of tokens K and back."
    return f"It makes images of {len(info['classes']):,} classes at any of its token counts K."


def _usage(info: dict[str, Any], name: str, samples: bool) -> str:
    if samples:
        classes = ", ".join(f'"{each}"' for each in info["classes"][:2])
        code = (
            "from lgm_scale import load_pipeline\n\n"
            f'pipe = load_pipeline("{name}")\nimages = pipe([{classes}], seed=0)  # num_tokens=K'
        )
    else:
        code = (
            "from lgm_scale.pipeline import load_image_tokenizer\n\n"
            f'tokenizer, _ = load_image_tokenizer("{name}")\n'
            "z = tokenizer.merging.full_length(tokenizer.encode(images), K)  # images in [-1, 1]\n"
            "reconstructed = tokenizer.decode(z)"
        )
    return f"```python\n{code}\n```\n\nWeights are safetensors; every file is checked by its hash."


def _measured(info: dict[str, Any], results: dict[str, Any] | None, samples: bool) -> str:
    """Tables of the sweep's report. Raises: ConfigError if it measured something else."""
    if results is None:
        return "Nothing is stated: no results of a sweep were given."
    measured = results["weights"]
    foreign = [file for file, found in info["files"].items() if measured.get(file) != found]
    if foreign:
        raise ConfigError(
            f"--results: they are of other weights: {foreign[0]} is not the one that was measured; "
            "give the sweep of this bundle, or leave --results out"
        )
    with heavy_imports():
        from lgm_scale.evaluation.report.page import render_markdown

    shown = results if samples else results | {"rows": [], "searched": [], "floor": None}
    _, _, tables = render_markdown(shown).partition("\n\n")
    counts = (f"{count:,} of the {part}" for part, count in results.get("parameters", {}).items())
    return (
        f"By lgm_scale {results['versions']['lgm_scale']}, seed {results['config']['seed']}. "
        f"Parameters: {', '.join(counts) or NOT_STATED}.\n\n"
        + tables.strip().replace("\n## ", "\n### ")
    )


def _training(training: dict[str, Any]) -> Iterator[str]:
    """What the bundle says about how it came about, line by line."""
    config = training.get("config", {})
    steps, batch = training.get("steps"), config.get("train", {}).get("global_batch_size")
    recipe = config.get("run_name", NOT_STATED)
    yield f"Recipe: {recipe} (all keys: `training.config` of {INFO_NAME})"
    changed = {key for entry in training.get("changes", ()) for key in entry["changes"]}
    fixed = config.get("train", {}).get("batch_scaling", "constant_samples") == "constant_samples"
    if steps is None or batch is None or not fixed or "train.global_batch_size" in changed:
        yield f"Steps: {NOT_STATED if steps is None else f'{steps:,}'}"
    else:
        yield f"Steps: {steps:,}, of {batch:,} samples: {steps * batch:,} samples seen (computed)"
    count = config.get("data", {}).get("num_samples")
    yield f"Samples in the training set: {NOT_STATED if count is None else f'{count:,}'}"
    yield f"Seed: {config.get('seed', NOT_STATED)}"
    yield f"Kept weights: {training.get('weights', NOT_STATED)}"
    yield f"Version that trained it: {training.get('lgm_scale', NOT_STATED)}"
    if "imported" in training:
        origin = training["imported"]
        yield f"Imported from {origin['file']} of the {origin['release']} release"
    for change in training.get("changes", ()):
        yield f"Changed on the way: {change['changes']}"


def _refuse_no_png(path: Path) -> None:
    """Raises: ConfigError."""
    from PIL import Image

    try:
        with Image.open(path, formats=["png"]) as image:
            image.load()
    except (OSError, SyntaxError) as error:
        raise ConfigError(
            f"--picture: {path} is no PNG file ({type(error).__name__}); name one, or leave it out"
        ) from error


def main() -> int:
    """Check everything here, then upload."""
    args = parse_args(sys.argv[1:])
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.name):
        raise ConfigError(f"name: {args.name!r} names no repository; write owner/name")
    if not args.data_license.strip():
        raise ConfigError(f"--data-license: it is empty; write the terms, or {NOT_STATED!r}")
    info = read_bundle(args.bundle, *families())
    results, picture = None, args.picture
    if args.results is not None:
        from lgm_scale.evaluation.engine.rows import read_results

        sweep = Path(args.results)
        if sweep.name == "results.json":
            sweep = sweep.parent
        results = read_results(sweep)
        drawn = "samples.png" if info["kind"] in generator_families() else "reconstructions.png"
        if picture is None and (sweep / drawn).is_file():
            picture = str(sweep / drawn)
    if picture is not None:
        _refuse_no_png(Path(picture))
    pictures = {} if picture is None else {"pictures.png": Path(picture)}
    card = model_card(
        args.bundle, args.name, args.license, args.data_license, results, next(iter(pictures), None)
    )
    if args.dry_run:
        files = (INFO_NAME, *info["files"], *pictures, "README.md")
        print(f"{card}\n{args.name} would hold: {', '.join(files)}")
        return 0
    print(push_to_hub(args.bundle, args.name, card, pictures, args.private))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
