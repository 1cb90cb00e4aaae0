/* medrun-export: renders conversations with a model's own Jinja template, so that export_chat.c can
 * compare them with what medrun's templates write. Included by export.c.
 *
 * Only what chat templates use of Jinja is here, with transformers' settings: text, {{ }}, set, if,
 * for, macro; texts, whole numbers, lists and dictionaries; the filters, tests and methods of the
 * lists below. There are three ends: the text, a refusal (raise_exception, or an error that Python
 * would raise), or "not understood", after which nothing is known of the template. A template is a
 * stranger's: steps, depth and memory are limited. Tests: tests/20_export.c, with what jinja2 wrote
 * for tools/reference/jinja_cases.py. */

/* ---- Jinja's tokens ------------------------------------------------------------------------ */

typedef struct {
    const uint8_t *p;
    size_t n, at;
    buffer out, text;           /* text: what stands between two tags, comments aside          */
} jinja_reader;

/* The bytes of the white space at P, as Python sees it, or 0. */
static size_t jinja_space(const uint8_t *p, size_t n) {
    size_t len;
    if (!n) return 0;
    bool space = class_at(p, n, &len) == CLASS_SPACE || (p[0] >= 0x1C && p[0] < 0x20);
    return space ? len : 0;
}

static void jinja_item(buffer *out, const char *kind, const void *bytes, size_t n) {
    write_le(out, strlen(kind) + n, 4);
    buffer_text(out, kind);
    buffer_add(out, bytes, n);
}

/* Text before a tag that begins with MARK, whose next character is SIGN; LINE_START: the text
 * begins a line. A dash strips it, and a block or comment loses the blanks before it on its
 * line. */
static void jinja_text(jinja_reader *r, const uint8_t *p, size_t n, char mark, char sign,
                       bool line_start) {
    size_t line = n;
    if (sign == '-') {
        const char *text = (const char *)p;
        size_t left = n;
        trim(&text, &left);
        n = left ? (size_t)(text - (const char *)p) + left : 0;
    } else if (sign != '+' && mark != '{') {
        while (line && p[line - 1] != '\n') line--;
        size_t i = line;
        for (size_t len; i < n && (len = jinja_space(p + i, n - i)); i += len) {}
        if ((line || line_start) && i == n) n = line;
    }
    buffer_add(&r->text, p, n);
}

static void jinja_end_text(jinja_reader *r) {
    if (r->text.n) jinja_item(&r->out, "D", r->text.data, r->text.n);
    r->text.n = 0;
}

/* The end of a tag at r->at: CLOSE is its last two characters. A dash takes all white space after
 * it; blocks and comments take a line end. */
static bool jinja_close(jinja_reader *r, const char *close) {
    const uint8_t *p = r->p + r->at;
    size_t left = r->n - r->at, sign = left && (*p == '-' || (*p == '+' && *close != '}'));
    if (left < sign + 2 || memcmp(p + sign, close, 2)) return false;
    r->at += sign + 2;
    if (sign && *p == '-')
        for (size_t len; (len = jinja_space(r->p + r->at, r->n - r->at));) r->at += len;
    else if (!sign && *close != '}' && r->at < r->n && r->p[r->at] == '\n') r->at++;
    return true;
}

/* A string from its quote on; simple escapes are read. */
static bool jinja_string(jinja_reader *r) {
    static const char from[] = "nrt\\'\"\n", to[] = "\n\r\t\\'\"\n";
    buffer b = {0};
    uint8_t quote = r->p[r->at++];
    for (; r->at < r->n && r->p[r->at] != quote; r->at++) {
        const char *plain = NULL;
        if (r->p[r->at] == '\\' && r->at + 1 < r->n) {
            plain = r->p[r->at + 1] ? strchr(from, r->p[r->at + 1]) : NULL;
            if (plain) r->at++;
            else buffer_add(&b, r->p + r->at++, 1);
        }
        buffer_add(&b, plain ? (const void *)&to[plain - from] : r->p + r->at, 1);
    }
    jinja_item(&r->out, "S", b.data, b.n);
    r->out.failed |= b.failed;
    buffer_free(&b);
    return r->at++ < r->n;
}

/* message['role'] is message.role: no other meaning is possible for these two. */
static bool jinja_field(jinja_reader *r) {
    static const char *const spellings[] = {"['role']", "[\"role\"]", "['content']",
                                            "[\"content\"]"};
    for (size_t i = 0; i < 4; i++) {
        size_t n = strlen(spellings[i]);
        if (r->n - r->at < n || memcmp(r->p + r->at, spellings[i], n)) continue;
        jinja_item(&r->out, "T", ".", 1);
        jinja_item(&r->out, "T", spellings[i] + 2, n - 4);
        return r->at += n, true;
    }
    return false;
}

static bool is_jinja_word(uint8_t c) { return isalnum(c) || c == '_' || c >= 0x80; }

/* The tokens of a tag up to its end CLOSE, which does not count within brackets. */
static bool jinja_tag(jinja_reader *r, const char *close) {
    int depth = 0;
    while (r->at < r->n) {
        const uint8_t *p = r->p + r->at;
        size_t len = jinja_space(p, r->n - r->at);
        if (len) { r->at += len; continue; }
        if (!depth && jinja_close(r, close)) return true;
        if (*p == '"' || *p == '\'') {
            if (!jinja_string(r)) return false;
            continue;
        }
        if (*p == '[' && jinja_field(r)) continue;
        depth += (strchr("([{", *p) && *p) - (strchr(")]}", *p) && *p);
        bool word = is_jinja_word(*p), number = isdigit(*p);
        for (len = 1; word && r->at + len < r->n && is_jinja_word(p[len]) &&
                      (!number || isdigit(p[len])) &&
                      !jinja_space(p + len, r->n - r->at - len);) len++;
        jinja_item(&r->out, "T", p, len);
        r->at += len;
    }
    return false;
}

/* Reads to the end; false where the template is not understood. */
static bool jinja_read(jinja_reader *r) {
    bool line_start = true;
    while (r->at < r->n) {
        size_t from = r->at, at = from;
        while (at + 1 < r->n && !(r->p[at] == '{' && memchr("%{#", r->p[at + 1], 3))) at++;
        if (at + 1 >= r->n) { buffer_add(&r->text, r->p + from, r->n - from); break; }
        char mark = (char)r->p[at + 1], sign = at + 2 < r->n ? (char)r->p[at + 2] : 0;
        if (sign != '-' && sign != '+') sign = 0;
        jinja_text(r, r->p + from, at - from, mark, sign, line_start);
        r->at = at + 2 + (sign != 0);
        if (mark == '#') {
            while (r->at < r->n && !jinja_close(r, "#}")) r->at++;
        } else {
            jinja_end_text(r);
            jinja_item(&r->out, mark == '%' ? "{b" : "{v", NULL, 0);
            size_t tag = r->at;
            if (!jinja_tag(r, mark == '%' ? "%}" : "}}")) return false;
            while (jinja_space(r->p + tag, r->n - tag)) tag++;
            if (mark == '%' && r->n - tag > 3 && !memcmp(r->p + tag, "raw", 3)) return false;
            jinja_item(&r->out, "}", NULL, 0);
        }
        line_start = r->p[r->at - 1] == '\n';
    }
    jinja_end_text(r);
    return !r->out.failed && !r->text.failed;
}

