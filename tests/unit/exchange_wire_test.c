/* exchange/wire: what is encoded is decoded to the same; what is not a message is refused, whatever
 * its bytes. Method: random messages of every kind, then the same with bytes changed, cut and
 * added. KVL_TEST_SEED=n replays. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "exchange/wire.h"
#include "test_random.h"

enum { ROUNDS = 3000, KINDS = KVL_MESSAGE_ERROR };

static uint8_t bulk[KVL_FRAME_BYTES_MAX];
static kvl_wire_decoder decoder;

typedef struct sample {
    kvl_message message;
    kvl_frame frames[KVL_FRAMES_MAX];
    size_t n_frames;
} sample;

static kvl_digest random_digest(kvl_random *random)
{
    kvl_digest digest;
    for (size_t i = 0; i < sizeof digest.bytes; i++) {
        digest.bytes[i] = (uint8_t)kvl_test_below(random, 256);
    }
    return digest;
}

static void random_text(kvl_random *random, char *text, uint32_t n_bytes_max)
{
    const uint32_t n = kvl_test_below(random, n_bytes_max + 1);
    for (uint32_t i = 0; i < n; i++) text[i] = (char)('!' + kvl_test_below(random, 90));
    text[n] = '\0';
}

static void random_name(kvl_random *random, char *name)
{
    static const char letters[] = "abcXYZ019._-";
    const uint32_t n = 1 + kvl_test_below(random, KVL_NAME_BYTES_MAX);
    for (uint32_t i = 0; i < n; i++) name[i] = letters[kvl_test_below(random, sizeof letters - 1)];
    name[n] = '\0';
}

static void random_hello(kvl_random *random, kvl_message_hello *hello)
{
    hello->magic = (uint32_t)kvl_random_next(random);
    hello->version_min = 1 + kvl_test_below(random, 5);
    hello->version_max = hello->version_min + kvl_test_below(random, 5);
    random_name(random, hello->name);
    hello->fingerprint = random_digest(random);
    hello->frame_bytes_max = KVL_FRAME_BYTES_MAX + kvl_test_below(random, 1000);
    hello->window_bytes_max = KVL_CREDIT_BYTES_MIN + kvl_test_below(random, 1000);
    hello->task_bytes_max = kvl_random_next(random);
    hello->n_features = kvl_test_below(random, KVL_FEATURES_MAX + 1);
    for (uint32_t i = 0; i < hello->n_features; i++) random_name(random, hello->features[i]);
}

static void random_fetch(kvl_random *random, kvl_message *m)
{
    m->fetch.id = random_digest(random);
    m->fetch.header_checksum = kvl_test_below(random, 2) == 0 ? 0 : kvl_random_next(random) | 1;
    m->fetch.block_first = m->fetch.header_checksum == 0 ? 0 : kvl_test_below(random, 100);
    m->fetch.block_past =
        kvl_test_below(random, 2) == 0 ? 0 : m->fetch.block_first + 1 + kvl_test_below(random, 9);
    m->fetch.credit_bytes = KVL_CREDIT_BYTES_MIN + kvl_test_below(random, 7u << 20);
}

/* Gives the sample frames of these bytes in all. */
static void add_frames(kvl_random *random, sample *s, uint32_t n_bytes, size_t n_frames_max)
{
    for (uint32_t left = n_bytes; left > 0; s->n_frames++) {
        const bool last = s->n_frames + 1 == n_frames_max;
        const uint32_t n = last ? left : 1 + kvl_test_below(random, left);
        s->frames[s->n_frames] = (kvl_frame){bulk, n};
        left -= n;
    }
}

