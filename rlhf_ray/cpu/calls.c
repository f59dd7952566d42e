// Functions of a decode step, called one after the other as recording.py has recorded it: a step is dozens of calls, each so
// short that Python takes as long to ask for it.

#include "decode.h"

typedef struct {
    int64_t function, words[16];  // numbered as in recording.py; addresses, whole numbers, and float32 by their bits
} call;

enum { ADD_AND_NORMALISE, EMBED, TURN, DECODE_ATTENTION_FLOAT32, LINEAR };

static inline float float_of(int64_t word) {
    uint32_t bits = (uint32_t)word;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// n: rows, in place of those that were recorded, which are no fewer.
void make_calls(const call *calls, int64_t count, int64_t n, int threads) {
    for (const call *each = calls; each < calls + count; each++) {
        const int64_t *w = each->words;
#define AT(i) ((void *)(intptr_t)w[i])
        switch (each->function) {
            case ADD_AND_NORMALISE: add_and_normalise(AT(0), AT(1), AT(2), AT(3), AT(4), n, w[6], float_of(w[7]), threads); break;
            case EMBED: embed(AT(0), AT(1), AT(2), AT(3), AT(4), n, w[6], threads); break;
            case TURN: turn(AT(0), AT(1), AT(2), AT(3), n, w[5], w[6], threads); break;
            case DECODE_ATTENTION_FLOAT32:
                decode_attention_float32(AT(0), AT(1), AT(2), AT(3), AT(4), AT(5), AT(6), n, w[8], w[9], w[10], w[11], w[12], w[13],
                                         float_of(w[14]), threads);
                break;
            case LINEAR: linear(AT(0), AT(1), AT(2), AT(3), AT(4), n, w[6], w[7], w[8], threads); break;
        }
    }
}
