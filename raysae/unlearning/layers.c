/* Interventions, and attention and norms of Gemma-2-shaped layers, row by row: what is small enough
   for a processor's registers and nearest cache does not become matrices in memory. Called by
   compiled.py, which says what the arguments are; all numbers are float32, all arrays contiguous.

   Compiled for each kind of processor that it is worth it for, see pyproject.toml: with 16 LANES
   for AVX-512, 8 for AVX2. Of vectors that a processor does not have a compiler makes a poor job:
   16 lanes on AVX2 take longer than PyTorch does. */

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

#define TOGETHER (LANES / 2) /* sums kept in registers, to hide how long one addition takes */
#define LARGEST_HEAD 256

const int32_t layers_version = 1; /* of what the arguments mean; raise it here and in compiled.py */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE floats load(const float *p) { return *(const anywhere *)p; }
INLINE void store(float *p, floats x) { *(anywhere *)p = x; }
INLINE floats of(float x) { return x - (floats){}; }
INLINE floats choose(ints where, floats a, floats b) {
    return (floats)((where & (ints)a) | (~where & (ints)b));
}

#if LANES == 16
#define NEIGHBOURS(x)                                                                              \
    __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#define QUARTERS(x)                                                                                \
    __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
#elif LANES == 8
#define NEIGHBOURS(x) __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6)
#define QUARTERS(x) __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3)
#else
#error "LANES is 8 or 16"
#endif

INLINE ints numbers(void) {
    ints lane = {};
    for (int l = 0; l < LANES; l++) lane[l] = l;
    return lane;
}

INLINE float sum_of(floats x) {
    x += QUARTERS(x);
    x += NEIGHBOURS(x);
    float sum = x[0] + x[2];
#if LANES == 16
    sum += x[8] + x[10];
#endif
    return sum;
}

typedef struct {
    floats power, rest;
} exponential;

/* e^x as power · (1 + rest), for |x| < 87: a power of two, and e^f - 1 by its series up to f^7 for
   |f| ≤ log(2) / 2, which is right to 2e-8. */
INLINE exponential exponential_of(floats x) {
    const float round = 12582912.0f; /* 1.5 · 2^23: what is added to it has no fraction */
    floats n = x * 1.44269504f + round;
    ints power = ((ints)n << 23) + 0x3f800000;
    n -= round;
    floats f = x - n * 0.693145752f; /* log(2), in two parts so that n times the first is exact */
    f -= n * 1.42860677e-6f;
    floats p = f * (1.0f / 5040) + (1.0f / 720);
    p = p * f + (1.0f / 120);
    p = p * f + (1.0f / 24);
    p = p * f + (1.0f / 6);
    p = p * f + (1.0f / 2);
    p = p * f + 1.0f;
    return (exponential){(floats)power, p * f};
}

/* exp(cap · tanh(score)): no score is too large, so no maximum has to be taken first. Of small
   scores the hyperbolic tangent keeps all digits, as e^2x - 1 does. */
INLINE floats weight_of(floats score, float cap) {
    const float largest = 20.0f; /* of 2 · score: beyond, the tangent is 1 */
    floats x = score + score;
    x = choose(x > largest, of(largest), x);
    x = choose(x < -largest, of(-largest), x);
    exponential e = exponential_of(x);
    floats less_one = e.power * e.rest + (e.power - 1.0f);
    e = exponential_of(less_one / (less_one + 2.0f) * cap);
    return e.power * e.rest + e.power;
}

/* Rotary positions: pairs of neighbours, turned. `sines` has the first of a pair negative. */
INLINE void turn(int64_t d_head, const float *x, const float *cosines, const float *sines,
                 float *turned) {
    for (int64_t d = 0; d < d_head; d += LANES) {
        floats a = load(x + d);
        store(turned + d, a * load(cosines + d) + NEIGHBOURS(a) * load(sines + d));
    }
}

