/* serve_schema.c: JSON schemas, and calls of functions, as the rules of serve_grammar.c. Included
 * behind it. MIT licence, see LICENSE.
 *
 * A rule belongs to a set of schemas that a value must fit together: what stands in an allOf,
 * behind a $ref or beside an anyOf is added to the set, and the set is read as one schema. Of what
 * several schemas say about strings, numbers and keys, each is a node, and nodes are joined. What
 * is made is a part of what the schema allows, never more: an object's keys come in the schema's
 * order, strings have one spelling, numbers at most 17 digits. So oneOf needs care: that no value
 * fits two of its schemas is asked of a set of both, for which what we leave out is allowed. */

enum { MOST_JOINED = 128, MOST_PROPERTIES = 1024, MOST_PATTERNS = 5, N_BUCKETS = 1024 };
enum { ANY_DONE = 1, ONE_DONE = 2, VALUES_DONE = 4, FLAGS = 8 };
/* The standard's additionalProperties; whether any value fits, of the types in the upper bits. */
enum { OPEN = 1, ASKING = 2, TYPES_AT = 8 };

/* Schemas that hold together: nodes of the JSON x FLAGS, and which of their keywords are done. */
typedef struct { uint32_t n, of[MOST_JOINED]; bool none; } schemas;
typedef struct { uint32_t at, n, rule, next, mode; } set_row;
typedef struct { uint32_t rule, place; } question;

typedef struct {
    grammar *g;
    const json *j;
    medrun_error *e;
    uint32_t root, blank, gap, letter, text, any; /* the schema; nodes that are used often */
    uint32_t buckets[N_BUCKETS], n_done;
    buffer sets, rows, questions;               /* uint32_t; set_row; question                  */
    uint8_t *marks;                             /* schemas on the way from the root, see leads  */
    uint32_t *targets;                          /* what a $ref means, once that is known        */
    bool open;
} schema_reader;

/* What a JSON pointer has for the text of key K. */
static void add_pointer(buffer *b, const json *j, uint32_t k) {
    const char *p = j->text + j->nodes[k].start, *end = j->text + j->nodes[k].end;
    buffer_text(b, "/");
    for (; p < end; p++)
        if (*p == '~' || *p == '/') buffer_text(b, *p == '~' ? "~0" : "~1");
        else buffer_add(b, p, 1);
}

/* The child of AT in which V stands, its key in *KEY; JSON_NONE where AT is V. */
static uint32_t child_towards(const json *j, uint32_t at, uint32_t v, uint32_t *key, uint32_t *i) {
    uint32_t c = at + 1;
    bool object = json_typeof(j, at) == JSON_OBJECT;
    for (*i = 0; at != v && *i < j->nodes[at].count; *i += object ? 2 : 1) {
        *key = object ? c : JSON_NONE;
        if (object) c++;
        if (v >= c && v < j->nodes[c].next) return c;
        if (*key == v) return JSON_NONE;
        c = j->nodes[c].next;
    }
    return JSON_NONE;
}

static uint32_t schema_refuse(schema_reader *r, uint32_t v, const char *what) {
    buffer place = {0};
    uint32_t key = JSON_NONE, i;
    if (r->e->code) return 0;
    for (uint32_t at = r->root; (at = child_towards(r->j, at, v, &key, &i)) != JSON_NONE;)
        if (key == JSON_NONE) buffer_printf(&place, "/%u", i);
        else add_pointer(&place, r->j, key);
    fail(r->e, MEDRUN_USAGE, "schema: #%.200s: %s", chars_of(&place), what);
    buffer_free(&place);
    return 0;
}

static int one_of(const char *const *list, const json *j, uint32_t key) {
    for (int i = 0; list[i]; i++) if (json_is(j, key, list[i])) return i;
    return -1;
}

/* ---- sets ----------------------------------------------------------------------------------- */

static uint32_t value_of(const schemas *s, uint32_t i) { return s->of[i] / FLAGS; }

/* The next member of S, from *I on, that has KEY, whose value is *F; false: none. */
static bool says(const schema_reader *r, const schemas *s, const char *key, uint32_t *i,
                 uint32_t *f) {
    for (; *i < s->n; ++*i)
        if ((*f = json_get(r->j, value_of(s, *i), key)) != JSON_NONE) return true;
    return false;
}

/* for EACH_SAID(r, s, key, i, f): what the members I of S have as KEY. */
#define EACH_SAID(r, s, key, i, f) (uint32_t i = 0, f = 0; says(r, s, key, &i, &f); i++)

/* The rule of set S; its node is made later. */
static uint32_t rule_of(schema_reader *r, const schemas *s, uint32_t mode) {
    uint32_t h = hash_text(2166136261u + mode, (const uint8_t *)s->of, 4 * s->n) % N_BUCKETS;
    uint32_t n_rows = (uint32_t)(r->rows.n / sizeof(set_row));
    for (uint32_t i = r->buckets[h]; i; ) {
        const set_row *row = (const set_row *)(void *)r->rows.data + i - 1;
        if (row->n == s->n && row->mode == mode && (!s->n ||
            !memcmp(r->sets.data + row->at, s->of, 4 * s->n))) return row->rule;
        i = row->next;
    }
    set_row row = {(uint32_t)r->sets.n, s->n, new_rule(r->g), r->buckets[h], mode};
    buffer_add(&r->sets, s->of, 4 * s->n);
    buffer_add(&r->rows, &row, sizeof row);
    r->buckets[h] = n_rows + 1;
    r->g->failed |= r->sets.failed || r->rows.failed || n_rows >= 20000;
    return row.rule;
}

static uint32_t node_of(schema_reader *r, const schemas *s, uint32_t mode) {
    if (s->none) return never(r->g);
    return s->n ? refer(r->g, rule_of(r, s, mode)) : r->any;
}

