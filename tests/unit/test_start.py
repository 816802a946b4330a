"""What commands import before they have anything to compute: their start is told in modules.

One fresh interpreter per group of commands: each command is called in it with `--help`, or with a
mistake, and must leave the slow modules alone. No time is measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rank_processes import run_ranks

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = "lgm_scale.evaluation.commands"
EVALUATION = [
    f"{COMMANDS}.{name}"
    for name in (
        *("adaptive", "alignment", "conformance", "preflight"),
        *("reconstruct", "reference", "report", "sweep"),
    )
]
PREPARED = ("convert", "encode", "fashion_mnist", "verify")
PREPARATION = [f"lgm_scale.data.preparation.{name}" for name in PREPARED]
LAUNCHERS = ["launchers.slurm", "launchers.status", "launchers.pipeline"]
SCRIPTS = [
    *("lgm_scale.train", "lgm_scale.sample", "lgm_scale.web", "lgm_scale.publish"),
    "lgm_scale.assets",
    "lgm_scale.release_import.__main__",
]
MODULES = [*SCRIPTS, *EVALUATION, *PREPARATION, *LAUNCHERS, "data_tools.demo_images"]
SLOW = {
    *("torch", "composer", "streaming", "deepspeed", "scipy", "sklearn", "torchvision", "timm"),
    *("pandas", "boto3", "botocore", "transformers", "torchmetrics", "matplotlib", "pyarrow"),
    *("peft", "diffusers", "torch_fidelity", "skimage", "gradio"),
}
MISTAKES = [
    ["lgm_scale.train", "yamls/dit_xl.yaml", "optimizer.lrr=1", "train.precision=fp32"],
    ["lgm_scale.train", "yamls/dit_xl.yaml", "optimizer.lr=-1"],
    ["lgm_scale.train", "yamls/nothing.yaml", "--dry-run"],
    ["lgm_scale.sample", "nowhere", "--classes", "1", "--out", "a.png"],
    ["lgm_scale.sample", "nowhere", "--classes", "1", "--out", "a.txt"],
    ["lgm_scale.sample", "nowhere", "--num-images", "9", "--out", "a"],
    ["lgm_scale.sample", "nowhere", "--num-images", "9", "--out", "a.png"],
    ["lgm_scale.web", "nowhere"],
    ["lgm_scale.publish", "nowhere", "a/b", "--license", "mit", "--data-license", "x"],
    ["lgm_scale.release_import.__main__", "generator", "a.pt", "b", "--tokenizer", "c"],
    ["lgm_scale.release_import.__main__", "lora", "a.pt", "b", "--num-tokens", "8"],
    [
        "lgm_scale.release_import.__main__",
        *("lora", "a.pt", "b", "--num-tokens", "8", "--base", "c", "--classes", "d"),
    ],
    ["lgm_scale.assets", "nothing"],
    ["lgm_scale.evaluation.commands.sweep", "yamls/dit_xl.yaml"],
    ["lgm_scale.evaluation.commands.report", "nowhere"],
    ["lgm_scale.evaluation.commands.reference", "nowhere", "--out", "a.txt"],
    [f"{COMMANDS}.adaptive", *["--bundle", "a", "--images", "b", "--target-psnr", "1"]],
    [f"{COMMANDS}.alignment", *["--bundle", "a", "--images", "b", "--out", "c"]],
    [f"{COMMANDS}.reconstruct", *["--bundle", "a", "--images", "b", "--out", "c"]],
    [f"{COMMANDS}.conformance", *["--samples", "a", "--reference", "b", "--inception", "c"]],
    ["lgm_scale.evaluation.commands.preflight", "nowhere.yaml"],
    ["lgm_scale.data.preparation.convert", "nowhere", "--out", "b"],
    ["lgm_scale.data.preparation.convert", "nowhere", "--out", "b", "--compression", "zip"],
    ["lgm_scale.data.preparation.encode", "--images", "a", "--out", "b"],
    ["lgm_scale.data.preparation.verify", "nowhere"],
    ["launchers.slurm", "--nodes", "0"],
]  # fmt: skip
DRY_RUNS = [["lgm_scale.train", f"yamls/{name}.yaml", "--dry-run"] for name in ("dit_xl", "sit_xl")]

CALL = """
import contextlib, io, json, sys
from importlib import import_module
from lgm_scale.errors import LGMError

calls, names = json.load(sys.stdin)
slow = set(names)
for module, *argv in calls:
    sys.argv = [module, *argv]
    said, status = io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = import_module(module).main()
        except SystemExit as end:
            status = end.code
        except LGMError as error:
            status = "user error"
    print(json.dumps([sys.argv, status, said.getvalue(), sorted(slow & sys.modules.keys())]))
