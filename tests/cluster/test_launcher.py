"""cluster/launcher: Ray's validation of the file, and checks that Ray does not make."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from tests.helpers.jobs import ROOT
from tests.helpers.manifests import CLUSTER, is_read


def launcher() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "launcher" / "aws.yaml").read_text())


def test_ray_accepts_the_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(launcher())
    validate_config(config)
    assert set(config["available_node_types"]) == {"head", "cpu-spot", "gpu", "gpu-spot"}


def test_the_dashboard_is_bound_to_the_head_only():
    (start,) = [line for line in launcher()["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--env RAY_AUTH_MODE=token" in launcher()["docker"]["run_options"]


def test_machines_have_a_security_group_and_a_role():
    config = launcher()
    assert "security_group" not in config["provider"], "Ray adds SSH from everywhere to the group that it makes"
    for name, kind in config["available_node_types"].items():
        machine = kind["node_config"]
        assert machine["SecurityGroupIds"], name
        assert machine["IamInstanceProfile"], name
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        assert ("spot" in name) == (machine.get("InstanceMarketOptions") == {"MarketType": "spot"})
    assert not re.search("AWS_(ACCESS|SECRET)", str(config))


def test_every_variable_is_used():
    for name in re.findall(r"--env (\w+)=", str(launcher())):
        assert name == "PAML_BUCKET" or is_read(name, "paml-train"), name


def test_no_node_type_exceeds_the_total():
    config = launcher()
    assert config["max_workers"] == sum(kind.get("max_workers", 0) for kind in config["available_node_types"].values())


def policy(name: str) -> dict[str, Any]:
    return json.loads((CLUSTER / "launcher" / f"{name}.json").read_text())


def actions(document: dict[str, Any]) -> set[str]:
    listed = [statement["Action"] for statement in document["Statement"]]
    return {action for each in listed for action in ([each] if isinstance(each, str) else each)}


def test_the_login_to_the_registry_precedes_the_pull():
    config = launcher()
    registry, region = config["docker"]["image"].split("/")[0], config["provider"]["region"]
    (login,) = [line for line in config["initialization_commands"] if "docker login" in line]
    assert f"ecr get-login-password --region {region}" in login
    assert login.endswith(registry)
    assert actions(policy("worker-policy")) >= {
        "ecr:GetAuthorizationToken", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer",
    }  # fmt: skip


def test_workers_cannot_start_machines():
    config = launcher()
    for name, kind in config["available_node_types"].items():
        profile = kind["node_config"]["IamInstanceProfile"]["Arn"].rsplit("/", 1)[1]
        assert profile == ("paml-head" if name == "head" else "paml-worker")
    assert not {each for each in actions(policy("worker-policy")) if each.startswith(("ec2:", "iam:"))}
    (passed,) = [each for each in policy("head-policy")["Statement"] if each["Action"] == "iam:PassRole"]
    assert passed["Resource"].endswith(":role/paml-worker")


def autoscale(*policies: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    node = launcher()["available_node_types"]["cpu-spot"]["node_config"]
    return subprocess.run(
        [sys.executable, "-m", "tests.helpers.aws_autoscaler"],
        input=json.dumps({"policies": policies, "node_config": node}),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )


def test_the_policy_of_the_head_covers_every_call_of_the_autoscaler():
    """Ray's own provider on moto, which refuses calls that the policies do not allow."""
    done = autoscale(policy("head-policy"), policy("worker-policy"))
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("action", ["ec2:RunInstances", "ec2:TerminateInstances", "ec2:CreateTags"])
def test_an_incomplete_policy_is_noticed(action: str):
    lacking = json.loads(json.dumps(policy("head-policy")).replace(action, "ec2:DescribeTags"))
    done = autoscale(lacking, policy("worker-policy"))
    assert done.returncode != 0
    assert re.search(r"UnauthorizedOperation|not authorized|AccessDenied", done.stderr + done.stdout)
