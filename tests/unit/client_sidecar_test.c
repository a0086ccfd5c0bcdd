/* client_sidecar_test.c: what kvloom.h promises, against a sidecar in the same process. */
#include "base/alloc.h"
#include "segment/container.h"
#include "sidecar_stage.h"

#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

enum { TOKENS_SMALL = 16, TOKENS_LARGE = 2048 };

static void what_is_put_can_be_got_from_memory(void **state)
{
    (void)state;
    sidecar_stage stage;
    kvloom_client *client = sidecar_stage_open(&stage, 0);
    kvloom_error error;
    const size_t sizes[] = {1, TOKENS_SMALL, 700, TOKENS_LARGE};
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(sidecar_stage_put(client, i, sizes[i], 0, &error), KVLOOM_OK);
        const kvloom_key key = sidecar_stage_key(i, sizes[i]);
        kvloom_segment *segment = NULL;
        assert_int_equal(kvloom_get(client, &key, 0, &segment, &error), KVLOOM_OK);
        assert_true(sidecar_stage_is(segment, i, sizes[i]));
        size_t n_tokens = 0;
        const uint32_t *tokens = kvloom_segment_tokens(segment, &n_tokens);
        assert_int_equal(n_tokens, sizes[i]);
        assert_memory_equal(tokens, key.tokens, n_tokens * sizeof *tokens);
        assert_int_equal(kvloom_segment_place(segment), KVLOOM_IN_MEMORY);
        assert_int_equal(kvloom_segment_check(segment, 3, &error), KVLOOM_OK);
        assert_null(kvloom_segment_layer(segment, 4, NULL));
        assert_int_equal((uintptr_t)kvloom_segment_layer(segment, 1, NULL) % 64, 0);
        kvloom_segment_release(segment);
    }
    kvloom_stats stats;
    assert_int_equal(kvloom_get_stats(client, &stats, &error), KVLOOM_OK);
    assert_int_equal(stats.puts, 4);
    assert_int_equal(stats.hits_memory, 4);
    assert_int_equal(stats.n_containers, 4);
    assert_int_equal(stats.leases, 0);
    sidecar_stage_close(&stage, client);
}

static void a_put_of_what_is_there_changes_nothing(void **state)
{
    (void)state;
    sidecar_stage stage;
    kvloom_client *client = sidecar_stage_open(&stage, 0);
    kvloom_error error;
    assert_int_equal(sidecar_stage_put(client, 1, TOKENS_SMALL, 0, &error), KVLOOM_OK);
    const kvloom_key key = sidecar_stage_key(1, TOKENS_SMALL);
    assert_int_equal(kvloom_put_begin(client, &key, &error), KVLOOM_OK);
    const kvloom_shape shape = sidecar_stage_shape();
    for (uint32_t l = 0; l < shape.n_layers; l++)
        memset(kvloom_put_layer(client, l), 0xee, kvloom_layer_bytes(&shape, TOKENS_SMALL));
    assert_int_equal(kvloom_put_end(client, 0, &error), KVLOOM_OK);
    kvloom_segment *segment = NULL;
    assert_int_equal(kvloom_get(client, &key, 0, &segment, &error), KVLOOM_OK);
    assert_true(sidecar_stage_is(segment, 1, TOKENS_SMALL));
    kvloom_segment_release(segment);
    sidecar_stage_close(&stage, client);
}

static void a_copying_get_gives_the_same_bytes(void **state)
{
    (void)state;
    sidecar_stage stage;
    kvloom_client *client = sidecar_stage_open(&stage, 0);
    kvloom_error error;
    const kvloom_shape shape = sidecar_stage_shape();
    const size_t sizes[] = {TOKENS_SMALL, TOKENS_LARGE};
    for (uint32_t i = 0; i < 2; i++) {
        const size_t n_layer = kvloom_layer_bytes(&shape, sizes[i]);
        const size_t n_bytes = n_layer * shape.n_layers;
        uint8_t *buffer = kvl_alloc(n_bytes);
        assert_non_null(buffer);
        assert_int_equal(sidecar_stage_put(client, i, sizes[i], 0, &error), KVLOOM_OK);
        const kvloom_key key = sidecar_stage_key(i, sizes[i]);
        size_t needed = 0;
        assert_int_equal(kvloom_get_into(client, &key, 0, buffer, n_bytes - 1, &needed, &error),
                         KVLOOM_ERR_TOO_LARGE);
        assert_int_equal(needed, n_bytes);
        assert_int_equal(kvloom_get_into(client, &key, 0, buffer, n_bytes, NULL, &error),
                         KVLOOM_OK);
        for (size_t at = 0; at < n_bytes; at++) {
            assert_int_equal(buffer[at],
                             sidecar_stage_byte(i, (uint32_t)(at / n_layer), at % n_layer));
        }
        kvl_free(buffer);
    }
    sidecar_stage_close(&stage, client);
}

