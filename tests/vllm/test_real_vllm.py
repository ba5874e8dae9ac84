"""Stock vLLM computes what our own engine computes, for each way in which prompts are put to it.

`make test-vllm` installs vLLM's CPU build into an environment of its own and runs this; each start takes a minute.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

import softprompt
from oracles.real_model import smollm2
from oracles.serving import app_over, command_serving, until, write_prompt
from oracles.serving import running as running_here
from softprompt.backbone import load_base
from softprompt.bundled import model_directory
from softprompt.engine import EngineRow, PlainEngine
from softprompt.errors import UpstreamError
from softprompt.generation import Batcher, GenerationOptions, Request, TokenEvent, score_rows
from softprompt.inference import convert
from softprompt.prompts import Prompt
from softprompt.server.settings import ServeSettings
from softprompt.server.upstream.serving import upstream_of

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs/serving.md").read_text(encoding="utf-8")
PROGRAM = Path(os.environ.get("SOFTPROMPT_VLLM", HERE.parents[1] / ".venv-vllm" / "bin" / "vllm"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAM.exists(), reason=f"needs vLLM at {PROGRAM}: run make test-vllm"),
]

TEXTS = [
    "<|im_start|>user\nThe kettle broke after  one day.<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time",
    "Größe: 3 € 🙂",
    "a <prompt_embeds> b",
]
SERVED = {
    "embeddings beside text": ("--enable-prompt-embeds", "--chat-template", str(HERE / "through.jinja")),
    "embeddings": ("--enable-prompt-embeds",),
    "ids": (),
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
SMALL = ("--dtype", "float32", "--max-model-len", "512", "--enforce-eager")


@contextmanager
def answering(command: Any, url: str, log: Any, *, environment: Any, cwd: Any = "/") -> Any:
    """Run a server, wait until it is healthy, and give its process."""
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        cwd=cwd,
    )

    def ready() -> bool:
        assert process.poll() is None, f"{command} has ended; see {log.name}"
        try:
            return httpx.get(f"{url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        until(ready, 600)
        yield process
    finally:
        with suppress(ProcessLookupError):  # a test has killed it
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def started(folder: Any, log: Any, *options: str, port: int | None = None) -> Any:
    """Run ``vllm serve`` on a free port, wait until it answers, and give its address and its process."""
    port = port or free_port()
    url, words = f"http://127.0.0.1:{port}", [*SMALL, "--port", str(port), *options]
    environment = {**QUIET, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    with answering([PROGRAM, "serve", str(folder), *words], url, log, environment=environment) as process:
        yield url, process


@pytest.fixture(scope="module")
def base():
    return load_base(smollm2())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    root = tmp_path_factory.mktemp("prompts")
    write_prompt(root / "writer", base, seed=1, length=5, task="generation", labels=None, template="{{input}}")
    write_prompt(root / "complaints", base, seed=2, length=8)
    write_prompt(root / "persona", base, seed=3, length=6, task="generation", labels=None, template="{{input}}")
    config = root / "persona" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"placement": "chat_system"}))
    return root


@dataclass
class Case:
    """One vLLM server: how prompts are put to it, where it is, and what it serves."""

    way: str
    url: str
    base_model: str
    prompts: Any
    answers: Any
    scores: Any


@pytest.fixture(scope="module", params=SERVED)
def case(request, base, folder, tmp_path_factory):
    way, place = request.param, tmp_path_factory.mktemp("vllm")
    model = str(smollm2())
    if way == "ids":
        model = str(place / "exported")
        others = {name: folder / name for name in ("complaints", "persona")}
        convert(folder / "writer", model, to="extended-vocab", add=others)
    with (place / "log").open("w") as log, started(model, log, *SERVED[way]) as (url, _):
        light = load_base(model, runs=False)
        settings = ServeSettings(base_model=model, prompts=str(folder), engine="vllm", upstream=(url,))
        answers, scores, _ = upstream_of(light, settings)
        yield Case(way, url, model, folder, answers, scores)
        answers.stop()


def values(folder: Any, name: str) -> Prompt:
    from safetensors.torch import load_file

    return Prompt(load_file(folder / name / "adapter_model.safetensors")["prompt_embeddings"])


@pytest.fixture(scope="module")
def requests(base, folder):
    """Inputs of two prompts and none, with the prompt before, among and behind the input's tokens."""
    found = []
    for prompt in (values(folder, "writer"), values(folder, "complaints"), None):
        for text in TEXTS:
            ids = tuple(base.tokenizer(text)["input_ids"])
            for at in {0, 3, len(ids)} if prompt else {0}:
                options = GenerationOptions(12, stop_sequences=(" the", "zz"))
                found.append(Request(ids, prompt, at, options, logprobs=3))
    return found


