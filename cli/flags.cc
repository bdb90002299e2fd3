#include "cli/flags.h"

#include <charconv>
#include <cmath>
#include <cstdlib>
#include <string>

#include "CLI/Error.hpp"
#include "CLI/Option.hpp"
#include "CLI/Validators.hpp"
#include "absl/strings/ascii.h"
#include "absl/time/time.h"

namespace eduba {
namespace {

// A week: beyond that a deadline is a typing mistake.
constexpr double kTimeoutMaxSeconds = 7 * 24 * 3600.0;

// -1 when `text` is no size.
int64_t ParseBytes(const std::string& text) {
  double number = 0;
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc()) return -1;
  std::string unit = absl::AsciiStrToLower(std::string(stop, text.data() + text.size()));
  if (!unit.empty() && unit.back() == 'b') unit.pop_back();
  if (!unit.empty() && unit.back() == 'i') unit.pop_back();
  const std::string units = "kmgt";
  int power = 0;
  if (!unit.empty()) {
    const size_t index = units.find(unit);
    if (unit.size() != 1 || index == std::string::npos) return -1;
    power = static_cast<int>(index) + 1;
  }
  const double bytes = std::ldexp(number, 10 * power);
  if (!(bytes >= 1) || bytes > 1e18) return -1;
  return static_cast<int64_t>(bytes);
}

}  // namespace

void AddServerFlags(CLI::App& command, ServerFlags& flags) {
  command.add_option("--server", flags.server, "Address of the coordinator, HOST:PORT")
      ->envname("EDUBA_SERVER")
      ->capture_default_str();
  command
      .add_option("--timeout", flags.timeout_s, "Seconds after which the command gives up")
      // A range does not exclude it.
      ->check([](const std::string& text) -> std::string {
        return std::isnan(std::strtod(text.c_str(), nullptr)) ? "'" + text + "' is no number" : "";
      })
      ->check(CLI::Range(0.001, kTimeoutMaxSeconds))
      ->capture_default_str();
}

std::unique_ptr<Client> Connect(const ServerFlags& flags) {
  return std::make_unique<Client>(ClientOptions{flags.server, absl::Seconds(flags.timeout_s)});
}

void AddJsonFlag(CLI::App& command, bool& json) {
  command.add_flag("--json", json, "Report as JSON on stdout");
}

CLI::Option* AddBytesOption(CLI::App& command, const std::string& name, int64_t& bytes,
                            const std::string& description) {
  return command
      .add_option_function<std::string>(
          name,
          [&bytes, name](const std::string& text) {
            bytes = ParseBytes(text);
            if (bytes < 0) {
              throw CLI::ValidationError(
                  name, "'" + text + "' is no size: use a number of bytes, or one like 8GiB");
            }
          },
          description)
      ->type_name("BYTES");
}

}  // namespace eduba
