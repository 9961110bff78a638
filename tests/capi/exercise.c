/* Goes through every function of lamb16.h with every error code; run with sanitizers by tests/test_capi.py.
 *
 * Arrays come from malloc with their exact size, so that AddressSanitizer sees a step outside. What the numbers have
 * to be is not asked here but in property_tests/test_c_reference.py. Ends with status 0, or 1 with the first line
 * that failed.
 */
#include "lamb16.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition) check((condition) != 0, #condition, __LINE__)

static void check(int holds, const char *text, int line)
{
    if (!holds) {
        printf("exercise.c:%d: %s does not hold\n", line, text);
        exit(1);
    }
}

static void *memory(size_t size)
{
    void *found = malloc(size > 0 ? size : 1);
    check(found != NULL, "malloc", __LINE__);
    return found;
}

/* Something between -1 and 1, the same for the same i. */
static float noise(uint32_t i) { return (float)(int32_t)lamb16_hash(i) / 2147483648.0f; }

static void fill(float *x, size_t n, uint32_t seed, float factor)
{
    for (size_t i = 0; i < n; i++)
        x[i] = noise(seed + (uint32_t)i) * factor;
}

/* ---- tensors ----------------------------------------------------------------------------------------------------- */

static size_t bytes(size_t n, int32_t dtype) { return n * (dtype == LAMB16_FLOAT32 ? sizeof(float) : sizeof(uint16_t)); }

/* Noise as weights or gradients. */
static void *make_array(size_t n, uint32_t seed, float factor, int32_t dtype)
{
    float *x = memory(n * sizeof(float));
    fill(x, n, seed, factor);
    if (dtype == LAMB16_FLOAT32)
        return x;
    uint16_t *found = memory(bytes(n, dtype));
    CHECK(lamb16_round_weights(x, NULL, dtype, LAMB16_ROUNDING_NEAREST, found, NULL, n) == LAMB16_OK);
    free(x);
    return found;
}

/* With remainders where the weights are bfloat16. */
static lamb16_tensor make_tensor_of(size_t n, uint32_t salt, int32_t param_dtype, int32_t grad_dtype)
{
    lamb16_tensor x;
    memset(&x, 0, sizeof x);
    x.numel = n;
    x.param_dtype = param_dtype;
    x.exp_avg_codes = memory(n);
    x.exp_avg_sq_codes = memory(n);
    x.salt = salt;
    x.param_checksum = 99;
    memset(x.exp_avg_codes, 0xFF, n);
    memset(x.exp_avg_sq_codes, 0xFF, n);
    x.param = make_array(n, salt, 1.0f, param_dtype);
    if (param_dtype == LAMB16_BFLOAT16) {
        x.param_remainder = memory(n * sizeof(int16_t));
        memset(x.param_remainder, 0xFF, n * sizeof(int16_t));
    }
    CHECK(lamb16_init(&x) == LAMB16_OK); /* before there are gradients */
    CHECK(x.update_sum == (int64_t)n << 20 && x.mask_count == (int64_t)n && x.param_checksum == 0);
    for (size_t i = 0; x.param_remainder != NULL && i < n; i++)
        CHECK(x.param_remainder[i] == 0);
    x.grad = make_array(n, salt + 12345, 0.01f, grad_dtype);
    x.grad_dtype = grad_dtype;
    return x;
}

static lamb16_tensor make_tensor(size_t n, uint32_t salt)
{
    return make_tensor_of(n, salt, LAMB16_FLOAT32, LAMB16_FLOAT32);
}

static void *copied(const void *x, size_t size)
{
    return x == NULL ? NULL : memcpy(memory(size), x, size);
}

static lamb16_tensor copy_tensor(const lamb16_tensor *x)
{
    lamb16_tensor copy = *x;
    copy.param = copied(x->param, bytes(x->numel, x->param_dtype));
    copy.grad = copied(x->grad, bytes(x->numel, x->grad_dtype));
    copy.exp_avg_codes = copied(x->exp_avg_codes, x->numel);
    copy.exp_avg_sq_codes = copied(x->exp_avg_sq_codes, x->numel);
    copy.param_remainder = copied(x->param_remainder, x->numel * sizeof(int16_t));
    return copy;
}

static void free_tensor(lamb16_tensor *x)
{
    free(x->param);
    free((void *)x->grad);
    free(x->exp_avg_codes);
    free(x->exp_avg_sq_codes);
    free(x->param_remainder);
}

static int same(const lamb16_tensor *a, const lamb16_tensor *b)
{
    return a->param_dtype == b->param_dtype && a->grad_dtype == b->grad_dtype && a->numel == b->numel &&
           memcmp(a->param, b->param, bytes(a->numel, a->param_dtype)) == 0 &&
           memcmp(a->grad, b->grad, bytes(a->numel, a->grad_dtype)) == 0 &&
           memcmp(a->exp_avg_codes, b->exp_avg_codes, a->numel) == 0 &&
           memcmp(a->exp_avg_sq_codes, b->exp_avg_sq_codes, a->numel) == 0 &&
           (a->param_remainder == NULL ||
            memcmp(a->param_remainder, b->param_remainder, a->numel * sizeof(int16_t)) == 0) &&
           a->exp_avg_scale == b->exp_avg_scale && a->exp_avg_sq_scale == b->exp_avg_sq_scale &&
           a->exp_avg_max == b->exp_avg_max && a->exp_avg_sq_max == b->exp_avg_sq_max &&
           a->weight_sum == b->weight_sum && a->update_sum == b->update_sum && a->mask_count == b->mask_count &&
           a->param_checksum == b->param_checksum && a->step == b->step && a->salt == b->salt;
}

static lamb16_hyper usual(void)
{
    lamb16_hyper h;
    lamb16_default_hyper(&h);
    h.lr = 0.01;
    h.weight_decay = 0.1;
    return h;
}

/* ---- words, codes, scales ---------------------------------------------------------------------------------------- */

static void words(void)
{
    uint32_t found[5];
    CHECK(lamb16_hash(1) != lamb16_hash(2));
    CHECK(lamb16_word(0, 7, 0) == (lamb16_hash(0) ^ lamb16_hash(7)) * 0x9E3779B1u);
    CHECK(lamb16_word(4099, UINT32_MAX, 2) == (lamb16_hash(3) ^ lamb16_hash(3)) * 0x9E3779B1u + 2 * 0x9E3779B9u);
    CHECK(lamb16_word(2049, 9, 0) == (lamb16_hash(1) ^ lamb16_hash(11)) * 0x9E3779B1u);
    CHECK(lamb16_word((1ull << 32) + 5, 0, 1) == lamb16_word(5, 0, 1)); /* indices wrap around */
    CHECK(lamb16_words(10, 3, 2147483647, found, 5) == LAMB16_OK);
    for (uint32_t i = 0; i < 5; i++)
        CHECK(found[i] == lamb16_word(10 + i, 3, 2147483647));
    CHECK(lamb16_words(0, 0, 0, NULL, 0) == LAMB16_OK);
    CHECK(lamb16_words(0, 0, 0, NULL, 1) == LAMB16_NULL_POINTER);
}

