/* The options of the tools' command lines: one table gives parsing, environment twins and help.
 * A tool includes this file after medrun.c. MIT licence, see LICENSE. */

/* As in medrun.c: no fma but those that are written, so that a tool's numbers are the same too. */
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

typedef struct {
    const char *name, *small;   /* --name; -s or NULL                                          */
    const char *value;          /* NULL: a flag; two words mean two values                     */
    size_t at;                  /* of a bool or of one or two const char * in the options      */
    const char *help;
} tool_option;

typedef struct {
    const tool_option *table;
    size_t n;
    void *options;              /* the struct that the table's `at` count in                   */
    const char **words;         /* (max_words) what is no option                               */
    size_t n_words, max_words;
} tool_line;

/* The option that the first N letters of TEXT name. */
static const tool_option *find_option(const tool_line *l, const char *text, size_t n,
                                      medrun_error *e) {
    char name[32];
    snprintf(name, sizeof name, "%.*s", (int)(n < 31 ? n : 31), text);
    const tool_option *nearest = l->table;
    for (const tool_option *p = l->table; p < l->table + l->n; p++) {
        if (!strcmp(name, p->name) || (p->small && !strcmp(name, p->small))) return p;
        if (edit_distance(name, p->name) < edit_distance(name, nearest->name)) nearest = p;
    }
    fail(e, MEDRUN_USAGE, "unknown option %s; the nearest is %s", name, nearest->name);
    return NULL;
}

/* As medrun reads one: TEXT of NAME is yes or no. */
static bool read_flag(const char *name, const char *text, medrun_error *e) {
    static const char *const words[] = {"0", "off", "false", "1", "on", "true"};
    for (size_t i = 0; i < 6; i++) if (!strcmp(text, words[i])) return i >= 3;
    fail(e, MEDRUN_USAGE, "%s: found \"%s\", wanted 0|1|off|on|false|true", name, text);
    return false;
}

/* --yarn-factor is MEDRUN_YARN_FACTOR in the environment; an empty variable says nothing. */
static void read_environment(const tool_line *l, medrun_error *e) {
    for (const tool_option *p = l->table; p < l->table + l->n; p++) {
        char name[64];
        snprintf(name, sizeof name, "MEDRUN_%s", p->name + 2);
        for (char *c = name; *c; c++) *c = *c == '-' ? '_' : (char)toupper((unsigned char)*c);
        const char *value = getenv(name);
        void *field = (char *)l->options + p->at;
        bool on_line_only = !strcmp(p->name, "--help") || !strcmp(p->name, "--version");
        if (!value || !*value || on_line_only) continue;
        if (p->value) *(const char **)field = value;
        else *(bool *)field = read_flag(name, value, e);
    }
}

static int add_word(tool_line *l, const char *word, medrun_error *e) {
    if (l->n_words == l->max_words)
        return fail(e, MEDRUN_USAGE, "found one word too many: %s; see --help", word);
    return l->words[l->n_words++] = word, MEDRUN_OK;
}

/* The environment, then the line, which wins. */
static int parse_options(tool_line *l, int argc, char **argv, medrun_error *e) {
    bool only_words = false;
    read_environment(l, e);
    for (int i = 1; i < argc && !e->code; i++) {
        const char *arg = argv[i], *equals = strchr(arg, '=');
        if (!only_words && !strcmp(arg, "--")) { only_words = true; continue; }
        if (only_words || arg[0] != '-' || !arg[1]) { add_word(l, arg, e); continue; }
        size_t n = equals ? (size_t)(equals - arg) : strlen(arg);
        const tool_option *p = find_option(l, arg, n, e);
        if (!p) return e->code;
        void *field = (char *)l->options + p->at;
        int values = !p->value ? 0 : strchr(p->value, ' ') ? 2 : 1;
        if (equals && values != 1)
            return fail(e, MEDRUN_USAGE, "%s takes no value after =", p->name);
        if (!equals && i + values >= argc)
            return fail(e, MEDRUN_USAGE, "%s: wanted a value %s", p->name, p->value);
        if (!values) *(bool *)field = true;
        else if (equals) *(const char **)field = equals + 1;
        else for (int k = 0; k < values; k++) ((const char **)field)[k] = argv[++i];
    }
    return e->code;
}

