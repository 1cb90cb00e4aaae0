/* Part of medrun-explain: options, prompts, and the pass that is watched. MIT licence, see LICENSE.
 *
 * Symbols as in section 13 of medrun.c: a row is a token's; layer l reads x_l and leaves x_{l+1},
 * between its two blocks stands m_l. "Stream rows" of a place are x_0, m_0, x_1, m_1, ... x_L. */

enum { MAX_EDITS = 8, MAX_PLACES = 64, MAX_COMPETE = MAX_CHOICES, MAX_TRACKED = 16 };
enum { MOST_KEPT = 48 << 20 };          /* bytes of attention weights that are kept in floats    */
enum { MAP_TOKENS = 512 };              /* of a longer text attention is shown of the first token
                                           and the last ones, between them as one sum            */

typedef struct {
    const char *prompt, *file, *chat, *ids, *mcq, *task, *out, *json, *predict, *answer, *options;
    const char *why, *versus, *lens, *attention, *neurons, *what_if, *leave_out, *ablate, *fill;
    const char *patch, *compare, *budget, *system, *template_name, *date, *temperature, *seed;
    const char *threads, *batch, *kv, *lesson;
    bool raw, force, rotate, mid, dry_run, strict, quiet, help, version;
} explain_options;

/* Where the time of a pass goes. */
enum { S_EMBED, S_NORM, S_QKV, S_ATTENTION, S_OUT, S_WIDEN, S_NARROW, S_LOGITS, N_STAGES };
static const char *const stage_names[N_STAGES] = {"embedding", "norms", "q, k, v", "attention",
    "o", "feed-forward in", "feed-forward out", "logits"};

/* What competes for the explained place: the first id of a text, alone and behind a space. */
typedef struct {
    char text[64];
    int32_t id;                         /* of the form that is taken                            */
    int32_t form[2];                    /* without and with a space; -1: none                   */
} rival;

typedef struct {
    explain_options o;
    const char *model;
    evaluation v;                       /* model, template and question, as medrun-eval has them */
    const char *edits[MAX_EDITS];
    size_t n_edits;
    int lesson;                         /* of the course; 0: none                              */
    bool own_prompt;                    /* the lesson's                                         */
    buffer line;                        /* of the command                                       */
    bool is_mcq;
    const question *q;                  /* of --mcq                                             */
    buffer text;                        /* what edits change: -p's text, the question, or the
                                           last turn of the user, with a NUL                    */
    medrun_message *messages;           /* of --chat                                            */
    size_t n_messages, edited;          /* EDITED: which of them `text` is                      */
    buffer message_text;
    rival rivals[MAX_COMPETE];          /* the options                                          */
    size_t n_rivals;
    int form;                           /* which of rival.form is taken                         */
    buffer tokens;                      /* int32_t: prompt and given answer, then the whole run */
    size_t n_prompt, n, rows;           /* tokens in all; ROWS of them went through the model   */
    int n_predict;
    size_t at;                          /* the explained row: the token behind it is explained  */
    int32_t winner, foil;               /* the two ids whose difference is explained            */
    size_t places[MAX_PLACES], n_places;/* rows of the lens                                     */
    medrun_session *s;
    medrun_session_options session;
    side b;
    size_t L, H, G, D, d, F, V;         /* the model's shape, V without rounding                */
    size_t streams, lens_rows;          /* 2 L + 1; those that the lens shows                   */
    size_t room;                        /* tokens that the arrays below have room for           */
    size_t skip;                        /* rows keep their weights of keys 1 to this as one sum */
    float *last;                        /* (room, d) x_L of every row                           */
    float *stream;                      /* (streams, d) at the explained row                    */
    float *found;                       /* (L, H D) attn_out at the explained row               */
    float *active;                      /* (L, F) ffn_act at the explained row                  */
    float *lens;                        /* (places, lens_rows, d)                               */
    double *mean_found, *mean_mlp;      /* (L, H D), (L, d) sums over the prompt; for --ablate  */
    float **weights;                    /* (room) attention of a row, (L, H, columns), or NULL  */
    uint8_t **shares;                   /* the same in 8 bits, where floats would be too many   */
    bool keep_all, keep_bytes;
    uint8_t **hot;                      /* one-hot values, see weights_task                     */
    size_t n_hot;
    const float *queries;               /* of the pass, from stage q until v                    */
    double mark, stage_seconds[2][N_STAGES];    /* the prompt's, generation's                   */
    size_t stage_rows[2];
    double start, seconds, explaining;
    float *scratch;                     /* (threads, ...) of attention                          */
    page_data page;
    buffer more;                        /* members of meta that more passes add                 */
    uint8_t *used;                      /* (V) ids whose text the page needs                    */
    int attention, neurons;             /* maps, -1: all; length of the list                    */
    double budget, planned;             /* megabytes; bytes that the page will have             */
    size_t n_maps;                      /* that the budget has room for                         */
    uint32_t ablated[64];               /* what is switched off: a head, or L H + an MLP's layer */
    size_t n_ablated;
} explain;

/* ---- prompts ------------------------------------------------------------------------------- */

/* Ids of the conversation M, or of the one text without a template. OPEN gets what may still grow
 * together with what follows. */
static int open_messages(const explain *x, const medrun_message *m, size_t n, open_text *open,
                         medrun_error *e) {
    const evaluation *v = &x->v;
    if (!v->chat) {
        buffer_add(&open->run, m[n - 1].text, m[n - 1].n_bytes);
        open->flags = v->m->tokenizer.add_bos ? MEDRUN_ADD_BOS : 0;
        return e->code;
    }
    chat_writer w = {.c = v->chat, .t = &v->m->tokenizer, .o = &v->chat_options,
                     .out = &open->ids, .e = e};
    chat_conversation(&w, m, n, true);
    open->run = w.run;
    open->flags = w.flags;
    return e->code;
}

