/* medrun-eval - scores a model on multiple-choice questions, offline, as the papers do.
 * MIT licence, see LICENSE.
 *
 *     cc -O2 -o medrun-eval tools/eval.c -lm -lpthread
 *     medrun-eval MODEL.mdr medqa test.jsonl -o result.jsonl
 *
 * Prompts, scores and metrics are those of lm-evaluation-harness 0.4.13: what its `hf` model gives
 * in float32 comes out here to the last digits, without Python and without a network. A question
 * is a context and the texts that may follow it; a score is the log-likelihood of such a text. The
 * context is processed once for all of them, many questions share each pass over the weights, and
 * what a prompt has in common with the one before it in the same session is kept.
 *
 *  1 Data          (eval_data.c) data sets as they are published -> questions
 *  2 Prompts       a question as text; shots before it; with a chat template or without
 *  3 Encoding      text -> ids of the context and of what may follow it
 *  4 Passes        sessions that share passes; scores; generation
 *  5 Results       a line for each question; going on after an interruption
 *  6 Summary       accuracy, intervals, subjects and groups; (eval_html.c) a page
 *  7 Commands      options, running, merging
 *
 * Tests: tests/22_eval.c, tests/22_eval.sh, and tools/reference/lm_eval_compare.py. */

#define MEDRUN_NO_MAIN
#include "../medrun.c"
#include "options.c"
#include "files.c"
#include "write.c"
#include "eval_data.c"

#define HARNESS "lm-evaluation-harness 0.4.13"

enum { LETTER, ANSWER, GENERATE, N_MODES };
static const char *const mode_names[N_MODES] = {"letter", "answer", "generate"};

enum { MAX_SLOTS = 256, MAX_SHOTS = 64, NO_QUESTION = -1, BELOW_REQUIRED = 7 };

typedef struct {
    const char *mode, *shots[2], *template_name, *system, *date, *bos, *limit, *shard, *out;
    const char *require, *overflow, *subject, *answers, *html, *summary, *kv, *threads, *batch;
    const char *context, *predict, *parallel;
    bool merge, resume, force, multiturn, no_template, strict, quiet, help, version;
} eval_options;

/* What a question becomes: the ids of its context, and of each text that may follow. */
typedef struct {
    buffer ids;                 /* int32_t: context, then the tails one after another          */
    size_t n;                   /* of the context                                              */
    size_t end[MAX_CHOICES];    /* where a tail ends                                           */
    int n_tails;
    uint8_t digest[32];         /* SHA-256 of the context's text, as the harness has it        */
} prompt;

/* A session and the question it works on. */
typedef struct {
    medrun_session *s;
    long at;                    /* the question; NO_QUESTION: idle                             */
    int tail;                   /* whose tokens stand behind the context                       */
    size_t n, rows;             /* the tokens it is to have; how many of their logits count    */
    size_t known[MAX_CHOICES];  /* tokens of a tail that are scored                            */
    double score[MAX_CHOICES];  /* sum of log-probabilities of those                           */
    buffer text;                /* what was generated                                          */
    size_t n_new;
    bool first;                 /* nothing of it has text yet                                  */
    bool started, finished;     /* some of the question is fed; all of it is done              */
} slot;

typedef struct {
    eval_options o;
    const task *t;
    int mode, kv, bos, n_shots, most_new;
    size_t limit, shard, n_shards;              /* this process takes n % n_shards == shard    */
    double require;
    data_set data, shots;
    medrun_model *m;
    const chat_template *chat;                  /* NULL: plain text                            */
    char today[11];
    medrun_chat_options chat_options;
    size_t context, batch, parallel;
    prompt *prompts;                            /* (data.n)                                    */
    bool *done;                                 /* (data.n) stands in the results              */
    size_t n_mine, n_done;                      /* questions of this shard                     */
    size_t n_resumed, n_scored, n_right;        /* done before; by this process                */
    double chance;                              /* how many of those a guess would hit         */
    medrun_session *lead;                       /* has the scratch of passes, and no tokens    */
    slot slots[MAX_SLOTS];
    size_t n_slots;
    size_t next;                                /* the question that no slot has had           */
    uint64_t processed, needed;                 /* tokens; without any sharing                 */
    uint64_t generated, fed_back;               /* and how many of those went through a pass   */
    double start, seconds, drawn;               /* of the clock; since the start               */
    size_t drawn_at;                            /* the next number of done that is worth a line */
    buffer header, lines;                       /* of the results                              */
    int fd;                                     /* of the result file, or -1                   */
    bool fresh;                                 /* it was empty or not there                   */
    size_t n_kept;                              /* lines that this process added to it         */
} evaluation;

static volatile sig_atomic_t interrupted;
static medrun_session *volatile running;        /* its pass ends early, for one may take long    */

static void on_interrupt(int number) {
    (void)number;
    interrupted = 1;
    if (running) medrun_interrupt(running);
}

/* ============================================================================================
 * 2 Prompts: a question as text; shots before it
 * ============================================================================================ */

static const char *text_of(const buffer *b) { return b->data ? (const char *)b->data : ""; }

/* The text that stands for choice I, or NULL past the last: a letter, or a word, or in mode answer
 * the whole choice. */
static const char *choice_text(const evaluation *v, const question *q, int i) {
    static const char letters[MAX_CHOICES][2] = {
        "A", "B", "C", "D", "E", "F", "G", "H", "I", "J", "K", "L", "M", "N", "O", "P", "Q", "R",
        "S", "T", "U", "V", "W", "X", "Y", "Z"};
    return v->mode == ANSWER || v->t->words ? q->choice[i] : letters[i];
}

static bool is_pro(const evaluation *v) { return !strcmp(v->t->name, "mmlu_pro"); }

static void add_stripped(buffer *b, const char *text) {
    size_t n = strlen(text);
    trim(&text, &n);
    buffer_add(b, text, n);
}

/* The harness's mmlu_pro asks for reasoning in one way, MeditronFO's protocol in another. */
static void write_reasoning(const evaluation *v, const question *q, buffer *b) {
    static const char *const numbers[] = {"two", "three", "four", "five", "six", "seven", "eight",
                                          "nine", "ten"};
    if (is_pro(v)) {
        buffer_printf(b, "Question:\n%s\nOptions:\n", q->text);
        for (int i = 0; i < q->n_choices; i++) {
            buffer_printf(b, "%c. ", 'A' + i);
            add_stripped(b, q->choice[i]);
            buffer_text(b, "\n");
        }
        buffer_text(b, "Answer: Let's think step by step.");
        return;
    }
    buffer_text(b, "Instructions: The following are multiple choice questions about medical "
                "knowledge. Solve them in a step-by-step fashion, starting by summarizing the "
                "available information. Output a single option from the ");
    if (q->n_choices <= 10) buffer_text(b, numbers[q->n_choices - 2]);
    else buffer_printf(b, "%d", q->n_choices);
    buffer_text(b, " options as the final answer.\n\n Question: ");
    for (const char *p = q->context; *p; p++)           /* an abstract's paragraphs are one here */
        buffer_add(b, *p == '\n' && v->t->words ? " " : p, 1);
    if (*q->context) buffer_text(b, " ");
    if (v->t->words) add_stripped(b, q->text);
    else buffer_text(b, q->text);
    if (!strcmp(v->t->name, "medmcqa")) buffer_text(b, "\n");
    for (int i = 0; i < q->n_choices; i++) {
        const char *text = q->choice[i];
        buffer_printf(b, " (%c) ", 'A' + i);
        if (v->t->words) buffer_printf(b, "%c%s", toupper(text[0]), text + 1);
        else buffer_text(b, text);
    }
    if (v->t->words) buffer_text(b, " ");
    buffer_text(b, "\n Response (think step by step and then end with 'Final Answer:' followed by "
                "*only* the letter corresponding to the correct answer enclosed in parentheses)");
}

static void write_question(const evaluation *v, const question *q, buffer *b) {
    if (v->mode == GENERATE) { write_reasoning(v, q, b); return; }
    if (*q->context) buffer_printf(b, "%s: %s\n", v->t->words ? "Abstract" : "Context", q->context);
    buffer_text(b, v->t->opening);
    if (v->t->strip) add_stripped(b, q->text);
    else buffer_text(b, q->text);
    buffer_text(b, v->t->words ? "\n" : v->t->between);
    for (int i = 0; !v->t->words && i < q->n_choices; i++)
        buffer_printf(b, "%c. %s\n", 'A' + i, q->choice[i]);
    buffer_text(b, "Answer:");
}

/* What follows a shot's question. */
static const char *shot_answer(const evaluation *v, const question *q) {
    static const char opening[] = "A: Let's think step by step. ";
    if (v->mode != GENERATE) return choice_text(v, q, q->answer);
    return strncmp(q->reasoning, opening, sizeof opening - 1) ? q->reasoning
                                                              : q->reasoning + sizeof opening - 1;
}

/* The next of the shots that goes with Q, from *AT on: those of its subject, where the task has
 * subjects and the shots too. */
static const question *next_shot(const evaluation *v, const question *q, size_t *at) {
    bool same = v->t->topic || (is_pro(v) && v->mode == GENERATE);
    while (*at < v->shots.n) {
        const question *s = &v->shots.q[(*at)++];
        if (!same || !strcmp(s->subject, q->subject)) return s;
    }
    return NULL;
}

/* --system and what the task says first; empty where there is nothing. */
static void write_description(const evaluation *v, const question *q, buffer *b) {
    bool pro = is_pro(v) && v->mode == GENERATE, topic = v->t->topic && v->mode != GENERATE;
    if (v->o.system) buffer_text(b, v->o.system);
    if (!pro && !topic) return;
    if (b->n && !isspace(b->data[b->n - 1])) buffer_text(b, "\n\n");
    buffer_text(b, "The following are multiple choice questions (with answers) about ");
    for (const char *p = q->subject; *p; p++) buffer_add(b, *p == '_' ? " " : p, 1);
    buffer_text(b, pro ? ". Think step by step and then finish your answer with \"the answer is "
                "(X)\" where X is the correct letter choice.\n" : ".\n\n");
}

/* The parts of a prompt: the description, question and answer of each shot, the question. */
typedef struct {
    buffer text[2 + 2 * MAX_SHOTS];
    size_t n;
} prompt_parts;

static int write_parts(const evaluation *v, const question *q, prompt_parts *p, medrun_error *e) {
    size_t at = 0;
    *p = (prompt_parts){.n = 1};
    write_description(v, q, &p->text[0]);
    for (int i = 0; i < v->n_shots; i++) {
        const question *s = next_shot(v, q, &at);
        if (!s)
            return fail(e, MEDRUN_BAD_FILE, "%s: has only %d of %d shots%s%s", v->shots.path, i,
                        v->n_shots, *q->subject ? " about " : "", q->subject);
        if (v->mode == GENERATE && !*s->reasoning)
            return fail(e, MEDRUN_BAD_FILE, "%s:%zu: field cot_content is missing, the reasoning",
                        v->shots.path, s->line);
        write_question(v, s, &p->text[p->n++]);
        buffer_text(&p->text[p->n++], shot_answer(v, s));
    }
    write_question(v, q, &p->text[p->n++]);
    for (size_t i = 0; i < p->n; i++)
        if (p->text[i].failed) return out_of_memory(e, p->text[i].n);
    return MEDRUN_OK;
}

static void free_parts(prompt_parts *p) {
    for (size_t i = 0; i < p->n; i++) buffer_free(&p->text[i]);
}

/* Parts from FIRST on as one text. */
static void join_parts(const prompt_parts *p, size_t first, buffer *b) {
    for (size_t i = first; i < p->n; i++) {
        bool answer = i && i % 2 == 0;
        buffer_add(b, p->text[i].data, p->text[i].n);
        if (i && i + 1 < p->n) buffer_text(b, answer ? "\n\n" : " ");
    }
}

