/* medrun: functions that a model may call ("tools"), from JSON to the text that a model sees, and
 * from what it writes back to JSON. Included after medrun.c by programs that want this: medrun-lab
 * call, tests, a server.
 *
 * The engine (section 11) knows templates, roles and finished text, and no JSON beyond a role and a
 * string. Here stands the rest of what the models' own Jinja templates do:
 *
 *   tools_text      definitions, [{"type": "function", "function": {...}}, ...], as the block that
 *                   goes into medrun_chat_options.tools: TypeScript or Python's JSON
 *   tools_messages  a conversation in JSON, with tool_calls, blocks and results, as messages whose
 *                   roles the engine has for finished text ("assistant/calls", "tool/json"), or
                   which stand here for a chat_writer's `more`
 *   openai_messages the same from a conversation as OpenAI's API has it: a developer is the system,
 *                   contents may be parts, arguments are text
 *   tool_calls      what the model wrote between the tokens of a call, as plain JSON
 *
 * No function here makes a control id; the engine's table does. What a template refuses is refused,
 * and a value that Jinja would print as Python prints it is printed so, to the last digit.
 * Tests: tests/11_chat.c, and tools/reference/templates.py. */

#include "walk.c"

/* ---- JSON as Python writes it -------------------------------------------------------------- */

/* What Python, and so Jinja, takes for true; JSON_NONE is false. */
static bool json_truthy(const json *j, uint32_t v) {
    if (v == JSON_NONE) return false;
    const json_node *n = &j->nodes[v];
    if (n->type == JSON_NUMBER) return json_number(j, v) != 0;
    if (n->type == JSON_STRING) return n->end > n->start;
    return n->type == JSON_TRUE || n->count > 0;
}

/* repr(float): the fewest digits that read back as the same number. */
static void python_float(buffer *b, double value) {
    char text[40], digits[20];
    int n = 0, precision = 0, power;
    if (!(fabs(value) <= DBL_MAX)) {
        buffer_text(b, value < 0 ? "-Infinity" : "Infinity");
        return;
    }
    do snprintf(text, sizeof text, "%.*e", precision, value);
    while (strtod(text, NULL) != value && ++precision < 17);
    for (const char *p = text; *p != 'e'; p++)
        if (isdigit((uint8_t)*p)) digits[n++] = *p;
    while (n > 1 && digits[n - 1] == '0') n--;
    digits[n] = 0;
    power = atoi(strchr(text, 'e') + 1);
    if (*text == '-') buffer_text(b, "-");
    if (power < -4 || power >= 16)
        buffer_printf(b, "%c%s%se%c%02d", *digits, n > 1 ? "." : "", digits + 1,
                      power < 0 ? '-' : '+', power < 0 ? -power : power);
    else if (power < 0) buffer_printf(b, "0.%.*s%s", -1 - power, "000", digits);
    else if (n <= power + 1) buffer_printf(b, "%s%.*s.0", digits, power + 1 - n, "000000000000000");
    else buffer_printf(b, "%.*s.%s", power + 1, digits, digits + power + 1);
}

/* A number without point or exponent is an int, of any length. */
static void python_number(buffer *b, const json *j, uint32_t v) {
    const char *p = j->text + j->nodes[v].start;
    size_t n = j->nodes[v].end - j->nodes[v].start;
    if (memchr(p, '.', n) || memchr(p, 'e', n) || memchr(p, 'E', n))
        python_float(b, json_number(j, v));
    else if (n == 2 && !memcmp(p, "-0", 2)) buffer_text(b, "0");
    else buffer_add(b, p, n);
}

static void python_string(buffer *b, const json *j, uint32_t v) {
    buffer text = {0};
    json_unescape(j, v, &text);
    b->failed |= text.failed;
    python_quote(b, (const char *)text.data, text.n);
    buffer_free(&text);
}

static void python_break(buffer *b, int indent, int level) {
    if (!indent) return;
    buffer_text(b, "\n");
    for (int i = 0; i < indent * level; i++) buffer_text(b, " ");
}

/* json.dumps(value, ensure_ascii=False, indent=INDENT or None): transformers' tojson. */
static void python_json(buffer *b, const json *j, uint32_t v, int indent, int level) {
    static const char *const words[] = {"null", "false", "true"};
    const json_node *n = &j->nodes[v];
    bool object = n->type == JSON_OBJECT;
    uint32_t c = v + 1;
    if (n->type <= JSON_TRUE) { buffer_text(b, words[n->type]); return; }
    if (n->type == JSON_NUMBER) { python_number(b, j, v); return; }
    if (n->type == JSON_STRING) { python_string(b, j, v); return; }
    buffer_text(b, object ? "{" : "[");
    for (uint32_t i = 0; i < n->count; i += object ? 2 : 1, c = j->nodes[c].next) {
        if (i) buffer_text(b, indent ? "," : ", ");
        python_break(b, indent, level + 1);
        if (object) {
            python_string(b, j, c++);
            buffer_text(b, ": ");
        }
        python_json(b, j, c, indent, level + 1);
    }
    if (n->count) python_break(b, indent, level);
    buffer_text(b, object ? "}" : "]");
}

