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
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

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
static inline vec load_bf16(const bf16 *from, int64_t left) {
    return (vec)((bits)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_of(left), from)) << 16);
}
static inline void store_bf16(bf16 *to, vec value, int64_t left) {
#ifdef __AVX512BF16__
    __m256i result = (__m256i)_mm512_cvtneps_pbh((__m512)value);
#else
    bits wide = (bits)value;
    __m256i result = _mm512_cvtepi32_epi16((__m512i)((wide + 0x7fff + ((wide >> 16) & 1)) >> 16));
#endif
    _mm256_mask_storeu_epi16(to, first_of(left), result);
}
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
static inline vec load_bf16(const bf16 *from, int64_t left) {
    halves value = {0};
    if (left >= LANES)
        memcpy(&value, from, sizeof value);
    else
        memcpy(&value, from, left * sizeof(bf16));
    return (vec)(__builtin_convertvector(value, bits) << 16);
}
static inline void store_bf16(bf16 *to, vec value, int64_t left) {
    bits wide = (bits)value;
    halves result = __builtin_convertvector((wide + 0x7fff + ((wide >> 16) & 1)) >> 16, halves);
    if (left >= LANES)
        memcpy(to, &result, sizeof result);
    else
        memcpy(to, &result, left * sizeof(bf16));
}
#endif

// The first `left` numbers, and zeros.
static inline vec upto(vec value, int64_t left) {
    if (left >= LANES) return value;
#ifdef AVX512
    return (vec)_mm512_maskz_mov_ps(first_of(left), (__m512)value);
#else
    for (int64_t i = left; i < LANES; i++) value[i] = 0;
    return value;
#endif
}

// Zeros for the first `count` numbers, and the others.
static inline vec beyond(vec value, int64_t count) {
    if (count <= 0) return value;
#ifdef AVX512
    return (vec)_mm512_maskz_mov_ps(~first_of(count), (__m512)value);
#else
    for (int64_t i = 0; i < (count < LANES ? count : LANES); i++) value[i] = 0;
    return value;
#endif
}

// The larger one of each pair; b where one is not a number.
static inline vec larger(vec a, vec b) {
#ifdef AVX512
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    bits first = (bits)(a > b);
    return (vec)((first & (bits)a) | (~first & (bits)b));
#endif
}

static inline float sum_of(vec value) {
#ifdef AVX512
    return _mm512_reduce_add_ps((__m512)value);
#else
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) value[i] += value[i + half];
    return value[0];
#endif
}

static inline float largest_of(vec value) {
#ifdef AVX512
    return _mm512_reduce_max_ps((__m512)value);
#else
    float top = value[0];
    for (int i = 1; i < LANES; i++) top = value[i] > top ? value[i] : top;
    return top;
#endif
}

// 1 / x, to 14 bits at least: for what is rounded to 8.
static inline vec inverse(vec x) {
#ifdef AVX512
    return (vec)_mm512_rcp14_ps((__m512)x);
#else
    return 1 / x;
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

// For what is rounded to bfloat16: to one part in 2^18, by the polynomial of degree 4 whose largest relative error is the least.
static inline vec exp_roughly(vec x) {
    vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    vec r = x - n * 0.69314718f;
    vec series = r * 0.0414586071f + 0.167909078f;
    series = series * r + 0.500043587f;
    series = series * r + 0.999963405f;
    series = series * r + 0.999999261f;
    return times_two_to(series, n, x);
}

// What follows a linear layer, numbered as in engines/packed_linear.py.
enum { NOTHING, GELU, SILU, TIMES, GELU_AND_SLOPE };
static const float SLOPE = 1.59576912f, CUBE = 0.0713548163f;  // of GELU by tanh: 2 sqrt(2 / pi), and 0.044715 of it

// x sigmoid(slope x + cube x^3), and its derivative: to float32's last digits if exact, else for bfloat16; |x| up to 1e10. The
// derivative is a small difference of large numbers in places, so the inverse is brought to all digits, and 1 - share made of the
// exponential, which must be finite for that.
static inline __attribute__((always_inline)) vec sigmoid_gelu(vec x, float slope, float cube, vec *derivative, int exact) {
    vec square = x * x, minus = -larger(x * (square * cube + slope), all(-80.0f));
    vec power = exact ? exp_each(minus) : exp_roughly(minus), share;
    if (exact)
        share = 1.0f / (power + 1.0f);
    else {
        share = inverse(power + 1.0f);
        share *= 2.0f - (power + 1.0f) * share;  // Newton's step
    }
    vec result = x * share;
    *derivative = share + result * (power * share) * (square * (3 * cube) + slope);
    return result;
}
