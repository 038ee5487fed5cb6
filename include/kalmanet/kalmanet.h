/* The C ABI of kalmanet: everything an engine in any language needs to run Gated KalmaNet.
 * docs/c-api.md has a complete program.
 *
 * Calls. Every function that can fail returns a kalmanet_status: KALMANET_OK (0), or what kind of
 * mistake it was; kalmanet_last_error() then has the message for people. No C++ exception ever
 * leaves the library. Where a call fails before it begins to compute (every code but
 * KALMANET_OUT_OF_MEMORY, KALMANET_CALLBACK_FAILED and KALMANET_INTERNAL), no tensor was written.
 *
 * Structs. The first field of each, struct_size, is sizeof(the struct) as the caller was compiled;
 * KALMANET_..._INIT sets it, and the defaults. Later versions of the library only append fields: a
 * shorter struct from an older caller is taken as it is and the missing fields have their defaults;
 * a longer one from a newer caller is taken if what this library does not know is all zeros.
 * kalmanet_tensor alone has no size and never changes.
 *
 * Threads. All functions may be called from several threads at a time, also with one plan, as long
 * as no two calls write the same tensors; those that say "process" set something for all. */
#ifndef KALMANET_KALMANET_H
#define KALMANET_KALMANET_H

#include <stddef.h>
#include <stdint.h>

#include "kalmanet/export.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- version -------------------------------------------------------------------------------- */

/* Raised when a function or a struct changes its meaning; not by additions. */
#define KALMANET_ABI_VERSION 1u
/* Of the library that runs; unlike KALMANET_ABI_VERSION means: do not call it. */
KALMANET_API uint32_t kalmanet_abi_version(void);
KALMANET_API const char* kalmanet_version(void); /* "0.1.0" */

/* ---- errors --------------------------------------------------------------------------------- */

typedef int32_t kalmanet_status;
enum {
  KALMANET_OK = 0,
  KALMANET_INVALID_ARGUMENT = 1, /* a value outside what the argument allows; a null pointer */
  KALMANET_INVALID_SHAPE = 2,    /* rank, size or stride does not fit the problem */
  KALMANET_INVALID_DTYPE = 3,    /* a dtype that the argument never takes */
  KALMANET_UNSUPPORTED = 4,      /* valid, but no backend here computes it (yet) */
  KALMANET_INVALID_DATA = 5,     /* bytes that are no saved state, or a damaged one */
  KALMANET_OUT_OF_MEMORY = 6,
  KALMANET_CALLBACK_FAILED = 7, /* the executor's callback reported an error or lost tasks */
  KALMANET_INTERNAL = 8         /* a mistake of the library's; please report it */
};
KALMANET_API const char* kalmanet_status_name(kalmanet_status status); /* "KALMANET_OK", ... */

/* Of the last call that failed on this thread: what was wrong, what was given, what is allowed. It
 * begins with the argument's name. Stays until the next call that fails; empty before the first. */
KALMANET_API const char* kalmanet_last_error(void);
/* The name of the offending argument alone, as spelled in this header ("q", "num_iter"). */
KALMANET_API const char* kalmanet_last_error_argument(void);

/* ---- tensors -------------------------------------------------------------------------------- */

enum { /* kalmanet_tensor.dtype */
       KALMANET_FLOAT32 = 0,
       KALMANET_FLOAT64 = 1,
       KALMANET_BFLOAT16 = 2,
       KALMANET_FLOAT16 = 3
};
KALMANET_API const char* kalmanet_dtype_name(int32_t dtype); /* "float32", ... */
KALMANET_API int64_t kalmanet_dtype_size(int32_t dtype);     /* bytes; 0: no such dtype */

#define KALMANET_MAX_RANK 4

/* A view: the library neither keeps nor frees `data`. All zeros means that the tensor is absent. */
typedef struct kalmanet_tensor {
  void* data; /* not written through where the tensor is an input */
  int32_t dtype;
  int32_t rank;
  int64_t size[KALMANET_MAX_RANK];
  int64_t stride[KALMANET_MAX_RANK]; /* in elements; 0 (an expanded input) and < 0 are allowed */
} kalmanet_tensor;

