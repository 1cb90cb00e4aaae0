/* serve_api.c: what medrun-serve understands and says: the fields of requests, the shapes of
 * answers, and every endpoint. Included by serve.c. MIT licence, see LICENSE. */

/* ---- refusals ------------------------------------------------------------------------------- */

typedef struct {
    medrun_error e;
    int status;
    const char *type, *code;
    char param[80];
    size_t n_prompt, n_ctx;
} api_error;

/* The first refusal counts. */
MEDRUN_PRINTF_LIKE(3, 4)
static int wrong(api_error *x, const char *param, const char *format, ...) {
    if (x->e.code) return x->e.code;
    va_list args;
    va_start(args, format);
    vsnprintf(x->e.text, sizeof x->e.text, format, args);
    va_end(args);
    make_safe(x->e.text);
    snprintf(x->param, sizeof x->param, "%s", param ? param : "");
    make_safe(x->param);
    x->status = x->status ? x->status : 400;
    return x->e.code = MEDRUN_USAGE;
}

/* A number with the fewest digits, 15 to 17, that read back as the same; one function prints every
 * log-probability, so that equal ones are equal texts. */
static void write_number(buffer *b, double v) {
    char text[40];
    int digits = 15;
    if (!(fabs(v) <= DBL_MAX)) v = v > 0 ? 9999 : -9999;
    do snprintf(text, sizeof text, "%.*g", digits, v);
    while (strtod(text, NULL) != v && ++digits <= 17);
    buffer_text(b, text);
}

/* Appends FORM, with " for each ', and for each % and letter one of the values behind it: i int,
 * z size_t, l long long, n double, w a double that is whole, m one with three decimals, b bool;
 * as they are: s text, S span, j buffer; in marks: q text, NULL as null, and Q span. */
static void say_all(buffer *b, const char *form, va_list a) {
    for (const char *p = form; *p; p++) {
        size_t n = strcspn(p, "'%");
        span s = {p, n};
        buffer_add(b, p, n);
        if (!*(p += n)) break;
        switch (*p == '%' ? *++p : *p) {
            case '\'': buffer_text(b, "\""); break;
            case 'i': buffer_printf(b, "%d", va_arg(a, int)); break;
            case 'z': buffer_printf(b, "%zu", va_arg(a, size_t)); break;
            case 'l': buffer_printf(b, "%lld", va_arg(a, long long)); break;
            case 'n': write_number(b, va_arg(a, double)); break;
            case 'w': buffer_printf(b, "%.0f", va_arg(a, double)); break;
            case 'm': buffer_printf(b, "%.3f", va_arg(a, double)); break;
            case 'b': buffer_text(b, va_arg(a, int) ? "true" : "false"); break;
            case 's': buffer_text(b, va_arg(a, const char *)); break;
            case 'S': s = va_arg(a, span), buffer_add(b, s.text, s.n); break;
            case 'Q': s = va_arg(a, span), json_quote(b, s.text, s.n); break;
            case 'j': {
                const buffer *from = va_arg(a, const buffer *);
                buffer_add(b, from->data, from->n);
                b->failed |= from->failed;
                break;
            }
            default: {
                const char *text = va_arg(a, const char *);
                if (text) json_quote(b, text, strlen(text));
                else buffer_text(b, "null");
            }
        }
    }
}

static void say(buffer *b, const char *form, ...) {
    va_list a;
    va_start(a, form);
    say_all(b, form, a);
    va_end(a);
}

/* What a buffer of text has from FROM to TO. */
static span part_of(const buffer *b, size_t from, size_t to) {
    return (span){b->n ? (const char *)b->data + from : "", to - from};
}

static span span_of(const json *j, uint32_t v) {
    return (span){j->text + j->nodes[v].start, j->nodes[v].end - j->nodes[v].start};
}

static span all_of(const buffer *b) { return part_of(b, 0, b->n); }

static void write_error(buffer *b, const api_error *x) {
    say(b, "{'error':{'message':%q,'type':'%s','param':%q,'code':%q", x->e.text,
        x->type ? x->type : status_row_of(x->status).type, x->param[0] ? x->param : NULL, x->code);
    if (x->n_ctx) say(b, ",'n_prompt_tokens':%z,'n_ctx':%z", x->n_prompt, x->n_ctx);
    buffer_text(b, "}}");
}

/* One line on stderr for each request: never what was asked or answered. */
static void log_line(const server *sv, const char *id, const char *key, const char *path,
                     int status, const job *j) {
    char line[400], when[32];
    struct tm t;
    time_t now = time(NULL);
    if (sv->quiet) return;
    gmtime_r(&now, &t);
    strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", &t);
    int n = snprintf(line, sizeof line, "%s %s key=%s %s %d", when, id, key, path, status);
    if (j && n > 0 && n < 300)
        n += snprintf(line + n, sizeof line - (size_t)n, " tokens=%zu,%zu,%zu ms=%.0f,%.0f,%.0f %s",
                      j->n_read, j->n_cached, j->n_written, 1e3 * (j->started - j->arrived),
                      1e3 * (j->read - j->started), 1e3 * (j->ended - j->read),
                      j->finish ? j->finish : "cancelled");
    snprintf(line + n, sizeof line - (size_t)n, "\n");
    make_safe(line);
    line[strlen(line) - 1] = '\n';
    if (write(STDERR_FILENO, line, strlen(line)) < 0) return;
}

static const char *path_of(const connection *c, char text[48]) {
    snprintf(text, 48, "%.*s", (int)(c->request.path.n < 40 ? c->request.path.n : 40),
             c->request.path.n ? c->request.path.text : "-");
    return text;
}

/* MORE: headers of the answer, or "". */
static void answer_wrong(server *sv, connection *c, api_error *x, const char *more) {
    buffer b = {0};
    char path[48];
    if (!x->status) x->status = 400;
    if (x->e.code == MEDRUN_NO_MEMORY) x->status = 503;
    write_error(&b, x);
    answer(sv, c, x->status, JSON_TYPE, more, &b);
    log_line(sv, "-", "-", path_of(c, path), x->status, NULL);
    buffer_free(&b);
}

static void answer_error(server *sv, connection *c, int status, const char *why) {
    api_error x = {.status = status};
    wrong(&x, NULL, "%s", why);
    answer_wrong(sv, c, &x, "");
}

static void random_text(char *out, size_t n) {
    static const char letters[] = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    uint8_t bytes[32] = {0};
    random_bytes(bytes, n);
    for (size_t i = 0; i < n; i++) out[i] = letters[bytes[i] % 62];
    out[n] = 0;
}

/* ---- the fields of a request ---------------------------------------------------------------- */

/* ABSENT: it would need a sampler, or more, that is not here, unless its value changes nothing: a
 * number to MAX, or what Python takes for false. */
enum { REAL, WHOLE, FLAG, ABSENT };

typedef struct {
    const char *name;
    int kind;
    double min, max;
    size_t at;
} field_row;

#define AT(field) offsetof(params, field)
static const field_row fields[] = {
    {"temperature", REAL, 0, 100, AT(temperature)}, {"top_p", REAL, 0, 1, AT(top_p)},
    {"top_k", WHOLE, 0, 1e9, AT(top_k)}, {"min_p", REAL, 0, 1, AT(min_p)},
    {"repeat_penalty", REAL, 0.01, 100, AT(repeat)},
    {"repetition_penalty", REAL, 0.01, 100, AT(repeat)},
    {"presence_penalty", REAL, -2, 2, AT(presence)},
    {"frequency_penalty", REAL, -2, 2, AT(frequency)},
    {"seed", WHOLE, -9007199254740992.0, 9007199254740992.0, AT(seed)},
    {"max_tokens", WHOLE, -1, 1e9, AT(max_new)},
    {"max_completion_tokens", WHOLE, -1, 1e9, AT(max_new)},
    {"n_predict", WHOLE, -1, 1e9, AT(max_new)}, {"n", WHOLE, 1, MAX_SLOTS, AT(n)},
    {"top_logprobs", WHOLE, 0, MAX_TOP, AT(top_logprobs)}, {"n_probs", WHOLE, 0, MAX_TOP, AT(top)},
    {"echo", FLAG, .at = AT(echo)}, {"stream", FLAG, .at = AT(stream)},
    {"ignore_eos", FLAG, .at = AT(ignore_eos)}, {"parse_special", FLAG, .at = AT(parse_special)},
    {"timings_per_token", FLAG, .at = AT(timings)}, {"return_progress", FLAG, .at = AT(progress)},
    {"continue_final_message", FLAG, .at = AT(continues)},
    {"best_of", .kind = ABSENT, .max = 1}, {"typical_p", .kind = ABSENT, .max = 1},
    {"suffix", .kind = ABSENT}, {"mirostat", .kind = ABSENT}, {"dry_multiplier", .kind = ABSENT},
    {"xtc_probability", .kind = ABSENT}, {"n_discard", .kind = ABSENT}, {"n_keep", .kind = ABSENT},
    {"lora", .kind = ABSENT}, {"audio", .kind = ABSENT}, {"functions", .kind = ABSENT},
    {"function_call", .kind = ABSENT}, {"images", .kind = ABSENT}, {"image_data", .kind = ABSENT},
};
#undef AT

