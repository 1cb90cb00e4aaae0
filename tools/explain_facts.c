/* Part of medrun-explain: the quantities of a page, from what the run left. MIT, see LICENSE.
 *
 * Logits are in nats; surprisal, entropy and the divergence of Kullback and Leibler (KL) in bits.
 * A contribution to z_a - z_b is a component of the stream times w = g (U_a - U_b) / RMS(x_L),
 * where g is the final norm's weights, U the output matrix and RMS(x_L) that of the whole, frozen:
 * so the contributions add up, but for the rounding of the last product, `rest`. The lens norms
 * each row by itself, so that it is no sum. A single logit is not taken apart: a constant added to
 * all of them changes nothing, so it is always a difference. */

enum { TOP = 10, LENS_TOP = 5, DICE = 64, DICE_BINS = 96, MAX_PAIRS = 5, MAX_SPLIT = 64,
       MAX_ROWS_SHOWN = 4, NEURON_LAYERS = 4, RAISED = 5,
       LOOK_BACK = 8 };                 /* layers that are searched together for tracked ids    */
static const double NAT = 1.4426950408889634;   /* bits in a nat                                 */

static void use_id(explain *x, int32_t id) { if (id >= 0) x->used[id] = 1; }

static int32_t token_at(const explain *x, size_t at) { return *ids_at(&x->tokens, at); }

/* ---- M1: what was expected ----------------------------------------------------------------- */

typedef struct {
    float *surprisal, *entropy, *top_logp;
    uint32_t *rank, *top, *dice_at, *dice, *tail;
    float *dice_logit;
    size_t dice_first, n_dice;
} expected;

/* How many ids stand how far below the likeliest, beyond those that are listed: a bin is a quarter
 * of a nat. Enough to draw from at any temperature. */
static void count_tail(const explain *x, const float *z, const row_facts *f, uint32_t *tail) {
    for (size_t i = 0; i < x->V; i++) {
        double below = (double)z[f->top[0]] - (double)z[i];
        size_t bin = below * 4 < DICE_BINS - 1 ? (size_t)(below * 4) : DICE_BINS - 1;
        tail[bin]++;
    }
    for (size_t i = 0; i < DICE && f->top[i] >= 0; i++) {
        double below = (double)z[f->top[0]] - (double)z[f->top[i]];
        tail[below * 4 < DICE_BINS - 1 ? (size_t)(below * 4) : DICE_BINS - 1]--;
    }
}

static void note_row(explain *x, expected *m, size_t at, const float *z, const row_facts *f) {
    m->entropy[at] = (float)(f->entropy * NAT);
    for (size_t i = 0; i < TOP; i++) {
        m->top[at * TOP + i] = (uint32_t)f->top[i];
        m->top_logp[at * TOP + i] = f->top[i] < 0 ? -FLT_MAX
                                    : (float)((double)z[f->top[i]] - f->log_total);
        use_id(x, f->top[i]);
    }
    if (at + 1 < x->n) {
        int32_t next = token_at(x, at + 1);
        m->surprisal[at + 1] = (float)((f->log_total - (double)z[next]) * NAT);
        m->rank[at + 1] = rank_of(z, x->V, next);
    }
    if (at < m->dice_first) return;
    size_t k = at - m->dice_first;
    m->dice_at[k] = (uint32_t)at;
    for (size_t i = 0; i < DICE; i++) {
        m->dice[k * DICE + i] = (uint32_t)f->top[i];
        m->dice_logit[k * DICE + i] = f->top[i] < 0 ? -FLT_MAX : z[f->top[i]] - z[f->top[0]];
        use_id(x, f->top[i]);
    }
    count_tail(x, z, f, m->tail + k * DICE_BINS);
}

