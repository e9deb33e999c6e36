// From what the agent says to what is shown: values only, no elements.

import { stateOf } from "./padlock.js";

/**
 * @typedef {import("./api.js").Edge} Edge
 * @typedef {import("./api.js").Vertex} Vertex
 * @typedef {import("./api.js").Graph} Graph
 * @typedef {import("./padlock.js").State} State
 * @typedef {{id: string, source: string, destination: string, edges: Edge[], carried: number,
 *   mutual: number, refused: number, failed: number, state: State, share: number | null}} Pair
 */

/** @param {Edge} edge */
export function carried(edge) {
  return edge.connections.mutual_tls + edge.connections.direct + edge.connections.plaintext;
}

/** @param {Edge} edge */
export function edgeId(edge) {
  return JSON.stringify([edge.source, edge.destination, edge.port]);
}

/** @param {string} source @param {string} destination */
export function pairId(source, destination) {
  return JSON.stringify([source, destination]);
}

/** Return the edges joined by who calls whom: what is drawn as one line.
 * @param {Edge[]} edges @returns {Pair[]} */
export function pairs(edges) {
  /** @type {Map<string, Pair>} */
  const found = new Map();
  for (const edge of edges) {
    const id = pairId(edge.source, edge.destination);
    let pair = found.get(id);
    if (pair === undefined) {
      pair = {
        id, source: edge.source, destination: edge.destination, edges: [], carried: 0, mutual: 0,
        refused: 0, failed: 0, state: "no data", share: null,
      };
      found.set(id, pair);
    }
    pair.edges.push(edge);
    pair.carried += carried(edge);
    pair.mutual += edge.connections.mutual_tls;
    pair.refused += edge.refused;
    pair.failed += edge.failed;
  }
  for (const pair of found.values()) {
    pair.state = together(pair.edges.map((each) => stateOf(each.padlock)));
    pair.share = pair.carried > 0 ? pair.mutual / pair.carried : null;
  }
  return [...found.values()];
}

/** Return the state of several lines together; those without data have no say.
 * @param {State[]} states @returns {State} */
export function together(states) {
  const telling = new Set(states.filter((each) => each !== "no data"));
  if (telling.size === 0) return "no data";
  return telling.size === 1 ? [...telling][0] : "some";
}

/** Return how many pairs have each state.
 * @param {Pair[]} found @returns {Record<State, number>} */
export function byState(found) {
  /** @type {Record<State, number>} */
  const counts = { all: 0, some: 0, none: 0, "no data": 0 };
  for (const pair of found) counts[pair.state] += 1;
  return counts;
}

/** Words that stand for what has no namespace and name.
 * @param {Vertex} vertex */
export function kindWord(vertex) {
  switch (vertex.kind) {
    case "workload": return vertex.local ? "workload of this node" : "workload of another node";
    case "node": return "processes of the node itself";
    case "outside": return "not of the mesh";
    default: return "not known one by one";
  }
}

/** Return the edges of which everything that is asked for is true.
 * @param {Edge[]} edges @param {{text: string, state: string, namespace: string}} wanted
 * @param {Map<string, Vertex>} vertices */
export function filtered(edges, wanted, vertices) {
  const text = wanted.text.trim().toLowerCase();
  return edges.filter((edge) => {
    if (wanted.state === "refused" && edge.refused === 0) return false;
    if (wanted.state === "failed" && edge.failed === 0) return false;
    if (!["", "refused", "failed"].includes(wanted.state) && stateOf(edge.padlock) !== wanted.state)
      return false;
    if (wanted.namespace !== "" && ![edge.source, edge.destination].some(
      (id) => vertices.get(id)?.namespace === wanted.namespace)) return false;
    return text === "" || [
      edge.source, edge.destination, edge.service, edge.source_identity, edge.destination_identity,
      String(edge.port), ...edge.policies, ...Object.keys(edge.reasons),
    ].some((each) => each.toLowerCase().includes(text));
  });
}
