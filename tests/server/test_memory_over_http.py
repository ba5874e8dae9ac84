"""A running server and bodies made to be costly: memory per byte for every endpoint, and /health meanwhile."""

import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from oracles.server_process import serving
from oracles.serving import write_prompt

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SIZE = 300_000
"""Bytes of a body."""
BYTES_PER_BYTE, OF_A_TEXT = 100, 700
"""Of the process, for each byte of a body: an empty list is 3 bytes of JSON and 64 in Python; a token, of which a
text has up to one a byte, is some hundred bytes in the tokenizer, which works for one request at a time."""
JSON = {"content-type": "application/json"}
SECONDS = 1.0
"""Of the server's own time, whatever else the machine does, that /health may take."""

ENDPOINTS = {
    "/v1/completions": ("prompt", "fields", "stop", "guided_choice", "guided_json"),
    "/v1/chat/completions": ("messages", "stop", "response_format"),
    "/v1/responses": ("input", "text"),
    "/v1/classify": ("input", "labels", "fields"),
    "/v1/embeddings": ("input", "dimensions"),
}


def filled(head, item, tail, separator=","):
    """Return JSON of a body's size that repeats an item."""
    return head + separator.join([item] * (SIZE // (len(item) + len(separator)))) + tail


def hostile(names, items):
    """Return bodies of very many small things: as lists under each name, nested, and as names of their own."""
    for name in names:
        for item in items:
            yield filled(f'{{"model":"writer","{name}":[', item, "]}")
        yield filled(f'{{"model":"writer","{name}":', '{"a":', "0" + "}" * (SIZE // 6) + "}", "")
    named = ",".join(f'"{number}":[]' for number in range(SIZE // 11))
    yield f'{{"model":"writer",{named}}}'


def valid(name):
    """Return bodies that are read to their end: one text, many, and token ids."""
    if name == "messages":
        yield filled('{"model":"writer","messages":[', '{"role":"user","content":"é x"}', "]}")
        return
    yield filled(f'{{"model":"writer","{name}":"', "é x", '"}', " ")
    texts = [json.dumps("é x " * (SIZE // 320), ensure_ascii=False) for _ in range(64)]
    yield f'{{"model":"writer","{name}":[{",".join(texts)}]}}'
    yield filled(f'{{"model":"writer","{name}":[', f"[{','.join(['7'] * 100)}]", "]}")


class Process:
    """What the kernel says of a process."""

    def __init__(self, number):
        self.folder = Path(f"/proc/{number}")

    def mebibytes(self, name):
        (line,) = [each for each in (self.folder / "status").read_text().splitlines() if each.startswith(name)]
        return int(line.split()[1]) / 1024

    def seconds(self):
        """Return the processor time that it has used."""
        fields = (self.folder / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def forget_peak(self):
        (self.folder / "clear_refs").write_text("5")


@contextmanager
def probing(url, process):
    """Ask for /health all the time, and collect how much time the server used until each answer."""
    took, done = [], threading.Event()

    def ask():
        while not done.wait(0.02):
            began = process.seconds()
            connection = HTTPConnection(url.removeprefix("http://"), timeout=60)
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
            took.append(process.seconds() - began)
            connection.close()

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield took
        finally:
            done.set()
            asking.result(60)


@pytest.mark.slow  # tests/fuzz/test_fuzz_bodies.py measures the same within a process
@pytest.mark.parametrize(
    ("names", "items"), [(1, ("[]", '"\\u00e9"')), (9, ("[]", "{}", '""', "0", '{"role":[]}', '"\\u00e9"'))]
)
def test_memory_is_linear_in_a_body_and_health_answers_meanwhile(base, tmp_path, names, items):
    write_prompt(tmp_path / "writer", base, task="generation", labels=None, template="{{input}}")
    with serving(tmp_path) as (running, url, _), httpx.Client(base_url=url, timeout=60) as client:
        process = Process(running.pid)
        for path, (first, *_) in ENDPOINTS.items():  # what the first request of a kind loads is not a body's
            client.post(path, json={"model": "writer", first: "x"})
        before = process.mebibytes("VmRSS")
        with probing(url, process) as took:
            for most, made in ((BYTES_PER_BYTE, "hostile"), (OF_A_TEXT, "valid")):
                for path, known in ENDPOINTS.items():
                    for body in hostile(known[:names], items) if made == "hostile" else valid(known[0]):
                        process.forget_peak()
                        content = body.encode()
                        answer = client.post(path, content=content, headers=JSON)
                        assert answer.status_code in (200, 400), answer.text
                        grown = (process.mebibytes("VmHWM") - before) * 2**20 / len(content)
                        assert grown < most, (path, body[:60])
        assert len(took) > 5
        assert max(took) < SECONDS
        assert client.get("/ready").status_code == 200


@pytest.mark.slow  # 40 s on a busy machine: five texts and five lists of 1 MB, in turn
def test_a_megabyte_to_every_endpoint_at_once_has_bounded_memory_and_health_answers(base, tmp_path):
    """Bodies are read and tokenised in turn: what they take at once is that of one, and the bytes of the others."""
    write_prompt(tmp_path / "writer", base, task="generation", labels=None, template="{{input}}")
    size = 1_000_000
    with serving(tmp_path) as (running, url, _), httpx.Client(base_url=url, timeout=120) as client:
        process = Process(running.pid)
        for path, (first, *_) in ENDPOINTS.items():
            client.post(path, json={"model": "writer", first: "x"})
        before = process.mebibytes("VmRSS")
        asked = [
            (path, json.dumps({"model": "writer", name: value}))
            for path, (name, *_) in ENDPOINTS.items()
            for value in ([[]] * (size // 4), "ab " * (size // 3))
        ]
        with probing(url, process) as took, ThreadPoolExecutor(len(asked)) as pool:
            answers = [pool.submit(client.post, path, content=body, headers=JSON) for path, body in asked]
            codes = {each.result(120).status_code for each in answers}
        assert codes == {400}
        grown = (process.mebibytes("VmHWM") - before) * 2**20 / size
        assert grown < OF_A_TEXT
        assert len(took) > 5
        assert max(took) < SECONDS
