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

/* Keys (N, H, K + P) and values (N, H, V) from kv (N, H, K + V) and one turned rope key (N, P) for all heads. */
void om_keys(const float *kv, const float *shared, i64 N, i64 H, i64 K, i64 P, i64 V, i64 threads, float *keys,
             float *values) {
    ROWS
    for (i64 n = 0; n < N; n++)
        for (i64 h = 0; h < H; h++) {
            const i64 at = n * H + h;
            memcpy(keys + at * (K + P), kv + at * (K + V), sizeof(float) * (size_t)K);
            memcpy(keys + at * (K + P) + K, shared + n * P, sizeof(float) * (size_t)P);
            memcpy(values + at * V, kv + at * (K + V) + K, sizeof(float) * (size_t)V);
        }
}

/* The way back: d_kv (N, H, K + V) and d_shared (N, P), summed over heads. */
void om_keys_back(const float *d_keys, const float *d_values, i64 N, i64 H, i64 K, i64 P, i64 V, i64 threads,
                  float *d_kv, float *d_shared) {
    ROWS
    for (i64 n = 0; n < N; n++) {
        float *sum = d_shared + n * P;
        memset(sum, 0, sizeof(float) * (size_t)P);
        for (i64 h = 0; h < H; h++) {
            const i64 at = n * H + h;
            const float *rope = d_keys + at * (K + P) + K;
            memcpy(d_kv + at * (K + V), d_keys + at * (K + P), sizeof(float) * (size_t)K);
            memcpy(d_kv + at * (K + V) + K, d_values + at * V, sizeof(float) * (size_t)V);
#pragma omp simd
            for (i64 i = 0; i < P; i++) sum[i] += rope[i];
        }
    }
}

/* ---- causal attention of whole sequences ---- */

#define QUERIES 32 /* rows of scores at a time */

/* y (R, 16 W) = or += a b; a's element (r, k) at a[r * a_row + k * a_k], b (K, 16 W) with rows ldb apart. */
INLINE void product_tile(const float *a, i64 a_row, i64 a_k, const float *b, i64 ldb, i64 K, float *y, i64 ldy, int add,
                         const int R, const int W) {
    lanes sum[8][2];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) sum[r][w] = add ? *(const lanes *)(y + r * ldy + w * LANES) : (lanes){0};
    for (i64 k = 0; k < K; k++) {
        lanes row[2];
        for (int w = 0; w < W; w++) row[w] = *(const lanes *)(b + k * ldb + w * LANES);
        for (int r = 0; r < R; r++)
            for (int w = 0; w < W; w++) sum[r][w] += row[w] * a[r * a_row + k * a_k];
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) *(lanes *)(y + r * ldy + w * LANES) = sum[r][w];
}

/* y (M, N) = or += a b with N a multiple of LANES. */
static void product(const float *a, i64 a_row, i64 a_k, const float *b, i64 ldb, i64 M, i64 N, i64 K, float *y, i64 ldy,
                    int add) {
    for (i64 n = 0; n < N; n += 2 * LANES) {
        i64 m = 0;
        if (n + 2 * LANES <= N) {
            for (; m + 8 <= M; m += 8)
                product_tile(a + m * a_row, a_row, a_k, b + n, ldb, K, y + m * ldy + n, ldy, add, 8, 2);
            for (; m < M; m++)
                product_tile(a + m * a_row, a_row, a_k, b + n, ldb, K, y + m * ldy + n, ldy, add, 1, 2);
        } else {
            for (; m + 8 <= M; m += 8)
                product_tile(a + m * a_row, a_row, a_k, b + n, ldb, K, y + m * ldy + n, ldy, add, 8, 1);
            for (; m < M; m++)
                product_tile(a + m * a_row, a_row, a_k, b + n, ldb, K, y + m * ldy + n, ldy, add, 1, 1);
        }
    }
}

/* to (S, width) = factor * x, whose rows are `step` apart. */
static void take(const float *x, i64 step, i64 S, i64 width, float factor, float *to) {
    for (i64 s = 0; s < S; s++)
        for (i64 i = 0; i < width; i++) to[s * width + i] = factor * x[s * step + i];
}

/* to (width, ld) = x transposed, zeros from S on; a few rows at a time, so that they stay in the first cache. */
static void take_across(const float *x, i64 step, i64 S, i64 width, i64 ld, float *to) {
    for (i64 s = 0; s < ld; s += LANES) {
        const i64 here = S - s < LANES ? (S > s ? S - s : 0) : LANES;
        for (i64 i = 0; i < width; i++) {
            float *out = to + i * ld + s;
            for (i64 j = 0; j < here; j++) out[j] = x[(s + j) * step + i];
            for (i64 j = here; j < LANES; j++) out[j] = 0.0f;
        }
    }
}

/* Columns of a row of scores: S up to a multiple of LANES, and a little more so that rows do not share cache sets. */
INLINE i64 score_columns(i64 S) { return (S + LANES - 1) / LANES * LANES + LANES; }

/* y (B, S, H, V) = softmax(scale q kT, causal) v and the logarithms of the sums, lse (B, H, S).
 *
 * q, k (B, S, H, E), v (B, S, H, V); E and V multiples of LANES. room: per thread, as om_causal_room says.
 */
