"""Dockerfile, compose.yaml and deploy/kubernetes.yaml, as far as they can be held to something without a daemon."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from softprompt.cli.serve import command as serve
from softprompt.server import app
from softprompt.server.metrics import _GAUGES

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
KUBERNETES = {each["kind"]: each for each in yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())}
POD = KUBERNETES["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PATHS = {route.path for route in app.health.routes}


def instructions(name):
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in joined.splitlines() if line.startswith(f"{name} ")]


def commands():
    (cmd,) = instructions("CMD")
    found = {"Dockerfile": ast.literal_eval(cmd), "kubernetes": CONTAINER["args"]}
    return found | {name: each["command"] for name, each in COMPOSE["services"].items() if name == "front"}


@pytest.mark.parametrize("where", commands())
def test_the_commands_are_those_of_the_program(where):
    name, *words = commands()[where]
    assert name == "serve"
    context = serve.make_context("serve", list(words))
    assert (context.params["host"], context.params["port"]) == ("0.0.0.0", 8000)
    assert context.params["base_model"] == "/models/base"


def test_the_image_runs_as_a_user_and_writes_to_tmp_alone():
    assert instructions("USER")[-1] == "10001:10001"
    assert instructions("ENTRYPOINT") == ['["softprompt"]']
    assert "HOME=/tmp" in instructions("ENV")[-1]
    assert not re.search(r"^ADD |:latest|sudo|curl .*\| *sh", DOCKERFILE, re.MULTILINE)
    copied = {word for line in instructions("COPY") if "--from" not in line for word in shlex.split(line)[:-1]}
    assert all((ROOT / word).exists() for word in copied)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*" and {f"!{word}" for word in copied} <= set(ignored)
    for name in ("server", "front"):
        service = COMPOSE["services"][name]
        assert service["read_only"] and service["tmpfs"] == ["/tmp"]
    for service in COMPOSE["services"].values():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert "ports" not in COMPOSE["services"]["vllm"]
    assert POD["securityContext"]["runAsNonRoot"] and CONTAINER["securityContext"]["readOnlyRootFilesystem"]
    (mounted,) = [each for each in CONTAINER["volumeMounts"] if not each.get("readOnly")]
    assert mounted["mountPath"] == "/tmp"


def test_the_page_and_the_files_say_how_keys_are_asked_for():
    page = (ROOT / "docs/serving.md").read_text().partition("## Docker and Kubernetes")[2]
    (override,) = [each for each in page.split("```yaml\n") if "--api-key-file" in each.partition("```")[0]]
    server = yaml.safe_load(override.partition("```")[0])["services"]["server"]
    (cmd,) = instructions("CMD")
    plain, keyed = (
        serve.make_context("serve", words[1:]).params for words in (ast.literal_eval(cmd), server["command"])
    )
    assert keyed == plain | {"api_key_file": server["volumes"][0].split(":")[1]}
    for path in ("compose.yaml", "deploy/kubernetes.yaml"):
        assert f"--api-key-file={keyed['api_key_file']}" in (ROOT / path).read_text()


def test_health_checks_ask_what_the_server_answers():
    asked = re.findall(r"127\.0\.0\.1:8000(/\w+)", DOCKERFILE)
    asked += [CONTAINER[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")]
    assert set(asked) == {"/ready", "/health"} <= PATHS
    drain = next(each for each in CONTAINER["args"] if each.startswith("--drain-seconds"))
    assert POD["terminationGracePeriodSeconds"] > float(drain.split("=")[1])


def test_the_image_installs_what_the_project_asks_for():
    (named,) = re.findall(r"'\.\[([\w,]+)\]'", DOCKERFILE)
    assert set(named.split(",")) <= PROJECT["optional-dependencies"].keys()
    (torch,) = re.findall(r'"(torch\b[^"]*)"', DOCKERFILE)
    assert torch in PROJECT["dependencies"]


def test_the_autoscaler_reads_a_metric_of_ours():
    (metric,) = KUBERNETES["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == f"softprompt_{_GAUGES['waiting'][0]}"
    target = KUBERNETES["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", KUBERNETES["Deployment"]["metadata"]["name"])
    labels = KUBERNETES["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert KUBERNETES["Service"]["spec"]["selector"].items() <= labels.items()
    assert KUBERNETES["Service"]["spec"]["ports"][0]["targetPort"] == CONTAINER["ports"][0]["name"]


def test_vllm_is_waited_for_and_takes_prompts_as_embeddings():
    services = COMPOSE["services"]
    assert services["front"]["depends_on"]["vllm"]["condition"] == "service_healthy"
    assert "healthcheck" in services["vllm"]
    assert "--enable-prompt-embeds" in services["vllm"]["command"]
    (upstream,) = [each for each in services["front"]["command"] if each.startswith("--upstream=")]
    assert upstream == "--upstream=http://vllm:8000"
    assert services["front"]["profiles"] == services["vllm"]["profiles"]
