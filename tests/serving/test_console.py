"""The console: what is served and how it is locked in; and the page itself in a real Chromium."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import numpy as np
import pytest

from tests.serving.fake_engine import WIDTH, FakeEngine, looped, model, served, until
from trilevel.serving.console.pages import console
from trilevel.serving.front import Front
from trilevel.serving.keys import Keys, new_key
from trilevel.serving.requests import DeadlineError, OverloadedError, Reply, Request, UnavailableError
from trilevel.serving.server import Server
from trilevel.serving.tasks import Prepared, Upload

if TYPE_CHECKING:
    from playwright.async_api import FilePayload, Page

ROOT = Path(__file__).parents[2]
PAGES = console()
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABh6FO1AAAAABJRU5ErkJggg=="
)
MARKUP = "<img src=x onerror=alert(1)>"
SAID = ("int8/2: margin 2.28 of 2.63, harm expected 0.0518; 0.35 more would have ended here", "path float32/6: 24.9 ms")


class Mail:
    """A task that tells its classes as the real one does; one of them looks like markup."""

    summary = "Classes of texts."
    content_types = ("application/json", "text/plain")
    fields: Mapping[str, Mapping[str, Any]] = {"inputs": {"type": "array"}, "explain": {"type": "boolean"}}
    content = ("inputs",)

    def __init__(self) -> None:
        self.uploads: list[Upload] = []
        self.told: Mapping[str, Any] = {
            "predictions": [{"label": MARKUP, "probabilities": {"plain": 0.125, MARKUP: 0.875}}]
        }

    def prepare(self, upload: Upload) -> Prepared:
        self.uploads.append(upload)
        inputs = {"x": np.ones((2, WIDTH), np.float32)}
        request = Request(id=upload.id, model=upload.parameters["model"], inputs=inputs, deadline=upload.deadline)
        return Prepared(request=request, answer=self._answer)

    def _answer(self, reply: Reply) -> Mapping[str, Any]:
        return {
            "model": reply.model,
            "version": reply.version,
            **self.told,
            "paths": reply.paths[-1:],
            "seconds": reply.seconds,
            "explanations": [{"path": reply.paths[-1], "asked": [{"path": "int8/2"}], "said": SAID}],
        }


@asynccontextmanager
async def consoled(
    engine: FakeEngine, keys: Keys | None = None, mail: Mail | None = None, port: int = 0
) -> AsyncIterator[Server]:
    engine.known = {("mail", "1"): model("mail", task="classification")}
    front = Front(engine, keys=keys, timeout_s=5.0)
    async with served(engine, front=front, tasks={"predict": mail or Mail()}, pages=PAGES, rest_port=port) as server:
        front.metrics.workers("mail", 1)
        yield server


def keys_of(name: str) -> tuple[str, Keys]:
    key, line = new_key(name)
    return key, Keys({line.split()[0].removeprefix("sha256:"): name})


# what is served


@looped
async def test_pages_need_no_key_and_may_run_nothing_but_their_own_scripts() -> None:
    _, keys = keys_of("alice")
    async with (
        consoled(FakeEngine(), keys) as server,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.rest_port}") as client,
    ):
        for path, (kind, content) in PAGES.items():
            got = await client.get(path)
            assert (got.status_code, got.headers["content-type"], got.content) == (200, kind, content)
            policy = dict(part.split(maxsplit=1) for part in got.headers["content-security-policy"].split("; "))
            assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
            assert policy["frame-ancestors"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert policy["require-trusted-types-for"] == "'script'"
            assert got.headers["x-content-type-options"] == "nosniff"
            assert got.headers["referrer-policy"] == "no-referrer"
        assert (await client.head("/")).status_code == 200
        assert (await client.post("/")).status_code == 405
        # the live figures are as closed as ever
        assert (await client.get("/metrics")).status_code == 401
        for path in ("/console/", "/console/pages.py", "/console/../keys.py", "/console/..%2fkeys.py", "/index.html"):
            assert (await client.get(path)).status_code == 404, path


def test_pages_ask_nobody_else_for_anything() -> None:
    everything = {path: content.decode() for path, (_, content) in PAGES.items()}
    page = everything["/"]
    wanted = set(re.findall(r'(?:src|href)="(/console/[^"]+)"', page))
    for text in everything.values():
        wanted |= {f"/console/{name}" for name in re.findall(r'from "\./([^"]+)"', text)}
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
        assert not re.findall(r"localStorage|document\.cookie", text)
    assert wanted == everything.keys() - {"/"}
    # neither would run: the policy allows no inline code
    assert not re.findall(r"<script(?! type=\"module\" src=)|<style|\sstyle=|\son\w+=", page)
    # every control has a label, and every label and description a target
    ids = set(re.findall(r'\sid="([^"]+)"', page))
    labelled = set(re.findall(r'<label[^>]*\sfor="([^"]+)"', page))
    assert labelled == set(re.findall(r'<(?:input|select|textarea) id="([^"]+)"', page))
    assert {one for told in re.findall(r'aria-(?:labelledby|describedby)="([^"]+)"', page) for one in told.split()} <= (
        ids | {"answer-title"}
    )


def test_pages_lie_in_the_wheel(tmp_path: Path) -> None:
    build = [
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        str(tmp_path),
        "build_py",
        "--build-lib",
        str(tmp_path / "lib"),
    ]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True, timeout=120)
    folder = tmp_path / "lib/trilevel/serving/console"
    assert {path.name for path in folder.iterdir()} >= {
        "index.html",
        *(Path(path).name for path in PAGES if path != "/"),
    }


# the page in a browser


def chromium() -> str:
    """Where a Chromium lies: that of Playwright, or of the system; skips where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium: apt-get install chromium, or playwright install chromium")
    return found


