"""What the Slurm launchers check and print, where no Slurm is installed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from small_pipeline import ROOT
from typed_commands import Said, typed

from launchers import pipeline, slurm
from launchers.cluster import CLUSTERS, load_cluster, minutes
from launchers.jobs import TOOLS, describe_job
from launchers.launch import FrozenCode
from launchers.records import SPEED, STOPPED_STATUS
from launchers.submission import interval_steps
from launchers.task import master_port
from lgm_scale.errors import ConfigError
from lgm_scale.train import STOPPED_STATUS as TRAINER_STOPPED_STATUS
from lgm_scale.training.callbacks import _line

DIT = "yamls/dit_xl.yaml"


def launch(script: str, *args: str | Path, cwd: Path = ROOT, check: bool = True) -> Said:
    """Run a launcher with no command in reach but Python, and without data."""
    main = {"slurm.py": slurm.main, "pipeline.py": pipeline.main}[script]
    environment = {"PATH": "/nowhere", "PYTHONPATH": str(ROOT), "HOME": os.environ.get("HOME", "/")}
    before = Path.cwd()
    os.chdir(cwd)
    try:
        with mock.patch.dict(os.environ, environment, clear=True):
            said = typed(main, *args, "--files-elsewhere")
    finally:
        os.chdir(before)
    assert "Traceback" not in said.err, said.err
    if check:
        assert said.status == 0, said.err
    return said


def refused(*args: str | Path) -> str:
    """What a refused launch says."""
    result = launch("slurm.py", *args, check=False)
    assert result.status == 2, result.out
    return result.err


def test_a_dry_run_prints_script_and_commands_and_makes_nothing(tmp_path: Path):
    out = launch(
        "slurm.py", "--nodes", "8", "--partition", "gpu", "--time", "12:00:00", "--dry-run",
        "--config", ROOT / DIT, "out=runs/x", "run_name=x", cwd=tmp_path,
    ).out  # fmt: skip
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", out, re.M))
    expected = {"nodes": "8", "ntasks-per-node": "8", "gpus-per-node": "8", "partition": "gpu"}
    expected |= {"time": "720", "signal": "USR2@120", "requeue": "", "job-name": "x"}
    assert {key: options[key] for key in expected} == expected
    assert "--kill-on-bad-exit=1" in out
    assert "# environment of every rank: NCCL_DEBUG=WARN" in out
    ranks = re.findall(
        r"^RANK=(\d+) LOCAL_RANK=(\d+) NODE_RANK=(\d+) WORLD_SIZE=64 .*python\S* (\S+) (\S+) out=",
        out,
        re.M,
    )
    assert [int(rank) for rank, *_ in ranks] == list(range(64))
    assert [(local, node) for _, local, node, *_ in ranks][9] == ("1", "1")
    code = Path(options["chdir"])
    assert ranks[0][3:] == (f"{code}/lgm_scale/train.py", f"{code}/config/dit_xl.yaml")
    assert list(tmp_path.iterdir()) == []


def test_submitting_without_slurm_is_one_clear_error(tmp_path: Path):
    message = refused("out=" + str(tmp_path / "x"), "run_name=x")
    assert "squeue is not installed here; submit from a login node" in message
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--gpus-per-node", "9"], "--gpus-per-node: 9 asked for, nodes of .* have 8"),
        (["train.max_duration"], "override 'train.max_duration': write it as key=value"),
        (["--config", "yamls/none.yaml"], "yamls/none.yaml is not a file"),
        (["--nodes", "3"], "train.global_batch_size: 1024 is not divisible by 24 ranks"),
        (["optimizer.lr=fast"], "optimizer.lr: .* is wrong"),
        (["--cluster", "moon"], "--cluster: there is no .*moon.yaml; known: cpu, default"),
        (["--time", "soon"], "--time: 'soon' is no time limit"),
        (["--time", "2"], "--time: 2 is not longer than the 120 s of grace"),
        (
            ["--job", "tokenizer", "--config", DIT],
            "tokenizer does not run .*, which is a generator; give",
        ),
        (["--job", "eval"], "--config: missing"),
        (["--array", "4"], "--array: 4 jobs of kind train; only a sweep"),
        (["--job", "encode", "images=a", "tokeniser=b"], "did you mean 'tokenizer'"),
        (["--job", "encode", "images=a", "out=b"], "tokenizer: missing; encode needs"),
        (["--job", "encode", "images=a", "out=b", "encoder=sd-vae"], "vae: missing; encode needs"),
        (
            ["--time", "60", "--seconds-per-step", "4"],
            "--time: 60 is shorter than the 67 minutes between two resume states",
        ),
    ],
)
def test_bad_input_is_told_before_anything_is_submitted(args: list[str], text: str):
    assert re.search(text, refused(*args, "--dry-run"))


def test_generators_on_a_grid_are_launched_like_others():
    config = "yamls/elit_xl.yaml"
    assert "lgm_scale/train.py" in launch("slurm.py", "--config", config, "--dry-run").out
    words = ["encoder=sd-vae", "vae=v", "image_size=256", "images=i", "out=data/z"]
    job = describe_job("encode", None, words, 8)
    assert set(job.arguments) >= {"--encoder=sd-vae", "--vae=v", "--image-size=256"}
    text = refused("--job", "tokenizer", "--config", config, "--dry-run")
    assert "is a spatial_generator; give --job train" in text


def test_enough_time_between_states_is_accepted():
    launch("slurm.py", "--time", "70", "--seconds-per-step", "4", "--dry-run")


def test_the_speed_of_a_runs_own_log_counts(tmp_path: Path):
    folder = tmp_path / "x" / "slurm" / "20260101-000000-0"
    folder.mkdir(parents=True)
    (folder / "launch.json").write_text('{"job_ids": ["7"]}')
    log = folder / "7_0_log.out"
    common = ["--time", "60", "--dry-run", f"out={tmp_path / 'x'}"]
    log.write_text("12:00:00 rank 0 step 50 | loss at K=64: 0.5 | 0.25 steps/s\n")
    assert "(checkpoint.interval=1000ba, 1,000 steps of 4 s)" in refused(*common)
    log.write_text("12:00:00 rank 0 step 50 | loss at K=64: 0.5 | 2.50 steps/s\n")
    launch("slurm.py", *common)


def test_the_line_that_says_the_speed_is_understood():
    rows = [{"step": 49, "num_tokens": 64, "loss": 0.5}]
    match = SPEED.search("12:00:00 rank 0 " + _line(rows, 2.5))
    assert match is not None
    assert match.groups() == ("50", "2.50")


def test_ranks_run_in_a_container(tmp_path: Path):
    path = tmp_path / "c.yaml"
    values = {"gpus_per_node": 8, "container_mounts": "/scratch:/scratch"}
    path.write_text(yaml.safe_dump(values))
    out = launch("slurm.py", "--cluster", path, "--container", "lgm.sqsh", "--dry-run").out
    srun = next(line for line in out.splitlines() if line.startswith("srun "))
    assert "--container-image=lgm.sqsh --container-mounts=/scratch:/scratch python -u -m" in srun
    assert re.search(r"^exec python3 -m launchers.batch_end", out, re.M)


def test_launchers_answer_without_torch():
    code = "import sys, launchers.slurm, launchers.pipeline, launchers.status, launchers.task\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("tool", TOOLS.values(), ids=list(TOOLS))
def test_tools_know_the_options_of_their_commands(tool):
    result = subprocess.run(
        [sys.executable, tool.script, "--help"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    options = (*tool.required, *tool.optional, *tool.flags)
    ours = {f"--{key.replace('_', '-')}" for key in options}
    assert ours == set(re.findall(r"^  (--[a-z][a-z0-9-]*)", result.stdout, re.M)), tool.script
    positional = re.search(r"positional arguments:\n((?:  .*\n)+)", result.stdout)
    found = re.findall(r"^  \w+", positional.group(1), re.M) if positional else []
    assert len(found) == len(tool.positional)


def test_a_tool_gets_its_options():
    job = describe_job("encode", None, ["tokenizer=t", "images=i", "out=data/z"], 8)
    assert job.arguments == ("--tokenizer=t", "--images=i", "--out=data/z")
    assert job.folder == Path("data/z.slurm")  # the data set itself is complete or absent


def test_a_sweep_is_split_and_joined(tmp_path: Path):
    out = launch(
        "slurm.py", "--job", "eval", "--config", "yamls/quickstart/sweep.yaml", "--array", "3",
        "--cluster", "cpu", "--after", "17", "--dry-run", f"out={tmp_path / 'r'}",
    ).out  # fmt: skip
    assert re.findall(r"part=(\d/3)$", out, re.M) == ["0/3", "1/3", "2/3"]
    assert len(re.findall(r"--reduce$", out, re.M)) == 1
    assert "#SBATCH --dependency=afterok:17" in out
    assert "#SBATCH --kill-on-invalid-dep=yes" in out


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_cluster_files_are_valid(path: Path):
    load_cluster(path.stem)


def test_every_wrong_key_of_a_cluster_is_told(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"gpu_per_node": 8, "time": 5}))
    with pytest.raises(ConfigError) as error:
        load_cluster(str(path))
    assert "gpu_per_node: unknown key; did you mean 'gpus_per_node'" in str(error.value)
    assert "time: 5 is wrong" in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:30", 91), ("1:30:00", 90), ("2-12", 3600), ("1-00:00:01", 1441)],
)
def test_slurm_times(text: str, expected: int):
    assert minutes(text) == expected


def test_frozen_code_follows_its_contents(tmp_path: Path):
    config = tmp_path / "c.yaml"
    config.write_text("a: 1")
    first = FrozenCode(tmp_path, config)
    first.write()
    assert first.config is not None
    assert first.config.read_text() == "a: 1"
    assert (first.path / "lgm_scale" / "train.py").read_bytes() == (
        ROOT / "lgm_scale" / "train.py"
    ).read_bytes()
    config.write_text("a: 2")
    assert FrozenCode(tmp_path, config).path != first.path
    assert first.config.read_text() == "a: 1"


def test_steps_between_states():
    run = describe_job("train", DIT, ["checkpoint.interval=2ep"], 8).run
    assert run is not None
    assert interval_steps(run) == 2 * (1281167 // 1024)


def test_every_start_meets_at_another_port():
    ports = {master_port(job, restart) for job in range(1, 40) for restart in range(10)}
    assert len(ports) == 390
    assert min(ports) >= 10_000
    assert max(ports) < 30_000


def test_the_trainer_and_the_launcher_agree_on_a_status():
    assert STOPPED_STATUS == TRAINER_STOPPED_STATUS


def test_what_runs_at_a_jobs_end_needs_no_package():
    """It runs outside of containers, with whatever Python the host has."""
    code = "import sys, launchers.batch_end; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    ours = {
        name for name in result.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names
    }
    assert {name for name in ours if not name.startswith(("launchers", "__main__"))} == set()


def test_a_pipeline_shows_its_graph_and_scripts():
    out = launch("pipeline.py", "yamls/pipeline/quickstart.yaml", "--dry-run").out
    lines = {line.split()[0]: line for line in out.split("# convert")[0].splitlines()}
    assert lines["generator"].endswith("after encode")
    assert lines["sweep"].endswith("after generator, convert-val")
    assert out.count("#!/bin/bash") == 7  # the sweep's array, and the job that joins it
    later = launch(
        "pipeline.py", "yamls/pipeline/quickstart.yaml", "--dry-run", "--from", "encode"
    ).out
    assert later.count("#!/bin/bash") == 4


@pytest.mark.parametrize("path", sorted((ROOT / "yamls" / "pipeline").glob("*.yaml")), ids=str)
def test_every_pipeline_is_valid(path: Path):
    launch("pipeline.py", path, "--dry-run")


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ({"a": {"job": "train", "needs": ["b"]}}, "stages.a.needs: 'b' is no stage"),
        (
            {
                "a": {"job": "train", "needs": ["b"]},
                "b": {"job": "train", "needs": ["a"]},
            },
            "a, b need each other in a circle",
        ),
        ({"a": {"job": "train", "overrides": ["optimizer.lr=-1"]}}, "stages.a: optimizer.lr: -1"),
        ({"a": {"job": "bake"}}, "bake"),
        ({}, "stages: empty"),
    ],
)
def test_a_wrong_pipeline_is_refused(tmp_path: Path, stages: dict, text: str):
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump({"stages": stages}))
    result = launch("pipeline.py", path, "--dry-run", check=False)
    assert result.status == 2
    assert text in result.err


@pytest.mark.parametrize(
    "command",
    [
        ["slurm.py", "--nodes", "64", "--dry-run", "--files-elsewhere"],
        ["pipeline.py", "yamls/pipeline/imagenet256.yaml", "--dry-run", "--files-elsewhere"],
    ],
)
def test_a_reader_that_has_seen_enough_is_no_error(command: list[str]):
    """`| head -1`: what is written after the first line finds nobody, and says nothing."""
    script, *args = command
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launchers" / script), *args],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=600) == -signal.SIGPIPE
