// A table that a keyboard and a screen reader can use: a caption, headers that sort, one button a
// row. Rows are kept over refreshes, so that focus and reading position stay where they are.

import { el, fill, hide } from "./dom.js";
import { count } from "./text.js";

/**
 * @template Row
 * @typedef {{title: string, sort: (row: Row) => string | number, cell: (row: Row) =>
 *   import("./dom.js").Child | import("./dom.js").Child[], numeric?: boolean, first?: "desc",
 *   kind?: "wide" | "short" | "identity"}} Column
 */

/** Rows at first: more are a click away, and a page of thousands is slow for a screen reader. */
const SHOWN = 200;

/** One for all: to make it takes longer than hundreds of comparisons. */
const ORDER = new Intl.Collator("en", { numeric: true });

/** @template Row */
export class Table {
  /** @param {{caption: string, columns: Column<Row>[], id: (row: Row) => string,
   *   open?: (row: Row, from: HTMLElement) => void, empty: string, sorted?: number}} what */
  constructor(what) {
    this.what = what;
    /** @type {Map<string, {line: HTMLTableRowElement, row: Row}>} */
    this.lines = new Map();
    /** @type {Row[]} */
    this.rows = [];
    this.by = what.sorted ?? 0;
    this.down = what.columns[this.by].first === "desc";
    this.all = false;
    this.chosen = "";
    this.body = el("tbody");
    this.headers = what.columns.map((column, at) => el("th", {
      scope: "col", class: column.numeric && "numeric",
    }, el("button", { type: "button", class: "sort", onclick: () => this.#sort(at) }, column.title)));
    this.more = el("button", { type: "button", class: "more", hidden: true, onclick: () => {
      this.all = true;
      this.#show();
    } });
    this.empty = el("p", { class: "empty", hidden: true }, what.empty);
    this.table = el("table", {}, el("caption", {}, what.caption),
      el("thead", {}, el("tr", {}, ...this.headers)), this.body);
    this.element = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": what.caption },
      this.table, this.empty, this.more);
  }

  /** @param {Row[]} rows @param {string} [chosen] The id of the row that is shown elsewhere. */
  update(rows, chosen = "") {
    this.rows = rows;
    this.chosen = chosen;
    this.#show();
  }

  /** @param {number} at */
  #sort(at) {
    this.down = at === this.by ? !this.down : this.what.columns[at].first === "desc";
    this.by = at;
    this.#show();
  }

  #show() {
    const { columns, id } = this.what;
    this.headers.forEach((header, at) => {
      const value = at !== this.by ? "none" : this.down ? "descending" : "ascending";
      if (header.getAttribute("aria-sort") !== value) header.setAttribute("aria-sort", value);
    });
    const key = columns[this.by].sort;
    const sign = this.down ? -1 : 1;
    const ordered = this.rows.map((row) => ({ row, key: key(row), id: id(row) })).sort((a, b) =>
      sign * compare(a.key, b.key) || (a.id < b.id ? -1 : 1));
    const shown = this.all ? ordered : ordered.slice(0, SHOWN);
    const wanted = new Set(shown.map((each) => each.id));
    for (const [name, { line }] of this.lines) {
      if (wanted.has(name)) continue;
      line.remove();
      this.lines.delete(name);
    }
    shown.forEach(({ row, id: name }, at) => {
      let known = this.lines.get(name);
      if (known === undefined) {
        known = { line: /** @type {HTMLTableRowElement} */ (el("tr")), row };
        this.lines.set(name, known);
        this.#cells(known);
      }
      known.row = row;
      this.#fill(known, name === this.chosen);
      if (this.body.children[at] !== known.line)
        this.body.insertBefore(known.line, this.body.children[at] ?? null);
    });
    hide(this.empty, this.rows.length > 0);
    hide(this.table, this.rows.length === 0);
    hide(this.more, shown.length === ordered.length);
    const more = `Show all ${count(ordered.length)} rows`;
    if (this.more.textContent !== more) this.more.textContent = more;
  }

  /** @param {{line: HTMLTableRowElement, row: Row}} known */
  #cells(known) {
    const { open, columns } = this.what;
    columns.forEach((column, at) => {
      const cell = at === 0 ? el("th", { scope: "row" })
        : el("td", { class: column.numeric ? "numeric" : column.kind });
      if (at === 0 && open !== undefined) {
        const button = el("button", { type: "button", class: "open" });
        button.addEventListener("click", () => open(known.row, button));
        cell.append(button);
      }
      known.line.append(cell);
    });
  }

  /** @param {{line: HTMLTableRowElement, row: Row}} known @param {boolean} chosen */
  #fill({ line, row }, chosen) {
    this.what.columns.forEach((column, at) => {
      const cell = line.children[at];
      const target = at === 0 && this.what.open !== undefined ? cell.children[0] : cell;
      fill(target, ...[column.cell(row)].flat());
    });
    const current = chosen ? "true" : null;
    if (line.getAttribute("aria-current") === current) return;
    if (current === null) line.removeAttribute("aria-current");
    else line.setAttribute("aria-current", current);
  }
}

/** @param {string | number} a @param {string | number} b */
function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return ORDER.compare(String(a), String(b));
}