static void what_is_not_there_is_a_miss_at_once(void **state)
{
    (void)state;
    sidecar_stage stage;
    kvloom_client *client = sidecar_stage_open(&stage, 64 << 20);
    kvloom_error error;
    const kvloom_key key = sidecar_stage_key(1, TOKENS_SMALL);
    kvloom_segment *segment = NULL;
    assert_int_equal(kvloom_get(client, &key, 0, &segment, &error), KVLOOM_ERR_NOT_FOUND);
    assert_int_equal(kvloom_get(client, &key, 1000, &segment, &error), KVLOOM_ERR_NOT_FOUND);
    assert_null(segment);
    assert_true(KVLOOM_IS_MISS(error.status));
    assert_int_equal(kvloom_remove(client, &key, &error), KVLOOM_ERR_NOT_FOUND);
    uint64_t lease = 0;
    assert_int_equal(kvloom_pin(client, &key, 100, 0, &lease, &error), KVLOOM_ERR_NOT_FOUND);
    sidecar_stage_close(&stage, client);
}

static void the_disk_gives_back_what_memory_has_lost(void **state)
{
    (void)state;
    sidecar_stage stage;
    kvloom_client *client = sidecar_stage_open(&stage, 64 << 20);
    kvloom_error error;
    assert_int_equal(sidecar_stage_put(client, 1, TOKENS_LARGE, 0, &error), KVLOOM_OK);
    assert_int_equal(sidecar_stage_put(client, 2, TOKENS_LARGE, KVLOOM_WRITE_BACK, &error),
                     KVLOOM_OK);
    sidecar_stage_stop(&stage);
    sidecar_stage_start(&stage);
    /* The same client: it dials the new process by itself. */
    kvloom_key keys[] = {sidecar_stage_key(1, TOKENS_LARGE), sidecar_stage_key(2, TOKENS_LARGE),
                         sidecar_stage_key(3, TOKENS_LARGE)};
    kvloom_place places[3];
    assert_int_equal(kvloom_locate(client, keys, 3, places, &error), KVLOOM_OK);
    assert_int_equal(places[0], KVLOOM_ON_DISK);
    assert_int_equal(places[1], KVLOOM_ON_DISK);
    assert_int_equal(places[2], KVLOOM_NOWHERE);
    for (uint32_t i = 1; i <= 2; i++) {
        kvloom_segment *segment = NULL;
        assert_int_equal(kvloom_get(client, &keys[i - 1], 0, &segment, &error),
                         KVLOOM_ERR_NOT_FOUND);
        assert_int_equal(kvloom_get(client, &keys[i - 1], 5000, &segment, &error), KVLOOM_OK);
        assert_int_equal(kvloom_segment_place(segment), KVLOOM_ON_DISK);
        assert_true(sidecar_stage_is(segment, i, TOKENS_LARGE));
        kvloom_segment_release(segment);
    }
    assert_int_equal(kvloom_locate(client, keys, 3, places, &error), KVLOOM_OK);
    assert_int_equal(places[0], KVLOOM_IN_MEMORY);
    sidecar_stage_close(&stage, client);
}

static void prefetch_brings_into_memory(void **state)
{
    (void)state;
    sidecar_stage stage;
    kvloom_client *client = sidecar_stage_open(&stage, 64 << 20);
    kvloom_error error;
    assert_int_equal(sidecar_stage_put(client, 1, TOKENS_LARGE, 0, &error), KVLOOM_OK);
    sidecar_stage_stop(&stage);
    sidecar_stage_start(&stage);
    const kvloom_key key = sidecar_stage_key(1, TOKENS_LARGE);
    assert_int_equal(kvloom_prefetch(client, &key, 1, 5000, &error), KVLOOM_OK);
    kvloom_place place = KVLOOM_NOWHERE;
    for (int i = 0; i < 500 && place != KVLOOM_IN_MEMORY; i++) {
        assert_int_equal(kvloom_locate(client, &key, 1, &place, &error), KVLOOM_OK);
        (void)poll(NULL, 0, 10);
    }
    assert_int_equal(place, KVLOOM_IN_MEMORY);
    kvloom_segment *segment = NULL;
    assert_int_equal(kvloom_get(client, &key, 0, &segment, &error), KVLOOM_OK);
    kvloom_segment_release(segment);
    sidecar_stage_close(&stage, client);
}

