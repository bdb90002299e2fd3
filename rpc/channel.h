#ifndef EDUBA_RPC_CHANNEL_H_
#define EDUBA_RPC_CHANNEL_H_

#include <memory>
#include <string>

#include "grpcpp/channel.h"

namespace eduba {

// A channel of our own (not shared with other channels to the same address), with keepalive, the message
// limit, and quick reconnection. Does not connect yet.
std::shared_ptr<grpc::Channel> OpenChannel(const std::string& address);

}  // namespace eduba

#endif  // EDUBA_RPC_CHANNEL_H_
