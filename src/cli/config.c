/* cli/config.c: a file, the environment and a command line become the options of a sidecar. */
#include "cli/config.h"

#include "base/alloc.h"
#include "base/file.h"
#include "base/units.h"
#include "kvloom.h"
#include "store/trace.h"

#include <ctype.h>
#include <errno.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

enum { FILE_BYTES_MAX = 1 << 20, KEY_BYTES_MAX = 32 };

static const char *const top_names[] = {
    [KVL_CONFIG_NAME] = "name",
    [KVL_CONFIG_MODEL] = "model",
    [KVL_CONFIG_FINGERPRINT] = "fingerprint",
    [KVL_CONFIG_LISTEN] = "listen",
    [KVL_CONFIG_CURVE_KEY] = "curve-key",
    [KVL_CONFIG_ALLOW_LIST] = "allow-list",
    [KVL_CONFIG_LEASE] = "lease",
    [KVL_CONFIG_WORKERS] = "workers",
    "tenants",
    "peers",
};
static const char *const tenant_names[] = {
    [KVL_TENANT_NAME] = "name",
    [KVL_TENANT_SOCKET] = "socket",
    [KVL_TENANT_SOCKET_MODE] = "socket-mode",
    [KVL_TENANT_KEY_FILE] = "key-file",
    [KVL_TENANT_MEMORY] = "memory",
    [KVL_TENANT_STORE] = "store",
    [KVL_TENANT_DISK] = "disk",
    [KVL_TENANT_DURABLE] = "durable",
    [KVL_TENANT_ENCRYPT] = "encrypt",
    [KVL_TENANT_POLICY] = "policy",
    [KVL_TENANT_TRACE] = "trace",
};
static const char *const peer_names[] = {
    [KVL_PEER_NAME] = "name",
    [KVL_PEER_ENDPOINT] = "endpoint",
    [KVL_PEER_PUBLIC_KEY] = "public-key",
};
enum { N_TOP_NAMES = sizeof top_names / sizeof *top_names };

