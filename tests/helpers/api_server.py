"""A Kubernetes API server with etcd, without nodes and controllers: objects are stored, nothing starts.

The server is of version 1.20. It has no CEL rules, no PodSecurity admission and no `kubectl --validate=strict`.
tests/helpers/manifests.py checks fields by schema and PodSecurity by rules of its own; CEL rules are not checked.
"""

import contextlib
import functools
import json
import lzma
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from ssl import CERT_NONE, create_default_context
from typing import Any

import pytest
import yaml

from paml.distributed.local_head import free_ports
from tests.helpers.jobs import terminate
from tests.helpers.manifests import kubectl
from tests.helpers.shared import shared

Object = dict[str, Any]

CREDENTIAL = "only-for-this-server"


class ApiServer:
    """Runs kubectl as an administrator of the server at a port of 127.0.0.1."""

    def __init__(self, port: int, home: Path) -> None:
        self.url = f"https://127.0.0.1:{port}"
        self._home = home
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url, "insecure-skip-tls-verify": True}}],
            "users": [{"name": "admin", "user": {"token": CREDENTIAL}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        }
        (home / "config").write_text(yaml.safe_dump(config))

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a shell whose `kubectl` calls this server."""
        path = f"{Path(kubectl()).parent}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"KUBECONFIG": str(self._home / "config"), "HOME": str(self._home), "PATH": path}

    def run(self, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """kubectl with these arguments, and with `text` as its input."""
        return subprocess.run(
            [kubectl(), *arguments], input=text, capture_output=True, text=True, env=self.environment, timeout=120
        )

    def __call__(self, *arguments: str, text: str | None = None) -> str:
        """The output of kubectl. Fails the test with its errors if it fails."""
        done = self.run(*arguments, text=text)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}\n{done.stderr}"
        return done.stdout

    def get(self, *arguments: str) -> Any:
        """The stored object or list."""
        return json.loads(self("get", *arguments, "-o", "json"))


@contextlib.contextmanager
def api_server(folder: Path) -> Iterator[ApiServer]:
    """A server with the definitions of KubeRay and Kueue. Skips the test if a program is not installed."""
    etcd = shutil.which("etcd") or pytest.skip("needs etcd (Debian: etcd-server)")
    packed = shared("kube-apiserver.xz", within="tools")
    kubectl()
    program = folder / "kube-apiserver"
    with lzma.open(packed) as source, program.open("wb") as target:
        shutil.copyfileobj(source, target)
    program.chmod(0o755)
    client, peer, port = free_ports(3)
    store = f"http://127.0.0.1:{client}"
    _write_keys(folder)
    commands = [
        [
            etcd, f"--data-dir={folder / 'etcd'}", f"--listen-client-urls={store}", f"--advertise-client-urls={store}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}", f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=default=http://127.0.0.1:{peer}",
        ],
        [
            str(program), f"--etcd-servers={store}", f"--secure-port={port}", "--bind-address=127.0.0.1",
            f"--cert-dir={folder / 'certificates'}", f"--token-auth-file={folder / 'tokens.csv'}",
            "--authorization-mode=RBAC", f"--service-account-key-file={folder / 'sa.pub'}",
            f"--service-account-signing-key-file={folder / 'sa.key'}", "--service-account-issuer=https://local",
            "--service-cluster-ip-range=10.96.0.0/24", "--allow-privileged=true",
        ],
    ]  # fmt: skip
    processes = []
    try:
        for command in commands:
            with (folder / f"{Path(command[0]).name}.log").open("wb") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=folder))
        server = ApiServer(port, folder)
        _wait_until_healthy(server, processes, folder)
        definitions = [_for_1_20(shared("kuberay-crds", f"ray.io_{name}.yaml")) for name in ("rayclusters", "rayjobs")]
        listed = {"apiVersion": "v1", "kind": "List", "items": [*definitions, *_kueue_definitions()]}
        server("create", "-f", "-", text=json.dumps(listed))
        _wait_for_kinds(server, "rayclusters,rayjobs,resourceflavors,clusterqueues,localqueues")
        yield server
    finally:
        for process in reversed(processes):
            terminate(process)


def _write_keys(folder: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "sa.key").write_bytes(private)
    (folder / "sa.pub").write_bytes(public)
    (folder / "tokens.csv").write_text(f'{CREDENTIAL},admin,admin,"system:masters"\n')


def _wait_until_healthy(server: ApiServer, processes: Sequence[subprocess.Popen], folder: Path) -> None:
    context = create_default_context()
    context.check_hostname, context.verify_mode = False, CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    request = urllib.request.Request(f"{server.url}/readyz", headers={"Authorization": f"Bearer {CREDENTIAL}"})
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError), opener.open(request, timeout=5) as response:
            if response.status == 200:
                return
        logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log")))
        assert all(process.poll() is None for process in processes), logs
        assert time.monotonic() < deadline, logs
        time.sleep(0.3)


def _wait_for_kinds(server: ApiServer, kinds: str) -> None:
    """A definition is served a moment after it is stored."""
    deadline = time.monotonic() + 120
    while (done := server.run("get", kinds, "--all-namespaces")).returncode != 0:
        assert time.monotonic() < deadline, done.stderr
        time.sleep(1)


@functools.cache
def _for_1_20(path: Path) -> Object:
    """A definition without what 1.20 refuses: CEL rules, empty defaults, optional keys of list maps."""
    return _trim(yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def _trim(node: Any) -> Any:
    if isinstance(node, list):
        return [_trim(each) for each in node]
    if not isinstance(node, dict):
        return node
    trimmed = {
        name: _trim(value)
        for name, value in node.items()
        if name != "x-kubernetes-validations" and not (name == "default" and value == "")
    }
    keys = trimmed.get("x-kubernetes-list-map-keys")
    if isinstance(keys, list) and isinstance(items := trimmed.get("items"), dict):
        properties = items.get("properties", {})
        needed = [key for key in keys if "default" not in properties.get(key, {})]
        items["required"] = sorted({*items.get("required", []), *needed})
    return trimmed


def _kueue_definitions() -> Iterator[Object]:
    """Kueue's kinds with any content: its definitions are not available. Their content is checked by schema."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    for kind, scope in (("ResourceFlavor", "Cluster"), ("ClusterQueue", "Cluster"), ("LocalQueue", "Namespaced")):
        plural = f"{kind.lower()}s"
        yield {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {
                "name": f"{plural}.kueue.x-k8s.io",
                "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/kueue"},
            },
            "spec": {
                "group": "kueue.x-k8s.io",
                "scope": scope,
                "names": {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"},
                "versions": [
                    {"name": "v1beta2", "served": True, "storage": True, "schema": {"openAPIV3Schema": anything}}
                ],
            },
        }