/* The id that follows OPEN when TEXT is said next: the first of the longer text that the shorter
 * one has not; -1: none. */
static int32_t next_id_of(const explain *x, const open_text *open, const char *text, bool space,
                          medrun_error *e) {
    buffer run = {0}, before = {0}, after = {0};
    const tokenizer *t = &x->v.m->tokenizer;
    tokenizer_encode(t, text_of(&open->run), open->run.n, open->flags, &before, e);
    buffer_add(&run, open->run.data, open->run.n);
    buffer_printf(&run, "%s%s", space ? " " : "", text);
    if (run.failed) out_of_memory(e, run.n);
    else tokenizer_encode(t, text_of(&run), run.n, open->flags, &after, e);
    int32_t id = !e->code && n_ids(&after) > n_ids(&before) ? *ids_at(&after, n_ids(&before)) : -1;
    buffer_free(&run);
    buffer_free(&before);
    buffer_free(&after);
    return id;
}

/* Both forms of each rival, and of --versus, behind OPEN. */
static int find_rivals(explain *x, const open_text *open, medrun_error *e) {
    for (size_t i = 0; i < x->n_rivals && !e->code; i++)
        for (int k = 0; k < 2; k++)
            x->rivals[i].form[k] = next_id_of(x, open, x->rivals[i].text, k, e);
    if (x->o.versus && !e->code) x->foil = next_id_of(x, open, x->o.versus, false, e);
    if (x->o.versus && !e->code && x->foil < 0)
        fail(e, MEDRUN_USAGE, "--versus: \"%.40s\" adds no token", x->o.versus);
    return e->code;
}

/* How many ids all choices begin with: the harness gives them the blanks that end the context. */
static size_t shared_start(const prompt *p) {
    size_t n = 0;
    for (;; n++)
        for (int i = 0; i < p->n_tails; i++)
            if (tail_length(p, i) <= n + 1 ||
                *ids_at(&p->ids, tail_start(p, i) + n) != *ids_at(&p->ids, p->n + n)) return n;
}

/* The prompt with TEXT (a NUL behind it) where x->text stands now, and its choices rotated by TURN.
 * RIVALS: also look for the options' ids. */
static int build_prompt(explain *x, const char *text, size_t n, int turn, bool rivals, prompt *p,
                        medrun_error *e) {
    *p = (prompt){0};
    if (x->is_mcq) {
        question q = *x->q;
        q.text = text;
        for (int i = 0; i < q.n_choices; i++) q.choice[i] = x->q->choice[(i + turn) % q.n_choices];
        if (make_prompt(&x->v, &q, p, e)) return e->code;
        size_t shared = shared_start(p);
        for (int i = 0; rivals && i < p->n_tails; i++) {
            rival *r = &x->rivals[i];
            *r = (rival){.form = {-1, -1}};
            snprintf(r->text, sizeof r->text, "%.63s", choice_text(&x->v, &q, i));
            r->form[!x->v.chat] = *ids_at(&p->ids, tail_start(p, i) + shared);
            x->n_rivals = (size_t)i + 1;
        }
        p->n += shared;
        if (rivals && x->o.versus)
            return fail(e, MEDRUN_USAGE, "--versus: --mcq names what competes; leave it out");
        return MEDRUN_OK;
    }
    open_text open = {0};
    medrun_message own[2], *m = x->messages ? x->messages : own;
    size_t n_own = 0;
    if (x->v.o.system && !x->messages)
        own[n_own++] = (medrun_message){"system", x->v.o.system, strlen(x->v.o.system)};
    if (x->messages) m[x->edited].text = text, m[x->edited].n_bytes = n;
    else own[n_own++] = (medrun_message){"user", text, n};
    const char *mark = x->v.chat && rivals && !x->o.ids ? mark_in(x->v.chat, text, n) : NULL;
    if (mark && !x->o.quiet)
        fprintf(stderr, "medrun-explain: warning: the text holds \"%s\", with which template %s "
                "begins a turn: the model takes it for one\n", mark, x->v.chat->name);
    if (x->o.ids) buffer_add(&p->ids, x->tokens.data, x->tokens.n);
    else if (!open_messages(x, m, x->messages ? x->n_messages : n_own, &open, e)) {
        buffer_add(&p->ids, open.ids.data, open.ids.n);
        tokenizer_encode(&x->v.m->tokenizer, text_of(&open.run), open.run.n, open.flags, &p->ids,
                         e);
    }
    if (rivals && !e->code) find_rivals(x, &open, e);
    p->n = n_ids(&p->ids);
    if (!e->code && (p->ids.failed || open.run.failed)) out_of_memory(e, p->ids.n);
    if (!e->code && !p->n) fail(e, MEDRUN_USAGE, "the prompt has no tokens");
    buffer_free(&open.ids);
    buffer_free(&open.run);
    return e->code;
}

/* ---- reading what the options name --------------------------------------------------------- */

enum { MOST_TEXT = 16 << 20 };          /* bytes: a thick book has fewer                         */

/* A text file, or stdin, behind what TO has; the line end at its end is dropped. No more than MOST
 * bytes are taken, and of a stream without an end no more are read. */
