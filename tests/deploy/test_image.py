"""What `deploy/` holds for containers: the image's commands in a clean environment, the fields of the manifests."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.artifact.installed import environment

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, with continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def of(name: str) -> list[str]:
    return [rest for own, rest in instructions() if own == name]


def test_the_image_runs_as_nobody_special_and_says_whether_it_is_ready() -> None:
    (user,) = of("USER")
    assert f"--uid {user} " in " ".join(of("RUN"))
    assert of("FROM")[0].removesuffix(" AS build") == of("FROM")[1]
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("ENTRYPOINT")


def test_every_requirement_is_pinned_and_none_is_torch() -> None:
    lines = (DEPLOY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if not line.startswith("#")]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = {line.partition("==")[0].lower().replace("_", "-") for line in pinned.splitlines()}
    assert not set(wanted) - pins
    assert "torch" not in wanted


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that the image has at /opt/trilevel, made by the commands of its first stage."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the image has Python 3.11, of which the pinned packages are")
    source, target = tmp_path_factory.mktemp("image") / "src", tmp_path_factory.mktemp("opt") / "trilevel"
    source.mkdir()
    for line in of("COPY"):
        *found, to = line.split()
        if found[0].startswith("--from"):
            continue
        for one in found:
            if (ROOT / one).is_dir():
                shutil.copytree(ROOT / one, source / to, ignore=shutil.ignore_patterns("__pycache__", "lib"))
            else:
                (source / to).mkdir(exist_ok=True)
                shutil.copy(ROOT / one, source / to)
    for command in of("RUN"):
        if "useradd" not in command:
            own = shlex.split(command.replace("/opt/trilevel", str(target)).replace("--no-cache-dir", ""))
            own[0] = sys.executable if own[0] == "python" else own[0]
            done = subprocess.run(own, cwd=source, capture_output=True, text=True, timeout=500)
            if done.returncode and "No matching distribution" in done.stderr:
                pytest.skip(f"packages cannot be had: {done.stderr.strip().splitlines()[-1]}")
            assert done.returncode == 0, done.stderr[-2000:]
    yield target
    shutil.rmtree(target)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_image(built: Path, tmp_path: Path) -> None:
    ready, entry, command = (
        json.loads(of(name)[0][of(name)[0].index("[") :]) for name in ("HEALTHCHECK", "ENTRYPOINT", "CMD")
    )
    environment = {"PATH": f"{built / 'bin'}:/usr/bin:/bin", "PYTHONUNBUFFERED": "1"}
    python = str(built / "bin" / "python")
    absent = subprocess.run([python, "-c", "import torch"], env=environment, capture_output=True, text=True)
    assert "No module named 'torch'" in absent.stderr
    # here as on a machine of one's own: loopback, and ports that are free
    own = [
        str(built / "bin" / entry[0]),
        *entry[1:],
        *command,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--grpc-port",
        "0",
    ]
    with subprocess.Popen(own, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said: list[str] = []
            for line in process.stderr:
                said.append(line)
                if line.startswith("{") and json.loads(line)["event"] == "started":
                    port = json.loads(line)["rest_port"]
                    break
            else:
                pytest.fail("".join(said))
            check = [python, *(one.replace(":8000/", f":{port}/") for one in ready[1:])]
            assert subprocess.run(check, env=environment, capture_output=True).returncode == 0
            sent = json.dumps({"text": "Cats sleep all day long. Dogs do not.", "sentences": 1}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/summarize", sent, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as got:
                assert len(json.load(got)["sentences"]) == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=40) == 0
            assert subprocess.run(check, env=environment, capture_output=True).returncode != 0
        finally:
            process.kill()


@pytest.mark.foreign
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("", "", ""),
        ("storageUri", "storageURI", "storageURI is no field of V1beta1ModelSpec"),
        ("maxReplicas: 4", "maxReplicas: many", "InferenceService.spec.predictor.maxReplicas: 'many' is no int"),
        ("readinessProbe:", "readyProbe:", "readyProbe"),
        ("  supportedModelFormats", "  containers: []\n  other", "other is no field of V1alpha1ServingRuntimeSpec"),
    ],
)
def test_the_manifest_has_the_fields_of_kserve(before: str, after: str, message: str, tmp_path: Path) -> None:
    python = environment("kserve", "kserve>=0.21", "pyyaml")
    file = tmp_path / "kserve.yaml"
    file.write_text((DEPLOY / "kserve.yaml").read_text(encoding="utf-8").replace(before, after), encoding="utf-8")
    script = str(Path(__file__).with_name("kserve_models.py"))
    done = subprocess.run([str(python), script, str(file)], capture_output=True, text=True, timeout=100)
    if message:
        assert message in done.stderr
    else:
        assert re.fullmatch(r"ServingRuntime \d+\nInferenceService \d+\n", done.stdout), done.stderr


def test_the_unit_is_one(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = (DEPLOY / "trilevel.service").read_text(encoding="utf-8")
    file = tmp_path / "trilevel.service"
    file.write_text(re.sub("ExecStart=[^ ]+", f"ExecStart={sys.executable}", text), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True)
    assert str(file.name) not in done.stderr, done.stderr
