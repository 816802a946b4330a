"""The report as one HTML file: numbers, pictures and commands, with nothing to load."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

from lgm_scale.evaluation.metrics.catalogue import METRICS
from lgm_scale.evaluation.report.page_style import SCRIPT, STYLE
from lgm_scale.evaluation.report.tradeoff import PUBLISHED_NAME, main_metric
from lgm_scale.evaluation.sweep.results import columns, tables_of

__all__ = ["Pictures", "render_page"]

Pictures = dict[str, tuple[bytes, bytes]]
"""Name -> PNG for light and for dark."""
Results = dict[str, Any]
Row = dict[str, Any]


def render_page(results: Results, pictures: Pictures, sheets: dict[int, bytes]) -> str:
    """The page.

    Args:
        results: See `lgm_scale.evaluation.sweep.results`.
        pictures: By name.
        sheets: More samples, by K.
    """
    rows, compared = results["rows"], results.get("compared")
    parts = [
        f"<h1>{'Sweeps compared' if compared else 'One generator, every token count'}</h1>",
        _compared(compared) if compared else _lead(results),
        "<h2>Numbers</h2>",
        *_tables(results),
        "<h2>Quality against work and speed</h2>",
        _figure("tradeoff", pictures, _tradeoff_caption(rows)),
    ]
    if "samples" in pictures:
        caption = _SAMPLES + _ONE_NOISE[results.get("kind", "generator")] + " Click for full size."
        parts += ["<h2>Samples</h2>", _figure("samples", pictures, caption)]
        parts += [_sheet(k, data) for k, data in sheets.items()]
    if "reconstructions" in pictures:
        parts += [
            "<h2>What merging keeps</h2>",
            _reconstruction_table(results["reconstructions"]),
            _figure("reconstructions", pictures, _RECONSTRUCTIONS),
        ]
    if "merge_tree" in pictures:
        caption = _TREE.format(size=results["num_base_tokens"])
        parts += ["<h2>What is merged</h2>", _figure("merge_tree", pictures, caption)]
    parts += ["<h2>How it was measured</h2>", _facts(results)]
    if results["off"]:
        lines = "".join(f"<li>{escape(line)}</li>" for line in results["off"].values())
        parts.append(f'<ul class="muted">{lines}</ul>')
    if results["config"]["commands"] and not compared:
        commands = "\n".join(escape(line) for line in results["config"]["commands"])
        parts += ["<h2>Commands</h2>", f"<pre>{commands}</pre>"]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Sweep over token counts</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + '\n</main>\n<dialog aria-label="picture in full size"><img src="data:," alt=""></dialog>'
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


_SAMPLES = (
    "One column per class, one row per K (the cell with the smallest distance), chosen by index "
    "and not by eye. "
)
_ONE_NOISE = {
    "generator": "A column starts from one noise, merged like the tokens: its images are attempts "
    "at one picture with fewer or more of them.",
    "spatial_generator": "A column starts from one noise, the same at every K: its images are "
    "attempts at one picture with less or more work.",
}
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


_LEADS = {
    "generator": "An image is {size} tokens, and a learned tree says which of them to merge. One "
    "diffusion transformer generates at every token count K; here at K = {lengths}, with the same "
    "weights.",
    "spatial_generator": "An image is a grid of {size} tokens, and K says how many of them the "
    "core of one diffusion transformer works on; its first and last blocks see them all. Here K = "
    "{lengths}, with the same weights.",
}


def _lead(results: Results) -> str:
    lengths = sorted({row["cell"]["num_tokens"] for row in results["rows"]})
    text = _LEADS[results.get("kind", "generator")].format(
        size=results["num_base_tokens"], lengths=", ".join(map(str, lengths))
    )
    return f'<p class="lead">{text}</p>'


def _compared(compared: dict[str, str]) -> str:
    lines = "".join(
        f"<li><b>{escape(name)}</b>: {escape(path)}</li>" for name, path in compared.items()
    )
    return f"<p>All were measured in the same way.</p><ul>{lines}</ul>"


def _tradeoff_caption(rows: Sequence[Row]) -> str:
    key = main_metric(rows)
    if key is None:
        return "No distance was measured."
    ordered = sorted(rows, key=lambda row: row["work"]["tflops_per_image"])
    low, high = ordered[0], ordered[-1]
    text = "Lower is better."
    if low is not high:
        factor = high["work"]["tflops_per_image"] / low["work"]["tflops_per_image"]
        text = (
            f"From {low['label']} to {high['label']} an image takes {factor:.1f} times the work, "
            f"and the distance goes from {low['metrics'][key]:.4g} to {high['metrics'][key]:.4g}. "
            + text
        )
    if rows[0]["names"][key] == PUBLISHED_NAME:
        text += (
            " Hollow circles are published by the methods' authors, not measured here: their "
            "operations are counted by their own conventions, their speeds are those of another "
            "device."
        )
    return text


# --- tables -----------------------------------------------------------------------------------


def _tables(results: Results) -> list[str]:
    parts = []
    for rows in tables_of([*results["rows"], *results["searched"]]):
        if rows[0] in results["searched"]:
            parts.append(
                f"<h3>Search, {rows[0]['num_images']} images</h3><p>Only to find the guidance: "
                "these numbers do not compare with those of more images.</p>"
            )
        parts.append(_sample_table(rows, results["training_loss"]))
        parts.append(f'<p class="muted" style="margin-top:12px">{_note(results, rows)}</p>')
    return parts


def short_name(row: Row, key: str) -> str:
    """A metric's name in the head of a table; an unpublished one has a star for the note."""
    if key.endswith("_std"):
        return "±"
    full = row["names"].get(key, key)
    metric = METRICS.get(key)
    if metric is None or len(full) <= 20:
        return full
    return f"{metric.name}*"


