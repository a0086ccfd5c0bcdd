/* cli/doctor_look.c: what `kvloom doctor` looks at. */
#include "cli/doctor.h"

#include "base/units.h"
#include "exchange/access.h"
#include "exchange/local.h"
#include "kvloom.h"
#include "store/store.h"

#include <errno.h>
#include <libgen.h>
#include <limits.h>
#include <netdb.h>
#include <poll.h>
#include <sodium.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysinfo.h>
#include <unistd.h>
#include <zmq.h>

enum { DIAL_MS = 1000 };

/* A client costs a descriptor, a lent segment another one for a moment. */
static const rlim_t DESCRIPTORS_WANTED = KVL_SIDECAR_CLIENTS_MAX + 1024;

/* ---- the machine ---- */

static void look_at_limits(kvl_doctor *doctor)
{
    struct rlimit limit = {0, 0};
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < DESCRIPTORS_WANTED) {
        kvl_doctor_say(doctor, KVL_FINDING_WARN, "limit nofile",
                       "ulimit -n 8192, or LimitNOFILE=8192 in the unit",
                       "%llu descriptors; %u clients need %llu", (unsigned long long)limit.rlim_cur,
                       KVL_SIDECAR_CLIENTS_MAX, (unsigned long long)DESCRIPTORS_WANTED);
    } else {
        kvl_doctor_say(doctor, KVL_FINDING_OK, "limit nofile", NULL, "%llu descriptors",
                       (unsigned long long)limit.rlim_cur);
    }
    char text[KVL_UNIT_TEXT_BYTES];
    if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0) return;
    if (limit.rlim_cur < 65536) {
        kvl_doctor_say(doctor, KVL_FINDING_WARN, "limit memlock",
                       "ulimit -l 64, or LimitMEMLOCK=64K in the unit",
                       "%s may be locked: keys could reach the swap",
                       kvl_bytes_to_text(limit.rlim_cur, text));
    } else {
        kvl_doctor_say(doctor, KVL_FINDING_OK, "limit memlock", NULL, "%s may be locked",
                       limit.rlim_cur == RLIM_INFINITY ? "everything"
                                                       : kvl_bytes_to_text(limit.rlim_cur, text));
    }
}

/* The word in brackets is the one that holds. A kernel without huge pages has no such file. */
static void look_at_huge_pages(kvl_doctor *doctor)
{
    static const char path[] = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    char text[128] = "";
    FILE *file = fopen(path, "re");
    const bool has_text = file != NULL && fgets(text, sizeof text, file) != NULL;
    if (file != NULL) (void)fclose(file);
    if (has_text && strstr(text, "[never]") == NULL && strstr(text, "[deny]") == NULL) {
        kvl_doctor_say(doctor, KVL_FINDING_OK, "huge pages", NULL, "for memory that is lent");
        return;
    }
    kvl_doctor_say(doctor, KVL_FINDING_WARN, "huge pages",
                   "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
                   "none for memory that is lent: clients copy at a third of the speed");
}

void kvl_doctor_machine(kvl_doctor *doctor)
{
    int major = 0, minor = 0, patch = 0;
    zmq_version(&major, &minor, &patch);
    const bool has_curve = zmq_has("curve") == 1;
    kvl_doctor_say(doctor, has_curve ? KVL_FINDING_OK : KVL_FINDING_FAIL, "libzmq",
                   has_curve ? NULL : "install a libzmq that was built with libsodium",
                   "%d.%d.%d, %s CURVE", major, minor, patch, has_curve ? "with" : "without");
    kvl_doctor_say(doctor, KVL_FINDING_OK, "lmdb", NULL, "%s", kvl_lmdb_version());
    const bool has_sodium = sodium_init() >= 0;
    const bool has_aes = has_sodium && crypto_aead_aes256gcm_is_available() == 1;
    kvl_doctor_say(doctor, has_aes ? KVL_FINDING_OK : KVL_FINDING_WARN, "libsodium",
                   has_aes ? NULL : "nothing, or a processor with AES instructions", "%s, %s",
                   sodium_version_string(),
                   has_aes ? "AES-256-GCM in hardware"
                           : "no AES in hardware: blocks between machines are sealed more slowly");
    const bool is_one = strcmp(kvloom_version(), KVL_VERSION) == 0;
    kvl_doctor_say(doctor, is_one ? KVL_FINDING_OK : KVL_FINDING_FAIL, "kvloom",
                   is_one ? NULL : "install program and library of one version",
                   "program %s, library %s", KVL_VERSION, kvloom_version());
    look_at_limits(doctor);
    look_at_huge_pages(doctor);
}