static int read_text_file(const char *path, size_t most, buffer *to, medrun_error *e) {
    data_set d = {.path = path};
    file_map map = {0};
    buffer in = {0};
    const char *text = "";
    file_facts there;
    size_t n = 0;
    bool stream = !strcmp(path, "-");
    if (!stream && !get_facts(path, -1, &there) && there.regular && there.bytes > most + 3)
        n = most + 1;                                   /* its size is enough                    */
    else if (!stream) map_data(&d, &map, &text, &n, e);
    else {
        char piece[4096];
        for (size_t got = 1; got && in.n <= most;) {
            got = fread(piece, 1, sizeof piece, stdin);
            buffer_add(&in, piece, got);
        }
        text = text_of(&in), n = in.n;
        d.path = "stdin";
    }
    if (!e->code && n > most)
        fail(e, most < MOST_TEXT ? MEDRUN_TOO_LONG : MEDRUN_BAD_FILE, "%s: over %zu bytes are "
             "more than %s", d.path, most, most < MOST_TEXT ? "the context holds" : "are read");
    if (stream && !e->code) check_utf8(&d, text, n, e);
    if (!e->code && n && text[n - 1] == '\n') n--;
    if (!e->code) buffer_add(to, text, n);
    unmap_file(&map);
    buffer_free(&in);
    return e->code;
}

/* The bytes that can fit into the context at most, whatever the text says. */
static size_t most_text(const explain *x) {
    size_t n = (size_t)x->v.m->config.max_positions * x->v.m->longest_piece;
    return n < MOST_TEXT ? n : MOST_TEXT;
}

/* FILE:N, N from 1 on, or FILE for its first question. The file's name may hold a colon. Give what
 * is returned, FILE, to free(); NULL: no memory. */
static char *question_file(const char *mcq, size_t *number, medrun_error *e) {
    const char *colon = strrchr(mcq, ':');
    size_t n = strlen(mcq);
    *number = 1;
    if (colon && colon[1] && !colon[1 + strspn(colon + 1, "0123456789")]) {
        *number = (size_t)strtoull(colon + 1, NULL, 10);
        n = (size_t)(colon - mcq);
    }
    char *path = new_array(n + 1, 1);
    if (path) memcpy(path, mcq, n);
    else out_of_memory(e, n + 1);
    return path;
}

static int open_question(explain *x, medrun_error *e) {
    size_t number;
    char *path = question_file(x->o.mcq, &number, e);
    if (!path) return e->code;
    x->v.t = find_task(x->o.task ? x->o.task : "generic", e);
    if (x->v.t) read_data(&x->v.data, x->v.t, path, NULL, NULL, e);
    if (!e->code && (number < 1 || number > x->v.data.n))
        fail(e, MEDRUN_USAGE, "--mcq: question %zu, but %s has 1 to %zu", number, path,
             x->v.data.n);
    if (!e->code) {
        x->q = &x->v.data.q[number - 1];
        buffer_add(&x->text, x->q->text, strlen(x->q->text) + 1);
        x->text.n--;
    }
    x->v.data.path = "questions";
    free(path);
    return e->code;
}

static int open_chat_file(explain *x, medrun_error *e) {
    buffer file = {0};
    json j = {0};
    const chat_template *c = x->v.chat;
    if (!c) return fail(e, MEDRUN_USAGE, "--chat: wanted a chat template; leave --raw out");
    if (!read_text_file(x->o.chat, MOST_TEXT, &file, e) &&
        !json_parse(&j, text_of(&file), file.n, e))
        chat_messages(c, &j, 0, x->o.chat, &x->messages, &x->n_messages, &x->message_text, e);
    x->edited = x->n_messages;
    for (size_t i = 0; i < x->n_messages && !e->code; i++)
        if (!strcmp(x->messages[i].role, "user")) x->edited = i;
    if (!e->code && x->edited == x->n_messages)
        fail(e, MEDRUN_USAGE, "%s: wanted a turn of the user", x->o.chat);
    if (!e->code) {
        buffer_add(&x->text, x->messages[x->edited].text, x->messages[x->edited].n_bytes);
        buffer_add(&x->text, "", 1);
        x->text.n--;
    }
    json_free(&j);
    buffer_free(&file);
    return e->code;
}

static int read_ids(explain *x, medrun_error *e) {
    for (const char *p = x->o.ids; *p;) {
        char *end;
        if (isspace((uint8_t)*p) || *p == ',') { p++; continue; }
        long id = isdigit((uint8_t)*p) ? strtol(p, &end, 10) : -1;
        if (id < 0 || id >= x->v.m->config.vocab_size)
            return fail(e, MEDRUN_USAGE, "--ids: found \"%.12s\", wanted numbers from 0 to %d", p,
                        x->v.m->config.vocab_size - 1);
        int32_t token = (int32_t)id;
        buffer_add(&x->tokens, &token, sizeof token);
        p = end;
    }
    return MEDRUN_OK;
}

/* "A,B,C": what competes. */
static int read_options(explain *x, medrun_error *e) {
    for (const char *p = x->o.options; p && *p && !e->code;) {
        const char *text = p;
        size_t n = strcspn(p, ",");
        p += n + (p[n] == ',');
        trim(&text, &n);
        rival *r = &x->rivals[x->n_rivals++];
        if (!n || n >= sizeof r->text || x->n_rivals == MAX_COMPETE)
            fail(e, MEDRUN_USAGE, "--options: wanted 2 to %d short texts with commas between",
                 MAX_COMPETE - 1);
        else memcpy(r->text, text, n);
    }
    if (!e->code && x->o.options && x->n_rivals < 2)
        fail(e, MEDRUN_USAGE, "--options: found %zu, wanted 2 or more", x->n_rivals);
    return e->code;
}

