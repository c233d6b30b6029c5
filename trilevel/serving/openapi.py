"""The description of the REST interface that `/openapi.json` and `/docs` show, kept by hand."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from trilevel import __version__
from trilevel.serving.tasks import TaskRoute

_TYPES = (
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BYTES",
)
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "description": "Of the model."}
_VERSION = {"name": "version", "in": "path", "required": True, "schema": {"type": "string"}}
_TIMEOUT = {
    "name": "X-Request-Timeout-Ms",
    "in": "header",
    "description": "Milliseconds until the answer is of no use any more; later ones are refused with 504.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 86_400_000},
}
_ID = {"name": "X-Request-Id", "in": "header", "schema": {"type": "string", "maxLength": 128}}
_TENSOR = {
    "name": {"type": "string", "minLength": 1, "maxLength": 128},
    "datatype": {"type": "string", "enum": list(_TYPES)},
    "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1},
    "data": {"type": "array", "description": "Row-major, flat or nested as the shape."},
}
_REFUSALS = {
    "400": "Something in the request is not as it must be; the message says what.",
    "401": "No API key, or one that is not known.",
    "403": "A page of another site called, or a key of a user asks for what is an admin's.",
    "404": "No such model, version or address.",
    "408": "The request took too long to arrive.",
    "409": "The artifact cannot be loaded; the old one goes on.",
    "413": "The body is too large.",
    "415": "The body is of a type that is not read.",
    "429": "Too much waits already; Retry-After says when to ask again.",
    "500": "The model or the server failed.",
    "503": "No worker can answer now; Retry-After says when to ask again.",
    "504": "The answer would come, or came, too late.",
}
_PARAMETERS = {
    "priority": {"type": "integer", "minimum": -1000, "maximum": 1000, "description": "Larger ones first."},
    "max_loss": {"type": "number", "minimum": 0, "description": "Below what the certificate promises: the full path."},
    "explain": {"type": "boolean", "description": "Whether to say why each row took its path."},
    "timeout": {"type": "integer", "minimum": 1, "description": "Microseconds, as X-Request-Timeout-Ms."},
    "binary_data_output": {"type": "boolean", "description": "Whether outputs follow the JSON as bytes."},
}


def document(tasks: Mapping[str, TaskRoute]) -> dict[str, Any]:
    """The description, of OpenAPI 3.1."""
    paths: dict[str, Any] = {
        "/v2/health/live": {"get": _operation("Whether the server runs.", "200", is_open=True)},
        "/v2/health/ready": {"get": _operation("Whether every model answers.", "200", "503", is_open=True)},
        "/v2": {"get": _operation("Name, version and extensions of the server.", "200")},
        "/v2/repository/index": {
            "post": _operation(
                "All versions of all models.",
                "200",
                "400",
                "408",
                "413",
                "415",
                body=_json({"ready": {"type": "boolean"}}),
            )
        },
        "/metrics": {"get": _operation("Counts and times, for Prometheus.", "200", kind="text/plain")},
    }
    for prefix, given in (("", [_NAME]), ("/versions/{version}", [_NAME, _VERSION])):
        model = f"/v2/models/{{name}}{prefix}"
        paths[model] = {"get": _operation("Inputs, outputs and versions of a model.", "200", "404", given=given)}
        paths[f"{model}/ready"] = {"get": _operation("Whether a model answers.", "200", "404", "503", given=given)}
        paths[f"{model}/infer"] = {"post": _infer(given)}
    for verb, does in (("load", "Loads a model, or loads it anew."), ("unload", "Stops a model.")):
        codes = ("200", "400", "404", "408", "409", "413", "415", "503")
        operation = _operation(
            does, *codes, given=[_NAME], body=_json({"parameters": _object({"unload_dependents": {}})})
        )
        paths[f"/v2/repository/models/{{name}}/{verb}"] = {"post": operation}
    for name, task in tasks.items():
        paths[f"/v1/{name}"] = {"post": _task(task)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "trilevel", "version": __version__, "description": "The Open Inference Protocol, version 2."},
        "paths": paths,
        "components": {
            "schemas": {
                "Error": _object({"error": {"type": "string"}}, "error"),
                "InferRequest": _request(),
                "InferResponse": _response(),
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def page(described: Mapping[str, Any]) -> bytes:
    """A plain page of the description, which needs neither scripts nor anything of another host."""
    rows = []
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            codes = ", ".join(operation["responses"])
            rows.append(
                f"<tr><td>{method.upper()}</td><td><code>{escape(path)}</code></td>"
                f"<td>{escape(operation['summary'])}</td><td>{codes}</td></tr>"
            )
    refusals = "".join(f"<dt>{code}</dt><dd>{escape(said)}</dd>" for code, said in _REFUSALS.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>trilevel: interface</title>'
        "<style>body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "td,th{text-align:left;padding:.25rem .75rem .25rem 0;vertical-align:top}"
        "dt{float:left;margin-right:1rem}</style>"
        '<h1>trilevel: interface</h1><p>In full: <a href="/openapi.json">/openapi.json</a>.</p>'
        "<table><thead><tr><th>Method<th>Address<th>What it does<th>Answers</tr></thead><tbody>"
        f"{''.join(rows)}</tbody></table><h2>Refusals</h2><p>A JSON object with the text <code>error</code>.</p>"
        f"<dl>{refusals}</dl></html>"
    ).encode()


_ANSWERS = ("400", "404", "408", "413", "415", "429", "500", "503", "504")


def _operation(
    summary: str,
    *codes: str,
    given: list[dict[str, Any]] | None = None,
    body: dict[str, Any] | None = None,
    kind: str = "application/json",
    is_open: bool = False,
) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": {kind: {}}}}
    also = () if is_open else ("401", "403")
    for code in sorted({*codes, *also} - {"200"}):
        # health says false, not why
        content = {"application/json": {}} if code == "503" else error
        responses[code] = {"description": _REFUSALS[code], "content": content}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if given:
        operation["parameters"] = given
    if body:
        operation["requestBody"] = body
    if not is_open:
        operation["security"] = [{"key": []}, {}]
    return operation


def _infer(given: list[dict[str, Any]]) -> dict[str, Any]:
    schema = {"application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}}}
    operation = _operation(
        "Runs a model.", "200", *_ANSWERS, given=[*given, _TIMEOUT, _ID], body={"required": True, "content": schema}
    )
    answer = {
        "application/json": {"schema": {"$ref": "#/components/schemas/InferResponse"}},
        "application/octet-stream": {},
    }
    operation["responses"]["200"]["content"] = answer
    return operation


def _task(task: TaskRoute) -> dict[str, Any]:
    """A body that is JSON has all in it; of others the address says how they are read."""
    told = {"type": "object", "properties": task.fields, "required": [task.content[0]]}
    content: dict[str, Any] = {kind: {} for kind in task.content_types}
    content |= {kind: {"schema": {"type": "string"}} for kind in task.content_types if kind.startswith("text/")}
    content["application/json"] = {"schema": told}
    asked = [
        {"name": name, "in": "query", "schema": schema}
        for name, schema in task.fields.items()
        if name not in task.content
    ]
    body = {"required": True, "content": content}
    return _operation(task.summary, "200", *_ANSWERS, given=[*asked, _TIMEOUT, _ID], body=body)


def _request() -> dict[str, Any]:
    size = {"binary_data_size": {"type": "integer", "minimum": 0, "description": "Of its bytes behind the JSON."}}
    tensor = _object({**_TENSOR, "parameters": _object(size)}, "name", "datatype", "shape")
    output = _object({"name": _TENSOR["name"], "parameters": _object({"binary_data": {"type": "boolean"}})}, "name")
    return _object(
        {
            "id": {"type": "string", "maxLength": 128},
            "parameters": _object(_PARAMETERS),
            "inputs": {"type": "array", "items": tensor, "minItems": 1},
            "outputs": {"type": "array", "items": output},
        },
        "inputs",
    )


def _response() -> dict[str, Any]:
    tensor = {"type": "object", "properties": {**_TENSOR, "parameters": {"type": "object"}}}
    return {
        "type": "object",
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "parameters": {"type": "object"},
            "outputs": {"type": "array", "items": tensor},
        },
    }


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _json(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": _object(properties)}}}
