"""The C core: accepts, decides by table, encrypts, frames and relays, on its own threads.

It owns every socket of the data path and every byte on it. It judges nothing: what its tables do
not hold it asks for by an upcall, and waits, bounded by a deadline. It never calls into Python;
Python polls `event_fd` and collects. All methods are called from one Python thread.

Addresses are 16 bytes, IPv4 as IPv4-mapped (RFC 4291, 2.5.5.2). Times are microseconds of
CLOCK_MONOTONIC, durations microseconds. Numbers (pods, credentials, peers, decisions, series,
identities) are chosen by the caller, positive, below 2**63, and never used twice.
"""

from typing import Final, NamedTuple

OUTBOUND: Final[int]  # kinds of upcall and of ended connections
INBOUND_PLAINTEXT: Final[int]
INBOUND_HBONE: Final[int]
PEER_CERTIFICATE: Final[int]  # upcall only: a client of ours-as-server showed its chain
SERVER_CERTIFICATE: Final[int]  # upcall only: a server that we dialled showed its chain

REASONS: Final[tuple[str, ...]]
"""Why a connection ended: the closed set of tokens, index = number used everywhere below."""
HISTOGRAM_BOUNDS_US: Final[tuple[int, ...]]
"""Upper bounds of the latency histograms' buckets, microseconds; one more bucket is unbounded."""
DEADLINES: Final[dict[str, int]]
"""The deadlines' names and defaults, microseconds, in the order of `Stats.expired`."""
CONNECTION_STATES: Final[tuple[str, ...]]
LIMITS: Final[dict[str, int]]
"""The limits of one pod and their defaults; 0 is no limit."""
LINE_FIELDS: Final[tuple[str, ...]]
"""What differs between the lines of one decision, in the order of its bytes; see `describe`."""
FUNCTIONS: Final[dict[str, str]]
"""OpenSSL functions that the core calls: name to C declaration as cffi prints it."""

class Upcall(NamedTuple):
    id: int
    kind: int
    epoch: int
    pod: int
    source: bytes  # client address; for SERVER_CERTIFICATE empty
    source_port: int
    destination: bytes  # original destination; for SERVER_CERTIFICATE the peer's address
    destination_port: int
    identity: int  # INBOUND_HBONE: the number answered for the peer's certificate; else 0
    peer: int  # SERVER_CERTIFICATE: the peer's number; else 0
    chain: tuple[bytes, ...]  # *_CERTIFICATE: DER, leaf first; else empty

class Ended(NamedTuple):
    """One relayed (or refused) connection has ended. `decision` is 0 when none was reached."""

    kind: int
    pod: int
    decision: int
    identity: int
    source: bytes
    source_port: int
    destination: bytes
    destination_port: int
    upstream: bytes  # whom the core dialled; empty if nobody
    upstream_port: int
    started_us: int
    duration_us: int
    received: int  # bytes from the application side client towards the server
    sent: int  # bytes towards the client
    reason: int  # index into REASONS
    trace_id: bytes  # 16 bytes (W3C Trace Context); empty: not sampled, as what follows
    span_id: bytes  # 8 bytes
    parent_id: bytes  # the peer's span; zeros: none
    opened_us: int  # when bytes could flow; 0: never

class Failed(NamedTuple):
    """A TLS or HTTP/2 connection failed before it carried a stream (handshake, certificate …)."""

    kind: int  # PEER_CERTIFICATE: we were the server; SERVER_CERTIFICATE: the client
    pod: int
    peer: int
    address: bytes
    port: int
    reason: int
    detail: str  # OpenSSL's reason string or errno text, at most 120 characters

class Listed(NamedTuple):
    """One application connection that is there. Strings are OpenSSL's names, "" without HBONE."""

    number: int  # of the connection, never used again in this process
    kind: int
    state: int  # index into CONNECTION_STATES
    pod: int
    decision: int  # 0: none yet
    identity: int  # whom the other side of HBONE has proved to be, client or server; 0: nobody
    source: bytes
    source_port: int
    destination: bytes
    destination_port: int
    upstream: bytes
    upstream_port: int
    started_us: int
    moved_us: int  # when bytes last reached one of its ends; 0: never
    received: int
    sent: int
    tls_version: str
    cipher: str
    group: str  # of the key exchange

