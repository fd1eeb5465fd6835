// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/core/error.h"

#include <exception>
#include <new>
#include <system_error>
#include <utility>

namespace reshard {
namespace {

void append(std::string& list, std::string_view part) {
  if (!list.empty()) list += ", ";
  list += part;
}

std::string full_text(ErrorCode code, const std::string& message, const ErrorContext& context) {
  std::string where;
  if (context.rank) append(where, "rank " + std::to_string(*context.rank));
  if (!context.key.empty()) append(where, "key " + context.key);
  if (!context.file.empty()) append(where, "file " + context.file);
  if (context.offset) append(where, "offset " + std::to_string(*context.offset));
  std::string what;
  if (!context.wanted.empty()) append(what, "wanted " + context.wanted);
  if (!context.found.empty()) append(what, "found " + context.found);

  std::string text(to_string(code));
  text += ": ";
  text += message;
  if (!where.empty()) text += "; " + where;
  if (!what.empty()) text += "; " + what;
  return text;
}

// A rank that found a peer silent or gone is rarely the one where the trouble began.
const std::pair<const int, RankFailure>* first_cause(const std::map<int, RankFailure>& failures) {
  for (const auto& failure : failures) {
    if (failure.second.code != ErrorCode::kTimeout && failure.second.code != ErrorCode::kUnavailable) return &failure;
  }
  return failures.empty() ? nullptr : &*failures.begin();
}

ErrorCode code_of(const std::map<int, RankFailure>& failures) {
  const auto* cause = first_cause(failures);
  return cause == nullptr ? ErrorCode::kInternal : cause->second.code;
}

std::string checkpoint_message(const std::string& step, const std::map<int, RankFailure>& failures,
                               Committed committed) {
  std::string text = step + " failed (committed: ";
  text += to_string(committed);
  text += ")";
  const auto* cause = first_cause(failures);
  if (cause == nullptr) return text;
  text += " on " + std::to_string(failures.size()) + (failures.size() == 1 ? " rank" : " ranks");
  const auto line = [&text](const std::pair<const int, RankFailure>& failure) {
    text += "\n  rank " + std::to_string(failure.first) + ": " + failure.second.message;
  };
  line(*cause);
  for (const auto& failure : failures) {
    if (&failure != cause) line(failure);
  }
  return text;
}

}  // namespace

std::string_view to_string(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return "invalid argument";
    case ErrorCode::kNotFound:
      return "not found";
    case ErrorCode::kAlreadyExists:
      return "already exists";
    case ErrorCode::kFailedPrecondition:
      return "failed precondition";
    case ErrorCode::kCorruptData:
      return "corrupt data";
    case ErrorCode::kIo:
      return "input/output error";
    case ErrorCode::kTimeout:
      return "timeout";
    case ErrorCode::kUnavailable:
      return "unavailable";
    case ErrorCode::kUnsupported:
      return "unsupported";
    case ErrorCode::kInternal:
      return "internal error";
  }
  return "unknown error";
}

std::string_view to_string(Committed committed) {
  switch (committed) {
    case Committed::kNo:
      return "no";
    case Committed::kYes:
      return "yes";
    case Committed::kUnknown:
      return "unknown";
  }
  return "unknown";
}

Error::Error(ErrorCode code, const std::string& message, ErrorContext context)
    : std::runtime_error(full_text(code, message, context)),
      code_(code),
      message_(message),
      context_(std::move(context)) {}

Error Error::with_context(const ErrorContext& outer) const {
  ErrorContext merged = context_;
  if (!merged.rank) merged.rank = outer.rank;
  if (merged.key.empty()) merged.key = outer.key;
  if (merged.file.empty()) merged.file = outer.file;
  if (!merged.offset) merged.offset = outer.offset;
  if (merged.wanted.empty()) merged.wanted = outer.wanted;
  if (merged.found.empty()) merged.found = outer.found;
  return Error(code_, message_, std::move(merged));
}

CheckpointError::CheckpointError(std::string step, std::map<int, RankFailure> failures, Committed committed)
    : Error(code_of(failures), checkpoint_message(step, failures, committed)),
      step_(std::move(step)),
      failures_(std::move(failures)),
      committed_(committed) {}

RankFailure current_failure() {
  try {
    throw;
  } catch (const Error& error) {
    return {error.code(), error.what()};
  } catch (const std::bad_alloc&) {
    return {ErrorCode::kUnavailable, "out of memory"};
  } catch (const std::system_error& error) {
    return {ErrorCode::kIo, error.what()};
  } catch (const std::exception& error) {
    return {ErrorCode::kInternal, error.what()};
  } catch (...) {
    return {ErrorCode::kInternal, "an exception that is no std::exception"};
  }
}

}  // namespace reshard
