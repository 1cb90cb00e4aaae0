/* Part of medrun-explain: what the page will cost, passes beyond the watched one, and what is
 * written. MIT licence, see LICENSE.
 *
 * A further pass asks the same question of a changed text or a changed model: what is the
 * difference z_a - z_b then, and how far is the whole distribution from what it was (KL)? */

/* ---- the budget ---------------------------------------------------------------------------- */

enum { SMALL_MODEL = 64 };              /* heads; its page has 1 MB if at least 16 maps fit */

/* Bytes of the page's blocks but for the maps, of ROWS rows. */
static double plan_blocks(const explain *x, double rows) {
    double L = (double)x->L, heads = L * (double)x->H, streams = (double)x->streams;
    double dice = rows < 64 ? rows : 64, split = heads < MAX_SPLIT ? heads : MAX_SPLIT;
    double pairs = x->n_rivals > 2 ? fmin((double)x->n_rivals - 1, MAX_PAIRS) : 1;
    double tracked = fmin((double)x->n_rivals + 4, MAX_TRACKED);
    double shown = x->keep_all ? MAX_ROWS_SHOWN : 2, columns = fmin(rows, MAP_TOKENS + 1);
    double numbers = rows * (3 + 2 * TOP) + dice * (1 + 2 * DICE + DICE_BINS) +
        pairs * (4 + streams + heads) + split * (3 + (double)x->at) + 2 * streams +
        (double)x->neurons * (4 + RAISED) + (x->keep_all ? 4 * heads : 0) +
        (double)x->n_places * (double)x->lens_rows * (2 * LENS_TOP + 2 * tracked + 2);
    if (x->o.compare) numbers += rows * 3 + streams;
    if (x->o.patch) numbers += 4 * L;
    return 4 * numbers + (x->attention ? shown * heads * columns : 0);
}

static double code_bytes(void) {
    size_t n = 0;
    for (size_t i = 0; i < sizeof page_start / sizeof *page_start; i++) n += strlen(page_start[i]);
    for (size_t i = 0; i < sizeof page_end / sizeof *page_end; i++) n += strlen(page_end[i]);
    return (double)n;
}

/* Chooses how many maps fit; refuses a page that cannot be as small as it shall. */
static int plan_page(explain *x, medrun_error *e) {
    if (plan_run(x, e) || check_rivals(x, e)) return e->code;
    double rows = (double)(x->room - (x->n_predict > 0)), heads = (double)(x->L * x->H);
    double strings = fmin((double)x->V, rows * 2 + 1000) * 14 + 40 * rows + 6000;
    double fixed = code_bytes() + strings + plan_blocks(x, rows) * 4 / 3;
    double columns = fmin(rows, MAP_TOKENS + 1);
    double each = columns * (columns + 1) / 2 * 4 / 3, budget = x->budget * 1e6;
    double wanted = !x->keep_all ? 0 : x->attention < 0 ? heads : fmin(x->attention, heads);
    double fit = floor((budget - fixed) / each), least = fmin(4, wanted);
    bool exact = x->o.attention && strcmp(x->o.attention, "auto");
    if (!exact && !x->o.budget && heads <= SMALL_MODEL)
        wanted = fmin(wanted, fmax(SMALL_MODEL / 4, floor((1e6 - fixed) / each)));
    if (fit < (exact ? wanted : least) || fixed > budget)
        return fail(e, MEDRUN_USAGE, "a page of %.0f tokens with %.0f maps of attention would have "
                    "%.1f MB, --budget is %g; give a larger one, fewer maps (%.0f fit), or a "
                    "shorter text", rows, exact ? wanted : least,
                    (fixed + (exact ? wanted : least) * each) / 1e6, x->budget, fit < 0 ? 0 : fit);
    x->n_maps = (size_t)fmin(wanted, fit);
    x->planned = fixed + (double)x->n_maps * each;
    return MEDRUN_OK;
}

/* Seconds that WORK takes for N rows. The first time it may read weights from the disk, which a run
 * does once; then it is the mean of some, as other programs slow a run down, too. */
static double time_work(void (*work)(explain *, size_t), explain *x, size_t n) {
    size_t times = 0;
    work(x, n);
    double start = seconds(), taken;
    do {
        work(x, n), times++;
        taken = seconds() - start;
    } while (taken < 0.1 && times < 1000);
    return taken / (double)times;
}

/* The products of one layer. */
static void try_layer(explain *x, size_t n) {
    const model_layer *y = &x->v.m->layers[0];
    const tensor *const all[] = {&y->q, &y->k, &y->v, &y->o, &y->gate, &y->up, &y->down};
    for (size_t i = 0; i < 7; i++)
        if (all[i]->rows && all[i]->rows <= x->b.vocab)
            side_multiply(&x->b, all[i], x->b.wide, all[i]->cols, n, x->b.logits, x->b.vocab);
}

static void try_logits(explain *x, size_t n) {
    static row_facts facts[SIDE_ROWS];
    side_multiply(&x->b, &x->v.m->output, x->b.normed, x->d, n, x->b.logits, x->b.vocab);
    look_at_rows(&x->b, n, DICE, facts);
}