/* A dense row-major view of `rank` (0..4) sizes; `data` is taken without its const, for inputs. */
static inline kalmanet_tensor kalmanet_dense(const void* data, int32_t dtype, int32_t rank,
                                             const int64_t* sizes) {
  kalmanet_tensor t = {NULL, 0, 0, {0, 0, 0, 0}, {0, 0, 0, 0}};
  int64_t stride = 1;
  int32_t d;
  t.data = (void*)data;
  t.dtype = dtype;
  t.rank = rank;
  for (d = (rank < KALMANET_MAX_RANK ? rank : KALMANET_MAX_RANK) - 1; d >= 0; --d) {
    t.size[d] = sizes[d];
    t.stride[d] = stride;
    stride *= sizes[d];
  }
  return t;
}

/* ---- backends and instruction sets ---------------------------------------------------------- */

enum { /* kalmanet_gka_options.backend */
       KALMANET_BACKEND_AUTOMATIC =
           0, /* the fastest that computes the problem; never the reference */
       KALMANET_BACKEND_CPU = 1,
       KALMANET_BACKEND_REFERENCE = 2, /* the float64 oracle: slow */
       KALMANET_BACKEND_CUDA = 3       /* an NVIDIA GPU, whose memory the tensors are in */
};
KALMANET_API const char* kalmanet_backend_name(int32_t backend); /* "cpu", ... */

typedef struct kalmanet_backend_info {
  uint32_t struct_size;
  int32_t backend;
  int32_t available; /* 1 or 0 */
  int32_t reserved;
  char detail[256]; /* "float32, chebyshev; instruction sets: baseline avx2; using avx2" */
} kalmanet_backend_info;
#define KALMANET_BACKEND_INFO_INIT {(uint32_t)sizeof(kalmanet_backend_info), 0, 0, 0, {0}}
KALMANET_API kalmanet_status kalmanet_num_backends(int32_t* count);
/* index 0..count-1 */
KALMANET_API kalmanet_status kalmanet_get_backend_info(int32_t index, kalmanet_backend_info* info);

enum { KALMANET_ISA_BASELINE = 0, KALMANET_ISA_AVX2 = 1, KALMANET_ISA_AVX512 = 2 };
KALMANET_API const char* kalmanet_instruction_set_name(int32_t isa); /* "avx2", ... */
/* *available: 1 if both this build and this processor have it, else 0. */
KALMANET_API kalmanet_status kalmanet_instruction_set_available(int32_t isa, int32_t* available);
/* The one in use: forced by the next function, else by the environment variable KALMANET_ISA, else
 * the fastest. */
KALMANET_API kalmanet_status kalmanet_get_instruction_set(int32_t* isa);
KALMANET_API kalmanet_status kalmanet_set_instruction_set(int32_t isa); /* process */
KALMANET_API kalmanet_status kalmanet_reset_instruction_set(void);      /* process */

/* ---- threads -------------------------------------------------------------------------------- */

/* The process-wide pool, which a plan without an executor uses: KALMANET_NUM_THREADS threads, or
 * one a processor. The number of threads never changes a bit of a result. Not to be set while work
 * runs. 1..1024. */
KALMANET_API kalmanet_status kalmanet_set_num_threads(int32_t num_threads); /* process */
KALMANET_API kalmanet_status kalmanet_get_num_threads(int32_t* num_threads);

/* A plan may have an executor instead: a pool of its own, or the caller's threads. Plans share what
 * they were given, so an executor may be destroyed before or after them; NULL is ignored. */
typedef struct kalmanet_executor kalmanet_executor;
KALMANET_API kalmanet_status kalmanet_executor_create_pool(int32_t num_threads,
                                                           kalmanet_executor** executor);

/* One piece of work, to be called by the caller's threads: task(task_data, i). */
typedef void (*kalmanet_task)(void* task_data, int64_t i);

typedef struct kalmanet_executor_callbacks {
  uint32_t struct_size;
  int32_t concurrency; /* how many tasks can run at the same time, 1..1024 */
  /* Calls task(task_data, i) once for every i in 0..n-1, in any order and on any threads, and
   * returns when all of them have returned, with all they wrote visible to this thread: 0, or
   * anything else if it could not (the call fails with KALMANET_CALLBACK_FAILED then, as it does
   * where a task was left out, called twice or out of range). Must not throw or jump out. Never
   * called from inside a task. May be called from several threads at a time if the plan is. */
  int32_t (*run)(void* user_data, int64_t n, kalmanet_task task, void* task_data);
  void* user_data; /* handed to run as it is; must outlive every plan that has the executor */
} kalmanet_executor_callbacks;
#define KALMANET_EXECUTOR_CALLBACKS_INIT \
  {(uint32_t)sizeof(kalmanet_executor_callbacks), 1, NULL, NULL}
