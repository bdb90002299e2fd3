#ifndef EDUBA_RPC_LIMITS_H_
#define EDUBA_RPC_LIMITS_H_

#include <cstdint>

namespace eduba {

// No message is larger (RESOURCE_EXHAUSTED beyond it), so a stream's memory is a few of these.
inline constexpr int kMessageBytesMax = 1 << 20;
// Payload of one message that we send: leaves room for the other fields under kMessageBytesMax.
inline constexpr int64_t kPayloadBytesMax = 768 << 10;
// Rows of one step: keeps positions and path counts of a step small beside its queries.
inline constexpr int kStepRowsMax = 4096;

// Calls of one connection that a server works on at once; the client keeps further ones until others end. A
// call that waits holds no thread and a few KiB, so this only keeps one client from taking all of kCallsMax.
inline constexpr int kConnectionCallsMax = 1024;
// Client calls of a coordinator at once (RESOURCE_EXHAUSTED beyond it). The most that one has in memory are
// the 4 MiB of queries that Attend reads before they are answered.
inline constexpr int kCallsMax = 4096;

// Session bounds. One row's queries or outputs, and one position's keys and values, must fit into one
// message.
inline constexpr int kLayersMax = 1024;
inline constexpr int kQueryHeadsMax = 1024;
inline constexpr int kHeadDimMax = 1024;
inline constexpr int64_t kRowElementsMax = kPayloadBytesMax / 4;  // query_heads * max(head_dim, value_dim)
inline constexpr int64_t kExponentBytesMax = kPayloadBytesMax;    // 2 * layers * kv_heads * value_dim
inline constexpr int64_t kSinkTokensMax = 65536;
inline constexpr int kStripePagesMax = 1 << 20;
inline constexpr int64_t kNotesBytesMax = 256 << 10;

// Limits of model sessions: ids of one message or question, tokens of one generation, its stop strings.
inline constexpr int64_t kTokenIdsMax = kPayloadBytesMax / 4;
inline constexpr int64_t kGenerateTokensMax = int64_t{1} << 20;
inline constexpr int kStopStringsMax = 16;
inline constexpr int64_t kStopStringBytesMax = 256;
inline constexpr int kStopIdsMax = 1024;
// The most sink tokens of a session's own: they travel beside a full message of ids.
inline constexpr int64_t kDedicatedSinksMax = 4096;
// The most heads of a model over all layers, for sink mass: it travels beside full log-probabilities.
inline constexpr int64_t kSinkMassHeadsMax = 49152;

// WorkerHello.protocol. One more with every incompatible change of group.proto.
inline constexpr int kGroupProtocol = 6;

inline constexpr int64_t kHeartbeatIntervalMs = 500;
inline constexpr int64_t kHeartbeatTimeoutMs = 3000;
// An append that nobody touches gives its memory back.
inline constexpr int64_t kAppendIdleTimeoutMs = 60000;

}  // namespace eduba

#endif  // EDUBA_RPC_LIMITS_H_
