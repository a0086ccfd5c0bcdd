/* cli/connect.c: a command line becomes a client of a sidecar. */
#include "cli/connect.h"

#include "base/clock.h"
#include "base/hash.h"
#include "base/units.h"
#include "cli/cli.h"

#include <argp.h>
#include <string.h>

enum {
    OPTION_SOCKET = 256,
    OPTION_FINGERPRINT,
    OPTION_SALT,
    OPTION_LEASE,
    OPTION_HOME,
    OPTION_JSON
};

static const struct argp_option options[] = {
    {"socket", OPTION_SOCKET, "PATH", 0, "Of the sidecar ($KVLOOM_SOCKET)", 0},
    {"model", 'm', "TEXT", 0, "The model's name, as the sidecar has it", 0},
    {"fingerprint", OPTION_FINGERPRINT, "HEX", 0, "The same as its 64 hexadecimal digits", 0},
    {"salt", OPTION_SALT, "TEXT", 0, "Of those who share among themselves only", 0},
    {"lease", OPTION_LEASE, "TIME", 0, "How long `kvloom pin` keeps it (60s)", 0},
    {"output", 'o', "FILE", 0, "Where `kvloom get` writes (ID.kvseg)", 0},
    {"home", OPTION_HOME, "FILE", 0, "Token ids before those that `kvloom put` puts", 0},
    {"json", OPTION_JSON, NULL, 0, "Print JSON", 0},
    {0},
};

static void set_lease(kvl_cli_connection *c, const struct argp_state *state, const char *text)
{
    int64_t duration_ns = 0;
    kvl_error error;
    if (kvl_duration_from_text(text, &duration_ns, &error) < 0) argp_error(state, "%s", error.text);
    c->lease_ms = (uint32_t)(duration_ns / KVL_NS_PER_MS);
}

static error_t parse(int key, char *text, struct argp_state *state)
{
    kvl_cli_connection *c = state->input;
    switch (key) {
    case OPTION_SOCKET: c->options.socket = text; return 0;
    case 'm':
        c->options.fingerprint = kvloom_fingerprint(text, strlen(text));
        c->has_model = true;
        return 0;
    case OPTION_FINGERPRINT:
        if (!kvl_cli_parse_id(text, &c->options.fingerprint)) argp_usage(state);
        c->has_model = true;
        return 0;
    case OPTION_SALT: c->options.salt = text; return 0;
    case OPTION_LEASE: set_lease(c, state, text); return 0;
    case OPTION_HOME: c->home = text; return 0;
    case 'o': c->output = text; return 0;
    case OPTION_JSON: c->json = true; return 0;
    case ARGP_KEY_ARGS:
        c->arguments = state->argv + state->next;
        c->n_arguments = state->argc - state->next;
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

bool kvl_cli_parse_id(const char *text, kvloom_digest *id)
{
    kvl_digest digest;
    if (kvl_digest_from_text(text, &digest) == KVL_OK) {
        memcpy(id->bytes, digest.bytes, sizeof id->bytes);
        return true;
    }
    (void)fprintf(stderr, "kvloom: '%.80s' is no id: it must be 64 hexadecimal digits\n", text);
    return false;
}

int kvl_cli_fail_client(const kvloom_error *error)
{
    (void)fprintf(stderr, "kvloom: %s (%s)\n", error->text,
                  kvl_status_name((kvl_status)error->status));
    return KVL_EXIT_FAILED;
}

int kvl_cli_parse(int argc, char **argv, const char *about, const char *arguments,
                  kvl_cli_connection *connection)
{
    const struct argp argp = {options, parse, arguments, about, NULL, NULL, NULL};
    *connection = (kvl_cli_connection){.client = NULL};
    return argp_parse(&argp, argc, argv, 0, NULL, connection) == 0 ? 0 : KVL_EXIT_USAGE;
}

int kvl_cli_dial(kvl_cli_connection *connection)
{
    kvloom_error error;
    if (!connection->has_model) {
        (void)fprintf(stderr, "kvloom: --model or --fingerprint is needed\n");
        return KVL_EXIT_USAGE;
    }
    if (kvloom_connect(&connection->options, &connection->client, &error) < 0)
        return kvl_cli_fail_client(&error);
    return KVL_EXIT_OK;
}

int kvl_cli_connect(int argc, char **argv, const char *about, const char *arguments,
                    kvl_cli_connection *connection)
{
    const int failed = kvl_cli_parse(argc, argv, about, arguments, connection);
    return failed != 0 ? failed : kvl_cli_dial(connection);
}
