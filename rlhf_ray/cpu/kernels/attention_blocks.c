// Causal attention of sequences that stand one after the other on a line of tokens, by blocks of products: no score leaves the
// cache. What the way back needs of the weights is each query's log of its sum of exponentials (FlashAttention, arXiv 2205.14135).

#include "blocks.h"
#include "vectors.h"

#ifdef HAS_BLOCKS

int64_t has_blocks(void) { return may_use_blocks(); }

// bf16 numbers of a line's tokens and heads, `token` and `head` numbers apart.
typedef struct { const bf16 *at; int64_t token, head; } states;

static const bf16 *states_of(states all, int64_t token, int64_t head) { return all.at + token * all.token + head * all.head; }

// [length, D] at a step of `token` -> [whole, D], the rest zeros.
static void gather(const bf16 *from, int64_t token, bf16 *to, int64_t length, int64_t whole, int64_t D) {
    for (int64_t i = 0; i < length; i++) memcpy(to + i * D, from + i * token, D * sizeof(bf16));
    memset(to + length * D, 0, (whole - length) * D * sizeof(bf16));
}

// [whole, D] -> columns of 16 tokens, pairs of channels: the right factor of a sum over channels.
static void pair_channels(const bf16 *from, uint32_t *to, int64_t whole, int64_t D) {
    for (int64_t i = 0; i < whole; i += TILE)
        for (int64_t c = 0; c < D; c += DEPTH)
            exchange((const uint32_t *)(from + i * D + c), D / 2, to + i * D / 2 + c / 2 * TILE, TILE);
}

// The other way, from float32: `count` lines of D, each times its own factor, if there are any.
static void scatter(const float *from, const float *factors, bf16 *to, int64_t token, int64_t count, int64_t D) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < D; c += LANES)
            store_bf16(to + i * token + c, load(from + i * D + c, LANES) * (factors == NULL ? 1.0f : factors[i]), LANES);
}

static void *room(char **at, int64_t bytes) {
    void *start = *at;
    *at += (bytes + 63) / 64 * 64;
    return start;
}

// output [N, H, D] = causal attention of H heads' queries to H / group heads' keys and values, in each of R sequences of the N
// tokens; norms [H, N] = log sum exp of each query's scaled scores. S: tokens of the longest sequence; D: a multiple of 32.
void attention_forward(const bf16 *query, int64_t query_token, int64_t query_head, const bf16 *key, int64_t key_token,
                       int64_t key_head, const bf16 *value, int64_t value_token, int64_t value_head, bf16 *output, float *norms,
                       const int64_t *starts, const int64_t *lengths, int64_t R, int64_t N, int64_t H, int64_t group, int64_t S,
                       int64_t D, float scaling, int threads) {
    states queries = {query, query_token, query_head}, keys = {key, key_token, key_head}, values = {value, value_token, value_head};
    int64_t most = whole_sides(S), column = most / 2 * TILE;  // pairs of a column of all tokens
#pragma omp parallel num_threads(threads)
    {
        char *memory = scratch(0, 6 * most * D + 6 * SIDE * most + 4 * SIDE * D + 1024), *at = memory;
        bf16 *rows = room(&at, 2 * most * D), *shares = room(&at, 2 * SIDE * most);
        uint32_t *by_channels = room(&at, 2 * most * D), *by_tokens = room(&at, 2 * most * D);
        float *scores = room(&at, 4 * SIDE * most), *mixed = room(&at, 4 * SIDE * D);
        start_blocks();
#pragma omp for collapse(2) schedule(static)
        for (int64_t r = 0; r < R; r++)
            for (int64_t h = 0; h < H; h++) {
                int64_t length = lengths[r], whole = whole_sides(length);
                gather(states_of(keys, starts[r], h / group), keys.token, rows, length, whole, D);
                pair_channels(rows, by_channels, whole, D);
                gather(states_of(values, starts[r], h / group), values.token, rows, length, whole, D);
                pair_lines(rows, D, whole, D, by_tokens, column, TILE);
                gather(states_of(queries, starts[r], h), queries.token, rows, length, whole, D);
                for (int64_t first = 0; first < length; first += SIDE) {
                    int64_t here = length - first < SIDE ? length - first : SIDE, end = first + SIDE;
                    float *norm = norms + h * N + starts[r] + first, portions[SIDE];
                    for (int64_t k = 0; k < end; k += SIDE)
                        block(rows + first * D, D, by_channels + k * D / 2, D / 2 * TILE, D, scores + k, most, 0);
                    for (int64_t i = 0; i < here; i++) {
                        float *line = scores + i * most;
                        int64_t seen = first + i + 1, vectors = (seen + LANES - 1) / LANES * LANES;
                        bf16 *share = shares + i * most;
                        vec tops = all(-INFINITY), totals = {0};
                        for (int64_t j = seen; j < vectors; j++) line[j] = -INFINITY;
                        for (int64_t j = 0; j < vectors; j += LANES) tops = larger(tops, load(line + j, LANES));
                        float top = largest_of(tops);
                        for (int64_t j = 0; j < vectors; j += LANES) {
                            vec each = exp_each((load(line + j, LANES) - top) * scaling);
                            store_bf16(share + j, each, LANES);
                            totals += each;
                        }
                        float total = sum_of(totals);
                        memset(share + vectors, 0, (end - vectors) * sizeof(bf16));
                        norm[i] = scaling * top + logf(total);
                        portions[i] = 1 / total;
                    }
                    for (int64_t c = 0; c < D; c += SIDE)
                        block(shares, most, by_tokens + c / TILE * column, column, end, mixed + c, D, 0);
                    scatter(mixed, portions, output + ((starts[r] + first) * H + h) * D, H * D, here, D);
                }
            }
        end_blocks();
    }
}

