/* serve.c: medrun-serve MODEL.mdr: answers over HTTP, as OpenAI's API has it, to several people at
 * a time. The bytes of an answer depend on the request and the checkpoint, never on who else is
 * being served, nor on what lies in the cache: the engine's rows do not know their neighbours, and
 * all that is added here (chunks, budgets, copies of a common start) only decides when a row is
 * made.
 *
 * Two threads. The I/O thread (serve_http.c) polls all connections, reads requests, renders and
 * tokenizes (serve_api.c), and answers what needs no pass. The engine's thread (below) admits
 * requests, makes one pass after another for all of them, and writes answers into their buffers.
 *
 *      1 what the parts share       3 scheduler: admission, prefixes, passes
 *      2 the other files            4 sandbox           5 options and main
 *
 * Tests: tests/42_serve.sh, tests/serve.py. MIT licence, see LICENSE. */

#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#if defined __linux__ || defined __FreeBSD__
#include <malloc.h>
#define BLOCK_SIZE(p) malloc_usable_size(p)
#elif defined __APPLE__
#include <malloc/malloc.h>
#define BLOCK_SIZE(p) malloc_size(p)
#else
#define BLOCK_SIZE(p) ((void)(p), (size_t)0)
#endif

/* ---- memory that held people's words is wiped before it goes back ---------------------------- */

/* A plain memset before free may be optimized away. */
static void wipe(void *p, size_t n) {
    static void *(*const volatile set)(void *, int, size_t) = memset;
    if (n) set(p, 0, n);
}

static void wiping_free(void *p) {
    if (p) wipe(p, BLOCK_SIZE(p));
    free(p);
}

static void *wiping_realloc(void *old, size_t n) {
    size_t had = old ? BLOCK_SIZE(old) : 0;
    if (had >= n && n >= had / 2) return old;
    void *p = malloc(n);
    if (p && old) {
        memcpy(p, old, had < n ? had : n);
        wiping_free(old);
    }
    return p;
}

#define MEDRUN_ALLOC wiping_realloc     /* so is what medrun.c takes: tokens, JSON, buffers      */
#define free(p) wiping_free(p)
#define MEDRUN_NO_MAIN
#define bind bind_tensor                /* sockets have a bind of their own                      */
#include "../medrun.c"
#undef bind
#include "options.c"
#include "write.c"
#include "tool_calls.c"
#include "serve_grammar.c"
#include "serve_schema.c"

/* ============================================================================================
 * 1 What the parts share
 * ============================================================================================ */

#define JSON_TYPE "application/json; charset=utf-8"
enum { MAX_SLOTS = 64, MAX_KEYS = 64, MAX_LISTED = 16, MAX_PROMPTS = 64, MAX_TOP = 20, KEPT_TOP = 5,
       PASS_ROWS = 512, LOGIT_ROWS = 64, OUT_LIMIT = 256 << 10 };

typedef struct {
    char name[32];
    uint8_t digest[32];
} api_key;

typedef struct {
    int32_t id;
    double logprob;
} ranked;

/* What is known of the token at a position of a session: how likely it was, and the likeliest. */
typedef struct {
    bool known;
    double logprob;
    ranked best[KEPT_TOP];
} score;

typedef struct job job;
typedef struct seq seq;
typedef struct connection connection;

/* From the system's generator. */
static void random_bytes(uint8_t *out, size_t n) {
    if (getentropy(out, n)) abort();
}

/* A session, and whose it is. An idle one keeps its timeline: it is the cache. */
typedef struct {
    medrun_session *s;
    void *memory;
    size_t bytes;
    seq *owner;                 /* NULL: idle                                                   */
    uint8_t domain[32];         /* only requests of this one may share what it holds            */
    double used;
    score *scores;              /* (context), mapped with the first request that wants some     */
    bool pinned;                /* a prefix of --prefix: everybody's, never evicted             */
} slot;

enum { LOADING, READY, FAILED };                /* a server's state                              */
enum { API_CHAT = 1, API_COMPLETION = 2, API_LLAMA = 4 };

/* A request's fields; numbers as JSON has them. */
typedef struct {
    double temperature, top_k, top_p, min_p, repeat, presence, frequency, seed;
    double max_new, n, top, top_logprobs;       /* TOP: alternatives of each token, -1: none     */
    bool echo, stream, include_usage, ignore_eos, parse_special, think, continues,
         timings, progress;
} params;

/* One answer: a choice of a prompt. */
struct seq {
    job *job;
    int index;                  /* of the job's choices                                         */
    const int32_t *ids;
    size_t n_ids, fed;          /* of the prompt; how many are in the session                   */
    size_t cached;              /* of them, those that needed no pass                           */
    slot *slot;
    enum { WAITS, READS, WRITES, ENDED } state;
    bool started;               /* its session has what others can give                         */
    size_t unfed;               /* of the tokens it wrote, those for the next pass              */
    size_t n_new, max_new;
    uint64_t random;
    double last;                /* when it wrote its last token                                 */
    buffer made;                /* int32_t ids it wrote                                         */
    buffer text, thoughts, call;
    enum { IN_TEXT, IN_THOUGHTS, IN_CALL } mode;
    bool first, opened, holds;  /* HOLDS: the text may be a call, and waits for its end         */
    size_t base, sent, thoughts_sent;           /* BASE: where an echoed prompt ends            */
    buffer rows, ranks;         /* token_row; for each MAX_TOP of `ranked`                      */
    size_t rows_sent, ids_sent;
    const char *finish;         /* NULL while it goes on                                        */
    span stop_word;             /* of the job's, that ended it                                  */
    buffer calls, call_text;    /* tool calls: call_row; what they call and with what           */
    int n_calls;
    grammar *g;                 /* what it may write now, or NULL                               */
    uint32_t state_of_g;
    buffer chunks, steps;       /* streamed: text, and its length at each step (size_t)         */
    size_t chunks_at, steps_at, flushed, n_thoughts;
};

/* One request that needs passes. The I/O thread makes it; from then on only the engine touches it,
 * but for what is marked. */
struct job {
    job *next;                  /* in the queue, then in the engine's list                      */
    int api;
    char id[40];
    long long created;
    params p;
    buffer ids, ends;           /* all prompts' ids; where each ends (size_t)                   */
    size_t n_prompts, n_seqs;
    seq *seqs;
    buffer stops, stop_ends, stop_ids, bias;    /* bias: bias_row                               */
    grammar *grammar, *calls;   /* of the answer; of what calls functions                       */
    bool tools, must_call, one_call;
    uint8_t domain[32];
    const api_key *key;
    char path[32];
    buffer headers, head;       /* of the answer; of each chunk                                 */
    size_t turn, round;         /* whose chunk is next, see flush_chunks                        */
    double arrived, started, read, ended;
    size_t n_read, n_cached, n_written;
    const char *finish;
    buffer out;                 /* under the lock: what is to be sent                           */
    bool done, orphan, stalled, waiting;        /* under the lock                               */
    bool held;                  /* stalled, as the engine saw it                                */
    bool broken;                /* the answer ends in an error after it has begun               */
    bool banned;                /* by the request itself: it left no token that may come        */
    int status;
    atomic_bool cancelled;
};

typedef struct {
    char id[32];
    size_t at, n_name, n_arguments;             /* in q->call_text                              */
} call_row;

typedef struct {
    int32_t id;
    float value;
} bias_row;

typedef struct {
    int32_t id;
    bool stop;                  /* it ended the answer and is no text                           */
    size_t start, end, chars;   /* bytes in q->text; characters before it                       */
    double logprob;             /* NAN: none, as of a prompt's first                            */
    int n_ranks;
} token_row;

enum { TO_FIRST, TO_NEXT, IN_QUEUE, TO_END, FOR_MASK, N_TIMES };    /* histograms               */
typedef struct {
    uint64_t prompt_tokens, cached_tokens, new_tokens, fed_tokens, passes, busy, most_tokens;
    uint64_t cancelled, rejected_queue, rejected_key;
    double prompt_seconds, new_seconds, last_pass;
    struct { uint64_t counts[12]; double sum; } times[N_TIMES];     /* the last count: all      */
} metrics;

typedef struct { double last[5], middle; } timing;     /* of the last five; 0: not seen yet      */

/* How long passes take. A prompt's row is work of 1 and a bit for each key before it. */
typedef struct {
    timing plain[MAX_SLOTS + 1], each;          /* of I rows of answers; what work of 1 adds     */
    double per_key;             /* the work of a key                                            */
    double room;                /* for work beside answers, that was last made use of           */
    int passes;                 /* with prompts beside answers, since one without               */
} pace;

typedef struct {
    bool busy;
    size_t n_prompt, n_cached, n_new;
    char key[32];
} slot_view;

