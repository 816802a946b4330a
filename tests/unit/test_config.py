from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from lgm_scale.checkpoint.run_folder import RunFolder, differing
from lgm_scale.config.loading import to_dict
from lgm_scale.config.rules import load_training_run
from lgm_scale.errors import ConfigError
from lgm_scale.families.elit.config import ELITRun
from lgm_scale.families.elit.network import build_elit
from lgm_scale.families.lgm.config import DIT_SIZES, LGMRun
from lgm_scale.families.lgm.network import build_merge_dit
from lgm_scale.families.tokenizer.network import build_tokenizer
from lgm_scale.planning.plan import describe

ROOT = Path(__file__).resolve().parents[2]
SWEEP = ROOT / "yamls/eval_sweep.yaml"  # trains nothing; see test_eval_sweep.py
PUBLISHED = sorted(set(ROOT.glob("yamls/*.yaml")) - {SWEEP})
QUICKSTART = [ROOT / f"yamls/quickstart/{name}.yaml" for name in ("tokenizer", "dit", "elit")]
DEMO = [ROOT / f"yamls/demo/{name}.yaml" for name in ("tokenizer", "dit")]
TOKENIZER = str(QUICKSTART[0])
GENERATOR = str(QUICKSTART[1])


def problems(
    config: str, *overrides: str, ranks: int = 1, has_gpu: bool | None = None
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_training_run(config, list(overrides), ranks, has_gpu)
    return caught.value.problems


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_recipes_validate_at_scale(path, ranks):
    config = load_training_run(str(path), [], ranks, has_gpu=True)
    header = path.read_text().split("task:")[0]
    for word in ("Command", "Hardware", "Time", "Result", f"yamls/{path.name}"):
        assert word in header
    assert config.data.num_samples == 1281167


def test_there_is_a_recipe_for_every_published_size():
    assert {path.stem for path in PUBLISHED} >= {
        "tokenizer_b",
        *(f"dit_{size}" for size in DIT_SIZES if size != "tiny"),
    }


@pytest.mark.parametrize(
    "path", PUBLISHED + QUICKSTART + DEMO, ids=lambda path: path.parts[-2] + path.stem
)
def test_recipes_build_with_the_expected_size(path):
    config = load_training_run(str(path), [], 1, has_gpu=None)
    with torch.device("meta"):
        if isinstance(config, LGMRun):
            count = sum(p.numel() for p in build_merge_dit(config.model).parameters())
        elif isinstance(config, ELITRun):
            net = build_elit(config.model, config.space)
            count = sum(p.numel() for p in net.parameters())
        else:
            count = sum(p.numel() for p in build_tokenizer(config.model).parameters())
    if path in PUBLISHED and isinstance(config, LGMRun):
        published = DIT_SIZES[config.model.size].params_m * 1e6
        if config.model.end_time:  # a second time embedding, ours
            width = DIT_SIZES[config.model.size].width
            published += (256 + 1) * width + (width + 1) * width
        assert count == pytest.approx(published, abs=5e4)
    assert f"({count:,})" in describe(config, 8)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.sise=tiny", "model.sise: unknown key; did you mean 'size'?"),
        ("optimiser.lr=1", "optimiser: unknown key; did you mean 'optimizer'?"),
        ("train.global_batch_size=many", 'train.global_batch_size: "many" is wrong'),
        ("train.global_batch_size=24.5", "train.global_batch_size: 24.5 is wrong"),
        ("lengths.choices=[3,8]", "lengths.choices: [3] outside [4, 64]"),
        ("lengths.choices=[8,65]", "lengths.choices: [65] outside [4, 64]"),
        ("lengths.choices=[]", "lengths.choices: empty"),
        ("lengths.longest_first=-1", "lengths.longest_first: -1 must be 0 or more"),
        ("lengths.weights=[1]", "lengths.weights: 1 weights for 7 choices"),
        ("lengths.weights=[0,0,0,0,0,0,0]", "sum above 0"),
        ("train.device_microbatch_size=5", "train.device_microbatch_size: 5 does not divide"),
        ("train.max_duration=1500", "train.max_duration: 1500 is wrong"),
        ("train.max_duration=3 weeks", "train.max_duration: '3 weeks' is no duration"),
        ("checkpoint.interval=0ba", "checkpoint.interval: '0ba' is no duration"),
        ("model.image_size=60", "model.image_size: 60 is not divisible by patch_size 8"),
        ("model.num_base_tokens=62", "not divisible by num_codebooks"),
        ("model.num_base_tokens=48", "aligned needs a square num_base_tokens"),
        ("optimizer.lr=0", "optimizer.lr: 0.0 must be above 0"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas: [0.9, 1.0] must be in [0, 1)"),
        ("ema.decay=1.0", "ema.decay: 1.0 must be in [0, 1)"),
        ("objective.pixel=-1", "objective.pixel: -1.0 must be 0 or more"),
        ("seed=-1", "seed: -1 must be 0 or more"),
        ("model.quantizer=none", "objective.entropy: 0.01 reads codes, and model.quantizer: none"),
        ("train.compile=true", "train.compile: true is for generators"),
    ],
)
def test_each_bad_value_has_its_message(override, text):
    found = problems(TOKENIZER, override)
    assert len([line for line in found if text in line]) == 1, found


