/* `lamb16 check`: run an exported step beside the C reference and compare after every step.
 *
 *     AOTI_RUNTIME_CHECK_INPUTS=1 harness MODEL.so < PLAN
 *
 * PLAN is text: steps, seed, the hyperparameters, the lamb16_dtype of weights and gradients, the number of tensors, and
 * for each of them its salt, the number of its dimensions and these. The results go to stdout as one line of names and numbers, the first mismatches to stderr.
 * Status 0: no bit differed; 1: some did; 2: it could not be run, and stderr says why.
 *
 * HYPERPARAMETERS(X) is defined by whoever compiles this, as X(lr) X(beta1) ...: the fields of lamb16_hyper in the order
 * of the plan.
 */
#include "aoti.h"
#include "inputs.h"
#include "lamb16.h"

#include <inttypes.h>

enum { SHOWN = 8 };                          /* mismatches that are printed */
enum { SCALES = 4, COUNTERS = 2, SUMS = 4 }; /* columns of the step's tables */
enum { TABLES = 5 };                         /* inputs of the step besides those of tensors: these and two numbers */

/* The two copies of a tensor: of the exported step, whose scalars are in tables, and of the reference. */
typedef struct {
    int32_t ndim;
    int64_t shape[AOTI_MAX_DIMS];
    void *param, *grad;
    uint8_t *exp_avg_codes, *exp_avg_sq_codes;
    int16_t *param_remainder;
    lamb16_tensor reference;
    void *reference_grad;
} tensor;

typedef struct {
    uint64_t steps, seed;
    lamb16_hyper hyper;
    int32_t dtype;     /* of weights and gradients */
    int exact;         /* whether there are remainders */
    size_t per_tensor; /* inputs: param, grad, codes of both moments, and param_remainder if there are */
    size_t count;
    tensor *tensors;
    float *scales;      /* [count, SCALES]: exp_avg_scale, exp_avg_sq_scale, exp_avg_max, exp_avg_sq_max */
    int32_t *counters; /* [count, COUNTERS]: step, salt */
    int64_t *sums;     /* [count, SUMS]: weight_sum, update_sum, mask_count, param_checksum */
} plan;

typedef struct {
    uint64_t codes, scalars, weights, ulp, skipped, shown;
} differences;

static void quit(const char *message)
{
    fprintf(stderr, "%s\n", message);
    exit(2);
}

static void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count > 0 ? count : 1, size);
    if (memory == NULL)
        quit("out of memory");
    return memory;
}

/* ---- the plan ---------------------------------------------------------------------------------------------------- */

static double read_number(void)
{
    double x;
    if (scanf("%la", &x) != 1)
        quit("the plan has no hyperparameters");
    return x;
}

static void read_hyper(lamb16_hyper *h)
{
#define READ(name) h->name = read_number(); /* flags are int32_t and given as 0 or 1 */
    HYPERPARAMETERS(READ)
}

static size_t size_of(int32_t dtype) { return dtype == LAMB16_FLOAT32 ? sizeof(float) : sizeof(uint16_t); }

/* Floats as weights or gradients of this dtype. */
static void store(const float *x, size_t n, void *array, int32_t dtype)
{
    if (dtype == LAMB16_FLOAT32)
        memcpy(array, x, n * sizeof *x);
    else if (lamb16_round_weights(x, NULL, dtype, LAMB16_ROUNDING_NEAREST, array, NULL, n) != LAMB16_OK)
        quit("the plan has a dtype that there is not");
}

