/* lab_constrain.c: medrun-lab constrain: an answer that fits a JSON schema, a grammar, a regular
 * expression or a list of choices, without a server. Included by lab.c behind serve_grammar.c and
 * serve_schema.c, whose rules are those of medrun-serve. MIT licence, see LICENSE. */

static struct {
    grammar *g;
    piece_order order;
    uint32_t at;                /* the state of the text so far                                 */
    bool first, failed;         /* FIRST: the answer's first token may lose a space             */
} constrained;

/* Takes from the logits of each pass what the grammar does not allow. Where its text may end, so
 * may the answer. */
static void allow_only(void *user, const char *stage, int layer, size_t rows, size_t cols,
                       size_t stride, float *data) {
    const command *c = user;
    (void)layer;
    if (strcmp(stage, "logits")) return;
    float *logits = data + (rows - 1) * stride;
    const uint8_t *mask = grammar_mask(constrained.g, &constrained.order, c->t, constrained.at,
                                       constrained.first);
    bool some = false, ends = grammar_ends(constrained.g, constrained.at);
    for (size_t i = 0; mask && i < cols; i++) {
        bool fits = mask[i / 8] >> i % 8 & 1 || (ends && medrun_is_stop(c->m, (int32_t)i));
        if (!fits) logits[i] = -INFINITY;
        some |= fits;
    }
    constrained.failed |= !some;
}

static int print_fitting_piece(command *c, int32_t id, const char *text, size_t n) {
    answer *a = &c->answer;
    size_t n_own;
    if (constrained.failed)
        return fail(&c->e, MEDRUN_FAILED, "constrain: no token goes on, or the grammar is too "
                    "large for this text");
    const char *own = tokenizer_text(c->t, id, false, &constrained.first, &n_own);
    for (size_t i = 0; !a->ended && i < n_own; i++)
        constrained.at = grammar_step(constrained.g, constrained.at, (uint8_t)own[i]);
    a->ended |= grammar_only_ends(constrained.g, constrained.at);
    buffer_add(&a->held, text, n);
    return check_buffer(c, &a->held) ? c->e.code : print_held(c, a->ended);
}

enum { MOST_GRAMMAR = 256 << 10 };      /* bytes                                                 */

/* The grammar that the options name, by way of the JSON that a request would have. */
static int read_constraint(command *c) {
    static const int options[] = {L_CHOICES, L_REGEX, L_GRAMMAR, L_SCHEMA};
    buffer text = {0}, quoted = {0};
    json j = {0};
    int kind = -1;
    for (int i = 0; i < 4; i++) {
        if (!given(c, options[i])) continue;
        if (kind >= 0) kind = 4;
        else kind = i;
    }
    if (kind < 0 || kind > 3)
        return fail(&c->e, MEDRUN_USAGE, "constrain: wanted one of --schema, --grammar, --regex "
                    "and --choices");
    const char *value = c->text[options[kind]];
    if (kind < 2) buffer_text(&text, value);
    else if (!read_text(c, value, MOST_INPUT, &text) && text.n > MOST_GRAMMAR)
        fail(&c->e, MEDRUN_BAD_FILE, "%s: found %zu bytes, wanted at most %d", value, text.n,
             MOST_GRAMMAR);
    if (c->e.code) return buffer_free(&text), c->e.code;
    if (kind == 3) buffer_add(&quoted, text.data, text.n);
    else if (kind) python_quote(&quoted, chars(&text), text.n);
    for (const char *p = value; !kind; p++) {
        size_t n = strcspn(p, ",");
        buffer_text(&quoted, p == value ? "[" : ",");
        python_quote(&quoted, p, n);
        if (!*(p += n)) { buffer_text(&quoted, "]"); break; }
    }
    check_buffer(c, &quoted);
    if (!c->e.code && !json_parse(&j, chars(&quoted), quoted.n, &c->e))
        constrained.g = kind == 3 ? grammar_of_schema(&j, 0, whole(c, L_ADDITIONAL) == 1, &c->e)
                                  : grammar_of_text(&j, 0, kind, &c->e);
    json_free(&j);
    buffer_free(&text);
    buffer_free(&quoted);
    return c->e.code;
}

static int constrain_command(command *c) {
    if (read_constraint(c)) return c->e.code;
    open_model(c), choose_chat(c), read_prompt(c), make_prompt(c, false);
    if (!c->e.code && !sort_pieces(&constrained.order, c->t)) out_of_memory(&c->e, 1);
    if (!start_session(c)) {
        constrained.first = c->s->starting;
        constrained.at = grammar_start(constrained.g);
        c->piece = print_fitting_piece;
        medrun_edit(c->s, allow_only, c);           /* then nothing is guessed ahead, too        */
        answer_ids(c);
        medrun_edit(c->s, NULL, NULL);
    }
    grammar_free(constrained.g);
    free(constrained.order.ids), free(constrained.order.shared);
    return c->e.code;
}
