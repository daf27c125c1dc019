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
    if (from < to) dots(below(w, from, len), len, to - from, x, len, N, len, y + from, ldy);
}

#include "kernels_attention.c"

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
            out[i] = t->hidden + slots[begin + i] * (2 * F + LANES); /* not a multiple of a page: loads would wait */
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
        dots(below(l->gate_up, from, D), D, to - from, t->normed, D, N, D, t->side + from, 2 * Fs);
        dots(below(l->gate_up, Fs + from, D), D, to - from, t->normed, D, N, D, t->side + Fs + from, 2 * Fs);
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
    if (Fs && from < to) dots(below(l->down, from, Fs), Fs, to - from, t->side, 2 * Fs, N, Fs, t->z + from, D);
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
    if (from < to) dots(below(l->wo, from, width), width, to - from, t->values, width, N, width, t->y + from, D);
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
        if (s->L) dots(plain(s->lora_down), D, s->L, z, D, 1, D, t->low, 1);
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
        dots(plain(s->halt), s->D, 1, h, s->D, 1, s->D, &logit, 1);
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
                  {&t->hidden, N * s->k * (2 * s->F + LANES)},
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
