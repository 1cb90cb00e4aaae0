/* serve_grammar.c: what a text must look like: a JSON schema (serve_schema.c), a grammar as
 * llama.cpp has them, a regular expression or a list of choices as rules over bytes, and for each
 * state of the text the tokens that may come next. Included by serve.c and lab.c. MIT licence, see
 * LICENSE.
 *
 * A frame is a node of the rules, how often it was repeated, and the frame behind it: a stack that
 * many texts share. A state is the set of frames whose next byte is awaited, and whether the text
 * may end here. Frames and states are made as they are met and kept, so a byte that was seen before
 * in a state is one look at a table. What can never come to an end is left out of every state: so a
 * text that is in a state can be finished.
 *
 * Two nodes that a text must both fit (or the first, but not the second) are a node, too: its frame
 * has a pair, a state of each, and both walk together. Only a search knows whether a pair can be
 * finished: it is made once for each. So one of the two should be without rules that call
 * themselves. Whatever of a schema is not understood is refused with its place. */

enum { EMPTY_NODE, CLASS_NODE, CAT_NODE, ALT_NODE, REP_NODE, REF_NODE, NO_NODE, BOTH_NODE,
       LESS_NODE };
enum { MOST_NODES = 400000, MOST_FRAMES = 1 << 18, MOST_STATES = 1 << 16, MOST_SET = 4096,
       MOST_MASKS = 512, MOST_SEARCH = 20000, MOST_DEPTH = 40, DEAD = 1 };
enum { MOST_WORK = 3000000 };           /* steps, some 100 ms, to compile or to make one mask    */
enum { CAN_END = 1, CAN_BE_EMPTY = 2, HAS_A_BEGINNING = 4 };        /* what is known of a node   */
enum { NOT_KNOWN, IS_LEAVE, GOES_DEEPER, IS_LISTED };               /* of a pair                 */
#define ENDLESS 0xFFFFFFFFu

/* A piece of somebody else's bytes. */
typedef struct {
    const char *text;
    size_t n;
} span;

static const char *chars_of(const buffer *b) { return b->n ? (const char *)b->data : ""; }

/* All pieces in the order of their bytes, and how many bytes each shares with the one before: a
 * walk over them takes each common beginning once. */
typedef struct {
    int32_t *ids;
    uint16_t *shared;
    size_t n;
    bool alone[256];            /* bytes that are a token                                       */
} piece_order;

/* Of a BOTH_NODE and a LESS_NODE, LO is the pair with which it begins. */
typedef struct { uint32_t kind, a, b, lo, hi; } rule_node;
typedef struct { uint64_t bits[4]; } byte_class;
typedef struct { uint32_t node, count, next, seen; } frame;
typedef struct {
    uint32_t at, n;
    bool end;
    uint8_t goes_on;
    uint32_t *row;
    uint8_t *mask;
} text_state;

/* The rules, and all that was met. */
typedef struct grammar {
    buffer nodes, classes, rules;               /* rules: uint32_t nodes                        */
    buffer frames, sets, states, stack, found, listed;
    uint8_t *first_mask;                        /* of an answer's first token, the last one made */
    uint8_t *good;                              /* what is known of each node                   */
    uint32_t *frame_table, *state_table;
    uint32_t round, depth, n_masks, root;       /* DEPTH: of searches in searches               */
    uint64_t work;                              /* steps since a text or a mask was begun       */
    bool failed;
} grammar;

#define NODE(g, i) ((rule_node *)(void *)(g)->nodes.data)[i]
#define FRAME(g, i) ((frame *)(void *)(g)->frames.data)[i]
#define STATE(g, i) ((text_state *)(void *)(g)->states.data)[i]

static void free_buffers(buffer *const *list, size_t n) {
    for (size_t i = 0; i < n; i++) buffer_free(list[i]);
}
#define BUFFERS(...) (buffer *const[]){__VA_ARGS__}, \
                     sizeof((buffer *const[]){__VA_ARGS__}) / sizeof(buffer *)

/* Forgets what was met, not the rules. */
static void grammar_forget(grammar *g) {
    for (size_t i = 0; i < g->states.n / sizeof(text_state); i++) {
        free(STATE(g, i).row);
        free(STATE(g, i).mask);
    }
    free_buffers(BUFFERS(&g->frames, &g->sets, &g->states, &g->stack, &g->found, &g->listed));
    free(g->first_mask);
    free(g->frame_table);
    free(g->state_table);
    g->first_mask = NULL, g->frame_table = g->state_table = NULL, g->n_masks = 0;
}

static void grammar_free(grammar *g) {
    if (!g) return;
    grammar_forget(g);
    free_buffers(BUFFERS(&g->nodes, &g->classes, &g->rules));
    free(g->good);
    free(g);
}

/* ---- building ------------------------------------------------------------------------------- */

static uint32_t add_node(grammar *g, uint32_t kind, uint32_t a, uint32_t b) {
    rule_node n = {kind, a, b, 0, 0};
    g->work++;
    if (g->nodes.n / sizeof n >= MOST_NODES) g->failed = true;
    else buffer_add(&g->nodes, &n, sizeof n);
    g->failed |= g->nodes.failed;
    return g->failed ? 0 : (uint32_t)(g->nodes.n / sizeof n) - 1;
}

static uint32_t cat(grammar *g, uint32_t a, uint32_t b) { return add_node(g, CAT_NODE, a, b); }
static uint32_t either(grammar *g, uint32_t a, uint32_t b) { return add_node(g, ALT_NODE, a, b); }
static uint32_t empty(grammar *g) { return add_node(g, EMPTY_NODE, 0, 0); }
static uint32_t never(grammar *g) { return add_node(g, NO_NODE, 0, 0); }

/* Texts that fit A and B; that fit A and not B. */
static uint32_t both(grammar *g, uint32_t a, uint32_t b) { return add_node(g, BOTH_NODE, a, b); }
static uint32_t less(grammar *g, uint32_t a, uint32_t b) { return add_node(g, LESS_NODE, a, b); }

