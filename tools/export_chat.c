/* medrun-export, section 4: the chat template, stop ids, sampling, licence. Included by export.c.
 *
 * A model's own template is compared with each row of medrun's table by what both write: some
 * conversations are rendered by both (export_jinja.c). A row may be fitted: the file's BOS or none,
 * its own default system text, white space around texts kept or not. What people and programs
 * ask for (the ordinary conversations) must come out the same to the last byte; where others
 * differ, a note says so. Templates with a place for functions are known by a fingerprint first,
 * as conversations with functions are not compared here. Tests: tests/20_export.c. */

/* tools/reference/templates.py makes these lines: it renders many conversations with jinja2 and
 * with `medrun-lab call --render`, functions included; a line is printed where all are the same. */
static const struct { const char *fingerprint, *name; } known_templates[] = {
    {"7fb8ac9e6a1c44f33ef7c1c003d7f22b", "llama3.1"},           /* Llama 3.1 and 3.3             */
    {"711a166daf3ddab0762fe90400c197f2", "apertus"},            /* three releases of Apertus     */
    {"191005a415e38a8908a0a89a5041c724", "apertus-bare"},
    {"f151bafc6730fe9fa5be5d6e542c1445", "apertus-closed"},
};

/* The row that has the fingerprint of these tokens (SHA-256), or NULL. */
static const chat_template *find_fingerprint(const jinja_reader *r) {
    uint8_t digest[32];
    char hex[65];
    sha256_of(r->out.data, r->out.n, digest);
    hex_of(digest, hex);
    for (size_t i = 0; i < sizeof known_templates / sizeof *known_templates; i++)
        if (!memcmp(hex, known_templates[i].fingerprint, 32))
            return chat_find(known_templates[i].name);
    return NULL;
}

/* ---- fitting a row to a template ----------------------------------------------------------- */

/* Conversations, a letter for each turn. In those that must be the same a system text may be first,
 * and people and model take turns; the others have names for the note. */
static const struct { const char *turns, *what; } probes[] = {
    {"u", NULL}, {"su", NULL}, {"uau", NULL}, {"suau", NULL}, {"uauau", NULL}, {"suauau", NULL},
    {"ua", "that end with an answer"}, {"sua", "that end with an answer"},
    {"uu", "with two questions in a row"}, {"uaau", "with two answers in a row"},
    {"usu", "with a late system text"}, {"ssu", "with two system texts"},
    {"s", "without a question"}, {"a", "without a question"}, {"au", "that begin with an answer"},
    {"ut", "with a tool's turn"}, {"uatau", "with a tool's turn"},
};

enum { N_PROBES = sizeof probes / sizeof *probes, MOST_TURNS = 6, N_VARIANTS = 4, EMPTY = 2,
       THOUGHTS = 3 };

/* What the turns say: plain text; white space around it, and signs that a template could change;
 * nothing; what a model has thought, which some templates leave out of earlier answers. The last
 * two are not among what must be the same. */
static size_t probe_messages(size_t probe, int variant, medrun_message m[MOST_TURNS]) {
    static const char *const texts[N_VARIANTS][4] = {
        {"Be brief.", "Is 38.5 a fever?", "Yes.", "And \xC2\xB5g?"},
        {" \n Be \"kind\".\n", "\tIs it\twarm, or 'hot'?\n\n", "\n<b>Yes</b> & no. ",
         " {x} \\n $y `z` "},
        {"", "", "", ""},
        {"Be brief.", "Is 38.5 a fever?", "<think>\nHm.\n</think>\n\nYes.", "And \xC2\xB5g?"}};
    size_t n = strlen(probes[probe].turns);
    for (size_t i = 0; i < n; i++) {
        char who = probes[probe].turns[i];
        const char *text = texts[variant][who == 's' ? 0 : who == 'a' ? 2 : i < 2 ? 1 : 3];
        m[i] = (medrun_message){who == 's' ? "system" : who == 'u' ? "user" :
                                who == 'a' ? "assistant" : "tool", text, strlen(text)};
    }
    return n;
}

