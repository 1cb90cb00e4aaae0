/* The course's exercises: what the engine gives, and what you write.
 *
 * An exercise is one function in NN/exercise.c. NN/check.c calls it, compares with what medrun
 * itself computes on the demo model, and says what is not right yet: `make 5` does lesson 5. The
 * inputs are drawn at random; `make 5 SEED=7` draws others. MIT licence, see LICENSE. */
#ifndef COURSE_H
#define COURSE_H

#define MEDRUN_API_ONLY
#include "medrun.c"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- what you write ------------------------------------------------------------------------- */

/* Lesson 1: merges the N pieces in IDS until no two neighbours merge. Returns how many are left. */
size_t merge_pieces(int32_t *ids, size_t n);

/* Lesson 2: N turns as ids, with the opening of the answer. Returns how many there are. */
typedef struct {
    const char *role, *text;            /* "system", "user" or "assistant", and what was said   */
} turn;
size_t write_chat(const turn *turns, size_t n, int32_t *ids);

/* Lesson 3: 64 numbers as whole numbers from -127 to 127 and one scale, which it returns; and
 * back. */
enum { GROUP_SIZE = 64 };
float to_int8(const float *x, int8_t *q);
void from_int8(const int8_t *q, float scale, float *x);

/* Lesson 4: out = x / sqrt(mean of the squares + eps) * weight, N numbers each. */
void rms_norm(const float *x, const float *weight, size_t n, float eps, float *out);

/* Lesson 5: what one head finds for the token at position AT of N: its query asks, the keys of all
 * tokens that it may see answer, their values are mixed. q, k, v and found are N x DIM numbers, row
 * by row; only row AT of found is written. */
void look_back(const float *q, const float *k, const float *v, size_t at, size_t n, size_t dim,
               float *found);

/* Lesson 6: bytes of the keys and values of TOKENS tokens, BYTES for a number; and N_ANSWER tokens
 * behind a prompt, each time the likeliest, where no token goes through the model twice. */
double cache_bytes(const medrun_info *m, double tokens, double bytes);
void answer_with_cache(medrun_session *s, const int32_t *prompt, size_t n_prompt,
                       int32_t *answer, size_t n_answer);

/* Lesson 7: act = silu(gate) * up; and the neuron that moves the stream furthest along DIRECTION:
 * neuron i adds act[i] times its column, the DIM numbers from columns[i * dim] on. */
void activate(const float *gate, const float *up, size_t n, float *act);
size_t find_neuron(const float *act, const float *columns, size_t n, const float *direction,
                   size_t dim);

/* Lesson 8: draws an id from N logits: divide by the temperature, make probabilities, keep the
 * likeliest until they hold TOP_P, and let TICKET (0 to 1) fall on one of those that are left. */
int32_t draw_token(const float *logits, size_t n, double temperature, double top_p, double ticket);

/* Lesson 9: stream has ROWS rows of DIM numbers: the residual stream at one token, from the
 * embedding to the end. parts[i] = what row i added to (logit of a) - (logit of b), for a and b
 * with these rows of the output matrix. WEIGHT and EPS are those of the final norm. */
void split_difference(const float *stream, size_t rows, size_t dim, const float *weight, float eps,
                      const float *row_a, const float *row_b, double *parts);

/* Lesson 10: mean surprise in bits of tokens FROM ... n - 1 of a text. logits + t * vocab are the
 * VOCAB logits behind token t. */
double mean_surprise(const float *logits, size_t vocab, const int32_t *ids, size_t from, size_t n);

/* ---- what the engine gives ------------------------------------------------------------------ */

extern medrun_model *demo;              /* the model of the course, open                        */
extern medrun_info facts;               /* its sizes                                            */

/* Lesson 1. The first word of a text, in bytes (merging never crosses words); one piece for each
 * byte of it; the merge of two neighbours: false when they do not merge, else its rank (a low rank
 * goes first) and the piece that comes of it; and a piece's text. */
size_t demo_word(const char *text, size_t n);
size_t demo_bytes(const char *text, size_t n, int32_t *ids);
bool demo_merge(int32_t left, int32_t right, int32_t *rank, int32_t *result);
const char *demo_piece(int32_t id);

/* Lesson 2. The id of a control token like "<|eot_id|>"; a text as ids, where TRUST lets control
 * tokens that stand in it become their ids. */
int32_t demo_control(const char *name);
size_t demo_tokens(const char *text, bool trust, int32_t *ids);

/* Lesson 8. Ids from the likeliest to the least likely; on a tie the lower id first. */
void demo_order(const float *logits, size_t n, int32_t *ids);

/* ---- for the checks ------------------------------------------------------------------------- */

enum { MOST_IDS = 512 };

/* All stages of a text that went through the model, as medrun_observe shows them. */
typedef struct recording recording;
recording *demo_run(const int32_t *ids, size_t n, int kv);
const float *demo_stage(const recording *r, const char *stage, int layer, size_t *rows,
                        size_t *cols);
void demo_forget(recording *r);
size_t demo_ask(const char *question, int32_t *ids);    /* the ids of a question in a chat       */

/* What the engine itself computes. */
float engine_int8(const float *x, int8_t *q);
double engine_cache_bytes(int tokens, int kv);
void engine_gate_up(int layer, const float *h, float *gate, float *up);
int32_t engine_draw(const float *logits, double temperature, double top_p, uint64_t seed,
                    double *ticket);
double engine_difference(const float *x, int32_t a, int32_t b); /* of the logits behind row x    */
double engine_log_sum(const float *logits);

/* Its weights. Lesson 3 on pages: what becomes of the model when whole numbers are multiples of
 * STEP; 1 gives them back. */
enum { NORM_ATTENTION, NORM_FFN, NORM_FINAL };
const float *weights_norm(int which, int layer);
float weights_eps(void);
void weights_output(int32_t id, float *row);
void weights_columns(int layer, float *columns);        /* of down: (ffn, hidden)                */
void weights_coarser(int step);
bool weights_write_coarser(const char *path, int step);

/* The harness: hints end the program. */
_Noreturn void hint(const char *text, ...) __attribute__((format(printf, 1, 2)));
void right(const char *text, ...) __attribute__((format(printf, 1, 2)));
double draw_number(void);                               /* 0 to 1, from the seed                */
size_t draw_below(size_t n);
double draw_normal(void);
const char *draw_question(void);
void lesson(void);                                      /* each check.c has one                 */

#endif
