// What a decode step calls; each is documented where it is defined.
#pragma once

#include "numbers.h"

#define OF_EACH_DTYPE(number, name)                                                                                                 \
    void add_and_normalise_##name(number *hidden, const number *change, const number *weight, const number *bias, number *result,   \
                                  int64_t lines, int64_t C, float eps, int threads);                                                \
    void embed_##name(const number *words, const number *places, const int64_t *tokens, const int64_t *positions, number *result,   \
                      int64_t n, int64_t C, int threads);                                                                           \
    void turn_##name(number *states, const number *cos, const number *sin, const int64_t *positions, int64_t n, int64_t heads,      \
                     int64_t D, int threads);
OF_EACH_DTYPE(bf16, bfloat16)
OF_EACH_DTYPE(float, float32)

typedef uint32_t pair;  // of neighbouring bf16
void decode_attention_bfloat16(const pair *query, const pair *key, const pair *value, pair *keys, pair *values, const pair *centres,
                               const int64_t *positions, pair *mixed, int64_t n, int64_t H, int64_t group, int64_t W,
                               int64_t slots, int64_t query_step, int64_t key_step, float scaling, int threads);
void decode_attention_float32(const float *query, const float *key, const float *value, float *keys, float *values,
                              const int64_t *positions, float *mixed, int64_t n, int64_t H, int64_t group, int64_t D,
                              int64_t slots, int64_t query_step, int64_t key_step, float scaling, int threads);
void linear(const bf16 *x, const uint32_t *weights, const bf16 *bias, const bf16 *other, bf16 *result, bf16 *slope, int64_t n,
            int64_t K, int64_t N, int64_t after, int threads);
void linear_float32(const float *x, const float *panels, const float *bias, const float *other, float *result, int64_t n, int64_t K,
                    int64_t N, int64_t after, int threads);
