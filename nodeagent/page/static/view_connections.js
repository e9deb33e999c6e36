// The view of connections: what is open now, between whom, how it is protected, who let it in.

import { el, fill, notice, pill } from "./dom.js";
import { facts, lines } from "./panel.js";
import { icon, token } from "./padlock.js";
import { Table } from "./table.js";
import { bytes, count, duration, moment, plural, shortIdentity, visible, words } from "./text.js";

/**
 * @typedef {import("./api.js").Connection} Connection
 * @typedef {import("./api.js").Snapshot} Snapshot
 * @typedef {import("./graph.js").Choice} Choice
 * @typedef {import("./padlock.js").State} State
 * @typedef {{received: number, sent: number}} Rate Bytes per second.
 */

/** Connections that are asked for, the newest: more is for the command, and 2 MB of answer. */
const MOST = 1000;

/** Connections above which the agent is asked less often: to list each takes it some 8 µs. */
const MANY = 5000;

/** How bytes travel: the padlock that this counts as, its words and what they mean.
 * @type {Record<string, {lock: State | null, word: string, text: string}>} */
const WAYS = {
  mutual_tls: { lock: "all", word: "mTLS", text: "encrypted, and both sides have proved who they are" },
  direct: { lock: "none", word: "same node, not encrypted", text: "both identities are known, and it never leaves this node" },
  plaintext: { lock: "none", word: "plaintext", text: "not encrypted by the mesh, and the caller has proved no identity" },
  passthrough: { lock: null, word: "outside the mesh", text: "to an address that is no workload: as the application sends it" },
  undecided: { lock: null, word: "undecided", text: "not yet decided" },
};

/** @param {Connection} each */
function wayOf(each) {
  return Object.hasOwn(WAYS, each.security) ? WAYS[each.security]
    : { lock: null, word: words(each.security), text: "" };
}

/** @param {Connection} each */
function way(each) {
  const { lock, word } = wayOf(each);
  return lock === null ? pill("idle", word)
    : el("span", { class: "padlock folds", "data-state": token(lock) }, icon(lock), el("span", {}, word));
}

/** Who that is: the workload, else the identity, else the address without its port.
 * @param {string} workload @param {string} identity @param {string} address */
