// The AVX512 and AMX instructions that rlhf_ray/kernels uses, in plain C, so that processors without them can run its tests: found
// in place of the compiler's own header by -I, with -D__AVX512BF16__ and its like. What each does: Intel's intrinsics guide.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define syscall(...) 0  // the system's leave to use the matrix unit

typedef float __m512 __attribute__((vector_size(64)));
typedef int64_t __m512i __attribute__((vector_size(64)));
typedef int64_t __m256i __attribute__((vector_size(32)));
typedef uint16_t __m512bh __attribute__((vector_size(64)));
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;

typedef struct { float at[16]; } floats;
typedef struct { uint32_t at[16]; } words;
typedef struct { uint64_t at[8]; } doubles;
typedef struct { uint16_t at[32]; } shorts;
typedef struct { uint16_t at[16]; } halves_of_32_bytes;

#define AS(type, value) ({ __typeof__(value) of_ = (value); type as_; memcpy(&as_, &of_, sizeof as_); as_; })

static inline float widened(uint16_t bits) { return AS(float, (uint32_t)bits << 16); }

static inline uint16_t narrowed(float value) {  // to the nearest, ties to even; a NaN quiet, numbers below the normal ones 0
    uint32_t bits = AS(uint32_t, value);
    if (value != value) return bits >> 16 | 0x40;
    if ((bits & 0x7f800000) == 0) return bits >> 16 & 0x8000;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline __m512 _mm512_setzero_ps(void) { return (__m512){0}; }
static inline __m512 _mm512_set1_ps(float value) { return (__m512){0} + value; }
static inline __m512i _mm512_set1_epi32(int32_t value) {
    words all;
    for (int i = 0; i < 16; i++) all.at[i] = value;
    return AS(__m512i, all);
}

static inline __m512 _mm512_loadu_ps(const void *from) { return *(const __m512 *)memcpy(&(__m512){0}, from, 64); }
static inline __m512i _mm512_loadu_si512(const void *from) { return *(const __m512i *)memcpy(&(__m512i){0}, from, 64); }
static inline void _mm512_storeu_ps(void *to, __m512 value) { memcpy(to, &value, 64); }
static inline void _mm512_storeu_si512(void *to, __m512i value) { memcpy(to, &value, 64); }
static inline void _mm_sfence(void) {}
static inline void _mm512_stream_si512(void *to, __m512i value) {
    if ((uintptr_t)to % 64) __builtin_trap();
    memcpy(to, &value, 64);
}

static inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void *from) {
    floats result = {{0}};
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) result.at[i] = ((const float *)from)[i];
    return AS(__m512, result);
}
static inline void _mm512_mask_storeu_ps(void *to, __mmask16 mask, __m512 value) {
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) ((float *)to)[i] = value[i];
}
static inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void *from) {
    halves_of_32_bytes result = {{0}};
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) result.at[i] = ((const uint16_t *)from)[i];
    return AS(__m256i, result);
}
static inline void _mm256_mask_storeu_epi16(void *to, __mmask16 mask, __m256i value) {
    halves_of_32_bytes from = AS(halves_of_32_bytes, value);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) ((uint16_t *)to)[i] = from.at[i];
}
static inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void *from) {
    shorts result = {{0}};
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) result.at[i] = ((const uint16_t *)from)[i];
    return AS(__m512i, result);
}
static inline void _mm512_mask_storeu_epi16(void *to, __mmask32 mask, __m512i value) {
    shorts from = AS(shorts, value);
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) ((uint16_t *)to)[i] = from.at[i];
}

static inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 value) {
    for (int i = 0; i < 16; i++)
        if (!(mask >> i & 1)) value[i] = 0;
    return value;
}
static inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
    for (int i = 0; i < 16; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
}
static inline float _mm512_reduce_add_ps(__m512 value) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) value[i] += value[i + half];
    return value[0];
}
static inline float _mm512_reduce_max_ps(__m512 value) {
    float top = value[0];
    for (int i = 1; i < 16; i++) top = top > value[i] ? top : value[i];
    return top;
}
static inline __m512 _mm512_rcp14_ps(__m512 value) {  // off by as much as it may be
    for (int i = 0; i < 16; i++) value[i] = (1 + (i % 2 ? 1 : -1) * 0x1p-14f) / value[i];
    return value;
}
enum { _CMP_NLT_UQ = 5 };
static inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int kind) {
    __mmask16 mask = 0;
    if (kind != _CMP_NLT_UQ) __builtin_trap();
    for (int i = 0; i < 16; i++) mask |= !(a[i] < b[i]) << i;
    return mask;
}
static inline __m512 _mm512_maskz_scalef_ps(__mmask16 mask, __m512 value, __m512 power) {
    for (int i = 0; i < 16; i++) value[i] = mask >> i & 1 ? value[i] * exp2f(floorf(power[i])) : 0;
    return value;
}

