"""Segments and their thresholds as one ONNX file for batches of one: `If` behind each segment.

ONNX's `If` asks one question of a whole batch, so this is for one input at a time, where no host shall run the rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.artifact.manifest import MODEL_FILE, NEXT, Artifact, segment_file
from trilevel.errors import ConfigError, require

LOGITS, HIDDEN, SEGMENTS_RUN = "logits", "hidden", "segments_run"


def export_branches(artifact: Artifact, family: str, margins: Sequence[float], path: Path) -> Path:
    """Write a graph that leaves behind the first segment whose margin suffices; without any, the whole model answers.

    Its inputs are the artifact's, of one row; it gives `logits` (1, classes) and `segments_run` (1,) int64, 0 for the
    whole model, which runs from its beginning.

    Args:
        artifact: with paths.
        family: whose segments run.
        margins: the least difference of the two largest logits with which a segment's answer is taken, one a segment;
            0 takes every answer, and the graphs behind it are left out.
        path: of the file.

    Raises:
        ArtifactError: the artifact has no such family.
        ConfigError: there are not as many margins as segments, or the artifact is of no classifier.
        MissingExtraError: onnx is not installed.
    """
    onnx = require("onnx", extra="export")
    artifact.segment(family, 0)
    if LOGITS not in artifact.manifest.outputs:
        raise ConfigError(
            f"{artifact.path} chooses sentences between its graphs, which no graph can; its paths run with "
            "trilevel.load. Classifiers can be written as one graph."
        )
    count = len(artifact.manifest.families[family])
    if len(margins) != count:
        raise ConfigError(f"{len(margins)} margins were given for the {count} segments of {family}; give one each.")
    used = next((number for number, least in enumerate(margins) if least <= 0), count - 1) + 1
    files = [artifact.file(segment_file(family, number)) for number in range(used)]
    parts = [onnx.load(str(file)) for file in files]
    whole = onnx.load(str(artifact.file(MODEL_FILE))) if margins[used - 1] > 0 else None
    first = parts[0].graph
    builder = _Builder(onnx, list(first.input), margins)
    nodes, weights, logits, run = builder.behind(parts, whole, 0, {one.name: one.name for one in first.input})
    nodes += [
        onnx.helper.make_node("Identity", [logits], [LOGITS]),
        onnx.helper.make_node("Identity", [run], [SEGMENTS_RUN]),
    ]
    classes = parts[-1].graph.output[-1].type.tensor_type.shape.dim[-1].dim_value
    kinds = onnx.TensorProto
    outputs = [
        onnx.helper.make_tensor_value_info(LOGITS, kinds.FLOAT, [1, classes]),
        onnx.helper.make_tensor_value_info(SEGMENTS_RUN, kinds.INT64, [1]),
    ]
    graph = onnx.helper.make_graph(nodes, "paths", list(first.input), outputs, weights)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=parts[0].opset_import, ir_version=parts[0].ir_version), str(path)
    )
    return path


class _Builder:
    """Nests graphs: everything behind a segment stands in the `else` of its `If`, and sees the names outside."""

    def __init__(self, onnx: Any, inputs: Sequence[Any], margins: Sequence[float]) -> None:
        self.onnx, self.margins = onnx, margins
        self.inputs = {one.name: one.name for one in inputs}

    def behind(
        self, parts: Sequence[Any], whole: Any, number: int, given: Mapping[str, str]
    ) -> tuple[list[Any], list[Any], str, str]:
        """Nodes and weights of the segments from `number` on; the names of their logits and of the segments run."""
        if number == len(parts):
            return self._placed(whole, "whole/", self.inputs, 0)
        nodes, weights, logits, run = self._placed(parts[number], f"{number + 1}/", given, number + 1)
        is_last = number == len(parts) - 1
        if is_last and whole is None:
            return nodes, weights, logits, run
        # the mask, where there is one, is the model's own
        inner = self.inputs | {HIDDEN: f"{number + 1}/{NEXT}{HIDDEN}"}
        then = self._graph([], [], logits, run, f"then{number}")
        other = self._graph(*self.behind(parts, whole, number + 1, inner), f"else{number}")
        made = [f"{number + 1}/{name}/chosen" for name in (LOGITS, SEGMENTS_RUN)]
        condition, asked, constants = self._condition(logits, number)
        choice = self.onnx.helper.make_node("If", [condition], made, then_branch=then, else_branch=other)
        return [*nodes, *asked, choice], [*weights, *constants], made[0], made[1]

    def _placed(
        self, model: Any, prefix: str, given: Mapping[str, str], number: int
    ) -> tuple[list[Any], list[Any], str, str]:
        """A graph with names of its own, but for its inputs."""
        graph = self.onnx.compose.add_prefix(model, prefix).graph
        renamed = {f"{prefix}{one.name}": given[one.name] for one in model.graph.input}
        for node in graph.node:
            for place, name in enumerate(node.input):
                node.input[place] = renamed.get(name, name)
        run = self.onnx.numpy_helper.from_array(_int64([number]), f"{prefix}{SEGMENTS_RUN}")
        return list(graph.node), [*graph.initializer, run], f"{prefix}{LOGITS}", run.name

    def _condition(self, logits: str, number: int) -> tuple[str, list[Any], list[Any]]:
        """Whether the difference of the two largest logits is at least the margin."""
        make, name = self.onnx.helper.make_node, f"{number + 1}/margin"
        constants = {
            "two": _int64([2]),
            "ends": _int64([1, 1]),
            "none": _int64([]),
            "least": _float32(self.margins[number]),
        }
        nodes = [
            make("TopK", [logits, f"{name}/two"], [f"{name}/best", f"{name}/places"], axis=1),
            make("Split", [f"{name}/best", f"{name}/ends"], [f"{name}/first", f"{name}/second"], axis=1),
            make("Sub", [f"{name}/first", f"{name}/second"], [f"{name}/difference"]),
            make("Reshape", [f"{name}/difference", f"{name}/none"], [f"{name}/scalar"]),
            make("GreaterOrEqual", [f"{name}/scalar", f"{name}/least"], [f"{name}/suffices"]),
        ]
        stored = [self.onnx.numpy_helper.from_array(value, f"{name}/{key}") for key, value in constants.items()]
        return f"{name}/suffices", nodes, stored

    def _graph(self, nodes: list[Any], weights: list[Any], logits: str, run: str, name: str) -> Any:
        made = [f"{name}/{LOGITS}", f"{name}/{SEGMENTS_RUN}"]
        make, kinds = self.onnx.helper, self.onnx.TensorProto
        ends = [make.make_node("Identity", [one], [out]) for one, out in zip((logits, run), made, strict=True)]
        values = [
            make.make_tensor_value_info(made[0], kinds.FLOAT, None),
            make.make_tensor_value_info(made[1], kinds.INT64, [1]),
        ]
        return make.make_graph([*nodes, *ends], name, [], values, weights)


def _int64(values: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.asarray(values, np.int64)


def _float32(value: float) -> npt.NDArray[np.float32]:
    return np.asarray(value, np.float32)