typedef struct {
    uint8_t (*encode)(float, uint32_t);
    float (*decode)(uint8_t);
    float (*scale)(float);
    lamb16_status (*encode_array)(const float *, const uint32_t *, uint8_t *, size_t);
    lamb16_status (*decode_array)(const uint8_t *, float *, size_t);
    uint8_t largest_code;
    float largest, smallest, smallest_scale;
} format;

static const format FORMATS[] = {
    {lamb16_encode_e4m3, lamb16_decode_e4m3, lamb16_scale_e4m3, lamb16_encode_e4m3_array, lamb16_decode_e4m3_array,
     0x7E, 448.0f, 0x1p-9f, 0x1p-117f},
    {lamb16_encode_e5m2, lamb16_decode_e5m2, lamb16_scale_e5m2, lamb16_encode_e5m2_array, lamb16_decode_e5m2_array,
     0x7B, 57344.0f, 0x1p-16f, 0x1p-110f},
};

static void codes(const format *f)
{
    static const uint32_t some[] = {0, 1, LAMB16_NEAREST, 0xFFFFFFFFu};
    for (int k = 0; k < 4; k++) {
        for (int code = 0; code < 256; code++) /* a value on the grid stays where it is, whatever the word */
            if ((code & 0x7F) <= f->largest_code)
                CHECK(f->encode(f->decode((uint8_t)code), some[k]) == code);
        CHECK(f->encode(INFINITY, some[k]) == f->largest_code && f->encode(FLT_MAX, some[k]) == f->largest_code);
        CHECK(f->encode(-INFINITY, some[k]) == (f->largest_code | 0x80));
        CHECK(f->encode(-FLT_MAX, some[k]) == (f->largest_code | 0x80));
        CHECK(f->encode(NAN, some[k]) == 0x7F && f->encode(-NAN, some[k]) == 0xFF);
        CHECK(f->encode(0.0f, some[k]) == 0 && f->encode(-0.0f, some[k]) == 0x80);
    }
    CHECK(f->decode(f->largest_code) == f->largest && f->decode(1) == f->smallest && signbit(f->decode(0x80)));
    CHECK(isnan(f->decode(0x7F)) && isnan(f->decode(0xFF)));
    CHECK(f->encode(f->smallest * 0.75f, 0) == 0 && f->encode(f->smallest * 0.75f, 0xFFFFFFFFu) == 1);
    CHECK(f->encode(f->smallest * 0.5f, LAMB16_NEAREST) == 1 && f->encode(f->smallest * 0.49f, LAMB16_NEAREST) == 0);
    CHECK(f->encode(FLT_TRUE_MIN, 0xFFFFFFFFu) == 0);

    float x[] = {0.1f, -3.0f, 300.0f, NAN};
    uint32_t random[] = {5, LAMB16_NEAREST, 0xFFFFFFFFu, 0};
    uint8_t found[4];
    float back[4];
    CHECK(f->encode_array(x, random, found, 4) == LAMB16_OK && f->decode_array(found, back, 4) == LAMB16_OK);
    for (int i = 0; i < 4; i++)
        CHECK(found[i] == f->encode(x[i], random[i]) && (i == 3 ? isnan(back[i]) : back[i] == f->decode(found[i])));
    CHECK(f->encode_array(NULL, NULL, NULL, 0) == LAMB16_OK && f->decode_array(NULL, NULL, 0) == LAMB16_OK);
    CHECK(f->encode_array(NULL, random, found, 4) == LAMB16_NULL_POINTER);
    CHECK(f->encode_array(x, NULL, found, 4) == LAMB16_NULL_POINTER);
    CHECK(f->encode_array(x, random, NULL, 4) == LAMB16_NULL_POINTER);
    CHECK(f->decode_array(NULL, back, 4) == LAMB16_NULL_POINTER);
    CHECK(f->decode_array(found, NULL, 4) == LAMB16_NULL_POINTER);

    CHECK(f->scale(0.0f) == f->smallest_scale && f->scale(FLT_TRUE_MIN) == f->smallest_scale);
    CHECK(f->scale(f->largest) == 1.0f && f->scale(nextafterf(f->largest, INFINITY)) == 2.0f);
    CHECK(f->scale(f->largest / 2) == 0.5f && isfinite(f->scale(FLT_MAX)));
    CHECK(isnan(f->scale(-1.0f)) && isnan(f->scale(INFINITY)) && isnan(f->scale(NAN)));
}

/* ---- weights with 16 bits ---------------------------------------------------------------------------------------- */

