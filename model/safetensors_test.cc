#include "model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "model/testing/safetensors_writer.h"

namespace eduba {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using testing::SafetensorsBytes;
using testing::SafetensorsHeaderJson;
using testing::TensorToWrite;
using testing::WriteFile;

absl::StatusOr<SafetensorsHeader> ParseBytes(const std::string& file) {
  return ParseSafetensorsHeader({reinterpret_cast<const uint8_t*>(file.data()), file.size()},
                                static_cast<int64_t>(file.size()), "m.safetensors");
}

std::string ErrorOf(const std::string& file) {
  const auto header = ParseBytes(file);
  if (header.ok()) return "OK";
  EXPECT_EQ(header.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(absl::StrContains(header.status().message(), '\n')) << header.status();
  EXPECT_THAT(std::string(header.status().message()), HasSubstr("m.safetensors: "));
  return std::string(header.status().message());
}

const std::vector<TensorToWrite>& Three() {
  static const auto* three = new std::vector<TensorToWrite>{{"a", "F32", {2, 3}, std::string(24, 'a')},
                                                            {"b", "BF16", {5}, std::string(10, 'b')},
                                                            {"c", "F16", {}, "cc"}};
  return *three;
}

// The header of Three() with one field of tensor b set to something else.
std::string Damaged(const std::string& field, const json& value) {
  json header = SafetensorsHeaderJson(Three());
  header["b"][field] = value;
  return SafetensorsBytes(header.dump(), std::string(36, 'x'));
}

class SafetensorsFolder : public ::testing::Test {
 protected:
  SafetensorsFolder() : folder_(::testing::TempDir() + absl::StrCat("safetensors_test_", getpid())) {
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  ~SafetensorsFolder() override { std::filesystem::remove_all(folder_); }

  void Write(const std::string& name, const std::string& bytes) { WriteFile(folder_ + "/" + name, bytes); }
  void WriteIndex(const json& map) {
    Write("model.safetensors.index.json",
          json({{"metadata", {{"total_size", 1}}}, {"weight_map", map}}).dump());
  }
  std::string OpenError() {
    const auto opened = Safetensors::Open(folder_);
    return opened.ok() ? "OK" : opened.status().ToString();
  }

  const std::string folder_;
};

TEST(SafetensorsHeader, SaysWhereEveryTensorIs) {
  const auto header = ParseBytes(SafetensorsBytes(Three()));
  ASSERT_TRUE(header.ok()) << header.status();
  ASSERT_EQ(header->tensors.size(), 3u);
  EXPECT_EQ(header->tensors.at("a").shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(header->tensors.at("b").begin, 24);
  EXPECT_EQ(header->tensors.at("b").bytes, 10);
  EXPECT_EQ(header->tensors.at("c").shape, std::vector<int64_t>());
  EXPECT_EQ(header->data_offset % 8, 0);
}

TEST(SafetensorsHeader, MetadataOfTextsIsLeftAside) {
  json header = SafetensorsHeaderJson(Three());
  header["__metadata__"] = {{"format", "pt"}};
  EXPECT_EQ(ErrorOf(SafetensorsBytes(header.dump(), std::string(36, 'x'))), "OK");
  header["__metadata__"] = {{"format", 1}};
  EXPECT_THAT(ErrorOf(SafetensorsBytes(header.dump(), std::string(36, 'x'))), HasSubstr("__metadata__"));
}

TEST(SafetensorsHeader, EveryTruncationIsAnError) {
  const std::string file = SafetensorsBytes(Three());
  ASSERT_EQ(ErrorOf(file), "OK");
  for (size_t bytes = 0; bytes < file.size(); ++bytes) {
    EXPECT_NE(ErrorOf(file.substr(0, bytes)), "OK") << bytes;
  }
  EXPECT_THAT(ErrorOf(file + "x"), HasSubstr("the tensors end at byte 36 of the data, the file has 37"));
}

TEST(SafetensorsHeader, LengthsBeyondTheFileOrTheLimitAreRefused) {
  for (const uint64_t length : {uint64_t{100}, uint64_t{1} << 20, (uint64_t{1} << 20) + 1, uint64_t{1} << 62,
                                ~uint64_t{0}, ~uint64_t{0} - 7}) {
    std::string file(50, '{');
    std::memcpy(file.data(), &length, 8);
    EXPECT_THAT(ErrorOf(file), HasSubstr(absl::StrCat("header of ", length, " bytes")));
  }
}

TEST(SafetensorsHeader, ShapesThatOverflowOrDoNotFitAreRefused) {
  // The product is 4 modulo 2^64: a reader that multiplies without a check finds 16 bytes.
  EXPECT_THAT(ErrorOf(SafetensorsBytes(
                  R"({"t":{"dtype":"F32","shape":[4194305,4194305,211106198978564],"data_offsets":[0,16]}})",
                  std::string(16, 'x'))),
              HasSubstr("more bytes than 2^63"));
  EXPECT_THAT(ErrorOf(Damaged("shape", {6})),
              HasSubstr("shape [6] of BF16 is 12 bytes, data_offsets hold 10"));
  EXPECT_THAT(ErrorOf(Damaged("shape", {0})), HasSubstr("not a whole number above 0"));
  EXPECT_THAT(ErrorOf(Damaged("shape", {-5})), HasSubstr("not a whole number above 0"));
  EXPECT_THAT(ErrorOf(Damaged("shape", {5.0})), HasSubstr("not a whole number above 0"));
  EXPECT_THAT(ErrorOf(Damaged("shape", "5")), HasSubstr("no list"));
  EXPECT_THAT(ErrorOf(Damaged("shape", {1, 1, 1, 1, 1, 1, 1, 1, 5})), HasSubstr("at most 8 sizes"));
  EXPECT_THAT(ErrorOf(Damaged("shape", {uint64_t{1} << 63})), HasSubstr("not a whole number above 0"));
}

TEST(SafetensorsHeader, OffsetsThatOverlapLeaveHolesOrLeaveTheFileAreRefused) {
  EXPECT_THAT(ErrorOf(Damaged("data_offsets", {23, 33})),
              HasSubstr("tensor \"b\" overlaps \"a\" at byte 23"));
  EXPECT_THAT(ErrorOf(Damaged("data_offsets", {0, 10})), HasSubstr("overlaps"));
  EXPECT_THAT(ErrorOf(Damaged("data_offsets", {26, 36})),
              HasSubstr("bytes [24, 26) of the data belong to no tensor"));
  EXPECT_THAT(ErrorOf(Damaged("data_offsets", {30, 40})), HasSubstr("its bytes end at 40 of 36"));
  EXPECT_THAT(ErrorOf(Damaged("data_offsets", {34, 24})), HasSubstr("not [begin, end]"));
  EXPECT_THAT(ErrorOf(Damaged("data_offsets", {-1, 9})), HasSubstr("not [begin, end]"));
  EXPECT_THAT(ErrorOf(Damaged("data_offsets", {24})), HasSubstr("not [begin, end]"));
  EXPECT_THAT(ErrorOf(Damaged("data_offsets", {24, ~uint64_t{0}})), HasSubstr("not [begin, end]"));
  EXPECT_THAT(ErrorOf(Damaged("data_offsets", {24, 1e30})), HasSubstr("not [begin, end]"));
}

TEST(SafetensorsHeader, WhatIsNoEntryIsRefused) {
  EXPECT_THAT(ErrorOf(Damaged("dtype", "F7")), HasSubstr("unknown dtype \"F7\""));
  EXPECT_THAT(ErrorOf(Damaged("dtype", 4)), HasSubstr("unknown dtype 4"));
  EXPECT_THAT(ErrorOf(Damaged("extra", 1)), HasSubstr("wanted {dtype, shape, data_offsets}"));
  EXPECT_THAT(ErrorOf(SafetensorsBytes(R"({"t":[]})", "")), HasSubstr("wanted {dtype, shape, data_offsets}"));
  EXPECT_THAT(ErrorOf(SafetensorsBytes(R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                       R"("t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
                                       "x")),
              HasSubstr("the key \"t\" appears twice"));
  EXPECT_THAT(ErrorOf(SafetensorsBytes("  {}", "")), HasSubstr("does not begin with {"));
  EXPECT_THAT(ErrorOf(SafetensorsBytes("{\"t\": [[[[", "")), HasSubstr("nested deeper than 3"));
  EXPECT_THAT(ErrorOf(SafetensorsBytes("{\"\xc3\x28\": 1}", "")), HasSubstr("syntax error"));
  // A name with line breaks stays on the one line of the message.
  EXPECT_THAT(ErrorOf(SafetensorsBytes(R"({"a\nb": 1})", "")), HasSubstr("\\n"));
  std::vector<TensorToWrite> many;
  for (int i = 0; i <= kSafetensorsTensorsMax; ++i) many.push_back({absl::StrCat(i), "U8", {1}, "x"});
  EXPECT_THAT(ErrorOf(SafetensorsBytes(many)), HasSubstr("more than 4096 tensors"));
  many.pop_back();
  EXPECT_EQ(ErrorOf(SafetensorsBytes(many)), "OK");
}

TEST(SafetensorsHeader, DamagedBytesEndInAnErrorOrInTensorsThatTileTheData) {
  const uint64_t seed = 20261124;
  std::mt19937_64 random(seed);
  const std::string whole = SafetensorsBytes(Three());
  for (int round = 0; round < 20000; ++round) {
    std::string file = whole;
    for (int changes = static_cast<int>(random() % 3); changes >= 0; --changes) {
      file[random() % file.size()] = static_cast<char>(random());
    }
    const auto header = ParseBytes(file);
    if (!header.ok()) continue;
    int64_t bytes = 0;
    for (const auto& [name, tensor] : header->tensors) {
      EXPECT_LE(header->data_offset + tensor.begin + tensor.bytes, static_cast<int64_t>(file.size()));
      bytes += tensor.bytes;
    }
    EXPECT_EQ(header->data_offset + bytes, static_cast<int64_t>(file.size()))
        << "round " << round << " of seed " << seed;
  }
}

TEST_F(SafetensorsFolder, OneFileIsMappedWhereItLies) {
  Write("model.safetensors", SafetensorsBytes(Three()));
  const auto opened = Safetensors::Open(folder_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const Safetensors& tensors = **opened;
  EXPECT_EQ(tensors.tensors().size(), 3u);
  EXPECT_EQ(tensors.bytes(), 36);
  const MappedTensor& b = tensors.tensors().at("b");
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(b.data), b.bytes), "bbbbbbbbbb");
  EXPECT_EQ(b.data - tensors.tensors().at("a").data, 24);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(tensors.tensors().at("a").data) % 8, 0u);
}

TEST_F(SafetensorsFolder, DataThatIsNotAlignedInTheFileIsAlignedInMemory) {
  for (int spaces = 0; spaces < 8; ++spaces) {
    const std::string header = SafetensorsHeaderJson(Three()).dump() + std::string(spaces, ' ');
    Write("model.safetensors", SafetensorsBytes(header, std::string(24, 'a') + std::string(12, 'b'), 1));
    const auto opened = Safetensors::Open(folder_);
    ASSERT_TRUE(opened.ok()) << opened.status();
    const MappedTensor& a = (*opened)->tensors().at("a");
    EXPECT_EQ(reinterpret_cast<uintptr_t>(a.data) % 8, 0u);
    EXPECT_EQ(std::string(reinterpret_cast<const char*>(a.data), a.bytes), std::string(24, 'a'));
  }
}

TEST_F(SafetensorsFolder, ATensorAtAnOddByteIsRefused) {
  Write("model.safetensors", SafetensorsBytes({{"a", "U8", {1}, "x"}, {"b", "F32", {1}, "xxxx"}}));
  EXPECT_THAT(OpenError(), HasSubstr("tensor \"b\" begins at byte 1, not a multiple of its 4-byte elements"));
}

TEST_F(SafetensorsFolder, ShardsAreOneModel) {
  Write("s1.safetensors", SafetensorsBytes({Three()[0]}));
  Write("s2.safetensors", SafetensorsBytes({Three()[1], Three()[2]}));
  WriteIndex({{"a", "s1.safetensors"}, {"b", "s2.safetensors"}, {"c", "s2.safetensors"}});
  const auto opened = Safetensors::Open(folder_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ((*opened)->tensors().size(), 3u);
  EXPECT_EQ((*opened)->bytes(), 36);
  EXPECT_TRUE((*opened)->CheckUnchanged().ok());
}

TEST_F(SafetensorsFolder, AnIndexThatDisagreesWithItsShardsIsRefused) {
  Write("s1.safetensors", SafetensorsBytes({Three()[0]}));
  Write("s2.safetensors", SafetensorsBytes({Three()[1]}));
  WriteIndex({{"a", "s1.safetensors"}, {"b", "s1.safetensors"}});
  EXPECT_THAT(OpenError(), HasSubstr("tensor \"b\" is not in s1.safetensors"));
  WriteIndex({{"a", "s2.safetensors"}, {"b", "s2.safetensors"}});
  EXPECT_THAT(OpenError(), HasSubstr("tensor \"a\" is not in s2.safetensors"));
  Write("s2.safetensors", SafetensorsBytes(Three()));
  WriteIndex({{"a", "s1.safetensors"}, {"b", "s2.safetensors"}});
  EXPECT_THAT(OpenError(), HasSubstr("tensor \"a\" is in "));
  Write("s2.safetensors", SafetensorsBytes({Three()[1], Three()[2]}));
  EXPECT_THAT(OpenError(), HasSubstr("tensor \"c\" is not in "));
  WriteIndex({{"a", "s3.safetensors"}});
  EXPECT_THAT(OpenError(), HasSubstr("NOT_FOUND"));
}

TEST_F(SafetensorsFolder, AnIndexMayNotPointElsewhere) {
  for (const json& file : std::vector<json>{"../s.safetensors", "/etc/passwd", "x/s.safetensors", "s.bin", "",
                                            1, std::string("a\0.safetensors", 14)}) {
    WriteIndex({{"a", file}});
    EXPECT_THAT(OpenError(), HasSubstr("wanted NAME.safetensors in the same folder")) << file;
  }
  Write("model.safetensors.index.json", "[]");
  EXPECT_THAT(OpenError(), HasSubstr("no object weight_map"));
}

TEST_F(SafetensorsFolder, WhatIsNotThereOrNoFileIsAnError) {
  EXPECT_THAT(OpenError(), HasSubstr("NOT_FOUND"));
  ASSERT_EQ(mkfifo((folder_ + "/model.safetensors").c_str(), 0600), 0);
  EXPECT_THAT(OpenError(), HasSubstr("not a regular file"));  // Opening it does not wait for a writer.
}

TEST_F(SafetensorsFolder, AFileThatChangesIsNoticed) {
  Write("model.safetensors", SafetensorsBytes(Three()));
  const auto opened = Safetensors::Open(folder_);
  ASSERT_TRUE(opened.ok());
  ASSERT_EQ(truncate((folder_ + "/model.safetensors").c_str(), 20), 0);
  EXPECT_EQ((*opened)->CheckUnchanged().code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace eduba
