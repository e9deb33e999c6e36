// The panel: all that is known of one vertex, or of the connections from one to another.

import { el, pill } from "./dom.js";
import { bytes, count, duration, moment, percent, plural, rate, visible, words } from "./text.js";
import { MEANING, padlock, stateOf } from "./padlock.js";
import { carried, kindWord } from "./model.js";

/**
 * @typedef {import("./api.js").Edge} Edge
 * @typedef {import("./api.js").Vertex} Vertex
 * @typedef {import("./api.js").Status} Status
 * @typedef {import("./api.js").Pod} Pod
 * @typedef {import("./model.js").Pair} Pair
 * @typedef {import("./dom.js").Child} Child
 */

/** A list of names and values; what has no value is left out.
 * @param {[string, Child | Child[]][]} entries */
export function facts(entries) {
  const found = entries.filter(([, value]) => (Array.isArray(value) ? value.length > 0
    : value !== null && value !== undefined && value !== ""));
  return el("dl", {}, ...found.flatMap(([name, value]) =>
    [el("dt", {}, name), el("dd", {}, ...[value].flat())]));
}

/** @param {string[]} names */
export function lines(names) {
  return names.map((each) => el("div", { class: "name" }, visible(each)));
}

/** @param {Pair} pair @param {Map<string, Vertex>} vertices @param {Status | null} status
 * @param {number} seconds @param {(id: string) => void} go */
export function pairContent(pair, vertices, status, seconds, go) {
  return [
    el("p", { class: "lead" }, padlock(pair.state, pair.share),
      ` ${MEANING[pair.state]}.`),
    el("p", { class: "ends" }, jump(pair.source, vertices, go), " calls ",
      jump(pair.destination, vertices, go)),
    openNow(between(pair, vertices)),
    ...pair.edges.flatMap((edge) => edgeContent(edge, status, seconds)),
  ];
}

/** @param {string} id @param {Map<string, Vertex>} vertices @param {(id: string) => void} go */
function jump(id, vertices, go) {
  const vertex = vertices.get(id);
  if (vertex === undefined) return el("span", { class: "name" }, visible(id));
  return el("button", { type: "button", class: "link name", onclick: () => go(id) }, visible(id));
}

/** The way to the connections that are open now.
 * @param {Record<string, string>} query */
function openNow(query) {
  return el("p", {}, el("a", { href: `#connections?${new URLSearchParams(query)}` }, "Connections open now"));
}

/** Return what the view of connections is to be asked for a pair's. The agent sorts out one side's:
 * the callee's where it is of this node, as that is where it was judged.
 * @param {Pair} pair @param {Map<string, Vertex>} vertices */
function between(pair, vertices) {
  const source = vertices.get(pair.source);
  const destination = vertices.get(pair.destination);
  return {
    ...(destination?.local ? { pod: destination.id, direction: "inbound" }
      : source?.local ? { pod: source.id, direction: "outbound" } : {}),
    from: source?.kind === "workload" ? source.id : "",
    to: destination?.kind === "workload" ? destination.id : "",
  };
}