/* Refuses places that cannot be written, or that are read, before the work begins. */
static int check_pages(const explain *x, medrun_error *e) {
    const explain_options *o = &x->o;
    size_t number;
    char *questions = o->mcq ? question_file(o->mcq, &number, e) : NULL;
    const char *answer = o->answer && o->answer[0] == '@' ? o->answer + 1 : NULL;
    const char *const inputs[] = {x->model, o->file, o->chat, questions, answer, o->compare};
    const char *const places[] = {o->out, o->json};
    for (size_t i = 0; i < 2 && !e->code; i++) {
        if (!places[i] || !strcmp(places[i], "-")) continue;
        check_inputs(places[i], inputs, sizeof inputs / sizeof *inputs, e);
        if (!e->code) writer_check(places[i], i ? &explain_json : &explain_page, o->force, e);
    }
    free(questions);
    if (!e->code && o->out && o->json && !strcmp(o->out, o->json))
        fail(e, MEDRUN_USAGE, "%s: --out and --json are one file; choose another name", o->out);
    return e->code;
}

static int check_explain_options(explain *x, medrun_error *e) {
    static const char *const fill[] = {"mean", "zero"};
    static const char *const parts[] = {"sentences", "clauses"};
    explain_options *o = &x->o;
    int sources = !!o->chat + !!o->ids + !!o->mcq + (o->prompt || o->file);
    if (sources != 1)
        return fail(e, MEDRUN_USAGE, "wanted one of -p, -f, --chat, --ids and --mcq, found %d",
                    sources);
    if (!o->out && !o->json && !o->dry_run)
        return fail(e, MEDRUN_USAGE, "wanted -o PAGE.html, where the page goes");
    x->v.kv = choose_word("--kv", o->kv, kv_names, 3, o->strict, e);
    choose_word("--fill", o->fill, fill, 2, 0, e);
    choose_word("--leave-out", o->leave_out, parts, 2, 0, e);
    x->is_mcq = o->mcq != NULL;
    x->n_predict = o->mcq || o->answer ? 0 : 64, x->neurons = 20, x->budget = 5;
    option_int("--predict", o->predict, 0, 4096, &x->n_predict, e);
    option_int("--neurons", o->neurons, 0, 1000, &x->neurons, e);
    option_number("--budget", o->budget, 0.1, 1000, &x->budget, e);
    x->attention = 32;
    if (o->attention && !strcmp(o->attention, "none")) x->attention = 0;
    else if (o->attention && !strcmp(o->attention, "all")) x->attention = -1;
    else if (!o->attention || strcmp(o->attention, "auto"))
        option_int("--attention", o->attention, 0, 100000, &x->attention, e);
    if (e->code) return e->code;
    if (o->answer && o->predict && x->n_predict)
        return fail(e, MEDRUN_USAGE, "--answer is given, so that -n has nothing to do");
    if (o->rotate && !o->mcq) return fail(e, MEDRUN_USAGE, "--rotate: wanted --mcq");
    if (o->options && o->mcq)
        return fail(e, MEDRUN_USAGE, "--options: --mcq names them; leave it out");
    if (o->ids && (o->options || o->versus || x->n_edits || o->leave_out || o->patch))
        return fail(e, MEDRUN_USAGE, "--ids: there is no text to change or to go on with");
    return check_pages(x, e);
}

/* The token that is explained, by its position; the row before it explains it. */
static int choose_place(explain *x, medrun_error *e) {
    int why = (int)x->n_prompt;
    size_t n = n_ids(&x->tokens);
    x->at = x->n_prompt - 1;
    if (!x->o.why || !strcmp(x->o.why, "first")) return MEDRUN_OK;
    if (!strcmp(x->o.why, "last")) {
        if (x->n_predict)
            return fail(e, MEDRUN_USAGE, "--why last: wanted --answer or -n 0, for it must be "
                        "known before the run");
        x->at = n >= 2 ? n - 2 : 0;
        return MEDRUN_OK;
    }
    if (option_int("--why", x->o.why, 1, 1 << 24, &why, e)) return e->code;
    if ((size_t)why > n + (size_t)x->n_predict)
        return fail(e, MEDRUN_USAGE, "--why: found %d, wanted a position from 1 to %zu", why,
                    n + (size_t)x->n_predict);
    x->at = (size_t)why - 1;
    return MEDRUN_OK;
}

static void add_place(explain *x, size_t at) {
    for (size_t i = 0; i < x->n_places; i++) if (x->places[i] == at) return;
    if (x->n_places < MAX_PLACES) x->places[x->n_places++] = at;
}

/* Rows of the lens; those past the end of an answer that is shorter are dropped later. */
static int choose_lens(explain *x, medrun_error *e) {
    const char *text = x->o.lens ? x->o.lens : "auto";
    size_t most = x->room;
    bool automatic = !strcmp(text, "auto"), all = !strcmp(text, "all");
    add_place(x, x->at);
    if (!strcmp(text, "none")) return MEDRUN_OK;
    if (automatic) {
        add_place(x, x->n_prompt - 1);
        for (size_t i = x->n_prompt; i < most && x->n_places < 8; i++) add_place(x, i);
        for (size_t i = x->n_prompt - 1; i-- > 0 && x->n_places < 8;) add_place(x, i);
    } else if (all) {
        if (most > MAX_PLACES)
            return fail(e, MEDRUN_USAGE, "--lens: all would be %zu places, wanted at most %d; name "
                        "those that matter", most, MAX_PLACES);
        for (size_t i = 0; i < most; i++) add_place(x, i);
    }
    for (const char *p = text; !automatic && !all && *p && !e->code;) {
        char *end;
        unsigned long at = strtoul(p, &end, 10);
        if (!isdigit((uint8_t)*p) || (*end && *end != ',') || at >= most)
            fail(e, MEDRUN_USAGE, "--lens: found \"%.12s\", wanted auto, all, none or positions "
                 "from 0 to %zu with commas between", p, most - 1);
        else add_place(x, at), p = end + (*end == ',');
    }
    for (size_t i = 1; i < x->n_places; i++)            /* in the order of the text              */
        for (size_t k = i; k && x->places[k - 1] > x->places[k]; k--) {
            size_t other = x->places[k];
            x->places[k] = x->places[k - 1], x->places[k - 1] = other;
        }
    return e->code;
}

