"""The files of `deploy/` are ones that Ray, Kubernetes and a shell would take."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
RAY = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))
    return loaded


def cluster_spec(name: str) -> dict[str, Any]:
    """Of a RayCluster, or of a RayJob's own cluster."""
    spec: dict[str, Any] = read(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def test_ray_takes_the_cluster_file():
    config = read("ray-up.yaml")
    validate_config(prepare_config(config))
    config["avaliable_node_types"] = config.pop("available_node_types")
    with pytest.raises(Exception, match="avaliable_node_types"):
        validate_config(config)


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_a_kuberay_cluster_has_what_a_search_needs(name: str):
    kind = {"raycluster.yaml": "RayCluster", "rayjob.yaml": "RayJob"}[name]
    assert (read(name)["apiVersion"], read(name)["kind"]) == ("ray.io/v1", kind)
    spec = cluster_spec(name)
    assert RAY is not None
    assert spec["rayVersion"] == RAY[1]
    assert spec["authOptions"] == {"mode": "token"}
    assert {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"} <= set(spec)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        # All nodes see the same folder, and have what they ask for.
        assert [m["mountPath"] for m in container["volumeMounts"]] == ["/shared"]
        assert [v["name"] for v in pod["volumes"]] == [m["name"] for m in container["volumeMounts"]]
        assert container["resources"]["limits"] == container["resources"]["requests"]
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_job_joins_its_cluster_and_writes_where_all_nodes_see_it():
    entrypoint = read("rayjob.yaml")["spec"]["entrypoint"].split()
    assert entrypoint[entrypoint.index("--address") + 1] == "auto"
    assert entrypoint[entrypoint.index("--out") + 1].startswith("/shared/")


def test_the_image_has_the_version_of_ray_that_is_tested():
    assert RAY is not None
    assert f"FROM rayproject/ray:{RAY[1]}-py311" in (DEPLOY / "Dockerfile").read_text()


def test_a_shell_can_read_the_slurm_script():
    subprocess.run(["bash", "-n", str(DEPLOY / "search.sbatch")], check=True)


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.*")), ids=lambda path: path.name)
def test_nothing_is_told_to_listen_to_everybody(path: Path):
    assert "0.0.0.0" not in path.read_text(encoding="utf-8")
