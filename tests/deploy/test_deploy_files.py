"""The files of `deploy/` are ones that Ray, Kubernetes and a shell would take."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from ray.autoscaler._private.util import prepare_config, validate_config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEPLOY = ROOT / "deploy"
CRDS = os.environ.get("KUBERAY_CRDS", "")
RAY = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))
    return loaded


def cluster_spec(name: str) -> dict[str, Any]:
    """Of a RayCluster, or of a RayJob's own cluster."""
    spec: dict[str, Any] = read(name)["spec"]
    return spec.get("rayClusterSpec", spec)


@pytest.fixture(params=["raycluster.yaml", "rayjob.yaml"])
def kuberay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_ray_takes_the_cluster_file():
    config = read("ray-up.yaml")
    validate_config(prepare_config(config))
    config["avaliable_node_types"] = config.pop("available_node_types")
    with pytest.raises(Exception, match="avaliable_node_types"):
        validate_config(config)


def test_kuberay_knows_every_field(kuberay: str):
    validator = Draft202012Validator(yaml.safe_load((HERE / "kuberay.yaml").read_text()))
    assert [error.message for error in validator.iter_errors(read(kuberay))] == []
    for change in (
        lambda spec: spec.update(enableInTreeAutoscaler=True),
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 1}),
        lambda spec: spec["workerGroupSpecs"][0].pop("maxReplicas"),
        lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"].pop("containers"),
    ):
        broken = read(kuberay)
        change(broken["spec"].get("rayClusterSpec", broken["spec"]))
        assert not validator.is_valid(broken)


@pytest.mark.skipif(not CRDS, reason="KUBERAY_CRDS names no folder of KubeRay's own schemas")
def test_kuberays_own_schema_knows_every_field(kuberay: str):
    """`KUBERAY_CRDS`: helm-chart/kuberay-operator/crds of a checkout of KubeRay."""
    plural = {"raycluster.yaml": "rayclusters", "rayjob.yaml": "rayjobs"}[kuberay]
    text = (Path(CRDS) / f"ray.io_{plural}.yaml").read_text()
    versions = yaml.safe_load(text)["spec"]["versions"]
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"]
    validator = Draft202012Validator(closed(schema))
    data = read(kuberay)
    data["metadata"] = {}  # Kubernetes' own, whose schema is not in there
    assert [error.message for error in validator.iter_errors(data)] == []


def closed(schema: Any) -> Any:
    """A schema of Kubernetes as one of JSON that refuses unknown fields, which it would drop."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(part) for name, part in schema.items() if name != "format"}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    if "properties" in schema:
        made.setdefault("additionalProperties", False)
    return made


def test_a_kuberay_cluster_has_what_a_search_needs(kuberay: str):
    kind = {"raycluster.yaml": "RayCluster", "rayjob.yaml": "RayJob"}[kuberay]
    assert (read(kuberay)["apiVersion"], read(kuberay)["kind"]) == ("ray.io/v1", kind)
    spec = cluster_spec(kuberay)
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


def test_the_image_gets_no_environment_no_history_and_no_runs():
    """`COPY . .` takes all that .dockerignore does not name."""
    assert "COPY --chown=ray:users . ." in (DEPLOY / "Dockerfile").read_text()
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert {f"**/{pattern.rstrip('/')}" for pattern in ignored} | {".git"} <= set(patterns)
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    # Docker's patterns match a path or any folder of it; `**/` also matches at the root.
    left_out = [
        name
        for name in listed
        for path in (Path(name), *Path(name).parents)
        if any(path.match(pattern.removeprefix("**/")) for pattern in patterns)
    ]
    assert left_out == []
