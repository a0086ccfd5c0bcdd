/* http/tls.c: a certificate and its key for libmicrohttpd, which speaks TLS by GnuTLS. */
#include "base/alloc.h"
#include "base/file.h"
#include "http/server.h"

#include <errno.h>
#include <gnutls/gnutls.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

enum { PEM_BYTES_MAX = 1 << 20, OTHERS = 077 };

static kvl_status check_mode(const char *path, kvl_error *error)
{
    struct stat about;
    if (stat(path, &about) != 0)
        return KVL_FAIL(error, KVL_ERR_NOT_FOUND, "--tls-key %s: %s", path, strerror(errno));
    if ((about.st_mode & OTHERS) != 0)
        return KVL_FAIL(error, KVL_ERR_DENIED,
                        "--tls-key %s may be read by others than its owner: chmod 600 %s", path,
                        path);
    return KVL_OK;
}

/* libmicrohttpd would take a wrong pair and fail every handshake later. */
static kvl_status check_pair(const kvl_http *http, const kvl_http_options *options,
                             kvl_error *error)
{
    const gnutls_datum_t certificate = {(unsigned char *)http->certificate,
                                        (unsigned)strlen(http->certificate)};
    const gnutls_datum_t key = {(unsigned char *)http->certificate_key,
                                (unsigned)strlen(http->certificate_key)};
    gnutls_certificate_credentials_t pair = NULL;
    if (gnutls_certificate_allocate_credentials(&pair) != GNUTLS_E_SUCCESS)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a certificate");
    const int code =
        gnutls_certificate_set_x509_key_mem(pair, &certificate, &key, GNUTLS_X509_FMT_PEM);
    gnutls_certificate_free_credentials(pair);
    if (code >= 0) return KVL_OK;
    return KVL_FAIL(
        error, KVL_ERR_INVALID, "--tls-certificate %s and --tls-key %s are no pair in PEM: %s",
        options->certificate_file, options->certificate_key_file, gnutls_strerror(code));
}

kvl_status kvl_http_tls_load(kvl_http *http, const kvl_http_options *options, kvl_error *error)
{
    const bool has_certificate = options->certificate_file != NULL;
    if (!has_certificate && options->certificate_key_file == NULL) return KVL_OK;
    if (!has_certificate || options->certificate_key_file == NULL)
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "--tls-certificate and --tls-key are given together or not at all");
    if (strncmp(options->address, "unix:", 5) == 0)
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "%.100s is a UNIX socket, which needs no TLS: leave --tls-certificate out",
                        options->address);
    if (MHD_is_feature_supported(MHD_FEATURE_TLS) != MHD_YES)
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED, "this libmicrohttpd was built without TLS");
    KVL_TRY(check_mode(options->certificate_key_file, error));
    size_t n_bytes = 0;
    KVL_TRY(kvl_file_read(options->certificate_file, PEM_BYTES_MAX, &http->certificate, &n_bytes,
                          error));
    KVL_TRY(kvl_file_read(options->certificate_key_file, PEM_BYTES_MAX, &http->certificate_key,
                          &n_bytes, error));
    return check_pair(http, options, error);
}

void kvl_http_tls_end(kvl_http *http)
{
    if (http->certificate_key != NULL)
        sodium_memzero(http->certificate_key, strlen(http->certificate_key));
    kvl_free(http->certificate_key);
    kvl_free(http->certificate);
    http->certificate = http->certificate_key = NULL;
}
