/* lamb16 in C: LAMB with 16 bits of optimizer state per parameter. The reference that others are held to.
 *
 * Portable C11 that needs only the standard library (link with -lm), usable from C++. It is written to be read and to
 * be right, not to be fast: one element after the other, without allocating memory. It shares no code with PyTorch, and
 * gives the bits of the package's Python reference: weights, state and norms.
 *
 *     cc -std=c11 -O2 -ffp-contract=off -c lamb16.c
 *
 * The bits need IEEE 754 arithmetic, one rounding an operation: no contraction of a multiply and an add (hence
 * -ffp-contract=off), no -ffast-math (refused), no x87 (refused), the default rounding mode, subnormals not flushed to
 * zero. pow is the C library's; glibc's is the one that the bits were compared with.
 *
 * All functions are reentrant: they touch nothing but their arguments. Functions that can fail return a
 * lamb16_status, and have then changed nothing.
 */
#ifndef LAMB16_H
#define LAMB16_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The rounding word with which the encoders round to nearest, ties away from zero; with a word of 0 they truncate. */
#define LAMB16_NEAREST 0x80000000u

/* What the weights or gradients of a tensor are. C has no type for those with 16 bits: they are the bits of uint16_t. */
typedef enum {
    LAMB16_FLOAT32 = 0,  /* float */
    LAMB16_BFLOAT16 = 1, /* the upper 16 bits of a float */
    LAMB16_FLOAT16 = 2   /* IEEE binary16 */
} lamb16_dtype;

/* How new weights are rounded that have 16 bits; weights of float32 are what they are with each of them. */
typedef enum {
    LAMB16_ROUNDING_STOCHASTIC = 0, /* up or down by chance, so that small updates count on average */
    LAMB16_ROUNDING_NEAREST = 1,    /* ties to even */
    LAMB16_ROUNDING_EXACT = 2       /* not at all: bfloat16 weights and param_remainder together are float32 weights */
} lamb16_rounding;

/* The hyperparameters of a step; lamb16_default_hyper gives the defaults. */
typedef struct {
    double lr;           /* learning rate, finite and >= 0 */
    double beta1;        /* decay rate of the first moment, in [0, 1) */
    double beta2;        /* decay rate of the second moment, in [0, 1) */
    double eps;          /* added to sqrt(v), and the lower clamp of squared updates in their norm; in [2^-100, 1] */
    double weight_decay; /* decoupled, inside the trust ratio; finite and >= 0 */
    double trust_scale;  /* exponent of the trust ratio, finite and >= 0; 0 switches the ratio off */
    double trust_lr;     /* learning rate at which the trust ratio is not changed; finite and > 0 */
    double trust_clip;   /* upper bound of the trust ratio; finite and > 0 */
    int32_t bias_correction; /* 1: divide moments by the sum of their weights, 1 - beta^t, in the update; 0: do not */
    int32_t nesterov;        /* 1: the update's momentum is the next step's, had that one the same gradient; 0: m */
    int32_t caution;         /* 1: update only where it has the gradient's sign, by so much more; 0: everywhere */
    int32_t maximize;        /* 1: ascend instead of descend; 0: descend */
    int32_t param_rounding;  /* a lamb16_rounding; LAMB16_ROUNDING_EXACT not with weights of float16 */
} lamb16_hyper;

/* One tensor with its gradient and its state. The memory is the caller's; shapes do not matter, elements are numbered
 * in their order in memory. The arrays may be NULL where numel is 0. Start from a structure of zeros: weights and
 * gradients are then floats, and there are no remainders. */
typedef struct {
    size_t numel;          /* elements of each of the arrays */
    int32_t param_dtype;   /* a lamb16_dtype: what param points to */
    int32_t grad_dtype;    /* the same of grad; the two may differ */
    void *param;           /* weights, float or uint16_t; updated in place */
    const void *grad;      /* gradient of the loss, float or uint16_t; never written */
    uint8_t *exp_avg_codes;      /* e4m3fn codes: the first moment is exp_avg_scale times what they decode to */
    uint8_t *exp_avg_sq_codes;   /* e5m2 codes of the second moment; sign bits 0 */
    int16_t *param_remainder;    /* by how much the exact weights' bits, as floats, are above those of param with
                                  * 16 zeros after them; with LAMB16_ROUNDING_EXACT and bfloat16 only, else ignored */
    float exp_avg_scale;    /* power of two, at least 2^-126 */
    float exp_avg_sq_scale; /* power of two, at least 2^-126 */
    float exp_avg_max;     /* no code of exp_avg_codes decodes to a larger magnitude, exp_avg_scale left out */
    float exp_avg_sq_max;  /* the same of exp_avg_sq_codes */
    int64_t weight_sum;    /* sum over the weights, as the last step left them, of clamp(p^2, 0.01, 1), see below */
    int64_t update_sum;    /* sum over the last step's update of clamp(u^2, eps, 1); numel * 2^20 before the first */
    int64_t mask_count;    /* elements of that update with the gradient's sign, 0 .. numel; counted with caution only */
    int64_t param_checksum; /* of the weights that param_remainder belongs to, see below; 0 .. 2^32 - 1 */
    int32_t step;          /* steps that counted so far; it stays at 2^31 - 1 */
    uint32_t salt;         /* enters the rounding words; any number, best another for every tensor */
} lamb16_tensor;

