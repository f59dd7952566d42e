// Linear layers and their gradients, by blocks of products.
//
// Libraries' kernels put a factor into the matrix unit's order on every call and take tens of microseconds around it. Here a
// weight's order is kept between calls, pieces stay in the cache nearest to the unit, and what follows a product is done to each
// block where it was summed. Every sum is in the order of its terms, so that a row's result depends on that row alone, whatever
// stands beside it and however many threads work.

#include "blocks.h"
#include "decode.h"
#include "vectors.h"

#ifdef HAS_BLOCKS

enum { LINES = 256, COLUMNS = 256, PANEL = 512 };  // of a piece's sums; of the left factor that stays in the first cache
enum { TOKENS = 256, SUMS = 1 << 18 };             // of a weight's gradient, at once
enum { PACKED = 1 << 23 };                         // of a weight, for the gradient by a layer's input, at once

// Where sums go, and what happens to them on the way.
typedef struct {
    bf16 *result, *slope;  // [n, N]
    const bf16 *bias, *other;
    int64_t N, after;
    int past_the_cache;  // results are written where nobody will find them near: they are larger than it
} ending;

enum { NEAR = 1 << 22 };  // bytes

static int goes_past(const bf16 *result, const bf16 *slope, int64_t n, int64_t N) {
    return n * N * sizeof(bf16) > NEAR && N % SIDE == 0 && ((uintptr_t)result | (uintptr_t)slope) % 64 == 0;
}

static inline __attribute__((always_inline)) vec ended(vec sum, ending end, int64_t at, int64_t left, int after, vec *slope) {
    if (after == TIMES) sum *= load_bf16(end.other + at, left);
    if (after == SILU) sum *= inverse(exp_roughly(-sum) + 1.0f);
    if (after == GELU || after == GELU_AND_SLOPE) sum = sigmoid_gelu(sum, SLOPE, CUBE, slope, 0);
    return sum;
}

// Two vectors of a line. A whole line of the cache may go to memory without being read first.
static inline __attribute__((always_inline)) void store_two(bf16 *to, vec first, vec second, int64_t left, int past_the_cache) {
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    if (left < SIDE)
        _mm512_mask_storeu_epi16(to, (1u << left) - 1, both);
    else if (past_the_cache)
        _mm512_stream_si512((__m512i *)to, both);
    else
        _mm512_storeu_si512(to, both);
}

static inline __attribute__((always_inline)) void finish_lines(ending end, int64_t line, int64_t column, int64_t lines,
                                                               int64_t columns, const float *sums, int64_t step, int after,
                                                               int past_the_cache) {
    for (int64_t j = 0; j < columns; j += SIDE) {
        int64_t left = columns - j, rest = left > LANES ? left - LANES : 0;
        vec bias[2] = {{0}, {0}}, slopes[2];
        if (end.bias != NULL) {
            bias[0] = load_bf16(end.bias + column + j, left);
            bias[1] = load_bf16(end.bias + column + j + LANES, rest);
        }
        for (int64_t i = 0; i < lines; i++) {
            const float *sum = sums + i * step + j;
            int64_t at = (line + i) * end.N + column + j;
            vec first = ended(load(sum, LANES) + bias[0], end, at, left, after, slopes);
            vec second = ended(load(sum + LANES, LANES) + bias[1], end, at + LANES, rest, after, slopes + 1);
            store_two(end.result + at, first, second, left, past_the_cache);
            if (after == GELU_AND_SLOPE) store_two(end.slope + at, slopes[0], slopes[1], left, past_the_cache);
        }
    }
}

static void finish(ending end, int64_t line, int64_t column, int64_t lines, int64_t columns, const float *sums, int64_t step) {
    switch (end.after) {
#define CASE(after) \
    case after:                                                                                       \
        if (end.past_the_cache)                                                                       \
            finish_lines(end, line, column, lines, columns, sums, step, after, 1);                    \
        else                                                                                          \
            finish_lines(end, line, column, lines, columns, sums, step, after, 0);                    \
        break
        CASE(NOTHING);
        CASE(GELU);
        CASE(SILU);
        CASE(TIMES);
        CASE(GELU_AND_SLOPE);
    }
}