/* The tokens of a template into R, which the caller frees (jinja_done). */
static bool jinja_tokens(jinja_reader *r, buffer *lines, const char *text, size_t n) {
    for (size_t i = 0; i < n; i++) {                    /* line ends become one character, and   */
        bool line = text[i] == '\r' || text[i] == '\n';                 /* the last one goes     */
        i += text[i] == '\r' && i + 1 < n && text[i + 1] == '\n';
        buffer_add(lines, line ? "\n" : text + i, 1);
    }
    if (lines->n && lines->data[lines->n - 1] == '\n') lines->n--;
    *r = (jinja_reader){.p = lines->data, .n = lines->n};
    return !lines->failed && lines->n && jinja_read(r);
}

/* ---- values -------------------------------------------------------------------------------- */

enum { JINJA_UNDEFINED, JINJA_NONE, JINJA_BOOL, JINJA_NUMBER, JINJA_TEXT, JINJA_LIST, JINJA_DICT,
       JINJA_NAMESPACE, JINJA_MACRO };

typedef struct jinja_value {
    int type;
    int64_t number;             /* of a bool, too; a namespace's own; how many items there are;   */
                                /* a macro's: the token at which its parameters begin            */
    span text;
    const struct jinja_value *items;            /* of a dictionary: key, value, key, value, ...  */
} jinja_value;

typedef struct {
    int64_t owner;              /* a namespace; 0: a variable                                    */
    span name;
    jinja_value value;
} jinja_name;

typedef struct jinja_block {
    struct jinja_block *next;   /* its bytes follow                                              */
} jinja_block;

typedef struct {
    char kind;                  /* D: text; v, b: {{ or {% begins; }: it ends; S: a string; T     */
    span text;
} jinja_token;

enum { JINJA_NAMES = 256, JINJA_ARGS = 8, JINJA_DEPTH = 40, JINJA_STEPS = 1 << 20,
       JINJA_MEMORY = 1 << 24 };
enum { JINJA_RUNS, JINJA_BREAKS, JINJA_CONTINUES, JINJA_REFUSES, JINJA_LOST };

/* A template that runs. Names stand in the order in which they were set; what a loop has set goes
 * with each of its turns. */
typedef struct {
    const jinja_token *tokens;
    size_t n, at, steps, memory;
    int state, depth;           /* state: JINJA_RUNS and so on                                   */
    bool dead;                  /* an expression is only read over, for one that is not used     */
    jinja_name names[JINJA_NAMES];
    size_t n_names, scope;      /* scope: where the names of this turn of the loop begin         */
    size_t global, hidden;      /* a macro sees the first GLOBAL names, and those from HIDDEN on  */
    int64_t namespaces;
    jinja_block *blocks;
    buffer *out;
} jinja_program;

typedef struct {
    size_t n;
    span names[JINJA_ARGS];     /* empty: by place                                               */
    jinja_value values[JINJA_ARGS];
} jinja_args;

static const jinja_value jinja_undefined = {0};

/* Ends with the first failure, which is kept. */
static jinja_value jinja_stop(jinja_program *j, int state) {
    if (j->state < JINJA_REFUSES && !j->dead) j->state = state;
    return jinja_undefined;
}

/* What is not known here is not guessed, also where it is not used. */
static jinja_value jinja_lost(jinja_program *j) {
    if (j->state < JINJA_REFUSES) j->state = JINJA_LOST;
    return jinja_undefined;
}

/* Memory that lasts as long as the template runs, or NULL. */
static void *jinja_room(jinja_program *j, size_t n) {
    jinja_block *b = n < JINJA_MEMORY && (j->memory += n) < JINJA_MEMORY ?
                     MEDRUN_ALLOC(NULL, sizeof *b + n) : NULL;
    if (!b) return jinja_lost(j), NULL;
    b->next = j->blocks;
    j->blocks = b;
    return b + 1;
}

static span jinja_span(const char *text) { return (span){(const uint8_t *)text, strlen(text)}; }

static bool span_is(span a, const char *text) {
    return a.n == strlen(text) && (!a.n || !memcmp(a.p, text, a.n));
}

static bool same_span(span a, span b) { return a.n == b.n && (!a.n || !memcmp(a.p, b.p, a.n)); }

static jinja_value jinja_text_of(span text) {
    return (jinja_value){.type = JINJA_TEXT, .text = text};
}

static jinja_value jinja_number(int64_t n) {
    return (jinja_value){.type = JINJA_NUMBER, .number = n};
}

static jinja_value jinja_bool(bool b) { return (jinja_value){.type = JINJA_BOOL, .number = b}; }

/* The text in B, which is freed. */
static jinja_value jinja_keep(jinja_program *j, buffer *b) {
    uint8_t *p = b->failed ? NULL : jinja_room(j, b->n);
    span text = {p, p ? b->n : 0};
    if (b->failed) jinja_lost(j);
    if (p && b->n) memcpy(p, b->data, b->n);
    buffer_free(b);
    return jinja_text_of(text);
}

static bool jinja_true(jinja_value v) {
    if (v.type == JINJA_TEXT) return v.text.n > 0;
    return v.type == JINJA_NAMESPACE || (v.type > JINJA_NONE && v.number != 0);
}

static bool jinja_whole(jinja_value v) { return v.type == JINJA_NUMBER || v.type == JINJA_BOOL; }

static bool jinja_equal(jinja_program *j, jinja_value a, jinja_value b) {
    if (jinja_whole(a) && jinja_whole(b)) return a.number == b.number;
    if (a.type != b.type) return false;
    if (a.type == JINJA_TEXT) return same_span(a.text, b.text);
    if (a.type > JINJA_TEXT) jinja_lost(j);
    return true;
}

/* Appends V as print and ~ show it. */
static void jinja_show(jinja_program *j, buffer *to, jinja_value v) {
    if (v.type == JINJA_TEXT) buffer_add(to, v.text.p, v.text.n);
    else if (v.type == JINJA_NUMBER) buffer_printf(to, "%lld", (long long)v.number);
    else if (v.type == JINJA_BOOL) buffer_text(to, v.number ? "True" : "False");
    else if (v.type == JINJA_NONE) buffer_text(to, "None");
    else if (v.type != JINJA_UNDEFINED) jinja_lost(j);
}

/* The value of a key, or undefined. */
static jinja_value jinja_get(jinja_value dict, span key) {
    for (int64_t i = 0; dict.type == JINJA_DICT && i < dict.number; i++)
        if (same_span(dict.items[2 * i].text, key)) return dict.items[2 * i + 1];
    return jinja_undefined;
}

static jinja_name *jinja_find(jinja_program *j, int64_t owner, span name) {
    for (size_t i = j->n_names; i-- > 0;) {
        if (!owner && i >= j->global && i < j->hidden) continue;
        if (j->names[i].owner == owner && same_span(j->names[i].name, name)) return &j->names[i];
    }
    return NULL;
}

/* A name that was set before this turn of a loop is not changed, but hidden till the turn's end; a
 * namespace's is. */
static void jinja_set(jinja_program *j, int64_t owner, span name, jinja_value v) {
    jinja_name *old = jinja_find(j, owner, name);
    if (j->dead) return;
    if (old && (owner || old >= j->names + j->scope)) old->value = v;
    else if (j->n_names == JINJA_NAMES) jinja_lost(j);
    else j->names[j->n_names++] = (jinja_name){owner, name, v};
}

/* Begins a part that has names of its own; the result is for leave_scope. */
static size_t enter_scope(jinja_program *j) {
    size_t was = j->scope;
    if (!was) j->global = j->n_names;
    j->scope = j->n_names;
    return was;
}

