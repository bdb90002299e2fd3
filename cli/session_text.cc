#include "cli/session_text.h"

#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "base/dtype.h"
#include "cli/model_text.h"
#include "rpc/spec.h"

namespace eduba {

std::string DTypeText(v1::DType dtype) {
  const auto known = DTypeFromProto(dtype);
  return known.ok() ? DTypeName(*known) : "?";
}

Json SessionJson(const v1::Session& session) {
  const v1::SessionSpec& spec = session.spec();
  Json json = {
      {"name", session.name()},
      {"length", session.length()},
      {"bytes", session.bytes()},
      {"lost", session.lost()},
      {"created_unix_ms", session.created_unix_ms()},
      {"layers", spec.layers()},
      {"query_heads", spec.query_heads()},
      {"kv_heads", spec.kv_heads()},
      {"head_dim", spec.head_dim()},
      {"value_dim", spec.value_dim()},
      {"dtype", DTypeText(spec.dtype())},
      {"sink_tokens", spec.sink_tokens()},
      {"sink_logits", std::vector<float>(spec.sink_logits().begin(), spec.sink_logits().end())},
      {"window", spec.window()},
      {"scale", spec.scale()},
      {"softcap", spec.softcap()},
      {"stripe_pages", spec.stripe_pages()},
  };
  if (spec.has_model()) {
    json["sink_tokens"] = spec.model().sink_tokens();
    json["window"] = spec.model().window();
    json["model"] = absl::StrFormat("%016x", spec.model().model_hash());
    json["policy"] = PolicyText(spec.model());
    json["positions"] = PositionsText(spec.model());
    json["sink_token"] = DedicatedSinks(spec) > 0 ? Json(spec.model().sink_token()) : Json();
  }
  return json;
}

namespace {

void PrintSession(const v1::Session& session) {
  const v1::SessionSpec& spec = session.spec();
  std::vector<std::vector<std::string>> rows = {
      {"session", session.name()},
      {"length", absl::StrCat(session.length(), " positions, ", BytesText(session.bytes()))},
      {"heads", absl::StrFormat("%d query, %d kv, head_dim %d, value_dim %d", spec.query_heads(),
                                spec.kv_heads(), spec.head_dim(), spec.value_dim())},
      {"layers", absl::StrCat(spec.layers())},
      {"dtype", DTypeText(spec.dtype())},
      {"sinks", absl::StrCat(spec.sink_tokens(), " tokens, learned ",
                             spec.sink_logits().empty() ? "none" : absl::StrJoin(spec.sink_logits(), " "))},
      {"window", spec.window() > 0 ? absl::StrCat(spec.window(), " positions") : "none"},
      {"logits", absl::StrFormat("scale %g%s", spec.scale(),
                                 spec.softcap() > 0 ? absl::StrFormat(", softcap %g", spec.softcap()) : "")},
      {"stripes", absl::StrCat(spec.stripe_pages(), " pages")},
      {"created", absl::FormatTime("%Y-%m-%d %H:%M:%S UTC", absl::FromUnixMillis(session.created_unix_ms()),
                                   absl::UTCTimeZone())},
  };
  if (spec.has_model()) {
    rows.push_back({"model", ModelSpecText(spec.model())});
    if (const int64_t sinks = DedicatedSinks(spec); sinks > 0) {
      rows.push_back(
          {"own sinks", absl::StrFormat("positions 0 to %d are token %d, put in before the first append",
                                        sinks - 1, spec.model().sink_token())});
    }
  }
  if (session.lost()) {
    rows.push_back({"lost", "its content went with a worker; delete it and append again"});
  }
  PrintTable(rows);
}

}  // namespace

void ReportSession(const v1::Session& session, bool json) {
  if (json) {
    PrintJson(SessionJson(session));
  } else {
    PrintSession(session);
  }
}

}  // namespace eduba
