/* cli/cmd_pin.c: `kvloom pin ID...`: brings segments into a sidecar's memory and keeps them there
 * while this command runs, at most for the lease. */
#include "cli/cli.h"
#include "cli/connect.h"

#include <poll.h>

enum { LEASE_MS_DEFAULT = 60000, LOAD_MS = 30000 };

int kvl_command_pin(int argc, char **argv)
{
    kvl_cli_connection c;
    const int failed = kvl_cli_connect(
        argc, argv, "Keep segments in memory while this command runs, at most for --lease.",
        "ID...", &c);
    if (failed != 0) return failed;
    if (c.lease_ms == 0) c.lease_ms = LEASE_MS_DEFAULT;
    int result = c.n_arguments == 0 ? KVL_EXIT_USAGE : KVL_EXIT_OK;
    if (c.n_arguments == 0) (void)fprintf(stderr, "kvloom pin: which? `kvloom ls` has the ids\n");
    for (int i = 0; i < c.n_arguments && result == KVL_EXIT_OK; i++) {
        kvloom_digest id;
        kvloom_error error;
        uint64_t lease = 0;
        if (!kvl_cli_parse_id(c.arguments[i], &id)) {
            result = KVL_EXIT_USAGE;
        } else if (kvloom_pin_id(c.client, &id, LOAD_MS, c.lease_ms, &lease, &error) < 0) {
            result = kvl_cli_fail_client(&error);
        }
    }
    if (result == KVL_EXIT_OK) {
        (void)fprintf(stderr, "kvloom pin: %d pinned for %u s; end this command to unpin\n",
                      c.n_arguments, c.lease_ms / 1000);
        (void)poll(NULL, 0, (int)c.lease_ms);
    }
    kvloom_close(c.client);
    return result;
}
