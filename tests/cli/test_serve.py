"""`trilevel serve` as a process: the shipped summariser over HTTP, keys, wrong options."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trilevel.cli.main import app

TEXT = "Local heads see a window of tokens. Regional heads see summaries of regions. This is short."


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    made = [CliRunner().invoke(app, ["serve-key", name, str(file)]) for name in ("alice", "bob")]
    assert [one.exit_code for one in made] == [0, 0]
    lines = file.read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["alice", "bob"]
    key = made[1].output.strip()
    assert key not in file.read_text()
    return file, key


@pytest.fixture(scope="module")
def address(keys: tuple[Path, str]) -> Iterator[str]:
    command = [sys.executable, "-m", "trilevel", "serve", "documents", "--port", "0", "--grpc-port", "-1"]
    command += ["--instances", "1", "--threads", "1", "--keys", str(keys[0])]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.startswith("{") and json.loads(line)["event"] == "started":
                    yield f"http://127.0.0.1:{json.loads(line)['rest_port']}"
                    break
            else:
                pytest.fail("the server ended before it listened")
            process.send_signal(signal.SIGTERM)
            events = [json.loads(line)["event"] for line in process.stderr if line.startswith("{")]
            assert events[-2:] == ["draining", "ended"]
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


def asked(address: str, path: str, body: bytes | None, **headers: str) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(
        address + path, body, {name.replace("_", "-"): own for name, own in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read() or b"{}")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_summary_with_a_key(address: str, keys: tuple[Path, str]) -> None:
    body = json.dumps({"text": TEXT, "sentences": 2}).encode()
    start = time.monotonic()
    status, found = asked(
        address, "/v1/summarize", body, Content_Type="application/json", Authorization=f"Bearer {keys[1]}"
    )
    assert status == 200
    assert len(found["sentences"]) == 2  # type: ignore[arg-type]
    assert found["model"] == "documents"
    assert time.monotonic() - start < 30


def test_errors(address: str, keys: tuple[Path, str]) -> None:
    key = f"Bearer {keys[1]}"
    status, found = asked(address, "/v1/summarize", b"{}", Content_Type="application/json")
    assert (status, "an API key is needed" in str(found["error"])) == (401, True)
    status, found = asked(address, "/v1/summarize", b"{", Content_Type="application/json", Authorization=key)
    assert (status, "no JSON" in str(found["error"])) == (400, True)
    status, found = asked(address, "/v1/summarize", b"", Content_Type="text/plain", Authorization=key)
    assert (status, "no text to summarise" in str(found["error"])) == (400, True)
    status, found = asked(address, "/v2/models/nobody/infer", b"{}", Authorization=key)
    assert status in (400, 404)
    # a server of summaries predicts no classes
    status, _ = asked(address, "/v1/predict", b"a", Content_Type="text/plain", Authorization=key)
    assert status == 404


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "there is no artifact at nowhere"),
        (["documents", "a/documents"], "documents twice; name each one differently"),
        (["documents", "--tls-cert", "c.pem"], "--tls-cert and --tls-key go together"),
        (["documents", "--keys", "none.txt"], "the API keys none.txt cannot be read"),
        (["documents", "--engine", "ray", "--audit", "kept"], "--trace-to are not for --engine ray"),
        (["-x=documents"], "No such option"),
    ],
)
def test_wrong_options(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["serve", *options])
    assert done.exit_code == 2
    assert message in done.stderr
