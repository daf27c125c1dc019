/* Attention of a step: included by kernels_decode.c, which has the structures and the shape letters. Keys and values lie
 * in slots of their own or in pages that rows find through a table.
 */

/* softmax(scale * scores) in place over C; masked scores count as -inf, a row without any True gives zeros. */
static void softmax_row(float *s, const unsigned char *mask, float scale, i64 C) {
    float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
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

/* The columns that token n has to look at, but for a mask. In pages there is no mask. */
INLINE i64 columns(const Step *s, i64 n) { return s->pages ? s->past[n / s->S] + n % s->S + 1 : s->C; }

/* Where a row keeps the keys or values of column c; those up to the page's end follow. */
INLINE float *column(const Step *s, const Slot *slot, float *buffer, i64 row, i64 c) {
    if (!s->pages) return buffer + row * slot->batch + c * slot->token;
    const i64 layer = slot->batch + (slot->by_loop ? s->at[row] : 0);
    const int32_t *table = s->pages + s->rows[row] * s->pages_row + layer * s->pages_layer;
    return buffer + ((i64)table[c / s->page] * s->page + c % s->page) * slot->token;
}

/* out (N, H, width) = softmax(scale q k^T) v, queries (N, H, reach) and keys (C, G, reach): this thread's share of the
 * N H heads. Those that read the same keys take them together. MLA is G = 1 with the first R channels of the keys as
 * values. */
static void attend(const Step *s, const Work *t, const Slot *slot, float *values, i64 groups, i64 reach, i64 width,
                   float *out) {
    i64 at, end;
    mine(s->N * s->H, 1, t, &at, &end);
    for (i64 next; at < end; at = next) {
        const i64 n = at / s->H, g = at % s->H * groups / s->H, row = n / s->S;
        const i64 C = columns(s, n), each = s->pages ? s->page : C;
        const unsigned char *seen = s->mask ? s->mask + row * s->mask_batch + n % s->S * s->mask_token : 0;
        const float *in[s->H];
        float *mixed[s->H], *scores = t->scores + at * s->C;
        for (next = at; next < end && next / s->H == n && next % s->H * groups / s->H == g; next++) {
            in[next - at] = t->scores + next * s->C;
            mixed[next - at] = out + next * width;
            memset(mixed[next - at], 0, sizeof(float) * (size_t)width);
        }
        for (i64 c = 0; c < C; c += each)
            dots(plain(column(s, slot, slot->keys, row, c) + g * reach), slot->token, c + each < C ? each : C - c,
                 t->queries + at * reach, reach, next - at, reach, scores + c, s->C);
        for (i64 i = at; i < next; i++) softmax_row(t->scores + i * s->C, seen, s->scale, C);
        for (i64 c = 0; c < C; c += each) {
            add_rows(plain(column(s, slot, values, row, c) + g * width), slot->token, c + each < C ? each : C - c, in,
                     mixed, next - at, 0, width);
            for (i64 i = 0; i < next - at; i++) in[i] += each;
        }
    }
}

/* In pages a token's rotation is that of its position. */
INLINE const float *rope_of(const Step *s, i64 n, i64 width) {
    const i64 row = n / s->S;
    return s->rope + (s->pages ? s->past[row] * width : row * s->rope_batch) + n % s->S * width;
}

/* Where token n's keys or values go. */
INLINE float *place(const Step *s, const Slot *slot, float *buffer, i64 n) {
    return column(s, slot, buffer, n / s->S, columns(s, n) - (s->pages ? 1 : s->S - n % s->S));
}

/* MLA (model/attention.py) on the latents themselves: normed (N, D) -> values (N, H, V). */
static void latent_attention(const Step *s, const Layer *l, const Slot *slot, const Work *t) {
    const i64 N = s->N, H = s->H, Q = s->Q, R = s->R, P = s->P, K = s->K, V = s->V, width = R + P, head = K + P;
    i64 from, to;
    project(l->q_down, Q, s->D, t->normed, N, t->raw, Q + width, t);
    project(l->kv_down, width, s->D, t->normed, N, t->raw + Q, Q + width, t);
#pragma omp barrier
    for (i64 n = 0; n < N; n++) {
        const float *raw = t->raw + n * (Q + width), *cosine = rope_of(s, n, P);
        norm_row(raw, l->q_norm, Q, s->eps, t->low + n * Q);
        if (n % t->parts != t->part) continue;
        float *latent = place(s, slot, slot->keys, n);
        norm_row(raw + Q, l->kv_norm, R, s->eps, latent);
        rotate(raw + Q + R, cosine, cosine + s->rope_half, P, latent + R);
    }
    mine(H, 1, t, &from, &to);
    if (from < to)
        dots(below(l->q_up, from * head, Q), Q, (to - from) * head, t->low, Q, N, Q, t->full + from * head,
             H * head);
    for (i64 h = from; h < to; h++) {
        const float *in[N];
        float *out[N];
        for (i64 n = 0; n < N; n++) {
            const float *cosine = rope_of(s, n, P);
            in[n] = t->full + (n * H + h) * head;
            out[n] = t->queries + (n * H + h) * width;
            memset(out[n], 0, sizeof(float) * (size_t)R);
            rotate(in[n] + K, cosine, cosine + s->rope_half, P, out[n] + R);
        }
        add_rows(below(l->kv_up, h * (K + V), R), R, K, in, out, N, 0, R);
    }
#pragma omp barrier
    attend(s, t, slot, slot->keys, 1, width, R, t->mixed);
    if (N > 1) { /* otherwise this thread's heads are still its own */
#pragma omp barrier
    }
    for (i64 h = from; h < to; h++)
        dots(below(l->kv_up, h * (K + V) + K, R), R, V, t->mixed + h * R, H * R, N, R, t->values + h * V, H * V);
}

/* GQA (model/attention.py): normed (N, D) -> values (N, H, K). */
static void grouped_attention(const Step *s, const Layer *l, const Slot *slot, const Work *t) {
    const i64 N = s->N, H = s->H, G = s->G, K = s->K, all = (H + 2 * G) * K;
    i64 from, to;
    project(l->wq, H * K, s->D, t->normed, N, t->raw, all, t);
    project(l->wk, G * K, s->D, t->normed, N, t->raw + H * K, all, t);
    project(l->wv, G * K, s->D, t->normed, N, t->raw + (H + G) * K, all, t);
    mine(H, 1, t, &from, &to);
#pragma omp barrier
    for (i64 n = 0; n < N; n++) {
        float *raw = t->raw + n * all, room[K];
        const float *cosine = rope_of(s, n, K);
        for (i64 h = from; h < to; h++) {
            if (l->q_norm) norm_row(raw + h * K, l->q_norm, K, s->eps, room);
            rotate(l->q_norm ? room : raw + h * K, cosine, cosine + s->rope_half, K, t->queries + (n * H + h) * K);
        }
        if (n % t->parts != t->part) continue;
        float *keys = place(s, slot, slot->keys, n);
        for (i64 g = 0; g < G; g++) {
            if (l->k_norm) norm_row(raw + (H + g) * K, l->k_norm, K, s->eps, room);
            rotate(l->k_norm ? room : raw + (H + g) * K, cosine, cosine + s->rope_half, K, keys + g * K);
        }
        memcpy(place(s, slot, slot->values, n), raw + (H + G) * K, sizeof(float) * (size_t)(G * K));
    }
#pragma omp barrier
    attend(s, t, slot, slot->values, G, K, K, t->values);
}