@asynccontextmanager
async def opened(address: str, **options: Any) -> AsyncIterator[Page]:
    """The console in a browser of its own; at the end nothing failed in it, and nobody else was asked."""
    playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed (extra dev)")
    async with playwright.async_playwright() as runs:
        own = Path(runs.chromium.executable_path)
        browser = await runs.chromium.launch(executable_path=str(own) if own.exists() else chromium())
        page = await browser.new_page(**options)
        failures: list[str] = []
        page.on("pageerror", lambda error: failures.append(str(error)))
        # refusals of the server are logged by the browser, and are not the page's failures
        page.on("console", lambda said: failures.append(said.text) if "Failed to load" not in said.text else None)
        page.on("dialog", lambda dialog: failures.append(dialog.message))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(address)
        yield page
        await browser.close()
        assert failures == []
        assert [url for url in asked if not url.startswith((address, f"blob:{address}"))] == []


@pytest.mark.browser
@looped
async def test_an_answer_its_path_and_its_time() -> None:
    engine, mail = FakeEngine(), Mail()
    async with consoled(engine, mail=mail) as server, opened(f"http://127.0.0.1:{server.rest_port}") as page:
        await page.get_by_label("Text").fill("Arrived late, and broken.")
        await page.get_by_label("Loss accepted, at most").fill("0.01")
        await page.get_by_label("Text").press("Control+Enter")
        answer = page.get_by_role("region", name="Answer")
        await answer.wait_for()
        upload = mail.uploads[0]
        assert (upload.body, upload.content_type) == (b"Arrived late, and broken.", "text/plain")
        assert upload.parameters == {"model": "mail", "explain": "true", "max_loss": "0.01"}
        # markup stays text
        assert await page.locator(".said").inner_text() == MARKUP
        assert await page.locator("#answer img").count() == 0
        assert await page.locator("#answer .bars li").first.inner_text() == f"{MARKUP}\n88%"
        steps = await page.locator(".paths li").all_inner_texts()
        assert steps == ["int8/2\nasked, not sure enough", "float32/6\ntaken"]
        assert await page.locator(".why li").all_inner_texts() == list(SAID)
        text = await answer.inner_text()
        for stage, spent in (("waiting for a worker", "1.0 ms"), ("computing", "2.0 ms"), ("reading and sending", "")):
            assert re.search(f"{stage}\n{spent}", text)


