// Real processes, really killed: whatever happens to one rank, every other returns an error in time and none
// crashes.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace eduba {
namespace {

using ::testing::Contains;

constexpr int kSize = 4;
constexpr int kUnavailable = static_cast<int>(absl::StatusCode::kUnavailable);
constexpr int kDeadlineExceeded = static_cast<int>(absl::StatusCode::kDeadlineExceeded);

// The promise is deadline + 200 ms. This is the one test that holds a clock to it, on machines where a
// sanitized build of this and other programs may share two cores, so it allows the scheduler ten times as
// much. What it must tell apart is Gloo's own timeouts, which are 30 s and more.
constexpr int64_t kLateMillis = 2000;

struct Ending {
  int code = -1;
  int64_t late_ms = 0;
  std::string text;
};

class RankProcess {
 public:
  RankProcess(const std::string& directory, int rank, int64_t words, const std::string& seconds,
              const std::string& fault) {
    int ends[2];
    EXPECT_EQ(pipe2(ends, O_CLOEXEC), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    std::vector<std::string> words_of_command = {EDUBA_COMMUNICATOR_RANK, directory,
                                                 std::to_string(rank),    std::to_string(kSize),
                                                 std::to_string(words),   seconds};
    if (!fault.empty()) words_of_command.push_back(fault);
    std::vector<char*> arguments;
    arguments.reserve(words_of_command.size() + 1);
    for (std::string& word : words_of_command) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    EXPECT_EQ(posix_spawn(&pid_, arguments[0], &actions, nullptr, arguments.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    output_ = fdopen(ends[0], "r");
  }
  ~RankProcess() {
    if (!waited_) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    fclose(output_);
  }
  RankProcess(const RankProcess&) = delete;
  RankProcess& operator=(const RankProcess&) = delete;

  void Send(int signal) const { EXPECT_EQ(kill(pid_, signal), 0); }

  // Reads on until the rank has finished `round`.
  void AwaitRound(int round) {
    const std::string want = absl::StrCat("round ", round, "\n");
    for (std::string line = Line(); line != want; line = Line()) {
      if (line.empty()) {
        ADD_FAILURE() << "the rank ended before round " << round;
        return;
      }
    }
  }

  Ending AwaitEnd() {
    for (std::string line = Line(); !line.empty(); line = Line()) {
      Ending ending;
      char text[1000] = "";
      if (std::sscanf(line.c_str(), "end %d %ld %999[^\n]", &ending.code, &ending.late_ms, text) < 2) {
        continue;
      }
      ending.text = text;
      return ending;
    }
    return {};
  }

  // What waitpid says of it. Only once.
  int Wait() {
    int status = 0;
    EXPECT_EQ(waitpid(pid_, &status, 0), pid_);
    waited_ = true;
    return status;
  }

 private:
  std::string Line() {
    char line[2000];
    return std::fgets(line, sizeof(line), output_) == nullptr ? "" : line;
  }

  pid_t pid_ = -1;
  FILE* output_ = nullptr;
  bool waited_ = false;
};

class CommunicatorKill : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = testing::TempDir() + "eduba_ranks_XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  // `victim` does `fault` to itself while the group forms; empty: nobody does.
  void StartGroup(int64_t words, const std::string& seconds, int victim = -1, const std::string& fault = "") {
    ranks_.clear();
    const std::string rendezvous = absl::StrCat(directory_, "/", groups_++);
    std::filesystem::create_directory(rendezvous);
    for (int r = 0; r < kSize; ++r) {
      ranks_.push_back(
          std::make_unique<RankProcess>(rendezvous, r, words, seconds, r == victim ? fault : ""));
    }
  }

  void ExpectGoodEnd(int rank, const std::vector<int>& codes) {
    const Ending ending = ranks_[rank]->AwaitEnd();
    EXPECT_THAT(codes, Contains(ending.code)) << "rank " << rank << ": " << ending.text;
    EXPECT_LE(ending.late_ms, kLateMillis) << "rank " << rank << ": " << ending.text;
    const int status = ranks_[rank]->Wait();
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0)
        << "rank " << rank << ": wait status " << status;
  }

  std::string directory_;
  int groups_ = 0;
  std::vector<std::unique_ptr<RankProcess>> ranks_;
};

TEST_F(CommunicatorKill, ASurvivorOfASigkillReturnsUnavailableAndNeverAWrongSum) {
  const uint32_t seed = 4711;
  std::mt19937 random(seed);
  for (const int64_t words :
       {1, 4160, 200'000}) {  // One frame with little in it, one well filled, and two steps of them.
    for (int repeat = 0; repeat < 3; ++repeat) {
      const int victim = static_cast<int>(random() % kSize);
      const int round = static_cast<int>(random() % 40);
      SCOPED_TRACE(absl::StrCat("seed=", seed, " words=", words, " victim=", victim, " round=", round));
      StartGroup(words, "30");
      ranks_[victim]->AwaitRound(round);
      ranks_[victim]->Send(SIGKILL);
      for (int r = 0; r < kSize; ++r) {
        if (r != victim) ExpectGoodEnd(r, {kUnavailable});
      }
    }
  }
}

TEST_F(CommunicatorKill, WhenARankIsStoppedTheOthersReturnInTimeAndItLearnsWhenItWakes) {
  for (const int64_t words : {1, 200'000}) {
    const int victim = words == 1 ? 0 : 2;
    SCOPED_TRACE(absl::StrCat("words=", words, " victim=", victim));
    StartGroup(words, "1.5");
    ranks_[victim]->AwaitRound(10);
    ranks_[victim]->Send(SIGSTOP);
    for (int r = 0; r < kSize; ++r) {
      // The first to run out of time ends the group; for those a little behind it the connections break.
      if (r != victim) ExpectGoodEnd(r, {kDeadlineExceeded, kUnavailable});
    }
    ranks_[victim]->Send(SIGCONT);
    const Ending woken = ranks_[victim]->AwaitEnd();
    EXPECT_TRUE(woken.code == kDeadlineExceeded || woken.code == kUnavailable) << woken.text;
    EXPECT_EQ(ranks_[victim]->Wait(), 0);
  }
}

TEST_F(CommunicatorKill, ARankThatDiesWhileTheGroupFormsCostsTheOthersNoMoreThanTheirDeadline) {
  for (const int victim : {0, 1, 3}) {
    SCOPED_TRACE(absl::StrCat("victim=", victim));
    StartGroup(1, "1.5", victim, "kill");
    for (int r = 0; r < kSize; ++r) {
      if (r != victim) ExpectGoodEnd(r, {kDeadlineExceeded, kUnavailable});
    }
  }
}

TEST_F(CommunicatorKill, ARankThatStopsWhileTheGroupFormsCostsTheOthersNoMoreThanTheirDeadline) {
  for (const int victim : {0, 3}) {
    SCOPED_TRACE(absl::StrCat("victim=", victim));
    StartGroup(1, "1.5", victim, "stop");
    for (int r = 0; r < kSize; ++r) {
      if (r != victim) ExpectGoodEnd(r, {kDeadlineExceeded, kUnavailable});
    }
  }
}

}  // namespace
}  // namespace eduba