/* A template of a file, with the names that it may use. */
typedef struct {
    jinja_token *tokens;
    size_t n;
    const char *bos, *eos;      /* NULL: there is none                                         */
} file_template;

/* A row of the table as a file has it. */
typedef struct {
    chat_template chat;
    int changes;                /* how many of its fields are the file's                       */
    size_t same;                /* how many conversations are the same                         */
    const char *differs[8];     /* what those are that the two write otherwise                 */
} fitted_template;

/* What C writes, or false where it refuses. */
static bool row_text(const chat_template *c, const medrun_message *m, size_t n, bool answer,
                     buffer *out) {
    medrun_error e = {0};
    chat_writer w = {.c = c, .as_text = true, .out = out, .e = &e};
    out->n = 0;
    return !chat_render(&w, m, n, answer);
}

static bool same_text_in(const buffer *a, const buffer *b) {
    return a->n == b->n && (!a->n || !memcmp(a->data, b->data, a->n));
}

/* Compares one conversation. Some templates open the answer also when it is not asked for. 1: the
 * same, or medrun refuses; 0: they differ; -1: the file's template is not understood. */
static int compare_probe(const file_template *f, const chat_template *c, size_t probe, int variant,
                         bool answer, buffer *wanted, buffer *found) {
    medrun_message m[MOST_TURNS];
    size_t n = probe_messages(probe, variant, m);
    wanted->n = 0;
    int state = jinja_render(f->tokens, f->n, m, n, answer, f->bos, f->eos, wanted);
    if (state == JINJA_LOST) return -1;
    bool written = row_text(c, m, n, answer, found);
    if (!written) return state == JINJA_REFUSES || probes[probe].what != NULL;
    if (state == JINJA_REFUSES) return 0;
    if (same_text_in(wanted, found)) return 1;
    return !answer && row_text(c, m, n, true, found) && same_text_in(wanted, found);
}

static void add_difference(fitted_template *fit, const char *what) {
    size_t i = 0;
    while (i < 8 && fit->differs[i] && strcmp(fit->differs[i], what)) i++;
    if (i < 8) fit->differs[i] = what;
}

/* Compares all of them; false: one that must be the same differs. */
static bool compare_all(const file_template *f, fitted_template *fit, bool *lost) {
    buffer wanted = {0}, found = {0};
    bool good = true;
    fit->same = 0;
    memset(fit->differs, 0, sizeof fit->differs);
    for (size_t i = 0; i < N_PROBES && good; i++)
        for (int k = 0; k < 2 * N_VARIANTS && good; k++) {
            int variant = k % N_VARIANTS;
            const char *what = probes[i].what;
            if (!what) what = variant == EMPTY ? "with empty texts" :
                              variant == THOUGHTS ? "with <think> in an answer" :
                              k >= N_VARIANTS ? "without the opening of an answer" : NULL;
            int same = compare_probe(f, &fit->chat, i, variant, k < N_VARIANTS, &wanted, &found);
            *lost |= same < 0;
            good = same > 0 || (!same && what);
            fit->same += same == 1;
            if (!same && what) add_difference(fit, what);
        }
    buffer_free(&wanted), buffer_free(&found);
    return good;
}

/* Where A and B, with a mark for the system text, agree: what A has in the mark's place is its own
 * default. False: they agree nowhere. */
static bool own_system(const buffer *a, const buffer *b, const char *mark, buffer *system) {
    const uint8_t *at = b->n ? memmem(b->data, b->n, mark, strlen(mark)) : NULL;
    size_t before = at ? (size_t)(at - b->data) : 0;
    size_t after = at ? b->n - before - strlen(mark) : 0;
    if (!at || a->n <= before + after || memcmp(a->data, b->data, before) ||
        memcmp(a->data + a->n - after, b->data + b->n - after, after)) return false;
    system->n = 0;
    buffer_add(system, a->data + before, a->n - before - after);
    buffer_add(system, "", 1);
    return !system->failed && strlen((const char *)system->data) + 1 == system->n;
}