kvl_status kvl_config_set(char **value, const char *text, kvl_error *error)
{
    char *copy = kvl_strdup(text);
    if (copy == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a setting");
    kvl_free(*value);
    *value = copy;
    return KVL_OK;
}

void kvl_config_deinit(kvl_config *config)
{
    for (size_t k = 0; k < KVL_CONFIG_KEYS; k++) kvl_free(config->values[k]);
    for (size_t i = 0; i < KVL_SIDECAR_TENANTS_MAX; i++) {
        for (size_t k = 0; k < KVL_TENANT_KEYS; k++) kvl_free(config->tenants[i][k]);
    }
    for (size_t i = 0; i < KVL_PEERS_MAX; i++) {
        for (size_t k = 0; k < KVL_PEER_KEYS; k++) kvl_free(config->peers[i][k]);
    }
    kvl_key_pair_wipe(&config->keys);
    sodium_memzero(config, sizeof *config);
}

/* ---- the file ---- */

/* Levenshtein's distance, for words of a few letters. */
static size_t distance(const char *a, const char *b)
{
    size_t row[KEY_BYTES_MAX + 1];
    const size_t n = strlen(b);
    if (n > KEY_BYTES_MAX) return SIZE_MAX;
    for (size_t j = 0; j <= n; j++) row[j] = j;
    for (size_t i = 0; a[i] != '\0'; i++) {
        size_t diagonal = row[0];
        row[0] = i + 1;
        for (size_t j = 0; j < n; j++) {
            const size_t replaced = diagonal + (a[i] != b[j] ? 1 : 0);
            diagonal = row[j + 1];
            size_t least = row[j] < row[j + 1] ? row[j] + 1 : row[j + 1] + 1;
            row[j + 1] = replaced < least ? replaced : least;
        }
    }
    return row[n];
}

typedef struct reading {
    const char *path;
    yaml_document_t *document;
    kvl_error *error;
} reading;

static kvl_status fail_at(const reading *r, const yaml_node_t *node, const char *what,
                          const char *word)
{
    return KVL_FAIL(r->error, KVL_ERR_MALFORMED, "%.200s, line %zu: %s%.60s", r->path,
                    node->start_mark.line + 1, what, word);
}

static const char *text_of(const yaml_node_t *node)
{
    return (const char *)node->data.scalar.value;
}

static kvl_status find_key(const reading *r, const yaml_node_t *node, const char *const *names,
                           size_t n_names, size_t *key)
{
    if (node->type != YAML_SCALAR_NODE) return fail_at(r, node, "a key must be a word", "");
    const char *word = text_of(node);
    size_t nearest = 0;
    for (*key = 0; *key < n_names; ++*key) {
        if (strcmp(names[*key], word) == 0) return KVL_OK;
        if (distance(word, names[*key]) < distance(word, names[nearest])) nearest = *key;
    }
    return KVL_FAIL(r->error, KVL_ERR_MALFORMED,
                    "%.200s, line %zu: there is no key '%.60s'; the nearest is '%s'", r->path,
                    node->start_mark.line + 1, word, names[nearest]);
}

static kvl_status take_scalar(const reading *r, const yaml_node_t *node, const char *key,
                              char **value)
{
    if (node->type != YAML_SCALAR_NODE) return fail_at(r, node, "one value is wanted for ", key);
    if (strlen(text_of(node)) != node->data.scalar.length)
        return fail_at(r, node, "a zero byte in the value of ", key);
    if (*value != NULL) return fail_at(r, node, "a second value for ", key);
    return kvl_config_set(value, text_of(node), r->error);
}

/* The entries of a list, each a mapping with the given keys. */
static kvl_status take_list(const reading *r, const yaml_node_t *node, const char *const *names,
                            size_t n_keys, size_t n_max, char **values, size_t *n)
{
    if (node->type != YAML_SEQUENCE_NODE) return fail_at(r, node, "a list is wanted here", "");
    const yaml_node_item_t *item = node->data.sequence.items.start;
    for (; item < node->data.sequence.items.top; item++) {
        const yaml_node_t *entry = yaml_document_get_node(r->document, *item);
        if (entry->type != YAML_MAPPING_NODE)
            return fail_at(r, entry, "an entry with keys is wanted here", "");
        if (*n == n_max) return fail_at(r, entry, "one entry more than there may be", "");
        const yaml_node_pair_t *pair = entry->data.mapping.pairs.start;
        for (; pair < entry->data.mapping.pairs.top; pair++) {
            size_t key = 0;
            KVL_TRY(
                find_key(r, yaml_document_get_node(r->document, pair->key), names, n_keys, &key));
            KVL_TRY(take_scalar(r, yaml_document_get_node(r->document, pair->value), names[key],
                                &values[*n * n_keys + key]));
        }
        ++*n;
    }
    return KVL_OK;
}

static kvl_status take_document(kvl_config *config, const reading *r)
{
    const yaml_node_t *root = yaml_document_get_root_node(r->document);
    if (root == NULL) return KVL_OK; /* an empty file */
    if (root->type != YAML_MAPPING_NODE) return fail_at(r, root, "keys are wanted here", "");
    const yaml_node_pair_t *pair = root->data.mapping.pairs.start;
    for (; pair < root->data.mapping.pairs.top; pair++) {
        const yaml_node_t *value = yaml_document_get_node(r->document, pair->value);
        size_t key = 0;
        KVL_TRY(find_key(r, yaml_document_get_node(r->document, pair->key), top_names, N_TOP_NAMES,
                         &key));
        if (key < KVL_CONFIG_KEYS) {
            KVL_TRY(take_scalar(r, value, top_names[key], &config->values[key]));
        } else if (key == KVL_CONFIG_KEYS) {
            KVL_TRY(take_list(r, value, tenant_names, KVL_TENANT_KEYS, KVL_SIDECAR_TENANTS_MAX,
                              &config->tenants[0][0], &config->n_tenants));
        } else {
            KVL_TRY(take_list(r, value, peer_names, KVL_PEER_KEYS, KVL_PEERS_MAX,
                              &config->peers[0][0], &config->n_peers));
        }
    }
    return KVL_OK;
}

kvl_status kvl_config_load(kvl_config *config, const char *path, kvl_error *error)
{
    char *text = NULL;
    size_t n_bytes = 0;
    yaml_parser_t parser;
    yaml_document_t document;
    KVL_TRY(kvl_file_read(path, FILE_BYTES_MAX, &text, &n_bytes, error));
    if (yaml_parser_initialize(&parser) != 1) {
        kvl_free(text);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to read %.200s", path);
    }
    yaml_parser_set_input_string(&parser, (const unsigned char *)text, n_bytes);
    kvl_status status = KVL_OK;
    if (yaml_parser_load(&parser, &document) != 1) {
        status = KVL_FAIL(error, KVL_ERR_MALFORMED, "%.200s, line %zu: %s", path,
                          parser.problem_mark.line + 1,
                          parser.problem == NULL ? "this is no YAML" : parser.problem);
    } else {
        const reading r = {path, &document, error};
        status = take_document(config, &r);
        yaml_document_delete(&document);
    }
    yaml_parser_delete(&parser);
    kvl_free(text);
    return status;
}

/* ---- the environment ---- */

static kvl_status take_variable(const char *name, char **value, kvl_error *error)
{
    char variable[KEY_BYTES_MAX + 8] = "KVLOOM_";
    size_t n = strlen(variable);
    for (; *name != '\0'; name++)
        variable[n++] = *name == '-' ? '_' : (char)toupper((unsigned char)*name);
    variable[n] = '\0';
    const char *text = getenv(variable);
    return text == NULL ? KVL_OK : kvl_config_set(value, text, error);
}

kvl_status kvl_config_take_environment(kvl_config *config, kvl_error *error)
{
    for (size_t k = 0; k < KVL_CONFIG_KEYS; k++)
        KVL_TRY(take_variable(top_names[k], &config->values[k], error));
    for (size_t k = KVL_TENANT_SOCKET; k < KVL_TENANT_KEYS; k++)
        KVL_TRY(take_variable(tenant_names[k], &config->tenants[0][k], error));
    return KVL_OK;
}

/* ---- values ---- */

static kvl_status fail_value(kvl_error *error, const char *key, const char *value,
                             const char *wanted)
{
    return KVL_FAIL(error, KVL_ERR_INVALID, "%s is '%.100s'; it must be %s", key,
                    value == NULL ? "" : value, wanted);
}

static kvl_status take_bytes(const char *key, const char *text, uint64_t *n_bytes, kvl_error *error)
{
    kvl_error inner;
    if (kvl_bytes_from_text(text, n_bytes, &inner) < 0)
        return KVL_FAIL(error, KVL_ERR_INVALID, "%s: %s", key, inner.text);
    return *n_bytes > 0 ? KVL_OK : fail_value(error, key, text, "more than nothing");
}

static kvl_status take_number(const char *key, const char *text, int base, uint32_t least,
                              uint32_t most, uint32_t *value, kvl_error *error)
{
    char *end = NULL;
    errno = 0;
    const unsigned long number = strtoul(text, &end, base);
    if (text[0] < '0' || text[0] > '9' || *end != '\0' || errno != 0 || number < least ||
        number > most) {
        return KVL_FAIL(error, KVL_ERR_INVALID, "%s is '%.60s'; it must be a number from %u to %u",
                        key, text, least, most);
    }
    *value = (uint32_t)number;
    return KVL_OK;
}

static kvl_status take_model(const kvl_config *config, kvl_digest *fingerprint, kvl_error *error)
{
    const char *model = config->values[KVL_CONFIG_MODEL];
    const char *hex = config->values[KVL_CONFIG_FINGERPRINT];
    if ((model == NULL) == (hex == NULL))
        return KVL_FAIL(error, KVL_ERR_INVALID, "either model or fingerprint is needed, not both");
    if (hex != NULL) {
        return kvl_digest_from_text(hex, fingerprint) == KVL_OK
                   ? KVL_OK
                   : fail_value(error, "fingerprint", hex, "64 hexadecimal digits");
    }
    const kvloom_digest digest = kvloom_fingerprint(model, strlen(model));
    memcpy(fingerprint->bytes, digest.bytes, sizeof digest.bytes);
    return KVL_OK;
}

static kvl_status read_key(const char *path, uint8_t *key, kvl_error *error)
{
    char *bytes = NULL;
    size_t n_bytes = 0;
    KVL_TRY(kvl_file_read(path, KVL_TENANT_KEY_LENGTH, &bytes, &n_bytes, error));
    if (n_bytes == KVL_TENANT_KEY_LENGTH) memcpy(key, bytes, n_bytes);
    sodium_memzero(bytes, n_bytes);
    kvl_free(bytes);
    if (n_bytes == KVL_TENANT_KEY_LENGTH) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_INVALID, "%.200s has %zu bytes; a tenant's key has %u", path,
                    n_bytes, KVL_TENANT_KEY_LENGTH);
}

