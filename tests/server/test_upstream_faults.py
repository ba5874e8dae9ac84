"""vLLM servers that fail, are other ones, or are asked much: one client's request is no other's trouble."""

import asyncio
import subprocess
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
import torch

from oracles.fake_vllm import faked, over
from oracles.families import tiny
from oracles.serving import until
from oracles.slow import only
from softprompt.backbone import Base, load_base
from softprompt.errors import ArtifactError, UsageError
from softprompt.generation import Request
from softprompt.inference import convert
from softprompt.prompts import Prompt
from softprompt.server.settings import ServeSettings
from softprompt.server.upstream.carriage import Carriage
from softprompt.server.upstream.fleet import Fleet, UpstreamFacts, UpstreamRequest
from softprompt.server.upstream.serving import probe_scores, upstream_of

BODY = {"model": "writer", "prompt": "the parcel  is late", "max_tokens": 6, "temperature": 0}
COMPLETIONS = "/v1/completions"


def test_others_are_answered_while_a_question_is_made(front, fake, monkeypatch):
    client, making, go_on, threads = front[1], threading.Event(), threading.Event(), []
    question = Carriage.question

    def held(self, request, facts, *args, **more):
        if len(request.ids) > 50:
            threads.append(threading.current_thread().name)
            making.set()
            assert go_on.wait(20)
        return question(self, request, facts, *args, **more)

    fake.slow = 0.1
    with client.stream(
        "POST", COMPLETIONS, json={**BODY, "max_tokens": 5, "min_tokens": 5, "stream": True}
    ) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        monkeypatch.setattr(Carriage, "question", held)
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(client.post, COMPLETIONS, json={**BODY, "prompt": "late " * 60})
            assert making.wait(20)
            began = time.monotonic()
            assert client.get("/health").status_code == 200
            assert time.monotonic() - began < 2
            assert list(lines)[-1] == "data: [DONE]", "an answer that has begun goes on"
            assert not long.done()
            go_on.set()
            assert long.result(20).status_code == 200
    assert all("softprompt-questions" in name for name in threads)


def test_questions_are_made_in_their_order_and_for_those_who_still_wait():
    async def ask(server):
        return UpstreamFacts("m")

    fleet, made, go_on = Fleet(["http://127.0.0.1:1"], ask, seconds=1.0), [], threading.Event()

    def of(number):
        def make(facts):
            made.append(number)
            assert go_on.wait(20)
            return UpstreamRequest("/", {})

        return make

    waiting = [fleet.run(fleet.whole(of(number))) for number in range(5)]
    until(lambda: made == [0])
    waiting[2].cancel()
    time.sleep(0.05)
    go_on.set()
    for each in waiting:
        with pytest.raises((Exception, CancelledError)):
            each.result(20)
    assert made == [0, 1, 3, 4]
    fleet.stop()


@pytest.mark.parametrize(
    ("behaviour", "health", "aside"),
    [
        (500, 200, False),
        pytest.param(500, 404, False, marks=pytest.mark.slow),
        (500, 503, True),
        pytest.param(500, "hang", True, marks=pytest.mark.slow),
        pytest.param("error", 200, False, marks=pytest.mark.slow),
        pytest.param("error", 500, True, marks=pytest.mark.slow),
        ("break", 200, False),
        ("hang", 200, False),
        pytest.param("hang", 503, True, marks=pytest.mark.slow),
        (502, 200, True),
        pytest.param(503, 200, True, marks=pytest.mark.slow),
        pytest.param(401, 200, True, marks=pytest.mark.slow),
        (418, 200, False),
    ],
)
def test_a_server_is_set_aside_for_what_is_its_own_fault_alone(front, fake, monkeypatch, behaviour, health, aside):
    monkeypatch.setattr("softprompt.server.upstream.fleet._CONNECT_SECONDS", 0.5)
    server, client = front
    fleet = server.service.batcher._fleet
    (upstream,) = fleet.servers
    fake.behaviour, fake.health = behaviour, health
    monkeypatch.setattr(fleet._client, "timeout", httpx.Timeout(0.5 if behaviour == "hang" else 3.0))
    assert client.post(COMPLETIONS, json=BODY).status_code in (502, 503)
    fake.behaviour = 200
    if behaviour not in (401, 502, 503):
        until(lambda: upstream.examined is not None and upstream.examined.done())
    assert (upstream.aside_until > time.monotonic()) == aside == (client.get("/ready").status_code == 503)
    assert sum(fleet.errors.values()) == 1
    assert client.post(COMPLETIONS, json=BODY).status_code == 200


