/* Streams text through a memory of constant size, one character at a time, and lets it guess each
 * next character from what it has read. Half way the state is saved to bytes, destroyed, and loaded
 * again into other memory. In the end every answer is compared with one forward over the whole
 * text. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kalmanet/kalmanet.h"

enum { H = 2, K = 64, V = 28, CONTEXT = 3 }; /* heads; sizes of keys and values; see key_of */

static const char sentence[] = "one small state remembers a whole stream of tokens. ";
enum { LENGTH = sizeof sentence - 1, TIMES = 3, T = LENGTH * TIMES };

static void check(kalmanet_status status) {
  if (status != KALMANET_OK) {
    fprintf(stderr, "%s: %s\n", kalmanet_status_name(status), kalmanet_last_error());
    exit(1);
  }
}

/* What comes in as text goes out as text: a..z, the space and the full stop. */
static const char alphabet[] = "abcdefghijklmnopqrstuvwxyz .";
static char letter(int t) {
  return sentence[((t % LENGTH) + LENGTH) % LENGTH];
}

/* The key of a place in the text: a vector of length 1, random but always the same for the same
 * CONTEXT characters before it (SplitMix64 of them). */
static void key_of(int t, int head, float* key) {
  uint64_t seed = (uint64_t)head + 1;
  double norm = 0;
  int i;
  for (i = 1; i <= CONTEXT; ++i) seed = seed * 1000003u + (uint64_t)(unsigned char)letter(t - i);
  for (i = 0; i < K; ++i) {
    uint64_t z = (seed += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    key[i] = (float)((z ^ (z >> 31)) >> 40) / 8388608.0F - 1.0F;
    norm += (double)key[i] * key[i];
  }
  for (i = 0; i < K; ++i) key[i] /= (float)sqrt(norm);
}

/* Token t has read letter t: it stores "after these characters comes letter t" and asks what comes
 * after the characters that end in it. */
static float q[T][H][K], k[T][H][K], v[T][1][V]; /* one value head, which both heads share */
static float whole[T][H][V], streamed[T][H][V];

static void fill_inputs(void) {
  int t, head;
  for (t = 0; t < T; ++t) {
    for (head = 0; head < H; ++head) {
      key_of(t, head, k[t][head]);
      key_of(t + 1, head, q[t][head]);
    }
    v[t][0][strchr(alphabet, letter(t)) - alphabet] = 1;
  }
}

/* Tensors over tokens [t, t + n). */
static void point_at(int t, int64_t n, float (*o)[H][V], kalmanet_gka_inputs* in,
                     kalmanet_gka_outputs* out) {
  const int64_t keys[] = {1, n, H, K}, values[] = {1, n, 1, V}, answers[] = {1, n, H, V};
  in->q = kalmanet_dense(q[t], KALMANET_FLOAT32, 4, keys);
  in->k = kalmanet_dense(k[t], KALMANET_FLOAT32, 4, keys);
  in->v = kalmanet_dense(v[t], KALMANET_FLOAT32, 4, values);
  out->o = kalmanet_dense(o[t], KALMANET_FLOAT32, 4, answers);
}

/* The state that `in` and `out` share: each step updates it in place. */
static void use_state(float* memory, kalmanet_gka_inputs* in, kalmanet_gka_outputs* out) {
  const int64_t h[] = {1, H, K, K}, u[] = {1, H, K, V};
  in->h0 = out->h_final = kalmanet_dense(memory, KALMANET_FLOAT32, 4, h);
  in->u0 = out->u_final = kalmanet_dense(memory + H * K * K, KALMANET_FLOAT32, 4, u);
}

/* The letter whose value both heads together rate highest. */
static char guess(float (*o)[V]) {
  int i, best = 0;
  for (i = 1; i < V; ++i) {
    if (o[0][i] + o[1][i] > o[0][best] + o[1][best]) best = i;
  }
  return alphabet[best];
}

/* Moves the state through bytes into new memory, as another process would. */
static float* save_and_load(float* memory, int64_t state_bytes, kalmanet_gka_inputs* in,
                            kalmanet_gka_outputs* out) {
  kalmanet_gka_saved_state_info info = KALMANET_GKA_SAVED_STATE_INFO_INIT;
  int64_t size = 0;
  void* bytes;
  float* fresh = malloc((size_t)state_bytes);
  check(kalmanet_gka_saved_state_bytes(KALMANET_FLOAT32, 1, H, K, V, &size));
  bytes = malloc((size_t)size);
  if (fresh == NULL || bytes == NULL) exit(1);
  check(kalmanet_gka_save_state(&out->h_final, &out->u_final, bytes, (size_t)size, NULL));
  memset(memory, 0xFF, (size_t)state_bytes); /* NaN everywhere: the old state is gone */
  free(memory);
  check(kalmanet_gka_read_saved_state_info(bytes, (size_t)size, &info));
  use_state(fresh, in, out);
  check(kalmanet_gka_load_state(bytes, (size_t)size, &out->h_final, &out->u_final));
  printf("(saved %lld bytes: %lld heads, K = %lld, V = %lld; loaded into other memory)\n",
         (long long)info.bytes, (long long)info.num_heads, (long long)info.key_dim,
         (long long)info.value_dim);
  free(bytes);
  return fresh;
}

int main(void) {
  kalmanet_gka_options options = KALMANET_GKA_OPTIONS_INIT;
  kalmanet_gka_inputs in = KALMANET_GKA_INPUTS_INIT;
  kalmanet_gka_outputs out = KALMANET_GKA_OUTPUTS_INIT;
  kalmanet_gka_plan* plan = NULL;
  double worst = 0, largest = 0;
  int64_t state_bytes = 0;
  int t, i, right[TIMES] = {0};
  char line[LENGTH + 1] = {0}, guessed = ' ';
  float* memory;

  if (kalmanet_abi_version() != KALMANET_ABI_VERSION) return 1;
  options.ridge_ratio = 0.005;
  options.num_iter = KALMANET_AUTO_NUM_ITER;
  check(kalmanet_gka_plan_create(&options, &plan));
  fill_inputs();

  point_at(0, T, whole, &in, &out); /* all at once, from an empty memory */
  check(kalmanet_gka_forward(plan, &in, &out, NULL));

  check(kalmanet_gka_state_bytes(H, K, V, &state_bytes));
  memory = calloc(1, (size_t)state_bytes);
  if (memory == NULL) return 1;
  use_state(memory, &in, &out);
  printf("A memory of %lld bytes reads a text and guesses each next letter.\n",
         (long long)state_bytes);
  for (t = 0; t < T; ++t) {
    if (t == T / 2) memory = save_and_load(memory, state_bytes, &in, &out);
    point_at(t, 1, streamed, &in, &out);
    check(kalmanet_gka_step(plan, &in, &out, NULL));
    line[t % LENGTH] = guessed;
    right[t / LENGTH] += guessed == letter(t);
    guessed = guess(streamed[t]); /* about the next */
    if ((t + 1) % LENGTH == 0) {
      printf("%d. text    %s\n   guesses %s  %d of %d\n", t / LENGTH + 1, sentence, line,
             right[t / LENGTH], LENGTH);
    }
  }
  for (i = 0; i < T * H * V; ++i) {
    worst = fmax(worst, fabs((double)(&whole[0][0][0])[i] - (&streamed[0][0][0])[i]));
    largest = fmax(largest, fabs((double)(&whole[0][0][0])[i]));
  }
  printf("steps against one forward over all %d tokens: largest difference %.1e of %.2f\n", T,
         worst, largest);
  free(memory);
  kalmanet_gka_plan_destroy(plan);
  if (!(worst <= 1e-5 * largest)) return 1;
  return right[0] < LENGTH / 2 && 10 * right[TIMES - 1] >= 9 * LENGTH ? 0 : 1;
}
