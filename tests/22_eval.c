/* Tests of tools/eval.c: data as it is published, prompts, how answers are found, scores against
 * one text at a time, statistics. Run in the repository root; questions are in tests/eval. */

#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>

static size_t allocations_left = SIZE_MAX;      /* then memory is out                             */

static void *test_alloc(void *p, size_t n) {
    return allocations_left && allocations_left-- ? realloc(p, n) : NULL;
}
#ifndef ALL_EVAL                /* all_eval.c has included it with more                          */
#define MEDRUN_ALLOC test_alloc
#define MEDRUN_EVAL_NO_MAIN
#include "../tools/eval.c"
#include "test.h"
#endif
#include <sys/wait.h>

#define DATA "tests/eval/"

static medrun_error last;
static data_set loaded;

/* Reads a file of tests/eval, or TEXT written to a file of that ending. */
static int read_named(const char *name, const char *path, const char *answers) {
    medrun_error e = {0}, none = {0};
    free_data(&loaded);
    last = e;
    const task *t = find_task(name, &none);
    if (!t) return MEDRUN_USAGE;
    return read_data(&loaded, t, path, NULL, answers, &last);
}

static int read_text(const char *name, const char *ending, const char *text) {
    char path[] = "/tmp/medrun-eval-XXXXXX", full[64];
    int fd = mkstemp(path);
    if (fd < 0) return -1;
    close(fd);
    snprintf(full, sizeof full, "%s%s", path, ending);
    FILE *f = fopen(full, "wb");
    if (!f) return -1;
    fputs(text, f);
    fclose(f);
    int code = read_named(name, full, NULL);
    remove(path);
    remove(full);
    return code;
}

/* A refusal: exit code 3, one line with the number of the line and these words. */
static void refused(const char *name, const char *ending, const char *text, const char *words) {
    int code = read_text(name, ending, text);
    bool good = code == MEDRUN_BAD_FILE && strstr(last.text, words) && !strchr(last.text, '\n');
    if (!CHECK(good)) printf("    %s: exit %d, %s; wanted %s\n", text, code, last.text, words);
}

/* Are two data sets the same questions? Ids and subjects aside. */
static bool same_questions(const data_set *a, const data_set *b) {
    bool same = a->n == b->n;
    for (size_t i = 0; same && i < a->n; i++) {
        const question *x = &a->q[i], *y = &b->q[i];
        same = !strcmp(x->text, y->text) && !strcmp(x->context, y->context) &&
               x->n_choices == y->n_choices && x->answer == y->answer;
        for (int k = 0; same && k < x->n_choices; k++) same = !strcmp(x->choice[k], y->choice[k]);
    }
    return same;
}

static void test_forms(void) {
    static const char *const pairs[][4] = {
        {"medqa", "medqa.jsonl", "medqa", "medqa_hf.jsonl"},
        {"medmcqa", "medmcqa.jsonl", "medmcqa", "medmcqa_from1.json"},
        {"medmcqa", "medmcqa.jsonl", "medqa", "medqa.jsonl"},
        {"pubmedqa", "pubmedqa.json", "pubmedqa", "pubmedqa_hf.jsonl"}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        char a[64], b[64];
        snprintf(a, sizeof a, DATA "%s", pairs[i][1]);
        snprintf(b, sizeof b, DATA "%s", pairs[i][3]);
        CHECK_EQ(read_named(pairs[i][0], a, NULL), 0);
        data_set first = loaded;
        loaded = (data_set){0};
        CHECK_EQ(read_named(pairs[i][2], b, NULL), 0);
        CHECK(first.n > 3 && same_questions(&first, &loaded));
        free_data(&first);
    }
    CHECK_EQ(read_named("mmlu", DATA "anatomy_test.csv", NULL), 0);
    CHECK(loaded.n == 10 && !strcmp(loaded.q[1].subject, "anatomy") && loaded.q[1].answer == 1);
    CHECK(strstr(loaded.q[1].text, "weight.\nHer") && loaded.q[2].line == 5);
    CHECK(strstr(loaded.q[8].text, "\"nuclei\", flat"));
    CHECK_EQ(read_named("mmlu_pro", DATA "mmlu_pro.jsonl", NULL), 0);
    CHECK(loaded.n == 9 && loaded.q[6].n_choices == 10 && *loaded.q[0].reasoning);
    CHECK_EQ(read_named("usmle", DATA "usmle_step1.json", DATA "usmle_step1_solutions.json"), 0);
    CHECK(loaded.n == 5 && loaded.q[3].answer == 3 && loaded.q[0].n_choices == 5);
    CHECK_EQ(read_named("generic", DATA "generic.jsonl", NULL), 0);
    CHECK(loaded.n == 13 && loaded.q[1].answer == 1 && loaded.q[2].n_choices == 4);
}

