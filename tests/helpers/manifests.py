"""Kustomize overlays as Kubernetes would get them, and what can be wrong with them that no schema says.

Every check takes rendered objects and returns its findings as lines, so that a test can plant a mistake and ask for it.
"""

import copy
import functools
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.helpers.jobs import ROOT
from tests.helpers.shared import shared

CLUSTER = ROOT / "cluster"
OVERLAYS = ("dev", "aws", "gcp", "aws-kueue")
Object = dict[str, Any]

WITHOUT_SCHEMA = ("kueue.x-k8s.io/",)
"""Kinds whose schemas are not at hand."""

LISTENS = {
    "paml-train": {6379, 8265, 10001, 8080},  # ray start --head: GCS, dashboard, client, metrics
    "paml-tracking": {5000},  # the command in docker/Dockerfile, which test_docker holds to it
    "postgres": {5432},
    "redis": {6379},
    "minio": {9000},
}
"""Ports on which an image's command listens unless its arguments say otherwise."""

READ_BY_IMAGES = {
    "postgres": {"POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD", "PGDATA"},
    "redis": {"REDISCLI_AUTH"},
    "minio": {"MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD", "MINIO_BROWSER"},
}
"""Variables of images that are not ours, from their documentation."""

GRACE = "terminationGracePeriodSeconds"

READ_BY_LIBPQ = {"PGHOST", "PGUSER", "PGPASSWORD"}


@functools.cache
def _rendered(overlay: str) -> str:
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, str(CLUSTER / "overlays" / overlay)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout
    pytest.skip("needs kustomize or kubectl, to render the overlays")


def render(overlay: str) -> list[Object]:
    """The objects of an overlay, the caller's own to change; skips the test where no Kustomize is installed."""
    return [each for each in yaml.safe_load_all(_rendered(overlay)) if each]


class Pod(NamedTuple):
    """Pods that an object leads to."""

    where: str
    labels: dict[str, str]
    spec: Object


def pods(objects: Sequence[Object]) -> Iterator[Pod]:
    """Every pod template: of workloads, of Ray's groups, of the jobs' submitters."""
    for each in objects:
        kind, name, spec = each["kind"], each["metadata"]["name"], each.get("spec", {})
        if kind in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
            yield _pod(f"{kind} {name}", spec["template"])
        elif kind == "RayCluster":
            yield from _ray_pods(f"{kind} {name}", spec)
        elif kind == "RayJob":
            yield from _ray_pods(f"{kind} {name}", spec["rayClusterSpec"])
            yield _pod(f"{kind} {name} submitter", spec["submitterPodTemplate"])


def _ray_pods(where: str, spec: Object) -> Iterator[Pod]:
    yield _pod(f"{where} head", spec["headGroupSpec"]["template"], {"ray.io/node-type": "head"})
    for group in spec["workerGroupSpecs"]:
        yield _pod(f"{where} group {group['groupName']}", group["template"], {"ray.io/node-type": "worker"})


def _pod(where: str, template: Object, given: Mapping[str, str] | None = None) -> Pod:
    """given: labels that KubeRay adds."""
    return Pod(where, template.get("metadata", {}).get("labels", {}) | dict(given or {}), template["spec"])


def ray_clusters(objects: Sequence[Object]) -> Iterator[tuple[str, Object]]:
    """The clusters that stand, and those that jobs bring, each with where it is said."""
    for each in objects:
        if each["kind"] in ("RayCluster", "RayJob"):
            spec = each["spec"] if each["kind"] == "RayCluster" else each["spec"]["rayClusterSpec"]
            yield f"{each['kind']} {each['metadata']['name']}", spec


def containers(pod: Pod) -> Iterator[tuple[str, Object]]:
    """Its containers, those of its start among them, each with where it stands."""
    for each in [*pod.spec.get("initContainers", []), *pod.spec["containers"]]:
        yield f"{pod.where}, container {each['name']}", each


def image_name(container: Object) -> str:
    """`paml-train` of `registry/paml-train:0.1.0`."""
    return container["image"].rsplit("/", 1)[-1].split(":")[0].split("@")[0]


# ---- schemas