/* The parts as messages, which point into PARTS and JOINED; how many. */
static size_t parts_as_messages(const evaluation *v, const prompt_parts *p, buffer *joined,
                                medrun_message *m) {
    size_t n = 0;
    if (p->text[0].n) m[n++] = (medrun_message){"system", text_of(&p->text[0]), p->text[0].n};
    if (!v->o.multiturn) {
        join_parts(p, 1, joined);
        m[n++] = (medrun_message){"user", text_of(joined), joined->n};
        return n;
    }
    for (size_t i = 1; i < p->n; i++)
        m[n++] = (medrun_message){i % 2 ? "user" : "assistant", text_of(&p->text[i]),
                                  p->text[i].n};
    return n;
}

/* ============================================================================================
 * 3 Encoding: text -> ids of the context and of what may follow it
 *
 * The harness's way: white space at the end of the context goes to what follows; context and
 * whole are tokenized, and the tokens of the whole behind as many as the context has are scored.
 * ============================================================================================ */

/* The end of a text: ids that nothing behind can change, and the run of text after them. */
typedef struct {
    buffer ids, run;
    int flags;                  /* for tokenizing the run                                      */
} open_text;

static size_t without_space(const char *text, size_t n) {
    const char *p = text;
    trim(&p, &n);
    return n ? (size_t)(p - text) + n : 0;
}

static size_t n_ids(const buffer *b) { return b->n / sizeof(int32_t); }
static const int32_t *ids_at(const buffer *b, size_t i) {
    return (const int32_t *)(const void *)b->data + i;
}

static int encode_prompt(const evaluation *v, const question *q, const open_text *x, prompt *p,
                         medrun_error *e) {
    const tokenizer *t = &v->m->tokenizer;
    const char *run = text_of(&x->run);
    size_t n = v->mode == GENERATE ? x->run.n : without_space(run, x->run.n);
    buffer_add(&p->ids, x->ids.data, x->ids.n);
    int code = tokenizer_encode(t, run, n, x->flags, &p->ids, e);
    p->n = n_ids(&p->ids);
    for (int i = 0; !code && v->mode != GENERATE && i < q->n_choices; i++) {
        buffer text = {0}, whole = {0};
        buffer_add(&text, run, x->run.n);
        buffer_printf(&text, "%s%s", v->chat ? "" : " ", choice_text(v, q, i));
        buffer_add(&whole, x->ids.data, x->ids.n);
        if (text.failed) code = out_of_memory(e, text.n);
        else code = tokenizer_encode(t, text_of(&text), text.n, x->flags, &whole, e);
        if (!code && n_ids(&whole) <= p->n)
            code = fail(e, MEDRUN_BAD_FILE, "question in line %zu: choice %d adds no token",
                        q->line, i + 1);
        if (!code) buffer_add(&p->ids, ids_at(&whole, p->n), whole.n - p->n * sizeof(int32_t));
        p->end[i] = n_ids(&p->ids), p->n_tails = i + 1;
        buffer_free(&text);
        buffer_free(&whole);
    }
    if (!code && !p->n) code = fail(e, MEDRUN_BAD_FILE, "question in line %zu: no tokens", q->line);
    return !code && p->ids.failed ? out_of_memory(e, p->ids.n) : code;
}

/* With a chat template: its ids up to the last control token, and what it wrote behind that. */
static int open_chat(const evaluation *v, const prompt_parts *parts, open_text *x, prompt *p,
                     medrun_error *e) {
    medrun_message m[2 + 2 * MAX_SHOTS];
    buffer joined = {0}, shown = {0};
    size_t n = parts_as_messages(v, parts, &joined, m);
    medrun_chat_options as_is = v->chat_options;
    as_is.bos = MEDRUN_BOS_AUTO;
    chat_writer w = {.c = v->chat, .t = &v->m->tokenizer, .o = &v->chat_options, .out = &x->ids,
                     .e = e};
    chat_writer text = {.c = v->chat, .t = &v->m->tokenizer, .o = &as_is, .as_text = true,
                        .out = &shown, .e = e};
    if (joined.failed) out_of_memory(e, joined.n);
    if (!e->code) chat_conversation(&w, m, n, true);
    x->run = w.run;
    x->flags = w.flags;
    if (!e->code) chat_render(&text, m, n, true);
    sha256_of(text_of(&shown), shown.n, p->digest);
    buffer_free(&joined);
    buffer_free(&shown);
    return e->code;
}

static int make_prompt(const evaluation *v, const question *q, prompt *p, medrun_error *e) {
    prompt_parts parts;
    open_text x = {0};
    int code = write_parts(v, q, &parts, e);
    if (!code && v->chat) code = open_chat(v, &parts, &x, p, e);
    else if (!code) {
        bool bos = v->bos == MEDRUN_BOS_AUTO ? v->m->tokenizer.add_bos : v->bos == MEDRUN_BOS_ON;
        join_parts(&parts, 0, &x.run);
        sha256_of(text_of(&x.run), x.run.n, p->digest);
        x.flags = bos ? MEDRUN_ADD_BOS : 0;
    }
    if (!code && (x.run.failed || x.ids.failed)) code = out_of_memory(e, x.run.n);
    if (!code) code = encode_prompt(v, q, &x, p, e);
    free_parts(&parts);
    buffer_free(&x.ids);
    buffer_free(&x.run);
    return code;
}

/* Where tail I begins in p->ids. */
static size_t tail_start(const prompt *p, int i) { return i ? p->end[i - 1] : p->n; }
static size_t tail_length(const prompt *p, int i) { return p->end[i] - tail_start(p, i); }

/* The tokens that a question needs in its session. */
static size_t prompt_length(const evaluation *v, const prompt *p) {
    size_t longest = v->mode == GENERATE ? (size_t)v->most_new : 0;
    for (int i = 0; i < p->n_tails; i++)
        if (tail_length(p, i) - 1 > longest) longest = tail_length(p, i) - 1;
    return p->n + longest;
}

/* ============================================================================================
 * 4 Passes: sessions that share passes; scores; generation
 *
 * Each slot has a session and a question. A pass takes what fits: first the few tokens of texts
 * that are scored or generated, then contexts. A row of logits serves all tails that begin alike,
 * so that single letters need no pass of their own; other tails follow one after another, in
 * passes that contexts of other questions fill.
 * ============================================================================================ */

enum { FEW = 64 };

/* The token that is to stand at place I of the slot's session. */
static int32_t wanted_token(const evaluation *v, const slot *s, size_t i) {
    const prompt *p = &v->prompts[s->at];
    return *ids_at(&p->ids, i < p->n ? i : tail_start(p, s->tail) + i - p->n);
}

/* Turns to the first tail that is not scored to its end, and keeps of the session's tokens those
 * that stand there anyway, also those of another question. False: all are scored. */
static bool next_tail(const evaluation *v, slot *s) {
    const prompt *p = &v->prompts[s->at];
    const int32_t *have = medrun_tokens(s->s);
    size_t same = 0, done = medrun_length(s->s);
    for (s->tail = 0; s->tail < p->n_tails; s->tail++)
        if (s->known[s->tail] < tail_length(p, s->tail)) break;
    if (v->mode != GENERATE && s->tail == p->n_tails) return false;
    size_t known = v->mode == GENERATE ? 0 : s->known[s->tail];
    s->n = v->mode == GENERATE ? p->n : p->n + tail_length(p, s->tail) - 1;
    s->rows = s->n - (p->n + known - 1);
    while (same < done && same < s->n - s->rows && have[same] == wanted_token(v, s, same)) same++;
    medrun_rewind(s->s, same, NULL);
    s->s->n_done = same;                /* rewind would have the last again, for its logits     */
    return true;
}

/* How many tokens of its question a session has at its front: those that are processed, or ALL. */
static size_t common_start(const evaluation *v, const slot *s, const slot *with, bool all) {
    const int32_t *have = medrun_tokens(with->s);
    size_t n = all ? medrun_length(with->s) : with->s->n_done, same = 0;
    while (same < n && same < s->n - s->rows && have[same] == wanted_token(v, s, same)) same++;
    return same;
}

/* Copies what FROM has made of its first N tokens; both sessions are of one shape. */
static int copy_start(slot *s, const slot *from, size_t n, medrun_error *e) {
    const medrun_session *a = from->s, *b = s->s;
    size_t bytes = (n + 15) / 16 * cache_panel(a->options.kv, (size_t)a->model->config.head_dim);
    for (int l = 0; l < a->model->config.n_layers; l++)
        for (size_t h = 0; h < (size_t)a->model->config.n_kv_heads; h++) {
            size_t to = cache_place(&b->cache, l, h), at = cache_place(&a->cache, l, h);
            memcpy(b->cache.keys + to, a->cache.keys + at, bytes);
            memcpy(b->cache.values + to, a->cache.values + at, bytes);
        }
    medrun_rewind(s->s, 0, NULL);
    if (medrun_feed(s->s, a->tokens, n, e)) return e->code;
    return s->s->n_done = n, MEDRUN_OK;
}

/* Before the first token of a question: another session may have more of its beginning, such as
 * the same shots. True: one will after this pass, so that waiting is worth it. */
static bool share_start(const evaluation *v, slot *s, medrun_error *e) {
    const slot *best = s;
    size_t most = medrun_length(s->s), soon = 0;
    for (const slot *o = v->slots; o < v->slots + v->n_slots; o++) {
        size_t now = common_start(v, s, o, false), all = common_start(v, s, o, true);
        if (o != s && now > most) most = now, best = o;
        if (o != s && all > soon) soon = all;
    }
    if (soon > most + FEW) return true;
    if (best != s) copy_start(s, best, most, e);
    s->started = true;
    return false;
}

/* Gives an idle slot the next question of this shard; false: there is none. */
static bool next_question(evaluation *v, slot *s) {
    size_t at = v->next;
    while (at < v->data.n && (at % v->n_shards != v->shard || v->done[at])) at++;
    v->next = at + 1;
    if (at >= v->data.n) return v->next = at, false;
    buffer_free(&s->text);
    *s = (slot){.s = s->s, .at = (long)at, .first = true};
    return next_tail(v, s);
}

/* Feeds what fits of a slot's tokens to its session. Rows of logits must come from one pass. */
static int feed_slot(evaluation *v, slot *s, size_t *room, medrun_error *e) {
    size_t have = medrun_length(s->s), left = s->n - have, take = left < *room ? left : *room;
    if (left > take && left - take < s->rows) take = left > s->rows ? left - s->rows : 0;
    for (size_t i = 0; i < take; i++) {
        int32_t id = wanted_token(v, s, have + i);
        if (medrun_feed(s->s, &id, 1, e)) return e->code;
    }
    s->s->n_wanted = take == left ? s->rows : 0;
    if (s->n_new) v->fed_back += take;
    *room -= take;
    return MEDRUN_OK;
}

/* Logits of place N - 1 - ROW: every tail that goes on from there gets its share. */
static int score_row(const evaluation *v, slot *s, size_t row, medrun_error *e) {
    const prompt *p = &v->prompts[s->at];
    size_t known = s->n - row - p->n;
    const int32_t *here = ids_at(&p->ids, tail_start(p, s->tail));
    const float *logits = medrun_logits(s->s, row);
    if (!logits) return fail(e, MEDRUN_FAILED, "eval: a row of logits is missing");
    double sum = log_sum(logits, (size_t)v->m->config.vocab_size);
    if (!(fabs(sum) <= DBL_MAX))
        return fail(e, MEDRUN_FAILED, "the model computes logits that are not finite (question in "
                    "line %zu)", v->data.q[s->at].line);
    for (int i = 0; i < p->n_tails; i++) {
        const int32_t *ids = ids_at(&p->ids, tail_start(p, i));
        if (s->known[i] != known || known == tail_length(p, i) ||
            memcmp(ids, here, known * sizeof *ids)) continue;
        s->score[i] += (double)logits[ids[known]] - sum;
        s->known[i]++;
    }
    return MEDRUN_OK;
}

/* ---- generation ---------------------------------------------------------------------------- */