static void weights(void)
{
    const int32_t dtypes[] = {LAMB16_BFLOAT16, LAMB16_FLOAT16};
    const uint32_t truncate[] = {0xFFFF0000u, 0xFFFFE000u}, up[] = {0x0000FFFFu, 0x00001FFFu};
    const float ulp[] = {0x1p-7f, 0x1p-10f}, largest[] = {0x1.FEp127f, 65504.0f};
    for (int k = 0; k < 2; k++) {
        float x[] = {1.0f + 0.5f * ulp[k], -1.0f - 1.5f * ulp[k], -0.0f, INFINITY, NAN, largest[k], FLT_MAX}, back[7];
        const uint32_t low[] = {truncate[k], truncate[k], truncate[k], truncate[k], truncate[k], truncate[k], truncate[k]};
        uint32_t high[7];
        uint16_t found[7];
        for (int i = 0; i < 7; i++)
            high[i] = up[k];
        CHECK(lamb16_round_weights(x, low, dtypes[k], LAMB16_ROUNDING_STOCHASTIC, found, NULL, 7) == LAMB16_OK);
        CHECK(lamb16_widen_weights(found, NULL, dtypes[k], back, 7) == LAMB16_OK);
        CHECK(back[0] == 1.0f && back[1] == -1.0f - ulp[k] && back[2] == 0.0f && signbit(back[2]));
        CHECK(back[3] == INFINITY && isnan(back[4]) && back[5] == largest[k]);
        CHECK(k == 0 ? back[6] == largest[0] : back[6] == INFINITY);
        CHECK(lamb16_round_weights(x, high, dtypes[k], LAMB16_ROUNDING_STOCHASTIC, found, NULL, 7) == LAMB16_OK);
        CHECK(lamb16_widen_weights(found, NULL, dtypes[k], back, 7) == LAMB16_OK);
        CHECK(back[0] == 1.0f + ulp[k] && back[1] == -1.0f - 2.0f * ulp[k] && back[5] == largest[k]);
        CHECK(back[6] == INFINITY && found[4] == (k == 0 ? 0x7FC0 : 0x7E00));
        CHECK(lamb16_round_weights(x, NULL, dtypes[k], LAMB16_ROUNDING_NEAREST, found, NULL, 7) == LAMB16_OK);
        CHECK(lamb16_widen_weights(found, NULL, dtypes[k], back, 7) == LAMB16_OK);
        CHECK(back[0] == 1.0f && back[1] == -1.0f - 2.0f * ulp[k] && back[6] == INFINITY); /* ties to even */
    }
    const float x[] = {1.0f + 0x1p-8f, -1.0f - 0x1p-8f, -0.0f, -NAN, FLT_MAX, FLT_TRUE_MIN};
    float back[6];
    uint16_t found[6];
    int16_t rest[6];
    CHECK(lamb16_round_weights(x, NULL, LAMB16_BFLOAT16, LAMB16_ROUNDING_EXACT, found, rest, 6) == LAMB16_OK);
    CHECK(found[0] == 0x3F81 && rest[0] == -0x8000 && found[1] == 0xBF81 && rest[1] == -0x8000); /* ties from 0 */
    CHECK(found[3] == 0x7FC0 && rest[3] == 0 && found[4] == 0x7F80 && rest[4] == -1);
    CHECK(lamb16_widen_weights(found, rest, LAMB16_BFLOAT16, back, 6) == LAMB16_OK);
    for (int i = 0; i < 6; i++)
        CHECK(i == 3 ? isnan(back[i]) : back[i] == x[i] && !signbit(back[i]) == !signbit(x[i]));
}

/* ---- steps ------------------------------------------------------------------------------------------------------- */

static void steps(size_t n, int32_t param_dtype, int32_t grad_dtype, int32_t rounding)
{
    lamb16_hyper h = usual();
    h.param_rounding = rounding;
    lamb16_tensor x = make_tensor_of(n, 99, param_dtype, grad_dtype), start = copy_tensor(&x);
    lamb16_stats stats;
    for (int t = 1; t <= 3; t++) {
        double weight_norm = sqrt((double)x.weight_sum / 1048576.0);
        CHECK(lamb16_step(&x, &h, 1.0, &stats) == LAMB16_OK);
        CHECK(!stats.skipped && isfinite(stats.trust_ratio) && x.step == (n > 0 ? t : 0));
        CHECK(stats.weight_norm == weight_norm && (t > 1 || stats.update_norm == sqrt((double)n)));
        CHECK(x.mask_count == (int64_t)n); /* not counted without caution */
    }
    CHECK(n == 0 || !same(&x, &start));
    CHECK(lamb16_check(&x, &h) == LAMB16_OK); /* what a step leaves is a valid state */
    h.maximize = 1;
    h.bias_correction = 0;
    h.nesterov = 0;
    h.caution = 1;
    CHECK(lamb16_step(&x, &h, 0.5, NULL) == LAMB16_OK);
    CHECK(n < 1000 || x.mask_count < (int64_t)n);
    CHECK(lamb16_check(&x, &h) == LAMB16_OK);
    free_tensor(&x);
    free_tensor(&start);
}

/* Gradients with which a tensor is left as it is. */
static void skipped_steps(size_t n)
{
    const float bad[] = {INFINITY, -INFINITY, NAN, 1e25f, -1e22f};
    const size_t places[] = {0, n / 2, n - 1};
    lamb16_hyper h = usual();
    lamb16_tensor x = make_tensor(n, 5);
    float *grad = memory(n * sizeof(float));
    memcpy(grad, x.grad, n * sizeof(float));
    free((void *)x.grad);
    x.grad = grad;
    CHECK(lamb16_step(&x, &h, 1.0, NULL) == LAMB16_OK);
    for (int i = 0; i < 5; i++)
        for (int k = 0; k < 3; k++) {
            float usual_value = grad[places[k]];
            lamb16_stats stats = {0.0, 0.0, 0.0, 0};
            grad[places[k]] = bad[i];
            lamb16_tensor before = copy_tensor(&x);
            CHECK(lamb16_step(&x, &h, 1.0, &stats) == LAMB16_OK);
            CHECK(stats.skipped == 1 && isnan(stats.trust_ratio));
            CHECK(isnan(stats.weight_norm) && isnan(stats.update_norm));
            CHECK(same(&x, &before));
            grad[places[k]] = usual_value;
            free_tensor(&before);
        }
    lamb16_tensor before = copy_tensor(&x);
    lamb16_stats stats;
    CHECK(lamb16_step(&x, &h, 1e300, &stats) == LAMB16_OK); /* infinite as a float */
    CHECK(stats.skipped && same(&x, &before));
    free_tensor(&before);
    free_tensor(&x);
}

/* Remainders go where something else has set a weight, in a step that leaves the tensor out too. */
static void remainders_of_other_weights(size_t n)
{
    lamb16_hyper h = usual();
    lamb16_stats stats;
    h.param_rounding = LAMB16_ROUNDING_EXACT;
    lamb16_tensor x = make_tensor_of(n, 3, LAMB16_BFLOAT16, LAMB16_FLOAT32);
    CHECK(lamb16_step(&x, &h, 1.0, NULL) == LAMB16_OK);
    int64_t sum = x.param_checksum;
    CHECK(x.param_remainder[0] != 0);
    lamb16_tensor before = copy_tensor(&x);
    CHECK(lamb16_step(&x, &h, 1e300, &stats) == LAMB16_OK && stats.skipped && same(&x, &before));
    ((uint16_t *)x.param)[n - 1] ^= 1;
    CHECK(lamb16_step(&x, &h, 1e300, &stats) == LAMB16_OK && stats.skipped && x.param_checksum != sum);
    for (size_t i = 0; i < n; i++)
        CHECK(x.param_remainder[i] == 0);
    free_tensor(&before);
    before = copy_tensor(&x);
    x.param_remainder[0] = 77; /* which is the weights' own while their checksum is right */
    h.lr = 0.0;
    CHECK(lamb16_step(&x, &h, 1.0, NULL) == LAMB16_OK);
    CHECK(x.param_remainder[0] == 77 && x.param_checksum == before.param_checksum);
    CHECK(memcmp(x.param, before.param, n * sizeof(uint16_t)) == 0);
    h.param_rounding = LAMB16_ROUNDING_NEAREST; /* without them, and NULL is as good */
    h.lr = 0.01;
    CHECK(lamb16_step(&x, &h, 1.0, NULL) == LAMB16_OK);
    CHECK(x.param_remainder[0] == 77 && x.param_checksum == before.param_checksum);
    free(x.param_remainder);
    x.param_remainder = NULL;
    CHECK(lamb16_step(&x, &h, 1.0, NULL) == LAMB16_OK);
    free_tensor(&x);
    free_tensor(&before);
}

