"""The KubeRay files: against the operator's schemas where these lie beside the repository, and for themselves."""

import gzip
import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

REPO = Path(__file__).resolve().parent.parent
FOLDER = REPO / "cluster" / "kuberay"
SCHEMAS = REPO.parent / "shared" / "schemas" / "kuberay"
FILES = {"RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml", "RayService": "rayservice.yaml"}
CLUSTER_SPEC = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}


def read(kind):
    return yaml.safe_load((FOLDER / FILES[kind]).read_text())


def cluster_spec(kind):
    spec = read(kind)["spec"]
    for key in CLUSTER_SPEC[kind]:
        spec = spec[key]
    return spec


def pod_specs(kind):
    spec = cluster_spec(kind)
    return [
        spec["headGroupSpec"]["template"]["spec"],
        *(group["template"]["spec"] for group in spec["workerGroupSpecs"]),
    ]


def strict(schema):
    """The schema with unknown fields refused, as `kubectl apply` does, and Kubernetes' own extensions put plainly."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: strict(value) for key, value in schema.items()}
    if isinstance(out.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    return out


def crd_schema(kind):
    with gzip.open(SCHEMAS / f"ray.io_{kind.lower()}s.yaml.gz", "rt") as file:
        crd = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own ObjectMeta, which a CRD leaves out
    return schema


@pytest.mark.skipif(not SCHEMAS.is_dir(), reason="the CRD schemas are not beside the repository")
@pytest.mark.parametrize("kind", FILES)
def test_the_file_fits_the_published_schema(kind):
    schema = crd_schema(kind)
    jsonschema.validate(read(kind), schema)

    wrong = read(kind)
    wrong["spec"]["noSuchField"] = 1
    with pytest.raises(jsonschema.ValidationError, match="noSuchField"):
        jsonschema.validate(wrong, schema)


@pytest.mark.parametrize("kind", FILES)
def test_token_authentication_is_on(kind):
    assert read(kind)["apiVersion"] == "ray.io/v1" and read(kind)["kind"] == kind
    assert cluster_spec(kind)["authOptions"]["mode"] == "token"


@pytest.mark.parametrize("kind", FILES)
def test_pods_hold_together(kind):
    heads, *workers = pod_specs(kind)
    assert heads["containers"][0]["name"] == "ray-head" and workers
    images = set()
    for pod in (heads, *workers):
        [container] = pod["containers"]
        images.add(container["image"])
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == volumes, "every volume is mounted and every mount has its volume"
        assert mounts["runs"] == "/runs" and mounts["shm"] == "/dev/shm"
        assert {"name": "GLOO_SOCKET_IFNAME", "value": "eth0"} in container["env"]
    assert len(images) == 1, "one image for all, the one that the Dockerfile makes"
    for group in cluster_spec(kind)["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_versions_agree_with_the_package():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    ray = next(entry for entry in project["dependencies"] if entry.startswith("ray["))
    lowest = re.search(r">=(\d+\.\d+)", ray)[1]
    dockerfile = (REPO / "cluster" / "Dockerfile").read_text()
    assert re.search(rf"^ARG BASE=rayproject/ray:{lowest}\.\d+-", dockerfile, re.M)
    for kind in FILES:
        assert cluster_spec(kind)["rayVersion"].startswith(lowest + ".")
        assert all(pod["containers"][0]["image"] == f"rlhf-ray:{project['version']}" for pod in pod_specs(kind))
    assert f"-t rlhf-ray:{project['version']} " in dockerfile


def test_the_job_runs_a_recipe_in_a_folder_that_every_pod_sees():
    words = shlex.split(read("RayJob")["spec"]["entrypoint"])
    assert words[:2] == ["rlhf-ray", "run"]
    run_dir = words[words.index("--run-dir") + 1]
    assert run_dir.startswith("/runs/")
    head, *_ = pod_specs("RayJob")
    recipes = next(mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "recipe")
    assert Path(words[2]).parent == Path(recipes["mountPath"])


def test_the_service_is_locked_and_its_builder_exists():
    config = yaml.safe_load(read("RayService")["spec"]["serveConfigV2"])
    [application] = config["applications"]
    module, _, name = application["import_path"].partition(":")
    assert importlib.util.find_spec(module) and hasattr(importlib.import_module(module), name)
    assert application["args"]["model"].startswith("/runs/")
    for pod in pod_specs("RayService"):
        keys = [entry for entry in pod["containers"][0]["env"] if entry["name"] == "RLHF_RAY_API_KEY"]
        assert keys and "secretKeyRef" in keys[0]["valueFrom"], "it listens on every address: a key, from a Secret"


def test_serve_takes_the_services_config_and_its_builder_its_arguments(tmp_path, monkeypatch):
    from ray.serve import Application
    from ray.serve.schema import ServeDeploySchema
    from served_app import save_tiny

    from rlhf_ray.errors import UserError

    config = ServeDeploySchema.model_validate(yaml.safe_load(read("RayService")["spec"]["serveConfigV2"]))
    [application] = config.applications
    module, _, name = application.import_path.partition(":")
    build = getattr(importlib.import_module(module), name)
    save_tiny(tmp_path / "demo" / "ppo" / "model")
    arguments = application.args | {"model": str(tmp_path / Path(application.args["model"]).name)}
    monkeypatch.delenv("RLHF_RAY_API_KEY", raising=False)
    with pytest.raises(UserError, match="RLHF_RAY_API_KEY"):
        build(arguments)
    monkeypatch.setenv("RLHF_RAY_API_KEY", "k" * 48)
    assert isinstance(build(arguments), Application)
    assert config.http_options.port == 8000 and application.route_prefix == "/", "as the file's own commands say"
    with pytest.raises(UserError, match="no_such_key"):
        build(arguments | {"no_such_key": 1})