typedef struct {
    /* set before any thread starts */
    const struct serve_options *o;
    const char *path, *prefixes[MAX_LISTED];
    size_t n_prefixes;
    int port, threads, batch, context;
    double cache_mb;
    buffer says;                /* what the sandbox forbids                                     */
    /* LOADING: the engine's thread makes what follows, and nobody else may look at it */
    atomic_int state;
    medrun_error failure;       /* of loading                                                   */
    medrun_model *m;
    medrun_info info;
    const tokenizer *t;
    const chat_template *chat;
    char fingerprint[96], name[160], hash[65];
    size_t n_ctx, n_slots, n_pinned, max_body, max_queue, per_key, reserve;
    size_t bytes_per_token;
    double cache_seconds, latency, drain, available;
    int kv;
    bool strict, parse_special, lenient, ui, quiet, verbose;
    long long started;
    api_key keys[MAX_KEYS];
    size_t n_keys, n_hosts, n_origins;
    const char *hosts[MAX_LISTED], *origins[MAX_LISTED];
    int listener, wake[2];
    buffer page_headers;
    /* the I/O thread's */
    connection *connections;
    bool draining;
    /* under the lock */
    pthread_mutex_t lock;
    pthread_cond_t work;
    job *queue, **queue_end;
    size_t n_waiting, n_running;
    metrics metrics;
    slot_view view[MAX_SLOTS];
    size_t kv_tokens;
    size_t key_waits[MAX_KEYS];
    bool quit, poked;
    /* the engine's */
    size_t key_runs[MAX_KEYS];
    job *jobs;
    slot slots[MAX_SLOTS + MAX_LISTED];
    medrun_session *lead;
    pace pace;
    double pass_ended;                          /* of the last; 0: after it nothing was to do    */
    float *plain_logits;        /* (vocabulary) as the model made them                          */
    int *counts;                                /* (vocabulary) for penalties, all 0 between      */
    piece_order order;          /* for masks, made with the first                               */
} server;

/* What serve_http.c asks of serve_api.c and of the scheduler. */
static void take_request(server *sv, connection *c, span body);
static void answer_error(server *sv, connection *c, int status, const char *why);
static void cancel_job(server *sv, job *j);
static void end_job(server *sv, job *j);
static const char *submit_job(server *sv, job *j);

/* ============================================================================================
 * 2 The other files
 * ============================================================================================ */

#include "serve_http.c"
#include "serve_api.c"

/* The functions that may be called, and how: the grammar of a call. */
static int read_tools(const server *sv, job *g, const json *j, api_error *x) {
    static const char *const words[] = {"auto", "none", "required", NULL};
    uint32_t choice = field_of(j, 0, "tool_choice"), tools = field_of(j, 0, "tools");
    uint32_t many = field_of(j, 0, "parallel_tool_calls"), name = JSON_NONE;
    medrun_error e = {0};
    bool chosen = choice != JSON_NONE && json_typeof(j, choice) == JSON_OBJECT;
    if (chosen) name = json_get(j, json_get(j, choice, "function"), "name");
    if (chosen ? !json_is_type(j, name, JSON_STRING)
               : choice != JSON_NONE && one_of(words, j, choice) < 0)
        return wrong(x, "tool_choice", "tool_choice: wanted \"auto\", \"none\", \"required\" or "
                     "{\"type\": \"function\", \"function\": {\"name\": ...}}");
    bool several = true;
    read_bool(j, many, "parallel_tool_calls", &several, x);
    g->must_call = chosen || json_is(j, choice, "required");
    g->one_call = !several;
    if (g->must_call && !g->tools)
        return wrong(x, "tool_choice", "tool_choice: needs tools");
    if (!g->tools || x->e.code) return x->e.code;
    g->calls = grammar_of_tools(tool_form_of(sv->chat), j, tools, name, !g->one_call, &e);
    if (e.code == MEDRUN_NO_MEMORY) x->e = e;
    else if (e.code) wrong(x, chosen && strstr(e.text, "tool_choice") ? "tool_choice" : "tools",
                           "%s", e.text);
    return x->e.code;
}

/* What the answer must look like, if anything is said of that; at most one thing. */
static int read_shape(const server *sv, job *g, const json *j, api_error *x) {
    static const char *const names[] = {"response_format", "json_schema", "guided_json",
                                        "guided_choice", "guided_regex", "grammar",
                                        "guided_grammar", NULL};
    uint32_t v = JSON_NONE, open = field_of(j, 0, "additional");
    int kind = -1;
    if (read_tools(sv, g, j, x)) return x->e.code;
    for (int i = 0; names[i]; i++) {
        uint32_t f = field_of(j, 0, names[i]);
        if (f == JSON_NONE || (!i && json_is(j, json_get(j, f, "type"), "text"))) continue;
        if (kind >= 0) wrong(x, names[i], "%s stands beside %s", names[i], names[kind]);
        kind = i, v = f;
    }
    if (kind < 0 || x->e.code) return x->e.code;
    if (g->tools) return wrong(x, names[kind], "%s stands beside tools", names[kind]);
    bool object = false;
    if (kind == 0) {
        uint32_t type = json_get(j, v, "type"), own = json_get(j, v, "json_schema");
        if (field_of(j, own, "additional") != JSON_NONE) open = field_of(j, own, "additional");
        if (json_is(j, type, "json_schema"))
            v = json_get(j, own, "schema");
        else if (!json_is(j, type, "json_object"))
            return wrong(x, names[0], "response_format: wanted text, json_object or json_schema");
        else v = field_of(j, v, "schema"), object = v == JSON_NONE;
        if (v == JSON_NONE && !object)
            return wrong(x, names[0], "response_format: wanted json_schema.schema");
    }
    if (open != JSON_NONE && !json_is(j, open, "spec") && !json_is(j, open, "none"))
        return wrong(x, "additional", "additional: wanted \"spec\" or \"none\"");
    if (!object && j->nodes[v].end - j->nodes[v].start > 256 << 10)
        return wrong(x, names[kind], "%s: longer than 256 KiB", names[kind]);
    medrun_error e = {0};
    int text = kind == 3 ? IS_CHOICES : kind == 4 ? IS_REGEX : IS_GBNF;
    g->grammar = kind >= 3 ? grammar_of_text(j, v, text, &e)
                           : grammar_of_schema(j, v, json_is(j, open, "spec"), &e);
    if (e.code == MEDRUN_NO_MEMORY) x->e = e;
    else if (e.code) wrong(x, names[kind], "%s", e.text);
    return x->e.code;
}

/* ============================================================================================
 * 3 The scheduler
 *
 * One loop: let go of what was cancelled, admit what has a session, make a pass, use its logits.
 * A pass has one row for each answer that is written, and prompts ride along as far as the budget
 * goes. The session that leads a pass has nothing to say itself: it lends its scratch.
 * ============================================================================================ */

static void wake_io(const server *sv) {
    if (write(sv->wake[1], "", 1) < 0) return;          /* full: it is awake                     */
}

static void note_time(server *sv, int what, double time) {
    pthread_mutex_lock(&sv->lock);
    for (int i = 0; i < 11; i++) sv->metrics.times[what].counts[i] += time <= bounds[i];
    sv->metrics.times[what].counts[11]++;
    sv->metrics.times[what].sum += time;
    pthread_mutex_unlock(&sv->lock);
}

/* ---- the queue, between the threads ---------------------------------------------------------- */

/* Called by the I/O thread. NULL: it waits now; else why it may not. */
static const char *submit_job(server *sv, job *j) {
    const char *why = NULL;
    size_t same = 0;
    pthread_mutex_lock(&sv->lock);
    for (const job *o = sv->queue; o; o = o->next) same += o->key == j->key;
    for (size_t i = 0; i < sv->n_keys; i++)
        if (j->key == &sv->keys[i]) same += sv->key_waits[i];
    if (sv->n_waiting >= sv->max_queue) why = "the queue is full", sv->metrics.rejected_queue++;
    else if (j->key && same >= sv->per_key)
        why = "too many requests of this key wait", sv->metrics.rejected_key++;
    else {
        j->waiting = true;
        sv->n_waiting++;
        *sv->queue_end = j;
        sv->queue_end = &j->next;
        pthread_cond_signal(&sv->work);
    }
    pthread_mutex_unlock(&sv->lock);
    return why;
}

/* The I/O thread lost the client, or has sent the whole answer. */
static void end_job(server *sv, job *j) {
    log_line(sv, j->id, j->key ? j->key->name : "-", j->path, j->status, j);
    free_job(j);
}

static void cancel_job(server *sv, job *j) {
    pthread_mutex_lock(&sv->lock);
    bool done = j->done;
    j->orphan = true;
    atomic_store(&j->cancelled, true);
    if (!done) sv->metrics.cancelled++;
    if (!done && !j->waiting && sv->n_running == 1) medrun_interrupt(sv->lead);
    sv->poked = true;
    pthread_cond_signal(&sv->work);
    pthread_mutex_unlock(&sv->lock);
    if (done) end_job(sv, j);
}

/* ---- sessions -------------------------------------------------------------------------------- */

/* Starts the session of a slot in fresh memory, or in memory whose pages are given back, by which
 * all that it held is gone. */
