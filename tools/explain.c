/* medrun-explain - writes one page that shows how a model came to its words.
 * MIT licence, see LICENSE.
 *
 *     cc -O2 -o medrun-explain tools/explain.c -lm -lpthread
 *     medrun-explain MODEL.mdr -p "What are the symptoms of diabetes?" -o page.html
 *
 * A checkpoint runs as medrun runs it; an observer keeps a few rows of the residual stream, and the
 * attention weights. From these come the page's numbers, by the engine's own kernels, so that they
 * are those of the run: watching changes no bit. The page is one file without a network.
 *
 *  1 The run       (explain_run.c) options, prompts, the watched pass
 *  2 Quantities    (explain_facts.c, explain_lens.c) lens, contributions, attention, neurons
 *  3 More passes   (explain_more.c) what if, leaving out, ablation, patching, another checkpoint
 *  4 The page      (explain_write.c, explain_page.h) blocks of numbers, JSON, HTML
 *    Lessons       (explain_lessons.c) what the course asks, and what to look at
 *
 * A question of a data set is asked by the code of medrun-eval, which is included whole.
 * Tests: tests/43_explain.c, tests/43_explain.sh, tests/43_explain_page.py. */

#define MEDRUN_EVAL_NO_MAIN
#include "eval.c"
#include "explain_lens.c"
#include "explain_write.c"
#include "explain_run.c"
#include "explain_facts.c"
#include "explain_lessons.c"
#include "explain_more.c"

/* ============================================================================================
 * 5 The command
 * ============================================================================================ */

#define AT(field) offsetof(explain_options, field)
static const tool_option explain_table[] = {
    {"--prompt", "-p", "TEXT", AT(prompt), "ask this"},
    {"--file", "-f", "FILE", AT(file), "ask what stands in a file, behind -p's text"},
    {"--chat", NULL, "FILE", AT(chat), "a conversation, [{\"role\": ..., \"content\": ...}]"},
    {"--ids", NULL, "IDS", AT(ids), "tokens by number, \"1 2 3\", as they are"},
    {"--mcq", NULL, "FILE:N", AT(mcq), "question N of a file that medrun-eval reads"},
    {"--task", NULL, "TASK", AT(task), "what kind of file that is (generic)"},
    {"--raw", NULL, NULL, AT(raw), "no chat template: go on with the text as it is"},
    {"--out", "-o", "PAGE.html", AT(out), "where the page goes; - is stdout"},
    {"--json", NULL, "FILE", AT(json), "the page's numbers, all digits"},
    {"--force", NULL, NULL, AT(force), "replace a file that is no page"},
    {"--predict", "-n", "N", AT(predict), "answer with at most N tokens (64; 0 with --mcq)"},
    {"--answer", NULL, "TEXT", AT(answer), "take this answer, do not generate; @FILE"},
    {"--options", NULL, "A,B,...", AT(options), "the words that compete for the next token"},
    {"--rotate", NULL, NULL, AT(rotate), "--mcq: ask again with the choices rotated"},
    {"--why", NULL, "POS", AT(why), "explain this token (first of the answer), or last"},
    {"--versus", NULL, "TEXT", AT(versus), "against this one (the runner-up)"},
    {"--lens", NULL, "WHERE", AT(lens), "auto (8 places), all, none, or POS,POS"},
    {"--mid", NULL, NULL, AT(mid), "the lens after attention, too"},
    {"--attention", NULL, "N", AT(attention), "maps of N heads; auto, all, none"},
    {"--neurons", NULL, "N", AT(neurons), "neurons in the list (20)"},
    {"--what-if", NULL, "OLD=>NEW", AT(what_if), "ask again with other words; repeatable"},
    {"--leave-out", NULL, "WHAT", AT(leave_out), "each of its sentences (or clauses) in turn"},
    {"--ablate", NULL, "LIST", AT(ablate), "switch off: 12.5,mlp20 (layer.head); auto"},
    {"--fill", NULL, "WHAT", AT(fill), "--ablate: put mean (default) or zero there"},
    {"--patch", NULL, "OLD=>NEW", AT(patch), "carry rows from a changed prompt to this one"},
    {"--compare", NULL, "OTHER", AT(compare), "the same tokens through another checkpoint"},
    {"--budget", NULL, "MB", AT(budget), "the largest page (5)"},
    {"--lesson", NULL, "N", AT(lesson), "lesson N of the course, and what to look at"},
    {"--dry-run", NULL, NULL, AT(dry_run), "say time, memory and size, and run nothing"},
    {"--system", "-sys", "TEXT", AT(system), "what the model is told first"},
    {"--template", NULL, "NAME", AT(template_name), "the chat template (the checkpoint's)"},
    {"--date", NULL, "YYYY-MM-DD", AT(date), "for templates that state one"},
    {"--temp", NULL, "T", AT(temperature), "temperature; 0: the likeliest token"},
    {"--seed", "-s", "N", AT(seed), "of the random numbers (1)"},
    {"--threads", "-t", "N", AT(threads), "threads (all processors); changes no number"},
    {"--batch", "-b", "N", AT(batch), "tokens in one pass (512); changes no number"},
    {"--kv", NULL, "TYPE", AT(kv), "the cache: f16, int8, or f32 (with --strict)"},
    {"--strict", NULL, NULL, AT(strict), "bf16: the same numbers on every machine"},
    {"--quiet", "-q", NULL, AT(quiet), "no progress"},
    {"--help", "-h", NULL, AT(help), "this text"},
    {"--version", NULL, NULL, AT(version), "the version"},
};
#undef AT
enum { N_EXPLAIN_OPTIONS = sizeof explain_table / sizeof *explain_table };

