"""What is asked for and impossible is told before any work: sweeps, samples, jobs of a cluster."""

from __future__ import annotations

import pytest
from small_pipeline import ROOT
from small_sweep import sweep_file
from typed_commands import refusal, typed

import launchers.pipeline
import launchers.slurm
from lgm_scale import sample, train
from lgm_scale.data.preparation import encode
from lgm_scale.evaluation.commands import reconstruct, sweep

DRY = "--dry-run"


# --- sweeps and samples ---------------------------------------------------------------------------


def test_a_metric_without_its_weights_is_told_before_sampling(made, tmp_path):
    path = sweep_file(made, tmp_path / "sweep")
    said = refusal(sweep.main, path, "metrics=[fid,fd_dinov2,pixel_frechet]")
    assert "metrics: fid is asked for and needs inception, which is not given; set" in said
    assert "metrics: fd_dinov2 is asked for and needs dinov2" in said
    assert "pixel_frechet" not in said
    assert not (tmp_path / "sweep").exists()
    assert typed(sweep.main, path, DRY).status == 0


def test_the_metrics_that_nobody_asked_for_are_off_without_an_error(made, tmp_path):
    path = sweep_file(made, tmp_path / "sweep")
    path.write_text(path.read_text().replace("metrics:\n- pixel_frechet\n", ""))
    assert "metrics:" not in path.read_text()
    assert typed(sweep.main, path, DRY).status == 0


def test_a_weak_branch_above_every_cell_is_told(made, tmp_path):
    path = sweep_file(made, tmp_path / "sweep", sampler={"uncond_num_tokens": 16})
    assert typed(sweep.main, path, DRY).status == 0  # of use at K = 16, and of none below
    said = refusal(sweep.main, path, "cells=[{num_tokens: [4, 9]}]")
    assert "cells: uncond_num_tokens 16 has no effect where no cell has more than 9 tokens" in said


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--uncond-num-tokens", "99"], "--uncond-num-tokens: 99 has no effect on rows of at most"),
        (
            ["--num-tokens", "4", "8", "--uncond-num-tokens", "9"],
            "9 has no effect on rows of at most 8 tokens; name fewer, or leave it out",
        ),
        (["--grow", "0:4", "0.1:99"], "--grow: 0.1:99 is never reached by rows of at most 16"),
        (["--num-tokens", "99"], "99"),
        (["--grow", "0:1", "0.1:16"], "1"),
    ],
)
def test_lengths_that_no_row_reaches_are_told(made, tmp_path, words, text):
    out = tmp_path / "grid.png"
    assert text in refusal(sample.main, made / "dit", "--classes", "dog", "--out", out, *words)
    assert not out.exists()


def test_a_sweep_is_no_training_and_the_other_way_round(made, tmp_path):
    said = refusal(sweep.main, "yamls/dit_xl.yaml", "bundle=x")
    assert (
        "yamls/dit_xl.yaml configures a training (task: generator), and a sweep is needed" in said
    )
    assert len(said.splitlines()) == 2
    said = refusal(train.main, "yamls/eval_sweep.yaml")
    assert "yamls/eval_sweep.yaml configures a sweep, and a training is needed" in said
    assert len(said.splitlines()) == 2


def test_a_folder_that_is_no_mds_is_told_with_the_command_that_makes_one(made, tmp_path):
    photos = made / "photos"
    words = ("--images", photos, "--out", tmp_path / "out")
    for said in (
        refusal(encode.main, "--tokenizer", made / "tokenizer", *words),
        refusal(reconstruct.main, "--bundle", made / "tokenizer", *words),
        refusal(sweep.main, sweep_file(made, tmp_path / "sweep"), f"images={photos}"),
    ):
        assert f"{photos} has no index.json: an MDS folder of images is needed" in said
        assert "images_to_mds.py" in said


# --- jobs of a cluster ----------------------------------------------------------------------------


def test_a_job_without_its_data_and_weights_is_refused_before_it_is_submitted():
    said = refusal(launchers.slurm.main, "--job", "tokenizer", DRY)
    for key in ("assets.vgg16", "assets.dino_critic", "assets.dinov2_teacher", "data.path"):
        assert f"{key}: " in said
    assert "data/imagenet256/images/train does not exist" in said
    after = refusal(launchers.slurm.main, "--job", "tokenizer", "--after", "17", DRY)
    assert "assets.vgg16: " in after  # no job makes it
    assert "data.path" not in after
    assert typed(launchers.slurm.main, "--job", "tokenizer", "--files-elsewhere", DRY).status == 0


