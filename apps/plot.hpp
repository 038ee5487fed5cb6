// Pictures through the project's small Python scripts, where Python has matplotlib.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace kalmanet::apps {

// Runs tools/<script> with the arguments. Returns an empty text, or why there is no picture: this
// is never an error.
std::string run_plot(const std::string& script, const std::vector<std::string>& arguments);

}  // namespace kalmanet::apps