/* Drops the names from MARK on, but not what namespaces hold. */
static size_t drop_names(jinja_program *j, size_t mark) {
    for (size_t k = mark; k < j->n_names; k++)
        if (j->names[k].owner) j->names[mark++] = j->names[k];
    return j->n_names = mark;
}

static void leave_scope(jinja_program *j, size_t was) {
    drop_names(j, j->scope);
    j->scope = was;
}

/* ---- lists and texts ----------------------------------------------------------------------- */

static jinja_value jinja_list(jinja_program *j, int type, const jinja_value *items, size_t n) {
    size_t values = type == JINJA_DICT ? 2 * n : n;
    jinja_value *copy = jinja_room(j, values * sizeof *copy);
    if (copy && n) memcpy(copy, items, values * sizeof *copy);
    return (jinja_value){.type = type, .number = copy ? (int64_t)n : 0, .items = copy};
}

/* Text is cut by bytes here, which is by characters only where all are ASCII. */
static bool is_ascii(span text) {
    for (size_t i = 0; i < text.n; i++) if (text.p[i] >= 0x80) return false;
    return true;
}

/* What V has, item by item, as a list. */
static jinja_value jinja_items(jinja_program *j, jinja_value v) {
    if (v.type == JINJA_LIST) return v;
    if (v.type == JINJA_UNDEFINED) return (jinja_value){.type = JINJA_LIST};
    if (v.type != JINJA_DICT) {
        if (v.type == JINJA_TEXT) jinja_lost(j);
        return jinja_stop(j, JINJA_REFUSES);
    }
    jinja_value *keys = jinja_room(j, (size_t)v.number * sizeof *keys);
    for (int64_t i = 0; keys && i < v.number; i++) keys[i] = v.items[2 * i];
    return (jinja_value){.type = JINJA_LIST, .number = keys ? v.number : 0, .items = keys};
}

static int64_t jinja_length(jinja_program *j, jinja_value v) {
    if (v.type == JINJA_TEXT && !is_ascii(v.text)) jinja_lost(j);
    if (v.type == JINJA_TEXT) return (int64_t)v.text.n;
    if (v.type == JINJA_UNDEFINED) return 0;
    if (v.type == JINJA_LIST || v.type == JINJA_DICT) return v.number;
    jinja_stop(j, JINJA_REFUSES);
    return 0;
}

/* V[FROM:TO:STEP], STEP 1 or -1; what is undefined was not said. */
static jinja_value jinja_slice(jinja_program *j, jinja_value v, jinja_value from, jinja_value to,
                               int64_t step) {
    int64_t n = jinja_length(j, v), low = from.number, high = to.number;
    bool whole = from.type == JINJA_UNDEFINED && to.type == JINJA_UNDEFINED;
    if (step != 1 && !(step == -1 && whole && v.type == JINJA_LIST)) return jinja_lost(j);
    if (from.type == JINJA_UNDEFINED) low = 0;
    if (to.type == JINJA_UNDEFINED) high = n;
    if (low < 0) low = low + n < 0 ? 0 : low + n;
    if (high < 0) high += n;
    if (high > n) high = n;
    if (low > high) low = high = 0;
    if (v.type == JINJA_TEXT)
        return jinja_text_of((span){v.text.p + low, (size_t)(high - low)});
    if (v.type != JINJA_LIST) return jinja_stop(j, JINJA_REFUSES);
    jinja_value part = {.type = JINJA_LIST, .number = high - low, .items = v.items + low};
    if (step == 1) return part;
    jinja_value *turned = jinja_room(j, (size_t)n * sizeof *turned);
    for (int64_t i = 0; turned && i < n; i++) turned[i] = v.items[n - 1 - i];
    return (jinja_value){.type = JINJA_LIST, .number = turned ? n : 0, .items = turned};
}

/* V[KEY] and V.KEY. */
static jinja_value jinja_index(jinja_program *j, jinja_value v, jinja_value key) {
    if (v.type == JINJA_UNDEFINED) return jinja_stop(j, JINJA_REFUSES);
    if (v.type == JINJA_MACRO) return jinja_lost(j);
    if (v.type == JINJA_NAMESPACE) {
        jinja_name *name = jinja_find(j, v.number, key.text);
        return name ? name->value : jinja_undefined;
    }
    if (v.type == JINJA_DICT && key.type == JINJA_TEXT) return jinja_get(v, key.text);
    if (!jinja_whole(key) || (v.type != JINJA_LIST && v.type != JINJA_TEXT)) return jinja_undefined;
    int64_t n = jinja_length(j, v), i = key.number < 0 ? key.number + n : key.number;
    if (i < 0 || i >= n) return jinja_undefined;
    return v.type == JINJA_LIST ? v.items[i] : jinja_text_of((span){v.text.p + i, 1});
}

/* Where PART begins in TEXT from AT on, or TEXT's length. */
static size_t span_find(span text, size_t at, span part) {
    for (; at + part.n <= text.n; at++)
        if (!part.n || !memcmp(text.p + at, part.p, part.n)) return at;
    return text.n;
}

static bool jinja_holds(jinja_program *j, jinja_value in, jinja_value v) {
    if (in.type == JINJA_TEXT && v.type == JINJA_TEXT)
        return !v.text.n || span_find(in.text, 0, v.text) < in.text.n;
    bool found = false;
    if (in.type == JINJA_TEXT) jinja_stop(j, JINJA_REFUSES);
    else in = jinja_items(j, in);
    for (int64_t i = 0; in.type == JINJA_LIST && i < in.number && !found; i++)
        found = jinja_equal(j, in.items[i], v);
    return found;
}

/* Python's strip (SIDES 3), lstrip (1), rstrip (2); of white space, or of the characters in SET. */
static span jinja_strip(span text, int sides, const jinja_value *set) {
    const char *p = (const char *)text.p;
    size_t n = text.n, start = 0;
    if (!set) trim(&p, &n);
    else {
        while (start < n && memchr(set->text.p, text.p[start], set->text.n)) start++;
        while (n > start && memchr(set->text.p, text.p[n - 1], set->text.n)) n--;
        p += start, n -= start;
    }
    if (!n) return (span){text.p, 0};
    const uint8_t *from = sides & 1 ? (const uint8_t *)p : text.p;
    const uint8_t *end = sides & 2 ? (const uint8_t *)p + n : text.p + text.n;
    return (span){from, (size_t)(end - from)};
}

static jinja_value jinja_replace(jinja_program *j, span text, span from, span to) {
    buffer b = {0};
    if (!from.n) return jinja_lost(j);
    for (size_t at = 0, next; at < text.n; at = next + from.n) {
        next = span_find(text, at, from);
        buffer_add(&b, text.p + at, next - at);
        if (next + from.n > text.n) break;
        buffer_add(&b, to.p, to.n);
    }
    return jinja_keep(j, &b);
}

static jinja_value jinja_split(jinja_program *j, span text, span by) {
    jinja_value parts[64];
    size_t n = 0, at = 0;
    if (!by.n) return jinja_lost(j);
    for (size_t next; n < 64; at = next + by.n) {
        next = span_find(text, at, by);
        bool last = next + by.n > text.n;
        parts[n++] = jinja_text_of((span){text.p + at, (last ? text.n : next) - at});
        if (last) return jinja_list(j, JINJA_LIST, parts, n);
    }
    return jinja_lost(j);
}

static jinja_value jinja_join(jinja_program *j, jinja_value list, span by) {
    buffer b = {0};
    list = jinja_items(j, list);
    for (int64_t i = 0; i < list.number; i++) {
        if (i) buffer_add(&b, by.p, by.n);
        jinja_show(j, &b, list.items[i]);
    }
    return jinja_keep(j, &b);
}