/* The answer that is given, behind the prompt's ids: no text of it becomes a control token. */
static int take_given(explain *x, medrun_error *e) {
    buffer text = {0};
    if (x->o.answer[0] == '@') read_text_file(x->o.answer + 1, most_text(x), &text, e);
    else buffer_text(&text, x->o.answer);
    if (!e->code) tokenizer_encode(&x->v.m->tokenizer, text_of(&text), text.n, 0, &x->tokens, e);
    buffer_free(&text);
    return e->code;
}

static int open_explained(explain *x, medrun_error *e) {
    int threads = 0;
    evaluation *v = &x->v;
    if (check_explain_options(x, e) ||
        option_int("--threads", x->o.threads, 1, MAX_THREADS, &threads, e)) return e->code;
    medrun_options open = {.threads = threads, .kernels = getenv("MEDRUN_KERNELS")};
    if (medrun_open(&v->m, x->model, &open, e)) return e->code;
    v->o.no_template = x->o.raw || (!x->o.template_name && v->m->chat == NULL && x->o.ids);
    v->o.template_name = x->o.template_name, v->o.date = x->o.date, v->o.system = x->o.system;
    v->mode = LETTER;
    if (!x->o.ids && choose_chat(v, e)) return e->code;
    if (!v->o.system && !x->is_mcq && v->chat && v->m->system[0]) v->o.system = v->m->system;
    if (v->chat && !strcmp(v->chat->name, "none")) v->o.system = NULL;
    if (x->is_mcq) open_question(x, e);
    else if (x->o.chat) open_chat_file(x, e);
    else if (x->o.ids) read_ids(x, e);
    else {
        if (x->o.prompt) buffer_text(&x->text, x->o.prompt);
        if (x->o.prompt && x->o.file) buffer_text(&x->text, "\n\n");
        if (x->o.file) read_text_file(x->o.file, most_text(x), &x->text, e);
        buffer_add(&x->text, "", 1);
        x->text.n--;
    }
    prompt p;
    x->foil = -1;
    if (e->code || read_options(x, e) ||
        build_prompt(x, text_of(&x->text), x->text.n, 0, true, &p, e)) return e->code;
    x->tokens.n = 0;
    buffer_add(&x->tokens, p.ids.data, p.n * sizeof(int32_t));
    x->n_prompt = p.n;
    buffer_free(&p.ids);
    if (x->o.answer) take_given(x, e);
    return e->code;
}

/* ---- what the observer keeps --------------------------------------------------------------- */

/* Attention weights never exist as a matrix. They come out of the engine's own attention when the
 * values are unit vectors, in the cache's own type, over the cache's own keys: D keys at a time,
 * which give e^(score - the largest of the D) and the sum, as where threads share a long cache. So
 * windows and the cache's rounding are right by themselves, and each key is looked at once. */
static void fill_hot(const explain *x, uint8_t *to, size_t chunk) {
    int kv = x->session.kv;
    size_t D = x->D, panel = cache_panel(kv, D), groups = (D + GROUP - 1) / GROUP;
    uint16_t half = f32_to_f16(1), scale = 0x3C80;      /* bf16 of 1/64                          */
    float one = 1;
    for (size_t at = 0; at < x->room; at++) {
        uint8_t *p = to + at / 16 * panel;
        size_t lane = at % 16, k = at - chunk * D;
        bool is_hot = at / D == chunk;
        for (size_t g = 0; kv == MEDRUN_KV_INT8 && g < groups; g++)
            memcpy(p + 16 * D + 2 * (16 * g + lane), &scale, 2);
        if (!is_hot) continue;
        if (kv == MEDRUN_KV_INT8) p[lane / 2 * 2 * D + lane % 2 + 2 * k] = 64;
        else if (kv == MEDRUN_KV_F32) memcpy(p + 4 * (lane * D + k), &one, 4);
        else memcpy(p + 2 * (lane * D + k), &half, 2);
    }
}

static size_t hot_bytes(const explain *x) {
    return round_up(x->room, KEY_STEP) / 16 * cache_panel(x->session.kv, x->D);
}

static bool keeps_row(const explain *x, size_t at) {
    return (x->keep_all && (!at || at >= x->skip)) || at == x->at || at == x->n_prompt - 1;
}

/* The last key of those that row AT keeps as one sum: 1, where each is by itself. */
static size_t merged(const explain *x, size_t at) {
    return !at || at == x->at || at == x->n_prompt - 1 ? 1 : x->skip;
}

static size_t kept_columns(const explain *x, size_t at) { return at + 2 - merged(x, at); }

