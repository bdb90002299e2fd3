#include "cli/output.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"

namespace eduba {
namespace {

constexpr int kBarWidth = 30;
constexpr absl::Duration kQuiet = absl::Seconds(1);
constexpr absl::Duration kTerminalInterval = absl::Milliseconds(100);
constexpr absl::Duration kLineInterval = absl::Seconds(5);

bool LooksNumeric(const std::string& cell) {
  return cell.empty() || absl::ascii_isdigit(cell[0]) || cell[0] == '-' || cell[0] == '+';
}

}  // namespace

void PrintJson(const Json& json) {
  // Names and notes come from users: what is no UTF-8 is replaced rather than thrown at.
  std::cout << json.dump(2, ' ', false, Json::error_handler_t::replace) << std::endl;
}

void PrintTable(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths;
  std::vector<bool> right;
  for (size_t row = 0; row < rows.size(); ++row) {
    widths.resize(std::max(widths.size(), rows[row].size()));
    right.resize(widths.size(), true);
    for (size_t column = 0; column < rows[row].size(); ++column) {
      widths[column] = std::max(widths[column], rows[row][column].size());
      if (row > 0) right[column] = right[column] && LooksNumeric(rows[row][column]);
    }
  }
  for (const auto& row : rows) {
    std::string line;
    for (size_t column = 0; column < row.size(); ++column) {
      const std::string padding(widths[column] - row[column].size(), ' ');
      absl::StrAppend(&line, column > 0 ? "  " : "", right[column] ? padding : "", row[column],
                      right[column] ? "" : padding);
    }
    absl::StripTrailingAsciiWhitespace(&line);
    std::cout << line << "\n";
  }
  std::cout.flush();
}

std::string BytesText(int64_t bytes) {
  static constexpr const char* kUnits[] = {"KiB", "MiB", "GiB", "TiB"};
  if (bytes < 1024) return absl::StrCat(bytes, " B");
  auto value = static_cast<double>(bytes) / 1024;
  int unit = 0;
  for (; value >= 1024 && unit < 3; ++unit) value /= 1024;
  return absl::StrFormat("%.1f %s", value, kUnits[unit]);
}

ProgressReport::ProgressReport(std::string label)
    : label_(std::move(label)),
      terminal_(isatty(STDERR_FILENO) == 1),
      started_(absl::Now()),
      next_(started_ + kQuiet) {}

ProgressReport::~ProgressReport() {
  if (line_open_) std::fputc('\n', stderr);
}

void ProgressReport::Update(int64_t done, int64_t total, bool bytes) {
  const absl::Time now = absl::Now();
  const bool last = done >= total && line_open_;  // The bar should end full.
  if (now < next_ && !last) return;
  next_ = now + (terminal_ ? kTerminalInterval : kLineInterval);
  const double share = total > 0 ? static_cast<double>(done) / static_cast<double>(total) : 1.0;
  const double rate = static_cast<double>(done) / std::max(1e-3, absl::ToDoubleSeconds(now - started_));
  const double left = rate > 0 ? static_cast<double>(total - done) / rate : 0;
  const std::string amount = bytes ? absl::StrCat(BytesText(done), " of ", BytesText(total), ", ",
                                                  BytesText(static_cast<int64_t>(rate)), "/s")
                                   : absl::StrFormat("%d of %d, %.0f/s", done, total, rate);
  const std::string text = absl::StrFormat("%3.0f %%  %s, %.0f s left", 100 * share, amount, left);
  if (terminal_) {
    const int filled = static_cast<int>(share * kBarWidth);
    std::fprintf(stderr, "\r%s [%s%s] %s\x1b[K", label_.c_str(), std::string(filled, '#').c_str(),
                 std::string(kBarWidth - filled, '.').c_str(), text.c_str());
    line_open_ = true;
  } else {
    std::fprintf(stderr, "%s: %s\n", label_.c_str(), text.c_str());
  }
  std::fflush(stderr);
}

}  // namespace eduba