static void test_refusals(void) {
    const char *good = "{\"question\": \"q\", \"options\": {\"A\": \"a\", \"B\": \"b\"}, "
                       "\"answer_idx\": \"B\"}\n";
    CHECK_EQ(read_text("medqa", ".jsonl", good), 0);
    CHECK(loaded.n == 1 && loaded.q[0].answer == 1);
    char text[400];
    snprintf(text, sizeof text, "%s\n\n{\"question\": \n", good);
    refused("medqa", ".jsonl", text, ".jsonl:4: JSON: ");
    snprintf(text, sizeof text, "\xEF\xBB\xBF%s\r\n", good);
    CHECK_EQ(read_text("medqa", ".jsonl", text), 0);
    refused("medmcqa", ".jsonl", "{\"QUESTION\": \"q\", \"CONTEXTS\": [\"c\"], \"final_decision\": "
            "\"no\"}\n", "fields missing: question, options, answer_idx; they are those of pubmedqa");
    refused("mmlu_pro", ".jsonl", good, "fields missing: answer, category; they are those of medqa");
    refused("medqa", ".json", "[{\"question\": \"q\", \"options\": {\"A\": \"a\", \"B\": \"b\"},\n"
            "\"answer_idx\": \"B\"},\n{\"question\": 1}]", ":3: task medqa: fields missing: options");
    refused("medqa", ".json", "[\n[]]", ":2: wanted an object");
    refused("medqa", ".json", "[]", "has no questions");
    refused("medqa", ".jsonl", "{\"question\": \"q\", \"options\": {\"A\": \"a\", \"C\": \"b\"}, "
            "\"answer_idx\": \"A\"}\n", "letters A, B, ... in order");
    refused("medqa", ".jsonl", "{\"question\": \"q\", \"options\": [\"a\", \"b\"], \"answer_idx\": "
            "\"E\"}\n", "field answer_idx: found E, which is none of 2 choices");
    refused("generic", ".jsonl", "{\"question\": \"q\", \"choices\": [\"a\", \"b\"], \"answer\": 2}\n",
            "no right answer");
    refused("generic", ".jsonl", "{\"question\": \"q\", \"choices\": [\"a\"], \"answer\": 0}\n",
            "found 1 choices");
    refused("generic", ".jsonl", "{\"question\": \"q\", \"choices\": [\"B\", \"A\"], \"answer\": "
            "\"A\"}\n", "is a letter and another choice's text");
    refused("generic", ".jsonl", "{\"question\": \"q\", \"choices\": [\"a\", {}], \"answer\": 0}\n",
            "field choices: wanted texts");
    refused("generic", ".jsonl", "{\"question\": \"\\u0000\", \"choices\": [\"a\", \"b\"], "
            "\"answer\": 0}\n", "found a NUL");
    refused("generic", ".jsonl", "{\"question\": \"\", \"choices\": [\"a\", \"b\"], \"answer\": 0}\n",
            "an empty question");
    char many[2000] = "{\"question\": \"q\", \"answer\": 0, \"choices\": [\"a\"";
    for (int i = 1; i < 27; i++) strcat(many, ", \"b\"");
    strcat(many, "]}\n");
    refused("generic", ".jsonl", many, "more choices than the 26 letters");
    refused("medqa", ".csv", "q,a,b,c,d,A\n", "not published as CSV");
    refused("medqa", ".csv", "q,a,b,c,d,A\n", "the fields' names, such as question");
    refused("generic", ".csv", "q,a,b,A\n\"q\n\",a,b,A\nq,\"a,b,A\n", ".csv:4: CSV: a quote that does");
    refused("generic", ".csv", "q,a,b,A\n\"q\"x,a,b,A\n", ".csv:2: CSV: text behind the quote");
    refused("generic", ".csv", "q,a,b,A\nq,a,A\n", ".csv:2: CSV: found 3 fields");
    refused("generic", ".csv", "q,a,b,C\n", "none of 2 choices");
    refused("mmlu", ".csv", "q,a,b,c,d,A\n", "no subject");
    refused("generic", ".csv", "question;A;B;answer\nq;a;b;A\n", ":1: CSV: found semicolons");
    refused("generic", ".csv", "\"q\";\"a\";\"b\";A\n", ":1: CSV: found semicolons");
    refused("generic", ".tsv", "question\tA\tB\tanswer\n", ":1: CSV: found tabs");
    refused("generic", ".csv", "question,A,B,answer\rq,a,b,A\r", "lines that end with CR");
    CHECK_EQ(read_text("generic", ".JSONL", "\n \r\n{\"question\": \"q\", \"choices\": [\"a\", \"b\"], "
                       "\"answer\": 1}\n\n{\"question\": \"q\", \"choices\": [\"a\", \"b\"], "
                       "\"answer\": 0}\n"), 0);
    CHECK(loaded.n == 2 && loaded.q[0].line == 3 && loaded.q[1].line == 5);
    CHECK_EQ(read_text("generic", ".CSV", "question,A,B,answer\nq,a,b,A\n"), 0);
    refused("mmlu", ".csv", "q,a,b,c,d,e,A\n", "four choices");
    refused("medmcqa", ".jsonl", "{\"question\": \"q\", \"opa\": \"1\", \"opb\": \"2\", \"opc\": \"3\","
            "\"opd\": \"4\", \"cop\": 2}\n", "nobody can tell");
    refused("medmcqa", ".jsonl", "{\"question\": \"q\", \"opa\": \"1\", \"opb\": \"2\", \"opc\": \"3\","
            "\"opd\": \"4\", \"cop\": -1}\n", "no right answer");
    CHECK_EQ(read_named("usmle", DATA "usmle_step1.json", NULL), MEDRUN_BAD_FILE);
    CHECK(strstr(last.text, "--answers"));
    CHECK_EQ(read_named("medqa", DATA "none.jsonl", NULL), MEDRUN_BAD_FILE);
}

