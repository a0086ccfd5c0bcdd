/* tiny_engine.h: an engine of a tiny random model, for tests of the rooms above it. Include it
 * after cmocka.h. */
#ifndef KVL_TINY_ENGINE_H
#define KVL_TINY_ENGINE_H

#include "host/engine.h"
#include "tiny_gguf.h"

#include <stdlib.h>
#include <unistd.h>

/* The model's file is gone when this returns: the engine has it mapped.
 * n_pages  0: as many as an engine has by itself */
static inline kvl_engine *tiny_engine_open(const kvl_tiny_gguf_options *model, uint32_t n_threads,
                                           uint32_t n_pages)
{
    char path[] = "/tmp/kvloom-engine-XXXXXX";
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    (void)close(fd);
    kvl_tiny_gguf_save(model, path);
    const kvl_engine_options options = {
        .model_path = path, .n_threads = n_threads, .n_pages = n_pages};
    kvl_engine *engine = NULL;
    kvl_error error = {0};
    const kvl_status status = kvl_engine_create(&options, &engine, &error);
    (void)unlink(path);
    if (status != KVL_OK) fail_msg("%s", error.text);
    return engine;
}

#endif /* KVL_TINY_ENGINE_H */
