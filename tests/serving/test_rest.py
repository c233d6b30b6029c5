"""The REST front end over real sockets: what it answers, and to whom."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.fake_engine import FakeEngine, infer_body, looped, model
from tests.serving.rest_client import INFER, Lengths, rest
from trilevel.errors import ArtifactError, ConfigError, InputError
from trilevel.serving.keys import Keys, new_key
from trilevel.serving.logs import LOG, log_to
from trilevel.serving.requests import (
    DeadlineError,
    OverloadedError,
    UnavailableError,
    UnknownModelError,
    WorkerError,
)


@looped
async def test_infer_with_json() -> None:
    engine = FakeEngine()
    async with rest(engine) as (client, _):
        sent = infer_body() | {"id": "7", "outputs": [{"name": "y"}], "parameters": {"max_loss": 0.25, "priority": 2}}
        got = await client.post("/v2/models/double/versions/1/infer", json=sent)
        assert got.status_code == 200, got.text
        assert got.json() == {
            "model_name": "double",
            "model_version": "1",
            "id": "7",
            "parameters": {"paths": "int8/2,float32/6", "queue_ms": 1.0, "compute_ms": 2.0, "total_ms": 3.0},
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [2, 3], "data": [3.0] * 6}],
        }
        request = engine.requests[0]
        assert (request.id, request.version, request.max_loss, request.priority) == ("7", "1", 0.25, 2)
        assert request.deadline is not None
        assert request.deadline == pytest.approx(time.monotonic() + 5, abs=2)


@looped
async def test_infer_with_bytes_only_where_asked() -> None:
    async with rest(FakeEngine()) as (client, _):
        outputs = [{"name": "sum", "parameters": {"binary_data": True}}, {"name": "y"}]
        got = await client.post(INFER, json=infer_body() | {"outputs": outputs})
        length = int(got.headers["inference-header-content-length"])
        assert got.headers["content-type"] == "application/octet-stream"
        said = json.loads(got.content[:length])["outputs"]
        assert said[0]["parameters"] == {"binary_data_size": 16}
        assert said[1]["data"] == [3.0] * 6
        assert np.frombuffer(got.content[length:]).tolist() == [4.5, 4.5]


@looped
async def test_health_and_metadata() -> None:
    engine = FakeEngine()
    engine.known["late", "1"] = model("late", state="LOADING", reason="reads its weights")
    async with rest(engine) as (client, server):
        assert (await client.get("/v2")).json()["name"] == "trilevel"
        assert (await client.get("/v2/health/live")).json() == {"live": True}
        assert (await client.get("/v2/health/ready")).status_code == 200
        assert (await client.get("/v2/models/double/versions/1/ready")).json() == {"name": "double", "ready": True}
        late = await client.get("/v2/models/late/ready")
        assert (late.status_code, late.json()["reason"]) == (503, "reads its weights")
        said = (await client.get("/v2/models/double")).json()
        assert (said["versions"], said["inputs"]) == (["1", "2"], [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}])
        index = (await client.post("/v2/repository/index", json={"ready": True})).json()
        assert [one["name"] for one in index] == ["double", "double", "texts"]
        assert len((await client.post("/v2/repository/index")).json()) == 4
        engine.is_ready = False
        assert (await client.get("/v2/health/ready")).status_code == 503
        engine.is_ready, server.front.is_draining = True, True
        draining = await client.get("/v2/health/ready")
        assert (draining.status_code, draining.headers["connection"]) == (503, "close")


@looped
async def test_load_and_unload() -> None:
    engine = FakeEngine()
    async with rest(engine) as (client, _):
        models = "/v2/repository/models"
        assert (await client.post(f"{models}/double/load")).status_code == 200
        sent = {"parameters": {"unload_dependents": False}}
        assert (await client.post(f"{models}/double/unload", json=sent)).status_code == 200
        assert engine.loads == ["+double", "-double"]
        assert (await client.post(f"{models}/none/load")).status_code == 404
        assert (await client.post(f"{models}/broken/load")).status_code == 409
        # no path of a request reaches the file system
        for parameters in ({"config": "{}"}, {"file:1/model.onnx": "AAAA"}, [1], None):
            got = await client.post(f"{models}/double/load", json={"parameters": parameters})
            assert (got.status_code, "cannot be set" in got.text) == (400, True)
        assert engine.loads == ["+double", "-double"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v2/", 404),
        ("GET", "/v2/models", 404),
        ("GET", "/v2/models/", 404),
        ("GET", "/v2/models/none", 404),
        ("GET", "/v2/models/double/versions/9", 404),
        ("GET", "/v2/models/double/versions//ready", 404),
        ("POST", "/v2/models/none/infer", 404),
        ("POST", "/v2/models/double/versions/9/infer", 404),
        ("POST", "/v2/models/double/more/infer", 404),
        ("POST", "/v2/models/%ff%fe/infer", 404),
        ("POST", "/v2/models/..%2f..%2fetc%2fpasswd/infer", 404),
        ("GET", INFER, 405),
        ("DELETE", "/v2", 405),
        ("POST", "/v2/health/live", 405),
        ("HEAD", "/v2/health/live", 200),
        ("POST", "/v1/summarize", 404),
    ],
)
@looped
async def test_addresses_and_methods(method: str, path: str, status: int) -> None:
    async with rest(FakeEngine()) as (client, _):
        got = await client.request(method, path, json=infer_body() if method == "POST" else None)
        assert got.status_code == status
        assert method == "HEAD" or set(got.json()) == {"error"}
        assert (got.headers.get("allow") in ("GET", "POST")) == (status == 405)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "z"}, "model 'double' has the inputs x; z were sent"),
        ({"datatype": "FP64"}, "input 'x' of model 'double' is FP32; FP64 was sent"),
        ({"shape": [3, 2]}, r"has the shape \[-1, 3\], -1 for any size; \[3, 2\] was sent"),
        ({"shape": [6]}, r"\[6\] was sent"),
        ({"data": [1.5] * 5}, "5 elements were sent"),
    ],
)
@looped
async def test_inputs_of_another_model(changes: dict[str, Any], message: str) -> None:
    engine = FakeEngine()
    async with rest(engine) as (client, _):
        got = await client.post(INFER, json=infer_body(**changes))
        assert got.status_code == 400
        assert re.search(message, got.json()["error"]), got.text
        assert not engine.requests


@looped
async def test_rows_and_outputs_that_do_not_fit() -> None:
    async with rest(FakeEngine()) as (client, _):
        got = await client.post(INFER, json=infer_body() | {"outputs": [{"name": "z"}]})
        assert (got.status_code, "output 'z' is none of model 'double'" in got.text) == (400, True)
        tensors = [
            ("text", "BYTES", [2], ["a", "b"]),
            ("ids", "INT64", [3, 1], [1, 2, 3]),
            ("is", "BOOL", [2], [True, False]),
        ]
        sent = [dict(zip(("name", "datatype", "shape", "data"), one, strict=True)) for one in tensors]
        got = await client.post("/v2/models/texts/infer", json={"inputs": sent})
        assert (got.status_code, "sent were text 2, ids 3, is 2" in got.text) == (400, True)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("too odd"), 400),
        (UnknownModelError("none such"), 404),
        (ArtifactError("damaged"), 409),
        (OverloadedError("busy", retry_after_s=1.2), 429),
        (WorkerError("it died twice"), 500),
        (UnavailableError("loads"), 503),
        (DeadlineError("late"), 504),
        (KeyError("secret of a client"), 500),
        (TimeoutError("secret of a client"), 500),
        (ZeroDivisionError("secret of a client"), 500),
    ],
)
@looped
async def test_errors_of_the_engine(error: Exception, status: int) -> None:
    engine, lines = FakeEngine(), io.StringIO()
    engine.error = error
    log_to(lines)
    try:
        async with rest(engine) as (client, _):
            got = await client.post(INFER, json=infer_body())
    finally:
        LOG.handlers.clear()
        LOG.propagate = True
    assert got.status_code == status
    said = got.json()["error"]
    # of what was not foreseen the client learns nothing but where to look
    assert said == str(error) if "secret" not in str(error) else got.headers["x-request-id"] in said
    assert "secret" not in got.text + lines.getvalue()
    logged = json.loads(lines.getvalue().splitlines()[1])
    assert (logged["error"], logged["status"]) == (type(error).__name__, str(status))
    assert ("trace" in logged) == (status == 500)
    if status == 429:
        assert (got.headers["retry-after"], got.headers["retry-after-ms"]) == ("2", "1200")
    assert ("retry-after" in got.headers) == (status in (429, 503))


@looped
async def test_deadlines() -> None:
    engine = FakeEngine(delay_s=5)
    async with rest(engine, timeout_s=None) as (client, _):
        started = time.monotonic()
        got = await client.post(INFER, json=infer_body(), headers={"X-Request-Timeout-Ms": "80"})
        assert got.status_code == 504
        got = await client.post(INFER, json=infer_body() | {"parameters": {"timeout": 80_000}})
        assert got.status_code == 504
        assert time.monotonic() - started < 2
        assert engine.cancelled == 2
        for bad in ("0", "-1", "1.5", "", "86400001", "9" * 5000, "soon"):
            got = await client.post(INFER, json=infer_body(), headers={"X-Request-Timeout-Ms": bad})
            assert got.status_code == 400, bad
        engine.delay_s = 0
        assert (await client.post(INFER, json=infer_body())).status_code == 200
        assert engine.requests[-1].deadline is None


@looped
async def test_request_ids() -> None:
    engine = FakeEngine()
    async with rest(engine) as (client, _):
        got = await client.post(INFER, json=infer_body(), headers={"X-Request-Id": "mine-1"})
        assert (got.headers["x-request-id"], engine.requests[-1].id, got.json()["id"]) == ("mine-1", "mine-1", "")
        first, second = [(await client.post(INFER, json=infer_body())).headers["x-request-id"] for _ in range(2)]
        assert first != second == engine.requests[-1].id
        assert (await client.get("/v2", headers={"X-Request-Id": "x" * 129})).status_code == 400


@looped
async def test_keys() -> None:
    (alice, first), (_, second) = new_key("alice"), new_key("bob")
    keys = Keys({line.split()[0].removeprefix("sha256:"): line.split()[1] for line in (first, second)})
    engine = FakeEngine()
    async with rest(engine, keys=keys) as (client, _):
        for path in ("/v2/health/live", "/v2/health/ready", "/openapi.json", "/docs"):
            assert (await client.get(path)).status_code == 200
        for wrong in (None, "Bearer", "Bearer x", f"Basic {alice}", f"Bearer {alice}x", alice, "Bearer \xff"):
            headers = {} if wrong is None else {b"Authorization": wrong.encode("latin-1")}
            for method, path in (("GET", "/v2"), ("POST", INFER), ("GET", "/metrics")):
                got = await client.request(method, path, headers=headers)
                assert (got.status_code, got.headers["www-authenticate"]) == (401, "Bearer")
        good = {"Authorization": f"bearer {alice}"}
        assert (await client.post(INFER, json=infer_body(), headers=good)).status_code == 200
        assert len(engine.requests) == 1


@looped
async def test_keys_of_admins(tmp_path: Path) -> None:
    (alice, first), (bob, second) = new_key("alice"), new_key("bob", "admin")
    # as keys were written before there were roles
    (tmp_path / "keys").write_text(f"{first.removesuffix(' user')}\n{second}\n")
    engine = FakeEngine()
    async with rest(engine, keys=Keys.load(tmp_path / "keys")) as (client, _):
        for key, status in ((alice, 403), (bob, 200)):
            headers = {"Authorization": f"Bearer {key}"}
            for verb in ("load", "unload"):
                got = await client.post(f"/v2/repository/models/double/{verb}", headers=headers)
                assert got.status_code == status
            assert (await client.post(INFER, json=infer_body(), headers=headers)).status_code == 200
    assert engine.loads == ["+double", "-double"]
    (tmp_path / "keys").write_text(f"{first}\n{new_key('alice', 'admin')[1]}\n")
    with pytest.raises(ConfigError, match="line 2: alice is admin and user"):
        Keys.load(tmp_path / "keys")


def test_files_of_keys(tmp_path: Any) -> None:
    key, line = new_key("alice")
    file = tmp_path / "keys"
    file.write_text(f"# who\n\n{line}  # the first\n")
    assert key not in file.read_text()
    assert Keys.load(file).check(f"Bearer {key}") == "alice"
    for wrong, message in (("sha256:00 a", "line 1"), ("", "no API key"), (key, "line 1")):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match=message):
            Keys.load(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.load(tmp_path / "none")
    with pytest.raises(ConfigError, match="1 to 64 letters"):
        new_key("a b")


@looped
async def test_pages_of_other_sites_are_refused() -> None:
    async with rest(FakeEngine()) as (client, server):
        own = f"http://127.0.0.1:{server.rest_port}"
        assert (await client.post(INFER, json=infer_body(), headers={"Origin": own})).status_code == 200
        for origin in ("https://evil.example", "null", "http://127.0.0.1"):
            assert (await client.post(INFER, json=infer_body(), headers={"Origin": origin})).status_code == 403


@looped
async def test_task_routes() -> None:
    engine = FakeEngine()
    async with rest(engine, tasks={"lengths": Lengths()}) as (client, _):
        got = await client.post("/v1/lengths", json={"text": "äbc"})
        assert got.json() == {"twice": 6.0, "path": "int8/2", "text": "ä"}
        plain = {"Content-Type": "text/plain; charset=utf-8"}
        got = await client.post("/v1/lengths?model=double&x=%ff", content=b"abcd", headers=plain)
        assert got.json()["twice"] == 8.0
        assert (await client.post("/v1/lengths?model=none", content=b"a", headers=plain)).status_code == 404
        assert (await client.post("/v1/lengths", content=b"\xff", headers=plain)).status_code == 400
        assert (
            await client.post("/v1/lengths", content=b"{", headers={"Content-Type": "application/json"})
        ).status_code == 400
        assert (await client.post("/v1/lengths", content=b"a")).status_code == 415
        assert (await client.get("/v1/lengths")).status_code == 405
        engine.delay_s = 5
        late = {"X-Request-Timeout-Ms": "80"}
        assert (await client.post("/v1/lengths", json={"text": "a"}, headers=late)).status_code == 504
        assert engine.requests[-1].deadline is not None
        described = (await client.get("/openapi.json")).json()
        assert described["paths"]["/v1/lengths"]["post"]["summary"] == Lengths.summary


@looped
async def test_the_description_says_what_task_routes_read() -> None:
    async with rest(FakeEngine(), tasks={"lengths": Lengths()}) as (client, _):
        said = (await client.get("/openapi.json")).json()["paths"]["/v1/lengths"]["post"]
    assert said["requestBody"]["content"] == {
        "text/plain": {"schema": {"type": "string"}},
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"text": {"type": "string"}, "model": {"type": "string"}},
                "required": ["text"],
            }
        },
    }
    assert [one["name"] for one in said["parameters"]] == ["model", "X-Request-Timeout-Ms", "X-Request-Id"]


@looped
async def test_every_address_of_the_description_is_served() -> None:
    async with rest(FakeEngine(), pages={"/": ("text/html", b"<p>console")}) as (client, _):
        described = (await client.get("/openapi.json")).json()
        assert described["openapi"] == "3.1.0"
        assert len(described["paths"]) == 13
        for path, methods in described["paths"].items():
            for method in methods:
                at = path.replace("{name}", "double").replace("{version}", "2")
                sent = infer_body() if at.endswith("infer") else None
                got = await client.request(method, at, json=sent)
                assert got.status_code == 200, at
        page = await client.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        # it works without any other host
        assert not re.search(r"(src|href)=\"(https?:)?//", page.text)
        assert "/v2/models/{name}/versions/{version}/infer" in page.text
        assert (await client.get("/")).content == b"<p>console"


@looped
async def test_metrics_count_what_happened() -> None:
    engine = FakeEngine()
    async with rest(engine) as (client, server):
        for rows in (1, 4):
            await client.post(INFER, json=infer_body(rows=rows))
        await client.post("/v2/models/a-name-of-a-client/infer", json=infer_body())
        engine.error = OverloadedError("busy", retry_after_s=1)
        await client.post(INFER, json=infer_body())
        metrics = server.front.metrics
        metrics.batch("double", "int8/2", 32)
        metrics.queue("double", "int8/2", 7)
        metrics.workers("double", 2)
        metrics.restarted("double")
        metrics.audit("double", samples=50, mean=0.01, is_alarmed=True)
        page = (await client.get("/metrics")).text
    for line in (
        'trilevel_requests_total{model="double",protocol="rest",status="200"} 2.0',
        'trilevel_requests_total{model="",protocol="rest",status="404"} 1.0',
        'trilevel_requests_total{model="double",protocol="rest",status="429"} 1.0',
        'trilevel_rows_total{model="double",path="int8/2"} 3.0',
        'trilevel_rows_total{model="double",path="float32/6"} 2.0',
        'trilevel_request_seconds_count{model="double",path="int8/2",stage="compute"} 2.0',
        'trilevel_request_seconds_bucket{le="0.002",model="double",path="float32/6",stage="queue"} 1.0',
        'trilevel_sheds_total{model="double",reason="overload"} 1.0',
        'trilevel_batch_rows_bucket{le="32.0",model="double",path="int8/2"} 1.0',
        'trilevel_queue_rows{model="double",queue="int8/2"} 7.0',
        'trilevel_workers{model="double"} 2.0',
        'trilevel_worker_restarts_total{model="double"} 1.0',
        'trilevel_audit{model="double",value="alarm"} 1.0',
        "trilevel_requests_in_flight 1.0",
    ):
        assert line in page, line
    assert "a-name-of-a-client" not in page


@looped
async def test_logs_tell_of_requests_and_not_what_was_sent() -> None:
    lines = io.StringIO()
    log_to(lines, logging.INFO)
    try:
        async with rest(FakeEngine()) as (client, _):
            sent = infer_body(data=[77.5] * 6) | {"id": "7"}
            await client.post(INFER, json=sent, headers={"X-Request-Id": "abc", "Authorization": "Bearer hush"})
            await client.post(INFER, json=infer_body(name="hush"))
    finally:
        LOG.handlers.clear()
        LOG.propagate = True
    logged = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [one["event"] for one in logged] == ["started", "request", "request", "draining", "ended"]
    assert logged[1] | {"time": 0, "ms": 0} == {
        "time": 0,
        "level": "info",
        "event": "request",
        "id": "abc",
        "protocol": "rest",
        "route": "infer",
        "model": "double",
        "status": "200",
        "ms": 0,
        "version": "2",
        "rows": 2,
    }
    assert (logged[2]["level"], logged[2]["error"]) == ("warning", "InputError")
    assert "hush" not in lines.getvalue()
    assert "77.5" not in lines.getvalue()
