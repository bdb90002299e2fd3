#include "ingest/lzf.h"

#include <string>

#include "gtest/gtest.h"

namespace eduba {
namespace {

absl::StatusOr<std::string> Decompress(const std::string& block, size_t bytes_max = 1000) {
  const auto out = LzfDecompress({reinterpret_cast<const uint8_t*>(block.data()), block.size()}, bytes_max);
  if (!out.ok()) return out.status();
  return std::string(out->begin(), out->end());
}

TEST(Lzf, LiteralsCopiesAndRuns) {
  EXPECT_EQ(Decompress("").value(), "");
  EXPECT_EQ(Decompress("\x02"
                       "abc")
                .value(),
            "abc");
  EXPECT_EQ(Decompress(std::string("\x02"
                                   "abc\x20\x02",
                                   6))
                .value(),
            "abcabc");  // 3 from 3 back
  EXPECT_EQ(Decompress(std::string("\x00"
                                   "a\xe0\x01\x00",
                                   5))
                .value(),
            std::string(11, 'a'));  // a run of 10 more
}

TEST(Lzf, BrokenBlocksAreRefused) {
  EXPECT_FALSE(Decompress("\x05"
                          "abc")
                   .ok());  // literals beyond the end
  EXPECT_FALSE(Decompress(std::string("\x00"
                                      "a\x20\x01",
                                      4))
                   .ok());  // a copy from before the start
  EXPECT_FALSE(Decompress(std::string("\x00"
                                      "a\x20",
                                      3))
                   .ok());  // no distance
  EXPECT_FALSE(Decompress(std::string("\x00"
                                      "a\xe0",
                                      3))
                   .ok());  // no length
  EXPECT_FALSE(Decompress(std::string("\x00"
                                      "a\xe0\x01\x00",
                                      5),
                          10)
                   .ok());  // more than allowed
  EXPECT_FALSE(Decompress("\x02"
                          "abc",
                          2)
                   .ok());
}

}  // namespace
}  // namespace eduba