static int compute_expected(explain *x, medrun_error *e) {
    expected m = {.n_dice = x->rows < 64 ? x->rows : 64};
    static row_facts facts[SIDE_ROWS];
    m.dice_first = x->rows - m.n_dice;
    float *f = take_array(x->n + x->rows * (1 + TOP) + m.n_dice * DICE, sizeof(float), e);
    uint32_t *u = take_array(x->n + x->rows * TOP + m.n_dice * (1 + DICE + DICE_BINS),
                             sizeof(uint32_t), e);
    if (!e->code) {
        m.surprisal = f, m.entropy = m.surprisal + x->n, m.top_logp = m.entropy + x->rows;
        m.dice_logit = m.top_logp + x->rows * TOP;
        m.rank = u, m.top = m.rank + x->n, m.dice_at = m.top + x->rows * TOP;
        m.dice = m.dice_at + m.n_dice, m.tail = m.dice + m.n_dice * DICE;
        m.surprisal[0] = -1;
        for (size_t at = 0, n; at < x->rows; at += n) {
            n = x->rows - at < SIDE_ROWS ? x->rows - at : SIDE_ROWS;
            lens_logits(&x->b, x->last + at * x->d, x->d, n);
            look_at_rows(&x->b, n, at + n > m.dice_first ? DICE : TOP, facts);
            for (size_t i = 0; i < n; i++)
                note_row(x, &m, at + i, x->b.logits + i * x->b.vocab, &facts[i]);
        }
        page_data *g = &x->page;
        add_block(g, "surprisal", "bits", AS_F32, DIMS(x->n), m.surprisal);
        add_numbers(g, "rank", "ids that were likelier", DIMS(x->n), m.rank);
        add_block(g, "entropy", "bits", AS_F32, DIMS(x->rows), m.entropy);
        add_numbers(g, "top", "id", DIMS(x->rows, TOP), m.top);
        add_block(g, "top_logp", "nats", AS_F32, DIMS(x->rows, TOP), m.top_logp);
        add_numbers(g, "dice_at", "row", DIMS(m.n_dice), m.dice_at);
        add_numbers(g, "dice", "id", DIMS(m.n_dice, DICE), m.dice);
        add_block(g, "dice_logit", "nats below the likeliest", AS_F32, DIMS(m.n_dice, DICE),
                  m.dice_logit);
        add_numbers(g, "dice_tail", "ids in a quarter of a nat", DIMS(m.n_dice, DICE_BINS), m.tail);
    }
    free(f), free(u);
    return e->code;
}

/* ---- what is explained --------------------------------------------------------------------- */

/* May the rivals be told apart by this form's ids? */
static bool form_is_good(const explain *x, int which) {
    for (size_t i = 0; i < x->n_rivals; i++) {
        if (x->rivals[i].form[which] < 0) return false;
        for (size_t k = 0; k < i; k++)
            if (x->rivals[k].form[which] == x->rivals[i].form[which]) return false;
    }
    return true;
}

static int check_rivals(const explain *x, medrun_error *e) {
    if (!x->n_rivals || form_is_good(x, 0) || form_is_good(x, 1)) return MEDRUN_OK;
    for (size_t i = 0; i < x->n_rivals; i++)
        for (size_t k = 0; k < i; k++)
            for (int f = 0; f < 2; f++)
                if (x->rivals[i].form[f] >= 0 && x->rivals[i].form[f] == x->rivals[k].form[f])
                    return fail(e, MEDRUN_USAGE, "options: \"%s\" and \"%s\" begin with the same "
                                "token, so no single token tells them apart", x->rivals[k].text,
                                x->rivals[i].text);
    return fail(e, MEDRUN_USAGE, "options: one of them adds no token behind this prompt");
}

static double form_mass(const explain *x, int which, const float *z, double log_total) {
    double sum = 0;
    for (size_t i = 0; i < x->n_rivals; i++)
        if (x->rivals[i].form[which] >= 0)
            sum += exp((double)z[x->rivals[i].form[which]] - log_total);
    return sum;
}

/* The two ids whose difference is explained: the token that came (or the likeliest) against
 * --versus or the likeliest other one; of options the two likeliest. Z is the explained row's. */
static void choose_pair(explain *x, const float *z, const row_facts *f, buffer *to) {
    double mass[2] = {0};
    for (int k = 0; k < 2; k++) mass[k] = form_mass(x, k, z, f->log_total);
    bool good[2] = {form_is_good(x, 0), form_is_good(x, 1)};
    x->form = good[1] && (!good[0] || mass[1] > mass[0]);
    size_t best = 0, second = SIZE_MAX;
    for (size_t i = 0; i < x->n_rivals; i++) {
        rival *r = &x->rivals[i];
        r->id = r->form[x->form];
        use_id(x, r->id);
        if (z[r->id] > z[x->rivals[best].id]) best = i;
    }
    for (size_t i = 0; i < x->n_rivals; i++)
        if (i != best && (second == SIZE_MAX || z[x->rivals[i].id] > z[x->rivals[second].id]))
            second = i;
    x->winner = x->n_rivals ? x->rivals[best].id
                : x->at + 1 < x->n ? token_at(x, x->at + 1) : f->top[0];
    if (x->n_rivals) x->foil = x->rivals[second].id;
    if (x->foil < 0 || x->foil == x->winner) x->foil = f->top[f->top[0] == x->winner];
    use_id(x, x->winner), use_id(x, x->foil);
    bool leads = !x->n_rivals;
    for (size_t i = 0; i < x->n_rivals; i++) leads |= x->rivals[i].id == f->top[0];
    buffer_printf(to, ",\n\"at\":%zu,\"winner\":%d,\"foil\":%d,\"log_total\":%.9g,\"options\":{"
                  "\"form\":%d,\"mass\":%.6g,\"other_mass\":%.6g,\"likeliest_is_one\":%s,"
                  "\"list\":[", x->at, x->winner, x->foil, f->log_total, x->form, mass[x->form],
                  mass[!x->form], bool_text(leads));
    for (size_t i = 0; i < x->n_rivals; i++) {
        const rival *r = &x->rivals[i];
        buffer_printf(to, "%s{\"id\":%d,\"logp\":%.9g,\"text\":", i ? ",\n" : "", r->id,
                      (double)z[r->id] - f->log_total);
        json_quote(to, r->text, strlen(r->text));
        if (x->is_mcq) {
            buffer_text(to, ",\"choice\":");
            json_quote(to, x->q->choice[i], strlen(x->q->choice[i]));
        }
        buffer_text(to, "}");
    }
    buffer_printf(to, "],\"truth\":%d}", x->is_mcq ? x->q->answer : -1);
}

