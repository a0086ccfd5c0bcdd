/* cli/cli.h: what the subcommands of `kvloom` share.
 * A subcommand gets its own argc and argv (argv[0] is "kvloom NAME"), parses them with argp and
 * returns the exit status: 0 done, 1 failed, 2 wrong use. Results go to standard output, progress
 * and errors to standard error. */
#ifndef KVL_CLI_CLI_H
#define KVL_CLI_CLI_H

#include "host/engine.h"

#include <limits.h>
#include <stdio.h>

enum { KVL_EXIT_OK = 0, KVL_EXIT_FAILED = 1, KVL_EXIT_USAGE = 2 };

typedef struct kvl_command {
    const char *name;
    const char *summary;
    int (*run)(int argc, char **argv);
} kvl_command;

int kvl_command_ask(int argc, char **argv);
int kvl_command_batch(int argc, char **argv);
int kvl_command_bench(int argc, char **argv);
int kvl_command_chat(int argc, char **argv);
int kvl_command_demo(int argc, char **argv);
int kvl_command_doctor(int argc, char **argv);
int kvl_command_eval(int argc, char **argv);
int kvl_command_status(int argc, char **argv);
int kvl_command_explain(int argc, char **argv);
int kvl_command_generate(int argc, char **argv);
int kvl_command_get(int argc, char **argv);
int kvl_command_ingest(int argc, char **argv);
int kvl_command_keygen(int argc, char **argv);
int kvl_command_logits(int argc, char **argv);
int kvl_command_ls(int argc, char **argv);
int kvl_command_model(int argc, char **argv);
int kvl_command_pin(int argc, char **argv);
int kvl_command_put(int argc, char **argv);
int kvl_command_rm(int argc, char **argv);
int kvl_command_serve(int argc, char **argv);
int kvl_command_sidecar(int argc, char **argv);
int kvl_command_stat(int argc, char **argv);
int kvl_command_trace(int argc, char **argv);
int kvl_command_tokenize(int argc, char **argv);
int kvl_command_top(int argc, char **argv);
int kvl_command_version(int argc, char **argv);

/* Prints "kvloom: text" and returns KVL_EXIT_FAILED. */
int kvl_cli_fail(const kvl_error *error);

/* Makes a fresh directory kvloom-<what>-... in TMPDIR, by default /tmp. The caller removes it.
 * path [n_path_bytes]; "" on failure. Errors   KVL_ERR_TOO_LARGE, KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_cli_temporary(const char *what, char *path, size_t n_path_bytes,
                                          kvl_error *error);

/* Options that every command with a model has; part of each command's argp as a child. */
typedef struct kvl_cli_engine {
    const char *model; /* path, or a name of `kvloom model list` */
    uint32_t n_threads;
    uint32_t n_positions;
    const char *device; /* NULL: "auto" */
    kvl_cpu_variant variant;
} kvl_cli_engine;

struct argp;
/* --model, --threads, --context, --device and --cpu; the input of the child parser is a
 * kvl_cli_engine. */
extern const struct argp kvl_cli_engine_argp;

/* What --device says, or its default. */
const char *kvl_cli_device(const kvl_cli_engine *options);

/* Opens the engine that the options describe, with n_pages pages (0: the default).
 * Errors   those of kvl_engine_create; KVL_ERR_NOT_FOUND says how to fetch a known model */
KVL_MUST_USE kvl_status kvl_cli_engine_create(const kvl_cli_engine *options, uint32_t n_pages,
                                              kvl_engine **engine, kvl_error *error);

#define KVL_MODEL_NAME_MAX 128u
/* What clients call the model of an option: "smollm2-135m" of that name (or of NULL, the default),
 * or of "/models/smollm2-135m.gguf". */
void kvl_cli_name_model(const char *model, char name[KVL_MODEL_NAME_MAX]);

/* A whole number of an option's text, within bounds; otherwise tells the user and exits by argp. */
struct argp_state;
uint32_t kvl_cli_number(const struct argp_state *state, const char *option, const char *text,
                        uint32_t least, uint32_t most);

/* Ids from a file, one per line; everything but numbers, spaces and line ends is refused.
 * Owns     *ids: ended with kvl_free */
KVL_MUST_USE kvl_status kvl_cli_read_ids(const char *path, uint32_t n_vocab, uint32_t **ids,
                                         size_t *n_ids, kvl_error *error);

/* Where models are kept: ${XDG_CACHE_HOME:-~/.cache}/kvloom/models.
 * Errors   KVL_ERR_NOT_FOUND (neither XDG_CACHE_HOME nor HOME is set), KVL_ERR_TOO_LARGE */
KVL_MUST_USE kvl_status kvl_models_directory(char path[PATH_MAX], kvl_error *error);
/* The path of a model given by path or by name. Errors as above, and KVL_ERR_NOT_FOUND. */
KVL_MUST_USE kvl_status kvl_models_find(const char *name_or_path, char path[PATH_MAX],
                                        kvl_error *error);
/* Fetches a known model into the directory, unless it is there whole already. Blocks; shows what it
 * does on standard error. Errors: KVL_ERR_NOT_FOUND (unknown name: text lists the known),
 * KVL_ERR_IO, KVL_ERR_DAMAGED (wrong checksum: nothing is kept) */
KVL_MUST_USE kvl_status kvl_models_pull(const char *name, kvl_error *error);
/* Prints the known models, one a line, and whether each is there. */
void kvl_models_print(FILE *out);

#endif /* KVL_CLI_CLI_H */