static int open_slot(server *sv, slot *s, medrun_error *e) {
    medrun_session_options o = {.context = (int)sv->n_ctx, .batch = LOGIT_ROWS,
                                .logit_rows = LOGIT_ROWS, .kv = sv->kv, .strict = sv->strict};
    if (s->memory) madvise(s->memory, s->bytes, MADV_DONTNEED);
    else {
        s->bytes = (medrun_session_bytes(sv->m, &o) + 4095) / 4096 * 4096;
        s->memory = mmap(NULL, s->bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (s->memory == MAP_FAILED) return s->memory = NULL, out_of_memory(e, s->bytes);
#ifdef MADV_NOHUGEPAGE                          /* else the first token would take megabytes     */
        madvise(s->memory, s->bytes, MADV_NOHUGEPAGE);
#endif
#ifdef MADV_DONTDUMP
        madvise(s->memory, s->bytes, MADV_DONTDUMP);
#endif
    }
    if (s->scores) madvise(s->scores, sv->n_ctx * sizeof *s->scores, MADV_DONTNEED);
    return medrun_start(&s->s, sv->m, &o, s->memory, s->bytes, e);
}

static void evict(server *sv, slot *s) {
    medrun_error e = {0};
    if (!s->owner && !s->pinned && medrun_length(s->s)) open_slot(sv, s, &e);
}

static size_t same_ids(const int32_t *a, size_t n, const int32_t *b, size_t m) {
    size_t same = 0;
    while (same < n && same < m && a[same] == b[same]) same++;
    return same;
}

/* How many tokens at the start of Q's prompt slot S has processed, and if it echoes, scored. */
static size_t common_start(const seq *q, const slot *s) {
    if (!s->pinned && memcmp(s->domain, q->job->domain, 32)) return 0;
    size_t n = s->s->n_done < q->n_ids ? s->s->n_done : q->n_ids, scored = 0;
    size_t same = same_ids(q->ids, n, s->s->tokens, n);
    if (same == q->n_ids) same--;                       /* the last one is needed for its logits */
    if (!q->job->p.echo || q->job->p.top < 0) return same;
    if (!s->scores || q->job->p.top > KEPT_TOP) return 0;
    while (scored + 1 < n && s->s->tokens[scored + 1] == q->ids[scored + 1] &&
           s->scores[scored + 1].known) scored++;
    return scored < same ? scored : same;
}

static void keep_start(slot *s, size_t n) {
    if (n < s->s->n_tokens) medrun_rewind(s->s, n, NULL);
    s->s->n_done = n;
    s->s->n_logits = 0;
}

/* Copies what FROM has made of its first N tokens: whole panels of 16. */
static void copy_start(slot *to, const slot *from, size_t n) {
    const medrun_session *a = from->s, *b = to->s;
    size_t bytes = (n + 15) / 16 * cache_panel(a->options.kv, (size_t)a->model->config.head_dim);
    for (int l = 0; l < a->model->config.n_layers; l++)
        for (size_t h = 0; h < a->cache.heads; h++) {
            size_t at = cache_place(&a->cache, l, h), put = cache_place(&b->cache, l, h);
            memcpy(b->cache.keys + put, a->cache.keys + at, bytes);
            memcpy(b->cache.values + put, a->cache.values + at, bytes);
        }
    keep_start(to, 0);
    medrun_feed(to->s, a->tokens, n, NULL);
    keep_start(to, n);
    for (size_t i = 0; to->scores && i <= n; i++)       /* never those of another timeline        */
        to->scores[i] = from->scores ? from->scores[i] : (score){0};
}

/* Tokens whose cache is in memory, or promised to what runs. */
static size_t used_tokens(const server *sv, bool idle_too) {
    size_t n = 0;
    for (const slot *s = sv->slots; s < sv->slots + sv->n_slots; s++) {
        if (s->owner) n += s->owner->n_ids + s->owner->max_new;
        else if (idle_too) n += medrun_length(s->s);
    }
    return n;
}

/* The idle session used longest ago, BUT one; NULL: none. */
static slot *oldest_idle(server *sv, const slot *but, bool full) {
    slot *oldest = NULL;
    for (slot *s = sv->slots; s < sv->slots + sv->n_slots; s++)
        if (!s->owner && s != but && (!full || medrun_length(s->s)) &&
            (!oldest || s->used < oldest->used)) oldest = s;
    return oldest;
}

/* Gives Q a session if there is one, and memory for all that it may need. */
static bool admit_seq(server *sv, seq *q) {
    size_t need = q->n_ids + q->max_new, most = 0;
    slot *best = NULL, *to;
    if (used_tokens(sv, false) && used_tokens(sv, false) + need > sv->reserve) return false;
    for (slot *s = sv->slots; s < sv->slots + sv->n_slots + sv->n_pinned; s++) {
        size_t n = common_start(q, s);
        if (n > most) most = n, best = s;
    }
    bool goes_on = best && !best->owner && !best->pinned && best->s->n_done < most + 64;
    to = goes_on ? best : oldest_idle(sv, best, false);
    if (!to) to = oldest_idle(sv, NULL, false);
    if (!to) return false;
    for (slot *s; used_tokens(sv, true) + need > sv->reserve + medrun_length(to->s) &&
                  (s = oldest_idle(sv, to, true));) evict(sv, s);
    to->owner = q;
    q->slot = to;
    q->state = READS;
    if (q->job->p.echo && q->job->p.top >= 0 && !to->scores) {
        void *p = mmap(NULL, sv->n_ctx * sizeof(score), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p != MAP_FAILED) to->scores = p;
    }
    return true;
}

/* Jobs whose key has run least recently come first; within a key, those that came first. */
static void admit(server *sv) {
    for (int turn = 0; turn < 2; turn++)
        for (job *j = sv->jobs; j; j = j->next) {
            bool late = j->key && sv->key_runs[j->key - sv->keys] > 0;
            if (late != (turn == 1) && j->waiting) continue;
            for (size_t i = 0; i < j->n_seqs; i++) {
                if (j->seqs[i].state != WAITS) continue;
                if (!admit_seq(sv, &j->seqs[i])) return;
                if (!j->waiting) continue;
                j->started = seconds();
                if (j->key) sv->key_runs[j->key - sv->keys]++;
                pthread_mutex_lock(&sv->lock);
                j->waiting = false;
                sv->n_waiting--, sv->n_running++;
                if (j->key) sv->key_waits[j->key - sv->keys]--;
                pthread_mutex_unlock(&sv->lock);
                note_time(sv, IN_QUEUE, j->started - j->arrived);
            }
        }
}

/* ---- choosing a token ------------------------------------------------------------------------ */

/* The N likeliest in order, with logarithms of their probabilities. */
static void rank_best(const float *logits, size_t vocab, double sum, int n, ranked *best) {
    int32_t ids[MAX_TOP];
    size_t have = largest_logits(logits, vocab, (size_t)n, ids);
    for (size_t i = 0; i < have; i++) best[i] = (ranked){ids[i], (double)logits[ids[i]] - sum};
}

/* Notes a token of Q: its text stands at START in q->text. RANKS has MAX_TOP. */
static void note_token(seq *q, int32_t id, bool stop, size_t start, double logprob,
                    const ranked *ranks) {
    size_t n = n_rows_of(q), chars = n ? row_of(q, n - 1)->chars : 0;
    for (size_t i = n ? row_of(q, n - 1)->start : 0; i < start; i++)
        chars += (q->text.data[i] & 0xC0) != 0x80;
    int n_ranks = (int)q->job->p.top;
    if (n_ranks < 0) return;
    if (isnan(logprob)) n_ranks = 0;
    token_row r = {id, stop, start, q->text.n, chars, logprob, n_ranks};
    buffer_add(&q->rows, &r, sizeof r);
    buffer_add(&q->ranks, ranks, MAX_TOP * sizeof *ranks);
}

/* The logits of a row, counted from the last, which the request may change as it likes: the session
 * makes new ones before they are looked at again. */
static float *logits_of(const seq *q, size_t row) {
    return (float *)(uintptr_t)medrun_logits(q->slot->s, row);
}

/* Does the answer have to open a call now? */
static bool opens_call(const server *sv, const seq *q) {
    return q->job->must_call && sv->chat->call_tokens[0] && q->mode != IN_CALL && !q->n_calls;
}

/* A bit for each token that the grammar allows; NULL: no memory, or it is too much for us. */
static const uint8_t *mask_of(server *sv, const seq *q) {
    double start = seconds();
    if (!sv->order.n && !sort_pieces(&sv->order, sv->t)) return NULL;
    const uint8_t *mask = grammar_mask(q->g, &sv->order, sv->t, q->state_of_g, q->first);
    note_time(sv, FOR_MASK, seconds() - start);
    return mask;
}

/* Then the request ends in an error: it is never answered in another shape. */
static bool shape_failed(const job *g) {
    return (g->grammar && g->grammar->failed) || (g->calls && g->calls->failed);
}

/* The only token that may come, if no logits can change that and nobody asks for them; else -1. */
static int32_t forced_token(server *sv, const seq *q) {
    const job *g = q->job;
    int32_t one = -1;
    if (!q->g || g->p.top >= 0 || g->bias.n || q->state != WRITES) return -1;
    const uint8_t *mask = mask_of(sv, q);
    for (size_t i = 0; mask && i < (size_t)sv->info.vocab_size / 8 + 1; i++) {
        if (!mask[i]) continue;
        if (one >= 0 || mask[i] & (mask[i] - 1)) return -1;
        for (one = (int32_t)i * 8; !(mask[i] >> one % 8 & 1); one++) continue;
    }
    if (!mask || !grammar_ends(q->g, q->state_of_g)) return one;
    return one < 0 && q->mode == IN_CALL ? chat_token(sv->t, sv->chat->call_tokens[1]) : -1;
}

/* The logits with all that the request asks for, then the engine's own way to a token. -1: nothing
 * is allowed. */
static int32_t pick_token(server *sv, seq *q) {
    medrun_session *s = q->slot->s;
    const job *g = q->job;
    size_t vocab = (size_t)sv->info.vocab_size, n = 0, made = q->made.n / 4;
    float *logits = logits_of(q, 0);
    uint64_t *list = s->candidates, best;
    medrun_sampling how = {(float)g->p.temperature, (int)g->p.top_k, (float)g->p.top_p,
                           (float)g->p.min_p, (float)g->p.repeat, 0};
    for (size_t i = 0; i < made; i++) sv->counts[u32_at(q->made.data, i)]++;
    for (size_t i = 0; i < made; i++) {
        uint32_t id = u32_at(q->made.data, i);
        if (sv->counts[id])
            logits[id] -= (float)(g->p.presence + g->p.frequency * sv->counts[id]);
        sv->counts[id] = 0;
    }
    for (size_t i = 0; i < g->bias.n / sizeof(bias_row); i++) {
        const bias_row *b = (const bias_row *)(void *)g->bias.data + i;
        logits[b->id] += b->value;
    }
    for (int i = 0; g->p.ignore_eos && i < sv->info.n_stops; i++)
        logits[sv->info.stops[i]] = -INFINITY;
    const uint8_t *mask = NULL;
    if (opens_call(sv, q)) return chat_token(sv->t, sv->chat->call_tokens[0]);
    if (q->g && !(mask = mask_of(sv, q))) return -1;
    bool may_end = q->g && grammar_ends(q->g, q->state_of_g);
    int32_t closes = q->mode == IN_CALL ? chat_token(sv->t, sv->chat->call_tokens[1]) : -1;
    list_candidates(list, logits, vocab, how.repeat_penalty, s->tokens, s->n_tokens);
    for (size_t i = 0; i < vocab; i++) {
        bool is_unused = sv->t->has_unused && sv->t->piece_type[i] == PIECE_UNUSED;
        bool fits = !mask || mask[i / 8] >> i % 8 & 1;
        if (!fits && may_end)
            fits = closes < 0 ? medrun_is_stop(sv->m, (int32_t)i) : (int32_t)i == closes;
        if (fits && !is_unused && logits[i] > -INFINITY) list[n++] = list[i];
    }
    if (!n) {
        q->job->banned = g->bias.n || g->p.ignore_eos;
        return -1;
    }
    best = list[0];
    for (size_t i = 1; i < n; i++) if (list[i] < best) best = list[i];
    if (how.temperature <= 0 || (mask && n == 1)) return (int32_t)(uint32_t)best;
    double sum, ticket;
    size_t few = select_candidates(list, n, best, &how, &sum), i = 1;
    ticket = random_uniform(&q->random) * sum;
    for (; i < few; i++) {
        ticket -= weight_of(list[n - i], best, how.temperature);
        if (ticket < 0) break;
    }
    return (int32_t)(uint32_t)list[n - i];
}

/* ---- what a token does to an answer ---------------------------------------------------------- */

/* Cuts the text at the first stop that is in it; FROM: where one may end at the earliest. */
static bool cut_at_stop(seq *q, size_t from) {
    const job *g = q->job;
    size_t cut = SIZE_MAX;
    for (size_t i = 0; i < g->stop_ends.n / sizeof(size_t); i++) {
        size_t start = end_of(&g->stop_ends, i), n = end_of(&g->stop_ends, i + 1) - start;
        size_t at = from > n ? from - n : 0;
        if (at < q->base) at = q->base;
        if (at >= q->text.n) continue;
        const uint8_t *found = memmem(q->text.data + at, q->text.n - at, g->stops.data + start, n);
        if (!found || (size_t)(found - q->text.data) >= cut) continue;
        cut = (size_t)(found - q->text.data);
        q->stop_word = part_of(&g->stops, start, start + n);
    }
    if (cut == SIZE_MAX) return false;
    q->text.n = cut;
    return true;
}

/* How many bytes of the text can go out: not those with which a stop or a character may begin. */
static size_t sendable(const seq *q) {
    const job *g = q->job;
    size_t n = q->text.n, hold = utf8_unfinished(q->text.data, n);
    if (q->finish) return n;
    if (q->holds) return q->sent;
    for (size_t i = 0; i < g->stop_ends.n / sizeof(size_t); i++) {
        size_t start = end_of(&g->stop_ends, i), end = end_of(&g->stop_ends, i + 1);
        for (size_t k = end - start - 1; k > hold; k--)
            if (k <= n - q->base && !memcmp(q->text.data + n - k, g->stops.data + start, k)) {
                hold = k;
                break;
            }
    }
    return n - hold < q->sent ? q->sent : n - hold;
}

/* Moves the streams of a job's answers into its buffer: step by step, and within a step in the
 * order of the choices, so that even their order depends on nothing else. */
static void flush_chunks(server *sv, job *g) {
    pthread_mutex_lock(&sv->lock);
    for (;;) {
        seq *q = &g->seqs[g->turn];
        size_t n, ready = q->steps.n / sizeof n - q->steps_at;
        if (q->flushed == g->round && ready) {
            memcpy(&n, q->steps.data + q->steps_at++ * sizeof n, sizeof n);
            if (n) buffer_add(&g->out, q->chunks.data + q->chunks_at, n);
            q->chunks_at += n;
            q->flushed++;
            if (ready == 1) q->steps.n = q->chunks.n = q->steps_at = q->chunks_at = 0;
        } else if (q->flushed <= g->round && q->state != ENDED) break;
        if (++g->turn < g->n_seqs) continue;
        g->turn = 0, g->round++;
        bool more = false;
        for (size_t i = 0; i < g->n_seqs; i++)
            more |= g->seqs[i].state != ENDED || g->seqs[i].steps.n;
        if (!more) break;
    }
    g->stalled = g->out.n > OUT_LIMIT;
    pthread_mutex_unlock(&sv->lock);
}

/* One call, NAME as JSON without quotes, ARGUMENTS as JSON. */
static void add_call(seq *q, span name, span arguments) {
    call_row r = {"call_", q->call_text.n, name.n, arguments.n};
    random_text(r.id + 5, 24);
    say(&q->call_text, "%S%S", name, arguments);
    buffer_add(&q->calls, &r, sizeof r);
    q->n_calls++;
}

/* Reads what the model wrote to call functions: [{"name": arguments}, ...] between Apertus's
 * tokens, {"name": ..., "parameters": ...} as the whole answer of Llama 3.1. Else it stays text. */
static void read_calls(seq *q, const buffer *text, bool list) {
    json j = {0};
    medrun_error e = {0};
    if (json_parse(&j, chars_of(text), text->n, &e)) { json_free(&j); return; }
    if (!list) {
        uint32_t name = json_get(&j, 0, "name"), with = json_get(&j, 0, "parameters");
        if (json_is_type(&j, name, JSON_STRING) && json_is_type(&j, with, JSON_OBJECT))
            add_call(q, span_of(&j, name), span_of(&j, with));
    } else if (json_typeof(&j, 0) == JSON_ARRAY)
        for EACH(&j, 0, c)
            if (json_typeof(&j, c) == JSON_OBJECT && j.nodes[c].count == 2)
                add_call(q, span_of(&j, c + 1), span_of(&j, c + 2));
    json_free(&j);
}

/* Control tokens that say what follows: thoughts, calls. True: ID is one. */
static bool change_mode(const server *sv, seq *q, int32_t id) {
    const chat_template *c = sv->chat;
    if (q->job->api != API_CHAT || tokenizer_type(sv->t, id) != PIECE_CONTROL) return false;
    if (id == chat_token(sv->t, c->call_tokens[0])) {
        q->mode = IN_CALL, q->call.n = 0;
        if ((q->g = q->job->calls)) q->state_of_g = grammar_start(q->g);
        return true;
    }
    if (id == chat_token(sv->t, "<|inner_prefix|>")) return q->mode = IN_THOUGHTS, true;
    if (id == chat_token(sv->t, "<|inner_suffix|>")) return q->mode = IN_TEXT, true;
    if (q->mode != IN_CALL || id != chat_token(sv->t, c->call_tokens[1])) return false;
    read_calls(q, &q->call, true);
    if (!q->n_calls) buffer_add(&q->text, q->call.data, q->call.n);
    q->g = NULL;
    return q->mode = IN_TEXT, true;
}

static void end_seq(seq *q) {
    if (q->slot) {
        q->slot->owner = NULL;
        q->slot->used = seconds();
        q->slot = NULL;
    }
    q->state = ENDED;
}

/* The answer ends: what it meant, if that was a call. */
static void finish_seq(seq *q, const char *why) {
    if (q->mode == IN_CALL) buffer_add(&q->text, q->call.data, q->call.n);
    if (q->holds && !q->n_calls) {
        read_calls(q, &q->text, false);
        if (q->n_calls) q->text.n = q->rows.n = 0;
    }
    q->finish = q->n_calls ? "tool_calls" : why;
    end_seq(q);
}

/* A text that begins with a brace may be a call. From there on it is one, unless it has begun as
 * something else. */
static void hold_call(seq *q) {
    size_t blank = 0;
    bool held = q->holds;
    while (blank < q->text.n && strchr(" \n", q->text.data[blank])) blank++;
    q->holds = q->text.n > blank && q->text.data[blank] == '{';
    if (held || !q->holds || q->g) return;
    uint32_t at = grammar_start(q->job->calls);
    for (size_t i = blank; i < q->text.n; i++)
        at = grammar_step(q->job->calls, at, q->text.data[i]);
    if (at != DEAD) q->g = q->job->calls, q->state_of_g = at;
}

/* Appends ID to Q's answer, and sees whether that is its end. */
static void take_token(server *sv, seq *q, int32_t id, double logprob, const ranked *ranks) {
    const job *g = q->job;
    size_t start = q->text.n, n;
    bool stop = !g->p.ignore_eos && medrun_is_stop(sv->m, id), mode = change_mode(sv, q, id);
    for (size_t i = 0; i < g->stop_ids.n / 4; i++)
        stop |= (int32_t)u32_at(g->stop_ids.data, i) == id;
    const char *text = tokenizer_text(sv->t, id, false, &q->first, &n);
    buffer *to = q->mode == IN_CALL ? &q->call : q->mode == IN_THOUGHTS ? &q->thoughts : &q->text;
    if (!stop && !mode) buffer_add(to, text, n);
    for (size_t i = 0; q->g && !stop && i < n; i++)
        q->state_of_g = grammar_step(q->g, q->state_of_g, (uint8_t)text[i]);
    q->n_thoughts += q->mode == IN_THOUGHTS;
    buffer_add(&q->made, &id, sizeof id);
    note_token(q, id, stop, start, logprob, ranks);
    q->n_new++, q->job->n_written++;
    q->unfed++;
    if (g->tools && !sv->chat->call_tokens[0]) hold_call(q);
    if (to == &q->text && cut_at_stop(q, start)) finish_seq(q, "stop");
    else if (stop || (q->g && q->mode != IN_CALL && grammar_only_ends(q->g, q->state_of_g)))
        finish_seq(q, "stop");
    else if (mode && q->n_calls && (g->must_call || g->one_call)) finish_seq(q, "stop");
    else if (q->n_new >= q->max_new) finish_seq(q, "length");
}

/* ---- after a pass ---------------------------------------------------------------------------- */

/* The row of an echoed token at position AT of the prompt, from LOGITS of the position before it
 * or, where that is NULL, from what the session has. */
static void echo_row(server *sv, seq *q, size_t at, const float *logits) {
    const job *g = q->job;
    ranked ranks[MAX_TOP] = {{0}};
    score *known = q->slot->scores ? &q->slot->scores[at] : NULL;
    size_t vocab = (size_t)sv->info.vocab_size, n, start = q->text.n;
    int32_t id = q->ids[at];
    double logprob = NAN;
    if (g->p.top >= 0 && logits) {
        double sum = log_sum(logits, vocab);
        int top = g->p.top > KEPT_TOP ? (int)g->p.top : KEPT_TOP;
        if (top > sv->info.vocab_size) top = sv->info.vocab_size;
        rank_best(logits, vocab, sum, top, ranks);
        logprob = (double)logits[id] - sum;
        if (known) *known = (score){.known = true, .logprob = logprob};
        if (known) memcpy(known->best, ranks, sizeof known->best);
    } else if (g->p.top >= 0 && at && known) {
        logprob = known->logprob;
        memcpy(ranks, known->best, sizeof known->best);
    }
    const char *text = tokenizer_text(sv->t, id, false, &q->first, &n);
    buffer_add(&q->text, text, n);
    note_token(q, id, false, start, logprob, ranks);
    q->base = q->text.n;
}

/* Chooses the next token of Q from the logits of its last one. */
static void write_token(server *sv, seq *q) {
    ranked ranks[MAX_TOP] = {{0}};
    size_t vocab = (size_t)sv->info.vocab_size;
    const float *logits = logits_of(q, 0);
    int top = (int)q->job->p.top;
    double sum = 0, logprob = NAN, now = seconds();
    if (q->job->read <= 0) q->job->read = now;
    note_time(sv, q->n_new ? TO_NEXT : TO_FIRST, now - (q->n_new ? q->last : q->job->arrived));
    q->last = now;
    float *kept = NULL;
    if (top >= 0) {
        sum = log_sum(logits, vocab);
        rank_best(logits, vocab, sum, top > sv->info.vocab_size ? sv->info.vocab_size : top, ranks);
        kept = sv->plain_logits;
        memcpy(kept, logits, vocab * sizeof *kept);
    }
    int32_t id = pick_token(sv, q);
    if (id < 0) {
        q->job->broken = true;
        finish_seq(q, "error");
        return;
    }
    if (kept) logprob = (double)kept[id] - sum;
    take_token(sv, q, id, logprob, ranks);
    size_t most = (size_t)sv->lead->options.batch / sv->n_slots;
    while (q->unfed < most && (id = forced_token(sv, q)) >= 0) take_token(sv, q, id, NAN, ranks);
    q->job->broken |= shape_failed(q->job);
}

/* Uses what the pass has made for Q: FED tokens of its prompt, or its next token. */
static void use_logits(server *sv, seq *q, size_t n_fed) {
    const job *g = q->job;
    if (q->state == READS) {
        size_t from = q->fed - n_fed;
        say_progress(sv, q);
        for (size_t at = from; g->p.echo && at < q->fed; at++)
            if (at + 1 < q->n_ids)
                echo_row(sv, q, at + 1, g->p.top < 0 ? NULL : logits_of(q, q->fed - 1 - at));
        if (q->fed < q->n_ids) return;
        q->state = WRITES;
        if (!q->max_new) {
            if (q->job->read <= 0) q->job->read = seconds();
            finish_seq(q, "length");
        }
    }
    if (q->state == WRITES) write_token(sv, q);
    if (g->broken) return;                      /* the error that follows is the stream's end    */
    if (!g->p.stream) return;
    size_t before = q->chunks.n, made;
    if (q->state == ENDED && q->job->ended <= 0) {
        bool all = true;
        for (size_t i = 0; i < g->n_seqs; i++) all &= g->seqs[i].state == ENDED;
        if (all) q->job->ended = seconds();
    }
    stream_step(sv, q, sendable(q));
    made = q->chunks.n - before;
    buffer_add(&q->steps, &made, sizeof made);
}

/* ---- passes ---------------------------------------------------------------------------------- */

/* Before the first token of Q: another session may have more of its start, or may soon have it,
 * such as that of another choice of the same request. True: that is worth waiting for. */
static bool share_start(server *sv, seq *q) {
    const slot *best = q->slot;
    bool own = !memcmp(q->slot->domain, q->job->domain, 32);
    size_t most = own ? common_start(q, q->slot) : 0;
    for (const slot *o = sv->slots; o < sv->slots + sv->n_slots + sv->n_pinned; o++) {
        if (o == q->slot) continue;
        size_t now = common_start(q, o);
        if (now > most && (now >= 32 || q->job->n_seqs > 1)) most = now, best = o;
    }
    for (const slot *o = sv->slots; o < sv->slots + sv->n_slots; o++) {
        const seq *other = o->owner;
        if (!other || other == q || other->state != READS || !other->started ||
            memcmp(o->domain, q->job->domain, 32)) continue;
        size_t same = same_ids(q->ids, q->n_ids, other->ids, other->n_ids);
        if (same > most + 32 && o->s->n_done < same) return true;
    }
    medrun_error e = {0};
    if (!own && best == q->slot) most = 0;
    if (!own && medrun_length(q->slot->s)) open_slot(sv, q->slot, &e);
    memcpy(q->slot->domain, q->job->domain, 32);
    if (best != q->slot) copy_start(q->slot, best, most);
    else keep_start(q->slot, most);
    q->started = true;
    q->fed = q->cached = most;
    if (q->index % (int)q->job->p.n == 0) q->job->n_cached += most;
    say_progress(sv, q);
    for (size_t at = 0; q->job->p.echo && at <= most; at++) echo_row(sv, q, at, NULL);
    return false;
}

static timing *plain_pass(pace *p, size_t n) { return &p->plain[n < MAX_SLOTS ? n : MAX_SLOTS]; }

/* How much work of prompts may ride along so that who writes waits no longer than is promised; none
 * where it is time to see again how long that is without. Rows are nearly free until they take
 * longer than the weights' way from memory, so what one adds says little of many more: the room
 * grows by a quarter of what it lacks, and by half of itself at most. */
static double room_beside(pace *p, double latency, size_t written) {
    double plain = plain_pass(p, written)->middle, most = latency > 0 ? latency : 2.3 * plain;
    if (plain <= 0 || p->passes >= 12) return 0;
    double room = p->each.middle > 0 ? (most - plain) / p->each.middle : 0;
    double last = p->room > 8 ? p->room : 8;
    if (room > last) room = fmin((room + 3 * last) / 4, 1.5 * last);
    return room > 4 ? room : 4;
}

static void learn_time(timing *t, double now, bool alone) {
    double *l = t->last;
    for (int i = 4; i >= 0; i--) l[i] = i && !alone && t->middle > 0 ? l[i - 1] : now;
    for (int i = 0; i < 5; i++) {
        int before = 0;
        for (int k = 0; k < 5; k++) before += l[k] < l[i] || (k < i && l[k] <= l[i]);
        if (before == 2) t->middle = l[i];
    }
}

/* TIME: since the pass before, as who waits sees it. One that was held up says nothing, but where
 * rows have become more, the dearest counts. Where nobody writes, rows are so many that they are
 * cheaper: that gives no more than a first guess. */
static void learn_pass(pace *p, size_t written, double room, double work, double time) {
    timing *plain = plain_pass(p, written), *each = &p->each;
    p->passes = work > 0 && written ? p->passes + 1 : 0;
    if (work <= 0) {
        learn_time(plain, time, time < plain->middle / 2);
    } else if (written ? work * 2 >= room : each->middle <= 0) {
        double now = fmax((written ? time - plain->middle : time * 1.5) / work, 1e-9);
        learn_time(each, now, now > each->middle && room > 1.2 * p->room);
        if (written) p->room = room;
    }
}

/* Feeds N tokens to Q's session. */
static void feed_seq(seq *q, const int32_t *ids, size_t n, size_t wanted) {
    slot *s = q->slot;
    for (size_t i = 0; s->scores && i < n; i++) s->scores[medrun_length(s->s) + i].known = false;
    medrun_feed(s->s, ids, n, NULL);
    s->s->n_wanted = wanted;
}

/* The prompts that are to be read, in the order in which they ride along: those that fit whole, the
 * shortest first, then the others as they came. */
static size_t list_readers(server *sv, seq **list, double room) {
    size_t n = 0;
    for (job *g = sv->jobs; g; g = g->next)
        for (size_t i = 0; i < g->n_seqs; i++) {
            seq *q = &g->seqs[i];
            if (q->state != READS || (!q->started && share_start(sv, q))) continue;
            size_t left = q->n_ids - q->fed, at = n++;
            for (; at && (double)left <= room; at--) {
                size_t other = list[at - 1]->n_ids - list[at - 1]->fed;
                if (other <= left) break;
                list[at] = list[at - 1];
            }
            list[at] = q;
        }
    return n;
}

/* Nobody waits for what a pass makes. */
static bool all_cancelled(seq *const *all, size_t n) {
    while (n && atomic_load(&all[n - 1]->job->cancelled)) n--;
    return !n;
}

/* One pass. False: there was nothing to do. */
static bool run_pass(server *sv) {
    medrun_session *sessions[MAX_SLOTS + 1] = {sv->lead};
    seq *all[MAX_SLOTS], *readers[MAX_SLOTS];
    size_t fed[MAX_SLOTS] = {0}, n = 0, rows = 0, most = (size_t)sv->lead->options.batch;
    for (slot *s = sv->slots; s < sv->slots + sv->n_slots; s++) {
        seq *q = s->owner;
        if (!q || q->state != WRITES || !q->unfed || q->job->held) continue;
        feed_seq(q, (const int32_t *)(void *)q->made.data + q->made.n / 4 - q->unfed, q->unfed, 1);
        all[n++] = q, rows += q->unfed;
        q->unfed = 0;
    }
    size_t writers = n, written = rows, echoed;
    double room = written ? room_beside(&sv->pace, sv->latency, written) : PASS_ROWS, work = 0;
    size_t n_readers = list_readers(sv, readers, room);
    for (size_t i = 0; i < n_readers && rows < most && room > 0; i++) {
        seq *q = readers[i];
        size_t left = q->n_ids - q->fed, take = left < most - rows ? left : most - rows;
        double unit = written ? 1 + sv->pace.per_key * (double)q->fed : 1;
        double fit = (room - work) / unit;
        if (work <= 0 && fit < 1) fit = 1;
        if (fit < 1) break;
        if (fit < (double)take) take = (size_t)fit;
        bool echo = q->job->p.echo && q->job->p.top >= 0;
        if (echo && take > LOGIT_ROWS) take = LOGIT_ROWS;
        echoed = echo ? take : take == left;
        feed_seq(q, q->ids + q->fed, take, echoed);
        q->fed += take;
        fed[n] = take;
        all[n++] = q;
        rows += take, work += unit * (double)take;
    }
    if (!n) return sv->pass_ended = 0, false;
    for (size_t i = 0; i < n; i++) sessions[i + 1] = all[i]->slot->s;
    medrun_error e = {0};
    double start = seconds();
    int code;
    do code = medrun_step(sessions, n + 1, &e);         /* again where a job has come that waits  */
    while (code == MEDRUN_INTERRUPTED && !all_cancelled(all, n));
    double before = sv->pass_ended > 0 ? sv->pass_ended : start, now = seconds();
    sv->pass_ended = now;
    if (code == MEDRUN_INTERRUPTED) return true;
    if (!code) learn_pass(&sv->pace, written, room, work, now - before);
    size_t made = 0;
    for (size_t i = 0; i < n; i++) {
        size_t had = all[i]->n_new;
        if (code) all[i]->job->broken = true, finish_seq(all[i], "error");
        else use_logits(sv, all[i], fed[i]);
        made += all[i]->n_new - had;
    }
    pthread_mutex_lock(&sv->lock);
    metrics *m = &sv->metrics;
    m->passes++, m->busy += n, m->new_tokens += made;
    m->fed_tokens += written, m->prompt_tokens += rows - written;
    m->last_pass = now;
    *(writers ? &m->new_seconds : &m->prompt_seconds) += now - start;
    pthread_mutex_unlock(&sv->lock);
    return true;
}

/* ---- the engine's thread --------------------------------------------------------------------- */

/* The whole answer is there, or nobody wants it any more. The job has left the engine's list. */
static void finish_job(server *sv, job *g) {
    buffer b = {0};
    bool failed = g->broken || atomic_load(&g->cancelled);
    api_error x = {.status = shape_failed(g) || g->banned ? 400 : 500};
    if (g->ended <= 0) g->ended = seconds();
    g->finish = g->seqs[0].finish;
    for (size_t i = 0; i < g->n_seqs; i++) {
        const seq *q = &g->seqs[i];
        failed |= q->text.failed || q->rows.failed || q->ranks.failed || q->made.failed ||
                  q->chunks.failed || q->steps.failed || q->calls.failed || q->call_text.failed ||
                  q->thoughts.failed;
    }
    if (g->p.stream && !failed) flush_chunks(sv, g);
    if (!failed) write_end(sv, g, &b);
    if ((failed |= b.failed)) {
        wrong(&x, NULL, "%s", shape_failed(g)
              ? "the answer's shape takes more work than a request may ask for"
              : g->banned ? "logit_bias or ignore_eos forbids every token that may come next"
              : "the answer could not be finished");
        buffer_free(&b);
        g->broken = g->p.stream;
        buffer_text(&b, g->p.stream ? "data: " : "");
        write_error(&b, &x);
        buffer_text(&b, g->p.stream ? "\n\n" : "");
    }
    for (size_t i = 0; i < g->n_seqs; i++) if (g->seqs[i].state != ENDED) end_seq(&g->seqs[i]);
    note_time(sv, TO_END, g->ended - g->arrived);
    pthread_mutex_lock(&sv->lock);
    g->status = failed ? x.status : 200;
    buffer_add(&g->out, b.data, b.n);
    g->done = true;
    bool orphan = g->orphan;
    if (g->waiting) {
        sv->n_waiting--;
        if (g->key) sv->key_waits[g->key - sv->keys]--;
    } else {
        sv->n_running--;
        if (g->key) sv->key_runs[g->key - sv->keys]--;
    }
    sv->metrics.cached_tokens += g->n_cached;
    pthread_mutex_unlock(&sv->lock);
    buffer_free(&b);
    if (orphan) end_job(sv, g);
}

/* Streams go on their way; jobs that are over leave the list. */
static void end_jobs(server *sv) {
    for (job **at = &sv->jobs, *g; (g = *at);) {
        bool over = true, cancelled = atomic_load(&g->cancelled);
        for (size_t i = 0; i < g->n_seqs; i++) over &= g->seqs[i].state == ENDED;
        if (g->p.stream && !cancelled) flush_chunks(sv, g);
        if (!over && !cancelled && !g->broken) { at = &g->next; continue; }
        *at = g->next;
        finish_job(sv, g);
    }
}

/* What /slots shows. */
static void publish(server *sv) {
    pthread_mutex_lock(&sv->lock);
    sv->kv_tokens = 0;
    for (size_t i = 0; i < sv->n_slots; i++) {
        const seq *q = sv->slots[i].owner;
        size_t n = medrun_length(sv->slots[i].s);
        sv->view[i] = (slot_view){.busy = q};
        sv->kv_tokens += n;
        if (n > sv->metrics.most_tokens) sv->metrics.most_tokens = n;
        if (!q) continue;
        sv->view[i].n_prompt = q->n_ids, sv->view[i].n_cached = q->cached;
        sv->view[i].n_new = q->n_new;
        if (q->job->key) memcpy(sv->view[i].key, q->job->key->name, sizeof sv->view[i].key);
    }
    for (job *g = sv->jobs; g; g = g->next) g->held = g->stalled;
    pthread_mutex_unlock(&sv->lock);
    wake_io(sv);
}

/* Takes what was queued; waits while there is nothing to do. False: the server ends. */
static bool take_jobs(server *sv, bool idle) {
    job **end = &sv->jobs;
    while (*end) end = &(*end)->next;
    pthread_mutex_lock(&sv->lock);
    if (idle && !sv->queue && !sv->poked && !sv->quit) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        t.tv_sec++;
        pthread_cond_timedwait(&sv->work, &sv->lock, &t);
    }
    *end = sv->queue;
    for (const job *g = sv->queue; g; g = g->next)
        if (g->key) sv->key_waits[g->key - sv->keys]++;
    sv->queue = NULL;
    sv->queue_end = &sv->queue;
    sv->poked = false;
    bool more = !sv->quit;
    pthread_mutex_unlock(&sv->lock);
    return more;
}