/* ---- M4: direct contributions -------------------------------------------------------------- */

static double rms_of(const float *v, size_t n, double eps) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)v[i] * (double)v[i];
    return sqrt(sum / (double)n + eps);
}

static double dot_of(const float *v, const double *w, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)v[i] * w[i];
    return sum;
}

static double dot_of_difference(const float *a, const float *b, const double *w, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += ((double)a[i] - (double)b[i]) * w[i];
    return sum;
}

/* Directions in which components are measured, one for each pair of ids. */
typedef struct {
    size_t n;
    uint32_t pair[MAX_PAIRS][2];
    double *w;                          /* (MAX_PAIRS, d)                                       */
    float *parts, *heads, *total, *rest;/* (n, streams), (n, L, H), (n), (n)                    */
} directions;

static int find_directions(explain *x, directions *r, const float *z, medrun_error *e) {
    double *u = take_array(2 * x->d, sizeof *u, e);
    r->w = take_array(MAX_PAIRS * x->d, sizeof *r->w, e);
    r->parts = take_array(MAX_PAIRS * (x->streams + 2), sizeof(float), e);
    r->heads = take_array(MAX_PAIRS * x->L * x->H, sizeof(float), e);
    if (e->code) return free(u), e->code;
    r->pair[r->n][0] = (uint32_t)x->winner, r->pair[r->n++][1] = (uint32_t)x->foil;
    for (size_t i = 0; i < x->n_rivals && r->n < MAX_PAIRS; i++)
        if (x->rivals[i].id != x->winner && x->rivals[i].id != x->foil) {
            r->pair[r->n][0] = (uint32_t)x->winner;
            r->pair[r->n++][1] = (uint32_t)x->rivals[i].id;
        }
    r->total = r->parts + r->n * x->streams, r->rest = r->total + r->n;
    const float *last = x->stream + (x->streams - 1) * x->d;
    double scale = rms_of(last, x->d, (double)x->v.m->config.norm_eps);
    weight_row(&x->b, &x->v.m->output, r->pair[0][0], u);
    for (size_t k = 0; k < r->n; k++) {
        double *w = r->w + k * x->d;
        weight_row(&x->b, &x->v.m->output, r->pair[k][1], u + x->d);
        for (size_t i = 0; i < x->d; i++)
            w[i] = (double)x->v.m->final_norm[i] * (u[i] - u[x->d + i]) / scale;
        r->total[k] = z[r->pair[k][0]] - z[r->pair[k][1]];
        r->rest[k] = (float)((double)z[r->pair[k][0]] - (double)z[r->pair[k][1]] -
                             dot_of(last, w, x->d));
        r->parts[k * x->streams] = (float)dot_of(x->stream, w, x->d);
        for (size_t i = 1; i < x->streams; i++)
            r->parts[k * x->streams + i] = (float)dot_of_difference(
                x->stream + i * x->d, x->stream + (i - 1) * x->d, w, x->d);
    }
    free(u);
    return e->code;
}

/* What each head adds: o times attn_out of that head alone. An activation's scale is that of 64
 * numbers of one head, so that the heads' rows add up to the layer's. */
static void measure_heads(explain *x, directions *r) {
    size_t heads = x->b.heads, out = side_out(&x->b);
    for (size_t l = 0; l < x->L; l++)
        for (size_t first = 0, n; first < x->H; first += n) {
            n = x->H - first < SIDE_ROWS ? x->H - first : SIDE_ROWS;
            memset(x->b.wide, 0, n * heads * sizeof(float));
            for (size_t i = 0; i < n; i++)
                memcpy(x->b.wide + i * heads + (first + i) * x->D,
                       x->found + l * heads + (first + i) * x->D, x->D * sizeof(float));
            side_multiply(&x->b, &x->v.m->layers[l].o, x->b.wide, heads, n, x->b.out, out);
            for (size_t i = 0; i < n; i++)
                for (size_t k = 0; k < r->n; k++)
                    r->heads[(k * x->L + l) * x->H + first + i] =
                        (float)dot_of(x->b.out + i * out, r->w + k * x->d, x->d);
        }
}

/* The heads of largest contribution to the first pair, largest first. */
static size_t sort_heads(const explain *x, const directions *r, uint32_t *order) {
    size_t n = x->L * x->H;
    for (size_t i = 0; i < n; i++) {
        size_t at = i;
        for (; at && fabsf(r->heads[order[at - 1]]) < fabsf(r->heads[i]); at--)
            order[at] = order[at - 1];
        order[at] = (uint32_t)i;
    }
    return n;
}

