/* exchange_seal_test.c: sealed records and the bulk channel against somebody on the wire (S6,
 * S9, S12). */
#include "base/alloc.h"
#include "exchange/bulk_channel.h"
#include "test_random.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

enum { RECORD = 1000, WAIT_MS = 5000 };

static const uint8_t asker_share[KVL_SHARE_BYTES] = {1, 2, 3};
static const uint8_t server_share[KVL_SHARE_BYTES] = {4, 5, 6};

static void make_pair(kvl_seal *sender, kvl_seal *receiver, bool uses_aes)
{
    kvl_seal_wipe(sender);
    kvl_seal_wipe(receiver);
    assert_true(kvl_seal_init(sender, asker_share, server_share, uses_aes));
    assert_true(kvl_seal_init(receiver, asker_share, server_share, uses_aes));
}

/* S6: whatever is done to a record, it does not open, and nothing of it comes out. */
static void check_tampering(bool uses_aes)
{
    kvl_seal sender = {.aes = NULL}, receiver = {.aes = NULL};
    uint8_t text[RECORD], sealed[2][RECORD + KVL_SEAL_TAG_BYTES], opened[RECORD];
    for (size_t i = 0; i < RECORD; i++) text[i] = (uint8_t)i;
    make_pair(&sender, &receiver, uses_aes);
    for (int i = 0; i < 2; i++) assert_true(kvl_seal_close(&sender, text, RECORD, sealed[i]));
    assert_memory_not_equal(sealed[0], sealed[1], RECORD); /* the same text twice does not show */
    assert_true(kvl_seal_open(&receiver, sealed[0], sizeof sealed[0], opened));
    assert_memory_equal(opened, text, RECORD);
    assert_true(kvl_seal_open(&receiver, sealed[1], sizeof sealed[1], opened));

    make_pair(&sender, &receiver, uses_aes); /* replayed */
    assert_true(kvl_seal_open(&receiver, sealed[0], sizeof sealed[0], opened));
    assert_false(kvl_seal_open(&receiver, sealed[0], sizeof sealed[0], opened));
    make_pair(&sender, &receiver, uses_aes); /* reordered, or the first was dropped */
    assert_false(kvl_seal_open(&receiver, sealed[1], sizeof sealed[1], opened));
    make_pair(&sender, &receiver, uses_aes); /* cut short */
    assert_false(kvl_seal_open(&receiver, sealed[0], sizeof sealed[0] - 1, opened));
    make_pair(&sender, &receiver, uses_aes);
    assert_false(kvl_seal_open(&receiver, sealed[0], KVL_SEAL_TAG_BYTES - 1, opened));
    for (size_t bit = 0; bit < 8 * sizeof sealed[0]; bit += 7) {
        make_pair(&sender, &receiver, uses_aes);
        sealed[0][bit / 8] ^= (uint8_t)(1u << bit % 8);
        assert_false(kvl_seal_open(&receiver, sealed[0], sizeof sealed[0], opened));
        sealed[0][bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    kvl_seal other; /* another connection's key */
    assert_true(kvl_seal_init(&other, server_share, asker_share, uses_aes));
    assert_false(kvl_seal_open(&other, sealed[0], sizeof sealed[0], opened));
    kvl_seal_wipe(&other);
    kvl_seal_wipe(&sender);
    kvl_seal_wipe(&receiver);
}

static void s6_a_changed_repeated_or_moved_record_does_not_open(void **state)
{
    (void)state;
    check_tampering(false);
    if (kvl_seal_has_aes()) check_tampering(true);
}

/* ---- the channel: we are the one at the other end of the wire ---- */

static int listen_somewhere(uint16_t *port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t n = sizeof address;
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(fd, (const struct sockaddr *)&address, n), 0);
    assert_int_equal(listen(fd, 4), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&address, &n), 0);
    *port = ntohs(address.sin_port);
    return fd;
}