/* Seconds that the weights of all rows take, from those of the last rows in one layer. */
static double time_weights(explain *x) {
    size_t rows = x->room < SIDE_ROWS ? x->room : SIDE_ROWS;
    weights_job j = {x, 0, x->room - rows, rows, x->b.heads};
    size_t tiles = (rows * (x->H / x->G) + QUERIES - 1) / QUERIES;
    double start = seconds();
    x->queries = x->b.wide;
    parallel_for(x->v.m->pool, x->G * tiles, 1, weights_task, &j);
    double all = (seconds() - start) * (double)x->L;
    double kept = (double)(x->room - x->skip), mean = 1 - kept / 2 / (double)x->room;
    return x->keep_all ? all * mean * kept / (double)rows : all;
}

/* Seconds that the products of heads and neurons take: heads each by itself, LAYER seconds a row of
 * a whole layer's products, and transposed ones, of which the first heads' is measured. */
static double time_directions(explain *x, double layer) {
    const model_layer *y = &x->v.m->layers[0];
    const tensor *const all[] = {&y->q, &y->k, &y->v, &y->o, &y->gate, &y->up, &y->down};
    double weights = 0, heads = (double)(x->L * x->H), o = (double)(y->o.rows * y->o.cols);
    for (size_t i = 0; i < 7; i++) weights += (double)(all[i]->rows * all[i]->cols);
    double *w = (double *)(void *)x->b.logits, start = seconds();
    memset(w, 0, x->d * sizeof *w);
    transposed(&x->b, &y->o, w, 0, x->b.heads, x->b.wide);
    double each = (seconds() - start) / o;
    double down = x->neurons ? fmin((double)x->L, NEURON_LAYERS) : 0;
    return heads * o / weights * layer + each * (o * fmin(heads, MAX_SPLIT) / (double)x->H +
                                                 down * (double)(y->down.rows * y->down.cols));
}

/* Bytes beside the session: what take_memory takes, and then the larger of two: the maps in floats
 * with the blocks, or the blocks with the page. A buffer that grows holds up to twice its bytes. */
static double plan_memory(const explain *x) {
    double kept = (double)all_weights(x, x->keep_bytes ? 1 : 4);
    double numbers = (double)(x->d * (x->room + x->n_places * x->lens_rows + x->streams)) +
                     (double)(x->L * (x->F + x->H * x->D));
    double columns = fmin((double)x->room, MAP_TOKENS + 1);
    double maps = 2 * (double)x->n_maps * columns * (columns + 1);
    double page = x->planned, blocks = 1.5 * page * 3 / 4;
    return kept + (double)x->b.bytes + (double)(x->n_hot * hot_bytes(x)) + 4 * numbers + blocks +
           fmax(maps, 1.5 * page);
}

static size_t n_ablations(const explain *x) {
    if (!x->o.ablate) return 0;
    if (!strcmp(x->o.ablate, "auto")) return 6;
    size_t n = 1;
    for (const char *p = x->o.ablate; *p; p++) n += *p == ',';
    return n;
}

/* --dry-run: measures a layer's products, the logits and the attention of a few rows, and
 * multiplies. */
static int print_plan(explain *x, medrun_error *e) {
    if (take_memory(x, e)) return e->code;
    size_t given = n_ids(&x->tokens);
    double L = (double)x->L, tile = SIDE_ROWS, rows = (double)x->room;
    for (size_t i = 0; i < x->d; i++) x->b.wide[i] = (float)(i * i % 31) - 15;
    for (size_t i = 0; i < SIDE_ROWS; i++) norm_for_lens(&x->b, i, x->b.wide);
    double before = seconds() - x->start;
    double layer = time_work(try_layer, x, SIDE_ROWS) / tile;
    double logits = time_work(try_logits, x, SIDE_ROWS) / tile;
    double one = x->n_predict ? time_work(try_layer, x, 1) : 0;
    double last = x->n_predict ? time_work(try_logits, x, 1) : 0;
    double weights = time_weights(x), once = layer * L * (double)given;
    double run = before + once + weights * 2 + x->n_predict * (one * L + last);
    double cells = (double)(x->n_places * x->lens_rows);
    double facts = logits * (rows + cells + LOOK_BACK + x->neurons) +
                   time_directions(x, layer);
    double parts = x->o.leave_out ? 8 : 0, more = 0;
    more += once * (0.5 * ((double)x->n_edits + parts) + (double)n_ablations(x));
    if (x->o.rotate) more += once * (x->q->n_choices - 1);
    if (x->o.patch) more += once * 4 * L;
    if (x->o.compare) more += run + 2 * logits * rows;
    printf("%zu tokens, at most %d of an answer\ntime    %.1f s: run %.1f, explaining %.1f%s\n"
           "memory  %.1f MB beside the session's %.1f\npage    %.2f MB, %zu maps of attention\n",
           given, x->n_predict, run + facts + more, run, facts + more,
           x->o.patch ? " (most of it for --patch)" : "", plan_memory(x) / 1e6,
           (double)x->s->bytes / 1e6, x->planned / 1e6, x->n_maps);
    return finish_stdout(e);
}

/* ---- asking again -------------------------------------------------------------------------- */

/* What a further pass gave at the explained place, beside what was there. */
typedef struct {
    float *before;                      /* (V) logits of the watched run                        */
    double *shares;                     /* (V) their probabilities                              */
    row_facts was, now;
} second_look;