/* Values of a key-value head at all rows, as the cache has them: attention that sees one key gives
 * its value. */
static void read_values(const explain *x, size_t layer, size_t head, float *to) {
    const kv_cache *cache = &x->s->cache;
    size_t place = cache_place(cache, (int)layer, head);
    attention a = {.kv = cache->kv, .head_dim = x->D, .end = SIZE_MAX, .scratch = x->scratch,
                   .keys = cache->keys + place, .values = cache->values + place};
    memset(x->b.wide, 0, x->D * sizeof(float));
    for (size_t at = 0; at <= x->at; at += a.n) {
        a.n = x->at + 1 - at < QUERIES ? x->at + 1 - at : QUERIES;
        for (size_t i = 0; i < a.n; i++) {
            a.q[i] = x->b.wide, a.out[i] = to + (at + i) * x->D;
            a.start[i] = at + i, a.limit[i] = at + i + 1;
        }
        x->v.m->kernels->attend(&a);
    }
}

/* What each token gave through the heads that matter most: A_s (v_s . O_h^T w). */
static int split_heads(explain *x, const directions *r, const uint32_t *order, medrun_error *e) {
    size_t n = x->L * x->H < MAX_SPLIT ? x->L * x->H : MAX_SPLIT, rows = x->at + 1;
    float *values = take_array(rows * x->D, sizeof(float), e);
    float *split = take_array(n * rows, sizeof(float), e);
    double *u = take_array(x->D, sizeof(double), e);
    uint32_t *which = take_array(2 * n, sizeof *which, e);
    for (size_t i = 0; i < n && !e->code; i++) {
        size_t l = order[i] / x->H, h = order[i] % x->H;
        which[2 * i] = (uint32_t)l, which[2 * i + 1] = (uint32_t)h;
        const float *turned = transposed(&x->b, &x->v.m->layers[l].o, r->w, h * x->D,
                                         (h + 1) * x->D, x->b.wide);
        for (size_t k = 0; k < x->D; k++) u[k] = (double)turned[k];
        read_values(x, l, h / (x->H / x->G), values);
        for (size_t s = 0; s < rows; s++)
            split[i * rows + s] = (float)((double)weight_at(x, x->at, l, h, s) *
                                          dot_of(values + s * x->D, u, x->D));
    }
    if (!e->code) {
        add_numbers(&x->page, "split_head", "layer, head", DIMS(n, 2), which);
        add_block(&x->page, "split", "nats", AS_F32, DIMS(n, rows), split);
    }
    free(values), free(split), free(u), free(which);
    return e->code;
}

/* ---- M5: neurons --------------------------------------------------------------------------- */

typedef struct {
    uint32_t layer, index;
    float active, adds;
} neuron;

static int by_addition(const void *a, const void *b) {
    const neuron *p = a, *q = b;
    float x = fabsf(p->adds), y = fabsf(q->adds);
    return x < y ? 1 : x > y ? -1 : p->index < q->index ? -1 : p->index > q->index;
}

/* The neurons of a layer with what each adds in direction W. */
static void measure_neurons(explain *x, size_t l, const double *w, neuron *to) {
    const float *toward = transposed(&x->b, &x->v.m->layers[l].down, w, 0, x->F, x->b.wide);
    for (size_t i = 0; i < x->F; i++) {
        float active = x->active[l * x->F + i];
        to[i] = (neuron){(uint32_t)l, (uint32_t)i, active, active * toward[i]};
    }
}

/* Columns of `down` of N neurons, SIDE_ROWS at most, as rows of b->normed, each with the sign of
 * its neuron: those of a layer together. */
static void read_columns(explain *x, const neuron *list, size_t n) {
    size_t out = side_out(&x->b), which[SIDE_ROWS];
    for (size_t i = 0; i < n; i++) {
        size_t found = 0;
        for (size_t k = 0; k < n; k++)
            if (list[k].layer == list[i].layer) which[found++] = k;
        if (which[0] != i) continue;                    /* they were read already                */
        memset(x->b.wide, 0, found * x->F * sizeof(float));
        for (size_t k = 0; k < found; k++)
            x->b.wide[k * x->F + list[which[k]].index] = UNIT_INPUT;
        side_multiply(&x->b, &x->v.m->layers[list[i].layer].down, x->b.wide, x->F, found, x->b.out,
                      out);
        for (size_t k = 0; k < found; k++) {
            float sign = list[which[k]].active < 0 ? -1 : 1;
            for (size_t c = 0; c < x->d; c++)
                x->b.normed[which[k] * x->d + c] = sign * x->b.out[k * out + c] *
                                                   x->v.m->final_norm[c] / UNIT_INPUT;
        }
    }
}