/* Both sums are in units of 2^-20: each clamped square is rounded to an integer, half to even, and a NaN counts as 1.
 * So they do not depend on the order of the elements.
 *
 * The checksum of bfloat16 weights is the sum, modulo 2^32, of lamb16_hash of their bits as floats. Where it is not
 * param_checksum something else than a step has changed the weights: the remainders are not theirs, and count as 0. */

/* The norms that the trust ratio of a step came from. */
typedef struct {
    double weight_norm; /* of the weights before the step: sqrt(weight_sum / 2^20); NaN where skipped */
    double update_norm; /* of the step before: sqrt(update_sum / 2^20); NaN where skipped */
    double trust_ratio; /* what lr was multiplied with; NaN where skipped */
    int32_t skipped;    /* 1: the tensor was left as it is, see lamb16_step; else 0 */
} lamb16_stats;

/* What was wrong; every mistake has a code of its own. lamb16_status_string says it in words. */
typedef enum {
    LAMB16_OK = 0,
    LAMB16_NULL_POINTER = 1,         /* an argument, or an array of a tensor that has elements, is NULL */
    LAMB16_MISALIGNED = 2,           /* param, grad or param_remainder is not aligned as its elements are */
    LAMB16_BAD_NUMEL = 3,            /* numel floats do not fit into the address space, or their sum not into 63 bits */
    LAMB16_OVERLAP = 4,              /* an array that is written overlaps another array, of this or another tensor */
    LAMB16_BAD_LR = 5,               /* this and the following: out of the range given at the field */
    LAMB16_BAD_BETA1 = 6,
    LAMB16_BAD_BETA2 = 7,
    LAMB16_BAD_EPS = 8,
    LAMB16_BAD_WEIGHT_DECAY = 9,
    LAMB16_BAD_TRUST_SCALE = 10,
    LAMB16_BAD_TRUST_LR = 11,
    LAMB16_BAD_TRUST_CLIP = 12,
    LAMB16_BAD_BIAS_CORRECTION = 13,
    LAMB16_BAD_NESTEROV = 14,
    LAMB16_BAD_CAUTION = 15,
    LAMB16_BAD_MAXIMIZE = 16,
    LAMB16_BAD_GRAD_FACTOR = 17,     /* negative, infinite or NaN */
    LAMB16_BAD_EXP_AVG = 18,         /* a code is NaN */
    LAMB16_BAD_EXP_AVG_SQ = 19,      /* a code is NaN, infinite or negative */
    LAMB16_BAD_EXP_AVG_NORM = 20,
    LAMB16_BAD_EXP_AVG_SQ_NORM = 21,
    LAMB16_BAD_EXP_AVG_MAX = 22,     /* negative, NaN, or below a magnitude that exp_avg_codes holds */
    LAMB16_BAD_EXP_AVG_SQ_MAX = 23,  /* negative, NaN, or below a value that exp_avg_sq_codes holds */
    LAMB16_BAD_WEIGHT_SUM = 24,      /* negative */
    LAMB16_BAD_UPDATE_SUM = 25,      /* negative */
    LAMB16_BAD_MASK_COUNT = 26,      /* negative or above numel */
    LAMB16_BAD_STEP = 27,            /* negative */
    LAMB16_BAD_PARAM_ROUNDING = 28,  /* no lamb16_rounding */
    LAMB16_BAD_PARAM_DTYPE = 29,     /* no lamb16_dtype; for lamb16_round_weights LAMB16_FLOAT32 too */
    LAMB16_BAD_GRAD_DTYPE = 30,      /* no lamb16_dtype */
    LAMB16_EXACT_FLOAT16 = 31,       /* LAMB16_ROUNDING_EXACT with weights of float16, whose range is too small */
    LAMB16_NO_REMAINDER = 32,        /* LAMB16_ROUNDING_EXACT with bfloat16 weights, and param_remainder is NULL */
    LAMB16_BAD_PARAM_CHECKSUM = 33,  /* negative or above 2^32 - 1 */
    LAMB16_STATUS_COUNT              /* no status: how many there are */
} lamb16_status;

/* What a status means and what to do about it: a constant string, also for numbers that are no status. */
const char *lamb16_status_string(lamb16_status status);

