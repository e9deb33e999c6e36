/*
 * TLS of one HBONE connection over memory BIOs: ciphertext is received into the worker's buffer and
 * decrypted from there, and encrypted into the connection's output BIO, many records at a time.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "h2.h"

struct zt_ossl ossl;

/* Output memory that an idle connection may keep. */
#define KEEP_OUTPUT (32 * 1024)
/* Bytes thrown away at once: what fits the first-level cache. */
#define DISCARD (16 * 1024)

static const unsigned char alpn_h2[] = {2, 'h', '2'};

/* RFC 7301, 3.2: a server that shares no protocol with the client ends with a fatal alert. */
static int select_h2(SSL *ssl, unsigned char **out, unsigned char *outlen, unsigned char *in,
                     unsigned int inlen, void *arg) {
    (void)ssl;
    (void)arg;
    for (unsigned int i = 0; i < inlen && i + in[i] < inlen; i += in[i] + 1u) {
        if (in[i] == 2 && memcmp(in + i, alpn_h2, sizeof(alpn_h2)) == 0) {
            *out = in + i + 1;
            *outlen = 2;
            return OSSL_TLSEXT_ERR_OK;
        }
    }
    return OSSL_TLSEXT_ERR_ALERT_FATAL;
}

void zt_tls_configure_server(SSL_CTX *ctx) {
    ossl.SSL_CTX_set_alpn_select_cb(ctx, select_h2, NULL);
}

/* --- set-up ----------------------------------------------------------------------------------------------- */

int zt_tls_start(struct zt_h2 *h) {
    h->ssl = zt_credential_ssl(h->credential, h->server, &h->generation);
    if (!h->ssl) return ZT_R_NO_CREDENTIAL;
    h->rbio = ossl.BIO_new(ossl.BIO_s_mem());
    h->wbio = ossl.BIO_new(ossl.BIO_s_mem());
    if (!h->rbio || !h->wbio) {
        if (h->rbio) ossl.BIO_free(h->rbio);
        if (h->wbio) ossl.BIO_free(h->wbio);
        h->rbio = h->wbio = NULL;
        return ZT_R_NO_MEMORY;
    }
    ossl.BIO_set_mem_eof_return(h->rbio, -1);
    ossl.SSL_set_bio(h->ssl, h->rbio, h->wbio);
    /* A read comes back after each ticket or KeyUpdate, so that zt_tls_read can count them. */
    ossl.SSL_clear_mode(h->ssl, OSSL_MODE_AUTO_RETRY);
    if (h->server)
        ossl.SSL_set_accept_state(h->ssl);
    else
        ossl.SSL_set_connect_state(h->ssl);
    return 0;
}

/* SSL_set_bio takes over `rbio` and frees the one before; the output BIO is the same and stays. */
static int set_input(struct zt_h2 *h, size_t n) {
    BIO *rbio = ossl.BIO_new_mem_buf(h->worker->in, (int)n);

    if (!rbio) return -ENOMEM;
    ossl.BIO_set_mem_eof_return(rbio, -1);
    ossl.SSL_set_bio(h->ssl, rbio, h->wbio);
    h->rbio = rbio;
    return 0;
}

void zt_tls_input(struct zt_h2 *h, size_t n) {
    if (set_input(h, n) < 0) h->fate = ZT_R_NO_MEMORY;
}

/* --- what went wrong ---------------------------------------------------------------------------------------- */

/* The reason of OpenSSL's error, and words for the log. Library numbers are not for matching; what
 * tells a peer's alert from our own refusal is the verify result. */
