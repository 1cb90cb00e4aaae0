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

static const char *type_of_status(int status) {
    switch (status) {
        case 401: return "authentication_error";
        case 403: case 421: return "permission_error";
        case 404: return "not_found_error";
        case 429: return "rate_limit_error";
        case 500: return "server_error";
        case 501: return "not_supported_error";
        case 503: return "unavailable_error";
        default: return "invalid_request_error";
    }
}

/* As json_quote, and without line ends of any kind, at which some clients split a stream. */
static void quote(buffer *b, const void *text, size_t n) {
    const uint8_t *p = text;
    buffer_text(b, "\"");
    for (size_t i = 0, len, plain = 0; i <= n; i += len) {
        uint32_t code = 0;
        len = i < n ? utf8_decode(p + i, n - i, &code) : 1;
        bool as_is = i < n && len && code >= 0x20 && code != '"' && code != '\\' && code != 0x7F &&
                     code != 0x85 && code != 0x2028 && code != 0x2029;
        if (as_is) { plain += len; continue; }
        if (plain) buffer_add(b, p + i - plain, plain);
        plain = 0;
        if (i == n) break;
        if (!len) len = 1, buffer_text(b, "\\ufffd");
        else if (code == '"' || code == '\\') buffer_printf(b, "\\%c", (char)code);
        else if (code == '\n') buffer_text(b, "\\n");
        else buffer_printf(b, "\\u%04x", (unsigned)code);
    }
    buffer_text(b, "\"");
}

static void quote_text(buffer *b, const char *text) { quote(b, text, strlen(text)); }

static void write_error(buffer *b, const api_error *x) {
    buffer_text(b, "{\"error\":{\"message\":");
    quote_text(b, x->e.text);
    buffer_printf(b, ",\"type\":\"%s\",\"param\":", x->type ? x->type : type_of_status(x->status));
    if (x->param[0]) quote_text(b, x->param);
    else buffer_text(b, "null");
    if (x->code) buffer_printf(b, ",\"code\":\"%s\"", x->code);
    else buffer_text(b, ",\"code\":null");
    if (x->n_ctx) buffer_printf(b, ",\"n_prompt_tokens\":%zu,\"n_ctx\":%zu", x->n_prompt, x->n_ctx);
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

static void answer_wrong(server *sv, connection *c, api_error *x) {
    buffer b = {0};
    char path[48];
    if (!x->status) x->status = x->e.code == MEDRUN_NO_MEMORY ? 503 : 400;
    write_error(&b, x);
    answer(sv, c, x->status, JSON_TYPE, "", &b);
    log_line(sv, "-", "-", path_of(c, path), x->status, NULL);
    buffer_free(&b);
}

static void answer_error(server *sv, connection *c, int status, const char *type, const char *why) {
    api_error x = {.status = status, .type = type};
    wrong(&x, NULL, "%s", why);
    answer_wrong(sv, c, &x);
}

static void random_text(char *out, size_t n) {
    static const char letters[] = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    uint8_t bytes[32] = {0};
    random_bytes(bytes, n);
    for (size_t i = 0; i < n; i++) out[i] = letters[bytes[i] % 62];
    out[n] = 0;
}

/* ---- the fields of a request ---------------------------------------------------------------- */

enum { REAL, WHOLE, FLAG };

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
    {"echo", FLAG, 0, 0, AT(echo)}, {"stream", FLAG, 0, 0, AT(stream)},
    {"ignore_eos", FLAG, 0, 0, AT(ignore_eos)}, {"parse_special", FLAG, 0, 0, AT(parse_special)},
    {"timings_per_token", FLAG, 0, 0, AT(timings)}, {"return_progress", FLAG, 0, 0, AT(progress)},
    {"continue_final_message", FLAG, 0, 0, AT(continues)},
};
#undef AT

/* Read elsewhere; without effect here; and what would need a sampler that is not here, unless its
 * value changes nothing. */
static const char *const own_fields[] = {
    "model", "messages", "prompt", "stop", "stop_token_ids", "logit_bias", "logprobs",
    "stream_options", "tools", "tool_choice", "cache_salt", "reasoning_effort",
    "chat_template_kwargs", "parallel_tool_calls", "response_format", "grammar", "json_schema",
    "guided_choice", "guided_regex", "guided_json", "guided_grammar",
    "add_generation_prompt", "additional", NULL};
static const char *const idle_fields[] = {
    "user", "metadata", "store", "service_tier", "prompt_cache_key", "keep_alive", "options",
    "cache_prompt", "id_slot", "safety_identifier", "add_special_tokens", "modalities", NULL};
static const char *const refused_fields[] = {
    "best_of", "typical_p", "suffix", "mirostat", "dry_multiplier", "xtc_probability", "n_discard",
    "n_keep", "lora", "audio", "functions", "function_call", "images", "image_data", NULL};

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

static int read_field(const field_row *f, const json *j, uint32_t v, params *p, api_error *x) {
    void *to = (char *)p + f->at;
    if (f->kind == FLAG) {
        if (json_typeof(j, v) != JSON_TRUE && json_typeof(j, v) != JSON_FALSE)
            return wrong(x, f->name, "%s: wanted true or false", f->name);
        *(bool *)to = json_typeof(j, v) == JSON_TRUE;
    } else if (!read_real(j, v, f->min, f->max, f->kind == WHOLE, to))
        return wrong(x, f->name, "%s: wanted a %snumber from %.16g to %.16g", f->name,
                     f->kind == WHOLE ? "whole " : "", f->min, f->max);
    return MEDRUN_OK;
}