static void a_segment_outlives_lease_eviction_and_sidecar(void **state)
{
    (void)state;
    sidecar_stage stage;
    sidecar_stage_prepare(&stage, "s");
    stage.options.lease_ms_max = 50;
    stage.tenants[0].memory_bytes_max = (6 << 20) + (1 << 17);
    sidecar_stage_start(&stage);
    kvloom_client *client = sidecar_stage_connect(&stage, 0, NULL);
    kvloom_error error;
    assert_int_equal(sidecar_stage_put(client, 1, TOKENS_LARGE, 0, &error), KVLOOM_OK);
    const kvloom_key key = sidecar_stage_key(1, TOKENS_LARGE);
    kvloom_segment *segment = NULL;
    assert_int_equal(kvloom_get(client, &key, 0, &segment, &error), KVLOOM_OK);
    kvloom_stats stats = {.leases = 1};
    for (int i = 0; i < 200 && stats.leases > 0; i++) {
        (void)poll(NULL, 0, 20);
        assert_int_equal(kvloom_get_stats(client, &stats, &error), KVLOOM_OK);
    }
    assert_int_equal(stats.leases_expired, 1);
    /* 2 MiB each, three fit: the first one goes, since others are used as often. */
    for (uint32_t i = 2; i < 8; i++) {
        const kvloom_key other = sidecar_stage_key(i, TOKENS_LARGE);
        kvloom_segment *used = NULL;
        assert_int_equal(sidecar_stage_put(client, i, TOKENS_LARGE, 0, &error), KVLOOM_OK);
        assert_int_equal(kvloom_get(client, &other, 0, &used, &error), KVLOOM_OK);
        kvloom_segment_release(used);
    }
    kvloom_place place = KVLOOM_IN_MEMORY;
    assert_int_equal(kvloom_locate(client, &key, 1, &place, &error), KVLOOM_OK);
    assert_int_equal(place, KVLOOM_NOWHERE);
    assert_true(sidecar_stage_is(segment, 1, TOKENS_LARGE));
    sidecar_stage_stop(&stage);
    assert_true(sidecar_stage_is(segment, 1, TOKENS_LARGE));
    kvloom_close(client);
    kvloom_segment_release(segment);
    sidecar_stage_end(&stage);
}

static void what_is_leased_or_pinned_is_not_evicted_and_counts(void **state)
{
    (void)state;
    sidecar_stage stage;
    sidecar_stage_prepare(&stage, "s");
    stage.tenants[0].memory_bytes_max = (6 << 20) + (1 << 17); /* three of them */
    sidecar_stage_start(&stage);
    kvloom_client *client = sidecar_stage_connect(&stage, 0, NULL);
    kvloom_error error;
    const kvloom_key key = sidecar_stage_key(1, TOKENS_LARGE);
    kvloom_segment *segment = NULL;
    uint64_t lease = 0;
    assert_int_equal(sidecar_stage_put(client, 1, TOKENS_LARGE, 0, &error), KVLOOM_OK);
    assert_int_equal(sidecar_stage_put(client, 2, TOKENS_LARGE, 0, &error), KVLOOM_OK);
    assert_int_equal(kvloom_get(client, &key, 0, &segment, &error), KVLOOM_OK);
    const kvloom_key second = sidecar_stage_key(2, TOKENS_LARGE);
    assert_int_equal(kvloom_pin(client, &second, 0, 0, &lease, &error), KVLOOM_OK);
    for (uint32_t i = 3; i < 10; i++) {
        assert_int_equal(sidecar_stage_put(client, i, TOKENS_LARGE, 0, &error), KVLOOM_OK);
    }
    kvloom_key keys[2] = {sidecar_stage_key(1, TOKENS_LARGE), sidecar_stage_key(2, TOKENS_LARGE)};
    kvloom_place places[2];
    assert_int_equal(kvloom_locate(client, keys, 2, places, &error), KVLOOM_OK);
    assert_int_equal(places[0], KVLOOM_IN_MEMORY);
    assert_int_equal(places[1], KVLOOM_IN_MEMORY);
    /* With the third one held too there is no room, and no put goes beyond the cap. */
    const kvloom_key last = sidecar_stage_key(9, TOKENS_LARGE);
    kvloom_segment *third = NULL;
    assert_int_equal(kvloom_get(client, &last, 0, &third, &error), KVLOOM_OK);
    assert_int_equal(sidecar_stage_put(client, 11, TOKENS_LARGE, 0, &error), KVLOOM_ERR_BUSY);
    assert_int_equal(kvloom_unpin(client, lease, &error), KVLOOM_OK);
    assert_int_equal(sidecar_stage_put(client, 11, TOKENS_LARGE, 0, &error), KVLOOM_OK);
    kvloom_stats stats;
    assert_int_equal(kvloom_get_stats(client, &stats, &error), KVLOOM_OK);
    assert_true(stats.memory_bytes <= stats.memory_bytes_max);
    assert_int_equal(stats.leases, 2);
    kvloom_segment_release(segment);
    kvloom_segment_release(third);
    sidecar_stage_close(&stage, client);
}