/* Fill *hyper with the defaults: lr 0.01, beta1 0.9, beta2 0.999, eps 1e-6, weight_decay 0, trust_scale 0.382,
 * trust_lr 1e-3, trust_clip 2, bias_correction 1, nesterov 1, caution 0, maximize 0, param_rounding
 * LAMB16_ROUNDING_STOCHASTIC. NULL is ignored. */
void lamb16_default_hyper(lamb16_hyper *hyper);

/* Where a field lies in a structure: lamb16_offset("lamb16_hyper", "beta1") is 8. With "" for the field the size of the
 * structure; SIZE_MAX where there is no such field or structure. For those who declare the structures in another
 * language, to compare before the first call. */
size_t lamb16_offset(const char *structure, const char *field);

/* ---- rounding words ---------------------------------------------------------------------------------------------- */

/* The 32-bit mixer: two multiply-xorshift rounds. */
uint32_t lamb16_hash(uint32_t x);

/* The rounding word of element `index` of a tensor with this salt in step t (1 for the first):
 * (hash(index % 1024) ^ hash(index / 1024 + salt)) * 0x9E3779B1 + t * 0x9E3779B9, modulo 2^32, the index too. */
uint32_t lamb16_word(uint64_t index, uint32_t salt, int32_t t);

/* The words of elements first .. first + count - 1 into words[count]. LAMB16_NULL_POINTER where count > 0 and words is
 * NULL. */
lamb16_status lamb16_words(uint64_t first, uint32_t salt, int32_t t, uint32_t *words, size_t count);

/* ---- fp8 --------------------------------------------------------------------------------------------------------- */

/* Round x to one of its two neighbours on the grid of e4m3fn (largest 448) or e5m2 (largest 57344). The top 20 (e5m2:
 * 21) bits of the word decide: the magnitude is rounded up where its distance from the lower neighbour, in units of
 * the gap and rounded to 20 (21) bits, plus the word's bits reaches 1. So word 0 truncates towards zero and
 * LAMB16_NEAREST rounds to nearest, ties away from zero. The sign is kept, also of zeros. Magnitudes above the
 * largest value, infinite ones too, give the code of the largest value; NaN gives the code 0x7f, with its sign. */
uint8_t lamb16_encode_e4m3(float x, uint32_t word);
uint8_t lamb16_encode_e5m2(float x, uint32_t word);

/* The value of a code. e4m3fn has NaN at 0x7f and 0xff and no infinities; e5m2 has infinities at 0x7c and 0xfc and NaN
 * above them. */
float lamb16_decode_e4m3(uint8_t code);
float lamb16_decode_e5m2(uint8_t code);

/* The same for arrays of `count` elements: x and words (encode) or codes (decode) are read, the other array is written.
 * The arrays must not overlap. LAMB16_NULL_POINTER where count > 0 and an array is NULL. */
lamb16_status lamb16_encode_e4m3_array(const float *x, const uint32_t *words, uint8_t *codes, size_t count);
lamb16_status lamb16_encode_e5m2_array(const float *x, const uint32_t *words, uint8_t *codes, size_t count);
lamb16_status lamb16_decode_e4m3_array(const uint8_t *codes, float *x, size_t count);
lamb16_status lamb16_decode_e5m2_array(const uint8_t *codes, float *x, size_t count);

/* The scale of a moment whose largest magnitude is `largest`: the smallest power of two s with largest / s not above
 * 448 (57344), but at least 2^-117 (2^-110). NaN where largest is negative, infinite or NaN. */
float lamb16_scale_e4m3(float largest);
float lamb16_scale_e5m2(float largest);

/* ---- weights with 16 bits ---------------------------------------------------------------------------------------- */

/* Round x[count] to weights[count] of bfloat16 or float16, as the step rounds new weights.
 *
 * LAMB16_ROUNDING_STOCHASTIC: as the encoders above do, but the lowest 16 (float16: 13) bits of the word decide, and
 * what is beyond the largest value lies between that and infinity as if the grid went on. LAMB16_ROUNDING_NEAREST: to
 * nearest, ties to even. LAMB16_ROUNDING_EXACT: to nearest, ties away from zero, and remainders[count] get what is
 * left, see param_remainder. NaN gives the bits 0x7fc0 (0x7e00) and the remainder 0.
 *
 * `words` are read with LAMB16_ROUNDING_STOCHASTIC only, `remainders` written with LAMB16_ROUNDING_EXACT only; else
 * they may be NULL. The arrays must not overlap. LAMB16_BAD_PARAM_DTYPE, LAMB16_BAD_PARAM_ROUNDING,
 * LAMB16_EXACT_FLOAT16, or LAMB16_NULL_POINTER where count > 0 and an array is NULL. */
lamb16_status lamb16_round_weights(const float *x, const uint32_t *words, int32_t dtype, int32_t rounding,
                                   uint16_t *weights, int16_t *remainders, size_t count);