/* "#", "#/$defs/name": the schema that it means. */
static uint32_t find_target(schema_reader *r, uint32_t v) {
    static const char *const bases[] = {"$id", "id", NULL};
    const json *j = r->j;
    buffer path = {0};
    uint32_t at = r->root, key, k;
    for (uint32_t up = r->root; (up = child_towards(j, up, v, &key, &k)) != JSON_NONE;)
        for (int i = 0; bases[i]; i++) {
            uint32_t id = json_get(j, up, bases[i]);
            if (json_is_type(j, id, JSON_STRING) && j->text[j->nodes[id].start] != '#')
                return schema_refuse(r, v, "a $ref below another $id is not covered");
        }
    if (!json_is_type(j, v, JSON_STRING)) return schema_refuse(r, v, "wanted a text");
    json_unescape(j, v, &path);
    buffer_add(&path, "", 1);
    char *p = path.failed ? NULL : (char *)path.data;
    bool good = p && *p++ == '#' && (!*p || *p == '/');
    while (good && *p && at != JSON_NONE) {
        char part[256];
        size_t n = 0;
        for (p++; *p && *p != '/' && n < sizeof part - 1; n++) {
            part[n] = *p++;
            if (part[n] == '%' && isxdigit((uint8_t)*p) && isxdigit((uint8_t)p[1]))
                part[n] = (char)hex_number((const uint8_t *)p, 2), p += 2;
            if (part[n] == '~' && (*p == '0' || *p == '1')) part[n] = *p++ == '0' ? '~' : '/';
        }
        part[n] = 0;
        good = !*p || *p == '/';
        if (json_typeof(j, at) != JSON_ARRAY) { at = json_get(j, at, part); continue; }
        unsigned long i = strtoul(part, NULL, 10), count = j->nodes[at].count;
        at = i < count && isdigit((uint8_t)*part) ? at + 1 : JSON_NONE;
        while (i-- && at != JSON_NONE && i < count) at = j->nodes[at].next;
    }
    buffer_free(&path);
    if (good && at != JSON_NONE) return at;
    return schema_refuse(r, v, "only $ref to a place in this schema is covered");
}

static uint32_t schema_target(schema_reader *r, uint32_t v) {
    return r->targets[v] ? r->targets[v] : (r->targets[v] = find_target(r, v));
}

static const char *const lists[] = {"allOf", "anyOf", "oneOf", NULL};

/* Refuses a schema that asks whether the same value fits itself. */
enum { ON_THE_WAY = 1, IS_FINE, IS_KNOWN };
static void leads(schema_reader *r, uint32_t v, int depth) {
    const json *j = r->j;
    if (r->e->code || r->marks[v] >= IS_FINE || json_typeof(j, v) != JSON_OBJECT) return;
    if (r->marks[v] == ON_THE_WAY || depth > 200) {
        schema_refuse(r, v, depth > 200 ? "schemas in schemas in schemas"
                                        : "it begins with itself");
        return;
    }
    r->marks[v] = ON_THE_WAY;
    uint32_t ref = json_get(j, v, "$ref");
    if (ref != JSON_NONE && (ref = schema_target(r, ref))) leads(r, ref, depth + 1);
    uint32_t twice = json_get(j, json_get(j, v, "not"), "not");
    if (twice != JSON_NONE) leads(r, twice, depth + 1);
    for (int k = 0; lists[k]; k++) {
        uint32_t list = json_get(j, v, lists[k]);
        if (list == JSON_NONE) continue;
        if (json_typeof(j, list) != JSON_ARRAY || !j->nodes[list].count) {
            schema_refuse(r, list, "wanted a list");
            return;
        }
        for EACH(j, list, c) leads(r, c, depth + 1);
    }
    r->marks[v] = IS_FINE;
}

/* ---- keywords ------------------------------------------------------------------------------- */

static const char *const type_words[] = {"null", "boolean", "integer", "number", "string", "array",
                                         "object", NULL};
enum { NULLS = 1, BOOLS = 2, WHOLES = 4, NUMBERS = 8, STRINGS = 16, ARRAYS = 32, OBJECTS = 64 };

/* What each keyword is about. */
static const struct { const char *name; uint8_t types; } keywords[] = {
    {"properties", OBJECTS}, {"required", OBJECTS}, {"additionalProperties", OBJECTS},
    {"patternProperties", OBJECTS}, {"propertyNames", OBJECTS}, {"minProperties", OBJECTS},
    {"maxProperties", OBJECTS}, {"items", ARRAYS}, {"prefixItems", ARRAYS},
    {"additionalItems", ARRAYS}, {"minItems", ARRAYS}, {"maxItems", ARRAYS},
    {"uniqueItems", ARRAYS}, {"minLength", STRINGS}, {"maxLength", STRINGS}, {"pattern", STRINGS},
    {"format", STRINGS}, {"minimum", WHOLES | NUMBERS}, {"maximum", WHOLES | NUMBERS},
    {"exclusiveMinimum", WHOLES | NUMBERS}, {"exclusiveMaximum", WHOLES | NUMBERS},
    {"multipleOf", WHOLES | NUMBERS}};

static uint8_t keyword_types(const json *j, uint32_t key) {
    for (size_t i = 0; i < sizeof keywords / sizeof *keywords; i++)
        if (json_is(j, key, keywords[i].name)) return keywords[i].types;
    return 0;
}

/* Of "not", these are covered: another "not", types, and values that have one spelling. */
static bool covers_not(const json *j, uint32_t v) {
    bool good = json_is_type(j, v, JSON_OBJECT) && j->nodes[v].count == 2;
    uint32_t key = v + 1, value = v + 2, n = 1, c = value;
    if (!good || json_is(j, key, "not") || json_is(j, key, "type")) return good;
    if (json_is(j, key, "enum")) good = json_is_type(j, value, JSON_ARRAY), n = children(j, c++);
    else good = json_is(j, key, "const");
    for (; good && n--; c = j->nodes[c].next)
        good = json_typeof(j, c) <= JSON_STRING && json_typeof(j, c) != JSON_NUMBER;
    return good;
}

/* Refuses what is not covered in V. Words that no standard knows say nothing to one who asked for
 * the standard's meaning; else they may be slips of the pen. */
static void check_keywords(schema_reader *r, uint32_t v) {
    static const char *const idle[] = {
        "title", "description", "default", "examples", "example", "$schema", "$id", "id",
        "$comment", "$anchor", "deprecated", "readOnly", "writeOnly", "$defs", "definitions",
        "strict", "contentEncoding", "contentMediaType", "contentSchema", "type", "enum", "const",
        "$ref", "allOf", "anyOf", "oneOf", NULL};
    static const char *const not_here[] = {
        "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies",
        "contains", "minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties",
        "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "extends", "disallow",
        "divisibleBy", "nullable", NULL};
    const json *j = r->j;
    for EACH_KEY(j, v, c) {
        bool known = one_of(idle, j, c) >= 0 || keyword_types(j, c);
        bool free_word = r->open || !memcmp(j->text + j->nodes[c].start, "x-", 2);
        if (json_is(j, c, "uniqueItems") && json_typeof(j, c + 1) != JSON_FALSE) known = false;
        else if (free_word && one_of(not_here, j, c) < 0) known = true;
        else if (json_is(j, c, "not")) known = covers_not(j, c + 1);
        if (!known) schema_refuse(r, c + 1, "this keyword is not covered here");
    }
}

