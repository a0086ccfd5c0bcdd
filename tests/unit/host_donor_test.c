/* host: donors, the KV of texts as they stood in earlier exact prompts: kept of exact prompts
 * alone, for one tenant's workflow and collection, never for a peer; and means, which are learnt
 * of the same prompts. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "host_run_case.h"

enum { N_TEXT = 60, N_TEXTS = 2, N_LEAD = 20, FIRST_ID = 3 };

/* A lead that no other prompt has, so that no prefix is shared, two texts, and an ending. */
typedef struct prompt {
    uint32_t lead[N_LEAD], texts[N_TEXTS][N_TEXT], ending[N_LEAD];
} prompt;

static void draw(kvl_random *random, uint32_t *tokens, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) tokens[i] = FIRST_ID + kvl_test_below(random, 200);
}

static prompt make_prompt(kvl_random *random)
{
    prompt p;
    draw(random, p.lead, N_LEAD);
    draw(random, p.texts[0], N_TEXTS * N_TEXT);
    draw(random, p.ending, N_LEAD);
    return p;
}

/* The same texts the other way round, behind another lead. */
static prompt in_other_context(kvl_random *random, const prompt *p)
{
    prompt other = make_prompt(random);
    memcpy(other.texts[0], p->texts[1], sizeof other.texts[0]);
    memcpy(other.texts[1], p->texts[0], sizeof other.texts[1]);
    return other;
}

typedef struct how {
    int host;
    Kvloom__V1__Mode mode;
    Kvloom__V1__Quality quality;
    const char *select, *collection, *workflow, *correct;
    Kvloom__V1__Donors donors;
} how;

static kvl_status try_prompt(fixture *f, const prompt *p, const how *by,
                             Kvloom__V1__HostReply **reply, kvl_error *error)
{
    Kvloom__V1__HostTask message = KVLOOM__V1__HOST_TASK__INIT;
    Kvloom__V1__RunTask task = KVLOOM__V1__RUN_TASK__INIT;
    Kvloom__V1__PromptPart parts[N_TEXTS + 2];
    Kvloom__V1__PromptPart *pointers[N_TEXTS + 2];
    const uint32_t *const tokens[] = {p->lead, p->texts[0], p->texts[1], p->ending};
    for (int i = 0; i < N_TEXTS + 2; i++) {
        kvloom__v1__prompt_part__init(&parts[i]);
        pointers[i] = &parts[i];
        const bool is_text = i > 0 && i <= N_TEXTS;
        parts[i].n_tokens = is_text ? N_TEXT : N_LEAD;
        parts[i].tokens = (uint32_t *)(uintptr_t)tokens[i];
        if (is_text) parts[i].slot = (char *)(uintptr_t)(i == 1 ? "one" : "two");
    }
    message.what_case = KVLOOM__V1__HOST_TASK__WHAT_RUN;
    message.run = &task;
    task.parts = pointers;
    task.n_parts = N_TEXTS + 2;
    task.max_tokens = ANSWER;
    task.mode = by->mode;
    task.quality = by->quality;
    task.evaluate = by->mode == KVLOOM__V1__MODE__MODE_REUSE;
    task.donors = by->donors;
    task.select = (char *)(uintptr_t)(by->select == NULL ? "none" : by->select);
    task.collection = (char *)(uintptr_t)(by->collection == NULL ? "" : by->collection);
    task.workflow = (char *)(uintptr_t)(by->workflow == NULL ? "" : by->workflow);
    task.correct = (char *)(uintptr_t)(by->correct == NULL ? "" : by->correct);
    return call(f, by->host, &message, reply, error);
}

static Kvloom__V1__HostReply *run_prompt(fixture *f, const prompt *p, const how *by)
{
    Kvloom__V1__HostReply *reply = NULL;
    kvl_error error = {0};
    if (try_prompt(f, p, by, &reply, &error) != KVL_OK) fail_msg("%s", error.text);
    return reply;
}

/* What a run says of donors. */
typedef struct seen {
    uint32_t n_donors, n_kept, n_shifted, n_blended, n_wrong;
    double kl;
    bool is_exact;
} seen;

