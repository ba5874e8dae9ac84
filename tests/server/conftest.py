"""One server over the bundled model for all tests that only ask it things."""

import copy
import shutil

import browser
import pytest

from oracles.fake_vllm import faked, over
from oracles.serving import PAIRS, app_over, running, until, write_prompt
from softprompt.backbone import load_base


@pytest.fixture(scope="session")
def base():
    found = load_base("demo")
    found.model.requires_grad_(False)
    return found


@pytest.fixture(scope="session")
def chat_base(base):
    """The same model with a tokenizer that has a chat template."""
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}"
        "{% endif %}{{ m['role'] }} : {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    return type(base)(base.model, tokenizer, base.name)


def fill(root, base):
    write_prompt(root / "complaints", base, seed=1, length=4)
    write_prompt(
        root / "writer",
        base,
        seed=2,
        length=3,
        task="generation",
        labels=None,
        template="{{input}}",
    )
    write_prompt(root / "pairs", base, seed=3, task="generation", labels=None, template=PAIRS)
    write_prompt(root / "plain-peft", base, seed=4, length=2, manifest=False)
    return root


@pytest.fixture
def prompts(tmp_path, shared_prompts):
    """A folder of prompts of one's own."""
    return shutil.copytree(shared_prompts, tmp_path / "prompts")


@pytest.fixture(scope="session")
def shared_prompts(tmp_path_factory, base):
    return fill(tmp_path_factory.mktemp("prompts"), base)


@pytest.fixture(scope="session")
def server(base, shared_prompts):
    with running(app_over(base, shared_prompts)) as found:
        yield found


@pytest.fixture(scope="session")
def client(server):
    with server.client() as found:
        yield found


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """A headless browser; skips with the reason where there is none."""
    if reason := browser.missing():
        pytest.skip(reason)
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def chat_server(chat_base, shared_prompts):
    with running(app_over(chat_base, shared_prompts)) as found:
        yield found


@pytest.fixture(scope="module")
def fake(base):
    """A stand-in for a vLLM server that has the base."""
    with faked(base) as found:
        yield found


@pytest.fixture(scope="module")
def shared_front(fake, shared_prompts):
    with over([fake], shared_prompts, upstream_seconds=3.0) as server, server.client() as client:
        yield server, client


@pytest.fixture
def front(fake, shared_front):
    """A server of ours before it, and its client; both stand-in and server are well again behind a test."""
    yield shared_front
    fake.behaviour, fake.health, fake.slow = 200, 200, 0.0
    fleet = shared_front[0].service.batcher._fleet
    fleet.errors.clear()
    for each in fleet.servers:
        until(lambda server=each: server.examined is None or server.examined.done())
        each.aside_until = 0.0