/* Adds the schema at V to S, and what it brings along. */
static void join(schema_reader *r, schemas *s, uint32_t v) {
    const json *j = r->j;
    json_type type = json_typeof(j, v);
    if (r->e->code || type == JSON_TRUE || (type == JSON_OBJECT && !j->nodes[v].count)) return;
    if (type == JSON_FALSE) { s->none = true; return; }
    if (type != JSON_OBJECT) { schema_refuse(r, v, "wanted a schema"); return; }
    for (uint32_t i = 0; i < s->n; i++) if (value_of(s, i) == v) return;
    if (s->n == MOST_JOINED) { schema_refuse(r, v, "too many schemas hold together"); return; }
    s->of[s->n++] = v * FLAGS;
    leads(r, v, 0);
    if (r->marks[v] != IS_KNOWN) check_keywords(r, v);
    r->marks[v] = IS_KNOWN;
    uint32_t ref = json_get(j, v, "$ref");
    if (ref != JSON_NONE && (ref = schema_target(r, ref), !r->e->code)) join(r, s, ref);
    for EACH(j, json_get(j, v, "allOf"), c) join(r, s, c);
    uint32_t twice = json_get(j, json_get(j, v, "not"), "not");
    if (twice != JSON_NONE) join(r, s, twice);
}

/* The largest count that KEY has in S, or the least; STANDARD where none has it. */
static uint32_t count_of(schema_reader *r, const schemas *s, const char *key, uint32_t standard) {
    bool least = standard == ENDLESS;
    for EACH_SAID(r, s, key, i, f) {
        double d = json_is_type(r->j, f, JSON_NUMBER) ? json_number(r->j, f) : -1;
        if (!(d >= 0) || d != floor(d) || (!least && d > 65535))
            schema_refuse(r, f, "wanted 0 to 65535");
        else if (least ? d < standard : d > standard) standard = d > 65535 ? 65535 : (uint32_t)d;
    }
    return standard;
}

/* ---- numbers -------------------------------------------------------------------------------- */

enum { WHOLE_DIGITS = 17, PART_DIGITS = 15 };

typedef struct { bool minus; char whole[24], part[24]; } decimal;

/* False: more digits than we count with. */
static bool read_decimal(const json *j, uint32_t v, decimal *d) {
    const char *p = j->text + j->nodes[v].start, *end = j->text + j->nodes[v].end;
    char digits[64];
    int n = 0, scale = 0, before, i;
    bool point = false;
    *d = (decimal){.minus = *p == '-'};
    for (p += d->minus; p < end && (*p | 0x20) != 'e'; p++) {
        if (*p == '.') { point = true; continue; }
        scale += point;
        if (!n && *p == '0') continue;
        if (n == 60) return false;
        digits[n++] = *p;
    }
    if (p < end) {
        char exponent[8] = "";
        if (end - p > 7) return false;
        memcpy(exponent, p + 1, (size_t)(end - p) - 1);
        scale -= atoi(exponent);
    }
    while (n && digits[n - 1] == '0') n--, scale--;
    if (!n) return *d = (decimal){false, "0", ""}, true;
    before = n - scale;
    if (before > WHOLE_DIGITS || scale > PART_DIGITS) return false;
    d->whole[0] = '0';
    for (i = 0; i < before; i++) d->whole[i] = i < n ? digits[i] : '0';
    for (i = 0; i < scale; i++) d->part[i] = before + i < 0 ? '0' : digits[before + i];
    return true;
}

/* ALL and ONE, where ALL may be JSON_NONE: anything. */
static uint32_t and_also(grammar *g, uint32_t all, uint32_t one) {
    return all == JSON_NONE ? one : both(g, all, one);
}

static uint32_t digits(grammar *g, uint32_t lo, uint32_t hi) {
    return repeat(g, bytes_between(g, '0', '9'), lo, hi);
}

/* What may stand behind a point where the digits so far are those of a bound, and P is the rest of
 * it: more than that (UP) or less, or as much unless STRICT. FIRST: at least one digit. */
static uint32_t part_from(grammar *g, const char *p, bool up, bool strict, bool first) {
    uint32_t rest = digits(g, 0, PART_DIGITS + 1), c = (uint8_t)*p;
    uint32_t zeros = repeat(g, bytes_between(g, '0', '0'), first && !up, PART_DIGITS + 1);
    if (!*p && up)
        return strict ? cat(g, zeros, cat(g, bytes_between(g, '1', '9'), rest))
                      : digits(g, first, PART_DIGITS + 1);
    if (!*p) return strict ? never(g) : zeros;
    uint32_t all = cat(g, bytes_between(g, c, c), part_from(g, p + 1, up, strict, false));
    if (up && c < '9') all = either(g, all, cat(g, bytes_between(g, c + 1, '9'), rest));
    if (!up && c > '0') all = either(g, all, cat(g, bytes_between(g, '0', c - 1), rest));
    return !up && !first ? either(g, all, empty(g)) : all;
}

/* Numbers without a sign that are at least D (UP) or at most. */
static uint32_t beyond(grammar *g, const decimal *d, bool up, bool strict) {
    uint32_t n = (uint32_t)strlen(d->whole), point = word(g, "."), all = never(g);
    uint32_t rest = repeat(g, cat(g, point, digits(g, 1, PART_DIGITS + 1)), 0, 1);
    uint32_t first = bytes_between(g, '1', '9');
    if (up && n < WHOLE_DIGITS)
        all = cat(g, first, cat(g, digits(g, n, WHOLE_DIGITS - 1), rest));
    if (!up && n > 1) {
        all = either(g, word(g, "0"), cat(g, first, digits(g, 0, n - 2)));
        all = cat(g, all, rest);
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t c = (uint8_t)d->whole[i], lo = up ? c + 1 : !i && n > 1 ? '1' : '0';
        uint32_t hi = up ? '9' : c - 1;
        if (lo > hi) continue;
        uint32_t other = cat(g, bytes_between(g, lo, hi), cat(g, digits(g, n - 1 - i, n - 1 - i),
                                                              rest));
        all = either(g, all, cat(g, literal(g, d->whole, i), other));
    }
    bool bare = up ? !*d->part && !strict : *d->part || !strict;
    uint32_t same = cat(g, point, part_from(g, d->part, up, strict, true));
    if (bare) same = either(g, same, empty(g));
    return either(g, all, cat(g, word(g, d->whole), same));
}

/* Numbers at least D (UP) or at most, with their signs. */
static uint32_t bounded(grammar *g, const decimal *d, bool up, bool strict) {
    bool zero = !strcmp(d->whole, "0") && !*d->part, own = d->minus || (zero && !up && strict);
    decimal none = {false, "0", ""};
    uint32_t minus = word(g, "-"), any = beyond(g, &none, true, false);
    if (!up) {
        if (own) return cat(g, minus, beyond(g, d, true, strict));
        return either(g, cat(g, minus, any), beyond(g, d, false, strict));
    }
    if (!d->minus && (!zero || strict)) return beyond(g, d, true, strict);
    return either(g, any, cat(g, minus, beyond(g, d, false, strict)));
}

