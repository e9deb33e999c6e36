// The view of the graph: the drawing, what it means in a sentence, filters, and its twin, a table.

import { el, fill, notice } from "./dom.js";
import { Drawing, load } from "./graph.js";
import { Table } from "./table.js";
import { MEANING, STATES, icon, padlock, stateOf, token } from "./padlock.js";
import { byState, carried, edgeId, filtered, pairId, pairs } from "./model.js";
import { about, bytes, count, moment, plural, rate, visible, words } from "./text.js";

/**
 * @typedef {import("./api.js").Graph} Graph
 * @typedef {import("./api.js").Edge} Edge
 * @typedef {import("./api.js").Vertex} Vertex
 * @typedef {import("./graph.js").Choice} Choice
 */

export class GraphView {
  /** @param {(choice: Choice | null, from: HTMLElement | null) => void} choose */
  constructor(choose) {
    this.title = "Graph";
    this.seconds = 300;
    this.choose = choose;
    this.wanted = { text: "", state: "", namespace: "" };
    /** @type {Graph | null} */
    this.graph = null;
    /** @type {Choice | null} */
    this.choice = null;
    /** @type {Drawing | null} */
    this.drawing = null;
    this.summary = el("p", { class: "summary", id: "summary" });
    this.notices = el("div");
    this.box = el("div", {
      class: "drawing", id: "drawing", tabindex: 0, role: "application",
      "aria-roledescription": "graph", "aria-labelledby": "summary", "aria-describedby": "graph-keys",
    });
    this.chips = new Map([...STATES, "refused", "failed"].map((state) => [state, this.#chip(state)]));
    this.search = /** @type {HTMLInputElement} */ (el("input", {
      type: "search", id: "search", placeholder: "name, port, identity, policy, reason",
      oninput: () => this.#filter({ text: this.search.value }),
    }));
    this.spaces = /** @type {HTMLSelectElement} */ (el("select", {
      id: "namespace", onchange: () => this.#filter({ namespace: this.spaces.value }),
    }));
    this.table = this.#table();
    this.element = el("section", { "aria-labelledby": "graph-title" },
      el("h1", { id: "graph-title" }, "Who talks to whom, and how"),
      this.summary,
      this.notices,
      el("div", { class: "filters", role: "group", "aria-label": "Filters" },
        el("div", { class: "chips", role: "group", "aria-label": "Padlock" },
          ...[...this.chips.values()].map((each) => each.button)),
        el("label", {}, "Namespace", this.spaces),
        el("label", { class: "grow" }, "Find", this.search)),
      el("div", { class: "stage" }, this.box,
        el("div", { class: "tools", role: "group", "aria-label": "Drawing" },
          this.#tool("+", "Closer", () => this.drawing?.zoom(1.25)),
          this.#tool("−", "Farther", () => this.drawing?.zoom(0.8)),
          this.#tool("⤢", "Show all", () => this.drawing?.fit()),
          this.#tool("↺", "Arrange anew", () => this.#rearrange()))),
      el("p", { class: "hint", id: "graph-keys" },
        "In the drawing: arrow keys move it, + and − zoom, 0 shows all. Padlocks are of traffic that "
        + "was seen, never of what is configured. Below a name stand mode and ASDEX. The table has the "
        + "lines, for keyboard and screen reader."),
      el("h2", { id: "table-title" }, "The same as a table"),
      this.table.element);
    void this.#start();
  }

  async #start() {
    const cytoscape = await load();
    if (cytoscape === null) {
      fill(this.box, notice("warn", "The drawing is not part of this installation: it was built "
        + "without npm (docs/page.md). The table below has everything that it would show."));
      this.box.removeAttribute("tabindex");
      this.box.setAttribute("role", "note");
      return;
    }
    this.drawing = new Drawing(cytoscape, this.box, (choice) => this.choose(choice, null));
    // In reach of the console: a canvas shows nothing of itself.
    /** @type {any} */ (this.box).drawing = this.drawing;
    this.#render();
  }

  /** @param {number} seconds */
  asks(seconds) {
    // What each point was lost by is only asked for where it is shown.
    return {
      graph: `/graph?seconds=${seconds}`,
      ...(this.choice?.kind === "vertex" ? { asdex: `/asdex?seconds=${seconds}` } : {}),
    };
  }

  /** @param {import("./api.js").Answers} answers */
  update({ graph }) {
    if (graph === undefined) return;
    this.graph = graph;
    this.vertices = new Map(graph.vertices.map((each) => [each.id, each]));
    this.#render();
  }

  /** @param {Choice | null} choice */
  mark(choice) {
    this.choice = choice;
    this.#render();
    this.drawing?.mark(choice);
  }

  #render() {
    const graph = this.graph;
    if (graph === null || this.vertices === undefined) return;
    const every = pairs(graph.edges);
    const shown = filtered(graph.edges, this.wanted, this.vertices);
    const bright = new Set(shown.map((each) => pairId(each.source, each.destination)));
    this.drawing?.show(graph.vertices, every, graph.window_seconds, (pair) => bright.has(pair.id));
    fill(this.summary, ...summary(graph, every));
    fill(this.notices,
      !graph.complete && notice("idle", "The recording does not cover the whole window: what was "
        + "before it began is not known."),
      graph.truncated && notice("warn", "There is more than fits one answer; what was seen longest "
        + "ago is left out."),
      graph.problem && notice("bad", `Recording does not work now: ${visible(graph.problem)}`),
      graph.edges.length === 0 && notice("idle", "Nobody has called anybody in this window. Choose "
        + "a longer one, or make a call."));
    this.#counts(graph);
    const spaces = [...new Set(graph.vertices.map((each) => each.namespace))]
      .filter((each) => each !== "").sort();
    fill(this.spaces, el("option", { value: "" }, "all"),
      ...spaces.map((each) => el("option", { value: each }, visible(each))));
    this.spaces.value = this.wanted.namespace;
    this.table.update(shown, this.#chosenRow(shown));
  }

  /** @param {Edge[]} shown */
  #chosenRow(shown) {
    const { choice } = this;
    if (choice?.kind !== "pair") return "";
    const found = shown.find((each) => pairId(each.source, each.destination) === choice.id);
    return found === undefined ? "" : edgeId(found);
  }

  /** @param {Graph} graph */
  #counts(graph) {
    for (const [state, chip] of this.chips) {
      const number = graph.edges.filter((each) => (state === "refused" ? each.refused > 0
        : state === "failed" ? each.failed > 0 : stateOf(each.padlock) === state)).length;
      fill(chip.number, count(number));
      const pressed = String(this.wanted.state === state);
      if (chip.button.getAttribute("aria-pressed") !== pressed)
        chip.button.setAttribute("aria-pressed", pressed);
    }
  }

  /** @param {string} state */
  #chip(state) {
    const known = STATES.find((each) => each === state);
    const number = el("span", { class: "number" });
    const button = el("button", {
      type: "button", class: "chip", "aria-pressed": "false",
      "data-state": known === undefined ? "none" : token(known),
      title: known !== undefined ? MEANING[known]
        : `lines with connections that ${state === "failed" ? "failed" : "were refused"}`,
      onclick: () => this.#filter({ state: this.wanted.state === state ? "" : state }),
    }, known === undefined ? el("span", { class: "cross", "aria-hidden": "true" }, "✕") : icon(known),
    state, number);
    return { button, number };
  }

  /** @param {string} sign @param {string} name @param {() => void} act */
  #tool(sign, name, act) {
    return el("button", { type: "button", "aria-label": name, title: name, onclick: act }, sign);
  }

