"""An image classifier as an artifact: written with torch, run without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trilevel.applications.images.predictions import Prediction, predictions
from trilevel.artifact.manifest import Artifact, labels_of
from trilevel.artifact.runtime.predictor import Predictor
from trilevel.data.images import Pixels, with_channels
from trilevel.data.token_rows import softmax
from trilevel.errors import InputError

if TYPE_CHECKING:
    from trilevel.applications.images.checkpoint import Run


def export_images(
    source: str | Path | Run, out: str | Path, *, target: str = "portable", tell: Callable[[str], None] = print
) -> Artifact:
    """Write the classifier of a run as an artifact; see `export_artifact` for the rest.

    Raises:
        CheckpointError: the run is damaged, or is of another kind.
    """
    from trilevel.applications.images.checkpoint import load_run
    from trilevel.applications.probes import image_calls
    from trilevel.artifact.export.artifact import Graph, export_artifact

    run = load_run(source) if isinstance(source, (str, Path)) else source
    config, patches = run.model.config, run.model.config.patches
    shape = (patches.num_channels, *patches.image_size)
    graph = Graph(
        task="images",
        name=run.folder.resolve().name,
        module=run.model.eval(),
        calls=image_calls(shape),
        axes={"pixels": ("batch", *shape), "logits": ("batch", len(run.labels))},
        output="logits",
        settings={"labels": list(run.labels)},
        levels=config.encoder.to_dict()["levels"],
        about=f"Classifies images of {shape[1]} x {shape[2]} pixels as {', '.join(run.labels)}.",
    )
    return export_artifact(graph, out, target=target, tell=tell)


class ImagePredictor:
    """The classes of image files, by an artifact's graph in any runtime."""

    def __init__(self, artifact: Artifact, predictor: Predictor) -> None:
        self._predictor = predictor
        self._labels = labels_of(artifact.manifest)
        self._channels, *self._size = map(int, artifact.manifest.inputs["pixels"].axes[1:])

    def classify(self, pixels: Pixels) -> npt.NDArray[np.float64]:
        """Softmax (images, classes) of bytes (images, channels, height, width)."""
        given = np.ascontiguousarray(with_channels(pixels, self._channels))
        return softmax(self._predictor.run({"pixels": given})["logits"])

    def stream(self, paths: Sequence[Path]) -> Iterator[Prediction]:
        """As `predict`, one after another."""
        height, width = self._size
        return predictions(paths, self._labels, (height, width), self.classify)

    def predict(self, inputs: Sequence[str | Path]) -> list[Prediction]:
        """Predictions in the order of the files; each image is resized to what the model reads.

        Raises:
            InputError: a file is missing or no image, or `inputs` is no list of paths.
        """
        if isinstance(inputs, (str, Path)):
            raise InputError(f"inputs is one path; give a list of them, [{str(inputs)!r}].")
        return list(self.stream([Path(path) for path in inputs]))
