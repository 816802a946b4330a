"""A pipeline as dependent jobs, from photographs to a table."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from desk import CONFIG, Desk, Job
from small_sweep import results_of

pytestmark = [pytest.mark.servers, pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1800)]


def stages(photos: Path) -> dict[str, dict]:
    """The quickstart's, shrunk to seconds."""
    small = "train.global_batch_size=8"
    model = ["model.latent_dim=8", "model.num_base_tokens=16"]
    return {
        "sweep": {  # the order of the file does not matter
            "job": "eval",
            "needs": ["generator"],
            "config": "yamls/quickstart/sweep.yaml",
            "overrides": [
                *("bundle=runs/p/dit/bundle", "images=runs/p/images", "out=runs/p/report"),
                *("cells=[{num_tokens: [4, 16]}]", "num_images=34", "chunk_size=17"),
                *("batch_size=17", "num_components=8", "sampler.num_steps=3"),
                *("metrics_log=null", "commands=[]"),
            ],
            "array": 2,
        },
        "convert": {
            "job": "convert",
            "overrides": [f"source={photos}", "out=runs/p/images", "image_size=32", "workers=0"],
        },
        "tokenizer": {
            "job": "tokenizer",
            "needs": ["convert"],
            "config": "yamls/quickstart/tokenizer.yaml",
            "overrides": [
                *("run_name=p-tokenizer", "out=runs/p/tokenizer", "train.max_duration=6ba", small),
                *("data.path=runs/p/images", "data.num_samples=68", "data.num_workers=0", *model),
                *("model.image_size=32", "lengths.choices=[4,8,16]", "lengths.weights=[1,1,1]"),
                "optimizer.warmup=0",
            ],
        },
        "encode": {
            "job": "encode",
            "needs": ["tokenizer"],
            "overrides": [
                *("tokenizer=runs/p/tokenizer/bundle", "images=runs/p/images"),
                "out=runs/p/latents",
            ],
        },
        "generator": {
            "job": "train",
            "needs": ["encode"],
            "config": CONFIG,
            "overrides": [
                *("run_name=p-dit", "out=runs/p/dit", "tokenizer=runs/p/tokenizer/bundle", small),
                *("data.path=runs/p/latents", "data.num_samples=68", "data.num_workers=0", *model),
                *("lengths.choices=[4,8,16]", "train.max_duration=6ba"),
            ],
        },
    }


def test_a_pipeline_runs_from_photographs_to_a_table(desk: Desk):
    file = desk.folder / "pipeline.yaml"
    common = {"gpus_per_node": 1}
    described = {
        name: common | stage
        for name, stage in stages(desk.pipeline.root / "photos" / "train").items()
    }
    file.write_text(yaml.safe_dump({"cluster": "virtual.yaml", "stages": described}))
    result = desk.run("launchers/pipeline.py", file.name)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("submitted ")]
    ids = [line.split()[1].rstrip(":") for line in lines]
    assert len(ids) == 6  # with the job that joins the sweep
    last = Job(desk, desk.folder / "runs" / "p" / "report", [ids[-1]])
    assert last.wait() == "COMPLETED", [
        (job_id, last.state(job_id), last.log(job_id=job_id)[-2000:]) for job_id in ids
    ]
    rows = results_of(last.out)["rows"]
    assert [row["cell"]["num_tokens"] for row in rows] == [4, 16]
    assert (last.out / "index.html").is_file()
    # Once more: what is there is not made again.
    again = desk.run("launchers/pipeline.py", file.name, "--dry-run")
    assert again.stdout.count("(there already)") == 4, again.stdout