/* str(value) of what is no container. */
static int python_str(buffer *b, const json *j, uint32_t v, const char *what, medrun_error *e) {
    static const char *const words[] = {"None", "False", "True"};
    json_type type = json_typeof(j, v);
    if (e->code) return e->code;
    if (type > JSON_STRING)
        return fail(e, MEDRUN_USAGE, "%s: found a list or an object, wanted a text", what);
    if (type <= JSON_TRUE) buffer_text(b, words[type]);
    else if (type == JSON_NUMBER) python_number(b, j, v);
    else json_unescape(j, v, b);
    return e->code;
}

/* ---- functions as TypeScript --------------------------------------------------------------- */

/* Who writes. A step that follows a failure does nothing. */
typedef struct {
    const json *j;
    buffer *b;
    medrun_error *e;
    bool openai;                /* functions may go without a description                      */
} schema_writer;

static void schema_type(schema_writer *w, uint32_t v);      /* schemas stand in schemas           */

static void schema_wrong(schema_writer *w, const char *field, const char *wanted) {
    fail(w->e, MEDRUN_USAGE, "tools: field %s: wanted %s", field, wanted);
}

/* The value of KEY in object V is one that Python takes for true. */
static bool schema_has(const schema_writer *w, uint32_t v, const char *key) {
    return json_truthy(w->j, json_get(w->j, v, key));
}

/* Appends BEFORE and the string KEY of object V. */
static void schema_text(schema_writer *w, uint32_t v, const char *key, const char *before) {
    uint32_t text = json_get(w->j, v, key);
    if (!json_is_type(w->j, text, JSON_STRING)) schema_wrong(w, key, "a string");
    if (w->e->code) return;
    buffer_text(w->b, before);
    json_unescape(w->j, text, w->b);
}

/* The values of a list with BETWEEN in between. */
static void schema_join(schema_writer *w, uint32_t list, const char *between) {
    uint32_t c = list + 1;
    for (uint32_t i = 0; i < w->j->nodes[list].count; i++, c = w->j->nodes[c].next) {
        if (i) buffer_text(w->b, between);
        python_str(w->b, w->j, c, "tools", w->e);
    }
}

/* Appends the key at node KEY, with a question mark unless object V requires it, and a colon. */
static void schema_name(schema_writer *w, uint32_t v, uint32_t key) {
    const json *j = w->j;
    uint32_t list = json_get(j, v, "required"), c = list + 1;
    buffer name = {0};
    bool some = json_truthy(j, list), required = false;
    if (some && json_typeof(j, list) != JSON_ARRAY) schema_wrong(w, "required", "a list of names");
    if (w->e->code) return;
    json_unescape(j, key, &name);
    buffer_add(&name, "", 1);
    for (uint32_t i = 0; some && i < j->nodes[list].count; i++, c = j->nodes[c].next)
        required |= !name.failed && json_is(j, c, (const char *)name.data);
    if (name.n > 1) buffer_add(w->b, name.data, name.n - 1);
    w->b->failed |= name.failed;
    buffer_text(w->b, required ? ": " : "?: ");
    buffer_free(&name);
}

/* An array of V: long and doubtful types become any[]. */
static void schema_array(schema_writer *w, uint32_t v) {
    static const char *const simple[][2] = {{"string", "string"}, {"number", "number"},
                                            {"integer", "number"}, {"boolean", "boolean"}};
    uint32_t items = json_get(w->j, v, "items"), type = json_get(w->j, items, "type");
    const char *plain = json_truthy(w->j, items) ? NULL : "any";
    buffer inner = {0};
    schema_writer in = {w->j, &inner, w->e, w->openai};
    size_t length = 0;
    for (size_t i = 0; i < 4; i++) if (json_is(w->j, type, simple[i][0])) plain = simple[i][1];
    if (!plain) {
        schema_type(&in, items);
        for (size_t i = 0; i < inner.n; i++) length += (inner.data[i] & 0xC0) != 0x80;
        if (length > 50 || (inner.n == 15 && !memcmp(inner.data, "object | object", 15)))
            plain = "any";
    }
    if (plain) buffer_text(w->b, plain);
    else buffer_add(w->b, inner.data, inner.n);
    w->b->failed |= inner.failed;
    buffer_free(&inner);
    buffer_text(w->b, schema_has(w, v, "nullable") ? "[] | null" : "[]");
}