static void random_bulk_message(kvl_random *random, sample *s)
{
    kvl_message *m = &s->message;
    const uint32_t n_bytes = kvl_test_below(random, 5000);
    if (m->kind == KVL_MESSAGE_FETCH_HEADER) {
        m->fetch_header.id = random_digest(random);
        m->fetch_header.n_blocks = 1 + kvl_test_below(random, 200);
        m->fetch_header.header_checksum = kvl_random_next(random);
        m->fetch_header.header_bytes = n_bytes;
        m->fetch_header.block_first =
            n_bytes > 0 ? 0 : kvl_test_below(random, m->fetch_header.n_blocks);
        add_frames(random, s, n_bytes, KVL_HEADER_FRAMES_MAX);
    } else if (m->kind == KVL_MESSAGE_BLOCK) {
        m->block.id = random_digest(random);
        m->block.block = kvl_test_below(random, 300);
        m->block.offset = kvl_test_below(random, 1u << 30);
        m->block.total = m->block.offset + n_bytes + 1 + kvl_test_below(random, 1u << 30);
        add_frames(random, s, n_bytes + 1, 1);
    } else if (m->kind == KVL_MESSAGE_LIST) {
        m->list.kind = KVL_CONTAINER_ANCHOR;
        add_frames(random, s, n_bytes % (KVL_LIST_PREFIX_BYTES_MAX + 1), 1);
    } else if (m->kind == KVL_MESSAGE_LISTED) {
        m->listed.n_ids = kvl_test_below(random, 1000);
        m->listed.truncated = kvl_test_below(random, 2) == 1;
        add_frames(random, s, m->listed.n_ids * KVL_DIGEST_BYTES, 1);
    } else if (m->kind == KVL_MESSAGE_TASK) {
        m->task.body_bytes = n_bytes;
        add_frames(random, s, n_bytes, KVL_FRAMES_MAX);
    } else if (m->kind == KVL_MESSAGE_TASK_REPLY) {
        m->reply.status = (kvl_status)((int)kvl_test_below(random, 3) - 1);
        random_text(random, m->reply.text, KVL_WIRE_TEXT_BYTES_MAX);
        m->reply.body_bytes = m->reply.status == KVL_OK ? n_bytes : 0;
        add_frames(random, s, (uint32_t)m->reply.body_bytes, KVL_FRAMES_MAX);
    }
}

static void random_sample(kvl_random *random, sample *s)
{
    memset(s, 0, sizeof *s);
    kvl_message *m = &s->message;
    m->kind = (kvl_message_kind)(1 + kvl_test_below(random, KINDS));
    m->epoch = kvl_random_next(random) | 1;
    m->request = kvl_random_next(random);
    if (m->kind == KVL_MESSAGE_HELLO || m->kind == KVL_MESSAGE_WELCOME) {
        random_hello(random, &m->hello);
    } else if (m->kind == KVL_MESSAGE_LOCATE) {
        m->locate.n_ids = 1 + kvl_test_below(random, KVL_LOCATE_IDS_MAX);
        for (uint32_t i = 0; i < m->locate.n_ids; i++) m->locate.ids[i] = random_digest(random);
    } else if (m->kind == KVL_MESSAGE_LOCATED) {
        m->located.n_ids = 1 + kvl_test_below(random, KVL_LOCATE_IDS_MAX);
        m->located.held = kvl_test_below(random, 1u << m->located.n_ids);
    } else if (m->kind == KVL_MESSAGE_ANNOUNCE) {
        m->announce.id = random_digest(random);
        m->announce.kind = KVL_CONTAINER_SEGMENT;
    } else if (m->kind == KVL_MESSAGE_FETCH) {
        random_fetch(random, m);
    } else if (m->kind == KVL_MESSAGE_CREDIT) {
        m->credit.granted_bytes = kvl_random_next(random);
    } else if (m->kind == KVL_MESSAGE_ERROR) {
        m->reply.status = (kvl_status) - (int)(1 + kvl_test_below(random, 63));
        random_text(random, m->reply.text, KVL_WIRE_TEXT_BYTES_MAX);
    } else {
        random_bulk_message(random, s);
    }
}

static kvl_status decode(const uint8_t *bytes, size_t n_bytes, const sample *s,
                         kvl_message *message)
{
    kvl_error error;
    memset(message, 0, sizeof *message);
    const kvl_status status =
        kvl_wire_decode(&decoder, bytes, n_bytes, s->frames, s->n_frames, message, &error);
    if (status < 0) assert_true(strlen(error.text) > 0);
    return status;
}

static void test_messages_survive_the_wire(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    uint32_t seen = 0;
    for (int round = 0; round < ROUNDS; round++) {
        sample s;
        random_sample(&random, &s);
        seen |= 1u << s.message.kind;
        uint8_t bytes[KVL_CONTROL_BYTES_MAX];
        const size_t n = kvl_wire_encode(&s.message, bytes);
        kvl_message decoded;
        assert_int_equal(decode(bytes, n, &s, &decoded), KVL_OK);
        /* Both were zeroed before they were filled, so all of their bytes can be compared. */
        assert_memory_equal(&decoded, &s.message, sizeof decoded);
    }
    assert_int_equal(seen, (1u << (KINDS + 1)) - 2); /* every kind came up */
}

