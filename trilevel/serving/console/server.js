// The server that this page came from: calls with the key, and refusals in words.

const KEY = "trilevel-key";
const TITLES = {
  400: "This input cannot be answered",
  401: "The server asks for an API key",
  403: "The server refuses this page",
  404: "The server does not know this",
  408: "The input took too long to arrive",
  413: "The input is too large",
  415: "Files of this kind are not read here",
  429: "The server is busy",
  500: "The model failed",
  503: "The server cannot answer now",
  504: "The answer came too late",
};
const LOST = "Nothing came back: the server may have ended, or the network is down. Start it, and ask again.";

/** What a server, or the way to it, said no with. */
export class Refusal extends Error {
  constructor(status, message, id = "") {
    super(message);
    this.status = status;
    this.title = TITLES[status] ?? (status ? `The server refused (${status})` : "The server does not answer");
    this.id = id;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** The text of an answer; throws Refusal, or AbortError where `signal` ended the call. */
export async function call(path, { method = "GET", body = null, type = "application/json", signal = null } = {}) {
  const headers = body === null ? {} : { "Content-Type": type };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let reply;
  let text;
  try {
    reply = await fetch(path, { method, body, headers, signal, cache: "no-store" });
    text = await reply.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, LOST);
  }
  if (reply.ok) return text;
  const again = reply.headers.get("Retry-After");
  const message = again ? `${reason(text)} Ask again in ${again} s.` : reason(text);
  throw new Refusal(reply.status, message, reply.headers.get("X-Request-Id"));
}

/** An answer that is JSON; throws as `call` does. */
export const ask = async (path, options) => JSON.parse(await call(path, options));

function reason(text) {
  try {
    return JSON.parse(text).error;
  } catch {
    // a proxy on the way has words of its own
    return "It gave no reason that this page can read.";
  }
}

/** All models, each with its task and paths where it answers. */
export async function models() {
  const index = await ask("/v2/repository/index", { method: "POST", body: "{}" });
  return Promise.all(index.map(async (one) => {
    if (one.state !== "READY") return { ...one, task: "", paths: [] };
    const said = await ask(`/v2/models/${encodeURIComponent(one.name)}`);
    return { ...one, task: said.parameters.task, paths: said.parameters.paths.split(",") };
  }));
}