static void print_explain_help(const tool_line *l) {
    printf("medrun-explain MODEL.mdr -p TEXT -o PAGE.html [options]\n\n"
           "Runs a model and writes one page that shows how it came to its words: what it\n"
           "expected, what each layer, head and word added, and what changes if you change\n"
           "the text. The page needs no network. It holds the prompt, so keep it as you\n"
           "would keep the prompt.\n\n");
    print_options(l);
    printf("\nMEDRUN_KV, MEDRUN_BUDGET and so on set an option that is not given.\n"
           "Exit codes: 0 ok, 1 failed while running, 2 usage, 3 file missing, unsupported\n"
           "or malformed, 5 longer than the context, 6 out of memory, 130 interrupted.\n");
}

/* All that follows from the options and one run. */
static int explain_all(explain *x, medrun_error *e) {
    x->start = seconds();
    if (open_explained(x, e)) return e->code;
    take_lessons_place(x);
    if (choose_place(x, e) || plan_page(x, e) || check_edits(x, e) || read_ablations(x, e))
        return e->code;
    if (x->o.dry_run) return print_plan(x, e);
    catch_ends(on_interrupt);
    if (run_watched(x, e)) return e->code;
    catch_ends(end_at_once);
    x->seconds = seconds() - x->start;
    if (compute_facts(x, e) || run_more(x, e)) return e->code;
    x->explaining = seconds() - x->start - x->seconds;
    catch_ends(on_interrupt);
    return write_results(x, e);
}

/* --what-if may stand several times on a line. */
static int gather_edits(explain *x, int argc, char **argv, medrun_error *e) {
    static const char name[] = "--what-if";
    for (int i = 1; i < argc && strcmp(argv[i], "--"); i++) {
        const char *value = NULL;
        if (!strcmp(argv[i], name) && i + 1 < argc) value = argv[++i];
        else if (!strncmp(argv[i], name, sizeof name - 1) && argv[i][sizeof name - 1] == '=')
            value = argv[i] + sizeof name;
        if (!value) continue;
        if (x->n_edits == MAX_EDITS)
            return fail(e, MEDRUN_USAGE, "--what-if: wanted at most %d of them", MAX_EDITS);
        x->edits[x->n_edits++] = value;
    }
    if (!x->n_edits && x->o.what_if) x->edits[x->n_edits++] = x->o.what_if;
    return MEDRUN_OK;
}

/* The command line as the page shows it. */
static void keep_line(explain *x, int argc, char **argv) {
    buffer_text(&x->line, "medrun-explain");
    for (int i = 1; i < argc; i++) {
        bool plain = argv[i][0] && !argv[i][strspn(argv[i], "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"
                                                   "KLMNOPQRSTUVWXYZ0123456789-_=./:,+@%")];
        buffer_text(&x->line, plain ? " " : " '");
        buffer_text(&x->line, argv[i]);
        if (!plain) buffer_text(&x->line, "'");
    }
}

/* The whole program; tests call it in a child process. */
static int explain_main(int argc, char **argv) {
    static explain x;
    const char *words[2];
    medrun_error e = {0};
    x = (explain){.v.fd = -1};
    tool_line line = {explain_table, N_EXPLAIN_OPTIONS, &x.o, words, 0, 2};
    if (!(argv = start_program(&argc, argv))) return MEDRUN_FAILED;
    expect_lost_files("medrun-explain");
    umask(077);                         /* pages hold the prompt                                 */
    catch_ends(end_at_once);
    parse_options(&line, argc, argv, &e);
    if (!e.code && x.o.help) print_explain_help(&line);
    else if (!e.code && x.o.version) puts("medrun-explain " MEDRUN_VERSION);
    else if (!e.code && line.n_words != 1)
        fail(&e, MEDRUN_USAGE, "wanted MODEL.mdr and options, found %zu words; see --help",
             line.n_words);
    else if (!e.code && !gather_edits(&x, argc, argv, &e) && !take_lesson(&x, &e)) {
        x.model = words[0];
        keep_line(&x, argc, argv);
        explain_all(&x, &e);
    }
    close_explained(&x);
    finish_stdout(&e);
    if (e.code) fprintf(stderr, "medrun-explain: %s\n", e.text);
    return e.code;
}

#ifndef MEDRUN_EXPLAIN_NO_MAIN
int main(int argc, char **argv) {
    (void)eval_main;                    /* of medrun-eval only the questions are asked           */
    return explain_main(argc, argv);
}
#endif