def test_a_template_that_changed_is_noticed(front, fake, monkeypatch):
    server, client = front
    (upstream,) = server.service.batcher._fleet.servers
    facts = upstream.facts
    assert facts.takes_parts
    monkeypatch.setattr(fake, "through", False)
    answer = client.post(COMPLETIONS, json=BODY)
    assert (answer.status_code, "see its chat template" in answer.text) == (502, True)
    until(upstream.examined.done)
    assert client.post(COMPLETIONS, json=BODY).status_code == 200, "as embeddings alone"
    assert (upstream.facts.takes_embeds, upstream.facts.takes_parts) == (True, False)
    upstream.facts = facts  # as the template is again


def test_requests_go_on_while_a_server_that_broke_off_is_asked_anew(front, fake, monkeypatch):
    server, client = front
    fleet = server.service.batcher._fleet
    (upstream,) = fleet.servers
    ask, asking, go_on = fleet._ask, threading.Event(), threading.Event()

    async def held(each):
        asking.set()
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        return replace(await ask(each), version="another")

    monkeypatch.setattr(fleet, "_ask", held)
    fake.behaviour = "break"
    assert client.post(COMPLETIONS, json=BODY).status_code == 502
    fake.behaviour = 200
    assert asking.wait(20)
    assert client.post(COMPLETIONS, json=BODY, timeout=5).status_code == 200
    go_on.set()
    until(upstream.examined.done)
    assert upstream.facts.version == "another"


@pytest.mark.slow
def test_requests_that_fail_do_not_take_a_server_from_the_others(base, shared_prompts):
    with faked(base) as first, faked(base) as second:
        with over([first, second], shared_prompts) as server, server.client() as client:
            first.behaviour = second.behaviour = 500
            assert [client.post(COMPLETIONS, json=BODY).status_code for _ in range(4)] == [502] * 4
            first.behaviour = second.behaviour = 200
            before = len(first.bodies), len(second.bodies)
            assert client.get("/ready").status_code == 200
            assert [client.post(COMPLETIONS, json=BODY).status_code for _ in range(4)] == [200] * 4
            assert (len(first.bodies) - before[0], len(second.bodies) - before[1]) == (2, 2)


def settings_of(fake, **changes):
    given = {"base_model": "demo", "prompts": "none", "engine": "vllm", "upstream": (fake.url,)}
    return ServeSettings(**given, served_model_name=("demo",), **changes)


def refused(fake, base, match, **changes):
    with pytest.raises(UsageError, match=match) as raised:
        upstream_of(base, settings_of(fake, **changes))
    assert "\n" not in str(raised.value)


def bent(base):
    """The demo model with another layer: its tokenizer and its embedding are the same."""
    other = load_base("demo")
    with torch.no_grad():
        name, weight = [pair for pair in other.model.named_parameters() if "layers.1" in pair[0]][2]
        weight.mul_(-2)
    return other


@pytest.mark.parametrize("embeds", only([False], [True, False]))
def test_another_model_of_the_same_words_and_embedding_is_found_out(base, embeds):
    with faked(bent(base), embeds=embeds) as fake:
        here = load_base("demo", runs=False)
        refused(fake, here, "another model than demo: log-probabilities of a text differ by .* nats")
        answers, *_ = upstream_of(here, settings_of(fake, ignore_fingerprint=True))
        assert answers.healthy
        answers.stop()


def test_a_base_that_is_large_or_has_code_of_its_own_is_compared_by_its_words_alone(base, monkeypatch):
    """Its pass would be of minutes, or raise: what the servers say of an id and an embedding is left."""
    here = load_base("demo", runs=False)
    assert len(probe_scores(here)) > 3

    def raises(*_, **__):
        raise NotImplementedError("on weights that are only mapped")

    with monkeypatch.context() as patch:
        patch.setattr(here.model, "forward", raises)
        assert probe_scores(here) == []
    monkeypatch.setattr("softprompt.server.upstream.serving._MOST_BYTES", 1)
    assert probe_scores(here) == []
    with faked(bent(base)) as fake:
        answers, *_ = upstream_of(here, settings_of(fake))
        assert answers.healthy
        answers.stop()