/* Multiples of F, which is a whole number or has a few decimals: a rule for what remains of the
 * digits so far and how many of them stand behind the point. */
static uint32_t multiples(schema_reader *r, uint32_t f) {
    grammar *g = r->g;
    decimal d;
    char all[48];
    bool good = json_is_type(r->j, f, JSON_NUMBER) && read_decimal(r->j, f, &d) && !d.minus;
    uint32_t places = good ? (uint32_t)strlen(d.part) : 0;
    unsigned long m = 0;
    if (good) snprintf(all, sizeof all, "%s%s", d.whole, d.part), m = strtoul(all, NULL, 10);
    if (!m || m > 2000 || places > 8 || m * (places + 2) > 4000)
        return schema_refuse(r, f, "such a multipleOf is not covered");
    uint32_t base = (uint32_t)(g->rules.n / 4), n = (uint32_t)m;
    for (uint32_t i = 0; i < n * (places + 2); i++) new_rule(g);
    for (uint32_t k = 0; k < places + 2 && !g->failed; k++)      /* row 0: before the point      */
        for (uint32_t at = 0; at < n; at++) {
            uint32_t scaled = at, made = never(g), used = k ? k - 1 : 0;
            for (uint32_t i = used; i < places; i++) scaled = scaled * 10 % n;
            if (!scaled && k != 1) made = empty(g);
            if (!k && places) made = either(g, made, cat(g, word(g, "."), refer(g, base + n + at)));
            for (uint32_t c = 0; c < 10 && (!k || used < places); c++) {
                uint32_t to = base + (k ? k + 1 : 0) * n + (at * 10 + c) % n;
                made = either(g, made, cat(g, bytes_between(g, '0' + c, '0' + c), refer(g, to)));
            }
            set_rule(g, base + k * n + at, made);
        }
    return cat(g, repeat(g, word(g, "-"), 0, 1), refer(g, base));
}

static uint32_t number_node(schema_reader *r, const schemas *s, bool whole) {
    static const char *const names[] = {"minimum", "maximum", "exclusiveMinimum",
                                        "exclusiveMaximum"};
    static const char *const forms[] = {
        "-?(0|[1-9][0-9]{0,17})(\\.[0-9]{1,17})?([eE][+-]?[0-9]{1,3})?",
        "-?(0|[1-9][0-9]{0,17})(\\.[0-9]{1,17})?", "-?(0|[1-9][0-9]{0,17})"};
    grammar *g = r->g;
    uint32_t all = JSON_NONE;
    const char *why;
    for EACH_SAID(r, s, "multipleOf", i, f) all = and_also(g, all, multiples(r, f));
    for (int k = 0; k < 4; k++)
        for EACH_SAID(r, s, names[k], i, f) {
            decimal d;
            uint32_t turned = k < 2 ? json_get(r->j, value_of(s, i), names[k + 2]) : JSON_NONE;
            bool strict = k > 1 || json_is_type(r->j, turned, JSON_TRUE);  /* as draft 4 has it */
            json_type type = json_typeof(r->j, f);
            if (k > 1 && (type == JSON_TRUE || type == JSON_FALSE)) continue;
            if (type != JSON_NUMBER || !read_decimal(r->j, f, &d))
                return schema_refuse(r, f, "a bound that is not covered");
            all = and_also(g, all, bounded(g, &d, k % 2 == 0, strict));
        }
    const char *form = forms[whole ? 2 : all != JSON_NONE];
    uint32_t any = add_regex(g, form, strlen(form), false, true, &why);
    return all == JSON_NONE ? any : both(g, any, all);
}

/* ---- strings and lists ---------------------------------------------------------------------- */

static uint32_t quoted(schema_reader *r, uint32_t inner) {
    uint32_t mark = bytes_between(r->g, '"', '"');
    return cat(r->g, mark, cat(r->g, inner, mark));
}

/* Each a part of what the standard allows. */
#define YEAR "(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
#define DATE "((" YEAR "-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|" \
             "[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])))|([0-9]{2}(0[48]|[2468][048]|" \
             "[13579][26])|(0[48]|[2468][048]|[13579][26])00)-02-29)"
#define TIME "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3])" \
             ":[0-5][0-9])"
#define CLOCK "T([0-9]{1,9}H([0-9]{1,9}M([0-9]{1,9}S)?)?|[0-9]{1,9}M([0-9]{1,9}S)?|[0-9]{1,9}S)"
#define LABEL "[A-Za-z0-9](-?[A-Za-z0-9]){0,30}"
#define HOST_NAME LABEL "(\\." LABEL "){0,3}"
#define MAIL_WORD "[A-Za-z0-9!#$%&'*+/=?^_{|}~-]{1,30}"
#define BYTE "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
#define HEX "[0-9a-fA-F]"
#define H16 HEX "{1,4}"
#define URI_CHAR "([A-Za-z0-9._~!$&'()*+,;=:@-]|%" HEX "{2})"
static const char *const formats[][2] = {
    {"date", DATE}, {"time", TIME}, {"date-time", DATE "T" TIME},
    {"duration", "P([0-9]{1,9}W|([0-9]{1,9}Y([0-9]{1,9}M([0-9]{1,9}D)?)?|[0-9]{1,9}M([0-9]{1,9}D)?|"
                 "[0-9]{1,9}D)(" CLOCK ")?|" CLOCK ")"},
    {"uuid", HEX "{8}-" HEX "{4}-" HEX "{4}-" HEX "{4}-" HEX "{12}"},
    {"email", MAIL_WORD "(\\." MAIL_WORD ")?@" HOST_NAME},
    {"hostname", HOST_NAME}, {"ipv4", "(" BYTE "\\.){3}" BYTE},
    {"ipv6", "(" H16 ":){7}" H16 "|(" H16 ":){1,7}:|(" H16 ":){1,6}:" H16 "|(" H16 ":){1,5}(:" H16
             "){1,2}|(" H16 ":){1,4}(:" H16 "){1,3}|(" H16 ":){1,3}(:" H16 "){1,4}|(" H16
             ":){1,2}(:" H16 "){1,5}|" H16 ":(:" H16 "){1,6}|:((:" H16 "){1,7}|:)"},
    {"uri", "[A-Za-z][A-Za-z0-9+.-]*:(//([A-Za-z0-9._~!$&'()*+,;=:-]*@)?([A-Za-z0-9._~-]|%" HEX
            "{2})*(:[0-9]{0,5})?(/" URI_CHAR "*)*|/?(" URI_CHAR "+(/" URI_CHAR "*)*)?)(\\?("
            URI_CHAR "|[/?])*)?(#(" URI_CHAR "|[/?])*)?"}};