/* All fields that the table reads by itself; the names of unknown ones go to IGNORED. */
static int read_fields_of(const server *sv, const json *j, params *p, buffer *ignored,
                          api_error *x) {
    uint32_t c = 1;
    for (uint32_t i = 0; i < j->nodes[0].count; i += 2, c = j->nodes[c + 1].next) {
        const field_row *f = NULL;
        size_t n = j->nodes[c].end - j->nodes[c].start;
        const char *name = j->text + j->nodes[c].start;
        for (size_t k = 0; !f && k < sizeof fields / sizeof *fields; k++)
            if (json_is(j, c, fields[k].name)) f = &fields[k];
        bool null = json_typeof(j, c + 1) == JSON_NULL, skip = !f;
        int refused = one_of(refused_fields, j, c);
        if (null || one_of(own_fields, j, c) >= 0) continue;
        if (refused >= 0) {
            bool one = refused < 2 && json_is_type(j, c + 1, JSON_NUMBER) &&
                       json_number(j, c + 1) <= 1;
            skip = !one && json_truthy(j, c + 1);
            if (skip && !sv->lenient)
                wrong(x, refused_fields[refused], "not supported: %s", refused_fields[refused]);
        } else if (f) read_field(f, j, c + 1, p, x);
        else if (one_of(idle_fields, j, c) >= 0) skip = false;
        if (skip && is_http_token((span){name, n}) && ignored->n + n < 1000)
            buffer_printf(ignored, "%s%.*s", ignored->n ? ", " : "", (int)n, name);
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
    if (n > g->longest_stop) g->longest_stop = n;
    return MEDRUN_OK;
}

static int read_stops_of(const server *sv, job *g, const json *j, api_error *x) {
    uint32_t v = field_of(j, 0, "stop"), ids = field_of(j, 0, "stop_token_ids"), c = v + 1;
    if (json_is_type(j, v, JSON_ARRAY))
        for (uint32_t i = 0; i < j->nodes[v].count && !x->e.code; i++, c = j->nodes[c].next)
            add_stop(sv, g, j, c, x);
    else if (v != JSON_NONE) add_stop(sv, g, j, v, x);
    if (ids == JSON_NONE) return x->e.code;
    if (!json_is_type(j, ids, JSON_ARRAY))
        return wrong(x, "stop_token_ids", "stop_token_ids: wanted a list of ids");
    c = ids + 1;
    for (uint32_t i = 0; i < j->nodes[ids].count; i++, c = j->nodes[c].next) {
        double d;
        if (!read_real(j, c, 0, sv->info.vocab_size - 1, true, &d))
            return wrong(x, "stop_token_ids", "stop_token_ids: wanted ids from 0 to %d",
                         sv->info.vocab_size - 1);
        int32_t id = (int32_t)d;
        buffer_add(&g->stop_ids, &id, sizeof id);
    }
    return x->e.code;
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
    uint32_t v = field_of(j, 0, "logit_bias"), c = v + 1;
    if (v == JSON_NONE) return x->e.code;
    bool object = json_typeof(j, v) == JSON_OBJECT;
    if (!object && json_typeof(j, v) != JSON_ARRAY)
        return wrong(x, "logit_bias", "logit_bias: wanted {\"id\": number}");
    for (uint32_t i = 0; i < j->nodes[v].count && !x->e.code; i += object ? 2 : 1) {
        uint32_t key = object ? c : c + 1, value = object ? c + 1 : JSON_NONE;
        bool pair = object || (json_typeof(j, c) == JSON_ARRAY && j->nodes[c].count == 2);
        if (!pair) return wrong(x, "logit_bias", "logit_bias: wanted [[id, number], ...]");
        if (!object) value = j->nodes[key].next;
        add_bias(sv, g, j, key, value, x);
        c = object ? j->nodes[value].next : j->nodes[c].next;
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
    if (v != JSON_NONE && json_typeof(j, v) != JSON_TRUE && json_typeof(j, v) != JSON_FALSE)
        return wrong(x, "logprobs", "logprobs: wanted true or false");
    bool on = json_is_type(j, v, JSON_TRUE);
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

/* The job's last prompt ends here. */
static int end_prompt(const server *sv, job *g, api_error *x) {
    size_t at = g->ids.n / sizeof(int32_t), before = 0;
    if (g->n_prompts) memcpy(&before, g->ends.data + (g->n_prompts - 1) * sizeof before,
                             sizeof before);
    size_t n = at - before;
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

static int add_id_prompt(const server *sv, job *g, const json *j, uint32_t v, api_error *x) {
    uint32_t c = v + 1;
    for (uint32_t i = 0; i < j->nodes[v].count; i++, c = j->nodes[c].next) {
        double d;
        if (!read_real(j, c, 0, sv->info.vocab_size - 1, true, &d))
            return wrong(x, "prompt", "prompt: wanted ids from 0 to %d", sv->info.vocab_size - 1);
        int32_t id = (int32_t)d;
        buffer_add(&g->ids, &id, sizeof id);
    }
    return end_prompt(sv, g, x);
}

/* A text, texts, ids, or lists of ids. */
static int read_prompts(const server *sv, job *g, const json *j, api_error *x) {
    uint32_t v = field_of(j, 0, "prompt"), c = v + 1;
    if (v == JSON_NONE) return wrong(x, "prompt", "prompt: is missing");
    if (json_is_type(j, v, JSON_STRING)) return add_text_prompt(sv, g, j, v, x);
    if (!json_is_type(j, v, JSON_ARRAY) || !j->nodes[v].count)
        return wrong(x, "prompt", "prompt: wanted a text, a list of texts or a list of ids");
    if (json_is_type(j, c, JSON_NUMBER)) return add_id_prompt(sv, g, j, v, x);
    if (j->nodes[v].count > MAX_PROMPTS)
        return wrong(x, "prompt", "prompt: found %u, wanted at most %d", j->nodes[v].count,
                     MAX_PROMPTS);
    for (uint32_t i = 0; i < j->nodes[v].count && !x->e.code; i++, c = j->nodes[c].next) {
        if (json_is_type(j, c, JSON_STRING)) add_text_prompt(sv, g, j, c, x);
        else if (json_is_type(j, c, JSON_ARRAY)) add_id_prompt(sv, g, j, c, x);
        else wrong(x, "prompt", "prompt: wanted a text, a list of texts or a list of ids");
    }
    return x->e.code;
}

/* ---- conversations -------------------------------------------------------------------------- */

/* A content as one JSON string: OpenAI's parts of type text are joined. */
static int write_content(buffer *b, const json *j, uint32_t v, api_error *x) {
    buffer text = {0};
    if (json_is_type(j, v, JSON_STRING)) json_unescape(j, v, &text);
    else if (json_is_type(j, v, JSON_ARRAY)) {
        uint32_t c = v + 1;
        for (uint32_t i = 0; i < j->nodes[v].count && !x->e.code; i++, c = j->nodes[c].next) {
            uint32_t part = json_get(j, c, "text");
            if (!json_is(j, json_get(j, c, "type"), "text") || !json_is_type(j, part, JSON_STRING))
                wrong(x, "messages", "messages: content: only parts of type text");
            else json_unescape(j, part, &text);
        }
    } else wrong(x, "messages", "messages: content: wanted a text");
    quote(b, text.data, text.n);
    b->failed |= text.failed;
    buffer_free(&text);
    return x->e.code;
}

/* The calls of an assistant's message; their arguments must parse. */
static int write_calls(const server *sv, buffer *b, const json *j, uint32_t v, api_error *x) {
    bool as_text = tool_form_of(sv->chat)->arguments_as_text;
    uint32_t c = v + 1;
    if (!json_is_type(j, v, JSON_ARRAY) || !sv->chat->takes_tools)
        return wrong(x, "messages", "messages: tool_calls: %s", sv->chat->takes_tools ?
                     "wanted a list" : "this model's template has no place for them");
    buffer_text(b, ",\"tool_calls\":[");
    for (uint32_t i = 0; i < j->nodes[v].count && !x->e.code; i++, c = j->nodes[c].next) {
        uint32_t f = json_get(j, c, "function"), name = json_get(j, f, "name");
        uint32_t arguments = json_get(j, f, "arguments");
        buffer text = {0};
        json inner = {0};
        medrun_error why = {0};
        if (!json_is_type(j, name, JSON_STRING) || !json_is_type(j, arguments, JSON_STRING))
            wrong(x, "messages", "messages: tool_calls: wanted a name, and arguments as text");
        else json_unescape(j, arguments, &text);
        if (!x->e.code && json_parse(&inner, chars_of(&text), text.n, &why))
            wrong(x, "messages", "messages: tool_calls: arguments: %s", why.text);
        json_free(&inner);
        if (!x->e.code) {
            buffer_printf(b, "%s{\"type\":\"function\",\"function\":{\"name\":\"%.*s\","
                          "\"arguments\":", i ? "," : "",
                          (int)(j->nodes[name].end - j->nodes[name].start),
                          j->text + j->nodes[name].start);
            if (as_text) quote(b, text.data, text.n);
            else buffer_add(b, text.data, text.n);
            buffer_text(b, "}}");
        }
        b->failed |= text.failed;
        buffer_free(&text);
    }
    buffer_text(b, "]");
    return x->e.code;
}

/* The first N messages of list V as the JSON that tool_calls.c reads. */
static int write_messages(const server *sv, buffer *b, const json *j, uint32_t v, uint32_t n,
                          api_error *x) {
    uint32_t c = v + 1;
    buffer_text(b, "[");
    for (uint32_t i = 0; i < n && !x->e.code; i++, c = j->nodes[c].next) {
        uint32_t role = json_get(j, c, "role"), content = field_of(j, c, "content");
        uint32_t calls = field_of(j, c, "tool_calls");
        if (!json_is_type(j, role, JSON_STRING))
            return wrong(x, "messages", "messages: wanted a role in each");
        if (calls != JSON_NONE && json_is_type(j, calls, JSON_ARRAY) && !j->nodes[calls].count)
            calls = JSON_NONE;
        bool developer = json_is(j, role, "developer");
        buffer_printf(b, "%s{\"role\":\"%.*s\"", i ? "," : "",
                      developer ? 6 : (int)(j->nodes[role].end - j->nodes[role].start),
                      developer ? "system" : j->text + j->nodes[role].start);
        if (content != JSON_NONE || calls == JSON_NONE ||
            tool_form_of(sv->chat)->content_needed) {
            buffer_text(b, ",\"content\":");
            if (content == JSON_NONE && calls != JSON_NONE) buffer_text(b, "\"\"");
            else write_content(b, j, content, x);
        }
        if (calls != JSON_NONE) write_calls(sv, b, j, calls, x);
        buffer_text(b, "}");
    }
    buffer_text(b, "]");
    return b->failed ? out_of_memory(&x->e, b->n) : x->e.code;
}

/* A whole conversation, the answer opened. LAST is the text of an assistant's message that the
 * answer goes on from, or NULL. */
static int render_messages(const server *sv, const char *text, size_t n, const buffer *tools,
                           bool think, bool open, const buffer *last, bool as_text, buffer *out,
                           medrun_error *e) {
    json j = {0};
    tool_list list = {0};
    medrun_chat_options o = {.think = think && sv->chat->takes_think,
                             .tools = tools->n ? (const char *)tools->data : NULL,
                             .n_tools = tools->n};
    chat_writer w = {sv->chat, sv->t, &o, as_text, tools_kinds(sv->chat), .out = out, .e = e};
    if (!json_parse(&j, text, n, e) &&
        !tools_messages(sv->chat, &j, 0, "messages", tools->n > 0, &list, e)) {
        chat_conversation(&w, list.m, list.n, open);
        if (last) buffer_add(as_text ? out : &w.run, last->data, last->n);
        chat_end(&w, 0);
    }
    buffer_free(&w.run);
    tool_list_free(&list);
    json_free(&j);
    return e->code;
}

/* The functions of list V as JSON. A template that wants a description of each gets an empty one
 * where there is none: OpenAI's clients leave it out. */
static void write_tools(const server *sv, buffer *b, const json *j, uint32_t v) {
    uint32_t c = v + 1;
    buffer_text(b, "[");
    for (uint32_t i = 0; i < j->nodes[v].count; i++, c = j->nodes[c].next) {
        uint32_t f = tool_function(j, c), key = f + 1;
        bool bare = json_is_type(j, f, JSON_OBJECT) && tool_form_of(sv->chat)->types &&
                    field_of(j, f, "description") == JSON_NONE;
        buffer_printf(b, "%s%s", i ? "," : "", bare ? "{\"description\":\"\"" : "");
        if (!bare) buffer_add(b, j->text + j->nodes[c].start, j->nodes[c].end - j->nodes[c].start);
        for (uint32_t k = 0; bare && k < j->nodes[f].count; k += 2, key = j->nodes[key + 1].next) {
            if (json_is(j, key, "description")) continue;
            buffer_printf(b, ",\"%.*s\":", (int)(j->nodes[key].end - j->nodes[key].start),
                          j->text + j->nodes[key].start);
            bool text = json_typeof(j, key + 1) == JSON_STRING;
            buffer_text(b, text ? "\"" : "");
            buffer_add(b, j->text + j->nodes[key + 1].start,
                       j->nodes[key + 1].end - j->nodes[key + 1].start);
            buffer_text(b, text ? "\"" : "");
        }
        buffer_text(b, bare ? "}" : "");
    }
    buffer_text(b, "]");
}

/* The conversation and the functions of request J as ids, or as text. */
static int render_request(const server *sv, const json *j, params *p, bool as_text, bool *has_tools,
                          buffer *out, api_error *x) {
    uint32_t v = field_of(j, 0, "messages"), tools = field_of(j, 0, "tools"), last = v + 1;
    uint32_t add = field_of(j, 0, "add_generation_prompt"), before = JSON_NONE;
    buffer text = {0}, shown = {0}, going_on = {0}, list = {0};
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
    if (tools != JSON_NONE && json_is_type(j, tools, JSON_ARRAY) && j->nodes[tools].count > 128)
        wrong(x, "tools", "tools: found %u, wanted at most 128", j->nodes[tools].count);
    *has_tools = tools != JSON_NONE && !none && json_truthy(j, tools);
    if (*has_tools && json_typeof(j, tools) != JSON_ARRAY)
        wrong(x, "tools", "tools: wanted a list of functions");
    if (!x->e.code && *has_tools) write_tools(sv, &list, j, tools);
    if (list.failed) out_of_memory(&x->e, list.n);
    if (!x->e.code && *has_tools &&
        tools_text(sv->chat, chars_of(&list), list.n, &shown, &x->e))
        snprintf(x->param, sizeof x->param, "tools");
    if (!x->e.code) write_messages(sv, &text, j, v, n - continues, x);
    if (!x->e.code && continues) {
        uint32_t content = field_of(j, last, "content");
        buffer quoted = {0};
        json inner = {0};
        if (!write_content(&quoted, j, content, x) &&
            !json_parse(&inner, chars_of(&quoted), quoted.n, &x->e))
            json_unescape(&inner, 0, &going_on);
        json_free(&inner);
        buffer_free(&quoted);
    }
    bool open = add == JSON_NONE || json_typeof(j, add) == JSON_TRUE;
    if (!x->e.code && render_messages(sv, chars_of(&text), text.n, &shown, p->think,
                                      open || continues, continues ? &going_on : NULL, as_text,
                                      out, &x->e))
        snprintf(x->param, sizeof x->param, "messages");
    buffer_free(&text);
    buffer_free(&shown);
    buffer_free(&going_on);
    buffer_free(&list);
    return x->e.code;
}

/* ---- answers -------------------------------------------------------------------------------- */

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
    if (is_utf8(s)) { quote(b, s.text, s.n); return; }
    buffer_text(b, "\"bytes:");
    for (size_t i = 0; i < s.n; i++) buffer_printf(b, "\\\\x%02x", (unsigned)(uint8_t)s.text[i]);
    buffer_text(b, "\"");
}

static void write_chat_token(const server *sv, buffer *b, int32_t id, double logprob) {
    span s = piece_of(sv, id);
    buffer_printf(b, "{\"id\":%d,\"token\":", id);
    quote(b, s.text, s.n);
    buffer_text(b, ",\"bytes\":[");
    for (size_t i = 0; i < s.n; i++)
        buffer_printf(b, "%s%u", i ? "," : "", (unsigned)(uint8_t)s.text[i]);
    buffer_text(b, "],\"logprob\":");
    write_number(b, logprob);
}

/* Rows FROM to TO of the chat's API: [{token, bytes, logprob, top_logprobs}]. */
static void write_chat_rows(const server *sv, buffer *b, const seq *q, size_t from, size_t to) {
    const ranked *ranks = (const ranked *)(void *)q->ranks.data;
    buffer_text(b, "[");
    for (size_t i = from; i < to; i++) {
        const token_row *r = row_of(q, i);
        if (i > from) buffer_text(b, ",");
        write_chat_token(sv, b, r->id, r->logprob);
        buffer_text(b, ",\"top_logprobs\":[");
        for (int k = 0; k < r->n_ranks; k++) {
            if (k) buffer_text(b, ",");
            write_chat_token(sv, b, ranks[i * MAX_TOP + (size_t)k].id,
                             ranks[i * MAX_TOP + (size_t)k].logprob);
            buffer_text(b, "}");
        }
        buffer_text(b, "]}");
    }
    buffer_text(b, "]");
}

/* One dictionary of the best, the token itself always among them. Where two pieces read the same,
 * the later one is told apart by its id. */
static void write_top(const server *sv, buffer *b, const token_row *r, const ranked *best) {
    bool own = false, any = false;
    buffer_text(b, "{");
    for (int k = 0; k <= r->n_ranks; k++) {
        bool last = k == r->n_ranks;
        if (last && own) break;
        int32_t id = last ? r->id : best[k].id;
        span s = piece_of(sv, id);
        bool twice = false;
        for (int i = 0; i < k; i++) {
            span t = piece_of(sv, best[i].id);
            twice |= t.n == s.n && !memcmp(t.text, s.text, s.n);
        }
        own |= id == r->id;
        if (any) buffer_text(b, ",");
        any = true;
        if (twice) buffer_printf(b, "\"id:%d\"", id);
        else write_piece_key(b, s);
        buffer_text(b, ":");
        write_number(b, last ? r->logprob : best[k].logprob);
    }
    buffer_text(b, "}");
}

/* Rows of the completions' API: four lists. */
static void write_completion_rows(const server *sv, buffer *b, const seq *q, size_t from,
                                  size_t to) {
    const ranked *ranks = (const ranked *)(void *)q->ranks.data;
    static const char *const names[] = {"tokens", "token_logprobs", "top_logprobs", "text_offset"};
    for (int list = 0; list < 4; list++) {
        buffer_printf(b, "%s\"%s\":[", list ? "," : "{", names[list]);
        for (size_t i = from; i < to; i++) {
            const token_row *r = row_of(q, i);
            if (i > from) buffer_text(b, ",");
            if (list == 0) write_piece_key(b, piece_of(sv, r->id));
            else if (list == 3) buffer_printf(b, "%zu", r->chars);
            else if (isnan(r->logprob)) buffer_text(b, "null");
            else if (list == 1) write_number(b, r->logprob);
            else write_top(sv, b, r, ranks + i * MAX_TOP);
        }
        buffer_text(b, "]");
    }
    buffer_text(b, "}");
}

static void write_logprobs(const server *sv, buffer *b, const seq *q, size_t from, size_t to) {
    if (q->job->p.top < 0) buffer_text(b, "null");
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

static double rate(double n, double time) { return time > 0 ? n / time : 0; }

static void write_timings(buffer *b, const job *g) {
    double end = g->ended > 0 ? g->ended : seconds();
    double begun = g->read > 0 ? g->read : seconds();
    double read = g->started > 0 ? begun - g->started : 0, wrote = end > begun ? end - begun : 0;
    size_t n = g->n_read - g->n_cached;
    /* the first token of an answer comes with its prompt */
    size_t later = g->n_written > g->n_seqs ? g->n_written - g->n_seqs : 0;
    buffer_printf(b, "\"timings\":{\"cache_n\":%zu,\"prompt_n\":%zu,\"prompt_ms\":%.3f,"
                  "\"prompt_per_token_ms\":%.3f,\"prompt_per_second\":%.3f,\"predicted_n\":%zu,"
                  "\"predicted_ms\":%.3f,\"predicted_per_token_ms\":%.3f,"
                  "\"predicted_per_second\":%.3f}", g->n_cached, n, 1e3 * read,
                  1e3 * rate(read, (double)n), rate((double)n, read), g->n_written, 1e3 * wrote,
                  1e3 * rate(wrote, (double)later), rate((double)later, wrote));
}

static void write_usage(buffer *b, const job *g) {
    size_t thoughts = 0;
    for (size_t i = 0; i < g->n_seqs; i++) thoughts += g->seqs[i].n_thoughts;
    buffer_printf(b, "\"usage\":{\"prompt_tokens\":%zu,\"completion_tokens\":%zu,"
                  "\"total_tokens\":%zu,\"prompt_tokens_details\":{\"cached_tokens\":%zu},"
                  "\"completion_tokens_details\":{\"reasoning_tokens\":%zu}}", g->n_read,
                  g->n_written, g->n_read + g->n_written, g->n_cached, thoughts);
}

static const char *object_of(const job *g) {
    if (g->api == API_COMPLETION) return "text_completion";
    return g->p.stream ? "chat.completion.chunk" : "chat.completion";
}

/* The beginning of every chunk, and of a whole answer. */
static void write_head(const server *sv, job *g) {
    buffer *b = &g->head;
    buffer_printf(b, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%lld,\"model\":", g->id,
                  object_of(g), g->created);
    quote_text(b, sv->name);
    buffer_printf(b, ",\"system_fingerprint\":\"%s\",\"seed\":%.0f,\"choices\":[", sv->fingerprint,
                  g->p.seed);
}

/* What a chunk says between its two ends. */
static void open_chunk(buffer *b, const seq *q) {
    buffer_text(b, "data: ");
    buffer_add(b, q->job->head.data, q->job->head.n);
    buffer_printf(b, "{\"index\":%d,", q->index);
}

static void close_chunk(buffer *b, const seq *q, bool last) {
    const job *g = q->job;
    if (last) buffer_printf(b, "\"finish_reason\":\"%s\"}]", q->finish);
    else buffer_text(b, "\"finish_reason\":null}]");
    if (last || (g->p.timings && q->opened)) {
        buffer_text(b, ",");
        write_timings(b, g);
    }
    if (g->p.include_usage) buffer_text(b, ",\"usage\":null");
    buffer_text(b, "}\n\n");
}

/* New text up to byte TO, with its rows. */
static void text_chunk(const server *sv, buffer *b, seq *q, size_t to, bool all) {
    size_t rows = rows_until(q, to, all);
    bool chat = q->job->api == API_CHAT;
    if (to == q->sent && (chat || rows == q->rows_sent)) return;
    open_chunk(b, q);
    buffer_text(b, chat ? "\"delta\":{\"content\":" : "\"text\":");
    quote(b, q->text.data + q->sent, to - q->sent);
    buffer_text(b, chat ? "},\"logprobs\":" : ",\"logprobs\":");
    write_logprobs(sv, b, q, q->rows_sent, rows);
    buffer_text(b, ",");
    close_chunk(b, q, false);
    q->sent = to;
    q->rows_sent = rows;
}

/* A call as its two chunks: who is called, then with what. */
static void call_chunks(buffer *b, const seq *q) {
    json j = {0};
    buffer whole = {0};
    medrun_error e = {0};
    buffer_text(&whole, "[");
    buffer_add(&whole, q->calls.data, q->calls.n);
    buffer_text(&whole, "]");
    if (json_parse(&j, chars_of(&whole), whole.n, &e)) b->failed = true;
    uint32_t c = 1;
    for (uint32_t i = 0; !e.code && i < j.nodes[0].count; i++, c = j.nodes[c].next) {
        uint32_t f = json_get(&j, c, "function"), name = json_get(&j, f, "name");
        uint32_t id = json_get(&j, c, "id"), arguments = json_get(&j, f, "arguments");
        for (int part = 0; part < 2; part++) {
            open_chunk(b, q);
            buffer_printf(b, "\"delta\":{\"tool_calls\":[{\"index\":%u,", i);
            if (!part)
                buffer_printf(b, "\"id\":\"%.*s\",\"type\":\"function\",\"function\":{\"name\":"
                              "\"%.*s\",\"arguments\":\"\"}}]},",
                              (int)(j.nodes[id].end - j.nodes[id].start),
                              j.text + j.nodes[id].start,
                              (int)(j.nodes[name].end - j.nodes[name].start),
                              j.text + j.nodes[name].start);
            else
                buffer_printf(b, "\"function\":{\"arguments\":\"%.*s\"}}]},",
                              (int)(j.nodes[arguments].end - j.nodes[arguments].start),
                              j.text + j.nodes[arguments].start);
            close_chunk(b, q, false);
        }
    }
    json_free(&j);
    buffer_free(&whole);
}

/* What an answer in llama.cpp's shape says of its tokens from the one at FROM on. */
static void write_llama_tokens(const server *sv, buffer *b, const seq *q, size_t from) {
    size_t n = q->made.n / 4;
    buffer_text(b, ",\"tokens\":[");
    for (size_t i = from; i < n; i++)
        buffer_printf(b, "%s%d", i > from ? "," : "", (int32_t)u32_at(q->made.data, i));
    buffer_text(b, "]");
    if (q->job->p.top < 0) return;
    buffer_text(b, ",\"completion_probabilities\":");
    write_chat_rows(sv, b, q, from, n);
}

/* llama.cpp's shape of an answer or, streamed, of its last chunk. */
static void write_llama(const server *sv, buffer *b, const seq *q, bool whole) {
    const job *g = q->job;
    buffer_printf(b, "{\"index\":%d,\"content\":", q->index);
    quote(b, whole ? q->text.data : NULL, whole ? q->text.n : 0);
    write_llama_tokens(sv, b, q, whole ? 0 : q->made.n / 4);
    bool length = !strcmp(q->finish, "length");
    buffer_text(b, ",\"stop\":true,\"model\":");
    quote_text(b, sv->name);
    buffer_printf(b, ",\"has_new_line\":%s,\"stop_type\":\"%s\",\"stopping_word\":",
                  q->text.n && memchr(q->text.data, '\n', q->text.n) ? "true" : "false",
                  length ? "limit" : q->stop_word.n ? "word" : "eos");
    quote(b, q->stop_word.text, q->stop_word.n);
    buffer_printf(b, ",\"truncated\":false,\"tokens_cached\":%zu,\"tokens_evaluated\":%zu,"
                  "\"tokens_predicted\":%zu,\"generation_settings\":{\"n_ctx\":%zu,"
                  "\"n_predict\":%.0f,\"temperature\":%.9g,\"top_k\":%.0f,\"top_p\":%.9g,"
                  "\"min_p\":%.9g,\"repeat_penalty\":%.9g,\"seed\":%.0f},", g->n_cached, g->n_read,
                  g->n_written, sv->n_ctx, g->p.max_new, g->p.temperature, g->p.top_k, g->p.top_p,
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
    buffer_text(&b, "data: ");
    if (g->api == API_LLAMA)
        buffer_text(&b, "{\"index\":0,\"content\":\"\",\"tokens\":[],\"stop\":false");
    else {
        buffer_add(&b, g->head.data, g->head.n);
        buffer_text(&b, "]");
    }
    buffer_printf(&b, ",\"prompt_progress\":{\"total\":%zu,\"cache\":%zu,\"processed\":%zu,"
                  "\"time_ms\":%.0f,\"queue\":0}", q->n_ids, q->cached, q->fed,
                  1e3 * (seconds() - g->started));
    if (g->p.timings) {
        buffer_text(&b, ",");
        write_timings(&b, g);
    }
    buffer_text(&b, "}\n\n");
    pthread_mutex_lock(&sv->lock);
    buffer_add(&g->out, b.data, b.n);
    g->out.failed |= b.failed;
    pthread_mutex_unlock(&sv->lock);
    buffer_free(&b);
}

/* What a step of one answer adds to its stream. */
static void stream_step(const server *sv, seq *q, size_t to) {
    buffer *b = &q->chunks;
    bool last = q->finish;
    if (q->job->api == API_LLAMA) {
        if (to > q->sent) {
            buffer_printf(b, "data: {\"index\":%d,\"content\":", q->index);
            quote(b, q->text.data + q->sent, to - q->sent);
            write_llama_tokens(sv, b, q, q->ids_sent);
            buffer_text(b, ",\"stop\":false}\n\n");
            q->sent = to;
            q->ids_sent = q->made.n / 4;
        }
        if (!last) return;
        buffer_text(b, "data: ");
        write_llama(sv, b, q, false);
        buffer_text(b, "\n\n");
        return;
    }
    bool chat = q->job->api == API_CHAT;
    size_t thoughts = q->thoughts.n - (last ? 0 : utf8_unfinished(q->thoughts.data, q->thoughts.n));
    if (chat && !q->opened && (to > q->sent || thoughts > 0 || last)) {
        open_chunk(b, q);
        buffer_text(b, "\"delta\":{\"role\":\"assistant\",\"content\":null},\"logprobs\":null,");
        close_chunk(b, q, false);
        q->opened = true;
    }
    if (thoughts > q->thoughts_sent) {
        open_chunk(b, q);
        buffer_text(b, "\"delta\":{\"reasoning_content\":");
        quote(b, q->thoughts.data + q->thoughts_sent, thoughts - q->thoughts_sent);
        buffer_text(b, "},\"logprobs\":null,");
        close_chunk(b, q, false);
        q->thoughts_sent = thoughts;
    }
    if (!last || chat) text_chunk(sv, b, q, to, last);
    if (!last) return;
    if (q->n_calls) call_chunks(b, q);
    size_t rows = rows_until(q, to, true);
    open_chunk(b, q);
    if (chat) buffer_text(b, "\"delta\":{},\"logprobs\":null,");
    else {
        buffer_text(b, "\"text\":");
        quote(b, q->text.data + q->sent, to - q->sent);
        buffer_text(b, ",\"logprobs\":");
        if (rows > q->rows_sent) write_logprobs(sv, b, q, q->rows_sent, rows);
        else buffer_text(b, "null");
        buffer_text(b, ",");
    }
    close_chunk(b, q, true);
}

/* One whole choice. */
static void write_choice(const server *sv, buffer *b, const seq *q) {
    bool chat = q->job->api == API_CHAT;
    size_t rows = rows_until(q, q->text.n, true);
    buffer_printf(b, "{\"index\":%d,", q->index);
    buffer_text(b, chat ? "\"message\":{\"role\":\"assistant\",\"content\":" : "\"text\":");
    if (q->n_calls && !q->text.n) buffer_text(b, "null");
    else quote(b, q->text.data, q->text.n);
    if (q->thoughts.n) {
        buffer_text(b, ",\"reasoning_content\":");
        quote(b, q->thoughts.data, q->thoughts.n);
    }
    if (q->n_calls) {
        buffer_text(b, ",\"tool_calls\":[");
        buffer_add(b, q->calls.data, q->calls.n);
        buffer_text(b, "]");
    }
    buffer_text(b, chat ? "},\"logprobs\":" : ",\"logprobs\":");
    write_logprobs(sv, b, q, 0, rows);
    buffer_printf(b, ",\"finish_reason\":\"%s\"}", q->finish);
}

/* The end of a job: the whole answer, or what closes the stream. */
static void write_end(const server *sv, const job *g, buffer *b) {
    if (!g->p.stream && g->api == API_LLAMA) {
        write_llama(sv, b, &g->seqs[0], true);
        return;
    }
    if (!g->p.stream) {
        buffer_add(b, g->head.data, g->head.n);
        for (size_t i = 0; i < g->n_seqs; i++) {
            if (i) buffer_text(b, ",");
            write_choice(sv, b, &g->seqs[i]);
        }
        buffer_text(b, "],");
        write_usage(b, g);
        buffer_text(b, ",");
        write_timings(b, g);
        buffer_text(b, "}");
        return;
    }
    if (g->p.include_usage) {
        buffer_text(b, "data: ");
        buffer_add(b, g->head.data, g->head.n);
        buffer_text(b, "],");
        write_usage(b, g);
        buffer_text(b, ",");
        write_timings(b, g);
        buffer_text(b, "}\n\n");
    }
    if (g->api != API_LLAMA) buffer_text(b, "data: [DONE]\n\n");
}

/* ---- jobs ----------------------------------------------------------------------------------- */

static void free_job(job *g) {
    if (!g) return;
    for (size_t i = 0; g->seqs && i < g->n_seqs; i++) {
        seq *q = &g->seqs[i];
        buffer *const all[] = {&q->made, &q->text, &q->thoughts, &q->call, &q->rows, &q->ranks,
                               &q->calls, &q->chunks, &q->steps};
        for (size_t k = 0; k < sizeof all / sizeof *all; k++) buffer_free(all[k]);
    }
    buffer *const all[] = {&g->ids, &g->ends, &g->stops, &g->stop_ends, &g->stop_ids, &g->bias,
                           &g->headers, &g->head, &g->out};
    for (size_t k = 0; k < sizeof all / sizeof *all; k++) buffer_free(all[k]);
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
    size_t n = (size_t)g->p.n, start = 0;
    g->n_seqs = g->n_prompts * n;
    g->seqs = new_array(g->n_seqs, sizeof *g->seqs);
    if (!g->seqs) return out_of_memory(&x->e, g->n_seqs * sizeof *g->seqs);
    for (size_t k = 0; k < g->n_seqs; k++) {
        seq *q = &g->seqs[k];
        size_t end;
        memcpy(&end, g->ends.data + k / n * sizeof end, sizeof end);
        if (k % n == 0 && k)
            memcpy(&start, g->ends.data + (k / n - 1) * sizeof start, sizeof start);
        size_t n_ids = end - start, most = sv->n_ctx - n_ids;
        if (g->p.max_new >= 0 && g->p.max_new < (double)most) most = (size_t)g->p.max_new;
        *q = (seq){.job = g, .prompt = (int)(k / n), .index = (int)k,
                   .ids = (const int32_t *)(void *)g->ids.data + start, .n_ids = n_ids,
                   .max_new = most, .first = g->api == API_CHAT || g->p.echo,
                   .random = (uint64_t)(int64_t)g->p.seed + k, .scored_from = 1,
                   .g = g->grammar};
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
        size_t n = strlen(sv->chat->stop_text);
        buffer_text(&g->stops, sv->chat->stop_text);
        buffer_add(&g->stop_ends, &g->stops.n, sizeof g->stops.n);
        if (n > g->longest_stop) g->longest_stop = n;
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
        answer_error(sv, c, 503, NULL, "no memory for the request");
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
    g->connection = c;
    const char *full = x.e.code ? NULL : submit_job(sv, g);
    if (full) x.status = strstr(full, "key") ? 429 : 503, wrong(&x, NULL, "%s", full);
    if (x.e.code) {
        if (x.e.code == MEDRUN_NO_MEMORY) x.status = 503;
        answer_wrong(sv, c, &x);
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
    buffer_text(b, "{\"id\":");
    quote_text(b, sv->name);
    buffer_printf(b, ",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"medrun\","
                  "\"max_model_len\":%zu,\"meta\":{\"n_vocab\":%d,\"n_ctx_train\":%d,\"n_embd\":%d,"
                  "\"n_params\":%llu,\"size\":%llu}}", sv->started, sv->n_ctx, i->vocab_size,
                  i->max_positions, i->hidden_size, (unsigned long long)i->parameters,
                  (unsigned long long)i->weight_bytes);
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

static void write_ids(buffer *b, const buffer *ids) {
    buffer_text(b, "[");
    for (size_t i = 0; i < ids->n / 4; i++)
        buffer_printf(b, "%s%d", i ? "," : "", (int32_t)u32_at(ids->data, i));
    buffer_text(b, "]");
}

/* A bool of the body, or what it is when absent. */
static bool flag_of(call *k, const char *name, bool standard) {
    uint32_t v = field_of(k->j, 0, name);
    if (v == JSON_NONE) return standard;
    if (json_typeof(k->j, v) != JSON_TRUE && json_typeof(k->j, v) != JSON_FALSE)
        wrong(k->x, name, "%s: wanted true or false", name);
    return json_typeof(k->j, v) == JSON_TRUE;
}

static void write_pieces(const server *sv, buffer *b, const buffer *ids) {
    buffer_text(b, "{\"tokens\":[");
    for (size_t i = 0; i < ids->n / 4; i++) {
        int32_t id = (int32_t)u32_at(ids->data, i);
        span s = piece_of(sv, id);
        buffer_printf(b, "%s{\"id\":%d,\"piece\":", i ? "," : "", id);
        if (is_utf8(s)) quote(b, s.text, s.n);
        else for (size_t n = 0; n < s.n; n++)
            buffer_printf(b, "%s%u%s", n ? "," : "[", (unsigned)(uint8_t)s.text[n],
                          n + 1 < s.n ? "" : "]");
        buffer_text(b, "}");
    }
    buffer_text(b, "]}");
}

/* vLLM's body has `prompt` or `messages`, llama.cpp's `content`. */
static void post_tokenize(call *k) {
    const server *sv = k->sv;
    uint32_t prompt = field_of(k->j, 0, "prompt"), content = field_of(k->j, 0, "content");
    bool llama = content != JSON_NONE, tools;
    bool bos = flag_of(k, llama ? "add_special" : "add_special_tokens", !llama);
    bool special = flag_of(k, "parse_special", llama), pieces = flag_of(k, "with_pieces", false);
    buffer ids = {0}, text = {0};
    params p = {0};
    uint32_t v = llama ? content : prompt;
    if (v == JSON_NONE && field_of(k->j, 0, "messages") != JSON_NONE)
        render_request(sv, k->j, &p, false, &tools, &ids, k->x);
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
        write_ids(k->out, &ids);
        if (!llama)
            buffer_printf(k->out, ",\"count\":%zu,\"max_model_len\":%zu", ids.n / 4, sv->n_ctx);
        buffer_text(k->out, "}");
    }
    buffer_free(&ids);
    buffer_free(&text);
}

static void post_detokenize(call *k) {
    const server *sv = k->sv;
    uint32_t v = field_of(k->j, 0, "tokens"), c = v + 1;
    buffer text = {0};
    bool first = true;
    if (!json_is_type(k->j, v, JSON_ARRAY)) wrong(k->x, "tokens", "tokens: wanted a list of ids");
    for (uint32_t i = 0; !k->x->e.code && i < k->j->nodes[v].count; i++) {
        double d;
        size_t n;
        if (!read_real(k->j, c, 0, sv->info.vocab_size - 1, true, &d)) {
            wrong(k->x, "tokens", "tokens: wanted ids from 0 to %d", sv->info.vocab_size - 1);
            break;
        }
        const char *piece = tokenizer_text(sv->t, (int32_t)d, true, &first, &n);
        buffer_add(&text, piece, n);
        c = k->j->nodes[c].next;
    }
    for (int i = 0; i < 2; i++) {
        buffer_text(k->out, i ? ",\"content\":" : "{\"prompt\":");
        quote(k->out, text.data, text.n);
    }
    buffer_text(k->out, "}");
    k->out->failed |= text.failed;
    buffer_free(&text);
}

static void get_tokenizer_info(call *k) {
    const server *sv = k->sv;
    int32_t ids[] = {sv->info.bos, sv->info.n_stops ? sv->info.stops[0] : -1, -1};
    static const char *const names[] = {"bos_token", "eos_token", "pad_token"};
    buffer_text(k->out, "{\"tokenizer_class\":\"medrun\"");
    for (int i = 0; i < 3; i++) {
        buffer_printf(k->out, ",\"%s\":", names[i]);
        span s = ids[i] < 0 ? (span){0} : piece_of(sv, ids[i]);
        if (ids[i] < 0) buffer_text(k->out, "null");
        else quote(k->out, s.text, s.n);
    }
    buffer_printf(k->out, ",\"model_max_length\":%zu,\"chat_template\":\"\"}", sv->n_ctx);
}

static void post_template(call *k) {
    buffer ids = {0}, text = {0};
    params p = {0};
    bool tools;
    set_think(&p, k->j);
    render_request(k->sv, k->j, &p, false, &tools, &ids, k->x);
    if (!k->x->e.code) render_request(k->sv, k->j, &p, true, &tools, &text, k->x);
    buffer_text(k->out, "{\"prompt\":");
    quote(k->out, text.data, text.n);
    buffer_text(k->out, ",\"tokens\":");
    write_ids(k->out, &ids);
    buffer_text(k->out, "}");
    buffer_free(&ids);
    buffer_free(&text);
}

static void post_input_tokens(call *k) {
    buffer ids = {0};
    params p = {0};
    bool tools;
    set_think(&p, k->j);
    render_request(k->sv, k->j, &p, false, &tools, &ids, k->x);
    buffer_printf(k->out, "{\"object\":\"response.input_tokens\",\"input_tokens\":%zu}", ids.n / 4);
    buffer_free(&ids);
}

static void get_props(call *k) {
    const server *sv = k->sv;
    params p = standard_params(sv, API_CHAT);
    const char *slash = strrchr(sv->m->path, '/');
    buffer_printf(k->out, "{\"default_generation_settings\":{\"n_ctx\":%zu,\"params\":{"
                  "\"temperature\":%.9g,\"top_k\":%.0f,\"top_p\":%.9g,\"min_p\":%.9g,"
                  "\"repeat_penalty\":%.9g}},\"total_slots\":%zu,\"model_path\":", sv->n_ctx,
                  p.temperature, p.top_k, p.top_p, p.min_p, p.repeat, sv->n_slots);
    quote_text(k->out, slash ? slash + 1 : sv->m->path);
    buffer_printf(k->out, ",\"chat_template\":\"%s\",\"build_info\":\"medrun %s\","
                  "\"checkpoint_sha256\":\"%s\",\"kernels\":\"%s\",\"kv\":\"%s\",\"strict\":%s,"
                  "\"tools\":%s,\"model\":", sv->chat ? sv->chat->name : MEDRUN_UNKNOWN,
                  MEDRUN_VERSION, sv->hash, sv->info.kernels, kv_names[sv->kv],
                  sv->strict ? "true" : "false",
                  sv->chat && sv->chat->takes_tools ? "true" : "false");
    quote_text(k->out, sv->name);
    buffer_text(k->out, ",\"notice\":");
    quote_text(k->out, sv->info.notice);
    buffer_text(k->out, "}");
}

static void get_slots(call *k) {
    server *sv = k->sv;
    bool idle = false;
    pthread_mutex_lock(&sv->lock);
    buffer_text(k->out, "[");
    for (size_t i = 0; i < sv->n_slots; i++) {
        const slot_view *v = &sv->view[i];
        idle |= !v->busy;
        buffer_printf(k->out, "%s{\"id\":%zu,\"n_ctx\":%zu,\"is_processing\":%s,\"n_prompt\":%zu,"
                      "\"n_cached\":%zu,\"n_decoded\":%zu,\"key\":", i ? "," : "", i, sv->n_ctx,
                      v->busy ? "true" : "false", v->n_prompt, v->n_cached, v->n_new);
        quote_text(k->out, v->key);
        buffer_text(k->out, "}");
    }
    pthread_mutex_unlock(&sv->lock);
    buffer_text(k->out, "]");
    if (!idle && span_is(k->c->request.query, "fail_on_no_slot=1")) {
        k->x->status = 503;
        wrong(k->x, NULL, "no slot is idle");
    }
}

static const double bounds[11] = {0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60};

static void write_metric(buffer *b, const char *name, const char *kind, const char *help,
                         double value) {
    buffer_printf(b, "# HELP %s %s\n# TYPE %s %s\n%s %.17g\n", name, help, name, kind, name, value);
}

static void write_histogram(buffer *b, const char *name, const char *help, const uint64_t *counts,
                            double sum) {
    buffer_printf(b, "# HELP %s %s\n# TYPE %s histogram\n", name, help, name);
    for (int i = 0; i < 11; i++)
        buffer_printf(b, "%s_bucket{le=\"%g\"} %llu\n", name, bounds[i],
                      (unsigned long long)counts[i]);
    buffer_printf(b, "%s_bucket{le=\"+Inf\"} %llu\n%s_sum %.9g\n%s_count %llu\n", name,
                  (unsigned long long)counts[11], name, sum, name, (unsigned long long)counts[11]);
}

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
        write_metric(k->out, all[i].name, all[i].kind, all[i].help, all[i].value);
    buffer_printf(k->out, "# HELP medrun:rejected_total Requests refused for lack of room.\n"
                  "# TYPE medrun:rejected_total counter\nmedrun:rejected_total{reason=\"queue\"} "
                  "%llu\nmedrun:rejected_total{reason=\"key\"} %llu\n",
                  (unsigned long long)m.rejected_queue, (unsigned long long)m.rejected_key);
    write_histogram(k->out, "medrun:time_to_first_token_seconds", "From arrival.", m.first,
                    m.first_sum);
    write_histogram(k->out, "medrun:inter_token_seconds", "Between two tokens.", m.gap, m.gap_sum);
    write_histogram(k->out, "medrun:queue_seconds", "Before a session was free.", m.queued,
                    m.queued_sum);
    write_histogram(k->out, "medrun:e2e_seconds", "From arrival to the end.", m.whole, m.whole_sum);
    write_histogram(k->out, "medrun:mask_seconds", "To make a mask.", m.mask, m.mask_sum);
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
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    static const char *const tags[2][2] = {{"<script>", "</script>"}, {"<style>", "</style>"}};
    buffer_text(b, "Content-Security-Policy: default-src 'none'; connect-src 'self'; base-uri "
                "'none'; form-action 'none'; frame-ancestors 'none'; "
                "require-trusted-types-for 'script'; trusted-types 'none'");
    for (int i = 0; i < 2; i++) {
        const char *from = strstr((const char *)page, tags[i][0]);
        const char *to = from ? strstr(from, tags[i][1]) : NULL;
        uint8_t digest[33] = {0};
        if (!to) continue;
        from += strlen(tags[i][0]);
        sha256_of(from, (size_t)(to - from), digest);
        buffer_printf(b, "; %s-src 'sha256-", i ? "style" : "script");
        for (int k = 0; k < 33; k += 3) {
            uint32_t v = (uint32_t)digest[k] << 16 | (uint32_t)digest[k + 1] << 8 | digest[k + 2];
            for (int d = 0; d < (k < 30 ? 4 : 3); d++)
                buffer_printf(b, "%c", digits[v >> (18 - 6 * d) & 63]);
        }
        buffer_text(b, "='");
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
        answer_error(sv, c, 421, NULL, "the Host is not one of this server's; see --allow-host");
    else if (r->origin.text && !origin_is_ours(sv, r->origin, r->host))
        answer_error(sv, c, 403, NULL, "pages of other sites may not ask here; see --cors-origin");
    else if (cross && span_is(r->method, "POST") &&
             (r->type.n < n || strncasecmp(r->type.text, "application/json", n)))
        answer_error(sv, c, 415, NULL, "a page must send application/json");
    else return true;
    return false;
}

/* A path that nobody has, or has with another method. */
static void answer_unknown(server *sv, connection *c, const char *allowed) {
    char more[64];
    api_error x = {.status = allowed ? 405 : 404};
    buffer b = {0};
    char path[48];
    wrong(&x, NULL, allowed ? "this path takes %s" : "no such path; chats go to %s",
          allowed ? allowed : "POST /v1/chat/completions");
    snprintf(more, sizeof more, allowed ? "Allow: %s\r\n" : "%s", allowed ? allowed : "");
    write_error(&b, &x);
    answer(sv, c, x.status, JSON_TYPE, more, &b);
    log_line(sv, "-", "-", path_of(c, path), x.status, NULL);
    buffer_free(&b);
}

static void run_route(server *sv, connection *c, const route *r, span body) {
    json j = {0};
    buffer out = {0};
    api_error x = {0};
    char path[48];
    const api_key *key = find_key(sv, c->request.key);
    if (sv->n_keys && !r->open && !key) {
        answer_error(sv, c, 401, NULL, "this server wants a key: Authorization: Bearer KEY");
        return;
    }
    bool post = r->method[0] == 'P';
    call k = {sv, c, &j, key, {0}, &out, &x};
    if (r->more) k.rest = (span){c->request.path.text + strlen(r->path),
                                 c->request.path.n - strlen(r->path)};
    if (post && sv->draining) {
        x.status = 503;
        wrong(&x, NULL, "the server is ending");
    } else if (post && json_parse(&j, body.text, body.n, &x.e)) x.status = 400;
    else if (post && json_typeof(&j, 0) != JSON_OBJECT) wrong(&x, NULL, "wanted a JSON object");
    else r->run(&k);
    if (x.e.code && !c->job) answer_wrong(sv, c, &x);
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
