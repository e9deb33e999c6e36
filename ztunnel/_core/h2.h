/*
 * One HBONE connection: TLS 1.3 over TCP to or from a peer, HTTP/2 on it, and the streams that are
 * application connections. Server and client differ in who speaks first and who owns the pool.
 *
 * Outgoing bytes of a turn are gathered as plaintext (frames of all streams, data read straight
 * from the applications' sockets behind room for its frame header), encrypted in whole records and
 * sent at once; more is encrypted only when the socket has taken everything before it, so an HBONE
 * connection holds at most ZT_CHUNK of ciphertext. Incoming bytes go the same way back.
 *
 * Life: CREDENTIAL -> (CONNECT ->) HANDSHAKE -> JUDGED -> OPEN -> ENDED.
 */
#ifndef ZT_H2_H
#define ZT_H2_H

#include <nghttp2/nghttp2.h>

#include "conn.h"
#include "glitch.h"

enum zt_h2_state {
    ZT_H_CREDENTIAL, /* there is no certificate for this pod yet */
    ZT_H_CONNECTING,
    ZT_H_HANDSHAKE,
    ZT_H_JUDGED, /* the peer's certificate is with the control side */
    ZT_H_OPEN,
    ZT_H_ENDED,
};

struct zt_h2 {
    struct zt_io io;
    struct zt_list link;      /* worker's h2s */
    struct zt_list pool_link; /* client: the pool's connections */
    struct zt_list dirty;
    struct zt_timer timer;
    struct zt_task task;
    struct zt_grave grave;
    struct zt_worker *worker;
    struct zt_pod *pod;
    struct zt_peer *peer; /* client only */
    struct zt_credential *credential;
    enum zt_h2_state state;
    bool dials; /* counted by the pod */
    bool server, readable, writable, hangup, retiring, pinged;
    bool settled;        /* the peer's SETTINGS have come */
    bool used;           /* client: a stream has begun on it */
    bool input_end;      /* close_notify, FIN or error: nothing more will come */
    bool receiving;      /* within nghttp2_session_mem_recv: chunks may be gathered */
    bool in_session;     /* nghttp2 is on the stack: do not tear the session down */
    enum zt_reason fate; /* what to end with once nghttp2 is off the stack; 0: nothing */
    uint64_t identity;   /* server: number of the proven identity */
    uint64_t proven;     /* the same, of clients too */
    uint64_t upcall, generation, started, heard, idle_since;
    uint64_t noticed;       /* when the first GOAWAY went out (RFC 9113, 6.8); 0: not yet */
    bool parted;            /* the second went out too: no stream begins any more */
    struct zt_addr address; /* the other side */
    struct zt_addr local;
    SSL *ssl;
    BIO *rbio, *wbio;           /* owned by ssl */
    size_t wbio_peak, out_sent; /* out_sent: how much of wbio the socket has taken */
    int post_handshake;         /* tickets and KeyUpdates so far */
    uint8_t *early;             /* plaintext that came before the peer was judged */
    size_t early_len;
    nghttp2_session *session;
    struct zt_list streams; /* struct zt_conn by stream.link */
    int nstreams;
    size_t header_bytes; /* decoded, of the header block at hand */
    uint32_t grown;      /* what its streams' windows have grown by: <= ZT_CONN_GROWTH */
    struct zt_glitch glitch;
    const char *why; /* of the fate, for the log; static */
    char *complaint; /* libnghttp2's, when it ended the connection; or NULL */
};

/* --- h2.c: the connection's life -------------------------------------------------------------------- */

/* An accepted HBONE socket; descriptor and reference pass over. */
void zt_h2_accepted(struct zt_worker *w, struct zt_pod *pod, int fd, const struct zt_addr *source,
                    const struct zt_addr *destination);
