// Model folders: weights, config and tokenizer to and from disk.
#include "models/io.hpp"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <set>
#include <sstream>

#include "kalmanet/error.hpp"
#include "models/tokenizer.hpp"

namespace kalmanet::models {
namespace fs = std::filesystem;
namespace {

using at::Tensor;

[[noreturn]] void fail(const fs::path& path, const std::string& message,
                       ErrorCode code = ErrorCode::invalid_argument) {
  throw Error(code, path.string(), message);
}

struct TypePair {
  ElementType element;
  at::ScalarType scalar;
};
constexpr TypePair kTypes[] = {{ElementType::boolean, at::kBool},
                               {ElementType::u8, at::kByte},
                               {ElementType::i8, at::kChar},
                               {ElementType::i16, at::kShort},
                               {ElementType::i32, at::kInt},
                               {ElementType::i64, at::kLong},
                               {ElementType::f16, at::kHalf},
                               {ElementType::bf16, at::kBFloat16},
                               {ElementType::f32, at::kFloat},
                               {ElementType::f64, at::kDouble},
                               {ElementType::u16, at::kUInt16},
                               {ElementType::u32, at::kUInt32},
                               {ElementType::u64, at::kUInt64},
                               {ElementType::f8_e4m3, at::kFloat8_e4m3fn},
                               {ElementType::f8_e5m2, at::kFloat8_e5m2}};

bool is_weight_type(ElementType type) {
  return type == ElementType::f32 || type == ElementType::f64 || type == ElementType::f16 ||
         type == ElementType::bf16;
}

// Gates whose exponentials need float32 whatever the other weights are.
bool stays_float32(const std::string& name) {
  return name.ends_with(".A_log") || name.ends_with(".dt_bias");
}

const char* config_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    default:
      return "float32";
  }
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::ostringstream stream;
  stream << at::IntArrayRef(shape);
  return stream.str();
}

std::span<const std::byte> bytes_of(const Tensor& tensor) {
  return {static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()};
}

// What published folders hold beyond a config's parameters, and what is done about it.
bool may_be_ignored(const std::string& name, const ModelConfig& config) {
  // The official layer has the forgetting gate's parameters even where it is switched off.
  if (!config.gka.use_forgetting_gate &&
      (stays_float32(name) || name.ends_with(".gka.a_proj.weight"))) {
    return true;
  }
  return config.tie_word_embeddings && name == "lm_head.weight";  // compared in load_model
}

// The names and shapes of the file against the config's, before memory is taken for the model.
void compare(const ModelConfig& config, const TensorStore& store, const fs::path& dir) {
  std::vector<std::string> problems;
  std::set<std::string> expected;
  for (const ParameterSpec& spec : parameter_specs(config)) {
    expected.insert(spec.name);
    const auto view = store.find(spec.name);
    if (!view) {
      problems.push_back("missing: " + spec.name + " " + shape_text(spec.shape));
    } else if (view->info->shape != spec.shape) {
      problems.push_back("shape: " + spec.name + " is " + shape_text(view->info->shape) +
                         ", the config says " + shape_text(spec.shape));
    } else if (!is_weight_type(view->info->dtype)) {
      problems.push_back(std::string("dtype: ") + spec.name + " is " + name(view->info->dtype) +
                         "; F32, BF16, F16 and F64 are read");
    }
  }
  for (const std::string& tensor : store.names()) {
    if (!expected.contains(tensor) && !may_be_ignored(tensor, config)) {
      problems.push_back("unexpected: " + tensor.substr(0, 200));
    }
  }
  if (problems.empty()) return;
  constexpr size_t kListed = 50;
  std::string list;
  for (size_t i = 0; i < problems.size() && i < kListed; ++i) list += "\n  " + problems[i];
  if (problems.size() > kListed) {
    list += "\n  ... and " + std::to_string(problems.size() - kListed) + " more";
  }
  fail(dir,
       "config.json and the weights contradict each other in " + std::to_string(problems.size()) +
           " tensor(s):" + list + "\nuse the config.json that was written with these weights",
       ErrorCode::invalid_shape);
}

// Building a model draws random weights; loading one must not change what is drawn afterwards.
class KeepRandomState {
 public:
  KeepRandomState() : generator_(at::detail::getDefaultCPUGenerator()) {
    const std::lock_guard<std::mutex> lock(generator_.mutex());
    state_ = generator_.get_state();
  }
  ~KeepRandomState() {
    const std::lock_guard<std::mutex> lock(generator_.mutex());
    generator_.set_state(state_);
  }
  KeepRandomState(const KeepRandomState&) = delete;
  KeepRandomState& operator=(const KeepRandomState&) = delete;

 private:
  at::Generator generator_;
  Tensor state_;
};

}  // namespace

