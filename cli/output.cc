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

double Share(int64_t done, int64_t total) {
  return total > 0 ? std::min(1.0, static_cast<double>(done) / static_cast<double>(total)) : 1.0;
}

double SecondsLeft(int64_t done, int64_t total, double rate) {
  return rate > 0 ? static_cast<double>(total - done) / rate : 0;
}

// Names and notes come from users: what is no UTF-8 is replaced rather than thrown at. A negative `indent`
// keeps it in one line.
void Print(const Json& json, int indent) {
  std::cout << json.dump(indent, ' ', false, Json::error_handler_t::replace) << std::endl;
}

}  // namespace

void PrintJson(const Json& json) { Print(json, 2); }

void PrintJsonLine(const Json& json) { Print(json, -1); }

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

void ProgressReport::Bytes(int64_t done, int64_t total) {
  const double elapsed = Elapsed(done >= total);
  if (elapsed < 0) return;
  const double rate = static_cast<double>(done) / elapsed;
  Print(Share(done, total),
        absl::StrFormat("%s of %s, %s/s, %.0f s left", BytesText(done), BytesText(total),
                        BytesText(static_cast<int64_t>(rate)), SecondsLeft(done, total, rate)));
}

void ProgressReport::Rows(int64_t done, int64_t total) {
  const double elapsed = Elapsed(done >= total);
  if (elapsed < 0) return;
  const double rate = static_cast<double>(done) / elapsed;
  Print(Share(done, total),
        absl::StrFormat("%d of %d, %.0f/s, %.0f s left", done, total, rate, SecondsLeft(done, total, rate)));
}

void ProgressReport::Parts(const std::string& what, int64_t done, int64_t total) {
  if (Elapsed(done >= total) < 0) return;
  Print(Share(done, total), absl::StrFormat("%d of %d, %s", done, total, what));
}

double ProgressReport::Elapsed(bool last) {
  const absl::Time now = absl::Now();
  // A bar that was begun should end full.
  if (now < next_ && !(last && line_open_)) return -1;
  next_ = now + (terminal_ ? kTerminalInterval : kLineInterval);
  return std::max(1e-3, absl::ToDoubleSeconds(now - started_));
}

void ProgressReport::Print(double share, const std::string& text) {
  if (terminal_) {
    const int filled = static_cast<int>(share * kBarWidth);
    std::fprintf(stderr, "\r%s [%s%s] %3.0f %%  %s\x1b[K", label_.c_str(), std::string(filled, '#').c_str(),
                 std::string(kBarWidth - filled, '.').c_str(), 100 * share, text.c_str());
    line_open_ = true;
  } else {
    std::fprintf(stderr, "%s: %3.0f %%  %s\n", label_.c_str(), 100 * share, text.c_str());
  }
  std::fflush(stderr);
}

}  // namespace eduba
