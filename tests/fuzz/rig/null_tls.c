/*
 * In place of tls.c: a cipher that does nothing. What is on the wire is the plaintext; a handshake
 * is over at once, or fails when the world says so; everybody's chain is one short certificate.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

#include "rig.h"

struct zt_ossl ossl;

struct ssl_st {
    const uint8_t *in; /* the worker's buffer, until it is read */
    size_t in_len;
    uint8_t *out;
    size_t out_len, out_size;
};

static struct ssl_st *ssl_new(SSL_CTX *ctx) {
    (void)ctx;
    return calloc(1, sizeof(struct ssl_st));
}

static void ssl_free(SSL *ssl) {
    free(ssl->out);
    free(ssl);
}

void null_tls_install(void) {
    memset(&ossl, 0, sizeof(ossl));
    ossl.SSL_new = ssl_new;
    ossl.SSL_free = ssl_free;
}

void zt_tls_configure_server(SSL_CTX *ctx) {
    (void)ctx;
}

int zt_tls_start(struct zt_h2 *h) {
    h->ssl = zt_credential_ssl(h->credential, h->server, &h->generation);
    return h->ssl ? 0 : ZT_R_NO_CREDENTIAL;
}

void zt_tls_input(struct zt_h2 *h, size_t n) {
    h->ssl->in = h->worker->in;
    h->ssl->in_len = n;
}

int zt_tls_handshake(struct zt_h2 *h, size_t n, char detail[ZT_DETAIL]) {
    zt_tls_input(h, n);
    if (world.handshake_err < 0) return 0; /* goes on for ever */
    if (world.handshake_err) {
        snprintf(detail, ZT_DETAIL, "the world says so");
        return world.handshake_err;
    }
    return -1;
}

int zt_tls_read(struct zt_h2 *h, uint8_t *to, size_t room, char detail[ZT_DETAIL]) {
    size_t n = h->ssl->in_len < room ? h->ssl->in_len : room;

    (void)detail;
    if (n) {
        memcpy(to, h->ssl->in, n);
        h->ssl->in += n;
        h->ssl->in_len -= n;
    }
    if (n < room && world.notify) h->input_end = true;
    return (int)n;
}

int zt_tls_write(struct zt_h2 *h, const uint8_t *data, size_t len) {
    struct ssl_st *s = h->ssl;

    if (s->out_len + len > s->out_size) {
        uint8_t *grown = realloc(s->out, s->out_len + len);

        if (!grown) return -EIO;
        s->out = grown;
        s->out_size = s->out_len + len;
    }
    if (len) memcpy(s->out + s->out_len, data, len);
    s->out_len += len;
    return 0;
}

int zt_tls_drain(struct zt_h2 *h) {
    struct ssl_st *s = h->ssl;

    while (h->out_sent < s->out_len) {
        ssize_t n;

        if (!h->writable) return 0;
        n = send(h->io.fd, s->out + h->out_sent, s->out_len - h->out_sent, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno != EAGAIN) return -errno;
            h->writable = false;
            return 0;
        }
        h->out_sent += (size_t)n;
    }
    h->out_sent = s->out_len = 0;
    return 1;
}

int zt_tls_chain(struct zt_h2 *h, struct zt_der chain[ZT_MAX_CHAIN]) {
    (void)h;
    chain[0].data = malloc(3);
    if (!chain[0].data) return -ENOMEM;
    memcpy(chain[0].data, "der", 3);
    chain[0].len = 3;
    return 1;
}

void zt_tls_about(const struct zt_h2 *h, struct zt_tls_about *out) {
    (void)h;
    snprintf(out->version, sizeof(out->version), "none");
}

void zt_tls_close_notify(struct zt_h2 *h) {
    zt_tls_drain(h);
}

void zt_tls_shrink(struct zt_h2 *h) {
    (void)h;
}