@pytest.fixture(scope="module")
def expected(base, requests):
    batcher = Batcher(base)
    found = [list(ticket) for ticket in [batcher.submit(each) for each in requests]]
    batcher.stop()
    return found


@torch.no_grad()
def extra_shares(case, base, requests, expected):
    """What an export's extra ids weigh at each place of each answer, by transformers; else nothing."""
    if case.way != "ids":
        return [[0.0] * (len(each) - 1) for each in expected]
    exported = AutoModelForCausalLM.from_pretrained(case.base_model, dtype=torch.float32).eval()
    vocabulary, found = base.model.get_input_embeddings().weight.shape[0], []
    for request, events in zip(requests, expected, strict=True):
        extra = case.answers._carriage.extra_ids(request.prompt) if request.prompt else []
        tokens = [each.token_id for each in events[:-1]]
        ids = [*request.ids[: request.at], *extra, *request.ids[request.at :], *tokens]
        logits = exported(torch.tensor([ids])).logits[0, -len(tokens) - 1 : -1]
        found.append(logits.softmax(-1)[:, vocabulary:].sum(-1).tolist())
    return found


def test_greedy_answers_and_log_probabilities_are_ours(case, base, requests, expected):
    assert case.way in case.answers.reason
    found = [list(ticket) for ticket in [case.answers.submit(each) for each in requests]]
    worst, shares = 0.0, extra_shares(case, base, requests, expected)
    for own, theirs, lost in zip(expected, found, shares, strict=True):
        assert own[-1] == theirs[-1]
        for one, other, share in zip(own[:-1], theirs[:-1], lost, strict=True):
            assert isinstance(one, TokenEvent)
            assert (one.token_id, one.text) == (other.token_id, other.text)
            lower = math.log1p(-share)
            worst = max(worst, abs(one.logprob - other.logprob + lower))
            known = dict(other.top_logprobs)
            assert len(known) == 3
            pairs = [(value, known[token]) for token, value in one.top_logprobs if token in known]
            worst = max(worst, *(abs(value - there + lower) for value, there in pairs))
    print(f"\n{case.way}: {len(found)} answers equal, log-probabilities off by at most {worst:.1e}")
    assert worst < 1e-4


@pytest.fixture(scope="module")
def rows(base, folder):
    """Three labels behind each input, behind a prompt and behind none."""
    prompt = values(folder, "complaints")
    labels = [(*base.tokenizer(f" {text}")["input_ids"], 2) for text in ("complaint", "no complaint", "praise")]
    sources = [tuple(base.tokenizer(text)["input_ids"]) for text in TEXTS]
    return [EngineRow(source, label, own) for own in (prompt, None) for source in sources for label in labels]


@pytest.fixture(scope="module")
def own_scores(base, rows):
    return score_rows(PlainEngine(base), rows, max_rows=len(rows))


def test_label_scores_are_ours(case, rows, own_scores):
    worst = float((own_scores - case.scores.submit(rows).result()).abs().max())
    print(f"\n{case.way}: {len(rows)} label scores off by at most {worst:.1e}")
    assert worst < 1e-4


def test_the_server_reads_the_tokens_that_were_meant(case, requests):
    """What vLLM says it read, text for text; behind embeddings alone it has no ids to say."""
    for request in requests:
        (facts,) = case.answers._fleet.facts
        question = case.answers._carriage.question(request, facts, stream=False, max_tokens=1, min_tokens=0)
        answer = httpx.post(case.url + question.path, json=question.body, timeout=60).json()
        ids = answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"]
        if "prompt_embeds" in question.body:
            assert len(ids) == len(request.ids) + request.virtual_tokens
            continue
        virtual = request.virtual_tokens
        assert (*ids[: request.at], *ids[request.at + virtual :]) == request.ids
    paths = [case.answers._carriage.question(each, facts).path for each in requests if each.prompt]
    beside = paths.count("/v1/chat/completions")
    assert (0 < beside < len(paths)) if case.way == "embeddings beside text" else beside == 0


@pytest.fixture(scope="module")
def complaint(base, folder):
    """What a prompt itself answers to the input of the page, greedily."""
    prompt = softprompt.load(folder / "complaints", base_model=base.name)
    (answer,) = prompt.generate(["My parcel is late"], max_new_tokens=8)
    return answer.text.strip()


