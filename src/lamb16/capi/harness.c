/* `lamb16 check`: run an exported step beside the C reference and compare after every step.
 *
 *     AOTI_RUNTIME_CHECK_INPUTS=1 harness MODEL.so < PLAN
 *
 * PLAN is text: steps, seed, the hyperparameters in the order of lamb16_hyper, the number of tensors, and for each of
 * them its salt, the number of its dimensions and these. The results go to stdout as one line of names and numbers, the
 * first mismatches to stderr. Status 0: no bit differed; 1: some did; 2: it could not be run, and stderr says why.
 */
#include "aoti.h"
#include "inputs.h"
#include "lamb16.h"

#include <inttypes.h>

enum { SHOWN = 8 }; /* mismatches that are printed */

/* The two copies of a tensor: of the exported step, whose scalars are in tables, and of the reference. */
typedef struct {
    int32_t ndim;
    int64_t shape[AOTI_MAX_DIMS];
    float *param, *grad;
    uint8_t *exp_avg, *exp_avg_sq;
    lamb16_tensor reference;
    float *reference_grad;
} tensor;

typedef struct {
    uint64_t steps, seed;
    lamb16_hyper hyper;
    size_t count;
    tensor *tensors;
    float *norms;      /* [count, 2] */
    int32_t *counters; /* [count, 2]: step, salt */
} plan;

