/* Parts of a token in rows that are at different positions and loops, with keys and values in pages: included by
 * kernels.c after kernels_decode.c, whose pieces it puts together; see model/paged.py. What a row keeps from part to
 * part lies where Step says, by the row's number.
 */

/* The prelude, of one token a row: e, h and mass are kept. */
static void begin_token(const Step *s, const Work *t) {
    embed(s, t);
    layers(s, s->layers, s->slots, s->n_prelude, t);
    first_state(s, t);
    for (i64 n = t->part; n < s->N; n += t->parts) {
        memcpy(s->kept_e + s->rows[n] * s->D, t->e + n * s->D, sizeof(float) * (size_t)s->D);
        memcpy(s->kept_h + s->rows[n] * s->D, t->h + n * s->D, sizeof(float) * (size_t)s->D);
        s->kept_mass[s->rows[n]] = 1.0f;
    }
}

/* One loop of each row, its own, from what is kept to what is kept. */
static void advance(const Step *s, const Work *t) {
    const size_t bytes = sizeof(float) * (size_t)s->D;
    for (i64 n = 0; n < s->N; n++) {
        memcpy(t->e + n * s->D, s->kept_e + s->rows[n] * s->D, bytes);
        memcpy(t->h + n * s->D, s->kept_h + s->rows[n] * s->D, bytes);
        if (!halting(s, n)) continue;
        memcpy(t->chosen + n * s->D, s->picked + s->rows[n] * s->D, bytes);
        t->mass[n] = s->kept_mass[s->rows[n]];
    }
    find_decay(s, t);
    one_loop(s, 0, s->layers + s->n_prelude, s->slots + s->n_prelude, t);
    for (i64 n = t->part; n < s->N; n += t->parts) { /* all have read it, since there were barriers */
        if (s->ruled[n]) memcpy(s->before + s->rows[n] * s->D, s->kept_h + s->rows[n] * s->D, bytes);
        memcpy(s->kept_h + s->rows[n] * s->D, t->h + n * s->D, bytes);
        if (!halting(s, n)) continue;
        memcpy(s->picked + s->rows[n] * s->D, t->chosen + n * s->D, bytes);
        s->kept_mass[s->rows[n]] = t->mass[n];
    }
}

/* The coda and the head. */
static void end_token(const Step *s, const Work *t) {
    for (i64 n = 0; n < s->N; n++)
        memcpy(t->x + n * s->D, (halting(s, n) ? s->picked : s->kept_h) + s->rows[n] * s->D,
               sizeof(float) * (size_t)s->D);
    layers(s, s->layers + s->n_prelude + 1, s->slots + s->n_prelude + s->T, s->n_coda, t);
    decode(s, t);
}

/* A part of a token in each of N rows, in pages: 0 begins it, 1 is the loop that each row is in, 2 ends it. */
void om_part(const Step *s, i64 which) {
#pragma omp parallel num_threads((int)s->threads) if (s->threads > 1)
    {
        Work work = {.part = omp_get_thread_num(), .parts = omp_get_num_threads()}, *t = &work;
        lay_out(s, s->room, t);
        (which == 0 ? begin_token : which == 1 ? advance : end_token)(s, t);
    }
}

/* Parts of a token one after the other: its beginning if asked for, so many loops (s->at has the row's index in each,
 * (loops, N); in each only the first rows, as many as counts has), and its end if asked for. */
void om_parts(const Step *s, i64 begins, const i64 *counts, i64 loops, i64 ends) {
#pragma omp parallel num_threads((int)s->threads) if (s->threads > 1)
    {
        Work work = {.part = omp_get_thread_num(), .parts = omp_get_num_threads()}, *t = &work;
        Step now = *s;
        lay_out(s, s->room, t);
        if (begins) begin_token(s, t);
        for (i64 i = 0; i < loops; i++) {
            now.at = s->at + i * s->N;
            now.N = counts[i];
#pragma omp barrier
            lay_out(&now, s->room, t); /* what a loop leaves is not in the room */
            advance(&now, t);
        }
#pragma omp barrier
        lay_out(s, s->room, t);
        if (ends) end_token(s, t);
    }
}
