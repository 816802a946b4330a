"""Reference statistics: what images are compared with, in every form they are published in.

| file | holds |
| --- | --- |
| `.safetensors` | our own form, of the command `reference`: statistics, features, protocol |
| `.npz` | `mu`, `sigma` (or `ref_mu`, `ref_sigma`), and ADM's `mu_s`, `sigma_s`, `arr_0` |
| `.pkl` | EDM2's `{"fid": {"mu", "sigma"}, "fd_dinov2": {"mu", "sigma"}}` |

Reading one executes nothing: the unpickler knows numpy's arrays and nothing else.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lgm_scale.errors import DataError
from lgm_scale.evaluation.engine.statistics import FeatureStatistics
from lgm_scale.evaluation.features.inception import SPATIAL_DIM
from lgm_scale.evaluation.features.spaces import Spaces
from lgm_scale.evaluation.images import npz_images_shape
from lgm_scale.storage.files import file_hash, write_whole

FORMAT = "lgm_scale.reference"
_MEAN_KEYS = ("mu", "ref_mu", "mean", "fid_mu")
_SIGMA_KEYS = ("sigma", "ref_sigma", "cov", "fid_sigma")
_ASYMMETRY = 1e-4  # of the largest entry; some files hold float32 numbers


@dataclass(frozen=True)
class Reference:
    """Statistics and features of the images that others are compared with.

    `image_size` and `weights` (feature space -> SHA-256 of the weights) are None or empty where a
    file does not say.
    """

    name: str
    statistics: dict[str, FeatureStatistics] = field(default_factory=dict)
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    image_size: int | None = None
    weights: dict[str, str] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    """Where it comes from, hash, count, crop: what a result keeps in its protocol."""

    def held(self) -> list[str]:
        """What it holds, for people."""
        return [
            *(f"statistics of {name}" for name in self.statistics),
            *(f"{len(values)} vectors of {name}" for name, values in self.features.items()),
        ]


def load_reference(path: str | Path) -> Reference:
    """Read a reference, whatever its form.

    Raises: DataError if the file is missing, of no known form, or its numbers cannot be statistics.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"reference: {path} is not a file; make one with "
            "`python -m lgm_scale.evaluation.commands.reference`"
        )
    readers: dict[str, Callable[[Path], Reference]] = {
        ".safetensors": _read_own,
        ".npz": _read_npz,
        ".pkl": _read_edm2,
    }
    if path.suffix not in readers:
        raise DataError(f"reference: {path} ends in none of {', '.join(readers)}")
    reference = readers[path.suffix](path)
    if not reference.statistics:
        raise DataError(
            f"reference: {path} holds no mean and covariance; turn its images into a reference "
            f"with `python -m lgm_scale.evaluation.commands.reference {path} --out "
            "FILE.safetensors`"
        )
    for name, statistics in reference.statistics.items():
        _check(f"{path}: {name}", statistics)
    return reference


def _check(what: str, statistics: FeatureStatistics) -> None:
    mean, covariance = statistics.mean, statistics.covariance
    if covariance.shape != (len(mean), len(mean)):
        raise DataError(f"{what}: mean {mean.shape} and covariance {covariance.shape} do not fit")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{what}: statistics are not finite; get the file again")
    largest = float(np.abs(covariance).max(initial=1e-300))
    if np.abs(covariance - covariance.T).max(initial=0) > _ASYMMETRY * largest:
        raise DataError(f"{what}: the covariance is not symmetric; get the file again")
    if np.diagonal(covariance).min(initial=0) < 0:
        raise DataError(f"{what}: the covariance has negative variances; get the file again")


def _statistics(mean: Any, covariance: Any, count: int | None = None) -> FeatureStatistics:
    return FeatureStatistics(
        np.asarray(mean, dtype="f8"), np.asarray(covariance, dtype="f8"), count
    )


def _source(path: Path, **more: Any) -> dict[str, Any]:
    return {"file": path.name, "sha256": file_hash(path), **more}


def check_reference(reference: Reference | None, spaces: Spaces, image_size: int) -> None:
    """Refuse a reference of another resolution, dimension or network. Raises: DataError."""
    if reference is None:
        return
    if reference.image_size not in (None, image_size):
        raise DataError(
            f"reference: {reference.name} was made of images of {reference.image_size} pixels, the "
            f"bundle makes {image_size}; take a reference of that size"
        )
    for name, statistics in reference.statistics.items():
        expected = spaces.outputs.get(name)
        if expected is not None and len(statistics.mean) != expected:
            raise DataError(
                f"reference: {reference.name} has {len(statistics.mean)} dimensions of {name}, the "
                f"features here {expected}; they are of another network"
            )
    for own in spaces.describe():
        theirs = reference.weights.get(own["space"])
        if theirs is not None and theirs != own.get("weights_sha256"):
            raise DataError(
                f"reference: {reference.name} was made with other {own['space']} weights "
                f"({theirs[:12]}) than the ones given ({own.get('weights_sha256', '')[:12]}); use "
                "the same file, or make the reference again"
            )