/* Begins a connection to the peer, which is in its pool from then on; false without memory. */
bool zt_h2_dial(struct zt_worker *w, struct zt_peer *peer);
/* There may be a certificate now: begin, if there is. */
void zt_h2_certified(struct zt_h2 *h);
void zt_h2_certificate(struct zt_worker *w, uint64_t upcall, uint64_t identity,
                       enum zt_reason reason);
/* The peer has probably gone: ask it, and do not wait long. */
void zt_h2_suspect(struct zt_h2 *h);
/* End the connection and its streams (now, or once nghttp2 is off the stack). */
void zt_h2_end(struct zt_h2 *h, enum zt_reason reason, const char *detail);
void zt_h2_flush_dirty(struct zt_worker *w);
void zt_h2_mark_dirty(struct zt_h2 *h);
/* The peer's SETTINGS have come: the first, or others. */
void zt_h2_settled(struct zt_h2 *h);
/* Something was read or written: the connection lives. */
void zt_h2_idle_check(struct zt_h2 *h);
/* The worker drains: tell the peer to take new streams elsewhere, or let an idle one go. */
void zt_h2_drain(struct zt_h2 *h);
/* The peer has seen the first GOAWAY, or had the time to: say which stream was the last. */
void zt_h2_part(struct zt_h2 *h);

/* --- tls.c: bytes in and out -------------------------------------------------------------------------- */

/* All return 0, or a reason (> 0) and its detail for the log. */
int zt_tls_start(struct zt_h2 *h);
/* Feeds ciphertext of the worker's `in`; 0 while the handshake goes on, -1 when it is complete. */
int zt_tls_handshake(struct zt_h2 *h, size_t n, char detail[ZT_DETAIL]);
void zt_tls_input(struct zt_h2 *h, size_t n);
/* Decrypts what is left of the input into `to`; bytes, 0 when drained, or -reason. */
int zt_tls_read(struct zt_h2 *h, uint8_t *to, size_t room, char detail[ZT_DETAIL]);
int zt_tls_write(struct zt_h2 *h, const uint8_t *data, size_t len);
/* Sends the ciphertext that waits: 1 all gone, 0 the socket is full, -errno. */
int zt_tls_drain(struct zt_h2 *h);
/* The peer's chain as DER, leaf first; the number of certificates or -errno. */
int zt_tls_chain(struct zt_h2 *h, struct zt_der chain[ZT_MAX_CHAIN]);
void zt_tls_close_notify(struct zt_h2 *h);
/* Returns the memory that a burst of output left behind. */
void zt_tls_shrink(struct zt_h2 *h);
void zt_tls_configure_server(SSL_CTX *ctx);
/* What a handshake that is complete has agreed on. */
void zt_tls_about(const struct zt_h2 *h, struct zt_tls_about *out);

/* --- stream.c: HTTP/2 and the streams ------------------------------------------------------------------ */

int zt_session_start(struct zt_h2 *h);
/* The connection ends when nghttp2 had no memory: it has forgotten what it was told. */
void zt_session_check(struct zt_h2 *h, int rv);
int zt_session_input(struct zt_h2 *h, const uint8_t *data, size_t len);
/* Sends CONNECT for `c`; 0 or -errno. */
int zt_stream_request(struct zt_h2 *h, struct zt_conn *c);
/* Answers the CONNECT of `c`; anything but 200 ends the stream. */
void zt_stream_answer(struct zt_conn *c, int status);
/* The application's socket has something to read. */
void zt_stream_resume(struct zt_conn *c);
/* Writes what waits for the application; ends the connection when both sides are done. */
void zt_stream_deliver(struct zt_conn *c);
/* Lets go of the stream, with RST_STREAM if it is still alive. */
void zt_stream_drop(struct zt_conn *c, uint32_t error_code);
void zt_stream_free_pending(struct zt_conn *c);
/* How many streams the peer and we allow at a time. */
int zt_session_limit(const struct zt_h2 *h);
/* How many more they allow now. */
int zt_session_room(struct zt_h2 *h);

#endif