/* Those that are read elsewhere; those without effect here. */
static const char *const other_fields[] = {
    "model", "messages", "prompt", "stop", "stop_token_ids", "logit_bias", "logprobs",
    "stream_options", "tools", "tool_choice", "parallel_tool_calls", "cache_salt",
    "reasoning_effort", "chat_template_kwargs", "response_format", "grammar", "json_schema",
    "guided_choice", "guided_regex", "guided_json", "guided_grammar", "add_generation_prompt",
    "additional",
    "user", "metadata", "store", "service_tier", "prompt_cache_key", "keep_alive", "options",
    "cache_prompt", "id_slot", "safety_identifier", "add_special_tokens", "modalities", NULL};

/* A field that is there and not null, or JSON_NONE. */
static uint32_t field_of(const json *j, uint32_t v, const char *name) {
    uint32_t f = json_get(j, v, name);
    return f == JSON_NONE || json_typeof(j, f) == JSON_NULL ? JSON_NONE : f;
}

static bool read_real(const json *j, uint32_t v, double min, double max, bool whole, double *out) {
    if (!json_is_type(j, v, JSON_NUMBER)) return false;
    double d = json_number(j, v);
    if (!(d >= min && d <= max) || (whole && d != floor(d))) return false;
    return *out = d, true;
}

/* *OUT stays where there is no field V. */
static int read_bool(const json *j, uint32_t v, const char *name, bool *out, api_error *x) {
    if (v == JSON_NONE) return x->e.code;
    if (json_typeof(j, v) != JSON_TRUE && json_typeof(j, v) != JSON_FALSE)
        return wrong(x, name, "%s: wanted true or false", name);
    *out = json_typeof(j, v) == JSON_TRUE;
    return x->e.code;
}

/* Appends the ids of list V. */
static int read_ids(const server *sv, const json *j, uint32_t v, const char *name, buffer *out,
                    api_error *x) {
    double d;
    if (!json_is_type(j, v, JSON_ARRAY)) return wrong(x, name, "%s: wanted a list of ids", name);
    for EACH(j, v, c) {
        if (!read_real(j, c, 0, sv->info.vocab_size - 1, true, &d))
            return wrong(x, name, "%s: wanted ids from 0 to %d", name, sv->info.vocab_size - 1);
        int32_t id = (int32_t)d;
        buffer_add(out, &id, sizeof id);
    }
    return x->e.code;
}

/* All fields that the table reads by itself; the names of unknown ones go to IGNORED. */
static int read_fields_of(const server *sv, const json *j, params *p, buffer *ignored,
                          api_error *x) {
    static const field_row unknown = {NULL, ABSENT, 0, 0, 0}, *end = fields + sizeof fields /
                                                                     sizeof *fields;
    for EACH_KEY(j, 0, c) {
        const field_row *f = fields;
        while (f < end && !json_is(j, c, f->name)) f++;
        if (f == end) f = &unknown;
        uint32_t v = c + 1;
        bool number = json_is_type(j, v, JSON_NUMBER), changes = !f->name || json_truthy(j, v);
        if (json_typeof(j, v) == JSON_NULL || one_of(other_fields, j, c) >= 0) continue;
        if (f->kind == FLAG) read_bool(j, v, f->name, (bool *)((char *)p + f->at), x);
        else if (f->kind < FLAG && !read_real(j, v, f->min, f->max, f->kind == WHOLE,
                                              (double *)(void *)((char *)p + f->at)))
            wrong(x, f->name, "%s: wanted a %snumber from %.16g to %.16g", f->name,
                  f->kind == WHOLE ? "whole " : "", f->min, f->max);
        if (f->kind != ABSENT || !changes || (number && json_number(j, v) <= f->max && f->max > 0))
            continue;
        if (f->name && !sv->lenient) wrong(x, f->name, "not supported: %s", f->name);
        span name = span_of(j, c);
        if (is_http_token(name) && ignored->n + name.n < 1000)
            say(ignored, ignored->n ? ", %S" : "%S", name);
    }
    return x->e.code;
}

/* ---- stops, bias, streams ------------------------------------------------------------------- */

static int add_stop(const server *sv, job *g, const json *j, uint32_t v, api_error *x) {
    buffer *b = &g->stops;
    size_t before = b->n;
    if (!json_is_type(j, v, JSON_STRING)) return wrong(x, "stop", "stop: wanted strings");
    json_unescape(j, v, b);
    size_t n = b->n - before;
    if (!n) return MEDRUN_OK;
    if (n > 256 || g->stop_ends.n / sizeof n >= 16)
        return wrong(x, "stop", "stop: wanted at most 16 strings of at most 256 bytes");
    int32_t id = tokenizer_find(sv->t, (const char *)b->data + before, n);
    if (id >= 0 && tokenizer_type(sv->t, id) == PIECE_CONTROL)
        buffer_add(&g->stop_ids, &id, sizeof id);
    buffer_add(&g->stop_ends, &b->n, sizeof b->n);
    return MEDRUN_OK;
}

static int read_stops_of(const server *sv, job *g, const json *j, api_error *x) {
    uint32_t v = field_of(j, 0, "stop"), ids = field_of(j, 0, "stop_token_ids");
    for EACH(j, v, c) add_stop(sv, g, j, c, x);
    if (v != JSON_NONE && json_typeof(j, v) != JSON_ARRAY) add_stop(sv, g, j, v, x);
    return ids == JSON_NONE ? x->e.code
                            : read_ids(sv, j, ids, "stop_token_ids", &g->stop_ids, x);
}

/* One entry: KEY is an id or a text of one token, V a number, or false for never. */
static int add_bias(const server *sv, job *g, const json *j, uint32_t key, uint32_t v,
                    api_error *x) {
    bias_row row = {-1, 0};
    double d = -1;
    if (json_is_type(j, key, JSON_STRING)) {
        buffer text = {0}, ids = {0};
        json_unescape(j, key, &text);
        buffer_add(&text, "", 1);
        if (text.failed || ids.failed) out_of_memory(&x->e, text.n);
        else if (!parse_number((char *)text.data, &d)) {
            d = -1;
            if (!tokenizer_encode(sv->t, (char *)text.data, text.n - 1, 0, &ids, &x->e) &&
                ids.n == sizeof row.id) memcpy(&row.id, ids.data, sizeof row.id), d = row.id;
        }
        buffer_free(&text);
        buffer_free(&ids);
    } else read_real(j, key, 0, sv->info.vocab_size - 1, true, &d);
    if (!(d >= 0 && d < sv->info.vocab_size) || d != floor(d))
        return wrong(x, "logit_bias", "logit_bias: wanted ids from 0 to %d, or texts of one token",
                     sv->info.vocab_size - 1);
    row.id = (int32_t)d;
    if (json_is_type(j, v, JSON_FALSE)) d = -100;
    else if (!read_real(j, v, -100, 100, false, &d))
        return wrong(x, "logit_bias", "logit_bias: wanted numbers from -100 to 100, or false");
    row.value = d == -100 ? -INFINITY : (float)d;
    buffer_add(&g->bias, &row, sizeof row);
    return MEDRUN_OK;
}

static int read_bias(const server *sv, job *g, const json *j, api_error *x) {
    uint32_t v = field_of(j, 0, "logit_bias");
    bool object = json_is_type(j, v, JSON_OBJECT);
    if (v == JSON_NONE) return x->e.code;
    if (!object && json_typeof(j, v) != JSON_ARRAY)
        return wrong(x, "logit_bias", "logit_bias: wanted {\"id\": number}");
    if (object) for EACH_KEY(j, v, c) add_bias(sv, g, j, c, c + 1, x);
    else for EACH(j, v, c) {
        if (json_typeof(j, c) != JSON_ARRAY || j->nodes[c].count != 2)
            return wrong(x, "logit_bias", "logit_bias: wanted [[id, number], ...]");
        add_bias(sv, g, j, c + 1, j->nodes[c + 1].next, x);
    }
    return x->e.code;
}

/* What is asked of log-probabilities differs between the two APIs: a bool and a number, or one
 * number. */
static int read_logprobs(job *g, const json *j, api_error *x) {
    uint32_t v = field_of(j, 0, "logprobs");
    params *p = &g->p;
    if (g->api == API_LLAMA) {
        if (p->top == 0) p->top = -1;
        return x->e.code;
    }
    if (g->api == API_COMPLETION) {
        if (json_is_type(j, v, JSON_FALSE)) return x->e.code;
        if (v != JSON_NONE && !read_real(j, v, 0, MAX_TOP, true, &p->top))
            return wrong(x, "logprobs", "logprobs: wanted a whole number from 0 to %d", MAX_TOP);
        return x->e.code;
    }
    bool on = false;
    if (read_bool(j, v, "logprobs", &on, x)) return x->e.code;
    if (p->top_logprobs > 0 && !on)
        return wrong(x, "top_logprobs", "top_logprobs: needs \"logprobs\": true");
    p->top = on ? p->top_logprobs : -1;
    return x->e.code;
}