/* The white space is the template's own. */
static void schema_one_of(schema_writer *w, uint32_t list) {
    uint32_t c = list + 1;
    if (json_typeof(w->j, list) != JSON_ARRAY) schema_wrong(w, "oneOf", "a list");
    for (uint32_t i = 0; !w->e->code && i < w->j->nodes[list].count; i++) {
        uint32_t value = json_get(w->j, c, "default");
        if (i) buffer_text(w->b, " | \n");
        schema_type(w, c);
        if (schema_has(w, c, "description")) schema_text(w, c, "description", "// ");
        if (value != JSON_NONE) {
            buffer_text(w->b, "                    // default: ");
            python_json(w->b, w->j, value, 0, 0);
        }
        c = w->j->nodes[c].next;
    }
}

static void schema_object(schema_writer *w, uint32_t v) {
    uint32_t all = json_get(w->j, v, "properties"), c = all + 1;
    if (!json_truthy(w->j, all)) {
        buffer_text(w->b, "object");
        return;
    }
    if (json_typeof(w->j, all) != JSON_OBJECT) schema_wrong(w, "properties", "an object");
    buffer_text(w->b, "{\n");
    for (uint32_t i = 0; !w->e->code && i < w->j->nodes[all].count; i += 2) {
        if (i) buffer_text(w->b, ", ");
        schema_name(w, v, c);
        buffer_text(w->b, "\n                ");
        schema_type(w, c + 1);
        c = w->j->nodes[c + 1].next;
    }
    buffer_text(w->b, "}");
}

/* A string's values, or any string. */
static void schema_string(schema_writer *w, uint32_t v) {
    uint32_t list = json_get(w->j, v, "enum");
    if (!json_truthy(w->j, list)) {
        buffer_text(w->b, schema_has(w, v, "nullable") ? "string | null" : "string");
        return;
    }
    if (json_typeof(w->j, list) != JSON_ARRAY) schema_wrong(w, "enum", "a list");
    if (w->e->code) return;
    buffer_text(w->b, "\"");
    schema_join(w, list, "\" | \"");
    buffer_text(w->b, "\"");
}

/* A JSON Schema as a type; what the template does not know is any. */
static void schema_type(schema_writer *w, uint32_t v) {
    const json *j = w->j;
    uint32_t type = json_get(j, v, "type"), one_of = json_get(j, v, "oneOf");
    if (json_typeof(j, v) != JSON_OBJECT) schema_wrong(w, "properties", "JSON Schemas");
    if (w->e->code) return;
    if (json_is(j, type, "array")) schema_array(w, v);
    else if (json_is_type(j, type, JSON_ARRAY) && json_truthy(j, type)) schema_join(w, type, " | ");
    else if (json_truthy(j, one_of)) schema_one_of(w, one_of);
    else if (json_is(j, type, "object")) schema_object(w, v);
    else if (json_is(j, type, "string")) schema_string(w, v);
    else if (json_is(j, type, "number") || json_is(j, type, "integer")) buffer_text(w->b, "number");
    else buffer_text(w->b, json_is(j, type, "boolean") ? "boolean" : "any");
}

/* A parameter of a function: comment, name, type, default. */
static void tool_parameter(schema_writer *w, uint32_t v, uint32_t key) {
    uint32_t spec = key + 1, value = json_get(w->j, spec, "default");
    bool listed = schema_has(w, spec, "enum"), one_of = schema_has(w, spec, "oneOf");
    if (schema_has(w, spec, "description")) {
        schema_text(w, spec, "description", "// ");
        buffer_text(w->b, "\n");
    }
    schema_name(w, v, key);
    schema_type(w, spec);
    if (value == JSON_NONE) return;
    if (listed) schema_text(w, spec, "default", ", // default: ");
    else if (one_of) schema_text(w, spec, "default", "// default: ");
    else {
        buffer_text(w->b, ", // default: ");
        python_json(w->b, w->j, value, 0, 0);
    }
}

/* {"type": "function", "function": {...}}, or the function alone. */
static uint32_t tool_function(const json *j, uint32_t v) {
    uint32_t function = json_get(j, v, "function");
    return function == JSON_NONE ? v : function;
}