/* NULL leaves it as it is. */
static kvl_status take_bool(const char *name, const char *text, bool *value, kvl_error *error)
{
    if (text == NULL) return KVL_OK;
    *value = strcmp(text, "true") == 0;
    if (*value || strcmp(text, "false") == 0) return KVL_OK;
    return fail_value(error, name, text, "true or false");
}

/* auto: what a recorded trace of the tenant speaks for, with this much memory. Without one there is
 * nothing to choose by, and the default stays. */
static kvl_status take_policy(char *const *from, kvl_sidecar_tenant *to, kvl_error *error)
{
    const char *text = from[KVL_TENANT_POLICY];
    const char *path = from[KVL_TENANT_TRACE];
    const bool is_auto = text != NULL && strcmp(text, "auto") == 0;
    if (!is_auto && path != NULL)
        return fail_value(error, "policy", text, "auto, where a trace is given");
    if (text == NULL || kvl_policy_from_name(text, &to->policy)) return KVL_OK;
    if (!is_auto) return fail_value(error, "policy", text, "auto, lru, slru or s3fifo");
    if (path == NULL) return KVL_OK;
    kvl_trace trace;
    kvl_replay replays[KVL_POLICIES];
    KVL_TRY(kvl_trace_read(path, to->name, &trace, error));
    const kvl_status status =
        kvl_trace_choose(&trace, to->memory_bytes_max, replays, &to->policy, error);
    kvl_trace_deinit(&trace);
    return status;
}

