"use strict";
// What the other scripts share: elements made without markup, numbers as text, colours of the theme.
const E = { charts: [], range: null };

// Texts become text nodes: nothing that a run brings along is ever read as markup.
E.el = (tag, properties = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
};

E.number = (value) => {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return value.toLocaleString("en");
  const size = Math.abs(value);
  const short = Number(value.toPrecision(4));
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? Number(value.toPrecision(3)).toExponential() : String(short);
};

// The same where there is room for eight characters.
E.tick = (value) => (Math.abs(value) >= 1e6 ? Number(value.toPrecision(3)).toExponential() : E.number(value));

E.color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
E.runColor = (i) => E.color("run" + (i % 6));

// A small square of a colour, before what it stands for.
E.key = (color) => {
  const square = E.el("span", { className: "key" });
  square.style.background = color;
  return square;
};

E.section = (title, wide, ...children) =>
  E.el("section", { className: wide ? "wide" : "" }, E.el("h2", {}, title), ...children);