/* A rule whose node is set later, so that rules can name each other. */
static uint32_t new_rule(grammar *g) {
    uint32_t none = 0, n = (uint32_t)(g->rules.n / 4);
    buffer_add(&g->rules, &none, sizeof none);
    g->failed |= g->rules.failed || n >= 60000;
    return n;
}

static void set_rule(grammar *g, uint32_t rule, uint32_t to) {
    if (!g->failed) memcpy(g->rules.data + 4 * (size_t)rule, &to, 4);
}

static uint32_t refer(grammar *g, uint32_t rule) { return add_node(g, REF_NODE, rule, 0); }

static uint32_t repeat(grammar *g, uint32_t a, uint32_t lo, uint32_t hi) {
    uint32_t n = add_node(g, REP_NODE, a, 0);
    if (!g->failed) NODE(g, n).lo = lo, NODE(g, n).hi = hi;
    return n;
}

/* One byte from LO to HI. */
static uint32_t bytes_between(grammar *g, uint32_t lo, uint32_t hi) {
    byte_class c = {{0}};
    for (uint32_t i = lo; i <= hi; i++) c.bits[i / 64] |= (uint64_t)1 << i % 64;
    buffer_add(&g->classes, &c, sizeof c);
    g->failed |= g->classes.failed;
    return add_node(g, CLASS_NODE, (uint32_t)(g->classes.n / sizeof c) - 1, 0);
}

static uint32_t literal(grammar *g, const void *text, size_t n) {
    const uint8_t *p = text;
    uint32_t all = empty(g);
    for (size_t i = n; i-- > 0;) all = cat(g, bytes_between(g, p[i], p[i]), all);
    return all;
}

static uint32_t word(grammar *g, const char *text) { return literal(g, text, strlen(text)); }

/* A character from LO to HI as its UTF-8, cut where the number of bytes or of leading ones differs.
 */
static uint32_t characters(grammar *g, uint32_t lo, uint32_t hi) {
    static const uint32_t ends[] = {0x7F, 0x7FF, 0xD7FF, 0xDFFF, 0xFFFF, 0x10FFFF};
    if (lo > hi) return never(g);
    for (int i = 0; i < 5; i++)
        if (lo <= ends[i] && hi > ends[i])
            return either(g, characters(g, lo, ends[i]), characters(g, ends[i] + 1, hi));
    if (lo >= 0xD800 && hi <= 0xDFFF) return never(g);
    for (uint32_t low = 0x3F; low <= 0x3FFFF && hi > 0x7F; low = low << 6 | 0x3F) {
        if ((lo & ~low) == (hi & ~low)) break;
        if (lo & low) return either(g, characters(g, lo, lo | low),
                                    characters(g, (lo | low) + 1, hi));
        if ((hi & low) != low) return either(g, characters(g, lo, (hi & ~low) - 1),
                                             characters(g, hi & ~low, hi));
    }
    uint8_t a[4], b[4];
    size_t n = utf8_encode(lo, a);
    utf8_encode(hi, b);
    uint32_t all = empty(g);
    for (size_t i = n; i-- > 0;) all = cat(g, bytes_between(g, a[i], b[i]), all);
    return all;
}

/* As it stands in a string of JSON, where IN_JSON. */
static uint32_t written(grammar *g, uint32_t lo, uint32_t hi, bool in_json) {
    static const char from[] = "\"\\\n\r\t\b\f", *const to[] = {"\\\"", "\\\\", "\\n", "\\r", "\\t",
                                                              "\\b", "\\f"};
    uint32_t all = never(g), start = lo;
    if (!in_json) return characters(g, lo, hi);
    for (uint32_t c = lo; c <= hi && c < 0x80; c++) {
        const char *at = c ? strchr(from, (int)c) : NULL;
        if (!at && c >= 0x20) continue;
        if (start < c) all = either(g, all, characters(g, start, c - 1));
        if (at) all = either(g, all, word(g, to[at - from]));
        start = c + 1;
    }
    return start <= hi ? either(g, all, characters(g, start, hi)) : all;
}

/* ---- regular expressions, and what grammars share with them ---------------------------------- */

typedef struct {
    grammar *g;
    const uint8_t *p, *end;
    bool in_json, gbnf;         /* of a string of JSON; escapes and groups as llama.cpp has them */
    const char *wrong;
    int depth;
    buffer *names;              /* of a grammar's rules: rule_name                              */
} regex;

typedef struct {
    span name;
    uint32_t rule;
    bool given;
} rule_name;

/* Blanks and comments of a grammar; line ends only where LINES. */
static void gbnf_space(regex *r, bool lines) {
    while (r->gbnf && r->p < r->end && (*r->p == ' ' || *r->p == '\t' || *r->p == '#' ||
                                        (lines && (*r->p == '\n' || *r->p == '\r')))) {
        if (*r->p++ != '#') continue;
        while (r->p < r->end && *r->p != '\n' && *r->p != '\r') r->p++;
    }
}

static bool is_name_byte(uint8_t c) { return isalnum(c) || c == '-' || c == '_'; }

/* The rule that is called what stands next. */
static rule_name *gbnf_name(regex *r) {
    const uint8_t *from = r->p;
    while (r->p < r->end && is_name_byte(*r->p)) r->p++;
    span name = {(const char *)from, (size_t)(r->p - from)};
    rule_name *all = (rule_name *)(void *)r->names->data;
    size_t n = r->names->n / sizeof *all;
    for (size_t i = 0; i < n; i++)
        if (all[i].name.n == name.n && !memcmp(all[i].name.text, name.text, name.n))
            return &all[i];
    rule_name made = {name, new_rule(r->g), false};
    if (!name.n) r->wrong = "wanted a name";
    if (n >= 4096) r->wrong = "more than 4096 rules";
    buffer_add(r->names, &made, sizeof made);
    r->g->failed |= r->names->failed;
    return r->g->failed || r->wrong ? NULL : (rule_name *)(void *)r->names->data + n;
}

static uint32_t gbnf_reference(regex *r) {
    const rule_name *name = is_name_byte(*r->p) ? gbnf_name(r) : NULL;
    if (!name && !r->wrong) r->wrong = "a sign that is not here";
    return name ? refer(r->g, name->rule) : 0;
}

static uint32_t regex_either(regex *r);

