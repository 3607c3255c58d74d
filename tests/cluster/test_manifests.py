"""The overlays of cluster/: real schemas, services and ports that meet, variables that are read, no way in."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable

import pytest
import yaml

from tests.helpers.jobs import ROOT, environment
from tests.helpers.manifests import (
    CLUSTER,
    OVERLAYS,
    Object,
    all_problems,
    environment_problems,
    fit_problems,
    image_name,
    pods,
    quantity,
    render,
    safety_problems,
    schema_problems,
    secrets,
    service_problems,
)


def one(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_takes_every_object(overlay: str):
    objects = [each for each in render(overlay) if not each["apiVersion"].startswith("ray.io/")]
    assert schema_problems(objects, with_kuberay=False) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kuberay_takes_every_cluster_and_job(overlay: str):
    objects = [each for each in render(overlay) if each["apiVersion"].startswith("ray.io/")]
    assert sorted(each["metadata"]["name"] for each in objects) == ["paml", "prepare", "train", "tune"]
    assert schema_problems(objects) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_meets(overlay: str):
    assert all_problems(render(overlay)) == []


def a_wrong_field(objects: list[Object]) -> None:
    one(objects, "RayCluster", "paml")["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3


def a_wrong_field_of_a_pod(objects: list[Object]) -> None:
    one(objects, "RayJob", "train")["spec"]["submitterPodTemplate"]["spec"]["restartpolicy"] = "Never"


def a_wrong_type(objects: list[Object]) -> None:
    one(objects, "RayJob", "train")["spec"]["backoffLimit"] = "none"


def a_wrong_field_of_kubernetes(objects: list[Object]) -> None:
    one(objects, "Deployment", "mlflow")["spec"]["replica"] = 2


@pytest.mark.parametrize("plant", [a_wrong_field, a_wrong_field_of_a_pod, a_wrong_type, a_wrong_field_of_kubernetes])
def test_schemas_find(plant: Callable[[list[Object]], None]):
    objects = render("aws")
    plant(objects)
    assert len(schema_problems(objects)) == 1


def a_service_of_nobody(objects: list[Object]) -> None:
    one(objects, "Service", "mlflow")["spec"]["selector"] = {"app.kubernetes.io/component": "ml-flow"}


def a_port_of_nobody(objects: list[Object]) -> None:
    one(objects, "Service", "mlflow")["spec"]["ports"][0]["targetPort"] = 5001


def a_container_port_of_nobody(objects: list[Object]) -> None:
    pod = one(objects, "Deployment", "mlflow")["spec"]["template"]["spec"]
    pod["containers"][0]["ports"][0]["containerPort"] = 8080


def a_policy_of_nobody(objects: list[Object]) -> None:
    one(objects, "NetworkPolicy", "mlflow")["spec"]["podSelector"]["matchLabels"] = {"app": "mlflow"}


def a_policy_for_another_port(objects: list[Object]) -> None:
    one(objects, "NetworkPolicy", "postgres")["spec"]["ingress"][0]["ports"][0]["port"] = 5433


def a_redis_of_nobody(objects: list[Object]) -> None:
    one(objects, "RayJob", "train")["spec"]["rayClusterSpec"]["gcsFaultToleranceOptions"]["redisAddress"] = "gcs:6379"


def no_way_to_redis(objects: list[Object]) -> None:
    rules = one(objects, "NetworkPolicy", "ray")["spec"]["egress"]
    rules.remove(next(each for each in rules if each.get("ports") == [{"protocol": "TCP", "port": 6379}]))


def a_redis_that_listens_to_workers_alone(objects: list[Object]) -> None:
    (rule,) = one(objects, "NetworkPolicy", "redis")["spec"]["ingress"]
    rule["from"][0]["podSelector"]["matchExpressions"][0]["values"] = ["worker"]


def an_address_of_nobody(objects: list[Object]) -> None:
    head = one(objects, "RayCluster", "paml")["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    head["env"][0]["value"] = "http://tracking:5000"


@pytest.mark.parametrize(
    "plant",
    [
        a_service_of_nobody,
        a_port_of_nobody,
        a_container_port_of_nobody,
        a_policy_of_nobody,
        a_policy_for_another_port,
        a_redis_of_nobody,
        no_way_to_redis,
        a_redis_that_listens_to_workers_alone,
        an_address_of_nobody,
    ],
)
def test_the_cross_check_of_services_finds(plant: Callable[[list[Object]], None]):
    objects = render("aws")
    plant(objects)
    assert service_problems(objects)


@pytest.mark.parametrize("name", ["PAML_HOUSE", "MLFLOW_TRACKING_URL", "RAY_TRAIN_START_TIMEOUT", "AWS_REGIONS"])
def test_a_variable_that_nothing_reads_is_found(name: str):
    objects = render("aws")
    job = one(objects, "RayJob", "train")["spec"]["rayClusterSpec"]
    job["headGroupSpec"]["template"]["spec"]["containers"][0]["env"].append({"name": name, "value": "x"})
    assert environment_problems(objects) == [
        f"RayJob train head, container ray-head: nothing reads {name}",
    ]
    objects = render("aws")
    one(objects, "ConfigMap", "paml-site")["data"][name] = "x"
    assert environment_problems(objects) == [f"ConfigMap paml-site: nothing reads {name}"]


def published_dashboard(objects: list[Object]) -> None:
    one(objects, "RayJob", "tune")["spec"]["rayClusterSpec"]["headGroupSpec"]["serviceType"] = "NodePort"


def published_service(objects: list[Object]) -> None:
    one(objects, "Service", "mlflow")["spec"]["type"] = "LoadBalancer"


def published_by_ingress(objects: list[Object]) -> None:
    objects.append({"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": {"name": "ray"}, "spec": {}})


def no_token(objects: list[Object]) -> None:
    del one(objects, "RayCluster", "paml")["spec"]["authOptions"]


def a_redis_password_in_the_open(objects: list[Object]) -> None:
    one(objects, "RayCluster", "paml")["spec"]["gcsFaultToleranceOptions"]["redisPassword"] = {"value": "secret"}


def a_redis_without_password(objects: list[Object]) -> None:
    del one(objects, "RayJob", "tune")["spec"]["rayClusterSpec"]["gcsFaultToleranceOptions"]["redisPassword"]


def a_root(objects: list[Object]) -> None:
    one(objects, "StatefulSet", "postgres")["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"] = False


def _train_worker(objects: list[Object]) -> Object:
    groups = one(objects, "RayJob", "train")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return groups[0]["template"]["spec"]


def more_rights(objects: list[Object]) -> None:
    del _train_worker(objects)["containers"][0]["securityContext"]["allowPrivilegeEscalation"]


def no_limit(objects: list[Object]) -> None:
    del _train_worker(objects)["containers"][0]["resources"]["limits"]["memory"]


def no_shared_memory(objects: list[Object]) -> None:
    _train_worker(objects)["containers"][0]["volumeMounts"].pop()


@pytest.mark.parametrize(
    "plant",
    [
        published_dashboard,
        published_service,
        published_by_ingress,
        no_token,
        a_redis_password_in_the_open,
        a_redis_without_password,
        a_root,
        more_rights,
        no_limit,
        no_shared_memory,
    ],
)
def test_the_check_of_safety_finds(plant: Callable[[list[Object]], None]):
    objects = render("aws")
    plant(objects)
    assert safety_problems(objects)


def too_few_gpus(objects: list[Object]) -> None:
    for bound in _train_worker(objects)["containers"][0]["resources"].values():
        bound["nvidia.com/gpu"] = "4"


def too_small_a_cache(objects: list[Object]) -> None:
    for volume in _train_worker(objects)["volumes"]:
        volume["emptyDir"]["sizeLimit"] = "64Gi"


def too_large_a_store(objects: list[Object]) -> None:
    group = one(objects, "RayCluster", "paml")["spec"]["workerGroupSpecs"][0]
    group["rayStartParams"]["object-store-memory"] = str(2**40)


def begun_by_itself(objects: list[Object]) -> None:
    one(objects, "RayJob", "train")["spec"]["suspend"] = False


def no_room_for_the_driver(objects: list[Object]) -> None:
    one(objects, "RayJob", "train")["spec"]["entrypointNumCpus"] = 9


def no_room_for_the_driver_of_trials(objects: list[Object]) -> None:
    one(objects, "RayJob", "tune")["spec"]["entrypointNumCpus"] = 9


def a_driver_that_dies_with_the_head(objects: list[Object]) -> None:
    del one(objects, "RayJob", "train")["spec"]["entrypointNumCpus"]


def too_short_an_end(objects: list[Object]) -> None:
    _train_worker(objects)["terminationGracePeriodSeconds"] = 60


@pytest.mark.parametrize(
    "plant",
    [
        too_few_gpus,
        too_small_a_cache,
        too_large_a_store,
        begun_by_itself,
        no_room_for_the_driver,
        no_room_for_the_driver_of_trials,
        a_driver_that_dies_with_the_head,
        too_short_an_end,
    ],
)
def test_the_check_of_sizes_finds(plant: Callable[[list[Object]], None]):
    objects = render("aws")
    plant(objects)
    assert len(fit_problems(objects)) == 1


@pytest.mark.parametrize("overlay", ["dev", "aws", "gcp"])
@pytest.mark.parametrize("step", ["prepare", "train", "tune"])
def test_the_command_of_a_job_is_one_that_it_takes(overlay: str, step: str):
    objects = render(overlay)
    entrypoint = one(objects, "RayJob", step)["spec"]["entrypoint"]
    script = re.search(r"/opt/paml/(jobs/\S+\.py)", entrypoint)
    assert script
    if step == "tune" and not (ROOT / script[1]).exists():
        pytest.skip(f"{script[1]} is not there yet: sweeps come by another change")
    bucket = one(objects, "ConfigMap", "paml-site")["data"]["PAML_BUCKET"]
    # As KubeRay's submitter does it: the entrypoint stands as it is in a line of bash.
    command = entrypoint.replace("/opt/paml/", f"{ROOT}/").replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    done = subprocess.run(
        ["bash", "-c", f"{command} --print_config"],
        capture_output=True,
        text=True,
        env=environment(PAML_BUCKET=bucket, PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 0, done.stderr
    settings = yaml.safe_load(done.stdout)
    places = {
        "prepare": lambda: [settings["out"]],
        "train": lambda: [settings["data"]["root"], settings["run"]["storage"]],
        "tune": lambda: [settings["storage"], settings["common"]["data.root"]],
    }[step]()
    assert all(place.startswith(f"s3://{bucket}/") for place in places), places


def test_the_steps_hand_their_data_on():
    for overlay in OVERLAYS:
        objects = render(overlay)
        out, train, tune = (
            re.search(pattern, one(objects, "RayJob", step)["spec"]["entrypoint"])
            for step, pattern in (
                ("prepare", r"--out (\S+)"),
                ("train", r"--data\.root (\S+)"),
                ("tune", r"data\.root: ([^,\s]+)"),
            )
        )
        assert out
        assert train
        assert tune
        assert out[1] == train[1] == tune[1]


def test_a_job_has_the_nodes_of_the_standing_cluster():
    for overlay in OVERLAYS:
        objects = render(overlay)
        groups = {each["groupName"]: each for each in one(objects, "RayCluster", "paml")["spec"]["workerGroupSpecs"]}
        for step in ("prepare", "train", "tune"):
            for group in one(objects, "RayJob", step)["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
                assert group["template"] == groups[group["groupName"]]["template"]


@pytest.mark.parametrize(
    ("overlay", "label", "value"),
    [("aws", "karpenter.sh/capacity-type", "spot"), ("gcp", "cloud.google.com/gke-provisioning", "spot")],
)
def test_spot_groups_and_no_others_go_to_spot_nodes(overlay: str, label: str, value: str):
    for group in one(render(overlay), "RayCluster", "paml")["spec"]["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        spot, gpu = group["groupName"].endswith("spot"), group["groupName"].startswith("gpu")
        tolerated = {each["key"] for each in spec.get("tolerations", [])}
        assert (spec["nodeSelector"][label] == value) == spot
        assert any("spot" in key for key in tolerated) == spot
        assert ("nvidia.com/gpu" in tolerated) == gpu
        assert ("nvidia.com/gpu" in spec["containers"][0]["resources"]["limits"]) == gpu


def test_s3_by_role_on_aws():
    objects = render("aws")
    for pod in pods(objects):
        names = {each["name"] for container in pod.spec["containers"] for each in container.get("env", [])}
        assert not names & {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}, pod.where
        if pod.labels.get("app.kubernetes.io/component") in ("ray", "mlflow"):
            account = one(objects, "ServiceAccount", pod.spec["serviceAccountName"])
            assert "eks.amazonaws.com/role-arn" in account["metadata"]["annotations"]


def test_a_gang_fits_the_queue():
    objects = render("aws-kueue")
    (group,) = one(objects, "ClusterQueue", "paml")["spec"]["resourceGroups"]
    quota = {each["name"]: quantity(each["nominalQuota"]) for each in group["flavors"][0]["resources"]}
    queue = one(objects, "LocalQueue", "paml")
    assert queue["spec"]["clusterQueue"] == "paml"
    for step in ("prepare", "train", "tune"):
        job = one(objects, "RayJob", step)
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
        cluster = job["spec"]["rayClusterSpec"]
        assert cluster["enableInTreeAutoscaling"] is False
        assert all(
            each["minReplicas"] == each["replicas"] == each["maxReplicas"] for each in cluster["workerGroupSpecs"]
        )
        times = [(1, cluster["headGroupSpec"]["template"]), (1, job["spec"]["submitterPodTemplate"])]
        times += [(each["replicas"], each["template"]) for each in cluster["workerGroupSpecs"]]
        for kind, most in quota.items():
            asked = sum(
                n * quantity(c["resources"]["requests"].get(kind, 0)) for n, t in times for c in t["spec"]["containers"]
            )
            assert asked <= most, (step, kind, asked, most)


def test_versions_and_paths_are_those_of_the_checkout():
    (ray,) = re.findall(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    for overlay in OVERLAYS:
        objects = render(overlay)
        clusters = [one(objects, "RayCluster", "paml")["spec"]]
        clusters += [one(objects, "RayJob", step)["spec"]["rayClusterSpec"] for step in ("prepare", "train", "tune")]
        assert {each["rayVersion"] for each in clusters} == {ray}
        for path in re.findall(r"/opt/paml/([\w./-]+)", str(objects)):
            if not re.search("tune_openimages|sweep_", path):  # held to their presence by the test of the commands
                assert (ROOT / path).exists(), path
        assert {image_name(c) for pod in pods(objects) for c in pod.spec["containers"]} <= {
            "paml-train", "paml-tracking", "postgres", "redis", "minio",
        }  # fmt: skip


def test_the_guide_makes_every_secret():
    guide = (CLUSTER / "README.md").read_text()
    made = {
        (name, key)
        for name, rest in re.findall(r"create secret generic (\S+)(.*?)```", guide, re.DOTALL)
        for key in re.findall(r"--from-literal=([\w-]+)=", rest)
    }
    for overlay in OVERLAYS:
        assert secrets(render(overlay)) <= made


def test_both_places_of_the_first_start_of_postgres_agree():
    (data,) = one(render("aws"), "ConfigMap", "postgres-first-start")["data"].values()
    file = (ROOT / "docker" / "postgres" / "10-mlflow-auth.sql").read_text()
    statements = [line for line in file.splitlines() if not line.startswith("--")]
    assert data.split() == " ".join(statements).split()
