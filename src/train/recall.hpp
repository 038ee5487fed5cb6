// The associative recall experiment: what the ridge memory remembers and a linear one does not.
//
// A sequence shows `pairs` key-value pairs (keys from the lower half of the vocabulary without
// repeats, values from the upper half), then the keys again in random order, a random token after
// each. At each key asked again the model must name its value; loss and accuracy count only there.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "layers/gated_kalmanet.hpp"

namespace kalmanet::train {

struct RecallOptions {
  int64_t vocab_size = 1024;
  int64_t pairs = 32;  // a sequence is 4 * pairs tokens
  int64_t batch = 64;
  int64_t steps = 1500;
  int64_t layers = 2, width = 32, heads = 1;
  // All variants first stand still at the loss of guessing among the values. At 3e-3 that takes a
  // third of the steps or more, and the seed decides how many are left; at 1e-2 about 300.
  double lr = 1e-2;
  double warmup = 0.05;  // share of the steps
  double weight_decay = 0.1;
  double clip = 1.0;
  uint64_t seed = 1;
  int64_t eval_every = 50;
  int64_t eval_batches = 4;    // fresh batches, never trained on, of each evaluation on the way
  int64_t final_batches = 32;  // and of the last one
};

// "gka": alpha 1, ridge 0.02, chebyshev(30). "linear": the same model with alpha 0, gated linear
// attention. "learned": alpha 1 and the learned ridge ratio, solver direct.
const std::vector<std::string>& recall_variants();

struct RecallBatch {
  at::Tensor tokens;   // [B, 4 * pairs] int64
  at::Tensor asked;    // [pairs] int64: the places of the asked keys, the same in each sequence
  at::Tensor answers;  // [B, pairs] int64
};
// Batch number `index` of the stream `seed`: a function of its arguments alone.
RecallBatch make_recall_batch(const RecallOptions& options, uint64_t seed, int64_t index);

// Embedding, `layers` blocks x + gka(norm(x)), norm, head. No MLP.
class RecallModelImpl : public torch::nn::Module {
 public:
  // Throws kalmanet::Error for an unknown variant.
  RecallModelImpl(const RecallOptions& options, const std::string& variant);
  // tokens [B,T] int64 -> logits [B, places, vocab] at the places `asked`.
  at::Tensor forward(const at::Tensor& tokens, const at::Tensor& asked);

 private:
  torch::nn::Embedding embed_{nullptr};
  std::vector<layers::GatedKalmaNet> mixers_;
  std::vector<at::Tensor> norms_;
  torch::nn::Linear head_{nullptr};
};
TORCH_MODULE(RecallModel);

struct RecallPoint {
  int64_t step;
  double loss;      // nats a question, of the training batches since the point before
  double accuracy;  // on fresh batches
};
struct RecallRun {
  std::string variant;
  std::vector<RecallPoint> curve;
  double accuracy = 0;           // after the last step, on final_batches fresh batches
  double seconds = 0;            // by the clock
  double processor_seconds = 0;  // of all threads: does not grow where other programs want cores
  int64_t parameters = 0;
  bool interrupted = false;
};

// Trains one variant. `on_step(step, loss)` is called after every step and `on_point` after every
// evaluation; either may be empty. Every variant sees the very same batches.
RecallRun run_recall(const RecallOptions& options, const std::string& variant,
                     const std::function<void(int64_t, double)>& on_step = {},
                     const std::function<void(const RecallPoint&)>& on_point = {});

}  // namespace kalmanet::train