/* Texts that end an answer: the harness's mmlu_pro, MeditronFO's protocol. */
static const char *const pro_stops[] = {"Question:", NULL};
static const char *const reasoning_stops[] = {"</s>", "Q:", "<|im_end|>", "<|end_of_text|>", NULL};

/* Cuts B before the first stop text; was there one? */
static bool cut_at_stop(const evaluation *v, buffer *b) {
    size_t n = b->n;
    for (const char *const *stop = is_pro(v) ? pro_stops : reasoning_stops; *stop; stop++) {
        const char *at = b->n ? memmem(b->data, b->n, *stop, strlen(*stop)) : NULL;
        if (at) b->n = (size_t)(at - text_of(b));
    }
    if (b->n < n) b->data[b->n] = 0;
    return b->n < n;
}

/* Appends the likeliest token; true: the answer ends. */
static bool generate_token(evaluation *v, slot *s, medrun_error *e) {
    prompt *p = &v->prompts[s->at];
    const float *logits = medrun_logits(s->s, 0);
    if (!logits) return fail(e, MEDRUN_FAILED, "eval: a row of logits is missing"), true;
    int32_t best = 0;
    for (int32_t i = 1; i < v->m->config.vocab_size; i++) if (logits[i] > logits[best]) best = i;
    size_t n;
    const char *text = tokenizer_text(&v->m->tokenizer, best, false, &s->first, &n);
    v->generated++, s->n_new++;
    if (medrun_is_stop(v->m, best)) return true;
    for (size_t i = 0; i < n; i++)                      /* a NUL would end the text             */
        buffer_add(&s->text, text[i] ? text + i : "\xEF\xBF\xBD", text[i] ? 1 : 3);
    buffer_add(&p->ids, &best, sizeof best);
    p->end[0] = n_ids(&p->ids);
    if (s->text.failed || p->ids.failed) return out_of_memory(e, s->text.n), true;
    s->n++, s->rows = 1;
    return cut_at_stop(v, &s->text) || s->n_new == (size_t)v->most_new;
}

/* "answer is (B)" as the harness's mmlu_pro looks for it; the choice, or -1. */
static int find_pro_answer(const char *text) {
    for (const char *p = text; (p = strstr(p, "answer is ")); p++) {
        const char *letter = p + strlen("answer is ");
        letter += *letter == '(';
        if (*letter >= 'A' && *letter <= 'J') return *letter - 'A';
    }
    return -1;
}

static bool is_word(const char *p) {
    size_t len;
    int class = *p ? class_at((const uint8_t *)p, strlen(p), &len) : CLASS_OTHER;
    return *p == '_' || (LETTERS >> class & 1) || class == CLASS_N;
}

/* MeditronFO's pattern: "answer" in any case, then nothing that could be a letter of N choices,
 * perhaps "boxed", and such a letter as a word. With four, as a regular expression:
 * (?i)Answer[^A-D]*(?::)*[^A-D]*(?:boxed)*[^A-D]*([A-D])\b */
static int find_reasoned_answer(const char *text, int n) {
    char letters[2 * MAX_CHOICES + 1] = "";
    for (int i = 0; i < 2 * n; i++) letters[i] = (char)((i % 2 ? 'a' : 'A') + i / 2);
    for (const char *p = text; *p; p++) {
        if (strncasecmp(p, "answer", 6)) continue;
        const char *at = p + 6 + strcspn(p + 6, letters);
        const char *boxed = at;
        while (!strncasecmp(boxed, "boxed", 5)) boxed += 5;
        if (boxed > at) at = boxed + strcspn(boxed, letters);
        if (*at && !is_word(at + 1)) return toupper(*at) - 'A';
    }
    return -1;
}

/* ---- the loop ------------------------------------------------------------------------------ */

/* What a slot makes of the logits it waited for; it may be the end of its question. */
static int use_logits(evaluation *v, slot *s, medrun_error *e) {
    bool more;
    if (v->mode == GENERATE) more = !generate_token(v, s, e);
    else {
        for (size_t row = s->rows; row-- > 0 && !e->code;) score_row(v, s, row, e);
        more = !e->code && next_tail(v, s);
    }
    s->finished = !more;
    return e->code;
}

/* One pass over the weights, for all slots that fit. Sessions with few tokens go first, so that
 * the others fill the pass. */
static int run_pass(evaluation *v, medrun_error *e) {
    medrun_session *sessions[MAX_SLOTS + 1] = {v->lead};
    slot *ready[MAX_SLOTS];
    size_t n = 1, n_ready = 0, room = v->batch;
    for (int few = 1; few >= 0; few--)
        for (slot *s = v->slots; s < v->slots + v->n_slots && room; s++) {
            size_t before = room, left = s->at < 0 ? 0 : s->n - medrun_length(s->s);
            if (!left || (left <= FEW) != few || medrun_pending(s->s)) continue;
            if (!s->started && share_start(v, s, e)) continue;
            if (e->code || feed_slot(v, s, &room, e)) return e->code;
            if (room == before) continue;
            sessions[n++] = s->s;
            if (medrun_length(s->s) == s->n) ready[n_ready++] = s;
        }
    if (medrun_step(sessions, n, e)) return e->code;
    v->processed += v->batch - room;
    for (size_t i = 0; i < n_ready; i++) if (use_logits(v, ready[i], e)) return e->code;
    return MEDRUN_OK;
}

/* The sessions: one that leads, with room for a pass, and one for each question at a time, whose
 * scratch is never touched. Fewer where memory is short. */
static int start_sessions(evaluation *v, size_t rows, medrun_error *e) {
    medrun_session_options o = {.context = (int)v->context, .kv = v->kv, .strict = v->o.strict};
    o.batch = o.logit_rows = (int)rows;
    size_t bytes = medrun_session_bytes(v->m, &o), most = v->parallel;
    double half = limits_of_machine().available / 2;
    while (most > 1 && (double)(most * bytes) > half) most--;
    for (; v->n_slots < most && v->n_slots < v->n_mine; v->n_slots++) {
        slot *s = &v->slots[v->n_slots];
        s->at = NO_QUESTION;
        if (medrun_start(&s->s, v->m, &o, NULL, 0, e)) return e->code;
    }
    size_t limit = (size_t)v->m->config.max_positions;
    if (v->batch < rows) v->batch = rows;
    if (v->batch > limit) v->batch = limit;
    o.batch = (int)v->batch, o.logit_rows = 1;
    if (o.context < o.batch) o.context = o.batch;
    return medrun_start(&v->lead, v->m, &o, NULL, 0, e);
}

/* ============================================================================================
 * 5 Results: a line for each question; going on after an interruption
 *
 * The first line of a file says what was run on what; of all files of one run it is the same, also
 * of shards. The others come as the questions are finished, each in one write, in no order.
 * ============================================================================================ */

static const uint64_t MOST_RESULTS = (uint64_t)1 << 32;     /* bytes of a file                   */

static void add_string(buffer *b, const char *key, const char *text) {
    buffer_printf(b, "\"%s\":", key);
    if (text) json_quote(b, text, strlen(text));
    else buffer_text(b, "null");
    buffer_text(b, ",");
}

static void add_digest(buffer *b, const char *key, const uint8_t digest[32]) {
    char hex[65];
    hex_of(digest, hex);
    add_string(b, key, hex);
}

static const char *bool_text(bool b) { return b ? "true" : "false"; }

static const char *base_name(const char *path) {
    return strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
}

/* The questions whose own prompt shows them with their answer, as a shot. Two questions may have
 * one text ("Which is true?"), so the right choice must be the same, too. */
static void write_scored_shots(const evaluation *v, buffer *b) {
    size_t found = 0;
    for (size_t i = 0; i < v->data.n; i++) {
        const question *q = &v->data.q[i], *s;
        size_t at = 0;
        bool same = false;
        for (int k = 0; k < v->n_shots && !same && (s = next_shot(v, q, &at)); k++)
            same = !strcmp(s->text, q->text) && !strcmp(s->context, q->context) &&
                   !strcmp(s->choice[s->answer], q->choice[q->answer]);
        if (same) buffer_printf(b, found++ ? ",%zu" : "\"scored_shots\":[%zu", i);
    }
    if (found) buffer_text(b, "],");
}

/* Rows of one table are of one `run`, or say how theirs differ; `data` names the data set. */
static void write_header(evaluation *v) {
    static const char *const bos[] = {"auto", "on", "off"};
    buffer *b = &v->header;
    engine g = {.k = v->m->kernels, .strict = v->o.strict};
    buffer_text(b, "{\"medrun-eval\":1,\"run\":{");
    add_string(b, "engine", MEDRUN_VERSION);
    add_string(b, "prompts", HARNESS);
    add_string(b, "model", v->m->name);
    add_digest(b, "hash", v->m->file.hash);
    add_string(b, "type", type_names[v->m->type]);
    bool exact = pack_kind(&g, v->m->type) != PACK_BF16;
    add_string(b, "numbers", exact ? "exact" : v->m->kernels->name);
    add_string(b, "kv", kv_names[v->kv]);
    add_string(b, "mode", mode_names[v->mode]);
    add_string(b, "template", v->chat ? v->chat->name : NULL);
    add_string(b, "bos", bos[v->bos]);
    add_string(b, "system", v->o.system);
    add_string(b, "date", v->chat_options.date);
    buffer_printf(b, "\"strict\":%s,\"shots\":%d,\"multiturn\":%s},\"data\":{",
                  bool_text(v->o.strict), v->n_shots, bool_text(v->o.multiturn));
    add_string(b, "task", v->t->name);
    add_string(b, "version", v->t->harness);
    add_string(b, "file", base_name(v->data.path));
    add_digest(b, "sha256", v->data.digest);
    add_string(b, "subject", v->o.subject);
    if (v->n_shots) add_digest(b, "shots_sha256", v->shots.digest);
    write_scored_shots(v, b);
    if (v->mode == GENERATE) buffer_printf(b, "\"most_new\":%d,", v->most_new);
    buffer_printf(b, "\"longest\":%d,\"questions\":%zu}}\n", v->o.context ? (int)v->context : 0,
                  v->data.n);
}

static size_t n_characters(const char *text) {
    size_t n = 0;
    for (; *text; text++) n += (*text & 0xC0) != 0x80;
    return n;
}

/* The place of the largest score; of the largest for each character when NORMAL. */
static int best_choice(const evaluation *v, const slot *s, bool normal) {
    const question *q = &v->data.q[s->at];
    int best = 0;
    double most = 0;
    for (int i = 0; i < q->n_choices; i++) {
        double score = s->score[i];
        if (normal) score /= (double)n_characters(choice_text(v, q, i));
        if (!i || score > most) most = score, best = i;
    }
    return best;
}

static void write_scores(const evaluation *v, const slot *s, buffer *b) {
    const question *q = &v->data.q[s->at];
    buffer_text(b, "\"ll\":[");
    for (int i = 0; i < q->n_choices; i++) buffer_printf(b, "%s%.6f", i ? "," : "", s->score[i]);
    buffer_printf(b, "],\"pred\":%d,\"pred_norm\":%d,", best_choice(v, s, false),
                  best_choice(v, s, true));
}

/* The choice that counts; -1: none was found. */
static int prediction(const evaluation *v, const slot *s) {
    int n = v->data.q[s->at].n_choices;
    if (v->mode != GENERATE) return best_choice(v, s, false);
    int found = is_pro(v) ? find_pro_answer(text_of(&s->text))  /* of three choices D is one, too */
                          : find_reasoned_answer(text_of(&s->text), n < 4 ? 4 : n);
    return found < n ? found : -1;
}

static void write_generated(const evaluation *v, const slot *s, buffer *b) {
    const char *text = text_of(&s->text);
    add_string(b, "text", text);
    buffer_printf(b, "\"tokens\":%zu,\"pred\":%d,", s->n_new, prediction(v, s));
}