static void read_tensor(const plan *p, tensor *t, uint64_t index)
{
    size_t n = 1;
    if (scanf("%" SCNu32 " %" SCNd32, &t->reference.salt, &t->ndim) != 2 || t->ndim < 0 || t->ndim > AOTI_MAX_DIMS)
        quit("the plan has a tensor without a salt, or with more dimensions than supported");
    for (int32_t k = 0; k < t->ndim; k++) {
        if (scanf("%" SCNd64, &t->shape[k]) != 1 || t->shape[k] < 0)
            quit("the plan has a tensor without a size");
        n *= (size_t)t->shape[k];
    }
    t->param = allocate(n, size_of(p->dtype));
    t->grad = allocate(n, size_of(p->dtype));
    t->exp_avg_codes = allocate(n, 1);
    t->exp_avg_sq_codes = allocate(n, 1);
    t->param_remainder = allocate(n, sizeof *t->param_remainder);
    t->reference_grad = allocate(n, size_of(p->dtype));
    t->reference.numel = n;
    t->reference.param_dtype = t->reference.grad_dtype = p->dtype;
    t->reference.param = allocate(n, size_of(p->dtype));
    t->reference.grad = t->reference_grad;
    t->reference.exp_avg_codes = allocate(n, 1);
    t->reference.exp_avg_sq_codes = allocate(n, 1);
    t->reference.param_remainder = allocate(n, sizeof *t->param_remainder);
    float *weights = allocate(n, sizeof *weights);
    inputs_weights(weights, n, p->seed, index);
    store(weights, n, t->param, p->dtype);
    store(weights, n, t->reference.param, p->dtype);
    free(weights);
    if (lamb16_init(&t->reference) != LAMB16_OK)
        quit("lamb16_init refused a tensor");
}

/* The scalar state of tensor i before the first step, from the reference into the tables. */
static void write_scalars(const plan *p, size_t i)
{
    const lamb16_tensor *r = &p->tensors[i].reference;
    float *scales = &p->scales[SCALES * i];
    int32_t *counters = &p->counters[COUNTERS * i];
    int64_t *sums = &p->sums[SUMS * i];
    scales[0] = r->exp_avg_scale;
    scales[1] = r->exp_avg_sq_scale;
    scales[2] = r->exp_avg_max;
    scales[3] = r->exp_avg_sq_max;
    counters[0] = r->step;
    memcpy(&counters[1], &r->salt, sizeof r->salt);
    sums[0] = r->weight_sum;
    sums[1] = r->update_sum;
    sums[2] = r->mask_count;
    sums[3] = r->param_checksum;
}

static void read_plan(plan *p)
{
    if (scanf("%" SCNu64 " %" SCNu64, &p->steps, &p->seed) != 2)
        quit("the plan has no steps");
    read_hyper(&p->hyper);
    if (scanf("%" SCNd32, &p->dtype) != 1)
        quit("the plan has no dtype");
    p->exact = p->hyper.param_rounding == LAMB16_ROUNDING_EXACT && p->dtype == LAMB16_BFLOAT16;
    p->per_tensor = p->exact ? 5 : 4;
    if (scanf("%zu", &p->count) != 1 || p->count == 0)
        quit("the plan has no tensors");
    p->tensors = allocate(p->count, sizeof *p->tensors);
    p->scales = allocate(SCALES * p->count, sizeof *p->scales);
    p->counters = allocate(COUNTERS * p->count, sizeof *p->counters);
    p->sums = allocate(SUMS * p->count, sizeof *p->sums);
    for (size_t i = 0; i < p->count; i++) {
        read_tensor(p, &p->tensors[i], i);
        write_scalars(p, i);
    }
}

/* ---- the steps --------------------------------------------------------------------------------------------------- */

static aoti_input table(void *data, int32_t dtype, int64_t rows, int64_t columns)
{
    aoti_input input = {data, dtype, columns > 0 ? 2 : 1, {rows, columns}};
    return input;
}

static int32_t torch_dtype(int32_t dtype)
{
    return dtype == LAMB16_FLOAT32    ? aoti_torch_dtype_float32()
           : dtype == LAMB16_BFLOAT16 ? aoti_torch_dtype_bfloat16()
                                      : aoti_torch_dtype_float16();
}

/* The exported step's inputs in its order: those of each tensor, scales, counters, sums, learning rate, gradients' factor. */
static aoti_input *make_inputs(const plan *p, double *lr, double *grad_factor)
{
    const int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64(), byte = aoti_torch_dtype_uint8();
    const int32_t own = torch_dtype(p->dtype), dtypes[] = {own, own, byte, byte, aoti_torch_dtype_int16()};
    const int64_t rows = (int64_t)p->count;
    const size_t each = p->per_tensor;
    aoti_input *inputs = allocate(each * p->count + TABLES, sizeof *inputs), *tables = inputs + each * p->count;
    for (size_t i = 0; i < p->count; i++) {
        const tensor *t = &p->tensors[i];
        void *data[] = {t->param, t->grad, t->exp_avg_codes, t->exp_avg_sq_codes, t->param_remainder};
        for (size_t k = 0; k < each; k++) {
            aoti_input *input = &inputs[each * i + k];
            input->data = data[k];
            input->dtype = dtypes[k];
            input->ndim = t->ndim;
            memcpy(input->shape, t->shape, sizeof t->shape);
        }
    }
    tables[0] = table(p->scales, f32, rows, SCALES);
    tables[1] = table(p->counters, aoti_torch_dtype_int32(), rows, COUNTERS);
    tables[2] = table(p->sums, aoti_torch_dtype_int64(), rows, SUMS);
    tables[3] = table(lr, f64, 1, 0);
    tables[4] = table(grad_factor, f64, 1, 0);
    return inputs;
}

