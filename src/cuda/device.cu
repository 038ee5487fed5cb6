// The GPU as the library sees it: is there one, memory in stream order, errors as exceptions.
#include <mutex>
#include <string>

#include "cuda/check.hpp"
#include "cuda/launch.hpp"

namespace kalmanet::cuda {

namespace {

constexpr int kMostDevices = 64;

DeviceInfo ask_device() {
  DeviceInfo info;
  // The static runtime looks for the driver at its first call: where there is none, this says so.
  cudaError_t status = cudaGetDeviceCount(&info.count);
  if (status != cudaSuccess) {
    info.count = 0;
    info.problem = status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice
                       ? "no NVIDIA GPU, or no driver that is new enough"
                       : cudaGetErrorString(status);
    cudaGetLastError();  // a failed question is not the next call's failure
    return info;
  }
  int device = 0;
  cudaDeviceProp properties;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  info.max_shared = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  info.multiprocessors = properties.multiProcessorCount;
  info.major = properties.major;
  info.current = std::string(properties.name) + ", compute capability " +
                 std::to_string(properties.major) + "." + std::to_string(properties.minor) + ", " +
                 std::to_string(properties.multiProcessorCount) + " multiprocessors";
  if (properties.major < 8) {
    info.problem = info.current + ": needed is compute capability 8.0 or later";
    info.count = 0;
  }
  return info;
}

}  // namespace

const DeviceInfo& device_info() {
  // Asking takes longer than a decode step does. Where there is no GPU, the next call asks again.
  static std::mutex mutex;
  static DeviceInfo known[kMostDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    cudaGetLastError();
    device = 0;
  }
  const std::lock_guard lock(mutex);
  DeviceInfo& info = known[device % kMostDevices];
  if (info.count == 0) info = ask_device();
  return info;
}

namespace {

// A pool of our own, so that what is kept for the next call is no setting of anybody else's.
cudaMemPool_t pool_of_device() {
  static std::mutex mutex;
  static cudaMemPool_t pools[kMostDevices] = {};
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  cudaMemPool_t& pool = pools[device % kMostDevices];
  if (pool == nullptr) {
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location = {cudaMemLocationTypeDevice, device};
    check(cudaMemPoolCreate(&pool, &properties), "cudaMemPoolCreate");
    uint64_t keep = uint64_t{1} << 28;
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep),
          "cudaMemPoolSetAttribute");
  }
  return pool;
}

}  // namespace

void* allocate(int64_t bytes, Stream stream) {
  if (bytes == 0) return nullptr;
  void* memory = nullptr;
  check(cudaMallocFromPoolAsync(&memory, static_cast<size_t>(bytes), pool_of_device(),
                                static_cast<cudaStream_t>(stream)),
        "cudaMallocFromPoolAsync");
  return memory;
}

void release(void* memory, Stream stream) noexcept {
  if (memory != nullptr) cudaFreeAsync(memory, static_cast<cudaStream_t>(stream));
}

void copy_to_device(void* to, const void* from, int64_t bytes, Stream stream) {
  // From pageable memory the runtime takes its copy before it returns.
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                        static_cast<cudaStream_t>(stream)),
        "cudaMemcpyAsync");
}

void copy_to_host(void* to, const void* from, int64_t bytes, Stream stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, s),
        "cudaMemcpyAsync");
  check(cudaStreamSynchronize(s), "cudaStreamSynchronize");
}

}  // namespace kalmanet::cuda