def test_all_problems_come_at_once():
    found = problems(
        TOKENIZER,
        "model.sise=tiny",
        "data.num_workers=two",
        "lengths.choices=[2]",
        "train.precision=amp_bf16",
        "train.max_duration=5",
        ranks=7,
        has_gpu=False,
    )
    keys = {line.split(":")[0] for line in found}
    assert keys == {
        "model.sise",
        "data.num_workers",
        "train.max_duration",
        "lengths.choices",
        "lengths.weights",
        "train.global_batch_size",
        "train.precision",
    }


def test_batch_message_names_the_nearest_valid_sizes():
    assert "nearest valid: 20 or 25" in problems(TOKENIZER, ranks=5)[0]


def test_bf16_needs_a_gpu():
    assert "needs a GPU" in problems(GENERATOR, "train.precision=amp_bf16", has_gpu=False)[0]
    load_training_run(GENERATOR, ["train.precision=amp_bf16"], 1, has_gpu=True)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "just words"])
def test_malformed_yaml_is_one_error(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_training_run(str(path), [], 1, None)


def test_missing_file_override_and_task():
    assert "is not a file" in problems("nowhere.yaml")[0]
    assert "write it as key=value" in problems(TOKENIZER, "seed")[0]
    assert "write tokenizer or generator" in problems(TOKENIZER, "task=segmentation")[0]


def test_a_folder_belongs_to_one_configuration(tmp_path):
    config = load_training_run(TOKENIZER, [f"out={tmp_path}/run"], 1, None)
    RunFolder(Path(config.out), config).claim()
    assert not RunFolder(Path(config.out), config).finished()
    sealed = tmp_path / "run" / "state" / "ba00000002-a0001" / "manifest.json"
    sealed.parent.mkdir(parents=True)
    sealed.touch()
    free = load_training_run(TOKENIZER, [f"out={tmp_path}/run", "logging.interval=7"], 1, None)
    RunFolder(Path(free.out), free).claim()
    other = load_training_run(
        TOKENIZER, [f"out={tmp_path}/run", "seed=5", "optimizer.lr=1e-3"], 1, None
    )
    with pytest.raises(ConfigError, match=r"(?s)optimizer\.lr: 0\.002 there, 0\.001 here.*seed: 0"):
        RunFolder(Path(other.out), other).finished()


def test_the_resolved_configuration_can_be_read_again(tmp_path):
    config = load_training_run(GENERATOR, ["seed=3"], 1, None)
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(config)))))
    assert load_training_run(str(path), [], 1, None) == config


def test_a_record_may_name_keys_that_are_gone_where_they_asked_for_nothing():
    config = load_training_run(GENERATOR, [], 1, None)
    there = to_dict(config)
    there["model"]["routing"] = there["lengths"]["middle"] = None
    assert differing(there, config) == {}
    there["lengths"]["middle"] = [8]
    assert differing(there, config) == {"lengths.middle": ([8], None)}


def test_the_plan_names_work_and_memory():
    config = load_training_run(str(ROOT / "yamls/dit_xl.yaml"), [], 64, has_gpu=True)
    text = describe(config, 64)
    assert "675.3 M" in text
    assert " 128            57.1%           131,072" in text
    assert "> ddp                12.58" in text  # GiB: 20 bytes per parameter
    assert "1,281,167 (1,251 steps)" in text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({}, "data.path: missing; name an MDS folder"),
        ({"path": "s3://b/x"}, "data.cache: missing; path s3://b/x is object storage"),
        ({"path": "x", "cache": "y"}, "data.cache: has no effect, path x is local"),
        ({"path": "x", "mixture": [{"path": "y"}]}, "data.mixture: has no place beside data.path"),
        ({"mixture": [{"path": "x"}], "classes": ["a"]}, "data.classes: has no effect"),
        (
            {"mixture": [{"path": "x", "proportion": 1.0}, {"path": "y"}]},
            "some sources have a proportion and some not",
        ),
        ({"mixture": [{"path": "x", "proportion": 0.0}]}, "data.mixture[0].proportion: 0.0"),
        ({"mixture": [{"path": "x"}, {"path": "x"}]}, "data.mixture[1]: x is the folder of"),
        ({"mixture": [{"pth": "x"}]}, "data.mixture.0.pth: unknown key; did you mean 'path'?"),
        ({"path": "x", "classes": ["a", "b", "a"]}, "data.classes: a twice"),
        ({"path": "x", "classes": []}, "data.classes: empty"),
        ({"path": "x", "cache_limit": "much"}, "data.cache_limit: 'much' is no size"),
        ({"path": "x", "retry_seconds": 0.0}, "data.retry_seconds: 0.0 must be above 0"),
        ({"path": "x", "predownload": 0}, "data.predownload: 0 must be above 0"),
    ],
)
def test_the_data_section_is_checked(tmp_path, data, text):
    values = yaml.safe_load((ROOT / "yamls" / "dit_s.yaml").read_text()) | {"data": data}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as error:
        load_training_run(str(path), [], 8, has_gpu=None)
    assert any(text in problem for problem in error.value.problems), error.value.problems


def test_data_that_make_sense_pass(tmp_path):
    values = yaml.safe_load((ROOT / "yamls" / "dit_s.yaml").read_text())
    plain = {"path": "gs://b/x", "cache": "c", "cache_limit": "1.5tb", "classes": ["a"]}
    mixture = [{"path": "x", "proportion": 1.0, "rename": {"a": "b"}}]
    mixture.append({"path": "s3://y", "cache": "c", "proportion": 2.0})
    for data in (plain, {"mixture": mixture}):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values | {"data": data}))
        config = load_training_run(str(path), [], 8, has_gpu=None)
        assert len(config.data.sources) == len(data.get("mixture", [1]))