static void leases_of_a_client_that_is_gone_end(void **state)
{
    (void)state;
    sidecar_stage stage;
    kvloom_client *client = sidecar_stage_open(&stage, 0);
    kvloom_client *other = sidecar_stage_connect(&stage, 0, NULL);
    kvloom_error error;
    uint64_t lease = 0;
    const kvloom_key key = sidecar_stage_key(1, TOKENS_SMALL);
    assert_int_equal(sidecar_stage_put(client, 1, TOKENS_SMALL, 0, &error), KVLOOM_OK);
    assert_int_equal(kvloom_pin(client, &key, 0, 0, &lease, &error), KVLOOM_OK);
    assert_int_not_equal(lease, 0);
    /* Nobody gives back what is not theirs (S11). */
    assert_int_equal(kvloom_unpin(other, lease, &error), KVLOOM_OK);
    kvloom_stats stats;
    assert_int_equal(kvloom_get_stats(other, &stats, &error), KVLOOM_OK);
    assert_int_equal(stats.leases, 1);
    assert_int_equal(stats.clients, 2);
    kvloom_close(client);
    for (int i = 0; i < 200 && stats.leases > 0; i++) {
        (void)poll(NULL, 0, 10);
        assert_int_equal(kvloom_get_stats(other, &stats, &error), KVLOOM_OK);
    }
    assert_int_equal(stats.leases, 0);
    assert_int_equal(stats.clients, 1);
    kvloom_close(other);
    sidecar_stage_end(&stage);
}

static void homes_name_different_segments(void **state)
{
    (void)state;
    sidecar_stage stage;
    kvloom_client *client = sidecar_stage_open(&stage, 0);
    kvloom_error error;
    assert_int_equal(sidecar_stage_put(client, 1, TOKENS_SMALL, 0, &error), KVLOOM_OK);
    const uint32_t home[] = {1, 2, 3};
    kvloom_key key = sidecar_stage_key(1, TOKENS_SMALL);
    key.home = home;
    key.n_home = 3;
    kvloom_segment *segment = NULL;
    assert_int_equal(kvloom_get(client, &key, 0, &segment, &error), KVLOOM_ERR_NOT_FOUND);
    sidecar_stage_close(&stage, client);
}

