/* Part of medrun-eval (eval.c includes it): data sets as they are published -> questions.
 *
 * JSONL, a JSON list, PubMedQA's object of records by id, what Hugging Face's dataset viewer
 * answers, MMLU's CSV, or a CSV with a head. A data set goes by several field names: its authors',
 * and those of its Hugging Face copy; a `form` is one of them. */

enum { MAX_CHOICES = 26, MAX_FORMS = 3 };

typedef struct {
    size_t line;                /* where it begins in its file                                 */
    const char *id, *subject, *context, *text, *reasoning, *choice[MAX_CHOICES];
    int n_choices, answer;
} question;                     /* strings are never NULL                                      */

typedef struct text_block {
    struct text_block *next;
    size_t n, cap;
    char text[];
} text_block;

typedef struct {
    const char *path;
    question *q;
    size_t n, cap;
    text_block *texts;          /* what the questions' strings point into                      */
    size_t n_cops;              /* answers from a field `cop`                                  */
    double viewer_total;        /* rows of the whole, as a page of the dataset viewer says; or 0 */
    json solutions;             /* of --answers; no nodes: none                                */
    uint8_t digest[32];         /* SHA-256 of the file                                         */
} data_set;

/* The fields of a record. Those in brackets may be missing: ([context]), id, subject, reasoning. */
typedef struct {
    const char *text, *context, *choices, *each[5], *answer, *id, *subject, *reasoning;
    const char *needs;          /* one more that must be there                                 */
    bool context_optional;
} form;

enum { MEDQA, MEDQA_HF, MEDMCQA, PUBMEDQA, PUBMEDQA_HF, MMLU, MMLU_PRO, USMLE, GENERIC,
       GENERIC_OPTIONS, N_FORMS };

static const form forms[N_FORMS] = {
    [MEDQA] = {.text = "question", .choices = "options", .answer = "answer_idx", .id = "realidx",
               .subject = "meta_info"},
    [MEDQA_HF] = {.text = "sent1", .each = {"ending0", "ending1", "ending2", "ending3"},
                  .answer = "label", .id = "id"},
    [MEDMCQA] = {.text = "question", .each = {"opa", "opb", "opc", "opd"}, .answer = "cop",
                 .id = "id", .subject = "subject_name"},
    [PUBMEDQA] = {.text = "QUESTION", .context = "CONTEXTS", .answer = "final_decision",
                  .id = "id"},
    [PUBMEDQA_HF] = {.text = "question", .context = "context", .answer = "final_decision",
                     .id = "pubid"},
    [MMLU] = {.text = "question", .choices = "choices", .answer = "answer", .subject = "subject"},
    [MMLU_PRO] = {.text = "question", .choices = "options", .answer = "answer",
                  .id = "question_id", .subject = "category", .reasoning = "cot_content",
                  .needs = "category"},
    [USMLE] = {.text = "question", .choices = "options", .id = "no", .needs = "no"},
    [GENERIC] = {.text = "question", .context = "context", .choices = "choices",
                 .answer = "answer", .id = "id", .subject = "subject", .context_optional = true},
    [GENERIC_OPTIONS] = {.text = "question", .context = "context", .choices = "options",
                         .answer = "answer", .id = "id", .subject = "subject",
                         .context_optional = true},
};

typedef struct {
    const char *name, *harness; /* what lm-evaluation-harness calls it, with the task's version */
    int forms[MAX_FORMS];       /* the first that fits; -1: no more                            */
    bool csv;                   /* also a CSV without a head: question, choices, letter        */
    const char *opening, *between;          /* of the prompt, before question and choices       */
    bool strip;                 /* the question's white space                                  */
    bool words;                 /* the choices are yes, no, maybe, and stand not in the prompt  */
    bool topic;                 /* a sentence about the subject comes first                    */
} task;

static const task tasks[] = {
    {"medqa", "medqa_4options", {MEDQA, MEDQA_HF, -1}, .opening = "Question: ", .between = "\n"},
    {"medmcqa", "medmcqa", {MEDMCQA, MEDQA, -1}, .opening = "Question: ",
     .between = "\nChoices:\n"},
    {"pubmedqa", "pubmedqa 1.0", {PUBMEDQA, PUBMEDQA_HF, -1}, .opening = "Question: ",
     .words = true},
    {"mmlu", "mmlu 1.0", {MMLU, -1, -1}, .csv = true, .opening = "", .between = "\n",
     .strip = true, .topic = true},
    {"mmlu_pro", "leaderboard_mmlu_pro 0.1, mmlu_pro 3.1", {MMLU_PRO, -1, -1}, .opening = "",
     .between = "\n"},
    {"usmle", "", {MEDQA, USMLE, -1}, .opening = "Question: ", .between = "\n"},
    {"generic", "", {GENERIC, MEDQA, GENERIC_OPTIONS}, .csv = true, .opening = "Question: ",
     .between = "\n"},
};
enum { N_TASKS = sizeof tasks / sizeof *tasks };

