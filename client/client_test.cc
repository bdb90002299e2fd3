#include "client/client.h"

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/pages.h"
#include "client/pieces.h"
#include "eduba/v1/eduba.grpc.pb.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rpc/limits.h"
#include "rpc/server.h"
#include "rpc/spec.h"
#include "rpc/status.h"

namespace eduba {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

v1::SessionSpec SmallSpec(DType dtype = DType::kF32) {
  v1::SessionSpec spec;
  spec.set_layers(2);
  spec.set_query_heads(4);
  spec.set_kv_heads(2);
  spec.set_head_dim(8);
  spec.set_value_dim(3);
  spec.set_dtype(DTypeToProto(dtype));
  return *CompleteSpec(spec);
}

v1::Session SmallSession(DType dtype = DType::kF32) {
  v1::Session session;
  session.set_name("s");
  *session.mutable_spec() = SmallSpec(dtype);
  return session;
}

// Every element says where it comes from, exactly.
float KeyAt(int layer, int64_t row, int64_t i) { return static_cast<float>(layer * 1000000 + row * 16 + i); }
float ValueAt(int layer, int64_t row, int64_t i) { return -KeyAt(layer, row, i); }

class CountingRows : public RowSource {
 public:
  explicit CountingRows(const v1::SessionSpec& spec) : spec_(spec) {}

  DType dtype() const override { return DType::kF32; }
  absl::Status Read(int layer, int64_t first, int64_t count, void* keys, void* values) const override {
    Fill(layer, first, count, int64_t{spec_.kv_heads()} * spec_.head_dim(), KeyAt, static_cast<float*>(keys));
    Fill(layer, first, count, int64_t{spec_.kv_heads()} * spec_.value_dim(), ValueAt,
         static_cast<float*>(values));
    return first <= fail_at && fail_at < first + count ? absl::DataLossError("the file became shorter")
                                                       : absl::OkStatus();
  }

  int64_t fail_at = -1;

 private:
  static void Fill(int layer, int64_t first, int64_t count, int64_t elements,
                   float (*at)(int, int64_t, int64_t), float* out) {
    for (int64_t row = first; row < first + count; ++row) {
      for (int64_t i = 0; i < elements; ++i) *out++ = at(layer, row, i);
    }
  }

