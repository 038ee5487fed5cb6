// The device of a call's tensors, by PyTorch's stable ABI; the stream by one function of
// libtorch_cuda.so, which CPU builds of PyTorch lack.
#include "torch/place.hpp"

#include <dlfcn.h>

#include <atomic>

#include "torch/executor.hpp"

namespace kalmanet::torch_ops {
namespace {

struct Device {
  int32_t type = 0, index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

Device device_of(const Tensor& tensor) {
  Device device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
  return device;
}

std::string spelled(const Device& device) {
  if (device.type == aoti_torch_device_type_cpu()) return "cpu";
  const char* kind = device.type == aoti_torch_device_type_cuda() ? "cuda" : "another device";
  return kind + (":" + std::to_string(device.index));
}

using StreamGetter = AOTITorchError (*)(int32_t device_index, void** stream);

// Python loads libtorch_cuda.so without making its names visible to other libraries: it is asked
// for by name, and only where it is loaded already. Not a symbol that this library links, since
// PyTorch's CPU builds must load it.
StreamGetter stream_getter() {
  static std::atomic<StreamGetter> known = nullptr;
  if (StreamGetter getter = known.load(std::memory_order_relaxed)) return getter;
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  void* symbol = nullptr;
  if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) {
    symbol = dlsym(library, kName);
    dlclose(library);  // gives back this question's own hold on it
  }
  if (symbol == nullptr) symbol = dlsym(RTLD_DEFAULT, kName);
  if (symbol == nullptr) {
    throw Error(
        ErrorCode::unsupported, "backend",
        std::string("cuda: this PyTorch holds CUDA tensors, but no libtorch_cuda.so with ") +
            kName + " is loaded; use a build of PyTorch 2.11 or later for CUDA");
  }
  const auto getter = reinterpret_cast<StreamGetter>(symbol);
  known.store(getter, std::memory_order_relaxed);
  return getter;
}

}  // namespace

Place::Place(Named first, std::initializer_list<Named> others) {
  const Device device = device_of(*first.tensor);
  for (const Named& other : others) {
    if (other.tensor == nullptr) continue;
    const Device its = device_of(*other.tensor);
    if (its == device) continue;
    throw Error(ErrorCode::invalid_argument, other.name,
                "is on " + spelled(its) + ", but " + first.name + " is on " + spelled(device) +
                    "; move one of them");
  }
  where_ = std::string(first.name) + " is on " + spelled(device);
  if (device.type == aoti_torch_device_type_cpu()) return;
  if (device.type != aoti_torch_device_type_cuda()) {
    throw Error(ErrorCode::unsupported, first.name,
                "is on " + spelled(device) + "; allowed are the CPU and CUDA");
  }
  on_gpu_ = true;
  TORCH_ERROR_CODE_CHECK(stream_getter()(device.index, &stream_));
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(device.index, &guard_));
}

Place::~Place() {
  if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
}

Backend Place::backend(const std::string& name) const {
  const Backend wanted = backend_of(name);
  if (wanted == Backend::automatic) return on_gpu_ ? Backend::cuda : Backend::automatic;
  if (on_gpu_ == (wanted == Backend::cuda)) return wanted;
  throw Error(ErrorCode::invalid_argument, "backend",
              "is \"" + name + "\", but " + where_ + "; pass \"auto\", or move the tensors");
}

Placement Place::placement() const {
  return {&torch_executor(), on_gpu_ ? Backend::cuda : Backend::automatic, stream_};
}

}  // namespace kalmanet::torch_ops