/* upper, lower, capitalize, title. */
static jinja_value jinja_case(jinja_program *j, span text, const char *how) {
    buffer b = {0};
    if (!is_ascii(text)) jinja_lost(j);
    for (size_t i = 0; i < text.n; i++) {
        bool first = !i || (*how == 't' && !isalpha(text.p[i - 1]));
        bool up = *how == 'u' || (*how != 'l' && first);
        char c = (char)(up ? toupper(text.p[i]) : tolower(text.p[i]));
        buffer_add(&b, &c, 1);
    }
    return jinja_keep(j, &b);
}

/* ---- filters, methods, tests, functions ---------------------------------------------------- */

/* Argument I, or undefined. */
static jinja_value jinja_arg(const jinja_args *a, size_t i) {
    return i < a->n ? a->values[i] : jinja_undefined;
}

/* What filters and methods of texts have in common; found in NAMES, or *KNOWN is false. */
static jinja_value jinja_text_call(jinja_program *j, span text, span name, const jinja_args *a,
                                   bool *known) {
    static const char *const strips[] = {"lstrip", "rstrip", "strip"};
    static const char *const cases[] = {"upper", "lower", "capitalize", "title"};
    jinja_value first = jinja_arg(a, 0), second = jinja_arg(a, 1);
    bool texts = first.type == JINJA_TEXT;
    for (int i = 0; i < 3; i++)
        if (span_is(name, strips[i]) && (!a->n || (texts && is_ascii(first.text))))
            return jinja_text_of(jinja_strip(text, i + 1, a->n ? &first : NULL));
    for (size_t i = 0; i < 4; i++)
        if (span_is(name, cases[i])) return jinja_case(j, text, cases[i]);
    if (span_is(name, "replace") && texts && second.type == JINJA_TEXT && a->n == 2)
        return jinja_replace(j, text, first.text, second.text);
    if (span_is(name, "split") && texts && a->n == 1) return jinja_split(j, text, first.text);
    bool starts = span_is(name, "startswith"), ends = span_is(name, "endswith");
    if ((starts || ends) && texts && a->n == 1) {
        size_t n = first.text.n, left = text.n - n;
        bool same = n <= text.n && (!n || !memcmp(text.p + (ends ? left : 0), first.text.p, n));
        return jinja_bool(same);
    }
    *known = false;
    return jinja_undefined;
}

/* V.NAME(...). */
static jinja_value jinja_method(jinja_program *j, jinja_value v, span name, const jinja_args *a) {
    bool known = true;
    if (j->dead) return jinja_undefined;
    if (v.type == JINJA_UNDEFINED) return jinja_stop(j, JINJA_REFUSES);
    jinja_value found = v.type == JINJA_TEXT ? jinja_text_call(j, v.text, name, a, &known)
                                             : jinja_undefined;
    if (v.type == JINJA_TEXT && known) return found;
    if (v.type != JINJA_DICT) return jinja_lost(j);
    if (span_is(name, "get") && a->n && a->n < 3) {
        for (int64_t i = 0; i < v.number; i++)
            if (same_span(v.items[2 * i].text, a->values[0].text)) return v.items[2 * i + 1];
        return a->n == 2 ? a->values[1] : (jinja_value){.type = JINJA_NONE};
    }
    if (span_is(name, "keys")) return jinja_items(j, v);
    if (!span_is(name, "items")) return jinja_lost(j);
    jinja_value *pairs = jinja_room(j, (size_t)v.number * sizeof *pairs);
    for (int64_t i = 0; pairs && i < v.number; i++)
        pairs[i] = jinja_list(j, JINJA_LIST, v.items + 2 * i, 2);
    return (jinja_value){.type = JINJA_LIST, .number = pairs ? v.number : 0, .items = pairs};
}

static bool jinja_test(jinja_program *j, jinja_value v, span name, jinja_value arg);

/* selectattr(key[, test, value]) and rejectattr; of what is false nothing is taken. */
static jinja_value jinja_select(jinja_program *j, jinja_value v, const jinja_args *a, bool wanted) {
    jinja_value all = jinja_true(v) ? jinja_items(j, v) : (jinja_value){.type = JINJA_LIST};
    jinja_value *some = jinja_room(j, (size_t)all.number * sizeof *some);
    int64_t n = 0;
    for (int64_t i = 0; some && i < all.number; i++) {
        jinja_value x = jinja_index(j, all.items[i], jinja_arg(a, 0));
        bool good = a->n < 2 ? jinja_true(x) : jinja_test(j, x, a->values[1].text, jinja_arg(a, 2));
        if (good == wanted) some[n++] = all.items[i];
    }
    return (jinja_value){.type = JINJA_LIST, .number = n, .items = some};
}

/* V | NAME(...). */
static jinja_value jinja_filter(jinja_program *j, jinja_value v, span name, const jinja_args *a) {
    bool known = true;
    buffer b = {0};
    if (j->dead) return jinja_undefined;
    if (span_is(name, "default") || span_is(name, "d")) {
        bool also_false = a->n == 2 && jinja_true(a->values[1]);
        bool missing = v.type == JINJA_UNDEFINED || (also_false && !jinja_true(v));
        return missing ? (a->n ? a->values[0] : jinja_text_of(jinja_span(""))) : v;
    }
    if (span_is(name, "length") || span_is(name, "count"))
        return jinja_number(jinja_length(j, v));
    if (span_is(name, "list") && v.type != JINJA_TEXT) return jinja_items(j, v);
    if (span_is(name, "first") && v.type == JINJA_LIST) return jinja_index(j, v, jinja_number(0));
    if (span_is(name, "last") && v.type == JINJA_LIST) return jinja_index(j, v, jinja_number(-1));
    if (span_is(name, "join"))
        return jinja_join(j, v, a->n ? a->values[0].text : jinja_span(""));
    if (span_is(name, "selectattr") && a->n) return jinja_select(j, v, a, true);
    if (span_is(name, "rejectattr") && a->n) return jinja_select(j, v, a, false);
    if (span_is(name, "safe")) return v;
    if (span_is(name, "tojson") && !a->n && (v.type == JINJA_TEXT || v.type == JINJA_NUMBER)) {
        if (v.type == JINJA_TEXT) python_quote(&b, (const char *)v.text.p, v.text.n);
        else jinja_show(j, &b, v);
        return jinja_keep(j, &b);
    }
    if (v.type != JINJA_TEXT) jinja_show(j, &b, v);     /* the others make it a text             */
    span text = v.type == JINJA_TEXT ? v.text : jinja_keep(j, &b).text;
    if (span_is(name, "string")) return jinja_text_of(text);
    if (span_is(name, "trim")) name = jinja_span("strip");
    else if (span_is(name, "strip") || span_is(name, "split")) return jinja_lost(j);
    jinja_value found = jinja_text_call(j, text, name, a, &known);
    return known ? found : jinja_lost(j);
}

