"""Keys, hosts, origins, and what is closed unless it is opened."""

import pytest
from fastapi.testclient import TestClient

from oracles.serving import ScriptedBatcher, app_over, running
from softprompt.errors import UsageError
from softprompt.server.middleware import Keys
from softprompt.server.settings import ServeSettings


@pytest.fixture
def opened(base, shared_prompts, tmp_path):
    def open_(**settings):
        for name in ("api_key_file", "admin_key_file"):
            if name in settings:
                path = tmp_path / name
                path.write_text(settings[name])
                settings[name] = str(path)
        app = app_over(base, shared_prompts, ScriptedBatcher(auto=True), **settings)
        return TestClient(app, base_url="http://127.0.0.1")

    return open_


def bearer(key):
    return {"authorization": f"Bearer {key}"}


ASK = {"model": "writer", "prompt": "x"}


def test_without_keys_all_but_administration_is_open(opened):
    client = opened()
    assert client.get("/v1/models").status_code == 200
    assert client.post("/v1/completions", json=ASK).status_code == 200
    for method, path in [
        ("GET", "/v1/prompts"),
        ("POST", "/v1/prompts/writer/load"),
        ("POST", "/v1/prompts/writer/unload"),
        ("POST", "/v1/prompts/writer/reload"),
    ]:
        found = client.request(method, path)
        assert found.status_code == 403
        assert "--admin-key-file" in found.json()["error"]["message"]


def test_keys(opened):
    client = opened(api_key_file="one\n\n two \n", admin_key_file="root\n")
    for path in ("/v1/models", "/metrics", "/v1/prompts/writer/card"):
        found = client.get(path)
        assert found.status_code == 401
        assert found.json()["error"]["code"] == "invalid_api_key"
        assert found.headers["www-authenticate"] == "Bearer"
        for key in ("on", "onee", "", "two ", "\xfc"):
            expected = 200 if key.strip() == "two" else 401
            headers = {"authorization": f"Bearer {key}".encode("latin-1")}
            assert client.get(path, headers=headers).status_code == expected
        for key in ("one", "two", "root"):
            assert client.get(path, headers=bearer(key)).status_code == 200
    assert client.post("/v1/completions", json=ASK).status_code == 401
    assert client.get("/v1/prompts", headers=bearer("one")).status_code == 401
    assert client.get("/v1/prompts", headers=bearer("root")).status_code == 200
    for path in ("/", "/health", "/ready", "/version", "/openapi.json"):
        assert client.get(path).status_code == 200


def test_keys_are_compared_whole_and_all(monkeypatch):
    keys = Keys.of(["a", "b", "c"])
    compared = []
    import hmac

    own = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda x, y: compared.append(len(x)) or own(x, y))
    assert keys.accept("a")
    assert not keys.accept("a longer key than any of them")
    assert compared == [32] * 6
    assert "a" not in repr(keys).replace("access", "").replace("object at", "").split()


def test_key_files_that_are_none(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        Keys.read(str(tmp_path / "absent"))
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(UsageError, match="is empty"):
        Keys.read(str(tmp_path / "empty"))


def test_only_this_machines_names_are_answered(opened):
    client = opened(allowed_host=("proxy.example",))
    for host in ("127.0.0.1:8000", "localhost", "[::1]:80", "proxy.example", "LOCALHOST:1"):
        assert client.get("/health", headers={"host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "", "[::1", "localhost.evil:80"):
        found = client.get("/v1/models", headers={"host": host})
        assert found.status_code == 421
        assert found.json()["error"]["code"] == "wrong_host"
    assert opened(host="0.0.0.0").get("/health", headers={"host": "any"}).status_code == 200


def test_origins(opened):
    ask = {"origin": "https://page.example", "access-control-request-method": "POST"}
    closed = opened()
    refused = closed.options("/v1/completions", headers=ask)
    assert refused.status_code == 405
    assert refused.json()["error"]["code"] == "method_not_allowed"
    plain = closed.get("/v1/models", headers={"origin": "https://page.example"})
    assert "access-control-allow-origin" not in plain.headers
    client = opened(allowed_origin=("https://page.example",))
    allowed = client.options("/v1/completions", headers=ask)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    other = client.get("/v1/models", headers={"origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_pages_that_may_ask_read_every_answer(base, shared_prompts):
    app = app_over(base, shared_prompts, allowed_origin=("https://page.example",))
    with running(app) as server, server.client(headers={"origin": "https://page.example"}) as page:
        for status, found in (
            (200, page.post("/v1/completions", json=ASK)),
            (404, page.post("/v1/completions", json={**ASK, "model": "nobody"})),
            (413, page.post("/v1/completions", content=b"x" * 2**21)),
            (421, page.get("/v1/models", headers={"host": "other.example"})),
        ):
            assert found.status_code == status
            assert found.headers["access-control-allow-origin"] == "https://page.example"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"origin": "https://other.example"}, "origin"),
        ({"access-control-request-method": "DELETE"}, "method"),
        ({"access-control-request-headers": "x-own"}, "headers"),
        ({"origin": "https://" + "x" * 5000}, "origin"),
    ],
)
def test_a_preflight_that_is_refused(opened, change, words):
    client = opened(allowed_origin=("https://page.example",))
    ask = {"origin": "https://page.example", "access-control-request-method": "POST", **change}
    found = client.options("/v1/completions", headers=ask)
    assert found.status_code == 400
    assert found.text == f"Disallowed CORS {words}"
    assert found.headers["vary"].startswith("Origin")
    if words == "origin":
        assert "access-control-allow-origin" not in found.headers
    plain = client.options("/v1/completions", headers={"origin": "https://page.example"})
    assert plain.status_code == 405
    assert plain.json()["error"]["code"] == "method_not_allowed"


def test_a_page_elsewhere_cannot_post_as_a_form(opened):
    client = opened()
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        headers = {} if kind is None else {"content-type": kind}
        body = b'{"model": "writer", "prompt": "x"}'
        found = client.post("/v1/completions", content=body, headers=headers)
        assert found.status_code == 400, kind


def test_administration(opened):
    client = opened(admin_key_file="root")
    client.headers.update(bearer("root"))
    states = {each["name"]: each for each in client.get("/v1/prompts").json()["data"]}
    assert states["writer"] == {
        "name": "writer",
        "resident": False,
        "unloaded": False,
        "version": None,
        "problem": None,
    }
    loaded = client.post("/v1/prompts/writer/load").json()
    assert loaded["resident"]
    assert client.post("/v1/prompts/writer/reload").json()["version"] == loaded["version"]
    assert client.post("/v1/prompts/writer/unload").json()["unloaded"]
    assert client.post("/v1/completions", json=ASK).status_code == 404
    assert client.get("/v1/models/writer").status_code == 404
    assert client.get("/v1/prompts/writer/card").status_code == 404
    assert "writer" not in [each["id"] for each in client.get("/v1/models").json()["data"]]
    assert client.post("/v1/prompts/writer/load").status_code == 200
    assert client.post("/v1/completions", json=ASK).status_code == 200
    for name in ("nope", "..", "%2e%2e", "..%2f..%2fetc", "a%00"):
        assert client.post(f"/v1/prompts/{name}/load").status_code == 404


@pytest.mark.parametrize(
    ("host", "local"),
    [("localhost", True), ("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("host.example", False)],
)
def test_an_address_that_only_this_machine_reaches_takes_requests_for_this_machine_alone(host, local):
    """A page of elsewhere could otherwise reach it by a name of its own that leads here."""
    assert ServeSettings(base_model="demo", prompts="prompts", host=host).is_local is local
