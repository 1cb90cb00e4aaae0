/* Tests of tools/serve_grammar.c and serve_schema.c: which texts fit a schema, a grammar, an
 * expression, and where what is not covered is refused. Run in the repository root.
 *
 * With MEDRUN_GRAMMAR_CASES=FILE it answers tests/grammar.py instead: each line of FILE is
 * {"schema" | "grammar" | "regex" | "choices": ..., "open": bool, "texts": [...], "next": [...],
 * "walks": n}, each line of the answer {"error": ...} or {"fits": [...], "next": [...], "walks":
 * [...]}: which of the texts fit, which bytes may follow others, and texts that were made by
 * chance. */

#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#ifndef ALL_SERVE               /* all_serve.c has included it with more                         */
#define MEDRUN_NO_MAIN
#include "../medrun.c"
#include "../tools/tool_calls.c"
#include "../tools/serve_grammar.c"
#include "../tools/serve_schema.c"
#include "test.h"
#endif

static const char *const kinds[] = {"choices", "regex", "grammar"};

/* The grammar that object V of J describes. */
static grammar *grammar_in(const json *j, uint32_t v, medrun_error *e) {
    uint32_t schema = json_get(j, v, "schema");
    bool open = json_is_type(j, json_get(j, v, "open"), JSON_TRUE);
    if (schema != JSON_NONE) return grammar_of_schema(j, schema, open, e);
    for (int k = 0; k < 3; k++) {
        uint32_t f = json_get(j, v, kinds[k]);
        if (f != JSON_NONE) return grammar_of_text(j, f, k, e);
    }
    return grammar_of_schema(j, JSON_NONE, open, e);
}

static bool fits(grammar *g, const char *text, size_t n) {
    uint32_t at = grammar_start(g);
    for (size_t i = 0; i < n; i++)              /* ~: a line's end, see test_cases               */
        at = grammar_step(g, at, (uint8_t)(text[i] == '~' ? '\n' : text[i]));
    return grammar_ends(g, at);
}

/* A text made by chance, at most MOST bytes, then the way that ends soonest is not looked for. */
static bool walk(grammar *g, size_t most, buffer *out) {
    uint32_t at = grammar_start(g);
    while (out->n < most && !g->failed) {
        uint8_t can[256];
        size_t n = 0;
        if (grammar_ends(g, at) && (grammar_only_ends(g, at) || test_random() % 3 == 0))
            return true;
        for (int byte = 0; byte < 256; byte++)
            if (grammar_step(g, at, (uint8_t)byte) != DEAD) can[n++] = (uint8_t)byte;
        if (!n) return false;
        uint8_t byte = can[test_random() % n];
        bool marks = test_random() % 3 == 0;        /* else texts and lists would hardly end     */
        for (size_t i = 0; marks && i < n; i++)
            if (strchr("\"]}", can[i])) byte = can[i];
        buffer_add(out, &byte, 1);
        at = grammar_step(g, at, byte);
    }
    return grammar_ends(g, at);
}

/* The bytes that may come behind TEXT, and whether it may end, in hex digits. */
static void print_next(grammar *g, const char *text, size_t n, buffer *out) {
    uint32_t at = grammar_start(g);
    for (size_t i = 0; i < n; i++) at = grammar_step(g, at, (uint8_t)text[i]);
    buffer_text(out, "\"");
    for (int byte = 0; byte < 256; byte++)
        if (grammar_step(g, at, (uint8_t)byte) != DEAD) buffer_printf(out, "%02x", (unsigned)byte);
    buffer_text(out, grammar_ends(g, at) ? ".\"" : "\"");
}