static int read_stream_options(job *g, const json *j, api_error *x) {
    uint32_t v = field_of(j, 0, "stream_options"), usage = field_of(j, v, "include_usage");
    if (v == JSON_NONE) return x->e.code;
    if (json_typeof(j, v) != JSON_OBJECT || !g->p.stream)
        return wrong(x, "stream_options", "stream_options: wanted an object, beside "
                     "\"stream\": true");
    g->p.include_usage = json_is_type(j, usage, JSON_TRUE);
    return x->e.code;
}

/* ---- prompts -------------------------------------------------------------------------------- */

/* Of parts in a row, where the Nth ends, from 1 on. */
static size_t end_of(const buffer *ends, size_t n) {
    size_t end = 0;
    if (n) memcpy(&end, ends->data + (n - 1) * sizeof end, sizeof end);
    return end;
}

/* The job's last prompt ends here. */
static int end_prompt(const server *sv, job *g, api_error *x) {
    size_t at = g->ids.n / sizeof(int32_t), n = at - end_of(&g->ends, g->n_prompts);
    buffer_add(&g->ends, &at, sizeof at);
    g->n_prompts++;
    if (x->e.code) return x->e.code;
    if (g->ids.failed || g->ends.failed) return out_of_memory(&x->e, g->ids.n);
    if (!n) return wrong(x, "prompt", "prompt: found no token in it");
    if (n > sv->n_ctx || (n == sv->n_ctx && g->p.max_new != 0)) {
        x->type = "exceed_context_size_error", x->code = "context_length_exceeded";
        x->n_prompt = n, x->n_ctx = sv->n_ctx;
        /* the code stands in the words, too: LangChain looks for it there */
        return wrong(x, "prompt", "the prompt of %zu tokens exceeds the available context size of "
                     "%zu tokens, the answer's first token included (context_length_exceeded)", n,
                     sv->n_ctx);
    }
    return MEDRUN_OK;
}

/* BOS stands once, whoever puts it there. */
static int add_text_prompt(const server *sv, job *g, const json *j, uint32_t v, api_error *x) {
    buffer text = {0};
    size_t before = g->ids.n;
    int flags = (sv->t->add_bos ? MEDRUN_ADD_BOS : 0) |
                (g->p.parse_special || sv->parse_special ? MEDRUN_PARSE_SPECIAL : 0);
    json_unescape(j, v, &text);
    if (text.failed) out_of_memory(&x->e, text.n);
    else tokenizer_encode(sv->t, chars_of(&text), text.n, flags, &g->ids, &x->e);
    buffer_free(&text);
    int32_t two[2] = {0};
    if (!g->ids.failed && g->ids.n >= before + sizeof two && flags & MEDRUN_ADD_BOS) {
        memcpy(two, g->ids.data + before, sizeof two);
        if (two[0] == sv->t->bos && two[1] == two[0]) {
            memmove(g->ids.data + before, g->ids.data + before + 4, g->ids.n - before - 4);
            g->ids.n -= 4;
        }
    }
    return end_prompt(sv, g, x);
}

/* A text, texts, ids, or lists of ids. */
static int read_prompts(const server *sv, job *g, const json *j, api_error *x) {
    static const char wanted[] = "prompt: wanted a text, a list of texts or a list of ids";
    uint32_t v = field_of(j, 0, "prompt"), c = v + 1;
    if (v == JSON_NONE) return wrong(x, "prompt", "prompt: is missing");
    bool text = json_is_type(j, v, JSON_STRING), list = json_is_type(j, v, JSON_ARRAY);
    uint32_t n = list ? j->nodes[v].count : text;
    if (!n) return wrong(x, "prompt", wanted);
    if (text || json_is_type(j, c, JSON_NUMBER)) c = v, n = 1;
    if (n > MAX_PROMPTS)
        return wrong(x, "prompt", "prompt: found %u, wanted at most %d", n, MAX_PROMPTS);
    for (; n-- && !x->e.code; c = j->nodes[c].next) {
        if (json_is_type(j, c, JSON_STRING)) add_text_prompt(sv, g, j, c, x);
        else if (json_is_type(j, c, JSON_ARRAY))
            read_ids(sv, j, c, "prompt", &g->ids, x), end_prompt(sv, g, x);
        else wrong(x, "prompt", wanted);
    }
    return x->e.code;
}

/* ---- conversations -------------------------------------------------------------------------- */

/* The conversation and the functions of request J as ids, or as text. */
static int render_request(const server *sv, const json *j, params *p, bool as_text, bool *has_tools,
                          buffer *out, api_error *x) {
    uint32_t v = field_of(j, 0, "messages"), tools = field_of(j, 0, "tools"), last = v + 1;
    uint32_t add = field_of(j, 0, "add_generation_prompt"), before = JSON_NONE;
    buffer shown = {0}, going_on = {0};
    tool_list list = {0};
    medrun_chat_options o = {.think = p->think && sv->chat && sv->chat->takes_think};
    chat_writer w = {sv->chat, sv->t, &o, as_text, NULL, .out = out, .e = &x->e};
    if (!json_is_type(j, v, JSON_ARRAY) || !j->nodes[v].count)
        return wrong(x, "messages", "messages: wanted a list of at least one");
    if (!sv->chat) return wrong(x, "messages", "the model's chat template is unknown: start the "
                                "server with --template");
    uint32_t n = j->nodes[v].count;
    for (uint32_t i = 1; i < n; i++) before = last, last = j->nodes[last].next;
    bool continues = json_is(j, json_get(j, last, "role"), "assistant") &&
                     field_of(j, last, "tool_calls") == JSON_NONE;
    if (continues && before != JSON_NONE && json_is(j, json_get(j, before, "role"), "assistant"))
        wrong(x, "messages", "messages: two of the assistant's at the end");
    if (p->continues && !continues)
        wrong(x, "continue_final_message", "messages: the last one is not the assistant's");
    if (p->continues && json_is_type(j, add, JSON_TRUE))
        wrong(x, "continue_final_message", "continue_final_message stands beside "
              "add_generation_prompt");
    if (continues && n == 1) wrong(x, "messages", "messages: only the assistant's");
    bool none = json_is(j, field_of(j, 0, "tool_choice"), "none");
    if (json_is_type(j, tools, JSON_ARRAY) && j->nodes[tools].count > 128)
        wrong(x, "tools", "tools: found %u, wanted at most 128", j->nodes[tools].count);
    *has_tools = !none && json_truthy(j, tools);
    if (*has_tools && json_typeof(j, tools) != JSON_ARRAY)
        wrong(x, "tools", "tools: wanted a list of functions");
    const span functions = *has_tools ? span_of(j, tools) : (span){0};
    if (!x->e.code && *has_tools &&
        functions_text(sv->chat, functions.text, functions.n, true, &shown, &x->e))
        snprintf(x->param, sizeof x->param, "tools");
    if (x->e.code) goto done;
    o.tools = shown.n ? chars_of(&shown) : NULL, o.n_tools = shown.n;
    w.more = tools_kinds(sv->chat);
    if (!openai_messages(sv->chat, j, v, n - continues, shown.n > 0, &list, &x->e) &&
        !(continues && openai_content(j, field_of(j, last, "content"), &going_on, &x->e))) {
        bool open = add == JSON_NONE || json_typeof(j, add) == JSON_TRUE;
        chat_conversation(&w, list.m, list.n, open || continues);
        if (continues) buffer_add(as_text ? out : &w.run, going_on.data, going_on.n);
        chat_end(&w, 0);
    }
    if (x->e.code) snprintf(x->param, sizeof x->param, "messages");
    buffer_free(&w.run);
done:
    tool_list_free(&list);
    free_buffers(BUFFERS(&shown, &going_on));
    return x->e.code;
}

/* ---- answers -------------------------------------------------------------------------------- */

static const token_row *row_of(const seq *q, size_t i) {
    return (const token_row *)(void *)q->rows.data + i;
}
static size_t n_rows_of(const seq *q) { return q->rows.n / sizeof(token_row); }

/* The text of ID as it stands in lists: a control token by its name. */
static span piece_of(const server *sv, int32_t id) {
    span s;
    s.text = tokenizer_piece(sv->t, id, &s.n);
    return s;
}

static bool is_utf8(span s) {
    uint32_t code;
    for (size_t i = 0, len; i < s.n; i += len)
        if (!(len = utf8_decode((const uint8_t *)s.text + i, s.n - i, &code))) return false;
    return true;
}