/* The line of question AT; S is NULL where it is skipped, as it is too long. */
static void write_line(const evaluation *v, size_t at, const slot *s, buffer *b) {
    const question *q = &v->data.q[at];
    buffer_printf(b, "{\"n\":%zu,", at);
    add_string(b, "id", q->id);
    add_string(b, "subject", q->subject);
    add_digest(b, "prompt", v->prompts[at].digest);
    if (!s) buffer_printf(b, "\"skipped\":%zu,", prompt_length(v, &v->prompts[at]));
    else if (v->mode == GENERATE) write_generated(v, s, b);
    else write_scores(v, s, b);
    buffer_printf(b, "\"truth\":%d,\"choices\":[", q->answer);
    for (int i = 0; i < q->n_choices; i++) {
        if (i) buffer_text(b, ",");
        json_quote(b, q->choice[i], strlen(q->choice[i]));
    }
    buffer_text(b, "],\"question\":");
    json_quote(b, q->text, strlen(q->text));
    buffer_text(b, "}\n");
}

static int append_results(evaluation *v, const void *bytes, size_t n, medrun_error *e) {
    for (const char *p = bytes; n && v->fd >= 0;) {
        ssize_t written = write(v->fd, p, n < 1 << 30 ? (unsigned)n : 1u << 30);
        if (written < 0 && errno == EINTR) continue;
        if (written < 0) return cannot(e, MEDRUN_FAILED, v->o.out, "write");
        p += written, n -= (size_t)written;
    }
    return MEDRUN_OK;
}

static int add_result(evaluation *v, size_t at, const slot *s, medrun_error *e) {
    size_t before = v->lines.n;
    write_line(v, at, s, &v->lines);
    if (v->lines.failed) return out_of_memory(e, v->lines.n);
    v->done[at] = true, v->n_done++;
    if (s) v->n_scored++, v->n_right += prediction(v, s) == v->data.q[at].answer;
    if (s) v->chance += 1 / (double)v->data.q[at].n_choices;
    buffer_free(&v->prompts[at].ids);
    if (!append_results(v, v->lines.data + before, v->lines.n - before, e)) v->n_kept++;
    return e->code;
}

/* Says in which field two header lines differ. FOUND is that of PATH. */
static int refuse_header(const char *path, const json *found, uint32_t f, const json *wanted,
                         uint32_t w, medrun_error *e) {
    uint32_t c = w + 1, n = json_is_type(wanted, w, JSON_OBJECT) ? wanted->nodes[w].count : 0;
    for (uint32_t i = 0; i < n; i += 2) {
        const json_node *key = &wanted->nodes[c], *b = &wanted->nodes[c + 1];
        char name[40];
        snprintf(name, sizeof name, "%.*s", (int)(key->end - key->start),
                 wanted->text + key->start);
        uint32_t at = json_get(found, f, name);
        const json_node *a = at == JSON_NONE ? NULL : &found->nodes[at];
        int na = a ? (int)(a->end - a->start) : 0, nb = (int)(b->end - b->start);
        if (na != nb || memcmp(found->text + a->start, wanted->text + b->start, (size_t)nb))
            return fail(e, MEDRUN_BAD_FILE, "%s: %s: found %.*s, wanted %.*s: these results are of "
                        "another run", path, name, na < 80 ? na : 80,
                        a ? found->text + a->start : "nothing", nb < 80 ? nb : 80,
                        wanted->text + b->start);
        c = wanted->nodes[c + 1].next;
    }
    return fail(e, MEDRUN_BAD_FILE, "%s: is no result of this run", path);
}

static int compare_headers(const char *path, const char *found, size_t n, const char *wanted,
                           size_t n_wanted, medrun_error *e) {
    json a = {0}, b = {0};
    if (n == n_wanted && !memcmp(found, wanted, n)) return MEDRUN_OK;
    if (json_parse(&a, found, n, NULL) || json_parse(&b, wanted, n_wanted, NULL))
        fail(e, MEDRUN_BAD_FILE, "%s: line 1: not a result of medrun-eval", path);
    else {
        medrun_error why = {0};
        refuse_header(path, &a, json_get(&a, 0, "run"), &b, json_get(&b, 0, "run"), &why);
        if (strstr(why.text, "is no result"))
            why.code = 0, refuse_header(path, &a, json_get(&a, 0, "data"), &b,
                                        json_get(&b, 0, "data"), &why);
        fail(e, why.code, "%s", why.text);
    }
    json_free(&a);
    json_free(&b);
    return e->code;
}

/* The number of the question that a line is about. */
static int line_number(const char *path, size_t line, const char *text, size_t n, size_t questions,
                       json *j, int64_t *at, medrun_error *e) {
    char what[300];
    medrun_error why = {0};
    snprintf(what, sizeof what, "%s:%zu", path, line);
    if (json_parse(j, text, n, &why)) return fail(e, why.code, "%s: %s", what, why.text);
    *at = json_int(j, 0, what, "n", 0, (int64_t)questions - 1, e);
    return e->code;
}

/* Takes what a file holds already; an unfinished line at its end goes. */
static int resume_results(evaluation *v, buffer *text, medrun_error *e) {
    const char *p = text_of(text);
    while (text->n && p[text->n - 1] != '\n') text->n--;
    if (set_length(v->fd, text->n) || lseek(v->fd, 0, SEEK_END) < 0)
        return cannot(e, MEDRUN_FAILED, v->o.out, "cut its last line");
    if (!text->n) v->fresh = true;
    if (!text->n) return append_results(v, v->header.data, v->header.n, e);
    const char *head = memchr(p, '\n', text->n), *end = p + text->n;
    if (compare_headers(v->o.out, p, (size_t)(head + 1 - p), text_of(&v->header), v->header.n, e))
        return e->code;
    size_t line = 2;
    for (p = head + 1; p < end && !e->code; line++) {
        const char *stop = memchr(p, '\n', (size_t)(end - p));
        json j = {0};
        int64_t at;
        if (!line_number(v->o.out, line, p, (size_t)(stop - p), v->data.n, &j, &at, e)) {
            if (v->done[at])
                fail(e, MEDRUN_BAD_FILE, "%s:%zu: question %lld stands twice", v->o.out, line,
                     (long long)at);
            v->done[at] = true;
            if ((size_t)at % v->n_shards == v->shard) v->n_done++;
        }
        json_free(&j);
        p = stop + 1;
    }
    buffer_add(&v->lines, head + 1, (size_t)(end - head - 1));
    return e->code;
}

/* Is what stands at the path still the file that is open? Another process may have renamed it, or
 * put its own there, before this one had the lock. */
static bool is_in_place(const evaluation *v) {
    file_facts mine;
    return !get_facts(NULL, v->fd, &mine) && same_file(v->o.out, &mine);
}

/* A run that ended before its first result, such as on a full disk, leaves no file. */
static void drop_empty_results(const evaluation *v) {
    if (v->fd >= 0 && v->fresh && !v->n_kept && is_in_place(v)) remove_file(v->o.out);
}

/* Reads the result file that --resume goes on with; one that is none is not read on. */
static int read_results(evaluation *v, buffer *text, medrun_error *e) {
    static const char mark[] = "{\"medrun-eval\":";
    ssize_t n = 1;
    while (n > 0 && buffer_room(text, 1 << 16)) {
        do n = read(v->fd, text->data + text->n, 1 << 16);
        while (n < 0 && errno == EINTR);
        if (n > 0) text->n += (size_t)n;
        size_t least = text->n < sizeof mark - 1 ? text->n : sizeof mark - 1;
        if (least && memcmp(text->data, mark, least))
            return fail(e, MEDRUN_BAD_FILE, "%s: line 1: not a result of medrun-eval", v->o.out);
    }
    if (text->failed) return out_of_memory(e, text->n);
    if (n < 0) return cannot(e, MEDRUN_FAILED, v->o.out, "read");
    return MEDRUN_OK;
}

static const file_kind result_file = {"a result of medrun-eval", "{\"medrun-eval\":1", true, false,
                                      0};

#ifndef _WIN32
/* Lets only its owner read the file, whoever could before. 0, or -1. */
static int keep_private(int fd) { return fchmod(fd, 0600); }
#else
static int keep_private(int fd) { return (void)fd, 0; }
#endif

/* Opens the result file for this process alone. Not by a writer of medrun's: a line is there as
 * soon as it is written, and a run that was stopped goes on. */
static int open_results(evaluation *v, medrun_error *e) {
    buffer text = {0};
    file_facts f;
    file_writer place;
    bool anew = v->o.force && !v->o.resume;
    if (!v->o.out || check_place(&place, v->o.out, &result_file, anew || v->o.resume, e))
        return e->code;
    v->fd = open_update(v->o.out);
    if (v->fd < 0 || get_facts(NULL, v->fd, &f))
        return cannot(e, MEDRUN_FAILED, v->o.out, "open");
    if (!lock_file(v->fd))
        return fail(e, MEDRUN_FAILED, "%s: another process is writing it", v->o.out);
    if (!is_in_place(v))
        return fail(e, MEDRUN_FAILED, "%s: another process put a new file there; try again",
                    v->o.out);
    if (anew && keep_private(v->fd))
        return cannot(e, MEDRUN_FAILED, v->o.out, "be made private");
    if (f.bytes && !v->o.resume && !anew)
        return fail(e, MEDRUN_USAGE, "%s: is there already; --resume goes on with it", v->o.out);
    if (f.bytes > MOST_RESULTS && !anew)
        return fail(e, MEDRUN_BAD_FILE, "%s: has %llu bytes, wanted at most %llu", v->o.out,
                    (unsigned long long)f.bytes, (unsigned long long)MOST_RESULTS);
    if (anew || !read_results(v, &text, e)) resume_results(v, &text, e);
    buffer_free(&text);
    return e->code;
}

/* ============================================================================================
 * 6 Summary: accuracy, intervals, subjects and groups
 *
 * From the lines of results alone, so that a run and a merge of its shards give the same.
 * ============================================================================================ */

/* A line of results. */
typedef struct {
    int64_t n;
    int truth, pred, pred_norm; /* pred -1: no answer was found                                */
    int n_choices;
    bool skipped;
    double sure;                /* probability of `pred` among the choices; -1: not known      */
    double held;                /* of all choices together, where they are letters; or -1      */
    const char *id, *subject, *line;
    size_t n_line;
} result;

typedef struct {
    const char *text;
    size_t n;
} span;

/* What was run: a model with its settings. */
typedef struct {
    span text;                  /* an object in the first line of results                      */
    const char *model, *type;
    const char *settings;       /* where it differs from the other runs; ""                    */
    bool letters;               /* the choices are letters or single words                     */
} run_info;

/* The results of a run on one data set. */
typedef struct {
    const char *task, *path, *file, *subject;
    span head, data;            /* the first line, and an object in it                         */
    size_t run;
    const char *scored_shots;   /* the questions that are shots, too; ""                       */
    size_t questions;           /* how many it should have                                     */
    result *r;
    size_t n, cap;
} result_set;

typedef struct {
    result_set *sets;
    size_t n_sets;
    run_info *runs;
    size_t n_runs;
    const char *about;          /* what all runs have in common, for people                    */
    text_block *texts;
} results;

static void free_results(results *all) {
    for (size_t i = 0; i < all->n_sets; i++) free(all->sets[i].r);
    free(all->sets);
    free(all->runs);
    free_texts(all->texts);
    *all = (results){0};
}

static span node_span(const json *j, uint32_t v) {
    return (span){j->text + j->nodes[v].start, j->nodes[v].end - j->nodes[v].start};
}

/* Appends a field for people: engine 0.1.0, no template. False: it says nothing. */
static bool add_field(buffer *b, const json *j, uint32_t key, bool always) {
    json_type type = json_typeof(j, key + 1);
    bool none = type == JSON_NULL || type == JSON_FALSE;
    if (none && !always) return false;
    if (b->n) buffer_text(b, ", ");
    if (none) buffer_text(b, "no ");
    json_unescape(j, key, b);
    if (none || type == JSON_TRUE) return true;
    buffer_text(b, " ");
    if (type == JSON_STRING) json_unescape(j, key + 1, b);
    else buffer_add(b, node_span(j, key + 1).text, node_span(j, key + 1).n);
    return true;
}

