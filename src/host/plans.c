/* host/plans.c: a ring of packed replies. */
#include "host/plans.h"

#include "base/alloc.h"
#include "host/host_parts.h"

#include <inttypes.h>
#include <string.h>

static size_t place_of(uint64_t request)
{
    return (size_t)(request % KVL_PLANS_MAX);
}

static void forget(plan_book *book, uint64_t request)
{
    const size_t at = place_of(request);
    book->n_bytes -= book->items[at].n_bytes;
    kvl_free(book->items[at].bytes);
    book->items[at].bytes = NULL;
    book->items[at].n_bytes = 0;
}

/* Room for n more bytes under the next number. */
static void make_room(plan_book *book, size_t n)
{
    forget(book, book->n_requests);
    while (book->n_bytes + n > KVL_PLANS_BYTES_MAX && book->first_kept < book->n_requests)
        forget(book, book->first_kept++);
}

/* The text of a part; data NULL without memory. */
static ProtobufCBinaryData text_of(const run *r, const run_part *part)
{
    const kvl_tokenizer *tokenizer = kvl_model_tokenizer(r->host->engine->model);
    ProtobufCBinaryData text = {0, NULL};
    size_t n = 0;
    for (uint32_t t = 0; t < part->n_tokens; t++) {
        size_t n_bytes = 0;
        (void)kvl_token_bytes(tokenizer, r->ids[part->first + t], true, &n_bytes);
        n += n_bytes;
    }
    text.data = kvl_alloc(n + 1);
    for (uint32_t t = 0; t < part->n_tokens && text.data != NULL; t++) {
        size_t n_bytes = 0;
        const char *bytes = kvl_token_bytes(tokenizer, r->ids[part->first + t], true, &n_bytes);
        memcpy(text.data + text.len, bytes, n_bytes);
        text.len += n_bytes;
    }
    return text;
}

static void pack(plan_book *book, const Kvloom__V1__PlanReply *plan)
{
    const size_t n = kvloom__v1__plan_reply__get_packed_size(plan);
    make_room(book, n);
    if (n > KVL_PLANS_BYTES_MAX) return;
    const size_t at = place_of(book->n_requests);
    book->items[at].bytes = kvl_alloc(n + 1);
    if (book->items[at].bytes == NULL) return;
    book->items[at].request = book->n_requests;
    book->items[at].n_bytes = kvloom__v1__plan_reply__pack(plan, book->items[at].bytes);
    book->n_bytes += book->items[at].n_bytes;
}

void plans_keep(kvl_host *host, const run *r, Kvloom__V1__RunReply *reply)
{
    plan_book *book = &host->plans;
    reply->request_id = ++book->n_requests;
    if (book->n_requests - book->first_kept >= KVL_PLANS_MAX)
        book->first_kept = book->n_requests - KVL_PLANS_MAX + 1;
    Kvloom__V1__PlanReply plan = KVLOOM__V1__PLAN_REPLY__INIT;
    ProtobufCBinaryData texts[KVL_PARTS_MAX];
    bool has_memory = true;
    for (uint32_t p = 0; p < r->n_parts; p++) {
        texts[p] = text_of(r, &r->parts[p]);
        has_memory = has_memory && texts[p].data != NULL;
    }
    plan.plan = reply;
    plan.texts = texts;
    plan.n_texts = r->n_parts;
    plan.recomputed = r->again;
    plan.n_recomputed = r->n_again;
    if (has_memory)
        pack(book, &plan);
    else
        make_room(book, 0);
    for (uint32_t p = 0; p < r->n_parts; p++) kvl_free(texts[p].data);
}

kvl_status plans_find(const kvl_host *host, uint64_t request, Kvloom__V1__PlanReply **found,
                      kvl_error *error)
{
    const plan_book *book = &host->plans;
    const size_t at = place_of(request);
    *found = NULL;
    if (request == 0 || book->items[at].bytes == NULL || book->items[at].request != request)
        return KVL_FAIL(error, KVL_ERR_NOT_FOUND,
                        "request %" PRIu64 " is not among the last %u of this host, of which the "
                        "last was %" PRIu64,
                        request, KVL_PLANS_MAX, book->n_requests);
    *found = kvloom__v1__plan_reply__unpack(NULL, book->items[at].n_bytes, book->items[at].bytes);
    if (*found == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a plan");
    return KVL_OK;
}

void plans_deinit(kvl_host *host)
{
    for (size_t i = 0; i < KVL_PLANS_MAX; i++) forget(&host->plans, i);
}