static const task *find_task(const char *name, medrun_error *e) {
    for (size_t i = 0; i < N_TASKS; i++) if (!strcmp(name, tasks[i].name)) return &tasks[i];
    fail(e, MEDRUN_USAGE, "task: found %s, wanted medqa, medmcqa, pubmedqa, mmlu, mmlu_pro, usmle "
         "or generic", name);
    return NULL;
}

/* What every refusal of data begins with. */
MEDRUN_PRINTF_LIKE(4, 5)
static int bad_data(const data_set *d, size_t line, medrun_error *e, const char *format, ...) {
    char text[400];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return fail(e, MEDRUN_BAD_FILE, "%s:%zu: %s", d->path, line, text);
}

/* ---- texts --------------------------------------------------------------------------------- */

/* A copy with a NUL that lives until free_texts; NULL: no memory. */
static const char *keep_text(text_block **texts, const void *bytes, size_t n, medrun_error *e) {
    text_block *b = *texts;
    if (!b || b->cap - b->n <= n) {
        size_t cap = n < 1 << 18 ? 1 << 18 : n + 1;
        b = MEDRUN_ALLOC(NULL, sizeof *b + cap);
        if (!b) return out_of_memory(e, cap), NULL;
        *b = (text_block){.next = *texts, .cap = cap};
        *texts = b;
    }
    char *text = b->text + b->n;
    if (n) memcpy(text, bytes, n);
    text[n] = 0;
    b->n += n + 1;
    return text;
}

static void free_texts(text_block *b) {
    for (text_block *next; b; b = next) next = b->next, free(b);
}

static void free_data(data_set *d) {
    free_texts(d->texts);
    free(d->q);
    *d = (data_set){0};
}

static int add_question(data_set *d, size_t line, medrun_error *e) {
    if (d->n == d->cap) {
        size_t cap = d->cap ? d->cap * 2 : 256;
        question *q = MEDRUN_ALLOC(d->q, cap * sizeof *q);
        if (!q) return out_of_memory(e, cap * sizeof *q);
        d->q = q, d->cap = cap;
    }
    d->q[d->n++] = (question){.line = line, .id = "", .subject = "", .context = "", .text = "",
                              .reasoning = ""};
    return MEDRUN_OK;
}

/* A string, a number as it is written, or strings joined by line ends. */
static const char *node_text(data_set *d, const json *j, uint32_t v, size_t line, const char *key,
                             medrun_error *e) {
    buffer b = {0};
    bool list = json_is_type(j, v, JSON_ARRAY), good = true;
    uint32_t c = list ? v + 1 : v;
    for (uint32_t i = 0; i < (list ? j->nodes[v].count : 1); i++, c = j->nodes[c].next) {
        const json_node *n = &j->nodes[c];
        if (i) buffer_text(&b, "\n");
        if (n->type == JSON_STRING) json_unescape(j, c, &b);
        else if (n->type == JSON_NUMBER && !list)
            buffer_add(&b, j->text + n->start, n->end - n->start);
        else good = false;
    }
    const char *text = NULL;
    if (b.failed) out_of_memory(e, b.n);
    else if (!good) bad_data(d, line, e, "field %s: wanted a text", key);
    else if (b.n && memchr(b.data, 0, b.n)) bad_data(d, line, e, "field %s: found a NUL", key);
    else text = keep_text(&d->texts, b.data, b.n, e);
    buffer_free(&b);
    return text;
}

/* Field KEY of record V to *OUT; where it is not named, missing or null *OUT stays as it is. */
static int take_text(data_set *d, const json *j, uint32_t v, const char *key, const char **out,
                     medrun_error *e) {
    uint32_t f = key ? json_get(j, v, key) : JSON_NONE;
    if (json_is_type(j, f, JSON_OBJECT)) f = json_get(j, f, "contexts");
    if (f == JSON_NONE || json_typeof(j, f) == JSON_NULL) return MEDRUN_OK;
    const char *text = node_text(d, j, f, d->q[d->n - 1].line, key, e);
    if (text) *out = text;
    return e->code;
}

/* ---- records ------------------------------------------------------------------------------- */

/* Appends the names of fields that V lacks; how many. */
static int missing_fields(const json *j, uint32_t v, const form *f, char *names, size_t cap) {
    const char *wanted[] = {f->text, f->context_optional ? NULL : f->context, f->choices,
                            f->each[0], f->each[1], f->each[2], f->each[3], f->answer, f->needs};
    int n = 0;
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        if (!wanted[i] || json_get(j, v, wanted[i]) != JSON_NONE) continue;
        size_t at = strlen(names);
        snprintf(names + at, cap - at, "%s%s", n++ ? ", " : "", wanted[i]);
    }
    return n;
}

