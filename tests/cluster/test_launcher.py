"""cluster/launcher: Ray's own check of the file, and what Ray does not check."""

import re
from typing import Any

import yaml

from tests.helpers.manifests import CLUSTER, is_read


def launcher() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "launcher" / "aws.yaml").read_text())


def test_ray_takes_the_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(launcher())
    validate_config(config)
    assert set(config["available_node_types"]) == {"head", "cpu-spot", "gpu", "gpu-spot"}


def test_the_head_shows_its_dashboard_to_its_own_machine_alone():
    (start,) = [line for line in launcher()["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--env RAY_AUTH_MODE=token" in launcher()["docker"]["run_options"]


def test_machines_are_in_a_group_of_ones_own_and_have_a_role():
    config = launcher()
    assert "security_group" not in config["provider"], "Ray adds SSH from everywhere to the group that it makes"
    for name, kind in config["available_node_types"].items():
        machine = kind["node_config"]
        assert machine["SecurityGroupIds"], name
        assert machine["IamInstanceProfile"], name
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        assert ("spot" in name) == (machine.get("InstanceMarketOptions") == {"MarketType": "spot"})
    assert not re.search("AWS_(ACCESS|SECRET)", str(config))


def test_every_variable_is_read():
    for name in re.findall(r"--env (\w+)=", str(launcher())):
        assert name == "PAML_BUCKET" or is_read(name, "paml-train"), name


def test_no_type_may_have_more_machines_than_all():
    config = launcher()
    assert config["max_workers"] == sum(kind.get("max_workers", 0) for kind in config["available_node_types"].values())
