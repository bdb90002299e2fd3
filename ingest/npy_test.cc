#include "ingest/npy.h"

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <numeric>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A folder of this process, removed at its end.
struct TempFolder {
  TempFolder() { std::filesystem::create_directories(path); }
  ~TempFolder() { std::filesystem::remove_all(path); }
  const std::filesystem::path path =
      std::filesystem::temp_directory_path() / absl::StrCat("eduba_npy_test_", getpid());
};

std::string TempPath(const std::string& name) {
  static const TempFolder folder;
  return folder.path / name;
}

void WriteBytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

std::string ReadBytes(const std::string& path) {
  std::stringstream out;
  out << std::ifstream(path, std::ios::binary).rdbuf();
  return out.str();
}

// An .npy file of the given version around `dictionary` and `data`.
std::string NpyBytes(int version, const std::string& dictionary, const std::string& data) {
  const std::string text = dictionary + "\n";
  std::string out =
      absl::StrCat("\x93NUMPY", std::string(1, static_cast<char>(version)), std::string(1, '\0'));
  for (int i = 0; i < (version == 1 ? 2 : 4); ++i) out.push_back(static_cast<char>(text.size() >> (8 * i)));
  return out + text + data;
}

absl::StatusOr<NpyHeader> Parse(const std::string& bytes) {
  return ParseNpyHeader({reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()},
                        static_cast<int64_t>(bytes.size()), "x.npy");
}

