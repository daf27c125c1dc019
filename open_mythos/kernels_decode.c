/* One step of the whole model for a few tokens, included by kernels.c; see model/decode.py for when it is used.
 *
 * One OpenMP region runs everything from the embedding to the logits: the threads share the rows of each matrix,
 * stream them in memory order, and meet at barriers. What is small (norms, the state, halting) every thread
 * computes for itself, so that it needs no barrier. Sums run in an order fixed by the shapes and the number of
 * threads: the same bits at every run.
 *
 * Shape letters: N tokens, S of them in each row of the batch, C context (cached and new), D model width, H heads,
 * G key/value heads, K head width (MLA: without rope), P rope width, R latent rank, Q query rank, V value width,
 * E experts, F expert width, Fs shared or dense width, k experts a token, T loops, L rank of the LoRA.
 */

/* ---- what Python hands over: kernels.py has the same fields in the same order ---- */

/* A transformer block; what it does not have is null. */
typedef struct {
    const float *attn_norm, *ffn_norm;        /* (D), (D) */
    Matrix wo;                                /* (D, H V) */
    Matrix q_down, q_up, kv_down, kv_up;      /* MLA: (Q, D), (H (K + P), Q), (R + P, D), (H (K + V), R) */
    const float *kv_norm;                     /* MLA: (R) */
    Matrix wq, wk, wv;                        /* GQA: (H K, D), (G K, D), (G K, D) */
    const float *q_norm, *k_norm;             /* MLA: (Q), null; GQA: (K), (K) or both null */
    Matrix router;                            /* (E, D) */
    const float *router_bias;                 /* (E) */
    Matrix w_in, w_out;                       /* (E, D, 2F), (E, F, D) */
    Matrix gate_up, down;                     /* shared expert or dense: (2Fs, D), (D, Fs) */
    i64 Fs;
} Layer;

/* Where a layer keeps keys and values, (B, C, G, K) or latents (B, C, R + P): floats from row to row of the batch
 * and from token to token. In pages: the pool, the layer's number in the table (plus the row's loop, if by_loop), and
 * floats from token to token. */
typedef struct {
    float *keys, *values;
    i64 batch, token, by_loop;
} Slot;

typedef struct {
    i64 threads, N, S, C, D, H, G, K, P, R, Q, V, E, F, k, T, L;
    i64 n_prelude, n_coda, vocab, loop_dim, lora_rows, keeps_input, starts_at_input;
    float eps, scale, embed_scale, still_running;
    const i64 *ids;                               /* (N) */
    const float *embed;                           /* (vocab, D) */
    const float *rope;                            /* cosines; the sines lie rope_half further, */
    i64 rope_half, rope_batch;                    /* a row of the batch rope_batch, a token P or K */
    const unsigned char *mask;                    /* (B, S, C) by these strides, or null */
    i64 mask_batch, mask_token;
    const Layer *layers;                          /* prelude, the looped block, coda */
    const Slot *slots;                            /* prelude, T loops, coda */
    const float *input_norm, *loop_norm;          /* (D) or null, (D) */
    const float *log_A, *log_dt, *B;              /* (D), (1), (D) */
    const float *lora_down, *lora_B, *lora_scale; /* (L, D), (L, D), (lora_rows, L), or null */
    const float *update_norm, *state_norm;        /* (D) or null */
    const float *halt, *halt_bias;                /* (D), (1), or null: the last state counts */
    const float *norm;                            /* (D) */
    Matrix head;                                  /* (vocab, D) */
    float *room, *logits;                         /* as om_room says; (N, vocab) */
    const int32_t *pages;                         /* table (rows, layers, blocks) of pages; null: slots are whole */
    i64 pages_row, pages_layer, page;             /* entries from row to row and from layer to layer; tokens a page */
    const i64 *rows, *past, *at;                  /* pages: of each of the N / S rows its number, cached tokens, loop */
    const unsigned char *ruled;                   /* pages: whether its last state counts, whatever halting says */
    float *kept_e, *kept_h, *before, *picked, *kept_mass; /* om_part: by row number, (D) each, the last (1) */
} Step;