/* weights (count, LANES) of `count` keys for queries (d_head, LANES) */
INLINE void weigh_some(int count, int64_t d_head, const float *queries, const float *keys,
                       float cap, float *weights) {
    floats scores[TOGETHER];
    UNROLL for (int j = 0; j < count; j++) scores[j] = (floats){};
    for (int64_t d = 0; d < d_head; d++) {
        floats q = load(queries + d * LANES);
        UNROLL for (int j = 0; j < count; j++) scores[j] += q * keys[j * d_head + d];
    }
    UNROLL for (int j = 0; j < count; j++) store(weights + j * LANES, weight_of(scores[j], cap));
}

INLINE void weigh(int64_t count, int64_t d_head, const float *queries, const float *keys, float cap,
                  float *weights) {
    int64_t j = 0;
    for (; j + TOGETHER <= count; j += TOGETHER)
        weigh_some(TOGETHER, d_head, queries, keys + j * d_head, cap, weights + j * LANES);
    for (; j + 4 <= count; j += 4)
        weigh_some(4, d_head, queries, keys + j * d_head, cap, weights + j * LANES);
    for (; j < count; j++)
        weigh_some(1, d_head, queries, keys + j * d_head, cap, weights + j * LANES);
}

/* What the positions `low` to `end` hold: those before `first` every `past_stride` numbers from
   `past` on, where position 0 is, the others every `new_stride` from `new` on, where `first` is. */
typedef struct {
    int64_t low, first, end, past_stride, new_stride;
    const float *past, *new;
} positions;

INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* mixed (count, size) every `stride`: the values times the weights (positions, LANES) of `count`
   lanes, times `factors` (count,). */
INLINE void mix_some(int count, int64_t size, positions values, const float *weights,
                     const float *factors, float *mixed, int64_t stride) {
    for (int64_t d = 0; d < size; d += 2 * LANES) {
        floats a[TOGETHER], b[TOGETHER];
        UNROLL for (int i = 0; i < count; i++) a[i] = b[i] = (floats){};
        for (int64_t j = values.low; j < values.first; j++) {
            const float *value = values.past + j * values.past_stride + d, *w = weights + j * LANES;
            floats u = load(value), v = load(value + LANES);
            UNROLL for (int i = 0; i < count; i++) a[i] += u * w[i], b[i] += v * w[i];
        }
        for (int64_t j = most(values.low, values.first); j < values.end; j++) {
            const float *value = values.new + (j - values.first) * values.new_stride + d;
            const float *w = weights + j * LANES;
            floats u = load(value), v = load(value + LANES);
            UNROLL for (int i = 0; i < count; i++) a[i] += u * w[i], b[i] += v * w[i];
        }
        UNROLL for (int i = 0; i < count; i++) {
            store(mixed + i * stride + d, a[i] * factors[i]);
            store(mixed + i * stride + d + LANES, b[i] * factors[i]);
        }
    }
}

INLINE void mix(int64_t count, int64_t size, positions values, const float *weights,
                const float *factors, float *mixed, int64_t stride) {
    int64_t i = 0;
    for (; i + TOGETHER <= count; i += TOGETHER)
        mix_some(TOGETHER, size, values, weights + i, factors + i, mixed + i * stride, stride);
    for (; i + 4 <= count; i += 4)
        mix_some(4, size, values, weights + i, factors + i, mixed + i * stride, stride);
    for (; i < count; i++)
        mix_some(1, size, values, weights + i, factors + i, mixed + i * stride, stride);
}

/* The first position that a query sees; a window of 0 is none. */
INLINE int64_t first_seen(int64_t position, int64_t window) {
    return window && position >= window ? position - window + 1 : 0;
}

INLINE float product(int64_t size, const float *x, const float *y) {
    floats sum = {};
    for (int64_t d = 0; d < size; d += LANES) sum += load(x + d) * load(y + d);
    return sum_of(sum);
}

