"""Manifests: accepted by the published schemas, with every value as it was given, and no secret in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from tinytron.errors import ConfigError
from tinytron.manifests.job import ContainerJob, SecretKey, Toleration, Tpu
from tinytron.manifests.kinds import KINDS, as_yaml

yaml = pytest.importorskip("yaml")

HOSTILE = (
    "$(touch /tmp/x)",
    "$$(HF_TOKEN)",
    "a: b\n- c",
    "'\"`",
    "{{.Values}}",
    "# no",
    "yes",
    "1e3",
    "*a",
    "&b",
    "\u2028x",
    "é\t",
)
WORDS = ("-m", "tinytron", "pretrain", "--preset", "1b")
PLAIN = ContainerJob(name="my-run", image="registry.example/tinytron:0.1", command=WORDS)
FULL = replace(
    PLAIN,
    nodes=4, gpus=8, namespace="research", cpu="64", memory="512Gi", rdma={"rdma/hca_shared_devices_a": 1},
    env={"NCCL_DEBUG": "INFO", "WORDS": "\n".join(HOSTILE)}, command=(*WORDS, *HOSTILE),
    secrets={"HF_TOKEN": SecretKey("hugging-face", "token")},
    volumes={"/data": "shards", "/runs": "runs", "/more runs": "runs"}, shm="64Gi",
    node_selector={"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"},
    tolerations=(Toleration("nvidia.com/gpu", "present", "NoSchedule"), Toleration("spot")),
    queue="teams.a", service_account="trainer", max_restarts=3, ttl_seconds=60, grace_seconds=300,
)  # fmt: skip
JOBS = {"plain": PLAIN, "full": FULL, "tpu": replace(PLAIN, gpus=0, tpu=Tpu("tpu-v5-lite-podslice", "4x4", 4))}


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dicts(inner)


def _container(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part with the arguments: a container, or the trainer of a TrainJob."""
    (found,) = (part for part in _dicts(manifest) if "args" in part)
    return found


def _pod_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    (found,) = (part for part in _dicts(manifest) if "containers" in part)
    return found


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    """``text`` after Kubernetes has replaced ``$(NAME)`` of known variables and read ``$$`` as ``$``."""
    out, i = "", 0
    while i < len(text):
        if text[i : i + 2] == "$$":
            out, i = out + "$", i + 2
        elif text[i : i + 2] == "$(" and text[i + 2 :].partition(")")[0] in variables:
            name = text[i + 2 :].partition(")")[0]
            out, i = out + variables[name], i + len(name) + 3
        else:
            out, i = out + text[i], i + 1
    return out


