// The page: which model, what is asked of it, and what came of that.

import { told } from "./answer.js";
import { byId, duration, make, show } from "./dom.js";
import { EVERY_MS, lacking, read, restart } from "./live.js";
import { Refusal, ask, key, models } from "./server.js";

const TYPES = {
  txt: "text/plain", text: "text/plain", md: "text/markdown", markdown: "text/markdown", htm: "text/html",
  html: "text/html", pdf: "application/pdf", png: "image/png", jpg: "image/jpeg", jpeg: "image/jpeg",
  webp: "image/webp", bmp: "image/bmp",
};
/** By the task of a model: what is asked of it, how, and with what. */
const TASKS = {
  documents: {
    verb: "Summarise", route: "/v1/summarize", accept: ".txt,.md,.html,.pdf", hint: "text, Markdown, HTML or PDF",
  },
  classification: { verb: "Classify", route: "/v1/predict", accept: ".txt", hint: "plain text" },
  embedding: { verb: "Make a vector", route: "/v1/predict", accept: ".txt", hint: "plain text" },
  images: {
    verb: "Classify", route: "/v1/predict", accept: ".png,.jpg,.jpeg,.webp,.bmp", hint: "PNG, JPEG, WebP or BMP",
  },
};

let known = [];
let file = null;
let running = null;
let isPaused = false;
let isLocked = false;

const chosenModel = () => known.find(({ name }) => name === byId("model").value);
const kind = () => TASKS[chosenModel()?.task];

function say(state, said) {
  // said again only when it changed, so that screen readers stay quiet
  if (byId("state").textContent === said) return;
  byId("state").textContent = said;
  byId("state").dataset.state = state;
}

function lock(isWanted) {
  isLocked = isWanted;
  show("unlock", isWanted);
  show("panes", !isWanted);
  show("forget", !isWanted && key.get() !== "");
  if (!isWanted) return;
  say("locked", "An API key is needed");
  byId("key").focus();
}

async function start() {
  try {
    known = await models();
  } catch (error) {
    say("lost", error.title);
    refusedBy(error);
    return;
  }
  lock(false);
  show("failure", false);
  const before = byId("model").value;
  byId("model").replaceChildren(...known.map(({ name }) => make("option", { value: name }, name)));
  if (known.some(({ name }) => name === before)) byId("model").value = before;
  choose();
}

/** Fit the form to the model that is chosen. */
function choose() {
  const model = chosenModel();
  const task = kind();
  const isImages = model?.task === "images";
  show("text-field", !isImages);
  show("sentences-field", model?.task === "documents");
  show("loss-field", (model?.paths.length ?? 0) > 1);
  byId("about").textContent = about(model, task);
  byId("send").disabled = !task;
  byId("send").textContent = task?.verb ?? "Ask";
  byId("file").accept = task?.accept ?? "";
  byId("hint").textContent = task ? `or drop one here: ${task.hint}` : "";
  byId("live-model").textContent = model?.name ?? "no model";
  restart();
}

function about(model, task) {
  if (!model) return "No model is served.";
  if (model.state !== "READY") return `It does not answer: ${model.reason || model.state}.`;
  if (!task) return `The console has no form for models of the task ${model.task}; the interface (below) has its calls.`;
  const reason = model.reason ? ` ${model.reason}.` : "";
  return `Task ${model.task}, version ${model.version.slice(0, 12)}, paths ${model.paths.join(", ")}.${reason}`;
}

function take(given) {
  file = given;
  const isImage = file !== null && file.type.startsWith("image/");
  URL.revokeObjectURL(byId("preview").src);
  byId("preview").src = isImage ? URL.createObjectURL(file) : "";
  show("preview", isImage);
  show("chosen", file !== null);
  byId("chosen-name").textContent = file ? `${file.name}, ${Math.ceil(file.size / 1024)} KiB` : "";
  byId("text").disabled = file !== null;
  byId("file").value = "";
}