static void decoded_moments_that_overflow(void)
{
    lamb16_hyper h = usual();
    lamb16_tensor x = make_tensor(3, 1);
    lamb16_stats stats;
    x.exp_avg_scale = 0x1p127f;
    x.exp_avg_codes[1] = 0x7E;
    x.exp_avg_max = 448.0f;
    lamb16_tensor before = copy_tensor(&x);
    CHECK(lamb16_step(&x, &h, 1.0, &stats) == LAMB16_OK && stats.skipped && same(&x, &before));
    free_tensor(&x);
    free_tensor(&before);
}

static void zero_gradients_leave_no_trace(void)
{
    lamb16_hyper h = usual();
    h.lr = 0.0;
    lamb16_tensor x = make_tensor(7, 1);
    memset((void *)x.grad, 0, 7 * sizeof(float));
    lamb16_tensor before = copy_tensor(&x);
    CHECK(lamb16_step(&x, &h, 1.0, NULL) == LAMB16_OK && same(&x, &before));
    free_tensor(&x);
    free_tensor(&before);
}

static void decay_alone_changes_the_salt(void)
{
    lamb16_hyper h = usual();
    lamb16_tensor x = make_tensor(7, UINT32_MAX);
    memset((void *)x.grad, 0, 7 * sizeof(float));
    CHECK(lamb16_step(&x, &h, 1.0, NULL) == LAMB16_OK && x.salt == 0 && x.step == 0);
    h.weight_decay = 0.0;
    CHECK(lamb16_step(&x, &h, 1.0, NULL) == LAMB16_OK && x.salt == 0);
    free_tensor(&x);
}

static void the_count_stays_at_its_end(void)
{
    lamb16_hyper h = usual();
    lamb16_tensor x = make_tensor(7, UINT32_MAX);
    x.step = INT32_MAX - 1;
    for (uint32_t i = 0; i < 3; i++) {
        CHECK(lamb16_step(&x, &h, 1.0, NULL) == LAMB16_OK && x.step == INT32_MAX && x.salt == i);
        CHECK(isfinite(((const float *)x.param)[0]));
    }
    free_tensor(&x);
}

static void lists(void)
{
    lamb16_hyper h = usual();
    lamb16_tensor list[] = {make_tensor(7, 1), make_tensor(0, 2), make_tensor(1023, 3)};
    lamb16_stats stats[3];
    for (int i = 0; i < 3; i++) {
        lamb16_tensor alone = copy_tensor(&list[i]);
        CHECK(lamb16_step(&alone, &h, 0.5, &stats[i]) == LAMB16_OK);
        free_tensor(&alone);
    }
    lamb16_tensor alone = copy_tensor(&list[2]);
    CHECK(lamb16_step(&alone, &h, 0.5, NULL) == LAMB16_OK);
    lamb16_stats together[3];
    CHECK(lamb16_step_list(list, 3, &h, 0.5, together) == LAMB16_OK);
    CHECK(same(&list[2], &alone));
    for (int i = 0; i < 3; i++)
        CHECK(together[i].update_norm == stats[i].update_norm && together[i].weight_norm == stats[i].weight_norm);
    CHECK(lamb16_step_list(list, 3, &h, 1.0, NULL) == LAMB16_OK);
    CHECK(lamb16_step_list(NULL, 0, &h, 1.0, NULL) == LAMB16_OK);
    for (int i = 0; i < 3; i++)
        free_tensor(&list[i]);
    free_tensor(&alone);
}

static void gradient_norms(void)
{
    float a[] = {3.0f, 0.0f, -4.0f}, b[] = {1.0f, NAN}, c[] = {12.0f}, tiny[] = {0x1p-140f, FLT_TRUE_MIN};
    float huge[] = {FLT_MAX, -FLT_MAX, FLT_MAX, FLT_MAX};
    lamb16_tensor list[4];
    double norm;
    memset(list, 0, sizeof list); /* all but numel and grad are NULL and 0 */
    list[0].numel = 3;
    list[0].grad = a;
    list[1].numel = 2;
    list[1].grad = b;
    list[3].numel = 1; /* list[2] is empty */
    list[3].grad = c;
    CHECK(lamb16_grad_norm(list, 1, &norm) == LAMB16_OK && norm == 5.0);
    CHECK(lamb16_grad_norm(list, 4, &norm) == LAMB16_OK && norm == 13.0);
    CHECK(lamb16_grad_norm(list + 1, 2, &norm) == LAMB16_OK && norm == 0.0);
    CHECK(lamb16_grad_norm(NULL, 0, &norm) == LAMB16_OK && norm == 0.0);
    list[0].numel = 2;
    list[0].grad = tiny;
    CHECK(lamb16_grad_norm(list, 1, &norm) == LAMB16_OK && norm == 0x1p-140);
    list[0].numel = 4;
    list[0].grad = huge;
    CHECK(lamb16_grad_norm(list, 1, &norm) == LAMB16_OK && fabs(norm / FLT_MAX - 2.0) < 1e-6);
    uint16_t halves[] = {0x4200, 0xC400}, brain[] = {0x4040, 0xC080}; /* 3 and -4 */
    list[0].numel = 2;
    list[0].grad = halves;
    list[0].grad_dtype = LAMB16_FLOAT16;
    CHECK(lamb16_grad_norm(list, 1, &norm) == LAMB16_OK && norm == 5.0);
    list[0].grad = brain;
    list[0].grad_dtype = LAMB16_BFLOAT16;
    CHECK(lamb16_grad_norm(list, 1, &norm) == LAMB16_OK && norm == 5.0);
    CHECK(lamb16_clip_factor(0.5, 1.0) == 1.0 && lamb16_clip_factor(0.0, INFINITY) == 1.0);
    CHECK(lamb16_clip_factor(4.0, 1.0) == 1.0 / (4.0 + 1e-6));
}

