// The four states of a padlock: word, shape and colour, for elements and for the canvas. All comes
// from traffic that was seen, nothing from what is configured.

import { svg, el } from "./dom.js";
import { percent } from "./text.js";

/** @typedef {"all" | "some" | "none" | "no data"} State */

/** @type {State[]} From the best to the one that says nothing. */
export const STATES = ["all", "some", "none", "no data"];

/** @type {Record<State, string>} */
export const MEANING = {
  all: "every connection was mutual TLS",
  some: "not every connection was mutual TLS",
  none: "there was traffic, and none of it was mutual TLS",
  "no data": "no connection was let in",
};

/** @type {Record<State, string>} */
const TOKEN = { all: "all", some: "some", none: "none", "no data": "nodata" };

// In a box of 24: closed and full; closed and half full; open; a dashed ring without a lock.
const CLOSED = "M8 11V8a4 4 0 0 1 8 0v3";
const OPEN = "M8 11V7a4 4 0 0 1 7.7-1.5";
const BODY = "M6 11h12a1.5 1.5 0 0 1 1.5 1.5v7A1.5 1.5 0 0 1 18 21H6a1.5 1.5 0 0 1-1.5-1.5v-7A1.5 1.5 0 0 1 6 11z";
const HALF = "M12 11h6a1.5 1.5 0 0 1 1.5 1.5v7A1.5 1.5 0 0 1 18 21h-6z";
const RING = "M12 4a8.5 8.5 0 1 0 .01 0z";
const DASH = "M8.5 12.5h7";

/** @type {Record<State, {fills: string[], strokes: string[], dashed?: string[]}>} */
const SHAPES = {
  all: { fills: [BODY], strokes: [CLOSED, BODY] },
  some: { fills: [HALF], strokes: [CLOSED, BODY] },
  none: { fills: [], strokes: [OPEN, BODY] },
  "no data": { fills: [], strokes: [DASH], dashed: [RING] },
};

/** @param {string} name @returns {State} What another release may call otherwise says nothing. */
export function stateOf(name) {
  return STATES.find((each) => each === name) ?? "no data";
}

/** @param {State} state */
export function token(state) {
  return TOKEN[state];
}

/** Return the drawing alone, for beside its word.
 * @param {State} state */
export function icon(state) {
  const shape = SHAPES[state];
  return svg("svg", { viewBox: "0 0 24 24", class: "lock", "aria-hidden": "true" },
    ...shape.fills.map((d) => svg("path", { d, class: "full" })),
    ...shape.strokes.map((d) => svg("path", { d })),
    ...(shape.dashed ?? []).map((d) => svg("path", { d, "stroke-dasharray": "3 3" })));
}

/** The word of a state; with its share where that says more: "some, 99.6 %".
 * @param {State} state @param {number | null} share */
export function word(state, share) {
  return state === "some" && share !== null ? `some, ${percent(share)}` : state;
}

/** Return drawing and word.
 * @param {State} state @param {number | null} [share] */
export function padlock(state, share = null) {
  return el("span", { class: "padlock", "data-state": token(state), title: MEANING[state] },
    icon(state), el("span", {}, word(state, share)));
}

/** @type {Record<State, {fills: Path2D[], strokes: Path2D[], dashed: Path2D[]}> | null} */
let paths = null;

/** Draw a state on a canvas, `size` pixels wide with its middle at x, y.
 * @param {CanvasRenderingContext2D} canvas @param {State} state @param {number} x
 * @param {number} y @param {number} size @param {{ink: string, ground: string}} colours */
export function draw(canvas, state, x, y, size, colours) {
  paths ??= /** @type {any} */ (Object.fromEntries(STATES.map((each) => [each, {
    fills: SHAPES[each].fills.map((d) => new Path2D(d)),
    strokes: SHAPES[each].strokes.map((d) => new Path2D(d)),
    dashed: (SHAPES[each].dashed ?? []).map((d) => new Path2D(d)),
  }])));
  const shape = /** @type {NonNullable<typeof paths>} */ (paths)[state];
  canvas.save();
  canvas.translate(x, y);
  canvas.beginPath();
  canvas.arc(0, 0, size * 0.72, 0, 2 * Math.PI);
  canvas.fillStyle = colours.ground;
  canvas.fill();
  canvas.scale(size / 24, size / 24);
  canvas.translate(-12, -12.5);
  canvas.fillStyle = canvas.strokeStyle = colours.ink;
  canvas.lineWidth = 2.2;
  canvas.lineCap = canvas.lineJoin = "round";
  for (const path of shape.fills) canvas.fill(path);
  for (const path of shape.strokes) canvas.stroke(path);
  canvas.setLineDash([3, 3]);
  for (const path of shape.dashed) canvas.stroke(path);
  canvas.restore();
}