/* The form that V has, or NULL; then says what is missing, and whose fields they are. */
static const form *choose_form(const data_set *d, const task *t, const json *j, uint32_t v,
                               medrun_error *e) {
    char names[200], best[200] = "", other[40] = "";
    int least = INT_MAX;
    for (int i = 0; i < MAX_FORMS && t->forms[i] >= 0; i++) {
        *names = 0;
        int n = missing_fields(j, v, &forms[t->forms[i]], names, sizeof names);
        if (!n) return &forms[t->forms[i]];
        if (n < least) least = n, memcpy(best, names, sizeof best);
    }
    for (size_t i = 0; i < N_TASKS && !*other; i++)
        for (int k = 0; k < MAX_FORMS && tasks[i].forms[k] >= 0; k++)
            if (*names = 0, &tasks[i] != t &&
                !missing_fields(j, v, &forms[tasks[i].forms[k]], names, sizeof names))
                snprintf(other, sizeof other, "; they are those of %s", tasks[i].name);
    bad_data(d, d->q[d->n - 1].line, e, "task %s: fields missing: %s%s", t->name, best, other);
    return NULL;
}

static int add_choice(data_set *d, question *q, const char *text, medrun_error *e) {
    if (!text) return e->code;
    if (q->n_choices == MAX_CHOICES)
        return bad_data(d, q->line, e, "more choices than the %d letters", MAX_CHOICES);
    return q->choice[q->n_choices++] = text, MEDRUN_OK;
}

/* ["...", ...], [{"key": "A", "value": "..."}, ...] or {"A": "...", ...}; a null is no choice. */
static int take_list(data_set *d, const json *j, uint32_t f, const char *key, question *q,
                     medrun_error *e) {
    uint32_t c = f + 1;
    bool object = json_is_type(j, f, JSON_OBJECT);
    if (!object && !json_is_type(j, f, JSON_ARRAY))
        return bad_data(d, q->line, e, "field %s: wanted a list or an object of choices", key);
    for (uint32_t i = 0; !e->code && i < j->nodes[f].count; i += 1 + object) {
        char letter[2] = {(char)('A' + i / 2), 0};
        uint32_t item = object ? c + 1 : c;
        if (object && i / 2 < MAX_CHOICES && !json_is(j, c, letter))
            return bad_data(d, q->line, e, "field %s: wanted the letters A, B, ... in order", key);
        if (json_is_type(j, item, JSON_OBJECT)) item = json_get(j, item, "value");
        c = j->nodes[object ? c + 1 : c].next;
        if (item != JSON_NONE && json_typeof(j, item) == JSON_NULL) continue;
        if (item == JSON_NONE) bad_data(d, q->line, e, "field %s: wanted texts", key);
        else add_choice(d, q, node_text(d, j, item, q->line, key, e), e);
    }
    return e->code;
}

/* Field KEY of record V: a list, or a text that is one, as JSON. */
static int take_choices(data_set *d, const json *j, uint32_t v, const char *key, question *q,
                        medrun_error *e) {
    uint32_t f = json_get(j, v, key);
    buffer b = {0};
    json list = {0};
    if (!json_is_type(j, f, JSON_STRING)) return take_list(d, j, f, key, q, e);
    json_unescape(j, f, &b);
    bool good = b.n && !json_parse(&list, (const char *)b.data, b.n, NULL) &&
                (json_is_type(&list, 0, JSON_ARRAY) || json_is_type(&list, 0, JSON_OBJECT));
    if (b.failed) out_of_memory(e, b.n);
    else if (good) take_list(d, &list, 0, key, q, e);
    else bad_data(d, q->line, e, "field %s: found the text %.40s, wanted a list [\"...\", \"...\"]"
                  "; Python writes one with json.dumps", key, b.n ? (const char *)b.data : "");
    json_free(&list);
    buffer_free(&b);
    return e->code;
}

static int no_answer(const data_set *d, const question *q, const char *key, const char *found,
                     medrun_error *e) {
    return bad_data(d, q->line, e, "field %s: found %.60s, which is none of %d choices: this "
                    "question has no right answer", key, found, q->n_choices);
}

/* TEXT is a choice's letter or the choice itself. */
static int find_answer(const data_set *d, question *q, const char *key, const char *text,
                       medrun_error *e) {
    int letter = text[0] >= 'A' && text[0] < 'A' + q->n_choices && !text[1] ? text[0] - 'A' : -1;
    int same = -1;
    for (int i = 0; i < q->n_choices; i++) if (!strcmp(text, q->choice[i])) same = i;
    if (letter >= 0 && same >= 0 && letter != same)
        return bad_data(d, q->line, e, "field %s: %s is a letter and another choice's text; give "
                        "the answer's number, from 0", key, text);
    q->answer = letter >= 0 ? letter : same;
    return q->answer < 0 ? no_answer(d, q, key, text, e) : MEDRUN_OK;
}

/* A number counts from 0. MedMCQA's `cop` does so in one publication and from 1 in another:
 * settle_cops decides when it has seen all. */
