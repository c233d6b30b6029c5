// An answer on the page: what it says, the path it took and why, and where the time went.

import { bars } from "./charts.js";
import { duration, make, percent } from "./dom.js";

const MOST_CLASSES = 6;

/** The parts of an answer; `model` as of `models()`, `ms` from sending to having it. */
export function told(answer, model, ms) {
  return [
    make("h2", { id: "answer-title" }, "Answer"),
    ...words(answer),
    make("h3", {}, "Path"),
    ...path(answer, model),
    make("h3", {}, `Time: ${duration(ms)}`),
    time(answer.seconds, ms),
    make("details", {}, make("summary", {}, "The whole answer, as JSON"), json(answer)),
  ];
}

function words(answer) {
  if (answer.sentences) return summary(answer);
  if (answer.predictions) return answer.predictions.flatMap(classes);
  return answer.vectors.flatMap(vector);
}

function summary({ sentences, places, units, tokens, units_left_out: leftOut, document: read = [] }) {
  const said = `${sentences.length} of ${units} sentences and headings; ${tokens} tokens read`;
  return [
    make("ol", { class: "sentences" }, ...sentences.map((one) => make("li", {}, one))),
    make("p", { class: "quiet" }, leftOut ? `${said}; ${leftOut} at the end were too many, and left out.` : `${said}.`),
    make("h3", { id: "document-title" }, "In the text"),
    make("p", { class: "quiet" },
      make("mark", {}, "Chosen"), " and ", make("span", { class: "high" }, "scored in the top tenth"), "."),
    text(read, new Set(places)),
  ];
}

function text(read, chosen) {
  const scores = read.filter(({ kind }) => kind === "sentence" || kind === "item").map(({ score }) => score);
  const high = scores.sort((a, b) => b - a)[Math.floor(scores.length / 10)] ?? Infinity;
  const view = { class: "document", tabindex: "0", role: "region", "aria-labelledby": "document-title" };
  // a title that the text begins with was read twice
  const isTwice = read[0]?.kind === "title" && read[0].text === read[1]?.text;
  const parts = read.flatMap((unit, place) => (isTwice && !place ? [] : [sentence(unit, chosen.has(place), high), " "]));
  return make("div", view, ...parts);
}

function sentence({ text: said, kind, score }, isChosen, high) {
  if (kind === "title" || kind === "heading") return make("p", { class: "heading" }, said);
  const title = `score ${score.toFixed(2)}`;
  if (isChosen) return make("mark", { title }, said);
  return make("span", { title, class: score > high ? "high" : null }, said);
}

function classes({ label, probabilities }) {
  const ranked = Object.entries(probabilities).sort(([, a], [, b]) => b - a);
  const rows = ranked.slice(0, MOST_CLASSES).map(([name, share]) => ({
    label: name, share, said: percent(share), isStrong: name === label,
  }));
  const more = ranked.length - rows.length;
  return [
    make("p", { class: "said" }, label),
    bars(rows),
    ...(more > 0 ? [make("p", { class: "quiet" }, `${more} more classes are less likely.`)] : []),
  ];
}

function vector(numbers) {
  const length = Math.hypot(...numbers).toFixed(3);
  const first = numbers.slice(0, 6).map((one) => one.toFixed(4)).join(", ");
  return [make("p", { class: "said" }, `${numbers.length} numbers`), make("p", {}, `Length ${length}; ${first}, …`)];
}

function path({ paths, explanations = [] }, model) {
  const [taken] = paths;
  const asked = new Set((explanations[0]?.asked ?? []).map((one) => one.path));
  const steps = model.paths.map((name) => {
    const isTaken = name === taken;
    const became = isTaken ? "taken" : asked.has(name) ? "asked, not sure enough" : "not run";
    const attributes = { "data-became": isTaken ? "taken" : asked.has(name) ? "asked" : "not-run" };
    return make("li", attributes, make("code", {}, name), make("span", {}, became));
  });
  const said = explanations.flatMap((one) => one.said ?? []);
  return [
    make("ol", { class: "paths" }, ...steps),
    make("ul", { class: "why" }, ...said.map((line) => make("li", {}, line))),
  ];
}

function time({ queue, compute, total }, ms) {
  const stages = [
    ["waiting for a worker", queue * 1000],
    ["computing", compute * 1000],
    ["reading and sending", Math.max(0, ms - total * 1000)],
  ];
  return bars(stages.map(([label, spent]) => ({ label, share: spent / ms, said: duration(spent) })));
}

// long lists are cut, so that a large document stays readable
const json = (answer) => make("pre", { tabindex: "0", "aria-label": "JSON" },
  JSON.stringify(answer, (_, value) => (Array.isArray(value) && value.length > 20
    ? [...value.slice(0, 20), `… ${value.length - 20} more`] : value), 2));
