/* cli: a plan drawn as HTML: every token has the colour of how it was had, texts cannot break out
 * of the page, nothing is asked of a network, and what does not fit together is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/file.h"
#include "cli/explain_html.h"

enum { PARTS = 2, PAGE_MAX = 1 << 20 };

typedef struct drawn {
    Kvloom__V1__PlanReply plan;
    Kvloom__V1__RunReply run;
    Kvloom__V1__PartReport parts[PARTS], *pointers[PARTS];
    ProtobufCBinaryData texts[PARTS];
    uint32_t token_bytes[PARTS][8], recomputed[2];
} drawn;

static void set_text(drawn *d, size_t part, const char *text, const uint32_t *token_bytes, size_t n)
{
    d->texts[part] = (ProtobufCBinaryData){strlen(text), (uint8_t *)(uintptr_t)text};
    memcpy(d->token_bytes[part], token_bytes, n * sizeof *token_bytes);
    d->parts[part].token_bytes = d->token_bytes[part];
    d->parts[part].n_token_bytes = n;
    d->parts[part].n_tokens = (uint32_t)n;
}

/* A template text, shared but for its last token, and a slot of which a token is computed again. */
static void make(drawn *d)
{
    *d = (drawn){.recomputed = {3, 5}};
    kvloom__v1__plan_reply__init(&d->plan);
    kvloom__v1__run_reply__init(&d->run);
    for (size_t p = 0; p < PARTS; p++) {
        kvloom__v1__part_report__init(&d->parts[p]);
        d->pointers[p] = &d->parts[p];
    }
    set_text(d, 0, "<b>&\n", (const uint32_t[]){3, 1, 1}, 3);
    d->parts[0].shared = 2;
    d->parts[0].computed = 1;
    d->parts[0].reason = (char *)(uintptr_t) "exact prefix";
    /* The euro sign is cut between two tokens; FF is no character. */
    set_text(d, 1, "a\xE2\x82\xAC\xFFz", (const uint32_t[]){1, 1, 2, 1, 1}, 5);
    d->parts[1].slot = (char *)(uintptr_t) "\"><script>";
    d->parts[1].blended = 4;
    d->parts[1].computed = 1;
    d->run.parts = d->pointers;
    d->run.n_parts = PARTS;
    d->run.request_id = 77;
    d->run.prompt_tokens = 8;
    d->plan.plan = &d->run;
    d->plan.texts = d->texts;
    d->plan.n_texts = PARTS;
    d->plan.recomputed = d->recomputed;
    d->plan.n_recomputed = 2;
}

static char *draw(const drawn *d, kvl_status expected)
{
    char path[] = "/tmp/kvloom-plan-XXXXXX";
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    (void)close(fd);
    kvl_error error = {0};
    assert_int_equal(kvl_explain_html_write(&d->plan, path, &error), expected);
    char *page = NULL;
    size_t n_bytes = 0;
    if (expected == KVL_OK)
        assert_int_equal(kvl_file_read(path, PAGE_MAX, &page, &n_bytes, &error), KVL_OK);
    (void)unlink(path);
    return page;
}

static void test_every_token_has_its_colour(void **state)
{
    (void)state;
    drawn d;
    make(&d);
    char *page = draw(&d, KVL_OK);
    assert_non_null(strstr(page, "Request 77"));
    assert_non_null(strstr(page, "<span class=\"s\" title=\"0\">&lt;b&gt;</span>"
                                 "<span class=\"s\" title=\"1\">&amp;</span>"
                                 "<span class=\"c\" title=\"2\">\n</span>"));
    assert_non_null(strstr(page, "<span class=\"a\" title=\"3\">a</span>"
                                 "<span class=\"b\" title=\"4\">\xE2\x82\xAC</span>"
                                 "<span class=\"b\" title=\"6\">\xEF\xBF\xBD</span>"
                                 "<span class=\"c\" title=\"7\">z</span>"));
    kvl_free(page);
}

static void test_texts_stay_texts_and_nothing_is_fetched(void **state)
{
    (void)state;
    drawn d;
    make(&d);
    char *page = draw(&d, KVL_OK);
    assert_null(strstr(page, "<script"));
    assert_non_null(strstr(page, "&quot;&gt;&lt;script&gt;"));
    assert_null(strstr(page, "http:"));
    assert_null(strstr(page, "https:"));
    assert_null(strstr(page, "url("));
    assert_null(strstr(page, "src="));
    assert_null(strstr(page, "<link"));
    kvl_free(page);
}

static void test_what_does_not_fit_is_refused(void **state)
{
    (void)state;
    drawn d;
    make(&d);
    d.plan.n_texts = 1;
    assert_null(draw(&d, KVL_ERR_MALFORMED));
    make(&d);
    d.token_bytes[1][4] = 2; /* longer than the text */
    assert_null(draw(&d, KVL_ERR_MALFORMED));
    make(&d);
    d.plan.plan = NULL;
    assert_null(draw(&d, KVL_ERR_MALFORMED));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_token_has_its_colour),
        cmocka_unit_test(test_texts_stay_texts_and_nothing_is_fetched),
        cmocka_unit_test(test_what_does_not_fit_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