static void tool_declaration(schema_writer *w, uint32_t v) {
    uint32_t parameters = json_get(w->j, v, "parameters");
    uint32_t all = json_get(w->j, parameters, "properties"), c = all + 1;
    uint32_t says = json_get(w->j, v, "description");
    bool none = says == JSON_NONE || json_typeof(w->j, says) == JSON_NULL;
    if (none && w->openai) buffer_text(w->b, "// ");
    else schema_text(w, v, "description", "// ");
    schema_text(w, v, "name", "\ntype ");
    if (!json_truthy(w->j, all)) {
        buffer_text(w->b, " = () => any;");
        return;
    }
    if (json_typeof(w->j, all) != JSON_OBJECT) schema_wrong(w, "properties", "an object");
    buffer_text(w->b, " = (_: {\n");
    for (uint32_t i = 0; !w->e->code && i < w->j->nodes[all].count; i += 2) {
        if (i) buffer_text(w->b, ",\n");
        tool_parameter(w, parameters, c);
        c = w->j->nodes[c + 1].next;
    }
    buffer_text(w->b, "\n}) => any;");
}

/* A list of functions as TypeScript declarations. */
static void tools_as_types(buffer *b, const json *j, bool openai, medrun_error *e) {
    schema_writer w = {j, b, e, openai};
    uint32_t c = 1;
    for (uint32_t i = 0; !e->code && i < j->nodes[0].count; i++, c = j->nodes[c].next) {
        if (i) buffer_text(b, "\n");
        tool_declaration(&w, tool_function(j, c));
    }
}

static void tools_as_json(buffer *b, const json *j) {
    uint32_t c = 1;
    for (uint32_t i = 0; i < j->nodes[0].count; i++, c = j->nodes[c].next) {
        python_json(b, j, c, 4, 0);
        buffer_text(b, "\n\n");
    }
}

/* ---- how each template writes tools --------------------------------------------------------- */

typedef struct {
    const char *template_name;
    bool types;                 /* functions as TypeScript; else as JSON with an indent of 4   */
    const char *call[3];        /* around a call's name and arguments                          */
    bool calls_alone;           /* a message with calls is one call and nothing else           */
    bool results_as_json;       /* a tool's content may be a list or an object                 */
    const chat_kind *blocks;    /* contents may have blocks and parts, which are these turns   */
    bool content_needed;        /* also beside tool calls                                      */
    bool arguments_as_text;     /* a call's arguments are JSON in a string, else any value     */
} tool_form;

/* Apertus's blocks: thoughts stand between inner tokens, the rest as for the engine's own kinds of
 * turns, whose state this shares. */
#define BLOCK(...) ((const chat_part[]){__VA_ARGS__, {0}})
#define OPEN_ASSISTANT {.says = "`<|assistant_start|>`", .unless = IN_ASSISTANT, \
                        .sets = IN_ASSISTANT}
#define END_RESULTS {.says = "]", .when = IN_RESULTS, .clears = IN_RESULTS}
static const chat_kind apertus_blocks[] = {
    {"assistant/silent", BLOCK(OPEN_ASSISTANT)},
    {"assistant/blocks", BLOCK(OPEN_ASSISTANT,
                               {.refuse = "the assistant's contents are both texts and blocks",
                                .when = SAID_TEXT}, {.says = "", .sets = SAID_BLOCKS})},
    {"assistant/thoughts", BLOCK(END_RESULTS, {.says = "`<|inner_prefix|>`", .unless = IN_INNER,
                                               .sets = IN_INNER}, {.says = "$text"})},
    {"assistant/block-calls", BLOCK(END_RESULTS, {.says = "`<|tools_prefix|>`[$text]"
                                                          "`<|tools_suffix|>`", .sets = WAITING})},
    {"assistant/outputs", BLOCK({.refuse = "tool results both as messages and as a block",
                                 .when = IN_RESULTS}, {.says = "[$text]", .clears = WAITING})},
    {"assistant/response", BLOCK(END_RESULTS, {.says = "`<|inner_suffix|>`", .when = IN_INNER,
                                               .clears = IN_INNER}, {.says = "$text"})},
    {0}};
#undef BLOCK
#undef OPEN_ASSISTANT
#undef END_RESULTS

/* The first release of Apertus's template takes functions as OpenAI's API has them; the other two
 * want them bare (here either form does), arguments as text, and a content beside every call. */
