/* serve_grammar.c: what an answer must look like: a JSON schema, a choice or a regular expression
 * as rules over bytes, and for each state of an answer the tokens that may come next. Included by
 * serve.c. MIT licence, see LICENSE.
 *
 * A frame is a node of the rules, how often it was repeated, and the frame behind it: a stack that
 * many answers share. A state is the set of frames whose next byte is awaited, and whether the
 * answer may end here. Frames and states are made as they are met and kept, so a byte that was seen
 * before in a state is one look at a table. What can never come to an end is left out of every
 * state: so an answer that is in a state can be finished. Whatever of a schema is not understood is
 * refused with its place. */

enum { EMPTY_NODE, CLASS_NODE, CAT_NODE, ALT_NODE, REP_NODE, REF_NODE, NO_NODE };
enum { MOST_NODES = 200000, MOST_FRAMES = 1 << 17, MOST_STATES = 1 << 14, MOST_SET = 4096,
       MOST_MASKS = 512, DEAD = 1 };
#define ENDLESS 0xFFFFFFFFu

typedef struct { uint32_t kind, a, b, lo, hi; } node;
typedef struct { uint8_t bits[32]; } byte_class;
typedef struct { uint32_t node, count, next, seen; } frame;
typedef struct { uint32_t at, n; bool end; uint8_t goes_on; uint32_t *row; uint8_t *mask; } state;
typedef struct { uint32_t value, rule; } rule_of_value;

struct grammar {
    buffer nodes, classes, rules, values;       /* rules: uint32_t nodes; values: rule_of_value */
    buffer frames, sets, states, stack, found;
    uint8_t *first_mask;                        /* of an answer's first token, the last one made */
    uint8_t *good;                              /* nodes that can come to an end                */
    uint32_t *frame_table, *state_table;
    uint32_t round, n_masks, root;
    bool failed;
};

#define NODE(g, i) ((node *)(void *)(g)->nodes.data)[i]
#define FRAME(g, i) ((frame *)(void *)(g)->frames.data)[i]
#define STATE(g, i) ((state *)(void *)(g)->states.data)[i]

static void grammar_free(grammar *g) {
    if (!g) return;
    for (size_t i = 0; i < g->states.n / sizeof(state); i++) {
        free(STATE(g, i).row);
        free(STATE(g, i).mask);
    }
    buffer *const all[] = {&g->nodes, &g->classes, &g->rules, &g->values, &g->frames, &g->sets,
                           &g->states, &g->stack, &g->found};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) buffer_free(all[i]);
    free(g->good);
    free(g->first_mask);
    free(g->frame_table);
    free(g->state_table);
    free(g);
}

/* ---- building ------------------------------------------------------------------------------- */

static uint32_t add_node(grammar *g, uint32_t kind, uint32_t a, uint32_t b) {
    node n = {kind, a, b, 0, 0};
    if (g->nodes.n / sizeof n >= MOST_NODES) g->failed = true;
    else buffer_add(&g->nodes, &n, sizeof n);
    g->failed |= g->nodes.failed;
    return g->failed ? 0 : (uint32_t)(g->nodes.n / sizeof n) - 1;
}

static uint32_t cat(grammar *g, uint32_t a, uint32_t b) { return add_node(g, CAT_NODE, a, b); }
static uint32_t either(grammar *g, uint32_t a, uint32_t b) { return add_node(g, ALT_NODE, a, b); }
static uint32_t empty(grammar *g) { return add_node(g, EMPTY_NODE, 0, 0); }
static uint32_t never(grammar *g) { return add_node(g, NO_NODE, 0, 0); }

static uint32_t repeat(grammar *g, uint32_t a, uint32_t lo, uint32_t hi) {
    uint32_t n = add_node(g, REP_NODE, a, 0);
    if (!g->failed) NODE(g, n).lo = lo, NODE(g, n).hi = hi;
    return n;
}

