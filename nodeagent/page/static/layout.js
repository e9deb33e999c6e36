// Where vertices stand: namespaces are blocks, callers left of who they call, both inside a block
// and among blocks. Values only; linear in vertices and edges but for sorting, so that 500 workloads
// cost milliseconds. What has a place keeps it for as long as the page is open.

/**
 * @typedef {{id: string, namespace: string}} Spot
 * @typedef {{x: number, y: number}} Place
 * @typedef {{source: string, destination: string}} Line
 */

/** Pixels from one vertex to the next at zoom 1: a label below, a padlock with its word between. */
const COLUMN = 210;
const ROW = 128;

/** Pixels between blocks, for their borders and headings. */
const GAP = 120;

/** Rows of a column before the next one beside it is begun, at least. */
const MIN_ROWS = 4;

/** Width to height that the whole should have: a screen's. */
const ASPECT = 1.8;

/** Return a rank for every id: one more than the highest of those that call it, as far as there is
 * no circle; who closes a circle is ignored.
 * @param {string[]} ids @param {Line[]} lines @returns {Map<string, number>} */
export function ranks(ids, lines) {
  const known = new Set(ids);
  /** @type {Map<string, string[]>} */
  const callees = new Map(ids.map((id) => [id, []]));
  const callers = new Map(ids.map((id) => [id, 0]));
  for (const { source, destination } of lines) {
    if (source === destination || !known.has(source) || !known.has(destination)) continue;
    callees.get(source)?.push(destination);
    callers.set(destination, (callers.get(destination) ?? 0) + 1);
  }
  // Depth first from those that nobody calls; an edge back to an open one closes a circle.
  /** @type {Map<string, "open" | "done">} */
  const seen = new Map();
  /** @type {string[]} */
  const finished = [];
  /** @type {Set<string>} */
  const back = new Set();
  const key = (/** @type {string} */ a, /** @type {string} */ b) => JSON.stringify([a, b]);
  const starts = [...ids].sort((a, b) => (callers.get(a) ?? 0) - (callers.get(b) ?? 0)
    || (a < b ? -1 : 1));
  for (const start of starts) {
    if (seen.has(start)) continue;
    seen.set(start, "open");
    const stack = [{ id: start, next: 0 }];
    while (stack.length > 0) {
      const top = stack[stack.length - 1];
      const callee = callees.get(top.id)?.[top.next];
      top.next += 1;
      if (callee === undefined) {
        seen.set(top.id, "done");
        finished.push(top.id);
        stack.pop();
      } else if (seen.get(callee) === "open") {
        back.add(key(top.id, callee));
      } else if (!seen.has(callee)) {
        seen.set(callee, "open");
        stack.push({ id: callee, next: 0 });
      }
    }
  }
  const found = new Map(ids.map((id) => [id, 0]));
  for (const id of finished.reverse()) {
    for (const callee of callees.get(id) ?? []) {
      if (back.has(key(id, callee))) continue;
      found.set(callee, Math.max(found.get(callee) ?? 0, (found.get(id) ?? 0) + 1));
    }
  }
  return found;
}

/** Return columns of ids by rank, those of one caller near each other, none higher than `rows`.
 * @param {string[]} ids @param {Line[]} lines @param {number} rows @returns {string[][]} */
function columns(ids, lines, rows) {
  const rank = ranks(ids, lines);
  /** @type {string[][]} */
  const byRank = [];
  for (const id of [...ids].sort()) (byRank[rank.get(id) ?? 0] ??= []).push(id);
  /** @type {Map<string, number>} */
  const height = new Map();
  /** @type {Map<string, string[]>} */
  const callers = new Map();
  for (const { source, destination } of lines) {
    if (!callers.has(destination)) callers.set(destination, []);
    callers.get(destination)?.push(source);
  }
  const found = [];
  for (const column of byRank.filter((each) => each !== undefined)) {
    const weight = new Map(column.map((id, at) => {
      const heights = (callers.get(id) ?? []).map((each) => height.get(each))
        .filter((each) => each !== undefined);
      const sum = heights.reduce((a, b) => a + b, 0);
      return [id, heights.length > 0 ? sum / heights.length : at / column.length];
    }));
    column.sort((a, b) => (weight.get(a) ?? 0) - (weight.get(b) ?? 0) || (a < b ? -1 : 1));
    column.forEach((id, at) => height.set(id, (at + 0.5) / column.length));
    for (let from = 0; from < column.length; from += rows) found.push(column.slice(from, from + rows));
  }
  return found;
}