def test_a_request_that_was_written_to_a_file(case, folder, base, complaint, tmp_path):
    """``convert --to vllm``: posted as it is, with the name that the server has."""
    if case.way == "ids":
        pytest.skip("started without --enable-prompt-embeds")
    convert(folder / "complaints", tmp_path / "r.json", to="vllm", text="My parcel is late", base_model=base.name)
    body = json.loads((tmp_path / "r.json").read_text()) | {"model": case.base_model, "max_tokens": 8}
    answer = httpx.post(f"{case.url}/v1/completions", json=body, timeout=60)
    assert answer.json()["choices"][0]["text"].strip() == complaint


@pytest.fixture
def shell(tmp_path, folder):
    """A folder with the page's prompts, and an environment with its commands; vLLM's is small and in float32."""
    copytree(folder, tmp_path / "prompts")
    for name, command in {
        "vllm": f'PYTHONPATH= exec {PROGRAM} "$@" {" ".join(SMALL)}',
        "softprompt": f'exec {sys.executable} -m softprompt "$@"',
    }.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{command}\n")
        program.chmod(0o755)
    return {**QUIET, "HF_HUB_OFFLINE": "1", "PATH": f"{program.parent}:{os.environ['PATH']}"}


def block(language: str, start: str) -> str:
    """Return the one block of the page that has these words."""
    (found,) = [
        each.partition("```")[0] for each in PAGE.split(f"```{language}\n")[1:] if start in each.partition("```")[0]
    ]
    return found


def test_the_commands_of_the_page(shell, tmp_path, base):
    """docs/serving.md, "Serving with vLLM", as typed but for the base and the ports."""
    first, second = free_port(), free_port()
    typed = block("sh", "--engine vllm").replace("path/to/base", str(smollm2())).replace("8001", str(first))
    template, ours = typed.partition("vllm serve")[0], typed.rstrip().rpartition("\n")[2]
    theirs = typed[len(template) :].partition("\n")[0]
    subprocess.run(["bash", "-c", template], cwd=tmp_path, check=True)
    assert (tmp_path / "through.jinja").read_text() == (HERE / "through.jinja").read_text()
    where = {"environment": shell, "cwd": tmp_path}
    urls = [f"http://127.0.0.1:{port}" for port in (first, second)]
    with (
        (tmp_path / "log").open("w") as log,
        answering(["bash", "-c", theirs], urls[0], log, **where),
        answering(["bash", "-c", f"{ours} --port {second}"], urls[1], log, **where),
    ):
        sent = {"model": "writer", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{urls[1]}/v1/completions", json=sent, timeout=120).raise_for_status().json()
    own = softprompt.load(tmp_path / "prompts" / "writer", base_model=base.name)
    assert (
        answer["choices"][0]["text"].strip() == own.generate(["Once upon a time"], max_new_tokens=8)[0].text.strip()
    )


def test_what_the_page_does_without_this_server(shell, tmp_path, complaint):
    """docs/serving.md, "Without this server": its commands and its client as they stand, but for the port."""
    port = free_port()
    export, serve = block("sh", "--add writer=").strip().splitlines()
    subprocess.run(["bash", "-c", export], cwd=tmp_path, check=True, env={**os.environ, **shell})
    code = (
        block("python", "for each in prompts.values() for i in each")
        .replace(":8000/", f":{port}/")
        .replace("OpenAI(base", "answer = OpenAI(base")
    )
    code = code.replace("temperature=0", "temperature=0, max_tokens=8") + "print(answer.choices[0].text.strip())"
    command, url = ["bash", "-c", f"{serve} --port {port}"], f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("w") as log, answering(command, url, log, environment=shell, cwd=tmp_path):
        said = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
        )
    assert said.stdout.strip() == complaint


