"""A server of the page and of made-up answers, with the public API's shapes and no model behind it."""

from __future__ import annotations

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import softprompt

PAGE = Path(softprompt.__file__).parent / "server" / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"
MARKUP = "<img src=x onerror=\"document.title='broken into'\">"


def card(name, **changes):
    norms = [1.0 + math.sin(i) / 3 for i in range(8)]
    near = [
        [
            {"token_id": 5, "token": " yes", "cosine": 0.5},
            {"token_id": 6, "token": MARKUP, "cosine": 0.1},
        ]
    ] * 8
    return {
        "location": name,
        "base_model": "tiny",
        "fingerprint": "0123456789ab",
        "task_type": "CAUSAL_LM",
        "task": "classification",
        "labels": ["complaint", "no complaint"],
        "template": "Message: {{input}}\nLabel:",
        "virtual_tokens": 8,
        "rows": 8,
        "width": 16,
        "parameters": 128,
        "bytes": 512,
        "heads": [],
        "geometry": {
            "norms": norms,
            "norm_mean": 1.0,
            "norm_min": min(norms),
            "norm_max": max(norms),
            "rms": 0.25,
            "base_rms": 0.2,
            "rms_ratio": 1.25,
            "effective_rank": 6.5,
            "mean_pairwise_cosine": 0.01,
        },
        "nearest": near,
        "metrics": {"loss": 0.1, "validation": {"accuracy": 0.9}},
        "history": [
            {
                "epoch": i,
                "update": i * 4,
                "loss": 1 / i,
                "validation": {"loss": 1.2 / i, "accuracy": 0.9},
            }
            for i in range(1, 6)
        ],
        "created": "2026-01-01T00:00:00+00:00",
        "versions": {},
        "chat": False,
        **changes,
    }


TASKS = [
    {
        "name": "sort",
        "task": "classification",
        "labels": ["left", "right", "middle"],
        "template": "Sort : {{input}}",
    },
    {
        "name": "tell",
        "task": "generation",
        "labels": None,
        "template": "Tell {{who}} about {{what}}",
    },
]
CARDS = {
    "complaints": card("complaints"),
    "reply": card("reply", task="generation", labels=None, template="Message: {{text}}\nReply:", chat=True),
    "two-fields": card("two-fields", task="generation", labels=None, template="{{premise}} / {{question}}"),
    "endless": card("endless", task="generation", labels=None, chat=None),
    "breaks": card("breaks", task="generation", labels=None),
    "several": card("several", task=None, labels=None, template=None, tasks=TASKS),
    "banking": card("banking", labels=[f"label {i}" for i in range(77)], template="{{premise}} / {{topic}}"),
    **{f"quiet-{i:02}": card(f"quiet-{i:02}") for i in range(20)},
}


UNUSABLE = [{"id": "foreign", "problem": f"it was made for other, not for tiny: {MARKUP}"}]


def listed(name):
    keys = ("task", "labels", "template", "virtual_tokens", "tasks", "chat")
    facts = {key: CARDS[name].get(key) for key in keys}
    return {
        "id": name,
        "object": "model",
        "parent": "tiny",
        "engine": "forest",
        "metrics": {"accuracy": 0.912, "sort accuracy": 0.5} if name in ("complaints", "several") else None,
        **facts,
    }


class Stub:
    """Runs until closed; ``bodies`` are the requests that came, ``gone`` those whose client left."""

    def __init__(self, key="", chat=False):
        self.key, self.chat, self.bodies, self.gone = key, chat, [], []
        stub = self

        class Handler(_Handler):
            state = stub

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}/"

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Stub

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        path = {"": "index.html", "docs": "docs.html"}.get(self.path.lstrip("/"), self.path.lstrip("/"))
        if (PAGE / path).is_file() and "/" not in path:
            return self.reply(200, (PAGE / path).read_bytes(), TYPES[Path(path).suffix])
        if self.denied():
            return None
        if path == "v1/models":
            chat = self.state.chat
            base = {"id": "tiny", "parent": None, "engine": "forest", "chat": chat}
            prompts = [listed(name) for name in CARDS]
            vectors = {"id": "vectors", "parent": "tiny", "task": "embedding", "template": "{{input}}"}
            return self.json(200, {"object": "list", "data": [base, *prompts, vectors], "unusable": UNUSABLE})
        if path.startswith("v1/prompts/") and path.endswith("/card"):
            return self.json(200, CARDS[path.split("/")[2]])
        return self.error(404, f"there is nothing at /{path}")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.denied():
            return None
        self.state.bodies.append((self.path, body))
        if body["model"] == "breaks":
            return self.error(429, "16 requests wait already", {"Retry-After": "7"})
        if self.path == "/v1/classify":
            return self.classify(body)
        return self.stream(body)

    def classify(self, body):
        tasks = {task["name"]: task for task in CARDS.get(body["model"], {}).get("tasks") or ()}
        own = tasks.get(body.get("task")) or CARDS.get(body["model"])
        labels = body.get("labels") or own["labels"]
        shares = [0.75] + [0.25 / (len(labels) - 1)] * (len(labels) - 1)
        result = {
            "index": 0,
            "label": labels[0],
            "probabilities": dict(zip(labels, shares, strict=True)),
            "scores": {label: math.log(share) for label, share in zip(labels, shares, strict=True)},
        }
        usage = {"prompt_tokens": 6, "virtual_tokens": 8, "total_tokens": 6}
        self.json(200, {"object": "list", "model": body["model"], "data": [result], "usage": usage})

    def stream(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        words = ["Thank", " you", " for", " wri", "ting:", " ä€", " ", MARKUP]
        count = 10_000 if body["model"] == "endless" else len(words)
        try:
            for i in range(count):
                last = i == count - 1
                word = words[i % len(words)]
                chat = self.path == "/v1/chat/completions"
                choice = {
                    "index": 0,
                    **({"delta": {"content": word}} if chat else {"text": word}),
                    "finish_reason": "stop" if last else None,
                }
                self.event(json.dumps({"choices": [choice]}, ensure_ascii=False))
                time.sleep(0.03)
            usage = {"prompt_tokens": 12, "completion_tokens": count, "virtual_tokens": 8}
            self.event(json.dumps({"choices": [], "usage": usage}))
            self.event("[DONE]")
        except OSError:
            self.state.gone.append(body["model"])

    def event(self, data):
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def denied(self):
        if not self.state.key or self.headers.get("Authorization") == f"Bearer {self.state.key}":
            return False
        self.error(401, "this server asks for a key")
        return True

    def error(self, status, message, headers=None):
        self.json(status, {"error": {"message": message, "type": "invalid_request_error"}}, headers)

    def json(self, status, content, headers=None):
        self.reply(status, json.dumps(content).encode(), "application/json", headers)

    def reply(self, status, data, kind, headers=None):
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(data)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