/* Weight of KEY at row AT; of keys with one sum the first has it all. */
static float weight_at(const explain *x, size_t at, size_t layer, size_t head, size_t key) {
    size_t skip = merged(x, at), place = (layer * x->H + head) * kept_columns(x, at);
    if (key > 1 && key <= skip) return 0;
    place += key > skip ? key + 1 - skip : key;
    if (!x->keep_bytes) return x->weights[at][place];
    float root = (float)x->shares[at][place] / 255;
    return root * root;
}

typedef struct {
    explain *x;
    size_t layer, first, rows, stride;
} weights_job;

/* Floats of what D keys give a query. */
static size_t part_floats(const explain *x) { return x->D + PART_EXTRA; }

static size_t weights_scratch(const explain *x) {
    return attend_scratch(x->D) + QUERIES * x->n_hot * part_floats(x);
}

/* Weights of row AT from PLACE on, of which START is the first that is seen. PARTS: those of the
 * first D keys, then, STRIDE floats behind, of the next. */
static void join_chunks(explain *x, size_t at, size_t start, size_t place, const float *parts,
                       size_t stride) {
    double largest = -DBL_MAX, total = 0, sum = 0;
    size_t skip = merged(x, at);
    for (int turn = 0; turn < 3; turn++)
        for (size_t c = start / x->D; c <= at / x->D; c++) {
            const float *part = parts + c * stride;
            double below = (double)part[x->D] - largest;
            double factor = turn && below > -200 ? exp_exact(below) : 0;
            if (!turn) largest = fmax(largest, (double)part[x->D]);
            else if (turn == 1) total += factor * (double)part[x->D + 1];
            else
                for (size_t k = 0, key = c * x->D; k < x->D && key <= at; k++, key++) {
                    double weight = key < start ? 0 : factor / total * (double)part[k];
                    size_t column = key > skip ? key + 1 - skip : key > 0;
                    sum = column == 1 && key > 1 ? sum + weight : weight;
                    if (x->keep_bytes) x->shares[at][place + column] = pack_share((float)sum);
                    else x->weights[at][place + column] = (float)sum;
                }
        }
}

/* Items are numbered through key-value heads, then tiles of queries. */
static void weights_task(void *context, size_t begin, size_t end, int thread) {
    weights_job *j = context;
    explain *x = j->x;
    const kv_cache *cache = &x->s->cache;
    const model_config *c = &x->v.m->config;
    size_t group = x->H / x->G, tiles = (j->rows * group + QUERIES - 1) / QUERIES;
    size_t window = c->sliding_window ? (size_t)c->sliding_window : SIZE_MAX, D = x->D;
    size_t part = part_floats(x), stride = QUERIES * part;
    float *scratch = x->scratch + (size_t)thread * weights_scratch(x);
    float *parts = scratch + attend_scratch(D);
    for (size_t i = begin; i < end && !interrupted; i++) {      /* as long as a layer, or longer */
        size_t head = i / tiles, first = i % tiles * QUERIES, last = first + QUERIES, n = 0;
        if (last > j->rows * group) last = j->rows * group;
        attention a = {.kv = cache->kv, .head_dim = D, .end = SIZE_MAX, .part = true,
                       .scale = 1.0f / sqrtf((float)D), .scratch = scratch,
                       .keys = cache->keys + cache_place(cache, (int)j->layer, head)};
        size_t row[QUERIES], start[QUERIES], item[QUERIES];
        for (; first < last; first++)
            if (keeps_row(x, row[n] = j->first + first / group)) {
                start[n] = row[n] + 1 > window ? row[n] + 1 - window : 0;
                item[n++] = first;
            }
        for (size_t chunk = 0; n && chunk * D <= row[n - 1]; chunk++) {
            size_t from = chunk * D, to = from + D;
            a.n = 0, a.values = x->hot[chunk];
            for (size_t k = 0; k < n; k++) {
                if (row[k] < from || start[k] >= to) continue;
                a.q[a.n] = x->queries + item[k] / group * j->stride +
                           (head * group + item[k] % group) * D;
                a.out[a.n] = parts + chunk * stride + k * part;
                a.start[a.n] = start[k] > from ? start[k] : from;
                a.limit[a.n++] = row[k] + 1 < to ? row[k] + 1 : to;
            }
            if (a.n) x->v.m->kernels->attend(&a);
        }
        for (size_t k = 0; k < n; k++) {
            size_t query = head * group + item[k] % group;
            join_chunks(x, row[k], start[k], (j->layer * x->H + query) * kept_columns(x, row[k]),
                       parts + k * part, stride);
        }
    }
}

static void keep_weights(explain *x, size_t layer, size_t rows) {
    weights_job j = {x, layer, x->s->n_done, rows, x->b.heads};
    size_t tiles = (rows * (x->H / x->G) + QUERIES - 1) / QUERIES;
    parallel_for(x->v.m->pool, x->G * tiles, 1, weights_task, &j);
}

/* Adds up the rows of the prompt, for means. */
static void add_rows(double *sum, const float *data, size_t rows, size_t cols, double factor) {
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) sum[c] += factor * (double)data[r * cols + c];
}

/* Row of the stream that a stage leaves: 2 l + 1 after attention, 2 l + 2 after the layer. */
static void keep_stream(explain *x, size_t index, size_t rows, const float *data) {
    size_t first = x->s->n_done, d = x->d;
    size_t lens = x->o.mid ? index : index / 2;
    if (x->at >= first && x->at < first + rows)
        memcpy(x->stream + index * d, data + (x->at - first) * d, d * sizeof *data);
    for (size_t i = 0; i < x->n_places && (x->o.mid || index % 2 == 0); i++) {
        size_t at = x->places[i];
        if (at >= first && at < first + rows)
            memcpy(x->lens + (i * x->lens_rows + lens) * d, data + (at - first) * d,
                   d * sizeof *data);
    }
    if (index + 1 == x->streams) memcpy(x->last + first * d, data, rows * d * sizeof *data);
    size_t ours = first < x->n_prompt ? x->n_prompt - first : 0;
    if (x->mean_mlp && index)
        add_rows(x->mean_mlp + (index - 1) / 2 * d, data, ours < rows ? ours : rows, d,
                 index % 2 ? -1 : 1);
}

