// Checks of training options and their JSON form (see options.hpp).
#include "train/options.hpp"

#include <cmath>

#include "kalmanet/error.hpp"

namespace kalmanet::train {
namespace {

using nlohmann::ordered_json;

template <class T>
void require(bool good, const char* name, const T& value, const char* allowed) {
  if (good) return;
  throw Error(ErrorCode::invalid_argument, name,
              ordered_json(value).dump() + " given; allowed: " + allowed);
}

// Calls visit(name, member) for each option. The first ones decide what is computed.
template <class Options, class Visit>
void visit_computed(Options& o, const Visit& visit) {
  visit("steps", o.steps);
  visit("batch", o.batch);
  visit("accumulate", o.accumulate);
  visit("context", o.context);
  visit("lr", o.lr);
  visit("final_lr_ratio", o.final_lr_ratio);
  visit("warmup", o.warmup);
  visit("schedule", o.schedule);
  visit("weight_decay", o.weight_decay);
  visit("beta1", o.beta1);
  visit("beta2", o.beta2);
  visit("clip", o.clip);
  visit("dtype", o.dtype);
  visit("seed", o.seed);
  visit("held_out", o.held_out);
  visit("sequential", o.sequential);
}

template <class Options, class Visit>
void visit_all(Options& o, const Visit& visit) {
  visit_computed(o, visit);
  visit("text", o.text);
  visit("minutes", o.minutes);
  visit("device", o.device);
  visit("threads", o.threads);
  visit("checkpoint_every", o.checkpoint_every);
  visit("keep_checkpoints", o.keep_checkpoints);
  visit("eval_every", o.eval_every);
  visit("eval_tokens", o.eval_tokens);
  visit("final_eval_tokens", o.final_eval_tokens);
  visit("log_every", o.log_every);
  visit("gradient_checkpointing", o.gradient_checkpointing);
}

}  // namespace

void check(const TrainOptions& o) {
  require(o.steps >= 1, "steps", o.steps, "1 or more");
  require(o.batch >= 1, "batch", o.batch, "1 or more windows");
  require(o.accumulate >= 1, "accumulate", o.accumulate, "1 or more passes a step");
  require(o.context >= 1, "context", o.context, "1 or more tokens");
  require(std::isfinite(o.lr) && o.lr > 0, "lr", o.lr, "a positive number, for example 0.001");
  require(o.final_lr_ratio >= 0 && o.final_lr_ratio <= 1, "final_lr_ratio", o.final_lr_ratio,
          "0 to 1");
  require(o.warmup >= 0, "warmup", o.warmup, "0 or more steps");
  schedule_kind(o.schedule);
  require(o.weight_decay >= 0 && o.weight_decay < 1e3, "weight_decay", o.weight_decay,
          "0 or more, for example 0.1");
  require(o.beta1 >= 0 && o.beta1 < 1, "beta1", o.beta1, "0 to 1, 1 excluded");
  require(o.beta2 >= 0 && o.beta2 < 1, "beta2", o.beta2, "0 to 1, 1 excluded");
  require(o.clip >= 0, "clip", o.clip, "0 (never) or more");
  require(o.dtype == "float32" || o.dtype == "bf16", "dtype", o.dtype, "float32, bf16");
  require(o.held_out > 0 && o.held_out < 1, "held_out", o.held_out,
          "between 0 and 1, for example 0.1");
  require(o.minutes >= 0, "minutes", o.minutes, "0 (no limit) or more");
  require(o.threads >= 0 && o.threads <= 4096, "threads", o.threads, "0 (automatic) to 4096");
  require(o.checkpoint_every >= 1, "checkpoint_every", o.checkpoint_every, "1 or more steps");
  require(o.keep_checkpoints >= 1, "keep_checkpoints", o.keep_checkpoints, "1 or more");
  require(o.eval_every >= 1, "eval_every", o.eval_every, "1 or more steps");
  require(o.eval_tokens >= 1, "eval_tokens", o.eval_tokens, "1 or more tokens");
  require(o.final_eval_tokens >= 1, "final_eval_tokens", o.final_eval_tokens, "1 or more tokens");
  require(o.log_every >= 1, "log_every", o.log_every, "1 or more steps");
}

ordered_json to_json(const TrainOptions& options) {
  ordered_json json;
  visit_all(options, [&](const char* name, const auto& value) { json[name] = value; });
  return json;
}

TrainOptions train_options_from_json(const nlohmann::json& json) {
  TrainOptions options;
  visit_all(options, [&](const char* name, auto& value) {
    if (!json.contains(name)) return;
    try {
      json.at(name).get_to(value);
    } catch (const nlohmann::json::exception&) {
      throw Error(ErrorCode::invalid_argument, name,
                  "the saved options hold " + json.at(name).dump() + ", of the wrong type");
    }
  });
  return options;
}

std::string differing_options(const TrainOptions& before, const TrainOptions& now) {
  const ordered_json then = to_json(before), given = to_json(now);
  std::string text;
  visit_computed(now, [&](const char* name, const auto&) {
    if (then.at(name) == given.at(name)) return;
    if (!text.empty()) text += ", ";
    text += std::string(name) + " (" + then.at(name).dump() + " before, now " +
            given.at(name).dump() + ")";
  });
  return text;
}

}  // namespace kalmanet::train
