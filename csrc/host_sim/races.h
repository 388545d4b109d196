// Finds two accesses to the same word of shared memory with nothing that orders them.
//
// Those who access are called actors: threads, and asynchronous operations. Time is one counter for
// all. A thread knows of each actor up to which time its accesses come before what the thread does
// now; barriers hand this knowledge on.
//
// Asynchronous operations access memory by a proxy of their own: what a thread wrote by ordinary
// instructions they see only after a fence by that thread.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "host_sim/simulator.h"

namespace host_sim {

class Races {
 public:
  using Time = std::int32_t;
  static constexpr std::size_t kWordBytes = 2;

  // Threads that access memory together, by one instruction, or on whose behalf an asynchronous
  // operation does it.
  struct Threads {
    int first, count;
  };
  enum class Action {
    kRead,
    kWrite,
    kOverwrite,  // checks as for a write, and leaves the writing for later
  };

  Races(int num_threads, std::size_t bytes);

  // An access by ordinary instructions: a message about the earlier access that this one races
  // with, if there is one.
  std::optional<std::string> access(std::uint32_t address, std::size_t bytes, bool is_write,
                                    Threads by, Location location);

  // Asynchronous operations have actors of their own. `name` stands in messages.
  int add_actor(std::string name);
  // What an operation on behalf of `by` does when it starts. A read is noted as `actor`'s, and must
  // not find what was written after `started`.
  struct AsyncAccess {
    Action action;
    Threads by;
    int actor;
    Location location;
    Time started = std::numeric_limits<Time>::max();
  };
  std::optional<std::string> access_async(std::uint32_t address, std::size_t bytes,
                                          const AsyncAccess& access) {
    return access_async(&address, 1, bytes, access);
  }
  // The same for pieces of `bytes`.
  std::optional<std::string> access_async(const std::uint32_t* addresses, std::size_t count,
                                          std::size_t bytes, const AsyncAccess& access);
  // An operation has written, as `actor`.
  void write_async(std::uint32_t address, std::size_t bytes, int actor, Location location);
  // Of the actor's operations, the thread knows those up to now, or up to `time`.
  void observe(int thread, int actor, Time time);
  Time now() const { return now_; }
  // What comes from now on is later than what was.
  void tick() { ++now_; }

  // What an arrival at a barrier hands on, and a wait takes over. What the thread does after a
  // release is not covered, if `tick` follows.
  using Clock = std::vector<Time>;  // by actor, how far it is known; shorter: no more is known
  void release(int thread, Clock& into) const;
  void acquire(int thread, const Clock& from);
  // The threads meet: what each does later comes after what the others did before.
  void join(Threads threads);
  bool knows(int thread, int actor, Time time) const {
    return thread == actor || known_[thread * stride_ + actor] >= time;
  }

  // The thread's writes so far are visible to asynchronous operations that come after.
  void fence(int thread);

 private:
  using Id = std::uint32_t;  // 0: none
  static constexpr int kMostAsyncActors = 256;

  struct Access {
    Threads by;  // or an asynchronous actor
    Time time;
    bool is_async;
    Location location;
    // Warps and warpgroups of which all threads are known to come after it, for warpgroups also
    // with a fence between. Such knowledge does not get lost.
    std::uint32_t ordered_warps = 0;
    std::uint8_t visible_warpgroups = 0;
  };
  struct Reader {
    Id access, next;
    std::uint32_t length;  // of the list from here
  };
  // A word, or a granule of words that were always accessed together.
  struct Word {
    Id write = 0, readers = 0;
  };
  static constexpr std::size_t kGranuleWords = 8;
  static constexpr Id kIsSplit = 0x80000000;  // in Word::write of a granule: the rest is an index
  using Split = std::array<Word, kGranuleWords>;

  struct Check {
    Threads by;
    bool is_async;
    Action action;
    Time started;
    Id seen_write = 0, seen_reader = 0;  // that were found to be in order
    bool is_needed(const Word& word) const {
      return (word.write != 0 && word.write != seen_write) ||
             (action != Action::kRead && word.readers != 0);
    }
  };

  Id add_access(Threads by, bool is_async, Location location);
  bool is_ordered(const Access& earlier, Threads by) const;
  bool is_visible(const Access& earlier, Threads by) const;
  std::optional<std::string> check_and_note(std::uint32_t address, std::size_t bytes, Check& check,
                                            Id access);
  std::optional<std::string> check_word(const Word& word, Check& check);
  void note(Word& word, const Check& check, Id access);
  void set_write(Word& word, Id access);
  void add_reader(Word& word, Id access);
  Split& split(Word& granule);
  void merge(Word& granule, Id write);
  std::string describe(const Access& earlier) const;

  int num_threads_;
  std::size_t stride_;
  int num_actors_;
  Time now_ = 1;
  std::vector<Time> known_;                // by thread and actor
  std::vector<std::vector<Time>> fences_;  // by thread, ascending
  std::vector<std::string> names_;         // of asynchronous actors
  std::vector<Access> accesses_;
  std::vector<Id> last_;         // by first thread or actor
  std::vector<Reader> readers_;  // each in the list of one word
  std::vector<Id> free_readers_;
  std::vector<Word> granules_;
  std::vector<Split> splits_;
  std::vector<Id> free_splits_;
};

}  // namespace host_sim