static int explain(struct zt_h2 *h, char detail[ZT_DETAIL]) {
    long verify = ossl.SSL_get_verify_result(h->ssl);
    unsigned long code = ossl.ERR_get_error();
    const char *text = code ? ossl.ERR_reason_error_string(code) : NULL;
    int reason = ZT_R_TLS_FAILED;

    if (!text) text = "unknown TLS error";
    if (verify != OSSL_V_OK) {
        text = ossl.X509_verify_cert_error_string(verify);
        switch (verify) {
        case OSSL_V_ERR_CERT_HAS_EXPIRED:
            reason = ZT_R_CERT_EXPIRED;
            break;
        case OSSL_V_ERR_CERT_NOT_YET_VALID:
            reason = ZT_R_CERT_NOT_YET_VALID;
            break;
        case OSSL_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
        case OSSL_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
        case OSSL_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
        case OSSL_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
            reason = ZT_R_CERT_UNTRUSTED;
            break;
        default:
            reason = ZT_R_CERT_INVALID;
        }
    } else if (strstr(text, "did not return a certificate")) {
        reason = ZT_R_CERT_MISSING;
    } else if (strstr(text, "no application protocol")) {
        reason = ZT_R_TLS_ALPN;
    } else if (strstr(text, "alert")) {
        reason = ZT_R_TLS_ALERT;
    }
    snprintf(detail, ZT_DETAIL, "%s", text);
    ossl.ERR_clear_error();
    return reason;
}

/* --- handshake ------------------------------------------------------------------------------------------------ */

static bool alpn_is_h2(struct zt_h2 *h) {
    unsigned char *alpn;
    unsigned int len;

    ossl.SSL_get0_alpn_selected(h->ssl, &alpn, &len);
    return len == 2 && memcmp(alpn, "h2", 2) == 0;
}

int zt_tls_handshake(struct zt_h2 *h, size_t n, char detail[ZT_DETAIL]) {
    int rv;

    if (n && set_input(h, n) < 0) return ZT_R_NO_MEMORY;
    ossl.ERR_clear_error();
    rv = ossl.SSL_do_handshake(h->ssl);
    if (rv == 1) {
        if (alpn_is_h2(h)) return -1;
        snprintf(detail, ZT_DETAIL, "the peer did not choose ALPN h2");
        return ZT_R_TLS_ALPN;
    }
    if (ossl.SSL_get_error(h->ssl, rv) == OSSL_ERROR_WANT_READ) return 0;
    return explain(h, detail);
}

static size_t waiting(BIO *bio) {
    char *data;
    long len = ossl.BIO_get_mem_data(bio, &data);

    return len > 0 ? (size_t)len : 0;
}

/* --- data --------------------------------------------------------------------------------------------------------- */

int zt_tls_read(struct zt_h2 *h, uint8_t *to, size_t room, char detail[ZT_DETAIL]) {
    size_t used = 0;

    while (room - used > 0) {
        int n, error;

        n = ossl.SSL_read(h->ssl, to + used, (int)(room - used));
        if (n > 0) {
            used += (size_t)n;
            continue;
        }
        error = ossl.SSL_get_error(h->ssl, n);
        if (error == OSSL_ERROR_ZERO_RETURN) {
            h->input_end = true;
            break;
        }
        if (error != OSSL_ERROR_WANT_READ) return -explain(h, detail);
        /* Drained, unless it was a post-handshake message that ended the read (RFC 8446, 4.6). */
        if (waiting(h->rbio) == 0) break;
        if (++h->post_handshake > ZT_MAX_POST_HANDSHAKE) {
            snprintf(detail, ZT_DETAIL, "more than %d post-handshake messages",
                     ZT_MAX_POST_HANDSHAKE);
            return -ZT_R_TLS_FAILED;
        }
    }
    return (int)used;
}

int zt_tls_write(struct zt_h2 *h, const uint8_t *data, size_t len) {
    while (len) {
        int n = ossl.SSL_write(h->ssl, (void *)(uintptr_t)data, (int)len);

        if (n <= 0) {
            ossl.ERR_clear_error();
            return -EIO;
        }
        data += n;
        len -= (size_t)n;
    }
    return 0;
}

