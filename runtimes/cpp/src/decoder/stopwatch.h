// Milliseconds by name, of an answer that begins when the watch is made.
#pragma once

#include <chrono>
#include <string>
#include <utility>
#include <vector>

namespace edgeprune {

class Stopwatch {
 public:
  using Clock = std::chrono::steady_clock;

  // Adds the time of its life to a name.
  class Lap {
   public:
    Lap(Stopwatch& watch, std::string name) : watch_(watch), name_(std::move(name)), start_(Clock::now()) {}
    ~Lap() { watch_.add(name_, std::chrono::duration<double, std::milli>(Clock::now() - start_).count()); }
    Lap(const Lap&) = delete;
    Lap& operator=(const Lap&) = delete;

   private:
    Stopwatch& watch_;
    std::string name_;
    Clock::time_point start_;
  };

  void add(const std::string& name, double milliseconds) {
    for (auto& [known, sum] : entries_) {
      if (known == name) {
        sum += milliseconds;
        return;
      }
    }
    entries_.emplace_back(name, milliseconds);
  }
  double of(const std::string& name) const {
    for (const auto& [known, sum] : entries_) {
      if (known == name) return sum;
    }
    return 0;
  }
  // Since the answer began.
  double elapsed_ms() const { return std::chrono::duration<double, std::milli>(Clock::now() - started_).count(); }
  // In the order in which they ended first.
  const std::vector<std::pair<std::string, double>>& entries() const { return entries_; }

 private:
  std::vector<std::pair<std::string, double>> entries_;
  Clock::time_point started_ = Clock::now();
};

}  // namespace edgeprune