def schema_problems(objects: Sequence[Object], *, with_kuberay: bool = True) -> list[str]:
    """What KubeRay's definitions and Kubernetes' own schemas refuse; a field that they do not know is refused, too."""
    import kubernetes_validate

    found = []
    for each in objects:
        where = f"{each['kind']} {each['metadata']['name']}"
        if each["apiVersion"].startswith(WITHOUT_SCHEMA):
            continue
        if each["apiVersion"].startswith("ray.io/"):
            if with_kuberay:
                found += [
                    f"{where}: {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"
                    for error in _kuberay(each["kind"]).iter_errors(each)
                ]
            continue
        try:
            kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{where}: {'.'.join(map(str, error.path))}: {error.message[:300]}")
    return found


@functools.cache
def _kuberay(kind: str) -> Any:
    from jsonschema import Draft202012Validator

    definition = yaml.safe_load(shared("kuberay-crds", f"ray.io_{kind.lower()}s.yaml").read_text())
    versions = {each["name"]: each for each in definition["spec"]["versions"]}
    return Draft202012Validator(_closed(versions["v1"]["schema"]["openAPIV3Schema"], root=True))


def _closed(schema: Any, *, root: bool = False) -> Any:
    """The schema with every object closed to fields that it does not name, as `kubectl --validate=strict` takes it."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if "properties" in schema and isinstance(schema["properties"], dict) and not root:
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
        # `metadata` has no properties of its own in a definition: the API server knows it.
        if not open_ended and schema.get("type") == "object":
            closed["additionalProperties"] = False
    return closed


# ---- services, ports, network policies


def service_problems(objects: Sequence[Object]) -> list[str]:
    """Services without pods, ports that nobody listens on, policies for nobody, addresses without a Service."""
    found = []
    all_pods = list(pods(objects))
    services = {each["metadata"]["name"]: each for each in objects if each["kind"] == "Service"}
    for pod in all_pods:
        for where, container in containers(pod):
            listening = _listens(container)
            for port in container.get("ports", []):
                if port["containerPort"] not in listening:
                    found.append(f"{where}: port {port['containerPort']}, but its command listens on {listening}")
    for name, service in services.items():
        behind = [pod for pod in all_pods if _selects(service["spec"]["selector"], pod.labels)]
        if not behind:
            found.append(f"Service {name}: its selector {service['spec']['selector']} matches no pod")
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            for pod in behind:
                if target not in _ports(pod):
                    found.append(f"Service {name}: port {target} is none of {pod.where}")
    for each in objects:
        if each["kind"] == "NetworkPolicy":
            found += _policy_problems(each, all_pods)
    for where, name, value in _values(objects):
        if match := re.fullmatch(r"https?://([a-z0-9-]+):(\d+)/?", value):
            host, port = match[1], int(match[2])
            if host not in services:
                found.append(f"{where}: {name} is {value}, and there is no Service {host}")
            elif port not in {each["port"] for each in services[host]["spec"]["ports"]}:
                found.append(f"{where}: {name} is {value}, and the Service {host} has no port {port}")
        if name == "PGHOST" and value not in services:
            found.append(f"{where}: {name} is {value}, and there is no Service of that name")
    for where, cluster in ray_clusters(objects):
        if options := cluster.get("gcsFaultToleranceOptions"):
            found += _redis_problems(where, options["redisAddress"], services, objects)
    return found


def _redis_problems(where: str, address: str, services: Mapping[str, Object], objects: Sequence[Object]) -> list[str]:
    """Whether the head finds what lies behind this address, and may speak to it."""
    host, _, port = address.rpartition(":")
    if host not in services or int(port) not in {each["port"] for each in services[host]["spec"]["ports"]}:
        return [f"{where}: redisAddress is {address}, and there is no such Service"]
    (head,) = [pod for pod in pods(objects) if pod.where == f"{where} head"]
    behind = services[host]["spec"]["selector"]
    policies = [each["spec"] for each in objects if each["kind"] == "NetworkPolicy"]
    ends = [("egress", "to", head.labels, behind), ("ingress", "from", behind, head.labels)]
    return [
        f"{where}: no NetworkPolicy lets {direction} between its head and {address} through"
        for direction, peers, mine, others in ends
        if not any(
            _matches(peer["podSelector"], others) and int(port) in {each["port"] for each in rule.get("ports", [])}
            for policy in policies
            if _matches(policy["podSelector"], mine)
            for rule in policy.get(direction, [])
            for peer in rule.get(peers, [])
            if "podSelector" in peer and "namespaceSelector" not in peer
        )
    ]


def _policy_problems(policy: Object, all_pods: Sequence[Pod]) -> list[str]:
    name, spec, found = policy["metadata"]["name"], policy["spec"], []
    behind = [pod for pod in all_pods if _matches(spec["podSelector"], pod.labels)]
    if not behind:
        found.append(f"NetworkPolicy {name}: it matches no pod")
    for rule in spec.get("ingress", []):
        for peer in rule.get("from", []):
            if "namespaceSelector" not in peer and not any(
                _matches(peer["podSelector"], pod.labels) for pod in all_pods
            ):
                found.append(f"NetworkPolicy {name}: {peer} matches no pod")
        listening = set().union(*(_ports(pod) for pod in behind))
        for port in rule.get("ports", []):
            if port["port"] not in listening:
                found.append(f"NetworkPolicy {name}: nobody behind it listens on port {port['port']}")
    for rule in spec.get("egress", []):
        for peer in rule.get("to", []):
            if "podSelector" not in peer or "namespaceSelector" in peer:
                continue
            targets = [pod for pod in all_pods if _matches(peer["podSelector"], pod.labels)]
            if not targets:
                found.append(f"NetworkPolicy {name}: {peer} matches no pod")
            for port in rule.get("ports", []):
                if not any(port["port"] in _ports(pod) for pod in targets):
                    found.append(f"NetworkPolicy {name}: nobody at {peer} listens on port {port['port']}")
    return found


def _selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return selector.items() <= labels.items()


def _matches(selector: Object, labels: Mapping[str, str]) -> bool:
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions), expressions
    return _selects(selector.get("matchLabels", {}), labels) and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


def _ports(pod: Pod) -> set[int | str]:
    all_ports = [port for _, container in containers(pod) for port in container.get("ports", [])]
    return {port["containerPort"] for port in all_ports} | {port["name"] for port in all_ports if "name" in port}


def _listens(container: Object) -> set[int]:
    words = [str(word) for word in [*container.get("command", []), *container.get("args", [])]]
    said = {int(match[1]) for word in words if (match := re.fullmatch(r"(?:--port=|[\d.]*:)(\d+)", word))}
    return said or LISTENS.get(image_name(container), set())


# ---- environment


def environment_problems(objects: Sequence[Object]) -> list[str]:
    """Variables that nothing reads, and ConfigMaps that are not there."""
    found = []
    maps = {each["metadata"]["name"]: each.get("data", {}) for each in objects if each["kind"] == "ConfigMap"}
    in_entrypoints = set()
    for each in objects:
        in_entrypoints |= set(re.findall(r"\$(\w+)", each.get("spec", {}).get("entrypoint", "")))
    for pod in pods(objects):
        for where, container in containers(pod):
            own = {each["name"] for each in container.get("env", [])}
            named = set(re.findall(r"\$\((\w+)\)", str(container)))
            for name in own - named:
                if not is_read(name, image_name(container)):
                    found.append(f"{where}: nothing reads {name}")
            for source in container.get("envFrom", []):
                if (name := source["configMapRef"]["name"]) not in maps:
                    found.append(f"{where}: there is no ConfigMap {name}")
    shared_names = maps.get("paml-site", {}).keys()
    for name in shared_names - in_entrypoints:
        if not (is_read(name, "paml-train") or is_read(name, "paml-tracking")):
            found.append(f"ConfigMap paml-site: nothing reads {name}")
    return found


def is_read(name: str, image: str) -> bool:
    """Whether a program of the image reads the variable."""
    if image in READ_BY_IMAGES:
        return name in READ_BY_IMAGES[image]
    if image == "paml-tracking" and name in READ_BY_LIBPQ:
        return True
    return re.search(rf"\b{re.escape(name)}\b", _sources(image)) is not None


@functools.cache
def _sources(image: str) -> str:
    """Sources in which the variables of an image are read. Whole packages would find any word that there is."""
    installed = {
        "mlflow": ["environment_variables.py", "cli/__init__.py", "utils/cli_args.py"],
        "botocore": ["configprovider.py", "credentials.py"],
    }
    if image == "paml-train":
        installed["ray"] = ["train/v2/_internal/constants.py", "_private/authentication/*.py"]
        installed["ray"] += ["_private/authentication_test_utils.py", "_private/usage/usage_constants.py"]
        installed["ray"] += ["_private/ray_constants.py"]
    files = []
    for package, patterns in installed.items():
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for pattern in patterns:
            files += sorted(Path(spec.origin).parent.glob(pattern))
    if image == "paml-train":
        files += [*sorted((ROOT / "paml").rglob("*.py")), ROOT / "docker" / "make_bucket.py"]
    return "\n".join(file.read_text() for file in files)


def _values(objects: Sequence[Object]) -> Iterator[tuple[str, str, str]]:
    for pod in pods(objects):
        for where, container in containers(pod):
            for each in container.get("env", []):
                yield where, each["name"], str(each.get("value", ""))
    for each in objects:
        if each["kind"] == "ConfigMap":
            for name, value in each.get("data", {}).items():
                yield f"ConfigMap {each['metadata']['name']}", name, value


def secrets(objects: Sequence[Object]) -> set[tuple[str, str]]:
    """(name, key) of every Secret that a container takes a variable from, or a head its Redis' password."""
    taken = [each for pod in pods(objects) for _, container in containers(pod) for each in container.get("env", [])]
    taken += [
        cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword", {}) for _, cluster in ray_clusters(objects)
    ]
    return {
        (reference["name"], reference["key"])
        for each in taken
        if (reference := each.get("valueFrom", {}).get("secretKeyRef"))
    }