/* V is NAME, whose argument is ARG. */
static bool jinja_test(jinja_program *j, jinja_value v, span name, jinja_value arg) {
    static const struct { const char *name; unsigned types; } types[] = {
        {"undefined", 1 << JINJA_UNDEFINED}, {"none", 1 << JINJA_NONE},
        {"boolean", 1 << JINJA_BOOL}, {"string", 1 << JINJA_TEXT}, {"mapping", 1 << JINJA_DICT},
        {"integer", 1 << JINJA_NUMBER}, {"number", 1 << JINJA_NUMBER | 1 << JINJA_BOOL},
        {"sequence", 1 << JINJA_TEXT | 1 << JINJA_LIST | 1 << JINJA_DICT | 1 << JINJA_UNDEFINED},
        {"iterable", 1 << JINJA_TEXT | 1 << JINJA_LIST | 1 << JINJA_DICT | 1 << JINJA_UNDEFINED}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (span_is(name, types[i].name)) return types[i].types >> v.type & 1;
    if (span_is(name, "defined")) return v.type != JINJA_UNDEFINED;
    if (span_is(name, "true")) return v.type == JINJA_BOOL && v.number;
    if (span_is(name, "false")) return v.type == JINJA_BOOL && !v.number;
    if (span_is(name, "equalto") || span_is(name, "eq") || span_is(name, "=="))
        return jinja_equal(j, v, arg);
    if (span_is(name, "ne") || span_is(name, "!=")) return !jinja_equal(j, v, arg);
    if (span_is(name, "in")) return jinja_holds(j, arg, v);
    if (!jinja_whole(v)) jinja_stop(j, JINJA_REFUSES);
    if (span_is(name, "even")) return v.number % 2 == 0;
    if (span_is(name, "odd")) return v.number % 2 != 0;
    if (span_is(name, "divisibleby") && arg.number) return v.number % arg.number == 0;
    return jinja_lost(j), false;
}

/* NAME(...), where no variable has that name. */
static jinja_value jinja_call(jinja_program *j, span name, const jinja_args *a) {
    if (j->dead) return jinja_undefined;
    if (span_is(name, "raise_exception")) return jinja_stop(j, JINJA_REFUSES);
    if (span_is(name, "namespace")) {
        jinja_value v = {.type = JINJA_NAMESPACE, .number = ++j->namespaces};
        for (size_t i = 0; i < a->n; i++) jinja_set(j, v.number, a->names[i], a->values[i]);
        return v;
    }
    jinja_value first = jinja_arg(a, 0), last = jinja_arg(a, 1);
    int64_t from = a->n == 2 ? first.number : 0, to = a->n == 2 ? last.number : first.number;
    if (!span_is(name, "range") || a->n > 2 || to - from > 1024) return jinja_lost(j);
    if (to < from) to = from;
    jinja_value *numbers = jinja_room(j, (size_t)(to - from) * sizeof *numbers);
    for (int64_t i = from; numbers && i < to; i++) numbers[i - from] = jinja_number(i);
    return (jinja_value){.type = JINJA_LIST, .number = numbers ? to - from : 0, .items = numbers};
}

/* ---- expressions --------------------------------------------------------------------------- */

static bool jinja_at(const jinja_program *j, size_t ahead, const char *word) {
    size_t i = j->at + ahead;
    return i < j->n && j->tokens[i].kind == 'T' && span_is(j->tokens[i].text, word);
}

/* Takes this word or sign, if it is next; two signs may be one, as in "==". */
static bool jinja_take(jinja_program *j, const char *word) {
    char one[2] = {word[0], 0};
    bool sign = word[1] && !isalpha((uint8_t)word[0]);
    if (!jinja_at(j, 0, sign ? one : word) || (sign && !jinja_at(j, 1, word + 1))) return false;
    j->at += 1 + sign;
    return true;
}

static bool jinja_need(jinja_program *j, const char *word) {
    return jinja_take(j, word) || (jinja_lost(j), false);
}

/* A name. */
static span jinja_take_name(jinja_program *j) {
    bool good = j->at < j->n && j->tokens[j->at].kind == 'T' &&
                is_jinja_word(j->tokens[j->at].text.p[0]) && !isdigit(j->tokens[j->at].text.p[0]);
    return good ? j->tokens[j->at++].text : (jinja_lost(j), (span){0});
}

static jinja_value jinja_expression(jinja_program *j);
static jinja_value jinja_unary(jinja_program *j, bool filters);
static jinja_value call_macro(jinja_program *j, jinja_value macro, const jinja_args *a);

/* Up to the closing bracket. */
static jinja_args jinja_read_args(jinja_program *j) {
    jinja_args a = {0};
    while (!jinja_take(j, ")") && j->state < JINJA_REFUSES) {
        if (a.n == JINJA_ARGS) { jinja_lost(j); break; }
        if (jinja_at(j, 1, "=") && !jinja_at(j, 2, "=")) {
            a.names[a.n] = jinja_take_name(j);
            jinja_need(j, "=");
        }
        a.values[a.n++] = jinja_expression(j);
        if (!jinja_take(j, ",") && !jinja_at(j, 0, ")")) jinja_lost(j);
    }
    return a;
}

/* A list up to CLOSE, or a dictionary. */
static jinja_value jinja_read_items(jinja_program *j, const char *close, bool pairs) {
    jinja_value items[32];
    size_t n = 0;
    while (!jinja_take(j, close) && j->state < JINJA_REFUSES) {
        if (n + 2 > 32) return jinja_lost(j);
        items[n++] = jinja_expression(j);
        if (pairs && jinja_need(j, ":")) items[n++] = jinja_expression(j);
        if (!jinja_take(j, ",") && !jinja_at(j, 0, close)) return jinja_lost(j);
    }
    return jinja_list(j, pairs ? JINJA_DICT : JINJA_LIST, items, pairs ? n / 2 : n);
}

static jinja_value jinja_read_string(jinja_program *j) {
    buffer b = {0};
    for (; j->at < j->n && j->tokens[j->at].kind == 'S'; j->at++)       /* neighbours are one    */
        buffer_add(&b, j->tokens[j->at].text.p, j->tokens[j->at].text.n);
    return jinja_keep(j, &b);
}

/* A variable, or a call of a function. Some names have a value in Python that we do not know. */
static jinja_value jinja_read_name(jinja_program *j) {
    static const char *const unknown[] = {
        "raise_exception", "namespace", "range", "strftime_now", "dict", "lipsum", "cycler",
        "joiner", "varargs", "kwargs", "caller", "unk_token", "pad_token", "sep_token", "cls_token",
        "mask_token", "additional_special_tokens"};
    static const struct { const char *name; int type, number; } constants[] = {
        {"true", JINJA_BOOL, 1}, {"True", JINJA_BOOL, 1}, {"false", JINJA_BOOL, 0},
        {"False", JINJA_BOOL, 0}, {"none", JINJA_NONE, 0}, {"None", JINJA_NONE, 0}};
    span name = jinja_take_name(j);
    for (size_t i = 0; i < 6; i++)
        if (span_is(name, constants[i].name))
            return (jinja_value){.type = constants[i].type, .number = constants[i].number};
    jinja_name *found = jinja_find(j, 0, name);
    if (found && (found->value.type != JINJA_MACRO || !jinja_at(j, 0, "("))) return found->value;
    if (jinja_take(j, "(")) {
        jinja_value macro = found ? found->value : jinja_undefined;     /* names may move         */
        jinja_args a = jinja_read_args(j);
        return found ? call_macro(j, macro, &a) : jinja_call(j, name, &a);
    }
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++)
        if (span_is(name, unknown[i])) return jinja_lost(j);
    return jinja_undefined;
}