/* Is the field at node KEY of run I the same in all N runs? */
static bool same_in_all(const json *runs, size_t n, size_t i, uint32_t key) {
    char name[40];
    span mine = node_span(&runs[i], key + 1), text = node_span(&runs[i], key);
    snprintf(name, sizeof name, "%.*s", (int)(text.n < 39 ? text.n : 39), text.text);
    for (size_t k = 0; k < n; k++) {
        uint32_t f = json_get(&runs[k], 0, name);
        span other = f == JSON_NONE ? (span){"", 0} : node_span(&runs[k], f);
        if (other.n != mine.n || memcmp(other.text, mine.text, mine.n)) return false;
    }
    return true;
}

/* The fields of run I that all N runs have in common, or those that differ. */
static const char *describe_fields(results *all, const json *runs, size_t n, size_t i, bool common,
                                   medrun_error *e) {
    buffer b = {0};
    uint32_t key = 1;
    for (uint32_t k = 0; k < runs[i].nodes[0].count; k += 2, key = runs[i].nodes[key + 1].next)
        if (same_in_all(runs, n, i, key) == common) add_field(&b, &runs[i], key, !common);
    const char *text = b.failed ? (out_of_memory(e, b.n), NULL)
                                : keep_text(&all->texts, text_of(&b), b.n, e);
    buffer_free(&b);
    return text;
}

/* Says of all runs what they share, and of each where it differs. */
static int describe_runs(results *all, medrun_error *e) {
    json *runs = new_array(all->n_runs, sizeof *runs);
    if (!runs) return out_of_memory(e, all->n_runs * sizeof *runs);
    for (size_t i = 0; i < all->n_runs && !e->code; i++)
        json_parse(&runs[i], all->runs[i].text.text, all->runs[i].text.n, e);
    if (!e->code) all->about = describe_fields(all, runs, all->n_runs, 0, true, e);
    for (size_t i = 0; i < all->n_runs && !e->code; i++)
        all->runs[i].settings = describe_fields(all, runs, all->n_runs, i, false, e);
    for (size_t i = 0; i < all->n_runs; i++) json_free(&runs[i]);
    free(runs);
    return e->code;
}

/* A text among the fields of V; "" where there is none. NULL: no memory. */
static const char *field_text(results *all, const json *j, uint32_t v, const char *key,
                              medrun_error *e) {
    buffer b = {0};
    uint32_t f = json_get(j, v, key);
    if (json_is_type(j, f, JSON_STRING)) json_unescape(j, f, &b);
    const char *text = b.failed ? (out_of_memory(e, b.n), NULL)
                                : keep_text(&all->texts, text_of(&b), b.n, e);
    buffer_free(&b);
    return text;
}

/* The numbers of the questions that are shots, from 1, with commas between. */
static const char *scored_shots(results *all, const json *j, uint32_t data, medrun_error *e) {
    buffer b = {0};
    uint32_t f = json_get(j, data, "scored_shots"), c = f + 1;
    for (uint32_t i = 0; json_is_type(j, f, JSON_ARRAY) && i < j->nodes[f].count; i++) {
        double at = json_is_type(j, c, JSON_NUMBER) ? json_number(j, c) : 0;
        buffer_printf(&b, i ? ", %.0f" : "%.0f", at + 1);
        c = j->nodes[c].next;
    }
    const char *text = b.failed ? (out_of_memory(e, b.n), NULL)
                                : keep_text(&all->texts, text_of(&b), b.n, e);
    buffer_free(&b);
    return text;
}

/* The place of the run that object V describes: a new one, if it is the first of its kind. */
static size_t find_run(results *all, const json *j, uint32_t v, medrun_error *e) {
    run_info r = {.text = node_span(j, v), .settings = ""};
    for (size_t i = 0; i < all->n_runs; i++) {
        span other = all->runs[i].text;
        if (other.n == r.text.n && !memcmp(other.text, r.text.text, other.n)) return i;
    }
    uint32_t mode = json_get(j, v, "mode");
    r.letters = json_is_type(j, mode, JSON_STRING) && json_is(j, mode, mode_names[LETTER]);
    r.model = field_text(all, j, v, "model", e), r.type = field_text(all, j, v, "type", e);
    run_info *runs = MEDRUN_ALLOC(all->runs, (all->n_runs + 1) * sizeof *runs);
    if (!runs) return out_of_memory(e, sizeof *runs), 0;
    all->runs = runs, all->runs[all->n_runs] = r;
    return all->n_runs++;
}

/* Adds the set of a header line that was parsed to J. */
static result_set *add_set(results *all, const char *path, const json *j, span head,
                           medrun_error *e) {
    uint32_t data = json_get(j, 0, "data"), run = json_get(j, 0, "run");
    char name[40];
    if (!json_is_type(j, run, JSON_OBJECT) || !json_is_type(j, data, JSON_OBJECT))
        return fail(e, MEDRUN_BAD_FILE, "%s: line 1: not a result of medrun-eval", path), NULL;
    result_set s = {.path = path, .head = head, .data = node_span(j, data)};
    int64_t questions = json_int(j, data, path, "questions", 1, 1 << 30, e);
    if (json_text(j, data, path, "task", name, sizeof name, e)) return NULL;
    s.questions = (size_t)questions, s.task = keep_text(&all->texts, name, strlen(name), e);
    s.file = field_text(all, j, data, "file", e);
    s.subject = field_text(all, j, data, "subject", e);
    s.scored_shots = scored_shots(all, j, data, e);
    s.run = find_run(all, j, run, e);
    if (e->code) return NULL;
    s.cap = 256, s.r = new_array(s.cap, sizeof *s.r);
    result_set *sets = MEDRUN_ALLOC(all->sets, (all->n_sets + 1) * sizeof *sets);
    if (sets) all->sets = sets;
    if (!sets || !s.r) {
        free(s.r);
        return out_of_memory(e, sizeof *sets), NULL;
    }
    sets[all->n_sets] = s;
    return &sets[all->n_sets++];
}

/* The set that a header line belongs to: a new one, if it is the first of its data. */
static result_set *find_set(results *all, const char *path, span head, medrun_error *e) {
    json j = {0};
    medrun_error why = {0};
    result_set *found = NULL;
    for (size_t i = 0; i < all->n_sets; i++) {
        span other = all->sets[i].head;
        if (other.n == head.n && !memcmp(other.text, head.text, head.n)) return &all->sets[i];
    }
    if (!json_parse(&j, head.text, head.n, &why)) found = add_set(all, path, &j, head, e);
    else fail(e, why.code, "%s: line 1: not a result of medrun-eval: %s", path, why.text);
    json_free(&j);
    return found;
}

/* Of choice PRED among the choices, by the softmax of their log-likelihoods; *HELD: of all choices
 * together, where none of them is the beginning of another. */
static double probability(const json *j, uint32_t ll, int pred, double *held) {
    double scores[MAX_CHOICES] = {0}, sum = 0;
    uint32_t c = ll + 1, n = j->nodes[ll].count;
    for (uint32_t i = 0; i < n && i < MAX_CHOICES; i++, c = j->nodes[c].next)
        scores[i] = json_typeof(j, c) == JSON_NUMBER ? json_number(j, c) : 0;
    for (uint32_t i = 0; i < n && i < MAX_CHOICES; i++) sum += exp(scores[i] - scores[pred]);
    *held = sum * exp(scores[pred]);
    return 1 / sum;
}

static int take_result(results *all, result_set *s, const char *path, size_t line, const char *text,
                       size_t n, medrun_error *e) {
    json j = {0};
    char what[300];
    int64_t pred = -1, norm = -1;
    result r = {.line = text, .n_line = n, .sure = -1, .held = -1};
    snprintf(what, sizeof what, "%s:%zu", path, line);
    if (!line_number(path, line, text, n, s->questions, &j, &r.n, e)) {
        uint32_t ll = json_get(&j, 0, "ll"), choices = json_get(&j, 0, "choices");
        r.skipped = json_get(&j, 0, "skipped") != JSON_NONE;
        r.n_choices = json_is_type(&j, choices, JSON_ARRAY) ? (int)j.nodes[choices].count : 0;
        if (r.n_choices < 2 || r.n_choices > MAX_CHOICES)
            fail(e, MEDRUN_BAD_FILE, "%s: field choices: wanted 2 to %d", what, MAX_CHOICES);
        int64_t truth = json_int(&j, 0, what, "truth", 0, r.n_choices - 1, e);
        if (!r.skipped) pred = json_int(&j, 0, what, "pred", -1, r.n_choices - 1, e);
        bool scored = json_is_type(&j, ll, JSON_ARRAY);
        if (!e->code && scored && (j.nodes[ll].count != (uint32_t)r.n_choices || pred < 0))
            fail(e, MEDRUN_BAD_FILE, "%s: field ll: wanted as many as choices", what);
        if (scored) norm = json_int(&j, 0, what, "pred_norm", 0, r.n_choices - 1, e);
        if (scored && !e->code) r.sure = probability(&j, ll, (int)pred, &r.held);
        if (!all->runs[s->run].letters) r.held = -1;
        r.truth = (int)truth, r.pred = (int)pred, r.pred_norm = (int)norm;
        r.id = field_text(all, &j, 0, "id", e), r.subject = field_text(all, &j, 0, "subject", e);
    }
    json_free(&j);
    if (!e->code && s->n == s->cap) {
        size_t cap = s->cap * 2;
        result *more = MEDRUN_ALLOC(s->r, cap * sizeof *more);
        if (!more) return out_of_memory(e, cap * sizeof *more);
        s->r = more, s->cap = cap;
    }
    if (!e->code) s->r[s->n++] = r;
    return e->code;
}

/* The end of the line at TEXT, or NULL: there is none within what a line may have. */
static const char *line_end(const char *text, size_t n) {
    return memchr(text, '\n', n < MOST_LINE ? n : MOST_LINE);
}

/* All lines of TEXT, which must outlive ALL. */
static int take_results(results *all, const char *path, const char *text, size_t n,
                        medrun_error *e) {
    const char *end = text + n, *stop = line_end(text, n);
    if (!stop) return fail(e, MEDRUN_BAD_FILE, "%s: line 1: not a result of medrun-eval", path);
    result_set *s = find_set(all, path, (span){text, (size_t)(stop + 1 - text)}, e);
    size_t line = 2;
    for (const char *p = stop + 1; s && p < end && !e->code; p = stop + 1, line++) {
        if (!(stop = line_end(p, (size_t)(end - p))))
            return fail(e, MEDRUN_BAD_FILE, "%s:%zu: the line is cut: go on with --resume", path,
                        line);
        take_result(all, s, path, line, p, (size_t)(stop - p), e);
    }
    return e->code;
}

static int compare_results(const void *a, const void *b) {
    const result *x = a, *y = b;
    return (x->n > y->n) - (x->n < y->n);
}

/* Why S lacks questions: perhaps they stand in a file of another run. */
static void explain_missing(const results *all, const result_set *s, medrun_error *why) {
    for (const result_set *o = all->sets; o < all->sets + all->n_sets && !why->code; o++)
        if (o->run != s->run && o->data.n == s->data.n &&
            !memcmp(o->data.text, s->data.text, s->data.n))
            compare_headers(o->path, o->head.text, o->head.n, s->head.text, s->head.n, why);
}

