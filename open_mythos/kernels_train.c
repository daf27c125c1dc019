/* Fused float32 kernels for training on the CPU, included by kernels.c; see fused.py for shapes and for when they are used.
 *
 * Between the matrix products a training step moves activations through memory many times, one small operator after
 * the other. Each entry here reads its inputs once and writes its outputs once. Rows are shared over threads; sums
 * over rows run in an order fixed by the shapes and the number of threads.
 */

#define ROWS _Pragma("omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)")

/* y = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps), kept for the way back: (N, D), (D) -> (N, D), (N). */
void om_norm(const float *x, const float *weight, float eps, i64 N, i64 D, i64 threads, float *y, float *rstd) {
    ROWS
    for (i64 n = 0; n < N; n++) {
        const float *in = x + n * D;
        float *out = y + n * D, square = 0.0f;
#pragma omp simd reduction(+ : square)
        for (i64 i = 0; i < D; i++) square += in[i] * in[i];
        const float scale = rstd[n] = 1.0f / sqrtf(square / (float)D + eps);
#pragma omp simd
        for (i64 i = 0; i < D; i++) out[i] = in[i] * scale * weight[i];
    }
}

/* dx = rstd (g w - x rstd^2 mean(g w x)), dw = sum over rows of g x rstd; `part` is room for threads * D. */
void om_norm_back(const float *g, const float *x, const float *weight, const float *rstd, i64 N, i64 D, i64 threads,
                  float *part, float *dx, float *dw) {
    memset(part, 0, sizeof(float) * (size_t)(threads * D));
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        float *own = part + omp_get_thread_num() * D;
        i64 from, to;
        share(N, 1, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
        for (i64 n = from; n < to; n++) {
            const float *in = x + n * D, *up = g + n * D, scale = rstd[n];
            float *out = dx + n * D, dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (i64 i = 0; i < D; i++) dot += up[i] * weight[i] * in[i];
            const float pull = dot * scale * scale / (float)D;
#pragma omp simd
            for (i64 i = 0; i < D; i++) {
                own[i] += up[i] * in[i] * scale;
                out[i] = scale * (up[i] * weight[i] - in[i] * pull);
            }
        }
    }
    memcpy(dw, part, sizeof(float) * (size_t)D);
    for (i64 t = 1; t < threads; t++)
        for (i64 i = 0; i < D; i++) dw[i] += part[t * D + i];
}

/* y (N, F) = silu(gate) * up * weights[n] of x (N, 2F); weights may be missing. */
void om_gate(const float *x, const float *weights, i64 N, i64 F, i64 threads, float *y) {
    ROWS
    for (i64 n = 0; n < N; n++) {
        const float *gate = x + n * 2 * F, *up = gate + F, weight = weights ? weights[n] : 1.0f;
        float *out = y + n * F;
#pragma omp simd
        for (i64 i = 0; i < F; i++) out[i] = silu(gate[i]) * up[i] * weight;
    }
}

/* dx (N, 2F) and, with weights, d_weights (N) from g (N, F). */
void om_gate_back(const float *g, const float *x, const float *weights, i64 N, i64 F, i64 threads, float *dx,
                  float *d_weights) {
    ROWS
    for (i64 n = 0; n < N; n++) {
        const float *gate = x + n * 2 * F, *up = gate + F, *back = g + n * F, weight = weights ? weights[n] : 1.0f;
        float *d_gate = dx + n * 2 * F, *d_up = d_gate + F, dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (i64 i = 0; i < F; i++) {
            const float sigmoid = 1.0f / (1.0f + fast_exp(-gate[i])), act = gate[i] * sigmoid;
            const float to_up = back[i] * act;
            dot += to_up * up[i];
            d_up[i] = weight * to_up;
            d_gate[i] = weight * back[i] * up[i] * (sigmoid + act * (1.0f - sigmoid));
        }
        if (weights) d_weights[n] = dot;
    }
}