/** @param {Edge} edge @param {Status | null} status @param {number} seconds @returns {Node[]} */
function edgeContent(edge, status, seconds) {
  const { mutual_tls: mutual, direct, plaintext } = edge.connections;
  const service = edge.service === "" ? "" : `, as ${visible(edge.service)}`;
  return [
    el("h3", {}, `Port ${edge.port}${service}`),
    facts([
      ["Padlock", padlock(stateOf(edge.padlock), edge.protected_share)],
      ["Connections", el("ul", {},
        el("li", {}, `${count(mutual)} mutual TLS`),
        el("li", {}, `${count(direct)} direct: same node, identity known, not encrypted`),
        el("li", {}, `${count(plaintext)} plaintext: no identity, not encrypted by the mesh`))],
      ["Mutual TLS", edge.protected_share === null ? "nothing was let in"
        : percent(edge.protected_share)],
      ["Rate", rate(carried(edge), seconds)],
      ["Refused", edge.refused > 0 ? el("span", { class: "bad" }, `✕ ${count(edge.refused)}`) : "0"],
      ["Failed", edge.failed > 0 ? el("span", { class: "bad" }, `✕ ${count(edge.failed)}`) : "0"],
      ["Why", Object.keys(edge.reasons).length === 0 ? ""
        : el("ul", {}, ...Object.entries(edge.reasons).map(([reason, number]) =>
          el("li", {}, `${words(reason)}: ${count(number)}`)))],
      ["Decided by", edge.policies.length === 0 ? "no policy: nothing says otherwise"
        : lines(edge.policies)],
      ["Caller’s identity", edge.source_identity === "" ? "none proved"
        : lines([edge.source_identity])],
      ["Its certificate", certificate(edge.source_identity, status)],
      ["Callee’s identity", edge.destination_identity === "" ? "none needed"
        : lines([edge.destination_identity])],
      ["Its certificate", certificate(edge.destination_identity, status)],
      ["Bytes", `${bytes(edge.bytes_sent)} sent, ${bytes(edge.bytes_received)} received by the caller`],
      ["From", lines(edge.addresses ?? [])],
      ["First seen", moment(edge.first)],
      ["Last seen", moment(edge.last)],
      ["Counted by", edge.reporter === "destination" ? "the callee’s side" : "the caller’s side"],
    ]),
  ];
}

/** @param {string} identity @param {Status | null} status @returns {Child} */
function certificate(identity, status) {
  if (identity === "" || status === null) return "";
  const pod = status.pods.find((each) => each.identity === identity && each.certificate);
  if (!pod?.certificate) return "held by another node: not known here";
  return certificateLeft(pod.certificate, status.time);
}

/** What is left of a certificate, with a mark.
 * @param {import("./api.js").Certificate | null} found @param {string} now @returns {Child} */
export function certificateLeft(found, now) {
  if (!found?.not_after) return pill("bad", "no certificate");
  const left = (Date.parse(found.not_after) - Date.parse(now)) / 1000;
  if (left <= 0) return pill("bad", "expired");
  const text = `${duration(left)} left`;
  return found.error === "" ? el("span", {}, text)
    : el("span", {}, pill("warn", "renewal fails"), ` ${text}`);
}

/** How well the connections to a workload are protected, and what each point was lost by.
 * @param {import("./api.js").AsdexWorkload | undefined} found @returns {Node[]} */
export function asdexContent(found) {
  if (found === undefined) return [];
  const most = 20;
  const rest = found.losses.slice(most).reduce((sum, each) => sum + each.cost, found.left_out);
  return [
    el("h3", {}, found.score === null ? "ASDEX" : `ASDEX ${found.score.toFixed(2)} of 1.00`),
    found.score === null ? el("p", {}, "No connection to score in this window.")
      : el("p", { class: "lead" }, `of ${plural(found.connections, "connection")} that were let in`),
    el("ul", {}, ...found.losses.slice(0, most).map((each) => el("li", {},
      el("strong", {}, `−${cost(each.cost)} ${words(each.check)}`), `: ${visible(each.reason)}`,
      ` (${plural(each.connections, "connection")})`,
      each.caller !== "" && el("div", { class: "name" }, visible(each.caller)),
      each.policy !== "" && el("div", { class: "name" }, visible(each.policy)))),
    rest > 0 && el("li", {}, `−${cost(rest)} by others: nodeagent report asdex -o json`)),
  ];
}

/** @param {number} part Never "0.00" for what costs something. */
function cost(part) {
  return part < 0.01 ? "less than 0.01" : part.toFixed(2);
}

/** @param {Vertex} vertex @param {Pair[]} pairs @param {Status | null} status
 * @param {import("./api.js").AsdexWorkload | undefined} asdex
 * @param {number} seconds @param {(pair: Pair) => void} go */
