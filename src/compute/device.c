/* compute/device.c: which device a text names. */
#include "base/log.h"
#include "compute/backend.h"

#include <string.h>

/* "cuda" or "cuda:N", N of one or two digits. */
static bool parse_cuda(const char *text, uint32_t *number)
{
    static const char name[] = "cuda";
    const size_t n_name = sizeof name - 1;
    *number = 0;
    if (strncmp(text, name, n_name) != 0) return false;
    const char *at = text + n_name;
    if (*at == '\0') return true;
    if (*at++ != ':' || *at == '\0' || strlen(at) > 2) return false;
    for (; *at != '\0'; at++) {
        if (*at < '0' || *at > '9') return false;
        *number = *number * 10 + (uint32_t)(*at - '0');
    }
    return *number < KVL_DEVICES_MAX;
}

static kvl_status create_any(kvl_pool *pool, kvl_cpu_variant variant, kvl_backend **backend,
                             kvl_error *error)
{
    kvl_error refusal;
    const kvl_status status = kvl_backend_cuda_create(pool, 0, backend, &refusal);
    if (status == KVL_OK) return KVL_OK;
    kvl_log(status == KVL_ERR_UNSUPPORTED ? KVL_LOG_INFO : KVL_LOG_WARN, "device_auto",
            "device=cpu reason=\"%s\"", refusal.text);
    return kvl_backend_cpu_create(pool, variant, backend, error);
}

kvl_status kvl_backend_create(kvl_pool *pool, const char *device, kvl_cpu_variant variant,
                              kvl_backend **backend, kvl_error *error)
{
    *backend = NULL;
    uint32_t number = 0;
    if (strcmp(device, "cpu") == 0) return kvl_backend_cpu_create(pool, variant, backend, error);
    if (strcmp(device, "auto") == 0) return create_any(pool, variant, backend, error);
    if (parse_cuda(device, &number)) return kvl_backend_cuda_create(pool, number, backend, error);
    return KVL_FAIL(error, KVL_ERR_INVALID,
                    "device '%s' is unknown: it must be auto, cpu, cuda or cuda:N with N below %u",
                    device, KVL_DEVICES_MAX);
}