function end(workload, identity, address) {
  return visible(workload || identity.replace(/^spiffe:\/\//, "") || address.replace(/:\d+$/, ""));
}

/** @param {Connection} each */
function caller(each) {
  return end(each.source_workload, each.source_identity, each.source);
}

/** @param {Connection} each */
function callee(each) {
  const port = /:\d+$/.exec(each.destination)?.[0] ?? "";
  return end(each.destination_workload, each.destination_identity, each.destination) + port;
}

/** @param {Connection} each */
function policy(each) {
  return each.policy !== "" ? visible(each.policy)
    : each.direction === "outbound" ? "judged at the callee" : "none";
}

export class ConnectionsView {
  /** @param {(choice: Choice | null, from: HTMLElement | null) => void} choose */
  constructor(choose) {
    this.title = "Connections";
    /** It shows now, and no window. */
    this.seconds = 0;
    /** What the address asks for. */
    this.query = new URLSearchParams();
    /** @type {Snapshot | null} */
    this.answer = null;
    this.trustDomain = "";
    /** By connection, of those that the last two answers have both. @type {Map<string, Rate>} */
    this.rates = new Map();
    this.choice = "";
    this.wanted = "";
    this.summary = el("p", { class: "summary", id: "summary" });
    this.notices = el("div");
    this.search = /** @type {HTMLInputElement} */ (el("input", {
      type: "search", id: "search", placeholder: "name, identity, address, policy, cipher",
      oninput: () => {
        this.wanted = this.search.value.trim().toLowerCase();
        this.#render();
      },
    }));
    this.ways = /** @type {HTMLSelectElement} */ (el("select", { id: "way", onchange: () => this.#render() },
      el("option", { value: "" }, "all"),
      ...Object.entries(WAYS).map(([name, { word }]) => el("option", { value: name }, word))));
    this.table = this.#table(choose);
    this.element = el("section", { "aria-labelledby": "connections-title" },
      el("h1", { id: "connections-title" }, "Connections open now"),
      this.summary, this.notices,
      el("div", { class: "filters", role: "group", "aria-label": "Filters" },
        el("label", {}, "How", this.ways),
        el("label", { class: "grow" }, "Find", this.search)),
      this.table.element);
  }

  /** Whether each answer takes the node so long that it is to be asked less often. */
  get heavy() {
    return this.answer !== null && this.answer.total > MANY;
  }

  /** Take what the address asks for: `pod` and `direction` are the agent's to sort out, `from` and
   * `to` this page's; empty they mean who is no workload.
   * @param {URLSearchParams} query */
  narrow(query) {
    this.query = query;
    this.#render();
  }

  asks() {
    const query = new URLSearchParams({ limit: String(MOST) });
    for (const name of ["pod", "direction"]) {
      const value = this.query.get(name);
      if (value !== null) query.set(name, value);
    }
    return { connections: `/connections?${query}` };
  }

  /** @param {import("./api.js").Answers} answers */
  update({ status, connections }) {
    this.trustDomain = status?.trust_domain ?? "";
    if (connections !== undefined && connections !== this.answer) {
      this.rates = rates(this.answer, connections);
      this.answer = connections;
    }
    this.#render();
  }

  /** @param {Choice | null} choice */
  mark(choice) {
    this.choice = choice?.kind === "connection" ? choice.id : "";
    this.#render();
  }

  #render() {
    const { answer } = this;
    if (answer === null) return;
    const found = answer.connections.filter((each) => this.#admits(each));
    const kinds = Object.entries(WAYS).map(([name, { word }]) =>
      [found.filter((each) => each.security === name).length, word]).filter(([number]) => number !== 0);
    fill(this.summary, `${plural(found.length, "connection")}${this.#between()}`,
      kinds.length > 0 && `: ${kinds.map(([number, word]) => `${count(Number(number))} ${word}`).join(", ")}`,
      ". ", this.query.size > 0 && el("a", { href: "#connections" }, "Show all of this node"));
    fill(this.notices,
      answer.total > answer.connections.length && notice("warn", `${count(answer.total)} are open: of these `
        + `only the ${count(answer.connections.length)} newest were looked at. `
        + "Come here from a workload, or use nodeagent connections."),
      answer.missed > 0 && notice("warn", `${plural(answer.missed, "connection")} found no room in the `
        + "snapshot and may be missing here."));
    this.table.update(found.filter((each) => (this.ways.value === "" || each.security === this.ways.value)
      && Object.values(each).some((value) => String(value).toLowerCase().includes(this.wanted))), this.choice);
  }

  /** @param {Connection} each */
  #admits(each) {
    return [...this.query].every(([name, value]) => {
      switch (name) {
        case "pod": return each.pod === value;
        case "direction": return each.direction === value;
        case "from": return each.source_workload === value;
        case "to": return each.destination_workload === value;
        case "of": return [each.source_workload, each.destination_workload].includes(value);
        default: return true;
      }
    });
  }

  /** The filter of the address in words. */
  #between() {
    const parts = /** @type {[string, string][]} */ ([
      ["of", "of"], ["pod", "of"], ["from", "from"], ["to", "to"],
    ]).flatMap(([name, word]) => {
      const value = this.query.get(name);
      // Both ends tell it already.
      if (value === null || (name === "pod" && this.query.has("from"))) return [];
      return [` ${word} ${value === "" ? "who is no workload" : visible(value)}`];
    });
    return parts.length === 0 ? " of this node" : parts.join("");
  }

  /** An identity that breaks at its slashes first. @param {string} identity */
  #identity(identity) {
    if (identity === "") return ["none proved"];
    return shortIdentity(identity, this.trustDomain).split(/(?<=\/)/)
      .flatMap((part, at) => (at === 0 ? [part] : [el("wbr"), part]));
  }

  /** @param {(choice: Choice | null, from: HTMLElement | null) => void} choose */
  #table(choose) {
    /** @param {Connection} each */
    const perSecond = (each) => {
      const found = this.rates.get(each.id);
      return found === undefined ? -1 : found.received + found.sent;
    };
    /** @type {Table<Connection>} */
    const made = new Table({
      caption: "Connections open now",
      empty: "No connection is open that fits.",
      id: (each) => each.id,
      open: (each, from) => choose({ kind: "connection", id: each.id }, from),
      columns: [
        { title: "Caller", sort: caller, cell: caller },
        {
          title: "Caller’s identity", sort: (each) => each.source_identity, kind: "identity",
          cell: (each) => this.#identity(each.source_identity),
        },
        { title: "Callee", sort: callee, cell: callee },
        {
          title: "Callee’s identity", sort: (each) => each.destination_identity, kind: "identity",
          cell: (each) => this.#identity(each.destination_identity),
        },
        {
          title: "How", sort: (each) => Object.keys(WAYS).indexOf(each.security),
          cell: (each) => [way(each), each.state !== "open" && [" ", pill("idle", words(each.state))],
            each.cipher !== "" && el("div", { class: "hint" }, visible(each.cipher)),
            each.key_exchange !== "" && el("div", { class: "hint" }, visible(each.key_exchange))].flat(),
        },
        { title: "Policy", sort: policy, cell: policy },
        {
          title: "Bytes", numeric: true, first: "desc", sort: (each) => each.received + each.sent,
          cell: (each) => bytes(each.received + each.sent),
        },
        {
          title: "Rate", numeric: true, first: "desc", sort: perSecond,
          cell: (each) => (this.rates.has(each.id) ? `${bytes(perSecond(each))}/s` : "–"),
        },
        {
          title: "Age", numeric: true, sort: (each) => -Date.parse(each.started),
          cell: (each) => since(each.started, this.answer),
        },
        {
          title: "Seen at", sort: (each) => each.direction,
          cell: (each) => (each.direction === "outbound" ? "caller" : "callee"),
        },
      ],
      sorted: 8,
    });
    return made;
  }
}

