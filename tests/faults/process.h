#ifndef EDUBA_TESTS_FAULTS_PROCESS_H_
#define EDUBA_TESTS_FAULTS_PROCESS_H_

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace eduba {

// One run of a program that serves.
class Process {
 public:
  // `words` without the program's name; its stderr goes to the file `errors`, or to ours.
  Process(const std::string& program, std::vector<std::string> words, const std::string& errors = "") {
    int ends[2];
    EXPECT_EQ(pipe2(ends, O_CLOEXEC), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    if (!errors.empty()) {
      posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, errors.c_str(), O_WRONLY | O_CREAT | O_TRUNC,
                                       0600);
    }
    words.insert(words.begin(), program);
    std::vector<char*> arguments;
    arguments.reserve(words.size() + 1);
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    EXPECT_EQ(posix_spawn(&pid_, arguments[0], &actions, nullptr, arguments.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    output_ = fdopen(ends[0], "r");
  }
  ~Process() {
    if (running_) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    fclose(output_);
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  // The address of its line "ready: ADDRESS".
  std::string AwaitReady() {
    char address[300] = "";
    EXPECT_EQ(std::fscanf(output_, "ready: %299s", address), 1);
    return address;
  }

  void Send(int signal) const { EXPECT_EQ(kill(pid_, signal), 0); }

  void Send(int signal, int value) const { EXPECT_EQ(sigqueue(pid_, signal, {.sival_int = value}), 0); }

  bool Runs() {
    int status = 0;
    if (running_ && waitpid(pid_, &status, WNOHANG) == pid_) running_ = false;
    return running_;
  }

  // Its exit code, or 128 + the signal that ended it.
  int AwaitEnd() {
    int status = 0;
    EXPECT_EQ(waitpid(pid_, &status, 0), pid_);
    running_ = false;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

 private:
  pid_t pid_ = -1;
  FILE* output_ = nullptr;
  bool running_ = true;
};

}  // namespace eduba

#endif  // EDUBA_TESTS_FAULTS_PROCESS_H_