/* y[n] = sum over its k slots of rows[place[n, i]]; (N k, D) -> (N, D). */
void om_gather_sum(const float *rows, const i64 *place, i64 N, i64 k, i64 D, i64 threads, float *y) {
    ROWS
    for (i64 n = 0; n < N; n++) {
        float *out = y + n * D;
        memcpy(out, rows + place[n * k] * D, sizeof(float) * (size_t)D);
        for (i64 i = 1; i < k; i++) {
            const float *in = rows + place[n * k + i] * D;
#pragma omp simd
            for (i64 c = 0; c < D; c++) out[c] += in[c];
        }
    }
}

/* Rotate P channels (halves convention) by the table's row; `sign` -1 rotates back. */
INLINE void turn(const float *x, const float *cosine, const float *sine, float sign, i64 P, float *y) {
    const i64 half = P / 2;
#pragma omp simd
    for (i64 i = 0; i < half; i++) { /* the second half of `sine` is what the first half is the negative of */
        const float s = sign * sine[i + half], c = cosine[i], a = x[i], b = x[i + half];
        y[i] = a * c - b * s;
        y[i + half] = b * c + a * s;
    }
}

/* y (N, H, K + P) = x with the last P channels of every head turned; also the way back, with sign -1.
 *
 * rope: cosines, then sines `rope_half` floats on; token n's row at n / per_row * rope_batch + n % per_row * P.
 */
void om_turn_heads(const float *x, const float *rope, i64 rope_half, i64 rope_batch, i64 per_row, float sign, i64 N,
                   i64 H, i64 K, i64 P, i64 threads, float *y) {
    const i64 head = K + P;
    ROWS
    for (i64 n = 0; n < N; n++) {
        const float *cosine = rope + n / per_row * rope_batch + n % per_row * P;
        for (i64 h = 0; h < H; h++) {
            const float *in = x + (n * H + h) * head;
            float *out = y + (n * H + h) * head;
            memcpy(out, in, sizeof(float) * (size_t)K);
            turn(in + K, cosine, cosine + rope_half, sign, P, out + K);
        }
    }
}

/* Keys (N, H, K + P) and values (N, H, W >= V, zeros past V) from kv (N, H, K + V) and one turned rope key (N, P;
 * rows `step` apart) for all heads.
 */
void om_keys(const float *kv, const float *shared, i64 step, i64 N, i64 H, i64 K, i64 P, i64 V, i64 W, i64 threads,
             float *keys, float *values) {
    ROWS
    for (i64 n = 0; n < N; n++)
        for (i64 h = 0; h < H; h++) {
            const i64 at = n * H + h;
            memcpy(keys + at * (K + P), kv + at * (K + V), sizeof(float) * (size_t)K);
            memcpy(keys + at * (K + P) + K, shared + n * step, sizeof(float) * (size_t)P);
            memcpy(values + at * W, kv + at * (K + V) + K, sizeof(float) * (size_t)V);
            memset(values + at * W + V, 0, sizeof(float) * (size_t)(W - V));
        }
}

/* The way back: d_kv (N, H, K + V) and d_shared (N, P), summed over heads. */
void om_keys_back(const float *d_keys, const float *d_values, i64 N, i64 H, i64 K, i64 P, i64 V, i64 W, i64 threads,
                  float *d_kv, float *d_shared) {
    ROWS
    for (i64 n = 0; n < N; n++) {
        float *sum = d_shared + n * P;
        memset(sum, 0, sizeof(float) * (size_t)P);
        for (i64 h = 0; h < H; h++) {
            const i64 at = n * H + h;
            const float *rope = d_keys + at * (K + P) + K;
            memcpy(d_kv + at * (K + V), d_keys + at * (K + P), sizeof(float) * (size_t)K);
            memcpy(d_kv + at * (K + V) + K, d_values + at * W, sizeof(float) * (size_t)V);
#pragma omp simd
            for (i64 i = 0; i < P; i++) sum[i] += rope[i];
        }
    }
}
