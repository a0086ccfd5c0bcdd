/* cli/cmd_ls.c: `kvloom ls`: what a sidecar keeps. */
#include "base/alloc.h"
#include "base/hash.h"
#include "base/units.h"
#include "cli/cli.h"
#include "cli/connect.h"

#include <string.h>

enum { PAGE = 1024 };

static void print_entry(const kvloom_entry *entry, bool json, bool is_first)
{
    char text[KVL_DIGEST_TEXT_BYTES];
    char size[KVL_UNIT_TEXT_BYTES];
    kvl_digest id;
    memcpy(id.bytes, entry->id.bytes, sizeof id.bytes);
    const char *kind = entry->kind == 1 ? "segment" : "anchor";
    if (json) {
        (void)printf("%s{\"id\": \"%s\", \"kind\": \"%s\", \"bytes\": %llu}",
                     is_first ? "" : ",\n ", kvl_digest_to_text(&id, text), kind,
                     (unsigned long long)entry->n_bytes);
    } else {
        (void)printf("%s  %-8s %s\n", kvl_digest_to_text(&id, text), kind,
                     kvl_bytes_to_text(entry->n_bytes, size));
    }
}

/* Page by page: a list may be longer than a message. */
static kvloom_status list_all(kvl_cli_connection *c, kvloom_entry *entries, kvloom_error *error)
{
    kvloom_digest last;
    size_t n_all = 0;
    for (size_t n = PAGE; n == PAGE; n_all += n) {
        const kvloom_status status =
            kvloom_list(c->client, n_all == 0 ? NULL : &last, entries, PAGE, &n, error);
        if (status < 0) return status;
        for (size_t i = 0; i < n; i++) print_entry(&entries[i], c->json, n_all + i == 0);
        if (n > 0) last = entries[n - 1].id;
    }
    return KVLOOM_OK;
}

int kvl_command_ls(int argc, char **argv)
{
    kvl_cli_connection c;
    const int failed = kvl_cli_connect(argc, argv, "List what a sidecar keeps.", "", &c);
    if (failed != 0) return failed;
    kvloom_error error = {.status = KVLOOM_ERR_NO_MEMORY, .text = "no memory for a list"};
    kvloom_entry *entries = kvl_alloc_zero(PAGE, sizeof *entries);
    kvloom_status status = KVLOOM_ERR_NO_MEMORY;
    if (c.json) (void)printf("[");
    if (entries != NULL) status = list_all(&c, entries, &error);
    if (c.json) (void)printf("]\n");
    kvl_free(entries);
    kvloom_close(c.client);
    return status < 0 ? kvl_cli_fail_client(&error) : KVL_EXIT_OK;
}
