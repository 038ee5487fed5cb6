// The message of the kalmanet::Error that an action throws, for tables of bad input.
#pragma once

#include <functional>
#include <string>

#include "kalmanet/error.hpp"

namespace kalmanet {

inline std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& e) {
    return e.what();
  } catch (const std::exception& e) {
    return std::string("not a kalmanet::Error: ") + e.what();
  }
  return "accepted";
}

}  // namespace kalmanet
