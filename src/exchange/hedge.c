/* exchange/hedge.c: a second holder is asked when the first takes longer to begin than it usually
 * does (hedged requests: Dean and Barroso, "The tail at scale", CACM 56(2), 2013). Whoever sends
 * its header first goes on, the other is told to stop: so a hedge costs a header and what of the
 * window was under way. Only the beginning is hedged: blocks of two holders may differ in their
 * roundings, so in the middle a change would begin anew. */
#include "exchange/protocol_state.h"

#include <stdlib.h>
#include <string.h>

void kvl_hedge_sample(kvl_peer *peer, int64_t elapsed_ns)
{
    peer->header_ns[peer->n_headers++ % KVL_HEDGE_SAMPLES] = elapsed_ns;
}

static int compare_times(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

int64_t kvl_hedge_patience(const kvl_peer *peer)
{
    int64_t times[KVL_HEDGE_SAMPLES];
    const uint32_t n = peer->n_headers < KVL_HEDGE_SAMPLES ? peer->n_headers : KVL_HEDGE_SAMPLES;
    if (n < KVL_HEDGE_SAMPLES_MIN) return INT64_MAX;
    memcpy(times, peer->header_ns, n * sizeof *times);
    qsort(times, n, sizeof *times, compare_times);
    const int64_t p95 = times[(n * 19 + 19) / 20 - 1];
    return p95 > KVL_HEDGE_NS_MIN ? p95 : KVL_HEDGE_NS_MIN;
}

bool kvl_hedge_is(const kvl_op *op, uint32_t peer, uint64_t request)
{
    return op != NULL && op->kind == KVL_OP_FETCH && op->has_hedge && op->hedge_peer == peer &&
           op->hedge_request == request;
}

static void stop_stream(kvl_protocol *p, uint32_t index, uint64_t request)
{
    kvl_peer *peer = &p->peers[index];
    KVL_ASSERT(peer->n_streams > 0);
    peer->n_streams--;
    if (peer->state == KVL_PEER_UP) kvl_send_plain(p, index, KVL_MESSAGE_CANCEL, request);
}

void kvl_hedge_drop(kvl_protocol *p, kvl_op *op)
{
    if (!op->has_hedge) return;
    op->has_hedge = false;
    stop_stream(p, op->hedge_peer, op->hedge_request);
}

void kvl_hedge_win(kvl_protocol *p, kvl_op *op, int64_t now_ns)
{
    /* It would have taken longer still: so much is known of it. */
    kvl_hedge_sample(&p->peers[op->peer], now_ns - op->begun_ns);
    stop_stream(p, op->peer, op->stream_request);
    op->has_hedge = false;
    op->peer = op->hedge_peer;
    op->stream_request = op->hedge_request;
    op->begun_ns = op->hedge_begun_ns;
    p->stats.hedges_won++;
}
