// Any sequence of client requests, with any values, against the coordinator's decisions and two workers that
// answer without attention: nothing crashes, no invariant breaks (FakeCluster), and refused requests change
// nothing.
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "coordinator/attend_stream.h"
#include "coordinator/proxied_upload.h"
#include "coordinator/testing/fake_cluster.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

// Decisions out of the input; zeros at its end.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  bool empty() const { return left_ == 0; }
  uint8_t Byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }
  // Mostly small, sometimes at an edge, sometimes anything.
  int64_t Int() {
    const uint8_t kind = Byte();
    if (kind < 160) return kind % 80 - 8;
    if (kind < 200) return int64_t{Byte()} << (kind % 40);
    if (kind < 210) return std::numeric_limits<int64_t>::max() - Byte();
    if (kind < 220) return std::numeric_limits<int64_t>::min() + Byte();
    int64_t value = 0;
    for (int i = 0; i < 8; ++i) value = static_cast<int64_t>(static_cast<uint64_t>(value) << 8 | Byte());
    return value;
  }
  float Float() {
    const auto bits = static_cast<uint32_t>(Int());
    float value = 0;
    std::memcpy(&value, &bits, 4);
    return (bits & 1) != 0 ? value : 1.0f;
  }
  std::string Name() {
    const uint8_t kind = Byte();
    if (kind < 200) return absl::StrCat("s", kind % 3);
    std::string name;
    for (int i = kind % 20; i > 0; --i) name.push_back(static_cast<char>(Byte()));
    return name;
  }
  std::string Text(int64_t size) {
    std::string text(size, '\0');
    for (size_t i = 0; i < text.size() && left_ > 0; ++i) text[i] = static_cast<char>(Byte());
    return text;
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

v1::SessionSpec ModelSpec(Bytes& in) {
  v1::SessionSpec spec;
  v1::ModelSpec& model = *spec.mutable_model();
  if (in.Byte() % 2 == 0) return spec;
  model.set_policy(static_cast<v1::ModelPolicy>(in.Byte() % 5));
  model.set_positions(static_cast<v1::PositionMode>(in.Byte() % 5));
  model.set_window(in.Int());
  model.set_sink_tokens(in.Int());
  model.set_clamp(in.Int());
  if (in.Byte() % 4 == 0) spec.set_head_dim(2);
  return spec;
}

v1::Model TinyModel() {
  v1::Model model;
  model.set_hash(3);
  model.set_vocab_size(10);
  model.set_hidden_size(4);
  model.set_query_heads(2);
  model.set_kv_heads(1);
  model.set_head_dim(2);
  model.set_dtype(v1::DTYPE_F32);
  model.add_layer_windows(0);
  return model;
}

v1::SessionSpec Spec(Bytes& in) {
  v1::SessionSpec spec;
  spec.set_query_heads(2);
  spec.set_kv_heads(1);
  spec.set_head_dim(2);
  for (int changes = in.Byte() % 4; changes > 0; --changes) {
    const auto value = static_cast<int32_t>(in.Int());
    switch (in.Byte() % 12) {
      case 0:
        spec.set_layers(value);
        break;
      case 1:
        spec.set_query_heads(value);
        break;
      case 2:
        spec.set_kv_heads(value);
        break;
      case 3:
        spec.set_head_dim(value);
        break;
      case 4:
        spec.set_value_dim(value);
        break;
      case 5:
        spec.set_dtype(static_cast<v1::DType>(value));
        break;
      case 6:
        spec.set_sink_tokens(in.Int());
        break;
      case 7:
        spec.set_window(in.Int());
        break;
      case 8:
        spec.set_scale(in.Float());
        break;
      case 9:
        spec.set_softcap(in.Float());
        break;
      case 10:
        spec.set_stripe_pages(value);
        break;
      case 11:
        spec.add_sink_logits(in.Float());
        break;
    }
  }
  return spec;
}

class Target {
 public:
  explicit Target(Bytes in) : in_(in), cluster_(Options()) {
    const v1::Model model = TinyModel();
    cluster_.Join("a:1", 7, "", &model);
    cluster_.Join("b:1", 7, "", &model);
    cluster_.Settle();
    (void)Ask([&](ClusterState& state, RequestId id) {
      v1::CreateSessionRequest request;
      request.set_name("s0");
      *request.mutable_spec() = Spec(in_);
      state.CreateSession(id, request, 0, cluster_.now());
    });
  }

  void Run() {
    for (int step = 0; step < 60 && !in_.empty(); ++step) {
      Step(in_.Byte() % 14);
      for (const std::string& complaint : cluster_.complaints()) EDUBA_CHECK_EQ(complaint, std::string());
      // Bad requests never end the group.
      EDUBA_CHECK(cluster_.serving);
    }
  }

 private:
  static ClusterState::Options Options() {
    ClusterState::Options options;
    options.group_size = 2;
    return options;
  }
  template <typename Event>
  absl::StatusOr<Answer> Ask(const Event& event) {
    return cluster_.Get(event);
  }

  void Step(int kind) {
    const int64_t now = cluster_.now();
    switch (kind) {
      case 0: {
        v1::CreateSessionRequest request;
        request.set_name(in_.Name());
        *request.mutable_spec() = in_.Byte() % 2 == 0 ? Spec(in_) : ModelSpec(in_);
        (void)Ask([&](ClusterState& state, RequestId id) { state.CreateSession(id, request, 0, now); });
        break;
      }
      case 1: {
        v1::DeleteSessionRequest request;
        request.set_name(in_.Name());
        (void)Ask([&](ClusterState& state, RequestId id) { state.DeleteSession(id, request, now); });
        break;
      }
      case 2: {
        v1::ListSessionsRequest request;
        request.set_page_size(static_cast<int32_t>(in_.Int()));
        request.set_page_token(in_.Name());
        (void)Ask([&](ClusterState& state, RequestId id) { state.ListSessions(id, request); });
        break;
      }
      case 3:
      case 4: {
        v1::PlanAppendRequest request;
        request.set_session(in_.Name());
        if (in_.Byte() % 2 == 0) request.set_at(in_.Int());
        request.set_count(in_.Int());
        const auto plan = Ask([&](ClusterState& state, RequestId id) { state.PlanAppend(id, request, now); });
        if (!plan.ok()) break;
        plan_ = std::get<v1::AppendPlan>(*plan);
        EDUBA_CHECK(static_cast<int64_t>(plan_.ByteSizeLong()) <= kMessageBytesMax);
        Route(request.session());
        break;
      }
      case 5: {
        const uint64_t append = in_.Byte() % 8 == 0 ? static_cast<uint64_t>(in_.Int()) : plan_.append_id();
        const bool commit = in_.Byte() % 4 != 0;
        (void)Ask([&](ClusterState& state, RequestId id) {
          commit ? state.CommitAppend(id, append, now) : state.AbortAppend(id, append, now);
        });
        break;
      }
      case 6: {
        v1::AttendRequest::Header header;
        header.set_session(in_.Name());
        header.set_layer(in_.Byte() % 4 == 0 ? static_cast<int32_t>(in_.Int()) : 0);
        header.set_policy(static_cast<v1::Policy>(in_.Byte() % 4));
        header.set_positions(in_.Byte() % 2 == 0);
        call_ = cluster_.Ask([&](ClusterState& state, RequestId id) { state.StartAttend(id, header, now); });
        break;
      }
      case 7:
      case 8: {
        std::vector<int64_t> positions;
        for (int i = in_.Byte() % 4; i > 0; --i) positions.push_back(in_.Int());
        const int64_t rows = in_.Byte() % 4 == 0 ? in_.Byte() : static_cast<int64_t>(positions.size()) * 16;
        std::string queries = in_.Text(rows);
        v1::SessionSpec spec;
        spec.set_query_heads(2);
        spec.set_head_dim(2);
        (void)CheckFiniteQueries(queries, spec, 0);
        cluster_.state().SubmitRows(call_, std::move(queries), std::move(positions), now);
        cluster_.Collect();
        cluster_.Settle();
        break;
      }
      case 9:
        if (in_.Byte() % 2 == 0) {
          cluster_.state().FinishRows(call_, now);
          cluster_.Collect();
          cluster_.Settle();
        } else if (cluster_.requests.count(call_) > 0 && !cluster_.requests[call_].reply.has_value()) {
          cluster_.Cancel(call_);
        }
        break;
      default:
        ModelStep(kind);
        break;
    }
  }

  std::vector<int32_t> Ids() {
    std::vector<int32_t> ids(in_.Byte() % 6);
    for (int32_t& id : ids) id = static_cast<int32_t>(in_.Int());
    return ids;
  }

  // Calls on sessions of the model.
  void ModelStep(int kind) {
    const int64_t now = cluster_.now();
    const std::string name = in_.Name();
    (void)Ask([&](ClusterState& state, RequestId id) {
      if (kind == 10) {
        const auto at = in_.Byte() % 2 == 0 ? std::optional<int64_t>(in_.Int()) : std::nullopt;
        state.AppendTokens(id, name, at, Ids(), now);
      } else if (kind == 11) {
        v1::GenerateRequest request;
        request.set_session(name);
        request.set_max_tokens(in_.Int());
        request.set_time_limit_ms(in_.Int());
        for (const int32_t stop : Ids()) request.add_stop_ids(stop);
        if (in_.Byte() % 4 == 0) request.add_stop_strings(in_.Text(in_.Byte()));
        state.Generate(id, request, now);
      } else if (kind == 12) {
        v1::ScoreRequest request;
        request.set_session(name);
        request.set_ids(in_.Text(in_.Byte() % 16));
        state.Score(id, request, now);
      } else if (in_.Byte() % 2 == 0) {
        v1::EmbedRequest request;
        request.set_session(name);
        for (int i = in_.Byte() % 5; i > 0; --i) {
          const int64_t bound = in_.Int();
          request.mutable_ranges()->append(reinterpret_cast<const char*>(&bound), sizeof(bound));
        }
        request.set_pool(static_cast<v1::Pool>(in_.Byte() % 4));
        state.Embed(id, request, now);
      } else {
        v1::ForkSessionRequest request;
        request.set_session(name);
        request.set_name(in_.Name());
        state.ForkSession(id, request, 0, now);
      }
    });
  }

  // A piece with any numbers is refused or cut into parts that lie within it.
  void Route(const std::string& name) {
    v1::GetSessionRequest get;
    get.set_name(name);
    const auto session = Ask([&](ClusterState& state, RequestId id) { state.GetSession(id, get); });
    EDUBA_CHECK(session.ok());
    const v1::SessionSpec& spec = std::get<v1::Session>(*session).spec();
    v1::UploadRequest piece;
    piece.set_dtype(static_cast<v1::DType>(in_.Byte() % 5));
    piece.set_layer(in_.Byte() % 4 == 0 ? static_cast<int32_t>(in_.Int()) : 0);
    piece.set_first_position(in_.Byte() % 2 == 0 ? plan_.at() : in_.Int());
    piece.set_count(static_cast<int32_t>(in_.Int()));
    const int64_t element = piece.dtype() == v1::DTYPE_F32 ? 4 : 2;
    if (piece.count() > 0 && piece.count() < 4096 && PositionBytes(spec) < 256) {
      piece.set_keys(std::string(element * piece.count() * spec.kv_heads() * spec.head_dim(), 'k'));
      piece.set_values(std::string(element * piece.count() * spec.kv_heads() * spec.value_dim(), 'v'));
    }
    const auto routed = RoutePiece(spec, plan_, piece);
    if (!routed.ok()) return;
    int64_t positions = 0;
    for (const RoutedPiece& part : *routed) {
      EDUBA_CHECK(part.worker >= 0 && part.worker < plan_.workers_size());
      EDUBA_CHECK(part.piece.first_position() >= piece.first_position());
      EDUBA_CHECK(part.piece.first_position() + part.piece.count() <= piece.first_position() + piece.count());
      positions += part.piece.count();
    }
    EDUBA_CHECK(positions >= piece.count() && positions <= 2 * int64_t{piece.count()});
  }

  Bytes in_;
  FakeCluster cluster_;
  v1::AppendPlan plan_;
  RequestId call_ = 0;
};

}  // namespace
}  // namespace eduba

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  eduba::Target(eduba::Bytes(data, size)).Run();
  return 0;
}