static int begin_second(explain *x, second_look *k, medrun_error *e) {
    k->before = take_array(x->V, sizeof(float), e);
    k->shares = take_array(x->V, sizeof(double), e);
    if (e->code) return e->code;
    lens_logits(&x->b, x->stream + (x->streams - 1) * x->d, x->d, 1);
    memcpy(k->before, x->b.logits, x->V * sizeof(float));
    look_at_row(k->before, x->V, LENS_TOP, &k->was);
    find_shares(k->before, &k->was, x->V, k->shares);
    return MEDRUN_OK;
}

/* The logits behind these N ids; what they share with the session's tokens is not computed again
 * when the model is as it was. */
static const float *logits_behind(explain *x, const int32_t *ids, size_t n, bool anew,
                                  medrun_error *e) {
    const int32_t *have = medrun_tokens(x->s);
    size_t same = 0, most = medrun_length(x->s);
    while (!anew && same < most && same + 1 < n && have[same] == ids[same]) same++;
    medrun_rewind(x->s, same, NULL);
    if (!e->code && !medrun_feed(x->s, ids + same, n - same, e))
        step_pending(x, x->s, "again", e);
    return e->code ? NULL : medrun_logits(x->s, 0);
}

static double difference(const explain *x, const float *z) {
    return (double)z[x->winner] - (double)z[x->foil];
}

/* Members that every further pass has. */
static void add_outcome(explain *x, second_look *k, const float *z) {
    buffer *b = &x->more;
    look_at_row(z, x->V, LENS_TOP, &k->now);
    buffer_printf(b, "\"difference\":%.9g,\"winner\":%.9g,\"foil\":%.9g,\"kl\":%.6g,\"top\":[",
                  difference(x, z), (double)z[x->winner] - k->now.log_total,
                  (double)z[x->foil] - k->now.log_total,
                  divergence(k->before, &k->was, k->shares, z, &k->now, x->V));
    for (size_t i = 0; i < LENS_TOP; i++) {
        buffer_printf(b, "%s[%d,%.9g]", i ? "," : "", k->now.top[i],
                      (double)z[k->now.top[i]] - k->now.log_total);
        use_id(x, k->now.top[i]);
    }
    buffer_text(b, "],\"options\":[");
    for (size_t i = 0; i < x->n_rivals; i++)
        buffer_printf(b, "%s%.9g", i ? "," : "", (double)z[x->rivals[i].id] - k->now.log_total);
    buffer_text(b, "]");
}

/* Ids of the prompt with TEXT in the place of x->text, up to the explained row: as many from the
 * end as there are in the run. */
static int changed_ids(explain *x, const buffer *text, int turn, buffer *ids, medrun_error *e) {
    prompt p;
    if (text->failed) return out_of_memory(e, text->n);
    if (build_prompt(x, text_of(text), text->n ? text->n - 1 : 0, turn, false, &p, e))
        return buffer_free(&p.ids), e->code;
    size_t n = p.n, behind = x->n_prompt - 1 > x->at ? x->n_prompt - 1 - x->at : 0;
    buffer_add(ids, p.ids.data, (n > behind ? n - behind : 1) * sizeof(int32_t));
    if (x->at >= x->n_prompt)
        buffer_add(ids, ids_at(&x->tokens, x->n_prompt),
                   (x->at + 1 - x->n_prompt) * sizeof(int32_t));
    buffer_free(&p.ids);
    return ids->failed ? out_of_memory(e, ids->n) : e->code;
}

/* The text without the N bytes at AT, with FRESH in their place, and a NUL. */
static void put_in(const explain *x, size_t at, size_t n, const char *fresh, size_t n_fresh,
                   buffer *to) {
    buffer_add(to, x->text.data, at);
    buffer_add(to, fresh, n_fresh);
    buffer_add(to, x->text.data + at + n, x->text.n - at - n);
    buffer_add(to, "", 1);
}

/* Asks with one change; the outcome goes to a list of `more`. */
static int ask_again(explain *x, second_look *k, size_t at, size_t n, const char *fresh,
                     size_t n_fresh, bool first, medrun_error *e) {
    buffer text = {0}, ids = {0}, *b = &x->more;
    put_in(x, at, n, fresh, n_fresh, &text);
    const float *z = NULL;
    if (!changed_ids(x, &text, 0, &ids, e))
        z = logits_behind(x, ids_at(&ids, 0), n_ids(&ids), false, e);
    if (z) {
        size_t have = n_ids(&ids), same = 0, end = 0;
        while (same < have && same <= x->at && *ids_at(&ids, same) == token_at(x, same)) same++;
        while (end < have - same && end + same <= x->at &&
               *ids_at(&ids, have - 1 - end) == token_at(x, x->at - end)) end++;
        buffer_text(b, first ? "{\"old\":" : ",\n{\"old\":");
        json_quote(b, text_of(&x->text) + at, n);
        buffer_text(b, ",\"new\":");
        json_quote(b, fresh, n_fresh);
        buffer_printf(b, ",\"tokens\":%zu,\"from\":%zu,\"to\":%zu,\"ids\":[", have, same,
                      x->at + 1 - end);
        for (size_t i = same; i < have - end; i++) {
            buffer_printf(b, i > same ? ",%d" : "%d", *ids_at(&ids, i));
            use_id(x, *ids_at(&ids, i));
        }
        buffer_text(b, "],");
        add_outcome(x, k, z);
        buffer_text(b, "}");
    }
    buffer_free(&text);
    buffer_free(&ids);
    return e->code;
}