@pytest.mark.browser
@looped
async def test_live_figures() -> None:
    engine = FakeEngine()
    async with consoled(engine) as server, opened(f"http://127.0.0.1:{server.rest_port}") as page:
        live = page.get_by_role("region", name="Live: mail")
        await page.locator("#figures dd").first.wait_for()
        metrics = server.front.metrics
        reply = Reply(
            model="mail", version="1", outputs={}, paths=("int8/2",) * 3 + ("float32/6",), seconds={"total": 0.5}
        )
        for _ in range(10):
            metrics.answered("grpc", "OK", reply)
        metrics.refused("rest", "429", "mail", "overload")
        metrics.batch("mail", "int8/2", 1)
        for _ in range(3):
            metrics.batch("mail", "int8/2", 7)
        metrics.queue("mail", "int8/2", 13)
        metrics.audit("mail", samples=200, mean=0.005, is_alarmed=False)
        await live.get_by_text("13 wait now").wait_for()
        figures = dict(
            zip(
                await page.locator("#figures dt").all_inner_texts(),
                await page.locator("#figures dd").all_inner_texts(),
                strict=True,
            )
        )
        assert (figures["answered"], figures["refused or failed"], figures["workers"]) == ("10", "1", "1")
        # the histogram knows that all lie between 0.2 and 0.5 s
        assert figures["half within, last minute"] == "350 ms"
        assert await page.locator("#shares li").all_inner_texts() == ["float32/6\n25% of 40", "int8/2\n75% of 40"]
        assert await page.locator("#batches li").all_inner_texts() == ["1\n25% of 4", "5 to 8\n75% of 4"]
        assert await page.locator("#audit").inner_text() == (
            "No alarm: 0.5% of 200 compared answers differ from the full path's."
        )
        said = await page.locator("#throughput svg").get_attribute("aria-label")
        assert re.fullmatch(r"[\d.]+ a second answered, [\d.]+ refused; the last two minutes", said or "")
        metrics.audit("mail", samples=400, mean=0.05, is_alarmed=True)
        metrics.workers("mail", 0)
        await page.get_by_text("Alarm: 5.0% of 400 compared answers differ").wait_for()
        assert await page.locator("#state").inner_text() == "Not ready: no worker of mail lives"
        await page.get_by_role("button", name="Pause").click()
        metrics.queue("mail", "int8/2", 1)
        await page.wait_for_timeout(2500)
        assert await live.get_by_text("13 wait now").count() == 1


@pytest.mark.browser
@pytest.mark.parametrize(
    ("error", "title", "message"),
    [
        (OverloadedError("17 rows wait.", retry_after_s=1.2), "The server is busy", "17 rows wait. Ask again in 2 s."),
        (UnavailableError("it loads."), "The server cannot answer now", "it loads. Ask again in 1 s."),
        (DeadlineError("late."), "The answer came too late", "late."),
        (KeyError("secret"), "The model failed", "the server failed; its log says why beside request "),
    ],
)
@looped
async def test_refusals_in_words(error: Exception, title: str, message: str) -> None:
    engine = FakeEngine()
    engine.error = error
    async with consoled(engine) as server, opened(f"http://127.0.0.1:{server.rest_port}") as page:
        await page.get_by_label("Text").fill("a text")
        await page.get_by_role("button", name="Classify").click()
        alert = page.get_by_role("alert")
        await alert.get_by_role("heading", name=title).wait_for()
        said = await alert.inner_text()
        assert message in said
        assert "Request" in said
        assert "secret" not in said
        engine.error = None
        await page.get_by_role("button", name="Classify").click()
        await page.get_by_role("region", name="Answer").wait_for()
        assert not await alert.is_visible()


@pytest.mark.browser
@looped
async def test_nothing_to_ask_wrong_files_and_cancelling() -> None:
    engine = FakeEngine()
    async with consoled(engine) as server, opened(f"http://127.0.0.1:{server.rest_port}") as page:
        send = page.get_by_role("button", name="Classify")
        await send.click()
        await page.get_by_role("alert").get_by_text("There is nothing to ask yet").wait_for()
        file: FilePayload = {"name": "a.PDF", "mimeType": "application/pdf", "buffer": b"%PDF-1.7"}
        await page.locator("#file").set_input_files(file)
        await send.click()
        await page.get_by_role("alert").get_by_text("Content-Type 'application/pdf' is not read here").wait_for()
        await page.get_by_role("button", name="Remove").click()
        engine.delay_s = 20
        await page.get_by_label("Text").fill("a text")
        await send.click()
        await until(lambda: engine.started)
        await page.get_by_role("button", name="Cancel").click()
        await page.get_by_text("Cancelled.").wait_for()
        await until(lambda: engine.cancelled)
        assert await send.is_enabled()