/* ---- what is no data set, and what is one in another form ------------------------------------ */

static void bytes_are_refused(const char *ending, const char *bytes, size_t n, const char *words) {
    char full[] = "/tmp/medrun-eval-bytes.jsonl";
    snprintf(strrchr(full, '.'), 7, "%s", ending);
    FILE *f = fopen(full, "wb");
    if (!CHECK(f)) return;
    fwrite(bytes, 1, n, f);
    fclose(f);
    int code = read_named("generic", full, NULL);
    if (!CHECK(code == MEDRUN_BAD_FILE && strstr(last.text, words) && !strchr(last.text, '\n')))
        printf("    exit %d, %s; wanted %s\n", code, last.text, words);
    remove(full);
}
#define BYTES_ARE_REFUSED(ending, bytes, words) \
    bytes_are_refused(ending, bytes, sizeof bytes - 1, words)

static void test_strangers(void) {
    BYTES_ARE_REFUSED(".jsonl", "PAR1\x15\x04\x15", "is a Parquet file, wanted text");
    CHECK(strstr(last.text, "pandas.read_parquet"));
    BYTES_ARE_REFUSED(".arrow", "\xFF\xFF\xFF\xFF\x10\x02", "is an Arrow file of datasets' cache");
    BYTES_ARE_REFUSED(".db", "SQLite format 3\0\x10", "is an SQLite database");
    BYTES_ARE_REFUSED(".xls", "\xD0\xCF\x11\xE0\xA1", "is an old spreadsheet");
    BYTES_ARE_REFUSED(".csv", "\x1F\x8B\x08\x00", "is compressed by gzip, wanted text");
    BYTES_ARE_REFUSED(".csv", "PK\3\4\x14", "a zip archive or a spreadsheet");
    BYTES_ARE_REFUSED(".jsonl", "\xFF\xFE{\0\"\0", "is UTF-16 text");
    CHECK(strstr(last.text, "iconv -f UTF-16"));
    BYTES_ARE_REFUSED(".jsonl", "{\0\"\0q\0", ".jsonl:1: byte 2: found a NUL");
    BYTES_ARE_REFUSED(".json", "<!DOCTYPE html>\n", "is a web page");
    BYTES_ARE_REFUSED(".json", "version https://git-lfs.github.com/spec/v1\n", "Git LFS");
    BYTES_ARE_REFUSED(".csv", "q,a,b,A\nFi\xE8vre?,oui,non,A\n", ".csv:2: byte 3: found E8");
    CHECK(strstr(last.text, "iconv -f WINDOWS-1252"));
    BYTES_ARE_REFUSED(".jsonl", "\n{\"question\": \"Fi\xE8vre?\"}\n", ".jsonl:2: byte 17: found E8");
    refused("generic", ".jsonl", "{\"question\": \"q\", \"choices\": [\"a\", \"b\"], \"answer\": 0,\n"
            "\"score\": NaN}\n", ":2: found NaN, which Python writes");
    refused("generic", ".json", "[{\"question\": None}]", ":1: found None");
    refused("generic", ".json", "{\"question\":{\"0\":\"q\"},\"answer\":{\"0\":1}}", "by columns");
    refused("generic", ".json", "{\"question\":[\"q\"],\"answer\":[1]}", "by columns");
    CHECK_EQ(read_named("generic", "/dev/zero", NULL), MEDRUN_BAD_FILE);
}

