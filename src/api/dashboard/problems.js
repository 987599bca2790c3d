// Problems and notices: what is wrong, since when, the remedy with a button that copies it, and a link to the
// explanation of the code.

import { attr, el, sentence, text } from "./dom.js";
import { ago, moment } from "./words.js";

/** Time for which the button says that the remedy was copied, in ms. */
const COPIED_FOR = 1500;

/** Identifies a problem while its measurements change. */
export const keyOf = ({ code, severity, subject }) => `${code} ${severity} ${subject}`;

export function makeProblem() {
  const copy = el("button", { type: "button", class: "copy" }, "Copy");
  copy.addEventListener("click", () => copyText(copy));
  return el(
    "li",
    {},
    el("p", { class: "what" }, el("span", { class: "severity" }), el("span")),
    el("p", { class: "fix" }, el("span"), copy),
    el("p", { class: "beneath" }, el("span"), el("a")),
  );
}

export function showProblem(item, { code, severity, since, what, fix }) {
  const [statement, remedy, more] = item.children;
  attr(item, "data-severity", severity);
  text(statement.firstChild, severity);
  sentence(statement.lastChild, what);
  remedy.hidden = !fix;
  sentence(remedy.firstChild, fix);
  attr(remedy.lastChild, "aria-label", `Copy the remedy of ${code}`);
  text(more.firstChild, since ? `since ${moment(new Date(since * 1000))}, for ${ago(since)}` : "");
  text(more.lastChild, code);
  attr(more.lastChild, "href", `problems#${code}`);
}

async function copyText(button) {
  const words = button.previousSibling;
  try {
    await navigator.clipboard.writeText(words.textContent);
  } catch {
    // Pages over plain HTTP have no clipboard, but may copy a selection.
    getSelection().selectAllChildren(words);
    document.execCommand("copy");
  }
  text(button, "Copied");
  setTimeout(() => text(button, "Copy"), COPIED_FOR);
}
