// Cooperative threads with stacks of their own, for the emulator of a block.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cpu {

#if defined(__x86_64__)
// Saves what the calling convention lets a callee keep, and goes on where `to` was saved. ucontext would also call the
// kernel for the signal mask, which takes most of an emulation's time.
extern "C" void phalanx_switch(void** from, void* to);
__asm__(
    ".text\n.weak phalanx_switch\n.type phalanx_switch,@function\nphalanx_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
    ".size phalanx_switch, .-phalanx_switch\n");

class Context {
 public:
  // Makes it run `entry`, which never returns, on the stack that ends at `end`.
  void start(unsigned char* begin, size_t bytes, void (*entry)()) {
    auto top = reinterpret_cast<uintptr_t>(begin + bytes) & ~uintptr_t(15);
    auto** at = reinterpret_cast<void**>(top) - 2;  // as after a call: 8 bytes off a multiple of 16
    at[1] = nullptr;
    at[0] = reinterpret_cast<void*>(entry);
    at -= 6;
    std::memset(at, 0, 6 * sizeof *at);
    saved_ = at;
  }
  static void swap(Context& from, Context& to) { phalanx_switch(&from.saved_, to.saved_); }

 private:
  void* saved_ = nullptr;
};
#else
class Context {
 public:
  void start(unsigned char* begin, size_t bytes, void (*entry)()) {
    getcontext(&saved_);
    saved_.uc_stack.ss_sp = begin;
    saved_.uc_stack.ss_size = bytes;
    saved_.uc_link = nullptr;
    makecontext(&saved_, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.saved_, &to.saved_); }

 private:
  ucontext_t saved_;
};
#endif

}  // namespace cpu