/* The floats x[count] that weights[count] of bfloat16 or float16 are; of bfloat16, unless `remainders` is NULL, the
 * exact ones that they are with these. LAMB16_BAD_PARAM_DTYPE; LAMB16_EXACT_FLOAT16 for float16 with remainders;
 * LAMB16_NULL_POINTER where count > 0 and x or weights is NULL. */
lamb16_status lamb16_widen_weights(const uint16_t *weights, const int16_t *remainders, int32_t dtype, float *x,
                                   size_t count);

/* ---- the gradients' norm ----------------------------------------------------------------------------------------- */

/* The norm over the gradients of all tensors that hold neither inf nor NaN, into *norm. Reads numel, grad_dtype
 * and grad alone.
 *
 * Each gradient is divided by the power of two above the largest magnitude, 2^-125 at least, and its square rounded to
 * a multiple of 2^-40, half to even: the sum is one of integers and does not depend on the order. What is a millionth
 * of the largest counts for nothing.
 *
 * LAMB16_BAD_GRAD_DTYPE, LAMB16_NULL_POINTER, LAMB16_BAD_NUMEL or LAMB16_MISALIGNED; *norm is then left as it is. */
lamb16_status lamb16_grad_norm(const lamb16_tensor *tensors, size_t count, double *norm);

/* What gradients of this norm are multiplied by: min(1, max_norm / (norm + 1e-6)). */
double lamb16_clip_factor(double norm, double max_norm);

/* ---- the step ---------------------------------------------------------------------------------------------------- */

/* The state before the first step: codes 0, the smallest scales, maxima 0, the sums of the weights and of an update
 * that is +-1 everywhere, all elements counted, checksum 0, step 0; and remainders 0, unless param_remainder is NULL.
 * Reads numel, param_dtype, param, exp_avg_codes, exp_avg_sq_codes and param_remainder; grad, grad_dtype and salt are
 * neither read nor changed, and may be set later. LAMB16_BAD_PARAM_DTYPE, LAMB16_NULL_POINTER, LAMB16_BAD_NUMEL,
 * LAMB16_MISALIGNED or LAMB16_OVERLAP. */
lamb16_status lamb16_init(lamb16_tensor *tensor);

/* What lamb16_step would return for this tensor and these hyperparameters, with a valid grad_factor; changes nothing.
 * Reads the codes, not the weights, remainders and gradients. */
lamb16_status lamb16_check(const lamb16_tensor *tensor, const lamb16_hyper *hyper);

/* One step for one tensor: updates param and the state in place. The gradient is multiplied by grad_factor, rounded to
 * a float: lamb16_clip_factor, times the inverse of a gradient scaler's scale, or 1; finite and >= 0. `stats` gets the
 * norms unless it is NULL.
 *
 * The step's update counts in the trust ratio of the next one. Weights that something else than a step has changed are
 * in the ratio after the next step that counts: weight_sum is not computed anew.
 *
 * A tensor whose gradient, multiplied, holds an inf or a NaN, or whose first moment could be infinite, or whose second
 * moment could reach 2^127, judged by the largest magnitudes in gradient and state, is left exactly as it is, its step
 * count too; that is no error: the status is LAMB16_OK and stats->skipped is 1. A step that leaves all moments 0 is not
 * counted, and its sums are not kept; where decay alone changes the weights it adds 1 to the salt, so that they are not
 * rounded by the same words again, and so does a step that leaves the count at its end. Weights are not checked: one
 * that is NaN stays NaN and counts as 1 in the sums.
 *
 * With LAMB16_ROUNDING_EXACT and bfloat16 the weights are read as param_remainder says, and written so with a new
 * param_checksum. Before anything else, and even where the tensor is then skipped, remainders that are not those of the
 * weights become 0, and param_checksum that of the weights.
 *
 * Any status but LAMB16_OK has changed nothing. Checked are, in this order: pointers, hyperparameters in the order of
 * their fields, grad_factor, then the tensor's dtypes, whether they and param_remainder go with param_rounding,
 * pointers, numel, alignment, overlap, scalars in the order of their fields, codes, and whether the maxima are as large
 * as what the codes hold. */
lamb16_status lamb16_step(lamb16_tensor *tensor, const lamb16_hyper *hyper, double grad_factor, lamb16_stats *stats);

/* One step for each of tensors[count], all with the same hyperparameters and factor; stats[count] or NULL. As
 * lamb16_step, and all tensors are checked before the first is changed. Gradients may be shared, arrays that are
 * written may not: every pair of tensors is compared, so the time for that grows with count^2. lamb16_check finds the
 * tensor that is at fault. */
lamb16_status lamb16_step_list(lamb16_tensor *tensors, size_t count, const lamb16_hyper *hyper, double grad_factor,
                               lamb16_stats *stats);

#ifdef __cplusplus
}
#endif

#endif
