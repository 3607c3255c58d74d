"""docker/: checks without a container engine. Each check of the compose file is tested with a planted mistake."""

import importlib.util
import json
import re
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tests.helpers.jobs import ROOT
from tests.helpers.manifests import LISTENS, is_read

DOCKER = ROOT / "docker"
FINAL = {"train-cuda": "paml-train", "train-cpu": "paml-train", "tracking": "paml-tracking"}


def script(name: str) -> Any:
    """A script of docker/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCKER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage, including those of its base stages, as (word, rest)."""
    text = "\n".join(line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = list(found.get(base, []))
        elif word and name:
            found[name].append((word, re.sub(r"\s+", " ", rest)))
    return found


@pytest.mark.parametrize("stage", FINAL)
def test_an_image_runs_as_an_ordinary_user_and_has_a_health_check(stage: str):
    steps = stages()[stage]
    words = [word for word, _ in steps]
    assert [rest for word, rest in steps if word == "USER"] == ["1000:1000"]
    assert not {"RUN", "COPY", "ADD"} & set(words[words.index("USER") :]), "no file may belong to the user of the image"
    labels = next(rest for word, rest in steps if word == "LABEL")
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in labels
    check = json.loads(next(rest for word, rest in steps if word == "HEALTHCHECK").split("CMD ", 1)[1])
    assert check[1] == "/opt/paml/docker/healthcheck.py"
    assert "--chown" not in str(steps)


def test_the_tracking_image_uses_the_port_of_the_manifests_and_requires_a_login():
    steps = stages()["tracking"]
    command = json.loads(next(rest for word, rest in steps if word == "CMD"))
    options = dict(zip(command[2::2], command[3::2], strict=True))
    assert {int(options["--port"])} == LISTENS["paml-tracking"]
    assert options["--app-name"] == "basic-auth"
    assert ("EXPOSE", options["--port"]) in steps


def test_a_training_image_does_not_expose_its_dashboard():
    for stage in ("train-cuda", "train-cpu"):
        command = json.loads(next(rest for word, rest in stages()[stage] if word == "CMD"))
        assert "--dashboard-host=127.0.0.1" in command


def test_copied_files_exist_and_are_sent_to_the_builder():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for steps in stages().values():
        for word, rest in steps:
            if word == "COPY":
                for path in rest.split()[:-1]:
                    assert (ROOT / path).exists(), path
                    assert any(fnmatch(path, each) for each in allowed), f"{path} is not in .dockerignore"


def locked(*names: str) -> dict[str, str]:
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines() if "==" in line]
    pairs = [line.split(";")[0].strip().split("==") for line in lines]
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_every_package_of_an_image_has_a_locked_version():
    names = script("dependencies").dependencies(str(ROOT / "pyproject.toml"))
    assert names
    for requirement in names:
        assert re.split(r"[\[<>=~ ]", requirement)[0].lower() in locked("requirements.lock")
    more = locked("docker/requirements-tracking.lock")
    assert not more.keys() & locked("requirements.lock").keys(), "one lock file per package"
    wanted = [line for line in (DOCKER / "requirements-tracking.in").read_text().splitlines() if line[0] != "#"]
    everything = locked("requirements.lock", "docker/requirements-tracking.lock")
    for requirement in wanted:
        assert requirement.split("[")[0] in everything


def test_dependencies_of_packages_are_locked_too():
    """As pip resolves them, by the metadata of the installed packages: an open version makes builds differ."""
    todo = [Requirement(line) for line in script("dependencies").dependencies(str(ROOT / "pyproject.toml"))]
    seen: set[tuple[str, str]] = set()
    lock, absent = locked("requirements.lock"), set()
    while todo:
        requirement = todo.pop()
        name = requirement.name.lower().replace("_", "-").replace(".", "-")
        if name not in lock:
            absent.add(name)
        for extra in ["", *requirement.extras]:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                needs = [Requirement(line) for line in metadata.requires(requirement.name) or []]
            except metadata.PackageNotFoundError:
                continue  # of an extra that is not installed here; its version is checked above
            todo += [each for each in needs if each.marker is None or each.marker.evaluate({"extra": extra})]
    assert absent == set()
    assert len(seen) > 80, "the walk reached the depths"


def test_only_extras_that_exist_are_used(tmp_path: Path):
    file = tmp_path / "pyproject.toml"
    file.write_text('[project]\ndependencies = ["a"]\n[project.optional-dependencies]\nx = ["b"]\ny = ["c"]\n')
    assert script("dependencies").dependencies(str(file), ["x", "z"]) == ["a", "b"]


