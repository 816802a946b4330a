"""Every metric against torch-fidelity's own `calculate_metrics`, on random-weight Inception."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from lgm_scale.evaluation.engine.chunks import ChunkResult, Job
from lgm_scale.evaluation.engine.parts import Part
from lgm_scale.evaluation.engine.rows import RowStore
from lgm_scale.evaluation.engine.stages import Engine
from lgm_scale.evaluation.engine.statistics import statistics_of
from lgm_scale.evaluation.features.extraction import OriginalFeatures
from lgm_scale.evaluation.features.inception import NETWORK, InceptionFeatures, register_network
from lgm_scale.evaluation.metrics import scores
from lgm_scale.evaluation.metrics.catalogue import (
    Selection,
    compute,
    describe_metrics,
    select,
    warn_few_images,
)
from lgm_scale.evaluation.metrics.scores import frechet_distance, inception_score
from lgm_scale.evaluation.references.files import Reference
from lgm_scale.evaluation.sweep.config import Cell
from lgm_scale.evaluation.sweep.measure import Sweep
from lgm_scale.sampling.config import SamplerConfig

COUNT = 16
CPU = torch.device("cpu")


def pictures(seed: int) -> torch.Tensor:
    """Coarse patterns, with noise of their own for every seed."""
    coarse = np.random.default_rng(0).integers(0, 256, (COUNT, 3, 6, 6))
    noise = np.random.default_rng(seed + 1).integers(-9, 10, (COUNT, 3, 36, 36))
    fine = coarse.repeat(6, axis=2).repeat(6, axis=3) + noise
    return torch.from_numpy(fine.clip(0, 255).astype(np.uint8))


class Pictures(Dataset):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]

    def read(self, indices):
        return self.images[torch.as_tensor(indices)], np.zeros(len(indices), np.int64)


@pytest.fixture(scope="module")
def extractor(inception_file) -> InceptionFeatures:
    return InceptionFeatures(inception_file)


@pytest.fixture(scope="module")
def sides(extractor, tmp_path_factory) -> tuple[Engine, Job, Job]:
    """Two sets of images through chunk files, in chunks that do not divide them."""
    engine = Engine(tmp_path_factory.mktemp("parity"), torch.device("cpu"), quiet=True)
    jobs = [
        Job(name, {"seed": seed}, COUNT, 6,
            OriginalFeatures(Pictures(pictures(seed)), [extractor], torch.device("cpu"), 5))
        for seed, name in enumerate(("generated", "real"))
    ]  # fmt: skip
    engine.make_chunks(jobs, Part(), "parity", may_compute=True)
    return engine, *jobs  # type: ignore[return-value]


@pytest.fixture(scope="module")
def theirs(inception_file) -> dict[str, float]:
    from torch_fidelity import calculate_metrics

    return calculate_metrics(
        input1=Pictures(pictures(0)), input2=Pictures(pictures(1)), cuda=False, batch_size=4,
        isc=True, kid=True, prc=True, kid_subset_size=COUNT, kid_subsets=100,
        isc_splits=1,  # one of up to 5000 images
        feature_extractor=NETWORK, feature_extractor_weights_path=str(inception_file),
        feature_layer_prc="2048", feature_layer_isc="logits_unbiased", feature_layer_kid="2048",
        save_cpu_ram=True, cache=False, verbose=False,
    )  # fmt: skip


class EarlyLayer:
    """Sixty-four early features: cheap, and of full rank with 72 images."""

    outputs = {"inception_pool": 64}  # noqa: RUF012

    def __init__(self, path: Path) -> None:
        from torch_fidelity.utils import create_feature_extractor

        register_network()
        self.net = create_feature_extractor(
            NETWORK, ["64"], cuda=False, verbose=False, feature_extractor_weights_path=str(path)
        )

    def __call__(self, images: torch.Tensor) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {"inception_pool": self.net(images)[0].numpy()}

    def describe(self) -> dict:
        return {"space": "inception"}


@pytest.mark.slow
def test_the_distance_is_that_of_torch_fidelity_where_the_rank_is_full(inception_file, tmp_path):
    from torch_fidelity import calculate_metrics

    rng = np.random.default_rng(3)
    sets = [
        torch.from_numpy(rng.integers(0, high, (72, 3, 8, 8), dtype=np.uint8))
        for high in (256, 240)
    ]
    space, engine = EarlyLayer(inception_file), Engine(tmp_path, torch.device("cpu"), quiet=True)
    jobs = [
        Job(f"set{i}", {"set": i}, 72, 30, OriginalFeatures(Pictures(images), [space], CPU, 8))
        for i, images in enumerate(sets)
    ]
    engine.make_chunks(jobs, Part(), "early", may_compute=True)
    engine.make_sums([(job, ("inception_pool",)) for job in jobs])
    a, b = (engine.statistics(job, ("inception_pool",))["inception_pool"] for job in jobs)
    expected = calculate_metrics(
        input1=Pictures(sets[0]), input2=Pictures(sets[1]), cuda=False, fid=True, batch_size=8,
        feature_extractor=NETWORK, feature_extractor_weights_path=str(inception_file),
        feature_layer_fid="64", save_cpu_ram=True, cache=False, verbose=False,
    )["frechet_inception_distance"]  # fmt: skip
    assert expected > 1e-3
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-4)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_all_other_metrics_are_those_of_torch_fidelity(sides, theirs, extractor):
    engine, generated, real = sides
    keys = ("is", "kid", "precision", "recall")  # the distance: in the test above
    features = ("inception_pool",)
    engine.make_sums([(generated, features), (real, features)])
    reference = Reference(
        "real", engine.statistics(real, features), dict(engine.features(real, features))
    )
    chosen = select(keys, extractor.outputs, reference, COUNT)
    assert chosen.on == keys
    found = compute(
        chosen,
        engine.statistics(generated, features),
        partial(engine.features, generated),
        reference,
    )
    assert found["is"] == theirs["inception_score_mean"]
    assert found["is_std"] == theirs["inception_score_std"]
    assert found["kid"] == theirs["kernel_inception_distance_mean"]
    assert found["kid_std"] == theirs["kernel_inception_distance_std"]
    assert (found["precision"], found["recall"]) == (theirs["precision"], theirs["recall"])
    assert 0 < found["precision"] <= 1
    assert f"subsets of {COUNT}" in describe_metrics(chosen, COUNT, reference)["kid"]


@pytest.mark.slow
def test_spatial_distances_are_those_of_torch_fidelity(extractor, inception_file, sides):
    """sFID through the registry, on fewer dimensions: eigenvalues of 2023 take seconds."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.utils import create_feature_extractor

    engine, generated, real = sides
    theirs = create_feature_extractor(
        NETWORK, ["spatial_adm"], cuda=False, verbose=False,
        feature_extractor_weights_path=str(inception_file),
    )  # fmt: skip
    with torch.inference_mode():
        parts = [
            torch.cat([theirs(batch)[0] for batch in pictures(seed).split(4)]) for seed in (0, 1)
        ]
    ours = [
        engine.features(job, ["inception_spatial"])["inception_spatial"]
        for job in (generated, real)
    ]
    for mine, other in zip(ours, parts, strict=True):
        assert np.array_equal(mine, other.numpy())
    cut = [part[:, ::40].contiguous() for part in parts]
    statistics = [fid_features_to_statistics(part) for part in cut]
    expected = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    found = frechet_distance(*(statistics_of(part[:, ::40]) for part in ours))
    assert expected > 1e-3
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("size", "parts"), [(40, [40] * 10), (90, [90, 90, 90, 90, 40]), (5000, [400])]
)
def test_the_score_of_images_sorted_by_class_is_the_published_definition(size, parts, monkeypatch):
    """exp of the mean KL between p(y|x) and p(y) in each split of shuffled images.

    Ten splits where images fill them, and below as many of that size as there are, one shorter.
    In the order of the classes, a split would hold one class, and its score would be one.
    """
    monkeypatch.setattr(scores, "IS_SPLIT_SIZE", size)
    rng = np.random.default_rng(0)
    classes = np.arange(400) // 40
    logits = (rng.normal(size=(400, 10)) + 8 * np.eye(10)[classes]).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)

    def by_definition(order: np.ndarray) -> np.ndarray:
        return np.array([
            np.exp((q * np.log(q / q.mean(0))).sum(1).mean())
            for q in np.split(p[order], np.cumsum(parts)[:-1])
        ])  # fmt: skip

    expected = by_definition(np.random.RandomState(2020).permutation(400))
    mean, deviation = inception_score(logits)
    assert mean == pytest.approx(expected.mean(), rel=1e-12)
    assert deviation == pytest.approx(expected.std(), rel=1e-9)
    if size == 40:
        assert by_definition(np.arange(400)).mean() < 1.3
    assert mean > 7


