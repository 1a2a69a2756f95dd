// Keys and values of running sequences, in pages of 64 positions that copies of a sequence share until one writes.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "adapter.h"
#include "format.h"

namespace gptfast::engine {

class Cache {
 public:
  // max_len: the most tokens of a row, its prefix apart; positions: with the prefix.
  Cache(i64 page_bytes, i64 capacity, i64 max_len, i64 positions)
      : page_bytes_(page_bytes), max_len_(max_len), positions_(positions), rows_(size_t(capacity)) {}
  ~Cache();
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  i64 capacity() const { return i64(rows_.size()); }
  i64 max_len() const { return max_len_; }
  bool live(i64 row) const { return row >= 0 && row < capacity() && rows_[size_t(row)].live; }
  i64 length(i64 row) const { return rows_[size_t(row)].length; }  // with the prefix
  // Positions of a soft prompt, which are the first and stay when the row is cut.
  i64 prefix(i64 row) const { return rows_[size_t(row)].prefix; }
  i64 tokens(i64 row) const { return length(row) - prefix(row); }
  void set_prefix(i64 row) { rows_[size_t(row)].prefix = length(row); }  // all that it holds
  i64 free_rows() const;
  i64 tokens_of(i64 row) const { return live(row) ? tokens(row) : 0; }

  // What a call asks for is checked where it acts, under the engine's lock: another thread may have been there since the
  // caller looked. `what` names the call. std::invalid_argument, or std::runtime_error where there is no room for rows.
  void check_live(const char* what, i64 row) const;
  void check_rows(const char* what, const std::vector<i64>& rows) const;  // in use, without repeats
  void check_room(const char* what, i64 row, i64 count) const;            // for count more positions
  void check_free(i64 count) const;
  const Adapters& adapters(i64 row) const { return rows_[size_t(row)].adapters; }
  // Of a row that is empty: what it holds was computed under its adapters.
  void set_adapters(i64 row, Adapters adapters) { rows_[size_t(row)].adapters = std::move(adapters); }
  i64 bytes() const { return page_bytes_ * i64(pages_made_); }

  i64 add();                                                                 // an empty row; -1 when there is no room
  void copy(const std::vector<i64>& rows, const std::vector<i64>& sources);  // rows[i] = what sources[i] was before
  void truncate(i64 row, i64 length);
  void release(i64 row);
  // Makes room for n more positions, with the pages that will be written the row's own; append then counts them. Pages
  // that were shared are still to be copied, so many positions of them.
  struct Copy {
    const char* from;
    char* to;
    i64 positions;
  };
  void reserve(i64 row, i64 n, std::vector<Copy>& copies);
  void append(i64 row, i64 n) { rows_[size_t(row)].length += n; }
  char* const* pages(i64 row) const { return rows_[size_t(row)].data.data(); }

 private:
  struct Page {
    char* data;
    int users;
  };
  struct Row {
    bool live = false;
    i64 length = 0, prefix = 0;
    std::vector<Page*> pages;
    std::vector<char*> data;  // of the pages
    Adapters adapters;
  };
  Page* make();
  void drop(Page* page);
  void drop_from(Row& row, size_t first);

  const i64 page_bytes_, max_len_, positions_;
  std::vector<Row> rows_;
  std::vector<Page*> spare_;
  size_t pages_made_ = 0;
};

}  // namespace gptfast::engine