/* Ranges of characters, (lo, hi) each. */
typedef struct { uint32_t n, of[128][2]; } ranges;

static void add_range(regex *r, ranges *s, uint32_t lo, uint32_t hi) {
    if (s->n == 126 || lo > hi) r->wrong = "a class is too long or turned round";
    else s->of[s->n][0] = lo, s->of[s->n++][1] = hi;
}

static void turn_round(ranges *s) {
    ranges out = {0, {{0}}};
    uint32_t from = 0;
    for (;;) {
        uint32_t next = 0x110000, end = 0;
        for (uint32_t i = 0; i < s->n; i++) {
            const uint32_t *of = s->of[i];
            if (of[0] <= from && of[1] >= from) from = of[1] + 1, next = 0, i = s->n;
            else if (of[0] > from && of[0] < next) next = of[0], end = of[1];
        }
        if (!next) continue;
        if (from > 0x10FFFF) break;
        out.of[out.n][0] = from, out.of[out.n++][1] = next - 1;
        if (next > 0x10FFFF || out.n == 127) break;
        from = end + 1;
    }
    *s = out;
}

/* \d \w \s and their opposites, or one character. What some take for a space and others do not is
 * neither \s nor \S. */
static void regex_escape(regex *r, ranges *s) {
    static const char names[] = "nrtfv0", codes[] = "\n\r\t\f\v\0";
    static const struct { char name; uint32_t lo, hi; } classes[] = {
        {'d', '0', '9'}, {'w', '0', '9'}, {'w', 'A', 'Z'}, {'w', '_', '_'}, {'w', 'a', 'z'},
        {'s', '\t', '\r'}, {'s', ' ', ' '}, {'S', 0x1C, 0x1F}, {'S', 0x85, 0x85},
        {'S', 0xA0, 0xA0}, {'S', 0x1680, 0x1680}, {'S', 0x2000, 0x200A}, {'S', 0x2028, 0x2029},
        {'S', 0x202F, 0x202F}, {'S', 0x205F, 0x205F}, {'S', 0x3000, 0x3000}, {'S', 0xFEFF, 0xFEFF}};
    uint32_t c = r->p < r->end ? *r->p++ : 0, n = 0, v = 0;
    ranges own = {0, {{0}}};
    for (size_t i = 0; !r->gbnf && i < sizeof classes / sizeof *classes; i++) {
        uint32_t name = (uint8_t)classes[i].name;
        if (name == c || name == (c | 0x20)) add_range(r, &own, classes[i].lo, classes[i].hi);
    }
    if (own.n) {
        if (c < 'a') turn_round(&own);
        for (uint32_t i = 0; i < own.n; i++) add_range(r, s, own.of[i][0], own.of[i][1]);
        return;
    }
    const char *at = c ? strchr(names, (int)c) : NULL;
    n = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' && r->gbnf ? 8 : 0;
    if (n) {
        for (; n && r->p < r->end && isxdigit(*r->p); n--, r->p++)
            v = v << 4 | (*r->p <= '9' ? *r->p - 48u : (*r->p | 0x20u) - 87);
        if (n || v > 0x10FFFF) r->wrong = "an escape without its digits";
    } else if (at) v = (uint8_t)codes[at - names];
    else if (!c || isalnum((int)c) || c >= 0x80) r->wrong = "an escape that is not here";
    else v = c;
    if (r->gbnf && c && strchr("fv0", (int)c)) r->wrong = "an escape that is not here";
    add_range(r, s, v, v);
}

static uint32_t regex_one(regex *r) {
    uint32_t code = 0;
    size_t n = r->p < r->end ? utf8_decode(r->p, (size_t)(r->end - r->p), &code) : 0;
    if (!n) r->wrong = "it ends too early";
    r->p += n;
    return code;
}

static uint32_t of_ranges(regex *r, const ranges *s) {
    uint32_t all = never(r->g);
    for (uint32_t i = 0; i < s->n; i++)
        all = either(r->g, all, written(r->g, s->of[i][0], s->of[i][1], r->in_json));
    return all;
}

/* One character, or what an escape means. */
static void regex_char(regex *r, ranges *s) {
    if (r->p < r->end && *r->p == '\\') {
        r->p++;
        regex_escape(r, s);
        return;
    }
    uint32_t c = regex_one(r);
    add_range(r, s, c, c);
}

static uint32_t regex_class(regex *r) {
    ranges s = {0, {{0}}};
    bool turned = r->p < r->end && *r->p == '^';
    r->p += turned;
    for (bool first = true; !r->wrong && (first || r->p >= r->end || *r->p != ']'); first = false) {
        if (r->p >= r->end) { r->wrong = "a class without ]"; break; }
        uint32_t before = s.n;
        regex_char(r, &s);
        if (r->wrong || r->end - r->p < 2 || *r->p != '-' || r->p[1] == ']') continue;
        r->p++;
        ranges to = {0, {{0}}};
        regex_char(r, &to);
        if (s.n != before + 1 || to.n != 1 || s.of[before][0] > to.of[0][0])
            r->wrong = "a range that is none";
        else s.of[before][1] = to.of[0][0];
    }
    r->p++;
    if (turned) turn_round(&s);
    return of_ranges(r, &s);
}

static uint32_t regex_group(regex *r) {
    r->p++;
    if (!r->gbnf && r->p < r->end && *r->p == '?') {
        if (r->end - r->p < 2 || r->p[1] != ':') r->wrong = "such a group is not here";
        r->p += 2;
    }
    if (++r->depth > 64) r->wrong = "groups in groups in groups";
    uint32_t inner = r->wrong ? 0 : regex_either(r);
    r->depth--;
    if (!r->wrong && (r->p >= r->end || *r->p != ')')) r->wrong = "a group without )";
    r->p++;
    return inner;
}

/* A grammar's "text". */
static uint32_t gbnf_text(regex *r) {
    uint32_t all = empty(r->g);
    for (r->p++; !r->wrong && r->p < r->end && *r->p != '"';) {
        ranges s = {0, {{0}}};
        regex_char(r, &s);
        all = cat(r->g, all, of_ranges(r, &s));
    }
    if (r->p >= r->end) r->wrong = "a text without its end";
    r->p++;
    return all;
}

