// Helper of test_safetensors.py: writes a file of known tensors with this library's writer, or
// prints what its reader finds in a file, one JSON object a line.
//   safetensors_tool write FILE
//   safetensors_tool list FILE
#include <cstdio>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "models/safetensors.hpp"

using namespace kalmanet::models;

namespace {

// Tensor i of type t holds bytes t, t+1, t+2, ...; the Python side expects exactly that.
void write(const std::string& path) {
  std::vector<std::vector<std::byte>> data;
  std::vector<TensorToWrite> tensors;
  const std::vector<std::vector<int64_t>> shapes = {{}, {5}, {2, 3, 4}, {0, 7}};
  data.reserve(shapes.size() * 15);
  for (int type = 0; type <= static_cast<int>(ElementType::u64); ++type) {
    const auto element = static_cast<ElementType>(type);
    for (size_t i = 0; i < shapes.size(); ++i) {
      int64_t bytes = size_of(element);
      for (const int64_t size : shapes[i]) bytes *= size;
      std::vector<std::byte>& content = data.emplace_back(static_cast<size_t>(bytes));
      for (size_t b = 0; b < content.size(); ++b) content[b] = static_cast<std::byte>(type + b);
      tensors.push_back(
          {std::string(name(element)) + "." + std::to_string(i), element, shapes[i], content});
    }
  }
  write_safetensors(path, tensors, {{"format", "pt"}, {"quoted \"key\"", "\xC3\xA9\n"}});
}

void list(const std::string& path) {
  const SafetensorsFile file(path);
  for (const TensorInfo& info : file.tensors()) {
    std::string shape, hex;
    for (const int64_t size : info.shape)
      shape += (shape.empty() ? "" : ",") + std::to_string(size);
    for (const std::byte b : file.view(info).data) {
      char digits[3];
      std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned>(b));
      hex += digits;
    }
    std::cout << "{\"name\":\"" << info.name << "\",\"dtype\":\"" << name(info.dtype)
              << "\",\"shape\":[" << shape << "],\"data\":\"" << hex << "\"}\n";
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 || (std::strcmp(argv[1], "write") != 0 && std::strcmp(argv[1], "list") != 0)) {
    std::cerr << "usage: safetensors_tool write|list FILE\n";
    return 2;
  }
  try {
    argv[1][0] == 'w' ? write(argv[2]) : list(argv[2]);
  } catch (const std::exception& e) {
    std::cerr << e.what() << "\n";
    return 1;
  }
  return 0;
}
