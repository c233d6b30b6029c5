"""What can be asked of a server, as conversations that one of the clients leads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

import numpy.typing as npt

from trilevel.client.attempts import Answer, Retry, Steps, conversation
from trilevel.client.faults import FailedError
from trilevel.client.wire import LENGTH_HEADER, Result, decode, encode


def infer(
    model: str,
    inputs: Mapping[str, npt.ArrayLike],
    *,
    retry: Retry,
    timeout_s: float | None,
    version: str,
    outputs: Sequence[str],
    max_loss: float | None,
    priority: int,
    is_explained: bool,
    request_id: str,
) -> Steps:
    """Run a model."""
    given = {"max_loss": max_loss, "priority": priority or None, "explain": is_explained or None}
    parameters = {name: value for name, value in given.items() if value is not None}
    body, headers = encode(inputs, outputs, parameters, request_id)
    path = f"{model_path(model, version)}/infer"
    return conversation("POST", path, retry=retry, timeout_s=timeout_s, body=body, headers=headers)


def task(
    name: str,
    body: Any,
    content_type: str,
    parameters: Mapping[str, str],
    *,
    retry: Retry,
    timeout_s: float | None,
) -> Steps:
    """Ask a task route; bytes go as they are, anything else as JSON."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": content_type}
    path = f"/v1/{quote(name, safe='')}" + (f"?{urlencode(parameters)}" if parameters else "")
    return conversation("POST", path, retry=retry, timeout_s=timeout_s, body=sent, headers=headers)


def change(model: str, verb: str, *, retry: Retry, timeout_s: float | None) -> Steps:
    """Load or unload a model, once: who knows whether a lost request was heard."""
    path = f"/v2/repository/models/{quote(model, safe='')}/{verb}"
    return conversation("POST", path, retry=retry, timeout_s=timeout_s, is_repeatable=False)


def model_path(model: str, version: str) -> str:
    """The address of a model."""
    path = f"/v2/models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def result_of(answer: Answer) -> Result:
    """The result that an answer holds."""
    return decode(answer.body, answer.headers.get(LENGTH_HEADER.lower()))


def json_of(answer: Answer) -> Any:
    """The JSON that an answer holds; raises FailedError where it is none."""
    try:
        return json.loads(answer.body)
    except ValueError as error:
        raise FailedError(
            f"the answer is no JSON ({error}); is it a trilevel server's?", status=answer.status
        ) from error