static uint32_t regex_atom(regex *r) {
    ranges s = {0, {{0}}};
    uint8_t c = *r->p;
    if (c == '(') return regex_group(r);
    if (c == '[') return r->p++, regex_class(r);
    if (r->gbnf && c != '.') return c == '"' ? gbnf_text(r) : gbnf_reference(r);
    if (strchr("*+?{)^$", c)) return r->wrong = "a sign where a character is wanted", 0;
    if (c == '.') {
        r->p++;
        if (!r->gbnf) {
            add_range(r, &s, '\n', '\n'), add_range(r, &s, '\r', '\r');
            add_range(r, &s, 0x2028, 0x2029);
        }
        turn_round(&s);
    } else regex_char(r, &s);
    return of_ranges(r, &s);
}

static uint32_t regex_count(regex *r) {
    uint32_t v = 0;
    if (r->p >= r->end || !isdigit(*r->p)) r->wrong = "a count without a number";
    for (; r->p < r->end && isdigit(*r->p) && v < 65536; r->p++) v = v * 10 + (*r->p - 48u);
    if (v > 65535) r->wrong = "more than 65535 times";
    return v;
}

/* ONE as often as the sign after it says; in a grammar, the signs. */
static uint32_t regex_times(regex *r, uint32_t one) {
    for (bool more = true; more; more = r->gbnf) {
        gbnf_space(r, r->depth > 0);
        if (r->wrong || r->p >= r->end || !*r->p || !strchr("*+?{", *r->p)) break;
        uint8_t c = *r->p++;
        uint32_t lo = c == '+', hi = c == '?' ? 1 : ENDLESS;
        if (c == '{') {
            bool open = r->gbnf && r->p < r->end && *r->p == ',';
            lo = hi = open ? 0 : regex_count(r);
            if (r->p < r->end && *r->p == ',')
                hi = ++r->p < r->end && *r->p != '}' ? regex_count(r) : ENDLESS;
            if (r->p >= r->end || *r->p++ != '}' || lo > hi) r->wrong = "a count that is none";
        }
        if (!r->gbnf && r->p < r->end && *r->p == '?') r->p++;  /* lazy: the same texts          */
        one = repeat(r->g, one, lo, hi);
    }
    return one;
}

static uint32_t regex_cat(regex *r) {
    const char *ends = r->gbnf ? "|)\r\n" : "|)";
    uint32_t all = empty(r->g);
    gbnf_space(r, true);
    while (!r->wrong && !r->g->failed && r->p < r->end && !strchr(ends, *r->p) &&
           !(*r->p == '$' && !r->gbnf && !r->depth && (r->p + 1 == r->end || r->p[1] == '|')))
        all = cat(r->g, all, regex_times(r, regex_atom(r)));
    return all;
}

static uint32_t regex_either(regex *r) {
    uint32_t all = regex_cat(r);
    while (!r->wrong && r->p < r->end && *r->p == '|') {
        r->p++;
        all = either(r->g, all, regex_cat(r));
    }
    return all;
}

/* WHOLE: all of the text must match, else some part of it. NULL in *WHY: it is understood. */
static uint32_t add_regex(grammar *g, const void *text, size_t n, bool in_json, bool whole,
                          const char **why) {
    regex r = {g, text, (const uint8_t *)text + n, in_json, false, NULL, 0, NULL};
    ranges any = {1, {{0, 0x10FFFF}}};
    uint32_t all = never(g), free_text = whole ? 0 : repeat(g, of_ranges(&r, &any), 0, ENDLESS);
    if (n > 4096) r.wrong = "longer than 4096 bytes";
    for (bool more = true; more && !r.wrong; r.p++) {       /* ^ and $ belong to one alternative */
        bool from = r.p < r.end && *r.p == '^';
        r.p += from;
        uint32_t one = regex_cat(&r);
        bool to = r.p < r.end && *r.p == '$';
        r.p += to;
        if (!whole && !from) one = cat(g, free_text, one);
        if (!whole && !to) one = cat(g, one, free_text);
        all = either(g, all, one);
        more = r.p < r.end;
        if (more && *r.p != '|' && !r.wrong) r.wrong = "a sign too many";
    }
    *why = r.wrong;
    return all;
}

/* ---- grammars as llama.cpp has them ("GBNF") ------------------------------------------------- */

/* A rule for each NAME ::= ...; the one called root is the text's. */
static uint32_t add_gbnf(grammar *g, const char *text, size_t n, buffer *names, const char **why,
                         size_t *line) {
    regex r = {g, (const uint8_t *)text, (const uint8_t *)text + n, false, true, NULL, 0, names};
    span root = {NULL, 0};
    uint32_t start = 0;
    if (memchr(text, 0, n)) r.wrong = "a byte of 0";
    gbnf_space(&r, true);
    while (!r.wrong && !g->failed && r.p < r.end) {
        rule_name *to = gbnf_name(&r);
        if (!to) break;
        uint32_t rule = to->rule;
        to->given = true;
        if (to->name.n == 4 && !memcmp(to->name.text, "root", 4)) root = to->name, start = rule;
        gbnf_space(&r, false);
        if (r.end - r.p < 3 || memcmp(r.p, "::=", 3)) { r.wrong = "wanted ::="; break; }
        r.p += 3;
        uint32_t made = regex_either(&r);
        set_rule(g, rule, made);
        if (!r.wrong && r.p < r.end && *r.p == ')') r.wrong = "a ) too many";
        gbnf_space(&r, true);
    }
    const rule_name *all = (const rule_name *)(void *)names->data;
    for (size_t i = 0; !r.wrong && i < names->n / sizeof *all; i++)
        if (!all[i].given) {
            r.wrong = "no rule has this name";
            r.p = (const uint8_t *)all[i].name.text;
        }
    if (!r.wrong && !root.n) r.wrong = "no rule has the name root";
    *why = r.wrong;
    *line = 1;
    for (const uint8_t *p = (const uint8_t *)text; p < r.p && p < r.end; p++) *line += *p == '\n';
    return refer(g, start);
}

/* ---- the state of a text -------------------------------------------------------------------- */

