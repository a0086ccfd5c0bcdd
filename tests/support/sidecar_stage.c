/* sidecar_stage.c: see the header. */
#include "sidecar_stage.h"

#include "base/alloc.h"
#include "base/file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS_MAX = 4096, KEYS = 8 };

kvloom_digest sidecar_stage_fingerprint(void)
{
    return kvloom_fingerprint("test", 4);
}

kvloom_shape sidecar_stage_shape(void)
{
    return (kvloom_shape){
        .dtype = KVLOOM_F16, .n_layers = 4, .n_kv_heads = 2, .head_dim = 32, .rotated_halves = 1};
}

void sidecar_stage_prepare(sidecar_stage *stage, const char *name)
{
    memset(stage, 0, sizeof *stage);
    (void)snprintf(stage->directory, sizeof stage->directory, "/tmp/kvloom-sidecar-XXXXXX");
    KVL_ASSERT(mkdtemp(stage->directory) != NULL);
    for (int i = 0; i < 2; i++) {
        (void)snprintf(stage->socket[i], sizeof stage->socket[i], "%s/%c.sock", stage->directory,
                       'a' + i);
        (void)snprintf(stage->store[i], sizeof stage->store[i], "%s/%c", stage->directory, 'a' + i);
        memset(stage->keys[i], 0x11 * (i + 1), sizeof stage->keys[i]);
        stage->tenants[i] = (kvl_sidecar_tenant){.name = i == 0 ? "a" : "b",
                                                 .socket = stage->socket[i],
                                                 .key = stage->keys[i],
                                                 .memory_bytes_max = 64 << 20};
    }
    (void)snprintf(stage->endpoint, sizeof stage->endpoint, "ipc://%s/x.sock", stage->directory);
    const kvloom_digest fingerprint = sidecar_stage_fingerprint();
    stage->options = (kvl_sidecar_options){
        .name = name, .tenants = stage->tenants, .n_tenants = 2, .clock = kvl_clock_system()};
    memcpy(stage->options.fingerprint.bytes, fingerprint.bytes, sizeof fingerprint.bytes);
}

void sidecar_stage_with_disk(sidecar_stage *stage, uint64_t bytes_max)
{
    for (int i = 0; i < 2; i++) {
        stage->tenants[i].store_path = stage->store[i];
        stage->tenants[i].disk_bytes_max = bytes_max;
    }
}

static void *run(void *sidecar)
{
    kvl_sidecar_run(sidecar);
    return NULL;
}

void sidecar_stage_start(sidecar_stage *stage)
{
    kvl_error error = {.text = ""};
    if (kvl_sidecar_create(&stage->options, &stage->sidecar, &error) < 0) {
        (void)fprintf(stderr, "%s\n", error.text);
        abort();
    }
    KVL_ASSERT(pthread_create(&stage->thread, NULL, run, stage->sidecar) == 0);
}

void sidecar_stage_stop(sidecar_stage *stage)
{
    if (stage->sidecar == NULL) return;
    kvl_sidecar_stop(stage->sidecar);
    (void)pthread_join(stage->thread, NULL);
    kvl_sidecar_destroy(stage->sidecar);
    stage->sidecar = NULL;
}

void sidecar_stage_end(sidecar_stage *stage)
{
    sidecar_stage_stop(stage);
    KVL_ASSERT(kvl_directory_remove(stage->directory, NULL) == KVL_OK);
}

kvloom_client *sidecar_stage_connect(const sidecar_stage *stage, int tenant, const char *salt)
{
    const kvloom_options options = {.socket = stage->socket[tenant],
                                    .name = "test",
                                    .salt = salt,
                                    .fingerprint = sidecar_stage_fingerprint(),
                                    .shape = sidecar_stage_shape()};
    kvloom_client *client = NULL;
    kvloom_error error = {.text = ""};
    if (kvloom_connect(&options, &client, &error) < 0) {
        (void)fprintf(stderr, "%s\n", error.text);
        abort();
    }
    return client;
}

kvloom_client *sidecar_stage_open(sidecar_stage *stage, uint64_t disk_bytes_max)
{
    sidecar_stage_prepare(stage, "s");
    if (disk_bytes_max > 0) sidecar_stage_with_disk(stage, disk_bytes_max);
    sidecar_stage_start(stage);
    return sidecar_stage_connect(stage, 0, NULL);
}

void sidecar_stage_close(sidecar_stage *stage, kvloom_client *client)
{
    kvloom_close(client);
    sidecar_stage_end(stage);
}

kvloom_key sidecar_stage_key(uint32_t number, size_t n_tokens)
{
    static uint32_t tokens[KEYS][TOKENS_MAX];
    KVL_ASSERT(n_tokens <= TOKENS_MAX);
    uint32_t *ids = tokens[number % KEYS];
    for (size_t i = 0; i < n_tokens; i++) ids[i] = number * 7919u + (uint32_t)i;
    return (kvloom_key){.tokens = ids, .n_tokens = n_tokens};
}

uint8_t sidecar_stage_byte(uint32_t number, uint32_t layer, size_t i)
{
    return (uint8_t)((number * 31u + layer * 17u + 5u) * (i * 7u + 3u) >> 2);
}

kvloom_status sidecar_stage_put(kvloom_client *client, uint32_t number, size_t n_tokens,
                                unsigned flags, kvloom_error *error)
{
    const kvloom_shape shape = sidecar_stage_shape();
    const kvloom_key key = sidecar_stage_key(number, n_tokens);
    const size_t n_bytes = kvloom_layer_bytes(&shape, n_tokens);
    const kvloom_status status = kvloom_put_begin(client, &key, error);
    if (status < 0) return status;
    for (uint32_t l = 0; l < shape.n_layers; l++) {
        uint8_t *layer = kvloom_put_layer(client, l);
        for (size_t i = 0; i < n_bytes; i++) layer[i] = sidecar_stage_byte(number, l, i);
    }
    return kvloom_put_end(client, flags, error);
}

bool sidecar_stage_is(const kvloom_segment *segment, uint32_t number, size_t n_tokens)
{
    const kvloom_shape shape = sidecar_stage_shape();
    const size_t wanted = kvloom_layer_bytes(&shape, n_tokens);
    for (uint32_t l = 0; l < shape.n_layers; l++) {
        size_t n_bytes = 0;
        const uint8_t *layer = kvloom_segment_layer(segment, l, &n_bytes);
        if (layer == NULL || n_bytes != wanted) return false;
        for (size_t i = 0; i < n_bytes; i++) {
            if (layer[i] != sidecar_stage_byte(number, l, i)) return false;
        }
    }
    return true;
}
