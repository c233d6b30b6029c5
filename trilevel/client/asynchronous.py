"""The client for programs with an event loop; it asks as the other does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, final

import numpy.typing as npt

from trilevel.client import calls
from trilevel.client.attempts import Answer, Ask, Lost, Retry, Sleep, Steps, conversation
from trilevel.client.http import Options, answer_of, lost_of
from trilevel.client.wire import Result
from trilevel.errors import require


@final
class AsyncClient:
    """A connection pool to one server; tasks of one loop may share it. Close it, or use it in `async with`.

    Args:
        url: of the server, such as `http://127.0.0.1:8000`.
        key: its API key; None for none.
        timeout_s: for each call, retries and waits included; None for no limit.
        retry: how often and when to ask again.
        verify: whether, or with which `ssl.SSLContext`, the server's certificate is checked.

    Raises:
        CallError: of its classes, by every method that asks the server.
        MissingExtraError: the extra `client` is not installed.

    Example:
        async with AsyncClient("http://127.0.0.1:8000") as client:
            result = await client.infer("documents", {"input_ids": ids, "attention_mask": mask})
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float | None = 30.0,
        retry: Retry | None = None,
        verify: Any = True,
    ) -> None:
        httpx = require("httpx2", extra="client")
        self._retry = retry or Retry()
        self._timeout_s = timeout_s
        self._http = httpx.AsyncClient(**Options(url=url, key=key, verify=verify).of_httpx())

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, npt.ArrayLike],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        max_loss: float | None = None,
        priority: int = 0,
        is_explained: bool = False,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Result:
        """Run a model; arguments and errors as of `Client.infer`."""
        steps = calls.infer(
            model,
            inputs,
            retry=self._retry,
            timeout_s=self._timeout_s if timeout_s is None else timeout_s,
            version=version,
            outputs=outputs,
            max_loss=max_loss,
            priority=priority,
            is_explained=is_explained,
            request_id=request_id,
        )
        return calls.result_of(await self._lead(steps))

    async def task(
        self,
        name: str,
        body: Any,
        *,
        content_type: str = "application/json",
        parameters: Mapping[str, str] | None = None,
    ) -> Any:
        """Ask `POST /v1/NAME`, with bytes of `content_type` or a value for JSON; its answer, read from JSON."""
        steps = calls.task(name, body, content_type, parameters or {}, retry=self._retry, timeout_s=self._timeout_s)
        return calls.json_of(await self._lead(steps))

    async def is_ready(self) -> bool:
        """Whether the server answers requests for all its models; False too where it cannot be reached."""
        got = await self._ask(
            Ask(method="GET", path="/v2/health/ready", body=b"", headers={}, timeout_s=self._timeout_s)
        )
        return isinstance(got, Answer) and got.status == 200

    async def models(self) -> list[dict[str, str]]:
        """Name, version, state and reason of all versions of all models."""
        found: list[dict[str, str]] = await self._json("POST", "/v2/repository/index")
        return found

    async def metadata(self, model: str, version: str = "") -> dict[str, Any]:
        """Inputs, outputs and versions of a model."""
        found: dict[str, Any] = await self._json("GET", calls.model_path(model, version))
        return found

    async def load(self, model: str) -> None:
        """Load a model, or load it anew."""
        await self._lead(calls.change(model, "load", retry=self._retry, timeout_s=self._timeout_s))

    async def unload(self, model: str) -> None:
        """Stop a model."""
        await self._lead(calls.change(model, "unload", retry=self._retry, timeout_s=self._timeout_s))

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _json(self, method: str, path: str) -> Any:
        return calls.json_of(await self._lead(conversation(method, path, retry=self._retry, timeout_s=self._timeout_s)))

    async def _lead(self, steps: Steps) -> Answer:
        got: Answer | Lost | None = None
        try:
            while True:
                step = steps.send(got)
                if isinstance(step, Sleep):
                    await asyncio.sleep(step.seconds)
                    got = None
                    continue
                got = await self._ask(step)
        except StopIteration as end:
            answer: Answer = end.value
            return answer

    async def _ask(self, ask: Ask) -> Answer | Lost:
        try:
            # httpx2 limits each read, not all of them together
            async with asyncio.timeout(ask.timeout_s):
                response = await self._http.request(
                    ask.method, ask.path, content=ask.body, headers=ask.headers, timeout=ask.timeout_s
                )
            return answer_of(response)
        except TimeoutError:
            return Lost(reason="the time is over", is_late=True)
        except Exception as error:
            return lost_of(error)
