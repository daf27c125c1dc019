/* Float32 kernels for the CPU: the parts that decoding and training share. See kernels.py for how they are built.
 *
 * Sums run in an order fixed by the shapes and the number of threads: the same bits at every run.
 */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int64_t i64;

/* Share `part` of `parts` of the range 0..n, cut at multiples of `grain`. */
INLINE void share(i64 n, i64 grain, i64 part, i64 parts, i64 *from, i64 *to) {
    const i64 units = (n + grain - 1) / grain;
    *from = units * part / parts * grain;
    *to = units * (part + 1) / parts * grain;
    if (*from > n) *from = n;
    if (*to > n) *to = n;
}

/* exp within 2 ulp; a form that vectorises and keeps NaN, 0 at -inf and inf at inf (from 88.3 on). */
INLINE float fast_exp(float x) {
    const float bounded = x < -87.0f ? -87.0f : x > 88.3f ? 88.3f : x;
    const float n = rintf(bounded * 1.44269504f);
    const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { uint32_t i; float f; } power = {((uint32_t)(int32_t)n + 127u) << 23};
    return x < -87.0f ? 0.0f : x > 88.3f ? INFINITY : p * power.f;
}

INLINE float silu(float x) { return x / (1.0f + fast_exp(-x)); }

/* ---- products ---- */

typedef int32_t order __attribute__((vector_size(4 * LANES)));