/** Return the columns, or the same in few full ones if a long chain has made them a thread.
 * @param {string[][]} cells @param {number} rows */
function wrapped(cells, rows) {
  if (cells.length <= rows) return cells;
  const flat = cells.flat();
  const found = [];
  for (let from = 0; from < flat.length; from += rows) found.push(flat.slice(from, from + rows));
  return found;
}

/** @param {Spot} vertex Who has no namespace stands alone. */
function blockOf(vertex) {
  return vertex.namespace === "" ? `\0${vertex.id}` : vertex.namespace;
}

/** Return a place for every vertex.
 * @param {Spot[]} vertices @param {Line[]} lines @returns {Map<string, Place>} */
export function arrange(vertices, lines) {
  /** @type {Map<string, string[]>} */
  const members = new Map();
  /** @type {Map<string, string>} */
  const block = new Map();
  for (const vertex of vertices) {
    const name = blockOf(vertex);
    block.set(vertex.id, name);
    if (!members.has(name)) members.set(name, []);
    members.get(name)?.push(vertex.id);
  }
  /** @type {Map<string, Line[]>} */
  const within = new Map([...members.keys()].map((name) => [name, []]));
  /** @type {Line[]} */
  const between = [];
  for (const line of lines) {
    const source = block.get(line.source);
    const destination = block.get(line.destination);
    if (source === undefined || destination === undefined) continue;
    if (source === destination) within.get(source)?.push(line);
    else between.push({ source, destination });
  }
  /** @type {Map<string, {cells: string[][], width: number, height: number}>} */
  const blocks = new Map();
  let area = 0;
  for (const [name, ids] of members) {
    const rows = Math.max(MIN_ROWS, Math.ceil(Math.sqrt(ids.length * COLUMN / ROW / ASPECT)));
    const cells = wrapped(columns(ids, within.get(name) ?? [], rows), rows);
    const width = cells.length * COLUMN;
    const height = Math.max(...cells.map((each) => each.length)) * ROW;
    blocks.set(name, { cells, width, height });
    area += (width + GAP) * (height + GAP);
  }
  const most = Math.sqrt(area / ASPECT);
  let found = columns([...blocks.keys()], between, Infinity)
    .flatMap((rank) => stacks(rank, blocks, most));
  const widths = found.map((stack) =>
    Math.max(...stack.map((name) => blocks.get(name)?.width ?? 0)) + GAP);
  // A long chain of namespaces would be a thread: stacked in reading order it is a page.
  if (widths.reduce((a, b) => a + b, 0) > 2 * ASPECT * most)
    found = stacks(found.flat(), blocks, most);
  /** @type {Map<string, Place>} */
  const places = new Map();
  let left = 0;
  for (const stack of found) {
    const total = stack.reduce((sum, name) => sum + (blocks.get(name)?.height ?? 0) + GAP, -GAP);
    const width = Math.max(...stack.map((name) => blocks.get(name)?.width ?? 0));
    let top = -total / 2;
    for (const name of stack) {
      const { cells, height, width: own } = /** @type {any} */ (blocks.get(name));
      cells.forEach((/** @type {string[]} */ column, /** @type {number} */ at) => {
        const first = top + (height - column.length * ROW) / 2;
        column.forEach((id, row) => places.set(id, {
          x: left + (width - own) / 2 + (at + 0.5) * COLUMN,
          y: first + (row + 0.5) * ROW,
        }));
      });
      top += height + GAP;
    }
    left += width + GAP;
  }
  return places;
}

/** Split the blocks of one rank into stacks that are not much higher than `most`.
 * @param {string[]} names @param {Map<string, {height: number}>} blocks @param {number} most */
function stacks(names, blocks, most) {
  /** @type {string[][]} */
  const found = [[]];
  let height = 0;
  for (const name of names) {
    const own = (blocks.get(name)?.height ?? 0) + GAP;
    if (height > 0 && height + own > most + GAP) {
      found.push([]);
      height = 0;
    }
    found[found.length - 1].push(name);
    height += own;
  }
  return found;
}

/** Pixels that a line keeps from a vertex which it does not touch, and from the words below it. */
const CLEAR = 34;
const WORDS = { below: 42, clear: 30 };

/** How far the middle of a line may be drawn aside, the least first. */
const BENDS = [0, 60, -60, 110, -110, 170, -170, 240, -240];

