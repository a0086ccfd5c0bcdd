/* cli/cmd_rm.c: `kvloom rm ID...`: a sidecar forgets segments, in memory and on disk. */
#include "cli/cli.h"
#include "cli/connect.h"

int kvl_command_rm(int argc, char **argv)
{
    kvl_cli_connection c;
    const int failed =
        kvl_cli_connect(argc, argv, "Forget segments, in memory and on disk.", "ID...", &c);
    if (failed != 0) return failed;
    int result = c.n_arguments == 0 ? KVL_EXIT_USAGE : KVL_EXIT_OK;
    if (c.n_arguments == 0) (void)fprintf(stderr, "kvloom rm: which? `kvloom ls` has the ids\n");
    for (int i = 0; i < c.n_arguments; i++) {
        kvloom_digest id;
        kvloom_error error;
        if (!kvl_cli_parse_id(c.arguments[i], &id)) {
            result = KVL_EXIT_USAGE;
        } else if (kvloom_remove_id(c.client, &id, &error) < 0) {
            result = kvl_cli_fail_client(&error);
        }
    }
    kvloom_close(c.client);
    return result;
}
