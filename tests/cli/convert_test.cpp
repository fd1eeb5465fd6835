// SPDX-License-Identifier: BSD-3-Clause
// `reshard convert` and `reshard reshard`.
#include <gmock/gmock.h>
#include <poll.h>
#include <pty.h>
#include <sys/inotify.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <regex>

#include "cli/run_cli.h"
#include "reshard/planner/default_planner.h"
#include "reshard/protocol/protocol.h"
#include "reshard/protocol/thread_transport.h"
#include "reshard/storage/checkpoint_reader.h"
#include "reshard/storage/filesystem.h"
#include "reshard/storage/torch_save_reader.h"
#include "support/memory_state.h"
#include "support/torch_files.h"

namespace reshard {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

class ConvertTest : public CliTest {
 protected:
  static nlohmann::json digests(const std::string& checkpoint) {
    return nlohmann::json::parse(reshard_command({"digest", "--json", checkpoint}).out);
  }
};

TEST_F(ConvertTest, ToAFileAndBackIsTheSame) {
  const CommandResult to_torch = reshard_command({"convert", path(), out("model.pt"), "--to", "torch"});
  EXPECT_EQ(to_torch.exit_code, 0) << to_torch.err;
  EXPECT_EQ(to_torch.out + to_torch.err, "");
  EXPECT_EQ(reshard_command({"convert", out("model.pt"), out("dcp"), "--to", "dcp"}).exit_code, 0);
  EXPECT_EQ(reshard_command({"verify", out("dcp")}).exit_code, 0);
  EXPECT_THAT(names_out(), ElementsAre("dcp", "model.pt"));
  const std::string wanted = reshard_command({"digest", "--json", path()}).out;
  for (const char* name : {"model.pt", "dcp"}) {
    EXPECT_EQ(reshard_command({"digest", "--json", out(name)}).out, wanted);
    EXPECT_EQ(reshard_command({"diff", path(), out(name)}).exit_code, 0);
  }
  const CommandResult run = reshard_command({"inspect", out("model.pt")});
  EXPECT_THAT(run.out, HasSubstr("saved by torch.save"));
  EXPECT_TRUE(std::regex_search(run.out, std::regex("model\\.pt +3 +[0-9]+\n"))) << run.out;
}

TEST_F(ConvertTest, TensorsGoToSafetensorsAndBack) {
  // The values of this checkpoint have no place there.
  const CommandResult values = reshard_command({"convert", path(), out("st"), "--to", "safetensors"});
  EXPECT_EQ(values.exit_code, 1);
  EXPECT_THAT(values.err, HasSubstr("invalid argument"));
  EXPECT_THAT(names_out(), ElementsAre()) << "nothing is left";

  MemorySaveState state({replica_entry("a.weight", {6, 4}), replica_entry("b", {3}), replica_entry("scalar", {})});
  FileSystemWriter writer(out("tensors"));
  DefaultSavePlanner planner;
  run_save(*solo_transport(), state, planner, writer);
  EXPECT_EQ(reshard_command({"convert", out("tensors"), out("st"), "--to", "safetensors"}).err, "");
  EXPECT_EQ(reshard_command({"convert", out("st"), out("dcp"), "--to", "dcp"}).err, "");
  EXPECT_EQ(reshard_command({"convert", out("st"), out("st.pt"), "--to", "torch"}).err, "");
  EXPECT_EQ(reshard_command({"reshard", out("st"), out("three"), "-n", "3"}).err, "");
  const std::string wanted = reshard_command({"digest", out("tensors")}).out;
  for (const char* name : {"st", "dcp", "st.pt", "three"}) {
    EXPECT_EQ(reshard_command({"digest", out(name)}).out, wanted) << name;
    EXPECT_EQ(reshard_command({"diff", out("tensors"), out(name)}).exit_code, 0) << name;
  }
  EXPECT_THAT(reshard_command({"inspect", out("st")}).out, HasSubstr("saved by safetensors"));
  const CommandResult verified = reshard_command({"verify", out("st")});
  EXPECT_EQ(verified.exit_code, 0) << verified.err;
  EXPECT_THAT(verified.out, HasSubstr("no checksums"));
  EXPECT_THAT(verified.out, HasSubstr("whole: 3 tensors and 0 values"));
  const CommandResult again = reshard_command({"convert", out("tensors"), out("st"), "--to", "safetensors", "--force"});
  EXPECT_EQ(again.exit_code, 1);
  EXPECT_THAT(again.err, HasSubstr("a directory of their own"));
  const std::string file = out("st/model-00001-of-00001.safetensors");
  EXPECT_THAT(reshard_command({"inspect", file}).err, HasSubstr("are read by their directory"));
  std::filesystem::resize_file(file, std::filesystem::file_size(file) - 1);
  EXPECT_EQ(reshard_command({"verify", out("st")}).exit_code, 1);
}

TEST_F(ConvertTest, ReshardWritesWhatSoManyRanksWouldSave) {
  EXPECT_EQ(reshard_command({"reshard", path(), out("four"), "-n", "4"}).exit_code, 0);
  const auto json = nlohmann::json::parse(reshard_command({"inspect", "--json", out("four")}).out);
  std::vector<std::string> places;
  for (const auto& chunk : json.at("tensors").at("model.weight").at("chunks")) {
    places.push_back(chunk.at("offsets").dump() + chunk.at("sizes").dump() + chunk.at("file").get<std::string>());
  }
  // torch.chunk of 6 rows in 4: 2, 2, 2 and none.
  EXPECT_THAT(places, ElementsAre("[0,0][2,4]__0_0.distcp", "[2,0][2,4]__1_0.distcp", "[4,0][2,4]__2_0.distcp"));
  EXPECT_EQ(json.at("sidecars"), 4);
  EXPECT_EQ(reshard_command({"verify", out("four")}).exit_code, 0);
  EXPECT_EQ(reshard_command({"diff", path(), out("four")}).exit_code, 0);
  // In blocks: a row and less at a time.
  EXPECT_EQ(reshard_command({"reshard", path(), out("blocks"), "-n", "2", "--block-bytes", "12"}).exit_code, 0);
  EXPECT_EQ(reshard_command({"diff", path(), out("blocks")}).exit_code, 0);
  EXPECT_EQ(reshard_command({"verify", out("blocks")}).exit_code, 0);
}

TEST_F(ConvertTest, EveryGoldenCheckpointConverts) {
  for (const std::string& name : OracleCase::names()) {
    const std::string golden = OracleCase(name).directory().string();
    EXPECT_EQ(reshard_command({"convert", golden, out("g.pt"), "--to", "torch", "-f"}).exit_code, 0) << name;
    EXPECT_EQ(reshard_command({"reshard", out("g.pt"), out("g"), "-n", "3", "-f"}).exit_code, 0) << name;
    const CommandResult same = reshard_command({"diff", golden, out("g")});
    // Releases before 2.4 keep a dict without tensors as one value; a file has it as it is, and is read by the rule of today.
    if (name.starts_with("2.1.2/")) {
      EXPECT_EQ(same.out.find('~'), std::string::npos) << name << same.out;
      EXPECT_EQ(digests(golden), digests(out("g"))) << name;
    } else {
      EXPECT_EQ(same.exit_code, 0) << name << same.out << same.err;
    }
  }
}

TEST_F(ConvertTest, TheDestinationIsReplacedOnlyByForce) {
  const std::vector<std::string> to_torch{"convert", path(), out("m.pt"), "--to", "torch"};
  const std::vector<std::string> to_dcp{"reshard", path(), out("dcp"), "-n", "1"};
  for (auto arguments : {to_torch, to_dcp}) {
    EXPECT_EQ(reshard_command(arguments).exit_code, 0);
    const CommandResult again = reshard_command(arguments);
    EXPECT_EQ(again.exit_code, 1);
    EXPECT_EQ(again.err,
              "reshard: already exists: the destination is there; --force replaces it; file " + arguments[2] + "\n");
    arguments.emplace_back("--force");
    EXPECT_EQ(reshard_command(arguments).exit_code, 0);
    EXPECT_EQ(reshard_command({"diff", path(), arguments[2]}).exit_code, 0);
  }
  // What is no checkpoint is not replaced at all.
  std::filesystem::create_directory(out("photos"));
  std::ofstream(out("photos/cat.jpg")) << "meow";
  const CommandResult photos = reshard_command({"convert", path(), out("photos"), "--to", "dcp", "-f"});
  EXPECT_EQ(photos.exit_code, 1);
  EXPECT_THAT(photos.err, HasSubstr("the directory holds something else than a checkpoint"));
  EXPECT_EQ(text_of(out("photos/cat.jpg")), "meow");
  EXPECT_THAT(reshard_command({"convert", path(), out("photos"), "--to", "torch", "-f"}).err,
              HasSubstr("only a file can be replaced by a file"));
  EXPECT_THAT(reshard_command({"convert", path(), out("m.pt"), "--to", "dcp", "-f"}).err,
              HasSubstr("a checkpoint is a directory, and something else is there"));
  std::filesystem::create_directory(out("empty"));
  EXPECT_EQ(reshard_command({"convert", path(), out("empty"), "--to", "dcp"}).exit_code, 0);
}

TEST_F(ConvertTest, TheSourceIsNotTheDestination) {
  std::filesystem::create_directory_symlink(path(), out("link"));
  const std::string before = reshard_command({"digest", path()}).out;
  for (const std::string& same :
       {path(), path() + "/.", path() + "/../" + std::filesystem::path(path()).filename().string(), out("link")}) {
    for (const char* kind : {"dcp", "torch"}) {
      const CommandResult run = reshard_command({"convert", path(), same, "--to", kind, "--force"});
      EXPECT_EQ(run.exit_code, 1);
      EXPECT_THAT(run.err, HasSubstr("the destination is the source; file " + same));
    }
  }
  for (const std::string& inside : {path() + "/sub", path() + "/a/b.pt", out("link") + "/sub"}) {
    for (const char* kind : {"dcp", "torch"}) {
      const CommandResult run = reshard_command({"convert", path(), inside, "--to", kind});
      EXPECT_EQ(run.exit_code, 1);
      EXPECT_THAT(run.err, HasSubstr("the destination lies inside the source; file " + inside));
    }
  }
  EXPECT_EQ(reshard_command({"digest", path()}).out, before);
  EXPECT_EQ(reshard_command({"verify", path()}).exit_code, 0);
}

TEST_F(ConvertTest, ErrorsAreOneLineAndLeaveNothing) {
  Bytes bytes = read_test_file(directory_ / "__1_0.distcp");
  bytes.at(704) ^= std::byte{1};  // the first byte of the elements
  std::ofstream(directory_ / "__1_0.distcp", std::ios::binary) << as_text(bytes);
  std::ofstream(out("hello.txt")) << "hello, this is no checkpoint";
  const std::vector<std::vector<std::string>> wrong{{"convert", path(), out("a.pt"), "--to", "torch"},
                                                    {"convert", path(), out("a"), "--to", "dcp"},
                                                    {"reshard", path(), out("a"), "-n", "5"},
                                                    {"convert", path(), out("no/such/a.pt"), "--to", "torch"},
                                                    {"convert", out("nothing"), out("a"), "--to", "dcp"},
                                                    {"convert", out("hello.txt"), out("a"), "--to", "dcp"},
                                                    {"convert", out_.path(), out_.path() + "-b", "--to", "dcp"}};
  for (const auto& arguments : wrong) {
    const CommandResult run = reshard_command(arguments);
    EXPECT_EQ(run.exit_code, 1) << testing::PrintToString(arguments);
    EXPECT_EQ(std::ranges::count(run.err, '\n'), 1) << run.err;
    EXPECT_TRUE(run.err.starts_with("reshard: ")) << run.err;
    EXPECT_EQ(run.out, "");
    EXPECT_THAT(names_out(), ElementsAre("hello.txt")) << testing::PrintToString(arguments);
  }
  EXPECT_THAT(reshard_command({"convert", path(), out("a"), "--to", "dcp"}).err,
              HasSubstr("the stored bytes do not match their checksum"));
  EXPECT_EQ(reshard_command({"convert", path(), out("a"), "--to", "parquet"}).exit_code, 2);
  EXPECT_EQ(reshard_command({"convert", path(), out("a")}).exit_code, 2);
  EXPECT_EQ(reshard_command({"reshard", path(), out("a"), "-n", "0"}).exit_code, 2);
  EXPECT_EQ(reshard_command({"reshard", path(), out("a"), "-n", "2", "--block-bytes", "x"}).exit_code, 2);
}

TEST_F(ConvertTest, KeysOfAnyTextAreKept) {
  const std::string evil = "evil\x1b[2J\nkey\t\x7f";
  save_checkpoint(path(), states<MemorySaveState>({{replica_entry(evil, {2})}}));
  EXPECT_EQ(reshard_command({"convert", path(), out("m.pt"), "--to", "torch"}).exit_code, 0);
  TorchSaveReader reader(out("m.pt"));
  EXPECT_TRUE(reader.read_metadata().state_dict_metadata.contains(evil));
  const CommandResult run = reshard_command({"inspect", out("m.pt")});
  EXPECT_THAT(run.out, HasSubstr("evil\\x1b[2J\\x0akey\\x09\\x7f"));
  EXPECT_EQ(reshard_command({"diff", path(), out("m.pt")}).exit_code, 0);
}

/// Waits until a name with this in it is made in a directory.
class CreationWatch {
 public:
  explicit CreationWatch(const std::string& directory) : fd_(::inotify_init1(IN_CLOEXEC)) {
    if (::inotify_add_watch(fd_, directory.c_str(), IN_CREATE) < 0)
      throw std::runtime_error("cannot watch " + directory);
  }
  CreationWatch(const CreationWatch&) = delete;
  CreationWatch& operator=(const CreationWatch&) = delete;
  ~CreationWatch() { ::close(fd_); }
  bool wait_for(const std::string& part) const {
    constexpr int kDeadline = 60'000;
    pollfd ready{fd_, POLLIN, 0};
    alignas(inotify_event) char buffer[1 << 12];
    while (::poll(&ready, 1, kDeadline) == 1) {
      const ssize_t n = ::read(fd_, buffer, sizeof(buffer));
      for (ssize_t at = 0; at < n;) {
        const auto* event = reinterpret_cast<const inotify_event*>(buffer + at);
        if (event->len > 0 && std::string_view(event->name).find(part) != std::string_view::npos) return true;
        at += static_cast<ssize_t>(sizeof(inotify_event) + event->len);
      }
    }
    return false;
  }