/* ---- keys ---- */

static void look_at_secret(kvl_doctor *doctor, const char *path, off_t n_bytes)
{
    struct stat about;
    if (stat(path, &about) != 0) {
        kvl_doctor_say(doctor, KVL_FINDING_FAIL, "key", "make it: head -c 32 /dev/urandom >FILE",
                       "%.400s: %s", path, strerror(errno));
    } else if ((about.st_mode & 077) != 0) {
        kvl_doctor_say(doctor, KVL_FINDING_WARN, "key", "chmod 600 FILE",
                       "%.400s has mode %04o: others may use it", path,
                       (unsigned)about.st_mode & 07777);
    } else if (about.st_size != n_bytes) {
        kvl_doctor_say(doctor, KVL_FINDING_FAIL, "key", "head -c 32 /dev/urandom >FILE",
                       "%.400s has %lld bytes, must have %lld", path, (long long)about.st_size,
                       (long long)n_bytes);
    } else {
        kvl_doctor_say(doctor, KVL_FINDING_OK, "key", NULL, "%.400s", path);
    }
}

static void look_at_list(kvl_doctor *doctor, const char *path)
{
    kvl_allow_list *list = NULL;
    kvl_error error;
    if (kvl_allow_list_open(path, &list, &error) < 0) {
        kvl_doctor_say(doctor, KVL_FINDING_FAIL, "allow-list",
                       "a line for each key: KEY TENANT RIGHTS NAME", "%s", error.text);
        return;
    }
    const size_t n = kvl_allow_list_size(list);
    kvl_doctor_say(doctor, n > 0 ? KVL_FINDING_OK : KVL_FINDING_WARN, "allow-list",
                   n > 0 ? NULL : "add the public keys of those who may connect", "%zu keys", n);
    kvl_allow_list_close(list);
}

void kvl_doctor_keys(kvl_doctor *doctor, const kvl_config *config)
{
    for (size_t i = 0; i < config->n_tenants; i++) {
        const char *path = config->tenants[i][KVL_TENANT_KEY_FILE];
        if (path != NULL) look_at_secret(doctor, path, KVL_TENANT_KEY_LENGTH);
    }
    const char *pair_path = config->values[KVL_CONFIG_CURVE_KEY];
    if (pair_path != NULL) {
        kvl_key_pair pair;
        kvl_error error;
        if (kvl_key_pair_read(pair_path, &pair, &error) < 0) {
            kvl_doctor_say(doctor, KVL_FINDING_FAIL, "curve-key", "make one: kvloom keygen FILE",
                           "%s", error.text);
        } else {
            kvl_doctor_say(doctor, KVL_FINDING_OK, "curve-key", NULL, "%.400s, public %s",
                           pair_path, pair.public_key);
            kvl_key_pair_wipe(&pair);
        }
    }
    const char *list_path = config->values[KVL_CONFIG_ALLOW_LIST];
    if (list_path != NULL) look_at_list(doctor, list_path);
}

/* ---- sockets and ports ---- */

/* True: a sidecar answers there. */
static bool look_at_socket(kvl_doctor *doctor, const char *path)
{
    char copy[PATH_MAX];
    struct stat about;
    int fd = -1;
    kvl_error error;
    if (kvl_local_dial(path, &fd, &error) == KVL_OK) {
        (void)close(fd);
        kvl_doctor_say(doctor, KVL_FINDING_OK, "socket", NULL, "%.100s: somebody listens", path);
        return true;
    }
    (void)snprintf(copy, sizeof copy, "%s", path);
    const char *directory = dirname(copy);
    if (error.status == KVL_ERR_INVALID) {
        kvl_doctor_say(doctor, KVL_FINDING_FAIL, "socket", "choose a shorter path", "%s",
                       error.text);
    } else if (stat(directory, &about) != 0) {
        kvl_doctor_say(doctor, KVL_FINDING_OK, "socket", NULL, "%.100s: its directory will be made",
                       path);
    } else if ((about.st_mode & 0002) != 0 && (about.st_mode & S_ISVTX) == 0) {
        kvl_doctor_say(doctor, KVL_FINDING_FAIL, "socket", "chmod o-w DIRECTORY",
                       "%.100s: anybody may write to %.200s", path, directory);
    } else if (access(directory, W_OK | X_OK) != 0) {
        kvl_doctor_say(doctor, KVL_FINDING_FAIL, "socket", "run as its owner, or choose another",
                       "%.100s: no right to write to %.200s", path, directory);
    } else {
        kvl_doctor_say(doctor, KVL_FINDING_OK, "socket", NULL, "%.100s is free", path);
    }
    return false;
}