class SeriesCounters(NamedTuple):
    opened: int
    closed: int
    failed: tuple[int, ...]  # by reason
    received: int
    sent: int

class PodCounters(NamedTuple):
    """What a pod has now, and how often it was refused something, by reason."""

    connections: int
    descriptors: int  # of its connections
    dials: int  # TCP connects under way
    questions: int
    handshakes: int
    held_bytes: int
    refused: tuple[int, ...]

class Stats(NamedTuple):
    connections: int  # open application connections
    tls_connections: int  # open HBONE connections, both sides
    descriptors: int  # of connections
    descriptors_most: int  # that connections may take, of RLIMIT_NOFILE
    held_bytes: int  # that came for applications which do not read: waiting now
    handshakes_client: tuple[int, ...]  # histogram, see HISTOGRAM_BOUNDS_US
    handshakes_client_sum_us: int
    handshakes_server: tuple[int, ...]
    handshakes_server_sum_us: int
    handshake_failures: tuple[int, ...]  # by reason
    expired: tuple[int, ...]  # waits that a deadline has ended, by deadline (DEADLINES)
    upcalls: int
    upcall_latency: tuple[int, ...]  # histogram
    upcall_latency_sum_us: int
    table_hits: int
    events_lost: int
    workers: tuple[tuple[int, int], ...]  # per worker: connections open, connections accepted
    last_loop_us: tuple[int, ...]  # per worker: when its loop last turned (watchdog)
    traces_left_out: int  # connections that were to be traced, beyond 200 a second and worker

