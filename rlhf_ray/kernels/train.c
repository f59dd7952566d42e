// What a training step does to tensors outside of its matrix products. Lines of V or C numbers, one after the other.

#include <stdlib.h>

#include "numbers.h"

// Of each line of logits: log softmax(logits / temperature) at its id, and, where wanted, the entropy and the softmax.
// shares may be the logits themselves.
void logprobs_forward(const bf16 *logits, const int64_t *ids, float *selected, float *entropies, bf16 *shares, int64_t lines,
                      int64_t V, float temperature, int threads) {
    float inverse = 1 / temperature;
#pragma omp parallel num_threads(threads)
    {
        float *wide = malloc(2 * V * sizeof(float)), *exps = wide + V;
#pragma omp for schedule(static)
        for (int64_t line = 0; line < lines; line++) {
            const bf16 *from = logits + line * V;
            float top = -INFINITY, total = 0, mean = 0;
#pragma omp simd reduction(max : top)
            for (int64_t i = 0; i < V; i++) {
                wide[i] = from_bf16(from[i]) * inverse;
                top = wide[i] > top ? wide[i] : top;
            }
#pragma omp simd reduction(+ : total)
            for (int64_t i = 0; i < V; i++) {
                exps[i] = exp_of(wide[i] - top);
                total += exps[i];
            }
            float norm = top + logf(total), share = 1 / total;
            selected[line] = wide[ids[line]] - norm;
            if (entropies != NULL) {
#pragma omp simd reduction(+ : mean)
                for (int64_t i = 0; i < V; i++) mean += exps[i] > 0 ? exps[i] * wide[i] : 0.0f;
                entropies[line] = norm - mean * share;
            }
            if (shares != NULL)
#pragma omp simd
                for (int64_t i = 0; i < V; i++) shares[line * V + i] = to_bf16(exps[i] * share);
        }
        free(wide);
    }
}

// shares become the gradient by the logits: amount x (1[id] - share) / temperature.
void logprobs_backward(bf16 *shares, const int64_t *ids, const float *amounts, int64_t lines, int64_t V, float temperature,
                       int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t line = 0; line < lines; line++) {
        bf16 *to = shares + line * V;
        float amount = amounts[line] / temperature, chosen = from_bf16(to[ids[line]]);
#pragma omp simd
        for (int64_t i = 0; i < V; i++) to[i] = to_bf16(-amount * from_bf16(to[i]));
        to[ids[line]] = to_bf16(amount * (1 - chosen));
    }
}

// x sigmoid(u) with u = slope x + cube x^3, and where wanted its derivative.
void gelu_forward(const bf16 *x, bf16 *result, bf16 *derivative, int64_t count, float slope, float cube, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        float value = from_bf16(x[i]), square = value * value;
        float share = 1 / (1 + exp_of(-value * fmaf(cube, square, slope)));
        result[i] = to_bf16(value * share);
        if (derivative != NULL) derivative[i] = to_bf16(share + value * share * (1 - share) * fmaf(3 * cube, square, slope));
    }
}

// derivative becomes gradient x derivative.
void multiply(bf16 *derivative, const bf16 *gradient, int64_t count, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++) derivative[i] = to_bf16(from_bf16(derivative[i]) * from_bf16(gradient[i]));
}

// Layer normalisation of float32 lines into bfloat16 ones, in front of a linear layer that computes in these. Where there is a
// change, it is added first: hidden = x + change; else hidden is not written.
void layer_norm_forward(const float *x, const bf16 *change, const float *weight, const float *bias, float *hidden, bf16 *result,
                        float *means, float *scales, int64_t lines, int64_t C, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t line = 0; line < lines; line++) {
        const float *from = x + line * C;
        float mean = 0, square = 0;
        if (change != NULL) {
#pragma omp simd
            for (int64_t i = 0; i < C; i++) hidden[line * C + i] = from[i] + from_bf16(change[line * C + i]);
            from = hidden + line * C;
        }
#pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < C; i++) mean += from[i];
        mean /= C;
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < C; i++) square += (from[i] - mean) * (from[i] - mean);
        float scale = 1 / sqrtf(square / C + eps);
#pragma omp simd
        for (int64_t i = 0; i < C; i++) result[line * C + i] = to_bf16((from[i] - mean) * scale * weight[i] + bias[i]);
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
        float *own = calloc(2 * C, sizeof(float));
        float *restrict own_weight = own, *restrict own_bias = own + C;
#pragma omp for schedule(static)
        for (int64_t line = 0; line < lines; line++) {
            const float *from = x + line * C;
            const bf16 *by = gradient + line * C;
            float *to = by_x + line * C;
            float mean = means[line], scale = scales[line], sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
            for (int64_t i = 0; i < C; i++) {
                float g = from_bf16(by[i]), unit = (from[i] - mean) * scale;
                own_weight[i] += g * unit;
                own_bias[i] += g;
                sum += g * weight[i];
                along += g * weight[i] * unit;
            }
            sum /= C;
            along /= C;
#pragma omp simd
            for (int64_t i = 0; i < C; i++)
                to[i] = scale * (from_bf16(by[i]) * weight[i] - sum - (from[i] - mean) * scale * along);
            if (by_hidden != NULL)
#pragma omp simd
                for (int64_t i = 0; i < C; i++) to[i] += by_hidden[line * C + i];
            if (by_change != NULL)
#pragma omp simd
                for (int64_t i = 0; i < C; i++) by_change[line * C + i] = to_bf16(to[i]);
        }
#pragma omp for ordered schedule(static, 1)
        for (int thread = 0; thread < threads; thread++)
#pragma omp ordered
            for (int64_t i = 0; i < C; i++) {
                by_weight[i] += own_weight[i];
                by_bias[i] += own_bias[i];
            }
        free(own);
    }
}

// A gradient in bfloat16 added to its sum in float32.
void accumulate(float *total, const bf16 *part, int64_t count, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++) total[i] += from_bf16(part[i]);
}

// Sums of each column, added to total: a bias's gradient.
void accumulate_lines(float *total, const bf16 *part, int64_t lines, int64_t C, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < C; first += 64) {
        int64_t end = first + 64 < C ? first + 64 : C;
        for (int64_t line = 0; line < lines; line++)
#pragma omp simd
            for (int64_t i = first; i < end; i++) total[i] += from_bf16(part[line * C + i]);
    }
}

// [lines, C] -> [C, lines]
void transpose(const bf16 *from, bf16 *to, int64_t lines, int64_t C, int threads) {
    enum { SIDE = 32 };
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t column = 0; column < C; column += SIDE)
        for (int64_t line = 0; line < lines; line += SIDE) {
            int64_t columns = C - column < SIDE ? C - column : SIDE, rows = lines - line < SIDE ? lines - line : SIDE;
            for (int64_t i = 0; i < columns; i++)
                for (int64_t j = 0; j < rows; j++) to[(column + i) * lines + line + j] = from[(line + j) * C + column + i];
        }
}