 private:
  int fd_;
};

// Element by element, which takes a second or more, so that the signal comes in the middle.
TEST_F(ConvertTest, AnInterruptedCommandLeavesNothing) {
  save_checkpoint(path(), states<MemorySaveState>({{replica_entry("w", {300'000})}}));
  for (const int signal : {SIGINT, SIGTERM}) {
    for (const char* kind : {"torch", "dcp"}) {
      const TemporaryDirectory logs;
      const CreationWatch watch(out_.path());
      const pid_t pid =
          start_reshard({"convert", path(), out("x"), "--to", kind, "--block-bytes", "4"}, logs / "out", logs / "err");
      ASSERT_TRUE(watch.wait_for("x"));
      ::kill(pid, signal);
      EXPECT_EQ(wait_for(pid), 128 + signal);
      EXPECT_EQ(text_of(logs / "err"), "reshard: interrupted, nothing was written\n");
      EXPECT_THAT(names_out(), IsEmpty()) << kind;
    }
  }
}

TEST_F(ConvertTest, AKilledCommandLeavesNothingThatPassesForACheckpoint) {
  save_checkpoint(path(), states<MemorySaveState>({{replica_entry("w", {300'000})}}));
  for (const char* kind : {"torch", "dcp"}) {
    const CreationWatch watch(out_.path());
    const pid_t pid =
        start_reshard({"convert", path(), out("x"), "--to", kind, "--block-bytes", "4"}, "/dev/null", "/dev/null");
    ASSERT_TRUE(watch.wait_for("x"));
    ::kill(pid, SIGKILL);
    EXPECT_EQ(wait_for(pid), -SIGKILL);
    EXPECT_EQ(reshard_command({"inspect", out("x")}).exit_code, 1) << kind;
    EXPECT_FALSE(std::filesystem::is_regular_file(out("x")));
    std::filesystem::remove_all(out("x"));
    EXPECT_EQ(reshard_command({"convert", path(), out("x"), "--to", kind}).exit_code, 0) << kind;
    std::filesystem::remove_all(out("x"));
  }
}

/// Runs `reshard` with stderr, or everything, on a terminal.
std::string on_a_terminal(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), RESHARD_CLI);
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  int terminal = -1;
  const pid_t pid = ::forkpty(&terminal, nullptr, nullptr, nullptr);
  if (pid == 0) {
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
  std::string text;
  char buffer[4096];
  for (ssize_t n = 0; (n = ::read(terminal, buffer, sizeof(buffer))) > 0;) text.append(buffer, static_cast<size_t>(n));
  ::close(terminal);
  EXPECT_EQ(wait_for(pid), 0) << text;
  return text;
}

TEST_F(ConvertTest, ProgressIsForTerminalsAlone) {
  const std::string text = on_a_terminal({"convert", path(), out("m.pt"), "--to", "torch"});
  EXPECT_THAT(text, HasSubstr("\rwrite "));
  EXPECT_THAT(text, HasSubstr("% "));
  EXPECT_TRUE(text.ends_with("\r\x1b[K")) << text;
  EXPECT_THAT(on_a_terminal({"diff", path(), out("m.pt")}), HasSubstr("\rdiff "));
  EXPECT_EQ(reshard_command({"convert", path(), out("n.pt"), "--to", "torch"}).err, "");
}

}  // namespace
}  // namespace reshard
