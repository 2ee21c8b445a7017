"""The files of cluster/ against those who judge them: Ray's launcher, the clouds' own descriptions of a machine, KubeRay's and
Kubernetes' schemas, hadolint; against one another and the code; and for what nobody should ship.  Each judge is shown a mistake.

None of this starts anything: the image is built in test_image.py, and no cloud or Kubernetes was to be had.
"""

import copy
import gzip
import itertools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import googleapiclient
import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

from ssl_ray.train.cluster import PROMPT

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
DATA = Path(__file__).parent / "data"

# The facts that all files state.
ENVIRONMENT = PROMPT | {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}
GCS, DASHBOARD, METRICS = 6379, 8265, 8080
ROLES = {"head", "data", "train"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"registry.example.com/ssl-ray:{PROJECT['version']}"
GPU_IMAGE = f"{IMAGE}-cu130"


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def lines_of(name: str) -> list[str]:
    return [line for line in (CLUSTER / name).read_text().splitlines() if line and not line.startswith("#")]


PINNED = dict(line.split("==") for line in lines_of("requirements.txt"))


# --- ray up ---------------------------------------------------------------------------------------------------------------


def launched(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of it before it speaks to a cloud. Raises jsonschema's ValidationError."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def options(line: str) -> dict[str, Any]:
    """The options of a `ray start`, as Ray's own command line reads them; nothing is started."""
    program, verb, *rest = shlex.split(line)
    assert (program, verb) == ("ray", "start")
    return ray_start.make_context("ray start", rest).params


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_the_launcher_takes_the_file_and_installs_nothing_on_machines(cloud):
    prepared = launched(load(f"{cloud}.yaml"))
    commands = ["initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"]
    assert [prepared[name] for name in commands] == [[], [], [], []]  # the image's user may not install what Ray's defaults would


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda config: config.update(idle_timeout_min=5),
        lambda config: config.update(max_workers="four"),
        lambda config: config["docker"].update(run_option=[]),
        lambda config: config["available_node_types"]["data"]["resources"].update(CPU=0.5),
        lambda config: config["available_node_types"]["data"].pop("node_config"),
        lambda config: config.update(head_node_type="heads"),
    ],
)
def test_the_launcher_refuses_a_mistake(cloud, spoil):
    config = load(f"{cloud}.yaml")
    spoil(config)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        launched(config)


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_machines_are_those_that_the_other_files_speak_of(cloud):
    config = load(f"{cloud}.yaml")
    types = config["available_node_types"]
    assert {name: kind["labels"] for name, kind in types.items()} == {role: {"ssl-ray/role": role} for role in ROLES}
    assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert types["train"]["resources"]["GPU"] == 1
    assert types["data"]["resources"]["GPU"] == 0
    assert config["max_workers"] == types["data"]["max_workers"] + types["train"]["max_workers"]
    assert [types[role]["min_workers"] for role in ("data", "train")] == [0, 0]
    assert config["docker"]["image"] == IMAGE
    assert types["train"]["docker"] == {"worker_image": GPU_IMAGE}
    assert config["provider"]["use_internal_ips"] is True
    assert config["auth"]["ssh_proxy_use_node_id"] is True


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_containers_of_the_launcher_have_the_environment_and_the_token(cloud):
    config = launched(load(f"{cloud}.yaml"))
    mounts, given = config["file_mounts"], config["docker"]["run_options"]
    run = shlex.split(docker_start_cmds("ubuntu", IMAGE, mounts, "ssl-ray", given, "ssl-ray", "/home/ray", "docker"))
    environment = dict(value.split("=", 1) for name, value in itertools.pairwise(run) if name == "--env")
    token = environment.pop("RAY_AUTH_TOKEN_PATH")
    assert environment == ENVIRONMENT | {"RAY_AUTH_MODE": "token"}
    assert mounts == {token: "~/.ray/auth_token"}
    assert run.count("--privileged") == 0
    assert ("--cap-drop", "ALL") in itertools.pairwise(run)


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_takes_the_options_of_its_start(cloud):
    config = load(f"{cloud}.yaml")
    head, worker = (config[f"{who}_start_ray_commands"][-1] for who in ("head", "worker"))
    given = options(head)
    assert (given["head"], given["port"], given["dashboard_port"]) == (True, GCS, DASHBOARD)
    assert given["dashboard_host"] == "127.0.0.1"
    assert given["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert options(worker)["address"] == f"$RAY_HEAD_IP:{GCS}"
    assert {given["metrics_export_port"], options(worker)["metrics_export_port"]} == {METRICS}


# --- what the clouds say of a machine -------------------------------------------------------------------------------------


def run_instances(node: dict[str, Any]) -> str:
    """What is wrong with it as a request to EC2, of which Ray sends it as one. Empty: nothing."""
    sent = {name: value for name, value in node.items() if name != "SubnetIds"} | {"SubnetId": node["SubnetIds"][0]}
    shape = botocore.session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    return botocore.validate.ParamValidator().validate(sent | {"MinCount": 1, "MaxCount": 1}, shape).generate_report()


def cfn_lint(template: Path, *arguments: str) -> str:
    command = [Path(sys.executable).with_name("cfn-lint"), *arguments, "--", template]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (not done.stdout), done
    return done.stdout


def machines_template(config: dict[str, Any], path: Path) -> Path:
    """As CloudFormation has machines: an Instance, which knows the types of a region, and what only a LaunchTemplate has."""
    resources = {}
    for name, kind in config["available_node_types"].items():
        node = {key: value for key, value in kind["node_config"].items() if key != "SubnetIds"}
        resources[f"{name}Template"] = {"Type": "AWS::EC2::LaunchTemplate", "Properties": {"LaunchTemplateData": node}}
        market = node.get("InstanceMarketOptions")
        node = {key: value for key, value in node.items() if value is not market}
        node |= {"SubnetId": kind["node_config"]["SubnetIds"][0], "IamInstanceProfile": node["IamInstanceProfile"]["Name"]}
        resources[f"{name}Instance"] = {"Type": "AWS::EC2::Instance", "Properties": node}
    path.write_text(json.dumps({"AWSTemplateFormatVersion": "2010-09-09", "Resources": resources}))
    return path


def test_ec2_knows_the_machines(tmp_path):
    config = load("aws.yaml")
    assert [run_instances(kind["node_config"]) for kind in config["available_node_types"].values()] == ["", "", ""]
    assert cfn_lint(machines_template(config, tmp_path / "t.json"), "--regions", config["provider"]["region"]) == ""
    train = config["available_node_types"]["train"]["node_config"]
    assert train["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in config["available_node_types"]["data"]["node_config"]
    for kind in config["available_node_types"].values():
        disk = kind["node_config"]["BlockDeviceMappings"][0]["Ebs"]
        assert disk["Encrypted"]
        assert disk["DeleteOnTermination"]
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def test_ec2_refuses_a_mistake(tmp_path):
    config = load("aws.yaml")
    node = config["available_node_types"]["train"]["node_config"]
    node["InstanceMarketOptions"]["MarketTyp"] = "spot"
    assert 'Unknown parameter in InstanceMarketOptions: "MarketTyp"' in run_instances(node)
    assert "MarketTyp" in cfn_lint(machines_template(config, tmp_path / "t.json"))
    del node["InstanceMarketOptions"]["MarketTyp"]
    node["InstanceType"] = "g6.5xlarge"
    assert "'g6.5xlarge' is not one of" in cfn_lint(machines_template(config, tmp_path / "t.json"), "--regions", "us-west-2")


def test_the_roles_are_a_good_template_that_lets_nobody_in(tmp_path):
    path = CLUSTER / "aws-roles.yaml"
    assert cfn_lint(path) == ""
    (tmp_path / "t.yaml").write_text(
        path.read_text().replace("SourceSecurityGroupId: !Ref Machines", "SourceSecurityGroup: !Ref Machine")
    )
    assert "SourceSecurityGroup" in cfn_lint(tmp_path / "t.yaml")
    assert "CidrIp" not in path.read_text()
    named = [
        name
        for kind in load("aws.yaml")["available_node_types"].values()
        for name in [kind["node_config"]["IamInstanceProfile"]["Name"]]
    ]
    assert all(f"InstanceProfileName: {name}" in path.read_text() for name in named)


def gcp_schema(name: str) -> dict[str, Any]:
    """A JSON schema of Compute Engine's API, from Google's client: strict, numbers of 64 bits as numbers too."""
    documents = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
    schemas = json.loads((documents / "compute.v1.json").read_text())["schemas"]

    def strict(schema: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in schema:
            return {"$ref": f"#/$defs/{schema['$ref']}"}
        if schema.get("type") == "string" and schema.get("format") in ("int64", "uint64"):
            return {"type": ["string", "integer"]}
        kept = {key: schema[key] for key in ("type", "enum") if key in schema and schema[key] != "any"}
        if "properties" in schema:
            kept |= {
                "properties": {key: strict(value) for key, value in schema["properties"].items()},
                "additionalProperties": False,
            }
        for key in ("items", "additionalProperties"):
            if key in schema:
                kept[key] = strict(schema[key])
        return kept

    return {"$ref": f"#/$defs/{name}", "$defs": {key: strict(schema) for key, schema in schemas.items()}}


def test_compute_engine_knows_the_machines():
    types = load("gcp.yaml")["available_node_types"]
    validator = jsonschema.Draft202012Validator(gcp_schema("Instance"))
    for kind in types.values():
        validator.validate(kind["node_config"])
        assert all(
            "accessConfigs" not in interface for interface in kind["node_config"]["networkInterfaces"]
        )  # no public address
        assert all(disk["autoDelete"] for disk in kind["node_config"]["disks"])
    assert types["train"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert "scheduling" not in types["data"]["node_config"]


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda node: node["scheduling"].update(provisioningModel="SPOTS"), "SPOTS"),
        (lambda node: node["scheduling"].update(preemptable=True), "preemptable"),
        (lambda node: node["disks"][0]["initializeParams"].update(diskSizeGB=100), "diskSizeGB"),
        (lambda node: node.update(tags=["ssl-ray"]), "ssl-ray"),
    ],
)
def test_compute_engine_refuses_a_mistake(spoil, named):
    node = load("gcp.yaml")["available_node_types"]["train"]["node_config"]
    spoil(node)
    with pytest.raises(jsonschema.ValidationError, match=named):
        jsonschema.Draft202012Validator(gcp_schema("Instance")).validate(node)


# --- Kubernetes -----------------------------------------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as a JSON schema that knows no other fields, as `kubectl apply` is."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    made = {
        key: {name: strict(each) for name, each in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
    }
    open_ended = "additionalProperties" in made or made.get("x-kubernetes-preserve-unknown-fields")
    if made.get("type") == "object" and "properties" in made and not open_ended:
        made["additionalProperties"] = False
    return made


def kuberay_validator(kind: str) -> jsonschema.Draft7Validator:
    """Of KubeRay's definition (data/SOURCE.txt), which leaves an object's metadata to Kubernetes."""
    with gzip.open(DATA / f"ray.io_{kind}.yaml.gz") as file:
        definition = yaml.load(file, yaml.CSafeLoader)
    schema = next(each for each in definition["spec"]["versions"] if each["name"] == "v1")["schema"]["openAPIV3Schema"]
    made = strict(schema)
    made["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return jsonschema.Draft7Validator(made)


@pytest.fixture(scope="module")
def kuberay() -> dict[str, jsonschema.Draft7Validator]:
    return {"RayCluster": kuberay_validator("rayclusters"), "RayJob": kuberay_validator("rayjobs")}


def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The head and the workers of a RayCluster by role."""
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def specs() -> Iterator[dict[str, Any]]:
    yield load("kuberay/raycluster.yaml")["spec"]
    yield load("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]


def test_kuberay_knows_the_manifests(kuberay):
    for name in ("raycluster", "rayjob"):
        manifest = load(f"kuberay/{name}.yaml")
        assert manifest["apiVersion"] == "ray.io/v1"
        kuberay[manifest["kind"]].validate(manifest)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda spec: spec.update(autoscalerOption={}), "autoscalerOption"),
        (lambda spec: spec["autoscalerOptions"].update(version="v3"), "v3"),
        (lambda spec: spec["authOptions"].update(mode="tokens"), "tokens"),
        (lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas="eight"), "eight"),
        (lambda spec: spec["workerGroupSpecs"][0].pop("template"), "template"),
        (lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0].update(imagee=""), "imagee"),
        (lambda spec: spec["headGroupSpec"]["template"]["spec"]["securityContext"].update(runAsRoot=False), "runAsRoot"),
    ],
)
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_kuberay_refuses_a_mistake(kuberay, kind, spoil, named):
    manifest = copy.deepcopy(load(f"kuberay/{kind.lower()}.yaml"))
    spoil(manifest["spec"] if kind == "RayCluster" else manifest["spec"]["rayClusterSpec"])
    with pytest.raises(jsonschema.ValidationError, match=named):
        kuberay[kind].validate(manifest)


def plain_objects() -> dict[str, dict[str, Any]]:
    return {
        f"{each['kind']} {each['metadata']['name']}": each
        for each in yaml.safe_load_all((CLUSTER / "kuberay/common.yaml").read_text())
    }


def test_kubernetes_knows_the_plain_objects():
    for each in plain_objects().values():
        kubernetes_validate.validate(each, "1.36", strict=True)


def test_kubernetes_refuses_a_mistake():
    policy = plain_objects()["NetworkPolicy ssl-ray"]
    policy["spec"]["podSelectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="podSelectors"):
        kubernetes_validate.validate(policy, "1.36", strict=True)


def test_pods_are_those_that_the_other_files_speak_of():
    accounts = plain_objects()
    for spec in specs():
        assert spec["rayVersion"] == PINNED["ray"] == metadata.version("ray")
        assert spec["authOptions"] == {"mode": "token"}
        assert (spec["enableInTreeAutoscaling"], spec["autoscalerOptions"]["version"]) == (True, "v2")
        assert {each["name"]: each["value"] for each in spec["autoscalerOptions"]["env"]} == ENVIRONMENT
        found = groups(spec)
        assert {name: group["labels"] for name, group in found.items()} == {role: {"ssl-ray/role": role} for role in ROLES}
        assert found["head"]["rayStartParams"]["num-cpus"] == "0"
        for role, group in found.items():
            given = options(
                shlex.join(["ray", "start", *(f"--{name}={value}" for name, value in group["rayStartParams"].items())])
            )
            assert given["metrics_export_port"] == METRICS
            template = group["template"]
            assert (
                template["metadata"]["annotations"] | {"prometheus.io/port": str(METRICS)} == template["metadata"]["annotations"]
            )
            assert f"ServiceAccount {template['spec']['serviceAccountName']}" in accounts
            (container,) = template["spec"]["containers"]
            assert container["image"] == (GPU_IMAGE if role == "train" else IMAGE)
            assert {each["name"]: each["value"] for each in container["env"]} == ENVIRONMENT
            assert {"containerPort": METRICS, "name": "metrics"} in container["ports"]
            assert container["resources"]["limits"] == container["resources"]["requests"]
            assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (role == "train")
            assert {container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("liveness", "readiness")} == {"/api/healthz"}
            assert all("persistentVolumeClaim" not in volume for volume in template["spec"].get("volumes", []))


def test_pods_meet_what_their_namespace_enforces():
    """Pod Security's `restricted`, in as far as the files decide it."""
    assert plain_objects()["Namespace ssl-ray"]["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    for spec in specs():
        contexts = [spec["autoscalerOptions"]["securityContext"]]
        for group in groups(spec).values():
            pod = group["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] > 0
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            contexts += [container["securityContext"] for container in pod["containers"]]
        assert all(context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}} for context in contexts)


def test_the_network_lets_in_whom_it_has_to():
    policy = plain_objects()["NetworkPolicy ssl-ray"]["spec"]
    for spec in specs():
        for group in groups(spec).values():
            assert policy["podSelector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
    own, operator, prometheus = policy["ingress"]
    assert own == {"from": [{"podSelector": policy["podSelector"]}]}
    assert [port["port"] for port in operator["ports"]] == [DASHBOARD]
    assert [port["port"] for port in prometheus["ports"]] == [METRICS]


def test_the_cluster_of_a_job_is_the_one_that_stays_but_for_its_dashboard():
    stays, of_job = specs()
    assert stays["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "127.0.0.1"
    assert stays == of_job


# --- the image ------------------------------------------------------------------------------------------------------------


def hadolint(text: str) -> str:
    program = Path(sys.executable).with_name("hadolint")
    return subprocess.run([program, "-"], input=text, capture_output=True, text=True, check=False).stdout


def test_hadolint_finds_nothing_in_the_dockerfile():
    assert hadolint((CLUSTER / "Dockerfile").read_text()) == ""


@pytest.mark.parametrize(
    ("good", "bad", "rule"),
    [
        ("FROM ${BASE}", "FROM debian:latest", "DL3007"),
        ("'rsync=3.2.7-*'", "rsync", "DL3008"),
        ("pip install --no-cache-dir", "pip install", "DL3042"),
        ("USER 1000:1000", "USER root", "DL3002"),
    ],
)
def test_hadolint_finds_a_mistake(good, bad, rule):
    text = (CLUSTER / "Dockerfile").read_text()
    assert good in text
    assert rule in hadolint(text.replace(good, bad))


def test_the_image_has_what_the_project_asks_for_and_nothing_that_is_not_pinned():
    asked = [
        *PROJECT["dependencies"],
        *(each for extra in ("gs", "abfs", "cluster") for each in PROJECT["optional-dependencies"][extra]),
    ]
    needed = [Requirement(each) for each in [*asked, "boto3", "google-api-python-client"]]
    of_ray = [Requirement(each) for each in metadata.requires("ray") or []]  # the cluster's: dashboard, metrics, autoscaler
    needed += [each for each in of_ray if each.marker and each.marker.evaluate({"extra": "default"})]
    missing = [str(each) for each in needed if not each.specifier.contains(PINNED.get(each.name.lower().replace("_", "-"), "0"))]
    assert missing == []


# --- what nobody should ship ----------------------------------------------------------------------------------------------

BAD = {
    "listens to everybody": (r"\b0\.0\.0\.0\b|\[::\](?!\d)", r"dashboard-host[=: ]+(?!127\.0\.0\.1)\S"),
    "asks nobody who they are": (r"AUTH_MODE\W+(disabled|none)", r"mode: *disabled"),
    "holds a secret": (
        r"AKIA[0-9A-Z]{16}",
        r"BEGIN [A-Z ]*PRIVATE KEY",
        r"(?i:(secret|token|password|_key)\w*\W{1,4}(?=[\w/+]*\d)[\w/+]{20,})",
        r"\b[0-9a-f]{40,}\b",
    ),
    "is root": (
        r"(?i:\buser[ :=]+(root|0)\b)|runAsUser: *0\b|runAsNonRoot: *false",
        r"privileged: *true|--privileged|allowPrivilegeEscalation: *true|\bsudo ",
    ),
    "takes an image that may be another one tomorrow": (
        r"^[\s-]*(?:\w*image: *|FROM +|ARG BASE=)(?!\$)[\w./-]+(?=[\s#,}]|$)",
        r":latest\b",
    ),
}
EXAMPLES = [
    ("listens to everybody", "ray start --head --dashboard-host=0.0.0.0"),
    ("listens to everybody", "dashboard-host: 10.0.0.1"),
    ("listens to everybody", "cidr: 0.0.0.0/0"),
    ("listens to everybody", "--listen [::]:80"),
    ("asks nobody who they are", "--env RAY_AUTH_MODE=disabled"),
    ("asks nobody who they are", "authOptions: {mode: disabled}"),
    ("holds a secret", "aws_access_key_id: AKIAIOSFODNN7EXAMPLE"),
    ("holds a secret", "-----BEGIN RSA PRIVATE KEY-----"),
    ("holds a secret", "RAY_AUTH_TOKEN=Zm9vYmFyYmF6cXV4MTIzNDU2"),
    ("holds a secret", "password: 'hunter2hunter2hunter2'"),
    ("is root", "USER root"),
    ("is root", "runAsUser: 0"),
    ("is root", "securityContext: {privileged: true}"),
    ("is root", "--user=0"),
    ("takes an image that may be another one tomorrow", "image: rayproject/ray"),
    ("takes an image that may be another one tomorrow", "image: rayproject/ray:latest"),
    ("takes an image that may be another one tomorrow", "FROM debian"),
]


def found(text: str) -> list[tuple[str, str]]:
    """What is bad in a file, and where."""
    bad = [
        (what, line.strip())
        for what, patterns in BAD.items()
        for line in text.splitlines()
        if any(re.search(pattern, line) for pattern in patterns)
    ]
    starts = re.search(r"ray start\b.*--(head|address)", text)
    if starts and not re.search(r"RAY_AUTH_MODE\W+token|authOptions", text):
        bad.append(("asks nobody who they are", starts[0]))
    return bad


def shipped() -> list[Path]:
    folders = ("cluster", "jobs", "docs")
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    return [ROOT / "README.md", *(path for path in files if path.suffix not in (".png", ".gz"))]


@pytest.mark.parametrize("path", shipped(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_shipped_is_open_or_secret_or_root_or_unpinned(path):
    assert found(path.read_text()) == []


@pytest.mark.parametrize(("what", "text"), EXAMPLES)
def test_what_nobody_should_ship_is_found(what, text):
    assert what in [each for each, _ in found(text)]


def test_a_start_of_ray_without_the_token_is_found():
    assert found("ray start --head --port=6379")
    assert not found("export RAY_AUTH_MODE=token\nray start --head --port=6379")
