/* First use of kalmanet from C: write 32 key-value pairs into a memory, then ask for one of them.
 */
#include <stdio.h>
#include <stdlib.h>

#include "kalmanet/kalmanet.h"

enum { T = 32, K = 64 }; /* tokens; the size of a key. One head, values of size 1 */

static void check(kalmanet_status status) {
  if (status != KALMANET_OK) {
    fprintf(stderr, "%s: %s\n", kalmanet_status_name(status), kalmanet_last_error());
    exit(1);
  }
}

int main(void) {
  static float k[T * K], v[T], o[T], h[K * K], u[K], nothing[K]; /* static: zeros */
  const int64_t keys[] = {1, T, 1, K}, values[] = {1, T, 1, 1};  /* batch, tokens, heads, size */
  const int64_t key[] = {1, 1, 1, K}, value[] = {1, 1, 1, 1};    /* of one token */
  const int64_t h_sizes[] = {1, 1, K, K}, u_sizes[] = {1, 1, K, 1};
  kalmanet_gka_options options = KALMANET_GKA_OPTIONS_INIT;
  kalmanet_gka_inputs in = KALMANET_GKA_INPUTS_INIT;
  kalmanet_gka_outputs out = KALMANET_GKA_OUTPUTS_INIT;
  kalmanet_gka_report ran = KALMANET_GKA_REPORT_INIT;
  kalmanet_gka_plan* plan = NULL;
  int i;
  srand(1);
  for (i = 0; i < T * K; ++i) k[i] = 0.22F * ((float)rand() / (float)RAND_MAX * 2 - 1);
  for (i = 0; i < T; ++i) v[i] = (float)i; /* the value of the i-th key is i */

  options.scale = 1;
  options.ridge_ratio = 0.0001;              /* a sharp memory, */
  options.num_iter = KALMANET_AUTO_NUM_ITER; /* with as many solver steps as that needs */
  check(kalmanet_gka_plan_create(&options, &plan));

  in.q = in.k = kalmanet_dense(k, KALMANET_FLOAT32, 4, keys);
  in.v = kalmanet_dense(v, KALMANET_FLOAT32, 4, values);
  out.o = kalmanet_dense(o, KALMANET_FLOAT32, 4, values);
  out.h_final = kalmanet_dense(h, KALMANET_FLOAT32, 4, h_sizes); /* the whole memory: */
  out.u_final = kalmanet_dense(u, KALMANET_FLOAT32, 4, u_sizes); /* it never grows */
  check(kalmanet_gka_forward(plan, &in, &out, NULL));

  in.h0 = out.h_final; /* go on from there, one token that asks for key 7 ... */
  in.u0 = out.u_final;
  in.q = kalmanet_dense(&k[7 * K], KALMANET_FLOAT32, 4, key);
  in.k = kalmanet_dense(nothing, KALMANET_FLOAT32, 4, key); /* ... and writes nothing */
  in.v = kalmanet_dense(nothing, KALMANET_FLOAT32, 4, value);
  out.o = kalmanet_dense(o, KALMANET_FLOAT32, 4, value);
  check(kalmanet_gka_step(plan, &in, &out, &ran));
  kalmanet_gka_plan_destroy(plan);
  printf("asked for 7, got %.2f (%s)\n", o[0], kalmanet_instruction_set_name(ran.instruction_set));
  return 0;
}