static jinja_value jinja_read_primary(jinja_program *j) {
    const jinja_token *t = &j->tokens[j->at];
    if (j->at >= j->n) return jinja_lost(j);
    if (t->kind == 'S') return jinja_read_string(j);
    if (t->kind != 'T') return jinja_lost(j);
    if (jinja_take(j, "(")) {                            /* brackets, or several: a tuple         */
        jinja_value v = jinja_read_items(j, ")", false);
        return v.number == 1 ? v.items[0] : v;
    }
    if (jinja_take(j, "[")) return jinja_read_items(j, "]", false);
    if (jinja_take(j, "{")) return jinja_read_items(j, "}", true);
    if (!isdigit(t->text.p[0])) return jinja_read_name(j);
    int64_t n = 0;
    if (t->text.n > 9) return jinja_lost(j);
    for (size_t i = 0; i < t->text.n; i++) n = n * 10 + (t->text.p[i] - '0');
    j->at++;
    return jinja_number(n);
}

/* V[...], the bracket is open. */
static jinja_value jinja_read_index(jinja_program *j, jinja_value v) {
    jinja_value from = jinja_undefined, to = jinja_undefined, step = jinja_number(1);
    if (!jinja_at(j, 0, ":")) from = jinja_expression(j);
    if (jinja_take(j, "]")) return j->dead ? jinja_undefined : jinja_index(j, v, from);
    jinja_need(j, ":");
    if (!jinja_at(j, 0, ":") && !jinja_at(j, 0, "]")) to = jinja_expression(j);
    if (jinja_take(j, ":")) step = jinja_expression(j);
    jinja_need(j, "]");
    return j->dead ? jinja_undefined : jinja_slice(j, v, from, to, step.number);
}

/* What follows a value: .name, [index], a method's call. */
static jinja_value jinja_read_postfix(jinja_program *j, jinja_value v) {
    while (j->state < JINJA_REFUSES) {
        if (jinja_take(j, "[")) {
            v = jinja_read_index(j, v);
        } else if (jinja_take(j, ".")) {
            span name = jinja_take_name(j);
            if (jinja_take(j, "(")) {
                jinja_args a = jinja_read_args(j);
                v = jinja_method(j, v, name, &a);
            } else if (!j->dead) v = jinja_index(j, v, jinja_text_of(name));
        } else break;
    }
    return v;
}

/* is [not] NAME, with its argument. */
static jinja_value jinja_read_test(jinja_program *j, jinja_value v) {
    static const char *const with_argument[] = {"equalto", "eq", "ne", "in", "divisibleby"};
    bool no = jinja_take(j, "not"), wants = false;
    span name = jinja_take_name(j);
    jinja_value arg = jinja_undefined;
    for (size_t i = 0; i < 5; i++) wants |= span_is(name, with_argument[i]);
    if (wants) arg = jinja_read_postfix(j, jinja_read_primary(j));
    return j->dead ? jinja_undefined : jinja_bool(jinja_test(j, v, name, arg) != no);
}

static jinja_value jinja_unary(jinja_program *j, bool filters) {
    jinja_value v;
    if (++j->steps > JINJA_STEPS || ++j->depth > JINJA_DEPTH) return jinja_lost(j);
    if (jinja_take(j, "-")) {
        v = jinja_unary(j, false);
        if (!jinja_whole(v)) jinja_stop(j, JINJA_REFUSES);
        v = jinja_number(-v.number);
    } else v = jinja_read_postfix(j, jinja_read_primary(j));
    while (filters && j->state < JINJA_REFUSES) {
        if (jinja_take(j, "|")) {
            span name = jinja_take_name(j);
            jinja_args a = {0};
            if (jinja_take(j, "(")) a = jinja_read_args(j);
            v = jinja_filter(j, v, name, &a);
        } else if (jinja_take(j, "is")) v = jinja_read_test(j, v);
        else break;
    }
    j->depth--;
    return v;
}

/* * // % of whole numbers. */
static jinja_value jinja_product(jinja_program *j) {
    jinja_value v = jinja_unary(j, true);
    while (j->state < JINJA_REFUSES) {
        char sign = jinja_take(j, "*") ? '*' : jinja_take(j, "//") ? '/' : 0;
        if (!sign && jinja_take(j, "%")) sign = '%';
        if (jinja_at(j, 0, "/")) return jinja_lost(j);
        if (!sign) break;
        jinja_value b = jinja_unary(j, true);
        if (j->dead) continue;
        if (!jinja_whole(v) || !jinja_whole(b) || v.number >> 20 || b.number >> 20)
            return jinja_lost(j);                       /* signs and large numbers, too          */
        if (sign != '*' && !b.number) return jinja_stop(j, JINJA_REFUSES);
        v = jinja_number(sign == '*' ? v.number * b.number :
                         sign == '/' ? v.number / b.number : v.number % b.number);
    }
    return v;
}

/* a ~ b: both as texts. */
static jinja_value jinja_concat(jinja_program *j) {
    jinja_value v = jinja_product(j);
    while (jinja_take(j, "~")) {
        buffer b = {0};
        jinja_value second = jinja_product(j);
        if (j->dead) continue;
        jinja_show(j, &b, v);
        jinja_show(j, &b, second);
        v = jinja_keep(j, &b);
    }
    return v;
}

static jinja_value jinja_plus(jinja_program *j, jinja_value a, jinja_value b) {
    if (jinja_whole(a) && jinja_whole(b)) return jinja_number(a.number + b.number);
    if (a.type == JINJA_LIST && b.type == JINJA_LIST) {
        int64_t n = a.number + b.number;
        jinja_value *both = jinja_room(j, (size_t)n * sizeof *both);
        for (int64_t i = 0; both && i < n; i++)
            both[i] = i < a.number ? a.items[i] : b.items[i - a.number];
        return (jinja_value){.type = JINJA_LIST, .number = both ? n : 0, .items = both};
    }
    if (a.type != JINJA_TEXT || b.type != JINJA_TEXT) return jinja_stop(j, JINJA_REFUSES);
    buffer text = {0};
    buffer_add(&text, a.text.p, a.text.n);
    buffer_add(&text, b.text.p, b.text.n);
    return jinja_keep(j, &text);
}

static jinja_value jinja_sum(jinja_program *j) {
    jinja_value v = jinja_concat(j);
    while (j->state < JINJA_REFUSES) {
        bool plus = jinja_take(j, "+");
        if (!plus && !jinja_take(j, "-")) break;
        jinja_value b = jinja_concat(j);
        if (j->dead) continue;
        if (plus) v = jinja_plus(j, v, b);
        else if (jinja_whole(v) && jinja_whole(b)) v = jinja_number(v.number - b.number);
        else return jinja_stop(j, JINJA_REFUSES);
    }
    return v;
}

/* == != < > <= >= in, not in; a chain of them is not known. */
static jinja_value jinja_compare(jinja_program *j) {
    static const char *const signs[] = {"==", "!=", "<=", ">=", "<", ">", "in"};
    jinja_value a = jinja_sum(j);
    size_t i = 0;
    bool no = jinja_at(j, 0, "not") && jinja_at(j, 1, "in");
    if (no) j->at++;
    while (i < 7 && !jinja_take(j, signs[i])) i++;
    if (i == 7) return a;
    jinja_value b = jinja_sum(j);
    if (j->dead) return jinja_undefined;
    if (i < 2) return jinja_bool(jinja_equal(j, a, b) == (i == 0));
    if (i == 6) return jinja_bool(jinja_holds(j, b, a) != no);
    if (!jinja_whole(a) || !jinja_whole(b)) {
        if (a.type == JINJA_TEXT && b.type == JINJA_TEXT) jinja_lost(j);
        return jinja_stop(j, JINJA_REFUSES);
    }
    int order = (a.number > b.number) - (a.number < b.number);
    return jinja_bool(i == 2 ? order <= 0 : i == 3 ? order >= 0 : i == 4 ? order < 0 : order > 0);
}

