"""The files of `launchers/cloud/` against the schemas of those who read them."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from small_pipeline import ROOT

from launchers.records import STOPPED_STATUS, USER_ERROR_STATUS

CLOUD = ROOT / "launchers" / "cloud"
SKYPILOT = json.loads((ROOT / "tests" / "schemas" / "skypilot.json").read_text())
KUBERNETES = "1.29"


def skypilot_task() -> dict[str, Any]:
    return yaml.safe_load((CLOUD / "skypilot.yaml").read_text())


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLOUD / "kubernetes.yaml").read_text()))


def check_skypilot(task: dict[str, Any]) -> None:
    jsonschema.validate(task, SKYPILOT["task"])
    jsonschema.validate(task["resources"], SKYPILOT["resources"])
    for mount in task["file_mounts"].values():
        jsonschema.validate(mount, SKYPILOT["storage"])


def test_the_skypilot_task_is_valid():
    check_skypilot(skypilot_task())


@pytest.mark.parametrize(
    "change",
    [
        lambda task: task.update(nodes=2),
        lambda task: task["resources"].update(accelerator="H100:8"),
        lambda task: task["resources"]["job_recovery"].update(recover_on_exit_codes=["75"]),
        lambda task: task["file_mounts"]["/data"].update(modus="COPY"),
    ],
)
def test_a_wrong_skypilot_task_is_seen(change):
    task = skypilot_task()
    change(task)
    with pytest.raises(jsonschema.ValidationError):
        check_skypilot(task)


def test_the_kubernetes_manifests_are_valid():
    for manifest in manifests():
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update(completion="2"),
        lambda spec: spec["podFailurePolicy"]["rules"][1]["onExitCodes"].update(values=["75"]),
        lambda spec: spec["template"]["spec"]["containers"][0].update(arguments=[]),
    ],
)
def test_a_wrong_kubernetes_manifest_is_seen(change):
    job = manifests()[1]
    change(job["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_statuses_mean_the_same_in_every_file():
    """Starting again after 75, never after 2."""
    assert skypilot_task()["resources"]["job_recovery"]["recover_on_exit_codes"] == [STOPPED_STATUS]
    rules = manifests()[1]["spec"]["podFailurePolicy"]["rules"]
    actions = {
        code: rule["action"]
        for rule in rules
        if "onExitCodes" in rule
        for code in rule["onExitCodes"]["values"]
    }
    assert actions == {STOPPED_STATUS: "Ignore", USER_ERROR_STATUS: "FailJob"}


def test_pods_find_each_other():
    service, job = manifests()
    pod = job["spec"]["template"]["spec"]
    name = job["metadata"]["name"]
    container = pod["containers"][0]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert environment["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    ranks = int(container["command"][2])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == ranks
    assert int(environment["WORLD_SIZE"]) == job["spec"]["completions"] * ranks
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