// [lines, count] of lines that stand `apart` -> [32, PANEL], zeros around.
static void copy_panel(const bf16 *from, int64_t apart, int64_t lines, int64_t count, bf16 *to) {
    int64_t whole = whole_sides(count);
    for (int64_t i = 0; i < SIDE; i++) {
        int64_t here = i < lines ? count : 0;
        memcpy(to + i * PANEL, from + i * apart, here * sizeof(bf16));
        memset(to + i * PANEL + here, 0, (whole - here) * sizeof(bf16));
    }
}

// Where a block's sums stand: all of a piece's if they wait for more of K, else two blocks' in turns.
static float *room_of(float *sums, int64_t line, int64_t column, int64_t K) {
    int64_t number = K > PANEL ? (line * COLUMNS / SIDE + column) / SIDE : column / SIDE % 2;
    return sums + number * SIDE * SIDE;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static float *room_for_sums(int64_t n, int64_t K) {
    return scratch(0, (K > PANEL ? whole_sides(least(n, LINES)) * COLUMNS : 2 * SIDE * SIDE) * sizeof(float));
}

// Lines `line` on and columns `column` on of left [n, K] x right, up to `lines` and `columns` of them. right: columns of K pairs
// from the first of these on. sums: room for [LINES, COLUMNS]; panel: [32, PANEL].
static void multiply(const bf16 *left, const uint32_t *right, int64_t line, int64_t column, int64_t lines, int64_t columns,
                     int64_t K, ending end, float *sums, bf16 *panel) {
    int64_t pairs = whole_sides(K) / 2 * TILE;
    for (int64_t k = 0; k < K; k += PANEL) {
        int64_t count = K - k < PANEL ? K - k : PANEL;
        for (int64_t i = 0; i < lines; i += SIDE) {
            int64_t here = lines - i < SIDE ? lines - i : SIDE, apart = K;
            const bf16 *part = left + (line + i) * K + k;
            if (here < SIDE || K % SIDE) {
                copy_panel(part, K, here, count, panel);
                part = panel;
                apart = PANEL;
            }
            int last = k + PANEL >= K;
            int64_t before = -1;  // the block whose sums wait to be finished, while the unit works on the next one's
            for (int64_t j = 0; j < columns; j += SIDE) {
                float *at = room_of(sums, i, j, K);
                block(part, apart, right + j / TILE * pairs + k / 2 * TILE, pairs, whole_sides(count), at, SIDE, k > 0);
                if (last && before >= 0) finish(end, line + i, column + before, here, SIDE, room_of(sums, i, before, K), SIDE);
                before = j;
            }
            if (last) finish(end, line + i, column + before, here, columns - before, room_of(sums, i, before, K), SIDE);
        }
    }
}

// Columns of a piece: as many for every thread.
static int64_t piece(int64_t N, int threads) {
    int64_t pieces = (N + threads * COLUMNS - 1) / (threads * COLUMNS) * threads;
    return whole_sides((N + pieces - 1) / pieces);
}

// [N / 16, K / 32] tiles of 16 pairs of inputs x 16 outputs, from weights whose inputs and outputs stand `input` and `output`
// numbers apart, one of them 1, in float32 or bfloat16; zeros up to a multiple of 32 outputs. K is one of 32.
void linear_tiles(const float *wide, const bf16 *narrow, uint32_t *tiles, int64_t K, int64_t N, int64_t input, int64_t output,
                  int threads) {
    int64_t column = K / 2 * TILE;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t n = 0; n < N; n += SIDE)
        for (int64_t k = 0; k < K; k += SIDE) {
            bf16 piece[SIDE * SIDE] __attribute__((aligned(64)));
            int64_t outputs = least(SIDE, N - n), lines = input == 1 ? outputs : SIDE, numbers = input == 1 ? SIDE : outputs;
            for (int64_t i = 0; i < SIDE; i++)
                for (int64_t j = 0; j < SIDE; j += LANES) {
                    int64_t from = k * input + n * output + i * (input == 1 ? output : input) + j;
                    vec value = {0};
                    if (i < lines && j < numbers)
                        value = wide == NULL ? load_bf16(narrow + from, numbers - j) : load(wide + from, numbers - j);
                    store_bf16(piece + i * SIDE + j, value, LANES);
                }
            uint32_t *to = tiles + n / TILE * column + k / 2 * TILE;
            if (input == 1) {
                exchange((uint32_t *)piece, TILE, to, TILE);
                exchange((uint32_t *)piece + TILE * TILE, TILE, to + column, TILE);
            } else
                pair_lines(piece, SIDE, SIDE, SIDE, to, column, TILE);
        }
}