static int start_engine(server *sv);

static void *engine_main(void *context) {
    server *sv = context;
    bool idle = true;
    bool good = !start_engine(sv);
    atomic_store(&sv->state, good ? READY : FAILED);
    wake_io(sv);
    if (!good) return NULL;
    while (take_jobs(sv, idle)) {
        end_jobs(sv);                           /* of those, who was cancelled goes first        */
        size_t running = sv->n_running;         /* only this thread changes it                  */
        admit(sv);
        if (sv->n_running > running) publish(sv);       /* the first pass of a prompt may be long */
        idle = !run_pass(sv);
        end_jobs(sv);
        double old = seconds() - sv->cache_seconds;
        for (slot *s; idle && (s = oldest_idle(sv, NULL, true)) && s->used < old;) evict(sv, s);
        publish(sv);
    }
    return NULL;
}

/* ============================================================================================
 * 4 Options and main
 * ============================================================================================ */

#include "serve_sandbox.c"

typedef struct serve_options {
    const char *host, *port, *parallel, *context, *threads, *batch, *kv, *template_name, *alias,
        *key_file, *hosts, *origins, *cache_mem, *cache_minutes, *prefix, *latency, *queue,
        *per_key, *max_body, *drain, *try;
    bool strict, parse_special, lenient, no_ui, no_sandbox, verbose, quiet, help, version;
} serve_options;

