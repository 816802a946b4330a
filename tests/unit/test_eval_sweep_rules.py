"""What a sweep's configuration may say, and what is refused before or instead of work."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_pipeline import ROOT
from small_sweep import (
    CLASSES,
    make_images,
    sweep_config,
    sweep_file,
)
from typed_commands import refusal

from lgm_scale.errors import ConfigError
from lgm_scale.evaluation.commands import sweep
from lgm_scale.evaluation.sweep.config import METRIC_KEYS, SweepConfig, expand, with_lists
from lgm_scale.evaluation.sweep.rules import load_sweep


def problems_of(made: Path, tmp_path: Path, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        sweep_config(made, tmp_path / "report", **changes)
    return caught.value.problems


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "nowhere"}, "bundle: nowhere is no bundle"),
        ({"images": "nowhere"}, "images: nowhere does not exist"),
        ({"metrics_log": "nowhere"}, "metrics_log: nowhere is not a file"),
        ({"inception": "nowhere.pth"}, r"inception: nowhere\.pth is not a file; .*--fetch inc"),
        ({"reference": "nowhere.npz"}, r"reference: nowhere\.npz is not a file"),
        ({"cells": [{"num_tokens": [3, 4, 17]}]}, r"cells: lengths \[3, 17\] outside \[4, 16\]"),
        ({"cells": [{"num_tokens": [4, 4]}]}, r"cells: K = 4, w = 1.5, 4 points occurs 2 times"),
        ({"cells": [{"num_tokens": 4}, {"num_tokens": 4, "cfg_scale": 1.5}]}, "cells: K = 4, .* 2"),
        ({"cells": []}, "cells: is empty"),
        ({"num_images": 1, "num_components": 1}, "num_images: 1 have no covariance"),
        ({"num_images": 4}, "num_images: 4 images cannot fill 4 dimensions"),
        ({"num_components": 15, "num_images": 99}, "num_components: 15 components"),
        ({"num_components": 0}, "inception: nothing can be measured"),
        ({"batch_size": 0}, "batch_size: 0 must be"),
        ({"chunk_size": 0}, "chunk_size: 0 must be"),
        ({"part": "3/3"}, "part: '3/3' is not i/n"),
        ({"part": "first"}, "part: 'first' is not i/n"),
        ({"sampler": {"num_steps": 1}}, "cells: num_steps: 1"),
        ({"cells": [{"num_tokens": 4, "solver": "mean_flow", "cfg_scale": 1.0}]},
         "cells: solver mean_flow needs a generator"),
        ({"sampler": {"cfg_scale": 0.5}}, "cells: cfg_scale: 0.5"),
        ({"sampler": {"cfg_interval": [0.5, 0.2]}}, "cells: cfg_interval"),
        ({"sampler": {"timestep_shift": 0.0}}, "cells: timestep_shift"),
        ({"cells": [{"num_tokens": 16, "length_schedule": [[0, 4], [0.1, 8]]}]},
         "cells: length_schedule: it ends at 8"),
        ({"search": {"num_images": 99}, "metrics": list(METRIC_KEYS)},
         r"search\.num_images: 99 must be between 2 and"),
        ({"search": {"num_images": 5}}, r"search\.metric: fid is not among"),
        ({"num_image": 5}, "num_image: unknown key; did you mean 'num_images'"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused(made, tmp_path, change, message):
    problems = problems_of(made, tmp_path, **change)
    assert len(problems) == 1, problems
    assert re.match(message, problems[0]), problems[0]


def test_a_misspelt_setting_of_a_cell_is_refused_by_name(made, tmp_path):
    problems = problems_of(made, tmp_path, cells=[{"num_tokens": 4, "num_step": 5}])
    assert "cells.0.num_step: unknown key; did you mean 'num_steps'?" in problems


def test_every_problem_is_told_at_once(made, tmp_path):
    cells = [{"num_tokens": 99, "num_steps": 1}]
    problems = problems_of(made, tmp_path, cells=cells, images="gone", seed="x")
    told = {problem.split(":")[0] for problem in problems}
    assert told == {"cells", "images", "seed"}


def test_a_tokenizer_bundle_is_refused(made, tmp_path):
    (problem,) = problems_of(made, tmp_path, bundle=str(made / "tokenizer"))
    assert "is a tokenizer bundle; a generator or spatial_generator bundle is needed" in problem


def test_a_bundle_of_strangers_is_refused(made, tmp_path):
    import json

    bundle = Path(shutil.copytree(made / "dit", tmp_path / "dit"))
    info = json.loads((bundle / "bundle.json").read_text())
    info["models"]["tokenizer"]["latent_dim"] = 8
    info["classes"] = [*CLASSES, "fox"]
    (bundle / "bundle.json").write_text(json.dumps(info))
    problems = problems_of(made, tmp_path, bundle=str(bundle), images=None, num_components=0,
                           inception=str(bundle / "bundle.json"), metrics=["fid"])  # fmt: skip
    assert any("latent_dim 8 and a generator with latent_dim 4" in text for text in problems)
    assert any("names 4 classes and its generator has 3" in text for text in problems)


def test_images_of_another_size_or_other_classes_are_refused(made, tmp_path):
    make_images(tmp_path / "large", side=24)
    (problem,) = problems_of(made, tmp_path, images=str(tmp_path / "large" / "mds"))
    assert "holds images of 24 pixels, the bundle makes 16" in problem
    make_images(tmp_path / "other", classes=("cat_one", "dog", "fox"))
    (problem,) = problems_of(made, tmp_path, images=str(tmp_path / "other" / "mds"))
    assert "['eel', 'fox']" in problem


def test_a_value_stands_for_a_list_of_one_and_lists_multiply(made, tmp_path):
    cells = [
        {"num_tokens": [8, 16], "cfg_scale": [1.5, 2.0], "cfg_interval": [[0, 1], [0.15, 1]]},
        {"num_tokens": 16, "length_schedule": [[0, 8], [0.3, 16]], "cfg_interval": [0.2, 0.9]},
    ]
    config = sweep_config(made, tmp_path / "r", cells=cells, sampler={"num_steps": 25})
    found = expand(config)
    assert len(found) == 2 * 2 * 2 + 1
    assert {cell.sampler.num_steps for cell in found} == {25}
    assert found[0].sampler.cfg_interval == (0.0, 1.0)
    assert found[-1].sampler.length_schedule == ((0.0, 8), (0.3, 16))
    assert found[-1].sampler.cfg_interval == (0.2, 0.9)
    assert "grows 0:8 0.3:16" in found[-1].label
    raw = with_lists({"cells": [{"num_tokens": 4, "length_schedule": []}]})
    assert raw["cells"] == [{"num_tokens": [4], "length_schedule": [[]]}]


@pytest.mark.parametrize("name", ["quickstart/sweep.yaml", "demo/sweep.yaml", "eval_sweep.yaml"])
def test_the_sweeps_that_come_along_are_well_formed(name):
    text = (ROOT / "yamls" / name).read_text()
    assert all(word in text for word in ("Command", "Hardware", "Time", "Result", f"yamls/{name}"))
    values = yaml.safe_load(text)
    assert set(values) <= set(SweepConfig.__dataclass_fields__)
    with pytest.raises(ConfigError) as caught:  # its files are not here: no other problem
        load_sweep(str(ROOT / "yamls" / name), ["bundle=gone", "images=gone", "metrics_log=null"])
    told = {problem.split(":")[0] for problem in caught.value.problems}
    assert told <= {"bundle", "images", "inception", "dinov2", "vgg16", "reference"}


def test_a_user_error_ends_with_status_two_and_no_traceback(made, tmp_path):
    path = sweep_file(made, tmp_path / "report")
    assert refusal(sweep.main, path, "batch_size=0", "bundle=gone").startswith("error: 2 problems")
