// Vectors of float32, of which compilers make what the processor has; with AVX512, its own instructions where they don't.
#pragma once

#include "numbers.h"

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define AVX512
#include <immintrin.h>
#endif

#ifdef AVX512
enum { LANES = 16 };
#else
enum { LANES = 8 };  // compilers make numbers of vectors that are wider than the processor's, one by one
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t whole __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));

#ifdef AVX512
static inline vec all(float value) { return (vec)_mm512_set1_ps(value); }
#else  // one instruction from memory; a sum with zeros is two more
static inline vec all(float value) { return (vec){value, value, value, value, value, value, value, value}; }
#endif

// From and to memory where `left` numbers are left: as many as there are lanes, or all these, with zeros for the others.
#ifdef AVX512
static inline __mmask16 first_of(int64_t left) { return left >= LANES ? 0xffff : (1u << left) - 1; }
static inline vec load(const float *from, int64_t left) { return (vec)_mm512_maskz_loadu_ps(first_of(left), from); }
static inline void store(float *to, vec value, int64_t left) { _mm512_mask_storeu_ps(to, first_of(left), (__m512)value); }
#else
static inline vec load(const float *from, int64_t left) {
    vec value = {0};
    if (left >= LANES)
        memcpy(&value, from, sizeof value);
    else
        memcpy(&value, from, left * sizeof(float));
    return value;
}
static inline void store(float *to, vec value, int64_t left) {
    if (left >= LANES)
        memcpy(to, &value, sizeof value);
    else
        memcpy(to, &value, left * sizeof(float));
}
#endif

// The larger one of each pair; b where one is not a number.
static inline vec larger(vec a, vec b) {
#ifdef AVX512
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    bits first = (bits)(a > b);
    return (vec)((first & (bits)a) | (~first & (bits)b));
#endif
}

// value x 2^n, and 0 where x, which the two were made of, is less than the least that is not: its tiny number, or what minus
// infinity makes of a series, would take processors a hundred times as long.
static inline vec times_two_to(vec value, vec n, vec x) {
#ifdef AVX512
    __mmask16 seen = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);  // also of NaN
    return (vec)_mm512_maskz_scalef_ps(seen, (__m512)value, (__m512)n);
#else
    bits seen = ~(bits)(x < -87.0f);
    n = -larger(all(-127.0f), -n);  // the largest number there is stands for all beyond
    return (vec)(seen & (bits)(value * (vec)((__builtin_convertvector(n, whole) + 127) << 23)));
#endif
}

// exp(x) to 2 units in the last place for x up to 88, 0 of -infinity and NaN of NaN: x = n log 2 + r with |r| <= log 2 / 2, exp(r)
// by its series to r^7.
static inline vec exp_each(vec x) {
    vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec series = r * (1.0f / 5040) + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    return times_two_to(series, n, x);
}

// What follows a linear layer, numbered as in packed_linear.py.
enum { NOTHING, GELU, SILU, TIMES };
static const float SLOPE = 1.59576912f, CUBE = 0.0713548163f;  // of GELU by tanh: 2 sqrt(2 / pi), and 0.044715 of it

// x sigmoid(SLOPE x + CUBE x^3), to float32's last digits.
static inline __attribute__((always_inline)) vec gelu(vec x) {
    vec minus = -larger(x * (x * x * CUBE + SLOPE), all(-80.0f));
    return x * (1.0f / (exp_each(minus) + 1.0f));
}
