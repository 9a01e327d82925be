// Decode: tiles of queries, and requests for rows before they are used. Included inside a namespace, before the kernel.

// Queries go in tiles of as many as leave registers free, then of half as many, down to one.
constexpr int kTileQueries = 4;
constexpr int query_tiles(int M) { return M / 4 + M % 4 / 2 + M % 2; }

// Rows are asked for kBytesAhead before they are used, into the second cache: the first one waits for few lines at a
// time, too few for the latency of memory. (Two Zen 4 cores reading runs of 8 KiB in random order, GB/s, where a plain
// sum over memory in order gives 34-36: 20 without requests; into the first cache or past the outer ones 22-24 at any
// distance, asked for once or twice; into the second 24 at 1 KiB, 27 at 2, 30 at 4, 31 from 8 to 16 KiB.) They are
// asked for again at half the distance, and into the first cache at an eighth, which shuffled pages need: some requests
// seem to be dropped. (M = 8, D = 128, shuffled, sum 36: 23 asked for once, 26 twice, 28 three times. All requests of a
// row at once instead of one by one between products: 20.)
constexpr int kBytesAhead = 16 * 1024;

class Ahead {
 public:
  // For queries from m on: each tile of queries passes over the same rows, and asks for its share of those to come.
  HETIS_INLINE Ahead(int row_bytes, int m, int M) : pass_(query_tiles(m)), passes_(query_tiles(M)) {
    rows_ = kBytesAhead / row_bytes < kRowsAhead ? kBytesAhead / row_bytes : kRowsAhead;
  }

  // Bytes [offset, offset + bytes) of the rows that follow rows[0] to rows[count - 1].
  HETIS_INLINE void fetch(const char* const* rows, int count, int offset, int bytes) const {
    for (int t = pass_; t < count; t += passes_)
#pragma GCC unroll 8
      for (int i = offset; i < offset + bytes; i += 64) {
        __builtin_prefetch(rows[t + rows_] + i, 0, 2);
        __builtin_prefetch(rows[t + rows_ / 2] + i, 0, 2);
        __builtin_prefetch(rows[t + rows_ / 8] + i, 0, 3);
      }
  }

 private:
  int pass_, passes_, rows_;
};