// 32 x 32 weights of keys (lines) x queries and the gradients by their scores, from both's products; kept as right and left
// factors' lines, and exchanged. Keys behind a query have neither: those of the diagonal's block, the first.
static void weigh(const float *scores, const float *by_weights, const float *norms, const float *means, float scaling, int diagonal,
                  bf16 *weights, bf16 *by_scores, int64_t step, bf16 *exchanged) {
    uint32_t pairs[TILE * SIDE] __attribute__((aligned(64)));
    for (int64_t i = 0; i < SIDE; i++)
        for (int64_t j = 0; j < SIDE; j += LANES) {
            int64_t hidden = diagonal ? i - j : 0;  // queries in front of the key
            vec each = exp_each(load(scores + i * SIDE + j, LANES) * scaling - load(norms + j, LANES));
            each = beyond(each, hidden);
            vec by = each * (load(by_weights + i * SIDE + j, LANES) - load(means + j, LANES)) * scaling;
            store_bf16(weights + i * step + j, each, LANES);
            store_bf16(by_scores + i * step + j, by, LANES);
        }
    pair_lines(by_scores, step, SIDE, SIDE, pairs, TILE, SIDE);
    exchange(pairs, SIDE, (uint32_t *)exchanged, step / 2);
    exchange(pairs + TILE, SIDE, (uint32_t *)(exchanged + TILE * step), step / 2);
}

