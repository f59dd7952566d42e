// What a decode step calls; each is documented where it is defined.
#pragma once

#include "numbers.h"

void add_and_normalise(float *hidden, const float *change, const float *weight, const float *bias, float *result, int64_t lines,
                       int64_t C, float eps, int threads);
void embed(const float *words, const float *places, const int64_t *tokens, const int64_t *positions, float *result, int64_t n,
           int64_t C, int threads);
void turn(float *states, const float *cos, const float *sin, const int64_t *positions, int64_t n, int64_t heads, int64_t D,
          int threads);
typedef uint32_t pair;  // of neighbouring bf16
void decode_attention_bfloat16(const pair *query, const pair *key, const pair *value, pair *keys, pair *values, const pair *centres,
                               const int64_t *positions, pair *mixed, int64_t n, int64_t H, int64_t group, int64_t W,
                               int64_t slots, int64_t query_step, int64_t key_step, float scaling, int threads);
void decode_attention_float32(const float *query, const float *key, const float *value, float *keys, float *values,
                              const int64_t *positions, float *mixed, int64_t n, int64_t H, int64_t group, int64_t D,
                              int64_t slots, int64_t query_step, int64_t key_step, float scaling, int threads);
void linear(const float *x, const float *panels, const float *bias, const float *other, float *result, int64_t n, int64_t K,
            int64_t N, int64_t after, int threads);
