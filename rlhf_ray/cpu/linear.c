// Linear layers in float32 without gradients, of weights that are kept in panels. Libraries put both factors into such an order in
// every call, which for the few rows of a decode step takes a good part of the product's time. Every sum is in the order of its
// terms, so that a row's result depends on that row alone, whatever stands beside it and however many threads work.

#include "decode.h"
#include "vectors.h"

enum { ROWS = 6, WIDTH = 2 * LANES };  // of a block of sums, which stay in registers
enum { INPUTS = 256, PIECE = 96 };     // of a panel that stays in the first cache; rows that stay in the second

typedef struct {
    float *result;  // [n, N]
    const float *bias, *other;
    int64_t N, after;
} ending;

// Panels of WIDTH outputs, [K, WIDTH] each, zeros behind the last; inputs and outputs of the weights stand `input` and `output`
// numbers apart.
void linear_panels(const float *weights, float *panels, int64_t K, int64_t N, int64_t input, int64_t output, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t column = 0; column < N; column += WIDTH)
        for (int64_t k = 0; k < K; k++)
            for (int64_t j = 0; j < WIDTH; j++)
                panels[column * K + k * WIDTH + j] = column + j < N ? weights[k * input + (column + j) * output] : 0;
}

static inline vec ended(vec sum, ending end, int64_t at, int64_t left) {
    switch (end.after) {
        case TIMES: return sum * load(end.other + at, left);
        case SILU: return sum / (exp_each(-larger(sum, all(-87.0f))) + 1.0f);
        case GELU: return gelu(sum);
        default: return sum;
    }
}

// `rows` lines of x by `count` lines of a panel, added to what their results hold unless these are the first ones of K.
static inline __attribute__((always_inline)) void block(const float *x, int64_t K, const float *panel, int64_t count, int first,
                                                        int last, ending end, int64_t at, int64_t left, int64_t column, int rows) {
    vec sums[ROWS][2];
    int64_t rest = left > LANES ? left - LANES : 0;
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
        if (first) {
            sums[i][0] = end.bias == NULL ? all(0) : load(end.bias + column, left);
            sums[i][1] = end.bias == NULL ? all(0) : load(end.bias + column + LANES, rest);
        } else {
            sums[i][0] = load(end.result + at + i * end.N, left);
            sums[i][1] = load(end.result + at + i * end.N + LANES, rest);
        }
    for (int64_t k = 0; k < count; k++) {
        vec one = load(panel + k * WIDTH, LANES), other = load(panel + k * WIDTH + LANES, LANES);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            vec each = all(x[i * K + k]);
            sums[i][0] += each * one;
            sums[i][1] += each * other;
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
        int64_t to = at + i * end.N;
        store(end.result + to, last ? ended(sums[i][0], end, to, left) : sums[i][0], left);
        store(end.result + to + LANES, last ? ended(sums[i][1], end, to + LANES, rest) : sums[i][1], rest);
    }
}

// result [n, N] = x [n, K] W + bias, if there is one, then what comes after: an activation, or times other [n, N].
void linear(const float *x, const float *panels, const float *bias, const float *other, float *result, int64_t n, int64_t K,
            int64_t N, int64_t after, int threads) {
    ending end = {.result = result, .bias = bias, .other = other, .N = N, .after = after};
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t piece = 0; piece < n; piece += PIECE)
        for (int64_t column = 0; column < N; column += WIDTH)
            for (int64_t k = 0; k < K; k += INPUTS) {
                int64_t count = K - k < INPUTS ? K - k : INPUTS, end_of_piece = piece + PIECE < n ? piece + PIECE : n, line = piece;
                const float *panel = panels + column * K + k * WIDTH;
#define BLOCK(rows) \
    block(x + line * K + k, K, panel, count, k == 0, k + count == K, end, line * N + column, N - column, column, rows)
                for (; line + ROWS <= end_of_piece; line += ROWS) BLOCK(ROWS);
                switch (end_of_piece - line) {
                    case 5: BLOCK(5); break;
                    case 4: BLOCK(4); break;
                    case 3: BLOCK(3); break;
                    case 2: BLOCK(2); break;
                    case 1: BLOCK(1); break;
                }
            }
}
