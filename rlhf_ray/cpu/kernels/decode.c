// What a decode step does outside of its matrix products: one token a row, n rows.

#include <math.h>
#include <stdlib.h>

#include "decode.h"

// In a pair the first bf16 is in the lower half (all machines that torch runs on are little-endian): a vector of these is two of
// float32 after a shift and a mask, where single bf16 need widening. C channels are W = C / 2 pairs.
static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline float first(pair both) { return as_float(both << 16); }
static inline float second(pair both) { return as_float(both & 0xffff0000u); }
static inline pair pair_of(float a, float b) { return to_bf16(a) | (uint32_t)to_bf16(b) << 16; }

// One row's query against `length` keys and values of W pairs, which lie one after the other. The order of every sum depends on
// the length alone. W is a constant where this is inlined. A cache is read faster than processors foresee: blocks are short, so
// values are asked for along with the keys, and the keys of the next head (`slots` further on, and nowhere after the last) along
// with the values.
static inline __attribute__((always_inline)) void attend(const pair *query, const pair *keys, const pair *values, pair *mixed,
                                                         int64_t length, int64_t slots, int64_t W, float scaling, float *buffer) {
    enum { BLOCK = 8 };  // slots whose values are added up in registers
    float *restrict even = buffer, *restrict odd = even + W, *restrict weights = odd + W, top = -INFINITY, total = 0;
    for (int64_t i = 0; i < W; i++) {
        even[i] = first(query[i]) * scaling;
        odd[i] = second(query[i]) * scaling;
    }
    for (int64_t slot = 0; slot < length; slot++) {
        const pair *key = keys + slot * W;
        float score = 0;
#pragma omp simd reduction(+ : score)
        for (int64_t i = 0; i < W; i++) score += even[i] * first(key[i]) + odd[i] * second(key[i]);
        weights[slot] = score;
        for (int64_t i = 0; i < W; i += 16) __builtin_prefetch(values + slot * W + i);
    }
#pragma omp simd reduction(max : top)
    for (int64_t slot = 0; slot < length; slot++) top = weights[slot] > top ? weights[slot] : top;
#pragma omp simd reduction(+ : total)
    for (int64_t slot = 0; slot < length; slot++) {
        weights[slot] = exp_of(weights[slot] - top);
        total += weights[slot];
    }
    for (int64_t i = 0; i < W; i++) even[i] = odd[i] = 0;
    int64_t slot = 0;
    for (; slot + BLOCK <= length; slot += BLOCK) {
        for (int64_t i = 0; i < BLOCK * W; i += 16) __builtin_prefetch(keys + (slots + slot) * W + i);
#pragma omp simd
        for (int64_t i = 0; i < W; i++) {
            float a = even[i], b = odd[i];
#pragma GCC unroll 8
            for (int64_t j = 0; j < BLOCK; j++) {
                pair value = values[(slot + j) * W + i];
                a += weights[slot + j] * first(value);
                b += weights[slot + j] * second(value);
            }
            even[i] = a;
            odd[i] = b;
        }
    }
    for (; slot < length; slot++)
#pragma omp simd
        for (int64_t i = 0; i < W; i++) {
            even[i] += weights[slot] * first(values[slot * W + i]);
            odd[i] += weights[slot] * second(values[slot * W + i]);
        }
    float share = 1 / total;
    for (int64_t i = 0; i < W; i++) mixed[i] = pair_of(even[i] * share, odd[i] * share);
}

// Writes each row's key, less the row's centre where there are centres, and its value into the row's slot, then mixes the values
// of slots 0 to that one. query: [n, H, group], mixed alike; key and value: [n, H]; their rows may lie apart, by `query_step` and
// `key_step` pairs. keys, values: [n or more, H, slots]; centres: [n or more, H]. All of W pairs.
void decode_attention_bfloat16(const pair *query, const pair *key, const pair *value, pair *keys, pair *values, const pair *centres,
                               const int64_t *positions, pair *mixed, int64_t n, int64_t H, int64_t group, int64_t W,
                               int64_t slots, int64_t query_step, int64_t key_step, float scaling, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *buffer = malloc((2 * W + slots) * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t head = 0; head < n * H; head++) {
            int64_t row = head / H, slot = positions[row];
            pair *own_keys = keys + head * slots * W, *own_values = values + head * slots * W;
            const pair *new_key = key + row * key_step + head % H * W, *new_value = value + row * key_step + head % H * W;
            for (int64_t i = 0; i < W; i++) {
                pair centre = centres == NULL ? 0 : centres[head * W + i];
                own_keys[slot * W + i] =
                    pair_of(first(new_key[i]) - first(centre), second(new_key[i]) - second(centre));
                own_values[slot * W + i] = new_value[i];
            }
            for (int64_t line = 0; line < group; line++) {
                const pair *own_query = query + row * query_step + (head % H * group + line) * W;
                pair *to = mixed + (head * group + line) * W;
                if (W == 32)
                    attend(own_query, own_keys, own_values, to, slot + 1, slots, 32, scaling, buffer);
                else if (W == 64)
                    attend(own_query, own_keys, own_values, to, slot + 1, slots, 64, scaling, buffer);
                else
                    attend(own_query, own_keys, own_values, to, slot + 1, slots, W, scaling, buffer);
            }
        }
        free(buffer);
    }
}