// The gradients by query [N, H, D], key and value [N, H / group, D], of the gradient by output; both of these [N, H, D].
void attention_backward(const bf16 *query, int64_t query_token, int64_t query_head, const bf16 *key, int64_t key_token,
                        int64_t key_head, const bf16 *value, int64_t value_token, int64_t value_head, const bf16 *output,
                        const bf16 *gradient, const float *norms, bf16 *by_query, bf16 *by_key, bf16 *by_value,
                        const int64_t *starts, const int64_t *lengths, int64_t R, int64_t N, int64_t H, int64_t group, int64_t S,
                        int64_t D, float scaling, int threads) {
    states queries = {query, query_token, query_head}, keys = {key, key_token, key_head}, values = {value, value_token, value_head};
    states gradients = {gradient, H * D, D};
    int64_t most = whole_sides(S), column = most / 2 * TILE, heads = H / group;
#pragma omp parallel num_threads(threads)
    {
        char *memory = scratch(0, 6 * most * most + 24 * most * D + 8 * most + 8 * SIDE * SIDE + 4 * SIDE * D + 1024);
        char *at = memory;
        bf16 *weights = room(&at, 2 * most * most), *by_scores = room(&at, 2 * most * most);  // keys x queries
        bf16 *exchanged = room(&at, 2 * most * most);                                         // by_scores, queries x keys
        bf16 *key_rows = room(&at, 2 * most * D), *value_rows = room(&at, 2 * most * D), *rows = room(&at, 2 * most * D);
        uint32_t *key_tokens = room(&at, 2 * most * D), *query_tokens = room(&at, 2 * most * D);
        uint32_t *query_channels = room(&at, 2 * most * D), *gradient_tokens = room(&at, 2 * most * D);
        uint32_t *gradient_channels = room(&at, 2 * most * D);
        float *key_sums = room(&at, 4 * most * D), *value_sums = room(&at, 4 * most * D), *mixed = room(&at, 4 * SIDE * D);
        float *norm = room(&at, 4 * most), *means = room(&at, 4 * most);
        float *products = room(&at, 4 * SIDE * SIDE), *by_products = room(&at, 4 * SIDE * SIDE);
        start_blocks();
#pragma omp for collapse(2) schedule(static)
        for (int64_t r = 0; r < R; r++)
            for (int64_t g = 0; g < heads; g++) {
                int64_t length = lengths[r], whole = whole_sides(length);
                gather(states_of(keys, starts[r], g), keys.token, key_rows, length, whole, D);
                pair_lines(key_rows, D, whole, D, key_tokens, column, TILE);
                gather(states_of(values, starts[r], g), values.token, value_rows, length, whole, D);
                for (int64_t h = g * group; h < (g + 1) * group; h++) {
                    int more = h > g * group;
                    gather(states_of(queries, starts[r], h), queries.token, rows, length, whole, D);
                    pair_lines(rows, D, whole, D, query_tokens, column, TILE);
                    pair_channels(rows, query_channels, whole, D);
                    gather(states_of(gradients, starts[r], h), gradients.token, rows, length, whole, D);
                    pair_lines(rows, D, whole, D, gradient_tokens, column, TILE);
                    pair_channels(rows, gradient_channels, whole, D);
                    for (int64_t i = 0; i < length; i++) {
                        const bf16 *out = output + ((starts[r] + i) * H + h) * D;
                        vec mean = {0};
                        for (int64_t c = 0; c < D; c += LANES)
                            mean += load_bf16(rows + i * D + c, LANES) * load_bf16(out + c, LANES);
                        means[i] = sum_of(mean);
                        norm[i] = norms[h * N + starts[r] + i];
                    }
                    for (int64_t i = length; i < whole; i++) means[i] = 0, norm[i] = INFINITY;  // no weight
                    for (int64_t k = 0; k < whole; k += SIDE) {
                        for (int64_t q = k; q < whole; q += SIDE) {
                            block(key_rows + k * D, D, query_channels + q * D / 2, D / 2 * TILE, D, products, SIDE, 0);
                            block(value_rows + k * D, D, gradient_channels + q * D / 2, D / 2 * TILE, D, by_products, SIDE, 0);
                            weigh(products, by_products, norm + q, means + q, scaling, q == k, weights + k * most + q,
                                  by_scores + k * most + q, most, exchanged + q * most + k);
                        }
                        for (int64_t c = 0; c < D; c += SIDE) {
                            const uint32_t *by = gradient_tokens + c / TILE * column + k / 2 * TILE;
                            const uint32_t *of = query_tokens + c / TILE * column + k / 2 * TILE;
                            block(weights + k * most + k, most, by, column, whole - k, value_sums + k * D + c, D, more);
                            block(by_scores + k * most + k, most, of, column, whole - k, key_sums + k * D + c, D, more);
                        }
                    }
                    for (int64_t q = 0; q < length; q += SIDE) {
                        int64_t here = length - q < SIDE ? length - q : SIDE;
                        for (int64_t c = 0; c < D; c += SIDE)
                            block(exchanged + q * most, most, key_tokens + c / TILE * column, column, q + SIDE, mixed + c, D, 0);
                        scatter(mixed, NULL, by_query + ((starts[r] + q) * H + h) * D, H * D, here, D);
                    }
                }
                scatter(key_sums, NULL, by_key + (starts[r] * heads + g) * D, heads * D, length, D);
                scatter(value_sums, NULL, by_value + (starts[r] * heads + g) * D, heads * D, length, D);
            }
        end_blocks();
    }
}

#else
int64_t has_blocks(void) { return 0; }
#endif
