#include "checksum.h"

#include <algorithm>
#include <atomic>
#include <thread>

namespace gptfast::engine {
namespace {
constexpr i64 kPiece = 1 << 20;      // what a thread takes at a time
constexpr i64 kPiecesOfAThread = 4;  // less is read before another thread has begun
struct Piece {
  Region bytes;
  uint64_t mark;
};
}  // namespace

uint64_t checksum(const std::vector<Region>& regions, int threads, const Kernels& kernels) {
  std::vector<Piece> pieces;
  for (const auto& [data, bytes] : regions)
    for (i64 begin = 0; begin == 0 || begin < bytes; begin += kPiece)
      pieces.push_back({{data + begin, std::min(kPiece, bytes - begin)}, 0});
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i; (i = next++) < pieces.size();)
      pieces[i].mark = kernels.checksum(pieces[i].bytes.first, pieces[i].bytes.second, i);
  };
  std::vector<std::thread> helpers;
  const i64 useful = i64(pieces.size()) / kPiecesOfAThread;
  for (i64 t = 1; t < std::min<i64>(threads, useful); t++) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  uint64_t mark = pieces.size();
  for (const Piece& piece : pieces) mark = kernels.checksum(reinterpret_cast<const char*>(&piece.mark), 8, mark);
  return mark;
}

}  // namespace gptfast::engine