// As `attend`, of D float32 numbers.
static inline __attribute__((always_inline)) void attend_float32(const float *query, const float *keys, const float *values,
                                                                 float *mixed, int64_t length, int64_t slots, int64_t D,
                                                                 float scaling, float *weights) {
    enum { BLOCK = 8 };
    float top = -INFINITY, total = 0;
    for (int64_t slot = 0; slot < length; slot++) {
        const float *key = keys + slot * D;
        float score = 0;
#pragma omp simd reduction(+ : score)
        for (int64_t i = 0; i < D; i++) score += query[i] * key[i];
        weights[slot] = score * scaling;
        for (int64_t i = 0; i < D; i += 16) __builtin_prefetch(values + slot * D + i);
    }
#pragma omp simd reduction(max : top)
    for (int64_t slot = 0; slot < length; slot++) top = weights[slot] > top ? weights[slot] : top;
#pragma omp simd reduction(+ : total)
    for (int64_t slot = 0; slot < length; slot++) {
        weights[slot] = exp_of(weights[slot] - top);
        total += weights[slot];
    }
    for (int64_t i = 0; i < D; i++) mixed[i] = 0;
    int64_t slot = 0;
    for (; slot + BLOCK <= length; slot += BLOCK) {
        for (int64_t i = 0; i < BLOCK * D; i += 16) __builtin_prefetch(keys + (slots + slot) * D + i);
#pragma omp simd
        for (int64_t i = 0; i < D; i++) {
            float sum = mixed[i];
#pragma GCC unroll 8
            for (int64_t j = 0; j < BLOCK; j++) sum += weights[slot + j] * values[(slot + j) * D + i];
            mixed[i] = sum;
        }
    }
    for (; slot < length; slot++)
#pragma omp simd
        for (int64_t i = 0; i < D; i++) mixed[i] += weights[slot] * values[slot * D + i];
    float share = 1 / total;
    for (int64_t i = 0; i < D; i++) mixed[i] *= share;
}

// As `decode_attention_bfloat16`, of float32 numbers, D each, with steps in these; their keys have no centres.
void decode_attention_float32(const float *query, const float *key, const float *value, float *keys, float *values,
                              const int64_t *positions, float *mixed, int64_t n, int64_t H, int64_t group, int64_t D,
                              int64_t slots, int64_t query_step, int64_t key_step, float scaling, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *weights = malloc(slots * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t head = 0; head < n * H; head++) {
            int64_t row = head / H, slot = positions[row], from = row * key_step + head % H * D;
            float *own_keys = keys + head * slots * D, *own_values = values + head * slots * D;
            memcpy(own_keys + slot * D, key + from, D * sizeof(float));
            memcpy(own_values + slot * D, value + from, D * sizeof(float));
            for (int64_t line = 0; line < group; line++) {
                const float *own_query = query + row * query_step + (head % H * group + line) * D;
                float *to = mixed + (head * group + line) * D;
                if (D == 64)
                    attend_float32(own_query, own_keys, own_values, to, slot + 1, slots, 64, scaling, weights);
                else if (D == 128)
                    attend_float32(own_query, own_keys, own_values, to, slot + 1, slots, 128, scaling, weights);
                else
                    attend_float32(own_query, own_keys, own_values, to, slot + 1, slots, D, scaling, weights);
            }
        }
        free(weights);
    }
}

enum { PIECE = 128 };  // of the vocabulary

// `count` of a line's logits from `start` on, as float32: the line itself, or a copy in buffer.
static inline const float *piece_of(const void *line, int64_t narrow, int64_t start, int64_t count, float *restrict buffer) {
    if (!narrow) return (const float *)line + start;
    const bf16 *from = (const bf16 *)line + start;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) buffer[i] = from_bf16(from[i]);
    return buffer;
}

// A token of each line, from softmax(logits / temperature), with its log-prob: the first one whose cumulative share exceeds the
// line's uniform number in [0, 1). narrow: logits are bf16, else float32.
void draw_from_all(const void *logits, int64_t narrow, const float *uniforms, int64_t *tokens, float *logprobs, int64_t lines,
                   int64_t V, float temperature, int threads) {
    float inverse = 1 / temperature;
    int64_t pieces = (V + PIECE - 1) / PIECE;
#pragma omp parallel num_threads(threads)
    {
        double *ends = malloc(pieces * sizeof(double));  // cumulative
        float buffer[PIECE];
#pragma omp for schedule(static)
        for (int64_t line = 0; line < lines; line++) {
            const void *from = (const char *)logits + line * V * (narrow ? sizeof(bf16) : sizeof(float));
            float top = -INFINITY;
            for (int64_t start = 0; start < V; start += PIECE) {
                int64_t count = V - start < PIECE ? V - start : PIECE;
                const float *x = piece_of(from, narrow, start, count, buffer);
#pragma omp simd reduction(max : top)
                for (int64_t i = 0; i < count; i++) top = x[i] > top ? x[i] : top;
            }
            double total = 0;
            for (int64_t piece = 0; piece < pieces; piece++) {
                int64_t start = piece * PIECE, count = V - start < PIECE ? V - start : PIECE;
                const float *x = piece_of(from, narrow, start, count, buffer);
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < count; i++) sum += exp_of((x[i] - top) * inverse);
                ends[piece] = total += sum;
            }
            // In another order the piece's sum may be less than the target: then its last token that has a share stands in.
            // Nothing exceeds a target of NaN; the log-prob tells.
            double target = uniforms[line] * total;
            int64_t piece = 0, token = 0;
            while (piece < pieces - 1 && !(ends[piece] > target)) piece++;
            double before = piece ? ends[piece - 1] : 0;
            int64_t start = piece * PIECE, count = V - start < PIECE ? V - start : PIECE;
            const float *x = piece_of(from, narrow, start, count, buffer);
            for (int64_t i = 0; i < count; i++) {
                float share = exp_of((x[i] - top) * inverse);
                if (share > 0) {
                    token = i;
                    before += share;
                    if (before > target) break;
                }
            }
            tokens[line] = start + token;
            logprobs[line] = (float)((x[token] - top) * inverse - log(total));
        }
        free(ends);
    }
}
