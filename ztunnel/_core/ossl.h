/*
 * The OpenSSL that `cryptography` ships, reached through a table of checked function pointers.
 *
 * Each row states the C declaration exactly as cffi prints it; ztunnel/tls.py compares it with the
 * installed library before a pointer is handed over, so a change there is a clear error at start
 * and never a call through a wrong type. One OpenSSL in the process, and the newest.
 */
#ifndef ZT_OSSL_H
#define ZT_OSSL_H

#include <stdint.h>

typedef struct ssl_st SSL;
typedef struct ssl_ctx_st SSL_CTX;
typedef struct bio_st BIO;
typedef struct bio_method_st BIO_METHOD;
typedef struct x509_st X509;
typedef struct ssl_cipher_st SSL_CIPHER;
typedef struct stack_st_X509 X509_STACK;
typedef int ossl_alpn_cb(SSL *, unsigned char **, unsigned char *, unsigned char *, unsigned int,
                         void *);

/* X(name, returns, arguments, declaration as cffi prints it) */
#define ZT_OSSL(X)                                                                                \
    X(SSL_new, SSL *, (SSL_CTX *), "SSL *(*)(SSL_CTX *)")                                         \
    X(SSL_free, void, (SSL *), "void(*)(SSL *)")                                                  \
    X(SSL_set_bio, void, (SSL *, BIO *, BIO *), "void(*)(SSL *, BIO *, BIO *)")                   \
    X(SSL_set_accept_state, void, (SSL *), "void(*)(SSL *)")                                      \
    X(SSL_set_connect_state, void, (SSL *), "void(*)(SSL *)")                                     \
    X(SSL_do_handshake, int, (SSL *), "int(*)(SSL *)")                                            \
    X(SSL_read, int, (SSL *, void *, int), "int(*)(SSL *, void *, int)")                          \
    X(SSL_write, int, (SSL *, void *, int), "int(*)(SSL *, void *, int)")                         \
    X(SSL_get_error, int, (SSL *, int), "int(*)(SSL *, int)")                                     \
    X(SSL_shutdown, int, (SSL *), "int(*)(SSL *)")                                                \
    X(SSL_get_peer_certificate, X509 *, (SSL *), "X509 *(*)(SSL *)")                              \
    X(SSL_get_peer_cert_chain, X509_STACK *, (SSL *), "Cryptography_STACK_OF_X509 *(*)(SSL *)")   \
    X(SSL_get_version, char *, (SSL *), "char *(*)(SSL *)")                                       \
    X(SSL_get_current_cipher, SSL_CIPHER *, (SSL *), "SSL_CIPHER *(*)(SSL *)")                    \
    X(SSL_CIPHER_get_name, char *, (SSL_CIPHER *), "char *(*)(SSL_CIPHER *)")                     \
    X(SSL_get0_group_name, char *, (SSL *), "char *(*)(SSL *)")                                   \
    X(SSL_get_verify_result, long, (SSL *), "long(*)(SSL *)")                                     \
    X(SSL_get0_alpn_selected, void, (SSL *, unsigned char **, unsigned int *),                    \
      "void(*)(SSL *, unsigned char * *, unsigned int *)")                                        \
    X(SSL_CTX_set_alpn_select_cb, void, (SSL_CTX *, ossl_alpn_cb *, void *),                      \
      "void(*)(SSL_CTX *, int(*)(SSL *, unsigned char * *, unsigned char *, unsigned char *, "    \
      "unsigned int, void *), void *)")                                                           \
    X(SSL_clear_mode, long, (SSL *, long), "long(*)(SSL *, long)")                                \
    X(BIO_new, BIO *, (BIO_METHOD *), "BIO *(*)(BIO_METHOD *)")                                   \
    X(BIO_free, int, (BIO *), "int(*)(BIO *)")                                                    \
    X(BIO_s_mem, BIO_METHOD *, (void), "BIO_METHOD *(*)()")                                       \
    X(BIO_new_mem_buf, BIO *, (void *, int), "BIO *(*)(void *, int)")                             \
    X(BIO_read, int, (BIO *, void *, int), "int(*)(BIO *, void *, int)")                          \
    X(BIO_get_mem_data, long, (BIO *, char **), "long(*)(BIO *, char * *)")                       \
    X(BIO_set_mem_eof_return, long, (BIO *, int), "long(*)(BIO *, int)")                          \
    X(X509_free, void, (X509 *), "void(*)(X509 *)")                                               \
    X(i2d_X509_bio, int, (BIO *, X509 *), "int(*)(BIO *, X509 *)")                                \
    X(sk_X509_num, int, (X509_STACK *), "int(*)(Cryptography_STACK_OF_X509 *)")                   \
    X(sk_X509_value, X509 *, (X509_STACK *, int), "X509 *(*)(Cryptography_STACK_OF_X509 *, int)") \
    X(ERR_get_error, unsigned long, (void), "unsigned long(*)()")                                 \
    X(ERR_clear_error, void, (void), "void(*)()")                                                 \
    X(ERR_reason_error_string, char *, (unsigned long), "char *(*)(unsigned long)")               \
    X(X509_verify_cert_error_string, char *, (long), "char *(*)(long)")

struct zt_ossl {
#define X(name, returns, arguments, declaration) returns(*name) arguments;
    ZT_OSSL(X)
#undef X
};

/* Filled once, before the first thread starts; read-only afterwards. */
extern struct zt_ossl ossl;

/* Values of OpenSSL's public ABI (ssl.h, x509_vfy.h), stable since 1.1. */
enum {
    OSSL_ERROR_SSL = 1,
    OSSL_ERROR_WANT_READ = 2,
    OSSL_ERROR_SYSCALL = 5,
    OSSL_ERROR_ZERO_RETURN = 6,
    OSSL_MODE_AUTO_RETRY = 4,
    OSSL_TLSEXT_ERR_OK = 0,
    OSSL_TLSEXT_ERR_ALERT_FATAL = 2,
    OSSL_V_OK = 0,
    OSSL_V_ERR_CERT_NOT_YET_VALID = 9,
    OSSL_V_ERR_CERT_HAS_EXPIRED = 10,
    OSSL_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT = 18,
    OSSL_V_ERR_SELF_SIGNED_CERT_IN_CHAIN = 19,
    OSSL_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY = 20,
    OSSL_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE = 21,
};

#endif