#define O(field) offsetof(serve_options, field)
static const tool_option serve_table[] = {
    {"--host", NULL, "ADDRESS", O(host), "127.0.0.1, another address, or X.sock"},
    {"--port", NULL, "N", O(port), "8080"},
    {"--parallel", "-np", "N", O(parallel), "answers at a time, 1 to 64 (8)"},
    {"--ctx-size", "-c", "N", O(context), "tokens of each; 0: the model's"},
    {"--threads", "-t", "N", O(threads), "as many as this machine lends"},
    {"--batch", "-b", "N", O(batch), "rows of a pass (512)"},
    {"--kv", NULL, "f16|int8", O(kv), "numbers of the cache (f16)"},
    {"--strict", NULL, NULL, O(strict), "bf16 weights: the same bits anywhere"},
    {"--template", NULL, "NAME", O(template_name), "of chats, in place of the checkpoint's"},
    {"--alias", NULL, "NAME", O(alias), "the model's name for clients"},
    {"--api-key-file", NULL, "FILE", O(key_file), "lines NAME KEY; or MEDRUN_API_KEY"},
    {"--allow-host", NULL, "NAME,..", O(hosts), "more names of this server"},
    {"--cors-origin", NULL, "URL,..", O(origins), "pages that may ask here"},
    {"--cache-mem", NULL, "MB", O(cache_mem), "for caches (half of what is free)"},
    {"--cache-minutes", NULL, "N", O(cache_minutes), "idle caches are wiped then (60)"},
    {"--prefix", NULL, "FILE,..", O(prefix), "of medrun run --save-prefix, kept"},
    {"--latency", NULL, "MS", O(latency), "of a pass with prompts (2.3 x usual)"},
    {"--queue", NULL, "N", O(queue), "requests that may wait (64)"},
    {"--per-key", NULL, "N", O(per_key), "of one key (8)"},
    {"--max-body", NULL, "MB", O(max_body), "of a request (4)"},
    {"--drain", NULL, "SECONDS", O(drain), "for what runs, after SIGTERM (30)"},
    {"--parse-special", NULL, NULL, O(parse_special), "control tokens in completions' texts"},
    {"--lenient", NULL, NULL, O(lenient), "ignore samplers that are not here"},
    {"--no-ui", NULL, NULL, O(no_ui), "no page at /"},
    {"--no-sandbox", NULL, NULL, O(no_sandbox), "keep all rights"},
    {"--try", NULL, "WHAT", O(try), "open|write|connect|exec, once closed"},
    {"--verbose", "-v", NULL, O(verbose), "log /health, too"},
    {"--quiet", "-q", NULL, O(quiet), "log nothing but errors"},
    {"--help", "-h", NULL, O(help), "this text"},
    {"--version", "-V", NULL, O(version), "the version"},
};
#undef O