/* One thread's view: its number, memory that all share, and memory of its own. */
typedef struct {
    i64 part, parts;
    float *raw, *full, *queries, *scores, *mixed, *values, *y, *z, *routes, *hidden, *side, *decay, *sums;
    float *x, *normed, *low, *h, *e, *chosen, *mass, *sum;
} Work;

/* This thread's share of the range 0..n, cut at multiples of `grain`. */
INLINE void mine(i64 n, i64 grain, const Work *t, i64 *from, i64 *to) {
    share(n, grain, t->part, t->parts, from, to);
}

/* This thread's rows of y[n * ldy + row] = w[row] . x[n], w (rows, len), x (N, len). */
static void project(Matrix w, i64 rows, i64 len, const float *x, i64 N, float *y, i64 ldy, const Work *t) {
    i64 from, to;
    mine(rows, 4, t, &from, &to);
    if (from < to) dots(below(w, from, len), len, to - from, x, len, N, len, y + from, 1, ldy);
}

/* ---- attention ---- */

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

/* The columns that token n has to look at, but for a mask. In pages there is no mask. */
INLINE i64 columns(const Step *s, i64 n) { return s->pages ? s->past[n / s->S] + n % s->S + 1 : s->C; }

/* Where a row keeps the keys or values of column c; those up to the page's end follow. */
INLINE float *column(const Step *s, const Slot *slot, float *buffer, i64 row, i64 c) {
    if (!s->pages) return buffer + row * slot->batch + c * slot->token;
    const i64 layer = slot->batch + (slot->by_loop ? s->at[row] : 0);
    const int32_t *table = s->pages + s->rows[row] * s->pages_row + layer * s->pages_layer;
    return buffer + ((i64)table[c / s->page] * s->page + c % s->page) * slot->token;
}

/* Heads from..to: out (N, H, width) = softmax(scale q k^T) v, queries (N, H, reach) and keys (C, G, reach). Heads
 * that read the same keys take them together. MLA is G = 1 with the first R channels of the keys as values. */
