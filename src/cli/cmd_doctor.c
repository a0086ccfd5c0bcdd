/* cli/cmd_doctor.c: `kvloom doctor`: whether a sidecar with this configuration would run, and run
 * well. It changes nothing. */
#include "base/log.h"
#include "cli/cli.h"
#include "cli/doctor.h"

#include <argp.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdlib.h>

enum { OPTION_CONFIG = 256, OPTION_JSON };

typedef struct arguments {
    const char *file;
    bool json;
} arguments;

static const struct argp_option options[] = {
    {"config", OPTION_CONFIG, "FILE", 0, "The sidecar's ($KVLOOM_CONFIG); KVLOOM_* count too", 0},
    {"json", OPTION_JSON, NULL, 0, "A JSON object a line", 0},
    {0},
};

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    switch (key) {
    case OPTION_CONFIG: wanted->file = text; return 0;
    case OPTION_JSON: wanted->json = true; return 0;
    case ARGP_KEY_ARG: argp_usage(state); return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

void kvl_doctor_say(kvl_doctor *doctor, kvl_finding finding, const char *what, const char *remedy,
                    const char *format, ...)
{
    static const char *const names[] = {"ok", "warn", "FAIL"};
    char text[1024];
    va_list rest;
    va_start(rest, format);
    (void)vsnprintf(text, sizeof text, format, rest);
    va_end(rest);
    doctor->n_findings++;
    if (finding == KVL_FINDING_WARN) doctor->n_warnings++;
    if (finding == KVL_FINDING_FAIL) doctor->n_failures++;
    if (!doctor->json) {
        (void)printf("%-4s  %-14s %s\n", names[finding], what, text);
        if (remedy != NULL) (void)printf("      %-14s -> %s\n", "", remedy);
        return;
    }
    json_t *line = json_pack("{s:s, s:s, s:s, s:s?}", "finding", names[finding], "what", what,
                             "text", text, "remedy", remedy);
    if (line == NULL) return;
    (void)json_dumpf(line, stdout, JSON_COMPACT);
    (void)printf("\n");
    json_decref(line);
}

/* Without a configuration there is nothing to be said of keys, sockets and stores. */
static void check_configuration(kvl_doctor *doctor, const char *file)
{
    static kvl_config config;
    kvl_sidecar_options resolved;
    kvl_error error = {.text = ""};
    kvl_status status = file == NULL ? KVL_OK : kvl_config_load(&config, file, &error);
    if (status == KVL_OK) status = kvl_config_take_environment(&config, &error);
    const bool is_empty = config.n_tenants == 0 && file == NULL;
    if (status == KVL_OK && is_empty) {
        kvl_doctor_say(doctor, KVL_FINDING_WARN, "configuration",
                       "name one: kvloom doctor --config FILE", "there is none");
        return;
    }
    if (status < 0) {
        kvl_doctor_say(doctor, KVL_FINDING_FAIL, "configuration", "mend the line that is named",
                       "%s", error.text);
        kvl_config_deinit(&config);
        return;
    }
    /* Before the rest: a key that cannot be read makes the configuration unusable as a whole. */
    kvl_doctor_keys(doctor, &config);
    status = kvl_config_resolve(&config, &resolved, &error);
    if (status < 0) {
        kvl_doctor_say(doctor, KVL_FINDING_FAIL, "configuration", "change the value that is named",
                       "%s", error.text);
    } else {
        kvl_doctor_say(doctor, KVL_FINDING_OK, "configuration", NULL, "%zu tenants, %zu peers",
                       resolved.n_tenants, resolved.n_peers);
        kvl_doctor_places(doctor, &config);
        kvl_doctor_stores(doctor, &resolved);
    }
    kvl_config_deinit(&config);
}

int kvl_command_doctor(int argc, char **argv)
{
    static const struct argp argp = {
        options,
        parse,
        NULL,
        "Check what a sidecar needs, and say what to do.\vEnds with 0 where it would run, also "
        "with warnings, and with 1 where it would not.",
        NULL,
        NULL,
        NULL};
    arguments wanted = {.file = getenv("KVLOOM_CONFIG")};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    kvl_doctor doctor = {.json = wanted.json};
    kvl_doctor_machine(&doctor);
    check_configuration(&doctor, wanted.file);
    if (!doctor.json)
        (void)printf("%u looked at, %u warnings, %u failures\n", doctor.n_findings,
                     doctor.n_warnings, doctor.n_failures);
    return doctor.n_failures == 0 ? KVL_EXIT_OK : KVL_EXIT_FAILED;
}
