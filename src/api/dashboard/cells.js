// A grid of many equal cells on a canvas, with a cursor for pointer and keyboard. Ten thousand elements
// would be slow, and useless with a screen reader. A note describes the cell under the cursor instead.

import { attr, el, text } from "./dom.js";

export class Cells {
  /** `describe(column, row)` returns the note, or null without a cell; Enter and clicks call `choose`. */
  constructor(canvas, note, { hint, describe, choose }) {
    Object.assign(this, { canvas, note, hint, describe, choose, at: null, shape: null });
    this.cursor = el("div", { class: "cell-cursor", hidden: "", "aria-hidden": "true" });
    this.bands = [0, 1].map(() => el("div", { class: "cell-band", hidden: "", "aria-hidden": "true" }));
    canvas.after(...this.bands, this.cursor);
    attr(note, "aria-live", "off");
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => {
      if (document.activeElement !== canvas) this.cursor.hidden = true;
    });
    canvas.addEventListener("click", (event) => {
      this.point(event);
      if (this.inside(event)) this.choose(...this.at);
    });
    canvas.addEventListener("keydown", (event) => this.press(event));
    canvas.addEventListener("focus", () => {
      // A click places the cursor by itself.
      if (canvas.matches(":focus-visible")) this.move(...(this.at ?? this.shape?.start ?? [0, 0]), true);
    });
    canvas.addEventListener("blur", () => (this.cursor.hidden = true));
  }

  /** Redraws. `shape` has columns, rows, the size of a cell, and the space for labels at the left and top. */
  draw(shape, paint) {
    this.shape = shape;
    const { columns, rows, cell, left = 0, top = 0 } = shape;
    const [width, height] = [Math.ceil(left + columns * cell), Math.ceil(top + rows * cell)];
    const dots = window.devicePixelRatio || 1;
    this.canvas.width = width * dots;
    this.canvas.height = height * dots;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(dots, dots);
    paint(pen);
    if (this.at && (this.at[0] >= columns || this.at[1] >= rows)) this.at = null;
    if (!this.at) this.cursor.hidden = true;
    this.say(false);
  }

  /** Highlights a column and a row; null for none. */
  mark(column, row) {
    const { columns, rows, cell, left = 0, top = 0 } = this.shape;
    const [across, along] = this.bands;
    place(across, row === null, left, top + row * cell, columns * cell, cell);
    place(along, column === null, left + column * cell, top, cell, rows * cell);
  }

  inside(event) {
    return this.cellAt(event) !== null;
  }

  cellAt({ offsetX, offsetY }) {
    if (!this.shape) return null;
    const { columns, rows, cell, left = 0, top = 0 } = this.shape;
    const [column, row] = [Math.floor((offsetX - left) / cell), Math.floor((offsetY - top) / cell)];
    return column >= 0 && row >= 0 && column < columns && row < rows ? [column, row] : null;
  }

  point(event) {
    const cell = this.cellAt(event);
    if (cell) this.move(...cell, false);
  }

  press(event) {
    if (!this.shape || event.altKey || event.ctrlKey || event.metaKey) return;
    const { columns, rows } = this.shape;
    const [column, row] = this.at ?? this.shape.start ?? [0, 0];
    const to = {
      ArrowLeft: [column - 1, row],
      ArrowRight: [column + 1, row],
      ArrowUp: [column, row - 1],
      ArrowDown: [column, row + 1],
      Home: [0, row],
      End: [columns - 1, row],
      PageUp: [column, row - 10],
      PageDown: [column, row + 10],
    }[event.key];
    if (to) {
      const within = (value, most) => Math.min(Math.max(value, 0), most - 1);
      this.move(within(to[0], columns), within(to[1], rows), true);
    } else if (event.key === "Enter" || event.key === " ") {
      this.choose(column, row);
    } else {
      return;
    }
    event.preventDefault();
  }

  move(column, row, byKey) {
    if (!this.shape) return;
    this.at = [column, row];
    const { cell, left = 0, top = 0 } = this.shape;
    // The cursor of a tiny cell must still be visible.
    const size = Math.max(cell, 7);
    const off = (size - cell) / 2;
    place(this.cursor, false, left + column * cell - off, top + row * cell - off, size, size);
    if (byKey) this.cursor.scrollIntoView({ block: "nearest", inline: "nearest" });
    this.say(byKey);
  }

  /** Announces only cells reached by keyboard, not those that the pointer crosses or a refresh changes. */
  say(aloud) {
    attr(this.note, "aria-live", aloud ? "polite" : "off");
    text(this.note, (this.at && this.describe(...this.at)) ?? (this.canvas.hidden ? "" : this.hint));
  }
}

function place(box, hidden, x, y, w, h) {
  box.hidden = hidden;
  if (hidden) return;
  Object.assign(box.style, { left: `${x}px`, top: `${y}px`, width: `${w}px`, height: `${h}px` });
}
