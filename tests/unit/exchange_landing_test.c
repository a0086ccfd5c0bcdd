/* exchange/landing: blocks that go straight into a container. What has been checked never changes,
 * whatever a sender does (S6, S9), and what is written after the end is written elsewhere. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "exchange/landing.h"
#include "tiny_store.h"

enum { N_BLOCKS = 4, BLOCK = 1000, LINK = 3, REQUEST = 77 };

static kvl_landings landings;
static kvl_container *whole, *arriving;

static int set_up(void **state)
{
    (void)state;
    const tiny_shape shape = {.n_blocks = N_BLOCKS, .block_bytes = BLOCK};
    size_t n_header = 0;
    whole = tiny_container(5, 0, &shape);
    if (whole == NULL) return 1;
    const void *header = kvl_container_header(whole, &n_header);
    kvl_landings_init(&landings);
    return kvl_container_from_header(header, n_header, &arriving, NULL);
}

static int tear_down(void **state)
{
    (void)state;
    kvl_container_release(whole);
    kvl_container_release(arriving);
    kvl_landings_deinit(&landings);
    return 0;
}

static kvl_message block_of(uint32_t block, uint64_t offset)
{
    kvl_message message = {.kind = KVL_MESSAGE_BLOCK, .request = REQUEST};
    message.block.id = kvl_container_info_of(whole)->id;
    message.block.block = block;
    message.block.offset = offset;
    message.block.total = BLOCK;
    return message;
}

/* True: the piece has landed where it belongs, with the bytes of the container that is sent. */
static bool land(uint32_t block, uint64_t offset, size_t n_bytes, kvl_piece *piece)
{
    const kvl_message message = block_of(block, offset);
    if (!kvl_landings_take(&landings, LINK, &message, n_bytes, piece)) return false;
    size_t n_block_bytes = 0;
    const uint8_t *from = kvl_container_block_view(whole, block, &n_block_bytes);
    const uint8_t *to = kvl_container_block_view(arriving, block, &n_block_bytes);
    assert_ptr_equal(piece->bytes, to + offset);
    bool is_there = true;
    for (size_t at = 0; at < n_bytes && is_there; at += 7) {
        const size_t n = n_bytes - at < 7 ? n_bytes - at : 7;
        is_there = kvl_landings_enter(&landings, piece);
        if (!is_there) break;
        memcpy(piece->bytes + at, from + offset + at, n);
        kvl_landings_leave(&landings, piece, piece->bytes + at, n);
    }
    is_there = is_there && kvl_landings_finish(&landings, piece, n_bytes);
    kvl_container_release(piece->container);
    return is_there;
}

static void a_container_arrives_in_place(void **state)
{
    (void)state;
    kvl_piece piece;
    kvl_landings_begin(&landings, LINK, REQUEST, arriving, 0);
    for (uint32_t i = 0; i < N_BLOCKS; i++) {
        assert_true(land(i, 0, 600, &piece));
        assert_false(piece.ends_block);
        assert_true(land(i, 600, 400, &piece));
        assert_true(piece.ends_block);
        assert_int_equal(kvl_container_block_accept(arriving, i, piece.checksum ^ 1, NULL),
                         KVL_ERR_DAMAGED);
        assert_int_equal(kvl_container_block_accept(arriving, i, piece.checksum, NULL), KVL_OK);
        assert_int_equal(kvl_container_block_check(arriving, i, NULL), KVL_OK);
    }
    assert_true(kvl_container_is_sealed(arriving));
    assert_true(tiny_container_is(arriving, 5, 0));
    assert_false(land(N_BLOCKS, 0, 600, &piece)); /* one more than there are */
}