static int dial(uint16_t port)
{
    const struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(fd, (const struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

typedef struct taken {
    size_t n;
    uint8_t first;
} taken;

static void take(void *context, kvl_link link, const void *control, size_t n_control_bytes,
                 const kvl_frame *frames, size_t n_frames, const uint64_t *checksum)
{
    taken *t = context;
    assert_null(checksum);
    assert_int_equal(link, 0);
    assert_int_equal(n_control_bytes, 4);
    assert_memory_equal(control, "ctrl", 4);
    assert_int_equal(n_frames, 1);
    assert_int_equal(frames[0].n_bytes, RECORD);
    t->first = ((const uint8_t *)frames[0].bytes)[0];
    t->n++;
}

static void put_u32(uint8_t *bytes, size_t value)
{
    for (int i = 0; i < 4; i++) bytes[i] = (uint8_t)(value >> (8 * i));
}

/* One message as a server would send it: two records. Returns its bytes. */
static size_t seal_message(kvl_seal *seal, uint8_t first, uint8_t *out)
{
    uint8_t head[12], payload[RECORD];
    put_u32(head, RECORD);
    put_u32(head + 4, 4);
    memcpy(head + 8, "ctrl", 4);
    memset(payload, first, sizeof payload);
    put_u32(out, sizeof head + KVL_SEAL_TAG_BYTES);
    assert_true(kvl_seal_close(seal, head, sizeof head, out + 4));
    uint8_t *second = out + 4 + sizeof head + KVL_SEAL_TAG_BYTES;
    put_u32(second, RECORD + KVL_SEAL_TAG_BYTES);
    assert_true(kvl_seal_close(seal, payload, RECORD, second + 4));
    return (size_t)(second + 4 + RECORD + KVL_SEAL_TAG_BYTES - out);
}

typedef enum attack { HONEST, FLIP, REPLAY, SWAP, HUGE_LENGTH, PLAIN } attack;

/* An asker's channel against a server under our control. Returns how many messages it took. */
static size_t run_attack(attack what, uint64_t *n_refused)
{
    uint16_t port = 0;
    const int listener = listen_somewhere(&port);
    const int wake = eventfd(0, EFD_NONBLOCK);
    const kvl_bulk_channel_options options = {.wake_fd = wake, .has_keys = true};
    kvl_bulk_channel *channel = NULL;
    kvl_bulk_offer ours, theirs = {.port = port, .has_aes = kvl_seal_has_aes(), .token = {9}};
    assert_int_equal(kvl_bulk_channel_open(&options, &channel, NULL), KVL_OK);
    kvl_bulk_channel_offer(channel, 0, &ours);
    memcpy(theirs.share, server_share, sizeof theirs.share);
    kvl_bulk_channel_agree(channel, 0, &theirs, "tcp://127.0.0.1:1");
    const int fd = accept(listener, NULL, NULL);
    uint8_t token[KVL_BULK_TOKEN_BYTES];
    assert_int_equal(recv(fd, token, sizeof token, MSG_WAITALL), sizeof token);
    assert_memory_equal(token, theirs.token, sizeof token);

    static uint8_t bytes[3][2 * RECORD];
    kvl_seal seal;
    assert_true(kvl_seal_init(&seal, ours.share, server_share, kvl_seal_has_aes()));
    size_t n = 0;
    for (int i = 0; i < 3; i++) n = seal_message(&seal, (uint8_t)(10 + i), bytes[i]);
    kvl_seal_wipe(&seal);
    if (what == FLIP) bytes[1][n / 2] ^= 1;
    if (what == HUGE_LENGTH) put_u32(bytes[1], 0x7fffffff);
    if (what == PLAIN) {
        put_u32(bytes[1], 12);
        put_u32(bytes[1] + 4, RECORD);
        put_u32(bytes[1] + 8, 4);
        memcpy(bytes[1] + 12, "ctrl", 4);
    }
    const int order[] = {0, what == REPLAY ? 0 : what == SWAP ? 2 : 1, what == SWAP ? 1 : 2};
    for (int i = 0; i < 3; i++) (void)send(fd, bytes[order[i]], n, MSG_NOSIGNAL);
    taken got = {0};
    for (int i = 0; i < WAIT_MS / 5 && got.n < 3; i++) {
        (void)kvl_bulk_channel_drain(channel, take, &got);
        if (kvl_bulk_channel_n_refused(channel) > 0) break;
        (void)poll(NULL, 0, 5);
    }
    (void)kvl_bulk_channel_drain(channel, take, &got);
    *n_refused = kvl_bulk_channel_n_refused(channel);
    kvl_bulk_channel_close(channel);
    (void)close(fd);
    (void)close(listener);
    (void)close(wake);
    return got.n;
}

static void s6_the_channel_ends_at_the_first_wrong_record(void **state)
{
    (void)state;
    uint64_t n_refused = 0;
    assert_int_equal(run_attack(HONEST, &n_refused), 3);
    assert_int_equal(n_refused, 0);
    const attack attacks[] = {FLIP, REPLAY, SWAP, HUGE_LENGTH, PLAIN};
    for (size_t i = 0; i < sizeof attacks / sizeof *attacks; i++) {
        assert_int_equal(run_attack(attacks[i], &n_refused), 1);
        assert_int_equal(n_refused, 1);
    }
}

/* A server's channel against those who connect to it. */
static void s9_without_a_token_the_bulk_endpoint_says_nothing(void **state)
{
    (void)state;
    const int wake = eventfd(0, EFD_NONBLOCK);
    const kvl_bulk_channel_options options = {
        .endpoint = "tcp://127.0.0.1:1", .wake_fd = wake, .has_keys = true};
    kvl_bulk_channel *channel = NULL;
    kvl_bulk_offer ours, theirs = {.port = 1, .has_aes = kvl_seal_has_aes()};
    assert_int_equal(kvl_bulk_channel_open(&options, &channel, NULL), KVL_OK);
    kvl_bulk_channel_offer(channel, KVL_LINK_CLIENT, &ours);
    memcpy(theirs.share, asker_share, sizeof theirs.share);
    kvl_bulk_channel_agree(channel, KVL_LINK_CLIENT, &theirs, "");
    uint8_t byte = 0;
    /* A wrong token, one bit off, is answered with an end; so is silence, later. */
    uint8_t wrong[KVL_BULK_TOKEN_BYTES];
    memcpy(wrong, ours.token, sizeof wrong);
    wrong[15] ^= 1;
    int fd = dial(ours.port);
    assert_int_equal(send(fd, wrong, sizeof wrong, MSG_NOSIGNAL), sizeof wrong);
    assert_int_equal(recv(fd, &byte, 1, 0), 0);
    (void)close(fd);
    const int silent = dial(ours.port);
    struct pollfd item = {.fd = silent, .events = POLLIN};
    assert_int_equal(poll(&item, 1, KVL_BULK_GREETING_MS + WAIT_MS), 1);
    assert_int_equal(recv(silent, &byte, 1, 0), 0);
    (void)close(silent);
    assert_int_equal(kvl_bulk_channel_n_refused(channel), 2);
    assert_false(kvl_bulk_channel_is_ready(channel, KVL_LINK_CLIENT));
    /* The right one opens it, once. */
    fd = dial(ours.port);
    assert_int_equal(send(fd, ours.token, sizeof ours.token, MSG_NOSIGNAL), sizeof ours.token);
    for (int i = 0; i < WAIT_MS / 5 && !kvl_bulk_channel_is_ready(channel, KVL_LINK_CLIENT); i++)
        (void)poll(NULL, 0, 5);
    assert_true(kvl_bulk_channel_is_ready(channel, KVL_LINK_CLIENT));
    const int second = dial(ours.port);
    assert_int_equal(send(second, ours.token, sizeof ours.token, MSG_NOSIGNAL), sizeof ours.token);
    assert_int_equal(recv(second, &byte, 1, 0), 0);
    (void)close(second);
    /* What comes then is sealed for this connection: no plain text on the wire (S24). */
    uint8_t text[RECORD], wire[2 * RECORD];
    memset(text, 'K', sizeof text);
    kvl_bulk *bulk = kvl_bulk_copy(text, sizeof text);
    const kvl_frame frame = {kvl_bulk_bytes(bulk), RECORD};
    assert_int_equal(kvl_bulk_channel_send(channel, KVL_LINK_CLIENT, "ctrl", 4, &frame, 1,
                                           (kvl_owner){.bulk = bulk}),
                     KVL_OK);
    kvl_bulk_release(bulk);
    const size_t n = 4 + 12 + KVL_SEAL_TAG_BYTES + 4 + RECORD + KVL_SEAL_TAG_BYTES;
    assert_int_equal(recv(fd, wire, n, MSG_WAITALL), n);
    assert_null(memmem(wire, n, "KKKK", 4));
    assert_null(memmem(wire, n, "ctrl", 4));
    kvl_seal seal;
    uint8_t opened[RECORD];
    assert_true(kvl_seal_init(&seal, asker_share, ours.share, kvl_seal_has_aes()));
    assert_true(kvl_seal_open(&seal, wire + 4, 12 + KVL_SEAL_TAG_BYTES, opened));
    assert_true(kvl_seal_open(&seal, wire + 8 + 12 + KVL_SEAL_TAG_BYTES,
                              RECORD + KVL_SEAL_TAG_BYTES, opened));
    assert_memory_equal(opened, text, RECORD);
    kvl_seal_wipe(&seal);
    kvl_bulk_channel_close(channel);
    (void)close(fd);
    (void)close(wake);
}

static size_t open_descriptors(void)
{
    size_t n = 0;
    DIR *folder = opendir("/proc/self/fd");
    assert_non_null(folder);
    while (readdir(folder) != NULL) n++;
    (void)closedir(folder);
    return n;
}

/* S12: connections that only come and go leave nothing behind. */
static void s12_strangers_leave_nothing_behind(void **state)
{
    (void)state;
    const int wake = eventfd(0, EFD_NONBLOCK);
    const int64_t live = kvl_alloc_live();
    const kvl_bulk_channel_options options = {
        .endpoint = "tcp://127.0.0.1:1", .wake_fd = wake, .has_keys = true};
    kvl_bulk_channel *channel = NULL;
    kvl_bulk_offer ours;
    assert_int_equal(kvl_bulk_channel_open(&options, &channel, NULL), KVL_OK);
    kvl_bulk_channel_offer(channel, KVL_LINK_CLIENT, &ours);
    const size_t before = open_descriptors();
    for (int i = 0; i < 2000; i++) {
        const int fd = dial(ours.port);
        if (i % 3 == 0) (void)send(fd, "hello, I have no token", 22, MSG_NOSIGNAL);
        (void)close(fd);
    }
    for (int i = 0; i < WAIT_MS / 5 && kvl_bulk_channel_n_refused(channel) < 2000; i++)
        (void)poll(NULL, 0, 5);
    assert_int_equal(kvl_bulk_channel_n_refused(channel), 2000);
    for (int i = 0; i < WAIT_MS / 5 && open_descriptors() > before; i++) (void)poll(NULL, 0, 5);
    assert_true(open_descriptors() <= before);
    kvl_bulk_channel_close(channel);
    (void)close(wake);
    assert_int_equal(kvl_alloc_live(), live);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(s6_a_changed_repeated_or_moved_record_does_not_open),
        cmocka_unit_test(s6_the_channel_ends_at_the_first_wrong_record),
        cmocka_unit_test(s9_without_a_token_the_bulk_endpoint_says_nothing),
        cmocka_unit_test(s12_strangers_leave_nothing_behind),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