static uint32_t grammar_step(grammar *g, uint32_t at, uint8_t byte);

static uint32_t frame_of(grammar *g, uint32_t at, uint32_t count, uint32_t next) {
    uint32_t size = 2 * MOST_FRAMES, h = hash_pair(at * 31 + count, next) % size;
    if (!g->frame_table && !(g->frame_table = new_array(size, 4))) return g->failed = true, 0;
    for (; g->frame_table[h]; h = (h + 1) % size) {
        const frame *f = &FRAME(g, g->frame_table[h]);
        if (f->node == at && f->count == count && f->next == next) return g->frame_table[h];
    }
    frame f = {at, count, next, 0};
    buffer_add(&g->frames, &f, sizeof f);
    if (g->frames.failed || g->frames.n / sizeof f >= MOST_FRAMES) return g->failed = true, 0;
    return g->frame_table[h] = (uint32_t)(g->frames.n / sizeof f) - 1;
}

static void push(grammar *g, uint32_t f) {
    buffer_add(&g->stack, &f, sizeof f);
    g->failed |= g->stack.failed;
}

static bool grammar_ends(grammar *g, uint32_t at) { return at != DEAD && STATE(g, at).end; }
static bool grammar_only_ends(grammar *g, uint32_t at) { return at == DEAD || !STATE(g, at).n; }

/* Two states that walk together stand in the table of frames: NODE and COUNT are the states, NEXT
 * says of which kind of node, SEEN what is known. */
static uint32_t pair_of(grammar *g, uint32_t kind, uint32_t x, uint32_t y) {
    return frame_of(g, x, y, UINT32_MAX - kind);
}

static bool pair_ends(grammar *g, uint32_t pair) {
    const frame p = FRAME(g, pair);
    bool second = grammar_ends(g, p.count);
    return grammar_ends(g, p.node) && (UINT32_MAX - p.next == LESS_NODE ? !second : second);
}

/* 0: neither text nor its beginning. */
static uint32_t pair_step(grammar *g, uint32_t pair, uint8_t byte) {
    const frame p = FRAME(g, pair);
    uint32_t kind = UINT32_MAX - p.next, x = grammar_step(g, p.node, byte);
    uint32_t y = x == DEAD ? DEAD : grammar_step(g, p.count, byte);
    return x == DEAD || (y == DEAD && kind == BOTH_NODE) ? 0 : pair_of(g, kind, x, y);
}

static const byte_class all_bytes = {{~(uint64_t)0, ~(uint64_t)0, ~(uint64_t)0, ~(uint64_t)0}};

static bool has_byte(const byte_class *c, uint32_t byte) {
    return c->bits[byte / 64] >> byte % 64 & 1;
}

/* Leaves of ALIKE the bytes of which it is known that they lead PAIR where BYTE has led it. */
static void only_alike(const grammar *g, uint32_t pair, uint8_t byte, byte_class *alike) {
    const frame p = FRAME(g, pair);
    const uint32_t *x = STATE(g, p.node).row, *y = STATE(g, p.count).row;
    for (uint32_t b = 0; b < 256; b++)
        if ((x && x[b] != x[byte]) || (y && y[b] != y[byte]))
            alike->bits[b / 64] &= ~((uint64_t)1 << b % 64);
}

typedef struct { uint32_t pair, from; } listed_pair;
#define LISTED(g, i) ((listed_pair *)(void *)(g)->listed.data)[i]

static void list_pair(grammar *g, uint32_t pair, uint32_t from) {
    listed_pair p = {pair, from};
    buffer_add(&g->listed, &p, sizeof p);
    g->failed |= g->listed.failed;
    FRAME(g, pair).seen = IS_LISTED + g->depth;
}

/* Can something follow after which PAIR ends? The nearest end is searched, and the way to it is
 * known from then on; where there is none, nothing that was seen leads to one. */
static bool pair_goes_on(grammar *g, uint32_t pair) {
    size_t base = g->listed.n / sizeof(listed_pair), found = SIZE_MAX;
    const frame p = FRAME(g, pair);
    if (p.seen == GOES_DEEPER || p.seen == IS_LEAVE) return p.seen == GOES_DEEPER;
    bool only_ends = grammar_only_ends(g, p.node) ||
                     (UINT32_MAX - p.next == BOTH_NODE && grammar_only_ends(g, p.count));
    if (p.count == DEAD || only_ends) {                 /* a state goes on wherever it is no end */
        FRAME(g, pair).seen = only_ends ? IS_LEAVE : GOES_DEEPER;
        return !only_ends;
    }
    if (++g->depth > MOST_DEPTH) g->failed = true;      /* it would have to know itself          */
    list_pair(g, pair, UINT32_MAX);
    for (size_t at = base; at < g->listed.n / sizeof(listed_pair) && found == SIZE_MAX; at++) {
        byte_class left = all_bytes, alike;
        for (uint32_t byte = 0; byte < 256 && !g->failed; byte++) {
            if (!has_byte(&left, byte)) continue;
            uint32_t now = LISTED(g, at).pair, next = pair_step(g, now, (uint8_t)byte);
            alike = left;
            g->work += 8;
            only_alike(g, now, (uint8_t)byte, &alike);
            for (int k = 0; k < 4; k++) left.bits[k] &= ~alike.bits[k];
            if (!next || g->failed) continue;
            uint32_t seen = FRAME(g, next).seen;
            if (pair_ends(g, next) || seen == GOES_DEEPER) { found = at; break; }
            if (seen != IS_LEAVE && seen != IS_LISTED + g->depth) list_pair(g, next, (uint32_t)at);
        }
        g->failed |= at - base > MOST_SEARCH;
        if (g->failed) break;
    }
    for (size_t i = base; i < g->listed.n / sizeof(listed_pair); i++)
        FRAME(g, LISTED(g, i).pair).seen = found == SIZE_MAX ? IS_LEAVE : NOT_KNOWN;
    for (size_t i = found; i != SIZE_MAX; i = LISTED(g, i).from == UINT32_MAX ? SIZE_MAX
                                                                        : LISTED(g, i).from)
        FRAME(g, LISTED(g, i).pair).seen = GOES_DEEPER;
    g->listed.n = base * sizeof(listed_pair);
    g->depth--;
    return found != SIZE_MAX;
}