def test_rows_that_were_finished_with_ten_splits_stand(tmp_path):
    """Below 50,000 images new rows take splits of 5000; a finished one is found, and says so."""
    rows, cell = RowStore(tmp_path), Cell(8, SamplerConfig())
    stub: Any = SimpleNamespace(
        selection=lambda count: Selection(("is",), {}),
        job=lambda cell, count: Job(
            "job", {"kind": "samples"}, count, 250, lambda *_: ChunkResult({})
        ),
        reference=SimpleNamespace(description={}, features={}),
        engine=SimpleNamespace(rows=rows),
        _finish=lambda *_: None,
    )

    def splits(count: int) -> str:
        return Sweep.plan(stub, cell, count).protocol["metrics"]["is"]

    before = Sweep.plan(stub, cell, 10_000)
    assert splits(10_000) == splits(49_999) == "splits of 5000 after a fixed shuffle"
    assert splits(50_000) == splits(60_000) == "10 splits after a fixed shuffle"
    metrics = before.protocol["metrics"] | {"is": "10 splits after a fixed shuffle"}
    finished = rows.save(before.name, before.protocol | {"metrics": metrics}, {"metrics": {}}, {})
    again = Sweep.plan(stub, cell, 10_000)
    assert rows.find(again.name, again.protocol) == finished
    assert splits(10_000) == "10 splits after a fixed shuffle"
    assert splits(20_000) == "splits of 5000 after a fixed shuffle"


