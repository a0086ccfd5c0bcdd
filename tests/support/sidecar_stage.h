/* sidecar_stage.h: a sidecar on a thread of its own, in a directory of its own, and segments whose
 * content follows from a number. */
#ifndef KVL_TESTS_SIDECAR_STAGE_H
#define KVL_TESTS_SIDECAR_STAGE_H

#include "kvloom.h"
#include "sidecar/sidecar.h"

#include <pthread.h>

typedef struct sidecar_stage {
    char directory[64];
    char socket[2][96]; /* of the tenants "a" and "b" */
    char store[2][96];
    char endpoint[96]; /* where peers dial */
    uint8_t keys[2][KVL_TENANT_KEY_LENGTH];
    kvl_sidecar_tenant tenants[2];
    kvl_sidecar_options options;
    kvl_sidecar *sidecar;
    pthread_t thread;
} sidecar_stage;

/* Fills options: two tenants with 64 MiB of memory each, no disk, no exchange. `name` is that of
 * the sidecar; the keys of the tenants are the same in every stage. */
void sidecar_stage_prepare(sidecar_stage *stage, const char *name);
void sidecar_stage_with_disk(sidecar_stage *stage, uint64_t bytes_max);
void sidecar_stage_start(sidecar_stage *stage);
void sidecar_stage_stop(sidecar_stage *stage); /* files stay */
void sidecar_stage_end(sidecar_stage *stage);  /* stops, and removes the files */

kvloom_digest sidecar_stage_fingerprint(void);
/* 4 layers, 2 heads of 32, float16. */
kvloom_shape sidecar_stage_shape(void);
kvloom_client *sidecar_stage_connect(const sidecar_stage *stage, int tenant, const char *salt);

/* Prepares and starts a stage, with a disk where disk_bytes_max > 0, and connects the first tenant;
 * and the end of both. */
kvloom_client *sidecar_stage_open(sidecar_stage *stage, uint64_t disk_bytes_max);
void sidecar_stage_close(sidecar_stage *stage, kvloom_client *client);

/* Key of segment `number` with n_tokens tokens; tokens are static, valid until the next call with
 * the same number modulo 8. */
kvloom_key sidecar_stage_key(uint32_t number, size_t n_tokens);
kvloom_status sidecar_stage_put(kvloom_client *client, uint32_t number, size_t n_tokens,
                                unsigned flags, kvloom_error *error);
/* True where every byte of every layer is what sidecar_stage_put has put. */
bool sidecar_stage_is(const kvloom_segment *segment, uint32_t number, size_t n_tokens);
uint8_t sidecar_stage_byte(uint32_t number, uint32_t layer, size_t i);

#endif /* KVL_TESTS_SIDECAR_STAGE_H */