static void a_peer_gives_layers_one_after_another(void **state)
{
    (void)state;
    sidecar_stage near, far;
    sidecar_stage_prepare(&near, "near");
    sidecar_stage_prepare(&far, "far");
    sidecar_stage_with_disk(&near, 64 << 20);
    const kvl_exchange_peer to_far = {.name = "far", .endpoint = far.endpoint};
    const kvl_exchange_peer to_near = {.name = "near", .endpoint = near.endpoint};
    near.options.endpoint = near.endpoint;
    near.options.peers = &to_far;
    near.options.n_peers = 1;
    far.options.endpoint = far.endpoint;
    far.options.peers = &to_near;
    far.options.n_peers = 1;
    sidecar_stage_start(&far);
    sidecar_stage_start(&near);
    kvloom_client *writer = sidecar_stage_connect(&far, 0, NULL);
    kvloom_client *reader = sidecar_stage_connect(&near, 0, NULL);
    kvloom_error error;
    assert_int_equal(sidecar_stage_put(writer, 1, TOKENS_LARGE, 0, &error), KVLOOM_OK);
    const kvloom_key key = sidecar_stage_key(1, TOKENS_LARGE);
    kvloom_transfer *transfer = NULL;
    assert_int_equal(kvloom_get_start(reader, &key, 5000, &transfer, &error), KVLOOM_OK);
    uint32_t n_ready = 0;
    uint32_t n_seen = 0;
    while (kvloom_transfer_status(transfer, &n_ready, &error) == KVLOOM_IN_PROGRESS) {
        struct pollfd item = {.fd = kvloom_fd(reader), .events = POLLIN};
        assert_int_equal(poll(&item, 1, 5000), 1);
        assert_int_equal(kvloom_dispatch(reader, &error), KVLOOM_OK);
        uint32_t n_now = 0;
        (void)kvloom_transfer_status(transfer, &n_now, NULL);
        assert_true(n_now >= n_seen);
        if (n_now > 0) {
            size_t n_bytes = 0;
            const uint8_t *layer =
                kvloom_segment_layer(kvloom_transfer_segment(transfer), n_now - 1, &n_bytes);
            assert_non_null(layer);
            assert_int_equal(layer[n_bytes - 1], sidecar_stage_byte(1, n_now - 1, n_bytes - 1));
        }
        n_seen = n_now;
    }
    assert_int_equal(kvloom_transfer_status(transfer, &n_ready, &error), KVLOOM_OK);
    assert_int_equal(n_ready, 4);
    kvloom_segment *segment = kvloom_transfer_take(transfer);
    assert_non_null(segment);
    assert_int_equal(kvloom_segment_place(segment), KVLOOM_AT_PEER);
    assert_true(sidecar_stage_is(segment, 1, TOKENS_LARGE));
    kvloom_transfer_end(transfer);
    kvloom_segment_release(segment);
    /* From now on it is here, also on disk. */
    assert_int_equal(kvloom_get(reader, &key, 0, &segment, &error), KVLOOM_OK);
    kvloom_segment_release(segment);
    kvloom_stats stats = {.disk_bytes = 0};
    for (int i = 0; i < 200 && stats.disk_bytes == 0; i++) {
        (void)poll(NULL, 0, 10);
        assert_int_equal(kvloom_get_stats(reader, &stats, &error), KVLOOM_OK);
    }
    assert_true(stats.disk_bytes > 0);
    kvloom_close(writer);
    kvloom_close(reader);
    sidecar_stage_end(&near);
    sidecar_stage_end(&far);
}

static void a_transfer_that_is_not_wanted_leaves_no_lease(void **state)
{
    (void)state;
    sidecar_stage stage;
    kvloom_client *client = sidecar_stage_open(&stage, 0);
    kvloom_error error;
    const kvloom_key key = sidecar_stage_key(1, TOKENS_LARGE);
    assert_int_equal(sidecar_stage_put(client, 1, TOKENS_LARGE, 0, &error), KVLOOM_OK);
    kvloom_transfer *transfer = NULL;
    assert_int_equal(kvloom_get_start(client, &key, 1000, &transfer, &error), KVLOOM_OK);
    kvloom_transfer_end(transfer);
    kvloom_stats stats = {.leases = 1};
    for (int i = 0; i < 200 && stats.leases > 0; i++) {
        assert_int_equal(kvloom_get_stats(client, &stats, &error), KVLOOM_OK);
    }
    assert_int_equal(stats.leases, 0);
    /* One that a call has read along with its own reply is told by the descriptor all the same. */
    assert_int_equal(kvloom_get_start(client, &key, 1000, &transfer, &error), KVLOOM_OK);
    assert_int_equal(kvloom_get_stats(client, &stats, &error), KVLOOM_OK);
    struct pollfd item = {.fd = kvloom_fd(client), .events = POLLIN};
    assert_int_equal(poll(&item, 1, 1000), 1);
    assert_int_equal(kvloom_dispatch(client, &error), KVLOOM_OK);
    assert_int_equal(kvloom_transfer_status(transfer, NULL, &error), KVLOOM_OK);
    kvloom_close(client);
    kvloom_transfer_end(transfer);
    sidecar_stage_end(&stage);
}

