/* cli/cmd_stat.c: `kvloom stat`: what a sidecar has done for its tenant, and `kvloom top`, the same
 * again every second. */
#include "base/units.h"
#include "cli/cli.h"
#include "cli/connect.h"

#include <poll.h>
#include <unistd.h>

typedef struct figure {
    const char *name;
    uint64_t value;
    bool is_bytes;
} figure;

enum { FIGURES = 16 };

static void take(const kvloom_stats *s, figure figures[FIGURES])
{
    const figure all[FIGURES] = {{"memory_bytes", s->memory_bytes, true},
                                 {"memory_bytes_max", s->memory_bytes_max, true},
                                 {"disk_bytes", s->disk_bytes, true},
                                 {"disk_bytes_max", s->disk_bytes_max, true},
                                 {"segments", s->n_containers, false},
                                 {"hits_memory", s->hits_memory, false},
                                 {"hits_disk", s->hits_disk, false},
                                 {"hits_peer", s->hits_peer, false},
                                 {"misses", s->misses, false},
                                 {"puts", s->puts, false},
                                 {"evictions", s->evictions, false},
                                 {"refused", s->refused, false},
                                 {"damaged", s->damaged, false},
                                 {"leases", s->leases, false},
                                 {"leases_expired", s->leases_expired, false},
                                 {"clients", s->clients, false}};
    for (int i = 0; i < FIGURES; i++) figures[i] = all[i];
}

static void print_stats(const kvloom_stats *s, const kvloom_stats *before, bool json)
{
    figure now[FIGURES], then[FIGURES];
    take(s, now);
    take(before == NULL ? s : before, then);
    if (json) (void)printf("{");
    for (int i = 0; i < FIGURES; i++) {
        char text[KVL_UNIT_TEXT_BYTES];
        if (json) {
            (void)printf("%s\"%s\": %llu", i == 0 ? "" : ", ", now[i].name,
                         (unsigned long long)now[i].value);
            continue;
        }
        if (now[i].is_bytes) {
            (void)printf("%-18s %12s", now[i].name, kvl_bytes_to_text(now[i].value, text));
        } else {
            (void)printf("%-18s %12llu", now[i].name, (unsigned long long)now[i].value);
        }
        if (before != NULL && !now[i].is_bytes)
            (void)printf(" %+10lld/s", (long long)(now[i].value - then[i].value));
        (void)printf("\n");
    }
    if (json) (void)printf("}\n");
    (void)fflush(stdout);
}

int kvl_command_stat(int argc, char **argv)
{
    kvl_cli_connection c;
    kvloom_stats stats;
    kvloom_error error;
    const int failed =
        kvl_cli_connect(argc, argv, "What a sidecar has done for its tenant.", "", &c);
    if (failed != 0) return failed;
    const kvloom_status status = kvloom_get_stats(c.client, &stats, &error);
    if (status == KVLOOM_OK) print_stats(&stats, NULL, c.json);
    kvloom_close(c.client);
    return status < 0 ? kvl_cli_fail_client(&error) : KVL_EXIT_OK;
}

/* On a terminal the view stays in place; elsewhere each second is printed below the last. */
int kvl_command_top(int argc, char **argv)
{
    kvl_cli_connection c;
    kvloom_stats stats[2];
    kvloom_error error;
    const int failed =
        kvl_cli_connect(argc, argv, "The same as `kvloom stat`, every second.", "", &c);
    if (failed != 0) return failed;
    const bool is_terminal = isatty(STDOUT_FILENO) == 1;
    kvloom_status status = kvloom_get_stats(c.client, &stats[0], &error);
    for (int i = 1; status == KVLOOM_OK; i++) {
        (void)poll(NULL, 0, 1000);
        status = kvloom_get_stats(c.client, &stats[i % 2], &error);
        if (status < 0) break;
        if (is_terminal) (void)printf("\033[H\033[2J");
        print_stats(&stats[i % 2], &stats[1 - i % 2], c.json);
    }
    kvloom_close(c.client);
    return kvl_cli_fail_client(&error);
}