/* PATH and TEXT begin with the same question. */
static void same_as(const char *name, const char *path, const char *ending, const char *text) {
    CHECK_EQ(read_named(name, path, NULL), 0);
    data_set first = loaded;
    loaded = (data_set){0};
    if (!CHECK_EQ(read_text(name, ending, text), 0)) printf("    %s\n", last.text);
    first.n = 1, loaded.n = loaded.n ? 1 : 0;
    if (!CHECK( same_questions(&first, &loaded))) printf("    %s\n", text);
    free_data(&first);
}

static void test_other_forms(void) {
    static const char *const first = "Which vitamin is missing in a person with scurvy?";
    char text[1000];
    static const char *const heads[] = {"Question,A,B,C,D,Answer", ("question,option_a,option_b,"
        "option_c,option_d,answer"), "QUESTION,Choice 1,Choice 2,Choice 3,Choice 4,answer"};
    for (int i = 0; i < 6; i++) {
        snprintf(text, sizeof text, "%s\r\n%s,Vitamin A,Vitamin B12,Vitamin C,Vitamin D,%s\r\n",
                 heads[i % 3], first, i < 3 ? "C" : "2");
        same_as("generic", DATA "medqa.jsonl", ".csv", text);
        same_as("generic", DATA "medqa.jsonl", "anatomy_test.csv", text);
        CHECK(loaded.q[0].line == 2);
    }
    same_as("mmlu", DATA "anatomy_test.csv", ".csv", "subject,question,a,b,c,d,answer\nanatomy,Which "
            "vitamin is missing in a person with scurvy?,Vitamin A,Vitamin B12,Vitamin C,Vitamin D,C\n");
    CHECK(!strcmp(loaded.q[0].subject, "anatomy"));
    snprintf(text, sizeof text, "id,question,opa,opb,opc,opd,cop,exp\n1,%s,Vitamin A,Vitamin B12,"
             "Vitamin C,Vitamin D,2,\n2,other,1,2,3,4,0,why\n", first);
    same_as("medmcqa", DATA "medmcqa.jsonl", ".csv", text);
    snprintf(text, sizeof text, "question,choices,answer\n%s,\"[\"\"Vitamin A\"\", \"\"Vitamin B12\"\", "
             "\"\"Vitamin C\"\", \"\"Vitamin D\"\"]\",Vitamin C\n", first);
    same_as("generic", DATA "medqa.jsonl", ".csv", text);
    refused("generic", ".csv", "question,choices,answer\nq,\"['a' 'b']\",a\n", "field choices: found the "
            "text ['a' 'b'], wanted a list");
    refused("generic", ".csv", "question,A,B,answer\nq,a,b\n", ".csv:2: CSV: found 3 fields, wanted 4");
    refused("generic", ".csv", "question,A,B,answer\nq,1,2,1\n", "a number and a choice's text");
    refused("generic", ".csv", "question,A,B,answer\nq,a,b,\n", "fields missing: answer");
    snprintf(text, sizeof text, "{\"features\":[],\"rows\":[{\"row_idx\":0,\"row\":{\"question\":\"%s\","
             "\"choices\":\"[\\\"Vitamin A\\\",\\\"Vitamin B12\\\",\\\"Vitamin C\\\",\\\"Vitamin D\\\"]\","
             "\"answer\":2},\"truncated_cells\":[]}],\"num_rows_total\":1273,\"partial\":false}\n", first);
    same_as("generic", DATA "medqa.jsonl", ".json", text);
    CHECK_EQ(loaded.viewer_total, 1273);
    text[strlen(text) - 1] = 0;
    same_as("generic", DATA "medqa.jsonl", ".json", text);
    refused("generic", ".json", "{\"rows\":[{\"row\":{\"question\":\"q\"},\"truncated_cells\":"
            "[\"question\"]}]}\n", "row 0: the dataset viewer cut its texts");
}

