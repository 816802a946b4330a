"""CKNNA and the cosine of merged pairs."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lgm_scale.errors import ConfigError
from lgm_scale.evaluation.commands import alignment
from lgm_scale.evaluation.commands.alignment import draw_heat_map
from lgm_scale.evaluation.images import StoredImages
from lgm_scale.evaluation.reconstructions.alignment import (
    PairCosine,
    cknna_code_matrix,
    cknna_matrix,
)
from lgm_scale.families.tokenizer.bundle import load_tokenizer


def features(rows: int = 40, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).double()


def cknna(a: torch.Tensor, b: torch.Tensor, num_neighbors: int = 10) -> float:
    return float(cknna_matrix([a, b], num_neighbors)[0, 1])


def rotation(width: int) -> torch.Tensor:
    return torch.linalg.qr(features(width, width, seed=9)).Q


def cknna_by_definition(a: torch.Tensor, b: torch.Tensor, k: int) -> float:
    """Huh et al. 2024, with loops: neighbours, centring and the three sums one by one."""

    def inner(x: torch.Tensor) -> list[list[float]]:
        unit = [row / row.norm() for row in x]
        return [[float(p @ q) for q in unit] for p in unit]

    def neighbors(kernel: list[list[float]]) -> list[set[int]]:
        size = len(kernel)
        order = [
            sorted((j for j in range(size) if j != i), key=lambda j, i=i: -kernel[i][j])
            for i in range(size)
        ]
        return [set(row[:k]) for row in order]

    def align(p: list[list[float]], q: list[list[float]]) -> float:
        near_p, near_q = neighbors(p), neighbors(q)
        total = 0.0
        for i in range(len(p)):
            mean_p, mean_q = sum(p[i]) / len(p), sum(q[i]) / len(q)
            for j in near_p[i] & near_q[i]:
                total += (p[i][j] - mean_p) * (q[i][j] - mean_q)
        return total

    p, q = inner(a), inner(b)
    return align(p, q) / math.sqrt(align(p, p) * align(q, q))


def test_a_case_by_hand():
    """Four unit vectors at 0, 10, 90 and 100 degrees against the same with two places swapped."""

    def at(*degrees: float) -> torch.Tensor:
        angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
        return torch.stack((angles.cos(), angles.sin()), dim=1)

    a = at(0, 10, 90, 100)
    # Nearest neighbours: 0-1 and 2-3 in a; in b, where 1 and 2 changed places, 0-2 and 1-3.
    assert cknna(a, at(0, 90, 10, 100), 1) == 0
    # With 1 moved to 12 degrees every neighbour stays, and the sum can be written down. Row 0:
    # cosines to 0, 10, 90, 100 degrees; row 1 from 10 degrees; rows 2 and 3 mirror 1 and 0.
    cos = [math.cos(math.radians(d)) for d in range(181)]
    mean_0 = (1 + cos[10] + cos[90] + cos[100]) / 4
    mean_1 = (1 + cos[10] + cos[80] + cos[90]) / 4
    p = [cos[10] - mean_0, cos[10] - mean_1, cos[10] - mean_1, cos[10] - mean_0]
    q = [
        cos[12] - (1 + cos[12] + cos[90] + cos[100]) / 4,
        cos[12] - (1 + cos[12] + cos[78] + cos[88]) / 4,
        cos[10] - (1 + cos[10] + cos[78] + cos[90]) / 4,
        cos[10] - (1 + cos[10] + cos[88] + cos[100]) / 4,
    ]
    dot = sum(x * y for x, y in zip(p, q, strict=True))
    expected = dot / math.sqrt(sum(x * x for x in p) * sum(y * y for y in q))
    assert cknna(a, at(0, 12, 90, 100), 1) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("mixed", [0.0, 0.3, 1.0])
def test_cknna_equals_its_definition(k, mixed):
    a = features()
    b = (1 - mixed) * a + mixed * features(seed=1) + 0.5
    assert cknna(a, b, k) == pytest.approx(cknna_by_definition(a, b, k), abs=1e-12)


def test_equal_representations_agree_fully_and_independent_ones_hardly():
    a, b = features(400), features(400, 9, seed=1)
    assert cknna(a, a) == pytest.approx(1)
    assert cknna(a, b) == pytest.approx(cknna(b, a))
    assert abs(cknna(a, b)) < 0.1
    assert 0.2 < cknna(a, a + 0.5 * features(400, seed=2)) < 0.95


def test_rotation_and_scaling_change_nothing_but_a_shift_does():
    a, b = features(), features() + 0.7 * features(seed=1)
    value = cknna(a, b)
    assert cknna(a @ rotation(6), b) == pytest.approx(value)
    assert cknna(a, 13.0 * b) == pytest.approx(value)
    assert cknna(a, torch.cat((b, torch.zeros(40, 3)), dim=1)) == pytest.approx(value)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    assert cknna(a[order], b[order]) == pytest.approx(value)
    assert cknna(a, b + 3.0) != pytest.approx(value)


def test_the_matrix_holds_every_pair():
    three = [features(seed=seed) + features(seed=7) for seed in range(3)]
    matrix = cknna_matrix(three, 5)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(3).double())
    for i in range(3):
        for j in range(3):
            assert float(matrix[i, j]) == pytest.approx(cknna(three[i], three[j], 5))


def unbiased_hsic(p: torch.Tensor, q: torch.Tensor) -> float:
    """Song et al. 2012, equation 5, term by term with whole matrices."""
    m, one = len(p), torch.ones(len(p)).double()
    p, q = p - p.diag().diag(), q - q.diag().diag()
    terms = torch.trace(p @ q) + (one @ p @ one) * (one @ q @ one) / ((m - 1) * (m - 2))
    return float(terms - 2 / (m - 2) * one @ p @ q @ one) / (m * (m - 3))


@pytest.mark.parametrize(("k", "mixed"), [(2, 0.3), (10, 0.3), (10, 1.0)])
def test_the_authors_definition_masks_first(k, mixed):
    a = features()
    b = (1 - mixed) * a + mixed * features(seed=1) + 0.5
    kernels = [unit @ unit.T for unit in (x / x.norm(dim=1, keepdim=True) for x in (a, b))]
    near = [torch.zeros(40, 40).double() for _ in kernels]
    for kernel, mask in zip(kernels, near, strict=True):
        for i, row in enumerate(kernel.tolist()):
            order = sorted((j for j in range(40) if j != i), key=lambda j, row=row: -row[j])
            mask[i, order[:k]] = 1

    def value(i: int, j: int) -> float:
        both = near[i] * near[j]
        return unbiased_hsic(both * kernels[i], both * kernels[j])

    expected = value(0, 1) / (math.sqrt(value(0, 0) * value(1, 1)) + 1e-6)
    found = cknna_code_matrix([a, b], k)
    assert found is not None
    assert float(found[0, 1]) == pytest.approx(expected, abs=1e-12)
    assert float(found[0, 0]) == pytest.approx(1, abs=0.01)  # its 1e-6 keeps it below
    assert float(found[0, 1]) != pytest.approx(cknna(a, b, k), abs=1e-3)


def test_the_authors_definition_needs_two_neighbours_and_four_images():
    assert cknna_code_matrix([features(), features()], 1) is None
    assert cknna_code_matrix([features(3), features(3)], 2) is None


def test_too_few_images_are_refused():
    with pytest.raises(ConfigError, match="10 are too few for 10 neighbours"):
        cknna(features(10), features(10), 10)


def test_pair_cosine_counts_each_pair_once():
    cosine = torch.tensor([[[1.0, 0.2, 0.4], [0.2, 1.0, 0.9], [0.4, 0.9, 1.0]]])
    labels = torch.tensor([[0, 1, 1]])
    pairs = PairCosine()
    pairs.add("merged", cosine, labels[:, :, None] == labels[:, None, :])
    pairs.add("all", cosine, torch.ones(3, 3, dtype=torch.bool))
    pairs.add("all", cosine - 0.2, torch.ones(3, 3, dtype=torch.bool))
    pairs.add("none", cosine, torch.eye(3, dtype=torch.bool))
    assert pairs.mean("merged") == pytest.approx(0.9)
    assert pairs.mean("all") == pytest.approx(0.4)
    assert pairs.mean("none") is None
    assert pairs.mean("never added") is None


def test_a_bundle_is_measured(small_pipeline, tmp_path, monkeypatch, capsys):
    """The whole command, against latents and pairs collected one image at a time."""
    out = tmp_path / "alignment"
    options = ["--bundle", small_pipeline.tokenizer, "--images", small_pipeline.images]
    options += ["--out", out, "--lengths", 8, 16, 4, "--num-images", 30, "--neighbors", 4]
    monkeypatch.setattr("sys.argv", ["alignment", *map(str, options)])
    assert alignment.main() == 0
    said = capsys.readouterr().out
    result = json.loads((out / "alignment.json").read_text())
    assert (out / "alignment.png").is_file()

    tokenizer = load_tokenizer(small_pipeline.tokenizer)
    images = torch.cat(list(StoredImages(small_pipeline.images, 32).batches()))
    chosen = [index * len(images) // 30 for index in range(30)]
    z = tokenizer.encode(images[chosen].float() / 127.5 - 1)  # [30, 16, 8]
    tree, near = tokenizer.merge_tree(), {}
    for k in (4, 8):
        cut = tree.assignment(k)
        near[k] = cut.unmerge(cut.merge(z)).flatten(1)
        pairs = [(i, j) for j in range(16) for i in range(j) if cut.labels[i] == cut.labels[j]]
        cosine = [torch.cosine_similarity(z[:, i], z[:, j], dim=-1).mean() for i, j in pairs]
        assert result["cosine_merged"][str(k)] == pytest.approx(float(sum(cosine)) / len(pairs))
    assert result["cosine_merged"]["16"] is None
    assert result["lengths"] == [4, 8, 16]
    assert result["num_images"] == 30
    # Rounding may decide between two neighbours of nearly equal cosine.
    assert result["cknna"][0][1] == pytest.approx(cknna(near[4], near[8], 4), abs=1e-3)
    matrix = result["cknna"]
    between = (matrix[0][1] + matrix[0][2] + matrix[1][2]) / 3
    assert result["cknna_mean"] == pytest.approx(between)
    by_code = cknna_code_matrix([near[4], near[8]], 4)
    assert by_code is not None
    assert result["cknna_code"][0][1] == pytest.approx(float(by_code[0, 1]), abs=1e-3)
    for key in ("cknna", "cknna_code"):
        line = f"CKNNA ({result['definitions'][key]}), mean over pairs of lengths: "
        assert f"{line}{result[f'{key}_mean']:.3f}" in said


def test_the_heat_map_is_written(tmp_path):
    result = {"lengths": [4, 8], "cknna": [[1.0, 0.4], [0.4, 1.0]], "length_control": "lgm"}
    draw_heat_map(json.loads(json.dumps(result)), tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
