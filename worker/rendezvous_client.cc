#include "worker/rendezvous_client.h"

#include "absl/time/clock.h"
#include "rpc/status.h"

namespace eduba {

absl::Status RendezvousClient::Set(const std::string& key, const std::string& value, absl::Time deadline) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(deadline));
  v1::RendezvousSetRequest request;
  request.set_epoch(epoch_);
  request.set_attempt(attempt_);
  request.set_key(key);
  request.set_value(value);
  v1::RendezvousSetResponse response;
  return FromGrpc(stub_->RendezvousSet(&context, request, &response));
}

absl::StatusOr<std::string> RendezvousClient::Get(const std::string& key, absl::Time deadline) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(deadline));
  v1::RendezvousGetRequest request;
  request.set_epoch(epoch_);
  request.set_attempt(attempt_);
  request.set_key(key);
  v1::RendezvousGetResponse response;
  const absl::Status status = FromGrpc(stub_->RendezvousGet(&context, request, &response));
  if (!status.ok()) return status;
  return response.value();
}

}  // namespace eduba
