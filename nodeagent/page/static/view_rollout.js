// The view of the rollout to STRICT: who still calls without an identity, and would be refused.

import { el, fill, notice, pill } from "./dom.js";
import { Table } from "./table.js";
import { count, moment, plural, visible } from "./text.js";

/**
 * @typedef {import("./api.js").Plaintext} Plaintext
 * @typedef {import("./api.js").PlaintextWorkload} Workload
 * @typedef {import("./api.js").PlaintextCaller} Caller
 * @typedef {import("./graph.js").Choice} Choice
 */

/** Gaps that are named: the report of the command has all. */
const SHOWN_GAPS = 3;

/** Where a workload stands on the way, from done to unknown: its words, tone and meaning.
 * @type {Record<string, {tone: "good" | "warn" | "bad" | "idle", word: string, text: string}>} */
const STEPS = {
  done: { tone: "good", word: "✓ STRICT", text: "takes mutual TLS only" },
  safe: { tone: "good", word: "→ safe", text: "may be switched now: nobody who has called would be refused" },
  "not safe": { tone: "bad", word: "✕ not safe", text: "callers would be refused" },
  "not known": { tone: "warn", word: "? not known", text: "not everything is known of who has called" },
};

/** @type {Record<string, {tone: "good" | "warn" | "bad" | "idle", word: string}>} */
const EFFECTS = {
  breaks: { tone: "bad", word: "✕ would break" },
  "not known": { tone: "warn", word: "? not known" },
  stays: { tone: "good", word: "✓ stays" },
  refused: { tone: "idle", word: "– refused already" },
};

/** @param {Workload} workload */
function stepOf(workload) {
  const strict = workload.mode === "STRICT"
    && workload.port_modes.every((each) => each.mode === "STRICT");
  if (strict) return "done";
  return workload.verdict in STEPS ? workload.verdict : "not known";
}

/** @param {Workload} workload */
function step(workload) {
  const { tone, word } = STEPS[stepOf(workload)];
  return pill(tone, word);
}

export class RolloutView {
  /** @param {(choice: Choice | null, from: HTMLElement | null) => void} choose */
  constructor(choose) {
    this.title = "Rollout to STRICT";
    this.seconds = 7 * 86400;
    /** @type {Plaintext | null} */
    this.report = null;
    this.choice = "";
    this.wanted = "";
    this.summary = el("p", { class: "summary", id: "summary" });
    this.notices = el("div");
    this.steps = el("ul", { class: "steps", "aria-label": "Workloads by how far they are" });
    this.search = /** @type {HTMLInputElement} */ (el("input", {
      type: "search", id: "search", placeholder: "name, verdict, mode, caller",
      oninput: () => {
        this.wanted = this.search.value.trim().toLowerCase();
        this.#render();
      },
    }));
    this.table = this.#table(choose);
    this.element = el("section", { "aria-labelledby": "rollout-title" },
      el("h1", { id: "rollout-title" }, "Is it safe to require mutual TLS?"),
      this.summary, this.notices, this.steps,
      el("div", { class: "filters", role: "group", "aria-label": "Filters" },
        el("label", { class: "grow" }, "Find", this.search)),
      this.table.element);
  }

  /** @param {number} seconds */
  asks(seconds) {
    return { plaintext: `/report/plaintext?seconds=${seconds}` };
  }

  /** @param {import("./api.js").Answers} answers */
  update({ plaintext }) {
    if (plaintext !== undefined) this.report = plaintext;
    this.#render();
  }

  /** @param {Choice | null} choice */
  mark(choice) {
    this.choice = choice?.kind === "rollout" ? choice.id : "";
    this.#render();
  }

