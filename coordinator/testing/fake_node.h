#ifndef EDUBA_COORDINATOR_TESTING_FAKE_NODE_H_
#define EDUBA_COORDINATOR_TESTING_FAKE_NODE_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "coordinator/records.h"
#include "coordinator/settlement.h"
#include "eduba/v1/group.pb.h"

namespace eduba {

// What one fake worker process keeps: content that outlives epochs and connections, and dies with the object.
struct FakeNode {
  struct Sealed {
    uint64_t append_id = 0;
    int64_t count = 0;
    Digest digest;          // The digest of those rows of the append that this node owns.
    std::string exponents;  // The exponents of all rows, the append's included.
  };
  struct Session {
    std::string spec_bytes;
    v1::SessionSpec spec;
    std::string placement_bytes;
    // A tensor session has:
    int64_t length = 0;
    Digest digest;
    std::string exponents;
    std::optional<Sealed> sealed;
    // A model session has:
    std::vector<int32_t> ids;

    void Publish(const std::string& agreed) {
      length += sealed->count;
      digest += sealed->digest;
      exponents = agreed;
      sealed.reset();
    }
  };

  uint64_t cluster = 0;
  std::map<uint64_t, Session> sessions;

  // A group forms: content of another cluster's sessions is dropped.
  void Join(uint64_t new_cluster) {
    if (cluster != new_cluster) sessions.clear();
    cluster = new_cluster;
  }

  // Makes the session or finds it; says what is held of it.
  v1::SessionContent Open(const v1::OpenSession& open) {
    const std::string spec_bytes = open.spec().SerializeAsString();
    const std::string placement_bytes = open.placement().SerializeAsString();
    const auto it = sessions.find(open.session_id());
    if (it == sessions.end() || it->second.spec_bytes != spec_bytes ||
        it->second.placement_bytes != placement_bytes) {
      sessions[open.session_id()] = Session{spec_bytes, open.spec(), placement_bytes, 0, {}, "", {}, {}};
    }
    const Session& session = sessions.at(open.session_id());
    v1::SessionContent content;
    if (open.spec().has_model()) {
      content.set_length(static_cast<int64_t>(session.ids.size()));
      uint64_t hash = 7;
      for (const int32_t id : session.ids) hash = hash * 31 + static_cast<uint64_t>(id);
      content.set_digest_low(hash);
      return content;
    }
    content.set_length(session.length);
    content.set_digest_low(session.digest.low);
    content.set_digest_high(session.digest.high);
    content.mutable_sealed()->set_exponents(session.exponents);
    if (!session.sealed.has_value()) return content;
    Digest with = session.digest;
    with += session.sealed->digest;
    content.set_sealed_count(session.sealed->count);
    content.mutable_sealed()->set_digest_low(with.low);
    content.mutable_sealed()->set_digest_high(with.high);
    content.mutable_sealed()->set_exponents(session.sealed->exponents);
    return content;
  }

  // "": done. Else what the coordinator should not have asked.
  std::string Settle(const v1::SettleSession& settle) {
    Session& session = sessions.at(settle.session_id());
    if (session.spec.has_model()) {
      const auto length = static_cast<int64_t>(session.ids.size());
      if (length < settle.length() || (length > settle.length() && !settle.read_again())) {
        return "a model session was settled on what is not there";
      }
      session.ids.resize(settle.length());
      return "";
    }
    if (session.sealed.has_value() && session.length + session.sealed->count == settle.length()) {
      if (settle.exponents().size() != session.sealed->exponents.size()) return "exponents of a wrong size";
      session.Publish(settle.exponents());
    }
    session.sealed.reset();
    return session.length == settle.length() ? "" : "a session was settled on what is not there";
  }
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_TESTING_FAKE_NODE_H_