class Core:
    def __init__(self, workers: int, functions: dict[str, int]) -> None:
        """`functions` maps every name in FUNCTIONS to its address. Raises ValueError."""
    def start(self) -> None: ...
    def stop(self) -> None:
        """End every connection and join the threads."""
    def drain(self) -> None:
        """Hand over to a successor that has the same listening sockets: close ours, without losing
        what waits in them; say GOAWAY to the clients of HBONE; judge and serve what is there, until
        the deadline `drain`. Pods that are added later are not listened for. Again: no effect.
        Raises OSError before `start`."""
    def drained(self) -> bool:
        """True when a draining core carries nothing any more, and `stop` would cut nothing."""
    @property
    def event_fd(self) -> int:
        """Readable while upcalls, ended connections, failures or freed decisions wait."""
    @property
    def epoch(self) -> int: ...
    def advance_epoch(self) -> int:
        """From this call's return on, no table entry made before it is used again."""

    def set_deadline(self, name: str, us: int) -> None:
        """Change a deadline of DEADLINES, also for the waits under way; in force within half a
        second. Raises KeyError, and ValueError unless 1 us to a week."""

    def set_limit(self, name: str, most: int) -> None:
        """Change a limit of LIMITS, for what comes from now on. Raises KeyError, ValueError."""

    def set_tracing(self, on: bool, parts: int) -> None:
        """Trace `parts` of 2^32 of the connections that begin here from now on, and those whose
        peer says by `traceparent` that it traces them. Each is then in `ended`, and not in `lines`.
        Off is the beginning. Raises ValueError."""

    # pods. Descriptors are duplicated; the caller keeps its own.
    def add_pod(
        self,
        pod: int,
        netns: int,
        outbound: int,
        inbound: int,
        hbone: int,
        addresses: tuple[bytes, ...],
        credential: int,
    ) -> None: ...
    def remove_pod(self, pod: int) -> None:
        """Stop listening and end every connection of the pod."""
    def read_pod(self, pod: int) -> PodCounters: ...

    # credentials: a client and a server SSL_CTX of one identity. Setting again rotates: new
    # handshakes use the new contexts, pooled connections take no new stream, streams live on.
    def set_credential(self, credential: int, client_ctx: int, server_ctx: int) -> None: ...
    def remove_credential(self, credential: int) -> None: ...

    # peers: a pool of HBONE connections from `pod` to `address`, opened on demand, per worker.
    def add_peer(self, peer: int, pod: int, address: bytes, port: int, credential: int) -> None: ...
    def remove_peer(self, peer: int) -> None:
        """No new streams; connections close when their streams end."""
    def close_peer(self, peer: int, reason: int) -> None:
        """Cut the pool's connections and their streams at once."""
    def suspect_peer(self, peer: int) -> None:
        """Ask the pool's connections at once whether the peer is there; those that do not answer
        within the deadline `ping_suspect` are cut."""

    # series: counters that outlive decisions.
    def add_series(self, series: int) -> None: ...
    def read_series(self, series: int) -> SeriesCounters: ...
    def remove_series(self, series: int) -> None: ...

    # decisions; each is born with one reference, the caller's, until release_decision.
    def decide_refuse(self, decision: int, series: int, reason: int) -> None: ...
    def decide_forward(self, decision: int, series: int, address: bytes, port: int) -> None:
        """Plain TCP from the pod's namespace, mark 0x539, from the client's own address.
        `address` empty: to the original destination."""
    def decide_deliver(self, decision: int, series: int) -> None:
        """Inbound: to the application at the original destination, from the client's address."""
    def decide_hand_over(
        self, decision: int, series: int, mirror: int, pod: int, address: bytes, port: int
    ) -> None:
        """Plain TCP inside the namespace of another pod of this node, which has `address`: to the
        application there, from the client's address, as `decide_deliver` does. Both series count
        it; removing either pod ends it."""
    def decide_tunnel(
        self, decision: int, series: int, peer: int, authority: str, baggage: str, host: str
    ) -> None:
        """CONNECT `authority` over the peer's pool; `host` is `forwarded`'s host, or empty."""
    def decide_balance(self, decision: int, choices: tuple[tuple[int, int], ...]) -> None:
        """(decision, weight): the choice is made for each connection. Not nested."""
    def describe(self, decision: int, form: bytes) -> None:
        """Say what the access log says of connections under this decision that end as they should:
        one or two lines, in which byte n stands for what LINE_FIELDS[n - 1] names. Their ends are
        then in `lines`, and not in `ended`. To be called before the decision is an answer, once.
        Raises ValueError (no such form, or called again), KeyError."""
    def release_decision(self, decision: int) -> None: ...
    def kill_decision(self, decision: int, reason: int) -> None:
        """Cut the live connections that were made under it, on every worker, now; also after
        release_decision, and without effect once nothing refers to it."""
    def kill_identity(self, identity: int, reason: int) -> None:
        """Cut the inbound HBONE connections that proved this identity, and their streams."""

    # upcalls
    def upcalls(self, most: int) -> list[Upcall]: ...
    def answer(self, upcall: int, epoch: int, decision: int) -> bool:
        """Install for the upcall's key and go on. False if `epoch` is no longer current: the
        core asks again. An id that has timed out is ignored (True)."""
    def answer_certificate(self, upcall: int, identity: int, reason: int) -> None:
        """`identity` > 0 accepts (for SERVER_CERTIFICATE any positive number); otherwise the
        connection ends with `reason`."""

    # what happened
    def ended(self, most: int) -> list[Ended]: ...
    def lines(self) -> tuple[bytes, int]:
        """Take the lines that are ready, and how many they are; at most 16 MiB wait."""
    def failed(self, most: int) -> list[Failed]: ...
    def freed(self, most: int) -> list[int]:
        """Decisions that nothing refers to any more; reported after the last `Ended` of theirs
        has been collected."""
    def stats(self) -> Stats: ...
    def list_connections(self) -> None:
        """Have each worker copy what it carries, a few hundred connections a turn; `event_fd` tells
        when some are ready. Raises BlockingIOError while the last listing has not been taken to its
        end; OSError before `start`; MemoryError."""
    def listed(self, most: int) -> tuple[list[Listed], bool, int]:
        """Take up to `most` of those that are ready; True when none is left and none will come; how
        many found no room (131,072 have it)."""