/* The texts of which a part fits the pattern F; what is wrong with it is said of PLACE. */
static uint32_t pattern_node(schema_reader *r, uint32_t f, uint32_t place) {
    buffer text = {0};
    const char *why = NULL;
    if (!json_is_type(r->j, f, JSON_STRING)) return schema_refuse(r, place, "wanted a text");
    json_unescape(r->j, f, &text);
    uint32_t one = add_regex(r->g, chars_of(&text), text.n, true, false, &why);
    r->g->failed |= text.failed;
    buffer_free(&text);
    return why ? schema_refuse(r, place, why) : one;
}

/* A string without its marks. */
static uint32_t string_node(schema_reader *r, const schemas *s, uint32_t mode) {
    grammar *g = r->g;
    uint32_t lo = count_of(r, s, "minLength", 0), hi = count_of(r, s, "maxLength", ENDLESS);
    uint32_t any = repeat(g, r->letter, lo, hi), all = !lo && hi == ENDLESS ? JSON_NONE : any;
    const uint32_t n_formats = sizeof formats / sizeof *formats;
    const char *why = NULL;
    if (lo > hi) return never(g);
    for EACH_SAID(r, s, "pattern", i, f) all = and_also(g, all, pattern_node(r, f, f));
    if (mode & ASKING) return all == JSON_NONE ? any : all;
    for EACH_SAID(r, s, "format", i, f) {
        uint32_t n = 0;
        while (n < n_formats && !json_is(r->j, f, formats[n][0])) n++;
        if (n == n_formats) return schema_refuse(r, f, "a format that is not covered");
        const char *text = formats[n][1];
        all = and_also(g, all, add_regex(g, text, strlen(text), true, true, &why));
    }
    return all == JSON_NONE ? any : all;
}

static uint32_t comma(schema_reader *r) { return cat(r->g, word(r->g, ","), r->blank); }

static uint32_t in_marks(schema_reader *r, const char *marks, uint32_t inner) {
    grammar *g = r->g;
    uint32_t open = cat(g, literal(g, marks, 1), r->gap), end = literal(g, marks + 1, 1);
    return cat(g, open, cat(g, inner, cat(g, r->gap, end)));
}

/* What all of S say of the item at place AT; AT past all places: of those that follow. */
static uint32_t item_node(schema_reader *r, const schemas *s, uint32_t at, uint32_t mode) {
    schemas with = {0};
    for (uint32_t i = 0; i < s->n; i++) {
        uint32_t v = value_of(s, i), list = json_get(r->j, v, "prefixItems");
        uint32_t items = json_get(r->j, v, "items");
        if (json_is_type(r->j, items, JSON_ARRAY))
            list = items, items = json_get(r->j, v, "additionalItems");
        uint32_t n = list == JSON_NONE ? 0 : r->j->nodes[list].count, c = list + 1;
        for (uint32_t k = 0; k < at && k < n; k++) c = r->j->nodes[c].next;
        if (at < n) join(r, &with, c);
        else if (items != JSON_NONE) join(r, &with, items);
    }
    return node_of(r, &with, mode);
}

static uint32_t list_node(schema_reader *r, const schemas *s, uint32_t mode) {
    static const char *const names[] = {"prefixItems", "items"};
    grammar *g = r->g;
    uint32_t lo = count_of(r, s, "minItems", 0), hi = count_of(r, s, "maxItems", ENDLESS), n = 0;
    for (uint32_t i = 0; i < s->n; i++)
        for (int k = 0; k < 2; k++) {
            uint32_t f = json_get(r->j, value_of(s, i), names[k]);
            bool list = json_is_type(r->j, f, JSON_ARRAY);
            if (!k && f != JSON_NONE && (!list || !r->j->nodes[f].count))
                return schema_refuse(r, f, "wanted a list of schemas");
            if (list && r->j->nodes[f].count > n) n = r->j->nodes[f].count;
        }
    if (lo > hi) return never(g);
    if (n > 1000) return schema_refuse(r, value_of(s, 0), "more than 1000 places");
    /* from the last to the first: what may follow when I items stand before */
    uint32_t most = hi == ENDLESS ? hi : hi > n ? hi - n : 0, next = comma(r);
    uint32_t one = item_node(r, s, n, mode), all;
    uint32_t more = repeat(g, cat(g, next, one), lo > n ? lo - n : 0, most);
    if (!n) {
        all = hi ? cat(g, one, repeat(g, cat(g, next, one), lo ? lo - 1 : 0,
                                      hi == ENDLESS ? hi : hi - 1)) : never(g);
        return in_marks(r, "[]", lo ? all : either(g, all, empty(g)));
    }
    for (uint32_t i = n; i-- > 0;) {
        one = item_node(r, s, i, mode);
        all = i < hi ? cat(g, i ? cat(g, next, one) : one, more) : never(g);
        more = i >= lo ? either(g, all, empty(g)) : all;
    }
    return in_marks(r, "[]", more);
}

/* ---- objects -------------------------------------------------------------------------------- */

typedef struct { size_t at; bool must; } property;      /* AT: in the names, each with its 0     */

typedef struct {
    schema_reader *r;
    const schemas *s;
    uint32_t mode, n, n_patterns, owner[MOST_PATTERNS], key[MOST_PATTERNS], lang[MOST_PATTERNS];
    buffer names, list;         /* list: property                                               */
    bool closed;
} object_reader;

static property *property_at(object_reader *o, uint32_t i) {
    return (property *)(void *)o->list.data + i;
}

static void add_property(object_reader *o, uint32_t key, bool must) {
    size_t from = o->names.n;
    if (o->r->e->code || o->r->g->failed) return;
    if (!json_is_type(o->r->j, key, JSON_STRING)) {
        schema_refuse(o->r, key, "wanted a text");
        return;
    }
    json_unescape(o->r->j, key, &o->names);
    buffer_add(&o->names, "", 1);
    o->r->g->failed |= o->names.failed;
    if (o->r->g->failed) return;
    const char *name = (const char *)o->names.data;
    if (strlen(name + from) != o->names.n - from - 1)
        schema_refuse(o->r, key, "a name with a 0 in it");
    for (uint32_t i = 0; i < o->n; i++) {
        if (strcmp(name + property_at(o, i)->at, name + from)) continue;
        property_at(o, i)->must |= must;
        o->names.n = from;
        return;
    }
    property p = {from, must};
    if (o->n == MOST_PROPERTIES) schema_refuse(o->r, key, "more than 1024 properties");
    else buffer_add(&o->list, &p, sizeof p), o->n++;
    o->r->g->failed |= o->list.failed;
}

