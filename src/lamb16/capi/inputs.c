#include "inputs.h"

#include <math.h>

static const float SCALES[] = {1.0f, 0.1f, 1e-2f, 1e-3f, 3e-5f, 20.0f};

/* splitmix64 */
static uint64_t next(uint64_t *state)
{
    uint64_t x = *state += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static uint64_t start(uint64_t seed, uint64_t tensor, uint64_t step)
{
    uint64_t state = seed;
    state = next(&state) ^ tensor;
    state = next(&state) ^ step;
    return next(&state);
}

/* About normal with variance 1: four 16-bit numbers added up. */
static float normal(uint64_t *state)
{
    uint64_t x = next(state);
    uint64_t sum = (x & 0xFFFF) + (x >> 16 & 0xFFFF) + (x >> 32 & 0xFFFF) + (x >> 48);
    return (float)((int32_t)sum - 2 * 65535) * (1.0f / 37837.0f);
}

void inputs_weights(float *p, size_t n, uint64_t seed, uint64_t tensor)
{
    uint64_t state = start(seed, tensor, 0);
    float scale = tensor % 7 == 6 ? 0.0f : tensor % 3 == 2 ? 1.5f : 0.05f;
    for (size_t i = 0; i < n; i++)
        p[i] = normal(&state) * scale;
}

void inputs_gradient(float *g, size_t n, uint64_t seed, uint64_t tensor, uint64_t step)
{
    uint64_t state = start(seed, tensor, step + 1);
    uint64_t kind = next(&state) % 32;
    float scale = SCALES[tensor % (sizeof SCALES / sizeof *SCALES)];

    if (kind == 0)
        scale = 0.0f;
    else if (kind == 1)
        scale = 1e-18f; /* g * g is subnormal */
    else if (kind == 2)
        scale = 1e-39f; /* so is g */
    else if (kind == 3)
        scale = 1e19f; /* v overflows */
    else if (kind == 4)
        scale *= 1e4f;
    for (size_t i = 0; i < n; i++) {
        float x = normal(&state) * scale;
        if (kind == 5 && i % 19 != 3) /* sparse */
            x = 0.0f;
        else if (kind == 6 && i % 97 == 5) /* outliers */
            x *= 1e4f;
        else if (kind == 7) /* constant */
            x = scale;
        g[i] = x;
    }
    if (n > 0 && kind == 8)
        g[n / 2] = INFINITY;
    else if (n > 0 && kind == 9)
        g[n / 2] = NAN;
}

int inputs_change(uint64_t tensor, uint64_t step) { return step > 0 && (step + tensor) % 5 == 0; }

double inputs_lr(double lr, uint64_t step)
{
    return step % 16 == 9 ? 0.0 : lr * (double)(1 + step % 8) / 4.0;
}

double inputs_grad_factor(uint64_t step)
{
    static const double scales[] = {1.0, 2.0, 3.0, 1024.0, 0.75};
    return 1.0 / scales[step % (sizeof scales / sizeof *scales)];
}
