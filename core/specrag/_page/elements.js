"use strict";
// What the other scripts share: elements made from text, never from markup, and the outcomes with their symbols.

/** An element. A string among the children becomes text; null and false are left out. */
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
};

const byId = (id) => document.getElementById(id);

/** Text that a model or a user wrote: its own direction, and no effect on what stands beside it. */
const said = (text, tag = "bdi") => make(tag, { dir: "auto" }, text);

const OUTCOMES = {
  right: ["✓", "right"],
  abstained_rightly: ["✓", "rightly abstained"],
  abstained: ["–", "abstained"],
  wrong: ["✗", "wrong"],
  failed: ["!", "failed"],
  answered: ["•", "answered"],
};
const ORDER = Object.keys(OUTCOMES);

const badge = (outcome) => {
  const [symbol, name] = OUTCOMES[outcome];
  return make("span", { class: `badge ${outcome}` }, make("span", { "aria-hidden": "true" }, symbol), ` ${name}`);
};

const seconds = (value) => {
  if (value == null) return "–";
  if (value < 0.995) return `${Math.round(value * 1000)} ms`;
  return value < 99.5 ? `${value.toPrecision(3)} s` : `${Math.round(value)} s`;
};
const percent = (value) => `${(100 * value).toFixed(0)} %`;
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** What finds one of the texts as whole words in any case, whatever stands between the words; null: they have none. */
const finder = (texts) => {
  const patterns = texts
    .map((text) => (text.match(/[\p{L}\p{N}_]+/gu) || []).join("[^\\p{L}\\p{N}_]+"))
    .filter((pattern) => pattern);
  if (!patterns.length) return null;
  patterns.sort((a, b) => b.length - a.length);
  return new RegExp(`(?<![\\p{L}\\p{N}_])(?:${patterns.join("|")})(?![\\p{L}\\p{N}_])`, "giu");
};

const MARKS = 500; // in one text: browsers take seconds to lay out tens of thousands

const first = (count, values) => {
  const taken = [];
  for (const value of values) if (taken.push(value) === count) break;
  return taken;
};

/** The text with the parts that the finders find in <mark>; `finders` maps a class to a finder. */
const marked = (text, finders) => {
  const found = Object.entries(finders)
    .filter(([, pattern]) => pattern)
    .map(([name, pattern]) => ({
      name,
      at: 0,
      spans: first(MARKS, text.matchAll(pattern)).map((match) => [match.index, match.index + match[0].length]),
    }));
  const edges = new Set([0, text.length, ...found.flatMap(({ spans }) => spans.flat())]);
  const cuts = [...edges].sort((a, b) => a - b);
  return cuts.slice(1).map((end, i) => {
    const start = cuts[i];
    const names = [];
    for (const one of found) {
      while (one.at < one.spans.length && one.spans[one.at][1] <= start) one.at += 1;
      if (one.at < one.spans.length && one.spans[one.at][0] <= start) names.push(one.name);
    }
    const piece = text.slice(start, end);
    return names.length ? make("mark", { class: names.join(" ") }, piece) : piece;
  });
};

/** A table in a box of its own that scrolls sideways, by keyboard too. */
const scrolling = (label, table) =>
  make("div", { class: "scroll", role: "region", "aria-label": label, tabindex: "0" }, table);
