// One rank of a Gloo group, as a process for communicator_kill_test.cc to hurt; or of an NCCL group, for
// tests/gpu/run.sh. Sums words in a stream until a call fails; every second time each rank gets a part.
//   communicator_rank DIRECTORY RANK SIZE WORDS CALL_SECONDS [kill|stop|nccl]
// DIRECTORY is the rendezvous, new for each group. With `kill` or `stop` it does that to itself while the
// group forms, when it has published its address and the others may be connecting to it. With `nccl` the
// ranks share cuda:0, for which each needs an NCCL_HOSTID of its own. Prints "round N"
// after every call that succeeded, and at the end one line, "end CODE LATE_MS TEXT": what the first failed
// call returned, and how long after its deadline (negative: before). Exits with 0 then; with 3 for a wrong
// sum.
#include <signal.h>
#include <sys/prctl.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "collective/gloo/gloo_communicator.h"
#include "collective/nccl/nccl_communicator.h"

namespace eduba {
namespace {

class FileRendezvous final : public Rendezvous {
 public:
  FileRendezvous(const std::string& directory, int signal_to_self)
      : directory_(directory), signal_to_self_(signal_to_self) {}

  absl::Status Set(const std::string& key, const std::string& value, absl::Time /*deadline*/) override {
    std::ofstream(Path(key) + ".new", std::ios::binary) << value;
    std::filesystem::rename(Path(key) + ".new", Path(key));
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> Get(const std::string& key, absl::Time deadline) override {
    if (signal_to_self_ != 0) raise(signal_to_self_);
    while (!std::filesystem::exists(Path(key))) {
      if (absl::Now() >= deadline) return absl::DeadlineExceededError(absl::StrCat("no file ", Path(key)));
      absl::SleepFor(absl::Milliseconds(1));
    }
    std::stringstream value;
    value << std::ifstream(Path(key), std::ios::binary).rdbuf();
    return value.str();
  }

 private:
  std::string Path(const std::string& key) const {
    return absl::StrCat(directory_, "/", absl::StrReplaceAll(key, {{"/", "_"}}));
  }

  const std::string directory_;
  const int signal_to_self_;
};

int End(const absl::Status& status, absl::Time deadline) {
  std::printf("end %d %ld %s\n", static_cast<int>(status.code()),
              absl::ToInt64Milliseconds(absl::Now() - deadline), std::string(status.message()).c_str());
  std::fflush(stdout);
  return 0;
}

int Run(const std::string& directory, int rank, int size, int64_t words, absl::Duration limit,
        int signal_to_self, bool nccl) {
  FileRendezvous rendezvous(directory, signal_to_self);
  absl::Time deadline = absl::Now() + limit;
  auto group = nccl ? ConnectNccl(rank, size, rendezvous, NcclOptions(), deadline)
                    : ConnectGloo(rank, size, rendezvous, GlooOptions(), deadline);
  if (!group.ok()) return End(group.status(), deadline);
  const int64_t begin = words * rank / size;
  std::vector<int64_t> counts;
  for (int r = 0; r < size; ++r) counts.push_back(words * (r + 1) / size - words * r / size);
  for (int64_t round = 0;; ++round) {
    std::vector<int64_t> data(words, rank + round);
    deadline = absl::Now() + limit;
    const bool scatters = round % 2 == 1;
    const absl::Status status = scatters ? (*group)->ReduceScatterI64(absl::MakeSpan(data), counts, deadline)
                                         : (*group)->SumI64(absl::MakeSpan(data), deadline);
    if (!status.ok()) return End(status, deadline);
    for (const int64_t word :
         scatters ? absl::MakeSpan(data).subspan(begin, counts[rank]) : absl::MakeSpan(data)) {
      if (word != size * (size - 1) / 2 + size * round) return 3;
    }
    std::printf("round %ld\n", round);
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace eduba

int main(int argc, char** argv) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // A stopped rank must not outlive a test that failed.
  if (argc < 6) return 2;
  const std::string fault = argc > 6 ? argv[6] : "";
  return eduba::Run(argv[1], std::atoi(argv[2]), std::atoi(argv[3]), std::atoll(argv[4]),
                    absl::Seconds(std::atof(argv[5])),
                    fault == "kill"   ? SIGKILL
                    : fault == "stop" ? SIGSTOP
                                      : 0,
                    fault == "nccl");
}