/* Where OLD of "OLD=>NEW" stands in the text; it must stand there once. */
static int find_edit(const explain *x, const char *name, const char *edit, size_t *at, size_t *n,
                     const char **fresh, medrun_error *e) {
    const char *arrow = strstr(edit, "=>"), *text = text_of(&x->text);
    char places[80] = "";
    size_t found = 0;
    if (!arrow || arrow == edit)
        return fail(e, MEDRUN_USAGE, "%s: found \"%.40s\", wanted 'OLD=>NEW'", name, edit);
    *n = (size_t)(arrow - edit), *fresh = arrow + 2;
    for (size_t i = 0; i + *n <= x->text.n; i++) {
        if (memcmp(text + i, edit, *n)) continue;
        if (!found++) *at = i;
        if (strlen(places) < 60)
            snprintf(places + strlen(places), sizeof places - strlen(places), "%s%zu",
                     found > 1 ? ", " : "", i + 1);
    }
    if (!found)
        return fail(e, MEDRUN_USAGE, "%s: \"%.*s\" does not stand in the text", name,
                    (int)(*n < 60 ? *n : 60), edit);
    if (found > 1)
        return fail(e, MEDRUN_USAGE, "%s: \"%.*s\" stands in the text %zu times, at bytes %s; take "
                    "more words", name, (int)(*n < 60 ? *n : 60), edit, found, places);
    return MEDRUN_OK;
}

/* Bad edits are refused before anything runs. */
static int check_edits(const explain *x, medrun_error *e) {
    size_t at, n;
    const char *fresh;
    for (size_t i = 0; i < x->n_edits && !e->code; i++)
        find_edit(x, "--what-if", x->edits[i], &at, &n, &fresh, e);
    if (!e->code && x->o.patch) find_edit(x, "--patch", x->o.patch, &at, &n, &fresh, e);
    return e->code;
}

/* The end of the sentence (or clause) that begins at AT, with the blanks behind it. */
static size_t sentence_end(const explain *x, size_t at, bool clauses) {
    const char *text = text_of(&x->text);
    for (; at < x->text.n; at++) {
        bool stop = strchr(clauses ? ".?!\n,;:" : ".?!\n", text[at]) && text[at];
        if (!stop || (text[at] != '\n' && at + 1 < x->text.n && !isspace((uint8_t)text[at + 1])))
            continue;
        for (at++; at < x->text.n && isspace((uint8_t)text[at]); at++) {}
        return at;
    }
    return at;
}

static int leave_out(explain *x, second_look *k, medrun_error *e) {
    enum { MOST_PARTS = 60 };
    bool clauses = !strcmp(x->o.leave_out, "clauses");
    buffer_text(&x->more, ",\n\"left_out\":[");
    size_t parts = 0;
    for (size_t at = 0, end; at < x->text.n && parts < MOST_PARTS && !e->code; at = end, parts++) {
        end = sentence_end(x, at, clauses);
        if (!at && end == x->text.n)
            fail(e, MEDRUN_USAGE, "--leave-out: the text has one of them only");
        else ask_again(x, k, at, end - at, "", 0, !at, e);
    }
    buffer_text(&x->more, "]");
    return e->code;
}

/* The choices in other places: is it the place that the model likes, or the choice? */
static int rotate_choices(explain *x, second_look *k, medrun_error *e) {
    buffer text = {0};
    buffer_add(&text, x->text.data, x->text.n + 1);
    buffer_text(&x->more, ",\n\"rotations\":[");
    for (int turn = 0; turn < x->q->n_choices && !e->code; turn++) {
        buffer ids = {0};
        const float *z = NULL;
        if (!changed_ids(x, &text, turn, &ids, e))
            z = logits_behind(x, ids_at(&ids, 0), n_ids(&ids), false, e);
        if (z) {
            buffer_printf(&x->more, "%s{\"turn\":%d,", turn ? ",\n" : "", turn);
            add_outcome(x, k, z);
            buffer_text(&x->more, "}");
        }
        buffer_free(&ids);
    }
    buffer_text(&x->more, "]");
    buffer_free(&text);
    return e->code;
}

/* ---- switching parts off ------------------------------------------------------------------- */

typedef struct {
    const explain *x;
    size_t layer, head;                 /* HEAD == H: the feed-forward part                     */
    bool zero;
    float *before;                      /* (room, d) m_l                                        */
} ablation;

static void ablate(void *user, const char *stage, int layer, size_t rows, size_t cols,
                   size_t stride, float *data) {
    ablation *a = user;
    const explain *x = a->x;
    double n = (double)(x->n_prompt < x->rows ? x->n_prompt : x->rows);
    if (layer < 0 || (size_t)layer != a->layer) return;
    bool head = a->head < x->H;
    if (!head && !strcmp(stage, "attn_resid")) memcpy(a->before, data, rows * cols * sizeof *data);
    if (strcmp(stage, head ? "attn_out" : "layer_out")) return;
    size_t first = head ? a->head * x->D : 0, end = head ? first + x->D : cols;
    const double *mean = head ? x->mean_found + a->layer * cols : x->mean_mlp + a->layer * cols;
    for (size_t r = 0; r < rows; r++)
        for (size_t c = first; c < end; c++) {
            float fill = a->zero ? 0 : (float)(mean[c] / n);
            data[r * stride + c] = head ? fill : a->before[r * cols + c] + fill;
        }
}