std::string MessageOf(const std::string& bytes) {
  const auto header = Parse(bytes);
  EXPECT_FALSE(header.ok());
  EXPECT_EQ(header.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(header.status().message());
}

// What numpy 1.24 writes for np.save(path, np.arange(3, dtype='<i2').reshape(1, 3)).
const char kNumpyDictionary[] =
    "{'descr': '<i2', 'fortran_order': False, 'shape': (1, 3), }                                             "
    " ";

TEST(Npy, ReadsEveryVersion) {
  for (const int version : {1, 2, 3}) {
    const std::string path = TempPath("version");
    WriteBytes(path, NpyBytes(version, kNumpyDictionary, std::string("\0\0\1\0\2\1", 6)));
    const auto file = NpyFile::Open(path);
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_EQ((*file)->type(), NpyType::kI16);
    EXPECT_THAT((*file)->shape(), ElementsAre(1, 3));
    int16_t values[2] = {};
    ASSERT_TRUE((*file)->Read(1, 2, values).ok());
    EXPECT_THAT(values, ElementsAre(1, 258));
  }
}

TEST(Npy, ReadsKeysInAnyOrderEitherQuoteScalarsAndLongIntegers) {
  EXPECT_TRUE(Parse(NpyBytes(1, "{'shape':(2L,),\"fortran_order\":False,'descr':'|u1'}", "ab")).ok());
  const auto scalar =
      Parse(NpyBytes(1, "{'descr': '<f8', 'fortran_order': False, 'shape': (), }", "12345678"));
  ASSERT_TRUE(scalar.ok()) << scalar.status();
  EXPECT_EQ(scalar->elements, 1);
  const auto empty = Parse(NpyBytes(1, "{'descr': '<f8', 'fortran_order': False, 'shape': (0, 7), }", ""));
  ASSERT_TRUE(empty.ok()) << empty.status();
  EXPECT_EQ(empty->elements, 0);
}

TEST(Npy, ASavedArrayIsReadBack) {
  const std::string path = TempPath("roundtrip");
  std::vector<float> values(60);
  std::iota(values.begin(), values.end(), -7.25f);
  ASSERT_TRUE(WriteNpy<float>(path, {3, 4, 5}, values).ok());
  const auto file = NpyFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_THAT((*file)->shape(), ElementsAre(3, 4, 5));
  EXPECT_EQ((*file)->ReadAll<float>().value(), values);
  EXPECT_FALSE((*file)->ReadAll<double>().ok());
  EXPECT_EQ(ReadBytes(path).size(), 128 + 60 * 4);  // 64-byte aligned, as NumPy's own.
}

TEST(Npy, ReadsFromThirtyTwoBitOffsetsOn) {
  // 6 GiB that the disk does not hold: the reads must not wrap at 2^32.
  const std::string path = TempPath("sparse");
  const int64_t elements = int64_t{6} << 30;
  const std::string head =
      NpyBytes(1, absl::StrCat("{'descr': '|u1', 'fortran_order': False, 'shape': (", elements, ",), }"), "");
  WriteBytes(path, head);
  ASSERT_EQ(truncate(path.c_str(), static_cast<off_t>(head.size()) + elements), 0);
  {
    std::fstream stream(path, std::ios::in | std::ios::out | std::ios::binary);
    stream.seekp(static_cast<std::streamoff>(head.size()) + elements - 2);
    stream.put('\x2a');
  }
  const auto file = NpyFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  uint8_t last[2] = {};
  ASSERT_TRUE((*file)->Read(elements - 2, 2, last).ok());
  EXPECT_THAT(last, ElementsAre(0x2a, 0));
}

TEST(Npy, WhatCannotBeReadIsNamedWithWhatToDo) {
  const auto dictionary = [](const std::string& descr, const std::string& order, const std::string& shape) {
    return absl::StrCat("{'descr': ", descr, ", 'fortran_order': ", order, ", 'shape': ", shape, ", }");
  };
  EXPECT_THAT(MessageOf(NpyBytes(1, dictionary("'<f4'", "True", "(1, 1)"), "1234")),
              AllOf(HasSubstr("x.npy: found Fortran order"), HasSubstr("ascontiguousarray")));
  EXPECT_THAT(MessageOf(NpyBytes(1, dictionary("'>f4'", "False", "(1,)"), "1234")),
              HasSubstr("found big-endian float32, wanted little-endian"));
  EXPECT_THAT(MessageOf(NpyBytes(1, dictionary("'|O'", "False", "(1,)"), "1234")),
              HasSubstr("found Python objects"));
  EXPECT_THAT(MessageOf(NpyBytes(1, dictionary("'<U4'", "False", "(1,)"), "1234")),
              HasSubstr("found strings"));
  EXPECT_THAT(MessageOf(NpyBytes(1, dictionary("'|V2'", "False", "(1,)"), "12")), HasSubstr("bfloat16"));
  EXPECT_THAT(MessageOf(NpyBytes(1, dictionary("'<c8'", "False", "(1,)"), "12")), HasSubstr("'<c8'"));
  EXPECT_THAT(MessageOf(NpyBytes(1, dictionary("[('a', '<f4')]", "False", "(1,)"), "1234")),
              HasSubstr("found records with named fields"));
  EXPECT_THAT(MessageOf(NpyBytes(4, dictionary("'<f4'", "False", "(1,)"), "1234")),
              HasSubstr("found .npy version 4, wanted 1, 2 or 3"));
  EXPECT_THAT(MessageOf("PK\x03\x04 not numpy at all"), HasSubstr("not an .npy file"));
  EXPECT_THAT(MessageOf(""), HasSubstr("not an .npy file"));
}

TEST(Npy, TheFileMustBeExactlyAsLongAsItsHeaderSays) {
  const std::string dictionary = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";
  EXPECT_THAT(MessageOf(NpyBytes(1, dictionary, std::string(23, 'x'))),
              HasSubstr("truncated: found 23 bytes of elements, wanted 24 (float32 (2, 3))"));
  EXPECT_THAT(MessageOf(NpyBytes(1, dictionary, std::string(25, 'x'))),
              HasSubstr("too long: found 25 bytes of elements, wanted 24"));
  const std::string whole = NpyBytes(2, dictionary, std::string(24, 'x'));
  ASSERT_TRUE(Parse(whole).ok());
  for (size_t size = 0; size < whole.size(); ++size) EXPECT_FALSE(Parse(whole.substr(0, size)).ok()) << size;
}

TEST(Npy, AbsurdHeadersAreRefused) {
  const auto with_shape = [](const std::string& shape) {
    return NpyBytes(1, absl::StrCat("{'descr': '<f4', 'fortran_order': False, 'shape': ", shape, ", }"), "");
  };
  EXPECT_THAT(MessageOf(with_shape("(4611686018427387904, 4)")), HasSubstr("more than 2^63 bytes"));
  EXPECT_THAT(MessageOf(with_shape("(0, 4611686018427387904, 4)")), HasSubstr("more than 2^63 bytes"));
  EXPECT_THAT(MessageOf(with_shape("(4611686018427387904, 4, 0)")), HasSubstr("more than 2^63 bytes"));
  EXPECT_THAT(MessageOf(with_shape("(99999999999999999999,)")), HasSubstr("beyond 64 bits"));
  EXPECT_THAT(MessageOf(with_shape("(-1,)")), HasSubstr("header is broken"));
  EXPECT_THAT(MessageOf(with_shape("(1 2)")), HasSubstr("header is broken"));
  std::string many = "(";
  for (int i = 0; i < 33; ++i) many += "1,";
  EXPECT_THAT(MessageOf(with_shape(many + ")")), HasSubstr("more than 32 axes"));
  EXPECT_THAT(MessageOf(NpyBytes(1, "{'descr': '<f4', 'fortran_order': False}", "")),
              HasSubstr("no 'descr'"));
  EXPECT_THAT(MessageOf(NpyBytes(1, "{'descr': '<f4', 'descr': '<f4'}", "")), HasSubstr("a key twice"));
  EXPECT_THAT(MessageOf(NpyBytes(1, "{'x': 1}", "")), HasSubstr("an unknown key"));
  EXPECT_THAT(MessageOf(NpyBytes(1, "{'descr': '<f4", "")), HasSubstr("header is broken"));
  EXPECT_THAT(MessageOf(std::string("\x93NUMPY\x02\x00\xff\xff\xff\xff", 12)),
              HasSubstr("header of 4294967295 bytes"));
  EXPECT_THAT(MessageOf(std::string("\x93NUMPY\x01\x00\xff\x0f", 10) + "{"),
              HasSubstr("truncated inside its header"));
}

TEST(Npy, MissingFilesAndFoldersAreNamed) {
  const auto missing = NpyFile::Open("/nonexistent/a.npy");
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.status().message()), HasSubstr("/nonexistent/a.npy: cannot open"));
  EXPECT_EQ(NpyFile::Open(::testing::TempDir()).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Npy, APipeIsRefusedWithoutWaitingForItsWriter) {
  const std::string path = TempPath("pipe.npy");
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  EXPECT_THAT(std::string(NpyFile::Open(path).status().message()), HasSubstr("no regular file"));
  EXPECT_THAT(std::string(NpyFile::Open("/dev/zero").status().message()), HasSubstr("no regular file"));
}