static int take_answer(data_set *d, const json *j, uint32_t v, const form *f, question *q,
                       medrun_error *e) {
    uint32_t a = f->answer ? json_get(j, v, f->answer)
               : d->solutions.n ? json_get(&d->solutions, 0, q->id) : JSON_NONE;
    const char *key = f->answer ? f->answer : "of the answers", *text;
    if (!f->answer && a == JSON_NONE)
        return bad_data(d, q->line, e, "task usmle: no answer_idx, and --answers does not have %s",
                        q->id);
    if (!f->answer) j = &d->solutions;
    if (!(text = node_text(d, j, a, q->line, key, e))) return e->code;
    if (json_typeof(j, a) == JSON_STRING) return find_answer(d, q, key, text, e);
    double number = json_number(j, a);
    bool cop = f == &forms[MEDMCQA];
    if (!(number >= 0 && number < q->n_choices + cop) || number != floor(number))
        return no_answer(d, q, key, text, e);
    d->n_cops += cop;
    return q->answer = (int)number, MEDRUN_OK;
}

static int take_record(data_set *d, const task *t, const json *j, uint32_t v, const char *id,
                       size_t line, medrun_error *e) {
    static const char *const words[] = {"yes", "no", "maybe"};
    if (add_question(d, line, e)) return e->code;
    question *q = &d->q[d->n - 1];
    if (!json_is_type(j, v, JSON_OBJECT)) return bad_data(d, line, e, "wanted an object");
    const form *f = choose_form(d, t, j, v, e);
    if (!f) return e->code;
    q->id = id ? id : "";
    if (take_text(d, j, v, f->text, &q->text, e) ||
        take_text(d, j, v, f->context, &q->context, e) ||
        take_text(d, j, v, f->id, &q->id, e) || take_text(d, j, v, f->subject, &q->subject, e) ||
        take_text(d, j, v, f->reasoning, &q->reasoning, e)) return e->code;
    for (int i = 0; f->each[i]; i++)
        if (add_choice(d, q, node_text(d, j, json_get(j, v, f->each[i]), line, f->each[i], e), e))
            return e->code;
    for (int i = 0; t->words && i < 3; i++) q->choice[q->n_choices++] = words[i];
    if (f->choices && take_choices(d, j, v, f->choices, q, e)) return e->code;
    if (!*q->text) return bad_data(d, line, e, "field %s: an empty question", f->text);
    if (q->n_choices < 2)
        return bad_data(d, line, e, "found %d choices, wanted 2 or more", q->n_choices);
    return take_answer(d, j, v, f, q, e);
}

/* Does `cop` count from 0 or from 1? A file with a 0 or with as many as there are choices says. */
static int settle_cops(data_set *d, medrun_error *e) {
    size_t zero = 0, last = 0;
    if (!d->n_cops) return MEDRUN_OK;
    if (d->n_cops < d->n) return bad_data(d, 1, e, "some records have a field cop, others not");
    for (size_t i = 0; i < d->n; i++) {
        if (d->q[i].answer == 0 && !zero) zero = d->q[i].line;
        if (d->q[i].answer == d->q[i].n_choices && !last) last = d->q[i].line;
    }
    if (zero && last)
        return bad_data(d, last, e, "field cop: found %d, but 0 in line %zu: it counts from 0 or "
                        "from 1", d->q[0].n_choices, zero);
    if (!zero && !last)
        return bad_data(d, 1, e, "field cop: is never 0 nor %d, so that nobody can tell whether it "
                        "counts from 0 or from 1; take a larger part of the data",
                        d->q[0].n_choices);
    for (size_t i = 0; last && i < d->n; i++) d->q[i].answer--;
    return MEDRUN_OK;
}

/* ---- files --------------------------------------------------------------------------------- */

static size_t line_of(const char *text, size_t at) {
    size_t line = 1;
    for (size_t i = 0; i < at; i++) line += text[i] == '\n';
    return line;
}

/* More than any data set has, and a line more than any question. */
enum { MOST_DATA = 1 << 30, MOST_LINE = 1 << 24 };

/* What people have instead of text, by its first bytes, and the way out. */
static const struct { const char *mark, *name, *way_out; } strangers[] = {
    {"PAR1", "a Parquet file", "make it JSONL, in Python: pandas.read_parquet(\"FILE\")"
     ".to_json(\"NEW.jsonl\", orient=\"records\", lines=True)"},
    {"ARROW1", "an Arrow file", "make it JSONL, in Python: pandas.read_feather(\"FILE\")"
     ".to_json(\"NEW.jsonl\", orient=\"records\", lines=True)"},
    {"\xFF\xFF\xFF\xFF", "an Arrow file of datasets' cache", "make it JSONL, in Python: "
     "datasets.Dataset.from_file(\"FILE\").to_json(\"NEW.jsonl\")"},
    {"SQLite format 3", "an SQLite database", "export its table as CSV"},
    {"\xD0\xCF\x11\xE0", "an old spreadsheet", "save it as CSV UTF-8"},
    {"\x1F\x8B", "compressed by gzip", "gunzip it"},
    {"PK\3\4", "a zip archive or a spreadsheet", "unzip it, or save it as CSV UTF-8"},
    {"BZh", "compressed by bzip2", "bunzip2 it"},
    {"\xFD" "7zXZ", "compressed by xz", "unxz it"},
    {"\x28\xB5\x2F\xFD", "compressed by zstd", "unzstd it"},
    {"\xFF\xFE", "UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE >NEW"},
    {"\xFE\xFF", "UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE >NEW"},
    {"<!DOCTYPE", "a web page", "download the file itself"},
    {"<html", "a web page", "download the file itself"},
    {"version https://git-lfs", "a pointer of Git LFS", "git lfs pull gets the file"},
};