/* Gives the row in FIT the default system text that the file's template has, if it has one. */
static bool fit_system(const file_template *f, fitted_template *fit, buffer *system) {
    static const char mark[] = "THE SYSTEM'S TEXT";
    const medrun_message m[] = {{"system", mark, sizeof mark - 1}, {"user", "Hm?", 3}};
    buffer wanted = {0}, found = {0};
    bool good = jinja_render(f->tokens, f->n, m + 1, 1, true, f->bos, f->eos, &wanted) ==
                JINJA_RUNS && row_text(&fit->chat, m, 2, true, &found) &&
                own_system(&wanted, &found, mark, system);
    buffer_free(&wanted), buffer_free(&found);
    if (good) fit->chat.system = (const char *)system->data, fit->changes++;
    return good;
}

/* One row with these changes; it becomes the BEST if it fits better. */
static void try_row(const file_template *f, const chat_template *row, int bos, bool trims,
                    fitted_template *best, buffer *system, bool *lost) {
    fitted_template fit = {.chat = *row};
    buffer own = {0};
    if (bos) fit.chat.bos = bos == 1 ? NULL : f->bos, fit.changes++;
    if (trims) fit.chat.trims = !row->trims, fit.changes++;
    bool persona = row->system && strcmp(row->name, "chatml");  /* another's is another model    */
    for (int i = 0; i < 2 && !*lost; i++) {             /* as it is, then with its system text   */
        if (i && (persona || !fit_system(f, &fit, &own))) break;
        if (!compare_all(f, &fit, lost)) continue;
        bool better = !best->chat.name || fit.same > best->same ||
                      (fit.same == best->same && fit.changes < best->changes);
        if (better) *best = fit;
        if (better && i) {
            buffer_free(system);
            *system = own;
            own = (buffer){0};
        }
    }
    buffer_free(&own);
}

/* Which of medrun's templates writes what JINJA does; the result's name is NULL where none does.
 * SYSTEM keeps its text. */
static fitted_template fit_template(const char *jinja, size_t n, const char *bos, const char *eos,
                                    buffer *system) {
    jinja_reader r = {0};
    buffer lines = {0};
    file_template f = {.bos = bos, .eos = eos};
    fitted_template best = {0};
    bool lost = !jinja_tokens(&r, &lines, jinja, n);
    const chat_template *known = lost ? NULL : find_fingerprint(&r);
    if (!lost) f.tokens = jinja_list_tokens(&r, &f.n);
    if (known) best.chat = *known;
    if (known && f.tokens && !compare_all(&f, &best, &lost) && !lost) best = (fitted_template){0};
    size_t n_rows = known || !f.tokens ? 0 : sizeof chat_templates / sizeof *chat_templates;
    for (size_t i = 0; i < n_rows; i++) {
        const chat_template *row = &chat_templates[i];
        if (row->states_today || !strcmp(row->name, "none")) continue;
        for (int k = 0; k < 6 && !lost; k++)            /* BOS: the row's, none, the tokenizer's */
            if (k % 3 < 2 || bos)
                try_row(&f, row, k % 3, k > 2, &best, system, &lost);
    }
    if (lost && !known) best = (fitted_template){0};
    free(f.tokens), buffer_free(&lines), buffer_free(&r.out), buffer_free(&r.text);
    return best;
}

/* ---- template, stops, sampling ------------------------------------------------------------- */

/* The Jinja text: chat_template.jinja, or a field, or of several the one called default. */
static int read_jinja(source *s, const json_file *config, buffer *out, medrun_error *e) {
    const json *j = &config->j;
    if (file_exists(s->folder, "chat_template.jinja"))
        return read_text(s, "chat_template.jinja", out, e);
    uint32_t v = given(j, 0, "chat_template"), several = v;
    if (v == JSON_NONE) return MEDRUN_OK;
    if (json_is_type(j, several, JSON_ARRAY)) {
        for EACH(j, several, c)
            if (json_is(j, json_get(j, c, "name"), "default")) v = json_get(j, c, "template");
    }
    WANT(json_is_type(j, v, JSON_STRING), config, "chat_template", v,
         "a template; name one with --template");
    json_unescape(j, v, out);
    return out->failed ? out_of_memory(e, out->n) : MEDRUN_OK;
}