static inline __m512i _mm512_cvtepu16_epi32(__m256i from) {
    halves_of_32_bytes narrow = AS(halves_of_32_bytes, from);
    words result;
    for (int i = 0; i < 16; i++) result.at[i] = narrow.at[i];
    return AS(__m512i, result);
}
static inline __m256i _mm512_cvtepi32_epi16(__m512i from) {
    words wide = AS(words, from);
    halves_of_32_bytes result;
    for (int i = 0; i < 16; i++) result.at[i] = wide.at[i];
    return AS(__m256i, result);
}
static inline __m256i _mm512_cvtneps_pbh(__m512 from) {
    halves_of_32_bytes result;
    for (int i = 0; i < 16; i++) result.at[i] = narrowed(from[i]);
    return AS(__m256i, result);
}
static inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    __m512bh result;
    for (int i = 0; i < 16; i++) result[i] = narrowed(low[i]), result[i + 16] = narrowed(high[i]);
    return result;
}
static inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    for (int i = 0; i < 16; i++) {
        sum[i] += widened(a[2 * i + 1]) * widened(b[2 * i + 1]);
        sum[i] += widened(a[2 * i]) * widened(b[2 * i]);
    }
    return sum;
}

static inline __m512i unpacked_32(__m512i a, __m512i b, int high) {
    words one = AS(words, a), other = AS(words, b), result;
    for (int i = 0; i < 16; i++) result.at[i] = (i % 2 ? other : one).at[i / 4 * 4 + high * 2 + i % 4 / 2];
    return AS(__m512i, result);
}
static inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return unpacked_32(a, b, 0); }
static inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return unpacked_32(a, b, 1); }
static inline __m512i unpacked_64(__m512i a, __m512i b, int high) {
    doubles one = AS(doubles, a), other = AS(doubles, b), result;
    for (int i = 0; i < 8; i++) result.at[i] = (i % 2 ? other : one).at[i / 2 * 2 + high];
    return AS(__m512i, result);
}
static inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return unpacked_64(a, b, 0); }
static inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return unpacked_64(a, b, 1); }
static inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int control) {
    doubles one = AS(doubles, a), other = AS(doubles, b), result;
    for (int part = 0; part < 4; part++)
        for (int i = 0; i < 2; i++)
            result.at[2 * part + i] = (part < 2 ? one : other).at[2 * (control >> 2 * part & 3) + i];
    return AS(__m512i, result);
}
static inline __m512i _mm512_permutex2var_epi16(__m512i a, __m512i places, __m512i b) {
    shorts one = AS(shorts, a), other = AS(shorts, b), where = AS(shorts, places), result;
    for (int i = 0; i < 32; i++) result.at[i] = (where.at[i] & 32 ? other : one).at[where.at[i] & 31];
    return AS(__m512i, result);
}

// Eight tiles of 16 lines of 64 bytes, the only form that is configured.
static __thread struct { uint8_t lines[8][16][64]; int configured; } tiles_;

static inline uint8_t (*tile_(int number))[64] {
    if (!tiles_.configured) __builtin_trap();
    return tiles_.lines[number];
}
static inline void _tile_loadconfig(const void *config) {
    const uint8_t *bytes = config;
    if (bytes[0] != 1) __builtin_trap();
    for (int i = 0; i < 8; i++)
        if (bytes[16 + 2 * i] != 64 || bytes[17 + 2 * i] != 0 || bytes[48 + i] != 16) __builtin_trap();
    memset(&tiles_, 0, sizeof tiles_);
    tiles_.configured = 1;
}
static inline void _tile_release(void) { tiles_.configured = 0; }
static inline void _tile_zero(int number) { memset(tile_(number), 0, 1024); }
static inline void _tile_loadd(int number, const void *from, int64_t apart) {
    for (int i = 0; i < 16; i++) memcpy(tile_(number)[i], (const char *)from + i * apart, 64);
}
static inline void _tile_stored(int number, void *to, int64_t apart) {
    for (int i = 0; i < 16; i++) memcpy((char *)to + i * apart, tile_(number)[i], 64);
}
static inline void _tile_dpbf16ps(int sums, int left, int right) {
    float(*sum)[16] = (float(*)[16])tile_(sums);
    const uint16_t(*a)[32] = (const uint16_t(*)[32])tile_(left), (*b)[32] = (const uint16_t(*)[32])tile_(right);
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 16; j++) {
                sum[i][j] += widened(a[i][2 * k]) * widened(b[k][2 * j]);
                sum[i][j] += widened(a[i][2 * k + 1]) * widened(b[k][2 * j + 1]);
            }
}
