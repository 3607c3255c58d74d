"""A Docker engine of the test's own, and the images of docker/Dockerfile on a base made from Debian's packages.

No registry is needed. PAML_DOCKER names a folder to keep between runs, with the engine's images; without it everything
is removed at the end.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import ROOT, terminate

PROGRAMS = {"dockerd": "docker.io", "mmdebstrap": "mmdebstrap"}
BASE = "python:3.11-slim-bookworm"
SUBSTITUTES = {
    "postgres:17-bookworm": "postgres",
    "redis:7.4-bookworm": "redis",
    "chrislusf/seaweedfs:4.48": "s3",
}

PACKAGES = f"{sysconfig.get_path('purelib')}:/opt/venv/lib/python3.11/site-packages:ro"
"""A volume with the packages of this Python, for an image built without its own."""


class Engine:
    """A Docker engine; calls its client."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Debian's client of the engine's own version builds with BuildKit without a plugin.
        self._client = "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"
        self.environment = os.environ | {"DOCKER_HOST": f"unix://{folder}/d.sock", "DOCKER_BUILDKIT": "1"}

    def run(self, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """docker with these arguments."""
        return subprocess.run(
            [self._client, *arguments], capture_output=True, text=True, env=self.environment, timeout=timeout
        )

    def __call__(self, *arguments: str, timeout: float = 600) -> str:
        """The output of docker. Fails the test with its errors if it fails."""
        done = self.run(*arguments, timeout=timeout)
        assert done.returncode == 0, f"docker {' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def has(self, image: str) -> bool:
        """Whether the image is there."""
        return self.run("image", "inspect", image).returncode == 0

    def inspect(self, name: str) -> dict[str, Any]:
        """The facts of an image or container."""
        return json.loads(self("inspect", name))[0]

    def build_base(self) -> None:
        """The base image of docker/Dockerfile, from Debian's packages."""
        if self.has(BASE):
            return
        context = self.folder / "base"
        context.mkdir(exist_ok=True)
        packages = "python3,python3-venv,python3-pip,python-is-python3,ca-certificates,bash"
        tar = context / "rootfs.tar"
        command = ["mmdebstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(tar)]
        subprocess.run(command, check=True, capture_output=True, timeout=1200)
        self("import", str(tar), "paml-test/rootfs:1")
        tar.unlink()
        # Registries behind a proxy of this machine are trusted as they are outside.
        shutil.copyfile("/etc/ssl/certs/ca-certificates.crt", context / "ca-certificates.crt")
        (context / "Dockerfile").write_text(
            "FROM paml-test/rootfs:1\n"
            "COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt\n"
            "ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt\n"
        )
        self("build", "--tag", BASE, str(context))

    def build(self, target: str, tag: str, revision: str = "test", *, packages: bool = True) -> float:
        """A target of docker/Dockerfile from this checkout; returns the seconds that it took.

        packages: False leaves out what pip installs; the container needs PACKAGES.
        """
        self.build_base()
        # The first line names a frontend in a registry; the engine's own reads the rest.
        text = (ROOT / "docker" / "Dockerfile").read_text().split("\n", 1)[1]
        if not packages:
            text = re.sub(r"^RUN --mount=type=cache(.*\\\n)+.*\n", "", text, flags=re.M)
        dockerfile = self.folder / "Dockerfile"
        dockerfile.write_text(text)
        start = time.monotonic()
        self(
            "build", "--network=host", f"--file={dockerfile}", f"--target={target}", f"--tag={tag}",
            f"--build-arg=REVISION={revision}", str(ROOT), timeout=5400,
        )  # fmt: skip
        return time.monotonic() - start

    def build_substitutes(self) -> None:
        """PostgreSQL and Redis from Debian, and moto for the S3 store, under the names in compose.yaml."""
        self.build_base()
        folder = ROOT / "tests" / "docker" / "substitutes"
        for tag, name in SUBSTITUTES.items():
            if not self.has(tag):
                file = f"--file={folder / name}.Dockerfile"
                self("build", "--network=host", file, f"--tag={tag}", str(folder), timeout=1200)

    def compose(self) -> list[str]:
        """The command of compose 2. Skips the test if it is not installed."""
        for place in (self.folder / "docker-compose", *_plugins()):
            if place.exists():
                return [str(place)]
        pytest.skip("needs compose 2 (Debian 13: docker-compose)")


def _plugins() -> Iterator[Path]:
    for folder in ("/usr/libexec", "/usr/lib", "/usr/local/lib"):
        yield Path(folder) / "docker" / "cli-plugins" / "docker-compose"


@contextlib.contextmanager
def docker_engine(folder: Path) -> Iterator[Engine]:
    """Starts dockerd on its own folders. Skips the test if a program or the right to start it is missing."""
    for program, package in PROGRAMS.items():
        if not shutil.which(program):
            pytest.skip(f"needs {program} (Debian: {package})")
    if os.geteuid() != 0:
        pytest.skip("needs root, to start dockerd")
    kept = os.environ.get("PAML_DOCKER")
    folder = Path(kept) if kept else folder
    folder.mkdir(exist_ok=True)
    engine = Engine(folder)
    with (folder / "dockerd.log").open("wb") as log:
        daemon = subprocess.Popen(
            [
                "dockerd", f"--host=unix://{folder}/d.sock", f"--data-root={folder}/data", f"--exec-root={folder}/exec",
                f"--pidfile={folder}/pid", "--bridge=none", "--iptables=false", "--storage-driver=overlay2",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while engine.run("version").returncode != 0:
            if daemon.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"dockerd does not start here: {(folder / 'dockerd.log').read_text()[-500:]}")
            time.sleep(0.5)
        yield engine
    finally:
        terminate(daemon, 60)
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