/* ---- mistakes ---------------------------------------------------------------------------------------------------- */

static int seen[LAMB16_STATUS_COUNT]; /* by status */

static void expect(lamb16_status wanted, lamb16_status found, int line)
{
    if (wanted != found)
        printf("wanted: %s\nfound: %s\n", lamb16_status_string(wanted), lamb16_status_string(found));
    check(wanted == found, "the status", line);
    seen[wanted] = 1;
}

/* A step with a wrong second tensor: this status from all functions, nothing changed, the first tensor included. */
static void refused(lamb16_tensor *list, const lamb16_hyper *h, lamb16_status wanted, int line)
{
    lamb16_tensor first = copy_tensor(&list[0]), second = list[1];
    lamb16_stats stats[2];
    memset(stats, 0x55, sizeof stats);
    lamb16_stats before[2];
    memcpy(before, stats, sizeof stats);
    expect(wanted, lamb16_step_list(list, 2, h, 1.0, stats), line);
    expect(wanted, lamb16_step(&list[1], h, 1.0, stats), line);
    expect(wanted, lamb16_check(&list[1], h), line);
    check(same(&first, &list[0]) && memcmp(&second, &list[1], sizeof second) == 0, "nothing was changed", line);
    check(memcmp(stats, before, sizeof stats) == 0, "the stats were left alone", line);
    free_tensor(&first);
}

#define REFUSED_HYPER(field, value, status)     \
    do {                                        \
        lamb16_hyper wrong = usual();           \
        wrong.field = (value);                  \
        refused(list, &wrong, status, __LINE__); \
    } while (0)

#define REFUSED_TENSOR(field, value, status)        \
    do {                                            \
        lamb16_tensor kept = list[1];               \
        list[1].field = (value);                    \
        lamb16_hyper fine = usual();                \
        refused(list, &fine, status, __LINE__);     \
        list[1] = kept;                             \
    } while (0)

static void wrong_hyperparameters(lamb16_tensor *list)
{
    REFUSED_HYPER(lr, -1e-9, LAMB16_BAD_LR);
    REFUSED_HYPER(lr, INFINITY, LAMB16_BAD_LR);
    REFUSED_HYPER(lr, NAN, LAMB16_BAD_LR);
    REFUSED_HYPER(beta1, 1.0, LAMB16_BAD_BETA1);
    REFUSED_HYPER(beta1, -0.1, LAMB16_BAD_BETA1);
    REFUSED_HYPER(beta1, NAN, LAMB16_BAD_BETA1);
    REFUSED_HYPER(beta2, 1.0, LAMB16_BAD_BETA2);
    REFUSED_HYPER(beta2, -0.1, LAMB16_BAD_BETA2);
    REFUSED_HYPER(beta2, NAN, LAMB16_BAD_BETA2);
    REFUSED_HYPER(eps, 0x1p-101, LAMB16_BAD_EPS);
    REFUSED_HYPER(eps, 1.1, LAMB16_BAD_EPS);
    REFUSED_HYPER(eps, NAN, LAMB16_BAD_EPS);
    REFUSED_HYPER(weight_decay, -0.1, LAMB16_BAD_WEIGHT_DECAY);
    REFUSED_HYPER(weight_decay, INFINITY, LAMB16_BAD_WEIGHT_DECAY);
    REFUSED_HYPER(weight_decay, NAN, LAMB16_BAD_WEIGHT_DECAY);
    REFUSED_HYPER(trust_scale, -0.1, LAMB16_BAD_TRUST_SCALE);
    REFUSED_HYPER(trust_scale, INFINITY, LAMB16_BAD_TRUST_SCALE);
    REFUSED_HYPER(trust_scale, NAN, LAMB16_BAD_TRUST_SCALE);
    REFUSED_HYPER(trust_lr, 0.0, LAMB16_BAD_TRUST_LR);
    REFUSED_HYPER(trust_lr, INFINITY, LAMB16_BAD_TRUST_LR);
    REFUSED_HYPER(trust_lr, NAN, LAMB16_BAD_TRUST_LR);
    REFUSED_HYPER(trust_clip, 0.0, LAMB16_BAD_TRUST_CLIP);
    REFUSED_HYPER(trust_clip, INFINITY, LAMB16_BAD_TRUST_CLIP);
    REFUSED_HYPER(trust_clip, NAN, LAMB16_BAD_TRUST_CLIP);
    REFUSED_HYPER(bias_correction, 2, LAMB16_BAD_BIAS_CORRECTION);
    REFUSED_HYPER(bias_correction, -1, LAMB16_BAD_BIAS_CORRECTION);
    REFUSED_HYPER(nesterov, 2, LAMB16_BAD_NESTEROV);
    REFUSED_HYPER(nesterov, -1, LAMB16_BAD_NESTEROV);
    REFUSED_HYPER(caution, 2, LAMB16_BAD_CAUTION);
    REFUSED_HYPER(caution, -1, LAMB16_BAD_CAUTION);
    REFUSED_HYPER(maximize, 2, LAMB16_BAD_MAXIMIZE);
    REFUSED_HYPER(maximize, -1, LAMB16_BAD_MAXIMIZE);
    REFUSED_HYPER(param_rounding, 3, LAMB16_BAD_PARAM_ROUNDING);
    REFUSED_HYPER(param_rounding, -1, LAMB16_BAD_PARAM_ROUNDING);
}