static seen tell(const Kvloom__V1__HostReply *reply)
{
    const Kvloom__V1__RunReply *r = reply->run;
    seen s = {.n_kept = r->donors_kept,
              .n_shifted = r->shifted,
              .n_blended = count_blended(reply),
              .n_wrong = r->wrong_tokens,
              .kl = r->evaluation == NULL ? -1.0 : r->evaluation->kl,
              .is_exact = r->exact};
    for (size_t i = 0; i < r->n_parts; i++) s.n_donors += r->parts[i]->donor ? 1 : 0;
    return s;
}

/* Full prefill first, which the run is compared with; it leaves nothing behind. */
static seen look(fixture *f, const prompt *p, const how *by)
{
    const how full = {.host = by->host, .mode = KVLOOM__V1__MODE__MODE_FULL};
    kvloom__v1__host_reply__free_unpacked(run_prompt(f, p, &full), NULL);
    Kvloom__V1__HostReply *reply = run_prompt(f, p, by);
    const seen s = tell(reply);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
    return s;
}

static void read_texts(fixture *f, const prompt *p, int host)
{
    const how read = {.host = host, .mode = KVLOOM__V1__MODE__MODE_READ};
    kvloom__v1__host_reply__free_unpacked(run_prompt(f, p, &read), NULL);
}

static uint64_t n_donors_of(fixture *f, int host, uint64_t *n_bytes)
{
    Kvloom__V1__HostTask message = KVLOOM__V1__HOST_TASK__INIT;
    message.what_case = KVLOOM__V1__HOST_TASK__WHAT_STATUS;
    message.status = true;
    Kvloom__V1__HostReply *reply = NULL;
    kvl_error error = {0};
    if (call(f, host, &message, &reply, &error) != KVL_OK) fail_msg("%s", error.text);
    const uint64_t n = reply->status->donors;
    *n_bytes = reply->status->donor_bytes;
    assert_int_equal(n > 0, *n_bytes > 0);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
    return n;
}

static uint64_t n_donors(fixture *f, int host)
{
    uint64_t n_bytes = 0;
    return n_donors_of(f, host, &n_bytes);
}

static const how exact_in = {.mode = KVLOOM__V1__MODE__MODE_REUSE,
                             .quality = KVLOOM__V1__QUALITY__QUALITY_EXACT,
                             .collection = "books",
                             .donors = KVLOOM__V1__DONORS__DONORS_ON};
static const how blended_in = {.mode = KVLOOM__V1__MODE__MODE_REUSE,
                               .collection = "books",
                               .donors = KVLOOM__V1__DONORS__DONORS_READ};

static void test_an_exact_prompt_leaves_donors(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    for (uint32_t round = 0; round < 3; round++) {
        const prompt first = make_prompt(&random);
        const prompt second = in_other_context(&random, &first);
        read_texts(f, &first, 0);
        const seen made = look(f, &first, &exact_in);
        assert_true(made.is_exact);
        assert_int_equal(made.n_kept, N_TEXTS);
        assert_int_equal(n_donors(f, 0), (uint64_t)N_TEXTS * (round + 1));

        how off = blended_in;
        off.donors = KVLOOM__V1__DONORS__DONORS_OFF;
        const seen at_home = look(f, &second, &off);
        const seen as_donors = look(f, &second, &blended_in);
        const seen again = look(f, &second, &blended_in);
        assert_int_equal(at_home.n_donors, 0);
        assert_int_equal(as_donors.n_donors, N_TEXTS);
        assert_int_equal(as_donors.n_blended, N_TEXTS * N_TEXT);
        assert_int_equal(as_donors.n_kept, 0);
        /* It is other KV, the same every time. */
        assert_true(at_home.kl > 0.0 && as_donors.kl > 0.0);
        assert_true(at_home.kl != as_donors.kl);
        assert_true(as_donors.kl == again.kl);
        /* Everything computed again is a full prefill, whatever was there before. */
        how all = blended_in;
        all.select = "all";
        assert_true(look(f, &second, &all).kl < 1e-9);
        /* Exact never looks at them. */
        how exact = exact_in;
        exact.donors = KVLOOM__V1__DONORS__DONORS_READ;
        const seen untouched = look(f, &second, &exact);
        assert_int_equal(untouched.n_donors, 0);
        assert_int_equal(untouched.n_wrong, 0);
        assert_int_equal(untouched.n_kept, 0);
    }
}