static const tool_form tool_forms[] = {
    {.template_name = "llama3.1", .call = {"{\"name\": \"", "\", \"parameters\": ", "}"},
     .calls_alone = true, .results_as_json = true},
    {.template_name = "apertus", .types = true, .call = {"{\"", "\": ", "}"},
     .blocks = apertus_blocks},
    {.template_name = "apertus-bare", .types = true, .call = {"{\"", "\": ", "}"},
     .blocks = apertus_blocks, .content_needed = true, .arguments_as_text = true},
    {.template_name = "apertus-closed", .types = true, .call = {"{\"", "\": ", "}"},
     .blocks = apertus_blocks, .content_needed = true, .arguments_as_text = true},
};

/* All zero for a template without tools, which looks at roles and contents only. */
static const tool_form *tool_form_of(const chat_template *c) {
    static const tool_form none = {0};
    for (size_t i = 0; i < sizeof tool_forms / sizeof *tool_forms; i++)
        if (!strcmp(c->name, tool_forms[i].template_name)) return &tool_forms[i];
    return &none;
}

/* The kinds of turns that tools_messages may make beside the template's own. */
__attribute__((unused))
static const chat_kind *tools_kinds(const chat_template *c) { return tool_form_of(c)->blocks; }

/* Appends what the model is to see of the functions in TEXT, for medrun_chat_options.tools. */
static int functions_text(const chat_template *c, const char *text, size_t n, bool openai,
                          buffer *out, medrun_error *e) {
    json j = {0};
    medrun_error why = {0};
    if (!c->takes_tools)
        return fail(e, MEDRUN_USAGE, "template %s has no place for tools", c->name);
    if (json_parse(&j, text, n, &why)) fail(e, why.code, "tools: %s", why.text);
    else if (!json_check_keys(&j, 0, "tools", e) &&
             (json_typeof(&j, 0) != JSON_ARRAY || !j.nodes[0].count))
        fail(e, MEDRUN_USAGE, "tools: wanted a list of functions");
    uint32_t v = 1;
    for (uint32_t i = 0; !e->code && i < j.nodes[0].count; i++, v = j.nodes[v].next)
        if (!json_is_type(&j, tool_function(&j, v), JSON_OBJECT))
            fail(e, MEDRUN_USAGE, "tools: wanted functions: {\"type\": \"function\", "
                 "\"function\": {\"name\": ...}}");
    if (!e->code && tool_form_of(c)->types) tools_as_types(out, &j, openai, e);
    else if (!e->code) tools_as_json(out, &j);
    if (!e->code && out->failed) out_of_memory(e, out->n);
    json_free(&j);
    return e->code;
}

__attribute__((unused))
static int tools_text(const chat_template *c, const char *text, size_t n, buffer *out,
                      medrun_error *e) {
    return functions_text(c, text, n, false, out, e);
}

/* ---- conversations ------------------------------------------------------------------------- */

/* Messages with the memory that they lie in; N of them. */
typedef struct {
    medrun_message *m;
    size_t n;
    buffer text;
} tool_list;

__attribute__((unused))
static void tool_list_free(tool_list *list) {
    free(list->m);
    buffer_free(&list->text);
}

/* Begins to read node V of J, a list of objects without a key that stands twice. LIST gets room for
 * all its texts, so that none moves, and for as many messages as there are nodes. */
static int tool_list_open(tool_list *list, const json *j, uint32_t v, const char *what,
                          medrun_error *e) {
    bool good = json_is_type(j, v, JSON_ARRAY);
    for (uint32_t i = 0, x = v + 1; good && i < j->nodes[v].count; i++, x = j->nodes[x].next)
        good = json_is_type(j, x, JSON_OBJECT);
    *list = (tool_list){0};
    if (!good)
        return fail(e, MEDRUN_BAD_FILE, "%s: wanted [{\"role\": \"...\", \"content\": \"...\"}, "
                    "...]", what);
    if (json_check_keys(j, v, "messages", e)) return e->code;
    list->m = new_array(j->nodes[v].next - v, sizeof *list->m);
    buffer_room(&list->text, j->nodes[v].end - j->nodes[v].start);
    return list->m && !list->text.failed ? MEDRUN_OK : out_of_memory(e, j->nodes[v].end);
}

/* Who reads a conversation. A turn's text is what was added to list->text since the one before. */
typedef struct {
    const chat_template *c;
    const tool_form *form;
    const json *j;
    tool_list *list;
    size_t at;                  /* in list->text: where the next turn's text begins            */
    medrun_error *e;
    bool openai;                /* the messages are as OpenAI's API has them                    */
} tool_reader;

static int tools_refuse(const tool_reader *r, const char *what) {
    return fail(r->e, MEDRUN_USAGE, "messages: %s", what);
}