static jinja_value jinja_not(jinja_program *j) {
    if (!jinja_take(j, "not")) return jinja_compare(j);
    return jinja_bool(!jinja_true(jinja_not(j)));
}

/* a and b, or with OR a or b. The second is read over where the first decides. */
static jinja_value jinja_logic(jinja_program *j, bool or) {
    jinja_value v = or ? jinja_logic(j, false) : jinja_not(j);
    while (jinja_take(j, or ? "or" : "and")) {
        bool was = j->dead, decided = jinja_true(v) == or;
        j->dead |= decided;
        jinja_value b = or ? jinja_logic(j, false) : jinja_not(j);
        j->dead = was;
        if (!decided) v = b;
    }
    return v;
}

/* a if b else c: a is first read over, then computed if b is true. */
static jinja_value jinja_expression(jinja_program *j) {
    bool was = j->dead, chosen = true;
    size_t from = j->at;
    jinja_value v = jinja_undefined;
    if (++j->depth > JINJA_DEPTH) return jinja_lost(j);
    j->dead = true;
    jinja_logic(j, true);
    j->dead = was;
    size_t behind = j->at;
    bool choice = jinja_take(j, "if");
    if (choice) chosen = jinja_true(jinja_logic(j, true)), behind = j->at;
    if (chosen && !was) j->at = from, v = jinja_logic(j, true), j->at = behind;
    if (choice && jinja_take(j, "else")) {
        j->dead |= chosen;
        jinja_value other = jinja_expression(j);
        j->dead = was;
        if (!chosen) v = other;
    }
    j->depth--;
    return v;
}

/* ---- statements ---------------------------------------------------------------------------- */

static void jinja_run(jinja_program *j);

/* The end of a tag. */
static void close_tag(jinja_program *j) {
    if (j->at < j->n && j->tokens[j->at].kind == '}') j->at++;
    else jinja_lost(j);
}

/* Goes on behind the tag, whatever is in it. */
static void skip_tag(jinja_program *j) {
    while (j->at < j->n && j->tokens[j->at].kind != '}') j->at++;
    close_tag(j);
}

/* Does the tag at this place open a part that an end closes (1), close one (-1), or neither? */
static int tag_opens(const jinja_program *j) {
    static const char *const opens[] = {"for", "if", "macro", "call", "filter"};
    static const char *const closes[] = {"endfor", "endif", "endmacro", "endcall", "endfilter",
                                         "endset"};
    for (size_t i = 0; i < 5; i++) if (jinja_at(j, 1, opens[i])) return 1;
    for (size_t i = 0; i < 6; i++) if (jinja_at(j, 1, closes[i])) return -1;
    if (!jinja_at(j, 1, "set")) return 0;
    for (size_t i = 2; j->at + i < j->n && j->tokens[j->at + i].kind != '}'; i++)
        if (jinja_at(j, i, "=")) return 0;
    return 1;
}

/* Up to the tag that ends this part, or to its else or elif. */
static void skip_part(jinja_program *j) {
    for (int depth = 0; j->at < j->n; j->at++) {
        if (j->tokens[j->at].kind != 'b') continue;
        int opens = tag_opens(j);
        bool other = jinja_at(j, 1, "else") || jinja_at(j, 1, "elif");
        if (!depth && (opens < 0 || other)) return;
        depth += opens;
    }
    jinja_lost(j);
}

static void run_if(jinja_program *j) {
    bool done = false, now = jinja_true(jinja_expression(j));
    for (close_tag(j); j->state == JINJA_RUNS; close_tag(j)) {
        if (now) jinja_run(j);
        else skip_part(j);
        if (j->state != JINJA_RUNS) return;
        done |= now, now = false;
        j->at++;
        if (jinja_take(j, "elif")) {
            if (!done) now = jinja_true(jinja_expression(j));
            else while (j->at < j->n && j->tokens[j->at].kind != '}') j->at++;
        } else if (jinja_take(j, "else")) now = !done;
        else {
            jinja_need(j, "endif");
            close_tag(j);
            return;
        }
    }
}

/* What `loop` is in turn I of a loop over N items. */
static jinja_value jinja_loop(jinja_program *j, const jinja_value *items, int64_t i, int64_t n) {
    const struct { const char *name; jinja_value v; } fields[] = {
        {"index", jinja_number(i + 1)}, {"index0", jinja_number(i)}, {"length", jinja_number(n)},
        {"first", jinja_bool(!i)}, {"last", jinja_bool(i + 1 == n)},
        {"revindex", jinja_number(n - i)}, {"revindex0", jinja_number(n - i - 1)},
        {"previtem", i ? items[i - 1] : jinja_undefined},
        {"nextitem", i + 1 < n ? items[i + 1] : jinja_undefined}};
    jinja_value pairs[18];
    for (size_t k = 0; k < 9; k++) {
        pairs[2 * k] = jinja_text_of(jinja_span(fields[k].name));
        pairs[2 * k + 1] = fields[k].v;
    }
    return jinja_list(j, JINJA_DICT, pairs, 9);
}

/* Gives item V to the one or two names of a loop. */
static void set_targets(jinja_program *j, const span *targets, size_t n, jinja_value v) {
    for (size_t i = 0; i < n; i++)
        jinja_set(j, 0, targets[i], n == 1 ? v : jinja_index(j, v, jinja_number((int64_t)i)));
}

/* for x[, y] in items [if condition]. */
static void run_for(jinja_program *j) {
    span targets[2] = {jinja_take_name(j)};
    size_t n_targets = 1, mark = j->n_names, n = 0, scope = enter_scope(j);
    if (jinja_take(j, ",")) targets[n_targets++] = jinja_take_name(j);
    jinja_need(j, "in");
    jinja_value all = jinja_items(j, jinja_logic(j, true));
    bool some = jinja_take(j, "if");
    size_t condition = j->at;
    jinja_value *items = jinja_room(j, (size_t)all.number * sizeof *items);
    for (int64_t i = 0; items && i < all.number && j->state == JINJA_RUNS; i++) {
        j->at = condition;
        j->scope = mark;
        set_targets(j, targets, n_targets, all.items[i]);
        if (!some || jinja_true(jinja_expression(j))) items[n++] = all.items[i];
        j->n_names = mark;
    }
    skip_tag(j);
    size_t body = j->at;
    for (size_t i = 0; i < n && j->state == JINJA_RUNS; i++) {
        j->at = body;
        j->scope = mark;
        jinja_set(j, 0, jinja_span("loop"), jinja_loop(j, items, (int64_t)i, (int64_t)n));
        set_targets(j, targets, n_targets, items[i]);
        jinja_run(j);
        mark = drop_names(j, mark);
        if (j->state == JINJA_CONTINUES) j->state = JINJA_RUNS;
    }
    if (j->state == JINJA_BREAKS) j->state = JINJA_RUNS;
    j->at = body;
    skip_part(j);
    if (jinja_at(j, 1, "else")) {
        skip_tag(j);
        if (!n) jinja_run(j);
        else skip_part(j);
    }
    leave_scope(j, scope);
    if (j->state != JINJA_RUNS) return;
    j->at++;
    jinja_need(j, "endfor");
    close_tag(j);
}

