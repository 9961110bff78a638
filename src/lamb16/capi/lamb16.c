/* The rule of lamb16.h, one element after the other. `step_tensor` is the place to start reading.
 *
 * All arithmetic is IEEE float, one rounding an operation, except where a variable is a double.
 */
#include "lamb16.h"

#include <float.h>
#include <math.h>
#include <string.h>

#ifdef __clang__ /* gcc does not know the pragma; it does not contract with -std=c11 or -ffp-contract=off */
#pragma STDC FP_CONTRACT OFF
#endif

#if defined __FAST_MATH__ || (defined __FINITE_MATH_ONLY__ && __FINITE_MATH_ONLY__)
#error "lamb16.c needs IEEE arithmetic: compile it without -ffast-math and -Ofast"
#endif
#if FLT_EVAL_METHOD != 0
#error "lamb16.c needs float arithmetic in float precision: on 32-bit x86 compile it with -msse2 -mfpmath=sse"
#endif
_Static_assert(sizeof(float) == 4 && FLT_MANT_DIG == 24 && FLT_MAX_EXP == 128, "float is IEEE binary32");
_Static_assert(sizeof(double) == 8 && DBL_MANT_DIG == 53 && DBL_MAX_EXP == 1024, "double is IEEE binary64");

static const uint32_t GOLDEN = 0x9E3779B9u; /* 2^32 / golden ratio: the step of the rounding words from step to step */
static const uint32_t MIXER = 0x9E3779B1u;  /* an odd number near it, which mixes a row's and a column's hash */
static const uint32_t COLUMNS = 1024;       /* elements of a row, as rounding words count */
static const float WEIGHT_FLOOR = 0.01f;    /* a weight's square counts with at least this: biases start at 0 */
static const double SUM_UNITS = 0x1p20;     /* of the sums: squares of at most 1 are rounded to multiples of 2^-20 */
static const double NORM_UNITS = 0x1p40;    /* of the gradients' norm */
static const float OVERFLOW_V = 0x1p127f;   /* a second moment from here on cannot be rounded up safely */
static const double SMALLEST_EPS = 0x1p-100;
static const uint64_t LARGEST_NUMEL = INT64_MAX >> 20; /* a sum counts each element with up to 2^20 */

/* A format of fewer bits than float; a value's code is its bits without the sign. */
typedef struct {
    int mantissa_bits;
    int min_exponent;      /* 2^min_exponent is the smallest normal value */
    int random_bits;       /* bits of the rounding word that decide */
    uint16_t largest_code; /* of the finite ones */
} format;

static const format E4M3 = {3, -6, 20, 0x7E};
static const format E5M2 = {2, -14, 21, 0x7B};
static const format BFLOAT16 = {7, -126, 16, 0x7F7F};
static const format FLOAT16 = {10, -14, 13, 0x7BFF};

static const float E4M3_MAX = 448.0f, E5M2_MAX = 57344.0f;
static const float MIN_SCALE_M = 0x1p-117f, MIN_SCALE_V = 0x1p-110f; /* every decoded moment is then a normal float */

/* ---- rounding words ---------------------------------------------------------------------------------------------- */

uint32_t lamb16_hash(uint32_t x)
{
    x ^= x >> 13;
    x *= 0x8A3B8E57u;
    x ^= x >> 14;
    x *= 0xA2C9DAEDu;
    return x;
}

uint32_t lamb16_word(uint64_t index, uint32_t salt, int32_t t)
{
    uint32_t i = (uint32_t)index;
    return (lamb16_hash(i % COLUMNS) ^ lamb16_hash(i / COLUMNS + salt)) * MIXER + (uint32_t)t * GOLDEN;
}

lamb16_status lamb16_words(uint64_t first, uint32_t salt, int32_t t, uint32_t *words, size_t count)
{
    if (count > 0 && words == NULL)
        return LAMB16_NULL_POINTER;
    for (size_t i = 0; i < count; i++)
        words[i] = lamb16_word(first + i, salt, t);
    return LAMB16_OK;
}

