// SPDX-License-Identifier: BSD-3-Clause
#include "cli/app.h"

#include <cstdio>
#include <string>
#include <vector>

namespace reshard::cli {
namespace {

constexpr const char* kCheckpoint = "The checkpoint: a directory, or a file of torch.save";

constexpr const char* kNoVerify =
    "Do not check a directory of PyTorch's before reading it, which has no sums of blocks";

void add_block_option(CLI::App* command, uint64_t& bytes) {
  command->add_option("--block-bytes", bytes, "Tensors go through memory in blocks of this size (64MiB)")
      ->transform(CLI::AsSizeValue(false).description(""))
      ->type_name("SIZE");
}

}  // namespace

void define(CLI::App& app, Invocation& run) {
  app.require_subcommand(1);

  auto* inspect = app.add_subcommand("inspect", "What a checkpoint holds; opens no data file");
  inspect->add_option("path", run.inspect.path, kCheckpoint)->required();
  inspect->add_flag("--json", run.inspect.json, "As JSON, with every chunk");
  inspect->add_flag("--chunks", run.inspect.chunks, "Every chunk with its place");
  inspect->add_option("--map", run.inspect.map, "Draw which file holds which part of each tensor, as SVG")
      ->type_name("FILE");
  inspect->add_flag("-f,--force", run.inspect.force, "Replace the drawing if it is there");
  inspect->callback([&run] { run.exit_code = cli::inspect(run.inspect); });

  auto* verify =
      app.add_subcommand("verify", "Check everything; exit code 1 and a line for each problem if it is not whole");
  verify->add_option("path", run.verify.path, kCheckpoint)->required();
  verify->add_flag("-q,--quiet", run.verify.quiet, "Print problems only");
  verify->callback([&run] { run.exit_code = cli::verify(run.verify); });

  auto* digest = app.add_subcommand(
      "digest", "SHA-256 of every whole tensor's row-major little-endian bytes, however it is sharded");
  digest->add_option("path", run.digest.path, kCheckpoint)->required();
  digest->add_flag("--json", run.digest.json, "As JSON: {key: hex}");
  digest->callback([&run] { run.exit_code = cli::digest(run.digest); });

  auto* diff = app.add_subcommand("diff", "What differs between two checkpoints: keys, dtypes, shapes, values");
  diff->footer("Exit code 0: the same, 1: different, 2: trouble.");
  diff->add_option("a", run.diff.a, kCheckpoint)->required();
  diff->add_option("b", run.diff.b, "The other one, of the same kind or another")->required();
  diff->add_option("--atol", run.diff.atol, "Elements may differ by this much")->check(CLI::NonNegativeNumber);
  diff->add_option("--rtol", run.diff.rtol, "and by this share of the element of b")->check(CLI::NonNegativeNumber);
  diff->add_flag("--json", run.diff.json, "As JSON");
  diff->add_flag("-q,--quiet", run.diff.quiet, "Print nothing");
  add_block_option(diff, run.diff.block_bytes);
  diff->callback([&run] {
    constexpr int kTrouble = 2;
    run.trouble_code = kTrouble;
    run.exit_code = cli::diff(run.diff);
  });

  auto* convert = app.add_subcommand("convert", "Write a checkpoint as one of another kind");
  convert->add_option("source", run.convert.source, kCheckpoint)->required();
  convert->add_option("destination", run.convert.destination, "What is written")->required();
  convert
      ->add_option("--to", run.convert.to,
                   "dcp: a directory, torch: a file that torch.load reads, safetensors: a directory of them")
      ->required()
      ->check(CLI::IsMember(std::vector<std::string>(kWritableKinds.begin(), kWritableKinds.end())))
      ->type_name("KIND");
  convert->add_flag("-f,--force", run.convert.force, "Replace the destination if it is there");
  convert->add_flag("--no-verify", run.convert.no_verify, kNoVerify);
  add_block_option(convert, run.convert.block_bytes);
  convert->callback([&run] { run.exit_code = cli::convert(run.convert); });

  auto* reshard = app.add_subcommand("reshard", "Write a checkpoint as so many ranks would have saved it");
  reshard->footer("Each rank has its rows of every tensor, as torch.chunk splits them.");
  reshard->add_option("source", run.convert.source, kCheckpoint)->required();
  reshard->add_option("destination", run.convert.destination, "The directory that is written")->required();
  reshard->add_option("-n,--ranks", run.convert.ranks, "How many")->required()->check(CLI::Range(1, 4096));
  reshard->add_flag("-f,--force", run.convert.force, "Replace the destination if it is there");
  reshard->add_flag("--no-verify", run.convert.no_verify, kNoVerify);
  add_block_option(reshard, run.convert.block_bytes);
  reshard->callback([&run] {
    run.convert.to = "dcp";
    run.exit_code = cli::convert(run.convert);
  });

  auto* extract = app.add_subcommand("extract", "One tensor as an .npy file, or one value as JSON");
  extract->add_option("source", run.extract.source, kCheckpoint)->required();
  extract->add_option("key", run.extract.key, "The name, as inspect prints it")->required();
  extract->add_option("-o,--output", run.extract.output, "Where to; - is stdout, which values go to without it")
      ->type_name("FILE");
  extract->add_flag("--raw", run.extract.raw, "The row-major elements alone; of a value, its torch.save archive");
  extract->add_flag("-f,--force", run.extract.force, "Replace the file if it is there");
  add_block_option(extract, run.extract.block_bytes);
  extract->callback([&run] { run.exit_code = cli::extract(run.extract); });

  auto* launch = app.add_subcommand("launch", "Start ranks of a program on this host, with torchrun's environment");
  launch->footer("What follows -- is the program and its arguments.");
  launch->add_option("-n,--ranks", run.launch.ranks, "How many")->required()->check(CLI::PositiveNumber);
  launch->add_option("--deadline", run.launch.deadline_seconds, "End the run after so many seconds")
      ->check(CLI::NonNegativeNumber);
  launch->callback([&run] {
    if (run.launch.command.empty()) throw CLI::RequiredError("-- program");
    run.exit_code = cli::launch_command(run.launch);
  });

  auto* completion = app.add_subcommand("completion", "A script that completes commands and options in your shell");
  completion->footer("bash: source <(reshard completion bash)");
  completion->add_option("shell", run.shell, "bash, zsh or fish")
      ->required()
      ->check(CLI::IsMember({"bash", "zsh", "fish"}));
  completion->callback([&app, &run] { std::fputs(completion_script(app, run.shell).c_str(), stdout); });
}

}  // namespace reshard::cli