/* A key of the completions' API: text, or bytes:\xe2\x80 where the piece is no text of its own. */
static void write_piece_key(buffer *b, span s) {
    if (is_utf8(s)) { json_quote(b, s.text, s.n); return; }
    buffer_text(b, "\"bytes:");
    for (size_t i = 0; i < s.n; i++) buffer_printf(b, "\\\\x%02x", (unsigned)(uint8_t)s.text[i]);
    buffer_text(b, "\"");
}

static void write_bytes(buffer *b, span s) {
    for (size_t i = 0; i < s.n; i++)
        buffer_printf(b, "%s%u", i ? "," : "[", (unsigned)(uint8_t)s.text[i]);
    buffer_text(b, s.n ? "]" : "[]");
}

static void write_chat_token(const server *sv, buffer *b, int32_t id, double logprob) {
    span s = piece_of(sv, id);
    say(b, "{'id':%i,'token':%Q,'bytes':", id, s);
    write_bytes(b, s);
    say(b, ",'logprob':%n", logprob);
}

/* Rows FROM to TO of the chat's API: [{token, bytes, logprob, top_logprobs}]. */
static void write_chat_rows(const server *sv, buffer *b, const seq *q, size_t from, size_t to) {
    buffer_text(b, "[");
    for (size_t i = from; i < to; i++) {
        const token_row *r = row_of(q, i);
        const ranked *best = (const ranked *)(void *)q->ranks.data + i * MAX_TOP;
        buffer_text(b, i > from ? "," : "");
        write_chat_token(sv, b, r->id, r->logprob);
        buffer_text(b, ",\"top_logprobs\":[");
        for (int k = 0; k < r->n_ranks; k++) {
            buffer_text(b, k ? "," : "");
            write_chat_token(sv, b, best[k].id, best[k].logprob);
            buffer_text(b, "}");
        }
        buffer_text(b, "]}");
    }
    buffer_text(b, "]");
}

/* One dictionary of the best, the token itself always among them. Where two pieces read the same,
 * the later one is told apart by its id. */
static void write_top(const server *sv, buffer *b, const token_row *r, const ranked *best) {
    bool own = false;
    buffer_text(b, "{");
    for (int k = 0; k <= r->n_ranks; k++) {
        bool last = k == r->n_ranks, twice = false;
        if (last && own) break;
        int32_t id = last ? r->id : best[k].id;
        span s = piece_of(sv, id);
        for (int i = 0; i < k; i++) {
            span t = piece_of(sv, best[i].id);
            twice |= t.n == s.n && !memcmp(t.text, s.text, s.n);
        }
        own |= id == r->id;
        buffer_text(b, k ? "," : "");
        if (twice) say(b, "'id:%i'", id);
        else write_piece_key(b, s);
        say(b, ":%n", last ? r->logprob : best[k].logprob);
    }
    buffer_text(b, "}");
}

/* Rows of the completions' API: four lists. */
static void write_completion_rows(const server *sv, buffer *b, const seq *q, size_t from,
                                  size_t to) {
    const ranked *ranks = (const ranked *)(void *)q->ranks.data;
    static const char *const names[] = {"tokens", "token_logprobs", "top_logprobs", "text_offset"};
    for (int list = 0; list < 4; list++) {
        say(b, "%s'%s':[", list ? "," : "{", names[list]);
        for (size_t i = from; i < to; i++) {
            const token_row *r = row_of(q, i);
            buffer_text(b, i > from ? "," : "");
            if (list == 0) write_piece_key(b, piece_of(sv, r->id));
            else if (list == 3) say(b, "%z", r->chars);
            else if (isnan(r->logprob)) buffer_text(b, "null");
            else if (list == 1) write_number(b, r->logprob);
            else write_top(sv, b, r, ranks + i * MAX_TOP);
        }
        buffer_text(b, "]");
    }
    buffer_text(b, "}");
}

enum { NO_ROWS = -1 };

/* TO: as many rows, or NO_ROWS. */
static void write_logprobs(const server *sv, buffer *b, const seq *q, size_t from, size_t to) {
    if (q->job->p.top < 0 || to == (size_t)NO_ROWS) buffer_text(b, "null");
    else if (q->job->api == API_COMPLETION) write_completion_rows(sv, b, q, from, to);
    else {
        buffer_text(b, "{\"content\":");
        write_chat_rows(sv, b, q, from, to);
        buffer_text(b, "}");
    }
}

/* How many rows belong to the first TO bytes of the text. A chat lists what its text has; the
 * completions' API also what is no text, as the stop. */
static size_t rows_until(const seq *q, size_t to, bool all) {
    size_t i = q->rows_sent, n = n_rows_of(q);
    if (all && q->job->api == API_COMPLETION) return n;
    while (i < n && row_of(q, i)->end <= to && !(row_of(q, i)->stop)) i++;
    while (all && i < n && row_of(q, i)->start < to && !row_of(q, i)->stop) i++;
    return i;
}

/* The ids from FROM on. */
static void write_ids(buffer *b, const buffer *ids, size_t from) {
    buffer_text(b, "[");
    for (size_t i = from; i < ids->n / 4; i++)
        buffer_printf(b, "%s%d", i > from ? "," : "", (int32_t)u32_at(ids->data, i));
    buffer_text(b, "]");
}

static double rate(double n, double time) { return time > 0 ? n / time : 0; }

static void write_timings(buffer *b, const job *g) {
    double end = g->ended > 0 ? g->ended : seconds();
    double begun = g->read > 0 ? g->read : seconds();
    double read = g->started > 0 ? begun - g->started : 0, wrote = end > begun ? end - begun : 0;
    size_t n = g->n_read - g->n_cached;
    /* the first token of an answer comes with its prompt */
    size_t later = g->n_written > g->n_seqs ? g->n_written - g->n_seqs : 0;
    say(b, "'timings':{'cache_n':%z,'prompt_n':%z,'prompt_ms':%m,'prompt_per_token_ms':%m,"
        "'prompt_per_second':%m,'predicted_n':%z,'predicted_ms':%m,'predicted_per_token_ms':%m,"
        "'predicted_per_second':%m}", g->n_cached, n, 1e3 * read, 1e3 * rate(read, (double)n),
        rate((double)n, read), g->n_written, 1e3 * wrote, 1e3 * rate(wrote, (double)later),
        rate((double)later, wrote));
}

static void write_usage(buffer *b, const job *g) {
    size_t thoughts = 0;
    for (size_t i = 0; i < g->n_seqs; i++) thoughts += g->seqs[i].n_thoughts;
    say(b, "'usage':{'prompt_tokens':%z,'completion_tokens':%z,'total_tokens':%z,"
        "'prompt_tokens_details':{'cached_tokens':%z},'completion_tokens_details':"
        "{'reasoning_tokens':%z}}", g->n_read, g->n_written, g->n_read + g->n_written, g->n_cached,
        thoughts);
}

/* The beginning of every chunk, and of a whole answer. */
static void write_head(const server *sv, job *g) {
    const char *object = g->api == API_COMPLETION ? "text_completion"
                       : g->p.stream ? "chat.completion.chunk" : "chat.completion";
    say(&g->head, "{'id':'%s','object':'%s','created':%l,'model':%q,'system_fingerprint':'%s',"
        "'seed':%w,'choices':[", g->id, object, g->created, sv->name, sv->fingerprint, g->p.seed);
}

/* A chunk: FORM and what follows it are what is new, with rows of tokens up to TO. FINISH: of the
 * last one, else NULL. */
static void chunk(const server *sv, seq *q, size_t to, const char *finish, const char *form, ...) {
    const job *g = q->job;
    buffer *b = &q->chunks;
    va_list a;
    va_start(a, form);
    say(b, "data: %j{'index':%i,", &g->head, q->index);
    say_all(b, form, a);
    va_end(a);
    buffer_text(b, ",\"logprobs\":");
    write_logprobs(sv, b, q, q->rows_sent, to);
    say(b, ",'finish_reason':%q}]", finish);
    if (finish || (g->p.timings && q->opened)) {
        buffer_text(b, ",");
        write_timings(b, g);
    }
    say(b, g->p.include_usage ? ",'usage':null}\n\n" : "}\n\n");
    if (to != (size_t)NO_ROWS) q->rows_sent = to;
}

/* Call I of an answer: its id, and its name and arguments, which stand in q->call_text. */
static call_row call_at(const seq *q, int i, span *name, span *arguments) {
    call_row r;
    memcpy(&r, q->calls.data + (size_t)i * sizeof r, sizeof r);
    *name = part_of(&q->call_text, r.at, r.at + r.n_name);
    *arguments = part_of(&q->call_text, r.at + r.n_name, r.at + r.n_name + r.n_arguments);
    return r;
}

/* What an answer in llama.cpp's shape says of its tokens from the one at FROM on. */
static void write_llama_tokens(const server *sv, buffer *b, const seq *q, size_t from) {
    size_t n = q->made.n / 4;
    buffer_text(b, ",\"tokens\":");
    write_ids(b, &q->made, from);
    if (q->job->p.top < 0) return;
    buffer_text(b, ",\"completion_probabilities\":");
    write_chat_rows(sv, b, q, from, n);
}