static server the_server;
static volatile sig_atomic_t asked_to_end;

static void on_end(int number) {
    (void)number;
    asked_to_end++;
    if (asked_to_end > 1) _exit(MEDRUN_OK);
    wake_io(&the_server);
}

/* Cuts TEXT at its commas; the parts stay where they are. */
static size_t cut_list(const char *text, const char **list, const char *name, medrun_error *e) {
    size_t n = 0;
    if (!text) return 0;
    char *copy = new_array(strlen(text) + 1, 1);
    if (!copy) return out_of_memory(e, strlen(text)), 0;
    memcpy(copy, text, strlen(text));
    for (char *part = strtok(copy, ","); part; part = strtok(NULL, ",")) {
        if (n == MAX_LISTED)
            return fail(e, MEDRUN_USAGE, "%s: wanted at most %d", name, MAX_LISTED), 0;
        list[n++] = part;
    }
    return n;
}

/* One line of a key file, or the environment's key: NAME KEY, or only KEY. */
static int add_key(server *sv, char *line, medrun_error *e) {
    char *name = strtok(line, " \t\r\n"), *key = strtok(NULL, " \t\r\n");
    if (!name || *name == '#') return e->code;
    if (sv->n_keys == MAX_KEYS)
        return fail(e, MEDRUN_USAGE, "more than %d keys", MAX_KEYS);
    api_key *k = &sv->keys[sv->n_keys++];
    if (key) snprintf(k->name, sizeof k->name, "%s", name);
    else snprintf(k->name, sizeof k->name, "key%zu", sv->n_keys);
    if (!key) key = name;
    for (char *c = k->name; *c; c++) if (*c <= ' ' || *c == 127) *c = '?';
    sha256_of(key, strlen(key), k->digest);
    wipe(key, strlen(key));
    return e->code;
}

