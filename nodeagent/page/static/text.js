// How things are written: names, numbers, times. Names come from peers and are hostile: what could
// turn, hide or end a line is shown as its code point. Pure.

const MAX_NAME = 300;

// Control characters, line ends of Unicode, zero widths, marks and overrides of direction, and what
// is drawn by nobody (tags, variation selectors, halves of surrogate pairs).
const UNSEEN =
  /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}\u115F\u1160\u3164\uFFA0\u034F\uFE00-\uFE0F\u{E0100}-\u{E01EF}]/gu;

/** Return text as it may be shown.
 * @param {unknown} value @param {number} [most] */
export function visible(value, most = MAX_NAME) {
  const text = String(value).replace(UNSEEN, (found) =>
    `\\u{${(found.codePointAt(0) ?? 0).toString(16)}}`);
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

/** "spiffe://cluster.local/ns/shop/sa/cart" without the own trust domain: "ns/shop/sa/cart".
 * @param {string} identity @param {string} trustDomain */
export function shortIdentity(identity, trustDomain) {
  const own = `spiffe://${trustDomain}/`;
  return visible(identity.startsWith(own) ? identity.slice(own.length) : identity);
}

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** @param {number} value */
export function count(value) {
  return WHOLE.format(value);
}

/** @param {number} value @param {string} one @param {string} [many] */
export function plural(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}

/** @param {number} value */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let size = value;
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${size < 10 && unit > 0 ? size.toFixed(1) : Math.round(size)} ${units[unit]}`;
}

/** Connections of a window as a rate that a person can picture.
 * @param {number} connections @param {number} seconds */
export function rate(connections, seconds) {
  if (connections === 0 || seconds <= 0) return "0/min";
  const perSecond = connections / seconds;
  for (const [unit, size] of /** @type {[string, number][]} */ ([["s", 1], ["min", 60], ["h", 3600]])) {
    const value = perSecond * size;
    if (value >= 1) return `${value < 10 ? value.toFixed(1) : count(value)}/${unit}`;
  }
  return `${(perSecond * 86400).toFixed(1)}/day`;
}

/** The part of a whole in percent: never "100 %" for less than all, never "0 %" for more than none.
 * @param {number} share */
export function percent(share) {
  if (share >= 1) return "100 %";
  if (share <= 0) return "0 %";
  const tenths = Math.min(999, Math.max(1, Math.round(share * 1000)));
  return `${(tenths / 10).toFixed(1)} %`;
}

/** "45 s", "3 min 20 s", "4 h 10 min", "2 d 3 h".
 * @param {number} seconds */
export function duration(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  for (const [size, unit, smaller, small] of /** @type {[number, string, number, string][]} */ ([
    [86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"],
  ])) {
    if (whole < size) continue;
    const rest = Math.floor((whole % size) / smaller);
    const head = `${Math.floor(whole / size)} ${unit}`;
    return whole / size < 10 && rest > 0 ? `${head} ${rest} ${small}` : head;
  }
  return `${whole} s`;
}

/** A duration in its largest unit, for a window that is not to the second: "5 min", "7 d".
 * @param {number} seconds */
export function about(seconds) {
  for (const [size, unit] of /** @type {[number, string][]} */ ([[86400, "d"], [3600, "h"], [60, "min"]]))
    if (seconds >= size) return `${Math.round(seconds / size)} ${unit}`;
  return `${Math.round(seconds)} s`;
}

/** Local time with its offset: "2026-11-21 22:31:05+01:00".
 * @param {string | null | undefined} rfc3339 */
export function moment(rfc3339) {
  const at = new Date(rfc3339 ?? NaN);
  if (Number.isNaN(at.getTime())) return "–";
  const two = (/** @type {number} */ n) => String(n).padStart(2, "0");
  const east = -at.getTimezoneOffset();
  const offset = `${east < 0 ? "-" : "+"}${two(Math.floor(Math.abs(east) / 60))}:${two(Math.abs(east) % 60)}`;
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} `
    + `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}${offset}`;
}

/** @param {string} token "strict_requires_mtls" */
export function words(token) {
  return visible(token).replaceAll("_", " ");
}
