// Two kinds of chart: bars with their numbers beside them, and lines over time. Both say in words what they show.

import { make } from "./dom.js";

/** Rows of `{label, share, said, isStrong}`; the bars are for the eye, the numbers for everyone. */
export function bars(rows, nothing) {
  if (!rows.length) return make("p", { class: "quiet" }, nothing);
  return make("ul", { class: "bars" }, ...rows.map(bar));
}

function bar({ label, share, said, isStrong = false }) {
  const filled = make("span");
  // a style attribute would be refused by the page's Content-Security-Policy
  filled.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return make(
    "li",
    { class: isStrong ? "strong" : null },
    make("span", { class: "label" }, label),
    make("span", { class: "track", "aria-hidden": "true" }, filled),
    make("span", { class: "value" }, said),
  );
}

const WIDTH = 240;
const HEIGHT = 56;

/** Lines of numbers, oldest first, `slots` of them from edge to edge; `said` tells in words what they show. */
export function lines(series, { slots, most, said }) {
  const top = Math.max(most, ...series.flat());
  const drawn = series.map((values, place) => {
    const left = slots - values.length;
    const points = values.map((value, index) => {
      const x = ((left + index) / (slots - 1)) * WIDTH;
      return `${x.toFixed(1)},${(HEIGHT - 1 - (value / top) * (HEIGHT - 4)).toFixed(1)}`;
    });
    return make("polyline", { points: points.join(" "), class: `line-${place}` });
  });
  const base = make("line", { x1: 0, x2: WIDTH, y1: HEIGHT - 1, y2: HEIGHT - 1, class: "base" });
  const view = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": said };
  return make(
    "div",
    { class: "lines" },
    make("svg", view, base, ...drawn),
    make("p", { class: "axis quiet", "aria-hidden": "true" },
      make("span", {}, "2 min ago"), make("span", {}, `0 to ${rounded(top)}`), make("span", {}, "now")),
  );
}

export const rounded = (value) => (value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1));
