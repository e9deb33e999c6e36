// The view of workloads: what this node has enrolled, and how each stands.

import { el, fill, notice, pill } from "./dom.js";
import { Table } from "./table.js";
import { capture, certificateLeft } from "./panel.js";
import { duration, plural, shortIdentity, visible } from "./text.js";

/**
 * @typedef {import("./api.js").Status} Status
 * @typedef {import("./api.js").Pod} Pod
 * @typedef {import("./graph.js").Choice} Choice
 */

export class WorkloadsView {
  /** @param {(choice: Choice | null, from: HTMLElement | null) => void} choose */
  constructor(choose) {
    this.title = "Workloads";
    this.seconds = 300;
    /** @type {Status | null} */
    this.status = null;
    /** Of the node. @type {number | null} */
    this.score = null;
    /** @type {Map<string, number>} */
    this.asdex = new Map();
    this.choice = "";
    this.wanted = "";
    this.summary = el("p", { class: "summary" });
    this.notices = el("div");
    this.search = /** @type {HTMLInputElement} */ (el("input", {
      type: "search", id: "search", placeholder: "name, identity, state, mode",
      oninput: () => {
        this.wanted = this.search.value.trim().toLowerCase();
        this.#render();
      },
    }));
    this.table = this.#table(choose);
    this.element = el("section", { "aria-labelledby": "workloads-title" },
      el("h1", { id: "workloads-title" }, "Workloads of this node"),
      this.summary, this.notices,
      el("div", { class: "filters", role: "group", "aria-label": "Filters" },
        el("label", { class: "grow" }, "Find", this.search)),
      this.table.element);
  }

  /** @param {number} seconds */
  asks(seconds) {
    return { graph: `/graph?seconds=${seconds}`, asdex: `/asdex?seconds=${seconds}` };
  }

  /** @param {import("./api.js").Answers} answers */
  update({ status, asdex }) {
    if (status !== undefined) this.status = status;
    if (asdex !== undefined) {
      this.score = asdex.score;
      this.asdex = new Map(asdex.workloads.flatMap((each) =>
        (each.score === null ? [] : [[each.workload, each.score]])));
    }
    this.#render();
  }

  /** @param {Choice | null} choice */
  mark(choice) {
    this.choice = choice?.kind === "vertex" ? choice.id : "";
    this.#render();
  }

  #render() {
    const { status } = this;
    if (status === null) return;
    const enrolled = status.pods.filter((each) => each.state === "Enrolled").length;
    fill(this.summary, `${enrolled} of ${plural(status.pods.length, "workload")} enrolled; `
      + `${status.pods.filter((each) => each.mode === "STRICT").length} take mutual TLS only. `
      + (this.score === null ? "No connection to score in this window."
        : `ASDEX of the node: ${this.score.toFixed(2)} of 1.00.`));
    fill(this.notices,
      ...status.missing.map((each) => notice("bad", visible(each))),
      status.same_node === "direct" && notice("warn", "Between two pods of this node connections "
        + "are direct: identity and policy by the node, not encrypted (setting same_node)."));
    this.table.update(status.pods.filter((each) =>
      [each.workload, each.identity, each.state, each.mode].some(
        (text) => text.toLowerCase().includes(this.wanted))), this.choice);
  }

  /** @param {(choice: Choice | null, from: HTMLElement | null) => void} choose */
  #table(choose) {
    /** @type {Table<Pod>} */
    const made = new Table({
      caption: "Workloads of this node",
      empty: "No workload of this node fits.",
      id: (pod) => pod.workload,
      open: (pod, from) => choose({ kind: "vertex", id: pod.workload }, from),
      columns: [
        { title: "Workload", sort: (pod) => pod.workload, cell: (pod) => visible(pod.workload) },
        {
          title: "State", sort: (pod) => pod.state,
          cell: (pod) => pill(pod.state === "Enrolled" ? "good"
            : pod.state === "Enrolling" || pod.state === "Removing" ? "warn" : "bad", pod.state),
        },
        {
          title: "Mode", sort: (pod) => pod.mode,
          cell: (pod) => (pod.mode === "" ? "not known" : visible(pod.mode))
            + (pod.port_modes.length > 0 ? `, ${plural(pod.port_modes.length, "port")} apart` : ""),
        },
        {
          title: "Certificate", sort: (pod) => pod.certificate?.not_after ?? "",
          cell: (pod) => certificateLeft(pod.certificate, this.status?.time ?? ""),
        },
        {
          title: "ASDEX", numeric: true, sort: (pod) => this.asdex.get(pod.workload) ?? -1,
          cell: (pod) => this.asdex.get(pod.workload)?.toFixed(2) ?? "no data",
        },
        { title: "Capture", sort: (pod) => pod.deviations.length, cell: (pod) => capture(pod), first: "desc" },
        {
          title: "Identity", sort: (pod) => pod.identity,
          cell: (pod) => shortIdentity(pod.identity, this.status?.trust_domain ?? ""),
        },
        {
          title: "Since", sort: (pod) => pod.since, numeric: true,
          cell: (pod) => duration((Date.parse(this.status?.time ?? "") - Date.parse(pod.since)) / 1000),
        },
      ],
    });
    return made;
  }
}
