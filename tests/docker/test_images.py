"""The images of docker/Dockerfile: built on a base from Debian's packages, then looked into.

`make soak` runs them: the tracking image takes 5 minutes, the CUDA image 30 and 20 GB of disk.
"""

import json
import re
from collections.abc import Iterator

import pytest

from tests.helpers.docker_engine import Engine, docker_engine

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]

IMAGES = {"tracking": "paml-tracking", "train-cuda": "paml-train:train-cuda"}

LOOK = r"""
id -u; id -g
find / -xdev -type f -perm /6000 2>/dev/null | wc -l
for each in ssh rsync wget ps; do command -v $each >/dev/null && echo "has $each" || echo "no $each"; done
test -w /opt/venv && echo "may change its environment" || echo "cannot change its environment"
test -w /opt/paml && echo "may change its program" || echo "cannot change its program"
find / -xdev \( -name '*.pem' -o -name 'id_rsa*' -o -name '.env' -o -name auth_token \) -not -path '*/site-packages/*' \
    -not -path '/etc/ssl/*' -not -path '/usr/share/ca-certificates/*' -not -name cert.pem -not -name cacert.pem \
    2>/dev/null | sed 's/^/secret? /'
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with docker_engine(tmp_path_factory.mktemp("docker")) as found:
        yield found


@pytest.mark.parametrize("target", IMAGES)
def test_an_image_has_what_it_needs_and_no_more(engine: Engine, target: str):
    tag = IMAGES[target]
    seconds = engine.build(target, tag, revision="0123456")
    facts = engine.inspect(tag)
    labels = facts["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == "0.2.0"
    assert labels["org.opencontainers.image.revision"] == "0123456"
    assert facts["Config"]["User"] == "1000:1000"
    assert facts["Config"]["Healthcheck"]["Test"][0] == "CMD"

    seen = engine("run", "--rm", "--network=none", "--entrypoint=bash", tag, "-c", LOOK).splitlines()
    has_ssh = "has" if target.startswith("train") else "no"
    assert seen == [
        "1000", "1000", "0", f"{has_ssh} ssh", f"{has_ssh} rsync", f"{has_ssh} wget", "has ps",
        "cannot change its environment", "cannot change its program",
    ]  # fmt: skip

    imported = {"tracking": "mlflow, psycopg, boto3", "train-cuda": "torch, torchvision, ray, mlflow, paml, pyarrow"}
    code = f"import {imported[target]}; import sys; print(sys.prefix)"
    assert engine("run", "--rm", "--network=none", tag, "python", "-c", code).strip() == "/opt/venv"

    layers = engine("history", "--no-trunc", "--format", "{{json .}}", tag).splitlines()
    print(f"{target}: built in {seconds:.0f} s, {facts['Size'] / 1e9:.2f} GB")
    for layer in map(json.loads, reversed(layers)):
        if layer["Size"] != "0B":
            step = re.sub(r"\s+", " ", layer["CreatedBy"])
            print(f"  {layer['Size']:>8}  {step[:110]}")


def test_the_commands_of_the_image_answer(engine: Engine):
    tag = IMAGES["train-cuda"]
    if not engine.has(tag):
        engine.build("train-cuda", tag)
    assert (
        "usage" in engine("run", "--rm", "--network=none", tag, "python", "jobs/train_openimages.py", "--help").lower()
    )
    assert "usage" in engine("run", "--rm", "--network=none", tag, "python", "-m", "paml", "--help").lower()