static void watch_stage(void *user, const char *stage, int layer, size_t rows, size_t cols,
                        size_t stride, const float *data) {
    static const char *const names[] = {"embed", "attn_norm", "q", "k", "v", "attn_out",
        "attn_resid", "ffn_norm", "ffn_act", "layer_out", "final_norm", "logits"};
    static const uint8_t takes[] = {S_EMBED, S_NORM, S_QKV, S_QKV, S_QKV, S_ATTENTION, S_OUT,
        S_NORM, S_WIDEN, S_NARROW, S_LOGITS, S_LOGITS};
    explain *x = user;
    size_t which = 0, l = layer < 0 ? 0 : (size_t)layer, first = x->s->n_done;
    bool here = x->at >= first && x->at < first + rows;
    (void)stride;
    while (strcmp(names[which], stage)) which++;
    x->stage_seconds[first >= x->n_prompt][takes[which]] += seconds() - x->mark;
    if (!strcmp(stage, "embed")) {
        x->stage_rows[first >= x->n_prompt] += rows;
        keep_stream(x, 0, rows, data);
    } else if (!strcmp(stage, "q")) x->queries = data;
    else if (!strcmp(stage, "v")) keep_weights(x, l, rows);
    else if (!strcmp(stage, "attn_out")) {
        if (here) memcpy(x->found + l * cols, data + (x->at - first) * cols, cols * sizeof *data);
        size_t ours = first < x->n_prompt ? x->n_prompt - first : 0;
        if (x->mean_found)
            add_rows(x->mean_found + l * cols, data, ours < rows ? ours : rows, cols, 1);
    } else if (!strcmp(stage, "attn_resid")) keep_stream(x, 2 * l + 1, rows, data);
    else if (!strcmp(stage, "ffn_act") && here)
        memcpy(x->active + l * cols, data + (x->at - first) * cols, cols * sizeof *data);
    else if (!strcmp(stage, "layer_out")) keep_stream(x, 2 * l + 2, rows, data);
    x->mark = seconds();
}

/* ---- memory and the run -------------------------------------------------------------------- */

static void *take_array(size_t n, size_t size, medrun_error *e) {
    void *p = e->code ? NULL : new_array(n ? n : 1, size);
    if (!p) out_of_memory(e, n * size);
    return p;
}

/* Bytes of the attention weights that are kept, SIZE each. */
static uint64_t all_weights(const explain *x, size_t size) {
    uint64_t n = 0;
    for (size_t at = 0; at < x->room; at++) n += keeps_row(x, at) ? kept_columns(x, at) : 0;
    return n * x->L * x->H * size;
}

/* The shape, and what will be kept. */
static int plan_run(explain *x, medrun_error *e) {
    const model_config *c = &x->v.m->config;
    x->L = (size_t)c->n_layers, x->H = (size_t)c->n_heads, x->G = (size_t)c->n_kv_heads;
    x->D = (size_t)c->head_dim, x->d = (size_t)c->hidden_size, x->F = (size_t)c->ffn_size;
    x->V = (size_t)c->vocab_size;
    x->streams = 2 * x->L + 1, x->lens_rows = x->o.mid ? x->streams : x->L + 1;
    size_t given = n_ids(&x->tokens);
    x->room = given + (size_t)x->n_predict;
    if (x->room > (size_t)c->max_positions)
        return fail(e, MEDRUN_TOO_LONG, "%zu tokens and %d of an answer are longer than the "
                    "context of %d", given, x->n_predict, c->max_positions);
    size_t spare = x->n_edits || x->o.leave_out || x->o.rotate || x->o.patch ? 256 : 0, most;
    most = (size_t)c->max_positions < x->room + spare ? (size_t)c->max_positions : x->room + spare;
    x->session = (medrun_session_options){.context = (int)most, .kv = x->v.kv,
        .strict = x->o.strict, .custom_sampling = x->o.temperature != NULL};
    if (x->o.batch) option_int("--batch", x->o.batch, 1, 65536, &x->session.batch, e);
    double temperature = 0, seed = 1;
    option_number("--temp", x->o.temperature, 0, 100, &temperature, e);
    option_number("--seed", x->o.seed, 0, 9007199254740991.0, &seed, e);
    if (x->o.temperature) {
        x->session.sampling = x->v.m->sampling;
        x->session.sampling.temperature = (float)temperature;
    }
    x->session.sampling.seed = (uint64_t)seed;
    x->skip = given > MAP_TOKENS ? given - MAP_TOKENS : 1;
    x->keep_all = x->attention != 0;
    x->keep_bytes = x->keep_all && all_weights(x, 4) > MOST_KEPT;
    x->keep_all = x->keep_all && all_weights(x, x->keep_bytes ? 1 : 4) <= MOST_KEPT;
    if (!x->keep_all) x->keep_bytes = false;
    return choose_lens(x, e);
}

