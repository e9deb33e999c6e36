// What the agent answers, and why it did not. Nothing is ever sent but these reads.

/**
 * @typedef {{mutual_tls: number, direct: number, plaintext: number}} Connections
 * @typedef {{id: string, kind: string, name: string, namespace: string, identities: string[],
 *   local: boolean, mode: string, state: string, asdex: number | null}} Vertex
 * @typedef {{source: string, destination: string, port: number, service: string,
 *   connections: Connections, refused: number, failed: number, reasons: Record<string, number>,
 *   padlock: string, protected_share: number | null, bytes_sent: number, bytes_received: number,
 *   policies: string[], source_identity: string, destination_identity: string, first: string,
 *   last: string, reporter: string, addresses?: string[]}} Edge
 * @typedef {{schema: number, time: string, node: string, window_seconds: number,
 *   complete: boolean, vertices: Vertex[], edges: Edge[], truncated?: boolean,
 *   problem?: string}} Graph
 * @typedef {{identity: string, not_before: string | null, not_after: string | null,
 *   renewals: number, failures: number, error: string}} Certificate
 * @typedef {{policy: string, action: string, origin: string, dry_run?: boolean}} Authorization
 * @typedef {{workload: string, identity: string, netns: string, state: string, since: string,
 *   addresses: string[], mode: string, mode_origin: string,
 *   port_modes: {port: number, mode: string, origin: string}[],
 *   certificate: Certificate | null, error: string, deviations: string[], repaired: number,
 *   drops: Record<string, number>, authorizations: Authorization[]}} Pod
 * @typedef {{kind: string, workload: string, source: string, port: number, connections: number,
 *   first: string, last: string, effect: string, reason: string, policy: string}} PlaintextCaller
 * @typedef {{workload: string, namespace: string, state: string, mode: string, mode_origin: string,
 *   port_modes: {port: number, mode: string}[], verdict: string, reasons: string[],
 *   since: string | null, without_identity: number, with_identity: number, refused: number,
 *   last: string | null, callers: PlaintextCaller[], left_out?: number}} PlaintextWorkload
 * @typedef {{schema: number, node: string, time: string, since: string, complete: string | null,
 *   verdict: string, workloads: PlaintextWorkload[], gaps: {begin: string, until: string, cause: string}[], truncated: boolean,
 *   problem: string}} Plaintext
 * @typedef {{check: string, cost: number, connections: number, reason: string, caller: string,
 *   policy: string}} Loss
 * @typedef {{workload: string, score: number | null, connections: number, losses: Loss[],
 *   left_out: number}} AsdexWorkload
 * @typedef {{schema: number, time: string, complete: boolean, score: number | null,
 *   workloads: AsdexWorkload[], problem: string}} Asdex
 * @typedef {{id: string, pod: string, direction: string, state: string, security: string,
 *   source: string, source_workload: string, source_identity: string, destination: string,
 *   destination_workload: string, destination_identity: string, service: string, hbone: string,
 *   tls_version: string, cipher: string, key_exchange: string, policy: string, rule: string,
 *   started: string, moved: string | null, received: number, sent: number}} Connection
 * @typedef {{schema: number, time: string, total: number, missed: number,
 *   connections: Connection[]}} Snapshot
 * @typedef {{status?: Status, graph?: Graph, plaintext?: Plaintext, asdex?: Asdex,
 *   connections?: Snapshot}} Answers What was answered; what was not is missing.
 * @typedef {{schema: number, time: string, version: string, node: string, trust_domain: string,
 *   ready: boolean, missing: string[], same_node?: string, pods: Pod[]}} Status
 */

const PATIENCE_MS = 15_000;

/** Words for what stands on another release's page rather than a wrong number. */
const KNOWN_SCHEMA = 1;

/** The agent did not answer as hoped; `kind` tells how. */
export class Unanswered extends Error {
  /** @param {"absent" | "forbidden" | "silent" | "wrong"} kind @param {string} message */
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

/** Ask for a document with a schema.
 * @param {string} path @returns {Promise<any>} Rejects with Unanswered. */
export async function ask(path) {
  let response;
  let text;
  try {
    response = await fetch(path, { signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store" });
    text = await response.text();
  } catch {
    throw new Unanswered("silent", "The agent does not answer. On the node: systemctl status nodeagent.");
  }
  if (response.status === 404)
    throw new Unanswered("absent", `This agent has no ${path.split("?")[0]}: it is of an older release, or does not record it.`);
  if (response.status === 401 || response.status === 403)
    throw new Unanswered("forbidden", `The agent refuses: ${text.trim()}`);
  if (!response.ok)
    throw new Unanswered("wrong", `The agent answers ${response.status} to ${path}: ${text.trim().slice(0, 200)}`);
  let document;
  try {
    document = JSON.parse(text);
  } catch {
    throw new Unanswered("wrong", `The answer to ${path} is no JSON.`);
  }
  if (document?.schema !== KNOWN_SCHEMA)
    throw new Unanswered("wrong", `${path} speaks schema ${document?.schema}, this page ${KNOWN_SCHEMA}: reload the page.`);
  return document;
}