def _sample_table(rows: Sequence[Row], losses: dict[str, Any]) -> str:
    settings = ["num_tokens", "cfg_scale", "num_steps"]
    settings += [
        name
        for name in ("cfg_interval", "cfg_rescale", "timestep_shift", "solver",
                     "uncond_num_tokens", "guidance", "length_schedule")
        if len({str(row["cell"].get(name)) for row in rows}) > 1
    ]  # fmt: skip
    titles = {"num_tokens": "K", "cfg_scale": "guidance", "num_steps": "points",
              "guidance": "weak branch"}  # fmt: skip
    keys = columns(rows)
    with_loss = any(str(row["cell"]["num_tokens"]) in losses for row in rows)
    heads = [titles.get(name, name.replace("_", " ")) for name in settings]
    if any(row.get("run_name") for row in rows):
        heads.insert(0, "sweep")
    heads += [next(short_name(row, key) for row in rows if key in row["metrics"]) for key in keys]
    heads += [
        "GFLOPs<br>per image",
        "rows<br>per image",
        "images<br>per second",
        "share in<br>sampling",
    ]
    heads += ["training loss,<br>last / first 20"] if with_loss else []
    best = {key: _best(rows, key) for key in keys}
    lines = []
    for row in rows:
        cells = [_cell(row["run_name"])] if row.get("run_name") else []
        cells += [_cell(row["cell"].get(name)) for name in settings]
        cells += [
            _number(row["metrics"].get(key), "#.4g", row["metrics"].get(key) == best[key])
            for key in keys
        ]
        cells += [
            _number(row["work"]["tflops_per_image"] * 1e3, "#.4g"),
            _number(row["work"]["rows"], "d"),
            _number(row["run"]["images_per_second"], ".3g"),
            _number(row["run"]["sampling_share"], ".1%"),
        ]
        if with_loss:
            cells.append(_loss(losses.get(str(row["cell"]["num_tokens"]))))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return _table(heads, lines)


def _reconstruction_table(rows: Sequence[Row]) -> str:
    keys = columns(rows)
    heads = ["K", *(rows[0]["names"].get(key, key).split(", against")[0] for key in keys)]
    short = [head if len(head) <= 34 else _wrapped(head, rows[0], key)
             for head, key in zip(heads, ["", *keys], strict=True)]  # fmt: skip
    lines = []
    for row in rows:
        cells = [_number(row["num_tokens"], "d")]
        cells += [_number(row["metrics"][key], "#.4g") for key in keys]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    notes = [text for key, text in rows[0]["names"].items() if key not in ("psnr_db", "ssim")]
    note = (
        f'<p class="muted" style="margin-top:12px">{escape("; ".join(notes))}.</p>' if notes else ""
    )
    return _table(short, lines) + note


def _wrapped(head: str, row: Row, key: str) -> str:
    name = METRICS[key[1:].rsplit("_", 1)[0]].name
    against = "validation" if key.endswith("_val") else "reference"
    return f"{name}*,<br>against {against}"