/* The tokens that a neuron's column raises most, with the sign it has here. */
static void find_raised(explain *x, const neuron *list, size_t n, uint32_t *raised) {
    static row_facts facts[SIDE_ROWS];
    for (size_t first = 0, rows; first < n; first += rows) {
        rows = n - first < SIDE_ROWS ? n - first : SIDE_ROWS;
        read_columns(x, list + first, rows);
        side_multiply(&x->b, &x->v.m->output, x->b.normed, x->d, rows, x->b.logits, x->b.vocab);
        look_at_rows(&x->b, rows, RAISED, facts);
        for (size_t i = 0; i < rows * RAISED; i++) {
            int32_t id = facts[i / RAISED].top[i % RAISED];
            raised[first * RAISED + i] = (uint32_t)id;
            use_id(x, id);
        }
    }
}

static int compute_neurons(explain *x, const directions *r, medrun_error *e) {
    size_t layers[NEURON_LAYERS], n_layers = 0, n = 0, most = (size_t)x->neurons;
    for (size_t l = 0; l < x->L; l++) {                 /* of largest contribution              */
        size_t at = n_layers < NEURON_LAYERS ? n_layers++ : NEURON_LAYERS;
        for (; at && fabsf(r->parts[2 * l + 2]) > fabsf(r->parts[2 * layers[at - 1] + 2]); at--)
            if (at < NEURON_LAYERS) layers[at] = layers[at - 1];
        if (at < NEURON_LAYERS) layers[at] = l;
    }
    if (!most) return MEDRUN_OK;
    neuron *all = take_array(x->F * n_layers, sizeof *all, e);
    for (size_t i = 0; i < n_layers && !e->code; i++, n += x->F)
        measure_neurons(x, layers[i], r->w, all + n);
    if (most > n) most = n;
    float *v = take_array(2 * most, sizeof *v, e);
    uint32_t *u = take_array(most * (2 + RAISED), sizeof *u, e);
    if (!e->code) {
        qsort(all, n, sizeof *all, by_addition);
        for (size_t i = 0; i < most; i++) {
            u[2 * i] = all[i].layer, u[2 * i + 1] = all[i].index;
            v[i] = all[i].active, v[most + i] = all[i].adds;
        }
        find_raised(x, all, most, u + 2 * most);
        add_numbers(&x->page, "neuron", "layer, neuron", DIMS(most, 2), u);
        add_block(&x->page, "neuron_active", "", AS_F32, DIMS(most), v);
        add_block(&x->page, "neuron_adds", "nats", AS_F32, DIMS(most), v + most);
        add_numbers(&x->page, "neuron_raises", "id", DIMS(most, RAISED), u + 2 * most);
    }
    free(all), free(v), free(u);
    return e->code;
}

/* ---- M2: the lens -------------------------------------------------------------------------- */

/* Options, winner and foil, and the three distinct ids that lead in the latest layers. */
static size_t choose_tracked(explain *x, uint32_t *tracked) {
    static row_facts facts[SIDE_ROWS];
    int32_t wanted[MAX_TRACKED + 64] = {x->winner, x->foil};
    size_t n = 0, have = 2, extra = 0;
    for (size_t i = 0; i < x->n_rivals && have < MAX_TRACKED - 3; i++)
        wanted[have++] = x->rivals[i].id;
    for (size_t i = 0; i < have; i++) {
        size_t k = 0;
        while (k < n && tracked[k] != (uint32_t)wanted[i]) k++;
        if (k == n) tracked[n++] = (uint32_t)wanted[i];
    }
    for (size_t end = x->L + 1, rows; end && extra < 3; end -= rows) {
        rows = end < LOOK_BACK ? end : LOOK_BACK;
        lens_logits(&x->b, x->stream + 2 * (end - rows) * x->d, 2 * x->d, rows);
        look_at_rows(&x->b, rows, 1, facts);
        for (size_t i = rows; i-- > 0 && extra < 3;) {
            size_t k = 0;
            while (k < n && tracked[k] != (uint32_t)facts[i].top[0]) k++;
            if (k == n && n < MAX_TRACKED) tracked[n++] = (uint32_t)facts[i].top[0], extra++;
            use_id(x, facts[i].top[0]);
        }
    }
    return n;
}

/* Probabilities of all ids. */
static void find_shares(const float *z, const row_facts *f, size_t n, double *p) {
    for (size_t i = 0; i < n; i++) {
        double x = (double)z[i] - f->log_total;
        p[i] = x > -60 ? exp_near(x) : 0;
    }
}

/* KL of the row Z from the last one, whose probabilities are P, in bits. */
static double divergence(const float *last, const row_facts *of_last, const double *p,
                         const float *z, const row_facts *f, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        double x = (double)last[i] - of_last->log_total;
        sum += p[i] * (x - ((double)z[i] - f->log_total));
    }
    return sum > 0 ? sum * NAT : 0;
}