static void answer_case(const char *line, size_t length) {
    json j = {0};
    medrun_error e = {0};
    grammar *g = json_parse(&j, line, length, &e) ? NULL : grammar_in(&j, 0, &e);
    buffer b = {0};
    if (!g) {
        buffer_text(&b, "{\"error\": ");
        python_quote(&b, e.text, strlen(e.text));
    } else {
        static const char *const asked_for[] = {"texts", "next"};
        uint32_t walks = json_get(&j, 0, "walks");
        for (int k = 0; k < 2; k++) {
            uint32_t list = json_get(&j, 0, asked_for[k]), c = list + 1;
            buffer_text(&b, k ? "], \"next\": [" : "{\"fits\": [");
            for (uint32_t i = 0; list != JSON_NONE && i < j.nodes[list].count; i++) {
                buffer text = {0};
                json_unescape(&j, c, &text);
                if (i) buffer_text(&b, ", ");
                if (k) print_next(g, chars_of(&text), text.n, &b);
                else buffer_text(&b, fits(g, chars_of(&text), text.n) ? "true" : "false");
                buffer_free(&text);
                c = j.nodes[c].next;
            }
        }
        buffer_text(&b, "], \"walks\": [");
        int n = walks == JSON_NONE ? 0 : (int)json_number(&j, walks);
        for (int i = 0, made = 0; i < n; i++) {
            buffer text = {0};
            if (walk(g, 3000, &text)) {
                buffer_text(&b, made++ ? ", " : "");
                python_quote(&b, chars_of(&text), text.n);
            }
            buffer_free(&text);
        }
        buffer_printf(&b, "], \"failed\": %s", g->failed ? "true" : "false");
    }
    buffer_text(&b, "}");
    puts(chars_of(&b));
    buffer_free(&b);
    json_free(&j);
    grammar_free(g);
}

static int answer_cases(const char *path) {
    file_map map;
    medrun_error e = {0};
    if (map_file(path, &map, &e)) { printf("%s\n", e.text); return 1; }
    const char *p = (const char *)map.data, *end = p + map.n;
    while (p < end) {
        const char *stop = memchr(p, '\n', (size_t)(end - p));
        if (!stop) stop = end;
        answer_case(p, (size_t)(stop - p));
        fflush(stdout);
        p = stop + 1;
    }
    unmap_file(&map);
    return 0;
}

static buffer asked;            /* the lines of tests/grammar_cases.txt                         */

/* The grammar of line P, which reads as far as N, or why it is refused. */
static grammar *grammar_of_line(const char *p, size_t n, json *j, medrun_error *e) {
    *e = (medrun_error){0};
    return json_parse(j, p, n, e) ? NULL : grammar_in(j, 0, e);
}

/* Each line is a grammar, a text that fits it (+) or not (-), or where it is refused (!). A line's
 * end in a text is written ~. */
static void test_cases(void) {
    json j = {0};
    medrun_error e = {0};
    grammar *g = NULL;
    size_t n, texts = 0, refusals = 0, failed = 0;
    for (const char *p = chars_of(&asked); *p; p += n + (p[n] == '\n')) {
        n = strcspn(p, "\n");
        bool good = true;
        if (*p == '{') {
            grammar_free(g);
            json_free(&j);
            g = grammar_of_line(p, n, &j, &e);
            good = g || p[n + 1] == '!';
        } else if (*p == '+' || *p == '-') {
            good = g && fits(g, p + 1, n - 1) == (*p == '+');
            failed += g && g->failed;
            texts++;
        } else if (*p == '!') {
            char wanted[80];
            snprintf(wanted, sizeof wanted, "%.*s", (int)n - 1, p + 1);
            good = !g && strstr(e.text, wanted);
            refusals++;
        }
        if (!CHECK(good)) printf("%.*s%s%s\n", (int)n, p, g ? "" : ": ", g ? "" : e.text);
    }
    grammar_free(g);
    json_free(&j);
    CHECK(texts > 250 && refusals > 25 && !failed);
}

/* Calls: of which functions, how many, and with what arguments. */
static void test_calls(void) {
    static const char tools[] = "[{\"type\":\"function\",\"function\":{\"name\":\"a\","
        "\"parameters\":{\"properties\":{\"n\":{\"type\":\"integer\"}},\"required\":[\"n\"]}}},"
        "{\"type\":\"function\",\"function\":{\"name\":\"b\",\"description\":null}},\"b\",\"c\"]";
    static const struct { const char *template_name, *text; int name; bool many, good; } rows[] = {
        {"apertus", "[{\"a\": {\"n\": 1}}]", 0, true, true},
        {"apertus", "[{\"b\": {}}]", 0, true, true},
        {"apertus", "[{\"a\": {\"n\": 1}}, {\"b\": {\"x\": [1]}}]", 0, true, true},
        {"apertus", "[{\"a\": {\"n\": 1}}, {\"b\": {}}]", 0, false, false},
        {"apertus", "[{\"a\": {}}]", 0, true, false}, {"apertus", "[]", 0, true, false},
        {"apertus", "[{\"a\": {\"n\": 1}}]", 1, true, false},
        {"apertus", "[{\"b\": {}}]", 1, true, true},
        {"llama3.1", "{\"name\": \"a\", \"parameters\": {\"n\": 1}}", 0, true, true},
        {"llama3.1", "{\"name\": \"c\", \"parameters\": {}}", 0, true, false},
        {"llama3.1", "{\"name\": \"b\", \"parameters\": {}}", 1, true, true}};
    json j = {0};
    medrun_error e = {0};
    if (!CHECK(!json_parse(&j, tools, sizeof tools - 1, &e))) return;
    uint32_t b = j.nodes[j.nodes[1].next].next;
    j.nodes[0].count = 2;                               /* behind them stand names to ask for    */
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const tool_form *form = tool_form_of(chat_find(rows[i].template_name));
        grammar *g = grammar_of_tools(form, &j, 0, rows[i].name ? b : JSON_NONE, rows[i].many, &e);
        if (!CHECK(g && fits(g, rows[i].text, strlen(rows[i].text)) == rows[i].good))
            printf("%s %s\n", rows[i].text, e.text);
        grammar_free(g);
    }
    CHECK(!grammar_of_tools(tool_form_of(chat_find("apertus")), &j, 0, b + 1, true, &e));
    CHECK(strstr(e.text, "no function has this name") != NULL);
    json_free(&j);
}