static int compare_ids(const void *a, const void *b) {
    uint32_t x, y;
    memcpy(&x, a, 4), memcpy(&y, b, 4);
    return (x > y) - (x < y);
}

/* The state whose frames stand in g->found from FROM on, which are taken off. */
static uint32_t state_of(grammar *g, size_t from, bool end) {
    size_t n = (g->found.n - from) / 4, size = 2 * MOST_STATES, kept = 0;
    uint8_t *set = n ? g->found.data + from : NULL;
    g->found.n = from;
    if (g->failed || (!n && !end)) return DEAD;
    if (n) qsort(set, n, 4, compare_ids);
    for (size_t i = 0; i < n; i++)
        if (!i || u32_at(set, i) != u32_at(set, i - 1)) memmove(set + 4 * kept++, set + 4 * i, 4);
    uint32_t h = hash_text(2166136261u + end, set, 4 * kept) % (uint32_t)size;
    if (!g->state_table && !(g->state_table = new_array(size, 4))) return g->failed = true, DEAD;
    for (; g->state_table[h]; h = (h + 1) % (uint32_t)size) {
        const text_state *s = &STATE(g, g->state_table[h]);
        if (s->end == end && s->n == kept &&
            (!kept || !memcmp(g->sets.data + s->at, set, 4 * kept)))
            return g->state_table[h];
    }
    text_state s = {(uint32_t)g->sets.n, (uint32_t)kept, end, 0, new_array(256, 4), NULL};
    buffer_add(&g->sets, set, 4 * kept);
    buffer_add(&g->states, &s, sizeof s);
    g->failed |= !s.row || g->sets.failed || g->states.failed ||
                 g->states.n / sizeof s >= MOST_STATES;
    if (g->states.failed) free(s.row);
    if (g->failed) return DEAD;
    return g->state_table[h] = (uint32_t)(g->states.n / sizeof s) - 1;
}

static uint32_t state_at(grammar *g, uint32_t at);

/* The pair with which node I of two begins. */
static uint32_t first_pair(grammar *g, uint32_t i) {
    const rule_node n = NODE(g, i);
    if (n.lo) return n.lo;
    uint32_t x = state_at(g, n.a), y = state_at(g, n.b);
    return NODE(g, i).lo = pair_of(g, n.kind, x, y);
}

/* The state that the frames on the stack, from BASE on, lead to without another byte. */
static uint32_t close_state(grammar *g, size_t base) {
    size_t from = g->found.n;
    uint32_t round = ++g->round;
    bool end = false;
    while (g->stack.n > base && !g->failed) {
        uint32_t f = u32_at(g->stack.data, g->stack.n / 4 - 1);
        g->stack.n -= 4;
        g->work += 2;
        if (!f) { end = true; continue; }
        if (FRAME(g, f).seen == round) continue;
        FRAME(g, f).seen = round;
        const frame x = FRAME(g, f);
        const rule_node n = NODE(g, x.node);
        bool ends = n.kind == REP_NODE && x.count >= n.lo, waits = n.kind == CLASS_NODE;
        if (ends || n.kind == EMPTY_NODE) push(g, x.next);
        if (!(g->good[x.node] & CAN_END)) continue;
        if (n.kind == CAT_NODE) push(g, frame_of(g, n.a, 0, frame_of(g, n.b, 0, x.next)));
        if (n.kind == ALT_NODE) push(g, frame_of(g, n.a, 0, x.next));
        if (n.kind == ALT_NODE) push(g, frame_of(g, n.b, 0, x.next));
        if (n.kind == REF_NODE) push(g, frame_of(g, u32_at(g->rules.data, n.a), 0, x.next));
        if (n.kind == REP_NODE && x.count < n.hi && g->good[n.a] & CAN_END) {
            uint32_t more = n.hi == ENDLESS && x.count >= n.lo ? n.lo : x.count + 1;
            push(g, frame_of(g, n.a, 0, frame_of(g, x.node, more, x.next)));
        }
        if (n.kind >= BOTH_NODE && !x.count)
            push(g, frame_of(g, x.node, first_pair(g, x.node), x.next));
        else if (n.kind >= BOTH_NODE) {
            if (pair_ends(g, x.count)) push(g, x.next);
            waits = pair_goes_on(g, x.count);
        }
        if (waits) buffer_add(&g->found, &f, sizeof f);
        g->failed |= g->found.failed || (g->found.n - from) / 4 > MOST_SET ||
                     g->stack.n / 4 > 1 << 17 || g->work > MOST_WORK;
    }
    return state_of(g, from, end);
}

static uint32_t state_at(grammar *g, uint32_t at) {
    size_t base = g->stack.n;
    push(g, frame_of(g, at, 0, 0));
    return close_state(g, base);
}

/* Bytes that lead all frames of a state to the same places have the same next state: their places
 * in its row are filled at once. */
static uint32_t grammar_step(grammar *g, uint32_t at, uint8_t byte) {
    if (at == DEAD || g->failed) return DEAD;
    uint32_t next = STATE(g, at).row[byte];
    if (next) return next;
    const text_state s = STATE(g, at);
    size_t base = g->stack.n;
    byte_class alike = all_bytes;
    for (uint32_t i = 0; i < s.n && !g->failed; i++) {
        const frame f = FRAME(g, u32_at(g->sets.data + s.at, i));
        const rule_node n = NODE(g, f.node);
        if (n.kind == CLASS_NODE) {
            const byte_class *c = (const byte_class *)(void *)g->classes.data + n.a;
            bool has = has_byte(c, byte);
            for (int k = 0; k < 4; k++) alike.bits[k] &= has ? c->bits[k] : ~c->bits[k];
            if (has) push(g, f.next);
        } else {
            if ((next = pair_step(g, f.count, byte)))
                push(g, frame_of(g, f.node, next, f.next));
            only_alike(g, f.count, byte, &alike);
        }
    }
    next = close_state(g, base);
    g->work += s.n + 8;
    for (uint32_t b = 0; b < 256; b++)
        if (has_byte(&alike, b)) STATE(g, at).row[b] = next;
    return STATE(g, at).row[byte] = next;
}

