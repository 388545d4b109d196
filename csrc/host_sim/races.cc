#include "host_sim/races.h"

#include <algorithm>
#include <utility>

namespace host_sim {

namespace {

// Four numbers at a time, whatever the compiler is asked to optimise.
using Times = Races::Time __attribute__((vector_size(16), aligned(4), may_alias));

void take_larger(Races::Time* into, const Races::Time* from, std::size_t count) {
  std::size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    auto& a = *reinterpret_cast<Times*>(into + i);
    const Times b = *reinterpret_cast<const Times*>(from + i);
    a = a > b ? a : b;
  }
  for (; i < count; ++i) into[i] = std::max(into[i], from[i]);
}

}  // namespace

Races::Races(int num_threads, std::size_t bytes)
    : num_threads_(num_threads),
      stride_(num_threads + kMostAsyncActors),
      num_actors_(num_threads),
      known_(num_threads * stride_),
      fences_(num_threads),
      accesses_(1),
      last_(stride_),
      readers_(1),
      granules_((bytes + kGranuleWords * kWordBytes - 1) / (kGranuleWords * kWordBytes)) {}

int Races::add_actor(std::string name) {
  if (num_actors_ == num_threads_ + kMostAsyncActors)
    throw Error("too many mbarriers and threads that store tensors");
  names_.push_back(std::move(name));
  return num_actors_++;
}

Races::Id Races::add_access(Threads by, bool is_async, Location location) {
  Id& last = last_[by.first];
  const Access& same = accesses_[last];
  if (last == 0 || same.time != now_ || same.by.count != by.count || same.is_async != is_async ||
      same.location.line != location.line || same.location.file != location.file) {
    last = static_cast<Id>(accesses_.size());
    accesses_.push_back({by, now_, is_async, location});
  }
  return last;
}

bool Races::is_ordered(const Access& earlier, Threads by) const {
  for (int thread = by.first; thread < by.first + by.count; ++thread) {
    for (int actor = earlier.by.first; actor < earlier.by.first + earlier.by.count; ++actor) {
      if (!knows(thread, actor, earlier.time)) return false;
    }
  }
  return true;
}

bool Races::is_visible(const Access& earlier, Threads by) const {
  if (earlier.is_async) return true;
  for (int writer = earlier.by.first; writer < earlier.by.first + earlier.by.count; ++writer) {
    const auto& fences = fences_[writer];
    const auto fence = std::lower_bound(fences.begin(), fences.end(), earlier.time);
    if (fence == fences.end()) return false;
    for (int thread = by.first; thread < by.first + by.count; ++thread) {
      if (!knows(thread, writer, *fence)) return false;
    }
  }
  return true;
}

std::string Races::describe(const Access& earlier) const {
  const std::string who = earlier.is_async ? names_[earlier.by.first - num_threads_]
                          : earlier.by.count > 1
                              ? "warp " + std::to_string(earlier.by.first / kWarpSize)
                              : "thread " + std::to_string(earlier.by.first);
  return "by " + who + " at " + earlier.location.file + ":" + std::to_string(earlier.location.line);
}

// What is wrong, up to the earlier access's place.
std::optional<std::string> Races::check_word(const Word& word, Check& check) {
  if (word.write != 0 && word.write != check.seen_write) {
    Access& earlier = accesses_[word.write];
    if (earlier.time > check.started)
      return "before the write, later than the first warp's start, " + describe(earlier);
    const std::uint32_t warp = check.by.count == kWarpSize ? 1u << check.by.first / kWarpSize : 0;
    const std::uint8_t warpgroup =
        check.is_async && check.by.count > 1
            ? static_cast<std::uint8_t>(1u << check.by.first / check.by.count)
            : 0;
    if (!(earlier.ordered_warps & warp) && !(earlier.visible_warpgroups & warpgroup)) {
      if (!is_ordered(earlier, check.by)) return "after the write " + describe(earlier);
      if (check.is_async && !is_visible(earlier, check.by))
        return "as seen by asynchronous operations, after the write without fence_async_proxy " +
               describe(earlier);
      earlier.ordered_warps |= warp;
      earlier.visible_warpgroups |= warpgroup;
    }
    check.seen_write = word.write;
  }
  if (check.action == Action::kRead) return std::nullopt;
  for (Id reader = word.readers; reader != 0; reader = readers_[reader].next) {
    const Id access = readers_[reader].access;
    if (access == check.seen_reader) continue;
    if (!is_ordered(accesses_[access], check.by))
      return "after the read " + describe(accesses_[access]);
    check.seen_reader = access;
  }
  return std::nullopt;
}

void Races::note(Word& word, const Check& check, Id access) {
  if (check.action == Action::kOverwrite) return;
  if (check.action == Action::kWrite) {
    set_write(word, access);
    return;
  }
  // Of the same actors' reads the last is enough; it is looked for among the first few.
  constexpr int kLook = 4;
  Id reader = word.readers;
  for (int i = 0; i < kLook && reader != 0; ++i, reader = readers_[reader].next) {
    const Threads& by = accesses_[readers_[reader].access].by;
    if (by.first == accesses_[access].by.first && by.count == accesses_[access].by.count) {
      readers_[reader].access = access;
      return;
    }
  }
  const std::uint32_t length = word.readers == 0 ? 0 : readers_[word.readers].length;
  if (length >= 8 && (length & (length - 1)) == 0) {
    // Readers that come before this one need not be remembered.
    for (Id rest = std::exchange(word.readers, 0); rest != 0;) {
      const Reader old = readers_[rest];
      free_readers_.push_back(rest);
      rest = old.next;
      if (!is_ordered(accesses_[old.access], check.by)) add_reader(word, old.access);
    }
  }
  add_reader(word, access);
}