/* Sorts; refuses a question that stands twice, and when WHOLE one that is missing. */
static int check_results(results *all, bool whole, medrun_error *e) {
    for (result_set *s = all->sets; s < all->sets + all->n_sets && !e->code; s++) {
        size_t missing = s->questions - s->n, first = 0;
        qsort(s->r, s->n, sizeof *s->r, compare_results);
        for (size_t i = 0; i < s->n && !e->code; i++) {
            if (i && s->r[i].n == s->r[i - 1].n)
                fail(e, MEDRUN_BAD_FILE, "task %s: question %lld stands twice: shards overlap, or "
                     "a file is named twice", s->task, (long long)s->r[i].n);
            if (s->r[i].n == (int64_t)first) first++;
        }
        medrun_error why = {0};
        if (e->code || !whole || !missing) continue;
        explain_missing(all, s, &why);
        fail(e, MEDRUN_BAD_FILE, "task %s: %zu of %zu questions are missing, the first is number "
             "%zu: a shard is missing or not finished%s%s", s->task, missing, s->questions, first,
             why.code ? "; " : "", why.text);
    }
    return e->code;
}

/* ---- statistics ---------------------------------------------------------------------------- */

/* What is counted about a task, one of its subjects, or a group. */
typedef struct {
    const char *task, *subject;
    size_t run, n, right, right_norm, skipped, silent;  /* silent: no answer was found          */
    double chance;              /* how many of them a guess would hit                          */
    double held;                /* a task: the median of what its letters hold; or -1          */
    size_t parts;               /* of a group                                                  */
    double pooled;              /* sum over its parts of n (n - 1) times the squared error     */
    bool scored;
} tally;

enum { MAX_TALLIES = 512 };

typedef struct {
    tally t[MAX_TALLIES];
    size_t n;
} tallies;

static double share(size_t part, size_t n) { return n ? (double)part / (double)n : 0; }

/* Of a mean of N zeros and ones: sample deviation / sqrt(N), as the harness has it. */
static double standard_error(size_t right, size_t n) {
    double p = share(right, n);
    return n > 1 ? sqrt(p * (1 - p) / (double)(n - 1)) : 0;
}

static double error_of(const tally *t) {
    if (t->parts < 2) return standard_error(t->right, t->n);
    return t->n > t->parts ? sqrt(t->pooled / (double)(t->n - t->parts) / (double)t->n) : 0;
}

/* Wilson's 95 % interval (1927). */
static void wilson(size_t right, size_t n, double interval[2]) {
    const double z = 1.959963984540054;
    double p = share(right, n), d = n ? 1 + z * z / (double)n : 1;
    double middle = n ? (p + z * z / (2 * (double)n)) / d : 0.5;
    double half = n ? z / d * sqrt(p * (1 - p) / (double)n + z * z / (4.0 * (double)n * (double)n))
                    : 0.5;
    interval[0] = middle - half > 0 ? middle - half : 0;
    interval[1] = middle + half < 1 ? middle + half : 1;
}

static tally *find_tally(tallies *all, size_t run, const char *name, const char *subject,
                         medrun_error *e) {
    for (tally *t = all->t; t < all->t + all->n; t++)
        if (t->run == run && !strcmp(t->task, name) && !strcmp(t->subject, subject)) return t;
    if (all->n == MAX_TALLIES) {
        fail(e, MEDRUN_BAD_FILE, "results: more than %d subjects", MAX_TALLIES);
        return NULL;
    }
    tally *t = &all->t[all->n++];
    *t = (tally){.task = name, .subject = subject, .run = run, .held = -1};
    return t;
}

static void count_result(tally *t, const result *r) {
    if (r->skipped) { t->skipped++; return; }
    t->n++;
    t->chance += 1 / (double)r->n_choices;
    t->right += r->pred == r->truth;
    t->right_norm += r->pred_norm == r->truth;
    t->silent += r->pred < 0;
    t->scored |= r->sure >= 0;
}

static void add_part(tally *group, const tally *part) {
    double error = standard_error(part->right, part->n), n = (double)part->n;
    group->n += part->n, group->right += part->right, group->right_norm += part->right_norm;
    group->chance += part->chance;
    group->skipped += part->skipped, group->silent += part->silent, group->parts++;
    group->pooled += n * (n - 1) * error * error, group->scored |= part->scored;
}

static const char *const multimedqa[][2] = {
    {"pubmedqa", ""}, {"medmcqa", ""}, {"medqa", ""}, {"mmlu", "anatomy"},
    {"mmlu", "clinical_knowledge"}, {"mmlu", "college_medicine"}, {"mmlu", "medical_genetics"},
    {"mmlu", "professional_medicine"}, {"mmlu", "college_biology"}};

/* The harness's group of nine, if all are there. */
static void add_multimedqa(tallies *all, size_t run) {
    tally group = {.task = "multimedqa", .subject = "", .run = run, .held = -1};
    for (size_t i = 0; i < sizeof multimedqa / sizeof *multimedqa; i++)
        for (const tally *t = all->t; t < all->t + all->n; t++)
            if (t->run == run && !strcmp(t->task, multimedqa[i][0]) &&
                !strcmp(t->subject, multimedqa[i][1])) add_part(&group, t);
    if (group.parts == sizeof multimedqa / sizeof *multimedqa && all->n < MAX_TALLIES)
        all->t[all->n++] = group;
}

static bool is_of(const result_set *s, size_t run, const char *name) {
    return s->run == run && !strcmp(s->task, name);
}