/* ---- formats ----------------------------------------------------------------------------------------------------- */

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* 2^exponent for exponents of normal doubles; ldexp would do, a hundred times as slowly. */
static double power_of_two(int exponent)
{
    uint64_t bits = (uint64_t)(exponent + 1023) << 52;
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* floor(log2(x)) for a normal x > 0; something below -126 for smaller ones. */
static int exponent_of(float x) { return (int)(bits_of(x) >> 23 & 0xFF) - 127; }

/* The value of the code of a finite magnitude. */
static float value_of(uint32_t code, const format *f)
{
    uint32_t one = 1u << f->mantissa_bits; /* the implicit one, in units of the mantissa's last bit */
    uint32_t mantissa = code & (one - 1);
    int field = (int)(code >> f->mantissa_bits);
    int exponent = f->min_exponent - f->mantissa_bits;
    return field == 0 ? (float)((double)mantissa * power_of_two(exponent))
                      : (float)((double)(one + mantissa) * power_of_two(exponent + field - 1));
}

/* A finite magnitude between two values of a format, whose codes go on beyond the largest one here. */
typedef struct {
    uint32_t code;   /* of the value below */
    double fraction; /* how far it is on the way to the one above, in [0, 1) */
} place;

static place place_of(float magnitude, const format *f)
{
    int exponent = exponent_of(magnitude);
    if (exponent < f->min_exponent)
        exponent = f->min_exponent; /* subnormal values have the gap of the smallest normal ones */
    double gaps = (double)magnitude * power_of_two(f->mantissa_bits - exponent);
    int low = (int)gaps;
    place found = {(uint32_t)(((exponent - f->min_exponent) << f->mantissa_bits) + low), gaps - low};
    return found;
}

/* The code of a neighbour: that above where the fraction, in units of `random`, plus `random` reaches 1. */
static uint32_t round_stochastically(place x, uint32_t random, const format *f)
{
    double fraction = nearbyint(x.fraction * power_of_two(f->random_bits)); /* half to even */
    return x.code + (((uint32_t)fraction + random) >> f->random_bits);
}

/* ---- fp8 --------------------------------------------------------------------------------------------------------- */

/* The value of a finite code. */
static float decode(uint8_t code, const format *f)
{
    float magnitude = value_of(code & 0x7F, f);
    return code & 0x80 ? -magnitude : magnitude;
}

static uint8_t encode(float x, uint32_t word, const format *f)
{
    uint8_t sign = signbit(x) ? 0x80 : 0;
    if (isnan(x))
        return sign | 0x7F;
    if (isinf(x))
        return sign | (uint8_t)f->largest_code;
    uint32_t code = round_stochastically(place_of(fabsf(x), f), word >> (32 - f->random_bits), f);
    return sign | (uint8_t)(code < f->largest_code ? code : f->largest_code);
}

uint8_t lamb16_encode_e4m3(float x, uint32_t word) { return encode(x, word, &E4M3); }

uint8_t lamb16_encode_e5m2(float x, uint32_t word) { return encode(x, word, &E5M2); }

float lamb16_decode_e4m3(uint8_t code)
{
    return (code & 0x7F) > E4M3.largest_code ? NAN : decode(code, &E4M3);
}

float lamb16_decode_e5m2(uint8_t code)
{
    if ((code & 0x7F) <= E5M2.largest_code)
        return decode(code, &E5M2);
    if ((code & 0x7F) > 0x7C)
        return NAN;
    return code & 0x80 ? -INFINITY : INFINITY;
}

static lamb16_status encode_array(const float *x, const uint32_t *words, uint8_t *codes, size_t count, const format *f)
{
    if (count > 0 && (x == NULL || words == NULL || codes == NULL))
        return LAMB16_NULL_POINTER;
    for (size_t i = 0; i < count; i++)
        codes[i] = encode(x[i], words[i], f);
    return LAMB16_OK;
}

lamb16_status lamb16_encode_e4m3_array(const float *x, const uint32_t *words, uint8_t *codes, size_t count)
{
    return encode_array(x, words, codes, count, &E4M3);
}

lamb16_status lamb16_encode_e5m2_array(const float *x, const uint32_t *words, uint8_t *codes, size_t count)
{
    return encode_array(x, words, codes, count, &E5M2);
}

static lamb16_status decode_array(const uint8_t *codes, float *x, size_t count, float (*decode_one)(uint8_t))
{
    if (count > 0 && (codes == NULL || x == NULL))
        return LAMB16_NULL_POINTER;
    for (size_t i = 0; i < count; i++)
        x[i] = decode_one(codes[i]);
    return LAMB16_OK;
}

lamb16_status lamb16_decode_e4m3_array(const uint8_t *codes, float *x, size_t count)
{
    return decode_array(codes, x, count, lamb16_decode_e4m3);
}

lamb16_status lamb16_decode_e5m2_array(const uint8_t *codes, float *x, size_t count)
{
    return decode_array(codes, x, count, lamb16_decode_e5m2);
}

static float scale(float largest, float format_max, float smallest)
{
    if (!(largest >= 0.0f) || isinf(largest))
        return NAN;
    if (largest == 0.0f)
        return smallest;
    int exponent;
    double fraction = frexp((double)largest / (double)format_max, &exponent); /* in [0.5, 1) */
    float found = (float)ldexp(1.0, fraction == 0.5 ? exponent - 1 : exponent);
    return found > smallest ? found : smallest;
}

float lamb16_scale_e4m3(float largest) { return scale(largest, E4M3_MAX, MIN_SCALE_M); }

float lamb16_scale_e5m2(float largest) { return scale(largest, E5M2_MAX, MIN_SCALE_V); }

/* ---- weights with 16 bits ---------------------------------------------------------------------------------------- */

static const format *format_of(int32_t dtype) { return dtype == LAMB16_BFLOAT16 ? &BFLOAT16 : &FLOAT16; }

static float widen(uint16_t weight, int32_t dtype)
{
    const format *f = format_of(dtype);
    uint32_t code = weight & 0x7FFF;
    float magnitude = code <= f->largest_code ? value_of(code, f) : code == f->largest_code + 1u ? INFINITY : NAN;
    return weight & 0x8000 ? -magnitude : magnitude;
}

/* The float that a bfloat16 weight and its remainder are. 0 has no negative one: of another weight it would make a NaN. */
static float join(uint16_t weight, int16_t remainder)
{
    if ((weight & 0x7FFF) == 0 && remainder < 0)
        remainder = 0;
    return float_of(((uint32_t)weight << 16) + (uint32_t)remainder); /* modulo 2^32 */
}

/* x rounded; with LAMB16_ROUNDING_EXACT, which is for bfloat16, *remainder is what is left. */
static uint16_t narrow(float x, uint32_t word, int32_t dtype, int32_t rounding, int16_t *remainder)
{
    const format *f = format_of(dtype);
    uint32_t infinity = f->largest_code + 1u, code = infinity;
    if (isnan(x)) {
        if (rounding == LAMB16_ROUNDING_EXACT)
            *remainder = 0;
        return (uint16_t)(infinity | infinity >> 1); /* the quiet NaN without a sign */
    }
    if (!isinf(x)) {
        place found = place_of(fabsf(x), f);
        if (rounding == LAMB16_ROUNDING_STOCHASTIC)
            code = round_stochastically(found, word & ((1u << f->random_bits) - 1), f);
        else if (rounding == LAMB16_ROUNDING_EXACT)
            code = found.code + (found.fraction >= 0.5);
        else /* half to even */
            code = found.code + (found.fraction > 0.5 || (found.fraction == 0.5 && found.code % 2 == 1));
    }
    uint16_t weight = (uint16_t)((signbit(x) ? 0x8000 : 0) | (code < infinity ? code : infinity));
    if (rounding == LAMB16_ROUNDING_EXACT)
        *remainder = (int16_t)((int64_t)bits_of(x) - ((int64_t)weight << 16)); /* -2^15 .. 2^15 - 1 */
    return weight;
}

static int has_16_bits(int32_t dtype) { return dtype == LAMB16_BFLOAT16 || dtype == LAMB16_FLOAT16; }

static int is_rounding(int32_t x)
{
    return x == LAMB16_ROUNDING_STOCHASTIC || x == LAMB16_ROUNDING_NEAREST || x == LAMB16_ROUNDING_EXACT;
}

lamb16_status lamb16_round_weights(const float *x, const uint32_t *words, int32_t dtype, int32_t rounding,
                                   uint16_t *weights, int16_t *remainders, size_t count)
{
    int stochastic = rounding == LAMB16_ROUNDING_STOCHASTIC, exact = rounding == LAMB16_ROUNDING_EXACT;
    if (!has_16_bits(dtype))
        return LAMB16_BAD_PARAM_DTYPE;
    if (!is_rounding(rounding))
        return LAMB16_BAD_PARAM_ROUNDING;
    if (exact && dtype == LAMB16_FLOAT16)
        return LAMB16_EXACT_FLOAT16;
    if (count > 0 && (x == NULL || weights == NULL || (stochastic && words == NULL) || (exact && remainders == NULL)))
        return LAMB16_NULL_POINTER;
    for (size_t i = 0; i < count; i++)
        weights[i] = narrow(x[i], stochastic ? words[i] : 0, dtype, rounding, exact ? &remainders[i] : NULL);
    return LAMB16_OK;
}

lamb16_status lamb16_widen_weights(const uint16_t *weights, const int16_t *remainders, int32_t dtype, float *x,
                                   size_t count)
{
    if (!has_16_bits(dtype))
        return LAMB16_BAD_PARAM_DTYPE;
    if (remainders != NULL && dtype == LAMB16_FLOAT16)
        return LAMB16_EXACT_FLOAT16;
    if (count > 0 && (weights == NULL || x == NULL))
        return LAMB16_NULL_POINTER;
    for (size_t i = 0; i < count; i++)
        x[i] = remainders != NULL ? join(weights[i], remainders[i]) : widen(weights[i], dtype);
    return LAMB16_OK;
}

/* ---- reading and writing tensors --------------------------------------------------------------------------------- */

/* Element i of weights or gradients. */
static float load(const void *array, int32_t dtype, size_t i)
{
    return dtype == LAMB16_FLOAT32 ? ((const float *)array)[i] : widen(((const uint16_t *)array)[i], dtype);
}

/* Whether the tensor's remainders are a part of its weights. */
static int is_exact(const lamb16_tensor *x, const lamb16_hyper *h)
{
    return h->param_rounding == LAMB16_ROUNDING_EXACT && x->param_dtype == LAMB16_BFLOAT16;
}

/* NULL where they are not. */
static int16_t *remainder_of(const lamb16_tensor *x, const lamb16_hyper *h)
{
    return is_exact(x, h) ? x->param_remainder : NULL;
}

static float load_weight(const lamb16_tensor *x, size_t i, const lamb16_hyper *h)
{
    return is_exact(x, h) ? join(((const uint16_t *)x->param)[i], x->param_remainder[i])
                          : load(x->param, x->param_dtype, i);
}

/* Store the new weight of element i, rounded; gives the weight as it is from here on. */
static float store_weight(lamb16_tensor *x, size_t i, float weight, uint32_t word, const lamb16_hyper *h)
{
    if (x->param_dtype == LAMB16_FLOAT32)
        return ((float *)x->param)[i] = weight;
    int16_t *remainder = is_exact(x, h) ? &x->param_remainder[i] : NULL;
    ((uint16_t *)x->param)[i] = narrow(weight, word, x->param_dtype, h->param_rounding, remainder);
    return load_weight(x, i, h);
}

/* The sum of the hashes of bfloat16 weights' bits as floats. */
static int64_t checksum(const lamb16_tensor *x)
{
    uint32_t sum = 0;
    for (size_t i = 0; i < x->numel; i++)
        sum += lamb16_hash((uint32_t)((const uint16_t *)x->param)[i] << 16);
    return sum;
}

/* ---- checks ------------------------------------------------------------------------------------------------------ */

const char *lamb16_status_string(lamb16_status status)
{
    switch (status) {
    case LAMB16_OK: return "no error";
    case LAMB16_NULL_POINTER: return "a pointer is NULL; only arrays of tensors with numel 0, and stats, may be";
    case LAMB16_MISALIGNED:
        return "param, grad or param_remainder is not aligned as its elements are; copy it to aligned memory";
    case LAMB16_BAD_NUMEL: return "numel is too large: so many floats do not fit into memory, or their sum into 63 bits";
    case LAMB16_OVERLAP: return "an array that is written overlaps another array; give each tensor memory of its own";
    case LAMB16_BAD_LR: return "lr is invalid; it must be finite and >= 0";
    case LAMB16_BAD_BETA1: return "beta1 is invalid; it must be in [0, 1)";
    case LAMB16_BAD_BETA2: return "beta2 is invalid; it must be in [0, 1)";
    case LAMB16_BAD_EPS: return "eps is invalid; it must be in [2^-100, 1]";
    case LAMB16_BAD_WEIGHT_DECAY: return "weight_decay is invalid; it must be finite and >= 0";
    case LAMB16_BAD_TRUST_SCALE: return "trust_scale is invalid; it must be finite and >= 0";
    case LAMB16_BAD_TRUST_LR: return "trust_lr is invalid; it must be finite and > 0";
    case LAMB16_BAD_TRUST_CLIP: return "trust_clip is invalid; it must be finite and > 0";
    case LAMB16_BAD_BIAS_CORRECTION: return "bias_correction is invalid; it must be 0 or 1";
    case LAMB16_BAD_NESTEROV: return "nesterov is invalid; it must be 0 or 1";
    case LAMB16_BAD_CAUTION: return "caution is invalid; it must be 0 or 1";
    case LAMB16_BAD_MAXIMIZE: return "maximize is invalid; it must be 0 or 1";
    case LAMB16_BAD_GRAD_FACTOR: return "grad_factor is invalid; it must be finite and >= 0";
    case LAMB16_BAD_EXP_AVG: return "exp_avg_codes holds NaN codes: it is damaged, or lamb16_init was not called";
    case LAMB16_BAD_EXP_AVG_SQ:
        return "exp_avg_sq_codes holds NaN, infinite or negative codes: it is damaged, or lamb16_init was not called";
    case LAMB16_BAD_EXP_AVG_NORM:
        return "exp_avg_scale is no power of two in [2^-126, 2^127]: it is damaged, or lamb16_init was not called";
    case LAMB16_BAD_EXP_AVG_SQ_NORM:
        return "exp_avg_sq_scale is no power of two in [2^-126, 2^127]: it is damaged, or lamb16_init was not called";
    case LAMB16_BAD_EXP_AVG_MAX:
        return "exp_avg_max is NaN, negative or below a code of exp_avg_codes: it is damaged, or lamb16_init was not called";
    case LAMB16_BAD_EXP_AVG_SQ_MAX:
        return "exp_avg_sq_max is NaN, negative or below a code of exp_avg_sq_codes: it is damaged, or lamb16_init was not "
               "called";
    case LAMB16_BAD_WEIGHT_SUM: return "weight_sum is negative: it is damaged, or lamb16_init was not called";
    case LAMB16_BAD_UPDATE_SUM: return "update_sum is negative: it is damaged, or lamb16_init was not called";
    case LAMB16_BAD_MASK_COUNT: return "mask_count is not in [0, numel]: it is damaged, or lamb16_init was not called";
    case LAMB16_BAD_STEP: return "step is invalid; it must be in [0, 2^31 - 1]";
    case LAMB16_BAD_PARAM_ROUNDING:
        return "param_rounding is invalid; it must be LAMB16_ROUNDING_STOCHASTIC, LAMB16_ROUNDING_NEAREST or "
               "LAMB16_ROUNDING_EXACT";
    case LAMB16_BAD_PARAM_DTYPE:
        return "the weights' dtype is invalid; it must be LAMB16_BFLOAT16 or LAMB16_FLOAT16, for a tensor also "
               "LAMB16_FLOAT32: start from a structure of zeros";
    case LAMB16_BAD_GRAD_DTYPE:
        return "grad_dtype is invalid; it must be LAMB16_FLOAT32, LAMB16_BFLOAT16 or LAMB16_FLOAT16: start from a "
               "structure of zeros";
    case LAMB16_EXACT_FLOAT16:
        return "LAMB16_ROUNDING_EXACT is not for float16, whose range is too small for remainders to complete; use "
               "LAMB16_ROUNDING_STOCHASTIC, or bfloat16 weights";
    case LAMB16_NO_REMAINDER:
        return "param_remainder is NULL, and LAMB16_ROUNDING_EXACT needs it; give it numel int16_t that are 0";
    case LAMB16_BAD_PARAM_CHECKSUM:
        return "param_checksum is not in [0, 2^32 - 1]: it is damaged, or lamb16_init was not called";
    case LAMB16_STATUS_COUNT: break;
    }
    return "no lamb16_status";
}

void lamb16_default_hyper(lamb16_hyper *hyper)
{
    static const lamb16_hyper defaults = {
        .lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-6, .weight_decay = 0.0,
        .trust_scale = 0.382, .trust_lr = 1e-3, .trust_clip = 2.0,
        .bias_correction = 1, .nesterov = 1, .caution = 0, .maximize = 0,
        .param_rounding = LAMB16_ROUNDING_STOCHASTIC,
    };
    if (hyper != NULL)
        *hyper = defaults;
}

#define FIELD(structure, field) {#structure, #field, offsetof(structure, field)}

size_t lamb16_offset(const char *structure, const char *field)
{
    static const struct {
        const char *structure, *field;
        size_t offset;
    } places[] = {
        FIELD(lamb16_hyper, lr), FIELD(lamb16_hyper, beta1), FIELD(lamb16_hyper, beta2), FIELD(lamb16_hyper, eps),
        FIELD(lamb16_hyper, weight_decay), FIELD(lamb16_hyper, trust_scale), FIELD(lamb16_hyper, trust_lr),
        FIELD(lamb16_hyper, trust_clip), FIELD(lamb16_hyper, bias_correction), FIELD(lamb16_hyper, nesterov),
        FIELD(lamb16_hyper, caution), FIELD(lamb16_hyper, maximize), FIELD(lamb16_hyper, param_rounding),
        {"lamb16_hyper", "", sizeof(lamb16_hyper)},
        FIELD(lamb16_tensor, numel), FIELD(lamb16_tensor, param_dtype), FIELD(lamb16_tensor, grad_dtype),
        FIELD(lamb16_tensor, param), FIELD(lamb16_tensor, grad), FIELD(lamb16_tensor, exp_avg_codes),
        FIELD(lamb16_tensor, exp_avg_sq_codes), FIELD(lamb16_tensor, param_remainder),
        FIELD(lamb16_tensor, exp_avg_scale), FIELD(lamb16_tensor, exp_avg_sq_scale),
        FIELD(lamb16_tensor, exp_avg_max), FIELD(lamb16_tensor, exp_avg_sq_max), FIELD(lamb16_tensor, weight_sum),
        FIELD(lamb16_tensor, update_sum), FIELD(lamb16_tensor, mask_count), FIELD(lamb16_tensor, param_checksum),
        FIELD(lamb16_tensor, step), FIELD(lamb16_tensor, salt), {"lamb16_tensor", "", sizeof(lamb16_tensor)},
        FIELD(lamb16_stats, weight_norm), FIELD(lamb16_stats, update_norm), FIELD(lamb16_stats, trust_ratio),
        FIELD(lamb16_stats, skipped), {"lamb16_stats", "", sizeof(lamb16_stats)},
    };
    for (size_t k = 0; structure != NULL && field != NULL && k < sizeof places / sizeof *places; k++)
        if (strcmp(places[k].structure, structure) == 0 && strcmp(places[k].field, field) == 0)
            return places[k].offset;
    return SIZE_MAX;
}

static int is_decay_rate(double x) { return x >= 0.0 && x < 1.0; } /* false for NaN, as all of these */

static int is_non_negative(double x) { return x >= 0.0 && x <= DBL_MAX; }

static int is_positive(double x) { return x > 0.0 && x <= DBL_MAX; }

static int is_flag(int32_t x) { return x == 0 || x == 1; }

static lamb16_status check_hyper(const lamb16_hyper *h)
{
    if (h == NULL)
        return LAMB16_NULL_POINTER;
    if (!is_non_negative(h->lr))
        return LAMB16_BAD_LR;
    if (!is_decay_rate(h->beta1))
        return LAMB16_BAD_BETA1;
    if (!is_decay_rate(h->beta2))
        return LAMB16_BAD_BETA2;
    if (!(h->eps >= SMALLEST_EPS && h->eps <= 1.0))
        return LAMB16_BAD_EPS;
    if (!is_non_negative(h->weight_decay))
        return LAMB16_BAD_WEIGHT_DECAY;
    if (!is_non_negative(h->trust_scale))
        return LAMB16_BAD_TRUST_SCALE;
    if (!is_positive(h->trust_lr))
        return LAMB16_BAD_TRUST_LR;
    if (!is_positive(h->trust_clip))
        return LAMB16_BAD_TRUST_CLIP;
    if (!is_flag(h->bias_correction))
        return LAMB16_BAD_BIAS_CORRECTION;
    if (!is_flag(h->nesterov))
        return LAMB16_BAD_NESTEROV;
    if (!is_flag(h->caution))
        return LAMB16_BAD_CAUTION;
    if (!is_flag(h->maximize))
        return LAMB16_BAD_MAXIMIZE;
    if (!is_rounding(h->param_rounding))
        return LAMB16_BAD_PARAM_ROUNDING;
    return LAMB16_OK;
}

/* An array's memory. Addresses of different objects are compared as integers, which C permits. */
typedef struct {
    uintptr_t start;
    size_t size; /* in bytes */
} array;

/* The arrays of a tensor: WRITTEN that a step writes to and the gradient; size 0 for what it does not use. */
enum { WRITTEN = 4, ARRAYS };
typedef struct {
    array of[ARRAYS];
} arrays;

static size_t size_of(int32_t dtype) { return dtype == LAMB16_FLOAT32 ? sizeof(float) : sizeof(uint16_t); }

static arrays arrays_of(const lamb16_tensor *x, const void *remainder, const void *grad)
{
    size_t n = x->numel;
    arrays found = {{
        {(uintptr_t)x->param, n * size_of(x->param_dtype)},
        {(uintptr_t)x->exp_avg_codes, n},
        {(uintptr_t)x->exp_avg_sq_codes, n},
        {(uintptr_t)remainder, remainder != NULL ? n * sizeof(int16_t) : 0},
        {(uintptr_t)grad, grad != NULL ? n * size_of(x->grad_dtype) : 0},
    }};
    return found;
}

/* Whether what is written of `a` shares a byte with what is used of `b`; with its other arrays where they are one. */
static int disturbs(const arrays *a, const arrays *b)
{
    for (int i = 0; i < WRITTEN; i++)
        for (int k = 0; k < ARRAYS; k++) {
            array x = a->of[i], y = b->of[k];
            if (!(a == b && i == k) && x.size > 0 && y.size > 0 &&
                (x.start <= y.start ? y.start - x.start < x.size : x.start - y.start < y.size))
                return 1;
        }
    return 0;
}

static int is_power_of_two(float x)
{
    int exponent;
    return x >= FLT_MIN && x <= FLT_MAX && frexpf(x, &exponent) == 0.5f;
}

static int is_misaligned(const void *x, int32_t dtype)
{
    return (uintptr_t)x % (dtype == LAMB16_FLOAT32 ? _Alignof(float) : _Alignof(uint16_t)) != 0;
}

static int is_dtype(int32_t x) { return x == LAMB16_FLOAT32 || has_16_bits(x); }

static int is_too_large(size_t numel) { return numel > SIZE_MAX / sizeof(float) || numel > LARGEST_NUMEL; }

/* The codes, and that the maxima are as large as what they hold: the step relies on it. Codes of one sign are in the
 * order of their values. */
static lamb16_status check_codes(const lamb16_tensor *x)
{
    uint8_t largest_m = 0, largest_v = 0;
    for (size_t i = 0; i < x->numel; i++) {
        uint8_t magnitude_m = x->exp_avg_codes[i] & 0x7F, code_v = x->exp_avg_sq_codes[i];
        if (magnitude_m > E4M3.largest_code)
            return LAMB16_BAD_EXP_AVG;
        if (code_v > E5M2.largest_code) /* with a sign bit it is larger too */
            return LAMB16_BAD_EXP_AVG_SQ;
        largest_m = magnitude_m > largest_m ? magnitude_m : largest_m;
        largest_v = code_v > largest_v ? code_v : largest_v;
    }
    if (decode(largest_m, &E4M3) > x->exp_avg_max)
        return LAMB16_BAD_EXP_AVG_MAX;
    if (decode(largest_v, &E5M2) > x->exp_avg_sq_max)
        return LAMB16_BAD_EXP_AVG_SQ_MAX;
    return LAMB16_OK;
}

static lamb16_status check_scalars(const lamb16_tensor *x)
{
    if (!is_power_of_two(x->exp_avg_scale))
        return LAMB16_BAD_EXP_AVG_NORM;
    if (!is_power_of_two(x->exp_avg_sq_scale))
        return LAMB16_BAD_EXP_AVG_SQ_NORM;
    if (!(x->exp_avg_max >= 0.0f))
        return LAMB16_BAD_EXP_AVG_MAX;
    if (!(x->exp_avg_sq_max >= 0.0f))
        return LAMB16_BAD_EXP_AVG_SQ_MAX;
    if (x->weight_sum < 0)
        return LAMB16_BAD_WEIGHT_SUM;
    if (x->update_sum < 0)
        return LAMB16_BAD_UPDATE_SUM;
    if (x->mask_count < 0 || (uint64_t)x->mask_count > x->numel)
        return LAMB16_BAD_MASK_COUNT;
    if (x->param_checksum < 0 || x->param_checksum > UINT32_MAX)
        return LAMB16_BAD_PARAM_CHECKSUM;
    if (x->step < 0)
        return LAMB16_BAD_STEP;
    return LAMB16_OK;
}

/* Dtypes, pointers, numel, alignment and overlap of what lamb16_init uses, and of gradient and remainders if given. */
static lamb16_status check_arrays(const lamb16_tensor *x, const void *remainder, const void *grad)
{
    if (x->numel > 0 && (x->param == NULL || x->exp_avg_codes == NULL || x->exp_avg_sq_codes == NULL))
        return LAMB16_NULL_POINTER;
    if (is_too_large(x->numel))
        return LAMB16_BAD_NUMEL;
    if (x->numel > 0 && (is_misaligned(x->param, x->param_dtype) || is_misaligned(remainder, LAMB16_BFLOAT16) ||
                         is_misaligned(grad, x->grad_dtype)))
        return LAMB16_MISALIGNED;
    arrays own = arrays_of(x, remainder, grad);
    return disturbs(&own, &own) ? LAMB16_OVERLAP : LAMB16_OK;
}

static lamb16_status check_tensor(const lamb16_tensor *x, const lamb16_hyper *h)
{
    if (!is_dtype(x->param_dtype))
        return LAMB16_BAD_PARAM_DTYPE;
    if (!is_dtype(x->grad_dtype))
        return LAMB16_BAD_GRAD_DTYPE;
    if (h->param_rounding == LAMB16_ROUNDING_EXACT && x->param_dtype == LAMB16_FLOAT16)
        return LAMB16_EXACT_FLOAT16;
    if (x->numel > 0 && is_exact(x, h) && x->param_remainder == NULL)
        return LAMB16_NO_REMAINDER;
    if (x->numel > 0 && x->grad == NULL)
        return LAMB16_NULL_POINTER;
    lamb16_status status = check_arrays(x, remainder_of(x, h), x->grad);
    if (status == LAMB16_OK)
        status = check_scalars(x);
    return status != LAMB16_OK ? status : check_codes(x);
}

lamb16_status lamb16_check(const lamb16_tensor *tensor, const lamb16_hyper *hyper)
{
    if (tensor == NULL)
        return LAMB16_NULL_POINTER;
    lamb16_status status = check_hyper(hyper);
    return status != LAMB16_OK ? status : check_tensor(tensor, hyper);
}

static lamb16_status check_list(const lamb16_tensor *tensors, size_t count, const lamb16_hyper *hyper,
                                double grad_factor)
{
    if (count > 0 && tensors == NULL)
        return LAMB16_NULL_POINTER;
    lamb16_status status = check_hyper(hyper);
    if (status == LAMB16_OK && !is_non_negative(grad_factor))
        status = LAMB16_BAD_GRAD_FACTOR;
    for (size_t i = 0; i < count && status == LAMB16_OK; i++)
        status = check_tensor(&tensors[i], hyper);
    for (size_t i = 0; i < count && status == LAMB16_OK; i++) {
        arrays a = arrays_of(&tensors[i], remainder_of(&tensors[i], hyper), tensors[i].grad);
        for (size_t k = 0; k < i && status == LAMB16_OK; k++) {
            arrays b = arrays_of(&tensors[k], remainder_of(&tensors[k], hyper), tensors[k].grad);
            if (disturbs(&a, &b) || disturbs(&b, &a))
                status = LAMB16_OVERLAP;
        }
    }
    return status;
}

/* ---- sums -------------------------------------------------------------------------------------------------------- */

/* clamp(x^2, least, 1) in units of 2^-20, rounded half to even; a NaN counts as 1. */
static int64_t clamped_square(float x, float least)
{
    float square = x * x;
    if (square < least)
        square = least;
    else if (!(square <= 1.0f))
        square = 1.0f;
    return (int64_t)nearbyint((double)square * SUM_UNITS);
}

/* The largest magnitude of the gradient times the factor; NaN where one is NaN. */
static float largest_gradient(const lamb16_tensor *x, float factor)
{
    float largest = 0.0f;
    for (size_t i = 0; i < x->numel; i++) {
        float magnitude = fabsf(factor * load(x->grad, x->grad_dtype, i));
        if (isnan(magnitude))
            return magnitude;
        if (magnitude > largest)
            largest = magnitude;
    }
    return largest;
}

static lamb16_status check_gradients(const lamb16_tensor *tensors, size_t count)
{
    for (size_t k = 0; k < count; k++) {
        if (!is_dtype(tensors[k].grad_dtype))
            return LAMB16_BAD_GRAD_DTYPE;
        if (tensors[k].numel > 0 && tensors[k].grad == NULL)
            return LAMB16_NULL_POINTER;
        if (is_too_large(tensors[k].numel))
            return LAMB16_BAD_NUMEL;
        if (tensors[k].numel > 0 && is_misaligned(tensors[k].grad, tensors[k].grad_dtype))
            return LAMB16_MISALIGNED;
    }
    return LAMB16_OK;
}

/* The sum over all finite gradients, times the factor, of their squares, each rounded to a multiple of 2^-40. */
static double sum_of_squares(const lamb16_tensor *tensors, size_t count, double factor)
{
    uint64_t low = 0, high = 0; /* the sum is high * 2^64 + low, in units of 2^-40 */
    for (size_t k = 0; k < count; k++) {
        if (!isfinite(largest_gradient(&tensors[k], 1.0f)))
            continue;
        for (size_t i = 0; i < tensors[k].numel; i++) {
            float x = (float)((double)load(tensors[k].grad, tensors[k].grad_dtype, i) * factor);
            uint64_t square = (uint64_t)nearbyint((double)(x * x) * NORM_UNITS);
            low += square;
            high += low < square;
        }
    }
    double upper = (double)high * 0x1p44 + (double)(low >> 20); /* in units of 2^-20, rounded down to them */
    return (upper + (double)(low & 0xFFFFF) * 0x1p-20) * 0x1p-20;
}

lamb16_status lamb16_grad_norm(const lamb16_tensor *tensors, size_t count, double *norm)
{
    if (norm == NULL || (count > 0 && tensors == NULL))
        return LAMB16_NULL_POINTER;
    lamb16_status status = check_gradients(tensors, count);
    if (status != LAMB16_OK)
        return status;
    float largest = 0.0f;
    for (size_t k = 0; k < count; k++) {
        float found = largest_gradient(&tensors[k], 1.0f);
        if (isfinite(found) && found > largest)
            largest = found;
    }
    int exponent; /* largest < 2^exponent */
    frexp((double)largest, &exponent);
    if (exponent < -125)
        exponent = -125; /* subnormal floats count as 2^-126 */
    *norm = sqrt(sum_of_squares(tensors, count, ldexp(1.0, -exponent))) * ldexp(1.0, exponent);
    return LAMB16_OK;
}

double lamb16_clip_factor(double norm, double max_norm)
{
    double factor = max_norm / (norm + 1e-6);
    return factor < 1.0 ? factor : 1.0;
}

/* ---- the step ---------------------------------------------------------------------------------------------------- */

lamb16_status lamb16_init(lamb16_tensor *tensor)
{
    if (tensor == NULL)
        return LAMB16_NULL_POINTER;
    if (!is_dtype(tensor->param_dtype))
        return LAMB16_BAD_PARAM_DTYPE;
    lamb16_status status = check_arrays(tensor, tensor->param_remainder, NULL);
    if (status != LAMB16_OK)
        return status;
    size_t n = tensor->numel;
    if (n > 0) {
        memset(tensor->exp_avg_codes, 0, n);
        memset(tensor->exp_avg_sq_codes, 0, n);
    }
    if (n > 0 && tensor->param_remainder != NULL)
        memset(tensor->param_remainder, 0, n * sizeof *tensor->param_remainder);
    tensor->exp_avg_scale = MIN_SCALE_M;
    tensor->exp_avg_sq_scale = MIN_SCALE_V;
    tensor->exp_avg_max = 0.0f;
    tensor->exp_avg_sq_max = 0.0f;
    tensor->weight_sum = 0;
    for (size_t i = 0; i < n; i++)
        tensor->weight_sum += clamped_square(load(tensor->param, tensor->param_dtype, i), WEIGHT_FLOOR);
    tensor->update_sum = (int64_t)n << 20; /* Adam's first update is +-1 everywhere */
    tensor->mask_count = (int64_t)n;
    tensor->param_checksum = 0;
    tensor->step = 0;
    return LAMB16_OK;
}

/* The number of this step, 1 for the first; the last number stays. */
static int32_t step_number(const lamb16_tensor *x) { return x->step < INT32_MAX ? x->step + 1 : INT32_MAX; }

/* The scalars of a step, each computed in double and rounded once. */
typedef struct {
    float gradient;     /* what the gradient is multiplied with: negative where the step ascends */
    float beta1, beta2;
    float new1, new2;   /* 1 - beta */
    float a, b;         /* the update's momentum is a * m + b * g */
    float root;         /* 1 / sqrt(c2), where bias correction divides v by c2 */
    float eps;
    float bound;        /* 1 / C, where |a * m + b * g| <= C * sqrt(v / c2) for any gradients */
    int caution;
    float gain;         /* with caution: what is left of the update is multiplied with this */
    float weight_decay;
    float step_size;    /* lr times the trust ratio */
} factors;

/* 1 / C by Cauchy-Schwarz over the gradients' weights in a * m + b * g and in v / c2; 0, no bound, where
 * beta1^2 >= beta2. The gradient of k steps ago has the weight a * (1 - beta1) * beta1^k in the one, the last one b
 * more, and (1 - beta2) * beta2^k / c2 in the other. */
static double inverse_bound(const lamb16_hyper *h, double a, double b, double c2)
{
    if (h->beta1 * h->beta1 >= h->beta2)
        return 0.0;
    double q = h->beta1 * h->beta1 / h->beta2;
    double first = a + b / (1.0 - h->beta1);
    return sqrt((1.0 - h->beta2) / c2) / ((1.0 - h->beta1) * sqrt(first * first + a * a * (q / (1.0 - q))));
}

/* The inverse of the share of elements that the last step left to update: a thousand at most. */
static double gain(size_t numel, int64_t mask_count)
{
    double n = (double)numel, counted = (double)mask_count;
    if (counted < n / 1000.0)
        counted = n / 1000.0;
    if (counted < 1e-3)
        counted = 1e-3; /* an empty tensor */
    return n / counted;
}

/* min((sqrt(weight_sum / update_sum) * trust_lr / lr) ^ trust_scale, trust_clip); an update of 0, as an empty tensor's
 * and one whose squares and eps all round to 0, and a rate of 0 count as infinitely small. */
static double trust_ratio(const lamb16_tensor *x, const lamb16_hyper *h)
{
    double base = INFINITY;
    if (h->lr != 0.0 && x->update_sum != 0)
        base = sqrt((double)x->weight_sum / (double)x->update_sum) * h->trust_lr / h->lr;
    double ratio = pow(base, h->trust_scale);
    return h->trust_clip < ratio ? h->trust_clip : ratio;
}

static factors make_factors(const lamb16_tensor *x, const lamb16_hyper *h, double grad_factor)
{
    double t = step_number(x);
    double c1 = h->bias_correction ? 1.0 - pow(h->beta1, t) : 1.0;
    double c2 = h->bias_correction ? 1.0 - pow(h->beta2, t) : 1.0;
    double c3 = h->bias_correction ? 1.0 - pow(h->beta1, t + 1.0) : 1.0; /* of the next step */
    double a = h->nesterov ? h->beta1 / c3 : 1.0 / c1;
    double b = h->nesterov ? (1.0 - h->beta1) / c1 : 0.0;
    factors f;
    f.gradient = (float)(h->maximize ? -grad_factor : grad_factor);
    f.beta1 = (float)h->beta1;
    f.beta2 = (float)h->beta2;
    f.new1 = (float)(1.0 - h->beta1);
    f.new2 = (float)(1.0 - h->beta2);
    f.a = (float)a;
    f.b = (float)b;
    f.root = (float)(1.0 / sqrt(c2));
    f.eps = (float)h->eps;
    f.bound = (float)inverse_bound(h, a, b, c2);
    f.caution = h->caution;
    f.gain = (float)gain(x->numel, x->mask_count);
    f.weight_decay = (float)h->weight_decay;
    f.step_size = (float)(h->lr * trust_ratio(x, h));
    return f;
}

/* What a step makes of one element. */
typedef struct {
    float m, v;  /* the fresh moments */
    float u;     /* the update, still without learning rate and trust ratio */
    int agrees;  /* whether it has the gradient's sign */
} element;

static element evaluate(const lamb16_tensor *x, size_t i, float weight, const factors *f)
{
    float g = f->gradient * load(x->grad, x->grad_dtype, i);
    float old_m = decode(x->exp_avg_codes[i], &E4M3) * x->exp_avg_scale;
    float old_v = decode(x->exp_avg_sq_codes[i], &E5M2) * x->exp_avg_sq_scale;
    element e;
    e.m = f->beta1 * old_m + f->new1 * g;
    e.v = f->beta2 * old_v + f->new2 * (g * g);
    float n = f->a * e.m + f->b * g;
    float denominator = f->root * sqrtf(e.v) + f->eps;
    float least = f->bound * fabsf(n);
    if (!(least <= denominator)) /* also where it is NaN */
        denominator = least;
    float d = n / denominator;
    e.agrees = (n > 0.0f && g > 0.0f) || (n < 0.0f && g < 0.0f);
    if (f->caution)
        d = e.agrees ? d * f->gain : 0.0f;
    e.u = d + f->weight_decay * weight;
    return e;
}

/* What the new state has of all elements. */
typedef struct {
    float max_m, max_v;
    int64_t weight_sum, update_sum, mask_count;
} totals;

/* Weights, with their remainders, and codes of all elements with these scales. */
static totals apply(lamb16_tensor *x, const lamb16_hyper *h, const factors *f, float scale_m, float scale_v)
{
    totals found = {0.0f, 0.0f, 0, 0, 0};
    int32_t t = step_number(x);
    for (size_t i = 0; i < x->numel; i++) {
        float weight = load_weight(x, i, h);
        element e = evaluate(x, i, weight, f);
        uint32_t word = lamb16_word(i, x->salt, t);
        uint8_t code_m = encode(e.m / scale_m, word, &E4M3);
        uint8_t code_v = encode(e.v / scale_v, word, &E5M2);
        if (code_v == 0 && e.v > 0.0f)
            code_v = 1; /* 1 / sqrt(0) would ruin the layer */
        weight = store_weight(x, i, weight - f->step_size * e.u, word, h);
        x->exp_avg_codes[i] = code_m;
        x->exp_avg_sq_codes[i] = code_v;

        float m = fabsf(decode(code_m, &E4M3)), v = decode(code_v, &E5M2);
        found.max_m = m > found.max_m ? m : found.max_m;
        found.max_v = v > found.max_v ? v : found.max_v;
        found.weight_sum += clamped_square(weight, WEIGHT_FLOOR);
        found.update_sum += clamped_square(e.u, f->eps);
        found.mask_count += e.agrees;
    }
    return found;
}

static lamb16_stats step_tensor(lamb16_tensor *x, const lamb16_hyper *h, double grad_factor)
{
    lamb16_stats stats = {NAN, NAN, NAN, 1};
    factors f = make_factors(x, h, grad_factor);

    int64_t sum = is_exact(x, h) ? checksum(x) : x->param_checksum;
    if (sum != x->param_checksum) { /* something else has changed the weights, which count as they are */
        if (x->numel > 0)
            memset(x->param_remainder, 0, x->numel * sizeof *x->param_remainder);
        x->param_checksum = sum;
    }

    /* The largest magnitudes that m and v can have, before they are formed; rounding is monotone. */
    float largest = largest_gradient(x, f.gradient);
    float bound_m = f.beta1 * (x->exp_avg_max * x->exp_avg_scale) + f.new1 * largest;
    float bound_v = f.beta2 * (x->exp_avg_sq_max * x->exp_avg_sq_scale) + f.new2 * (largest * largest);
    if (!(isfinite(largest) && isfinite(bound_m) && bound_v < OVERFLOW_V)) /* a NaN compares as false */
        return stats;
    stats.weight_norm = sqrt((double)x->weight_sum / SUM_UNITS);
    stats.update_norm = sqrt((double)x->update_sum / SUM_UNITS);
    stats.trust_ratio = trust_ratio(x, h);
    stats.skipped = 0;

    float scale_m = lamb16_scale_e4m3(bound_m), scale_v = lamb16_scale_e5m2(bound_v);
    totals found = apply(x, h, &f, scale_m, scale_v);
    if (is_exact(x, h))
        x->param_checksum = checksum(x);
    x->exp_avg_scale = scale_m;
    x->exp_avg_sq_scale = scale_v;
    if (bound_m > 0.0f || bound_v > 0.0f) {
        x->exp_avg_max = found.max_m;
        x->exp_avg_sq_max = found.max_v;
        x->weight_sum = found.weight_sum;
        x->update_sum = found.update_sum;
        if (h->caution)
            x->mask_count = found.mask_count;
        x->step = step_number(x);
        if (x->step == INT32_MAX) /* which stays: the words of the next step would be those of this one */
            x->salt += 1;
    } else if (h->lr != 0.0 && h->weight_decay != 0.0) { /* all moments are 0 and stay so: no step to count */
        x->salt += 1; /* but the weights are rounded, the next time by other words */
    }
    return stats;
}

lamb16_status lamb16_step_list(lamb16_tensor *tensors, size_t count, const lamb16_hyper *hyper, double grad_factor,
                               lamb16_stats *stats)
{
    lamb16_status status = check_list(tensors, count, hyper, grad_factor);
    for (size_t i = 0; i < count && status == LAMB16_OK; i++) {
        lamb16_stats found = step_tensor(&tensors[i], hyper, grad_factor);
        if (stats != NULL)
            stats[i] = found;
    }
    return status;
}

lamb16_status lamb16_step(lamb16_tensor *tensor, const lamb16_hyper *hyper, double grad_factor, lamb16_stats *stats)
{
    return lamb16_step_list(tensor, 1, hyper, grad_factor, stats);
}
