/* cli/doctor.h: findings of `kvloom doctor`, one line each: what was looked at, what was found, and
 * what to do where it is not right.
 * Threads  One at a time. */
#ifndef KVL_CLI_DOCTOR_H
#define KVL_CLI_DOCTOR_H

#include "cli/config.h"

typedef enum kvl_finding {
    KVL_FINDING_OK,
    KVL_FINDING_WARN, /* works, but not as well or as safely as it could */
    KVL_FINDING_FAIL, /* a sidecar would not start, or would lose data */
} kvl_finding;

typedef struct kvl_doctor {
    bool json;
    uint32_t n_findings, n_warnings, n_failures;
} kvl_doctor;

/* Prints one. `remedy` NULL: nothing is to be done. */
void kvl_doctor_say(kvl_doctor *doctor, kvl_finding finding, const char *what, const char *remedy,
                    const char *format, ...) __attribute__((format(printf, 5, 6)));

/* What does not depend on a configuration: versions of libraries, limits of this process. */
void kvl_doctor_machine(kvl_doctor *doctor);
/* Files of keys: that they are there, and that nobody else may read them. */
void kvl_doctor_keys(kvl_doctor *doctor, const kvl_config *config);
/* Sockets of clients, the port for peers, and whether peers answer. */
void kvl_doctor_places(kvl_doctor *doctor, const kvl_config *config);
/* Databases and the room for them; the memory that is promised. */
void kvl_doctor_stores(kvl_doctor *doctor, const kvl_sidecar_options *options);

#endif /* KVL_CLI_DOCTOR_H */