void Races::set_write(Word& word, Id access) {
  for (Id reader = word.readers; reader != 0; reader = readers_[reader].next)
    free_readers_.push_back(reader);
  word = {access, 0};
}

void Races::add_reader(Word& word, Id access) {
  const std::uint32_t length = word.readers == 0 ? 0 : readers_[word.readers].length;
  if (free_readers_.empty()) {
    free_readers_.push_back(static_cast<Id>(readers_.size()));
    readers_.emplace_back();
  }
  const Id added = free_readers_.back();
  free_readers_.pop_back();
  readers_[added] = {access, word.readers, length + 1};
  word.readers = added;
}

// The words of a granule, which from now on are looked at one by one.
Races::Split& Races::split(Word& granule) {
  if (!(granule.write & kIsSplit)) {
    if (free_splits_.empty()) {
      free_splits_.push_back(static_cast<Id>(splits_.size()));
      splits_.emplace_back();
    }
    const Id index = free_splits_.back();
    free_splits_.pop_back();
    for (Word& word : splits_[index]) {
      word = {granule.write, 0};
      for (Id reader = granule.readers; reader != 0; reader = readers_[reader].next)
        add_reader(word, readers_[reader].access);
    }
    set_write(granule, kIsSplit | index);
  }
  return splits_[granule.write & ~kIsSplit];
}

void Races::merge(Word& granule, Id write) {
  if (granule.write & kIsSplit) {
    const Id index = granule.write & ~kIsSplit;
    for (Word& word : splits_[index]) set_write(word, 0);
    free_splits_.push_back(index);
  }
  set_write(granule, write);
}

std::optional<std::string> Races::check_and_note(std::uint32_t address, std::size_t bytes,
                                                 Check& check, Id access) {
  const std::size_t end = (address + bytes + kWordBytes - 1) / kWordBytes;
  for (std::size_t word = address / kWordBytes; word < end;) {
    Word& granule = granules_[word / kGranuleWords];
    const bool is_whole = word % kGranuleWords == 0 && end - word >= kGranuleWords;
    if (is_whole && !(granule.write & kIsSplit)) {
      if (check.is_needed(granule)) {
        if (auto wrong = check_word(granule, check)) return wrong;
      }
      note(granule, check, access);
      word += kGranuleWords;
      continue;
    }
    Split& words = split(granule);
    const std::size_t stop = std::min(end, word / kGranuleWords * kGranuleWords + kGranuleWords);
    for (; word < stop; ++word) {
      Word& part = words[word % kGranuleWords];
      if (check.is_needed(part)) {
        if (auto wrong = check_word(part, check)) return wrong;
      }
      note(part, check, access);
    }
    if (is_whole && check.action == Action::kWrite) merge(granule, access);
  }
  return std::nullopt;
}

std::optional<std::string> Races::access(std::uint32_t address, std::size_t bytes, bool is_write,
                                         Threads by, Location location) {
  Check check{by, false, is_write ? Action::kWrite : Action::kRead,
              std::numeric_limits<Time>::max()};
  const auto wrong = check_and_note(address, bytes, check, add_access(by, false, location));
  if (!wrong) return std::nullopt;
  return std::string("nothing orders this ") + (is_write ? "write" : "read") +
         " of shared address " + std::to_string(address) + " " + *wrong;
}

std::optional<std::string> Races::access_async(const std::uint32_t* addresses, std::size_t count,
                                               std::size_t bytes, const AsyncAccess& access) {
  const bool is_read = access.action == Action::kRead;
  const Id id = is_read ? add_access({access.actor, 1}, true, access.location) : 0;
  Check check{access.by, true, access.action, access.started};
  for (std::size_t i = 0; i < count; ++i) {
    if (auto wrong = check_and_note(addresses[i], bytes, check, id)) {
      return std::string("nothing orders this ") + (is_read ? "read" : "write") +
             " of shared address " + std::to_string(addresses[i]) + " " + *wrong;
    }
  }
  return std::nullopt;
}

void Races::write_async(std::uint32_t address, std::size_t bytes, int actor, Location location) {
  const Id access = add_access({actor, 1}, true, location);
  // Nobody is in the way: that was found when the operation started.
  for (std::size_t word = address / kWordBytes; word * kWordBytes < address + bytes;
       word += kGranuleWords) {
    merge(granules_[word / kGranuleWords], access);
  }
}

void Races::observe(int thread, int actor, Time time) {
  Time& known = known_[thread * stride_ + actor];
  known = std::max(known, time);
}

void Races::release(int thread, Clock& into) const {
  if (into.size() < static_cast<std::size_t>(num_actors_)) into.resize(num_actors_);
  take_larger(into.data(), &known_[thread * stride_], num_actors_);
  into[thread] = now_;
}

void Races::acquire(int thread, const Clock& from) {
  take_larger(&known_[thread * stride_], from.data(), from.size());
}

void Races::join(Threads threads) {
  Clock all;
  for (int i = 0; i < threads.count; ++i) release(threads.first + i, all);
  for (int i = 0; i < threads.count; ++i) acquire(threads.first + i, all);
  tick();
}

void Races::fence(int thread) {
  fences_[thread].push_back(now_);
  tick();
}

}  // namespace host_sim