def _missing(given: Any, kept: Any) -> list[str]:
    """The fields of ``given`` that ``kept`` lacks or has otherwise."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [
            n for name, value in given.items() for n in ([name] if name not in kept else _missing(value, kept[name]))
        ]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [name for one, other in zip(given, kept, strict=True) for name in _missing(one, other)]
    return [] if given == kept else [repr(given)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", JOBS)
def test_yaml_gives_back_the_manifest_and_kubernetes_the_words(kind: str, name: str) -> None:
    job = JOBS[name]
    manifest = KINDS[kind](job)
    assert yaml.safe_load(as_yaml(kind, job)) == manifest
    container = _container(manifest)
    env = {entry["name"]: entry for entry in container["env"]}
    variables = dict.fromkeys(("HF_TOKEN", "touch /tmp/x"), "REPLACED") | {"VC_TASK_INDEX": "3"}
    words = [_expanded(word, variables) for word in container["args"]]
    rank = ["--node_rank", "3"] if kind == "volcano" else []
    assert [*container["command"], *words] == ["tinytron", "launch", *rank, *job.command]
    assert {name: _expanded(env[name]["value"], variables) for name in job.env} == dict(job.env)
    assert env["TINYTRON_ELASTIC"]["value"] == "1"  # a pod that stopped is started again
    for variable, secret in job.secrets.items():
        assert env[variable]["valueFrom"] == {"secretKeyRef": {"name": secret.name, "key": secret.key}}


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_is_run_as_it_is(kind: str) -> None:
    entry = ("bash", "-c", 'echo "$0" $(HF_TOKEN) $$ ${A:-b}', "a b'\n")
    job = ContainerJob(name="run", image="image", entry=entry, nodes=2)
    (container,) = (part for part in _dicts(yaml.safe_load(as_yaml(kind, job))) if "command" in part)
    assert "args" not in container
    assert tuple(_expanded(word, {"HF_TOKEN": "REPLACED"}) for word in container["command"]) == entry
    with pytest.raises(ConfigError, match="command must have words"):
        ContainerJob(name="run", image="image")


def test_the_parts_of_a_jobset() -> None:
    manifest = KINDS["jobset"](FULL)
    (group,) = manifest["spec"]["replicatedJobs"]
    inner = group["template"]["spec"]
    assert (inner["completionMode"], inner["completions"], inner["parallelism"]) == ("Indexed", 4, 4)
    assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 3}
    assert manifest["spec"]["ttlSecondsAfterFinished"] == 60
    env = {entry["name"]: entry.get("value") for entry in _container(manifest)["env"]}
    assert (env["PET_NNODES"], env["PET_NPROC_PER_NODE"], env["PET_MASTER_PORT"]) == ("4", "8", "29500")
    # <jobset>-<job>-<number>-<index>.<subdomain>
    assert env["PET_MASTER_ADDR"] == f"my-run-{group['name']}-0-0.{manifest['spec']['network']['subdomain']}"
    limits = _container(manifest)["resources"]["limits"]
    assert limits == {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": "8", "rdma/hca_shared_devices_a": "1"}
    pod = _pod_spec(manifest)
    mounts = {mount["mountPath"]: mount["name"] for mount in _container(manifest)["volumeMounts"]}
    claims = {volume["name"]: volume for volume in pod["volumes"]}
    assert claims[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    found = {path: claims[mounts[path]]["persistentVolumeClaim"]["claimName"] for path in FULL.volumes}
    assert found == FULL.volumes
    assert pod["tolerations"][1] == {"key": "spot", "operator": "Exists"}
    assert pod["terminationGracePeriodSeconds"] == 300


@pytest.mark.parametrize("kind", KINDS)
def test_a_tpu_is_marked_as_untested(kind: str) -> None:
    manifest = KINDS[kind](JOBS["tpu"])
    assert "no TPU backend" in manifest["metadata"]["annotations"]["tinytron/note"]
    assert _pod_spec(manifest)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    text = as_yaml(kind, JOBS["tpu"])
    assert "google.com/tpu: '4'" in text
    assert "nvidia.com/gpu" not in text


# Published schemas.


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize(
    ("kind", "model"), [("jobset", "JobsetV1alpha2JobSet"), ("trainjob", "TrainerV1alpha1TrainJob")]
)
def test_the_models_of_the_api_know_every_field(kind: str, model: str, name: str) -> None:
    """The models drop what they do not know, and add defaults. So nothing may be missing afterwards."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    manifest = KINDS[kind](JOBS[name])
    assert _missing(manifest, getattr(models, model).from_dict(manifest).to_dict()) == []
    _pod_spec(manifest)["volume"] = []
    assert _missing(manifest, getattr(models, model).from_dict(manifest).to_dict()) == ["volume"]


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("kind", ["jobset", "volcano"])
def test_the_pods_pass_kubernetes_schema(kind: str, name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    manifest = KINDS[kind](JOBS[name])
    (template,) = (
        part["template"] for part in _dicts(manifest) if "containers" in part.get("template", {}).get("spec", {})
    )
    inner = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
    validate.validate(inner, validate.latest_version(), strict=True)
    template["spec"]["containers"][0]["arguments"] = []
    with pytest.raises(validate.ValidationError):
        validate.validate(inner, validate.latest_version(), strict=True)


# The fields of Volcano's API that are used, compared with its CRD by hand; no registry has its schema.
VOLCANO = {
    "schedulerName": str, "minAvailable": int, "maxRetry": int, "ttlSecondsAfterFinished": int, "plugins": dict,
    "policies": list, "tasks": list, "queue": str,
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_a_volcano_job_has_the_fields_of_its_reference(name: str) -> None:
    manifest = KINDS["volcano"](JOBS[name])
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    for field, value in manifest["spec"].items():
        assert isinstance(value, VOLCANO[field])
    assert manifest["spec"]["plugins"] == {"svc": [], "env": []}
    for policy in manifest["spec"]["policies"]:
        assert set(policy) == {"event", "action"}
    (task,) = manifest["spec"]["tasks"]
    assert set(task) == {"name", "replicas", "template"}
    assert task["replicas"] == manifest["spec"]["minAvailable"] == JOBS[name].nodes


# Refusals.


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": "My_run"}, "name 'My_run' is not a name or value that Kubernetes takes; use one like my-run"),
        ({"name": "a" * 41}, "name 'a+' is not a name"),
        ({"namespace": "a b"}, "namespace 'a b' is not"),
        ({"image": "x y"}, "image 'x y' must be the name of an image"),
        ({"image": "$(x)"}, "must be the name of an image"),
        ({"command": ()}, "command must have words"),
        ({"command": ("a\0",)}, "command must have words without NUL"),
        ({"nodes": 0}, "nodes 0 must be at least 1"),
        ({"processes": 0}, "processes 0 must be at least 1"),
        ({"gpus": -1}, "gpus -1 must be at least 0"),
        ({"rdma": {"rdma/a": -1}}, "rdma/a -1 must be at least 0"),
        ({"rdma": {"a b": 1}}, "resource 'a b' is not"),
        ({"cpu": "many"}, "cpu 'many' is not .* use one like 32"),
        ({"shm": "$(x)"}, "shm .* use one like 16Gi"),
        ({"env": {"A B": "x"}}, "variable 'A B' is not"),
        ({"env": {"HF_TOKEN": "hf_x"}}, "env HF_TOKEN would put a secret into the manifest; give it in secrets"),
        ({"env": {"A": "x"}, "secrets": {"A": SecretKey("a", "b")}}, "A is in env and in secrets; leave one out"),
        ({"secrets": {"A": SecretKey("a b", "b")}}, "secrets A 'a b' is not"),
        ({"secrets": {"A": SecretKey("a", "$(b)")}}, "secrets A: the key .* must be letters"),
        ({"volumes": {"data": "a"}}, "volumes 'data' must be an absolute path"),
        ({"volumes": {"/data": "a b"}}, "claim 'a b' is not"),
        ({"node_selector": {"a": "b\n"}}, "node_selector a 'b.n' is not"),
        ({"node_selector": {"a b": "c"}}, "node_selector 'a b' is not"),
        ({"tolerations": (Toleration("a", "b c"),)}, "toleration a 'b c' is not"),
        ({"tolerations": (Toleration("a", "b", "Never"),)}, "the effect 'Never' must be NoSchedule"),
        ({"queue": "A"}, "queue 'A' is not"),
        ({"tpu": Tpu("v5", "4 x 4", 4)}, "tpu topology '4 x 4' must be numbers with x"),
    ],
)  # fmt: skip
def test_what_kubernetes_would_refuse(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as error:
        replace(PLAIN, **change)
    assert "hf_x" not in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_kind_refuses() -> None:
    with pytest.raises(ConfigError, match="unknown kind jobsets; did you mean jobset"):
        as_yaml("jobsets", PLAIN)
    with pytest.raises(ConfigError, match="priority_class high: a TrainJob takes the one of its runtime"):
        as_yaml("trainjob", replace(PLAIN, priority_class="high"))
    assert "priorityClassName: high" in as_yaml("jobset", replace(PLAIN, priority_class="high"))
