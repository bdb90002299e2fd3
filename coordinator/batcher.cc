#include "coordinator/batcher.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace eduba {

void Batcher::Open(RequestId call, const BatchKey& key, int64_t row_bytes, int step_rows) {
  EDUBA_CHECK(row_bytes > 0 && step_rows > 0);
  const bool inserted = calls_.try_emplace(call, Call{key, row_bytes, step_rows, {}, 0, 0}).second;
  EDUBA_CHECK(inserted);
}

void Batcher::Push(RequestId id, std::string queries, std::vector<int64_t> positions) {
  const auto it = calls_.find(id);
  EDUBA_CHECK(it != calls_.end());
  Call& call = it->second;
  const int64_t rows = static_cast<int64_t>(queries.size()) / call.row_bytes;
  EDUBA_CHECK_EQ(rows * call.row_bytes, static_cast<int64_t>(queries.size()));
  EDUBA_CHECK_EQ(call.key.positions ? rows : 0, static_cast<int64_t>(positions.size()));
  if (rows == 0) return;
  if (call.queued == 0) waiting_.push_back(id);
  call.queued += rows;
  call.submitted.push_back({std::move(queries), std::move(positions), rows, 0});
}

void Batcher::Close(RequestId id) {
  if (calls_.erase(id) > 0) std::erase(waiting_, id);
}

Batch Batcher::Next() {
  EDUBA_CHECK(!waiting_.empty());
  const Call& first = calls_.at(waiting_.front());
  Batch batch;
  batch.key = first.key;

  struct Share {
    RequestId id;
    Call* call;
    int64_t rows;
  };
  std::vector<Share> shares;
  for (const RequestId id : waiting_) {
    Call& call = calls_.at(id);
    if (call.key == batch.key) shares.push_back({id, &call, 0});
  }
  int64_t room = first.step_rows;
  for (bool grew = true; room > 0 && grew;) {
    grew = false;
    const int64_t wanting =
        std::count_if(shares.begin(), shares.end(), [](const Share& s) { return s.rows < s.call->queued; });
    const int64_t each = std::max<int64_t>(1, wanting == 0 ? 0 : room / wanting);
    for (Share& share : shares) {
      const int64_t more = std::min({each, room, share.call->queued - share.rows});
      share.rows += more;
      room -= more;
      grew = grew || more > 0;
    }
  }

  for (const Share& share : shares) {
    if (share.rows == 0) continue;
    batch.parts.push_back({share.id, static_cast<int>(share.rows), share.call->left});
    Take(share.call, share.rows, &batch);
    batch.rows += static_cast<int>(share.rows);
    std::erase(waiting_, share.id);
    if (share.call->queued > 0) waiting_.push_back(share.id);
  }
  return batch;
}

void Batcher::Take(Call* call, int64_t rows, Batch* batch) {
  call->queued -= rows;
  call->left += rows;
  while (rows > 0) {
    Submitted& front = call->submitted.front();
    const int64_t count = std::min(rows, front.rows - front.taken);
    batch->queries.append(front.queries, front.taken * call->row_bytes, count * call->row_bytes);
    if (call->key.positions) {
      const auto begin = front.positions.begin() + front.taken;
      batch->positions.insert(batch->positions.end(), begin, begin + count);
    } else {
      batch->positions.insert(batch->positions.end(), count, call->key.length - 1);
    }
    front.taken += count;
    rows -= count;
    if (front.taken == front.rows) call->submitted.pop_front();
  }
}

}  // namespace eduba