int zt_tls_drain(struct zt_h2 *h) {
    char *data;
    long len = ossl.BIO_get_mem_data(h->wbio, &data);

    if (len <= 0) return 1;
    if ((size_t)len > h->wbio_peak) h->wbio_peak = (size_t)len;
    while (h->out_sent < (size_t)len) {
        ssize_t n;

        if (!h->writable) return 0;
        n = send(h->io.fd, data + h->out_sent, (size_t)len - h->out_sent, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EINTR) continue;
            if (errno != EAGAIN) return -errno;
            h->writable = false;
            return 0;
        }
        h->out_sent += (size_t)n;
    }
    /* Reading is the only way to empty the BIO; `in` is free here, and warm in the cache. */
    h->out_sent = 0;
    while (len > 0) {
        int n = ossl.BIO_read(h->wbio, h->worker->in, len < DISCARD ? (int)len : DISCARD);

        if (n <= 0) return -EIO;
        len -= n;
    }
    return 1;
}

void zt_tls_shrink(struct zt_h2 *h) {
    char *data;
    BIO *fresh;

    if (h->wbio_peak <= KEEP_OUTPUT || ossl.BIO_get_mem_data(h->wbio, &data) > 0) return;
    fresh = ossl.BIO_new(ossl.BIO_s_mem());
    if (!fresh) return;
    ossl.SSL_set_bio(h->ssl, h->rbio, fresh);
    h->wbio = fresh;
    h->wbio_peak = 0;
}

void zt_tls_close_notify(struct zt_h2 *h) {
    ossl.ERR_clear_error();
    if (ossl.SSL_shutdown(h->ssl) < 0) ossl.ERR_clear_error();
    zt_tls_drain(h);
}

/* --- what was agreed on --------------------------------------------------------------------------------------------- */

static void name(char *to, size_t room, const char *from) {
    snprintf(to, room, "%s", from ? from : "");
}

void zt_tls_about(const struct zt_h2 *h, struct zt_tls_about *out) {
    SSL_CIPHER *cipher = ossl.SSL_get_current_cipher(h->ssl);

    name(out->version, sizeof(out->version), ossl.SSL_get_version(h->ssl));
    name(out->cipher, sizeof(out->cipher), cipher ? ossl.SSL_CIPHER_get_name(cipher) : NULL);
    name(out->group, sizeof(out->group), ossl.SSL_get0_group_name(h->ssl));
}

/* --- the peer's chain --------------------------------------------------------------------------------------------- */

static int to_der(X509 *cert, struct zt_der *out) {
    BIO *bio = ossl.BIO_new(ossl.BIO_s_mem());
    char *data;
    long len;
    int rv = -ENOMEM;

    if (!bio) return rv;
    if (ossl.i2d_X509_bio(bio, cert) == 1 && (len = ossl.BIO_get_mem_data(bio, &data)) > 0) {
        out->data = malloc((size_t)len);
        if (out->data) {
            memcpy(out->data, data, (size_t)len);
            out->len = (size_t)len;
            rv = 0;
        }
    }
    ossl.BIO_free(bio);
    return rv;
}

int zt_tls_chain(struct zt_h2 *h, struct zt_der chain[ZT_MAX_CHAIN]) {
    X509 *leaf = ossl.SSL_get_peer_certificate(h->ssl);
    X509_STACK *stack = ossl.SSL_get_peer_cert_chain(h->ssl);
    int total = stack ? ossl.sk_X509_num(stack) : 0, n = 0, rv = 0;

    if (!leaf) return -ENOENT;
    rv = to_der(leaf, &chain[n]);
    if (!rv) n++;
    /* A client finds the leaf in the stack, a server does not. */
    for (int i = h->server ? 0 : 1; i < total && !rv; i++) {
        if (n == ZT_MAX_CHAIN) rv = -E2BIG;
        if (!rv) rv = to_der(ossl.sk_X509_value(stack, i), &chain[n]);
        if (!rv) n++;
    }
    ossl.X509_free(leaf);
    if (!rv) return n;
    while (n) free(chain[--n].data);
    return rv;
}