typedef struct {
    uint64_t codes, scales, weights, ulp, skipped, shown;
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

static void read_hyper(lamb16_hyper *h)
{
    if (scanf("%la %la %la %la %la %la %la %la %" SCNd32 " %" SCNd32, &h->lr, &h->beta1, &h->beta2, &h->eps,
              &h->weight_decay, &h->trust_scale, &h->trust_lr, &h->trust_clip, &h->bias_correction,
              &h->maximize) != 10)
        quit("the plan has no hyperparameters");
}

static void read_tensor(tensor *t, uint64_t seed, uint64_t index)
{
    size_t n = 1;
    if (scanf("%" SCNu32 " %" SCNd32, &t->reference.salt, &t->ndim) != 2 || t->ndim < 0 || t->ndim > AOTI_MAX_DIMS)
        quit("the plan has a tensor without a salt, or with more dimensions than supported");
    for (int32_t k = 0; k < t->ndim; k++) {
        if (scanf("%" SCNd64, &t->shape[k]) != 1 || t->shape[k] < 0)
            quit("the plan has a tensor without a size");
        n *= (size_t)t->shape[k];
    }
    t->param = allocate(n, sizeof *t->param);
    t->grad = allocate(n, sizeof *t->grad);
    t->exp_avg = allocate(n, 1);
    t->exp_avg_sq = allocate(n, 1);
    t->reference_grad = allocate(n, sizeof *t->grad);
    t->reference.numel = n;
    t->reference.param = allocate(n, sizeof *t->param);
    t->reference.grad = t->reference_grad;
    t->reference.exp_avg = allocate(n, 1);
    t->reference.exp_avg_sq = allocate(n, 1);
    inputs_weights(t->param, n, seed, index);
    memcpy(t->reference.param, t->param, n * sizeof *t->param);
    if (lamb16_init(&t->reference) != LAMB16_OK)
        quit("lamb16_init refused a tensor");
}

static void read_plan(plan *p)
{
    if (scanf("%" SCNu64 " %" SCNu64, &p->steps, &p->seed) != 2)
        quit("the plan has no steps");
    read_hyper(&p->hyper);
    if (scanf("%zu", &p->count) != 1 || p->count == 0)
        quit("the plan has no tensors");
    p->tensors = allocate(p->count, sizeof *p->tensors);
    p->norms = allocate(2 * p->count, sizeof *p->norms);
    p->counters = allocate(2 * p->count, sizeof *p->counters);
    for (size_t i = 0; i < p->count; i++) {
        const lamb16_tensor *reference = &p->tensors[i].reference;
        read_tensor(&p->tensors[i], p->seed, i);
        p->norms[2 * i] = reference->exp_avg_norm;
        p->norms[2 * i + 1] = reference->exp_avg_sq_norm;
        memcpy(&p->counters[2 * i + 1], &reference->salt, sizeof reference->salt);
    }
}

/* ---- the steps --------------------------------------------------------------------------------------------------- */

static aoti_input table(void *data, int32_t dtype, int64_t rows, int64_t columns)
{
    aoti_input input = {data, dtype, columns > 0 ? 2 : 1, {rows, columns}};
    return input;
}

/* The exported step's inputs in its order: four a tensor, norms, counters, learning rate. */
static aoti_input *make_inputs(const plan *p, double *lr)
{
    const int32_t f32 = aoti_torch_dtype_float32(), byte = aoti_torch_dtype_uint8();
    const int64_t rows = (int64_t)p->count;
    aoti_input *inputs = allocate(4 * p->count + 3, sizeof *inputs);
    for (size_t i = 0; i < p->count; i++) {
        const tensor *t = &p->tensors[i];
        void *data[] = {t->param, t->grad, t->exp_avg, t->exp_avg_sq};
        for (int k = 0; k < 4; k++) {
            aoti_input *input = &inputs[4 * i + (size_t)k];
            input->data = data[k];
            input->dtype = k < 2 ? f32 : byte;
            input->ndim = t->ndim;
            memcpy(input->shape, t->shape, sizeof t->shape);
        }
    }
    inputs[4 * p->count] = table(p->norms, f32, rows, 2);
    inputs[4 * p->count + 1] = table(p->counters, aoti_torch_dtype_int32(), rows, 2);
    inputs[4 * p->count + 2] = table(lr, aoti_torch_dtype_float64(), 1, 0);
    return inputs;
}

static void fill_gradients(const plan *p, uint64_t step)
{
    for (size_t i = 0; i < p->count; i++) {
        const tensor *t = &p->tensors[i];
        inputs_gradient(t->grad, t->reference.numel, p->seed, i, step);
        memcpy(t->reference_grad, t->grad, t->reference.numel * sizeof *t->grad);
    }
}

static void step_reference(plan *p, double lr, differences *d)
{
    lamb16_hyper hyper = p->hyper;
    hyper.lr = lr;
    for (size_t i = 0; i < p->count; i++) { /* one by one: the list would compare all their addresses in every step */
        lamb16_stats stats;
        lamb16_status status = lamb16_step(&p->tensors[i].reference, &hyper, &stats);
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

/* How many floats lie between two; 0 and -0 are one apart here, so that only equal bits give 0. */
static uint64_t ulps(float a, float b)
{
    int64_t x = bits_of(a), y = bits_of(b);
    x = x & 0x80000000 ? -1 - (x & 0x7FFFFFFF) : x;
    y = y & 0x80000000 ? -1 - (y & 0x7FFFFFFF) : y;
    return (uint64_t)(x > y ? x - y : y - x);
}

static void show(differences *d, uint64_t step, size_t i, const char *what, size_t element, uint32_t found,
                 uint32_t wanted)
{
    if (d->shown++ < SHOWN)
        fprintf(stderr, "step %" PRIu64 ", tensor %zu, %s[%zu]: 0x%08" PRIx32 ", the reference has 0x%08" PRIx32 "\n",
                step + 1, i, what, element, found, wanted);
}

static void compare_scalar(differences *d, uint64_t step, size_t i, const char *what, uint32_t found, uint32_t wanted)
{
    if (found != wanted) {
        d->scales++;
        show(d, step, i, what, 0, found, wanted);
    }
}

static void compare_tensor(const plan *p, size_t i, uint64_t step, differences *d)
{
    const tensor *t = &p->tensors[i];
    const lamb16_tensor *r = &t->reference;
    for (size_t e = 0; e < r->numel; e++) {
        uint64_t apart = ulps(t->param[e], r->param[e]);
        if (apart > 0) {
            d->weights++;
            d->ulp = apart > d->ulp ? apart : d->ulp;
            show(d, step, i, "param", e, bits_of(t->param[e]), bits_of(r->param[e]));
        }
        if (t->exp_avg[e] != r->exp_avg[e]) {
            d->codes++;
            show(d, step, i, "exp_avg", e, t->exp_avg[e], r->exp_avg[e]);
        }
        if (t->exp_avg_sq[e] != r->exp_avg_sq[e]) {
            d->codes++;
            show(d, step, i, "exp_avg_sq", e, t->exp_avg_sq[e], r->exp_avg_sq[e]);
        }
    }
    compare_scalar(d, step, i, "exp_avg_norm", bits_of(p->norms[2 * i]), bits_of(r->exp_avg_norm));
    compare_scalar(d, step, i, "exp_avg_sq_norm", bits_of(p->norms[2 * i + 1]), bits_of(r->exp_avg_sq_norm));
    compare_scalar(d, step, i, "step", (uint32_t)p->counters[2 * i], (uint32_t)r->step);
    compare_scalar(d, step, i, "salt", (uint32_t)p->counters[2 * i + 1], r->salt);
    if (memcmp(t->grad, t->reference_grad, r->numel * sizeof *t->grad) != 0)
        quit("the step changed a gradient, which it is only to read");
}

/* ---- main -------------------------------------------------------------------------------------------------------- */

int main(int argc, char **argv)
{
    plan p = {0};
    differences d = {0};
    aoti_model model;
    aoti_input *inputs;
    double lr;

    if (argc != 2)
        quit("usage: AOTI_RUNTIME_CHECK_INPUTS=1 harness MODEL.so < PLAN");
    read_plan(&p);
    inputs = make_inputs(&p, &lr);
    if (aoti_open(&model, argv[1]) != 0)
        quit(model.message);
    for (uint64_t step = 0; step < p.steps; step++) {
        fill_gradients(&p, step);
        lr = inputs_lr(p.hyper.lr, step);
        if (aoti_run(&model, inputs, 4 * p.count + 3) != 0)
            quit(model.message);
        step_reference(&p, inputs_lr(p.hyper.lr, step), &d);
        for (size_t i = 0; i < p.count; i++)
            compare_tensor(&p, i, step, &d);
    }
    aoti_close(&model);
    printf("tensors %zu steps %" PRIu64 " codes %" PRIu64 " scales %" PRIu64 " weights %" PRIu64 " ulp %" PRIu64
           " skipped %" PRIu64 "\n",
           p.count, p.steps, d.codes, d.scales, d.weights, d.ulp, d.skipped);
    return d.codes + d.scales + d.weights > 0; /* the operating system frees the memory */
}
