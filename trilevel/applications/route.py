"""From a trained classifier to an artifact with certified paths: every stage is kept, and resumed."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from trilevel.applications.kinds import kind_of
from trilevel.applications.route_family import Origin, Progress, Tell, make_family
from trilevel.applications.route_outcomes import (
    Machine,
    Static,
    batches_of,
    collect,
    open_statics,
    sample_ms,
    time_paths,
)
from trilevel.artifact.check import default_runtime
from trilevel.artifact.manifest import (
    CERTIFICATE_FILE,
    FULL_FAMILY,
    KNOWN_FILE,
    LATENCY_FILE,
    PAGE_FILE,
    ROUTER_FILE,
    ROUTING_FILE,
    Artifact,
    check_free,
    is_artifact,
    labels_of,
    read_artifact,
    write_artifact,
)
from trilevel.artifact.path_probes import check_path_probes
from trilevel.artifact.platform import isa_class
from trilevel.artifact.routed import model_hash
from trilevel.artifact.runtime.steps import SegmentSteps
from trilevel.compression.plan import CompressionPlan
from trilevel.compression.written import read_json, write_json
from trilevel.data.places import data_path
from trilevel.errors import ConfigError, InputError
from trilevel.report.routing import route_page
from trilevel.routing.certificate import Certificate, Platform, digest, share_of_delta
from trilevel.routing.decision import DYNAMIC, Decision, Parts, Promise, decide, most_changed
from trilevel.routing.features import features_of
from trilevel.routing.latency import LatencyTable
from trilevel.routing.outcomes import Outcomes, split_groups
from trilevel.routing.paths import Family
from trilevel.routing.samples import Samples, beginnings, check_apart, without_known
from trilevel.routing.targets import Target

TRIES_FILE = "tries.json"


def load_samples(artifact: Artifact, data: str | Path, *, split: str | None, limit: int | None) -> Samples:
    """Samples of the artifact's task.

    Raises:
        InputError: the data cannot be used.
        ConfigError: the task is not routed.
    """
    features_of(artifact.manifest.task)
    module = importlib.import_module(f"trilevel.applications.{artifact.manifest.task}.routing")
    found: Samples = module.load_samples(artifact, data, split=split, limit=limit)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How paths are chosen and proved.

    Args:
        targets: what is promised; the first decides.
        confidence: that the promise holds, such as 0.95.
        seed: of the split, and of training.
        limit: samples of each split, for a try.
        drop_known: leave out samples that the model was trained on, instead of refusing them.
        budget_s: of measuring times.
        statics: artifacts of other models for the same task, which the report shows beside.
        target: of the artifact that is made of a run, see `export`.
    """

    targets: tuple[Target, ...]
    confidence: float = 0.95
    seed: int = 0
    limit: int | None = None
    drop_known: bool = False
    budget_s: float = 60.0
    statics: tuple[str | Path, ...] = ()
    target: str = "portable"

    def __post_init__(self) -> None:
        """Check every value."""
        if not self.targets:
            raise ConfigError("no target: say what is promised, as in harm:0.01.")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence={self.confidence} must lie between 0 and 1, as in 0.95.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What routing made: the artifact, and the numbers of its report."""

    artifact: Artifact
    report: dict[str, Any]


def route(
    source: str | Path,
    data: str | Path | None,
    out: str | Path,
    options: Options,
    *,
    plan: CompressionPlan | None = None,
    machine: Machine | None = None,
    work: str | Path | None = None,
    progress: Progress = lambda _what, _done: None,
    show_progress: bool = True,
    tell: Tell = lambda _what: None,
) -> Routing:
    """Write an artifact in which every input takes the cheapest path that a certificate allows.

    Made before and not changed, the family of cheap paths, their times and their answers are taken from `work`.

    Args:
        source: run of a float classifier, the reference; or an artifact with paths, to certify it anew.
        data: held-out data with labels. The data of the run's own training is split as it was for that, and its
            training part is not touched; None names it. Of other data all is held out.
        out: artifact to write.
        options: see there.
        plan: how the cheap family is made of the run; None for exits after every third of the blocks, and INT8.
        machine: what runs the paths; the certificate is of it alone.
        work: folder of what is kept between calls; default `OUT.work`.
        progress, show_progress, tell: told of what is done.

    Raises:
        InputError: the data cannot be used, overlaps with the training, or lacks what a target needs.
        ConfigError, CheckpointError, ArtifactError, MissingExtraError: as the parts say.
    """
    out = Path(out)
    check_free(out)
    folder = Path(f"{out}.work") if work is None else Path(work)
    if is_artifact(source):
        artifact, origin = read_artifact(source), None
    else:
        made = make_family(
            source, data, plan, folder, target=options.target, seed=options.seed, limit=options.limit,
            progress=progress, show_progress=show_progress, tell=tell,
        )  # fmt: skip
        artifact, origin = made
    if not artifact.manifest.families:
        raise ConfigError(f"{source} is an artifact with one path. Name the run it was made of, to make others.")
    machine = machine or Machine(runtime=default_runtime(artifact))
    steps = machine.open(artifact)
    check_path_probes(artifact, steps)
    statics = open_statics(artifact, machine, options.statics)
    known = _known(artifact, origin)
    split = _split(artifact, origin, data, options, known)
    return _routed(artifact, split, out, options, machine, steps, statics, folder, progress, known)


def _split(
    artifact: Artifact, origin: Origin | None, data: str | Path | None, options: Options, known: set[str]
) -> dict[str, Samples]:
    """Samples that fit, prove and report; no group in two of them, none that the model was trained on."""
    if data is None and origin is None:
        raise InputError("an artifact knows no data. Name data with labels that its model has not seen.")
    path = data_path(origin.path if data is None and origin is not None else data or "")
    is_own = origin is not None and path.resolve() == data_path(origin.path).resolve()
    load = partial(load_samples, artifact, path, limit=options.limit)
    if not is_own:
        parts = _parted(load(split=None), (0.25, 0.5, 0.25), options.seed)
    else:
        held = load(split="valid")
        try:
            test: Samples | None = load(split="test")
        except InputError:
            test = None
        parts = _parted(held, (0.25, 0.5, 0.25) if test is None else (1 / 3, 2 / 3), options.seed)
        parts += [] if test is None else [test]
    named = dict(zip(("tune", "prove", "test"), parts, strict=True))
    for name, samples in named.items():
        if options.drop_known:
            named[name] = without_known(samples, known)
        else:
            check_apart(samples, known, what=f"{path} ({name})")
    return named


def _known(artifact: Artifact, origin: Origin | None) -> set[str]:
    """Digests of what the run was trained on, or their beginnings; an artifact keeps those."""
    if origin is None:
        return set(artifact.file(KNOWN_FILE).read_text("ascii").split()) if KNOWN_FILE in artifact.hashes else set()
    if artifact.manifest.task == "documents":
        from trilevel.applications.documents.routing import known_digests

        # tokens of thousands of documents are not needed for it
        return known_digests(origin.path)
    return set(load_samples(artifact, origin.path, split="train", limit=None).digests)


def _parted(samples: Samples, shares: Sequence[float], seed: int) -> list[Samples]:
    return [samples.some(rows.tolist()) for rows in split_groups(samples.groups, shares, seed=seed)]


def _routed(
    artifact: Artifact,
    split: Mapping[str, Samples],
    out: Path,
    options: Options,
    machine: Machine,
    steps: Mapping[str, SegmentSteps],
    statics: Mapping[str, Static],
    work: Path,
    progress: Progress,
    known: set[str],
) -> Routing:
    table = time_paths(
        artifact,
        machine,
        split["tune"],
        steps,
        work / "latency.json",
        batches=batches_of(artifact.manifest.task),
        statics=statics,
        budget_s=options.budget_s,
        progress=progress,
    )
    found = {
        name: collect(artifact, machine, samples, steps, work / f"{name}.npz", progress=progress, what=name)
        for name, samples in split.items()
    }

    def said(name: str, one: Static, part: str) -> Outcomes:
        kept = work / f"{name}.{part}.npz"
        return collect(
            one.artifact, one.machine, split[part], {FULL_FAMILY: one.steps}, kept, progress=progress, what=name
        )

    beside = {name: (said(name, one, "prove"), said(name, one, "test")) for name, one in statics.items()}
    full = artifact.manifest.full_path
    tries = _tries(work, artifact, split["prove"], options, machine)
    delta = (1 - options.confidence) * share_of_delta(tries)
    promise = Promise(targets=options.targets, delta=delta, labels=promised_labels(artifact))
    families = {
        name: [path for number in range(len(segments)) if (path := Family.parse(name).at(number + 1).name) != full]
        for name, segments in artifact.manifest.families.items()
    }
    decision = decide(
        Parts(tune=found["tune"], prove=found["prove"], test=found["test"]),
        promise,
        families,
        features_of(artifact.manifest.task)[0],
        partial(sample_ms, table),
        batches=table.batches,
        statics=beside,
    )
    changed = most_changed(found["prove"], decision, 1 - options.confidence)
    certificate = _certificate(artifact, decision, changed, options, machine, steps, split["prove"], tries)
    report = _report(artifact, decision, certificate, split, table, options, machine)
    return Routing(artifact=_written(artifact, out, decision, certificate, table, report, known), report=report)


def promised_labels(artifact: Artifact) -> tuple[str, ...]:
    """Names of the classes that a promise may name; none where answers are no classes."""
    return () if artifact.manifest.task == "documents" else tuple(labels_of(artifact.manifest))


def default_target(source: str | Path, max_loss: float) -> Target:
    """What `max_loss` means for a run or an artifact: harm, or where summaries are graded what ROUGE-1 may drop.

    Raises:
        CheckpointError, ArtifactError: there is neither a run nor an artifact.
    """
    task = read_artifact(source).manifest.task if is_artifact(source) else kind_of(source)
    return Target(kind="drop" if task == "documents" else "harm", alpha=max_loss)


def _tries(work: Path, artifact: Artifact, samples: Samples, options: Options, machine: Machine) -> int:
    """How often these samples were asked for a proof, this time included; the same question again is no new one."""
    question = digest([model_hash(artifact), [one.name for one in options.targets], options.confidence, options.seed,
                       machine.runtime])  # fmt: skip
    asked: dict[str, list[str]] = read_json(work / TRIES_FILE)
    before = asked.get(samples.sha256, [])
    if CERTIFICATE_FILE in artifact.hashes and not before:
        made = Certificate.from_dict(json.loads(artifact.file(CERTIFICATE_FILE).read_text(encoding="utf-8")))
        before = [""] * made.tries if made.hashes.get("data") == samples.sha256 else []
    if question not in before:
        before = [*before, question]
        write_json(work / TRIES_FILE, asked | {samples.sha256: before})
    return before.index(question) + 1


def _certificate(
    artifact: Artifact,
    decision: Decision,
    changed: float,
    options: Options,
    machine: Machine,
    steps: Mapping[str, SegmentSteps],
    samples: Samples,
    tries: int,
) -> Certificate | None:
    if decision.certified is None:
        return None
    chosen = next(row for row in decision.rows if row.name == ("ours" if decision.kind == DYNAMIC else decision.kind))
    return Certificate(
        proofs=decision.certified.proofs,
        delta=1 - options.confidence,
        setting=decision.setting,
        hashes={
            "model": model_hash(artifact),
            "router": decision.router.sha256,
            "data": samples.sha256,
            "settings": digest([dict(one) for one in decision.chain]),
        },
        platform=Platform(
            runtime=machine.runtime,
            version=next(iter(steps.values())).version,
            isa=isa_class(),
            precision=machine.precision,
        ),
        seed=options.seed,
        tries=tries,
        created=datetime.now(UTC).date().isoformat(),
        measured={"test_loss": chosen.loss, "test_ms": chosen.ms[min(chosen.ms)], "disagreement": changed},
    )


def _report(
    artifact: Artifact,
    decision: Decision,
    certificate: Certificate | None,
    split: Mapping[str, Samples],
    table: LatencyTable,
    options: Options,
    machine: Machine,
) -> dict[str, Any]:
    rows = [asdict(row) | {"ms": {str(batch): ms for batch, ms in row.ms.items()}} for row in decision.rows]
    loss = {row.name: -row.loss for row in decision.rows if row.kind == "fixed"}
    return {
        "case": "route",
        "task": artifact.manifest.task,
        "name": artifact.manifest.name,
        "targets": [target.name for target in options.targets],
        "confidence": options.confidence,
        "samples": {name: len(samples) for name, samples in split.items()},
        "kind": decision.kind,
        "promise": decision.refusal if certificate is None else certificate.said(),
        "is_certified": certificate is not None,
        "rows": rows,
        "dominated": table.dominated(loss),
        "threads": machine.threads,
        "machine": dict(table.machine),
    }


def _written(
    artifact: Artifact,
    out: Path,
    decision: Decision,
    certificate: Certificate | None,
    table: LatencyTable,
    report: Mapping[str, Any],
    known: set[str],
) -> Artifact:
    texts: dict[str, Any] = {
        ROUTER_FILE: decision.router.to_dict(),
        LATENCY_FILE: table.to_dict(),
        ROUTING_FILE: report,
    }
    if certificate is not None:
        texts[CERTIFICATE_FILE] = certificate.to_dict()
    files: dict[str, Callable[[Path], None]] = {
        name: partial(shutil.copyfile, artifact.file(name)) for name in artifact.hashes if name not in _REPLACED
    }
    files |= {name: partial(write_json, values=values) for name, values in texts.items()}
    if known:
        files[KNOWN_FILE] = partial(_write, text="\n".join(sorted(beginnings(known))) + "\n")
    page = route_page(report)
    files[PAGE_FILE] = lambda path: _write(path, page)
    return write_artifact(out, artifact.manifest, files)


_REPLACED = (ROUTER_FILE, LATENCY_FILE, ROUTING_FILE, CERTIFICATE_FILE, PAGE_FILE)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