def test_a_pipeline_looks_for_what_none_of_its_stages_makes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "yamls/pipeline/imagenet256.yaml"
    said = refusal(launchers.pipeline.main, path, DRY)
    fetch = "`python -m lgm_scale.assets --fetch"
    for text in (
        "stages.convert: source: /data/imagenet/train is not there",
        "stages.validation: source: /data/imagenet/val is not there",
        "stages.reference: source: assets/VIRTUAL_imagenet256_labeled.npz is not there; "
        f"{fetch} adm_imagenet256` gets it",
        "stages.reference: inception: assets/weights-inception-2015-12-05-6726825d.pth",
        "stages.tokenizer: assets.vgg16: ",
        "stages.sweep: inception: ",
        "stages.sweep: vgg16: ",
        f"{fetch} vgg16 dino_critic dinov2_l dinov2_b`",
    ):
        assert text in said
    for text in ("data.path", "stages.generator", "stages.encode", "sweep: ref", "sweep: images"):
        assert text not in said  # jobs before make them
    later = refusal(launchers.pipeline.main, path, DRY, "--from", "generator")
    assert "stages.generator: tokenizer: runs/tokenizer_b/bundle is no bundle" in later
    assert "stages.sweep: reference: data/imagenet256/reference.safetensors is not a file" in later
    assert "stages.sweep: images: data/imagenet256/images/val does not exist" in later
    assert "stages.sweep: bundle" not in later


def test_a_sweep_after_another_job_is_judged_as_far_as_it_can_be(made, tmp_path):
    path = sweep_file(made, tmp_path / "sweep")
    words = ("--job", "eval", "--config", path, DRY)
    assert typed(launchers.slurm.main, *words).status == 0
    late = (*words, "bundle=to_come", "--after", "17", "vgg16=nowhere.pth", "num_images=1")
    said = refusal(launchers.slurm.main, *late)
    assert "vgg16: nowhere.pth is not a file" in said
    assert "num_images: 1 have no covariance" in said
    assert "to_come" not in said
    assert typed(launchers.slurm.main, *words, "bundle=to_come", "--after", "17").status == 0
    assert "bundle: to_come" in refusal(launchers.slurm.main, *words, "bundle=to_come")


def test_a_reference_is_a_job(made, tmp_path):
    words = ("--job", "reference", f"source={made / 'mds'}", f"out={tmp_path / 'r.safetensors'}")
    said = typed(launchers.slurm.main, *words, "keep_features=5", "fashion_mnist=true", DRY)
    assert "eval/reference.py" in said.out
    assert "--keep-features=5 --fashion-mnist" in said.out
    assert "dinov2: x.pth is not there" in refusal(launchers.slurm.main, *words, "dinov2=x.pth")


def test_a_dry_run_of_a_training_says_what_a_start_would_miss(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = typed(train.main, ROOT / "yamls/tokenizer_b.yaml", DRY)
    assert said.status == 0  # it needs none of that
    assert "files and data   a start here would be refused:\n  - assets.vgg16: " in said.out
    assert "`python -m lgm_scale.assets --fetch vgg16 dino_critic dinov2_l dinov2_b`" in said.out
    assert "python data_tools/images_to_mds.py SRC --out data/imagenet256/images/train" in said.out
    said = typed(train.main, ROOT / "yamls/dit_xl.yaml", DRY)
    assert "or make it: composer lgm_scale/train.py CONFIG, with task: tokenizer there" in said.out
    assert "--images MDS --out data/imagenet256/latents" in said.out
    off = [f"objective.{name}=0" for name in ("perceptual", "representation", "adversarial")]
    tiny = ("model={size: tiny, image_size: 16, patch_size: 4}", "model.pretrained_encoder=null")
    data = (f"data.path={made / 'mds'}", "data.num_samples=15", "train.global_batch_size=5")
    said = typed(train.main, ROOT / "yamls/tokenizer_b.yaml", DRY, *off, *tiny, *data)
    assert "files and data   all here: this run can start" in said.out


def test_jobs_take_every_option_of_the_tools(made, tmp_path):
    words = ("--job", "convert", f"source={made / 'photos'}", f"out={tmp_path / 'mds'}", DRY)
    said = typed(launchers.slurm.main, *words, "skip_unreadable=true", "label_column=y")
    assert "--skip-unreadable --label-column=y" in said.out
    assert "skip-unreadable" not in typed(launchers.slurm.main, *words, "skip_unreadable=false").out
    assert "skip_unreadable: yes is neither" in refusal(
        launchers.slurm.main, *words, "skip_unreadable=yes"
    )
    assert "classes: nowhere is not there" in refusal(
        launchers.slurm.main, *words, "classes=nowhere"
    )
    encoding = ("--job", "encode", "images=s3://a/b", "out=z", f"tokenizer={made / 'tokenizer'}")
    assert "--cache=c" in typed(launchers.slurm.main, *encoding, "cache=c", DRY).out


def test_a_cluster_without_gpus_runs_no_bf16():
    words = ("--cluster", "cpu", "--files-elsewhere", DRY)
    said = refusal(launchers.slurm.main, *words)
    assert "train.precision: amp_bf16 needs a GPU and none is here; use fp32" in said
    assert typed(launchers.slurm.main, *words, "train.precision=fp32").status == 0


def test_a_job_may_change_a_run_on_purpose():
    words = ("--files-elsewhere", DRY, "--allow-change", "optimizer.lr", "optimizer.lr=1e-5")
    said = typed(launchers.slurm.main, *words)
    assert "train.py" in said.out
    assert "optimizer.lr=1e-5 --allow-change optimizer.lr" in said.out
    eval_words = ("--job", "eval", "--config", ROOT / "yamls/eval_sweep.yaml", *words)
    assert "is for trainings, not for eval" in refusal(launchers.slurm.main, *eval_words)
