/* http/keys.c: keys are kept as digests only. */
#include "http/keys.h"

#include "base/alloc.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/random.h"

#include <string.h>

enum { FILE_BYTES_MAX = 1 << 20, SECRET_BYTES = 32 };

typedef struct key {
    char tenant[KVL_HTTP_TENANT_BYTES_MAX + 1];
    kvl_digest digest;
} key;

struct kvl_http_keys {
    uint8_t secret[SECRET_BYTES];
    uint32_t n_keys;
    bool are_needed;
    key keys[KVL_HTTP_KEYS_MAX];
};

static kvl_digest digest_of(const kvl_http_keys *keys, const char *text, size_t n_bytes)
{
    kvl_digester digester;
    kvl_digester_init(&digester, keys->secret, sizeof keys->secret);
    kvl_digester_add(&digester, text, n_bytes);
    return kvl_digester_end(&digester);
}

/* One line without its end. */
static kvl_status add_line(kvl_http_keys *keys, const char *line, size_t n_bytes, uint32_t number,
                           kvl_error *error)
{
    if (n_bytes == 0 || line[0] == '#') return KVL_OK;
    const char *space = memchr(line, ' ', n_bytes);
    const size_t n_tenant = space == NULL ? 0 : (size_t)(space - line);
    const size_t n_key = space == NULL ? 0 : n_bytes - n_tenant - 1;
    if (n_tenant == 0 || n_tenant > KVL_HTTP_TENANT_BYTES_MAX || n_key < KVL_HTTP_KEY_BYTES_MIN ||
        n_key > KVL_HTTP_KEY_BYTES_MAX || memchr(space + 1, ' ', n_key) != NULL)
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "line %u of the API keys must be 'TENANT KEY', a tenant of 1 to %u bytes "
                        "and a key of %u to %u",
                        number, KVL_HTTP_TENANT_BYTES_MAX, KVL_HTTP_KEY_BYTES_MIN,
                        KVL_HTTP_KEY_BYTES_MAX);
    if (keys->n_keys == KVL_HTTP_KEYS_MAX)
        return KVL_FAIL(error, KVL_ERR_INVALID, "there are more than %u API keys",
                        KVL_HTTP_KEYS_MAX);
    key *made = &keys->keys[keys->n_keys++];
    memcpy(made->tenant, line, n_tenant);
    made->tenant[n_tenant] = '\0';
    made->digest = digest_of(keys, space + 1, n_key);
    return KVL_OK;
}

static kvl_status add_lines(kvl_http_keys *keys, const char *bytes, size_t n_bytes,
                            kvl_error *error)
{
    uint32_t number = 0;
    for (size_t at = 0; at < n_bytes;) {
        const char *end = memchr(bytes + at, '\n', n_bytes - at);
        const size_t n = end == NULL ? n_bytes - at : (size_t)(end - (bytes + at));
        KVL_TRY(add_line(keys, bytes + at, n, ++number, error));
        at += n + 1;
    }
    if (keys->n_keys == 0) return KVL_FAIL(error, KVL_ERR_INVALID, "the file of API keys has none");
    return KVL_OK;
}

kvl_status kvl_http_keys_open(const char *path, kvl_http_keys **keys, kvl_error *error)
{
    *keys = NULL;
    kvl_http_keys *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for API keys");
    kvl_random_secret(made->secret, sizeof made->secret);
    kvl_status status = KVL_OK;
    if (path != NULL) {
        char *bytes = NULL;
        size_t n_bytes = 0;
        made->are_needed = true;
        status = kvl_file_read(path, FILE_BYTES_MAX, &bytes, &n_bytes, error);
        if (status == KVL_OK) status = add_lines(made, bytes, n_bytes, error);
        kvl_free(bytes);
    }
    if (status != KVL_OK) {
        kvl_free(made);
        return status;
    }
    *keys = made;
    return KVL_OK;
}

void kvl_http_keys_close(kvl_http_keys *keys)
{
    kvl_free(keys);
}

bool kvl_http_keys_are_needed(const kvl_http_keys *keys)
{
    return keys->are_needed;
}

const char *kvl_http_keys_find(const kvl_http_keys *keys, const char *authorization)
{
    static const char scheme[] = "Bearer ";
    if (!keys->are_needed) return "";
    if (authorization == NULL || strncmp(authorization, scheme, sizeof scheme - 1) != 0)
        return NULL;
    const char *given = authorization + sizeof scheme - 1;
    const kvl_digest digest = digest_of(keys, given, strnlen(given, KVL_HTTP_KEY_BYTES_MAX + 1));
    const char *found = NULL;
    for (uint32_t i = 0; i < keys->n_keys; i++)
        if (kvl_digest_equal(&digest, &keys->keys[i].digest)) found = keys->keys[i].tenant;
    return found;
}

kvl_digest kvl_http_keys_owner(const char *tenant, const char *cache_salt)
{
    kvl_digest nobody = {{0}};
    if (*tenant == '\0' && *cache_salt == '\0') return nobody;
    kvl_digester digester;
    kvl_digester_init(&digester, NULL, 0);
    kvl_digester_add(&digester, tenant, strlen(tenant) + 1);
    kvl_digester_add(&digester, cache_salt, strlen(cache_salt) + 1);
    return kvl_digester_end(&digester);
}

uint64_t kvl_http_keys_salt(const kvl_http_keys *keys, const char *tenant, const char *cache_salt)
{
    kvl_digester digester;
    kvl_digester_init(&digester, keys->secret, sizeof keys->secret);
    kvl_digester_add(&digester, tenant, strlen(tenant) + 1);
    kvl_digester_add(&digester, cache_salt, strlen(cache_salt) + 1);
    const kvl_digest digest = kvl_digester_end(&digester);
    uint64_t salt = 0;
    memcpy(&salt, digest.bytes, sizeof salt);
    return salt;
}