def test_the_cpu_image_installs_the_locked_torch_from_its_own_index():
    (step,) = [rest for word, rest in stages()["torch-cpu"] if word == "RUN" and "torch" in rest]
    pattern = re.search(r"grep --extended-regexp '(.+?)' requirements.lock", step)
    assert pattern
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    chosen = [line.split("==")[0] for line in lines if re.search(pattern[1], line)]
    assert chosen == ["torch", "torchvision"]
    assert '--index-url "$TORCH_INDEX"' in step


# ---- compose


def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def variables() -> set[str]:
    """Variables that the environment file sets."""
    return set(re.findall(r"^([A-Z0-9_]+)=", (DOCKER / ".env.example").read_text(), re.M))


def compose_problems(file: dict[str, Any]) -> list[str]:
    """Open ports, services without health checks, unknown addresses, variables that are unused or unset."""
    found, services = [], file["services"]
    used = set(re.findall(r"\$\{(\w+)", str(services)))
    found += [f"{name} is not in .env.example" for name in sorted(used - variables())]
    found += [f"{name} of .env.example is used by nothing" for name in sorted(variables() - used)]
    for name, service in services.items():
        image = re.sub(r"[:@].*", "", service["image"]).rsplit("/", 1)[-1]
        for port in service.get("ports", []):
            address, _, inside = port.rpartition(":")
            if not address.startswith("127.0.0.1:"):
                found.append(f"{name}: port {port} is open to the network")
            if int(inside) not in LISTENS[image]:
                found.append(f"{name}: nobody listens on port {inside}")
        for variable, value in service.get("environment", {}).items():
            if variable != "PAML_BUCKET" and not is_read(variable, image):
                found.append(f"{name}: nothing reads {variable}")
            if match := re.fullmatch(r"http://([\w-]+):(\d+)", str(value)):
                found += _address_problems(f"{name}: {variable}", match[1], int(match[2]), services)
            if re.search("PASSWORD|SECRET|TOKEN$|ACCESS_KEY|_AUTH$", variable) and not str(value).startswith("${"):
                found.append(f"{name}: {variable} is in the file")
        watched = "healthcheck" in service or image in ("paml-train", "paml-tracking")
        if not watched or (name != "bucket" and service.get("healthcheck", {}).get("disable")):
            found.append(f"{name}: nobody sees whether it is well")
        if "mem_limit" not in service:
            found.append(f"{name}: it may take all memory")
        found += _object_store_problems(name, service)
        if "no-new-privileges:true" not in service.get("security_opt", []):
            found.append(f"{name}: it may gain rights")
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if not source.startswith(".") and source not in file["volumes"]:
                found.append(f"{name}: there is no volume {source}")
        for other, how in service.get("depends_on", {}).items():
            if other not in services or how["condition"] == "service_started":
                found.append(f"{name}: it does not wait for {other}")
    return found


def _address_problems(where: str, host: str, port: int, services: dict[str, Any]) -> list[str]:
    if host not in services:
        return [f"{where}: there is no service {host}"]
    image = re.sub(r"[:@].*", "", services[host]["image"]).rsplit("/", 1)[-1]
    return [] if port in LISTENS[image] else [f"{where}: {host} does not listen on {port}"]


def _object_store_problems(name: str, service: dict[str, Any]) -> list[str]:
    """Ray puts an object store on the disk that is larger than /dev/shm; its default is 30 % of the memory."""
    command = " ".join(service["command"]) if isinstance(service.get("command"), list) else service.get("command", "")
    if "ray start" not in command:
        return []
    store = re.search(r"--object-store-memory=(\d+)", command)
    if not store:
        return [f"{name}: the size of its object store depends on the machine"]
    # NCCL and gloo need a part of /dev/shm as well.
    size = int(service["shm_size"].removesuffix("gb")) * 2**30
    return [] if int(store[1]) <= size / 2 else [f"{name}: its object store does not fit /dev/shm"]


def test_the_compose_file_has_no_problems():
    assert compose_problems(compose()) == []


def test_the_compose_file_has_everything_a_training_needs():
    services = compose()["services"]
    assert set(services) == {"postgres", "redis", "s3", "bucket", "mlflow", "ray-head", "ray-worker"}
    assert services["ray-worker"]["deploy"]["replicas"] == 2
    for name in ("ray-head", "ray-worker"):
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
    head, worker = services["ray-head"]["command"][-1], services["ray-worker"]["command"]
    gcs = re.search(r"--port=(\d+)", head)
    assert gcs
    assert f"--address=ray-head:{gcs[1]}" in worker