def test_a_base_with_an_encoder_is_refused(base):
    seq2seq = Base(tiny("t5"), base.tokenizer, "demo")
    with faked(base) as fake:
        refused(fake, seq2seq, "vLLM has no prompts before an encoder; serve this base with --engine own")


def test_a_server_of_another_embedding_or_that_fails_on_embeddings_is_refused(base, monkeypatch):
    """Also where bases are not compared: prompts are rows of this base's embedding."""
    other = load_base("demo")
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.5)
    here = load_base("demo", runs=False)
    with faked(other) as fake:
        told = "whose embeddings of a text give other log-probabilities than the text's ids; pass the --base-model"
        refused(fake, here, told, ignore_fingerprint=True)
    with faked(base) as fake:
        whole = fake.whole

        def failing(body):
            fake.behaviour = 500  # from the next question on, which is the first of embeddings
            return whole(body)

        monkeypatch.setattr(fake, "whole", failing)
        refused(fake, here, r"it is 500\); start vLLM first", ignore_fingerprint=True)


def test_a_server_that_takes_no_parts_is_sent_embeddings(base, monkeypatch):
    with faked(base) as fake:
        read = fake.read

        def partless(body):
            if "messages" in body:
                raise ValueError("Unknown part type: prompt_embeds")
            return read(body)

        monkeypatch.setattr(fake, "read", partless)
        answers, *_ = upstream_of(load_base("demo", runs=False), settings_of(fake))
        (facts,) = answers._fleet.facts
        answers.stop()
    assert (facts.takes_embeds, facts.takes_parts) == (True, False)


def test_a_server_that_is_too_busy_to_be_asked_is_asked_again_later(front, fake, monkeypatch):
    """It is well, so it is not set aside; what is known of it is not taken for true."""
    server, client = front
    (upstream,) = server.service.batcher._fleet.servers
    whole = fake.whole

    def busy(body):
        fake.behaviour = 429
        return whole(body)

    monkeypatch.setattr(fake, "whole", busy)
    fake.behaviour = "break"
    assert client.post(COMPLETIONS, json=BODY).status_code == 502
    until(lambda: upstream.examined is not None and upstream.examined.done())
    assert (fake.behaviour, upstream.known) == (429, False)
    monkeypatch.undo()
    fake.behaviour = 200
    assert client.post(COMPLETIONS, json=BODY).status_code == 200
    assert upstream.known
    assert upstream.aside_until <= time.monotonic()


def test_an_export_behind_which_its_base_stands_is_found_out(base, shared_prompts, tmp_path):
    convert(shared_prompts / "writer", tmp_path / "exported", to="extended-vocab")
    with faked(base) as fake:
        here = load_base(tmp_path / "exported", runs=False)
        refused(fake, here, "it has not the extra vocabulary of .*; serve that folder there")


def test_an_export_of_another_model_is_found_out(base, shared_prompts, tmp_path):
    convert(shared_prompts / "writer", tmp_path / "exported", to="extended-vocab")
    behind = load_base(tmp_path / "exported")
    with torch.no_grad():
        [weight for name, weight in behind.model.named_parameters() if "layers.1" in name][2].mul_(-2)
    with faked(behind, embeds=False) as fake:
        here = load_base(tmp_path / "exported", runs=False)
        refused(fake, here, "log-probabilities of a text")


def test_a_server_of_other_words_is_found_out(base):
    tokenizer = base.tokenizer
    with faked(base, embeds=False) as fake:
        fake.tokenizer = lambda text, **settings: {"input_ids": tokenizer(text, **settings)["input_ids"][:-1]}
        refused(fake, base, "it reads 'On 7 May 2024 .* as other tokens; pass the --base-model")
        special = tokenizer.all_special_tokens[0]

        def swapped(text, **settings):
            ids = tokenizer(text, **settings)["input_ids"]
            return {"input_ids": ids[::-1] if special in text else ids}

        fake.tokenizer = swapped
        refused(fake, base, "as other tokens")
        fake.tokenizer = None  # a router that has no such route
        answers, *_ = upstream_of(base, settings_of(fake))
        answers.stop()