/* Prints TEXT in lines of at most 78 characters. Its line ends stay. */
static void print_wrapped(const char *text) {
    size_t at = 0, n;
    for (; *text; text += n) {
        if (*text == '\n') { putchar('\n'), at = 0, n = 1; continue; }
        if (*text == ' ') { n = 1; continue; }
        n = strcspn(text, " \n");
        if (at && at + 1 + n > 78) putchar('\n'), at = 0;
        printf("%s%.*s", at ? " " : "", (int)n, text);
        at += n + (at ? 1 : 0);
    }
}

static void print_options(const tool_line *l) {
    for (const tool_option *p = l->table; p < l->table + l->n; p++) {
        char left[64];
        snprintf(left, sizeof left, "%s%s%s %s", p->small ? p->small : "", p->small ? ", " : "",
                 p->name, p->value ? p->value : "");
        printf("  %-26s %s\n", left, p->help);
    }
}

/* TEXT is what the option NAME was given, or NULL, which leaves *OUT as it is. */
static int option_number(const char *name, const char *text, double min, double max, double *out,
                         medrun_error *e) {
    double v;
    if (!text) return MEDRUN_OK;
    if (!parse_number(text, &v) || v < min || v > max)
        return fail(e, MEDRUN_USAGE, "%s: found %s, wanted %g to %.10g", name, text, min, max);
    return *out = v, MEDRUN_OK;
}

static int option_int(const char *name, const char *text, int min, int max, int *out,
                      medrun_error *e) {
    double v = *out;
    if (option_number(name, text, min, max, &v, e)) return e->code;
    if (v != floor(v))
        return fail(e, MEDRUN_USAGE, "%s: found %s, wanted a whole number", name, text);
    return *out = (int)v, MEDRUN_OK;
}

/* ---- how a tool ends ----------------------------------------------------------------------- */

/* What was printed may wait in a buffer, and the place where it goes be full. */
static int finish_stdout(medrun_error *e) {
    if (!fflush(stdout) && !ferror(stdout)) return e->code;
    return cannot(e, MEDRUN_FAILED, "stdout", "write");
}

static const char *program_name;            /* for on_lost_file, which may not format a text      */

static void say_plain(const char *text) {
    size_t n = strlen(text);
    if (write(STDERR_FILENO, text, (unsigned)n) != (ssize_t)n) _exit(MEDRUN_BAD_FILE);
}

/* In a signal handler: a file that is mapped became shorter, or its disk went away. Other threads
 * may find that at the same moment: only the first says so. */
static void on_lost_file(int signal_number) {
    static atomic_flag said = ATOMIC_FLAG_INIT;
    (void)signal_number;
    while (atomic_flag_test_and_set(&said)) sleep(1);
    if (being_written) remove_file(being_written);
    say_plain(program_name);
    say_plain(": a file cannot be read any more: it was cut, or its disk is gone\n");
    _exit(MEDRUN_BAD_FILE);
}

/* HANDLER gets each signal that ends a program. What a parent ignored (nohup) stays ignored. */
__attribute__((unused)) static void catch_ends(signal_handler *handler) {
    static const int ends[] = {SIGINT, SIGTERM, SIGHUP};
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) on_signal(ends[i], handler);
}

/* While nothing is written that could be left half, a signal ends the program at once. */
__attribute__((unused)) static void end_at_once(int signal_number) {
    (void)signal_number;
    say_plain(program_name);
    say_plain(": interrupted\n");
    _exit(MEDRUN_INTERRUPTED);
}

/* The first of the plain words with which template C begins its turns that TEXT, N bytes, holds: a
 * model takes them for a turn. NULL: none. */
__attribute__((unused)) static const char *mark_in(const chat_template *c, const char *text,
                                                   size_t n) {
    for (const char *const *mark = c->marks; *mark; mark++)
        if (memmem(text, n, *mark, strlen(*mark))) return *mark;
    return NULL;
}

/* Before a tool opens anything. NAME lives as long as the program. */
static void expect_lost_files(const char *name) {
    program_name = name;
    on_lost_page(on_lost_file);
}
