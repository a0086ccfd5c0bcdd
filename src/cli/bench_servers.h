/* cli/bench_servers.h: the processes that `kvloom bench exchange` talks to. Started before the
 * bench has threads of its own; each ends with its parent. */
#ifndef KVL_CLI_BENCH_SERVERS_H
#define KVL_CLI_BENCH_SERVERS_H

#include "exchange/access.h"

#include <sys/types.h>

enum { BENCH_1M = 1, BENCH_16M, BENCH_64M };

typedef struct bench_place {
    char directory[64];
    char raw_endpoint[3][96];  /* ipc, tcp, tcp with CURVE */
    char peer_endpoint[3][96]; /* same */
    char sidecar_socket[96], redis_socket[96], allow_list[96], key_file[96];
    kvl_key_pair server_keys, client_keys;
    int64_t sidecar_ns; /* when it was started */
} bench_place;

/* "n messages of n_bytes each, please." */
typedef struct bench_question {
    uint64_t n_bytes;
    uint32_t n;
} bench_question;

KVL_MUST_USE kvl_status bench_place_make(bench_place *place, kvl_error *error);
void bench_place_end(bench_place *place);

/* Process ids; below 0 when there is no process. */
pid_t bench_serve_raw(const bench_place *place);   /* answers questions over plain ZeroMQ */
pid_t bench_serve_peers(const bench_place *place); /* exchanges with containers of 1, 16, 64 MiB */
pid_t bench_start_sidecar(bench_place *place);
pid_t bench_start_redis(const bench_place *place); /* 0: not installed */

void bench_set_curve(void *zmq_socket, const bench_place *place, bool as_server);
int bench_dial_redis(const bench_place *place);
double bench_resident_mib(pid_t pid);

#endif /* KVL_CLI_BENCH_SERVERS_H */
