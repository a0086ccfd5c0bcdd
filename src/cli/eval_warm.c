/* cli/eval_warm.c: prompts that come before the evaluated ones, and leave donors and means of their
 * texts. What is evaluated is held out of them: no prompt of the warm-up has the texts of an
 * evaluated one, and the evaluated ones leave nothing. */
#include "base/alloc.h"
#include "cli/eval.h"

#include <string.h>

enum { DRAWS_MAX = 200 };

bool eval_warmth_is_wanted(const eval_warmth *warmth)
{
    return warmth->keeps_donors || warmth->learns_means;
}

void eval_warmth_set(const eval_warmth *warmth, bool is_evaluated, Kvloom__V1__RunTask *run)
{
    if (!eval_warmth_is_wanted(warmth)) return;
    run->collection = (char *)(uintptr_t) "evaluation";
    if (is_evaluated) {
        run->donors = KVLOOM__V1__DONORS__DONORS_READ;
        return;
    }
    run->donors =
        warmth->keeps_donors ? KVLOOM__V1__DONORS__DONORS_ON : KVLOOM__V1__DONORS__DONORS_OFF;
    if (warmth->learns_means) run->correct = (char *)(uintptr_t) "mean";
}

static bool add_text(eval_warm_up *warm, const char *text, uint32_t *number)
{
    for (*number = 0; *number < warm->n_texts; ++*number) {
        if (strcmp(warm->texts[*number], text) == 0) return true;
    }
    if (warm->n_texts == EVAL_WARM_TEXTS_MAX) return false;
    char *copy = kvl_strdup(text);
    if (copy == NULL) return false;
    warm->texts[warm->n_texts++] = copy;
    return true;
}

bool eval_warm_up_add(eval_warm_up *warm, const eval_prompt *prompt)
{
    if (warm->n_sources == EVAL_WARM_GROUP) return false;
    uint64_t *source = &warm->sources[warm->n_sources++];
    warm->n_slots = 0;
    for (uint32_t i = 0; i < prompt->n_pieces; i++) {
        const eval_piece *piece = &prompt->pieces[i];
        uint32_t number = 0;
        if (!piece->is_slot || piece->text == NULL) continue;
        if (!add_text(warm, piece->text, &number)) return false;
        *source |= UINT64_C(1) << number;
        warm->n_slots++;
    }
    return true;
}

/* The text of one slot of one prompt: the last prompt begins again with the first texts. */
static uint32_t text_at(const eval_warm_up *warm, uint32_t index, uint32_t slot)
{
    return warm->order[(index * warm->n_slots + slot) % warm->n_texts];
}

static bool is_held_out(const eval_warm_up *warm)
{
    for (uint32_t i = 0; i < warm->n_prompts; i++) {
        uint64_t texts = 0;
        for (uint32_t slot = 0; slot < warm->n_slots; slot++)
            texts |= UINT64_C(1) << text_at(warm, i, slot);
        for (uint32_t s = 0; s < warm->n_sources; s++) {
            if (texts == warm->sources[s]) return false;
        }
    }
    return true;
}

bool eval_warm_up_draw(eval_warm_up *warm, uint64_t seed)
{
    kvl_random random = {seed};
    if (warm->n_slots == 0 || warm->n_texts <= warm->n_slots) return false;
    warm->n_prompts = (warm->n_texts + warm->n_slots - 1) / warm->n_slots;
    for (uint32_t t = 0; t < warm->n_texts; t++) warm->order[t] = t;
    for (int draws = 0; draws < DRAWS_MAX; draws++) {
        for (uint32_t t = warm->n_texts; t > 1; t--) {
            const uint32_t other = (uint32_t)kvl_random_below(&random, t);
            const uint32_t moved = warm->order[t - 1];
            warm->order[t - 1] = warm->order[other];
            warm->order[other] = moved;
        }
        if (is_held_out(warm)) return true;
    }
    return false;
}

bool eval_warm_up_fill(const eval_warm_up *warm, uint32_t index, eval_prompt *prompt)
{
    uint32_t slot = 0;
    for (uint32_t i = 0; i < prompt->n_pieces; i++) {
        eval_piece *piece = &prompt->pieces[i];
        if (!piece->is_slot || piece->text == NULL) continue;
        kvl_free(piece->text);
        piece->text = kvl_strdup(warm->texts[text_at(warm, index, slot++)]);
        if (piece->text == NULL) return false;
    }
    return slot == warm->n_slots;
}

void eval_warm_up_deinit(eval_warm_up *warm)
{
    for (uint32_t t = 0; t < warm->n_texts; t++) kvl_free(warm->texts[t]);
    *warm = (eval_warm_up){.n_texts = 0};
}
