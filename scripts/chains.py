"""Make again what `trilevel bench compression` measures of the applications: levels, pruning, INT8, with three seeds.

    TRILEVEL_DATA=... python -m scripts.chains [images] [documents] [--seeds 0 1 2]
    TRILEVEL_DATA=... python -m scripts.chains cifar --seeds 0

Stopped, the same command goes on. What `chains.json` in `--out` lists, with the seconds that each stage took, is kept:
delete its line to make a stage again. Documents begin with the shipped model, images with a dense teacher.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from trilevel.applications.documents.checkpoint import PRETRAINED
from trilevel.applications.images.checkpoint import load_run, save_run
from trilevel.compression.written import write_json

ROOT = Path(__file__).parents[1]
TIMES = "chains.json"
FASHION, CIFAR, TECH = "images/fashion_mnist.npz", "images/cifar10_jpeg.npz", "docs/tech.jsonl.xz"
Stage = tuple[str, Callable[[], None]]


def images(
    out: Path,
    work: Path,
    seeds: Sequence[int],
    *,
    name: str = "images",
    data: str = FASHION,
    which: str = "fashion",
    options: Sequence[str] = (),
) -> Iterator[Stage]:
    """Name of each stage and what does it; `options` are of the teacher's training."""
    dense = out / name / "dense"
    train = partial(command, "train", "images", data, "--recipe")
    trained = work / f"{name}-dense"
    yield f"{name}/dense", partial(train, recipe(f"images-{which}"), "--dense", "--out", trained, *options)
    yield f"{name}/dense, kept", partial(keep, trained, dense, data)
    for seed in seeds:
        levels, small = (work / f"{name}-{what}-{seed}" for what in ("levels", "small"))
        taught = ("--teacher", dense, "--seed", seed)
        yield f"{name}/levels-{seed}", partial(train, recipe(f"images-{which}-levels"), "--out", levels, *taught)
        plan = ("--plan", recipe("compress-images"))
        yield f"{name}/small-{seed}", partial(command, "compress", levels, small, *plan, *taught)
        yield from exported(name, seed, small, out)


def documents(out: Path, work: Path, seeds: Sequence[int]) -> Iterator[Stage]:
    """Name of each stage and what does it."""
    for seed in seeds:
        small = work / f"documents-small-{seed}"
        options = ("--plan", recipe("compress-documents"), "--data", TECH, "--seed", seed)
        yield f"documents/small-{seed}", partial(command, "compress", PRETRAINED, small, *options)
        yield from exported("documents", seed, small, out)


def exported(name: str, seed: int, small: Path, out: Path) -> Iterator[Stage]:
    """Of the first seed for the native kernels too: they change times alone."""
    yield f"{name}/seed-{seed}", partial(command, "export", small, out / name / f"seed-{seed}")
    if seed == 0:
        native = out / name / f"native-{seed}"
        yield f"{name}/native-{seed}", partial(command, "export", small, native, "--target", "native")


CHAINS: dict[str, Callable[[Path, Path, Sequence[int]], Iterator[Stage]]] = {
    "images": images,
    "documents": documents,
    # three quarters of an hour without bfloat16
    "cifar": partial(images, name="cifar", data=CIFAR, which="cifar", options=("--epochs", "2")),
}


def recipe(name: str) -> Path:
    """Path of a recipe."""
    return ROOT / f"recipes/{name}.toml"


def command(*words: str | Path | int) -> None:
    """Run `trilevel` with these arguments; end with its exit code if it fails."""
    given = list(map(str, words))
    print("== trilevel", *given, flush=True)
    found = subprocess.run([str(Path(sys.executable).with_name("trilevel")), *given], check=False)
    if found.returncode:
        sys.exit(found.returncode)


def keep(run: Path, out: Path, data: str) -> None:
    """Copy a run of images without the state of its training and without paths of this machine."""
    loaded = load_run(run)
    save_run(dataclasses.replace(loaded, folder=out, origin=dataclasses.replace(loaded.origin, path=data)))


def main() -> int:
    """Run the stages that are not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chains", nargs="*", help=f"of {', '.join(CHAINS)}; default: images, documents")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/models")
    parser.add_argument("--work", type=Path, default=ROOT / "out/chains")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    if unknown := set(given.chains) - set(CHAINS):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(CHAINS)}")
    file = given.out / TIMES
    seconds = json.loads(file.read_text()) if file.exists() else {}
    for chain in given.chains or ("images", "documents"):
        for name, stage in CHAINS[chain](given.out, given.work, given.seeds):
            if name not in seconds:
                start = time.monotonic()
                stage()
                seconds[name] = round(time.monotonic() - start, 1)
                write_json(file, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
