// Twins of sm_90a's asynchronous instructions, as late as the instruction set allows: a bulk copy lands, and a wgmma reads its operands,
// when nothing else can go on; with a seed, at any time between its issue and its wait. Sums hold
// NaN until they are waited for. So a missing wait and a slot released too early give wrong numbers. emulator.h ends with this file.
#pragma once

namespace gf_emulator {

// ---- shared memory by address ------------------------------------------------------------------------
// Dynamic shared memory begins at an address that is a multiple of 128 and of nothing more.
constexpr uint32_t kSharedBase = 1024 + 128;

inline Shared& dynamic_shared() {
  for (Shared& s : machine.shared) {
    if (!s.key) return s;
  }
  fail("an address in dynamic shared memory, before GF_DYNAMIC_SHARED");
}
inline uint32_t shared_address(const void* p) {
  return kSharedBase + uint32_t(static_cast<const unsigned char*>(p) - dynamic_shared().bytes.get());
}
inline uint16_t* shared_at(uint32_t address) {
  const Shared& s = dynamic_shared();
  if (address < kSharedBase || address + 2 > kSharedBase + s.size || address % 2)
    fail("no shared memory at address " + std::to_string(address));
  return reinterpret_cast<uint16_t*>(s.bytes.get() + (address - kSharedBase));
}

// PTX ISA, swizzling: in rows of 128 (64, 32) bytes the 16-byte units change places by bits 7 to 9 (7 to 8, 7) of the address.
inline uint32_t swizzle(uint32_t address, uint32_t bytes) {
  const uint32_t units = bytes / 16, unit = address / 16 % units, turn = address / 128 % units;
  return address / bytes * bytes + (unit ^ turn) * 16 + address % 16;
}

// ---- transaction barriers ------------------------------------------------------------------------------
struct Mbarrier {
  uint8_t arrivals, parity;
  int16_t missing;  // arrivals
  int32_t bytes;    // expected and not landed; negative while they land before they are expected
};

inline Mbarrier& mbarrier_at(uint64_t* barrier) {
  Mbarrier& b = *reinterpret_cast<Mbarrier*>(barrier);
  if (b.arrivals == 0xff) fail("a barrier is used before it is initialised");
  return b;
}
inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  *reinterpret_cast<Mbarrier*>(barrier) = {uint8_t(arrivals), 0, int16_t(arrivals), 0};
}
inline void mbarrier_count(uint64_t* barrier, int arrivals, int bytes) {
  Mbarrier& b = mbarrier_at(barrier);
  b.missing = int16_t(b.missing - arrivals);
  b.bytes += bytes;
  if (b.missing < 0) fail("more threads arrive at a barrier than it counts");
  if (b.missing || b.bytes) return;
  b.parity ^= 1;
  b.missing = b.arrivals;
}
inline void mbarrier_arrive(uint64_t* barrier, int bytes) {
  mbarrier_count(barrier, 1, bytes);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, const std::source_location& where) {
  wait_until([=] { return mbarrier_at(barrier).parity != parity; }, where);
}

inline void named_barrier(int id, int threads, bool wait, const std::source_location& where) {
  if (id < 1 || id > 15 || threads % 32) fail("a named barrier with id " + std::to_string(id) + " for " + std::to_string(threads));
  NamedBarrier& b = machine.named_barriers[id];
  const unsigned turn = b.turn;
  if (++b.arrived == threads) {
    b.arrived = 0;
    ++b.turn;
  } else if (wait) {
    wait_until([&b, turn] { return b.turn != turn; }, where);
  }
}

// ---- bulk tensor copies ----------------------------------------------------------------------------------
struct TensorMap {
  unsigned char* data;
  int64_t size[4], stride[4];  // bytes; of elements of two
  int columns, rows;           // of the box
};

inline TensorMap tensor_map(const void* data, const int64_t (&size)[4], const int64_t (&stride)[4], int columns, int rows) {
  TensorMap map{const_cast<unsigned char*>(static_cast<const unsigned char*>(data)), {}, {}, columns, rows};
  bool ok = reinterpret_cast<uintptr_t>(data) % 16 == 0 && (columns == 16 || columns == 32 || columns == 64) && rows >= 1 && rows <= 256;
  for (int i = 0; i < 4; ++i) {
    map.size[i] = size[i];
    map.stride[i] = 2 * stride[i];
    ok = ok && size[i] >= 1 && size[i] <= int64_t{1} << 32;
    ok = ok && (i ? map.stride[i] % 16 == 0 && map.stride[i] >= 0 && map.stride[i] < int64_t{1} << 40 : stride[0] == 1);
  }
  if (!ok) throw std::runtime_error("emulator: the driver would refuse this tensor map");
  return map;
}

