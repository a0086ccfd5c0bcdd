/* cli/connect.h: what the commands that speak to a sidecar share. */
#ifndef KVL_CLI_CONNECT_H
#define KVL_CLI_CONNECT_H

#include "kvloom.h"

#include <stdbool.h>

typedef struct kvl_cli_connection {
    kvloom_client *client;
    kvloom_options options;
    bool has_model;
    const char *home;   /* of `kvloom put`; NULL: not given */
    const char *output; /* of `kvloom get`; NULL: not given */
    bool json;
    uint32_t lease_ms;
    int n_arguments; /* behind the options */
    char **arguments;
} kvl_cli_connection;

/* Parses --socket, --model or --fingerprint, --salt, --lease and --json and connects. 0, or the
 * exit status after the user has been told. `about` and `arguments` are for --help.
 * Owns     connection->client: ended with kvloom_close */
int kvl_cli_connect(int argc, char **argv, const char *about, const char *arguments,
                    kvl_cli_connection *connection);

/* The two halves of it: the command line, and the sidecar. Between them a command may change
 * connection->options. */
int kvl_cli_parse(int argc, char **argv, const char *about, const char *arguments,
                  kvl_cli_connection *connection);
int kvl_cli_dial(kvl_cli_connection *connection);

/* Prints "kvloom: text" and returns KVL_EXIT_FAILED. */
int kvl_cli_fail_client(const kvloom_error *error);
/* An id of 64 hexadecimal digits; false after the user has been told. */
bool kvl_cli_parse_id(const char *text, kvloom_digest *id);

#endif /* KVL_CLI_CONNECT_H */