/* HijackKV: what one wrote into a prompt is in the KV of its other texts. */
static void test_nobody_else_gets_them(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    const prompt first = make_prompt(&random);
    const prompt second = in_other_context(&random, &first);
    read_texts(f, &first, 0);
    assert_int_equal(look(f, &first, &exact_in).n_kept, N_TEXTS);

    static const struct {
        const char *workflow, *collection;
    } others[] = {{NULL, "book"}, {NULL, NULL}, {"books", NULL}, {"books", "books"}, {"b", "ooks"}};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        how by = blended_in;
        by.workflow = others[i].workflow;
        by.collection = others[i].collection;
        const seen theirs = look(f, &second, &by);
        assert_int_equal(theirs.n_donors, 0);
        assert_int_equal(theirs.n_blended, N_TEXTS * N_TEXT);
    }
    /* A peer of the same tenant, that reads the same collection: it gets the text's KV at home. */
    how peers = blended_in;
    peers.host = 1;
    peers.donors = KVLOOM__V1__DONORS__DONORS_ON;
    const seen theirs = look(f, &second, &peers);
    assert_int_equal(theirs.n_donors, 0);
    assert_int_equal(theirs.n_blended, N_TEXTS * N_TEXT);
    assert_int_equal(n_donors(f, 1), 0);
    /* Another tenant, whose host opens the same directory; and the first one again, to whom it all
     * still belongs after a restart. */
    stop_host(f, 0);
    f->tenant = 1;
    start_host(f, 0);
    wait_until(f, 0, true);
    assert_int_equal(look(f, &second, &blended_in).n_donors, 0);
    stop_host(f, 0);
    f->tenant = 0;
    start_host(f, 0);
    wait_until(f, 0, true);
    assert_int_equal(look(f, &second, &blended_in).n_donors, N_TEXTS);
    /* Out of the database straight into a prompt that replaces them. */
    stop_host(f, 0);
    start_host(f, 0);
    wait_until(f, 0, true);
    how checked = blended_in;
    checked.quality = KVLOOM__V1__QUALITY__QUALITY_VERIFIED;
    checked.donors = KVLOOM__V1__DONORS__DONORS_ON;
    const prompt third = in_other_context(&random, &second);
    const seen replaced = look(f, &third, &checked);
    assert_int_equal(replaced.n_donors, N_TEXTS);
    assert_int_equal(replaced.n_kept, N_TEXTS);
    assert_int_equal(replaced.n_wrong, 0);
}

/* The id of a donor, as only who has the tenant's key can know it. */
static kvl_digest donor_id(fixture *f, const uint32_t *tokens)
{
    uint8_t key[KVL_TENANT_KEY_BYTES];
    memset(key, 42, sizeof key);
    kvl_digester digester;
    kvl_digester_init(&digester, key, sizeof key);
    const char *const names_in[] = {"kvloom.donor.1", "", "books"};
    for (size_t i = 0; i < 3; i++)
        kvl_digester_add(&digester, names_in[i], strlen(names_in[i]) + 1);
    const kvl_digest scope = kvl_digester_end(&digester);
    const kvl_digest model = kvl_model_fingerprint(kvl_host_model(f->hosts[0]));
    return kvl_segment_id(key, &model, &scope, tokens, N_TEXT);
}

static kvl_digest id_at_home(fixture *f, const prompt *p)
{
    const how read = {.mode = KVLOOM__V1__MODE__MODE_READ};
    Kvloom__V1__HostReply *reply = run_prompt(f, p, &read);
    kvl_digest id;
    assert_int_equal(reply->run->parts[1]->segment.len, sizeof id.bytes);
    memcpy(id.bytes, reply->run->parts[1]->segment.data, sizeof id.bytes);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
    return id;
}

/* A peer that asks host one for an id, as any host of the tenant may. */
static kvl_status fetch(fixture *f, const kvl_digest *id)
{
    kvl_exchange *thief = NULL;
    const kvl_exchange_peer peer = {.name = names[0], .endpoint = f->endpoints[0]};
    const kvl_exchange_options options = {.name = "thief",
                                          .peers = &peer,
                                          .n_peers = 1,
                                          .fingerprint =
                                              kvl_model_fingerprint(kvl_host_model(f->hosts[0])),
                                          .clock = kvl_clock_system()};
    kvl_error error = {0};
    if (kvl_exchange_start(&options, &thief, &error) != KVL_OK) fail_msg("%s", error.text);
    for (int i = 0; i < 2000 && !kvl_exchange_peer_is_up(thief, names[0]); i++) {
        const struct timespec pause = {0, 5000000};
        (void)nanosleep(&pause, NULL);
    }
    kvl_container *container = NULL;
    const int64_t deadline = kvl_clock_now(kvl_clock_system()) + 10 * KVL_NS_PER_S;
    const kvl_status status = kvl_exchange_fetch(thief, id, deadline, &container, NULL, 0, &error);
    kvl_container_release(container);
    kvl_exchange_stop(thief);
    return status;
}