/* Ends a turn. Its text gets its address at the end: the buffer may move until then. */
static int tools_turn(tool_reader *r, const char *role) {
    buffer *text = &r->list->text;
    if (r->e->code) return r->e->code;
    if (text->failed) return out_of_memory(r->e, text->n);
    r->list->m[r->list->n++] = (medrun_message){role, NULL, text->n - r->at};
    r->at = text->n;
    return MEDRUN_OK;
}

/* A content of OpenAI's API: a text, or parts of type text, which are joined. */
static int openai_content(const json *j, uint32_t v, buffer *out, medrun_error *e) {
    if (json_is_type(j, v, JSON_STRING)) json_unescape(j, v, out);
    else if (!json_is_type(j, v, JSON_ARRAY))
        return fail(e, MEDRUN_USAGE, "messages: content: wanted a text");
    else for EACH(j, v, c) {
        uint32_t text = json_get(j, c, "text");
        if (!json_is(j, json_get(j, c, "type"), "text") || !json_is_type(j, text, JSON_STRING))
            return fail(e, MEDRUN_USAGE, "messages: content: only parts of type text");
        json_unescape(j, text, out);
    }
    return out->failed ? out_of_memory(e, out->n) : e->code;
}

static bool is_text(const tool_reader *r, uint32_t content) {
    return json_is_type(r->j, content, JSON_STRING) ||
           (r->openai && json_is_type(r->j, content, JSON_ARRAY));
}

/* The arguments of OpenAI's API are JSON in a text: here they are what most templates take. */
static int openai_arguments(tool_reader *r, uint32_t v) {
    buffer text = {0};
    json inner = {0};
    medrun_error why = {0};
    json_unescape(r->j, v, &text);
    if (text.failed) out_of_memory(r->e, text.n);
    else if (json_parse(&inner, (const char *)text.data, text.n, &why))
        fail(r->e, why.code, "messages: tool_calls: arguments: %s", why.text);
    else if (r->form->arguments_as_text) buffer_add(&r->list->text, text.data, text.n);
    else if (!json_check_keys(&inner, 0, "messages", r->e))
        python_json(&r->list->text, &inner, 0, 0, 0);
    json_free(&inner);
    buffer_free(&text);
    return r->e->code;
}

/* Appends one call. FUNCTION has the name, and the arguments as a value or AS_TEXT. */
static int tools_call(tool_reader *r, uint32_t function, bool as_text) {
    const json *j = r->j;
    buffer *b = &r->list->text;
    uint32_t name = json_get(j, function, "name"), arguments = json_get(j, function, "arguments");
    if (r->openai && (!json_is_type(j, name, JSON_STRING) ||
                      !json_is_type(j, arguments, JSON_STRING)))
        return tools_refuse(r, "tool_calls: wanted a name, and arguments as text");
    if (!json_is_type(j, name, JSON_STRING))
        return tools_refuse(r, "tool call: name: wanted a string");
    if (arguments == JSON_NONE || (as_text && json_typeof(j, arguments) != JSON_STRING))
        return tools_refuse(r, as_text ? "tool call: arguments: wanted JSON in a string"
                                       : "tool call: wanted arguments");
    buffer_text(b, r->form->call[0]);
    json_unescape(j, name, b);
    buffer_text(b, r->form->call[1]);
    if (r->openai) openai_arguments(r, arguments);
    else if (as_text) json_unescape(j, arguments, b);
    else python_json(b, j, arguments, 0, 0);
    buffer_text(b, r->form->call[2]);
    return r->e->code;
}

/* The calls of LIST, of a message, or of a BLOCK of an assistant's content. */
static int tools_calls(tool_reader *r, uint32_t list, bool block) {
    const json *j = r->j;
    bool alone = r->form->calls_alone, as_text = block || r->form->arguments_as_text;
    uint32_t v = list + 1;
    if (!json_is_type(j, list, JSON_ARRAY)) return tools_refuse(r, "tool calls: wanted a list");
    if (alone && j->nodes[list].count != 1)
        return tools_refuse(r, "tool calls: this template takes one call a message");
    for (uint32_t i = 0; i < j->nodes[list].count; i++, v = j->nodes[v].next) {
        if (i) buffer_text(&r->list->text, ", ");
        if (!block && !alone && !r->openai && !json_is(j, json_get(j, v, "type"), "function"))
            return tools_refuse(r, "tool call: type: wanted \"function\"");
        if (tools_call(r, block ? v : json_get(j, v, "function"), as_text)) return r->e->code;
    }
    return tools_turn(r, block ? "assistant/block-calls" : "assistant/calls");
}

