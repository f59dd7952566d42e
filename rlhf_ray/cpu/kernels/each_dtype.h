// The functions that each dtype has, which each_dtype.c compiles them for: `number` is it, NAME(function) the function of it, and
// narrow(value) a float32 of it.

// Of each line of logits: log softmax(logits / temperature) at its id, the log of the sum of exponentials, and, where wanted, the
// entropy and the softmax. shares may be the logits themselves.
void NAME(logprobs_forward)(const number *logits, const int64_t *ids, float *selected, float *norms, float *entropies,
                            number *shares, int64_t lines, int64_t V, float temperature, int threads) {
    float cold = 1 / temperature;
#pragma omp parallel num_threads(threads)
    {
        float *exps = malloc(V * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t line = 0; line < lines; line++) {
            const number *from = logits + line * V;
            float chosen = widen(from[ids[line]]) * cold, top = -INFINITY;
            int64_t i = 0, most = V / LANES * LANES;
            vec tops = all(-INFINITY), totals = {0}, means = {0};
            for (; i < most; i += LANES) tops = larger(tops, get(from + i, LANES));
            for (; i < V; i++) top = widen(from[i]) > top ? widen(from[i]) : top;
            top = fmaxf(top, largest_of(tops)) * cold;
            for (i = 0; i < V; i += LANES) {
                vec wide = get(from + i, V - i) * cold, each = upto(exp_each(wide - top), V - i);
                totals += each;
                if (entropies != NULL) means += each * larger(wide, all(-1e30f));  // of minus infinity, a share of 0
                store(exps + i, each, V - i);
            }
            float total = sum_of(totals), norm = top + logf(total), share = 1 / total;
            selected[line] = chosen - norm;
            norms[line] = norm;
            if (entropies != NULL) entropies[line] = norm - sum_of(means) * share;
            if (shares != NULL)
                for (i = 0; i < V; i += LANES) put(shares + line * V + i, load(exps + i, V - i) * share, V - i);
        }
        free(exps);
    }
}

// shares become the gradient by the logits: amount x (1[id] - share) / temperature.
void NAME(logprobs_backward)(number *shares, const int64_t *ids, const float *amounts, int64_t lines, int64_t V,
                             float temperature, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t line = 0; line < lines; line++) {
        number *to = shares + line * V;
        float amount = amounts[line] / temperature, chosen = widen(to[ids[line]]);
        for (int64_t i = 0; i < V; i += LANES) put(to + i, get(to + i, V - i) * -amount, V - i);
        to[ids[line]] = narrow(amount * (1 - chosen));
    }
}

// x sigmoid(u) with u = slope x + cube x^3, and where wanted its derivative.
void NAME(gelu_forward)(const number *x, number *result, number *derivative, int64_t count, float slope, float cube, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) {
        int exact = sizeof(number) == sizeof(float);
        vec value = get(x + i, count - i), slopes, gelu = sigmoid_gelu(value, slope, cube, &slopes, exact);
        put(result + i, gelu, count - i);
        if (derivative != NULL) put(derivative + i, slopes, count - i);
    }
}

// derivative becomes gradient x derivative.
void NAME(multiply)(number *derivative, const number *gradient, int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES)
        put(derivative + i, get(derivative + i, count - i) * get(gradient + i, count - i), count - i);
}

// Causal attention's steps between its matrix products, for sequences that stand one after the other on a line of tokens

// Rows of S slots for each of R sequences and H heads, [R, H, S, D], from tokens and heads that stand `token` and `head` numbers
// apart. Slots behind a sequence's end hold zeros.
void NAME(attention_rows)(const number *line, number *rows, const int64_t *starts, const int64_t *lengths, int64_t R, int64_t H,
                          int64_t S, int64_t D, int64_t token, int64_t head, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t r = 0; r < R; r++)
        for (int64_t h = 0; h < H; h++) {
            number *to = rows + (r * H + h) * S * D;
            for (int64_t s = 0; s < lengths[r]; s++)
                memcpy(to + s * D, line + (starts[r] + s) * token + h * head, D * sizeof(number));
            memset(to + lengths[r] * D, 0, (S - lengths[r]) * D * sizeof(number));
        }
}

// The inverse; what stood behind a sequence's end goes nowhere.
void NAME(attention_line)(const number *rows, number *line, const int64_t *starts, const int64_t *lengths, int64_t R, int64_t H,
                          int64_t S, int64_t D, int64_t token, int64_t head, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t r = 0; r < R; r++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t s = 0; s < lengths[r]; s++)
                memcpy(line + (starts[r] + s) * token + h * head, rows + ((r * H + h) * S + s) * D, D * sizeof(number));
}