// For each element of the box: its place in the tensor, or nullptr outside, and its address in shared memory.
template <class Move>
void for_box(uint32_t shared, const TensorMap& map, const std::array<int, 4>& at, Move move) {
  const uint32_t bytes = map.columns * 2;
  if (shared % 128) fail("a bulk copy at shared address " + std::to_string(shared) + ", which is no multiple of 128");
  for (int r = 0; r < map.rows; ++r) {
    for (int c = 0; c < map.columns; ++c) {
      const int64_t index[4] = {at[0] + c, at[1] + r, at[2], at[3]};
      unsigned char* place = map.data;
      for (int i = 0; i < 4; ++i) place = place && index[i] >= 0 && index[i] < map.size[i] ? place + index[i] * map.stride[i] : nullptr;
      move(reinterpret_cast<uint16_t*>(place), shared_at(swizzle(shared + r * bytes + 2 * c, bytes)));
    }
  }
}
inline void tensor_load(uint32_t shared, const TensorMap& map, std::array<int, 4> at, uint64_t* barrier) {
  start([=] {
    for_box(shared, map, at, [](const uint16_t* global, uint16_t* local) { *local = global ? *global : uint16_t{0}; });
    mbarrier_count(barrier, 0, -map.columns * map.rows * 2);
  });
}
inline void tensor_store(uint32_t shared, const TensorMap& map, std::array<int, 4> at) {
  Thread* self = machine.current;
  ++self->stores;
  start([=] {
    for_box(shared, map, at, [](uint16_t* global, const uint16_t* local) {
      if (global) *global = *local;
    });
    --self->stores;
  });
}
inline void tensor_stores_wait(const std::source_location& where) {
  Thread* self = machine.current;
  wait_until([=] { return self->stores == 0; }, where);
}

// ---- products of a warpgroup --------------------------------------------------------------------------------
struct Matrix {  // a descriptor, taken apart
  uint32_t address, panels_apart, rows_apart, bytes;
  explicit Matrix(uint64_t d)
      : address(uint32_t(d & 0x3fff) << 4), panels_apart(uint32_t(d >> 16 & 0x3fff) << 4), rows_apart(uint32_t(d >> 32 & 0x3fff) << 4) {
    const unsigned mode = unsigned(d >> 62);
    if (mode == 0 || d >> 46 & 0xffff) fail("a matrix descriptor without swizzle, or with bits that have no meaning here");
    bytes = mode == 1 ? 128 : mode == 2 ? 64 : 32;
  }
  // Values run along the panel (K-major): row r, value k of 16.
  uint16_t along(int r, int k) const { return *shared_at(swizzle(address + r / 8 * rows_apart + r % 8 * bytes + 2 * k, bytes)); }
  // Rows are the 16 values (MN-major): row k, column c over panels.
  uint16_t across(int k, int c) const {
    const int columns = int(bytes) / 2;
    return *shared_at(swizzle(address + c / columns * panels_apart + c % columns * 2 + k / 8 * rows_apart + k % 8 * bytes, bytes));
  }
};

// As wgmma.cuh says; `registers` nullptr: A lies in shared memory. Lanes 4 g to 4 g + 3 of a warp hold A's rows g and g + 8 between them.
inline void wgmma(float* sums, int columns, const uint32_t* registers, uint64_t a, uint64_t b, bool keep, float (*widen)(uint16_t),
                  const std::source_location& where) {
  struct Words {
    uint32_t word[4];
  };
  Thread& self = *machine.current;
  const int quad = lane() / 4, t = lane() % 4, first_row = self.linear % 128 / 32 * 16 + quad;
  Words mine{};
  if (registers) std::copy(registers, registers + 4, mine.word);
  const auto left = exchange(~0u, mine, where, [&](auto get) {
    std::array<Words, 4> all;
    for (int i = 0; i < 4; ++i) all[i] = get(4 * quad + i);
    return all;
  });
  // The first of several products on the same sums remembers them; nobody sees them until the last is done.
  std::vector<float> before;
  if (std::none_of(self.sums_in_flight.begin(), self.sums_in_flight.end(), [&](const float* s) { return s == sums; })) {
    before.assign(sums, sums + columns / 2);
    std::fill(sums, sums + columns / 2, std::nanf(""));
  }
  self.sums_in_flight.push_back(sums);
  const bool in_registers = registers;
  auto products = std::make_shared<std::vector<float>>();
  const auto multiply = [=] {
    const Matrix right(b);
    float row[2][16];
    for (int h = 0; h < 2; ++h) {
      for (int k = 0; k < 16; ++k) {
        const uint32_t word = left[k % 8 / 2].word[k / 8 * 2 + h];
        row[h][k] = widen(in_registers ? uint16_t(word >> 16 * (k % 2)) : Matrix(a).along(first_row + 8 * h, k));
      }
    }
    products->resize(columns / 2);
    for (int i = 0; i < columns / 2; i += 4) {
      for (int e = 0; e < 2; ++e) {
        const int column = 2 * i + 2 * t + e;
        float total[2] = {};
        for (int k = 0; k < 16; ++k) {
          const float value = widen(in_registers ? right.across(k, column) : right.along(column, k));
          for (int h = 0; h < 2; ++h) total[h] += row[h][k] * value;
        }
        for (int h = 0; h < 2; ++h) (*products)[i + 2 * h + e] = total[h];
      }
    }
  };
  if (perhaps()) multiply();
  self.products.back().push_back([=, before = std::move(before), &self] {
    if (products->empty()) multiply();
    std::copy(before.begin(), before.end(), sums);
    for (int i = 0; i < columns / 2; ++i) sums[i] = (keep ? sums[i] : 0.0f) + (*products)[i];
    self.sums_in_flight.erase(self.sums_in_flight.begin());
  });
}
inline void wgmma_commit() {
  machine.current->products.emplace_back();
}
inline void wgmma_wait(int groups, const std::source_location& where) {
  Thread& self = *machine.current;  // its open group is not waited for
  auto done = std::make_shared<bool>(false);
  start([&self, groups, done] {
    for (; int(self.products.size()) - 1 > groups; self.products.erase(self.products.begin())) {
      for (const auto& product : self.products.front()) product();
    }
    *done = true;
  });
  wait_until([done] { return *done; }, where);
  exchange(~0u, 0, where, [](auto) { return 0; });  // a warp waits as one
}

}  // namespace gf_emulator
