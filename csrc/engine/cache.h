// Keys and values of running sequences, in pages of 64 positions that copies of a sequence share until one writes.
//
// Banded layers see the last `window` positions alone, and have pages of their own: those that no later query of the row can
// see are dropped while a text is read, all but kSlack positions, so that a rejected draft can be cut off. A row that is cut
// further back is read again from its tokens (Engine::truncate).
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "adapter.h"
#include "format.h"
#include "kernels.h"

namespace gptfast::engine {

class Cache {
 public:
  struct Sizes {
    i64 dense, banded;  // bytes of a page of all dense and of all banded layers
    i64 window;         // of the banded layers
  };
  // max_len: the most tokens of a row, its prefix apart; positions: with the prefix.
  Cache(const Sizes& sizes, i64 capacity, i64 max_len, i64 positions)
      : window_(sizes.window), max_len_(max_len), positions_(positions), dense_{sizes.dense}, banded_{sizes.banded},
        rows_(size_t(capacity)) {}
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
  i64 bytes() const { return dense_.bytes * i64(dense_.made) + banded_.bytes * i64(banded_.made); }

  i64 add();                                                                 // an empty row; -1 when there is no room
  void copy(const std::vector<i64>& rows, const std::vector<i64>& sources);  // rows[i] = what sources[i] was before
  void truncate(i64 row, i64 length);
  // The tokens to read again after a cut to `length` tokens, which first cuts the row to none; empty where the pages that
  // the next position sees are all there.
  std::vector<int> to_reread(i64 row, i64 length) const;
  void release(i64 row);
  // Makes room for n more positions, with the pages that will be written the row's own; append then counts them. Pages
  // that were shared are still to be copied: `positions` of each. For banded layers it reserves pages, which `slide` makes.
  struct Copy {
    const char* from;
    char* to;
    i64 positions;
    bool banded;
  };
  void reserve(i64 row, i64 n, std::vector<Copy>& copies);
  // The pages of banded layers for positions [at, at + n), which a pass is about to write; those that it cannot see are
  // dropped, all if `keep` is false.
  void slide(i64 row, i64 at, i64 n, bool keep, std::vector<Copy>& copies);
  void append(i64 row, i64 n, const int* tokens);  // tokens: null of a prefix
  void settle();                                   // after a call: no more spare pages than usual
  char* const* pages(i64 row) const { return rows_[size_t(row)].dense.data.data(); }
  char* const* banded(i64 row) const { return rows_[size_t(row)].banded.data.data(); }

 private:
  struct Page {
    char* data;
    int users;
  };
  struct Pool {
    i64 bytes;  // of a page; 0: there are no such layers
    std::vector<Page*> spare = {};
    size_t made = 0, most_spare = kSpare;
    Page* make();
    Page* take();
    void drop(Page* page);
    void ensure(size_t pages);  // until `take` can give this many
  };
  struct Pages {
    std::vector<Page*> pages;  // null: dropped
    std::vector<char*> data;
    void set(size_t i, Page* page) { pages[i] = page, data[i] = page ? page->data : nullptr; }
  };
  struct Row {
    bool live = false;
    i64 length = 0, prefix = 0;
    Pages dense, banded;
    std::vector<int> tokens;  // of a model with banded layers
    Adapters adapters;
  };
  static constexpr size_t kSpare = 8;  // pages kept for the next sequence
  static constexpr i64 kSlack = 64;
  void drop_from(Row& row, size_t first);
  static void drop_from(Pool& pool, Pages& pages, size_t first);
  static void own(Pool& pool, Pages& pages, i64 at, i64 n, bool banded, std::vector<Copy>& copies);

  const i64 window_, max_len_, positions_;
  Pool dense_, banded_;
  std::vector<Row> rows_;
  size_t reserved_ = 0;  // pages of banded layers that the running call may take
};

}  // namespace gptfast::engine