# ---- safety


def safety_problems(objects: Sequence[Object]) -> list[str]:
    """Ways in from outside, and containers with more rights or less bounds than they should have."""
    found = []
    for each in objects:
        kind, name = each["kind"], each["metadata"]["name"]
        if kind in ("Ingress", "Gateway", "HTTPRoute", "Route"):
            found.append(f"{kind} {name}: nothing here is published")
        if kind == "Service" and each["spec"].get("type", "ClusterIP") != "ClusterIP":
            found.append(f"Service {name}: its type is {each['spec']['type']}")
    for where, spec in ray_clusters(objects):
        head = spec["headGroupSpec"]
        if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
            found.append(f"{where}: it publishes Ray's dashboard")
        if spec.get("authOptions", {}).get("mode") != "token":
            found.append(f"{where}: Ray asks for no token")
        options = spec.get("gcsFaultToleranceOptions")
        if options and "valueFrom" not in options.get("redisPassword", {}):
            found.append(f"{where}: its Redis asks for no password, or it is written down")
        found += _container_problems(f"{where} autoscaler", spec["autoscalerOptions"], {})
    for pod in pods(objects):
        found += _pod_problems(pod)
    return found


def _pod_problems(pod: Pod) -> list[str]:
    found, spec, rights = [], pod.spec, pod.spec.get("securityContext", {})
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            found.append(f"{pod.where}: {field}")
    if rights.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        found.append(f"{pod.where}: no seccomp profile")
    for volume in spec.get("volumes", []):
        if "hostPath" in volume or ("emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]):
            found.append(f"{pod.where}: volume {volume['name']} is the node's own or has no bound")
    if spec.get("automountServiceAccountToken") is not False and not pod.where.endswith("head"):
        found.append(f"{pod.where}: it gets a key to the API server")
    in_memory = {v["name"]: v["emptyDir"] for v in spec.get("volumes", []) if "emptyDir" in v}
    for where, container in containers(pod):
        found += _container_problems(where, container, rights)
        mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
        memory = in_memory.get(mounts.get("/dev/shm", ""), {})
        if memory.get("medium") != "Memory":
            found.append(f"{where}: /dev/shm is the runtime's 64 MB")
        elif 2 * quantity(memory["sizeLimit"]) > quantity(container["resources"]["limits"].get("memory", 0)):
            found.append(f"{where}: /dev/shm may take more than half of its memory")
        if any(port.get("hostPort") for port in container.get("ports", [])):
            found.append(f"{where}: a port of the node")
    return found


def _container_problems(where: str, container: Object, pod_rights: Object) -> list[str]:
    found, rights = [], pod_rights | container.get("securityContext", {})
    if rights.get("runAsNonRoot") is not True or rights.get("runAsUser", 1000) == 0:
        found.append(f"{where}: it may run as root")
    if rights.get("allowPrivilegeEscalation") is not False or rights.get("privileged"):
        found.append(f"{where}: it may gain rights")
    if rights.get("capabilities", {}).get("drop") != ["ALL"] or rights["capabilities"].get("add"):
        found.append(f"{where}: it keeps capabilities")
    resources = container.get("resources", {})
    for bound in ("requests", "limits"):
        for kind in ("cpu", "memory"):
            if kind not in resources.get(bound, {}):
                found.append(f"{where}: no {bound} of {kind}")
    if container.get("image", "x:1").endswith(":latest") and "paml" not in container["image"]:
        found.append(f"{where}: an image without a version")
    return found


def quantity(text: str | int | float) -> float:
    """Kubernetes' number: 2Gi, 500m, "8"."""
    match = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(text))
    assert match, text
    units = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(match[1]) * units[match[2]]


