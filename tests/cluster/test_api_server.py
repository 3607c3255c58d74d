"""The overlays on a real API server: where objects land, what a second apply changes, what accounts may do.

The server runs no controllers: nothing starts, so these tests show stored objects only.
"""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.api_server import ApiServer, api_server
from tests.helpers.jobs import ROOT
from tests.helpers.manifests import CLUSTER, CLUSTER_WIDE, OVERLAYS, Object, pods, render

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KINDS = (
    "rayclusters,rayjobs,serviceaccounts,roles,rolebindings,networkpolicies,configmaps,services,statefulsets,"
    "deployments,jobs,resourcequotas,limitranges,localqueues"
)


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with api_server(tmp_path_factory.mktemp("kubernetes")) as server:
        yield server


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest, kubectl: ApiServer) -> Iterator[str]:
    """An overlay whose platform was applied and whose jobs were created; both are deleted afterwards."""
    name = request.param
    kubectl("apply", "-k", path(name, "platform"))
    kubectl("create", "-k", path(name, "jobs"))
    yield name
    remove(kubectl, name)


def remove(kubectl: ApiServer, overlay: str) -> None:
    """Delete all but the namespace, whose deletion would never end without controllers."""
    objects = [each for each in render(overlay) if each["kind"] != "Namespace"]
    kubectl(
        "delete", "--wait=false", "-f", "-", text=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    )


def path(overlay: str, part: str) -> str:
    return str(CLUSTER / "overlays" / overlay / part)


def stored(kubectl: ApiServer, kind: str, name: str) -> Object:
    return kubectl.get(kind, name, "--namespace=paml")


def generation(kubectl: ApiServer, kind: str) -> dict[str, int]:
    """How often the specification of each object has changed."""
    found = kubectl.get(kind, "--namespace=paml")["items"]
    return {each["metadata"]["name"]: each["metadata"]["generation"] for each in found}


def without_defaults(want: Any, have: Any, where: str = "") -> list[str]:
    """What was sent and is not stored; the server may add fields."""
    if isinstance(want, dict):
        if not isinstance(have, dict):
            return [where]
        return [line for key in want for line in without_defaults(want[key], have.get(key), f"{where}.{key}")]
    if isinstance(want, list):
        if not isinstance(have, list) or len(want) != len(have):
            return [where]
        both = zip(want, have, strict=True)
        return [line for i, (a, b) in enumerate(both) for line in without_defaults(a, b, f"{where}[{i}]")]
    return [] if want == have else [f"{where}: {want!r} became {have!r}"]


def commands(heading: str) -> list[str]:
    """The shell blocks of a section of the guide."""
    guide = (ROOT / "docs" / "clusters.md").read_text()
    section = re.split(r"\n#{2,3} ", guide.split(f" {heading}\n", 1)[1])[0]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)


@pytest.mark.parametrize("name", ["dev", "aws"])
def test_the_commands_of_the_guide_work_as_written(kubectl: ApiServer, name: str):
    """From an empty server to started jobs; other programs than kubectl are left out."""
    blocks = [*commands("1. Secrets"), *commands({"dev": "kind, on this machine (4 CPUs, 12 GB)", "aws": "AWS"}[name])]
    blocks += commands("3. Run the three steps")
    script = "\n".join(block.replace("OVERLAY", name) for block in blocks)
    lines = [
        line for line in script.replace("\\\n", " ").splitlines()
        if line.startswith("kubectl") and " wait " not in line and "karpenter" not in line
    ]  # fmt: skip
    kubectl.run("delete", "secrets", "--all", "--namespace=paml")
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", line], cwd=ROOT, env=kubectl.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    for job in ("prepare", "train", "tune"):
        assert stored(kubectl, "rayjob", job)["spec"]["suspend"] is False
    wanted = {"paml-mlflow", "paml-redis", *(["paml-s3"] if name == "dev" else [])}
    secrets = {each["metadata"]["name"] for each in kubectl.get("secrets", "--namespace=paml")["items"]}
    assert wanted <= secrets
    remove(kubectl, name)


def test_every_object_is_stored_whole_and_in_the_namespace(kubectl: ApiServer, overlay: str):
    found = kubectl.get(KINDS, "--all-namespaces")["items"]
    ours = {
        (each["kind"], each["metadata"]["name"]): each
        for each in found
        if each["metadata"]["namespace"] not in ("kube-system", "kube-public", "kube-node-lease")
        and each["metadata"]["name"] not in ("kubernetes", "kube-root-ca.crt")
    }
    assert {each["metadata"]["namespace"] for each in ours.values()} == {"paml"}
    sent = render(overlay)
    assert {key for key in ours if key[0] in ("RayCluster", "RayJob")} == {
        ("RayCluster", "paml"), ("RayJob", "prepare"), ("RayJob", "train"), ("RayJob", "tune"),
    }  # fmt: skip
    for each in sent:
        if each["kind"] not in CLUSTER_WIDE:
            assert without_defaults(each, ours[each["kind"], each["metadata"]["name"]], each["kind"]) == []


