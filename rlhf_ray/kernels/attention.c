// Causal attention's steps between its matrix products, for sequences that stand one after the other on a line of tokens.

#include "numbers.h"

// Rows of S slots for each of R sequences and H heads, [R, H, S, D], from tokens and heads that stand `token` and `head` numbers
// apart. Slots behind a sequence's end hold zeros.
void attention_rows(const bf16 *line, bf16 *rows, const int64_t *starts, const int64_t *lengths, int64_t R, int64_t H, int64_t S,
                    int64_t D, int64_t token, int64_t head, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t r = 0; r < R; r++)
        for (int64_t h = 0; h < H; h++) {
            bf16 *to = rows + (r * H + h) * S * D;
            for (int64_t s = 0; s < lengths[r]; s++)
                memcpy(to + s * D, line + (starts[r] + s) * token + h * head, D * sizeof(bf16));
            memset(to + lengths[r] * D, 0, (S - lengths[r]) * D * sizeof(bf16));
        }
}

// The inverse; what stood behind a sequence's end goes nowhere.
void attention_line(const bf16 *rows, bf16 *line, const int64_t *starts, const int64_t *lengths, int64_t R, int64_t H, int64_t S,
                    int64_t D, int64_t token, int64_t head, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t r = 0; r < R; r++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t s = 0; s < lengths[r]; s++)
                memcpy(line + (starts[r] + s) * token + h * head, rows + ((r * H + h) * S + s) * D, D * sizeof(bf16));
}

enum { STEP = 16 };  // numbers of a vector: what is left over beside whole ones is worked on one by one

// In place, of lines of S scores, number i of S the first i + 1: softmax(scaling x scores), and 0 beyond.
void causal_softmax(bf16 *scores, int64_t lines, int64_t S, float scaling, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float wide[S + STEP];  // S is at most PLAIN_LENGTH of engines/packed_attention.py
#pragma omp for schedule(static)
        for (int64_t line = 0; line < lines; line++) {
            bf16 *at = scores + line * S;
            int64_t seen = line % S + 1, whole = (seen + STEP - 1) / STEP * STEP, end = whole < S ? whole : S;
            float tops[STEP], totals[STEP] = {0}, top = -INFINITY, total = 0;
            for (int64_t j = 0; j < STEP; j++) tops[j] = -INFINITY;
#pragma omp simd
            for (int64_t i = 0; i < end; i++) wide[i] = scaling * from_bf16(at[i]);
            for (int64_t i = seen; i < whole; i++) wide[i] = -INFINITY;
            for (int64_t i = 0; i < whole; i += STEP)
#pragma omp simd
                for (int64_t j = 0; j < STEP; j++) tops[j] = wide[i + j] > tops[j] ? wide[i + j] : tops[j];
#pragma omp simd reduction(max : top)
            for (int64_t j = 0; j < STEP; j++) top = tops[j] > top ? tops[j] : top;
            for (int64_t i = 0; i < whole; i += STEP)
#pragma omp simd
                for (int64_t j = 0; j < STEP; j++) {
                    wide[i + j] = exp_of(wide[i + j] - top);
                    totals[j] += wide[i + j];
                }
#pragma omp simd reduction(+ : total)
            for (int64_t j = 0; j < STEP; j++) total += totals[j];
            float share = 1 / total;
#pragma omp simd
            for (int64_t i = 0; i < end; i++) at[i] = to_bf16(wide[i] * share);
            memset(at + end, 0, (S - end) * sizeof(bf16));
        }
    }
}

// The gradient by the weights becomes that by the scores, in place.
void causal_softmax_backward(bf16 *gradient, const bf16 *weights, int64_t lines, int64_t S, float scaling, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t line = 0; line < lines; line++) {
        bf16 *at = gradient + line * S;
        const bf16 *weight = weights + line * S;
        int64_t seen = line % S + 1, end = (seen + STEP - 1) / STEP * STEP;  // weights beyond are 0
        if (end > S) end = S;
        memset(at + seen, 0, (S - seen) * sizeof(bf16));  // of scores that nobody saw: maybe not numbers
        float mean = 0;
#pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < end; i++) mean += from_bf16(at[i]) * from_bf16(weight[i]);
#pragma omp simd
        for (int64_t i = 0; i < end; i++) at[i] = to_bf16(scaling * from_bf16(weight[i]) * (from_bf16(at[i]) - mean));
    }
}