def test_over_http_many_clients_at_once_get_what_each_gets_alone(case, base):
    with command_serving(
        case.base_model, case.prompts, engine="vllm", upstream=(case.url,), served_model_name=("smol",)
    ) as server:
        client = server.openai()

        def ask(given):
            model, text = given
            stream = client.completions.create(
                model=model,
                prompt=text,
                max_tokens=8,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = list(stream)
            return "".join(each.choices[0].text for each in chunks if each.choices), chunks[
                -1
            ].usage.completion_tokens

        todo = [(model, text) for model in ("writer", "smol") for text in TEXTS] * 2
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(ask, todo))
        assert together == [ask(each) for each in todo[: len(todo) // 2]] * 2
        chat = {"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 8, "temperature": 0}
        assert client.chat.completions.create(model="writer", **chat).choices[0].message.content
        sampled = [
            client.completions.create(model="writer", prompt="A", max_tokens=8, temperature=1, seed=5, n=2)
            for _ in range(2)
        ]
        texts = [[choice.text for choice in each.choices] for each in sampled]
        assert texts[0] == texts[1]
        assert texts[0][0] != texts[0][1]
        formed = client.completions.create(
            model="writer", prompt="A", temperature=0, extra_body={"guided_choice": ["yes", "no"]}
        )
        assert formed.choices[0].text in ("yes", "no")
        assert formed.choices[0].finish_reason == "stop"


def test_a_prompt_in_the_system_turn_is_read_there(case, base):
    turns = [{"role": "user", "content": text} for text in TEXTS]
    chats = [turns[:1], [turns[1], {"role": "assistant", "content": "Yes?"}, turns[2]]]
    asked = [(chat, {"model": model}) for chat in chats for model in ("persona", "smol")]

    def answers_of(server):
        ask, greedy = server.openai().chat.completions.create, {"max_tokens": 8, "temperature": 0}
        return [ask(messages=chat, **of, **greedy).choices[0].message.content for chat, of in asked]

    with running_here(app_over(base, case.prompts, served_model_name=("smol",))) as server:
        ours = answers_of(server)
    named = {"served_model_name": ("smol",)}
    with command_serving(case.base_model, case.prompts, engine="vllm", upstream=(case.url,), **named) as server:
        assert answers_of(server) == ours
    assert len(set(ours)) == len(asked)


def test_a_request_that_is_hung_up_on_ends_there(case, base):
    options = GenerationOptions(400, min_new_tokens=400)
    ticket = case.answers.submit(Request((504, 3575), None, 0, options))
    until(lambda: running(case.url) == 1, 60)
    ticket.cancel()
    until(lambda: running(case.url) == 0, 60)
    assert ticket.result()[0].reason == "cancelled"


def test_the_bench_of_serving_runs_beside_vllm(tmp_path):
    pytest.importorskip("peft", reason="the bench holds answers to PEFT's")
    words = ["--model", "demo", "--requests", "4", "--clients", "2", "--vllm", str(PROGRAM), "--json"]
    root = HERE.parents[1]
    own = {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, root / "bench/serving.py", *words],
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ways = {"ours", "vLLM, prompts as extra vocabulary"}
    assert found["equal_to_solo"] == dict.fromkeys(ways, 1.0)
    assert {each["way"] for each in found["rows"]} == {*ways, "PEFT, one request at a time"}


def test_one_that_is_killed_comes_back_and_another_in_its_place_is_refused(tmp_path):
    base, port = load_base("demo"), free_port()
    write_prompt(tmp_path / "writer", base, seed=1, length=5, task="generation", labels=None, template="{{input}}")
    prompt, ids = values(tmp_path, "writer"), tuple(base.tokenizer("The kettle broke")["input_ids"])
    short = Request(ids, prompt, 0, GenerationOptions(12))
    batcher = Batcher(base)
    ours = list(batcher.submit(short))[-1]
    batcher.stop()
    other = load_base(copytree(model_directory(), tmp_path / "other"))
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(-1)
    other.model.save_pretrained(tmp_path / "other")
    settings = ServeSettings(
        base_model="demo", prompts=str(tmp_path), engine="vllm", upstream=(f"http://127.0.0.1:{port}",)
    )
    served = (str(model_directory()), "--enable-prompt-embeds")
    with (tmp_path / "log").open("w") as log:
        with started(served[0], log, *served[1:], port=port) as (_, process):
            answers, _, _ = upstream_of(load_base("demo", runs=False), settings)
            assert list(answers.submit(short))[-1] == ours
            long = iter(answers.submit(Request(ids, prompt, 0, GenerationOptions(150, min_new_tokens=150))))
            assert isinstance(next(long), TokenEvent)
            os.killpg(process.pid, signal.SIGKILL)
            with pytest.raises(UpstreamError, match="broke off"):
                list(long)
        with pytest.raises(UpstreamError, match="can be reached"):
            answers.submit(short).result()
        assert not answers.healthy
        with started(tmp_path / "other", log, *served[1:], port=port):
            with pytest.raises(UpstreamError, match=r"another model than demo: log-probabilities of a text differ"):
                answers.submit(short).result()
        with started(served[0], log, *served[1:], port=port):
            assert list(answers.submit(short))[-1] == ours
        answers.stop()


def running(url):
    (line,) = [
        x for x in httpx.get(f"{url}/metrics").text.splitlines() if x.startswith("vllm:num_requests_running{")
    ]
    return float(line.rpartition(" ")[2])


def test_a_server_without_embeddings_is_known_for_it(case):
    takes = [(each.takes_embeds, each.takes_parts) for each in case.answers._fleet.facts]
    assert takes == [
        {"embeddings beside text": (True, True), "embeddings": (True, False), "ids": (False, False)}[case.way]
    ]
    assert torch.is_tensor(case.answers._base.embedding.weight)