at::ScalarType to_scalar_type(ElementType type) {
  for (const TypePair& pair : kTypes) {
    if (pair.element == type) return pair.scalar;
  }
  throw Error(ErrorCode::invalid_dtype, "dtype", std::string(name(type)) + " has no tensor type");
}

ElementType to_element_type(at::ScalarType type) {
  for (const TypePair& pair : kTypes) {
    if (pair.scalar == type) return pair.element;
  }
  throw Error(ErrorCode::invalid_dtype, "dtype",
              std::string(at::toString(type)) + " cannot be stored in a safetensors file");
}

Tensor to_tensor(const TensorView& view) {
  Tensor tensor = at::empty(view.info->shape, to_scalar_type(view.info->dtype));
  if (!view.data.empty())
    std::memcpy(tensor.mutable_data_ptr(), view.data.data(), view.data.size());
  return tensor;
}

void save_tensors(const fs::path& path, const std::map<std::string, Tensor>& tensors,
                  const std::map<std::string, std::string>& metadata) {
  std::vector<Tensor> dense;  // keeps what is written alive
  std::vector<TensorToWrite> entries;
  dense.reserve(tensors.size());
  for (const auto& [name, tensor] : tensors) {
    dense.push_back(tensor.detach().to(at::kCPU).contiguous());
    entries.push_back({name, to_element_type(tensor.scalar_type()), tensor.sizes().vec(),
                       bytes_of(dense.back())});
  }
  write_safetensors(path, std::move(entries), metadata);
}

std::map<std::string, Tensor> load_tensors(const fs::path& path) {
  const SafetensorsFile file(path);
  std::map<std::string, Tensor> tensors;
  for (const TensorInfo& info : file.tensors()) tensors[info.name] = to_tensor(file.view(info));
  return tensors;
}

void save_model(const HybridLanguageModel& model, const fs::path& dir,
                std::optional<at::ScalarType> dtype) {
  if (dtype && *dtype != at::kFloat && *dtype != at::kBFloat16 && *dtype != at::kHalf) {
    throw Error(ErrorCode::invalid_dtype, "dtype",
                std::string("is ") + at::toString(*dtype) +
                    "; weights are written as Float, BFloat16 or Half");
  }
  std::error_code error;
  fs::create_directories(dir, error);
  if (error) fail(dir, "cannot be made: " + error.message() + "; choose another folder");

  std::map<std::string, Tensor> tensors;
  at::ScalarType written = at::kFloat;
  for (const auto& item : model->named_parameters()) {
    Tensor tensor = item.value().detach();
    if (stays_float32(item.key())) {
      tensor = tensor.to(at::kFloat);
    } else if (dtype) {
      tensor = tensor.to(*dtype);
    }
    if (item.key() == "model.embed_tokens.weight") written = tensor.scalar_type();
    tensors[item.key()] = tensor;
  }
  ModelConfig config = model->config();
  config.torch_dtype = config_name(written);
  write_file(dir / "config.json", to_json(config));
  if (config.vocab_size >= ByteTokenizer::kVocabSize &&
      !fs::exists(dir / "tokenizer.json", error)) {
    ByteTokenizer().write(dir / "tokenizer.json");
  }
  save_tensors(dir / "model.safetensors", tensors, {{"format", "pt"}});
}

HybridLanguageModel load_model(const fs::path& dir, const LoadOptions& options) {
  if (options.dtype != at::kFloat && options.dtype != at::kBFloat16 && options.dtype != at::kHalf &&
      options.dtype != at::kDouble) {
    throw Error(ErrorCode::invalid_dtype, "dtype",
                std::string("is ") + at::toString(options.dtype) +
                    "; a model computes in Float, BFloat16, Half or Double");
  }
  const ModelConfig config = read_config(dir);
  const TensorStore store(dir);
  compare(config, store, dir);

  const KeepRandomState keep;
  const at::NoGradGuard no_grad;
  HybridLanguageModel model(config);
  if (options.dtype != at::kFloat) {
    model->to(options.dtype);
    for (auto& item : model->named_parameters()) {
      if (stays_float32(item.key()) && options.dtype != at::kDouble) {
        item.value().set_data(item.value().to(at::kFloat));
      }
    }
  }
  for (auto& item : model->named_parameters()) {
    item.value().copy_(to_tensor(*store.find(item.key())));
  }
  if (config.tie_word_embeddings) {
    const auto head = store.find("lm_head.weight");
    const auto embedding = store.find("model.embed_tokens.weight");
    if (head && (head->info->shape != embedding->info->shape ||
                 !at::equal(to_tensor(*head), to_tensor(*embedding)))) {
      fail(dir,
           "tie_word_embeddings is true, but lm_head.weight differs from "
           "model.embed_tokens.weight; set it to false");
    }
  }
  model->to(options.device);
  return model;
}

}  // namespace kalmanet::models