  const v1::SessionSpec& spec_;
};

// --- pieces ---

TEST(WireType, IsTheSmallerOfTheTwo) {
  EXPECT_EQ(WireType(DType::kF32, SmallSpec(DType::kF32)), DType::kF32);
  EXPECT_EQ(WireType(DType::kF32, SmallSpec(DType::kBf16)), DType::kBf16);
  EXPECT_EQ(WireType(DType::kF32, SmallSpec(DType::kF16)), DType::kF16);
  EXPECT_EQ(WireType(DType::kF16, SmallSpec(DType::kF32)), DType::kF16);
  // Rounding f16 to bf16 saves nothing, so it is left to the server.
  EXPECT_EQ(WireType(DType::kF16, SmallSpec(DType::kBf16)), DType::kF16);
}

TEST(Pieces, TileTheRangesOfEveryLayer) {
  EXPECT_THAT(CutIntoPieces({{10, 15}, {20, 22}}, 2, 3),
              ElementsAre(Piece{0, 10, 3}, Piece{0, 13, 2}, Piece{0, 20, 2}, Piece{1, 10, 3}, Piece{1, 13, 2},
                          Piece{1, 20, 2}));
}

TEST(Pieces, OfTheLargestRowFitIntoOneMessage) {
  v1::SessionSpec spec = SmallSpec();
  spec.set_kv_heads(95);
  spec.set_head_dim(1024);
  spec.set_value_dim(1024);
  EXPECT_EQ(PieceRows(spec, DType::kF32), 1);
}

TEST(PieceReader, RoundsAsTheServerWould) {
  const v1::SessionSpec spec = SmallSpec(DType::kBf16);
  const CountingRows rows(spec);
  PieceReader reader(spec, rows, /*at=*/100);
  v1::UploadRequest request;
  ASSERT_TRUE(reader.Read({1, 103, 2}, &request).ok());
  EXPECT_EQ(request.dtype(), v1::DTYPE_BF16);
  ASSERT_EQ(request.keys().size(), 2 * 2 * 8 * 2);
  ASSERT_EQ(request.values().size(), 2 * 2 * 3 * 2);
  EXPECT_EQ(LoadElement(request.keys().data(), DType::kBf16, 17), F32FromBf16(Bf16FromF32(KeyAt(1, 4, 1))));
}

v1::AppendPlan TwoWorkerPlan() {
  v1::AppendPlan plan;
  plan.set_append_id(77);
  plan.set_at(100);
  plan.set_count(1000);
  plan.set_replicate_below(150);
  plan.add_workers("a:1");
  plan.add_workers("b:2");
  const auto add = [&](int64_t first, int64_t count, int worker) {
    v1::Extent* extent = plan.add_extents();
    extent->set_first_position(first);
    extent->set_count(count);
    extent->set_worker(worker);
  };
  add(100, 28, 0);
  add(128, 500, 1);
  add(628, 472, 0);
  return plan;
}

TEST(Plan, SendsSinksToEveryWorkerAndTheRestToItsOwner) {
  const auto ranges = RangesByWorker(TwoWorkerPlan());
  ASSERT_TRUE(ranges.ok()) << ranges.status();
  EXPECT_THAT((*ranges)[0],
              ElementsAre(PositionRange{100, 128}, PositionRange{128, 150}, PositionRange{628, 1100}));
  EXPECT_THAT((*ranges)[1], ElementsAre(PositionRange{100, 128}, PositionRange{128, 628}));
}

TEST(Plan, ThatDoesNotTileTheAppendIsRefused) {
  v1::AppendPlan gap = TwoWorkerPlan();
  gap.mutable_extents(1)->set_count(499);
  EXPECT_EQ(RangesByWorker(gap).status().code(), absl::StatusCode::kInternal);
  v1::AppendPlan shorter = TwoWorkerPlan();
  shorter.mutable_extents()->RemoveLast();
  EXPECT_EQ(RangesByWorker(shorter).status().code(), absl::StatusCode::kInternal);
  v1::AppendPlan nobody = TwoWorkerPlan();
  nobody.mutable_extents(0)->set_worker(2);
  EXPECT_EQ(RangesByWorker(nobody).status().code(), absl::StatusCode::kInternal);
}

// --- against a server that keeps what it gets ---

// Orders what the test and the handlers do to the fakes. gRPC does that too, but in a library that
// ThreadSanitizer does not see into.
void Handover() {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
}
struct HandlerScope {
  HandlerScope() { Handover(); }
  ~HandlerScope() { Handover(); }
};

class FakePages : public v1::Pages::Service {
 public:
  grpc::Status Upload(grpc::ServerContext* /*context*/, grpc::ServerReader<v1::UploadRequest>* reader,
                      v1::UploadResponse* response) override {
    const HandlerScope scope;
    v1::UploadRequest request;
    int64_t positions = 0;
    while (reader->Read(&request)) {
      if (request.ByteSizeLong() > kMessageBytesMax) return {grpc::StatusCode::INTERNAL, "too large"};
      const std::lock_guard lock(mutex);
      append_id = request.append_id();
      positions += request.count();
      const int64_t key_bytes = static_cast<int64_t>(request.keys().size()) / request.count();
      const int64_t value_bytes = static_cast<int64_t>(request.values().size()) / request.count();
      for (int row = 0; row < request.count(); ++row) {
        const bool fresh =
            rows.emplace(std::make_pair(request.layer(), request.first_position() + row),
                         std::make_pair(request.keys().substr(row * key_bytes, key_bytes),
                                        request.values().substr(row * value_bytes, value_bytes)))
                .second;
        if (!fresh) return {grpc::StatusCode::INTERNAL, "a position was sent twice"};
      }
      if (refuse) return {grpc::StatusCode::INVALID_ARGUMENT, "NaN in keys of position 7"};
    }
    response->set_positions(positions - lose);
    return grpc::Status::OK;
  }