def test_a_second_apply_changes_nothing_that_runs(kubectl: ApiServer, overlay: str):
    for kind, name in (("rayjob", "train"), ("raycluster", "paml")):
        kubectl("patch", kind, name, "--namespace=paml", "--type=merge", "--patch", '{"spec":{"suspend":false}}')
    # As the standing cluster's autoscaler does it, with its account.
    scale = [{"op": "replace", "path": "/spec/workerGroupSpecs/2/replicas", "value": 1}]
    autoscaler = "--as=system:serviceaccount:paml:paml-autoscaler"
    kubectl("patch", "raycluster", "paml", "--namespace=paml", autoscaler, "--type=json", "--patch", json.dumps(scale))
    before = {name: stored(kubectl, kind, name) for kind, name in (("rayjob", "train"), ("raycluster", "paml"))}

    generations = {kind: generation(kubectl, kind) for kind in ("statefulsets", "deployments", "networkpolicies")}
    output = kubectl("apply", "-k", path(overlay, "platform"))
    again = kubectl.run("create", "-k", path(overlay, "jobs"))

    changed = [line for line in output.splitlines() if not line.endswith("unchanged")]
    # These are sent again, since the server rewrites quantities and adds defaults to lists; nothing differs afterwards.
    assert all(re.match(r"resourcequota/paml |statefulset.apps/", line) for line in changed), changed
    assert generations == {kind: generation(kubectl, kind) for kind in generations}
    assert again.returncode == 1
    assert again.stderr.count("already exists") == 4
    train, standing = stored(kubectl, "rayjob", "train"), stored(kubectl, "raycluster", "paml")
    assert train["spec"]["suspend"] is False
    assert standing["spec"]["suspend"] is False
    assert [each["replicas"] for each in standing["spec"]["workerGroupSpecs"]] == [0, 0, 1, 0]
    assert train["metadata"]["resourceVersion"] == before["train"]["metadata"]["resourceVersion"]
    assert standing["metadata"]["resourceVersion"] == before["paml"]["metadata"]["resourceVersion"]

    # What the guide warns of: applying the jobs instead of creating them.
    applied = kubectl("apply", "-k", path(overlay, "jobs"), "--dry-run=server", "-o", "json")
    wrong = {each["metadata"]["name"]: each["spec"] for each in json.loads(applied)["items"]}
    assert wrong["train"]["suspend"] is True


ONCE = pytest.mark.parametrize("overlay", ["aws"], indirect=True)
"""For what is the same in all overlays."""

AUTOSCALER = {("pods", "get list watch"), ("rayclusters.ray.io paml", "get patch")}


@ONCE
@pytest.mark.parametrize(
    ("account", "rights"),
    [
        ("paml-head", set()),
        ("paml-worker", set()),
        ("paml-submitter", set()),
        ("paml-tracking", set()),
        ("paml-database", set()),
        ("paml-autoscaler", AUTOSCALER),
    ],
)
def test_an_account_may_do_only_what_its_pod_needs(
    kubectl: ApiServer, overlay: str, account: str, rights: set[tuple[str, str]]
):
    can_i = ["auth", "can-i", "--namespace=paml", f"--as=system:serviceaccount:paml:{account}"]
    listed = set()
    for line in kubectl(*can_i, "--list").splitlines()[1:]:
        resource, _, names, verbs = re.fullmatch(r"(\S*)\s+\[(.*?)\]\s+\[(.*?)\]\s+\[(.*?)\]", line).groups()
        if resource and "selfsubject" not in resource:  # every account may ask for its own rights
            listed.add((f"{resource} {names}".strip(), verbs))
    assert listed == rights
    for question in ("patch rayclusters.ray.io/paml", "patch rayclusters.ray.io/train-5x7zq", "get secrets"):
        answer = kubectl.run(*can_i, *question.split()).stdout.strip()
        assert answer == ("yes" if rights and question.endswith("/paml") else "no"), question


def test_the_server_accepts_every_pod(kubectl: ApiServer, overlay: str):
    """With its admission of accounts, limits and quotas. The pods are not stored."""
    bodies = {}
    for pod in pods(render(overlay)):
        spec = pod.spec | {"automountServiceAccountToken": False}  # tokens come from a controller
        spec.setdefault("serviceAccountName", "paml-worker")  # so does the account `default`
        mounted = {mount["name"] for each in spec["containers"] for mount in each.get("volumeMounts", [])}
        claims = mounted - {volume["name"] for volume in spec.get("volumes", [])}
        spec["volumes"] = spec.get("volumes", []) + [
            {"name": name, "persistentVolumeClaim": {"claimName": name}} for name in claims
        ]
        name = re.sub(r"\W+", "-", pod.where.lower())
        meta = {"name": name, "namespace": "paml", "labels": pod.labels, "annotations": pod.annotations}
        bodies[name] = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(bodies.values())})
    output = kubectl("create", "--dry-run=server", "-o", "name", "-f", "-", text=text)
    assert output.split() == [f"pod/{name}" for name in bodies]


def small_pod(name: str, resources: Object) -> str:
    container = {"name": "main", "image": "busybox:1", "resources": resources}
    spec = {"serviceAccountName": "paml-worker", "containers": [container]}
    meta = {"name": name, "namespace": "paml"}
    return json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})


@ONCE
def test_the_quota_bounds_gpus_and_limits_have_defaults(kubectl: ApiServer, overlay: str):
    hard = stored(kubectl, "resourcequota", "paml")["spec"]["hard"]
    status = {"status": {"hard": hard, "used": dict.fromkeys(hard, "0")}}  # a controller's work
    kubectl(
        "patch", "resourcequota", "paml", "--namespace=paml", "--subresource=status", "--type=merge",
        "--patch", json.dumps(status),
    )  # fmt: skip
    gpus = {"nvidia.com/gpu": "17"}
    deadline = time.monotonic() + 60  # the server's cache follows
    while True:
        done = kubectl.run("create", "--dry-run=server", "-f", "-", text=small_pod("many", {"limits": gpus}))
        if "exceeded quota" in done.stderr:
            break
        assert time.monotonic() < deadline, done
        time.sleep(1)
    created = json.loads(kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", text=small_pod("bare", {})))
    assert created["spec"]["containers"][0]["resources"] == {
        "requests": {"cpu": "100m", "memory": "256Mi"},
        "limits": {"cpu": "1", "memory": "1Gi"},
    }