# ---- what the jobs ask for and what the nodes have


def fit_problems(objects: Sequence[Object]) -> list[str]:
    """Jobs whose driver, workers, caches or object stores are larger than the nodes that they bring, and pods that are
    killed before they have done what they do at their end.
    """
    found = []
    for pod in pods(objects):
        for where, container in containers(pod):
            env = {each["name"]: each.get("value") for each in container.get("env", [])}
            seconds, most = env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0"), pod.spec.get(GRACE, 30)
            if float(seconds) > 0.8 * most:
                found.append(f"{where}: its node takes up to {seconds} s to go, and is killed after {most}")
    for where, spec in ray_clusters(objects):
        groups = spec["workerGroupSpecs"]
        for group in [spec["headGroupSpec"], *groups]:
            store = int(group["rayStartParams"]["object-store-memory"])
            volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
            room = quantity(volumes["shared-memory"]["emptyDir"]["sizeLimit"])
            if store > room:
                found.append(f"{where} {group.get('groupName', 'head')}: object store {store}, /dev/shm {room:.0f}")
        for group in groups:
            if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
                found.append(f"{where} {group['groupName']}: replicas out of their bounds")
    for each in objects:
        if each["kind"] == "RayJob":
            found += _job_problems(f"RayJob {each['metadata']['name']}", each["spec"])
    return found