static uint32_t grammar_start(grammar *g) {
    g->work = 0;
    return state_at(g, g->root);
}

/* Of node X: can it come to an end, and without a byte? */
static uint8_t ends_of(const grammar *g, const rule_node *x) {
    const uint8_t *good = g->good;
    switch (x->kind) {
        case EMPTY_NODE: return CAN_END | CAN_BE_EMPTY;
        case CLASS_NODE: return CAN_END;
        case CAT_NODE: return good[x->a] & good[x->b];
        case ALT_NODE: return good[x->a] | good[x->b];
        case REP_NODE: return x->lo ? good[x->a] : CAN_END | CAN_BE_EMPTY;
        case REF_NODE: return good[u32_at(g->rules.data, x->a)];
        default: return 0;                              /* those of two: see try_pairs           */
    }
}

/* Does node X not begin with itself? Of the parts, only those that can be met matter. */
static bool begins(const grammar *g, uint32_t i) {
    const rule_node x = NODE(g, i);
    const uint8_t *good = g->good;
#define FINE(k) (good[k] & HAS_A_BEGINNING || !(good[k] & CAN_END))
    switch (x.kind) {
        case CAT_NODE: return FINE(x.a) && (!(good[x.a] & CAN_BE_EMPTY) || FINE(x.b));
        case REF_NODE: return FINE(u32_at(g->rules.data, x.a));
        case REP_NODE: return FINE(x.a);
        case ALT_NODE: case BOTH_NODE: case LESS_NODE: return FINE(x.a) && FINE(x.b);
        default: return true;
    }
#undef FINE
}

static void learn_nodes(grammar *g, bool beginnings) {
    size_t n = g->nodes.n / sizeof(rule_node);
    for (bool more = true; more;) {
        more = false;
        g->work += n / 8;
        for (size_t i = 0; i < n; i++) {
            uint8_t is = beginnings ? begins(g, (uint32_t)i) ? HAS_A_BEGINNING : 0
                                    : ends_of(g, &NODE(g, i)) & (CAN_END | CAN_BE_EMPTY);
            more |= (is & ~g->good[i]) != 0;
            g->good[i] |= is;
        }
    }
}

/* Nothing was met yet: frame 0 is the end of the text, states 0 and DEAD are none. */
static void begin_tables(grammar *g) {
    frame end = {0};
    text_state none = {0};
    grammar_forget(g);
    buffer_add(&g->frames, &end, sizeof end);
    for (int i = 0; i < 2; i++) buffer_add(&g->states, &none, sizeof none);
    g->failed |= g->frames.failed || g->states.failed;
    for (size_t i = 0; !g->failed && i < g->nodes.n / sizeof(rule_node); i++)
        if (NODE(g, i).kind >= BOTH_NODE) NODE(g, i).lo = 0;
}

/* Learns which nodes of two can end, and so what else can: what has changed is looked at again,
 * with new tables, as those of before leave it out. */
static void try_pairs(grammar *g) {
    for (bool more = true; more && !g->failed;) {
        more = false;
        begin_tables(g);
        for (uint32_t i = 0; !g->failed && i < g->nodes.n / sizeof(rule_node); i++) {
            const rule_node x = NODE(g, i);
            bool can = x.kind >= BOTH_NODE && g->good[x.a] & CAN_END &&
                       (x.kind == LESS_NODE || g->good[x.b] & CAN_END);
            if (!can || g->good[i] & CAN_END) continue;
            uint32_t pair = first_pair(g, i);
            bool empty = !g->failed && pair_ends(g, pair);
            if (g->failed || (!empty && !pair_goes_on(g, pair))) continue;
            g->good[i] |= (uint8_t)(CAN_END | (empty ? CAN_BE_EMPTY : 0));
            more = true;
        }
        if (more) learn_nodes(g, false);
    }
}

/* Learns what can come to an end, and makes the beginnings of frames and states. What is wrong, or
 * NULL: memory is not looked at here. */
static const char *grammar_ready(grammar *g, uint32_t root) {
    g->root = root;
    g->good = g->failed ? NULL : new_array(g->nodes.n / sizeof(rule_node), 1);
    if (!g->good) return g->failed = true, "too large";
    learn_nodes(g, false);
    try_pairs(g);
    learn_nodes(g, true);
    begin_tables(g);
    if (!g->failed && g->good[root] & CAN_END && !(g->good[root] & HAS_A_BEGINNING))
        return "a rule begins with itself";
    if (!g->failed && g->good[root] & CAN_END) grammar_start(g);
    return g->failed ? "too large" : g->good[root] & CAN_END ? NULL : "no text fits it";
}

/* ---- choices, expressions, grammars ---------------------------------------------------------- */

enum { IS_CHOICES, IS_REGEX, IS_GBNF };

static grammar *grammar_done(grammar *g, uint32_t root, const char *what, medrun_error *e) {
    const char *why = e->code || g->failed ? "too large" : grammar_ready(g, root);
    if (!e->code && g->failed && errno == ENOMEM) out_of_memory(e, g->nodes.n);
    if (!e->code && why) fail(e, MEDRUN_USAGE, "%s: %s", what, why);
    if (!e->code) return g;
    grammar_free(g);
    return NULL;
}

/* The text V itself, or what the expression or grammar V fits. */
static uint32_t text_node(grammar *g, const json *j, uint32_t v, int kind, const char **why,
                          size_t *line) {
    buffer text = {0}, names = {0};
    uint32_t one = 0;
    if (!json_is_type(j, v, JSON_STRING)) return *why = "wanted texts", 0;
    json_unescape(j, v, &text);
    if (kind == IS_CHOICES) one = literal(g, chars_of(&text), text.n);
    else if (kind == IS_REGEX) one = add_regex(g, chars_of(&text), text.n, false, true, why);
    else one = add_gbnf(g, chars_of(&text), text.n, &names, why, line);
    g->failed |= text.failed;
    free_buffers(BUFFERS(&text, &names));
    return one;
}