def _change(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(file: dict[str, Any]) -> None:
        place = file["services"]
        for each in path[:-1]:
            place = place[each]
        place[path[-1]] = value
        if value is None:
            del place[path[-1]]

    return change


@pytest.mark.parametrize(
    ("plant", "finding"),
    [
        (_change("ray-head", "ports", value=["8265:8265"]), "open to the network"),
        (_change("ray-head", "ports", value=["127.0.0.1:8266:8266"]), "nobody listens on port 8266"),
        (_change("mlflow", "environment", "MLFLOW_AUTH_PASSWORT", value="${RAY_TOKEN}"), "nothing reads MLFLOW_AUTH"),
        (_change("s3", "environment", "AWS_SECRET_ACCESS_KEY", value="hunter2"), "is in the file"),
        (_change("mlflow", "environment", "MLFLOW_S3_ENDPOINT_URL", value="http://minio:9000"), "no service minio"),
        (_change("mlflow", "environment", "PGPASSWORD", value="${PG_PASSWORD:-}"), "PG_PASSWORD is not in"),
        (_change("s3", "healthcheck", value={"disable": True}), "well"),
        (_change("mlflow", "mem_limit", value=None), "all memory"),
        (_change("ray-head", "shm_size", value="1gb"), "does not fit /dev/shm"),
        (_change("ray-worker", "command", value="ray start --address=ray-head:6379"), "depends on the machine"),
        (_change("ray-worker", "volumes", value=["shards:/cache"]), "no volume shards"),
        (_change("ray-worker", "depends_on", value={"head": {"condition": "service_healthy"}}), "does not wait"),
    ],
)
def test_the_compose_check_reports(plant: Callable[[dict[str, Any]], None], finding: str):
    file = compose()
    plant(file)
    assert any(finding in line for line in compose_problems(file))


def test_postgres_is_ready_only_when_it_listens_on_tcp():
    """The server of the first start's scripts listens on a socket only, and ends."""
    assert "--host=127.0.0.1" in compose()["services"]["postgres"]["healthcheck"]["test"]


def test_the_example_environment_builds_and_starts():
    """Every variable has a value or a default, and the build does not require an index of CPU wheels."""
    text = (DOCKER / ".env.example").read_text()
    values = dict(re.findall(r"^([A-Z0-9_]+)=(.*)$", text, re.M))
    required = set(re.findall(r"\$\{(\w+):\?", (DOCKER / "compose.yaml").read_text()))
    assert required
    assert all(values[name] for name in required)
    assert len(values["MLFLOW_ADMIN_PASSWORD"]) >= 12
    assert len(values["S3_SECRET_KEY"]) >= 8
    (step,) = [rest for word, rest in stages()["torch-cpu"] if word == "RUN" and "torch" in rest]
    assert not values["TORCH_INDEX"]
    assert ":?" not in step
    assert "else pip install --constraint requirements.lock --requirement /tmp/torch.txt" in step


def test_only_training_images_have_ssh():
    """Ray's launcher starts workers of EC2 by ssh from the head's container; setgid of ssh-agent is removed."""
    for stage in FINAL:
        runs = [rest for word, rest in stages()[stage] if word == "RUN"]
        installs = " ".join(rest for rest in runs if "apt-get install" in rest)
        assert ("openssh-client" in installs) == stage.startswith("train")
        assert "procps" in installs
        assert all("chmod a-s" in rest for rest in runs if "apt-get install" in rest)


def test_no_secret_is_under_git():
    assert "/docker/.env" in (ROOT / ".gitignore").read_text().splitlines()
    assert all(
        "change-me" in line
        for line in (DOCKER / ".env.example").read_text().splitlines()
        if re.match(r"\w*(PASSWORD|SECRET_KEY|TOKEN|ACCESS_KEY)=", line)
    )


# ---- the scripts


@pytest.fixture
def server() -> Iterator[str]:
    """Responds 200 with `success` at /well, 200 with `failure` at /ill, else 503."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503 if self.path == "/gone" else 200)
            self.end_headers()
            self.wfile.write({"/well": b"success", "/ill": b"failure: no raylet"}.get(self.path, b""))

        def log_message(self, *args: object) -> None: ...

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()
    thread.join()


def test_the_health_check_reports_the_state(server: str):
    is_healthy = script("healthcheck").is_healthy
    assert is_healthy(f"{server}/well")
    assert not is_healthy(f"{server}/ill")
    assert not is_healthy(f"{server}/gone")
    assert not is_healthy("http://127.0.0.1:9/")


def test_the_bucket_is_created_once(s3: str):
    make_bucket = script("make_bucket").make_bucket
    assert make_bucket("a-new-bucket") == "created s3://a-new-bucket"
    assert make_bucket("a-new-bucket") == "s3://a-new-bucket exists"
