// From --layers, --pattern, --mixer and the like to a config (see model_flags.hpp).
#include "model_flags.hpp"

#include "command.hpp"

namespace kalmanet::apps {
namespace {

constexpr const char* kGroup = "Model";
constexpr const char* kNumIter = "--num-iter";
constexpr const char* kRidge = "--ridge";
constexpr const char* kLearnedRidge = "--learned-ridge";
constexpr int64_t kByteVocabulary = 257;

}  // namespace

void ModelFlags::declare(CLI::App& app) {
  app.add_option("--config", config_path, "A config.json instead of the flags below")
      ->group(kGroup);
  app.add_option("--mixer", mixer, "All layers: gka, attention, or linear (gka with alpha 0)")
      ->check(CLI::IsMember({"gka", "attention", "linear"}))
      ->capture_default_str()
      ->group(kGroup);
  app.add_option("--pattern", pattern, "Layer by layer instead: GKA-GKA-* (* is attention)")
      ->group(kGroup);
  app.add_option("--layers", layers, "Number of layers")->capture_default_str()->group(kGroup);
  app.add_option("--width", width, "Hidden size")->capture_default_str()->group(kGroup);
  app.add_option("--heads", heads, "Heads")->capture_default_str()->group(kGroup);
  app.add_option("--kv-heads", kv_heads, "Key and value heads (default: as many)")->group(kGroup);
  app.add_option("--head-dim", head_dim, "Size of a head (default: width / heads)")->group(kGroup);
  app.add_option("--mlp", mlp, "Inner size of the MLP, 0 for none (default: about 8/3 width)")
      ->group(kGroup);
  app.add_option(kRidge, ridge, "Ridge ratio of the GKA layers, the same for every token")
      ->capture_default_str()
      ->group(kGroup);
  app.add_flag("--learned-ridge,!--no-learned-ridge", learned_ridge,
               "Predict the ridge ratio from the input (presets do), or not")
      ->group(kGroup);
  app.add_option("--solver", solver,
                 "chebyshev, direct, cg or auto (default: direct with a learned ridge ratio, else "
                 "chebyshev)")
      ->check(CLI::IsMember({"chebyshev", "direct", "cg", "auto"}))
      ->group(kGroup);
  app.add_option(kNumIter, num_iter,
                 "Steps of chebyshev and cg with a fixed ridge ratio, 0 for as many as it needs")
      ->capture_default_str()
      ->group(kGroup);
  app.add_option("--arithmetic", arithmetic, "Products of the solver: standard or bfloat16")
      ->check(CLI::IsMember({"standard", "bfloat16"}))
      ->capture_default_str()
      ->group(kGroup);
  app.add_option("--chunk-size", chunk_size, "Tokens a chunk, 0 for the backend's choice")
      ->capture_default_str()
      ->group(kGroup);
  app.add_option("--max-positions", max_positions, "Longest context of attention layers")
      ->capture_default_str()
      ->group(kGroup);
  app.add_flag("--untied", untied, "An output matrix of its own instead of the embedding")
      ->group(kGroup);
}

bool ModelFlags::excludes(const CLI::App& app, const std::string& flag) const {
  if (app.get_option(flag)->get_group() != kGroup) return false;
  if (!config_path.empty()) return true;
  if (flag == "--layers") return !pattern.empty();
  if (flag != kLearnedRidge) return false;
  return app.count(kRidge) > 0 || app.count(kNumIter) > 0 || mixer != "gka";
}

models::ModelConfig ModelFlags::make(const CLI::App& app) const {
  if (!config_path.empty()) {
    for (const char* flag : {"--mixer", "--pattern", "--layers", "--width", "--heads", "--kv-heads",
                             "--head-dim", "--mlp", kRidge, kLearnedRidge, "--solver", kNumIter,
                             "--arithmetic", "--chunk-size", "--max-positions", "--untied"}) {
      if (app.count(flag) > 0) {
        throw UsageError(std::string(flag) + " and --config exclude each other");
      }
    }
    return models::read_config(config_path);
  }
  models::ModelConfig config;
  if (width < 1 || heads < 1 || layers < 1) {
    throw UsageError("--layers, --width and --heads must be at least 1");
  }
  if (pattern.empty()) {
    config.layers.assign(static_cast<size_t>(layers), mixer == "attention"
                                                          ? models::LayerKind::attention
                                                          : models::LayerKind::gka);
  } else {
    if (app.count("--mixer") > 0) throw UsageError("--mixer and --pattern exclude each other");
    config.layers = models::parse_pattern(pattern, "--pattern");
    if (app.count("--layers") > 0 && static_cast<int64_t>(config.layers.size()) != layers) {
      throw UsageError("--pattern " + pattern + " has " + std::to_string(config.layers.size()) +
                       " layers and --layers says " + std::to_string(layers));
    }
  }
  if (learned_ridge && mixer == "linear") {
    throw UsageError("--learned-ridge and --mixer linear exclude each other: nothing is solved");
  }
  for (const char* flag : {kRidge, kNumIter}) {
    if (learned_ridge && app.count(flag) > 0) {
      throw UsageError(std::string(flag) + " has no effect with --learned-ridge; give one of them");
    }
  }
  if (head_dim == 0 && width % heads != 0) {
    throw UsageError("--width " + std::to_string(width) + " is not a multiple of --heads " +
                     std::to_string(heads) + "; give --head-dim");
  }
  config.vocab_size = kByteVocabulary;
  config.num_hidden_layers = static_cast<int64_t>(config.layers.size());
  config.hidden_size = width;
  config.num_attention_heads = heads;
  config.num_key_value_heads = kv_heads > 0 ? kv_heads : heads;
  config.head_dim = head_dim > 0 ? head_dim : width / heads;
  // 8/3 of the width in whole 16s: a gated MLP then has as many weights as a plain one of 4 widths.
  config.intermediate_size = mlp >= 0 ? mlp : (width * 8 / 3 + 15) / 16 * 16;
  config.max_position_embeddings = max_positions;
  config.tie_word_embeddings = !untied;
  config.bos_token_id = config.eos_token_id = kByteVocabulary - 1;
  config.gka.ridge_strength = ridge;
  config.gka.learned_ridge = learned_ridge;
  config.gka.arithmetic = arithmetic;
  // 30 steps of Chebyshev's iteration are not enough for the small ratios that may be learned.
  config.gka.num_iter = learned_ridge ? 0 : num_iter;
  config.gka.solver_type = !solver.empty() ? solver : learned_ridge ? "direct" : "chebyshev";
  config.gka.chunk_size = chunk_size;
  if (mixer == "linear") config.gka.fixed_alpha = 0.0;
  models::validate(config, "the model's flags");
  return config;
}

}  // namespace kalmanet::apps