// In place, of lines of S scores, number i of S the first i + 1: softmax(scaling x scores), and 0 beyond.
void NAME(causal_softmax)(number *scores, int64_t lines, int64_t S, float scaling, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float wide[S + STEP];  // S is at most PLAIN_LENGTH of engines/packed_attention.py
#pragma omp for schedule(static)
        for (int64_t line = 0; line < lines; line++) {
            number *at = scores + line * S;
            int64_t seen = line % S + 1, whole = (seen + STEP - 1) / STEP * STEP, end = whole < S ? whole : S;
            float tops[STEP], totals[STEP] = {0}, top = -INFINITY, total = 0;
            for (int64_t j = 0; j < STEP; j++) tops[j] = -INFINITY;
#pragma omp simd
            for (int64_t i = 0; i < end; i++) wide[i] = scaling * widen(at[i]);
            for (int64_t i = seen; i < whole; i++) wide[i] = -INFINITY;
            for (int64_t i = 0; i < whole; i += STEP)
#pragma omp simd
                for (int64_t j = 0; j < STEP; j++) tops[j] = wide[i + j] > tops[j] ? wide[i + j] : tops[j];
#pragma omp simd reduction(max : top)
            for (int64_t j = 0; j < STEP; j++) top = tops[j] > top ? tops[j] : top;
            for (int64_t i = 0; i < whole; i += STEP)
#pragma omp simd
                for (int64_t j = 0; j < STEP; j++) {
                    wide[i + j] = exp_of(wide[i + j] - top);
                    totals[j] += wide[i + j];
                }
#pragma omp simd reduction(+ : total)
            for (int64_t j = 0; j < STEP; j++) total += totals[j];
            float share = 1 / total;
#pragma omp simd
            for (int64_t i = 0; i < end; i++) at[i] = narrow(wide[i] * share);
            memset(at + end, 0, (S - end) * sizeof(number));
        }
    }
}

// The gradient by the weights becomes that by the scores, in place.
void NAME(causal_softmax_backward)(number *gradient, const number *weights, int64_t lines, int64_t S, float scaling, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t line = 0; line < lines; line++) {
        number *at = gradient + line * S;
        const number *weight = weights + line * S;
        int64_t seen = line % S + 1, end = (seen + STEP - 1) / STEP * STEP;  // weights beyond are 0
        if (end > S) end = S;
        memset(at + seen, 0, (S - seen) * sizeof(number));  // of scores that nobody saw: maybe not numbers
        float mean = 0;
#pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < end; i++) mean += widen(at[i]) * widen(weight[i]);
#pragma omp simd
        for (int64_t i = 0; i < end; i++) at[i] = narrow(scaling * widen(weight[i]) * (widen(at[i]) - mean));
    }
}

// Adds change, if there is one, to hidden, and normalises the lines of C numbers: to mean 0 and variance 1, or without a bias (as
// RMS norms are) to a mean square of 1.
void NAME(add_and_normalise)(number *hidden, const number *change, const number *weight, const number *bias, number *result,
                             int64_t lines, int64_t C, float eps, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *x = malloc(C * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t line = 0; line < lines; line++) {
            number *from = hidden + line * C, *to = result + line * C;
            float mean = 0, square = 0;
#pragma omp simd
            for (int64_t i = 0; i < C; i++) x[i] = widen(from[i]);
            if (change != NULL)
#pragma omp simd
                for (int64_t i = 0; i < C; i++) {
                    from[i] = narrow(x[i] + widen(change[line * C + i]));
                    x[i] = widen(from[i]);
                }
            if (bias != NULL) {
#pragma omp simd reduction(+ : mean)
                for (int64_t i = 0; i < C; i++) mean += x[i];
                mean /= C;
            }
#pragma omp simd reduction(+ : square)
            for (int64_t i = 0; i < C; i++) square += (x[i] - mean) * (x[i] - mean);
            float scale = 1 / sqrtf(square / C + eps);
            if (bias != NULL)
#pragma omp simd
                for (int64_t i = 0; i < C; i++) to[i] = narrow((x[i] - mean) * scale * widen(weight[i]) + widen(bias[i]));
            else
#pragma omp simd
                for (int64_t i = 0; i < C; i++) to[i] = narrow(x[i] * scale * widen(weight[i]));
        }
        free(x);
    }
}

// The sum of a token's embedding and, if there are any, its place's, which is its position's.
void NAME(embed)(const number *words, const number *places, const int64_t *tokens, const int64_t *positions, number *result,
                 int64_t n, int64_t C, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t line = 0; line < n; line++) {
        const number *word = words + tokens[line] * C, *place = places + positions[line] * C;
        number *to = result + line * C;
        if (places == NULL)
            memcpy(to, word, C * sizeof(number));
        else
#pragma omp simd
            for (int64_t i = 0; i < C; i++) to[i] = narrow(widen(word[i]) + widen(place[i]));
    }
}

// Rotary positions, in place: channel i of each of a row's heads and channel i + D / 2 turn together, by the angles whose cosines
// and sines are in line `position` of those, [positions, D].
void NAME(turn)(number *states, const number *cos, const number *sin, const int64_t *positions, int64_t n, int64_t heads,
                int64_t D, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t line = 0; line < n; line++) {
        const number *c = cos + positions[line] * D, *s = sin + positions[line] * D;
        for (int64_t head = 0; head < heads; head++) {
            number *low = states + (line * heads + head) * D, *high = low + D / 2;
#pragma omp simd
            for (int64_t i = 0; i < D / 2; i++) {
                float a = widen(low[i]), b = widen(high[i]);
                low[i] = narrow(a * widen(c[i]) - b * widen(s[i]));
                high[i] = narrow(b * widen(c[i + D / 2]) + a * widen(s[i + D / 2]));
            }
        }
    }
}
