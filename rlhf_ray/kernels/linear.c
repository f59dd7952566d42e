// Linear layers of few rows, by the matrix unit of x86 processors that have one (AMX).
//
// Libraries' kernels take tens of microseconds around each product: more than the product of a decode step of a small model does.
// A row's result depends on that row alone.

#include <stdlib.h>

#include "numbers.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { TILE = 16, DEPTH = 32, SIDE = 2 * TILE };  // a tile: 16 lines of 32 numbers, or 16 pairs of lines of 16
enum { NOTHING, GELU, SILU, TIMES };

int64_t has_tiles(void) {  // Linux gives the unit's registers to processes that ask
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

static void start_tiles(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t lines[16]; } config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) config.bytes[tile] = 64, config.lines[tile] = TILE;
    _tile_loadconfig(&config);
}

// 32 x 32 of the product: x [32, K] at a step of `apart` numbers, weights two columns of tiles.
static inline void block(const bf16 *x, int64_t apart, const uint32_t *weights, int64_t K, float *sums) {
    const uint32_t *other = weights + K / 2 * TILE;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < K; k += DEPTH) {
        _tile_loadd(6, weights + k / 2 * TILE, 64);
        _tile_loadd(4, x + k, apart * sizeof(bf16));
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, other + k / 2 * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, x + TILE * apart + k, apart * sizeof(bf16));
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, SIDE * sizeof(float));
    _tile_stored(1, sums + TILE, SIDE * sizeof(float));
    _tile_stored(2, sums + TILE * SIDE, SIDE * sizeof(float));
    _tile_stored(3, sums + TILE * SIDE + TILE, SIDE * sizeof(float));
}

// [N / 16, K / 32] tiles of 16 pairs of inputs x 16 outputs, from weights whose inputs and outputs stand `input` and `output`
// numbers apart; columns of zeros up to a multiple of 32.
void linear_tiles(const bf16 *weights, uint32_t *tiles, int64_t K, int64_t N, int64_t input, int64_t output, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t column = 0; column < (N + SIDE - 1) / SIDE * SIDE; column += TILE) {
        int64_t columns = N - column < 0 ? 0 : N - column < TILE ? N - column : TILE;
        uint32_t *to = tiles + column * K / 2;
        if (columns < TILE) memset(to, 0, K / 2 * TILE * sizeof(uint32_t));
        for (int64_t k = 0; k < K; k += 2) {
            const bf16 *from = weights + k * input + column * output;
            for (int64_t j = 0; j < columns; j++)
                to[k / 2 * TILE + j] = from[j * output] | (uint32_t)from[j * output + input] << 16;
        }
    }
}

// x times the sigmoid of slope x + cube x^3: GELU by tanh, or SiLU.
static inline float gated(float x, float slope, float cube) { return x / (1 + exp_of(-x * fmaf(cube * x, x, slope))); }

// result [n, N] = activation(x [n, K] weights + bias), or that product times `other` [n, N]. weights: [N / 16, K / 32] tiles, with
// columns of zeros up to a multiple of 32; K is one of 32.
void linear(const bf16 *x, const uint32_t *weights, const bf16 *bias, const bf16 *other, bf16 *result, int64_t n, int64_t K,
            int64_t N, int64_t activation, int threads) {
    int64_t whole = n / SIDE * SIDE;
    bf16 *rest = NULL;  // the last rows, with lines of zeros up to 32
    if (whole < n) {
        rest = calloc(SIDE * K, sizeof(bf16));
        memcpy(rest, x + whole * K, (n - whole) * K * sizeof(bf16));
    }
#pragma omp parallel num_threads(threads)
    {
        float sums[SIDE * SIDE] __attribute__((aligned(64)));
        start_tiles();
#pragma omp for schedule(static)
        for (int64_t column = 0; column < N; column += SIDE)
            for (int64_t row = 0; row < n; row += SIDE) {
                int64_t rows = n - row < SIDE ? n - row : SIDE, columns = N - column < SIDE ? N - column : SIDE;
                block(row < whole ? x + row * K : rest, K, weights + column * K / 2, K, sums);
                for (int64_t i = 0; i < rows; i++) {
                    float *line = sums + i * SIDE;
                    int64_t at = (row + i) * N + column;
                    if (bias != NULL)
#pragma omp simd
                        for (int64_t j = 0; j < columns; j++) line[j] += from_bf16(bias[column + j]);
                    if (activation == GELU)
#pragma omp simd
                        for (int64_t j = 0; j < SIDE; j++) line[j] = gated(line[j], 1.59576912f, 0.0713548163f);
                    if (activation == SILU)
#pragma omp simd
                        for (int64_t j = 0; j < SIDE; j++) line[j] = gated(line[j], 1, 0);
                    if (activation == TIMES)
#pragma omp simd
                        for (int64_t j = 0; j < columns; j++) line[j] *= from_bf16(other[at + j]);
#pragma omp simd
                    for (int64_t j = 0; j < columns; j++) result[at + j] = to_bf16(line[j]);
                }
            }
        _tile_release();
    }
    free(rest);
}

#else
int64_t has_tiles(void) { return 0; }
#endif