/* llama.cpp's shape of an answer or, streamed, of its last chunk. */
static void write_llama(const server *sv, buffer *b, const seq *q, bool whole) {
    const job *g = q->job;
    const char *type = !strcmp(q->finish, "length") ? "limit" : q->stop_word.n ? "word" : "eos";
    say(b, "{'index':%i,'content':%Q", q->index, part_of(&q->text, 0, whole ? q->text.n : 0));
    write_llama_tokens(sv, b, q, whole ? 0 : q->made.n / 4);
    say(b, ",'stop':true,'model':%q,'has_new_line':%b,'stop_type':'%s','stopping_word':%Q,"
        "'truncated':false,'tokens_cached':%z,'tokens_evaluated':%z,'tokens_predicted':%z,"
        "'generation_settings':{'n_ctx':%z,'n_predict':%w,'temperature':%n,'top_k':%w,'top_p':%n,"
        "'min_p':%n,'repeat_penalty':%n,'seed':%w},", sv->name,
        q->text.n && memchr(q->text.data, '\n', q->text.n), type, q->stop_word, g->n_cached,
        g->n_read, g->n_written, sv->n_ctx, g->p.max_new, g->p.temperature, g->p.top_k, g->p.top_p,
        g->p.min_p, g->p.repeat, g->p.seed);
    write_timings(b, g);
    buffer_text(b, "}");
}

/* How much of Q's prompt is read, for who streams and asks. It stands outside the order of the
 * chunks, as it depends on the others. */
static void say_progress(server *sv, const seq *q) {
    job *g = q->job;
    buffer b = {0};
    if (!g->p.stream || !g->p.progress || q->index % (int)g->p.n) return;
    if (g->api == API_LLAMA)
        say(&b, "data: {'index':0,'content':'','tokens':[],'stop':false");
    else say(&b, "data: %j]", &g->head);
    say(&b, ",'prompt_progress':{'total':%z,'cache':%z,'processed':%z,'time_ms':%w,'queue':0}",
        q->n_ids, q->cached, q->fed, 1e3 * (seconds() - g->started));
    if (g->p.timings) buffer_text(&b, ","), write_timings(&b, g);
    buffer_text(&b, "}\n\n");
    pthread_mutex_lock(&sv->lock);
    say(&g->out, "%j", &b);
    pthread_mutex_unlock(&sv->lock);
    buffer_free(&b);
}

/* What a step of one answer adds to its stream; its text goes up to byte TO. */
static void stream_step(const server *sv, seq *q, size_t to) {
    bool last = q->finish, chat = q->job->api == API_CHAT;
    span text = part_of(&q->text, q->sent, to), name, arguments;
    size_t rows = rows_until(q, to, last), none = (size_t)NO_ROWS;
    size_t thoughts = q->thoughts.n - (last ? 0 : utf8_unfinished(q->thoughts.data, q->thoughts.n));
    if (q->job->api == API_LLAMA) {
        if (text.n) {
            say(&q->chunks, "data: {'index':%i,'content':%Q", q->index, text);
            write_llama_tokens(sv, &q->chunks, q, q->ids_sent);
            buffer_text(&q->chunks, ",\"stop\":false}\n\n");
            q->sent = to, q->ids_sent = q->made.n / 4;
        }
        if (!last) return;
        buffer_text(&q->chunks, "data: ");
        write_llama(sv, &q->chunks, q, false);
        buffer_text(&q->chunks, "\n\n");
        return;
    }
    if (chat && !q->opened && (text.n || thoughts || last)) {
        chunk(sv, q, none, NULL, "'delta':{'role':'assistant','content':null}");
        q->opened = true;
    }
    if (thoughts > q->thoughts_sent) {
        chunk(sv, q, none, NULL, "'delta':{'reasoning_content':%Q}",
              part_of(&q->thoughts, q->thoughts_sent, thoughts));
        q->thoughts_sent = thoughts;
    }
    if (chat ? text.n > 0 : !last && (text.n || rows > q->rows_sent)) {
        chunk(sv, q, rows, NULL, chat ? "'delta':{'content':%Q}" : "'text':%Q", text);
        q->sent = to;
    }
    for (int i = 0; last && i < q->n_calls; i++) {
        call_row r = call_at(q, i, &name, &arguments);
        chunk(sv, q, none, NULL, "'delta':{'tool_calls':[{'index':%i,'id':'%s','type':'function',"
              "'function':{'name':'%S','arguments':''}}]}", i, r.id, name);
        chunk(sv, q, none, NULL, "'delta':{'tool_calls':[{'index':%i,'function':{'arguments':%Q}}]"
              "}", i, arguments);
    }
    if (last && chat) chunk(sv, q, none, q->finish, "'delta':{}");
    else if (last) chunk(sv, q, rows > q->rows_sent ? rows : none, q->finish, "'text':%Q", text);
}

/* One whole choice. */
static void write_choice(const server *sv, buffer *b, const seq *q) {
    bool chat = q->job->api == API_CHAT;
    span name, arguments;
    say(b, chat ? "{'index':%i,'message':{'role':'assistant','content':" : "{'index':%i,'text':",
        q->index);
    say(b, q->n_calls && !q->text.n ? "null" : "%Q", all_of(&q->text));
    if (q->thoughts.n) say(b, ",'reasoning_content':%Q", all_of(&q->thoughts));
    for (int i = 0; i < q->n_calls; i++) {
        call_row r = call_at(q, i, &name, &arguments);
        say(b, "%s{'id':'%s','type':'function','function':{'name':'%S','arguments':%Q}}",
            i ? "," : ",\"tool_calls\":[", r.id, name, arguments);
    }
    say(b, q->n_calls ? "]%s,'logprobs':" : "%s,'logprobs':", chat ? "}" : "");
    write_logprobs(sv, b, q, 0, rows_until(q, q->text.n, true));
    say(b, ",'finish_reason':%q}", q->finish);
}

/* The end of a job: the whole answer, or what closes the stream. */
static void write_end(const server *sv, const job *g, buffer *b) {
    bool whole = !g->p.stream, llama = g->api == API_LLAMA;
    if (whole && llama) {
        write_llama(sv, b, &g->seqs[0], true);
        return;
    }
    if (whole || g->p.include_usage) {
        say(b, whole ? "%j" : "data: %j", &g->head);
        for (size_t i = 0; whole && i < g->n_seqs; i++) {
            buffer_text(b, i ? "," : "");
            write_choice(sv, b, &g->seqs[i]);
        }
        buffer_text(b, "],");
        write_usage(b, g);
        buffer_text(b, ",");
        write_timings(b, g);
        buffer_text(b, whole ? "}" : "}\n\n");
    }
    if (!whole && !llama) buffer_text(b, "data: [DONE]\n\n");
}

/* ---- jobs ----------------------------------------------------------------------------------- */

static void free_job(job *g) {
    if (!g) return;
    for (size_t i = 0; g->seqs && i < g->n_seqs; i++) {
        seq *q = &g->seqs[i];
        free_buffers(BUFFERS(&q->made, &q->text, &q->thoughts, &q->call, &q->rows, &q->ranks,
                             &q->calls, &q->call_text, &q->chunks, &q->steps));
    }
    free_buffers(BUFFERS(&g->ids, &g->ends, &g->stops, &g->stop_ends, &g->stop_ids, &g->bias,
                         &g->headers, &g->head, &g->out));
    grammar_free(g->grammar);
    grammar_free(g->calls);
    free(g->seqs);
    free(g);
}

/* The key and cache_salt: who may share a start with whom. */
static int set_domain(job *g, const json *j, api_error *x) {
    uint32_t v = field_of(j, 0, "cache_salt");
    buffer b = {0};
    if (v != JSON_NONE && (!json_is_type(j, v, JSON_STRING) ||
                           j->nodes[v].end - j->nodes[v].start > 1024))
        return wrong(x, "cache_salt", "cache_salt: wanted a text of at most 1024 bytes");
    buffer_text(&b, g->key ? g->key->name : "");
    buffer_add(&b, "", 1);
    if (v != JSON_NONE) json_unescape(j, v, &b);
    if (b.failed) out_of_memory(&x->e, b.n);
    else sha256_of(b.data, b.n, g->domain);
    buffer_free(&b);
    return x->e.code;
}

static void set_think(params *p, const json *j) {
    uint32_t effort = field_of(j, 0, "reasoning_effort");
    uint32_t kwargs = field_of(j, 0, "chat_template_kwargs");
    if (effort != JSON_NONE) p->think = !json_is(j, effort, "none");
    p->think |= json_is_type(j, json_get(j, kwargs, "enable_thinking"), JSON_TRUE);
}