static void listing_and_removing_by_id(void **state)
{
    (void)state;
    sidecar_stage stage;
    kvloom_client *client = sidecar_stage_open(&stage, 64 << 20);
    kvloom_error error;
    enum { N = 25 };
    for (uint32_t i = 0; i < N; i++) {
        assert_int_equal(sidecar_stage_put(client, i, TOKENS_SMALL, 0, &error), KVLOOM_OK);
    }
    kvloom_entry entries[7];
    size_t n_all = 0;
    const kvloom_digest *after = NULL;
    kvloom_digest last;
    for (size_t n = 7; n == 7; n_all += n) {
        assert_int_equal(kvloom_list(client, after, entries, 7, &n, &error), KVLOOM_OK);
        for (size_t i = 0; i < n; i++) {
            if (after != NULL || i > 0) assert_true(memcmp(&last, &entries[i].id, sizeof last) < 0);
            last = entries[i].id;
            after = &last;
            assert_int_equal(entries[i].kind, 1);
        }
    }
    assert_int_equal(n_all, N);
    kvloom_segment *segment = NULL;
    assert_int_equal(kvloom_get_id(client, &last, 0, &segment, &error), KVLOOM_OK);
    assert_memory_equal(kvloom_segment_id(segment), &last, sizeof last);
    kvloom_segment_release(segment);
    assert_int_equal(kvloom_remove_id(client, &last, &error), KVLOOM_OK);
    assert_int_equal(kvloom_get_id(client, &last, 1000, &segment, &error), KVLOOM_ERR_NOT_FOUND);
    sidecar_stage_close(&stage, client);
}

static void another_model_or_salt_is_refused_in_words(void **state)
{
    (void)state;
    sidecar_stage stage;
    sidecar_stage_prepare(&stage, "s");
    sidecar_stage_start(&stage);
    kvloom_options options = {.socket = stage.socket[0],
                              .fingerprint = kvloom_fingerprint("other", 5)};
    kvloom_client *client = NULL;
    kvloom_error error;
    assert_int_equal(kvloom_connect(&options, &client, &error), KVLOOM_ERR_FOREIGN);
    assert_null(client);
    assert_non_null(strstr(error.text, "keeps"));
    options.socket = "/tmp/kvloom-nobody.sock";
    assert_int_equal(kvloom_connect(&options, &client, &error), KVLOOM_ERR_UNREACHABLE);
    assert_non_null(strstr(error.text, "kvloom sidecar"));
    sidecar_stage_end(&stage);
}

static void a_map_can_neither_be_written_nor_cut(void **state)
{
    (void)state;
    kvl_container_use_shared_memory(1);
    const uint32_t tokens[] = {1};
    const kvl_container_info info = {.kind = KVL_CONTAINER_SEGMENT,
                                     .dtype = KVL_KV_F32,
                                     .n_layers = 1,
                                     .n_kv_heads = 1,
                                     .head_dim = 1024,
                                     .n_tokens = 1,
                                     .block_bytes = 8192,
                                     .tokens = tokens};
    kvl_container *container = NULL;
    assert_int_equal(kvl_container_create(&info, &container, NULL), KVL_OK);
    const int fd = kvl_container_lend(container);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, 0), -1);
    assert_int_equal(write(fd, "x", 1), -1);
    assert_ptr_equal(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
    uint8_t *map = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
    assert_ptr_not_equal(map, MAP_FAILED);
    assert_int_equal(mprotect(map, 4096, PROT_READ | PROT_WRITE), -1);
    assert_int_equal(munmap(map, 4096), 0);
    kvl_container_release(container);
    kvl_container_use_shared_memory(0);
}

enum { ANCHOR_LAYER = 50000 };

static kvloom_status put_anchor(kvloom_client *client, const char *template_name, uint32_t slot,
                                uint32_t number, kvloom_digest *id)
{
    static uint8_t layer[ANCHOR_LAYER];
    const kvloom_key text = sidecar_stage_key(number, TOKENS_SMALL);
    const kvloom_anchor_key key = {.template_name = template_name,
                                   .slot = slot,
                                   .tokens = text.tokens,
                                   .n_tokens = text.n_tokens};
    const void *layers[] = {layer, layer, layer, layer};
    memset(layer, (int)number, sizeof layer);
    return kvloom_put_anchor(client, &key, layers, sizeof layer, &number, sizeof number, 0, id,
                             NULL);
}