/* Lanes are queries: as many see a key at a time, and each mixes values by its own lane. */
void attend(int64_t rows, int64_t n, int64_t first, int64_t heads,
            int64_t kv_heads, int64_t d_head, const float *projected,
            const float *cosines, const float *sines, const float *past,
            const int64_t *parents, float cap, int64_t window, float *longer,
            float *scratch, float *mixed) {
    const ints lane = numbers();
    const int64_t row_size = (heads + 2 * kv_heads) * d_head, head_size = (first + n) * d_head;
    float *const weights = scratch, *const new_keys = scratch + (first + n) * LANES;
    float queries[LARGEST_HEAD * LANES], query[LARGEST_HEAD], factors[LANES];
    memset(queries, 0, sizeof(float) * d_head * LANES); /* of lanes without a query */
    for (int64_t row = 0; row < rows; row++)
        for (int64_t kv = 0; kv < kv_heads; kv++) {
            const float *own = projected + row * n * row_size;
            const float *past_keys = past + (parents[row] * kv_heads + kv) * 2 * first * d_head;
            const float *past_values = past_keys + first * d_head;
            const float *keys = own + (heads + kv) * d_head, *values = keys + kv_heads * d_head;
            for (int64_t i = 0; i < n; i++)
                turn(d_head, keys + i * row_size, cosines + (first + i) * d_head,
                     sines + (first + i) * d_head, new_keys + i * d_head);
            if (longer) {
                float *to = longer + (row * kv_heads + kv) * 2 * head_size;
                memcpy(to, past_keys, first * d_head * sizeof(float));
                memcpy(to + first * d_head, new_keys, n * d_head * sizeof(float));
                to += head_size;
                memcpy(to, past_values, first * d_head * sizeof(float));
                for (int64_t i = 0; i < n; i++)
                    memcpy(to + (first + i) * d_head, values + i * row_size,
                           d_head * sizeof(float));
            }
            for (int64_t head = kv * heads / kv_heads; head < (kv + 1) * heads / kv_heads; head++)
                for (int64_t i = 0; i < n; i += LANES) {
                    int64_t count = n - i < LANES ? n - i : LANES, position = first + i;
                    int64_t low = first_seen(position, window), new_low = most(low, first);
                    for (int64_t l = 0; l < count; l++) {
                        turn(d_head, own + (i + l) * row_size + head * d_head,
                             cosines + (position + l) * d_head, sines + (position + l) * d_head,
                             query);
                        for (int64_t d = 0; d < d_head; d++) queries[d * LANES + l] = query[d];
                    }
                    weigh(first - low, d_head, queries, past_keys + low * d_head, cap,
                          weights + low * LANES);
                    weigh(position + count - new_low, d_head, queries,
                          new_keys + (new_low - first) * d_head, cap, weights + new_low * LANES);
                    floats sum = {};
                    ints at = lane + (int32_t)position;
                    for (int64_t j = low; j < position + count; j++) {
                        ints seen = at >= (int32_t)j;
                        if (window) seen &= at < (int32_t)(j + window);
                        floats w = (floats)((ints)load(weights + j * LANES) & seen);
                        store(weights + j * LANES, w);
                        sum += w;
                    }
                    store(factors, 1.0f / sum);
                    mix(count, d_head,
                        (positions){low, first, position + count, d_head, row_size, past_values,
                                    values},
                        weights, factors, mixed + ((row * n + i) * heads + head) * d_head,
                        heads * d_head);
                }
        }
}