/** Lines between the same two vertices in both directions keep so far apart. */
const BOTH_WAYS = 34;

/** Pixels from the middle of a line, where its padlock and words are, to that of another. */
const APART = 54;

/** Points of a curve at which it is looked whether something is in its way. */
const STEPS = 12;

/** Return how far to draw each line's middle aside, so that it passes by the vertices between and
 * padlocks do not cover each other. Positive is to the right of who looks along it.
 * @param {Line[]} lines @param {Map<string, Place>} places @returns {Map<Line, number>} */
export function bends(lines, places) {
  const known = new Set(lines.map((line) => JSON.stringify([line.source, line.destination])));
  /** @type {Place[]} */
  const middles = [];
  return new Map(lines.map((line) => {
    const from = places.get(line.source);
    const to = places.get(line.destination);
    if (from === undefined || to === undefined || from === to) return [line, 0];
    const others = [...places].filter(([id]) => id !== line.source && id !== line.destination)
      .map(([, place]) => place);
    const both = known.has(JSON.stringify([line.destination, line.source])) ? BOTH_WAYS : 0;
    let found = both;
    let least = Infinity;
    for (const aside of BENDS) {
      const cost = inTheWay(from, to, aside + both, others, middles);
      if (cost < least) [found, least] = [aside + both, cost];
      if (cost === 0) break;
    }
    middles.push(along(from, to, found, 0.5));
    return [line, found];
  }));
}

/** Return the point at `t`, 0 to 1, of a curve whose control point lies `aside` of its middle.
 * @param {Place} from @param {Place} to @param {number} aside @param {number} t */
function along(from, to, aside, t) {
  const length = Math.hypot(to.x - from.x, to.y - from.y) || 1;
  const out = 2 * t * (1 - t) * aside / length;
  return {
    x: from.x + (to.x - from.x) * t - (to.y - from.y) * out,
    y: from.y + (to.y - from.y) * t + (to.x - from.x) * out,
  };
}

/** Return how much a curve meets that it should not; a vertex weighs more than a padlock.
 * @param {Place} from @param {Place} to @param {number} aside @param {Place[]} others
 * @param {Place[]} middles */
function inTheWay(from, to, aside, others, middles) {
  let cost = 0;
  for (let step = 1; step < STEPS; step += 1) {
    const { x, y } = along(from, to, aside, step / STEPS);
    for (const each of others) {
      if (Math.hypot(each.x - x, each.y - y) < CLEAR) cost += 4;
      else if (Math.hypot(each.x - x, each.y + WORDS.below - y) < WORDS.clear) cost += 2;
    }
  }
  const middle = along(from, to, aside, 0.5);
  for (const each of middles)
    if (Math.hypot(each.x - middle.x, each.y - middle.y) < APART) cost += 3;
  return cost;
}

/** Places over time: new vertices find one, and nobody else moves for them if that can be.
 */
export class Places {
  constructor() {
    /** @type {Map<string, Place>} */
    this.known = new Map();
  }

  /** Return whether everything was placed anew.
   * @param {Spot[]} vertices @param {Line[]} lines */
  update(vertices, lines) {
    const fresh = vertices.filter((each) => !this.known.has(each.id));
    if (fresh.length === 0) return false;
    const old = vertices.length - fresh.length;
    if (old > fresh.length && fresh.every((each) => this.#squeeze(each, vertices))) return false;
    this.known = arrange(vertices, lines);
    return true;
  }

  /** Find room below the block of a vertex. False if there is none.
   * @param {Spot} vertex @param {Spot[]} vertices */
  #squeeze(vertex, vertices) {
    const name = blockOf(vertex);
    const mates = vertices.filter((each) => blockOf(each) === name && this.known.has(each.id))
      .map((each) => /** @type {Place} */ (this.known.get(each.id)));
    if (mates.length === 0) return false;
    const place = {
      x: Math.min(...mates.map((each) => each.x)),
      y: Math.max(...mates.map((each) => each.y)) + ROW,
    };
    const right = Math.max(...mates.map((each) => each.x));
    for (const [id, other] of this.known) {
      const foreign = vertices.find((each) => each.id === id);
      if (foreign === undefined || blockOf(foreign) === name) continue;
      if (other.x > place.x - COLUMN && other.x < right + COLUMN
        && Math.abs(other.y - place.y) < ROW * 1.5) return false;
    }
    this.known.set(vertex.id, place);
    return true;
  }
}
