/* Part of medrun-explain: --lesson N, the pages of the course (tools/course). A lesson gives the
 * options that are not given, and tells the page what to look at. Its words hold for any model.
 * MIT licence, see LICENSE. */

enum { N_LESSONS = 10, MAX_LOOKS = 4 };

typedef struct {
    const char *title, *question;           /* what it teaches; what a student might ask        */
    const char *prompt, *why, *what_if, *ablate;    /* WHY: where the demo model's answer to
                                               this prompt is explained                         */
    struct { int view; const char *what; } looks[MAX_LOOKS];
} explain_lesson;

static const explain_lesson explain_lessons[N_LESSONS] = {
    {"Text is cut into learned pieces", "Does the model read letters or words?",
     "What is levothyroxine used for?", NULL, NULL, NULL,
     {{1, "Count the pieces of the long words. Which of them is a part that a doctor would name?"},
      {1, "Choose one piece inside a long word: how sure was the model that it comes?"}}},
    {"A chat is one text with control tokens", "How does it know who is speaking?",
     "What is gout?", NULL, NULL, NULL,
     {{1, "Find the dashed pieces: they are no text that anybody typed. Who starts where?"},
      {1, "Which piece ends the answer, and how sure was the model of it?"}}},
    {"Numbers are rounded", "Does rounding change what it says?",
     "What are the symptoms of diabetes?", NULL, NULL, NULL,
     {{10, "Where do the two kinds of numbers differ most? Is it a word that carries meaning?"},
      {1, "Is the model less sure at those places?"}}},
    {"The residual stream and its norm", "What is handed on from layer to layer?",
     "What are the symptoms of diabetes?", "23", NULL, NULL,
     {{5, "How does the size of the stream grow? Which half of a layer writes more?"},
      {3, "If the stream stopped here: which word would come?"}}},
    {"One head looks back", "How does the end of a sentence know its beginning?",
     "What are the symptoms of diabetes?", "20", NULL, NULL,
     {{4, "Choose a word of the answer: from which words does this head fetch?"},
      {4, "Find a head that looks at the word before, and one that looks far back."}}},
    {"The cache", "Why does the first word take longer than the next?",
     "What are the symptoms of diabetes?", NULL, NULL, NULL,
     {{8, "How much memory does a token take? And a long note?"},
      {9, "How long did the prompt take, and how long each token of the answer?"}}},
    {"The feed-forward part stores associations", "Where does it keep what it learned?",
     "What are the symptoms of diabetes?", "23", "diabetes=>asthma", NULL,
     {{5, "Read the neurons' raised words. Do any of them belong together?"},
      {2, "How much of the difference comes from the feed-forward parts?"}}},
    {"From vector to word, and dice", "Why does it answer differently when I ask twice?",
     "Why am I tired?", NULL, NULL, NULL,
     {{7, "Draw 20 at temperature 1, then at 2. What changes?"},
      {1, "Find a place where the second word would have been just as right."}}},
    {"Why this word, and how far to believe it", "Can it tell me why it said that?",
     "What are the symptoms of diabetes?", "20", "diabetes=>asthma", "auto",
     {{2, "Which part of the model speaks most for this word?"},
      {3, "From which layer on does the word lead?"},
      {6, "Predict first: what comes when the disease is changed in the question?"},
      {6, "Switched off, does a head cost what it seemed to give?"}}},
    {"How sure, how good, how fast", "If it is sure, is it right?",
     "What is a normal heart rate?", NULL, NULL, NULL,
     {{1, "Where was the model least sure? Is that where a mistake would hurt?"},
      {9, "Which part of the work takes most of the time?"}}},
};

/* Before the model is opened: options that are not given. */
static int take_lesson(explain *x, medrun_error *e) {
    explain_options *o = &x->o;
    int n;
    if (!o->lesson) return MEDRUN_OK;
    if (option_int("--lesson", o->lesson, 1, N_LESSONS, &n, e)) return e->code;
    const explain_lesson *y = &explain_lessons[(x->lesson = n) - 1];
    x->own_prompt = !o->prompt && !o->file && !o->chat && !o->ids && !o->mcq;
    if (!x->own_prompt) return MEDRUN_OK;
    o->prompt = y->prompt;
    if (!o->ablate) o->ablate = y->ablate;
    if (!x->n_edits && y->what_if) x->edits[x->n_edits++] = y->what_if;
    return MEDRUN_OK;
}

/* Once it is open: places in the demo model's answer are no places in another's. */
static void take_lessons_place(explain *x) {
    if (x->lesson && x->own_prompt && !x->o.why && !strcmp(x->v.m->name, "medrun demo"))
        x->o.why = explain_lessons[x->lesson - 1].why;
}

static void write_lesson(const explain *x, buffer *to) {
    if (!x->lesson) return;
    const explain_lesson *y = &explain_lessons[x->lesson - 1];
    buffer_printf(to, ",\n\"lesson\":{\"n\":%d,\"title\":", x->lesson);
    json_quote(to, y->title, strlen(y->title));
    buffer_text(to, ",\"question\":");
    json_quote(to, y->question, strlen(y->question));
    buffer_text(to, ",\"looks\":[");
    for (int i = 0; i < MAX_LOOKS && y->looks[i].view; i++) {
        buffer_printf(to, "%s[%d,", i ? "," : "", y->looks[i].view);
        json_quote(to, y->looks[i].what, strlen(y->looks[i].what));
        buffer_text(to, "]");
    }
    buffer_text(to, "]}");
}
