/* medrun.c - runs open medical language models on an ordinary CPU.
 *
 * One C file: it maps a checkpoint (.mdr, made by medrun-export from a Hugging Face folder or a
 * GGUF file) and answers, with nothing but libc and pthreads. With int8 or int4 weights, or bf16
 * under --strict, scalar, AVX2, AVX-512 and NEON give the same bits, whatever the number of
 * threads, the chunks of the prompt or the company in the batch: sections 5 and 6 say why.
 *
 *     cc -O2 -o medrun medrun.c -lm -lpthread      the program
 *     cc -DMEDRUN_NO_MAIN -c medrun.c              the library object
 *     #define MEDRUN_API_ONLY                      then include: section 1 only, as a header
 *     #define MEDRUN_NO_MAIN                       then include: every static within reach
 *     #define MEDRUN_COMMANDS                      and the command line's machinery, too
 *
 * Sections, each using only what stands above it:
 *
 *      1 API           what an embedder may call; the manual is the comment above each call
 *      2 Platform      includes, compilers, what the system gives: files, memory, the terminal
 *      3 Basics        errors, memory, UTF-8, SHA-256, JSON
 *      4 Threads       one pool, parallel_for
 *      5 Numbers       bf16, f16, int8, int4, and how weights lie in panels
 *      6 Kernels       the words for each instruction set, the sentences once, choosing a set
 *      7 Tensor        packing activations, matmul on all threads
 *      8 OpenCL        the same on a device, where it is built in
 *      9 Model file    the container: parse and check everything before anything is used
 *     10 Tokenizer     byte-level and SentencePiece BPE, the patterns, Unicode classes
 *     11 Chat          templates as tables
 *     12 Model         config, rotary frequencies, binding tensors by name
 *     13 Transformer   norm, rope, attention, feed-forward, forward    <- the reason to read
 *     14 Sampler       temperature, top-k, top-p, min-p, repeat penalty
 *     15 Session       the bodies of the API
 *     16 Commands      option table, chat, run, show, verify, ...
 *     17 main
 *
 * One token's way through `medrun run MODEL.mdr -p TEXT`, each step with its section:
 *
 *     17 run_line finds the command, 16 run_command runs it. 15 medrun_open maps the file, of which
 *     12 load_model reads the header; bind_all gives each matrix its place there. 15 medrun_start
 *     lays out the session's memory: the timeline of ids, the cache of keys and values.
 *     16 make_prompt: 11 chat_render writes the turns as the model knows them, 10 encode_text cuts
 *     them into ids. 16 print_reply asks for one id after another with 15 medrun_next, whose
 *     medrun_step is one pass over the weights: 13 forward, in the textbook's order. embed_row
 *     gives each id its row; then for each layer norm_rows, 7 matmul to q, k and v, place_key
 *     (turned by position; k and v to the cache), attend_rows, matmul, and after another norm
 *     widen_rows and matmul again; add_row adds each half to the row.
 *     A matmul packs its rows (7 pack_activations) and shares panels of weights between threads
 *     (4 parallel_for); 6 tile_int8 or its like takes the time; 6 attend is attention. 13 output
 *     makes logits, 14 sample_token an id, 10 tokenizer_text its piece; 16 print_held shows it.
 *
 * MIT licence, see LICENSE. Not a medical device.
 */
#ifndef MEDRUN_PASS             /* defined while the file includes itself for section 6 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64    /* on 32 bits too files are larger than memory                  */
#endif

#ifndef MEDRUN_H
#define MEDRUN_H
/* ============================================================================================
 * 1 API: what an embedder may call
 *
 * The comment above each call is its manual; tools/examples/ask.c is a whole program: medrun_open,
 * medrun_start, medrun_say, then medrun_next until medrun_is_stop. Stop each session before you
 * close its model. Text is UTF-8 with a length in bytes; logits are float32, vocab_size a position.
 *
 * Errors: a call that can fail returns a code (0: MEDRUN_OK), clears your medrun_error (NULL is
 * fine) and keeps its first failure there. Nothing here prints, exits or reads the environment.
 *
 * Threads may share a model; a session belongs to one thread at a time. Steps of sessions of one
 * model take turns on its thread pool. fork leaves the pool behind: a child opens its own models,
 * and uses nothing that was opened before, not even to close it.
 *
 * Memory: medrun_open maps the file and takes heap for tables. A session is one piece, the caller's
 * or mapped. After medrun_start only calls for text (medrun_say, _render, _tokenize, _detokenize)
 * and files (_save, _restore, _feed_saved) take heap, and give it back before they return. No call
 * needs more than 32 KiB of stack. Tests: tests/15_*.c, 34_examples.sh.
 *
 * Structs may grow from 0.1 to 0.2, not from 0.1.0 to 0.1.1: the shared library's name (make lib:
 * libmedrun.so.0.1) and its symbols' version carry those two numbers.
 * ============================================================================================ */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MEDRUN_VERSION "0.1.0"
#ifdef __cplusplus
extern "C" {
#endif

/* Codes of every call; the command line uses them as exit codes. */
enum {
    MEDRUN_OK = 0,
    MEDRUN_FAILED = 1,          /* failed while running: reading, writing, a thread            */
    MEDRUN_USAGE = 2,           /* an argument is out of its range                             */
    MEDRUN_BAD_FILE = 3,        /* a file is missing, unsupported or malformed                 */
    MEDRUN_DIFFERS = 4,         /* verification: something differs                             */
    MEDRUN_TOO_LONG = 5,        /* more tokens than the context holds                          */
    MEDRUN_NO_MEMORY = 6,
    MEDRUN_INTERRUPTED = 130,
};

typedef struct {
    int code;                   /* MEDRUN_OK, or that of the first failure                     */
    char text[512];             /* one line: what, where, found, wanted                        */
} medrun_error;

typedef struct medrun_model medrun_model;       /* read-only after medrun_open                 */
typedef struct medrun_session medrun_session;   /* one timeline of tokens                      */

/* ---- models -------------------------------------------------------------------------------- */

typedef struct {
    int threads;                /* at most; 0: as many as `medrun-lab doctor` says              */
    const char *kernels;        /* NULL: the best this machine has; else as doctor lists them  */
    bool load;                  /* copy the file into large pages of this process's own        */
} medrun_options;

/* A checkpoint carries its card's values: begin with medrun_info.sampling, and change fields. */
typedef struct {
    float temperature;          /* 0: greedy, the largest logit, the lowest id on a tie        */
    int top_k;                  /* 0: off                                                      */
    float top_p;                /* 1: off                                                      */
    float min_p;                /* 0: off                                                      */
    float repeat_penalty;       /* 1: off; on every token of the session, as transformers does */
    uint64_t seed;
} medrun_sampling;

enum { MEDRUN_MAX_STOPS = 8 };

typedef struct {
    const char *name, *architecture, *type;     /* type: "bf16", "int8" or "int4"              */
    const char *chat_template, *system;         /* its name, or "unknown"; default system text  */
    const char *kernels;                        /* the instruction set in use                  */
    const char *licence, *notice;               /* from the checkpoint, "" when it has none    */
    int vocab_size, hidden_size, n_layers, n_heads, n_kv_heads, head_dim, ffn_size;
    int max_positions;                          /* the longest context the model was made for  */
    int threads;
    int bos;                                    /* id, or -1                                   */
    int n_stops, stops[MEDRUN_MAX_STOPS];       /* ids that end an answer                      */
    uint64_t parameters, file_bytes, weight_bytes;
    medrun_sampling sampling;                   /* the card's                                  */
    uint8_t hash[32];                           /* SHA-256 of the header, names the checkpoint */
    const char *device;                         /* what medrun_attach did, or ""               */
    const char *device_log;                     /* a device's compiler when it failed, or ""   */
} medrun_info;

/* Maps PATH and checks all of it but the weights' hashes (`medrun verify` does that). OPTIONS may
 * be NULL. Errors: MEDRUN_BAD_FILE, _NO_MEMORY, _USAGE (unknown kernels), _FAILED. */
int medrun_open(medrun_model **out, const char *path, const medrun_options *options,
                medrun_error *error);
void medrun_close(medrun_model *model);                     /* NULL is fine                    */

/* Lets an OpenCL device do the matrix products of the first LAYERS layers (-1: all) and then those
 * of the logits, as far as its memory goes. DEVICE is a number or part of a name (`medrun-lab
 * doctor` lists them), or "auto", the first that is not a CPU. Each matrix must first give the
 * CPU's bits; if the device fails later, the CPU continues, and medrun_info.device says so. Call it
 * before any session starts; bf16 weights are strict then. Errors, after which MODEL is as it was:
 * MEDRUN_USAGE (no such device, or no OpenCL in this build), MEDRUN_NO_MEMORY. */
int medrun_attach(medrun_model *model, const char *device, int layers, medrun_error *error);

/* Fills INFO; the strings live until medrun_close or medrun_attach. Cannot fail. */
void medrun_describe(const medrun_model *model, medrun_info *info);
bool medrun_is_stop(const medrun_model *model, int32_t id);     /* does this id end an answer? */

/* ---- text and tokens ----------------------------------------------------------------------- */

enum {
    MEDRUN_ADD_BOS = 1,         /* put the beginning-of-text id first                          */
    MEDRUN_PARSE_SPECIAL = 2,   /* let "<|eot_id|>" become its id: never in what people typed  */
};

/* Text -> ids, as the model's reference tokenizer does it. Writes at most CAP ids, sets *N to the
 * number there are (cap 0 and ids NULL: only that). Invalid UTF-8 is kept byte for byte.
 * SentencePiece takes U+2581 for a space. Errors: MEDRUN_USAGE (other flags), MEDRUN_NO_MEMORY. */
int medrun_tokenize(const medrun_model *model, const char *text, size_t n_bytes, int flags,
                    int32_t *ids, size_t cap, size_t *n, medrun_error *error);

/* Ids -> the exact bytes. Control tokens give nothing unless SPECIAL. Writes at most CAP bytes, no
 * NUL, sets *N to the number there are. Errors: MEDRUN_USAGE (a wrong id), MEDRUN_NO_MEMORY. */
int medrun_detokenize(const medrun_model *model, const int32_t *ids, size_t n_ids, bool special,
                      char *bytes, size_t cap, size_t *n, medrun_error *error);

typedef struct {
    const char *role;           /* "system", "user", "assistant", "tool"; or, with text as the
                                   template writes it (apertus, llama3.1): "assistant/calls", the
                                   functions that it called, and "tool/json", what one gave    */
    const char *text;
    size_t n_bytes;
} medrun_message;

enum { MEDRUN_BOS_AUTO = 0, MEDRUN_BOS_ON, MEDRUN_BOS_OFF };

/* What a chat template may be told; all zero: what it does by itself. */
typedef struct {
    const char *date;           /* "YYYY-MM-DD"; NULL: today (apertus), a fixed day (llama3.1) */
    bool think;                 /* the model may deliberate first (apertus)                    */
    int bos;                    /* MEDRUN_BOS_AUTO: as the template has it; _ON, _OFF          */
    const char *tools;          /* NULL, or the finished text that the model sees of functions */
    size_t n_tools;             /* that it may call (apertus, llama3.1), and its bytes         */
} medrun_chat_options;

/* Messages -> ids, by the chat template NAME (NULL: the checkpoint's), with the opening of the
 * answer when ANSWER. Only the template makes control ids; the messages' text cannot. OPTIONS may
 * be NULL. tools/tool_calls.c makes such messages of JSON with functions, calls and results.
 * Errors: MEDRUN_USAGE (an unknown template; no messages; what the template has no place for),
 * MEDRUN_BAD_FILE (a tokenizer without the template's control tokens), MEDRUN_NO_MEMORY. */
int medrun_render(const medrun_model *model, const char *name,
                  const medrun_chat_options *options, const medrun_message *messages,
                  size_t n_messages, bool answer, int32_t *ids, size_t cap, size_t *n,
                  medrun_error *error);

/* ---- sessions ------------------------------------------------------------------------------ */

enum { MEDRUN_KV_F16 = 0, MEDRUN_KV_F32 = 1, MEDRUN_KV_INT8 = 2 };

typedef struct {
    int context;                /* tokens the session can hold; 0: the model's max_positions   */
    int batch;                  /* tokens in one pass, 0: 512; changes no logit                */
    int logit_rows;             /* rows of logits one pass can give, 0: 1                      */
    int lookup;                 /* medrun_next guesses so many tokens ahead, 0 to 31; same ids */
    int kv;                     /* the cache: MEDRUN_KV_F16, _F32, _INT8 (half of f16, rougher) */
    bool strict;                /* bf16 weights: fp32 arithmetic, the same bits on any machine */
    bool custom_sampling;       /* false: the checkpoint's values, with the seed below         */
    medrun_sampling sampling;
    medrun_chat_options chat;   /* for medrun_say; what pointers here name outlives the session */
    const medrun_model *draft;  /* NULL, or a small model of this vocabulary: up to 7 guesses  */
    const char *template_name;  /* NULL: the checkpoint's; else the one that you render with   */
} medrun_session_options;

/* The bytes medrun_start needs for these options; 0: out of range; SIZE_MAX: more than 32 bits. */
size_t medrun_session_bytes(const medrun_model *model, const medrun_session_options *options);

/* Starts a session. MEMORY is NULL (it maps its own) or medrun_session_bytes bytes or more, 64-byte
 * aligned and ZERO, the session's until medrun_stop. Errors: MEDRUN_USAGE, MEDRUN_NO_MEMORY. */
int medrun_start(medrun_session **out, const medrun_model *model,
                 const medrun_session_options *options, void *memory, size_t bytes,
                 medrun_error *error);
void medrun_stop(medrun_session *session);                  /* NULL is fine; model stays open  */

/* Appends all of the ids or none. Errors: MEDRUN_TOO_LONG, MEDRUN_USAGE (an id out of range). */
int medrun_feed(medrun_session *session, const int32_t *ids, size_t n, medrun_error *error);

/* Appends one turn by the checkpoint's template (BOS first on an empty timeline); after a "user"
 * turn the opening of the answer. For tools' results render and feed the whole conversation. Errors
 * leave the timeline as it was: as medrun_render and medrun_feed, MEDRUN_USAGE also for no role. */
int medrun_say(medrun_session *session, const char *role, const char *text, size_t n_bytes,
               medrun_error *error);

/* One pass over the weights: takes what is pending in the N sessions, in the order given, at most
 * `batch` tokens of the first, which leads. All are of one model, with equal kv and strict. Errors,
 * nothing taken: MEDRUN_USAGE, _INTERRUPTED, _FAILED (this thread rounds or flushes otherwise). */
int medrun_step(medrun_session *const *sessions, size_t n, medrun_error *error);

/* Any thread, signal handler, observer: ends the step SESSION leads or its next before a layer. */
void medrun_interrupt(medrun_session *session);

size_t medrun_pending(const medrun_session *session);       /* fed and not yet processed       */
size_t medrun_length(const medrun_session *session);        /* the whole timeline              */
const int32_t *medrun_tokens(const medrun_session *session);/* its ids; lives until medrun_stop */

/* vocab_size logits after the last token, valid until the next step; NULL while tokens are pending.
 * With logit_rows > 1, ROW 1 is the token before the last, ..., as far as the last pass reached. */
const float *medrun_logits(const medrun_session *session, size_t row);

/* Picks the next id from the logits by the session's sampling and random state; does not feed it.
 * Errors: MEDRUN_USAGE (tokens are pending). */
int medrun_sample(medrun_session *session, int32_t *id, medrun_error *error);

/* The loop most callers want: processes all that is pending, samples, feeds the id. *TEXT gets the
 * *N_BYTES bytes this id completes (never half a UTF-8 character, nor the space that SentencePiece
 * puts before an answer's first word; the session's, valid until the next call). *ID is a stop id
 * at the end of the answer, which is fed too so that the next turn follows it. With the option
 * `lookup` one pass may give several ids, of which each call returns one: the same as without it.
 * medrun_guesses says how many tokens were guessed so far, and how many of them came. Errors: those
 * of medrun_step; MEDRUN_TOO_LONG (the context is full). */
int medrun_next(medrun_session *session, int32_t *id, const char **text, size_t *n_bytes,
                medrun_error *error);
void medrun_guesses(const medrun_session *session, uint64_t *guessed, uint64_t *right);

/* Forgets all but the first N tokens of the timeline. Errors: MEDRUN_USAGE (n > length). */
int medrun_rewind(medrun_session *session, size_t n, medrun_error *error);

/* Writes the whole state to PATH (tokens, key-value cache, random state), readable by its owner
 * only; reads it back into a session of the same checkpoint, template, kv and strict (any context
 * that is long enough), with plain bf16 weights of the same kernels. It goes on with the same bits;
 * the last tokens, at most 16, are pending then. Sums find damage, not forgery: trust a file as you
 * trust a checkpoint. PATH may be new, empty or a saved session, no link or other file. A failed
 * save leaves what stood there, a failed restore an empty session. Errors: MEDRUN_USAGE (PATH),
 * _FAILED (writing), _BAD_FILE (of another model, cut, damaged), _TOO_LONG, _NO_MEMORY. */
int medrun_save(const medrun_session *session, const char *path, medrun_error *error);
int medrun_restore(medrun_session *session, const char *path, medrun_error *error);

/* Feeds IDS to a session, which forgets what it had, and takes from PATH, any file of medrun_save,
 * what was processed there of the tokens that both begin with, in blocks of 16: *TAKEN of them, 0
 * to N - 1, are no longer pending. Logits are those after medrun_feed. Reads no more than it takes,
 * and checks that. Errors, after which the session is empty: as medrun_feed and medrun_restore. */
int medrun_feed_saved(medrun_session *session, const int32_t *ids, size_t n, const char *path,
                      size_t *taken, medrun_error *error);

/* The observer sees each stage of each pass, on the thread that called medrun_step or medrun_next.
 * It may call medrun_interrupt, and nothing else of medrun: the pass is not over (a step gives it
 * MEDRUN_USAGE). DATA is ROWS x COLS floats, STRIDE floats between rows, valid during the call.
 * Stages in order: embed; attn_norm q k v attn_out attn_resid ffn_norm ffn_act layer_out of each
 * LAYER (q, k after the rotation); final_norm logits. LAYER is -1 outside the layers. COLS is
 * head_dim * n_heads for q and attn_out, head_dim * n_kv_heads for k and v, ffn_size for ffn_act,
 * vocab_size for logits, else hidden_size. Rows are the pass's tokens in order, row 0 at position
 * length - pending as they were before the pass; final_norm and logits have the last of them, as
 * many as logit_rows, in the pass that leaves nothing pending. While anybody looks, nothing is
 * guessed. NULL takes it away. No cost unobserved. */
typedef void medrun_observer(void *user, const char *stage, int layer, size_t rows, size_t cols,
                             size_t stride, const float *data);
void medrun_observe(medrun_session *session, medrun_observer *observer, void *user);

/* An editor is called likewise before the observer, but not for k and v, which are in the cache by
 * then. The pass goes on with what it writes into DATA; logits are what medrun_logits gives. */
typedef void medrun_editor(void *user, const char *stage, int layer, size_t rows, size_t cols,
                           size_t stride, float *data);
void medrun_edit(medrun_session *session, medrun_editor *editor, void *user);

#ifdef __cplusplus
}
#endif
#endif /* MEDRUN_H */
#endif /* MEDRUN_PASS */

#ifndef MEDRUN_API_ONLY
#ifndef MEDRUN_PASS
/* ============================================================================================
 * 2 Platform: the compiler's and the system's side of the file
 *
 * Makes the compiler keep the numbers as they are written, and gives the rest of the file one set
 * of calls for files, memory and the terminal, whatever the system. Only this section and the words
 * and processor features of section 6 know which machine this is. Uses nothing above it. Tests:
 * tests/04_threads.c (memory, processors, arithmetic), 32_windows.sh, 33_files.sh, 35_small.sh.
 * ============================================================================================ */

#if !defined __GNUC__
#error "medrun needs gcc or clang"
#endif
#if defined __FAST_MATH__ || __FINITE_MATH_ONLY__
#error "medrun cannot be built with -ffast-math or -Ofast: they change the numbers"
#endif

#include <fcntl.h>
#include <signal.h>
#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define NOGDI
#include <io.h>
#include <windows.h>
#include <aclapi.h>
#include <shellapi.h>
enum { SIGHUP = SIGBREAK, SIGQUIT = SIGBREAK };         /* the console was closed */
#undef O_RAW                    /* names that this file and its tools use themselves */
#undef TEXT
#undef far
#undef near
#else
#include <glob.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <termios.h>
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif
#endif
#include <ctype.h>
#include <errno.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* Which family of instruction sets section 6 compiles kernels for; which of them runs is chosen at
 * start, so that one program serves every machine. */
#if defined MEDRUN_SCALAR && !defined __i386__  /* asked for: plain C only, a quarter less code */
#elif defined __x86_64__ || defined __i386__
#define MEDRUN_X86 1
#if defined __clang__ || __GNUC__ >= 11         /* the assemblers beside older ones do not know */
#define MEDRUN_AVXVNNI 1                        /* {vex} vpdpbusd, which binutils has since 2.36 */
#endif
#include <cpuid.h>
#if defined __i386__ && !defined __SSE2_MATH__  /* x87 would round to other bits */
#ifdef __clang__
#error "clang: add -msse2"
#endif
#pragma GCC target("sse,fpmath=sse")            /* with sse2, headers would want a _Float16 that */
#include <immintrin.h>                          /* gcc has only where -msse2 was on the line */
#pragma GCC target("sse2")
#endif
#include <immintrin.h>
#elif defined __aarch64__
#define MEDRUN_ARM64 1
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif
#endif

/* The sums of section 6 say where they use fma, so the compiler must not make one of its own from a
 * product and a sum. What is set here is set back at the end of the file: a program that includes
 * medrun.c is compiled as if it did not. */
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#define UNROLL _Pragma("GCC unroll 16")
#endif
#pragma GCC diagnostic push
#if defined MEDRUN_NO_MAIN || defined MEDRUN_KERNELS_APART || defined MEDRUN_KERNELS_ONLY
#pragma GCC diagnostic ignored "-Wunused-function"
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline, unused))
#define MAYBE_UNUSED __attribute__((unused))
#define NEVER_INLINE static __attribute__((noinline))
#ifdef __MINGW_PRINTF_FORMAT
#define MEDRUN_PRINTF_LIKE(text, first) __attribute__((format(__MINGW_PRINTF_FORMAT, text, first)))
#else
#define MEDRUN_PRINTF_LIKE(text, first) __attribute__((format(printf, text, first)))
#endif

#if defined _WIN64 && defined MEDRUN_X86 && !defined __clang__
/* The stack of Win64 is aligned to 16 bytes, but gcc puts wider vectors there with moves that trap
 * unless the place is aligned to 32 or 64 (its bug 54412). So the assembler turns each such move
 * into the one that takes any place; where the data is aligned, that one is as fast. */
__asm__(".irp kind, ps, pd\n.macro vmova\\kind operands:vararg\n"
        "vmovu\\kind \\operands\n.endm\n.endr\n"
        ".irp kind, , 32, 64\n.macro vmovdqa\\kind operands:vararg\n"
        "vmovdqu\\kind \\operands\n.endm\n.endr");
#endif

/* ---- the system, in the words of POSIX ----------------------------------------------------- */

/* The calls that the rest of the file uses, and once more below for Windows. A call that fails
 * gives -1, NULL or false, and errno says why. Paths and texts are UTF-8. */

enum { MAX_THREADS = 256 };

typedef struct {
    uint64_t bytes, device, inode;  /* the last two tell files apart */
    bool regular, folder, stream;   /* STREAM: a pipe or a device like a terminal */
} file_facts;

/* What this process may have of the machine. */
typedef struct {
    double processors;          /* a control group's quota may pay for a part of one */
    double memory, available;   /* bytes: in all, and free or freed when they are wanted */
    bool of_group;              /* its control group has less memory than the machine */
} machine_limits;

/* TO_READ waits 5 s for a pipe's writer, the others not at all. Those behind TO_MAP follow no link,
 * which another user may have laid. TO_LOOK only looks. TO_WRITE and TO_CREATE want a new name, and
 * only its owner may read what TO_CREATE makes. TO_STREAM writes to a device, or to a pipe that
 * somebody reads. */
enum { TO_READ, TO_MAP, TO_LOOK, TO_WRITE, TO_CREATE, TO_STREAM };
typedef void signal_handler(int number);

/* CALL, again where a signal came between. */
#define RETRY(call) ({ int got; do got = (int)(call); while (got < 0 && errno == EINTR); got; })

#ifndef _WIN32
static int open_file(const char *path, int how) {
    static const int flags[] = {
        [TO_READ] = O_RDONLY | O_NONBLOCK, [TO_MAP] = O_RDONLY | O_NONBLOCK,
        [TO_LOOK] = O_RDONLY | O_NONBLOCK | O_NOFOLLOW,
        [TO_WRITE] = O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW,
        [TO_CREATE] = O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW,
        [TO_STREAM] = O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY,
    };
    int fd = RETRY(open(path, flags[how] | O_CLOEXEC, how == TO_WRITE ? 0666 : 0600));
    if (fd >= 0) fcntl(fd, F_SETFL, 0);     /* from now on it waits */
    if (fd >= 0 && how == TO_READ) poll(&(struct pollfd){fd, POLLIN, 0}, 1, 5000);
    return fd;
}

/* Of PATH or, where that is NULL, of the open FD. */
static int get_facts(const char *path, int fd, file_facts *f) {
    struct stat st;
    if (path ? stat(path, &st) : fstat(fd, &st)) return -1;
    *f = (file_facts){(uint64_t)st.st_size, (uint64_t)st.st_dev, (uint64_t)st.st_ino,
                      S_ISREG(st.st_mode), S_ISDIR(st.st_mode),
                      S_ISFIFO(st.st_mode) || S_ISCHR(st.st_mode)};
    return 0;
}

/* Takes the lock of a file, which ends with FD; false: another program has it. A disk that knows no
 * locks gives it to everyone. */
static bool lock_file(int fd) {
    return !RETRY(flock(fd, LOCK_EX | LOCK_NB)) || errno != EWOULDBLOCK;
}

static int rename_file(const char *from, const char *to) { return rename(from, to); }
static int remove_file(const char *path) { return unlink(path); }

/* Returns when what was written to FD is on the disk. */
static int sync_file(int fd) {
#ifdef F_FULLFSYNC
    if (!fcntl(fd, F_FULLFSYNC)) return 0;      /* on a Mac, fsync stops at the disk's own memory */
#endif
    return RETRY(fsync(fd));
}

/* N > 0 bytes of a file for reading; where FD is -1, zeroed memory. The system gives a page when it
 * is first touched: a long context costs nothing before it is used. */
static void *map_bytes(int fd, size_t n) {
    void *p = fd < 0 ? mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                     : mmap(NULL, n, PROT_READ, MAP_SHARED, fd, 0);
#ifdef MADV_DONTDUMP
    if (fd < 0 && p != MAP_FAILED) madvise(p, n, MADV_DONTDUMP);
#endif
    return p == MAP_FAILED ? NULL : p;
}

static void unmap_bytes(const void *p, size_t n) { munmap((void *)(uintptr_t)p, n); }
#define LOCK_HINT "; see ulimit -l"

/* Keeps the N bytes at P in memory and, where the system can (not on a Mac), all that the program
 * will have, prompts among it. */
static bool lock_bytes(const void *p, size_t n) {
    return !mlock(p, n) && (!mlockall(MCL_CURRENT | MCL_FUTURE) || errno == ENOSYS);
}

#ifdef __APPLE__
/* 0 where there is no such number. Some have 4 bytes, some 8. */
static uint64_t sysctl_number(const char *name) {
    uint64_t n = 0;
    size_t size = sizeof n;
    return sysctlbyname(name, &n, &size, NULL, 0) ? 0 : n;
}
#endif

/* Processors this process may run on, at most MAX_THREADS; without the slow ones of a Mac. */
static int processors(void) {
    long n = sysconf(_SC_NPROCESSORS_ONLN);
#ifdef CPU_COUNT
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set)) n = CPU_COUNT(&set);
#elif defined __APPLE__
    long fast = (long)sysctl_number("hw.perflevel0.logicalcpu");
    if (fast) n = fast;
#endif
    return n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : (int)n;
}

#ifndef __linux__
#define sched_getcpu() (-1)     /* they do not say on which processor a thread runs */
#endif

/* The number behind KEY in the file NAME of FOLDER, divided by a second; -1: there is none. */
static double read_limit(const char *folder, const char *name, const char *key) {
    char text[1280];
    double a, b = 1, limit = -1;
    snprintf(text, sizeof text, "%s/%s", folder, name);
    FILE *f = fopen(text, "r");
    while (f && limit < 0 && fgets(text, 256, f))
        if (!strncmp(text, key, strlen(key)) && sscanf(text + strlen(key), "%lf %lf", &a, &b) > 0)
            limit = b > 0 ? a / b : a;
    if (f) fclose(f);
    return limit;
}

/* Lowers *L to what the control group in FOLDER (of a container, a service, a job on a cluster)
 * has. Both versions of that file system are asked alike: what the other one's files would say is
 * no limit, and so is -1 in version 1 and the word max in version 2. The page cache counts as used
 * there, though it is freed when memory is wanted. */
static void lower_limits(const char *folder, machine_limits *l) {
    static const char *const most[] = {"memory.max", "memory.high", "memory.limit_in_bytes"};
    static const char *const cached[] = {"total_inactive_file ", "total_active_file "};
    double v1 = read_limit(folder, "cpu.cfs_quota_us", "") /
                fabs(read_limit(folder, "cpu.cfs_period_us", ""));
    double quota = fmax(v1, read_limit(folder, "cpu.max", ""));
    double used = fmax(read_limit(folder, "memory.current", ""),
                       read_limit(folder, "memory.usage_in_bytes", ""));
    if (quota > 0) l->processors = fmin(l->processors, quota);
    for (int i = 0; i < 2; i++)                         /* version 2 writes them without total_ */
        used -= fmax(0, fmax(read_limit(folder, "memory.stat", cached[i]),
                             read_limit(folder, "memory.stat", cached[i] + 6)));
    for (int i = 0; i < 3; i++) {
        double limit = read_limit(folder, most[i], "");
        if (limit < 0) continue;
        l->memory = fmin(l->memory, limit);
        l->available = fmin(l->available, fmax(0, limit - fmax(0, used)));
    }
}

/* What the machine has, lowered to what the control groups of this process leave it, from its own
 * upwards: each has limits. A line of /proc/self/cgroup is ID:CONTROLLERS:PATH, and version 2 names
 * no controllers. */
static machine_limits limits_of_machine(void) {
    char line[1024], folder[2048];
    double memory = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    double free_now = 1024 * read_limit("/proc", "meminfo", "MemAvailable:");
    machine_limits l = {processors(), memory, free_now < 0 ? memory : free_now, false};
    FILE *f = fopen("/proc/self/cgroup", "r");
    while (f && fgets(line, sizeof line, f)) {
        char *kinds = strchr(line, ':'), *path = kinds ? strchr(kinds + 1, ':') : NULL;
        if (!path) continue;
        *path++ = 0;
        snprintf(folder, sizeof folder, "/sys/fs/cgroup/%s%s", kinds + 1, path);
        char *root = folder + strlen("/sys/fs/cgroup/") + strlen(kinds + 1);
        for (char *end = folder + strcspn(folder, "\n"); end; end = strrchr(root, '/')) {
            *end = 0;
            lower_limits(folder, &l);
        }
    }
    if (f) fclose(f);
    l.of_group = l.memory < memory;
    l.available = fmin(l.available, l.memory);
    return l;
}

/* HANDLER gets the next signal NUMBER and no other: a second Ctrl-C ends the program, whatever the
 * first one does. But if whoever started us had it ignored, as nohup does, it stays so. Gives the
 * handler before. */
static signal_handler *on_signal(int number, signal_handler *handler) {
    struct sigaction before = {.sa_handler = SIG_DFL},
                     now = {.sa_handler = handler, .sa_flags = (int)SA_RESETHAND};
    sigaction(number, NULL, &before);
    if (before.sa_handler != SIG_IGN) sigaction(number, &now, NULL);
    return before.sa_handler;
}

/* HANDLER is called where a page of a mapped file cannot be read any more: the file was cut. Also
 * where several threads find that at once. */
static void on_lost_page(signal_handler *handler) { signal(SIGBUS, handler); }
static void suspend_program(void) { raise(SIGTSTP); }
static bool is_terminal(int fd) { return isatty(fd); }

/* May a terminal of type TERM ($TERM) be drawn on by way of stderr? */
static bool terminal_draws(const char *term) {
    return isatty(STDERR_FILENO) && term && strcmp(term, "dumb");
}

/* 0 where nobody knows. */
static int terminal_columns(void) {
    struct winsize size;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) ? 0 : size.ws_col;
}

static struct termios cooked_terminal;
static volatile sig_atomic_t terminal_is_raw;

/* RAW: the keys of stdin come one by one and as they are, Ctrl-C too, and what is pasted between
 * marks: without these a pasted line end could not be told from Enter. Else as before that. A
 * signal handler may call it, so it has no stdio: it sets the terminal back when the program is
 * ended. */
static bool set_raw(bool raw) {
    if (raw ? tcgetattr(STDIN_FILENO, &cooked_terminal) : !terminal_is_raw) return false;
    struct termios t = cooked_terminal;
    if (raw) cfmakeraw(&t);
    t.c_oflag = cooked_terminal.c_oflag;        /* what is printed looks as before */
    terminal_is_raw = true;                     /* for a signal that comes now */
    bool done = !tcsetattr(STDIN_FILENO, TCSADRAIN, &t);
    terminal_is_raw = raw && done;
    return done && write(STDERR_FILENO, raw ? "\x1b[?2004h" : "\x1b[?2004l", 8) > 0;
}

/* The next byte of what is typed, or EOF; whether there is more. Not by stdio, whose buffer would
 * hide from the second what waits. */
static int typed_byte(void) {
    uint8_t byte;
    return RETRY(read(STDIN_FILENO, &byte, 1)) == 1 ? byte : EOF;
}

static bool more_is_typed(void) {
    int waiting = 0;
    return !ioctl(STDIN_FILENO, FIONREAD, &waiting) && waiting > 0;
}

/* The *N paths that PATTERN means, in order, folders with / at the end; until the next call. */
static char **find_paths(const char *pattern, size_t *n) {
    static glob_t found;
    globfree(&found);
    *n = glob(pattern, GLOB_MARK, NULL, &found) ? 0 : found.gl_pathc;
    return found.gl_pathv;
}

/* What a program does first; gives its COUNT arguments in UTF-8, NULL if it cannot run. To write to
 * a pipe that nobody reads, or past the limit of a file's size, must be an error, not the end. */
static char **start_program(int *count, char **arguments) {
    (void)count;
    for (int fd = 0; fd < 3; fd++)      /* no file that is opened may become stdout by chance */
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd ? O_RDONLY : O_WRONLY) != fd)
            return NULL;
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_CORE, &(struct rlimit){0});        /* a core dump would keep people's words */
    return arguments;
}
#else
/* ---- the same in the words of Windows ------------------------------------------------------ */

/* Windows has calls of its own in UTF-16 beside those of C. Only they take every path and every
 * character, so they open, name and map files; C reads and writes them. */

/* Sets errno from the error of Windows, so that messages read as elsewhere. Gives -1. */
static int windows_failed(void) {
    switch (GetLastError()) {
        case ERROR_FILE_NOT_FOUND: case ERROR_PATH_NOT_FOUND: case ERROR_INVALID_NAME:
        case ERROR_BAD_PATHNAME: errno = ENOENT; break;
        case ERROR_ACCESS_DENIED: case ERROR_SHARING_VIOLATION: case ERROR_WRITE_PROTECT:
        case ERROR_USER_MAPPED_FILE: errno = EACCES; break;
        case ERROR_FILE_EXISTS: case ERROR_ALREADY_EXISTS: errno = EEXIST; break;
        case ERROR_DISK_FULL: case ERROR_HANDLE_DISK_FULL: errno = ENOSPC; break;
        case ERROR_NOT_ENOUGH_MEMORY: case ERROR_COMMITMENT_LIMIT:
        case ERROR_WORKING_SET_QUOTA: errno = ENOMEM; break;
        default: errno = EIO;
    }
    return -1;
}

enum { WIDE_PATH = 4096 + 8 };

/* PATH from its root, where \\?\ before a drive's letter takes away the limit of 260; or NULL. */
static wchar_t *wide_path(const char *path, wchar_t room[WIDE_PATH]) {
    wchar_t short_path[WIDE_PATH], *full = room + 4;
    DWORD most = WIDE_PATH - 4, n = 0;
    if (MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, short_path, WIDE_PATH))
        n = GetFullPathNameW(short_path, most, full, NULL);
    if (!n || n >= most) return errno = n ? ENAMETOOLONG : ENOENT, NULL;
    if (full[1] != ':') return full;
    memcpy(room, L"\\\\?\\", 4 * sizeof *room);
    return room;
}

/* All rights for who runs this, none for others, and none that the folder would pass on
 * (PROTECTED). The caller frees the list. */
static bool make_private(SECURITY_DESCRIPTOR *d, ACL **list) {
    char me[] = "CURRENT_USER";
    EXPLICIT_ACCESSA all = {FILE_ALL_ACCESS, SET_ACCESS, NO_INHERITANCE,
                            {.TrusteeForm = TRUSTEE_IS_NAME, .ptstrName = me}};
    return !SetEntriesInAclA(1, &all, NULL, list) &&
           InitializeSecurityDescriptor(d, SECURITY_DESCRIPTOR_REVISION) &&
           SetSecurityDescriptorDacl(d, TRUE, *list, FALSE) &&
           SetSecurityDescriptorControl(d, SE_DACL_PROTECTED, SE_DACL_PROTECTED);
}

/* Opens folders, too (BACKUP_SEMANTICS), so that messages can say what they are. Files may be
 * renamed and removed while they are open, as elsewhere. TO_WRITE is private too, for umask does
 * nothing here; TO_LOOK follows a link, as only administrators make them. */
static int open_file(const char *path, int how) {
    bool is_new = how == TO_WRITE || how == TO_CREATE;
    DWORD access = is_new ? GENERIC_READ | GENERIC_WRITE : GENERIC_READ;
    DWORD share = FILE_SHARE_READ | FILE_SHARE_DELETE | FILE_SHARE_WRITE;
    wchar_t room[WIDE_PATH], *name = wide_path(path, room);
    SECURITY_DESCRIPTOR owner_only;
    SECURITY_ATTRIBUTES who = {sizeof who, is_new ? &owner_only : NULL, FALSE};
    ACL *list = NULL;
    if (!name) return -1;
    if (is_new && !make_private(&owner_only, &list)) return windows_failed();
    HANDLE h = CreateFileW(name, access, share, &who, is_new ? CREATE_NEW : OPEN_EXISTING,
                           FILE_FLAG_BACKUP_SEMANTICS, NULL);
    int fd = h == INVALID_HANDLE_VALUE ? windows_failed() : _open_osfhandle((intptr_t)h, _O_BINARY);
    LocalFree(list);
    return fd;
}

/* No path is a stream here: a pipe or a console is reached as an open file only. */
static int get_facts(const char *path, int fd, file_facts *f) {
    BY_HANDLE_FILE_INFORMATION i = {0};
    if (path && (fd = open_file(path, TO_READ)) < 0) return -1;
    HANDLE h = (HANDLE)_get_osfhandle(fd);
    bool disk = GetFileType(h) == FILE_TYPE_DISK && GetFileInformationByHandle(h, &i);
    bool folder = i.dwFileAttributes & FILE_ATTRIBUTE_DIRECTORY;
    *f = (file_facts){(uint64_t)i.nFileSizeHigh << 32 | i.nFileSizeLow, i.dwVolumeSerialNumber,
                      (uint64_t)i.nFileIndexHigh << 32 | i.nFileIndexLow, disk && !folder, folder,
                      false};
    if (path) close(fd);
    return 0;
}

/* Of a byte far behind the end of the file, which nobody else wants. */
static bool lock_file(int fd) { return LockFile((HANDLE)_get_osfhandle(fd), 0, 1 << 30, 1, 0); }

static int rename_file(const char *from, const char *to) {
    wchar_t rooms[2][WIDE_PATH];
    const wchar_t *a = wide_path(from, rooms[0]), *b = wide_path(to, rooms[1]);
    if (!a || !b) return -1;
    bool done = MoveFileExW(a, b, MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH);
    return done ? 0 : windows_failed();
}

static int remove_file(const char *path) {
    wchar_t room[WIDE_PATH];
    const wchar_t *name = wide_path(path, room);
    return !name ? -1 : DeleteFileW(name) ? 0 : windows_failed();
}

static int sync_file(int fd) { return _commit(fd); }

/* Memory is a view of the paging file, all zero, where the handle names no file. */
static void *map_bytes(int fd, size_t n) {
    HANDLE file = fd < 0 ? INVALID_HANDLE_VALUE : (HANDLE)_get_osfhandle(fd);
    HANDLE h = CreateFileMappingW(file, NULL, fd < 0 ? PAGE_READWRITE : PAGE_READONLY,
                                  (DWORD)((uint64_t)n >> 32), (DWORD)n, NULL);
    void *p = h ? MapViewOfFile(h, fd < 0 ? FILE_MAP_WRITE : FILE_MAP_READ, 0, 0, n) : NULL;
    if (!p) windows_failed();
    if (h) CloseHandle(h);                      /* the view keeps what it needs */
    return p;
}

static void unmap_bytes(const void *p, size_t n) { (void)n, UnmapViewOfFile(p); }

/* What is locked counts as part of the working set, which must have room for it and the rest. */
static bool lock_bytes(const void *p, size_t n) {
    bool done = SetProcessWorkingSetSize(GetCurrentProcess(), n + (16 << 20), n + (64 << 20)) &&
                VirtualLock((void *)(uintptr_t)p, n);
    return done || windows_failed() == 0;
}
#define LOCK_HINT ""

/* Of this process's group of at most 64. */
static int processors(void) {
    DWORD_PTR mine = 0, all;
    GetProcessAffinityMask(GetCurrentProcess(), &mine, &all);
    return mine ? __builtin_popcountll(mine) : 1;
}

#define sched_getcpu() ((int)GetCurrentProcessorNumber())

/* Memory is free where a process may have it, too: the paging file counts. */
static machine_limits limits_of_machine(void) {
    MEMORYSTATUSEX m = {.dwLength = sizeof m};
    GlobalMemoryStatusEx(&m);
    return (machine_limits){processors(), (double)m.ullTotalPhys,
                            fmin((double)m.ullAvailPhys, (double)m.ullAvailPageFile), false};
}

static signal_handler *on_signal(int number, signal_handler *handler) {
    return signal(number, handler);             /* which forgets the handler when it is called */
}

/* Windows sends no signal for it but an exception, which nothing else in the program handles. */
static signal_handler *lost_page_handler;

static LONG WINAPI filter_lost_page(EXCEPTION_POINTERS *p) {
    if (p->ExceptionRecord->ExceptionCode == EXCEPTION_IN_PAGE_ERROR) lost_page_handler(0);
    return EXCEPTION_CONTINUE_SEARCH;
}

static void on_lost_page(signal_handler *handler) {
    lost_page_handler = handler;
    SetUnhandledExceptionFilter(filter_lost_page);
}

/* NULL where FD is a file, a pipe or the device NUL, which C's isatty takes for a terminal. */
static HANDLE console(int fd) {
    DWORD mode;
    HANDLE h = (HANDLE)_get_osfhandle(fd);
    return GetConsoleMode(h, &mode) ? h : NULL;
}

static bool is_terminal(int fd) { return console(fd); }

/* A console obeys escape sequences only once it was asked to. */
static bool terminal_draws(const char *term) {
    DWORD mode = 0;
    HANDLE h = term && !strcmp(term, "dumb") ? NULL : console(2);
    return h && GetConsoleMode(h, &mode) &&
           SetConsoleMode(h, mode | ENABLE_VIRTUAL_TERMINAL_PROCESSING);
}

/* The console edits lines itself, with a history and all, so nothing here reads single keys. */
static int terminal_columns(void) { return 0; }
static bool set_raw(bool raw) { return (void)raw, false; }
static bool more_is_typed(void) { return false; }
#define localtime_r(when, t) localtime_s(t, when)

static char **find_paths(const char *pattern, size_t *n) { return (void)pattern, *n = 0, NULL; }
static void suspend_program(void) {}

/* A console gives UTF-16, a line at a time; Ctrl-Z at the start of a line ends the input. */
static int typed_byte(void) {
    static struct { char bytes[256]; int n, at; } typed;
    wchar_t wide[64];
    DWORD n = 0, more = 0;
    if (typed.at == typed.n) {
        fflush(NULL);
        if (!ReadConsoleW(console(0), wide, 63, &n, NULL) || !n || wide[0] == 26) return EOF;
        if (IS_HIGH_SURROGATE(wide[n - 1])) ReadConsoleW(console(0), wide + n, 1, &more, NULL);
        typed.n = WideCharToMultiByte(CP_UTF8, 0, wide, (int)(n + more), typed.bytes,
                                      sizeof typed.bytes, NULL, NULL);
        typed.at = 0;
    }
    return typed.at < typed.n ? (uint8_t)typed.bytes[typed.at++] : EOF;
}

static char *utf8_of(const wchar_t *wide) {
    int n = WideCharToMultiByte(CP_UTF8, 0, wide, -1, NULL, 0, NULL, NULL);
    char *text = malloc((size_t)n + 1);
    if (text) WideCharToMultiByte(CP_UTF8, 0, wide, -1, text, n, NULL, NULL);
    return text;
}

/* The code page is the console's, which stays when the program ends. */
static UINT other_code_page;
static void restore_code_page(void) { SetConsoleOutputCP(other_code_page); }

/* Arguments, and variables of our names, from UTF-16: it has what the code page lacks. */
static char **start_program(int *count, char **arguments) {
    wchar_t **wide = CommandLineToArgvW(GetCommandLineW(), count);
    arguments = wide ? calloc((size_t)*count + 1, sizeof *arguments) : NULL;
    for (int i = 0; arguments && i < *count; i++)
        if (!(arguments[i] = utf8_of(wide[i]))) return NULL;
    LocalFree(wide);
    wchar_t *all = GetEnvironmentStringsW();
    for (wchar_t *p = all; p && *p; p += wcslen(p) + 1) {
        char *text = wcsncmp(p, L"MEDRUN_", 7) ? NULL : utf8_of(p);
        if (text) _putenv(text);
        free(text);
    }
    FreeEnvironmentStringsW(all);
    for (int fd = 0; fd < 3; fd++) _setmode(fd, _O_BINARY);
    setvbuf(stdout, NULL, _IOFBF, 1 << 14);     /* else a character goes to the console by bytes */
    setvbuf(stderr, NULL, _IOFBF, 1 << 14);
    other_code_page = GetConsoleOutputCP();
    if (other_code_page && SetConsoleOutputCP(CP_UTF8)) atexit(restore_code_page);
    return arguments;
}

/* The C library's fmaf rounds twice. A product of floats is exact in double; a sum rounded to odd
 * there still knows, when it is rounded to float, what it lost (Boldo and Melquiond, 2008). */
static float exact_fmaf(float a, float b, float c) {
    double p = (double)a * b, s = p + c, more = s - p, lost = (p - (s - more)) + (c - more);
    uint64_t bits;
    memcpy(&bits, &s, 8);
    if ((lost > 0 || lost < 0) && !(bits & 1)) bits += (lost > 0) == (s > 0) ? 1u : UINT64_MAX;
    memcpy(&s, &bits, 8);
    return (float)s;
}
#define fmaf exact_fmaf

/* Which the C library lacks. */
static void *memmem(const void *in, size_t n, const void *what, size_t k) {
    for (const char *p = in; n >= k; p++, n--)
        if (!memcmp(p, what, k)) return (void *)(uintptr_t)p;
    return NULL;
}
#endif /* _WIN32 */

/* ---- on all systems ------------------------------------------------------------------------ */

/* Bytes of a core's second cache, 0 where the machine does not say; at most 4 MiB, for a larger one
 * is shared by several cores. Intel's processors answer AMD's question, too, so no operating system
 * is asked. */
static size_t second_cache(void) {
    uint64_t n = 0;
#ifdef MEDRUN_X86
    unsigned a, b, c, d;
    if (__get_cpuid(0x80000006, &a, &b, &c, &d)) n = (uint64_t)(c >> 16) << 10;
#elif defined __APPLE__
    n = sysctl_number("hw.l2cachesize");
#endif
    return n < 64 << 10 ? 0 : n > 4 << 20 ? 4 << 20 : (size_t)n;
}

/* The cores that this process may use, by what FOLDER says of their hardware threads: each counts
 * under its first. MAX_THREADS: nobody knows, or each has only one. */
static int cores_of(const char *folder) {
#ifdef CPU_COUNT
    cpu_set_t mine, cores;
    char name[64];
    CPU_ZERO(&cores);
    if (read_limit(folder, "smt/active", "") != 0 && !sched_getaffinity(0, sizeof mine, &mine))
        for (size_t i = 0; i < CPU_SETSIZE; i++) {
            snprintf(name, sizeof name, "cpu%zu/topology/thread_siblings_list", i);
            double first = CPU_ISSET(i, &mine) ? read_limit(folder, name, "") : -2;
            if (first > -2) CPU_SET(first < 0 ? i : (size_t)first, &cores);
        }
    if (CPU_COUNT(&cores)) return CPU_COUNT(&cores);
#endif
    return (void)folder, MAX_THREADS;
}

/* The open file that PATH stands for: - or, as a shell names it, /dev/stdout or /dev/fd/N. -1: none
 * of these. */
static int named_file(const char *path) {
    int fd, n = 0;
    if (!strcmp(path, "-") || !strcmp(path, "/dev/stdout")) return STDOUT_FILENO;
    return sscanf(path, "/dev/fd/%d%n", &fd, &n) == 1 && !path[n] ? fd : -1;
}

/* As open_file, for C's own calls. Where there is no memory for them, a new file goes again. */
static FILE *open_stream(const char *path, int how) {
    int named = how == TO_STREAM ? named_file(path) : -1;
    int fd = named >= 0 ? dup(named) : open_file(path, how);
    FILE *f = fd < 0 ? NULL : fdopen(fd, how <= TO_LOOK ? "rb" : "wb");
    if (fd >= 0 && !f) close(fd);
    if (fd >= 0 && !f && (how == TO_WRITE || how == TO_CREATE)) remove_file(path);
    return f;
}

/* Is the file at PATH the one of which F tells? */
static bool same_file(const char *path, const file_facts *f) {
    file_facts there;
    return !get_facts(path, -1, &there) && there.device == f->device && there.inode == f->inode;
}

/* Since some start; never steps back, as the time of day does when it is set. */
static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Asks for pages of 2 MB. A processor keeps few addresses of pages at hand: weights in small ones
 * are read at three quarters of the speed. What is in memory already stays as it is. */
static void want_large_pages(const void *p, size_t n) {
#ifdef MADV_HUGEPAGE
    madvise((void *)(uintptr_t)p, n, MADV_HUGEPAGE);
#else
    (void)p, (void)n;
#endif
}

/* A seed of its own for each run. It has to differ, not to be a secret. */
static uint64_t random_bits(void) {
    uint64_t now = (uint64_t)(seconds() * 1e9) ^ (uint64_t)time(NULL) << 32;
    uint64_t bits = (now ^ (uint64_t)getpid() << 40) * 0x9E3779B97F4A7C15u;
    return bits ^ bits >> 32;
}
/* ============================================================================================
 * 3 Basics: UTF-8, errors, memory, bytes, SHA-256, JSON
 *
 * What everything below stands on. All of it treats its input as hostile: lengths are checked
 * before they are used, products before they are formed. Tests: tests/03_basics.c.
 * ============================================================================================ */

/* ---- UTF-8 (RFC 3629) ---------------------------------------------------------------------- */

/* Decodes one character at P, N > 0 bytes: its length 1..4, or 0 if no valid character starts
 * there (overlong forms, surrogates and values past U+10FFFF are not valid). */
static size_t utf8_decode(const uint8_t *p, size_t n, uint32_t *code) {
    if (p[0] < 0x80) return *code = p[0], 1;
    size_t len = p[0] >= 0xF0 ? 4 : p[0] >= 0xE0 ? 3 : 2;
    if (p[0] < 0xC2 || p[0] > 0xF4 || len > n) return 0;
    uint32_t c = p[0] & (0xFFu >> (len + 1));
    for (size_t i = 1; i < len; i++) {
        if ((p[i] & 0xC0) != 0x80) return 0;
        c = c << 6 | (p[i] & 0x3F);
    }
    bool overlong = (len == 3 && c < 0x800) || (len == 4 && c < 0x10000);
    if (overlong || (c >= 0xD800 && c < 0xE000) || c > 0x10FFFF) return 0;
    return *code = c, len;
}

/* Writes CODE's bytes, returns their number 1..4. */
static size_t utf8_encode(uint32_t code, uint8_t out[4]) {
    if (code < 0x80) return out[0] = (uint8_t)code, 1;
    size_t len = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t i = len; --i; code >>= 6) out[i] = (uint8_t)(0x80 | (code & 0x3F));
    out[0] = (uint8_t)((0xF00 >> len) | code);
    return len;
}

/* How many of the N bytes of TEXT come before the first that is not UTF-8; N: all are. */
static size_t utf8_valid(const void *text, size_t n) {
    uint32_t code;
    size_t at = 0;
    for (size_t len = 1; at < n && len; at += len)
        len = utf8_decode((const uint8_t *)text + at, n - at, &code);
    return at;
}

/* How many bytes at the end of a stream are the valid beginning of a character whose rest has not
 * come yet: 0..3. What is printed stops before them. They are such a beginning if some rest makes a
 * valid character of them; which bytes may follow depends on the first one, but the lowest or the
 * highest that ever can is always among them. */
static size_t utf8_unfinished(const uint8_t *p, size_t n) {
    for (size_t back = 1; back <= 3 && back <= n; back++)
        for (int rest = 0x80; rest <= 0xBF; rest += 0xBF - 0x80) {
            uint8_t tried[4];
            uint32_t code;
            memset(tried, rest, sizeof tried);
            memcpy(tried, p + n - back, back);
            if (utf8_decode(tried, sizeof tried, &code) > back) return back;
        }
    return 0;
}

/* Characters that could drive a terminal, or show text in another order than it has. */
static bool is_hostile(uint32_t c) {
    return c < 32 || (c >= 0x7F && c < 0xA0) || c == 0x200E || c == 0x200F ||
           (c >= 0x202A && c <= 0x202E) || (c >= 0x2066 && c <= 0x2069);
}

/* ---- errors -------------------------------------------------------------------------------- */

/* A message may hold a hostile name, which must not break the line or drive the terminal; and it
 * may have been cut inside a character. What is hostile or no UTF-8 becomes '?'. */
static void make_safe(char *text) {
    char *out = text;
    for (size_t n = strlen(text), len; n; text += len, n -= len) {
        uint32_t code = 0;
        len = utf8_decode((const uint8_t *)text, n, &code);
        bool keep = len && !is_hostile(code);
        if (!len) len = 1;
        if (keep) memmove(out, text, len);
        else *out = '?';
        out += keep ? len : 1;
    }
    *out = 0;
}

/* Records the first failure and returns CODE, so that a check is one line:
 * if (n > max) return fail(e, MEDRUN_BAD_FILE, "...", n, max); */
MEDRUN_PRINTF_LIKE(3, 4)
static int fail(medrun_error *e, int code, const char *format, ...) {
    if (!e || e->code) return code;
    va_list args;
    va_start(args, format);
    vsnprintf(e->text, sizeof e->text, format, args);
    va_end(args);
    make_safe(e->text);
    return e->code = code;
}

/* As fail, of a file at PATH that is not as it must be. */
#define bad_file(e, path, format, ...) fail(e, MEDRUN_BAD_FILE, "%s: " format, path, ##__VA_ARGS__)

static int errno_code(int code) { return errno == ENOMEM ? MEDRUN_NO_MEMORY : code; }

/* As fail, of a call of the system, which could not do WHAT and left the reason in errno. */
static int cannot(medrun_error *e, int code, const char *path, const char *what) {
    return fail(e, errno_code(code), "%s: cannot %s: %s", path, what, strerror(errno));
}

/* It has a code of its own, as the way out differs from that of all other failures. */
static int out_of_memory(medrun_error *e, size_t bytes) {
    return fail(e, MEDRUN_NO_MEMORY, "out of memory: %zu bytes were not to be had", bytes);
}

/* ---- memory -------------------------------------------------------------------------------- */

/* The tests define MEDRUN_ALLOC to make the n-th allocation fail. */
#ifndef MEDRUN_ALLOC
#define MEDRUN_ALLOC realloc
#endif

/* Sizes that a file names are multiplied only after this. */
static bool mul_overflows(size_t a, size_t b) { return b && a > SIZE_MAX / b; }

/* N zeroed items of SIZE bytes, or NULL; an empty request still gives a pointer. */
static void *new_array(size_t n, size_t size) {
    if (mul_overflows(n, size)) return NULL;
    size_t bytes = n && size ? n * size : 1;
    void *p = MEDRUN_ALLOC(NULL, bytes);
    return p ? memset(p, 0, bytes) : NULL;
}

/* Bytes that grow. A failed growth sets `failed` and drops what follows, so that a writer checks
 * once, at the end. Always NUL-terminated while not empty. */
typedef struct {
    uint8_t *data;
    size_t n, cap;
    bool failed;
} buffer;

/* Makes room for MORE bytes and a NUL. Doubling keeps the cost of many small additions small. */
static bool buffer_room(buffer *b, size_t more) {
    if (b->failed || more > SIZE_MAX / 4 - b->n) return b->failed = true, false;
    if (b->n + more + 1 <= b->cap) return true;
    size_t cap = b->cap < 64 ? 64 : b->cap;
    while (cap < b->n + more + 1) cap *= 2;
    uint8_t *p = MEDRUN_ALLOC(b->data, cap);
    if (!p) return b->failed = true, false;
    return b->data = p, b->cap = cap, true;
}

/* Where N is 0, BYTES may be NULL, and an empty buffer stays without memory. */
static void buffer_add(buffer *b, const void *bytes, size_t n) {
    if (!n || !buffer_room(b, n)) return;
    memcpy(b->data + b->n, bytes, n);
    b->n += n;
    b->data[b->n] = 0;
}

static void buffer_text(buffer *b, const char *text) { buffer_add(b, text, strlen(text)); }

/* Prints twice: first only to learn how long it gets. */
MEDRUN_PRINTF_LIKE(2, 3)
static void buffer_printf(buffer *b, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (n < 0) b->failed = true;
    if (n <= 0 || !buffer_room(b, (size_t)n)) return;
    va_start(args, format);
    vsnprintf((char *)b->data + b->n, (size_t)n + 1, format, args);
    va_end(args);
    b->n += (size_t)n;
}

static void buffer_free(buffer *b) {
    free(b->data);
    *b = (buffer){0};
}

/* ---- a heap -------------------------------------------------------------------------------- */

/* A binary heap of keys: none is smaller than its parent, the one at half its index. */
static void heap_sink(uint64_t *heap, size_t n, size_t i) {
    uint64_t key = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= key) break;
        heap[i] = heap[child];
    }
    heap[i] = key;
}

/* HEAP must have room for one more than *N keys. */
static void heap_push(uint64_t *heap, size_t *n, uint64_t key) {
    size_t i = (*n)++;
    for (; i && heap[(i - 1) / 2] > key; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = key;
}

/* Takes the smallest key away. */
static uint64_t heap_pop(uint64_t *heap, size_t *n) {
    uint64_t top = heap[0];
    heap[0] = heap[--*n];
    if (*n) heap_sink(heap, *n, 0);
    return top;
}

/* ---- SHA-256 (FIPS 180-4) ------------------------------------------------------------------ */

typedef struct {
    uint32_t h[8];
    uint64_t n;                 /* bytes so far */
    uint8_t block[64];
} sha256;

/* Works one block of 64 bytes into the state H. K are the first bits of the cube roots of the first
 * 64 primes: numbers that nobody can have chosen for a purpose of their own. */
static void sha256_block(uint32_t h[8], const uint8_t *p) {
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
        0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
        0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
        0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
        0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
        0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
        0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
        0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
        0xc67178f2};
#define ROTR(x, r) ((x) >> (r) | (x) << (32 - (r)))
    uint32_t w[64];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 |
               (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + w[i - 7] +
               (ROTR(w[i - 15], 7) ^ ROTR(w[i - 15], 18) ^ w[i - 15] >> 3) +
               (ROTR(w[i - 2], 17) ^ ROTR(w[i - 2], 19) ^ w[i - 2] >> 10);
    uint32_t a = h[0], b = h[1], c = h[2], d = h[3], e = h[4], f = h[5], g = h[6], last = h[7];
    for (int i = 0; i < 64; i++) {              /* variables, not an array: twice as fast        */
        uint32_t t1 = last + (ROTR(e, 6) ^ ROTR(e, 11) ^ ROTR(e, 25)) + ((e & f) ^ (~e & g)) +
                      k[i] + w[i];
        uint32_t t2 = (ROTR(a, 2) ^ ROTR(a, 13) ^ ROTR(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        last = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e, h[5] += f, h[6] += g, h[7] += last;
#undef ROTR
}

static const sha256 sha256_start = {.h = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                          0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}};

/* Whole blocks go through `block`, too: copying them takes a hundredth of the time of hashing. */
static void sha256_add(sha256 *s, const void *bytes, size_t n) {
    const uint8_t *p = bytes;
    for (size_t take; n; p += take, n -= take) {
        size_t have = s->n % 64;
        take = n < 64 - have ? n : 64 - have;
        memcpy(s->block + have, p, take);
        s->n += take;
        if (have + take == 64) sha256_block(s->h, s->block);
    }
}

/* The padding: a bit 1, zeros, and the number of bits in the last 8 bytes of a block. */
static void sha256_done(sha256 *s, uint8_t digest[32]) {
    uint64_t bits = s->n * 8;
    sha256_add(s, "\x80", 1);
    while (s->n % 64 != 56) sha256_add(s, "", 1);
    for (int i = 56; i >= 0; i -= 8) sha256_add(s, &(uint8_t){(uint8_t)(bits >> i)}, 1);
    for (int i = 0; i < 32; i++) digest[i] = (uint8_t)(s->h[i / 4] >> (24 - 8 * (i % 4)));
}

static void sha256_of(const void *bytes, size_t n, uint8_t digest[32]) {
    sha256 s = sha256_start;
    sha256_add(&s, bytes, n);
    sha256_done(&s, digest);
}

/* In small letters, as sha256sum writes it. */
static void hex_of(const uint8_t digest[32], char hex[65]) {
    for (int i = 0; i < 32; i++) snprintf(hex + 2 * i, 3, "%02x", (unsigned)digest[i]);
}

/* The number that N hex digits at TEXT stand for, large or small; -1: they are not N. */
static int hex_number(const void *text, int n) {
    const uint8_t *p = text;
    int v = 0;
    for (; n--; p++) {
        if (!isxdigit(*p)) return -1;
        v = 16 * v + (*p <= '9' ? *p - '0' : (*p | 0x20) - 'a' + 10);
    }
    return v;
}

/* Back from hex_of; false where TEXT is not 64 hex digits. */
static bool parse_hex(const char *text, uint8_t digest[32]) {
    for (int i = 0; i < 32; i++, text += 2) {
        int byte = hex_number(text, 2);
        if (byte < 0) return false;
        digest[i] = (uint8_t)byte;
    }
    return !*text;
}

/* ---- JSON (RFC 8259) ----------------------------------------------------------------------- */

/* A parsed text is an array of nodes in the order of the text; a container's children follow it.
 * Children of node v: for (c = v + 1, i = 0; i < count(v); i++, c = next(c)); in an object keys
 * and values alternate and `count` counts both. Strings stay in the text until asked for. */
typedef enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY,
               JSON_OBJECT } json_type;

typedef struct {
    uint32_t start, end;        /* bytes of the text; a string's without its quotes            */
    uint32_t next;              /* the node after this value and all inside it                 */
    uint32_t count : 29, type : 3;
} json_node;

typedef struct {
    const char *text;
    json_node *nodes;
    size_t n, cap;
} json;

enum { JSON_MAX_DEPTH = 64, JSON_NONE = 0xFFFFFFFF };

typedef struct {
    json *j;
    const uint8_t *p;
    size_t n, at;
    medrun_error *e;
} json_parser;

/* A refusal names the place, as the text may be one line of megabytes. */
static int json_wrong(json_parser *s, const char *what) {
    return fail(s->e, MEDRUN_BAD_FILE, "JSON: %s at byte %zu", what, s->at);
}

/* The next byte that is not a space, 0 at the end. It is not taken. */
static uint8_t json_peek(json_parser *s) {
    while (s->at < s->n && memchr(" \t\r\n", s->p[s->at], 4)) s->at++;
    return s->at < s->n ? s->p[s->at] : 0;
}

/* Takes the next byte if it is one of SET. */
static bool json_take(json_parser *s, const char *set) {
    bool good = s->at < s->n && s->p[s->at] && strchr(set, s->p[s->at]);
    s->at += good;
    return good;
}

/* Appends a node that starts here; JSON_NONE when memory ends. */
static uint32_t json_add(json_parser *s, json_type type) {
    json *j = s->j;
    if (j->n == j->cap) {
        size_t cap = j->cap ? j->cap * 2 : 64;
        json_node *nodes = cap < (1u << 28) ? MEDRUN_ALLOC(j->nodes, cap * sizeof *nodes) : NULL;
        if (!nodes) return out_of_memory(s->e, cap * sizeof *nodes), JSON_NONE;
        j->nodes = nodes, j->cap = cap;
    }
    j->nodes[j->n] = (json_node){(uint32_t)s->at, (uint32_t)s->at, (uint32_t)j->n + 1, 0, type};
    return (uint32_t)j->n++;
}

/* Takes what stands at *AT in a string, a character or an escape, to OUT and returns the number of
 * bytes there; 0 and *WHY where JSON knows no such thing. Two \u that are a surrogate pair are one
 * character, a lone one is U+FFFD. */
static size_t json_decode(const uint8_t **at, const uint8_t *end, uint8_t out[4],
                          const char **why) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const uint8_t *p = *at;
    size_t left = (size_t)(end - p), len;
    uint32_t code;
    *why = *p < 0x20 ? "control character in a string" : "invalid UTF-8";
    if (*p != '\\') {
        len = *p < 0x20 ? 0 : utf8_decode(p, left, &code);
        memcpy(out, p, len);
        return *at += len, len;
    }
    const char *short_form = left > 1 && p[1] ? strchr(from, p[1]) : NULL;
    if (short_form) return out[0] = (uint8_t)to[short_form - from], *at += 2, 1;
    if (left < 2 || p[1] != 'u') return *why = "unknown escape", 0;
    int high = left < 6 ? -1 : hex_number(p + 2, 4), low = 0;
    if (high < 0) return *why = "\\u without four hex digits", 0;
    code = (uint32_t)high;
    if (code >= 0xD800 && code < 0xDC00 && left >= 12 && p[6] == '\\' && p[7] == 'u')
        low = hex_number(p + 8, 4);
    bool pair = low >= 0xDC00 && low < 0xE000;
    if (pair) code = 0x10000 + ((code - 0xD800) << 10) + ((uint32_t)low - 0xDC00);
    *at += pair ? 12 : 6;
    return utf8_encode(code >= 0xD800 && code < 0xE000 ? 0xFFFD : code, out);
}

/* Checks each character, so that whoever decodes the string later need not. */
static int json_string_node(json_parser *s) {
    const uint8_t *p = s->p + ++s->at, *end = s->p + s->n;
    uint32_t v = json_add(s, JSON_STRING);
    uint8_t bytes[4];
    const char *why = "unfinished string";
    if (v == JSON_NONE) return MEDRUN_NO_MEMORY;
    while (p < end && *p != '"' && json_decode(&p, end, bytes, &why)) s->at = (size_t)(p - s->p);
    if (p == end) return json_wrong(s, "unfinished string");
    if (*p != '"') return json_wrong(s, why);
    s->j->nodes[v].end = (uint32_t)s->at++;
    return MEDRUN_OK;
}

/* Takes digits, returns how many there were. */
static size_t json_digits(json_parser *s) {
    size_t from = s->at;
    while (json_take(s, "0123456789")) continue;
    return s->at - from;
}

/* null, false, true, or a number by JSON's grammar, which is stricter than strtod's. */
static int json_scalar_node(json_parser *s) {
    static const char *const words[] = {"null", "false", "true"};
    for (int t = JSON_NULL; t <= JSON_TRUE; t++) {
        size_t len = strlen(words[t]);
        if (s->n - s->at < len || memcmp(s->p + s->at, words[t], len)) continue;
        if (json_add(s, (json_type)t) == JSON_NONE) return MEDRUN_NO_MEMORY;
        return s->at += len, MEDRUN_OK;
    }
    uint32_t v = json_add(s, JSON_NUMBER);
    if (v == JSON_NONE) return MEDRUN_NO_MEMORY;
    json_take(s, "-");
    size_t first = s->at, whole = json_digits(s);
    if (!whole) return json_wrong(s, "unexpected character");
    if (whole > 1 && s->p[first] == '0') return json_wrong(s, "number with a leading zero");
    if (json_take(s, ".") && !json_digits(s))
        return json_wrong(s, "number without digits after the point");
    if (json_take(s, "eE")) {
        json_take(s, "+-");
        if (!json_digits(s)) return json_wrong(s, "number without digits in the exponent");
    }
    s->j->nodes[v].end = (uint32_t)s->at;
    return MEDRUN_OK;
}

/* Reads one value of any type, with all that is inside it, by recursive descent: a container's
 * items are values, too. DEPTH is the number of containers around the value. It is bounded, so that
 * a hostile text cannot use up the stack. An object's keys are at the even places. */
static int json_value(json_parser *s, int depth) {
    uint8_t c = json_peek(s);
    if (c != '{' && c != '[') return c == '"' ? json_string_node(s) : json_scalar_node(s);
    if (depth == JSON_MAX_DEPTH) return json_wrong(s, "nested too deeply");
    bool object = c == '{';
    uint8_t end = object ? '}' : ']';
    uint32_t count = 0, v = json_add(s, object ? JSON_OBJECT : JSON_ARRAY);
    if (v == JSON_NONE) return MEDRUN_NO_MEMORY;
    s->at++;
    for (bool more = json_peek(s) != end; more; count++) {
        bool key = object && count % 2 == 0;
        if (key && json_peek(s) != '"') return json_wrong(s, "a key must be a string");
        int code = json_value(s, depth + 1);
        if (code) return code;
        c = json_peek(s);
        if (key && c != ':') return json_wrong(s, "expected ':'");
        if (!key && c != ',' && c != end) return json_wrong(s, "expected ',' or the end");
        more = c != end;
        if (!more) continue;
        s->at++;
        c = json_peek(s);
        if (c == ']' || c == '}') return json_wrong(s, "a value is missing");
    }
    json_node *node = &s->j->nodes[v];          /* only now: the nodes may have moved            */
    s->at++;
    node->end = (uint32_t)s->at;
    node->next = (uint32_t)s->j->n;
    node->count = count & 0x1FFFFFFF;           /* there are fewer nodes than 2^28               */
    return MEDRUN_OK;
}

/* Parses TEXT, which must outlive J. Node 0 is the value. Free with json_free, also on failure. */
static int json_parse(json *j, const char *text, size_t n, medrun_error *e) {
    *j = (json){text, NULL, 0, 0};
    json_parser s = {j, (const uint8_t *)text, n, 0, e};
    if (n >= 0xFFFFFFF0) return fail(e, MEDRUN_BAD_FILE, "JSON: %zu bytes is too long", n);
    int code = json_value(&s, 0);
    if (code) return code;
    json_peek(&s);
    return s.at == n ? MEDRUN_OK : json_wrong(&s, "text after the end");
}

/* The text is the caller's. */
static void json_free(json *j) {
    free(j->nodes);
    *j = (json){0};
}

static json_type json_typeof(const json *j, uint32_t v) { return (json_type)j->nodes[v].type; }

/* Is V there and of this type? */
static bool json_is_type(const json *j, uint32_t v, json_type type) {
    return v != JSON_NONE && json_typeof(j, v) == type;
}

/* Appends a string's characters to OUT. */
static void json_unescape(const json *j, uint32_t v, buffer *out) {
    const uint8_t *p = (const uint8_t *)j->text + j->nodes[v].start;
    const uint8_t *end = (const uint8_t *)j->text + j->nodes[v].end;
    const char *why;
    for (uint8_t bytes[4]; p < end;) buffer_add(out, bytes, json_decode(&p, end, bytes, &why));
}

/* Is node V the string TEXT? It takes no memory: its lack would look like a missing key. */
static bool json_is(const json *j, uint32_t v, const char *text) {
    if (!json_is_type(j, v, JSON_STRING)) return false;
    const uint8_t *p = (const uint8_t *)j->text + j->nodes[v].start;
    const uint8_t *end = (const uint8_t *)j->text + j->nodes[v].end;
    const char *why;
    for (uint8_t bytes[4] = {0}; p < end;) {
        size_t n = json_decode(&p, end, bytes, &why);
        if (!bytes[0] || strncmp(text, (const char *)bytes, n)) return false;
        text += n;
    }
    return !*text;
}

/* The value of KEY in object V, or JSON_NONE (also when V is none or no object). */
static uint32_t json_get(const json *j, uint32_t v, const char *key) {
    if (!json_is_type(j, v, JSON_OBJECT)) return JSON_NONE;
    uint32_t c = v + 1;
    for (uint32_t i = 0; i < j->nodes[v].count; i += 2) {
        if (json_is(j, c, key)) return c + 1;
        c = j->nodes[c + 1].next;
    }
    return JSON_NONE;
}

/* A number node as a double, correctly rounded. strtod reads a point as the locale has it, so it
 * gets "digits e exponent" without one. 800 digits and a mark that more follow decide every
 * rounding. */
static double json_number(const json *j, uint32_t v) {
    enum { MOST = 800 };
    const char *p = j->text + j->nodes[v].start, *end = j->text + j->nodes[v].end;
    char text[MOST + 32];
    size_t n = 0;
    long long scale = 0, exponent = 0;
    bool minus = p < end && *p == '-', point = false, more = false;
    for (p += minus; p < end && (*p | 0x20) != 'e'; p++) {
        if (*p == '.') { point = true; continue; }
        scale -= point;
        if (!n && *p == '0') continue;
        if (n < MOST) text[n++] = *p;
        else scale++, more |= *p != '0';
    }
    if (p < end) {
        bool down = *++p == '-';
        for (p += *p == '-' || *p == '+'; p < end && exponent < 100000000000; p++)
            exponent = exponent * 10 + (*p - '0');
        scale += down ? -exponent : exponent;
    }
    if (more) text[n++] = '1', scale--;
    scale = scale < -99999 ? -99999 : scale > 99999 ? 99999 : scale;
    snprintf(text + n, sizeof text - n, "e%lld", scale);        /* no digits: strtod gives 0      */
    double value = strtod(text, NULL);
    return minus ? -value : value;
}

/* Field readers: field KEY of object V with its type and range checked; WHAT names the file in the
 * message. After a failure, their own or an earlier one, they give 0 or "": so a caller reads all
 * fields one below the other and looks at E once. */
static uint32_t json_field(const json *j, uint32_t v, const char *what, const char *key, int type,
                           const char *wanted, medrun_error *e) {
    uint32_t f = json_get(j, v, key);
    if (!json_is_type(j, f, (json_type)type))
        bad_file(e, what, "field %s: found %s, wanted %s", key,
                 f == JSON_NONE ? "nothing" : "another type", wanted);
    return f;
}

/* A whole number may be written as 3, 3.0 or 3e0: JSON knows one kind of number. */
static double json_real(const json *j, uint32_t v, const char *what, const char *key, double min,
                        double max, bool whole, medrun_error *e) {
    const char *wanted = whole ? "a whole number" : "a number";
    uint32_t f = json_field(j, v, what, key, JSON_NUMBER, wanted, e);
    if (e->code) return 0;
    double d = json_number(j, f);
    if (d >= min && d <= max && (!whole || floor(d) >= d)) return d;
    int digits = whole ? 17 : 6;
    bad_file(e, what, "field %s: found %.17g, wanted %s%.*g to %.*g", key, d,
             whole ? "a whole number from " : "", digits, min, digits, max);
    return 0;
}

static int64_t json_int(const json *j, uint32_t v, const char *what, const char *key, int64_t min,
                        int64_t max, medrun_error *e) {
    return (int64_t)json_real(j, v, what, key, (double)min, (double)max, true, e);
}

/* Copies a string into OUT[CAP] with a NUL; refuses a longer one or one with a NUL. */
static int json_text(const json *j, uint32_t v, const char *what, const char *key, char *out,
                     size_t cap, medrun_error *e) {
    buffer b = {0};
    uint32_t f = json_field(j, v, what, key, JSON_STRING, "a string", e);
    out[0] = 0;
    if (e->code) return e->code;
    json_unescape(j, f, &b);
    if (b.failed) out_of_memory(e, cap);
    else if (b.n >= cap || (b.n && memchr(b.data, 0, b.n)))
        bad_file(e, what, "field %s: found a string that does not fit %zu bytes", key, cap - 1);
    else if (b.n) memcpy(out, b.data, b.n + 1);
    return buffer_free(&b), e->code;
}

/* What a person typed: a decimal number and nothing else. */
MAYBE_UNUSED static bool parse_number(const char *text, double *out) {
    char *end;
    if (!*text || text[strspn(text, "+-.0123456789eE")]) return false;
    *out = strtod(text, &end);
    return !*end && fabs(*out) <= DBL_MAX;
}

/* Levenshtein's distance, to guess what was meant; a long B is cut. */
static size_t edit_distance(const char *a, const char *b) {
    size_t row[40], nb = strlen(b) < 39 ? strlen(b) : 39;
    for (size_t k = 0; k <= nb; k++) row[k] = k;
    for (; *a; a++) {
        size_t corner = row[0]++;
        for (size_t k = 0; k < nb; k++) {
            size_t best = corner + (*a != b[k]);
            corner = row[k + 1];
            if (corner + 1 < best) best = corner + 1;
            row[k + 1] = row[k] + 1 < best ? row[k] + 1 : best;
        }
    }
    return row[nb];
}
/* ============================================================================================
 * 4 Threads: one pool
 *
 * Every loop that is worth sharing goes through parallel_for, which cuts its items into ranges for
 * the threads of a pool to take. A result never depends on the number of threads: an item (a panel
 * of 16 output rows, a block of keys) is computed whole by one thread, in the same order whoever
 * that is, and written to a place of its own. So threads race for work, but never for memory.
 * Tests: tests/04_threads.c, also built with -fsanitize=thread.
 * ============================================================================================ */

/* Work on items [begin, end); THREAD (0 .. threads-1) names scratch that no one else uses. */
typedef void task_fn(void *context, size_t begin, size_t end, int thread);

typedef struct {
    struct thread_pool *pool;
    int index;                              /* 1 .. threads-1 */
    pthread_t id;
} worker;

/* Threads that may wait: do they sleep, yes or no (some systems exchange no byte)? */
typedef struct {
    atomic_int asleep;
    pthread_cond_t bell;                    /* wakes them */
} sleeper;

/* A job is one call of parallel_for: N items in pieces of GRAIN. LEFT holds which job it is (upper
 * 32 bits) and how many of its pieces nobody has taken. The caller writes the plain fields before
 * it sets LEFT. A thread that took a piece may read them until it reports the piece in FINISHED. */
typedef struct thread_pool {
    int threads;                        /* with the caller, who is thread 0 */
    worker workers[MAX_THREADS];
    int started;
    pthread_mutex_t turn;               /* held by the session whose step runs */
    pthread_mutex_t lock;               /* for sleeping and waking only */
    sleeper idle, caller;               /* workers, and the thread in parallel_for */
    _Alignas(8) _Atomic uint64_t left;  /* on i386, too */
    atomic_size_t finished;             /* pieces */
    atomic_int quit;
    task_fn *task;
    void *context;
    size_t n, grain, pieces;
    atomic_int caller_runs_on;          /* which processor; -1: nobody knows */
    atomic_int crowded;                 /* a worker was woken on that one */
    double alone_until, rest;           /* seconds: how long the caller works alone */
} thread_pool;

/* Takes pieces until none is left, reports them and gives how many. One number is the whole
 * schedule: a thread on a slow or busy core takes fewer pieces, and one that the system does not
 * let run takes none, so nobody waits for it. Who was interrupted before it took a piece finds
 * another job in LEFT. */
static size_t take_pieces(thread_pool *pool, int thread) {
    size_t taken = 0;
    uint64_t left = atomic_load_explicit(&pool->left, memory_order_acquire);
    while ((uint32_t)left) {
        if (!atomic_compare_exchange_weak(&pool->left, &left, left - 1)) continue;
        size_t begin = (pool->pieces - (uint32_t)left) * pool->grain;
        size_t end = pool->n - begin < pool->grain ? pool->n : begin + pool->grain;
        pool->task(pool->context, begin, end, thread);
        taken++;
        left = atomic_load_explicit(&pool->left, memory_order_acquire);
    }
    if (taken) atomic_fetch_add(&pool->finished, taken);
    return taken;
}

/* ---- waiting ------------------------------------------------------------------------------- */

/* How often a thread that waits looks again before it sleeps: 20 microseconds in all on a Xeon of
 * 2023. The next of a pass's hundreds of jobs mostly comes sooner, and waking costs as much. */
enum { SPINS = 2000 };

static bool is_work(thread_pool *pool) {
    return (uint32_t)atomic_load(&pool->left) || atomic_load(&pool->quit);
}

static bool is_done(thread_pool *pool) { return atomic_load(&pool->finished) == pool->pieces; }

/* First spins, then sleeps, because nobody wants a fan to run while a person types. No thread can
 * miss what it waits for and sleep on: it says that it sleeps before it looks for the last time,
 * and the one that makes it READY does so before it looks who sleeps. Both do it by an exchange:
 * qemu lets a mere store pass a later load. A worker that the system woke on the caller's own
 * processor would spin in its place, so it sleeps at once. */
static void wait_until(thread_pool *pool, bool ready(thread_pool *), sleeper *me) {
    bool beside = false;
    for (int i = 0; i < SPINS && !beside; i++) {
        if (ready(pool)) return;
        if (me == &pool->idle && i % 64 == 0) {
            int here = sched_getcpu();
            beside = here >= 0 && here == atomic_load(&pool->caller_runs_on);
        }
#ifdef MEDRUN_X86
        _mm_pause();                        /* leaves more to the core's other hardware thread */
#endif
    }
    if (beside) atomic_store(&pool->crowded, true);
    pthread_mutex_lock(&pool->lock);
    while (atomic_exchange(&me->asleep, true), !ready(pool))
        pthread_cond_wait(&me->bell, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
}

/* Wakes those that sleep, once: until one of them runs, the next calls wake nobody. */
static void wake(thread_pool *pool, sleeper *them) {
    if (!atomic_load(&them->asleep)) return;
    pthread_mutex_lock(&pool->lock);
    atomic_store(&them->asleep, false);
    pthread_cond_broadcast(&them->bell);
    pthread_mutex_unlock(&pool->lock);
}

static void *worker_main(void *context) {
    const worker *w = context;
    while (wait_until(w->pool, is_work, &w->pool->idle), !atomic_load(&w->pool->quit))
        if (take_pieces(w->pool, w->index)) wake(w->pool, &w->pool->caller);
    return NULL;
}

/* ---- jobs ---------------------------------------------------------------------------------- */

/* On a busy machine workers can cost more than they do: the system stops one for milliseconds in
 * the middle of a piece, or wakes it on the caller's processor. Then the caller works alone for a
 * TIME in seconds, twice as long as before where the last such time has just ended. Little is lost,
 * for a single thread may already read weights as fast as memory gives them. */
static void rest_workers(thread_pool *pool, double time, double now) {
    pool->rest = fmin(1, now - pool->alone_until < pool->rest ? 2 * pool->rest : time);
    pool->alone_until = now + pool->rest;
}

/* Runs TASK over N items, GRAIN at a time, on all threads, and returns when all are done. One
 * caller at a time, who holds `turn`; a task must not call parallel_for itself. */
static void parallel_for(thread_pool *pool, size_t n, size_t grain, task_fn *task, void *context) {
    if (!n) return;
    if (grain < 1) grain = 1;
    bool small = !pool->started || n <= grain;
    double start = small ? 0 : seconds();
    if (!small && atomic_exchange(&pool->crowded, false)) rest_workers(pool, 1e-3, start);
    if (small || start < pool->alone_until) {
        task(context, 0, n, 0);
        return;
    }
    pool->task = task, pool->context = context;
    pool->n = n, pool->grain = grain;
    pool->pieces = (n - 1) / grain + 1;
    atomic_store(&pool->caller_runs_on, sched_getcpu());
    atomic_store(&pool->finished, 0);
    uint64_t job = (atomic_load(&pool->left) >> 32) + 1;
    atomic_exchange(&pool->left, job << 32 | pool->pieces);
    wake(pool, &pool->idle);
    size_t mine = take_pieces(pool, 0);
    double end = seconds(), piece = (end - start) / (double)(mine ? mine : 1);
    wait_until(pool, is_done, &pool->caller);
    /* A worker that runs ends its last piece within the time of one. A longer wait tells that the
     * system stopped it: what others have to do on this machine comes first. */
    double now = seconds(), waited = now - end;
    if (waited > 5e-4 && waited > 4 * piece) rest_workers(pool, 4 * waited, now);
}

static void pool_stop(thread_pool *pool) {
    atomic_exchange(&pool->quit, true);
    wake(pool, &pool->idle);
    for (int i = 0; i < pool->started; i++) pthread_join(pool->workers[i].id, NULL);
    pthread_mutex_destroy(&pool->turn);
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->idle.bell);
    pthread_cond_destroy(&pool->caller.bell);
    pool->started = pool->threads = 0;
}

/* The usual 8 MiB a thread would use up the address space of a process that may have only little
 * (ulimit -v). Big arrays lie in a session's scratch, not on the stack. */
enum { THREAD_STACK = 512 << 10 };

/* The pool must not move afterwards, for workers point to it. */
static int pool_start(thread_pool *pool, int threads, medrun_error *e) {
    memset(pool, 0, sizeof *pool);
    if (threads < 1 || threads > MAX_THREADS)
        return fail(e, MEDRUN_USAGE, "threads: found %d, wanted 1 to %d", threads, MAX_THREADS);
    pthread_mutexattr_t checked;                /* a second lock by one thread is an error, not */
    pthread_mutexattr_init(&checked);           /* a deadlock */
    pthread_mutexattr_settype(&checked, PTHREAD_MUTEX_ERRORCHECK);
    pthread_mutex_init(&pool->turn, &checked);
    pthread_mutexattr_destroy(&checked);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->idle.bell, NULL);
    pthread_cond_init(&pool->caller.bell, NULL);
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, THREAD_STACK);
    pool->threads = threads;
    atomic_store(&pool->caller_runs_on, -1);
    for (; pool->started + 1 < pool->threads; pool->started++) {
        worker *w = &pool->workers[pool->started];
        *w = (worker){.pool = pool, .index = pool->started + 1};
        if (pthread_create(&w->id, &small, worker_main, w)) break;
    }
    pthread_attr_destroy(&small);
    if (pool->started + 1 == pool->threads) return MEDRUN_OK;
    fail(e, MEDRUN_NO_MEMORY, "cannot start thread %d of %d", pool->started + 2, pool->threads);
    return pool_stop(pool), MEDRUN_NO_MEMORY;
}
/* ============================================================================================
 * 5 Numbers: bf16, f16, int8, int4, and how weights lie in memory
 *
 * A weight matrix (rows = outputs, cols = inputs K) is stored in panels of 16 rows: lane r of a
 * panel is row 16p + r, and K is walked in steps of 64 bytes, 4 bytes a row. So one 64-byte load
 * holds the next few weights of 16 outputs, a lane adds up one output in the order of K, and no
 * sum ever crosses lanes. The bytes in the file are the bytes of the computation; tools/store.c
 * writes them.
 *
 *   bf16  a step is 2 consecutive k.  K is padded to 2 with zeros.
 *   int8  a step is 4 consecutive k, stored as q + 128 (1..255), w = q * scale. A group is 64 k of
 *         one row: 16 steps and one bf16 scale. K is padded to 64. Two groups share a line of 64
 *         bytes for their 2 x 16 scales, which stands before them, so that every step is aligned.
 *   int4  a step is 8 consecutive k, two in a byte: k 0..3 in the low nibbles, k 4..7 in the high
 *         ones. A nibble q stands for one of 16 levels that lie closer near zero, moved by a shift
 *         of the group: w = scale * (level[q] + shift). A group is 32 k of one row: 4 steps and 16
 *         bits, of which the upper ten are the upper ten of an f16, scale = that * 2^-13, and the
 *         lower six are shift + 32. Two groups share a line as in int8, and K is padded to 64. That
 *         is 4.5 bits a weight. The scale may be negative: the levels reach further below zero.
 *
 * In int8 each whole 64 columns of a row are turned (turn_group) before they are stored, and so is
 * what they are multiplied by. No product changes: turning is orthogonal. But a number far larger
 * than its neighbours, which makes the steps of all of them coarse, is spread over them. int4 is
 * not turned: what a column is multiplied by says how exact it must be, turning makes all alike.
 *
 * Tests: tests/05_numbers.c.
 * ============================================================================================ */

enum { TYPE_F32, TYPE_BF16, TYPE_INT8, TYPE_INT4, N_TYPES };
enum { LANES = 16, GROUP = 64, STEP_BYTES = 64, GROUP_BYTES = GROUP / 4 * STEP_BYTES };
enum { GROUP4 = 32, GROUP4_BYTES = GROUP4 / 8 * STEP_BYTES };

MAYBE_UNUSED static const char *const type_names[N_TYPES] = {"f32", "bf16", "int8", "int4"};

/* The embedding and the output matrix of an int4 checkpoint are int8: they are a small share of the
 * bytes that a token reads, and errors there are felt most. */
static int rows_type(int type) { return type == TYPE_INT4 ? TYPE_INT8 : type; }
static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

static float bits_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static uint32_t float_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

/* A float's bits as a whole number that falls where the float rises, and back. */
static uint32_t fall_bits(uint32_t bits) { return bits >> 31 ? bits : 0x7FFFFFFF - bits; }

static float bf16_to_f32(uint16_t h) { return bits_float((uint32_t)h << 16); }

/* To the nearest, ties to even; a NaN stays a NaN. */
static uint16_t f32_to_bf16(float f) {
    uint32_t bits = float_bits(f);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* The smallest bf16 that is not below F >= 0: a scale rounded so that no value clips. */
static uint16_t f32_to_bf16_up(float f) { return (uint16_t)((float_bits(f) + 0xFFFF) >> 16); }

static float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7FFF;
    if (rest >= 0x7C00) return bits_float(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    if (rest >= 0x400) return bits_float(sign | ((rest << 13) + 0x38000000));
    float f = (float)rest * 0x1p-24f;                   /* a subnormal half is a normal float    */
    return bits_float(sign | float_bits(f));
}

/* To the nearest, ties to even, as the processors' instruction does. */
static uint16_t f32_to_f16(float f) {
    uint32_t bits = float_bits(f), sign = bits >> 16 & 0x8000, a = bits & 0x7FFFFFFF;
    if (a > 0x7F800000) return (uint16_t)(sign | 0x7E00 | (a >> 13 & 0x3FF));
    if (a >= 0x477FF000) return (uint16_t)(sign | 0x7C00);              /* rounds past 65504     */
    if (a < 0x38800000)                                 /* subnormal: add so that the sum's last */
        return (uint16_t)(sign | (float_bits(bits_float(a) + 0.5f) - 0x3F000000));  /* bit fits  */
    return (uint16_t)(sign | ((a - 0x38000000 + 0xFFF + (a >> 13 & 1)) >> 13));
}

/* The nearest whole number, ties to even, |f| < 2^22: at 1.5 * 2^23 a float's last bit is 1. */
static int32_t round_even(float f) {
    return (int32_t)(float_bits(f + 0x1.8p23f) - float_bits(0x1.8p23f));
}

/* ---- double precision functions without libm: the same bits on every machine ---------------- */

/* ln x for normal x > 0: x = m 2^k with m near 1, then 2 atanh((m - 1) / (m + 1)). */
static double ln_exact(double x) {
    int k;
    double m = frexp(x, &k);
    if (m < 0.70710678118654752) m *= 2, k--;
    double s = (m - 1) / (m + 1), s2 = s * s, sum = 0;
    for (int i = 23; i >= 1; i -= 2) sum = sum * s2 + 1.0 / i;
    return 2 * s * sum + k * 0.69314718055994531;
}

/* e^x for |x| < 700. */
static double exp_exact(double x) {
    double n = floor(x * 1.4426950408889634 + 0.5);
    double r = x - n * 0.69314718036912382 - n * 1.9082149292705877e-10, sum = 1;
    for (int i = 17; i >= 1; i--) sum = 1 + sum * r / i;
    return ldexp(sum, (int)n);
}

/* sin and cos of |x| < 2^24: x = n pi/2 + r, then Taylor series of |r| <= pi/4. */
static void sin_cos(double x, double *sine, double *cosine) {
    double n = floor(x * 0.63661977236758134 + 0.5);
    double r = x - n * 1.5707963267341256;              /* pi/2 in three parts of 33 bits        */
    r = r - n * 6.0771005063039660e-11 - n * 2.0222662487959506e-21;
    double r2 = r * r, s = 0, c = 0;
    for (int i = 17; i >= 3; i -= 2) s = (1 - s) * r2 / (i * (i - 1));
    for (int i = 18; i >= 2; i -= 2) c = (1 - c) * r2 / (i * (i - 1));
    s = r * (1 - s), c = 1 - c;
    const double quarter[4] = {s, c, -s, -c};
    *sine = quarter[(int64_t)n & 3], *cosine = quarter[((int64_t)n + 1) & 3];
}

/* ---- panels -------------------------------------------------------------------------------- */

/* A Walsh-Hadamard transform: sums and differences of the halves of X, then of their halves, and so
 * on. Its factor, which is exact, makes it its own inverse. Fewer than 64 stay as they are. */
static void turn_group(float *x, size_t n) {
    for (size_t i = 0; i < n && n == GROUP; i++) x[i] *= 0.125f;
    for (size_t half = GROUP / 2; half && n == GROUP; half /= 2)
        for (size_t first = 0; first < GROUP; first += 2 * half)
            for (float *a = x + first, *b = a + half; a < x + first + half; a++, b++) {
                float sum = *a + *b;
                *b = *a - *b, *a = sum;
            }
}

/* An int8 group has 64 columns, an int4 group 32; two of them share a line for their scales. */
static size_t group_cols(int type) { return type == TYPE_INT4 ? GROUP4 : GROUP; }
static size_t group_bytes(int type) { return type == TYPE_INT4 ? GROUP4_BYTES : GROUP_BYTES; }

/* Where group G of an int8 or int4 panel has its 16 scales (of int4 with shifts), and its steps. */
static size_t group_scales(int type, size_t g) {
    return g / 2 * (STEP_BYTES + 2 * group_bytes(type)) + g % 2 * (STEP_BYTES / 2);
}
static size_t group_steps(int type, size_t g) {
    return group_scales(type, g - g % 2) + STEP_BYTES + g % 2 * group_bytes(type);
}

/* The levels of int4, plus 96: found by Lloyd's method (1982) on groups of 32 normal, Laplace and
 * Student numbers, each with the scale and shift that suit it best. */
static const uint8_t int4_levels[16] = {0,  24, 39,  51,  62,  72,  81,  90,
                                        98, 106, 115, 123, 132, 143, 156, 172};
enum { INT4_ZERO = 96, SHIFT_ZERO = 32, SHIFT_MASK = 63 };
enum { INT4_LARGEST = 512 };            /* no larger weight is sure to have a scale              */

/* The scale in 16 bits of an int4 group, times 2^13. */
static float int4_scale(uint16_t bits) { return f16_to_f32(bits & (0xFFFF - SHIFT_MASK)); }

/* Bytes of one panel of 16 rows. */
static size_t panel_bytes(int type, size_t cols) {
    if (type == TYPE_BF16) return (cols + 1) / 2 * STEP_BYTES;
    size_t groups = (cols + GROUP - 1) / GROUP;
    if (type == TYPE_INT4) return groups * (2 * GROUP4_BYTES + STEP_BYTES);
    return groups * GROUP_BYTES + (groups + 1) / 2 * STEP_BYTES;
}

/* May be more than the machine can address. */
static uint64_t tensor_bytes(int type, uint64_t rows, size_t cols) {
    if (type == TYPE_F32) return rows * cols * sizeof(float);
    return (rows + LANES - 1) / LANES * panel_bytes(type, cols);
}

static uint16_t load_16(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return h;
}

static float stored_bf16(const uint8_t *panel, size_t lane, size_t k) {
    return bf16_to_f32(load_16(panel + k / 2 * STEP_BYTES + 4 * lane + k % 2 * 2));
}

/* Weight K of a row of an int8 or int4 panel is a whole number ... */
static int stored_int(int type, const uint8_t *panel, size_t lane, size_t k) {
    size_t g = k / group_cols(type), i = k % group_cols(type);
    const uint8_t *steps = panel + group_steps(type, g) + 4 * lane + i % 4;
    if (type == TYPE_INT8) return steps[i / 4 * STEP_BYTES] - 128;
    int shift = (load_16(panel + group_scales(type, g) + 2 * lane) & SHIFT_MASK) - SHIFT_ZERO;
    return int4_levels[steps[i / 8 * STEP_BYTES] >> (i & 4) & 15] - INT4_ZERO + shift;
}

/* ... times the scale of its group. */
static float stored_scale(int type, const uint8_t *panel, size_t lane, size_t k) {
    uint16_t h = load_16(panel + group_scales(type, k / group_cols(type)) + 2 * lane);
    return type == TYPE_INT8 ? bf16_to_f32(h) : int4_scale(h) * 0x1p-13f;
}

/* Row LANE of a panel -> OUT (cols): how the embedding is looked up. */
static void panel_unpack_row(int type, const uint8_t *panel, size_t lane, size_t cols, float *out) {
    for (size_t k = 0; k < cols; k++)
        if (type == TYPE_BF16) out[k] = stored_bf16(panel, lane, k);
        else out[k] = (float)stored_int(type, panel, lane, k) * stored_scale(type, panel, lane, k);
    for (size_t k = 0; type == TYPE_INT8 && k + GROUP <= cols; k += GROUP)
        turn_group(out + k, GROUP);
}

/* ---- the definition of a matrix product ----------------------------------------------------- */

/* A group of a token's activations as whole numbers Q, for int8 weights turned, and their scale:
 * largest magnitude / 127. */
static float quantise_group(int type, const float *from, size_t n, int8_t q[GROUP]) {
    float x[GROUP], largest = 0;
    memset(q, 0, GROUP);
    memcpy(x, from, n * sizeof *x);
    if (type == TYPE_INT8) turn_group(x, n);
    for (size_t k = 0; k < n; k++) largest = fabsf(x[k]) > largest ? fabsf(x[k]) : largest;
    if (largest < 1e-30f) return 0;
    for (size_t k = 0; k < n; k++) q[k] = (int8_t)round_even(x[k] * (127.0f / largest));
    return largest / 127.0f;
}

/* One row of weights times one token X (cols): the one place that says what is added in which
 * order. The kernels of section 6 do the same many at a time, bit for bit (bf16: --strict). */
MAYBE_UNUSED static float plain_dot(int type, const uint8_t *panel, size_t lane, size_t cols,
                                    const float *x) {
    float sum = 0, part = 0;
    if (type == TYPE_BF16) {
        for (size_t k = 0; k < cols; k++) sum = fmaf(stored_bf16(panel, lane, k), x[k], sum);
        return sum;
    }
    for (size_t g = 0; g < cols; g += GROUP) {
        int8_t q[GROUP];
        float scale = quantise_group(type, x + g, cols - g < GROUP ? cols - g : GROUP, q);
        for (size_t first = 0; first < GROUP; first += group_cols(type)) {
            int32_t dot = 0;                            /* exact: whole numbers                 */
            for (size_t k = first; k < first + group_cols(type); k++)
                dot += q[k] * stored_int(type, panel, lane, g + k);
            float weights = stored_scale(type, panel, lane, g + first);
            if (type == TYPE_INT8) sum = fmaf((float)dot, weights * scale, sum);
            else part = first ? fmaf((float)dot, weights, part) : (float)dot * weights;
        }
        if (type == TYPE_INT4) sum = fmaf(part, scale, sum);
    }
    return sum;
}

/* OUT (tokens, rows) with STRIDE = X (tokens, cols) times the transpose of W, ROWS in panels. */
MAYBE_UNUSED static void plain_matmul(int type, const uint8_t *w, size_t rows, size_t cols,
                                      const float *x, size_t x_stride, size_t tokens, float *out,
                                      size_t stride) {
    for (size_t t = 0; t < tokens; t++)
        for (size_t r = 0; r < rows; r++)
            out[t * stride + r] = plain_dot(type, w + r / LANES * panel_bytes(type, cols),
                                            r % LANES, cols, x + t * x_stride);
}

#endif /* MEDRUN_PASS: the file includes itself from here on */

/* ============================================================================================
 * 6 Kernels: the words for each instruction set, the sentences once
 *
 * The engine's arithmetic has one definition, on vectors of 16 floats with explicit fma, and every
 * instruction set realises it bit for bit. The *words* (load, add, fma, dot4, ...) are written for
 * each instruction set; the *sentences* (matmul, norm, attention) are written once over the words.
 * So this file includes itself once for each instruction set (its last lines say how), and each
 * reading, a pass, takes only the part between the two banners with arrows:
 *
 *     compiled once          sections 1 to 5; of this section formats, structs, the list of names
 *     >>>>
 *     once for each pass     words      those of the pass: MEDRUN_PASS says which
 *       1 scalar  2 avx2     defaults   words that most instruction sets share
 *       3 avx512  4 avxvnni  sentences  the same text each time; vec is vec_avx2, then vec_avx512
 *       5 neon    6 neondot  row        a kernel_set: the pass's functions, for the other sections
 *       7 neonmat
 *     <<<<
 *     compiled once          the passes, each in a region where the compiler may use its
 *                            instructions; choosing one of the rows; sections 7 to 17
 *
 * The scalar pass is the fallback where nothing else runs. After this section none of its macros is
 * left. Tests: tests/06_kernels.c compares every pass with plain_matmul and with the scalar pass.
 * ============================================================================================ */

#ifndef MEDRUN_PASS

/* How activations are packed for a matmul, by tiles of 8 tokens, the last of 8, 4, 2 or 1, filled
 * up with zeros. A tile is a stream of 4-byte words, its tokens side by side, in the order of K:
 *   PACK_F32   one float a k                                    (bf16 weights, strict)
 *   PACK_BF16  two bf16, k and k + 1                            (bf16 weights, vdpbf16ps)
 *   PACK_INT8  for each group of 64: for each token -128 * the sum of its first 32 q, then for
 *              each that of the second 32; for each its scale; then 16 words of four int8. The
 *              sums undo the weights' +128 exactly.      (int8 weights, group turned, and int4)
 *   PACK_INT16 the same in int16: 16 times a word of the first and third q of each token, then a
 *              word of the second and fourth.            (where no instruction multiplies bytes) */
enum { PACK_F32, PACK_BF16, PACK_INT8, PACK_INT16, N_PACKS };
enum { TILE = 8, AHEAD = 8192 };        /* AHEAD: bytes by which a matmul asks for what it reads */

static size_t tile_width(size_t tokens) { return tokens > 4 ? 8 : tokens > 2 ? 4 : tokens; }

static size_t pack_bytes(int kind, size_t cols, size_t tokens) {
    size_t groups = (cols + GROUP - 1) / GROUP;
    size_t words = 3 + (size_t)GROUP / (kind == PACK_INT16 ? 2 : 4);
    if (kind == PACK_F32) words = round_up(cols, 2), groups = 1;
    if (kind == PACK_BF16) words = (cols + 1) / 2, groups = 1;
    return (tokens / TILE * TILE + tile_width(tokens % TILE)) * groups * words * 4;
}

/* The cache of one key-value head: keys in panels of 16 positions, walked along head_dim like
 * weights; values row by row.
 *   f16, f32  keys (panels, head_dim, 16); values (positions, head_dim)
 *   int8      both in panels: keys (head_dim / 2, 16, 2), values (8, head_dim, 2), so that two
 *             neighbours along the sum stand together, and then a bf16 scale for each group of 64
 *             of a position's numbers, (groups, 16). Scores and weighted values are exact integer
 *             sums, with queries and weights rounded to 16 bits. Whole groups of 64 numbers of
 *             keys, queries and values are turned (section 5), the weighted values back. */
static size_t cache_panel(int kv, size_t head_dim) {            /* bytes of 16 positions */
    size_t groups = (head_dim + GROUP - 1) / GROUP;
    return 16 * (kv == MEDRUN_KV_INT8 ? head_dim + 2 * groups : head_dim * (kv ? 4 : 2));
}

/* Attention of up to QUERIES queries that share one key-value head. Memory has room for KEY_STEP
 * keys wherever one is in use. PART_EXTRA: two numbers, and what keeps parts aligned. */
enum { QUERIES = 32, KEY_BLOCK = 256, KEY_STEP = 64, PART_EXTRA = 16 };

typedef struct {
    size_t n;                       /* queries */
    int kv;                         /* the cache's numbers */
    size_t head_dim;
    float scale;                    /* head_dim^-0.5 */
    const float *q[QUERIES];        /* (head_dim) each */
    float *out[QUERIES];            /* (head_dim) each, as a part PART_EXTRA more */
    size_t start[QUERIES], limit[QUERIES];      /* query i sees keys start[i] .. limit[i]-1 */
    size_t begin, end;              /* of the keys, those looked at; multiples of KEY_BLOCK */
    bool part;                      /* out is for `merge`: not divided, largest and total behind */
    const void *keys, *values;
    float *scratch;                 /* attend_scratch(head_dim) floats */
} attention;

/* A tile of queries and what it sees of a block: keys first + low .. first + high - 1. */
typedef struct {
    size_t query, first, low, high;
    const float *weight;            /* (queries, KEY_BLOCK)                                     */
    const float *keep, *fresh;      /* of each query: factor of what was, of what comes         */
} key_tile;

/* The packed queries, then the scores, which become weights. */
static size_t attend_scratch(size_t head_dim) { return QUERIES * (head_dim + KEY_BLOCK); }

/* xIELU (Huang and Schlag 2024) of one layer, softplus applied: x > 0 gives positive x^2 + beta x,
 * else negative (e^min(x, eps) - 1 - x) + beta x. */
typedef struct {
    float positive, negative, beta, eps;
} xielu_numbers;

/* A share of a matrix product: out[t * stride + 16 p + lane] = sum over k of
 * w[16 p + lane][k] * x[t][k]. */
typedef struct {
    const uint8_t *w, *x;           /* whole panels; all tokens, packed */
    size_t panels, cols, tokens;
    size_t cols_per_block;          /* all tokens' come before the next; any multiple of 128 */
    uint8_t *block;                 /* room for as many times BLOCK_BYTES, where weights that */
    float *out;                     /* are not used as they lie are unpacked for all tokens */
    size_t stride;
} matmul_part;
typedef void matmul_fn(const matmul_part *m);
enum { BLOCK_BYTES = 4 * (LANES + 2) };

/* In one C file two functions cannot share a name, so each pass has names of its own: K(norm) is
 * norm_avx2 in one pass and norm_avx512 in the next. The words stand so often that each is a macro
 * itself: `vadd` means K(vadd). The compiler puts back what each macro was before: a pass's limits
 * when the pass ends, its names when this section ends, so who includes medrun.c finds none of
 * them. A new macro of this section goes into one of the lists. */
#define KERNEL_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define KEEP_MACRO(name) KERNEL_PRAGMA(push_macro(#name))
#define PUT_BACK(name) KERNEL_PRAGMA(pop_macro(#name))
#define PASS_LIMITS(X)                                                                          \
    X(KERNEL_SUFFIX) X(KERNEL_BASE) X(KERNEL_NAME) X(BF16_NAME) X(PARTIAL) X(INT_PACK) X(SIGN)  \
    X(READY_TYPES) X(LANE_LOOPS) X(TILE_PANELS) X(INT_PANELS) X(TILE_TOKENS) X(FEW_TOKENS)      \
    X(TILED) X(UNROLLED) X(OWN_NUMBERS) X(OWN_BYTES) X(OWN_STEPS) X(OWN_READY) X(MORE_KERNELS)  \
    X(EACH) X(ALL1) X(ALL2) X(ALL_BY_LANE) X(ALL_LEVELS) X(BY_LANE) X(PICK) X(PICK4)    \
    X(IDOT2_LANE) X(IDOT2) X(DUP) X(PRODUCTS) X(KERNEL_ENTRY) X(KERNEL_ROW)
#define PASS_NAMES(X)                                                                           \
    X(KERNELS) X(KERNEL_FIELD) X(KERNEL_JOIN2) X(KERNEL_JOIN) X(K) X(B) X(X_BYTES) X(X_GROUP)   \
    X(PREFETCH) X(BEGIN_TARGET) X(END_TARGET) X(vec) X(ivec) X(wvec) X(vload) X(vstore)         \
    X(vload_bf16) X(vload_f16) X(vload_int4) X(vstore_f16) X(vsplat) X(vadd) X(vsub) X(vmul)    \
    X(vdiv) X(vmax) X(vfma) X(vless) X(vround) X(vfloat) X(vscale2) X(vsum) X(vlargest)         \
    X(isplat) X(iadd) X(istore8) X(istore16) X(wload) X(wshift) X(wstore) X(wload_int8)         \
    X(weven) X(wodd) X(bvec) X(bready) X(blevels) X(bload) X(bstore) X(ibias) X(svec) X(sload)  \
    X(vfmas) X(xvec) X(xload) X(idot4) X(vdot2) X(pvec) X(pload) X(idot2) X(vexp) X(vexp_bend)  \
    X(vexpm1) X(vzip) X(ROW_SCOPE)
PASS_NAMES(KEEP_MACRO)

/* What every pass makes beside its matmuls: X(name, arguments). Shapes are in floats, all
 * pointers may be unaligned, and n is a multiple of 16. */
#define KERNELS(X)                                                                              \
    /* x (tokens, cols) with STRIDE, turned or not, -> out; cols a multiple of 16 */            \
    X(pack, (int kind, bool turned, const float *x, size_t stride, size_t cols, size_t tokens,  \
             uint8_t *out))                                                                     \
    X(norm, (float *out, const float *x, const float *weight, size_t n, float eps))             \
    X(silu_mul, (float *gate, const float *up, size_t n))           /* gate = silu(gate) * up */ \
    X(relu2, (float *x, size_t n))                                  /* x = relu(x)^2          */ \
    X(xielu, (float *x, size_t n, const xielu_numbers *a))                                      \
    X(add, (float *x, const float *y, size_t n))                    /* x += y                 */ \
    X(attend, (const attention *a))                                                             \
    /* out = what N parts of a query's keys, (n, head_dim + PART_EXTRA), give together */       \
    X(merge, (float *out, const float *parts, size_t n, size_t head_dim, int kv))               \
    X(to_half, (uint16_t *out, const float *x, size_t n))           /* f16, within +-65504    */ \
    /* the same to int8, turned, with a bf16 scale for each group of 64 */                      \
    X(to_int8, (int8_t *out, uint16_t *scales, const float *x, size_t n))

/* One row for each instruction set. */
#define KERNEL_FIELD(name, arguments) void (*name) arguments;
typedef struct {
    const char *name;
    bool bf16_dot;                  /* has a matmul for PACK_BF16                               */
    int int_pack;                   /* what int8 and int4 weights multiply                      */
    unsigned unpacks;               /* 1 << type: a matmul of many tokens unpacks such weights  */
    size_t tile_panels, int_panels; /* that a matmul of many tokens takes at once               */
    matmul_fn *matmul_f32, *matmul_bf16, *matmul_int8, *matmul_int4;
    const struct more_kernels *more;            /* what a tool has compiled beside these        */
    KERNELS(KERNEL_FIELD)
} kernel_set;

#define KERNEL_JOIN2(name, suffix) name##_##suffix
#define KERNEL_JOIN(name, suffix) KERNEL_JOIN2(name, suffix)
#define K(name) KERNEL_JOIN(name, KERNEL_SUFFIX)        /* vadd -> vadd_avx2 */
/* A pass with PARTIAL has words of its own for products only; the rest is KERNEL_BASE's. */
#define B(name) KERNEL_JOIN(name, KERNEL_BASE)
/* The words. vec is 16 floats, ivec 16 int32, wvec 64 bytes of weights. */
#define vec K(vec)
#define ivec K(ivec)
#define wvec K(wvec)
#define vload K(vload)                  /* 16 floats */
#define vstore K(vstore)
#define vzip K(vzip)                    /* lanes of two in turns: the low or the high halves */
#define vload_bf16 K(vload_bf16)        /* 16 bf16, widened */
#define vload_f16 K(vload_f16)          /* 16 f16, widened */
#define vload_int4 K(vload_int4)        /* the scales of 16 int4 groups, times 2^13 */
#define vstore_f16 K(vstore_f16)        /* to the nearest, ties to even */
#define vsplat K(vsplat)                /* one float on all lanes */
#define vadd K(vadd)
#define vsub K(vsub)
#define vmul K(vmul)
#define vdiv K(vdiv)
#define vmax K(vmax)                    /* a > b ? a : b */
#define vfma K(vfma)                    /* a * b + c, rounded once */
#define vless K(vless)                  /* a < b ? x : y */
#define vround K(vround)                /* to int, ties to even */
#define vfloat K(vfloat)                /* int to float */
#define vscale2 K(vscale2)              /* v * 2^n by adding to the exponent */
#define vsum K(vsum)                    /* of 16 lanes: lanes 8 apart, then 4, 2, 1 */
#define vlargest K(vlargest)
#define isplat K(isplat)
#define iadd K(iadd)
#define istore8 K(istore8)              /* 16 ints that fit as 16 int8 */
#define istore16 K(istore16)            /* 16 ints that fit as 16 int16 */
#define wload K(wload)                  /* 64 bytes of weights */
#define wshift K(wshift)                /* the shifts of 16 int4 groups, each in 4 bytes */
#define wstore K(wstore)
#define wload_int8 K(wload_int8)        /* 32 int8, widened to int16 */
#define weven K(weven)                  /* of 16 pairs of bf16 the first, widened */
#define wodd K(wodd)                    /* ... the second */
#define bvec K(bvec)                    /* 64 int8 weights + 128 as idot4 wants them */
#define bready K(bready)                /* wvec to bvec */
#define blevels K(blevels)              /* the weights of 64 low, or else high, nibbles of int4 */
#define bload K(bload)
#define bstore K(bstore)                /* two steps */
#define ibias K(ibias)                  /* -128 * a sum of q, if bvec is weights + 128; else 0 */
#define svec K(svec)                    /* a float on all lanes */
#define sload K(sload)                  /* number T of NT that stand side by side */
#define vfmas K(vfmas)                  /* vec * svec + vec, rounded once */
#define xvec K(xvec)                    /* four q, or two bf16, of one token on all lanes */
#define xload K(xload)                  /* token T of NT, in a tile of WIDE */
#define idot4 K(idot4)                  /* acc + sum of 4 bvec * int8, exact */
#define vdot2 K(vdot2)                  /* acc + w0 x0 + w1 x1 in bf16, as the processor does it */
#define pvec K(pvec)                    /* two int16 of one query on all lanes */
#define pload K(pload)
#define idot2 K(idot2)                  /* acc + sum of 2 int16 * int16, exact if it fits */
#define vexp K(vexp)                    /* e^x */
#define vexp_bend K(vexp_bend)
#define vexpm1 K(vexpm1)                /* e^x - 1 */

/* Bytes of a token in a step of four columns, and in a group, with its sums and its scale. */
#define X_BYTES (INT_PACK == PACK_INT16 ? 8 : 4)
#define X_GROUP (GROUP / 4 * X_BYTES + 12)

/* How one matmul goes about its work on one instruction set. Constant in each function that uses
 * it, so that the compiler keeps of matmul_with only what holds there. */
typedef struct {
    int type, kind;                 /* of the weights; how the activations are packed           */
    size_t alone, together;         /* panels at once: for a single token, for many             */
    bool ready;                     /* for many tokens weights are unpacked into a block first  */
} matmul_plan;

/* A tile: columns [begin, end) of some panels times some of the WIDE tokens that are packed side by
 * side, of which the first LIVE are not filling. W is the panels, or blocks that unpack made, BYTES
 * apart. Sums are added to what OUT has unless begin is 0. */
typedef struct {
    size_t live, wide, bytes, begin, end, stride;
    const uint8_t *w, *x;
    float *out;
} weight_tile;

ALWAYS_INLINE uint32_t load_word(const uint8_t *p) {
    uint32_t w;
    memcpy(&w, p, 4);
    return w;
}

ALWAYS_INLINE float load_float(const uint8_t *p) { return bits_float(load_word(p)); }

/* The bytes AHEAD of P will be read soon: without this hint a matmul whose activations do not fit
 * the caches waits for them. */
#define PREFETCH(p) __builtin_prefetch((const void *)((uintptr_t)(p) + AHEAD))

/* Asks for N bytes that will be needed soon: with a chain of sums in the way a processor does not
 * look far enough ahead by itself, and its prefetcher stops at each page. An address, because it
 * may lie behind the end of the cache, where no pointer may. */
ALWAYS_INLINE void fetch_ahead(uintptr_t address, size_t n) {
    for (size_t i = 0; i < n; i += 64) __builtin_prefetch((const void *)(address + i));
}

/* Where sum I of a tile stands: token i % nt of panel i / nt. */
ALWAYS_INLINE float *sum_place(float *out, size_t stride, size_t nt, size_t i) {
    return out + i % nt * stride + 16 * (i / nt);
}

/* Which of the queries of a tile stand side by side: four, the last filled up with queries that see
 * nothing, or one alone. */
ALWAYS_INLINE size_t query_tile(const attention *a, size_t t) { return a->n - t == 1 ? 1 : 4; }

/* The keys of a block that a tile of queries sees: [*low, *high), counted from FIRST. */
static void tile_keys(const attention *a, size_t t, size_t nt, size_t first, size_t *low,
                      size_t *high) {
    *low = KEY_BLOCK, *high = 0;
    for (size_t i = t; i < t + nt && i < a->n; i++) {
        if (a->limit[i] <= first || a->start[i] >= first + KEY_BLOCK) continue;
        size_t from = a->start[i] > first ? a->start[i] - first : 0, to = a->limit[i] - first;
        if (from < *low) *low = from;
        if (to > *high) *high = to < KEY_BLOCK ? to : KEY_BLOCK;
    }
}

#endif
#ifdef MEDRUN_PASS
/* >>>>>>>>>>>>>> down to <<<< everything is compiled once for each instruction set >>>>>>>>>>>>> */

/* ---- the words ----------------------------------------------------------------------------- */

PASS_LIMITS(KEEP_MACRO)
#if MEDRUN_PASS > 1
#define LANE_LOOPS 0
#define UNROLLED UNROLL
#define TILED ALWAYS_INLINE     /* a function for every size of tile, whose sums are registers   */
#endif
#if MEDRUN_PASS == 1
#define KERNEL_SUFFIX scalar
#define KERNEL_BASE scalar
#define KERNEL_NAME "scalar"
#define INT_PACK PACK_INT8      /* what int8 and int4 weights multiply                           */
#define SIGN 0                  /* what bready takes from the weights' + 128                     */
#define READY_TYPES (1 << TYPE_INT4)    /* which a matmul of many tokens unpacks first           */
#define LANE_LOOPS 1            /* no vectors: a lane is a turn of a loop, a token costs its time */
#define TILE_PANELS 1           /* what fits the registers                                       */
#define INT_PANELS 1            /* ... with int8 or int4 weights, whose sums are two kinds       */
#define TILE_TOKENS 8
#define FEW_TOKENS 8            /* ... of one panel                                              */
#define TILED static            /* one function for every size of tile                           */
#ifdef __clang__                /* a lane is a loop here: unrolling tiles would only be long     */
#define UNROLLED _Pragma("clang loop unroll(disable) interleave(disable)")
#else
#define UNROLLED
#endif
#define EACH UNROLLED for (int i = 0; i < 16; i++)

/* Plain C: a vec is an array, and each word says lane by lane what it means. Who wants to know what
 * a word does on any instruction set reads it here. */

typedef struct { float v[16]; } vec;
typedef struct { int32_t v[16]; } ivec;
typedef struct { uint8_t v[64]; } wvec;

ALWAYS_INLINE vec vload(const float *p) { vec r; memcpy(&r, p, 64); return r; }
ALWAYS_INLINE void vstore(float *p, vec a) { memcpy(p, &a, 64); }
ALWAYS_INLINE vec vzip(vec a, vec b, bool high) {
    vec r;
    EACH r.v[i] = (i % 2 ? b : a).v[i / 2 + 8 * high];
    return r;
}
ALWAYS_INLINE vec vload_bf16(const void *p) {
    vec r;
    EACH r.v[i] = bf16_to_f32(load_16((const uint8_t *)p + 2 * i));
    return r;
}
ALWAYS_INLINE vec vload_f16(const uint16_t *p) {
    vec r;
    EACH r.v[i] = f16_to_f32(p[i]);
    return r;
}
ALWAYS_INLINE void vstore_f16(uint16_t *p, vec a) { EACH p[i] = f32_to_f16(a.v[i]); }
ALWAYS_INLINE vec vload_int4(const uint8_t *p) {
    vec r;
    EACH r.v[i] = int4_scale(load_16(p + 2 * i));
    return r;
}
ALWAYS_INLINE vec vsplat(float x) { vec r; EACH r.v[i] = x; return r; }
ALWAYS_INLINE vec vadd(vec a, vec b) { EACH a.v[i] = a.v[i] + b.v[i]; return a; }
ALWAYS_INLINE vec vsub(vec a, vec b) { EACH a.v[i] = a.v[i] - b.v[i]; return a; }
ALWAYS_INLINE vec vmul(vec a, vec b) { EACH a.v[i] = a.v[i] * b.v[i]; return a; }
ALWAYS_INLINE vec vdiv(vec a, vec b) { EACH a.v[i] = a.v[i] / b.v[i]; return a; }
ALWAYS_INLINE vec vmax(vec a, vec b) {
    EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
ALWAYS_INLINE vec vfma(vec a, vec b, vec c) {
    EACH a.v[i] = fmaf(a.v[i], b.v[i], c.v[i]);
    return a;
}
ALWAYS_INLINE vec vless(vec a, vec b, vec x, vec y) {
    EACH x.v[i] = a.v[i] < b.v[i] ? x.v[i] : y.v[i];
    return x;
}
ALWAYS_INLINE ivec vround(vec a) { ivec r; EACH r.v[i] = round_even(a.v[i]); return r; }
ALWAYS_INLINE vec vfloat(ivec a) { vec r; EACH r.v[i] = (float)a.v[i]; return r; }
ALWAYS_INLINE vec vscale2(vec a, ivec n) {
    EACH a.v[i] = bits_float(float_bits(a.v[i]) + ((uint32_t)n.v[i] << 23));
    return a;
}
ALWAYS_INLINE float vsum(vec a) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) a.v[i] = a.v[i] + a.v[i + half];
    return a.v[0];
}
ALWAYS_INLINE float vlargest(vec a) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
    return a.v[0];
}
ALWAYS_INLINE ivec isplat(int32_t x) { ivec r; EACH r.v[i] = x; return r; }
ALWAYS_INLINE ivec iadd(ivec a, ivec b) {
    EACH a.v[i] = (int32_t)((uint32_t)a.v[i] + (uint32_t)b.v[i]);
    return a;
}
ALWAYS_INLINE void istore8(int8_t *p, ivec a) { EACH p[i] = (int8_t)a.v[i]; }
ALWAYS_INLINE void istore16(int16_t *p, ivec a) { EACH p[i] = (int16_t)a.v[i]; }
ALWAYS_INLINE wvec wload(const uint8_t *p) { wvec r; memcpy(&r, p, 64); return r; }
ALWAYS_INLINE void wstore(uint8_t *p, wvec w) { memcpy(p, &w, 64); }
ALWAYS_INLINE wvec wshift(const uint8_t *p) {
    wvec r;
    EACH memset(r.v + 4 * i, p[2 * i] & SHIFT_MASK, 4);
    return r;
}
ALWAYS_INLINE wvec wload_int8(const int8_t *p) {
    wvec r;
    int16_t wide[32];
    for (int i = 0; i < 32; i++) wide[i] = p[i];
    memcpy(&r, wide, 64);
    return r;
}
ALWAYS_INLINE vec weven(wvec w) {
    vec r;
    EACH r.v[i] = bits_float(load_word(w.v + 4 * i) << 16);
    return r;
}
ALWAYS_INLINE vec wodd(wvec w) {
    vec r;
    EACH r.v[i] = bits_float(load_word(w.v + 4 * i) & 0xFFFF0000);
    return r;
}
ALWAYS_INLINE wvec blevels(wvec w, wvec shift, bool low) {
    UNROLLED for (int i = 0; i < 64; i++)
        w.v[i] = (uint8_t)(int4_levels[low ? w.v[i] & 15 : w.v[i] >> 4] + shift.v[i]);
    return w;
}
typedef struct { int8_t q[4]; } xvec;
ALWAYS_INLINE xvec xload(const uint8_t *words, size_t t, size_t nt, size_t wide) {
    xvec x;
    (void)nt, (void)wide;
    memcpy(&x, words + 4 * t, 4);
    return x;
}
ALWAYS_INLINE ivec idot4(ivec acc, wvec w, xvec x) {
    EACH acc.v[i] += w.v[4 * i] * x.q[0] + w.v[4 * i + 1] * x.q[1] + w.v[4 * i + 2] * x.q[2] +
                     w.v[4 * i + 3] * x.q[3];
    return acc;
}
typedef struct { int16_t q[2]; } pvec;
ALWAYS_INLINE pvec pload(const void *p, size_t t, size_t nt) {
    pvec x;
    (void)nt;
    memcpy(&x, (const uint8_t *)p + 4 * t, 4);
    return x;
}
ALWAYS_INLINE ivec idot2(ivec acc, wvec w, pvec x) {
    int16_t pair[32];
    memcpy(pair, &w, 64);
    EACH acc.v[i] += pair[2 * i] * x.q[0] + pair[2 * i + 1] * x.q[1];
    return acc;
}

#elif MEDRUN_PASS == 2 || MEDRUN_PASS == 4
#if MEDRUN_PASS == 2
#define KERNEL_SUFFIX avx2
#define KERNEL_NAME "avx2"
#define INT_PACK PACK_INT16
#define READY_TYPES (1 << TYPE_INT8 | 1 << TYPE_INT4)
#else
#define KERNEL_SUFFIX avxvnni
#define KERNEL_NAME "avxvnni"
#define PARTIAL
#define INT_PACK PACK_INT8
#define READY_TYPES (1 << TYPE_INT4)
#endif
#define SIGN 0
#define KERNEL_BASE avx2
#define TILE_PANELS 1
#define INT_PANELS 1
#define TILE_TOKENS 4
#define FEW_TOKENS 4

/* AVX2: a vec is two of 16 registers, so a tile has one panel and four tokens, in 8 of them. */
typedef struct { __m256 a, b; } vec;
typedef struct { __m256i a, b; } ivec;
typedef struct { __m256i a, b; } wvec;
#define ALL1(f) {f(x.a), f(x.b)}
#define ALL2(f) {f(x.a, y.a), f(x.b, y.b)}

ALWAYS_INLINE vec vload(const float *p) {
    return (vec){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
ALWAYS_INLINE void vstore(float *p, vec x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
ALWAYS_INLINE vec vzip(vec x, vec y, bool high) {
    __m256 a = high ? x.b : x.a, b = high ? y.b : y.a;
    __m256 low = _mm256_unpacklo_ps(a, b), rest = _mm256_unpackhi_ps(a, b);
    return (vec){_mm256_permute2f128_ps(low, rest, 0x20), _mm256_permute2f128_ps(low, rest, 0x31)};
}
ALWAYS_INLINE __m256 K(widen_half)(const uint8_t *p) {
    __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
}
ALWAYS_INLINE vec vload_bf16(const void *p) {
    return (vec){K(widen_half)(p), K(widen_half)((const uint8_t *)p + 16)};
}
ALWAYS_INLINE vec vload_f16(const uint16_t *p) {
    return (vec){_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)),
                 _mm256_cvtph_ps(_mm_loadu_si128((const void *)(p + 8)))};
}
ALWAYS_INLINE void vstore_f16(uint16_t *p, vec x) {
    _mm_storeu_si128((void *)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((void *)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
ALWAYS_INLINE vec vload_int4(const uint8_t *p) {
    uint16_t h[16];
    __m256i mask = _mm256_set1_epi16((int16_t)(0xFFFF - SHIFT_MASK));
    _mm256_storeu_si256((void *)h, _mm256_and_si256(_mm256_loadu_si256((const void *)p), mask));
    return vload_f16(h);
}
ALWAYS_INLINE vec vsplat(float x) { return (vec){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
ALWAYS_INLINE vec vadd(vec x, vec y) { return (vec)ALL2(_mm256_add_ps); }
ALWAYS_INLINE vec vsub(vec x, vec y) { return (vec)ALL2(_mm256_sub_ps); }
ALWAYS_INLINE vec vmul(vec x, vec y) { return (vec)ALL2(_mm256_mul_ps); }
ALWAYS_INLINE vec vdiv(vec x, vec y) { return (vec)ALL2(_mm256_div_ps); }
ALWAYS_INLINE vec vmax(vec x, vec y) { return (vec)ALL2(_mm256_max_ps); }
ALWAYS_INLINE vec vfma(vec x, vec y, vec c) {
    return (vec){_mm256_fmadd_ps(x.a, y.a, c.a), _mm256_fmadd_ps(x.b, y.b, c.b)};
}
ALWAYS_INLINE vec vless(vec a, vec b, vec x, vec y) {
    return (vec){_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_LT_OQ)),
                 _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_LT_OQ))};
}
ALWAYS_INLINE ivec vround(vec x) { return (ivec)ALL1(_mm256_cvtps_epi32); }
ALWAYS_INLINE vec vfloat(ivec x) { return (vec)ALL1(_mm256_cvtepi32_ps); }
ALWAYS_INLINE __m256 K(scale2_half)(__m256 x, __m256i n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(n, 23)));
}
ALWAYS_INLINE vec vscale2(vec x, ivec y) { return (vec)ALL2(K(scale2_half)); }
ALWAYS_INLINE float vsum(vec x) {
    __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
ALWAYS_INLINE float vlargest(vec x) {
    __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
ALWAYS_INLINE ivec isplat(int32_t x) { return (ivec){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
ALWAYS_INLINE ivec iadd(ivec x, ivec y) { return (ivec)ALL2(_mm256_add_epi32); }
ALWAYS_INLINE void istore8(int8_t *p, ivec x) {
    __m256i h = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
    __m128i q = _mm_packs_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    _mm_storeu_si128((void *)p, q);
}
ALWAYS_INLINE void istore16(int16_t *p, ivec x) {
    __m256i h = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
    _mm256_storeu_si256((void *)p, h);
}
ALWAYS_INLINE wvec wload_int8(const int8_t *p) {
    return (wvec){_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)p)),
                  _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(p + 16)))};
}
ALWAYS_INLINE wvec wload(const uint8_t *p) {
    return (wvec){_mm256_loadu_si256((const void *)p), _mm256_loadu_si256((const void *)(p + 32))};
}
ALWAYS_INLINE void wstore(uint8_t *p, wvec w) {
    _mm256_storeu_si256((void *)p, w.a);
    _mm256_storeu_si256((void *)(p + 32), w.b);
}
ALWAYS_INLINE __m256i K(shift_half)(__m128i h) {
    return _mm256_mullo_epi32(_mm256_cvtepu16_epi32(h), _mm256_set1_epi32(0x01010101));
}
ALWAYS_INLINE wvec wshift(const uint8_t *p) {
    __m256i scale = _mm256_set1_epi16((int16_t)(0xFFFF - SHIFT_MASK));
    __m256i h = _mm256_andnot_si256(scale, _mm256_loadu_si256((const void *)p));
    return (wvec){K(shift_half)(_mm256_castsi256_si128(h)),
                  K(shift_half)(_mm256_extracti128_si256(h, 1))};
}
ALWAYS_INLINE __m256i K(levels_half)(__m256i w, __m256i shift, bool low) {
    __m256i levels = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)int4_levels));
    __m256i q = _mm256_and_si256(low ? w : _mm256_srli_epi16(w, 4), _mm256_set1_epi8(15));
    return _mm256_add_epi8(_mm256_shuffle_epi8(levels, q), shift);
}
ALWAYS_INLINE vec weven(wvec w) {
    return (vec){_mm256_castsi256_ps(_mm256_slli_epi32(w.a, 16)),
                 _mm256_castsi256_ps(_mm256_slli_epi32(w.b, 16))};
}
ALWAYS_INLINE vec wodd(wvec w) {
    __m256i mask = _mm256_set1_epi32((int32_t)0xFFFF0000);
    return (vec){_mm256_castsi256_ps(_mm256_and_si256(w.a, mask)),
                 _mm256_castsi256_ps(_mm256_and_si256(w.b, mask))};
}
#define OWN_BYTES
#if MEDRUN_PASS == 4
typedef wvec bvec;
ALWAYS_INLINE bvec bready(wvec w) { return w; }
typedef __m256i xvec;
ALWAYS_INLINE xvec xload(const uint8_t *words, size_t t, size_t nt, size_t wide) {
    (void)nt, (void)wide;
    return _mm256_set1_epi32((int32_t)load_word(words + 4 * t));
}
ALWAYS_INLINE ivec idot4(ivec acc, bvec w, xvec x) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc.a) : "x"(w.a), "x"(x));
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc.b) : "x"(w.b), "x"(x));
    return acc;
}
#else
#define OWN_STEPS
/* Weights are split into their even and odd bytes as int16, and madd adds two products each: 4
 * multiplies for 64 products, no saturation (255 * 127 * 2 fits an int32). */
typedef struct { __m256i even_a, odd_a, even_b, odd_b; } bvec;
typedef struct { __m256i even, odd; } xvec;
ALWAYS_INLINE bvec bready(wvec w) {
    __m256i mask = _mm256_set1_epi16(0xFF);
    return (bvec){_mm256_and_si256(w.a, mask), _mm256_srli_epi16(w.a, 8),
                  _mm256_and_si256(w.b, mask), _mm256_srli_epi16(w.b, 8)};
}
ALWAYS_INLINE bvec bload(const uint8_t *p) {
    wvec even = wload(p), odd = wload(p + 64);
    return (bvec){even.a, even.b, odd.a, odd.b};
}
ALWAYS_INLINE void bstore(uint8_t *p, bvec first, bvec second) {
    wstore(p, (wvec){first.even_a, first.odd_a});
    wstore(p + 64, (wvec){first.even_b, first.odd_b});
    wstore(p + 128, (wvec){second.even_a, second.odd_a});
    wstore(p + 192, (wvec){second.even_b, second.odd_b});
}
ALWAYS_INLINE xvec xload(const uint8_t *words, size_t t, size_t nt, size_t wide) {
    (void)nt;
    return (xvec){_mm256_set1_epi32((int32_t)load_word(words + 4 * t)),
                  _mm256_set1_epi32((int32_t)load_word(words + 4 * (wide + t)))};
}
ALWAYS_INLINE __m256i K(add_pairs)(__m256i acc, __m256i w, __m256i x) {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(w, x));
    __asm__("" : "+x"(acc));                /* in this order, or gcc runs out of registers       */
    return acc;
}
ALWAYS_INLINE ivec idot4(ivec acc, bvec w, xvec x) {
    acc.a = K(add_pairs)(acc.a, w.even_a, x.even);
    acc.b = K(add_pairs)(acc.b, w.even_b, x.even);
    acc.a = K(add_pairs)(acc.a, w.odd_a, x.odd);
    acc.b = K(add_pairs)(acc.b, w.odd_b, x.odd);
    return acc;
}
#endif
ALWAYS_INLINE bvec blevels(wvec w, wvec shift, bool low) {
    return bready((wvec){K(levels_half)(w.a, shift.a, low), K(levels_half)(w.b, shift.b, low)});
}
typedef __m256i pvec;
ALWAYS_INLINE pvec pload(const void *p, size_t t, size_t nt) {
    return (void)nt, _mm256_set1_epi32((int32_t)load_word((const uint8_t *)p + 4 * t));
}
ALWAYS_INLINE ivec idot2(ivec acc, wvec w, pvec x) {
    return (ivec){_mm256_add_epi32(acc.a, _mm256_madd_epi16(w.a, x)),
                  _mm256_add_epi32(acc.b, _mm256_madd_epi16(w.b, x))};
}

#elif MEDRUN_PASS == 3 /* avx512 with VNNI, and for those that have it BF16 */
#define KERNEL_SUFFIX avx512
#define KERNEL_BASE avx512
#define KERNEL_NAME "avx512"
#define BF16_NAME "avx512bf16"
#define INT_PACK PACK_INT8
#define SIGN 0
#define READY_TYPES (1 << TYPE_INT4)
#define TILE_PANELS 4
#define INT_PANELS 3
#define TILE_TOKENS 4
#define FEW_TOKENS 8

/* AVX-512: a vec is one register of 32, so a tile may have four panels and four tokens. */
typedef __m512 vec;
typedef __m512i ivec;
typedef __m512i wvec;

ALWAYS_INLINE vec vload(const float *p) { return _mm512_loadu_ps(p); }
ALWAYS_INLINE void vstore(float *p, vec x) { _mm512_storeu_ps(p, x); }
ALWAYS_INLINE vec vzip(vec x, vec y, bool high) {
    __m512i at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_ps(x, _mm512_add_epi32(at, _mm512_set1_epi32(high ? 8 : 0)), y);
}
ALWAYS_INLINE vec vload_bf16(const void *p) {
    __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
}
ALWAYS_INLINE vec vload_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
}
ALWAYS_INLINE void vstore_f16(uint16_t *p, vec x) {
    _mm256_storeu_si256((void *)p, _mm512_maskz_cvtps_ph(0xFFFF, x, _MM_FROUND_TO_NEAREST_INT));
}
ALWAYS_INLINE vec vload_int4(const uint8_t *p) {
    __m256i mask = _mm256_set1_epi16((int16_t)(0xFFFF - SHIFT_MASK));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_loadu_si256((const void *)p), mask));
}
ALWAYS_INLINE vec vsplat(float x) { return _mm512_set1_ps(x); }
ALWAYS_INLINE vec vadd(vec x, vec y) { return _mm512_add_ps(x, y); }
ALWAYS_INLINE vec vsub(vec x, vec y) { return _mm512_sub_ps(x, y); }
ALWAYS_INLINE vec vmul(vec x, vec y) { return _mm512_mul_ps(x, y); }
ALWAYS_INLINE vec vdiv(vec x, vec y) { return _mm512_div_ps(x, y); }
ALWAYS_INLINE vec vmax(vec x, vec y) { return _mm512_max_ps(x, y); }
ALWAYS_INLINE vec vfma(vec x, vec y, vec c) { return _mm512_fmadd_ps(x, y, c); }
ALWAYS_INLINE vec vless(vec a, vec b, vec x, vec y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
ALWAYS_INLINE ivec vround(vec x) { return _mm512_cvtps_epi32(x); }
ALWAYS_INLINE vec vfloat(ivec x) { return _mm512_cvtepi32_ps(x); }
ALWAYS_INLINE vec vscale2(vec x, ivec n) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(n, 23)));
}
ALWAYS_INLINE vec_avx2 K(halves)(vec x) {
    return (vec_avx2){_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)};
}
ALWAYS_INLINE float vsum(vec x) { return vsum_avx2(K(halves)(x)); }
ALWAYS_INLINE float vlargest(vec x) { return vlargest_avx2(K(halves)(x)); }
ALWAYS_INLINE ivec isplat(int32_t x) { return _mm512_set1_epi32(x); }
ALWAYS_INLINE ivec iadd(ivec x, ivec y) { return _mm512_add_epi32(x, y); }
ALWAYS_INLINE void istore8(int8_t *p, ivec x) {
    _mm_storeu_si128((void *)p, _mm512_cvtepi32_epi8(x));
}
ALWAYS_INLINE void istore16(int16_t *p, ivec x) {
    _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16(x));
}
ALWAYS_INLINE wvec wload(const uint8_t *p) {
    __m512i w = _mm512_loadu_si512(p);
    __asm__("" : "+v"(w));                  /* in a register: gcc would load it for every use    */
    return w;
}
ALWAYS_INLINE void wstore(uint8_t *p, wvec w) { _mm512_storeu_si512(p, w); }
ALWAYS_INLINE wvec wshift(const uint8_t *p) {
    __m512i h = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
    h = _mm512_and_si512(h, _mm512_set1_epi32(SHIFT_MASK));
    return _mm512_mullo_epi32(h, _mm512_set1_epi32(0x01010101));
}
ALWAYS_INLINE wvec blevels(wvec w, wvec shift, bool low) {
    __m512i levels = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)int4_levels));
    __m512i q = _mm512_and_si512(low ? w : _mm512_srli_epi16(w, 4), _mm512_set1_epi8(15));
    return _mm512_add_epi8(_mm512_shuffle_epi8(levels, q), shift);
}
ALWAYS_INLINE wvec wload_int8(const int8_t *p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)p));
}
ALWAYS_INLINE vec weven(wvec w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
ALWAYS_INLINE vec wodd(wvec w) {
    return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int32_t)0xFFFF0000)));
}
typedef __m512i xvec;
ALWAYS_INLINE xvec xload(const uint8_t *words, size_t t, size_t nt, size_t wide) {
    (void)nt, (void)wide;
    return _mm512_set1_epi32((int32_t)load_word(words + 4 * t));
}
ALWAYS_INLINE ivec idot4(ivec acc, wvec w, xvec x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
}
ALWAYS_INLINE vec vdot2(vec acc, wvec w, xvec x) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
}
typedef __m512i pvec;
ALWAYS_INLINE pvec pload(const void *p, size_t t, size_t nt) {
    return (void)nt, _mm512_set1_epi32((int32_t)load_word((const uint8_t *)p + 4 * t));
}
ALWAYS_INLINE ivec idot2(ivec acc, wvec w, pvec x) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
}

#else /* 5: NEON, 6: with dot products, 7: with matrix products, and for those that have it bf16 */
#if MEDRUN_PASS == 5
#define KERNEL_SUFFIX neon
#define KERNEL_NAME "neon"
#elif MEDRUN_PASS == 6
#define KERNEL_SUFFIX neondot
#define KERNEL_NAME "neon-dot"
#define PARTIAL
#else
#define KERNEL_SUFFIX neonmat
#define KERNEL_NAME "neon-i8mm"
#define BF16_NAME "neon-bf16"
#define PARTIAL
#endif
#if MEDRUN_PASS == 7            /* usdot takes weights as they lie; smull and sdot want them     */
#define SIGN 0                  /* without their + 128                                           */
#define READY_TYPES (1 << TYPE_BF16 | 1 << TYPE_INT8 | 1 << TYPE_INT4)
#else
#define SIGN 128
#define READY_TYPES (1 << TYPE_INT8 | 1 << TYPE_INT4)
#endif
#define INT_PACK PACK_INT8
#define KERNEL_BASE neon
#define TILE_PANELS 1           /* of 32 registers 16 are sums and 4, or 8, weights              */
#define INT_PANELS 1
#define TILE_TOKENS 4
#define FEW_TOKENS 4

/* NEON: a vec is four of 32 registers. A product takes a token's number by its lane in a register,
 * so one load serves four tokens; where compilers do that badly, the word is assembly. */
typedef struct { float32x4_t a, b, c, d; } vec;
typedef struct { int32x4_t a, b, c, d; } ivec;
typedef struct { uint8x16_t a, b, c, d; } wvec;
#define ALL1(f) {f(x.a), f(x.b), f(x.c), f(x.d)}
#define ALL2(f) {f(x.a, y.a), f(x.b, y.b), f(x.c, y.c), f(x.d, y.d)}

ALWAYS_INLINE vec vload(const float *p) {
    return (vec){vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
ALWAYS_INLINE void vstore(float *p, vec x) {
    vst1q_f32(p, x.a), vst1q_f32(p + 4, x.b), vst1q_f32(p + 8, x.c), vst1q_f32(p + 12, x.d);
}
ALWAYS_INLINE vec vzip(vec x, vec y, bool high) {
    if (high) x.a = x.c, x.b = x.d, y.a = y.c, y.b = y.d;
    return (vec){vzip1q_f32(x.a, y.a), vzip2q_f32(x.a, y.a), vzip1q_f32(x.b, y.b),
                 vzip2q_f32(x.b, y.b)};
}
ALWAYS_INLINE uint16x8_t K(load_halves)(const uint8_t *p) {
    return vreinterpretq_u16_u8(vld1q_u8(p));
}
ALWAYS_INLINE vec vload_bf16(const void *p) {
    uint16x8_t h = K(load_halves)(p), g = K(load_halves)((const uint8_t *)p + 16);
    uint16x8_t zero = vdupq_n_u16(0);
    return (vec){vreinterpretq_f32_u16(vzip1q_u16(zero, h)),
                 vreinterpretq_f32_u16(vzip2q_u16(zero, h)),
                 vreinterpretq_f32_u16(vzip1q_u16(zero, g)),
                 vreinterpretq_f32_u16(vzip2q_u16(zero, g))};
}
ALWAYS_INLINE vec K(widen)(uint16x8_t h, uint16x8_t g) {
    float16x8_t x = vreinterpretq_f16_u16(h), y = vreinterpretq_f16_u16(g);
    return (vec){vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x),
                 vcvt_f32_f16(vget_low_f16(y)), vcvt_high_f32_f16(y)};
}
ALWAYS_INLINE vec vload_f16(const uint16_t *p) { return K(widen)(vld1q_u16(p), vld1q_u16(p + 8)); }
ALWAYS_INLINE void vstore_f16(uint16_t *p, vec x) {
    vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.a), x.b)));
    vst1q_u16(p + 8, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.c), x.d)));
}
ALWAYS_INLINE vec vload_int4(const uint8_t *p) {
    uint16x8_t mask = vdupq_n_u16(0xFFFF - SHIFT_MASK);
    return K(widen)(vandq_u16(K(load_halves)(p), mask), vandq_u16(K(load_halves)(p + 16), mask));
}
ALWAYS_INLINE vec vsplat(float x) {
    float32x4_t s = vdupq_n_f32(x);
    return (vec){s, s, s, s};
}
ALWAYS_INLINE vec vadd(vec x, vec y) { return (vec)ALL2(vaddq_f32); }
ALWAYS_INLINE vec vsub(vec x, vec y) { return (vec)ALL2(vsubq_f32); }
ALWAYS_INLINE vec vmul(vec x, vec y) { return (vec)ALL2(vmulq_f32); }
ALWAYS_INLINE vec vdiv(vec x, vec y) { return (vec)ALL2(vdivq_f32); }
ALWAYS_INLINE float32x4_t K(larger)(float32x4_t x, float32x4_t y) {     /* fmax knows NaN and -0 */
    return vbslq_f32(vcgtq_f32(x, y), x, y);
}
ALWAYS_INLINE vec vmax(vec x, vec y) { return (vec)ALL2(K(larger)); }
ALWAYS_INLINE vec vfma(vec x, vec y, vec c) {
    return (vec){vfmaq_f32(c.a, x.a, y.a), vfmaq_f32(c.b, x.b, y.b), vfmaq_f32(c.c, x.c, y.c),
                 vfmaq_f32(c.d, x.d, y.d)};
}
ALWAYS_INLINE vec vless(vec a, vec b, vec x, vec y) {
    return (vec){vbslq_f32(vcltq_f32(a.a, b.a), x.a, y.a),
                 vbslq_f32(vcltq_f32(a.b, b.b), x.b, y.b),
                 vbslq_f32(vcltq_f32(a.c, b.c), x.c, y.c),
                 vbslq_f32(vcltq_f32(a.d, b.d), x.d, y.d)};
}
ALWAYS_INLINE ivec vround(vec x) { return (ivec)ALL1(vcvtnq_s32_f32); }
ALWAYS_INLINE vec vfloat(ivec x) { return (vec)ALL1(vcvtq_f32_s32); }
ALWAYS_INLINE float32x4_t K(scale2_part)(float32x4_t x, int32x4_t n) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x), vshlq_n_s32(n, 23)));
}
ALWAYS_INLINE vec vscale2(vec x, ivec y) { return (vec)ALL2(K(scale2_part)); }
ALWAYS_INLINE float vsum(vec x) {
    float32x4_t s = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
    return vpadds_f32(vadd_f32(vget_low_f32(s), vget_high_f32(s)));
}
ALWAYS_INLINE float vlargest(vec x) {
    float s[4];
    vst1q_f32(s, K(larger)(K(larger)(x.a, x.c), K(larger)(x.b, x.d)));
    float even = s[0] > s[2] ? s[0] : s[2], odd = s[1] > s[3] ? s[1] : s[3];
    return even > odd ? even : odd;
}
ALWAYS_INLINE ivec isplat(int32_t x) {
    int32x4_t s = vdupq_n_s32(x);
    return (ivec){s, s, s, s};
}
ALWAYS_INLINE ivec iadd(ivec x, ivec y) { return (ivec)ALL2(vaddq_s32); }
ALWAYS_INLINE int16x8_t K(narrow)(int32x4_t x, int32x4_t y) {
    return vuzp1q_s16(vreinterpretq_s16_s32(x), vreinterpretq_s16_s32(y));
}
ALWAYS_INLINE void istore16(int16_t *p, ivec x) {
    vst1q_s16(p, K(narrow)(x.a, x.b)), vst1q_s16(p + 8, K(narrow)(x.c, x.d));
}
ALWAYS_INLINE void istore8(int8_t *p, ivec x) {
    vst1q_s8(p, vuzp1q_s8(vreinterpretq_s8_s16(K(narrow)(x.a, x.b)),
                          vreinterpretq_s8_s16(K(narrow)(x.c, x.d))));
}
ALWAYS_INLINE wvec wload(const uint8_t *p) {
    return (wvec){vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)};
}
ALWAYS_INLINE void wstore(uint8_t *p, wvec x) {
    vst1q_u8(p, x.a), vst1q_u8(p + 16, x.b), vst1q_u8(p + 32, x.c), vst1q_u8(p + 48, x.d);
}
/* Two registers' even or odd pairs of bytes, or four bytes of one, then of the other. */
#define PICK(f, x, y) vreinterpretq_u8_u16(f(vreinterpretq_u16_u8(x), vreinterpretq_u16_u8(y)))
#define PICK4(f, x, y) vreinterpretq_u8_u32(f(vreinterpretq_u32_u8(x), vreinterpretq_u32_u8(y)))
ALWAYS_INLINE wvec wshift(const uint8_t *p) {
    uint8x16_t s = vandq_u8(vuzp1q_u8(vld1q_u8(p), vld1q_u8(p + 16)), vdupq_n_u8(SHIFT_MASK));
    uint8x16_t h = vzip1q_u8(s, s), g = vzip2q_u8(s, s);
    return (wvec){PICK(vzip1q_u16, h, h), PICK(vzip2q_u16, h, h),
                  PICK(vzip1q_u16, g, g), PICK(vzip2q_u16, g, g)};
}
/* For idot2: the first of the pairs of 8 lanes, the second, then those of the other 8. */
ALWAYS_INLINE uint8x16_t K(widen_int8)(int8x8_t x) { return vreinterpretq_u8_s16(vmovl_s8(x)); }
ALWAYS_INLINE wvec wload_int8(const int8_t *p) {
    int8x16_t x = vld1q_s8(p), y = vld1q_s8(p + 16), e = vuzp1q_s8(x, y), o = vuzp2q_s8(x, y);
    return (wvec){K(widen_int8)(vget_low_s8(e)), K(widen_int8)(vget_low_s8(o)),
                  K(widen_int8)(vget_high_s8(e)), K(widen_int8)(vget_high_s8(o))};
}
ALWAYS_INLINE float32x4_t K(even_part)(uint8x16_t w) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(w), 16));
}
ALWAYS_INLINE float32x4_t K(odd_part)(uint8x16_t w) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(w), vdupq_n_u32(0xFFFF0000)));
}
ALWAYS_INLINE vec weven(wvec x) { return (vec)ALL1(K(even_part)); }
ALWAYS_INLINE vec wodd(wvec x) { return (vec)ALL1(K(odd_part)); }

#define OWN_NUMBERS
/* One load brings the numbers of four tokens, or of one (lane 4); products take them by lane. */
typedef struct { float32x4_t four; float one; size_t lane; } svec;
ALWAYS_INLINE svec sload(const void *p, size_t t, size_t nt) {
    const uint8_t *b = p;
    if (nt < 4) return (svec){.one = load_float(b + 4 * t), .lane = 4};
    return (svec){.four = vreinterpretq_f32_u8(vld1q_u8(b + t / 4 * 16)), .lane = t % 4};
}
#define BY_LANE(name, sum, weights, text)                                                       \
    ALWAYS_INLINE sum K(name)(sum s, weights w, svec x) {                                       \
        if (x.lane == 0) __asm__(text "[0]" : "+w"(s) : "w"(w), "w"(x.four));                   \
        else if (x.lane == 1) __asm__(text "[1]" : "+w"(s) : "w"(w), "w"(x.four));              \
        else if (x.lane == 2) __asm__(text "[2]" : "+w"(s) : "w"(w), "w"(x.four));              \
        else if (x.lane == 3) __asm__(text "[3]" : "+w"(s) : "w"(w), "w"(x.four));              \
        else __asm__(text "[0]" : "+w"(s) : "w"(w), "w"(x.one));                                \
        return s;                                                                               \
    }
#define ALL_BY_LANE(f, s, w, x) {K(f)(s.a, w.a, x), K(f)(s.b, w.b, x), K(f)(s.c, w.c, x),       \
                                 K(f)(s.d, w.d, x)}
#ifdef __clang__                /* which has too few registers around asm; gcc, without, moves    */
ALWAYS_INLINE float32x4_t K(fma_lane)(float32x4_t s, float32x4_t w, svec x) {
    if (x.lane == 0) return vfmaq_laneq_f32(s, w, x.four, 0);
    if (x.lane == 1) return vfmaq_laneq_f32(s, w, x.four, 1);
    if (x.lane == 2) return vfmaq_laneq_f32(s, w, x.four, 2);
    if (x.lane == 3) return vfmaq_laneq_f32(s, w, x.four, 3);
    return vfmaq_n_f32(s, w, x.one);
}
#else
BY_LANE(fma_lane, float32x4_t, float32x4_t, "fmla %0.4s, %1.4s, %2.s")
#endif
ALWAYS_INLINE vec vfmas(vec w, svec x, vec c) { return (vec)ALL_BY_LANE(fma_lane, c, w, x); }
typedef svec pvec;
ALWAYS_INLINE pvec pload(const void *p, size_t t, size_t nt) { return sload(p, t, nt); }
#define IDOT2(sum, half, n, v, w, x, first, second)                                             \
    __asm__("smlal" half " %0.4s, %1." n "h, %3.h[" first "]\n\t"                               \
            "smlal" half " %0.4s, %2." n "h, %3.h[" second "]" : "+w"(sum) : "w"(v), "w"(w), "x"(x))
#define IDOT2_LANE(x, first, second)                                                            \
    do {                                                                                        \
        IDOT2(s.a, "", "4", w.a, w.b, x, first, second);                                        \
        IDOT2(s.b, "2", "8", w.a, w.b, x, first, second);                                       \
        IDOT2(s.c, "", "4", w.c, w.d, x, first, second);                                        \
        IDOT2(s.d, "2", "8", w.c, w.d, x, first, second);                                       \
    } while (0)
ALWAYS_INLINE ivec idot2(ivec s, wvec w, pvec x) {
    if (x.lane == 0) IDOT2_LANE(x.four, "0", "1");
    else if (x.lane == 1) IDOT2_LANE(x.four, "2", "3");
    else if (x.lane == 2) IDOT2_LANE(x.four, "4", "5");
    else if (x.lane == 3) IDOT2_LANE(x.four, "6", "7");
    else IDOT2_LANE(vdupq_n_f32(x.one), "0", "1");
    return s;
}

#define OWN_BYTES
typedef wvec bvec;
ALWAYS_INLINE uint8x16_t K(sign_part)(uint8x16_t w) { return veorq_u8(w, vdupq_n_u8(SIGN)); }
ALWAYS_INLINE uint8x16_t K(levels_part)(uint8x16_t w, uint8x16_t shift, bool low) {
    uint8x16_t q = low ? vandq_u8(w, vdupq_n_u8(15)) : vshrq_n_u8(w, 4);
    return vaddq_u8(vqtbl1q_u8(K(sign_part)(vld1q_u8(int4_levels)), q), shift);
}
#define ALL_LEVELS {K(levels_part)(w.a, shift.a, low), K(levels_part)(w.b, shift.b, low),       \
                    K(levels_part)(w.c, shift.c, low), K(levels_part)(w.d, shift.d, low)}
#if MEDRUN_PASS == 5
/* A register has two bytes of each of 8 rows. The products of two such, at most 2 * 128 * 127, fit
 * 16 bits and are then added in pairs: 12 instructions for 64 products. To widen the weights
 * beforehand and multiply by lane takes 16. */
ALWAYS_INLINE bvec K(halve_rows)(wvec w) {
    return (bvec){PICK(vuzp1q_u16, w.a, w.b), PICK(vuzp2q_u16, w.a, w.b),
                  PICK(vuzp1q_u16, w.c, w.d), PICK(vuzp2q_u16, w.c, w.d)};
}
ALWAYS_INLINE bvec bready(wvec x) { return K(halve_rows)((wvec)ALL1(K(sign_part))); }
ALWAYS_INLINE bvec blevels(wvec w, wvec shift, bool low) {
    return K(halve_rows)((wvec)ALL_LEVELS);
}
typedef struct { int8x16_t first, second; } xvec;
#define DUP(x, even, odd) __asm__("dup %0.8h, %2.h[" even "]\n\tdup %1.8h, %2.h[" odd "]"        \
                                  : "=&w"(r.first), "=w"(r.second) : "w"(x))
ALWAYS_INLINE xvec xload(const uint8_t *words, size_t t, size_t nt, size_t wide) {
    svec x = sload(words, t, nt);
    xvec r;
    (void)wide;
    if (x.lane == 0) DUP(x.four, "0", "1");
    else if (x.lane == 1) DUP(x.four, "2", "3");
    else if (x.lane == 2) DUP(x.four, "4", "5");
    else if (x.lane == 3) DUP(x.four, "6", "7");
    else DUP(x.one, "0", "1");
    return r;
}
/* In assembly: clang would extract the high halves, gcc take more registers than there are. */
ALWAYS_INLINE void K(products)(int32x4_t *s, int32x4_t *t, uint8x16_t v, uint8x16_t w, xvec x) {
    int16x8_t a, b;
    __asm__("smull %2.8h, %4.8b, %6.8b\n\t"
            "smull2 %3.8h, %4.16b, %6.16b\n\t"
            "smlal %2.8h, %5.8b, %7.8b\n\t"
            "smlal2 %3.8h, %5.16b, %7.16b\n\t"
            "sadalp %0.4s, %2.8h\n\t"
            "sadalp %1.4s, %3.8h"
            : "+w"(*s), "+w"(*t), "=&w"(a), "=&w"(b)
            : "w"(v), "w"(w), "w"(x.first), "w"(x.second));
}
ALWAYS_INLINE ivec idot4(ivec s, bvec w, xvec x) {
    K(products)(&s.a, &s.b, w.a, w.b, x);
    K(products)(&s.c, &s.d, w.c, w.d, x);
    return s;
}
#else
#if MEDRUN_PASS == 6
ALWAYS_INLINE bvec bready(wvec x) { return (bvec)ALL1(K(sign_part)); }
BY_LANE(dot_lane, int32x4_t, uint8x16_t, "sdot %0.4s, %1.16b, %2.4b")
#else
ALWAYS_INLINE bvec bready(wvec w) { return w; }
BY_LANE(dot_lane, int32x4_t, uint8x16_t, "usdot %0.4s, %1.16b, %2.4b")
BY_LANE(bf16_lane, float32x4_t, uint8x16_t, "bfdot %0.4s, %1.8h, %2.2h")
ALWAYS_INLINE vec vdot2(vec s, wvec w, svec x) { return (vec)ALL_BY_LANE(bf16_lane, s, w, x); }

/* Matrix products: 8 bytes each of two rows times those of two tokens, 32 products of bytes or 16
 * of bf16, twice those of a dot product. A pair of steps is zipped, so that a row's bytes are side
 * by side, and so are the sums of two tokens. That pays where unpack does it once for many tokens:
 * 18 instructions for 16 rows, 4 tokens and 8 columns, where usdot takes 32. For one or two tokens
 * usdot takes no more than the zips and matrix products, and for four 32 to their 26. */
#define OWN_STEPS
#define OWN_READY
ALWAYS_INLINE bvec bload(const uint8_t *p) { return wload(p); }
ALWAYS_INLINE void bstore(uint8_t *p, bvec x, bvec y) {
    wstore(p, (wvec){PICK4(vzip1q_u32, x.a, y.a), PICK4(vzip1q_u32, x.b, y.b),
                     PICK4(vzip1q_u32, x.c, y.c), PICK4(vzip1q_u32, x.d, y.d)});
    wstore(p + STEP_BYTES, (wvec){PICK4(vzip2q_u32, x.a, y.a), PICK4(vzip2q_u32, x.b, y.b),
                                  PICK4(vzip2q_u32, x.c, y.c), PICK4(vzip2q_u32, x.d, y.d)});
}
ALWAYS_INLINE int32x4_t K(matrix)(const bool bf16, int32x4_t s, uint8x16_t w, uint8x16_t x) {
    if (bf16) __asm__("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(s) : "w"(w), "w"(x));
    else __asm__("usmmla %0.4s, %1.16b, %2.16b" : "+w"(s) : "w"(w), "w"(x));
    return s;
}
ALWAYS_INLINE void K(two_tokens)(const bool bf16, ivec *s, ivec *t, wvec v, wvec w, uint8x16_t x) {
    s->a = K(matrix)(bf16, s->a, v.a, x), t->a = K(matrix)(bf16, t->a, w.a, x);
    s->b = K(matrix)(bf16, s->b, v.b, x), t->b = K(matrix)(bf16, t->b, w.b, x);
    s->c = K(matrix)(bf16, s->c, v.c, x), t->c = K(matrix)(bf16, t->c, w.c, x);
    s->d = K(matrix)(bf16, s->d, v.d, x), t->d = K(matrix)(bf16, t->d, w.d, x);
}
ALWAYS_INLINE void K(zip)(ivec *s, ivec *t) {
    ivec x = *s, y = *t;
    *s = (ivec)ALL2(vzip1q_s32), *t = (ivec)ALL2(vzip2q_s32);
}
ALWAYS_INLINE void K(unzip)(ivec *s, ivec *t) {
    ivec x = *s, y = *t;
    *s = (ivec)ALL2(vuzp1q_s32), *t = (ivec)ALL2(vuzp2q_s32);
}
/* N steps that bstore has zipped, times four tokens of a tile, are added to DOT. */
ALWAYS_INLINE void K(dot_pairs)(const bool bf16, size_t n, size_t wide, const uint8_t *steps,
                                const uint8_t *words, ivec *dot) {
    K(zip)(&dot[0], &dot[1]), K(zip)(&dot[2], &dot[3]);
    for (size_t s = 0; s < n; s += 2, steps += 2 * STEP_BYTES, words += 8 * wide) {
        wvec v = wload(steps), w = wload(steps + STEP_BYTES);
        uint8x16_t x = vld1q_u8(words), y = vld1q_u8(words + 4 * wide);
        PREFETCH(words);
        K(two_tokens)(bf16, &dot[0], &dot[1], v, w, PICK4(vzip1q_u32, x, y));
        K(two_tokens)(bf16, &dot[2], &dot[3], v, w, PICK4(vzip2q_u32, x, y));
    }
    K(unzip)(&dot[0], &dot[1]), K(unzip)(&dot[2], &dot[3]);
}
ALWAYS_INLINE ivec K(as_ints)(vec x) { return (ivec)ALL1(vreinterpretq_s32_f32); }
ALWAYS_INLINE vec K(as_floats)(ivec x) { return (vec)ALL1(vreinterpretq_f32_s32); }
ALWAYS_INLINE void K(dot_ready)(const size_t np, const size_t nt, size_t n, const weight_tile tile,
                                const uint8_t *steps, const uint8_t *words, ivec *dot) {
    (void)np, (void)nt;
    K(dot_pairs)(false, n, tile.wide, steps, words, dot);
}

ALWAYS_INLINE void K(unpack_bf16)(const uint8_t *w, size_t begin, size_t end, uint8_t *block) {
    for (size_t k = begin; k < end; k += 4, block += 2 * STEP_BYTES)
        bstore(block, wload(w + k / 2 * STEP_BYTES), wload(w + (k / 2 + 1) * STEP_BYTES));
}

/* The same bits as tile_bf16: a matrix product adds up as two dot products do. */
ALWAYS_INLINE void K(tile_ready_bf16)(const weight_tile tile) {
    ivec sum[4];
    UNROLLED for (size_t t = 0; t < 4; t++) {
        bool more = tile.begin && t < tile.live;
        sum[t] = K(as_ints)(more ? vload(tile.out + t * tile.stride) : vsplat(0));
    }
    K(dot_pairs)(true, (tile.end - tile.begin) / 2, tile.wide, tile.w,
                 tile.x + tile.begin * 2 * tile.wide, sum);
    UNROLLED for (size_t t = 0; t < 4; t++)
        if (t < tile.live) vstore(tile.out + t * tile.stride, K(as_floats)(sum[t]));
}
#endif
ALWAYS_INLINE bvec blevels(wvec w, wvec shift, bool low) { return (bvec)ALL_LEVELS; }
typedef svec xvec;
ALWAYS_INLINE xvec xload(const uint8_t *words, size_t t, size_t nt, size_t wide) {
    return (void)wide, sload(words, t, nt);
}
ALWAYS_INLINE ivec idot4(ivec s, bvec w, xvec x) { return (ivec)ALL_BY_LANE(dot_lane, s, w, x); }
#endif
#endif

/* ---- words with a default: an instruction set may do a whole block its own way -------------- */

#ifndef OWN_NUMBERS             /* a number is loaded onto all lanes at once                     */
typedef vec svec;
ALWAYS_INLINE svec sload(const void *p, size_t t, size_t nt) {
    return (void)nt, vsplat(load_float((const uint8_t *)p + 4 * t));
}
ALWAYS_INLINE vec vfmas(vec x, svec y, vec c) { return vfma(x, y, c); }
#endif

#ifndef OWN_BYTES               /* an instruction multiplies bytes as they lie                   */
typedef wvec bvec;
ALWAYS_INLINE bvec bready(wvec w) { return w; }
#endif

#ifndef OWN_STEPS
ALWAYS_INLINE bvec bload(const uint8_t *p) { return wload(p); }
ALWAYS_INLINE void bstore(uint8_t *p, bvec first, bvec second) {
    wstore(p, first);
    wstore(p + STEP_BYTES, second);
}
#endif

#ifndef BF16_NAME               /* no row names a matmul that would use it                       */
ALWAYS_INLINE vec vdot2(vec acc, wvec w, xvec x) { return (void)w, (void)x, acc; }
#endif

ALWAYS_INLINE ivec ibias(const uint8_t *p) {
    return isplat(SIGN ? 0 : (int32_t)load_word(p));
}

/* Bytes of a step that is ready to be multiplied, and of 64 columns of a panel that is unpacked:
 * 2 x 16 scales in float, then 16 steps. */
enum { K(READY) = sizeof(bvec), K(UNPACKED) = 2 * STEP_BYTES + GROUP / 4 * sizeof(bvec) };

/* Adds the products of four columns: NP panels' steps times NT tokens of a tile. */
ALWAYS_INLINE void K(add_products)(const size_t np, const size_t nt, size_t wide, const bvec *step,
                                   const uint8_t *words, ivec *dot) {
    UNROLLED for (size_t t = 0; t < nt; t++) {
        xvec four = xload(words, t, nt, wide);
        UNROLLED for (size_t p = 0; p < np; p++)
            dot[p * nt + t] = idot4(dot[p * nt + t], step[p], four);
    }
}

#ifndef OWN_READY
/* N steps that unpack has made ready, times NT tokens, are added to DOT. Returns the tile's next
 * words, of which a line of 64 bytes, asked for once, holds 16; but int4 (8 steps) is faster asked
 * for every second step where a word has 8 bytes (AVX2), too. */
ALWAYS_INLINE void K(dot_ready)(const size_t np, const size_t nt, size_t n, const weight_tile tile,
                                const uint8_t *steps, const uint8_t *words, ivec *dot) {
    for (size_t s = 0; s < n; s += 2)
        UNROLLED for (size_t i = 0; i < 2; i++) {
            bvec step[4];
            if (i == 0 || (X_BYTES == 8 && n > 8)) PREFETCH(words);
            UNROLLED for (size_t p = 0; p < np; p++) step[p] = bload(steps + p * tile.bytes);
            K(add_products)(np, nt, tile.wide, step, words, dot);
            steps += K(READY), words += X_BYTES * tile.wide;
        }
}

/* bf16 weights are multiplied as they lie. */
ALWAYS_INLINE void K(unpack_bf16)(const uint8_t *w, size_t begin, size_t end, uint8_t *block) {
    (void)w, (void)begin, (void)end, (void)block;
}
ALWAYS_INLINE void K(tile_ready_bf16)(const weight_tile tile) { (void)tile; }
#endif

/* ---- the sentences ------------------------------------------------------------------------- */

/* x = n ln 2 + r with |r| <= ln 2 / 2; then (e^r - 1 - r) / r^2 by the Taylor series to r^7. */
ALWAYS_INLINE vec vexp_bend(vec x, ivec *n, vec *r) {
    *n = vround(vmul(x, vsplat(1.44269504f)));
    *r = vfma(vfloat(*n), vsplat(-0.693359375f), x);
    *r = vfma(vfloat(*n), vsplat(2.12194440e-4f), *r);
    vec p = vsplat(1.0f / 5040);
    p = vfma(p, *r, vsplat(1.0f / 720));
    p = vfma(p, *r, vsplat(1.0f / 120));
    p = vfma(p, *r, vsplat(1.0f / 24));
    p = vfma(p, *r, vsplat(1.0f / 6));
    return vfma(p, *r, vsplat(0.5f));
}

/* e^x within 2 ulp for x <= 87; 0 below -86. exp(0) is exactly 1. */
ALWAYS_INLINE vec vexp(vec x) {
    vec low = vsplat(-86.0f), r;
    ivec n;
    vec p = vexp_bend(vmax(x, low), &n, &r);
    p = vfma(p, r, vsplat(1.0f));
    p = vfma(p, r, vsplat(1.0f));
    return vless(x, low, vsplat(0), vscale2(p, n));
}

/* e^x - 1 for x <= 0 without losing what is small: (e^r - 1) 2^n + (2^n - 1). */
ALWAYS_INLINE vec vexpm1(vec x) {
    vec one = vsplat(1), r;
    ivec n;
    vec p = vexp_bend(vmax(x, vsplat(-86.0f)), &n, &r), power = vscale2(one, n);
    p = vfma(vmul(p, r), r, r);
    return vfma(p, power, vsub(power, one));
}

#ifndef PARTIAL
/* Section 5's turn_group: each round puts the sums and differences of the halves side by side, so
 * that the next finds in the halves what it needs (Pease 1968). After six all are in place. */
ALWAYS_INLINE void K(turn_vecs)(vec v[4]) {
    UNROLLED for (int i = 0; i < 4; i++) v[i] = vmul(v[i], vsplat(0.125f));
    UNROLLED for (int round = 0; round < 6; round++) {
        vec sum = vadd(v[0], v[2]), difference = vsub(v[0], v[2]);
        vec sum2 = vadd(v[1], v[3]), difference2 = vsub(v[1], v[3]);
        v[0] = vzip(sum, difference, false), v[1] = vzip(sum, difference, true);
        v[2] = vzip(sum2, difference2, false), v[3] = vzip(sum2, difference2, true);
    }
}

/* N numbers, at most a group, turned or not; zeros behind them. CLAMP: first to what an f16 can be.
 * Returns their largest magnitude. */
static float K(load_group)(const float *x, size_t n, bool turned, bool clamp, vec v[4]) {
    vec big = vsplat(0), most = vsplat(65504.0f), least = vsplat(-65504.0f);
    UNROLLED for (size_t i = 0; i < 4; i++) {
        v[i] = 16 * i < n ? vload(x + 16 * i) : vsplat(0);
        if (clamp) v[i] = vmax(v[i], least), v[i] = vless(v[i], most, v[i], most);
    }
    if (turned && n == GROUP) K(turn_vecs)(v);
    UNROLLED for (int i = 0; i < 4; i++) big = vmax(big, vmax(v[i], vsub(vsplat(0), v[i])));
    return vlargest(big);
}

/* A token's GROUP whole numbers to its places in a tile of NT tokens. PACK_INT16 has the first and
 * third of four in a word, then the second and fourth: so AVX2 finds the bytes of its weights. */
static void K(pack_words)(int kind, const int8_t *q, size_t nt, uint8_t *out) {
    if (kind == PACK_INT8) {
        for (size_t i = 0; i < GROUP / 4; i++) memcpy(out + 4 * i * nt, q + 4 * i, 4);
        return;
    }
    for (size_t i = 0; i < GROUP / 2; i++) {
        const int16_t pair[2] = {q[i / 2 * 4 + i % 2], q[i / 2 * 4 + i % 2 + 2]};
        memcpy(out + 4 * i * nt, pair, 4);
    }
}

/* A tile of LIVE tokens, one group after the other: scale = largest magnitude / 127, q = x / scale.
 * The groups of a tile that is not full end with tokens of zeros. */
static void K(pack_int)(int kind, bool turned, const float *x, size_t stride, size_t cols,
                        size_t live, uint8_t *out) {
    size_t nt = tile_width(live);
    for (size_t k = 0; k < cols; k += GROUP, out += pack_bytes(kind, GROUP, nt)) {
        for (size_t t = 0; t < nt; t++) {
            const float *from = x + t * stride + k;
            size_t n = t >= live ? 0 : cols - k < GROUP ? cols - k : GROUP;
            vec v[4];
            float largest = K(load_group)(from, n, turned, false, v);
            bool tiny = largest < 1e-30f;
            float scale = tiny ? 0 : largest / 127.0f;
            vec inverse = vsplat(tiny ? 0 : 127.0f / largest);
            int8_t q[GROUP];
            int32_t sum[2] = {0};
            UNROLLED for (int i = 0; i < 4; i++) istore8(q + 16 * i, vround(vmul(v[i], inverse)));
            for (size_t i = 0; i < GROUP4; i++) sum[0] += q[i], sum[1] += q[GROUP4 + i];
            sum[0] *= -128, sum[1] *= -128;
            memcpy(out + 4 * t, &sum[0], 4);
            memcpy(out + 4 * (nt + t), &sum[1], 4);
            memcpy(out + 4 * (2 * nt + t), &scale, 4);
            K(pack_words)(kind, q, nt, out + 4 * (3 * nt + t));
        }
    }
}

static void K(pack)(int kind, bool turned, const float *x, size_t stride, size_t cols,
                    size_t tokens, uint8_t *out) {
    for (size_t t = 0, nt; t < tokens; t += nt, out += pack_bytes(kind, cols, nt)) {
        const float *from = x + t * stride;
        nt = tile_width(tokens - t);
        size_t live = tokens - t < nt ? tokens - t : nt;
        if (kind == PACK_INT8 || kind == PACK_INT16) {
            K(pack_int)(kind, turned, from, stride, cols, live, out);
            continue;
        }
        if (live < nt) memset(out, 0, pack_bytes(kind, cols, nt));
        for (size_t i = 0; i < live; i++, from += stride) {
            if (kind == PACK_F32)
                for (size_t k = 0; k < cols; k++) memcpy(out + 4 * (k * nt + i), from + k, 4);
            else for (size_t k = 0; k < cols; k += 2) {
                uint32_t pair = f32_to_bf16(from[k]) | (uint32_t)f32_to_bf16(from[k + 1]) << 16;
                memcpy(out + 4 * (k / 2 * nt + i), &pair, 4);
            }
        }
    }
}

#endif

/* The tiles of a matmul. A tile is NP panels, of 16 outputs each, times NT tokens:
 *
 *                token 0    token 1    ...
 *     panel 0    sum[0]     sum[1]           a sum is a vec: 16 outputs of one token
 *     panel 1    sum[NT]    sum[NT + 1]
 *
 * So a step of weights is loaded once for NT tokens, and a token's number once for NP panels: that
 * is why a prompt takes less time for a token than an answer does. NP and NT are constants after
 * inlining, the loops over them are unrolled, and the sums are registers. Each sum is one chain in
 * the order of K, whatever NP and NT are, so the choice of a tile changes no bit. */
ALWAYS_INLINE void K(load_sums)(const size_t np, const size_t nt, const weight_tile tile,
                                vec *sum) {
    UNROLLED for (size_t i = 0; i < np * nt; i++) {
        bool more = tile.begin && i % nt < tile.live;
        sum[i] = more ? vload(sum_place(tile.out, tile.stride, nt, i)) : vsplat(0);
    }
}

ALWAYS_INLINE void K(store_sums)(const size_t np, const size_t nt, const weight_tile tile,
                                 const vec *sum) {
    UNROLLED for (size_t i = 0; i < np * nt; i++)
        if (i % nt < tile.live) vstore(sum_place(tile.out, tile.stride, nt, i), sum[i]);
}

/* bf16 weights times floats. A step of a panel is (16 rows, 2 columns); a bf16 is the upper half of
 * a float, so the columns of even and odd number are widened by a shift and by a mask, exactly.
 * Then sum = fma(weight, x, sum), first the even column, then the odd one. */
ALWAYS_INLINE void K(tile_f32)(const size_t np, const size_t nt, const weight_tile tile) {
    const uint8_t *w = tile.w + tile.begin / 2 * STEP_BYTES;
    const uint8_t *x = tile.x + tile.begin * 4 * tile.wide;
    vec sum[16];
    K(load_sums)(np, nt, tile, sum);
    for (size_t k = tile.begin; k < tile.end; k += 2, w += STEP_BYTES, x += 8 * tile.wide) {
        vec even[4], odd[4];
        PREFETCH(np > 1 ? x : w);
        UNROLLED for (size_t p = 0; p < np; p++) {
            wvec step = wload(w + p * tile.bytes);
            even[p] = weven(step), odd[p] = wodd(step);
        }
        UNROLLED for (size_t t = 0; t < nt; t++) {
            svec first = sload(x, t, nt), second = sload(x + 4 * tile.wide, t, nt);
            UNROLLED for (size_t p = 0; p < np; p++) {
                vec s = vfmas(even[p], first, sum[p * nt + t]);
                sum[p * nt + t] = vfmas(odd[p], second, s);
            }
        }
    }
    K(store_sums)(np, nt, tile, sum);
}

/* bf16 weights times bf16: the processor adds the products of two columns as it does. */
ALWAYS_INLINE void K(tile_bf16)(const size_t np, const size_t nt, const weight_tile tile) {
    const uint8_t *w = tile.w + tile.begin / 2 * STEP_BYTES;
    const uint8_t *x = tile.x + tile.begin * 2 * tile.wide;
    vec sum[16];
    K(load_sums)(np, nt, tile, sum);
    for (size_t k = tile.begin; k < tile.end; k += 2, w += STEP_BYTES, x += 4 * tile.wide) {
        wvec step[4];
        PREFETCH(np > 1 ? x : w);
        UNROLLED for (size_t p = 0; p < np; p++) step[p] = wload(w + p * tile.bytes);
        UNROLLED for (size_t t = 0; t < nt; t++) {
            xvec two = xload(x, t, nt, tile.wide);
            UNROLLED for (size_t p = 0; p < np; p++)
                sum[p * nt + t] = vdot2(sum[p * nt + t], step[p], two);
        }
    }
    K(store_sums)(np, nt, tile, sum);
}

/* Columns [BEGIN, END) of a panel -> BLOCK, which all tokens then use. A group of 64 columns
 * becomes 2 x 16 scales in float (int8: only the first 16) and 16 steps of four columns as idot4
 * wants them. That takes more bytes than the panel, but the block stays in the second cache, and
 * what it costs to look up levels and to widen is paid once for all tokens. */
ALWAYS_INLINE void K(unpack)(const int type, const uint8_t *w, size_t begin, size_t end,
                             uint8_t *block) {
    if (type == TYPE_BF16) {
        K(unpack_bf16)(w, begin, end, block);
        return;
    }
    for (size_t g = begin / GROUP; g * GROUP < end; g++, block += K(UNPACKED)) {
        uint8_t *steps = block + 2 * STEP_BYTES;
        if (type == TYPE_INT8) {
            vstore((float *)(void *)block, vload_bf16(w + group_scales(TYPE_INT8, g)));
            for (size_t s = 0; s < GROUP / 4; s += 2, steps += 2 * K(READY)) {
                const uint8_t *from = w + group_steps(TYPE_INT8, g) + s * STEP_BYTES;
                bstore(steps, bready(wload(from)), bready(wload(from + STEP_BYTES)));
            }
        } else for (size_t h = 0; h < 2; h++) {
            const uint8_t *scales = w + group_scales(TYPE_INT4, 2 * g + h);
            wvec shift = wshift(scales);
            vec scale = vmul(vload_int4(scales), vsplat(0x1p-13f));
            vstore((float *)(void *)(block + h * STEP_BYTES), scale);
            UNROLLED for (size_t s = 0; s < GROUP4 / 8; s++, steps += 2 * K(READY)) {
                wvec step = wload(w + group_steps(TYPE_INT4, 2 * g + h) + s * STEP_BYTES);
                bstore(steps, blevels(step, shift, true), blevels(step, shift, false));
            }
        }
    }
}

/* The steps of an int8 group as they lie in their panels, times NT tokens. */
ALWAYS_INLINE void K(dot_int8)(const size_t np, const size_t nt, const weight_tile tile,
                               const uint8_t *steps, const uint8_t *words, ivec *dot) {
    for (size_t s = 0; s < GROUP / 4; s++, steps += STEP_BYTES, words += X_BYTES * tile.wide) {
        bvec step[4];
        PREFETCH(np > 1 ? words : steps);
        UNROLLED for (size_t p = 0; p < np; p++) step[p] = bready(wload(steps + p * tile.bytes));
        K(add_products)(np, nt, tile.wide, step, words, dot);
    }
}

/* int8 weights times int8: a group's products are added exactly as whole numbers, beginning with
 * what undoes the weights' + 128; then sum = fma(products, weights' scale * token's scale, sum).
 * READY: the weights are blocks that unpack made. */
ALWAYS_INLINE void K(tile_int8)(const bool ready, const size_t np, const size_t nt,
                                const weight_tile tile) {
    const uint8_t *w = tile.w, *x = tile.x + tile.begin / GROUP * tile.wide * X_GROUP;
    vec sum[16];
    K(load_sums)(np, nt, tile, sum);
    for (size_t g = tile.begin / GROUP; g * GROUP < tile.end; g++, x += tile.wide * X_GROUP) {
        const uint8_t *words = x + 12 * tile.wide;
        ivec dot[16];
        UNROLLED for (size_t i = 0; i < np * nt; i++)
            dot[i] = iadd(ibias(x + 4 * (i % nt)), ibias(x + 4 * (tile.wide + i % nt)));
        if (ready) K(dot_ready)(np, nt, GROUP / 4, tile, w + 2 * STEP_BYTES, words, dot);
        else K(dot_int8)(np, nt, tile, w + group_steps(TYPE_INT8, g), words, dot);
        UNROLLED for (size_t i = 0; i < np * nt; i++) {
            const uint8_t *from = w + i / nt * tile.bytes;
            vec scale = ready ? vload((const float *)(const void *)from)
                              : vload_bf16(from + group_scales(TYPE_INT8, g));
            scale = vmul(scale, vsplat(load_float(x + 4 * (2 * tile.wide + i % nt))));
            sum[i] = vfma(vfloat(dot[i]), scale, sum[i]);
        }
        if (ready) w += K(UNPACKED);
    }
    K(store_sums)(np, nt, tile, sum);
}

/* The steps of an int4 group of 32 columns as they lie in their panels, times NT tokens. A step has
 * eight columns: four in the low nibbles, four in the high ones. */
ALWAYS_INLINE void K(dot_int4)(const size_t np, const size_t nt, const weight_tile tile,
                               const uint8_t *scales, const uint8_t *steps, const uint8_t *words,
                               ivec *dot) {
    wvec shift[4];
    UNROLLED for (size_t p = 0; p < np; p++) shift[p] = wshift(scales + p * tile.bytes);
    for (size_t s = 0; s < GROUP4 / 8; s++, steps += STEP_BYTES) {
        wvec step[4];
        PREFETCH(steps);
        UNROLLED for (size_t p = 0; p < np; p++) step[p] = wload(steps + p * tile.bytes);
        UNROLLED for (size_t high = 0; high < 2; high++, words += X_BYTES * tile.wide) {
            bvec four[4];
            UNROLLED for (size_t p = 0; p < np; p++) four[p] = blevels(step[p], shift[p], !high);
            K(add_products)(np, nt, tile.wide, four, words, dot);
        }
    }
}

/* int4 weights times int8 activations, for NP panels and NT tokens.
 *
 * A weight is scale * (level[q] + shift), where q is its nibble. blevels looks up all 64 levels of
 * half a step with one instruction and adds the shift, which gives unsigned bytes: level[q] +
 * shift + 128. So the products are those of int8, and ibias takes the 128 away. A group of 64
 * columns has one scale of the token, but two halves of 32 columns with a scale and a shift of the
 * weights each:
 *
 *     dot  = the 32 products of a half, added exactly as whole numbers
 *     part = first half's dot * its scale, then fma(second half's dot, its scale, part)
 *     sum  = fma(part, token's scale, sum)
 *
 * dot, part and sum are (NP, NT), of 16 lanes each. The sums lie in memory, because the registers
 * are for dot and part: a sum is touched once in a group only. READY: W is blocks that unpack made,
 * else panels as they lie, whose scales are widened here each time. */
ALWAYS_INLINE void K(tile_int4)(const bool ready, const size_t np, const size_t nt,
                                const weight_tile tile) {
    const size_t group_bytes = ready ? K(UNPACKED) : 2 * GROUP4_BYTES + STEP_BYTES;
    const uint8_t *w = tile.w, *x = tile.x + tile.begin / GROUP * tile.wide * X_GROUP;
    float sum[16 * 16];
    vec part[16];
    for (size_t i = 0; i < np * nt; i++) {
        bool more = tile.begin && i % nt < tile.live;
        vstore(sum + 16 * i, more ? vload(sum_place(tile.out, tile.stride, nt, i)) : vsplat(0));
    }
    if (!ready) w += group_scales(TYPE_INT4, tile.begin / GROUP4);
    for (size_t k = tile.begin; k < tile.end; k += GROUP, x += tile.wide * X_GROUP) {
        UNROLLED for (size_t h = 0; h < 2; h++) {
            const uint8_t *words = x + (12 + h * (GROUP4 / 4) * X_BYTES) * tile.wide;
            const uint8_t *scales = w + h * (ready ? STEP_BYTES : STEP_BYTES / 2);
            const uint8_t *steps = w + (ready ? 2 * STEP_BYTES + h * 8 * K(READY)
                                              : group_steps(TYPE_INT4, h));
            ivec dot[16];
            UNROLLED for (size_t i = 0; i < np * nt; i++)
                dot[i] = ibias(x + 4 * (h * tile.wide + i % nt));
            if (ready) K(dot_ready)(np, nt, GROUP4 / 4, tile, steps, words, dot);
            else K(dot_int4)(np, nt, tile, scales, steps, words, dot);
            UNROLLED for (size_t i = 0; i < np * nt; i++) {
                const uint8_t *from = scales + i / nt * tile.bytes;
                vec scale = ready ? vload((const float *)(const void *)from)
                                  : vmul(vload_int4(from), vsplat(0x1p-13f));
                part[i] = h ? vfma(vfloat(dot[i]), scale, part[i]) : vmul(vfloat(dot[i]), scale);
            }
        }
        UNROLLED for (size_t i = 0; i < np * nt; i++) {
            vec scale = vsplat(load_float(x + 4 * (2 * tile.wide + i % nt)));
            vstore(sum + 16 * i, vfma(part[i], scale, vload(sum + 16 * i)));
        }
        w += group_bytes;
    }
    for (size_t i = 0; i < np * nt; i++)
        if (i % nt < tile.live)
            vstore(sum_place(tile.out, tile.stride, nt, i), vload(sum + 16 * i));
}

ALWAYS_INLINE void K(run_tile)(const matmul_plan plan, const bool ready, const size_t np,
                               const size_t nt, const weight_tile tile) {
    if (plan.type == TYPE_INT8) K(tile_int8)(ready, np, nt, tile);
    else if (plan.type == TYPE_INT4) K(tile_int4)(ready, np, nt, tile);
    else if (plan.kind == PACK_F32) K(tile_f32)(np, nt, tile);
    else if (ready) K(tile_ready_bf16)(tile);
    else K(tile_bf16)(np, nt, tile);
}

/* One panel times NT tokens: makes NT a constant. Where a lane is a loop, it need not be one. */
ALWAYS_INLINE void K(run_small)(const matmul_plan plan, size_t nt, const weight_tile tile) {
    if (LANE_LOOPS) K(run_tile)(plan, false, 1, nt, tile);
    else if (nt == FEW_TOKENS) K(run_tile)(plan, false, 1, FEW_TOKENS, tile);
    else if (nt == 4) K(run_tile)(plan, false, 1, 4, tile);
    else if (nt == 2) K(run_tile)(plan, false, 1, 2, tile);
    else K(run_tile)(plan, false, 1, 1, tile);
}

/* NP panels times NT tokens. BIG: the same where they are as many panels as many tokens take, which
 * may lie in blocks. */
ALWAYS_INLINE void K(run_panels)(const matmul_plan plan, bool many, size_t np, size_t nt,
                                 weight_tile tile, const weight_tile big) {
    if (many && nt == TILE_TOKENS) K(run_tile)(plan, plan.ready, plan.together, TILE_TOKENS, big);
    else if (many && plan.together > 1 && nt == 2)
        K(run_tile)(plan, plan.ready, plan.together, 2, big);
    else if (many && plan.together > 1) K(run_tile)(plan, plan.ready, plan.together, 1, big);
    else if (np == plan.alone && nt == 1) K(run_tile)(plan, false, plan.alone, 1, tile);
    else for (size_t p = 0; p < np; p++, tile.w += tile.bytes, tile.out += LANES)
        K(run_small)(plan, nt, tile);
}

/* The body of every matmul; PLAN is constant, so each matmul keeps only what it needs of it.
 *
 *     for panels, NP at once           their weights come from memory once
 *       for columns [k, end)           a block of them stays in the second cache
 *         for tiles of 8 tokens, then for as many of those as a tile takes
 *
 * A few tokens take the panels one by one (plan.alone at once for a single token), so that the
 * weights come from memory as one stream, which the processor reads ahead best. For many tokens
 * plan.together panels at once use a token's numbers more often. */
ALWAYS_INLINE void K(matmul_with)(const matmul_plan plan, const matmul_part *part) {
    const matmul_part m = *part;
    size_t bytes = panel_bytes(plan.type, m.cols), row = pack_bytes(plan.kind, m.cols, 1);
    const uint8_t *w = m.w;
    float *out = m.out;
    for (size_t p = 0, np; p < m.panels; p += np, w += np * bytes, out += LANES * np) {
        bool many = m.tokens > TILE && m.panels - p >= plan.together;
        np = many ? plan.together : m.tokens == 1 && m.panels - p >= plan.alone ? plan.alone : 1;
        for (size_t k = 0, end; k < m.cols; k = end) {
            end = m.cols_per_block < m.cols - k ? k + m.cols_per_block : m.cols;
            size_t block_bytes = (end - k + GROUP - 1) / GROUP * K(UNPACKED);
            if (plan.ready && many)
                for (size_t i = 0; i < np; i++)
                    K(unpack)(plan.type, w + i * bytes, k, end, m.block + i * block_bytes);
            for (size_t t = 0, wide; t < m.tokens; t += wide) {
                wide = tile_width(m.tokens - t);
                for (size_t u = 0, nt; u < wide && t + u < m.tokens; u += nt) {
                    size_t live = m.tokens - t - u, most = many ? TILE_TOKENS : FEW_TOKENS;
                    weight_tile tile = {live, wide, bytes, k, end, m.stride, w,
                                        m.x + t * row + 4 * u, out + (t + u) * m.stride};
                    weight_tile big = tile;
                    if (plan.ready) big.w = m.block, big.bytes = block_bytes;
                    nt = wide > most ? most : wide;
                    if (!LANE_LOOPS && nt > tile_width(live)) nt = tile_width(live);
                    if (LANE_LOOPS && nt > live) nt = live;
                    K(run_panels)(plan, many, np, nt, tile, big);
                }
            }
        }
    }
}

#ifndef PARTIAL
static void K(matmul_f32)(const matmul_part *m) {
    K(matmul_with)((matmul_plan){TYPE_BF16, PACK_F32, 2, TILE_PANELS, false}, m);
}
#endif
#ifdef BF16_NAME
static void K(matmul_bf16)(const matmul_part *m) {
    const bool ready = READY_TYPES >> TYPE_BF16 & 1;
    K(matmul_with)((matmul_plan){TYPE_BF16, PACK_BF16, 1, TILE_PANELS, ready}, m);
}
#endif
static void K(matmul_int8)(const matmul_part *m) {
    const bool ready = READY_TYPES >> TYPE_INT8 & 1;
    K(matmul_with)((matmul_plan){TYPE_INT8, INT_PACK, 1, INT_PANELS, ready}, m);
}
static void K(matmul_int4)(const matmul_part *m) {
    const bool ready = READY_TYPES >> TYPE_INT4 & 1;
    K(matmul_with)((matmul_plan){TYPE_INT4, INT_PACK, 1, INT_PANELS, ready}, m);
}

#ifndef PARTIAL
/* RMSNorm (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight. */
static void K(norm)(float *out, const float *x, const float *weight, size_t n, float eps) {
    vec squares = vsplat(0);
    for (size_t i = 0; i < n; i += 16) squares = vfma(vload(x + i), vload(x + i), squares);
    vec scale = vsplat(1.0f / sqrtf(vsum(squares) / (float)n + eps));
    for (size_t i = 0; i < n; i += 16)
        vstore(out + i, vmul(vmul(vload(x + i), scale), vload(weight + i)));
}

/* silu(z) = z / (1 + e^-z), with -z kept at 87 at most, as far as vexp goes. */
static void K(silu_mul)(float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        vec z = vload(gate + i), most = vsplat(87.0f), minus = vsub(vsplat(0), z);
        vec e = vexp(vless(minus, most, minus, most));
        vstore(gate + i, vmul(vdiv(z, vadd(vsplat(1), e)), vload(up + i)));
    }
}

static void K(relu2)(float *x, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        vec z = vmax(vload(x + i), vsplat(0));
        vstore(x + i, vmul(z, z));
    }
}

static void K(xielu)(float *x, size_t n, const xielu_numbers *a) {
    vec eps = vsplat(a->eps), zero = vsplat(0);
    for (size_t i = 0; i < n; i += 16) {
        vec z = vload(x + i), line = vmul(vsplat(a->beta), z);
        vec bend = vsub(vexpm1(vless(z, eps, z, eps)), z);
        vec right = vadd(vmul(vmul(vsplat(a->positive), z), z), line);
        vec left = vadd(vmul(vsplat(a->negative), bend), line);
        vstore(x + i, vless(zero, z, right, left));
    }
}

static void K(add)(float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i += 16) vstore(x + i, vadd(vload(x + i), vload(y + i)));
}

/* To f16, clamped: an infinity in the cache would spoil every score and sum that it meets. */
static void K(to_half)(uint16_t *out, const float *x, size_t n) {
    vec most = vsplat(65504.0f), least = vsplat(-65504.0f);
    for (size_t i = 0; i < n; i += 16) {
        vec v = vmax(vload(x + i), least);
        vstore_f16(out + i, vless(v, most, v, most));
    }
}

/* Numbers that fit a register -> 16 bits. Returns what they were divided by. */
static float K(round16)(int16_t *out, const float *x, size_t n) {
    vec big = vsplat(0);
    for (size_t i = 0; i < n; i += 16)
        big = vmax(big, vmax(vload(x + i), vsub(vsplat(0), vload(x + i))));
    float largest = vlargest(big);
    bool tiny = largest < 1e-30f;
    vec inverse = vsplat(tiny ? 0 : 32767.0f / largest);
    for (size_t i = 0; i < n; i += 16) istore16(out + i, vround(vmul(vload(x + i), inverse)));
    return tiny ? 0 : largest / 32767.0f;
}

/* Clamped, so that no sum of them overflows, and turned; rounded with the bf16 scale. */
static void K(to_int8)(int8_t *out, uint16_t *scales, const float *x, size_t n) {
    for (size_t g = 0; g < n; g += GROUP, scales++) {
        size_t own = n - g < GROUP ? n - g : GROUP;
        vec v[4];
        float largest = K(load_group)(x + g, own, true, true, v);
        *scales = largest < 1e-30f ? 0 : f32_to_bf16_up(largest / 127.0f);
        vec scale = vsplat(*scales ? bf16_to_f32(*scales) : INFINITY);
        for (size_t i = 0; i < own; i += 16)
            istore8(out + g + i, vround(vdiv(v[i / 16], scale)));
    }
}

/* The whole groups of N numbers, turned. */
static void K(turn)(float *x, size_t n) {
    for (; n >= GROUP; x += GROUP, n -= GROUP) {
        vec v[4];
        K(load_group)(x, GROUP, true, false, v);
        UNROLLED for (int i = 0; i < 4; i++) vstore(x + 16 * i, v[i]);
    }
}

/* Queries -> tile after tile, in the order of head_dim, the tile's queries side by side. */
static void K(pack_queries)(const attention *a) {
    float *to = a->scratch;
    for (size_t t = 0, nt; t < a->n; t += nt, to += nt * a->head_dim) {
        nt = query_tile(a, t);
        for (size_t i = 0; i < nt; i++)
            for (size_t d = 0; d < a->head_dim; d++)
                to[d * nt + i] = t + i < a->n ? a->q[t + i][d] : 0;
    }
}

/* The same for an int8 cache: a tile is (head_dim / 2, nt) pairs of int16, (groups, nt) scales. */
static void K(pack_int16)(const attention *a) {
    float *to = a->scratch;
    for (size_t t = 0, nt; t < a->n; t += nt, to += nt * a->head_dim) {
        nt = query_tile(a, t);
        memset(to, 0, nt * a->head_dim * sizeof *to);
        for (size_t i = 0; i < nt && t + i < a->n; i++)
            for (size_t g = 0; g < a->head_dim; g += GROUP) {
                size_t n = a->head_dim - g < GROUP ? a->head_dim - g : GROUP;
                float turned[GROUP];
                int16_t q[GROUP];
                memcpy(turned, a->q[t + i] + g, n * sizeof *turned);
                K(turn)(turned, n);
                to[(a->head_dim / 2 + g / GROUP) * nt + i] = K(round16)(q, turned, n) * a->scale;
                for (size_t d = 0; d < n; d += 2) memcpy(to + (g + d) / 2 * nt + i, q + d, 4);
            }
    }
}

/* out[t][j] = scale * q[t] . key[first + j] for NT packed queries q (head_dim, NT) and NP panels of
 * keys (head_dim, 16). A lane is a key, so 16 scores add up side by side, each one chain in the
 * order of head_dim, and no sum crosses lanes. The next panels are asked for meanwhile. */
TILED void K(score_tile)(const size_t np, const size_t nt, const bool half, const attention *a,
                         size_t first, const float *q, float *out) {
    vec sum[16], scale = vsplat(a->scale);
    size_t at = first * a->head_dim, panel = 16 * a->head_dim;
    uintptr_t next = (uintptr_t)a->keys + 2 * (at + np * panel);
    UNROLLED for (size_t i = 0; i < np * nt; i++) sum[i] = vsplat(0);
    for (size_t d = 0; d < a->head_dim; d++, at += 16, q += nt, next += 32 * np) {
        vec key[4];
        if (half) fetch_ahead(next, 32 * np);
        UNROLLED for (size_t p = 0; p < np; p++)
            key[p] = half ? vload_f16((const uint16_t *)a->keys + at + p * panel)
                          : vload((const float *)a->keys + at + p * panel);
        UNROLLED for (size_t t = 0; t < nt; t++) {
            svec x = sload(q, t, nt);
            UNROLLED for (size_t p = 0; p < np; p++)
                sum[p * nt + t] = vfmas(key[p], x, sum[p * nt + t]);
        }
    }
    UNROLLED for (size_t i = 0; i < np * nt; i++)
        vstore(sum_place(out, KEY_BLOCK, nt, i), vmul(sum[i], scale));
}

/* The same for int8 keys: the groups' exact sums, scaled, are added in their order. */
TILED void K(score_int8)(const size_t np, const size_t nt, const attention *a, size_t first,
                         const float *q, float *out) {
    size_t panel = cache_panel(MEDRUN_KV_INT8, a->head_dim);
    const int8_t *keys = (const int8_t *)a->keys + first / 16 * panel;
    uintptr_t next = (uintptr_t)keys + np * panel;
    const uint8_t *scales = (const uint8_t *)keys + 16 * a->head_dim;
    const float *factor = q + a->head_dim / 2 * nt;
    for (size_t g = 0; g < a->head_dim; g += GROUP, factor += nt, scales += 32) {
        size_t end = a->head_dim - g < GROUP ? a->head_dim : g + GROUP;
        ivec dot[16];
        UNROLLED for (size_t i = 0; i < np * nt; i++) dot[i] = isplat(0);
        for (size_t d = g; d < end; d += 2, keys += 32, q += nt, next += 32 * np) {
            wvec key[4];
            fetch_ahead(next, 32 * np);
            UNROLLED for (size_t p = 0; p < np; p++) key[p] = wload_int8(keys + p * panel);
            UNROLLED for (size_t t = 0; t < nt; t++) {
                pvec two = pload(q, t, nt);
                UNROLLED for (size_t p = 0; p < np; p++)
                    dot[p * nt + t] = idot2(dot[p * nt + t], key[p], two);
            }
        }
        UNROLLED for (size_t i = 0; i < np * nt; i++) {
            float *to = sum_place(out, KEY_BLOCK, nt, i);
            vec scale = vmul(vload_bf16(scales + i / nt * panel), vsplat(factor[i % nt]));
            vstore(to, vfma(vfloat(dot[i]), scale, g ? vload(to) : vsplat(0)));
        }
    }
}

/* KEY_STEP keys and a tile of queries, by as many panels as there are registers for. */
TILED void K(score_step)(const size_t np, const size_t nt, const attention *a, size_t first,
                         const float *q, float *out) {
    for (size_t i = 0; i < KEY_STEP; i += 16 * np)
        if (a->kv == MEDRUN_KV_INT8) K(score_int8)(np, nt, a, first + i, q, out + i);
        else if (a->kv == MEDRUN_KV_F16) K(score_tile)(np, nt, true, a, first + i, q, out + i);
        else K(score_tile)(np, nt, false, a, first + i, q, out + i);
}

/* Scores of all queries with the block of keys from FIRST on: a few panels stay in the first cache
 * while the queries pass. What a tile does not see is left out by KEY_STEP keys. */
static void K(score_block)(const attention *a, size_t first) {
    for (size_t j = 0; j < KEY_BLOCK; j += KEY_STEP)
        for (size_t t = 0, nt, low, high; t < a->n; t += nt) {
            const float *q = a->scratch + t * a->head_dim;
            float *out = a->scratch + QUERIES * a->head_dim + t * KEY_BLOCK + j;
            nt = query_tile(a, t);
            tile_keys(a, t, nt, first, &low, &high);
            if (j + KEY_STEP <= low || j >= high) continue;
            if (nt == 1) K(score_step)(4, 1, a, first + j, q, out);
            else K(score_step)(TILE_PANELS, 4, a, first + j, q, out);
        }
}

/* Scores of a block -> e^(score - largest) in place for the keys BEGIN .. SEEN-1, zero for the
 * others. Returns the weights' sum. As the block's largest score is subtracted, no weight is above
 * 1, so none overflows. */
static float K(softmax_block)(float *s, size_t begin, size_t seen, float *largest) {
    vec most = vsplat(-INFINITY), sum = vsplat(0);
    size_t first = begin / 16 * 16, end = round_up(seen, 16);
    for (size_t j = first; j < begin; j++) s[j] = -INFINITY;
    for (size_t j = seen; j < end; j++) s[j] = -INFINITY;
    for (size_t j = first; j < end; j += 16) most = vmax(vload(s + j), most);
    *largest = vlargest(most);
    most = vsplat(*largest);
    for (size_t j = first; j < end; j += 16) {
        vec weight = vexp(vsub(vload(s + j), most));
        sum = vadd(sum, weight);
        vstore(s + j, weight);
    }
    memset(s, 0, first * sizeof *s);
    memset(s + end, 0, (KEY_BLOCK - end) * sizeof *s);
    return vsum(sum);
}

/* A block's largest score and weights' sum join a query's; what was is kept times KEEP, what comes
 * counts FRESH. A block of which nothing is seen has -infinity. */
static void K(join_block)(float *largest, float *total, float block, float more, float *keep,
                          float *fresh) {
    float both = *largest > block ? *largest : block, scale[16];
    *keep = 1, *fresh = 0;
    if (block == -INFINITY) return;
    vstore(scale, vexp(vsub(vsplat(*largest), vsplat(both))));
    *keep = scale[0];
    vstore(scale, vexp(vsub(vsplat(block), vsplat(both))));
    *fresh = scale[0];
    *total = fmaf(more, *fresh, *total * *keep);
    *largest = both;
}

/* + 0 turns -0 into 0: skipped and zero-weighted keys must look alike. Values of an int8 cache were
 * turned, so their sum is turned back. */
static void K(divide)(float *out, float total, size_t n, int kv) {
    for (size_t c = 0; c < n; c += 16)
        vstore(out + c, vadd(vdiv(vload(out + c), vsplat(total)), vsplat(0)));
    if (kv == MEDRUN_KV_INT8) K(turn)(out, n);
}

/* out[t] = out[t] * keep[t] + fresh[t] * sum for a tile's queries and a few vectors of channels. */
TILED void K(join_values)(const size_t nc, const size_t nt, const attention *a,
                          const key_tile *tile, size_t c, const vec *sum) {
    UNROLLED for (size_t i = 0; i < nc * nt; i++) {
        if (tile->query + i % nt >= a->n) continue;
        float *out = a->out[tile->query + i % nt] + c + 16 * (i / nt);
        vec kept = vmul(vload(out), vsplat(tile->keep[i % nt]));
        vstore(out, vfma(sum[i], vsplat(tile->fresh[i % nt]), kept));
    }
}

/* The sum over the keys j that a tile sees of weight[t][j] * value[j], one chain for each query and
 * channel, joins the outputs. Values are rows (positions, head_dim), so a lane is a channel here:
 * NC vectors of 16 channels from C on, for NT queries. */
TILED void K(value_tile)(const size_t nc, const size_t nt, const bool half, const attention *a,
                         const key_tile *tile, size_t c) {
    vec sum[16];
    size_t at = (tile->first + tile->low) * a->head_dim + c, ahead = KEY_STEP * a->head_dim;
    UNROLLED for (size_t i = 0; i < nc * nt; i++) sum[i] = vsplat(0);
    for (size_t j = tile->low; j < tile->high; j++, at += a->head_dim) {
        vec value[4];
        if (half) fetch_ahead((uintptr_t)a->values + 2 * (at + ahead), 32 * nc);
        UNROLLED for (size_t k = 0; k < nc; k++)
            value[k] = half ? vload_f16((const uint16_t *)a->values + at + 16 * k)
                            : vload((const float *)a->values + at + 16 * k);
        UNROLLED for (size_t t = 0; t < nt; t++) {
            svec x = sload(tile->weight + t * KEY_BLOCK + j, 0, 1);
            UNROLLED for (size_t k = 0; k < nc; k++)
                sum[k * nt + t] = vfmas(value[k], x, sum[k * nt + t]);
        }
    }
    K(join_values)(nc, nt, a, tile, c, sum);
}

/* Weights times the scales of channel C's group, rounded to 16 bits; UNIT gets what 1 means. */
static void K(weigh_int8)(size_t nt, const attention *a, const key_tile *tile, size_t c,
                          int16_t *weight, float *unit) {
    size_t panel = cache_panel(MEDRUN_KV_INT8, a->head_dim), low = tile->low / 16 * 16;
    const uint8_t *scales = (const uint8_t *)a->values + tile->first / 16 * panel;
    float scaled[KEY_BLOCK];
    scales += 16 * a->head_dim + c / GROUP * 32;
    for (size_t t = 0; t < nt; t++) {
        for (size_t j = low; j < tile->high; j += 16)
            vstore(scaled + j, vmul(vload(tile->weight + t * KEY_BLOCK + j),
                                    vload_bf16(scales + j / 16 * panel)));
        unit[t] = K(round16)(weight + t * KEY_BLOCK + low, scaled + low, tile->high - low);
    }
}

/* As value_tile, with int8 values and the weights of weigh_int8. The sums are exact, and fit:
 * 256 * 32767 * 127 < 2^31. */
TILED void K(value_int8)(const size_t nc, const size_t nt, const attention *a, const key_tile *tile,
                         size_t c, const int16_t *weight, const float *unit) {
    size_t panel = cache_panel(MEDRUN_KV_INT8, a->head_dim), row = 2 * a->head_dim;
    ivec dot[16];
    vec sum[16];
    UNROLLED for (size_t i = 0; i < nc * nt; i++) dot[i] = isplat(0);
    for (size_t j = tile->low / 16 * 16; j < tile->high; j += 16) {
        const int8_t *values = (const int8_t *)a->values + (tile->first + j) / 16 * panel + 2 * c;
        for (size_t k = 0; k < 16; k += 2, values += row) {
            wvec value[4];
            fetch_ahead((uintptr_t)values + KEY_STEP / 16 * panel, 32 * nc);
            UNROLLED for (size_t i = 0; i < nc; i++) value[i] = wload_int8(values + 32 * i);
            UNROLLED for (size_t t = 0; t < nt; t++) {
                pvec two = pload(weight + t * KEY_BLOCK + j + k, 0, 1);
                UNROLLED for (size_t i = 0; i < nc; i++)
                    dot[i * nt + t] = idot2(dot[i * nt + t], value[i], two);
            }
        }
    }
    UNROLLED for (size_t i = 0; i < nc * nt; i++)
        sum[i] = vmul(vfloat(dot[i]), vsplat(unit[i % nt]));
    K(join_values)(nc, nt, a, tile, c, sum);
}

/* Channels [c, end), one group at most, of a tile of queries. */
TILED void K(value_step)(const size_t nc, const size_t nt, const attention *a, const key_tile *tile,
                         size_t c, size_t end) {
    int16_t weight[4 * KEY_BLOCK];
    float unit[4];
    if (a->kv == MEDRUN_KV_INT8) K(weigh_int8)(nt, a, tile, c, weight, unit);
    for (; c < end; c += 16 * nc)
        if (a->kv == MEDRUN_KV_INT8) K(value_int8)(nc, nt, a, tile, c, weight, unit);
        else if (a->kv == MEDRUN_KV_F16) K(value_tile)(nc, nt, true, a, tile, c);
        else K(value_tile)(nc, nt, false, a, tile, c);
}

/* The block's weighted values join the outputs: a group of channels stays in the first cache while
 * the queries pass. */
static void K(value_block)(const attention *a, size_t first, const float *keep,
                           const float *fresh) {
    for (size_t c = 0, end; c < a->head_dim; c = end) {
        bool whole_group = a->head_dim - c >= GROUP;
        end = whole_group ? c + GROUP : a->head_dim;
        for (size_t t = 0, nt; t < a->n; t += nt) {
            key_tile tile = {.query = t, .first = first, .keep = keep + t, .fresh = fresh + t,
                             .weight = a->scratch + QUERIES * a->head_dim + t * KEY_BLOCK};
            nt = query_tile(a, t);
            tile_keys(a, t, nt, first, &tile.low, &tile.high);
            if (tile.low >= tile.high) continue;
            if (nt == 1 && whole_group) K(value_step)(4, 1, a, &tile, c, end);
            else if (nt == 1) K(value_step)(1, 1, a, &tile, c, end);
            else if (whole_group) K(value_step)(TILE_PANELS, 4, a, &tile, c, end);
            else K(value_step)(1, 4, a, &tile, c, end);
        }
    }
}

/* out[t] = softmax(scale * q[t] . keys) . values for up to QUERIES queries (head_dim) that share a
 * key-value head, each over the keys start[t] .. limit[t] - 1.
 *
 * The scores of all keys would not fit the caches, and the largest score, which softmax subtracts,
 * is known only at the end. So attend walks blocks of KEY_BLOCK keys with an online softmax
 * (Milakov and Gimelshein 2018; Dao et al. 2022):
 *
 *     score_block     scores (QUERIES, KEY_BLOCK) of this block, in scratch
 *     softmax_block   scores become weights e^(score - the block's largest), and their sum
 *     join_block      where the largest score so far grows, what was added before counts KEEP
 *                     times; this block counts FRESH times
 *     value_block     out = out * keep + fresh * (weights . values)
 *     divide          at the end, by the sum of all weights
 *
 * Blocks begin at multiples of KEY_BLOCK, whatever a query sees, and are joined in their order. So
 * a query's bits do not depend on the queries beside it, nor on how a prompt was cut; and a long
 * cache can be shared out by blocks among threads, whose parts merge joins just so. */
static void K(attend)(const attention *a) {
    float largest[QUERIES], total[QUERIES], keep[QUERIES], fresh[QUERIES];
    size_t start = SIZE_MAX, end = 0;
    for (size_t t = 0; t < a->n; t++) {
        largest[t] = -INFINITY, total[t] = 0;
        memset(a->out[t], 0, a->head_dim * sizeof(float));
        if (a->limit[t] > end) end = a->limit[t];
        if (a->start[t] < start) start = a->start[t];
    }
    if (start < a->begin) start = a->begin;
    if (end > a->end) end = a->end;
    if (a->kv == MEDRUN_KV_INT8) K(pack_int16)(a);
    else K(pack_queries)(a);
    for (size_t first = start - start % KEY_BLOCK; first < end; first += KEY_BLOCK) {
        K(score_block)(a, first);
        float *s = a->scratch + QUERIES * a->head_dim;
        for (size_t t = 0, low, high; t < a->n; t++, s += KEY_BLOCK) {
            float block = -INFINITY, more = 0;
            tile_keys(a, t, 1, first, &low, &high);
            if (low < high) more = K(softmax_block)(s, low, high, &block);
            else memset(s, 0, KEY_BLOCK * sizeof *s);
            K(join_block)(&largest[t], &total[t], block, more, &keep[t], &fresh[t]);
        }
        memset(s, 0, (round_up(a->n, 4) - a->n) * KEY_BLOCK * sizeof *s);
        K(value_block)(a, first, keep, fresh);
    }
    for (size_t t = 0; t < a->n; t++) {
        if (!a->part) K(divide)(a->out[t], total[t], a->head_dim, a->kv);
        else a->out[t][a->head_dim] = largest[t], a->out[t][a->head_dim + 1] = total[t];
    }
}

/* The blocks of a query that threads computed each by itself, joined as attend does. */
static void K(merge)(float *out, const float *parts, size_t n, size_t head_dim, int kv) {
    float largest = -INFINITY, total = 0, keep, fresh;
    memset(out, 0, head_dim * sizeof *out);
    for (const float *part = parts; n--; part += head_dim + PART_EXTRA) {
        K(join_block)(&largest, &total, part[head_dim], part[head_dim + 1], &keep, &fresh);
        for (size_t c = 0; c < head_dim; c += 16)
            vstore(out + c, vfma(vload(part + c), vsplat(fresh),
                                 vmul(vload(out + c), vsplat(keep))));
    }
    K(divide)(out, total, head_dim, kv);
}

#endif /* PARTIAL */

#ifdef MEDRUN_MORE_KERNELS      /* a tool's kernels, with the same words, and `more_kernels`      */
#include MEDRUN_MORE_KERNELS
#define MORE_KERNELS &K(more_kernels)
#else
#define MORE_KERNELS NULL
#endif
#define KERNEL_ENTRY(name, arguments) B(name),
#define KERNEL_ROW(name, bf16, matmul_bf16) {                                                   \
        name, bf16, INT_PACK, READY_TYPES, TILE_PANELS, INT_PANELS, B(matmul_f32), matmul_bf16, \
        K(matmul_int8), K(matmul_int4), MORE_KERNELS, KERNELS(KERNEL_ENTRY)                     \
    }
ROW_SCOPE const kernel_set K(kernel_row) = KERNEL_ROW(KERNEL_NAME, false, NULL);
#ifdef BF16_NAME
ROW_SCOPE const kernel_set K(kernel_row_bf16) = KERNEL_ROW(BF16_NAME, true, K(matmul_bf16));
#endif
PASS_LIMITS(PUT_BACK)

/* <<<<<<<<<<<<<< up to >>>> everything is compiled once for each instruction set <<<<<<<<<<<<<<< */
#undef MEDRUN_PASS
#else
/* ---- the passes ---------------------------------------------------------------------------- */

/* A region where the compiler may use the instructions of an instruction set, as it names it. */
#ifdef __clang__
#define BEGIN_TARGET(for_gcc, for_clang)                                                        \
    KERNEL_PRAGMA(clang attribute push(__attribute__((target(for_clang))), apply_to = function))
#define END_TARGET KERNEL_PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(for_gcc, for_clang)                                                        \
    KERNEL_PRAGMA(GCC push_options) KERNEL_PRAGMA(GCC target(for_gcc))
#define END_TARGET KERNEL_PRAGMA(GCC pop_options)
#endif

#ifdef MEDRUN_KERNELS_APART     /* in another object, from cc -DMEDRUN_KERNELS_ONLY */
extern const kernel_set kernel_row_avx2, kernel_row_avxvnni, kernel_row_avx512, kernel_row_neon,
    kernel_row_bf16_avx512, kernel_row_neondot, kernel_row_neonmat, kernel_row_bf16_neonmat,
    kernel_row_scalar;
#else
#ifdef MEDRUN_KERNELS_ONLY
#define ROW_SCOPE
#else
#define ROW_SCOPE static
#endif
#define MEDRUN_PASS 1
#include "medrun.c"
#ifdef MEDRUN_X86
BEGIN_TARGET("avx2,fma,f16c", "avx2,fma,f16c")
#define MEDRUN_PASS 2
#include "medrun.c"
#ifdef MEDRUN_AVXVNNI
#define MEDRUN_PASS 4
#include "medrun.c"
#endif
END_TARGET
BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni",
             "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define MEDRUN_PASS 3
#include "medrun.c"
END_TARGET
#endif
#ifdef MEDRUN_ARM64
#define MEDRUN_PASS 5
#include "medrun.c"
BEGIN_TARGET("arch=armv8.2-a+dotprod", "dotprod")
#define MEDRUN_PASS 6
#include "medrun.c"
END_TARGET
BEGIN_TARGET("arch=armv8.2-a+dotprod+i8mm+bf16", "i8mm,bf16")
#define MEDRUN_PASS 7
#include "medrun.c"
END_TARGET
#endif
#endif

PASS_NAMES(PUT_BACK)
#undef KERNEL_PRAGMA
#undef KEEP_MACRO
#undef PUT_BACK
#undef PASS_LIMITS
#undef PASS_NAMES

#ifndef MEDRUN_KERNELS_ONLY
/* ---- processor features -------------------------------------------------------------------- */

typedef struct {
    bool avx2, avx_vnni, avx512, avx512_bf16;
    bool neon, neon_dot, neon_i8mm, neon_bf16;
} cpu_features;

/* What the processor has AND the system saves at a task switch (xgetbv). NEON is a part of arm64;
 * what came later, the system tells. */
static cpu_features detect_cpu(void) {
    cpu_features f = {0};
#if defined MEDRUN_ARM64
    f.neon = true;
#if defined __linux__
    f.neon_dot = getauxval(AT_HWCAP) >> 20 & 1;
    f.neon_i8mm = f.neon_dot && (getauxval(AT_HWCAP2) >> 13 & 1);
    f.neon_bf16 = f.neon_i8mm && (getauxval(AT_HWCAP2) >> 14 & 1);
#elif defined __APPLE__
    f.neon_dot = sysctl_number("hw.optional.arm.FEAT_DotProd");
    f.neon_i8mm = f.neon_dot && sysctl_number("hw.optional.arm.FEAT_I8MM");
    f.neon_bf16 = f.neon_i8mm && sysctl_number("hw.optional.arm.FEAT_BF16");
#elif defined _WIN32            /* PF_ARM_V82_DP_, V82_I8MM_ and V86_BF16_INSTRUCTIONS_AVAILABLE */
    f.neon_dot = IsProcessorFeaturePresent(43);
    f.neon_i8mm = f.neon_dot && IsProcessorFeaturePresent(66);
    f.neon_bf16 = f.neon_i8mm && IsProcessorFeaturePresent(68);
#endif
#elif defined MEDRUN_X86
    unsigned a, b, c, d, b7, c7, d7, a71 = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return f;
    bool fma = c >> 12 & 1, f16c = c >> 29 & 1;
    uint32_t saved, high;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return f;
    f.avx2 = fma && f16c && (b7 >> 5 & 1) && (saved & 6) == 6;
    bool wide = (b7 & 0xC0030000) == 0xC0030000;        /* F, DQ, BW, VL */
    f.avx512 = f.avx2 && wide && (c7 >> 11 & 1) && (saved & 0xE6) == 0xE6;          /* VNNI     */
    if (a >= 1 && __get_cpuid_count(7, 1, &a71, &b, &c, &d))
        f.avx512_bf16 = f.avx512 && (a71 >> 5 & 1), f.avx_vnni = f.avx2 && (a71 >> 4 & 1);
#endif
    return f;
}

/* ---- choosing ------------------------------------------------------------------------------- */

/* The kernel sets this machine can run, best first; at most N_KERNEL_SETS, returns how many. */
enum { N_KERNEL_SETS = 5 };

static int usable_kernels(const kernel_set *out[N_KERNEL_SETS]) {
    MAYBE_UNUSED cpu_features f = detect_cpu();
    int n = 0;
#ifdef MEDRUN_X86
    if (f.avx512_bf16) out[n++] = &kernel_row_bf16_avx512;
    if (f.avx512) out[n++] = &kernel_row_avx512;
#ifdef MEDRUN_AVXVNNI
    if (f.avx2 && f.avx_vnni) out[n++] = &kernel_row_avxvnni;
#endif
    if (f.avx2) out[n++] = &kernel_row_avx2;
#elif defined MEDRUN_ARM64
    if (f.neon_bf16) out[n++] = &kernel_row_bf16_neonmat;
    if (f.neon_i8mm) out[n++] = &kernel_row_neonmat;
    if (f.neon_dot) out[n++] = &kernel_row_neondot;
    out[n++] = &kernel_row_neon;
#endif
    out[n++] = &kernel_row_scalar;
    return n;
}

/* What to tell people where only the plain words are left, else NULL. */
static const char *plain_only(void) {
    const kernel_set *sets[N_KERNEL_SETS];
    if (usable_kernels(sets) > 1) return NULL;
#if defined MEDRUN_SCALAR
    return "built with MEDRUN_SCALAR: plain C computes";
#elif defined MEDRUN_X86
    return "this processor has no AVX2 with FMA and F16C: plain C computes, several times slower";
#else
    return "there are no kernels for this kind of processor: plain C computes";
#endif
}

/* The set called NAME; the best one where NAME is NULL or empty. */
static int choose_kernels(const kernel_set **out, const char *name, medrun_error *e) {
    const kernel_set *sets[N_KERNEL_SETS];
    char known[80] = "";
    int n = usable_kernels(sets);
    if (!name) name = "";
    for (int i = 0; i < n; i++) {
        if (!*name || !strcmp(name, sets[i]->name)) return *out = sets[i], MEDRUN_OK;
        snprintf(known + strlen(known), sizeof known - strlen(known), " %s", sets[i]->name);
    }
    return fail(e, MEDRUN_USAGE, "kernels: found \"%s\", this machine can run:%s", name, known);
}
/* ============================================================================================
 * 7 Tensor: packing activations, multiplying by weights, on all threads
 *
 * A thread takes whole panels of a matrix, so which thread did what never shows in the sums.
 * Tests: tests/07_tensor.c.
 * ============================================================================================ */

typedef struct {
    int type;
    size_t rows, cols;
    const uint8_t *data;            /* F32: (rows, cols) floats; else panels                    */
} tensor;

/* Activations packed for a matmul: made by pack_activations, used by matmul. */
typedef struct {
    int kind;
    size_t tokens, cols;
    uint8_t *data;                  /* pack_bytes(kind, cols, tokens)                           */
} packed;

/* One matrix of a product: out[t * stride + row] = w[row] . x[t]. OUT has room for rows rounded up
 * to 16 in each row. */
typedef struct {
    const tensor *w;
    float *out;
    size_t stride;
} product;

/* What multiplies instead of the processor where there is one: section 8. */
typedef struct device {
    /* As matmul; false: it did not, and the processor must. */
    bool (*multiply)(struct device *d, const product *products, size_t n, const packed *x);
    size_t loaded;                  /* matrices that it has                                     */
    bool failed;
    char name[128], says[320];      /* SAYS: what it does, or the call that failed              */
} device;

/* What a pass computes with. */
typedef struct {
    thread_pool *pool;
    const kernel_set *k;
    bool strict;                    /* bf16 weights times f32 activations                       */
    device *device;                 /* NULL: none                                               */
    size_t cache;                   /* bytes of the second cache; 0: not known                  */
    uint8_t *blocks;                /* (threads, block_bytes) where weights are unpacked        */
    size_t block_bytes;             /* at least engine_block_bytes                              */
} engine;

static int pack_kind(const engine *eng, int weight_type) {
    if (weight_type == TYPE_INT8 || weight_type == TYPE_INT4) return eng->k->int_pack;
    return eng->k->bf16_dot && !eng->strict ? PACK_BF16 : PACK_F32;
}

typedef struct {
    const engine *eng;
    bool turned;
    const float *x;
    size_t stride;
    packed *to;
} pack_job;

static void pack_task(void *context, size_t begin, size_t end, int thread) {
    (void)thread;
    pack_job *j = context;
    size_t first = begin * TILE, last = end * TILE < j->to->tokens ? end * TILE : j->to->tokens;
    j->eng->k->pack(j->to->kind, j->turned, j->x + first * j->stride, j->stride, j->to->cols,
                    last - first, j->to->data + pack_bytes(j->to->kind, j->to->cols, first));
}

/* x (tokens, cols) with STRIDE -> *TO, whose data has room, for weights of WEIGHT_TYPE. */
static void pack_activations(const engine *eng, packed *to, int weight_type, const float *x,
                             size_t stride, size_t cols, size_t tokens) {
    to->kind = pack_kind(eng, weight_type), to->tokens = tokens, to->cols = cols;
    pack_job j = {eng, weight_type == TYPE_INT8, x, stride, to};
    parallel_for(eng->pool, (tokens + TILE - 1) / TILE, 1, pack_task, &j);
}

typedef struct {
    const engine *eng;
    const product *products, *end;
    const packed *x;
    size_t cols_per_block;          /* of a few panels that fit the second cache                */
} matmul_job;

/* The kernel for weights of TYPE and activations of KIND. */
static matmul_fn *matmul_of(const kernel_set *k, int type, int kind) {
    if (type == TYPE_BF16) return kind == PACK_BF16 ? k->matmul_bf16 : k->matmul_f32;
    return type == TYPE_INT4 ? k->matmul_int4 : k->matmul_int8;
}

static size_t tensor_panels(const tensor *w) { return (w->rows + LANES - 1) / LANES; }

static void matmul_task(void *context, size_t begin, size_t end, int thread) {
    matmul_job *j = context;
    const engine *eng = j->eng;
    for (const product *p = j->products; p < j->end && begin < end; p++) {
        size_t panels = tensor_panels(p->w), n = panels < end ? panels : end;
        matmul_fn *f = matmul_of(eng->k, p->w->type, j->x->kind);
        uint8_t *block = eng->blocks ? eng->blocks + (size_t)thread * eng->block_bytes : NULL;
        if (begin < n)
            f(&(matmul_part){p->w->data + begin * panel_bytes(p->w->type, p->w->cols), j->x->data,
                             n - begin, p->w->cols, j->x->tokens, j->cols_per_block, block,
                             p->out + begin * LANES, p->stride});
        begin = begin < panels ? 0 : begin - panels;
        end = end < panels ? 0 : end - panels;
    }
}

/* The columns of a few panels, with BYTES for each, that fill three eighths of the second cache. */
static size_t block_cols(const engine *eng, size_t bytes) {
    size_t cols = (eng->cache ? eng->cache : 256 << 10) / 8 * 3 / bytes / 128 * 128;
    return cols ? cols : 128;
}

/* What a thread needs to unpack weights of TYPE and up to COLS columns. */
static size_t engine_block_bytes(const engine *eng, int type, size_t cols) {
    if (!(eng->k->unpacks >> type & 1) || pack_kind(eng, type) == PACK_F32) return 0;
    size_t cols_per_block = block_cols(eng, BLOCK_BYTES);
    return (cols_per_block < cols ? cols_per_block : round_up(cols, 128)) * BLOCK_BYTES;
}

/* Up to a few matrices of one type that multiply the same activations, in one go (q, k and v). */
static void matmul(const engine *eng, const product *products, size_t n, const packed *x) {
    size_t panels = 0, bytes = panel_bytes(products->w->type, x->cols);
    if (!x->tokens) return;
    if (eng->device && eng->device->multiply(eng->device, products, n, x)) return;
    size_t tile = products->w->type == TYPE_BF16 ? eng->k->tile_panels : eng->k->int_panels;
    size_t each = eng->block_bytes ? BLOCK_BYTES : (tile * bytes + x->cols - 1) / x->cols;
    matmul_job j = {eng, products, products + n, x, block_cols(eng, each)};
    if (x->tokens <= TILE) j.cols_per_block = x->cols;  /* nothing is used a second time         */
    for (size_t i = 0; i < n; i++) panels += tensor_panels(products[i].w);
    size_t grain = panels / ((size_t)eng->pool->threads * 32);
    if (x->tokens > TILE) grain = round_up(grain ? grain : 1, tile);
    parallel_for(eng->pool, panels, grain, matmul_task, &j);
}

/* The seconds of the best of some products on THREADS threads, until one is as short as ENOUGH. */
static double time_trial(const kernel_set *k, int threads, double enough) {
    static _Alignas(64) uint8_t zeros[600 << 10];
    static float out[TILE][1024];
    thread_pool pool;
    double best = 1, now = seconds(), end = now + 1e-2, start;
    if (pool_start(&pool, threads, NULL) || pool.threads < 1) return best;
    do {
        matmul(&(engine){.pool = &pool, .k = k}, &(product){&(tensor){TYPE_INT8, 1024, 512, zeros},
               out[0], 1024}, 1, &(packed){k->int_pack, TILE, 512, zeros});
        start = now, now = seconds(), best = fmin(best, now - start);
    } while (now < end && best > enough);
    return pool_stop(&pool), best;
}

/* The threads worth having; *LIMIT becomes what made them so few, or NULL. Where hardware threads
 * share cores and no trial ends a twentieth sooner with all, it is one for each core. */
static int default_threads(const char **limit) {
    static atomic_int chosen;                   /* by the trial, which is made once */
    const kernel_set *k;
    int may = processors(), all = may, n = (int)fmax(1, limits_of_machine().processors);
    int cores = cores_of("/sys/devices/system/cpu");
#ifdef _SC_NPROCESSORS_ONLN
    all = (int)fmax(all, (double)sysconf(_SC_NPROCESSORS_ONLN));
#endif
    *limit = n < may ? "the control group's quota" :
             n < all && n < MAX_THREADS ? "this process's affinity" : NULL;
    if (cores < n && !chosen && !choose_kernels(&k, NULL, NULL)) {
        double gain = 0.95 * time_trial(k, cores, 0);
        chosen = time_trial(k, n, gain) > gain ? cores : n;
    }
    if (cores >= n || chosen >= n) return n;
    *limit = "the cores: a second hardware thread of one gains nothing";
    return chosen;
}
/* ============================================================================================
 * 8 OpenCL: a device that multiplies, optional (make OPENCL=1)
 *
 * A model spends its time in matmul, so that is what a device takes over: the weights lie in its
 * memory, a matmul sends it packed activations (section 6), and the products come back. Norms,
 * rotation, attention and sampling stay on the processor.
 *
 * The products are the processor's, bit for bit. A work-item is one row of a panel: it walks k in
 * order with the same fma, as a lane of the processor does. Inside a group of int8 or int4 numbers
 * the sum is a whole number below 2^24, which a float holds exactly. device_agrees compares every
 * matrix before a device is used. A call that fails later costs no token: matmul computes what the
 * device did not, and everything from then on.
 *
 * The OpenCL library is found when the program runs, so that the program also runs without it. A
 * device needs OpenCL 1.2 and no extension. May use sections 1 to 7.
 * Tests: tests/08_opencl.c, tests/37_opencl.sh.
 * ============================================================================================ */

/* Which device, and how to use it. All but NAME may be NULL or 0. */
typedef struct {
    const char *name;               /* its number, a part of its name, or "auto": the first one
                                       that is not a processor                                  */
    const char *library;            /* path of the OpenCL library                               */
    const char *options;            /* more options for the device's compiler                   */
    uint64_t memory;                /* bytes that may be taken; OpenCL does not tell how many
                                       other programs use                                       */
} device_request;

#ifdef MEDRUN_OPENCL
#define CL_TARGET_OPENCL_VERSION 120
#ifdef _WIN32
#include <CL/cl.h>
static const char opencl_library[] = "OpenCL.dll";
#define OPEN_LIBRARY(path) LoadLibraryExA(path, NULL, LOAD_LIBRARY_SEARCH_SYSTEM32)
#define FIND_SYMBOL(library, name) (void *)(uintptr_t)GetProcAddress(library, name)
#else
#include <dlfcn.h>
#define OPEN_LIBRARY(path) dlopen(path, RTLD_NOW | RTLD_LOCAL)
#define FIND_SYMBOL(library, name) dlsym(library, name)
#ifdef __APPLE__
#include <OpenCL/cl.h>
static const char opencl_library[] = "/System/Library/Frameworks/OpenCL.framework/OpenCL";
#else
#include <CL/cl.h>
static const char opencl_library[] = "libOpenCL.so.1";
#endif
#endif

/* ---- the kernels, in OpenCL C ---------------------------------------------------------------- */

/* First what cannot stand inside TEXT_OF, which makes text of code. MATMUL makes a kernel: a
 * work-item multiplies one row of W, panels of SIZE bytes with N groups, by a tile of up to 8 of
 * the TOKENS of A, packed activations of WORDS words each, and writes OUT (TOKENS, STRIDE). Sixteen
 * neighbours read the 64 bytes of a step. MOST is 1 or 8, so that the loops over tokens unroll. */
static const char device_macros[] =
    "#pragma OPENCL FP_CONTRACT OFF\n"
    "#define EACH_TOKEN _Pragma(\"unroll\") for (int t = 0; t < nt; t++)\n"
    "#define MATMUL(type, most) \\\n"
    "    kernel void type##_##most(stored w, ulong size, int n, packed a, ulong words, \\\n"
    "                              int tokens, global float *out, int stride) { \\\n"
    "        int row = get_global_id(0), first = get_global_id(1) * 8; \\\n"
    "        int live = min(tokens - first, 8), width = live > 4 ? 8 : live > 2 ? 4 : live; \\\n"
    "        const int nt = most; \\\n"
    "        float sum[most]; \\\n"
    "        EACH_TOKEN sum[t] = 0; \\\n"
    "        add_##type(nt, sum, w + row / 16 * size, row % 16, n, a + first * words, width); \\\n"
    "        for (int t = 0; t < nt && t < live; t++) \\\n"
    "            out[(ulong)(first + t) * stride + row] = sum[t]; \\\n"
    "    }\n";

#define TEXT_OF(...) #__VA_ARGS__
static const char device_source[] = TEXT_OF(

typedef global const uchar *stored;
typedef global const uint *packed;

/* Two weights a step, k and k + 1, and a word of A for each k and token. A token past the last one
 * of a narrow tile counts as another of it: its sum is not written. */
void add_bf16(int nt, float *sum, stored w, int lane, int n, packed a, int width) {
    packed steps = (packed)w + lane;
    for (int k = 0; k < n; k++, a += 2 * width) {
        float even = as_float(steps[16 * k] << 16), odd = as_float(steps[16 * k] & 0xFFFF0000);
        EACH_TOKEN sum[t] = fma(even, as_float(a[t % width]), sum[t]);
        EACH_TOKEN sum[t] = fma(odd, as_float(a[width + t % width]), sum[t]);
    }
}

/* DOT += four weights times activations 4s .. 4s + 3 of each token: four int8 in a word, or (PAIRS)
 * int16 in two words, the first and the third in one. */
void add_four(int nt, float *dot, float4 w, packed a, int width, int s) {
    EACH_TOKEN {
        packed x = a + 3 * width + t % width;
        short2 even = as_short2(x[PAIRS * 2 * s * width]);
        short2 odd = as_short2(x[PAIRS * (2 * s + 1) * width]);
        float4 v = PAIRS ? (float4)(even.x, odd.x, even.y, odd.y)
                         : convert_float4(as_char4(x[s * width]));
        dot[t] = fma(w.w, v.w, fma(w.z, v.z, fma(w.y, v.y, fma(w.x, v.x, dot[t]))));
    }
}

/* A group of 64: sixteen steps of four weights, whose bytes are 128 more than the weight. */
void add_int8(int nt, float *sum, stored w, int lane, int n, packed a, int width) {
    for (int g = 0; g < n; g++, a += WORDS * width) {
        stored line = w + (ulong)(g / 2) * LINE_INT8;
        packed steps = (packed)(line + 64 + g % 2 * 1024) + lane;
        float dot[8], scale = as_float(((global const ushort *)(line + g % 2 * 32))[lane] << 16);
        EACH_TOKEN dot[t] = 0;
        for (int s = 0; s < 16; s++)
            add_four(nt, dot, convert_float4(as_uchar4(steps[16 * s])) - 128.0f, a, width, s);
        EACH_TOKEN sum[t] = fma(dot[t], scale * as_float(a[2 * width + t % width]), sum[t]);
    }
}

/* The scale of an int4 group: the upper ten bits of an f16, times 2^-13. */
float scale_int4(uint bits) {
    ushort upper = bits & 0xFFC0;
    return vload_half(0, (const half *)&upper) * 0x1p-13f;
}

/* Groups of int4 are half as long: H counts the two that share the activations' scale. */
constant float level[16] = {LEVELS};
void add_int4(int nt, float *sum, stored w, int lane, int n, packed a, int width) {
    for (int g = 0; g < n; g++, a += WORDS * width, w += LINE_INT4) {
        float dot[8], part[8];
        for (int h = 0; h < 2; h++) {
            packed steps = (packed)(w + 64 + h * 256) + lane;
            uint bits = ((global const ushort *)(w + h * 32))[lane];
            EACH_TOKEN dot[t] = 0;
            for (int s = 0; s < 8; s++) {
                uchar4 q = as_uchar4(steps[s / 2 * 16] >> s % 2 * 4 & 0x0F0F0F0F);
                float4 four = (float4)(level[q.x], level[q.y], level[q.z], level[q.w]);
                add_four(nt, dot, four + ((float)(bits & 63) - 128), a, width, 8 * h + s);
            }
            float scale = scale_int4(bits);
            EACH_TOKEN part[t] = h ? fma(dot[t], scale, part[t]) : dot[t] * scale;
        }
        EACH_TOKEN sum[t] = fma(part[t], as_float(a[2 * width + t % width]), sum[t]);
    }
}

MATMUL(bf16, 1) MATMUL(bf16, 8) MATMUL(int8, 1) MATMUL(int8, 8) MATMUL(int4, 1) MATMUL(int4, 8)
);
#undef TEXT_OF

/* ---- devices --------------------------------------------------------------------------------- */

/* The calls that are used, found by name when the program runs. */
#define DEVICE_CALLS(X)                                                                         \
    X(clGetPlatformIDs) X(clGetPlatformInfo) X(clGetDeviceIDs) X(clGetDeviceInfo)               \
    X(clCreateContext) X(clReleaseContext) X(clCreateCommandQueue) X(clReleaseCommandQueue)     \
    X(clCreateProgramWithSource) X(clBuildProgram) X(clGetProgramBuildInfo) X(clReleaseProgram) \
    X(clCreateKernel) X(clReleaseKernel) X(clSetKernelArg) X(clEnqueueNDRangeKernel)            \
    X(clCreateBuffer) X(clReleaseMemObject) X(clEnqueueWriteBuffer) X(clEnqueueReadBufferRect)  \
    X(clFinish)
#define FIELD(call) __typeof__(call) *call;
#define NAME(call) #call,
typedef struct { DEVICE_CALLS(FIELD) } opencl;                  /* pointers in this order       */
static const char *const opencl_calls[] = {DEVICE_CALLS(NAME)};
#undef FIELD
#undef NAME
#undef DEVICE_CALLS

/* What a device says of itself: enough to choose one, to refuse one that would compute other bits,
 * and for `medrun-lab doctor`. */
typedef struct {
    cl_device_id id;
    char name[sizeof((device *)0)->name];
    cl_device_type type;
    cl_device_fp_config numbers;
    cl_ulong memory, largest;       /* bytes in all, of one buffer                              */
    cl_bool little, shared;         /* little-endian; its memory is the processor's             */
} device_facts;

/* A pass of many tokens goes in chunks: of at most DEVICE_ROWS tokens and, for the matrix with the
 * most rows, DEVICE_OUT products (64 MB), so that a device needs the same room for every pass. */
enum { MAX_DEVICES = 16, DEVICE_ROWS = 512, DEVICE_OUT = 16 << 20 };

/* The bytes of a matrix, and the device's copy of them. */
typedef struct {
    const tensor *w;
    cl_mem bytes;
} device_copy;

/* A device in use. What is NULL in a device that is half open is not released. */
typedef struct {
    device base;                    /* what section 7 knows; must stand first                   */
    opencl cl;
    device_facts facts;
    cl_context context;
    cl_command_queue queue;
    cl_program program;
    cl_kernel kernels[N_TYPES][2];  /* for one token, for more; none for f32                    */
    uint64_t room;                  /* bytes that may still be taken                            */
    cl_mem packed, products;        /* (DEVICE_ROWS, most cols) activations; (DEVICE_OUT) floats*/
    device_copy *copies;            /* (base.loaded)                                            */
    size_t most_rows;               /* of any of these, in whole panels                         */
} opencl_device;

/* PATH: the library; NULL or "": where the system has it. It is never closed, for drivers leave
 * threads and handlers of their own behind. */
static int opencl_open(opencl *cl, const char *path, medrun_error *e) {
    if (!path || !*path) path = opencl_library;
    void *library = OPEN_LIBRARY(path);
    if (!library)
        return fail(e, MEDRUN_USAGE, "device: this machine has no OpenCL library (%s)", path);
    for (size_t i = 0; i < sizeof opencl_calls / sizeof *opencl_calls; i++) {
        void *call = FIND_SYMBOL(library, opencl_calls[i]);
        if (!call) return fail(e, MEDRUN_USAGE, "device: %s has no %s", path, opencl_calls[i]);
        memcpy((char *)cl + i * sizeof call, &call, sizeof call);
    }
    return MEDRUN_OK;
}
#undef OPEN_LIBRARY
#undef FIND_SYMBOL

/* All devices of all platforms, numbered as they come; returns how many. */
static int list_devices(const opencl *cl, device_facts out[MAX_DEVICES]) {
    cl_platform_id platforms[MAX_DEVICES];
    cl_device_id ids[MAX_DEVICES];
    cl_uint n_platforms = 0, found;
    int n = 0;
    cl->clGetPlatformIDs(MAX_DEVICES, platforms, &n_platforms);
    for (cl_uint p = 0; p < n_platforms && p < MAX_DEVICES; p++) {
        if (cl->clGetDeviceIDs(platforms[p], CL_DEVICE_TYPE_ALL, MAX_DEVICES, ids, &found))
            continue;
        for (cl_uint i = 0; i < found && n < MAX_DEVICES; i++) {
            device_facts *d = &out[n++];
            const struct { cl_device_info what; size_t bytes; void *to; } facts[] = {
                {CL_DEVICE_NAME, sizeof d->name - 1, d->name},
                {CL_DEVICE_TYPE, sizeof d->type, &d->type},
                {CL_DEVICE_SINGLE_FP_CONFIG, sizeof d->numbers, &d->numbers},
                {CL_DEVICE_GLOBAL_MEM_SIZE, sizeof d->memory, &d->memory},
                {CL_DEVICE_MAX_MEM_ALLOC_SIZE, sizeof d->largest, &d->largest},
                {CL_DEVICE_ENDIAN_LITTLE, sizeof d->little, &d->little},
                {CL_DEVICE_HOST_UNIFIED_MEMORY, sizeof d->shared, &d->shared}};
            *d = (device_facts){.id = ids[i]};
            for (size_t k = 0; k < sizeof facts / sizeof *facts; k++)
                cl->clGetDeviceInfo(d->id, facts[k].what, facts[k].bytes, facts[k].to, NULL);
        }
    }
    return n;
}

/* WHICH: see device_request. A device that flushes subnormals could not give the same bits. */
static int choose_device(opencl_device *d, const char *which, medrun_error *e) {
    device_facts all[MAX_DEVICES], *f = all;
    char *end;
    long number = strtol(which, &end, 10);
    bool by_number = *which && !*end, any = !strcmp(which, "auto");
    int n = e->code ? 0 : list_devices(&d->cl, all);
    for (; f < all + n; f++)
        if (by_number ? f - all == number : any ? !(f->type & CL_DEVICE_TYPE_CPU)
                                                : !!strstr(f->name, which)) break;
    if (f == all + n)
        return fail(e, MEDRUN_USAGE, "device: found no \"%s\" among the %d that OpenCL has here; "
                    "medrun-lab doctor lists them", any ? "GPU" : which, n);
    d->facts = *f;
    d->room = f->memory - f->memory / 16;                       /* the rest is the driver's      */
    memcpy(d->base.name, f->name, sizeof f->name);
    if (f->little && f->numbers & CL_FP_DENORM) return MEDRUN_OK;
    return fail(e, MEDRUN_NO_MEMORY, "device %s: %s; wanted the processor's numbers", f->name,
                f->little ? "takes the smallest numbers for 0" : "is big-endian");
}

/* Compiles the kernels for activations of KIND, with the geometry of panels (section 5) as macros.
 * LOG gets what the device's compiler says when it fails. */
static int build_kernels(opencl_device *d, const char *more, int kind, buffer *log,
                         medrun_error *e) {
    const char *sources[] = {device_macros, device_source};
    const size_t most = 64 << 10;
    char options[512], name[16];
    cl_int why;
    if (e->code) return e->code;
    int n = snprintf(options, sizeof options, "-cl-std=CL1.2 -DPAIRS=%d -DWORDS=%zu "
                     "-DLINE_INT8=%zu -DLINE_INT4=%zu -DLEVELS=0", kind == PACK_INT16,
                     pack_bytes(kind, GROUP, 1) / 4, group_scales(TYPE_INT8, 2),
                     group_scales(TYPE_INT4, 2));
    for (int i = 1; i < 16; i++)
        n += snprintf(options + n, sizeof options - (size_t)n, ",%d", int4_levels[i]);
    snprintf(options + n, sizeof options - (size_t)n, " %s", more ? more : "");
    d->context = d->cl.clCreateContext(NULL, 1, &d->facts.id, NULL, NULL, &why);
    if (!why) d->queue = d->cl.clCreateCommandQueue(d->context, d->facts.id, 0, &why);
    if (!why) d->program = d->cl.clCreateProgramWithSource(d->context, 2, sources, NULL, &why);
    if (!why) why = d->cl.clBuildProgram(d->program, 1, &d->facts.id, options, NULL, NULL);
    for (int k = 2 * TYPE_BF16; k < 2 * N_TYPES && !why; k++) {
        snprintf(name, sizeof name, "%s_%d", type_names[k / 2], k % 2 ? TILE : 1);
        d->kernels[k / 2][k % 2] = d->cl.clCreateKernel(d->program, name, &why);
    }
    if (!why) return MEDRUN_OK;
    if (d->program && buffer_room(log, most) &&
        !d->cl.clGetProgramBuildInfo(d->program, d->facts.id, CL_PROGRAM_BUILD_LOG, most,
                                     log->data, NULL))
        log->n = strlen((const char *)log->data);
    return fail(e, MEDRUN_NO_MEMORY, "device %s: %s (%d)", d->facts.name,
                d->program ? "its kernels cannot be built" : "cannot be used", why);
}

/* N bytes on the device, with DATA unless that is NULL. DATA must stay where it is: a device that
 * shares the processor's memory may use it there, though some will not use what cannot be written.
 * NULL: the device has no room. */
static cl_mem device_bytes(opencl_device *d, const void *data, size_t n) {
    const cl_mem_flags copied = CL_MEM_READ_ONLY | CL_MEM_COPY_HOST_PTR;
    const cl_mem_flags used = CL_MEM_READ_ONLY | CL_MEM_USE_HOST_PTR;
    void *from = (void *)(uintptr_t)data;
    cl_mem made = NULL;
    if (n > d->room || n > d->facts.largest) return NULL;
    if (!data) made = d->cl.clCreateBuffer(d->context, CL_MEM_READ_WRITE, n, NULL, NULL);
    else if (d->facts.shared) made = d->cl.clCreateBuffer(d->context, used, n, from, NULL);
    if (data && !made) made = d->cl.clCreateBuffer(d->context, copied, n, from, NULL);
    if (made) d->room -= n;
    return made;
}

/* ---- products -------------------------------------------------------------------------------- */

/* Keeps the first call that failed. After that no more products are asked of the device. */
static bool device_ok(opencl_device *d, cl_int why, const char *call) {
    if (why && !d->base.failed) {
        d->base.failed = true;
        snprintf(d->base.says, sizeof d->base.says, "%s: %s failed (%d)", d->facts.name, call, why);
    }
    return !d->base.failed;
}

/* Makes a call, unless one has failed. */
#define CALL(d, call, ...) device_ok(d, d->base.failed ? 0 : d->cl.call(__VA_ARGS__), #call)

/* The device's copy of W, or NULL. Matrices are known by where their bytes are: a tied output
 * matrix is the embedding. */
static const cl_mem *copy_of(const opencl_device *d, const tensor *w) {
    for (size_t i = 0; i < d->base.loaded; i++)
        if (d->copies[i].w->data == w->data) return &d->copies[i].bytes;
    return NULL;
}

/* P's products for TOKENS of the activations X, which the device has, to OUT. */
static void device_product(opencl_device *d, const product *p, const packed *x, size_t tokens,
                           float *out) {
    int type = p->w->type;
    cl_kernel kernel = d->kernels[type][tokens > 1];
    size_t rows = tensor_panels(p->w) * LANES, row = rows * sizeof(float);
    cl_ulong size = panel_bytes(type, x->cols), words = pack_bytes(x->kind, x->cols, 1) / 4;
    cl_int groups = (cl_int)(type == TYPE_BF16 ? (x->cols + 1) / 2 : (x->cols + GROUP - 1) / GROUP);
    cl_int live = (cl_int)tokens, stride = (cl_int)rows;
    const struct { size_t bytes; const void *value; } arguments[] = {
        {sizeof(cl_mem), copy_of(d, p->w)}, {sizeof size, &size}, {sizeof groups, &groups},
        {sizeof(cl_mem), &d->packed}, {sizeof words, &words}, {sizeof live, &live},
        {sizeof(cl_mem), &d->products}, {sizeof stride, &stride}};
    const size_t items[2] = {rows, (tokens + TILE - 1) / TILE}, from[3] = {0};
    const size_t region[3] = {row, tokens, 1};
    for (cl_uint i = 0; i < sizeof arguments / sizeof *arguments; i++)
        CALL(d, clSetKernelArg, kernel, i, arguments[i].bytes, arguments[i].value);
    CALL(d, clEnqueueNDRangeKernel, d->queue, kernel, 2, NULL, items, NULL, 0, NULL, NULL);
    CALL(d, clEnqueueReadBufferRect, d->queue, d->products, CL_FALSE, from, from, region, row, 0,
         p->stride * sizeof(float), 0, out, 0, NULL, NULL);
}

/* See `device`. The queue runs in order, so all products use one place there, and one wait is
 * enough for those of a chunk; after a failure, too, for what was asked before may still be under
 * way. A single token goes there as well: reading weights takes the time, and the device has them.
 * The caller's rows may lie apart, so each product is read to its place as a rectangle. */
static bool device_multiply(device *base, const product *products, size_t n, const packed *x) {
    opencl_device *d = (opencl_device *)base;
    if (base->failed || x->kind == PACK_BF16) return false;
    for (size_t i = 0; i < n; i++) if (!copy_of(d, products[i].w)) return false;
    size_t chunk = DEVICE_OUT / d->most_rows / TILE * TILE;
    if (chunk > DEVICE_ROWS) chunk = DEVICE_ROWS;
    for (size_t t = 0; t < x->tokens && !base->failed; t += chunk) {
        size_t tokens = x->tokens - t < chunk ? x->tokens - t : chunk;
        CALL(d, clEnqueueWriteBuffer, d->queue, d->packed, CL_FALSE, 0,
             pack_bytes(x->kind, x->cols, tokens), x->data + pack_bytes(x->kind, x->cols, t), 0,
             NULL, NULL);
        for (const product *p = products; p < products + n; p++)
            device_product(d, p, x, tokens, p->out + t * p->stride);
        device_ok(d, d->cl.clFinish(d->queue), "clFinish");
    }
    return !base->failed;
}
#undef CALL

/* Takes the N matrices in their order, as many as fit; the first LEAST are a layer. */
static int load_weights(opencl_device *d, int kind, const tensor *const *all, size_t n,
                        size_t least, medrun_error *e) {
    uint64_t had = d->room, layer = 0;
    size_t most_cols = 0, *loaded = &d->base.loaded;
    if (e->code) return e->code;
    d->copies = new_array(n, sizeof *d->copies);
    if (!d->copies) return out_of_memory(e, n * sizeof *d->copies);
    for (size_t i = 0; i < n; i++) {
        if (all[i]->cols > most_cols) most_cols = all[i]->cols;
        if (i < least) layer += tensor_bytes(all[i]->type, all[i]->rows, all[i]->cols);
    }
    d->packed = device_bytes(d, NULL, pack_bytes(kind, most_cols, DEVICE_ROWS));
    d->products = device_bytes(d, NULL, DEVICE_OUT * sizeof(float));
    for (; d->packed && d->products && *loaded < n; ++*loaded) {
        const tensor *w = all[*loaded];
        size_t rows = tensor_panels(w) * LANES;
        cl_mem copy = rows > DEVICE_OUT / TILE ? NULL :
                      device_bytes(d, w->data, tensor_bytes(w->type, w->rows, w->cols));
        if (!copy) break;
        d->copies[*loaded] = (device_copy){w, copy};
        if (rows > d->most_rows) d->most_rows = rows;
    }
    if (*loaded >= least) return MEDRUN_OK;
    return fail(e, MEDRUN_NO_MEMORY, "device %s: %llu MB are not enough for a layer of %llu MB and "
                "what it works with", d->facts.name, (unsigned long long)had >> 20,
                (unsigned long long)layer >> 20);
}

/* Do the device and the processor give the same products of W and N tokens, at most a tile? This
 * asks the kernels, the compiler and the memory of the device; any numbers will do for it. */
static int device_agrees(opencl_device *d, const engine *eng, const tensor *w, size_t n,
                         medrun_error *e) {
    size_t rows = tensor_panels(w) * LANES, numbers = n * (w->cols + 2 * rows);
    size_t bytes = numbers * sizeof(float) + pack_bytes(pack_kind(eng, w->type), w->cols, n);
    float *x = new_array(bytes, 1);
    if (!x) return out_of_memory(e, bytes);
    float *here = x + n * w->cols, *there = here + n * rows;
    packed a = {.data = (uint8_t *)(x + numbers)};
    for (size_t i = 0; i < n * w->cols; i++) x[i] = (float)(i * 37 % 101) / 17 - 3;
    pack_activations(eng, &a, w->type, x, w->cols, w->cols, n);
    matmul(eng, &(product){w, here, rows}, 1, &a);
    if (!device_multiply(&d->base, &(product){w, there, rows}, 1, &a))
        fail(e, MEDRUN_NO_MEMORY, "device %s", d->base.says);
    else if (memcmp((void *)here, (void *)there, n * rows * sizeof *here))
        fail(e, MEDRUN_NO_MEMORY, "device %s: its products are not the processor's", d->base.name);
    return free(x), e->code;
}

/* DEVICE may be half open, or NULL. */
static void device_close(device *base) {
    opencl_device *d = (opencl_device *)base;
    if (!d) return;
    for (size_t i = 0; i < base->loaded; i++) d->cl.clReleaseMemObject(d->copies[i].bytes);
    if (d->packed) d->cl.clReleaseMemObject(d->packed);
    if (d->products) d->cl.clReleaseMemObject(d->products);
    for (int k = 0; k < 2 * N_TYPES; k++)
        if (d->kernels[k / 2][k % 2]) d->cl.clReleaseKernel(d->kernels[k / 2][k % 2]);
    if (d->program) d->cl.clReleaseProgram(d->program);
    if (d->queue) d->cl.clReleaseCommandQueue(d->queue);
    if (d->context) d->cl.clReleaseContext(d->context);
    free(d->copies), free(d);
}

/* A device for matmul that has as many of the N matrices ALL as fit, at least the first LEAST, and
 * has shown that it multiplies them right; NULL after a failure. ENG is strict: it multiplies on
 * the processor for comparison. */
static device *device_open(const device_request *r, const engine *eng, const tensor *const *all,
                           size_t n, size_t least, buffer *log, medrun_error *e) {
    opencl_device *d = new_array(1, sizeof *d);
    if (!d) return out_of_memory(e, sizeof *d), NULL;
    int kind = pack_kind(eng, TYPE_INT8), largest = pack_kind(eng, all[0]->type);
    d->base.multiply = device_multiply;
    opencl_open(&d->cl, r->library, e);
    choose_device(d, r->name, e);
    if (r->memory && r->memory < d->room) d->room = r->memory;
    build_kernels(d, r->options, kind, log, e);
    load_weights(d, largest, all, n, least, e);
    for (size_t i = 0; i < d->base.loaded && !e->code; i++)
        if (!device_agrees(d, eng, all[i], 1, e)) device_agrees(d, eng, all[i], TILE, e);
    if (!e->code) return &d->base;
    device_close(&d->base);
    return NULL;
}
#else
static device *device_open(const device_request *r, const engine *eng, const tensor *const *all,
                           size_t n, size_t least, buffer *log, medrun_error *e) {
    (void)eng, (void)all, (void)n, (void)least, (void)log;
    return fail(e, MEDRUN_USAGE, "device \"%s\": this medrun was built without OpenCL (make "
                "OPENCL=1)", r->name), NULL;
}
static void device_close(device *d) { (void)d; }
#endif /* MEDRUN_OPENCL */
/* ============================================================================================
 * 9 Model file: parse and check everything before anything is used
 *
 * NAME.mdr is "MEDRUN02", a 64-bit header length, a JSON header, the SHA-256 of all that, and then
 * sections at multiples of 4096 bytes: the tensors in the order of the header's table, and the
 * tokenizer. Padding is zero and the file ends with its last section. Everything in it is treated
 * as hostile. Also here: how files are mapped, and the one way to write them.
 * Tests: tests/09_file.c, tests/33_files.sh.
 * ============================================================================================ */

/* ---- mapped files -------------------------------------------------------------------------- */

/* Refuses a machine that cannot use checkpoints as they are mapped, or not with the same bits. A
 * host may have asked its processor to take numbers below 1.2e-38 for zero (linking with
 * -ffast-math is enough) or to round in another direction; threads of the pool inherit it.
 * `volatile`: the processor must answer, not the compiler. */
static int check_machine(medrun_error *e) {
    volatile float least = FLT_MIN, one = 1, step = FLT_EPSILON;
    volatile float half = least / 2, up = one + step * 0.75f, down = one + step * 0.25f;
    const char *why = up > one && down == one ? NULL : "does not round to the nearest number";
    if (half == 0) why = "takes tiny numbers for zero (was a part linked with -ffast-math?)";
    if (why) return fail(e, MEDRUN_FAILED, "this program's arithmetic %s: medrun would compute "
                         "other numbers", why);
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    why = "is big-endian, and checkpoints are little-endian";
#elif defined __i386__
    unsigned a, b, c, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(d >> 26 & 1)) why = "has no SSE2";
#endif
    return why ? fail(e, MEDRUN_BAD_FILE, "this processor %s: medrun cannot run here", why)
               : MEDRUN_OK;
}

/* A whole file mapped for reading. */
typedef struct {
    const uint8_t *data;
    size_t n;
} file_map;

/* Opening never waits: a pipe is refused, not read. The mapping outlives the descriptor. */
static int map_file(const char *path, file_map *map, medrun_error *e) {
    file_facts f = {0};
    *map = (file_map){0};
    if (check_machine(e)) return e->code;
    int fd = open_file(path, TO_MAP);
    if (fd < 0) return cannot(e, MEDRUN_BAD_FILE, path, "open");
    get_facts(NULL, fd, &f);
    size_t n = f.bytes > SIZE_MAX ? 0 : (size_t)f.bytes;
    const void *p = f.regular && n ? map_bytes(fd, n) : NULL;
    if (f.folder) bad_file(e, path, "is a folder, wanted a file");
    else if (!f.regular)
        bad_file(e, path, "is not a regular file but a pipe or a device, so it cannot be mapped");
    else if (!f.bytes) bad_file(e, path, "is empty");
    else if (!n)
        bad_file(e, path, "cannot map its %llu bytes: a program of 32 bits can address 4294967295",
                 (unsigned long long)f.bytes);
    else if (!p) cannot(e, MEDRUN_BAD_FILE, path, "map");
    close(fd);
    if (!p) return e->code;
    want_large_pages(p, n);
    *map = (file_map){p, n};
    return MEDRUN_OK;
}

/* Who failed half-way may call it, too. */
static void unmap_file(file_map *map) {
    if (map->data) unmap_bytes(map->data, map->n);
    *map = (file_map){0};
}

/* ---- files that medrun makes --------------------------------------------------------------- */

/* Nothing is overwritten that medrun did not make: a file of a kind begins with its MARK, at most
 * 16 bytes, or has, where there is no such mark, a multiple of UNIT bytes. */
typedef struct {
    const char *name, *mark;        /* NAME: what people call it                                */
    bool is_private, streams;       /* it holds a prompt; it may go to a pipe or a device       */
    size_t unit;                    /* 0: nothing tells this kind from others                   */
} file_kind;

/* A file is written beside its place, as PATH.partial, and renamed when it is whole and on the
 * disk: whoever opens PATH finds the old file or the new one, never a half. */
typedef struct {
    FILE *f;                        /* what the caller writes to, locked while it is written    */
    const char *path;               /* the caller's                                             */
    bool stream;                    /* PATH is a pipe, a terminal or /dev/null                  */
    buffer partial;                 /* the name beside it; empty for a stream                   */
} file_writer;

static const char *volatile being_written;      /* the last one's, which a signal's handler drops */

/* Refuses PATH where it is one of the N files INPUTS, which the caller reads; NULL is none. */
static int check_inputs(const char *path, const char *const *inputs, size_t n, medrun_error *e) {
    file_facts out;
    if (e->code || get_facts(path, -1, &out) || !out.regular) return e->code;
    for (size_t i = 0; i < n && !e->code; i++)
        if (inputs[i] && same_file(inputs[i], &out))
            fail(e, MEDRUN_USAGE, "%s: is read by the same command; choose another name", path);
    return e->code;
}

/* May a file of KIND be written to PATH? There may be nothing, an empty file, or one of this kind.
 * Only FORCE lets a link or another file be replaced. */
static int check_place(file_writer *w, const char *path, const file_kind *kind, bool force,
                       medrun_error *e) {
    char start[16];
    *w = (file_writer){.path = path, .stream = named_file(path) >= 0};
    file_facts there = {0};
    size_t n = kind->mark ? strlen(kind->mark) : 0;
    if (w->stream && !kind->streams)
        fail(e, MEDRUN_USAGE, "%s stands for an open stream, where %s cannot go; name a file (./- "
             "is one)", path, kind->name);
    if (e->code || w->stream) return e->code;
    int fd = open_file(path, TO_LOOK);
    bool link = fd < 0 && (errno == ELOOP || errno == EMLINK);  /* EMLINK: BSD's                 */
    if (link && !force)
        return fail(e, MEDRUN_USAGE, "%s is a symbolic link: name the file itself", path);
    if (link || (fd < 0 && errno == ENOENT)) return MEDRUN_OK;
    if (fd < 0 || get_facts(NULL, fd, &there)) return cannot(e, MEDRUN_FAILED, path, "write");
    bool ours = !there.bytes || (kind->unit && there.bytes % kind->unit == 0) || (n &&
                RETRY(read(fd, start, (unsigned)n)) == (int)n && !memcmp(start, kind->mark, n));
    close(fd);
    w->stream = there.stream && kind->streams;
    if (!there.regular && !w->stream)
        return fail(e, MEDRUN_FAILED, "%s: cannot write: found a %s", path, there.folder ? "folder"
                    : "device or a pipe, which is not a regular file");
    if (ours || force || w->stream) return MEDRUN_OK;
    return fail(e, MEDRUN_USAGE, "%s exists and is not %s; --force replaces it", path, kind->name);
}

/* Takes back what was written: what stood at the path stays, nothing is left beside it. The lock
 * goes last, so that nobody else's file is removed. */
static void writer_drop(file_writer *w) {
    being_written = NULL;
    if (w->partial.n) remove_file((const char *)w->partial.data);
    if (w->f) fclose(w->f);
    buffer_free(&w->partial);
    w->f = NULL;
}

/* Does a program that still runs write NAME, which was there a moment ago? If it is gone, one has
 * just finished it. */
static bool is_written(const char *name) {
    int fd = open_file(name, TO_LOOK);
    bool busy = fd < 0 ? errno == ENOENT : !lock_file(fd);
    if (fd >= 0) close(fd);
    return busy;
}

/* The file beside W's path must be new, so two writers of one name never share it. One that is
 * there belongs to a program that has its lock, or is left from one that was killed. Whoever found
 * ours before it was locked may have removed it: then the name is another's. */
static int open_partial(file_writer *w, const file_kind *kind, bool force, medrun_error *e) {
    int how = kind->is_private ? TO_CREATE : TO_WRITE;
    file_facts mine;
    buffer_printf(&w->partial, "%s.partial", w->path);
    if (w->partial.failed) return out_of_memory(e, strlen(w->path));
    const char *name = (const char *)w->partial.data;
    w->f = open_stream(name, how);
    bool is_there = !w->f && errno == EEXIST, busy = is_there && is_written(name);
    if (is_there && !busy) usleep(9000), busy = is_written(name);   /* its lock may be to come   */
    if (is_there && !busy && force && !remove_file(name)) w->f = open_stream(name, how);
    if (w->f) busy = (!lock_file(fileno(w->f)) && (usleep(9000), !lock_file(fileno(w->f)))) ||
                     get_facts(NULL, fileno(w->f), &mine) || !same_file(name, &mine);
    if (w->f && !busy) return being_written = name, MEDRUN_OK;
    if (busy)
        fail(e, MEDRUN_FAILED, "%s: cannot write: another program is writing %s", w->path, name);
    else if (is_there)
        fail(e, MEDRUN_FAILED, "%s: cannot write: %s is left from a run that was stopped; remove "
             "it, or let --force do it", w->path, name);
    else cannot(e, MEDRUN_FAILED, w->path, "write");
    w->partial.n = 0;                                   /* it is not ours                        */
    writer_drop(w);
    return e->code;
}

/* Opens W->f for a file of KIND that will stand at PATH. */
static int writer_open(file_writer *w, const char *path, const file_kind *kind, bool force,
                       medrun_error *e) {
    if (check_place(w, path, kind, force, e)) return e->code;
    if (!w->stream) return open_partial(w, kind, force, e);
    w->f = open_stream(path, TO_STREAM);
    if (w->f) return MEDRUN_OK;
    if (errno != ENXIO) return cannot(e, MEDRUN_FAILED, path, "write");
    return fail(e, MEDRUN_FAILED, "%s: cannot write: is not a regular file but a pipe that nobody "
                "reads", path);
}

/* As writer_open, but only to see if that works, before the work that will be written is done. */
static int writer_check(const char *path, const file_kind *kind, bool force, medrun_error *e) {
    file_writer w;
    if (check_place(&w, path, kind, force, e) || w.stream) return e->code;
    if (!open_partial(&w, kind, force, e)) writer_drop(&w);
    return e->code;
}

/* Waits until the folder of PATH is on the disk with its names, where a system can; Windows writes
 * names through at once. PATH is cut. */
static void sync_folder_of(char *path) {
    char *slash = strrchr(path, '/');
    if (slash) slash[1] = 0;
    int fd = open_file(slash ? path : ".", TO_READ);
    if (fd >= 0) sync_file(fd), close(fd);
}

/* Moves the file to its place. After a failure, of writing or one that E holds, drops it. */
static int writer_done(file_writer *w, medrun_error *e) {
    char *name = (char *)w->partial.data;
    if (w->f && !e->code &&
        (fflush(w->f) || ferror(w->f) ||
         (name && (sync_file(fileno(w->f)) || rename_file(name, w->path)))))
        cannot(e, MEDRUN_FAILED, w->path, "write");
    if (!e->code) w->partial.n = 0;                     /* there is nothing to take back         */
    if (!e->code && name) sync_folder_of(name);
    writer_drop(w);
    return e->code;
}

/* ---- the container ------------------------------------------------------------------------- */

enum { FILE_ALIGN = 4096, MAX_HEADER = 64 << 20, PREAMBLE = 16 };

typedef struct {
    const char *path;               /* for messages; lives as long as the file                  */
    file_map map;
    json header;                    /* nodes over the mapped text                               */
    uint32_t tensors, tokenizer;    /* nodes of the header                                      */
    uint8_t hash[32];               /* SHA-256 of preamble and header: names the checkpoint     */
    size_t at;                      /* end of the last section that was taken                   */
} model_file;

/* Takes the next section, which entry V of the header describes: it must stand where the one
 * before it ended, rounded up, and lie within the file. So no two can overlap, no byte between them
 * escapes a check, and the same tensors always give the same file. DATA then points into the
 * mapping. */
static int take_section(model_file *f, uint32_t v, const char *what, const uint8_t **data,
                        size_t *bytes, uint8_t digest[32], medrun_error *e) {
    char hex[65] = "";
    size_t wanted = round_up(f->at, FILE_ALIGN), n = f->map.n;
    int64_t offset = json_int(&f->header, v, f->path, "offset", 0, 1ll << 52, e);
    int64_t length = json_int(&f->header, v, f->path, "bytes", 1, 1ll << 52, e);
    json_text(&f->header, v, f->path, "sha256", hex, sizeof hex, e);
    if (e->code) return e->code;
    if (!parse_hex(hex, digest))
        return bad_file(e, f->path, "%s: sha256 is not 64 hex digits", what);
    if ((uint64_t)offset != wanted)
        return bad_file(e, f->path, "%s: found offset %lld, wanted %zu", what, (long long)offset,
                        wanted);
    if (wanted > n || (uint64_t)length > n - wanted)
        return bad_file(e, f->path, "%s: ends at byte %lld but the file has %zu; it was cut short, "
                        "copy it again", what, (long long)offset + length, n);
    while (f->at < wanted && !f->map.data[f->at]) f->at++;
    if (f->at < wanted) return bad_file(e, f->path, "%s: the padding before it is not zero", what);
    *data = f->map.data + wanted;
    *bytes = (size_t)length;
    f->at = wanted + *bytes;
    return MEDRUN_OK;
}

/* May be called twice, by an opening that fails and by medrun_close. */
static void file_close(model_file *f) {
    json_free(&f->header);
    unmap_file(&f->map);
}

/* The 16 bytes before the header say what the file is, its version, and the header's length N. The
 * hash is checked before the header is read as JSON: so a file that was damaged on its way is
 * called damaged, not wrong in some field. */
static int read_header(model_file *f, medrun_error *e) {
    const uint8_t *p = f->map.data;
    uint64_t n = 0;
    medrun_error why = {0};
    if (f->map.n >= PREAMBLE) memcpy(&n, p + 8, 8);
    if (f->map.n < 8 || memcmp(p, "MEDRUN", 6))
        return bad_file(e, f->path, "not a medrun checkpoint (it does not begin with MEDRUN02); "
                        "medrun-export makes one");
    if (!memcmp(p, "MEDRUN01", 8))
        return bad_file(e, f->path, "format version: found \"01\", wanted \"02\"; make it anew "
                        "from what it was made of: medrun-export SOURCE %s", f->path);
    if (memcmp(p, "MEDRUN02", 8))
        return bad_file(e, f->path, "format version: found \"%c%c\", wanted \"02\"; use a newer "
                        "medrun", isprint(p[6]) ? p[6] : '?', isprint(p[7]) ? p[7] : '?');
    if (n > MAX_HEADER || n + PREAMBLE + 32 > f->map.n)
        return bad_file(e, f->path, "header length: found %llu in a file of %zu bytes; it was cut "
                        "short or damaged, copy it again", (unsigned long long)n, f->map.n);
    f->at = PREAMBLE + (size_t)n;
    sha256_of(p, f->at, f->hash);
    if (memcmp(f->hash, p + f->at, 32))
        return bad_file(e, f->path, "the header's SHA-256 differs: the file is damaged, copy it "
                        "again");
    if (json_parse(&f->header, (const char *)p + PREAMBLE, (size_t)n, &why))
        return fail(e, why.code, "%s: header: %s", f->path, why.text);
    json_int(&f->header, 0, f->path, "format", 1, 1, e);
    f->tensors = json_field(&f->header, 0, f->path, "tensors", JSON_ARRAY, "an array", e);
    f->tokenizer = json_get(&f->header, 0, "tokenizer");
    f->at += 32;
    return e->code;
}

/* Maps PATH and reads its header. LOAD: takes the file into memory of this process alone. After a
 * failure nothing is open. */
static int file_open(model_file *f, const char *path, bool load, medrun_error *e) {
    *f = (model_file){.path = path};
    if (map_file(path, &f->map, e)) return e->code;
    size_t n = f->map.n;
    void *own = load ? map_bytes(-1, n) : NULL;
    if (own) {
        want_large_pages(own, n);
        memcpy(own, f->map.data, n);
        unmap_bytes(f->map.data, n);
        f->map.data = own;
    } else if (load)
        fail(e, MEDRUN_NO_MEMORY, "%s: no memory for its %zu MB", path, n >> 20);
    if (e->code || read_header(f, e)) file_close(f);
    return e->code;
}
/* ============================================================================================
 * 10 Tokenizer: text to ids and back
 *
 * Byte-level BPE, id for id as Hugging Face `tokenizers` does it, in three steps:
 *   1. added tokens, such as <|eot_id|>, are cut out where they are allowed to be found;
 *   2. the pre-tokenizer's pattern splits the rest into words, numbers, runs of white space;
 *   3. a word that is a piece is its id; else it starts as its single bytes, and the neighbours
 *      whose merge has the lowest rank become one, again and again: h-e-l-l-o, he-l-l-o, he-ll-o.
 * SentencePiece BPE has no pattern in step 2; it puts a space before the text, so that its first
 * word is like any other. In step 3 its words start as characters, or bytes where one is no piece.
 * A byte-level vocabulary may lack bytes: they are left out of the ids, as tokenizers does it.
 * All of it is linear in the text (n log n inside one very long word), whatever the text is. A
 * tokenizer is read-only once it is open. Uses section 3. Tests: tests/10_tokenizer.c.
 * ============================================================================================ */

/* ---- Unicode classes ----------------------------------------------------------------------- */

/* The patterns ask of a character whether it is a letter, a number or white space (and tekken's,
 * which kind of letter, and whether it is a mark). Everything else is of class OTHER. */

/* CLASS_ALT: even code points are upper case, odd ones lower. CLASS_ALT_ODD: the other way. */
enum { CLASS_OTHER, CLASS_LU, CLASS_LL, CLASS_LT, CLASS_LM, CLASS_LO, CLASS_M, CLASS_N,
       CLASS_SPACE, CLASS_ALT, CLASS_ALT_ODD };

/* Made by tools/unicode.py: Unicode 16.0, as in Hugging Face tokenizers' regex engine. Runs
 * of code points, each a character, class * 8 + length; or, where the length is not 1 to 7,
 * class * 8 and the length in digits of base 45, the last of them plus 45. Digits are the
 * characters from # to ~ without ? and \. Two digits of base 90 are a mark: where the runs of
 * the next 512 code points begin. Equal blocks share them, and one block is all behind U+1FFFF. */
static const char unicode_runs[] =
    "#Zj#df#a][*+l)3l#[f#lf#ZM*_$4&^M$`$+i$23j$3Ym$]ucm$T{5-qx-5/wp-6-wtyqx-yo4Mo5P,<w<o<ucmew<q-t"
    "m$X9-woy.mZ3$iM3mDd'D^#`I*E$E#cT%hqE$o%E6$,),$.$,$-w+b$+Z3uwo-6mj7o$xow-+$T3$Tmt$[m$[u`m%X$+x"
    "%E)3{#YT$Q$U$V$V$U#YLm'P#_#bT](LrEL[Tg]['NUL%Z$M[%ZFV$XN][O%M#bMULpTm%L$~T]M#`][LsTZF'E%U%LhX"
    "ETZEWEY#dLkW'L](Lj$R#YTZL{ETj$TsL$ZWMTdM[L[V%][$ELaW$LY%N%Lh$S$M&P%UM[%V%WM#YU'N$OV%][N%c%M$U"
    "$$W$R'N%Lh$S$N$N$N%U$Y'V%W&U*P$M*][VOU#]W$LZ$O$Lh$S$N$Q%UMTY$W$W%M#aNV%][#ZMZ$W$LY%N%Lh$S$N$Q"
    "%UM[%V%W*W'N$OV%][$Mc#[UM$R&O$P&N$M$N&N&O&L^'Y&W$X%M)U#`]_#_YLY$O$Li$Lb%UM[$W$X*V$O%M%NV%][#Y"
    "d$MW$LY$O$Li$L[$Q%UM[$W$X*V)N$NV%][$NU#^XLZ$O$L{VM[$W$XM(OUdOV%]e$R$W$Ld&Lj$LZ$M%S&U'Z$U$TY)]"
    "[%V#^$L$TUN[(RETY$][#yN$M$Q$Lj$M$L[UNTZM%Q$E$[$][%P#rM#iV)]f$U$U$U'VLY$Lv'Tf$VQT]$Tv#ZU#$^L}T"
    "fM][)RXPWMWN[OXL_T^MU][X%+x$,(,%3}$E6L(qL$n$P%S$M$P%L{$P%Ls$P%S$M$P%La$L$^$P%L$h%W#Z]f&Lb#b+$"
    "{%9%$L.bL%e%LcfLl(L$p&`LY*LdX#ZLeW#]LdV#^L_$O$V#^L$XTr&E'MU%][)][)#]W$U][)LuEL$Y*QVLtUM(L$k#["
    "Lq$T^'T^#[][Lp%Q#]L~'Ll)]]#wLiY'L$YT[$To%U][)][#_E#YTq#$UYL$STcLY&][#cTZ#^WLpT_N][L~T`#^LvTf#"
    "Y][&O][LpJ%3Zw(+}%.#bW$TgPURUNWM(3~D$d3_E3tDwT$em&a3Ym%Y3Y+Y9%1%3Y+Y3Y+Y9%1%3Y$,$,$,$w:+Y3`%3"
    "Y;Y3Y;Y3Y;Y8$5/<$4&6$5/<&7%5/'3Y0(6$5/<&e]#og(f#$Sf#b^E%c(E][)D_#$WTs#c,',%w-5.4$,&0),$,$,$/$"
    "o.4P4%5-(w6'4$]$Wwb#%n#.c#%W]$a#$s]h#(q#+`]p#%d+$T3$Tp-5|.px8F.m%Z4)yWo#Z^%3x$4(4%L$]*E#aULi#"
    "ZS$S$S$S$S$S$S$S$Tr#$SE#-`f'EM^#k]ZZ$I%`EM'L${%V%FM$L%Q$GM(L}$L%U&a#[Lr#$TLb#r][#p]Y$]a#r][#y"
    "]a#*VL.cL,}#$eLgEL-zL&W#$hLzJ%L(qL^E&Lb][N#fm$RMX$T[$EmnFVL$k][V#wDZ%m`5m$cE3Yzm[E%yMq5mg/o/m"
    "b.yo%o$4$mY#gGwMF4QNUOUPULiY'U&c#[L$X#^VL$VTd#[][)TdR&M$NU][LnTY%LiT_#^Lo&XL$ST`#`E][)QUELZ]["
    "Q$L{T`#ZOULYV%][)LbER&MWL$VUMWNVQVMUM#jNE%L]Y%MFV#[R%R%R#ZS$S$3}$H3ZE)3$uLuTY$V%][)L,a#^Li'L$"
    "U'#(qL(qL%f%L%b#x:#^8(MUL[$L_$Q$M$N$N$L%d#sL$QL*T#dL$e%L$Z#zL^'Tb#bTb#$eQ$L&Q#e][*+l)3l#]L[EL"
    "$QFLq&R%R%R%O#uL^$Ll$Le$N$La%L`#tL%s#^]$Q#^]$^#c_#%iU%#%xLo&L$U#aU]m'Lra#ZLf^LY^(LxY(Lp%Lv'LY"
    "$b#|+z3zL$s%][)+v'3v'Lz#YL$X#^+]$+a$2$-$3]$3a$:$5&L$X#^L){#ZLh#[LY#jJ$D|$DZ#$jR%M$L~$N&M%Li%]"
    "YLi%dLq#Y]Z#$TLe$N(bLhc'Ll#$kL$]'_N]b%]$RMW$V(XP$O$Lo%W'U]Z#iLo_$Lo`#rLY$LnV'b#bL$Z#[Lh%]YLe("
    "]YLd#id#$uL$n#$[+$W#_3$W*cLvX#Y][)][PEM+h&Y$E3h#%r#%W]q$L|$V&N#bO#$[XLo][M#YLhT]a#mLdX#|Lgd#f"
    "Li#ZWL$YTa#]]pUNVM#ZXL$QT]*U#_Lk*][)WLvT`$]['MVM#YLuU%M#ZWL$TT`P'X$V][M$M']f#]Ld$LkT^)UNU#$cS"
    "$M$P$La$L[*L$ST^(][)X$LY%N%Lh$S$N$Q$VM[%V%W%M)U(QV%[&Y#]L[$M%M$Lx$MTZ$U%U$X$YMUM#_V#oL$YTdP(]"
    "['UO#pL$TTfN$M#Y][#&qL$S[%TZ#iPV#tL$TTc&M#]][#xL}T_M*][)]f#nLm%Ta']^'S#'VL~Ta#%]+r3r]e#^LY%M%"
    "LY$N$LjZ$V%XMUMV#^][#$kLY%Ly[%[M$MU#mMT[Lz[MX#YU#YMT]L$RTb&M#dL$n#'eLs#a][)LZ$LwTY$TYM#a]o(Lp"
    "%Th$T`#$nS$N$LxZ&U$V$[MU#Y][)R$N$LrY$V$YM*][#${#'~LeX#ZVMUL_$Lt[&Y#_][U#$zM#a]g#}L,V#%^]%g#cL"
    "'b#'Y#+zL%X#aL$T#bURTa#[L,]L.^(L$l#,v#(qLpTd][#'dL$^*Lq$][)L$t$][)Lp%Y#]L$T[#ZH#^][$d$Lg(Le#%"
    "h#*VGLzF&][#%~#$e+r3r]i#%aL$p'UMT$[*XD_#$eF$EU#]V#`L.Z#YL't#{L[#(h#.RH$K$F$L)g#aM#oO%M#`P#YL&"
    "ZL(m#(uL%c(L_&LZ*L[&V#*x#(a][#(w#(qT$R%Ti#'V#*|Y&Z#YTY%[#pX#$w#$gW#%s]f#^]f#%d]k#&Q+l3l+l:$3d"
    "+l3l,$-%,%-%/$+Y7$4$:$3]+l3l-$/%+Y$2$3l-$/$0$,&2$3l+l3l+l3l+l3d3Y+l3l+l3l+l3n%+k$3k$9+k$3k$9+"
    "k$3k$9+k$3k$9+k$3k$9o%]$VT$['T$V#YU#`U#hY$Ta#*g#(q3[M3f)9#'s[$Tc%[$V$Y(D$c#sU#%hL$Q&[K%]['M#&"
    "|#&ZLpU#cL~X][#(w#'nLmEX][#'tLpVM][(#-pS$P$N$La$L'c%]Z[#{+t3t[E'][#&q#%i]$`$`$a#$q]$Q$]a#'`P$"
    "Lm$N$M%M$L[$P$M$M)M'M$M$M$O$N$M%M$M$M$M$M$N$M%P$S$P$P$M$L[$Lc(O$Q$Lc#*Z#(q]_#(d#.R][)L8'a#rL%"
    "%`)L'|%L%JS#`L&CT#aL0w#$,vL/S#EgL%6t(L%&X#*H>lT(a#%)JS";
static const char unicode_marks[] =
    "##$&$p%D&)'0(p*=+8+e,C,G-&-_.@.v/q0b0e0s0b0b0{1b1i2@2V2V2V2V2V2V2V2V2V2V2V2V2Y2V2V2V2V2V2V2V2"
    "V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2V2`2V2f2s3h4Y2V2V2V2V2V2V2V"
    "2V2V2V2V2V2V2V2V2V2V2V2V2V2V5P0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b5]5c6-6>6m787e8<8T919q:=:n;^<h="
    "6=_><>d@J2V@m@s0b0b0b0b@~2V2VA*2V2V2V2V2V2VA82VA<0b0b0b0b0b0b0b0b0b0b0b0bAC0b0b0b2VAOA}B.2V2V"
    "2V2V2V2V2V2V2V2V2VBT2V2VBY0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0bBdBmC$0b0b0b0bC*0b0b0b0b0b0b0bC;CDC"
    "PCcCxDg0bEC0bEYEgF-F=FQF^0bFsG-Gx0b0b0b0bH$0b0bH*";

enum { CLASS_END = 16 };        /* the end of the text, where a class is asked for             */

/* Two characters are left out that mean something in a C string. */
static uint32_t unicode_digit(char c) { return (uint32_t)(c - '#' - (c > '?') - (c > '\\')); }

/* Walks over the runs of CODE's block to its own: for most scripts that is a few dozen steps. */
static int unicode_class(uint32_t code) {
    uint32_t block = code < 0x20000 ? code / 512 : 256, left = code - 512 * block;
    const char *mark = unicode_marks + 2 * block;
    const char *run = unicode_runs + 90 * unicode_digit(mark[0]) + unicode_digit(mark[1]);
    for (;;) {
        uint32_t digit = unicode_digit(*run++), length = digit % 8, class = digit / 8;
        for (bool last = length != 0; !last; run++) {
            digit = unicode_digit(*run);
            last = digit >= 45;
            length = length * 45 + digit % 45;
        }
        if (left >= length) { left -= length; continue; }
        if (class < CLASS_ALT) return (int)class;
        return (code % 2 == 1) == (class == CLASS_ALT_ODD) ? CLASS_LU : CLASS_LL;
    }
}

/* The class of the character at P, and its length. A byte that starts no valid character counts as
 * one of class OTHER: it goes through like a punctuation mark and comes back as it was. */
static int class_at(const uint8_t *p, size_t n, size_t *len) {
    uint32_t code;
    *len = n ? 1 : 0;
    if (!n) return CLASS_END;
    if (p[0] < 0x80) {                                  /* the same as the table says, quicker   */
        if ((uint8_t)(p[0] - 'a') < 26) return CLASS_LL;
        if ((uint8_t)(p[0] - 'A') < 26) return CLASS_LU;
        if ((uint8_t)(p[0] - '0') < 10) return CLASS_N;
        return p[0] == ' ' || (uint8_t)(p[0] - '\t') < 5 ? CLASS_SPACE : CLASS_OTHER;
    }
    size_t length = utf8_decode(p, n, &code);
    if (!length) return CLASS_OTHER;
    *len = length;
    return unicode_class(code);
}

/* Sets of classes, a bit for each. In the patterns \p{L} is LETTERS and [^\s\p{L}\p{N}] is MARKS;
 * Tekken's [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}] is UPPER, [\p{Ll}\p{Lm}\p{Lo}\p{M}] LOWER. */
enum { CASELESS = 1 << CLASS_LM | 1 << CLASS_LO, MARKS = 1 << CLASS_OTHER | 1 << CLASS_M,
       LETTERS = 1 << CLASS_LU | 1 << CLASS_LL | 1 << CLASS_LT | CASELESS,
       UPPER = 1 << CLASS_LU | 1 << CLASS_LT | 1 << CLASS_M | CASELESS,
       LOWER = 1 << CLASS_LL | 1 << CLASS_M | CASELESS };

/* The end of the characters from START on whose classes are in SET. */
static size_t end_of_run(int set, const uint8_t *p, size_t n, size_t start) {
    size_t i = start, len;
    while (set >> class_at(p + i, n - i, &len) & 1) i += len;
    return i;
}

static bool is_line_end(uint8_t c) { return c == '\r' || c == '\n'; }

/* ---- pre-tokenizers ------------------------------------------------------------------------ */

/* A pre-tokenizer's pattern is a list of alternatives; the first that matches gives the next word.
 * Llama 3's: (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|
 *     " ?[^\s\p{L}\p{N}]+[\r\n]*"|\s*[\r\n]+|\s+(?!\S)|\s+      (the quotes stand for the space)
 * Tekken's: [^\r\n\p{L}\p{N}]?[U]*[W]+|[^\r\n\p{L}\p{N}]?[U]+[W]*|\p{N}|
 *     " ?[^\s\p{L}\p{N}]+[\r\n/]*"|\s*[\r\n]+|\s+(?!\S)|\s+     (U and W: see cased_word)
 * SmolLM's is two, one after the other: each \p{N} is a piece, and between them GPT-2's
 *     's|'t|'re|'ve|'m|'ll|'d|" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"|\s+(?!\S)|\s+ */
typedef struct {
    const char *tail;           /* of these as many as come end a word of marks                */
    char name[24];              /* in tokenizer.bin; an unknown one is refused, never guessed  */
    int digits;                 /* at most so many in a word; 0: SentencePiece has no pattern  */
    bool cased;                 /* Tekken's words, and no contractions                         */
    bool gpt2;                  /* contractions as they are written here, only a space before
                                   letters, and no word for the ends of lines                  */
} pretokenizer;

static const pretokenizer pretokenizers[] = {
    {.name = ""},
    {.name = "llama3", .digits = 3, .tail = "\r\n"},
    {.name = "tekken", .digits = 1, .tail = "\r\n/", .cased = true},
    {.name = "smollm", .digits = 1, .tail = "", .gpt2 = true},
};

/* (?i:'s|'t|'re|'ve|'m|'ll|'d), P at the apostrophe: its length, or 0. Ignoring the case, the
 * reference also takes the long s (U+017F) for an s, and no other letter for another. */
static size_t contraction(const pretokenizer *t, const uint8_t *p, size_t n) {
    if (n >= 3 && p[1] == 0xC5 && p[2] == 0xBF) return t->gpt2 ? 0 : 3;
    int lower = t->gpt2 ? 0 : 0x20, a = n >= 2 ? p[1] | lower : 0, b = n >= 3 ? p[2] | lower : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    return (a == 'l' && b == 'l') || ((a == 'r' || a == 'v') && b == 'e') ? 3 : 0;
}

/* Tekken's words are [U]*[W]+|[U]+[W]*, U for UPPER and W for LOWER: "camelCase" is two. What is in
 * both may go to either side: with no lower case after the run of [U], the first alternative gives
 * back up to the last character that [W] has too; only if there is none, the second takes the whole
 * run. This is linear: what is left of a run is upper case, all of which is the next word. The end
 * of the word from START, which is START where there is none. */
static size_t cased_word(const uint8_t *p, size_t n, size_t start) {
    size_t run = end_of_run(UPPER, p, n, start), word = end_of_run(LOWER, p, n, run);
    if (word > run) return word;
    for (size_t i = start, both; i < run; i = both) {
        i = end_of_run(UPPER & ~LOWER, p, n, i);
        both = end_of_run(UPPER & LOWER, p, n, i);
        if (both > i) word = both;
    }
    return word;
}

/* \s*[\r\n]+ | \s+(?!\S) | \s+, P at white space: up to the last line end of the run if it has
 * one; else all of it, but for its last character when something follows (it belongs to the next
 * word). What is left of the run is white space again and is looked at once more, not oftener.
 * GPT-2's has no line ends, and sees no number, as those were cut out before. */
static size_t white_space(const pretokenizer *t, const uint8_t *p, size_t n) {
    size_t end = end_of_run(1 << CLASS_SPACE, p, n, 0), last = end - 1, len;
    size_t line = t->gpt2 ? 0 : end;
    int next = class_at(p + end, n - end, &len);
    while (line && !is_line_end(p[line - 1])) line--;
    if (line) return line;
    while ((p[last] & 0xC0) == 0x80) last--;            /* to where a character begins           */
    return next == CLASS_END || !last || (t->gpt2 && next == CLASS_N) ? end : last;
}

/* The length of the first word in N > 0 bytes, at least 1. */
static size_t next_word(const pretokenizer *t, const uint8_t *p, size_t n) {
    size_t first, len, i;
    int class = class_at(p, n, &first);
    bool space = p[0] == ' ', inside = (t->cased ? UPPER | LOWER : LETTERS) >> class & 1;
    if (class == CLASS_N) {                             /* \p{N}{1,3}                            */
        i = first;
        for (int k = 1; k < t->digits && class_at(p + i, n - i, &len) == CLASS_N; k++) i += len;
        return i;
    }
    if (p[0] == '\'' && !t->cased && (len = contraction(t, p, n))) return len;
    if (inside || (t->gpt2 ? space : !is_line_end(p[0]))) {     /* [^\r\n\p{L}\p{N}]?\p{L}+      */
        size_t start = inside ? 0 : first;
        i = t->cased ? cased_word(p, n, start) : end_of_run(LETTERS, p, n, start);
        if (i > start) return i;
    }
    i = end_of_run(MARKS, p, n, space ? first : 0);     /* " ?[^\s\p{L}\p{N}]+[\r\n]*"           */
    if (i == (space ? first : 0)) return white_space(t, p, n);
    while (i < n && p[i] && strchr(t->tail, p[i])) i++;
    return i;
}

/* ---- the tokenizer and its tables ---------------------------------------------------------- */

/* tokenizer.bin, little-endian, nothing after its last array:
 *    0 "MEDTOK01"
 *    8 SHA-256 of all bytes from 40 on
 *   40 u32 version 1, kind, flags, vocab_size, n_merges, bos_id (or 0xFFFFFFFF), text_bytes,
 *      reserved 0
 *   72 char pretokenizer[24], padded with NUL; none for kind 2
 *   96 u32 piece_end[vocab_size]   where each piece ends in text; it begins where the last ended
 *      u8 piece_type[vocab_size]   padded to a multiple of 4
 *      u32 merges[n_merges][2]     two ids; the first pair has the lowest rank
 *      f32 scores[vocab_size]      with the flag for them, and then no merges
 *      u8 text[text_bytes]         the pieces' bytes, added tokens as they are written
 * The result of a merge is not stored: it is the piece that reads as the two together. With scores
 * any two pieces merge that give a third, the highest score first. The pieces of kind 2 have spaces
 * where SentencePiece writes U+2581, and a byte piece is that byte, not "<0x0A>". */

/* Control tokens mean something to the model and are not text; user-defined ones are text that was
 * added whole to the vocabulary, such as "\begin{"; an unused id has no piece. Kind 2 only: bytes
 * stand for characters that are not pieces; an unknown piece is only ever decoded. */
enum { PIECE_NORMAL = 1, PIECE_UNKNOWN, PIECE_CONTROL, PIECE_USER, PIECE_UNUSED, PIECE_BYTE };

enum {
    TOKENIZER_HEAD = 96,        /* bytes before the first array of the file                    */
    TOKENIZER_BYTE_LEVEL = 1, TOKENIZER_SENTENCEPIECE = 2,      /* kind                        */
    TOKENIZER_MAX_PIECES = 1 << 24,
    TOKENIZER_MAX_ADDED = 256,  /* bytes in an added token, as each start of one may cost them,
                                   and in a piece with a score, as each end of one does        */
    MAX_PROBES = 256,           /* a table that needs more was made to be slow                 */
};

enum {                          /* flags; those from SCORES on only of kind 2                  */
    TOKENIZER_IGNORE_MERGES = 1, TOKENIZER_ADD_BOS = 2,
    TOKENIZER_SCORES = 4,
    TOKENIZER_PREFIX_RUNS = 8,  /* a space before the text, and after each added token in it   */
    TOKENIZER_PREFIX_TEXT = 16, /* only before the text                                        */
    TOKENIZER_UNLESS_SPACE = 32,        /* not where a space is already                        */
    TOKENIZER_USER_INSIDE = 64, /* a user-defined token does not end what one space stands for */
    TOKENIZER_STRIP = 128,      /* decoding takes the first space away                         */
};

#define NO_ID UINT32_MAX        /* no id, no rank, no neighbour; an empty slot                 */
#define HASH_START 2166136261u

/* Both tables are open: an entry stands in the first free slot from its hash on, and what is looked
 * for ends at the first empty one. The hash of a piece saves most looks at its text. */
typedef struct {
    uint32_t hash, id;
} piece_slot;

/* It has the result, too, so that a merge costs one look. */
typedef struct {
    uint32_t left, right, result, rank;
} pair_slot;

typedef struct {
    const uint8_t *text;
    uint32_t n, id;
} added_token;

typedef struct {
    int kind, vocab_size, bos;  /* bos: id, or -1                                              */
    uint32_t flags;
    bool add_bos, has_user_tokens, has_unused;
    const pretokenizer *pretokenizer;
    const uint8_t *piece_end, *piece_type, *merges, *scores, *text; /* in the file's bytes     */
    size_t n_merges, longest;   /* longest: bytes of the longest normal piece                  */
    piece_slot *pieces;         /* open addressing: text -> id, normal pieces only             */
    pair_slot *pairs;           /* open addressing: two ids -> their merge                     */
    size_t piece_mask, pair_mask;
    added_token *added;         /* control and user-defined tokens, sorted by their bytes      */
    size_t n_added;
    bool added_first[256];      /* the bytes that added tokens begin with                      */
    uint32_t byte_id[256];      /* NO_ID: a byte that the vocabulary lacks                     */
    uint8_t joins[256][32];     /* kind 2: a bit for two bytes that stand together in a piece  */
} tokenizer;

/* Number I of an array that may lie at any address. */
static uint32_t u32_at(const uint8_t *p, size_t i) {
    uint32_t v;
    memcpy(&v, p + 4 * i, 4);
    return v;
}

/* The bytes of piece ID, which must be in range; also those of a control token. */
static const char *tokenizer_piece(const tokenizer *t, int32_t id, size_t *n) {
    uint32_t start = id ? u32_at(t->piece_end, (size_t)id - 1) : 0;
    *n = u32_at(t->piece_end, (size_t)id) - start;
    return (const char *)t->text + start;
}

/* PIECE_NORMAL and so on; ID must be in range here, too. */
static int tokenizer_type(const tokenizer *t, int32_t id) { return t->piece_type[id]; }

/* FNV-1a, to be continued over several parts: quick for words, which are short. Pieces that were
 * made to collide are refused when the file is opened. */
static uint32_t hash_text(uint32_t h, const void *text, size_t n) {
    for (const uint8_t *p = text; n--; p++) h = (h ^ *p) * 16777619u;
    return h;
}

/* The upper bits of a product depend on all bits of the factor. */
static uint32_t hash_pair(uint32_t left, uint32_t right) {
    uint64_t h = ((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15u;
    return (uint32_t)(h >> 32 ^ h >> 15);
}

/* The normal piece that reads A then B, or NO_ID. No entry stands further from its hash than
 * MAX_PROBES, opening sees to that, so no text makes a search long. */
static uint32_t find_piece(const tokenizer *t, const void *a, size_t na, const void *b, size_t nb) {
    uint32_t hash = hash_text(hash_text(HASH_START, a, na), b, nb);
    for (size_t probe = 0; probe < MAX_PROBES; probe++) {
        const piece_slot *s = &t->pieces[(hash + probe) & t->piece_mask];
        size_t n;
        if (s->id == NO_ID) return NO_ID;
        if (s->hash != hash) continue;
        const char *text = tokenizer_piece(t, (int32_t)s->id, &n);
        if (n == na + nb && !memcmp(text, a, na) && !memcmp(text + na, b, nb)) return s->id;
    }
    return NO_ID;
}

/* The merge of two ids, or one with rank NO_ID, which is the largest rank there is. */
static const pair_slot *find_pair(const tokenizer *t, uint32_t left, uint32_t right) {
    static const pair_slot none = {NO_ID, NO_ID, NO_ID, NO_ID};
    uint32_t hash = hash_pair(left, right);
    for (size_t probe = 0; probe < MAX_PROBES; probe++) {
        const pair_slot *s = &t->pairs[(hash + probe) & t->pair_mask];
        if ((s->left == left && s->right == right) || s->rank == NO_ID) return s;
    }
    return &none;
}

/* The order of bytes, a token before those that go on where it ends. */
static int compare_added(const void *a, const void *b) {
    const added_token *x = a, *y = b;
    int order = memcmp(x->text, y->text, x->n < y->n ? x->n : y->n);
    return order ? order : (x->n > y->n) - (x->n < y->n);
}

/* The id of the piece that reads TEXT, an added token before a normal one, or -1. */
static int32_t tokenizer_find(const tokenizer *t, const char *text, size_t n) {
    if (n == 0 || n > UINT32_MAX) return -1;
    added_token key = {(const uint8_t *)text, (uint32_t)n, 0};
    const added_token *a = bsearch(&key, t->added, t->n_added, sizeof key, compare_added);
    if (a) return (int32_t)a->id;
    return n > t->longest ? -1 : (int32_t)find_piece(t, text, n, "", 0);
}

/* ---- opening ------------------------------------------------------------------------------- */

/* A tokenizer.bin that is being opened. The first failure is kept, so that what a file must hold
 * can be read as a list; a step goes on after one as far as that is safe, the next is not taken. */
typedef struct {
    tokenizer *t;
    const uint8_t *bytes;       /* (n) the file                                                */
    size_t n;
    const char *what;           /* names it in messages                                        */
    medrun_error e;
} opener;

/* All refusals of a field read the same. */
static void check_field(opener *o, bool good, const char *field, size_t found, const char *wanted) {
    if (good) return;
    bad_file(&o->e, o->what, "tokenizer: %s: found %zu, wanted %s; export it again", field, found,
             wanted);
}

/* The fixed part of the file; places the arrays after it and checks that they fill the file: each
 * count is bounded first, and the sum has 64 bits, so that no file makes it wrap. A flag from later
 * is refused: whoever set it wanted other ids than this medrun would make. */
static void open_head(opener *o) {
    tokenizer *t = o->t;
    const uint8_t *head = o->bytes + 40;
    uint8_t digest[32];
    if (o->n < TOKENIZER_HEAD || memcmp(o->bytes, "MEDTOK01", 8)) {
        bad_file(&o->e, o->what, "tokenizer: this is not a medrun tokenizer (no MEDTOK01 at its "
                 "start); make one with medrun-export");
        return;
    }
    uint32_t version = u32_at(head, 0), kind = u32_at(head, 1), flags = u32_at(head, 2);
    uint32_t vocab = u32_at(head, 3), n_merges = u32_at(head, 4), bos = u32_at(head, 5);
    uint32_t n_text = u32_at(head, 6), reserved = u32_at(head, 7);
    bool byte_level = kind == TOKENIZER_BYTE_LEVEL, scores = flags & TOKENIZER_SCORES;
    size_t n_types = ((size_t)vocab + 3) & ~(size_t)3, n_scores = scores ? vocab : 0;
    uint64_t wanted = (uint64_t)TOKENIZER_HEAD + 4ull * vocab + n_types + 8ull * n_merges +
                      4ull * n_scores + n_text;
    check_field(o, version == 1, "version", version, "1");
    check_field(o, byte_level || kind == TOKENIZER_SENTENCEPIECE, "kind", kind,
                "1 (byte-level BPE) or 2 (SentencePiece BPE)");
    check_field(o, !byte_level || flags <= 3, "flags", flags, "0 to 3");
    check_field(o, byte_level || (flags <= 255 && !(flags & TOKENIZER_IGNORE_MERGES)), "flags",
                flags, "0 to 254, no ignore_merges");
    check_field(o, !scores || !n_merges, "n_merges", n_merges, "0, as there are scores");
    check_field(o, vocab && vocab <= TOKENIZER_MAX_PIECES, "vocab_size", vocab, "1 to 16777216");
    check_field(o, n_merges <= TOKENIZER_MAX_PIECES, "n_merges", n_merges, "at most 16777216");
    check_field(o, !reserved, "reserved field", reserved, "0");
    if (wanted != o->n)
        bad_file(&o->e, o->what, "tokenizer: found %zu bytes, its head wants %llu; the file was "
                 "cut, copy it again", o->n, (unsigned long long)wanted);
    check_field(o, bos == NO_ID || bos < vocab, "bos_id", bos, "an id of the vocabulary");
    check_field(o, bos != NO_ID || !(flags & TOKENIZER_ADD_BOS), "flags", flags,
                "no add_bos, as there is no bos_id");
    if (o->e.code) return;
    t->kind = (int)kind, t->flags = flags, t->bos = bos == NO_ID ? -1 : (int)bos;
    t->vocab_size = (int)vocab, t->n_merges = n_merges, t->add_bos = flags & TOKENIZER_ADD_BOS;
    t->piece_end = o->bytes + TOKENIZER_HEAD, t->piece_type = t->piece_end + 4ull * vocab;
    t->merges = t->piece_type + n_types, t->scores = t->merges + 8ull * n_merges;
    t->text = t->scores + 4ull * n_scores;
    sha256_of(o->bytes + 40, o->n - 40, digest);
    if (memcmp(digest, o->bytes + 8, 32))
        bad_file(&o->e, o->what, "tokenizer: not the SHA-256 that its head says: the file is "
                 "damaged, copy it again");
}

/* Finds the pre-tokenizer by its name, which fills its field with NULs to the end. Kind 2: none. */
static void open_pretokenizer(opener *o) {
    const char *name = (const char *)o->bytes + 72;
    bool byte_level = o->t->kind == TOKENIZER_BYTE_LEVEL;
    for (size_t i = 0; i < sizeof pretokenizers / sizeof *pretokenizers; i++) {
        const pretokenizer *p = &pretokenizers[i];
        if (!memcmp(p->name, name, sizeof p->name) && byte_level == (p->digits > 0))
            o->t->pretokenizer = p;
    }
    if (!o->t->pretokenizer)
        bad_file(&o->e, o->what, "tokenizer: pretokenizer: found \"%.24s\", wanted \"llama3\", "
                 "\"tekken\" or \"smollm\", or none for SentencePiece; this medrun does not know "
                 "that pattern", name);
}

/* Each piece's end and type; counts what the tables will hold. After this tokenizer_piece is safe
 * for every id: the ends rise, and the last is the end of the text. */
static void check_pieces(opener *o) {
    tokenizer *t = o->t;
    size_t vocab = (size_t)t->vocab_size, start = 0;
    bool byte_level = t->kind == TOKENIZER_BYTE_LEVEL, scores = t->flags & TOKENIZER_SCORES;
    for (size_t id = 0; id < vocab && !o->e.code; id++) {
        size_t end = u32_at(t->piece_end, id), n = end - start;
        int type = t->piece_type[id];
        bool normal = type == PIECE_NORMAL, added = type == PIECE_CONTROL || type == PIECE_USER;
        bool known = normal || added || type == PIECE_UNUSED ||
                     (!byte_level && (type == PIECE_UNKNOWN || type == PIECE_BYTE));
        check_field(o, end >= start, "piece_end", end, "ends that rise");
        check_field(o, known, "piece_type", (size_t)type, "1 to 6, 2 and 6 of kind 2");
        check_field(o, (n == 0) == (type == PIECE_UNUSED), "bytes of a piece", n,
                    "some, or none and type 5");
        check_field(o, !added || n <= TOKENIZER_MAX_ADDED, "bytes of an added token", n,
                    "at most 256");
        check_field(o, !normal || !scores || n <= TOKENIZER_MAX_ADDED,
                    "bytes of a piece with a score", n, "at most 256");
        check_field(o, type != PIECE_BYTE || n == 1, "bytes of a byte piece", n, "1");
        if (normal && n > t->longest) t->longest = n;
        t->has_user_tokens |= type == PIECE_USER;
        t->has_unused |= type == PIECE_UNUSED;
        t->n_added += added;
        start = end;
    }
    check_field(o, start == u32_at(o->bytes, 16), "last piece_end", start, "text_bytes");
    for (const uint8_t *p = t->piece_type + vocab; p < t->merges; p++)
        check_field(o, !*p, "padding of piece_type", *p, "0");
    check_field(o, t->bos < 0 || tokenizer_type(t, t->bos) == PIECE_CONTROL, "bos_id",
                (size_t)t->bos, "a control token");
}

/* A table for N entries. At most two thirds of its slots get full, as an open table is slow near
 * its end; their number is a power of two, so that a MASK does for a division. Every byte of an
 * empty slot is 0xFF. */
static void *new_table(opener *o, size_t n, size_t size, size_t *mask) {
    size_t slots = 16;
    while (slots < n + n / 2) slots *= 2;
    void *p = MEDRUN_ALLOC(NULL, slots * size);
    if (!p) return out_of_memory(&o->e, slots * size), NULL;
    *mask = slots - 1;
    return memset(p, 0xFF, slots * size);
}

/* The first empty slot from HASH on, where a slot has so many WORDS. Its last one is an id or a
 * rank, so only that of an empty slot is NO_ID. */
static size_t empty_slot(opener *o, const void *table, size_t words, size_t mask, uint32_t hash,
                         const char *field) {
    const uint32_t *last = (const uint32_t *)table + words - 1;
    size_t probe = 0;
    while (probe < MAX_PROBES && last[((hash + probe) & mask) * words] != NO_ID) probe++;
    check_field(o, probe < MAX_PROBES, field, probe, "fewer");
    return (hash + probe) & mask;
}

/* The table of normal pieces, which must differ: of two with one text nobody knows which id was
 * meant. */
static void index_pieces(opener *o) {
    tokenizer *t = o->t;
    t->pieces = new_table(o, (size_t)t->vocab_size, sizeof *t->pieces, &t->piece_mask);
    for (int32_t id = 0; id < t->vocab_size && !o->e.code; id++) {
        size_t n;
        if (tokenizer_type(t, id) != PIECE_NORMAL) continue;
        const char *text = tokenizer_piece(t, id, &n);
        uint32_t hash = hash_text(HASH_START, text, n);
        bool differs = find_piece(t, text, n, "", 0) == NO_ID;
        check_field(o, differs, "piece", (size_t)id, "pieces that all differ");
        size_t at = empty_slot(o, t->pieces, 2, t->piece_mask, hash, "pieces with one hash");
        t->pieces[at] = (piece_slot){hash, (uint32_t)id};
    }
}

/* The ids of single bytes, and which bytes stand together in a piece. Hugging Face leaves a byte
 * that a byte-level vocabulary lacks, as none of its texts had it, out of the ids. */
static void index_bytes(opener *o) {
    tokenizer *t = o->t;
    memset(t->byte_id, 0xFF, sizeof t->byte_id);
    for (int32_t id = 0; id < t->vocab_size; id++) {
        size_t n;
        const uint8_t *p = (const uint8_t *)tokenizer_piece(t, id, &n);
        int type = tokenizer_type(t, id);
        check_field(o, type != PIECE_BYTE || t->byte_id[p[0]] == NO_ID, "byte piece", p[0],
                    "each byte once");
        if (type == PIECE_BYTE) t->byte_id[p[0]] = (uint32_t)id;
        for (size_t i = 1; type == PIECE_NORMAL && i < n; i++)
            t->joins[p[i - 1]][p[i] / 8] |= (uint8_t)(1 << p[i] % 8);
    }
    for (int b = 0; b < 256; b++) {
        bool byte_level = t->kind == TOKENIZER_BYTE_LEVEL, whole = byte_level || b < 0x80;
        uint32_t id = whole ? find_piece(t, &(uint8_t){(uint8_t)b}, 1, "", 0) : NO_ID;
        if (id != NO_ID) t->byte_id[b] = id;
        if (t->byte_id[b] == NO_ID && !byte_level)
            bad_file(&o->e, o->what, "tokenizer: byte 0x%02x is no piece, so some text could not "
                     "be encoded; export it again", (unsigned)b);
    }
}

/* Sorted, so that all that begin with the same bytes stand together: added_at walks down there. */
static void index_added(opener *o) {
    tokenizer *t = o->t;
    added_token *a = t->added = new_array(t->n_added, sizeof *a);
    if (!a) out_of_memory(&o->e, t->n_added * sizeof *a);
    for (int32_t id = 0; a && id < t->vocab_size; id++) {
        int type = tokenizer_type(t, id);
        size_t n;
        if (type != PIECE_CONTROL && type != PIECE_USER) continue;
        const uint8_t *text = (const uint8_t *)tokenizer_piece(t, id, &n);
        *a++ = (added_token){text, (uint32_t)n, (uint32_t)id};
        t->added_first[text[0]] = true;
    }
    if (a) qsort(t->added, t->n_added, sizeof *a, compare_added);
    for (size_t i = 1; a && i < t->n_added; i++)
        check_field(o, compare_added(&t->added[i - 1], &t->added[i]),
                    "added tokens with the same text", t->added[i].id, "one");
}

/* A merge in the file is a stranger's number until this was asked. */
static bool is_normal(const tokenizer *t, uint32_t id) {
    return id < (uint32_t)t->vocab_size && tokenizer_type(t, (int32_t)id) == PIECE_NORMAL;
}

/* The merges of the file. Only normal pieces merge, so no merging makes an added token: what people
 * type cannot put one together. */
static void find_merges(opener *o, buffer *found) {
    const tokenizer *t = o->t;
    buffer_room(found, t->n_merges * sizeof(pair_slot));
    for (uint32_t rank = 0; rank < t->n_merges && !o->e.code; rank++) {
        uint32_t left = u32_at(t->merges, 2 * (size_t)rank);
        uint32_t right = u32_at(t->merges, 2 * (size_t)rank + 1);
        size_t na, nb;
        bool good = is_normal(t, left) && is_normal(t, right);
        check_field(o, good, "merge", rank, "ids of normal pieces in every merge");
        if (!good) break;
        const char *a = tokenizer_piece(t, (int32_t)left, &na);
        const char *b = tokenizer_piece(t, (int32_t)right, &nb);
        uint32_t result = na + nb > t->longest ? NO_ID : find_piece(t, a, na, b, nb);
        check_field(o, result != NO_ID, "merge", rank, "merges whose result is a piece");
        buffer_add(found, &(pair_slot){left, right, result, rank}, sizeof(pair_slot));
    }
}

/* The merges that scores mean: of all two pieces that read as a third. A rank is the score's bits,
 * turned so that a higher score is a lower number; equal scores are equal ranks. */
static void find_scored(opener *o, buffer *found) {
    const tokenizer *t = o->t;
    for (int32_t id = 0; id < t->vocab_size; id++) {
        float score;
        uint32_t left, right;
        size_t n;
        memcpy(&score, t->scores + 4 * (size_t)id, 4);
        check_field(o, isfinite(score), "score of piece", (size_t)id, "a finite number");
        uint32_t rank = fall_bits(float_bits(score + 0.0f));    /* -0 is 0                       */
        const char *text = tokenizer_piece(t, id, &n);
        for (size_t i = 1; tokenizer_type(t, id) == PIECE_NORMAL && i < n; i++) {
            left = find_piece(t, text, i, "", 0);
            right = left == NO_ID ? NO_ID : find_piece(t, text + i, n - i, "", 0);
            if (right == NO_ID) continue;
            buffer_add(found, &(pair_slot){left, right, (uint32_t)id, rank}, sizeof(pair_slot));
        }
    }
}

/* Whichever way the file has them, encoding finds its merges in one table. */
static void index_merges(opener *o) {
    tokenizer *t = o->t;
    buffer found = {0};
    (t->flags & TOKENIZER_SCORES ? find_scored : find_merges)(o, &found);
    size_t n = found.n / sizeof(pair_slot);
    if (found.failed) out_of_memory(&o->e, found.n);
    if (!o->e.code) t->pairs = new_table(o, n, sizeof *t->pairs, &t->pair_mask);
    for (size_t i = 0; i < n && !o->e.code; i++) {
        pair_slot s;
        memcpy(&s, found.data + i * sizeof s, sizeof s);
        bool is_new = find_pair(t, s.left, s.right)->rank == NO_ID;
        uint32_t hash = hash_pair(s.left, s.right);
        check_field(o, is_new, "merge", i, "each pair of ids once");
        t->pairs[empty_slot(o, t->pairs, 4, t->pair_mask, hash, "merges with one hash")] = s;
    }
    buffer_free(&found);
}

/* What the file has stays: it belongs to whoever opened that. */
static void tokenizer_close(tokenizer *t) {
    free(t->pieces), free(t->pairs), free(t->added);
    *t = (tokenizer){0};
}

/* Opens the N bytes of a tokenizer.bin, which must outlive T; WHAT names the file in messages.
 * Close it with tokenizer_close, though a failed open needs none. */
static int tokenizer_open(tokenizer *t, const uint8_t *bytes, size_t n, const char *what,
                          medrun_error *e) {
    static void (*const steps[])(opener *o) = {open_head, open_pretokenizer, check_pieces,
                                                index_pieces, index_bytes, index_added,
                                                index_merges};
    opener o = {t, bytes, n, what, {0}};
    *t = (tokenizer){.bos = -1};
    for (size_t i = 0; i < sizeof steps / sizeof *steps && !o.e.code; i++) steps[i](&o);
    if (!o.e.code) return MEDRUN_OK;
    tokenizer_close(t);
    return fail(e, o.e.code, "%s", o.e.text);
}

/* ---- encoding ------------------------------------------------------------------------------ */

/* Internal, besides MEDRUN_ADD_BOS and MEDRUN_PARSE_SPECIAL: the text goes on where another ended,
 * so no space is put before it. */
enum { TOKENIZE_CONTINUES = 1 << 8 };

/* A symbol of a word: a doubly linked list over what it is made of. */
typedef struct {
    uint32_t id, previous, next;        /* id NO_ID: merged away; a neighbour NO_ID: none       */
} bpe_symbol;

typedef struct {
    const tokenizer *t;
    bool continues;             /* the text does                                               */
    buffer *ids, run;           /* run: of kind 2, text with its space before it               */
    bpe_symbol *symbols;        /* of the word that is merged now                              */
    uint64_t *heap;             /* rank << 32 | position of the left symbol; smallest first    */
    size_t n_heap;
    size_t missing;             /* bytes that were not to be had: then nothing more is encoded */
} encoder;

enum { BPE_SHORT = 32, MAX_TEXT = 1 << 30 };

/* Whether there was memory is asked once, at the end. */
static void put_id(encoder *x, uint32_t id) { buffer_add(x->ids, &id, sizeof id); }

/* Puts the pair at symbol I on the heap if it merges. The key has the position behind the rank: of
 * equal ranks the leftmost comes first, as in the reference. */
static void offer_pair(encoder *x, uint32_t i) {
    uint32_t next = i == NO_ID ? NO_ID : x->symbols[i].next;
    if (next == NO_ID) return;
    uint32_t rank = find_pair(x->t, x->symbols[i].id, x->symbols[next].id)->rank;
    if (rank != NO_ID) heap_push(x->heap, &x->n_heap, (uint64_t)rank << 32 | i);
}

/* What N bytes are before any merge, at most N symbols: bytes, without those that the vocabulary
 * lacks; of kind 2 characters, and bytes only where a character is not a piece. */
static size_t first_symbols(const tokenizer *t, const uint8_t *p, size_t n, bpe_symbol *to) {
    bpe_symbol *start = to;
    if (t->kind == TOKENIZER_BYTE_LEVEL) {
        for (size_t i = 0; i < n; i++)
            if (t->byte_id[p[i]] != NO_ID) (to++)->id = t->byte_id[p[i]];
        return (size_t)(to - start);
    }
    for (size_t i = 0, len; i < n; i += len) {
        uint32_t code;
        len = p[i] < 0x80 ? 1 : utf8_decode(p + i, n - i, &code);
        uint32_t id = len > 1 ? find_piece(t, p + i, len, "", 0) : NO_ID;
        if (id != NO_ID) { (to++)->id = id; continue; }
        if (!len) len = 1;
        for (size_t k = 0; k < len; k++) (to++)->id = t->byte_id[p[i + k]];
    }
    return (size_t)(to - start);
}

/* Merges the symbols of N bytes: the heap gives the lowest rank, the leftmost of equals. A key of
 * which the pair has changed since is dropped: the rank of what stands there now differs. */
static void merge_symbols(encoder *x, const uint8_t *p, size_t n) {
    bpe_symbol *symbols = x->symbols;
    n = first_symbols(x->t, p, n, symbols);
    for (uint32_t i = 0; i < n; i++) {
        symbols[i].previous = i - 1;                    /* before the first: 0 - 1 is NO_ID      */
        symbols[i].next = i + 1 < n ? i + 1 : NO_ID;
    }
    x->n_heap = 0;
    for (uint32_t i = 0; i < n; i++) offer_pair(x, i);
    while (x->n_heap) {
        uint64_t key = heap_pop(x->heap, &x->n_heap);
        bpe_symbol *left = &symbols[(uint32_t)key];
        if (left->id == NO_ID || left->next == NO_ID) continue;
        bpe_symbol *right = &symbols[left->next];
        const pair_slot *s = find_pair(x->t, left->id, right->id);
        if (s->rank != key >> 32) continue;
        left->id = s->result, left->next = right->next;
        right->id = NO_ID;
        if (left->next != NO_ID) symbols[left->next].previous = (uint32_t)key;
        offer_pair(x, left->previous);
        offer_pair(x, (uint32_t)key);
    }
    for (uint32_t i = n ? 0 : NO_ID; i != NO_ID; i = symbols[i].next) put_id(x, symbols[i].id);
}

/* Merges N bytes in n log n. Each merge takes one key and brings at most two, so there are never
 * more than 2 n keys. Words are short: what they need lies on the stack. */
static void bpe(encoder *x, const uint8_t *p, size_t n) {
    size_t each = sizeof *x->symbols + 2 * sizeof *x->heap;
    bpe_symbol symbols[BPE_SHORT];
    uint64_t heap[2 * BPE_SHORT];
    bool is_long = n > BPE_SHORT;
    x->symbols = is_long ? new_array(n, sizeof *symbols) : symbols;
    x->heap = is_long ? new_array(n, 2 * sizeof *heap) : heap;
    if (x->symbols && x->heap) merge_symbols(x, p, n);
    else x->missing = mul_overflows(n, each) ? SIZE_MAX : n * each;
    if (is_long) free(x->symbols), free(x->heap);
    x->symbols = NULL, x->heap = NULL;
}

/* Of kind 2: up to where two bytes stand together that do so in no piece. No merge crosses that, so
 * most words can be merged by themselves. */
static size_t next_joined(const tokenizer *t, const uint8_t *p, size_t n) {
    size_t i = 1;
    while (i < n && t->joins[p[i - 1]][p[i] / 8] >> p[i] % 8 & 1) i++;
    return i;
}

/* Text without added tokens in it, anywhere in the text. */
static void encode_run(encoder *x, const uint8_t *p, size_t n, bool start) {
    const tokenizer *t = x->t;
    (void)start;
    for (size_t len; n && !x->missing; p += len, n -= len) {
        len = t->pretokenizer->digits ? next_word(t->pretokenizer, p, n) : next_joined(t, p, n);
        /* most words are pieces; with ignore_merges that is so even if no merges lead there */
        bool may_be = t->flags & TOKENIZER_IGNORE_MERGES && len <= t->longest;
        uint32_t id = may_be ? find_piece(t, p, len, "", 0) : NO_ID;
        if (id != NO_ID) put_id(x, id);
        else bpe(x, p, len);
    }
}

/* In added[low .. high), which agree before byte AT: the first whose byte AT is at least C. A token
 * that ends there comes before all others. */
static size_t added_bound(const tokenizer *t, size_t low, size_t high, size_t at, int c) {
    while (low < high) {
        size_t middle = (low + high) / 2;
        const added_token *a = &t->added[middle];
        if (a->n <= at || a->text[at] < c) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* The longest added token of these TYPES (bits) that the text begins with, or NULL. */
static const added_token *added_at(const tokenizer *t, const uint8_t *p, size_t n, int types) {
    const added_token *found = NULL;
    size_t low = 0, high = t->n_added;
    for (size_t at = 0; at < n && low < high; at++) {
        low = added_bound(t, low, high, at, p[at]);
        high = added_bound(t, low, high, at, p[at] + 1);
        if (low == high || t->added[low].n > at + 1) continue;
        if (types >> tokenizer_type(t, (int32_t)t->added[low].id) & 1) found = &t->added[low];
    }
    return found;
}

typedef void encode_between(encoder *x, const uint8_t *p, size_t n, bool start);

/* Cuts the added tokens of these TYPES out, from the left, the longest first; ENCODE does what is
 * between them, where START tells the text's beginning. */
static void encode_text(encoder *x, const uint8_t *p, size_t n, int types, encode_between *encode) {
    size_t from = 0;
    for (size_t i = 0; types && i < n;) {
        const added_token *a = NULL;
        if (x->t->added_first[p[i]]) a = added_at(x->t, p + i, n - i, types);
        if (!a) { i++; continue; }
        encode(x, p + from, i - from, from == 0);
        put_id(x, a->id);
        from = i += a->n;
    }
    encode(x, p + from, n - from, from == 0);
}

/* Where the next U+2581 is, or N: SentencePiece's space, which people may write too. */
static size_t find_mark(const uint8_t *p, size_t n) {
    for (const uint8_t *q = p; n >= 3 && (q = memchr(q, 0xE2, n - 2 - (size_t)(q - p))); q++)
        if (q[1] == 0x96 && q[2] == 0x81) return (size_t)(q - p);
    return n;
}

/* Appends text as the pieces of kind 2 are written, with spaces for U+2581. */
static void add_spaced(buffer *out, const uint8_t *p, size_t n) {
    for (size_t len; n; p += len, n -= len) {
        buffer_add(out, p, len = find_mark(p, n));
        if (len == n) break;
        buffer_text(out, " ");
        len += 3;
    }
}

/* Kind 2: a run of text gets its space and is a text of its own, without control tokens. */
static void encode_spaced(encoder *x, const uint8_t *p, size_t n, bool start) {
    const tokenizer *t = x->t;
    uint32_t wanted = start ? TOKENIZER_PREFIX_RUNS | TOKENIZER_PREFIX_TEXT : TOKENIZER_PREFIX_RUNS;
    if (!n) return;
    bool spaced = t->flags & TOKENIZER_UNLESS_SPACE && (p[0] == ' ' || !find_mark(p, n));
    x->run.n = 0;
    if (t->flags & wanted && !spaced && !(start && x->continues)) buffer_text(&x->run, " ");
    add_spaced(&x->run, p, n);
    if (x->run.failed) x->missing = x->run.n + 1;
    int inside = t->flags & TOKENIZER_USER_INSIDE && t->has_user_tokens ? 1 << PIECE_USER : 0;
    encode_text(x, x->run.data, x->run.n, inside, encode_run);
}

/* Appends the ids (int32_t) of N bytes of text to IDS. User-defined tokens in the text are always
 * found; control tokens only with MEDRUN_PARSE_SPECIAL, so what people type cannot make one. */
static int tokenizer_encode(const tokenizer *t, const char *text, size_t n, int flags, buffer *ids,
                            medrun_error *e) {
    if (n > MAX_TEXT)                                   /* positions are 32 bits wide            */
        return fail(e, MEDRUN_TOO_LONG, "text: found %zu bytes, wanted at most %d; cut it", n,
                    MAX_TEXT);
    encoder x = {.t = t, .continues = flags & TOKENIZE_CONTINUES, .ids = ids};
    if (flags & MEDRUN_ADD_BOS && t->bos >= 0) put_id(&x, (uint32_t)t->bos);
    int types = flags & MEDRUN_PARSE_SPECIAL ? 1 << PIECE_CONTROL : 0;
    if (t->has_user_tokens && !(t->flags & TOKENIZER_USER_INSIDE)) types |= 1 << PIECE_USER;
    if (n)
        encode_text(&x, (const uint8_t *)text, n, types,
                    t->kind == TOKENIZER_BYTE_LEVEL ? encode_run : encode_spaced);
    buffer_free(&x.run);
    if (!x.missing && !ids->failed) return MEDRUN_OK;
    return out_of_memory(e, x.missing ? x.missing : ids->n);
}

/* The bytes that ID adds to a text; control tokens add none unless SPECIAL. Where *FIRST, nothing
 * is before them, and the space that encoding puts there goes. (SentencePiece itself means U+2581
 * by that, not the byte; tokenizers means either.) */
static const char *tokenizer_text(const tokenizer *t, int32_t id, bool special, bool *first,
                                  size_t *n) {
    const char *text = tokenizer_piece(t, id, n);
    int type = tokenizer_type(t, id);
    if (type == PIECE_CONTROL && !special) *n = 0;
    bool kept = t->flags & TOKENIZER_SCORES && (type == PIECE_BYTE || type == PIECE_UNKNOWN);
    bool strip = *first && *n && text[0] == ' ' && t->flags & TOKENIZER_STRIP && !kept;
    if (*n) *first = false;
    *n -= strip;
    return text + strip;
}

/* Appends the bytes of N ids, which must be in range. A piece may end within a character. */
static void tokenizer_decode(const tokenizer *t, const int32_t *ids, size_t n, bool special,
                             buffer *bytes) {
    bool first = true;
    for (size_t i = 0, len; i < n; i++) {
        const char *text = tokenizer_text(t, ids[i], special, &first, &len);
        buffer_add(bytes, text, len);
    }
}
/* ============================================================================================
 * 11 Chat: templates as tables
 *
 * A template says with which control tokens and words a conversation is written for its model. Here
 * each is one row of a table: for every kind of turn a list of parts, which one walker, chat_parts,
 * writes one after the other.
 *
 * Two promises rest on how it writes them. Nobody can forge a turn: only names in backquotes in
 * the table's own strings make control ids, and all other text, of the table, of people and of
 * tools, is tokenized with special parsing off, so that "<|eot_id|>" in a message is a handful of
 * ordinary tokens. Only `marks` can be forged, by which a format without control tokens for its
 * turns (alpaca, llama2) tells them apart: people are warned of a text that holds them. And the ids
 * are the reference's: what stands between two control tokens is collected first and tokenized as
 * one run, for a token may begin in the template's words and end in a person's.
 *
 * The reference is transformers' apply_chat_template with the model's own Jinja template. What that
 * refuses is refused here. Functions that the model may call, and the calls it made, come as
 * finished text; tools/tool_calls.c makes that text from JSON.
 * Uses sections 3 and 10. Tests: tests/11_chat.c, and tools/reference/templates.py.
 * ============================================================================================ */

/* ---- what a template is made of ------------------------------------------------------------ */

/* What is known while a conversation is written, one bit each. */
enum {
    HAS_TOOLS = 1 << 0,         /* an option: functions are shown to the model */
    THINKS = 1 << 1,            /* an option: the model may deliberate */
    OWN_SYSTEM = 1 << 2,        /* the system text is the template's, not a message's */
    STARTED = 1 << 3,           /* a turn was written */
    IN_ASSISTANT = 1 << 4,      /* an assistant's turn is open */
    IN_INNER = 1 << 5,          /* thoughts are open */
    IN_RESULTS = 1 << 6,        /* a list of tool results is open */
    WAITING = 1 << 7,           /* tools were called, their results have not come */
    SAID_TEXT = 1 << 8,         /* an assistant's content was a text */
    SAID_BLOCKS = 1 << 9,       /* an assistant's content was a list of blocks */
    ASKED = 1 << 10,            /* the assistant's turn is next */
    ANSWERED = 1 << 11,         /* the assistant has had one */
    SYSTEM_OPEN = 1 << 12,      /* the question goes on behind the system text */
    BEGUN = 1 << 13,            /* this writer has written the opening */
    KEPT = ASKED | ANSWERED | SYSTEM_OPEN | BEGUN,      /* from turn to turn of one writer */
};

typedef struct {
    const char *says;           /* the template's words; in them `name` is a control token, and
                                   these are filled in: $text (the message's), $stripped (without
                                   white space around it, as $text is if the template trims),
                                   $quoted (as Python's JSON), $below
                                   (after an empty line, unless it is empty), $role, $tools,
                                   $date */
    const char *refuse;         /* or else why the conversation cannot be written */
    unsigned when, unless;      /* counts only while all of these bits, none of those are set */
    unsigned sets, clears;      /* the bits that it changes afterwards */
} chat_part;

/* A kind of turn that a template writes in its own way. */
typedef struct {
    const char *role;           /* of chat_roles; or with a '/', which no role in a file can have:
                                   text that C code has finished, see tools/tool_calls.c */
    const chat_part *parts;
} chat_kind;

typedef struct {
    const char *name;
    const char *bos;            /* the control token before everything; NULL: none; "": the one
                                   that the tokenizer adds, if it does */
    const chat_part *opening;   /* the system block that is always there; NULL: none */
    const char *system;         /* system text of a conversation without any; NULL: none */
    const char *date;           /* the date that is stated if none is given; NULL: today's */
    const chat_part *said;      /* a turn of any of chat_roles, but for those in `turns`; NULL:
                                   only those in `turns` are possible */
    const chat_kind *turns;     /* NULL: none; ends with an empty one */
    const chat_part *first;     /* the first turn where there are tools; NULL: as the others */
    const chat_part *end;       /* after the last turn */
    const chat_part *answer;    /* the opening of the answer, from which the model goes on */
    const chat_part *close;     /* after the model's answer, before the next turn */
    bool takes_tools, takes_think;
    bool trims;                 /* $text goes without the white space around it */
    bool states_today;          /* its text depends on the date */
    bool opens_by_role;         /* the answer opens unless the last turn is the assistant's */
    const char *stops[4];       /* tokens that end an answer, as far as the tokenizer has them */
    const char *stop_text;      /* text that does, or NULL */
    const char *marks[4];       /* words that begin a turn, not control tokens */
    const char *call_tokens[2]; /* around what the model writes to call tools; NULL: none */
} chat_template;

/* ---- the templates ------------------------------------------------------------------------- */

#define PARTS(...) ((const chat_part[]){__VA_ARGS__, {0}})      /* an empty part ends the list */
#define SAYS(words) PARTS({.says = words})
#define KINDS(...) ((const chat_kind[]){__VA_ARGS__, {0}})

#define LLAMA3_HEAD(role) "`<|start_header_id|>`" role "`<|end_header_id|>`\n\n"
#define LLAMA3 \
    .bos = "<|begin_of_text|>", .trims = true, \
    .said = SAYS(LLAMA3_HEAD("$role") "$text`<|eot_id|>`"), \
    .answer = SAYS(LLAMA3_HEAD("assistant")), .close = SAYS("`<|eot_id|>`")

#define CHATML \
    .said = SAYS("`<|im_start|>`$role\n$text`<|im_end|>`\n"), \
    .answer = SAYS("`<|im_start|>`assistant\n"), .close = SAYS("`<|im_end|>`\n")

/* Apertus. All that assistant and tools say up to the next person's turn stands in one assistant's
 * turn. Calls stand between tools tokens in it, and results in a list in brackets; so what a part
 * writes depends on what is open. Thoughts and other blocks: tools/tool_calls.c. */
#define OPEN_ASSISTANT {.says = "`<|assistant_start|>`", .unless = IN_ASSISTANT, \
                        .sets = IN_ASSISTANT}
#define END_RESULTS {.says = "]", .when = IN_RESULTS, .clears = IN_RESULTS}

static const chat_part apertus_opening[] = {
    {.says = "`<|system_start|>`$text"},
    {.says = "$date", .when = OWN_SYSTEM},              /* its own text ends with the date */
    {.says = "`<|system_end|>``<|developer_start|>`Deliberation: "},
    {.says = "enabled\n", .when = THINKS}, {.says = "disabled\n", .unless = THINKS},
    {.says = "Tool Capabilities:\n$tools", .when = HAS_TOOLS},
    {.says = "Tool Capabilities: disabled", .unless = HAS_TOOLS},
    {.says = "`<|developer_end|>`"}, {0}};

static const chat_kind apertus_turns[] = {
    {"user", PARTS(END_RESULTS, {.says = "`<|assistant_end|>`", .when = IN_ASSISTANT},
                   {.says = "`<|user_start|>`$text`<|user_end|>`",
                    .clears = IN_ASSISTANT | IN_INNER})},
    {"assistant", PARTS(OPEN_ASSISTANT,
                        {.refuse = "the assistant's contents are both texts and blocks",
                         .when = SAID_BLOCKS}, END_RESULTS, {.says = "$text", .sets = SAID_TEXT})},
    {"tool", PARTS({.refuse = "a tool's turn without the assistant's", .unless = IN_ASSISTANT},
                   {.says = ", ", .when = IN_RESULTS}, {.says = "[", .unless = IN_RESULTS},
                   {.says = "$text", .sets = IN_RESULTS, .clears = WAITING})},
    {"assistant/calls", PARTS(OPEN_ASSISTANT, {.says = "`<|tools_prefix|>`[$text]"
                                                       "`<|tools_suffix|>`", .sets = WAITING})},
    {0}};

/* What the three releases have in common. */
#define APERTUS \
    .bos = "<s>", .opening = apertus_opening, .turns = apertus_turns, \
    .system = "You are Apertus, a helpful assistant created by the SwissAI initiative.\n" \
              "Knowledge cutoff: 2024-04\nCurrent date: ", \
    .answer = SAYS("`<|assistant_start|>`"), .close = SAYS("`<|assistant_end|>`"), \
    .takes_tools = true, .takes_think = true, .states_today = true, \
    .stops = {"</s>", "<|assistant_end|>", "<|tools_suffix|>"}, \
    .call_tokens = {"<|tools_prefix|>", "<|tools_suffix|>"}

/* Llama 2 and Mistral, in turns. What begins a question comes last, an answer is SAID and END. */
#define NO_TURN(...) {.refuse = "wanted user and assistant in turn", __VA_ARGS__}
#define INST(mark, said, end, ...) \
    .bos = "<s>", .close = SAYS(end), .stops = {"</s>"}, .marks = {"[INST]", "[/INST]", mark}, \
    .turns = KINDS({"user", PARTS(NO_TURN(.when = ASKED), __VA_ARGS__, \
            {.says = " [/INST]", .sets = ASKED, .clears = ANSWERED | SYSTEM_OPEN})}, \
        {"assistant", PARTS(NO_TURN(.unless = ASKED), \
            {.says = said end, .sets = ANSWERED, .clears = ASKED})})

/* What the row llama3 makes of the question "Is it warm?", opening of the answer included:
 *
 *     `<|begin_of_text|>``<|start_header_id|>`user`<|end_header_id|>`\n\nIs it warm?`<|eot_id|>`
 *     `<|start_header_id|>`assistant`<|end_header_id|>`\n\n
 *
 * In ids: one for each control token, and those of the four runs of text between them. */
static const chat_template chat_templates[] = {
    /* Llama-3 and Med42. A system message may stand anywhere, and any role is written as it is. Of
     * the published forms one opens the answer also when it is not asked to; here it is asked. */
    {
        .name = "llama3", LLAMA3, .stops = {"<|eot_id|>", "<|end_of_text|>"},
    },
    /* Llama-3.1, tools as its template has them by default: in the first turn. Its options
     * builtin_tools, tools_in_user_message and custom_tools are not here. */
    {
        .name = "llama3.1", LLAMA3, .system = "", .date = "26 Jul 2024",
        .opening = PARTS({.says = LLAMA3_HEAD("system")},
                         {.says = "Environment: ipython\n", .when = HAS_TOOLS},
                         {.says = "Cutting Knowledge Date: December 2023\nToday Date: $date\n\n"
                                  "$text`<|eot_id|>`"}),
        .turns = KINDS({"tool", SAYS(LLAMA3_HEAD("ipython") "$quoted`<|eot_id|>`")},
                       {"ipython", SAYS(LLAMA3_HEAD("ipython") "$quoted`<|eot_id|>`")},
                       {"tool/json", SAYS(LLAMA3_HEAD("ipython") "$text`<|eot_id|>`")},
                       {"assistant/calls", SAYS(LLAMA3_HEAD("assistant") "$text`<|eot_id|>`")}),
        .first = SAYS(LLAMA3_HEAD("user")
            "Given the following functions, please respond with a JSON for a function call with "
            "its proper arguments that best answers the given prompt.\n\nRespond in the format "
            "{\"name\": function name, \"parameters\": dictionary of argument name and its value}."
            "Do not use variables.\n\n$tools$text`<|eot_id|>`"),
        .takes_tools = true, .stops = {"<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"},
    },
    /* Arcee's AFM: ChatML with a persona. */
    {
        .name = "afm", CHATML, .opens_by_role = true, .stops = {"<|im_end|>", "<|end_of_text|>"},
        .opening = SAYS("`<|im_start|>`system\n$text`<|im_end|>`\n"),
        .system = "The assistant is AFM-4.5B, trained by Arcee AI, with 4.5 billion parameters. "
            "AFM is a deeply thoughtful, helpful assistant. The assistant is having a conversation "
            "with the user. The assistant's responses are calm, intelligent, and personable, "
            "always aiming to truly understand the user's intent. AFM thinks aloud, step by step, "
            "when solving problems or forming explanations, much like a careful, reflective "
            "thinker would. The assistant helps with sincerity and depth. If a topic invites "
            "introspection, curiosity, or broader insight, the assistant allows space for "
            "reflection \xE2\x80\x94 be open to nuance and complexity. The assistant is not "
            "robotic or overly formal; it speaks like a wise, thoughtful companion who cares about "
            "clarity and the human experience. If a topic is uncertain or depends on subjective "
            "interpretation, AFM explains the possibilities thoughtfully.",
    },
    /* SmolLM2-Instruct: ChatML, with this system text where a conversation begins without one. */
    {
        .name = "chatml", CHATML, .stops = {"<|im_end|>", "<|endoftext|>"},
        .opening = SAYS("`<|im_start|>`system\n$text`<|im_end|>`\n"),
        .system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    },
    /* ChatML as most have it: a system text only where one is given. */
    {
        .name = "chatml-bare", CHATML,
        .stops = {"<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "</s>"},
    },
    /* Llama-2-Chat. The system text stands in the first question. */
    {
        .name = "llama2", .end = PARTS(NO_TURN(.when = SYSTEM_OPEN)),
        .opening = PARTS({.says = "[INST] <<SYS>>\n$text\n<</SYS>>", .unless = OWN_SYSTEM,
                          .sets = SYSTEM_OPEN}),
        INST("<<SYS>>", " $stripped", " `</s>`", {.says = "`<s>`", .when = ANSWERED},
             {.says = "$below", .when = SYSTEM_OPEN},
             {.says = "[INST] $stripped", .unless = SYSTEM_OPEN}),
    },
    /* Mistral-7B-Instruct now, and as v0.2 and v0.1 were first: no place for a system text. */
    {
        .name = "mistral", .end = PARTS(NO_TURN(.when = SYSTEM_OPEN)),
        .opening = PARTS({.says = " [INST] $text\n\n", .unless = OWN_SYSTEM, .sets = SYSTEM_OPEN}),
        INST(NULL, " $text", "`</s>`", {.says = " [INST] ", .unless = SYSTEM_OPEN},
             {.says = "$text"}),
    },
    {.name = "mistral-v0.2", INST(NULL, "$text", "`</s>`", {.says = "[INST] $text"})},
    {.name = "mistral-v0.1", .end = PARTS({.says = " ", .when = ANSWERED}),
     INST(NULL, "$text", "`</s>`", {.says = " ", .when = ANSWERED}, {.says = "[INST] $text"})},
    /* Med42 of Llama 2: its card shows how one question is written. */
    {
        .name = "med42", .bos = "", .opening = SAYS("\n<|system|>: $text\n"),
        .system = "You are a helpful medical assistant created by M42 Health in the UAE.",
        .turns = KINDS({"user", PARTS({.refuse = "its card shows one question", .when = ANSWERED},
                                      {.says = "<|prompter|>:$text\n", .sets = ANSWERED})}),
        .answer = SAYS("<|assistant|>:\n"), .stops = {"</s>"},
        .marks = {"<|system|>:", "<|prompter|>:", "<|assistant|>:"},
    },
    /* The first two differ in tools/tool_calls.c only. The third also ends an assistant's turn that
     * ends the conversation. */
    {.name = "apertus", APERTUS, .end = PARTS(END_RESULTS)},
    {.name = "apertus-bare", APERTUS, .end = PARTS(END_RESULTS)},
    {.name = "apertus-closed", APERTUS,
     .end = PARTS(END_RESULTS, {.says = "`<|assistant_end|>`", .when = IN_ASSISTANT,
                                .unless = WAITING})},
    /* Internist.ai: words only, no BOS and no end of turn. */
    {
        .name = "alpaca", .said = SAYS("### Response:\n$text\n\n"),
        .turns = KINDS({"system", SAYS("### System:\n$text\n\n")},
                       {"user", SAYS("### Instruction:\n$text\n\n")}),
        .system = "You are a medical assistant, provide accurate and unbiased answers to the "
                  "questions.",
        .answer = SAYS("### Response:\n"), .close = SAYS("\n\n"),
        .stops = {"</s>"}, .stop_text = "### Instruction:",
        .marks = {"### Response:", "### Instruction:", "### System:"},
    },
    /* A model without chat: the texts one after another, whoever wrote them. */
    {.name = "none", .bos = "", .said = SAYS("$text")},
};

#undef PARTS
#undef SAYS
#undef KINDS
#undef OPEN_ASSISTANT
#undef END_RESULTS
#undef NO_TURN
#undef LLAMA3_HEAD
#undef LLAMA3
#undef CHATML
#undef APERTUS
#undef INST

#define MEDRUN_TEMPLATES \
    "llama3, llama3.1, llama2, mistral, mistral-v0.1, mistral-v0.2, afm, chatml, chatml-bare, " \
    "apertus, apertus-bare, apertus-closed, alpaca, med42, none"
#define MEDRUN_UNKNOWN "unknown"    /* in a checkpoint whose template the exporter did not know */

/* The roles of messages in files. */
static const char *const chat_roles[] = {"system", "user", "assistant", "tool", "ipython", NULL};

/* NULL: unknown, which callers refuse: a guessed template gives wrong answers that look right. */
static const chat_template *chat_find(const char *name) {
    for (size_t i = 0; i < sizeof chat_templates / sizeof *chat_templates; i++)
        if (!strcmp(name, chat_templates[i].name)) return &chat_templates[i];
    return NULL;
}

/* ---- dates --------------------------------------------------------------------------------- */

/* Today where this machine is, YYYY-MM-DD. */
static void date_today(char date[11]) {
    struct tm t = {0};
    localtime_r(&(time_t){time(NULL)}, &t);
    strftime(date, 11, "%Y-%m-%d", &t);
}

/* YYYY-MM-DD, and a day that there is: a model would take any other one for true. */
static bool date_is_good(const char *date) {
    for (size_t i = 0; i < 10; i++)
        if (i == 4 || i == 7 ? date[i] != '-' : !isdigit((uint8_t)date[i])) return false;
    int year = atoi(date), month = atoi(date + 5), day = atoi(date + 8);
    bool leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    int days = month == 2 ? 28 + leap : 30 + (month + month / 8) % 2;
    return !date[10] && month >= 1 && month <= 12 && day >= 1 && day <= days;
}

/* ---- writing ------------------------------------------------------------------------------- */

/* Who writes. Callers fill in the first group. The same walk gives ids and text: for ids, text
 * collects in `run` until a control token or the end; for text, all goes straight to `out`. */
typedef struct {
    const chat_template *c;
    const tokenizer *t;         /* may be NULL for text: names of tokens are not checked then */
    const medrun_chat_options *o;               /* NULL: what the template does by itself */
    bool as_text;               /* for people to read, control tokens spelled out: never to be
                                   tokenized again */
    const chat_kind *more;      /* kinds of turns that `c` lacks, or NULL: tools/tool_calls.c's */
    buffer *out;                /* int32 ids, or text; grows at its end */
    medrun_error *e;

    unsigned state;             /* HAS_TOOLS and so on */
    buffer run;                 /* text since the last control token */
    int flags;                  /* TOKENIZE_CONTINUES: the next run goes on from the last turn */
} chat_writer;

/* Python's str.strip(), which the templates' `trim` is: white space, and U+001C to U+001F. */
static void trim(const char **text, size_t *n) {
    const uint8_t *p = (const uint8_t *)*text;
    size_t start = 0, end = 0, len;
    for (size_t i = 0; i < *n; i += len) {
        bool space = class_at(p + i, *n - i, &len) == CLASS_SPACE || (p[i] >= 0x1C && p[i] < 0x20);
        if (space) continue;
        if (!end) start = i;
        end = i + len;
    }
    if (end) *text += start;
    *n = end ? end - start : 0;
}

/* A string as Python's json.dumps(text, ensure_ascii=False) writes it. */
static void python_quote(buffer *b, const char *text, size_t n) {
    static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
    buffer_text(b, "\"");
    for (size_t i = 0; i < n; i++) {
        const char *at = text[i] ? strchr(from, text[i]) : NULL;
        if (at) buffer_printf(b, "\\%c", to[at - from]);
        else if ((uint8_t)text[i] < 0x20) buffer_printf(b, "\\u%04x", (unsigned)text[i]);
        else buffer_add(b, text + i, 1);
    }
    buffer_text(b, "\"");
}

/* Ends the run of text: its ids go out. */
static void chat_flush(chat_writer *w) {
    if (w->run.failed || w->out->failed) out_of_memory(w->e, w->run.n + w->out->n);
    if (!w->e->code)
        tokenizer_encode(w->t, (const char *)w->run.data, w->run.n, w->flags, w->out, w->e);
    w->run.n = 0;
    w->flags = 0;
}

/* The control token that reads NAME, or -1: a piece of another type is none, as what ordinary text
 * can give must not mean a turn. */
static int32_t control_id(const tokenizer *t, const char *name, size_t n) {
    int32_t id = tokenizer_find(t, name, n);
    return id >= 0 && tokenizer_type(t, id) == PIECE_CONTROL ? id : -1;
}

/* NULL, an empty place in a row of the table, is no token. */
static int32_t chat_token(const tokenizer *t, const char *name) {
    return name ? control_id(t, name, strlen(name)) : -1;
}

/* A control token: its id after the run before it, or its name; each tokenizer has its own id for
 * it. The run behind it has a space before it only if every run has, not one for the whole text. */
static void chat_control(chat_writer *w, const char *name, size_t n) {
    int32_t id = w->t ? control_id(w->t, name, n) : 0;
    if (id < 0)
        fail(w->e, MEDRUN_BAD_FILE, "tokenizer: control token %.*s is missing, which the chat "
             "template %s needs; use the template and the tokenizer of one model", (int)n, name,
             w->c->name);
    else if (w->as_text)
        buffer_add(w->out, name, n);
    else {
        chat_flush(w);
        buffer_add(w->out, &id, sizeof id);
        w->flags = w->t->flags & TOKENIZER_PREFIX_TEXT ? TOKENIZE_CONTINUES : 0;
    }
}

/* BOS as the template has it, or as the options say. */
static void chat_bos(chat_writer *w) {
    const char *name = w->c->bos;
    bool own = name && *name, usual = own || (name && w->t && w->t->add_bos);
    size_t n = own ? strlen(name) : 0;
    if (w->o->bos == MEDRUN_BOS_AUTO ? !usual : w->o->bos == MEDRUN_BOS_OFF) return;
    if (!own && w->t && w->t->bos >= 0) name = tokenizer_piece(w->t, w->t->bos, &n);
    if (n) chat_control(w, name, n);
    else fail(w->e, MEDRUN_USAGE, "BOS: wanted a tokenizer that has such a token");
}

/* The date that was given, in the form of the template's; else the template's, else today's. */
static void chat_date(const chat_writer *w, buffer *to) {
    static const char months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
    char today[11];
    const char *date = w->o->date;
    if (!date) date_today(today);
    if (!w->c->date) buffer_text(to, date ? date : today);
    else if (!date) buffer_text(to, w->c->date);
    else buffer_printf(to, "%s %.3s %.4s", date + 8, months + 3 * (atoi(date + 5) - 1), date);
}

/* Fills in what a string of the table calls $NAME. */
static void chat_fill(chat_writer *w, const char *name, size_t n, const medrun_message *said) {
    static const char *const names[] = {"text", "stripped", "quoted", "role", "tools", "below",
                                        "date"};
    enum { TEXT, STRIPPED, QUOTED, ROLE, TOOLS, BELOW, DATE };
    buffer *to = w->as_text ? w->out : &w->run;
    const char *text = said->text;
    size_t i = 0, n_text = text ? said->n_bytes : 0;
    while (i < DATE && (strlen(names[i]) != n || memcmp(name, names[i], n))) i++;
    if (i == STRIPPED || i == BELOW || (i == TEXT && w->c->trims)) trim(&text, &n_text);
    if (i == TEXT || i == STRIPPED) buffer_add(to, text, n_text);
    if (i == QUOTED) python_quote(to, text, n_text);
    if (i == ROLE) buffer_text(to, said->role);
    if (i == TOOLS) buffer_add(to, w->o->tools, w->o->n_tools);
    if (i == DATE) chat_date(w, to);
    if (i == BELOW && n_text) {                           /* white space before it stays */
        buffer_text(to, "\n\n");
        buffer_add(to, said->text, (size_t)(text - said->text) + n_text);
    }
}

/* The walker: writes a list of parts (NULL: an empty one) for the turn SAID (NULL: none). Every
 * `says` is a string in C, so that a file or a person can put a backquote or a dollar sign into a
 * message and they are only text: what chat_fill adds is never looked at again. */
static void chat_parts(chat_writer *w, const chat_part *part, const medrun_message *said) {
    for (; part && (part->says || part->refuse) && !w->e->code; part++) {
        if ((w->state & part->when) != part->when || (w->state & part->unless)) continue;
        if (part->refuse)
            fail(w->e, MEDRUN_USAGE, "messages: template %s: %s", w->c->name, part->refuse);
        for (const char *s = part->says; !w->e->code && *s;) {
            size_t n = strcspn(s, "`$");
            buffer_add(w->as_text ? w->out : &w->run, s, n);
            s += n;
            if (*s == '`') {
                n = strcspn(++s, "`");
                chat_control(w, s, n);
                s += n + 1;
            } else if (*s == '$') {
                n = strspn(++s, "abcdefghijklmnopqrstuvwxyz");
                chat_fill(w, s, n, said);
                s += n;
            }
        }
        w->state = (w->state | part->sets) & ~part->clears;
    }
}

/* ---- messages in JSON ---------------------------------------------------------------------- */

/* Of a key that stands twice Python keeps the last value; here that is refused, in node V of J and
 * all that it holds. Keys are compared unescaped: "\u0061" is "a". */
static int json_check_keys(const json *j, uint32_t v, const char *what, medrun_error *e) {
    enum { MOST = 256 };
    buffer key = {0};
    for (uint32_t end = j->nodes[v].next; !e->code && v < end; v++) {
        uint32_t count = j->nodes[v].count, c = v + 1;
        if (json_typeof(j, v) != JSON_OBJECT) continue;
        if (count > 2 * MOST) bad_file(e, what, "an object has more than %d keys", MOST);
        for (uint32_t i = 0; !e->code && i < count; i += 2, c = j->nodes[c + 1].next) {
            key.n = 0;
            json_unescape(j, c, &key);
            buffer_add(&key, "", 1);
            const char *name = (const char *)key.data;
            if (key.failed) out_of_memory(e, key.n);
            else if (strlen(name) + 1 < key.n)
                bad_file(e, what, "the key \"%.80s\" holds a NUL", name);
            else if (json_get(j, v, name) != c + 1)     /* the first one of this name */
                bad_file(e, what, "the key \"%.80s\" stands twice in one object", name);
        }
    }
    return buffer_free(&key), e->code;
}

/* Message V of J, {"role": ..., "content": ...}: gives the name of its role, or NULL. */
static const char *chat_role_of(const json *j, uint32_t v, medrun_error *e) {
    uint32_t role = json_get(j, v, "role");
    bool empty = json_get(j, v, "content") == JSON_NONE &&
                 json_get(j, v, "tool_calls") == JSON_NONE;
    for (size_t i = 0; !empty && chat_roles[i]; i++)
        if (json_is(j, role, chat_roles[i])) return chat_roles[i];
    if (empty || !json_is_type(j, role, JSON_STRING))
        fail(e, MEDRUN_BAD_FILE, "messages: wanted {\"role\": \"...\", \"content\": \"...\"}");
    else
        fail(e, MEDRUN_USAGE, "role: found \"%.*s\", wanted system, user, assistant or tool",
             (int)(j->nodes[role].end - j->nodes[role].start), j->text + j->nodes[role].start);
    return NULL;
}

/* Reads node V of J, [{"role": ..., "content": "..."}, ...], as *N messages in *M, whose texts are
 * in TEXT, an empty buffer; free both afterwards, also on failure. Other contents, and calls where
 * C has a place for them, need tools/tool_calls.c. */
static int chat_messages(const chat_template *c, const json *j, uint32_t v, const char *what,
                         medrun_message **m, size_t *n, buffer *text, medrun_error *e) {
    bool good = json_is_type(j, v, JSON_ARRAY);
    for (uint32_t i = 0, x = v + 1; good && i < j->nodes[v].count; i++, x = j->nodes[x].next)
        good = json_is_type(j, x, JSON_OBJECT);
    *m = NULL;
    *n = good ? j->nodes[v].count : 0;
    if (!good) return bad_file(e, what, "wanted [{\"role\": \"...\", \"content\": \"...\"}, ...]");
    json_check_keys(j, v, "messages", e);
    *m = new_array(*n, sizeof **m);
    if (!*m || !buffer_room(text, j->nodes[v].end - j->nodes[v].start))     /* none will move */
        return out_of_memory(e, *n * sizeof **m);
    uint32_t x = v + 1;
    for (size_t i = 0; !e->code && i < *n; i++, x = j->nodes[x].next) {
        uint32_t content = json_get(j, x, "content"), calls = json_get(j, x, "tool_calls");
        const char *role = chat_role_of(j, x, e);
        size_t at = text->n;
        if (calls != JSON_NONE && c->takes_tools)
            fail(e, MEDRUN_USAGE, "messages: tool_calls: medrun-lab call writes them");
        if (!json_is_type(j, content, JSON_STRING))
            fail(e, MEDRUN_USAGE, "messages: content: wanted a string");
        if (!e->code) json_unescape(j, content, text);
        (*m)[i] = (medrun_message){role, (const char *)text->data + at, text->n - at};
    }
    return e->code;
}

/* ---- conversations ------------------------------------------------------------------------- */

/* The parts of a turn of this kind; NULL: there is no such role, or no place for it. */
static const chat_part *chat_turn_of(chat_writer *w, const char *role) {
    size_t known = 0;
    if (!role) role = "";
    for (int i = 0; i < 2; i++)
        for (const chat_kind *k = i ? w->more : w->c->turns; k && k->role; k++)
            if (!strcmp(k->role, role)) return k->parts;
    while (chat_roles[known] && strcmp(role, chat_roles[known])) known++;
    if (!chat_roles[known])
        fail(w->e, MEDRUN_USAGE, "role: found \"%.40s\", wanted system, user, assistant or tool",
             role);
    else if (!w->c->said)
        fail(w->e, MEDRUN_USAGE, "messages: template %s has no place for role %s here", w->c->name,
             role);
    return chat_roles[known] ? w->c->said : NULL;
}

/* Writes a turn. */
static void chat_say(chat_writer *w, const medrun_message *m) {
    const chat_part *parts = chat_turn_of(w, m->role);
    if (w->c->first && (w->state & (HAS_TOOLS | STARTED)) == HAS_TOOLS) parts = w->c->first;
    w->state |= STARTED;
    chat_parts(w, parts, m);
}

/* Checks the options, which a template may have no place for, and writes BOS. */
static void chat_begin(chat_writer *w) {
    static const medrun_chat_options standard = {0};
    const medrun_chat_options *o = w->o = w->o ? w->o : &standard;
    if (o->date && !date_is_good(o->date))
        fail(w->e, MEDRUN_USAGE, "date: found \"%.40s\", wanted YYYY-MM-DD", o->date);
    if ((o->think && !w->c->takes_think) || (o->tools && !w->c->takes_tools))
        fail(w->e, MEDRUN_USAGE, "template %s has no place for %s", w->c->name,
             o->tools ? "tools" : "thinking");
    w->state |= (o->tools ? HAS_TOOLS : 0) | (o->think ? THINKS : 0);
    chat_bos(w);
}

/* Writes the last run; after a failure OUT is as it was. */
static int chat_end(chat_writer *w, size_t n_before) {
    if (!w->as_text) chat_flush(w);
    if (!w->e->code && w->out->failed) out_of_memory(w->e, w->out->n);
    buffer_free(&w->run);
    w->state &= KEPT;
    w->flags = 0;
    if (w->e->code) w->out->n = n_before;
    return w->e->code;
}

/* N turns. FIRST: nothing is before them, so a system's message goes into the opening, if the
 * template has one. The template's own system text stands there where no message is a system's; an
 * opening has it also where a later one is. Roles are looked at before anything is written, so that
 * a wrong one costs nothing. */
static void chat_turns(chat_writer *w, const medrun_message *m, size_t n, bool first) {
    const chat_template *c = w->c;
    const medrun_message own = {"system", c->system, c->system ? strlen(c->system) : 0};
    bool system = first && n && m->role && !strcmp(m->role, "system"), any = system;
    size_t from = system && c->opening;
    for (size_t i = from; i < n && chat_turn_of(w, m[i].role); i++)
        any |= !strcmp(m[i].role, "system");
    if (first && !w->e->code) chat_begin(w);
    if (first && !system) w->state |= OWN_SYSTEM;
    if (first && c->opening) chat_parts(w, c->opening, system ? m : &own);
    else if (first && c->system && !any) chat_parts(w, chat_turn_of(w, "system"), &own);
    for (size_t i = from; i < n && !w->e->code; i++) chat_say(w, &m[i]);
}

/* A whole conversation; its last run of text is left in W->run. */
static void chat_conversation(chat_writer *w, const medrun_message *m, size_t n, bool answer) {
    if (!n) fail(w->e, MEDRUN_USAGE, "messages: found none, wanted one or more");
    chat_turns(w, m, n, true);
    if (w->c->first && (w->state & (HAS_TOOLS | STARTED)) == HAS_TOOLS)
        fail(w->e, MEDRUN_USAGE, "messages: tools: wanted a turn after the system's");
    chat_parts(w, w->c->end, NULL);
    if (!w->e->code && w->c->opens_by_role) answer = strcmp(m[n - 1].role, "assistant");
    if (answer) chat_parts(w, w->c->answer, NULL);
}

/* ---- what others call ---------------------------------------------------------------------- */

/* Appends a whole conversation, with the opening of the answer when ANSWER. Here and below W says
 * where to, and w->e holds no failure yet. */
static int chat_render(chat_writer *w, const medrun_message *m, size_t n, bool answer) {
    size_t n_before = w->out->n;
    w->state = 0;
    chat_conversation(w, m, n, answer);
    return chat_end(w, n_before);
}

/* Appends one turn of a timeline; FIRST: of an empty one, where M may be NULL for what the template
 * writes before the first turn, and nothing else. Turn by turn gives what chat_render gives for the
 * whole, if chat_close closed every answer before the next turn. There are four
 * exceptions. Results of tools, and two turns of the assistant in a row for `apertus`, go on in the
 * turn before. `none` has nothing between its turns: a word that goes on in the next turn is two
 * words here. A system text that is not first does not take back the default text that `alpaca` has
 * put first. After an answer `alpaca` gives the same text, but the answer's last token may be
 * another one where the empty line follows it. */
static int chat_turn(chat_writer *w, const medrun_message *m, bool first, bool answer) {
    size_t n_before = w->out->n;
    if (first && w->o && w->o->tools && w->c->first)
        fail(w->e, MEDRUN_USAGE, "template %s has its tools in the first turn: render the whole "
             "conversation", w->c->name);
    if (!first) w->flags = TOKENIZE_CONTINUES;
    if (!first && !(w->state & BEGUN))                  /* turns that another call has written */
        w->state |= m && m->role && !strcmp(m->role, "assistant") ? ASKED : ANSWERED;
    w->state |= BEGUN;
    chat_turns(w, m, m != NULL, first);
    if (w->state & IN_ASSISTANT) chat_parts(w, w->c->close, NULL);
    if (answer) chat_parts(w, w->c->answer, NULL);
    return chat_end(w, n_before);
}

/* Appends what the template writes after an answer's text: <|eot_id|> for llama3, an empty line for
 * alpaca. The stop token with which the model ended it is not part of the template: take it off the
 * timeline first, unless chat_keeps. (Where llama3 stopped by <|eot_id|>, that comes to the same as
 * leaving it.) */
static int chat_close(chat_writer *w) {
    size_t n_before = w->out->n;
    w->flags = TOKENIZE_CONTINUES;
    chat_parts(w, w->c->close, NULL);
    return chat_end(w, n_before);
}

/* Is this stop a part of what the model said, such as the end of a tool call? */
static bool chat_keeps(const chat_template *c, const tokenizer *t, int32_t id) {
    return id == chat_token(t, c->call_tokens[1]);
}

/* ============================================================================================
 * 12 Model: the config, the layers, each tensor bound by name with type and shape checked
 *
 * Nothing is implied by a model's name: every number of the forward pass is in the header, and all
 * of it is checked here, so that nothing below has to ask. The weights stay where the file has
 * them. Uses sections 3 to 11. Tests: tests/12_model.c, tests/09_file.c.
 * ============================================================================================ */

/* Feed-forward: silu(gate) * up (SwiGLU), or without a gate relu(up)^2 or xIELU(up). */
enum { ACTIVATION_SILU, ACTIVATION_RELU2, ACTIVATION_XIELU, N_ACTIVATIONS };
static const char *const activation_names[N_ACTIVATIONS] = {"silu", "relu2", "xielu"};

/* How rotary frequencies are stretched for long contexts; rope_frequencies says what each does. */
enum { ROPE_NONE, ROPE_LLAMA3, ROPE_YARN, ROPE_DIVISORS, N_ROPES };
static const char *const rope_names[N_ROPES] = {"none", "llama3", "yarn", "divisors"};

/* Only a name for people: what a model computes is in its config. */
enum { N_ARCHITECTURES = 4, MAX_HEAD_DIM = 1024 };
static const char *const architecture_names[N_ARCHITECTURES] = {"llama", "mistral", "arcee",
                                                               "apertus"};

/* The numbers of a model, as its header has them. One kind of struct serves all architectures, so
 * what one of them lacks is 0 or false there. Hugging Face's config.json has most of them under
 * other names; medrun-export translates. A key-value head serves n_heads / n_kv_heads heads. */
typedef struct {
    int vocab_size, hidden_size, n_layers, n_heads, n_kv_heads, head_dim, ffn_size, max_positions;
    int sliding_window;             /* keys a query sees, its own among them; 0: all */
    int activation;
    bool qk_norm;                   /* RMSNorm of each head of q and k, before the rotation */
    bool tied;                      /* the output matrix is the embedding */
    float norm_eps;
    double rope_theta;
    int rope_type;
    double rope_factor, rope_original;          /* llama3, yarn */
    double rope_low, rope_high;                 /* llama3 */
    double rope_beta_fast, rope_beta_slow, rope_attention;      /* yarn */
    bool rope_truncate;                         /* yarn */
    float rope_divisors[MAX_HEAD_DIM / 2];      /* divisors: (head_dim / 2) */
} model_config;

/* A layer: attention, then feed-forward. Matrices lie in panels (section 5), rows are outputs. */
typedef struct {
    const float *attn_norm, *ffn_norm;          /* (hidden_size) */
    const float *q_norm, *k_norm;               /* (head_dim), only with qk_norm */
    tensor q, k, v, o;                          /* outputs x inputs */
    tensor gate, up, down;                      /* gate only with silu */
    xielu_numbers xielu;                        /* only with xielu */
} model_layer;

/* Read-only once it is open, so threads and sessions share it. Weights, norms and the tokenizer's
 * pieces are places in the mapped file: two programs with one model hold them once. */
struct medrun_model {
    model_file file;
    char *path;
    model_config config;
    int type;                                   /* of all matrices */
    tensor embed, output;                       /* (vocab_size, hidden_size) */
    const float *final_norm;
    model_layer *layers;
    float *rope_frequencies;                    /* (head_dim / 2) radians a position */
    float rope_scale;                           /* of cosine and sine: YaRN's attention factor */
    tokenizer tokenizer;
    uint8_t vocabulary[32];                     /* SHA-256 of the tokenizer's section */
    const chat_template *chat;                  /* own_chat; NULL: unknown */
    chat_template own_chat;                     /* the row of that name, as this model has it */
    const char *architecture;                   /* one of architecture_names */
    char name[128], template_name[32], bos[TOKENIZER_MAX_ADDED + 1], licence[128], notice[256];
    char *system;                               /* default system text */
    int n_stops, stops[MEDRUN_MAX_STOPS];
    medrun_sampling sampling;
    thread_pool *pool;
    const kernel_set *kernels;
    uint64_t parameters, weight_bytes;
    size_t longest_piece;                       /* bytes */
    device *device;                             /* NULL: none */
    buffer device_log;                          /* of a device that cannot be used */
};

/* ---- rotary frequencies -------------------------------------------------------------------- */

#define TWO_PI (2 * 3.14159265358979324)

/* Llama 3.1's scaling of frequency F: the factor slows long waves, short ones stay, and those
 * between are blended. A wave is long if less than rope_low of it fit the original context. */
static float llama3_frequency(const model_config *c, float f) {
    float factor = (float)c->rope_factor, low = (float)c->rope_low, high = (float)c->rope_high;
    float wave = (float)TWO_PI / f;
    if ((double)wave < c->rope_original / c->rope_high) return f;
    if ((double)wave > c->rope_original / c->rope_low) return f / factor;
    float smooth = ((float)c->rope_original / wave - low) / (high - low);
    return (1 - smooth) * f / factor + smooth * f;
}

/* YaRN (Peng et al. 2023) keeps frequency I if it turns often enough within the original context,
 * and divides it by the factor if it turns too rarely, with a ramp between. POWER is theta^(2 i /
 * head_dim). The dimension that turns `beta` times is solved from original = 2 pi beta theta^(2 i /
 * head_dim). */
static float yarn_frequency(const model_config *c, int i, float power, double ln_theta) {
    double bound[2] = {c->rope_beta_fast, c->rope_beta_slow};
    for (int k = 0; k < 2; k++) {           /* the dimension that turns BOUND times */
        bound[k] = c->head_dim * ln_exact(c->rope_original / (bound[k] * TWO_PI)) / (2 * ln_theta);
        if (c->rope_truncate) bound[k] = k ? ceil(bound[k]) : floor(bound[k]);
    }
    double low = bound[0] > 0 ? bound[0] : 0;
    double high = bound[1] < c->head_dim - 1 ? bound[1] : c->head_dim - 1;
    if (!(low < high) && !(low > high)) high += 0.001;
    float ramp = ((float)i - (float)low) / (float)(high - low);
    float keep = 1 - (ramp < 0 ? 0 : ramp > 1 ? 1 : ramp);
    return 1 / ((float)c->rope_factor * power) * (1 - keep) + 1 / power * keep;
}

/* Rotary frequencies (Su et al. 2021) with the model's scaling: radians a position for each pair of
 * channels. They are rounded to float at the same places as in transformers'
 * modeling_rope_utils.py; what stands between is double without libm, so that every machine has the
 * same bits. */
static void rope_frequencies(const model_config *c, float *out) {
    double ln_theta = ln_exact(c->rope_theta);
    for (int i = 0; i < c->head_dim / 2; i++) {
        float exponent = (float)(2 * i) / (float)c->head_dim;
        float power = (float)exp_exact((double)exponent * ln_theta), f = 1.0f / power;
        switch (c->rope_type) {
            case ROPE_LLAMA3: out[i] = llama3_frequency(c, f); break;
            case ROPE_YARN: out[i] = yarn_frequency(c, i, power, ln_theta); break;
            case ROPE_DIVISORS: out[i] = f / c->rope_divisors[i]; break;
            default: out[i] = f;
        }
    }
}

/* ---- the config ---------------------------------------------------------------------------- */

/* Field KEY of object V is one of the N NAMES: its number, or 0 after a failure. FIELD and WANTED
 * are for the message. */
static int read_name(const model_file *f, uint32_t v, const char *key, const char *field,
                     const char *const *names, int n, const char *wanted, medrun_error *e) {
    char name[32];
    if (json_text(&f->header, v, f->path, key, name, sizeof name, e)) return 0;
    for (int i = 0; i < n; i++) if (!strcmp(names[i], name)) return i;
    bad_file(e, f->path, "field %s: found \"%s\", wanted %s", field, name, wanted);
    return 0;
}

/* Most of the header is read by tables: a row is a field, its range, and where in a struct its
 * value goes. A MAY_MISS field may be missing: then the value stays as it is. A table ends with a
 * row without a key. The exporter writes headers by the same tables. */
enum { FIELD_INT, FIELD_FLOAT, FIELD_DOUBLE, FIELD_FLAG, MAY_MISS = 8 };

typedef struct {
    const char *key;
    int kind;
    double min, max;
    size_t at;
} header_field;

/* Reads the fields of object V into the struct at BASE. A flag is true or false: 1 or "yes" is
 * refused. */
static int read_fields(const model_file *f, uint32_t v, const header_field *d, void *base,
                       medrun_error *e) {
    const json *j = &f->header;
    for (; d->key && !e->code; d++) {
        void *to = (char *)base + d->at;
        int kind = d->kind & ~MAY_MISS;
        uint32_t value = json_get(j, v, d->key);
        double number = 0;
        if (kind != d->kind && value == JSON_NONE) continue;
        if (kind != FIELD_FLAG)
            number = json_real(j, v, f->path, d->key, d->min, d->max, kind == FIELD_INT, e);
        if (kind == FIELD_INT) *(int *)to = (int)number;
        else if (kind == FIELD_FLOAT) *(float *)to = (float)number;
        else if (kind == FIELD_DOUBLE) *(double *)to = number;
        else if (json_is_type(j, value, JSON_TRUE) || json_is_type(j, value, JSON_FALSE))
            *(bool *)to = json_typeof(j, value) == JSON_TRUE;
        else
            bad_file(e, f->path, "field %s: wanted true or false", d->key);
    }
    return e->code;
}

/* "config". The ranges are far beyond any published model, and small enough that products of sizes
 * stay within 64 bits. */
static const header_field config_fields[] = {
    {"vocab_size", FIELD_INT, 1, 1 << 22, offsetof(model_config, vocab_size)},
    {"hidden_size", FIELD_INT, 16, 1 << 16, offsetof(model_config, hidden_size)},
    {"n_layers", FIELD_INT, 1, 1024, offsetof(model_config, n_layers)},
    {"n_heads", FIELD_INT, 1, 1024, offsetof(model_config, n_heads)},
    {"n_kv_heads", FIELD_INT, 1, 1024, offsetof(model_config, n_kv_heads)},
    {"head_dim", FIELD_INT, 16, MAX_HEAD_DIM, offsetof(model_config, head_dim)},
    {"ffn_size", FIELD_INT, 16, 1 << 20, offsetof(model_config, ffn_size)},
    {"max_positions", FIELD_INT, 1, 1 << 24, offsetof(model_config, max_positions)},
    {"sliding_window", FIELD_INT | MAY_MISS, 0, 1 << 24, offsetof(model_config, sliding_window)},
    {"norm_eps", FIELD_FLOAT, 1e-12, 1, offsetof(model_config, norm_eps)},
    {"tied", FIELD_FLAG, 0, 0, offsetof(model_config, tied)},
    {"qk_norm", FIELD_FLAG | MAY_MISS, 0, 0, offsetof(model_config, qk_norm)},
    {"rope_theta", FIELD_DOUBLE, 1.001, 1e12, offsetof(model_config, rope_theta)},
    {0}};

/* What "rope_scaling" holds, for each type; divisors are a list, which read_rope reads. */
static const header_field scaling_fields[N_ROPES][7] = {
    [ROPE_LLAMA3] = {
        {"factor", FIELD_DOUBLE, 1, 1e6, offsetof(model_config, rope_factor)},
        {"low_freq_factor", FIELD_DOUBLE, 1e-3, 1e6, offsetof(model_config, rope_low)},
        {"high_freq_factor", FIELD_DOUBLE, 1e-3, 1e6, offsetof(model_config, rope_high)},
        {"original_max_positions", FIELD_DOUBLE, 1, 1e9, offsetof(model_config, rope_original)}},
    [ROPE_YARN] = {
        {"factor", FIELD_DOUBLE, 1, 1e6, offsetof(model_config, rope_factor)},
        {"original_max_positions", FIELD_DOUBLE, 1, 1e9, offsetof(model_config, rope_original)},
        {"beta_fast", FIELD_DOUBLE, 1e-3, 1e6, offsetof(model_config, rope_beta_fast)},
        {"beta_slow", FIELD_DOUBLE, 1e-3, 1e6, offsetof(model_config, rope_beta_slow)},
        {"attention_factor", FIELD_DOUBLE, 1e-3, 1e3, offsetof(model_config, rope_attention)},
        {"truncate", FIELD_FLAG, 0, 0, offsetof(model_config, rope_truncate)}}};

/* "chat.sampling": what the model's card or generation_config.json recommends. */
static const header_field sampling_fields[] = {
    {"temperature", FIELD_FLOAT, 0, 100, offsetof(medrun_sampling, temperature)},
    {"top_k", FIELD_INT, 0, 1 << 24, offsetof(medrun_sampling, top_k)},
    {"top_p", FIELD_FLOAT, 0, 1, offsetof(medrun_sampling, top_p)},
    {"min_p", FIELD_FLOAT, 0, 1, offsetof(medrun_sampling, min_p)},
    {"repeat_penalty", FIELD_FLOAT, 0.01, 100, offsetof(medrun_sampling, repeat_penalty)},
    {0}};

/* The list V of at most MOST numbers from MIN to MAX: how many there are, or -1 if it is none. The
 * caller knows the name of the field and what it wanted, so the message is its own. */
static int read_list(const json *j, uint32_t v, double min, double max, int most, double *out) {
    int n = json_is_type(j, v, JSON_ARRAY) ? (int)j->nodes[v].count : -1;
    v++;
    for (int i = 0; i < n && n <= most; i++, v = j->nodes[v].next) {
        out[i] = json_typeof(j, v) == JSON_NUMBER ? json_number(j, v) : (double)NAN;
        if (!(out[i] >= min && out[i] <= max)) return -1;
    }
    return n <= most ? n : -1;
}

/* "rope_scaling". high_freq_factor must be the larger, or the blend would divide by zero. Some GGUF
 * files state the scaling as a divisor for each frequency: (head_dim / 2) numbers. */
static int read_rope(const model_file *f, uint32_t v, model_config *c, medrun_error *e) {
    const json *j = &f->header;
    uint32_t s = json_get(j, v, "rope_scaling");
    double all[MAX_HEAD_DIM / 2];
    int n = c->head_dim / 2;
    c->rope_type = read_name(f, s, "type", "rope_scaling.type", rope_names, N_ROPES,
                             "none, llama3, yarn or divisors", e);
    if (read_fields(f, s, scaling_fields[c->rope_type], c, e)) return e->code;
    if (c->rope_type == ROPE_LLAMA3 && c->rope_high <= c->rope_low)
        return bad_file(e, f->path, "field rope_scaling: found high_freq_factor %g, wanted more "
                        "than low_freq_factor %g", c->rope_high, c->rope_low);
    if (c->rope_type != ROPE_DIVISORS) return MEDRUN_OK;
    if (read_list(j, json_get(j, s, "divisors"), 1e-6, 1e6, n, all) != n)
        return bad_file(e, f->path, "field rope_scaling.divisors: wanted %d numbers from 1e-6 to "
                        "1e6", n);
    for (int i = 0; i < n; i++) c->rope_divisors[i] = (float)all[i];
    return MEDRUN_OK;
}

/* Reads the header's config and checks that its numbers make sense together: kernels work on 16
 * floats at a time, and a key-value head serves a whole number of heads. */
static int read_config(const model_file *f, model_config *c, medrun_error *e) {
    uint32_t v = json_get(&f->header, 0, "config");
    read_fields(f, v, config_fields, c, e);
    c->activation = read_name(f, v, "activation", "activation", activation_names, N_ACTIVATIONS,
                              "silu, relu2 or xielu", e);
    if (e->code) return e->code;
    if (c->n_heads % c->n_kv_heads)
        return bad_file(e, f->path, "field n_heads: found %d, wanted a multiple of n_kv_heads %d",
                        c->n_heads, c->n_kv_heads);
    if (c->hidden_size % 16 || c->head_dim % 16 || c->ffn_size % 16)
        return bad_file(e, f->path, "config: found hidden_size %d, head_dim %d, ffn_size %d, "
                        "wanted multiples of 16", c->hidden_size, c->head_dim, c->ffn_size);
    return read_rope(f, v, c, e);
}

/* What `show` and the exporter say of a config; labels are padded to WIDTH. */
static void describe_config(buffer *b, const model_config *c, const char *architecture,
                            const char *type, uint64_t parameters, int width) {
    bool small = parameters < 1000000000;
    buffer_printf(b, "%-*s%s, %.2f %s parameters, %s\n", width, "architecture", architecture,
                  (double)parameters / (small ? 1e6 : 1e9), small ? "million" : "billion", type);
    buffer_printf(b, "%-*s%d layers, hidden %d, %d heads of %d (%d key-value)%s, ffn %d %s%s, "
                  "vocabulary %d%s\n", width, "config", c->n_layers, c->hidden_size, c->n_heads,
                  c->head_dim, c->n_kv_heads, c->qk_norm ? " with norms" : "", c->ffn_size,
                  activation_names[c->activation],
                  c->activation == ACTIVATION_SILU ? " gated" : "", c->vocab_size,
                  c->tied ? ", tied" : "");
    buffer_printf(b, "%-*s%d tokens", width, "context", c->max_positions);
    if (c->sliding_window) buffer_printf(b, ", each sees the last %d", c->sliding_window);
    buffer_printf(b, ", rope theta %g", c->rope_theta);
    if (c->rope_type == ROPE_LLAMA3)
        buffer_printf(b, ", llama3 scaling %g (%g to %g) from %g", c->rope_factor, c->rope_low,
                      c->rope_high, c->rope_original);
    if (c->rope_type == ROPE_YARN)
        buffer_printf(b, ", yarn scaling %g from %g, attention factor %.7g", c->rope_factor,
                      c->rope_original, c->rope_attention);
    if (c->rope_type == ROPE_DIVISORS) buffer_text(b, ", scaling by a table of divisors");
    buffer_text(b, "\n");
}

/* ---- the tensors --------------------------------------------------------------------------- */

/* Goes through the header's table of tensors: each must be the next that the config asks for. */
typedef struct {
    medrun_model *m;
    int layer;                      /* the one whose tensors are bound, or -1 */
    uint32_t entry, left;           /* node of the next entry; how many there are */
} binder;

/* Binds the next entry: it must have this name, type and shape. NAME within a layer is that of the
 * file without "layers.N.". TO is a tensor or, where there are no ROWS, a pointer to COLS floats.
 * The weights are not copied: what TO gets points into the mapping. */
static void bind(binder *b, const char *name, int rows, int cols, void *to, medrun_error *e) {
    model_file *f = &b->m->file;
    const json *j = &f->header;
    char full[64], their_name[64], their_type[16], found[128], wanted[128];
    uint8_t digest[32];
    size_t bytes = 0;
    tensor t = {.type = !rows ? TYPE_F32 : b->layer < 0 ? rows_type(b->m->type) : b->m->type,
                .rows = rows ? (size_t)rows : 1, .cols = (size_t)cols};
    uint64_t all = tensor_bytes(t.type, t.rows, t.cols);
    if (e->code) return;
    if (b->layer < 0) snprintf(full, sizeof full, "%s", name);
    else snprintf(full, sizeof full, "layers.%d.%s", b->layer, name);
    if (!b->left--) {
        bad_file(e, f->path, "tensor %s is missing", full);
        return;
    }
    json_text(j, b->entry, f->path, "name", their_name, sizeof their_name, e);
    json_text(j, b->entry, f->path, "type", their_type, sizeof their_type, e);
    int64_t r = json_int(j, b->entry, f->path, "rows", 1, 1 << 24, e);
    int64_t c = json_int(j, b->entry, f->path, "cols", 1, 1 << 24, e);
    snprintf(found, sizeof found, "%s %s (%d, %d)", their_name, their_type, (int)r, (int)c);
    snprintf(wanted, sizeof wanted, "%s %s (%zu, %d)", full, type_names[t.type], t.rows, cols);
    if (strcmp(found, wanted)) bad_file(e, f->path, "tensor: found %s, wanted %s", found, wanted);
    if (e->code || take_section(f, b->entry, full, &t.data, &bytes, digest, e)) return;
    if (bytes != all)
        bad_file(e, f->path, "tensor %s: found %zu bytes, wanted %llu", full, bytes,
                 (unsigned long long)all);
    if (rows) *(tensor *)to = t;
    else *(const float **)to = (const void *)t.data;
    b->m->parameters += (uint64_t)t.rows * t.cols;
    b->m->weight_bytes += bytes;
    b->entry = j->nodes[b->entry].next;
}

/* ln(1 + e^x), which for large x is x; by section 5's own functions, not libm's. */
static double softplus(double x) { return x > 20 ? x : ln_exact(1 + exp_exact(x)); }

/* The layer's tensor "xielu" holds alpha_p, alpha_n, beta and eps as the model was trained with
 * them: both alphas in front of softplus. */
static int read_xielu(const char *path, int layer, const float *stored, xielu_numbers *out,
                      medrun_error *e) {
    if (e->code) return e->code;
    for (int i = 0; i < 4; i++)
        if (!(fabsf(stored[i]) <= 500))
            return bad_file(e, path, "tensor layers.%d.xielu: found %g, wanted numbers from -500 "
                            "to 500", layer, (double)stored[i]);
    if (stored[3] > 0)
        return bad_file(e, path, "tensor layers.%d.xielu: found eps %g, wanted at most 0", layer,
                        (double)stored[3]);
    *out = (xielu_numbers){(float)softplus((double)stored[0]), 0, stored[2], stored[3]};
    out->negative = stored[2] + (float)softplus((double)stored[1]);
    return MEDRUN_OK;
}

/* The tensors of a layer, in the order of the file, which is the order of the forward pass. A
 * matrix has as many rows as outputs and as many columns as inputs, a vector none. */
static void bind_layer(binder *b, model_layer *layer, medrun_error *e) {
    const model_config *c = &b->m->config;
    int hidden = c->hidden_size, ffn = c->ffn_size, dim = c->head_dim;
    int heads = c->n_heads * dim, kv = c->n_kv_heads * dim;
    bool gated = c->activation == ACTIVATION_SILU;
    const float *xielu = NULL;
    const struct { const char *name; int rows, cols; void *to; bool missing; } all[] = {
        {"attn_norm", 0, hidden, &layer->attn_norm, false},
        {"q", heads, hidden, &layer->q, false},
        {"k", kv, hidden, &layer->k, false},
        {"v", kv, hidden, &layer->v, false},
        {"q_norm", 0, dim, &layer->q_norm, !c->qk_norm},
        {"k_norm", 0, dim, &layer->k_norm, !c->qk_norm},
        {"o", hidden, heads, &layer->o, false},
        {"ffn_norm", 0, hidden, &layer->ffn_norm, false},
        {"gate", ffn, hidden, &layer->gate, !gated},
        {"up", ffn, hidden, &layer->up, false},
        {"xielu", 0, 4, &xielu, c->activation != ACTIVATION_XIELU},
        {"down", hidden, ffn, &layer->down, false},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!all[i].missing) bind(b, all[i].name, all[i].rows, all[i].cols, all[i].to, e);
    if (xielu) read_xielu(b->m->file.path, b->layer, xielu, &layer->xielu, e);
}

/* Gives every tensor of the model its place in the mapped file. The config alone says which tensors
 * there are, of what type and shape: a table that leaves one out, adds one, or has another order is
 * refused, so that nothing below has to ask. The vocabulary's rows of an int4 model are int8. */
static int bind_all(medrun_model *m, medrun_error *e) {
    const model_config *c = &m->config;
    uint32_t list = m->file.tensors;
    binder b = {m, -1, list + 1, m->file.header.nodes[list].count};
    bind(&b, "embed", c->vocab_size, c->hidden_size, &m->embed, e);
    for (b.layer = 0; b.layer < c->n_layers && !e->code; b.layer++)
        bind_layer(&b, &m->layers[b.layer], e);
    b.layer = -1;
    bind(&b, "final_norm", 0, c->hidden_size, &m->final_norm, e);
    if (c->tied) m->output = m->embed;
    else bind(&b, "output", c->vocab_size, c->hidden_size, &m->output, e);
    if (b.left) bad_file(e, m->path, "%u tensors more than the config needs", b.left);
    return e->code;
}

/* ---- tokenizer, chat, names ---------------------------------------------------------------- */

/* Takes the last section and checks it whole, as people's text depends on each byte of it. */
static int read_tokenizer(medrun_model *m, medrun_error *e) {
    model_file *f = &m->file;
    const uint8_t *data = NULL;
    size_t n = 0;
    uint8_t found[32];
    if (f->tokenizer == JSON_NONE) return bad_file(e, m->path, "field tokenizer is missing");
    if (take_section(f, f->tokenizer, "tokenizer", &data, &n, m->vocabulary, e)) return e->code;
    if (f->at != f->map.n)
        return bad_file(e, m->path, "%zu bytes follow the last section", f->map.n - f->at);
    sha256_of(data, n, found);
    if (memcmp(found, m->vocabulary, 32))
        return bad_file(e, m->path, "tokenizer: its SHA-256 differs: the file is damaged, copy it "
                        "again");
    if (tokenizer_open(&m->tokenizer, data, n, f->path, e)) return e->code;
    if (m->tokenizer.vocab_size != m->config.vocab_size)
        return bad_file(e, m->path, "tokenizer: found %d pieces, wanted vocab_size %d",
                        m->tokenizer.vocab_size, m->config.vocab_size);
    for (int32_t id = 0; id < m->config.vocab_size; id++) {
        tokenizer_piece(&m->tokenizer, id, &n);
        if (n > m->longest_piece) m->longest_piece = n;
    }
    return MEDRUN_OK;
}

/* The ids that end an answer. */
static int read_stops(medrun_model *m, uint32_t chat, medrun_error *e) {
    const json *j = &m->file.header;
    double ids[MEDRUN_MAX_STOPS];
    int i = 0, most = MEDRUN_MAX_STOPS, vocab = m->config.vocab_size;
    int n = read_list(j, json_get(j, chat, "stop_ids"), 0, vocab - 1, most, ids);
    for (; i < n && floor(ids[i]) >= ids[i]; i++) m->stops[i] = (int)ids[i];
    m->n_stops = i;
    if (i == n) return MEDRUN_OK;
    return bad_file(e, m->path, "field chat.stop_ids: wanted an array of at most %d ids below %d",
                    most, vocab);
}

/* The template by its name, and what the model's own Jinja template does otherwise: another BOS
 * ("": none), a default system text, white space; stops, and the card's sampling. */
static int read_chat(medrun_model *m, medrun_error *e) {
    static const header_field own_fields[] = {
        {"trims", FIELD_FLAG | MAY_MISS, 0, 0, offsetof(chat_template, trims)}, {0}};
    const model_file *f = &m->file;
    const json *j = &f->header;
    uint32_t v = json_get(j, 0, "chat"), system = json_get(j, v, "system");
    if (json_text(j, v, f->path, "template", m->template_name, sizeof m->template_name, e))
        return e->code;
    const chat_template *row = chat_find(m->template_name);
    if (!row && strcmp(m->template_name, MEDRUN_UNKNOWN))       /* nor to the exporter */
        return bad_file(e, m->path, "field chat.template: found \"%s\", wanted %s",
                        m->template_name, MEDRUN_TEMPLATES);
    if (row) m->own_chat = *row, m->chat = &m->own_chat;
    if (json_get(j, v, "bos") != JSON_NONE &&
        !json_text(j, v, f->path, "bos", m->bos, sizeof m->bos, e))
        m->own_chat.bos = *m->bos ? m->bos : NULL;
    read_fields(f, v, own_fields, &m->own_chat, e);
    if (!json_is_type(j, system, JSON_STRING))
        return bad_file(e, m->path, "field chat.system: wanted a string");
    buffer b = {0};
    json_unescape(j, system, &b);
    buffer_add(&b, "", 1);
    m->system = (char *)b.data;                         /* the model frees it */
    if (b.failed) return out_of_memory(e, b.n);
    if (*m->system) m->own_chat.system = m->system;
    if (e->code || read_stops(m, v, e)) return e->code;
    return read_fields(f, json_get(j, v, "sampling"), sampling_fields, &m->sampling, e);
}

/* What the model is called, and the one type of all its matrices. f32 is for vectors only. */
static int read_names(medrun_model *m, medrun_error *e) {
    const model_file *f = &m->file;
    const json *j = &f->header;
    uint32_t from = json_get(j, 0, "provenance");
    json_text(j, 0, f->path, "name", m->name, sizeof m->name, e);
    m->architecture = architecture_names[read_name(f, 0, "architecture", "architecture",
                                                   architecture_names, N_ARCHITECTURES,
                                                   "llama, mistral, arcee or apertus", e)];
    m->type = TYPE_BF16 + read_name(f, 0, "type", "type", type_names + TYPE_BF16,
                                    N_TYPES - TYPE_BF16, "bf16, int8 or int4", e);
    json_text(j, from, f->path, "licence", m->licence, sizeof m->licence, e);
    return json_text(j, from, f->path, "notice", m->notice, sizeof m->notice, e);
}

/* Opens M->path and fills M; medrun_close frees what a failure leaves. Threads start last, when
 * nothing more can be wrong with the file. */
static int load_model(medrun_model *m, const medrun_options *options, medrun_error *e) {
    if (file_open(&m->file, m->path, options && options->load, e) || read_names(m, e) ||
        read_config(&m->file, &m->config, e)) return e->code;
    m->layers = new_array((size_t)m->config.n_layers, sizeof *m->layers);
    m->rope_frequencies = new_array((size_t)m->config.head_dim / 2, sizeof(float));
    m->pool = new_array(1, sizeof *m->pool);
    if (!m->layers || !m->rope_frequencies || !m->pool) return out_of_memory(e, sizeof *m->layers);
    rope_frequencies(&m->config, m->rope_frequencies);
    m->rope_scale = m->config.rope_type == ROPE_YARN ? (float)m->config.rope_attention : 1;
    if (bind_all(m, e) || read_tokenizer(m, e) || read_chat(m, e) ||
        choose_kernels(&m->kernels, options ? options->kernels : NULL, e)) return e->code;
    const char *limit;
    int threads = options ? options->threads : 0, most = processors();
    if (threads > most && threads <= MAX_THREADS) threads = most;   /* more would only take turns */
    return pool_start(m->pool, threads ? threads : default_threads(&limit), e);
}
/* ============================================================================================
 * 13 Transformer: what happens to a batch of tokens
 *
 * RMSNorm (Zhang and Sennrich 2019), rotary positions (Su et al. 2021), attention with grouped
 * key-value heads (Ainslie et al. 2023), a gated feed-forward network (Shazeer 2020), a residual
 * sum around both: Llama. What its relatives do differently is data in the config and the layers.
 * Mistral: a sliding window (attend_queries). Arcee: relu^2 without a gate (widen_rows), YaRN
 * (section 12). Apertus: xIELU without a gate, and a norm for each head of q and k (place_head).
 *
 * A pass takes rows of any timelines. A row is one token at its own position, and its numbers never
 * depend on the rows beside it. `forward`, near the end, is the story; the functions above it are
 * its sentences, in the order of their use. A shape such as (n, hidden) is that of a matrix stored
 * row by row. May use sections 1 to 12. Tests: tests/13_transformer.c.
 * ============================================================================================ */

/* Hands out 64-byte aligned pieces of the memory at BASE. When BASE is NULL it only counts bytes,
 * even more than the machine can address. So one function measures a thing and lays it out. */
typedef struct {
    uint8_t *base;
    uint64_t at;
} arena;

/* 64 bytes are the widest vector, and a line of most processors' caches, which no arrays share. */
static void *arena_take(arena *a, uint64_t n, uint64_t size) {
    uint64_t at = a->at;
    a->at += (n * size + 63) / 64 * 64;
    return a->base ? a->base + at : NULL;
}

static const char *const kv_names[] = {"f16", "f32", "int8"};   /* MEDRUN_KV_F16, ...           */

/* Keys and values of one timeline. The panels of a layer's key-value head (cache_panel, section 6)
 * stand together, so that attention reads one stream of bytes. */
typedef struct {
    int kv;                                     /* their numbers: MEDRUN_KV_F16, ...            */
    size_t heads, head_bytes;                   /* key-value heads of a layer; bytes of one     */
    uint8_t *keys, *values;                     /* (layers, heads, head_bytes)                  */
} kv_cache;

/* Room for CONTEXT positions, rounded up because attention reads KEY_STEP keys at a time. */
static void layout_cache(kv_cache *cache, const model_config *c, int context, int kv, arena *a) {
    size_t panels = round_up((size_t)context, KEY_STEP) / 16;
    cache->kv = kv;
    cache->heads = (size_t)c->n_kv_heads;
    cache->head_bytes = panels * cache_panel(kv, (size_t)c->head_dim);
    cache->keys = arena_take(a, (uint64_t)c->n_layers * cache->heads, cache->head_bytes);
    cache->values = arena_take(a, (uint64_t)c->n_layers * cache->heads, cache->head_bytes);
}

/* Where a layer's head begins in keys, and in values. */
static size_t cache_place(const kv_cache *c, int layer, size_t head) {
    return ((size_t)layer * c->heads + head) * c->head_bytes;
}

/* Who looks at a session's passes: medrun_observe, medrun_edit. NULL: nobody. A segment has a copy,
 * so that the pass needs to know nothing of sessions. */
typedef struct {
    medrun_observer *see;
    medrun_editor *edit;
    void *see_user, *edit_user;
} watcher;

/* Tokens of one timeline that stand together in a pass. All that a pass knows of a session. */
typedef struct {
    const int32_t *ids;                         /* (n)                                          */
    size_t first, n;                            /* rows of the pass                             */
    size_t position;                            /* of the first, in the timeline                */
    kv_cache *cache;                            /* has all positions before, and gets these     */
    size_t n_wanted;                            /* rows whose logits are wanted, the last ones  */
    size_t tiles;                               /* of QUERIES of one key-value head             */
    float *logits;                              /* (n_wanted, vocab)                            */
    watcher watcher;
} segment;

/* What a pass computes with, and its scratch memory. Matrices have a row for each token; hidden,
 * heads, kv, ffn and vocab are the floats in a row. */
typedef struct {
    const medrun_model *model;
    const model_config *config;
    engine eng;
    size_t capacity, n;                         /* rows: room, in use                           */
    size_t n_kept;                              /* those that the last layer must finish        */
    size_t n_segments;
    segment *segments;                          /* (capacity)                                   */
    const segment **owner;                      /* (capacity) of each row                       */
    int layer;                                  /* that is computed now; -1: none               */
    atomic_int stop;                            /* medrun_interrupt was called                  */
    size_t dim, group;                          /* head_dim; query heads to a key-value head    */
    size_t hidden, heads, kv, ffn, vocab;       /* heads: of all queries; kv: of all keys       */
    float *x;                                   /* (n, hidden) the residual stream              */
    float *h;                                   /* (n, hidden) normed, then a block's output    */
    float *q, *k, *v;                           /* (n, heads), (n, kv), (n, kv)                 */
    float *attn;                                /* (n, heads) what the heads found              */
    float *ffn_act, *up;                        /* (n, ffn); up only beside a gate              */
    float *rotation;                            /* (n, dim / 2, 2) cosine, sine                 */
    float *scores;                              /* (threads, attend_scratch)                    */
    size_t pieces, part_places;                 /* blocks that keys are split into now, or 1    */
    float *parts;                               /* (part_places, dim + PART_EXTRA)              */
    float *logits;                              /* (TILE, vocab)                                */
    packed packed;                              /* the activations that are multiplied next     */
    const float *norm_weight;                   /* (hidden) of the norm that runs               */
} pass;

/* Lays out a pass of up to ROWS tokens over keys of up to CONTEXT positions. A layer's two blocks
 * run one after the other, so they share memory: (q, k, v, attn) and (ffn_act, up). */
static void layout_pass(pass *p, const medrun_model *m, thread_pool *pool, int rows, int context,
                        bool strict, arena *a) {
    const model_config *c = &m->config;
    size_t dim = (size_t)c->head_dim, heads = (size_t)c->n_heads, kv_heads = (size_t)c->n_kv_heads;
    uint64_t n = (uint64_t)rows, threads = (uint64_t)pool->threads, overlaid, end;
    *p = (pass){.model = m, .config = c, .capacity = (size_t)n, .dim = dim,
                .group = heads / kv_heads, .hidden = (size_t)c->hidden_size, .heads = heads * dim,
                .kv = kv_heads * dim, .ffn = (size_t)c->ffn_size,
                .vocab = round_up((size_t)c->vocab_size, LANES)};
    p->eng = (engine){.pool = pool, .k = m->kernels, .strict = strict, .device = m->device,
                      .cache = second_cache()};
    size_t widest = p->ffn > p->heads ? p->ffn : p->heads;
    if (p->hidden > widest) widest = p->hidden;
    p->segments = arena_take(a, n, sizeof *p->segments);
    p->owner = arena_take(a, n, sizeof *p->owner);
    p->x = arena_take(a, n * p->hidden, sizeof(float));
    p->h = arena_take(a, n * p->hidden, sizeof(float));
    overlaid = a->at;
    p->q = arena_take(a, n * p->heads, sizeof(float));
    p->k = arena_take(a, n * p->kv, sizeof(float));
    p->v = arena_take(a, n * p->kv, sizeof(float));
    p->attn = arena_take(a, n * p->heads, sizeof(float));
    end = a->at;
    a->at = overlaid;                           /* back: the second block lies over the first   */
    p->ffn_act = arena_take(a, n * p->ffn, sizeof(float));
    if (c->activation == ACTIVATION_SILU) p->up = arena_take(a, n * p->ffn, sizeof(float));
    if (a->at < end) a->at = end;
    p->rotation = arena_take(a, n * dim, sizeof(float));
    p->scores = arena_take(a, threads * attend_scratch(dim), sizeof(float));
    p->part_places = TILE * heads * (((size_t)context + KEY_BLOCK - 1) / KEY_BLOCK);
    p->parts = arena_take(a, p->part_places, (dim + PART_EXTRA) * sizeof(float));
    p->logits = arena_take(a, TILE * p->vocab, sizeof(float));
    p->packed.data = arena_take(a, round_up((size_t)n, TILE),
                                pack_bytes(pack_kind(&p->eng, m->type), widest, 1));
    p->eng.block_bytes = round_up(engine_block_bytes(&p->eng, m->type, widest), 64);
    p->eng.blocks = arena_take(a, threads, p->eng.block_bytes);
}

/* Shows a stage, (n, cols), to whoever watches a segment: each sees its own rows. NULL: logits. */
static void observe(const pass *p, const char *stage, float *data, size_t cols) {
    for (const segment *s = p->segments; s < p->segments + p->n_segments; s++) {
        const watcher *w = &s->watcher;
        float *rows = data ? data + s->first * cols : s->logits;
        size_t stride = data ? cols : p->vocab;
        if (w->edit && s->n && data != p->k && data != p->v)
            w->edit(w->edit_user, stage, p->layer, s->n, cols, stride, rows);
        if (w->see && s->n) w->see(w->see_user, stage, p->layer, s->n, cols, stride, rows);
    }
}

/* What is done for each row by itself. Threads take tiles of rows: a single one is little work, and
 * two threads that write beside each other would wait for each other's memory. */
typedef void row_fn(pass *p, size_t row);
typedef struct { pass *p; row_fn *row; } row_job;

static void rows_task(void *context, size_t begin, size_t end, int thread) {
    (void)thread;
    row_job *j = context;
    for (size_t r = begin * TILE; r < end * TILE && r < j->p->n; r++) j->row(j->p, r);
}

/* Comes back when all rows are done: the next stage may read any of them, as attention does. */
static void each_row(pass *p, row_fn *row) {
    row_job j = {p, row};
    parallel_for(p->eng.pool, (p->n + TILE - 1) / TILE, 1, rows_task, &j);
}

/* x = the token's embedding; rotation = cosine and sine of its angles, once for all layers: angle i
 * is position * rope_frequencies[i]. */
static void embed_row(pass *p, size_t r) {
    const medrun_model *m = p->model;
    const tensor *e = &m->embed;
    const segment *s = p->owner[r];
    size_t id = (size_t)s->ids[r - s->first], position = s->position + r - s->first;
    float *rotation = p->rotation + r * p->dim;
    panel_unpack_row(e->type, e->data + id / LANES * panel_bytes(e->type, e->cols), id % LANES,
                     e->cols, p->x + r * p->hidden);
    for (size_t i = 0; i < p->dim / 2; i++) {
        double sine, cosine;
        sin_cos((double)((float)position * m->rope_frequencies[i]), &sine, &cosine);
        rotation[2 * i] = (float)cosine * m->rope_scale;
        rotation[2 * i + 1] = (float)sine * m->rope_scale;
    }
}

/* Out of place: the residual stream must stay as it is, for what a block finds is added to it. */
static void norm_row(pass *p, size_t r) {
    p->eng.k->norm(p->h + r * p->hidden, p->x + r * p->hidden, p->norm_weight, p->hidden,
                   p->config->norm_eps);
}

/* x (n, cols), packed for the next matmul. */
static void pack_rows(pass *p, const float *x, size_t cols) {
    int type = p->layer < 0 ? p->model->output.type : p->model->type;
    pack_activations(&p->eng, &p->packed, type, x, cols, cols, p->n);
}

/* h = x / sqrt(mean(x^2) + eps) * weight, packed for the next matmul. Who edits h meanwhile edits
 * what is packed. */
static void norm_rows(pass *p, const float *weight, const char *stage) {
    p->norm_weight = weight;
    each_row(p, norm_row);
    observe(p, stage, p->h, p->hidden);
    pack_rows(p, p->h, p->hidden);
}

/* out (n, rows of w) = w times the rows that were packed last. */
static void multiply(pass *p, const tensor *w, float *out, size_t stride) {
    matmul(&p->eng, &(product){w, out, stride}, 1, &p->packed);
}

/* One head of q or k: its norm, where the model has one (WEIGHT), then the rotary position
 * embedding, which turns the pair (x[i], x[i + half]) by the position's angle i. So the score of a
 * query and a key depends on how far apart they are, and on nothing else about their places. */
static void place_head(const pass *p, float *x, const float *weight, const float *rotation) {
    size_t half = p->dim / 2;
    if (weight) p->eng.k->norm(x, x, weight, p->dim, p->config->norm_eps);
    for (size_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half], cosine = rotation[2 * i], sine = rotation[2 * i + 1];
        x[i] = a * cosine - b * sine;
        x[i + half] = b * cosine + a * sine;
    }
}

/* x (dim) of one position to its lane of a panel, see cache_panel. A key becomes a column, as
 * attention walks along dim for 16 keys at once. A value stays a row; of int8 values two rows stand
 * together. Two int8 numbers of a key are one column, like one f16. */
static void store_head(const pass *p, int kv, const float *x, uint8_t *panel, size_t lane,
                       bool key) {
    union { uint16_t f16[MAX_HEAD_DIM]; int8_t int8[MAX_HEAD_DIM]; } to;
    uint16_t scales[MAX_HEAD_DIM / GROUP + 1];
    size_t dim = p->dim, columns = kv == MEDRUN_KV_INT8 ? dim / 2 : dim;
    bool f32 = kv == MEDRUN_KV_F32;
    if (kv == MEDRUN_KV_F16) p->eng.k->to_half(to.f16, x, dim);
    if (kv == MEDRUN_KV_INT8) {
        p->eng.k->to_int8(to.int8, scales, x, dim);
        for (size_t g = 0; g * GROUP < dim; g++)
            memcpy(panel + 16 * dim + 2 * (16 * g + lane), scales + g, 2);
    }
    if (key && f32) for (size_t d = 0; d < dim; d++) memcpy(panel + 4 * (16 * d + lane), x + d, 4);
    else if (key)
        for (size_t d = 0; d < columns; d++) memcpy(panel + 2 * (16 * d + lane), to.f16 + d, 2);
    else if (kv == MEDRUN_KV_INT8)
        for (size_t d = 0; d < dim; d++)
            panel[2 * (lane / 2 * dim + d) + lane % 2] = (uint8_t)to.int8[d];
    else if (f32) memcpy(panel + 4 * lane * dim, x, 4 * dim);
    else memcpy(panel + 2 * lane * dim, to.f16, 2 * dim);
}

/* Gives a row's keys their position; they and the values go to the cache. */
static void place_key(pass *p, size_t r) {
    const segment *s = p->owner[r];
    const kv_cache *cache = s->cache;
    size_t at = s->position + r - s->first;
    for (size_t head = 0; head * p->dim < p->kv; head++) {
        float *k = p->k + r * p->kv + head * p->dim, *v = p->v + r * p->kv + head * p->dim;
        size_t panel = at / 16 * cache_panel(cache->kv, p->dim);
        panel += cache_place(cache, p->layer, head);
        place_head(p, k, p->model->layers[p->layer].k_norm, p->rotation + r * p->dim);
        store_head(p, cache->kv, k, cache->keys + panel, at % 16, true);
        store_head(p, cache->kv, v, cache->values + panel, at % 16, false);
    }
}

/* Queries are used at once and need no cache. */
static void place_query(pass *p, size_t r) {
    const model_layer *layer = &p->model->layers[p->layer];
    for (size_t d = 0; d < p->heads; d += p->dim)
        place_head(p, p->q + r * p->heads + d, layer->q_norm, p->rotation + r * p->dim);
}

/* Leaves in the pass only the rows whose logits are wanted, and moves them together: in the last
 * layer nobody needs more of the others than their keys and values. Who observes a segment sees all
 * of its rows. */
static void keep_wanted(pass *p) {
    size_t n = 0;
    for (segment *s = p->segments; s < p->segments + p->n_segments; s++) {
        size_t dropped = s->n - s->n_wanted, from = s->first + dropped;
        memmove(p->x + n * p->hidden, p->x + from * p->hidden,
                s->n_wanted * p->hidden * sizeof *p->x);
        memmove(p->rotation + n * p->dim, p->rotation + from * p->dim,
                s->n_wanted * p->dim * sizeof *p->rotation);
        s->ids += dropped, s->position += dropped;
        s->first = n, s->n = s->n_wanted;
        while (n < s->first + s->n) p->owner[n++] = s;
    }
    p->n = n;
}

/* Where a row's query of a head leaves the part that block PIECE of its keys gives: a sum (dim),
 * and behind it the largest score and the total weight. */
static float *part_place(const pass *p, size_t row, size_t head, size_t piece) {
    size_t query = row * (size_t)p->config->n_heads + head;
    return p->parts + (query * p->pieces + piece) * (p->dim + PART_EXTRA);
}

/* attn = softmax(q . keys / sqrt(dim)) . values for queries [first, end) of a segment that share
 * key-value head HEAD, counted through rows and then heads; over all keys that each sees, or only
 * those of block PIECE. A query sees its own position and those before it, and no more of them than
 * the sliding window. */
static void attend_queries(const pass *p, const segment *s, size_t head, size_t first, size_t end,
                           size_t piece, float *scratch) {
    size_t window = p->config->sliding_window ? (size_t)p->config->sliding_window : SIZE_MAX;
    size_t place = cache_place(s->cache, p->layer, head);
    attention a = {.n = end - first, .kv = s->cache->kv, .head_dim = p->dim,
                   .scale = 1.0f / sqrtf((float)p->dim), .end = SIZE_MAX, .part = p->pieces > 1,
                   .keys = s->cache->keys + place, .values = s->cache->values + place,
                   .scratch = scratch};
    if (a.part) a.begin = piece * KEY_BLOCK, a.end = a.begin + KEY_BLOCK;
    for (size_t i = 0; i < a.n; i++, first++) {
        size_t row = s->first + first / p->group, q = head * p->group + first % p->group;
        size_t at = row * p->heads + q * p->dim;
        a.q[i] = p->q + at;
        a.out[i] = a.part ? part_place(p, row, q, piece) : p->attn + at;
        a.limit[i] = s->position + first / p->group + 1;
        a.start[i] = a.limit[i] > window ? a.limit[i] - window : 0;
    }
    p->eng.k->attend(&a);
}

/* Items are numbered through segments, their key-value heads, tiles of queries, pieces. */
static void attend_task(void *context, size_t begin, size_t end, int thread) {
    pass *p = context;
    size_t kv_heads = (size_t)p->config->n_kv_heads, at = 0;
    float *scratch = p->scores + (size_t)thread * attend_scratch(p->dim);
    for (const segment *s = p->segments; s < p->segments + p->n_segments; s++) {
        size_t items = kv_heads * s->tiles * p->pieces;
        for (size_t i = begin > at ? begin - at : 0; i < items && at + i < end; i++) {
            size_t item = i / p->pieces, first = item % s->tiles * QUERIES, last = first + QUERIES;
            if (last > s->n * p->group) last = s->n * p->group;
            attend_queries(p, s, item / s->tiles, first, last, i % p->pieces, scratch);
        }
        at += items;
    }
}

/* attn of a row from the parts of its queries. */
static void merge_row(pass *p, size_t r) {
    for (size_t q = 0; q < (size_t)p->config->n_heads; q++)
        p->eng.k->merge(p->attn + r * p->heads + q * p->dim, part_place(p, r, q, 0), p->pieces,
                        p->dim, p->owner[r]->cache->kv);
}

/* Attention of all rows. A few tokens with many keys are split by blocks of keys too, so that all
 * threads have work. That changes no bit: a block is always computed by itself, and the blocks are
 * always joined in order (section 6). */
static void attend_rows(pass *p) {
    size_t items = 0, longest = 0, heads = (size_t)p->config->n_heads;
    for (segment *s = p->segments; s < p->segments + p->n_segments; s++) {
        s->tiles = (s->n * p->group + QUERIES - 1) / QUERIES;
        items += s->tiles * (size_t)p->config->n_kv_heads;
        if (s->position + s->n > longest) longest = s->position + s->n;
    }
    p->pieces = (longest + KEY_BLOCK - 1) / KEY_BLOCK;
    if (items >= 4 * (size_t)p->eng.pool->threads || p->n * heads * p->pieces > p->part_places)
        p->pieces = 1;
    parallel_for(p->eng.pool, items * p->pieces, 1, attend_task, p);
    if (p->pieces > 1) each_row(p, merge_row);
}

/* q, k and v with their positions, of all rows; of the last layer's, q only of those that go on. */
static void project_rows(pass *p, const model_layer *layer) {
    bool few = p->layer + 1 == p->config->n_layers && p->n_kept < p->n;
    norm_rows(p, layer->attn_norm, "attn_norm");
    matmul(&p->eng, (product[]){{&layer->k, p->k, p->kv}, {&layer->v, p->v, p->kv},
                                {&layer->q, p->q, p->heads}}, few ? 2 : 3, &p->packed);
    each_row(p, place_key);
    if (few) {
        keep_wanted(p);
        norm_rows(p, layer->attn_norm, "attn_norm");    /* packed anew, the few alone            */
        multiply(p, &layer->q, p->q, p->heads);
    }
    each_row(p, place_query);
}

/* The activation between the two matmuls of the feed-forward network. */
static void activate_row(pass *p, size_t r) {
    int activation = p->config->activation;
    float *x = p->ffn_act + r * p->ffn;
    if (activation == ACTIVATION_SILU) p->eng.k->silu_mul(x, p->up + r * p->ffn, p->ffn);
    else if (activation == ACTIVATION_RELU2) p->eng.k->relu2(x, p->ffn);
    else p->eng.k->xielu(x, p->ffn, &p->model->layers[p->layer].xielu);
}

/* ffn_act = silu(gate . h) * (up . h), or without a gate the activation of up . h */
static void widen_rows(pass *p, const model_layer *layer) {
    if (p->config->activation == ACTIVATION_SILU)
        matmul(&p->eng, (product[]){{&layer->gate, p->ffn_act, p->ffn},
                                    {&layer->up, p->up, p->ffn}}, 2, &p->packed);
    else multiply(p, &layer->up, p->ffn_act, p->ffn);
    each_row(p, activate_row);
}

/* x += h: a block adds what it found to the residual stream, from which all later ones read. */
static void add_row(pass *p, size_t r) {
    p->eng.k->add(p->x + r * p->hidden, p->h + r * p->hidden, p->hidden);
}

/* The tokens of the pass through all layers. x begins as the embeddings and ends as the last
 * layer's output; each of a layer's two blocks reads it and adds to it. Beside each step stands
 * what it makes. */
static void forward(pass *p) {
    p->layer = -1;
    each_row(p, embed_row);                                     /* x (n, hidden)                */
    observe(p, "embed", p->x, p->hidden);

    for (p->layer = 0; p->layer < p->config->n_layers && !p->stop; p->layer++) {
        const model_layer *layer = &p->model->layers[p->layer];

        project_rows(p, layer);                                 /* q (n, heads), k, v (n, kv)   */
        observe(p, "q", p->q, p->heads);
        observe(p, "k", p->k, p->kv);
        observe(p, "v", p->v, p->kv);
        attend_rows(p);                                         /* attn (n, heads)              */
        observe(p, "attn_out", p->attn, p->heads);
        pack_rows(p, p->attn, p->heads);
        multiply(p, &layer->o, p->h, p->hidden);                /* h (n, hidden)                */
        each_row(p, add_row);                                   /* x                            */
        observe(p, "attn_resid", p->x, p->hidden);

        norm_rows(p, layer->ffn_norm, "ffn_norm");              /* h (n, hidden)                */
        widen_rows(p, layer);                                   /* ffn_act (n, ffn)             */
        observe(p, "ffn_act", p->ffn_act, p->ffn);
        pack_rows(p, p->ffn_act, p->ffn);
        multiply(p, &layer->down, p->h, p->hidden);             /* h (n, hidden)                */
        each_row(p, add_row);                                   /* x                            */
        observe(p, "layer_out", p->x, p->hidden);
    }
}

/* The logits that segments want, a tile of rows at a time: rows of several segments share a reading
 * of the output matrix. */
static void output(pass *p) {
    keep_wanted(p);
    p->layer = -1;
    norm_rows(p, p->model->final_norm, "final_norm");           /* h (n, hidden)                */
    for (size_t first = 0; first < p->n; first += TILE) {
        packed tile = {.kind = p->packed.kind, .cols = p->hidden,
                       .tokens = p->n - first < TILE ? p->n - first : TILE,
                       .data = p->packed.data + pack_bytes(p->packed.kind, p->hidden, first)};
        matmul(&p->eng, &(product){&p->model->output, p->logits, p->vocab}, 1, &tile);
        for (size_t r = first; r < first + tile.tokens; r++)
            memcpy(p->owner[r]->logits + (r - p->owner[r]->first) * p->vocab,
                   p->logits + (r - first) * p->vocab, p->vocab * sizeof *p->logits);
    }
    observe(p, "logits", NULL, (size_t)p->config->vocab_size);
}
/* ============================================================================================
 * 14 Sampler: from logits to the next id
 *
 * In transformers' order: repeat penalty, temperature, top-k, top-p (Holtzman et al. 2020), min-p
 * (Nguyen et al. 2024), then one random number. All in doubles without libm, so the same seed
 * gives the same text on every machine. Tests: tests/14_sampler.c.
 * ============================================================================================ */

/* A candidate is a number whose order is that of preference, smallest first: the larger logit, -0
 * as 0, on a tie the lower id. */
static uint64_t candidate_of(float logit, size_t id) {
    return (uint64_t)fall_bits(float_bits(logit + 0.0f)) << 32 | id;
}

static float logit_of(uint64_t candidate) {
    return bits_float(fall_bits((uint32_t)(candidate >> 32)));
}

/* The ids of the K largest of N logits, best first, the lower id first of equal ones. Returns how
 * many there are: K, or N where that is less. */
MAYBE_UNUSED static size_t largest_logits(const float *logits, size_t n, size_t k, int32_t *ids) {
    size_t have = 0;
    for (size_t i = 0; i < n && k; i++) {
        if (have == k && !(logits[i] > logits[ids[k - 1]])) continue;
        size_t at = have < k ? have++ : k - 1;
        for (; at && logits[i] > logits[ids[at - 1]]; at--) ids[at] = ids[at - 1];
        ids[at] = (int32_t)i;
    }
    return have;
}

/* ln of the sum of exp of N logits, in an order and with functions that are the same everywhere. */
MAYBE_UNUSED static double log_sum(const float *logits, size_t n) {
    double sum = 0, most = (double)logits[0];
    for (size_t i = 1; i < n; i++) if ((double)logits[i] > most) most = (double)logits[i];
    for (size_t i = 0; i < n; i++) {
        double x = (double)logits[i] - most;
        if (x > -700) sum += exp_exact(x);
    }
    return most + ln_exact(sum);
}

/* splitmix64 (Steele, Lea and Flood 2014): a uniform number in [0, 1). */
static double random_uniform(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

/* What a temperature makes of a candidate's distance to the best one. */
static double weight_of(uint64_t candidate, uint64_t best, float temperature) {
    double x = ((double)logit_of(candidate) - (double)logit_of(best)) / (double)temperature;
    return x > -80 ? exp_exact(x) : 0;
}

/* The logits with the repeat penalty (Keskar et al. 2019) on every id of the history. */
static void list_candidates(uint64_t *list, const float *logits, size_t vocab, float penalty,
                            const int32_t *history, size_t n_history) {
    for (size_t i = 0; i < vocab; i++) list[i] = candidate_of(logits[i], i);
    if (penalty == 1) return;
    for (size_t i = 0; i < n_history; i++) {
        float l = logits[history[i]];
        list[history[i]] = candidate_of(l < 0 ? l * penalty : l / penalty, (size_t)history[i]);
    }
}

/* Takes the best candidate from the heap in LIST: it then stands behind the heap's new end, so that
 * those that were taken end the list, the best last. */
static uint64_t rank_next(uint64_t *list, size_t *left) {
    uint64_t top = heap_pop(list, left);
    return list[*left] = top;
}

/* Ranks the candidates that survive top-k, top-p and min-p. Returns how many there are, at least 1,
 * and the sum of their weights. Mostly a few of a large vocabulary are enough: so a heap. top-k,
 * which keeps the ties of the k-th, ranks its own first, as top-p is a share of their weights. */
static size_t select_candidates(uint64_t *list, size_t vocab, uint64_t best,
                                const medrun_sampling *s, double *sum) {
    size_t left = vocab, most = vocab, k = s->top_k > 0 ? (size_t)s->top_k : vocab, n = 0;
    double all = 0;
    for (size_t i = vocab / 2; i-- > 0;) heap_sink(list, vocab, i);
    if (k < vocab) {
        while (left && (vocab - left < k || logit_of(list[0]) == logit_of(list[left])))
            all += weight_of(rank_next(list, &left), best, s->temperature);
        most = vocab - left;
    } else if (s->top_p < 1)
        for (size_t i = 0; i < vocab; i++) all += weight_of(list[i], best, s->temperature);
    for (*sum = 0; n < most; n++) {
        if (n && s->top_p < 1 && *sum >= (double)s->top_p * all) break;
        if (n == vocab - left) rank_next(list, &left);
        double w = weight_of(list[vocab - 1 - n], best, s->temperature);
        if (n && (w == 0 || w < (double)s->min_p)) break;
        *sum += w;
    }
    return n;
}

/* Where the next token is chosen. LIST has room for VOCAB candidates. An id without text, as rows
 * that only fill a matrix up have it, is never chosen: TYPES are the pieces', or NULL. */
static int32_t sample_token(uint64_t *list, const float *logits, size_t vocab, const uint8_t *types,
                            const medrun_sampling *s, uint64_t *random, const int32_t *history,
                            size_t n_history) {
    list_candidates(list, logits, vocab, s->repeat_penalty, history, n_history);
    for (size_t i = 0; types && i < vocab; i++)
        if (types[i] == PIECE_UNUSED) list[i] = candidate_of(-INFINITY, i);
    uint64_t best = list[0];
    for (size_t i = 1; i < vocab; i++) if (list[i] < best) best = list[i];
    if (s->temperature <= 0) return (int32_t)(uint32_t)best;
    double sum, ticket;
    size_t n = select_candidates(list, vocab, best, s, &sum), i = 1;
    ticket = random_uniform(random) * sum;
    for (; i < n; i++) {
        ticket -= weight_of(list[vocab - i], best, s->temperature);
        if (ticket < 0) break;
    }
    return (int32_t)(uint32_t)list[vocab - i];
}
/* ============================================================================================
 * 15 Session: the bodies of the API
 *
 * A session is one timeline of tokens and what was computed of it. It lies in one arena, which one
 * function both measures and lays out, so its exact size is known before anything is allocated.
 * May use everything above. Tests: tests/15_session.c, 15_allocation.c, 15_embedding.c.
 * ============================================================================================ */

/* The error of a call: the caller's, or where that is NULL the body's OWN. It is clear at first, so
 * at the end it holds the first failure of this call. */
static medrun_error *fresh_error(medrun_error *callers, medrun_error *own) {
    medrun_error *e = callers ? callers : own;
    e->code = MEDRUN_OK;
    e->text[0] = 0;
    return e;
}

/* ---- models -------------------------------------------------------------------------------- */

/* Also closes what medrun_open had done when it failed. */
void medrun_close(medrun_model *m) {
    if (!m) return;
    if (m->pool && m->pool->threads) pool_stop(m->pool);
    device_close(m->device);
    buffer_free(&m->device_log);
    tokenizer_close(&m->tokenizer);
    file_close(&m->file);
    free(m->pool), free(m->system), free(m->rope_frequencies), free(m->layers), free(m->path);
    free(m);
}

/* The path is copied, as messages name it for as long as the model lives. */
int medrun_open(medrun_model **out, const char *path, const medrun_options *options,
                medrun_error *error) {
    medrun_error own, *e = fresh_error(error, &own);
    *out = NULL;
    if (!path) return fail(e, MEDRUN_USAGE, "medrun_open: no path");
    medrun_model *m = new_array(1, sizeof *m);
    if (!m) return out_of_memory(e, sizeof *m);
    m->path = new_array(strlen(path) + 1, 1);
    if (m->path) memcpy(m->path, path, strlen(path));
    else out_of_memory(e, strlen(path));
    if (!e->code && !load_model(m, options, e)) *out = m;
    else medrun_close(m);
    return e->code;
}

/* All strings belong to the model or are constants. */
void medrun_describe(const medrun_model *m, medrun_info *info) {
    const model_config *c = &m->config;
    *info = (medrun_info){
        .name = m->name, .architecture = m->architecture, .type = type_names[m->type],
        .chat_template = m->template_name, .kernels = m->kernels->name, .licence = m->licence,
        .system = m->own_chat.system ? m->own_chat.system : "", .notice = m->notice,
        .vocab_size = c->vocab_size, .hidden_size = c->hidden_size,
        .n_layers = c->n_layers, .n_heads = c->n_heads, .n_kv_heads = c->n_kv_heads,
        .head_dim = c->head_dim, .ffn_size = c->ffn_size, .max_positions = c->max_positions,
        .threads = m->pool->threads, .bos = m->tokenizer.bos, .n_stops = m->n_stops,
        .parameters = m->parameters, .file_bytes = m->file.map.n, .sampling = m->sampling,
        .weight_bytes = m->weight_bytes, .device = m->device ? m->device->says : "",
        .device_log = m->device_log.n ? (const char *)m->device_log.data : ""};
    memcpy(info->stops, m->stops, sizeof info->stops);
    memcpy(info->hash, m->file.hash, 32);
}

/* ---- starting and stopping ------------------------------------------------------------------ */

/* What a session has learned about guesses at its next tokens: see "guessing ahead" below. A match
 * is a place AT, before which LENGTH tokens are those that end the timeline (0: none). HITS are the
 * shares of matches of each length that came true, [0] that of a draft's guesses. Times are
 * in seconds, 0 while not known: a pass of one row takes ONCE, each row MORE takes so much more, a
 * draft's guess EACH, a row in the last WIDE pass so much. A draft may take its BUDGET. */
enum { MAX_LOOKUP = 31, MAX_DRAFT = 7, MAX_MATCH = 16, MAX_SEARCH = 32 };
typedef struct lookup {
    size_t at, length;
    double hits[MAX_MATCH + 1], once, more, each, wide, budget;
    bool drafted;                               /* the guesses that wait are a draft's          */
    uint64_t guessed, right;
} lookup;

/* One timeline, and what was computed of it. The first n_done tokens are in the cache, those behind
 * them are pending. Logits are those of the last rows of the last pass, and count while no token is
 * pending. A session that guesses keeps more rows: one behind each guess. */
struct medrun_session {
    const medrun_model *model;
    thread_pool *pool;                          /* the model's; a draft's: of whom it serves    */
    medrun_session_options options;             /* zeros replaced by what they stand for        */
    size_t bytes;                               /* of the arena that this struct begins         */
    bool owns_memory;
    int32_t *tokens;                            /* (context) the timeline                       */
    size_t n_tokens, n_done;                    /* its length; how many have been processed     */
    kv_cache cache;                             /* of the first n_done tokens                   */
    float *logits;                              /* (most rows, vocab rounded up to 16)          */
    size_t n_wanted;                            /* rows of logits that a pass is to give        */
    size_t n_logits;                            /* rows the last pass gave; 0 while pending     */
    size_t n_ready;                             /* rows medrun_next has still to use: that of the
                                                   last token and those of guesses behind it    */
    lookup lookup;                              /* what guesses, with the option lookup         */
    medrun_session *draft;                      /* or this, with the option draft               */
    size_t draft_from;                          /* its timeline: our first token, and those
                                                   behind this place                            */
    uint64_t random;
    bool answer_open;                           /* the last turn is an answer nobody closed     */
    bool starting;                              /* medrun_next has not given text since a feed  */
    uint64_t *candidates;                       /* (vocab_size) for the sampler                 */
    char *text;                                 /* bytes that are not yet whole characters, and */
    size_t n_text;                              /* those of the next piece behind them          */
    watcher watcher;
    pass pass;                                  /* scratch for passes that this session leads   */
};

/* Lays out the arrays of S, whose model and options are set, in the arena, and behind them those of
 * its draft, which always guesses what it thinks likeliest. */
static void layout_session(medrun_session *s, arena *a) {
    const model_config *c = &s->model->config;
    const medrun_session_options *o = &s->options;
    size_t vocab = (size_t)c->vocab_size;
    int guesses = o->draft && o->lookup < MAX_DRAFT ? MAX_DRAFT : o->lookup;
    int rows = o->logit_rows > guesses ? o->logit_rows : guesses + 1;
    s->tokens = arena_take(a, (size_t)o->context, sizeof *s->tokens);
    layout_cache(&s->cache, c, o->context, o->kv, a);
    s->logits = arena_take(a, (uint64_t)rows, round_up(vocab, LANES) * sizeof(float));
    s->candidates = arena_take(a, vocab, sizeof *s->candidates);
    s->text = arena_take(a, s->model->longest_piece + 8, 1);
    layout_pass(&s->pass, s->model, s->pool, o->batch, o->context, o->strict, a);
    if (!o->draft) return;
    medrun_session draft = {.model = o->draft, .pool = s->pool, .options = *o, .n_wanted = 1};
    draft.options.draft = NULL;
    draft.options.lookup = 0, draft.options.logit_rows = 1, draft.options.strict = false;
    draft.options.sampling.temperature = 0;
    if (draft.options.context > o->draft->config.max_positions)
        draft.options.context = o->draft->config.max_positions;
    s->draft = arena_take(a, 1, sizeof draft);
    layout_session(&draft, a);
    draft.pass.eng.device = NULL;               /* it serves the threads of its own model        */
    if (s->draft) *s->draft = draft;
}

/* Replaces zeros by what they stand for and checks ranges. A caller's sizes are wishes: what the
 * context or the batch cannot use is cut down, as logits do not depend on it. What would change an
 * answer, such as a sampling number, is refused where it is out of range. */
static int resolve_options(const medrun_model *m, const medrun_session_options *from,
                           medrun_session_options *o, medrun_error *e) {
    *o = from ? *from : (medrun_session_options){0};
    int most = m->config.max_positions;
    if (o->context < 0 || o->context > most)
        return fail(e, MEDRUN_USAGE, "context: found %d, wanted 1 to %d, the longest this model "
                    "was made for", o->context, most);
    if (o->batch < 0 || o->logit_rows < 0 || o->kv < 0 || o->kv > MEDRUN_KV_INT8)
        return fail(e, MEDRUN_USAGE, "session: batch %d, logit_rows %d, kv %d: out of range",
                    o->batch, o->logit_rows, o->kv);
    if (o->lookup < 0 || o->lookup > MAX_LOOKUP)
        return fail(e, MEDRUN_USAGE, "lookup: found %d, wanted 0 to %d tokens", o->lookup,
                    MAX_LOOKUP);
    if (o->draft && memcmp(o->draft->vocabulary, m->vocabulary, sizeof m->vocabulary))
        return fail(e, MEDRUN_USAGE, "draft: %s has another vocabulary than %s", o->draft->path,
                    m->path);
    if (!o->context) o->context = most;
    if (!o->batch) o->batch = 512;
    if (o->batch > o->context) o->batch = o->context;
    if (!o->logit_rows) o->logit_rows = 1;
    if (o->logit_rows > o->batch) o->logit_rows = o->batch;
    if (o->lookup >= o->batch) o->lookup = o->batch - 1;
    uint64_t seed = o->sampling.seed;
    if (!o->custom_sampling) o->sampling = m->sampling;
    o->sampling.seed = seed;
    if (m->device && m->type == TYPE_BF16) o->strict = true;
    const medrun_sampling *s = &o->sampling;
    if (!(s->temperature >= 0 && s->temperature <= 100) || s->top_k < 0 ||
        !(s->top_p >= 0 && s->top_p <= 1) || !(s->min_p >= 0 && s->min_p <= 1) ||
        !(s->repeat_penalty >= 0.01f && s->repeat_penalty <= 100))
        return fail(e, MEDRUN_USAGE, "sampling: temperature %g, top_k %d, top_p %g, min_p %g, "
                    "repeat_penalty %g: out of range", (double)s->temperature, s->top_k,
                    (double)s->top_p, (double)s->min_p, (double)s->repeat_penalty);
    return MEDRUN_OK;
}

/* Makes in S a session with these options that has no memory yet. Returns the bytes it needs, its
 * own among them, in 64 bits, as they may be more than a pointer reaches; 0 after a failure. */
static uint64_t plan_session(medrun_session *s, const medrun_model *model,
                             const medrun_session_options *options, medrun_error *e) {
    *s = (medrun_session){.model = model, .pool = model->pool};
    if (resolve_options(model, options, &s->options, e)) return 0;
    s->random = s->options.sampling.seed;
    s->n_wanted = (size_t)s->options.logit_rows;
    s->lookup.hits[0] = 0.75;                   /* until learning corrects that                 */
    for (int i = 1; i <= MAX_MATCH; i++) s->lookup.hits[i] = 1 - 1.8 / (i + 1);
    arena counts = {NULL, round_up(sizeof *s, 64)};
    layout_session(s, &counts);
    return counts.at;
}

/* In 64 bits on every machine: `show` says what a session needs even where it cannot have that. */
static uint64_t session_needs(const medrun_model *model, const medrun_session_options *options) {
    return plan_session(&(medrun_session){0}, model, options, &(medrun_error){0});
}

/* On 32 bits more may be needed than a pointer reaches, which nobody can have: SIZE_MAX says so. */
size_t medrun_session_bytes(const medrun_model *model, const medrun_session_options *options) {
    uint64_t need = session_needs(model, options);
    return need > SIZE_MAX ? SIZE_MAX : (size_t)need;
}

/* Memory is refused by the machine's total and not by what is free: pages are taken as they are
 * touched, and a long context may never fill. The plan is copied into the memory and laid out there
 * once more, as its arrays have no places yet. */
int medrun_start(medrun_session **out, const medrun_model *model,
                 const medrun_session_options *options, void *memory, size_t bytes,
                 medrun_error *error) {
    medrun_error own, *e = fresh_error(error, &own);
    medrun_session plan;
    uint64_t need = plan_session(&plan, model, options, e);
    *out = NULL;
    if (e->code) return e->code;
    if (memory && (bytes < need || (uintptr_t)memory % 64))
        return fail(e, MEDRUN_USAGE, "session memory: found %zu bytes at %p, wanted %llu, 64-byte "
                    "aligned", bytes, memory, (unsigned long long)need);
    uint64_t total = memory ? need : (uint64_t)limits_of_machine().memory;
    if (need > total)
        return fail(e, MEDRUN_NO_MEMORY, "a context of %d tokens needs %llu MB, this machine has "
                    "%llu MB; ask for a smaller one (-c)", plan.options.context,
                    (unsigned long long)need >> 20, (unsigned long long)total >> 20);
    medrun_session *s = memory ? memory : need > SIZE_MAX ? NULL : map_bytes(-1, (size_t)need);
    if (!s) return fail(e, MEDRUN_NO_MEMORY, "a context of %d tokens needs %llu MB, which were not "
                        "to be had; ask for a smaller one (-c)", plan.options.context,
                        (unsigned long long)need >> 20);
    *s = plan;
    s->bytes = (size_t)need;
    s->owns_memory = !memory;
    layout_session(s, &(arena){(uint8_t *)s, round_up(sizeof *s, 64)});
    *out = s;
    return MEDRUN_OK;
}

/* The session's struct lies at the beginning of its own memory, so after this not even its fields
 * may be read. */
void medrun_stop(medrun_session *s) {
    if (s && s->owns_memory) unmap_bytes(s, s->bytes);
}

/* ---- the timeline -------------------------------------------------------------------------- */

/* After a pass with guesses n_ready rows of logits wait for medrun_next. They are good for nothing
 * once the timeline goes on in another way. */
static void drop_guesses(medrun_session *s) {
    s->n_ready = 0;
    s->lookup.length = 0;
}

void medrun_guesses(const medrun_session *s, uint64_t *guessed, uint64_t *right) {
    *guessed = s->lookup.guessed;
    *right = s->lookup.right;
}

/* An id past the vocabulary would read past the embedding. */
static int check_ids(const medrun_model *m, const int32_t *ids, size_t n, medrun_error *e) {
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= m->config.vocab_size)
            return fail(e, MEDRUN_USAGE, "token id %d: wanted 0 to %d", ids[i],
                        m->config.vocab_size - 1);
    return MEDRUN_OK;
}

/* May N ids stand on the timeline from position AT on? */
static int check_fit(const medrun_session *s, size_t at, const int32_t *ids, size_t n,
                     medrun_error *e) {
    size_t context = (size_t)s->options.context;
    if (n > context - at)
        return fail(e, MEDRUN_TOO_LONG, "%zu tokens after %zu do not fit the context of %zu", n,
                    at, context);
    return check_ids(s->model, ids, n, e);
}

/* All of the ids or none. */
static int append_ids(medrun_session *s, const int32_t *ids, size_t n, medrun_error *e) {
    if (check_fit(s, s->n_tokens, ids, n, e)) return e->code;
    if (n) memmove(s->tokens + s->n_tokens, ids, n * sizeof *ids);      /* perhaps its own       */
    s->n_tokens += n;
    s->starting = true;
    return MEDRUN_OK;
}

/* What was guessed is wrong as soon as the caller says what comes. */
int medrun_feed(medrun_session *s, const int32_t *ids, size_t n, medrun_error *error) {
    medrun_error own, *e = fresh_error(error, &own);
    drop_guesses(s);
    return append_ids(s, ids, n, e);
}

/* Forgets all but the first N tokens. The cache keeps what it has: positions past n_done are
 * written anew before they are read. The last token is processed again, for its logits. */
static void rewind_to(medrun_session *s, size_t n) {
    drop_guesses(s);
    s->n_tokens = n;
    s->n_logits = 0;
    s->n_text = 0;
    s->answer_open = false;
    s->starting = true;
    if (s->n_done >= n) s->n_done = n ? n - 1 : 0;
}

/* The caller's N is checked here, for rewind_to serves calls that know theirs is right. */
int medrun_rewind(medrun_session *s, size_t n, medrun_error *error) {
    medrun_error own, *e = fresh_error(error, &own);
    if (n > s->n_tokens)
        return fail(e, MEDRUN_USAGE, "rewind to %zu of %zu tokens", n, s->n_tokens);
    rewind_to(s, n);
    return MEDRUN_OK;
}

size_t medrun_pending(const medrun_session *s) { return s->n_tokens - s->n_done; }
size_t medrun_length(const medrun_session *s) { return s->n_tokens; }
const int32_t *medrun_tokens(const medrun_session *s) { return s->tokens; }

/* Rows count from the end, because callers want the newest. */
const float *medrun_logits(const medrun_session *s, size_t row) {
    if (medrun_pending(s) || row >= s->n_logits) return NULL;
    return s->logits + (s->n_logits - 1 - row) * s->pass.vocab;
}

/* Passes with guesses show rows that are not in the timeline, so an observer ends them. */
void medrun_observe(medrun_session *s, medrun_observer *observer, void *user) {
    s->watcher.see = observer;
    s->watcher.see_user = user;
    s->n_ready = 0;
}

void medrun_edit(medrun_session *s, medrun_editor *editor, void *user) {
    s->watcher.edit = editor;
    s->watcher.edit_user = user;
    s->n_ready = 0;
}

/* Guessed rows are wrong for whoever takes each row for a part of the timeline. */
static bool is_watched(const medrun_session *s) { return s->watcher.see || s->watcher.edit; }

/* ---- turns --------------------------------------------------------------------------------- */

/* There are a few at most, so a walk beats any table. */
bool medrun_is_stop(const medrun_model *m, int32_t id) {
    for (int i = 0; i < m->n_stops; i++) if (m->stops[i] == id) return true;
    return false;
}

/* A template that the caller names in place of an unknown one brings its own stop ids. */
static void add_stops(medrun_model *m, const chat_template *c) {
    for (size_t i = 0; i < sizeof c->stops / sizeof *c->stops; i++) {
        int32_t id = chat_token(&m->tokenizer, c->stops[i]);
        if (id >= 0 && !medrun_is_stop(m, id) && m->n_stops < MEDRUN_MAX_STOPS)
            m->stops[m->n_stops++] = id;
    }
}

/* A guessed template would give wrong answers that look right, so an unknown one is an error. */
static int check_template(const chat_template *c, medrun_error *e) {
    return c ? MEDRUN_OK : fail(e, MEDRUN_USAGE, "this checkpoint's chat template is unknown to "
                                "medrun: name the right one with --template ("
                                MEDRUN_TEMPLATES ")");
}

/* How a conversation is written. medrun_say takes all this from the session and the checkpoint, the
 * chat command from its options. */
typedef struct {
    const chat_template *chat;
    const medrun_chat_options *options;
    const medrun_message *system;       /* NULL: what the template says by itself               */
    bool apart;                         /* the opening is a turn of its own, before the first   */
} conversation;

/* What one more turn does to a timeline. Rendering is apart from feeding because a chat must count
 * first: where turns do not fit, it drops the oldest. */
typedef struct {
    size_t keep;                        /* tokens that stay: all, or all but the stop token that
                                           ended the answer, where the template closes it       */
    size_t n_close, n_open;             /* of IDS, those that close the answer before, or open
                                           the conversation                                     */
    buffer ids;                         /* int32_t: that, the turn and, after a user's, the
                                           opening of the answer. The caller frees it           */
} new_turn;

/* Renders what is SAID next, and leaves the session as it is. The model ends its answer by a stop
 * token, but the next turn must follow what the template writes after an answer: llama3 writes
 * <|eot_id|> itself. The end of a tool call is a part of the answer. */
static int render_turn(const medrun_session *s, const conversation *how, const medrun_message *said,
                       new_turn *t, medrun_error *e) {
    const medrun_model *m = s->model;
    chat_writer w = {how->chat, &m->tokenizer, how->options, .out = &t->ids, .e = e};
    bool first = !s->n_tokens;
    *t = (new_turn){.keep = s->n_tokens};
    if (s->answer_open) {
        int32_t last = s->tokens[t->keep - 1];
        if (medrun_is_stop(m, last) && !chat_keeps(how->chat, &m->tokenizer, last)) t->keep--;
        chat_close(&w);
        t->n_close = t->ids.n / sizeof(int32_t);
    }
    if (first && how->apart) {
        chat_turn(&w, how->system, true, false);
        t->n_open = t->ids.n / sizeof(int32_t);
    }
    return chat_turn(&w, said, first && !how->apart, !strcmp(said->role, "user"));
}

/* Renders first, checks what fits, and changes the timeline last: a turn that cannot be said leaves
 * everything as it was. */
int medrun_say(medrun_session *s, const char *role, const char *text, size_t n_bytes,
               medrun_error *error) {
    medrun_error own, *e = fresh_error(error, &own);
    const medrun_model *m = s->model;
    new_turn t;
    if (!role) return fail(e, MEDRUN_USAGE, "say: found no role, wanted system, user or assistant");
    if (check_template(m->chat, e)) return e->code;
    const medrun_message said = {role, text, n_bytes};
    conversation how = {m->chat, &s->options.chat, NULL, false};
    render_turn(s, &how, &said, &t, e);
    const int32_t *ids = (const int32_t *)(void *)t.ids.data;
    size_t n = t.ids.n / sizeof *ids;
    if (!e->code && !check_fit(s, t.keep, ids, n, e)) {
        drop_guesses(s);
        if (t.keep < s->n_tokens) rewind_to(s, t.keep);
        append_ids(s, ids, n, e);
        s->answer_open = !strcmp(role, "user");
    }
    return buffer_free(&t.ids), e->code;
}

/* ---- steps --------------------------------------------------------------------------------- */

/* Puts what is pending in S into the pass, as far as there is room: each token becomes a row.
 * A long prompt takes several steps, and the last of them gives its logits. */
static void add_segment(pass *p, medrun_session *s) {
    size_t n = medrun_pending(s), room = p->capacity - p->n, wanted = s->n_wanted;
    if (!n || !room) return;
    if (wanted > n) wanted = n;
    if (n > room) {
        n = room;
        wanted = 0;                             /* the last token waits for another pass        */
    }
    segment *to = &p->segments[p->n_segments++];
    *to = (segment){.ids = s->tokens + s->n_done, .first = p->n, .n = n, .position = s->n_done,
                    .cache = &s->cache, .n_wanted = wanted, .logits = s->logits,
                    .watcher = s->watcher};
    p->n_kept += is_watched(s) ? p->capacity : wanted;  /* who watches sees all rows             */
    while (n--) p->owner[p->n++] = to;
}

/* Sessions may share a pass, in which the weights are read once for all of them, only if the same
 * kernels serve their rows. One that stood twice would write two rows to one place. */
static int check_company(medrun_session *const *sessions, size_t n, medrun_error *e) {
    const medrun_session *lead = sessions[0];
    for (size_t i = 0; i < n; i++) {
        const medrun_session *s = sessions[i];
        if (s->model != lead->model || s->options.strict != lead->options.strict ||
            s->options.kv != lead->options.kv)
            return fail(e, MEDRUN_USAGE, "step: session %zu differs from the first in model, "
                        "strict or kv", i);
        for (size_t k = 0; k < i; k++)
            if (sessions[k] == s) return fail(e, MEDRUN_USAGE, "step: session %zu stands twice", i);
    }
    return MEDRUN_OK;
}

/* The pass is the scratch of the first session, whose batch is therefore the limit. The pool serves
 * one pass at a time: steps of other threads wait for their turn. */
int medrun_step(medrun_session *const *sessions, size_t n, medrun_error *error) {
    medrun_error own, *e = fresh_error(error, &own);
    if (!n) return MEDRUN_OK;
    if (check_machine(e)) return e->code;
    if (check_company(sessions, n, e)) return e->code;
    pass *p = &sessions[0]->pass;
    if (pthread_mutex_lock(&sessions[0]->pool->turn))
        return fail(e, MEDRUN_USAGE, "step: an observer called it while its pass was running");
    double start = seconds();
    p->n = p->n_kept = p->n_segments = 0;
    for (size_t i = 0; i < n; i++) {
        sessions[i]->n_ready = 0;
        add_segment(p, sessions[i]);
    }
    size_t rows = p->n;
    if (rows) forward(p);
    bool stopped = atomic_exchange(&p->stop, false);
    if (rows && !stopped) output(p);
    for (size_t i = 0, k = 0; !stopped && i < n && k < p->n_segments; i++)  /* all that pend,   */
        if (medrun_pending(sessions[i])) {                      /* until the pass was full      */
            sessions[i]->n_done = p->segments[k].position + p->segments[k].n;
            sessions[i]->n_logits = p->segments[k++].n;
        }
    pthread_mutex_unlock(&sessions[0]->pool->turn);
    lookup *look = &sessions[0]->lookup;
    double time = seconds() - start;
    look->budget += time / (rows > TILE ? 64 : 128);
    if (rows > TILE) look->wide = time / (double)rows;
    return stopped ? fail(e, MEDRUN_INTERRUPTED, "step: interrupted") : MEDRUN_OK;
}

/* A signal handler may touch no more than this one atomic number; `forward` reads it before
 * each layer. */
void medrun_interrupt(medrun_session *s) { s->pass.stop = true; }

/* Chooses an id from one row of logits. Each choice by chance takes one random number, which is why
 * the random state is saved with a session. */
static int32_t sample_row(medrun_session *s, const float *logits) {
    const tokenizer *t = &s->model->tokenizer;
    return sample_token(s->candidates, logits, (size_t)t->vocab_size,
                        t->has_unused ? t->piece_type : NULL, &s->options.sampling, &s->random,
                        s->tokens, s->n_tokens);
}

/* While tokens are pending, the logits there are those of an older end of the timeline. */
int medrun_sample(medrun_session *s, int32_t *id, medrun_error *error) {
    medrun_error own, *e = fresh_error(error, &own);
    const float *logits = medrun_logits(s, 0);
    if (!logits) return fail(e, MEDRUN_USAGE, "sample: tokens are pending, call medrun_step first");
    *id = sample_row(s, logits);
    return MEDRUN_OK;
}

/* ---- guessing ahead ------------------------------------------------------------------------ */

/* Prompt lookup (Saxena 2023): what stood behind the last tokens when they occurred before is a
 * good guess of what comes now, above all in summaries and quotations. Where no such match pays, a
 * small model of the same vocabulary may guess (a draft: Leviathan et al. 2023). Guesses are
 * processed in one pass with the last token, which takes little longer than a pass for one, and
 * those that come true are kept: each is still chosen from its own logits, so the text is the one
 * without guesses.
 *
 * A draft takes time of its own, so it has a budget: the time of two passes, a 64th of that of
 * prompts, half as much of that of answers, and what its guesses have saved. It spends no more than
 * it has, so a bad one costs less than 3 % of an answer of 100 tokens. */

/* Finds the place with the longest match; of equal ones it takes the latest. A place counts if its
 * last token is the timeline's. It compares the MAX_SEARCH latest of them only, so that a long text
 * full of one word costs no more. An index of places would save little: to walk through 100,000
 * tokens takes a tenth of a millisecond, and a pass over so many keys a hundred times that. A match
 * that was right last time stays unless there is a longer one. */
static void find_match(lookup *look, const int32_t *tokens, size_t n) {
    int found = 0;
    for (size_t at = n - 1; at && found < MAX_SEARCH && look->length < MAX_MATCH; at--) {
        size_t length = 0, most = at < MAX_MATCH ? at : MAX_MATCH;
        while (length < most && tokens[at - 1 - length] == tokens[n - 1 - length]) length++;
        found += length > 0;
        if (length > look->length) {
            look->length = length;
            look->at = at;
        }
    }
}

/* An average, in which what was FOUND last counts one part in SHARE. */
static void learn(double *known, double found, double share) {
    *known += (found - *known) / share;
}

/* How many guesses, at most MOST, give the most tokens a second, where each takes COST seconds: one
 * more pays while it adds to them a larger share than to the time. A guess comes if all before it
 * do. LENGTH is that of the match, 0 for a draft. */
static size_t worth_guessing(const lookup *look, size_t length, double cost, size_t most) {
    double tokens = 1, chance = 1, time = look->once;
    size_t n = 0;
    for (; n < most && time > 0; n++, tokens += chance, time += cost) {
        chance *= look->hits[length];
        if (chance * time <= 1.05 * cost * tokens) break;       /* times are good for 5 %        */
        length += length > 0 && length < MAX_MATCH;
    }
    return n;
}

/* Gives the draft the timeline behind which it is to guess K tokens: its first token and the last
 * ones. It keeps what it has of that, and begins anew where that would cost more than the PAID
 * tokens, or these are four times what it sees. False: there is not enough to guess from. */
static bool draft_follows(medrun_session *s, size_t k, size_t paid, medrun_error *e) {
    medrun_session *d = s->draft;
    size_t n = s->n_tokens, room = (size_t)d->options.context - k, from = s->draft_from, same = 0;
    while (same < d->n_tokens && from + same < n &&
           d->tokens[same] == s->tokens[same ? from + same : 0]) same++;
    if (from >= n || n - from > room || n - from - same > paid + TILE ||
        (from && paid / 4 > n - from)) {
        if (n > room) room /= 2;                /* else it would begin anew for each guess       */
        if (paid < room) room = paid;
        from = s->draft_from = n > room ? n - room : 0, same = 0;
        if (from && room < 16) return false;
    }
    rewind_to(d, same);
    if (!same) append_ids(d, s->tokens, 1, e), same = 1;
    return !append_ids(d, s->tokens + from + same, n - from - same, e);
}

/* Puts the draft's guesses, at most MOST, behind the timeline, and learns what they cost. Where
 * they do not seem to pay it asks now and then for one, as the text may have become easier. */
static size_t draft_ahead(medrun_session *s, size_t most, medrun_error *e) {
    medrun_session *d = s->draft;
    lookup *look = &s->lookup;
    double start = seconds(), cost = look->each + look->more;
    size_t n = s->n_tokens, k = 0, guesses = worth_guessing(look, 0, cost, most);
    if (!guesses && n % 16 == 0 && most) guesses = 1;
    while (guesses && cost * (double)guesses > look->budget) guesses--;
    if (!guesses) return 0;
    double row = d->lookup.wide > 0 ? d->lookup.wide : look->each;
    double paid = (look->budget - cost * (double)guesses) / row;
    if (!draft_follows(s, guesses, paid < 1e9 ? (size_t)paid : (size_t)1e9, e)) return 0;
    size_t before = medrun_pending(d);
    for (int32_t *id = s->tokens + n; k < guesses; k++, id++) {
        if (k && append_ids(d, id - 1, 1, e)) break;
        while (!e->code && medrun_pending(d)) medrun_step(&d, 1, e);
        if (e->code || medrun_sample(d, id, e) || medrun_is_stop(s->model, *id)) break;
    }
    double time = seconds() - start;
    if (k && before <= TILE) learn(&look->each, time / (double)k, 4);
    look->budget -= time;
    look->drafted = k > 0;
    return k;
}

/* Learns from a pass with K guesses. A faster one is believed at once, a slower one by and by:
 * other programs may have been in the way. Until it is known, a row more takes an eighth of a
 * pass. While nothing is guessed that falls, so that one bad pass does not rule for ever. */
static void learn_cost(medrun_session *s, size_t k, double time) {
    lookup *look = &s->lookup;
    double more = time - look->once, row = k && more > 0 ? more / (double)k : 0;
    if (look->drafted) look->budget -= more;
    if (k) learn(&look->more, row, row > look->more && look->guessed ? 4 : 1);
    else if (look->once > 0) {
        learn(&look->once, time, more > 0 ? 4 : 1);
        look->more *= 0.99;
    } else {
        look->once = time;
        look->more = time / 8;
        if (!s->draft) return;
        look->each = time * (double)s->draft->model->weight_bytes / (double)s->model->weight_bytes;
        look->budget += 2 * time;
    }
}

/* One pass for the last token, the only one pending, and for what is guessed to come behind it. The
 * guesses stand past the end of the timeline, at s->tokens[n_tokens] and on; the pass is made to
 * believe that they belong to it. Nothing is worth guessing behind a guessed stop. */
static int step_ahead(medrun_session *s, medrun_error *e) {
    lookup *look = &s->lookup;
    const medrun_session_options *o = &s->options;
    size_t n = s->n_tokens, most = (size_t)o->context - n, guesses = 0, k = 0;
    if (most >= (size_t)o->batch) most = (size_t)o->batch - 1;
    if (is_watched(s) || look->once <= 0) most = 0;
    find_match(look, s->tokens, n);
    if (look->length) guesses = worth_guessing(look, look->length, look->more, most);
    if (guesses > (size_t)o->lookup) guesses = (size_t)o->lookup;
    for (; k < guesses && !medrun_is_stop(s->model, s->tokens[look->at + k]); k++)
        s->tokens[n + k] = s->tokens[look->at + k];     /* may read what it just wrote           */
    look->drafted = false;
    if (!k && s->draft) k = draft_ahead(s, most < MAX_DRAFT ? most : MAX_DRAFT, e);
    if (e->code) return e->code;
    s->n_tokens = n + k;
    s->n_wanted = k + 1;
    double start = seconds();
    medrun_step(&s, 1, e);
    s->n_tokens = n;
    s->n_wanted = (size_t)o->logit_rows;
    if (e->code) return e->code;
    learn_cost(s, k, seconds() - start);
    s->n_done = n;
    s->n_ready = k + 1;
    look->guessed += k;
    return MEDRUN_OK;
}

/* Brings the timeline's end to its logits, chooses the next id from them as without guesses, and
 * appends it. If it is the guess, its own logits stand in the row behind, and a pass is saved. What
 * a match foretold is compared with it whether it was guessed or not, so that learning is free. */
static int next_id(medrun_session *s, int32_t *id, medrun_error *e) {
    lookup *look = &s->lookup;
    if (s->n_ready) s->n_done = s->n_tokens;            /* guessed, and so in the cache          */
    while (!e->code && medrun_pending(s)) {
        bool guesses = s->options.lookup || s->draft;
        if (guesses && medrun_pending(s) == 1) step_ahead(s, e);
        else medrun_step(&s, 1, e);
    }
    if (e->code) return e->code;
    if (!s->n_ready && medrun_sample(s, id, e)) return e->code;
    if (s->n_ready) *id = sample_row(s, s->logits + (s->n_logits - s->n_ready) * s->pass.vocab);
    bool right = s->n_ready > 1 && s->tokens[s->n_tokens] == *id;
    if (s->n_ready > 1 && look->drafted) learn(&look->hits[0], right, 16);
    if (right && look->drafted) look->budget += look->once;
    look->right += right;
    s->n_ready = right ? s->n_ready - 1 : 0;
    if (append_ids(s, id, 1, e) || !look->length) return e->code;
    right = *id == s->tokens[look->at++];
    learn(&look->hits[look->length], right, 16);
    look->length = !right ? 0 : look->length < MAX_MATCH ? look->length + 1 : MAX_MATCH;
    return MEDRUN_OK;
}

/* A character may have its bytes in several tokens: s->text keeps those of an unfinished one for
 * the next call. A stop ends the answer, and so what is kept. */
int medrun_next(medrun_session *s, int32_t *id, const char **text, size_t *n_bytes,
                medrun_error *error) {
    medrun_error own, *e = fresh_error(error, &own);
    const medrun_model *m = s->model;
    size_t left = s->starting ? 0 : s->n_text, n = 0;           /* of this answer                */
    size_t unfinished = utf8_unfinished((const uint8_t *)s->text, left);
    bool first = s->starting;
    memmove(s->text, s->text + s->n_text - unfinished, unfinished);
    s->n_text = unfinished;
    *text = s->text;
    *n_bytes = 0;
    if (next_id(s, id, e)) return e->code;
    const char *piece = tokenizer_text(&m->tokenizer, *id, false, &first, &n);
    s->starting = first;
    if (medrun_is_stop(m, *id)) {
        *n_bytes = s->n_text;
        s->n_text = 0;
        return MEDRUN_OK;
    }
    memcpy(s->text + s->n_text, piece, n);
    s->n_text += n;
    *n_bytes = s->n_text - utf8_unfinished((const uint8_t *)s->text, s->n_text);
    return MEDRUN_OK;
}

/* ---- text and tokens ----------------------------------------------------------------------- */

/* Hands at most CAP of the items in B, each of SIZE bytes, to the caller, and frees B; *N is how
 * many there are. So a caller may ask twice: to learn the number, and to fetch. */
static int give(buffer *b, size_t size, void *out, size_t cap, size_t *n, medrun_error *e) {
    if (b->failed) out_of_memory(e, b->n);
    *n = e->code ? 0 : b->n / size;
    if (*n && cap) memcpy(out, b->data, (*n < cap ? *n : cap) * size);
    return buffer_free(b), e->code;
}

/* Flags beyond these two are the tokenizer's own, with which a caller could join texts wrongly. */
int medrun_tokenize(const medrun_model *m, const char *text, size_t n_bytes, int flags,
                    int32_t *ids, size_t cap, size_t *n, medrun_error *error) {
    medrun_error own, *e = fresh_error(error, &own);
    buffer b = {0};
    if (flags & ~(MEDRUN_ADD_BOS | MEDRUN_PARSE_SPECIAL))
        fail(e, MEDRUN_USAGE, "tokenize: flags: found %d, wanted MEDRUN_ADD_BOS, "
             "MEDRUN_PARSE_SPECIAL, both or 0", flags);
    else
        tokenizer_encode(&m->tokenizer, text, n_bytes, flags, &b, e);
    return give(&b, sizeof *ids, ids, cap, n, e);
}

/* Ids come from anywhere, and one past the vocabulary would read past its pieces. */
int medrun_detokenize(const medrun_model *m, const int32_t *ids, size_t n_ids, bool special,
                      char *bytes, size_t cap, size_t *n, medrun_error *error) {
    medrun_error own, *e = fresh_error(error, &own);
    buffer b = {0};
    if (!check_ids(m, ids, n_ids, e)) tokenizer_decode(&m->tokenizer, ids, n_ids, special, &b);
    return give(&b, 1, bytes, cap, n, e);
}

/* A name that is unknown and a checkpoint without a known template are two different errors: the
 * remedies differ. */
int medrun_render(const medrun_model *m, const char *name, const medrun_chat_options *options,
                  const medrun_message *messages, size_t n_messages, bool answer, int32_t *ids,
                  size_t cap, size_t *n, medrun_error *error) {
    medrun_error own, *e = fresh_error(error, &own);
    buffer b = {0};
    const chat_template *c = name ? chat_find(name) : m->chat;
    *n = 0;
    if (!c && !name) return check_template(c, e);
    if (!c)
        return fail(e, MEDRUN_USAGE, "template: found \"%s\", wanted %s", name, MEDRUN_TEMPLATES);
    chat_writer w = {c, &m->tokenizer, options, .out = &b, .e = e};
    chat_render(&w, messages, n_messages, answer);
    return give(&b, sizeof *ids, ids, cap, n, e);
}

/* ---- save and restore ---------------------------------------------------------------------- */

/* A file is a head, then the timeline in blocks of 16 tokens: their ids, zeros behind the last, and
 * where all 16 are processed, for each layer and key-value head the panel of keys and the panel of
 * values as they lie in a session. A sum follows each part. So the first tokens of a file are its
 * first bytes, and can be checked and used without the rest. Positions past the last whole block
 * have no panels: a session computes them again, with the same bits, and a panel on disk never
 * holds what was forgotten or only guessed. */
enum { STATE_BLOCK = 16 };

/* Grows when a change to medrun changes the bits of a cache: files from before are refused. */
enum { NUMBERS_VERSION = 2 };

/* As it stands in the file: there is no padding, and every machine here is little-endian. */
typedef struct {
    char mark[8];                   /* STATE_MARK; its last character is the format's version   */
    uint8_t hash[32];               /* of the checkpoint                                        */
    char numbers[24];               /* what the cache's bits depend on, see head_of             */
    char chat[32];                  /* the template's name                                      */
    uint32_t kv, strict;
    uint64_t n, done;               /* tokens; positions in the blocks                          */
    uint64_t random, open;          /* the sampler's state; is an answer open?                  */
} state_head;

#define STATE_MARK "MEDSESS4"
static const file_kind session_file = {"a saved session", "MEDSESS", true, false, 0};

/* Saving and reading walk over the same parts in the same order. A file is read back as it was, or
 * what begins like the ids that a session has is taken from it. */
enum { STATE_SAVE, STATE_RESTORE, STATE_TAKE };

typedef struct {
    FILE *f;
    int mode;
    bool failed;                    /* then nothing is moved any more                           */
    uint64_t sum;                   /* of all bytes so far                                      */
} state_io;

/* The SUM of what came before and of N bytes more, a multiple of 8. SHA-256 would take longer than
 * reading. It would not help against forgery: who writes the file writes the sum. Each step maps
 * sums one to one, so that no damage within a word goes unseen and no part can stand for
 * another. */
static uint64_t add_to_sum(uint64_t sum, const uint8_t *p, size_t n) {
    for (uint64_t word; n; p += 8, n -= 8) {
        memcpy(&word, p, 8);
        word ^= sum;
        sum = (word << 29 | word >> 35) * 0x9E3779B97F4A7C15;
    }
    return sum;
}

/* Moves N bytes between memory and the file, and adds them to the sum. */
static void walk_bytes(state_io *io, void *p, size_t n) {
    if (io->failed) return;
    size_t moved = io->mode == STATE_SAVE ? fwrite(p, 1, n, io->f) : fread(p, 1, n, io->f);
    io->failed = moved != n;
    if (!io->failed) io->sum = add_to_sum(io->sum, p, n);
}

/* Saving, the sum goes into the file; otherwise it must be what the file says. The sums behind it
 * leave it out. */
static void walk_sum(state_io *io) {
    uint64_t sum = io->sum, stored = sum;
    walk_bytes(io, &stored, sizeof stored);
    if (stored != sum) io->failed = true;
    io->sum = sum;
}

/* The blocks of N tokens, of which DONE are processed; taking, only those before the first that has
 * other ids than S. Returns how many positions had panels. */
static size_t walk_blocks(state_io *io, const medrun_session *s, size_t n, size_t done) {
    size_t panel = cache_panel(s->options.kv, (size_t)s->model->config.head_dim), at = 0;
    size_t heads = (size_t)s->model->config.n_layers * s->cache.heads;
    for (; at < n && !io->failed; at += STATE_BLOCK) {
        int32_t ids[STATE_BLOCK] = {0}, *own = s->tokens + at;
        size_t few = n - at < STATE_BLOCK ? n - at : STATE_BLOCK, bytes = few * sizeof *ids;
        if (io->mode == STATE_SAVE) memcpy(ids, own, bytes);
        walk_bytes(io, ids, sizeof ids);
        walk_sum(io);
        if (io->mode == STATE_TAKE && memcmp(ids, own, bytes)) break;
        if (check_ids(s->model, ids, few, NULL)) io->failed = true;
        else if (io->mode == STATE_RESTORE) memcpy(own, ids, bytes);
        if (at >= done) continue;
        for (size_t h = 0; h < heads; h++) {            /* of all layers, one behind the other   */
            size_t place = cache_place(&s->cache, 0, h) + at / STATE_BLOCK * panel;
            walk_bytes(io, s->cache.keys + place, panel);
            walk_bytes(io, s->cache.values + place, panel);
        }
        walk_sum(io);
    }
    return at < done ? at : done;
}

/* The head of what S would save now; restoring compares a file's head with it. int8, int4, and bf16
 * without the processor's bf16 dot product give the same bits everywhere; otherwise only the same
 * kernels go on where others stopped. */
static state_head head_of(const medrun_session *s) {
    const medrun_session_options *o = &s->options;
    const medrun_model *m = s->model;
    bool exact = pack_kind(&s->pass.eng, m->type) != PACK_BF16;
    state_head h = {.mark = STATE_MARK, .kv = (uint32_t)o->kv, .strict = o->strict,
                    .n = s->n_tokens, .done = s->n_done / STATE_BLOCK * STATE_BLOCK,
                    .random = s->random, .open = s->answer_open};
    memcpy(h.hash, m->file.hash, sizeof h.hash);
    snprintf(h.numbers, sizeof h.numbers, "%d %s", NUMBERS_VERSION,
             exact ? "exact" : m->kernels->name);
    snprintf(h.chat, sizeof h.chat, "%s", o->template_name ? o->template_name : m->template_name);
    return h;
}

/* FORCE: over any other file, too. A write that fails shows when the writer is done. */
static int save_session(const medrun_session *s, const char *path, bool force, medrun_error *e) {
    file_writer w;
    state_head h = head_of(s);
    if (writer_open(&w, path, &session_file, force, e)) return e->code;
    state_io io = {.f = w.f, .mode = STATE_SAVE};
    walk_bytes(&io, &h, sizeof h);
    walk_sum(&io);
    walk_blocks(&io, s, s->n_tokens, (size_t)h.done);
    return writer_done(&w, e);
}

/* What stands at PATH may be somebody's other file, so there is no force here. */
int medrun_save(const medrun_session *s, const char *path, medrun_error *error) {
    medrun_error own, *e = fresh_error(error, &own);
    return save_session(s, path, false, e);
}

/* The messages say what to do about it: a prefix of another cache type, template or machine is an
 * honest mistake, not damage. Checks a head H against the session's own and against the SIZE of the
 * file, which it must explain to the byte: so it can be believed before its sum is seen. WHOLE: all
 * of the file must fit the session. */
static int check_head(const medrun_session *s, const state_head *h, uint64_t size, bool whole,
                      const char *path, medrun_error *e) {
    const state_head own = head_of(s);
    uint64_t panel = cache_panel(s->options.kv, (size_t)s->model->config.head_dim);
    uint64_t panels = 2 * (uint64_t)s->model->config.n_layers * s->cache.heads * panel + 8;
    uint64_t ids = STATE_BLOCK * sizeof *s->tokens + 8;
    if (memcmp(h->mark, own.mark, sizeof own.mark))
        return bad_file(e, path, "not a session or prefix that this medrun can read; save it again "
                        "with this version");
    if (memcmp(h->hash, own.hash, sizeof own.hash))
        return bad_file(e, path, "was saved from another checkpoint");
    if (h->kv != own.kv || h->strict != own.strict)
        return bad_file(e, path, "was saved with --kv %s%s, this session has --kv %s%s",
                        h->kv < 3 ? kv_names[h->kv] : "?", h->strict ? " --strict" : "",
                        kv_names[own.kv], own.strict ? " --strict" : "");
    if (memcmp(h->numbers, own.numbers, sizeof own.numbers))
        return bad_file(e, path, "its numbers are \"%.24s\", here they are \"%s\" (version, "
                        "kernels); save it here, or use int8 or --strict", h->numbers, own.numbers);
    if (memcmp(h->chat, own.chat, sizeof own.chat))
        return bad_file(e, path, "was saved with the template %.32s, this session has %s", h->chat,
                        own.chat);
    if (h->n > size / 4 || h->done > h->n || h->done % STATE_BLOCK ||
        h->done / STATE_BLOCK > size / panels ||
        size != sizeof *h + 8 + (h->n + STATE_BLOCK - 1) / STATE_BLOCK * ids +
                h->done / STATE_BLOCK * panels)
        return bad_file(e, path, "is cut short or damaged");
    if (whole && h->n > (uint64_t)s->options.context)
        return fail(e, MEDRUN_TOO_LONG, "%s: %llu tokens do not fit the context of %d", path,
                    (unsigned long long)h->n, s->options.context);
    return MEDRUN_OK;
}

/* Reads a file into S as MODE says; after a failure the session is empty, for half a cache is worse
 * than none. It is opened without waiting, as a pipe would have us wait for its other end. */
static int read_state(medrun_session *s, int mode, const char *path, medrun_error *e) {
    file_facts there;
    state_head h = {0};
    state_io io = {.f = open_stream(path, TO_MAP), .mode = mode};
    bool whole = mode == STATE_RESTORE;
    if (!io.f || get_facts(NULL, fileno(io.f), &there))
        cannot(e, MEDRUN_BAD_FILE, path, "open");
    else if (!there.regular)
        bad_file(e, path, "is not a regular file");
    else {
        walk_bytes(&io, &h, sizeof h);
        check_head(s, &h, there.bytes, whole, path, e);
    }
    if (!e->code) {
        size_t n = whole ? (size_t)h.n : s->n_tokens / STATE_BLOCK * STATE_BLOCK, done = n;
        if (done > h.done) done = (size_t)h.done;
        walk_sum(&io);
        s->n_done = walk_blocks(&io, s, whole ? n : done, done);
        if (whole) {
            s->n_tokens = n;
            s->random = h.random;
            s->answer_open = h.open && n;
        }
        if (s->n_done && s->n_done == s->n_tokens) s->n_done--;         /* for its logits        */
        if (io.failed) bad_file(e, path, "is cut short or damaged");
    }
    if (io.f) fclose(io.f);
    if (e->code) rewind_to(s, 0);
    return e->code;
}

/* What the session had goes first: a file that is refused must not leave half of each. */
int medrun_restore(medrun_session *s, const char *path, medrun_error *error) {
    medrun_error own, *e = fresh_error(error, &own);
    rewind_to(s, 0);
    return read_state(s, STATE_RESTORE, path, e);
}

/* The ids are fed before the file is read: only what it shares with them is taken from it. */
int medrun_feed_saved(medrun_session *s, const int32_t *ids, size_t n, const char *path,
                      size_t *taken, medrun_error *error) {
    medrun_error own, *e = fresh_error(error, &own);
    *taken = 0;
    rewind_to(s, 0);
    if (append_ids(s, ids, n, e) || read_state(s, STATE_TAKE, path, e)) return e->code;
    *taken = s->n_done;
    return MEDRUN_OK;
}

/* ---- devices ------------------------------------------------------------------------------- */

/* As medrun_attach, with all that may be asked of a device. It gets the matrices in the order
 * of use, so that one with little memory has the first layers, and the output matrix only after
 * them. A layer without a gate has no rows there, and one matrix less. The log of an attempt
 * stays until the next one begins, for those who ask why it failed. */
static int attach_device(medrun_model *m, const device_request *r, int layers, medrun_error *e) {
    size_t most = (size_t)m->config.n_layers, each = m->layers[0].gate.rows ? 7 : 6, n = 0;
    size_t room = most * each + 1;
    engine eng = {.pool = m->pool, .k = m->kernels, .strict = true, .cache = second_cache()};
    medrun_error why = {0};
    if (m->device) return fail(e, MEDRUN_USAGE, "device: this model has one");
    if (!layers) return fail(e, MEDRUN_USAGE, "device: found 0 layers, wanted 1 or more, or -1");
    const tensor **all = new_array(room, sizeof *all);
    if (!all) return out_of_memory(e, room * sizeof *all);
    if (layers >= 0 && (size_t)layers < most) most = (size_t)layers;
    for (const model_layer *l = m->layers; l < m->layers + most; l++) {
        const tensor *const own[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
        for (size_t i = 0; i < 7; i++) if (own[i]->rows) all[n++] = own[i];
    }
    if (most == (size_t)m->config.n_layers) all[n++] = &m->output;
    buffer_free(&m->device_log);
    device *d = m->device = device_open(r, &eng, all, n, each, &m->device_log, &why);
    free(all);
    if (!d)
        return fail(e, why.code == MEDRUN_USAGE ? MEDRUN_USAGE : MEDRUN_NO_MEMORY, "%s", why.text);
    snprintf(d->says, sizeof d->says, "%s: %zu of %d layers%s, with the processor's bits", d->name,
             d->loaded / each, m->config.n_layers,
             d->loaded == n && n % each ? " and the logits" : "");
    return MEDRUN_OK;
}

int medrun_attach(medrun_model *m, const char *name, int layers, medrun_error *error) {
    medrun_error own, *e = fresh_error(error, &own);
    return attach_device(m, &(device_request){.name = name}, layers, e);
}
#if !defined MEDRUN_NO_MAIN || defined MEDRUN_COMMANDS
/* ============================================================================================
 * 16 Commands: what users type
 *
 * Only this section and the next one print and exit. One table of options gives parsing, ranges,
 * environment variables and help. A command is a function that works on a `command`. It writes its
 * steps one below the other: each does nothing after a failure (c->e), and main reports the first.
 * The answer goes to stdout, everything else to stderr. Tests: tests/16_commands.sh.
 *
 *     the line        run_line: set_option for what it names, then for the environment
 *     what is opened  open_model, or open_tokenizer where a tokenizer.bin is enough
 *     what is asked   choose_chat, then make_prompt: a text, a file, messages or ids become c->ids
 *     what is said    start_session, feed_prompt, print_reply
 * ============================================================================================ */

/* ---- options ------------------------------------------------------------------------------- */

enum { CHAT, RUN, SHOW, VERIFY, TOKENIZE, DETOKENIZE, RENDER, LOGITS, HELP, VERSION, N_COMMANDS };

#define ON(command) (1u << (command))
#define ON_ANSWER (ON(CHAT) | ON(RUN))
#define ON_MODEL (ON_ANSWER | ON(SHOW) | ON(VERIFY) | ON(LOGITS))
#define ON_FILE (ON(TOKENIZE) | ON(DETOKENIZE) | ON(RENDER))
#define ON_SESSION (ON_ANSWER | ON(LOGITS))
#define ON_TEXT (ON_ANSWER | ON(TOKENIZE) | ON(RENDER) | ON(LOGITS))
#define MAX_SEED 9007199254740991       /* 2^53 - 1: a double, and so JSON, can hold it           */
enum { MOST_CHOICES = 100 };            /* of --top                                               */

typedef enum { FLAG, WHOLE, REAL, TEXT, CHOICE } option_kind;

/* Each option can be set in the environment, too: --top-k by MEDRUN_TOP_K. Where two commands mean
 * different things by one name, one of them has a variable of another name. */
typedef struct {
    const char *name, *small;   /* --name, -small or NULL */
    const char *argument;       /* what help calls it; a CHOICE's words with | between */
    option_kind kind;
    unsigned on;                /* the commands that take it */
    const char *standard;       /* the default, as help shows it; a number is parsed from here */
    double min, max;            /* of a number */
    const char *also;           /* --names of other programs for it, | between them */
    const char *help;
    const char *variable;       /* NULL: as its name */
} option_row;

enum { MAX_OPTIONS = 64 };
struct command;

typedef struct {
    const char *name;
    int (*run)(struct command *c);
    const char *arguments, *help;
    const char *also;           /* other names for it, with | between them                     */
    int more;                   /* arguments beside model, prompt and options, at most          */
    bool no_model;              /* else the first argument is the model, unless -m names it     */
    bool exact_text;            /* a line end at the end of a text counts                       */
} command_row;

/* A command line is read for a program: medrun, or a tool that includes this file. */
typedef struct {
    const char *name, *about;
    const command_row *commands;                /* behind the last is one without a name        */
    const option_row *options;                  /* a row without a name is not an option        */
    int n_options;
    int unnamed;                                /* the command that needs no name, or -1        */
} program;

enum { O_MODEL, O_PROMPT, O_FILE, O_SYSTEM, O_PREDICT, O_TEMP, O_TOP_K, O_TOP_P, O_MIN_P, O_REPEAT,
       O_SEED, O_STOP, O_CTX, O_THREADS, O_BATCH, O_KV, O_OVERFLOW, O_LOOKUP, O_DRAFT, O_TEMPLATE,
       O_DATE, O_THINK, O_CHAT_BOS, O_RAW, O_TOP, O_STRICT, O_LOAD, O_MLOCK, O_DEVICE, O_GPU_LAYERS,
       O_SAVE_PREFIX, O_LOAD_PREFIX, O_BOS, O_SPECIAL, O_PIECES, O_MESSAGES, O_RENDER_IDS,
       O_NO_OPENING, O_IDS, O_ALL, O_OUT, O_FORCE, O_STATS, O_VERBOSE, O_QUIET, O_HELP, O_VERSION,
       N_OPTIONS };

static const option_row option_rows[N_OPTIONS] = {
    /* What goes into the model. */
    [O_MODEL] = {"model", "m", "FILE", TEXT, ON_MODEL | ON_FILE,
        .help = "the checkpoint; -m may be left out"},
    [O_PROMPT] = {"prompt", "p", "TEXT", TEXT, ON_TEXT,
        .help = "the text; -p may be left out behind the model"},
    [O_FILE] = {"file", "f", "FILE", TEXT, ON_TEXT,
        .help = "a file with the text (- is stdin); with -p: what the text is about"},
    [O_SYSTEM] = {"system", "sys", "TEXT", TEXT, ON_ANSWER | ON(RENDER), "the checkpoint's",
        .also = "system-prompt", .help = "what the model is told before the conversation"},
    /* How an answer is made: from its first token to its end. */
    [O_PREDICT] = {"predict", "n", "N", WHOLE, ON_ANSWER, "-1", -1, 1 << 24,
        "n-predict|max-tokens|max-new-tokens|num-predict",
        .help = "maximum tokens in an answer; -1: no limit"},
    [O_TEMP] = {"temp", NULL, "T", REAL, ON_ANSWER, "the card's", 0, 100, "temperature",
        .help = "temperature; 0: always the most likely token"},
    [O_TOP_K] = {"top-k", NULL, "K", WHOLE, ON_ANSWER, "the card's", 0, 1 << 24,
        .help = "choose from the K most likely tokens; 0: off"},
    [O_TOP_P] = {"top-p", NULL, "P", REAL, ON_ANSWER, "the card's", 0, 1,
        .help = "choose from the most likely that have probability P together; 1: off"},
    [O_MIN_P] = {"min-p", NULL, "P", REAL, ON_ANSWER, "the card's", 0, 1,
        .help = "leave out tokens less than P times as likely as the most likely; 0: off"},
    [O_REPEAT] = {"repeat-penalty", NULL, "R", REAL, ON_ANSWER, "the card's", 0.01, 100,
        "repetition-penalty", .help = "make tokens that occurred less likely; 1: off"},
    [O_SEED] = {"seed", "s", "N", WHOLE, ON_ANSWER, "-1", -1, MAX_SEED,
        .help = "seed of the random numbers; -1: a new one, which is printed"},
    [O_STOP] = {"stop", NULL, "TEXT", TEXT, ON_ANSWER, .also = "reverse-prompt",
        .help = "end the answer before this text; up to 8 of them"},
    /* The session: its size and its speed. Of these only --kv changes a logit. */
    [O_CTX] = {"ctx", "c", "N", WHOLE, ON_ANSWER | ON(SHOW), "as much of it as memory allows",
        0, 1 << 24, "ctx-size|num-ctx",
        .help = "tokens of context; 0: as many as the model was made for"},
    [O_THREADS] = {"threads", "t", "N", WHOLE, ON_MODEL & ~ON(SHOW), "one for each processor",
        1, MAX_THREADS, .help = "threads; changes no number"},
    [O_BATCH] = {"batch", "b", "N", WHOLE, ON_SESSION | ON(SHOW), "512", 1, 65536,
        "batch-size", .help = "tokens of the prompt in one pass; changes no number"},
    [O_KV] = {"kv", NULL, "f16|f32|int8", CHOICE, ON_SESSION | ON(SHOW), "f16",
        .help = "type of the key-value cache (f32 with --strict); int8 takes half the memory of "
                "f16 and is less exact"},
    [O_OVERFLOW] = {"overflow", NULL, "error|drop", CHOICE, ON(CHAT), "error",
        .help = "when the context is full: refuse, or forget the oldest turns"},
    [O_LOOKUP] = {"lookup", NULL, "N", WHOLE, ON_ANSWER | ON(SHOW), "0", 0, MAX_LOOKUP,
        .help = "guess N tokens ahead from the text so far; changes no token"},
    [O_DRAFT] = {"draft", NULL, "SMALL.mdr", TEXT, ON_ANSWER,
        .help = "a small model of the same vocabulary guesses too; changes no token"},
    /* How the prompt is written. */
    [O_TEMPLATE] = {"template", NULL, "NAME", TEXT, ON_ANSWER | ON(RENDER), "the checkpoint's",
        .also = "chat-template", .help = "chat template: " MEDRUN_TEMPLATES},
    [O_DATE] = {"date", NULL, "YYYY-MM-DD", TEXT, ON_ANSWER | ON(RENDER), "the template's",
        .help = "the date in the system text (apertus: today; llama3.1: 26 Jul 2024)"},
    [O_THINK] = {"think", .on = ON_ANSWER | ON(RENDER),
        .help = "apertus: let the model deliberate first"},
    [O_CHAT_BOS] = {"bos", NULL, "auto|on|off", CHOICE, ON_ANSWER | ON(RENDER), "auto",
        .help = "beginning-of-text token first: as the template says, always, never; alpaca and "
                "afm have none, though their models were probably trained with it"},
    [O_RAW] = {"raw", .on = ON(RUN), .help = "no chat template: continue the text as it is"},
    /* What is printed, and on what it is computed. */
    [O_TOP] = {"top", NULL, "N", WHOLE, ON(RUN) | ON(LOGITS), NULL, 1, MOST_CHOICES,
        .help = "print the N most likely tokens, with probabilities at temperature 1"},
    [O_STRICT] = {"strict", .on = ON_SESSION,
        .help = "bf16 weights: the same numbers on every machine, slower on some"},
    [O_LOAD] = {"load", .on = ON_SESSION,
        .help = "copy the weights into memory first: more memory, a later start, large pages"},
    [O_MLOCK] = {"mlock", .on = ON_SESSION,
        .help = "keep weights, prompt and cache in memory, or fail"},
    [O_DEVICE] = {"device", NULL, "N|NAME|none", TEXT, ON_MODEL & ~ON(SHOW),
#ifdef MEDRUN_OPENCL
        "the first that is not a CPU",
#else
        "none, this build has no OpenCL",
#endif
        .help = "OpenCL device (medrun-lab doctor lists them)"},
    [O_GPU_LAYERS] = {"gpu-layers", "ngl", "N", WHOLE, ON_MODEL & ~ON(SHOW), "all that fit",
        0, 1 << 16, "n-gpu-layers", .help = "layers whose matrices the device has; 0: no device"},
    /* Files, and what single commands take. */
    [O_SAVE_PREFIX] = {"save-prefix", NULL, "FILE", TEXT, ON_ANSWER,
        .help = "save the processed prompt; the file holds its text: keep it safe"},
    [O_LOAD_PREFIX] = {"load-prefix", NULL, "FILE", TEXT, ON_ANSWER,
        .help = "reuse what a saved prompt has in common with this one; changes no token"},
    [O_BOS] = {"bos", .on = ON(TOKENIZE), .variable = "tokenize-bos",
        .help = "begin with the beginning-of-text token"},
    [O_SPECIAL] = {"special", .on = ON(TOKENIZE) | ON(DETOKENIZE),
        .help = "read control tokens in the text, or print them"},
    [O_PIECES] = {"pieces", .on = ON(TOKENIZE) | ON(RENDER),
        .help = "a line for each token: id, tab, text with escapes"},
    [O_MESSAGES] = {"messages", NULL, "FILE", TEXT, ON(RENDER),
        .help = "[{\"role\": \"user\", \"content\": \"...\"}, ...], - is stdin"},
    [O_RENDER_IDS] = {"ids", .on = ON(RENDER), .variable = "render-ids",
        .help = "print ids instead of text"},
    [O_NO_OPENING] = {"no-generation-prompt", .on = ON(RENDER),
        .help = "leave out the opening of the answer (afm's template has no choice)"},
    [O_IDS] = {"ids", NULL, "\"1 2 3\"", TEXT, ON(LOGITS), .help = "the tokens, instead of a text"},
    [O_ALL] = {"all", .on = ON(LOGITS), .help = "after each token, not only after the last"},
    [O_OUT] = {"out", "o", "OUT.f32", TEXT, ON(LOGITS),
        .help = "little-endian float32, vocab_size a row; - is stdout"},
    [O_FORCE] = {"force", .on = ON_ANSWER | ON(LOGITS),
        .help = "write over files of other kinds, too; never over one that is read"},
    [O_STATS] = {"stats", .on = ON_ANSWER, .help = "print speeds"},
    [O_VERBOSE] = {"verbose", "v", .on = ON_ANSWER | ON(SHOW) | ON(VERIFY),
        .help = "print the prompt as the model sees it; show: hashes; verify: also what agrees"},
    [O_QUIET] = {"quiet", "q", .on = ON_MODEL | ON_FILE,
        .help = "no lines about the run; verify: only what differs"},
    [O_HELP] = {"help", "h", .on = ~0u, .help = "print this"},
    [O_VERSION] = {"version", "V", .on = ~0u, .help = "print the version"},
};

enum { FROM_DEFAULT, FROM_ENVIRONMENT, FROM_FLAG };
static const char *const origins[] = {"card", "environment", "flag"};

/* A line that is broken between words: columns so far, how many there are (0: it is not broken),
 * and the blanks that further lines begin with. */
typedef struct { size_t at, width, indent; } text_line;

/* How an answer goes. */
typedef struct {
    buffer held;                /* not printed yet: it may begin a stop text                   */
    text_line line;
    bool ended, mid_line;
    size_t n_prompt, n_answer;  /* tokens                                                      */
    double prompt_time, answer_time;
} answer;

/* What a command works on. run_program closes what it opened. */
typedef struct command {
    const program *p;
    const char *self;           /* argv[0]: the other programs stand beside it                 */
    const command_row *row;
    const char *text[MAX_OPTIONS];              /* as given, or NULL                            */
    double number[MAX_OPTIONS];                 /* a FLAG's is 0 or 1, a CHOICE's its place     */
    int from[MAX_OPTIONS];
    const char *stops[MEDRUN_MAX_STOPS];
    size_t n_stops;
    char **rest;                                /* (n_rest) arguments that are not options      */
    int n_rest;
    medrun_model *m, *draft;
    medrun_session *s;
    file_map map;                               /* a tokenizer.bin, which `own` points into     */
    tokenizer own;
    const tokenizer *t;                         /* own, or the model's                          */
    const chat_template *chat;                  /* NULL: unknown                                */
    medrun_chat_options chat_options;
    char today[11];
    medrun_sampling sampling;
    int (*piece)(struct command *c, int32_t id, const char *text, size_t n);    /* or NULL       */
    answer answer;                              /* the last one                                 */
    buffer input, ids, output;                  /* what was read, its tokens, what is printed   */
    medrun_error e;
} command;

/* A buffer as a text. */
static const char *chars(const buffer *b) { return b->data ? (const char *)b->data : ""; }

/* What stands in an option. Before the line is read that is its default, 0 where there is none. */
static bool given(const command *c, int id) { return c->from[id] != FROM_DEFAULT; }
static bool flag(const command *c, int id) { return c->number[id] != 0; }
static int whole(const command *c, int id) { return (int)c->number[id]; }

/* The command's bit in option_row's `on`. */
static unsigned own_bit(const command *c) { return ON(c->row - c->p->commands); }

/* Does this command take the option? */
static bool takes(const command *c, int id) { return c->p->options[id].on & own_bit(c); }

/* The place of WORD among WORDS, which have | between them, or -1. */
static int place_in(const char *words, const char *word) {
    size_t n = strlen(word), len;
    for (int place = 0; words && *words; words += len + (words[len] == '|'), place++) {
        len = strcspn(words, "|");
        if (len == n && !memcmp(words, word, n)) return place;
    }
    return -1;
}

/* A command line that cannot be carried out. */
#define USAGE(c, ...) fail(&(c)->e, MEDRUN_USAGE, __VA_ARGS__)

/* Says that WORD is unknown, an option or (in a chat, behind /) a command; what of the NAMES with |
 * between them, which it frees, may have been meant; and what lists all. A name is meant that is at
 * most two edits away; more than one only where it begins alike. */
static int unknown(command *c, const char *word, buffer *names) {
    bool option = *word == '-', in_chat = *word == '/';
    const char *plain = word + strspn(word, "-"), *meant = "";
    size_t least = strlen(plain) < 3 ? strlen(plain) : 3;
    char *name = names->n ? strtok((char *)names->data, "|") : NULL;
    for (; name; name = strtok(NULL, "|")) {
        size_t edits = edit_distance(plain, name);
        if (edits < least && (edits < 2 || *plain == *name)) least = edits, meant = name;
    }
    USAGE(c, "unknown %s %s%s%s%s; %s%s%s lists all", option ? "option" : "command", word,
          *meant ? "; the nearest is " : "", *meant && option ? "--" : "", meant,
          in_chat ? "/" : c->p->name, option ? " help " : in_chat ? "help" : " help",
          option ? c->row->name : "");
    return buffer_free(names), c->e.code;
}

/* The command of ROWS that is called NAME, or NULL. */
static const command_row *find_command(const command_row *rows, const char *name) {
    while (rows->name && strcmp(rows->name, name) && place_in(rows->also, name) < 0) rows++;
    return rows->name ? rows : NULL;
}

static int unknown_command(command *c, const command_row *rows, const char *name) {
    buffer names = {0};
    for (; rows->name; rows++) buffer_printf(&names, "%s|", rows->name);
    return unknown(c, name, &names);
}

/* The option that ARG, -n or --predict, names for one of the commands ON; or -1. */
static int find_option(const program *p, const char *arg, unsigned on) {
    bool large = arg[1] == '-';
    char name[40];
    snprintf(name, sizeof name, "%s", arg + 1 + large);
    for (char *at = name; (at = strchr(at, '_')); ) *at = '-';
    for (int id = 0; id < p->n_options; id++) {
        const option_row *r = &p->options[id];
        const char *exact = large ? r->name : r->small;
        bool named = exact && !strcmp(name, exact);
        if ((named || (large && place_in(r->also, name) >= 0)) && (r->on & on)) return id;
    }
    return -1;
}

/* Words that people know from other programs, and what to do instead: the command of the same name
 * where that ends in a blank. */
static const struct { const char *words, *instead; } elsewhere[] = {
    {"bench|doctor|record|replay|compare|call|constrain|top|completion", "medrun-lab "},
    {"--record", "medrun-lab record does this"},
    {"--tools", "medrun-lab call does this"},
    {"--schema|--json-schema|--grammar|--regex|--choices", "medrun-lab constrain does this"},
    {"export|convert|quantize", "medrun-export SOURCE OUT.mdr does this"},
    {"eval|perplexity", "medrun-eval does this"},
    {"serve|server", "medrun-serve does this"},
    {"explain", "medrun-explain does this"},
    {"info|inspect", "medrun show MODEL.mdr does this"},
    {"ask|generate|complete", "medrun run MODEL.mdr \"TEXT\" does this"},
    {"pull|download|search", "medrun has no network: README.md lists models and where each is "
        "published, and medrun-export makes a checkpoint of what you fetched"},
    {"list|ls|ps|rm|cp|push|create", "medrun keeps no models: each is a file that you name; "
        "README.md lists those that are published"},
    {"-i|-cnv|--interactive|--conversation", "leave it out: medrun MODEL.mdr is a conversation"},
    {"--no-mmap", "leave it out: a checkpoint is always mapped"}, {0}};

/* Says what to do instead of WORD, if it is one of those. */
static int look_elsewhere(command *c, const char *word) {
    size_t i = 0;
    while (elsewhere[i].words && place_in(elsewhere[i].words, word) < 0) i++;
    const char *instead = elsewhere[i].instead;
    if (!instead) return MEDRUN_OK;
    bool same = instead[strlen(instead) - 1] == ' ';
    return USAGE(c, "%s: %s%s%s", word, instead, same ? word : "", same ? " does this" : "");
}

/* Says which commands take the option, or else what may have been meant. */
static int unknown_option(command *c, const char *arg) {
    const program *p = c->p;
    int known = find_option(p, arg, ~0u);
    buffer names = {0};
    for (const command_row *r = p->commands; known >= 0 && r->name; r++)
        if (p->options[known].on & ON(r - p->commands)) buffer_printf(&names, " %s", r->name);
    if (names.n) USAGE(c, "%s does not go with %s, but with:%s", arg, c->row->name, chars(&names));
    names.n = 0;
    if (c->e.code || look_elsewhere(c, arg)) return buffer_free(&names), c->e.code;
    for (const option_row *r = p->options; r < p->options + p->n_options; r++)
        if (r->on & own_bit(c)) buffer_printf(&names, "%s|%s|", r->name, r->also ? r->also : "");
    return unknown(c, arg, &names);
}

/* VALUE was found in NAME, an option or an environment variable. */
static int set_option(command *c, int id, const char *value, int from, const char *name) {
    const option_row *r = &c->p->options[id];
    const char *words = r->kind == CHOICE ? r->argument : "0|1|off|on|false|true";
    bool number = r->kind == WHOLE || r->kind == REAL;
    double v = r->kind == TEXT ? 0 : place_in(words, value);
    if (number && (!parse_number(value, &v) || v < r->min || v > r->max ||
                   (r->kind == WHOLE && v != floor(v))))
        return USAGE(c, "%s: found \"%s\", wanted a %snumber from %.16g to %.16g", name, value,
                     r->kind == WHOLE ? "whole " : "", r->min, r->max);
    if (!number && v < 0) return USAGE(c, "%s: found \"%s\", wanted %s", name, value, words);
    if (id == O_STOP && (!*value || c->n_stops == MEDRUN_MAX_STOPS))
        return USAGE(c, "%s: found %s, wanted 1 to %d texts", name,
                     *value ? "one more" : "an empty text", MEDRUN_MAX_STOPS);
    if (id == O_STOP) c->stops[c->n_stops++] = value;
    if (r->kind == FLAG) v = fmod(v, 2);                /* no and yes stand there by turns       */
    c->text[id] = value, c->number[id] = v, c->from[id] = from;
    return MEDRUN_OK;
}

/* The name of the option's environment variable. */
static void variable_name(const option_row *r, char name[48]) {
    snprintf(name, 48, "MEDRUN_%s", r->variable ? r->variable : r->name);
    for (char *c = name; *c; c++) *c = *c == '-' ? '_' : (char)toupper((uint8_t)*c);
}

/* Sets from the environment what the command line left out. An empty variable sets nothing. */
static int read_environment(command *c) {
    char name[48];
    for (int id = 0; id < c->p->n_options; id++) {
        if (given(c, id) || !takes(c, id) || id == O_HELP || id == O_VERSION) continue;
        variable_name(&c->p->options[id], name);
        const char *value = getenv(name);
        if (value && *value && set_option(c, id, value, FROM_ENVIRONMENT, name)) return c->e.code;
    }
    return MEDRUN_OK;
}

/* ---- printing ------------------------------------------------------------------------------ */

/* Prints TEXT for people, in lines: '?' for what else is hostile or not UTF-8. */
static void print_safe(FILE *f, const char *text, size_t n) {
    for (size_t i = 0, len; i < n; i += len ? len : 1) {
        uint32_t code = 0;
        len = utf8_decode((const uint8_t *)text + i, n - i, &code);
        bool keep = len && (!is_hostile(code) || code == '\n' || code == '\t');
        fwrite(keep ? text + i : "?", 1, keep ? len : 1, f);
    }
}

/* The bytes of the character that TEXT begins with, and the columns that it takes: Chinese,
 * Japanese, Korean and pictures take two, accents that stand on the character before them none. A
 * short form of Unicode's table of widths (UAX 11). What is hostile or none shows as '?'. */
static size_t measure(const char *text, size_t n, size_t *columns) {
    static const struct { uint32_t first, last, columns; } ranges[] = {
        {0x300, 0x36F, 0}, {0x200B, 0x200D, 0}, {0xFE00, 0xFE0F, 0},
        {0x1100, 0x115F, 2}, {0x2E80, 0xA4CF, 2}, {0xAC00, 0xD7A3, 2}, {0xF900, 0xFAFF, 2},
        {0xFE30, 0xFE6F, 2}, {0xFF00, 0xFF60, 2}, {0x1F300, 0x1FAFF, 2}, {0x20000, 0x3FFFD, 2}};
    uint32_t code = 0;
    size_t len = utf8_decode((const uint8_t *)text, n, &code);
    *columns = 1;
    for (size_t i = 0; len && i < sizeof ranges / sizeof *ranges; i++)
        if (code >= ranges[i].first && code <= ranges[i].last) *columns = ranges[i].columns;
    return len ? len : 1;
}

/* The columns that a line may have; 0: nobody looks at it, so that it is not broken. */
static size_t width_of(int fd) {
    int n = is_terminal(fd) ? terminal_columns() : 0;
    return n > 200 ? 200 : n > 0 ? (size_t)n : 0;
}

/* The bytes of TEXT up to the last place where a line may be broken: what follows may be a part of
 * a word, if it is not as long as a line. Wide characters are words of their own. */
static size_t whole_words(const char *text, size_t n, size_t width) {
    size_t end = 0;
    for (size_t i = 0, len, columns; i < n; i += len) {
        len = measure(text + i, n - i, &columns);
        if (columns == 2 || text[i] == ' ' || text[i] == '\n') end = i + len;
    }
    return n - end < width ? end : n;
}

/* Prints for people, word by word. The blanks before a word go with it, or are left out where it
 * begins a line. The terminal itself breaks a word that is longer than a line. */
static void print_words(FILE *f, text_line *l, const char *text, size_t n) {
    for (size_t end; n; text += end, n -= end) {
        size_t blanks = 0, columns = 0, k = 0, len;
        while (blanks < n && text[blanks] == ' ') blanks++;
        for (end = blanks; end < n && text[end] != ' ' && text[end] != '\n' && k < 2; end += len) {
            len = measure(text + end, n - end, &k);
            if (k == 2 && columns) break;
            columns += k;
        }
        bool full = l->width && l->at > l->indent && l->at + blanks + columns > l->width;
        bool ends = !full && end < n && text[end] == '\n';
        if (full) end = blanks;                         /* the word is next, without them        */
        else print_safe(f, text, end), l->at += blanks + columns;
        if (l->width && l->at > l->width) l->at %= l->width;
        if (!full && !ends) continue;
        end += ends, l->at = l->indent;
        fprintf(f, "\n%*s", (int)l->indent, "");
    }
}

/* Help has at most 78 columns: LEFT, and TEXT from column INDENT on, below a LEFT that is long. */
static void print_help(FILE *f, const char *left, size_t indent, const char *text) {
    size_t width = width_of(fileno(f));
    text_line l = {.width = width && width < 78 ? width : 78, .indent = 6};
    if (l.width < 60 && indent > 6) indent = 6;         /* a narrow terminal                     */
    print_words(f, &l, left, strlen(left));
    if (*left && l.at >= indent) fputc('\n', f), l.at = 0;
    fprintf(f, "%*s", (int)(indent - l.at), "");
    l.at = l.indent = indent;
    print_words(f, &l, text, strlen(text));
    fputc('\n', f);
}

/* Appends TEXT with escapes, so that a piece stays on its line and shows its exact bytes. */
static void escape(buffer *out, const char *text, size_t n) {
    for (size_t i = 0, len; i < n; i += len) {
        uint32_t code = 0;
        len = utf8_decode((const uint8_t *)text + i, n - i, &code);
        if (code == '\\' || code == '\n') buffer_text(out, code == '\n' ? "\\n" : "\\\\");
        else if (len && !is_hostile(code)) buffer_add(out, text + i, len);
        else buffer_printf(out, "\\x%02x", (unsigned)(uint8_t)text[i]);
        if (!len || is_hostile(code)) len = 1;
    }
}

/* Prints a line on stderr, which may hold a hostile name: about the run of C, unless -q; where C is
 * NULL, what a chat has to say in any case. */
MEDRUN_PRINTF_LIKE(2, 3)
static void note(const command *c, const char *format, ...) {
    char line[2048];
    text_line l = {.width = width_of(STDERR_FILENO)};
    if (c && flag(c, O_QUIET)) return;
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    make_safe(line);
    print_words(stderr, &l, line, strlen(line));
    fputc('\n', stderr);
    fflush(stderr);
}

/* Ends the command with this exit code and without a message, unless it has failed before. */
static int quit(command *c, int code) { return fail(&c->e, code, "%s", ""), c->e.code; }

/* Nobody is told when the program that read stdout has left. */
static int flush_stdout(command *c) {
    if (!fflush(stdout) && !ferror(stdout)) return c->e.code;
    if (errno == EPIPE || errno == EBADF) return quit(c, MEDRUN_FAILED);
    return cannot(&c->e, MEDRUN_FAILED, "stdout", "write");
}

/* A buffer as ids, which are as wide as they are in the API. */
static const int32_t *ids_of(const buffer *b) { return (const int32_t *)(const void *)b->data; }
static size_t n_ids(const buffer *b) { return b->n / sizeof(int32_t); }

/* Replaces ids by a line that lists them. */
static void ids_to_text(buffer *ids) {
    buffer text = {0};
    for (size_t i = 0; i < n_ids(ids); i++) buffer_printf(&text, i ? " %d" : "%d", ids_of(ids)[i]);
    text.failed |= ids->failed;
    buffer_free(ids);
    *ids = text;
}

/* Was there memory for all that was put into the buffer? */
static int check_buffer(command *c, const buffer *b) {
    return b->failed ? out_of_memory(&c->e, b->n) : c->e.code;
}

/* ---- files --------------------------------------------------------------------------------- */

/* The most bytes read where no context sets a bound: a device has no end. */
enum { MOST_INPUT = 16 << 20 };

/* The bytes that can fit into the context at most, whatever the text says. */
static size_t most_prompt(const command *c) {
    size_t n = c->m ? (size_t)c->m->config.max_positions * c->m->longest_piece : MOST_INPUT;
    return n < MOST_INPUT ? n : MOST_INPUT;
}

/* Appends all of PATH (- is stdin) to OUT, and refuses more than MOST bytes. */
static int read_file(command *c, const char *path, size_t most, buffer *out) {
    bool standard = !strcmp(path, "-");
    if (c->e.code) return c->e.code;
    if (standard) path = "stdin";
    FILE *f = standard ? stdin : open_stream(path, TO_READ);
    if (!f) return cannot(&c->e, MEDRUN_BAD_FILE, path, "open");
    for (size_t n = 1; n && out->n <= most && buffer_room(out, 65536);) {
        n = fread(out->data + out->n, 1, 65536, f);
        out->n += n, out->data[out->n] = 0;
        if (ferror(f) && errno == EINTR) clearerr(f), n = 1;
    }
    if (ferror(f)) cannot(&c->e, MEDRUN_BAD_FILE, path, "read");
    if (!standard) fclose(f);
    if (out->n > most && most == MOST_INPUT)
        bad_file(&c->e, path, "found over %zu bytes, the most that is read", most);
    else if (out->n > most)
        fail(&c->e, MEDRUN_TOO_LONG, "%s: over %zu bytes are more than a context of %d tokens "
             "holds", path, most, c->m->config.max_positions);
    return check_buffer(c, out);
}

/* The same for text: refuses what is not UTF-8, with its place, and drops a byte order mark. Some
 * programs write UTF-16 unasked, and a model would take its bytes for words nobody wrote. */
static int read_text(command *c, const char *path, size_t most, buffer *out) {
    size_t first = out->n, line = 1;
    if (read_file(c, path, most, out)) return c->e.code;
    const char *start = chars(out) + first;
    bool utf16 = !strncmp(start, "\xFF\xFE", 2) || !strncmp(start, "\xFE\xFF", 2) ||
                 (out->n > first + 1 && !start[0] != !start[1]);        /* or without a mark     */
    size_t at = first + (utf16 ? 0 : utf8_valid(start, out->n - first));
    for (size_t i = first; i < at; i++) line += out->data[i] == '\n';
    if (at < out->n)
        return bad_file(&c->e, strcmp(path, "-") ? path : "stdin", "line %zu, byte %zu: found %s, "
                        "wanted UTF-8 text; save it as UTF-8", line, at - first,
                        utf16 ? "UTF-16" : "what is no character");
    if (strncmp(start, "\xEF\xBB\xBF", 3)) return MEDRUN_OK;
    out->n -= 3;
    memmove(out->data + first, start + 3, out->n - first);
    return out->data[out->n] = 0, MEDRUN_OK;
}

/* Appends ids that stand in a text with white space between them. */
static int parse_ids(command *c, const char *text, size_t n, buffer *ids) {
    for (const char *at = text, *word; at < text + n; at++) {
        double id = 0;
        for (word = at; isdigit((uint8_t)*at); at++) id = id * 10 + (*at - '0');
        if ((at < text + n && !isspace((uint8_t)*at)) || id >= c->t->vocab_size)
            return USAGE(c, "ids: found \"%.12s\", wanted whole numbers below %d", word,
                         c->t->vocab_size);
        if (at > word) buffer_add(ids, &(int32_t){(int32_t)id}, sizeof(int32_t));
    }
    return check_buffer(c, ids);
}

/* The same from an array in JSON, node V, which may be missing or hold anything. */
static int json_ids(command *c, const json *j, uint32_t v, const char *what, buffer *ids) {
    bool good = json_is_type(j, v, JSON_ARRAY);
    uint32_t n = good ? j->nodes[v].count : 0, x = v + 1;
    for (uint32_t i = 0; good && i < n; i++, x = j->nodes[x].next) {
        double id = json_typeof(j, x) == JSON_NUMBER ? json_number(j, x) : -1;
        good = id >= 0 && id < c->t->vocab_size && id == floor(id);
        if (good) buffer_add(ids, &(int32_t){(int32_t)id}, sizeof(int32_t));
    }
    if (!good) bad_file(&c->e, what, "wanted token ids, whole numbers below %d", c->t->vocab_size);
    return check_buffer(c, ids);
}

/* Parses the JSON file that is read into c->input; free J afterwards, also after a failure. */
static int read_json(command *c, const char *path, json *j) {
    medrun_error why = {0};
    if (read_text(c, path, MOST_INPUT, &c->input)) return c->e.code;
    if (json_parse(j, chars(&c->input), c->input.n, &why))
        fail(&c->e, why.code, "%s: %s", path, why.text);
    return c->e.code;
}

/* ---- opening ------------------------------------------------------------------------------- */

/* Chooses the template that --template names, else the checkpoint's, and collects what the options
 * say to it. Today's date is taken here, once, so that it is the same in the whole conversation and
 * in its record. */
static int choose_chat(command *c) {
    medrun_chat_options *o = &c->chat_options;
    const char *name = c->text[O_TEMPLATE];
    const chat_template *own = c->chat;
    if (c->e.code) return c->e.code;
    if (name && !(c->chat = chat_find(name)))
        return USAGE(c, "--template: found \"%s\", wanted one of: %s", name, MEDRUN_TEMPLATES);
    if (c->m && c->chat && c->chat != own) add_stops(c->m, c->chat);
    if (!flag(c, O_RAW) && check_template(c->chat, &c->e)) return c->e.code;
    date_today(c->today);
    o->date = c->text[O_DATE];
    if (!o->date && c->chat && c->chat->states_today) o->date = c->today;
    o->think = flag(c, O_THINK);
    o->bos = whole(c, O_CHAT_BOS);
    if (c->chat && c->chat->stop_text && !c->n_stops) c->stops[c->n_stops++] = c->chat->stop_text;
    return MEDRUN_OK;
}

/* Lets a device multiply. If no device can, and nobody asked for one, the processor computes; a
 * build without OpenCL does not say so. */
static int choose_device_option(command *c) {
    bool asked = given(c, O_DEVICE) || given(c, O_GPU_LAYERS);
    const char *memory = getenv("MEDRUN_DEVICE_MEMORY");                /* in MB                 */
    device_request r = {c->text[O_DEVICE] ? c->text[O_DEVICE] : "auto",
                        getenv("MEDRUN_OPENCL_LIBRARY"), getenv("MEDRUN_OPENCL_OPTIONS"),
                        memory ? strtoull(memory, NULL, 10) << 20 : 0};
    int layers = given(c, O_GPU_LAYERS) ? whole(c, O_GPU_LAYERS) : -1;
    medrun_error e = {0};
    if (!takes(c, O_DEVICE) || !layers || !strcmp(r.name, "none")) return MEDRUN_OK;
    attach_device(c->m, &r, layers, &e);
    if (!e.code) note(c, "device: %s", c->m->device->says);
    else print_safe(stderr, chars(&c->m->device_log), c->m->device_log.n);
    if (e.code && asked) return fail(&c->e, MEDRUN_NO_MEMORY, "%s", e.text);
    if (e.code && e.code != MEDRUN_USAGE) note(c, "%s; the processor computes", e.text);
    return MEDRUN_OK;
}

/* What is locked is never written to swap: it stays fast, and no prompt reaches a disk. */
static int lock(command *c, const void *p, size_t n) {
    if (lock_bytes(p, n)) return MEDRUN_OK;
    return fail(&c->e, errno_code(MEDRUN_FAILED), "--mlock: %zu MB cannot be locked: %s" LOCK_HINT,
                n >> 20, strerror(errno));
}

/* PATH cannot be opened. Where it is a model in another form, says how to make a checkpoint. */
static int suggest_export(command *c, const char *path) {
    char start[4] = "", name[256];
    size_t n = strlen(path);
    file_facts f;
    FILE *file = open_stream(path, TO_MAP);
    bool gguf = file && fread(start, 1, 4, file) == 4 && !memcmp(start, "GGUF", 4);
    if (file) fclose(file);
    bool folder = !get_facts(path, -1, &f) && f.folder;
    if (c->e.code != MEDRUN_BAD_FILE || !(gguf || folder)) return c->e.code;
    while (n && strchr("/.", path[n - 1])) n--;
    size_t from = n, end = gguf && n > 5 && !memcmp(path + n - 5, ".gguf", 5) ? n - 5 : n;
    while (from && path[from - 1] != '/') from--;
    snprintf(name, sizeof name, "%.*s", (int)(end - from), path + from);
    const char *slash = strrchr(c->self, '/'), *quote = strpbrk(path, " ()'&;") ? "\"" : "";
    c->e = (medrun_error){0};
    return fail(&c->e, MEDRUN_BAD_FILE, "%s is %s and no checkpoint yet; this makes one: "
                "%.*smedrun-export %s%s%s %s%s-int8.mdr%s --type int8", path,
                gguf ? "a GGUF file" : "a folder", slash ? (int)(slash - c->self) + 1 : 0,
                c->self, quote, path, quote, quote, *name ? name : "model", quote);
}

/* Opens the checkpoint, which the line or else the environment names, and takes its tokenizer,
 * template and sampling values into the command. */
static int open_model(command *c) {
    const char *path = c->text[O_MODEL];
    medrun_options o = {.threads = takes(c, O_THREADS) ? whole(c, O_THREADS) : 1,
                        .kernels = getenv("MEDRUN_KERNELS"), .load = flag(c, O_LOAD)};
    double start = seconds();
    if (!path)
        return USAGE(c, "%s: no model; name one (%s help %s)", c->row->name, c->p->name,
                     c->row->name);
    if (medrun_open(&c->m, path, &o, &c->e)) return suggest_export(c, path);
    if (choose_device_option(c)) return c->e.code;
    o.threads = 1;                              /* a draft computes on the threads of the model  */
    if (c->text[O_DRAFT] && medrun_open(&c->draft, c->text[O_DRAFT], &o, &c->e)) return c->e.code;
    c->t = &c->m->tokenizer, c->chat = c->m->chat, c->sampling = c->m->sampling;
    if (o.load) note(c, "load: %zu MB that no other process shares, %.1f s", c->m->file.map.n >> 20,
                     seconds() - start);
    return flag(c, O_MLOCK) ? lock(c, c->m->file.map.data, c->m->file.map.n) : MEDRUN_OK;
}

/* Opens a checkpoint or a tokenizer.bin: the first bytes tell which it is. */
static int open_tokenizer(command *c) {
    const char *path = c->text[O_MODEL];
    if (path && map_file(path, &c->map, &c->e)) return suggest_export(c, path);
    if (c->map.n < 6 || memcmp(c->map.data, "MEDTOK", 6)) return unmap_file(&c->map), open_model(c);
    c->t = &c->own;
    return tokenizer_open(&c->own, c->map.data, c->map.n, path, &c->e);
}

/* Sessions go before their models. Buffers end with the program. */
static void close_command(command *c) {
    const device *d = c->m ? c->m->device : NULL;
    if (d && d->failed) note(c, "device %s; the processor computed the rest", d->says);
    medrun_stop(c->s);
    medrun_close(c->m);
    medrun_close(c->draft);
    if (c->t == &c->own) tokenizer_close(&c->own);
    unmap_file(&c->map);
}

static const char *origin(const command *c, int id) { return origins[c->from[id]]; }

/* Takes the values that were given, the others from the card. */
static void choose_sampling(command *c) {
    medrun_sampling *s = &c->sampling;
    if (given(c, O_TEMP)) s->temperature = (float)c->number[O_TEMP];
    if (given(c, O_TOP_K)) s->top_k = whole(c, O_TOP_K);
    if (given(c, O_TOP_P)) s->top_p = (float)c->number[O_TOP_P];
    if (given(c, O_MIN_P)) s->min_p = (float)c->number[O_MIN_P];
    if (given(c, O_REPEAT)) s->repeat_penalty = (float)c->number[O_REPEAT];
    s->seed = c->number[O_SEED] < 0 ? random_bits() & MAX_SEED : (uint64_t)c->number[O_SEED];
}

/* Says where each value is from: the same command line answers otherwise with another card. A seed
 * that was drawn is told, too, so that any answer can be had again. */
static void note_sampling(const command *c) {
    const medrun_sampling *s = &c->sampling;
    if (s->temperature <= 0)
        note(c, "sampling: temperature 0 (%s), always the most likely token; repeat-penalty %g "
             "(%s)", origin(c, O_TEMP), (double)s->repeat_penalty, origin(c, O_REPEAT));
    else
        note(c, "sampling: temperature %g (%s), top-k %d (%s), top-p %g (%s), min-p %g (%s), "
             "repeat-penalty %g (%s), seed %llu (%s)", (double)s->temperature, origin(c, O_TEMP),
             s->top_k, origin(c, O_TOP_K), (double)s->top_p, origin(c, O_TOP_P), (double)s->min_p,
             origin(c, O_MIN_P), (double)s->repeat_penalty, origin(c, O_REPEAT),
             (unsigned long long)s->seed, c->number[O_SEED] < 0 ? "new" : "given");
}

/* Strict means to the last bits of float32, so the cache follows unless --kv says otherwise. */
static int cache_type(const command *c) {
    if (given(c, O_KV)) return whole(c, O_KV);
    return flag(c, O_STRICT) ? MEDRUN_KV_F32 : MEDRUN_KV_F16;
}

static medrun_session_options session_options(const command *c, int context) {
    return (medrun_session_options){.context = context, .batch = whole(c, O_BATCH),
                                    .lookup = whole(c, O_LOOKUP), .kv = cache_type(c),
                                    .draft = c->draft,
                                    .strict = flag(c, O_STRICT), .custom_sampling = true,
                                    .sampling = c->sampling,
                                    .template_name = flag(c, O_RAW) ? "raw"
                                                     : c->chat ? c->chat->name : NULL};
}

/* The context of -c, else the model's. If nobody asked and a session with the model's takes more
 * than three quarters of what is free, the largest power of two that does not: the pages of the
 * weights, which are read again for each token, need room beside it. */
static int choose_context(const command *c) {
    uint64_t available = (uint64_t)limits_of_machine().available;
    int most = c->m->config.max_positions, power = 1;
    if (given(c, O_CTX)) return whole(c, O_CTX) ? whole(c, O_CTX) : most;
    if (available > SIZE_MAX / 3) available = SIZE_MAX / 3;     /* a model is mapped beside it   */
    while (power <= most / 2) power *= 2;
    medrun_session_options o = session_options(c, most);
    for (; o.context > 256 && session_needs(c->m, &o) > available / 4 * 3; power /= 2)
        o.context = power;
    if (o.context < most)
        note(c, "context: %d of the model's %d tokens, as this machine has %llu MB free; -c asks "
             "for another", o.context, most, (unsigned long long)available >> 20);
    return o.context;
}

/* Refuses a PATH that cannot be written, or that this command reads, before the work begins: an
 * answer may have taken an hour when a mistyped folder shows. NULL: no file is asked for. */
static int check_output(command *c, const char *path, const file_kind *kind) {
    const char *const inputs[] = {c->text[O_MODEL], c->text[O_FILE], c->text[O_LOAD_PREFIX],
                                  c->text[O_MESSAGES], c->text[O_DRAFT]};
    if (!path) return c->e.code;
    check_inputs(path, inputs, sizeof inputs / sizeof *inputs, &c->e);
    return writer_check(path, kind, flag(c, O_FORCE), &c->e);
}

static int open_output(command *c, file_writer *w, const char *path, const file_kind *kind) {
    return check_output(c, path, kind) ? c->e.code
         : writer_open(w, path, kind, flag(c, O_FORCE), &c->e);
}

/* Starts the session, and prints what it computes with. */
static int start_session(command *c) {
    if (c->e.code) return c->e.code;
    int context = choose_context(c);
    const char *plain = plain_only();
    if (check_output(c, c->text[O_SAVE_PREFIX], &session_file)) return c->e.code;
    note(c, "medrun " MEDRUN_VERSION ": %s, %s, %s kernels, %d thread%s, context %d, kv %s%s%s%s",
         c->m->name, type_names[c->m->type], c->m->kernels->name, c->m->pool->threads,
         c->m->pool->threads == 1 ? "" : "s", context, kv_names[cache_type(c)],
         flag(c, O_STRICT) ? ", strict" : "", plain ? "; " : "", plain ? plain : "");
    choose_sampling(c);
    note_sampling(c);
    medrun_session_options o = session_options(c, context);
    if (medrun_start(&c->s, c->m, &o, NULL, 0, &c->e)) return c->e.code;
    return flag(c, O_MLOCK) ? lock(c, c->s, c->s->bytes) : MEDRUN_OK;
}

static size_t context_of(const command *c) { return (size_t)c->s->options.context; }

/* ---- answering ----------------------------------------------------------------------------- */

/* Whose step Ctrl-C ends between two layers. The handler is for one signal: a second Ctrl-C ends
 * the program, should the first one not be heard. */
static medrun_session *volatile answering;

static void on_interrupt(int signal_number) {
    (void)signal_number;
    medrun_interrupt(answering);
}

/* A program that a signal ends leaves no half of a file, and no raw terminal. The signal has its
 * default effect by now: raised again it ends the program, and whoever started it sees by what. */
static void on_fatal_signal(int signal_number) {
    set_raw(false);
    if (being_written) remove_file(being_written);
    if (SIGHUP == SIGQUIT) _exit(MEDRUN_INTERRUPTED);   /* Windows, whose raise would exit with 3 */
    raise(signal_number);
}

/* Prints what can no longer become part of a stop text, or all that is left when the answer is
 * OVER; a stop text ends it. On a terminal lines are broken between words, so the last word waits
 * for its end; and control characters that the model made do not reach it. */
static int print_held(command *c, bool over) {
    answer *a = &c->answer;
    const char *text = chars(&a->held);
    /* N and SAFE: up to the first stop text, and up to the first beginning of one at the end. */
    size_t n = a->held.n, safe = n;
    for (size_t at = n; at-- > 0;)
        for (size_t i = 0; i < c->n_stops; i++) {
            size_t len = strlen(c->stops[i]), left = a->held.n - at;
            if (memcmp(text + at, c->stops[i], len < left ? len : left)) continue;
            if (len <= left) n = at, a->ended = true;
            else safe = at;
        }
    a->line.width = width_of(STDOUT_FILENO);
    if (!over && !a->ended) n = a->line.width ? whole_words(text, safe, a->line.width) : safe;
    if (!n) return MEDRUN_OK;
    if (is_terminal(STDOUT_FILENO)) print_words(stdout, &a->line, text, n);
    else fwrite(text, 1, n, stdout);
    a->mid_line = text[n - 1] != '\n';
    a->held.n -= n;
    memmove(a->held.data, a->held.data + n, a->held.n);
    return flush_stdout(c);
}

/* Computes what is pending. A long prompt shows how far it is: on a terminal all the time after two
 * seconds, in a log every ten seconds. */
static int process_prompt(command *c) {
    size_t n = medrun_pending(c->s), left;
    bool terminal = is_terminal(STDERR_FILENO);
    double start = seconds(), next = start + (terminal ? 2 : 10);
    int drawn = 0;
    while (!c->e.code && (left = medrun_pending(c->s))) {
        double now = seconds();
        if (now >= next && !flag(c, O_QUIET)) {
            int wait = (int)((now - start) * (double)left / (double)(n - left + 1));
            drawn = fprintf(stderr, terminal ? "\r%zu/%zu tokens, %d:%02d left "
                                             : "prompt: %zu of %zu tokens, %d:%02d left\n",
                            n - left, n, wait / 60, wait % 60);
            next = now + (terminal ? 0.2 : 10);
        }
        medrun_step(&c->s, 1, &c->e);
    }
    if (drawn && terminal) fprintf(stderr, "\r%*s\r", drawn, "");
    return c->e.code;
}

/* With -v, prints the prompt as the model sees it: ids, and text with its control tokens. Most
 * strange answers come from a prompt that is not what one thought. */
static void show_prompt(const command *c, const int32_t *ids, size_t n) {
    buffer text = {0};
    if (!flag(c, O_VERBOSE)) return;
    tokenizer_decode(c->t, ids, n, true, &text);
    fprintf(stderr, "prompt, %zu tokens: ", n);
    for (size_t i = 0; i < n; i++) fprintf(stderr, i ? " %d" : "%d", ids[i]);
    fputc('\n', stderr);
    print_safe(stderr, chars(&text), text.n);
    fputc('\n', stderr);
    buffer_free(&text);
}

/* Puts a prompt on the timeline. A first prompt may begin as the file of --load-prefix does; where
 * that cannot be read, a chat goes on without it. */
static int feed_prompt(command *c, const int32_t *ids, size_t n) {
    const char *path = c->text[O_LOAD_PREFIX];
    size_t taken;
    show_prompt(c, ids, n);
    if (!path || medrun_length(c->s)) return medrun_feed(c->s, ids, n, &c->e);
    if (medrun_feed_saved(c->s, ids, n, path, &taken, &c->e)) c->text[O_LOAD_PREFIX] = NULL;
    else if (taken) note(c, "prefix: %zu of %zu tokens taken from %s", taken, n, path);
    else note(c, "prefix: the prompt shares fewer than 16 tokens with %s", path);
    return c->e.code;
}

/* Prints the piece with escapes, on one line, and blanks up to WIDTH columns. */
static void print_piece(const command *c, int32_t id, size_t width) {
    size_t n, columns = 0, k;
    buffer b = {0};
    const char *piece = tokenizer_piece(c->t, id, &n);
    escape(&b, piece, n);
    for (size_t i = 0; i < b.n; columns += k) i += measure(chars(&b) + i, b.n - i, &k);
    printf("%s%*s", chars(&b), columns < width ? (int)(width - columns) : 0, "");
    buffer_free(&b);
}

/* What the softmax of the LOGITS finds likeliest, as at temperature 1: under the token that was
 * CHOSEN, where there is one (not -1), or as a table with rank, id and logit. */
static int print_likely(command *c, const float *logits, int32_t chosen) {
    int32_t ids[1 + MOST_CHOICES] = {chosen};
    bool table = chosen < 0;
    size_t vocab = (size_t)c->t->vocab_size;
    size_t n = largest_logits(logits, vocab, (size_t)whole(c, O_TOP), ids + 1);
    double sum = log_sum(logits, vocab);
    if (table) printf("rank       id  %-20s     logit  probability\n", "piece");
    for (size_t i = table; i <= n; i++) {
        double logit = (double)logits[ids[i]];
        if (i && ids[i] == chosen) continue;
        if (table) printf("%4zu %8d  ", i, ids[i]);
        else if (i) fputs("    ", stdout);
        print_piece(c, ids[i], i && !table ? 16 : 20);
        if (table) printf(" %9.4f", logit);
        printf(table ? " %12.6f\n" : " %.4f\n", exp(logit - sum));
    }
    return flush_stdout(c);
}

/* Makes the next token of the answer, and prints the text that it completes, as far as no stop text
 * can begin there. A tool may have put its own printing into c->piece. */
static int next_piece(command *c) {
    answer *a = &c->answer;
    int32_t id;
    const char *text;
    size_t n;
    /* With --top a pass without guesses, which leaves the logits of the choice where they are. */
    if (given(c, O_TOP) && process_prompt(c)) return c->e.code;
    if (medrun_next(c->s, &id, &text, &n, &c->e)) return c->e.code;
    a->n_answer++;
    a->ended = medrun_is_stop(c->m, id);
    if (c->piece) return c->piece(c, id, text, n);
    if (given(c, O_TOP)) return print_likely(c, c->s->logits, id);
    buffer_add(&a->held, text, n);
    return check_buffer(c, &a->held) ? c->e.code : print_held(c, a->ended);
}

/* What helps where the context is full. */
static const char *way_out(const command *c) {
    bool most = context_of(c) >= (size_t)c->m->config.max_positions;
    return most ? "the model was made for no longer one" : "-c asks for a longer one";
}

/* Answers what was fed, and prints the answer while it is made. First the model reads the prompt, a
 * batch in each pass (process_prompt). Then each step computes the pass that is pending, samples
 * one token from its logits and prints the piece (next_piece), until the model ends its turn, a
 * stop text comes, or -n tokens were made. What may be the beginning of a stop text is held back,
 * so no part of one is printed; it follows when the answer ends without it. Ctrl-C ends a step
 * before its next layer, and leaves pending what was: so the timeline never holds half a pass, and
 * a chat can go on. Who pressed it needs no message, and it must not stop the next answer. A full
 * context cuts the answer: MEDRUN_TOO_LONG. An answer ends its line, in a pipe, too. Of a chat
 * --save-prefix has the first prompt. */
static int print_reply(command *c) {
    answer *a = &c->answer;
    size_t most = c->number[O_PREDICT] < 0 ? SIZE_MAX : (size_t)c->number[O_PREDICT];
    const char *prefix = c->text[O_SAVE_PREFIX];
    *a = (answer){.n_prompt = medrun_pending(c->s)};
    c->s->lookup.guessed = c->s->lookup.right = 0;
    answering = c->s;
    signal_handler *before = on_signal(SIGINT, on_interrupt);
    double start = seconds();
    process_prompt(c);
    a->n_prompt -= medrun_pending(c->s);
    a->prompt_time = seconds() - start;
    if (!c->e.code && prefix) {
        c->text[O_SAVE_PREFIX] = NULL;
        if (!save_session(c->s, prefix, flag(c, O_FORCE), &c->e))
            note(c, "prefix: %zu tokens written to %s", medrun_length(c->s), prefix);
    }
    start = seconds();
    while (!c->e.code && !a->ended && a->n_answer < most) next_piece(c);
    if (!a->ended) print_held(c, true);
    if (a->mid_line) puts(""), a->mid_line = false;
    a->answer_time = seconds() - start;
    on_signal(SIGINT, before);
    c->s->pass.stop = false;
    buffer_free(&a->held);
    if (c->e.code == MEDRUN_INTERRUPTED) *c->e.text = 0;
    if (c->e.code == MEDRUN_TOO_LONG)
        snprintf(c->e.text, sizeof c->e.text, "the answer is cut: the context of %zu tokens is "
                 "full; %s", context_of(c), way_out(c));
    return c->e.code;
}

/* The first token of an answer comes out of the prompt's last pass. */
static void print_stats(const command *c) {
    const answer *a = &c->answer;
    char guesses[80] = "";
    if (whole(c, O_LOOKUP) > 0 || c->draft)
        snprintf(guesses, sizeof guesses, "; guessed %zu tokens, %zu right",
                 (size_t)c->s->lookup.guessed, (size_t)c->s->lookup.right);
    note(NULL, "prompt %zu tokens, %.1f tokens/s; answer %zu tokens, %.1f tokens/s; context %zu of "
         "%zu%s", a->n_prompt, (double)a->n_prompt / (a->prompt_time + 1e-9), a->n_answer,
         (double)(a->n_answer - (a->n_answer > 0)) / (a->answer_time + 1e-9), medrun_length(c->s),
         context_of(c), guesses);
}

/* Refuses a prompt of N tokens that leaves no place for an answer. */
static int too_long(command *c, size_t n) {
    return fail(&c->e, MEDRUN_TOO_LONG, "prompt %zu tokens > context %zu%s; shorten the text: %s",
                n, context_of(c), n > context_of(c) ? "" : " less one for the answer", way_out(c));
}

/* An editor ends each file with a line end, which nobody meant to say. */
static void drop_line_end(buffer *b) {
    if (b->n && b->data[b->n - 1] == '\n') b->n--;
    if (b->n && b->data[b->n - 1] == '\r') b->n--;
}

/* Does this option say what goes into the model? A flag beats the environment; of -p and -f, or of
 * two variables, both do. */
static bool is_source(const command *c, int id) {
    static const int all[] = {O_PROMPT, O_FILE, O_MESSAGES, O_IDS};
    int best = FROM_ENVIRONMENT;
    for (int i = 0; i < 4; i++) if (c->from[all[i]] > best) best = c->from[all[i]];
    return c->from[id] == best;
}

/* Reads -p, -f or both, the text before the file, or stdin into c->input. */
static int read_prompt(command *c) {
    bool text = is_source(c, O_PROMPT), file = is_source(c, O_FILE);
    const char *path = file ? c->text[O_FILE] : "-";
    if (c->e.code) return c->e.code;
    if (text) buffer_text(&c->input, c->text[O_PROMPT]);
    else if (!file && is_terminal(STDIN_FILENO))
        return USAGE(c, "no text: add \"TEXT\" or -f FILE, or pipe it in");
    if (text && !file) return check_buffer(c, &c->input);
    if (c->row->exact_text) return read_file(c, path, MOST_INPUT, &c->input);
    if (text) buffer_text(&c->input, "\n\n");
    read_text(c, path, most_prompt(c), &c->input);
    drop_line_end(&c->input);
    return c->e.code;
}

/* Some templates mark their turns with words, and the model cannot tell those from a text's own. */
static void warn_of_marks(const command *c, const char *text, size_t n) {
    const char *const *marks = c->chat->marks;
    for (int i = 0; marks[i]; i++)
        if (memmem(text, n, marks[i], strlen(marks[i])))
            note(c, "warning: the text holds \"%s\", with which template %s begins a turn: the "
                 "model takes it for one", marks[i], c->chat->name);
}

/* ---- run ----------------------------------------------------------------------------------- */

/* Renders the messages in node V of J, which came from WHAT; where OPEN, an answer is to follow. */
static int render_json(chat_writer *w, const json *j, uint32_t v, const char *what, bool open) {
    medrun_message *m = NULL;
    size_t n;
    buffer text = {0};
    if (!chat_messages(w->c, j, v, what, &m, &n, &text, w->e)) chat_render(w, m, n, open);
    free(m);
    return buffer_free(&text), w->e->code;
}

/* The ids of the whole prompt, as the options say, in c->ids; or its text, which people want to
 * see, AS_TEXT. */
static int make_prompt(command *c, bool as_text) {
    const char *system = given(c, O_SYSTEM) ? c->text[O_SYSTEM] : "", *ids = c->text[O_IDS];
    bool open = !flag(c, O_NO_OPENING);                 /* an answer is to follow                */
    const buffer *text = &c->input;
    json j = {0};
    chat_writer w = {c->chat, c->t, &c->chat_options, as_text, .out = &c->ids, .e = &c->e};
    if (c->e.code) return c->e.code;
    if (is_source(c, O_IDS)) return parse_ids(c, ids, strlen(ids), &c->ids);
    if (is_source(c, O_MESSAGES)) {
        if (!read_json(c, c->text[O_MESSAGES], &j)) warn_of_marks(c, j.text, j.nodes->end);
        if (!c->e.code) render_json(&w, &j, 0, c->text[O_MESSAGES], open);
        return json_free(&j), c->e.code;
    }
    if (read_prompt(c)) return c->e.code;
    if (!text->n) return USAGE(c, "the prompt is empty");
    medrun_message all[] = {{"system", system, strlen(system)}, {"user", chars(text), text->n}};
    size_t skip = given(c, O_SYSTEM) ? 0 : 1;           /* "" is an empty system text, not none  */
    if (!flag(c, O_RAW)) {
        warn_of_marks(c, chars(text), text->n);
        return chat_render(&w, all + skip, 2 - skip, open);
    }
    int bos = c->chat_options.bos;
    bool add = bos == MEDRUN_BOS_AUTO ? c->t->add_bos : bos == MEDRUN_BOS_ON;
    return tokenizer_encode(c->t, chars(text), text->n, add ? MEDRUN_ADD_BOS : 0, &c->ids, &c->e);
}

/* SHA-256 of the logits after the timeline, also one that Ctrl-C ended. */
static int hash_logits(command *c, char hex[65]) {
    uint8_t digest[32];
    if (c->e.code || process_prompt(c)) return c->e.code;
    sha256_of(medrun_logits(c->s, 0), (size_t)c->t->vocab_size * sizeof(float), digest);
    return hex_of(digest, hex), MEDRUN_OK;
}

/* Answers the prompt c->ids. */
static int answer_ids(command *c) {
    if (c->e.code) return c->e.code;
    if (n_ids(&c->ids) >= context_of(c)) return too_long(c, n_ids(&c->ids));
    if (feed_prompt(c, ids_of(&c->ids), n_ids(&c->ids))) return c->e.code;
    int code = print_reply(c);
    bool told = !code || code == MEDRUN_INTERRUPTED || code == MEDRUN_TOO_LONG;
    if (told && flag(c, O_STATS)) print_stats(c);
    return code;
}

static int run_command(command *c) {
    open_model(c);
    choose_chat(c);
    make_prompt(c, false);
    start_session(c);
    return answer_ids(c);
}

/* ---- show ---------------------------------------------------------------------------------- */

/* A line: its label, if any, and what may be text from a checkpoint. */
MEDRUN_PRINTF_LIKE(3, 4)
static void show(FILE *f, const char *label, const char *format, ...) {
    char text[16384];
    text_line l = {.width = width_of(fileno(f)), .indent = 13};
    va_list args;
    int n = label ? snprintf(text, sizeof text, "%-13s", label) : 0;
    va_start(args, format);
    vsnprintf(text + n, sizeof text - (size_t)n, format, args);
    va_end(args);
    make_safe(text);
    print_words(f, &l, text, strlen(text));
    fputs(text[n] ? "\n" : "-\n", f);
}

/* The files that the checkpoint was made from, and its own hash. Nothing depends on these lines, so
 * an entry that is malformed is left out. */
static void show_sources(FILE *f, const medrun_model *m) {
    const json *j = &m->file.header;
    uint32_t from = json_get(j, 0, "provenance"), all = json_get(j, from, "sources"), v = all + 1;
    uint32_t n = json_is_type(j, all, JSON_ARRAY) ? j->nodes[all].count : 0;
    char text[256], hash[65];
    for (uint32_t i = 0; i < n; i++, v = j->nodes[v].next) {
        medrun_error e = {0};
        json_text(j, v, "", "file", text, sizeof text, &e);
        json_text(j, v, "", "sha256", hash, sizeof hash, &e);
        int64_t bytes = json_int(j, v, "", "bytes", 0, 1ll << 52, &e);
        if (!e.code)
            show(f, i ? "" : "sources", "%s, %lld bytes, %s", text, (long long)bytes, hash);
    }
    if (!json_text(j, from, "", "precision", text, sizeof text, &(medrun_error){0}))
        show(f, "made from", "%s", text);
    hex_of(m->file.hash, hash);
    show(f, "hash", "%s", hash);
}

static double mb(uint64_t bytes) { return (double)bytes / 0x1p20; }

/* The bytes of the keys and values of CONTEXT positions. */
static uint64_t cache_size(const medrun_model *m, int context, int kv) {
    kv_cache cache;
    arena a = {0};
    layout_cache(&cache, &m->config, context, kv, &a);
    return a.at;
}

/* Prints the memory that a session with these options needs, and what the machine has. Weights are
 * pages of a file: they can be dropped and read again. A session has no other place, so it must fit
 * all by itself. */
static void show_memory(FILE *f, const medrun_model *m, const medrun_session_options *o) {
    machine_limits l = limits_of_machine();
    const char *limit;
    uint64_t total = (uint64_t)l.memory, available = (uint64_t)l.available;
    uint64_t weights = m->file.map.n, session = session_needs(m, o);
    uint64_t cache = cache_size(m, o->context, o->kv), all = weights + session;
    int other = o->kv == MEDRUN_KV_INT8 ? MEDRUN_KV_F16 : MEDRUN_KV_INT8;
    const char *verdict = all <= available ? "it fits" :
        all <= total ? "it fits when other programs leave" :
        session <= total ? "the weights do not fit and would be read again for each token" :
        "it does not fit; ask for a smaller context (-c)";
    show(f, "memory", "%9.1f MB weights, mapped from the file", mb(weights));
    show(f, "", "%9.1f MB key-value cache, context %d, %s (with --kv %s %.1f MB)", mb(cache),
         o->context, kv_names[o->kv], kv_names[other], mb(cache_size(m, o->context, other)));
    show(f, "", "%9.1f MB scratch", mb(session - cache));
    show(f, "", "%9.1f MB in all, of %.1f MB%s; %.1f MB are free: %s", mb(all), mb(total),
         l.of_group ? " (the control group's limit)" : "", mb(available), verdict);
    int threads = default_threads(&limit);
    show(f, "threads", limit ? "%d (%s)" : "%d", threads, limit);
}

/* One screen, so that it can be read at once; what only a script compares needs -v. */
static int show_model(FILE *f, command *c, int context) {
    const medrun_model *m = c->m;
    const medrun_sampling *s = &m->sampling;
    medrun_info info;
    medrun_session_options wanted = session_options(c, context), o;
    buffer config = {0}, lacks = {0}, stops = {0};
    if (resolve_options(m, &wanted, &o, &c->e)) return c->e.code;
    medrun_describe(m, &info);
    describe_config(&config, &m->config, m->architecture, type_names[m->type], m->parameters, 13);
    for (int b = 0; b < 256; b++)
        if (m->tokenizer.byte_id[b] == NO_ID) buffer_printf(&lacks, "%02x ", (unsigned)b);
    for (int i = 0; i < m->n_stops; i++) {
        size_t n;
        const char *piece = tokenizer_piece(&m->tokenizer, m->stops[i], &n);
        buffer_printf(&stops, "%s%d %.*s", i ? ", " : "", m->stops[i], (int)n, piece);
    }
    show(f, "file", "%s", m->path);
    show(f, "name", "%s", m->name);
    for (const char *line = chars(&config), *end; (end = strchr(line, '\n')); line = end + 1)
        show(f, NULL, "%.*s", (int)(end - line), line);
    if (lacks.n) show(f, "lacks bytes", "%s(hexadecimal; left out of texts)", chars(&lacks));
    show(f, "template", "%s", m->template_name);
    show(f, "system", "%s", info.system);
    show(f, "stops", "%s", chars(&stops));
    show(f, "sampling", "temperature %g, top-k %d, top-p %g, min-p %g, repeat-penalty %g",
         (double)s->temperature, s->top_k, (double)s->top_p, (double)s->min_p,
         (double)s->repeat_penalty);
    show(f, "licence", "%s", m->licence);
    show(f, "notice", "%s", m->notice);
    if (flag(c, O_VERBOSE)) show_sources(f, m);
    show_memory(f, m, &o);
    return buffer_free(&config), buffer_free(&lacks), buffer_free(&stops), MEDRUN_OK;
}

static int show_command(command *c) {
    return open_model(c) ? c->e.code : show_model(stdout, c, choose_context(c));
}

/* ---- the line editor ----------------------------------------------------------------------- */

/* One line of text, drawn on stderr because stdout is for the answers. It stays on one row of the
 * terminal: a long line is seen through a window that follows the cursor. So a redraw touches no
 * other row, however long the line is. Each key redraws all of it: what is seen cannot differ from
 * what is kept. Windows edits lines itself. */
enum { HISTORY = 100 };

/* The first of the lines is the one that is typed, with the cursor at a byte of it; behind it stand
 * those before it, from which it may be copied: from the one that is shown. They are never written
 * to a file, for they hold what patients said. What was typed AHEAD of the prompt is TAKEN so far.
 * At the start of a line Tab completes the commands. On a plain terminal nothing can be drawn. */
typedef struct {
    buffer lines[HISTORY + 1], ahead;
    size_t at, taken;
    int shown;
    const char *prompt;
    bool plain, colour;
    const command_row *commands;
} editor;

/* A key is a byte or EOF; CTRL + 'A' is a byte, too. But arrows and the like send ESC [ or ESC O,
 * numbers, and a letter (here ESC + 'A') or ~ (TILDE + 3). */
enum { CTRL = -'@', ESC = 256, TILDE = 512, PASTE = TILDE + 200, PASTED };

static int next_byte(editor *ed) {
    return ed->taken < ed->ahead.n ? ed->ahead.data[ed->taken++] : typed_byte();
}

/* What was typed while the terminal was still raw waits as it came: a Ctrl-C among it was meant to
 * stop the answer to the line before it, and takes back what stands before it, as elsewhere. */
static void take_ahead(editor *ed) {
    if (ed->taken == ed->ahead.n) ed->taken = ed->ahead.n = 0;
    while (more_is_typed()) {
        char byte = (char)typed_byte();
        buffer_add(&ed->ahead, &byte, 1);
        if (byte != CTRL + 'C') continue;
        ed->taken = ed->ahead.n;
        on_interrupt(0);
    }
}

/* Of several numbers only the last counts: so Ctrl-Left, ESC [1;5D, is Left. Any other
 * ESC gives ESC alone: no key. */
static int read_key(editor *ed) {
    int c = next_byte(ed), number = 0;
    if (c != 27) return c;
    c = next_byte(ed);
    if (c != '[' && c != 'O') return c == EOF ? EOF : ESC;
    while ((c = next_byte(ed)) != EOF && c < 0x40)
        number = isdigit(c) ? (number * 10 + c - '0') % 1000 : 0;
    return c == EOF ? EOF : c == '~' ? TILDE + number : ESC + c;
}

/* Draws what the window shows of the line, or all of it when it is DONE. What stands before the
 * cursor fills at most three quarters, so that some of what follows is seen, too. A pasted line end
 * belongs to the text and shows as an arrow, a hostile character as ?. All goes out
 * in one write: so nothing flickers. */
static void draw_line(const editor *ed, bool done) {
    const char *text = chars(ed->lines);
    int width = terminal_columns();
    size_t n = ed->lines->n, left = strlen(ed->prompt), start = 0, used = 0, before = 0, columns;
    size_t room = done ? SIZE_MAX : (width > 10 ? (size_t)width : 80) - left - 1;
    buffer out = {0};
    /* The columns before the cursor; then the window begins further right, till they are few. */
    for (size_t i = 0; i < ed->at; before += columns) i += measure(text + i, n - i, &columns);
    for (; before > room / 4 * 3; before -= columns)
        start += measure(text + start, n - start, &columns);
    buffer_printf(&out, ed->colour ? "\r\x1b[1m%s\x1b[0m" : "\r%s", ed->prompt);
    for (size_t i = start, len; i < n; i += len) {
        char shown[8] = "\xE2\x86\xB5";
        len = measure(text + i, n - i, &columns);
        if ((used += columns) > room) break;
        if (text[i] != '\n') memcpy(shown, text + i, len), shown[len] = 0, make_safe(shown);
        buffer_text(&out, shown);
    }
    if (done) buffer_text(&out, "\x1b[K\n");
    else buffer_printf(&out, "\x1b[K\r\x1b[%zuC", left + before);
    fwrite(chars(&out), 1, out.n, stderr);
    buffer_free(&out);
}

/* All editing: N bytes take the place of those from FROM to TO, the cursor stands behind them. Of
 * a failure read_message tells. */
static void replace(editor *ed, size_t from, size_t to, const char *bytes, size_t n) {
    buffer *line = ed->lines;
    if (!buffer_room(line, n)) return;
    memmove(line->data + from + n, line->data + to, line->n - to);
    memcpy(line->data + from, bytes, n);
    line->n += n - (to - from);
    line->data[line->n] = 0;
    ed->at = from + n;
}

/* Shows an older line (STEP 1) or a newer one (STEP -1); behind the newest is an empty one. It is a
 * copy that can be edited: the history stays as it was typed. */
static void recall(editor *ed, int step) {
    int place = ed->shown + step;
    if (place < 0 || place > HISTORY || (place && !ed->lines[place].n)) return;
    replace(ed, 0, ed->lines->n, chars(&ed->lines[place]), place ? ed->lines[place].n : 0);
    ed->shown = place;
}

/* A path of N bytes as a person types it: ~ is the home folder, which no shell has put there. */
static void expand_path(const char *path, size_t n, buffer *out) {
    const char *home = getenv("HOME");
    bool tilde = home && n && path[0] == '~' && (n == 1 || path[1] == '/');
    if (tilde) buffer_text(out, home);
    buffer_add(out, path + tilde, n - tilde);
}

/* What the line holds before the cursor: in a command, its name or, behind a blank, a path. Tab
 * completes it as far as all that begin so agree; where that is not further, it lists them. In the
 * pattern ? stands for what would have a meaning there, so it finds no path too few; those too many
 * are left out as other commands are. */
static void complete(editor *ed) {
    const char *line = chars(ed->lines), *blank = memchr(line, ' ', ed->at), *all;
    const command_row *row = ed->commands;
    size_t start = blank ? (size_t)(blank + 1 - line) : 0, n = 0, shared = 0, n_paths = 0;
    buffer word = {0}, pattern = {0}, list = {0};
    if (*line != '/') return;
    expand_path(line + start, ed->at - start, &word);
    buffer_printf(&pattern, "%s*", chars(&word));
    for (size_t i = 0; i + 1 < pattern.n; i++)
        if (strchr("*[\\", pattern.data[i])) pattern.data[i] = '?';
    char **path = blank ? find_paths(chars(&pattern), &n_paths) : NULL;
    /* SHARED: as far as all agree with the first of the list. */
    while ((all = !blank ? (row++)->name : n_paths-- ? *path++ : NULL)) {
        if (strncmp(all, chars(&word), word.n)) continue;
        if (!n++) shared = strlen(all);
        buffer_printf(&list, "%s  ", all);
        while (strncmp(all, chars(&list), shared)) shared--;
    }
    if (n == 1 || shared > word.n) {
        replace(ed, start, ed->at, chars(&list), shared);
        if (n == 1 && !blank) replace(ed, ed->at, ed->at, " ", 1);
    } else if (n) {
        draw_line(ed, true);
        print_words(stderr, &(text_line){.width = width_of(STDERR_FILENO)}, chars(&list), list.n);
        fputc('\n', stderr);
    }
    buffer_free(&word), buffer_free(&pattern), buffer_free(&list);
}

/* The keys of Emacs, as in a shell, and those with names. BACK, ON and WORD are where a character
 * before or behind the cursor and a word before it end: in UTF-8 all bytes of a character but the
 * first are 10xxxxxx. One of several bytes is typed as so many keys. */
static void edit(editor *ed, int key) {
    const uint8_t *line = ed->lines->data;
    size_t n = ed->lines->n, at = ed->at, back = at, on = at, word = at;
    if (back) do back--; while (back && (line[back] & 0xC0) == 0x80);
    if (on < n) do on++; while (on < n && (line[on] & 0xC0) == 0x80);
    while (word && isspace(line[word - 1])) word--;
    while (word && !isspace(line[word - 1])) word--;
    switch (key) {
        case ESC + 'D': case CTRL + 'B': ed->at = back; break;
        case ESC + 'C': case CTRL + 'F': ed->at = on; break;
        case ESC + 'H': case TILDE + 1: case TILDE + 7: case CTRL + 'A': ed->at = 0; break;
        case ESC + 'F': case TILDE + 4: case TILDE + 8: case CTRL + 'E': ed->at = n; break;
        case ESC + 'A': case CTRL + 'P': recall(ed, 1); break;
        case ESC + 'B': case CTRL + 'N': recall(ed, -1); break;
        case TILDE + 3: case CTRL + 'D': replace(ed, at, on, "", 0); break;
        case 127: case CTRL + 'H': replace(ed, back, at, "", 0); break;
        case CTRL + 'K': replace(ed, at, n, "", 0); break;
        case CTRL + 'U': replace(ed, 0, at, "", 0); break;
        case CTRL + 'W': replace(ed, word, at, "", 0); break;
        case CTRL + 'L': fputs("\x1b[H\x1b[2J", stderr); break;
        case CTRL + 'Z': set_raw(false), suspend_program(), set_raw(true); break;
        case '\t': complete(ed); break;
        default: if (key >= ' ' && key < ESC) replace(ed, at, at, &(char){(char)key}, 1);
    }
}

/* Reads keys until the line is entered or given up (Ctrl-C), or nothing more will come (EOF; Ctrl-D
 * in an empty line); gives that key. Draws when no more waits: so a paste is drawn once. */
static int edit_line(editor *ed) {
    for (bool pasting = false;;) {
        if (ed->taken == ed->ahead.n && !more_is_typed()) draw_line(ed, false);
        int key = read_key(ed);
        if (key == CTRL + 'D' && !ed->lines->n) key = EOF;
        if (key == PASTE || key == PASTED) pasting = key == PASTE;
        else if (pasting && key > 0 && key < ESC)
            replace(ed, ed->at, ed->at, &(char){(char)(key == '\r' ? '\n' : key)}, 1);
        else if (key != '\r' && key != '\n' && key != CTRL + 'C' && key != EOF) edit(ed, key);
        else return draw_line(ed, true), key;
    }
}

/* Reads a line; the one before becomes history. The terminal is raw only meanwhile, so an answer
 * can be stopped with Ctrl-C, from Enter on. Where nothing can be drawn (TERM=dumb, Windows) the
 * terminal's own editing must do: a line comes whole. */
static int read_line(editor *ed, const char *prompt) {
    buffer *line = ed->lines;
    int key;
    if (line->n || line->failed) {
        buffer_free(&ed->lines[HISTORY]);
        memmove(line + 1, line, HISTORY * sizeof *line);
        *line = (buffer){0};
    }
    ed->at = 0, ed->shown = 0, ed->prompt = prompt;
    on_signal(SIGINT, on_fatal_signal);
    ed->plain |= !ed->plain && !set_raw(true);
    if (!ed->plain) key = edit_line(ed);
    else {
        fputs(prompt, stderr);
        while ((key = next_byte(ed)) != EOF && key != '\n')
            buffer_add(line, &(char){(char)key}, 1);
        drop_line_end(line);
        if (line->n) key = '\n';
    }
    if (key == CTRL + 'C') line->n = 0;
    answering->pass.stop = false;
    on_signal(SIGINT, on_interrupt);
    set_raw(false);
    take_ahead(ed);
    return key;
}

/* Reads a message: a line, or several lines from """ to """. Gives the key that ended it. If a line
 * failed, so did the message: what was typed is not whole. */
static int read_message(editor *ed, buffer *m) {
    static const char quotes[] = "\"\"\"";
    m->n = 0;
    for (bool several = false, over = false; !over;) {
        int key = read_line(ed, several ? ". " : "> ");
        const char *line = chars(ed->lines);
        size_t n = ed->lines->n;
        if (key == EOF || key == CTRL + 'C') return key;
        if (several) buffer_text(m, m->n ? "\n" : "");
        else if (n >= 3 && !memcmp(line, quotes, 3)) several = true, line += 3, n -= 3;
        over = !several || (n >= 3 && !memcmp(line + n - 3, quotes, 3));
        buffer_add(m, line, over && several ? n - 3 : n);
        m->failed |= ed->lines->failed;
    }
    return '\n';
}

/* ---- chat ---------------------------------------------------------------------------------- */

static const char not_a_clinician[] = "For research and education. Not a clinician; do not use it "
                                      "to decide about anyone's care.";

/* A conversation is one timeline of tokens: the system text, then a person's turn and the answer in
 * turn. Only new tokens are computed; the key-value cache keeps the rest. To take a turn back is to
 * keep those before it, and to answer again is to keep what stands before the answer: so of the
 * past a chat knows only where each person's turn starts, behind the last of them the end, and
 * where the last answer does (0: there is none to make again). It counts Ctrl-C since the last
 * message. The text is what stands behind the command that is carried out. */
static struct {
    editor ed;
    buffer system;
    size_t *starts, n_turns, answer;
    int interrupts;
    bool leave;
    char *text;
} talk;

static const char chat_full[] = "the conversation is full: /clear begins a new one, "
                                "--overflow drop forgets the oldest turns";

/* Forgets all but the first N turns; without a turn the next message says the system text again.
 * What stays ends with an answer whose stop token is gone, which the next turn will close. */
static int keep_turns(command *c, size_t n) {
    rewind_to(c->s, n ? talk.starts[n] : 0);
    c->s->answer_open = n > 0;
    talk.n_turns = n;
    talk.answer = 0;
    return MEDRUN_OK;
}

/* Makes room for NEED tokens and an answer, with --overflow drop by forgetting the oldest turns;
 * what stands before them, the system text, stays. What follows them moves to other positions, and
 * a key holds its position (rotary embedding): so those tokens are fed again. As that takes its
 * time, enough turns go to leave a quarter of the context, not a few tokens. */
static int make_room(command *c, size_t need) {
    size_t context = context_of(c), length = medrun_length(c->s), *starts = talk.starts;
    size_t first = talk.n_turns ? starts[0] : length, gone = 0, k = 0;
    starts[talk.n_turns] = length;
    while (flag(c, O_OVERFLOW) && k < talk.n_turns && length - gone + need > context - context / 4)
        gone = starts[++k] - first;
    if (first + need >= context) return too_long(c, first + need);
    if (length - gone + need >= context) return fail(&c->e, MEDRUN_TOO_LONG, "%s", chat_full);
    if (!k) return MEDRUN_OK;
    note(NULL, "(forgot %zu of the oldest turns, %zu tokens)", k, gone);
    talk.n_turns -= k;
    for (size_t i = 0; i < talk.n_turns; i++) starts[i] = starts[i + k] - gone;
    rewind_to(c->s, first);
    return medrun_feed(c->s, medrun_tokens(c->s) + first + gone, length - first - gone, &c->e);
}

/* Answers what was fed. An answer that Ctrl-C stopped stays in the conversation as far as it came;
 * if no token came, the message is taken back, too. However an answer ended, the next turn closes
 * it. Another Ctrl-C leaves: who presses it twice wants to. */
static int answer_turn(command *c) {
    talk.answer = medrun_length(c->s);
    print_reply(c);
    c->s->answer_open = true;
    if (flag(c, O_STATS)) print_stats(c);
    if (c->e.code == MEDRUN_TOO_LONG && !flag(c, O_OVERFLOW))
        snprintf(c->e.text, sizeof c->e.text, "the answer is cut: %s", chat_full);
    if (c->e.code != MEDRUN_INTERRUPTED) return c->e.code;
    c->e = (medrun_error){0};
    talk.interrupts = 1;
    note(NULL, "(stopped%s)", c->answer.n_answer ? "" : "; your message is forgotten");
    return c->answer.n_answer ? MEDRUN_OK : keep_turns(c, talk.n_turns - 1);
}

/* Puts a person's turn on the timeline, as medrun_say does, and answers it. It begins with what the
 * template writes after an answer, in the place of the answer's stop token. Before it is fed, old
 * turns may have to go. If the answer that the turn closes went with them, nothing is to close. All
 * checks come before the stop token goes: what cannot be said leaves everything as it was. */
static int say(command *c, const buffer *text) {
    const char *own = c->text[O_SYSTEM];
    const medrun_message said = {"user", chars(text), text->n};
    const medrun_message system = {"system", own, own ? strlen(own) : 0};
    conversation how = {c->chat, &c->chat_options, own ? &system : NULL, true};
    new_turn t = {0};
    if (check_buffer(c, text)) return c->e.code;
    warn_of_marks(c, chars(text), text->n);
    render_turn(c->s, &how, &said, &t, &c->e);
    bool stop = t.keep < medrun_length(c->s);
    if (!c->e.code && !make_room(c, n_ids(&t.ids))) {
        size_t skip = talk.n_turns ? 0 : t.n_close, n = n_ids(&t.ids) - skip;
        if (stop && talk.n_turns) rewind_to(c->s, medrun_length(c->s) - 1);
        talk.starts[talk.n_turns] = medrun_length(c->s) + t.n_open;
        if (!feed_prompt(c, ids_of(&t.ids) + skip, n)) talk.n_turns++;
    }
    return buffer_free(&t.ids), c->e.code ? c->e.code : answer_turn(c);
}

/* ---- what is typed with / ------------------------------------------------------------------ */

/* Each gives the code in c->e, where also what failed within stays; chat_loop says it. */
static int chat_bye(command *c) { return (void)c, talk.leave = true, MEDRUN_OK; }

/* For /system, too, whose text is in talk.text. */
static int chat_clear(command *c) {
    note(NULL, "the conversation is empty now%s", *talk.text ? ", its system text is new" : "");
    return keep_turns(c, 0);
}

/* The system text of the next conversation, which begins now. Without memory the old one stays. */
static int chat_system(command *c) {
    buffer fresh = {0};
    buffer_text(&fresh, talk.text);
    if (check_buffer(c, &fresh)) return c->e.code;
    buffer_free(&talk.system);
    talk.system = fresh;
    c->text[O_SYSTEM] = fresh.n ? chars(&talk.system) : NULL;
    return chat_clear(c);
}

static int chat_undo(command *c) {
    if (!talk.n_turns) return USAGE(c, "/undo: nothing was said");
    keep_turns(c, talk.n_turns - 1);
    note(NULL, "took back the last message and its answer; %zu tokens are left",
         medrun_length(c->s));
    return MEDRUN_OK;
}

/* The prompt is in the cache: only its last token is computed again, for the logits. */
static int chat_retry(command *c) {
    if (!talk.answer) return USAGE(c, "/retry: nothing was said");
    rewind_to(c->s, talk.answer);
    return answer_turn(c);
}

/* NAME VALUE, also with = or dashes: one of the options from --predict to --seed. The number is
 * kept, its text is not: that ends with the line. */
static int chat_set(command *c) {
    const char *text = talk.text + strspn(talk.text, "-");
    int n = (int)strcspn(text, " =");
    const char *value = text + n + strspn(text + n, " =");
    char name[48];
    snprintf(name, sizeof name, "--%.*s", n, text);
    int id = find_option(c->p, name, own_bit(c));
    if (id < O_PREDICT || id > O_SEED || !*value)
        return USAGE(c, "/set: wanted predict, temp, top-k, top-p, min-p, repeat-penalty or seed, "
                     "and a number");
    if (set_option(c, id, value, FROM_FLAG, name)) return c->e.code;
    note(NULL, "%s is %s now", c->p->options[id].name, value);
    c->text[id] = NULL;
    choose_sampling(c);
    c->s->options.sampling = c->sampling;
    if (id == O_SEED) c->s->random = c->sampling.seed;
    return MEDRUN_OK;
}

/* Cuts TEXT before the WORD of N bytes. Gives what stands behind the word, or NULL without one. */
static char *cut_at(char *text, const char *word, size_t n) {
    char *at = text && n ? memmem(text, strlen(text), word, n) : NULL;
    if (!at) return NULL;
    *at = 0;
    return at + n;
}

/* Prints the conversation as people read it, or only its LAST turn. Who says what is seen from the
 * template's words around a message, as it stands on the timeline also after /load. An answer ends
 * before the first stop token. A template without such words has its talk printed as it stands. NUL
 * prints as ? anyway. */
static int print_talk(command *c, FILE *f, bool last) {
    static const char mark[] = "MESSAGE";
    buffer all = {0}, words = {0}, out = {0};
    chat_writer w = {c->chat, c->t, &c->chat_options, true, .out = &words, .e = &c->e};
    chat_turn(&w, &(medrun_message){"user", mark, sizeof mark - 1}, false, true);
    tokenizer_decode(c->t, medrun_tokens(c->s), medrun_length(c->s), true, &all);
    for (size_t i = 0; i < all.n; i++) if (!all.data[i]) all.data[i] = '?';
    char *open = (char *)words.data, *shut = cut_at(open, mark, sizeof mark - 1), *reply, *next;
    char *said = shut ? cut_at((char *)all.data, open, strlen(open)) : NULL;
    /* Words, message, words, answer. */
    for (; said && (reply = cut_at(said, shut, strlen(shut))); said = next) {
        next = cut_at(reply, open, strlen(open));
        for (int i = 0; i < c->m->n_stops; i++) {
            size_t n;
            const char *piece = tokenizer_piece(c->t, c->m->stops[i], &n);
            cut_at(reply, piece, n);
        }
        if (last) out.n = 0;
        buffer_printf(&out, "You: %s\n\nModel: %s\n\n", said, reply);
    }
    if (!out.n) buffer_text(&out, chars(&all));
    if (!check_buffer(c, &all) && !check_buffer(c, &out))
        print_words(f, &(text_line){.width = width_of(fileno(f))}, chars(&out), out.n);
    return buffer_free(&all), buffer_free(&words), buffer_free(&out), c->e.code;
}

/* Its first line tells a file of /text from a stranger's, which is not written over. */
static int chat_text(command *c) {
    static const file_kind kind = {"a talk that /text wrote", "medrun: a talk w", true, false, 0};
    file_writer w;
    if (open_output(c, &w, talk.text, &kind)) return c->e.code;
    fprintf(w.f, "medrun: a talk with %s. For research and education.\n\n", c->m->name);
    print_talk(c, w.f, false);
    if (!writer_done(&w, &c->e)) note(NULL, "wrote the conversation to %s", talk.text);
    return c->e.code;
}

/* For /load: tokens, cache, the sampler's state. */
static int chat_save(command *c) {
    if (!check_output(c, talk.text, &session_file) &&
        !save_session(c->s, talk.text, flag(c, O_FORCE), &c->e))
        note(NULL, "saved %zu tokens to %s", medrun_length(c->s), talk.text);
    return c->e.code;
}

/* Nobody knows where the turns of a loaded conversation begin: all of it counts as one. */
static int chat_load(command *c) {
    keep_turns(c, 0);
    if (medrun_restore(c->s, talk.text, &c->e)) return c->e.code;
    note(NULL, "loaded %zu tokens from %s", medrun_length(c->s), talk.text);
    talk.n_turns = medrun_length(c->s) > 0;
    talk.starts[0] = medrun_tokens(c->s)[0] == c->t->bos;
    return print_talk(c, stderr, true);
}

/* FILE, whose name may hold blanks, and behind it a question about it, which is said first. The
 * name is the longest beginning that is a file's; if none is, its first word is what cannot be
 * opened. */
static int chat_read(command *c) {
    char *path = talk.text, *end = path + strlen(path), *blank;
    buffer said = {0};
    file_facts f;
    while (get_facts(path, -1, &f) && (blank = strrchr(path, ' '))) *blank = 0;
    char *question = path + strlen(path);
    for (char *p = question + 1; p < end; p++) if (!*p) *p = ' ';
    if (question < end) buffer_printf(&said, "%s\n\n", question + 1);
    read_text(c, path, most_prompt(c), &said);
    drop_line_end(&said);
    say(c, &said);
    return buffer_free(&said), c->e.code;
}

static int chat_help(command *c) {
    for (const command_row *r = talk.ed.commands; r->name; r++) {
        char left[40];
        if (talk.ed.plain && !strcmp(r->name, "Tab")) continue;
        snprintf(left, sizeof left, "%s %s", r->name, r->arguments);
        print_help(stderr, left, 24, r->help);
    }
    print_help(stderr, "", 0, "A message that begins with / needs a space before it.");
    return c->e.code;
}

static int chat_stats(command *c) { return print_stats(c), MEDRUN_OK; }
static int chat_show(command *c) { return show_model(stderr, c, (int)context_of(c)); }

/* What can be typed, and what becomes of it. A FILE comes with its ~ replaced; an argument in
 * brackets may be left out. Those without a function are keys, for /help alone. */
static const command_row chat_commands[] = {
    {"/help", chat_help, "", "this list", .also = "/?"},
    {"/bye", chat_bye, "", "leave, as Ctrl-D or the word exit", .also = "/quit|/exit|/q"},
    {"/clear", chat_clear, "", .help = "forget the conversation"},
    {"/undo", chat_undo, "", .help = "take back the last message and its answer"},
    {"/retry", chat_retry, "", .help = "answer the last message again"},
    {"/read", chat_read, "FILE [QUESTION]", .help = "say the question and what stands in the file"},
    {"/system", chat_system, "[TEXT]", .help = "begin a new conversation with this system text"},
    {"/set", chat_set, "NAME VALUE",
        .help = "change temp, top-k, top-p, min-p, repeat-penalty, seed or predict"},
    {"/save", chat_save, "FILE", .help = "write the conversation, with all that was said in it"},
    {"/load", chat_load, "FILE", .help = "go on with one that was saved"},
    {"/text", chat_text, "FILE", .help = "write the conversation as plain text"},
    {"/stats", chat_stats, "", .help = "speeds, and how full the context is"},
    {"/show", chat_show, "", .help = "the model and what it needs"},
    {"\"\"\"", NULL, "", .help = "begins and ends a message of several lines"},
    {"Tab", NULL, "", .help = "completes commands and paths"},
    {"Ctrl-C", NULL, "", .help = "stops the answer; twice: leave"}, {0}};

/* Does what LINE says, which begins with /. A word that nobody knows gets the nearest one as a
 * hint, so that no slip of the fingers is said to the model. */
static int chat_command(command *c, char *line) {
    size_t n = strcspn(line, " \t\n"), end = strlen(line);
    buffer path = {0};
    while (end > n && isspace((uint8_t)line[end - 1])) line[--end] = 0;
    talk.text = line + n + (line[n] != 0);
    line[n] = 0;
    const command_row *r = find_command(chat_commands, line);
    if (!r) return unknown_command(c, chat_commands, line);
    const char *wanted = r->arguments;
    if (*talk.text ? !*wanted : *wanted && *wanted != '[')
        return USAGE(c, "%s: wanted %s", line, *wanted ? wanted : "no more");
    if (*wanted == 'F') {
        expand_path(talk.text, strlen(talk.text), &path);
        talk.text = (char *)path.data;
    }
    if (!check_buffer(c, &path)) r->run(c);
    return buffer_free(&path), c->e.code;
}

/* Does what each message says until the person leaves. What fails is said, and the conversation
 * goes on: it must not end with a mistyped path. A failure without a text is that stdout is
 * gone. */
static int chat_loop(command *c) {
    buffer *m = &c->input;
    int key;
    while (!talk.leave && !c->e.code && (key = read_message(&talk.ed, m)) != EOF) {
        talk.interrupts = key == CTRL + 'C' ? talk.interrupts + 1 : 0;
        if (talk.interrupts > 1) return quit(c, MEDRUN_INTERRUPTED);
        if (talk.interrupts) note(NULL, "(Ctrl-C once more, or Ctrl-D, leaves)");
        else if (m->failed)
            fail(&c->e, MEDRUN_NO_MEMORY, "out of memory: the message was not taken");
        else if (m->n && m->data[0] == '/') chat_command(c, (char *)m->data);
        else if (m->n && place_in("exit|quit", chars(m)) >= 0) talk.leave = true;
        else if (m->n) say(c, m);
        if (m->failed) buffer_free(m);
        if (!*c->e.text) continue;
        note(NULL, "%s", c->e.text);
        c->e = (medrun_error){0};
    }
    return c->e.code;
}

/* The chat command. If nobody types, it answers what is on stdin. A bad file of --load-prefix is
 * refused before the person types: no token is taken, but its head is read and checked. */
static int converse_command(command *c) {
    const char *no_colour = getenv("NO_COLOR"), *prefix = c->text[O_LOAD_PREFIX];
    bool draws = terminal_draws(getenv("TERM")), colour = draws && !(no_colour && *no_colour);
    if (!is_terminal(STDIN_FILENO)) return run_command(c);
    open_model(c);
    choose_chat(c);
    if (start_session(c)) return c->e.code;
    size_t room = context_of(c) + 1, taken;
    talk.ed = (editor){.plain = !draws, .colour = colour, .commands = chat_commands};
    talk.starts = new_array(room, sizeof *talk.starts);
    if (!talk.starts) return out_of_memory(&c->e, room * sizeof *talk.starts);
    answering = c->s;
    if (colour) fputs("\x1b[33m", stderr);
    note(NULL, "%s", not_a_clinician);
    if (colour) fputs("\x1b[0m", stderr);
    note(c, "/help lists what can be typed.");
    if (prefix) medrun_feed_saved(c->s, NULL, 0, prefix, &taken, &c->e);
    if (given(c, O_PROMPT) || given(c, O_FILE)) read_prompt(c);
    if (c->input.n) say(c, &c->input);
    return chat_loop(c);                        /* what `talk` holds ends with the program       */
}

/* ---- verify -------------------------------------------------------------------------------- */

/* Prints a comparison that failed, and with -v also one that did not. */
static bool report(const command *c, const char *kind, const char *name, const char *expected,
                   const char *found) {
    bool same = !strcmp(expected, found);
    if (!same) printf("%-10s %s DIFFERS: expected %s, found %s\n", kind, name, expected, found);
    else if (flag(c, O_VERBOSE)) printf("%-10s %s: the same\n", kind, name);
    return same;
}

/* A part of the file whose SHA-256 the header states in an entry, node V. */
typedef struct { uint32_t v; char found[65]; } hashed;

typedef struct {
    const model_file *f;
    hashed *all;                                /* (n) the tensors, and the tokenizer           */
    size_t n;
    atomic_size_t done;
    bool show;
} hash_job;

/* Hashes some of the parts; opening has checked that they are there. The first thread shows how far
 * all threads are. */
static void hash_task(void *context, size_t begin, size_t end, int thread) {
    hash_job *j = context;
    const json *header = &j->f->header;
    medrun_error e = {0};
    uint8_t digest[32];
    for (hashed *h = j->all + begin; h < j->all + end; h++) {
        int64_t offset = json_int(header, h->v, "", "offset", 0, 1ll << 52, &e);
        int64_t bytes = json_int(header, h->v, "", "bytes", 0, 1ll << 52, &e);
        sha256_of(j->f->map.data + offset, (size_t)bytes, digest);
        hex_of(digest, h->found);
        size_t done = atomic_fetch_add(&j->done, 1) + 1;
        if (j->show && !thread) fprintf(stderr, "\rhashing: %zu of %zu ", done, j->n);
    }
}

/* Are all tensors and the tokenizer as the header states? Hashed on all threads. */
static bool verify_hashes(command *c) {
    const model_file *f = &c->m->file;
    size_t n = f->header.nodes[f->tensors].count, good[2] = {0};
    uint32_t v = f->tensors + 1;
    hash_job job = {f, new_array(n + 1, sizeof(hashed)), n + 1, 0, is_terminal(STDERR_FILENO)};
    if (!job.all) return out_of_memory(&c->e, (n + 1) * sizeof(hashed)), false;
    for (size_t i = 0; i < n; i++, v = f->header.nodes[v].next) job.all[i].v = v;
    job.all[n].v = f->tokenizer;
    parallel_for(c->m->pool, n + 1, 1, hash_task, &job);
    if (job.show) fprintf(stderr, "\r%30s\r", "");
    for (const hashed *h = job.all; h <= job.all + n; h++) {
        bool last = h == job.all + n;
        char wanted[65] = "", name[64] = "SHA-256";
        uint8_t digest[32];
        json_text(&f->header, h->v, "", "sha256", wanted, sizeof wanted, &c->e);
        if (!last) json_text(&f->header, h->v, "", "name", name, sizeof name, &c->e);
        make_safe(name);
        if (parse_hex(wanted, digest)) hex_of(digest, wanted);          /* from capitals, too    */
        good[last] += report(c, last ? "tokenizer" : "tensors", name, wanted, h->found);
    }
    free(job.all);
    if (!flag(c, O_QUIET))
        printf("tensors    %zu of %zu are as exported\ntokenizer  %zu of 1\n", good[0], n, good[1]);
    return good[0] == n && good[1];
}

/* A proof is an entry of the header: what goes into the model, and what came out of it where the
 * checkpoint was made. A function for each kind computes that again: it finds the ids of the proof
 * in c->ids, and puts those that come out into c->output. */

/* A text, and its ids. */
static int prove_tokens(command *c, uint32_t node) {
    const json *j = &c->m->file.header;
    uint32_t text = json_field(j, node, "proofs.tokens", "text", JSON_STRING, "a string", &c->e);
    if (c->e.code) return c->e.code;
    json_unescape(j, text, &c->input);
    return tokenizer_encode(c->t, chars(&c->input), c->input.n, 0, &c->output, &c->e);
}

/* A conversation, perhaps with a date, and the ids of its prompt. */
static int prove_chats(command *c, uint32_t node) {
    const json *j = &c->m->file.header;
    char date[11];
    medrun_chat_options o = {.date = json_get(j, node, "date") != JSON_NONE ? date : NULL};
    chat_writer w = {c->m->chat, c->t, &o, .out = &c->output, .e = &c->e};
    if (check_template(w.c, &c->e)) return c->e.code;
    if (o.date) json_text(j, node, "proofs.chats", "date", date, sizeof date, &c->e);
    return render_json(&w, j, json_get(j, node, "messages"), "proofs.chats", true);
}

/* Feeds the ids of a proof to a session that computes as where the proof was made. */
static int feed_proof(command *c) {
    size_t n = n_ids(&c->ids);
    medrun_session_options o = {.context = (int)n, .kv = MEDRUN_KV_F32, .strict = true};
    if (!n) return fail(&c->e, MEDRUN_BAD_FILE, "proofs.logits: ids: found none");
    if (medrun_start(&c->s, c->m, &o, NULL, 0, &c->e)) return c->e.code;
    return medrun_feed(c->s, ids_of(&c->ids), n, &c->e);
}

/* Ids, and the SHA-256 of the logits after them, as text. */
static int prove_logits(command *c, uint32_t node) {
    char wanted[65], found[65];
    if (json_text(&c->m->file.header, node, "proofs.logits", "sha256", wanted, sizeof wanted,
                  &c->e) || feed_proof(c) || hash_logits(c, found)) return c->e.code;
    medrun_stop(c->s);
    c->s = NULL;
    c->ids.n = 0;
    buffer_text(&c->ids, wanted);
    buffer_text(&c->output, found);
    return c->e.code;
}

/* Computes all proofs of a kind again. Do they come out the same? */
static bool verify_proofs(command *c, const char *kind, int (*repeat)(command *c, uint32_t node)) {
    const json *j = &c->m->file.header;
    uint32_t all = json_field(j, json_get(j, 0, "proofs"), c->m->path, kind, JSON_ARRAY,
                              "an array", &c->e), v = all + 1;
    if (c->e.code) return false;
    size_t n = j->nodes[all].count, good = 0;
    for (size_t i = 0; i < n && !c->e.code; i++, v = j->nodes[v].next) {
        char name[32];
        snprintf(name, sizeof name, "proof %zu", i + 1);
        c->input.n = c->ids.n = c->output.n = 0;
        if (!json_ids(c, j, json_get(j, v, "ids"), "proofs: ids", &c->ids)) repeat(c, v);
        if (repeat != prove_logits) ids_to_text(&c->ids), ids_to_text(&c->output);
        if (c->e.code == MEDRUN_USAGE || c->e.code == MEDRUN_TOO_LONG)
            c->e.code = MEDRUN_BAD_FILE;                /* the file asked, and not the user      */
        if (!check_buffer(c, &c->ids) && !check_buffer(c, &c->output))
            good += report(c, kind, name, chars(&c->ids), chars(&c->output));
    }
    if (!flag(c, O_QUIET) && !c->e.code)
        printf("%-10s %zu of %zu come out the same\n", kind, good, n);
    flush_stdout(c);
    return good == n;
}

/* All hashes and proofs are looked at, also after one that differs. */
static int verify_command(command *c) {
    if (open_model(c)) return c->e.code;
    bool same = verify_hashes(c);
    same &= verify_proofs(c, "tokens", prove_tokens);
    same &= verify_proofs(c, "chats", prove_chats);
    same &= verify_proofs(c, "logits", prove_logits);
    return same ? c->e.code : quit(c, MEDRUN_DIFFERS);
}

/* ---- tokenize, detokenize, render, logits -------------------------------------------------- */

static int print_text(command *c, const buffer *b) {
    if (!check_buffer(c, b)) fwrite(chars(b), 1, b->n, stdout);
    return c->e.code;
}

/* On one line, or with --pieces a line for each id. */
static int print_ids(command *c) {
    buffer *ids = &c->ids;
    if (check_buffer(c, ids)) return c->e.code;
    for (size_t i = 0; flag(c, O_PIECES) && i < n_ids(ids); i++) {
        printf("%d\t", ids_of(ids)[i]);
        print_piece(c, ids_of(ids)[i], 0);
        puts("");
    }
    if (flag(c, O_PIECES)) return MEDRUN_OK;
    ids_to_text(ids);
    buffer_text(ids, "\n");
    return print_text(c, ids);
}

/* Files are taken to the last byte here: what people look at may be the line end. */
static int tokenize_command(command *c) {
    int flags = (flag(c, O_BOS) ? MEDRUN_ADD_BOS : 0) |
                (flag(c, O_SPECIAL) ? MEDRUN_PARSE_SPECIAL : 0);
    if (open_tokenizer(c)) return c->e.code;
    if (flag(c, O_BOS) && c->t->bos < 0) return USAGE(c, "--bos: this tokenizer has no such token");
    if (!read_prompt(c))
        tokenizer_encode(c->t, chars(&c->input), c->input.n, flags, &c->ids, &c->e);
    return print_ids(c);
}

/* Ids stand on the line or on stdin. The bytes that come out need not be UTF-8. */
static int detokenize_command(command *c) {
    if (open_tokenizer(c)) return c->e.code;
    bool from_stdin = !c->n_rest || (c->n_rest == 1 && !strcmp(c->rest[0], "-"));
    if (from_stdin) read_file(c, "-", MOST_INPUT, &c->input);
    else for (int i = 0; i < c->n_rest; i++) buffer_printf(&c->input, "%s ", c->rest[i]);
    check_buffer(c, &c->input);
    if (parse_ids(c, chars(&c->input), c->input.n, &c->ids)) return c->e.code;
    tokenizer_decode(c->t, ids_of(&c->ids), n_ids(&c->ids), flag(c, O_SPECIAL), &c->output);
    return print_text(c, &c->output);
}

/* A file's messages, or a text as a person's. */
static int render_command(command *c) {
    bool file = given(c, O_MODEL), ids = flag(c, O_RENDER_IDS) || flag(c, O_PIECES);
    if (!file && (!given(c, O_TEMPLATE) || ids))
        return USAGE(c, "render: wanted a model; --template NAME does without one, but not with "
                     "--ids or --pieces");
    if (file && open_tokenizer(c)) return c->e.code;
    if (!c->m && !given(c, O_TEMPLATE))
        return USAGE(c, "render: a tokenizer.bin has no template: add --template");
    choose_chat(c);
    make_prompt(c, !ids);
    return ids ? print_ids(c) : print_text(c, &c->ids);
}

/* Feeds the ids, with --all in parts whose passes give a row of logits for each of them. Without F
 * nothing is written. */
static int write_logits(command *c, FILE *f) {
    size_t n = n_ids(&c->ids), vocab = (size_t)c->t->vocab_size;
    size_t part = flag(c, O_ALL) ? (size_t)c->s->options.batch : n;
    for (size_t at = 0, now; at < n; at += now) {
        now = n - at < part ? n - at : part;
        if (medrun_feed(c->s, ids_of(&c->ids) + at, now, &c->e) || process_prompt(c)) break;
        for (size_t row = !f ? 0 : flag(c, O_ALL) ? now : 1; row-- > 0;)
            fwrite(medrun_logits(c->s, row), sizeof(float), vocab, f);
    }
    return c->e.code;
}

/* With --all each token of a pass has a row of logits, which takes memory: so fewer go into one. */
static int logits_command(command *c) {
    file_writer w = {0};
    bool file = given(c, O_OUT), text = is_source(c, O_PROMPT) || is_source(c, O_FILE);
    if (!file && (!given(c, O_TOP) || flag(c, O_ALL)))
        return USAGE(c, "logits: wanted --top N or -o OUT.f32");
    if (text && is_source(c, O_IDS))
        return USAGE(c, "logits: found both --ids and a text, wanted one");
    c->number[O_RAW] = 1;                               /* a text is continued as it is          */
    if (open_model(c) || make_prompt(c, false)) return c->e.code;
    size_t n = n_ids(&c->ids), most = (size_t)c->m->config.max_positions;
    if (!n) return USAGE(c, "--ids: found none");
    medrun_session_options o = session_options(c, (int)(n < most ? n : most));
    if (flag(c, O_ALL) && !given(c, O_BATCH)) o.batch = 32;     /* a row may take 0.5 MB         */
    if (flag(c, O_ALL)) o.logit_rows = o.batch;
    if (medrun_start(&c->s, c->m, &o, NULL, 0, &c->e)) return c->e.code;
    if (n > most) return too_long(c, n);
    file_kind kind = {"logits of this model", NULL, false, true,
                      sizeof(float) * (size_t)c->t->vocab_size};
    if (file && open_output(c, &w, c->text[O_OUT], &kind)) return c->e.code;
    write_logits(c, w.f);
    if (file) writer_done(&w, &c->e);
    return c->e.code || !given(c, O_TOP) ? c->e.code
         : print_likely(c, medrun_logits(c->s, 0), -1);
}

/* ============================================================================================
 * 17 main: finds the command, reads the line, reports the error, closes
 *
 * Tests: tests/16_commands.sh.
 * ============================================================================================ */

static void help_option(const option_row *r) {
    char left[64], variable[48];
    buffer text = {0};
    snprintf(left, sizeof left, r->small ? "  -%s, --%s %s" : "  %s    --%s %s",
             r->small ? r->small : "", r->name, r->argument ? r->argument : "");
    buffer_text(&text, r->help);
    if (r->max > r->min) buffer_printf(&text, " (%.16g to %.16g)", r->min, r->max);
    if (r->standard) buffer_printf(&text, " [default: %s]", r->standard);
    variable_name(r, variable);
    if (r->variable) buffer_printf(&text, ";\n%s is for --%s here", variable, r->name);
    print_help(stdout, left, 26, chars(&text));
    buffer_free(&text);
}

/* A program that runs one command without being told its name has that in brackets. */
static void help_command_row(FILE *f, const program *p, const command_row *r) {
    char usage[200];
    bool unnamed = p->unnamed >= 0 && r == &p->commands[p->unnamed];
    snprintf(usage, sizeof usage, unnamed ? "%s [%s]%s%s" : "%s %s%s%s", p->name, r->name,
             *r->arguments ? " " : "", r->arguments);
    print_help(f, usage, 6, r->help);
}

/* The options of one command. */
static int help_on(const command *c, const command_row *row) {
    const program *p = c->p;
    help_command_row(stdout, p, row);
    puts("");
    for (int id = 0; id < p->n_options; id++)
        if (p->options[id].on & ON(row - p->commands)) help_option(&p->options[id]);
    print_help(stdout, "", 0, "\nOptions may stand anywhere; --option=value works too, and so do "
               "the long names of llama.cpp, like --ctx-size. Environment variables, like "
               "MEDRUN_TOP_K=20, set what the line leaves out.\nMEDRUN_KERNELS=scalar (medrun-lab "
               "doctor lists them) chooses the instruction set.");
    return MEDRUN_OK;
}

/* It must fit a screen, so options wait for `help COMMAND`. */
static int help_all(const program *p, FILE *f) {
    char text[400];
    snprintf(text, sizeof text, "%s " MEDRUN_VERSION ": %s.\n%s\n", p->name, p->about,
             not_a_clinician);
    print_help(f, "", 0, text);
    for (const command_row *r = p->commands; r->name; r++) help_command_row(f, p, r);
    snprintf(text, sizeof text, "\n%s help COMMAND lists a command's options. Exit codes: 0 ok, 1 "
             "failed while running, 2 usage, 3 file missing, unsupported or malformed, 4 "
             "verification failed, 5 prompt longer than the context, 6 out of memory or no such "
             "device, 130 interrupted.", p->name);
    return print_help(f, "", 0, text), MEDRUN_OK;
}

static int help_command(command *c) {
    if (!c->n_rest) return help_all(c->p, stdout);
    const command_row *row = find_command(c->p->commands, c->rest[0]);
    return row ? help_on(c, row) : unknown_command(c, c->p->commands, c->rest[0]);
}

static int version_command(command *c) {
    printf("%s " MEDRUN_VERSION "\n", c->p->name);
    if (plain_only()) puts(plain_only());
    return MEDRUN_OK;
}

/* The place of the command's name: the first argument that is one and no option's value. It comes
 * first, as the same --name may be an option with a value there and a flag elsewhere. */
static int command_place(const program *p, int argc, char **argv) {
    for (int i = 1; i < argc && strcmp(argv[i], "--"); i++) {
        const char *arg = argv[i];
        int id = arg[0] == '-' ? find_option(p, arg, ~0u) : -1;
        if (id >= 0 && p->options[id].kind != FLAG) i++;
        else if (find_command(p->commands, arg)) return i;
    }
    return 0;
}

/* Reads the options, wherever they stand, each with its value, which may also follow a =. Moves all
 * other arguments to the front of argv, which is c->rest then. Behind -- nothing is an option. */
static int read_line_of_arguments(command *c, int argc, char **argv, int place) {
    bool options_ended = false;
    c->rest = argv + 1;
    for (int i = 1; i < argc && !c->e.code; i++) {
        char *arg = argv[i];
        if (i == place) continue;
        if (options_ended || arg[0] != '-' || !arg[1]) {
            c->rest[c->n_rest++] = arg;
            continue;
        }
        char *equals = strchr(arg, '=');
        if (equals) *equals = 0;
        int id = find_option(c->p, arg, own_bit(c));
        const option_row *r = &c->p->options[id < 0 ? 0 : id];
        if (!strcmp(arg, "--")) options_ended = true;
        else if (id < 0) unknown_option(c, arg);
        else if (r->kind == FLAG && equals) USAGE(c, "%s: found a value, wanted none", arg);
        else if (r->kind == FLAG) set_option(c, id, "on", FROM_FLAG, arg);
        else if (equals) set_option(c, id, equals + 1, FROM_FLAG, arg);
        else if (++i < argc) set_option(c, id, argv[i], FROM_FLAG, arg);
        else USAGE(c, "%s: found nothing, wanted %s", arg, r->argument);
    }
    return c->e.code;
}

/* Takes the model and the prompt behind it, as far as no option named them. Without a command's
 * name the first argument is a model, and must look like a file. */
static int take_rest(command *c, bool named) {
    int more = c->row->more;
    file_facts there;
    if (!named && c->n_rest && !strpbrk(c->rest[0], "./\\") && get_facts(c->rest[0], -1, &there))
        return unknown_command(c, c->p->commands, c->rest[0]);
    if (c->n_rest && !c->row->no_model && !given(c, O_MODEL))
        c->n_rest--, set_option(c, O_MODEL, *c->rest++, FROM_FLAG, "model");
    if (c->n_rest == more + 1 && takes(c, O_PROMPT) && !given(c, O_PROMPT))
        set_option(c, O_PROMPT, c->rest[--c->n_rest], FROM_FLAG, "prompt");
    if (c->n_rest <= more) return MEDRUN_OK;
    return USAGE(c, "%s: found \"%s\" too many; a text with spaces needs quotes", c->row->name,
                 c->rest[more]);
}

/* Finds the command, reads its options and runs it. */
static int run_line(command *c, int argc, char **argv) {
    const program *p = c->p;
    int place = command_place(p, argc, argv);
    file_facts there;
    if (!place && argc > 1 && get_facts(argv[1], -1, &there) && look_elsewhere(c, argv[1]))
        return c->e.code;
    /* Without one, help takes --help and --version. */
    c->row = place ? find_command(p->commands, argv[place])
           : p->unnamed < 0 ? find_command(p->commands, "help") : &p->commands[p->unnamed];
    for (int id = 0; id < p->n_options; id++)
        if (p->options[id].standard) parse_number(p->options[id].standard, &c->number[id]);
    if (read_line_of_arguments(c, argc, argv, place)) return c->e.code;
    if (flag(c, O_VERSION)) return version_command(c);
    if (flag(c, O_HELP)) return place ? help_on(c, c->row) : help_all(p, stdout);
    if (take_rest(c, place) || read_environment(c)) return c->e.code;
    if (place || given(c, O_MODEL)) return c->row->run(c);
    help_all(p, stderr);
    return USAGE(c, p->unnamed < 0 ? "no command" : "no model; name one");
}

/* A signal handler: a mapped file became shorter, or its disk went away. Nothing can be saved.
 * Threads may find that at the same moment: only the first says so. */
static void on_lost_file(int signal_number) {
    static const char said[] = "medrun: the checkpoint cannot be read any more: it was cut, or its "
                               "disk is gone\n";
    static atomic_flag found = ATOMIC_FLAG_INIT;
    (void)signal_number;
    while (atomic_flag_test_and_set(&found)) sleep(1);
    set_raw(false);
    if (being_written) remove_file(being_written);
    if (write(STDERR_FILENO, said, sizeof said - 1) < 0) _exit(MEDRUN_BAD_FILE);
    _exit(MEDRUN_BAD_FILE);
}

static int run_program(const program *p, int argc, char **argv) {
    static const int fatal[] = {SIGTERM, SIGHUP, SIGQUIT, SIGINT};
    static command c;
    c.p = p;
    if (!(argv = start_program(&argc, argv))) return 1;
    c.self = argv[0] ? argv[0] : "";
    on_lost_page(on_lost_file);
    for (size_t i = 0; i < sizeof fatal / sizeof *fatal; i++) on_signal(fatal[i], on_fatal_signal);
    umask(077);                         /* records and sessions hold what a patient said         */
    int code = check_machine(&c.e);
    if (!code) code = run_line(&c, argc, argv);
    if (!code) code = flush_stdout(&c);
    if (code && *c.e.text) fprintf(stderr, "%s: %s\n", p->name, c.e.text);
    close_command(&c);
    return code;
}

#ifndef MEDRUN_NO_MAIN
static const command_row medrun_commands[N_COMMANDS + 1] = {
    [CHAT] = {"chat", converse_command, "MODEL.mdr [\"TEXT\"]",
        .help = "a conversation; with piped input, answers once"},
    [RUN] = {"run", run_command, "MODEL.mdr \"TEXT\" | -f FILE", .help = "one answer"},
    [SHOW] = {"show", show_command, "MODEL.mdr",
        .help = "what is in the file, and whether this machine has memory for it"},
    [VERIFY] = {"verify", verify_command, "MODEL.mdr",
        .help = "computes the file's hashes and proofs again; exit 4 if one differs"},
    [TOKENIZE] = {"tokenize", tokenize_command, "FILE \"TEXT\" | -f FILE",
        "text to ids, by a .mdr or a tokenizer.bin", .exact_text = true},
    [DETOKENIZE] = {"detokenize", detokenize_command, "FILE IDS... | -", "ids to the exact bytes",
        .more = INT_MAX - 1},
    [RENDER] = {"render", render_command, "FILE \"TEXT\" | --messages FILE.json",
        .help = "the prompt that the model sees; --template NAME does without FILE"},
    [LOGITS] = {"logits", logits_command,
        "MODEL.mdr \"TEXT\" | --ids \"1 2 3\" --top N | -o OUT.f32",
        .help = "what may come next, as a table; or all logits, as numbers"},
    [HELP] = {"help", help_command, "[COMMAND]", "all commands, or the options of one",
        .no_model = true, .more = 1},
    [VERSION] = {"version", version_command, "", "prints the version", .no_model = true},
};

static const program medrun_program = {
    "medrun", "runs open medical language models on an ordinary CPU", medrun_commands,
    option_rows, N_OPTIONS, CHAT};

int main(int argc, char **argv) { return run_program(&medrun_program, argc, argv); }
#endif

#endif /* MEDRUN_COMMANDS */
#endif /* MEDRUN_KERNELS_ONLY */

/* What was set for this file ends with it: options, warnings, and macros but those that begin with
 * MEDRUN_ and what system headers had to be told (_GNU_SOURCE, _FILE_OFFSET_BITS). The program that
 * includes it may use these names itself. Tests: tests/38_embed.sh. */
#pragma GCC diagnostic pop
#ifdef __clang__
#pragma STDC FP_CONTRACT DEFAULT
#else
#pragma GCC pop_options
#endif
#undef ALWAYS_INLINE
#undef HASH_START
#undef LOCK_HINT
#undef MAYBE_UNUSED
#undef NEVER_INLINE
#undef NO_ID
#undef RETRY
#undef STATE_MARK
#undef TWO_PI
#undef UNROLL
#undef bad_file
#ifdef _WIN32
#undef fmaf
#endif
#endif /* MEDRUN_PASS */
#endif /* MEDRUN_API_ONLY */
