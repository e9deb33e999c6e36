// The drawing: Cytoscape on a canvas, padlocks on a second one above it. It shows values and tells
// what was chosen; the table beside it says the same to those who cannot use it.

import { stateOf, draw, token, word } from "./padlock.js";
import { Places, bends } from "./layout.js";
import { rate, visible, count } from "./text.js";

/**
 * @typedef {import("./api.js").Vertex} Vertex
 * @typedef {import("./model.js").Pair} Pair
 * @typedef {{kind: "vertex" | "pair" | "rollout" | "connection", id: string}} Choice
 */

/** Lines above which each is drawn plain: dashes are slow on a canvas. */
const MANY_LINES = 400;

/** Zoom at which a few vertices are shown: larger than life helps nobody. */
const NEAREST_FIT = 1.1;

/** Lines up to which each is led around the vertices in its way. */
const FEW_LINES = 150;

/** Lines above which labels wait for a closer look. */
const SOME_LINES = 60;

/** Pixels of a padlock at zoom 1, and those below which it is not drawn. */
const LOCK = 19;
const MIN_LOCK = 8;
const MAX_LOCK = 28;

/** Of a name in the drawing; the panel has all of it. */
const MAX_LABEL = 26;

/** Named here, so that the types of this page's own files alone are checked. @type {string} */
const LIBRARY = "./vendor/cytoscape.mjs";

/** Load the drawing library; null if this installation was built without it. */
export async function load() {
  try {
    return (await import(LIBRARY)).default;
  } catch {
    return null;
  }
}

