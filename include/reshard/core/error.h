// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Errors of the whole library.
//
// Every failure that a caller or a file can cause is a reshard::Error: a code that says what to do next, and a text
// that says what failed, where (rank, key, file, offset), what was wanted and what was found. What crossed ranks is a
// CheckpointError: every rank gets the same one, with the cause of each rank that failed.

#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace reshard {

enum class ErrorCode : uint8_t {
  kInvalidArgument,     // the caller's mistake: change the call
  kNotFound,            // a key, file or checkpoint is not there
  kAlreadyExists,       // something is there that must not be
  kFailedPrecondition,  // right call, wrong state: fix the state first
  kCorruptData,         // bytes that break their format or checksum: use another copy
  kIo,                  // the operating system refused or failed
  kTimeout,             // a peer stayed silent past the deadline
  kUnavailable,         // a peer or a service is gone
  kUnsupported,         // well formed, but not implemented here
  kInternal,            // a bug in this library
};

/// "corrupt data", "not found", ...
std::string_view to_string(ErrorCode code);

/// Where an error happened and what was expected; empty members are left out of the text.
struct ErrorContext {
  std::optional<int> rank{};
  std::string key{};  // fully qualified name
  std::string file{};
  std::optional<uint64_t> offset{};  // byte offset in `file`
  std::string wanted{};
  std::string found{};
};

/// The root of all errors. Immutable; safe to copy between threads.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message, ErrorContext context = {});

  ErrorCode code() const noexcept { return code_; }
  /// The text given by the thrower, without the context.
  const std::string& message() const noexcept { return message_; }
  const ErrorContext& context() const noexcept { return context_; }

  /// The same error with the empty members of its context filled from `outer`: the edge that knows the file or the key
  /// adds it, once.
  Error with_context(const ErrorContext& outer) const;

 private:
  ErrorCode code_;
  std::string message_;
  ErrorContext context_;
};

/// Whether the save that failed is the one a reader finds afterwards.
enum class Committed : uint8_t { kNo, kYes, kUnknown };
std::string_view to_string(Committed committed);

/// One rank's cause inside a CheckpointError.
struct RankFailure {
  ErrorCode code = ErrorCode::kInternal;
  std::string message;  // the full text of the error on that rank
};

/// A save or load that failed on at least one rank, thrown with the same content on every rank that could be reached.
class CheckpointError : public Error {
 public:
  /// `step` names what was being done ("plan", "write", "commit", ...). `failures` is not empty. The code is that of
  /// the first cause: the lowest rank whose failure is not itself a silent or lost peer. The text has a line for each
  /// failing rank.
  CheckpointError(std::string step, std::map<int, RankFailure> failures, Committed committed);

  const std::string& step() const noexcept { return step_; }
  const std::map<int, RankFailure>& failures() const noexcept { return failures_; }
  Committed committed() const noexcept { return committed_; }

 private:
  std::string step_;
  std::map<int, RankFailure> failures_;
  Committed committed_;
};

/// Runs `body`; an Error leaving it gains the context. A CheckpointError, which names its ranks already, and other
/// exceptions pass unchanged.
template <class Body>
decltype(auto) with_error_context(const ErrorContext& context, Body&& body) {
  try {
    return body();
  } catch (const CheckpointError&) {
    throw;
  } catch (const Error& error) {
    throw error.with_context(context);
  }
}

/// The same with a context that is made only when it is needed: for bodies that run a million times.
template <class MakeContext, class Body>
requires std::is_invocable_r_v<ErrorContext, MakeContext>
decltype(auto) with_error_context(MakeContext&& make_context, Body&& body) {
  try {
    return body();
  } catch (const CheckpointError&) {
    throw;
  } catch (const Error& error) {
    throw error.with_context(make_context());
  }
}

/// The failure that describes the exception being handled. Call it inside a catch block only.
RankFailure current_failure();

}  // namespace reshard