static void test_a_peer_that_knows_the_id_gets_nothing(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    const prompt p = make_prompt(&random);
    const kvl_digest home = id_at_home(f, &p);
    assert_int_equal(look(f, &p, &exact_in).n_kept, N_TEXTS);
    /* The id is right: the host's own database has it. */
    const kvl_digest donor = donor_id(f, p.texts[0]);
    assert_int_equal(fetch(f, &home), KVL_OK);
    assert_int_equal(fetch(f, &donor), KVL_ERR_NOT_FOUND);
    char path[192];
    (void)snprintf(path, sizeof path, "%s/donors", f->stores[0]);
    const kvl_digest model = kvl_model_fingerprint(kvl_host_model(f->hosts[0]));
    stop_host(f, 0);
    const kvl_lmdb_tier_options lmdb = {.path = path, .bytes_max = 64 << 20, .fingerprint = model};
    kvl_tier *tier = NULL;
    kvl_error error = {0};
    if (kvl_lmdb_tier_create(&lmdb, &tier, &error) != KVL_OK) fail_msg("%s", error.text);
    assert_true(tier->ops->has(tier, &donor));
    kvl_container *container = NULL;
    assert_int_equal(tier->ops->get(tier, &donor, true, &container, &error), KVL_OK);
    assert_false(kvl_container_info_of(container)->home_is_canonical);
    kvl_container_release(container);
    tier->ops->destroy(tier);
    start_host(f, 0);
    wait_until(f, 0, true);
}

static void heal_all(fixture *f)
{
    for (int i = 0; i < 2000; i++) {
        Kvloom__V1__HostTask message = KVLOOM__V1__HOST_TASK__INIT;
        message.what_case = KVLOOM__V1__HOST_TASK__WHAT_STATUS;
        message.status = true;
        Kvloom__V1__HostReply *reply = NULL;
        kvl_error error = {0};
        if (call(f, 0, &message, &reply, &error) != KVL_OK) fail_msg("%s", error.text);
        const uint64_t n_waiting = reply->status->heals_waiting;
        kvloom__v1__host_reply__free_unpacked(reply, NULL);
        if (n_waiting == 0) return;
        const struct timespec pause = {0, 5000000};
        (void)nanosleep(&pause, NULL);
    }
    fail_msg("healing does not end");
}

static void test_only_exact_kv_becomes_one(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    how by = blended_in;
    by.donors = KVLOOM__V1__DONORS__DONORS_ON;
    prompt p = make_prompt(&random);
    read_texts(f, &p, 0);
    const uint64_t n_before = n_donors(f, 0);
    const seen blended = look(f, &p, &by);
    assert_int_equal(blended.n_blended, N_TEXTS * N_TEXT);
    assert_int_equal(blended.n_kept, 0);
    assert_int_equal(n_donors(f, 0), n_before);
    /* Checked in full before it was sent. */
    by.quality = KVLOOM__V1__QUALITY__QUALITY_VERIFIED;
    p = in_other_context(&random, &p);
    const seen verified = look(f, &p, &by);
    assert_int_equal(verified.n_blended, N_TEXTS * N_TEXT);
    assert_int_equal(verified.n_kept, N_TEXTS);
    assert_int_equal(n_donors(f, 0), n_before + N_TEXTS);
    /* Behind the reply: nothing yet, then everything. */
    by.quality = KVLOOM__V1__QUALITY__QUALITY_HEALED;
    p = make_prompt(&random);
    read_texts(f, &p, 0);
    const seen healed = look(f, &p, &by);
    assert_int_equal(healed.n_kept, 0);
    heal_all(f);
    assert_int_equal(n_donors(f, 0), n_before + 2 * N_TEXTS);
    assert_int_equal(look(f, &p, &blended_in).n_donors, 0); /* it is in the prefix tree */
    p = in_other_context(&random, &p);
    assert_int_equal(look(f, &p, &blended_in).n_donors, N_TEXTS);
    /* Who only reads leaves nothing; nor does who has neither workflow nor collection, or has a
     * workflow and says nothing. */
    how silent[] = {exact_in, exact_in, exact_in, exact_in};
    silent[0].donors = KVLOOM__V1__DONORS__DONORS_READ;
    silent[1].donors = KVLOOM__V1__DONORS__DONORS_OFF;
    silent[2].collection = NULL;
    silent[3].donors = KVLOOM__V1__DONORS__DONORS_DEFAULT;
    silent[3].collection = NULL;
    silent[3].workflow = "books";
    for (size_t i = 0; i < 4; i++) {
        p = make_prompt(&random);
        assert_int_equal(look(f, &p, &silent[i]).n_kept, 0);
    }
    assert_int_equal(n_donors(f, 0), n_before + 2 * N_TEXTS);
    /* A collection is enough. */
    how named = exact_in;
    named.donors = KVLOOM__V1__DONORS__DONORS_DEFAULT;
    assert_int_equal(look(f, &p, &named).n_kept, N_TEXTS);
}

