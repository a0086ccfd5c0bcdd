/* cli/cmd_get.c: `kvloom get ID`: writes a segment of a sidecar to a .kvseg file, and `kvloom put
 * FILE`: gives one to a sidecar. */
#include "base/alloc.h"
#include "base/file.h"
#include "base/hash.h"
#include "cli/cli.h"
#include "cli/connect.h"
#include "segment/container.h"

#include <string.h>

enum { GET_MS = 30000 };

/* ---- get ---- */

static int write_segment(const kvloom_segment *segment, const char *output)
{
    char path[KVL_DIGEST_TEXT_BYTES + sizeof ".kvseg"];
    char text[KVL_DIGEST_TEXT_BYTES];
    size_t n_bytes = 0;
    kvl_error error;
    const void *bytes = kvloom_segment_bytes(segment, &n_bytes);
    if (output == NULL) {
        kvl_digest id;
        memcpy(id.bytes, kvloom_segment_id(segment)->bytes, sizeof id.bytes);
        (void)snprintf(path, sizeof path, "%s.kvseg", kvl_digest_to_text(&id, text));
        output = path;
    }
    if (kvl_file_write(output, bytes, n_bytes, &error) < 0) return kvl_cli_fail(&error);
    (void)printf("%s\n", output);
    return KVL_EXIT_OK;
}

static int get_one(const kvl_cli_connection *c)
{
    kvloom_digest id;
    kvloom_error error;
    kvloom_segment *segment = NULL;
    if (!kvl_cli_parse_id(c->arguments[0], &id)) return KVL_EXIT_USAGE;
    kvloom_status status = kvloom_get_id(c->client, &id, GET_MS, &segment, &error);
    const uint32_t n_layers = status < 0 ? 0 : kvloom_segment_shape(segment)->n_layers;
    /* A file is for later and for others: what is written is checked here. */
    for (uint32_t i = 0; i < n_layers && status >= 0; i++)
        status = kvloom_segment_check(segment, i, &error);
    const int result = status < 0 ? kvl_cli_fail_client(&error) : write_segment(segment, c->output);
    kvloom_segment_release(segment);
    return result;
}

int kvl_command_get(int argc, char **argv)
{
    kvl_cli_connection c;
    const int failed =
        kvl_cli_connect(argc, argv, "Write a segment of a sidecar to a .kvseg file.", "ID", &c);
    if (failed != 0) return failed;
    int result = KVL_EXIT_USAGE;
    if (c.n_arguments == 1) {
        result = get_one(&c);
    } else {
        (void)fprintf(stderr, "kvloom get: one id is wanted; `kvloom ls` has them\n");
    }
    kvloom_close(c.client);
    return result;
}

/* ---- put ---- */

static kvl_status open_file(const char *path, bool has_home, kvl_file_map *map,
                            kvl_container **container, kvl_error *error)
{
    KVL_TRY(kvl_file_map_open(path, map, error));
    KVL_TRY(kvl_container_borrow(map->bytes, map->n_bytes, NULL, NULL, container, error));
    for (uint32_t i = 0; i < kvl_container_n_blocks(*container); i++)
        KVL_TRY(kvl_container_block_check(*container, i, error));
    const kvl_container_info *info = kvl_container_info_of(*container);
    if (info->kind != KVL_CONTAINER_SEGMENT)
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED, "%.200s is no segment: only those can be put",
                        path);
    /* A file has the digest of its home only, and a sidecar computes ids from the tokens of it. */
    if (kvl_digest_is_zero(&info->home) != !has_home)
        return KVL_FAIL(error, KVL_ERR_INVALID, "%.200s was computed behind %s", path,
                        has_home ? "nothing: leave --home out"
                                 : "other tokens: name a file of their ids with --home");
    return KVL_OK;
}

/* Model and shape are the file's, unless the command line names the model. */
static void take_model(const kvl_container_info *info, kvl_cli_connection *c)
{
    c->options.shape = (kvloom_shape){.dtype = (kvloom_dtype)info->dtype,
                                      .n_layers = info->n_layers,
                                      .n_kv_heads = info->n_kv_heads,
                                      .head_dim = info->head_dim,
                                      .rotated_halves = info->pairs};
    if (c->has_model) return;
    memcpy(c->options.fingerprint.bytes, info->fingerprint.bytes, sizeof info->fingerprint.bytes);
    c->has_model = true;
}

static int put_container(const kvl_container *container, const uint32_t *home, size_t n_home,
                         kvl_cli_connection *c)
{
    const void *layers[KVL_CONTAINER_LAYERS_MAX];
    const kvl_container_info *info = kvl_container_info_of(container);
    const kvloom_key key = {
        .tokens = info->tokens, .n_tokens = info->n_tokens, .home = home, .n_home = n_home};
    kvloom_error error;
    kvloom_segment *segment = NULL;
    kvl_digest id;
    char text[KVL_DIGEST_TEXT_BYTES];
    for (uint32_t i = 0; i < info->n_layers; i++) {
        size_t n_bytes = 0;
        layers[i] = kvl_container_block_view(container, i, &n_bytes);
    }
    const unsigned flags = info->home_is_canonical ? KVLOOM_CANONICAL_HOME : 0;
    if (kvloom_put(c->client, &key, layers, flags, &error) < 0 ||
        kvloom_get(c->client, &key, GET_MS, &segment, &error) < 0) {
        return kvl_cli_fail_client(&error);
    }
    /* The id is the sidecar's: its tenant's key is in it. */
    memcpy(id.bytes, kvloom_segment_id(segment)->bytes, sizeof id.bytes);
    (void)printf("%s\n", kvl_digest_to_text(&id, text));
    kvloom_segment_release(segment);
    return KVL_EXIT_OK;
}

static int put_one(kvl_cli_connection *c)
{
    kvl_file_map map = {.bytes = NULL};
    kvl_container *container = NULL;
    uint32_t *home = NULL;
    size_t n_home = 0;
    kvl_error error;
    int result = KVL_EXIT_FAILED;
    kvl_status status = open_file(c->arguments[0], c->home != NULL, &map, &container, &error);
    if (status == KVL_OK && c->home != NULL)
        status = kvl_cli_read_ids(c->home, UINT32_MAX, &home, &n_home, &error);
    if (status < 0) {
        result = kvl_cli_fail(&error);
    } else {
        take_model(kvl_container_info_of(container), c);
        result = kvl_cli_dial(c);
        if (result == KVL_EXIT_OK) result = put_container(container, home, n_home, c);
        kvloom_close(c->client);
    }
    kvl_free(home);
    kvl_container_release(container);
    kvl_file_map_close(&map);
    return result;
}

int kvl_command_put(int argc, char **argv)
{
    kvl_cli_connection c;
    const int failed = kvl_cli_parse(
        argc, argv, "Give a segment to a sidecar; its id there is printed.", "FILE", &c);
    if (failed != 0) return failed;
    if (c.n_arguments == 1) return put_one(&c);
    (void)fprintf(stderr, "kvloom put: one .kvseg file is wanted\n");
    return KVL_EXIT_USAGE;
}