  /** @param {Partial<{text: string, state: string, namespace: string}>} change */
  #filter(change) {
    Object.assign(this.wanted, change);
    this.#render();
  }

  #rearrange() {
    if (this.graph !== null) this.drawing?.rearrange(this.graph.vertices, pairs(this.graph.edges));
  }

  #table() {
    const seconds = () => this.graph?.window_seconds ?? 1;
    /** @type {Table<Edge>} */
    const made = new Table({
      caption: "Connections by caller, callee and port",
      empty: "No connection fits the filters.",
      id: edgeId,
      open: (edge, from) => this.choose(
        { kind: "pair", id: pairId(edge.source, edge.destination) }, from),
      columns: [
        { title: "Caller", sort: (edge) => edge.source, cell: (edge) => visible(edge.source) },
        { title: "Callee", sort: (edge) => edge.destination, cell: (edge) => visible(edge.destination) },
        { title: "Port", sort: (edge) => edge.port, cell: (edge) => String(edge.port), numeric: true },
        {
          title: "Padlock", sort: (edge) => -STATES.indexOf(stateOf(edge.padlock)), first: "desc",
          cell: (edge) => padlock(stateOf(edge.padlock), edge.protected_share),
        },
        {
          title: "Rate", sort: (edge) => carried(edge), numeric: true, first: "desc",
          cell: (edge) => rate(carried(edge), seconds()),
        },
        {
          title: "Refused", sort: (edge) => edge.refused, numeric: true, first: "desc",
          cell: (edge) => trouble(edge.refused),
        },
        {
          title: "Failed", sort: (edge) => edge.failed, numeric: true, first: "desc",
          cell: (edge) => trouble(edge.failed),
        },
        {
          title: "Why", kind: "wide", sort: (edge) => Object.keys(edge.reasons).join(),
          cell: (edge) => Object.keys(edge.reasons).map(words).join(", "),
        },
        {
          title: "Bytes", sort: (edge) => edge.bytes_sent + edge.bytes_received, numeric: true,
          first: "desc", cell: (edge) => bytes(edge.bytes_sent + edge.bytes_received),
        },
        { title: "Last seen", kind: "short", sort: (edge) => edge.last, first: "desc", cell: (edge) => moment(edge.last) },
      ],
    });
    return made;
  }
}

/** @param {number} number */
function trouble(number) {
  return number === 0 ? "0" : el("span", { class: "bad" }, `✕ ${count(number)}`);
}

/** What the drawing shows, in a sentence.
 * @param {Graph} graph @param {import("./model.js").Pair[]} every */
function summary(graph, every) {
  const states = byState(every);
  const workloads = graph.vertices.filter((each) => each.kind === "workload").length;
  const refused = every.reduce((sum, each) => sum + each.refused, 0);
  const failed = every.reduce((sum, each) => sum + each.failed, 0);
  const carrying = every.length - states["no data"];
  const locked = carrying === 0 ? "nothing was let in"
    : `${count(states.all)} of ${plural(carrying, "line")} with traffic all mutual TLS`
      + (states.some > 0 ? `, ${count(states.some)} in part` : "")
      + (states.none > 0 ? `, ${count(states.none)} not at all` : "");
  /** @param {number} number @param {string} what */
  const mark = (number, what) => (number === 0 ? `0 ${what}`
    : el("span", { class: "bad" }, `${count(number)} ${what}`));
  return [`${plural(workloads, "workload")}, ${plural(every.length, "line")} in the last `
    + `${about(graph.window_seconds)}: ${locked}; `,
  mark(refused, "refused"), ", ", mark(failed, "failed"), "."];
}
