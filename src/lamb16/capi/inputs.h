/* What the checks feed a step with: weights and gradients from a seed, learning rates and factors, and weights that
 * something else than the step changes; the same in every process.
 *
 * Tensors have scales of their own. About a third of the gradients are awkward: zero, subnormal, sparse, with outliers,
 * so large that the second moment overflows, or with one inf or NaN. */
#ifndef LAMB16_INPUTS_H
#define LAMB16_INPUTS_H

#include <stddef.h>
#include <stdint.h>

#define INPUTS_CHANGED 0.5f

/* The first weights of tensor number `tensor`, into p[n]; every seventh tensor starts at 0. */
void inputs_weights(float *p, size_t n, uint64_t seed, uint64_t tensor);

/* The gradient of that tensor in step number `step`, into g[n]. */
void inputs_gradient(float *g, size_t n, uint64_t seed, uint64_t tensor, uint64_t step);

/* Whether, before that step, something else sets the weight in the middle of that tensor to INPUTS_CHANGED. */
int inputs_change(uint64_t tensor, uint64_t step);

/* The learning rate of a step: up to twice the given one, at times 0. */
double inputs_lr(double lr, uint64_t step);

/* What the gradients of a step are multiplied by: the inverse of a number that float32 holds. */
double inputs_grad_factor(uint64_t step);

#endif