/* Lanes are heads, of the one query of a row. */
void attend_once(int64_t rows, int64_t n, int64_t first, int64_t heads,
                 int64_t kv_heads, int64_t d_head, int64_t d_model,
                 const float *queries, const float *keys, const float *normed,
                 const float *cosines, const float *sines, const float *past_keys,
                 const float *past_normed, const int64_t *parents,
                 const int64_t *at, float cap, int64_t window, float *scratch,
                 float *mixed) {
    float *const weights = scratch, *const new_keys = scratch + (first + n) * LANES;
    float query[LARGEST_HEAD], factors[LANES];
    for (int64_t row = 0; row < rows; row++) {
        int64_t position = first + at[row], low = first_seen(position, window);
        for (int64_t h = 0; h < heads; h += LANES) {
            int64_t count = heads - h < LANES ? heads - h : LANES, turned = -1;
            /* Lanes without a head have numbers too. */
            memset(weights, 0, sizeof(float) * (position + 1) * LANES);
            for (int64_t l = 0; l < count; l++) {
                int64_t kv = (h + l) * kv_heads / heads;
                turn(d_head, queries + (row * heads + h + l) * d_head, cosines + position * d_head,
                     sines + position * d_head, query);
                for (int64_t j = most(low, first); kv != turned && j <= position; j++)
                    turn(d_head, keys + ((row * n + j - first) * kv_heads + kv) * d_head,
                         cosines + j * d_head, sines + j * d_head, new_keys + (j - first) * d_head);
                turned = kv;
                const float *from = past_keys + (parents[row] * kv_heads + kv) * first * d_head;
                for (int64_t j = low; j < first; j++)
                    weights[j * LANES + l] = product(d_head, query, from + j * d_head);
                const float *own = new_keys - first * d_head;
                for (int64_t j = most(low, first); j <= position; j++)
                    weights[j * LANES + l] = product(d_head, query, own + j * d_head);
            }
            floats sum = {};
            for (int64_t j = low; j <= position; j++) {
                floats w = weight_of(load(weights + j * LANES), cap);
                store(weights + j * LANES, w);
                sum += w;
            }
            store(factors, 1.0f / sum);
            mix(count, d_model,
                (positions){low, first, position + 1, d_model, d_model,
                            past_normed + parents[row] * first * d_model,
                            normed + row * n * d_model},
                weights, factors, mixed + (row * heads + h) * d_model, d_model);
        }
    }
}

/* To each clamped feature that fires what brings it to the target, on top of a copy. */
void intervene(int64_t rows, int64_t n, int64_t size, int64_t features,
               int64_t length, int64_t start, const float *resid,
               const float *acts, const int64_t *prompts, const uint8_t *chosen,
               const float *targets, const float *directions, float *changed) {
    for (int64_t row = 0; row < rows; row++, chosen += features)
        for (int64_t i = 0; i < n; i++, targets++, changed += size) {
            int64_t at = prompts[row] * length + start + i;
            memcpy(changed, resid + at * size, size * sizeof(float));
            if (*targets == 0) continue;
            for (int64_t f = 0; f < features; f++) {
                float act = acts[at * features + f];
                if (!chosen[f] || !(act > 0)) continue;
                for (int64_t d = 0; d < size; d += LANES)
                    store(changed + d,
                          load(changed + d) + (*targets - act) * load(directions + f * size + d));
            }
        }
}

/* resid + weight · norm(update), into `update`, and the norm of that, without a weight. */
void add_normed(int64_t rows, int64_t size, float eps, const float *resid,
                const float *weight, float *update, float *normed) {
    for (int64_t row = 0; row < rows; row++, resid += size, update += size, normed += size) {
        floats a = {}, b = {};
        for (int64_t d = 0; d < size; d += 2 * LANES) {
            floats u = load(update + d), v = load(update + d + LANES);
            a += u * u, b += v * v;
        }
        float factor = 1.0f / __builtin_sqrtf(sum_of(a + b) / size + eps);
        a = b = (floats){};
        for (int64_t d = 0; d < size; d += 2 * LANES) {
            floats u = load(update + d) * factor, v = load(update + d + LANES) * factor;
            u = load(resid + d) + u * load(weight + d);
            v = load(resid + d + LANES) + v * load(weight + d + LANES);
            store(update + d, u), store(update + d + LANES, v);
            a += u * u, b += v * v;
        }
        factor = 1.0f / __builtin_sqrtf(sum_of(a + b) / size + eps);
        for (int64_t d = 0; d < size; d += LANES) store(normed + d, load(update + d) * factor);
    }
}