/* The answers that a job is to give; seed + k for the k-th. */
static int make_seqs(const server *sv, job *g, api_error *x) {
    size_t n = (size_t)g->p.n;
    g->n_seqs = g->n_prompts * n;
    g->seqs = new_array(g->n_seqs, sizeof *g->seqs);
    if (!g->seqs) return out_of_memory(&x->e, g->n_seqs * sizeof *g->seqs);
    for (size_t k = 0; k < g->n_seqs; k++) {
        seq *q = &g->seqs[k];
        size_t start = end_of(&g->ends, k / n), end = end_of(&g->ends, k / n + 1);
        size_t n_ids = end - start, most = sv->n_ctx - n_ids;
        if (g->p.max_new >= 0 && g->p.max_new < (double)most) most = (size_t)g->p.max_new;
        *q = (seq){.job = g, .index = (int)k,
                   .ids = (const int32_t *)(void *)g->ids.data + start, .n_ids = n_ids,
                   .max_new = most, .first = g->api == API_CHAT || g->p.echo,
                   .random = (uint64_t)(int64_t)g->p.seed + k, .g = g->grammar};
        if (g->must_call && !sv->chat->call_tokens[0]) q->g = g->calls;
        if (q->g) q->state_of_g = grammar_start(q->g);
        if (k % n == 0) g->n_read += n_ids;
    }
    return MEDRUN_OK;
}

/* The card's values, OpenAI's where the field's meaning asks for it. */
static params standard_params(const server *sv, int api) {
    const medrun_sampling *s = &sv->info.sampling;
    const float from[] = {s->temperature, s->top_p, s->min_p, s->repeat_penalty};
    double d[4];
    for (int i = 0; i < 4; i++) {               /* 0.6f is 0.6 to people                         */
        char text[32];
        snprintf(text, sizeof text, "%.7g", (double)from[i]);
        d[i] = strtod(text, NULL);
        if ((float)d[i] < from[i] || (float)d[i] > from[i]) d[i] = (double)from[i];
    }
    return (params){.temperature = d[0], .top_k = s->top_k, .top_p = d[1], .min_p = d[2],
                    .repeat = d[3], .seed = NAN, .n = 1, .top = api == API_LLAMA ? 0 : -1,
                    .max_new = api == API_COMPLETION ? 16 : -1};
}

/* What an answer must look like, and functions: the grammar of both. */
static int read_shape(const server *sv, job *g, const json *j, api_error *x);

/* Reads the request J into G. */
static int read_job(const server *sv, job *g, const json *j, buffer *ignored, api_error *x) {
    params *p = &g->p;
    *p = standard_params(sv, g->api);
    if (json_typeof(j, 0) != JSON_OBJECT) return wrong(x, NULL, "the body is no JSON object");
    read_fields_of(sv, j, p, ignored, x);
    read_stream_options(g, j, x);
    read_stops_of(sv, g, j, x);
    read_bias(sv, g, j, x);
    read_logprobs(g, j, x);
    set_domain(g, j, x);
    set_think(p, j);
    if (p->n > (double)sv->n_slots)
        wrong(x, "n", "n: wanted 1 to %zu, the sessions of this server", sv->n_slots);
    if (isnan(p->seed) || p->seed == -1) {
        uint8_t bytes[4];
        random_bytes(bytes, sizeof bytes);
        p->seed = (double)u32_at(bytes, 0);
    }
    if (g->api != API_COMPLETION && p->echo) wrong(x, "echo", "echo: only for /v1/completions");
    if (x->e.code) return x->e.code;
    if (g->api == API_CHAT) {
        render_request(sv, j, p, false, &g->tools, &g->ids, x);
        end_prompt(sv, g, x);
    } else read_prompts(sv, g, j, x);
    if (!x->e.code && g->api == API_LLAMA && (g->n_prompts > 1 || p->n > 1))
        wrong(x, "prompt", "prompt: one a request here; /v1/completions takes several");
    if (g->api == API_CHAT && sv->chat && sv->chat->stop_text && !x->e.code) {
        buffer_text(&g->stops, sv->chat->stop_text);
        buffer_add(&g->stop_ends, &g->stops.n, sizeof g->stops.n);
    }
    if (read_shape(sv, g, j, x)) return x->e.code;
    buffer *const all[] = {&g->stops, &g->stop_ends, &g->stop_ids, &g->bias};
    for (size_t k = 0; k < sizeof all / sizeof *all; k++)
        if (all[k]->failed) return out_of_memory(&x->e, all[k]->n);
    return make_seqs(sv, g, x);
}

/* A request that needs passes: read whole and refused now, or queued. */
static void start_job(server *sv, connection *c, int api, const json *j, const api_key *key) {
    api_error x = {0};
    buffer ignored = {0};
    job *g = new_array(1, sizeof *g);
    if (!g) {
        answer_error(sv, c, 503, "no memory for the request");
        return;
    }
    g->api = api, g->key = key, g->arrived = seconds(), g->created = (long long)time(NULL);
    snprintf(g->id, sizeof g->id, api == API_CHAT ? "chatcmpl-" : "cmpl-");
    random_text(g->id + strlen(g->id), 24);
    snprintf(g->path, sizeof g->path, "%.*s", (int)c->request.path.n, c->request.path.text);
    read_job(sv, g, j, &ignored, &x);
    write_head(sv, g);
    if (ignored.n) buffer_printf(&g->headers, "X-Medrun-Ignored: %s\r\n", chars_of(&ignored));
    if (!x.e.code && (g->head.failed || g->headers.failed)) out_of_memory(&x.e, g->head.n);
    buffer_free(&ignored);
    const char *full = x.e.code ? NULL : submit_job(sv, g);
    if (full) x.status = strstr(full, "key") ? 429 : 503, wrong(&x, NULL, "%s", full);
    if (x.e.code) {
        answer_wrong(sv, c, &x, "");
        free_job(g);
        return;
    }
    c->job = g;
    if (g->p.stream)
        answer_head(sv, c, 200, "text/event-stream; charset=utf-8", chars_of(&g->headers),
                    SIZE_MAX);
}

/* ---- endpoints ------------------------------------------------------------------------------ */

/* A request on its way through its endpoint: V of the body is in J. */
typedef struct {
    server *sv;
    connection *c;
    const json *j;
    const api_key *key;
    span rest;                  /* of the path, behind the endpoint's                           */
    buffer *out;
    api_error *x;
} call;

typedef void endpoint(call *k);

static void get_health(call *k) {
    if (k->sv->draining) {
        k->x->status = 503;
        wrong(k->x, NULL, "the server is ending");
    } else buffer_text(k->out, "{\"status\":\"ok\"}");
}

static void write_model(const server *sv, buffer *b) {
    const medrun_info *i = &sv->info;
    say(b, "{'id':%q,'object':'model','created':%l,'owned_by':'medrun','max_model_len':%z,'meta':{"
        "'n_vocab':%i,'n_ctx_train':%i,'n_embd':%i,'n_params':%l,'size':%l}}", sv->name,
        sv->started, sv->n_ctx, i->vocab_size, i->max_positions, i->hidden_size,
        (long long)i->parameters, (long long)i->weight_bytes);
}

/* Is S, a part of a path, TEXT with what clients escape? */
static bool path_is(span s, const char *text) {
    size_t i = 0;
    for (; i < s.n && *text; text++) {
        char hex[3] = {0};
        if (s.text[i] == '%' && s.n - i > 2) memcpy(hex, s.text + i + 1, 2);
        bool escaped = isxdigit((uint8_t)hex[0]) && isxdigit((uint8_t)hex[1]);
        int c = escaped ? (int)strtol(hex, NULL, 16) : (uint8_t)s.text[i];
        if (c != (uint8_t)*text) return false;
        i += escaped ? 3 : 1;
    }
    return i == s.n && !*text;
}

static void get_models(call *k) {
    if (k->rest.n) {
        if (!path_is(k->rest, k->sv->name)) {
            k->x->status = 404;
            wrong(k->x, "model", "no such model; the one here is %s", k->sv->name);
            return;
        }
        write_model(k->sv, k->out);
        return;
    }
    buffer_text(k->out, "{\"object\":\"list\",\"data\":[");
    write_model(k->sv, k->out);
    buffer_text(k->out, "]}");
}

static void post_chat(call *k) { start_job(k->sv, k->c, API_CHAT, k->j, k->key); }
static void post_completion(call *k) { start_job(k->sv, k->c, API_COMPLETION, k->j, k->key); }
static void post_llama(call *k) { start_job(k->sv, k->c, API_LLAMA, k->j, k->key); }

/* A bool of the body, or what it is when absent. */
static bool flag_of(call *k, const char *name, bool standard) {
    read_bool(k->j, field_of(k->j, 0, name), name, &standard, k->x);
    return standard;
}

