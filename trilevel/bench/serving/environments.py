"""Other servers, each in an environment of its own, made once in a folder of the cache; and how to start them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trilevel.bench.serving.trivial import CLASSES, FEATURES, INPUT, NAME, OUTPUT
from trilevel.data.places import cache_dir
from trilevel.errors import InputError

SCRIPTS = Path(__file__).with_name("peers")
INFER = f"/v2/models/{NAME}/infer"
RPC = "/inference.GRPCInferenceService/ModelInfer"
_MAKE_S = 1200.0
_CONFIG = """backend: "python"
max_batch_size: 32
dynamic_batching {{}}
input [{{ name: "{input}" data_type: TYPE_FP32 dims: [{features}] }}]
output [{{ name: "{output}" data_type: TYPE_FP32 dims: [{classes}] }}]
instance_group [{{ kind: KIND_CPU count: 1 }}]
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A server with the trivial model.

    Attributes:
        packages: that make its environment.
        ready: path that answers 200.
        rest: path of a request.
        has_grpc: whether it speaks the protocol over gRPC.
        is_python: whether requests pass through Python in the server itself.
        ours: whether it sees our packages too, behind its own.
    """

    name: str
    packages: tuple[str, ...]
    ready: str
    rest: str = INFER
    has_grpc: bool = True
    is_python: bool = True
    ours: bool = False


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name="litserve", packages=("litserve==0.2.19", "numpy"), ready="/health", rest="/predict", has_grpc=False,
            ours=True,
        ),
        Peer(name="kserve", packages=("kserve==0.21.0",), ready="/v2/health/ready"),
        Peer(name="triton", packages=("nvidia-pytriton==0.7.0",), ready="/v2/health/ready", is_python=False),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A peer's environment.

    Attributes:
        python: its interpreter.
    """

    peer: Peer
    python: Path

    def command(self, port: int, grpc_port: int, work: Path) -> tuple[list[str], dict[str, str]]:
        """What starts it, and its environment variables."""
        if self.peer.name == "triton":
            return _triton(self.python, port, grpc_port, work)
        script = SCRIPTS / f"{self.peer.name}_linear.py"
        sizes = [str(port), str(FEATURES), str(CLASSES)]
        return [str(self.python), str(script), *sizes, *([str(grpc_port)] if self.peer.has_grpc else [])], {}


def find(names: Sequence[str], *, make: bool) -> tuple[list[Made], dict[str, str]]:
    """The peers whose environments are there, and why the others are not.

    Args:
        names: of peers.
        make: whether those that are missing are made, which asks the package index.

    Raises:
        InputError: a name is unknown.
    """
    found, absent = [], {}
    for name in names:
        if name not in PEERS:
            raise InputError(f"there is no peer {name!r}; known are {', '.join(PEERS)}.")
        folder = cache_dir() / "peers" / name
        if not folder.is_dir() and not make:
            absent[name] = "it is not installed; --peers installs it"
            continue
        try:
            if not folder.is_dir():
                _make(PEERS[name], folder)
            found.append(Made(peer=PEERS[name], python=folder / "bin" / "python"))
        except (OSError, subprocess.SubprocessError) as error:
            absent[name] = f"it cannot be installed: {error}"
    return found, absent


def _make(peer: Peer, folder: Path) -> None:
    """Whole, or not at all; scripts in an environment know where it lies, so it is made in place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        _run(sys.executable, "-m", "venv", str(folder))
        _run(str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *peer.packages)
        if peer.ours:
            # a path file is read after the environment's own packages, so that it keeps its versions of them
            site = next((folder / "lib").glob("python*/site-packages"))
            own = [sysconfig.get_paths()["purelib"], str(Path(__file__).parents[3])]
            (site / "trilevel.pth").write_text("\n".join(own) + "\n", encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_MAKE_S)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise OSError(f"{Path(command[0]).name} said {last}")


def _triton(python: Path, port: int, grpc_port: int, work: Path) -> tuple[list[str], dict[str, str]]:
    """The server's binary that PyTriton brings, without PyTriton."""
    root = next((python.parents[1] / "lib").glob("python*/site-packages/pytriton/tritonserver"))
    folder = Path(tempfile.mkdtemp(prefix="triton-", dir=work))
    model = folder / "models" / NAME
    (model / "1").mkdir(parents=True)
    shutil.copy(SCRIPTS / "triton_linear.py", model / "1" / "model.py")
    config = _CONFIG.format(input=INPUT, output=OUTPUT, features=FEATURES, classes=CLASSES)
    (model / "config.pbtxt").write_text(config, encoding="utf-8")
    backends = folder / "backends"
    shutil.copytree(root / "backends" / "python", backends / "python")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = root / "python_backend_stubs" / version
    if stubs.is_dir():
        shutil.copytree(stubs, backends / "python", dirs_exist_ok=True)
    command = [
        str(root / "bin" / "tritonserver"),
        f"--model-repository={folder / 'models'}",
        f"--backend-directory={backends}",
        f"--http-port={port}",
        f"--grpc-port={grpc_port}",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        "--allow-metrics=false",
    ]
    site = next((python.parents[1] / "lib").glob("python*/site-packages"))
    # the wheel keeps its libraries beside itself; the interpreter's own is where the stub does not look
    libraries = [root / "lib", site / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR") or ""]
    # the stub takes the interpreter that it finds first, and NumPy from there
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])
    return command, {"LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)), "PYTHONPATH": str(site), "PATH": path}
