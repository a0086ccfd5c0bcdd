/* segment_id.c: the name of a segment. */
#include "segment/container.h"

/* Other keyed digests of the same tenant start with other words, so that no name of one kind can be
 * passed off as a name of another. */
static const char DOMAIN_NAME[] = "kvloom.segment.1";

kvl_digest kvl_segment_id(const uint8_t *tenant_key, const kvl_digest *fingerprint,
                          const kvl_digest *home, const uint32_t *tokens, size_t n_tokens)
{
    KVL_ASSERT(tenant_key != NULL);
    KVL_ASSERT(n_tokens == 0 || tokens != NULL);
    _Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "ids are digested as they lie");
    kvl_digester digester;
    kvl_digester_init(&digester, tenant_key, KVL_DIGEST_BYTES);
    kvl_digester_add(&digester, DOMAIN_NAME, sizeof DOMAIN_NAME);
    kvl_digester_add(&digester, fingerprint->bytes, sizeof fingerprint->bytes);
    kvl_digester_add(&digester, home->bytes, sizeof home->bytes);
    /* The number comes first, so that no list of ids is the beginning of another. */
    kvl_digester_add_u64(&digester, n_tokens);
    kvl_digester_add(&digester, tokens, n_tokens * sizeof *tokens);
    return kvl_digester_end(&digester);
}