/* Names and patterns of all in the set. */
static void read_properties(object_reader *o) {
    static const char *const names[] = {"properties", "patternProperties", "required"};
    schema_reader *r = o->r;
    const json *j = r->j;
    bool some = false, said = false;
    for (int k = 0; k < 3; k++)
        for EACH_SAID(r, o->s, names[k], i, f) {
            some |= k < 2;
            if (json_typeof(j, f) != (k < 2 ? JSON_OBJECT : JSON_ARRAY))
                schema_refuse(r, f, k < 2 ? "wanted an object" : "wanted a list");
            if (r->e->code || r->g->failed) return;
            if (k == 2) for EACH(j, f, c) add_property(o, c, true);
            else for EACH_KEY(j, f, c) {
                if (k == 0) add_property(o, c, false);
                else if (o->n_patterns == MOST_PATTERNS)
                    schema_refuse(r, f, "more than 5 patterns");
                else {
                    o->owner[o->n_patterns] = i, o->key[o->n_patterns] = c;
                    o->lang[o->n_patterns++] = quoted(r, pattern_node(r, c, c + 1));
                }
            }
        }
    for EACH_SAID(r, o->s, "additionalProperties", i, f) said = true;
    o->closed = !(o->mode & OPEN) && some && !said;
}

/* A pair whose key is NAME, or as NAME is NULL, one of KEYS without a name: for each choice of the
 * patterns that the key fits. */
static uint32_t pair_node(object_reader *o, const char *name, uint32_t keys) {
    schema_reader *r = o->r;
    const json *j = r->j;
    grammar *g = r->g;
    uint32_t all = never(g), colon = cat(g, word(g, ":"), repeat(g, word(g, " "), 0, 1));
    for (uint32_t fit = 0; fit < 1u << o->n_patterns; fit++) {
        schemas with = {0};
        uint32_t key = keys;
        if (!name && !fit && o->closed) continue;
        for (uint32_t k = 0; k < o->n_patterns; k++)
            key = fit >> k & 1 ? both(g, key, o->lang[k]) : less(g, key, o->lang[k]);
        for (uint32_t i = 0; i < o->s->n; i++) {
            uint32_t v = value_of(o->s, i), n = 0;
            uint32_t f = name ? json_get(j, json_get(j, v, "properties"), name) : JSON_NONE;
            if (f != JSON_NONE) join(r, &with, f), n++;
            for (uint32_t k = 0; k < o->n_patterns; k++)
                if (fit >> k & 1 && o->owner[k] == i) join(r, &with, o->key[k] + 1), n++;
            f = json_get(j, v, "additionalProperties");
            if (!n && f != JSON_NONE) join(r, &with, f);
        }
        if (!with.none)
            all = either(g, all, cat(g, key, cat(g, colon, node_of(r, &with, o->mode))));
    }
    return all;
}

/* Keys that also fit each propertyNames of the set. */
static uint32_t named_keys(object_reader *o, uint32_t keys) {
    for EACH_SAID(o->r, o->s, "propertyNames", i, f) {
        schemas with = {0};
        join(o->r, &with, f);
        if (with.n || with.none) keys = both(o->r->g, keys, node_of(o->r, &with, o->mode));
    }
    return keys;
}

static uint32_t key_literal(schema_reader *r, const char *name) {
    buffer text = {0};
    python_quote(&text, name, strlen(name));
    uint32_t all = literal(r->g, chars_of(&text), text.n);
    r->g->failed |= text.failed;
    buffer_free(&text);
    return all;
}

/* Properties in the schema's order, those that are not required may be missing; then others, whose
 * names may be any. Of these, one at most counts for minProperties, as a name may come twice. From
 * the last to the first: after[c] is what may follow when C pairs stand before. */
static uint32_t pairs_node(object_reader *o) {
    schema_reader *r = o->r;
    grammar *g = r->g;
    uint32_t lo = count_of(r, o->s, "minProperties", 0);
    uint32_t hi = count_of(r, o->s, "maxProperties", ENDLESS);
    uint32_t most = lo > 1 ? lo : 1, taken = never(g), next = comma(r), keys = r->text;
    if (hi != ENDLESS && hi > o->n + 1 && hi < lo) return never(g);
    if (hi != ENDLESS && hi > most) most = hi;
    for (uint32_t i = 0; i < o->n; i++)
        taken = either(g, taken, key_literal(r, (char *)o->names.data + property_at(o, i)->at));
    if (o->n) keys = less(g, keys, taken);
    bool others = !o->closed || o->n_patterns;
    uint32_t pair = others ? pair_node(o, NULL, named_keys(o, keys)) : never(g), one = 0;
    if (others && lo > o->n + 1 && !(o->mode & ASKING))
        return schema_refuse(r, value_of(o->s, 0), "minProperties of more than have names");
    if ((most + 1) * (size_t)(o->n + 1) > 60000)
        return schema_refuse(r, value_of(o->s, 0), "too many properties to count");
    uint32_t *after = new_array(most + 1, sizeof *after);
    if (!after) return g->failed = true, 0;
    uint32_t more = cat(g, next, pair);
    for (uint32_t c = 0; c <= most; c++) {
        uint32_t left = hi == ENDLESS ? hi : hi > c ? hi - c : 0, need = c < lo;
        bool many = lo > c + 1 && !(o->mode & ASKING);
        if (c) after[c] = repeat(g, more, need, left);
        else after[c] = left ? cat(g, pair, repeat(g, more, 0, left == ENDLESS ? left : left - 1))
                             : never(g);
        if (!c && !need) after[c] = either(g, after[c], empty(g));
        if ((need && !left) || many || (hi != ENDLESS && c > hi)) after[c] = never(g);
    }
    for (uint32_t i = o->n; i-- > 0 && !g->failed;) {
        const char *name = (char *)o->names.data + property_at(o, i)->at;
        pair = pair_node(o, name, named_keys(o, key_literal(r, name)));
        more = cat(g, next, pair);
        for (uint32_t c = 0; c <= most; c++) {
            one = cat(g, c ? more : pair, after[c < most ? c + 1 : c]);
            if (c >= hi) one = never(g);
            after[c] = property_at(o, i)->must ? one : either(g, one, after[c]);
        }
    }
    one = after[0];
    free(after);
    return one;
}

static uint32_t object_node(schema_reader *r, const schemas *s, uint32_t mode) {
    object_reader o = {.r = r, .s = s, .mode = mode};
    read_properties(&o);
    uint32_t all = r->e->code || r->g->failed ? 0 : pairs_node(&o);
    free_buffers(BUFFERS(&o.names, &o.list));
    return in_marks(r, "{}", all);
}

/* ---- schemas of any kind -------------------------------------------------------------------- */

