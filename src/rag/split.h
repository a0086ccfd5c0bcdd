/* rag/split.h: cuts a document into chunks, where its own structure allows, so that an edit leaves
 * all chunks but the one that it is in as they were.
 *
 * A text is a row of units (sentences, lines of code, list items) with gaps between them. A gap has
 * a strength (heading, paragraph or edge of a code fence, blank line in code, line of a list or of
 * code, sentence, line), then a signature of the numbers of words in the units beside it, then a
 * hash of what stands before it. A gap is a boundary if nothing within half a chunk's length
 * of it is stronger: a local rule, so that boundaries behind an edit find themselves again whatever
 * stands before them (content-defined chunking with local maxima). Signatures count words and do
 * not look at them: a word that is replaced by another moves no boundary at all, unless two gaps
 * had the same signature.
 *
 * Lengths are in tokens as guessed from the text alone, without a tokenizer, so that the chunks
 * of a collection do not depend on a model: letters in a row are a word, each digit and each
 * sign one more, and a word is about 1.3 tokens.
 * Threads  Safe from any thread. */
#ifndef KVL_RAG_SPLIT_H
#define KVL_RAG_SPLIT_H

#include "base/status.h"

#define KVL_SPLIT_TOKENS_DEFAULT 256u
#define KVL_SPLIT_TOKENS_LEAST 32u
#define KVL_SPLIT_TOKENS_MAX 2048u
/* A longer document is refused: it would be hundreds of thousands of chunks. */
#define KVL_SPLIT_BYTES_MAX ((size_t)64 << 20)

typedef struct kvl_text_span {
    size_t first, n_bytes;
} kvl_text_span;

/* Chunks of a text, in order. They cover it without gaps, none is empty and none is longer than one
 * and a half times n_tokens, by the guess. A cut never stands inside of a UTF-8 character.
 * n_tokens  KVL_SPLIT_TOKENS_LEAST .. KVL_SPLIT_TOKENS_MAX
 * Owns      *chunks: ended with kvl_free; NULL for an empty text
 * Errors    KVL_ERR_TOO_LARGE, KVL_ERR_OUT_OF_RANGE, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_split_text(const char *text, size_t n_bytes, uint32_t n_tokens,
                                       kvl_text_span **chunks, size_t *n_chunks, kvl_error *error);

/* The guess: tokens of a text, at least 1 unless it is empty or blank. */
uint32_t kvl_split_guess_tokens(const char *text, size_t n_bytes);

#endif /* KVL_RAG_SPLIT_H */