  bool refuse = false;
  int64_t lose = 0;
  std::mutex mutex;
  uint64_t append_id = 0;
  std::map<std::pair<int, int64_t>, std::pair<std::string, std::string>> rows;  // By layer and position.
};

class FakeEduba : public v1::Eduba::Service {
 public:
  grpc::Status PlanAppend(grpc::ServerContext*, const v1::PlanAppendRequest* /*request*/,
                          v1::AppendPlan* result) override {
    const HandlerScope scope;
    *result = plan;
    return grpc::Status::OK;
  }
  grpc::Status CommitAppend(grpc::ServerContext*, const v1::CommitAppendRequest* /*request*/,
                            v1::AppendReceipt* receipt) override {
    const HandlerScope scope;
    ++commits;
    receipt->set_length(plan.at() + plan.count());
    return commit_status;
  }
  grpc::Status AbortAppend(grpc::ServerContext*, const v1::AbortAppendRequest* /*request*/,
                           v1::AbortAppendResponse*) override {
    const HandlerScope scope;
    ++aborts;
    return grpc::Status::OK;
  }
  grpc::Status GetSession(grpc::ServerContext* /*context*/, const v1::GetSessionRequest* /*request*/,
                          v1::Session* session) override {
    const HandlerScope scope;
    if (hang) {
      canceled.WaitForNotification();
      return grpc::Status::CANCELLED;
    }
    *session = SmallSession();
    session->set_length(40);
    return grpc::Status::OK;
  }
  grpc::Status ListSessions(grpc::ServerContext*, const v1::ListSessionsRequest* request,
                            v1::ListSessionsResponse* response) override {
    const HandlerScope scope;
    // Three pages of one session each.
    const std::string page = request->page_token().empty() ? "0" : request->page_token();
    response->add_sessions()->set_name(page);
    if (page != "2") response->set_next_page_token(page == "0" ? "1" : "2");
    return grpc::Status::OK;
  }
  grpc::Status Append(grpc::ServerContext*, grpc::ServerReader<v1::AppendRequest>* reader,
                      v1::AppendReceipt* /*receipt*/) override {
    const HandlerScope scope;
    v1::AppendRequest request;
    while (reader->Read(&request)) thin.push_back(request);
    return grpc::Status::OK;
  }
  // Output c of head h is query element c plus the position; pieces of at most 100 rows.
  grpc::Status Attend(grpc::ServerContext*,
                      grpc::ServerReaderWriter<v1::AttendResponse, v1::AttendRequest>* stream) override {
    const HandlerScope scope;
    v1::AttendRequest request;
    stream->Read(&request);
    header = request.header();
    const v1::SessionSpec spec = SmallSpec();
    int64_t rows = 0;
    while (stream->Read(&request)) {
      std::vector<float> queries(request.rows().queries().size() / sizeof(float));
      std::memcpy(queries.data(), request.rows().queries().data(), request.rows().queries().size());
      const auto count = static_cast<int64_t>(queries.size()) / (spec.query_heads() * spec.head_dim());
      for (int64_t first = 0; first < count; first += 100) {
        v1::AttendResponse response;
        const int64_t part = std::min<int64_t>(100, count - first);
        response.mutable_rows()->set_first_row(rows + first + skip_rows);
        response.mutable_rows()->set_count(static_cast<int32_t>(part));
        std::vector<float> outputs;
        for (int64_t row_head = first * spec.query_heads(); row_head < (first + part) * spec.query_heads();
             ++row_head) {
          const int64_t row = row_head / spec.query_heads();
          for (int c = 0; c < spec.value_dim(); ++c) {
            outputs.push_back(queries[row_head * spec.head_dim() + c] +
                              (header.positions() ? static_cast<float>(request.rows().positions(row)) : 0));
          }
        }
        response.mutable_rows()->set_outputs(outputs.data(), outputs.size() * sizeof(float));
        const std::string zeros(part * spec.query_heads() * sizeof(float), '\0');
        response.mutable_rows()->set_lse(zeros);
        response.mutable_rows()->set_sink_mass(zeros);
        if (!lose_rows) stream->Write(response);
      }
      rows += count;
      if (attend_status.error_code() != grpc::StatusCode::OK) return attend_status;
    }
    if (summarize) {
      v1::AttendResponse response;
      response.mutable_summary()->set_rows(rows + summary_off);
      stream->Write(response);
    }
    return grpc::Status::OK;
  }

