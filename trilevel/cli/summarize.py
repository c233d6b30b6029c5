"""`trilevel summarize`: the most important sentences of files."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trilevel.applications.documents.summary import Summary
    from trilevel.data.documents import Document


class Model(enum.StrEnum):
    """Which shipped model reads the files."""

    scratch = "scratch"
    minilm = "minilm"


class Format(enum.StrEnum):
    """How summaries are printed."""

    text = "text"
    json = "json"
    html = "html"


def summarize(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="txt, md, rst, html or pdf files.")],
    sentences: Annotated[int | None, typer.Option("--sentences", "-n", help="Sentences of the summary.")] = None,
    words: Annotated[int | None, typer.Option(help="Words of the summary; default 59.")] = None,
    output: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.text,
    model: Annotated[
        Model | None, typer.Option(help="Shipped model: scratch (default), or minilm on pretrained MiniLM.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Run folder instead of a shipped model.")] = None,
    focus: Annotated[
        float | None, typer.Option(help="Share of the sentences that pass the deep layers, e.g. 0.2; default all.")
    ] = None,
) -> None:
    """Print the most important sentences of each file, in the order of the file."""
    from trilevel.applications.documents.checkpoint import MINILM, load_run
    from trilevel.applications.documents.summarize import summarize as summarize_document
    from trilevel.data.documents import read_file
    from trilevel.errors import ConfigError

    if model is not None and checkpoint is not None:
        raise ConfigError(f"--model {model} and --checkpoint {checkpoint} name two models; give one of them.")
    documents = [read_file(path) for path in files]
    folder = MINILM if model == Model.minilm else checkpoint
    scorer, tokenizer = load_run(folder, tell=lambda message: typer.echo(message, err=True))
    results = [
        (
            document,
            summarize_document(
                scorer, tokenizer, document, num_sentences=sentences, budget_words=words, focus_fraction=focus
            ),
        )
        for document in documents
    ]
    typer.echo({Format.text: _text, Format.json: _json, Format.html: _html}[output](results), nl=output != Format.html)


def _text(results: list[tuple[Document, Summary]]) -> str:
    parts = []
    for document, summary in results:
        lines = list(summary.sentences)
        if summary.units_left_out:
            lines.append(f"({summary.units_left_out} sentences beyond the model's token limit were not read.)")
        title = f"{document.id}: {document.title}" if document.title else document.id
        parts.append("\n".join([title, *lines] if len(results) > 1 else lines))
    return "\n\n".join(parts)


def _json(results: list[tuple[Document, Summary]]) -> str:
    import json

    return json.dumps([_record(document, summary) for document, summary in results], ensure_ascii=False)


def _record(document: Document, summary: Summary) -> dict[str, Any]:
    return {
        "file": document.id,
        "title": document.title,
        "sentences": summary.sentences,
        "indices": summary.indices,
        "scores": [round(float(summary.scores[i]), 4) for i in summary.indices],
        "tokens": summary.num_tokens,
        "units": len(summary.units),
        "units_left_out": summary.units_left_out,
        "seconds": round(summary.seconds, 4),
    }


def _html(results: list[tuple[Document, Summary]]) -> str:
    """One page: each document whole, its summary on top and marked in the text."""
    from html import escape

    parts = [_HTML_HEAD]
    for document, summary in results:
        chosen = set(summary.indices)
        parts.append(f"<h1>{escape(document.title or document.id)}</h1>\n<ol>")
        parts.extend(f'<li><a href="#u{i}">{escape(summary.units[i].text)}</a></li>' for i in summary.indices)
        parts.append("</ol>\n<div>")
        for number, unit in enumerate(summary.units):
            tag = "h2" if unit.kind <= 1 else "mark" if number in chosen else "span"
            parts.append(f'<{tag} id="u{number}">{escape(unit.text)}</{tag}>')
        parts.append("</div>")
    return "\n".join([*parts, "</body></html>", ""])


_HTML_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Summary</title><style>body{max-width:46rem;margin:2rem auto;padding:0 1rem;font:1rem/1.5 system-ui,sans-serif}
ol a{color:inherit}h2{font-size:1.05rem}mark{background:#ffe9a8}</style></head><body>"""