static int compare_numbers(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The median of what the letters of a task's questions hold together; -1: nobody knows. */
static double median_held(const results *all, size_t run, const char *name, medrun_error *e) {
    size_t n = 0, most = 1;
    for (size_t i = 0; i < all->n_sets; i++) most += all->sets[i].n;
    double *held = new_array(most, sizeof *held), median = -1;
    if (!held) return out_of_memory(e, most * sizeof *held), -1;
    for (const result_set *s = all->sets; s < all->sets + all->n_sets; s++)
        for (size_t i = 0; i < s->n && is_of(s, run, name); i++)
            if (s->r[i].held >= 0) held[n++] = s->r[i].held;
    qsort(held, n, sizeof *held, compare_numbers);
    if (n) median = (held[(n - 1) / 2] + held[n / 2]) / 2;
    free(held);
    return median;
}

/* A task of a run, then its subjects. */
static int count_task(const results *all, size_t run, const char *name, tallies *out,
                      medrun_error *e) {
    if (!find_tally(out, run, name, "", e)) return e->code;
    size_t first = out->n;
    for (const result_set *s = all->sets; s < all->sets + all->n_sets; s++)
        for (size_t i = 0; i < s->n && is_of(s, run, name); i++) {
            tally *t = find_tally(out, run, name, s->r[i].subject, e);
            if (!t) return e->code;
            count_result(t, &s->r[i]);
        }
    tally *whole = &out->t[first - 1];
    bool pooled = !strcmp(name, "mmlu") || !strcmp(name, "mmlu_pro");
    for (tally *t = out->t + first; t < out->t + out->n; t++) add_part(whole, t);
    if (!pooled) whole->parts = 0;      /* their subjects are no tasks of their own              */
    whole->held = median_held(all, run, name, e);
    return e->code;
}

/* Runs; of each its tasks, then the group. */
static int count_results(const results *all, tallies *out, medrun_error *e) {
    out->n = 0;
    for (size_t run = 0; run < all->n_runs && !e->code; run++) {
        for (size_t i = 0; i < all->n_sets && !e->code; i++) {
            bool seen = all->sets[i].run != run;
            for (size_t k = 0; k < i; k++) seen |= is_of(&all->sets[k], run, all->sets[i].task);
            if (!seen) count_task(all, run, all->sets[i].task, out, e);
        }
        add_multimedqa(out, run);
    }
    return e->code;
}

/* ---- printing ------------------------------------------------------------------------------ */

static double chance_of(const tally *t) { return t->n ? t->chance / (double)t->n : 0; }

/* Letters that a model would hardly say tell little of what it knows. */
static const double LEAST_HELD = 0.001;

static bool is_noise(const tally *t) { return t->held >= 0 && t->held < LEAST_HELD; }

static const char *const metrics_explained =
    "acc: the choice with the highest log-likelihood is the right one, or the one that was "
    "written; chance: what guessing would give; acc_norm: each log-likelihood is divided by its "
    "choice's characters first, so that long choices lose nothing by their length (with single "
    "letters it is acc).";

/* TEXT from a file of results, whose names may hold anything. */
static void add_plain(buffer *b, const char *text) {
    size_t at = b->n;
    buffer_text(b, text);
    if (b->failed || b->n == at) return;
    make_safe((char *)b->data + at);
    b->n = at + strlen((const char *)b->data + at);
}

/* Each once, with commas between: the models, and the tasks. */
static void add_models(const results *all, buffer *b) {
    for (size_t i = 0; i < all->n_runs; i++) {
        const run_info *r = &all->runs[i];
        bool seen = false;
        for (size_t k = 0; k < i; k++)
            seen |= !strcmp(r->model, all->runs[k].model) && !strcmp(r->type, all->runs[k].type);
        if (seen) continue;
        if (i) buffer_text(b, ", ");
        add_plain(b, *r->model ? r->model : "a model");
        if (*r->type) buffer_text(b, " ("), add_plain(b, r->type), buffer_text(b, ")");
    }
}

static void add_tasks(const results *all, buffer *b) {
    for (size_t i = 0; i < all->n_sets; i++) {
        bool seen = false;
        for (size_t k = 0; k < i; k++) seen |= !strcmp(all->sets[i].task, all->sets[k].task);
        if (seen) continue;
        if (i) buffer_text(b, ", ");
        add_plain(b, all->sets[i].task);
    }
}

/* "demo (int8) on medqa, mmlu" */
static void add_title(const results *all, buffer *b) {
    add_models(all, b);
    buffer_text(b, " on ");
    add_tasks(all, b);
}

/* A task's name as a line of remarks begins with it. */
static void add_name(const results *all, size_t run, const char *name, buffer *b) {
    add_plain(b, name);
    if (!*all->runs[run].settings) return;
    buffer_text(b, " (");
    add_plain(b, all->runs[run].settings);
    buffer_text(b, ")");
}

/* What a table of accuracies does not show. */
static void add_remarks(const results *all, const tallies *t, buffer *b) {
    for (const tally *p = t->t; p < t->t + t->n; p++) {
        if (*p->subject || (!p->silent && !is_noise(p))) continue;
        buffer_text(b, "\n");
        add_name(all, p->run, p->task, b);
        if (is_noise(p))
            buffer_printf(b, ": these choices are noise: together they hold %.2g of the "
                          "probability (median), less than a thousandth; the model would say "
                          "something else\n", p->held);
        else buffer_printf(b, ": %zu answers without a choice, counted as wrong\n", p->silent);
    }
    for (const result_set *s = all->sets; s < all->sets + all->n_sets; s++) {
        if (*s->scored_shots) {
            buffer_text(b, "\n");
            add_name(all, s->run, s->task, b);
            buffer_printf(b, ": scored although they are among the shots, with their answers: "
                          "questions %s of ", s->scored_shots);
            add_plain(b, s->file);
            buffer_text(b, "\n");
        }
        for (size_t k = 0; k < s->n; k++) {
            if (!s->r[k].skipped) continue;
            buffer_text(b, "\n");
            add_name(all, s->run, s->task, b);
            buffer_printf(b, ": skipped, too long, counted nowhere: question %lld ",
                          (long long)s->r[k].n + 1);
            add_plain(b, s->r[k].id);
            buffer_text(b, "\n");
        }
    }
}

static void add_accuracy(const results *all, const tally *t, buffer *b) {
    double interval[2];
    wilson(t->right, t->n, interval);
    buffer_text(b, "| ");
    add_plain(b, t->task);
    buffer_text(b, " | ");
    add_plain(b, *t->subject ? t->subject : "all");
    if (all->n_runs > 1) buffer_text(b, " | "), add_plain(b, all->runs[t->run].settings);
    buffer_printf(b, " | %zu | %.4f | %.4f | %.4f | %.4f to %.4f | ", t->n, share(t->right, t->n),
                  chance_of(t), error_of(t), interval[0], interval[1]);
    if (t->scored) buffer_printf(b, "%.4f |\n", share(t->right_norm, t->n));
    else buffer_text(b, "|\n");
}

static void write_table(const results *all, const tallies *t, buffer *b) {
    char today[11];
    date_today(today);
    add_title(all, b);
    buffer_printf(b, ", accuracy by task and subject, reported on %s\n\n", today);
    add_plain(b, all->about);
    buffer_printf(b, "\n\n| task | subject |%s questions | acc | chance | standard error | "
                  "95 %% interval | acc_norm |\n|---|---|%s---|---|---|---|---|---|\n",
                  all->n_runs > 1 ? " settings |" : "", all->n_runs > 1 ? "---|" : "");
    for (const tally *p = t->t; p < t->t + t->n; p++) add_accuracy(all, p, b);
    buffer_printf(b, "\n%s\n", metrics_explained);
    add_remarks(all, t, b);
}

static void write_summary(const results *all, const tallies *t, buffer *b) {
    bool many = all->n_runs > 1;
    buffer_text(b, many ? "{\"runs\":[" : "{\"run\":");
    for (size_t i = 0; i < all->n_runs; i++) {
        if (i) buffer_text(b, ",");
        buffer_add(b, all->runs[i].text.text, all->runs[i].text.n);
    }
    buffer_text(b, many ? "],\"data\":[" : ",\"data\":[");
    for (size_t i = 0; i < all->n_sets; i++) {
        if (i) buffer_text(b, ",");
        buffer_add(b, all->sets[i].data.text, all->sets[i].data.n);
    }
    buffer_text(b, "],\"results\":[");
    for (const tally *p = t->t; p < t->t + t->n; p++) {
        double interval[2];
        wilson(p->right, p->n, interval);
        buffer_text(b, p == t->t ? "{" : ",{");
        if (many) buffer_printf(b, "\"run\":%zu,", p->run);
        add_string(b, "task", p->task);
        add_string(b, "subject", p->subject);
        buffer_printf(b, "\"n\":%zu,\"right\":%zu,\"acc\":%.17g,\"acc_stderr\":%.17g,"
                      "\"interval\":[%.6f,%.6f],\"chance\":%.6f,", p->n, p->right,
                      share(p->right, p->n), error_of(p), interval[0], interval[1], chance_of(p));
        if (p->held >= 0) buffer_printf(b, "\"choices_hold\":%.4g,", p->held);
        if (p->scored)
            buffer_printf(b, "\"acc_norm\":%.17g,\"acc_norm_stderr\":%.17g,",
                          share(p->right_norm, p->n), standard_error(p->right_norm, p->n));
        buffer_printf(b, "\"silent\":%zu,\"skipped\":%zu}", p->silent, p->skipped);
    }
    buffer_text(b, "]}\n");
}

#include "eval_html.c"

/* The table or JSON to stdout, the page to its file; then every task must reach --require. */
static int report_results(results *all, const evaluation *v, tallies *t, medrun_error *e) {
    buffer b = {0};
    if (describe_runs(all, e) || count_results(all, t, e)) return e->code;
    if (v->o.summary && !strcmp(v->o.summary, "json")) write_summary(all, t, &b);
    else write_table(all, t, &b);
    if (b.failed) out_of_memory(e, b.n);
    else fwrite(b.data, 1, b.n, stdout);
    buffer_free(&b);
    if (e->code) return e->code;
    if (finish_stdout(e)) return e->code;
    if (v->o.html && write_page(all, t, v->o.html, v->o.force, e)) return e->code;
    for (const tally *p = t->t; p < t->t + t->n && v->require > 0; p++)
        if (!*p->subject && share(p->right, p->n) < v->require)
            return fail(e, BELOW_REQUIRED, "task %s: accuracy %.4f (chance %.4f), --require %g",
                        p->task, share(p->right, p->n), chance_of(p), v->require);
    return MEDRUN_OK;
}

/* ============================================================================================
 * 7 Commands: options, running, merging
 * ============================================================================================ */

#define AT(field) offsetof(eval_options, field)
static const tool_option eval_table[] = {
    {"--mode", NULL, "MODE", AT(mode), "letter (default), answer or generate"},
    {"--fewshot", NULL, "K FILE", AT(shots), "the first K of FILE before each question"},
    {"--fewshot-multiturn", NULL, NULL, AT(multiturn), "shots as turns of the conversation"},
    {"--no-template", NULL, NULL, AT(no_template), "plain text, no chat template"},
    {"--template", NULL, "NAME", AT(template_name), "the chat template (the checkpoint's)"},
    {"--system", NULL, "TEXT", AT(system), "before the task's own description"},
    {"--date", NULL, "YYYY-MM-DD", AT(date), "for templates that state one"},
    {"--bos", NULL, "WHEN", AT(bos), "auto (as the tokenizer does), on or off"},
    {"--subject", NULL, "NAME", AT(subject), "of questions that name none"},
    {"--answers", NULL, "FILE", AT(answers), "usmle: right letters by number, as JSON"},
    {"--limit", NULL, "N", AT(limit), "only the first N questions"},
    {"--shard", NULL, "I/N", AT(shard), "the I-th of N parts, I from 1"},
    {"--out", "-o", "FILE", AT(out), "a line for each question, as it is finished"},
    {"--resume", NULL, NULL, AT(resume), "go on with that file"},
    {"--force", NULL, NULL, AT(force), "begin anew, over any file that is not read"},
    {"--merge", NULL, NULL, AT(merge), "one table of result files, instead of running"},
    {"--summary", NULL, "FORMAT", AT(summary), "md (a table, default) or json"},
    {"--html", NULL, "FILE", AT(html), "the summary as a page"},
    {"--require", NULL, "ACC", AT(require), "exit with 7 below this accuracy"},
    {"--overflow", NULL, "WHAT", AT(overflow), "a question too long: error (default) or skip"},
    {"--ctx", "-c", "N", AT(context), "longest question in tokens (the model's)"},
    {"--predict", "-n", "N", AT(predict), "generate: most tokens (1024; mmlu_pro 2048)"},
    {"--threads", "-t", "N", AT(threads), "threads (all processors); changes no number"},
    {"--batch", "-b", "N", AT(batch), "tokens in one pass (512); changes no number"},
    {"--parallel", NULL, "N", AT(parallel), "questions at a time (16); changes no number"},
    {"--kv", NULL, "TYPE", AT(kv), "f16 (default), int8, f32 (with --strict)"},
    {"--strict", NULL, NULL, AT(strict), "bf16: the same numbers on every machine"},
    {"--quiet", "-q", NULL, AT(quiet), "no progress"},
    {"--help", "-h", NULL, AT(help), "this text"},
    {"--version", "-V", NULL, AT(version), "the version"},
};
#undef AT
enum { N_EVAL_OPTIONS = sizeof eval_table / sizeof *eval_table };

static void print_eval_help(const tool_line *l) {
    print_wrapped("medrun-eval MODEL.mdr TASK DATA [options]\n"
                  "medrun-eval --merge RESULT... [-o ALL.jsonl] [--summary json] [--html FILE]\n\n"
                  "Scores a model on multiple-choice questions, as " HARNESS " does. TASK: medqa, "
                  "medmcqa, pubmedqa, mmlu, mmlu_pro, usmle, generic (question, choices, answer). "
                  "DATA, in UTF-8: JSONL, JSON (the dataset viewer's, too) or CSV, with the "
                  "fields' names as its head or, for mmlu and generic, without: question, choices, "
                  "letter.\n\n");
    print_options(l);
    print_wrapped("\nletter: the log-likelihood of the letter; answer: of the choice's text, and "
                  "divided by its characters (acc_norm); generate: the model reasons, and its "
                  "answer is looked for.\n"
                  "MEDRUN_MODE, MEDRUN_KV and so on set an option that is not given.\n"
                  "Exit codes: 0 ok, 1 failed while running, 2 usage, 3 file missing, unsupported "
                  "or malformed, 5 question longer than the context, 6 out of memory, 7 below "
                  "--require, 130 interrupted.\n");
}

/* The place of TEXT among N WORDS; FALLBACK where there is no text. */
static int choose_word(const char *name, const char *text, const char *const *words, int n,
                       int fallback, medrun_error *e) {
    char list[100] = "";
    for (int i = 0; i < n; i++) {
        if (text && !strcmp(text, words[i])) return i;
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", i ? ", " : "", words[i]);
    }
    if (text) fail(e, MEDRUN_USAGE, "%s: found %s, wanted one of: %s", name, text, list);
    return fallback;
}

static int read_shard(evaluation *v, medrun_error *e) {
    unsigned i, n;
    char rest;
    v->n_shards = 1;
    if (!v->o.shard) return MEDRUN_OK;
    if (v->o.shard[strspn(v->o.shard, "0123456789/")] ||
        sscanf(v->o.shard, "%5u/%5u%c", &i, &n, &rest) != 2 || i < 1 || i > n)
        return fail(e, MEDRUN_USAGE, "--shard: found %s, wanted I/N with I from 1 to N",
                    v->o.shard);
    return v->shard = i - 1, v->n_shards = n, MEDRUN_OK;
}

static int check_options(evaluation *v, medrun_error *e) {
    static const char *const bos[] = {"auto", "on", "off"};
    static const char *const overflow[] = {"error", "skip"}, *const summary[] = {"md", "json"};
    const eval_options *o = &v->o;
    int limit = 0, batch = 512, parallel = 16, context = 0;
    v->mode = choose_word("--mode", o->mode, mode_names, N_MODES, LETTER, e);
    v->kv = choose_word("--kv", o->kv, kv_names, 3, o->strict, e);
    v->bos = choose_word("--bos", o->bos, bos, 3, MEDRUN_BOS_AUTO, e);
    choose_word("--overflow", o->overflow, overflow, 2, 0, e);
    choose_word("--summary", o->summary, summary, 2, 0, e);
    option_int("--limit", o->limit, 1, 1 << 30, &limit, e);
    option_int("--batch", o->batch, 1, 65536, &batch, e);
    option_int("--parallel", o->parallel, 1, MAX_SLOTS, &parallel, e);
    option_int("--ctx", o->context, 1, 1 << 24, &context, e);
    option_int("--fewshot", o->shots[0], 0, MAX_SHOTS, &v->n_shots, e);
    option_number("--require", o->require, 0, 1, &v->require, e);
    v->limit = (size_t)limit, v->batch = (size_t)batch, v->parallel = (size_t)parallel;
    v->context = (size_t)context;
    if (v->t) {
        v->most_new = is_pro(v) ? 2048 : 1024;
        option_int("--predict", o->predict, 1, 1 << 20, &v->most_new, e);
        if (!e->code && v->n_shots && v->mode == GENERATE && !is_pro(v))
            fail(e, MEDRUN_USAGE, "--fewshot: this protocol has no shots; leave it out");
    }
    if (!e->code && o->multiturn && o->no_template)
        fail(e, MEDRUN_USAGE, "--fewshot-multiturn: wanted a chat template; leave --no-template "
             "out");
    if (!e->code && o->resume && !o->out) fail(e, MEDRUN_USAGE, "--resume: wanted -o FILE");
    return e->code ? e->code : read_shard(v, e);
}

/* The template, and what it is told: a date that would be today's is fixed, BOS is the tokenizer's
 * own, as the harness has it, where the template has none. */
static int choose_chat(evaluation *v, medrun_error *e) {
    medrun_chat_options *c = &v->chat_options;
    if (v->o.no_template) return MEDRUN_OK;
    v->chat = v->o.template_name ? chat_find(v->o.template_name) : v->m->chat;
    if (!v->chat)
        return fail(e, MEDRUN_USAGE, "chat template: found %s, wanted --template with one of "
                    MEDRUN_TEMPLATES ", or --no-template",
                    v->o.template_name ? v->o.template_name : "one that medrun does not know");
    add_stops(v->m, v->chat);
    c->date = v->o.date, c->bos = v->bos;
    if (!c->date && v->chat->states_today) date_today(v->today), c->date = v->today;
    if (v->bos == MEDRUN_BOS_AUTO && !v->chat->bos)
        c->bos = v->m->tokenizer.add_bos ? MEDRUN_BOS_ON : MEDRUN_BOS_OFF;
    return MEDRUN_OK;
}

/* All prompts of this shard, and how long the longest is. */
static int make_prompts(evaluation *v, size_t *longest, size_t *rows, medrun_error *e) {
    size_t limit = (size_t)v->m->config.max_positions, too_long = 0, marked = 0;
    const char *mark = NULL, *found;
    if (v->context && v->context < limit) limit = v->context;
    for (size_t i = v->shard; i < v->data.n && !e->code; i += v->n_shards) {
        prompt *p = &v->prompts[i];
        v->n_mine++;
        if (interrupted)
            return fail(e, MEDRUN_INTERRUPTED, "interrupted before the first question");
        if (v->done[i]) continue;
        if (make_prompt(v, &v->data.q[i], p, e)) return e->code;
        const char *text = v->data.q[i].text;
        if (v->chat && (found = mark_in(v->chat, text, strlen(text)))) mark = found, marked++;
        size_t n = prompt_length(v, p);
        if (n > limit && v->o.overflow && !strcmp(v->o.overflow, "skip")) {
            add_result(v, i, NULL, e);
            continue;
        }
        if (n > limit && !too_long++)
            fail(e, MEDRUN_TOO_LONG, "%s:%zu: this question needs %zu tokens > context %zu; "
                 "--overflow skip leaves such questions out, and says so", v->data.path,
                 v->data.q[i].line, n, limit);
        v->needed += v->mode == GENERATE ? p->n : 0;
        for (int k = 0; k < p->n_tails; k++) {
            v->needed += p->n + tail_length(p, k) - 1;
            if (tail_length(p, k) > *rows) *rows = tail_length(p, k);
        }
        if (n > *longest) *longest = n;
    }
    if (mark && !e->code && !v->o.quiet)
        fprintf(stderr, "medrun-eval: warning: questions with what begins a turn in template %s, "
                "like \"%s\": %zu; the model takes it for one\n", v->chat->name, mark, marked);
    return e->code;
}

/* On a terminal one line that changes, else a line for each tenth. */
static void draw_progress(evaluation *v, bool last) {
    double now = seconds(), passed = v->seconds = now - v->start;
    bool terminal = terminal_draws(getenv("TERM"));
    if (v->o.quiet) return;
    if (!last && (terminal ? now - v->drawn < 0.2 : v->n_done < v->drawn_at)) return;
    v->drawn = now, v->drawn_at = v->n_done + v->n_mine / 10 + 1;
    double rate = passed > 0 ? (double)(v->n_done - v->n_resumed) / passed : 0;
    int left = rate > 0 ? (int)((double)(v->n_mine - v->n_done) / rate) : 0;
    fprintf(stderr, "%s%zu of %zu, acc %.4f (chance %.4f), %.2f questions/s, %.1f tokens/s, "
            "%d:%02d:%02d left%s", terminal ? "\r" : "", v->n_done, v->n_mine,
            share(v->n_right, v->n_scored), v->n_scored ? v->chance / (double)v->n_scored : 0, rate,
            passed > 0 ? (double)v->processed / passed : 0, left / 3600, left / 60 % 60,
            left % 60, terminal ? "   " : "\n");
    if (terminal && last) fputc('\n', stderr);
}

static int run_questions(evaluation *v, medrun_error *e) {
    v->start = v->drawn = seconds();
    running = v->lead;
    v->drawn_at = v->n_done + v->n_mine / 10 + 1;
    while (v->n_done < v->n_mine && !e->code) {
        for (slot *s = v->slots; s < v->slots + v->n_slots; s++)
            if (s->at == NO_QUESTION && !next_question(v, s)) break;
        if (!interrupted && run_pass(v, e) && e->code != MEDRUN_INTERRUPTED) break;
        if (e->code) *e = (medrun_error){0};            /* the line below says more              */
        for (slot *s = v->slots; s < v->slots + v->n_slots && !e->code; s++) {
            if (!s->finished) continue;
            add_result(v, (size_t)s->at, s, e);
            s->at = NO_QUESTION, s->finished = false;
        }
        draw_progress(v, v->n_done == v->n_mine);
        if (interrupted && !e->code)
            fail(e, MEDRUN_INTERRUPTED, "interrupted after %zu of %zu questions%s", v->n_done,
                 v->n_mine, v->o.out ? "; --resume goes on" : "");
    }
    return e->code;
}

/* What the sharing was worth. */
static void print_speed(const evaluation *v) {
    uint64_t prompts = v->processed - v->fed_back;
    if (v->o.quiet || !v->processed) return;
    fprintf(stderr, "%llu prompt tokens in %.1f s: %.1f tokens/s; one text at a time would take "
            "%llu, so %.1f %% were saved", (unsigned long long)prompts, v->seconds,
            (double)v->processed / v->seconds, (unsigned long long)v->needed,
            100 * (1 - (double)prompts / (double)v->needed));
    if (v->generated)
        fprintf(stderr, "; %llu tokens generated", (unsigned long long)v->generated);
    fputc('\n', stderr);
}

/* Reads what the options name; opens the model. */
static int open_all(evaluation *v, const char *model, const char *data, medrun_error *e) {
    int threads = 0;
    if (option_int("--threads", v->o.threads, 1, MAX_THREADS, &threads, e) ||
        read_data(&v->data, v->t, data, v->o.subject, v->o.answers, e)) return e->code;
    if (v->n_shots && read_data(&v->shots, v->t, v->o.shots[1], v->o.subject, v->o.answers, e))
        return e->code;
    if (v->data.viewer_total > (double)v->data.n && !v->o.quiet)
        fprintf(stderr, "%zu of the data set's %.0f questions: the dataset viewer gives a page at "
                "a time\n", v->data.n, v->data.viewer_total);
    if (v->limit && v->limit < v->data.n) v->data.n = v->limit;
    v->prompts = new_array(v->data.n, sizeof *v->prompts);
    v->done = new_array(v->data.n, sizeof *v->done);
    if (!v->prompts || !v->done) return out_of_memory(e, v->data.n * sizeof *v->prompts);
    medrun_options open = {.threads = threads, .kernels = getenv("MEDRUN_KERNELS")};
    if (medrun_open(&v->m, model, &open, e)) return e->code;
    return choose_chat(v, e);
}

/* The table of what was done, with what stood in the file before. */
static int finish_run(evaluation *v, medrun_error *e) {
    static tallies t;
    results all = {0};
    buffer text = {0};
    buffer_add(&text, v->header.data, v->header.n);
    buffer_add(&text, v->lines.data, v->lines.n);
    if (text.failed) out_of_memory(e, text.n);
    else if (!take_results(&all, v->o.out ? v->o.out : "results", text_of(&text), text.n, e) &&
             !check_results(&all, false, e))
        report_results(&all, v, &t, e);
    free_results(&all);
    buffer_free(&text);
    return e->code;
}

/* Refuses places that cannot be written, or are among the N files that are read, before the work
 * begins. */
static int check_outputs(const evaluation *v, const char *const *inputs, size_t n,
                         medrun_error *e) {
    const char *page = v->o.html;
    if (v->o.out) check_inputs(v->o.out, inputs, n, e);
    if (!page) return e->code;
    check_inputs(page, inputs, n, e);
    if (v->o.out && !strcmp(page, v->o.out))
        fail(e, MEDRUN_USAGE, "%s: --html and --out are one file; choose another name", page);
    return writer_check(page, &page_kind, v->o.force, e);
}

static int run_evaluation(evaluation *v, const char **words, medrun_error *e) {
    const char *const inputs[] = {words[0], words[2], v->o.shots[1], v->o.answers};
    size_t longest = 1, rows = 1;
    v->t = find_task(words[1], e);
    if (!v->t || check_options(v, e) || check_outputs(v, inputs, 4, e) ||
        open_all(v, words[0], words[2], e)) return e->code;
    write_header(v);
    if (v->header.failed) return out_of_memory(e, v->header.n);
    if (open_results(v, e) || make_prompts(v, &longest, &rows, e)) return e->code;
    v->context = longest, v->n_resumed = v->n_done;
    if (v->n_done < v->n_mine && !start_sessions(v, rows, e)) run_questions(v, e);
    if (e->code) return e->code;
    print_speed(v);
    return finish_run(v, e);
}

/* The lines of one run in their order, as --out of a merge. */
static int write_merged(const results *all, const char *path, bool force, medrun_error *e) {
    if (all->n_sets > 1)
        return fail(e, MEDRUN_USAGE, "--out: these results are of %zu data sets; one file holds "
                    "one", all->n_sets);
    file_writer w;
    if (writer_open(&w, path, &result_file, force, e)) return e->code;
    fwrite(all->sets->head.text, 1, all->sets->head.n, w.f);
    for (size_t i = 0; i < all->sets->n; i++)
        fwrite(all->sets->r[i].line, 1, all->sets->r[i].n_line + 1, w.f);
    return writer_done(&w, e);
}

static int merge_results(evaluation *v, const char **words, size_t n, medrun_error *e) {
    static tallies t;
    results all = {0};
    file_map *maps = new_array(n, sizeof *maps);
    if (!maps) return out_of_memory(e, n * sizeof *maps);
    if (!n) fail(e, MEDRUN_USAGE, "--merge: wanted result files");
    if (!e->code) check_options(v, e);
    check_outputs(v, words, n, e);
    for (size_t i = 0; i < n && !e->code; i++) {
        if (!map_text(words[i], MOST_RESULTS, &maps[i], e))
            take_results(&all, words[i], (const char *)maps[i].data, maps[i].n, e);
        if (interrupted) fail(e, MEDRUN_INTERRUPTED, "interrupted");
    }
    if (!e->code && !check_results(&all, true, e) &&
        (!v->o.out || !write_merged(&all, v->o.out, v->o.force, e))) report_results(&all, v, &t, e);
    free_results(&all);
    for (size_t i = 0; i < n; i++) unmap_file(&maps[i]);
    free(maps);
    return e->code;
}

static void close_evaluation(evaluation *v) {
    running = NULL;
    for (size_t i = 0; i < v->n_slots; i++) {
        medrun_stop(v->slots[i].s);
        buffer_free(&v->slots[i].text);
    }
    medrun_stop(v->lead);
    for (size_t i = 0; v->prompts && i < v->data.n; i++) buffer_free(&v->prompts[i].ids);
    free(v->prompts);
    free(v->done);
    buffer_free(&v->header);
    buffer_free(&v->lines);
    drop_empty_results(v);
    if (v->fd >= 0) close(v->fd);
    free_data(&v->data);
    free_data(&v->shots);
    medrun_close(v->m);
}

/* The whole program; tests call it in a child process. */
static int eval_main(int argc, char **argv) {
    static evaluation v;
    enum { MOST_WORDS = 4096 };
    static const char *words[MOST_WORDS];
    medrun_error e = {0};
    v = (evaluation){.fd = -1};
    tool_line line = {eval_table, N_EVAL_OPTIONS, &v.o, words, 0, MOST_WORDS};
    if (!(argv = start_program(&argc, argv))) return MEDRUN_FAILED;
    expect_lost_files("medrun-eval");
    umask(077);                         /* results and pages hold the questions                  */
    catch_ends(on_interrupt);
    parse_options(&line, argc, argv, &e);
    if (!e.code && v.o.help) print_eval_help(&line);
    else if (!e.code && v.o.version) puts("medrun-eval " MEDRUN_VERSION);
    else if (!e.code && v.o.merge) merge_results(&v, words, line.n_words, &e);
    else if (!e.code && line.n_words != 3)
        fail(&e, MEDRUN_USAGE, "wanted MODEL.mdr TASK DATA, found %zu words; see --help",
             line.n_words);
    else if (!e.code) run_evaluation(&v, words, &e);
    close_evaluation(&v);
    finish_stdout(&e);
    if (e.code) fprintf(stderr, "medrun-eval: %s\n", e.text);
    return e.code;
}

#ifndef MEDRUN_EVAL_NO_MAIN
int main(int argc, char **argv) { return eval_main(argc, argv); }
#endif