/* A prompt's texts stand deeper in it, the more there is before them. */
static void test_the_deeper_one_stays(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    const prompt p = make_prompt(&random);
    assert_int_equal(look(f, &p, &exact_in).n_kept, 2);
    /* Now the second one comes first. */
    prompt other = in_other_context(&random, &p);
    assert_int_equal(look(f, &other, &exact_in).n_kept, 1);
    other = in_other_context(&random, &p);
    assert_int_equal(look(f, &other, &exact_in).n_kept, 1);
    assert_int_equal(n_donors(f, 0), 2);
}

/* A cap of bytes, under which the least used go first; and none at all. */
static void test_they_stay_within_their_cap(void **state)
{
    enum { CAP = 1 << 20, PROMPTS = 60 };
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    stop_host(f, 0);
    f->donor_bytes_max = CAP;
    start_host(f, 0);
    wait_until(f, 0, true);
    uint64_t n_bytes = 0;
    uint32_t n_kept = 0;
    prompt p = make_prompt(&random);
    for (int i = 0; i < PROMPTS; i++) {
        p = make_prompt(&random);
        n_kept += look(f, &p, &exact_in).n_kept;
        assert_true(n_donors_of(f, 0, &n_bytes) > 0);
        assert_true(n_bytes <= CAP);
    }
    assert_int_equal(n_kept, PROMPTS * N_TEXTS);
    assert_true(n_donors(f, 0) < n_kept); /* otherwise nothing was tested */
    /* The last ones are there. */
    p = in_other_context(&random, &p);
    read_texts(f, &p, 0);
    assert_int_equal(look(f, &p, &blended_in).n_donors, N_TEXTS);

    stop_host(f, 0);
    f->donor_bytes_max = 0;
    start_host(f, 0);
    wait_until(f, 0, true);
    p = make_prompt(&random);
    assert_int_equal(look(f, &p, &exact_in).n_kept, 0);
    assert_int_equal(look(f, &p, &blended_in).n_donors, 0);
    assert_int_equal(n_donors(f, 0), 0);
}

static void test_forgotten_texts_have_none(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    const prompt p = make_prompt(&random);
    kvl_digest home = id_at_home(f, &p);
    assert_int_equal(look(f, &p, &exact_in).n_kept, N_TEXTS);
    Kvloom__V1__ForgetTask task = KVLOOM__V1__FORGET_TASK__INIT;
    ProtobufCBinaryData id = {sizeof home.bytes, home.bytes};
    task.n_ids = 1;
    task.ids = &id;
    Kvloom__V1__HostTask message = KVLOOM__V1__HOST_TASK__INIT;
    message.what_case = KVLOOM__V1__HOST_TASK__WHAT_FORGET;
    message.forget = &task;
    Kvloom__V1__HostReply *reply = NULL;
    kvl_error error = {0};
    if (call(f, 0, &message, &reply, &error) != KVL_OK) fail_msg("%s", error.text);
    assert_int_equal(reply->forgotten, 1);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
    assert_int_equal(n_donors(f, 0), 1);
    const prompt other = in_other_context(&random, &p);
    read_texts(f, &other, 0);
    assert_int_equal(look(f, &other, &blended_in).n_donors, 1);
}

