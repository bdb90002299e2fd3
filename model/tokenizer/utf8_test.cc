#include "model/tokenizer/utf8.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

namespace eduba {
namespace {

TEST(Utf8, EveryScalarValueIsWrittenAndReadBack) {
  for (char32_t code = 0; code < 0x110000; ++code) {
    if (code >= 0xD800 && code < 0xE000) continue;
    std::string text;
    AppendUtf8(text, code);
    const Utf8Prefix first = FirstUtf8(text);
    ASSERT_TRUE(first.valid) << static_cast<uint32_t>(code);
    ASSERT_EQ(static_cast<size_t>(first.bytes), text.size());
    ASSERT_EQ(CodePoint(text), code);
  }
}

TEST(Utf8, WhatIsNoCharacterIsReplacedByMaximalSubparts) {
  // Overlong, a surrogate, beyond U+10FFFF, stray bytes, cut characters: as the Unicode standard's table 3-8.
  const std::pair<const char*, int> cases[] = {{"\xC0\xAF", 2},
                                               {"\xE0\x80\xAF", 3},
                                               {"\xED\xA0\x80", 3},
                                               {"\xF4\x91\x92\x93", 4},
                                               {"\xFF", 1},
                                               {"\x80\xBF", 2},
                                               {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF", 4},
                                               {"\xF0\x9F\x99", 1}};
  for (const auto& [bytes, replaced] : cases) {
    EXPECT_FALSE(CheckUtf8(bytes).ok());
    Utf8Assembler assembler(Utf8Assembler::Invalid::kMaximalSubpart);
    std::string text = assembler.Push(bytes);
    text += assembler.Finish();
    EXPECT_EQ(text.size(), 3u * replaced) << testing::PrintToString(bytes);
    EXPECT_TRUE(CheckUtf8(text).ok());
  }
}

TEST(Utf8, PiecesDoNotChangeTheText) {
  const uint64_t seed = 3;
  std::mt19937_64 random(seed);
  for (int round = 0; round < 20000; ++round) {
    std::string bytes;
    for (int n = static_cast<int>(random() % 8); n > 0; --n) {
      switch (random() % 3) {
        case 0:
          AppendUtf8(bytes, static_cast<char32_t>(random() % 0xD800));
          break;
        case 1:
          AppendUtf8(bytes, static_cast<char32_t>(0x10000 + random() % 0x100000));
          break;
        default:
          bytes.push_back(static_cast<char>(random()));
      }
    }
    for (const auto invalid : {Utf8Assembler::Invalid::kMaximalSubpart, Utf8Assembler::Invalid::kByte}) {
      Utf8Assembler whole(invalid);
      std::string text = whole.Push(bytes);
      text += whole.Finish();
      EXPECT_TRUE(CheckUtf8(text).ok());
      if (CheckUtf8(bytes).ok()) {
        EXPECT_EQ(text, bytes);
      }
      Utf8Assembler pieces(invalid);
      std::string joined;
      for (const char byte : bytes) {
        const std::string piece = pieces.Push({&byte, 1});
        EXPECT_TRUE(CheckUtf8(piece).ok());
        joined += piece;
      }
      joined += pieces.Finish();
      EXPECT_EQ(joined, text) << "round " << round << " of seed " << seed;
    }
  }
}

TEST(Utf8, TheErrorSaysWhere) {
  EXPECT_EQ(CheckUtf8("abc\xFF").message(), "the text is no valid UTF-8 at byte 3; convert it to UTF-8");
  EXPECT_TRUE(CheckUtf8("").ok());
}

}  // namespace
}  // namespace eduba