static void write_pieces(const server *sv, buffer *b, const buffer *ids) {
    buffer_text(b, "{\"tokens\":[");
    for (size_t i = 0; i < ids->n / 4; i++) {
        int32_t id = (int32_t)u32_at(ids->data, i);
        span s = piece_of(sv, id);
        say(b, "%s{'id':%i,'piece':", i ? "," : "", id);
        if (is_utf8(s)) json_quote(b, s.text, s.n);
        else write_bytes(b, s);
        buffer_text(b, "}");
    }
    buffer_text(b, "]}");
}

/* The body's messages as ids and, unless it is NULL, as text. */
static void render_call(call *k, buffer *ids, buffer *text) {
    params p = {0};
    bool tools;
    set_think(&p, k->j);
    render_request(k->sv, k->j, &p, false, &tools, ids, k->x);
    if (text && !k->x->e.code) render_request(k->sv, k->j, &p, true, &tools, text, k->x);
}

/* vLLM's body has `prompt` or `messages`, llama.cpp's `content`. */
static void post_tokenize(call *k) {
    const server *sv = k->sv;
    uint32_t prompt = field_of(k->j, 0, "prompt"), content = field_of(k->j, 0, "content");
    bool llama = content != JSON_NONE;
    bool bos = flag_of(k, llama ? "add_special" : "add_special_tokens", !llama);
    bool special = flag_of(k, "parse_special", llama), pieces = flag_of(k, "with_pieces", false);
    buffer ids = {0}, text = {0};
    uint32_t v = llama ? content : prompt;
    if (v == JSON_NONE && field_of(k->j, 0, "messages") != JSON_NONE)
        render_call(k, &ids, NULL);
    else if (!json_is_type(k->j, v, JSON_STRING))
        wrong(k->x, "prompt", "wanted prompt, messages or content");
    else {
        int flags = (bos && sv->t->add_bos ? MEDRUN_ADD_BOS : 0) |
                    (special ? MEDRUN_PARSE_SPECIAL : 0);
        json_unescape(k->j, v, &text);
        tokenizer_encode(sv->t, chars_of(&text), text.n, flags, &ids, &k->x->e);
    }
    if (llama && pieces) write_pieces(sv, k->out, &ids);
    else {
        buffer_text(k->out, "{\"tokens\":");
        write_ids(k->out, &ids, 0);
        if (!llama)
            buffer_printf(k->out, ",\"count\":%zu,\"max_model_len\":%zu", ids.n / 4, sv->n_ctx);
        buffer_text(k->out, "}");
    }
    free_buffers(BUFFERS(&ids, &text));
}

static void post_detokenize(call *k) {
    buffer ids = {0}, text = {0};
    bool first = true;
    size_t n;
    read_ids(k->sv, k->j, field_of(k->j, 0, "tokens"), "tokens", &ids, k->x);
    for (size_t i = 0; i < ids.n / 4; i++) {
        const char *piece = tokenizer_text(k->sv->t, (int32_t)u32_at(ids.data, i), true, &first,
                                           &n);
        buffer_add(&text, piece, n);
    }
    say(k->out, "{'prompt':%Q,'content':%Q}", all_of(&text), all_of(&text));
    k->out->failed |= text.failed || ids.failed;
    free_buffers(BUFFERS(&ids, &text));
}

static void get_tokenizer_info(call *k) {
    const server *sv = k->sv;
    int32_t ids[] = {sv->info.bos, sv->info.n_stops ? sv->info.stops[0] : -1};
    buffer_text(k->out, "{\"tokenizer_class\":\"medrun\"");
    for (int i = 0; i < 2; i++)
        say(k->out, ids[i] < 0 ? ",'%s':null" : ",'%s':%Q", i ? "eos_token" : "bos_token",
            ids[i] < 0 ? (span){0} : piece_of(sv, ids[i]));
    say(k->out, ",'pad_token':null,'model_max_length':%z,'chat_template':''}", sv->n_ctx);
}

static void post_template(call *k) {
    buffer ids = {0}, text = {0};
    render_call(k, &ids, &text);
    say(k->out, "{'prompt':%Q,'tokens':", all_of(&text));
    write_ids(k->out, &ids, 0);
    buffer_text(k->out, "}");
    free_buffers(BUFFERS(&ids, &text));
}

static void post_input_tokens(call *k) {
    buffer ids = {0};
    render_call(k, &ids, NULL);
    say(k->out, "{'object':'response.input_tokens','input_tokens':%z}", ids.n / 4);
    buffer_free(&ids);
}

static void get_props(call *k) {
    const server *sv = k->sv;
    params p = standard_params(sv, API_CHAT);
    const char *slash = strrchr(sv->m->path, '/');
    say(k->out, "{'default_generation_settings':{'n_ctx':%z,'params':{'temperature':%n,'top_k':%w,"
        "'top_p':%n,'min_p':%n,'repeat_penalty':%n}},'total_slots':%z,'model_path':%q,"
        "'chat_template':'%s','build_info':'medrun %s','checkpoint_sha256':'%s','kernels':'%s',"
        "'kv':'%s','strict':%b,'tools':%b,'model':%q,'notice':%q}", sv->n_ctx, p.temperature,
        p.top_k, p.top_p, p.min_p, p.repeat, sv->n_slots, slash ? slash + 1 : sv->m->path,
        sv->chat ? sv->chat->name : MEDRUN_UNKNOWN, MEDRUN_VERSION, sv->hash, sv->info.kernels,
        kv_names[sv->kv], sv->strict, sv->chat && sv->chat->takes_tools, sv->name,
        sv->info.notice);
}

static void get_slots(call *k) {
    server *sv = k->sv;
    bool idle = false;
    pthread_mutex_lock(&sv->lock);
    buffer_text(k->out, "[");
    for (size_t i = 0; i < sv->n_slots; i++) {
        const slot_view *v = &sv->view[i];
        idle |= !v->busy;
        say(k->out, "%s{'id':%z,'n_ctx':%z,'is_processing':%b,'n_prompt':%z,'n_cached':%z,"
            "'n_decoded':%z,'key':%q}", i ? "," : "", i, sv->n_ctx, v->busy, v->n_prompt,
            v->n_cached, v->n_new, v->key);
    }
    pthread_mutex_unlock(&sv->lock);
    buffer_text(k->out, "]");
    if (!idle && span_is(k->c->request.query, "fail_on_no_slot=1")) {
        k->x->status = 503;
        wrong(k->x, NULL, "no slot is idle");
    }
}

static const double bounds[11] = {0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60};

