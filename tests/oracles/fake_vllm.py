"""A server that answers as ``vllm serve`` does, over real HTTP: plain greedy decoding of a small model.

Bodies, events and errors have the shapes that vLLM 0.32.0 (CPU build, V1 runner) sent on the same requests; what a
client of it never reads is left out.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from oracles.serving import command_serving, until

_EMBEDS = "You must set `--enable-prompt-embeds` to input `prompt_embeds`."


class FakeVLLM:
    """The server's state, which a test reads and sets.

    ``embeds`` and ``through`` are ``--enable-prompt-embeds`` and a template that passes on. ``behaviour`` says
    how generating requests fail: a status, "hang", "break" (in the middle of a stream), "error" (an event of it),
    "short" (a stream that ends before its answer).
    """

    def __init__(self, base: Any, *, embeds: bool = True, through: bool = True, key: str = "") -> None:
        self.base = base
        self.embeds = embeds
        self.through = through
        self.key = key
        self.behaviour: int | str = 200
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.running = 0
        self.health: int | str = 200
        self.listed: list[dict[str, Any]] = [{"id": "served", "object": "model", "max_model_len": 200}]
        self.tokenizer: Any = base.tokenizer
        self.version: int | str = "0.32.0"
        self.slow = 0.0
        self.url = ""

    @torch.no_grad()
    def next_scores(self, embeds: Any, new: list[int]) -> Any:
        table = self.base.model.get_input_embeddings()
        whole = torch.cat([embeds, table(torch.tensor(new, dtype=torch.long))])
        return self.base.model(inputs_embeds=whole[None]).logits[0, -1].float().log_softmax(-1)

    def read(self, body: dict[str, Any]) -> tuple[Any, list[int]]:
        """Return the input as embeddings, and as the ids that vLLM says it has."""
        table, tokenizer = self.base.model.get_input_embeddings(), self.base.tokenizer
        if "messages" in body:
            parts, ids = [], []
            for part in body["messages"][0]["content"]:
                if part["type"] == "prompt_embeds":
                    own = self.load(part["data"])
                    seen = [len(tokenizer)] * len(own)
                else:
                    said = part["text"] if self.through else f"user: {part['text']}"
                    assert "<prompt_embeds>" not in said
                    seen = tokenizer(said, add_special_tokens=False)["input_ids"]
                    own = table(torch.tensor(seen)).detach()
                parts.append(own)
                ids += seen
            return torch.cat(parts), ids
        if "prompt_embeds" in body:
            own = self.load(body["prompt_embeds"])
            return own, [0] * len(own)
        ids = body["prompt"]
        if max(ids) >= table.weight.shape[0]:
            raise ValueError(f"Token id {max(ids)} is out of vocabulary")
        return table(torch.tensor(ids)).detach(), ids

    def load(self, data: str) -> Any:
        if not self.embeds:
            raise ValueError(_EMBEDS)
        return torch.load(io.BytesIO(base64.b64decode(data, validate=True)), weights_only=True)

    def piece(self, body: dict[str, Any], scores: Any, token: int) -> dict[str, Any]:
        """Return what a choice says of its next token."""
        count = body.get("top_logprobs") if "messages" in body else body.get("logprobs")
        logprobs: Any = None
        if count is not None:
            listed = body.get("logprob_token_ids") or scores.topk(count).indices.tolist()
            top = {f"token_id:{each}": float(scores[each]) for each in [token, *listed]}
            name, own = f"token_id:{token}", float(scores[token])
            if "messages" in body:
                tops = [{"token": key, "logprob": value, "bytes": []} for key, value in top.items()]
                entry = {"token": name, "logprob": own, "bytes": [], "top_logprobs": tops}
                logprobs = {"content": [entry]}
            else:
                logprobs = {"text_offset": [0], "token_logprobs": [own], "tokens": [name], "top_logprobs": [top]}
        return {"index": 0, "logprobs": logprobs, "finish_reason": None, "token_ids": [token]}

    def chosen(self, body: dict[str, Any], scores: Any, count: int) -> int:
        allowed = scores.clone()
        for token, bias in body.get("logit_bias", {}).items():
            allowed[int(token)] += bias
        if count < body.get("min_tokens", 0):
            allowed[body["stop_token_ids"]] = -torch.inf
        return int(allowed.argmax())

    async def events(self, body: dict[str, Any], request: Request) -> Any:
        embeds, ids = self.read(body)
        self.running += 1
        try:
            new: list[int] = []
            head = {"id": "cmpl-1", "created": 1, "model": body["model"]}
            if "messages" in body:  # the ids come with the role, before any token
                first = {"index": 0, "delta": {"role": "user", "content": ""}, "finish_reason": None}
                yield self.line({**head, "choices": [first], "prompt_token_ids": ids})
            while len(new) < body["max_tokens"]:
                if self.behaviour == "short" and len(new) == 2:
                    break
                if self.behaviour in ("break", "error") and len(new) == 2:
                    if self.behaviour == "error":
                        error = {"message": "EngineCore died", "type": "InternalServerError", "code": 500}
                        yield self.line({"error": error})
                        yield "data: [DONE]\n\n"
                    return
                scores = self.next_scores(embeds, new)
                new.append(self.chosen(body, scores, len(new)))
                piece = self.piece(body, scores, new[-1])
                if new[-1] in body["stop_token_ids"]:
                    piece["finish_reason"] = "stop"
                elif len(new) == body["max_tokens"]:
                    piece["finish_reason"] = "length"
                yield self.line({**head, "choices": [piece]})
                if piece["finish_reason"]:
                    break
                await asyncio.sleep(self.slow)
            yield "data: [DONE]\n\n"
        finally:
            self.running -= 1

    def line(self, event: dict[str, Any]) -> str:
        return f"data: {json.dumps(event)}\n\n"

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        embeds, ids = self.read(body)
        scores = self.next_scores(embeds, [])
        choice = self.piece(body, scores, self.chosen(body, scores, 0))
        if (count := body.get("prompt_logprobs")) is not None:
            with torch.no_grad():
                logs = self.base.model(inputs_embeds=embeds[None]).logits[0].float().log_softmax(-1)
            rows: list[Any] = [None]
            for before, token in zip(logs, ids[1:], strict=False):
                listed = [token, *before.topk(count).indices.tolist()]
                rows.append({str(each): {"logprob": float(before[each]), "rank": 1} for each in listed})
            choice["prompt_logprobs"] = rows
        choice = {**choice, "finish_reason": "length"}
        found: dict[str, Any] = {"id": "cmpl-1", "model": body["model"], "choices": [choice]}
        return {**found, "prompt_token_ids": ids} if "messages" in body else found

    async def answer(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        body = await request.json()
        self.paths.append(request.url.path)
        self.bodies.append(body)
        if isinstance(self.behaviour, int) and self.behaviour != 200:
            return refused(self.behaviour, f"it is {self.behaviour}")
        if self.behaviour == "hang":
            self.running += 1
            while not await request.is_disconnected():
                await asyncio.sleep(0.01)
            self.running -= 1
            return Response()
        try:
            if not body.get("stream"):
                return JSONResponse(self.whole(body))
            self.read(body)
        except ValueError as error:
            return refused(400, str(error))
        return StreamingResponse(self.events(body, request), media_type="text/event-stream")

    def app(self) -> FastAPI:
        app = FastAPI()
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.post(path)(self.answer)

        @app.get("/version")
        async def version() -> Response:
            if isinstance(self.version, int):
                return JSONResponse({"detail": "Not Found"}, self.version)
            return JSONResponse({"version": self.version})

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": self.listed}

        @app.get("/health")
        async def health(request: Request) -> Response:
            while self.health == "hang" and not await request.is_disconnected():
                await asyncio.sleep(0.01)
            return Response(status_code=self.health if isinstance(self.health, int) else 200)

        @app.post("/tokenize")
        async def tokenize(request: Request) -> Response:
            if self.tokenizer is None:
                return refused(404, "Not Found")
            body = await request.json()
            ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return JSONResponse({"count": len(ids), "max_model_len": 200, "tokens": ids, "token_strs": None})

        return app


def refused(status: int, message: str) -> JSONResponse:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    return JSONResponse({"error": error}, status)


@contextmanager
def over(fakes: Any, prompts: Any, base_model: Any = "demo", **settings: Any) -> Any:
    """Serve prompts over such servers."""
    upstream = (",".join(fake.url for fake in fakes),)
    names = ("demo",)
    with command_serving(
        base_model, prompts, engine="vllm", upstream=upstream, served_model_name=names, **settings
    ) as server:
        yield server


@contextmanager
def faked(base: Any, *, tls: Any = None, **settings: Any) -> Any:
    """Run such a server on a free port; ``tls`` are the files of a certificate and its key."""
    fake = FakeVLLM(base, **settings)
    files = {} if tls is None else {"ssl_certfile": tls[0], "ssl_keyfile": tls[1]}
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    fake.url = f"http{'s' if tls else ''}://127.0.0.1:{sock.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(fake.app(), log_level="error", timeout_graceful_shutdown=1, **files))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield fake
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()
