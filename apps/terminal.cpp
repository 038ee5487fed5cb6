// Progress on terminals and in log files (see terminal.hpp).
#include "terminal.hpp"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace kalmanet::apps {
namespace {

constexpr auto kRedraw = std::chrono::milliseconds(100);
constexpr auto kQuietLine = std::chrono::seconds(30);

int columns() {
  struct winsize size{};
  if (::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  return 80;
}

}  // namespace

bool is_terminal(int fd) {
  const char* term = std::getenv("TERM");
  return ::isatty(fd) == 1 && term != nullptr && std::strcmp(term, "dumb") != 0;
}

bool use_color() {
  const char* no_color = std::getenv("NO_COLOR");
  return is_terminal(STDERR_FILENO) && (no_color == nullptr || *no_color == '\0');
}

std::string bold(const std::string& text) {
  return use_color() ? "\033[1m" + text + "\033[0m" : text;
}

std::string describe_seconds(double seconds) {
  const auto s = static_cast<int64_t>(std::max(0.0, seconds) + 0.5);
  char text[48];
  if (s >= 3600) {
    std::snprintf(text, sizeof text, "%lld:%02lld:%02lld", static_cast<long long>(s / 3600),
                  static_cast<long long>(s / 60 % 60), static_cast<long long>(s % 60));
  } else {
    std::snprintf(text, sizeof text, "%lld:%02lld", static_cast<long long>(s / 60),
                  static_cast<long long>(s % 60));
  }
  return text;
}

std::string describe_count(double count) {
  char text[32];
  if (count >= 1e6) {
    std::snprintf(text, sizeof text, "%.2fM", count / 1e6);
  } else if (count >= 1e3) {
    std::snprintf(text, sizeof text, "%.1fk", count / 1e3);
  } else {
    std::snprintf(text, sizeof text, "%.0f", count);
  }
  return text;
}

ProgressBar::ProgressBar(int64_t total, bool quiet)
    : total_(std::max<int64_t>(1, total)), quiet_(quiet), terminal_(is_terminal(STDERR_FILENO)) {}

ProgressBar::~ProgressBar() {
  finish();
}

void ProgressBar::update(int64_t done, const std::string& details) {
  done_ = done;
  details_ = details;
  if (quiet_) return;
  const Clock::time_point now = Clock::now();
  if (terminal_) {
    if (shown_ && done < total_ && now - drawn_ < kRedraw) return;
    drawn_ = now;
    draw();
    return;
  }
  const bool first = next_line_ == 0;
  const bool due = done >= next_line_ && now - drawn_ >= kQuietLine;
  if (!first && !due && done < total_) return;
  drawn_ = now;
  next_line_ = done + std::max<int64_t>(1, total_ / 10);
  std::fprintf(stderr, "%lld/%lld  %s\n", static_cast<long long>(done),
               static_cast<long long>(total_), details.c_str());
}

void ProgressBar::line(const std::string& text) {
  if (quiet_) return;
  erase();
  std::fprintf(stderr, "%s\n", text.c_str());
  if (terminal_ && done_ > 0) draw();
}

void ProgressBar::finish() {
  if (shown_) std::fputc('\n', stderr);
  shown_ = false;
}

void ProgressBar::draw() {
  const double share = std::clamp(static_cast<double>(done_) / static_cast<double>(total_), 0., 1.);
  char head[64];
  std::snprintf(head, sizeof head, "%3.0f%% %lld/%lld  ", share * 100,
                static_cast<long long>(done_), static_cast<long long>(total_));
  std::string text = head + details_;
  // The bar takes what the words leave, at most 30 columns; below 5 it is left out.
  const int room = std::min(30, columns() - 4 - static_cast<int>(text.size()));
  std::string bar;
  if (room >= 5) {
    const int filled = static_cast<int>(share * room + 0.5);
    bar = '[';
    bar += bold(std::string(static_cast<size_t>(filled), '='));
    bar.append(static_cast<size_t>(room - filled), ' ');
    bar += "] ";
  } else if (static_cast<int>(text.size()) >= columns()) {
    text.resize(static_cast<size_t>(std::max(1, columns() - 1)));
  }
  std::fprintf(stderr, "\r\033[K%s%s", bar.c_str(), text.c_str());
  std::fflush(stderr);
  shown_ = true;
}

void ProgressBar::erase() {
  if (!shown_) return;
  std::fputs("\r\033[K", stderr);
  shown_ = false;
}

}  // namespace kalmanet::apps
