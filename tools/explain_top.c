/* Part of medrun-lab: top, the logit lens in a terminal. Layers down, positions across; in a cell
 * the piece that would come if this layer were the last, and its probability in tenths: 9 is 90 %
 * and more. Within 80 columns. MIT licence, see LICENSE. */

enum { TOP_PLACES = 7, TOP_CELL = 8, TOP_ANSWER = 6 };

typedef struct {
    const medrun_session *s;
    size_t rows, hidden;                /* layers + 1                                           */
    float *stream;                      /* (TOP_PLACES, rows, hidden) by position % TOP_PLACES  */
} top_watch;

static void keep_top(void *user, const char *stage, int layer, size_t rows, size_t cols,
                     size_t stride, const float *data) {
    top_watch *w = user;
    bool embedded = !strcmp(stage, "embed");
    if (!embedded && strcmp(stage, "layer_out")) return;
    size_t l = embedded ? 0 : (size_t)layer + 1, first = rows > TOP_PLACES ? rows - TOP_PLACES : 0;
    for (size_t r = first; r < rows; r++)
        memcpy(w->stream + ((w->s->n_done + r) % TOP_PLACES * w->rows + l) * cols,
               data + r * stride, cols * sizeof *data);
}

/* A piece in TOP_CELL columns, its first blank as a dot in the middle. */
static void print_cell(const command *c, int32_t id) {
    size_t n, at = 0, columns = 0, wide;
    buffer b = {0};
    const char *piece = tokenizer_piece(c->t, id, &n);
    if (n > 1 && *piece == ' ') buffer_text(&b, "\xC2\xB7"), piece++, n--;
    escape(&b, piece, n);
    while (at < b.n) {
        size_t bytes = measure(chars(&b) + at, b.n - at, &wide);
        if (columns + wide > TOP_CELL) break;
        at += bytes, columns += wide;
    }
    printf("%.*s%*s", (int)at, chars(&b), (int)(TOP_CELL - columns), "");
    buffer_free(&b);
}

/* The lens at places FIRST .. N - 1 of the timeline. */
static void print_lens(command *c, const top_watch *w, side *b, size_t first, size_t n) {
    row_facts facts[SIDE_ROWS];
    const char *no_colour = getenv("NO_COLOR");
    bool colour = is_terminal(STDOUT_FILENO) && terminal_draws(getenv("TERM")) &&
                  !(no_colour && *no_colour);
    const int32_t *ids = medrun_tokens(c->s);
    printf("%-9s", "after");
    for (size_t at = first; at < n; at++) print_cell(c, ids[at]), fputs("  ", stdout);
    puts("");
    for (size_t l = w->rows; l-- > 0;) {
        if (l) printf("layer %-3zu", l);
        else printf("%-9s", "embedding");
        for (size_t at = first; at < n; at++) {
            lens_logits(b, w->stream + (at % TOP_PLACES * w->rows + l) * w->hidden, w->hidden, 1);
            look_at_rows(b, 1, 1, facts);
            double p = exp_near(fmax(-60, (double)b->logits[facts->top[0]] - facts->log_total));
            int tenths = p >= 1 ? 9 : (int)(10 * p);
            if (colour) printf("\x1b[48;5;%d;38;5;%dm", 255 - 2 * tenths, tenths > 5 ? 231 : 16);
            print_cell(c, facts->top[0]);
            printf("%d%s ", tenths, colour ? "\x1b[0m" : "");
        }
        puts("");
    }
}

/* The last places of the prompt and the first of the answer. */
static int top_command(command *c) {
    side b = {0};
    int most = TOP_ANSWER;
    if (given(c, O_PREDICT) && whole(c, O_PREDICT) >= 0) most = whole(c, O_PREDICT);
    open_model(c), choose_chat(c), make_prompt(c, false);
    if (start_session(c)) return c->e.code;
    top_watch w = {.s = c->s, .rows = (size_t)c->m->config.n_layers + 1,
                   .hidden = (size_t)c->m->config.hidden_size};
    w.stream = new_array(TOP_PLACES * w.rows * w.hidden, sizeof *w.stream);
    if (!w.stream) return out_of_memory(&c->e, TOP_PLACES * w.rows * w.hidden * sizeof *w.stream);
    if (medrun_feed(c->s, (const int32_t *)(const void *)c->ids.data, n_ids(&c->ids), &c->e))
        return free(w.stream), c->e.code;
    medrun_observe(c->s, keep_top, &w);
    process_prompt(c);
    for (int i = 0; i < most && !c->e.code; i++) {
        int32_t id;
        const char *text;
        size_t n;
        if (medrun_next(c->s, &id, &text, &n, &c->e) || medrun_is_stop(c->m, id)) break;
    }
    while (!c->e.code && medrun_pending(c->s)) medrun_step(&c->s, 1, &c->e);
    medrun_observe(c->s, NULL, NULL);
    size_t n = c->s->n_done;
    if (!c->e.code && !start_side(&b, c->s, &c->e))
        print_lens(c, &w, &b, n > TOP_PLACES ? n - TOP_PLACES : 0, n);
    stop_side(&b);
    free(w.stream);
    return c->e.code;
}
