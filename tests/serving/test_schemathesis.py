"""Requests that schemathesis makes of the description: every answer is one that it foresees, and none is a crash."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.artifact.installed import environment
from tests.serving.fake_engine import FakeEngine
from tests.serving.rest_client import Lengths
from tests.serving.test_client import server_in_a_thread

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_requests_made_of_the_description(tmp_path: Path) -> None:
    # of its own: what it needs is newer than what is pinned
    python = environment("schemathesis", "schemathesis>=4.30")
    # else nearly all requests would be for models that are none
    names = '[parameters]\n"path.name" = ["double", "texts", "none"]\n"path.version" = ["1", "2", "none"]\n'
    # a deadline of a millisecond is drawn too, and may well pass
    names += '[checks.not_a_server_error]\nexpected-statuses = ["2XX", "3XX", "4XX", 504]\n'
    (tmp_path / "schemathesis.toml").write_text(names, encoding="utf-8")
    options = ["--max-time", "40", "--seed", "1", "--no-color", "--checks", ",".join(CHECKS), "--continue-on-failure"]
    engine = FakeEngine()
    with server_in_a_thread(engine, tasks={"lengths": Lengths()}) as url:
        command = [str(python), "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert engine.answered
