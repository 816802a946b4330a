"""The report as one HTML file that loads nothing, and as Markdown: what the templates are told.

The words are in `templates/`; what is computed for them is here and in `tables`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, select_autoescape

from lgm_scale.evaluation.metrics.catalogue import METRICS
from lgm_scale.evaluation.report.curves import PUBLISHED_NAME, main_metric
from lgm_scale.evaluation.report.drawing import DARK, LIGHT
from lgm_scale.evaluation.report.pictures import ACROSS
from lgm_scale.evaluation.report.tables import columns, is_long, reconstruction_table, sample_table
from lgm_scale.evaluation.sweep.results import tables_of
from lgm_scale.families.generator import GeneratorFamily, generator_families

Results = dict[str, Any]


class Picture(NamedTuple):
    """One picture as PNG, drawn for light and for dark surroundings."""

    light: bytes
    dark: bytes


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lgm_scale.evaluation.report"),
        autoescape=select_autoescape(["html.j2"]),
        keep_trailing_newline=True,
    )
    environment.filters["data"] = _data
    environment.tests["long"] = is_long
    return environment


def _tables(results: Results) -> list[dict[str, Any]]:
    """Rows of samples in tables of those that were measured alike, final ones first."""
    losses = results["training_loss"]
    return [
        {
            "rows": rows,
            "metrics": columns(rows),
            "names": {key: name for row in rows for key, name in row["names"].items()},
            "searched": rows[0] in results["searched"],
            "table": sample_table(rows, losses),
            "with_loss": any(str(row["cell"]["num_tokens"]) in losses for row in rows),
        }
        for rows in tables_of([*results["rows"], *results["searched"]])
    ]


def render_page(
    results: Results, pictures: Mapping[str, Picture], sheets: Mapping[int, bytes]
) -> str:
    """Render the page.

    `results` are those of results.json; where they are of several sweeps also `compared`, from the
    name of each to its folder. `pictures` are tradeoff, tradeoff_narrow for narrow screens, and
    where they were drawn samples, reconstructions and merge_tree; `sheets` are more samples, by K,
    as PNG.
    """
    rows = results["rows"]
    lengths = sorted({row["cell"]["num_tokens"] for row in rows})
    # Sweeps of the first versions do not say their family: there was but one.
    family = generator_families().get(results.get("kind", "generator"), GeneratorFamily)
    return _environment().get_template("page.html.j2").render(
        results=results,
        pictures=pictures,
        sheets=sheets,
        tables=_tables(results),
        reconstructions=(
            reconstruction_table(results["reconstructions"]) if "reconstructions" in pictures
            else None
        ),
        about_tokens=family.about_tokens.format(
            size=results["num_base_tokens"], lengths=", ".join(map(str, lengths))
        ),
        about_noise=family.about_noise,
        across=ACROSS,
        devices=sorted({name for row in rows for name in row["run"]["devices"]}),
        metrics=METRICS,
        distance=main_metric(rows),
        published_name=PUBLISHED_NAME,
        light=LIGHT,
        dark=DARK,
    )  # fmt: skip


def render_markdown(results: Results) -> str:
    """Render results.md: one table per protocol, and one of the reconstructions."""
    return _environment().get_template("results.md.j2").render(
        results=results,
        tables=_tables(results),
        reconstructed=columns(results["reconstructions"]),
    )  # fmt: skip