/* --ablate 12.5,mlp20, counted from 1 as the page does; `auto` is chosen later. */
static int read_ablations(explain *x, medrun_error *e) {
    if (!x->o.ablate || !strcmp(x->o.ablate, "auto")) return MEDRUN_OK;
    for (const char *p = x->o.ablate; *p && !e->code;) {
        char *end;
        bool mlp = !strncmp(p, "mlp", 3);
        const char *digits = mlp ? p + 3 : p;
        size_t l = (size_t)strtoul(digits, &end, 10), h = 0;
        bool good = isdigit((uint8_t)*digits) && l >= 1 && l <= x->L;
        if (good && !mlp) {
            good = *end == '.' && isdigit((uint8_t)end[1]);
            if (good) h = (size_t)strtoul(end + 1, &end, 10);
            good = good && h >= 1 && h <= x->H;
        }
        if (!good || (*end && *end != ',') || x->n_ablated == 64)
            fail(e, MEDRUN_USAGE, "--ablate: found \"%.12s\", wanted auto, or up to 64 of "
                 "LAYER.HEAD (1.1 to %zu.%zu) and mlpLAYER with commas between", p, x->L, x->H);
        else
            x->ablated[x->n_ablated++] = (uint32_t)(mlp ? x->L * x->H + l - 1
                                                        : (l - 1) * x->H + h - 1);
        p = end + (*end == ',');
    }
    return e->code;
}

static int run_ablations(explain *x, second_look *k, medrun_error *e) {
    size_t heads = x->L * x->H;
    ablation a = {.x = x, .zero = x->o.fill && !strcmp(x->o.fill, "zero")};
    a.before = take_array(x->room * x->d, sizeof(float), e);
    buffer_printf(&x->more, ",\n\"fill\":\"%s\",\"ablations\":[", a.zero ? "zero" : "mean");
    for (size_t i = 0; i < x->n_ablated && !e->code; i++) {
        bool mlp = x->ablated[i] >= heads;
        a.layer = mlp ? x->ablated[i] - heads : x->ablated[i] / x->H;
        a.head = mlp ? x->H : x->ablated[i] % x->H;
        medrun_edit(x->s, ablate, &a);
        const float *z = logits_behind(x, ids_at(&x->tokens, 0), x->at + 1, true, e);
        medrun_edit(x->s, NULL, NULL);
        if (!z) break;
        buffer_printf(&x->more, "%s{\"layer\":%zu,\"head\":%d,", i ? ",\n" : "", a.layer,
                      mlp ? -1 : (int)a.head);
        add_outcome(x, k, z);
        buffer_text(&x->more, "}");
    }
    buffer_text(&x->more, "]");
    medrun_rewind(x->s, 0, NULL);       /* the cache is not that of the model as it is           */
    free(a.before);
    return e->code;
}

/* ---- patching ------------------------------------------------------------------------------ */

/* Two runs of as many tokens, the first and the changed one, which differ in SPAN tokens from FROM
 * on. Before each layer the stream at those tokens, or at the last one, is carried over. */
typedef struct {
    const explain *x;
    size_t from, span, n;               /* n: tokens in all                                     */
    float *rows[2];                     /* (L, span + 1, d) of the first run, of the changed one */
    int run;                            /* that is recorded, or whose rows are put in           */
    size_t layer;                       /* before which they are                                */
    bool last;                          /* at the last token, not the span                      */
} patching;

/* The layer that a stage stands before, or L where none does. */
static size_t layer_behind(const patching *p, const char *stage, int layer) {
    if (!strcmp(stage, "embed")) return 0;
    return strcmp(stage, "layer_out") ? p->x->L : (size_t)layer + 1;
}

/* The row of p->rows for position AT, or SIZE_MAX. */
static size_t patched_row(const patching *p, size_t at) {
    if (at + 1 == p->n) return p->span;
    return at >= p->from && at < p->from + p->span ? at - p->from : SIZE_MAX;
}

static void record_rows(void *user, const char *stage, int layer, size_t rows, size_t cols,
                        size_t stride, const float *data) {
    patching *p = user;
    size_t l = layer_behind(p, stage, layer);
    for (size_t r = 0; l < p->x->L && r < rows; r++) {
        size_t row = patched_row(p, p->x->s->n_done + r);
        if (row < SIZE_MAX)
            memcpy(p->rows[p->run] + (l * (p->span + 1) + row) * cols, data + r * stride,
                   cols * sizeof *data);
    }
}

static void put_rows(void *user, const char *stage, int layer, size_t rows, size_t cols,
                     size_t stride, float *data) {
    patching *p = user;
    if (layer_behind(p, stage, layer) != p->layer) return;
    for (size_t r = 0; r < rows; r++) {
        size_t row = patched_row(p, p->x->s->n_done + r);
        if (row < SIZE_MAX && (row == p->span) == p->last)
            memcpy(data + r * stride, p->rows[p->run] + (p->layer * (p->span + 1) + row) * cols,
                   cols * sizeof *data);
    }
}

/* All layers, both kinds of places, into both runs: 4 L numbers. What stands before the span is the
 * same in both, and stays in the cache. */