KALMANET_API kalmanet_status kalmanet_executor_create_callback(
    const kalmanet_executor_callbacks* callbacks, kalmanet_executor** executor);
KALMANET_API void kalmanet_executor_destroy(kalmanet_executor* executor);

/* ---- Gated KalmaNet: plans ------------------------------------------------------------------ */

enum { /* kalmanet_gka_options.solver */
       KALMANET_SOLVER_CHEBYSHEV =
           0, /* num_iter steps of the Chebyshev iteration: the published one */
       KALMANET_SOLVER_DIRECT = 1,   /* exact */
       KALMANET_SOLVER_CG = 2,       /* num_iter steps of conjugate gradients, for comparison */
       KALMANET_SOLVER_AUTOMATIC = 3 /* the cheapest that meets the tolerance */
};
KALMANET_API const char* kalmanet_solver_name(int32_t solver); /* "chebyshev", ... */

enum {                                   /* kalmanet_gka_options.arithmetic */
       KALMANET_ARITHMETIC_STANDARD = 0, /* float32; float64 for float64 tensors */
       /* Products inside Chebyshev's iteration of bfloat16 factors, summed in float32: faster,
        * with errors of 1e-2 of the outputs at ridge ratio 0.02. Forward and backward (the step
        * stays standard) of solver chebyshev with a num_iter >= 1; not for float64. */
       KALMANET_ARITHMETIC_BFLOAT16 = 1
};
KALMANET_API const char* kalmanet_arithmetic_name(int32_t arithmetic); /* "standard", ... */

#define KALMANET_AUTO_NUM_ITER 0

typedef struct kalmanet_gka_options {
  uint32_t struct_size;
  int32_t solver;
  int32_t num_iter;   /* default 30; >= 1, or 0: from the ridge ratio and the tolerance */
  int32_t backend;    /* default KALMANET_BACKEND_AUTOMATIC */
  double ridge_ratio; /* default 0.02; > 0; where kalmanet_gka_inputs.ridge_ratio is absent */
  double tolerance;   /* default 1e-5; >= 0: relative error of x_t that direct, automatic and
                         num_iter = 0 aim at; 0: what the dtype can carry */
  double scale;       /* default 0, which stands for K^-1/2 */
  int32_t bp_lambda;  /* default 1; 0: |H_t| is a constant to the gradient */
  int32_t chunk_size; /* default 0: the backend's choice; 1..256. Never changes the meaning */
  kalmanet_executor* executor; /* default NULL: the process-wide pool */
  int32_t arithmetic;          /* default KALMANET_ARITHMETIC_STANDARD */
  int32_t reserved;
  /* KALMANET_BACKEND_CUDA: a cudaStream_t of the device that holds the tensors; default NULL: the
   * default stream. Work is put on it and the call returns; the caller synchronises. A plan each
   * for several streams. Other backends do not look at it. (Appended after 0.1's first structs: an
   * older caller's options, which end before it, mean NULL.) */
  void* stream;
} kalmanet_gka_options;
/* clang-format off */
#define KALMANET_GKA_OPTIONS_INIT                                                                  \
  {(uint32_t)sizeof(kalmanet_gka_options), KALMANET_SOLVER_CHEBYSHEV, 30,                          \
   KALMANET_BACKEND_AUTOMATIC, 0.02, 1e-5, 0.0, 1, 0, NULL, KALMANET_ARITHMETIC_STANDARD, 0, NULL}
/* clang-format on */

/* Checked options and an executor, to be used for any number of calls, layers and shapes. */
typedef struct kalmanet_gka_plan kalmanet_gka_plan;
/* options == NULL: all defaults. *plan is set on success only. */
KALMANET_API kalmanet_status kalmanet_gka_plan_create(const kalmanet_gka_options* options,
                                                      kalmanet_gka_plan** plan);
KALMANET_API void kalmanet_gka_plan_destroy(kalmanet_gka_plan* plan); /* NULL is ignored */

/* ---- Gated KalmaNet: operations ------------------------------------------------------------- */

/* Letters: B batch, T tokens, H heads, K key head dim, V value head dim (1..256), N sequences (B,
 * or the number of packed ones). q, k and v may have fewer heads than H (grouped queries, keys or
 * values): head h reads head h / (H / their heads). All but the states have q's dtype: float32
 * (cpu), float32 or float64 (reference). States are float64 where q is, else float32. */
