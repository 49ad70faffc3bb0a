"""The examples of replicas are what their readers take: Serve's config, a cluster's file, and a RayService of KubeRay.

KubeRay's CRD comes in no Python package, so the manifest is checked by its structure: names, places and sums. Where Ray is
installed, its own schemas check the two other files, and the application in the manifest.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemcutter.ray import ReplicaOptions

EXAMPLES = Path(__file__).parents[2] / "examples" / "ray"
CPU = re.compile(r"\d+")


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((EXAMPLES / name).read_text())
    return found


def manifest_application() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(read("rayservice.yaml")["spec"]["serveConfigV2"])
    return found


@pytest.mark.parametrize("config", [read("serve.yaml"), manifest_application()], ids=["serve.yaml", "rayservice.yaml"])
def test_applications_have_options_of_replicas(config: dict[str, Any]) -> None:
    (application,) = config["applications"]
    assert application["import_path"] == "gemcutter.ray:deployment"
    options = ReplicaOptions.read(application["args"])
    assert options.max_replicas is not None
    assert options.max_replicas > options.replicas


@pytest.mark.parametrize("config", [read("serve.yaml"), manifest_application()], ids=["serve.yaml", "rayservice.yaml"])
def test_ray_accepts_the_applications(config: dict[str, Any]) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="needs Ray: pip install 'gemcutter[ray]'")
    schema.ServeDeploySchema.model_validate(config)


def test_ray_accepts_the_cluster() -> None:
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'gemcutter[ray]'")
    jsonschema = pytest.importorskip("jsonschema")
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(read("cluster.yaml"), json.loads(schema.read_text()))


def test_the_manifest_is_a_ray_service() -> None:
    found = read("rayservice.yaml")
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayService")
    assert set(found) == {"apiVersion", "kind", "metadata", "spec"}
    cluster = found["spec"]["rayClusterConfig"]
    assert set(found["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    assert set(cluster) == {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    (workers,) = cluster["workerGroupSpecs"]
    assert set(workers) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    for group in (cluster["headGroupSpec"], workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"].endswith(f":{cluster['rayVersion']}")


def test_pods_have_room_for_replicas_and_time_to_end() -> None:
    (workers,) = read("rayservice.yaml")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    options = ReplicaOptions.read(manifest_application()["applications"][0]["args"])
    pod = workers["template"]["spec"]
    cpus = int(CPU.fullmatch(pod["containers"][0]["resources"]["limits"]["cpu"])[0])  # type: ignore[index]
    assert cpus >= options.threads
    assert (workers["minReplicas"], workers["maxReplicas"]) == (options.replicas, options.max_replicas)
    assert pod["terminationGracePeriodSeconds"] > options.server.shutdown_timeout_s
    mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert any(options.load.model.startswith(f"{mount}/") for mount in mounts)
