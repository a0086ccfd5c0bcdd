/* store/lmdb_check.h: may LMDB open this file? LMDB trusts what it maps: a damaged page makes it
 * read or write anywhere (CVE-2019-16224 to 16228). So every page that it could follow a number
 * from is checked first, by code that trusts nothing.
 * Threads  Safe from any thread; nobody may write to the bytes meanwhile. */
#ifndef KVL_STORE_LMDB_CHECK_H
#define KVL_STORE_LMDB_CHECK_H

#include "base/status.h"

/* bytes   a whole data.mdb of LMDB 0.9 on a 64-bit machine
 * Cost    reads every page of keys and the first of every value; one bit of memory a page
 * Errors  KVL_ERR_CORRUPT (text: page and reason), KVL_ERR_FOREIGN (another version of LMDB's
 *         format, or a kind of table that KVLoom never makes), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_lmdb_check(const uint8_t *bytes, size_t n_bytes, kvl_error *error);

#endif /* KVL_STORE_LMDB_CHECK_H */