/** @param {string} moment @param {Snapshot | null} answer */
function since(moment, answer) {
  return duration((Date.parse(answer?.time ?? "") - Date.parse(moment)) / 1000);
}

/** Bytes per second between two answers.
 * @param {Snapshot | null} before @param {Snapshot} now @returns {Map<string, Rate>} */
function rates(before, now) {
  const seconds = (Date.parse(now.time) - Date.parse(before?.time ?? "")) / 1000;
  if (before === null || !(seconds > 0)) return new Map();
  const known = new Map(before.connections.map((each) => [each.id, each]));
  return new Map(now.connections.flatMap((each) => {
    const earlier = known.get(each.id);
    return earlier === undefined ? [] : [[each.id, {
      received: (each.received - earlier.received) / seconds,
      sent: (each.sent - earlier.sent) / seconds,
    }]];
  }));
}

/** What the panel tells of one connection.
 * @param {Connection} each @param {Rate | undefined} rate @param {Snapshot} answer
 * @returns {Node[]} */
export function connectionContent(each, rate, answer) {
  /** @param {number} total @param {number | undefined} perSecond */
  const carried = (total, perSecond) => bytes(total)
    + (perSecond === undefined ? "" : `, now ${bytes(perSecond)}/s`);
  return [
    el("p", { class: "lead" }, way(each), ` ${wayOf(each).text}.`),
    facts([
      ["State", words(each.state)],
      ["Caller", lines([each.source_workload || "no workload"])],
      ["Its identity", lines([each.source_identity || "none proved"])],
      ["Its address", lines([each.source])],
      ["Callee", lines([each.destination_workload || "no workload"])],
      ["Its identity", lines([each.destination_identity || "none proved"])],
      ["Its address", lines([each.destination])],
      ["Called as", each.service === "" ? "" : lines([each.service])],
      ["HBONE at", each.hbone === "" ? "" : lines([each.hbone])],
      ["TLS", visible(each.tls_version)],
      ["Cipher", visible(each.cipher)],
      ["Key exchange", visible(each.key_exchange)],
      ["Decided by", lines([policy(each)])],
      ["Rule", each.rule === "" ? "" : lines([each.rule])],
      ["From caller", carried(each.received, rate?.received)],
      ["To caller", carried(each.sent, rate?.sent)],
      ["Began", `${moment(each.started)}, ${since(each.started, answer)} ago`],
      ["Last bytes", each.moved === null ? "none yet" : `${since(each.moved, answer)} ago`],
      ["Seen at", each.direction === "outbound" ? "the caller’s side" : "the callee’s side"],
      ["ID", lines([each.id])],
    ]),
  ];
}
