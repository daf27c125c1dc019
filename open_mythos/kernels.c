/* Fused float32 kernels for a few tokens on the CPU; see kernels.py for shapes and for when they are used.
 *
 * At decode every weight is read once and used for a handful of tokens, so time is memory traffic plus the
 * number of operators. Each entry is therefore one OpenMP region that streams its weights in memory order.
 * Sums run in an order fixed by the shapes and the number of threads: the same bits at every run.
 *
 * Shape letters: N tokens, D model width, E experts, F expert width, Fs shared width, k experts a token, H heads,
 * R latent rank, P rope width, K nope width, V value width, Q query rank, C context.
 */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

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

INLINE float lane_sum(lanes v) {
    typedef int32_t index __attribute__((vector_size(4 * LANES)));
    v += __builtin_shuffle(v, (index){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    v += __builtin_shuffle(v, (index){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    v += __builtin_shuffle(v, (index){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    return v[0] + v[1];
}

/* y[r, t] = w[r] . x[t] for R rows and T tokens held in registers. */
INLINE void dot_tile(const float *w, i64 ldw, const float *x, i64 ldx, i64 len, float *y, i64 row, i64 token,
                     const int R, const int T, const int first) {
    lanes acc[4][4];
    i64 i = 0;
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) acc[r][t] = (lanes){0};
    for (; i + LANES <= len; i += LANES) {
        lanes in[4];
        for (int t = 0; t < T; t++) in[t] = *(const lanes *)(x + t * ldx + i);
        for (int r = 0; r < R; r++) {
            if (first) __builtin_prefetch(w + (r + R) * ldw + i, 0, 2); /* the next rows; past the end it does nothing */
            const lanes row_r = *(const lanes *)(w + r * ldw + i);
            for (int t = 0; t < T; t++) acc[r][t] += row_r * in[t];
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
            float sum = lane_sum(acc[r][t]);
            for (i64 j = i; j < len; j++) sum += w[r * ldw + j] * x[t * ldx + j];
            y[r * row + t * token] = sum;
        }
}

/* y[r * row + t * token] = w[r] . x[t]: each weight row leaves memory once for all tokens. */
static void dots(const float *w, i64 ldw, i64 rows, const float *x, i64 ldx, i64 tokens, i64 len, float *y,
                 i64 row, i64 token) {
    i64 r = 0;
    for (; r + 4 <= rows; r += 4) {
        const float *tile = w + r * ldw;
        float *out = y + r * row;
        i64 t = 0;
        for (; t + 4 <= tokens; t += 4)
            dot_tile(tile, ldw, x + t * ldx, ldx, len, out + t * token, row, token, 4, 4, t == 0);
        for (; t + 2 <= tokens; t += 2)
            dot_tile(tile, ldw, x + t * ldx, ldx, len, out + t * token, row, token, 4, 2, t == 0);
        if (t < tokens) dot_tile(tile, ldw, x + t * ldx, ldx, len, out + t * token, row, token, 4, 1, t == 0);
    }
    for (; r < rows; r++)
        for (i64 t = 0; t < tokens; t++)
            dot_tile(w + r * ldw, ldw, x + t * ldx, ldx, len, y + r * row + t * token, row, token, 1, 1, 0);
}

/* y[t][from..to] += sum over R rows of x[t][r] * w[r][from..to]. */
INLINE void add_tile(const float *w, i64 ldw, const float *const *x, i64 at, float *const *y, i64 from, i64 to,
                     const int R, const int T) {
    i64 c = from;
    for (; c + LANES <= to; c += LANES) {
        lanes row[4];
        for (int r = 0; r < R; r++) {
            __builtin_prefetch(w + (r + 2 * R) * ldw + c); /* the rows after next; past the end it does nothing */
            row[r] = *(const lanes *)(w + r * ldw + c);
        }
        for (int t = 0; t < T; t++) {
            lanes sum = *(const lanes *)(y[t] + c);
            for (int r = 0; r < R; r++) sum += row[r] * x[t][at + r];
            *(lanes *)(y[t] + c) = sum;
        }
    }
    for (; c < to; c++)
        for (int t = 0; t < T; t++)
            for (int r = 0; r < R; r++) y[t][c] += w[r * ldw + c] * x[t][at + r];
}

/* y[t][from..to] += x[t] (rows) times w (rows, ldw): a few rows at a time, so that they are read in memory order
 * and meet every token while they are in the first cache. */
static void add_rows(const float *w, i64 ldw, i64 rows, const float *const *x, float *const *y, i64 tokens,
                     i64 from, i64 to) {
    i64 r = 0;
    for (; r + 4 <= rows; r += 4) {
        i64 t = 0;
        for (; t + 4 <= tokens; t += 4) add_tile(w + r * ldw, ldw, x + t, r, y + t, from, to, 4, 4);
        for (; t + 2 <= tokens; t += 2) add_tile(w + r * ldw, ldw, x + t, r, y + t, from, to, 4, 2);
        for (; t < tokens; t++) add_tile(w + r * ldw, ldw, x + t, r, y + t, from, to, 4, 1);
    }
    for (; r < rows; r++)
        for (i64 t = 0; t < tokens; t++) add_tile(w + r * ldw, ldw, x + t, r, y + t, from, to, 1, 1);
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

/* ---- entries ---- */

/* y (N, D) = rms_norm(x (N, D)) * weight (D). */
void om_rms_norm(const float *x, const float *weight, float eps, i64 N, i64 D, float *y) {
    for (i64 n = 0; n < N; n++) norm_row(x + n * D, weight, D, eps, y + n * D);
}

/* Routed and shared SwiGLU experts; k or Fs may be 0. Returns 1 when an expert is not in 0..E-1, else 0.
 *
 * Room: hidden (N * k, 2F), side (N, 2Fs), slots (N * k) and first (E + 1), in which slots are sorted by expert.
 */
int om_moe(const float *x, const float *w_in, const float *w_out, const i64 *experts, const float *weights,
            const float *gate_up, const float *down, i64 N, i64 D, i64 E, i64 F, i64 k, i64 Fs, i64 threads,
            float *hidden, float *side, i64 *slots, i64 *first, float *y) {
    const i64 total = N * k;
    i64 used = 0; /* experts with at least one slot */
    if (total) {
        memset(first, 0, sizeof(i64) * (size_t)(E + 1));
        for (i64 s = 0; s < total; s++) {
            if (experts[s] < 0 || experts[s] >= E) return 1;
            first[experts[s] + 1]++;
        }
        for (i64 e = 0; e < E; e++) first[e + 1] += first[e];
        for (i64 s = 0; s < total; s++) slots[first[experts[s]]++] = s;
        for (i64 e = E; e > 0; e--) first[e] = first[e - 1];
        first[0] = 0;
        for (i64 e = 0; e < E; e++) used += first[e + 1] > first[e];
    }
    const i64 blocks = (F + LANES - 1) / LANES;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        const i64 part = omp_get_thread_num(), parts = omp_get_num_threads();
        const float *in[total + N];
        float *out[total + N];
        i64 from, to;
        /* Hidden columns of all used experts in a row, then the shared one's: one even cut over threads. A thread
         * takes the same columns of gate and up, so that it can join them itself. */
        share(used * blocks + (Fs + LANES - 1) / LANES, 1, part, parts, &from, &to);
        for (i64 e = 0, base = 0; total && e < E; e++) {
            const i64 begin = first[e], m = first[e + 1] - begin;
            if (!m) continue;
            i64 low = (from > base ? from - base : 0) * LANES, high = (to - base) * LANES;
            base += blocks;
            if (high > F) high = F;
            if (low >= high) continue;
            for (i64 i = 0; i < m; i++) {
                const i64 slot = slots[begin + i];
                in[i] = x + slot / k * D;
                out[i] = hidden + slot * 2 * F;
                memset(out[i] + low, 0, sizeof(float) * (size_t)(high - low));
                memset(out[i] + F + low, 0, sizeof(float) * (size_t)(high - low));
            }
            const float *w = w_in + e * D * 2 * F;
            if (low == 0 && high == F)
                add_rows(w, 2 * F, D, in, out, m, 0, 2 * F);
            else {
                add_rows(w, 2 * F, D, in, out, m, low, high);
                add_rows(w, 2 * F, D, in, out, m, F + low, F + high);
            }
            for (i64 i = 0; i < m; i++) {
                const float weight = weights[slots[begin + i]];
                float *h = out[i];
#pragma omp simd
                for (i64 c = low; c < high; c++) h[c] = silu(h[c]) * h[F + c] * weight;
            }
        }
        if (Fs && to > used * blocks) {
            const i64 low = (from > used * blocks ? from - used * blocks : 0) * LANES;
            i64 high = (to - used * blocks) * LANES;
            if (high > Fs) high = Fs;
            dots(gate_up + low * D, D, high - low, x, D, N, D, side + low, 1, 2 * Fs);
            dots(gate_up + (Fs + low) * D, D, high - low, x, D, N, D, side + Fs + low, 1, 2 * Fs);
            for (i64 n = 0; n < N; n++) {
                float *h = side + n * 2 * Fs;
#pragma omp simd
                for (i64 c = low; c < high; c++) h[c] = silu(h[c]) * h[Fs + c];
            }
        }
#pragma omp barrier
        share(D, LANES, part, parts, &from, &to);
        if (from < to) {
            if (Fs)
                dots(down + from * Fs, Fs, to - from, side, 2 * Fs, N, Fs, y + from, 1, D);
            else
                for (i64 n = 0; n < N; n++) memset(y + n * D + from, 0, sizeof(float) * (size_t)(to - from));
            for (i64 e = 0; total && e < E; e++) {
                const i64 begin = first[e], m = first[e + 1] - begin;
                for (i64 i = 0; i < m; i++) {
                    const i64 slot = slots[begin + i];
                    in[i] = hidden + slot * 2 * F;
                    out[i] = y + slot / k * D;
                }
                if (m) add_rows(w_out + e * F * D, D, F, in, out, m, from, to);
            }
        }
    }
    return 0;
}

/* MLA before the cache: latent (N, R + P) to store, and queries (N, H, R + P) that read it.
 *
 * low: room for N * (2Q + R + P); full: room for N * H * (K + P). rope: cosines, then sines `rope_half` floats on;
 * token n's row at n / per_row * rope_batch + n % per_row * P.
 */
void om_latent_queries(const float *x, const float *q_down, const float *q_norm, float q_eps, const float *q_up,
                       const float *kv_down, const float *kv_norm, float kv_eps, const float *kv_up,
                       const float *rope, i64 rope_half, i64 rope_batch, i64 per_row, i64 N, i64 D, i64 Q, i64 H,
                       i64 R, i64 P, i64 K, i64 V, i64 threads, float *low, float *full, float *latent,
                       float *queries) {
    const i64 width = R + P, head = K + P;
    float *raw_q = low, *raw_kv = low + N * Q, *normed = raw_kv + N * width;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        const i64 part = omp_get_thread_num(), parts = omp_get_num_threads();
        i64 from, to;
        share(Q + width, 4, part, parts, &from, &to);
        const i64 middle = from > Q ? from : to < Q ? to : Q;
        if (from < middle) dots(q_down + from * D, D, middle - from, x, D, N, D, raw_q + from, 1, Q);
        if (middle < to)
            dots(kv_down + (middle - Q) * D, D, to - middle, x, D, N, D, raw_kv + middle - Q, 1, width);
#pragma omp barrier
        for (i64 task = part; task < 2 * N; task += parts) {
            const i64 n = task / 2;
            if (task % 2)
                norm_row(raw_q + n * Q, q_norm, Q, q_eps, normed + n * Q);
            else {
                const float *cosine = rope + n / per_row * rope_batch + n % per_row * P;
                norm_row(raw_kv + n * width, kv_norm, R, kv_eps, latent + n * width);
                rotate(raw_kv + n * width + R, cosine, cosine + rope_half, P, latent + n * width + R);
            }
        }
#pragma omp barrier
        share(H, 1, part, parts, &from, &to);
        if (from < to)
            dots(q_up + from * head * Q, Q, (to - from) * head, normed, Q, N, Q, full + from * head, 1, H * head);
        for (i64 h = from; h < to; h++) {
            const float *in[N];
            float *out[N];
            for (i64 n = 0; n < N; n++) {
                const float *cosine = rope + n / per_row * rope_batch + n % per_row * P;
                in[n] = full + (n * H + h) * head;
                out[n] = queries + (n * H + h) * width;
                memset(out[n], 0, sizeof(float) * (size_t)R);
                rotate(in[n] + K, cosine, cosine + rope_half, P, out[n] + R);
            }
            add_rows(kv_up + h * (K + V) * R, R, K, in, out, N, 0, R);
        }
    }
}

/* softmax(scale * scores) in place over C; masked scores count as -inf, a row without any True gives zeros. */
static void softmax_row(float *s, const unsigned char *mask, float scale, i64 C) {
    float top = -INFINITY, sum = 0.0f;
    for (i64 c = 0; c < C; c++) {
        s[c] = mask && !mask[c] ? -INFINITY : s[c] * scale;
        top = s[c] > top ? s[c] : top;
    }
    if (top == -INFINITY) top = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (i64 c = 0; c < C; c++) {
        s[c] = fast_exp(s[c] - top);
        sum += s[c];
    }
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma omp simd
    for (i64 c = 0; c < C; c++) s[c] *= factor;
}

/* MLA after the cache: y (N, D) from queries (N, H, R + P) and the latent (B, C, R + P) of each row of N / B tokens.
 *
 * scores: room for N * H * C; mixed: N * H * R; values: N * H * V.
 */
void om_latent_outputs(const float *queries, const float *latent, i64 latent_batch, i64 latent_row,
                       const unsigned char *mask, i64 mask_batch, i64 mask_row, float scale, const float *kv_up,
                       const float *wo, i64 N, i64 per_row, i64 C, i64 D, i64 H, i64 R, i64 P, i64 K, i64 V,
                       i64 threads, float *scores, float *mixed, float *values, float *y) {
    const i64 width = R + P;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        const i64 part = omp_get_thread_num(), parts = omp_get_num_threads();
        i64 from, to;
        share(H, 1, part, parts, &from, &to);
        for (i64 n = 0; n < N && from < to; n++) {
            const float *keys = latent + n / per_row * latent_batch;
            const unsigned char *seen = mask ? mask + n / per_row * mask_batch + n % per_row * mask_row : 0;
            const float *in[to - from];
            float *out[to - from];
            dots(keys, latent_row, C, queries + (n * H + from) * width, width, to - from, width,
                 scores + (n * H + from) * C, 1, C);
            for (i64 h = from; h < to; h++) {
                in[h - from] = scores + (n * H + h) * C;
                out[h - from] = mixed + (n * H + h) * R;
                softmax_row(scores + (n * H + h) * C, seen, scale, C);
                memset(out[h - from], 0, sizeof(float) * (size_t)R);
            }
            add_rows(keys, latent_row, C, in, out, to - from, 0, R);
        }
        for (i64 h = from; h < to; h++)
            dots(kv_up + (h * (K + V) + K) * R, R, V, mixed + h * R, H * R, N, R, values + h * V, 1, H * V);
#pragma omp barrier
        share(D, 4, part, parts, &from, &to);
        if (from < to) dots(wo + from * H * V, H * V, to - from, values, H * V, N, H * V, y + from, 1, D);
    }
}

#include "kernels_decode.c"
#include "kernels_train.c"