/* One byte from LO to HI. */
static uint32_t bytes_between(grammar *g, uint32_t lo, uint32_t hi) {
    byte_class c = {{0}};
    for (uint32_t i = lo; i <= hi; i++) c.bits[i / 8] |= (uint8_t)(1u << i % 8);
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
    for (uint32_t low = 0x3F; low < 0x3FFFF && hi > 0x7F; low = low << 6 | 0x3F) {
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

/* ---- regular expressions -------------------------------------------------------------------- */

typedef struct {
    grammar *g;
    const uint8_t *p, *end;
    bool in_json;
    const char *wrong;
    int depth;
} regex;

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

/* \d \w \s and their opposites, or one character. False: something else. */
static bool regex_escape(regex *r, ranges *s) {
    static const char names[] = "nrtfv0", codes[] = "\n\r\t\f\v\0";
    uint32_t c = r->p < r->end ? *r->p++ : 0;
    ranges own = {0, {{0}}};
    switch (c | 0x20) {
        case 'd': add_range(r, &own, '0', '9'); break;
        case 's': add_range(r, &own, '\t', '\r'), add_range(r, &own, ' ', ' '); break;
        case 'w':
            add_range(r, &own, '0', '9'), add_range(r, &own, 'A', 'Z');
            add_range(r, &own, '_', '_'), add_range(r, &own, 'a', 'z');
            break;
        default: break;
    }
    if (own.n) {
        if (c < 'a') turn_round(&own);
        for (uint32_t i = 0; i < own.n; i++) add_range(r, s, own.of[i][0], own.of[i][1]);
        return true;
    }
    if (c == 'x' || c == 'u') {
        uint32_t n = c == 'x' ? 2 : 4, v = 0;
        for (; n && r->p < r->end && isxdigit(*r->p); n--, r->p++)
            v = v << 4 | (*r->p <= '9' ? *r->p - 48u : (*r->p | 0x20u) - 87);
        if (n) r->wrong = "an escape without its digits";
        add_range(r, s, v, v);
        return true;
    }
    const char *at = c ? strchr(names, (int)c) : NULL;
    if (at) c = (uint8_t)codes[at - names];
    else if (!c || isalnum((int)c)) return r->wrong = "an escape that is not here", false;
    add_range(r, s, c, c);
    return true;
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

static uint32_t regex_class(regex *r) {
    ranges s = {0, {{0}}};
    bool turned = r->p < r->end && *r->p == '^';
    r->p += turned;
    for (bool first = true; !r->wrong && (first || r->p >= r->end || *r->p != ']'); first = false) {
        if (r->p >= r->end) { r->wrong = "a class without ]"; break; }
        uint32_t before = s.n;
        if (*r->p == '\\') r->p++, regex_escape(r, &s);
        else { uint32_t c = regex_one(r); add_range(r, &s, c, c); }
        if (r->wrong || r->end - r->p < 2 || *r->p != '-' || r->p[1] == ']') continue;
        r->p++;
        ranges to = {0, {{0}}};
        if (*r->p == '\\') r->p++, regex_escape(r, &to);
        else { uint32_t c = regex_one(r); add_range(r, &to, c, c); }
        if (s.n != before + 1 || to.n != 1 || s.of[before][0] > to.of[0][0])
            r->wrong = "a range that is none";
        else s.of[before][1] = to.of[0][0];
    }
    r->p++;
    if (turned) turn_round(&s);
    return of_ranges(r, &s);
}

static uint32_t regex_atom(regex *r) {
    ranges s = {0, {{0}}};
    uint8_t c = *r->p;
    if (c == '(') {
        r->p++;
        if (r->p < r->end && *r->p == '?') {
            if (r->end - r->p < 2 || r->p[1] != ':') r->wrong = "such a group is not here";
            r->p += 2;
        }
        uint32_t inner = r->wrong || ++r->depth > 64 ? 0 : regex_either(r);
        if (r->depth > 64) r->wrong = "groups in groups in groups";
        r->depth--;
        if (!r->wrong && (r->p >= r->end || *r->p != ')')) r->wrong = "a group without )";
        r->p++;
        return inner;
    }
    if (c == '[') return r->p++, regex_class(r);
    if (strchr("*+?{)^$", c)) return r->wrong = "a sign where a character is wanted", 0;
    if (c == '.') {
        r->p++;
        add_range(r, &s, '\n', '\n'), add_range(r, &s, '\r', '\r');
        turn_round(&s);
    } else if (c == '\\') r->p++, regex_escape(r, &s);
    else { uint32_t code = regex_one(r); add_range(r, &s, code, code); }
    return of_ranges(r, &s);
}

static uint32_t regex_count(regex *r) {
    uint32_t v = 0;
    if (r->p >= r->end || !isdigit(*r->p)) r->wrong = "a count without a number";
    for (; r->p < r->end && isdigit(*r->p) && v < 65536; r->p++) v = v * 10 + (*r->p - 48u);
    if (v > 65535) r->wrong = "more than 65535 times";
    return v;
}

static uint32_t regex_cat(regex *r) {
    uint32_t all = empty(r->g);
    while (!r->wrong && !r->g->failed && r->p < r->end && *r->p != '|' && *r->p != ')' &&
           !(*r->p == '$' && r->p + 1 == r->end)) {
        uint32_t one = regex_atom(r), lo = 1, hi = 1;
        if (!r->wrong && r->p < r->end && strchr("*+?{", *r->p)) {
            uint8_t c = *r->p++;
            lo = c == '+', hi = c == '?' ? 1 : ENDLESS;
            if (c == '{') {
                lo = hi = regex_count(r);
                if (r->p < r->end && *r->p == ',')
                    hi = ++r->p < r->end && *r->p != '}' ? regex_count(r) : ENDLESS;
                if (r->p >= r->end || *r->p++ != '}' || lo > hi) r->wrong = "a count that is none";
            }
            if (r->p < r->end && *r->p == '?') r->p++;          /* lazy: the same texts          */
            one = repeat(r->g, one, lo, hi);
        }
        all = cat(r->g, all, one);
    }
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
    regex r = {g, text, (const uint8_t *)text + n, in_json, NULL, 0};
    bool bar = n && memchr(text, '|', n), from = n && *r.p == '^', to = n && r.end[-1] == '$' &&
               (n < 2 || r.end[-2] != '\\');
    ranges any = {1, {{0, 0x10FFFF}}};
    if (bar && (from || to) && !whole) r.wrong = "^ or $ beside |";
    if (n > 4096) r.wrong = "longer than 4096 bytes";
    r.p += from;
    uint32_t all = r.wrong ? 0 : regex_either(&r);
    if (!r.wrong && r.p < r.end && !(to && r.p + 1 == r.end)) r.wrong = "a sign too many";
    if (!whole && !from) all = cat(g, repeat(g, of_ranges(&r, &any), 0, ENDLESS), all);
    if (!whole && !to) all = cat(g, all, repeat(g, of_ranges(&r, &any), 0, ENDLESS));
    *why = r.wrong;
    return all;
}

/* ---- the state of an answer ----------------------------------------------------------------- */

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

static int compare_ids(const void *a, const void *b) {
    uint32_t x, y;
    memcpy(&x, a, 4), memcpy(&y, b, 4);
    return (x > y) - (x < y);
}

/* The state that the frames on the stack lead to without another byte. */
static uint32_t close_state(grammar *g) {
    bool end = false;
    g->found.n = 0;
    g->round++;
    while (g->stack.n && !g->failed) {
        uint32_t f = u32_at(g->stack.data, g->stack.n / 4 - 1);
        g->stack.n -= 4;
        if (!f) { end = true; continue; }
        if (FRAME(g, f).seen == g->round) continue;
        FRAME(g, f).seen = g->round;
        const frame x = FRAME(g, f);
        const node n = NODE(g, x.node);
        bool ends = n.kind == REP_NODE && x.count >= n.lo;
        if (ends || n.kind == EMPTY_NODE) push(g, x.next);
        if (!g->good[x.node]) continue;
        if (n.kind == CLASS_NODE) buffer_add(&g->found, &f, sizeof f);
        if (n.kind == CAT_NODE) push(g, frame_of(g, n.a, 0, frame_of(g, n.b, 0, x.next)));
        if (n.kind == ALT_NODE) push(g, frame_of(g, n.a, 0, x.next));
        if (n.kind == ALT_NODE) push(g, frame_of(g, n.b, 0, x.next));
        if (n.kind == REF_NODE) push(g, frame_of(g, u32_at(g->rules.data, n.a), 0, x.next));
        if (n.kind == REP_NODE && x.count < n.hi && g->good[n.a]) {
            uint32_t more = n.hi == ENDLESS && x.count >= n.lo ? n.lo : x.count + 1;
            push(g, frame_of(g, n.a, 0, frame_of(g, x.node, more, x.next)));
        }
        g->failed |= g->found.failed || g->found.n / 4 > MOST_SET || g->stack.n / 4 > 1 << 16;
    }
    size_t n = g->found.n / 4, size = 2 * MOST_STATES;
    if (g->failed || (!n && !end)) return DEAD;
    if (n) qsort(g->found.data, n, 4, compare_ids);
    uint32_t h = hash_text(2166136261u + end, g->found.data, g->found.n) % (uint32_t)size;
    if (!g->state_table && !(g->state_table = new_array(size, 4))) return g->failed = true, DEAD;
    for (; g->state_table[h]; h = (h + 1) % (uint32_t)size) {
        const state *s = &STATE(g, g->state_table[h]);
        if (s->end == end && s->n == n &&
            (!n || !memcmp(g->sets.data + s->at, g->found.data, 4 * n)))
            return g->state_table[h];
    }
    state s = {(uint32_t)g->sets.n, (uint32_t)n, end, 0, new_array(256, 4), NULL};
    buffer_add(&g->sets, g->found.data, g->found.n);
    buffer_add(&g->states, &s, sizeof s);
    g->failed |= !s.row || g->sets.failed || g->states.failed ||
                 g->states.n / sizeof s >= MOST_STATES;
    if (g->failed) return DEAD;
    return g->state_table[h] = (uint32_t)(g->states.n / sizeof s) - 1;
}

static uint32_t grammar_step(grammar *g, uint32_t at, uint8_t byte) {
    if (at == DEAD) return DEAD;
    uint32_t next = STATE(g, at).row[byte];
    if (next) return next;
    const state s = STATE(g, at);
    for (uint32_t i = 0; i < s.n; i++) {
        const frame f = FRAME(g, u32_at(g->sets.data + s.at, i));
        const byte_class *c = (const byte_class *)(void *)g->classes.data + NODE(g, f.node).a;
        if (c->bits[byte / 8] >> byte % 8 & 1) push(g, f.next);
    }
    return STATE(g, at).row[byte] = close_state(g);
}

static uint32_t grammar_start(grammar *g) {
    push(g, frame_of(g, g->root, 0, 0));
    return close_state(g);
}

static bool grammar_ends(grammar *g, uint32_t at) { return at != DEAD && STATE(g, at).end; }
static bool grammar_only_ends(grammar *g, uint32_t at) { return at == DEAD || !STATE(g, at).n; }

/* Marks what can come to an end, and makes the beginnings of frames and states. False: nothing may
 * be written at all. */
static bool grammar_ready(grammar *g, uint32_t root) {
    size_t n = g->nodes.n / sizeof(node);
    state none = {0};
    frame end = {0};
    g->root = root;
    g->good = new_array(n, 1);
    if (g->failed || !g->good) return false;
    for (bool more = true; more;) {
        more = false;
        for (size_t i = 0; i < n; i++) {
            const node x = NODE(g, i);
            const uint8_t *good = g->good;
            bool is = x.kind == CAT_NODE ? good[x.a] && good[x.b] :
                      x.kind == ALT_NODE ? good[x.a] || good[x.b] :
                      x.kind == REP_NODE ? !x.lo || good[x.a] :
                      x.kind == REF_NODE ? good[u32_at(g->rules.data, x.a)] : x.kind != NO_NODE;
            more |= is && !good[i];
            g->good[i] |= is;
        }
    }
    buffer_add(&g->frames, &end, sizeof end);           /* frame 0 is the end of the answer      */
    for (int i = 0; i < 2; i++) buffer_add(&g->states, &none, sizeof none);
    return g->good[root] && !g->frames.failed && !g->states.failed;
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
    for (size_t i = 0; g->n_masks >= MOST_MASKS && i < g->states.n / sizeof(state); i++) {
        free(STATE(g, i).mask);
        STATE(g, i).mask = NULL;
    }
    if (g->n_masks >= MOST_MASKS) g->n_masks = 0;
    uint8_t *mask = new_array(vocab / 8 + 1, 1);
    uint32_t *states = new_array(t->longest + 70000, 4);
    bool good = mask && states;
    if (good) states[0] = at;
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

/* ---- JSON schema ---------------------------------------------------------------------------- */

typedef struct {
    grammar *g;
    const json *j;
    medrun_error *e;
    buffer *place;              /* where the refusal is: a JSON pointer                         */
    uint32_t root, blank, text, any;            /* the schema; nodes that are used often        */
} schema_reader;

static int schema_refuse(schema_reader *r, uint32_t v, const char *what) {
    const json *j = r->j;
    if (r->e->code) return 0;
    for (uint32_t at = r->root; at != v;) {             /* the way down to V                     */
        uint32_t c = at + 1, i = 0;
        bool object = json_typeof(j, at) == JSON_OBJECT;
        for (; i < j->nodes[at].count; i++, c = j->nodes[c].next) {
            if (object && i % 2 == 0) continue;
            if (v >= c && v < j->nodes[c].next) break;
        }
        if (i >= j->nodes[at].count) break;
        if (!object) buffer_printf(r->place, "/%u", i);
        else for (uint32_t k = at + 1; k < c; k = j->nodes[k + 1].next)
            if (k + 1 == c) buffer_printf(r->place, "/%.*s", (int)(j->nodes[k].end -
                                          j->nodes[k].start), j->text + j->nodes[k].start);
        at = c;
    }
    fail(r->e, MEDRUN_USAGE, "schema: #%.200s: %s", chars_of(r->place), what);
    return 0;
}

/* The rule of the schema at V; its node is made later. */
static uint32_t schema_ref(schema_reader *r, uint32_t v) {
    grammar *g = r->g;
    size_t n = g->values.n / sizeof(rule_of_value);
    rule_of_value made = {v, (uint32_t)n};
    for (size_t i = 0; i < n; i++)
        if (((rule_of_value *)(void *)g->values.data)[i].value == v)
            return add_node(g, REF_NODE, (uint32_t)i, 0);
    uint32_t none = 0;
    buffer_add(&g->values, &made, sizeof made);
    buffer_add(&g->rules, &none, sizeof none);
    g->failed |= g->values.failed || g->rules.failed || n > 20000;
    return add_node(g, REF_NODE, (uint32_t)n, 0);
}

static uint32_t quoted(schema_reader *r, uint32_t inner) {
    uint32_t mark = bytes_between(r->g, '"', '"');
    return cat(r->g, mark, cat(r->g, inner, mark));
}

static uint32_t any_char(schema_reader *r) { return written(r->g, 0x20, 0x10FFFF, true); }

/* A number of the fewest words that are always enough, and which ends. */
static uint32_t any_number(schema_reader *r, bool whole) {
    const char *why, *text = whole ? "-?(0|[1-9][0-9]{0,17})"
        : "-?(0|[1-9][0-9]{0,17})(\\.[0-9]{1,17})?([eE][+-]?[0-9]{1,3})?";
    return add_regex(r->g, text, strlen(text), false, true, &why);
}

/* Whole numbers from LO to HI, both with as many digits. */
static uint32_t same_digits(grammar *g, const char *lo, const char *hi) {
    if (!*lo) return empty(g);
    uint32_t a = (uint8_t)*lo, b = (uint8_t)*hi, all_digits = (uint32_t)strlen(lo);
    if (strspn(lo, "0") == all_digits && strspn(hi, "9") == all_digits)
        return repeat(g, bytes_between(g, '0', '9'), all_digits, all_digits);
    if (a == b) return cat(g, bytes_between(g, a, a), same_digits(g, lo + 1, hi + 1));
    char nines[24], zeros[24];
    size_t n = strlen(lo + 1);
    memset(nines, '9', n), memset(zeros, '0', n);
    nines[n] = zeros[n] = 0;
    uint32_t all = cat(g, bytes_between(g, a, a), same_digits(g, lo + 1, nines));
    all = either(g, all, cat(g, bytes_between(g, b, b), same_digits(g, zeros, hi + 1)));
    if (a + 1 < b)
        all = either(g, all, cat(g, bytes_between(g, a + 1, b - 1),
                                 repeat(g, bytes_between(g, '0', '9'), (uint32_t)n, (uint32_t)n)));
    return all;
}

static uint32_t whole_between(grammar *g, int64_t lo, int64_t hi) {
    uint32_t all = never(g);
    if (lo > hi) return all;
    if (lo < 0) {
        int64_t from = hi < 0 ? -hi : 1;
        all = cat(g, bytes_between(g, '-', '-'), whole_between(g, from, -lo));
        if (hi < 0) return all;
        lo = 0;
    }
    for (int64_t power = 1; power <= 100000000000000000; power *= 10) {     /* digits by digits  */
        int64_t least = power == 1 ? 0 : power, most = power * 10 - 1;
        int64_t a = lo > least ? lo : least, b = hi < most ? hi : most;
        char from[24], to[24];
        if (a > b) continue;
        snprintf(from, sizeof from, "%lld", (long long)a);
        snprintf(to, sizeof to, "%lld", (long long)b);
        all = either(g, all, same_digits(g, from, to));
    }
    return all;
}

/* The bounds of V, each a whole number up to 10^17: others are refused. */
static uint32_t bounded(schema_reader *r, uint32_t v, bool whole) {
    static const char *const names[] = {"minimum", "exclusiveMinimum", "maximum",
                                        "exclusiveMaximum"};
    int64_t lo = -99999999999999999, hi = 99999999999999999;
    bool some = false;
    for (int i = 0; i < 4; i++) {
        uint32_t f = json_get(r->j, v, names[i]);
        if (f == JSON_NONE) continue;
        double d = json_is_type(r->j, f, JSON_NUMBER) ? json_number(r->j, f) : NAN;
        some = true;
        if (!(fabs(d) < 1e17)) return (uint32_t)schema_refuse(r, f, "a bound that is not covered");
        if (i == 0 && ceil(d) > (double)lo) lo = (int64_t)ceil(d);
        if (i == 1 && floor(d) + 1 > (double)lo) lo = (int64_t)floor(d) + 1;
        if (i == 2 && floor(d) < (double)hi) hi = (int64_t)floor(d);
        if (i == 3 && ceil(d) - 1 < (double)hi) hi = (int64_t)ceil(d) - 1;
    }
    if (!some) return any_number(r, whole);
    /* of numbers that need not be whole, those between LO and HI that are, and fractions between
     * them: a part of what is allowed, and nothing else */
    uint32_t all = whole_between(r->g, lo, hi);
    if (whole || lo >= hi) return all;
    const char *why;
    uint32_t part = add_regex(r->g, "\\.[0-9]{1,15}", 13, false, true, &why), below = never(r->g);
    if (lo < 0) {
        uint32_t minus = bytes_between(r->g, '-', '-');
        below = cat(r->g, minus, whole_between(r->g, hi < 0 ? -hi : 0, -lo - 1));
    }
    if (hi > 0) below = either(r->g, below, whole_between(r->g, lo > 0 ? lo : 0, hi - 1));
    return either(r->g, all, cat(r->g, below, part));
}

/* A count that KEY of V gives, or STANDARD. */
static uint32_t schema_count(schema_reader *r, uint32_t v, const char *key, uint32_t standard) {
    uint32_t f = json_get(r->j, v, key);
    double d = 0;
    if (f == JSON_NONE) return standard;
    if (!read_real(r->j, f, 0, 65535, true, &d)) schema_refuse(r, f, "wanted 0 to 65535");
    return (uint32_t)d;
}

static uint32_t string_node(schema_reader *r, uint32_t v) {
    static const char *const formats[][2] = {
        {"date", "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"},
        {"time", "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3])"
                 ":[0-5][0-9])"},
        {"date-time", "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])T([01][0-9]|2[0-3])"
                      ":[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3])"
                      ":[0-5][0-9])"},
        {"uuid", "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"},
        {"ipv4", "((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\\.){3}(25[0-5]|2[0-4][0-9]|"
                 "1[0-9]{2}|[1-9]?[0-9])"},
        {"email", "[a-z0-9]([a-z0-9_.+-]{0,30}[a-z0-9])?@[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?"
                  "(\\.[a-z]{2,12}){1,3}"}};
    uint32_t pattern = json_get(r->j, v, "pattern"), format = json_get(r->j, v, "format");
    uint32_t lo = schema_count(r, v, "minLength", 0), inner;
    uint32_t hi = schema_count(r, v, "maxLength", ENDLESS);
    bool counted = lo || hi != ENDLESS;
    const char *why = NULL;
    if ((pattern != JSON_NONE) + (format != JSON_NONE) + counted > 1)
        return (uint32_t)schema_refuse(r, v, "more than one of pattern, format and lengths");
    if (lo > hi) return never(r->g);
    if (format != JSON_NONE) {
        for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
            if (json_is(r->j, format, formats[i][0]))
                return quoted(r, add_regex(r->g, formats[i][1], strlen(formats[i][1]), true, true,
                                           &why));
        return (uint32_t)schema_refuse(r, format, "a format that is not covered");
    }
    if (pattern == JSON_NONE) return quoted(r, repeat(r->g, any_char(r), lo, hi));
    buffer text = {0};
    if (!json_is_type(r->j, pattern, JSON_STRING)) schema_refuse(r, pattern, "wanted a text");
    else json_unescape(r->j, pattern, &text);
    inner = add_regex(r->g, text.n ? text.data : (const uint8_t *)"", text.n, true, false, &why);
    buffer_free(&text);
    if (why) schema_refuse(r, pattern, why);
    return quoted(r, inner);
}

static uint32_t list_node(schema_reader *r, uint32_t v) {
    grammar *g = r->g;
    uint32_t items = json_get(r->j, v, "items"), lo = schema_count(r, v, "minItems", 0);
    uint32_t hi = schema_count(r, v, "maxItems", ENDLESS);
    uint32_t one = items == JSON_NONE ? r->any : schema_ref(r, items);
    uint32_t next = cat(g, cat(g, word(g, ","), r->blank), one), all = never(g);
    if (hi) all = cat(g, one, repeat(g, next, lo ? lo - 1 : 0, hi == ENDLESS ? hi : hi - 1));
    if (lo > hi) return never(g);
    if (!lo) all = either(g, all, empty(g));
    return cat(g, word(g, "["), cat(g, all, word(g, "]")));
}

/* Keys that are none of the N in NAMES, from byte AT on, which they all have in common until there.
 * As in all our strings, no letter is escaped, so a key has one spelling. */
static uint32_t other_keys(schema_reader *r, const span *names, size_t n, size_t at) {
    grammar *g = r->g;
    uint32_t all = never(g), rest = repeat(g, any_char(r), 0, ENDLESS), from = 0x20;
    bool ends = false;
    if (!n) return rest;
    for (size_t i = 0; i < n; i++) ends |= names[i].n == at;
    if (!ends) all = empty(g);
    for (uint32_t c = 0x20; c < 0x80; c++) {            /* names are ASCII here, see below       */
        span deeper[256];
        size_t k = 0;
        for (size_t i = 0; i < n; i++)
            if (names[i].n > at && (uint8_t)names[i].text[at] == c) deeper[k++] = names[i];
        if (!k) continue;
        if (from < c) all = either(g, all, cat(g, written(g, from, c - 1, true), rest));
        all = either(g, all, cat(g, bytes_between(g, c, c), other_keys(r, deeper, k, at + 1)));
        from = c + 1;
    }
    return either(g, all, cat(g, written(g, from, 0x10FFFF, true), rest));
}

static bool is_required(schema_reader *r, uint32_t list, uint32_t key) {
    uint32_t c = list + 1;
    buffer name = {0};
    json_unescape(r->j, key, &name);
    buffer_add(&name, "", 1);
    bool found = false;
    for (uint32_t i = 0; list != JSON_NONE && !name.failed && i < r->j->nodes[list].count; i++) {
        found |= json_is(r->j, c, (char *)name.data);
        c = r->j->nodes[c].next;
    }
    r->g->failed |= name.failed;
    buffer_free(&name);
    return found;
}

/* Properties in the schema's order, those that are not required may be missing; then others. From
 * the last to the first: what may follow when something stands before, and when nothing does. */
static uint32_t object_node(schema_reader *r, uint32_t v) {
    grammar *g = r->g;
    const json *j = r->j;
    uint32_t list = json_get(j, v, "properties"), more = json_get(j, v, "additionalProperties");
    uint32_t required = json_get(j, v, "required"), keys[128], n = 0, c = list + 1, known = 0;
    span names[128];
    bool open = more == JSON_NONE ? list == JSON_NONE : json_typeof(j, more) != JSON_FALSE;
    if (list != JSON_NONE && (json_typeof(j, list) != JSON_OBJECT || j->nodes[list].count > 256))
        return (uint32_t)schema_refuse(r, list, "wanted an object of at most 128 properties");
    if (required != JSON_NONE && json_typeof(j, required) != JSON_ARRAY)
        return (uint32_t)schema_refuse(r, required, "wanted a list");
    for (uint32_t i = 0; list != JSON_NONE && i < j->nodes[list].count; i += 2) {
        span name = {j->text + j->nodes[c].start, j->nodes[c].end - j->nodes[c].start};
        for (size_t k = 0; open && k < name.n; k++)
            if (name.text[k] == '\\' || (uint8_t)name.text[k] >= 0x80)
                return (uint32_t)schema_refuse(r, list, "such a name beside additionalProperties");
        names[n] = name, keys[n++] = c;
        known += is_required(r, required, c);
        c = j->nodes[c + 1].next;
    }
    if (required != JSON_NONE && known != j->nodes[required].count)
        return (uint32_t)schema_refuse(r, required, "a required property that has no schema");
    uint32_t comma = cat(g, word(g, ","), r->blank), colon = cat(g, word(g, ":"), r->blank);
    uint32_t after = empty(g), first = after, pair;
    if (open) {
        bool all = more == JSON_NONE || json_typeof(j, more) == JSON_TRUE;
        uint32_t value = all ? r->any : schema_ref(r, more);
        pair = cat(g, quoted(r, other_keys(r, names, n, 0)), cat(g, colon, value));
        after = repeat(g, cat(g, comma, pair), 0, ENDLESS);
        first = either(g, empty(g), cat(g, pair, after));
    }
    while (n-- > 0) {
        bool must = is_required(r, required, keys[n]);
        uint32_t name = quoted(r, literal(g, names[n].text, names[n].n));
        pair = cat(g, name, cat(g, colon, schema_ref(r, keys[n] + 1)));
        uint32_t with = cat(g, pair, after), alone = cat(g, comma, with);
        first = must ? with : either(g, with, first);
        after = must ? alone : either(g, alone, after);
    }
    return cat(g, word(g, "{"), cat(g, first, word(g, "}")));
}

/* ---- schemas of any kind ---- */

static const char *const type_words[] = {"null", "boolean", "integer", "number", "string", "array",
                                         "object"};

static uint32_t of_type(schema_reader *r, uint32_t v, int type) {
    switch (type) {
        case 0: return word(r->g, "null");
        case 1: return either(r->g, word(r->g, "true"), word(r->g, "false"));
        case 2: case 3: return bounded(r, v, type == 2);
        case 4: return string_node(r, v);
        case 5: return list_node(r, v);
        default: return object_node(r, v);
    }
}

/* A value that the schema gives: as Python's json.dumps writes it. */
static uint32_t constant(schema_reader *r, uint32_t v) {
    buffer b = {0};
    python_json(&b, r->j, v, 0, 0);
    uint32_t all = literal(r->g, b.data, b.n);
    r->g->failed |= b.failed;
    buffer_free(&b);
    return all;
}

/* Is the value at V of the type, or of one of the types, that stand at TYPE? */
static bool fits_type(const json *j, uint32_t type, uint32_t v) {
    static const uint8_t of[] = {[JSON_NULL] = 1, [JSON_FALSE] = 2, [JSON_TRUE] = 2,
                                 [JSON_NUMBER] = 8, [JSON_STRING] = 16, [JSON_ARRAY] = 32,
                                 [JSON_OBJECT] = 64};
    unsigned bits = of[json_typeof(j, v)];
    bool list = json_is_type(j, type, JSON_ARRAY), good = type == JSON_NONE;
    uint32_t c = list ? type + 1 : type;
    if (bits == 8 && json_number(j, v) == floor(json_number(j, v))) bits |= 4;
    for (uint32_t i = 0; !good && i < (list ? j->nodes[type].count : 1); i++) {
        for (int k = 0; k < 7; k++) good |= bits >> k & 1 && json_is(j, c, type_words[k]);
        if (list) c = j->nodes[c].next;
    }
    return good;
}

/* Keywords that say nothing about which values are allowed, or are read by another one. */
static bool says_nothing(const json *j, uint32_t key) {
    static const char *const idle[] = {
        "title", "description", "default", "examples", "example", "$schema", "$id", "id",
        "$comment", "deprecated", "readOnly", "writeOnly", "$defs", "definitions", "strict", NULL};
    return place_in(idle, j, key) >= 0;
}

/* Refuses what stands in V beside ALLOWED: nothing is skipped. */
static bool only_has(schema_reader *r, uint32_t v, const char *const *allowed) {
    uint32_t c = v + 1;
    for (uint32_t i = 0; i < r->j->nodes[v].count; i += 2, c = r->j->nodes[c + 1].next)
        if (!says_nothing(r->j, c) && place_in(allowed, r->j, c) < 0)
            return schema_refuse(r, c + 1, "this keyword is not covered here"), false;
    return true;
}

/* "#", "#/$defs/name": the schema that it means. */
static uint32_t schema_target(schema_reader *r, uint32_t v) {
    buffer path = {0};
    uint32_t at = r->root;
    if (!json_is_type(r->j, v, JSON_STRING)) return (uint32_t)schema_refuse(r, v, "wanted a text");
    json_unescape(r->j, v, &path);
    buffer_add(&path, "", 1);
    char *p = path.failed ? NULL : (char *)path.data;
    bool good = p && *p++ == '#' && (!*p || *p == '/') && !strpbrk(p, "~%");
    char *part = good ? strtok(p, "/") : NULL;
    for (; part && at != JSON_NONE; part = strtok(NULL, "/"))
        at = json_get(r->j, at, part);
    buffer_free(&path);
    if (!good || at == JSON_NONE)
        return (uint32_t)schema_refuse(r, v, "only $ref to a place in this schema is covered");
    return schema_ref(r, at);
}

/* Are the schemas of LIST of different types each, so that one value can only fit one? */
static bool are_disjoint(schema_reader *r, uint32_t list) {
    unsigned seen = 0;
    uint32_t c = list + 1;
    for (uint32_t i = 0; i < r->j->nodes[list].count; i++, c = r->j->nodes[c].next) {
        uint32_t type = json_get(r->j, c, "type");
        int k = 0;
        while (k < 7 && !json_is(r->j, type, type_words[k])) k++;
        unsigned bit = 1u << (k == 2 ? 3 : k);          /* a whole number is a number            */
        if (k == 7 || seen & bit) return false;
        seen |= bit;
    }
    return true;
}

/* The node of the schema at V. */
static uint32_t schema_node(schema_reader *r, uint32_t v) {
    static const char *const some_of[] = {"anyOf", "oneOf", "allOf", "enum", "const", "$ref", NULL};
    static const char *const typed[] = {
        "type", "properties", "required", "additionalProperties", "items", "minItems", "maxItems",
        "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum",
        "exclusiveMaximum", NULL};
    const json *j = r->j;
    grammar *g = r->g;
    if (json_typeof(j, v) == JSON_TRUE) return r->any;
    if (json_typeof(j, v) == JSON_FALSE) return never(g);
    if (json_typeof(j, v) != JSON_OBJECT)
        return (uint32_t)schema_refuse(r, v, "wanted a schema");
    uint32_t type = json_get(j, v, "type"), all = never(g);
    for (int i = 0; some_of[i]; i++) {
        uint32_t f = json_get(j, v, some_of[i]);
        const char *const allowed[] = {some_of[i], i == 3 || i == 4 ? "type" : some_of[i], NULL};
        if (f == JSON_NONE) continue;
        if (!only_has(r, v, allowed)) return 0;
        if (i == 4) return fits_type(j, type, f) ? constant(r, f) : all;
        if (i == 5) return schema_target(r, f);
        if (json_typeof(j, f) != JSON_ARRAY) return (uint32_t)schema_refuse(r, f, "wanted a list");
        if ((i == 1 && !are_disjoint(r, f)) || (i == 2 && j->nodes[f].count != 1))
            return (uint32_t)schema_refuse(r, f, i == 1 ? "oneOf of types that may both fit"
                                                        : "allOf of more than one");
        uint32_t c = f + 1;
        for (uint32_t k = 0; k < j->nodes[f].count; k++, c = j->nodes[c].next)
            if (i != 3) all = either(g, all, schema_ref(r, c));
            else if (fits_type(j, type, c)) all = either(g, all, constant(r, c));
        return all;
    }
    if (!only_has(r, v, typed)) return 0;
    bool list = json_is_type(j, type, JSON_ARRAY), guess = type == JSON_NONE;
    uint32_t c = list ? type + 1 : type;
    if (guess && json_get(j, v, "properties") == JSON_NONE && j->nodes[v].count) {
        const char *const none[] = {NULL};
        if (!only_has(r, v, none)) return 0;
    }
    if (guess && json_get(j, v, "properties") == JSON_NONE) return r->any;
    for (uint32_t i = 0; i < (list ? j->nodes[type].count : 1); i++) {
        int k = 0;
        while (k < 7 && !guess && !json_is(j, c, type_words[k])) k++;
        if (k == 7) return (uint32_t)schema_refuse(r, type, "an unknown type");
        all = either(g, all, of_type(r, v, guess ? 6 : k));
        if (list) c = j->nodes[c].next;
    }
    return all;
}

/* Any value of JSON: rule 0. */
static uint32_t any_value(schema_reader *r) {
    grammar *g = r->g;
    uint32_t comma = cat(g, word(g, ","), r->blank), self = r->any;
    uint32_t pair = cat(g, r->text, cat(g, word(g, ":"), cat(g, r->blank, self)));
    uint32_t list = either(g, empty(g), cat(g, self, repeat(g, cat(g, comma, self), 0, ENDLESS)));
    uint32_t pairs = either(g, empty(g), cat(g, pair, repeat(g, cat(g, comma, pair), 0, ENDLESS)));
    uint32_t all = either(g, cat(g, word(g, "["), cat(g, list, word(g, "]"))),
                          cat(g, word(g, "{"), cat(g, pairs, word(g, "}"))));
    all = either(g, all, either(g, r->text, any_number(r, false)));
    return either(g, all, either(g, of_type(r, 0, 0), of_type(r, 0, 1)));
}

/* The grammar of the schema at V of J; OBJECT: any object. */
static grammar *grammar_of_schema(const json *j, uint32_t v, bool object, medrun_error *e) {
    buffer place = {0};
    grammar *g = new_array(1, sizeof *g);
    if (!g) return out_of_memory(e, sizeof *g), NULL;
    schema_reader r = {g, j, e, &place, v, 0, 0, 0};
    rule_of_value any = {JSON_NONE, 0};
    uint32_t none = 0, root;
    buffer_add(&g->values, &any, sizeof any);
    buffer_add(&g->rules, &none, sizeof none);
    r.blank = repeat(g, word(g, " "), 0, 1);
    r.text = quoted(&r, repeat(g, any_char(&r), 0, ENDLESS));
    r.any = add_node(g, REF_NODE, 0, 0);
    uint32_t node_of_any = any_value(&r);
    if (!g->failed) memcpy(g->rules.data, &node_of_any, 4);
    if (object) {
        uint32_t comma = cat(g, word(g, ","), r.blank);
        uint32_t pair = cat(g, r.text, cat(g, word(g, ":"), cat(g, r.blank, r.any)));
        root = either(g, empty(g), cat(g, pair, repeat(g, cat(g, comma, pair), 0, ENDLESS)));
        root = cat(g, word(g, "{"), cat(g, root, word(g, "}")));
    } else root = schema_ref(&r, v);
    for (size_t i = 1; i < g->values.n / sizeof any && !e->code && !g->failed; i++) {
        memcpy(&any, g->values.data + i * sizeof any, sizeof any);
        uint32_t made = schema_node(&r, any.value);
        memcpy(g->rules.data + 4 * i, &made, 4);
    }
    buffer_free(&place);
    if (!e->code && g->failed) fail(e, MEDRUN_USAGE, "schema: too large");
    if (!e->code && !grammar_ready(g, root)) fail(e, MEDRUN_USAGE, "schema: no value fits it");
    if (e->code) { grammar_free(g); return NULL; }
    return g;
}

/* One of the texts of list V, or a text that regular expression V matches as a whole. */
static grammar *grammar_of_text(const json *j, uint32_t v, bool choice, medrun_error *e) {
    grammar *g = new_array(1, sizeof *g);
    const char *why = NULL;
    if (!g) return out_of_memory(e, sizeof *g), NULL;
    uint32_t all = never(g), c = v + 1;
    for (uint32_t i = 0; !why && i < (choice ? j->nodes[v].count : 1); i++) {
        buffer text = {0};
        uint32_t from = choice ? c : v;
        if (!json_is_type(j, from, JSON_STRING)) why = "wanted texts";
        else json_unescape(j, from, &text);
        const void *bytes = text.n ? text.data : (const uint8_t *)"";
        if (!why) all = either(g, all, choice ? literal(g, bytes, text.n)
                                              : add_regex(g, bytes, text.n, false, true, &why));
        g->failed |= text.failed;
        buffer_free(&text);
        if (choice) c = j->nodes[c].next;
    }
    if (why) fail(e, MEDRUN_USAGE, "%s: %s", choice ? "choices" : "regular expression", why);
    else if (!grammar_ready(g, all)) fail(e, MEDRUN_USAGE, "no text fits, or it is too large");
    if (e->code) { grammar_free(g); return NULL; }
    return g;
}
