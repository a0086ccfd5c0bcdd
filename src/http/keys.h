/* http/keys.h: who may ask, and whose cache is whose. Private to the room.
 * Threads  Never changes once made: share it freely. */
#ifndef KVL_HTTP_KEYS_H
#define KVL_HTTP_KEYS_H

#include "base/hash.h"

#define KVL_HTTP_KEYS_MAX 1024u
#define KVL_HTTP_KEY_BYTES_MIN 16u
#define KVL_HTTP_KEY_BYTES_MAX 256u
#define KVL_HTTP_TENANT_BYTES_MAX 64u

typedef struct kvl_http_keys kvl_http_keys;

/* Reads lines "TENANT KEY"; empty ones and those that begin with # are left out. With path NULL
 * there are no keys, and everybody is the tenant "".
 * Owns     *keys: ended with kvl_http_keys_close
 * Errors   KVL_ERR_NOT_FOUND, KVL_ERR_IO, KVL_ERR_INVALID (text: the line), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_http_keys_open(const char *path, kvl_http_keys **keys,
                                           kvl_error *error);
void kvl_http_keys_close(kvl_http_keys *keys);

bool kvl_http_keys_are_needed(const kvl_http_keys *keys);
/* The tenant of the value of an Authorization header ("Bearer KEY"), or NULL. Every key is
 * compared, by digests and in constant time, so that time says nothing about any. */
const char *kvl_http_keys_find(const kvl_http_keys *keys, const char *authorization);

/* Number of the prefix tree of a tenant's cache_salt ("" for none): a keyed digest, with a secret
 * of this process, so that nobody can choose one. */
uint64_t kvl_http_keys_salt(const kvl_http_keys *keys, const char *tenant, const char *cache_salt);

/* Whose a tenant's texts are in a store that outlives this process; zero: the host's own, of
 * whoever has neither key nor cache_salt. No secret: hosts key it with theirs. */
kvl_digest kvl_http_keys_owner(const char *tenant, const char *cache_salt);

#endif /* KVL_HTTP_KEYS_H */
