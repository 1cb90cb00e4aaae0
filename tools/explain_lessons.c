/* Part of medrun-explain: --lesson N, the pages of the course (tools/course). A lesson gives the
 * options that are not given, and tells the page what to look at. Its words hold for any model.
 * MIT licence, see LICENSE. */

enum { N_LESSONS = 10, MAX_LOOKS = 4 };

typedef struct {
    const char *title, *question;           /* as in the course                                 */
    const char *prompt, *why, *what_if, *ablate;    /* WHY: where the demo model's answer to
                                               this prompt is explained                         */
    /* What to look at in a view; ANSWER: what the page compares a student's answer with. */
    struct { int view; const char *what, *answer; } looks[MAX_LOOKS];
} explain_lesson;

static const explain_lesson explain_lessons[N_LESSONS] = {
    {"Text is cut into learned pieces",
     "My patient takes azathioprine. Does the model read that word as I do?",
     "What is levothyroxine used for?", NULL, NULL, NULL,
     {{1, "Tick \"show pieces, spaces and line ends\". Of how many pieces is the longest word of "
          "the question?", "pieces"},
      {1, "Click the same word's pieces in the answer, one after the other. How sure was the model "
          "of each, and why is it surer of the second?", NULL},
      {1, "Which token of the answer surprised the model most?", "surprise"}}},
    {"A chat is one text with control tokens",
     "How does the model know which words are mine and which are its own?",
     "What is gout?", NULL, NULL, NULL,
     {{1, "Dashed tokens are control tokens, which nobody typed. How many stand before the answer?",
       "controls"},
      {1, "Which token ends the answer?", "end"},
      {1, "Click that last token. How sure was the model that the answer ends there?", NULL}}},
    {"Numbers are rounded", "They say the model was made smaller. Is it still the same model?",
     "What are the symptoms of diabetes?", NULL, NULL, NULL,
     {{10, "The table shows where the two would go on with different words. In the answer, which "
           "word does the other one put there?", "replaced"},
      {1, "Click that word in the answer. Was the model less sure there than at its neighbours?",
       NULL}}},
    {"The residual stream and its norm",
     "There are layers. What does one layer hand to the next?",
     "What are the symptoms of diabetes?", "23", NULL, NULL,
     {{5, "Which layer writes most?", "writes"},
      {3, "From which layer on does the explained word lead to the end?", "settles"},
      {3, "Compare the columns. Which word leads early, and which late?", NULL}}},
    {"One head looks back",
     "The answer says diabetes again. How did it know which disease I asked about?",
     "What are the symptoms of diabetes?", "20", NULL, NULL,
     {{4, "Choose layers and heads above the text. Find a head that looks at the explained word "
          "where it stood before.", "finds"},
      {4, "Click other words of the answer. Where does that head look now?", NULL},
      {4, "In the small pictures a row is a token, and its columns are those before it. Which head "
          "looks most at the token just before, over the whole text?", "before"},
      {4, "Press Esc. Try the heads of layer 1. Which gives the first token the most weight?",
       "start"}}},
    {"The cache", "Why do I wait for the first word, and then the rest comes quickly?",
     "What are the symptoms of diabetes?", NULL, NULL, NULL,
     {{8, "How many MB would a note of 5000 tokens take?", "cache"},
      {9, "Divide the time of the prompt by its tokens, and that of the answer by its own. Which "
          "token costs more?", NULL}}},
    {"The feed-forward part stores associations",
     "Where in the model does it say that diabetes makes you thirsty?",
     "What are the symptoms of diabetes?", "23", "diabetes=>asthma", NULL,
     {{5, "Read the neurons' raised words. Do any of them belong together?", NULL},
      {2, "Which layer's feed-forward part adds most?", "feeds"},
      {6, "The question is about another disease now. What is the likeliest word?", "changed"}}},
    {"From vector to word, and dice",
     "I asked twice and got two answers. Which one does it believe?",
     "Why am I tired?", "17", NULL, NULL,
     {{7, "Set top-k to off and the temperature to 1. Draw 20, a few times. How often does the "
          "likeliest come?", NULL},
      {7, "Draw 20 at temperature 2. What changes?", NULL},
      {7, "Stay at temperature 2 and set top-p to 0.5. How many tokens can come?", "half"}}},
    {"Why this word, and how far to believe it", "Can the model show me why it said that?",
     "What are the symptoms of diabetes?", "20", "diabetes=>asthma", "auto",
     {{2, "In the picture \"Heads\" a row is a layer. Which head adds most?", "adds"},
      {3, "From which layer on does the explained word lead to the end?", "settles"},
      {6, "Some heads were switched off, one at a time. Which of them costs most? Is it the one "
          "that adds most?", "costs"},
      {6, "The disease is changed in the question. What is the likeliest word now?", "changed"}}},
    {"How sure, how good, how fast", "If it sounds sure, is it right?",
     "What is a normal heart rate?", NULL, NULL, NULL,
     {{1, "Which token of the answer surprised the model most? Would a mistake there hurt?",
       "surprise"},
      {9, "What took more of the answer's time: attention, or the feed-forward part?",
       "slowest"}}},
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
        if (y->looks[i].answer) buffer_printf(to, ",\"%s\"", y->looks[i].answer);
        buffer_text(to, "]");
    }
    buffer_text(to, "]}");
}