/* set x = v; set x.y = v; set x, and a text up to endset. */
static void run_set(jinja_program *j) {
    span name = jinja_take_name(j), field = {0};
    int64_t owner = 0;
    if (jinja_take(j, ".")) {
        jinja_name *space = jinja_find(j, 0, name);
        field = jinja_take_name(j);
        if (!space || space->value.type != JINJA_NAMESPACE) jinja_stop(j, JINJA_REFUSES);
        else owner = space->value.number;
        name = field;
    }
    if (jinja_take(j, "=")) {
        jinja_value v = jinja_expression(j);
        jinja_set(j, owner, name, v);
        close_tag(j);
        return;
    }
    buffer text = {0}, *out = j->out;
    close_tag(j);
    size_t scope = enter_scope(j);
    j->out = &text;
    jinja_run(j);
    j->out = out;
    leave_scope(j, scope);
    jinja_set(j, owner, name, jinja_keep(j, &text));
    j->at++;
    jinja_need(j, "endset");
    close_tag(j);
}

/* macro NAME(a, b=value). Where it would keep names of a loop or of another macro, it is not
 * known. */
static void run_macro(jinja_program *j) {
    span name = jinja_take_name(j);
    if (j->scope) jinja_lost(j);
    jinja_set(j, 0, name, (jinja_value){.type = JINJA_MACRO, .number = (int64_t)j->at});
    skip_tag(j);
    skip_part(j);
    j->at++;
    jinja_need(j, "endmacro");
    close_tag(j);
}

/* The parameters of a macro, with what A says or with their defaults. */
static void set_parameters(jinja_program *j, const jinja_args *a) {
    size_t used = 0;
    jinja_need(j, "(");
    for (size_t i = 0; !jinja_take(j, ")") && j->state == JINJA_RUNS; i++) {
        span name = jinja_take_name(j);
        size_t given = i < a->n && !a->names[i].n ? i : a->n;
        for (size_t k = 0; k < a->n; k++) {
            if (!a->names[k].n || !same_span(a->names[k], name)) continue;
            if (given < a->n) jinja_stop(j, JINJA_REFUSES);
            given = k;
        }
        jinja_value v = given < a->n ? a->values[given] : jinja_undefined;
        used += given < a->n;
        if (jinja_take(j, "=")) {
            j->dead = given < a->n;
            jinja_value usual = jinja_expression(j);
            j->dead = false;
            if (given == a->n) v = usual;
        }
        jinja_set(j, 0, name, v);
        if (!jinja_take(j, ",") && !jinja_at(j, 0, ")")) jinja_lost(j);
    }
    if (used < a->n) jinja_lost(j);                     /* the macro may have varargs            */
    close_tag(j);
}

/* What a macro writes. */
static jinja_value call_macro(jinja_program *j, jinja_value macro, const jinja_args *a) {
    if (j->dead || j->state != JINJA_RUNS) return jinja_undefined;
    buffer text = {0}, *out = j->out;
    size_t back = j->at, scope = enter_scope(j), hidden = j->hidden;
    j->hidden = j->n_names;
    j->at = (size_t)macro.number;
    j->out = &text;
    set_parameters(j, a);
    jinja_run(j);
    if (j->state < JINJA_REFUSES && (j->state != JINJA_RUNS || !jinja_at(j, 1, "endmacro")))
        jinja_lost(j);
    j->out = out;
    j->at = back;
    leave_scope(j, scope);
    j->hidden = hidden;
    return jinja_keep(j, &text);
}

static void run_tag(jinja_program *j) {
    if (jinja_take(j, "if")) run_if(j);
    else if (jinja_take(j, "for")) run_for(j);
    else if (jinja_take(j, "set")) run_set(j);
    else if (jinja_take(j, "break")) j->state = JINJA_BREAKS;
    else if (jinja_take(j, "continue")) j->state = JINJA_CONTINUES;
    else if (jinja_take(j, "generation") || jinja_take(j, "endgeneration")) close_tag(j);
    else if (jinja_take(j, "macro")) run_macro(j);
    else jinja_lost(j);
}

/* Runs up to the tag that ends this part, or the end. */
static void jinja_run(jinja_program *j) {
    if (++j->depth > JINJA_DEPTH) jinja_lost(j);
    while (j->at < j->n && j->state == JINJA_RUNS) {
        const jinja_token *t = &j->tokens[j->at];
        if (++j->steps > JINJA_STEPS) jinja_lost(j);
        bool other = jinja_at(j, 1, "else") || jinja_at(j, 1, "elif");
        if (t->kind == 'b' && (other || tag_opens(j) < 0)) break;
        j->at++;
        if (t->kind == 'D') buffer_add(j->out, t->text.p, t->text.n);
        else if (t->kind == 'b') run_tag(j);
        else {
            jinja_value v = jinja_expression(j);
            if (j->state == JINJA_RUNS) jinja_show(j, j->out, v);
            close_tag(j);
        }
    }
    j->depth--;
}

/* ---- rendering ----------------------------------------------------------------------------- */

/* The tokens that R has read, N of them; NULL: no memory. */
static jinja_token *jinja_list_tokens(const jinja_reader *r, size_t *n) {
    jinja_token *tokens = new_array(r->out.n / 5, sizeof *tokens);
    *n = 0;
    for (size_t at = 0; tokens && at < r->out.n;) {
        const uint8_t *p = r->out.data + at + 4;
        size_t length = u32_at(r->out.data + at, 0), name = *p == '{' ? 2 : 1;
        tokens[(*n)++] = (jinja_token){(char)p[name - 1], {p + name, length - name}};
        at += 4 + length;
    }
    return tokens;
}

/* Renders N messages with TOKENS as apply_chat_template does; appends to OUT. JINJA_RUNS,
 * JINJA_REFUSES or JINJA_LOST. */
static int jinja_render(const jinja_token *tokens, size_t n_tokens, const medrun_message *m,
                        size_t n, bool answer, const char *bos, const char *eos, buffer *out) {
    jinja_program *j = new_array(1, sizeof *j);
    if (!j) return JINJA_LOST;
    j->tokens = tokens, j->n = n_tokens, j->out = out;
    jinja_value *list = jinja_room(j, n * sizeof *list);
    for (size_t i = 0; list && i < n; i++) {
        const jinja_value pairs[] = {
            jinja_text_of(jinja_span("role")), jinja_text_of(jinja_span(m[i].role)),
            jinja_text_of(jinja_span("content")),
            jinja_text_of((span){(const uint8_t *)m[i].text, m[i].n_bytes})};
        list[i] = jinja_list(j, JINJA_DICT, pairs, 2);
    }
    jinja_set(j, 0, jinja_span("messages"),
              (jinja_value){.type = JINJA_LIST, .number = (int64_t)n, .items = list});
    jinja_set(j, 0, jinja_span("add_generation_prompt"), jinja_bool(answer));
    jinja_set(j, 0, jinja_span("tools"), (jinja_value){.type = JINJA_NONE});
    jinja_set(j, 0, jinja_span("documents"), (jinja_value){.type = JINJA_NONE});
    if (bos) jinja_set(j, 0, jinja_span("bos_token"), jinja_text_of(jinja_span(bos)));
    if (eos) jinja_set(j, 0, jinja_span("eos_token"), jinja_text_of(jinja_span(eos)));
    jinja_run(j);
    if (j->state < JINJA_REFUSES && j->at < j->n) jinja_lost(j);
    if (out->failed) jinja_lost(j);
    int state = j->state < JINJA_REFUSES ? JINJA_RUNS : j->state;
    for (jinja_block *b = j->blocks, *next; b; b = next) next = b->next, free(b);
    free(j);
    return state;
}