typedef struct {
    uint32_t *id, *rank, *tracked;
    float *logp, *tracked_logp, *entropy, *kl;
    size_t n_tracked;
    float *last;                        /* (V) of a place: logits and probabilities of its last */
    double *shares;                     /* row, with which its others are compared              */
    row_facts of_last;
} lens_facts;

typedef struct {
    const explain *x;
    lens_facts *f;
    const row_facts *facts;             /* of a tile's rows                                     */
    size_t first, begin;                /* cell of its row 0; first row of this place        */
} lens_job;

/* Cells are numbered through places, and of a place from the last layer back. */
static size_t lens_cell(const explain *x, size_t i) {
    return i / x->lens_rows * x->lens_rows + x->lens_rows - 1 - i % x->lens_rows;
}

static void lens_task(void *context, size_t begin, size_t end, int thread) {
    lens_job *j = context;
    lens_facts *f = j->f;
    (void)thread;
    for (size_t i = j->begin + begin; i < j->begin + end; i++) {
        size_t at = lens_cell(j->x, j->first + i), k = f->n_tracked, V = j->x->V;
        const float *z = j->x->b.logits + i * j->x->b.vocab;
        const row_facts *found = &j->facts[i];
        for (size_t t = 0; t < LENS_TOP; t++) {
            f->id[at * LENS_TOP + t] = (uint32_t)found->top[t];
            f->logp[at * LENS_TOP + t] = (float)((double)z[found->top[t]] - found->log_total);
        }
        for (size_t t = 0; t < k; t++) {
            f->tracked_logp[at * k + t] = (float)((double)z[f->tracked[t]] - found->log_total);
            f->rank[at * k + t] = rank_of(z, V, (int32_t)f->tracked[t]);
        }
        f->entropy[at] = (float)(found->entropy * NAT);
        f->kl[at] = (float)divergence(f->last, &f->of_last, f->shares, z, found, V);
    }
}

/* All cells in tiles of about equal size, whatever places they belong to. */
static void look_through(explain *x, lens_facts *f) {
    static row_facts facts[SIDE_ROWS];
    size_t cells = x->n_places * x->lens_rows, tiles = (cells + SIDE_ROWS - 1) / SIDE_ROWS;
    for (size_t tile = 0; tile < tiles; tile++) {
        size_t first = tile * cells / tiles, n = (tile + 1) * cells / tiles - first;
        for (size_t i = 0; i < n; i++)
            norm_for_lens(&x->b, i, x->lens + lens_cell(x, first + i) * x->d);
        normed_logits(&x->b, n);
        look_at_rows(&x->b, n, LENS_TOP, facts);
        for (size_t begin = 0, end; begin < n; begin = end) {
            size_t back = (first + begin) % x->lens_rows;
            end = begin + x->lens_rows - back < n ? begin + x->lens_rows - back : n;
            if (!back) {
                memcpy(f->last, x->b.logits + begin * x->b.vocab, x->V * sizeof *f->last);
                f->of_last = facts[begin];
                find_shares(f->last, &f->of_last, x->V, f->shares);
            }
            lens_job j = {x, f, facts, first, begin};
            parallel_for(x->b.eng.pool, end - begin, 1, lens_task, &j);
        }
        for (size_t i = 0; i < n * LENS_TOP; i++)
            use_id(x, facts[i / LENS_TOP].top[i % LENS_TOP]);
    }
}

static int compute_lens(explain *x, medrun_error *e) {
    uint32_t tracked[MAX_TRACKED], places[MAX_PLACES];
    lens_facts f = {.tracked = tracked, .n_tracked = choose_tracked(x, tracked)};
    size_t P = x->n_places, R = x->lens_rows, k = f.n_tracked, cells = P * R;
    float *v = take_array(cells * (LENS_TOP + k + 2) + x->V, sizeof *v, e);
    uint32_t *u = take_array(cells * (LENS_TOP + k), sizeof *u, e);
    f.shares = take_array(x->V, sizeof *f.shares, e);
    if (!e->code) {
        f.logp = v, f.tracked_logp = f.logp + cells * LENS_TOP;
        f.entropy = f.tracked_logp + cells * k, f.kl = f.entropy + cells;
        f.last = f.kl + cells, f.id = u, f.rank = u + cells * LENS_TOP;
        for (size_t i = 0; i < P; i++) places[i] = (uint32_t)x->places[i];
        look_through(x, &f);
        page_data *g = &x->page;
        add_numbers(g, "lens_at", "row", DIMS(P), places);
        add_numbers(g, "lens", "id", DIMS(P, R, LENS_TOP), f.id);
        add_block(g, "lens_logp", "nats", AS_F32, DIMS(P, R, LENS_TOP), f.logp);
        add_numbers(g, "tracked", "id", DIMS(k), tracked);
        add_block(g, "tracked_logp", "nats", AS_F32, DIMS(P, R, k), f.tracked_logp);
        add_numbers(g, "tracked_rank", "ids that are likelier", DIMS(P, R, k), f.rank);
        add_block(g, "lens_entropy", "bits", AS_F32, DIMS(P, R), f.entropy);
        add_block(g, "lens_kl", "bits", AS_F32, DIMS(P, R), f.kl);
    }
    free(v), free(u), free(f.shares);
    return e->code;
}