@pytest.mark.browser
@looped
async def test_other_models() -> None:
    engine, mail = FakeEngine(), Mail()
    mail.told = {"vectors": [[3.0, 4.0]]}
    async with consoled(engine, mail=mail) as server:
        for info in (
            model("late", task="", state="LOADING", reason="it reads its weights"),
            model("fraud", task="transactions"),
            model("shirts", task="images"),
            model("vectors"),
        ):
            engine.known[info.name, "1"] = info
        async with opened(f"http://127.0.0.1:{server.rest_port}") as page:
            about, choice = page.locator("#about"), page.get_by_label("Model")
            await choice.select_option("late")
            assert await about.inner_text() == "It does not answer: it reads its weights."
            await choice.select_option("fraud")
            assert "no form for models of the task transactions" in await about.inner_text()
            assert await page.get_by_role("button", name="Ask").is_disabled()
            await choice.select_option("shirts")
            assert not await page.get_by_label("Text").is_visible()
            await page.get_by_role("button", name="Classify").click()
            await page.get_by_role("alert").get_by_text("Choose or drop an image first.").wait_for()
            file: FilePayload = {"name": "a.png", "mimeType": "image/png", "buffer": PNG}
            await page.locator("#file").set_input_files(file)
            # the picture is shown, and shown by itself
            assert await page.locator("#preview").evaluate("one => one.decode().then(() => one.naturalWidth)") == 1
            await page.get_by_role("button", name="Remove").click()
            await choice.select_option("vectors")
            await page.get_by_label("Text").fill("a text")
            await page.get_by_role("button", name="Make a vector").click()
            await page.get_by_role("region", name="Answer").get_by_text("2 numbers").wait_for()
            assert "Length 5.000; 3.0000, 4.0000" in await page.get_by_role("region", name="Answer").inner_text()


@pytest.mark.browser
@looped
async def test_a_server_that_ends_and_comes_back() -> None:
    engine = FakeEngine()
    async with consoled(engine) as server:
        port = server.rest_port
        assert port is not None
        async with opened(f"http://127.0.0.1:{port}") as page:
            await page.locator("#state[data-state=ready]").wait_for()
            await server.stop()
            await page.get_by_text("The server does not answer; asking again…").wait_for()
            await page.get_by_label("Text").fill("a text")
            await page.get_by_role("button", name="Classify").click()
            await page.get_by_role("alert").get_by_text("Nothing came back").wait_for()
            async with consoled(engine, port=port):
                await page.locator("#state[data-state=ready]").wait_for()
                assert await page.get_by_label("Text").input_value() == "a text"