static void wrong_tensors(lamb16_tensor *list)
{
    REFUSED_TENSOR(param, NULL, LAMB16_NULL_POINTER);
    REFUSED_TENSOR(grad, NULL, LAMB16_NULL_POINTER);
    REFUSED_TENSOR(exp_avg_codes, NULL, LAMB16_NULL_POINTER);
    REFUSED_TENSOR(exp_avg_sq_codes, NULL, LAMB16_NULL_POINTER);
    REFUSED_TENSOR(numel, SIZE_MAX / 2, LAMB16_BAD_NUMEL);
    REFUSED_TENSOR(param, (void *)((char *)list[1].param + 1), LAMB16_MISALIGNED);
    REFUSED_TENSOR(grad, (void *)((char *)(void *)list[1].grad + 2), LAMB16_MISALIGNED);
    REFUSED_TENSOR(grad, list[1].param, LAMB16_OVERLAP);
    REFUSED_TENSOR(grad, (float *)list[1].param + 6, LAMB16_OVERLAP);
    REFUSED_TENSOR(exp_avg_codes, (uint8_t *)list[1].param + 27, LAMB16_OVERLAP);
    REFUSED_TENSOR(exp_avg_sq_codes, list[1].exp_avg_codes + 6, LAMB16_OVERLAP);
    REFUSED_TENSOR(exp_avg_sq_codes, (uint8_t *)(void *)list[1].grad, LAMB16_OVERLAP);
    const float norms[] = {0.0f, -1.0f, 3.0f, 0x1p-127f, INFINITY, NAN};
    for (int i = 0; i < 6; i++) {
        REFUSED_TENSOR(exp_avg_scale, norms[i], LAMB16_BAD_EXP_AVG_NORM);
        REFUSED_TENSOR(exp_avg_sq_scale, norms[i], LAMB16_BAD_EXP_AVG_SQ_NORM);
    }
    const float maxima[] = {-FLT_TRUE_MIN, -INFINITY, NAN};
    for (int i = 0; i < 3; i++) {
        REFUSED_TENSOR(exp_avg_max, maxima[i], LAMB16_BAD_EXP_AVG_MAX);
        REFUSED_TENSOR(exp_avg_sq_max, maxima[i], LAMB16_BAD_EXP_AVG_SQ_MAX);
    }
    REFUSED_TENSOR(weight_sum, -1, LAMB16_BAD_WEIGHT_SUM);
    REFUSED_TENSOR(update_sum, -1, LAMB16_BAD_UPDATE_SUM);
    REFUSED_TENSOR(mask_count, -1, LAMB16_BAD_MASK_COUNT);
    REFUSED_TENSOR(mask_count, 8, LAMB16_BAD_MASK_COUNT);
    REFUSED_TENSOR(param_checksum, -1, LAMB16_BAD_PARAM_CHECKSUM);
    REFUSED_TENSOR(param_checksum, (int64_t)1 << 32, LAMB16_BAD_PARAM_CHECKSUM);
    REFUSED_TENSOR(param_dtype, 3, LAMB16_BAD_PARAM_DTYPE);
    REFUSED_TENSOR(param_dtype, -1, LAMB16_BAD_PARAM_DTYPE);
    REFUSED_TENSOR(grad_dtype, 3, LAMB16_BAD_GRAD_DTYPE);
    REFUSED_TENSOR(grad_dtype, -1, LAMB16_BAD_GRAD_DTYPE);
    REFUSED_TENSOR(step, -1, LAMB16_BAD_STEP);
    const uint8_t wrong_m[] = {0x7F, 0xFF}, wrong_v[] = {0x7C, 0x7D, 0x7F, 0x80, 0x81, 0xFC};
    lamb16_hyper h = usual();
    for (int i = 0; i < 2; i++) {
        list[1].exp_avg_codes[6] = wrong_m[i];
        refused(list, &h, LAMB16_BAD_EXP_AVG, __LINE__);
        list[1].exp_avg_codes[6] = 0;
    }
    for (int i = 0; i < 6; i++) {
        list[1].exp_avg_sq_codes[6] = wrong_v[i];
        refused(list, &h, LAMB16_BAD_EXP_AVG_SQ, __LINE__);
        list[1].exp_avg_sq_codes[6] = 0;
    }
}

/* Maxima below what the codes hold, the first moment's with either sign. */
static void too_small_maxima(lamb16_tensor *list)
{
    lamb16_hyper h = usual();
    list[1].exp_avg_codes[6] = 0xFE;
    REFUSED_TENSOR(exp_avg_max, nextafterf(448.0f, 0.0f), LAMB16_BAD_EXP_AVG_MAX);
    list[1].exp_avg_codes[6] = 0x08;
    REFUSED_TENSOR(exp_avg_max, nextafterf(0x1p-6f, 0.0f), LAMB16_BAD_EXP_AVG_MAX);
    list[1].exp_avg_max = 0x1p-6f;
    CHECK(lamb16_check(&list[1], &h) == LAMB16_OK);
    list[1].exp_avg_sq_codes[0] = 0x04;
    REFUSED_TENSOR(exp_avg_sq_max, nextafterf(0x1p-14f, 0.0f), LAMB16_BAD_EXP_AVG_SQ_MAX);
    list[1].exp_avg_sq_max = 0x1p-14f;
    CHECK(lamb16_check(&list[1], &h) == LAMB16_OK);
    list[1].exp_avg_codes[6] = list[1].exp_avg_sq_codes[0] = 0;
    list[1].exp_avg_max = list[1].exp_avg_sq_max = 0.0f;
}

#define REFUSED_EXACT(field, value, status)         \
    do {                                            \
        lamb16_tensor kept = list[1];               \
        list[1].field = (value);                    \
        refused(list, &exact, status, __LINE__);    \
        list[1] = kept;                             \
    } while (0)

/* What goes with floats, or with another rounding, and not with remainders. */
static void wrong_halves(void)
{
    lamb16_hyper exact = usual(), h = usual();
    exact.param_rounding = LAMB16_ROUNDING_EXACT;
    lamb16_tensor list[] = {make_tensor_of(7, 1, LAMB16_BFLOAT16, LAMB16_FLOAT32),
                            make_tensor_of(7, 2, LAMB16_BFLOAT16, LAMB16_BFLOAT16)};
    REFUSED_EXACT(param_dtype, LAMB16_FLOAT16, LAMB16_EXACT_FLOAT16);
    REFUSED_EXACT(param_remainder, NULL, LAMB16_NO_REMAINDER);
    REFUSED_EXACT(param_remainder, (void *)((char *)list[1].param_remainder + 1), LAMB16_MISALIGNED);
    REFUSED_EXACT(param, (void *)((char *)list[1].param + 1), LAMB16_MISALIGNED);
    REFUSED_EXACT(grad, (void *)((char *)(void *)list[1].grad + 1), LAMB16_MISALIGNED);
    REFUSED_EXACT(param_remainder, (int16_t *)list[1].param + 6, LAMB16_OVERLAP);
    REFUSED_EXACT(param_remainder, (int16_t *)(void *)list[1].grad + 6, LAMB16_OVERLAP);
    REFUSED_EXACT(exp_avg_codes, (uint8_t *)list[1].param_remainder + 13, LAMB16_OVERLAP);

    lamb16_tensor kept = list[1]; /* what follows the last element, two bytes each, is not theirs */
    char *two = memory(4 * 7);
    memset(two, 0, 4 * 7);
    list[1].param = two;
    list[1].grad = two + 2 * 7;
    CHECK(lamb16_check(&list[1], &h) == LAMB16_OK);
    list[1] = kept;
    list[1].param_remainder = (int16_t *)list[1].param; /* ignored with another rounding */
    CHECK(lamb16_check(&list[1], &h) == LAMB16_OK);
    list[1].param_remainder = list[0].param_remainder;
    CHECK(lamb16_check(&list[1], &exact) == LAMB16_OK);
    lamb16_tensor first = copy_tensor(&list[0]);
    expect(LAMB16_OVERLAP, lamb16_step_list(list, 2, &exact, 1.0, NULL), __LINE__);
    CHECK(same(&first, &list[0]));
    list[1] = kept;
    list[1].param_dtype = LAMB16_FLOAT16; /* two bytes fit, but they are no bfloat16: no remainders with either */
    CHECK(lamb16_check(&list[1], &h) == LAMB16_OK);
    list[1] = kept;

    lamb16_tensor x = kept;
    x.param_dtype = 3;
    expect(LAMB16_BAD_PARAM_DTYPE, lamb16_init(&x), __LINE__);
    x = kept;
    x.param_remainder = (int16_t *)x.param + 6;
    expect(LAMB16_OVERLAP, lamb16_init(&x), __LINE__);
    x.param_remainder = (void *)((char *)kept.param_remainder + 1);
    expect(LAMB16_MISALIGNED, lamb16_init(&x), __LINE__);
    x = kept;
    x.param = (void *)((char *)kept.param + 1);
    expect(LAMB16_MISALIGNED, lamb16_init(&x), __LINE__);
    free(two);
    free_tensor(&first);
    free_tensor(&list[0]);
    free_tensor(&list[1]);
}