/* Keys come from a file that only its owner can read, or from the environment, which goes. */
static int read_keys(server *sv, const char *path, medrun_error *e) {
    char *own = getenv("MEDRUN_API_KEY"), line[1024];
    struct stat st;
    if (own && *own) {
        add_key(sv, own, e);
        unsetenv("MEDRUN_API_KEY");
    }
    if (!path) return e->code;
    FILE *f = open_stream(path, TO_READ);
    if (!f || fstat(fileno(f), &st))
        cannot(e, MEDRUN_BAD_FILE, path, "open");
    else if (st.st_mode & 077)
        fail(e, MEDRUN_USAGE, "%s: others can read the keys in it: chmod 600 %s", path, path);
    while (!e->code && fgets(line, sizeof line, f)) add_key(sv, line, e);
    wipe(line, sizeof line);
    if (f) fclose(f);
    if (!e->code && !sv->n_keys) fail(e, MEDRUN_BAD_FILE, "%s: found no key in it", path);
    return e->code;
}

/* The numbers and lists of the options. */
static int use_options(server *sv, medrun_error *e) {
    const serve_options *o = sv->o;
    int parallel = 8, queue = 64, per_key = 8;
    double minutes = 60, latency = 0, body = 4, drain = 30;
    sv->port = 8080, sv->batch = PASS_ROWS;
    option_int("--port", o->port, 1, 65535, &sv->port, e);
    option_int("--parallel", o->parallel, 1, MAX_SLOTS, &parallel, e);
    option_int("--ctx-size", o->context, 0, 1 << 24, &sv->context, e);
    option_int("--threads", o->threads, 1, MAX_THREADS, &sv->threads, e);
    option_int("--batch", o->batch, LOGIT_ROWS, PASS_ROWS, &sv->batch, e);
    option_int("--queue", o->queue, 1, 1 << 16, &queue, e);
    option_int("--per-key", o->per_key, 1, 1 << 16, &per_key, e);
    option_number("--cache-mem", o->cache_mem, 1, 1e9, &sv->cache_mb, e);
    option_number("--cache-minutes", o->cache_minutes, 0, 1e6, &minutes, e);
    option_number("--latency", o->latency, 1, 1e6, &latency, e);
    option_number("--max-body", o->max_body, 0.001, 64, &body, e);
    option_number("--drain", o->drain, 0, 1e6, &drain, e);
    if (o->kv && strcmp(o->kv, "f16") && strcmp(o->kv, "int8"))
        fail(e, MEDRUN_USAGE, "--kv: found %s, wanted f16 or int8", o->kv);
    sv->kv = o->kv && !strcmp(o->kv, "int8") ? MEDRUN_KV_INT8 : MEDRUN_KV_F16;
    sv->n_slots = (size_t)parallel, sv->max_queue = (size_t)queue, sv->per_key = (size_t)per_key;
    sv->cache_seconds = 60 * minutes, sv->latency = latency / 1e3, sv->drain = drain;
    sv->max_body = (size_t)(body * 1048576);
    sv->strict = o->strict, sv->parse_special = o->parse_special, sv->lenient = o->lenient;
    sv->ui = !o->no_ui, sv->quiet = o->quiet, sv->verbose = o->verbose;
    sv->n_hosts = cut_list(o->hosts, sv->hosts, "--allow-host", e);
    sv->n_origins = cut_list(o->origins, sv->origins, "--cors-origin", e);
    sv->n_prefixes = cut_list(o->prefix, sv->prefixes, "--prefix", e);
    return e->code;
}