"""


def call(calls: list[list[str]], slow: set[str], folder: Path) -> list[list]:
    """Make the calls one after the other: (argv, status, words, slow modules that are there)."""
    (folder / "yamls").symlink_to(ROOT / "yamls")
    done = subprocess.run(
        [sys.executable, "-c", CALL],
        input=json.dumps([calls, sorted(slow)]), cwd=folder, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_help_of_every_command_imports_nothing_slow(tmp_path):
    for argv, status, words, slow in call([[name, "--help"] for name in MODULES], SLOW, tmp_path):
        assert (status, slow) == (0, []), argv
        assert words.startswith("usage: "), argv


def test_every_command_of_the_package_is_among_them():
    mains = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for folder in ("lgm_scale", "launchers", "data_tools")
        for path in (ROOT / folder).rglob("*.py")
        if "exit_on_user_error(main)" in path.read_text()
    }
    names = ("encode_latents", "fashion_mnist", "images_to_mds", "verify_mds")
    scripts = {f"data_tools.{name}" for name in names}
    assert mains - scripts <= {*MODULES}


def test_mistakes_are_told_before_anything_slow_is_imported(tmp_path):
    for argv, status, words, slow in call(MISTAKES, SLOW, tmp_path):
        assert status in ("user error", 2), (argv, status, words)
        assert slow == [], argv


@pytest.mark.slow
def test_a_dry_run_imports_torch_and_no_trainer(tmp_path):
    slow = (SLOW - {"torch"}) | {"torch._dynamo", "sympy"}
    for argv, status, words, found in call(DRY_RUNS, slow, tmp_path):
        assert (status, found) == (0, []), (argv, words)
        assert "samples per epoch" in words


@pytest.mark.slow
def test_images_are_made_without_a_trainer_and_without_streaming(tmp_path):
    made = ["lgm_scale.sample", "demo", "--classes", "0", "--num-tokens", "4", "--out", "a.png"]
    ((_, status, words, found),) = call([made], SLOW - {"torch", "torchvision", "timm"}, tmp_path)
    assert (status, found) == (0, []), words
    assert (tmp_path / "a.png").is_file()


COLLECTOR = """
import gc, sys
from lgm_scale.start import heavy_imports

def seen(fails=False):
    try:
        with heavy_imports():
            inside = gc.isenabled()
            if fails:
                raise ImportError
    except ImportError:
        pass
    return inside, gc.isenabled(), gc.get_freeze_count() > 0

assert seen(fails=True) == (False, True, False)
assert seen() == (False, True, True)
gc.unfreeze()
sys.modules["composer"] = sys
assert seen() == (True, True, False)
del sys.modules["composer"]
gc.disable()
assert seen() == (False, False, False)
"""


def test_the_collector_rests_while_composer_is_imported_and_leaves_it_out_afterwards():
    """Not where Composer is there, nor where somebody has switched the collector off."""
    subprocess.run([sys.executable, "-c", COLLECTOR], env={"PYTHONPATH": str(ROOT)}, check=True)


DRY_RUN = """
import gc, sys
from lgm_scale import train

sys.argv = ["train", "yamls/tokenizer_b.yaml", "--dry-run"]
assert train.main() == 0
assert gc.get_freeze_count() > 0
"""


@pytest.mark.slow
def test_the_collector_rests_while_a_dry_run_imports_timm():
    own = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", DRY_RUN], cwd=ROOT, env=own, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"samples per epoch" in done.stdout


ONE_STEP = {"train": {"max_duration": "1ba", "global_batch_size": 8, "precision": "fp32"}}


def no_processor_has_a_name() -> None:
    from composer.utils import collect_env

    collect_env.cpuinfo.get_cpu_info = None  # what would start an interpreter


@pytest.mark.slow
def test_no_rank_starts_an_interpreter_for_the_processor_s_name(small_pipeline, tmp_path):
    path = small_pipeline.generator_config(tmp_path / "run", **ONE_STEP)
    run_ranks(1, [(path, [])], tmp_path / "log", prepare=no_processor_has_a_name)
    assert (tmp_path / "run" / "bundle").is_dir()


@pytest.mark.parametrize(
    ("before", "chosen", "found"),
    [
        ("", None, "passive"),
        ("", "active", "active"),
        ("sys.modules['torch'] = sys; ", None, "None"),
    ],
)
def test_threads_wait_without_spinning_unless_the_user_chose(before, chosen, found):
    """Not once torch is there: it has read the variable already."""
    code = f"import os, sys; {before}import lgm_scale; print(os.environ.get('OMP_WAIT_POLICY'))"
    environment = {"PYTHONPATH": str(ROOT)} | ({"OMP_WAIT_POLICY": chosen} if chosen else {})
    said = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert said.strip() == found


def test_the_check_can_fail(tmp_path):
    call_made = ["lgm_scale.evaluation.commands.report", "--help"]
    ((_, _, _, found),) = call([call_made], {"argparse", "numpy", "torch"}, tmp_path)
    assert found == ["argparse", "numpy"]