static bool is_anchor(kvloom_client *client, const kvloom_digest *id, uint32_t number)
{
    kvloom_segment *segment = NULL;
    if (kvloom_get_id(client, id, 2000, &segment, NULL) != KVLOOM_OK) return false;
    size_t n = 0, n_tokens = 0;
    const kvloom_key text = sidecar_stage_key(number, TOKENS_SMALL);
    const void *extra = kvloom_segment_extra(segment, &n);
    bool is_it = n == sizeof number && memcmp(extra, &number, n) == 0;
    const uint32_t *tokens = kvloom_segment_tokens(segment, &n_tokens);
    is_it &= n_tokens == TOKENS_SMALL && memcmp(tokens, text.tokens, 4 * n_tokens) == 0;
    for (uint32_t l = 0; l < 4; l++) {
        const uint8_t *layer = kvloom_segment_layer(segment, l, &n);
        is_it &= n == ANCHOR_LAYER && layer[0] == number && layer[n - 1] == number;
    }
    kvloom_segment_release(segment);
    return is_it;
}

/* Anchors are found by their slot, from memory and from disk, by their own tenant alone. */
static void anchors_are_found_by_their_slot(void **state)
{
    (void)state;
    enum { MANY = 20 };
    sidecar_stage stage;
    sidecar_stage_prepare(&stage, "s");
    sidecar_stage_with_disk(&stage, 64 << 20);
    sidecar_stage_start(&stage);
    kvloom_client *a = sidecar_stage_connect(&stage, 0, NULL);
    kvloom_client *strangers[] = {sidecar_stage_connect(&stage, 1, NULL),
                                  sidecar_stage_connect(&stage, 0, "salt")};
    kvloom_digest ids[2 * MANY], id;
    size_t n = 0;
    assert_int_equal(sidecar_stage_put(a, 1, TOKENS_SMALL, 0, NULL), KVLOOM_OK);
    for (uint32_t i = 0; i < MANY; i++) {
        assert_int_equal(put_anchor(a, "review/1", 0, i, &id), KVLOOM_OK);
        assert_true(is_anchor(a, &id, i));
        assert_int_equal(put_anchor(a, "review/1", 0, i, &ids[0]), KVLOOM_OK); /* again: the same */
        assert_memory_equal(&id, &ids[0], sizeof id);
    }
    assert_int_equal(put_anchor(a, "review/1", 1, 3, NULL), KVLOOM_OK);
    assert_int_equal(put_anchor(a, "review/10", 0, 4, NULL), KVLOOM_OK);
    for (int round = 0; round < 2; round++) {
        uint32_t seen = 0;
        assert_int_equal(kvloom_list_anchors(a, "review/1", 0, ids, 2 * MANY, &n, NULL), 0);
        assert_int_equal(n, MANY);
        for (size_t k = 0; k < n; k++) {
            for (uint32_t i = 0; i < MANY; i++) seen |= is_anchor(a, &ids[k], i) ? 1u << i : 0;
        }
        assert_int_equal(seen, (1u << MANY) - 1);
        assert_int_equal(kvloom_list_anchors(a, "review/1", 1, ids, 2 * MANY, &n, NULL), 0);
        assert_int_equal(n, 1);
        assert_true(is_anchor(a, &ids[0], 3));
        assert_int_equal(kvloom_list_anchors(a, "review", 0, ids, 2 * MANY, &n, NULL), 0);
        assert_int_equal(n, 0);
        assert_int_equal(kvloom_list_anchors(a, "review/1", 0, ids, 3, &n, NULL), 0);
        assert_int_equal(n, 3);
        for (size_t i = 0; i < 2 && round == 0; i++) {
            assert_int_equal(
                kvloom_list_anchors(strangers[i], "review/1", 0, ids, 2 * MANY, &n, NULL), 0);
            assert_int_equal(n, 0);
            kvloom_close(strangers[i]);
        }
        sidecar_stage_stop(&stage);
        sidecar_stage_start(&stage);
    }
    /* Limits, in words. */
    kvloom_error error = {.text = ""};
    assert_int_equal(kvloom_list_anchors(a, "", 0, ids, 1, &n, &error), KVLOOM_ERR_INVALID);
    assert_int_equal(kvloom_list_anchors(a, "x", 1024, ids, 1, &n, &error), KVLOOM_ERR_INVALID);
    assert_non_null(strstr(error.text, "slot 1024"));
    assert_int_equal(put_anchor(a, "x", 1024, 1, NULL), KVLOOM_ERR_INVALID);
    sidecar_stage_close(&stage, a);
}