static int carry_rows(explain *x, patching *p, const int32_t *const ids[2], medrun_error *e) {
    float *v = take_array(4 * x->L, sizeof *v, e), both[2] = {0};
    for (int run = 0; run < 2 && !e->code; run++) {
        p->run = run;
        medrun_observe(x->s, record_rows, p);
        const float *z = logits_behind(x, ids[run], p->n, true, e);
        if (z) both[run] = (float)difference(x, z);
        medrun_observe(x->s, NULL, NULL);
    }
    medrun_edit(x->s, put_rows, p);
    for (size_t i = 0; i < 4 * x->L && !e->code; i++) {
        p->layer = i % x->L, p->last = i / x->L % 2, p->run = i / x->L < 2 ? 0 : 1;
        medrun_rewind(x->s, p->from, NULL);
        if (!medrun_feed(x->s, ids[!p->run] + p->from, p->n - p->from, e))
            step_pending(x, x->s, "patch", e);
        if (!e->code) v[i] = (float)difference(x, medrun_logits(x->s, 0));
    }
    medrun_edit(x->s, NULL, NULL);
    if (!e->code) {
        add_block(&x->page, "patched", "nats", AS_F32, DIMS(4, x->L), v);
        buffer_printf(&x->more, "\"clean\":%.9g,\"changed\":%.9g}", (double)both[0],
                      (double)both[1]);
    }
    medrun_rewind(x->s, 0, NULL);
    free(v);
    return e->code;
}

static int patch_runs(explain *x, medrun_error *e) {
    patching p = {.x = x, .n = x->at + 1};
    buffer text = {0}, ids = {0};
    size_t at = 0, n = 0, end = 0;
    const char *fresh = "";
    if (!find_edit(x, "--patch", x->o.patch, &at, &n, &fresh, e)) {
        put_in(x, at, n, fresh, strlen(fresh), &text);
        changed_ids(x, &text, 0, &ids, e);
    }
    if (!e->code && n_ids(&ids) != p.n)
        fail(e, MEDRUN_USAGE, "--patch: the two prompts have %zu and %zu tokens, wanted as many",
             p.n, n_ids(&ids));
    if (!e->code) {
        while (p.from < p.n && *ids_at(&ids, p.from) == token_at(x, p.from)) p.from++;
        while (end < p.n - p.from &&
               *ids_at(&ids, p.n - 1 - end) == token_at(x, p.n - 1 - end)) end++;
        p.span = p.n - end - p.from;
        for (int i = 0; i < 2; i++)
            p.rows[i] = take_array(x->L * (p.span + 1) * x->d, sizeof(float), e);
        buffer_text(&x->more, ",\n\"patch\":{\"old\":");
        json_quote(&x->more, text_of(&x->text) + at, n);
        buffer_text(&x->more, ",\"new\":");
        json_quote(&x->more, fresh, strlen(fresh));
        buffer_text(&x->more, ",");
        const int32_t *const both[2] = {ids_at(&x->tokens, 0), ids_at(&ids, 0)};
        if (!e->code) carry_rows(x, &p, both, e);
    }
    free(p.rows[0]), free(p.rows[1]);
    buffer_free(&text);
    buffer_free(&ids);
    return e->code;
}

/* ---- another checkpoint -------------------------------------------------------------------- */

/* The same ids must mean the same text. */
static int check_other(const explain *x, const explain *y, medrun_error *e) {
    const tokenizer *t = &x->v.m->tokenizer, *u = &y->v.m->tokenizer;
    if (x->V != y->V)
        return fail(e, MEDRUN_USAGE, "--compare: %s has a vocabulary of %zu, %s one of %zu",
                    x->model, x->V, y->model, y->V);
    for (size_t i = 0; i < x->n; i++) {
        size_t n, k;
        const char *a = tokenizer_piece(t, token_at(x, i), &n);
        const char *b = tokenizer_piece(u, token_at(x, i), &k);
        if (n != k || memcmp(a, b, n))
            return fail(e, MEDRUN_USAGE, "--compare: token %d is another text in %s",
                        token_at(x, i), y->model);
    }
    return MEDRUN_OK;
}

/* Row by row: how far the other's distribution is, what it gives the token that came, and its
 * likeliest; and how far the stream is at the explained row, layer by layer. */
static int compare_rows(explain *x, explain *y, medrun_error *e) {
    static row_facts ours[SIDE_ROWS], theirs[SIDE_ROWS];
    float *v = take_array(2 * x->rows + x->streams, sizeof *v, e), *far = v + 2 * x->rows;
    uint32_t *top = take_array(x->rows, sizeof *top, e);
    double *shares = take_array(x->V, sizeof *shares, e);
    for (size_t at = 0, n; !e->code && at < x->rows; at += n) {
        n = x->rows - at < SIDE_ROWS ? x->rows - at : SIDE_ROWS;
        lens_logits(&x->b, x->last + at * x->d, x->d, n);
        lens_logits(&y->b, y->last + at * y->d, y->d, n);
        look_at_rows(&x->b, n, 1, ours);
        look_at_rows(&y->b, n, 1, theirs);
        for (size_t i = 0; i < n; i++) {
            const float *z = x->b.logits + i * x->b.vocab, *q = y->b.logits + i * y->b.vocab;
            size_t next = at + i + 1 < x->n ? (size_t)token_at(x, at + i + 1) : 0;
            find_shares(z, &ours[i], x->V, shares);
            v[at + i] = (float)divergence(z, &ours[i], shares, q, &theirs[i], x->V);
            v[x->rows + at + i] = at + i + 1 < x->n
                ? (float)(((double)q[next] - theirs[i].log_total) -
                          ((double)z[next] - ours[i].log_total)) : 0;
            top[at + i] = (uint32_t)theirs[i].top[0];
            use_id(x, theirs[i].top[0]);
        }
    }
    if (!e->code) {
        add_block(&x->page, "other_kl", "bits", AS_F32, DIMS(x->rows), v);
        add_block(&x->page, "other_gain", "nats", AS_F32, DIMS(x->rows), v + x->rows);
        add_numbers(&x->page, "other_top", "id", DIMS(x->rows), top);
    }
    if (!e->code && x->d == y->d && x->L == y->L) {
        for (size_t i = 0; i < x->streams; i++) {
            double apart = 0, size = 0;
            for (size_t c = 0; c < x->d; c++) {
                double a = (double)x->stream[i * x->d + c], b = (double)y->stream[i * x->d + c];
                apart += (a - b) * (a - b), size += a * a;
            }
            far[i] = size > 0 ? (float)sqrt(apart / size) : 0;
        }
        add_block(&x->page, "other_far", "share of the stream", AS_F32, DIMS(x->streams), far);
    }
    free(v), free(top), free(shares);
    return e->code;
}