static void fill_gradients(const plan *p, uint64_t step)
{
    for (size_t i = 0; i < p->count; i++) {
        const tensor *t = &p->tensors[i];
        size_t n = t->reference.numel;
        float *gradient = allocate(n, sizeof *gradient);
        inputs_gradient(gradient, n, p->seed, i, step);
        store(gradient, n, t->grad, p->dtype);
        store(gradient, n, t->reference_grad, p->dtype);
        free(gradient);
    }
}

static void change_weights(const plan *p, uint64_t step)
{
    const float changed = INPUTS_CHANGED;
    for (size_t i = 0; i < p->count; i++) {
        const lamb16_tensor *r = &p->tensors[i].reference;
        const size_t place = r->numel / 2 * size_of(p->dtype);
        if (r->numel > 0 && inputs_change(i, step)) {
            store(&changed, 1, (char *)p->tensors[i].param + place, p->dtype);
            store(&changed, 1, (char *)r->param + place, p->dtype);
        }
    }
}

static void step_reference(plan *p, double lr, double grad_factor, differences *d)
{
    lamb16_hyper hyper = p->hyper;
    hyper.lr = lr;
    for (size_t i = 0; i < p->count; i++) { /* one by one: the list would compare all their addresses in every step */
        lamb16_stats stats;
        lamb16_status status = lamb16_step(&p->tensors[i].reference, &hyper, grad_factor, &stats);
        if (status != LAMB16_OK) {
            fprintf(stderr, "the C reference refuses tensor %zu: %s\n", i, lamb16_status_string(status));
            exit(2);
        }
        d->skipped += (uint64_t)stats.skipped;
    }
}

/* ---- comparing --------------------------------------------------------------------------------------------------- */

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* The bits of weight i; of bfloat16 and float16 those of the exact weights, and their own, in the upper half. */
static uint32_t weight_bits(const void *param, const int16_t *remainder, const plan *p, size_t i)
{
    if (p->dtype == LAMB16_FLOAT32)
        return bits_of(((const float *)param)[i]);
    uint32_t rest = p->exact ? (uint32_t)remainder[i] : 0;
    return ((uint32_t)((const uint16_t *)param)[i] << 16) + rest;
}

/* How many floats lie between two; 0 and -0 are one apart here, so that only equal bits give 0. */
static uint64_t ulps(uint32_t a, uint32_t b)
{
    int64_t x = a, y = b;
    x = x & 0x80000000 ? -1 - (x & 0x7FFFFFFF) : x;
    y = y & 0x80000000 ? -1 - (y & 0x7FFFFFFF) : y;
    return (uint64_t)(x > y ? x - y : y - x);
}

static void show(differences *d, uint64_t step, size_t i, const char *what, size_t element, uint64_t found,
                 uint64_t wanted)
{
    if (d->shown++ < SHOWN)
        fprintf(stderr, "step %" PRIu64 ", tensor %zu, %s[%zu]: 0x%08" PRIx64 ", the reference has 0x%08" PRIx64 "\n",
                step + 1, i, what, element, found, wanted);
}

static void compare_scalar(differences *d, uint64_t step, size_t i, const char *what, uint64_t found, uint64_t wanted)
{
    if (found != wanted) {
        d->scalars++;
        show(d, step, i, what, 0, found, wanted);
    }
}

