// Bytes a second that THREADS threads read of memory together: the median of REPEATS passes over MIB mebibytes.
//     g++ -O3 -march=native -pthread bandwidth.cc -o bandwidth && ./bandwidth THREADS MIB REPEATS
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

constexpr std::size_t kAhead = 1024;  // numbers: two pages, at whose end a processor's own reading ahead stops

// Several sums, so that additions do not wait for each other; the compiler makes vectors of them.
static std::uint64_t read_all(const std::uint64_t* from, std::size_t count) {
  std::uint64_t sums[32] = {};
  for (std::size_t i = 0; i + 32 <= count; i += 32) {
    for (int line = 0; line < 32; line += 8) __builtin_prefetch(from + i + kAhead + line, 0, 2);
    for (int lane = 0; lane < 32; ++lane) sums[lane] += from[i + lane];
  }
  std::uint64_t total = 0;
  for (std::uint64_t sum : sums) total += sum;
  return total;
}

int main(int count, char** words) {
  if (count != 4) return 2;
  const int threads = std::atoi(words[1]), repeats = std::atoi(words[3]);
  const std::size_t numbers = (std::size_t(std::atol(words[2])) << 20) / 8 / threads * threads;
  std::vector<std::uint64_t> memory(numbers, 1);
  std::vector<double> rates;
  std::uint64_t seen = 0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    std::vector<std::uint64_t> totals(threads);
    const auto started = std::chrono::steady_clock::now();
    std::vector<std::thread> readers;
    for (int i = 0; i < threads; ++i)
      readers.emplace_back([&, i] { totals[i] = read_all(memory.data() + numbers / threads * i, numbers / threads); });
    for (auto& reader : readers) reader.join();
    rates.push_back(numbers * 8 / std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count());
    for (std::uint64_t total : totals) seen += total;
  }
  std::sort(rates.begin(), rates.end());
  std::printf("%.0f\n", seen ? rates[rates.size() / 2] : 0.0);
}