/* A value that the schema gives: as Python's json.dumps writes it; whole numbers have no point. */
static uint32_t constant(schema_reader *r, uint32_t v) {
    buffer b = {0};
    double d = json_typeof(r->j, v) == JSON_NUMBER ? json_number(r->j, v) : NAN;
    if (d == floor(d) && fabs(d) < 1e15) buffer_printf(&b, "%.0f", d + 0.0);
    else python_json(&b, r->j, v, 0, 0);
    uint32_t all = literal(r->g, b.data, b.n);
    r->g->failed |= b.failed;
    buffer_free(&b);
    return all;
}

/* The types that keyword type of V names, all where it is absent. */
static unsigned types_at(schema_reader *r, uint32_t v) {
    uint32_t type = json_get(r->j, v, "type"), c = type + 1, n = 1;
    unsigned bits = 0;
    if (type == JSON_NONE) return 127;
    if (json_typeof(r->j, type) == JSON_ARRAY) n = r->j->nodes[type].count;
    else c = type;
    for (uint32_t i = 0; i < n; i++, c = r->j->nodes[c].next) {
        int k = one_of(type_words, r->j, c);
        if (k < 0) return schema_refuse(r, type, "an unknown type");
        bits |= k == 3 ? WHOLES | NUMBERS : 1u << k;
    }
    return bits;
}

static unsigned types_of_value(const json *j, uint32_t v) {
    static const uint8_t of[] = {[JSON_NULL] = NULLS, [JSON_FALSE] = BOOLS, [JSON_TRUE] = BOOLS,
                                 [JSON_NUMBER] = NUMBERS, [JSON_STRING] = STRINGS,
                                 [JSON_ARRAY] = ARRAYS, [JSON_OBJECT] = OBJECTS};
    unsigned bits = of[json_typeof(j, v)];
    if (bits == NUMBERS && json_number(j, v) == floor(json_number(j, v))) bits |= WHOLES;
    return bits;
}

/* What V must not be. */
static unsigned not_types(schema_reader *r, uint32_t v) {
    uint32_t f = json_get(r->j, v, "not");
    bool all = json_get(r->j, f, "type") == JSON_NONE;
    return all ? 0 : types_at(r, f);
}

/* ALL but the values that S says it must not be. */
static uint32_t without(schema_reader *r, const schemas *s, uint32_t all) {
    grammar *g = r->g;
    for EACH_SAID(r, s, "not", i, f) {
        uint32_t one = json_get(r->j, f, "const");
        for EACH(r->j, json_get(r->j, f, "enum"), c) all = less(g, all, constant(r, c));
        if (one != JSON_NONE) all = less(g, all, constant(r, one));
    }
    return all;
}

/* What S says of types; where it says nothing, those that its keywords are about. All that it may
 * turn out to say must be known. */
static unsigned types_of(schema_reader *r, const schemas *s, uint32_t mode) {
    unsigned bits = 127, about = 0;
    bool guess = !(mode & OPEN);
    for (uint32_t i = 0; i < s->n; i++) {
        uint32_t v = value_of(s, i);
        guess &= json_get(r->j, v, "type") == JSON_NONE && !(s->of[i] & VALUES_DONE) &&
                 (s->of[i] & ANY_DONE || json_get(r->j, v, "anyOf") == JSON_NONE) &&
                 (s->of[i] & ONE_DONE || json_get(r->j, v, "oneOf") == JSON_NONE);
        bits &= types_at(r, v) & ~not_types(r, v);
        for EACH_KEY(r->j, v, c) about |= keyword_types(r->j, c);
    }
    if (guess && about) bits &= about;
    /* there is no rule for numbers that are not whole, only for any */
    return bits & WHOLES || mode & ASKING ? bits : bits & ~(unsigned)NUMBERS;
}

/* Of the values that member I lists, those that fit the others. */
static uint32_t values_node(schema_reader *r, schemas *s, uint32_t i, uint32_t f, bool list,
                            uint32_t mode) {
    grammar *g = r->g;
    uint32_t all = never(g), c = list ? f + 1 : f, n = list ? r->j->nodes[f].count : 1;
    unsigned bits = 127, not_these = 0;
    bool more = false;
    if (list && json_typeof(r->j, f) != JSON_ARRAY) return schema_refuse(r, f, "wanted a list");
    s->of[i] |= VALUES_DONE;
    for (uint32_t k = 0; k < s->n; k++) {
        uint32_t v = value_of(s, k);
        bits &= types_at(r, v);
        not_these |= not_types(r, v);
        more |= !(s->of[k] & VALUES_DONE) && (json_get(r->j, v, "enum") != JSON_NONE ||
                                              json_get(r->j, v, "const") != JSON_NONE);
        more |= json_get(r->j, v, "enum") != JSON_NONE && json_get(r->j, v, "const") != JSON_NONE;
        for EACH_KEY(r->j, v, at) more |= keyword_types(r->j, at) > 0;
    }
    uint32_t rest = more ? node_of(r, s, mode | OPEN) : 0;
    for (uint32_t k = 0; k < n; k++, c = r->j->nodes[c].next) {
        unsigned types = types_of_value(r->j, c);
        if (!(types & bits) || types & not_these) continue;
        all = either(g, all, more ? both(g, constant(r, c), rest) : constant(r, c));
    }
    return without(r, s, all);
}

/* S with each schema of LIST in turn. Of oneOf, no value may fit two: that is a question for the
 * end, when all rules are there. */
static uint32_t some_node(schema_reader *r, schemas *s, uint32_t list, bool one, uint32_t mode) {
    uint32_t all = never(r->g), c = list + 1, n = r->j->nodes[list].count, other;
    if (one && n > 60) return schema_refuse(r, list, "oneOf of more than 60");
    for (uint32_t i = 0; i < n && !r->g->failed; i++, c = r->j->nodes[c].next) {
        schemas with = *s;
        join(r, &with, c);
        all = either(r->g, all, node_of(r, &with, mode));
        uint32_t ask = OPEN | ASKING | types_of(r, &with, mode) << TYPES_AT;
        other = r->j->nodes[c].next;
        for (uint32_t k = i + 1; one && !(mode & ASKING) && k < n; k++) {
            schemas two = with;
            join(r, &two, other);
            other = r->j->nodes[other].next;
            if (two.none) continue;
            question q = {rule_of(r, &two, ask), list};
            buffer_add(&r->questions, &q, sizeof q);
            r->g->failed |= r->questions.failed;
        }
    }
    return all;
}