export class Drawing {
  /** @param {any} cytoscape @param {HTMLElement} box @param {(choice: Choice | null) => void} choose */
  constructor(cytoscape, box, choose) {
    this.box = box;
    this.places = new Places();
    /** @type {Map<string, Pair>} */
    this.pairs = new Map();
    /** What each element was last given. Not in its scratch: to write there has the library find
     * every style anew, and draw everything. @type {Map<string, string>} */
    this.classes = new Map();
    this.seconds = 1;
    this.theme = theme();
    /** Changes of the drawing so far: a refresh that brings nothing new makes none. */
    this.operations = 0;
    /** Whether all is shown as `fit` left it; then it stays so when the box changes. */
    this.fitted = false;
    this.cy = cytoscape({
      container: box,
      style: this.#style(),
      layout: { name: "preset" },
      minZoom: 0.04,
      maxZoom: 3,
      boxSelectionEnabled: false,
      selectionType: "single",
    });
    this.locks = document.createElement("canvas");
    this.locks.className = "locks";
    this.locks.setAttribute("aria-hidden", "true");
    box.append(this.locks);
    this.cy.on("render", () => this.#lock());
    this.cy.on("tap", (/** @type {any} */ event) => {
      const target = event.target;
      if (target === this.cy) choose(null);
      else if (target.isEdge()) choose({ kind: "pair", id: target.id() });
      else if (!target.isParent()) choose({ kind: "vertex", id: target.data("vertex") });
    });
    this.cy.on("dragfree", "node", (/** @type {any} */ event) => {
      for (const node of event.target.isParent() ? event.target.children() : event.target)
        this.places.known.set(node.data("vertex"), { ...node.position() });
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.theme = theme();
      this.cy.style(this.#style());
    });
    this.cy.on("viewport", () => { this.fitted = false; });
    new ResizeObserver(() => {
      if (this.fitted) this.fit();
      else this.cy.resize();
    }).observe(box);
    // The library remembers where on the screen the box is, and does not learn that what is above it
    // grew or shrank: a click would mean another place.
    box.addEventListener("pointerdown", () => this.cy.resize(), { capture: true });
    box.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Show these; what is the same already is left alone.
   * @param {Vertex[]} vertices @param {Pair[]} pairs @param {number} seconds
   * @param {(pair: Pair) => boolean} bright */
  show(vertices, pairs, seconds, bright) {
    const { cy, fitted } = this;
    this.seconds = seconds;
    // A line needs both its ends: of an answer that was cut short one may be missing.
    const present = new Set(vertices.map((each) => each.id));
    const lines = pairs.filter((each) => present.has(each.source) && present.has(each.destination));
    this.pairs = new Map(lines.map((each) => [each.id, each]));
    const first = this.places.known.size === 0;
    const moved = this.places.update(vertices, lines);
    const wanted = new Map([...this.#nodes(vertices), ...this.#edges(lines, bright)]
      .map((each) => [each.data.id, each]));
    cy.batch(() => {
      const gone = cy.elements().filter((/** @type {any} */ each) => !wanted.has(each.id()));
      this.operations += gone.length;
      // Not its children with it: they may have found another home.
      gone.nodes(":parent").children().move({ parent: null });
      gone.remove();
      for (const [id, each] of wanted) {
        const known = cy.getElementById(id);
        if (known.empty()) {
          this.operations += 1;
          cy.add(each);
          continue;
        }
        for (const [key, value] of Object.entries(each.data)) {
          if (known.data(key) === value || ["id", "source", "target", "parent"].includes(key)) continue;
          this.operations += 1;
          known.data(key, value);
        }
        if (each.classes !== this.classes.get(id)) {
          this.operations += 1;
          known.classes(each.classes);
        }
        if (moved && each.position !== undefined) known.position(each.position);
      }
    });
    this.classes = new Map([...wanted].map(([id, each]) => [id, each.classes]));
    // Whoever sees all of it goes on seeing all of it; who has moved it is left where he is.
    if ((first || (moved && fitted)) && vertices.length > 0) this.fit();
  }

  /** Mark what is chosen, and bring it into sight.
   * @param {Choice | null} choice */
  mark(choice) {
    this.cy.elements(":selected").unselect();
    if (choice?.kind !== "pair" && choice?.kind !== "vertex") return;
    const found = this.cy.getElementById(choice.kind === "pair" ? choice.id : `v ${choice.id}`);
    if (found.empty()) return;
    found.select();
    const box = found.renderedBoundingBox();
    if (box.x1 < 0 || box.y1 < 0 || box.x2 > this.cy.width() || box.y2 > this.cy.height())
      this.cy.center(found);
  }

  fit() {
    this.cy.resize();
    // Straight lines lie between their ends: to measure thousands of them takes a second.
    this.cy.fit(this.pairs.size > FEW_LINES ? this.cy.nodes() : undefined, 36);
    if (this.cy.zoom() > NEAREST_FIT) {
      this.cy.zoom(NEAREST_FIT);
      this.cy.center();
    }
    this.fitted = true;
  }

  /** @param {number} factor */
  zoom(factor) {
    this.cy.zoom({
      level: this.cy.zoom() * factor,
      renderedPosition: { x: this.cy.width() / 2, y: this.cy.height() / 2 },
    });
  }

  /** Forget all places, and find new ones.
   * @param {Vertex[]} vertices @param {Pair[]} pairs */
  rearrange(vertices, pairs) {
    this.places = new Places();
    this.places.update(vertices, pairs);
    this.cy.batch(() => {
      for (const [id, place] of this.places.known) this.cy.getElementById(`v ${id}`).position(place);
    });
    this.fit();
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const step = 60;
    /** @type {Record<string, () => void>} */
    const keys = {
      ArrowLeft: () => this.cy.panBy({ x: step, y: 0 }),
      ArrowRight: () => this.cy.panBy({ x: -step, y: 0 }),
      ArrowUp: () => this.cy.panBy({ x: 0, y: step }),
      ArrowDown: () => this.cy.panBy({ x: 0, y: -step }),
      "+": () => this.zoom(1.25),
      "=": () => this.zoom(1.25),
      "-": () => this.zoom(0.8),
      0: () => this.fit(),
    };
    if (event.target !== this.box || event.ctrlKey || event.metaKey || event.altKey) return;
    if (!(event.key in keys)) return;
    keys[event.key]();
    event.preventDefault();
  }

  /** @param {Vertex[]} vertices @returns {any[]} */
  #nodes(vertices) {
    /** @type {Map<string, number>} */
    const spaces = new Map();
    for (const { namespace } of vertices)
      if (namespace !== "") spaces.set(namespace, (spaces.get(namespace) ?? 0) + 1);
    return [
      ...[...spaces].sort().map(([name, members]) => ({
        group: "nodes",
        // A large namespace is seen from afar: its name too.
        data: { id: `n ${name}`, label: visible(name, MAX_LABEL), size: Math.max(15, 9 * Math.sqrt(members)) },
        classes: "space",
      })),
      ...vertices.map((each) => ({
        group: "nodes",
        data: {
          id: `v ${each.id}`, vertex: each.id, label: label(each),
          ...(each.namespace === "" ? {} : { parent: `n ${each.namespace}` }),
        },
        classes: `vertex ${each.kind} ${each.local ? "local" : "remote"}`
          + (each.local && each.state !== "" && each.state !== "Enrolled" ? " troubled" : ""),
        position: { .../** @type {any} */ (this.places.known.get(each.id)) },
      })),
    ];
  }

  /** @param {Pair[]} pairs @param {(pair: Pair) => boolean} bright @returns {any[]} */
  #edges(pairs, bright) {
    const many = pairs.length > MANY_LINES ? " many" : pairs.length > SOME_LINES ? " busy" : "";
    const aside = pairs.length > FEW_LINES ? null : bends(pairs, this.places.known);
    return pairs.map((pair) => ({
      group: "edges",
      data: {
        id: pair.id, source: `v ${pair.source}`, target: `v ${pair.destination}`,
        label: edgeLabel(pair, this.seconds), bend: aside?.get(pair) ?? 0,
        // Its middle, for the label to hang below the padlock.
        drop: LOCK * 0.75 + edgeLabel(pair, this.seconds).split("\n").length * 7.5,
        // One to six pixels: each ten times as many connections add one and a half.
        width: Math.min(6, 1.6 + 1.2 * Math.log10(1 + pair.carried)) * (many === " many" ? 0.6 : 1),
      },
      classes: `line ${token(pair.state)}${many}${pair.refused + pair.failed > 0 ? " refused" : ""}`
        + (bright(pair) ? "" : " faded"),
    }));
  }

  #lock() {
    const { cy, locks } = this;
    const scale = devicePixelRatio || 1;
    const width = Math.round(cy.width() * scale);
    const height = Math.round(cy.height() * scale);
    if (locks.width !== width || locks.height !== height) Object.assign(locks, { width, height });
    const canvas = /** @type {CanvasRenderingContext2D} */ (locks.getContext("2d"));
    canvas.setTransform(scale, 0, 0, scale, 0, 0);
    canvas.clearRect(0, 0, cy.width(), cy.height());
    const zoom = cy.zoom();
    const size = Math.min(MAX_LOCK, LOCK * zoom);
    if (size < MIN_LOCK) return;
    const pan = cy.pan();
    cy.edges().forEach((/** @type {any} */ edge) => {
      const pair = this.pairs.get(edge.id());
      const middle = edge.midpoint();
      if (pair === undefined || middle === undefined || edge.hasClass("faded")) return;
      const x = middle.x * zoom + pan.x;
      const y = middle.y * zoom + pan.y;
      if (x < -size || y < -size || x > cy.width() + size || y > cy.height() + size) return;
      draw(canvas, pair.state, x, y, size, {
        ink: this.theme[token(pair.state)], ground: this.theme.surface,
      });
    });
  }

  /** @returns {any[]} */
  #style() {
    const t = this.theme;
    const text = {
      "font-family": "system-ui, sans-serif", "font-size": 13, color: t.text, "text-wrap": "wrap",
      "text-outline-color": t.surface, "text-outline-width": 2.5, "text-outline-opacity": 0.9,
    };
    return [
      { selector: "node.vertex", style: {
        ...text, label: "data(label)", width: 34, height: 34, "text-valign": "bottom",
        "text-margin-y": 6, "line-height": 1.25, "min-zoomed-font-size": 6.5,
        "background-color": t.surface, "border-width": 2.5, "border-color": t.vertex,
        shape: "ellipse", "overlay-opacity": 0,
      } },
      { selector: "node.local", style: { "background-color": t.vertex } },
      { selector: "node.node", style: { shape: "hexagon", "background-color": t.surface } },
      { selector: "node.outside", style: { shape: "diamond", width: 40, height: 40, "border-style": "dashed" } },
      { selector: "node.unknown", style: { shape: "octagon", "border-style": "dashed" } },
      { selector: "node.troubled", style: { "border-color": t.none, "border-width": 5, shape: "round-triangle" } },
      { selector: "node.space", style: {
        ...text, label: "data(label)", "font-size": "data(size)", "font-weight": 600, color: t.muted,
        "text-outline-width": 0, "text-valign": "top", "text-margin-y": -6,
        shape: "round-rectangle", "background-color": t.space, "background-opacity": 0.55,
        "border-width": 1, "border-color": t.line, padding: 34, "overlay-opacity": 0,
        "min-zoomed-font-size": 5,
      } },
      { selector: "edge", style: {
        ...text, label: "data(label)", "font-size": 12, "text-margin-y": "data(drop)", "line-height": 1.2,
        width: "data(width)", "curve-style": "unbundled-bezier",
        "control-point-distances": "data(bend)", "control-point-weights": 0.5,
        "target-arrow-shape": "triangle", "arrow-scale": 1.1, "overlay-opacity": 0,
        "min-zoomed-font-size": 8, "loop-direction": "-45deg",
      } },
      // Who calls itself: a curve through one point would not be seen.
      { selector: "edge:loop", style: { "curve-style": "bezier", "control-point-step-size": 56 } },
      // Where there are many, only a close look needs words.
      { selector: "edge.busy", style: { "min-zoomed-font-size": 10 } },
      { selector: "edge.many", style: { "min-zoomed-font-size": 12, "curve-style": "straight", opacity: 0.75 } },
      ...(/** @type {[string, string, any][]} */ ([
        ["all", "solid", undefined], ["some", "dashed", [9, 4]], ["none", "dotted", undefined],
        ["nodata", "dashed", [2, 7]],
      ])).map(([state, line, pattern]) => ({ selector: `edge.${state}`, style: {
        "line-color": t[state], "target-arrow-color": t[state], "line-style": line,
        ...(pattern === undefined ? {} : { "line-dash-pattern": pattern }),
      } })),
      { selector: "edge.many", style: { "line-style": "solid" } },
      { selector: "edge.refused", style: { "target-arrow-shape": "tee", "target-arrow-color": t.none } },
      // Nobody gets through: that is not to be the palest line of all.
      { selector: "edge.nodata.refused", style: { "line-color": t.none } },
      { selector: ".faded", style: { opacity: 0.12, "text-opacity": 0 } },
      { selector: "node:selected", style: { "underlay-color": t.accent, "underlay-opacity": 0.45, "underlay-padding": 9 } },
      { selector: "edge:selected", style: { "underlay-color": t.accent, "underlay-opacity": 0.4, "underlay-padding": 6, "z-index": 9 } },
    ];
  }
}

