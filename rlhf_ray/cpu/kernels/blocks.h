// 32 x 32 blocks of matrix products in bfloat16, summed in float32: by the matrix unit of x86 processors that have one (AMX), else
// by the vector instruction that multiplies pairs (AVX512-BF16). HAS_BLOCKS says whether the compiler may use either.
//
// The right factor is kept in columns of 16: [N / 16, K / 2] lines of 16 pairs, each of two numbers that stand under one another.
// Both add up in the order of K; how they round may differ.
#pragma once

#include "numbers.h"

enum { TILE = 16, DEPTH = 32, SIDE = 2 * TILE };  // a tile: 16 lines of 32 numbers, or of 16 pairs

static inline int64_t whole_sides(int64_t count) { return (count + SIDE - 1) / SIDE * SIDE; }

#ifdef __AMX_BF16__
#define HAS_BLOCKS
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

static inline int may_use_blocks(void) {  // Linux gives the unit's registers to processes that ask
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

static inline void start_blocks(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t lines[16]; } config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) config.bytes[tile] = 64, config.lines[tile] = TILE;
    _tile_loadconfig(&config);
}

static inline void end_blocks(void) { _tile_release(); }

static inline void block_of(const bf16 *left, const bf16 *lower, int64_t apart, int64_t ahead, const uint32_t *right,
                            int64_t column, int64_t K, float *sums, int64_t step, int more) {
    if (more) {
        _tile_loadd(0, sums, step * sizeof(float));
        _tile_loadd(1, sums + TILE, step * sizeof(float));
        _tile_loadd(2, sums + TILE * step, step * sizeof(float));
        _tile_loadd(3, sums + TILE * step + TILE, step * sizeof(float));
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < K; k += DEPTH) {
        _tile_loadd(6, right + k / 2 * TILE, 64);
        _tile_loadd(4, left, apart * sizeof(bf16));
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + column + k / 2 * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower, apart * sizeof(bf16));
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        left += ahead;
        lower += ahead;
    }
    _tile_stored(0, sums, step * sizeof(float));
    _tile_stored(1, sums + TILE, step * sizeof(float));
    _tile_stored(2, sums + TILE * step, step * sizeof(float));
    _tile_stored(3, sums + TILE * step + TILE, step * sizeof(float));
}

#elif defined(__AVX512BF16__)
#define HAS_BLOCKS
#include <immintrin.h>

static inline int may_use_blocks(void) { return 1; }
static inline void start_blocks(void) {}
static inline void end_blocks(void) {}

