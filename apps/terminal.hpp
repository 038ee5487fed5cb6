// What is shown while work runs: a progress bar on a terminal, a line now and then elsewhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace kalmanet::apps {

// True where `fd` is a terminal that takes cursor movement (TERM is not "dumb").
bool is_terminal(int fd);
// True where standard error is such a terminal and NO_COLOR is not set.
bool use_color();
// `text` in bold, where colours are used.
std::string bold(const std::string& text);

// "0:07", "12:34", "1:02:03".
std::string describe_seconds(double seconds);
// "950", "12.3k", "1.2M".
std::string describe_count(double count);

// One line on standard error. On a terminal it is redrawn in place; elsewhere a line is printed at
// the start, then every tenth of the work or half minute, whichever comes later.
class ProgressBar {
 public:
  explicit ProgressBar(int64_t total, bool quiet = false);
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  // `details` follows the bar: "loss 1.71  8.2k tokens/s  0:42 left".
  void update(int64_t done, const std::string& details);
  // Prints a line of its own above the bar.
  void line(const std::string& text);
  // Leaves the bar's last state on the screen and goes to the next line.
  void finish();

 private:
  using Clock = std::chrono::steady_clock;
  void draw();
  void erase();

  int64_t total_, done_ = 0, next_line_ = 0;
  bool quiet_, terminal_, shown_ = false;
  std::string details_;
  Clock::time_point drawn_;
};

}  // namespace kalmanet::apps
