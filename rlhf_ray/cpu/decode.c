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

// Adds change, if there is one, to hidden, and normalises the lines of C numbers: to mean 0 and variance 1, or without a bias (as
// RMS norms are) to a mean square of 1.
void add_and_normalise(float *hidden, const float *change, const float *weight, const float *bias, float *result, int64_t lines,
                       int64_t C, float eps, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *x = malloc(C * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t line = 0; line < lines; line++) {
            float *from = hidden + line * C, *to = result + line * C;
            float mean = 0, square = 0;
#pragma omp simd
            for (int64_t i = 0; i < C; i++) x[i] = from[i];
            if (change != NULL)
#pragma omp simd
                for (int64_t i = 0; i < C; i++) {
                    from[i] = x[i] + change[line * C + i];
                    x[i] = from[i];
                }
            if (bias != NULL) {
#pragma omp simd reduction(+ : mean)
                for (int64_t i = 0; i < C; i++) mean += x[i];
                mean /= C;
            }
#pragma omp simd reduction(+ : square)
            for (int64_t i = 0; i < C; i++) square += (x[i] - mean) * (x[i] - mean);
            float scale = 1 / sqrtf(square / C + eps);
            if (bias != NULL)
#pragma omp simd
                for (int64_t i = 0; i < C; i++) to[i] = (x[i] - mean) * scale * weight[i] + bias[i];
            else
#pragma omp simd
                for (int64_t i = 0; i < C; i++) to[i] = x[i] * scale * weight[i];
        }
        free(x);
    }
}

// The sum of a token's embedding and, if there are any, its place's, which is its position's.
void embed(const float *words, const float *places, const int64_t *tokens, const int64_t *positions, float *result, int64_t n,
           int64_t C, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t line = 0; line < n; line++) {
        const float *word = words + tokens[line] * C, *place = places + positions[line] * C;
        float *to = result + line * C;
        if (places == NULL)
            memcpy(to, word, C * sizeof(float));
        else
#pragma omp simd
            for (int64_t i = 0; i < C; i++) to[i] = word[i] + place[i];
    }
}

// Rotary positions, in place: channel i of each of a row's heads and channel i + D / 2 turn together, by the angles whose cosines
// and sines are in line `position` of those, [positions, D].
void turn(float *states, const float *cos, const float *sin, const int64_t *positions, int64_t n, int64_t heads, int64_t D,
          int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t line = 0; line < n; line++) {
        const float *c = cos + positions[line] * D, *s = sin + positions[line] * D;
        for (int64_t head = 0; head < heads; head++) {
            float *low = states + (line * heads + head) * D, *high = low + D / 2;
#pragma omp simd
            for (int64_t i = 0; i < D / 2; i++) {
                float a = low[i], b = high[i];
                low[i] = a * c[i] - b * s[i];
                high[i] = b * c[i + D / 2] + a * s[i + D / 2];
            }
        }
    }
}