  grpc::Status AppendTokens(grpc::ServerContext*, grpc::ServerReader<v1::AppendTokensRequest>* reader,
                            v1::AppendTokensReceipt* receipt) override {
    const HandlerScope scope;
    v1::AppendTokensRequest request;
    while (reader->Read(&request)) {
      tokens.push_back(request);
      receipt->set_count(receipt->count() + static_cast<int64_t>(request.ids().size()) / 4);
      if (attend_status.error_code() != grpc::StatusCode::OK) return attend_status;
    }
    return grpc::Status::OK;
  }
  // Three tokens, then a summary.
  grpc::Status Generate(grpc::ServerContext* context, const v1::GenerateRequest* request,
                        grpc::ServerWriter<v1::GenerateResponse>* writer) override {
    const HandlerScope scope;
    generate = *request;
    deadline = absl::FromChrono(context->deadline());
    v1::GenerateResponse response;
    for (int i = 0; i < 3; ++i) {
      response.mutable_tokens()->set_text(std::string(1, static_cast<char>('a' + i)));
      writer->Write(response);
    }
    if (hang) {
      while (!context->IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
      canceled.Notify();
    }
    response.mutable_summary()->set_tokens(3);
    if (summarize) writer->Write(response);
    return attend_status;
  }
  grpc::Status Score(grpc::ServerContext*, const v1::ScoreRequest* request,
                     v1::ScoreResponse* response) override {
    const HandlerScope scope;
    response->set_log_probs(std::string(request->ids().size() + summary_off, '\0'));
    if (request->sink_mass() && summarize) response->set_sink_mass(std::string(8, '\0'));
    return grpc::Status::OK;
  }
  // A message for each range, of two numbers: twice the range's and one more.
  grpc::Status Embed(grpc::ServerContext*, const v1::EmbedRequest* request,
                     grpc::ServerWriter<v1::EmbedResponse>* writer) override {
    const HandlerScope scope;
    const auto ranges = static_cast<int64_t>(request->ranges().size()) / 16;
    for (int64_t i = 0; i < ranges + summary_off; ++i) {
      const float vector[] = {static_cast<float>(2 * i), static_cast<float>(2 * i + 1)};
      v1::EmbedResponse response;
      response.set_first_range(i + skip_rows);
      response.set_count(1);
      response.set_vectors(vector, sizeof(vector));
      writer->Write(response);
    }
    return attend_status;
  }

  v1::AppendPlan plan = TwoWorkerPlan();
  grpc::Status commit_status;
  grpc::Status attend_status;
  int64_t skip_rows = 0;
  bool lose_rows = false;
  bool summarize = true;
  int64_t summary_off = 0;
  bool hang = false;
  absl::Notification canceled;
  v1::AttendRequest::Header header;
  std::vector<v1::AppendRequest> thin;
  std::vector<v1::AppendTokensRequest> tokens;
  v1::GenerateRequest generate;
  absl::Time deadline;  // The deadline of the generation's call.
  std::atomic<int> commits = 0;
  std::atomic<int> aborts = 0;
};

class ClientTest : public testing::Test {
 protected:
  void SetUp() override {
    for (int i = 0; i < 2; ++i) {
      servers_.push_back(*RpcServer::Start("127.0.0.1:0", {&pages_[i]}));
      eduba_.plan.set_workers(i, servers_.back()->address());
    }
    servers_.push_back(*RpcServer::Start("127.0.0.1:0", {&eduba_}));
    client_ = std::make_unique<Client>(ClientOptions{servers_.back()->address(), absl::Seconds(60)});
  }