/* Whatever passes must be a message that we could have sent: within limits, and stable. */
static void check_accepted(const kvl_message *message, const sample *s)
{
    uint8_t bytes[KVL_CONTROL_BYTES_MAX];
    const size_t n = kvl_wire_encode(message, bytes);
    kvl_message again;
    assert_int_equal(decode(bytes, n, s, &again), KVL_OK);
    assert_int_equal(again.kind, message->kind);
    assert_int_equal(again.request, message->request);
}

static size_t mutate(kvl_random *random, uint8_t *bytes, size_t n, size_t n_max)
{
    const uint32_t n_changes = 1 + kvl_test_below(random, 4);
    for (uint32_t i = 0; i < n_changes; i++) {
        const uint32_t way = kvl_test_below(random, 4);
        if (way == 0 && n > 1) n -= 1 + kvl_test_below(random, (uint32_t)n - 1);
        if (way == 1 && n < n_max) bytes[n++] = (uint8_t)kvl_test_below(random, 256);
        if (way >= 2)
            bytes[kvl_test_below(random, (uint32_t)n)] = (uint8_t)kvl_test_below(random, 256);
    }
    return n;
}

static void test_changed_bytes_never_harm(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    int n_refused = 0;
    for (int round = 0; round < 10 * ROUNDS; round++) {
        sample s;
        random_sample(&random, &s);
        uint8_t bytes[KVL_CONTROL_BYTES_MAX];
        size_t n = kvl_wire_encode(&s.message, bytes);
        n = mutate(&random, bytes, n, sizeof bytes);
        if (kvl_test_below(&random, 8) == 0) s.n_frames = kvl_test_below(&random, 3);
        for (size_t i = 0; i < s.n_frames; i++) s.frames[i].bytes = bulk;
        kvl_message decoded;
        if (decode(bytes, n, &s, &decoded) < 0) {
            n_refused++;
        } else {
            check_accepted(&decoded, &s);
        }
    }
    assert_true(n_refused > ROUNDS); /* the mutations do hit something */
}

