#include "rpc/server.h"

#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/resource_quota.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"
#include "rpc/limits.h"

namespace eduba {
namespace {

// Our services are reactors, which run on the few threads that gRPC shares among all calls of the process.
// What still takes a thread for each call is gRPC's reflection, and a service of a test that is written
// without callbacks. Calls beyond it are RESOURCE_EXHAUSTED.
constexpr int kBlockingThreadsMax = 64;

// Says why a server could not listen there: gRPC says it only in its log.
absl::Status CheckCanListen(const std::string& address, const std::pair<std::string, int>& host_and_port) {
  std::string host = host_and_port.first;
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  const int failure = getaddrinfo(host.c_str(), absl::StrCat(host_and_port.second).c_str(), &hints, &found);
  if (failure != 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", address, ": found no host of this name (",
                                               gai_strerror(failure), "); choose another --listen"));
  }
  int error = 0;
  for (const addrinfo* at = found; at != nullptr; at = at->ai_next) {
    const int fd = socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int on = 1;
    const bool bound = fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) == 0 &&
                       bind(fd, at->ai_addr, at->ai_addrlen) == 0 && listen(fd, 1) == 0;
    error = bound ? 0 : errno;
    if (fd >= 0) close(fd);
    if (bound) break;
  }
  freeaddrinfo(found);
  if (error == 0) return absl::OkStatus();
  const std::string why = error == EADDRINUSE ? "the port is taken by another program"
                          : error == EADDRNOTAVAIL
                              ? "the host is another machine's (0.0.0.0 is every address of this one)"
                          : error == EACCES ? "ports below 1024 need root"
                                            : std::strerror(error);
  return absl::UnavailableError(
      absl::StrCat("cannot listen on ", address, ": ", why, "; choose another --listen"));
}

}  // namespace

absl::StatusOr<std::pair<std::string, int>> ParseAddress(const std::string& address) {
  const size_t colon = address.rfind(':');
  int port = -1;
  if (colon != std::string::npos && colon > 0) {
    const char* end = address.data() + address.size();
    const auto [stop, error] = std::from_chars(address.data() + colon + 1, end, port);
    if (error != std::errc() || stop != end) port = -1;
  }
  if (port < 0 || port > 65535) {
    return absl::InvalidArgumentError(absl::StrCat("address '", address, "' is not valid: use HOST:PORT"));
  }
  return std::make_pair(address.substr(0, colon), port);
}

absl::StatusOr<std::unique_ptr<RpcServer>> RpcServer::Start(const std::string& address,
                                                            const std::vector<grpc::Service*>& services) {
  EDUBA_ASSIGN_OR_RETURN(const auto host_and_port, ParseAddress(address));
  EDUBA_RETURN_IF_ERROR(CheckCanListen(address, host_and_port));
  static const bool once = [] {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    return true;
  }();
  (void)once;

  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port);
  for (grpc::Service* service : services) builder.RegisterService(service);
  builder.SetMaxReceiveMessageSize(kMessageBytesMax);
  // A small compressed message must not become a large one in our memory. A call that announces compression
  // is UNIMPLEMENTED before any of its messages is looked at; a message that does not announce it is not
  // unpacked.
  builder.AddChannelArgument(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1 << GRPC_COMPRESS_NONE);
  builder.AddChannelArgument(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0);
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, 8192);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kConnectionCallsMax);
  builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, 3000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 10000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5000);
  // Two servers on one port would share its connections silently.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  grpc::ResourceQuota quota("eduba");
  quota.SetMaxThreads(kBlockingThreadsMax);
  builder.SetResourceQuota(quota);

  auto server = std::unique_ptr<RpcServer>(new RpcServer());
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr || port == 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", address,
                     ": the port is taken or the host is not ours; choose another --listen"));
  }
  server->address_ = absl::StrCat(host_and_port.first, ":", port);
  server->SetServing(false);
  return server;
}

RpcServer::~RpcServer() { Shutdown(absl::ZeroDuration()); }

void RpcServer::SetServing(bool serving) {
  // Every registered service and the empty name (the whole server).
  server_->GetHealthCheckService()->SetServingStatus(serving);
}

void RpcServer::Shutdown(absl::Duration grace) {
  if (server_ == nullptr) return;
  server_->GetHealthCheckService()->Shutdown();
  server_->Shutdown(absl::ToChronoTime(absl::Now() + grace));
  server_->Wait();
  server_.reset();
}

}  // namespace eduba
