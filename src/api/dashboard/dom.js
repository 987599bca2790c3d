// Helpers to write to the page. They ensure that data from the server is only ever text, and that a
// refresh changes only what differs, so that focus, selection and scroll position stay.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) attr(node, name, value);
  node.append(...children);
  return node;
}

/** Sets an attribute; null and false remove it. */
export function attr(node, name, value) {
  if (value === null || value === undefined || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) {
    node.setAttribute(name, value);
  }
}

export function attrs(node, values) {
  for (const [name, value] of Object.entries(values)) attr(node, name, value);
}

export function text(node, value) {
  if (node.textContent !== String(value)) node.textContent = value;
}

/** Sets a text in which parts between backticks are code. */
export function sentence(node, value) {
  if (node.textContent === value.replaceAll("`", "")) return;
  const parts = value.split("`");
  node.replaceChildren(...parts.map((part, i) => (i % 2 ? el("code", {}, part) : part)));
}

const kept = new WeakMap();

/** Updates the children of `parent` to match `items`, by key. Existing nodes are kept and updated. */
export function keyed(parent, items, keyOf, make, update) {
  const before = kept.get(parent) ?? new Map();
  const now = new Map();
  const focused = parent.contains(document.activeElement) ? document.activeElement : null;
  for (const item of items) {
    const key = keyOf(item);
    if (now.has(key)) continue;
    const node = before.get(key) ?? make(item);
    update?.(node, item);
    now.set(key, node);
  }
  for (const [key, node] of before) if (!now.has(key)) node.remove();
  let next = parent.firstChild;
  for (const node of now.values()) {
    if (node === next) next = node.nextSibling;
    else parent.insertBefore(node, next);
  }
  kept.set(parent, now);
  // A node that is moved loses focus.
  if (focused?.isConnected && document.activeElement !== focused) focused.focus({ preventScroll: true });
}

/** Calls `then` with the width of an element, now and after each change. */
export function onWidth(node, then) {
  let last = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width !== last && width > 0) then((last = width));
  }).observe(node);
}

let probe;
/** Returns the present value of a color of the style sheet, for canvases. */
export function color(name) {
  probe ??= document.body.appendChild(el("i", { hidden: "" }));
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}
