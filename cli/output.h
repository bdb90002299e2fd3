#ifndef EDUBA_CLI_OUTPUT_H_
#define EDUBA_CLI_OUTPUT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "nlohmann/json.hpp"

namespace eduba {

// Keeps the order in which fields are added.
using Json = nlohmann::ordered_json;

// To stdout, indented, with a newline.
void PrintJson(const Json& json);
// The same in one line, for who reads a line at a time.
void PrintJsonLine(const Json& json);

// To stdout: the first row is the heading; columns are as wide as their widest cell. Columns whose cells all
// start with a digit or a sign are set to the right.
void PrintTable(const std::vector<std::vector<std::string>>& rows);

// "1.5 GiB", "812 B".
std::string BytesText(int64_t bytes);

// A progress report on stderr, for what may take long: nothing in the first second, then a bar that is
// rewritten in place on a terminal, and otherwise a line every five seconds. Not thread-safe.
class ProgressReport {
 public:
  // `label` says what is being done: "append".
  explicit ProgressReport(std::string label);
  // Ends the line that is being rewritten.
  ~ProgressReport();
  ProgressReport(const ProgressReport&) = delete;
  ProgressReport& operator=(const ProgressReport&) = delete;

  void Bytes(int64_t done, int64_t total);
  void Rows(int64_t done, int64_t total);
  // `what` names the part that comes next.
  void Parts(const std::string& what, int64_t done, int64_t total);

 private:
  // Seconds since the start; negative when it is too early to print again.
  double Elapsed(bool last);
  void Print(double share, const std::string& text);

  const std::string label_;
  const bool terminal_;
  const absl::Time started_;
  absl::Time next_;  // Nothing is printed before.
  bool line_open_ = false;
};

}  // namespace eduba

#endif  // EDUBA_CLI_OUTPUT_H_
