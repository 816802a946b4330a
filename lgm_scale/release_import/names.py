"""The release's names of weights and ours; what became of every key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lgm_scale.errors import CheckpointError

__all__ = [
    "IGNORED_BY_TOKENIZER",
    "KeyReport",
    "fit",
    "our_generator_name",
    "our_tokenizer_name",
    "translate",
]

_TOKENIZER_PREFIXES = {
    "encoder.model.": "encoder.vit.",
    "quant_conv.": "to_latent.",
    "quantize.embedding": "quantizer.codes",
    "merge_module.": "merging.",
    "post_quant_conv.": "decoder.latent_in.",
    "decoder.model.": "decoder.vit.",
    "decoder.to_pixel.model.": "decoder.out.",
}
IGNORED_BY_TOKENIZER = {
    "repa_model.": "frozen teacher of the representation loss; training reads it from its own file",
    "decoder_dino.": "auxiliary decoder of the representation loss; not needed for use",
    "post_quant_conv_dino.": "input of the auxiliary decoder; not needed for use",
    "to_pixel_dino.": "output of the auxiliary decoder; not needed for use",
    "decoder.model.patch_embed.": "never read: the decoder sees no image",
    "quantize.codebook_used": "statistics of training, no weight",
}
"""Prefix -> why keys that begin with it are left out."""

_GENERATOR_PARTS = {
    "transformer.": "",
    "x_embedder": "x_embed",
    "t_embedder": "t_embed",
    "y_embedder.embedding_table": "label_embed.table",
    "adaLN_modulation": "modulation",
    "final_layer": "final",
}
_MAX_PROBLEMS = 8


def our_tokenizer_name(name: str) -> str:
    """From the release's name of a weight of the tokenizer to ours."""
    for theirs, ours in _TOKENIZER_PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def our_generator_name(name: str) -> str:
    """From the release's name of a weight of the diffusion transformer to ours."""
    for theirs, ours in _GENERATOR_PARTS.items():
        name = name.replace(theirs, ours)
    return name


@dataclass(frozen=True)
class KeyReport:
    """What became of every key of a checkpoint.

    Args:
        taken: The release's name -> ours.
        ignored: The release's name -> why it was left out.
    """

    taken: dict[str, str]
    ignored: dict[str, str]

    def counts(self) -> dict[str, int]:
        """Keys used under their own name, renamed, ignored."""
        used = sum(theirs == ours for theirs, ours in self.taken.items())
        return {"used": used, "renamed": len(self.taken) - used, "ignored": len(self.ignored)}

    def lines(self) -> Iterator[str]:
        """One line per key, then the counts."""
        for theirs, ours in self.taken.items():
            yield f"used     {theirs}" if theirs == ours else f"renamed  {theirs} -> {ours}"
        for theirs, reason in self.ignored.items():
            yield f"ignored  {theirs}: {reason}"
        counts = self.counts()
        parts = ", ".join(f"{count} {what}" for what, count in counts.items())
        yield f"{sum(counts.values())} keys: {parts}"
        for reason, count in Counter(self.ignored.values()).items():
            yield f"  {count} ignored: {reason}"


def translate(
    names: Iterable[str], rename: Callable[[str], str], ignored: Mapping[str, str]
) -> KeyReport:
    """Sort the keys into those to take and those to leave out; `fit` judges the former."""
    taken, left_out = {}, {}
    for name in names:
        reasons = [why for prefix, why in ignored.items() if name.startswith(prefix)]
        if reasons:
            left_out[name] = reasons[0]
        else:
            taken[name] = rename(name)
    return KeyReport(taken, left_out)


def fit(
    state: Mapping[str, Tensor],
    report: KeyReport,
    expected: Mapping[str, Tensor],
    path: str | Path,
) -> dict[str, Tensor]:
    """The weights under our names, float32, if every key fits.

    Args:
        state: Weights under the release's names.
        report: What `translate` made of the state's names.
        expected: State of the network to fill; its shapes count (it may be on the meta device).
        path: For messages.

    Raises: CheckpointError naming all keys that are unknown, missing, twice there, of another
    shape, or not finite.
    """
    # Two of their names may become one of ours: found here, and not by whichever comes last.
    sources: dict[str, list[str]] = {}
    for theirs, ours in report.taken.items():
        sources.setdefault(ours, []).append(theirs)
    problems = [
        f"key {theirs}: unknown; this importer has no place for it"
        for theirs, ours in report.taken.items()
        if ours not in expected
    ]
    weights = {}
    for ours, target in expected.items():
        names = sources.get(ours, [])
        if len(names) != 1:
            found = f"given {len(names)} times ({', '.join(names)})" if names else "missing"
            problems.append(f"key for {ours}: {found}; expected shape {list(target.shape)}")
            continue
        value = state[names[0]]
        if value.shape != target.shape:
            problems.append(
                f"key {names[0]}: shape {list(value.shape)}, expected {list(target.shape)}"
            )
        elif not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            problems.append(f"key {names[0]}: not finite floating-point numbers ({value.dtype})")
        else:
            weights[ours] = value.to(torch.float32, copy=True)  # keys may share memory
    if problems:
        raise CheckpointError("\n".join([f"{path} does not fit:", *_shortened(problems)]))
    return weights


def _shortened(problems: list[str]) -> list[str]:
    """Lines of the first problems, and how many more there are."""
    lines = [f"  - {problem}" for problem in problems[:_MAX_PROBLEMS]]
    rest = len(problems) - len(lines)
    return [*lines, f"  - and {rest} more"] if rest else lines
