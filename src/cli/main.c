/* cli/main.c: `kvloom COMMAND ...` finds its subcommand. */
#include "cli/cli.h"

#include <string.h>

static const kvl_command commands[] = {
    {"demo", "five agents share what they have read: the main job", kvl_command_demo},
    {"serve", "run one agent host", kvl_command_serve},
    {"chat", "talk with a model in the terminal", kvl_command_chat},
    {"batch", "answer a file of requests, offline", kvl_command_batch},
    {"ingest", "read documents into a collection, for ask", kvl_command_ingest},
    {"ask", "answer a question from a collection", kvl_command_ask},
    {"sidecar", "keep and exchange segments for other engines", kvl_command_sidecar},
    {"get", "write a segment of a sidecar to a file", kvl_command_get},
    {"put", "give a segment in a file to a sidecar", kvl_command_put},
    {"ls", "what a sidecar keeps", kvl_command_ls},
    {"rm", "forget segments of a sidecar", kvl_command_rm},
    {"pin", "keep segments in a sidecar's memory", kvl_command_pin},
    {"stat", "what a sidecar has done", kvl_command_stat},
    {"top", "the same, every second", kvl_command_top},
    {"trace", "record what is asked of a sidecar; replay it under each policy", kvl_command_trace},
    {"doctor", "check what a sidecar needs, and say what to do", kvl_command_doctor},
    {"keygen", "make a key pair for connections between machines", kvl_command_keygen},
    {"generate", "answer a prompt", kvl_command_generate},
    {"tokenize", "text to token ids and back", kvl_command_tokenize},
    {"logits", "logits of every token of a text, for comparison", kvl_command_logits},
    {"model", "fetch, list and describe models", kvl_command_model},
    {"status", "what a running host has healed and learnt", kvl_command_status},
    {"explain", "how each part of a prompt would be had", kvl_command_explain},
    {"eval", "what reuse keeps of full prefill's answers", kvl_command_eval},
    {"bench", "measure: prefill, decode, attention, rag, exchange, store", kvl_command_bench},
    {"version", "print the version", kvl_command_version},
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static void print_help(FILE *out)
{
    (void)fprintf(out, "Usage: kvloom COMMAND [OPTION...]\n"
                       "Language-model agents hand each other what they have already read.\n\n"
                       "Commands:\n");
    for (size_t i = 0; i < N_COMMANDS; i++)
        (void)fprintf(out, "  %-10s %s\n", commands[i].name, commands[i].summary);
    (void)fprintf(out, "\n`kvloom COMMAND --help` describes one. KVLOOM_LOG=debug|info|warn|error "
                       "sets how much is logged.\n");
}

int kvl_command_version(int argc, char **argv)
{
    (void)argv;
    if (argc > 1) {
        (void)fprintf(stderr, "kvloom version: takes no arguments\n");
        return KVL_EXIT_USAGE;
    }
    (void)printf("kvloom %s\n", KVL_VERSION);
    return KVL_EXIT_OK;
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        print_help(stderr);
        return KVL_EXIT_USAGE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 ||
        strcmp(argv[1], "help") == 0) {
        print_help(stdout);
        return KVL_EXIT_OK;
    }
    if (strcmp(argv[1], "--version") == 0 || strcmp(argv[1], "-V") == 0)
        return kvl_command_version(1, argv);
    for (size_t i = 0; i < N_COMMANDS; i++) {
        if (strcmp(argv[1], commands[i].name) != 0) continue;
        char name[32];
        (void)snprintf(name, sizeof name, "kvloom %s", commands[i].name);
        argv[1] = name;
        return commands[i].run(argc - 1, argv + 1);
    }
    (void)fprintf(stderr, "kvloom: there is no command '%s'; `kvloom --help` lists them\n",
                  argv[1]);
    return KVL_EXIT_USAGE;
}