/** @param {Vertex} vertex */
function label(vertex) {
  const about = [vertex.mode, vertex.asdex === null || vertex.asdex === undefined ? ""
    : vertex.asdex.toFixed(2)].filter((each) => each !== "").join(" · ");
  const trouble = vertex.local && vertex.state !== "Enrolled" ? vertex.state : "";
  return [visible(vertex.name || vertex.id, MAX_LABEL), about, trouble]
    .filter((each) => each !== "").join("\n");
}

/** @param {Pair} pair @param {number} seconds */
export function edgeLabel(pair, seconds) {
  const lines = [word(stateOf(pair.state), pair.share)];
  if (pair.carried > 0) lines.push(rate(pair.carried, seconds));
  if (pair.refused > 0) lines.push(`✕ ${count(pair.refused)} refused`);
  if (pair.failed > 0) lines.push(`✕ ${count(pair.failed)} failed`);
  return lines.join("\n");
}

/** The colours of the style sheet, in which dark and light are told apart.
 * @returns {Record<string, string>} */
function theme() {
  const found = getComputedStyle(document.documentElement);
  return Object.fromEntries(["text", "muted", "surface", "space", "line", "accent", "vertex", "all",
    "some", "none", "nodata"].map((name) => [name, found.getPropertyValue(`--${name}`).trim()]));
}