/* The text of control token ID, which the caller frees, or NULL. */
static char *token_name(const tokenizer *t, int32_t id) {
    size_t n = 0;
    const char *text = id >= 0 ? tokenizer_piece(t, id, &n) : NULL;
    char *name = text ? new_array(n + 1, 1) : NULL;
    if (name) memcpy(name, text, n);
    return name;
}

/* Says which conversations the file's template writes in another way. */
static void note_differences(source *s, const fitted_template *fit) {
    buffer list = {0};
    for (size_t i = 0; i < 8 && fit->differs[i]; i++)
        buffer_printf(&list, "%s%s", i ? ", " : "", fit->differs[i]);
    buffer_add(&list, "", 1);
    if (list.n > 1 && !list.failed)
        add_note(s, "the chat template writes ordinary conversations as medrun's %s does; not so "
                 "conversations %s", fit->chat.name, (const char *)list.data);
    buffer_free(&list);
}

/* Looks for the row that fits the file's template. */
static int find_template(source *s, const buffer *jinja, medrun_error *e) {
    tokenizer t;
    if (tokenizer_open(&t, s->tokenizer.data, s->tokenizer.n, s->folder, e)) return e->code;
    char *bos = token_name(&t, t.bos), *eos = token_name(&t, s->eos);
    fitted_template fit = fit_template((const char *)jinja->data, jinja->n, bos, eos, &s->system);
    if (fit.chat.name) {
        s->fitted = fit.chat, s->chat = &s->fitted;
        if (bos) snprintf(s->bos, sizeof s->bos, "%s", bos);
        if (bos && fit.chat.bos == bos) s->fitted.bos = s->bos;
        note_differences(s, &fit);
    }
    free(bos), free(eos);
    tokenizer_close(&t);
    return e->code;
}

/* Without a chat template, tokens of the vocabulary may still tell in which form people wrote to
 * the model (Meditron's, for one, in ChatML): they are named, not believed. */
static int note_no_template(source *s, medrun_error *e) {
    static const char *const signs[][2] = {{"<|im_start|>", "chatml-bare"},
                                           {"<|eot_id|>", "llama3"}};
    tokenizer t;
    const char *const *sign = NULL;
    if (tokenizer_open(&t, s->tokenizer.data, s->tokenizer.n, s->folder, e)) return e->code;
    for (size_t i = 0; i < 2 && !sign; i++)
        if (chat_token(&t, signs[i][0]) >= 0) sign = signs[i];
    tokenizer_close(&t);
    if (sign)
        add_note(s, "there is no chat template, but the vocabulary has %s: if the model is made "
                 "for conversations, --template %s may be theirs, see its card", sign[0], sign[1]);
    else
        add_note(s, "there is no chat template: this model continues text; if it is made for "
                 "conversations, name theirs with --template (" MEDRUN_TEMPLATES ")");
    return MEDRUN_OK;
}

/* NAME is what the user asked for, or NULL: then the template is recognised, or s->chat is NULL and
 * the checkpoint says so. */
static int choose_template(source *s, const buffer *jinja, const char *name, medrun_error *e) {
    s->chat = name ? chat_find(name) : NULL;
    if (name)
        return s->chat ? MEDRUN_OK : fail(e, MEDRUN_USAGE, "--template: found \"%s\", wanted one "
                                          "of %s", name, MEDRUN_TEMPLATES);
    if (jinja->n && find_template(s, jinja, e)) return e->code;
    if (!jinja->n) {
        s->chat = chat_find("none");
        return note_no_template(s, e);
    }
    if (!s->chat)
        add_note(s, "the chat template is none that medrun knows: run and chat will refuse this "
                 "checkpoint until --template names one, here or there (" MEDRUN_TEMPLATES "); "
                 "tools/reference/templates.py finds out whether one of them renders the same");
    return MEDRUN_OK;
}

