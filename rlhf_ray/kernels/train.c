// What a training step does to tensors outside of its matrix products. Lines of V or C numbers, one after the other.

#include <stdlib.h>

#include "vectors.h"

// Of each line of logits: log softmax(logits / temperature) at its id, and, where wanted, the entropy and the softmax.
// shares may be the logits themselves.
void logprobs_forward(const bf16 *logits, const int64_t *ids, float *selected, float *entropies, bf16 *shares, int64_t lines,
                      int64_t V, float temperature, int threads) {
    float cold = 1 / temperature;
#pragma omp parallel num_threads(threads)
    {
        float *exps = malloc(V * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t line = 0; line < lines; line++) {
            const bf16 *from = logits + line * V;
            float chosen = from_bf16(from[ids[line]]) * cold, top = -INFINITY;
            int64_t i = 0, most = V / LANES * LANES;
            vec tops = all(-INFINITY), totals = {0}, means = {0};
            for (; i < most; i += LANES) tops = larger(tops, load_bf16(from + i, LANES));
            for (; i < V; i++) top = from_bf16(from[i]) > top ? from_bf16(from[i]) : top;
            top = fmaxf(top, largest_of(tops)) * cold;
            for (i = 0; i < V; i += LANES) {
                vec wide = load_bf16(from + i, V - i) * cold, each = upto(exp_each(wide - top), V - i);
                totals += each;
                if (entropies != NULL) means += each * larger(wide, all(-1e30f));  // of minus infinity, a share of 0
                store(exps + i, each, V - i);
            }
            float total = sum_of(totals), norm = top + logf(total), share = 1 / total;
            selected[line] = chosen - norm;
            if (entropies != NULL) entropies[line] = norm - sum_of(means) * share;
            if (shares != NULL)
                for (i = 0; i < V; i += LANES) store_bf16(shares + line * V + i, load(exps + i, V - i) * share, V - i);
        }
        free(exps);
    }
}

// shares become the gradient by the logits: amount x (1[id] - share) / temperature.
void logprobs_backward(bf16 *shares, const int64_t *ids, const float *amounts, int64_t lines, int64_t V, float temperature,
                       int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t line = 0; line < lines; line++) {
        bf16 *to = shares + line * V;
        float amount = amounts[line] / temperature, chosen = from_bf16(to[ids[line]]);
        for (int64_t i = 0; i < V; i += LANES) store_bf16(to + i, load_bf16(to + i, V - i) * -amount, V - i);
        to[ids[line]] = to_bf16(amount * (1 - chosen));
    }
}

// x sigmoid(u) with u = slope x + cube x^3, and where wanted its derivative.
void gelu_forward(const bf16 *x, bf16 *result, bf16 *derivative, int64_t count, float slope, float cube, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) {
        vec value = load_bf16(x + i, count - i), slopes, gelu = sigmoid_gelu(value, slope, cube, &slopes);
        store_bf16(result + i, gelu, count - i);
        if (derivative != NULL) store_bf16(derivative + i, slopes, count - i);
    }
}

// derivative becomes gradient x derivative.
void multiply(bf16 *derivative, const bf16 *gradient, int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES)
        store_bf16(derivative + i, load_bf16(derivative + i, count - i) * load_bf16(gradient + i, count - i), count - i);
}

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
    for (int64_t i = 0; i < count; i += LANES) store(total + i, load(total + i, count - i) + load_bf16(part + i, count - i), count - i);
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
