// What a training step does to tensors outside of its matrix products. Lines of V or C numbers, one after the other.

#include <stdlib.h>

#include "vectors.h"

// Layer normalisation of float32 lines into bfloat16 ones, in front of a linear layer that computes in these. Where there is a
// change, it is added first: hidden = x + change; else hidden is not written.
void layer_norm_forward(const float *x, const bf16 *change, const float *weight, const float *bias, float *hidden, bf16 *result,
                        float *means, float *scales, int64_t lines, int64_t C, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t line = 0; line < lines; line++) {
        const float *from = x + line * C;
        vec sums = {0}, squares = {0};
        if (change != NULL) {
            float *to = hidden + line * C;
            for (int64_t i = 0; i < C; i += LANES) {
                vec each = load(from + i, C - i) + load_bf16(change + line * C + i, C - i);
                store(to + i, each, C - i);
                sums += each;
            }
            from = to;
        } else
            for (int64_t i = 0; i < C; i += LANES) sums += load(from + i, C - i);
        float mean = sum_of(sums) / C;
        for (int64_t i = 0; i < C; i += LANES) {
            vec apart = upto(load(from + i, C - i) - mean, C - i);
            squares += apart * apart;
        }
        float scale = 1 / sqrtf(sum_of(squares) / C + eps);
        for (int64_t i = 0; i < C; i += LANES) {
            vec unit = (load(from + i, C - i) - mean) * scale;
            store_bf16(result + line * C + i, unit * load(weight + i, C - i) + load(bias + i, C - i), C - i);
        }
        means[line] = mean;
        scales[line] = scale;
    }
}

// by_x is set, to the gradient by what was normalised plus by_hidden, if there is one, and by_change, if there is one, to the
// same; by_weight and by_bias are added to, thread after thread, so that the sum's order is that of the lines.
void layer_norm_backward(const bf16 *gradient, const float *by_hidden, const float *x, const float *weight, const float *means,
                         const float *scales, float *by_x, bf16 *by_change, float *by_weight, float *by_bias, int64_t lines,
                         int64_t C, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *own_weight = calloc(2 * C, sizeof(float)), *own_bias = own_weight + C;
#pragma omp for schedule(static)
        for (int64_t line = 0; line < lines; line++) {
            const float *from = x + line * C;
            const bf16 *by = gradient + line * C;
            float mean = means[line], scale = scales[line];
            vec sums = {0}, alongs = {0};
            for (int64_t i = 0; i < C; i += LANES) {
                vec g = load_bf16(by + i, C - i), unit = (load(from + i, C - i) - mean) * scale;
                store(own_weight + i, load(own_weight + i, C - i) + g * unit, C - i);
                store(own_bias + i, load(own_bias + i, C - i) + g, C - i);
                g *= load(weight + i, C - i);
                sums += g;
                alongs += g * unit;
            }
            float sum = sum_of(sums) / C, along = sum_of(alongs) / C;
            for (int64_t i = 0; i < C; i += LANES) {
                vec g = load_bf16(by + i, C - i) * load(weight + i, C - i), unit = (load(from + i, C - i) - mean) * scale;
                vec to = scale * (g - sum - unit * along);
                if (by_hidden != NULL) to += load(by_hidden + line * C + i, C - i);
                store(by_x + line * C + i, to, C - i);
                if (by_change != NULL) store_bf16(by_change + line * C + i, to, C - i);
            }
        }
#pragma omp for ordered schedule(static, 1)
        for (int thread = 0; thread < threads; thread++)
#pragma omp ordered
            for (int64_t i = 0; i < C; i++) {
                by_weight[i] += own_weight[i];
                by_bias[i] += own_bias[i];
            }
        free(own_weight);
    }
}

// A gradient in bfloat16 added to its sum in float32.
void accumulate(float *total, const bf16 *part, int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES)
        store(total + i, load(total + i, count - i) + load_bf16(part + i, count - i), count - i);
}

// Sums of each column, added to total: a bias's gradient. The first one: of `vectors` vectors, in registers.
static inline __attribute__((always_inline)) void add_columns(float *total, const bf16 *part, int64_t lines, int64_t C, int vectors,
                                                              int64_t left) {
    vec sums[8];
    for (int j = 0; j < vectors; j++) sums[j] = load(total + j * LANES, left - j * LANES);
    for (int64_t line = 0; line < lines; line++)
        for (int j = 0; j < vectors; j++) sums[j] += load_bf16(part + line * C + j * LANES, left - j * LANES);
    for (int j = 0; j < vectors; j++) store(total + j * LANES, sums[j], left - j * LANES);
}

void accumulate_lines(float *total, const bf16 *part, int64_t lines, int64_t C, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < C; first += 8 * LANES) {
        int64_t i = first, end = first + 8 * LANES < C ? first + 8 * LANES : C;
        if (end - i == 8 * LANES) {
            add_columns(total + i, part + i, lines, C, 8, end - i);
            continue;
        }
        for (; i < end; i += LANES) add_columns(total + i, part + i, lines, C, 1, end - i);
    }
}
