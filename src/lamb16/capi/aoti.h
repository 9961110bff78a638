/* Running a step that `lamb16 export` made from C: AOTInductor's C ABI, and four functions around it.
 *
 * torch's own headers for this ABI (aoti_runtime/interface.h, aoti_torch/c/shim.h) are C++, so what is needed of them
 * is declared here. Link with libtorch_cpu, and with DT_RPATH: the model has no search path and does not inherit a
 * DT_RUNPATH.
 *
 *     cc -std=c11 -I CAPI program.c -L TORCH -Wl,--disable-new-dtags,-rpath,TORCH -Wl,--no-as-needed -ltorch_cpu -lc10
 *
 * with CAPI the folder of this file and TORCH that of torch's libraries. docs/c-api.md has a whole program.
 */
#ifndef LAMB16_AOTI_H
#define LAMB16_AOTI_H

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- torch/csrc/inductor/aoti_torch/c/shim.h: in libtorch_cpu ---------------------------------------------------- */

typedef struct AtenTensorOpaque *AtenTensorHandle;

int32_t aoti_torch_device_type_cpu(void);
int32_t aoti_torch_dtype_float32(void);
int32_t aoti_torch_dtype_bfloat16(void);
int32_t aoti_torch_dtype_float16(void);
int32_t aoti_torch_dtype_float64(void);
int32_t aoti_torch_dtype_int16(void);
int32_t aoti_torch_dtype_int32(void);
int32_t aoti_torch_dtype_int64(void);
int32_t aoti_torch_dtype_uint8(void);
int32_t aoti_torch_create_tensor_from_blob(void *data, int64_t ndim, const int64_t *sizes, const int64_t *strides,
                                           int64_t storage_offset, int32_t dtype, int32_t device_type,
                                           int32_t device_index, AtenTensorHandle *result);
int32_t aoti_torch_delete_tensor_object(AtenTensorHandle tensor);

/* ---- torch/csrc/inductor/aoti_runtime/interface.h: in the model, by dlsym ---------------------------------------- */

typedef void *aoti_container;
typedef int32_t (*aoti_create)(aoti_container *, size_t models, const char *device, const char *cubin_folder);
typedef int32_t (*aoti_delete)(aoti_container);
typedef int32_t (*aoti_run_function)(aoti_container, AtenTensorHandle *inputs, size_t num_inputs,
                                     AtenTensorHandle *outputs, size_t num_outputs, void *stream, void *proxy_executor);
typedef int32_t (*aoti_count)(aoti_container, size_t *);
typedef int32_t (*aoti_last_error)(const char **);

/* ---- around them ------------------------------------------------------------------------------------------------- */

enum { AOTI_MAX_DIMS = 8, AOTI_MESSAGE = 1024 };

/* A loaded model. `message` says what the last function that returned a number other than 0 failed at. */
typedef struct {
    void *library;
    aoti_container container;
    aoti_run_function run;
    aoti_delete remove;
    aoti_last_error last_error; /* NULL where the model has none */
    size_t inputs;              /* how many it takes; another number would abort the process */
    char message[AOTI_MESSAGE];
} aoti_model;

/* An input: the caller's memory, contiguous, which the step reads and writes in place. */
typedef struct {
    void *data;
    int32_t dtype; /* one of aoti_torch_dtype_*() */
    int32_t ndim;  /* at most AOTI_MAX_DIMS */
    int64_t shape[AOTI_MAX_DIMS];
} aoti_input;

static inline int aoti_fail(aoti_model *model, const char *what, const char *detail)
{
    (void)snprintf(model->message, sizeof model->message, "%s: %s", what, detail != NULL ? detail : "no message");
    return 1;
}

static inline const char *aoti_detail(const aoti_model *model)
{
    const char *text = NULL;
    if (model->last_error == NULL || model->last_error(&text) != 0 || text == NULL || text[0] == '\0')
        return "AOTInductor gave no message; it may have printed one";
    return text;
}

/* Copy the address of a function of the model; ISO C has no conversion for it. Returns 0, or 1 where there is none. */
static inline int aoti_find(aoti_model *model, const char *name, void *function)
{
    void *address = dlsym(model->library, name);
    if (address == NULL)
        return aoti_fail(model, name, "not in the library; it is no AOTInductor model: give the .so of step.pt2");
    memcpy(function, &address, sizeof address);
    return 0;
}

