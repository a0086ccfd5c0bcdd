/* cli/config.h: how a sidecar is configured: a YAML file, then KVLOOM_* of the environment, then
 * the command line; the later wins. Values stay texts until kvl_config_resolve, so that each is
 * checked once and complained about in the same words wherever it came from.
 *
 * The file is read with libyaml itself: an unknown key is an error that names its line and the
 * nearest key that there is, which needs the marks of every node.
 * Threads  One at a time. */
#ifndef KVL_CLI_CONFIG_H
#define KVL_CLI_CONFIG_H

#include "sidecar/sidecar.h"

#include <stdio.h>

typedef enum kvl_config_key {
    KVL_CONFIG_NAME,
    KVL_CONFIG_MODEL,
    KVL_CONFIG_FINGERPRINT,
    KVL_CONFIG_LISTEN,
    KVL_CONFIG_CURVE_KEY,
    KVL_CONFIG_ALLOW_LIST,
    KVL_CONFIG_LEASE,
    KVL_CONFIG_WORKERS,
    KVL_CONFIG_KEYS,
} kvl_config_key;

typedef enum kvl_config_tenant_key {
    KVL_TENANT_NAME,
    KVL_TENANT_SOCKET,
    KVL_TENANT_SOCKET_MODE,
    KVL_TENANT_KEY_FILE,
    KVL_TENANT_MEMORY,
    KVL_TENANT_STORE,
    KVL_TENANT_DISK,
    KVL_TENANT_DURABLE,
    KVL_TENANT_ENCRYPT,
    KVL_TENANT_POLICY,
    KVL_TENANT_TRACE,
    KVL_TENANT_KEYS,
} kvl_config_tenant_key;

typedef enum kvl_config_peer_key {
    KVL_PEER_NAME,
    KVL_PEER_ENDPOINT,
    KVL_PEER_PUBLIC_KEY,
    KVL_PEER_KEYS,
} kvl_config_peer_key;

/* Zeroed is empty. Texts are owned; NULL: not set. */
typedef struct kvl_config {
    char *values[KVL_CONFIG_KEYS];
    char *tenants[KVL_SIDECAR_TENANTS_MAX][KVL_TENANT_KEYS];
    size_t n_tenants;
    char *peers[KVL_PEERS_MAX][KVL_PEER_KEYS];
    size_t n_peers;
    /* what the options of kvl_config_resolve point to */
    kvl_sidecar_tenant resolved_tenants[KVL_SIDECAR_TENANTS_MAX];
    uint8_t tenant_keys[KVL_SIDECAR_TENANTS_MAX][KVL_TENANT_KEY_LENGTH];
    kvl_exchange_peer resolved_peers[KVL_PEERS_MAX];
    kvl_key_pair keys;
} kvl_config;

/* Replaces a value with a copy. Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_config_set(char **value, const char *text, kvl_error *error);

/* Errors   KVL_ERR_MALFORMED (text: file, line, what and the nearest known key),
 * KVL_ERR_NOT_FOUND, ... */
KVL_MUST_USE kvl_status kvl_config_load(kvl_config *config, const char *path, kvl_error *error);
/* KVLOOM_LISTEN and so on; those of a tenant concern the first: KVLOOM_SOCKET, KVLOOM_MEMORY,
 * ... */
KVL_MUST_USE kvl_status kvl_config_take_environment(kvl_config *config, kvl_error *error);

/* Fills what was not set, reads key files, checks every value. `options` borrows from config.
 * Errors   KVL_ERR_INVALID and others: text names the key and its value */
KVL_MUST_USE kvl_status kvl_config_resolve(kvl_config *config, kvl_sidecar_options *options,
                                           kvl_error *error);
/* As YAML that kvl_config_load reads; paths of secrets, never the secrets. */
void kvl_config_print(const kvl_config *config, FILE *out);
void kvl_config_deinit(kvl_config *config);

#endif /* KVL_CLI_CONFIG_H */
