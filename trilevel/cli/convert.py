"""`trilevel convert`: a pretrained encoder with local, regional and global heads."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from trilevel.attention.levels import LevelRatio
    from trilevel.conversion.convert import Conversion, ConvertConfig
    from trilevel.conversion.profile import Progress
    from trilevel.conversion.source import Source

EPOCHS = 2
"""How often distillation sees a piece of text or an image, where there are enough."""


def convert(
    source: Annotated[str, typer.Argument(help="Folder or hub name of a pretrained encoder (safetensors).")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Calibration text: txt, md, rst, html, pdf or jsonl; repeat. Default: built in."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Calibration images for a ViT or DeiT: folder of png, jpg, bmp or webp.")
    ] = None,
    ratio: Annotated[
        str, typer.Option(help="Local:regional:global heads, or auto: what --max-error allows.")
    ] = "6:3:1",
    window: Annotated[int, typer.Option(help="Keys in the near window, odd.")] = 257,
    dense_heads: Annotated[int, typer.Option(help="Heads of the whole model that keep seeing everything.")] = 0,
    max_error: Annotated[
        float | None, typer.Option(help="With --ratio auto: profiled error a layer, e.g. 0.02.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of distillation; 0 for none.")] = 300,
    trained: Annotated[str, typer.Option(help="What distillation trains: levels, small or all.")] = "all",
    max_loss: Annotated[
        float | None, typer.Option(help="Write nothing if 1 - mean cosine to the original is above.")
    ] = None,
    sha256: Annotated[str | None, typer.Option(help="Refuse weights of another SHA-256.")] = None,
) -> None:
    """Give a dense encoder multi-level attention: profile its heads, assign classes, distil, report.

    Minutes on two cores; stopped, the same command goes on. The folder holds the encoder, its tokenizer or
    preprocessor, `report.json` and `head_map.png`; one of text loads as a `SentenceTransformer`.
    """
    from trilevel.cli.bench import progress_bar
    from trilevel.conversion.convert import ConvertConfig
    from trilevel.conversion.convert import convert as run
    from trilevel.conversion.source import load_source
    from trilevel.errors import ConfigError

    if (ratio == "auto") != (max_error is not None):
        raise ConfigError(
            "--ratio auto and --max-error go together: the bound decides the ratio. Give both or neither."
        )
    levels = ConvertConfig().levels
    config = ConvertConfig(
        levels=dataclasses.replace(levels, window=window, ratio=levels.ratio if ratio == "auto" else _ratio(ratio)),
        num_dense_heads=dense_heads,
        max_error=max_error,
        steps=steps,
        trained=trained,  # type: ignore[arg-type]  # train_only refuses other words
        max_loss=max_loss,
    )
    pretrained = load_source(source, sha256=sha256)
    _check_inputs(pretrained, text, images)
    with progress_bar() as progress:
        sequences = _sequences(pretrained, text, images, config, progress)
        made = run(pretrained, sequences, config, out=out, progress=progress)
    _print(made, out, pretrained)


def _check_inputs(source: Source, text: list[Path] | None, images: Path | None) -> None:
    """Text for encoders of text, images for those of images."""
    from trilevel.conversion.source import PREPROCESSOR_FILE
    from trilevel.errors import ConfigError

    reads_images = source.encoder.config.patches is not None
    if reads_images and text:
        raise ConfigError(f"{source.name} ({source.family}) reads images, not text: give --images FOLDER, no --text.")
    if reads_images and images is None:
        raise ConfigError(f"{source.name} ({source.family}) reads images: --images FOLDER with some is needed.")
    if not reads_images and images is not None:
        raise ConfigError(f"{source.name} ({source.family}) reads text, not images: give --text FILE, no --images.")
    if reads_images and source.preprocessor is None:
        typer.echo(
            f"{source.name} has no {PREPROCESSOR_FILE}; images are resized to its image_size and normalised by ViT's "
            "defaults (bilinear, mean and std 0.5)"
        )


def _sequences(
    source: Source, text: list[Path] | None, images: Path | None, config: ConvertConfig, progress: Progress
) -> list[Tensor]:
    from trilevel.conversion.images import pixels
    from trilevel.conversion.sequences import pieces

    most = config.num_profiled + config.num_held_out + config.batch_size * math.ceil(config.steps / EPOCHS)
    if images is not None:
        return pixels(source, images, least=config.num_held_out + config.batch_size, most=most, progress=progress)
    length = min(source.sentence.max_tokens or source.trained_tokens, source.trained_tokens)
    return pieces(source, _texts(text), max_tokens=length, most=most)


def _ratio(given: str) -> LevelRatio:
    from trilevel.attention.levels import LevelRatio
    from trilevel.errors import ConfigError

    try:
        shares = [float(share) for share in given.split(":")]
    except ValueError:
        shares = []
    if len(shares) != 3:
        raise ConfigError(f"--ratio {given} must be three shares such as 6:3:1 (local:regional:global), or auto.")
    return LevelRatio(*shares)


def _texts(files: list[Path] | None) -> list[str]:
    from trilevel.applications.documents.builtin import builtin_document
    from trilevel.data.documents import load_jsonl, read_file

    if not files:
        return [builtin_document().text]
    texts = []
    for path in files:
        is_rows = path.suffixes[-2:-1] == [".jsonl"] or path.suffix == ".jsonl"
        documents = load_jsonl(path) if is_rows else [read_file(path)]
        # rows kept for validation and tests are not looked at
        documents = [document for document in documents if document.split == "train"] or documents
        texts += [document.text for document in documents]
    return texts


def _print(made: Conversion, out: Path, source: Source) -> None:
    one = "pieces" if source.encoder.config.patches is None else "images"
    beside = "" if source.tokenizer is None else "tokenizer, "
    beside = beside if source.preprocessor is None else "preprocessor, "
    counts = ", ".join(f"{count} {name}" for name, count in made.report["heads_of_class"].items() if count)
    typer.echo(f"heads: {counts}")
    typer.echo(
        f"cosine to the original, {made.after.num_sequences} held-out {one}: {made.before.cosine:.4f} before "
        f"distillation, {made.after.cosine:.4f} after (lowest {made.after.lowest_cosine:.4f})"
    )
    for cost in made.costs:
        typer.echo(
            f"{cost.tokens:,} tokens: dense {cost.dense_ms:,.0f} ms, converted {cost.converted_ms:,.0f} ms "
            f"(attention predicted {cost.dense_attention_ms:,.1f} and {cost.attention_ms:,.1f})"
        )
    typer.echo(f"written to {out}: encoder, {beside}report.json, head_map.png")
