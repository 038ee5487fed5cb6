/* A program of somebody else's, in C99 and just as well in C++98: one token, whose answer is known.
 */
#include <kalmanet/kalmanet.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static int failed(kalmanet_status status) {
  if (status == KALMANET_OK) return 0;
  fprintf(stderr, "%s: %s\n", kalmanet_status_name(status), kalmanet_last_error());
  return 1;
}

int main(void) {
  /* K = V = 1, k = q = 1, v = 2: H = f = 1, U = 2, x = 1 / (1 + a), o = U x. */
  const float one = 1, two = 2;
  const int64_t token[] = {1, 1, 1, 1};
  float o = 0, h = 0, u = 0, loaded_h = 0, loaded_u = 0;
  char saved[256];
  int64_t written = 0, bytes = 0;
  kalmanet_gka_options options = KALMANET_GKA_OPTIONS_INIT;
  kalmanet_gka_inputs in = KALMANET_GKA_INPUTS_INIT;
  kalmanet_gka_outputs out = KALMANET_GKA_OUTPUTS_INIT;
  kalmanet_gka_report report = KALMANET_GKA_REPORT_INIT;
  kalmanet_gka_shape shape = KALMANET_GKA_SHAPE_INIT;
  kalmanet_gka_saved_state_info info = KALMANET_GKA_SAVED_STATE_INFO_INIT;
  kalmanet_backend_info backend = KALMANET_BACKEND_INFO_INIT;
  kalmanet_gka_plan* plan = NULL;
  kalmanet_tensor to_h, to_u;

  if (kalmanet_abi_version() != KALMANET_ABI_VERSION) return 1;
  if (failed(kalmanet_executor_create_pool(2, &options.executor))) return 1;
  options.num_iter = KALMANET_AUTO_NUM_ITER;
  if (failed(kalmanet_gka_plan_create(&options, &plan))) return 1;
  in.q = in.k = kalmanet_dense(&one, KALMANET_FLOAT32, 4, token);
  in.v = kalmanet_dense(&two, KALMANET_FLOAT32, 4, token);
  out.o = kalmanet_dense(&o, KALMANET_FLOAT32, 4, token);
  out.h_final = kalmanet_dense(&h, KALMANET_FLOAT32, 4, token);
  out.u_final = kalmanet_dense(&u, KALMANET_FLOAT32, 4, token);
  if (failed(kalmanet_gka_forward(plan, &in, &out, &report))) return 1;
  if (fabs(o - 2 / 1.02) > 1e-4 || h != 1 || u != 2) return 1;
  if (report.backend != KALMANET_BACKEND_CPU || report.max_iterations < 1) return 1;

  if (failed(kalmanet_gka_save_state(&out.h_final, &out.u_final, saved, sizeof saved, &written)) ||
      failed(kalmanet_gka_read_saved_state_info(saved, sizeof saved, &info)))
    return 1;
  if (written != info.bytes || info.key_dim != 1) return 1;
  to_h = kalmanet_dense(&loaded_h, KALMANET_FLOAT32, 4, token);
  to_u = kalmanet_dense(&loaded_u, KALMANET_FLOAT32, 4, token);
  if (failed(kalmanet_gka_load_state(saved, sizeof saved, &to_h, &to_u))) return 1;
  if (loaded_h != 1 || loaded_u != 2) return 1;

  if (failed(kalmanet_gka_workspace_bytes(plan, KALMANET_GKA_FORWARD, &shape, &bytes))) return 1;
  if (failed(kalmanet_get_backend_info(0, &backend))) return 1;
  in.q.rank = 3; /* and a mistake is a message */
  if (kalmanet_gka_forward(plan, &in, &out, NULL) != KALMANET_INVALID_SHAPE ||
      strncmp(kalmanet_last_error(), "q: ", 3) != 0)
    return 1;
  kalmanet_gka_plan_destroy(plan);
  kalmanet_executor_destroy(options.executor);
  printf("kalmanet %s, ABI %u: %s\n", kalmanet_version(), (unsigned)kalmanet_abi_version(),
         backend.detail);
  return 0;
}