static void attend(const Step *s, const Work *t, const Slot *slot, float *values, i64 groups, i64 reach, i64 width,
                   i64 from, i64 to, float *out) {
    for (i64 n = 0; n < s->N; n++) {
        const i64 row = n / s->S, C = columns(s, n), each = s->pages ? s->page : C;
        const unsigned char *seen = s->mask ? s->mask + n / s->S * s->mask_batch + n % s->S * s->mask_token : 0;
        for (i64 h = from, next; h < to; h = next) {
            const i64 g = h * groups / s->H;
            const float *in[s->H];
            float *mixed[s->H];
            for (next = h; next < to && next * groups / s->H == g; next++) {
                in[next - h] = t->scores + (n * s->H + next) * s->C;
                mixed[next - h] = out + (n * s->H + next) * width;
                memset(mixed[next - h], 0, sizeof(float) * (size_t)width);
            }
            float *scores = t->scores + (n * s->H + h) * s->C;
            for (i64 c = 0; c < C; c += each)
                dots(plain(column(s, slot, slot->keys, row, c) + g * reach), slot->token, c + each < C ? each : C - c,
                     t->queries + (n * s->H + h) * reach, reach, next - h, reach, scores + c, 1, s->C);
            for (i64 i = h; i < next; i++) softmax_row(scores + (i - h) * s->C, seen, s->scale, C);
            for (i64 c = 0; c < C; c += each) {
                add_rows(plain(column(s, slot, values, row, c) + g * width), slot->token,
                         c + each < C ? each : C - c, in, mixed, next - h, 0, width);
                for (i64 i = h; i < next; i++) in[i - h] += each;
            }
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
        dots(below(l->q_up, from * head, Q), Q, (to - from) * head, t->low, Q, N, Q, t->full + from * head, 1,
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
    attend(s, t, slot, slot->keys, 1, width, R, from, to, t->mixed);
    for (i64 h = from; h < to; h++)
        dots(below(l->kv_up, h * (K + V) + K, R), R, V, t->mixed + h * R, H * R, N, R, t->values + h * V, 1, H * V);
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
    attend(s, t, slot, slot->values, G, K, K, from, to, t->values);
}

/* ---- feed-forward ---- */

/* The k largest of logits + bias and the softmax of their logits; a NaN counts as the largest, as in PyTorch. */
static void choose(const Step *s, const float *logits, const float *bias, i64 *experts, float *weights) {
    float top = -INFINITY, sum = 0.0f;
    unsigned char taken[s->E];
    memset(taken, 0, sizeof taken);
    for (i64 j = 0; j < s->k; j++) {
        i64 best = -1;
        float held = 0.0f;
        for (i64 e = 0; e < s->E; e++) {
            const float now = logits[e] + bias[e];
            if (taken[e] || (best >= 0 && !(now > held) && !(now != now && held == held))) continue;
            best = e;
            held = now;
        }
        taken[best] = 1;
        experts[j] = best;
        weights[j] = logits[best];
        top = weights[j] > top ? weights[j] : top;
    }
    for (i64 j = 0; j < s->k; j++) sum += weights[j] = expf(weights[j] - top);
    for (i64 j = 0; j < s->k; j++) weights[j] /= sum;
}

/* This thread's hidden columns of the routed experts (model/moe.py), added up in its own sum (N, D). Columns of all
 * used experts in a row are cut evenly by their cost: reading them once, and working on them once a token. */
static void routed_experts(const Step *s, const Layer *l, const Work *t) {
    enum { READ = 2 };
    const i64 total = s->N * s->k, D = s->D, F = s->F, blocks = (F + LANES - 1) / LANES;
    i64 experts[total], slots[total], first[s->E + 1], from, to, cost = 0;
    float weights[total], *out[total];
    const float *in[total];
    for (i64 n = 0; n < s->N; n++)
        choose(s, t->routes + n * s->E, l->router_bias, experts + n * s->k, weights + n * s->k);
    memset(first, 0, sizeof first);
    for (i64 i = 0; i < total; i++) first[experts[i] + 1]++;
    for (i64 e = 0; e < s->E; e++) {
        cost += first[e + 1] ? blocks * (READ + first[e + 1]) : 0;
        first[e + 1] += first[e];
    }
    for (i64 i = 0; i < total; i++) slots[first[experts[i]]++] = i; /* sorted by expert; first is now one ahead */
    memset(t->sum, 0, sizeof(float) * (size_t)(s->N * D));
    mine(cost, 1, t, &from, &to);
    for (i64 e = 0, begin = 0; e < s->E; begin = first[e++]) {
        const i64 m = first[e] - begin, each = READ + m;
        if (!m) continue;
        i64 low = from <= 0 ? 0 : from / each * LANES, high = to <= 0 ? 0 : to / each * LANES;
        from -= blocks * each;
        to -= blocks * each;
        if (high > F) high = F;
        if (low >= high) continue;
        for (i64 i = 0; i < m; i++) {
            in[i] = t->normed + slots[begin + i] / s->k * D;
            out[i] = t->hidden + slots[begin + i] * 2 * F;
            memset(out[i] + low, 0, sizeof(float) * (size_t)(high - low));
            memset(out[i] + F + low, 0, sizeof(float) * (size_t)(high - low));
        }
        const Matrix w = below(l->w_in, e * D, 2 * F);
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
            in[i] = h + low;
            out[i] = t->sum + slots[begin + i] / s->k * D;
        }
        add_rows(below(l->w_out, e * F + low, D), D, high - low, in, out, m, 0, D);
    }
}

/* z = y + ffn(norm(y)), dense, routed, shared, or the last two. */
static void feed_forward(const Step *s, const Layer *l, const Work *t) {
    const i64 N = s->N, D = s->D, Fs = l->Fs;
    i64 from, to;
    for (i64 n = 0; n < N; n++) norm_row(t->y + n * D, l->ffn_norm, D, s->eps, t->normed + n * D);
    if (l->router.at) project(l->router, s->E, D, t->normed, N, t->routes, s->E, t);
    if (Fs) {
        mine(Fs, LANES, t, &from, &to);
        dots(below(l->gate_up, from, D), D, to - from, t->normed, D, N, D, t->side + from, 1, 2 * Fs);
        dots(below(l->gate_up, Fs + from, D), D, to - from, t->normed, D, N, D, t->side + Fs + from, 1, 2 * Fs);
        for (i64 n = 0; n < N; n++) {
            float *h = t->side + n * 2 * Fs;
#pragma omp simd
            for (i64 c = from; c < to; c++) h[c] = silu(h[c]) * h[Fs + c];
        }
    }
    if (l->router.at) {
#pragma omp barrier
        routed_experts(s, l, t);
    }
#pragma omp barrier
    mine(D, LANES, t, &from, &to);
    if (Fs && from < to) dots(below(l->down, from, Fs), Fs, to - from, t->side, 2 * Fs, N, Fs, t->z + from, 1, D);
    for (i64 n = 0; n < N; n++)
        for (i64 i = n * D + from; i < n * D + to; i++) {
            float sum = t->y[i] + (Fs ? t->z[i] : 0.0f);
            for (i64 part = 0; l->router.at && part < t->parts; part++) sum += t->sums[part * N * D + i];
            t->z[i] = sum;
        }
}

/* ---- the model ---- */

/* z = block(x) for all threads to read. */
static void block(const Step *s, const Layer *l, const Slot *slot, const Work *t) {
    const i64 N = s->N, D = s->D, width = s->H * (s->R ? s->V : s->K);
    i64 from, to;
    for (i64 n = 0; n < N; n++) norm_row(t->x + n * D, l->attn_norm, D, s->eps, t->normed + n * D);
    if (s->R)
        latent_attention(s, l, slot, t);
    else
        grouped_attention(s, l, slot, t);
#pragma omp barrier
    mine(D, LANES, t, &from, &to);
    if (from < to) dots(below(l->wo, from, width), width, to - from, t->values, width, N, width, t->y + from, 1, D);
    for (i64 n = 0; n < N; n++)
        for (i64 i = n * D + from; i < n * D + to; i++) t->y[i] += t->x[i];
#pragma omp barrier
    feed_forward(s, l, t);
#pragma omp barrier
}

static void layers(const Step *s, const Layer *l, const Slot *slot, i64 count, const Work *t) {
    for (i64 i = 0; i < count; i++) {
        block(s, l + i, slot + i, t);
        memcpy(t->x, t->z, sizeof(float) * (size_t)(s->N * s->D));
    }
}

/* The loop that token n is in; all in this one, but where each row has its own. */
INLINE i64 loop_of(const Step *s, i64 loop, i64 n) { return s->at ? s->at[n / s->S] : loop; }

/* x = norm(h + loop embedding + e) (RecurrentBlock.forward). */
static void loop_input(const Step *s, i64 loop, const Work *t) {
    const i64 D = s->D, half = (s->loop_dim + 1) / 2;
    float embedding[s->loop_dim + 1];
    for (i64 i = 0; i < s->N * D; i++) t->x[i] = t->h[i] + t->e[i];
    for (i64 n = 0, last = -1; n < s->N; n++) {
        const i64 now = loop_of(s, loop, n);
        for (i64 i = 0; now != last && i < s->loop_dim; i++) {
            const float angle = (float)now * powf(10000.0f, -(float)(2 * (i % half)) / (float)s->loop_dim);
            embedding[i] = i < half ? sinf(angle) : cosf(angle);
        }
        last = now;
        for (i64 i = 0; i < s->loop_dim; i++) t->x[n * D + i] += embedding[i];
        norm_row(t->x + n * D, s->loop_norm, D, s->eps, t->x + n * D);
    }
}

/* h = A h + B e + u, u = block(x) [- x] + lora(block(x)), perhaps normalised; then the norm of the state. */
static void next_state(const Step *s, i64 loop, const Work *t) {
    const i64 D = s->D;
    for (i64 n = 0; n < s->N; n++) {
        const i64 now = loop_of(s, loop, n);
        const float *scale = s->lora_scale + (now < s->lora_rows ? now : s->lora_rows - 1) * s->L;
        float *h = t->h + n * D;
        float *x = t->x + n * D, *u = x; /* x is made anew in the next loop */
        const float *z = t->z + n * D, *e = t->e + n * D;
#pragma omp simd
        for (i64 i = 0; i < D; i++) u[i] = s->keeps_input ? z[i] : z[i] - x[i];
        if (s->L) dots(plain(s->lora_down), D, s->L, z, D, 1, D, t->low, 1, 1);
        for (i64 r = 0; r < s->L; r++) {
            const float amount = t->low[r] * scale[r], *row = s->lora_B + r * D;
#pragma omp simd
            for (i64 i = 0; i < D; i++) u[i] += amount * row[i];
        }
        if (s->update_norm) norm_row(u, s->update_norm, D, s->eps, u);
#pragma omp simd
        for (i64 i = 0; i < D; i++) h[i] = t->decay[i] * h[i] + (s->B[i] * e[i] + u[i]);
        if (s->state_norm) norm_row(h, s->state_norm, D, s->eps, h);
    }
}

/* Whether the model's own halting chooses token n's state. */
INLINE int halting(const Step *s, i64 n) { return s->halt && !(s->ruled && s->ruled[n / s->S]); }

/* A position that still runs takes this loop's state, then may stop (HaltingWeights.observe). */
static void observe(const Step *s, i64 loop, const Work *t) {
    for (i64 n = 0; n < s->N; n++) {
        const float *h = t->h + n * s->D;
        const int halts = halting(s, n);
        const i64 now = loop_of(s, loop, n);
        float logit;
        if (halts && now && !(t->mass[n] > s->still_running)) continue;
        memcpy(t->chosen + n * s->D, h, sizeof(float) * (size_t)s->D);
        if (!halts) continue;
        dots(plain(s->halt), s->D, 1, h, s->D, 1, s->D, &logit, 1, 1);
        t->mass[n] = (now ? t->mass[n] : 1.0f) * (1.0f - 1.0f / (1.0f + expf(-(logit + *s->halt_bias))));
    }
}

/* e and the first state, of the prelude's output in x. */
static void first_state(const Step *s, const Work *t) {
    const size_t bytes = sizeof(float) * (size_t)(s->N * s->D);
    memcpy(t->e, t->x, bytes);
    for (i64 n = 0; s->input_norm && n < s->N; n++)
        norm_row(t->x + n * s->D, s->input_norm, s->D, s->eps, t->e + n * s->D);
    if (s->starts_at_input)
        memcpy(t->h, t->e, bytes);
    else
        memset(t->h, 0, bytes);
}

/* A of the injection. */
static void find_decay(const Step *s, const Work *t) {
    i64 from, to;
    mine(s->D, LANES, t, &from, &to);
    for (i64 i = from; i < to; i++) {
        const float log = s->log_A[i] + *s->log_dt;
        t->decay[i] = expf(-expf(log < -15.0f ? -15.0f : log > 4.4f ? 4.4f : log));
    }
#pragma omp barrier
}

static void one_loop(const Step *s, i64 loop, const Layer *l, const Slot *slot, const Work *t) {
    loop_input(s, loop, t);
    block(s, l, slot, t);
    next_state(s, loop, t);
    observe(s, loop, t);
}

/* The loops: x holds the prelude's output before, and the chosen state after. */
static void think(const Step *s, const Layer *l, const Slot *slot, const Work *t) {
    first_state(s, t);
    find_decay(s, t);
    for (i64 loop = 0; loop < s->T; loop++) one_loop(s, loop, l, slot + loop, t);
    memcpy(t->x, t->chosen, sizeof(float) * (size_t)(s->N * s->D));
}

INLINE i64 most(i64 a, i64 b) { return a > b ? a : b; }

/* Lays a thread's view into the room and returns the floats that the whole takes; a null room is only counted. */
static i64 lay_out(const Step *s, float *room, Work *t) {
    const i64 N = s->N, D = s->D, H = s->H;
    i64 at = 0, widest = 0;
    for (i64 i = 0; i < s->n_prelude + 1 + s->n_coda; i++) widest = most(widest, s->layers[i].Fs);
    const struct {
        float **place;
        i64 floats;
    } shared[] = {{&t->raw, N * most(s->Q + s->R + s->P, (H + 2 * s->G) * s->K)},
                  {&t->full, N * H * (s->K + s->P)},
                  {&t->queries, N * H * most(s->R + s->P, s->K)},
                  {&t->scores, N * H * s->C},
                  {&t->mixed, N * H * s->R},
                  {&t->values, N * H * most(s->V, s->K)},
                  {&t->y, N * D},
                  {&t->z, N * D},
                  {&t->routes, N * s->E},
                  {&t->hidden, N * s->k * 2 * s->F},
                  {&t->side, N * 2 * widest},
                  {&t->decay, D},
                  {&t->sums, s->threads * N * D}},
      own[] = {{&t->x, N * D}, {&t->normed, N * D}, {&t->low, most(N * s->Q, s->L)}, {&t->h, N * D}, {&t->e, N * D},
               {&t->chosen, N * D}, {&t->mass, N}};
    for (size_t i = 0; i < sizeof shared / sizeof *shared; at += (shared[i++].floats + 31) / 16 * 16)
        *shared[i].place = room ? room + at : 0;
    t->sum = room ? t->sums + t->part * N * D : 0;
    const i64 begin = at;
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) at += (own[i].floats + 31) / 16 * 16;
    const i64 each = at - begin;
    at = begin + t->part * each;
    for (size_t i = 0; i < sizeof own / sizeof *own; at += (own[i++].floats + 31) / 16 * 16)
        *own[i].place = room ? room + at : 0;
    return begin + s->threads * each;
}

static void embed(const Step *s, const Work *t) {
    for (i64 n = 0; n < s->N; n++)
        for (i64 i = 0; i < s->D; i++) t->x[n * s->D + i] = s->embed[s->ids[n] * s->D + i] * s->embed_scale;
}

static void decode(const Step *s, const Work *t) {
    for (i64 n = 0; n < s->N; n++) norm_row(t->x + n * s->D, s->norm, s->D, s->eps, t->normed + n * s->D);
    project(s->head, s->vocab, s->D, t->normed, s->N, s->logits, s->vocab, t);
}

/* ---- entries ---- */

/* The floats of memory that a step needs as its room. */
void om_room(const Step *s, i64 *floats) {
    Work work = {0};
    *floats = lay_out(s, 0, &work);
}

/* Token ids to logits; writes the new tokens' keys and values into the slots. */
void om_step(const Step *s) {
#pragma omp parallel num_threads((int)s->threads) if (s->threads > 1)
    {
        Work work = {.part = omp_get_thread_num(), .parts = omp_get_num_threads()}, *t = &work;
        const Layer *l = s->layers;
        const Slot *slot = s->slots;
        lay_out(s, s->room, t);
        embed(s, t);
        layers(s, l, slot, s->n_prelude, t);
        think(s, l + s->n_prelude, slot + s->n_prelude, t);
        layers(s, l + s->n_prelude + 1, slot + s->n_prelude + s->T, s->n_coda, t);
        decode(s, t);
    }
}