static void test_every_limit_is_kept(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    static const struct {
        kvl_message_kind kind;
        int what;
    } cases[] = {
        {KVL_MESSAGE_HELLO, 0},        {KVL_MESSAGE_HELLO, 1},        {KVL_MESSAGE_HELLO, 2},
        {KVL_MESSAGE_HELLO, 3},        {KVL_MESSAGE_FETCH, 0},        {KVL_MESSAGE_FETCH, 1},
        {KVL_MESSAGE_FETCH, 2},        {KVL_MESSAGE_FETCH, 3},        {KVL_MESSAGE_BLOCK, 0},
        {KVL_MESSAGE_BLOCK, 1},        {KVL_MESSAGE_FETCH_HEADER, 0}, {KVL_MESSAGE_FETCH_HEADER, 1},
        {KVL_MESSAGE_FETCH_HEADER, 2}, {KVL_MESSAGE_LOCATED, 0},      {KVL_MESSAGE_ANNOUNCE, 0},
        {KVL_MESSAGE_TASK, 0},         {KVL_MESSAGE_TASK_REPLY, 0},   {KVL_MESSAGE_TASK_REPLY, 1},
        {KVL_MESSAGE_LISTED, 0},       {KVL_MESSAGE_ERROR, 0},        {KVL_MESSAGE_PING, 0},
        {KVL_MESSAGE_PING, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        sample s;
        do {
            random_sample(&random, &s);
        } while (s.message.kind != cases[i].kind);
        kvl_message *m = &s.message;
        const int what = cases[i].what;
        switch (m->kind) {
        case KVL_MESSAGE_HELLO:
            if (what == 0) m->hello.version_min = 0;
            if (what == 1) m->hello.version_min = m->hello.version_max + 1;
            if (what == 2) memcpy(m->hello.name, "a b", 4);
            if (what == 3) m->hello.frame_bytes_max = KVL_FRAME_BYTES_MAX - 1;
            break;
        case KVL_MESSAGE_FETCH:
            m->fetch.block_past = 0;
            if (what == 0) m->fetch.credit_bytes = KVL_CREDIT_BYTES_MIN - 1;
            if (what == 1) m->fetch.credit_bytes = KVL_CREDIT_BYTES_MAX + 1;
            if (what == 2) m->fetch.header_checksum = 0, m->fetch.block_first = 1;
            if (what == 3) {
                m->fetch.header_checksum = 1;
                m->fetch.block_first = m->fetch.block_past = 5;
            }
            break;
        case KVL_MESSAGE_BLOCK:
            if (what == 0) m->block.offset = m->block.total - s.frames[0].n_bytes + 1;
            if (what == 1) m->block.offset = UINT64_MAX - 1; /* offset + bytes wraps */
            break;
        case KVL_MESSAGE_FETCH_HEADER:
            if (what == 0) m->fetch_header.n_blocks = 0;
            if (what == 1) m->fetch_header.block_first = m->fetch_header.n_blocks;
            if (what == 2) m->fetch_header.header_bytes++;
            break;
        case KVL_MESSAGE_LOCATED: m->located.held = 1u << m->located.n_ids; break;
        case KVL_MESSAGE_ANNOUNCE: m->announce.kind = (kvl_container_kind)3; break;
        case KVL_MESSAGE_TASK: m->task.body_bytes++; break;
        case KVL_MESSAGE_TASK_REPLY:
            if (what == 0) m->reply.status = (kvl_status)2;
            if (what == 1) m->reply.body_bytes++;
            break;
        case KVL_MESSAGE_LISTED: m->listed.n_ids++; break;
        case KVL_MESSAGE_ERROR: m->reply.status = KVL_OK; break;
        default:
            if (what == 0) m->epoch = 0;
            if (what == 1) s.frames[s.n_frames++] = (kvl_frame){bulk, 1};
            break;
        }
        uint8_t bytes[KVL_CONTROL_BYTES_MAX];
        const size_t n = kvl_wire_encode(m, bytes);
        kvl_message decoded;
        assert_int_equal(decode(bytes, n, &s, &decoded), KVL_ERR_MALFORMED);
    }
}

static void test_sizes_are_checked_first(void **state)
{
    (void)state;
    static uint8_t large[KVL_CONTROL_BYTES_MAX + 1];
    sample s;
    memset(&s, 0, sizeof s);
    kvl_message decoded;
    assert_int_equal(decode(large, sizeof large, &s, &decoded), KVL_ERR_TOO_LARGE);
    assert_int_equal(decode(large, 0, &s, &decoded), KVL_ERR_TOO_LARGE);
    s.n_frames = 1;
    s.frames[0] = (kvl_frame){bulk, KVL_FRAME_BYTES_MAX + 1};
    assert_int_equal(decode(large, 10, &s, &decoded), KVL_ERR_TOO_LARGE);
    /* Thousands of empty features in few bytes: the arena ends, the process does not. */
    large[0] = 0x09; /* epoch, eight bytes */
    large[1] = 1;
    large[9] = 0x1a; /* Hello, 4000 bytes long */
    large[10] = 0xa0;
    large[11] = 0x1f;
    for (size_t i = 12; i + 1 < 12 + 4000; i += 2) large[i] = 0x4a; /* feature of length 0 */
    s.n_frames = 0;
    assert_int_equal(decode(large, 12 + 4000, &s, &decoded), KVL_ERR_MALFORMED);
}

static void test_texts_cannot_forge_lines(void **state)
{
    (void)state;
    sample s;
    memset(&s, 0, sizeof s);
    s.message.kind = KVL_MESSAGE_ERROR;
    s.message.epoch = 1;
    s.message.reply.status = KVL_ERR_BUSY;
    memcpy(s.message.reply.text, "one\nlevel=error\x7f", sizeof "one\nlevel=error\x7f");
    uint8_t bytes[KVL_CONTROL_BYTES_MAX];
    const size_t n = kvl_wire_encode(&s.message, bytes);
    kvl_message decoded;
    assert_int_equal(decode(bytes, n, &s, &decoded), KVL_OK);
    assert_string_equal(decoded.reply.text, "one?level=error?");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_messages_survive_the_wire),
        cmocka_unit_test(test_changed_bytes_never_harm),
        cmocka_unit_test(test_every_limit_is_kept),
        cmocka_unit_test(test_sizes_are_checked_first),
        cmocka_unit_test(test_texts_cannot_forge_lines),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