static void compare_scalars(const plan *p, size_t i, uint64_t step, differences *d)
{
    const lamb16_tensor *r = &p->tensors[i].reference;
    const float *scales = &p->scales[SCALES * i];
    const int32_t *counters = &p->counters[COUNTERS * i];
    const int64_t *sums = &p->sums[SUMS * i];
    compare_scalar(d, step, i, "exp_avg_scale", bits_of(scales[0]), bits_of(r->exp_avg_scale));
    compare_scalar(d, step, i, "exp_avg_sq_scale", bits_of(scales[1]), bits_of(r->exp_avg_sq_scale));
    compare_scalar(d, step, i, "exp_avg_max", bits_of(scales[2]), bits_of(r->exp_avg_max));
    compare_scalar(d, step, i, "exp_avg_sq_max", bits_of(scales[3]), bits_of(r->exp_avg_sq_max));
    compare_scalar(d, step, i, "step", (uint32_t)counters[0], (uint32_t)r->step);
    compare_scalar(d, step, i, "salt", (uint32_t)counters[1], r->salt);
    compare_scalar(d, step, i, "weight_sum", (uint64_t)sums[0], (uint64_t)r->weight_sum);
    compare_scalar(d, step, i, "update_sum", (uint64_t)sums[1], (uint64_t)r->update_sum);
    compare_scalar(d, step, i, "mask_count", (uint64_t)sums[2], (uint64_t)r->mask_count);
    compare_scalar(d, step, i, "param_checksum", (uint64_t)sums[3], (uint64_t)r->param_checksum);
}

static void compare_tensor(const plan *p, size_t i, uint64_t step, differences *d)
{
    const tensor *t = &p->tensors[i];
    const lamb16_tensor *r = &t->reference;
    const int unit = p->dtype == LAMB16_FLOAT32 || p->exact ? 0 : 16; /* 2^unit is the distance of two weights' bits */
    for (size_t e = 0; e < r->numel; e++) {
        uint32_t found = weight_bits(t->param, t->param_remainder, p, e);
        uint32_t wanted = weight_bits(r->param, r->param_remainder, p, e);
        uint64_t apart = ulps(found, wanted) >> unit;
        if (apart > 0) {
            d->weights++;
            d->ulp = apart > d->ulp ? apart : d->ulp;
            show(d, step, i, "param", e, found, wanted);
        }
        if (t->exp_avg_codes[e] != r->exp_avg_codes[e]) {
            d->codes++;
            show(d, step, i, "exp_avg_codes", e, t->exp_avg_codes[e], r->exp_avg_codes[e]);
        }
        if (t->exp_avg_sq_codes[e] != r->exp_avg_sq_codes[e]) {
            d->codes++;
            show(d, step, i, "exp_avg_sq_codes", e, t->exp_avg_sq_codes[e], r->exp_avg_sq_codes[e]);
        }
    }
    compare_scalars(p, i, step, d);
    if (memcmp(t->grad, t->reference_grad, r->numel * size_of(p->dtype)) != 0)
        quit("the step changed a gradient, which it is only to read");
}

/* ---- main -------------------------------------------------------------------------------------------------------- */

int main(int argc, char **argv)
{
    plan p = {0};
    differences d = {0};
    aoti_model model;
    aoti_input *inputs;
    double lr, grad_factor;

    if (argc != 2)
        quit("usage: AOTI_RUNTIME_CHECK_INPUTS=1 harness MODEL.so < PLAN");
    read_plan(&p);
    inputs = make_inputs(&p, &lr, &grad_factor);
    if (aoti_open(&model, argv[1]) != 0)
        quit(model.message);
    for (uint64_t step = 0; step < p.steps; step++) {
        fill_gradients(&p, step);
        change_weights(&p, step);
        lr = inputs_lr(p.hyper.lr, step);
        grad_factor = inputs_grad_factor(step);
        if (aoti_run(&model, inputs, p.per_tensor * p.count + TABLES) != 0)
            quit(model.message);
        step_reference(&p, inputs_lr(p.hyper.lr, step), inputs_grad_factor(step), &d);
        for (size_t i = 0; i < p.count; i++)
            compare_tensor(&p, i, step, &d);
    }
    aoti_close(&model);
    printf("tensors %zu steps %" PRIu64 " codes %" PRIu64 " scalars %" PRIu64 " weights %" PRIu64 " ulp %" PRIu64
           " skipped %" PRIu64 "\n",
           p.count, p.steps, d.codes, d.scalars, d.weights, d.ulp, d.skipped);
    return d.codes + d.scalars + d.weights > 0; /* the operating system frees the memory */
}