/* The union of all that says when an answer ends, the template's own stops included; Med42's files
 * name only one of its two. */
static int finish_stops(source *s, medrun_error *e) {
    tokenizer t;
    if (s->eos >= 0 && add_stop(s, s->folder, s->eos, e)) return e->code;
    if (!s->chat || tokenizer_open(&t, s->tokenizer.data, s->tokenizer.n, s->folder, e))
        return e->code;
    for (size_t i = 0; !e->code && i < 4; i++) {
        int32_t id = chat_token(&t, s->chat->stops[i]);
        if (id >= 0) add_stop(s, s->folder, id, e);
    }
    tokenizer_close(&t);
    return e->code;
}

/* What the cards say of the models with these templates; what a card leaves open is transformers'
 * default. */
static const struct { const char *name; source_sampling sampling; } card_sampling[] = {
    {"llama3", {.temperature = 0.4, .top_k = 150, .top_p = 0.75, .repeat_penalty = 1}},
    {"llama3.1", {.temperature = 0.6, .top_k = 50, .top_p = 0.9, .repeat_penalty = 1}},
    {"afm", {.temperature = 0.5, .top_k = 50, .top_p = 0.95, .repeat_penalty = 1.1}},
    {"apertus", {.temperature = 0.8, .top_k = 50, .top_p = 0.9, .repeat_penalty = 1}},
    {"med42", {.temperature = 0.7, .top_k = 50, .top_p = 1, .repeat_penalty = 1}},
    {"alpaca", {.temperature = 1, .top_k = 50, .top_p = 1, .repeat_penalty = 1}},
};

/* Takes the card's values where the model's own files say nothing about sampling. */
static void finish_sampling(source *s) {
    for (size_t i = 0; s->chat && i < sizeof card_sampling / sizeof *card_sampling; i++) {
        const source_sampling *p = &card_sampling[i].sampling;
        size_t n = strlen(card_sampling[i].name), dash = n;
        if (s->sampling.given || strncmp(s->chat->name, card_sampling[i].name, n) ||
            (s->chat->name[dash] && s->chat->name[dash] != '-')) continue;
        s->sampling = *p;
        add_note(s, "the files say nothing about sampling: temperature %g, top_k %lld, top_p %g, "
                 "repeat_penalty %g from the card of the models with template %s", p->temperature,
                 (long long)p->top_k, p->top_p, p->repeat_penalty, s->chat->name);
    }
}

/* ---- licence ------------------------------------------------------------------------------- */

/* Copies the value of KEY in TEXT's front matter (between lines of ---), else makes OUT empty. */
static void front_matter(const char *text, const char *key, char *out, size_t cap) {
    size_t n = strlen(key);
    out[0] = 0;
    if (strncmp(text, "---\n", 4) && strncmp(text, "---\r\n", 5)) return;
    while ((text = strchr(text, '\n')) && strncmp(++text, "---", 3)) {
        if (strncmp(text, key, n) || text[n] != ':') continue;
        const char *from = text + n + 1, *end = text + strcspn(text, "\r\n");
        while (from < end && strchr(" \t\"'", *from)) from++;
        while (end > from && strchr(" \t\"'", end[-1])) end--;
        if ((size_t)(end - from) < cap) snprintf(out, cap, "%.*s", (int)(end - from), from);
    }
}

/* The licence's name in the model card, if there is one that can be read; Hugging Face writes
 * "other" and a license_name. */
static void read_licence(source *s) {
    buffer b = {0};
    medrun_error e = {0};
    char name[sizeof s->licence];
    if (!file_exists(s->folder, "README.md")) return;
    if (read_text(s, "README.md", &b, &e)) add_note(s, "the licence is not known: %s", e.text);
    else {
        front_matter((const char *)b.data, "license", s->licence, sizeof s->licence);
        front_matter((const char *)b.data, "license_name", name, sizeof name);
        if (!strcmp(s->licence, "other") && name[0]) memcpy(s->licence, name, sizeof name);
    }
    buffer_free(&b);
}