typedef struct kalmanet_gka_inputs {
  uint32_t struct_size;
  int32_t reserved;
  kalmanet_tensor q; /* [B,T,Hq,K] */
  kalmanet_tensor k; /* [B,T,Hk,K] */
  kalmanet_tensor v; /* [B,T,Hv,V] */
  /* From here on all optional. [B,T,H]: */
  kalmanet_tensor g;           /* log decay of U, <= 0; absent: 0 */
  kalmanet_tensor gk;          /* log decay of H, <= 0; absent: 0 */
  kalmanet_tensor alpha;       /* absent: 1 */
  kalmanet_tensor beta;        /* multiplies k and v; absent: 1 */
  kalmanet_tensor ridge_ratio; /* a_t > 0 of each token; absent: kalmanet_gka_options.ridge_ratio */
  /* The states before the first token; absent: zero. */
  kalmanet_tensor h0; /* [N,H,K,K] */
  kalmanet_tensor u0; /* [N,H,K,V] */
  /* Packed sequences (needs B = 1): num_offsets = N+1 offsets into T, from 0 to T. */
  const int64_t* cu_seqlens;
  int64_t num_offsets;
  /* kalmanet_gka_step alone (docs/decode.md), all optional. States in a pool: h0 and u0 are
   * [num_slots,H,K,K] and [num_slots,H,K,V] (h_final and u_final the same memory), and sequence n's
   * are row slots[n]; negative: it has none, and outputs of zeros. slots_count: N. In the memory of
   * the backend, like accepted. */
  const int32_t* slots;
  int64_t slots_count;
  /* First, states and all, the first accepted[n] of the last draft's tokens: [B,T',Hk,K],
   * [B,T',Hv,V], and [B,T',H] where the call has the same one. accepted_count: B. */
  kalmanet_tensor draft_k, draft_v, draft_g, draft_gk, draft_beta;
  const int32_t* accepted;
  int64_t accepted_count;
  int32_t is_draft; /* 1: this call's tokens are a draft, and the states stay those before them */
  int32_t reserved2;
} kalmanet_gka_inputs;

typedef struct kalmanet_gka_outputs {
  uint32_t struct_size;
  int32_t reserved;
  kalmanet_tensor o; /* [B,T,H,V], required: its third size is what says H */
  /* The states after the last token, optional; may be the very memory of h0 and u0. */
  kalmanet_tensor h_final;  /* [N,H,K,K] */
  kalmanet_tensor u_final;  /* [N,H,K,V] */
  kalmanet_tensor x;        /* [B,T,H,K] optional: x_t, which spares the backward one solve */
  kalmanet_tensor residual; /* [B,T,H] optional: |(H_t + lambda_t I) x_t - q_t| / |q_t| */
  /* [B,H,T/KALMANET_SEGMENT_TOKENS,kalmanet_gka_segment_state_size] optional, of the states'
   * dtype: spares the backward a pass over all keys and values. Of kalmanet_gka_forward on the CPU,
   * with a chunk_size that is 0 or a power of two. */
  kalmanet_tensor segment_states;
} kalmanet_gka_outputs;
#define KALMANET_SEGMENT_TOKENS 512

/* What the backward may be given of the forward, so as not to compute it again. */
typedef struct kalmanet_gka_saved {
  uint32_t struct_size;
  int32_t reserved;
  kalmanet_tensor x;              /* kalmanet_gka_outputs.x, of its dtype or float32 */
  kalmanet_tensor segment_states; /* of a forward with the same chunk_size */
} kalmanet_gka_saved;

/* Gradients of the loss with respect to the outputs. */
typedef struct kalmanet_gka_output_grads {
  uint32_t struct_size;
  int32_t reserved;
  kalmanet_tensor d_o;       /* [B,T,H,V], required */
  kalmanet_tensor d_h_final; /* [N,H,K,K] optional */
  kalmanet_tensor d_u_final; /* [N,H,K,V] optional */
} kalmanet_gka_output_grads;

/* Gradients to compute, of the inputs' shapes; an absent one is not computed, and one whose input
 * is absent is an error. */
typedef struct kalmanet_gka_input_grads {
  uint32_t struct_size;
  int32_t reserved;
  kalmanet_tensor dq, dk, dv;
  kalmanet_tensor dg, dgk, dalpha, dbeta;
  kalmanet_tensor d_ridge_ratio; /* per token, also where the ridge ratio is one number */
  kalmanet_tensor d_h0, d_u0;
} kalmanet_gka_input_grads;

