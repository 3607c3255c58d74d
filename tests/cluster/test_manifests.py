"""The overlays of cluster/: schemas, services, ports, variables, access from outside, sizes."""

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
    disruption_problems,
    environment_problems,
    fit_problems,
    image_name,
    may_reach,
    namespace_problems,
    pods,
    quantity,
    render,
    schema_problems,
    secrets,
    security_problems,
    service_problems,
)


def one(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_accepts_every_object(overlay: str):
    objects = [each for each in render(overlay) if not each["apiVersion"].startswith("ray.io/")]
    assert schema_problems(objects, with_kuberay=False) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kuberay_accepts_every_cluster_and_job(overlay: str):
    objects = [each for each in render(overlay) if each["apiVersion"].startswith("ray.io/")]
    assert sorted(each["metadata"]["name"] for each in objects) == ["paml", "prepare", "train", "tune"]
    assert schema_problems(objects) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_ports_and_policies_match(overlay: str):
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
def test_schemas_report(plant: Callable[[list[Object]], None]):
    objects = render("aws")
    plant(objects)
    assert len(schema_problems(objects)) == 1


def a_service_without_pods(objects: list[Object]) -> None:
    one(objects, "Service", "mlflow")["spec"]["selector"] = {"app.kubernetes.io/component": "ml-flow"}


def an_unused_port(objects: list[Object]) -> None:
    one(objects, "Service", "mlflow")["spec"]["ports"][0]["targetPort"] = 5001


def an_unused_container_port(objects: list[Object]) -> None:
    pod = one(objects, "Deployment", "mlflow")["spec"]["template"]["spec"]
    pod["containers"][0]["ports"][0]["containerPort"] = 8080


def a_policy_without_pods(objects: list[Object]) -> None:
    one(objects, "NetworkPolicy", "mlflow")["spec"]["podSelector"]["matchLabels"] = {"app": "mlflow"}


def a_policy_for_another_port(objects: list[Object]) -> None:
    one(objects, "NetworkPolicy", "postgres")["spec"]["ingress"][0]["ports"][0]["port"] = 5433


def an_unknown_redis(objects: list[Object]) -> None:
    one(objects, "RayJob", "train")["spec"]["rayClusterSpec"]["gcsFaultToleranceOptions"]["redisAddress"] = "gcs:6379"


def a_blocked_redis(objects: list[Object]) -> None:
    rules = one(objects, "NetworkPolicy", "ray")["spec"]["egress"]
    rules.remove(next(each for each in rules if each.get("ports") == [{"protocol": "TCP", "port": 6379}]))


def a_redis_open_to_workers_only(objects: list[Object]) -> None:
    (rule,) = one(objects, "NetworkPolicy", "redis")["spec"]["ingress"]
    rule["from"][0]["podSelector"]["matchExpressions"][0]["values"] = ["worker"]


def an_unknown_address(objects: list[Object]) -> None:
    head = one(objects, "RayCluster", "paml")["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    head["env"][0]["value"] = "http://tracking:5000"


@pytest.mark.parametrize(
    "plant",
    [
        a_service_without_pods,
        an_unused_port,
        an_unused_container_port,
        a_policy_without_pods,
        a_policy_for_another_port,
        an_unknown_redis,
        a_blocked_redis,
        a_redis_open_to_workers_only,
        an_unknown_address,
    ],
)
def test_the_check_of_services_reports(plant: Callable[[list[Object]], None]):
    objects = render("aws")
    plant(objects)
    assert service_problems(objects)


@pytest.mark.parametrize("name", ["PAML_HOUSE", "MLFLOW_TRACKING_URL", "RAY_TRAIN_START_TIMEOUT", "AWS_REGIONS"])
def test_an_unused_variable_is_reported(name: str):
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


def a_redis_password_in_plain_text(objects: list[Object]) -> None:
    one(objects, "RayCluster", "paml")["spec"]["gcsFaultToleranceOptions"]["redisPassword"] = {"value": "secret"}


def a_redis_without_password(objects: list[Object]) -> None:
    del one(objects, "RayJob", "tune")["spec"]["rayClusterSpec"]["gcsFaultToleranceOptions"]["redisPassword"]


def a_root_user(objects: list[Object]) -> None:
    one(objects, "StatefulSet", "postgres")["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"] = False


def _train_worker_template(objects: list[Object]) -> Object:
    return one(objects, "RayJob", "train")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]


def _train_worker(objects: list[Object]) -> Object:
    return _train_worker_template(objects)["spec"]


def more_rights(objects: list[Object]) -> None:
    del _train_worker(objects)["containers"][0]["securityContext"]["allowPrivilegeEscalation"]


def no_limit(objects: list[Object]) -> None:
    del _train_worker(objects)["containers"][0]["resources"]["limits"]["memory"]


def no_shared_memory(objects: list[Object]) -> None:
    _train_worker(objects)["containers"][0]["volumeMounts"].pop()


def a_token_for_a_worker(objects: list[Object]) -> None:
    _train_worker(objects)["automountServiceAccountToken"] = True


def the_autoscalers_account_for_a_job(objects: list[Object]) -> None:
    head = one(objects, "RayJob", "train")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    head["serviceAccountName"] = "paml-autoscaler"


@pytest.mark.parametrize(
    "plant",
    [
        published_dashboard,
        published_service,
        published_by_ingress,
        no_token,
        a_redis_password_in_plain_text,
        a_redis_without_password,
        a_root_user,
        more_rights,
        no_limit,
        no_shared_memory,
        a_token_for_a_worker,
        the_autoscalers_account_for_a_job,
    ],
)
def test_the_check_of_security_reports(plant: Callable[[list[Object]], None]):
    objects = render("aws")
    plant(objects)
    assert security_problems(objects)


def too_few_gpus(objects: list[Object]) -> None:
    for bound in _train_worker(objects)["containers"][0]["resources"].values():
        bound["nvidia.com/gpu"] = "4"


def too_small_a_cache(objects: list[Object]) -> None:
    for volume in _train_worker(objects)["volumes"]:
        volume["emptyDir"]["sizeLimit"] = "64Gi"


def too_large_a_store(objects: list[Object]) -> None:
    group = one(objects, "RayCluster", "paml")["spec"]["workerGroupSpecs"][0]
    group["rayStartParams"]["object-store-memory"] = str(2**40)


def started_automatically(objects: list[Object]) -> None:
    one(objects, "RayJob", "train")["spec"]["suspend"] = False


def no_cpu_for_the_driver(objects: list[Object]) -> None:
    one(objects, "RayJob", "train")["spec"]["entrypointNumCpus"] = 9


def no_cpu_for_the_driver_of_trials(objects: list[Object]) -> None:
    one(objects, "RayJob", "tune")["spec"]["entrypointNumCpus"] = 9


def a_driver_that_dies_with_the_head(objects: list[Object]) -> None:
    del one(objects, "RayJob", "train")["spec"]["entrypointNumCpus"]


def too_short_a_grace_period(objects: list[Object]) -> None:
    _train_worker(objects)["terminationGracePeriodSeconds"] = 60


@pytest.mark.parametrize(
    "plant",
    [
        too_few_gpus,
        too_small_a_cache,
        too_large_a_store,
        started_automatically,
        no_cpu_for_the_driver,
        no_cpu_for_the_driver_of_trials,
        a_driver_that_dies_with_the_head,
        too_short_a_grace_period,
    ],
)
def test_the_check_of_sizes_reports(plant: Callable[[list[Object]], None]):
    objects = render("aws")
    plant(objects)
    assert len(fit_problems(objects)) == 1


@pytest.mark.parametrize("overlay", ["dev", "aws", "gcp"])
@pytest.mark.parametrize("step", ["prepare", "train", "tune"])
def test_the_command_of_a_job_is_accepted(overlay: str, step: str):
    objects = render(overlay)
    entrypoint = one(objects, "RayJob", step)["spec"]["entrypoint"]
    script = re.search(r"/opt/paml/(jobs/\S+\.py)", entrypoint)
    assert script
    bucket = one(objects, "ConfigMap", "paml-site")["data"]["PAML_BUCKET"]
    # As in KubeRay's submitter: the entrypoint is part of a line of bash.
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


def test_each_step_reads_the_data_of_the_previous_one():
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
def test_only_spot_groups_use_spot_nodes(overlay: str, label: str, value: str):
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


def test_a_job_fits_its_queue():
    objects = render("aws-kueue")
    (group,) = one(objects, "ClusterQueue", "paml")["spec"]["resourceGroups"]
    quota = {each["name"]: quantity(each["nominalQuota"]) for each in group["flavors"][0]["resources"]}
    queue = one(objects, "LocalQueue", "paml")
    assert queue["spec"]["clusterQueue"] == "paml"
    for step in ("prepare", "train", "tune"):
        job = one(objects, "RayJob", step)
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
        cluster = job["spec"]["rayClusterSpec"]
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


def test_versions_and_paths_match_the_checkout():
    (ray,) = re.findall(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    for overlay in OVERLAYS:
        objects = render(overlay)
        clusters = [one(objects, "RayCluster", "paml")["spec"]]
        clusters += [one(objects, "RayJob", step)["spec"]["rayClusterSpec"] for step in ("prepare", "train", "tune")]
        assert {each["rayVersion"] for each in clusters} == {ray}
        for path in re.findall(r"/opt/paml/([\w./-]+)", str(objects)):
            if not re.search("tune_openimages|sweep_", path):  # their presence is checked with the commands
                assert (ROOT / path).exists(), path
        assert {image_name(c) for pod in pods(objects) for c in pod.spec["containers"]} <= {
            "paml-train", "paml-tracking", "postgres", "redis", "seaweedfs",
        }  # fmt: skip


def test_the_guide_creates_every_secret():
    guide = (ROOT / "docs" / "clusters.md").read_text()
    made = {
        (name, key)
        for name, rest in re.findall(r"create secret generic (\S+)(.*?)```", guide, re.DOTALL)
        for key in re.findall(r"--from-literal=([\w-]+)=", rest)
    }
    for overlay in OVERLAYS:
        assert secrets(render(overlay)) <= made


def test_both_init_scripts_of_postgres_are_equal():
    (data,) = one(render("aws"), "ConfigMap", "postgres-first-start")["data"].values()
    file = (ROOT / "docker" / "postgres" / "10-mlflow-auth.sql").read_text()
    statements = [line for line in file.splitlines() if not line.startswith("--")]
    assert data.split() == " ".join(statements).split()


# ---- namespace, disruption, addresses, cost, versions


def a_job_in_the_default_namespace(objects: list[Object]) -> None:
    del one(objects, "RayJob", "train")["metadata"]["namespace"]


def a_cluster_in_another_namespace(objects: list[Object]) -> None:
    one(objects, "RayCluster", "paml")["metadata"]["namespace"] = "ray"


@pytest.mark.parametrize("plant", [a_job_in_the_default_namespace, a_cluster_in_another_namespace])
def test_the_check_of_namespaces_reports(plant: Callable[[list[Object]], None]):
    objects = render("aws")
    plant(objects)
    assert len(namespace_problems(objects)) == 1


def test_the_check_of_disruption_reports():
    objects = render("aws")
    del _train_worker_template(objects)["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"]
    head = one(objects, "RayCluster", "paml")["spec"]["headGroupSpec"]["template"]
    head["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] = "true"
    assert disruption_problems(objects) == [
        "RayCluster paml head: cluster-autoscaler.kubernetes.io/safe-to-evict is not false",
        "RayJob train group gpu: karpenter.sh/do-not-disrupt is not true",
    ]


def test_replicas_are_left_to_the_autoscaler():
    objects = render("aws")
    one(objects, "RayCluster", "paml")["spec"]["workerGroupSpecs"][0]["replicas"] = 0
    assert fit_problems(objects) == ["RayCluster paml cpu: replicas are the autoscaler's"]


def test_jobs_have_no_autoscaler_so_their_heads_need_no_rights():
    for overlay in OVERLAYS:
        for step in ("prepare", "train", "tune"):
            assert one(render(overlay), "RayJob", step)["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is False


PUBLIC, CLUSTER_IPS = (
    "52.216.8.9",
    ("10.96.0.1", "10.4.1.2", "172.20.0.10", "192.168.3.4", "100.64.1.1", "34.118.224.1"),
)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_reach_public_addresses_and_no_private_ones(overlay: str):
    objects = render(overlay)
    for pod in pods(objects):
        standing_head = pod.where == "RayCluster paml head"
        needs_the_bucket = pod.labels.get("app.kubernetes.io/component") in ("ray", "mlflow")
        assert may_reach(objects, pod.labels, PUBLIC, 443) == needs_the_bucket, pod.where
        for address in CLUSTER_IPS:
            assert may_reach(objects, pod.labels, address, 443) == standing_head, (pod.where, address)
            assert may_reach(objects, pod.labels, address, 6443) == standing_head, (pod.where, address)
        # The metadata service, which gives the node's role to any caller. With Cloud DNS it also answers for names.
        for port in (80, 443, 988):
            assert not may_reach(objects, pod.labels, "169.254.169.254", port), pod.where
        assert may_reach(objects, pod.labels, "169.254.169.254", 53) == (overlay == "gcp"), pod.where


def test_private_addresses_left_open_are_noticed():
    objects = render("aws")
    (rule,) = [each for each in one(objects, "NetworkPolicy", "ray")["spec"]["egress"] if "ipBlock" in each["to"][0]]
    rule["to"][0]["ipBlock"]["except"].remove("10.0.0.0/8")
    assert may_reach(objects, {"app.kubernetes.io/component": "ray"}, "10.96.0.1", 443)


def guide() -> str:
    return (ROOT / "docs" / "clusters.md").read_text()


def test_the_maximum_of_the_standing_cluster_costs_what_the_guide_says():
    prices = re.search(r"([\d.]+) per hour for 16 vCPUs.*?([\d.]+) for eight H100s", guide(), re.DOTALL)
    assert prices
    cpu, gpu = prices.groups()
    most = re.search(r"at\s+most (\d+) dollars per hour", guide())
    assert most
    price = {"cpu": float(cpu), "cpu-spot": float(cpu) / 2, "gpu": float(gpu), "gpu-spot": float(gpu) / 2}
    for overlay in ("aws", "gcp"):
        groups = one(render(overlay), "RayCluster", "paml")["spec"]["workerGroupSpecs"]
        cost = sum(price[each["groupName"]] * each["maxReplicas"] for each in groups)
        assert cost <= float(most[1]), cost
    assert f"at most {most[1]} dollars" in (CLUSTER / "jobs" / "raycluster.yaml").read_text()


@pytest.mark.parametrize("step", ["prepare", "train", "tune"])
def test_a_step_next_to_the_standing_head_fits_the_quota(step: str):
    objects = render("aws")
    hard = one(objects, "ResourceQuota", "paml")["spec"]["hard"]
    asked = {"cpu": 0.0, "memory": 0.0, "nvidia.com/gpu": 0.0}
    for pod in pods(objects):
        mine = pod.where.startswith(f"RayJob {step} ") or not pod.where.startswith("Ray")
        if mine or pod.where == "RayCluster paml head":
            times = 2 if "group cpu-spot" in pod.where else 1
            for container in pod.spec["containers"]:
                for kind in asked:
                    asked[kind] += times * quantity(container["resources"]["requests"].get(kind, 0))
    assert asked["cpu"] > 30
    for kind, sum_of_requests in asked.items():
        assert sum_of_requests <= quantity(hard[f"requests.{kind}"]), kind
    assert hard["services.loadbalancers"] == hard["services.nodeports"] == "0"


def node_class() -> Object:
    objects = list(yaml.safe_load_all((CLUSTER / "overlays" / "aws" / "karpenter.yaml").read_text()))
    (found,) = [each for each in objects if each["kind"] == "EC2NodeClass"]
    return found


def test_root_volumes_hold_what_heads_may_write():
    (disk,) = node_class()["spec"]["blockDeviceMappings"]
    assert disk["ebs"]["volumeType"] == "gp3"
    root = quantity(disk["ebs"]["volumeSize"])
    assert root >= 100 * 2**30
    for pod in pods(render("aws")):
        if "gpu" not in pod.where:  # on the NVMe disks
            limit = sum(quantity(c["resources"]["limits"].get("ephemeral-storage", 0)) for c in pod.spec["containers"])
            assert limit <= 0.8 * root, pod.where
    text = " ".join(guide().split())
    for needed in ("100 GiB, gp3", "aws-ebs-csi-driver", "driver 580 or newer"):
        assert needed in text


def test_node_pools_match_the_selectors_and_taints_of_the_groups():
    pools = [
        each for each in yaml.safe_load_all((CLUSTER / "overlays" / "aws" / "karpenter.yaml").read_text())
        if each["kind"] == "NodePool"
    ]  # fmt: skip
    for group in one(render("aws"), "RayCluster", "paml")["spec"]["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        tolerated = {each["key"] for each in spec.get("tolerations", [])}
        matching = [
            pool["spec"]["template"]
            for pool in pools
            if all(
                value in next(r["values"] for r in pool["spec"]["template"]["spec"]["requirements"] if r["key"] == key)
                for key, value in spec["nodeSelector"].items()
            )
        ]
        (pool,) = matching
        taints = {each["key"] for each in pool["spec"].get("taints", [])}
        assert taints == tolerated
        labels = pool.get("metadata", {}).get("labels", {})
        assert ("nvidia.com/gpu" in taints) == (labels == {"nvidia.com/gpu.present": "true"})


def test_volumes_use_the_storage_class_of_the_overlay():
    objects = render("aws")
    storage = one(objects, "StorageClass", "paml-gp3")
    assert storage["provisioner"] == "ebs.csi.aws.com"
    for each in objects:
        if each["kind"] == "StatefulSet":
            (claim,) = each["spec"]["volumeClaimTemplates"]
            assert claim["spec"]["storageClassName"] == "paml-gp3"


def test_versions_of_the_guide_match_manifests_and_commands():
    table = dict(re.findall(r"^\| ([\w ]+) \| ([\d.]+) \| ", guide(), re.M))
    objects = render("aws-kueue")
    noted = one(objects, "Namespace", "paml")["metadata"]["annotations"]
    charts = dict(re.findall(r"helm install (\S+) \S+ --version ([\d.]+)", guide()))
    assert len(re.findall("helm install", guide())) == len(charts), "every chart has a version"
    for row, annotation, chart in (
        ("KubeRay operator", "paml/kuberay", "kuberay-operator"),
        ("Kueue", "paml/kueue", "kueue"),
        ("NVIDIA device plugin", "paml/nvidia-device-plugin", "nvidia-device-plugin"),
    ):
        assert table[row] == noted[annotation] == charts[chart]
    assert table["Ray"] == one(objects, "RayCluster", "paml")["spec"]["rayVersion"]
    images = {c["image"] for pod in pods(render("dev")) for c in pod.spec["containers"]}
    images |= {
        each["image"] for each in yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"].values()
    }
    for name, row in (("postgres", "PostgreSQL"), ("redis", "Redis"), ("chrislusf/seaweedfs", "SeaweedFS")):
        (tag,) = {image.split(":")[1].split("-")[0] for image in images if image.startswith(f"{name}:")}
        assert tag == table[row]


def test_kueue_waits_for_pods_and_serves_the_version_of_the_queue():
    for each in render("aws-kueue"):
        if "kueue.x-k8s.io/" in each["apiVersion"]:
            assert each["apiVersion"] == "kueue.x-k8s.io/v1beta2"
    values = yaml.safe_load((CLUSTER / "overlays" / "aws-kueue" / "values.yaml").read_text())
    config = yaml.safe_load(values["managerConfig"]["controllerManagerConfigYaml"])
    assert config["apiVersion"] == "config.kueue.x-k8s.io/v1beta2"
    assert config["waitForPodsReady"]["blockAdmission"] is True
    assert "enable" not in config["waitForPodsReady"], "not a field of v1beta2: its presence turns it on"
    assert "ray.io/rayjob" in config["integrations"]["frameworks"]


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("ClusterQueue", "paml", {"cohort": "all"}),
        ("LocalQueue", "paml", {"clusterQueues": ["paml"]}),
        ("ClusterQueue", "paml", {"queueingStrategy": "FIFO"}),
    ],
)
def test_the_schema_of_kueue_reports(kind: str, name: str, change: dict[str, object]):
    objects = render("aws-kueue")
    one(objects, kind, name)["spec"] |= change
    assert len(schema_problems(objects)) == 1


def test_postgres_is_ready_only_when_it_listens_on_tcp():
    (container,) = one(render("aws"), "StatefulSet", "postgres")["spec"]["template"]["spec"]["containers"]
    for probe in ("readinessProbe", "livenessProbe"):
        assert "--host=127.0.0.1" in container[probe]["exec"]["command"]