static inline void block_of(const bf16 *left, const bf16 *lower, int64_t apart, int64_t ahead, const uint32_t *right,
                            int64_t column, int64_t K, float *sums, int64_t step, int more) {
    enum { AT_ONCE = 8 };  // lines: with two columns, 16 sums in registers
    for (int64_t line = 0; line < SIDE; line += AT_ONCE) {
        float *to = sums + line * step;
        const bf16 *lines = line < TILE ? left + line * apart : lower + (line - TILE) * apart;
        __m512 a[AT_ONCE], b[AT_ONCE];
#pragma GCC unroll 8
        for (int i = 0; i < AT_ONCE; i++) {
            a[i] = more ? _mm512_loadu_ps(to + i * step) : _mm512_setzero_ps();
            b[i] = more ? _mm512_loadu_ps(to + i * step + TILE) : _mm512_setzero_ps();
        }
        for (int64_t k = 0; k < K; k += 2) {
            __m512bh one = (__m512bh)_mm512_loadu_si512(right + k / 2 * TILE);
            __m512bh other = (__m512bh)_mm512_loadu_si512(right + column + k / 2 * TILE);
#pragma GCC unroll 8
            for (int i = 0; i < AT_ONCE; i++) {
                int32_t pair;
                memcpy(&pair, lines + i * apart + k / DEPTH * ahead + k % DEPTH, sizeof pair);
                __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                a[i] = _mm512_dpbf16_ps(a[i], both, one);
                b[i] = _mm512_dpbf16_ps(b[i], both, other);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < AT_ONCE; i++) {
            _mm512_storeu_ps(to + i * step, a[i]);
            _mm512_storeu_ps(to + i * step + TILE, b[i]);
        }
    }
}
#endif

#ifdef HAS_BLOCKS
#include <stdlib.h>

// Memory for a function's own use, a different one for each `which`: a thread keeps it, since new memory comes page by page. What
// a thread keeps is not freed when it ends; OpenMP's end where their number falls, which it does not in a role.
static inline void *scratch(int which, int64_t bytes) {
    static __thread struct { void *at; int64_t size; } kept[4];
    if (kept[which].size < bytes) {
        free(kept[which].at);
        kept[which].at = aligned_alloc(64, (bytes + 63) / 64 * 64);
        kept[which].size = bytes;
    }
    return kept[which].at;
}

// sums [32, 32] at a step of `step` = left [32, K] at a step of `apart` x two columns of pairs, `column` pairs apart; plus what
// sums held, if `more`. K is a multiple of 32.
static inline void block(const bf16 *left, int64_t apart, const uint32_t *right, int64_t column, int64_t K, float *sums,
                         int64_t step, int more) {
    block_of(left, left + TILE * apart, apart, DEPTH, right, column, K, sums, step, more);
}

// The same, of a left factor in tiles: [2, K / 32] of 16 lines of 32 numbers.
static inline void block_of_tiles(const bf16 *left, const uint32_t *right, int64_t column, int64_t K, float *sums, int64_t step,
                                  int more) {
    block_of(left, left + TILE * K, DEPTH, TILE * DEPTH, right, column, K, sums, step, more);
}

// 16 lines of 16 pairs, `apart` pairs apart -> 16 lines, `step` apart, with lines and columns exchanged.
static inline void exchange(const uint32_t *from, int64_t apart, uint32_t *to, int64_t step) {
    __m512i a[TILE], b[TILE];
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++) a[i] = _mm512_loadu_si512(from + i * apart);
#pragma GCC unroll 8
    for (int i = 0; i < TILE; i += 2) {  // of 32 bits
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < TILE; i += 4) {  // of 64: line j of 4 holds numbers j, j + 4, ... of lines i to i + 3
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {  // of 128
        b[j] = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88);
        b[j + 4] = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xdd);
        b[j + 8] = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x88);
        b[j + 12] = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        _mm512_storeu_si512(to + j * step, _mm512_shuffle_i32x4(b[j], b[j + 8], 0x88));
        _mm512_storeu_si512(to + (j + 8) * step, _mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd));
        _mm512_storeu_si512(to + (j + 4) * step, _mm512_shuffle_i32x4(b[j + 4], b[j + 12], 0x88));
        _mm512_storeu_si512(to + (j + 12) * step, _mm512_shuffle_i32x4(b[j + 4], b[j + 12], 0xdd));
    }
}

// [lines, columns] that stand `apart` -> pairs of numbers that stand under one another, in columns of 16 that stand `column` pairs
// apart, the lines of one at a step of `step`; zeros up to whole sides of 32.
static inline void pair_lines(const bf16 *from, int64_t apart, int64_t lines, int64_t columns, uint32_t *to, int64_t column,
                              int64_t step) {
    __m512i first, second;  // where numbers of a vector are found in two
    uint16_t places[2 * SIDE];
    for (int i = 0; i < SIDE; i++) places[2 * i] = i, places[2 * i + 1] = SIDE + i;
    memcpy(&first, places, sizeof first);
    memcpy(&second, places + SIDE, sizeof second);
    for (int64_t c = 0; c < columns; c += SIDE, to += 2 * column) {
        __mmask32 there = columns - c < SIDE ? (1u << (columns - c)) - 1 : ~0u;
        for (int64_t i = 0; i < whole_sides(lines); i += 2) {
            __m512i one = _mm512_maskz_loadu_epi16(i < lines ? there : 0, from + i * apart + c);
            __m512i next = _mm512_maskz_loadu_epi16(i + 1 < lines ? there : 0, from + (i + 1) * apart + c);
            _mm512_storeu_si512(to + i / 2 * step, _mm512_permutex2var_epi16(one, first, next));
            _mm512_storeu_si512(to + i / 2 * step + column, _mm512_permutex2var_epi16(one, second, next));
        }
    }
}
#endif
