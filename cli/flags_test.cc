#include "cli/flags.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "CLI/Config.hpp"
#include "CLI/Error.hpp"
#include "CLI/Formatter.hpp"

namespace eduba {
namespace {

// The bytes of --bytes TEXT; none where it is refused.
std::optional<int64_t> Bytes(const std::string& text) {
  CLI::App app;
  int64_t bytes = 0;
  AddBytesOption(app, "--bytes", bytes, "");
  try {
    app.parse(std::vector<std::string>{"--bytes=" + text});
  } catch (const CLI::ParseError&) {
    return std::nullopt;
  }
  return bytes;
}

TEST(Flags, BytesTakeUnitsThatArePowersOf1024) {
  EXPECT_EQ(Bytes("1"), 1);
  EXPECT_EQ(Bytes("500MiB"), int64_t{500} << 20);
  EXPECT_EQ(Bytes("8GiB"), int64_t{8} << 30);
  EXPECT_EQ(Bytes("8gb"), int64_t{8} << 30);
  EXPECT_EQ(Bytes("1.5G"), int64_t{3} << 29);
  EXPECT_EQ(Bytes("2T"), int64_t{2} << 40);
  EXPECT_EQ(Bytes("64k"), 65536);
}

TEST(Flags, WhatIsNoSizeIsRefused) {
  for (const char* text : {"0", "-1", "x", "1Q", "1MiBs", "nan", "inf", "1e19", "0.5", ""}) {
    EXPECT_EQ(Bytes(text), std::nullopt) << text;
  }
}

// Whether --timeout TEXT is taken.
bool TakesTimeout(const std::string& text) {
  CLI::App app;
  ServerFlags flags;
  AddServerFlags(app, flags);
  try {
    app.parse(std::vector<std::string>{"--timeout=" + text});
  } catch (const CLI::ParseError&) {
    return false;
  }
  return true;
}

TEST(Flags, TimeoutsAreSecondsUpToAWeek) {
  for (const char* text : {"0.001", "1", "604800"}) EXPECT_TRUE(TakesTimeout(text)) << text;
  for (const char* text : {"0", "-1", "nan", "inf", "604801", "x"}) EXPECT_FALSE(TakesTimeout(text)) << text;
}

TEST(Flags, TheEnvironmentNamesTheServerUnlessAFlagDoes) {
  ASSERT_EQ(setenv("EDUBA_SERVER", "there:1", /*overwrite=*/1), 0);
  const auto server = [](std::vector<std::string> arguments) {
    CLI::App app;
    ServerFlags flags;
    AddServerFlags(app, flags);
    app.parse(std::move(arguments));
    return flags.server;
  };
  EXPECT_EQ(server({}), "there:1");
  EXPECT_EQ(server({"--server=here:2"}), "here:2");
  unsetenv("EDUBA_SERVER");
  EXPECT_EQ(server({}), "127.0.0.1:7070");
}

}  // namespace
}  // namespace eduba