  #render() {
    const { report } = this;
    if (report === null) return;
    const found = report.workloads;
    const counts = Object.fromEntries(Object.keys(STEPS).map((each) =>
      [each, found.filter((workload) => stepOf(workload) === each).length]));
    fill(this.summary, `${plural(found.length, "workload")} of this node, callers since `
      + `${moment(report.since)}. `
      + (report.complete === null ? "Callers are not recorded now."
        : `Recorded without a gap since ${moment(report.complete)}.`));
    fill(this.notices,
      report.problem !== "" && notice("bad", `Recording does not work now: ${visible(report.problem)}`),
      report.truncated && notice("warn", "More was recorded than was looked at: choose a shorter window."),
      report.gaps.length > 0 && notice("warn", `${plural(report.gaps.length, "gap")} in the recording: `
        + "who called then is not known.", el("ul", {}, ...report.gaps.slice(0, SHOWN_GAPS).map((gap) =>
        el("li", {}, `${moment(gap.begin)} to ${moment(gap.until)}: ${visible(gap.cause)}`)))),
      found.length === 0 && notice("idle", "No workload of this node."));
    fill(this.steps, ...Object.entries(STEPS).map(([name, { tone, word, text }]) =>
      el("li", { "data-tone": tone }, el("strong", {}, count(counts[name])),
        el("span", {}, word), el("small", {}, text))));
    this.table.update(found.filter((each) => [
      each.workload, STEPS[stepOf(each)].word, each.mode,
      ...each.callers.flatMap((caller) => [caller.workload, caller.source]),
    ].some((text) => text.toLowerCase().includes(this.wanted))), this.choice);
  }

  /** @param {(choice: Choice | null, from: HTMLElement | null) => void} choose */
  #table(choose) {
    const order = Object.keys(STEPS);
    /** @type {Table<Workload>} */
    const made = new Table({
      caption: "Workloads and whether STRICT is safe for them",
      empty: "No workload fits.",
      id: (each) => each.workload,
      open: (each, from) => choose({ kind: "rollout", id: each.workload }, from),
      columns: [
        { title: "Workload", sort: (each) => each.workload, cell: (each) => visible(each.workload) },
        { title: "STRICT", sort: (each) => order.indexOf(stepOf(each)), first: "desc", cell: step },
        {
          title: "Mode now", sort: (each) => each.mode,
          cell: (each) => (each.mode === "" ? "not known" : visible(each.mode))
            + (each.port_modes.length > 0 ? `, ${plural(each.port_modes.length, "port")} apart` : ""),
        },
        {
          title: "Without identity", numeric: true, first: "desc",
          sort: (each) => each.without_identity, cell: (each) => count(each.without_identity),
        },
        {
          title: "With identity", numeric: true, first: "desc",
          sort: (each) => each.with_identity, cell: (each) => count(each.with_identity),
        },
        {
          title: "Last without", kind: "short", sort: (each) => each.last ?? "", first: "desc",
          cell: (each) => (each.last === null ? "nobody" : moment(each.last)),
        },
        { title: "Why", kind: "wide", sort: (each) => each.reasons[0] ?? "", cell: (each) => visible(each.reasons[0] ?? "") },
      ],
      sorted: 1,
    });
    return made;
  }
}

/** What the panel tells of one workload.
 * @param {Workload} workload @returns {Node[]} */
export function rolloutContent(workload) {
  const { text } = STEPS[stepOf(workload)];
  return [
    el("p", { class: "lead" }, step(workload), ` ${text}`),
    ...(workload.reasons.length === 0 ? []
      : [el("ul", {}, ...workload.reasons.map((each) => el("li", {}, visible(each))))]),
    el("dl", {},
      el("dt", {}, "Mode now"), el("dd", {}, visible(workload.mode || "not known")),
      el("dt", {}, "Said by"), el("dd", {}, visible(workload.mode_origin || "nobody: the default")),
      el("dt", {}, "Recorded"), el("dd", {}, workload.since === null ? "not now"
        : `without a gap since ${moment(workload.since)}`),
      el("dt", {}, "Refused"), el("dd", {}, `${count(workload.refused)} without identity`)),
    el("h3", {}, `Callers without identity (${count(workload.callers.length + (workload.left_out ?? 0))})`),
    workload.callers.length === 0 ? el("p", {}, "Nobody in this window.")
      : el("ul", { class: "callers" }, ...workload.callers.map(callerItem)),
    ...(workload.left_out ? [el("p", {}, `and ${count(workload.left_out)} more: nodeagent report plaintext -o json`)] : []),
  ];
}

/** @param {Caller} caller */
function callerItem(caller) {
  const { tone, word } = EFFECTS[caller.effect] ?? EFFECTS["not known"];
  const from = caller.workload === "" ? caller.kind : caller.workload;
  const at = caller.source === "" ? "" : ` (${visible(caller.source)})`;
  return el("li", {},
    pill(tone, word), " ", el("span", { class: "name" }, `${visible(from)}${at}`),
    el("div", {}, `port ${caller.port}, ${plural(caller.connections, "connection")}, last ${moment(caller.last)}`),
    caller.reason !== "" && el("div", {}, visible(caller.reason)),
    caller.policy !== "" && el("div", { class: "name" }, visible(caller.policy)));
}