/* A struct of the type with its size set and everything else absent. */
#define KALMANET_ABSENT {NULL, 0, 0, {0, 0, 0, 0}, {0, 0, 0, 0}}
/* clang-format off */
#define KALMANET_GKA_INPUTS_INIT                                                                   \
  {(uint32_t)sizeof(kalmanet_gka_inputs), 0, KALMANET_ABSENT, KALMANET_ABSENT, KALMANET_ABSENT,    \
   KALMANET_ABSENT, KALMANET_ABSENT, KALMANET_ABSENT, KALMANET_ABSENT, KALMANET_ABSENT,            \
   KALMANET_ABSENT, KALMANET_ABSENT, NULL, 0, NULL, 0, KALMANET_ABSENT, KALMANET_ABSENT,           \
   KALMANET_ABSENT, KALMANET_ABSENT, KALMANET_ABSENT, NULL, 0, 0, 0}
#define KALMANET_GKA_OUTPUTS_INIT                                                                  \
  {(uint32_t)sizeof(kalmanet_gka_outputs), 0, KALMANET_ABSENT, KALMANET_ABSENT, KALMANET_ABSENT,   \
   KALMANET_ABSENT, KALMANET_ABSENT, KALMANET_ABSENT}
#define KALMANET_GKA_SAVED_INIT                                                                    \
  {(uint32_t)sizeof(kalmanet_gka_saved), 0, KALMANET_ABSENT, KALMANET_ABSENT}
#define KALMANET_GKA_OUTPUT_GRADS_INIT                                                             \
  {(uint32_t)sizeof(kalmanet_gka_output_grads), 0, KALMANET_ABSENT, KALMANET_ABSENT,               \
   KALMANET_ABSENT}
#define KALMANET_GKA_INPUT_GRADS_INIT                                                              \
  {(uint32_t)sizeof(kalmanet_gka_input_grads), 0, KALMANET_ABSENT, KALMANET_ABSENT,                \
   KALMANET_ABSENT, KALMANET_ABSENT, KALMANET_ABSENT, KALMANET_ABSENT, KALMANET_ABSENT,            \
   KALMANET_ABSENT, KALMANET_ABSENT, KALMANET_ABSENT}
/* clang-format on */

