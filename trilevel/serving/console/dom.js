// Elements made of values. Text goes in as text nodes alone: nothing that was sent or answered becomes markup.

const SVG = new Set(["svg", "polyline", "line"]);

export const byId = (id) => document.getElementById(id);

/** An element; attributes that are null or false are left out. */
export function make(name, attributes = {}, ...children) {
  const made = SVG.has(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export const show = (id, isShown) => { byId(id).hidden = !isShown; };

/** Milliseconds as people read them. */
export const duration = (ms) => (ms >= 1000 ? `${(ms / 1000).toFixed(2)} s` : `${ms.toFixed(ms < 10 ? 1 : 0)} ms`);

export const percent = (share) => `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;