static bool begins_with(const char *text, size_t n, const char *mark) {
    return n >= strlen(mark) && !memcmp(text, mark, strlen(mark));
}

/* Wanted is UTF-8 text: a refusal names what the file is, or the first place that is none. */
static int check_utf8(const data_set *d, const char *text, size_t n, medrun_error *e) {
    for (size_t i = 0; i < sizeof strangers / sizeof *strangers; i++)
        if (begins_with(text, n, strangers[i].mark))
            return fail(e, MEDRUN_BAD_FILE, "%s: is %s, wanted text (JSONL, JSON or CSV); %s",
                        d->path, strangers[i].name, strangers[i].way_out);
    size_t at = utf8_valid(text, n);
    const char *nul = memchr(text, 0, at);
    if (nul) at = (size_t)(nul - text);
    if (at == n) return MEDRUN_OK;
    size_t line = line_of(text, at), byte = 1;
    while (byte <= at && text[at - byte] != '\n') byte++;
    if (nul) return bad_data(d, line, e, "byte %zu: found a NUL, wanted UTF-8 text", byte);
    return bad_data(d, line, e, "byte %zu: found %02X, which is no UTF-8; where an old program for "
                    "Windows saved the file, iconv -f WINDOWS-1252 -t UTF-8 FILE >NEW", byte,
                    (unsigned)(uint8_t)text[at]);
}

/* Maps a file of at most MOST bytes. Its size is looked at first: a file with a hole may say that
 * it is larger than all memory. */
static int map_text(const char *path, uint64_t most, file_map *map, medrun_error *e) {
    file_facts f;
    if (!get_facts(path, -1, &f) && f.regular && f.bytes > most)
        return fail(e, MEDRUN_BAD_FILE, "%s: has %llu bytes, wanted at most %llu; split it", path,
                    (unsigned long long)f.bytes, (unsigned long long)most);
    return map_file(path, map, e);
}

/* The text of a data set behind a byte order mark; *MAP is the whole file, to be unmapped. */
static int map_data(const data_set *d, file_map *map, const char **text, size_t *n,
                    medrun_error *e) {
    *map = (file_map){0}, *text = "", *n = 0;
    if (map_text(d->path, MOST_DATA, map, e)) return e->code;
    size_t mark = begins_with((const char *)map->data, map->n, "\xEF\xBB\xBF") ? 3 : 0;
    *text = (const char *)map->data + mark, *n = map->n - mark;
    return check_utf8(d, *text, *n, e);
}