/* What ran. */
typedef struct kalmanet_gka_report {
  uint32_t struct_size;
  int32_t backend;
  int32_t instruction_set;
  int32_t min_iterations; /* solver steps, smallest and largest over chunks and heads */
  int32_t max_iterations;
  int32_t reserved;
  int64_t chunk_size;
  int64_t solves;                /* chunks (step: tokens) solved, over heads */
  int64_t direct_solves;         /* of them, by the direct solver */
  int64_t factorizations;        /* K x K matrices factored for them */
  int64_t bfloat16_solves;       /* of `solves`, those with products in bfloat16 */
  int32_t bfloat16_instructions; /* 1: by the processor's instructions for them */
  int32_t reserved2;
} kalmanet_gka_report;
/* clang-format off */
#define KALMANET_GKA_REPORT_INIT                                                                   \
  {(uint32_t)sizeof(kalmanet_gka_report), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
/* clang-format on */

/* Whole sequences, chunk by chunk: linear time, constant memory a sequence. report may be NULL. */
KALMANET_API kalmanet_status kalmanet_gka_forward(const kalmanet_gka_plan* plan,
                                                  const kalmanet_gka_inputs* inputs,
                                                  const kalmanet_gka_outputs* outputs,
                                                  kalmanet_gka_report* report);
/* Gradients by implicit differentiation. saved and report may be NULL. */
KALMANET_API kalmanet_status kalmanet_gka_backward(const kalmanet_gka_plan* plan,
                                                   const kalmanet_gka_inputs* inputs,
                                                   const kalmanet_gka_saved* saved,
                                                   const kalmanet_gka_output_grads* output_grads,
                                                   const kalmanet_gka_input_grads* grads,
                                                   kalmanet_gka_report* report);
/* Decode: the forward's answer, token by token, for one or a few new tokens a sequence. With
 * h_final = h0 and u_final = u0 the states are updated in place. */
KALMANET_API kalmanet_status kalmanet_gka_step(const kalmanet_gka_plan* plan,
                                               const kalmanet_gka_inputs* inputs,
                                               const kalmanet_gka_outputs* outputs,
                                               kalmanet_gka_report* report);

/* ---- Gated KalmaNet: sizes ------------------------------------------------------------------ */

/* Steps that Chebyshev needs for a relative error `tolerance` of x at this ridge ratio. */
KALMANET_API kalmanet_status kalmanet_chebyshev_num_iter(double ridge_ratio, double tolerance,
                                                         int32_t* num_iter);
/* Numbers of one of kalmanet_gka_outputs.segment_states. */
KALMANET_API kalmanet_status kalmanet_gka_segment_state_size(int64_t key_dim, int64_t value_dim,
                                                             int64_t* size);
/* Bytes of the two float32 states of one sequence, all heads together. */
KALMANET_API kalmanet_status kalmanet_gka_state_bytes(int64_t num_heads, int64_t key_dim,
                                                      int64_t value_dim, int64_t* bytes);

enum { /* operation of the next function */
       KALMANET_GKA_FORWARD = 0,
       KALMANET_GKA_BACKWARD = 1,
       KALMANET_GKA_STEP = 2
};
typedef struct kalmanet_gka_shape {
  uint32_t struct_size;
  int32_t dtype; /* of q */
  int64_t B, T, H, K, V;
  int64_t Hq, Hk, Hv;        /* heads of q, k, v; 0: H */
  const int64_t* cu_seqlens; /* as in kalmanet_gka_inputs */
  int64_t num_offsets;
  int32_t saved_x; /* backward: 1 (the default) where x of the forward is passed in, else 0 */
  int32_t segment_states; /* backward: 1 where states of the forward are passed in, else 0 */
} kalmanet_gka_shape;
#define KALMANET_GKA_SHAPE_INIT \
  {(uint32_t)sizeof(kalmanet_gka_shape), KALMANET_FLOAT32, 1, 1, 1, 1, 1, 0, 0, 0, NULL, 0, 1, 0}
/* An upper bound of the bytes that one call holds at a time beside its arguments, over all threads
 * of the plan's executor. Up to 16 MiB of it a thread stay with the thread for its next call. */
KALMANET_API kalmanet_status kalmanet_gka_workspace_bytes(const kalmanet_gka_plan* plan,
                                                          int32_t operation,
                                                          const kalmanet_gka_shape* shape,
                                                          int64_t* bytes);

/* ---- Gated KalmaNet: saved states ----------------------------------------------------------- */

/* docs/state-format.md has the format: a header of 128 bytes with version, sizes, dtype and
 * checksums, then h and u. The bytes are the same on every machine. */
#define KALMANET_SAVED_STATE_HEADER_BYTES 128

typedef struct kalmanet_gka_saved_state_info {
  uint32_t struct_size;
  uint32_t version; /* of the format */
  int32_t dtype;
  int32_t reserved;
  int64_t num_sequences, num_heads, key_dim, value_dim; /* N, H, K, V */
  int64_t bytes;                                        /* header and payload */
} kalmanet_gka_saved_state_info;
#define KALMANET_GKA_SAVED_STATE_INFO_INIT \
  {(uint32_t)sizeof(kalmanet_gka_saved_state_info), 0, 0, 0, 0, 0, 0, 0, 0}

/* Bytes that the next function writes. dtype: KALMANET_FLOAT32 or KALMANET_FLOAT64. */
KALMANET_API kalmanet_status kalmanet_gka_saved_state_bytes(int32_t dtype, int64_t num_sequences,
                                                            int64_t num_heads, int64_t key_dim,
                                                            int64_t value_dim, int64_t* bytes);
/* Writes h [N,H,K,K] and u [N,H,K,V], of any strides, into `buffer` (any alignment). *written may
 * be NULL. Too small a buffer is an error, and nothing is written. */
KALMANET_API kalmanet_status kalmanet_gka_save_state(const kalmanet_tensor* h,
                                                     const kalmanet_tensor* u, void* buffer,
                                                     size_t buffer_size, int64_t* written);
/* Reads and checks a header; the first KALMANET_SAVED_STATE_HEADER_BYTES bytes are enough. */
KALMANET_API kalmanet_status kalmanet_gka_read_saved_state_info(
    const void* buffer, size_t buffer_size, kalmanet_gka_saved_state_info* info);
/* Reads a saved state, bit for bit, into h and u, which have the saved sizes and dtype. Whatever is
 * wrong with the bytes is KALMANET_INVALID_DATA with a message, and h and u are not touched. Never
 * reads past buffer_size; bytes behind the saved state are left alone. */
KALMANET_API kalmanet_status kalmanet_gka_load_state(const void* buffer, size_t buffer_size,
                                                     const kalmanet_tensor* h,
                                                     const kalmanet_tensor* u);

#ifdef __cplusplus
}
#endif

#endif