/* Splits tcp://HOST:PORT and resolves it. NULL: another kind, or unknown here. */
static struct addrinfo *resolve(const char *endpoint, bool to_listen)
{
    char host[256];
    if (strncmp(endpoint, "tcp://", 6) != 0) return NULL;
    (void)snprintf(host, sizeof host, "%s", endpoint + 6);
    char *colon = strrchr(host, ':');
    if (colon == NULL) return NULL;
    *colon = '\0';
    char *name = host;
    if (name[0] == '[' && colon > host + 1 && colon[-1] == ']') {
        colon[-1] = '\0';
        name++;
    }
    const bool any = name[0] == '\0' || strcmp(name, "*") == 0;
    const struct addrinfo hints = {.ai_family = any ? AF_INET : AF_UNSPEC,
                                   .ai_socktype = SOCK_STREAM,
                                   .ai_flags = to_listen ? AI_PASSIVE : 0};
    struct addrinfo *found = NULL;
    return getaddrinfo(any ? NULL : name, colon + 1, &hints, &found) == 0 ? found : NULL;
}

static void look_at_port(kvl_doctor *doctor, const char *endpoint, bool is_running)
{
    if (strncmp(endpoint, "tcp://", 6) != 0) {
        kvl_doctor_say(doctor, KVL_FINDING_OK, "listen", NULL, "%.200s", endpoint);
        return;
    }
    struct addrinfo *address = resolve(endpoint, true);
    const int fd = address == NULL ? -1 : socket(address->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int on = 1;
    if (fd >= 0) (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    const bool is_free = fd >= 0 && bind(fd, address->ai_addr, address->ai_addrlen) == 0;
    const int reason = errno;
    if (address == NULL) {
        kvl_doctor_say(doctor, KVL_FINDING_FAIL, "listen", "tcp://HOST:PORT of this machine",
                       "%.200s is unknown here", endpoint);
    } else if (is_free || (reason == EADDRINUSE && is_running)) {
        kvl_doctor_say(doctor, KVL_FINDING_OK, "listen", NULL, "%.200s %s", endpoint,
                       is_free ? "is free" : "is in use, by the sidecar that runs");
    } else {
        kvl_doctor_say(doctor, KVL_FINDING_FAIL, "listen", "choose another port or address",
                       "%.200s: %s", endpoint, strerror(reason));
    }
    if (fd >= 0) (void)close(fd);
    if (address != NULL) freeaddrinfo(address);
}

static bool answers(const struct addrinfo *address)
{
    const int fd = socket(address->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return false;
    struct pollfd item = {.fd = fd, .events = POLLOUT};
    int failure = 0;
    socklen_t n = sizeof failure;
    bool is_there = connect(fd, address->ai_addr, address->ai_addrlen) == 0;
    if (!is_there && errno == EINPROGRESS && poll(&item, 1, DIAL_MS) == 1)
        is_there = getsockopt(fd, SOL_SOCKET, SO_ERROR, &failure, &n) == 0 && failure == 0;
    (void)close(fd);
    return is_there;
}

static void look_at_peer(kvl_doctor *doctor, const char *name, const char *endpoint)
{
    if (strncmp(endpoint, "tcp://", 6) != 0) return;
    struct addrinfo *address = resolve(endpoint, false);
    const bool is_there = address != NULL && answers(address);
    kvl_doctor_say(doctor, is_there ? KVL_FINDING_OK : KVL_FINDING_WARN, "peer",
                   is_there ? NULL
                            : "start it, or open the way there; it is dialled again and again",
                   "%.31s at %.200s %s", name, endpoint,
                   is_there          ? "answers"
                   : address == NULL ? "is unknown here"
                                     : "does not answer");
    if (address != NULL) freeaddrinfo(address);
}

void kvl_doctor_places(kvl_doctor *doctor, const kvl_config *config)
{
    bool is_running = false;
    for (size_t i = 0; i < config->n_tenants; i++) {
        const char *path = config->tenants[i][KVL_TENANT_SOCKET];
        if (path != NULL) is_running |= look_at_socket(doctor, path);
    }
    const char *endpoint = config->values[KVL_CONFIG_LISTEN];
    if (endpoint != NULL) look_at_port(doctor, endpoint, is_running);
    for (size_t i = 0; i < config->n_peers; i++)
        look_at_peer(doctor, config->peers[i][KVL_PEER_NAME], config->peers[i][KVL_PEER_ENDPOINT]);
}

/* ---- memory and disk ---- */

static void look_at_database(kvl_doctor *doctor, const kvl_sidecar_tenant *tenant)
{
    char have[KVL_UNIT_TEXT_BYTES], want[KVL_UNIT_TEXT_BYTES];
    uint64_t n_bytes = 0;
    kvl_error error;
    struct statvfs about;
    const kvl_status status = kvl_lmdb_tier_check(tenant->store_path, &n_bytes, &error);
    if (status == KVL_OK) {
        kvl_doctor_say(doctor, KVL_FINDING_OK, "database", NULL, "%.200s: every page is sound, %s",
                       tenant->store_path, kvl_bytes_to_text(n_bytes, have));
    } else if (status == KVL_ERR_NOT_FOUND) {
        kvl_doctor_say(doctor, KVL_FINDING_OK, "database", NULL, "%.200s: will be made",
                       tenant->store_path);
    } else if (status == KVL_ERR_BUSY) {
        kvl_doctor_say(doctor, KVL_FINDING_OK, "database", NULL,
                       "%.200s is in use; it is checked when it is opened", tenant->store_path);
    } else {
        kvl_doctor_say(
            doctor, status == KVL_ERR_CORRUPT ? KVL_FINDING_WARN : KVL_FINDING_FAIL, "database",
            status == KVL_ERR_CORRUPT ? "nothing: the sidecar puts it aside and begins an empty one"
                                      : "choose another directory, on a disk of this machine",
            "%s", error.text);
    }
    if (statvfs(tenant->store_path, &about) != 0) return;
    const uint64_t n_free = (uint64_t)about.f_bavail * about.f_frsize + n_bytes;
    const bool is_enough = n_free >= tenant->disk_bytes_max + tenant->disk_bytes_max / 4;
    kvl_doctor_say(doctor, is_enough ? KVL_FINDING_OK : KVL_FINDING_WARN, "disk",
                   is_enough ? NULL : "make room, or lower `disk`", "%s are free, %s are wanted",
                   kvl_bytes_to_text(n_free, have),
                   kvl_bytes_to_text(tenant->disk_bytes_max + tenant->disk_bytes_max / 4, want));
}

void kvl_doctor_stores(kvl_doctor *doctor, const kvl_sidecar_options *options)
{
    char have[KVL_UNIT_TEXT_BYTES], want[KVL_UNIT_TEXT_BYTES];
    uint64_t n_wanted = 0;
    for (size_t i = 0; i < options->n_tenants; i++) {
        const kvl_sidecar_tenant *tenant = &options->tenants[i];
        n_wanted += tenant->memory_bytes_max;
        if (tenant->store_path != NULL) look_at_database(doctor, tenant);
    }
    struct sysinfo about;
    if (sysinfo(&about) != 0) return;
    const uint64_t n_bytes = (uint64_t)about.totalram * about.mem_unit;
    const bool is_enough = n_wanted <= n_bytes / 10 * 9;
    kvl_doctor_say(doctor, is_enough ? KVL_FINDING_OK : KVL_FINDING_WARN, "memory",
                   is_enough ? NULL : "lower `memory` of the tenants",
                   "%s are promised to tenants, the machine has %s",
                   kvl_bytes_to_text(n_wanted, want), kvl_bytes_to_text(n_bytes, have));
}