/** The call that asks what the form says; what is pasted goes as the body, like a file, never into the address. */
function asked() {
  const options = new URLSearchParams({ model: chosenModel().name, explain: true });
  for (const [id, name] of [["sentences", "sentences"], ["loss", "max_loss"]]) {
    if (!byId(`${id}-field`).hidden && byId(id).value) options.set(name, byId(id).value);
  }
  const extension = file?.name.toLowerCase().split(".").at(-1) ?? "txt";
  const type = TYPES[extension] ?? (file.type || "application/octet-stream");
  return [`${kind().route}?${options}`, { method: "POST", body: file ?? byId("text").value, type }];
}

async function send(event) {
  event.preventDefault();
  if (running || !kind()) return;
  if (!file && !byId("text").value.trim()) {
    const wanted = kind() === TASKS.images ? "Choose or drop an image first." : "Paste a text, or choose a file, first.";
    fail("There is nothing to ask yet", wanted);
    return;
  }
  running = new AbortController();
  busy(true, "Working…");
  const started = performance.now();
  try {
    const [path, options] = asked();
    const answer = await ask(path, { ...options, signal: running.signal });
    const ms = performance.now() - started;
    // it was exchanged since the page asked for it
    if (answer.version !== chosenModel().version) await start();
    byId("answer").replaceChildren(...told(answer, chosenModel(), ms));
    show("failure", false);
    show("answer", true);
    inView(byId("answer"));
    busy(false, `Answered in ${duration(ms)}.`);
  } catch (error) {
    busy(false, error.name === "AbortError" ? "Cancelled." : "");
    if (error.name !== "AbortError") refusedBy(error);
  } finally {
    running = null;
  }
}

function busy(isBusy, said) {
  byId("send").disabled = isBusy;
  show("cancel", isBusy);
  byId("progress").textContent = said;
}

function refusedBy(error) {
  if (!(error instanceof Refusal)) throw error;
  if (error.status === 401) {
    if (key.get()) byId("unlock-said").textContent = error.message;
    key.forget();
    lock(true);
    return;
  }
  fail(error.title, error.message, error.id);
}

function fail(title, message, id = "") {
  const said = [make("h2", {}, title), make("p", {}, message)];
  if (id) said.push(make("p", { class: "quiet" }, "Request ", make("code", {}, id)));
  byId("failure").replaceChildren(...said);
  show("failure", true);
  show("answer", false);
  inView(byId("failure"));
}

function inView(element) {
  if (element.getBoundingClientRect().top > innerHeight * 0.7) element.scrollIntoView({ block: "start" });
}

/** Read the live figures once; a server that comes back is asked for its models anew. */
async function tick() {
  if (isPaused || isLocked || document.hidden) return;
  try {
    const page = await read(chosenModel()?.name);
    const wasLost = byId("state").dataset.state === "lost";
    const missing = lacking(page);
    say(missing ? "lacking" : "ready", missing ? `Not ready: ${missing}` : "Ready");
    if (wasLost) await start();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.status === 401) refusedBy(error);
    else say("lost", error.status ? error.message : "The server does not answer; asking again…");
  }
}

async function watch() {
  try {
    await tick();
  } finally {
    setTimeout(watch, EVERY_MS);
  }
}

function drops(element) {
  for (const name of ["dragenter", "dragover"]) {
    element.addEventListener(name, (event) => {
      event.preventDefault();
      element.classList.add("over");
    });
  }
  element.addEventListener("dragleave", () => element.classList.remove("over"));
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    element.classList.remove("over");
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
}

byId("ask").addEventListener("submit", send);
byId("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});
byId("cancel").addEventListener("click", () => running?.abort());
byId("model").addEventListener("change", () => { choose(); tick(); });
byId("file").addEventListener("change", ({ target }) => { if (target.files.length) take(target.files[0]); });
byId("drop-file").addEventListener("click", () => { take(null); byId("file").focus(); });
byId("pause").addEventListener("click", ({ target }) => {
  isPaused = !isPaused;
  target.setAttribute("aria-pressed", String(isPaused));
  if (!isPaused) restart();
});
byId("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(byId("key").value.trim());
  byId("key").value = "";
  start();
});
byId("forget").addEventListener("click", () => { key.forget(); lock(true); });
drops(byId("drop"));

// a tab that was hidden, or paused, has a gap that the charts would draw as one slow second
document.addEventListener("visibilitychange", () => { if (!document.hidden) { restart(); tick(); } });

await start();
await watch();