static void wrong_roundings(void)
{
    float x[] = {1.0f};
    uint32_t random[] = {0};
    uint16_t to[] = {7};
    int16_t rest[] = {7};
    const int32_t bf16 = LAMB16_BFLOAT16, f16 = LAMB16_FLOAT16;
    const int32_t stochastic = LAMB16_ROUNDING_STOCHASTIC, nearest = LAMB16_ROUNDING_NEAREST;
    const int32_t exact = LAMB16_ROUNDING_EXACT;
    expect(LAMB16_BAD_PARAM_DTYPE, lamb16_round_weights(x, random, LAMB16_FLOAT32, nearest, to, rest, 1), __LINE__);
    expect(LAMB16_BAD_PARAM_DTYPE, lamb16_round_weights(x, random, 3, nearest, to, rest, 1), __LINE__);
    expect(LAMB16_BAD_PARAM_ROUNDING, lamb16_round_weights(x, random, bf16, 3, to, rest, 1), __LINE__);
    expect(LAMB16_EXACT_FLOAT16, lamb16_round_weights(x, random, f16, exact, to, rest, 1), __LINE__);
    expect(LAMB16_NULL_POINTER, lamb16_round_weights(NULL, random, bf16, nearest, to, rest, 1), __LINE__);
    expect(LAMB16_NULL_POINTER, lamb16_round_weights(x, NULL, bf16, stochastic, to, rest, 1), __LINE__);
    expect(LAMB16_NULL_POINTER, lamb16_round_weights(x, random, bf16, nearest, NULL, rest, 1), __LINE__);
    expect(LAMB16_NULL_POINTER, lamb16_round_weights(x, random, bf16, exact, to, NULL, 1), __LINE__);
    expect(LAMB16_BAD_PARAM_DTYPE, lamb16_widen_weights(to, NULL, LAMB16_FLOAT32, x, 1), __LINE__);
    expect(LAMB16_EXACT_FLOAT16, lamb16_widen_weights(to, rest, f16, x, 1), __LINE__);
    expect(LAMB16_NULL_POINTER, lamb16_widen_weights(NULL, rest, bf16, x, 1), __LINE__);
    expect(LAMB16_NULL_POINTER, lamb16_widen_weights(to, rest, bf16, NULL, 1), __LINE__);
    CHECK(to[0] == 7 && rest[0] == 7 && x[0] == 1.0f);
    CHECK(lamb16_round_weights(NULL, NULL, bf16, stochastic, NULL, NULL, 0) == LAMB16_OK);
    CHECK(lamb16_widen_weights(NULL, NULL, f16, NULL, 0) == LAMB16_OK);
}

static void wrong_factors(lamb16_tensor *list)
{
    const double factors[] = {-1e-300, INFINITY, NAN};
    lamb16_hyper h = usual();
    lamb16_tensor before = copy_tensor(&list[0]);
    for (int i = 0; i < 3; i++) {
        expect(LAMB16_BAD_GRAD_FACTOR, lamb16_step_list(list, 2, &h, factors[i], NULL), __LINE__);
        expect(LAMB16_BAD_GRAD_FACTOR, lamb16_step(list, &h, factors[i], NULL), __LINE__);
    }
    CHECK(same(&list[0], &before));
    free_tensor(&before);
}

static void wrong_norms(lamb16_tensor *list)
{
    double norm = 7.0;
    lamb16_tensor x = list[0];
    expect(LAMB16_NULL_POINTER, lamb16_grad_norm(&x, 1, NULL), __LINE__);
    expect(LAMB16_NULL_POINTER, lamb16_grad_norm(NULL, 1, &norm), __LINE__);
    x.grad = NULL;
    expect(LAMB16_NULL_POINTER, lamb16_grad_norm(&x, 1, &norm), __LINE__);
    x.grad = (const char *)list[0].grad + 2;
    expect(LAMB16_MISALIGNED, lamb16_grad_norm(&x, 1, &norm), __LINE__);
    x.grad_dtype = LAMB16_FLOAT16; /* whose two bytes are aligned there */
    CHECK(lamb16_grad_norm(&x, 1, &norm) == LAMB16_OK);
    norm = 7.0;
    x.grad_dtype = 3;
    expect(LAMB16_BAD_GRAD_DTYPE, lamb16_grad_norm(&x, 1, &norm), __LINE__);
    x.grad_dtype = LAMB16_FLOAT32;
    x.numel = SIZE_MAX / 2;
    expect(LAMB16_BAD_NUMEL, lamb16_grad_norm(&x, 1, &norm), __LINE__);
    CHECK(norm == 7.0);
}

