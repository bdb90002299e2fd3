#ifndef EDUBA_RPC_CHANNEL_H_
#define EDUBA_RPC_CHANNEL_H_

#include <memory>
#include <string>

#include "absl/time/time.h"
#include "grpcpp/channel.h"

namespace eduba {

// A channel of our own (not shared with other channels to the same address), with keepalive, the message
// limit, and quick reconnection. Does not connect yet.
std::shared_ptr<grpc::Channel> OpenChannel(const std::string& address);

// The same, connected; or not, if two attempts failed or the deadline came: its calls say why then. Twice,
// because older gRPC, as Debian 12's, looks at errno late and may take a connection under way for one that
// failed (https://github.com/grpc/grpc/pull/35064).
std::shared_ptr<grpc::Channel> Connect(const std::string& address, absl::Time deadline);

}  // namespace eduba

#endif  // EDUBA_RPC_CHANNEL_H_