static int compare_models(explain *x, medrun_error *e) {
    static explain y;
    y = (explain){.v.fd = -1, .model = x->o.compare, .o = x->o, .at = x->at,
                  .n_prompt = x->n_prompt, .n = x->n};
    y.v.kv = x->v.kv, y.o.ablate = NULL, y.attention = 0;
    medrun_options open = {.threads = x->v.m->pool->threads, .kernels = x->v.m->kernels->name};
    if (!medrun_open(&y.v.m, y.model, &open, e)) {
        buffer_add(&y.tokens, x->tokens.data, x->rows * sizeof(int32_t));
        y.o.lens = "none";
        if (!plan_run(&y, e) && !check_other(x, &y, e) && !run_watched(&y, e))
            compare_rows(x, &y, e);
    }
    if (!e->code) {
        char hash[65];
        hex_of(y.v.m->file.hash, hash);
        buffer_text(&x->more, ",\n\"other\":{\"model\":");
        json_quote(&x->more, y.v.m->name, strlen(y.v.m->name));
        buffer_printf(&x->more, ",\"type\":\"%s\",\"hash\":\"%s\"}", type_names[y.v.m->type], hash);
    }
    close_explained(&y);
    return e->code;
}

/* ---- all of them --------------------------------------------------------------------------- */

/* What needs the watched run's cache was computed before. */
static int run_more(explain *x, medrun_error *e) {
    second_look k = {0};
    if (!x->n_edits && !x->o.leave_out && !x->o.rotate && !x->n_ablated && !x->o.compare &&
        !x->o.patch) return MEDRUN_OK;
    if (!begin_second(x, &k, e) && x->n_edits) {
        buffer_text(&x->more, ",\n\"what_if\":[");
        for (size_t i = 0, at = 0, n = 0; i < x->n_edits && !e->code; i++) {
            const char *fresh = "";
            if (!find_edit(x, "--what-if", x->edits[i], &at, &n, &fresh, e))
                ask_again(x, &k, at, n, fresh, strlen(fresh), !i, e);
        }
        buffer_text(&x->more, "]");
    }
    if (!e->code && x->o.leave_out) leave_out(x, &k, e);
    if (!e->code && x->o.rotate) rotate_choices(x, &k, e);
    if (!e->code && x->n_ablated) run_ablations(x, &k, e);
    if (!e->code && x->o.patch) patch_runs(x, e);
    if (!e->code && x->o.compare) compare_models(x, e);
    free(k.before), free(k.shares);
    return e->code;
}

/* ---- meta ---------------------------------------------------------------------------------- */

/* The text of a token: a string, or its bytes where they are no UTF-8. */
static void write_piece(const explain *x, int32_t id, buffer *to) {
    bool first = false, good = true;
    size_t n, len;
    const char *text = tokenizer_text(&x->v.m->tokenizer, id, true, &first, &n);
    for (size_t i = 0; i < n && good; i += len) {
        uint32_t code;
        len = utf8_decode((const uint8_t *)text + i, n - i, &code);
        good = len > 0;
    }
    if (good) {
        json_quote(to, text, n);
        return;
    }
    for (size_t i = 0; i < n; i++) buffer_printf(to, "%s%d", i ? "," : "[", (uint8_t)text[i]);
    buffer_text(to, "]");
}

/* The tokens: id and role, 0 the prompt's text, 1 a control token, 2 the answer. */
static void write_tokens(explain *x, buffer *to) {
    buffer_text(to, ",\n\"tokens\":[");
    for (size_t i = 0; i < x->n; i++) {
        int32_t id = token_at(x, i);
        int type = tokenizer_type(&x->v.m->tokenizer, id);
        use_id(x, id);
        buffer_printf(to, "%s[%d,%d]", i ? "," : "", id,
                      type == PIECE_CONTROL ? 1 : i >= x->n_prompt ? 2 : 0);
    }
    buffer_text(to, "],\n\"pieces\":{");
    for (size_t id = 0, n = 0; id < x->V; id++) {
        if (!x->used[id]) continue;
        buffer_printf(to, "%s\"%zu\":", n++ ? "," : "", id);
        write_piece(x, (int32_t)id, to);
    }
    buffer_text(to, "}");
}