def _table(heads: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f'<th scope="col"><button>{name}</button></th>' for name in heads)
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _best(rows: Sequence[Row], key: str) -> float | None:
    values = [row["metrics"][key] for row in rows if key in row["metrics"]]
    if key not in METRICS or len(values) < 2:
        return None
    return min(values) if METRICS[key].better == "lower" else max(values)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        text = ", ".join(
            ":".join(f"{part:g}" for part in each) if isinstance(each, list) else f"{each:g}"
            for each in value
        )
        return f"<td>{escape(text) or '-'}</td>"
    if value is None:
        return "<td>-</td>"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f'<td data-value="{escape(text)}">{escape(text)}</td>'


def _number(value: float | None, digits: str, best: bool = False) -> str:
    if value is None:
        return '<td data-value="">-</td>'
    mark = ' class="best"' if best else ""
    return f'<td data-value="{value}"{mark}>{value:{digits}}</td>'


def _loss(loss: dict[str, Any] | None) -> str:
    if loss is None:
        return '<td data-value="">not trained</td>'
    return f'<td data-value="{loss["ratio"]}">{loss["last20"]:.3f} / {loss["first20"]:.3f}</td>'


def _note(results: Results, rows: Sequence[Row]) -> str:
    named = {key: name for row in rows for key, name in row["names"].items()}
    parts = [
        f"{'*' if len(name) > 20 else ''}{escape(name)} ({METRICS[key].better} is better)"
        for key, name in named.items()
    ]
    reference = rows[0]["protocol"]["reference"].get("name", results["reference"]["name"])
    note = f"Against {escape(reference)}: "
    note += "; ".join(parts) + ". Distances compare only under one protocol and with one number of "
    note += "images. Click a head to sort."
    if any(str(row["cell"]["num_tokens"]) in results["training_loss"] for row in rows):
        note += (
            " Training loss: means over the first and the last 20 steps at that K; it grows with K "
            "by construction, so read each row for itself."
        )
    return note


# --- facts and figures ------------------------------------------------------------------------


def _facts(results: Results) -> str:
    config, versions, rows = results["config"], results["versions"], results["rows"]
    protocol, parameters = rows[0]["protocol"], results["parameters"]
    devices = sorted({name for row in rows for name in row["run"]["devices"]})
    reference = results["reference"]
    identity = reference.get("sha256") or reference.get("images_sha256") or ""
    spaces = "; ".join(
        f"{space['space']}"
        + (f", weights {space['weights_sha256'][:16]}" if "weights_sha256" in space else "")
        + (f", {space['explained_variance']:.1%} of the variance" if "explained_variance" in space
           else "")
        for space in protocol["features"]
    )  # fmt: skip
    facts = {name.capitalize(): f"{count:,} parameters" for name, count in parameters.items()}
    facts["Generator"] += f", {results['training_steps']} steps"
    facts |= {
        "Noise": f"{protocol['noise_scale']}, seed {protocol['seed']}, one stream per image index",
        "Samples": f"{rows[0]['num_images']} per cell, class = index mod {len(results['classes'])}",
        "Pixels": protocol["pixels"],
        "Feature spaces": spaces,
        "Reference": f"{reference['name']}, {identity[:16]}",
        "Ran on": f"{', '.join(devices)}; {results['run']['ranks']} ranks at the end",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    if results.get("compared"):
        for name in (*map(str.capitalize, parameters), "Noise"):
            del facts[name]
    elif config["search"]:
        search = config["search"]
        facts["Search"] = (
            f"{search['metric']} on {search['num_images']} images; a line of scales ends after "
            f"{search['patience']} in a row that are worse by {search['margin']}"
        )
    lines = "".join(
        f"<tr><th>{key}</th><td>{escape(text)}</td></tr>" for key, text in facts.items()
    )
    return f'<div class="scroll"><table class="facts"><tbody>{lines}</tbody></table></div>'


def _figure(name: str, pictures: Pictures, caption: str) -> str:
    light, dark = (_data(data) for data in pictures[name])
    return (
        f'<figure><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(name.replace("_", " "))}">'
        f"</picture><figcaption>{escape(caption)}</figcaption></figure>"
    )


def _sheet(num_tokens: int, data: bytes) -> str:
    return (
        f"<details><summary>More samples at K = {num_tokens}</summary>"
        f'<figure><img src="{_data(data)}" alt="samples at K = {num_tokens}"></figure></details>'
    )


def _data(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