static kvl_status resolve_tenant(kvl_config *config, size_t i, kvl_error *error)
{
    char **from = config->tenants[i];
    kvl_sidecar_tenant *to = &config->resolved_tenants[i];
    *to = (kvl_sidecar_tenant){.name = from[KVL_TENANT_NAME],
                               .socket = from[KVL_TENANT_SOCKET],
                               .key = config->tenant_keys[i],
                               .memory_bytes_max = UINT64_C(1) << 30,
                               .store_path = from[KVL_TENANT_STORE],
                               .disk_bytes_max = UINT64_C(8) << 30,
                               .is_durable = true};
    if (to->name == NULL) to->name = "default";
    if (to->socket == NULL || from[KVL_TENANT_KEY_FILE] == NULL)
        return KVL_FAIL(error, KVL_ERR_INVALID, "tenant %.31s needs a socket and a key-file",
                        to->name);
    KVL_TRY(read_key(from[KVL_TENANT_KEY_FILE], config->tenant_keys[i], error));
    if (from[KVL_TENANT_MEMORY] != NULL)
        KVL_TRY(take_bytes("memory", from[KVL_TENANT_MEMORY], &to->memory_bytes_max, error));
    if (from[KVL_TENANT_DISK] != NULL)
        KVL_TRY(take_bytes("disk", from[KVL_TENANT_DISK], &to->disk_bytes_max, error));
    KVL_TRY(take_policy(from, to, error));
    KVL_TRY(take_bool("durable", from[KVL_TENANT_DURABLE], &to->is_durable, error));
    KVL_TRY(take_bool("encrypt", from[KVL_TENANT_ENCRYPT], &to->seals_disk, error));
    uint32_t mode = 0;
    if (from[KVL_TENANT_SOCKET_MODE] != NULL)
        KVL_TRY(take_number("socket-mode", from[KVL_TENANT_SOCKET_MODE], 8, 0, 0777, &mode, error));
    to->socket_mode = (mode_t)mode;
    return KVL_OK;
}

