#include "cache.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../cpu/system.h"
#include "kernels.h"

namespace gptfast::engine {

namespace {
constexpr i64 kLargePage = 1 << 21;
constexpr size_t pages_of(i64 positions) { return size_t((positions + kPage - 1) / kPage); }
}  // namespace

Cache::~Cache() {
  for (Row& row : rows_) drop_from(row, 0);
  for (Pool* pool : {&dense_, &banded_})
    for (Page* page : pool->spare) {
      cpu::free_aligned(page->data);
      delete page;
    }
}

Cache::Page* Cache::Pool::make() {
  const i64 alignment = bytes >= kLargePage ? kLargePage : 4096, size = round_up(bytes, 4096);
  char* data = static_cast<char*>(cpu::allocate_aligned(size_t(alignment), size_t(size)));
  if (alignment == kLargePage) cpu::prefer_large_pages(data, size_t(size));  // fewer TLB misses
  made++;
  return new Page{data, 0};
}
Cache::Page* Cache::Pool::take() {
  if (spare.empty()) spare.push_back(make());
  Page* page = spare.back();
  spare.pop_back();
  page->users = 1;
  return page;
}
void Cache::Pool::drop(Page* page) {
  if (!page || --page->users) return;
  if (spare.size() < most_spare) return spare.push_back(page);
  cpu::free_aligned(page->data);
  delete page;
  made--;
}
void Cache::Pool::ensure(size_t pages) {
  most_spare = std::max(most_spare, pages);
  spare.reserve(most_spare);
  while (spare.size() < pages) spare.push_back(make());
}
void Cache::drop_from(Pool& pool, Pages& pages, size_t first) {
  for (size_t i = first; i < pages.pages.size(); i++) pool.drop(pages.pages[i]);
  pages.pages.resize(std::min(first, pages.pages.size()));
  pages.data.resize(pages.pages.size());
}
void Cache::drop_from(Row& row, size_t first) {
  drop_from(dense_, row.dense, first);
  drop_from(banded_, row.banded, first);
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
    for (const Pages* pages : {&old.back().dense, &old.back().banded})
      for (Page* page : pages->pages)
        if (page) page->users++;
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
  row.tokens.resize(std::min(row.tokens.size(), size_t(length)));
  drop_from(row, pages_of(row.length));
}
std::vector<int> Cache::to_reread(i64 r, i64 length) const {
  const Row& row = rows_[size_t(r)];
  const i64 end = row.prefix + length, seen = std::max<i64>(0, end - window_ + 1);
  for (i64 at = seen / kPage * kPage; banded_.bytes && at < end; at += kPage)
    if (!row.banded.pages[size_t(at / kPage)]) return {row.tokens.begin(), row.tokens.begin() + length};
  return {};
}
void Cache::release(i64 r) {
  drop_from(rows_[size_t(r)], 0);
  rows_[size_t(r)] = Row();
}

// The pages of positions [at, at + n), which are the first that are missing, and the one before them its own where it is half
// filled and shared.
void Cache::own(Pool& pool, Pages& pages, i64 at, i64 n, bool banded, std::vector<Copy>& copies) {
  const size_t first = size_t(at / kPage), needed = pages_of(at + n);
  if (first < pages.pages.size() && pages.pages[first]->users > 1) {
    Page* copy = pool.take();
    copies.push_back({pages.data[first], copy->data, at % kPage, banded});
    pool.drop(pages.pages[first]);
    pages.set(first, copy);
  }
  while (pages.pages.size() < needed) {
    pages.pages.reserve(needed), pages.data.reserve(needed);
    Page* page = pool.take();
    pages.pages.push_back(page);
    pages.data.push_back(page->data);
  }
}
void Cache::reserve(i64 r, i64 n, std::vector<Copy>& copies) {
  Row& row = rows_[size_t(r)];
  if (dense_.bytes) own(dense_, row.dense, row.length, n, false, copies);
  if (!banded_.bytes) return;
  row.banded.pages.reserve(pages_of(row.length + n)), row.banded.data.reserve(pages_of(row.length + n));
  row.tokens.reserve(size_t(row.length + n));
  const std::vector<Page*>& held = row.banded.pages;
  const size_t first = size_t(row.length / kPage), missing = pages_of(row.length + n) - held.size();
  reserved_ += std::min(missing, pages_of(window_ + kSlack + kMostRows) + 1);
  if (first < held.size() && held[first]->users > 1) reserved_++;
  banded_.ensure(reserved_);
}
void Cache::slide(i64 r, i64 at, i64 n, bool keep, std::vector<Copy>& copies) {
  if (!banded_.bytes) return;
  Row& row = rows_[size_t(r)];
  const size_t seen = size_t(std::max<i64>(0, at - window_ + 1 - kSlack) / kPage);
  for (size_t i = pages_of(row.prefix); !keep && i < std::min(seen, row.banded.pages.size()); i++) {
    banded_.drop(row.banded.pages[i]);
    row.banded.set(i, nullptr);
  }
  own(banded_, row.banded, at, n, true, copies);
}
void Cache::append(i64 r, i64 n, const int* tokens) {
  Row& row = rows_[size_t(r)];
  row.length += n;
  if (banded_.bytes && tokens) row.tokens.insert(row.tokens.end(), tokens, tokens + n);
}
void Cache::settle() {
  reserved_ = 0;
  banded_.most_spare = kSpare;
  while (banded_.spare.size() > kSpare) {
    Page* page = banded_.spare.back();
    banded_.spare.pop_back();
    page->users = 1;
    banded_.drop(page);
  }
}

}  // namespace gptfast::engine
