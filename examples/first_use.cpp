// First use of kalmanet from C++: write 32 key-value pairs into a memory, then ask for one of them.
#include <cstdio>
#include <random>
#include <vector>

#include "kalmanet/kalmanet.hpp"

int main() {
  const int64_t T = 32, K = 64;  // tokens; the size of a key. One head, values of size 1
  std::vector<float> k(T * K), v(T), o(T), h(K * K), u(K), zero(K);
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 0.125F);  // keys of length about 1
  for (float& x : k) x = normal(random);
  for (int64_t t = 0; t < T; ++t) v[t] = static_cast<float>(t);  // the value of the t-th key is t

  kalmanet::GkaOptions options;
  options.scale = 1.0;
  options.ridge_ratio = 0.001;                // a sharp memory,
  options.num_iter = kalmanet::kAutoNumIter;  // with as many solver steps as that needs
  kalmanet::GkaInputs in;
  in.q = in.k = kalmanet::dense(k.data(), {1, T, 1, K});  // batch, tokens, heads, size
  in.v = kalmanet::dense(v.data(), {1, T, 1, 1});
  kalmanet::GkaOutputs out;
  out.o = kalmanet::dense(o.data(), {1, T, 1, 1});
  out.h_final = kalmanet::dense(h.data(), {1, 1, K, K});  // the whole memory: it never grows
  out.u_final = kalmanet::dense(u.data(), {1, 1, K, 1});
  kalmanet::gka_forward(in, out, options);

  in.h0 = out.h_final;  // go on from there, one token that asks for key 7 ...
  in.u0 = out.u_final;
  in.q = kalmanet::dense(&k[7 * K], {1, 1, 1, K});
  in.k = kalmanet::dense(zero.data(), {1, 1, 1, K});  // ... and writes nothing
  in.v = kalmanet::dense(zero.data(), {1, 1, 1, 1});
  out.o = kalmanet::dense(o.data(), {1, 1, 1, 1});
  const kalmanet::GkaReport ran = kalmanet::gka_step(in, out, options);
  std::printf("asked for 7, got %.2f (%s)\n", o[0], kalmanet::name(ran.instruction_set));
}