static void test_a_mean_moves_what_is_placed(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    how learn = exact_in;
    learn.donors = KVLOOM__V1__DONORS__DONORS_OFF;
    learn.correct = "mean";
    how moved = blended_in;
    moved.correct = "mean";
    const prompt p = make_prompt(&random);
    read_texts(f, &p, 0);
    /* Nothing was learnt yet: bits as without. */
    const seen plain = look(f, &p, &blended_in);
    const seen none_yet = look(f, &p, &moved);
    assert_int_equal(none_yet.n_shifted, 0);
    assert_true(plain.kl > 0.0 && plain.kl == none_yet.kl);
    for (int i = 0; i < 3; i++) {
        const prompt other = make_prompt(&random);
        read_texts(f, &other, 0);
        const seen exact = look(f, &other, &learn);
        assert_int_equal(exact.n_wrong, 0);
        assert_int_equal(exact.n_kept, 0);
    }
    const seen with_mean = look(f, &p, &moved);
    assert_int_equal(with_mean.n_shifted, N_TEXTS * N_TEXT);
    assert_true(with_mean.kl != plain.kl);
    /* Everything computed again is a full prefill, and another collection has learnt nothing. */
    how all = moved;
    all.select = "all";
    assert_true(look(f, &p, &all).kl < 1e-9);
    how elsewhere = moved;
    elsewhere.collection = "papers";
    const seen other = look(f, &p, &elsewhere);
    assert_int_equal(other.n_shifted, 0);
    assert_true(other.kl == plain.kl);
}

static void test_probes_move_what_is_placed(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    const prompt p = make_prompt(&random);
    read_texts(f, &p, 0);
    static const char *const policies[] = {"sink8", "query10", "deviation15", "kvshare15"};
    for (size_t i = 0; i < sizeof policies / sizeof *policies; i++) {
        how by = {.mode = KVLOOM__V1__MODE__MODE_REUSE, .select = policies[i]};
        const seen plain = look(f, &p, &by);
        by.correct = "probe";
        const seen moved = look(f, &p, &by);
        assert_int_equal(plain.n_shifted, 0);
        assert_true(moved.n_shifted > 0 && moved.n_shifted < N_TEXTS * N_TEXT);
        assert_true(plain.kl > 0.0 && moved.kl != plain.kl);
        by.select = "all";
        assert_true(look(f, &p, &by).kl < 1e-9);
        by.select = "none";
        const seen none = look(f, &p, &by);
        by.correct = NULL;
        assert_int_equal(none.n_shifted, 0);
        assert_true(none.kl == look(f, &p, &by).kl);
    }
}

static void test_corrections_that_cannot_be_are_refused(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    const prompt p = make_prompt(&random);
    const how by[] = {
        {.mode = KVLOOM__V1__MODE__MODE_REUSE, .correct = "prayer"},
        {.mode = KVLOOM__V1__MODE__MODE_REUSE, .correct = "anchors", .workflow = "test"},
        {.mode = KVLOOM__V1__MODE__MODE_REUSE, .correct = "anchors", .select = ""},
    };
    for (size_t i = 0; i < sizeof by / sizeof *by; i++) {
        Kvloom__V1__HostReply *reply = NULL;
        kvl_error error = {0};
        assert_int_equal(try_prompt(f, &p, &by[i], &reply, &error), KVL_ERR_INVALID);
        assert_non_null(strstr(error.text, "correct"));
    }
    const how fine = {.mode = KVLOOM__V1__MODE__MODE_REUSE,
                      .correct = "anchors",
                      .workflow = "test",
                      .select = ""};
    assert_int_equal(look(f, &p, &fine).n_blended, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_an_exact_prompt_leaves_donors, setup, teardown),
        cmocka_unit_test_setup_teardown(test_nobody_else_gets_them, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_peer_that_knows_the_id_gets_nothing, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_only_exact_kv_becomes_one, setup, teardown),
        cmocka_unit_test_setup_teardown(test_the_deeper_one_stays, setup, teardown),
        cmocka_unit_test_setup_teardown(test_they_stay_within_their_cap, setup, teardown),
        cmocka_unit_test_setup_teardown(test_forgotten_texts_have_none, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_mean_moves_what_is_placed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_probes_move_what_is_placed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_corrections_that_cannot_be_are_refused, setup,
                                        teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