TEST(Npy, ExpectNamesFoundAndWanted) {
  const std::string path = TempPath("expect");
  ASSERT_TRUE(WriteNpy<float>(path, {2, 1}, std::vector<float>{1, 2}).ok());
  const auto file = NpyFile::Open(path);
  ASSERT_TRUE(file.ok());
  EXPECT_TRUE((*file)->Expect({NpyType::kF16, NpyType::kF32}, {-1, 1}, "").ok());
  EXPECT_THAT(std::string((*file)->Expect({NpyType::kF64}, {2, 1}, "").message()),
              HasSubstr("found float32, wanted float64"));
  EXPECT_THAT(std::string((*file)->Expect({NpyType::kF32}, {-1, 3}, "[tokens, dim]").message()),
              HasSubstr("found shape (2, 1), wanted (any, 3) [tokens, dim]"));
  EXPECT_FALSE((*file)->Expect({NpyType::kF32}, {2, 1, 1}, "").ok());
}

TEST(Npy, AFileThatShrinksWhileItIsReadIsAnError) {
  const std::string path = TempPath("shrinks");
  ASSERT_TRUE(WriteNpy<float>(path, {100}, std::vector<float>(100)).ok());
  const auto file = NpyFile::Open(path);
  ASSERT_TRUE(file.ok());
  ASSERT_EQ(truncate(path.c_str(), 300), 0);
  EXPECT_EQ((*file)->ReadAll<float>().status().code(), absl::StatusCode::kDataLoss);
}