export function vertexContent(vertex, pairs, status, asdex, seconds, go) {
  const pod = status?.pods.find((each) => each.workload === vertex.id);
  const callers = pairs.filter((each) => each.destination === vertex.id);
  const callees = pairs.filter((each) => each.source === vertex.id);
  return [
    el("p", { class: "lead" }, kindWord(vertex)),
    facts([
      ["Identities", vertex.identities.length === 0 ? "none" : lines(vertex.identities)],
      ["ASDEX", asdex !== undefined ? "" : typeof vertex.asdex === "number" ? vertex.asdex.toFixed(2)
        : "no data"],
      ["Mode", vertex.mode === "" ? "not judged by this node" : vertex.mode],
    ]),
    ...(vertex.kind === "workload" ? [openNow(vertex.local ? { pod: vertex.id } : { of: vertex.id })] : []),
    ...asdexContent(asdex),
    ...(pod && status ? podContent(pod, status) : []),
    ...list("Called by", callers, (each) => each.source, seconds, go),
    ...list("Calls", callees, (each) => each.destination, seconds, go),
  ];
}

/** @param {string} title @param {Pair[]} pairs @param {(pair: Pair) => string} name
 * @param {number} seconds @param {(pair: Pair) => void} go @returns {Node[]} */
function list(title, pairs, name, seconds, go) {
  const most = 50;
  return [
    el("h3", {}, `${title} (${count(pairs.length)})`),
    pairs.length === 0 ? el("p", {}, "nobody in this window")
      : el("ul", { class: "pairs" }, ...pairs.slice(0, most).map((pair) => el("li", {},
        padlock(pair.state, pair.share), " ",
        el("button", { type: "button", class: "link name", onclick: () => go(pair) },
          visible(name(pair))),
        ` ${rate(pair.carried, seconds)}`,
        pair.refused > 0 && el("span", { class: "bad" }, ` ✕ ${count(pair.refused)} refused`),
        pair.failed > 0 && el("span", { class: "bad" }, ` ✕ ${count(pair.failed)} failed`))),
      pairs.length > most && el("li", {}, `and ${count(pairs.length - most)} more: see the table`)),
  ];
}

/** What this node knows of its own workload.
 * @param {Pod} pod @param {Status} status @returns {Node[]} */
export function podContent(pod, status) {
  const drops = Object.entries(pod.drops).filter(([, number]) => number > 0);
  return [
    el("h3", {}, "On this node"),
    facts([
      ["State", [pill(pod.state === "Enrolled" ? "good" : "bad", pod.state), ` since ${moment(pod.since)}`]],
      ["Why", pod.error === "" ? "" : visible(pod.error)],
      ["Mode", pod.mode === "" ? "not known" : `${visible(pod.mode)}`],
      ["Said by", pod.mode_origin === "" ? "" : visible(pod.mode_origin)],
      ["Ports apart", lines(pod.port_modes.map((each) => `${each.port}: ${each.mode}, ${each.origin}`))],
      ["Identity", lines([pod.identity])],
      ["Certificate", certificateLeft(pod.certificate, status.time)],
      ["Valid until", pod.certificate?.not_after ? moment(pod.certificate.not_after) : ""],
      ["Renewed", pod.certificate ? plural(pod.certificate.renewals, "time") : ""],
      ["Last failure", pod.certificate?.error ? visible(pod.certificate.error) : ""],
      ["Who may call", lines(pod.authorizations.map((each) =>
        `${each.action} ${each.policy}${each.dry_run ? " (dry run)" : ""}`))],
      ["Addresses", lines(pod.addresses)],
      ["Network namespace", lines([pod.netns])],
      ["Capture", capture(pod)],
      ["Dropped by it", drops.length === 0 ? "" : el("ul", {}, ...drops.map(([reason, number]) =>
        el("li", {}, `${words(reason)}: ${count(number)}`)))],
    ]),
  ];
}

/** The capture of a pod in a few words.
 * @param {Pod} pod @returns {Child} */
export function capture(pod) {
  if (pod.state === "Waiting" || pod.state === "Failed") return pill("bad", "not captured");
  if (pod.deviations.length > 0) return pill("bad", `wrong: ${pod.deviations.map((each) => visible(each)).join(", ")}`);
  const repaired = pod.repaired > 0 ? `, ${plural(pod.repaired, "repair")}` : "";
  return `${pod.state === "Enrolled" ? "as it must be" : "being changed"}${repaired}`;
}
