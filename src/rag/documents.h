/* rag/documents.h: the texts of files and directories, one after another.
 * Threads  Safe from any thread. Blocks on the disk. */
#ifndef KVL_RAG_DOCUMENTS_H
#define KVL_RAG_DOCUMENTS_H

#include "base/status.h"

/* A larger file is named and skipped: by then it is data, not a document. */
#define KVL_DOCUMENT_BYTES_MAX ((size_t)8 << 20)
/* Directories inside of one another. */
#define KVL_DOCUMENT_DEPTH_MAX 64u

typedef struct kvl_documents_visitor {
    /* A text, UTF-8 and without NUL, borrowed for the call. An error ends the walk. */
    kvl_status (*text)(void *context, const char *path, const char *text, size_t n_bytes,
                       kvl_error *error);
    /* A file that is no text to us, and why. */
    void (*skipped)(void *context, const char *path, const char *reason);
    void *context;
} kvl_documents_visitor;

/* Visits a file, or every regular file below a directory in the order of their names. Names that
 * begin with a dot and symbolic links inside of a directory are passed over.
 * Errors   KVL_ERR_NOT_FOUND, KVL_ERR_IO (path itself; what is unreadable inside of it is skipped),
 *          KVL_ERR_TOO_LARGE (deeper than KVL_DOCUMENT_DEPTH_MAX, longer than PATH_MAX),
 *          KVL_ERR_NO_MEMORY, those of the visitor */
KVL_MUST_USE kvl_status kvl_documents_visit(const char *path, const kvl_documents_visitor *visitor,
                                            kvl_error *error);

/* Where the first byte is that no UTF-8 character has; n_bytes: nowhere. Surrogates, overlong forms
 * and NUL are not UTF-8 here. */
size_t kvl_documents_utf8_prefix(const char *text, size_t n_bytes);

#endif /* KVL_RAG_DOCUMENTS_H */
