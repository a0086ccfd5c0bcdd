/* exchange/access.h: who may speak over tcp, as whom, and what for: CURVE keys and the allow-list.
 *
 * A key pair is a text file of two lines, "public KEY" and "secret KEY", keys as the 40 characters
 * of Z85 (ZeroMQ's RFC 32). An allow-list has a line for each client: its public key, its tenant,
 * its rights joined by commas (read, write, admin, or all), and a name for the log; '#' begins a
 * comment. Who is not on the list is refused during the handshake, before a message is read.
 * Threads  A list guards itself; the rest is safe from any thread. */
#ifndef KVL_EXCHANGE_ACCESS_H
#define KVL_EXCHANGE_ACCESS_H

#include "base/status.h"

#define KVL_PUBLIC_KEY_BYTES 32u
#define KVL_KEY_TEXT_BYTES 41u /* Z85 with its NUL */
#define KVL_ALLOWED_MAX 4096u
#define KVL_TENANT_NAME_BYTES_MAX 31u

typedef enum kvl_right {
    KVL_RIGHT_READ = 1,  /* locate, fetch and list */
    KVL_RIGHT_WRITE = 2, /* announce */
    KVL_RIGHT_ADMIN = 4, /* tasks */
    KVL_RIGHT_ALL = 7,
} kvl_right;

typedef struct kvl_access {
    uint32_t rights;
    char tenant[KVL_TENANT_NAME_BYTES_MAX + 1]; /* "": the only one */
    char name[KVL_TENANT_NAME_BYTES_MAX + 1];
} kvl_access;

typedef struct kvl_key_pair {
    char public_key[KVL_KEY_TEXT_BYTES];
    char secret_key[KVL_KEY_TEXT_BYTES];
} kvl_key_pair;

/* Errors   KVL_ERR_UNSUPPORTED (libzmq was built without CURVE) */
KVL_MUST_USE kvl_status kvl_key_pair_make(kvl_key_pair *pair, kvl_error *error);
/* Writes a file that only its owner may read; an existing file is not replaced.
 * Errors   KVL_ERR_EXISTS, KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_key_pair_write(const kvl_key_pair *pair, const char *path,
                                           kvl_error *error);
/* Refuses a file that others may read.
 * Errors   KVL_ERR_NOT_FOUND, KVL_ERR_DENIED (readable by others), KVL_ERR_MALFORMED, KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_key_pair_read(const char *path, kvl_key_pair *pair, kvl_error *error);
/* Overwrites the keys. */
void kvl_key_pair_wipe(kvl_key_pair *pair);
bool kvl_key_text_is_valid(const char *text);

typedef struct kvl_allow_list kvl_allow_list;

/* Owns     *list: ended with kvl_allow_list_close
 * Errors   KVL_ERR_MALFORMED (text: line and reason), KVL_ERR_NOT_FOUND, KVL_ERR_TOO_LARGE, ... */
KVL_MUST_USE kvl_status kvl_allow_list_open(const char *path, kvl_allow_list **list,
                                            kvl_error *error);
/* Reads the file again. On an error the list stays as it was. */
KVL_MUST_USE kvl_status kvl_allow_list_reload(kvl_allow_list *list, kvl_error *error);
/* False: not on the list. *access may be NULL. */
bool kvl_allow_list_find(kvl_allow_list *list, const char *public_key, kvl_access *access);
size_t kvl_allow_list_size(kvl_allow_list *list);
void kvl_allow_list_close(kvl_allow_list *list); /* NULL does nothing */

#endif /* KVL_EXCHANGE_ACCESS_H */