/* ---- M3: attention ------------------------------------------------------------------------- */

/* Columns of what is shown of a row, and rows of a map. Of a text that is too long these are the
 * first token, the sum of those that are left out, and the last MAP_TOKENS - 1. */
static size_t columns_shown(const explain *x) {
    return x->rows > MAP_TOKENS ? MAP_TOKENS + 1 : x->rows;
}

/* The first of the last positions: of the text, or up to a row that is none of these. */
static size_t tail_of(const explain *x, size_t row) {
    size_t tail = x->rows > MAP_TOKENS ? x->rows + 1 - MAP_TOKENS : 1;
    return row >= tail ? tail : row >= MAP_TOKENS ? row + 2 - MAP_TOKENS : 1;
}

static float weight_shown(const explain *x, size_t row, size_t l, size_t h, size_t column) {
    bool cut = x->rows > MAP_TOKENS;
    size_t tail = tail_of(x, row), key = cut && column > 1 ? tail + column - 2 : column;
    size_t end = cut && column == 1 ? tail : key + 1;
    float sum = 0;
    for (; key < end && key <= row; key++) sum += weight_at(x, row, l, h, key);
    return sum;
}

/* Means over all rows from 8 on, or of those that maps show: weight of the first token, of the one
 * before, of the row itself, and of earlier copies of the row's own token. */
static void mean_weights(const explain *x, size_t l, size_t h, float mean[4]) {
    double sum[4] = {0};
    size_t n = 0, tail = tail_of(x, x->rows), first = x->rows > 16 ? 8 : 1;
    if (first <= tail) first = tail + (tail > 1);
    for (size_t at = first; at < x->rows; at++, n++) {
        sum[0] += (double)weight_at(x, at, l, h, 0);
        sum[1] += (double)weight_at(x, at, l, h, at - 1);
        sum[2] += (double)weight_at(x, at, l, h, at);
        for (size_t s = 0; s < at; s = s ? s + 1 : tail)
            if (token_at(x, s) == token_at(x, at)) sum[3] += (double)weight_at(x, at, l, h, s);
    }
    for (int i = 0; i < 4; i++) mean[i] = n ? (float)(sum[i] / (double)n) : 0;
}

/* Rows that are shown of every head: the explained one, the prompt's last, the two most surprising
 * tokens of those whose weights were kept. */
static size_t choose_rows_shown(const explain *x, uint32_t *rows) {
    const float *surprisal = NULL;
    size_t n = 0;
    for (size_t i = 0; i < x->page.n_blocks; i++)
        if (!strcmp(x->page.blocks[i].name, "surprisal"))
            surprisal = (const float *)(const void *)(x->page.bin.data + x->page.blocks[i].at);
    rows[n++] = (uint32_t)x->at;
    if (x->n_prompt - 1 != x->at && x->n_prompt <= x->rows) rows[n++] = (uint32_t)x->n_prompt - 1;
    while (x->keep_all && surprisal && n < MAX_ROWS_SHOWN) {
        size_t best = 0;
        for (size_t at = tail_of(x, x->rows); at < x->rows; at++) {
            bool shown = false;
            for (size_t k = 0; k < n; k++) shown |= rows[k] == at;
            if (!shown && at + 1 < x->n && (!best || surprisal[at + 1] > surprisal[best + 1]))
                best = at;
        }
        if (!best) break;
        rows[n++] = (uint32_t)best;
    }
    return n;
}

/* Heads whose maps are shown: by contribution, but at least one of each kind that there is. */
static size_t choose_maps(const explain *x, const uint32_t *order, const float *means,
                          uint32_t *maps) {
    size_t n = 0, all = x->L * x->H;
    size_t most = x->n_maps < all ? x->n_maps : all;
    for (int kind = 0; kind < 4 && n < most && most < all; kind++) {
        size_t best = 0;
        for (size_t i = 1; i < all; i++)
            if (means[4 * i + (size_t)kind] > means[4 * best + (size_t)kind]) best = i;
        size_t k = 0;
        while (k < n && maps[k] != best) k++;
        if (k == n) maps[n++] = (uint32_t)best;
    }
    for (size_t i = 0; i < all && n < most; i++) {
        size_t k = 0;
        while (k < n && maps[k] != order[i]) k++;
        if (k == n) maps[n++] = order[i];
    }
    return n;
}