/* The results of a block of them. */
static int tools_outputs(tool_reader *r, uint32_t list) {
    const json *j = r->j;
    uint32_t v = list + 1;
    if (!json_is_type(j, list, JSON_ARRAY)) return tools_refuse(r, "tool outputs: wanted a list");
    for (uint32_t i = 0; i < j->nodes[list].count; i++, v = j->nodes[v].next) {
        uint32_t output = json_get(j, v, "output");
        if (!json_is_type(j, output, JSON_STRING))
            return tools_refuse(r, "tool output: wanted {\"output\": \"...\"}");
        if (i) buffer_text(&r->list->text, ", ");
        json_unescape(j, output, &r->list->text);
    }
    return tools_turn(r, "assistant/outputs");
}

/* One block of an assistant's content; FIRST of its message. A lone call of display_answers ends
 * the thoughts before it, as a response does, though nothing is said. */
static int tools_block(tool_reader *r, uint32_t v, bool first) {
    const json *j = r->j;
    uint32_t type = json_get(j, v, "type"), text = json_get(j, v, "text");
    uint32_t calls = json_get(j, v, "calls");
    if (json_is(j, type, "tool_outputs")) return tools_outputs(r, json_get(j, v, "outputs"));
    if (json_is(j, type, "tool_calls")) {
        bool shows = !first && json_is_type(j, calls, JSON_ARRAY) && j->nodes[calls].count == 1 &&
                     json_is(j, json_get(j, calls + 1, "name"), "display_answers");
        if (shows) tools_turn(r, "assistant/response");
        return tools_calls(r, calls, true);
    }
    bool thoughts = json_is(j, type, "thoughts");
    if (!thoughts && !json_is(j, type, "response"))
        return tools_refuse(r, "block: type: wanted thoughts, tool_calls, tool_outputs or "
                               "response");
    if (!json_is_type(j, text, JSON_STRING)) return tools_refuse(r, "block: text: wanted a string");
    json_unescape(j, text, &r->list->text);
    return tools_turn(r, thoughts ? "assistant/thoughts" : "assistant/response");
}

/* An assistant's turn for a template that has blocks. */
static int tools_assistant(tool_reader *r, uint32_t content, uint32_t calls) {
    const json *j = r->j;
    uint32_t list = json_get(j, content, "blocks"), v = list + 1;
    bool none = content == JSON_NONE || json_typeof(j, content) == JSON_NULL;
    if (is_text(r, content)) {
        openai_content(j, content, &r->list->text, r->e);
        tools_turn(r, "assistant");
    } else if (json_is_type(j, list, JSON_ARRAY)) {
        tools_turn(r, "assistant/blocks");
        for (uint32_t i = 0; !r->e->code && i < j->nodes[list].count; i++, v = j->nodes[v].next)
            tools_block(r, v, i == 0);
    } else if (r->openai && none && r->form->content_needed) tools_turn(r, "assistant");
    else if (!none || r->form->content_needed || calls == JSON_NONE)
        return tools_refuse(r, "content of the assistant: wanted a string or {\"blocks\": [...]}");
    else if (!json_truthy(j, calls)) tools_turn(r, "assistant/silent");
    return !r->e->code && json_truthy(j, calls) ? tools_calls(r, calls, false) : r->e->code;
}

/* A content that is no string: {"text": ...} of the system, {"parts": [...]} of a user, or what a
 * tool gave where that may be any JSON. */
static int tools_content(tool_reader *r, const char *role, uint32_t content) {
    const json *j = r->j;
    uint32_t text = json_get(j, content, "text"), parts = json_get(j, content, "parts");
    uint32_t v = parts + 1, last = JSON_NONE;
    if (r->form->results_as_json && (!strcmp(role, "tool") || !strcmp(role, "ipython"))) {
        if (content == JSON_NONE || json_typeof(j, content) < JSON_STRING)
            return tools_refuse(r, "content of a tool: wanted a string, a list or an object");
        python_json(&r->list->text, j, content, 0, 0);
        return tools_turn(r, "tool/json");
    }
    bool user = r->form->blocks && !strcmp(role, "user") && json_is_type(j, parts, JSON_ARRAY);
    for (uint32_t i = 0; user && i < j->nodes[parts].count; i++, v = j->nodes[v].next) {
        last = json_get(j, v, "text");
        if (!json_is(j, json_get(j, v, "type"), "text") || !json_is_type(j, last, JSON_STRING))
            return tools_refuse(r, "content: wanted parts of type \"text\"");
        json_unescape(j, last, &r->list->text);
    }
    if (user) return tools_turn(r, role);
    if (!r->form->blocks || strcmp(role, "system") || !json_is_type(j, text, JSON_STRING))
        return tools_refuse(r, "content: wanted a string");
    json_unescape(j, text, &r->list->text);
    return tools_turn(r, role);
}

