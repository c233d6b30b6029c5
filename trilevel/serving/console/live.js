// What happens at the server now: /metrics, read again and again, and charts of the last two minutes.

import { bars, lines, rounded } from "./charts.js";
import { byId, duration, make, percent } from "./dom.js";
import { buckets, minus, parse, quantile, sums, total } from "./prometheus.js";
import { call } from "./server.js";

/** Between two readings. */
export const EVERY_MS = 2000;
const SLOTS = 61;
const MINUTE = 30;

/** Readings of one model, oldest first: `{at, page}`. */
let readings = [];

/** Forget what was read: of another model, or of a server that was started anew. */
export function restart() { readings = []; }

/** Read once, and draw for a model; throws as `call` does. */
export async function read(model) {
  const page = parse(await call("/metrics"));
  const last = readings.at(-1);
  // counters never fall, unless the server is another one
  if (last && answered(page) < answered(last.page)) restart();
  readings = [...readings, { at: performance.now(), page }].slice(-SLOTS);
  if (model) draw(model);
  return page;
}

const answered = (page) => total(sums(page, "trilevel_requests_total", {}, "status"));

/** What each model lacks to answer, in words; empty if nothing. */
export function lacking(page) {
  const workers = sums(page, "trilevel_workers", {}, "model");
  return [...workers].filter(([, live]) => !live).map(([model]) => `no worker of ${model} lives`).join(", ");
}

function draw(model) {
  const now = readings.at(-1);
  const then = readings.at(-1 - MINUTE) ?? readings[0];
  const since = (name, where, by) => {
    const own = { model, ...where };
    return minus(sums(now.page, name, own, by), sums(then.page, name, own, by));
  };
  figures(model, now.page, since("trilevel_request_seconds_bucket", { stage: "total" }, "le"));
  throughput(model);
  queue(model);
  shares(since("trilevel_rows_total", {}, "path"));
  batches(since("trilevel_batch_rows_bucket", {}, "le"));
  byId("audit").textContent = audit(sums(now.page, "trilevel_audit", { model }, "value"));
}

function figures(model, page, seconds) {
  const statuses = sums(page, "trilevel_requests_total", { model }, "status");
  // of gRPC by name, of HTTP by number
  const isGood = (status) => status === "OK" || status === "200";
  const good = total(new Map([...statuses].filter(([status]) => isGood(status))));
  const half = quantile(seconds, 0.5);
  const most = quantile(seconds, 0.95);
  const shown = [
    ["answered", rounded(good)],
    ["refused or failed", rounded(total(statuses) - good)],
    ["half within, last minute", Number.isNaN(half) ? "–" : duration(half * 1000)],
    ["95% within, last minute", Number.isNaN(most) ? "–" : duration(most * 1000)],
    ["workers", rounded(total(sums(page, "trilevel_workers", { model }, "model")))],
    ["worker restarts", rounded(total(sums(page, "trilevel_worker_restarts_total", { model }, "model")))],
  ];
  byId("figures").replaceChildren(...shown.map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

/** What a counter rose by a second, between each two readings. */
function rates(model, isWanted) {
  const counts = readings.map(({ page }) => {
    const found = sums(page, "trilevel_requests_total", { model }, "status");
    return total(new Map([...found].filter(([status]) => isWanted(status))));
  });
  return counts.slice(1).map((count, place) =>
    (count - counts[place]) / ((readings[place + 1].at - readings[place].at) / 1000));
}

function throughput(model) {
  const all = rates(model, () => true);
  const bad = rates(model, (status) => status !== "OK" && status !== "200");
  const now = (all.at(-1) ?? 0) - (bad.at(-1) ?? 0);
  const said = `${rounded(now)} a second answered, ${rounded(bad.at(-1) ?? 0)} refused`;
  const good = all.map((rate, place) => rate - bad[place]);
  // one line that lies on the axis would say no more
  chart("throughput", bad.some((rate) => rate > 0) ? [good, bad] : [good], said);
}

function queue(model) {
  const waiting = readings.map(({ page }) => total(sums(page, "trilevel_queue_rows", { model }, "queue")));
  chart("queue", [waiting], `${rounded(waiting.at(-1))} wait now`);
}

function chart(id, series, said) {
  const drawn = lines(series, { slots: SLOTS, most: 1, said: `${said}; the last two minutes` });
  byId(id).replaceChildren(make("p", { class: "now" }, said), drawn);
}

function shares(rows) {
  const all = total(rows);
  const shown = [...rows].filter(([, count]) => count > 0).sort(([first], [second]) => first.localeCompare(second));
  byId("shares").replaceChildren(bars(shown.map(([path, count]) => ({
    label: path, share: count / all, said: `${percent(count / all)} of ${rounded(all)}`,
  })), "No row was answered."));
}

function batches(cumulative) {
  const found = buckets(cumulative);
  const all = found.reduce((sum, { count }) => sum + count, 0);
  byId("batches").replaceChildren(bars(found.filter(({ count }) => count > 0).map(({ from, to, count }) => ({
    label: sizes(from, to), share: count / all, said: `${percent(count / all)} of ${rounded(all)}`,
  })), "No batch ran."));
}

function sizes(from, to) {
  if (!Number.isFinite(to)) return `over ${from}`;
  return from + 1 === to || to === 1 ? `${to}` : `${from + 1} to ${to}`;
}

function audit(values) {
  if (!values.size) return "None: the model has no certificate for this machine, or the audit is off.";
  const differ = `${percent(values.get("mean"))} of ${rounded(values.get("samples"))} compared answers`;
  if (values.get("alarm")) return `Alarm: ${differ} differ from the full path's, so that every row takes it now.`;
  return `No alarm: ${differ} differ from the full path's.`;
}