/* The node of a set. */
static uint32_t set_node(schema_reader *r, schemas *s, uint32_t mode) {
    const json *j = r->j;
    grammar *g = r->g;
    if (r->e->code) return 0;
    for (uint32_t i = 0; i < s->n; i++)
        for (int k = 1; k < 3; k++) {
            uint32_t f = json_get(j, value_of(s, i), lists[k]), done = k == 1 ? ANY_DONE : ONE_DONE;
            if (f == JSON_NONE || s->of[i] & done) continue;
            s->of[i] |= done;
            return some_node(r, s, f, k == 2, mode);
        }
    for (uint32_t i = 0; i < s->n; i++) {
        uint32_t f = json_get(j, value_of(s, i), "const"), v = f;
        if (f == JSON_NONE) v = json_get(j, value_of(s, i), "enum");
        if (v != JSON_NONE && !(s->of[i] & VALUES_DONE))
            return values_node(r, s, i, v, f == JSON_NONE, mode);
    }
    unsigned types = types_of(r, s, mode);
    if (mode >> TYPES_AT) types &= mode >> TYPES_AT, mode %= 1 << TYPES_AT;
    uint32_t all = never(g);
    if (types & NULLS) all = either(g, all, word(g, "null"));
    if (types & BOOLS) all = either(g, all, either(g, word(g, "true"), word(g, "false")));
    if (types & (NUMBERS | WHOLES)) all = either(g, all, number_node(r, s, !(types & NUMBERS)));
    if (types & STRINGS) all = either(g, all, quoted(r, string_node(r, s, mode)));
    if (types & ARRAYS) all = either(g, all, list_node(r, s, mode));
    if (types & OBJECTS) all = either(g, all, object_node(r, s, mode));
    return without(r, s, all);
}

/* ---- whole grammars ------------------------------------------------------------------------- */

static void reader_free(schema_reader *r) {
    free_buffers(BUFFERS(&r->sets, &r->rows, &r->questions));
    free(r->marks);
    free(r->targets);
    free(r);
}

/* A reader with its grammar, in which the rule of any value stands. */
static schema_reader *reader_new(const json *j, bool open, medrun_error *e) {
    errno = 0;                                          /* see grammar_done                      */
    schema_reader *r = new_array(1, sizeof *r);
    grammar *g = new_array(1, sizeof *g);
    uint8_t *marks = new_array(j->n, 1);
    uint32_t *targets = new_array(j->n, 4);
    if (!r || !g || !marks || !targets) {
        free(r), free(g), free(marks), free(targets);
        return out_of_memory(e, j->n), NULL;
    }
    *r = (schema_reader){.g = g, .j = j, .e = e, .marks = marks, .targets = targets,
                         .open = open};
    uint32_t rule = new_rule(g), line = cat(g, word(g, "\n"), repeat(g, word(g, " "), 0, 32));
    r->gap = repeat(g, line, 0, 1);
    r->blank = either(g, repeat(g, word(g, " "), 0, 1), line);
    r->letter = written(g, 0, 0x10FFFF, true);
    r->text = quoted(r, repeat(g, r->letter, 0, ENDLESS));
    r->any = refer(g, rule);
    schemas none = {0};
    uint32_t all = set_node(r, &none, OPEN);
    set_rule(g, rule, all);
    return r;
}

/* The rule of the schema at V, and of all that it leads to. */
static uint32_t schema_rule(schema_reader *r, uint32_t v) {
    schemas root = {0};
    uint32_t mode = r->open ? OPEN : 0, all;
    r->root = v;
    join(r, &root, v);
    all = r->e->code ? 0 : node_of(r, &root, mode);
    for (; r->n_done < r->rows.n / sizeof(set_row) && !r->e->code && !r->g->failed; r->n_done++) {
        const set_row row = ((const set_row *)(void *)r->rows.data)[r->n_done];
        schemas s = {.n = row.n};
        if (row.n) memcpy(s.of, r->sets.data + row.at, 4 * row.n);
        uint32_t made = set_node(r, &s, row.mode);
        set_rule(r->g, row.rule, made);
    }
    return all;
}

/* Ends with the grammar whose text is ROOT. */
static grammar *reader_done(schema_reader *r, uint32_t root) {
    grammar *g = grammar_done(r->g, root, "schema", r->e);
    for (size_t i = 0; g && i < r->questions.n / sizeof(question); i++) {
        const question q = ((const question *)(void *)r->questions.data)[i];
        if (g->good[u32_at(g->rules.data, q.rule)] & CAN_END)
            schema_refuse(r, q.place, "oneOf of schemas that one value may fit both");
        if (r->e->code) { grammar_free(g); g = NULL; }
    }
    reader_free(r);
    return g;
}

/* The grammar of the schema at V of J; JSON_NONE: any object. OPEN: keys that no schema names are
 * allowed where nothing forbids them, as the standard says. */
static grammar *grammar_of_schema(const json *j, uint32_t v, bool open, medrun_error *e) {
    schema_reader *r = reader_new(j, open, e);
    if (!r) return NULL;
    if (v != JSON_NONE) return reader_done(r, schema_rule(r, v));
    schemas none = {0};
    return reader_done(r, object_node(r, &none, OPEN));
}

/* The grammar of calls of the functions in list V, of which only the one called NAME if that is
 * given: [call, ...] where the template has a list of them, at most one unless MANY; else one. */
__attribute__((unused))
static grammar *grammar_of_tools(const tool_form *form, const json *j, uint32_t v, uint32_t name,
                                 bool many, medrun_error *e) {
    schema_reader *r = reader_new(j, false, e);
    if (!r) return NULL;
    grammar *g = r->g;
    buffer wanted = {0};
    uint32_t all = never(g), n = 0;
    if (name != JSON_NONE) json_unescape(j, name, &wanted);
    buffer_add(&wanted, "", 1);
    for EACH(j, v, c) {
        uint32_t f = tool_function(j, c), own = json_get(j, f, "name");
        uint32_t with = json_get(j, f, "parameters");
        buffer text = {0};
        if (name != JSON_NONE && !json_is(j, own, chars_of(&wanted))) continue;
        if (!json_is_type(j, own, JSON_STRING)) fail(e, MEDRUN_USAGE, "tools: wanted names");
        if (e->code) break;
        schemas none = {0};
        bool any = with == JSON_NONE || json_typeof(j, with) == JSON_NULL;
        uint32_t arguments = any ? object_node(r, &none, OPEN) : schema_rule(r, with);
        python_string(&text, j, own);
        uint32_t one = literal(g, chars_of(&text), text.n);
        one = cat(g, literal(g, form->call[0], strlen(form->call[0]) - 1), one);
        one = cat(g, one, cat(g, word(g, form->call[1] + 1), arguments));
        all = either(g, all, cat(g, one, word(g, form->call[2])));
        buffer_free(&text);
        n++;
    }
    buffer_free(&wanted);
    if (!n) fail(e, MEDRUN_USAGE, "tool_choice: no function has this name");
    if (!form->calls_alone) {
        uint32_t more = repeat(g, cat(g, comma(r), all), 0, many ? ENDLESS : 0);
        all = cat(g, word(g, "["), cat(g, cat(g, all, more), word(g, "]")));
    }
    return reader_done(r, all);
}