/* The sums of four vectors, in lanes 0, 4, 8 and 12. */
INLINE lanes lane_sums(lanes a, lanes b, lanes c, lanes d) {
    const order low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const order even = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    const lanes ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + 8);
    const lanes cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, low + 8);
    lanes v = __builtin_shuffle(ab, cd, even) + __builtin_shuffle(ab, cd, even + 4);
    v += __builtin_shuffle(v, (order){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    return v + __builtin_shuffle(v, (order){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
}

/* The sums of v[r][t] in lanes 4 t + r, in the same order. Half of the moves are blends, which any port does. */
INLINE lanes tile_sums(const lanes v[4][4]) {
    const order far = {8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23};
    const order near = {0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31};
    lanes u[4];
    for (int t = 0; t < 4; t++) {
        const lanes ab = __builtin_shuffle(v[0][t], v[1][t], near) + __builtin_shuffle(v[0][t], v[1][t], far);
        const lanes cd = __builtin_shuffle(v[2][t], v[3][t], near) + __builtin_shuffle(v[2][t], v[3][t], far);
        u[t] = __builtin_shuffle(ab, cd, (order){0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31}) +
               __builtin_shuffle(ab, cd, (order){4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27});
    } /* row 0, 2, 1, 3 in four lanes each */
    const order two = {0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31};
    const order other = {2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29};
    const lanes a = __builtin_shuffle(u[0], u[1], two) + __builtin_shuffle(u[0], u[1], other);
    const lanes b = __builtin_shuffle(u[2], u[3], two) + __builtin_shuffle(u[2], u[3], other);
    const order even = {0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30};
    const lanes sums = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
    return __builtin_shuffle(sums, (order){0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15});
}

INLINE float lane_sum(lanes v) {
    v += __builtin_shuffle(v, (order){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    v += __builtin_shuffle(v, (order){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    v += __builtin_shuffle(v, (order){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    return v[0] + v[1];
}

/* A weight matrix as it is stored: float32, bfloat16, or int8 with a factor for each row. */
typedef struct {
    const char *at;
    const float *factor; /* (rows), or null */
    i64 bytes;           /* of an entry: 4, 2 or 1 */
} Matrix;

INLINE Matrix plain(const float *at) { return (Matrix){(const char *)at, 0, 4}; }

/* The matrix from this row on, its rows being len long. */
INLINE Matrix below(Matrix w, i64 row, i64 len) {
    return (Matrix){w.at + row * len * w.bytes, w.factor ? w.factor + row : 0, w.bytes};
}

typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef int8_t octets __attribute__((vector_size(LANES), aligned(1), may_alias));

/* LANES entries as float32; a bfloat16 is the upper half of one. GCC widens in five steps what AVX-512 does in one. */
INLINE lanes load(const char *at, const int bytes) {
    if (bytes == 4) return *(const lanes *)at;
#ifdef __AVX512F__
    if (bytes == 2) return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)at)), 16);
    return (lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)at)));
#else
    if (bytes == 2) return (lanes)(__builtin_convertvector(*(const halves *)at, words) << 16);
    const shorts wide = __builtin_convertvector(*(const octets *)at, shorts);
    return __builtin_convertvector(__builtin_convertvector(wide, order), lanes);
#endif
}

INLINE float load_one(const char *at, const int bytes) {
    if (bytes == 4) return *(const float *)at;
    if (bytes == 1) return (float)*(const int8_t *)at;
    union { uint32_t i; float f; } value = {(uint32_t)*(const uint16_t *)at << 16};
    return value.f;
}

/* x times what the codes of row r are multiples of. */
INLINE float scaled(float x, Matrix w, i64 r, const int bytes) { return bytes == 1 ? x * w.factor[r] : x; }

/* y[t, r] = w[r] . x[t] for R rows and T tokens held in registers. Of the R rows that follow, `ahead` are fetched
 * into the second cache, from row `begin` of them on. */
INLINE void dot_tile(Matrix w, i64 ldw, const float *x, i64 ldx, i64 len, float *y, i64 token, const int R,
                     const int T, const int ahead, i64 begin, const int bytes) {
    lanes acc[4][4];
    i64 i = 0;
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) acc[r][t] = (lanes){0};
    for (; i + LANES <= len; i += LANES) {
        lanes in[4];
        for (int t = 0; t < T; t++) in[t] = *(const lanes *)(x + t * ldx + i);
        for (int r = 0; r < R; r++) {
            const char *at = w.at + (r * ldw + i) * bytes;
            if (r < ahead) __builtin_prefetch(at + (R + begin) * ldw * bytes, 0, 2); /* past the end it does nothing */
            const lanes row_r = load(at, bytes);
            for (int t = 0; t < T; t++) acc[r][t] += row_r * in[t];
        }
    }
    if (R == 4 && T == 4 && i == len && bytes != 1) {
        const lanes sums = tile_sums(acc);
        for (int t = 0; t < 4; t++) memcpy(y + t * token, (const float *)&sums + 4 * t, 4 * sizeof(float));
        return;
    }
    for (int t = 0; t < T; t++) {
        lanes sums = {0};
        if (R == 4) sums = lane_sums(acc[0][t], acc[1][t], acc[2][t], acc[3][t]);
        for (int r = 0; r < R; r++) {
            float sum = R == 4 ? sums[4 * r] : lane_sum(acc[r][t]);
            for (i64 j = i; j < len; j++) sum += load_one(w.at + (r * ldw + j) * bytes, bytes) * x[t * ldx + j];
            y[t * token + r] = scaled(sum, w, r, bytes);
        }
    }
}

INLINE void dots_of(Matrix w, i64 ldw, i64 rows, const float *x, i64 ldx, i64 tokens, i64 len, float *y, i64 token,
                    const int bytes) {
    i64 r = 0;
    for (; r + 4 <= rows; r += 4) {
        const Matrix tile = below(w, r, ldw);
        float *out = y + r;
        i64 t = 0;
        if (tokens >= 8) /* the next rows in two halves: fetched all at once they would be waited for */
            for (; t < 8; t += 4)
                dot_tile(tile, ldw, x + t * ldx, ldx, len, out + t * token, token, 4, 4, 2, t / 2, bytes);
        else if (tokens >= 4) {
            dot_tile(tile, ldw, x, ldx, len, out, token, 4, 4, 4, 0, bytes);
            t = 4;
        }
        for (; t + 4 <= tokens; t += 4)
            dot_tile(tile, ldw, x + t * ldx, ldx, len, out + t * token, token, 4, 4, 0, 0, bytes);
        for (; t + 2 <= tokens; t += 2)
            dot_tile(tile, ldw, x + t * ldx, ldx, len, out + t * token, token, 4, 2, t ? 0 : 4, 0, bytes);
        if (t < tokens)
            dot_tile(tile, ldw, x + t * ldx, ldx, len, out + t * token, token, 4, 1, t ? 0 : 4, 0, bytes);
    }
    for (; r < rows; r++)
        for (i64 t = 0; t < tokens; t++)
            dot_tile(below(w, r, ldw), ldw, x + t * ldx, ldx, len, y + t * token + r, token, 1, 1, 0, 0, bytes);
}

/* y[t * token + r] = w[r] . x[t]: each weight row leaves memory once for all tokens. */
static void dots(Matrix w, i64 ldw, i64 rows, const float *x, i64 ldx, i64 tokens, i64 len, float *y, i64 token) {
    if (w.bytes == 4)
        dots_of(w, ldw, rows, x, ldx, tokens, len, y, token, 4);
    else if (w.bytes == 2)
        dots_of(w, ldw, rows, x, ldx, tokens, len, y, token, 2);
    else
        dots_of(w, ldw, rows, x, ldx, tokens, len, y, token, 1);
}

/* y[t][from..to] += sum over R rows of x[t][r] * w[r][from..to]. */
INLINE void add_tile(Matrix w, i64 ldw, const float *const *x, i64 at, float *const *y, i64 from, i64 to,
                     const int R, const int T, const int ahead, i64 begin, const int bytes) {
    lanes factor[4][4];
    i64 c = from;
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) factor[t][r] = (lanes){0} + scaled(x[t][at + r], w, r, bytes);
    for (; c + LANES <= to; c += LANES) {
        lanes row[4];
        for (int r = 0; r < R; r++) {
            const char *place = w.at + (r * ldw + c) * bytes;
            if (r < ahead) __builtin_prefetch(place + (R + begin) * ldw * bytes, 0, 2);
            row[r] = load(place, bytes);
        }
        for (int t = 0; t < T; t++) {
            lanes sum = *(const lanes *)(y[t] + c);
            for (int r = 0; r < R; r++) sum += row[r] * factor[t][r];
            *(lanes *)(y[t] + c) = sum;
        }
    }
    for (; c < to; c++)
        for (int t = 0; t < T; t++)
            for (int r = 0; r < R; r++)
                y[t][c] += load_one(w.at + (r * ldw + c) * bytes, bytes) * scaled(x[t][at + r], w, r, bytes);
}