def _job_problems(where: str, spec: Object) -> list[str]:
    found, entrypoint, groups = [], spec["entrypoint"], spec["rayClusterSpec"]["workerGroupSpecs"]
    driver = float(spec.get("entrypointNumCpus", 0))
    if spec["rayClusterSpec"].get("gcsFaultToleranceOptions") and not driver:
        found.append(f"{where}: its head may come back, but not its driver, which is on the head")
    if spec.get("suspend") is not True:
        found.append(f"{where}: it starts as soon as it is applied")
    have = {"cpu": 0.0, "nvidia.com/gpu": 0.0}
    for group in groups:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for kind in have:
            have[kind] += group["minReplicas"] * quantity(limits.get(kind, 0))
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        cache = quantity(volumes["cache"]["emptyDir"]["sizeLimit"])
        if (said := _number(r"data\.cache_gb[ :]+([\d.]+)", entrypoint)) and said * 1e9 > 0.95 * cache:
            found.append(f"{where}: data.cache_gb {said} does not fit the cache's volume of {cache / 1e9:.0f} GB")
    workers = _number(r"--workers\.num_workers (\d+)", entrypoint)
    if workers:
        cpus = _number(r"--workers\.cpus_per_worker ([\d.]+)", entrypoint) or 1.0
        gpus = _number(r"--workers\.gpus_per_worker ([\d.]+)", entrypoint) or 0.0
        if driver + workers * cpus > have["cpu"] or workers * gpus > have["nvidia.com/gpu"]:
            found.append(
                f"{where}: {workers:.0f} workers of {cpus:g} CPUs and {gpus:g} GPUs, a driver of {driver:g} CPUs, but "
                f"its nodes have {have}"
            )
    if trial := _number(r"--cpus_per_run (\d+)", entrypoint):
        at_once = max(have["nvidia.com/gpu"], 1.0)  # as many trials as there are GPUs
        if driver + at_once * trial > have["cpu"]:
            found.append(
                f"{where}: {at_once:.0f} trials of {trial:.0f} CPUs, and {driver:g} for the driver, but its nodes have "
                f"{have['cpu']:.0f}"
            )
    return found


def _number(pattern: str, text: str) -> float | None:
    match = re.search(pattern, text)
    return float(match[1]) if match else None


def all_problems(objects: Sequence[Object]) -> list[str]:
    """Every finding but those of schemas."""
    checks = (service_problems, environment_problems, safety_problems, fit_problems)
    return [line for check in checks for line in check(copy.deepcopy(list(objects)))]
