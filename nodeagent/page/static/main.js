// The page: which view is open, what is asked of the agent and when, and the panel beside it.

import { ask, Unanswered } from "./api.js";
import { byId, el, fill, hide, notice, pill } from "./dom.js";
import { pairs } from "./model.js";
import { pairContent, podContent, vertexContent } from "./panel.js";
import { moment, plural, visible } from "./text.js";
import { GraphView } from "./view_graph.js";
import { WorkloadsView } from "./view_workloads.js";

/**
 * @typedef {import("./api.js").Status} Status
 * @typedef {import("./api.js").Graph} Graph
 * @typedef {import("./graph.js").Choice} Choice
 */

/** Seconds of a window, and the words for it. @type {[number, string][]} */
const WINDOWS = [
  [300, "5 minutes"], [900, "15 minutes"], [3600, "1 hour"], [6 * 3600, "6 hours"],
  [86400, "24 hours"], [7 * 86400, "7 days"],
];

const REFRESH_MS = 5_000;

/** For a window of many hours: the answer takes the node longer, and changes less. */
const SLOW_REFRESH_MS = 30_000;
const LONG_WINDOW = 6 * 3600;

class Page {
  constructor() {
    this.views = /** @type {Record<string, GraphView | WorkloadsView>} */ ({
      graph: new GraphView((choice, from) => this.choose(choice, from)),
      workloads: new WorkloadsView((choice, from) => this.choose(choice, from)),
    });
    this.name = "";
    this.seconds = WINDOWS[0][0];
    this.live = true;
    /** @type {Status | null} */
    this.status = null;
    /** @type {Graph | null} */
    this.graph = null;
    /** @type {Choice | null} */
    this.choice = null;
    /** @type {HTMLElement | null} */
    this.opener = null;
    /** @type {number | undefined} */
    this.timer = undefined;
    this.asked = 0;
    this.panel = byId("panel");
    this.heading = el("h2", { tabindex: -1 });
    this.content = el("div", { class: "content" });
    this.panel.append(el("div", { class: "head" }, this.heading,
      el("button", { type: "button", "aria-label": "Close", class: "close", onclick: () =>
        this.choose(null, null) }, "✕")), this.content);
    this.window = /** @type {HTMLSelectElement} */ (byId("window"));
    this.window.append(...WINDOWS.map(([seconds, name]) => el("option", { value: seconds }, name)));
    this.window.addEventListener("change", () => {
      this.seconds = Number(this.window.value);
      history.replaceState(null, "", this.#address());
      void this.refresh();
    });
    const live = byId("live");
    live.addEventListener("click", () => {
      this.live = !this.live;
      live.setAttribute("aria-pressed", String(this.live));
      live.textContent = this.live ? "Live" : "Paused";
      if (this.live) void this.refresh();
      else clearTimeout(this.timer);
    });
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.choice !== null) this.choose(null, null);
    });
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden && this.live) void this.refresh();
    });
    addEventListener("hashchange", () => this.route(true));
    this.route(false);
  }

  #address() {
    return `#${this.name}?window=${this.seconds}`;
  }

  /** Open the view that the address names. @param {boolean} focus */
  route(focus) {
    const [name, query] = location.hash.slice(1).split("?");
    if (name === "main") {
      byId("main").focus();
      return;
    }
    const asked = Number(new URLSearchParams(query).get("window"));
    if (WINDOWS.some(([seconds]) => seconds === asked)) this.seconds = asked;
    this.window.value = String(this.seconds);
    this.name = name in this.views ? name : "graph";
    const view = this.views[this.name];
    byId("view").replaceChildren(view.element);
    for (const link of document.querySelectorAll("nav a")) {
      const here = link.getAttribute("href") === `#${this.name}`;
      if (here) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    this.choose(null, null);
    if (focus) byId("main").focus();
    void this.refresh();
  }

  /** Ask for what the open view shows, show it, and do so again in a while. */
  async refresh() {
    clearTimeout(this.timer);
    const turn = ++this.asked;
    const [status, graph] = await Promise.allSettled([
      ask("/status"), ask(`/graph?seconds=${this.seconds}`),
    ]);
    // What was asked later is the newer answer.
    if (turn !== this.asked) return;
    const problems = [status, graph].flatMap((each) =>
      (each.status === "rejected" ? [each.reason] : []));
    if (status.status === "fulfilled") this.status = status.value;
    if (graph.status === "fulfilled") this.graph = graph.value;
    this.#show(problems);
    const wait = this.seconds >= LONG_WINDOW ? SLOW_REFRESH_MS : REFRESH_MS;
    if (this.live && !document.hidden)
      this.timer = setTimeout(() => void this.refresh(), wait);
    document.documentElement.dataset.refreshes = String(turn);
  }

  /** @param {unknown[]} problems */
  #show(problems) {
    const { status, graph } = this;
    for (const each of problems) if (!(each instanceof Unanswered)) throw each;
    const texts = [...new Set(problems.map((each) => /** @type {Unanswered} */ (each).message))];
    const silent = problems.some((each) => each instanceof Unanswered && each.kind === "silent");
    fill(byId("notices"), ...texts.map((each) => notice("bad", visible(each),
      silent && (graph ?? status) !== null && ` Shown is what was known at ${moment((graph ?? status)?.time)}.`)));
    fill(byId("node"), status === null ? "nodeagent" : visible(status.node));
    fill(byId("verdict"), silent || status === null ? pill("bad", "no answer")
      : status.ready ? pill("good", "ready")
        : pill("bad", `not ready, ${plural(status.missing.length, "reason")}`));
    if (!silent) fill(byId("moment"), moment((graph ?? status)?.time));
    document.title = `${this.views[this.name].title} · ${status === null ? "nodeagent" : visible(status.node)}`;
    const { views } = this;
    if (views.graph instanceof GraphView && graph !== null) views.graph.update(graph);
    if (views.workloads instanceof WorkloadsView && status !== null)
      views.workloads.update(status, new Map((graph?.vertices ?? []).flatMap((each) =>
        (typeof each.asdex === "number" ? [/** @type {[string, number]} */ ([each.id, each.asdex])] : []))));
    this.#describe();
  }

  /** Open the panel for what was chosen, or close it.
   * @param {Choice | null} choice @param {HTMLElement | null} from What gets the focus back. */
  choose(choice, from) {
    const closing = choice === null && this.choice !== null;
    this.choice = choice;
    if (from !== null) this.opener = from;
    for (const view of Object.values(this.views)) view.mark(choice);
    this.#describe();
    if (from !== null) this.heading.focus();
    if (closing) {
      if (this.opener?.isConnected) this.opener.focus();
      this.opener = null;
    }
  }

  #describe() {
    const { choice, graph, status } = this;
    const vertices = new Map((graph?.vertices ?? []).map((each) => [each.id, each]));
    const every = pairs(graph?.edges ?? []);
    const seconds = graph?.window_seconds ?? 1;
    /** @type {(Node | string)[] | null} */
    let content = null;
    let title = "";
    if (choice?.kind === "pair") {
      const pair = every.find((each) => each.id === choice.id);
      title = "Connection";
      content = pair === undefined ? ["Nothing of it is left in this window."]
        : pairContent(pair, vertices, status, seconds, (id) =>
          this.choose({ kind: "vertex", id }, this.heading));
    } else if (choice?.kind === "vertex") {
      const vertex = vertices.get(choice.id);
      const pod = status?.pods.find((each) => each.workload === choice.id);
      title = choice.id;
      content = vertex !== undefined ? vertexContent(vertex, every, status, seconds, (pair) =>
        this.choose({ kind: "pair", id: pair.id }, this.heading))
        : pod && status ? podContent(pod, status) : ["Nothing of it is left in this window."];
    }
    hide(this.panel, content === null);
    if (document.body.classList.contains("with-panel") !== (content !== null))
      document.body.classList.toggle("with-panel");
    if (content === null) return;
    fill(this.heading, visible(title));
    fill(this.content, ...content);
  }
}

const page = new Page();
// For tests, as is the drawing on its box.
/** @type {any} */ (globalThis).page = page;