def test_too_few_images_are_said_loudly(caplog):
    outputs = {"inception_pool": 2048, "inception_logits": 1008}
    nothing = statistics_of(np.eye(4))
    reference = Reference("r", {"inception_pool": nothing}, {})
    chosen = select(("fid", "is", "precision"), outputs, reference, 100)
    assert chosen.on == ("fid", "is")
    assert "holds no features of inception_pool" in chosen.off["precision"]
    warn_few_images(chosen, outputs, 2048)
    assert "FEW IMAGES: 2048 in 2048 dimensions (inception_pool)" in caplog.text
    caplog.clear()
    warn_few_images(chosen, outputs, 2049)
    assert caplog.text == ""


@pytest.mark.parametrize(("missing", "problem"), [("samples", "is not a file"), (None, "6726825d")])
def test_the_conformance_command_needs_the_published_files(
    tmp_path, monkeypatch, inception_file, missing, problem
):
    from lgm_scale.errors import MissingAssetError
    from lgm_scale.evaluation.commands import conformance

    paths = {key: tmp_path / f"{key}.npz" for key in ("samples", "reference")}
    for path in paths.values():
        path.touch()
    if missing:
        paths[missing].unlink()
    arguments = ["conformance", "--inception", str(inception_file)]
    for key, path in paths.items():
        arguments += [f"--{key}", str(path)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(MissingAssetError, match=problem):
        conformance.main()


@pytest.mark.slow
def test_the_conformance_command_scores_an_npz(tmp_path, inception_file):
    """Its machinery on 12 random images and random weights; the numbers are no published ones."""
    from lgm_scale.evaluation.commands.conformance import score
    from lgm_scale.evaluation.references.making import make_reference

    for name, seed in (("samples", 0), ("reference", 1)):
        np.savez(tmp_path / f"{name}.npz", pictures(seed)[:12].permute(0, 2, 3, 1).numpy())
    reference = make_reference(
        tmp_path / "reference.npz", tmp_path / "r.work", inception=str(inception_file)
    )
    small = Reference(reference.name, {}, reference.features)  # distances of 2048 take seconds
    found = score(Path(tmp_path / "samples.npz"), small, str(inception_file), tmp_path / "work")
    assert set(found) == {"is", "is_std", "precision", "recall"}
