"""Ray's provider of EC2 machines on moto, which checks the calls against the policies of the caller.

Reads {"policies": [...], "node_config": {...}} from stdin. Starts a machine, tags it, lists it, ends it; prints "done".
It runs in a process of its own, since boto3 and Ray remember credentials.
"""

import json
import os
import sys
from typing import Any


def main() -> None:
    import boto3
    from moto import mock_aws
    from moto.core import set_initial_no_auth_action_count

    given = json.load(sys.stdin)
    os.environ.update(AWS_ACCESS_KEY_ID="setup", AWS_SECRET_ACCESS_KEY="setup", AWS_DEFAULT_REGION="us-east-1")
    with mock_aws():
        iam, ec2 = boto3.client("iam"), boto3.client("ec2")
        iam.create_user(UserName="head")
        for number, policy in enumerate(given["policies"]):
            iam.put_user_policy(UserName="head", PolicyName=f"p{number}", PolicyDocument=json.dumps(policy))
        key = iam.create_access_key(UserName="head")["AccessKey"]
        node = given["node_config"] | {
            "ImageId": ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"],
            "SubnetIds": [ec2.describe_subnets()["Subnets"][0]["SubnetId"]],
            "SecurityGroupIds": [ec2.describe_security_groups()["SecurityGroups"][0]["GroupId"]],
        }
        profile = node["IamInstanceProfile"]["Arn"].rsplit("/", 1)[1]
        node["IamInstanceProfile"] = {
            "Arn": iam.create_instance_profile(InstanceProfileName=profile)["InstanceProfile"]["Arn"]
        }
        os.environ.update(AWS_ACCESS_KEY_ID=key["AccessKeyId"], AWS_SECRET_ACCESS_KEY=key["SecretAccessKey"])
        boto3.DEFAULT_SESSION = None
        set_initial_no_auth_action_count(0)(_start_and_end)(node)
    print("done")


def _start_and_end(node: dict[str, Any]) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider({"region": "us-east-1", "cache_stopped_nodes": False}, "paml")
    provider.create_node(node, {"ray-node-type": "worker", "ray-node-name": "one"}, 1)
    (machine,) = provider.non_terminated_nodes({})
    provider.set_node_tags(machine, {"ray-node-status": "up-to-date"})
    while provider.node_tags(machine).get("ray-node-status") != "up-to-date":
        provider.non_terminated_nodes({})
    provider.terminate_nodes([machine])
    AWSNodeProvider.fillout_available_node_types_resources(
        {
            "provider": {"region": "us-east-1"},
            "head_node_type": "none",
            "available_node_types": {"one": {"node_config": node, "resources": {}}},
        }
    )


if __name__ == "__main__":
    main()