/* Two tensors that are fine each, but not together. */
static void wrong_lists(lamb16_tensor *list)
{
    lamb16_hyper h = usual();
    lamb16_tensor kept = list[1];
    list[1].param = list[0].param;
    expect(LAMB16_OVERLAP, lamb16_step_list(list, 2, &h, 1.0, NULL), __LINE__);
    list[1] = kept;
    list[1].grad = list[0].param; /* written by the one, read by the other, in either order */
    expect(LAMB16_OVERLAP, lamb16_step_list(list, 2, &h, 1.0, NULL), __LINE__);
    list[1] = list[0];
    list[0] = kept;
    list[1].exp_avg_codes = kept.exp_avg_codes;
    expect(LAMB16_OVERLAP, lamb16_step_list(list, 2, &h, 1.0, NULL), __LINE__);
}

static void mistakes(void)
{
    lamb16_hyper h = usual();
    lamb16_tensor list[] = {make_tensor(7, 1), make_tensor(7, 2)};
    wrong_hyperparameters(list);
    wrong_tensors(list);
    too_small_maxima(list);
    wrong_halves();
    wrong_roundings();
    wrong_factors(list);
    wrong_norms(list);
    lamb16_tensor kept[] = {list[0], list[1]};
    lamb16_tensor before[] = {copy_tensor(&list[0]), copy_tensor(&list[1])};
    wrong_lists(list);
    CHECK(same(&kept[0], &before[0]) && same(&kept[1], &before[1]));

    expect(LAMB16_NULL_POINTER, lamb16_step(NULL, &h, 1.0, NULL), __LINE__);
    expect(LAMB16_NULL_POINTER, lamb16_step(kept, NULL, 1.0, NULL), __LINE__);
    expect(LAMB16_NULL_POINTER, lamb16_step_list(NULL, 1, &h, 1.0, NULL), __LINE__);
    expect(LAMB16_NULL_POINTER, lamb16_step_list(NULL, 0, NULL, 1.0, NULL), __LINE__);
    expect(LAMB16_NULL_POINTER, lamb16_check(NULL, &h), __LINE__);
    expect(LAMB16_NULL_POINTER, lamb16_check(kept, NULL), __LINE__);
    lamb16_default_hyper(NULL);

    lamb16_tensor x = kept[0];
    expect(LAMB16_NULL_POINTER, lamb16_init(NULL), __LINE__);
    x.exp_avg_codes = NULL;
    expect(LAMB16_NULL_POINTER, lamb16_init(&x), __LINE__);
    x.exp_avg_codes = kept[0].exp_avg_sq_codes;
    expect(LAMB16_OVERLAP, lamb16_init(&x), __LINE__);
    x.exp_avg_codes = (uint8_t *)x.param + 27;
    expect(LAMB16_OVERLAP, lamb16_init(&x), __LINE__);
    x = kept[0];
    x.exp_avg_sq_codes = (uint8_t *)x.param;
    expect(LAMB16_OVERLAP, lamb16_init(&x), __LINE__);
    x = kept[0];
    x.param = NULL;
    expect(LAMB16_NULL_POINTER, lamb16_init(&x), __LINE__);
    x.param = (void *)((char *)kept[0].param + 1);
    expect(LAMB16_MISALIGNED, lamb16_init(&x), __LINE__);
    x = kept[0];
    x.numel = SIZE_MAX;
    expect(LAMB16_BAD_NUMEL, lamb16_init(&x), __LINE__);
    x.numel = SIZE_MAX / 8; /* which may fit into memory, but its sums in units of 2^-20 not into int64 */
    if (SIZE_MAX > UINT32_MAX)
        expect(LAMB16_BAD_NUMEL, lamb16_init(&x), __LINE__);
    CHECK(same(&kept[0], &before[0]));
    for (int i = 0; i < 2; i++) {
        free_tensor(&kept[i]);
        free_tensor(&before[i]);
    }
}

/* Every status has a text of its own and, but for LAMB16_OK, was met above. */
static void statuses(void)
{
    for (int a = LAMB16_OK; a < LAMB16_STATUS_COUNT; a++) {
        if (a != LAMB16_OK && !seen[a]) {
            printf("exercise.c: no call here gave status %d: %s\n", a, lamb16_status_string((lamb16_status)a));
            exit(1);
        }
        for (int b = a + 1; b <= LAMB16_STATUS_COUNT; b++)
            CHECK(strcmp(lamb16_status_string((lamb16_status)a), lamb16_status_string((lamb16_status)b)) != 0);
    }
}

static void offsets(void)
{
    CHECK(lamb16_offset("lamb16_hyper", "lr") == 0);
    CHECK(lamb16_offset("lamb16_hyper", "param_rounding") == offsetof(lamb16_hyper, param_rounding));
    CHECK(lamb16_offset("lamb16_tensor", "salt") == offsetof(lamb16_tensor, salt));
    CHECK(lamb16_offset("lamb16_stats", "skipped") == offsetof(lamb16_stats, skipped));
    CHECK(lamb16_offset("lamb16_hyper", "") == sizeof(lamb16_hyper));
    CHECK(lamb16_offset("lamb16_tensor", "") == sizeof(lamb16_tensor));
    CHECK(lamb16_offset("lamb16_stats", "") == sizeof(lamb16_stats));
    CHECK(lamb16_offset("lamb16_stats", "lr") == SIZE_MAX && lamb16_offset("lamb16_format", "") == SIZE_MAX);
    CHECK(lamb16_offset(NULL, "lr") == SIZE_MAX && lamb16_offset("lamb16_hyper", NULL) == SIZE_MAX);
}

int main(void)
{
    const size_t sizes[] = {0, 1, 7, 1023, 70001};
    offsets();
    words();
    codes(&FORMATS[0]);
    codes(&FORMATS[1]);
    weights();
    for (int i = 0; i < 5; i++)
        for (int32_t rounding = LAMB16_ROUNDING_STOCHASTIC; rounding <= LAMB16_ROUNDING_EXACT; rounding++)
            for (int32_t k = LAMB16_FLOAT32; k <= LAMB16_FLOAT16; k++)
                if (k != LAMB16_FLOAT16 || rounding != LAMB16_ROUNDING_EXACT)
                    steps(sizes[i], k, (k + rounding) % 3, rounding);
    remainders_of_other_weights(70001);
    for (int i = 1; i < 5; i++)
        skipped_steps(sizes[i]);
    decoded_moments_that_overflow();
    zero_gradients_leave_no_trace();
    decay_alone_changes_the_salt();
    the_count_stays_at_its_end();
    lists();
    gradient_norms();
    mistakes();
    statuses();
#ifdef STEP_OUTSIDE /* negative control: the sanitizer has to see this */
    lamb16_hyper h = usual();
    lamb16_tensor x = make_tensor(7, 1);
    x.numel = 8;
    lamb16_step(&x, &h, 1.0, NULL);
#endif
    puts("all held");
    return 0;
}