static void get_metrics(call *k) {
    server *sv = k->sv;
    pthread_mutex_lock(&sv->lock);
    const metrics m = sv->metrics;
    double running = (double)sv->n_running, waiting = (double)sv->n_waiting;
    double bytes = (double)sv->kv_tokens * (double)sv->bytes_per_token;
    pthread_mutex_unlock(&sv->lock);
    const struct { const char *name, *kind, *help; double value; } all[] = {
        {"llamacpp:prompt_tokens_total", "counter", "Prompt tokens computed.",
         (double)m.prompt_tokens},
        {"llamacpp:prompt_tokens_cached_total", "counter", "Prompt tokens taken from the cache.",
         (double)m.cached_tokens},
        {"llamacpp:prompt_seconds_total", "counter", "Time on prompts.", m.prompt_seconds},
        {"llamacpp:tokens_predicted_total", "counter", "Tokens written.", (double)m.new_tokens},
        {"llamacpp:tokens_predicted_seconds_total", "counter", "Time writing.", m.new_seconds},
        {"llamacpp:n_decode_total", "counter", "Passes over the weights.", (double)m.passes},
        {"llamacpp:n_tokens_max", "counter", "Longest timeline so far.", (double)m.most_tokens},
        {"llamacpp:prompt_tokens_seconds", "gauge", "Prompt tokens a second.",
         rate((double)m.prompt_tokens, m.prompt_seconds)},
        {"llamacpp:predicted_tokens_seconds", "gauge", "Tokens written a second.",
         rate((double)m.fed_tokens, m.new_seconds)},
        {"llamacpp:requests_processing", "gauge", "Requests that run.", running},
        {"llamacpp:requests_deferred", "gauge", "Requests that wait.", waiting},
        {"llamacpp:n_busy_slots_per_decode", "gauge", "Sessions in a pass.",
         rate((double)m.busy, (double)m.passes)},
        {"medrun:kv_bytes", "gauge", "Memory of caches in use.", bytes},
        {"medrun:last_pass_seconds", "gauge", "When the last pass ended.", m.last_pass},
        {"medrun:cancelled_total", "counter", "Requests whose client went.", (double)m.cancelled},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        buffer_printf(k->out, "# HELP %s %s\n# TYPE %s %s\n%s %.17g\n", all[i].name, all[i].help,
                      all[i].name, all[i].kind, all[i].name, all[i].value);
    buffer_printf(k->out, "# HELP medrun:rejected_total Requests refused for lack of room.\n"
                  "# TYPE medrun:rejected_total counter\nmedrun:rejected_total{reason=\"queue\"} "
                  "%llu\nmedrun:rejected_total{reason=\"key\"} %llu\n",
                  (unsigned long long)m.rejected_queue, (unsigned long long)m.rejected_key);
    static const char *const times[N_TIMES][2] = {
        [TO_FIRST] = {"time_to_first_token", "From arrival."},
        [TO_NEXT] = {"inter_token", "Between two tokens."},
        [IN_QUEUE] = {"queue", "Before a session was free."},
        [TO_END] = {"e2e", "From arrival to the end."}, [FOR_MASK] = {"mask", "To make a mask."}};
    for (int i = 0; i < N_TIMES; i++) {
        const char *name = times[i][0];
        unsigned long long all_times = m.times[i].counts[11];
        buffer_printf(k->out, "# HELP medrun:%s_seconds %s\n# TYPE medrun:%s_seconds histogram\n",
                      name, times[i][1], name);
        for (int n = 0; n < 11; n++)
            buffer_printf(k->out, "medrun:%s_seconds_bucket{le=\"%g\"} %llu\n", name, bounds[n],
                          (unsigned long long)m.times[i].counts[n]);
        buffer_printf(k->out, "medrun:%s_seconds_bucket{le=\"+Inf\"} %llu\nmedrun:%s_seconds_sum "
                      "%.9g\nmedrun:%s_seconds_count %llu\n", name, all_times, name,
                      m.times[i].sum, name, all_times);
    }
}

static void post_embeddings(call *k) {
    k->x->status = 501;
    wrong(k->x, NULL, "no embeddings here: the states of a model that writes make poor vectors");
}

typedef struct {
    const char *method, *path;
    bool open, more, text;      /* without a key; a path may go on; not JSON                    */
    endpoint *run;
} route;

static const route routes[] = {
    {"GET", "/health", .open = true, .run = get_health},
    {"GET", "/v1/health", .open = true, .run = get_health},
    {"GET", "/v1/models", .run = get_models}, {"GET", "/models", .run = get_models},
    {"GET", "/v1/models/", .more = true, .run = get_models},
    {"POST", "/v1/chat/completions", .run = post_chat},
    {"POST", "/chat/completions", .run = post_chat},
    {"POST", "/v1/completions", .run = post_completion},
    {"POST", "/completion", .run = post_llama}, {"POST", "/completions", .run = post_llama},
    {"POST", "/tokenize", .run = post_tokenize}, {"POST", "/detokenize", .run = post_detokenize},
    {"GET", "/tokenizer_info", .run = get_tokenizer_info},
    {"POST", "/apply-template", .run = post_template},
    {"POST", "/v1/chat/completions/input_tokens", .run = post_input_tokens},
    {"POST", "/chat/completions/input_tokens", .run = post_input_tokens},
    {"GET", "/props", .run = get_props}, {"GET", "/slots", .run = get_slots},
    {"GET", "/metrics", .text = true, .run = get_metrics},
    {"POST", "/v1/embeddings", .run = post_embeddings},
    {"POST", "/embeddings", .run = post_embeddings},
};

static const uint8_t page[] = {
#if __has_include("serve_page.inc")         /* the Makefile makes it of serve_page.html          */
#include "serve_page.inc"
#endif
    0};

/* The page's one script and style by their hashes: nothing else may run there, nor come from
 * elsewhere. */
static void make_page_headers(buffer *b) {
    static const char *const tags[2][2] = {{"<script>", "</script>"}, {"<style>", "</style>"}};
    buffer_text(b, "Content-Security-Policy: default-src 'none'; connect-src 'self'; base-uri "
                "'none'; form-action 'none'; frame-ancestors 'none'; "
                "require-trusted-types-for 'script'; trusted-types 'none'");
    for (int i = 0; i < 2; i++) {
        const char *from = strstr((const char *)page, tags[i][0]);
        const char *to = from ? strstr(from, tags[i][1]) : NULL;
        uint8_t digest[32];
        if (!to) continue;
        from += strlen(tags[i][0]);
        sha256_of(from, (size_t)(to - from), digest);
        buffer_printf(b, "; %s-src 'sha256-", i ? "style" : "script");
        write_base64(digest, sizeof digest, b);
        buffer_text(b, "'");
    }
    buffer_text(b, "\r\nReferrer-Policy: no-referrer\r\nCross-Origin-Opener-Policy: same-origin"
                "\r\nCross-Origin-Resource-Policy: same-origin\r\n");
}

static void answer_page(server *sv, connection *c) {
    buffer b = {0};
    buffer_add(&b, page, sizeof page - 1);
    answer(sv, c, 200, "text/html; charset=utf-8", chars_of(&sv->page_headers), &b);
    buffer_free(&b);
}

/* May this client ask at all? Of GET requests too, as a page of another site must not read. */
static bool check_caller(server *sv, connection *c) {
    const http_request *r = &c->request;
    bool cross = r->origin.text || (r->site.n && !span_is(r->site, "same-origin") &&
                                    !span_is(r->site, "none"));
    size_t n = strlen("application/json");
    if (!host_is_ours(sv, c->fd, r->host))
        answer_error(sv, c, 421, "the Host is not one of this server's; see --allow-host");
    else if (r->origin.text && !origin_is_ours(sv, r->origin, r->host))
        answer_error(sv, c, 403, "pages of other sites may not ask here; see --cors-origin");
    else if (cross && span_is(r->method, "POST") &&
             (r->type.n < n || strncasecmp(r->type.text, "application/json", n)))
        answer_error(sv, c, 415, "a page must send application/json");
    else return true;
    return false;
}

/* A path that nobody has, or has with another method. */
static void answer_unknown(server *sv, connection *c, const char *allowed) {
    char more[64] = "";
    api_error x = {.status = allowed ? 405 : 404};
    wrong(&x, NULL, allowed ? "this path takes %s" : "no such path; chats go to %s",
          allowed ? allowed : "POST /v1/chat/completions");
    if (allowed) snprintf(more, sizeof more, "Allow: %s\r\n", allowed);
    answer_wrong(sv, c, &x, more);
}

static void run_route(server *sv, connection *c, const route *r, span body) {
    json j = {0};
    buffer out = {0};
    api_error x = {0};
    char path[48];
    const api_key *key = find_key(sv, c->request.key);
    bool post = r->method[0] == 'P';
    call k = {sv, c, &j, key, {0}, &out, &x};
    if (r->more) k.rest = (span){c->request.path.text + strlen(r->path),
                                 c->request.path.n - strlen(r->path)};
    if (sv->n_keys && !r->open && !key) {
        x.status = 401;
        wrong(&x, NULL, "this server wants a key: Authorization: Bearer KEY");
    } else if (post && sv->draining) {
        x.status = 503;
        wrong(&x, NULL, "the server is ending");
    } else if (post && json_parse(&j, body.text, body.n, &x.e)) x.status = 400;
    else if (post && json_typeof(&j, 0) != JSON_OBJECT) wrong(&x, NULL, "wanted a JSON object");
    else r->run(&k);
    if (out.failed && !x.e.code) out_of_memory(&x.e, out.n);
    if (x.e.code && !c->job) answer_wrong(sv, c, &x, "");
    else if (!c->job && out.n) {
        char more[64] = "";
        if (r->text)
            snprintf(more, sizeof more, "Process-Start-Time-Unix: %lld\r\n", sv->started);
        answer(sv, c, 200, r->text ? "text/plain; version=0.0.4" : JSON_TYPE, more, &out);
        if (sv->verbose || !r->open)
            log_line(sv, "-", key ? key->name : "-", path_of(c, path), 200, NULL);
    }
    buffer_free(&out);
    json_free(&j);
}

/* BODY is whole. What follows ends in an answer, or in a job that gives one. */
static void take_request(server *sv, connection *c, span body) {
    const http_request *q = &c->request;
    const char *allowed = NULL;
    bool head = span_is(q->method, "HEAD");
    if (!check_caller(sv, c)) return;
    if (span_is(q->method, "OPTIONS") && q->origin.text) {
        answer(sv, c, 204, JSON_TYPE, "", &(buffer){0});
        return;
    }
    if (sv->ui && span_is(q->path, "/") && (head || span_is(q->method, "GET"))) {
        answer_page(sv, c);
        return;
    }
    if (atomic_load(&sv->state) == LOADING) {
        answer_error(sv, c, 503, "the model is being loaded");
        return;
    }
    for (const route *r = routes; r < routes + sizeof routes / sizeof *routes; r++) {
        size_t n = strlen(r->path);
        bool same = r->more ? q->path.n > n && !memcmp(q->path.text, r->path, n)
                            : span_is(q->path, r->path);
        if (!same) continue;
        allowed = r->method;
        if (span_is(q->method, r->method) || (head && r->method[0] == 'G')) {
            run_route(sv, c, r, body);
            return;
        }
    }
    if (sv->ui && span_is(q->path, "/")) allowed = "GET";
    answer_unknown(sv, c, allowed);
}
