// The page: which view is open, what is asked of the agent and when, and the panel beside it.

import { ask, Unanswered } from "./api.js";
import { byId, el, fill, hide, notice, pill } from "./dom.js";
import { pairs } from "./model.js";
import { asdexContent, pairContent, podContent, vertexContent } from "./panel.js";
import { moment, plural, visible } from "./text.js";
import { GraphView } from "./view_graph.js";
import { RolloutView, rolloutContent } from "./view_rollout.js";
import { WorkloadsView } from "./view_workloads.js";

/** @typedef {import("./graph.js").Choice} Choice */

/** Seconds of a window, and the words for it. @type {[number, string][]} */
const WINDOWS = [
  [60, "1 minute"], [300, "5 minutes"], [900, "15 minutes"], [3600, "1 hour"], [6 * 3600, "6 hours"],
  [86400, "24 hours"], [7 * 86400, "7 days"],
];

const REFRESH_MS = 5_000;

/** For a window of many hours: the answer takes the node longer, and changes less. */
const SLOW_REFRESH_MS = 30_000;
const LONG_WINDOW = 6 * 3600;

class Page {
  constructor() {
    /** @type {(choice: Choice | null, from: HTMLElement | null) => void} */
    const choose = (choice, from) => this.choose(choice, from);
    /** @type {Record<string, GraphView | WorkloadsView | RolloutView>} */
    this.views = {
      graph: new GraphView(choose),
      workloads: new WorkloadsView(choose),
      rollout: new RolloutView(choose),
    };
    this.name = "graph";
    this.live = true;
    /** What was answered last. @type {import("./api.js").Answers} */
    this.known = {};
    /** @type {Choice | null} */
    this.choice = null;
    /** What the panel tells of now: its buttons act for that alone. */
    this.told = "";
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
      this.view.seconds = Number(this.window.value);
      history.replaceState(null, "", this.#address());
      void this.refresh();
    });
    const live = byId("live");
    live.addEventListener("click", () => {
      this.live = !this.live;
      live.textContent = this.live ? "Pause" : "Resume";
      this.#tell();
      if (this.live) void this.refresh();
      else clearTimeout(this.timer);
    });
    byId("skip").addEventListener("click", (event) => {
      // The address names the view: it is not to become this anchor.
      event.preventDefault();
      byId("main").focus();
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

  get view() {
    return this.views[this.name];
  }

  #address() {
    return `#${this.name}?window=${this.view.seconds}`;
  }

  /** Open the view that the address names. @param {boolean} focus */
  route(focus) {
    const [name, query] = location.hash.slice(1).split("?");
    this.name = Object.hasOwn(this.views, name) ? name : "graph";
    const asked = Number(new URLSearchParams(query).get("window"));
    if (WINDOWS.some(([seconds]) => seconds === asked)) this.view.seconds = asked;
    this.window.value = String(this.view.seconds);
    byId("view").replaceChildren(this.view.element);
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
    const { view } = this;
    const paths = Object.entries({ status: "/status", ...view.asks(view.seconds) });
    const answers = await Promise.allSettled(paths.map(([, path]) => ask(path)));
    // What was asked later is the newer answer.
    if (turn !== this.asked) return;
    /** @type {unknown[]} */
    const problems = [];
    answers.forEach((answer, at) => {
      if (answer.status === "rejected") problems.push(answer.reason);
      else this.known = { ...this.known, [paths[at][0]]: answer.value };
    });
    this.#show(problems);
    const wait = view.seconds >= LONG_WINDOW ? SLOW_REFRESH_MS : REFRESH_MS;
    if (this.live && !document.hidden)
      this.timer = setTimeout(() => void this.refresh(), wait);
    document.documentElement.dataset.refreshes = String(turn);
  }

  /** @param {unknown[]} problems */
  #show(problems) {
    const { status } = this.known;
    for (const each of problems) if (!(each instanceof Unanswered)) throw each;
    const texts = [...new Set(problems.map((each) => /** @type {Unanswered} */ (each).message))];
    const silent = problems.some((each) => each instanceof Unanswered && each.kind === "silent");
    fill(byId("notices"), ...texts.map((each) => notice("bad", visible(each),
      silent && status !== undefined && ` Shown is what was known at ${moment(status.time)}.`)));
    fill(byId("node"), status === undefined ? "nodeagent" : visible(status.node));
    fill(byId("verdict"), silent || status === undefined ? pill("bad", "no answer")
      : status.ready ? pill("good", "ready")
        : pill("bad", `not ready, ${plural(status.missing.length, "reason")}`));
    this.#tell();
    document.title = `${this.view.title} · ${status === undefined ? "nodeagent" : visible(status.node)}`;
    this.view.update(this.known);
    this.#describe();
  }

  /** Say of when the picture is, and whether it goes on. */
  #tell() {
    fill(byId("moment"), `${this.live ? "Live" : "Paused"}, ${moment(this.known.status?.time)}`);
  }

  /** Open the panel for what was chosen, or close it.
   * @param {Choice | null} choice @param {HTMLElement | null} from What gets the focus back. */
  choose(choice, from) {
    const closing = choice === null && this.choice !== null;
    this.choice = choice;
    for (const view of Object.values(this.views)) view.mark(choice);
    this.#describe();
    if (choice?.kind === "vertex") void this.refresh();
    if (from !== null) {
      // From one thing to the next within the panel: the way back stays the first one's.
      if (from !== this.heading) this.opener = from;
      this.heading.focus();
    }
    if (!closing) return;
    if (this.opener?.isConnected) this.opener.focus();
    else if (document.activeElement === document.body) byId("main").focus();
    this.opener = null;
  }

  #describe() {
    const { choice } = this;
    const { graph, plaintext, asdex, status = null } = this.known;
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
      const score = asdex?.workloads.find((each) => each.workload === choice.id);
      content = vertex !== undefined ? vertexContent(vertex, every, status, score, seconds, (pair) =>
        this.choose({ kind: "pair", id: pair.id }, this.heading))
        : pod && status ? [...asdexContent(score), ...podContent(pod, status)] : ["Nothing of it is left in this window."];
    }
    if (choice?.kind === "rollout") {
      const workload = plaintext?.workloads.find((each) => each.workload === choice.id);
      title = choice.id;
      content = workload === undefined ? ["Nothing of it is left in this window."]
        : rolloutContent(workload);
    }
    hide(this.panel, content === null);
    if (document.body.classList.contains("with-panel") !== (content !== null))
      document.body.classList.toggle("with-panel");
    if (content === null) return;
    const told = JSON.stringify(choice);
    if (told !== this.told) this.content.replaceChildren();
    this.told = told;
    fill(this.heading, visible(title));
    fill(this.content, ...content);
  }
}

const page = new Page();
// In reach of the console, as is the drawing on its box: a canvas shows nothing of itself.
/** @type {any} */ (globalThis).page = page;