def test_a_server_of_more_positions_is_found_out(base):
    with faked(base, embeds=False) as fake:
        fake.listed = [{**fake.listed[0], "max_model_len": base.facts.context_length + 1}]
        refused(fake, base, "it takes .* tokens, the base has .* positions; .*, or --ignore-fingerprint")
        answers, *_ = upstream_of(base, settings_of(fake, ignore_fingerprint=True))
        answers.stop()


def test_of_several_models_the_base_is_asked(base):
    adapter = {"id": "lora", "parent": "served", "max_model_len": 200}
    with faked(base) as fake:
        for listed, name in (
            ([adapter, *fake.listed], "served"),
            ([{"id": "x"}, {"id": "demo"}], "demo"),
            ([{"id": "x"}, {"id": "y", "root": "/models/demo"}, {"id": "z", "root": "demo"}], "z"),
            ([{"id": "a", "root": "/models/x"}, {"id": "b", "root": "/models/x"}, adapter], "a"),
        ):
            fake.listed = listed
            answers, *_ = upstream_of(base, settings_of(fake))
            answers.stop()
            assert fake.bodies[-1]["model"] == name
        fake.listed = [{"id": "x"}, {"id": "y"}]
        refused(fake, base, r"several models \(x, y\); name one of them with --served-model-name")


def test_a_prompt_is_compared_with_an_export_once(base, shared_prompts, tmp_path, monkeypatch):
    convert(shared_prompts / "writer", tmp_path / "exported", to="extended-vocab")
    carriage = Carriage(load_base(tmp_path / "exported", runs=False), frozenset({2}), 2)
    compared, allclose = [], torch.allclose
    monkeypatch.setattr(torch, "allclose", lambda *args, **more: compared.append(1) or allclose(*args, **more))
    ((ids, rows),) = carriage._exported
    for prompt, found in ((Prompt(rows.clone()), ids), (Prompt(rows + 1), None)):
        request = Request((5, 6), prompt)
        for _ in range(3):
            carriage.check(request)
            sent = carriage.question(request, UpstreamFacts("m", takes_embeds=True)).body
            assert ("prompt" in sent) == (found is not None)
    assert len(compared) == 2


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"{}",
        b'{"prompts": 3}',
        b'{"prompts": {"a": 3}}',
        b'{"prompts": {"a": {"token_ids": "12"}}}',
        b'{"prompts": {"a": {"token_ids": [1.5]}}}',
        b'{"prompts": {"a": {"token_ids": [999999]}}}',
        b'{"prompts": {"a": {"token_ids": [-1]}}}',
        b'{"prompts": {"a": {"token_ids": [[1]]}}}',
        b'{"prompts":' * 50_000,
        b'{"prompts": {"a": {"token_ids": [1]}}, "b": "' + b"x" * (3 << 20) + b'"}',
    ],
)
def test_a_damaged_record_of_an_export_is_one_clear_line(base, tmp_path, record):
    (tmp_path / "softprompt_prompts.json").write_bytes(record)
    with pytest.raises(ArtifactError, match=r"softprompt_prompts\.json") as raised:
        Carriage(SimpleNamespace(name=str(tmp_path), embedding=base.embedding), frozenset({2}), 2)
    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3 -subj /CN=127.0.0.1"
    words += " -addext subjectAltName=IP:127.0.0.1"
    try:
        subprocess.run(
            ["openssl", *words.split(), "-keyout", folder / "key", "-out", folder / "cert"],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("needs openssl, to make a certificate")
    return str(folder / "cert"), str(folder / "key")


def test_certificates_are_those_of_the_environment_and_proxies_are_not(
    base, shared_prompts, certificate, tmp_path, monkeypatch
):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    with faked(base, tls=certificate) as fake:
        refused(fake, base, "CERTIFICATE_VERIFY_FAILED")
        monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
        with over([fake], shared_prompts) as server, server.client(trust_env=False) as client:
            assert client.post(COMPLETIONS, json=BODY).status_code == 200
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
        refused(fake, base, "SSL_CERT_FILE or SSL_CERT_DIR .* cannot be read")