  std::string KeyBytes(int layer, int64_t row) const {
    std::vector<float> elements(16);
    for (int64_t i = 0; i < 16; ++i) elements[i] = KeyAt(layer, row, i);
    return {reinterpret_cast<const char*>(elements.data()), elements.size() * sizeof(float)};
  }

  absl::StatusOr<v1::AttendSummary> Ask(int64_t rows, bool positions = false) {
    AttendOptions options;
    options.positions = positions;
    return client().Attend(
        session_, rows,
        [](int64_t first, absl::Span<float> queries, absl::Span<int64_t> positions) {
          for (size_t i = 0; i < queries.size(); ++i) queries[i] = static_cast<float>(first * 32 + i);
          for (size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<int64_t>(7 * (first + i));
          return absl::OkStatus();
        },
        [this](const AnsweredRows& answer) {
          outputs_.insert(outputs_.end(), answer.outputs.begin(), answer.outputs.end());
          return sink_status_;
        },
        options);
  }

  // Ask for these anew for every use: see Handover.
  Client& client() { return Handover(), *client_; }
  FakeEduba& eduba() { return Handover(), eduba_; }
  FakePages& pages(int worker) { return Handover(), pages_[worker]; }

  FakePages pages_[2];
  FakeEduba eduba_;
  std::vector<std::unique_ptr<RpcServer>> servers_;
  std::unique_ptr<Client> client_;
  const v1::Session session_ = SmallSession();
  const CountingRows rows_{session_.spec()};
  std::vector<float> outputs_;
  absl::Status sink_status_;
};

TEST_F(ClientTest, AppendGivesEveryWorkerItsRowsOnceAndCommits) {
  int64_t done = 0;
  int64_t total = 0;
  const auto receipt = client().Append(session_, 1000, rows_, {std::nullopt, [&](int64_t d, int64_t t) {
                                                                 done = d;
                                                                 total = t;
                                                               }});
  ASSERT_TRUE(receipt.ok()) << receipt.status();
  EXPECT_EQ(receipt->length(), 1100);
  EXPECT_EQ(eduba().commits, 1);
  EXPECT_EQ(eduba().aborts, 0);
  EXPECT_EQ(pages(0).append_id, 77);
  // Two layers; worker 0 owns 500 positions and gets 22 more for the sinks, worker 1 owns 500 and gets 28.
  ASSERT_EQ(pages(0).rows.size(), 2 * 522);
  ASSERT_EQ(pages(1).rows.size(), 2 * 528);
  EXPECT_EQ(done, 2 * (522 + 528) * 2 * (8 + 3) * 4);
  EXPECT_EQ(done, total);
  for (int worker = 0; worker < 2; ++worker) {
    for (const auto& [where, row] : pages(worker).rows) {
      ASSERT_EQ(row.first, KeyBytes(where.first, where.second - 100)) << where.first << " " << where.second;
    }
  }
}

TEST_F(ClientTest, AppendReportsTheWorkersErrorAndGivesTheAppendUp) {
  pages(1).refuse = true;
  const auto receipt = client().Append(session_, 1000, rows_, {});
  EXPECT_EQ(receipt.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(std::string(receipt.status().message()), "NaN in keys of position 7"))
      << receipt.status();
  EXPECT_EQ(eduba().commits, 0);
  EXPECT_EQ(eduba().aborts, 1);
}

TEST_F(ClientTest, AppendReportsTheSourcesErrorAndGivesTheAppendUp) {
  CountingRows broken(session_.spec());
  broken.fail_at = 900;
  EXPECT_EQ(client().Append(session_, 1000, broken, {}).status(),
            absl::DataLossError("the file became shorter"));
  EXPECT_EQ(eduba().commits, 0);
  EXPECT_EQ(eduba().aborts, 1);
}

TEST_F(ClientTest, AppendDoesNotCommitWhatAWorkerDidNotCount) {
  pages(0).lose = 1;
  EXPECT_EQ(client().Append(session_, 1000, rows_, {}).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(eduba().commits, 0);
}

TEST_F(ClientTest, AppendToAWorkerThatIsGoneIsUnavailable) {
  servers_[0]->Shutdown(absl::ZeroDuration());
  const auto receipt = client().Append(session_, 1000, rows_, {});
  EXPECT_EQ(receipt.status().code(), absl::StatusCode::kUnavailable) << receipt.status();
  EXPECT_EQ(eduba().aborts, 1);
}

TEST_F(ClientTest, ACommitWithoutAnAnswerSaysHowToFindOut) {
  for (const grpc::StatusCode code : {grpc::StatusCode::UNAVAILABLE, grpc::StatusCode::DEADLINE_EXCEEDED}) {
    for (FakePages& worker : pages_) worker.rows.clear();
    eduba().commit_status = {code, "worker 1 left"};
    const auto receipt = client().Append(session_, 1000, rows_, {});
    EXPECT_EQ(static_cast<int>(receipt.status().code()), code);
    EXPECT_TRUE(absl::StrContains(std::string(receipt.status().message()), "position 100"))
        << receipt.status();
  }
}

TEST_F(ClientTest, AProxiedAppendStartsAtTheEndAndSendsEveryLayer) {
  ASSERT_TRUE(client().AppendProxied(session_, 5, rows_, {}).ok());
  ASSERT_EQ(eduba().thin.size(), 3);
  EXPECT_EQ(eduba().thin[0].plan().at(), 40);
  EXPECT_EQ(eduba().thin[0].plan().count(), 5);
  EXPECT_EQ(eduba().thin[2].piece().layer(), 1);
  EXPECT_EQ(eduba().thin[2].piece().first_position(), 40);
  EXPECT_EQ(eduba().thin[2].piece().keys().substr(0, 64), KeyBytes(1, 0));
}

TEST_F(ClientTest, AttendDeliversEveryRowOnceInOrder) {
  const int64_t rows = 20000;  // 2.5 MB of queries: several messages.
  const auto summary = Ask(rows, /*positions=*/true);
  ASSERT_TRUE(summary.ok()) << summary.status();
  EXPECT_EQ(summary->rows(), rows);
  EXPECT_TRUE(eduba().header.positions());
  ASSERT_EQ(outputs_.size(), rows * 4 * 3);
  for (int64_t i = 0; i < rows * 12; ++i) {
    const int64_t row_head = i / 3;
    const int64_t row = row_head / 4;
    ASSERT_EQ(outputs_[i], static_cast<float>(row_head * 8 + i % 3) + static_cast<float>(7 * row)) << i;
  }
}

TEST_F(ClientTest, AttendEndsWithTheSinksError) {
  sink_status_ = absl::ResourceExhaustedError("disk full");
  EXPECT_EQ(Ask(20000).status(), sink_status_);
}

TEST_F(ClientTest, AttendEndsWithTheServersErrorWhileRowsAreStillSent) {
  eduba().attend_status = {grpc::StatusCode::UNAVAILABLE, "worker 1 left"};
  EXPECT_EQ(Ask(200000).status(), absl::UnavailableError("worker 1 left"));
}

TEST_F(ClientTest, AnAnswerWithAGapOrWithoutASummaryIsAnError) {
  eduba().summarize = false;
  EXPECT_EQ(Ask(10).status().code(), absl::StatusCode::kInternal);
  eduba().summarize = true;
  eduba().summary_off = -1;
  EXPECT_EQ(Ask(10).status().code(), absl::StatusCode::kInternal);
  eduba().summary_off = 0;
  eduba().lose_rows = true;
  EXPECT_EQ(Ask(10).status().code(), absl::StatusCode::kInternal);
  eduba().lose_rows = false;
  eduba().skip_rows = 1;
  outputs_.clear();
  EXPECT_EQ(Ask(10).status().code(), absl::StatusCode::kInternal);
  EXPECT_THAT(outputs_, IsEmpty());
}

TEST_F(ClientTest, TokensGoInPiecesOfWhichTheFirstSaysWhere) {
  std::vector<int32_t> ids(2 * kTokenIdsMax + 5);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
  int64_t done = 0;
  const auto receipt = client().AppendTokens("s", ids, {9, [&](int64_t sent, int64_t total) {
                                                          EXPECT_EQ(total, static_cast<int64_t>(ids.size()));
                                                          done = sent;
                                                        }});
  ASSERT_TRUE(receipt.ok()) << receipt.status();
  EXPECT_EQ(receipt->count(), static_cast<int64_t>(ids.size()));
  EXPECT_EQ(done, static_cast<int64_t>(ids.size()));
  std::string sent;
  ASSERT_EQ(eduba().tokens.size(), 3U);
  for (const v1::AppendTokensRequest& piece : eduba().tokens) {
    EXPECT_EQ(piece.session(), sent.empty() ? "s" : "");
    EXPECT_EQ(piece.has_at(), sent.empty());
    sent += piece.ids();
  }
  EXPECT_EQ(eduba().tokens[0].at(), 9);
  EXPECT_EQ(sent, std::string(reinterpret_cast<const char*>(ids.data()), ids.size() * 4));
  // It ends early with the server's error.
  eduba().attend_status = {grpc::StatusCode::RESOURCE_EXHAUSTED, "5 tokens of it are in the session"};
  EXPECT_EQ(client().AppendTokens("s", ids, {}).status(),
            absl::ResourceExhaustedError("5 tokens of it are in the session"));
}

TEST_F(ClientTest, AGenerationHasThisClientsTimeAndTheSummaryALittleMore) {
  v1::GenerateRequest request;
  std::string text;
  const auto sink = [&](const v1::GenerateResponse::Tokens& tokens) {
    text += tokens.text();
    return absl::OkStatus();
  };
  const absl::Time before = absl::Now();
  const auto summary = client().Generate(request, sink);
  ASSERT_TRUE(summary.ok()) << summary.status();
  EXPECT_EQ(summary->tokens(), 3);
  EXPECT_EQ(text, "abc");
  EXPECT_EQ(eduba().generate.time_limit_ms(), 60000);
  EXPECT_GT(eduba().deadline, before + absl::Seconds(60));
  request.set_time_limit_ms(3600000);
  EXPECT_TRUE(client().Generate(request, sink).ok());
  EXPECT_EQ(eduba().generate.time_limit_ms(), 3600000);
  EXPECT_GT(eduba().deadline, before + absl::Seconds(3600));
  Client patient({servers_.back()->address(), absl::InfiniteDuration()});
  Handover();
  request.set_time_limit_ms(0);
  EXPECT_TRUE(patient.Generate(request, sink).ok());
  EXPECT_GT(eduba().generate.time_limit_ms(), 3600000);
  Client hasty({servers_.back()->address(), absl::Microseconds(1)});
  Handover();
  EXPECT_TRUE(hasty.Generate(request, sink).ok());
  EXPECT_EQ(eduba().generate.time_limit_ms(), 1);
}

TEST_F(ClientTest, AGenerationEndsWithTheSinksErrorAndTheServerHearsOfIt) {
  eduba().hang = true;
  int calls = 0;
  const auto summary = client().Generate({}, [&](const v1::GenerateResponse::Tokens&) {
    return ++calls == 2 ? absl::ResourceExhaustedError("disk full") : absl::OkStatus();
  });
  EXPECT_EQ(summary.status(), absl::ResourceExhaustedError("disk full"));
  EXPECT_EQ(calls, 2);
  eduba().canceled.WaitForNotification();
}

TEST_F(ClientTest, AGenerationThatIsInterruptedIsAnError) {
  std::string text;
  const auto generate = [&] {
    text.clear();
    return client()
        .Generate({},
                  [&](const v1::GenerateResponse::Tokens& tokens) {
                    text += tokens.text();
                    return absl::OkStatus();
                  })
        .status();
  };
  eduba().summarize = false;
  EXPECT_EQ(generate().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(text, "abc");
  eduba().attend_status = {grpc::StatusCode::UNAVAILABLE, "worker 1 left"};
  EXPECT_EQ(generate(), absl::UnavailableError("worker 1 left"));
  EXPECT_EQ(text, "abc");
}

TEST_F(ClientTest, ScoresOfAnotherSizeThanTheTokensAreAnError) {
  const std::vector<int32_t> ids = {1, 2, 3};
  std::vector<float> mass;
  const auto scores = client().Score("s", ids, &mass);
  ASSERT_TRUE(scores.ok()) << scores.status();
  EXPECT_EQ(scores->size(), 3U);
  EXPECT_EQ(mass.size(), 2U);
  eduba().summarize = false;
  EXPECT_EQ(client().Score("s", ids, &mass).status().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(client().Score("s", ids).ok());
  eduba().summary_off = -4;
  EXPECT_EQ(client().Score("s", ids).status().code(), absl::StatusCode::kInternal);
}

TEST_F(ClientTest, EmbeddingsWithAGapAreAnError) {
  const std::vector<int64_t> ranges = {0, 5, 5, 9, 20, 21};
  const auto embed = [&] { return client().Embed("s", ranges, v1::POOL_MEAN); };
  const auto vectors = embed();
  ASSERT_TRUE(vectors.ok()) << vectors.status();
  EXPECT_THAT(*vectors, ElementsAre(0, 1, 2, 3, 4, 5));
  eduba().summary_off = -1;
  EXPECT_EQ(embed().status().code(), absl::StatusCode::kInternal);
  eduba().summary_off = 0;
  eduba().skip_rows = 1;
  EXPECT_EQ(embed().status().code(), absl::StatusCode::kInternal);
  eduba().attend_status = {grpc::StatusCode::UNAVAILABLE, "worker 1 left"};
  EXPECT_EQ(embed().status(), absl::UnavailableError("worker 1 left"));
}

TEST_F(ClientTest, ListsTheSessionsOfAllPages) {
  const auto sessions = client().ListSessions();
  ASSERT_TRUE(sessions.ok()) << sessions.status();
  ASSERT_EQ(sessions->size(), 3);
  EXPECT_EQ((*sessions)[2].name(), "2");
}

TEST_F(ClientTest, GivesUpAtItsTimeout) {
  eduba().hang = true;
  Client hasty({servers_.back()->address(), absl::Milliseconds(200)});
  Handover();
  EXPECT_EQ(hasty.GetSession("s").status().code(), absl::StatusCode::kDeadlineExceeded);
  eduba().canceled.Notify();
}

TEST_F(ClientTest, SaysThatNoServerAnswers) {
  const std::string address = servers_.back()->address();
  servers_.back()->Shutdown(absl::ZeroDuration());
  const absl::Status status = Client({address, absl::Seconds(30)}).GetSession("s").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(
      absl::StrContains(std::string(status.message()), absl::StrCat("no server answers at ", address)))
      << status;
}

}  // namespace
}  // namespace eduba
