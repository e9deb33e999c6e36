// Making elements. Text is only ever set as text: nothing here, or on this page, parses HTML.

/**
 * @typedef {string | number | Node | null | undefined | false} Child
 * @typedef {Record<string, string | number | boolean | null | undefined | EventListener>} Attributes
 */

/** Return an element. Attributes that begin with "on" are listeners; false and null are left out.
 * @param {string} name @param {Attributes} [attributes] @param {...Child} children */
export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false)
      made.setAttribute(key, value === true ? "" : String(value));
  }
  made.append(...children.filter((each) => each !== null && each !== undefined && each !== false)
    .map((each) => (each instanceof Node ? each : String(each))));
  return made;
}

/** @param {string} name @param {Record<string, string | number>} attributes @param {...Node} children */
export function svg(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  made.append(...children);
  return made;
}

/** @param {string} id */
export function byId(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`the page has no #${id}`);
  return found;
}

/** Make these the children, and touch only what differs: what is focused or selected stays so.
 * @param {Node} parent @param {...Child} children */
export function fill(parent, ...children) {
  patch(parent, el("div", {}, ...children));
}

/** @param {Node} parent @param {Node} wanted Whose children are to become those of `parent`. */
function patch(parent, wanted) {
  const children = [...wanted.childNodes];
  children.forEach((made, at) => {
    const found = parent.childNodes[at];
    if (found === undefined) parent.appendChild(made);
    else if (found.isEqualNode(made)) return;
    // A button acts for what it was made for: never another one's words on it.
    else if (made instanceof Element && !(made instanceof HTMLButtonElement)
      && found.cloneNode(false).isEqualNode(made.cloneNode(false))) patch(found, made);
    else parent.replaceChild(made, found);
  });
  while (parent.childNodes.length > children.length)
    parent.removeChild(/** @type {Node} */ (parent.lastChild));
}

/** Hide or show, without touching what is so already.
 * @param {HTMLElement} element @param {boolean} hidden */
export function hide(element, hidden) {
  if (element.hidden !== hidden) element.hidden = hidden;
}

/** A mark with a word: tone is never the only thing that tells.
 * @param {"good" | "warn" | "bad" | "idle"} tone @param {string} word */
export function pill(tone, word) {
  return el("span", { class: "pill", "data-tone": tone }, word);
}

/** @param {"warn" | "bad" | "idle"} tone @param {...Child} children */
export function notice(tone, ...children) {
  return el("p", { class: "notice", "data-tone": tone }, ...children);
}
