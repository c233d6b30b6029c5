// What /metrics says, and what changed between two readings of it.

const LINE = /^(\w+)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const ESCAPED = { n: "\n", "\\": "\\", '"': '"' };

/** Every sample of a page: `{name, labels, value}`. */
export function parse(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : LINE.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\(.)/g, (_, letter) => ESCAPED[letter] ?? letter);
    }
    found.push({ name: match[1], labels, value: Number(match[3].replace("Inf", "Infinity")) });
  }
  return found;
}

/** Sums of the samples of a name whose labels are `where`, by the label `by` (a Map). */
export function sums(samples, name, where, by) {
  const found = new Map();
  for (const one of samples) {
    if (one.name !== name || !Object.entries(where).every(([key, value]) => one.labels[key] === value)) continue;
    const group = one.labels[by] ?? "";
    found.set(group, (found.get(group) ?? 0) + one.value);
  }
  return found;
}

/** By how much each number of `now` is above that of `then`. */
export const minus = (now, then) => new Map([...now].map(([key, value]) => [key, value - (then.get(key) ?? 0)]));

export const total = (map) => [...map.values()].reduce((sum, value) => sum + value, 0);

/** Counts of a histogram's buckets, from the cumulative ones by their upper bounds: `[{from, to, count}]`. */
export function buckets(cumulative) {
  const bounds = [...cumulative].map(([bound, count]) => [Number(bound.replace("Inf", "Infinity")), count]);
  bounds.sort(([first], [second]) => first - second);
  return bounds.map(([to, count], place) => {
    const [from, before] = place ? bounds[place - 1] : [0, 0];
    return { from, to, count: count - before };
  });
}

/** The value that a share of a histogram lies below, as Prometheus estimates it; NaN for an empty one. */
export function quantile(cumulative, share) {
  const parts = buckets(cumulative);
  let left = share * parts.reduce((sum, { count }) => sum + count, 0);
  if (!left) return NaN;
  for (const { from, to, count } of parts) {
    if (count && left <= count) return Number.isFinite(to) ? from + (to - from) * (left / count) : from;
    left -= count;
  }
  return NaN;
}