// result [n, N] = x [n, K] weights + bias, and what comes after: an activation, also with its derivative, `slope`; or the product
// with `other`, all [n, N]. weights: tiles, see above; K is a multiple of 32.
void linear(const bf16 *x, const uint32_t *weights, const bf16 *bias, const bf16 *other, bf16 *result, bf16 *slope, int64_t n,
            int64_t K, int64_t N, int64_t after, int threads) {
    ending end = {.result = result, .slope = slope, .bias = bias, .other = other, .N = N, .after = after,
                  .past_the_cache = goes_past(result, slope, n, N)};
    int64_t wide = piece(N, threads);
#pragma omp parallel num_threads(threads)
    {
        float *sums = room_for_sums(n, K);
        bf16 *panel = scratch(1, SIDE * PANEL * sizeof(bf16));
        start_blocks();
#pragma omp for collapse(2) schedule(static)
        for (int64_t line = 0; line < n; line += LINES)
            for (int64_t column = 0; column < N; column += wide)
                multiply(x, weights + column * K / 2, line, column, least(LINES, n - line), least(wide, N - column), K, end, sums,
                         panel);
        _mm_sfence();  // what went past the cache is there for all threads
        end_blocks();
    }
}

// by_x [n, K] = gradient [n, N] weights^T, times `slope` [n, K], if there is one; weights as above.
void linear_by_input(const bf16 *gradient, const uint32_t *weights, const bf16 *slope, bf16 *by_x, int64_t n, int64_t K, int64_t N,
                     int threads) {
    ending end = {.result = by_x, .other = slope, .N = K, .after = slope == NULL ? NOTHING : TIMES,
                  .past_the_cache = goes_past(by_x, NULL, n, K)};
    int64_t whole = whole_sides(N), apart = whole / 2 * TILE, all = K;
    if (whole * K > PACKED) all = least(K, whole_sides(PACKED / whole));  // columns that are put in order at once
    int64_t wide = piece(all, threads);
    uint32_t *right = scratch(2, all * whole / 2 * sizeof(uint32_t));              // of inputs, pairs of outputs
#pragma omp parallel num_threads(threads)
    {
        float *sums = room_for_sums(n, N);
        bf16 *panel = scratch(1, SIDE * PANEL * sizeof(bf16));
        uint32_t lines[SIDE * TILE] __attribute__((aligned(64)));  // 32 outputs' pairs of inputs
        start_blocks();
        for (int64_t first = 0; first < K; first += all) {
            int64_t columns = least(all, K - first);
#pragma omp for collapse(2) schedule(static)
            for (int64_t input = 0; input < columns; input += SIDE)
                for (int64_t output = 0; output < whole; output += SIDE) {
                    for (int64_t i = 0; i < SIDE; i += TILE)
                        exchange(weights + (output + i) * K / 2 + (first + input) / 2 * TILE, TILE, lines + i * TILE, TILE);
                    pair_lines((bf16 *)lines, SIDE, SIDE, SIDE, right + input / TILE * apart + output / 2 * TILE, apart, TILE);
                }
#pragma omp for collapse(2) schedule(static)
            for (int64_t line = 0; line < n; line += LINES)
                for (int64_t column = 0; column < columns; column += wide)
                    multiply(gradient, right + column / TILE * apart, line, first + column, least(LINES, n - line),
                             least(wide, columns - column), N, end, sums, panel);
        }
        _mm_sfence();
        end_blocks();
    }
}

