#include "cache.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include <sys/mman.h>

#include "kernels.h"

namespace gptfast::engine {

namespace {
constexpr size_t kSpare = 8;  // pages kept for the next sequence
constexpr i64 kLargePage = 1 << 21;
}

Cache::~Cache() {
  for (Row& row : rows_) drop_from(row, 0);
  for (Page* page : spare_) {
    std::free(page->data);
    delete page;
  }
}

Cache::Page* Cache::make() {
  if (!spare_.empty()) {
    Page* page = spare_.back();
    spare_.pop_back();
    page->users = 1;
    return page;
  }
  const i64 alignment = page_bytes_ >= kLargePage ? kLargePage : 4096, bytes = round_up(page_bytes_, 4096);
  void* memory = nullptr;
  if (posix_memalign(&memory, size_t(alignment), size_t(bytes))) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE                                                           // of Linux
  if (alignment == kLargePage) madvise(memory, size_t(bytes), MADV_HUGEPAGE);  // where there are such; fewer TLB misses
#endif
  char* data = static_cast<char*>(memory);
  pages_made_++;
  return new Page{data, 1};
}
void Cache::drop(Page* page) {
  if (--page->users) return;
  if (spare_.size() < kSpare) return spare_.push_back(page);
  std::free(page->data);
  delete page;
  pages_made_--;
}
void Cache::drop_from(Row& row, size_t first) {
  for (size_t i = first; i < row.pages.size(); i++) drop(row.pages[i]);
  row.pages.resize(std::min(first, row.pages.size()));
  row.data.resize(row.pages.size());
}

void Cache::check_live(const char* what, i64 row) const {
  if (live(row)) return;
  throw std::invalid_argument(std::string(what) + ": slot " + std::to_string(row) +
                              " is not in use; slots come from allocate() and fork() and end with free()");
}
void Cache::check_rows(const char* what, const std::vector<i64>& rows) const {
  std::vector<i64> sorted(rows);
  std::sort(sorted.begin(), sorted.end());
  for (i64 row : rows) check_live(what, row);
  const auto twin = std::adjacent_find(sorted.begin(), sorted.end());
  if (twin != sorted.end())
    throw std::invalid_argument(std::string(what) + ": slot " + std::to_string(*twin) +
                                " is given twice; expected distinct slots");
}
void Cache::check_room(const char* what, i64 row, i64 count) const {
  const i64 room = std::min(max_len_, positions_ - prefix(row));
  if (count <= room - tokens(row)) return;
  throw std::invalid_argument(std::string(what) + ": slot " + std::to_string(row) + " holds " +
                              std::to_string(tokens(row)) + " positions and " + std::to_string(count) +
                              " more do not fit into max_len = " + std::to_string(room) +
                              "; shorten the text or make a runner with a larger max_len (up to block_size)");
}
void Cache::check_free(i64 count) const {
  if (count >= 0 && count <= free_rows()) return;
  throw std::runtime_error("allocate: " + std::to_string(count) + " more slots, but " + std::to_string(free_rows()) +
                           " of " + std::to_string(capacity()) + " are free; free some, or make a runner with more");
}

i64 Cache::free_rows() const {
  return std::count_if(rows_.begin(), rows_.end(), [](const Row& row) { return !row.live; });
}
i64 Cache::add() {
  for (size_t r = 0; r < rows_.size(); r++)
    if (!rows_[r].live) {
      rows_[r].live = true;
      rows_[r].length = rows_[r].prefix = 0;
      return i64(r);
    }
  return -1;
}
void Cache::copy(const std::vector<i64>& rows, const std::vector<i64>& sources) {
  std::vector<Row> old;
  for (i64 source : sources) {
    old.push_back(rows_[size_t(source)]);
    for (Page* page : old.back().pages) page->users++;
  }
  for (size_t i = 0; i < rows.size(); i++) {
    Row& row = rows_[size_t(rows[i])];
    drop_from(row, 0);
    row = std::move(old[i]);
  }
}
void Cache::truncate(i64 r, i64 length) {
  Row& row = rows_[size_t(r)];
  row.length = std::min(row.length, row.prefix + length);
  drop_from(row, size_t((row.length + kPage - 1) / kPage));
}
void Cache::release(i64 r) {
  drop_from(rows_[size_t(r)], 0);
  rows_[size_t(r)] = Row();
}
void Cache::reserve(i64 r, i64 n, std::vector<Copy>& copies) {
  Row& row = rows_[size_t(r)];
  const size_t first = size_t(row.length / kPage), needed = size_t((row.length + n + kPage - 1) / kPage);
  if (first < row.pages.size() && row.pages[first]->users > 1) {  // half filled and shared: a page of its own
    Page* own = make();
    copies.push_back({row.data[first], own->data, row.length % kPage});
    drop(row.pages[first]);
    row.pages[first] = own;
    row.data[first] = own->data;
  }
  while (row.pages.size() < needed) {
    row.pages.push_back(make());
    row.data.push_back(row.pages.back()->data);
  }
}

}  // namespace gptfast::engine
