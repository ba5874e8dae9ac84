"""``softprompt serve`` as a process: what it says, what it refuses, and how it stops."""

import signal
import socket
import sys
import threading
import time

import httpx
import openai
import pytest
import uvicorn
from click.testing import CliRunner

from oracles.server_process import serving
from oracles.serving import write_prompt
from softprompt.backbone import load_base
from softprompt.cli.main import run
from softprompt.cli.serve import command
from softprompt.generation import Bounds
from softprompt.server.app import serve
from softprompt.server.settings import ServeSettings


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    root = tmp_path_factory.mktemp("prompts")
    base = load_base("demo")
    write_prompt(root / "writer", base, task="generation", labels=None, template="{{input}}")
    return root


@pytest.mark.slow
def test_sigterm_lets_running_answers_finish(prompts):
    with serving(prompts, "--drain-seconds", "20") as (process, url, lines):
        assert lines[:2] == ["demo: 1 prompt ready; forest engine\n", f"page {url}/ and API {url}/docs\n"]
        assert lines[2].startswith(f"try curl {url}/v1/completions ")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        ask = {
            "model": "writer",
            "prompt": "My parcel",
            "max_tokens": 300,
            "temperature": 1.5,
            "seed": 3,
        }
        ask["extra_body"] = {"min_tokens": 300}
        stream = iter(client.completions.create(**ask, stream=True))
        text = next(stream).choices[0].text
        whole = []
        other = threading.Thread(target=lambda: whole.append(client.completions.create(**ask).choices[0].text))
        other.start()
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        reasons = []
        for chunk in stream:
            text += chunk.choices[0].text
            reasons.append(chunk.choices[0].finish_reason)
        other.join()
        assert reasons[-1] == "length"
        assert whole == [text]
        assert process.wait(20) == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")
        assert process.stderr.read() == ""


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait(prompts):
    # One answer at a time: all sixty would take a minute.
    one = ("--max-batch-rows", "1", "--drain-seconds", "300")
    with serving(prompts, *one) as (process, url, _):
        ask = {"model": "writer", "prompt": ["My parcel"] * 60, "max_tokens": 400}
        ask |= {"min_tokens": 400, "stream": True}
        with (
            httpx.Client(timeout=20) as client,
            client.stream("POST", f"{url}/v1/completions", json=ask) as stream,
        ):
            next(stream.iter_lines())
            process.send_signal(signal.SIGINT)
            with pytest.raises(httpx.TransportError):
                for _ in range(500):
                    httpx.get(f"{url}/health")
            process.send_signal(signal.SIGINT)
            assert process.wait(15) == 130
        assert process.stderr.read().strip() == "interrupted"


def refused(capsys, *words):
    """Run the command with what it must refuse, and return its one line."""
    assert run(["serve", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("Error: ")
    return err


def test_what_is_refused(capsys, tmp_path, prompts):
    base = ["--base-model", "demo"]
    assert "--prompts" in refused(capsys, *base)
    assert "no folder" in refused(capsys, *base, "--prompts", str(tmp_path / "nope"))
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(capsys, *base, "--prompts", str(tmp_path / "file"))
    known = [*base, "--prompts", str(prompts)]
    assert "65535" in refused(capsys, *known, "--port", "70000")
    assert "no address" in refused(capsys, *known, "--host", "not a host")
    assert "keys" in refused(capsys, *known, "--api-key-file", str(tmp_path / "nope"))
    assert "is empty" in refused(capsys, *known, "--admin-key-file", str(tmp_path / "file"))
    for origin in ("https://page.example/", "page.example", "https://page.example/a"):
        assert "such as https://page.example, got" in refused(capsys, *known, "--allowed-origin", origin)
    assert "--max-batch-rows" in refused(capsys, *known, "--max-step-tokens", "1")
    assert "neither a folder" in refused(
        capsys, "--base-model", "no/such", "--prompts", str(prompts), "--port", "0"
    )


def test_a_port_that_is_taken(capsys, prompts):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = refused(capsys, "--base-model", "demo", "--prompts", str(prompts), "--port", port)
    assert f"cannot listen on 127.0.0.1:{port}" in found


def test_a_signal_to_stop_that_comes_before_uvicorn_listens_to_signals_is_not_lost(prompts, monkeypatch):
    original = uvicorn.Server.run

    def run_later(self, **options):
        signal.raise_signal(signal.SIGTERM)
        original(self, **options)

    monkeypatch.setattr(uvicorn.Server, "run", run_later)
    given_up = threading.Timer(30, signal.raise_signal, [signal.SIGINT])
    given_up.start()
    try:
        serve(ServeSettings(base_model="demo", prompts=str(prompts), port=0))
    except KeyboardInterrupt:
        pytest.fail("it had to be interrupted")
    given_up.cancel()


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra(capsys, monkeypatch, prompts, package):
    for name in list(sys.modules):
        if name.startswith("softprompt.server.") and not name.endswith(".settings"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    if package != "uvicorn":
        for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
            monkeypatch.setitem(sys.modules, name, None)
    found = refused(capsys, "--base-model", "demo", "--prompts", str(prompts))
    assert 'pip install "softprompt[serve]"' in found


def test_a_broken_installation_is_not_taken_for_a_missing_extra(monkeypatch, prompts):
    monkeypatch.setitem(sys.modules, "softprompt.server.app", None)
    with pytest.raises(ModuleNotFoundError, match=r"softprompt\.server\.app"):
        run(["serve", "--base-model", "demo", "--prompts", str(prompts)])


def test_every_setting_is_an_option():
    help_text = CliRunner().invoke(command, ["--help"]).output
    names = {*ServeSettings.__dataclass_fields__, *Bounds.__dataclass_fields__} - {"bounds"}
    for name in names:
        assert f"--{name.replace('_', '-')}" in help_text