/* Message V; BRINGS_TOOLS: the template writes the functions into its turn. */
static int tools_message(tool_reader *r, uint32_t v, bool brings_tools) {
    const json *j = r->j;
    bool developer = r->openai && json_is(j, json_get(j, v, "role"), "developer");
    const char *role = developer ? "system" : chat_role_of(j, v, r->e);
    uint32_t content = json_get(j, v, "content"), calls = json_get(j, v, "tool_calls");
    bool text = is_text(r, content), list = json_is_type(j, calls, JSON_ARRAY);
    if (r->openai && (list ? !children(j, calls) : json_is_type(j, calls, JSON_NULL)))
        calls = JSON_NONE;
    if (!role) return r->e->code;
    if (r->openai && calls != JSON_NONE && !(list && r->c->takes_tools))
        return tools_refuse(r, list ? "tool_calls: this model's template has no place for them"
                                    : "tool_calls: wanted a list");
    if (r->openai && !text && (json_truthy(j, content) || calls == JSON_NONE))
        return tools_refuse(r, "content: wanted a text");
    if (brings_tools && !text)
        return tools_refuse(r, "content: wanted a string, as this turn brings the tools");
    if (!brings_tools && r->form->blocks && !strcmp(role, "assistant"))
        return tools_assistant(r, content, calls);
    if (!brings_tools && r->form->calls_alone && calls != JSON_NONE)
        return tools_calls(r, calls, false);
    if (!text) return tools_content(r, role, content);
    return openai_content(j, content, &r->list->text, r->e) || tools_turn(r, role);
}

/* Reads node V of J, a list of messages, for template C; WHAT names the file, TOOLS says whether
 * functions are shown. The messages are for chat_render, all at once, with tools_kinds(c) as the
 * writer's `more`. Free LIST with tool_list_free afterwards, also on failure. */
static int read_messages(tool_reader *r, uint32_t v, size_t n, const char *what, bool tools) {
    const json *j = r->j;
    if (tool_list_open(r->list, j, v, what, r->e)) return r->e->code;
    bool started = false;
    for EACH(j, v, x) {
        bool system = x == v + 1 && json_is(j, json_get(j, x, "role"), "system");
        if (r->e->code || !n--) break;
        tools_message(r, x, tools && r->c->first && !started && !system);
        started |= !system;
    }
    size_t at = 0;
    for (size_t i = 0; !r->e->code && i < r->list->n; i++) {
        r->list->m[i].text = r->list->text.data ? (const char *)r->list->text.data + at : "";
        at += r->list->m[i].n_bytes;
    }
    return r->e->code;
}

__attribute__((unused))
static int tools_messages(const chat_template *c, const json *j, uint32_t v, const char *what,
                          bool tools, tool_list *list, medrun_error *e) {
    tool_reader r = {c, tool_form_of(c), j, list, 0, e, false};
    return read_messages(&r, v, SIZE_MAX, what, tools);
}

/* The first N messages of list V, as OpenAI's API has them. */
__attribute__((unused))
static int openai_messages(const chat_template *c, const json *j, uint32_t v, size_t n, bool tools,
                           tool_list *list, medrun_error *e) {
    tool_reader r = {c, tool_form_of(c), j, list, 0, e, true};
    return read_messages(&r, v, n, "messages", tools);
}

/* ---- what a model answers ------------------------------------------------------------------ */

/* What a model wrote between the tokens of a tool call, [{"name": arguments}, ...], as
 * [{"name": "name", "arguments": arguments}, ...]. */
__attribute__((unused))
static int tool_calls(buffer *b, const char *text, size_t n, medrun_error *e) {
    json j = {0};
    int code = json_parse(&j, text, n, e);
    bool good = !code && json_typeof(&j, 0) == JSON_ARRAY;
    uint32_t c = 1;
    buffer_text(b, "[");
    for (uint32_t i = 0; good && i < j.nodes[0].count; i++, c = j.nodes[c].next) {
        if (!(good = json_typeof(&j, c) == JSON_OBJECT && j.nodes[c].count == 2)) break;
        buffer_text(b, i ? ", {\"name\": " : "{\"name\": ");
        python_string(b, &j, c + 1);
        buffer_text(b, ", \"arguments\": ");
        python_json(b, &j, c + 2, 0, 0);
        buffer_text(b, "}");
    }
    buffer_text(b, "]");
    json_free(&j);
    if (code || good) return code;
    return fail(e, MEDRUN_BAD_FILE, "wanted [{\"name\": arguments}, ...]");
}