@pytest.mark.browser
@looped
async def test_keys() -> None:
    key, keys = keys_of("alice")
    engine = FakeEngine()
    async with consoled(engine, keys) as server, opened(f"http://127.0.0.1:{server.rest_port}") as page:
        field = page.get_by_label("API key")
        await field.wait_for()
        assert await field.evaluate("field => field === document.activeElement")
        assert not await page.get_by_role("heading", name="Ask", exact=True).is_visible()
        await field.fill(f"{key}x")
        await field.press("Enter")
        await page.get_by_text("this API key is not known").wait_for()
        await field.fill(key)
        await field.press("Enter")
        await page.get_by_label("Text").fill("a text")
        await page.get_by_role("button", name="Classify").click()
        await page.get_by_role("region", name="Answer").wait_for()
        # in this tab alone, and nowhere on the page
        html = "document.documentElement.outerHTML.includes(sessionStorage['trilevel-key'])"
        kept = f"[localStorage.length, document.cookie, {html}]"
        assert await page.evaluate(kept) == [0, "", False]
        await page.reload()
        await page.get_by_role("heading", name="Ask", exact=True).wait_for()
        await page.get_by_role("button", name="Forget the key").click()
        await field.wait_for()
        assert await page.evaluate("sessionStorage.length") == 0


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((one) => one / 255)
    .map((one) => (one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4))
    .reduce((sum, one, place) => sum + one * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = (one) => {
    const color = rgb(getComputedStyle(one).backgroundColor);
    return color[3] || !one.parentElement ? color : behind(one.parentElement);
  };
  return [...document.querySelectorAll("body *")]
    .filter((one) => one.checkVisibility() && !one.disabled && [...one.childNodes].some((node) => node.nodeType === 3
      && node.data.trim()))
    .map((one) => {
      const [dark, bright] = [light(rgb(getComputedStyle(one).color)), light(behind(one))].sort();
      return [one.tagName + "." + one.className, (Math.max(dark, bright) + 0.05) / (Math.min(dark, bright) + 0.05)];
    });
}"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@looped
async def test_everyone_can_use_it(scheme: str) -> None:
    engine = FakeEngine()
    phone = {"width": 360, "height": 740}
    async with (
        consoled(engine) as server,
        opened(
            f"http://127.0.0.1:{server.rest_port}", viewport=phone, color_scheme=scheme, reduced_motion="reduce"
        ) as page,
    ):
        await page.locator("#state[data-state=ready]").wait_for()
        # by keyboard alone, in the order of the page
        reached = []
        for _ in range(6):
            await page.keyboard.press("Tab")
            reached.append(await page.evaluate("document.activeElement.id"))
            assert await page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            if reached[-1] == "text":
                await page.keyboard.type("a text")
        assert reached == ["model", "text", "file", "loss", "send", "pause"]
        await page.get_by_label("Text").press("Control+Enter")
        await page.get_by_role("region", name="Answer").wait_for()
        contrasts = await page.evaluate(CONTRASTS)
        assert len(contrasts) > 30
        assert [one for one in contrasts if one[1] < 4.5] == []
        assert await page.evaluate("document.documentElement.scrollWidth") <= phone["width"]
        assert (
            await page.locator(".track span").first.evaluate("one => getComputedStyle(one).transitionDuration") == "0s"
        )
        levels = await page.locator("h1, h2, h3").evaluate_all(
            "all => all.filter((one) => one.checkVisibility()).map((one) => Number(one.tagName[1]))"
        )
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        nameless = "all => all.filter((one) => !one.labels?.length && !one.textContent.trim()).length"
        assert await page.locator("button, input, select, textarea").evaluate_all(nameless) == 0


@pytest.mark.browser
@looped
async def test_the_shipped_summariser(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    log = tmp_path / "log"
    command = [sys.executable, "-m", "trilevel", "serve", "documents", "--port", "0", "--grpc-port", "-1"]
    with log.open("wb") as lines:
        server = subprocess.Popen([*command, "--instances", "1", "--threads", "1"], cwd=ROOT, stderr=lines)
    try:
        await until(lambda: '"started"' in log.read_text(), 20)
        started = next(json.loads(line) for line in log.read_text().splitlines() if '"started"' in line)
        secret = "Xylophones of the archive"
        said = (
            "Local heads read a window of tokens around each word",
            "Regional heads read one summary of every region of the page",
            "A sum over many numbers of eight bits takes half of the memory",
            "Nobody measured what the old machine in the cellar could do",
            "Every answer of the router comes with a promise that was proved",
            "Long reports are cut into sentences before anything else happens",
            "Batches grow as long as the oldest request keeps its time",
        )
        text = f"# {secret}\n\n" + "".join(f"{sentence}.\n\n" for sentence in said)
        async with opened(f"http://127.0.0.1:{started['rest_port']}") as page:
            # as if it were dropped from a folder
            await page.evaluate(
                """(text) => {
                  const moved = new DataTransfer();
                  moved.items.add(new File([text], "notes.md", { type: "" }));
                  document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: moved }));
                }""",
                text,
            )
            await page.get_by_label("Sentences, at most").fill("3")
            await page.get_by_role("button", name="Summarise").click()
            await page.get_by_role("region", name="Answer").wait_for()
            chosen = await page.locator(".sentences li").all_inner_texts()
            assert len(chosen) == 3
            assert await page.locator(".document mark").all_inner_texts() == chosen
            assert await page.locator(".document .heading").all_inner_texts() == [secret]
            assert await page.locator(".document span").count() == len(said) - 3
            assert "the model has no other" in await page.locator(".why").inner_text()
        assert "Xylophones" not in log.read_text()
    finally:
        os.kill(server.pid, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        server.kill()
        server.wait()