/* A mask that takes too many steps is none: each beginning of a word has a state of its own. */
static void test_work(const piece_order *order, const tokenizer *t) {
    buffer b = {0};
    json j = {0};
    medrun_error e = {0};
    for (int i = 0; i < 220; i++)
        buffer_printf(&b, "%s[ -~]*%c[ -~]{%d}x", i ? "|" : "{\"regex\":\"", 'a' + i % 26,
                      20 + i / 26);
    buffer_text(&b, "\"}");
    grammar *g = grammar_of_line(chars_of(&b), b.n, &j, &e);
    if (CHECK(g && !g->failed)) {
        CHECK(!grammar_mask(g, order, t, grammar_start(g), false) && g->failed);
        CHECK(g->work > MOST_WORK && g->work < MOST_WORK + 100000);
    }
    grammar_free(g);
    json_free(&j);
    buffer_free(&b);
}

/* The mask of a state has a bit for each piece whose bytes lead to a state that can be finished,
 * whatever way the walk over the sorted vocabulary takes. */
static void test_masks(void) {
    medrun_model *m;
    medrun_error e = {0};
    piece_order order = {0};
    if (!CHECK(!medrun_open(&m, "tools/demo/demo.mdr", NULL, &e))) return;
    const tokenizer *t = &m->tokenizer;
    CHECK(sort_pieces(&order, t) && order.n > 1000);
    size_t other = 0, looked = 0;
    for (const char *p = chars_of(&asked), *text; *p; p = text + strcspn(text, "\n") + 1) {
        json j = {0};
        size_t length = strcspn(p, "\n"), n;
        text = p + length + (p[length] == '\n');
        n = strcspn(text, "\n");
        if (*p != '{' || *text != '+') { text = p; continue; }
        grammar *g = grammar_of_line(p, length, &j, &e);
        uint32_t at = g ? grammar_start(g) : DEAD;
        for (size_t k = 1; at != DEAD && k <= n; k++) {
            const uint8_t *mask = grammar_mask(g, &order, t, at, false);
            for (int32_t id = 0; mask && id < t->vocab_size; id++) {
                size_t bytes;
                const char *piece = tokenizer_piece(t, id, &bytes);
                int type = tokenizer_type(t, id);
                uint32_t to = at;
                for (size_t b = 0; b < bytes; b++) to = grammar_step(g, to, (uint8_t)piece[b]);
                bool can = bytes && type != PIECE_CONTROL && type != PIECE_UNUSED &&
                           type != PIECE_UNKNOWN && grammar_goes_on(g, &order, t, to, 3);
                other += can != (mask[id / 8] >> id % 8 & 1), looked++;
            }
            other += !mask;
            if (k < n) at = grammar_step(g, at, (uint8_t)text[k]);
        }
        json_free(&j);
        grammar_free(g);
    }
    CHECK_EQ(other, 0);
    CHECK(looked > 1000000);
    test_work(&order, t);
    free(order.ids), free(order.shared);
    medrun_close(m);
}

int main(void) {
    if (getenv("MEDRUN_GRAMMAR_CASES")) return answer_cases(getenv("MEDRUN_GRAMMAR_CASES"));
    file_map map;
    medrun_error e = {0};
    if (map_file("tests/grammar_cases.txt", &map, &e)) { printf("%s\n", e.text); return 1; }
    buffer_add(&asked, map.data, map.n);
    unmap_file(&map);
    test_cases();
    test_calls();
    test_masks();
    return report();
}