/* What other languages write where JSON has another word, or NULL. */
static const char *foreign_word(const char *text, size_t n) {
    static const char *const words[] = {"NaN", "Infinity", "-Infinity", "None", "True", "False"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (begins_with(text, n, words[i])) return words[i];
    return NULL;
}

/* Parses N bytes that begin in LINE. A refusal names the line instead of the byte. */
static int parse_part(const data_set *d, json *j, const char *text, size_t n, size_t line,
                      medrun_error *e) {
    medrun_error why = {0};
    if (!json_parse(j, text, n, &why)) return MEDRUN_OK;
    char *at = strstr(why.text, " at byte ");
    if (why.code != MEDRUN_BAD_FILE || !at) return fail(e, why.code, "%s: %s", d->path, why.text);
    size_t byte = (size_t)strtoull(at + 9, NULL, 10);
    line += line_of(text, byte) - 1;
    *at = 0;
    const char *word = byte < n ? foreign_word(text + byte, n - byte) : NULL;
    if (word)
        return bad_data(d, line, e, "found %s, which Python writes and JSON has not: write null, "
                        "true or false", word);
    return bad_data(d, line, e, "%s", why.text);
}

/* The dataset viewer's {"rows": [{"row": {...}, "truncated_cells": [...]}, ...], ...}? */
static bool is_viewer_page(const json *j, uint32_t v) {
    uint32_t rows = json_is_type(j, v, JSON_OBJECT) ? json_get(j, v, "rows") : JSON_NONE;
    return json_is_type(j, rows, JSON_ARRAY) && j->nodes[rows].count &&
           json_is_type(j, rows + 1, JSON_OBJECT) && json_get(j, rows + 1, "row") != JSON_NONE;
}

static int take_viewer_page(data_set *d, const task *t, const json *j, uint32_t v, size_t line,
                            medrun_error *e) {
    uint32_t rows = json_get(j, v, "rows"), c = rows + 1;
    uint32_t total = json_get(j, v, "num_rows_total");
    if (json_is_type(j, total, JSON_NUMBER)) d->viewer_total = json_number(j, total);
    for (uint32_t i = 0; !e->code && i < j->nodes[rows].count; i++, c = j->nodes[c].next) {
        uint32_t row = json_is_type(j, c, JSON_OBJECT) ? json_get(j, c, "row") : JSON_NONE;
        uint32_t cut = row == JSON_NONE ? JSON_NONE : json_get(j, c, "truncated_cells");
        if (row == JSON_NONE) bad_data(d, line, e, "row %u: wanted {\"row\": {...}}", i);
        else if (json_is_type(j, cut, JSON_ARRAY) && j->nodes[cut].count)
            bad_data(d, line, e, "row %u: the dataset viewer cut its texts; download the data set "
                     "itself", i);
        else take_record(d, t, j, row, NULL, line, e);
    }
    return e->code;
}

/* A record, or a page of them. */
static int take_value(data_set *d, const task *t, const json *j, uint32_t v, size_t line,
                      medrun_error *e) {
    return is_viewer_page(j, v) ? take_viewer_page(d, t, j, v, line, e)
                                : take_record(d, t, j, v, NULL, line, e);
}

/* {"question": {"0": ...}, ...} or {"question": [...], ...}: columns instead of records. */
static bool has_columns(const json *j) {
    uint32_t f = json_is_type(j, 0, JSON_OBJECT) ? json_get(j, 0, "question") : JSON_NONE;
    return json_is_type(j, f, JSON_OBJECT) || json_is_type(j, f, JSON_ARRAY);
}

/* [{...}, ...], {"id": {...}, ...} or one record. */
static int read_json(data_set *d, const task *t, const char *text, size_t n, medrun_error *e) {
    json j;
    if (!parse_part(d, &j, text, n, 1, e) && has_columns(&j))
        bad_data(d, 1, e, "is written by columns, wanted records; in Python: "
                 "to_json(\"NEW.jsonl\", orient=\"records\", lines=True)");
    if (!e->code) {
        bool keyed = json_typeof(&j, 0) == JSON_OBJECT && j.nodes[0].count &&
                     json_typeof(&j, 2) == JSON_OBJECT;
        bool list = json_typeof(&j, 0) == JSON_ARRAY;
        size_t line = 1, at = 0;
        uint32_t c = 1;
        for (uint32_t i = 0; !e->code && i < j.nodes[0].count && (list || keyed); i += 1 + keyed) {
            line += line_of(text + at, j.nodes[c].start - at) - 1, at = j.nodes[c].start;
            const char *id = keyed ? node_text(d, &j, c++, line, "id", e) : NULL;
            if (!e->code) take_record(d, t, &j, c, id, line, e);
            c = j.nodes[c].next;
        }
        if (!e->code && !list && !keyed) take_value(d, t, &j, 0, 1, e);
    }
    json_free(&j);
    return e->code;
}

static int read_jsonl(data_set *d, const task *t, const char *text, size_t n, medrun_error *e) {
    size_t line = 1;
    for (const char *p = text, *end = text + n; p < end && !e->code; line++) {
        const char *stop = memchr(p, '\n', (size_t)(end - p));
        if (!stop) stop = end;
        json j = {0};
        bool blank = true;
        for (const char *c = p; c < stop && blank; c++) blank = strchr(" \t\r", *c) != NULL;
        if (!blank && !parse_part(d, &j, p, (size_t)(stop - p), line, e))
            take_value(d, t, &j, 0, line, e);
        json_free(&j);
        p = stop + 1;
    }
    return e->code;
}

/* Spreadsheets write semicolons where a comma stands in numbers. */
static int other_comma(const data_set *d, char c, medrun_error *e) {
    return bad_data(d, 1, e, "CSV: found %s between fields, wanted commas; save it so, or as JSONL",
                    c == ';' ? "semicolons" : "tabs");
}

/* One field of a CSV at *AT, quoted or not, appended to B; true: the record goes on behind it. */
static bool read_field(const data_set *d, const char *text, size_t n, size_t *at, size_t *line,
                       buffer *b, medrun_error *e) {
    size_t i = *at, start = *line;
    if (i < n && text[i] == '"') {
        for (i++;; i++) {
            if (i >= n) return bad_data(d, start, e, "CSV: a quote that does not end"), false;
            if (text[i] == '"' && !(i + 1 < n && text[i + 1] == '"')) break;
            if (text[i] == '"') i++;
            *line += text[i] == '\n';
            buffer_add(b, text + i, 1);
        }
        if (++i < n && strchr(";\t", text[i])) return other_comma(d, text[i], e), false;
        if (i < n && !strchr(",\r\n", text[i]))
            return bad_data(d, *line, e, "CSV: text behind the quote that ends a field"), false;
    } else {
        size_t len = 0;
        while (i + len < n && text[i + len] != ',' && text[i + len] != '\n') len++;
        size_t cut = len && text[i + len - 1] == '\r' ? 1 : 0;
        buffer_add(b, text + i, len - cut);
        i += len;
    }
    if (i < n && text[i] == '\r') i++;
    bool more = i < n && text[i] == ',';
    *line += i < n && text[i] == '\n';
    return *at = i + 1, more;
}

enum { MOST_FIELDS = 64 };

typedef struct {
    const char *field[MOST_FIELDS];
    size_t n, line;
} csv_row;

/* The next row; blank lines are none, and at the end it has no fields. */
static int read_row(data_set *d, const char *text, size_t n, size_t *at, size_t *line, csv_row *r,
                    medrun_error *e) {
    while (*at < n && (text[*at] == '\n' || text[*at] == '\r')) *line += text[(*at)++] == '\n';
    *r = (csv_row){.line = *line};
    for (bool more = *at < n; more && !e->code;) {
        buffer b = {0};
        more = read_field(d, text, n, at, line, &b, e);
        if (b.failed) out_of_memory(e, b.n);
        else if (!e->code && r->n == MOST_FIELDS)
            bad_data(d, r->line, e, "CSV: more fields than %d", MOST_FIELDS);
        else if (!e->code) r->field[r->n++] = keep_text(&d->texts, b.data, b.n, e);
        buffer_free(&b);
    }
    return e->code;
}

/* MMLU's form: question, choices, the answer's letter. */
static int take_row(data_set *d, const task *t, const csv_row *r, medrun_error *e) {
    if (add_question(d, r->line, e)) return e->code;
    question *q = &d->q[d->n - 1];
    if (r->n < 4 || (t->topic && r->n != 6))
        return bad_data(d, r->line, e, "CSV: found %zu fields, wanted question, %s choices, "
                        "letter", r->n, t->topic ? "four" : "two or more");
    if (r->n > MAX_CHOICES + 2)
        return bad_data(d, r->line, e, "more choices than the %d letters", MAX_CHOICES);
    q->text = r->field[0], q->n_choices = (int)r->n - 2;
    memcpy(q->choice, r->field + 1, (r->n - 2) * sizeof *r->field);
    return find_answer(d, q, "answer", r->field[r->n - 1], e);
}

/* Names that a head may write in any case. */
static const char *column_name(const char *text) {
    static const char *const names[] = {"question", "context", "choices", "options", "answer",
                                        "answer_idx", "id", "subject", "cop", "label"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcasecmp(text, names[i])) return names[i];
    return text;
}

static bool is_head(const csv_row *r) {
    for (size_t i = 0; i < r->n; i++)
        if (!strcmp(column_name(r->field[i]), "question") || !strcmp(r->field[i], "sent1"))
            return true;
    return false;
}

/* "B", "option_b", "Choice B", "choice2"; such columns are the choices, in their order. */
static bool is_choice_column(const char *name) {
    if (!strcmp(name, "choices") || !strcmp(name, "options")) return false;
    if (!strncasecmp(name, "option", 6) || !strncasecmp(name, "choice", 6)) name += 6;
    name += *name == '_' || *name == ' ';
    return name[0] && !name[1] && isalnum((unsigned char)name[0]);
}

/* A number among the answers counts from 0, as in JSON; it must not be a choice's text as well. */
static bool is_number_of_answer(const csv_row *head, const csv_row *r, size_t i, bool *unclear) {
    static const char *const names[] = {"answer", "answer_idx", "cop", "label"};
    bool named = false;
    size_t n = strlen(r->field[i]);
    for (size_t k = 0; k < 4; k++) named |= !strcmp(column_name(head->field[i]), names[k]);
    if (!named || !n || n > 2 || r->field[i][strspn(r->field[i], "0123456789")]) return false;
    for (size_t k = 0; k < r->n; k++)
        *unclear |= is_choice_column(head->field[k]) && !strcmp(r->field[i], r->field[k]);
    return n == 1 || r->field[i][0] != '0';
}

/* A row under a head is a record; an empty field is none. */
static int take_named_row(data_set *d, const task *t, const csv_row *head, const csv_row *r,
                          medrun_error *e) {
    buffer b = {0}, choices = {0};
    bool unclear = false;
    json j = {0};
    if (r->n != head->n)
        return bad_data(d, r->line, e, "CSV: found %zu fields, wanted %zu, as the head has", r->n,
                        head->n);
    buffer_text(&b, "{\"csv\":0");
    for (size_t i = 0; i < r->n; i++) {
        const char *name = column_name(head->field[i]), *text = r->field[i];
        bool choice = is_choice_column(name);
        buffer *to = choice ? &choices : &b;
        if (!*text) continue;
        if (!choice || choices.n) buffer_text(to, ",");
        if (!choice) json_quote(to, name, strlen(name)), buffer_text(to, ":");
        if (!choice && is_number_of_answer(head, r, i, &unclear)) buffer_text(to, text);
        else json_quote(to, text, strlen(text));
    }
    if (choices.n)
        buffer_printf(&b, ",\"choices\":[%s],\"options\":[%s]", (const char *)choices.data,
                      (const char *)choices.data);
    buffer_text(&b, "}");
    if (b.failed || choices.failed) out_of_memory(e, b.n);
    else if (unclear) bad_data(d, r->line, e, "the answer is a number and a choice's text; give "
                               "its letter");
    else if (!parse_part(d, &j, (const char *)b.data, b.n, r->line, e))
        take_record(d, t, &j, 0, NULL, r->line, e);
    json_free(&j);
    buffer_free(&b);
    buffer_free(&choices);
    return e->code;
}

/* With a head, whose names are those of JSON's fields, or as MMLU is published without one. */
static int read_csv(data_set *d, const task *t, const char *text, size_t n, medrun_error *e) {
    csv_row head, r;
    size_t at = 0, line = 1;
    if (n && !memchr(text, '\n', n) && memchr(text, '\r', n - 1))
        return bad_data(d, 1, e, "CSV: found lines that end with CR, wanted LF or CR LF");
    if (read_row(d, text, n, &at, &line, &head, e) || !head.n) return e->code;
    const char *other = head.n == 1 ? strpbrk(head.field[0], ";\t") : NULL;
    if (other) return other_comma(d, *other, e);
    bool named = is_head(&head);
    if (!named && !t->csv)
        return fail(e, MEDRUN_BAD_FILE, "%s: task %s is not published as CSV; wanted a first line "
                    "with the fields' names, such as question", d->path, t->name);
    if (!named) take_row(d, t, &head, e);
    while (!e->code && !read_row(d, text, n, &at, &line, &r, e) && r.n)
        named ? take_named_row(d, t, &head, &r, e) : take_row(d, t, &r, e);
    return e->code;
}

/* Windows writes endings of names in any case. */
static bool ends_with(const char *text, const char *end) {
    size_t n = strlen(text), k = strlen(end);
    return n >= k && !strcasecmp(text + n - k, end);
}

/* MMLU's files are called anatomy_test.csv and so on; NULL: this one is not. */
static const char *subject_of_path(data_set *d, medrun_error *e) {
    static const char *const ends[] = {"_test.csv", "_val.csv", "_dev.csv"};
    const char *name = strrchr(d->path, '/') ? strrchr(d->path, '/') + 1 : d->path;
    for (size_t i = 0; i < 3; i++)
        if (ends_with(name, ends[i]))
            return keep_text(&d->texts, name, strlen(name) - strlen(ends[i]), e);
    return NULL;
}

/* Questions without a subject get SUBJECT, or for MMLU that of the file's name. */
static int name_subjects(data_set *d, const task *t, const char *subject, medrun_error *e) {
    if (!subject && t->csv && t->topic) subject = subject_of_path(d, e);
    for (size_t i = 0; i < d->n && !e->code; i++) {
        if (!*d->q[i].subject && subject) d->q[i].subject = subject;
        if (t->topic && !*d->q[i].subject)
            return bad_data(d, d->q[i].line, e, "task %s: no subject, which the prompt names; give "
                            "it with --subject, such as college_medicine", t->name);
    }
    return e->code;
}

/* --answers: the solutions of usmle, as JSON. */
static int read_solutions(data_set *d, const char *path, file_map *map, medrun_error *e) {
    data_set about = {.path = path};
    const char *text;
    size_t n;
    if (map_data(&about, map, &text, &n, e)) return e->code;
    return parse_part(&about, &d->solutions, text, n, 1, e);
}

/* Reads PATH; free_data afterwards, also on failure. SUBJECT and ANSWERS may be NULL. */
static int read_data(data_set *d, const task *t, const char *path, const char *subject,
                     const char *answers, medrun_error *e) {
    file_map map, solutions = {0};
    const char *text;
    size_t n;
    json j = {0};
    *d = (data_set){.path = path};
    if (!map_data(d, &map, &text, &n, e) && answers) read_solutions(d, answers, &solutions, e);
    const char *begin = text, *end = text + n;
    while (begin < end && strchr(" \t\r\n", *begin)) begin++;
    const char *first = begin < end ? memchr(begin, '\n', (size_t)(end - begin)) : NULL;
    if (!e->code) sha256_of(map.data, map.n, d->digest);
    if (e->code) n = 0;
    else if (ends_with(path, ".csv") || ends_with(path, ".tsv")) read_csv(d, t, text, n, e);
    else if (first && *begin != '[' && !json_parse(&j, begin, (size_t)(first - begin), NULL))
        read_jsonl(d, t, text, n, e);
    else read_json(d, t, text, n, e);
    json_free(&j);
    json_free(&d->solutions);
    unmap_file(&solutions);
    unmap_file(&map);
    if (!e->code && !d->n) fail(e, MEDRUN_BAD_FILE, "%s: has no questions", path);
    if (!e->code && !settle_cops(d, e)) name_subjects(d, t, subject, e);
    return e->code;
}
