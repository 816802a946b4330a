"""The report as one HTML file: numbers, pictures and commands, with nothing to load."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

from eval.theme import DARK, LIGHT, Theme

__all__ = ["render_page"]


def _variables(theme: Theme) -> str:
    names = ("page", "paper", "ink", "muted", "rule", "accent")
    return " ".join(f"--{name}: {getattr(theme, name)};" for name in names)


STYLE = f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink);
  font: 17px/1.6 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }}
main {{ max-width: 1120px; margin: 0 auto; padding: 48px 24px 72px; }}
h1 {{ font-size: 34px; line-height: 1.2; margin: 0 0 12px; }}
h2 {{ font-size: 23px; margin: 56px 0 10px; }}
p {{ max-width: 46em; margin: 0 0 14px; }}
.lead {{ font-size: 19px; }}
.muted, figcaption {{ color: var(--muted); font-size: 15px; }}
figure {{ margin: 18px 0 0; background: var(--paper); border: 1px solid var(--rule);
  border-radius: 10px; padding: 12px; }}
figure img {{ display: block; width: 100%; height: auto; margin: 0 auto; }}
figcaption {{ border-top: 1px solid var(--rule); margin-top: 12px; padding: 10px 8px 2px; }}
.scroll {{ overflow-x: auto; background: var(--paper); border: 1px solid var(--rule);
  border-radius: 10px; margin-top: 18px; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
table {{ font-size: 16px; }}
th, td {{ text-align: right; padding: 10px 12px; white-space: nowrap; }}
thead th {{ font-size: 14px; font-weight: 600; line-height: 1.35; color: var(--muted);
  vertical-align: bottom; border-bottom: 2px solid var(--rule); }}
tbody tr + tr td, tbody tr + tr th {{ border-top: 1px solid var(--rule); }}
.facts th {{ font-weight: 600; text-align: left; width: 14em; }}
.facts td {{ text-align: left; white-space: normal; overflow-wrap: anywhere; }}
pre {{ background: var(--paper); border: 1px solid var(--rule); border-radius: 10px;
  padding: 16px 18px; margin: 18px 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14.5px/1.7 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }}
"""


def render_page(results: dict[str, Any], pictures: dict[str, tuple[bytes, bytes]]) -> str:
    """The page. Pictures come as PNG for light and for dark, by name."""
    rows = sorted(results["rows"], key=lambda row: row["num_tokens"])
    size = results["num_base_tokens"]
    parts = [
        "<h1>One generator, every token count</h1>",
        _lead(rows, size),
        "<h2>Numbers</h2>",
        _numbers(rows),
        f'<p class="muted" style="margin-top:12px">{_table_note(results, rows)}</p>',
        "<h2>Quality against work</h2>",
        _figure("tradeoff", pictures, _tradeoff_caption(rows), "860px"),
        "<h2>Samples</h2>",
        _figure("samples", pictures, _SAMPLES.format(count=len(rows)), "100%"),
        "<h2>What merging keeps</h2>",
        _figure("reconstructions", pictures, _RECONSTRUCTIONS, "920px"),
        "<h2>What is merged</h2>",
        _figure("merge_tree", pictures, _TREE.format(size=size), "100%"),
        "<h2>How it was measured</h2>",
        _facts(results, rows),
    ]
    if results["config"]["commands"]:
        commands = "\n".join(escape(line) for line in results["config"]["commands"])
        parts += ["<h2>Commands</h2>", f"<pre>{commands}</pre>"]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Sweep over token counts</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


_SAMPLES = (
    "One column per class, one row per K, chosen by index and not by eye. A column starts from one "
    "noise, merged like the tokens: its {count} images are attempts at one picture with fewer or "
    "more of them."
)
_RECONSTRUCTIONS = (
    "Validation images, and what the tokenizer gives back from K tokens; PSNR is the mean over all "
    "validation images. What is lost here, the generator cannot make."
)
_TREE = (
    "Above: the learned merge tree, the same for every image. Tokens that join low are nearly "
    "interchangeable; a dashed line is the cut that leaves K clusters, and tokens of different "
    "blocks never merge. Below: the {size} tokens in a grid, row by row; one colour within a block "
    "is one cluster, grey tokens are alone."
)


def _lead(rows: list[dict[str, Any]], size: int) -> str:
    lengths = ", ".join(str(row["num_tokens"]) for row in rows)
    return (
        '<p class="lead">An image is '
        f"{size} tokens, and a learned tree says which of them to merge. One diffusion transformer "
        f"generates at every token count K; here at K = {lengths}, with the same weights.</p>"
    )