static kvl_status resolve_peer(kvl_config *config, size_t i, kvl_error *error)
{
    char **from = config->peers[i];
    config->resolved_peers[i] = (kvl_exchange_peer){.name = from[KVL_PEER_NAME],
                                                    .endpoint = from[KVL_PEER_ENDPOINT],
                                                    .public_key = from[KVL_PEER_PUBLIC_KEY]};
    if (from[KVL_PEER_NAME] != NULL && from[KVL_PEER_ENDPOINT] != NULL) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_INVALID, "peer %zu needs a name and an endpoint", i + 1);
}

kvl_status kvl_config_resolve(kvl_config *config, kvl_sidecar_options *options, kvl_error *error)
{
    char **values = config->values;
    *options = (kvl_sidecar_options){.name = values[KVL_CONFIG_NAME],
                                     .endpoint = values[KVL_CONFIG_LISTEN],
                                     .allow_list = values[KVL_CONFIG_ALLOW_LIST],
                                     .tenants = config->resolved_tenants,
                                     .peers = config->resolved_peers,
                                     .n_peers = config->n_peers,
                                     .clock = kvl_clock_system()};
    if (options->name == NULL) options->name = "sidecar";
    KVL_TRY(take_model(config, &options->fingerprint, error));
    if (config->n_tenants == 0) config->n_tenants = 1;
    options->n_tenants = config->n_tenants;
    for (size_t i = 0; i < config->n_tenants; i++) KVL_TRY(resolve_tenant(config, i, error));
    for (size_t i = 0; i < config->n_peers; i++) KVL_TRY(resolve_peer(config, i, error));
    if (values[KVL_CONFIG_WORKERS] != NULL)
        KVL_TRY(take_number("workers", values[KVL_CONFIG_WORKERS], 10, 1, KVL_SIDECAR_WORKERS_MAX,
                            &options->n_workers, error));
    if (values[KVL_CONFIG_LEASE] != NULL) {
        int64_t lease_ns = 0;
        kvl_error inner;
        if (kvl_duration_from_text(values[KVL_CONFIG_LEASE], &lease_ns, &inner) < 0)
            return KVL_FAIL(error, KVL_ERR_INVALID, "lease: %s", inner.text);
        if (lease_ns < KVL_NS_PER_MS || lease_ns / KVL_NS_PER_MS > INT32_MAX)
            return fail_value(error, "lease", values[KVL_CONFIG_LEASE], "1ms to 24 days");
        options->lease_ms_max = (uint32_t)(lease_ns / KVL_NS_PER_MS);
    }
    if (values[KVL_CONFIG_CURVE_KEY] != NULL) {
        KVL_TRY(kvl_key_pair_read(values[KVL_CONFIG_CURVE_KEY], &config->keys, error));
        options->keys = &config->keys;
    }
    return KVL_OK;
}

/* ---- printing ---- */

/* In double quotes, where YAML takes every text. */
static void print_value(FILE *out, const char *indent, const char *key, const char *value)
{
    (void)fprintf(out, "%s%s: \"", indent, key);
    for (; *value != '\0'; value++) {
        const unsigned char c = (unsigned char)*value;
        if (c == '"' || c == '\\') (void)fputc('\\', out);
        if (c < 0x20) {
            (void)fprintf(out, "\\x%02x", c);
        } else {
            (void)fputc(c, out);
        }
    }
    (void)fprintf(out, "\"\n");
}

static void print_list(FILE *out, const char *title, const char *const *names, size_t n_keys,
                       char *const *values, size_t n)
{
    if (n > 0) (void)fprintf(out, "%s:\n", title);
    for (size_t i = 0; i < n; i++) {
        bool is_first = true;
        for (size_t k = 0; k < n_keys; k++) {
            const char *value = values[i * n_keys + k];
            if (value == NULL) continue;
            print_value(out, is_first ? "  - " : "    ", names[k], value);
            is_first = false;
        }
    }
}

void kvl_config_print(const kvl_config *config, FILE *out)
{
    for (size_t k = 0; k < KVL_CONFIG_KEYS; k++) {
        if (config->values[k] != NULL) print_value(out, "", top_names[k], config->values[k]);
    }
    print_list(out, "tenants", tenant_names, KVL_TENANT_KEYS, &config->tenants[0][0],
               config->n_tenants);
    print_list(out, "peers", peer_names, KVL_PEER_KEYS, &config->peers[0][0], config->n_peers);
}