/* One of the texts of list V of J, or a text that the expression or grammar V fits as a whole. */
static grammar *grammar_of_text(const json *j, uint32_t v, int kind, medrun_error *e) {
    static const char *const kinds[] = {"choices", "regular expression", "grammar"};
    errno = 0;                                          /* see grammar_done                      */
    grammar *g = new_array(1, sizeof *g);
    const char *why = NULL;
    size_t line = 0;
    if (!g) return out_of_memory(e, sizeof *g), NULL;
    bool list = kind == IS_CHOICES;
    uint32_t all = list ? never(g) : text_node(g, j, v, kind, &why, &line);
    if (list && !json_is_type(j, v, JSON_ARRAY)) why = "wanted a list of texts";
    else if (list)
        for EACH(j, v, c) all = either(g, all, text_node(g, j, c, kind, &why, &line));
    if (why && line) fail(e, MEDRUN_USAGE, "grammar: line %zu: %s", line, why);
    else if (why) fail(e, MEDRUN_USAGE, "%s: %s", kinds[kind], why);
    return grammar_done(g, all, kinds[kind], e);
}

/* ---- masks ---------------------------------------------------------------------------------- */

static const tokenizer *sorted_tokenizer;

static int compare_pieces(const void *a, const void *b) {
    int32_t x, y;
    size_t n, k;
    memcpy(&x, a, 4), memcpy(&y, b, 4);
    const char *p = tokenizer_piece(sorted_tokenizer, x, &n);
    const char *q = tokenizer_piece(sorted_tokenizer, y, &k);
    int order = memcmp(p, q, n < k ? n : k);
    return order ? order : (n > k) - (n < k);
}

static bool sort_pieces(piece_order *o, const tokenizer *t) {
    size_t vocab = (size_t)t->vocab_size, n, k;
    o->ids = new_array(vocab, 4);
    o->shared = new_array(vocab, 2);
    if (!o->ids || !o->shared) return false;
    for (int32_t id = 0; id < t->vocab_size; id++) {
        int type = tokenizer_type(t, id);
        const char *piece = tokenizer_piece(t, id, &n);
        if (n && n < 60000 && type != PIECE_CONTROL && type != PIECE_UNUSED &&
            type != PIECE_UNKNOWN) o->ids[o->n++] = id;
        if (n == 1 && o->n && o->ids[o->n - 1] == id) o->alone[(uint8_t)*piece] = true;
    }
    sorted_tokenizer = t;
    qsort(o->ids, o->n, 4, compare_pieces);
    for (size_t i = 1; i < o->n; i++) {
        const char *p = tokenizer_piece(t, o->ids[i - 1], &n);
        const char *q = tokenizer_piece(t, o->ids[i], &k);
        size_t same = 0;
        while (same < n && same < k && p[same] == q[same]) same++;
        o->shared[i] = (uint16_t)same;
    }
    return true;
}

/* Whether state AT ends, or a token can come in it after which this is true again, to DEPTH tokens:
 * a vocabulary may lack bytes, and so the end of a character that another token begins. */
enum { GOES_ON = 1, IS_STUCK };
static bool grammar_goes_on(grammar *g, const piece_order *o, const tokenizer *t, uint32_t at,
                            int depth) {
    if (at == DEAD || STATE(g, at).goes_on) return at != DEAD && STATE(g, at).goes_on == GOES_ON;
    bool goes = !depth || STATE(g, at).end;
    for (int byte = 0; !goes && byte < 256; byte++)             /* most often one byte will do   */
        goes = o->alone[byte] &&
               grammar_goes_on(g, o, t, grammar_step(g, at, (uint8_t)byte), depth - 1);
    g->work += goes ? 0 : o->n;
    for (size_t i = 0, n; !goes && i < o->n; i++) {
        const char *p = tokenizer_piece(t, o->ids[i], &n);
        uint32_t to = at;
        for (size_t k = 0; k < n && to != DEAD; k++) to = grammar_step(g, to, (uint8_t)p[k]);
        goes = grammar_goes_on(g, o, t, to, depth - 1);
    }
    if (depth == 3) STATE(g, at).goes_on = goes ? GOES_ON : IS_STUCK;   /* a character's rest  */
    return goes;
}

/* A bit for each token that may come in state AT. FIRST: it is the answer's first, which may lose
 * its space. NULL: there is no memory, or the rules are too much for us. */
static const uint8_t *grammar_mask(grammar *g, const piece_order *o, const tokenizer *t,
                                   uint32_t at, bool first) {
    size_t vocab = (size_t)t->vocab_size, deepest = 0, n;
    bool plain = !first || !(t->flags & TOKENIZER_STRIP);
    if (STATE(g, at).mask && plain) return STATE(g, at).mask;
    for (size_t i = 0; g->n_masks >= MOST_MASKS && i < g->states.n / sizeof(text_state); i++) {
        free(STATE(g, i).mask);
        STATE(g, i).mask = NULL;
    }
    if (g->n_masks >= MOST_MASKS) g->n_masks = 0;
    uint8_t *mask = new_array(vocab / 8 + 1, 1);
    uint32_t *states = new_array(t->longest + 70000, 4);
    bool good = mask && states;
    if (good) states[0] = at;
    g->work = 0;
    for (size_t i = 0; good && i < o->n && !g->failed; i++) {
        size_t depth = o->shared[i] < deepest ? o->shared[i] : deepest;
        bool fresh = first;
        const char *p = plain ? tokenizer_piece(t, o->ids[i], &n)
                              : tokenizer_text(t, o->ids[i], false, &fresh, &n);
        if (!plain) depth = 0;
        while (depth < n && states[depth] != DEAD) {
            states[depth + 1] = grammar_step(g, states[depth], (uint8_t)p[depth]);
            depth++;
        }
        deepest = depth;
        if (depth == n && n && grammar_goes_on(g, o, t, states[depth], 3))
            mask[o->ids[i] / 8] |= (uint8_t)(1u << o->ids[i] % 8);
    }
    free(states);
    good &= !g->failed;
    if (!good) { free(mask); mask = NULL; }
    if (!plain) { free(g->first_mask); return g->first_mask = mask; }
    STATE(g, at).mask = mask;
    g->n_masks++;
    return mask;
}