/* The sessions: one that leads, the slots, and the prefixes that stay. */
static int start_sessions(server *sv, medrun_error *e) {
    const model_config *c = &sv->m->config;
    medrun_session_options o = {.context = (int)sv->n_ctx, .batch = sv->batch, .kv = sv->kv,
                                .strict = sv->strict};
    sv->bytes_per_token = 2 * (size_t)c->n_layers * (size_t)c->n_kv_heads *
                          cache_panel(sv->kv, (size_t)c->head_dim) / 16;
    double bytes = sv->cache_mb > 0 ? sv->cache_mb * 1048576 : sv->available / 2;
    sv->reserve = (size_t)(bytes / (double)sv->bytes_per_token);
    double dim = c->head_dim, hidden = c->hidden_size;  /* products of a key, and of a row       */
    sv->pace.per_key = 4 * c->n_heads * dim /           /* twice: those of keys take longer      */
                       (hidden * (2 * dim * (c->n_heads + c->n_kv_heads) + 3.0 * c->ffn_size));
    if (medrun_start(&sv->lead, sv->m, &o, NULL, 0, e)) return e->code;
    for (size_t i = 0; i < sv->n_slots && !e->code; i++)
        open_slot(sv, &sv->slots[i], e);
    for (size_t i = 0; i < sv->n_prefixes && !e->code; i++) {
        slot *s = &sv->slots[sv->n_slots + sv->n_pinned++];
        s->pinned = true;
        if (open_slot(sv, s, e) || medrun_restore(s->s, sv->prefixes[i], e)) break;
        while (!e->code && medrun_pending(s->s)) {
            medrun_session *both[2] = {sv->lead, s->s};
            s->s->n_wanted = 0;
            medrun_step(both, 2, e);
        }
    }
    sv->plain_logits = new_array((size_t)sv->info.vocab_size, sizeof(float));
    sv->counts = new_array((size_t)sv->info.vocab_size, sizeof(int));
    if (!e->code && (!sv->plain_logits || !sv->counts))
        out_of_memory(e, (size_t)sv->info.vocab_size);
    return e->code;
}

/* The checkpoint, its names, and what clients are told of it. */
static int load(server *sv, medrun_error *e) {
    const serve_options *o = sv->o;
    int context = sv->context;
    if (medrun_open(&sv->m, sv->path, &(medrun_options){.threads = sv->threads}, e)) return e->code;
    medrun_describe(sv->m, &sv->info);
    sv->t = &sv->m->tokenizer;
    sv->chat = o->template_name ? chat_find(o->template_name) : sv->m->chat;
    if (o->template_name && !sv->chat)
        return fail(e, MEDRUN_USAGE, "--template: found %s, wanted %s", o->template_name,
                    MEDRUN_TEMPLATES);
    if (o->template_name) {
        add_stops(sv->m, sv->chat);
        medrun_describe(sv->m, &sv->info);
    }
    if (context > sv->info.max_positions)
        return fail(e, MEDRUN_USAGE, "--ctx-size: found %d, wanted at most %d", context,
                    sv->info.max_positions);
    sv->n_ctx = (size_t)(context ? context : sv->info.max_positions);
    snprintf(sv->name, sizeof sv->name, "%s", o->alias ? o->alias : sv->info.name);
    make_safe(sv->name);
    hex_of(sv->info.hash, sv->hash);
    snprintf(sv->fingerprint, sizeof sv->fingerprint, "b%s-%.8s-%s-%s-%s%s", MEDRUN_VERSION,
             sv->hash, sv->info.type, kv_names[sv->kv], sv->info.kernels,
             sv->strict ? "-strict" : "");
    sv->started = (long long)time(NULL);
    return e->code;
}

static const char *host_of(const server *sv) { return sv->o->host ? sv->o->host : "127.0.0.1"; }

static void print_banner(const server *sv) {
    const char *host = host_of(sv);
    bool unix_socket = strstr(host, ".sock") != NULL;
    if (sv->quiet) return;
    fprintf(stderr, "medrun-serve %s: %s%s%s", MEDRUN_VERSION, unix_socket ? "" : "http://",
            strchr(host, ':') ? "[" : "", host);
    if (!unix_socket) fprintf(stderr, "%s:%d", strchr(host, ':') ? "]" : "", sv->port);
    fprintf(stderr, "\n  model    %s (%s, %s), template %s\n  who      %s\n", sv->name,
            sv->info.type, sv->info.kernels, sv->chat ? sv->chat->name : MEDRUN_UNKNOWN,
            sv->n_keys ? "those who have a key" : "everybody on this machine, without a key");
    fprintf(stderr, "  sessions %zu of %zu tokens, %.0f MB of caches in all, %d threads\n",
            sv->n_slots, sv->n_ctx,
            (double)sv->reserve * (double)sv->bytes_per_token / 1048576, sv->info.threads);
    fprintf(stderr, "  sandbox  %s\n",
            sv->o->no_sandbox ? "none (--no-sandbox)" : chars_of(&sv->says));
    if (sv->chat && sv->chat->marks[0])
        fprintf(stderr, "  warning  template %s begins a turn with plain words (\"%s\"): a text "
                "that holds them passes for one\n", sv->chat->name, sv->chat->marks[0]);
    if (sv->info.notice[0]) fprintf(stderr, "  %s\n", sv->info.notice);
}

/* What the engine's thread does first, while the other one answers that the model is loading. */
static int start_engine(server *sv) {
    medrun_error *e = &sv->failure;
    if (load(sv, e) || start_sessions(sv, e)) return e->code;
    if (!sv->o->no_sandbox) close_calls(false, &sv->says);
    print_banner(sv);
    if (sv->o->try) exit(try_sandbox(sv->o->try));
    return MEDRUN_OK;
}

/* Until it is told to end, and then until all is answered or the time for that is over. */
static void serve(server *sv) {
    double until = 0;
    while (atomic_load(&sv->state) != FAILED) {
        poll_once(sv);
        if (asked_to_end && !sv->draining) {
            sv->draining = true;
            close(sv->listener);
            sv->listener = -1;
            until = seconds() + sv->drain;
        }
        if (!sv->draining) continue;
        bool busy = false;
        for (const connection *c = sv->connections; c < sv->connections + MAX_CONNECTIONS; c++)
            busy |= c->fd >= 0 && (c->job || c->out.n || c->state == READ_BODY);
        if (!busy || seconds() > until) return;
    }
}

static int start_server(server *sv, medrun_error *e) {
    const char *files[MAX_LISTED + 1] = {sv->path}, *host = host_of(sv);
    const char *limit;
    bool socket_file = strlen(host) > 5 && !strcmp(host + strlen(host) - 5, ".sock"), local;
    pthread_t thread;
    if (use_options(sv, e) || read_keys(sv, sv->o->key_file, e)) return e->code;
    for (size_t i = 0; i < sv->n_prefixes; i++) files[i + 1] = sv->prefixes[i];
    tzset();
    make_page_headers(&sv->page_headers);
    if (!sv->threads) sv->threads = default_threads(&limit);
    sv->available = limits_of_machine().available;      /* while its files can be read           */
    sv->connections = new_array(MAX_CONNECTIONS, sizeof *sv->connections);
    if (!sv->connections) return out_of_memory(e, MAX_CONNECTIONS * sizeof *sv->connections);
    for (size_t i = 0; i < MAX_CONNECTIONS; i++) sv->connections[i].fd = -1;
    forbid_dumps();
    if ((sv->listener = listen_on(host, sv->port, &local, e)) < 0) return e->code;
    if (!local && !sv->n_keys)
        return fail(e, MEDRUN_USAGE, "%s can be reached from other machines: give keys with "
                    "--api-key-file FILE or MEDRUN_API_KEY", host);
    if (!sv->o->no_sandbox && access(sv->path, R_OK) == 0) {
        close_files(files, sv->n_prefixes + 1, socket_file ? 0 : sv->port, &sv->says);
        close_calls(true, &sv->says);
    }
    pthread_mutex_init(&sv->lock, NULL);
    pthread_cond_init(&sv->work, NULL);
    sv->queue_end = &sv->queue;
    fcntl(sv->listener, F_SETFL, O_NONBLOCK);
    if (pipe(sv->wake)) return cannot(e, MEDRUN_FAILED, "medrun-serve", "make a pipe");
    for (int i = 0; i < 2; i++) fcntl(sv->wake[i], F_SETFL, O_NONBLOCK);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGTERM, on_end);
    signal(SIGINT, on_end);
    if (pthread_create(&thread, NULL, engine_main, sv))
        return fail(e, MEDRUN_NO_MEMORY, "cannot start the engine's thread");
    serve(sv);
    if (atomic_load(&sv->state) == FAILED) *e = sv->failure;
    return e->code;
}

static void print_help(const tool_line *l) {
    printf("medrun-serve MODEL.mdr [OPTIONS]\n\n");
    print_wrapped("Answers over HTTP, as OpenAI's API has it: /v1/chat/completions and "
                  "/v1/completions, and a page at /. An answer depends on the request and the "
                  "checkpoint, never on who else is served. Nothing that people write is logged or "
                  "kept on disk.\n\n");
    print_options(l);
    printf("\nEach option but --help, --version is also a variable: MEDRUN_PORT=8080.\n");
}

int main(int argc, char **argv) {
    serve_options o = {0};
    const char *words[1] = {NULL};
    medrun_error e = {0};
    tool_line line = {serve_table, sizeof serve_table / sizeof *serve_table, &o, words, 0, 1};
    argv = start_program(&argc, argv);
    expect_lost_files("medrun-serve");
    parse_options(&line, argc, argv, &e);
    if (!e.code && (o.help || o.version)) {
        if (o.version) printf("medrun-serve %s\n", MEDRUN_VERSION);
        else print_help(&line);
        finish_stdout(&e);
    } else if (!e.code && !line.n_words) fail(&e, MEDRUN_USAGE, "wanted MODEL.mdr; see --help");
    else if (!e.code) {
        the_server.o = &o, the_server.path = words[0];
        start_server(&the_server, &e);
    }
    if (e.code) fprintf(stderr, "medrun-serve: %s\n", e.text);
    exit(e.code);
}