def _change(before: float, after: float, digits: str = ".1f") -> str:
    verb = "falls" if after < before else "rises" if after > before else "stays"
    return f"{verb} from {before:{digits}} to {after:{digits}}"


def _tradeoff_caption(rows: list[dict[str, Any]]) -> str:
    low, high = rows[0], rows[-1]
    if low is high:
        return "One K only: sweep more lengths to see a trade-off."
    factor = high["samples"]["gflops_per_image"] / low["samples"]["gflops_per_image"]
    return (
        f"From K = {low['num_tokens']} to K = {high['num_tokens']} an image takes {factor:.1f} "
        "times the work; the distance of the samples to the validation images "
        f"{_change(low['samples']['distance'], high['samples']['distance'])}, that of the "
        "reconstructions, the floor for any generator on this tokenizer, "
        f"{_change(low['reconstructions']['distance'], high['reconstructions']['distance'])}. "
        "Lower is better."
    )


def _table_note(results: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    note = (
        f"Distance: {escape(results['distance']['label'])}; lower is better, and it compares only "
        f"runs on the same validation images, with the same number of samples (here "
        f"{rows[0]['samples']['num_images']} per K)."
    )
    if any(row["training_loss"] for row in rows):
        note += (
            " Training loss: means over the first and the last 20 steps at that K; it grows with K "
            "by construction, so read each row for itself."
        )
    return note


def _numbers(rows: list[dict[str, Any]]) -> str:
    heads = [
        "K", "GFLOPs<br>per image", "network runs<br>per image", "seconds", "images<br>per second",
        "distance", "distance,<br>reconstructed", "PSNR, re-<br>constructed",
        "training loss,<br>first and last 20", "last /<br>first",
    ]  # fmt: skip
    with_loss = any(row["training_loss"] for row in rows)
    heads = heads if with_loss else heads[:8]
    lines = []
    for row in rows:
        samples, floor, loss = row["samples"], row["reconstructions"], row["training_loss"]
        cells = [
            f"{samples['gflops_per_image']:.3g}",
            str(samples["num_forwards"]),
            f"{samples['seconds']:.1f}",
            f"{samples['num_images'] / samples['seconds']:.1f}",
            f"{samples['distance']:.2f}",
            f"{floor['distance']:.2f}",
            f"{floor['psnr_db']:.2f} dB",
        ]
        if with_loss:
            cells += (
                [f"{loss['first20']:.3f}, {loss['last20']:.3f}", f"{loss['ratio']:.2f}"]
                if loss
                else ["not trained", ""]
            )
        lines.append(
            f"<tr><th>{row['num_tokens']}</th>"
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _facts(results: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    config, versions = results["config"], results["versions"]
    protocol = rows[0]["protocol"]["samples"]
    low, high = config["cfg_interval"]
    parameters = results["parameters"]
    guidance = f"scale {config['cfg_scale']}, for t in [{low}, {high}], {config['cfg_rescale']}"
    devices = sorted({f"{row['samples']['ranks']} x {row['samples']['device']}" for row in rows})
    explained = protocol["features"]["explained_variance"]
    facts = {
        "Generator": f"{parameters['generator']:,} parameters, {results['training_steps']} steps",
        "Tokenizer": f"{parameters['tokenizer']:,} parameters",
        "Solver": f"Euler, {config['num_steps']} grid points ({config['num_steps'] - 1} steps), "
        f"timestep shift {config['timestep_shift']}",
        "Guidance": guidance if config["cfg_scale"] > 1 else "off",
        "Noise": f"{protocol['noise_scale']}, seed {config['seed']}, one stream per image index",
        "Samples": f"{config['num_images']} per K, class = index mod {len(results['classes'])}",
        "Distance": f"{results['distance']['label']}; they hold {explained:.1%} of the variance",
        "Reference": f"{protocol['reference']['num_images']} validation images, pixels "
        f"{protocol['reference']['pixels_sha256'][:16]}",
        "Ran on": ", ".join(devices),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    lines = "".join(
        f"<tr><th>{key}</th><td>{escape(text)}</td></tr>" for key, text in facts.items()
    )
    return f'<div class="scroll"><table class="facts"><tbody>{lines}</tbody></table></div>'


def _figure(
    name: str, pictures: dict[str, tuple[bytes, bytes]], caption: str, max_width: str
) -> str:
    light, dark = (
        "data:image/png;base64," + base64.b64encode(data).decode() for data in pictures[name]
    )
    return (
        f'<figure><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(name.replace("_", " "))}" style="max-width:{max_width}">'
        f"</picture><figcaption>{escape(caption)}</figcaption></figure>"
    )