INLINE void add_rows_of(Matrix w, i64 ldw, i64 rows, const float *const *x, float *const *y, i64 tokens, i64 from,
                        i64 to, const int bytes) {
    i64 r = 0;
    for (; r + 4 <= rows; r += 4) {
        const Matrix tile = below(w, r, ldw);
        i64 t = 0;
        if (tokens >= 16) /* the next rows in as many parts as tiles, up to four */
            for (; t < 16; t += 4) add_tile(tile, ldw, x + t, r, y + t, from, to, 4, 4, 1, t / 4, bytes);
        else if (tokens >= 8)
            for (; t < 8; t += 4) add_tile(tile, ldw, x + t, r, y + t, from, to, 4, 4, 2, t / 2, bytes);
        else if (tokens >= 4) {
            add_tile(tile, ldw, x, r, y, from, to, 4, 4, 4, 0, bytes);
            t = 4;
        }
        for (; t + 4 <= tokens; t += 4) add_tile(tile, ldw, x + t, r, y + t, from, to, 4, 4, 0, 0, bytes);
        if (t + 3 == tokens) {
            add_tile(tile, ldw, x + t, r, y + t, from, to, 4, 3, t ? 0 : 4, 0, bytes);
            t = tokens;
        }
        for (; t + 2 <= tokens; t += 2) add_tile(tile, ldw, x + t, r, y + t, from, to, 4, 2, t ? 0 : 4, 0, bytes);
        for (; t < tokens; t++) add_tile(tile, ldw, x + t, r, y + t, from, to, 4, 1, t ? 0 : 4, 0, bytes);
    }
    for (; r < rows; r++)
        for (i64 t = 0; t < tokens; t++)
            add_tile(below(w, r, ldw), ldw, x + t, r, y + t, from, to, 1, 1, 0, 0, bytes);
}

/* y[t][from..to] += x[t] (rows) times w (rows, ldw): a few rows at a time, so that they are read in memory order
 * and meet every token while they are in the first cache. */
static void add_rows(Matrix w, i64 ldw, i64 rows, const float *const *x, float *const *y, i64 tokens, i64 from,
                     i64 to) {
    if (w.bytes == 4)
        add_rows_of(w, ldw, rows, x, y, tokens, from, to, 4);
    else if (w.bytes == 2)
        add_rows_of(w, ldw, rows, x, y, tokens, from, to, 2);
    else
        add_rows_of(w, ldw, rows, x, y, tokens, from, to, 1);
}

INLINE void norm_row(const float *x, const float *weight, i64 width, float eps, float *y) {
    float square = 0.0f;
#pragma omp simd reduction(+ : square)
    for (i64 i = 0; i < width; i++) square += x[i] * x[i];
    const float scale = 1.0f / sqrtf(square / (float)width + eps);
#pragma omp simd
    for (i64 i = 0; i < width; i++) y[i] = x[i] * scale * weight[i];
}

/* Halves convention; table (2, P): cos twice, then -sin and sin. y may not be x. */
INLINE void rotate(const float *x, const float *cosine, const float *sine, i64 width, float *y) {
    const i64 half = width / 2;
    for (i64 i = 0; i < half; i++) {
        y[i] = x[i] * cosine[i] + x[i + half] * sine[i];
        y[i + half] = x[i + half] * cosine[i + half] + x[i] * sine[i + half];
    }
}

#include "kernels_decode.c"
#include "kernels_pages.c"
#include "kernels_train.c"
