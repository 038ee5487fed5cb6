// First use of kalmanet from C++: write 32 key-value pairs into a memory, then ask for one of them.
#include <cstdio>
#include <random>
#include <vector>

#include "kalmanet/kalmanet.hpp"

using kalmanet::dense;

int main() {
  const int64_t T = 32, H = 1, K = 64, V = 1;  // tokens, heads, size of a key and of a value
  std::vector<float> k(T * H * K), v(T * H * V), o(T * H * V), h(H * K * K), u(H * K * V);
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 0.125F);  // keys of length about 1
  for (float& x : k) x = normal(random);
  for (int64_t t = 0; t < T; ++t) v[t] = static_cast<float>(t);  // the value of the t-th key is t

  kalmanet::GkaOptions options;
  options.scale = 1.0;
  options.ridge_ratio = 0.001;                // a sharp memory,
  options.num_iter = kalmanet::kAutoNumIter;  // and as many solver steps as that needs
  kalmanet::GkaInputs in;
  in.q = in.k = dense(k.data(), {1, T, H, K});
  in.v = dense(v.data(), {1, T, H, V});
  kalmanet::GkaOutputs out;
  out.o = dense(o.data(), {1, T, H, V});
  out.h_final = dense(h.data(), {1, H, K, K});  // the whole memory: it never grows
  out.u_final = dense(u.data(), {1, H, K, V});
  kalmanet::gka_forward(in, out, options);

  // One token more, which asks for key 7 and writes nothing: its own key is zero.
  std::vector<float> zero(K);
  in.q = dense(&k[7 * K], {1, 1, H, K});
  in.k = dense(zero.data(), {1, 1, H, K});
  in.v = dense(zero.data(), {1, 1, H, V});
  in.h0 = out.h_final;  // updated in place
  in.u0 = out.u_final;
  out.o = dense(o.data(), {1, 1, H, V});
  const kalmanet::GkaReport ran = kalmanet::gka_step(in, out, options);
  std::printf("asked for 7, got %.2f (%s, %d solver steps)\n", o[0], name(ran.instruction_set),
              ran.max_iterations);
}