void om_causal(const float *q, const float *k, const float *v, float scale, i64 B, i64 S, i64 H, i64 E, i64 V,
               i64 threads, i64 own_room, float *room, float *y, float *lse) {
    const i64 ld = score_columns(S);
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (i64 task = 0; task < B * H; task++) {
        const i64 b = task / H, h = task % H;
        float *queries = room + omp_get_thread_num() * own_room, *across = queries + S * E, *values = across + E * ld;
        float *scores = values + S * V;
        take(q + (b * S * H + h) * E, H * E, S, E, scale, queries);
        take_across(k + (b * S * H + h) * E, H * E, S, E, ld, across);
        take(v + (b * S * H + h) * V, H * V, S, V, 1.0f, values);
        for (i64 from = 0; from < S; from += QUERIES) {
            const i64 rows = S - from < QUERIES ? S - from : QUERIES, keys = from + rows;
            float *out = y + ((b * S + from) * H + h) * V;
            product(queries + from * E, E, 1, across, ld, rows, (keys + LANES - 1) / LANES * LANES, E, scores, ld, 0);
            for (i64 r = 0; r < rows; r++) {
                const i64 seen = from + r + 1;
                float *s = scores + r * ld, top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
                for (i64 c = 0; c < seen; c++) top = s[c] > top ? s[c] : top;
                if (top == -INFINITY) top = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (i64 c = 0; c < seen; c++) sum += s[c] = fast_exp(s[c] - top);
                const float factor = 1.0f / sum;
#pragma omp simd
                for (i64 c = 0; c < seen; c++) s[c] *= factor;
                for (i64 c = seen; c < keys; c++) s[c] = 0.0f;
                lse[(b * H + h) * S + from + r] = top + logf(sum);
            }
            product(scores, ld, 1, values, V, rows, V, keys, out, H * V, 0);
        }
    }
}

/* The way back: dq, dk (B, S, H, E) and dv (B, S, H, V) from g (B, S, H, V), with y and lse of the way there. */
void om_causal_back(const float *g, const float *q, const float *k, const float *v, const float *y, const float *lse,
                    float scale, i64 B, i64 S, i64 H, i64 E, i64 V, i64 threads, i64 own_room, float *room, float *dq,
                    float *dk, float *dv) {
    const i64 ld = score_columns(S);
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (i64 task = 0; task < B * H; task++) {
        const i64 b = task / H, h = task % H, at = (b * S * H + h) * E, at_value = (b * S * H + h) * V;
        float *queries = room + omp_get_thread_num() * own_room, *across = queries + S * E, *keys = across + E * ld;
        float *back = keys + S * E, *values_across = back + S * V, *d_keys = values_across + V * ld;
        float *d_values = d_keys + S * E, *weights = d_values + S * V, *d_scores = weights + QUERIES * ld;
        take(q + at, H * E, S, E, scale, queries);
        take(k + at, H * E, S, E, scale, keys);
        take_across(k + at, H * E, S, E, ld, across);
        take_across(v + at_value, H * V, S, V, ld, values_across);
        take(g + at_value, H * V, S, V, 1.0f, back);
        memset(d_keys, 0, sizeof(float) * (size_t)(S * (E + V)));
        for (i64 from = 0; from < S; from += QUERIES) {
            const i64 rows = S - from < QUERIES ? S - from : QUERIES, end = from + rows;
            const i64 wide = (end + LANES - 1) / LANES * LANES;
            product(queries + from * E, E, 1, across, ld, rows, wide, E, weights, ld, 0);
            product(back + from * V, V, 1, values_across, ld, rows, wide, V, d_scores, ld, 0);
            for (i64 r = 0; r < rows; r++) {
                const i64 seen = from + r + 1;
                const float *out = y + at_value + (from + r) * H * V, *up = back + (from + r) * V;
                const float shift = lse[(b * H + h) * S + from + r];
                float *w = weights + r * ld, *d = d_scores + r * ld, dot = 0.0f;
#pragma omp simd reduction(+ : dot)
                for (i64 i = 0; i < V; i++) dot += up[i] * out[i];
#pragma omp simd
                for (i64 c = 0; c < seen; c++) {
                    w[c] = fast_exp(w[c] - shift);
                    d[c] = w[c] * (d[c] - dot);
                }
                for (i64 c = seen; c < end; c++) w[c] = d[c] = 0.0f;
            }
            product(weights, 1, ld, back + from * V, V, end, V, rows, d_values, V, 1);
            product(d_scores, 1, ld, queries + from * E, E, end, E, rows, d_keys, E, 1);
            product(d_scores, ld, 1, keys, E, rows, E, end, dq + at + from * H * E, H * E, 0);
        }
        for (i64 s = 0; s < S; s++) {
            memcpy(dk + at + s * H * E, d_keys + s * E, sizeof(float) * (size_t)E);
            memcpy(dv + at_value + s * H * V, d_values + s * V, sizeof(float) * (size_t)V);
        }
    }
}

/* Floats of room a thread needs for either way. */
int om_causal_room(i64 S, i64 E, i64 V) {
    return (int)(3 * S * E + 2 * S * V + (E + V + 2 * QUERIES) * score_columns(S));
}