/* Hits, misses and puts in their order, of the own tenant alone, from the first question on; what
 * came too late is counted. */
static void accesses_are_told_to_their_own_tenant(void **state)
{
    (void)state;
    enum { ROOM = 1024, MANY = 17000 };
    static kvloom_access accesses[ROOM];
    static const uint32_t wanted[] = {KVLOOM_ACCESS_MISS, KVLOOM_ACCESS_PUT, KVLOOM_ACCESS_HIT};
    sidecar_stage stage;
    sidecar_stage_prepare(&stage, "s");
    sidecar_stage_start(&stage);
    kvloom_client *a = sidecar_stage_connect(&stage, 0, NULL);
    kvloom_client *b = sidecar_stage_connect(&stage, 1, NULL);
    char tenant[KVLOOM_TENANT_BYTES];
    uint64_t after = 0, after_b = 0, n_lost = 9;
    size_t n = 0;
    kvloom_segment *segment = NULL;
    const kvloom_key key = sidecar_stage_key(1, TOKENS_SMALL);
    assert_int_equal(kvloom_get(a, &key, 0, &segment, NULL), KVLOOM_ERR_NOT_FOUND);
    assert_int_equal(kvloom_accesses(a, &after, accesses, ROOM, &n, &n_lost, tenant, NULL), 0);
    assert_int_equal(n, 0); /* nothing was noted before */
    assert_string_equal(tenant, "a");
    assert_int_equal(kvloom_accesses(b, &after_b, accesses, ROOM, &n, NULL, NULL, NULL), 0);
    assert_int_equal(kvloom_get(a, &key, 0, &segment, NULL), KVLOOM_ERR_NOT_FOUND);
    assert_int_equal(sidecar_stage_put(a, 1, TOKENS_SMALL, 0, NULL), KVLOOM_OK);
    assert_int_equal(kvloom_get(a, &key, 0, &segment, NULL), KVLOOM_OK);
    assert_int_equal(kvloom_accesses(a, &after, accesses, ROOM, &n, &n_lost, NULL, NULL), 0);
    assert_int_equal(n, 3);
    assert_int_equal(n_lost, 0);
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(accesses[i].what, wanted[i]);
        assert_memory_equal(&accesses[i].id, kvloom_segment_id(segment), sizeof accesses[i].id);
        assert_true((accesses[i].n_bytes > 0) == (i > 0));
    }
    kvloom_segment_release(segment);
    assert_int_equal(kvloom_accesses(b, &after_b, accesses, ROOM, &n, NULL, NULL, NULL), 0);
    assert_int_equal(n, 0);
    for (int i = 0; i < MANY; i++)
        assert_int_equal(kvloom_get(b, &key, 0, &segment, NULL), KVLOOM_ERR_NOT_FOUND);
    assert_int_equal(kvloom_accesses(b, &after_b, accesses, ROOM, &n, &n_lost, NULL, NULL), 0);
    assert_int_equal(n, ROOM);
    assert_int_equal(n_lost, MANY - 16384);
    kvloom_close(a);
    kvloom_close(b);
    sidecar_stage_end(&stage);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_put_can_be_got_from_memory),
        cmocka_unit_test(a_put_of_what_is_there_changes_nothing),
        cmocka_unit_test(a_copying_get_gives_the_same_bytes),
        cmocka_unit_test(what_is_not_there_is_a_miss_at_once),
        cmocka_unit_test(the_disk_gives_back_what_memory_has_lost),
        cmocka_unit_test(prefetch_brings_into_memory),
        cmocka_unit_test(a_segment_outlives_lease_eviction_and_sidecar),
        cmocka_unit_test(what_is_leased_or_pinned_is_not_evicted_and_counts),
        cmocka_unit_test(leases_of_a_client_that_is_gone_end),
        cmocka_unit_test(homes_name_different_segments),
        cmocka_unit_test(a_peer_gives_layers_one_after_another),
        cmocka_unit_test(a_transfer_that_is_not_wanted_leaves_no_lease),
        cmocka_unit_test(listing_and_removing_by_id),
        cmocka_unit_test(another_model_or_salt_is_refused_in_words),
        cmocka_unit_test(a_map_can_neither_be_written_nor_cut),
        cmocka_unit_test(anchors_are_found_by_their_slot),
        cmocka_unit_test(accesses_are_told_to_their_own_tenant),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