# --- ours -------------------------------------------------------------------------------------


def save_reference(path: Path, reference: Reference) -> None:
    """Write a reference in our own form, whole or not at all."""
    arrays: dict[str, np.ndarray] = {}
    counts = {}
    for name, statistics in reference.statistics.items():
        arrays |= {f"{name}.mean": statistics.mean, f"{name}.covariance": statistics.covariance}
        counts[name] = statistics.count
    arrays |= {f"{name}.features": values for name, values in reference.features.items()}
    info = {
        "format": FORMAT,
        "name": reference.name,
        "counts": counts,
        "image_size": reference.image_size,
        "weights": reference.weights,
        "description": reference.description,
    }
    write_whole(path, save(arrays, metadata={"reference": json.dumps(info)}))


def _read_own(path: Path) -> Reference:
    try:
        with safe_open(path, framework="numpy") as file:
            info = json.loads((file.metadata() or {})["reference"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if info["format"] != FORMAT:
            raise ValueError(f"format {info['format']!r}")
        statistics = {
            name: _statistics(arrays[f"{name}.mean"], arrays[f"{name}.covariance"], count)
            for name, count in info["counts"].items()
        }
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"reference: {path} is none of ours, or damaged ({error})") from error
    features = {
        name.removesuffix(".features"): values
        for name, values in arrays.items()
        if name.endswith(".features")
    }
    return Reference(
        name=info["name"],
        statistics=statistics,
        features=features,
        image_size=info["image_size"],
        weights=info["weights"],
        description=_source(path, **info["description"]),
    )


# --- published forms --------------------------------------------------------------------------


def _read_npz(path: Path) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = set(file.files)
            statistics = {}
            mean, sigma = (
                next((k for k in n if k in keys), None) for n in (_MEAN_KEYS, _SIGMA_KEYS)
            )
            if mean is not None and sigma is not None:
                statistics["inception_pool"] = _statistics(file[mean], file[sigma])
            if {"mu_s", "sigma_s"} <= keys:
                statistics["inception_spatial"] = _statistics(file["mu_s"], file["sigma_s"])
        shape = npz_images_shape(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"reference: {path} cannot be read as npz ({error})") from error
    for name, dim in (("inception_pool", 2048), ("inception_spatial", SPATIAL_DIM)):
        if name in statistics and len(statistics[name].mean) != dim:
            raise DataError(
                f"reference: {path} has {name} of {len(statistics[name].mean)} dimensions, "
                f"not {dim}: these are no statistics of Inception"
            )
    kind = "ADM" if "inception_spatial" in statistics else "npz"
    return Reference(
        name=f"{path.stem} ({kind})",
        statistics=statistics,
        image_size=shape[1] if shape else None,
        description=_source(path, kind=kind, keys=sorted(keys)),
    )


class _ArraysOnly(pickle.Unpickler):
    """Knows numpy arrays, numbers and containers; anything else is refused by name."""

    ALLOWED = {  # noqa: RUF012
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        *(
            (f"{core}.multiarray", name)
            for core in ("numpy.core", "numpy._core")
            for name in ("_reconstruct", "scalar")
        ),
        *((f"{core}.numeric", "_frombuffer") for core in ("numpy.core", "numpy._core")),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not executed")
        return super().find_class(module, name)


def _read_edm2(path: Path) -> Reference:
    spaces = {"fid": ("inception_pool", 2048), "fd_dinov2": ("dinov2", 1024)}
    statistics = {}
    try:
        with path.open("rb") as file:
            values = _ArraysOnly(file).load()
        for key, (feature, dim) in spaces.items():
            if key in values:
                statistics[feature] = _statistics(values[key]["mu"], values[key]["sigma"])
                if len(statistics[feature].mean) != dim:
                    raise ValueError(
                        f"{key} has {len(statistics[feature].mean)} dimensions, not {dim}"
                    )
    except (pickle.UnpicklingError, OSError, EOFError, ValueError, KeyError, TypeError, IndexError,
            AttributeError, ImportError) as error:  # fmt: skip
        raise DataError(f"reference: {path} cannot be read as EDM2 statistics ({error})") from error
    return Reference(
        name=f"{path.stem} (EDM2)", statistics=statistics, description=_source(path, kind="EDM2")
    )
