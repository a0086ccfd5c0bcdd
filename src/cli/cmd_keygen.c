/* cli/cmd_keygen.c: `kvloom keygen FILE`: a key pair for connections between machines. */
#include "cli/cli.h"
#include "exchange/access.h"

#include <argp.h>

static error_t parse(int key, char *text, struct argp_state *state)
{
    const char **path = state->input;
    switch (key) {
    case ARGP_KEY_ARG:
        if (*path != NULL) argp_usage(state);
        *path = text;
        return 0;
    case ARGP_KEY_NO_ARGS: argp_usage(state); return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

int kvl_command_keygen(int argc, char **argv)
{
    static const struct argp argp = {
        NULL,
        parse,
        "FILE",
        "Make a key pair for connections between machines.\v"
        "FILE gets both keys, readable for its owner only; the public key is printed. Each process "
        "has "
        "a pair of its own (--curve-key FILE). Who listens also has an allow-list, a line for each "
        "key that may connect: KEY TENANT RIGHTS NAME, with the rights read, write and admin "
        "joined "
        "by commas. Who dials names the other side's public key (--peer-key NAME=KEY).",
        NULL,
        NULL,
        NULL};
    const char *path = NULL;
    if (argp_parse(&argp, argc, argv, 0, NULL, &path) != 0) return KVL_EXIT_USAGE;
    kvl_key_pair pair;
    kvl_error error;
    kvl_status status = kvl_key_pair_make(&pair, &error);
    if (status == KVL_OK) status = kvl_key_pair_write(&pair, path, &error);
    if (status == KVL_OK) (void)printf("%s\n", pair.public_key);
    kvl_key_pair_wipe(&pair);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