TEST(NpyWriter, AnUnfinishedFileLeavesTheOldOneAndNothingElse) {
  const std::string path = TempPath("unfinished");
  WriteBytes(path, "old");
  {
    auto writer = NpyWriter::Create(path, NpyType::kF32, {4});
    ASSERT_TRUE(writer.ok()) << writer.status();
    ASSERT_TRUE((*writer)->Append<float>(std::vector<float>{1, 2}).ok());
    EXPECT_EQ(ReadBytes(path), "old");
  }
  EXPECT_EQ(ReadBytes(path), "old");
  EXPECT_NE(access(absl::StrCat(path, ".", getpid(), ".tmp").c_str(), F_OK), 0);
}

TEST(NpyWriter, PiecesAndOneWriteGiveTheSameFile) {
  const std::vector<int64_t> values = {1, -2, 3, int64_t{1} << 40};
  ASSERT_TRUE(WriteNpy<int64_t>(TempPath("whole"), {4}, values).ok());
  auto writer = NpyWriter::Create(TempPath("pieces"), NpyType::kI64, {4});
  ASSERT_TRUE(writer.ok());
  for (size_t i = 0; i < 4; ++i) {
    ASSERT_TRUE((*writer)->Append(absl::MakeConstSpan(values).subspan(i, 1)).ok());
  }
  ASSERT_TRUE((*writer)->Finish().ok());
  EXPECT_EQ(ReadBytes(TempPath("whole")), ReadBytes(TempPath("pieces")));
  EXPECT_EQ(NpyFile::Open(TempPath("whole")).value()->ReadAll<int64_t>().value(), values);
}

TEST(NpyWriter, AFolderOrADeviceIsNotReplaced) {
  EXPECT_EQ(NpyWriter::Create(::testing::TempDir(), NpyType::kF32, {1}).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(NpyWriter::Create("/dev/null", NpyType::kF32, {1}).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(NpyWriter::Create("/nonexistent/x.npy", NpyType::kF32, {1}).status().code(),
            absl::StatusCode::kNotFound);
}

absl::StatusOr<std::vector<int64_t>> RowList(const std::string& descr, int size, const std::string& data,
                                             int64_t rows) {
  const std::string path = TempPath("rows");
  WriteBytes(
      path,
      NpyBytes(1, absl::StrCat("{'descr': '", descr, "', 'fortran_order': False, 'shape': (", size, ",)}"),
               data));
  return ReadRowList(path, rows);
}

TEST(RowList, TakesAnyIntegerTypeAndMasks) {
  EXPECT_THAT(RowList("|i1", 3, "\x05\x02\x05", 6).value(), ElementsAre(5, 2, 5));
  EXPECT_THAT(RowList("<u2", 1, std::string("\x01\x01", 2), 300).value(), ElementsAre(257));
  EXPECT_THAT(RowList("<u8", 1, std::string("\x07\0\0\0\0\0\0\0", 8), 8).value(), ElementsAre(7));
  EXPECT_THAT(RowList("|b1", 4, std::string("\1\0\0\1", 4), 4).value(), ElementsAre(0, 3));
  EXPECT_TRUE(RowList("<i8", 0, "", 0).value().empty());
}

TEST(RowList, RowsOutsideTheTableAreNamed) {
  const auto high = RowList("|i1", 2, "\x01\x06", 6);
  EXPECT_EQ(high.status().code(), absl::StatusCode::kOutOfRange);
  EXPECT_THAT(std::string(high.status().message()),
              HasSubstr("found row 6 at index 1, wanted rows from 0 to below 6"));
  EXPECT_THAT(std::string(RowList("|i1", 1, "\xff", 6).status().message()), HasSubstr("found row -1"));
  EXPECT_EQ(RowList("<u8", 1, "\xff\xff\xff\xff\xff\xff\xff\xff", 6).status().code(),
            absl::StatusCode::kOutOfRange);
}

TEST(RowList, OtherArraysAreRefused) {
  EXPECT_THAT(std::string(RowList("<f4", 1, "1234", 6).status().message()),
              HasSubstr("found float32, wanted row numbers"));
  EXPECT_THAT(std::string(RowList("|b1", 2, "12", 6).status().message()),
              HasSubstr("found 2 booleans, wanted one for each of 6"));
}

}  // namespace
}  // namespace eduba