static void add_maps(explain *x, const uint32_t *order, const float *means, float *v,
                     uint32_t *u) {
    size_t K = choose_maps(x, order, means, u + 2 * x->L * x->H), at = 0, C = columns_shown(x);
    bool cut = x->rows > MAP_TOKENS;                    /* row 1 has nothing then                */
    const uint32_t *maps = u + 2 * x->L * x->H;
    for (size_t i = 0; i < K; i++) {
        u[2 * i] = maps[i] / (uint32_t)x->H, u[2 * i + 1] = maps[i] % (uint32_t)x->H;
        for (size_t row = 0; row < C; row++)
            for (size_t s = 0; s <= row; s++)
                v[at++] = cut && row == 1 ? 0 : weight_shown(x, row > 1 ? x->rows - C + row : row,
                                                             u[2 * i], u[2 * i + 1], s);
    }
    add_numbers(&x->page, "map_head", "layer, head", DIMS(K, 2), u);
    add_block(&x->page, "maps", "share", AS_S8, DIMS(K, C * (C + 1) / 2), v);
}

static int compute_attention(explain *x, const uint32_t *order, medrun_error *e) {
    uint32_t rows[MAX_ROWS_SHOWN];
    size_t T = choose_rows_shown(x, rows), all = x->L * x->H, C = columns_shown(x), at = 0;
    size_t room = T * all * C, maps = x->n_maps * (C * (C + 1) / 2);
    if (!x->attention) return MEDRUN_OK;
    float *v = take_array(room > maps ? room : maps, sizeof *v, e);
    float *means = take_array(4 * all, sizeof *means, e);
    uint32_t *u = take_array(3 * all, sizeof *u, e);
    if (!e->code) {
        for (size_t t = 0; t < T; t++)
            for (size_t i = 0; i < all; i++)
                for (size_t s = 0; s < C; s++)
                    v[at++] = weight_shown(x, rows[t], i / x->H, i % x->H, s);
        add_numbers(&x->page, "seen_at", "row", DIMS(T), rows);
        add_block(&x->page, "seen", "share", AS_S8, DIMS(T, x->L, x->H, C), v);
        if (x->keep_all) {
            for (size_t i = 0; i < all; i++)
                mean_weights(x, i / x->H, i % x->H, means + 4 * i);
            add_block(&x->page, "head_means", "share", AS_F32, DIMS(x->L, x->H, 4), means);
            if (x->n_maps) add_maps(x, order, means, v, u);
        }
    }
    free(v), free(means), free(u);
    return e->code;
}

/* ---- all of them --------------------------------------------------------------------------- */

/* Root mean squares at the explained row: of the stream, and of what each block writes. */
static int compute_sizes(explain *x, medrun_error *e) {
    float *v = take_array(x->streams * 2 + x->d, sizeof *v, e), *step = v + 2 * x->streams;
    if (e->code) return e->code;
    for (size_t i = 0; i < x->streams; i++) {
        const float *now = x->stream + i * x->d;
        for (size_t c = 0; c < x->d; c++) step[c] = now[c] - (i ? (now - x->d)[c] : 0);
        v[i] = (float)rms_of(now, x->d, 0);
        v[x->streams + i] = (float)rms_of(step, x->d, 0);
    }
    add_block(&x->page, "stream_rms", "", AS_F32, DIMS(x->streams), v);
    add_block(&x->page, "written_rms", "", AS_F32, DIMS(x->streams), v + x->streams);
    free(v);
    return MEDRUN_OK;
}

static int compute_facts(explain *x, medrun_error *e) {
    static row_facts facts[1];
    directions r = {0};
    x->page.wants_json = x->o.json != NULL;
    float *z = take_array(x->V, sizeof *z, e);
    uint32_t *order = take_array(x->L * x->H, sizeof *order, e);
    if (!e->code && !compute_expected(x, e)) {
        lens_logits(&x->b, x->stream + (x->streams - 1) * x->d, x->d, 1);
        memcpy(z, x->b.logits, x->V * sizeof *z);
        look_at_rows(&x->b, 1, TOP, facts);
        choose_pair(x, z, facts, &x->more);
        find_directions(x, &r, z, e);
    }
    if (!e->code) {
        page_data *g = &x->page;
        measure_heads(x, &r);
        sort_heads(x, &r, order);
        add_numbers(g, "pair", "id, id", DIMS(r.n, 2), &r.pair[0][0]);
        add_block(g, "parts", "nats", AS_F32, DIMS(r.n, x->streams), r.parts);
        add_block(g, "total", "nats", AS_F32, DIMS(r.n), r.total);
        add_block(g, "rest", "nats", AS_F32, DIMS(r.n), r.rest);
        add_block(g, "heads", "nats", AS_F32, DIMS(r.n, x->L, x->H), r.heads);
        if (!split_heads(x, &r, order, e) && !compute_neurons(x, &r, e) && !compute_lens(x, e) &&
            !compute_attention(x, order, e)) compute_sizes(x, e);
    }
    if (!e->code && x->o.ablate && !strcmp(x->o.ablate, "auto"))
        for (size_t i = 0; i < 6 && i < x->L * x->H; i++) x->ablated[x->n_ablated++] = order[i];
    free(z), free(order), free(r.w), free(r.parts), free(r.heads);
    return e->code;
}