static void test_answers(void) {
    static const struct { const char *text; int n, found; } cases[] = {
        {"Final Answer: (B)", 4, 1}, {"the final answer is c.", 4, 2}, {"ANSWER\n\n**D**", 4, 3},
        {"Answer: E", 4, -1}, {"Answer: E", 5, 4}, {"Answer: boxed{B}", 4, 1},
        {"Answer: \\boxed{A}", 4, 0}, {"Answer: Bronchitis", 4, -1}, {"Answer: B_1", 4, -1},
        {"Answer: B\xC3\xA9", 4, -1}, {"an answer, but Answer: A", 4, 0}, {"(B)", 4, -1},
        {"Answer boxed boxed C", 4, -1}, {"answerboxedboxed c", 4, 2}, {"", 4, -1}, {"answer", 4, -1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (!CHECK_EQ(find_reasoned_answer(cases[i].text, cases[i].n), cases[i].found))
            printf("    %s\n", cases[i].text);
    CHECK_EQ(find_pro_answer("so the answer is (J)."), 9);
    CHECK_EQ(find_pro_answer("the answer is here: the answer is C"), 2);
    CHECK_EQ(find_pro_answer("the Answer is K, answer is  A"), -1);
}

static void test_statistics(void) {
    double i[2];
    wilson(8, 10, i);                   /* statsmodels' proportion_confint(method="wilson")      */
    CHECK(fabs(i[0] - 0.4901624715) < 1e-9 && fabs(i[1] - 0.9433178485) < 1e-9);
    wilson(0, 5, i);
    CHECK(i[0] == 0 && fabs(i[1] - 0.4344825) < 1e-6);
    wilson(0, 0, i);
    CHECK(i[0] == 0 && i[1] == 1);
    CHECK(fabs(standard_error(3, 12) - sqrt(0.25 * 0.75 / 11)) < 1e-15);
    tally group = {.task = "", .subject = ""};
    add_part(&group, &(tally){.n = 10, .right = 4});
    add_part(&group, &(tally){.n = 30, .right = 24});
    double a = 0.4 * 0.6 / 9, b = 0.8 * 0.2 / 29;
    CHECK(fabs(error_of(&group) - sqrt((9 * a * 10 + 29 * b * 30) / 38 / 40)) < 1e-15);
    float logits[300];
    double sum = 0;
    for (int k = 0; k < 300; k++) sum += exp((double)(logits[k] = (float)(k % 37) / 3));
    CHECK(fabs(log_sum(logits, 300) - log(sum)) < 1e-12);
    logits[7] = 2000;
    CHECK(log_sum(logits, 300) == 2000);
}

/* ---- prompts, letter for letter ------------------------------------------------------------ */

static evaluation v;
static char model_path[512], page_path[512];

static void set_up(const char *name, const char *path, int mode) {
    medrun_error e = {0};
    medrun_model *m = v.m;
    free_data(&v.data);
    free_data(&v.shots);
    v = (evaluation){.t = find_task(name, &e), .mode = mode, .fd = -1, .n_shards = 1, .m = m,
                     .batch = 512, .parallel = 3, .most_new = 12};
    CHECK_EQ(read_data(&v.data, v.t, path, NULL, NULL, &e), 0);
}

static void prompt_is(size_t i, const char *wanted) {
    medrun_error e = {0};
    prompt_parts parts;
    buffer b = {0};
    CHECK_EQ(write_parts(&v, &v.data.q[i], &parts, &e), 0);
    join_parts(&parts, 0, &b);
    if (!CHECK(!strcmp(text_of(&b), wanted))) printf("%s\n---- wanted\n%s\n", text_of(&b), wanted);
    buffer_free(&b);
    free_parts(&parts);
}

static void test_prompts(void) {
    medrun_error e = {0};
    set_up("medqa", DATA "medqa.jsonl", LETTER);
    prompt_is(2, "Question: Which valve lies between the left atrium and the left ventricle?\n"
              "A. Mitral valve\nB. Tricuspid valve\nC. Aortic valve\nD. Pulmonary valve\nAnswer:");
    set_up("medmcqa", DATA "medmcqa.jsonl", ANSWER);
    v.n_shots = 1;
    CHECK_EQ(read_data(&v.shots, v.t, DATA "medqa.jsonl", NULL, NULL, &e), 0);
    prompt_is(6, "Question: Which vitamin is missing in a person with scurvy?\nChoices:\nA. Vitamin A\n"
              "B. Vitamin B12\nC. Vitamin C\nD. Vitamin D\nAnswer: Vitamin C\n\nQuestion: Which organ "
              "makes insulin?\nChoices:\nA. Pancreas\nB. Liver\nC. Spleen\nD. Thyroid\nAnswer:");
    set_up("pubmedqa", DATA "pubmedqa.json", LETTER);
    prompt_is(3, "Abstract: Time matters in chest pain.\n200 ECGs were read by both.\nAgreement was "
              "97 %.\nQuestion: Can nurses read ECGs of chest pain as well as doctors?\nAnswer:");
    set_up("mmlu", DATA "college_biology_test.csv", LETTER);
    prompt_is(2, "The following are multiple choice questions (with answers) about college biology."
              "\n\nWhich organ makes insulin?\nA. Pancreas\nB. Liver\nC. Spleen\nD. Thyroid\nAnswer:");
    set_up("mmlu", DATA "anatomy_test.csv", LETTER);
    v.o.system = "Be brief.";
    prompt_is(2, "Be brief.\n\nThe following are multiple choice questions (with answers) about "
              "anatomy.\n\nWhich valve lies between the left atrium and the left ventricle?\n"
              "A. Mitral valve\nB. Tricuspid valve\nC. Aortic valve\nD. Pulmonary valve\nAnswer:");
    set_up("mmlu_pro", DATA "mmlu_pro.jsonl", GENERATE);
    v.n_shots = 1;
    CHECK_EQ(read_data(&v.shots, v.t, DATA "mmlu_pro_dev.jsonl", NULL, NULL, &e), 0);
    prompt_is(0, "The following are multiple choice questions (with answers) about health. Think step "
              "by step and then finish your answer with \"the answer is (X)\" where X is the correct "
              "letter choice.\nQuestion:\nWhich infection does the BCG vaccine protect against?\n"
              "Options:\nA. Measles\nB. Tuberculosis\nC. Polio\nD. Tetanus\nE. Vitamin A\n"
              "F. Vitamin B12\nAnswer: Let's think step by step. The question asks for one thing. "
              "Tuberculosis fits. The answer is (B).\n\nQuestion:\nWhich vitamin is missing in a person "
              "with scurvy?\nOptions:\nA. Vitamin A\nB. Vitamin B12\nC. Vitamin C\nD. Vitamin D\n"
              "Answer: Let's think step by step.");
    set_up("pubmedqa", DATA "pubmedqa.json", GENERATE);
    prompt_is(3, "Instructions: The following are multiple choice questions about medical knowledge. "
              "Solve them in a step-by-step fashion, starting by summarizing the available "
              "information. Output a single option from the three options as the final answer.\n\n "
              "Question: Time matters in chest pain. 200 ECGs were read by both. Agreement was 97 %. "
              "Can nurses read ECGs of chest pain as well as doctors? (A) Yes (B) No (C) "
              "Maybe \n Response (think step by step and then end with 'Final Answer:' followed by "
              "*only* the letter corresponding to the correct answer enclosed in parentheses)");
}

/* ---- scores: sharing changes no bit -------------------------------------------------------- */

/* The log-likelihood of one text, all its tokens in a session of their own. */
static double score_alone(const prompt *p, int i) {
    medrun_session *s = NULL;
    medrun_error e = {0};
    size_t n = tail_length(p, i);
    medrun_session_options o = {.context = (int)(p->n + n), .batch = (int)(p->n + n),
                                .logit_rows = (int)n};
    double sum = 0;
    if (!CHECK_EQ(medrun_start(&s, v.m, &o, NULL, 0, &e), 0)) return 0;
    medrun_feed(s, ids_at(&p->ids, 0), p->n, &e);
    medrun_feed(s, ids_at(&p->ids, tail_start(p, i)), n - 1, &e);
    medrun_step(&s, 1, &e);
    for (size_t k = 0; k < n; k++) {
        const float *row = medrun_logits(s, n - 1 - k);
        if (!row) return NAN;
        sum += (double)row[*ids_at(&p->ids, tail_start(p, i) + k)] -
               log_sum(row, (size_t)v.m->config.vocab_size);
    }
    medrun_stop(s);
    return sum;
}

/* What the greedy tokens are, one question alone. */
static size_t generate_alone(const prompt *p, int32_t *out, size_t most) {
    medrun_session *s = NULL;
    medrun_error e = {0};
    medrun_session_options o = {.context = (int)(p->n + most), .custom_sampling = true,
                                .sampling = {.top_p = 1, .repeat_penalty = 1}};
    size_t n = 0;
    if (!CHECK_EQ(medrun_start(&s, v.m, &o, NULL, 0, &e), 0)) return 0;
    medrun_feed(s, ids_at(&p->ids, 0), p->n, &e);
    while (n < most && !e.code) {
        while (medrun_pending(s)) medrun_step(&s, 1, &e);
        medrun_sample(s, &out[n], &e);
        if (medrun_is_stop(v.m, out[n])) break;
        medrun_feed(s, &out[n++], 1, &e);
    }
    medrun_stop(s);
    return n;
}

/* Runs all questions of V and compares each with itself alone; what was processed, or 0. */
static uint64_t check_run(size_t batch, size_t parallel) {
    medrun_error e = {0};
    size_t longest = 1, rows = 1, different = 0;
    v.prompts = new_array(v.data.n, sizeof *v.prompts);
    v.done = new_array(v.data.n, sizeof *v.done);
    v.batch = batch, v.parallel = parallel, v.o.quiet = true;
    if (!CHECK_EQ(make_prompts(&v, &longest, &rows, &e), 0)) return 0;
    v.context = longest;
    CHECK_EQ(start_sessions(&v, rows, &e), 0);
    while (v.n_done < v.n_mine && !e.code) {
        for (slot *s = v.slots; s < v.slots + v.n_slots; s++)
            if (s->at == NO_QUESTION && !next_question(&v, s)) break;
        run_pass(&v, &e);
        for (slot *s = v.slots; s < v.slots + v.n_slots; s++) {
            if (!s->finished) continue;
            const prompt *p = &v.prompts[s->at];
            int32_t ids[64];
            for (int i = 0; i < p->n_tails && v.mode != GENERATE; i++)
                different += s->score[i] != score_alone(p, i);
            size_t n = v.mode == GENERATE ? generate_alone(p, ids, (size_t)v.most_new) : 0;
            if (v.mode == GENERATE)
                different += n != n_ids(&p->ids) - p->n || memcmp(ids, ids_at(&p->ids, p->n), n * 4);
            v.n_done++, s->at = NO_QUESTION, s->finished = false;
        }
    }
    CHECK_EQ(e.code, 0);
    CHECK_EQ(different, 0);
    CHECK_EQ(v.n_done, v.data.n);
    for (size_t i = 0; i < v.n_slots; i++) medrun_stop(v.slots[i].s), buffer_free(&v.slots[i].text);
    medrun_stop(v.lead);
    for (size_t i = 0; i < v.data.n; i++) buffer_free(&v.prompts[i].ids);
    free(v.prompts);
    free(v.done);
    return v.processed;
}

static void tail_is(const prompt *p, int i, const char *wanted) {
    char text[64];
    size_t n;
    medrun_error e = {0};
    medrun_detokenize(v.m, ids_at(&p->ids, tail_start(p, i)), tail_length(p, i), true, text,
                      sizeof text, &n, &e);
    if (!CHECK(n == strlen(wanted) && !memcmp(text, wanted, n))) printf("    %.*s\n", (int)n, text);
}

/* White space at the end of the context goes to what follows. */
static void test_border(void) {
    medrun_error e = {0};
    for (int chat = 0; chat < 2; chat++) {
        prompt p = {0};
        set_up("medqa", DATA "medqa.jsonl", chat ? ANSWER : LETTER);
        v.chat = chat ? chat_find("llama3") : NULL;
        CHECK_EQ(make_prompt(&v, &v.data.q[0], &p, &e), 0);
        CHECK_EQ(p.n_tails, 4);
        int32_t bos = v.m->tokenizer.bos, end = chat_token(&v.m->tokenizer, "<|end_header_id|>");
        CHECK(*ids_at(&p.ids, 0) == bos && *ids_at(&p.ids, 1) != bos);
        CHECK((*ids_at(&p.ids, p.n - 1) == end) == chat);
        tail_is(&p, 3, chat ? "\n\nVitamin D" : " D");
        buffer_free(&p.ids);
    }
}

static void test_scores(void) {
    medrun_error e = {0};
    if (!CHECK_EQ(medrun_open(&v.m, model_path, &(medrun_options){.threads = 2}, &e), 0)) return;
    test_border();
    for (int mode = LETTER; mode <= GENERATE; mode++) {
        set_up("medqa", DATA "medqa.jsonl", mode);
        v.chat = chat_find("llama3");
        CHECK(check_run(512, 16) > 0);
        set_up("medqa", DATA "medqa.jsonl", mode);
        v.chat = NULL;
        CHECK(check_run(50, 3) > 0);
    }
    set_up("pubmedqa", DATA "pubmedqa.json", LETTER);
    CHECK(check_run(7, 2) > 0);
    uint64_t processed[2];
    for (int i = 0; i < 2; i++) {               /* shots are processed once, for all sessions    */
        set_up("mmlu", DATA "anatomy_test.csv", LETTER);
        CHECK_EQ(read_data(&v.shots, v.t, DATA "anatomy_dev.csv", NULL, NULL, &e), 0);
        v.n_shots = 3;
        processed[i] = check_run(i ? 300 : 512, i ? 8 : 1);
    }
    CHECK(processed[0] > 0 && processed[1] < processed[0] + processed[0] / 10);
    medrun_close(v.m);
    v.m = NULL;
}

/* ---- memory -------------------------------------------------------------------------------- */

/* The exit code of a run that gets N allocations and no more; in a child, which may crash. */
static int run_with(size_t n, const char *mode) {
    const char *line[] = {"medrun-eval", model_path, "mmlu", DATA "anatomy_test.csv", "--fewshot", "1",
                          DATA "anatomy_dev.csv", "--limit", "2", "-t", "1", "--mode", mode,
                          "--html", page_path, NULL};
    int status = 0;
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        char *arguments[16];
        for (int i = 0; i < 16; i++) arguments[i] = (char *)(uintptr_t)line[i];
        if (!freopen("/dev/null", "w", stdout) || !freopen("/dev/null", "w", stderr)) _exit(99);
        allocations_left = n;
        _exit(eval_main(15, arguments));
    }
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 100 + WTERMSIG(status);
}

static void test_memory(void) {
    static const char *const modes[] = {"answer", "letter"};
    for (int i = 0; i < 2; i++) {
        size_t n = 0, wrong = 0;
        int code = MEDRUN_NO_MEMORY;
        for (; n < 100000 && (code = run_with(n, modes[i])) != MEDRUN_OK; n++)
            if (code != MEDRUN_NO_MEMORY && code != MEDRUN_BAD_FILE && ++wrong < 5)
                printf("    allocation %zu: %d\n", n, code);     /* 3: a text of the header       */
        CHECK_EQ(wrong, 0);
        CHECK(n > 50 && code == MEDRUN_OK);
    }
}

/* A signal ends the pass that runs, and none begins after it. */
static void test_interrupt(void) {
    medrun_model *m = NULL;
    medrun_session *s = NULL;
    medrun_session_options o = {.context = 8};
    medrun_error e = {0};
    if (!CHECK(!medrun_open(&m, model_path, NULL, &e) && !medrun_start(&s, m, &o, NULL, 0, &e))) return;
    CHECK(!medrun_feed(s, (const int32_t[]){1, 2, 3}, 3, &e));
    running = s;
    on_interrupt(SIGTERM);
    CHECK(interrupted && medrun_step(&s, 1, &e) == MEDRUN_INTERRUPTED && medrun_pending(s) == 3);
    running = NULL;
    medrun_stop(s);
    medrun_close(m);
    CHECK_EQ(run_with(100000, "letter"), MEDRUN_INTERRUPTED);
    interrupted = 0;
}

int main(void) {
    const char *build = getenv("MEDRUN_TEST_BUILD");
    snprintf(model_path, sizeof model_path, "%s/llama-tied-int8.mdr", build ? build : "build");
    snprintf(page_path, sizeof page_path, "%s/test_memory.html", build ? build : "build");
    test_forms();
    test_refusals();
    test_strangers();
    test_other_forms();
    test_answers();
    test_statistics();
    test_prompts();
    test_scores();
    test_memory();
    test_interrupt();
    free_data(&loaded);
    free_data(&v.data);
    free_data(&v.shots);
    return report();
}
