/* sidecar/answer.c: a container is handed to a client: a descriptor of the memory that it lies in,
 * or its bytes where it is small. */
#include "sidecar/state.h"

static void fill(Kvloom__Local__V1__Got *got, const kvl_container *container, uint32_t n_ready,
                 int place)
{
    const kvl_container_info *info = kvl_container_info_of(container);
    got->id.len = sizeof info->id.bytes;
    got->id.data = (uint8_t *)(uintptr_t)info->id.bytes; /* only read */
    got->n_layers = info->n_layers;
    got->n_ready = n_ready;
    got->place = (uint32_t)place;
}

static void answer_pinned(kvl_sidecar *s, client *c, const waiter *w, kvl_container *container)
{
    const char *text = "";
    const uint64_t number = sidecar_lease_create(s, c, container, w->lease_ms, &text);
    if (number == 0) {
        sidecar_send_status(s, c, w->number, KVL_ERR_BUSY, "%s", text);
        return;
    }
    Kvloom__Local__V1__Reply reply = KVLOOM__LOCAL__V1__REPLY__INIT;
    Kvloom__Local__V1__Pinned pinned = KVLOOM__LOCAL__V1__PINNED__INIT;
    const kvl_digest *id = &kvl_container_info_of(container)->id;
    reply.number = w->number;
    reply.body_case = KVLOOM__LOCAL__V1__REPLY__BODY_PINNED;
    reply.pinned = &pinned;
    pinned.lease = number;
    pinned.id.len = sizeof id->bytes;
    pinned.id.data = (uint8_t *)(uintptr_t)id->bytes;
    sidecar_send(s, c, &reply, -1);
}

/* Small ones, and those that could not get a descriptor when they were made. */
static void answer_inside(kvl_sidecar *s, client *c, const waiter *w,
                          Kvloom__Local__V1__Reply *reply, const kvl_container *container)
{
    size_t n_bytes = 0;
    const void *bytes = kvl_container_bytes(container, &n_bytes);
    if (n_bytes > SIDECAR_INSIDE_BYTES_MAX) {
        sidecar_send_status(s, c, w->number, KVL_ERR_BUSY,
                            "no descriptor was left for this segment: raise the limit of open "
                            "files (ulimit -n)");
        return;
    }
    reply->got->n_bytes = n_bytes;
    reply->got->inside.len = n_bytes;
    reply->got->inside.data = (uint8_t *)(uintptr_t)bytes;
    sidecar_send(s, c, reply, -1);
}

void sidecar_answer_got(kvl_sidecar *s, client *c, waiter *w, kvl_container *container,
                        uint32_t n_ready, int place)
{
    const bool is_whole = n_ready == kvl_container_n_blocks(container);
    if (w->is_pin) {
        if (is_whole) answer_pinned(s, c, w, container);
        return;
    }
    Kvloom__Local__V1__Reply reply = KVLOOM__LOCAL__V1__REPLY__INIT;
    Kvloom__Local__V1__Got got = KVLOOM__LOCAL__V1__GOT__INIT;
    reply.number = w->number;
    reply.status = is_whole ? KVL_OK : KVL_IN_PROGRESS;
    reply.body_case = KVLOOM__LOCAL__V1__REPLY__BODY_GOT;
    reply.got = &got;
    fill(&got, container, n_ready, place);
    if (w->lease != 0) {
        /* The client has it already: only more of it is there now. */
        got.lease = w->lease;
        sidecar_send(s, c, &reply, -1);
        return;
    }
    const int fd = kvl_container_lend(container);
    if (fd < 0) {
        if (is_whole) answer_inside(s, c, w, &reply, container);
        return;
    }
    const char *text = "";
    w->lease = sidecar_lease_create(s, c, container, w->lease_ms, &text);
    if (w->lease == 0) {
        if (is_whole) sidecar_send_status(s, c, w->number, KVL_ERR_BUSY, "%s", text);
        return;
    }
    got.lease = w->lease;
    got.n_bytes = kvl_container_n_bytes(container);
    sidecar_send(s, c, &reply, fd);
}