static void s9_only_the_piece_that_follows_lands(void **state)
{
    (void)state;
    kvl_piece piece;
    assert_false(land(0, 0, BLOCK, &piece)); /* nobody waits for it */
    kvl_landings_begin(&landings, LINK, REQUEST, arriving, 1);
    assert_false(land(0, 0, BLOCK, &piece));     /* before what is wanted */
    assert_false(land(1, 1, 10, &piece));        /* begins within a block */
    assert_false(land(1, 0, BLOCK + 1, &piece)); /* ends behind it */
    assert_false(land(UINT32_MAX, 0, 1, &piece));
    assert_false(land(1, 0, 0, &piece));
    kvl_message message = block_of(1, UINT64_MAX);
    assert_false(kvl_landings_take(&landings, LINK, &message, 1, &piece));
    message = block_of(1, 0);
    message.block.total++;
    assert_false(kvl_landings_take(&landings, LINK, &message, 1, &piece));
    message = block_of(1, 0);
    message.block.id.bytes[0] ^= 1;
    assert_false(kvl_landings_take(&landings, LINK, &message, 1, &piece));
    message = block_of(1, 0);
    assert_false(kvl_landings_take(&landings, LINK + 1, &message, 1, &piece));
    message.request++;
    assert_false(kvl_landings_take(&landings, LINK, &message, 1, &piece));
    message = block_of(1, 0);
    message.kind = KVL_MESSAGE_FETCH_DONE;
    assert_false(kvl_landings_take(&landings, LINK, &message, 1, &piece));
    assert_true(land(1, 0, BLOCK, &piece));
    assert_false(land(1, 0, BLOCK, &piece)); /* the same once more */
    assert_false(land(3, 0, BLOCK, &piece)); /* one is missing */
    assert_true(land(2, 0, BLOCK, &piece));
}

/* A sender that sends a block twice, on both connections, must not reach one that was checked. */
static void s6_a_claimed_block_is_never_written_again(void **state)
{
    (void)state;
    kvl_piece piece;
    kvl_landings_begin(&landings, LINK, REQUEST, arriving, 0);
    assert_true(kvl_landings_claim(&landings, LINK, REQUEST, 0));
    assert_false(land(0, 0, BLOCK, &piece));
    assert_true(land(1, 0, 500, &piece));
    assert_true(kvl_landings_claim(&landings, LINK, REQUEST, 0)); /* the rest of the same block */
    const kvl_message message = block_of(1, 500);
    assert_true(kvl_landings_take(&landings, LINK, &message, 500, &piece));
    assert_false(kvl_landings_claim(&landings, LINK, REQUEST, 1)); /* on its way: it ends */
    assert_false(kvl_landings_enter(&landings, &piece));
    assert_false(kvl_landings_finish(&landings, &piece, 500));
    kvl_container_release(piece.container);
    assert_false(land(2, 0, BLOCK, &piece));
    assert_true(kvl_landings_claim(&landings, LINK, REQUEST, 2)); /* nobody else is there */
}

static void what_has_ended_is_not_written_to(void **state)
{
    (void)state;
    for (int way = 0; way < 2; way++) {
        kvl_piece piece, other;
        kvl_landings_begin(&landings, LINK, REQUEST, arriving, 0);
        const kvl_message message = block_of(0, 0);
        assert_true(kvl_landings_take(&landings, LINK, &message, BLOCK, &piece));
        if (way == 0) kvl_landings_end(&landings, LINK, REQUEST);
        if (way == 1) kvl_landings_end_link(&landings, LINK);
        /* The place is taken by another stream: the old piece must not pass for one of it. */
        kvl_landings_begin(&landings, LINK, REQUEST, arriving, 0);
        assert_true(kvl_landings_take(&landings, LINK, &message, BLOCK, &other));
        assert_ptr_equal(other.landing, piece.landing);
        assert_false(kvl_landings_enter(&landings, &piece));
        assert_true(kvl_landings_enter(&landings, &other));
        kvl_landings_leave(&landings, &other, other.bytes, 0);
        kvl_container_release(piece.container);
        kvl_container_release(other.container);
        kvl_landings_end_link(&landings, LINK);
        assert_int_equal(kvl_container_n_references(arriving), 1);
    }
}

static void a_full_table_changes_nothing(void **state)
{
    (void)state;
    kvl_piece piece;
    for (uint64_t i = 0; i <= KVL_LANDINGS_MAX; i++)
        kvl_landings_begin(&landings, LINK, REQUEST + 1 + i, arriving, 0);
    kvl_landings_begin(&landings, LINK, REQUEST, arriving, 0);
    assert_false(land(0, 0, BLOCK, &piece));
    kvl_landings_end(&landings, LINK, REQUEST);
    assert_true(kvl_landings_claim(&landings, LINK, REQUEST, 0));
    kvl_landings_end(&landings, LINK, REQUEST + 1);
    kvl_landings_begin(&landings, LINK, REQUEST, arriving, 0);
    assert_true(land(0, 0, BLOCK, &piece));
}

#define CASE(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(a_container_arrives_in_place),
        CASE(s9_only_the_piece_that_follows_lands),
        CASE(s6_a_claimed_block_is_never_written_again),
        CASE(what_has_ended_is_not_written_to),
        CASE(a_full_table_changes_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