static double tensor_megabytes(const tensor *w) {
    return (double)(tensor_panels(w) * panel_bytes(w->type, w->cols)) / 1e6;
}

/* Per stage: seconds, million weights, megabytes of weights; of the prompt and of the answer. */
static void write_times(const explain *x, buffer *to) {
    const model_layer *y = &x->v.m->layers[0];
    const tensor *const of[N_STAGES][3] = {[S_QKV] = {&y->q, &y->k, &y->v}, [S_OUT] = {&y->o},
        [S_WIDEN] = {&y->gate, &y->up}, [S_NARROW] = {&y->down}, [S_LOGITS] = {&x->v.m->output}};
    buffer_printf(to, ",\n\"time\":{\"run\":%.4g,\"explaining\":%.4g,\"threads\":%d,\"kernels\":"
                  "\"%s\",\"rows\":[%zu,%zu],\"command\":", x->seconds, x->explaining,
                  x->v.m->pool->threads, x->v.m->kernels->name, x->stage_rows[0],
                  x->stage_rows[1]);
    json_quote(to, text_of(&x->line), x->line.n);
    buffer_text(to, ",\"stages\":[");
    for (int i = 0; i < N_STAGES; i++) {
        double weights = 0, bytes = 0, layers = i == S_LOGITS ? 1 : (double)x->L;
        for (int k = 0; k < 3; k++)
            if (of[i][k]) {
                weights += layers * (double)(of[i][k]->rows * of[i][k]->cols) / 1e6;
                bytes += layers * tensor_megabytes(of[i][k]);
            }
        buffer_printf(to, "%s[\"%s\",%.5g,%.5g,%.6g,%.6g]", i ? "," : "", stage_names[i],
                      x->stage_seconds[0][i], x->stage_seconds[1][i], weights, bytes);
    }
    buffer_text(to, "]}");
}

static void write_meta(explain *x, buffer *to) {
    const medrun_model *m = x->v.m;
    const medrun_sampling *s = &x->s->options.sampling;
    char hash[65];
    hex_of(m->file.hash, hash);
    buffer_text(to, "{\"medrun-explain\":1,\"engine\":\"medrun " MEDRUN_VERSION "\",\"model\":");
    json_quote(to, m->name, strlen(m->name));
    buffer_printf(to, ",\"hash\":\"%s\",\"type\":\"%s\",\"kv\":\"%s\",\"strict\":%s,"
                  "\"template\":\"%s\",\"temperature\":%.6g,\"top_k\":%d,\"top_p\":%.6g,"
                  "\"min_p\":%.6g,\"repeat_penalty\":%.6g,\"seed\":%llu,\n\"notice\":", hash,
                  type_names[m->type], kv_names[x->session.kv], bool_text(x->s->options.strict),
                  x->v.chat ? x->v.chat->name : "none", (double)s->temperature, s->top_k,
                  (double)s->top_p, (double)s->min_p, (double)s->repeat_penalty,
                  (unsigned long long)s->seed);
    const char *notice = x->v.m->notice;
    json_quote(to, notice, strlen(notice));
    buffer_printf(to, ",\n\"shape\":{\"layers\":%zu,\"heads\":%zu,\"kv_heads\":%zu,"
                  "\"head_dim\":%zu,\"hidden\":%zu,\"ffn\":%zu,\"vocab\":%zu,"
                  "\"window\":%d,\"context\":%d},\n\"n_prompt\":%zu,\"rows\":%zu,"
                  "\"lens_rows\":%zu,\"mid\":%s", x->L, x->H, x->G,
                  x->D, x->d, x->F, x->V, m->config.sliding_window, m->config.max_positions,
                  x->n_prompt, x->rows, x->lens_rows, bool_text(x->o.mid));
    if (x->rows > MAP_TOKENS) buffer_printf(to, ",\"tail\":%zu", tail_of(x, x->rows));
    if (x->is_mcq) {
        buffer_text(to, ",\n\"question\":");
        json_quote(to, x->q->text, strlen(x->q->text));
    }
    write_lesson(x, to);
    buffer_add(to, x->more.data, x->more.n);
    write_tokens(x, to);
    write_times(x, to);
    buffer_text(to, ",\n");
    write_directory(&x->page, to);
}

static int write_results(explain *x, medrun_error *e) {
    buffer meta = {0}, page = {0};
    write_meta(x, &meta);
    if (x->page.bin.failed || x->page.json.failed || x->more.failed || meta.failed)
        return buffer_free(&meta), out_of_memory(e, x->page.bin.n);
    if (x->o.json) {
        buffer_add(&page, meta.data, meta.n);
        buffer_add(&page, x->page.json.data, x->page.json.n);
        buffer_text(&page, "}\n");
        write_file(x->o.json, &explain_json, x->o.force, &page, e);
        buffer_free(&page);
    }
    buffer_text(&meta, "}");
    if (!e->code && x->o.out) {
        compose_page(&x->page, &meta, &page);
        write_file(x->o.out, &explain_page, x->o.force, &page, e);
        if (!e->code && !x->o.quiet)
            fprintf(stderr, "%s: %zu + %zu tokens, %.2f MB, %.1f s (run %.1f, explaining %.1f)\n",
                    x->o.out, x->n_prompt, x->n - x->n_prompt, (double)page.n / 1e6,
                    seconds() - x->start, x->seconds, x->explaining);
    }
    buffer_free(&meta);
    buffer_free(&page);
    return e->code;
}