// Lines `line` on and columns `column` on, `lines` and `columns` of them, of what is said below.
static void add_products(const bf16 *left, const bf16 *right, float *sums, int64_t n, int64_t M, int64_t N, int64_t line,
                         int64_t column, int64_t lines, int64_t columns, int64_t more, uint32_t *tiles, uint32_t *paired,
                         int threads) {
    for (int64_t token = 0; token < n; token += TOKENS, more = 1) {
        int64_t tokens = least(n - token, TOKENS), whole = whole_sides(tokens), apart = whole / 2 * TILE;
#pragma omp parallel num_threads(threads)
        {
            uint32_t pairs[TILE * SIDE] __attribute__((aligned(64)));
            float part[SIDE * SIDE] __attribute__((aligned(64)));
            start_blocks();
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tokens; t += SIDE) {  // lines one after the other, as they stand in memory
                int64_t here = least(SIDE, tokens - t);
                pair_lines(right + (token + t) * N + column, N, here, columns, paired + t / 2 * TILE, apart, TILE);
                for (int64_t m = 0; m < lines; m += SIDE) {
                    uint32_t *to = tiles + m * whole / 2 + t / 2 * TILE;
                    pair_lines(left + (token + t) * M + line + m, M, here, least(SIDE, lines - m), pairs, TILE, SIDE);
                    exchange(pairs, SIDE, to, TILE);
                    exchange(pairs + TILE, SIDE, to + TILE * whole / 2, TILE);
                }
            }
#pragma omp for collapse(2) schedule(static)
            for (int64_t m = 0; m < lines; m += SIDE)
                for (int64_t c = 0; c < columns; c += SIDE) {
                    const bf16 *factor = (bf16 *)(tiles + m * whole / 2);
                    float *to = sums + (line + m) * N + column + c;
                    if (lines - m >= SIDE && columns - c >= SIDE) {
                        block_of_tiles(factor, paired + c * whole / 2, apart, whole, to, N, more);
                        continue;
                    }
                    block_of_tiles(factor, paired + c * whole / 2, apart, whole, part, SIDE, 0);
                    for (int64_t i = 0; i < least(SIDE, lines - m); i++)
                        for (int64_t j = 0; j < least(SIDE, columns - c); j += LANES) {
                            vec before = more ? load(to + i * N + j, columns - c - j) : (vec){0};
                            store(to + i * N + j, before + load(part + i * SIDE + j, LANES), columns - c - j);
                        }
                }
            end_blocks();
        }
    }
}

// sums [M, N] = left [n, M]^T right [n, N], plus what they held, if `more`. In pieces of sums that stay near a core.
void linear_by_weight(const bf16 *left, const bf16 *right, float *sums, int64_t n, int64_t M, int64_t N, int64_t more,
                      int threads) {
    int64_t lines = M, columns = N, most = least(whole_sides(n), TOKENS);
    if (M * N > SUMS) {
        if (M > N)
            lines = least(M, whole_sides(SUMS / N));
        else
            columns = least(N, whole_sides(SUMS / M));
    }
    uint32_t *paired = scratch(2, whole_sides(columns) * most / 2 * sizeof(uint32_t));  // of the right factor
    uint32_t *tiles = scratch(3, whole_sides(lines) * most / 2 * sizeof(uint32_t));     // of the left one
    for (int64_t line = 0; line < M; line += lines)
        for (int64_t column = 0; column < N; column += columns)
            add_products(left, right, sums, n, M, N, line, column, least(lines, M - line), least(columns, N - column), more, tiles,
                         paired, threads);
}
#endif
