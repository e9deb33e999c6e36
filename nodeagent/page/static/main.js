// The page: which view is open, what is asked of the agent and when, and the panel beside it.

import { ask } from "./api.js";
import { byId, el, fill, hide, notice, pill } from "./dom.js";
import { pairs } from "./model.js";
import { asdexContent, pairContent, podContent, vertexContent } from "./panel.js";
import { duration, moment, plural, visible } from "./text.js";
import { ConnectionsView, connectionContent } from "./view_connections.js";
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

/** Between two clocks: less is nothing that certificates or a reader would notice. */
const MAX_SKEW_MS = 60_000;

class Page {
  constructor() {
    /** @type {(choice: Choice | null, from: HTMLElement | null) => void} */
    const choose = (choice, from) => this.choose(choice, from);
    this.open = new ConnectionsView(choose);
    /** @type {Record<string, GraphView | ConnectionsView | WorkloadsView | RolloutView>} */
    this.views = {
      graph: new GraphView(choose),
      connections: this.open,
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
    /** Whether what is shown is old, because nothing came. */
    this.silent = false;
    /** Milliseconds that this computer's clock is ahead of the node's. */
    this.ahead = 0;
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
    if (this.view.seconds > 0 && WINDOWS.some(([seconds]) => seconds === asked)) this.view.seconds = asked;
    this.window.value = String(this.view.seconds);
    // What is open now has no window.
    hide(byId("window-label"), this.view.seconds === 0);
    if (this.view === this.open) this.open.narrow(new URLSearchParams(query));
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
    /** @type {string[]} */
    const texts = [];
    this.silent = false;
    answers.forEach((answer, at) => {
      const name = /** @type {keyof import("./api.js").Answers} */ (paths[at][0]);
      if (answer.status === "fulfilled") {
        this.known = { ...this.known, [name]: answer.value };
        if (name === "status") this.ahead = Date.now() - Date.parse(answer.value.time);
        return;
      }
      const { message, kind } = answer.reason;
      this.silent ||= kind === "silent";
      const last = this.known[name]?.time;
      // When nothing at all answers, it is enough to say so of the first.
      if (kind !== "silent" || at === 0 || answers[0].status === "fulfilled") texts.push(
        last === undefined ? message : `${message} Shown is what was known at ${moment(last)}.`);
    });
    try {
      this.#show(texts);
    } catch (error) {
      // Of another release, most likely. What goes on being shown must not pass for new.
      console.error(error);
      this.silent = true;
      this.#tell();
      fill(byId("notices"), notice("bad", "This page does not understand the answer: reload it."));
    }
    const slow = view.seconds >= LONG_WINDOW || (view === this.open && this.open.heavy);
    const wait = slow ? SLOW_REFRESH_MS : REFRESH_MS;
    if (this.live && !document.hidden)
      this.timer = setTimeout(() => void this.refresh(), wait);
    document.documentElement.dataset.refreshes = String(turn);
  }

  /** @param {string[]} problems */
  #show(problems) {
    const { status } = this.known;
    fill(byId("notices"), ...[...new Set(problems)].map((each) => notice("bad", visible(each))),
      Math.abs(this.ahead) > MAX_SKEW_MS && notice("warn", "The clocks differ: this computer’s is "
        + `${duration(Math.abs(this.ahead) / 1000)} ${this.ahead > 0 ? "ahead of" : "behind"} the node’s. `
        + "Times here are the node’s. If its clock is the wrong one, certificates fail too."));
    fill(byId("node"), status === undefined ? "nodeagent" : visible(status.node));
    fill(byId("verdict"), this.silent || status === undefined ? pill("bad", "no answer")
      : status.ready ? pill("good", "ready")
        : pill("bad", `not ready, ${plural(status.missing.length, "reason")}`));
    this.#tell();
    document.title = `${this.view.title} · ${status === undefined ? "nodeagent" : visible(status.node)}`;
    this.view.update(this.known);
    this.#describe();
  }

  /** Say of when the picture is, and whether it goes on. */
  #tell() {
    const state = !this.live ? "Paused" : this.silent ? "Not answered since" : "Live";
    fill(byId("moment"), `${state}${state.includes(" ") ? "" : ","} ${moment(this.known.status?.time)}`);
  }

  /** Open the panel for what was chosen, or close it.
   * @param {Choice | null} choice @param {HTMLElement | null} from What gets the focus back. */
  choose(choice, from) {
    const closing = choice === null && this.choice !== null;
    this.choice = choice;
    // The others are told when they are opened.
    this.view.mark(choice);
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
    const { graph, plaintext, asdex, connections, status = null } = this.known;
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
    if (choice?.kind === "connection") {
      const found = connections?.connections.find((each) => each.id === choice.id);
      title = "Open connection";
      content = found === undefined || connections === undefined ? ["It has ended."]
        : connectionContent(found, this.open.rates.get(found.id), connections);
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