/* Unload the model; also after aoti_open has failed. */
static inline void aoti_close(aoti_model *model)
{
    if (model->container != NULL)
        model->remove(model->container);
    model->container = NULL; /* the library stays: libraries of torch do not survive being unloaded */
}

/* Load the shared library of a package. Returns 0; else `message` says what is wrong. */
static inline int aoti_open(aoti_model *model, const char *path)
{
    aoti_create create;
    aoti_count num_inputs, num_outputs;
    size_t outputs = 0;

    memset(model, 0, sizeof *model);
    model->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (model->library == NULL)
        return aoti_fail(model, "cannot load the model; give the .so inside the unpacked step.pt2", dlerror());
    if (aoti_find(model, "AOTInductorModelContainerCreateWithDevice", &create) ||
        aoti_find(model, "AOTInductorModelContainerDelete", &model->remove) ||
        aoti_find(model, "AOTInductorModelContainerRun", &model->run) ||
        aoti_find(model, "AOTInductorModelContainerGetNumInputs", &num_inputs) ||
        aoti_find(model, "AOTInductorModelContainerGetNumOutputs", &num_outputs))
        return 1;
    (void)aoti_find(model, "AOTInductorGetLastError", &model->last_error);
    if (create(&model->container, 1, "cpu", NULL) != 0)
        return aoti_fail(model, "cannot create the model", aoti_detail(model));
    if (num_inputs(model->container, &model->inputs) != 0 || num_outputs(model->container, &outputs) != 0)
        return aoti_fail(model, "cannot ask the model for its inputs", aoti_detail(model));
    if (outputs != 0)
        return aoti_fail(model, "a model with outputs is no step of lamb16", "export one with lamb16 export");
    return 0;
}

/* One tensor over the caller's memory. */
static inline int aoti_tensor(const aoti_input *input, AtenTensorHandle *result)
{
    int64_t strides[AOTI_MAX_DIMS], stride = 1;
    if (input->ndim < 0 || input->ndim > AOTI_MAX_DIMS)
        return 1;
    for (int32_t k = input->ndim - 1; k >= 0; k--) {
        strides[k] = stride;
        stride *= input->shape[k] > 0 ? input->shape[k] : 1;
    }
    return aoti_torch_create_tensor_from_blob(input->data, input->ndim, input->shape, strides, 0, input->dtype,
                                              aoti_torch_device_type_cpu(), 0, result);
}

/* Run the step on `count` inputs. Returns 0; else `message` says what is wrong.
 *
 * With AOTI_RUNTIME_CHECK_INPUTS=1 in the environment when the process starts, an input of another dtype or shape is an
 * error and nothing was changed. Without it such an input is memory that is read and written out of bounds. */
static inline int aoti_run(aoti_model *model, const aoti_input *inputs, size_t count)
{
    AtenTensorHandle *handles;
    int failed = 0;

    if (count != model->inputs) {
        char numbers[80];
        (void)snprintf(numbers, sizeof numbers, "the model takes %zu, there are %zu", model->inputs, count);
        return aoti_fail(model, "wrong number of inputs", numbers);
    }
    handles = (AtenTensorHandle *)calloc(count, sizeof *handles); /* C++ needs the cast */
    if (handles == NULL)
        return aoti_fail(model, "cannot run the step", "out of memory");
    for (size_t i = 0; i < count && !failed; i++)
        if (aoti_tensor(&inputs[i], &handles[i]) != 0)
            failed = aoti_fail(model, "cannot make a tensor", "its dtype, shape or number of dimensions is refused");
    if (!failed && model->run(model->container, handles, count, NULL, 0, NULL, NULL) != 0)
        failed = aoti_fail(model, "the step failed", aoti_detail(model));
    for (size_t i = 0; i < count; i++) /* a run takes the handles and leaves NULL; failed checks leave them */
        if (handles[i] != NULL)
            (void)aoti_torch_delete_tensor_object(handles[i]);
    free(handles);
    return failed;
}

#ifdef __cplusplus
}
#endif

#endif