static int take_memory(explain *x, medrun_error *e) {
    size_t heads = x->H * x->D;
    if (medrun_start(&x->s, x->v.m, &x->session, NULL, 0, e)) return e->code;
    if (start_side(&x->b, x->s, e)) return e->code;
    x->last = take_array(x->room * x->d, sizeof(float), e);
    x->stream = take_array(x->streams * x->d, sizeof(float), e);
    x->found = take_array(x->L * heads, sizeof(float), e);
    x->active = take_array(x->L * x->F, sizeof(float), e);
    x->lens = take_array(x->n_places * x->lens_rows * x->d, sizeof(float), e);
    x->n_hot = (x->room + x->D - 1) / x->D;
    x->scratch = take_array((size_t)x->v.m->pool->threads * weights_scratch(x) + 16,
                            sizeof(float), e);
    x->weights = take_array(x->room, sizeof *x->weights, e);
    x->shares = take_array(x->room, sizeof *x->shares, e);
    x->used = take_array(x->V, 1, e);
    x->hot = take_array(x->n_hot, sizeof *x->hot, e);
    if (x->o.ablate) {
        x->mean_found = take_array(x->L * heads, sizeof(double), e);
        x->mean_mlp = take_array(x->L * x->d, sizeof(double), e);
    }
    for (size_t i = 0; i < x->n_hot && !e->code; i++) {
        x->hot[i] = map_bytes(-1, hot_bytes(x));
        if (!x->hot[i]) out_of_memory(e, hot_bytes(x));
        else fill_hot(x, x->hot[i], i);
    }
    for (size_t at = 0; at < x->room && !e->code; at++) {
        if (!keeps_row(x, at)) continue;
        size_t n = x->L * x->H * kept_columns(x, at);
        if (x->keep_bytes) x->shares[at] = take_array(n, 1, e);
        else x->weights[at] = take_array(n, sizeof(float), e);
    }
    return e->code;
}

/* Processes what is pending, and says how far it is after two seconds. */
static int step_pending(explain *x, medrun_session *s, const char *what, medrun_error *e) {
    size_t all = medrun_pending(s);
    double start = seconds(), next = start + 2;
    while (!e->code && medrun_pending(s)) {
        x->mark = seconds();
        running = s;
        if (!interrupted) medrun_step(&s, 1, e);
        running = NULL;
        if (interrupted && !e->code) fail(e, MEDRUN_INTERRUPTED, "interrupted");
        double now = seconds(), done = (double)(all - medrun_pending(s));
        if (x->o.quiet || now < next) continue;
        next = now + 2;
        fprintf(stderr, "%s: %.0f of %zu tokens, %.0f s left\n", what, done, all,
                (now - start) * ((double)all - done) / done);
    }
    return e->code;
}

/* The prompt and the answer that is given, or one that the model makes. */
static int run_watched(explain *x, medrun_error *e) {
    if (take_memory(x, e)) return e->code;
    size_t given = n_ids(&x->tokens);
    if (medrun_feed(x->s, ids_at(&x->tokens, 0), given, e)) return e->code;
    medrun_observe(x->s, watch_stage, x);
    step_pending(x, x->s, "prompt", e);
    double start = seconds(), next = start + 2;
    running = x->s;
    for (int i = 0; i < x->n_predict && !e->code && !interrupted; i++) {
        int32_t id;
        const char *text;
        size_t n;
        x->mark = seconds();
        if (medrun_next(x->s, &id, &text, &n, e) || medrun_is_stop(x->v.m, id)) break;
        if (x->o.quiet || seconds() < next) continue;
        next = seconds() + 2;
        fprintf(stderr, "answer: %d of at most %d tokens, %.0f s left\n", i + 1, x->n_predict,
                (seconds() - start) / (i + 1) * (x->n_predict - i - 1));
    }
    running = NULL;
    medrun_observe(x->s, NULL, NULL);
    if (interrupted) fail(e, MEDRUN_INTERRUPTED, "interrupted");
    if (e->code) return e->code;
    x->n = medrun_length(x->s), x->rows = x->s->n_done;
    if (x->at >= x->rows)
        return fail(e, MEDRUN_USAGE, "--why: position %zu, but the answer ended at %zu", x->at + 1,
                    x->n - 1);
    x->tokens.n = 0;
    buffer_add(&x->tokens, medrun_tokens(x->s), x->n * sizeof(int32_t));
    if (x->tokens.failed) return out_of_memory(e, x->tokens.n);
    size_t kept = 0;
    for (size_t i = 0; i < x->n_places; i++)
        if (x->places[i] < x->rows) {
            if (kept < i)
                memcpy(x->lens + kept * x->lens_rows * x->d, x->lens + i * x->lens_rows * x->d,
                       x->lens_rows * x->d * sizeof(float));
            x->places[kept++] = x->places[i];
        }
    x->n_places = kept;
    return MEDRUN_OK;
}

static void close_explained(explain *x) {
    stop_side(&x->b);
    medrun_stop(x->s);
    for (size_t i = 0; x->weights && i < x->room; i++) free(x->weights[i]);
    for (size_t i = 0; x->shares && i < x->room; i++) free(x->shares[i]);
    for (size_t i = 0; x->hot && i < x->n_hot; i++)
        if (x->hot[i]) unmap_bytes(x->hot[i], hot_bytes(x));
    void *const all[] = {x->last, x->stream, x->found, x->active, x->lens, x->mean_found,
                         x->mean_mlp, x->weights, x->shares, x->hot, x->scratch, x->used,
                         x->messages};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    buffer *const texts[] = {&x->line, &x->text, &x->message_text, &x->tokens, &x->more,
                             &x->page.bin, &x->page.json};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) buffer_free(texts[i]);
    close_evaluation(&x->v);
}
